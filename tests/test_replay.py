"""Qulac's file as our rows, and people's logged answers replayed: each figure is computed a second time."""
import json
import re

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from conftest import ROOT, load_stage, read_lines
from people import replay
from simulate import questioner_chat
from test_models import alone

# (request, need, question, answer): both requests have needs 1 and 2; need 3 answers as need 1 does. A hash makes
# request 1 a test task, and 4 not.
LOG = [(1, 1, "", ""), (1, 1, "Old ones?", "Yes, of 1900."), (1, 1, "A map?", "No, \\'photos\\'."),
       (1, 1, "Old ones?", "As I said."), (1, 2, "Old ones?", "No."), (1, 2, "A map?", "Yes, of the hills."),
       (1, 3, "A map?", "No, \\'photos\\'."),
       (4, 1, "For a child?", "No."), (4, 1, "Used?", ""), (4, 2, "For a child?", "Yes."), (4, 2, "Used?", "No.")]
TASK, NEED = {1: "tea houses", 4: "bikes"}, 'Need {} of "{}".'.format
SAID = {(t, n, q): a.replace("\\", "") for t, n, q, a in LOG[::-1] if q and a}              # the first answer stands


@pytest.fixture
def folder(tmp_path, run, monkeypatch):
    """What data/qulac.py writes, and it says one line of a file that is not Qulac's."""
    monkeypatch.syspath_prepend(ROOT / "data")
    rows = [(t, n, TASK[t], " " + NEED(n, TASK[t]).replace('"', '\\"'), q, a) for t, n, q, a in LOG]
    names = "topic_id", "facet_id", "topic", "facet_desc", "question", "answer"
    (tmp_path / "good").write_text(json.dumps({name: dict(enumerate(of)) for name, of in zip(names, zip(*rows))}))
    out, _ = run(load_stage("qulac"), tmp_path / "good", "--output", tmp_path / "q")
    assert "q: 2 tasks, 5 needs, 8 conversations; left out: 2 empty questions or answers, 1 questions that" in out
    for text, why in ('{"topic": {"0": "a"}}', "bad: not Qulac's table (KeyError"), ('{"topic": {}}', "bad: no rows."):
        (tmp_path / "bad").write_text(text)
        assert why in run(load_stage("qulac"), tmp_path / "bad", "--output", tmp_path / "q", status=2)[1]
    return tmp_path / "q"


def test_qulac_becomes_our_rows(folder):
    tasks, people = common.read_tasks(folder / "tasks.jsonl"), common.read_personas(folder / "personas.jsonl")
    assert [(row["task"], row["split"]) for row in tasks.values()] == [("tea houses", "test"), ("bikes", "A")]
    assert [(i[5:], row["task_id"][5:], row["split"], row["persona"]) for i, row in people.items()] == [
        (f"00{t}-{n}", f"00{t}", {1: "test", 4: "A"}[t], NEED(n, TASK[t]))
        for t, n in ((1, 1), (1, 2), (1, 3), (4, 1), (4, 2))]
    assert common.read_gold(folder / "gold.jsonl") == {(row["task_id"], i): row["persona"] for i, row in people.items()}
    test, train = (common.read_conversations(folder / f"conversations-{s}.jsonl", tasks, people) for s in ("test", "A"))
    assert [(row["persona_id"][5:], row["split"], row["sample"]) for row in test + train] == [
        ("001-1", "test", 0), ("001-1", "test", 1), ("001-2", "test", 0), ("001-2", "test", 1),
        ("001-3", "test", 0), ("004-1", "A", 0), ("004-2", "A", 0), ("004-2", "A", 1)]
    talks = [[turn["content"] for turn in row["conversation"]] for row in test + train]
    assert talks == [[q, a.replace("\\", "")] for _, _, q, a in (LOG[i] for i in (1, 2, 4, 5, 6, 7, 9, 10))]


def log_p_of(path):
    """A function: the texts of a chat -> log-probability of the last one, and its tokens, by a plain forward."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)

    def log_p(*texts):
        chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        before, ids = (tokenizer.apply_chat_template(turns, return_dict=False) for turns in (chat[:-1], chat))
        n = len(ids) - 1 - len(before)                          # without the end of the turn
        return alone(model, ids[:-1], n), n
    return log_p


def figures(out):
    """{name of a line: its numbers} of the two tables: mean, low, high of each column, and n."""
    lines = (re.match(r"(\S+(?: by \w+)?) +(-?\d.*)", line) for line in out.splitlines())
    return {line[1]: [*map(float, re.findall(r"-?\d+(?:\.\d+)?", line[2]))] for line in lines if line}


def test_the_figures_are_those_of_a_plain_forward(folder, run, tiny, tmp_path, monkeypatch):
    (tmp_path / "log").write_text("".join((folder / f"conversations-{s}.jsonl").read_text() for s in ("test", "A")))
    flags = ["--dtype", "float32", "--questioner", tiny, "--conversations", tmp_path / "log", *(
        part for name in ("tasks", "personas", "gold") for part in (f"--{name}", folder / f"{name}.jsonl"))]
    flags += ["--output", tmp_path / "o"]
    found, log_p = figures(run(replay, *flags, "--base", tiny)[0]), log_p_of(tiny)

    def gain(t, n, q, a):
        about, gold = f"My name is User.\n\n{TASK[t]}", NEED(n, TASK[t])
        return log_p(about, q, f"{a}\n\n{TASK[t]}", gold)[0] - log_p(about, gold)[0]
    own = {key: gain(*key, a) for key, a in SAID.items()}
    rest = {key: [k for k in SAID if (k[0], k[2]) == (key[0], key[2]) and k != key] for key in SAID}
    other = {key: gain(*key, next(SAID[k] for k in rest[key] if SAID[k] != SAID[key])) for key in SAID if rest[key]}
    above = {key: own[key] > other[key] for key in other}
    people = {person: [key for key in own if key[:2] == person] for person in sorted({key[:2] for key in own})}
    both = {person: [key for key in keys if key in other] for person, keys in people.items()}
    means = [np.mean([np.mean([v[key] for key in keys]) for keys in both.values()]) for v in (own, other, above)]
    assert found[tiny[-20:]][::3] == pytest.approx([*means, 5], abs=0.006) and means[2] not in (0, 0.5, 1)

    asked = {(t, n, q): log_p(questioner_chat("User", TASK[t], [])[0]["content"], q) for t, n, q in own}
    weights = {"chance": lambda k: 1, f"{tiny} by total": lambda k: np.exp(asked[k][0]),
               f"{tiny} by token": lambda k: np.exp(asked[k][0] / asked[k][1]),
               f"{tiny} by word": lambda k: np.exp(asked[k][0] / len(k[2].split())),
               "ceiling": lambda k: k == max(both[k[:2]], key=lambda key: np.mean([own[i] for i in rest[key]])),
               "maximum": lambda k: k == max(people[k[:2]], key=own.get)}
    for name, weight in weights.items():
        v, chance = np.array([(np.average([own[k] for k in keys], weights=[*map(weight, keys)]), np.mean(
            [own[k] for k in keys])) for keys in people.values()]).T
        d = v - v.mean()                                        # of 3 + 2 needs, clustered by task
        sem = max(2 * (d[:3].sum() ** 2 + d[3:].sum() ** 2), 5 / 4 * d @ d) ** 0.5 / 5
        numbers = [v.mean(), v.mean() - 12.7062 * sem, v.mean() + 12.7062 * sem, (v - chance).mean()]
        assert found[name[-20:]][:4] == pytest.approx(numbers, abs=0.011), name

    kinds = sorted(row["of"] for row in read_lines(tmp_path / "o"))
    assert kinds == ["none"] * 5 + ["other"] * 7 + ["own"] * 8 + ["question"] * 4
    monkeypatch.setattr("common.open_model", None)              # all is there: nothing is scored again
    assert figures(run(replay, *flags, "--base", tiny)[0]) == found
    out, _ = run(replay, *flags, "--base", tiny, "--limit", 1)
    assert "(a) nats" in out and not re.search(r"\d to ", out), "one task has no interval"
