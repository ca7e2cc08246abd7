"""Statistics of values over pairs, beyond those of evaluate.py, and tables.

A value belongs to a (task, persona) pair. Pairs that share a task or a persona are not independent: intervals are
clustered by both (`evaluate.clustered_sem`). An estimate that is no mean, such as a ratio, is given as {pair: value},
too: the estimate + the pair's influence on it. The values' mean is the estimate, their standard error its own.
"""
import math
import sys
from collections import Counter
from inspect import getdoc
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
from common import fail  # noqa: E402
from evaluate import by_pair, interval_95, quantile  # noqa: E402


def of_pairs(values):
    """{(task, persona, ...): value} or such pairs -> {(task, persona): mean}"""
    items = values.items() if isinstance(values, dict) else values
    return by_pair([{"task_id": key[0], "persona_id": key[1], "value": float(value)} for key, value in items], "value")


def minus(a, b):
    return {pair: a[pair] - b[pair] for pair in a if pair in b}


def ratio(a, b):
    """sum(a) / sum(b) over the pairs of both; {} where sum(b) is not positive."""
    b = {pair: b[pair] for pair in a if pair in b}
    total, n = sum(b.values()), len(b)
    r = sum(a[pair] for pair in b) / total if total > 0 else 0
    return {pair: r + (a[pair] - r * x) * n / total for pair, x in b.items()} if total > 0 else {}


def kappa(first, second):
    """Cohen's kappa of two judges' {pair: verdict}: (agreement - that by chance) / (1 - that by chance). {} where both
    always say the same. (Cohen 1960.)"""
    pairs = [pair for pair in first if pair in second]
    n, says, other = len(pairs), Counter(first[pair] for pair in pairs), Counter(second[pair] for pair in pairs)
    chance = sum(says[v] * other[v] for v in says) / max(1, n * n)
    agreed = sum(first[pair] == second[pair] for pair in pairs) / max(1, n)
    k = (agreed - chance) / (1 - chance) if chance < 1 else 0
    return {pair: k + ((first[pair] == second[pair]) - agreed - (1 - k) * (
        (other[first[pair]] + says[second[pair]]) / n - 2 * chance)) / (1 - chance) for pair in pairs if chance < 1}


def agreement(first, second):
    """Two judges of the same, {(task, persona): verdict} each -> {"agreement", "kappa", "pairs": text}, for the pairs
    that both have judged. A verdict may be of any kind, such as 1.0 or "ours"."""
    same = {pair: float(verdict == second[pair]) for pair, verdict in first.items() if pair in second}
    return {"agreement": mean(same, share=True), "kappa": mean(kappa(first, second), most=1), "pairs": str(len(same))}


def length_controlled(points, longer):
    """The win rate if both answers had the same length: points = a + b x difference by least squares, at difference 0.
    points: {pair: 1, .5 or 0}, longer: {pair: difference of length}. {} where a difference of 0 lies outside what was
    observed, or all lengths or all verdicts are the same. (Dubois et al. 2024 fit a logistic curve to many models.)"""
    pairs = [pair for pair in points if pair in longer]
    y, x = (np.array([values[pair] for pair in pairs], dtype=float) for values in (points, longer))
    if not pairs or not x.std() or not y.std() or not x.min() <= 0 <= x.max():
        return {}
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
    rest = y - y.mean() - slope * (x - x.mean())                # a = mean of y - b x mean of x; b depends on x, too
    return dict(zip(pairs, (y.mean() - slope * x.mean() + rest * (1 - (x - x.mean()) * x.mean() / x.var())).tolist()))


def power(pairs, personas):
    """The smallest win rate above one half that a study can show.

    In 8 of 10 such studies, at the 5 % level: .5 + (t_.975 + t_.8) x SEM, where t_p is the p-quantile of Student's t
    with personas - 1 degrees of freedom, SEM the standard error of the win rate. r: the correlation of two verdicts on
    a persona, not known before the run; it multiplies the variance by 1 + (pairs / personas - 1) r.

    Bloom 1995; Kish 1965."""
    if not 1 < personas <= pairs:
        fail("--power PAIRS PERSONAS: at least two personas, and as many pairs.")
    for r in (0.0, 0.02, 0.05, 0.1, 0.2):
        sem = 0.5 * math.sqrt((1 + (pairs / personas - 1) * r) / pairs)
        smallest = 0.5 + sem * sum(quantile([(i, i) for i in range(personas)], p) for p in (0.975, 0.8))
        yield {"pairs": str(pairs), "personas": str(personas), "r": f"{r:g}", "SEM": cell(sem, share=True),
               "smallest": cell(smallest, share=True) if smallest <= 1 else "none"}


# ---------------------------------------------------------------- tables

class Table(NamedTuple):
    title: str
    head: list
    rows: list                                                  # of lists of texts
    notes: list                                                 # what is measured, from which files


def cell(estimate, interval=None, digits=2, share=False):
    """ "3.46 (2.28 to 4.64)", or as a share "67.2 % (52.1 to 79.4)"; "-" where there is none."""
    if estimate is None:
        return "-"
    scale, digits = (100, 1) if share else (1, digits)
    first, *ends = (f"{round(scale * x, digits) + 0.0:.{digits}f}" for x in (estimate, *(interval or ())))     # no -0.0
    return first + " %" * bool(share) + (" ({} to {})".format(*ends) if ends else "")


def mean(values, digits=2, share=False, most=math.inf):
    """The same of {(task, persona): value}. share="difference": not Wilson's interval; most: no end is beyond."""
    interval = values and interval_95(values, share is True)
    return cell(sum(values.values()) / len(values) if values else None,
                interval and [max(-most, interval[0]), min(most, interval[1])], digits, share)


def as_table(function, *args):
    """The Table of a generator of {column: text}, or None; empty columns go. Its docstring: title and notes."""
    rows, (title, *notes) = list(function(*args)), getdoc(function).split("\n\n")
    head = [name for name in dict.fromkeys(name for row in rows for name in row)
            if any(row.get(name) not in (None, "", "-") for row in rows)]
    return Table(title.rstrip("."), head, [[row.get(name, "") for name in head] for row in rows],
                 [" ".join(note.split()) for note in notes]) if rows else None


def as_text(table, columns=100):
    """Lines of a table for a terminal: its first columns, as many as have room; the others are named."""
    lines = [table.head, *table.rows]
    widths = [max(map(len, column)) + 2 for column in zip(*lines)]
    shown = max([i for i in range(1, len(widths) + 1) if sum(widths[:i]) <= columns + 2], default=1)
    more = [f"(on the page: {', '.join(table.head[shown:])})"] * (shown < len(widths))
    return [table.title, *("".join(map("{:<{}}".format, line[:shown], widths)).rstrip() for line in lines), *more]
