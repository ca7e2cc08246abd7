"""report.py on a run made by hand: every number by hand or by another library, the page by a strict HTML parser."""
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import html5lib
import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.inter_rater import cohens_kappa

import common
import report
import results
import shorten
from conftest import ROOT, read_lines, write_rows

TASKS, PEOPLE = ("t0", "t1"), ("p0", "p1", "p2")
PAIRS = [(t, p) for t in TASKS for p in PEOPLE]
BASE_NATS = dict(zip(PAIRS, (-10.0, -12.0, -14.0, -11.0, -13.0, -15.0)))
GAINS = dict(zip(PAIRS, (3.0, 1.0, -2.0, 4.0, 0.0, 2.0)))
POINTS = dict(zip(PAIRS, ("ours", "ours", "base", "ours", None, "base")))


def talk(*texts):
    return [{"role": role, "content": text} for text, role in zip(texts, ("assistant", "user") * 9)]


@pytest.fixture
def folder(tmp_path):
    """Q_BASE and main at t = 1 on 2 tasks x 3 people x 2 samples."""
    write_rows(tmp_path / "tasks.jsonl", [{"task_id": t, "split": "test", "task": f"Plan <{t}> | soon"} for t in TASKS])
    write_rows(tmp_path / "personas.jsonl", [{"persona_id": p, "split": "test", "name": p.title(),
                                              "persona": f"I'm {p.title()}. I like tea & cake a lot."} for p in PEOPLE])
    write_rows(tmp_path / "gold-test.jsonl", [{"task_id": t, "persona_id": p, "split": "test", "gold": f"{p} should {t}."}
                                              for t, p in PAIRS])
    evaluation(tmp_path, "base", "main", 0, lambda pair: BASE_NATS[pair], response=lambda pair: "Tea it is.")
    evaluation(tmp_path, "main/1", "main", 1, lambda pair: BASE_NATS[pair] + GAINS[pair], verdict=POINTS.get,
               response=lambda pair: "Tea it is." if pair == PAIRS[1] else "Tea and cake it is, for you.")
    return tmp_path


def evaluation(run, where, variant, t, nats, response, verdict=None, judge="openai:judge", orders=("ours_first",), talks=None,
               user="user", who=None):
    """What simulate.py and evaluate.py would write."""
    (run / where / "test").mkdir(parents=True)
    talks = talks or (lambda pair: talk("What do you like?", "I like tea & cake.", "Where are you?", "At home.")
                      if pair[0] == "t1" else talk("What do you like?", "Tea?"))
    write_rows(run / where / "test.jsonl", [{"task_id": pair[0], "persona_id": pair[1], "sample": sample, "split": "test",
                                             **({"roleplayer": who(pair)} if who else {}), "conversation": talks(pair)}
                                            for pair in PAIRS for sample in (0, 1)])
    settings = {"split": "test", "iteration": t, "variant": variant, "roleplayer": user, "judge": judge, "base": "b (0)",
                "questioner": f"{where} (1)", "conversations": common.fingerprint(str(run / where / "test.jsonl"))}
    key = [dict(task_id=pair[0], persona_id=pair[1]) for pair in PAIRS]
    files = {"log_probs": [{**k, "sample": sample, "condition": condition, "tokens": 9,
                            "log_prob": nats(pair) + side + (-1 if condition == "q_random" else 0)}
                           for k, pair in zip(key, PAIRS) for condition in ("q_experimental", "q_random")
                           for sample, side in ((0, -0.5), (1, 0.5))],
             "responses": [{**k, "sample": 1, "turns": len(talks(pair)) // 2, "response": response(pair)}
                           for k, pair in zip(key, PAIRS)]}
    if t == 0:
        files["log_probs"] += [{**k, "sample": 0, "condition": "negative_control", "log_prob": -20.0, "tokens": 9} for k in key]
    if verdict:
        files["verdicts"] = [{**k, "order": order, "turns": len(talks(pair)) // 2, "raw": "<B> is \"better\" & \x1b[1m shorter.",
                              "verdict": verdict(pair), **({} if verdict(pair) else {"refused": "unreadable"})}
                             for k, pair in zip(key, PAIRS) for order in orders]
    for name, rows in files.items():
        write_rows(run / where / f"test/{name}.jsonl", rows)
        (run / where / f"test/{name}.jsonl.settings.json").write_text(json.dumps(settings))
    rows = [{"variant": variant, "iteration": t, "metric": "gold_log_prob", "condition": "q_experimental", "roleplayer": user,
             "split": "test", "mean": -12.5 + t, "sem": 0.5, "n": 6, "interval_95": [-14.0, -11.0]}]
    if verdict:
        rows.append({**rows[0], "metric": "win_rate", "condition": "", "mean": 0.6, "interval_95": [0.3, 0.8]})
    results.write_results(run / "results.jsonl", rows)


def table(function, run, *more):
    """[{column: text}] of one of the report's tables."""
    tasks, personas = common.read_tasks(run / "tasks.jsonl"), common.read_personas(run / "personas.jsonl")
    evaluations = report.read_evaluations(run, "test", tasks, personas)
    return list(function(evaluations, *([personas] if function is report.simulated_users else []), *more))


def number(text):
    return float(text.split()[0])


def test_each_model_in_one_line(folder):
    base, main = table(report.summary, folder)
    assert (base["model"], main["model"], base["gain"], base["win rate"]) == ("Q_BASE", "main, t=1", "", "")
    assert number(base["log p(gold)"]) == -12.5 and number(main["gain"]) == pytest.approx(8 / 6, abs=0.005)
    assert main["for this user alone"] == "1.00 (1.00 to 1.00)" and main["win rate"].startswith("0.60 (")
    assert main["n"] == "6, 5; 1"
    # The interval by hand: clusters of tasks and of personas, t with 1 degree of freedom.
    gains, mean = np.array([*GAINS.values()]).reshape(2, 3), 8 / 6
    by = [len(s) / (len(s) - 1) * (s ** 2).sum() / 36 for s in
          ((gains - mean).sum(1), (gains - mean).sum(0), (gains - mean).ravel())]
    half = stats.t.ppf(0.975, 1) * max(by[0] + by[1] - by[2], by[2]) ** 0.5
    assert main["gain"] == f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})"
    shutil.rmtree(folder / "base")
    assert table(report.summary, folder)[0]["gain"] == "-", "nothing to compare with"


def test_people_and_each_of_several_users_stand_apart(folder):
    evaluation(folder, "mixed/base", "main", 0, BASE_NATS.get, user="human + m", response=lambda pair: "x")
    evaluation(folder, "mixed/1", "main", 1, lambda pair: BASE_NATS[pair] + GAINS[pair], user="human + m", verdict=POINTS.get,
               response=lambda pair: "x", who=lambda pair: "human" if pair[0] == "t0" else "m")
    rows = {row["user"]: row for row in table(report.summary, folder) if row["model"] == "main, t=1"}
    assert list(rows) == ["user", "human + m", "human", "m"] and rows["human + m"]["n"] == "6, 5; 1"
    for user, task in (("human", "t0"), ("m", "t1")):
        own = [pair for pair in PAIRS if pair[0] == task]
        assert number(rows[user]["gain"]) == pytest.approx(sum(GAINS[pair] for pair in own) / 3, abs=0.005)
        readable = [{"ours": 1, "base": 0, "tie": 0.5}[POINTS[pair]] for pair in own if POINTS[pair]]
        assert number(rows[user]["win rate"]) == pytest.approx(sum(readable) / len(readable), abs=0.005)
        assert rows[user]["n"] == f"3, {len(readable)}"


def test_paired_differences(folder):
    evaluation(folder, "no_reg/1", "no_reg", 1, lambda pair: BASE_NATS[pair] + 1, response=lambda pair: "Why?",
               verdict=lambda pair: "base")
    evaluation(folder, "main/2", "main", 2, lambda pair: BASE_NATS[pair] + 5, response=lambda pair: "Tea.")
    rows = {(row["difference"], row["of"]): row for row in table(report.differences, folder)}
    assert number(rows["main, t=1 - no_reg, t=1", "log p(gold)"]["mean"]) == pytest.approx(8 / 6 - 1, abs=0.005)
    win = rows["main, t=1 - no_reg, t=1", "win rate"]
    assert number(win["mean"]) == 0.6 and win["n"] == "5", "an unreadable verdict's pair is left out"
    assert number(rows["main, t=2 - main, t=1", "log p(gold)"]["mean"]) == pytest.approx(5 - 8 / 6, abs=0.005)
    assert ("main, t=1 - Q_BASE", "log p(gold)") in rows and ("main, t=1 - main, t=1", "log p(gold)") not in rows


def test_the_user_of_training_comes_first_whatever_the_name(folder):
    evaluation(folder, "other/another/base", "main", 0, lambda pair: -99.0, response=lambda pair: "x", user="another")
    evaluation(folder, "other/another/1", "main", 1, lambda pair: -90.0, response=lambda pair: "x", user="another", verdict=POINTS.get)
    assert [(row["model"], row["user"]) for row in table(report.summary, folder)] == [
        ("Q_BASE", "user"), ("Q_BASE", "another"), ("main, t=1", "user"), ("main, t=1", "another")]
    rows = {(row["difference"], row["of"]): row for row in table(report.differences, folder)}
    assert number(rows["main, t=1 - Q_BASE", "log p(gold)"]["mean"]) == pytest.approx(8 / 6, abs=0.005)
    assert number(rows["main, t=1 - Q_BASE", "for this user alone"]["mean"]) == 0.0
    _, page, _ = made(folder)
    assert "user: user." in page and "by 1.33 (" in page
    shutil.rmtree(folder / "other/another/base")                       # Q_BASE has not met this one: nothing to compare
    assert table(report.summary, folder)[-1]["gain"] == "-"


def test_the_smallest_difference_is_found_in_8_of_10_studies():
    rng, found, smallest = np.random.default_rng(0), 0, []
    for _ in range(1500):
        noise = {(i, j): rng.normal() for i in range(12) for j in range(12)}
        smallest.append(results.smallest_difference(noise))
        low, _ = results.interval_95({pair: x + 0.28 for pair, x in noise.items()})
        found += low > 0
    # Two ways of clustering where there is none estimate a bit much: .256 for independent pairs.
    assert np.mean(smallest) == pytest.approx(0.28, abs=0.01) and 0.76 < found / 1500 < 0.84
    assert results.smallest_difference({("t", "p"): 1.0}) is None


def test_power_before_a_run():
    rows = list(results.power(300, 10))
    t = stats.t.ppf([0.975, 0.8], 9).sum()
    assert rows[0]["smallest"] == f"{0.5 + t * 0.5 / 300 ** 0.5:.3f}"
    assert rows[3]["r"] == "0.1" and rows[3]["smallest"] == f"{0.5 + t * 0.5 * ((1 + 29 * 0.1) / 300) ** 0.5:.3f}"
    done = subprocess.run([sys.executable, ROOT / "report.py", "--power", "300", "10"], capture_output=True, text=True)
    assert done.returncode == 0 and rows[3]["smallest"] in done.stdout
    assert list(results.power(2, 2))[0]["smallest"] == "none"
    for few in (["300", "1"], ["10", "300"]):
        done = subprocess.run([sys.executable, ROOT / "report.py", "--power", *few], capture_output=True, text=True)
        assert done.returncode == 2 and "at least two personas" in done.stderr


def test_win_rates_by_length_order_and_ties(folder):
    row, = table(report.win_rates, folder)
    assert number(row["1 question"]) == pytest.approx(2 / 3, abs=0.005) and number(row["2 questions"]) == 0.5
    assert (row["at A"][:4], row["at B"], row["won, tied, lost"], row["unreadable"]) == ("0.60", "-", "3, 0, 2", "1")
    shutil.rmtree(folder / "main")
    evaluation(folder, "main/1", "main", 1, lambda pair: -9.0, response=lambda pair: "x", verdict=lambda pair: "ours",
               orders=("ours_first", "base_first"))
    path = folder / "main/1/test/verdicts.jsonl"
    rows = read_lines(path)
    rows[1]["verdict"] = "base"                                    # the second order of the first pair: a tie
    write_rows(path, rows)
    row, = table(report.win_rates, folder)
    assert row["won, tied, lost"] == "5, 1, 0" and row["at A"][:4] == "1.00" and number(row["at B"]) == pytest.approx(5 / 6, abs=0.005)
    tasks, personas = common.read_tasks(folder / "tasks.jsonl"), common.read_personas(folder / "personas.jsonl")
    e = report.read_evaluations(folder, "test", tasks, personas)[1]
    assert PAIRS[0] in [pair for why, pair in report.examples(e).items() if "contradicts" in why]


def test_answers_and_their_length(folder):
    base, main = table(report.answers, folder)
    assert number(base["words"]) == 3.0 and base["more than Q_BASE"] == "" and number(main["words"]) == round((5 * 7 + 3) / 6, 1)
    assert number(main["more than Q_BASE"]) == round(20 / 6, 1) and main["with a question"][:4] == "0.00"


def test_length_controlled_win_rate_against_statsmodels():
    rng = np.random.default_rng(1)
    longer = rng.normal(3, 10, 200)
    points = np.where(rng.random(200) < 0.1, 0.5, rng.random(200) < 1 / (1 + np.exp(-0.5 - longer / 10)))
    fit = sm.GLM(points, sm.add_constant(longer / longer.std()), family=sm.families.Binomial()).fit()
    mine = results.length_controlled(list(zip(points, longer)))
    assert mine == pytest.approx(fit.params[0], abs=1e-4), "the ridge changes little"
    assert results.share_of(mine) == pytest.approx(fit.predict([[1, 0]])[0], abs=1e-4) and results.share_of([0.0, None])[0] == 0.5
    # The longer answer always wins: among the equal ones 6 of 10 do.
    assert results.share_of(results.length_controlled([(1, 0)] * 6 + [(0, 0)] * 4 + [(1, 5)] * 3)) == pytest.approx(0.6, abs=0.01)
    assert results.length_controlled([(1, 2), (0, 2), (1, 2)]) is None and results.length_controlled([]) is None
    assert results.length_controlled([(1, 2), (1, 1), (1, 3)]) is None, "all won"


def test_kappa_against_statsmodels(folder):
    rng = np.random.default_rng(2)
    first = rng.choice([0.0, 0.5, 1.0], 100)
    second = np.where(rng.random(100) < 0.7, first, rng.choice([0.0, 0.5, 1.0], 100))
    counts = np.zeros((3, 3))
    for a, b in zip(first, second):
        counts[int(2 * a), int(2 * b)] += 1
    assert results.kappa(list(zip(first, second))) == pytest.approx(cohens_kappa(counts).kappa)
    assert results.kappa([(1.0, 1.0)]) is None and results.kappa([]) is None
    # A second judge of the same conversations: another variant with the same settings but for the judge.
    shutil.copytree(folder / "main/1/test", folder / "second/1/test")
    for path in (folder / "second/1/test").glob("*.settings.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "variant": "second", "judge": "openai:other"}))
    rows = read_lines(folder / "second/1/test/verdicts.jsonl")
    rows[0]["verdict"] = "base"
    write_rows(folder / "second/1/test/verdicts.jsonl", rows)
    row, = table(report.judges, folder)
    assert (row["judges"], row["first"][:4], row["second"][:4], row["n"]) == ("openai:judge, openai:other", "0.60", "0.40", "5")
    assert number(row["kappa"]) == pytest.approx((0.8 - (0.6 * 0.4 + 0.4 * 0.6)) / (1 - 0.48), abs=0.005)


def test_jackknife_of_a_mean_is_the_means_interval():
    rng = np.random.default_rng(3)
    values = {(i, j): rng.normal() for i in range(5) for j in range(7)}
    estimate, interval = results.jackknife(lambda xs: sum(xs) / len(xs), values)
    assert estimate == pytest.approx(np.mean([*values.values()])) and interval == pytest.approx(results.interval_95(values))
    assert results.jackknife(lambda xs: None, values) == (None, None)


def test_questions(folder):
    shutil.rmtree(folder / "main")
    talks = {"p0": talk("Your job?", "I bake.", "Your job?", "I bake!"), "p1": talk("Your job?", "I sing."),
             "p2": talk("Where do you live?", "Here.")}
    evaluation(folder, "main/1", "main", 1, lambda pair: -9.0, response=lambda pair: "x", talks=lambda pair: talks[pair[1]])
    row = table(report.questions, folder)[1]
    assert row["model"] == "main, t=1" and row["n"] == "6"
    assert number(row["repeated"]) == pytest.approx(0.5 / 3, abs=0.0005)               # half of p0's, none of the others'
    assert number(row["distinct-1"]) == pytest.approx((2 / 8 + 2 / 4 + 4 / 8) / 3, abs=0.005)   # two samples of each
    assert number(row["distinct-2"]) == pytest.approx((1 / 4 + 1 / 2 + 3 / 6) / 3, abs=0.005)
    assert number(row["asked of others"]) == pytest.approx(2 / 3, abs=0.005)
    assert number(row["words"]) == round((2 + 2 + 4) / 3, 1)


def test_simulated_users(folder):
    shutil.rmtree(folder / "main")
    answers = {"p0": "I’d recommend that you ask me, no?", "p1": "Tea & cake a lot.", "p2": "You should buy our own."}
    evaluation(folder, "main/1", "main", 1, lambda pair: -9.0, response=lambda pair: "x",
               talks=lambda pair: talk("Your job?", answers[pair[1]]))
    row = table(report.simulated_users, folder)[1]
    assert [number(row[name]) for name in ("asks back", "advises", "not in the first person")] == [0.333, 0.667, 0.333]
    # "I'm P1. I like tea & cake a lot." has 7 words past the first: 6 trigrams, of which "tea cake a" and "cake a lot"
    assert number(row["persona told"]) == pytest.approx(2 / 6 / 3, abs=0.0005)


def test_gain_a_turn_of_shortened_conversations(folder):
    path = folder / "main-after-1/1/test.jsonl"
    done = subprocess.run([sys.executable, ROOT / "shorten.py", "--conversations", folder / "main/1/test.jsonl", "--turns", "1",
                           "--output", path], capture_output=True, text=True)
    rows = read_lines(path)
    assert done.returncode == 0 and len(rows) == 6 and {row["task_id"] for row in rows} == {"t1"}, "the longest alone"
    assert all(row["conversation"] == talk("What do you like?", "I like tea & cake.") for row in rows)
    done = subprocess.run([sys.executable, ROOT / "shorten.py", "--conversations", path, "--turns", "1", "--output",
                           folder / "x.jsonl"], capture_output=True, text=True)
    assert done.returncode == 2 and "more than 1 questions" in done.stderr and not (folder / "x.jsonl").exists()
    shutil.rmtree(folder / "main-after-1")
    evaluation(folder, "main-after-1/1", "main-after-1", 1, lambda pair: -16.0, response=lambda pair: "x")
    (folder / "results.jsonl").unlink()
    evaluation(folder, "another/a/base", "main", 0, lambda pair: -99.0, response=lambda pair: "x", user="another")
    evaluation(folder, "another/a/1", "main", 1, lambda pair: -98.0, response=lambda pair: "x", user="another")
    row, = table(report.gain_a_turn, folder)
    assert [number(row[k]) for k in "012"] == [-20.0, -16.0, pytest.approx(-12.5 + 8 / 6, abs=0.005)] and row["n"] == "6"


def test_conversations_are_chosen_by_rule(folder):
    tasks, personas = common.read_tasks(folder / "tasks.jsonl"), common.read_personas(folder / "personas.jsonl")
    base, main = report.read_evaluations(folder, "test", tasks, personas)
    chosen = {why.split(" (")[0]: pair for why, pair in report.examples(main).items()}
    assert chosen == {"the best gain": PAIRS[3], "the median": PAIRS[5], "the worst": PAIRS[2], "a tie: the same answer": PAIRS[1]}
    shown = report.side(main, PAIRS[3])
    assert shown["nats"] == {0: -7.5, 1: -6.5} and shown["sample"] == 1 and shown["talk"] == main.talks[*PAIRS[3], 1]


def made(folder, *more, **env):
    done = subprocess.run([sys.executable, ROOT / "report.py", folder, *more], capture_output=True, text=True, env=env or None)
    assert done.returncode == 0, done.stderr
    return done.stdout, (folder / "report/index.html").read_text(), (folder / "report/report.md").read_text()


def test_the_page(folder):
    (folder / "notes.txt").write_text("yes  1 < 2\n")
    said, page, text = made(folder, "--notes", folder / "notes.txt", "--published")
    html5lib.HTMLParser(strict=True).parse(page)                       # raises at the first error
    sources = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"' >)]{0,20})", page)
    assert sources and all(source.startswith("data:") for source in sources) and "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and "\x1b" not in page + text and "1 &lt; 2" in page and "Plan &lt;t0&gt;" in page and "tea &amp; cake" in page
    for words in ("Paired differences", "main, t=1 - Q_BASE", "the best gain (+4.00 nats)", "-7.50", "-6.50*"):
        assert words in page and words in text, words
    assert "Plan &lt;t0&gt; \\| soon" in text and "yes  1 < 2" in text
    assert "by 1.33 (" in page and "in 0.60 (" in page and "<strong>main</strong>: the method" in page
    pictures = {path.name for path in (folder / "report").iterdir()}
    assert pictures == {"index.html", "report.md", *(f"{name}.{kind}" for name in ("win_rates", "log_probs", "variants")
                                                     for kind in ("png", "svg"))}
    assert page.count("data:image/svg+xml") == 3 and "3 pictures" in said
    assert made(folder, "--notes", folder / "notes.txt", "--published")[1] == page, "the same run gives the same page"


def test_without_matplotlib_the_page_has_the_rest(folder, tmp_path):
    (tmp_path / "path/matplotlib").mkdir(parents=True)
    (tmp_path / "path/matplotlib/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'matplotlib'\")")
    said, page, _ = made(folder, PYTHONPATH=str(tmp_path / "path"), PATH="/usr/bin:/bin")
    assert "requirements-report.txt" in said and "<img" not in page and "Paired differences" in page


def test_what_is_drawn_is_what_was_measured(folder):
    import pictures
    rows = results.read_results(folder / "results.jsonl")
    rows.append({**rows[0], "variant": "no_reg", "iteration": 1, "mean": -11.0, "interval_95": None})
    rows.append({**rows[0], "variant": "none", "iteration": 1, "mean": None, "sem": None})          # nothing was readable
    lines = pictures.lines_of(rows, "variants", "user")
    assert {line: [row["mean"] for row in of] for line, of in lines.items()} == {"main": [-12.5, -11.5], "no_reg": [-12.5, -11.0]}
    assert [row["mean"] for row in pictures.lines_of(rows, "win_rates", "user")["main"]] == [0.5, 0.6]
    assert pictures.lines_of(rows, "users", "user") == {}, "there is one user"
    figure, axes = pictures.pyplot.subplots()
    pictures.panel(axes, lines, {"main": pictures.STYLES[0], "no_reg": pictures.STYLES[1]})
    main, no_reg = (container.lines for container in axes.containers)
    assert list(main[0].get_xdata()) == [0, 1] and list(no_reg[0].get_xdata()) == [0.03, 1.03] and list(main[0].get_ydata()) == [-12.5, -11.5]
    assert [tuple(segment[:, 1]) for segment in main[2][0].get_segments()] == [(-14, -11), (-14, -11)]
    assert tuple(no_reg[2][0].get_segments()[1][:, 1]) == (-11.5, -10.5), "without an interval: the standard error"
    pictures.pyplot.close(figure)
    published = results.read_results(ROOT / "data/published.jsonl")
    users = pictures.lines_of(published, "users", "mixtral-8x7b")
    assert [row["mean"] for row in users["gemma-7b"]] == [0.5, 0.628, 0.608, 0.598] and len(users) == 3
    assert [row["mean"] for row in pictures.lines_of(published, "log_probs", "mixtral-8x7b")["Q-Experimental"]] == [-359.81, -350.86, -344.71, -339.22]


def test_training_curves(folder):
    import pictures
    (folder / "main/1/model").mkdir()
    write_rows(folder / "main/1/model/log.jsonl", [{"step": i, "loss": 2.0 - i, "rate": 1.0, "norm": 1.0} for i in (1, 2)])
    assert pictures.training_curves(folder) == {"main": {1: [1.0, 0.0]}}
    said, page, _ = made(folder)
    assert (folder / "report/training.svg").exists() and page.count("data:image/svg+xml") == 4


@pytest.mark.parametrize("spoil, says", [
    (lambda run: (run / "results.jsonl").unlink(), "no results on split test"),
    (lambda run: [path.unlink() for path in run.rglob("test.jsonl")], "which is not in"),
    (lambda run: [path.unlink() for path in run.rglob("*.settings.json")], "no evaluation of split test"),
    (lambda run: (run / "tasks.jsonl").write_text("{}\n"), "tasks.jsonl, line 1"),
    (lambda run: (run / "personas.jsonl").unlink(), "personas.jsonl")])
def test_what_is_missing_is_said_in_one_line(folder, spoil, says):
    spoil(folder)
    done = subprocess.run([sys.executable, ROOT / "report.py", folder], capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (folder / "report/index.html").exists()


@pytest.mark.browser
def test_a_browser_opens_the_page_without_an_error(folder):
    made(folder)
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
                           f"file://{folder}/report/index.html"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Paired differences</h2>" in done.stdout and "CONSOLE" not in done.stderr
