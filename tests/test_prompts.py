"""The requests that each role receives, against the paper's texts in prompts/, filled in another way; --prompts."""
import hashlib
import re

import pytest

import evaluate
import generate_personas
import gold
import simulate
from common import response_form
from conftest import ROOT

NAME, PERSONA, TASK = "June {x}", "I'm June.\n\nI like {braces}.", "How {do} I {task}?"
TALK = [{"role": "assistant", "content": "Why {name}?"}, {"role": "user", "content": "Because."},
        {"role": "assistant", "content": "Since when?"}, {"role": "user", "content": "Always."}]


def text(name, /, **fields):
    """A prompt of the specification; fields are filled in by replacement, as a person would by hand."""
    words = (ROOT / "prompts" / f"{name}.txt").read_text(encoding="utf-8")[:-1]
    assert {*fields} == {*re.findall(r"{(\w+)}", words)}
    return re.sub(r"{(\w+)}", lambda field: fields[field[1]], words)


def messages(system, user):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def test_the_prompts_are_the_papers():
    """Compared with the paper's figures by eye, once."""
    found = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "prompts").glob("*.txt"))))
    assert found.hexdigest()[:16] == "98fbc933b61f4733"


def test_persona_writer():
    chat, seed, _ = generate_personas.persona_request(["I'm A.", "I'm B.", "I'm C."], 3)
    shown = [e for e in ("I'm A.", "I'm B.", "I'm C.") if e in chat[1]["content"]]
    assert len(shown) == 2 and seed == 3
    user = text("persona_user")
    assert chat in (messages(text("persona_system"), f"{user}\n\n{a}\n\n{b}") for a, b in (shown, shown[::-1]))


def test_oracle_roleplayer_questioner():
    user = text("gold_user", persona=PERSONA, task=TASK)
    assert gold.oracle_chat(PERSONA, TASK) == messages(text("gold_system"), user)
    history = "AI Assistant: Why {name}?\nYou: Because.\nAI Assistant: Since when?"
    user = text("roleplayer_user", persona=PERSONA, task=TASK, conversation=history)
    assert user.endswith("AI Assistant: Since when?\nYou: ")
    assert simulate.roleplayer_chat(PERSONA, TASK, TALK[:3]) == messages(text("roleplayer_system"), user)
    first = {"role": "user", "content": text("elicitation", name=NAME, task=TASK)}
    assert simulate.questioner_chat(NAME, TASK, []) == [first]
    assert simulate.questioner_chat(NAME, TASK, TALK[:2]) == [first, *TALK[:2]]


@pytest.mark.parametrize("order, a, b", [("ours_first", "OURS", "BASE"), ("base_first", "BASE", "OURS")])
def test_judge(order, a, b):
    user = text("judge_user", persona=PERSONA, task=TASK, response_a=a, response_b=b)
    assert evaluate.judge_chat(PERSONA, TASK, "OURS", "BASE", order) == messages(text("judge_system"), user)


def test_response_form_is_figure_17():
    chat = response_form(NAME, TASK, TALK)
    assert [m["role"] for m in chat] == ["user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in chat] == [f"My name is {NAME}.\n\n{TASK}", "Why {name}?", "Because.", "Since when?",
                                            f"Always.\n\n{TASK}"]
    assert TALK[-1]["content"] == "Always.", "the conversation itself must stay as it was"
    assert response_form(NAME, TASK, []) == [{"role": "user", "content": f"My name is {NAME}.\n\n{TASK}"}]
    positive = f"My name is {NAME}. Here is some information about me:\n\n{PERSONA}\n\n{TASK}"
    assert response_form(NAME, TASK, [], PERSONA) == [{"role": "user", "content": positive}]
    prompted = response_form(NAME, TASK, TALK, prompt="Adapt.")
    assert prompted == [{"role": "user", "content": f"Adapt.\n\n{chat[0]['content']}"}, *chat[1:]]


# ------------------------------------------------------------ --prompts: texts of one's own

def test_another_text_is_used_and_is_a_setting_and_the_rest_is_the_papers(run, world, server):
    folder = world.folder / "German"
    folder.mkdir()
    (folder / "gold_user.txt").write_text("{persona} fragt {{so}}: {task}\n")
    flags = [*world.command("gold", None, server.url), "--prompts", folder]
    run(gold, *flags)
    user = f"{world.personas[0]['persona']} fragt {{so}}: {world.tasks[0]['task']}"
    assert messages(text("gold_system"), user) in [request["messages"] for request in server.requests]
    folder.rename(world.folder / "moved")
    flags[-1] = world.folder / "moved"
    run(gold, *flags)
    (world.folder / "moved/gold_system.txt").write_text("Hilf.")
    assert "made with other settings: gold_system: " in run(gold, *flags, status=2)[1]
    assert "made with other settings: gold_user: " in run(gold, *flags[:-2], status=2)[1]
    assert len(server.requests) == 12


@pytest.mark.parametrize("words, said", [
    ("{task} {name}", "KeyError('name'). Its fields are ['persona', 'task']"), ("{task", "a brace that is no field is"),
    (None, "there is no such folder"), (b"\xe9", "Save it as UTF-8")])
def test_a_text_that_does_not_fit_is_one_line(run, world, server, words, said):
    if words is not None:
        (world.folder / "p").mkdir()
        (world.folder / "p/gold_user.txt").write_bytes(words if isinstance(words, bytes) else words.encode())
    _, err = run(gold, *world.command("gold", None, server.url), "--prompts", world.folder / "p", status=2)
    assert said in err and str(world.folder / "p") in err and err.count("\n") == 1 and not server.requests
