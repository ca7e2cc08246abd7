"""Each stage by its own command-line entry, on tiny data: what it writes, what it leaves out, and that it goes on."""
import math
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import evaluate
import generate_personas
import gold
import simulate
import train
from conftest import ROOT, read_lines, save_model, write_rows
from test_models import alone


def rows_of(world, name="out.jsonl"):
    return read_lines(world.path(name))


# ------------------------------------------------------------ personas

def test_personas_are_named_distinct_and_dealt_to_splits(run, server, world):
    """A writer that repeats names, forgets them, copies an example or says nothing, by the request's seed: all is asked
    for again."""
    copied = read_lines(ROOT / "data/seed_personas.jsonl")[0]["persona"].replace("46", "47")

    def reply(request):
        rng = random.Random(request["seed"])
        opening = rng.choice(["I'm {}.", "Meet {}.", "{} is here.", "I'm {}.", copied, ""])
        return 200, opening and opening.format(rng.choice(["ANN", "Bob", "Cid", "Dee"])) + " I sing."
    server.reply = reply
    flags = [*world.command("generate_personas", None, server.url), "--max-refused", 1, "--attempts"]
    out, _ = run(generate_personas, *flags, 200)
    rows = rows_of(world)
    assert [row["persona_id"] for row in rows] == ["A00", "A01", "test00", "test01"]
    assert [row["split"] for row in rows] == ["A", "A", "test", "test"]
    assert len({row["name"] for row in rows}) == 4 and len({row["persona"] for row in rows}) == 4
    assert all(row["name"].lower() in row["persona"].lower() and row["name"].istitle() for row in rows)
    assert all(why in out.splitlines()[-1] for why in ("no name", "name taken", "a copy", "refused"))
    calls = len(server.requests)
    run(generate_personas, *flags, 300)
    assert len(server.requests) == calls and rows_of(world) == rows
    server.reply = lambda request: (200, "Somebody without a name.")
    _, err = run(generate_personas, *flags, 2, "--splits", "A=3,test=2", status=1)
    assert "1 personas are still missing after 2 attempts" in err and rows_of(world) == rows


@pytest.mark.parametrize("text, name", [
    ("I'm JUNE. I am ...", "June"), ("Meet Dr. Okafor.", "Okafor"), ("I’m Anne-Marie, a", "Anne-Marie"),
    ("\"I'm Örjan.", "Örjan"), ("I'm McKenna.", "McKenna"), ("My name is Zoë and", "Zoë"), ("I'm 小明, 30.", "小明"),
    ("I'm प्रिया. I teach.", "प्रिया"), ("I'm أحمد. I drive.", "أحمد"), ("I'm Tom Ray Lee, 9.", "Tom"),
    ("", None), ("I'm 34 years old.", None), ("I'm a baker.", None), ("June is a baker.", None),
    ("I am Deaf and I teach.", None), ("I'm Canadian, 34. Call me Jo.", None), ("I'm Maria's grandson, Tom.", None),
    ("Introducing Persona 1: Maria.", None), ("I'm Gen Z and my name is Kai.", None)])
def test_names_in_personas(text, name):
    assert generate_personas.name_in(text) == name


def test_the_projects_own_data():
    """Golds: one for each pair of a split's first nine tasks and the people of that split, who are in no other."""
    tasks, examples = common.read_tasks(ROOT / "data/tasks.jsonl"), ROOT / "data/seed_personas.jsonl"
    assert Counter(row["split"] for row in tasks.values()) == {"A": 250, "B": 250, "test": 50}
    assert len({re.sub(r"\W+", " ", row["task"].lower()) for row in tasks.values()}) == 550
    personas, first = common.read_personas(examples), common.read_tasks(ROOT / "data/tasks.jsonl", 9)
    assert len({generate_personas.name_in(row["persona"]) for row in personas.values()} - {None}) == 21
    rows = read_lines(ROOT / "data/golds.jsonl")
    assert [common.pair_of(row) for row in rows] == [
        pair for split in ("A", "test") for pair in common.all_pairs(first, personas, split)]
    assert all(row["split"] == tasks[row["task_id"]]["split"] for row in rows)
    assert len({row["gold"] for row in rows}) == 189


# ------------------------------------------------------------ gold

def test_limit_is_a_seeded_and_nested_sample_and_tasks_may_be_fewer(run, world, server):
    tasks = common.read_tasks(world.path("tasks.jsonl"))
    personas = common.read_personas(world.path("personas.jsonl"))

    def ids(**more):
        return common.all_pairs(tasks, personas, "A", **more)
    assert len(ids()) == 12 and set(ids(limit=4, seed=1)) < set(ids(limit=8, seed=1)) < set(ids())
    assert ids(limit=4, seed=1) != ids(limit=4, seed=2)
    run(gold, *world.command("gold", None, server.url), "--split", "A", "test", "--tasks-per-split", 3)
    assert {row["task_id"] for row in rows_of(world)} == {"A0", "A1", "A2", "test0", "test1", "test2"}


# ------------------------------------------------------------ what an output was made with

def test_changed_settings_are_refused_by_name_and_the_output_stays_and_grows_with_its_limit(run, server, world):
    flags = [*world.command("gold", None, server.url), "--limit", 3]
    run(gold, *flags)
    before = rows_of(world)
    for flag, value in (("--temperature", 0.5), ("--seed", 1), ("--extra", '{"a": 1}'), ("--oracle", "openai:n")):
        _, err = run(gold, *flags, flag, value, status=2)
        assert f"out.jsonl: made with other settings: {flag.strip('-')}: " in err and "Give another --output" in err
    elsewhere = f"openai:m@{server.url.replace('127.0.0.1', 'localhost')}"
    run(gold, *flags, "--concurrency", 2, "--timeout", 9, "--max-refused", 1, "--oracle", elsewhere)
    assert rows_of(world) == before and len(server.requests) == 3
    run(gold, *flags[:-2])
    assert len(server.requests) == 12 == len(rows_of(world))


def test_a_forks_new_flag_is_a_setting_without_a_further_line(run, server, world, monkeypatch):
    def stage_parser(*words):
        parser = common.stage_parser(*words)
        parser.add_argument("--humour", type=int, default=0)
        return parser
    monkeypatch.setattr(gold, "stage_parser", stage_parser)
    flags = world.command("gold", None, server.url)
    run(gold, *flags)
    assert "settings: humour: '0' there, '1' now" in run(gold, *flags, "--humour", 1, status=2)[1]


def test_two_runs_on_one_output(run, server, world):
    lock = common.take_output(world.path("out.jsonl"), {"seed": 1})
    _, err = run(gold, *world.command("gold", None, server.url), status=2)
    assert "out.jsonl: another run is writing it" in err and not server.requests and lock


def test_ways_to_stale_rows(run, server, world, tiny, select_stage):
    """Each of these once gave rows that belonged to other inputs, without a word."""
    said, golds = "made with other settings: {}: ", world.command("gold", None, server.url)
    chosen, e0 = world.command("select", tiny, output="s.jsonl"), world.command("evaluate", tiny, output="e0")
    trained = [*world.command("train", tiny), *world.flags("gold"), "--target", "gold"]
    server.reply = lambda request: (200, "Final Response: A")
    judged = world.judged(tiny, server.url)
    all_stages = [(gold, golds), (select_stage, chosen), (evaluate, e0), (train, trained)]
    os.remove(world.path("gold.jsonl"))
    run(gold, *golds, "--split", "A", "test", "--output", world.path("gold.jsonl"))
    for stage, flags in (*all_stages, (evaluate, judged)):
        run(stage, *flags)
    # Personas were drawn anew, golds edited; after a larger limit other people have talked; responses were made again.
    for name, old, new, setting, stages in (
            ("personas.jsonl", b"tea", b"gin", "personas", all_stages),
            ("gold.jsonl", b"Final", b"Edited", "gold", all_stages[1:]),
            ("test.jsonl", b"Number 0", b"Number 7", "conversations", [(evaluate, e0)]),
            ("talks.jsonl", b"Number 0", b"Number 7", "conversations", [(select_stage, chosen)]),
            ("chosen.jsonl", b"Number 0", b"Number 7", "selected", [(train, trained)]),
            ("e1/responses.jsonl", b'"response": "', b'"response": "Again. ', "responses", [(evaluate, judged)]),
            ("e0/responses.jsonl", b'"response": "', b'"response": "Again. ', "baseline", [(evaluate, judged)])):
        path = Path(world.path(name))
        before = path.read_bytes()
        path.write_bytes(before.replace(old, new, 1))
        for stage, flags in stages:
            assert said.format(setting) in run(stage, *flags, status=2)[1], name
        path.write_bytes(before)
    older = Path(world.path("out.jsonl.settings.json"))         # written before there was a flag, which is not used now
    older.write_text(json.dumps({k: v for k, v in json.loads(older.read_text()).items() if v != {}}))
    calls = len(server.requests)
    run(evaluate, *judged)
    run(gold, *golds)
    assert len(server.requests) == calls, "nothing is stale now"


def test_what_a_number_does_not_depend_on_is_no_setting_of_it(run, server, world, tiny, select_stage, monkeypatch):
    """Another --pick, --k or --questioner computes no score anew; another judge keeps log-probabilities, responses."""
    select, scored = world.command("select", tiny), []
    score = common.LocalModel.score
    monkeypatch.setattr(common.LocalModel, "score", lambda *given: scored.append(1) or score(*given))
    for more in ([], ["--pick", "random"], ["--k", 2, "--no-response"], ["--questioner", f"openai:m@{server.url}"]):
        run(select_stage, *select, *more)
        os.remove(world.path("out.jsonl"))
        os.remove(world.path("out.jsonl.settings.json"))
    run(select_stage, *select[:-1], world.path("elsewhere.jsonl"), "--pick", "random", "--scores",
        world.path("out.scores.jsonl"))
    assert len(scored) == 1
    run(evaluate, *world.command("evaluate", tiny, output="e0"))
    server.reply = lambda request: (200, "Final Response: A")
    judged = world.judged(tiny, server.url)
    server.requests.clear()
    run(evaluate, *judged, "--judge-extra", '{"effort": "low"}')
    assert {request["effort"] for request in server.requests} == {"low"}, "the judge's alone"
    before = [Path(world.path(f"e1/{name}.jsonl")).read_bytes() for name in ("log_probs", "responses")]
    assert " judge: 'openai:j' there" in run(evaluate, *judged, "--judge", f"openai:k@{server.url}", status=2)[1]
    for path in ("e1/verdicts.jsonl", "e1/verdicts.jsonl.settings.json"):
        os.remove(world.path(path))
    monkeypatch.setattr(common, "open_model", lambda spec, *given: common.ServerModel(spec, given[0]))   # no local one
    run(evaluate, *judged, "--judge", f"openai:k@{server.url}")
    assert before == [Path(world.path(f"e1/{name}.jsonl")).read_bytes() for name in ("log_probs", "responses")]
    assert [request["model"] for request in server.requests[-12:]] == ["k"] * 12


# ------------------------------------------------------------ simulate

def test_turn_counts_are_uniform_and_the_same_for_a_pair_everywhere():
    turns = Counter(simulate.number_of_turns(f"A{i}", f"p{j}", 3, 42) for i in range(60) for j in range(50))
    assert set(turns) == {1, 2, 3} and all(abs(count - 1000) < 4 * math.sqrt(1000 * 2 / 3) for count in turns.values())
    assert len({tuple(simulate.number_of_turns(f"A{i}", "p", 3, s) for i in range(20)) for s in range(5)}) == 5


def test_conversations(run, world, tiny, server, tmp_path_factory, short):
    server.reply = lambda request: (200, f"Answer {request['seed']}.")
    flags = [*world.command("simulate", tiny, server.url), "--samples", 3, "--max-tokens", 8]
    run(simulate, *flags)
    rows = rows_of(world)
    assert [common.key_of(row) for row in rows] == sorted(
        (g["task_id"], g["persona_id"], s) for g in world.gold if g["split"] == "A" for s in range(3))
    for row in rows:
        assert [turn["role"] for turn in row["conversation"]] == ["assistant", "user"] * (len(row["conversation"]) // 2)
        assert all("Ask " not in turn["content"] for turn in row["conversation"])
    assert any(len({row["conversation"][0]["content"] for row in rows[i:i + 3]}) > 1 for i in range(0, 36, 3))
    # One length for a pair, which another model meets, too.
    lengths = {(common.pair_of(row), len(row["conversation"]) // 2) for row in rows}
    assert len(lengths) == 12 and {length for _, length in lengths} == {1, 2, 3}
    other = save_model(tmp_path_factory.mktemp("models") / "other", seed=1)
    run(simulate, *flags, "--questioner", other, "--output", world.path("d.jsonl"))
    assert {(common.pair_of(row), len(row["conversation"]) // 2) for row in rows_of(world, "d.jsonl")} == lengths
    # A row depends neither on the size of the batches nor on how many there are.
    run(simulate, *flags, "--batch-size", 3, "--limit", 7, "--output", world.path("e.jsonl"))
    assert len(rows_of(world, "e.jsonl")) == 21 and all(row in rows for row in rows_of(world, "e.jsonl"))


def test_a_refused_answer_ends_the_conversation_and_is_recorded(run, world, tiny, server, short):
    server.reply = lambda request: (200, "Yes.") if "I'm Ann" not in request["messages"][1]["content"] else (
        400, {"error": {"message": "filtered", "code": "content_filter"}})
    out, _ = run(simulate, *world.command("simulate", tiny, server.url), "--max-refused", 0.5)
    refused = [row for row in rows_of(world) if "refused" in row]
    assert {row["persona_id"] for row in refused} == {"Ap0"}
    assert all(re.fullmatch(r"user, turn 1: 400 .*content_filter.* \(prompt\)", row["refused"]) for row in refused)
    assert "24 rows, 8 refused" in out


def test_several_roleplayers_share_the_pairs_and_rows_say_who_answered(run, world, tiny, server, short):
    server.reply = lambda request: (200, f"I am {request['model']}.")
    names = [f"openai:{name}@{server.url}" for name in ("m1", "m2")]
    flags = [*world.command("simulate", tiny), "--roleplayer", *names]
    run(simulate, *flags)
    for row in rows_of(world):
        assert {turn["content"] for turn in row["conversation"][1::2]} == {f"I am {row['roleplayer']}."}
    dealt = {(common.pair_of(row), row["roleplayer"]) for row in rows_of(world)}
    assert len(dealt) == 12 and {name for _, name in dealt} == {"m1", "m2"}, "one for each pair"
    assert common.read_settings(world.path("out.jsonl"))["roleplayer"] == ["openai:m1", "openai:m2"]
    assert evaluate.roleplayer_label(world.path("out.jsonl"), None) == "m1 + m2"
    twice = [names[0], names[0].replace("127.0.0.1", "localhost")]
    assert "two have one name" in run(simulate, *flags[:-2], *twice, status=2)[1]
    pairs = [(f"t{i}", f"p{j}") for i in range(100) for j in range(40)]
    users = Counter(simulate.deal_users(pairs, ["a", "b"], 42)[0].values())
    assert abs(users["a"] - 2000) < 4 * 1000 ** 0.5, "evenly"


# ------------------------------------------------------------ select

def test_selection_with_ties(select_stage):
    best = select_stage.select_best
    assert best({0: -3.0, 1: -1.0, 2: -2.0}, 1) == [1]
    assert best({0: -3.0, 1: -1.0, 2: -2.0}, 2) == [1, 2]
    assert best({2: -1.0, 1: -1.0, 0: -5.0}, 1) == [1], "a tie goes to the lower sample"
    assert best({}, 1) == []


def test_random_selection_ignores_the_score(select_stage):
    scores = {c: -float(c) for c in range(10)}
    assert select_stage.select_random(scores, 3, 1) == select_stage.select_random({c: 0.0 for c in scores}, 3, 1)
    drawn = Counter(select_stage.select_random(scores, 1, seed)[0] for seed in range(2000))
    assert set(drawn) == set(scores) and all(abs(count - 200) < 4 * math.sqrt(180) for count in drawn.values())


def test_select_keeps_the_conversation_with_the_best_gold(run, world, tiny, select_stage):
    conversations = world.conversations("A", n=3)
    for row in conversations[:2]:
        row["refused"] = "user, turn 1: content_filter"
    write_rows(world.path("talks.jsonl"), conversations)
    golds = [dict(g) for g in world.gold]
    golds[5]["gold"] = ""                                        # as in the authors' own data
    write_rows(world.path("gold.jsonl"), golds)
    out, _ = run(select_stage, *world.command("select", tiny))
    assert "left out: 5 conversations (refused or without a gold)" in out
    rows = rows_of(world)
    assert len(rows) == 11

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    gold_of = {common.pair_of(g): g["gold"] for g in golds}

    def log_prob(row):                                           # a second path: Mistral's format, full logits
        name = {p["persona_id"]: p["name"] for p in world.personas}[row["persona_id"]]
        task = {t["task_id"]: t["task"] for t in world.tasks}[row["task_id"]]
        text = f"<s>[INST] My name is {name}.\n\n{task} [/INST]"
        for i, turn in enumerate(row["conversation"]):
            last = "\n\n" + task if i + 1 == len(row["conversation"]) else ""
            text += f"[INST] {turn['content']}{last} [/INST]" if i % 2 else f" {turn['content']}</s>"
        context = tokenizer(text, add_special_tokens=False)["input_ids"]
        gold = tokenizer(" " + gold_of[common.pair_of(row)], add_special_tokens=False)["input_ids"]
        return alone(model, context + gold, len(gold))

    for kept in rows:
        rivals = {row["sample"]: log_prob(row) for row in conversations
                  if common.pair_of(row) == common.pair_of(kept) and "refused" not in row}
        assert kept["sample"] == max(rivals, key=rivals.get)
        assert kept["gold_log_prob"] == pytest.approx(rivals[kept["sample"]], abs=1e-3)
        assert type(kept["response"]) is str
    scores = rows_of(world, "out.scores.jsonl")
    assert len(scores) == 36 - 2 - 3
    assert all(row["tokens"] == 1 + len(gold_of[common.pair_of(row)].encode()) for row in scores)

    run(select_stage, *world.command("select", tiny, output="n.jsonl"), "--no-response", "--k", 2)
    assert {row["response"] for row in rows_of(world, "n.jsonl")} == {None} and len(rows_of(world, "n.jsonl")) == 21
    hint = ["--response-prompt", ROOT / "prompts/personalisation.txt"]
    run(select_stage, *world.command("select", tiny, output="r.jsonl"), *hint)
    prompted = rows_of(world, "r.jsonl")
    assert [row["sample"] for row in prompted] == [row["sample"] for row in rows]
    assert [row["response"] for row in prompted] != [row["response"] for row in rows]


def test_an_edited_rule_is_not_mixed_with_old_rows(run, world, tiny, select_stage, monkeypatch):
    run(select_stage, *world.command("select", tiny))
    before = rows_of(world)
    monkeypatch.setattr(select_stage, "select_best", lambda log_probs, k: sorted(log_probs, key=log_probs.get)[:k])
    assert "not selected now" in run(select_stage, *world.command("select", tiny), status=2)[1]
    assert rows_of(world) == before


# ------------------------------------------------------------ evaluate

def test_q_random_is_never_the_own_persona_and_uses_each_once():
    for P in (2, 3, 10):
        ids = [f"p{i}" for i in range(P)]
        shifts = set()
        for task in range(60):
            other = evaluate.rotation(ids, f"t{task}", 42)
            assert set(other) == set(ids) == set(other.values()) and all(own != met for own, met in other.items())
            shifts.add(other["p0"])
        assert len(shifts) == P - 1, "every other persona is met"
    assert evaluate.rotation(["p0"], "t", 42) == {} == evaluate.rotation([], "t", 42)


def test_conditions(world):
    talks = {common.key_of(row): row["conversation"] for row in world.conversations("test", n=2)}
    del talks["test0", "testp1", 1]                              # a refused one
    pairs = {key[:2] for key in talks}
    rows = evaluate.conditions(talks, pairs, 42, controls=True)
    count = Counter(key[3] for key in rows)
    assert count == {"q_experimental": 23, "q_random": 22, "negative_control": 12, "positive_control": 12}
    for (task, persona, sample, condition), talk in rows.items():
        speakers = {turn["content"].split()[-1][:-1] for turn in talk or [] if turn["role"] == "user"}
        if condition == "q_experimental":
            assert speakers == {persona} and talk[1]["content"].startswith(f"Number {sample}")
        if condition == "q_random":
            assert len(speakers) == 1 and speakers != {persona} and talk[1]["content"].startswith(f"Number {sample}")
    assert Counter(key[3] for key in evaluate.conditions(talks, pairs, 42, controls=False)) == {
        "q_experimental": 23, "q_random": 22}
    few = set(sorted(pairs)[::3])                                # a smaller --limit: the same rows, or none
    assert evaluate.conditions(talks, few, 42, controls=True) == {key: rows[key] for key in rows if key[:2] in few}


def test_win_pairs_are_balanced_and_fixed():
    turns = {(t, p): simulate.number_of_turns(t, p, 3, 42) for t in map(str, range(50)) for p in "abcdefghij"}
    pairs = evaluate.win_pairs(turns, 300, 3, 42)
    assert Counter((turns[pair], order) for pair, order in pairs.items()) == {
        (length, order): 50 for length in (1, 2, 3) for order in ("ours_first", "base_first")}
    shuffled = dict(sorted(turns.items(), key=lambda item: hash(item)))
    assert evaluate.win_pairs(shuffled, 300, 3, 42) == pairs != evaluate.win_pairs(turns, 300, 3, 1)


@pytest.mark.parametrize("raw, letter", [
    ("Comparison: B is vague.\n\nFinal Response: A", "A"), ('...\n"B"\n', "B"), ("A", "A"), ("x\n**B**", "B"),
    ("Final Response: <A>", "A"), ("FINAL RESPONSE: b", "B"), ("Final Response: Assistant Response A", "A"),
    ("Final answer: $\\boxed{A}$", "A"), ("The final answer is B.", "B"), ("the", None), ("Final Response", None),
    ("Final Response: A or B", None), ("A is better than B", None), ("Not A", None), ("Final Response: a tie", None),
    ("", None), ("A\nbecause it is better", None), ("I prefer A", None), ("ABBA", None)])
def test_verdicts_are_read_and_never_guessed(raw, letter):
    assert evaluate.read_verdict(raw, "ours_first") == {"A": "ours", "B": "base", None: None}[letter]
    assert evaluate.read_verdict(raw, "base_first") == {"A": "base", "B": "ours", None: None}[letter]


def test_standard_errors_by_hand():
    rows = [{"task_id": "t", "persona_id": p, "x": x} for p, x in (("a", 1.0), ("a", 3.0), ("b", 10.0), ("c", None))]
    assert evaluate.by_pair(rows, "x") == {("t", "a"): 2.0, ("t", "b"): 10.0}
    # x = task effect alone (0, 0, 6, 6): all of the error is between tasks. By task: 2/1 * (6^2 + 6^2) / 16 = 9;
    # by persona: 0; by pair: 4/3 * 4 * 3^2 / 16 = 3; together 6. Pairs alone would say sqrt(3).
    values = {("t0", "a"): 0.0, ("t0", "b"): 0.0, ("t1", "a"): 6.0, ("t1", "b"): 6.0}
    # t.ppf(.975, 1) = 12.706 from any table, with two tasks and two personas
    interval = pytest.approx([3 - 12.7062 * math.sqrt(6), 3 + 12.7062 * math.sqrt(6)], rel=1e-4)
    assert evaluate.summary(values) == {
        "mean": 3.0, "sem": pytest.approx(math.sqrt(6)), "interval_95": interval, "n": 4}
    assert evaluate.clustered_sem({("t0", "a"): 1.0, ("t1", "a"): 2.0}) is evaluate.interval_95({}) is None
    assert evaluate.summary({}) == {"mean": None, "sem": None, "interval_95": None, "n": 0}


def test_an_interval_of_a_share_is_wilsons_and_stays_within_0_and_1():
    """Independent pairs, 40 tasks x 40 people: 8 of 40 wins, against scipy's Wilson interval with t for z."""
    values = {(f"t{i}", f"p{i}"): float(i < 8) for i in range(40)}
    q = scipy.stats.t.ppf(0.975, 39)
    sem = evaluate.clustered_sem(values)
    n = 0.16 / sem ** 2                                          # 39: the variance of a sample is divided by n - 1
    roots = np.roots([1 + q * q / n, -(2 * 0.2 + q * q / n), 0.2 ** 2])          # |p - .2| = q sqrt(p (1 - p) / n)
    assert n == pytest.approx(39) and evaluate.interval_95(values, share=True) == pytest.approx(sorted(roots))
    for won in (0, 1, 39, 40):
        low, high = evaluate.interval_95({(f"t{i % 5}", f"p{i}"): float(i < won) for i in range(40)}, share=True)
        assert -1e-9 <= low <= won / 40 <= high <= 1 + 1e-9


def test_evaluation_from_end_to_end(run, world, tiny, server):
    write_rows(world.path("blue.jsonl"), world.conversations("test", word="blue"))
    golds = [dict(g) for g in world.gold]
    golds[12]["gold"] = " "
    write_rows(world.path("gold.jsonl"), golds)
    out, _ = run(evaluate, *world.command("evaluate", tiny, output="e0"))
    assert "1 pairs without a gold response" in out and "main, t=0: gold_log_prob q_experimental -" in out
    base = rows_of(world, "e0/log_probs.jsonl")
    assert Counter(row["condition"] for row in base) == {
        "q_experimental": 22, "q_random": 22, "negative_control": 11, "positive_control": 11}
    assert not Path(world.path("e0/verdicts.jsonl")).exists() and len(rows_of(world, "e0/responses.jsonl")) == 12

    def reply(request):                                          # likes what stands first; or says neither, or nothing
        text = request["messages"][1]["content"]
        return 200, {"3": "Neither.", "2": ""}.get(text.split("thing ")[1][0], "Comparison: ...\nFinal Response: A")
    server.reply = reply
    flags = [*world.judged(tiny, server.url, conversations="blue.jsonl"), "--max-refused", 0.5]
    out, _ = run(evaluate, *flags)
    verdicts = rows_of(world, "e1/verdicts.jsonl")
    assert len(verdicts) == 12 and {row["order"] for row in verdicts} == {"ours_first", "base_first"}
    for row in verdicts:
        assert row["verdict"] == (None if row["task_id"] in ("test2", "test3") else row["order"].removesuffix("_first"))
        assert ("refused" in row) == (row["verdict"] is None)
    results = {(row["metric"], row["condition"], row["iteration"]): row for row in rows_of(world, "results.jsonl")}
    win = results["win_rate", "", 1]
    ours = sum(row["verdict"] == "ours" for row in verdicts)
    assert (win["n"], win["wins"], win["unreadable"], win["mean"]) == (6, ours, 6, pytest.approx(ours / 6))
    assert "12 answered, 6 without a verdict" in out and win["variant"] == "main" and win["roleplayer"] == "stub"
    assert win["interval_95"][0] <= win["mean"] <= win["interval_95"][1]

    gain = results["gold_log_prob_gain", "q_experimental", 1]    # from the rows on disk
    after, before = (evaluate.by_pair([row for row in rows if row["condition"] == "q_experimental"], "log_prob")
                     for rows in (rows_of(world, "e1/log_probs.jsonl"), base))
    difference = {pair: after[pair] - before[pair] for pair in after}
    assert gain["n"] == 11 and gain["mean"] == pytest.approx(np.mean([*difference.values()]))
    assert gain["sem"] == pytest.approx(evaluate.clustered_sem(difference))
    assert results["gold_log_prob", "q_experimental", 1]["mean"] == pytest.approx(np.mean([*after.values()]))
    assert ("gold_log_prob", "positive_control", 1) not in results
    assert ("gold_log_prob", "positive_control", 0) in results

    calls, lines = len(server.requests), rows_of(world, "results.jsonl")
    run(evaluate, *flags)
    assert len(server.requests) == calls and rows_of(world, "results.jsonl") == lines, "a rerun replaces its rows"
    assert "both_orders" in run(evaluate, *flags, "--both-orders", status=2)[1]

    run(evaluate, *flags, "--output", world.path("both"), "--both-orders", "--variant", "both", "--metrics", "win_rate")
    both = rows_of(world, "both/verdicts.jsonl")
    assert len(both) == len({(*common.pair_of(row), row["order"]) for row in both}) == 24
    row = [row for row in rows_of(world, "results.jsonl") if row["variant"] == "both"]
    assert [(r["metric"], r["mean"], r["ties"], r["n"]) for r in row] == [("win_rate", 0.5, 6, 6)]


def test_the_longest_conversations_cut_after_k_questions(run, world, tiny):
    """The scores of --turns k are those of the same conversations, cut by hand; shorter ones are left out."""
    run(evaluate, *world.command("evaluate", tiny, output="cut"), "--turns", 1, "--metrics", "log_prob")
    cut = [{**row, "conversation": row["conversation"][:2]} for row in world.conversations("test")
           if len(row["conversation"]) == 6]
    write_rows(world.path("test.jsonl"), cut)
    run(evaluate, *world.command("evaluate", tiny, output="by_hand"), "--metrics", "log_prob")
    rows, by_hand = rows_of(world, "cut/log_probs.jsonl"), rows_of(world, "by_hand/log_probs.jsonl")
    assert rows == by_hand and sum(row["condition"] == "q_experimental" for row in rows) == len(cut) == 8
    _, err = run(evaluate, *world.command("evaluate", tiny, output="none"), "--turns", 1, status=2)
    assert "no conversation of more than 1 questions" in err


def test_like_is_compared_with_like(run, world, tiny, server, short):
    """Q_BASE must have met the same users, who asked as often; who asked is what differs."""
    for name, more in (("base", []), ("same", ["--temperature", "0.9"]), ("K", ["--max-turns", 2])):
        run(simulate, *world.command("simulate", tiny, server.url, f"{name}.jsonl"), "--split", "test", *more)
    run(evaluate, *world.command("evaluate", tiny, output="e0"), "--conversations", world.path("base.jsonl"))
    server.reply = lambda request: (200, "Final Response: A")
    server.requests.clear()
    for more, said in ((["--conversations", world.path("K.jsonl")], "simulate max_turns (3, here 2)"),
                       (["--roleplayer", "terse"], "roleplayer ('stub', here 'terse')"),
                       (["--chat-template-kwargs", '{"a": 1}'], "chat_template_kwargs ({}, here {'a': 1})")):
        _, err = run(evaluate, *world.judged(tiny, server.url, "no", "same.jsonl"), *more, status=2)
        assert f"--baseline {world.path('e0')}: Q_BASE was evaluated with another {said}" in err
    assert not server.requests and not Path(world.path("no")).exists()
    run(evaluate, *world.judged(tiny, server.url, conversations="same.jsonl"))
