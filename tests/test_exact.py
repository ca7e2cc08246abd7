"""The numbers that matter, against implementations that are not ours: lm-evaluation-harness and TRL."""
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import train
from conftest import make_model, make_tokenizer
from test_models import local, scores

TRL_TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"     # of the real models, word for word
MARKS = {  # template: (its special tokens, of which the last one ends a turn, bos, eos)
    "qwen3_instruct_2507": (["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "gemma": (["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "llama3": (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>", "<|end_of_text|>"),
}


def conversations(count, seed=0):
    """Training examples of the pipeline: figure 17's form with a response, of very different lengths."""
    rng = random.Random(seed)

    def text(most):
        return "".join(rng.choice("abcdefgh ,.?é\n") for _ in range(rng.randint(1, most))).strip() or "x"

    for _ in range(count):
        talk = [{"role": role, "content": text(60)} for _ in range(rng.randint(0, 3)) for role in ("assistant", "user")]
        yield train.example_chat("Ann", text(30), talk, text(120))


def test_log_probabilities_are_those_of_lm_evaluation_harness_on_the_same_texts(tiny):
    """Their tokens, too: context and continuation as strings, as the chat template renders them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    ours, theirs = local(tiny, batch_size=4), HFLM(AutoModelForCausalLM.from_pretrained(tiny), device="cpu",
                                                   tokenizer=AutoTokenizer.from_pretrained(tiny), max_length=4096,
                                                   add_bos_token=False)
    chats = list(conversations(12, seed=1))
    texts = [(ours.tokenizer.apply_chat_template(c[:-1], tokenize=False), " " + c[-1]["content"]) for c in chats]
    expected = theirs.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)],
                                    disable_tqdm=True)
    assert scores(ours, [common.scored_ids(ours.tokenizer, chat) for chat in chats]) == pytest.approx(
        [log_prob for log_prob, _ in expected], rel=1e-5)


@pytest.mark.filterwarnings("default::FutureWarning")            # TRL's own
@pytest.mark.parametrize("template", MARKS)
def test_the_loss_and_its_mask_are_those_of_trl(template, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    tokenizer = make_tokenizer(((TRL_TEMPLATES / f"{template}.jinja").read_text(), *MARKS[template]))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)     # train.py's padding
    model, chats = make_model(len(tokenizer)), list(conversations(6, seed=2))
    examples = [example for chat in chats for example in train.training_examples(tokenizer, chat)]
    config = SFTConfig(str(tmp_path), assistant_only_loss=True, per_device_train_batch_size=6, max_length=None,
                       report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, shuffle_dataset=False)
    trainer = SFTTrainer(model, config, processing_class=tokenizer,
                         train_dataset=Dataset.from_list([{"messages": chat} for chat in chats]))
    theirs = next(iter(trainer.get_train_dataloader()))
    # TRL's training templates of Qwen and Gemma also train the line feed between two turns, which no model has to say.
    end = tokenizer.convert_tokens_to_ids(MARKS[template][0][-1])
    after_end = F.pad(theirs["labels"][:, :-1] == end, (1, 0))
    between = after_end & (theirs["labels"] == tokenizer.encode("\n", add_special_tokens=False)[0])
    assert between.any() == (template != "llama3")
    theirs["labels"] = theirs["labels"].masked_fill(between, -100)

    ids, labels = train.collate(examples)
    order = [theirs["input_ids"].tolist().index(row) for row in ids.tolist()]
    assert torch.equal(theirs["labels"][order], labels)
    supervised = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        ours = train.sum_loss(trainer.model, ids, labels) / supervised
        assert ours.item() == pytest.approx(trainer.compute_loss(trainer.model, theirs).item(), rel=1e-5)
