"""The embedded world: its rules, its server, its measures, and the base that is shipped."""
import json
import random
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "toy"))
import measure  # noqa: E402
import permute  # noqa: E402
import pretrain  # noqa: E402
import check  # noqa: E402
import server  # noqa: E402
import world  # noqa: E402
from common import read_gold  # noqa: E402


def prompt(name):
    return (ROOT / "prompts" / f"{name}.txt").read_text().removesuffix("\n")


def people(count, seed=0):
    """Random (rng, persona, task), tasks of all splits."""
    rng = random.Random(seed)
    tasks = [task for split in world.WORDINGS for task in world.make_tasks(split, 224)]
    return [(rng, world.draw_persona(rng), rng.choice(tasks)) for _ in range(count)]


# ---- the world

def test_values_and_names_are_distinct_words():
    words = [value for values in world.SLOTS.values() for value in values]
    assert len(world.SLOTS) == 8 and len(words) == len({word.lower() for word in words}) == 80
    assert len(world.NAMES) == len(set(world.NAMES)) >= 200
    assert not {name.lower() for name in world.NAMES} & {word.lower() for word in words}


def test_every_question_form_is_recognised():
    for slot in world.SLOTS:
        for form in world.QUESTIONS:
            assert world.question_slot(form.format(slot)) == slot
    for other in ("What do you like?", "My pet is dog.", "What is your pet and your job?", ""):
        assert world.question_slot(other) is None


def test_every_gold_is_answerable_from_the_persona():
    for rng, persona, task in people(300):
        gold = world.gold_response(persona, task)
        said = world.facts_in(world.persona_text(persona, rng))
        assert world.facts_in(gold) <= said
        assert world.facts_in(gold) == {(slot, persona[slot]) for slot in world.relevant_slots(task)}
        assert world.read_task(task)[0] in gold and "?" not in gold
        assert world.judge_score(gold, persona, task) == len(world.relevant_slots(task))


def test_splits_share_no_task_no_object_no_wording():
    seen = {}
    for split in world.WORDINGS:
        tasks = world.make_tasks(split, 1000)
        assert len(tasks) == len(set(tasks)) == 14 * 4 * 4
        for task in tasks:
            item, _ = world.read_task(task)
            for part in (task, item, task.replace(item, "{}")):
                assert seen.setdefault(part, split) == split
            assert not world.facts_in(task)
        assert {world.read_task(task)[1] for task in tasks[:14]} == set(world.TOPICS)


def test_persona_round_trip():
    openings = set()
    for rng, persona, _ in people(200):
        text = world.persona_text(persona, rng)
        assert world.read_persona(text) == persona
        openings.add(text.split()[0])
    assert openings == {"I'm", "Meet"}
    with pytest.raises(ValueError):
        world.read_persona("I'm Anna. My pet is dog.")


def test_tasks_file(tmp_path):
    output = tmp_path / "new" / "tasks.jsonl"
    subprocess.run([sys.executable, ROOT / "toy/world.py", "--output", output, "--tasks-per-split", "20"], check=True)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["task_id"] for row in rows[::20]] == ["A000", "B000", "dev000", "test000"] and len(rows) == 80
    assert rows[25] == {"task_id": "B005", "split": "B", "task": world.make_tasks("B", 6)[5]}


# ---- the judge

def judge_prompt(persona_text, task, a, b):
    return prompt("judge_user").format(persona=persona_text, task=task, response_a=a, response_b=b)


def ask(model, system, user, seed=0, folded=False):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    if folded:
        messages = [{"role": "user", "content": f"{system}\n\n{user}"}]
    return server.reply({"model": model, "messages": messages, "seed": seed})


def random_response(rng, task):
    facts = [(slot, rng.choice(world.SLOTS[slot])) for slot in rng.sample(list(world.SLOTS), rng.randint(0, 5))]
    return rng.choice([world.response(task, facts), f"What is your {rng.choice(list(world.SLOTS))}?"])


def test_judge_agrees_with_a_brute_force_count_and_is_symmetrical():
    ties = {"A": 0, "B": 0}
    for rng, persona, task in people(1000, seed=1):
        text, count = world.persona_text(persona, rng), []
        pair = [random_response(rng, task), random_response(rng, task)]
        pair[0] = world.gold_response(persona, task) if rng.random() < 0.3 else pair[0]
        for response in pair:  # word by word, from the persona's text and the tables alone
            words, score = set(re.findall("[A-Za-z]+", response)), 0
            for slot, values in world.SLOTS.items():
                for value in values:
                    if value in words and re.search(rf"\b{slot} is {value}\.", text):
                        score += slot in world.TOPICS[re.search(r"a \w+ (\w+)", task)[1]]
                    elif value in words:
                        score -= 1
            count.append(score)
        verdicts = [ask("judge", prompt("judge_system"), judge_prompt(text, task, *pair))[-1],
                    ask("judge", prompt("judge_system"), judge_prompt(text, task, *pair[::-1]))[-1]]
        if count[0] == count[1]:
            ties[verdicts[0]] += 1
        else:
            assert verdicts == (["A", "B"] if count[0] > count[1] else ["B", "A"])
    assert sum(ties.values()) > 50 and min(ties.values()) > 0.3 * sum(ties.values())


def test_a_question_scores_as_any_response_without_facts():
    _, persona, task = people(1)[0]
    assert world.judge_score("What is your pet?", persona, task) == world.judge_score("Good luck!", persona, task) == 0


# ---- the server

@pytest.fixture(scope="module")
def url():
    running = server.Server(("127.0.0.1", 0), server.Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def post(url, request):
    """-> (status, parsed answer)"""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", body)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def chat(system, user):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def test_server_answers_the_papers_prompts(url):
    persona_prompt = prompt("persona_user") + "\n\nI'm A. One.\n\nI'm B. Two."
    status, answer = post(url, {"model": "persona-writer", "messages": chat(prompt("persona_system"), persona_prompt)})
    assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == "persona-writer"
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["message"]["role"] == "assistant"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 100 and answer["id"]
    text = answer["choices"][0]["message"]["content"]
    persona, task = world.read_persona(text), "I am looking for a classic trip."

    def said(model, system, user):
        status, answer = post(url, {"model": model, "messages": chat(prompt(system), user), "seed": 3})
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"]

    gold = said("oracle", "gold_system", prompt("gold_user").format(persona=text, task=task))
    assert gold == world.gold_response(persona, task)
    history = "AI Assistant: What is your job?\nYou: My job is x.\nAI Assistant: {}"
    roleplayer = {question: prompt("roleplayer_user").format(
        persona=text, task=task, conversation=history.format(question)) for question in ("What is your pet?", "Why?")}
    assert said("roleplayer", "roleplayer_system", roleplayer["What is your pet?"]) in [
        form.format("pet", persona["pet"]) for form in world.ANSWERS]
    assert said("roleplayer", "roleplayer_system", roleplayer["Why?"]) == world.UNSURE
    assert said("roleplayer-terse", "roleplayer_system", roleplayer["What is your pet?"]) == f"{persona['pet']}."
    assert said("judge", "judge_system", judge_prompt(text, task, "What?", gold)).endswith("\n\nFinal Response: B")


def test_server_is_deterministic_for_a_seed_and_varies_between_seeds():
    persona_prompt = prompt("persona_user") + "\n\nI'm A. One.\n\nI'm B. Two."
    drawn = [ask("persona-writer", prompt("persona_system"), persona_prompt, seed) for seed in range(20)]
    assert len(set(drawn)) == 20
    assert drawn == [ask("persona-writer", prompt("persona_system"), persona_prompt, seed, folded=True)
                     for seed in range(20)]
    roleplay = prompt("roleplayer_user").format(
        persona=drawn[0], task="I am looking for a classic trip.", conversation="AI Assistant: What is your pet?")
    assert len({ask("roleplayer", prompt("roleplayer_system"), roleplay, seed) for seed in range(20)}) == 2


def test_server_refuses_everything_else(url):
    persona, task = world.persona_text(world.draw_persona(random.Random(0)), random.Random(0)), "Sort out a bold trip."
    system, user = prompt("gold_system"), prompt("gold_user").format(persona=persona, task=task)
    good = {"model": "oracle", "messages": chat(system, user)}
    assert post(url, good)[0] == 200
    for bad, reason in [
            ({**good, "model": "judge"}, "does not play this role"),
            ({**good, "model": None}, "does not play this role"),
            ({**good, "n": 2}, "n = 1"), ({**good, "stream": True}, "no stream"), ({**good, "seed": "x"}, "seed"),
            ({**good, "messages": chat("You are kind.", user)}, "no role"),
            ({**good, "messages": chat(system, user)[1:]}, "no role"),
            ({**good, "messages": chat(system, user.replace("concise", "short"))}, "not the prompt"),
            ({**good, "messages": chat(system, user.replace(task, "What is love?"))}, "no task of this world"),
            ({**good, "messages": chat(system, user.replace(persona, "A cat."))}, "no persona of this world"),
            ({**good, "messages": [{"role": "system", "content": system}, {"role": "user"}]}, "messages"),
            ({"model": "oracle"}, "messages"), ([], "JSON object"), (b"{", "")]:
        status, answer = post(url, bad)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error", bad
        assert reason in answer["error"]["message"]


def test_server_process_starts_says_where_and_stops_at_once(tmp_path):
    place = tmp_path / "url"
    process = subprocess.Popen([sys.executable, ROOT / "toy/server.py", "--port", "0", "--port-file", place],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    address = place.read_text().strip()
    assert line == f"serving on {address}\n"
    with urllib.request.urlopen(f"{address}/models") as answer:
        assert "roleplayer-terse" in [model["id"] for model in json.load(answer)["data"]]
    with urllib.request.urlopen(address.replace("/v1", "/health")) as answer:
        assert answer.status == 200
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == ""


# ---- the measures

def test_measure_by_hand(tmp_path):
    def turn(slot, answer):
        return [{"role": "assistant", "content": f"What is your {slot}?"}, {"role": "user", "content": answer}]

    tasks = [{"task_id": "t0", "split": "dev", "task": "Help me plan a bold dinner."},  # diet, budget
             {"task_id": "t1", "split": "test", "task": "I am looking for a decent coat."}]
    personas = [{"persona_id": f"p{i}", "split": "dev", "name": "Anna", "persona": f"I'm Anna. My diet is vegan. My city is {('Rome', 'Oslo')[i]}."} for i in range(2)]
    talk = {("p0", 0): turn("diet", "My diet is vegan.") + turn("pet", "dog.") + turn("diet", "vegan."),
            ("p0", 1): turn("budget", "I would rather not say."), ("p1", 0): turn("city", "My city is Oslo.")}
    # relevant: 1/3 (diet counts once) and 1, so p0 has 2/3, p1 has 0; covered: 1 of 2 and 0 of 1, so p0 has 1/4
    answers = {("p0", 0): "It suits you as your diet is vegan. Your pet is dog. Oslo, Oslo and jazz!",  # Oslo, jazz
               ("p1", 0): "What is your diet?"}
    conversations = [{"task_id": "t0", "persona_id": p, "sample": s, "conversation": c} for (p, s), c in talk.items()]
    responses = [{"task_id": "t0", "persona_id": p, "sample": s, "turns": 1, "response": r}
                 for (p, s), r in answers.items()]
    paths = {"tasks": tasks, "personas": personas, "conversations": conversations, "responses": responses}
    command = [sys.executable, ROOT / "toy/measure.py", "--iteration", "1", "--split", "dev"]
    for name, rows in paths.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        command += [f"--{name}", tmp_path / name]
    done = subprocess.run([*command, "--results", tmp_path / "results"], capture_output=True, text=True)
    assert done.returncode == 2 and "Give a name" in done.stderr and not (tmp_path / "results").exists()
    (tmp_path / "conversations.settings.json").write_text('{"roleplayer": "roleplayer (0123456789ab)"}')
    for _ in range(2):  # a rerun replaces its rows
        subprocess.run([*command, "--results", tmp_path / "results"], check=True)
    found = {row["metric"]: row for row in map(json.loads, (tmp_path / "results").read_text().splitlines())}
    assert len((tmp_path / "results").read_text().splitlines()) == 5
    expected = {"relevant_share": (1 / 3, 1 / 3), "coverage": (0.125, 0.125), "question_share": (0.5, 0.5),
                "used_facts": (0.5, 0.5), "invented_facts": (1.0, 1.0)}
    for metric, (mean, sem) in expected.items():  # two pairs a and b: SEM = |a - b| / 2
        assert found[metric] == {"variant": "main", "iteration": 1, "metric": metric, "condition": "", "n": 2,
                                 "roleplayer": "roleplayer", "split": "dev", "title": measure.TITLES[metric], "mean": pytest.approx(mean),
                                 "sem": pytest.approx(sem)}
    assert measure.invented_facts("Your pet is dog.", [], "Help me plan a bold dinner.") == 1


# ---- the control of the selection

def test_permuted_golds_belong_to_somebody_else():
    golds = {(f"t{t}", f"p{p}"): f"g{t}{p}" for t in range(20) for p in range(4)}
    dealt = permute.permuted(golds, 1)
    assert set(dealt) == set(golds) and sorted(dealt.values()) == sorted(golds.values()), "each gold is dealt once"
    assert all(gold != golds[pair] and gold[:-1] == golds[pair][:-1] for pair, gold in dealt.items()), "of the same task"
    assert len({tuple(dealt[f"t{t}", f"p{p}"][-1] for p in range(4)) for t in range(20)}) == 3, "by all three rotations"
    assert permute.permuted({("t", "p0"): "g"}, 1) == {("t", "p0"): None}, "nobody else is there"
    refused = permute.permuted({("t", "p0"): "a", ("t", "p1"): None, ("t", "p2"): "c"}, 1)
    assert refused == {("t", "p0"): "c", ("t", "p1"): None, ("t", "p2"): "a"}, "a refused gold is dealt to nobody"


def test_a_file_of_permuted_golds_is_read_as_golds(tmp_path):
    golds = {(t, p): f"Try {p} for {t}, Zoë." for t in ("t0", "t1") for p in ("p0", "p1")} | {("t2", "p0"): "Alone."}
    (tmp_path / "g.jsonl").write_text("".join(json.dumps({"task_id": t, "persona_id": p, "split": "A", "gold": gold}) + "\n"
                                              for (t, p), gold in golds.items()))
    command = [sys.executable, ROOT / "toy/permute.py", "--gold", tmp_path / "g.jsonl", "--output", tmp_path / "p.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "5 golds" in done.stdout and not done.stderr
    assert read_gold(tmp_path / "p.jsonl") == permute.permuted(golds, 42)
    done = subprocess.run([*command, "--gold", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


# ---- the report

def results_of(**changed):
    """Rows of results.jsonl of two iterations in which all findings hold, but for what `changed` says."""
    values = {
        ("main", 0): {"relevant_share": 0.4, "gold_log_prob positive_control": -1.0, "gold_log_prob q_random": -21.0},
        ("main", 1): {"relevant_share": 0.5, "win_rate": 0.62, "invented_facts": 0.1, "question_share": 0.0,
                      "gold_log_prob q_experimental": -11.0, "gold_log_prob q_random": -19.0,
                      "gold_log_prob_gain q_experimental": 0.2, "gold_log_prob_gain q_random": -0.5},
        ("main", 2): {"relevant_share": 0.8, "win_rate": 0.7, "invented_facts": 0.2, "question_share": 0.0,
                      "gold_log_prob q_experimental": -9.0, "gold_log_prob q_random": -20.0,
                      "gold_log_prob_gain q_experimental": 5.0, "gold_log_prob_gain q_random": -1.0},
        ("no_reg", 1): {"win_rate": 0.2, "question_share": 0.9, "gold_log_prob q_experimental": -11.5},
        ("no_reg", 2): {"win_rate": 0.3, "question_share": 0.8, "gold_log_prob q_experimental": -9.5},
        ("gold", 1): {"win_rate": 0.45, "invented_facts": 1.0, "gold_log_prob q_experimental": -10.5},
        ("gold", 2): {"win_rate": 0.49, "invented_facts": 1.2, "gold_log_prob q_experimental": -8.5},
        ("base_answers", 1): {"win_rate": 0.52}, ("base_answers", 2): {"win_rate": 0.57}}
    for control in ("random", "permuted"):
        values[control, 1] = {"relevant_share": 0.7, "win_rate": 0.5}
        values[control, 2] = {"relevant_share": 0.45, "win_rate": 0.5, "gold_log_prob_gain q_experimental": 1.0,
                              "gold_log_prob_gain q_random": 0.5}
    rows = []
    for (variant, t), metrics in values.items():
        for metric, mean in metrics.items():
            mean = changed.get(f"{variant}_{t}_{metric.replace(' ', '_')}", mean)
            name, _, condition = metric.partition(" ")
            rows.append({"variant": variant, "iteration": t, "metric": name, "condition": condition, "split": "test",
                         "roleplayer": "roleplayer", "mean": mean, "sem": 0.01, "n": 192,
                         "sem_two_way": changed.get("sem", 0.1 if "log_prob" in name else 0.03)})
    return rows


@pytest.mark.parametrize("changed, failing", [
    ({}, []),
    ({"main_2_gold_log_prob_gain_q_experimental": 0.29}, [0, 6, 7]),       # then there is little to compare controls with
    ({"main_2_relevant_share": 0.59}, [1, 6, 7]),
    ({"main_1_gold_log_prob_q_random": -10.9}, [2]),
    ({"main_2_gold_log_prob_q_random": -8.9}, [2]),
    ({"main_0_gold_log_prob_positive_control": -9.5}, [2]),
    ({"main_2_win_rate": 0.59, "main_1_win_rate": 0.599}, [3]),
    ({"sem": 0.11}, [3]),                                                  # .7 - 1.96 x .11 is below one half
    ({"main_1_win_rate": 0.71, "main_2_win_rate": 0.55}, []),              # the best t counts
    ({"no_reg_1_question_share": 0.5}, [4]),
    ({"no_reg_2_question_share": 0.5}, [4]),
    ({"no_reg_1_win_rate": 0.35}, [4]),
    ({"no_reg_2_win_rate": 0.35}, [4]),
    ({"gold_1_invented_facts": 0.1}, [5]),
    ({"gold_2_invented_facts": 0.2}, [5]),
    ({"gold_1_win_rate": 0.62}, [5, 11]),
    ({"gold_2_win_rate": 0.7}, [5, 11]),
    ({"main_2_gold_log_prob_q_random": -21.5}, [8]),
    ({"no_reg_1_gold_log_prob_q_experimental": -10.9}, [9]),
    ({"gold_2_gold_log_prob_q_experimental": -9.1}, [10]),
    ({"gold_2_win_rate": 0.5}, [11]),
    ({"base_answers_2_win_rate": 0.6}, [12]),
    ({"random_2_relevant_share": 0.51}, [6]),
    ({"permuted_2_gold_log_prob_gain_q_random": -0.51}, [7]),
    # main has learned nothing: controls that did worse prove nothing
    ({"main_2_relevant_share": 0.38, "random_2_relevant_share": 0.2, "permuted_2_relevant_share": 0.2}, [1, 6, 7]),
])
def test_each_finding_fails_when_its_figures_do(changed, failing):
    found = check.findings(results_of(**changed))
    assert len(found) == 13
    assert [i for i, (_, holds, _) in enumerate(found) if not holds] == failing


def test_report_leaves_out_what_was_not_run_and_reads_one_roleplayer():
    rows = [row for row in results_of() if row["variant"] == "main"]
    other = [{**row, "roleplayer": "roleplayer-terse", "mean": -99.0} for row in results_of()]
    assert [holds for _, holds, _ in check.findings(rows + other)] == [True] * 5
    assert check.sharpening(results_of() + other) == [(1, 0.62, 0.52), (2, 0.7, 0.57)] and check.sharpening(rows) == []
    assert check.findings([]) == check.findings(other) == []


def test_a_run_that_was_interrupted_is_reported_as_far_as_it_went():
    whole = results_of()
    for row in whole:                                              # whatever is missing, there is no traceback
        check.findings([other for other in whole if other is not row])
    part = [row for row in whole if row["variant"] != "no_reg" or row["iteration"] < 2]
    assert [holds for _, holds, _ in check.findings(part)] == [
        True, True, True, True, None, True, True, True, True, None, True, True, True]
    single = [{**row, "sem": None, "sem_two_way": None} for row in whole]
    assert [holds for _, holds, _ in check.findings(single)][0] is None


def test_means_over_seeds():
    runs = [results_of(main_1_win_rate=rate) for rate in (0.6, 0.7, 0.8)]
    rows = {(row["variant"], row["iteration"], row["metric"]): row for row in check.over_seeds(runs)}
    row = rows["main", 1, "win_rate"]
    assert (row["mean"], row["sem"], row["n"]) == (pytest.approx(0.7), pytest.approx(0.1), 3)


def test_ties_are_told_from_the_scores_that_the_judge_names(tmp_path):
    folder = tmp_path / "main/2/test"
    folder.mkdir(parents=True)
    said = [("ours_first", 2, 1, "ours"), ("base_first", 2, 1, "base"), ("base_first", -1, 0, "ours"), ("ours_first", 0, 0, "base"),
            ("base_first", 1, 1, "ours"), ("ours_first", -2, -1, "base"), ("ours_first", 3, -1, "ours"), ("base_first", 0, 2, "ours")]
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(
        {"task_id": "t", "persona_id": f"p{i // 2}", "order": order, "verdict": verdict,
         "raw": f"Comparison: response A scores {a}, response B scores {b}.\n\nFinal Response: A"}) + "\n"
        for i, (order, a, b, verdict) in enumerate(said)))
    assert check.outcomes(tmp_path, "test") == {("main", 2): (4 / 8, 2 / 8, 2 / 8)}
    assert check.outcomes(tmp_path, "dev") == {}


def test_two_runs_are_checked(tmp_path):
    for seed in "12":
        run = tmp_path / seed
        (run / "main/1/test").mkdir(parents=True)
        (run / "main/1/test/verdicts.jsonl").write_text("")
        (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results_of()))
        (run / "main/2/test").mkdir(parents=True)                  # an evaluation that was interrupted
        (run / "main/1.old").mkdir()
    command = [sys.executable, ROOT / "toy/check.py"]
    done = subprocess.run([*command, tmp_path / "1", tmp_path / "2", "--output", tmp_path / "check.txt"],
                          capture_output=True, text=True, check=True)
    assert done.stdout.count("Does it hold in") == 2 and "NO " not in done.stdout and "over 2 seeds" in done.stdout
    assert done.stdout.strip() == (tmp_path / "check.txt").read_text().strip()
    assert max(map(len, done.stdout.splitlines())) <= 100 + len(str(tmp_path))
    (tmp_path / "1/results.jsonl").write_text("")
    done = subprocess.run([*command, tmp_path / "1"], capture_output=True, text=True)
    assert done.returncode == 2 and "no results of an iteration" in done.stderr and "Traceback" not in done.stderr


# ---- the base

def test_a_base_without_experts_never_sees_better_questions_than_random_ones():
    rng, shares = random.Random(0), {}
    for experts in (0, 0.2):
        for name, mixture, floors, _ in pretrain.phases(experts):
            asked = [world.question_slot(message["content"]) in world.relevant_slots(messages[0]["content"])
                     for draw in mixture for messages in [draw(rng) for _ in range(300)]
                     if re.search(r"\ba \w+ (?:" + "|".join(world.TOPICS) + r")\b", messages[0]["content"])
                     for message in messages if message["role"] == "assistant" and "?" in message["content"]]
            if asked:
                shares[experts, name] = sum(asked) / len(asked)
            assert experts or "relevant_share" not in floors
    assert all(0.25 < share < 0.37 for (experts, _), share in shares.items() if experts == 0), shares
    assert shares[0.2, "ask what matters"] > 0.7 and 0.37 < shares[0.2, "the base"] < 0.55, shares


@pytest.fixture(scope="module")
def base():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = ROOT / "toy/base"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_base_is_small_and_its_words_are_tokens(base):
    model, tokenizer = base
    assert model.num_parameters() < 1_000_000 and model.config.model_type == "mistral"
    assert (ROOT / "toy/base/model.safetensors").stat().st_size <= 2.5e6
    for word in [*world.NAMES, *(value for values in world.SLOTS.values() for value in values)]:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1


def test_base_copies_asks_and_answers(base):
    found = pretrain.abilities(*base)
    for ability, floor in pretrain.FLOORS.items():
        assert found[ability] >= floor, found
    assert found["control"] > found["no_conversation"] + 5
    assert 0.35 < found["relevant_share"] < 0.6  # mostly poor questions: there is something to learn
