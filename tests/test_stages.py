"""Each stage by its own command-line entry, on tiny data: what it writes, what it leaves out, and that it goes on."""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import common
import evaluate
import generate_personas
import gold
import simulate
from conftest import ROOT, read_lines, run_stage, write_rows

LOCAL = ("--dtype", "float32")


# ------------------------------------------------------------ personas

def test_personas_are_named_distinct_and_dealt_to_splits(run, server, world):
    """A writer that repeats names and texts and forgets names, by the request's seed: all is asked for again."""
    def reply(request):
        rng = random.Random(request["seed"])
        opening = rng.choice(["I'm {}.", "Meet {}.", "{} is here.", "I'm {}."])
        return 200, opening.format(rng.choice(["ANN", "Bob", "Cid", "Dee"])) + rng.choice([" I sing.", " I run."])
    server.reply = reply
    flags = ["--model", f"openai:m@{server.url}", "--splits", "A=2,test=2", "--output", world.path("p.jsonl"),
             "--attempts", 200]
    out, _ = run(generate_personas, *flags)
    rows = read_lines(world.path("p.jsonl"))
    assert [row["persona_id"] for row in rows] == ["A00", "A01", "test00", "test01"]
    assert [row["split"] for row in rows] == ["A", "A", "test", "test"]
    assert len({row["name"] for row in rows}) == 4 and len({row["persona"] for row in rows}) == 4
    assert all(row["name"].lower() in row["persona"].lower() and row["name"].istitle() for row in rows)
    assert "no name" in out and "name taken" in out
    before, calls = rows, len(server.requests)
    run(generate_personas, *flags)
    assert len(server.requests) == calls and read_lines(world.path("p.jsonl")) == before
    server.reply = lambda request: (200, "Somebody without a name.")
    out, _ = run(generate_personas, *flags[:-1], 2, "--splits", "A=3,test=2", status=1)
    assert "1 of 5 personas are still missing" in out
    assert read_lines(world.path("p.jsonl")) == before


@pytest.mark.parametrize("text, name", [
    ("I'm JUNE. I am ...", "June"), ("Meet Zara. An ...", "Zara"), ("I’m Reece, a ...", "Reece"), ("Meet Dr. Okafor.", "Okafor"),
    ("My name is Anne-Marie and", "Anne-Marie"), ("\"I'm Örjan.", "Örjan"), ("I'm McKenna.", "McKenna"),
    ("I'm a baker.", None), ("Meet the baker.", None), ("June is a baker.", None), ("I'm 34 years old.", None), ("", None)])
def test_names_in_personas(text, name):
    assert generate_personas.name_in(text) == name


def test_prodigy_characters_by_the_papers_ids(run, server, world):
    characters = {i: {"character_name": f"N{i}", "biography": [f"I am {i}.", "I talk."]} for i in generate_personas.PRODIGY_IDS}
    characters["u1"] = {"character_name": "NOT", "biography": ["I am not among the 21."]}
    open(world.path("characters.json"), "w").write(json.dumps(characters))
    examples = generate_personas.read_examples(world.path("characters.json"))
    assert len(examples) == 21 and examples[0] == "I'm Nu0. I am u0. I talk." and not any("NOT" in e for e in examples)
    del characters["u9"]
    open(world.path("characters.json"), "w").write(json.dumps(characters))
    _, err = run(generate_personas, "--model", "openai:m@" + server.url, "--output", world.path("p.jsonl"), "--examples",
                 world.path("characters.json"), status=2)
    assert "characters.json" in err and "u9" in err


def test_the_projects_own_data():
    tasks = common.read_tasks(ROOT / "data/tasks.jsonl")
    assert Counter(row["split"] for row in tasks.values()) == {"A": 250, "B": 250, "test": 50}
    assert len({re.sub(r"\W+", " ", row["task"].lower()) for row in tasks.values()}) == 550
    examples = generate_personas.read_examples(str(ROOT / "data/seed_personas.jsonl"))
    assert len(set(examples)) == 21 and len({generate_personas.name_in(text) for text in examples} - {None}) == 21


# ------------------------------------------------------------ gold

def test_gold_covers_all_pairs_and_records_refusals(run, server, world):
    server.reply = lambda request: (200, "" if "thing 2" in request["messages"][1]["content"] else "  Gold. ")
    flags = ["--oracle", f"openai:m@{server.url}", *world.flags("tasks", "personas"), "--output", world.path("g.jsonl")]
    out, _ = run(gold, *flags, "--split", "A", "test", "--max-refused", 0.25)
    rows = read_lines(world.path("g.jsonl"))
    assert {(r["task_id"], r["persona_id"], r["split"]) for r in rows} == {
        (g["task_id"], g["persona_id"], g["split"]) for g in world.gold}
    assert all(r.get("refused") == "empty" if r["task_id"][-1] == "2" else r["gold"] == "Gold." for r in rows)
    assert "24 gold responses, 6 refused" in out
    golds = common.read_gold(world.path("g.jsonl"))
    assert golds["A2", "Ap0"] is None and golds["A1", "Ap0"] == "Gold."


def test_an_empty_gold_of_a_local_model_is_a_refusal_too(run, world, tiny, monkeypatch):
    monkeypatch.setattr(common.LocalModel, "generate", lambda self, requests, *_: (
        (i, common.Reply("Gold." if i % 2 else "")) for i in range(len(requests))))
    run(gold, "--oracle", tiny, *LOCAL, *world.flags("tasks", "personas"), "--split", "A", "--max-refused", 0.5, "--output",
        world.path("g.jsonl"))
    assert [row.get("refused") for row in read_lines(world.path("g.jsonl"))].count("empty") == 6
    assert list(common.read_gold(world.path("g.jsonl")).values()).count(None) == 6


def test_limit_is_a_seeded_and_nested_sample(world):
    tasks, personas = (common.read_tasks(world.path("tasks.jsonl")), common.read_personas(world.path("personas.jsonl")))
    ids = lambda **more: [(t["task_id"], p["persona_id"]) for t, p in common.all_pairs(tasks, personas, "A", **more)]
    assert len(ids()) == 12 and set(ids(limit=4, seed=1)) < set(ids(limit=8, seed=1)) < set(ids())
    assert ids(limit=4, seed=1) != ids(limit=4, seed=2)


def test_a_longer_run_takes_up_a_shorter_one(run, server, world):
    flags = ["--oracle", f"openai:m@{server.url}", *world.flags("tasks", "personas"), "--output", world.path("g.jsonl"),
             "--split", "A"]
    run(gold, *flags, "--limit", 5)
    assert len(server.requests) == 5
    run(gold, *flags)
    assert len(server.requests) == 12 == len(read_lines(world.path("g.jsonl")))


def test_changed_settings_are_refused_by_name_and_the_output_stays(run, server, world):
    flags = ["--oracle", f"openai:m@{server.url}", *world.flags("tasks", "personas"), "--output", world.path("g.jsonl"),
             "--split", "A", "--limit", 3]
    run(gold, *flags)
    before = open(world.path("g.jsonl")).read()
    for changed in (["--temperature", "0.5"], ["--max-tokens", "30"], ["--seed", "1"], ["--extra", '{"a": 1}']):
        _, err = run(gold, *flags, *changed, status=2)
        assert "other settings" in err and changed[0].strip("-").replace("-", "_") + ":" in err
    run(gold, *flags, "--concurrency", 2, "--timeout", 9)
    tasks = world.tasks[:1] + [{**world.tasks[1], "task": "Another wish."}] + world.tasks[2:]
    write_rows(world.path("tasks.jsonl"), tasks)
    _, err = run(gold, *flags, status=2)
    assert "row ('A1', 'Ap1') was made from other inputs" in err
    assert open(world.path("g.jsonl")).read() == before and len(server.requests) == 3


# ------------------------------------------------------------ simulate

def simulate_flags(world, tiny, server, split="A", output="c.jsonl"):
    prompt = world.folder / "short.txt"
    prompt.write_text("Ask {name} about: {task}")
    return ["--questioner", tiny, "--roleplayer", f"openai:m@{server.url}", *world.flags("tasks", "personas"), *LOCAL,
            "--split", split, "--samples", 3, "--max-tokens", 8, "--elicitation-prompt", prompt, "--output", world.path(output)]


def test_turn_counts_are_uniform_and_the_same_for_a_pair_everywhere():
    turns = Counter(simulate.number_of_turns(f"A{i}", f"p{j}", 3, 42) for i in range(60) for j in range(50))
    assert set(turns) == {1, 2, 3} and all(abs(count - 1000) < 4 * math.sqrt(1000 * 2 / 3) for count in turns.values())
    assert simulate.number_of_turns("A1", "p", 3, 1) == simulate.number_of_turns("A1", "p", 3, 1)
    assert len({tuple(simulate.number_of_turns(f"A{i}", "p", 3, s) for i in range(20)) for s in range(5)}) == 5


def test_conversations(run, world, tiny, server, tmp_path_factory):
    from conftest import save_model
    server.reply = lambda request: (200, f"Answer {request['seed']}.")
    run(simulate, *simulate_flags(world, tiny, server))
    rows = read_lines(world.path("c.jsonl"))
    assert [common.key_of(row) for row in rows] == sorted(
        (g["task_id"], g["persona_id"], s) for g in world.gold if g["split"] == "A" for s in range(3))
    lengths = {(r["task_id"], r["persona_id"]): set() for r in rows}
    for row in rows:
        assert common.conversation_error(row["conversation"]) is None
        lengths[row["task_id"], row["persona_id"]].add(len(row["conversation"]) // 2)
        assert all("Ask " not in turn["content"] for turn in row["conversation"])
    assert all(len(of_pair) == 1 for of_pair in lengths.values())
    assert {length for of_pair in lengths.values() for length in of_pair} == {1, 2, 3}
    assert any(len({row["conversation"][0]["content"] for row in rows[i:i + 3]}) > 1 for i in range(0, 36, 3))
    # The Roleplayer gets the whole history, and the persona; another model meets the same lengths.
    longest = max(server.requests, key=lambda request: request["messages"][1]["content"].count("AI Assistant:"))
    history = longest["messages"][1]["content"].split("with the assistant.\n\n")[1]
    assert [line.split(":")[0] for line in history.split("\n") if re.match("(AI Assistant|You): ", line)] == [
        "AI Assistant", "You", "AI Assistant", "You", "AI Assistant", "You"] and history.endswith("\nYou: ")
    other = save_model(tmp_path_factory.mktemp("models") / "other", seed=1)
    run(simulate, *simulate_flags(world, other, server, output="d.jsonl"))
    again = {(r["task_id"], r["persona_id"]): {len(r["conversation"]) // 2} for r in read_lines(world.path("d.jsonl"))}
    assert again == lengths


def test_rows_do_not_depend_on_batch_size_or_limit(run, world, tiny, server):
    server.reply = lambda request: (200, "I see.")
    run(simulate, *simulate_flags(world, tiny, server, output="a.jsonl"), "--batch-size", 160)
    run(simulate, *simulate_flags(world, tiny, server, output="b.jsonl"), "--batch-size", 3, "--limit", 7)
    whole = {common.key_of(row): row for row in read_lines(world.path("a.jsonl"))}
    part = read_lines(world.path("b.jsonl"))
    assert len(part) == 21 and all(whole[common.key_of(row)] == row for row in part)


def test_a_refused_answer_ends_the_conversation_and_is_recorded(run, world, tiny, server):
    server.reply = lambda request: (200, "Yes.") if "I'm Ann" not in request["messages"][1]["content"] else (
        400, {"error": {"message": "filtered", "code": "content_filter"}})
    out, _ = run(simulate, *simulate_flags(world, tiny, server), "--max-refused", 0.5)
    for row in read_lines(world.path("c.jsonl")):
        assert ("refused" in row) == (row["persona_id"] == "Ap0")
        assert row.get("refused", "user, turn 1: content_filter (prompt)") == "user, turn 1: content_filter (prompt)"
    assert "12 refused" in out


def test_a_bad_elicitation_prompt(run, world, tiny, server):
    flags = simulate_flags(world, tiny, server)
    for text, why in (("Ask something.", "no {task}"), ("Ask {task} {who}", "who"), ("Ask {task} {", "filled in")):
        (world.folder / "short.txt").write_text(text)
        _, err = run(simulate, *flags, status=2)
        assert "short.txt" in err and why in err and not os.path.exists(world.path("c.jsonl"))


@pytest.mark.parametrize("after", [0.0, 0.15])
def test_a_killed_simulation_goes_on_to_the_same_bytes(world, tiny, server, after):
    def reply(request):
        time.sleep(0.01)
        return 200, f"Number {request['seed']}."
    server.reply = reply
    flags = list(map(str, [*simulate_flags(world, tiny, server), "--batch-size", 6]))
    run_stage("simulate.py", *flags)
    whole, calls = open(world.path("c.jsonl")).read(), len(server.requests)
    server.requests.clear()
    killed = [*flags[:-3], world.path("k.jsonl"), "--batch-size", "6"]
    process = subprocess.Popen([sys.executable, "simulate.py", *killed], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while len(server.requests) < calls // 3:
        time.sleep(0.01)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    parts = common.unfinished(world.path("k.jsonl"))
    assert parts and not os.path.exists(world.path("k.jsonl")), "an unfinished output must not look finished"
    with open(parts[0], "a") as file:                             # the kill may tear the last line
        file.write('{"task_id": "A0", "pers')
    run_stage("simulate.py", *killed)
    assert open(world.path("k.jsonl")).read() == whole
    assert calls <= len(server.requests) <= calls + 64
    assert not common.unfinished(world.path("k.jsonl"))


def test_two_runs_on_one_output(world, tmp_path):
    first = common.Rows(tmp_path / "x.jsonl", ("a",), {}, common.OneProcess())
    code = ("import sys; sys.path.append('.'); import common; "
            f"common.Rows({str(tmp_path / 'x.jsonl')!r}, ('a',), {{}}, common.OneProcess())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "another run is writing" in done.stderr
    first.add([{"a": 1}])
    first.finish()
    assert read_lines(tmp_path / "x.jsonl") == [{"a": 1}]


# ------------------------------------------------------------ select

def test_selection_with_ties_nan_and_missing_samples(select_stage):
    best = select_stage.select_best
    assert best({0: -3.0, 1: -1.0, 2: -2.0}, 1) == [1]
    assert best({0: -3.0, 1: -1.0, 2: -2.0}, 2) == [1, 2]
    assert best({2: -1.0, 1: -1.0, 0: -5.0}, 1) == [1], "a tie goes to the lower sample"
    assert best({0: None, 1: float("nan"), 2: float("-inf"), 5: -9.0}, 3) == [5]
    assert best({0: None}, 1) == [] and best({}, 1) == []


def test_random_selection_ignores_the_score(select_stage):
    scores = {c: -float(c) for c in range(10)}
    assert select_stage.select_random(scores, 3, 1) == select_stage.select_random({c: 0.0 for c in scores}, 3, 1)
    drawn = Counter(select_stage.select_random(scores, 1, seed)[0] for seed in range(2000))
    assert set(drawn) == set(scores) and all(abs(count - 200) < 4 * math.sqrt(180) for count in drawn.values())
    assert select_stage.select_random({0: None, 1: -1.0}, 2, 5) == [1]


def select_flags(world, tiny, output="s.jsonl"):
    return ["--base", tiny, "--questioner", tiny, *LOCAL, *world.flags("tasks", "personas", "gold"), "--max-tokens", 6,
            "--conversations", world.path("c.jsonl"), "--output", world.path(output)]


def test_permuted_golds_belong_to_somebody_else(select_stage):
    golds = {(f"t{t}", f"p{p}"): f"g{t}{p}" for t in range(20) for p in range(4)}
    dealt = select_stage.permuted(golds, 1)
    assert set(dealt) == set(golds) and sorted(dealt.values()) == sorted(golds.values()), "each gold is dealt once"
    assert all(gold != golds[pair] and gold[:-1] == golds[pair][:-1] for pair, gold in dealt.items()), "of the same task"
    assert len({tuple(dealt[f"t{t}", f"p{p}"][-1] for p in range(4)) for t in range(20)}) == 3, "by all three rotations"
    assert select_stage.permuted({("t", "p0"): "g"}, 1) == {("t", "p0"): None}, "nobody else is there"
    refused = select_stage.permuted({("t", "p0"): "a", ("t", "p1"): None, ("t", "p2"): "c"}, 1)
    assert refused == {("t", "p0"): "c", ("t", "p1"): None, ("t", "p2"): "a"}, "a refused gold is dealt to nobody"


def test_select_by_permuted_golds_keeps_what_suits_another(run, world, tiny, select_stage):
    write_rows(world.path("c.jsonl"), world.conversations("A", n=4))
    golds = {(row["task_id"], row["persona_id"]): row["gold"] for row in world.gold}
    dealt = select_stage.permuted(golds, 42)
    run(select_stage, *select_flags(world, tiny), "--pick", "permuted", "--output", world.path("permuted.jsonl"))
    other = [{**row, "gold": dealt[row["task_id"], row["persona_id"]]} for row in world.gold]
    write_rows(world.path("gold.jsonl"), other)                   # the same rule on a file that was permuted beforehand
    run(select_stage, *select_flags(world, tiny))
    assert read_lines(world.path("permuted.jsonl")) == read_lines(world.path("s.jsonl"))
    settings = json.load(open(world.path("permuted.jsonl.settings.json")))
    assert settings["pick"] == "permuted"


def test_select_keeps_the_conversation_with_the_best_gold(run, world, tiny, select_stage):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    conversations = world.conversations("A", n=3)
    for row in conversations[:2]:
        row["refused"] = "user, turn 1: content_filter"
    write_rows(world.path("c.jsonl"), conversations)
    golds = [dict(g) for g in world.gold]
    golds[5]["gold"] = ""                                        # as in the authors' own data
    write_rows(world.path("gold.jsonl"), golds)
    out, _ = run(select_stage, *select_flags(world, tiny))
    assert "2 refused conversations, 1 pairs without a gold response" in out
    rows = read_lines(world.path("s.jsonl"))
    assert len(rows) == 11

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    gold_of = {common.pair_of(g): g["gold"] for g in golds}

    def log_prob(row):                                           # a second path: strings of Mistral's format, full logits
        name = {p["persona_id"]: p["name"] for p in world.personas}[row["persona_id"]]
        task = {t["task_id"]: t["task"] for t in world.tasks}[row["task_id"]]
        text = f"<s>[INST] My name is {name}.\n\n{task} [/INST]"
        for i in range(0, len(row["conversation"]), 2):
            last = "\n\n" + task if i + 2 == len(row["conversation"]) else ""
            text += f" {row['conversation'][i]['content']}</s>[INST] {row['conversation'][i + 1]['content']}{last} [/INST]"
        context = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([context + tokenizer(" " + gold_of[common.pair_of(row)], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            log_p = model(ids).logits[0].log_softmax(-1)
        return sum(log_p[t - 1, ids[0, t]].item() for t in range(len(context), ids.shape[1]))

    for kept in rows:
        rivals = {row["sample"]: log_prob(row) for row in conversations
                  if common.pair_of(row) == common.pair_of(kept) and "refused" not in row}
        assert kept["sample"] == max(rivals, key=rivals.get)
        assert kept["gold_log_prob"] == pytest.approx(rivals[kept["sample"]], abs=1e-3)
        assert type(kept["response"]) is str
    scores = read_lines(world.path("s.scores.jsonl"))
    assert len(scores) == 36 - 2 - 3
    assert all(row["tokens"] == 1 + len(gold_of[common.pair_of(row)].encode()) for row in scores)

    run(select_stage, *select_flags(world, tiny, "n.jsonl"), "--no-response", "--k", 2)
    rows = read_lines(world.path("n.jsonl"))
    assert all(row["response"] is None for row in rows) and len(rows) == 21
    run(select_stage, *select_flags(world, tiny, "r.jsonl"), "--response-prompt")
    prompted = read_lines(world.path("r.jsonl"))
    assert [row["sample"] for row in prompted] == [row["sample"] for row in read_lines(world.path("s.jsonl"))]
    assert [row["response"] for row in prompted] != [row["response"] for row in read_lines(world.path("s.jsonl"))]


def test_an_edited_rule_or_gold_is_not_mixed_with_old_rows(run, world, tiny, select_stage, monkeypatch):
    write_rows(world.path("c.jsonl"), world.conversations("A", n=3))
    run(select_stage, *select_flags(world, tiny))
    before = open(world.path("s.jsonl")).read()
    with monkeypatch.context() as patch:
        patch.setattr(select_stage, "select_best", lambda log_probs, k: sorted(log_probs, key=log_probs.get)[:k])
        _, err = run(select_stage, *select_flags(world, tiny), status=2)
    assert "not selected now" in err
    write_rows(world.path("gold.jsonl"), [{**world.gold[0], "gold": "Another."}, *world.gold[1:]])
    _, err = run(select_stage, *select_flags(world, tiny), status=2)
    assert "row ('A0', 'Ap0', 0) was made from other inputs" in err and open(world.path("s.jsonl")).read() == before


def test_nothing_to_select_leaves_an_empty_file(run, world, tiny, select_stage):
    write_rows(world.path("c.jsonl"), [{**row, "refused": "filter"} for row in world.conversations("A")])
    out, _ = run(select_stage, *select_flags(world, tiny))
    assert "24 refused conversations" in out and read_lines(world.path("s.jsonl")) == []


def test_a_conversation_without_any_gold_row_is_bad_input(run, world, tiny, select_stage):
    write_rows(world.path("c.jsonl"), world.conversations("A"))
    write_rows(world.path("gold.jsonl"), world.gold[1:])
    _, err = run(select_stage, *select_flags(world, tiny), status=2)
    assert "no gold response for ('A0', 'Ap0')" in err and not os.path.exists(world.path("s.jsonl"))


# ------------------------------------------------------------ evaluate

def test_q_random_is_never_the_own_persona_and_uses_each_once():
    for P in (2, 3, 10):
        ids = [f"p{i}" for i in range(P)]
        shifts = set()
        for task in range(60):
            other = common.rotation(ids, f"t{task}", 42)
            assert set(other) == set(ids) == set(other.values()) and all(own != met for own, met in other.items())
            shifts.add(other["p0"])
        assert len(shifts) == P - 1, "every other persona is met"
    assert common.rotation(["p0"], "t", 42) == {} == common.rotation([], "t", 42)


def test_conditions(world):
    talks = {common.key_of(row): row["conversation"] for row in world.conversations("test", n=2)}
    del talks["test0", "testp1", 1]                              # a refused one
    personas = [p["persona_id"] for p in world.personas if p["split"] == "test"]
    rows = evaluate.conditions(talks, personas, 42, controls=True)
    count = Counter(key[3] for key in rows)
    assert count == {"q_experimental": 23, "q_random": 22, "negative_control": 12, "positive_control": 12}
    for (task, persona, sample, condition), talk in rows.items():
        speakers = {turn["content"].split()[-1][:-1] for turn in talk or [] if turn["role"] == "user"}
        if condition == "q_experimental":
            assert speakers == {persona} and talk[1]["content"].startswith(f"Number {sample}")
        if condition == "q_random":
            assert len(speakers) == 1 and speakers != {persona} and talk[1]["content"].startswith(f"Number {sample}")
    assert Counter(key[3] for key in evaluate.conditions(talks, personas, 42, controls=False)) == {
        "q_experimental": 23, "q_random": 22}
    few = {key: talk for key, talk in talks.items() if key[1] != "testp2"}      # a smaller --limit: the same rows, or none
    assert evaluate.conditions(few, personas, 42, controls=True).items() <= rows.items()


def test_win_pairs_are_balanced_and_fixed():
    turns = {(f"t{i}", f"p{j}"): simulate.number_of_turns(f"t{i}", f"p{j}", 3, 42) for i in range(50) for j in range(10)}
    pairs = evaluate.win_pairs(turns, 300, 3, 42)
    assert Counter(turns[pair] for pair in pairs) == {1: 100, 2: 100, 3: 100} and len(set(pairs)) == 300
    shuffled = dict(sorted(turns.items(), key=lambda item: hash(item)))
    assert evaluate.win_pairs(shuffled, 300, 3, 42) == pairs != evaluate.win_pairs(turns, 300, 3, 1)


@pytest.mark.parametrize("raw, letter", [
    ("Comparison: B is vague.\n\nFinal Response: A", "A"), ('...\n"B"\n', "B"), ("A", "A"), ("Comparison: x\n**B**", "B"),
    ("Final Response: <A>", "A"), ("x\nFinal Response: \"B\".", "B"),
    ("Final Response: A or B", None), ("Both are good.", None), ("", None), ("A\nbecause it is better", None),
    ("Final Response: C", None), ("I prefer A", None), ("Final Response: Neither", None), ("ABBA", None)])
def test_verdicts_are_read_and_never_guessed(raw, letter):
    assert evaluate.read_verdict(raw, "ours_first") == {"A": "ours", "B": "base", None: None}[letter]
    assert evaluate.read_verdict(raw, "base_first") == {"A": "base", "B": "ours", None: None}[letter]


def test_two_orders_combine():
    assert evaluate.combine(["ours"]) == "ours" and evaluate.combine(["ours", "ours"]) == "ours"
    assert evaluate.combine(["ours", "base"]) == "tie" == evaluate.combine(["base", "ours"])
    assert evaluate.combine([None, "ours"]) is None and evaluate.combine([None]) is None


def test_standard_errors_by_hand():
    assert common.mean_sem([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7.0 / 3)), 3)
    assert common.mean_sem([1.0]) == (1.0, None, 1) and common.mean_sem([]) == (None, None, 0)
    rows = [{"task_id": "t", "persona_id": p, "x": x} for p, x in (("a", 1.0), ("a", 3.0), ("b", 10.0))]
    assert common.by_pair(rows, "x") == {("t", "a"): 2.0, ("t", "b"): 10.0}
    # x = task effect alone (0, 0, 6, 6): all of the error is between tasks. By task: 2/1 * (6^2 + 6^2) / 16 = 9;
    # by persona: 0; by pair: 4/3 * 4 * 3^2 / 16 = 3; together 6. Pairs alone would say sqrt(3).
    values = {("t0", "a"): 0.0, ("t0", "b"): 0.0, ("t1", "a"): 6.0, ("t1", "b"): 6.0}
    assert evaluate.sem_two_way(values) == pytest.approx(math.sqrt(6))
    assert evaluate.sem_two_way({("t0", "a"): 1.0, ("t1", "a"): 2.0}) is None


def evaluate_flags(world, tiny, name, *more):
    return ["--base", tiny, "--questioner", tiny, *LOCAL, *world.flags("tasks", "personas", "gold"), "--max-tokens", 6,
            "--conversations", world.path(f"{name}.jsonl"), "--output", world.path(name), "--roleplayer", "stub",
            "--results", world.path("results.jsonl"), *more]


def test_evaluation_from_end_to_end(run, world, tiny, server):
    write_rows(world.path("e0.jsonl"), world.conversations("test"))
    write_rows(world.path("e1.jsonl"), world.conversations("test", word="blue"))
    golds = [dict(g) for g in world.gold]
    golds[12]["gold"] = " "
    write_rows(world.path("gold.jsonl"), golds)
    out, _ = run(evaluate, *evaluate_flags(world, tiny, "e0", "--iteration", 0))
    assert "1 pairs without a gold response" in out and "Q_BASE" in out
    base = read_lines(world.path("e0/log_probs.jsonl"))
    assert Counter(row["condition"] for row in base) == {
        "q_experimental": 22, "q_random": 22, "negative_control": 11, "positive_control": 11}
    assert not os.path.exists(world.path("e0/verdicts.jsonl")) and len(read_lines(world.path("e0/responses.jsonl"))) == 12

    def reply(request):                                          # likes whatever stands first; or says neither, or nothing
        text = request["messages"][1]["content"]
        return 200, {"3": "Neither.", "2": ""}.get(text.split("thing ")[1][0], "Comparison: ...\nFinal Response: A")
    server.reply = reply
    flags = evaluate_flags(world, tiny, "e1", "--iteration", 1, "--baseline", world.path("e0"), "--judge",
                           f"openai:j@{server.url}", "--max-refused", 0.25)
    out, _ = run(evaluate, *flags)
    verdicts = read_lines(world.path("e1/verdicts.jsonl"))
    assert len(verdicts) == 12 and {row["order"] for row in verdicts} == {"ours_first", "base_first"}
    for row in verdicts:
        assert row["verdict"] == (None if row["task_id"] in ("test2", "test3") else row["order"].removesuffix("_first"))
        assert ("refused" in row) == (row["task_id"] == "test2")
    results = {(row["metric"], row["condition"], row["iteration"]): row for row in read_lines(world.path("results.jsonl"))}
    win = results["win_rate", "", 1]
    ours = sum(row["verdict"] == "ours" for row in verdicts)
    assert (win["n"], win["wins"], win["unreadable"], win["refused_verdicts"], win["mean"]) == (
        6, ours, 3, 3, pytest.approx(ours / 6))
    assert "3 refused verdicts, 3 unreadable verdicts" in out and win["variant"] == "main" and win["roleplayer"] == "stub"

    gain = results["gold_log_prob_gain", "q_experimental", 1]    # by numpy, from the rows on disk
    means = []
    for rows in (read_lines(world.path("e1/log_probs.jsonl")), base):
        pairs = {}
        for row in rows:
            if row["condition"] == "q_experimental":
                pairs.setdefault((row["task_id"], row["persona_id"]), []).append(row["log_prob"])
        means.append(np.array([np.mean(pairs[pair]) for pair in sorted(pairs)]))
    assert gain["n"] == 11 and gain["mean"] == pytest.approx((means[0] - means[1]).mean())
    assert gain["sem"] == pytest.approx((means[0] - means[1]).std(ddof=1) / math.sqrt(11))
    assert results["gold_log_prob", "q_experimental", 1]["mean"] == pytest.approx(means[0].mean())
    assert ("gold_log_prob", "positive_control", 1) not in results and ("gold_log_prob", "positive_control", 0) in results

    calls, lines = len(server.requests), open(world.path("results.jsonl")).read()
    run(evaluate, *flags)
    assert len(server.requests) == calls and open(world.path("results.jsonl")).read() == lines, "a rerun replaces its rows"
    _, err = run(evaluate, *flags, "--both-orders", status=2)
    assert "both_orders" in err

    flags[flags.index("--output") + 1] = world.path("both")
    run(evaluate, *flags, "--both-orders", "--variant", "both", "--metrics", "win_rate")
    both = read_lines(world.path("both/verdicts.jsonl"))
    assert {row["verdict"] for row in both} == {"tie", None} and all(len(row["raw"]) == 2 for row in both)
    row = [row for row in read_lines(world.path("results.jsonl")) if row["variant"] == "both"]
    assert [(r["metric"], r["mean"], r["ties"], r["n"]) for r in row] == [("win_rate", 0.5, 6, 6)]


def test_a_baseline_with_another_roleplayer_is_refused(run, world, tiny, server):
    write_rows(world.path("e0.jsonl"), world.conversations("test"))
    write_rows(world.path("e1.jsonl"), world.conversations("test"))
    run(evaluate, *evaluate_flags(world, tiny, "e0", "--iteration", 0))
    flags = evaluate_flags(world, tiny, "e1", "--iteration", 1, "--baseline", world.path("e0"))
    flags[flags.index("stub")] = "terse"
    _, err = run(evaluate, *flags, "--judge", f"openai:j@{server.url}", status=2)
    assert "another roleplayer ('stub', here 'terse')" in err and not server.requests


def test_two_evaluations_may_write_results_side_by_side(tmp_path):
    code = ("import sys; sys.path.append('.'); import common\nfor t in range(30):\n    common.write_results(sys.argv[1], "
            "[{'variant': sys.argv[2], 'iteration': t, 'metric': 'm', 'condition': '', 'roleplayer': 'r', 'split': 's', "
            "'mean': 0.5, 'sem': None, 'n': 1}])")
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r.jsonl"), name], cwd=ROOT) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0] and len(read_lines(tmp_path / "r.jsonl")) == 60


def test_a_table_in_the_papers_layout():
    row = lambda t, condition, mean: {"variant": "main", "iteration": t, "metric": "gold_log_prob", "condition": condition,
                                      "roleplayer": "r", "split": "test", "mean": mean, "sem": 1.2, "n": 500}
    lines = evaluate.table([row(1, "q_random", -363.47), row(0, "positive_control", -267.47), row(0, "q_experimental", -359.81),
                            row(1, "q_experimental", -350.86), row(0, "q_random", -369.96)], "gold_log_prob", "Title")
    assert [line.split() for line in lines[1:]] == [
        ["Title"], ["Q_BASE", "t=1"],
        "Q-Experimental, main -359.81 ± 1.20 (500) -350.86 ± 1.20 (500)".split(),
        "Q-Random, main -369.96 ± 1.20 (500) -363.47 ± 1.20 (500)".split(),
        "positive control -267.47 ± 1.20 (500)".split()]


# ------------------------------------------------------------ bad input

@pytest.mark.parametrize("line, why", [
    ("{", "not JSON"), ("[1]", "an object is expected"), ('{"task_id": "x", "split": "A"}', "no field 'task'"),
    ('{"task_id": 3, "split": "A", "task": "t"}', "field 'task_id'"), ('{"task_id": "x", "refused": "r"}', "no field 'split'"),
    ('{"task_id": "x", "split": "A", "task": NaN}', "not JSON"), ('{"task_id": "\\ud800", "split": "A", "task": "t"}', "surrogate"),
    ('{"task_id": "A0", "split": "A", "task": "t"}', "line 1"),
    (b"\xff\xfe", "not UTF-8")])
def test_bad_lines_are_named(run, world, server, line, why):
    with open(world.path("tasks.jsonl"), "ab") as file:
        file.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
    _, err = run(gold, "--oracle", f"openai:m@{server.url}", *world.flags("tasks", "personas"), "--output",
                 world.path("g.jsonl"), status=2)
    assert "tasks.jsonl, line 9: " in err and why in err and len(err.strip().splitlines()) == 1
    assert not server.requests and not os.path.exists(world.path("g.jsonl"))


@pytest.mark.parametrize("turns", [[], "text", [{"role": "assistant", "content": "q"}], [{"role": "user", "content": "a"}] * 2,
                                   [{"role": "assistant", "content": "q"}, {"role": "user", "content": None}],
                                   [{"role": "assistant", "content": "q"}, {"role": "system", "content": "a"}], [[], []]])
def test_bad_conversations_are_named(run, world, tiny, select_stage, turns):
    rows = world.conversations("A")
    rows[4]["conversation"] = turns
    write_rows(world.path("c.jsonl"), rows)
    _, err = run(select_stage, *select_flags(world, tiny), status=2)
    assert "c.jsonl, line 5: field 'conversation'" in err


def test_other_bad_input(run, world, server, tiny):
    flags = ["--oracle", f"openai:m@{server.url}", "--output", world.path("g.jsonl")]
    assert "No such file" in run(gold, *flags, "--tasks", world.path("none"), status=2)[1]
    assert "--split Z" in run(gold, *flags, *world.flags("tasks", "personas"), "--split", "Z", status=2)[1]
    assert "Is a directory" in run(gold, *flags, "--tasks", world.folder, status=2)[1]
    write_rows(world.path("x.jsonl"), [])
    assert "did not write it" in run(gold, "--oracle", f"openai:m@{server.url}", *world.flags("tasks", "personas"),
                                     "--split", "A", "--output", world.path("x.jsonl"), status=2)[1]
    assert "no model to load" in run(simulate, *simulate_flags(world, world.path("none"), server), status=2)[1]
    assert "--oracle" in run(gold, "--output", "x", status=2)[1]
    for stage, flags_of in ((simulate, ["--questioner"]), (evaluate, ["--conversations", "x", "--base"])):
        assert "a folder or hub name is needed" in run(stage, *flags_of, "openai:m", "--output", "x", status=2)[1]
    for flag, value in (("--limit", "0"), ("--seed", "-1"), ("--output", ""), ("--output", "/"), ("--temperature", "1e-9"), ("--top-p", "0"), ("--top-p", "1.1"), ("--temperature", "-1"), ("--extra", "[]"),
                        ("--extra", "{"), ("--max-tokens", "none"), ("--temperature", "nan")):
        assert flag in run(gold, *flags, flag, value, status=2)[1]


@pytest.mark.parametrize("body", [{}, [], None, "text", {"choices": []}, {"choices": [{}]}, {"error": {"message": "busy"}}])
def test_an_answer_that_is_no_chat_completion_is_an_error_and_no_refusal(run, world, server, body):
    server.reply = lambda request: (200, body if body != "text" else ["text"])
    _, err = run(gold, "--oracle", f"openai:m@{server.url}", *world.flags("tasks", "personas"), "--split", "A", "--limit", 2,
                 "--output", world.path("g.jsonl"), status=2)
    assert "no chat completion" in err and not os.path.exists(world.path("g.jsonl"))


def test_what_was_answered_before_a_lasting_error_is_kept(run, world, server):
    server.reply = lambda request: (200, "Gold.") if len(server.requests) <= 7 else (404, {"error": {"message": "gone"}})
    flags = ["--oracle", f"openai:m@{server.url}", *world.flags("tasks", "personas"), "--split", "A", "--output",
             world.path("g.jsonl"), "--concurrency", 1]
    _, err = run(gold, *flags, status=2)
    assert "answers 404" in err
    server.reply = lambda request: (200, "Gold.")
    run(gold, *flags)
    assert len(server.requests) == 12 + 1 and len(read_lines(world.path("g.jsonl"))) == 12


def test_an_unfinished_file_is_not_read(run, world, server):
    (world.folder / "tasks.jsonl.part-0").write_text("")
    _, err = run(gold, "--oracle", f"openai:m@{server.url}", *world.flags("tasks", "personas"), "--split", "A", "--output",
                 world.path("g.jsonl"), status=2)
    assert "tasks.jsonl: not finished" in err


def test_leftovers_of_kills_at_the_worst_moments(tmp_path):
    """A torn line in a part, a merge that was cut off, a last line without its end in the finished file."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    (tmp_path / "x.jsonl.settings.json").write_text("{}")
    (tmp_path / "x.jsonl.part-0").write_text('{"a": 3}\n{"a": 9')
    (tmp_path / "x.jsonl.part-0.tmp").write_text('{"a": 7}\n')
    (tmp_path / "x.jsonl.part-1").write_text('{"a": 3}\n{"a": 0}\n')
    rows = common.Rows(path, ("a",), {}, common.OneProcess())
    assert set(rows.done) == {(0,), (1,), (2,), (3,)}
    rows.finish()
    assert read_lines(path) == [{"a": 0}, {"a": 1}, {"a": 2}, {"a": 3}] and not common.unfinished(path)


def test_no_server(run, world):
    _, err = run(gold, "--oracle", "openai:m@http://127.0.0.1:9/v1", *world.flags("tasks", "personas"), "--split", "A",
                 "--limit", 1, "--timeout", "1", "--output", world.path("g.jsonl"), status=2)
    assert "no server at http://127.0.0.1:9/v1" in err and len(err.strip().splitlines()) == 1
