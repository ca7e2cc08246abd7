"""The requests that each role receives, rendered by the stages, against the paper's texts in prompts/, filled in another way."""
import hashlib
import json

import pytest

import evaluate
import generate_personas
import gold
import simulate
from common import fold_system, response_form
from conftest import ROOT

NAME, PERSONA, TASK = "June {x}", "I'm June.\n\nI like {braces}.", "How {do} I {task}?"
TALK = [{"role": "assistant", "content": "Why {name}?"}, {"role": "user", "content": "Because."},
        {"role": "assistant", "content": "Since when?"}, {"role": "user", "content": "Always."}]


def text(name, /, **fields):
    """A prompt of the specification; fields are filled in by replacement, as a person would by hand."""
    parts = (ROOT / "prompts" / f"{name}.txt").read_text(encoding="utf-8")[:-1]
    for field in fields:
        assert parts.count("{" + field + "}") >= 1
    filled = ""
    while parts:                    # one pass: a filled-in text that looks like a field is not filled in again
        field = next((f for f in fields if parts.startswith("{" + f + "}")), None)
        filled += fields[field] if field else parts[0]
        parts = parts[len(field) + 2 if field else 1:]
    return filled


WORD_FOR_WORD = {                                                 # sha256 of the paper's texts, compared by eye once
    "aloe_hint": "dbcc52dfddec7ba0",
    "aloe_induction": "3251153dae8cb2ff",
    "aloe_judge": "27bb8b8b5eeba1a9",
    "aloe_personalities": "5590adefef8f43a8",
    "aloe_profiles": "6178541425ec0827",
    "aloe_roleplay": "6f56b7b81267574a",
    "elicitation": "73d340b4e50d3a9d",
    "gold_system": "d6ccd7806a885283",
    "gold_user": "ed3453f8c961d61e",
    "judge_system": "09f997da4c86e243",
    "judge_user": "b2584892fc7a2bab",
    "persona_system": "233c4eaa29d3a4d4",
    "persona_user": "63f431b7822452ae",
    "personalisation": "3006a0cbe718df82",
    "roleplayer_system": "6a6fe87113c9be47",
    "roleplayer_user": "40f83241bc4b5c03"}


def test_the_prompts_are_the_papers():
    found = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (ROOT / "prompts").glob("*.txt")}
    assert found == WORD_FOR_WORD


def messages(system, user):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def test_persona_writer():
    chat, seed = generate_personas.persona_request(["I'm A.", "I'm B.", "I'm C."], 3)
    shown = [e for e in ("I'm A.", "I'm B.", "I'm C.") if e in chat[1]["content"]]
    assert len(shown) == 2 and seed == 3
    user = text("persona_user")
    assert chat in (messages(text("persona_system"), f"{user}\n\n{a}\n\n{b}") for a, b in (shown, shown[::-1]))


def test_oracle():
    assert gold.oracle_chat(PERSONA, TASK) == messages(text("gold_system"), text("gold_user", persona=PERSONA, task=TASK))


def test_roleplayer():
    history = "AI Assistant: Why {name}?\nYou: Because.\nAI Assistant: Since when?"
    user = text("roleplayer_user", persona=PERSONA, task=TASK, conversation=history)
    assert user.endswith("AI Assistant: Since when?\nYou: ")
    assert simulate.roleplayer_chat(PERSONA, TASK, TALK[:3]) == messages(text("roleplayer_system"), user)


def test_questioner():
    first = {"role": "user", "content": text("elicitation", name=NAME, task=TASK)}
    assert simulate.questioner_chat(NAME, TASK, []) == [first]
    assert simulate.questioner_chat(NAME, TASK, TALK[:2]) == [first, *TALK[:2]]


@pytest.mark.parametrize("order, a, b", [("ours_first", "OURS", "BASE"), ("base_first", "BASE", "OURS")])
def test_judge(order, a, b):
    user = text("judge_user", persona=PERSONA, task=TASK, response_a=a, response_b=b)
    assert evaluate.judge_chat(PERSONA, TASK, "OURS", "BASE", order) == messages(text("judge_system"), user)


def test_response_form_is_figure_17():
    before = json.dumps(TALK)
    chat = response_form(NAME, TASK, TALK)
    assert [m["role"] for m in chat] == ["user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in chat] == [f"My name is {NAME}.\n\n{TASK}", "Why {name}?", "Because.", "Since when?",
                                            f"Always.\n\n{TASK}"]
    assert json.dumps(TALK) == before, "the conversation itself must stay as it was"
    assert response_form(NAME, TASK, []) == [{"role": "user", "content": f"My name is {NAME}.\n\n{TASK}"}]
    positive = f"My name is {NAME}. Here is some information about me:\n\n{PERSONA}\n\n{TASK}"
    assert response_form(NAME, TASK, [], PERSONA) == [{"role": "user", "content": positive}]


def test_personalisation_prompt_stands_before_the_first_turn_only_on_request(select_stage):
    plain = response_form(NAME, TASK, TALK)
    assert select_stage.response_chat(NAME, TASK, TALK) == plain
    prompted = select_stage.response_chat(NAME, TASK, TALK, text("personalisation"))
    assert prompted[0]["content"] == text("personalisation") + "\n\n" + plain[0]["content"]
    assert prompted[1:] == plain[1:]


def test_folded_system_text():
    chat = messages("SYSTEM", "USER") + TALK[:1]
    assert fold_system(chat) == [{"role": "user", "content": "SYSTEM\n\nUSER"}, *TALK[:1]]
    assert fold_system(TALK) == TALK
