"""results.jsonl, the means that evaluate.py measures; statistics of values over pairs; tables.

A value belongs to a (task, persona) pair. Pairs that share a task or a persona are not independent, so the intervals
here are clustered by both.
"""
import fcntl
import json
import math
from collections import Counter, defaultdict
from inspect import getdoc
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import fail, pair_of, read_rows, write_whole

RESULT_KEY = {"variant": str, "iteration": int, "metric": str, "condition": str, "roleplayer": str, "split": str}
CONDITIONS = {"q_experimental": "Q-Experimental", "q_random": "Q-Random", "negative_control": "negative control",
              "positive_control": "positive control", "": ""}


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


def of_pairs(values):
    """{(task, persona, ...): value} or such pairs -> {(task, persona): mean}"""
    items = values.items() if isinstance(values, dict) else values
    return by_pair([{"task_id": key[0], "persona_id": key[1], "value": float(value)} for key, value in items], "value")


def minus(a, b):
    return {pair: a[pair] - b[pair] for pair in a if pair in b}


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


def student(freedom, p):
    """The p-quantile of Student's t. (scipy.stats has it, too, and takes a second to import.)"""
    from scipy.special import stdtrit
    return float(stdtrit(freedom, p))


def freedom(pairs):
    """Degrees of freedom of a mean over these pairs: one less than there are tasks or personas, whichever are fewer."""
    return min(len(set(ids)) for ids in zip(*pairs)) - 1


def interval_95(values, share=False):
    """The 95 % interval [low, high] of a mean over {(task, persona): value}: `sem_two_way` times Student's t. A share
    has Wilson's interval, which stays inside 0..1, for as many independent pairs as would have that standard error.
    None where that is None."""
    if (sem := sem_two_way(values)) is None:
        return None
    mean, q = sum(values.values()) / len(values), student(freedom(values), 0.975)
    if not share:
        return [float(mean - q * sem), float(mean + q * sem)]
    n = mean * (1 - mean) / sem ** 2 if sem else len(values)
    half = q * math.sqrt(mean * (1 - mean) / n + q * q / (4 * n * n))
    low, high = ((mean + q * q / (2 * n) + side) / (1 + q * q / n) for side in (-half, half))
    return [max(0.0, float(low)), min(1.0, float(high))]


def smallest_difference(values):
    """The smallest true mean that a two-sided test at .05 finds in .8 of all studies like this one: (t_.975 + t_.8) x
    SEM, clustered, in the values' unit (Bloom 1995). None where the SEM is None."""
    sem = sem_two_way(values)
    return None if sem is None else (student(freedom(values), 0.975) + student(freedom(values), 0.8)) * sem


def power(pairs, personas):
    """The smallest win rate above one half that a study can show.

    In 8 of 10 such studies, at the 5 % level: .5 + (t_.975 + t_.8) x SEM with personas - 1 degrees of freedom. Verdicts
    on one persona resemble one another: correlation r multiplies the variance by 1 + (pairs / personas - 1) r.

    Bloom 1995; the design effect of Kish 1965."""
    if not 1 < personas <= pairs:
        fail("--power PAIRS PERSONAS: at least two personas, and as many pairs.")
    for r in (0.0, 0.02, 0.05, 0.1, 0.2):
        sem = 0.5 * math.sqrt((1 + (pairs / personas - 1) * r) / pairs)
        smallest = 0.5 + sem * sum(student(personas - 1, p) for p in (0.975, 0.8))
        yield {"pairs": str(pairs), "personas": str(personas), "r": f"{r:g}", "SEM": f"{sem:.3f}",
               "smallest": f"{smallest:.3f}" if smallest <= 1 else "none"}


def jackknife(statistic, values):
    """(estimate, its 95 % interval or None) of statistic(list of values), for any {(task, persona): value}. A pair's
    pseudo-value, n estimate - (n - 1) statistic(all others), is its share in the estimate (Tukey 1958); the interval is
    that of a mean of these, clustered. Both are None where the statistic is, or is not defined without some pair."""
    n, estimate = len(values), statistic(list(values.values()))
    others = {pair: statistic([values[other] for other in values if other != pair]) for pair in values}
    if estimate is None or None in others.values():
        return estimate, None
    pseudo = {pair: n * estimate - (n - 1) * other for pair, other in others.items()}
    sem = sem_two_way(pseudo)
    half = None if sem is None else student(freedom(pseudo), 0.975) * sem
    return estimate, None if half is None else [estimate - half, estimate + half]


def length_controlled(outcomes):
    """The log-odds a of a win if both answers had the same length. [(points, difference of length)], points 1, .5 or 0
    -> a in the logistic regression

        log(p / (1 - p)) = a + b x difference / its standard deviation;    a tie counts as half a win

    fitted by Newton's method, with a ridge of .01 on b, which would grow for ever where longer answers always win.
    (After Dubois et al. 2024, without their tanh, and their terms for models and instructions.) None where all lengths
    are the same, or all verdicts."""
    points, difference = np.array(outcomes, dtype=float).reshape(-1, 2).T
    if len(points) < 3 or difference.std() == 0:
        return None
    x = np.stack([np.ones(len(points)), difference / difference.std()], axis=1)
    weights, ridge = np.zeros(2), np.diag([0.0, 0.01])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        curvature = x.T @ (x * (p * (1 - p))[:, None]) + ridge
        if np.linalg.cond(curvature) > 1e8:                     # a grows for ever
            return None
        step = np.linalg.solve(curvature, x.T @ (points - p) - ridge @ weights)
        weights = weights + step
        if abs(step).max() < 1e-10:
            return float(weights[0])
    return None


def share_of(log_odds):
    """p = 1 / (1 + exp(-log_odds)), also of an interval's ends; None of None."""
    if isinstance(log_odds, list):
        return [share_of(end) for end in log_odds]
    return None if log_odds is None else 1 / (1 + math.exp(-log_odds))


def kappa(verdicts):
    """Cohen's kappa of [(one judge's verdict, another's)]: (agreement - agreement by chance) / (1 - that by chance)
    (Cohen 1960). None where both always say the same."""
    n = len(verdicts)
    first, second = (Counter(column) for column in zip(*verdicts)) if n else (Counter(), Counter())
    chance = sum(first[v] * second[v] for v in first) / max(1, n * n)
    return None if chance == 1 or n == 0 else (sum(a == b for a, b in verdicts) / n - chance) / (1 - chance)


# ---------------------------------------------------------------- tables

class Table(NamedTuple):
    title: str
    head: list
    rows: list                                                  # of lists of texts
    notes: tuple = ()                                           # what is measured, from which files


TITLES = {"gold_log_prob": "Log-probability of the gold responses under Q_BASE (nats; mean ± SEM over pairs)",
          "gold_log_prob_gain": "Gain in gold log-probability over Q_BASE (nats; mean ± SEM of paired differences)",
          "win_rate": "Win rate against Q_BASE (wins + half the ties, ± SEM, over readable verdicts)"}


def table(results, metric, title, cell=None):
    """The paper's table for one metric, or None: a line for each condition, variant and Roleplayer, a column for each
    iteration. Q_BASE stands in the first column of `main`. cell: a function from a row to its text."""
    rows = [row for row in results if row["metric"] == metric]
    if not rows:
        return None
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
    return Table(f"{title}; n = {' to '.join(map(str, sorted({min(numbers), max(numbers)})))}",
                 ["", *(f"t={t}" if t else "Q_BASE" for t in iterations)],
                 [[label or condition, *(line.get(t, "") for t in iterations)]
                  for (condition, label), line in lines.items() if label or condition])


def tables(results):
    """The tables of all metrics; after those of differences and win rates their 95 % intervals."""
    found = {row["metric"]: row.get("title", row["metric"]) for row in results}
    titles = {**found, **{metric: title for metric, title in TITLES.items() if metric in found}}
    for metric in sorted(titles, key=lambda metric: [*TITLES].index(metric) if metric in TITLES else -1):
        yield table(results, metric, titles[metric])
        if metric in ("gold_log_prob_gain", "win_rate"):
            title = f"{titles[metric].split(' (')[0]}: 95 % intervals, clustered by task and persona"
            yield table(results, metric, title,
                        lambda row: "{:.2f} to {:.2f}".format(*row["interval_95"]) if row.get("interval_95") else "-")


def cell(estimate, interval, digits=2):
    """ "0.69 (0.55 to 0.80)" """
    bounds = " ({:.{d}f} to {:.{d}f})".format(*interval, d=digits) if interval else ""
    return "-" if estimate is None else f"{estimate:.{digits}f}{bounds}"


def mean(values, digits=2, share=False):
    """The same of {(task, persona): value}."""
    return cell(sum(values.values()) / len(values), interval_95(values, share), digits) if values else "-"


def as_table(function, *args):
    """The Table of a generator of {column: text}, or None. Its docstring tells the title and the notes."""
    rows = list(function(*args))
    head, (title, *notes) = list(dict.fromkeys(name for row in rows for name in row)), getdoc(function).split("\n\n")
    return Table(title.rstrip("."), head, [[row.get(name, "") for name in head] for row in rows],
                 tuple(" ".join(note.split()) for note in notes)) if rows else None


def as_text(table):
    """Lines of a table for a terminal."""
    width = max(len(row[0]) for row in table.rows)
    return ["", table.title, *("".join([f"{first:<{width}}", *(f"{text:>16}" for text in more)]).rstrip()
                               for first, *more in [table.head, *table.rows])]
