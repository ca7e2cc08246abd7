"""What a run of ALOE has learned: the table in the paper's shape, intervals, differences, curves and conversations.

    python aloe/report.py runs/aloe/toy
    python aloe/report.py runs/aloe/seed-100 runs/aloe/seed-101     # runs that differ in their seed: means, ± the
                                                                    # standard deviation, on the page of the first

    writes  RUN/report/index.html       one file, which opens without a network
            RUN/report/NAME.svg         the pictures, if matplotlib is there (report/requirements.txt)

Each table is a function; its docstring stands on the page. Page and pictures are those of report/report.py.
"""
import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first: there, too, is a report.py
from aloe.evaluate import bootstrap, by_person, improvement  # noqa: E402
from common import fail, read_rows, read_settings, run  # noqa: E402
from evaluate import read_results  # noqa: E402
from report.report import who_what_when, write_page  # noqa: E402
from report.stats import as_table, cell  # noqa: E402

PAPER = ("base", "rejected", "sft", "sft_dpo")                  # table 1's rows; all others are controls
METRICS = {"AL": 2, "IR": 3, "N-IR": 3, "R2": 3}                 # and their digits
COLUMNS = (*METRICS, "fitting_manners", "used_facts", "invented_facts", "ceiling")


def read_evaluations(run, split):
    """Every evaluation of a run, one for each temperature and model, with its settings, results {metric: row}, talks
    {persona_id: row}, scores {persona_id: K scores, NaN where unreadable}, missing {what: (how many, of how many)}."""
    found, results = [], [row for row in read_results(f"{run}/results.jsonl") if row["split"] == split]
    for al in sorted((row for row in results if row["metric"] == "AL"), key=lambda row: row["condition"]):
        e = SimpleNamespace(variant=al["variant"], condition=al["condition"], n=al["n"])
        e.name, e.folder = f"{e.variant} {e.condition}", f"{run}/{e.variant}/{split}-{e.condition.replace('=', '')}"
        e.results = {row["metric"]: row for row in results
                     if (row["variant"], row["condition"]) == (e.variant, e.condition)}
        rows = {name: list(read_rows(f"{e.folder}/{name}.jsonl", key, fields)) for name, key, fields in (
            ("conversations", {"persona_id": str}, {"profile": str, "personality": str, "rounds": list}),
            ("scores", {"persona_id": str, "round": int}, {"score": int}))}
        e.talks, e.scores = {row["persona_id"]: row for row in rows["conversations"]}, by_person(rows["scores"])
        e.settings = read_settings(f"{e.folder}/scores.jsonl")
        rounds = {n for who, of in e.scores.items() for n in (len(of), len(e.talks.get(who, {}).get("rounds", ())))}
        if rounds != {len(al["by_round"])}:
            fail(f"{e.folder}: its files do not fit {run}/results.jsonl. Start aloe/evaluate.py again.")
        e.missing = {what: (sum(bool(row.get("refused")) for row in of), len(of)) for what, of in rows.items()}
        found.append(e)
    return found or fail(f"{run}/results.jsonl: no results on split {split}. aloe/evaluate.py writes them.")


def check_seeds(names, runs):
    """Ends the program where runs differ in more than their seeds: a mean over two worlds or bases means nothing."""
    made = [defaultdict(set) for _ in runs]                     # {setting: its values}, of the bases
    for folder, settings, evaluations in zip(names, made, runs):
        for e in evaluations:
            training = read_settings(f"{folder}/{e.variant}/model")
            of = {**e.settings, **training, **(dict(model=0, base=0) if training else {})}         # differ by seed
            for name in of.keys() - {"seed", "personas", "conversations"}:
                settings[f"{e.variant}'s {name}"].add(str(of[name]))
    compared = set().union(*made)
    if differ := sorted(name for name in compared if any(settings[name] != made[0][name] for settings in made)):
        fail(f"{' and '.join(names)} are not seeds of one run: they differ in {', '.join(differ)}. "
             "Report them one by one.")


def contrasts(evaluations):
    """[(one, another)] whose difference is of interest: to the base of the same users, and DPO to its SFT."""
    return [(one, other) for one in evaluations for other in evaluations
            if one.condition == other.condition and one is not other and other.variant in (
                "mute_base" if one.variant.startswith("mute") else "base", one.variant.removesuffix("_dpo"))]


def difference(one, other):
    """Of two models, for the same users: {metric: (difference, its 95 % interval or None)}, and how many users."""
    who = sorted(one.scores.keys() & other.scores.keys())
    a, b = (np.array([of.scores[key] for key in who]) for of in (one, other))                           # (N, K)
    (ours, theirs), bounds = [improvement(np.nanmean(of, 0)) for of in (a, b)], bootstrap(a, 0, b)
    return {name: (None if np.isnan(ours[name]) else ours[name] - theirs[name], bounds.get(name))      # IR of one round
            for name in ("AL", "IR")}, len(who)


def headline(e, base):
    """What was found, in a sentence whose words follow the intervals."""
    by, _ = difference(e, base)
    if not by["AL"][1]:
        return f"{e.name}: nothing is shown. It takes two users."
    al, ir = ("more" if low > 0 else "less" if high < 0 else "not distinguishably more or less"
              for _, (low, high) in ((gain, interval or (0, 0)) for gain, interval in by.values()))
    return (f"{e.name}: the judge finds its replies {al} tailored to the user than {base.variant}'s: AL "
            f"{cell(e.results['AL']['mean'])}, a difference of {cell(*by['AL'])}. They improve {ir} over the rounds: a "
            f"difference in IR of {cell(*by['IR'], 3)}.")


# ---------------------------------------------------------------- the tables: a generator of rows each

def table(evaluations):
    """AL over the rounds, as in the paper's table 1.

    k: AL(k), the judge's mean score of the replies of round k, 1 to 5. AL: their average. IR: the slope of the line
    through them. N-IR: the same through (AL(k) - lowest) / (highest - lowest). R2: how well a line fits.

    results.jsonl; section 3 of the paper."""
    for e in evaluations:
        yield {"model": e.name, **{f"k={k}": cell(al) for k, al in enumerate(e.results["AL"]["by_round"], 1)},
               **{name: cell(e.results[name]["mean"], None, digits) for name, digits in METRICS.items()}}


def intervals(evaluations):
    """95 % intervals, and differences of two models for the same users.

    A bootstrap over users. A difference whose interval has 0 in it may be noise. These intervals do not hold what
    another training would change: only runs with other seeds show that (aloe/report.py RUN RUN ...).

    results.jsonl, scores.jsonl."""
    for e in evaluations:
        yield {"model": e.name, "users": str(e.n), **{name: cell(
            e.results[name]["mean"], e.results[name].get("interval_95"), digits) for name, digits in METRICS.items()}}
    for one, other in contrasts(evaluations):
        by, n = difference(one, other)
        yield {"model": f"{one.variant} - {other.name}", "users": str(n),
               **{name: cell(*by[name], METRICS[name]) for name in by}}


def over_seeds(runs):
    """Several runs: means ± the standard deviation between them.

    "-" where a run has no value, as a flat curve has no N-IR.

    results.jsonl of each run."""
    values = defaultdict(list)
    for evaluations in runs:
        of = {(e.name, metric): row["mean"] for e in evaluations for metric, row in e.results.items()}
        of |= {(f"{one.variant} - {other.name}", metric): of[one.name, metric] - of[other.name, metric]
               for one, other in contrasts(evaluations) for metric in ("AL", "IR") if of[one.name, metric] is not None}
        for what, mean in of.items():
            values[what].append(mean)
    for model in dict.fromkeys(model for model, _ in values):
        yield {"model": model, **{name: "-" if None in means or len(means) < 2 else
                                  f"{statistics.mean(means):.3f} ± {statistics.stdev(means):.3f}"
                                  for name in COLUMNS if (means := values.get((model, name)))}}


# ---------------------------------------------------------------- the page

def pictures_of(evaluations):
    """AL(k) of the paper's models, and of the controls, as report/pictures.py draws them."""
    panels = defaultdict(lambda: defaultdict(dict))
    for e in evaluations:
        al = e.results["AL"]["by_round"]
        bounds = e.results["AL"].get("interval_by_round") or zip(al, al)
        panels["al" if e.variant in PAPER else "controls"][e.condition][e.variant] = [
            (k, mean, *ends) for k, (mean, ends) in enumerate(zip(al, bounds), 1)]
    return {name: ("AL(k) over the rounds k, with 95 % intervals", None, "{}", of) for name, of in panels.items()}


def examples(e, base):
    """What the page shows of each user, worst first, by the mean score of the conversation; beside it that of base."""
    found = []
    for who in sorted(e.scores.keys() & base.scores.keys(), key=lambda who: (np.nanmean(e.scores[who]), who)):
        rounds, scores = ([of.talks[who]["rounds"] for of in (base, e)], [of.scores[who] for of in (base, e)])
        found.append({
            "profile": e.talks[who]["profile"], "personality": e.talks[who]["personality"], "why": "",
            "outcome": "mean score {1:.2f}, {0}'s {2:.2f}".format(base.variant, *map(np.nanmean, reversed(scores))),
            "lines": [("", [base.variant, e.variant]), *(line for k in range(len(scores[1])) for line in (
                ("user", [of[k]["user"] for of in rounds]), ("reply", [of[k]["reply"] for of in rounds]),
                ("score", ["unreadable" if np.isnan(of[k]) else f"{of[k]:g}" for of in scores])))]})
    for why, i in (("median", len(found) // 2), ("worst", 0), ("best", -1)):
        found[i]["why"] = why
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders that aloe/run.sh wrote")
    parser.add_argument("--split", default="test", help="of the personas")
    args = parser.parse_args()
    runs = [read_evaluations(run, args.split) for run in args.runs]
    check_seeds(args.runs, runs)
    ours, run = runs[0], args.runs[0]
    trained = [(one, other) for one, other in contrasts(ours) if other.variant.endswith("base")]
    last = [name for name in PAPER if name in {e.variant for e, _ in trained}][-1:]         # none of MODELS alone
    heads = [pair for pair in trained if not last or pair[0].variant in last]
    e = heads[0][0] if heads else ours[0]
    tables = [as_table(table, ours), as_table(intervals, ours),
              *([as_table(over_seeds, runs)] if len(runs) > 1 else ()), as_table(who_what_when, {
                  "": {"users": e.n, **e.settings}, "training": read_settings(f"{run}/{e.variant}/model"),
                  "pairs": read_settings(f"{run}/conversations.jsonl")})]
    write_page("aloe/index.html.jinja", run, args.split, ours, pictures_of(ours), tables[2:-1] or tables[:2], {
        "lines": [headline(*pair) for pair in heads], "tables": tables,
        "examples": [(one.name, one is e, examples(one, other)) for one, other in sorted(
            trained, key=lambda pair: pair[0].variant not in last)]})


if __name__ == "__main__":
    run(main)
