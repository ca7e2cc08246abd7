"""The table of an ALOE run, in the paper's shape, and AL over the rounds as a picture.

    python aloe/report.py runs/aloe/toy
    python aloe/report.py runs/aloe/seed-100 runs/aloe/seed-101     # of several runs: means, ± the standard deviation

    reads   RUN/results.jsonl           the rows of evaluate.py (and toy/measure.py)
    writes  RUN/report/al-T0.png, .svg  a picture for each temperature, if matplotlib is there (report/requirements.txt)
"""
import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first: there, too, is a report.py
from aloe.evaluate import table  # noqa: E402
from common import fail, run  # noqa: E402
from evaluate import read_results  # noqa: E402


def curves(results, condition):
    """{model: [AL(1), ..., AL(K)]} at one temperature."""
    return {row["variant"]: row["by_round"] for row in results
            if row["metric"] == "AL" and row["condition"] == condition}


PAPER = ("base", "sft", "sft_dpo", "rejected")                  # table 1's rows; all others are controls
COLUMNS = ("AL", "IR", "N-IR", "R2", "fitting_manners", "used_facts", "invented_facts")


def over_seeds(runs):
    """[results of a run, ...] -> lines: a line a model and temperature, each mean over the runs ± its standard
    deviation; "-" where a run has none, as a flat curve has no N-IR."""
    values = defaultdict(list)
    for row in (row for results in runs for row in results):
        values[f"{row['variant']} {row['condition']}", row["metric"]].append(row["mean"])
    models, columns = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    lines = [f"{'':<16}" + "".join(f"{name:>17}" for name in COLUMNS if name in columns)]
    for model in models:
        cells = [values.get((model, name), [None]) for name in COLUMNS if name in columns]
        cells = ["-" if None in means or len(means) < 2 else
                 f"{statistics.mean(means):.3f} ± {statistics.stdev(means):.3f}" for means in cells]
        lines.append(f"{model:<16}" + "".join(f"{cell:>17}" for cell in cells))
    return lines


def draw(results, folder):
    """Writes a picture for each temperature; returns their names."""
    from report.pictures import STYLES, pyplot
    names = []
    for condition in dict.fromkeys(row["condition"] for row in results if row["metric"] == "AL"):
        lines = curves(results, condition)
        panels = [{model: lines[model] for model in lines if (model in PAPER) == own} for own in (True, False)]
        panels = {title: panel for title, panel in zip(("Alignment with the user", "Controls"), panels) if panel}
        size = (5.5, 4.5 * len(panels))
        figure, axes = pyplot.subplots(len(panels), figsize=size, squeeze=False, layout="constrained")
        for ax, (title, panel) in zip(axes[:, 0], panels.items()):
            for (model, al), (colour, marker, dash) in zip(panel.items(), 3 * STYLES):
                ax.plot(range(1, len(al) + 1), al, color=colour, marker=marker, linestyle=dash, markersize=4,
                        label=model)
            ax.set(xlabel="round k", ylabel="AL(k)", ylim=(1, 5), title=f"{title} ({condition})")
            ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
        names.append(f"al-{condition.replace('=', '')}")
        figure.savefig(folder / f"{names[-1]}.png", dpi=150)
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
    print(*(table(runs[0]) if len(runs) == 1 else over_seeds(runs)), sep="\n")
    try:
        for run, results in zip(args.runs, runs):
            folder = Path(run, "report")
            folder.mkdir(exist_ok=True)
            print(f"{folder}: pictures {', '.join(draw(results, folder))}")
    except ModuleNotFoundError as error:
        print(f"\nNo pictures: {error}. `pip install -r report/requirements.txt` brings matplotlib.")


if __name__ == "__main__":
    run(main)
