"""Chat templates of real models: every chat that the pipeline builds renders, spans are exact, hostile texts stay text.

The templates are TRL's copies of the models' own; Mistral's three are written from their published formats. The tokenizer
is made here: byte-level, with the template's special tokens.
"""
import random
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import common
import evaluate
import simulate
import train
from conftest import build_tokenizer

TRL = Path(find_spec("trl").origin).parent / "chat_templates"
ROLES = ("{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}")
MISTRAL = {
    "mistral_v0.1": "{{ bos_token }}{% for m in messages %}" + ROLES + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] "
                    "+ ' [/INST]' }}{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}",
    "mistral_v0.2": "{{ bos_token }}{% for m in messages %}" + ROLES + "{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] "
                    "+ ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "mistral_v0.3": "{{ bos_token }}{% for m in messages %}" + ROLES + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] "
                    "+ '[/INST]' }}{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
}
NAMES = ["llama3", "llama3_1", "gemma", "gemma3", "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_nothink", "phi3",
         "phi3_5", "gptoss", "glm4moe", "cohere2", *MISTRAL]
ONE_BY_ONE = {"qwen3_5_nothink"}                                  # an empty thought stands before the last answer only
TALK = [{"role": "assistant", "content": "Green or black?"}, {"role": "user", "content": "Green."},
        {"role": "assistant", "content": "Hot?"}, {"role": "user", "content": "Yes."}]


def tokenizer_of(name):
    if name in MISTRAL:                                            # from v0.3 on the turns' marks are tokens
        return build_tokenizer(MISTRAL[name], ["[INST]", "[/INST]"] if name == "mistral_v0.3" else [], "<s>", "</s>")
    template = (TRL / f"{name}.jinja").read_text()
    marks = sorted(set(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>|</?think>", template)))
    return build_tokenizer(template, marks, "<s>", "</s>")


@pytest.fixture(params=NAMES)
def tokenizer(request):
    tokenizer = tokenizer_of(request.param)
    tokenizer.name = request.param
    return tokenizer


def said(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != -100])


def test_every_chat_of_the_pipeline_renders_with_bos_once(tokenizer):
    chats = [simulate.questioner_chat(simulate.ELICITATION_PROMPT, "Ann", "Tea?", TALK[:length]) for length in (0, 2, 4)]
    chats += [common.response_form("Ann", "Tea?", TALK[:length]) for length in (0, 2, 4)]
    chats += [simulate.roleplayer_chat("I'm Ann.", "Tea?", TALK[:1]), common.response_form("Ann", "Tea?", [], "I'm Ann."),
              evaluate.judge_chat("I'm Ann.", "Tea?", "A.", "B.", "ours_first")]
    for chat in chats:
        ids = common.prompt_ids(tokenizer, chat)
        whole = common.fold_system(chat)
        assert ids == tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)
        assert ids.count(tokenizer.bos_token_id) <= 1 and whole[-1]["content"].strip() in tokenizer.decode(ids)
        example = common.scored_ids(tokenizer, [*chat, {"role": "assistant", "content": "Sencha, hot."}])
        assert tokenizer.decode(example[0][-example[1]:]).strip() == "Sencha, hot."


def test_all_that_the_assistant_says_is_supervised_and_nothing_else(tokenizer):
    texts = ["Green or black?", "Hot?", "Try sencha."]
    examples = common.training_examples(tokenizer, train.example_chat("Ann", "Tea?", TALK, texts[-1]))
    assert len(examples) == (3 if tokenizer.name in ONE_BY_ONE else 1)
    whole = "".join(said(tokenizer, labels) for _, labels in examples)
    spaced = re.escape(texts[0]) + "(.*)" + re.escape(texts[1]) + "(.*)" + re.escape(texts[2]) + "(.*)"
    ends = re.fullmatch(rf"\s?{spaced}", whole, re.DOTALL).groups()
    assert all(end.strip() in (*tokenizer.all_special_tokens, "") for end in ends), ends
    assert ends[2].strip() or tokenizer.name == "glm4moe", "the end of the last turn is learned, too"


def test_hostile_texts_stay_text_and_others_get_the_templates_ids(tokenizer):
    rng = random.Random(tokenizer.name)
    marks = [*tokenizer.all_special_tokens, "[INST]", "[/INST]", "<|im_start|>user", "system", "assistant", "\n\n", " ", "{{ 1 }}"]
    prompt = "My name is Ann.\n\nTea?"
    counts = None
    for number in range(300):
        hostile = ["".join(rng.choice(marks + ["a", "é", "."]) for _ in range(rng.randint(1, 6))).strip() or "x"
                   for _ in range(3)]
        if tokenizer.name in ("qwen3", "qwen3_5_nothink"):         # these cut a message at a thought's end: that is theirs
            hostile = [text.replace("think", "thing") for text in hostile]
        chat = [{"role": "user", "content": prompt + hostile[0]}, {"role": "assistant", "content": hostile[1]},
                {"role": "user", "content": hostile[2]}, {"role": "assistant", "content": "Try sencha."}]
        examples = common.training_examples(tokenizer, chat)
        tokens = [[ids.count(special) for special in tokenizer.all_special_ids] for ids, _ in examples]
        counts = counts or tokens
        assert tokens == counts, f"a text opened or closed a turn: {hostile}"
        learned = "".join(said(tokenizer, labels) for _, labels in examples)
        assert hostile[1] in learned and "Try sencha." in learned and prompt not in learned
    plain = [{**message, "content": "".join(rng.choice("abc .,?é\n") for _ in range(30)) + "."} for message in chat]
    ids, _ = common.training_examples(tokenizer, plain)[-1]
    assert ids == tokenizer.apply_chat_template(plain, return_dict=False)
