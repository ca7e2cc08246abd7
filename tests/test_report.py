"""report.py on a run made by hand: every number by hand or by another library, the page by a strict HTML parser."""
import json
import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import html5lib
import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as scipy_stats
from statsmodels.stats.inter_rater import cohens_kappa

import common
import evaluate
from conftest import read_lines, write_rows
from report import pictures, report, stats

TASKS, PEOPLE = ("t0", "t1"), ("p0", "p1", "p2")
PAIRS = [(t, p) for t in TASKS for p in PEOPLE]
BASE_NATS = dict(zip(PAIRS, (-10.0, -12.0, -14.0, -11.0, -13.0, -15.0)))
GAINS = dict(zip(PAIRS, (3.0, 1.0, -2.0, 4.0, 0.0, 2.0)))
VERDICTS = dict(zip(PAIRS, ("ours", "ours", "base", "ours", None, "base")))
near = partial(pytest.approx, abs=0.005)                        # two digits are shown


def talk(*texts):
    return [{"role": role, "content": text} for text, role in zip(texts, ("assistant", "user") * 9)]


@pytest.fixture
def folder(tmp_path):
    """Q_BASE and main at t = 1 on 2 tasks x 3 people x 2 samples."""
    write_rows(tmp_path / "tasks.jsonl", [{"task_id": t, "split": "test", "task": f"Plan <{t}> | soon"} for t in TASKS])
    write_rows(tmp_path / "personas.jsonl", [
        {"persona_id": p, "split": "test", "name": p, "persona": f"I'm {p}. I like tea & cake a lot."} for p in PEOPLE])
    write_rows(tmp_path / "gold-test.jsonl", [{**ids(pair), "gold": "Tea."} for pair in PAIRS])
    evaluation(tmp_path, "base", 0, response=lambda pair: "Tea it is.")
    evaluation(tmp_path, "main/1", 1, lambda pair: BASE_NATS[pair] + GAINS[pair], verdict=VERDICTS.get,
               response=lambda pair: "Tea it is." if pair == PAIRS[1] else "Tea and cake it is, for you.")
    return tmp_path


def ids(pair):
    return {"task_id": pair[0], "persona_id": pair[1]}


def talk_of(pair):
    return talk("What do you like?", "I like tea & cake.", *("Where are you?", "At home.") * (pair[0] == "t1"))


def evaluation(run, where, t, nats=BASE_NATS.get, response=lambda pair: "x", verdict=None, talks=talk_of,
               orders=("ours_first",), more=lambda pair, sample: {}, **settings):
    """What simulate.py and evaluate.py would write."""
    (run / where / "test").mkdir(parents=True)
    write_rows(run / where / "test.jsonl", [
        {**ids(pair), "sample": sample, "split": "test", "conversation": talks(pair), **more(pair, sample)}
        for pair in PAIRS for sample in (0, 1)])
    settings = {"split": "test", "iteration": t, "variant": "main", "roleplayer": "user", "judge": "openai:judge",
                "base": "b (0)", "conversations": common.fingerprint(str(run / where / "test.jsonl")), **settings}
    conditions = [("q_experimental", 0, -0.5), ("q_experimental", 1, 0.5), ("q_random", 0, -1.5), ("q_random", 1, -0.5)]
    log_probs = [{**ids(pair), "sample": sample, "condition": condition, "log_prob": nats(pair) + more}
                 for pair in PAIRS for condition, sample, more in conditions]
    log_probs += [{**row, "condition": condition, "log_prob": x} for row in log_probs[::4] if t == 0
                  for condition, x in (("negative_control", -20.0), ("positive_control", -5.0))]
    answered = [{**ids(pair), "turns": len(talks(pair)) // 2} for pair in PAIRS]
    files = {"log_probs": log_probs,
             "responses": [{**row, "sample": 1, "response": response(pair)} for row, pair in zip(answered, PAIRS)],
             "verdicts": [{**row, "order": order, "verdict": verdict(pair), "raw": "<B> is \"better\" & \x1b[1m short.",
                           **({} if verdict(pair) else {"refused": "unreadable"})}
                          for row, pair in zip(answered, PAIRS) for order in orders if verdict]}
    for name, rows in files.items():
        write_rows(run / where / f"test/{name}.jsonl", rows)
        (run / where / f"test/{name}.jsonl.settings.json").write_text(json.dumps(settings))
    row = {**{name: settings[name] for name in ("variant", "iteration", "roleplayer", "split")}, "n": 6, "sem": 0.5}
    evaluate.write_results(run / "results.jsonl", [
        {**row, "metric": metric, "condition": condition, "mean": mean, "interval_95": interval}
        for metric, condition, mean, interval in (("gold_log_prob", "q_experimental", -12.5 + t, [-14.0, -11.0]),
                                                  ("win_rate", "", 0.6, [0.3, 0.8]))[:2 if verdict else 1]])


def evaluations(run):
    tasks, personas = common.read_tasks(run / "tasks.jsonl"), common.read_personas(run / "personas.jsonl")
    return report.read_evaluations(run, "test", tasks, personas)


def number(text):
    return float(text.split()[0])


def test_each_model_in_one_line(folder):
    base, main = report.summary(evaluations(folder))
    assert (base["model"], main["model"], base["gain"], base["win rate"]) == ("Q_BASE", "main, t=1", "", "-")
    assert number(base["log p(gold)"]) == -12.5 and [main[name] for name in ("pairs", "judged", "missing")] == [*"651"]
    assert main["beyond another's"] == "1.00 (1.00 to 1.00)" and main["win rate"].startswith("60.0 % (")
    assert [number(row["of the possible"]) for row in (base, main)] == [50, round(100 * (7.5 + 8 / 6) / 15, 1)]
    assert number(main["beyond none"]) == near(7.5 + 8 / 6)
    # The interval by hand: clusters of tasks and of personas, t with 1 degree of freedom.
    gains, mean = np.array([*GAINS.values()]).reshape(2, 3), 8 / 6
    by = [len(s) / (len(s) - 1) * (s ** 2).sum() / 36 for s in
          ((gains - mean).sum(1), (gains - mean).sum(0), (gains - mean).ravel())]
    half = scipy_stats.t.ppf(0.975, 1) * max(by[0] + by[1] - by[2], by[2]) ** 0.5
    assert main["gain"] == f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})"


def test_each_of_several_users_follows_all_together(folder):
    evaluation(folder, "mixed/base", 0, roleplayer="anna + m")
    evaluation(folder, "mixed/1", 1, lambda pair: BASE_NATS[pair] + GAINS[pair], roleplayer="anna + m",
               verdict=VERDICTS.get, more=lambda pair, _: {"roleplayer": "anna" if pair[0] == "t0" else "m"})
    rows = {row["model"]: row for row in report.summary(evaluations(folder))}
    name = "main, t=1 (anna + m)"
    assert list(rows) == ["Q_BASE", "main, t=1", "Q_BASE (anna + m)", name, f"{name}: anna", f"{name}: m"]
    for user, own in (("anna", PAIRS[:3]), ("m", PAIRS[3:])):
        won, row = [VERDICTS[pair] == "ours" for pair in own if VERDICTS[pair]], rows[f"{name}: {user}"]
        assert number(row["gain"]) == near(sum(GAINS[pair] for pair in own) / 3)
        assert number(row["win rate"]) == round(100 * sum(won) / len(won), 1) and row["pairs"] == "3"


@pytest.mark.parametrize("gain, verdict, words", [
    (4, "ours", ["is more probable", "4.00 (3.26 to 4.74)", "prefers its answers: it wins 100.0 %"]),
    (-4, "base", ["is less probable", "-4.00 (-4.74 to -3.26)", "prefers Q_BASE's answers: it wins 0.0 %"]),
    (0.1, "both", ["is not distinguishably more", "0.10 (-0.64 to 0.84)", "neither distinguishably: it wins 50.0 %"]),
    (4, None, ["No verdict is readable"]), (4, "", ["No judge was asked"]), (None, "", ["nothing is shown"]),
    (None, "ours", ["log-probabilities were not measured. The judge prefers its answers"])])
def test_the_words_of_the_headline_follow_the_intervals(gain, verdict, words):
    pairs = [(i, j) for i in range(6) for j in range(6)]
    nats = {} if gain is None else {pair: gain + (-1.0) ** sum(pair) * 1.7 for pair in pairs}
    said = {pair: [{"verdict": ("ours", "base")[sum(pair) % 2] if verdict == "both" else verdict}] for pair in pairs}
    e = SimpleNamespace(name="main, t=1", golds={"q_experimental": nats}, verdicts=said if verdict != "" else {},
                        base=SimpleNamespace(golds={"q_experimental": dict.fromkeys(pairs, 0.0)}))
    assert all(part in report.headline(e) for part in words)


def test_paired_differences_with_the_first_user(folder):
    """The user of training is the first one, whatever the names."""
    evaluation(folder, "no_reg/1", 1, lambda pair: BASE_NATS[pair] + 1, verdict=lambda pair: "base", variant="no_reg")
    evaluation(folder, "main/2", 2, lambda pair: BASE_NATS[pair] + 5)
    evaluation(folder, "other/another/base", 0, lambda pair: -99.0, roleplayer="another")
    evaluation(folder, "other/another/1", 1, lambda pair: -90.0, roleplayer="another", verdict=VERDICTS.get)
    row, = report.planned(evaluations(folder))
    assert (row["main minus"], number(row["log p(gold)"])) == ("no_reg, t=1", near(8 / 6 - 1))
    assert number(row["win rate"]) == 60 and row["pairs"] == "6" and row["beyond another's"].startswith("0.00")
    shutil.rmtree(folder / "other/another/base")                # Q_BASE has not met this one: nothing to compare
    last = list(report.summary(evaluations(folder)))[-1]
    assert (last["model"], last["gain"]) == ("main, t=1 (another)", "-")


def test_verdicts_by_length_place_and_second_judge(folder, run):
    second = VERDICTS | {PAIRS[0]: "base"}                      # decides the first pair otherwise
    evaluation(folder, "second/1", 1, variant="second", judge="openai:other", verdict=second.get,
               response=lambda pair: "Tea it is." if pair == PAIRS[1] else "Tea and cake it is, for you.")
    base, main, other = evaluations(folder)
    assert list(report.verdicts([base], {}))[0]["won"] == ""
    row, = report.verdicts([main], {"main, t=1": [other]})
    assert number(row["after 1"]) == 66.7 and number(row["after 2"]) == 50 and row["B minus A"] == "-"
    assert [row[name] for name in ("won", "tied", "lost", "unreadable")] == [*"3021"]
    assert [number(row[name]) for name in ("other", "agreement", "kappa")] == [40, 80, near((.8 - .48) / .52)]
    run(report, folder)
    page = (folder / "report/index.html").read_text()
    assert '<th scope="col">other</th>' in page and "second, t=1" not in page, "a judge is no variant"
    assert (number(row["words"]), number(row["more than Q_BASE"])) == (round((5 * 7 + 3) / 6, 1), round(20 / 6, 1))
    shutil.rmtree(folder / "main")
    evaluation(folder, "main/1", 1, verdict=lambda pair: "ours", orders=evaluate.ORDERS,
               response=lambda pair: "甜的？")
    path = folder / "main/1/test/verdicts.jsonl"
    rows = read_lines(path)
    rows[1]["verdict"] = "base"                                 # the second order of the first pair: a tie
    write_rows(path, rows)
    row, = report.verdicts([e for e in evaluations(folder) if e.name == "main, t=1"], {})
    assert [row[name] for name in ("won", "tied", "lost")] == [*"510"]
    assert number(row["B minus A"]) == round(-100 / 6, 1)
    assert row["words"].startswith("2.0") and row["with a question"].startswith("100.0 %"), "two characters"


def test_questions_and_simulated_users(folder):
    shutil.rmtree(folder / "main")
    talks = {"p0": talk("Your job?", "Tea, no?", "Your job?", "A job, no？"),
             "p1": talk("Your job?", "Tea & cake a lot."), "p2": talk("Where do you live?", "You should buy our own.")}
    evaluation(folder, "main/1", 1, talks=lambda pair: talks[pair[1]])
    marks = {(PAIRS[0], 0): {"cut": 1}, (PAIRS[0], 1): {"refused": "no"}, (PAIRS[1], 1): {"refused": "no"}}
    evaluation(folder, "no_reg/1", 1, variant="no_reg", more=lambda *key: marks.get(key, {}))
    _, row, marked = report.conversations(evaluations(folder), common.read_personas(folder / "personas.jsonl"))
    # "I'm p1. I like tea & cake a lot.": 8 words, "tea", "cake", "a", "lot" of them in the answer; of p0's 1, then 1.
    expected = {"repeated": 50 / 3, "asked of others": 200 / 3, "asks back": 100 / 3,
                "persona told": 100 * (1 / 8 + 4 / 8) / 3}
    assert {name: number(row[name]) for name in expected} == {name: round(x, 1) for name, x in expected.items()}
    assert row["model"] == "main, t=1" and row["conversations"] == "12" and number(row["words"]) == round(8 / 3, 1)
    assert (marked["conversations"], marked["cut"], marked["refused"]) == ("10", "1", "2")


def test_gain_a_turn_of_shortened_conversations(folder):
    same = common.fingerprint(str(folder / "main/1/test.jsonl"))
    evaluation(folder, "cut/1", 1, lambda pair: -16.0, variant="cut", turns=1, conversations=same)
    evaluation(folder, "another/a/base", 0, lambda pair: -99.0, roleplayer="another")
    row, = report.gain_a_turn(evaluations(folder))
    assert [number(row[k]) for k in "012"] == [-20.0, -16.0, near(-12.5 + 8 / 6)]
    assert row["pairs"] == "6" and row["model"] == "main, t=1"


def test_other_means_and_other_trainings():
    key = {"variant": "main", "iteration": 1, "roleplayer": "u", "condition": "", "metric": "win_rate"}
    rows = [{**key, "mean": 0.6, "interval_95": [0.5, 0.7]},
            {**key, "metric": "mine", "title": "Mine (share)", "mean": None},
            {**key, "metric": "gold_log_prob", "condition": "q_new", "mean": -3.0, "roleplayer": "v"}]
    assert list(report.measures({"a": rows}, "u")) == [
        {"model": "main, t=1", "a": "-", "of": "Mine (share)"},
        {"model": "main, t=1 (v)", "a": "-3.00", "of": "gold_log_prob q_new"}]
    runs = {name: [{**key, "mean": mean}] for name, mean in (("a", 0.6), ("b", 0.7), ("c", 0.8))}
    assert list(report.measures(runs, "u")) == [{
        "model": "main, t=1", "mean": "70.0 %", "between runs": "10.0 % (60.0 to 80.0)", "a": "60.0 %", "b": "70.0 %",
        "c": "80.0 %", "of": "win_rate"}]


def test_what_was_kept_and_held_out(folder):
    here = folder / "main/1"
    (here / "model").mkdir()
    write_rows(here / "selected.jsonl", [{**ids(PAIRS[0]), "sample": 0, "gold_log_prob": -5.0}])
    write_rows(here / "scores-gold.jsonl", [{**ids(PAIRS[0]), "log_prob": x} for x in (-5.0, -8.0, None)])
    write_rows(here / "model/log.jsonl", [{"held_out": 1.5}, {"loss": 2.0}, {"loss": 1.0}, {"held_out": 1.75}])
    for name, settings in (("selected.jsonl", {"gold": "g"}), ("scores-gold.jsonl", {"gold": "g"}), (
            "model", {"selected": common.fingerprint(str(here / "selected.jsonl"))})):
        (here / f"{name}.settings.json").write_text(json.dumps(settings))
    assert list(report.trainings(folder)) == [{
        "model": "main, t=1", "kept": "-5.00", "all": "-6.50", "held out": "1.500 to 1.750", "loss": "2.000 to 1.000",
        "steps": "2", "kept conversations": "1"}]


def test_power_before_a_run(run):
    rows, t = list(stats.power(300, 10)), scipy_stats.t.ppf([0.975, 0.8], 9).sum()
    assert rows[0]["smallest"] == f"{50 + t * 50 / 300 ** 0.5:.1f} %"
    assert rows[3]["smallest"] == f"{50 + t * 50 * ((1 + 29 * 0.1) / 300) ** 0.5:.1f} %" and rows[3]["r"] == "0.1"
    assert list(stats.power(2, 2))[0]["smallest"] == "none"
    assert rows[3]["smallest"] in run(report, "--power", 300, 10)[0]
    assert "at least two personas" in run(report, "--power", 10, 300, status=2)[1]


def influence(statistic, n):
    """The derivative of a weighted statistic by each weight, times n, from its own differences."""
    return [n * (statistic(1 + step) - statistic(1 - step)) / 2e-5 for step in 1e-5 * np.eye(n)]


def test_estimates_and_each_pairs_influence_against_numpy_and_statsmodels():
    rng, n = np.random.default_rng(2), 40
    x, y, points = rng.normal(3, 10, n), rng.normal(1, 1, n), rng.choice([0.0, 0.5, 1.0], n)
    second, pairs = np.where(rng.random(n) < 0.7, points, rng.choice([0.0, 0.5, 1.0], n)), [(i, i) for i in range(n)]

    def kappa(weights):
        counts = np.zeros((3, 3))
        np.add.at(counts, ((2 * points).astype(int), (2 * second).astype(int)), weights)
        return cohens_kappa(counts).kappa

    def of(values):
        return dict(zip(pairs, values.tolist()))

    for mine, statistic in (
            (stats.ratio(of(x), of(y)), lambda w: (w * x).sum() / (w * y).sum()),
            (stats.kappa(of(points), of(second)), kappa),
            (stats.length_controlled(of(points), of(x)),
             lambda w: sm.WLS(points, sm.add_constant(x), w).fit().params[0])):
        estimate = statistic(np.ones(n))
        assert np.mean([*mine.values()]) == pytest.approx(estimate)
        assert np.array([*mine.values()]) - estimate == pytest.approx(np.array(influence(statistic, n)), abs=1e-4)
    assert stats.kappa({0: 1}, {0: 1}) == stats.kappa({}, {}) == stats.ratio(of(x), of(-abs(y))) == {}
    for a, b in ((points, x - 100), (points, 0 * x), (0 * points, x)):  # 0 was not observed; one length; all lost
        assert stats.length_controlled(of(a), of(b)) == {}
    same = {pair: float(i > 0) for i, pair in enumerate(pairs)}
    assert stats.agreement(same, {**same, pairs[1]: 0.0})["kappa"].endswith("to 1.00)"), "no kappa above 1"


def test_conversations_are_chosen_by_the_gain_of_what_is_shown(folder):
    base, main = evaluations(folder)
    main.log_probs["q_experimental"][*PAIRS[2], 1] = 0.0        # the shown one; its other sample is the worst
    given = ({t: {"task": t} for t in TASKS}, {p: {"persona": p} for p in PEOPLE}, dict.fromkeys(PAIRS, "Tea."))
    found = report.examples(main, *given)
    assert [it["outcome"] for it in found] == ["+0.00 nats, no verdict", "+1.00 nats, won", "+2.00 nats, lost",
                                               "+3.00 nats, won", "+4.00 nats, won", "+13.50 nats, lost"]
    assert [it["why"] for it in found] == ["worst", "", "lost", "won", "", "best"], "each pair once"
    assert found[-1]["lines"][-2:] == [("answers", ["Tea it is.", "Tea and cake it is, for you."]),
                                       ("log p(gold)", ["-13.50", "0.00"])]
    assert "who read main, t=1 as A, preferred Q_BASE." in found[-1]["judge"][0]
    del main.responses[PAIRS[4]]
    assert len(report.examples(main, *given)) == 5, "what was not answered was not judged"
    main.responses, main.verdicts = {}, {}                      # without a judge: each pair's first conversation
    assert [it["why"] for it in report.examples(main, *given)] == ["worst", *4 * [""], "best"]


def test_the_page(folder, run, monkeypatch):
    (folder / "notes.txt").write_text("yes  1 < 2\n")
    out, _ = run(report, folder, "--notes", folder / "notes.txt")
    assert "main, t=1: 1 of 6 verdicts are missing or unreadable (16.7 %)." in out
    page = (folder / "report/index.html").read_text()
    html5lib.HTMLParser(strict=True).parse(page)                # raises at the first error
    sources = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"' >)]{0,20})", page)
    assert sources and all(source.startswith("data:") for source in sources) and "<script" not in page
    assert "\x1b" not in page
    for words in ("1 &lt; 2", "Plan &lt;t0&gt;", "tea &amp; cake", "best: +4.00 nats, won", ">openai:judge<",
                  'alt="Win rate against Q_BASE. At the end: main, user: 0.60"'):
        assert words in page, words
    assert {path.name for path in (folder / "report").iterdir()} == {"index.html", "gains.svg", "win_rates.svg"}
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    evaluation(other, "no_reg/1", 1, variant="no_reg")
    assert "between runs" in run(report, other, folder)[0]
    assert "between runs" in (other / "report/index.html").read_text()
    monkeypatch.setitem(sys.modules, "report.pictures", None)   # without matplotlib it has the rest
    assert "report/requirements.txt" in run(report, folder)[0]
    assert "<img" not in (folder / "report/index.html").read_text()


def test_what_is_drawn_is_what_was_measured(folder):
    evaluation(folder, "no_reg/1", 1, lambda pair: -16.0, variant="no_reg")
    rows = [{**evaluate.read_results(folder / "results.jsonl")[0], "variant": variant, "iteration": t, "mean": mean,
             "metric": "coverage", "interval_95": None} for variant, t, mean in (
                 ("main", 0, 0.1), ("main", 1, 0.2), ("no_reg", 1, 0.3))]
    drawn = {name: panels for name, (*_, panels) in report.pictures_of(evaluations(folder), rows).items()}
    own, other, none = drawn["gains"]["main"].values()
    assert own[0] == (0, 0, 0, 0) and own[1][:2] == (1, near(8 / 6)) and list(drawn["gains"]) == ["main", "no_reg"]
    assert [x[:2] for x in other] == [(0, -1.0), (1, near(8 / 6 - 1))], "Q-Random of Q_BASE stands at t=0"
    assert none == [(0, -7.5, *none[0][2:])] and drawn["win_rates"]["main"]["user"][1][:2] == (1, 0.6)
    assert [x[1] for x in drawn["coverage"]["no_reg"]["user"]] == [0.1, 0.3], "from Q_BASE's"
    figure, axes = pictures.pyplot.subplots()
    pictures.panel(axes, {"a": [(0, 1, 0, 3), (1, 2, 1.5, 4)]}, {"a": pictures.STYLES[0]}, "t={}")
    (line, _, (bars,)), = axes.containers
    assert list(line.get_ydata()) == [1, 2] and [tuple(bar[:, 1]) for bar in bars.get_segments()] == [(0, 3), (1.5, 4)]
    pictures.pyplot.close(figure)


@pytest.mark.parametrize("spoil, says", [
    (lambda run: (run / "results.jsonl").unlink(), "no results on split test"),
    (lambda run: [path.unlink() for path in run.rglob("test.jsonl")], "which is not in"),
    (lambda run: [path.unlink() for path in run.rglob("*.settings.json")], "no evaluation of split test"),
    (lambda run: [path.unlink() for path in run.rglob("verdicts.jsonl")], "verdicts.jsonl: No such file"),
    (lambda run: (run / "gold-test.jsonl").write_text(""), "no gold response for")])
def test_what_is_missing_is_said_in_one_line(folder, run, spoil, says):
    spoil(folder)
    _, error = run(report, folder, status=2)
    assert says in error and error.count("\n") == 1 and not (folder / "report/index.html").exists()
