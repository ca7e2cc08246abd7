"""The pictures of report.py, like the paper's figures 3 to 7, from the means in results.jsonl and each training's log.

Lines differ in colour, marker and dash, so that they can be told apart in grey and by the colour-blind.
"""
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

from report.stats import CONDITIONS

matplotlib.use("Agg")                                           # draws into files, without a screen
from matplotlib import pyplot  # noqa: E402


ANSWERED = ("base_answers", "base_questions", "base_hidden")    # who answers on whose conversations
# name: (metric, title, row of results.jsonl -> is it drawn, row -> its line)
PICTURES = {
    "win_rates": ("win_rate", "Win rate against Q_BASE",
                  lambda row: row["first_user"] and row["variant"] not in ANSWERED,
                  lambda row: row["variant"]),
    "users": ("win_rate", "Win rate of main with other users",
              lambda row: row["several_users"] and row["variant"] == "main", lambda row: row["roleplayer"]),
    "attribution": ("win_rate", "Win rate, by who asks and who answers",
                    lambda row: row["first_user"] and row["variant"] in ("main", *ANSWERED),
                    lambda row: row["variant"]),
    "log_probs": ("gold_log_prob", "Log-probability of the gold response (nats), main",
                  lambda row: row["first_user"] and row["variant"] == "main", lambda row: CONDITIONS[row["condition"]]),
    "coverage": ("coverage", "What the user told, of what matters for the task (share)",
                 lambda row: row["first_user"], lambda row: row["variant"]),
    "gains": ("gold_log_prob_gain", "Gain in log-probability of the gold over Q_BASE (nats)",
              lambda row: row["first_user"] and (row["condition"], row["variant"]) in (
                  ("q_random", "main"), ("q_experimental", row["variant"])),
              lambda row: row["variant"] + ", another user's" * (row["condition"] == "q_random")),
    "variants": ("gold_log_prob", "Log-probability of the gold after the own conversation (nats)",
                 lambda row: row["first_user"] and row["condition"] == "q_experimental",
                 lambda row: row["variant"])}
FROM = {"win_rate": 0.5, "gold_log_prob_gain": 0}               # where Q_BASE, compared with itself, stands
STYLES = list(zip("#000000 #D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9".split(), "osD^vPX",
                  ("-", "--", "-.", ":", "-", "--", "-.")))


def lines_of(results, name, user):
    """{line: [row of results.jsonl, in order of t]} of a picture; user: the one of training. A win rate begins at one
    half, a gain at 0, every other variant's log-probability at Q_BASE's."""
    metric, _, drawn, line = PICTURES[name]
    several = len({row["roleplayer"] for row in results}) > 1
    rows = [{**row, "first_user": row["roleplayer"] == user, "several_users": several}
            for row in results if row["metric"] == metric and row["mean"] is not None]

    def order(row):
        return row["variant"] != "main", row["variant"], list(CONDITIONS).index(row["condition"]), row["iteration"]

    lines = defaultdict(list)
    for row in sorted(filter(drawn, rows), key=order):
        lines[line(row)].append(row)
    start = {"mean": FROM[metric], "iteration": 0} if metric in FROM else lines.get("main", [{}])[0]
    return {name: of if of[0]["iteration"] == 0 or not start else [start, *of] for name, of in lines.items()}


def panel(axes, lines, styles, chance=None):
    """Draws one line each, with its 95 % intervals, or standard errors where the rows have no interval."""
    last = max(row["iteration"] for of in lines.values() for row in of)
    for i, (line, of) in enumerate(lines.items()):
        (colour, marker, dash), mean = styles[line], [row["mean"] for row in of]
        t = [row["iteration"] + 0.03 * i for row in of]         # beside one another, so that no interval hides another
        low, high = zip(*(row.get("interval_95") or [row["mean"] + sign * (row.get("sem") or 0) for sign in (-1, 1)]
                          for row in of))
        if "control" in line:                                   # measured once: it knows no iteration
            axes.axhline(mean[0], color=colour, linestyle=dash, label=line)
        else:
            axes.errorbar(t, mean, [[m - x for m, x in zip(mean, low)], [x - m for m, x in zip(mean, high)]],
                          color=colour, marker=marker, linestyle=dash, label=line, capsize=3)
    if chance is not None:
        axes.axhline(chance, color="#999999", linewidth=1, zorder=0)
    axes.set_xticks(range(last + 1), ["Q_BASE", *(f"t={t}" for t in range(1, last + 1))])


def training_curves(run):
    """{variant: {t: its losses, step by step}} from each model's log.jsonl."""
    curves = defaultdict(dict)
    for path in sorted(Path(run).glob("*/[0-9]*/model/log.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        curves[path.parts[-4]][int(path.parts[-3])] = [row["loss"] for row in rows if "loss" in row]
    return curves


def draw(folder, results, run, user, published=()):
    """Writes FOLDER/NAME.png and .svg; returns {name: title} of the pictures for which there is something to draw."""
    pyplot.rcParams.update({"svg.hashsalt": "", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    drawn = {}

    def save(figure, axes, name, title, **where):
        for ax in axes:
            ax.legend(frameon=False, fontsize=9, **where)
        figure.suptitle(title, fontsize=12)
        for kind, more in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            figure.savefig(folder / f"{name}.{kind}", **more)
        pyplot.close(figure)
        drawn[name] = title

    for name, (metric, title, *_) in PICTURES.items():
        panels = {"this run": lines_of(results, name, user),
                  "the paper": lines_of(published, name, "mixtral-8x7b") if published else {}}
        panels = {where: lines for where, lines in panels.items() if lines}
        if "this run" in panels and (name != "attribution" or len(panels["this run"]) > 1):
            styles = dict(zip(dict.fromkeys(line for lines in panels.values() for line in lines), 3 * STYLES))
            figure, axes = pyplot.subplots(len(panels), figsize=(5.5, 4 * len(panels)), squeeze=False,
                                           layout="constrained")
            for ax, (where, lines) in zip(axes[:, 0], panels.items()):
                panel(ax, lines, styles, FROM.get(metric))
                ax.set_title(where if published else "", fontsize=10)
            save(figure, axes[:, 0], name, title, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    if curves := training_curves(run):
        figure, axes = pyplot.subplots(len(curves), figsize=(5.5, 1 + 2 * len(curves)), squeeze=False, sharex=True,
                                       sharey=True, layout="constrained")
        for ax, (variant, of) in zip(axes[:, 0], curves.items()):
            for (t, losses), (colour, _, dash) in zip(sorted(of.items()), 3 * STYLES):
                ax.plot(range(1, len(losses) + 1), losses, color=colour, linestyle=dash, linewidth=1,
                        label=f"{variant}, t={t}")
            ax.set_ylabel("nats a token")
        axes[-1, 0].set_xlabel("step")
        save(figure, axes[:, 0], "training", "Training loss")
    return drawn
