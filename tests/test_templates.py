"""Chat templates of real models: every chat of the pipeline renders, spans are exact, hostile texts stay text.

The tokenizers are trained here on a few sentences, so that they merge letters, and across the borders of turns. They do
not *name* their marks, as those of Gemma, Phi and Llama-3 do not: only the file says that these are special.
"""
import json
import random
import re
from datetime import datetime
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import common
import evaluate
import simulate
import train
from conftest import make_model
from test_models import local

SENTENCES = [
    "Which tea do you like, green or black?", "I would like a green one. I drink it in the morning.", "Yes.", "Hot?###",
    "Try sencha, Ann: it is green, and you like it.\n\nOr try another one.", "user\n", "model\n", "assistant\n\n",
    "Hot?", "### Response:\nYes. ", "### Instruction:\nI am Ann.\n\n", "[INST] What [/INST] Yes.",
    "User: What?\n\nFalcon: Yes."]


@lru_cache
def trained(kind):
    """A tokenizer's file: of bytes as Llama-3's; of pieces over blanks and lines as Gemma's, or, where each piece
    between two marks is prefixed with a blank, Mistral's."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, min_frequency=1, show_progress=False)
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        prefix = [normalizers.Prepend("▁")] if kind == "prefixed" else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(SENTENCES, trainer)
    file = json.loads(tokenizer.to_str())
    if kind != "bytes":
        file["model"]["byte_fallback"] = True
        file["model"]["vocab"].update({f"<0x{i:02X}>": len(file["model"]["vocab"]) + i for i in range(256)})
    return json.dumps(file)


def build(kind, template, marks, bos, eos, rstrip=False):
    tokenizer = Tokenizer.from_str(trained(kind))
    marks = list(dict.fromkeys(filter(None, [bos, eos, *marks])))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False, rstrip=rstrip) for mark in marks])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos or None, eos_token=eos)
    assert set(fast.all_special_tokens) == {bos or eos, eos}, "the others have no names"
    fast.chat_template, fast.marks = template, marks
    return fast


def broken(tokenizer, text):
    for mark in tokenizer.marks:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


class Family(NamedTuple):
    kind: str
    bos: str
    eos: str
    marks: list                     # beside these two
    user: str                       # the user's turn; then the assistant's: what invites it, a blank, the text, its end
    ask: str
    blank: str
    end: str
    after: str                      # what the template writes between two turns


FAMILIES = {
    "gemma": Family("pieces", "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"],
                    "<start_of_turn>user\n{}<end_of_turn>\n", "<start_of_turn>model\n", "", "<end_of_turn>", "\n"),
    "phi3": Family("prefixed", "<s>", "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|end|>"],
                   "<|user|>\n{}<|end|>\n", "<|assistant|>\n", "", "<|end|>", "\n"),
    "mistral": Family("prefixed", "<s>", "</s>", [], " [INST] {} [/INST]", "", " ", "</s>", ""),
    "chatglm3": Family("pieces", "[gMASK]", "</s>", ["<|user|>", "<|assistant|>"], "<|user|>\n {}", "<|assistant|>",
                       "\n ", "", ""),
    "falcon": Family("bytes", "", "<|endoftext|>", [], "User: {}\n\n", "Falcon:", " ", "", "\n\n"),
}


def tokenizer_of_family(name):
    _, bos, eos, marks, user, ask, blank, end, after = family = FAMILIES[name]
    template = (
        "{{ BOS }}{% for m in messages %}{% if m['role'] == 'user' %}{{ USER }}{{ m['content'] }}{{ HEARD }}{% else %}"
        "{{ ASK }}{{ BLANK }}{{ m['content'] }}{{ END }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ASK }}"
        "{% endif %}")
    for word, text in zip("BOS USER HEARD ASK BLANK END".split(), (bos, *user.split("{}"), ask, blank, end + after)):
        template = template.replace(f"{{{{ {word} }}}}", f"{{{{ {text!r} }}}}")
    return build(family.kind, template, marks, bos, eos, rstrip=name.startswith("phi"))


def hostile_text(rng, marks, most=6):
    return "".join(rng.choice(marks + ["a", "é", ".", "茶"]) for _ in range(rng.randint(0, most)))


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_of_marks_without_names_and_of_templates_without_an_end(name, tmp_path):
    """Against the same texts put together by hand: a token is learned if it has a character of an answer or its end."""
    tokenizer, family, rng, clean = tokenizer_of_family(name), FAMILIES[name], random.Random(name), None
    end = family.end or next((mark for mark in tokenizer.marks if family.user.startswith(mark)), "")    # ChatGLM's: <|user|>
    pieces = [*tokenizer.marks, "[INST]", "</s>", "assistant\n", "\n\n", " ", "{{ 1 }}", "### Response:\n", *SENTENCES]
    for number in range(40):
        texts = [["I am Ann.", "", "Green.", " Yes"], ["Tea?", "\n Hot?", "", ""]][number] if number < 2 else [
            hostile_text(rng, pieces) for _ in range(4)]
        chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        text, turns = family.bos, []
        for user, answer in ((texts[0], texts[1]), (texts[2], texts[3])):
            text += family.user.format(broken(tokenizer, user)) + family.ask
            prompt, answer = text, broken(tokenizer, answer).strip()
            first, last = len(text), len(text + family.blank + answer)
            turns.append((first, last, last + len(end)) if answer or end else (0, 0, 0))
            text += family.blank + answer + family.end + family.after
        encoded = tokenizer(text + end * (not family.end), add_special_tokens=False, return_offsets_mapping=True)
        inside = lambda first, end: [a < end and b > first for a, b in encoded["offset_mapping"]]
        learned = map(any, zip(*(inside(first, end) for first, _, end in turns)))
        expected = [token if inside else -100 for token, inside in zip(encoded["input_ids"], learned)]
        (ids, labels), = train.training_examples(tokenizer, chat)
        assert (ids, labels) == (encoded["input_ids"][:len(ids)], expected[:len(ids)]), texts
        assert {*expected[len(ids):]} <= {-100}
        ids, n = common.scored_ids(tokenizer, chat)
        answer = inside(*turns[-1][:2]) if texts[3].strip() else []
        assert n == sum(answer) and (not n or ids == encoded["input_ids"][:len(answer) - answer[::-1].index(True)])
        assert common.prompt_ids(tokenizer, chat[:3]) == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        marks = [encoded["input_ids"].count(i) for i in tokenizer.convert_tokens_to_ids(tokenizer.marks)]
        assert marks == [text.count(mark) + (mark == end != family.end) for mark in tokenizer.marks]
        assert number == 0 or marks == clean, "a text opened or closed a turn"
        clean = marks
    make_model(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end or family.eos)}
    assert local(tmp_path).stops - {None, 2} == stops, "an answer ends with its end of turn; 2 is this model's default"


# ------------------------------------------------------------ TRL's copies of real models' own templates

TRL = Path(find_spec("trl").origin).parent / "chat_templates"
NAMES = ["llama3", "llama3_2", "gemma", "gemma3", "qwen2_5", "qwen3", "qwen3_5_nothink", "phi3", "gptoss", "glm4moe", "cohere2"]
ONE_BY_ONE = {"qwen3", "qwen3_5_nothink", "gptoss"}               # the last answer has a thought, or an end of its own
TALK = [{"role": "assistant", "content": "Green or black?"}, {"role": "user", "content": "Green."},
        {"role": "assistant", "content": "Hot?"}, {"role": "user", "content": "Yes."}]


@pytest.fixture(params=NAMES)
def tokenizer(request):
    template = (TRL / f"{request.param}.jinja").read_text()
    marks = sorted(set(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>|</?think>", template)))
    tokenizer = build("bytes", template, marks, "<s>", "</s>")
    tokenizer.name = request.param
    return tokenizer


def test_every_chat_of_the_pipeline_renders_with_bos_once_and_on_the_same_day(tokenizer, monkeypatch):
    chats = [simulate.questioner_chat("Ann", "Tea?", TALK[:length]) for length in (0, 4)]
    chats += [common.response_form("Ann", "Tea?", TALK[:length]) for length in (0, 4)]
    chats += [simulate.roleplayer_chat("I'm Ann.", "Tea?", TALK[:1]),
              evaluate.judge_chat("I'm Ann.", "Tea?", "A.", "B.", "ours_first")]
    for chat in chats:
        ids = common.prompt_ids(tokenizer, chat)                 # today
        whole = common.fold_system(chat) if tokenizer.name == "gemma" else chat         # Gemma's knows no system role
        with monkeypatch.context() as then:
            then.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: datetime(2024, 7, 26)))
            assert ids == tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)
        if "strftime_now" in tokenizer.chat_template:
            assert re.search("26 Jul 2024|2024-07-26", tokenizer.decode(ids))
        assert ids.count(tokenizer.bos_token_id) <= 1 and whole[-1]["content"].strip() in tokenizer.decode(ids)
        scored, n = common.scored_ids(tokenizer, [*chat, {"role": "assistant", "content": "Sencha, hot."}])
        assert tokenizer.decode(scored[-n:]).strip() == "Sencha, hot."


def test_all_that_the_assistant_says_is_supervised_and_nothing_else(tokenizer):
    """In one example; where a template writes the last turn otherwise, in one for each turn, as it was said."""
    texts = ["Green or black?", "Hot?", "Try sencha."]
    chat = train.example_chat("Ann", "Tea?", TALK, texts[-1])
    examples = train.training_examples(tokenizer, chat)
    assert len(examples) == (3 if tokenizer.name in ONE_BY_ONE else 1)
    for (ids, _), end in zip(examples[::-1], (5, 3, 1)):
        assert tokenizer.decode(ids).startswith(tokenizer.decode(common.prompt_ids(tokenizer, chat[:end])))
    said = "".join(tokenizer.decode([label for label in labels if label != -100]) for _, labels in examples)
    ends = re.fullmatch(r"\s?" + "(.*)".join(map(re.escape, texts)) + "(.*)", said, re.S).groups()
    assert all(end.strip() in tokenizer.marks for end in ends), "ends are learned: GLM's is the next turn's mark"
