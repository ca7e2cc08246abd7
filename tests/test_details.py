"""Tasks whose missing details are known: the rows made of them, the user by rule, the measures. Rows are invented."""
import json
import re
from types import SimpleNamespace

import pytest

import common
import simulate
from conftest import ROOT, read_lines, run_stage, write_rows
from people import measure, nearest

DETAILS = [{"description": name, "importance": str(importance), "inquiry": f"{name}?", "options": options}
           for name, importance, options in [
               ("Size of the garden", 1, ["tiny", "huge"]), ("Budget for plants", 3, ["low"]),
               ("Colour of flowers", 2, ["red", "blue", "white"]), ("Nothing", 1, [])]]
ROWS = [{"task": "Plan my garden.", "vague": True, "split": "A", "missing_details": DETAILS},
        {"task": "Plan my trip.", "vague": True, "split": "A", "missing_details": DETAILS[1:]},
        {"task": "What is 2 + 2?", "vague": False, "missing_details": []},
        {"task": "Plan.", "vague": True, "split": "A", "missing_details": DETAILS[3:]}]


def test_rows(tmp_path):
    folder = tmp_path / "new"
    said, _ = run_stage("data/in3.py", write_rows(tmp_path / "in3.jsonl", ROWS), "--output", folder, "--users", 3)
    assert "3 tasks, 7 users; left out: 1 vague tasks and 3 details without options" in said
    tasks, personas = common.read_tasks(folder / "tasks.jsonl"), common.read_personas(folder / "personas.jsonl")
    assert {task["task"]: task["split"] for task in tasks.values()} == {
        "Plan my garden.": "A", "Plan my trip.": "A", "What is 2 + 2?": "clear"}
    pairs = common.all_pairs(tasks, personas, "A")              # each persona with its own task, and with no other
    assert len(pairs) == 6 and all(persona_id.startswith(task_id) for task_id, persona_id in pairs)
    golds = common.read_gold(folder / "gold.jsonl", pairs)
    assert len(golds) == 6                                      # a clear task has none
    for pair in pairs:
        lines = personas[pair[1]]["persona"].splitlines()
        assert all(line in golds[pair] for line in lines) and len(lines) == len(personas[pair[1]]["importance"])
    colours = {person["persona"].split("flowers: ")[1] for person in personas.values() if "garden" in person["persona"]}
    assert colours == {"red", "blue", "white"}                  # users of a task differ


@pytest.mark.parametrize("row, why", [
    ({"task": "A", "vague": True}, "KeyError: 'missing_details'. A line of IN3 has"),
    ({"task": 3, "vague": False}, "AttributeError"),
    ({**ROWS[0], "missing_details": [{**DETAILS[0], "importance": 4}]}, "ValueError"),
    ({**ROWS[0], "missing_details": [{**DETAILS[0], "options": [5]}]}, "AttributeError"),
    ({**ROWS[0], "split": None}, "no split. Give --split")])
def test_bad_line(tmp_path, row, why):
    file, folder = write_rows(tmp_path / "in3.jsonl", [ROWS[0], row]), tmp_path / "new"
    out, err = run_stage("data/in3.py", file, "--output", folder, status=2)
    assert f"line 2: {why}" in err and err.count("\n") == 1 and not out and not folder.exists()


PERSONA = "Size of the garden: tiny\nBudget for plants: low"


@pytest.mark.parametrize("conversation, said", [
    ("AI Assistant: How large is the garden?", "Size of the garden: tiny"),
    ("AI Assistant: The garden is large.", nearest.NOTHING),                                    # asks nothing
    ("AI Assistant: What is the weather?", nearest.NOTHING),                                    # nothing is near
    ("AI Assistant: How shall I plan the garden?", nearest.NOTHING),                            # the request again
    ("AI Assistant: A garden?\nYou: Size of the garden: tiny\nAI Assistant: How large is the garden?", nearest.NOTHING),
    ("AI Assistant: A garden?\nYou: Size of the garden: tiny\nAI Assistant: A budget for plants, or a garden?",
     "Budget for plants: low"),
    ("AI Assistant: How large is the garden?\nWhat budget for plants?", "Budget for plants: low")])
def test_answer(conversation, said):
    def cosine(one, other):                                     # of bags of words, by hand
        one, other = ({*re.findall(r"\w+", text.lower())} - {"the", "for", "how"} for text in (one, other))
        return len(one & other) / (len(one) * len(other)) ** 0.5

    assert nearest.answer(PERSONA, "Plan the garden.", conversation + "\n", cosine, near=0.2, restated=0.7) == said


def test_sentences():
    assert nearest.lines_of("I am Jo. I like tea!  Do I?") == ["I am Jo.", "I like tea!", "Do I?"]


def test_server(monkeypatch):
    """simulate.py's own request reaches the rule: the prompt is turned around, and the answer is a line."""
    args = SimpleNamespace(near=0, restated=9, roleplayer_user=simulate.PROMPTS["roleplayer_user"], embedder=
                           SimpleNamespace(cosine=lambda one, other: float("Budget" in other)))
    monkeypatch.setattr(nearest.Nearest, "args", args, raising=False)
    chat = simulate.roleplayer_chat(PERSONA, "Plan.", [{"role": "assistant", "content": "What may it cost?"}])
    for messages in (chat, common.fold_system(chat)):
        request = {"model": "nearest", "messages": messages}
        assert nearest.Nearest.reply(nearest.Nearest, request) == "Budget for plants: low"
    for messages in ([{"role": "user", "content": "Hi"}], [{"role": "user", "content": None}], [], None, "Hi"):
        with pytest.raises(nearest.Refused, match="Roleplayer's prompt"):
            nearest.Nearest.reply(nearest.Nearest, {"model": "nearest", "messages": messages})


def test_measures():
    personas = {"p": {"persona": PERSONA + "\nColour: red", "importance": [1, 3, 2]}}

    def row(sample, *turns, **more):
        return {"task_id": "t", "persona_id": "p", "sample": sample, "conversation": [
            {"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(turns)], **more}

    rows = [row(0, "A?", "Budget for plants: low", "B.", nearest.NOTHING),      # 3 of the 3 + 2 that two could bring
            row(1, "a", "Size of the garden: tiny", cut=1)]                     # 1 of 3
    values = {metric: pairs["t", "p"] for metric, pairs in measure.measure(rows, personas).items()}
    assert values == pytest.approx({"coverage": (3 / 5 + 1 / 3) / 2, "answered": (1 / 2 + 1) / 2, "questions": 1 / 4,
                                    "cut": 1 / 2, "asked_once": (1 / 2 + 0) / 2})


def test_shipped_tasks():
    rows = read_lines(ROOT / "data/details.jsonl")
    assert len({row["task"] for row in rows}) == 150
    for row in rows:
        assert len({d["description"] for d in row["missing_details"]}) == len(row["missing_details"]) >= 4
        assert all(d["importance"] in (1, 2, 3) and len({*d["options"]}) == 3 for d in row["missing_details"])
    assert json.dumps(sorted({row["split"] for row in rows})) == '["A", "B", "dev", "test"]'
