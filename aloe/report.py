"""The table of an ALOE run, in the paper's shape, and AL over the rounds as a picture.

    python aloe/report.py runs/aloe/toy
    python aloe/report.py runs/aloe/seed-100 runs/aloe/seed-101     # of several runs: means, ± the standard deviation

    reads   RUN/results.jsonl           the rows of evaluate.py (and toy/measure.py)
    writes  RUN/report/al-T0.svg        a picture for each temperature, if matplotlib is there (report/requirements.txt)
"""
import argparse
import statistics
import sys
from collections import defaultdict
from glob import glob
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first: there, too, is a report.py
from aloe.evaluate import bootstrap, by_person, improvement  # noqa: E402
from common import fail, read_rows, read_settings, run  # noqa: E402
from evaluate import read_results  # noqa: E402
from report.stats import Table, as_text, cell  # noqa: E402

PAPER = ("base", "sft", "sft_dpo", "rejected")                  # table 1's rows; all others are controls
METRICS = {"AL": 2, "IR": 3, "N-IR": 3, "R2": 3}                 # and their digits
COLUMNS = (*METRICS, "fitting_manners", "used_facts", "invented_facts", "ceiling")


def curves(results, condition):
    """{model: its row of AL(1), ..., AL(K)} at one temperature."""
    return {row["variant"]: row for row in results if row["metric"] == "AL" and row["condition"] == condition}


def table(results):
    """Lines of the paper's table 1: a line a model and temperature, a column a round."""
    found = {(f"{row['variant']} {row['condition']}", row["metric"]): row for row in results}
    models = {who: row["by_round"] for (who, metric), row in found.items() if metric == "AL"}
    K, width = max(map(len, models.values())), max(map(len, models))
    yield " " * width + "".join(f"{f'k={k}':>6}" for k in range(1, K + 1)) + "".join(f"{name:>8}" for name in METRICS)
    for who, al in models.items():
        yield f"{who:<{width}}" + "".join(f"{value:6.2f}" for value in al).ljust(6 * K) + "".join(
            f"{cell(found[who, name]['mean'], None, digits):>8}" for name, digits in METRICS.items())


def contrasts(variants):
    """[(model, another)] whose difference is of interest: to the base of the same users, and DPO to its SFT."""
    pairs = [(one, "mute_base" if one.startswith("mute") else "base") for one in variants]
    pairs += [(one, one.removesuffix("_dpo")) for one in variants]
    return [(one, other) for one, other in pairs if one != other in variants]


def intervals(run, results, split):
    """The Table of all means with their intervals, and of differences between two models for the same users, which are
    taken from their scores.jsonl."""
    found = {(row["variant"], row["condition"], row["metric"]): row for row in results}
    lines = []
    for condition in dict.fromkeys(row["condition"] for row in results if row["metric"] == "AL"):
        scores = {}
        for variant, row in curves(results, condition).items():
            scores[variant] = by_person(read_rows(f"{run}/{variant}/{split}-{condition.replace('=', '')}/scores.jsonl",
                                                  {"persona_id": str, "round": int}, {"score": int}))
            of = [found[variant, condition, name] for name in METRICS]
            lines.append([f"{variant} {condition}", str(row["n"]), *(
                cell(one["mean"], one.get("interval_95"), digits) for one, digits in zip(of, METRICS.values()))])
        for one, other in contrasts(scores):
            who = sorted(scores[one].keys() & scores[other].keys())
            a, b = (np.array([scores[name][key] for key in who]) for name in (one, other))              # (N, K)
            (ours, theirs), bounds = [improvement(np.nanmean(of, 0)) for of in (a, b)], bootstrap(a, 0, b)
            lines.append([f"{one} - {other} {condition}", str(len(who)), *(
                cell(ours[name] - theirs[name], bounds.get(name), METRICS[name]) for name in ("AL", "IR")), "", ""])
    return Table("95 % intervals (bootstrap over users; a difference whose interval has 0 in it may be noise)",
                 ["", "users", *METRICS], lines, [])


def check_seeds(runs, split):
    """Ends the program where runs differ in more than their seeds: a mean over two worlds or bases means nothing."""
    first, *others = ([{name: value for name, value in read_settings(path).items() if name not in (
        "seed", "personas", "conversations")} for path in sorted(glob(f"{run}/base/{split}-T*/scores.jsonl"))]
        for run in runs)
    for run, settings in zip(runs[1:], others):
        differ = sorted({name for a, b in zip(first, settings) for name in {**a, **b} if a.get(name) != b.get(name)})
        if differ or len(first) != len(settings):
            fail(f"{runs[0]} and {run} are not two seeds of one run: base/ differs in "
                 f"{', '.join(differ) or 'its temperatures'}. Report them one by one.")


def over_seeds(runs):
    """[results of a run, ...] -> lines: a line a model or difference and temperature, each mean over the runs ± its
    standard deviation; "-" where a run has none, as a flat curve has no N-IR."""
    values = defaultdict(list)
    for results in runs:
        of = {(row["variant"], row["condition"], row["metric"]): row["mean"] for row in results}
        for condition in dict.fromkeys(condition for _, condition, _ in of):
            of |= {(f"{a} - {b}", condition, name): of[a, condition, name] - of[b, condition, name]
                   for a, b in contrasts(curves(results, condition)) for name in ("AL", "IR")}
        for (variant, condition, metric), mean in of.items():
            values[f"{variant} {condition}", metric].append(mean)
    columns = [name for name in COLUMNS if name in {metric for _, metric in values}]
    yield f"{'':<24}" + "".join(f"{name:>17}" for name in columns)
    for model in dict.fromkeys(model for model, _ in values):
        cells = [values.get((model, name), [None]) for name in columns]
        yield f"{model:<24}" + "".join(f"{cell:>17}" for cell in (
            "-" if None in means or len(means) < 2 else f"{statistics.mean(means):.3f} ± {statistics.stdev(means):.3f}"
            for means in cells))


def draw(results, folder):
    """Writes a picture for each temperature, of the paper's models and of the controls; returns their names."""
    from report.pictures import STYLES, panel, pyplot
    names = []
    for condition in dict.fromkeys(row["condition"] for row in results if row["metric"] == "AL"):
        lines = {model: [(k, al, *bounds) for k, (al, bounds) in enumerate(zip(
            row["by_round"], row.get("interval_by_round") or [[al, al] for al in row["by_round"]]), 1)]
            for model, row in curves(results, condition).items()}
        for name, own in (("al", True), ("controls", False)):
            if models := {model: of for model, of in lines.items() if (model in PAPER) == own}:
                figure, ax = pyplot.subplots(figsize=(5.5, 4.5), layout="constrained")
                panel(ax, models, dict(zip(models, 3 * STYLES)))
                k = [k for k, *_ in max(models.values(), key=len)]
                ax.set(xlabel="round k", ylabel="AL(k)", ylim=(1, 5), title=f"{condition}, 95 % intervals", xticks=k,
                       xticklabels=k)
                ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
                names.append(f"{name}-{condition.replace('=', '')}")
                figure.savefig(folder / f"{names[-1]}.svg", metadata={"Date": None})
                pyplot.close(figure)
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders that aloe/run.sh wrote")
    parser.add_argument("--split", default="test", help="of the personas")
    args = parser.parse_args()
    runs = [[row for row in read_results(f"{run}/results.jsonl") if row["split"] == args.split] for run in args.runs]
    for run, results in zip(args.runs, runs):
        if not any(row["metric"] == "AL" for row in results):
            fail(f"{run}/results.jsonl: no results on split {args.split}. aloe/evaluate.py writes them.")
    check_seeds(args.runs, args.split)
    print(*(over_seeds(runs) if len(runs) > 1 else [
        *table(runs[0]), *as_text(intervals(args.runs[0], runs[0], args.split))]), sep="\n")
    try:
        for run, results in zip(args.runs, runs):
            folder = Path(run, "report")
            folder.mkdir(exist_ok=True)
            print(f"{folder}: pictures {', '.join(draw(results, folder))}")
    except ModuleNotFoundError as error:
        print(f"\nNo pictures: {error}. `pip install -r report/requirements.txt` brings matplotlib.")


if __name__ == "__main__":
    run(main)
