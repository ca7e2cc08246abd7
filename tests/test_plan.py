"""plan.py: what a run will do. Commands are given to it as run.sh's first pass writes them."""
import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import gold
import plan
import simulate
import train
from conftest import ROOT, World, write_rows


@pytest.fixture
def commands(world, tiny, server):
    """(changes: {(stage, flag): value}) -> the commands of gold, simulate, select and train, one after the other."""
    os.remove(world.path("gold.jsonl"))
    personas, both = world.flags("tasks", "personas"), ["--base", tiny, "--questioner", tiny, "--dtype", "float32"]

    def make(changes={}):
        output = {stage: ["--output", world.path(name)] for stage, name in (
            ("gold", "gold.jsonl"), ("simulate", "c.jsonl"), ("select", "s.jsonl"), ("train", "model"))}
        stages = {
            "gold": ["--oracle", f"openai:o@{server.url}", *personas, "--split", "A"],
            "simulate": [*both[2:], "--roleplayer", f"openai:r@{server.url}", *personas, "--samples", "2", "--max-tokens", "4"],
            "select": [*both, *personas, "--gold", world.path("gold.jsonl"), "--conversations", world.path("c.jsonl"),
                       "--max-tokens", "4"],
            "train": [*both[:2], *both[4:], *personas, "--selected", world.path("s.jsonl"), "--gold", world.path("gold.jsonl")]}
        return [["python", f"{stage}.py", *words, *output[stage], *(
            word for (of, flag), value in changes.items() if stage == of or of == "all" for word in (flag, value))]
            for stage, words in stages.items()]
    return make


@pytest.fixture
def planned(world, monkeypatch, capfd):
    """(commands, flags of plan.py) -> (exit status, what it said)."""
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)      # so patient a client is not needed here
    def call(commands, *flags):
        Path(world.path("commands")).write_text("".join(f"{len(words) + 1}\0x\0" + "".join(f"{word}\0" for word in words)
                                                        for words in commands))
        monkeypatch.setattr(sys, "argv", ["plan.py", str(world.folder), "--commands", world.path("commands"), *flags])
        try:
            plan.run(plan.main)
            status = 0
        except SystemExit as end:
            status = end.code
        said = capfd.readouterr()
        return status, said.out + said.err
    return call


@pytest.fixture
def done(run, commands, short, select_stage, monkeypatch):
    """All four stages have run, with a prompt that is short for the plan, too."""
    monkeypatch.setattr(plan.load_stage("simulate"), "ELICITATION_PROMPT", "Ask {name} about: {task}")
    for stage, words in zip((gold, simulate, select_stage, train), commands()):
        run(stage, *words[2:])


def stale(said):
    return said.partition("in all: ")[2].partition(". STALE=remove")[0].split(", ") if "in all: " in said else []


def test_an_edited_prompt_makes_stale_what_was_asked_with_it(commands, planned, done, monkeypatch):
    monkeypatch.setattr(plan.load_stage("simulate"), "ELICITATION_PROMPT", "Ask {name} about: {task}!")
    status, said = planned(commands())
    assert status == 2 and stale(said) == ["c.jsonl", "s.jsonl", "model"] and "prompts: " in said


def test_a_new_run_is_counted(commands, planned, world):
    """12 pairs x 2 conversations of 2 questions on average."""
    status, said = planned(commands(), "--dry-run")
    assert status == 0 and "24 conversations, 24 scores, 1 trainings, 0 evaluations" in said and "0 of 4 outputs are" in said
    for line in ("Oracle, openai:o: 12 calls", "Roleplayer, openai:r: 48 calls", "Questioner, on this machine: 60 calls"):
        assert line in said
    status, said = planned(commands({("gold", "--prices"): "1", ("gold", "--max-tokens"): "100"})[:0] + [
        [*commands()[0], "--prices", "1", "10", "--max-tokens", "100"]])
    length = len(json.dumps(gold.oracle_chat(plan.TEXT["persona"], plan.TASK))) // 4
    assert "12 calls" in said and "1,200 out, at most 1,200): $0.0" in said and length > 100
    assert not [name for name in os.listdir(world.folder) if "settings" in name]


def test_each_of_several_roleplayers_is_counted_as_often_as_it_is_asked(commands, planned, run, server, short, world, monkeypatch):
    monkeypatch.setattr(plan.load_stage("simulate"), "ELICITATION_PROMPT", "Ask {name} about: {task}")
    words = commands()[1]
    at = words.index("--roleplayer") + 1
    words[at:at + 1] = [f"openai:a@{server.url}", f"openai:b@{server.url}", "--roleplayer-weights", "3", "1", "--max-turns", "1"]
    status, said = planned([words], "--dry-run")
    run(simulate, *words[2:])
    asked = Counter(request["model"] for request in server.requests)
    assert status == 0 and asked["a"] > asked["b"] > 0
    assert all(f"Roleplayer, openai:{name}: {asked[name]} calls" in said for name in "ab"), said


def test_what_is_done_is_not_counted(commands, planned, done, world):
    assert "4 of 4 outputs are done. Left: 0 conversations, 0 scores, 0 trainings" in planned(commands())[1]
    lines = Path(world.path("c.jsonl")).read_text().splitlines(keepends=True)
    for path in ("s.jsonl", "s.scores.jsonl"):
        os.remove(world.path(path))
    shutil.rmtree(world.path("model"))
    Path(world.path("c.jsonl")).rename(world.path("c.jsonl.part-00000000000000000000000000000000"))
    Path(world.path("c.jsonl.part-00000000000000000000000000000000")).write_text("".join(lines[:20]) + lines[20][:9])        # a kill has torn a line
    assert "1 of 4 outputs are done. Left: 4 conversations, 24 scores, 1 trainings" in planned(commands())[1]


@pytest.mark.parametrize("changes, names, why", [
    ({("simulate", "--temperature"): "0.5"}, ["c.jsonl", "s.jsonl", "model"], "temperature: 0.9 there, 0.5 now"),
    ({("train", "--lr"): "1"}, ["model"], "lr: 2e-05 there, 1.0 now"),
    ({("train", "--limit"): "3"}, ["model"], "limit: None there, 3 now"),
    ({("train", "--batch-size"): "3"}, ["model"], "batch_size: 64 there, 3 now"),
    ({("gold", "--oracle"): "openai:p"}, ["gold.jsonl", "s.jsonl", "model"], "oracle: openai:o there, openai:p now"),
    ({("gold", "--split"): "test"}, ["s.jsonl", "model"], "gold.jsonl would grow by 12 rows"),
    ({("simulate", "--concurrency"): "3", ("select", "--batch-size"): "3", ("gold", "--limit"): "3"}, [], "")])
def test_one_message_names_all_that_a_change_makes_stale(changes, names, why, commands, planned, done):
    status, said = planned(commands(changes))
    assert (status, len(said.splitlines())) == (2 if names else 0, 1), said
    assert stale(said) == names and why in said or not names
    assert said.count(" there, ") <= 1, "a reason for the first of a chain"


def test_a_larger_limit_is_found_before_anything_grows(run, commands, planned, select_stage):
    small = commands({("all", "--limit"): "3"})
    for stage, words in zip((gold, simulate, select_stage, train), small):
        run(stage, *words[2:])
    assert planned(small)[0] == 0
    status, said = planned(commands({("all", "--limit"): "5"}))
    assert status == 2 and "gold.jsonl would grow by 2 rows" in said and stale(said) == ["s.jsonl", "model"]


def test_remove_takes_what_is_stale_and_nothing_else(commands, planned, done, world):
    Path(world.path("s.jsonl.part-00000000000000000000000000000000")).write_text("{}\n")
    Path(world.path("s.jsonl.mine")).write_text("mine")
    before = set(os.listdir(world.folder)) | {"commands"}
    status, said = planned(commands({("select", "--k"): "2"}), "--stale", "remove")
    assert status == 0 and "2 of 4 outputs are done. Left: 0 conversations, 24 scores, 1 trainings" in said
    assert before - set(os.listdir(world.folder)) == {
        "s.jsonl", "s.jsonl.part-00000000000000000000000000000000", "s.jsonl.settings.json", "s.scores.jsonl", "s.scores.jsonl.settings.json", "model",
        "model.settings.json"}
    assert planned(commands())[0] == 0, "and with the old setting it is just to be made"


def test_results_of_a_variant_that_is_not_run_now_go_with_what_is_stale(world):
    """They are as old; those of another split are not."""
    results, stale = world.path("results.jsonl"), argparse.Namespace(
        output=world.path("e"), metrics=[], judge=None, results=world.path("results.jsonl"), split="test")
    write_rows(results, [{"variant": "no_reg", "split": "test"}, {"variant": "main", "split": "dev"}])
    plan.remove([("evaluate", stale)])
    assert Path(results).read_text() == '{"variant": "main", "split": "dev"}\n'


def test_a_dry_run_counts_what_is_stale_as_not_there(commands, planned, done, world):
    """It asks what a change would cost, and removes nothing."""
    for flags in (["--dry-run"], ["--dry-run", "--stale", "remove"]):
        status, said = planned(commands({("simulate", "--temperature"): "0.5"}), *flags)
        assert status == 0 and "1 of 4 outputs are done. Left: 24 conversations, 24 scores, 1 trainings" in said
        assert stale(said) == ["c.jsonl", "s.jsonl", "model"] and os.path.exists(world.path("c.jsonl"))


def test_nothing_is_removed_before_the_plan_is_good(commands, planned, done, server, world):
    server.reply = lambda request: (200, "")
    status, said = planned(commands({("gold", "--oracle"): "openai:p@" + server.url}), "--stale", "remove", "--ask")
    assert status == 2 and "cannot be used" in said and os.path.exists(world.path("gold.jsonl"))


def test_a_file_of_the_users_own_is_not_taken_over(commands, planned, done, world):
    os.remove(world.path("c.jsonl.settings.json"))
    status, said = planned(commands({("gold", "--oracle"): "openai:p"}), "--stale", "remove")
    assert status == 2 and "c.jsonl: not written by simulate.py" in said and os.path.exists(world.path("gold.jsonl"))


@pytest.mark.parametrize("changes, why", [
    ({("all", "--base"): "/no/model"}, "/no/model: cannot be loaded"),
    ({("select", "--response-prompt"): "no.txt"}, "no.txt: there is no such file (--response-prompt of select.py)")])
def test_what_would_end_a_later_stage_is_found_now(changes, why, commands, planned, world):
    words = [[*words] for words in commands()]
    for (of, flag), value in changes.items():
        for stage in ("select", "train") if of == "all" else (of,):
            next(command for command in words if f"{stage}.py" in command).extend((flag, value))
    status, said = planned(words)
    assert status == 2 and why in said


def test_too_few_examples_are_found_now(planned, world):
    write_rows(world.path("e.jsonl"), [{"persona_id": "e", "persona": "I'm June."}])
    command = ["python", "generate_personas.py", "--model", "openai:w", "--output", world.path("p.jsonl")]
    assert "shows two personas" in planned([[*command, "--examples", world.path("e.jsonl")]])[1]


def test_a_dry_run_of_one_stage_is_no_part_of_a_run(commands, planned):
    assert "Say DRY_RUN=1" in planned([[*commands()[0], "--dry-run"]])[1]


def test_what_is_made_from_a_file_that_has_gone_is_stale(commands, planned, done, world):
    os.remove(world.path("c.jsonl"))
    status, said = planned(commands())
    assert status == 2 and "c.jsonl is not finished" in said and stale(said) == ["s.jsonl", "model"]
    assert planned(commands(), "--dry-run")[0] == 0


def test_a_disk_that_is_too_small(commands, planned, tiny, monkeypatch):
    size = sum(file.stat().st_size for file in Path(tiny).glob("model*.safetensors"))
    assert f"1 models: {size / 1e9:.1f} GB" in planned(commands())[1]
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, size - 1))
    status, said = planned(commands())
    assert status == 2 and "GB more than are free" in said.splitlines()[-1]
    assert "unknown size" in planned([*commands()[:3], [*commands()[3], "--base", "nobody/no-model"]], "--dry-run")[1]


def test_golds_of_ones_own_must_be_complete(commands, planned, world):
    write_rows(world.path("gold.jsonl"), world.gold[:5])
    status, said = planned(commands()[1:])
    assert status == 2 and "no gold response for" in said


def test_each_server_is_asked_one_real_question(commands, planned, server, world, tiny):
    evaluation = [["python", "simulate.py", *commands()[1][2:], "--split", "test", "--output", world.path("t.jsonl")], [
        "python", "evaluate.py", "--base", tiny, "--questioner", tiny, *world.flags("tasks", "personas"), "--gold",
        world.path("gold.jsonl"), "--conversations", world.path("t.jsonl"), "--baseline", world.path("e0"), "--judge",
        f"openai:j@{server.url}", "--output", world.path("e1"), "--judge-max-tokens", "7", "--extra", '{"top_k": 3}']]
    server.reply = lambda request: (200, "Final Response: A" if request["model"] == "j" else "Yes.")
    status, said = planned(commands() + evaluation, "--ask")
    assert status == 0, said
    assert [line.split(":")[0] for line in said.splitlines()[-3:]] == [f"asked the {role}, openai" for role in (
        "Oracle", "Roleplayer", "judge")]
    oracle, user, judge = server.requests
    assert oracle["temperature"] == 0 and oracle["max_tokens"] == 300 and "Help me with thing 0" in str(oracle["messages"])
    assert user["max_tokens"] == 4 and "AI Assistant: " + plan.QUESTION in user["messages"][1]["content"]
    assert judge["max_tokens"] == 7 and judge["top_k"] == 3 and "Response A: Yes." in judge["messages"][1]["content"]
    server.reply = lambda request: (200, "Both are good." if request["model"] == "j" else "Yes.")
    status, said = planned(commands() + evaluation, "--ask")
    assert status == 2 and "the judge, openai:j" in said.splitlines()[-1] and "Both are good." in said.splitlines()[-1]
    server.reply = lambda request: (200, "")
    status, said = planned(commands() + evaluation, "--ask")
    assert status == 2 and "the Oracle" in said.splitlines()[-1] and "empty" in said.splitlines()[-1]
    server.reply = lambda request: (400, {"error": {"message": "no such model"}})
    status, said = planned(commands() + evaluation, "--ask")
    assert status == 2 and "the Oracle" in said.splitlines()[-1] and "no such model" in said.splitlines()[-1]
    server.reply = lambda request: (503, {"error": {"message": "come back later"}})
    status, said = planned(commands({("gold", "--timeout"): "1"}), "--ask")
    assert status == 75 and "the Oracle" in said.splitlines()[-1]


def test_who_has_nothing_left_to_do_is_not_asked(commands, planned, done, server):
    server.requests.clear()
    assert planned(commands(), "--ask")[0] == 0 and not server.requests


def test_a_dry_run_of_the_published_settings(tmp_path):
    """The figures of docs/scale.md. Nobody is asked, and nothing is written."""
    done = subprocess.run(["bash", "run.sh", "paper"], cwd=ROOT, capture_output=True, text=True, env={
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "RUN": str(tmp_path / "r"), "DRY_RUN": "1",
        "SERVER_FLAGS": "--prices 1.25 10", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and not (tmp_path / "r").exists(), done.stderr
    for words in ("925,000 conversations", "9 trainings, 13 evaluations", ": 110 calls", ": 25,500 calls", ": 1,850,000 calls",
                  ": 3,600 calls", " in all", "Tokens are estimates"):
        assert words in done.stdout, done.stdout
