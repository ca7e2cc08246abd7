"""The tables of a run: gold log-probabilities, gains and win rates; a line a variant, a column an iteration.

    python report.py runs/paper

It reads the run's results.jsonl, to which each evaluate.py adds its means, and needs no model and no server. How that
file is read and written, and the statistics in it, stand here, too.
"""
import argparse
import fcntl
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from common import fail, pair_of, read_rows, run, write_whole

RESULT_KEY = {"variant": str, "iteration": int, "metric": str, "condition": str, "roleplayer": str, "split": str}


def read_results(path):
    """Rows of results.jsonl: RESULT_KEY + `mean`, `sem`, `n`."""
    fields = {"mean": float | int | None, "sem": float | int | None, "n": int}
    return list(read_rows(path, RESULT_KEY, fields)) if Path(path).exists() else []


def write_results(path, rows):
    """Prints rows and adds them to results.jsonl; a row for the same combination of RESULT_KEY is replaced."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "a") as lock:                     # evaluations may run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = {tuple(row[name] for name in RESULT_KEY): row for row in [*read_results(path), *rows]}
        write_whole(path, "".join(json.dumps(results[key]) + "\n" for key in sorted(results)))
    for row in rows:
        value = " ± ".join(f"{row[name]:.3f}" for name in ("mean", "sem") if row[name] is not None)
        print(f"{row['variant']}, t = {row['iteration']}: {row['metric']} {row['condition']} {value} (n = {row['n']})")


# ---------------------------------------------------------------- statistics

def mean_sem(values):
    """{"mean", "sem": standard error, "n"} of one value a pair; the SEM of fewer than two values is None."""
    n = len(values)
    return {"mean": float(np.mean(values)) if n > 0 else None,
            "sem": float(np.std(values, ddof=1) / n ** 0.5) if n > 1 else None, "n": n}


def by_pair(rows, value):
    """{(task_id, persona_id): mean over its samples}: a pair's samples are not independent of one another. A value that
    is None is left out."""
    groups = defaultdict(list)
    for row in rows:
        if row[value] is not None:
            groups[pair_of(row)].append(row[value])
    return {pair: float(np.mean(group)) for pair, group in groups.items()}


def sem_two_way(values):
    """Standard error of a mean over {(task, persona): value}, clustered by task and by persona: pairs that share either
    are not independent. Variance = by task + by persona - by pair, and at least that of independent pairs (Cameron,
    Gelbach and Miller 2011). None where a task or a persona stands alone."""
    n, mean, variance = len(values), sum(values.values()) / max(1, len(values)), []
    for cluster in (lambda pair: pair[0], lambda pair: pair[1], lambda pair: pair):
        sums = defaultdict(float)
        for pair, value in values.items():
            sums[cluster(pair)] += value - mean
        if len(sums) < 2:
            return None
        variance.append(len(sums) / (len(sums) - 1) * sum(s * s for s in sums.values()) / n ** 2)
    by_task, by_persona, independent = variance
    return math.sqrt(max(by_task + by_persona - independent, independent))


def interval_95(values, share=False):
    """The 95 % interval [low, high] of a mean over {(task, persona): value}: `sem_two_way` times Student's t, with one
    degree of freedom less than there are tasks or personas, whichever are fewer. A share has Wilson's interval, which
    stays inside 0..1, for as many independent pairs as would have that standard error. None where that is None."""
    from scipy.special import stdtrit                           # Student's t; scipy.stats takes a second to import
    if (sem := sem_two_way(values)) is None:
        return None
    mean, q = sum(values.values()) / len(values), stdtrit(min(len(set(ids)) for ids in zip(*values)) - 1, 0.975)
    if not share:
        return [float(mean - q * sem), float(mean + q * sem)]
    n = mean * (1 - mean) / sem ** 2 if sem else len(values)
    half = q * math.sqrt(mean * (1 - mean) / n + q * q / (4 * n * n))
    return [float((mean + q * q / (2 * n) + side) / (1 + q * q / n)) for side in (-half, half)]


# ---------------------------------------------------------------- tables

TITLES = {"gold_log_prob": "Log-probability of the gold responses under Q_BASE (nats; mean ± SEM over pairs)",
          "gold_log_prob_gain": "Gain in gold log-probability over Q_BASE (nats; mean ± SEM of paired differences)",
          "win_rate": "Win rate against Q_BASE (wins + half the ties, ± SEM, over readable verdicts)"}
CONDITIONS = {"q_experimental": "Q-Experimental", "q_random": "Q-Random", "negative_control": "negative control",
              "positive_control": "positive control", "": ""}


def table(results, metric, title, cell=None):
    """Lines of the paper's table for one metric: a line for each condition, variant and Roleplayer, a column for each
    iteration. Q_BASE stands in the first column of `main`. cell: a function from a row to its text."""
    rows = [row for row in results if row["metric"] == metric]
    if not rows:
        return []
    digits = 3 if metric.endswith(("rate", "share", "coverage")) else 2
    cell = cell or (lambda row: " ± ".join(
        f"{row[name]:.{digits}f}" for name in ("mean", "sem") if row[name] is not None))
    numbers, several = {row["n"] for row in rows}, len({row["roleplayer"] for row in rows}) > 1
    iterations = sorted({row["iteration"] for row in rows})
    lines = defaultdict(dict)                                   # (condition, label) -> {iteration: text}
    for row in sorted(rows, key=lambda row: (list(CONDITIONS).index(row["condition"]), row["variant"] != "main",
                                             row["variant"], row["roleplayer"])):
        condition, label = CONDITIONS[row["condition"]], ""
        if not row["condition"].endswith("control"):
            label = "  " * bool(condition) + row["variant"] + (f" ({row['roleplayer']})" if several else "")
            lines[condition, ""] = {}
        lines[condition, label][row["iteration"]] = cell(row)
    width = max(len(label or condition) for condition, label in lines)
    return ["", f"{title}; n = {' to '.join(map(str, sorted({min(numbers), max(numbers)})))}",
            " " * width + "".join(f"{f't={t}' if t else 'Q_BASE':>16}" for t in iterations),
            *((f"{label or condition:<{width}}" + "".join(f"{line.get(t, ''):>16}" for t in iterations)).rstrip()
              for (condition, label), line in lines.items() if label or condition)]


def tables(results):
    """Lines of all tables of a run; after those of differences and win rates their 95 % intervals."""
    def interval(row):
        return "{:.2f} to {:.2f}".format(*row["interval_95"]) if row["interval_95"] else "-"

    lines = []
    for metric, title in TITLES.items():
        lines += table(results, metric, title)
        if metric != "gold_log_prob":
            lines += table(results, metric, f"{title.split(' (')[0]}: 95 % intervals, clustered by task and persona",
                           interval)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a folder with a results.jsonl")
    parser.add_argument("--split", default="test", help="of the tasks and personas")
    args = parser.parse_args()
    rows = [row for row in read_results(f"{args.run}/results.jsonl") if row["split"] == args.split]
    if not rows:
        fail(f"{args.run}/results.jsonl: no results on split {args.split}. evaluate.py writes them.")
    print(*tables(rows), sep="\n")


if __name__ == "__main__":
    run(main)
