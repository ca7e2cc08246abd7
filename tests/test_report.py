"""report.py on a run made by hand: every number by hand or by another library, the page by a strict HTML parser."""
import json
import re
import shutil
import sys
from functools import partial

import html5lib
import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as scipy_stats
from statsmodels.stats.inter_rater import cohens_kappa

import common
import evaluate
from conftest import read_lines, run_stage, write_rows
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
               orders=("ours_first",), who=None, **settings):
    """What simulate.py and evaluate.py would write."""
    (run / where / "test").mkdir(parents=True)
    write_rows(run / where / "test.jsonl", [
        {**ids(pair), "sample": sample, "split": "test", "conversation": talks(pair),
         **({"roleplayer": who(pair)} if who else {})} for pair in PAIRS for sample in (0, 1)])
    settings = {"split": "test", "iteration": t, "variant": "main", "roleplayer": "user", "judge": "openai:judge",
                "base": "b (0)", "conversations": common.fingerprint(str(run / where / "test.jsonl")), **settings}
    conditions = [("q_experimental", 0, -0.5), ("q_experimental", 1, 0.5), ("q_random", 0, -1.5), ("q_random", 1, -0.5)]
    log_probs = [{**ids(pair), "sample": sample, "condition": condition, "log_prob": nats(pair) + more}
                 for pair in PAIRS for condition, sample, more in conditions]
    log_probs += [{**row, "condition": "negative_control", "log_prob": -20.0} for row in log_probs[::4] if t == 0]
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
    assert (base["model"], main["model"], base["gain"], base["win rate"]) == ("Q_BASE", "main, t=1", "", "")
    assert number(base["log p(gold)"]) == -12.5 and main["n"] == "6, 5; 1"
    assert main["for this user alone"] == "1.00 (1.00 to 1.00)" and main["win rate"].startswith("0.60 (")
    # The interval by hand: clusters of tasks and of personas, t with 1 degree of freedom.
    gains, mean = np.array([*GAINS.values()]).reshape(2, 3), 8 / 6
    by = [len(s) / (len(s) - 1) * (s ** 2).sum() / 36 for s in
          ((gains - mean).sum(1), (gains - mean).sum(0), (gains - mean).ravel())]
    half = scipy_stats.t.ppf(0.975, 1) * max(by[0] + by[1] - by[2], by[2]) ** 0.5
    assert main["gain"] == f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})"
    base, main = report.answers(evaluations(folder))
    assert number(base["words"]) == 3.0 and base["more than Q_BASE"] == "" and main["with a question"][:4] == "0.00"
    assert (number(main["words"]), number(main["more than Q_BASE"])) == (round((5 * 7 + 3) / 6, 1), round(20 / 6, 1))
    shutil.rmtree(folder / "base")
    assert list(report.summary(evaluations(folder)))[0]["gain"] == "-", "nothing to compare with"


def test_each_of_several_users_follows_all_together(folder):
    evaluation(folder, "mixed/base", 0, roleplayer="anna + m")
    evaluation(folder, "mixed/1", 1, lambda pair: BASE_NATS[pair] + GAINS[pair], roleplayer="anna + m",
               verdict=VERDICTS.get, who=lambda pair: "anna" if pair[0] == "t0" else "m")
    rows = {row["user"]: row for row in report.summary(evaluations(folder)) if row["model"] == "main, t=1"}
    assert list(rows) == ["user", "anna + m", "anna", "m"] and rows["anna + m"]["n"] == "6, 5; 1"
    for user, own in (("anna", PAIRS[:3]), ("m", PAIRS[3:])):
        won = [VERDICTS[pair] == "ours" for pair in own if VERDICTS[pair]]
        assert number(rows[user]["gain"]) == near(sum(GAINS[pair] for pair in own) / 3)
        assert number(rows[user]["win rate"]) == near(sum(won) / len(won)) and rows[user]["n"] == f"3, {len(won)}"


def test_paired_differences_with_the_first_user(folder):
    """The user of training is the first one, whatever the names."""
    evaluation(folder, "no_reg/1", 1, lambda pair: BASE_NATS[pair] + 1, verdict=lambda pair: "base", variant="no_reg")
    evaluation(folder, "main/2", 2, lambda pair: BASE_NATS[pair] + 5)
    evaluation(folder, "other/another/base", 0, lambda pair: -99.0, roleplayer="another")
    evaluation(folder, "other/another/1", 1, lambda pair: -90.0, roleplayer="another", verdict=VERDICTS.get)
    rows = {(row["difference"], row["of"]): row for row in report.differences(evaluations(folder))}
    means = {key: number(row["mean"]) for key, row in rows.items()}
    assert means["main, t=1 - no_reg, t=1", "log p(gold)"] == near(8 / 6 - 1)
    assert means["main, t=1 - no_reg, t=1", "win rate"] == 0.6
    assert rows["main, t=1 - no_reg, t=1", "win rate"]["n"] == "5", "an unreadable verdict's pair is left out"
    assert means["main, t=2 - main, t=1", "log p(gold)"] == near(5 - 8 / 6)
    assert means["main, t=1 - Q_BASE", "log p(gold)"] == near(8 / 6)
    assert means["main, t=1 - Q_BASE", "for this user alone"] == 0.0
    assert ("main, t=1 - main, t=1", "log p(gold)") not in rows
    shutil.rmtree(folder / "other/another/base")                # Q_BASE has not met this one: nothing to compare
    last = list(report.summary(evaluations(folder)))[-1]
    assert (last["user"], last["gain"]) == ("another", "-")


def test_win_rates_by_length_order_and_ties(folder):
    row, = report.win_rates(evaluations(folder))
    assert number(row["1 question"]) == near(2 / 3) and number(row["2 questions"]) == 0.5
    assert (row["at A"][:4], row["at B"], row["won, tied, lost"], row["unreadable"]) == ("0.60", "-", "3, 0, 2", "1")
    shutil.rmtree(folder / "main")
    evaluation(folder, "main/1", 1, verdict=lambda pair: "ours", orders=evaluate.ORDERS)
    path = folder / "main/1/test/verdicts.jsonl"
    rows = read_lines(path)
    rows[1]["verdict"] = "base"                                 # the second order of the first pair: a tie
    write_rows(path, rows)
    row, = report.win_rates(evaluations(folder))
    assert row["won, tied, lost"] == "5, 1, 0" and row["at A"][:4] == "1.00" and number(row["at B"]) == near(5 / 6)
    assert PAIRS[0] in [pair for why, pair in report.examples(evaluations(folder)[1]).items() if "contradicts" in why]


def test_questions_and_simulated_users(folder):
    shutil.rmtree(folder / "main")
    talks = {"p0": talk("Your job?", "I’d recommend that you ask me, no?", "Your job?", "I’d advise my own, no?"),
             "p1": talk("Your job?", "Tea & cake a lot."), "p2": talk("Where do you live?", "You should buy our own.")}
    evaluation(folder, "main/1", 1, talks=lambda pair: talks[pair[1]])
    row = list(report.questions(evaluations(folder)))[1]
    expected = {"repeated": 0.5 / 3,                            # half of p0's, none of the others'
                "distinct-1": (2 / 8 + 2 / 4 + 4 / 8) / 3,      # two samples of each
                "distinct-2": (1 / 4 + 1 / 2 + 3 / 6) / 3, "asked of others": 2 / 3}
    assert {name: number(row[name]) for name in expected} == {name: near(x) for name, x in expected.items()}
    assert row["model"] == "main, t=1" and row["n"] == "6" and number(row["words"]) == round((2 + 2 + 4) / 3, 1)
    row = list(report.simulated_users(evaluations(folder), common.read_personas(folder / "personas.jsonl")))[1]
    # "I'm p1. I like tea & cake a lot." has 7 words past the first: 6 trigrams, of which "tea cake a", "cake a lot"
    expected = {"asks back": 1 / 3, "advises": 0.5, "not in the first person": 1 / 3, "persona told": 2 / 6 / 3}
    assert {name: number(row[name]) for name in expected} == {name: near(x) for name, x in expected.items()}


def test_gain_a_turn_of_shortened_conversations(folder):
    same = common.fingerprint(str(folder / "main/1/test.jsonl"))
    evaluation(folder, "cut/1", 1, lambda pair: -16.0, variant="cut", turns=1, conversations=same)
    evaluation(folder, "another/a/base", 0, lambda pair: -99.0, roleplayer="another")
    row, = report.gain_a_turn(evaluations(folder))
    assert [number(row[k]) for k in "012"] == [-20.0, -16.0, near(-12.5 + 8 / 6)]
    assert row["n"] == "6" and row["model"] == "main, t=1"


def test_the_papers_table():
    key = {"variant": "main", "iteration": 1, "roleplayer": "u", "condition": "", "mean": 0.6, "n": 9, "sem": 0.0512}
    mine, nats, wins = stats.tables([
        {**key, "variant": "no_reg", "metric": "win_rate", "mean": 0.2, "sem": None, "n": 8},
        {**key, "metric": "win_rate", "interval_95": [0.5, 0.7]}, {**key, "metric": "mine", "mean": None},
        *({**key, "metric": "gold_log_prob", "condition": name} for name in ("q_random", "q_experimental"))])
    assert stats.as_text(mine) == ["", "mine; n = 9", "                 t=1", "main               -"]
    main = ["  main", "0.60 ± 0.05"]
    assert nats.rows == [["Q-Experimental", ""], main, ["Q-Random", ""], main]
    assert wins.rows == [["main", "0.600 ± 0.051 (0.50 to 0.70)"], ["no_reg", "0.200"]]
    assert wins.title.endswith("95 % interval); n = 8 to 9")


def test_power_before_a_run(run):
    rows, t = list(stats.power(300, 10)), scipy_stats.t.ppf([0.975, 0.8], 9).sum()
    assert rows[0]["smallest"] == f"{0.5 + t * 0.5 / 300 ** 0.5:.3f}"
    assert rows[3]["smallest"] == f"{0.5 + t * 0.5 * ((1 + 29 * 0.1) / 300) ** 0.5:.3f}" and rows[3]["r"] == "0.1"
    assert list(stats.power(2, 2))[0]["smallest"] == "none"
    assert rows[3]["smallest"] in run_stage("report/report.py", "--power", 300, 10)[0]
    assert "at least two personas" in run(report, "--power", 10, 300, status=2)[1]
    values = {(i, j): (i - j) ** 2 + i for i in range(10) for j in range(10)}
    assert stats.smallest_difference(values) == pytest.approx(t * evaluate.clustered_sem(values))


def test_length_controlled_win_rate_against_statsmodels():
    rng = np.random.default_rng(1)
    longer = rng.normal(3, 10, 200)
    points = np.where(rng.random(200) < 0.1, 0.5, rng.random(200) < 1 / (1 + np.exp(-0.5 - longer / 10)))
    fit = sm.GLM(points, sm.add_constant(longer / longer.std()), family=sm.families.Binomial()).fit()
    mine = stats.length_controlled(list(zip(points, longer)))
    assert mine == pytest.approx(fit.params[0], abs=1e-4), "the ridge changes little"
    assert stats.share_of([mine, None]) == [pytest.approx(fit.predict([[1, 0]])[0], abs=1e-4), None]
    # The longer answer always wins: among the equal ones 6 of 10 do.
    longest_wins = stats.length_controlled([(1, 0)] * 6 + [(0, 0)] * 4 + [(1, 5)] * 3)
    assert stats.share_of(longest_wins) == pytest.approx(0.6, abs=0.01)
    for nothing in ([(1, 2), (0, 2), (1, 2)], [], [(1, 2), (1, 1), (1, 3)]):    # all of one length; none; all won
        assert stats.length_controlled(nothing) is None


def test_kappa_against_statsmodels(folder):
    rng = np.random.default_rng(2)
    first = rng.choice([0.0, 0.5, 1.0], 100)
    second = np.where(rng.random(100) < 0.7, first, rng.choice([0.0, 0.5, 1.0], 100))
    counts = np.zeros((3, 3))
    np.add.at(counts, ((2 * first).astype(int), (2 * second).astype(int)), 1)
    assert stats.kappa(list(zip(first, second))) == pytest.approx(cohens_kappa(counts).kappa)
    assert stats.kappa([(1.0, 1.0)]) is None and stats.kappa([]) is None
    # A second judge of the same conversations and answers, who decides the first pair otherwise.
    evaluation(folder, "second/1", 1, variant="second", judge="openai:other",
               response=lambda pair: "Tea it is." if pair == PAIRS[1] else "Tea and cake it is, for you.",
               verdict={**VERDICTS, PAIRS[0]: "base"}.get)
    row, = report.judges(evaluations(folder))
    assert [row["judges"], row["n"]] == ["openai:judge, openai:other", "5"]
    assert [number(row[name]) for name in ("first", "second", "kappa")] == [
        0.6, 0.4, near((0.8 - (0.6 * 0.4 + 0.4 * 0.6)) / (1 - 0.48))]


def test_jackknife_of_a_mean_is_the_means_interval():
    values = {(i, j): x for (i, j), x in np.ndenumerate(np.random.default_rng(3).normal(size=(5, 7)))}
    estimate, interval = stats.jackknife(lambda xs: sum(xs) / len(xs), values)
    assert estimate == pytest.approx(np.mean([*values.values()]))
    assert interval == pytest.approx(evaluate.interval_95(values))
    assert stats.jackknife(lambda xs: None, values) == (None, None)


def test_conversations_are_chosen_by_rule(folder):
    main = evaluations(folder)[1]
    assert {why.split(" (")[0]: pair for why, pair in report.examples(main).items()} == {
        "the best gain": PAIRS[3], "the median": PAIRS[5], "the worst": PAIRS[2], "a tie: the same answer": PAIRS[1]}
    shown = report.side(main, PAIRS[3])
    assert (shown["nats"], shown["sample"], shown["talk"]) == ({0: -7.5, 1: -6.5}, 1, main.talks[*PAIRS[3], 1])


def test_the_page(folder, run, monkeypatch):
    (folder / "notes.txt").write_text("yes  1 < 2\n")
    (folder / "main/1/model").mkdir()
    write_rows(folder / "main/1/model/log.jsonl", [{"step": i, "loss": 2.0 - i} for i in (1, 2)])
    assert pictures.training_curves(folder) == {"main": {1: [1.0, 0.0]}}
    out, _ = run(report, folder, "--notes", folder / "notes.txt", "--published")
    page, text = ((folder / "report" / name).read_text() for name in ("index.html", "report.md"))
    html5lib.HTMLParser(strict=True).parse(page)                # raises at the first error
    sources = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"' >)]{0,20})", page)
    assert sources and all(source.startswith("data:") for source in sources) and "<script" not in page
    assert "\x1b" not in page + text
    for words in ("1 &lt; 2", "Plan &lt;t0&gt;", "tea &amp; cake", "<strong>main</strong>: the method", "user: user."):
        assert words in page, words
    for words in ("Paired differences", "main, t=1 - Q_BASE", "the best gain (+4.00 nats)", "-7.50", "-6.50*",
                  "by 1.33 (", "in 0.60 ("):
        assert words in page and words in text, words
    assert "Plan &lt;t0&gt; \\| soon" in text and "yes  1 < 2" in text
    drawn = {path.name for path in (folder / "report").iterdir()} - {"index.html", "report.md"}
    names = ("win_rates", "log_probs", "variants", "training")
    assert drawn == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert page.count("data:image/svg+xml") == 4 and "4 pictures" in out
    run(report, folder, "--notes", folder / "notes.txt", "--published")
    assert (folder / "report/index.html").read_text() == page, "the same run gives the same page"
    monkeypatch.setitem(sys.modules, "report.pictures", None)   # without matplotlib it has the rest
    assert "report/requirements.txt" in run(report, folder)[0]
    page = (folder / "report/index.html").read_text()
    assert "<img" not in page and "Paired differences" in page


def test_what_is_drawn_is_what_was_measured(folder):
    rows = evaluate.read_results(folder / "results.jsonl")
    rows.append({**rows[0], "variant": "no_reg", "iteration": 1, "mean": -11.0, "interval_95": None})
    rows.append({**rows[0], "variant": "none", "iteration": 1, "mean": None, "sem": None})      # nothing was readable
    lines = pictures.lines_of(rows, "variants", "user")
    assert {line: [row["mean"] for row in of] for line, of in lines.items()} == {
        "main": [-12.5, -11.5], "no_reg": [-12.5, -11.0]}
    assert [row["mean"] for row in pictures.lines_of(rows, "win_rates", "user")["main"]] == [0.5, 0.6]
    assert pictures.lines_of(rows, "users", "user") == {}, "there is one user"
    gains = [{**rows[0], "metric": "gold_log_prob_gain", "iteration": 1, "condition": condition, "mean": mean}
             for condition, mean in (("q_experimental", 1.0), ("q_random", -0.5))]
    assert {line: [row["mean"] for row in of] for line, of in pictures.lines_of(gains, "gains", "user").items()} == {
        "main": [0, 1.0], "main, another user's": [0, -0.5]}, "from 0"
    figure, axes = pictures.pyplot.subplots()
    pictures.panel(axes, lines, dict(zip(lines, pictures.STYLES)))
    main, no_reg = (container.lines for container in axes.containers)
    assert [list(line[0].get_xdata()) for line in (main, no_reg)] == [[0, 1], [0.03, 1.03]]
    assert list(main[0].get_ydata()) == [-12.5, -11.5]
    assert [tuple(segment[:, 1]) for segment in main[2][0].get_segments()] == [(-14, -11), (-14, -11)]
    assert tuple(no_reg[2][0].get_segments()[1][:, 1]) == (-11.5, -10.5), "without an interval: the standard error"
    pictures.pyplot.close(figure)


@pytest.mark.parametrize("spoil, says", [
    (lambda run: (run / "results.jsonl").unlink(), "no results on split test"),
    (lambda run: [path.unlink() for path in run.rglob("test.jsonl")], "which is not in"),
    (lambda run: [path.unlink() for path in run.rglob("*.settings.json")], "no evaluation of split test"),
    (lambda run: (run / "tasks.jsonl").write_text("{}\n"), "tasks.jsonl, line 1"),
    (lambda run: (run / "personas.jsonl").unlink(), "personas.jsonl")])
def test_what_is_missing_is_said_in_one_line(folder, run, spoil, says):
    spoil(folder)
    _, error = run(report, folder, status=2)
    assert says in error and error.count("\n") == 1 and not (folder / "report/index.html").exists()
