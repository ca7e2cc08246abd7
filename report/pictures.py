"""The pictures of report.py. Lines differ in colour, marker and dash, so that they can be told apart in grey and by the
colour-blind; each colour has a contrast of 3:1 on white, or more."""
from itertools import zip_longest

import matplotlib

matplotlib.use("Agg")                                           # draws into files, without a screen
from matplotlib import pyplot  # noqa: E402

pyplot.rcParams.update({"svg.hashsalt": "", "axes.spines.top": False, "axes.spines.right": False})
STYLES = list(zip("#000000 #D55E00 #0072B2 #008F68 #B5568B #8A6100 #5E4FA2".split(), "osD^vPX",
                  ("-", "--", "-.", ":", "-", "--", "-.")))


def panel(axes, lines, styles, tick):
    """Draws {line: [(t, mean, low, high)]} with the intervals. What was measured once holds for every t."""
    first = min(of[0][0] for of in lines.values())
    for i, (line, of) in enumerate(lines.items()):
        (colour, marker, dash), (t, mean, low, high) = styles[line], zip(*of)
        if len(of) == 1:
            axes.axhline(mean[0], color=colour, linestyle=dash, label=line)
        else:                                                   # beside one another: no interval hides another
            bars = [m - y for m, y in zip(mean, low)], [y - m for m, y in zip(mean, high)]
            axes.errorbar([x + 0.03 * i for x in t], mean, bars, color=colour, marker=marker, linestyle=dash, capsize=3,
                          label=line)
            ticks = range(first, t[-1] + 1)
            axes.set_xticks(ticks, [tick.format(x) if x else "Q_BASE" for x in ticks])


def draw(folder, pictures):
    """{name: (title, middle, a tick, {panel: {line: [(t, mean, low, high)]}})}: writes FOLDER/NAME.svg of each that
    has a line; returns {name: what is seen, in words}. tick: "t={}"; that of t = 0 is "Q_BASE"."""
    seen = {}
    for name, (title, middle, tick, panels) in pictures.items():
        panels = {what: {line: of for line, of in lines.items() if len(of) > 1 or "control" in line and of}
                  for what, lines in panels.items() if any(len(of) > 1 for of in lines.values())}
        if panels:
            lines, n = dict.fromkeys(line for lines in panels.values() for line in lines), len(panels)
            rows = -(-n // (columns := 2 if n == 4 else min(3, n)))
            figure, axes = pyplot.subplots(rows, columns, squeeze=False, sharey=True, layout="constrained",
                                           figsize=(max(6.5, 3.6 * columns), 0.8 + 2.6 * rows))
            for ax, what in zip_longest(axes.flat, panels):
                if not what:
                    ax.set_axis_off()
                    continue
                panel(ax, panels[what], dict(zip(lines, 5 * STYLES)), tick)
                ax.set_title(what)
                if middle is not None:
                    ax.axhline(middle, color="#767676", linewidth=1, zorder=0)
            of = {line: drawn for ax in axes.flat for drawn, line in zip(*ax.get_legend_handles_labels())}
            figure.legend(of.values(), of, loc="outside lower center", ncols=3, frameon=False)
            figure.suptitle(title)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)
            seen[name] = f"{title}. At the end: " + "; ".join(
                f"{what}, {line}: {of[-1][1]:.2f}" for what, lines in panels.items() for line, of in lines.items())
    return seen
