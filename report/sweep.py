"""The tables and pictures of docs/open_questions.md, from the runs of report/sweep.sh.

    python report/sweep.py              prints a table for each question that has runs
    python report/sweep.py --pictures   and writes runs/sweep/QUESTION.svg (report/requirements.txt)

A cell is the mean over the seeds ± their standard deviation; of one seed, the mean with its 95 % interval.

    win rate, gain, coverage   of Q_t on the split test, as in results.jsonl; the gain is Q-Experimental's, in nats
    questions                  different ones, in 896 test conversations
    first, first kept          entropy of a conversation's first question, in bits: in the test, and in what was kept
                               (t = 0 is Q_BASE, of which nothing is kept: of all its conversations)
    minutes                    processor time of the run, where t is its last iteration (report/sweep.sh says of what)
"""
import argparse
import math
import statistics
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
from common import SAMPLE, fail, pair_of, read_rows, run  # noqa: E402
from evaluate import read_results  # noqa: E402
from report.stats import Table, as_text, cell  # noqa: E402

QUESTIONS = {   # name: (what is varied, {value: (its runs, t)})
    "iterations": ("iterations N", {t: ("main-10[012]", t) for t in range(6)}),
    "seeds": ("seed", {seed: (f"main-{seed}", 1) for seed in range(100, 106)}),
    "k": ("k, conversations kept of 10", {1: ("main-10[012]", 1), 3: ("k-3-*", 1), 5: ("k-5-*", 1)}),
    "n": ("n, 224 pairs", {2: ("n-2-*", 1), 5: ("n-5-*", 1), 10: ("main-100", 1), 20: ("n-20-*", 1)}),
    "calls": ("n, 1,120 conversations", {2: ("calls-2-*", 1), 5: ("n-5-*", 1), 10: ("pairs-112-*", 1),
                                         20: ("calls-20-*", 1)}),
    "pairs": ("training pairs", {n: ("main-100" if n == 224 else f"pairs-{n}-*", 1) for n in (28, 56, 112, 224, 448)}),
    "oracle": ("share of sentences that are another user's", {
        share: (f"oracle-{share}-*" if share else "main-100", 1) for share in (0, 0.1, 0.3, 1)}),
}
METRICS = {"win rate": ("win_rate", ""), "gain": ("gold_log_prob_gain", "q_experimental"), "coverage": ("coverage", "")}


def entropy(texts):
    """Bits: 0 if all texts are the same, log2 of their number if all differ."""
    return sum(n / len(texts) * math.log2(len(texts) / n) for n in Counter(texts).values())


def best_of(values, n):
    """The mean of the largest of n values, over all ways to draw n of them without replacement."""
    ways = math.comb(len(values), n)
    return sum(x * math.comb(i, n - 1) / ways for i, x in enumerate(sorted(values)))


def questions(path):
    """The conversations of a file as lists of questions."""
    return [[turn["content"] for turn in row["conversation"][::2]] for row in read_rows(
        path, SAMPLE, {"conversation": list}) if not row.get("refused")]


@lru_cache                          # most questions show main's
def measure(folder, t):
    """{column: (value, interval or None)} of one run's model t."""
    results = {(row["metric"], row["condition"]): (row["mean"], row["interval_95"]) for row in read_results(
        folder / "results.jsonl") if (row["variant"], row["iteration"]) == ("main", t)}
    asked = questions(folder / (f"main/{t}/test.jsonl" if t else "base/test.jsonl"))
    kept = {0: "base/conversations.jsonl", 1: "base/selected.jsonl"}.get(t, f"main/{t}/selected.jsonl")
    last = (folder / "seconds").exists() and not (folder / f"main/{t + 1}").exists()
    seconds = sum(map(float, (folder / "seconds").read_text().split())) if last else None
    return {**{name: results.get(key, (None, None)) for name, key in METRICS.items()},
            "questions": (len({text for talk in asked for text in talk}), None),
            "first": (entropy([talk[0] for talk in asked]), None),
            "first kept": (entropy([talk[0] for talk in questions(folder / kept)]), None),
            "minutes": (seconds and seconds / 60, None)}


def best_of_n(folder):
    """{n: nats} by which the best of n conversations of Q_BASE is above their mean, without any training."""
    scores = defaultdict(list)
    for row in read_rows(folder / "base/scores-gold.jsonl", SAMPLE, {"log_prob": float | int | None}):
        scores[pair_of(row)].append(row["log_prob"])
    return {n: statistics.mean(best_of(p, n) - statistics.mean(p) for p in scores.values()) for n in (2, 5, 10, 20)}


def over_seeds(measured):
    """[{column: (value, interval)} of a seed, ...] -> {column: (mean, low, high, text)}"""
    found = {}
    for name in measured[0]:
        of, share = [of[name] for of in measured if of[name][0] is not None], name == "win rate"
        values = [value for value, _ in of]
        if len(values) > 1:
            mean, sd = statistics.mean(values), statistics.stdev(values)
            found[name] = (mean, mean - sd, mean + sd, f"{cell(mean, share=share)} ± {cell(sd, share=share)}")
        elif values:
            interval = of[0][1]
            found[name] = (values[0], *(interval or 2 * values), cell(values[0], interval, share=share))
    return found


def draw(path, axis, points):
    """{value: {column: (mean, low, high, text)}} as two panels: the gain and the win rate."""
    from report.pictures import STYLES, pyplot
    figure, panels = pyplot.subplots(1, 2, figsize=(6.5, 2.4), layout="constrained")
    for ax, name, (colour, marker, _), middle in zip(panels, ("gain", "win rate"), STYLES[1:], (0, 0.5)):
        there = [(i, *of[name][:3]) for i, of in enumerate(points.values()) if name in of]
        i, mean, low, high = zip(*there) if there else fail(f"{path}: no {name} is there. Run report/sweep.sh again.")
        ax.errorbar(i, mean, ([m - y for m, y in zip(mean, low)], [y - m for m, y in zip(mean, high)]), color=colour,
                    marker=marker, capsize=3, linestyle="" if axis == "seed" else "-")
        ax.axhline(middle, color="#767676", linewidth=1, zorder=0)
        ax.set(xlabel=axis, title={"gain": "gain in log p(gold), nats"}.get(name, name))
        ax.set_xticks(range(len(points)), map(str, points))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep"), help="the folder of report/sweep.sh")
    parser.add_argument("--pictures", action="store_true", help="a picture for each question, beside the runs")
    args = parser.parse_args()
    any(args.runs.glob("*/main/1/test.jsonl")) or fail(f"{args.runs}: no runs are there. report/sweep.sh makes them.")
    for question, (axis, values) in QUESTIONS.items():
        points = {}
        for value, (name, t) in values.items():
            ended = f"{name}/main/{t}/test/verdicts.jsonl" if t else f"{name}/base/test/responses.jsonl"
            if measured := [measure(path.parents[3 if t else 2], t) for path in sorted(args.runs.glob(ended))]:
                points[value] = over_seeds(measured)
        if points:
            columns = dict.fromkeys(name for of in reversed(points.values()) for name in of)
            print(*as_text(Table(question, [axis, *columns], [[str(value), *(
                of[name][3] if name in of else "-" for name in columns)] for value, of in points.items()], []), 200),
                "", sep="\n")
            if args.pictures:
                draw(args.runs / f"{question}.svg", axis, points)
    if (args.runs / "n-20-100/base/scores-gold.jsonl").exists():
        print("Nats of the best of n conversations of Q_BASE above their mean:", *(
            f"n={n}: {nats:.2f}" for n, nats in best_of_n(args.runs / "n-20-100").items()))


if __name__ == "__main__":
    run(main)
