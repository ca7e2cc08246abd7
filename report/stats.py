"""Statistics of values over pairs, beyond those of evaluate.py, and tables.

A value belongs to a (task, persona) pair. Pairs that share a task or a persona are not independent: intervals are
clustered by both (`evaluate.clustered_sem`).
"""
import math
import sys
from collections import Counter, defaultdict
from inspect import getdoc
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
from common import fail  # noqa: E402
from evaluate import by_pair, clustered_sem, interval_95, quantile  # noqa: E402

CONDITIONS = {"q_experimental": "Q-Experimental", "q_random": "Q-Random", "negative_control": "negative control",
              "positive_control": "positive control", "": ""}


def of_pairs(values):
    """{(task, persona, ...): value} or such pairs -> {(task, persona): mean}"""
    items = values.items() if isinstance(values, dict) else values
    return by_pair([{"task_id": key[0], "persona_id": key[1], "value": float(value)} for key, value in items], "value")


def minus(a, b):
    return {pair: a[pair] - b[pair] for pair in a if pair in b}


def smallest_difference(values):
    """The smallest true mean that a two-sided test at .05 finds in .8 of all studies like this one: (t_.975 + t_.8) x
    SEM, clustered, in the values' unit (Bloom 1995). None where the SEM is None."""
    sem = clustered_sem(values)
    return None if sem is None else (quantile(values, 0.975) + quantile(values, 0.8)) * sem


def power(pairs, personas):
    """The smallest win rate above one half that a study can show.

    In 8 of 10 such studies, at the 5 % level: .5 + (t_.975 + t_.8) x SEM with personas - 1 degrees of freedom. Verdicts
    on one persona resemble one another: correlation r multiplies the variance by 1 + (pairs / personas - 1) r.

    Bloom 1995; the design effect of Kish 1965."""
    if not 1 < personas <= pairs:
        fail("--power PAIRS PERSONAS: at least two personas, and as many pairs.")
    for r in (0.0, 0.02, 0.05, 0.1, 0.2):
        sem = 0.5 * math.sqrt((1 + (pairs / personas - 1) * r) / pairs)
        smallest = 0.5 + sem * sum(quantile([(i, i) for i in range(personas)], p) for p in (0.975, 0.8))
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
    sem = clustered_sem(pseudo)
    half = None if sem is None else quantile(pseudo, 0.975) * sem
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


TITLES = {"gold_log_prob": "Log-probability of the gold responses under Q_BASE (nats; mean ± clustered SEM)",
          "gold_log_prob_gain": "Gain in gold log-probability (nats over Q_BASE, paired; mean ± clustered SEM, 95 % interval)",
          "win_rate": "Win rate against Q_BASE (wins + half the ties; mean ± clustered SEM, 95 % interval)"}


def table(results, metric, title):
    """The paper's table for one metric, or None: a line for each condition, variant and Roleplayer, a column for each
    iteration. Q_BASE stands in the first column of `main`. Intervals stand in brackets, if the title speaks of them."""
    rows = [row for row in results if row["metric"] == metric]
    if not rows:
        return None
    digits = 3 if metric.endswith(("rate", "share", "coverage")) else 2

    def text(row):
        spread = "" if row["sem"] is None else f" ± {row['sem']:.{digits}f}"
        if "interval" in title and row.get("interval_95"):
            spread += " ({:.2f} to {:.2f})".format(*row["interval_95"])
        return "-" if row["mean"] is None else f"{row['mean']:.{digits}f}{spread}"

    numbers, several = {row["n"] for row in rows}, len({row["roleplayer"] for row in rows}) > 1
    iterations = sorted({row["iteration"] for row in rows})
    lines = defaultdict(dict)                                   # (condition, label) -> {iteration: text}
    for row in sorted(rows, key=lambda row: (list(CONDITIONS).index(row["condition"]), row["variant"] != "main",
                                             row["variant"], row["roleplayer"])):
        condition, label = CONDITIONS[row["condition"]], ""
        if not row["condition"].endswith("control"):
            label = "  " * bool(condition) + row["variant"] + (f" ({row['roleplayer']})" if several else "")
            lines[condition, ""] = {}
        lines[condition, label][row["iteration"]] = text(row)
    return Table(f"{title}; n = {' to '.join(map(str, sorted({min(numbers), max(numbers)})))}",
                 ["", *(f"t={t}" if t else "Q_BASE" for t in iterations)],
                 [[label or condition, *(line.get(t, "") for t in iterations)]
                  for (condition, label), line in lines.items() if label or condition])


def tables(results):
    """The tables of all metrics: first those that evaluate.py does not know, such as toy/measure.py's."""
    others = {row["metric"]: row.get("title", row["metric"]) for row in results if row["metric"] not in TITLES}
    return [table(results, *metric) for metric in {**others, **TITLES}.items() if table(results, *metric)]


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
    lines = [table.head, *table.rows]
    first, *more = (max(map(len, column)) for column in zip(*lines))
    return ["", table.title, *("".join([f"{line[0]:<{first}}", *(f"{text:>{max(16, width + 3)}}" for text, width in zip(
        line[1:], more))]).rstrip() for line in lines)]
