"""A real pretrained model, SmolLM2-135M-Instruct, in SLOW_MODEL: run by `.ci/slow`, not by `python -m pytest`."""
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from trl import SFTConfig, SFTTrainer

import simulate
import train
from common import LocalModel, Reply, Request, read_tasks, scored_ids
from conftest import ROOT, World, read_lines
from test_models import alone, answers, local, scores, shapes_computed
from test_train import TALK, selected, train_flags

BASE = os.environ["SLOW_MODEL"]
TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"     # of its template
MARKED = ("{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] "
          "+ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}" + TURN + "{% endif %}")        # as TRL needs it
IDS = torch.arange(100, 140)[None]
PEOPLE = read_lines(ROOT / "data/seed_personas.jsonl")


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def chats():
    """Training examples in English, of very different lengths: tasks and personas of data/."""
    tasks = read_tasks(ROOT / "data/tasks.jsonl").values()
    return [train.example_chat(person["name"], task["task"], TALK[:2 * (i % 3)], person["persona"][:6 + 70 * i].strip())
            for i, (task, person) in enumerate(zip(tasks, PEOPLE[:6]))]


def requests():
    """Two samples of a Questioner and of a Roleplayer behind a system text, which begin alike; and one that ends."""
    talks = TALK, [{"role": "assistant", "content": "What do you like best?"}, {"role": "user", "content": "Tea."}]
    return [*(Request(simulate.questioner_chat("Ann", "Which tea should I buy?", talk), group="Ann") for talk in talks),
            *(Request(simulate.roleplayer_chat(PEOPLE[0]["persona"], "Where shall I go?", talk[:1]), group="pair")
              for talk in talks), Request([{"role": "user", "content": "Say only the capital of France: Paris."}])]


@torch.no_grad()
def test_scores_of_a_batch_are_those_of_one_text_after_the_other():
    """bfloat16 has 8 bits: a token's log-probability is off by some hundredths of a nat, as in its own plain pass."""
    ours, (model, tokenizer) = local(BASE, batch_size=8), plain(BASE)
    examples = [scored_ids(ours.tokenizer, chat) for chat in chats()]
    texts = [tokenizer.encode(chat[-1]["content"], add_special_tokens=False) for chat in chats()]
    assert examples == [(tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"] + text,
                         len(text)) for chat, text in zip(chats(), texts)]
    expected = [alone(model, *example) for example in examples]
    assert scores(ours, examples) == pytest.approx(expected, rel=1e-4)
    half = LocalModel(BASE, SimpleNamespace(dtype="bfloat16", batch_size=8), "cpu")
    for score, right, (_, n) in zip(scores(half, examples), expected, examples):
        assert 0 < abs(score - right) < 0.25 * n ** 0.5, (score, right, n)


def test_greedy_texts_of_a_batch_are_those_of_generate_row_by_row():
    model, tokenizer = plain(BASE)
    replies, seen = shapes_computed(local(BASE, batch_size=8), requests(), 0.0, 1.0, 12)
    for request, reply in zip(requests(), replies):
        ids = tokenizer.apply_chat_template(request.chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        said = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1]:]
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        assert reply == Reply(text, cut=bool(said[-1] != tokenizer.eos_token_id))
    assert {reply.cut for reply in replies} == {True, False} and len({*replies}) == 5
    assert seen[0][0] == 3 and seen[1][0] == 5, "three openings, five rows"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, the trainer's own logits, its chats) of one step of train.py on two rows, one at a time."""
    world, seen, fit, example = World(tmp_path_factory.mktemp("step")), {"chats": []}, train.fit, train.example_chat
    selected(world, count=2)
    flags = [*train_flags(world, BASE, "m", "--epochs", 1, "--lr", 1e-4, "--validation", 0), "--micro-batch-size", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", lambda *given: seen.update(fit=fit(*given)) or seen["fit"])
        patch.setattr(train, "example_chat", lambda *given: seen["chats"].append(example(*given)) or seen["chats"][-1])
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()
    return world.path("m"), seen["fit"][0].eval()(IDS).logits, seen["chats"]


@pytest.mark.filterwarnings("default::FutureWarning")            # TRL's own
def test_a_step_is_that_of_trl(trained, tmp_path):
    """The same ids and mask; the loss, the norm of its gradient, and what a step of AdamW changes."""
    (folder, _, talks), (model, tokenizer) = trained, plain(BASE)
    tokenizer.chat_template = tokenizer.chat_template.replace(TURN, MARKED)
    config = SFTConfig(str(tmp_path), assistant_only_loss=True, per_device_train_batch_size=2, max_length=None,
                       max_steps=1, learning_rate=1e-4, logging_steps=1, report_to=[], use_cpu=True, bf16=False)
    trainer = SFTTrainer(model, config, processing_class=tokenizer,
                         train_dataset=Dataset.from_list([{"messages": chat} for chat in talks]))
    batch = next(iter(trainer.get_train_dataloader()))
    ids, labels = train.collate([train.training_examples(tokenizer, chat)[0] for chat in talks])
    order = [batch["labels"].tolist().index(row) for row in labels.tolist()]            # the masks are the same
    assert torch.equal((batch["input_ids"] * batch["attention_mask"])[order], ids)
    trainer.train()
    (ours,), theirs, start = read_lines(f"{folder}/log.jsonl"), trainer.state.log_history[0], plain(BASE)[0]
    assert [ours["loss"], ours["norm"]] == pytest.approx([theirs["loss"], theirs["grad_norm"]], rel=1e-4)
    moved = [torch.cat([(new.detach() - old.detach()).flatten() for new, old in zip(
        changed.parameters(), start.parameters())]) for changed in (plain(folder)[0], model)]
    assert torch.cosine_similarity(*moved, dim=0) > 0.999


def test_a_trained_folder_opens_in_plain_transformers(trained):
    (folder, expected, _), (request, *_) = trained, requests()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert torch.equal(model(IDS).logits, expected) and not torch.equal(plain(BASE)[0](IDS).logits, expected)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(BASE).chat_template
    said, = pipeline("text-generation", folder)(request.chat, do_sample=False, max_new_tokens=12)
    assert said["generated_text"][-1]["content"].strip() == answers(local(folder), [request], 0.0, 1.0, 12)[0].text
