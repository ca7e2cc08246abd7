"""The table of an ALOE run, in the paper's shape, and AL over the rounds as a picture.

    python aloe/report.py runs/aloe/toy

    reads   RUN/results.jsonl           the rows of evaluate.py
    writes  RUN/report/al-T0.png, .svg  a picture for each temperature, if matplotlib is there (requirements-report.txt)
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first: there, too, is a report.py
from aloe.evaluate import table  # noqa: E402
from common import fail, run  # noqa: E402
from results import read_results  # noqa: E402


def curves(results, condition):
    """{model: [AL(1), ..., AL(K)]} at one temperature."""
    return {row["variant"]: row["by_round"] for row in results
            if row["metric"] == "AL" and row["condition"] == condition}


def draw(results, folder):
    """Writes a picture for each temperature; returns their names."""
    from pictures import STYLES, pyplot
    names = []
    for condition in dict.fromkeys(row["condition"] for row in results if row["metric"] == "AL"):
        figure, axes = pyplot.subplots(figsize=(5.5, 4.5), layout="constrained")
        for (model, al), (colour, marker, dash) in zip(curves(results, condition).items(), 3 * STYLES):
            axes.plot(range(1, len(al) + 1), al, color=colour, marker=marker, linestyle=dash, markersize=4, label=model)
        axes.set(xlabel="round k", ylabel="AL(k)", ylim=(1, 5), title=f"Alignment with the user ({condition})")
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
        names.append(f"al-{condition.replace('=', '')}")
        figure.savefig(folder / f"{names[-1]}.png", dpi=150)
        figure.savefig(folder / f"{names[-1]}.svg", metadata={"Date": None})
        pyplot.close(figure)
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a folder that aloe/run.sh wrote")
    parser.add_argument("--split", default="test", help="of the personas")
    args = parser.parse_args()
    results = [row for row in read_results(f"{args.run}/results.jsonl") if row["split"] == args.split]
    if not any(row["metric"] == "AL" for row in results):
        fail(f"{args.run}/results.jsonl: no results on split {args.split}. aloe/evaluate.py writes them.")
    print(*table(results), sep="\n")
    try:
        folder = Path(args.run, "report")
        folder.mkdir(exist_ok=True)
        print(f"\n{folder}: pictures {', '.join(draw(results, folder))}")
    except ModuleNotFoundError as error:
        print(f"\nNo pictures: {error}. `pip install -r requirements-report.txt` brings matplotlib.")


if __name__ == "__main__":
    run(main)
