"""The embedded world: its rules, its server, its measures, and the base that is shipped."""
import itertools
import random
import sys
from collections import Counter

import pytest

import common
from conftest import ROOT, read_lines, run_stage, write_rows

sys.path.append(str(ROOT / "toy"))                              # the scripts import their neighbours
from toy import check, manners, measure, permute, pretrain, server, world  # noqa: E402

PROMPTS = {path.stem: path.read_text().removesuffix("\n") for path in (ROOT / "prompts").glob("*.txt")}


def people(count, seed=0):
    """Random (rng, persona, task), tasks of all splits."""
    rng = random.Random(seed)
    tasks = [task for split in world.WORDINGS for task in world.make_tasks(split, 224)]
    return [(rng, world.draw_persona(rng), rng.choice(tasks)) for _ in range(count)]


def test_values_names_and_questions_are_recognised():
    words = [value for values in world.SLOTS.values() for value in values]
    assert len(world.SLOTS) == 8 and len(words) == len({word.lower() for word in words}) == 80
    assert len(world.NAMES) == len(set(world.NAMES)) >= 200 and not world.facts_in(" ".join(world.NAMES))
    for slot in world.SLOTS:
        assert {world.question_slot(form.format(slot)) for form in world.QUESTIONS} == {slot}
    for other in ("What do you like?", "My pet is dog.", "What is your pet and your job?", ""):
        assert world.question_slot(other) is None


def test_every_gold_is_answerable_from_the_persona():
    for rng, persona, task in people(300):
        gold, text = world.gold_response(persona, task), world.persona_text(persona, rng)
        assert world.read_persona(text) == persona and world.facts_in(gold) <= world.facts_in(text)
        assert world.facts_in(gold) == {(slot, persona[slot]) for slot in world.relevant_slots(task)}
        assert world.read_task(task)[0] in gold and "?" not in gold
    with pytest.raises(ValueError):
        world.read_persona("I'm Anna. My pet is dog.")


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


def ask(model, system, user, seed=0, folded=False):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    if folded:
        messages = [{"role": "user", "content": f"{system}\n\n{user}"}]
    return server.reply({"model": model, "messages": messages, "seed": seed})


def test_judge_by_hand():
    """Relevant true facts minus wrong ones; the better answer wins from either place, and ties go either way."""
    persona = world.draw_persona(random.Random(0)) | {"diet": "vegan", "budget": "tiny", "pet": "dog"}
    text, task = world.persona_text(persona, random.Random(0)), "Help me plan a bold dinner."         # diet, budget
    scored = {"It suits you as your diet is Vegan. tiny": 2, "vegan, vegan and a dog": 1, "vegan keto": 0, "dog": 0,
              "What is your diet?": 0, "A cat, but vegan and huge": -1, "keto or halal": -2}

    def verdict(a, b, seed=0):
        user = PROMPTS["judge_user"].format(persona=text, task=task, response_a=a, response_b=b)
        return ask("judge", PROMPTS["judge_system"], user, seed)[-1]
    for (a, of_a), (b, of_b) in itertools.product(scored.items(), repeat=2):
        assert world.judge_score(a, persona, task) == of_a
        assert of_a == of_b or verdict(a, b) == ("A" if of_a > of_b else "B")
    assert 30 < [verdict("dog", "vegan keto", seed) for seed in range(100)].count("A") < 70


def test_server_is_deterministic_for_a_seed_and_varies_between_seeds():
    asked = PROMPTS["persona_system"], PROMPTS["persona_user"] + "\n\nI'm A. One.\n\nI'm B. Two."
    drawn = [ask("persona-writer", *asked, seed) for seed in range(20)]
    assert len(set(drawn)) == 20 and drawn == [ask("persona-writer", *asked, seed, folded=True) for seed in range(20)]


def test_server_refuses_everything_else():
    persona, task = world.persona_text(world.draw_persona(random.Random(0)), random.Random(0)), "Sort out a bold trip."
    system, user = PROMPTS["gold_system"], PROMPTS["gold_user"].format(persona=persona, task=task)
    assert ask("oracle", system, user)
    for model, *texts, reason in [
            ("judge", system, user, "does not play this role"), ("oracle", "You are kind.", user, "no role"),
            ("oracle", system, user.replace("concise", "short"), "not the prompt"),
            ("oracle", system, user.replace(task, "What is love?"), "no task of this world"),
            ("oracle", system, user.replace(persona, "A cat."), "no persona of this world")]:
        with pytest.raises(server.Refused, match=reason):
            ask(model, *texts)
    with pytest.raises(server.Refused, match="messages"):
        server.reply({"model": "oracle"})


def answers(manner, history, persona, seeds):
    user = PROMPTS["roleplayer_user"].format(persona=world.persona_text(persona, random.Random(0)),
                                             task="I am looking for a classic trip.", conversation=history)
    return [ask(f"roleplayer{manner}", PROMPTS["roleplayer_system"], user, seed) for seed in range(seeds)]


def test_the_manners_of_the_users():
    persona, asked = world.draw_persona(random.Random(1)), "AI Assistant: What is your pet?"
    plain = {form.format("pet", persona["pet"]) for form in world.ANSWERS}
    assert set(answers("", asked, persona, 40)) == plain
    assert set(answers("-terse", asked, persona, 40)) == {f"{persona['pet']}."}
    evasive = Counter(answers("-evasive", asked, persona, 400))
    assert set(evasive) == plain | {world.EVASIVE} and 70 < evasive[world.EVASIVE] < 130        # 100 +- 3 x 8.7
    chatty = answers("-chatty", asked, persona, 40)
    for facts in map(world.facts_in, chatty):
        assert len(facts) == 3 and ("pet", persona["pet"]) in facts
        assert all(persona[slot] == value for slot, value in facts)
    assert len(set(chatty)) > 20
    wrong = [said for said in answers("-erring", asked, persona, 1000) if said not in plain]
    assert 70 < len(wrong) < 130                                                                # 100 +- 3 x 9.5
    assert all(slot == "pet" and value != persona["pet"] for said in wrong for slot, value in world.facts_in(said))
    again = f"{asked}\nYou: {wrong[0]}\nAI Assistant: May I ask about your pet?"
    assert set(answers("-erring", again, persona, 300)) == plain, "asked again, it is corrected"
    other = f"AI Assistant: What is your job?\nYou: My job is {persona['job']}.\n{asked}"
    assert len(set(answers("-erring", other, persona, 300))) > 2, "another question before is none of the same"
    for model in server.USERS:
        assert set(answers(model.removeprefix("roleplayer"), "AI Assistant: Why?", persona, 20)) == {world.UNSURE}


def turn(slot, answer):
    return [{"role": "assistant", "content": f"What is your {slot}?"}, {"role": "user", "content": answer}]


def test_measure_by_hand(tmp_path):
    talk = {("p0", 0): turn("diet", "My diet is vegan.") + turn("pet", "dog.") + turn("diet", "vegan."),
            ("p0", 1): turn("budget", "I would rather not say."), ("p1", 0): turn("city", "My city is Oslo.")}
    # relevant: 1/3 (diet counts once) and 1, so p0 has 2/3, p1 has 0; covered: 1 of 2 and 0 of 1, so p0 has 1/4
    answered = {("p0", 0): "It suits you as your diet is vegan. Your pet is dog. Oslo, Oslo and jazz!",     # Oslo, jazz
                ("p1", 0): "What is your diet?"}
    rows = {"tasks": [{"task_id": "t0", "split": "dev", "task": "Help me plan a bold dinner."}],    # diet, budget
            "personas": [{"persona_id": p, "split": "dev", "name": "Anna",
                          "persona": f"I'm Anna. My diet is vegan. My city is {city}."}
                         for p, city in (("p0", "Rome"), ("p1", "Oslo"))],
            "conversations": [{"task_id": "t0", "persona_id": p, "sample": s, "conversation": c}
                              for (p, s), c in talk.items()],
            "responses": [{"task_id": "t0", "persona_id": p, "sample": s, "turns": 1, "response": r}
                          for (p, s), r in answered.items()]}
    flags = [part for name, of in rows.items() for part in (f"--{name}", write_rows(tmp_path / name, of))]
    flags = ["--iteration", 1, "--split", "dev", *flags, "--results", tmp_path / "results"]
    assert "Give a name" in run_stage("toy/measure.py", *flags, status=2)[1] and not (tmp_path / "results").exists()
    (tmp_path / "conversations.settings.json").write_text('{"roleplayer": "roleplayer (0123456789ab)"}')
    for _ in range(2):                                          # a rerun replaces its rows
        run_stage("toy/measure.py", *flags)
    found = read_lines(tmp_path / "results")
    assert {row["metric"]: row["mean"] for row in found} == {
        "relevant_share": pytest.approx(1 / 3), "coverage": 0.125, "question_share": 0.5, "used_facts": 0.5,
        "invented_facts": 1.0}
    for row in found:
        assert (row["title"], row["roleplayer"], row["n"]) == (measure.TITLES[row["metric"]], "roleplayer", 2)
        assert row["sem"] is row["interval_95"] is None, "one task: nothing to cluster by"
    assert len(found) == 5 and measure.invented_facts("Your pet is dog.", [], "Help me plan a bold dinner.") == 1


def test_coverage_and_asking_again_and_what_remains_of_a_win_by_hand():
    """A wrong fact is none; those that nobody asked for count. Of .75 above one half .625 leave a half."""
    task, persona = "Help me plan a bold dinner.", "I'm Anna. My diet is vegan. My budget is tiny. My pet is dog."
    for told, share in (("My diet is vegan.", 1), ("My diet is keto.", 0), ("My diet is vegan. My budget is tiny.", 2),
                        ("My pet is dog.", 0)):
        assert measure.coverage(turn("diet", told), task, persona) == share
    asked = turn("pet", "No.") + turn("pet", "dog.") + turn("job and pet", "dog.")
    assert manners.asks_again(asked) == 0.5


def test_permuted_golds_belong_to_somebody_else(tmp_path):
    golds = {(f"t{t}", f"p{p}"): f"g{t}{p}" for t in range(20) for p in range(4)}
    dealt = permute.permuted(golds, 1)
    assert set(dealt) == set(golds) and sorted(dealt.values()) == sorted(golds.values()), "each gold is dealt once"
    assert all(gold != golds[pair] and gold[:-1] == golds[pair][:-1] for pair, gold in dealt.items())
    assert len({tuple(dealt[f"t{t}", f"p{p}"][-1] for p in range(4)) for t in range(20)}) == 3, "by all rotations"
    refused = permute.permuted({("t", "p0"): "a", ("t", "p1"): None, ("t", "p2"): "c"}, 1)
    assert refused == {("t", "p0"): "c", ("t", "p1"): None, ("t", "p2"): "a"}, "a refused gold is dealt to nobody"
    golds["t99", "p0"] = "Alone, Zoë."
    write_rows(tmp_path / "g", [{"task_id": t, "persona_id": p, "gold": gold} for (t, p), gold in golds.items()])
    run_stage("toy/permute.py", "--gold", tmp_path / "g", "--output", tmp_path / "p")
    assert common.read_gold(tmp_path / "p") == permute.permuted(golds, 42), "the file is read as golds"


def test_an_oracle_that_errs_has_some_sentences_of_another_user():
    ours, theirs = (" ".join(f"My {what} is {who}." for what in range(1000)) for who in ("a", "b"))
    mixed = permute.mixed(ours, theirs, 0.3, random.Random(1))
    assert mixed.count("a.") + mixed.count("b.") == 1000 and 250 < mixed.count("b.") < 350
    assert [permute.mixed(ours, theirs, share, random.Random(1)) for share in (0, 1)] == [ours, theirs]


HOLDS = {  # results of two iterations in which all findings hold
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
    HOLDS[control, 1] = {"relevant_share": 0.7, "win_rate": 0.5}
    HOLDS[control, 2] = {"relevant_share": 0.45, "win_rate": 0.5, "gold_log_prob_gain q_experimental": 1.0,
                         "gold_log_prob_gain q_random": 0.5}


def results_of(*changed, half=0.07):
    """Rows of results.jsonl. changed: "VARIANT t METRIC [CONDITION] = MEAN"; half: of a 95 % interval"""
    means, rows = dict(change.split(" = ") for change in changed), []
    for (variant, t), metrics in HOLDS.items():
        for name, mean in metrics.items():
            mean, (metric, _, condition) = float(means.get(f"{variant} {t} {name}", mean)), name.partition(" ")
            rows.append({"variant": variant, "iteration": t, "metric": metric, "condition": condition, "split": "test",
                         "roleplayer": "roleplayer", "n": 192, "mean": mean, "sem": 0.1,
                         "interval_95": [mean - half, mean + half]})
    return rows


def failing(rows):
    return [i for i, (_, holds, _) in enumerate(check.findings(rows)) if not holds]


@pytest.mark.parametrize("fails, changed", [
    ([0, 6, 7], ["main 2 gold_log_prob_gain q_experimental = 0.29"]),           # .29 < 3 x .1; and without main's gain
    ([1, 6, 7], ["main 2 relevant_share = 0.59"]),                              # there is nothing to compare 6, 7 with
    ([1, 6, 7], ["main 2 relevant_share = 0.38", *(                             # controls that did worse prove nothing
        f"{control} 2 relevant_share = 0.2" for control in ("random", "permuted"))]),
    ([2], ["main 1 gold_log_prob q_random = -10.9"]), ([2], ["main 0 gold_log_prob positive_control = -9.5"]),
    ([3], ["main 2 win_rate = 0.59", "main 1 win_rate = 0.599"]),
    ([], ["main 1 win_rate = 0.71", "main 2 win_rate = 0.55"]),                 # the best t counts
    ([4], ["no_reg 1 question_share = 0.5"]), ([4], ["no_reg 2 win_rate = 0.35"]),
    ([5], ["gold 1 invented_facts = 0.1"]), ([5, 11], ["gold 2 win_rate = 0.7"]),
    ([6], ["random 2 relevant_share = 0.51"]), ([7], ["permuted 2 gold_log_prob_gain q_random = -0.51"]),
    ([8], ["main 2 gold_log_prob q_random = -21.5"]), ([9], ["no_reg 1 gold_log_prob q_experimental = -10.9"]),
    ([10], ["gold 2 gold_log_prob q_experimental = -9.1"]), ([11], ["gold 2 win_rate = 0.5"]),
    ([12], ["base_answers 2 win_rate = 0.6"])])
def test_each_finding_fails_when_its_figures_do(fails, changed):
    assert failing(results_of()) == [] and len(check.findings(results_of())) == 13
    assert failing(results_of(half=0.21)) == [3], ".7 - .21 < .5"
    assert failing(results_of(*changed)) == fails


def test_what_was_not_run_and_what_was_interrupted_is_left_out():
    whole = results_of()
    main = [row for row in whole if row["variant"] == "main"]
    other = [{**row, "roleplayer": "roleplayer-terse", "mean": -99.0} for row in whole]
    assert [holds for _, holds, _ in check.findings(main + other)] == [True] * 5, "one roleplayer is read"
    assert check.findings([]) == check.findings(other) == []
    for row in whole:                                              # whatever is missing, there is no traceback
        check.findings([other for other in whole if other is not row])
    part = [row for row in whole if row["variant"] != "no_reg" or row["iteration"] < 2]
    assert [i for i, (_, holds, _) in enumerate(check.findings(part)) if holds is None] == [4, 9]


def test_two_runs_are_checked(tmp_path):
    for run, win in ((tmp_path / "1", 0.62), (tmp_path / "2", 0.68)):
        (run / "main/1/test").mkdir(parents=True)
        write_rows(run / "main/1/test/verdicts.jsonl", [])
        (run / "main/2/test").mkdir(parents=True)               # an evaluation that was interrupted
        write_rows(run / "results.jsonl", results_of(f"main 1 win_rate = {win}"))
    out, _ = run_stage("toy/check.py", tmp_path / "1", tmp_path / "2", "--output", tmp_path / "check.txt")
    assert out.count("Does it hold in") == 2 and "NO " not in out
    assert out.strip() == (tmp_path / "check.txt").read_text().strip()
    (tmp_path / "1/results.jsonl").write_text("")
    assert "no results of an iteration" in run_stage("toy/check.py", tmp_path / "1", status=2)[1]


def test_base_is_small_and_copies_and_answers():
    """(tests/test_smoke.py measures what it asks.)"""
    base = str(ROOT / "toy/base")
    model, tokenizer = common.load_model(base, "float32"), common.load_tokenizer(base)
    assert model.num_parameters() < 1_000_000 and model.config.model_type == "mistral"
    found = pretrain.abilities(model, tokenizer, ("copy_8", "answers"))
    assert len(found) == 3 and all(value >= pretrain.FLOORS[ability] for ability, value in found.items()), found
