"""What the paper found, and whether it holds in runs of the embedded world.

    python toy/check.py runs/toy
    python toy/check.py runs/seed-100 runs/seed-101 runs/seed-102       # runs that differ in their seed

report/report.py shows the means, those of several runs, too.
"""
import argparse
import re
import statistics
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
from common import PAIR, fail, read_rows, read_settings, write_whole  # noqa: E402
from evaluate import read_results  # noqa: E402


def findings(rows, user="roleplayer"):
    """Results of one run -> [(what the paper found, does it hold, the figures)] for the variants that were run; None
    where something was not measured.

    The thresholds were fixed on the dev split. The controls are allowed a quarter of main's gain, since fine-tuning on
    a few hundred conversations moves relevance by some .05 by itself (docs/NOTES.md).
    """
    cells = {(row["variant"], row["iteration"], row["metric"], row["condition"]): row
             for row in rows if row["roleplayer"] == user}
    ran, T = {variant for variant, t, _, _ in cells if t}, max((t for _, t, _, _ in cells), default=0)

    def mean(variant, t, metric, condition=""):
        return cells[variant, t, metric, condition]["mean"]

    def each(variant, metric, condition=""):
        return [mean(variant, t, metric, condition) for t in range(1, T + 1)]

    def listed(values, digits=3):
        return ", ".join(f"{value:.{digits}f}" for value in values)

    def rise(variant):
        return mean(variant, T, "relevant_share") - mean("main", 0, "relevant_share")

    def specific(variant):
        """Gain in the gold's log-probability beyond what the conversation with another user gains."""
        return (mean(variant, T, "gold_log_prob_gain", "q_experimental")
                - mean(variant, T, "gold_log_prob_gain", "q_random"))

    def gold_gains():
        row = cells["main", T, "gold_log_prob_gain", "q_experimental"]
        low, high = row["interval_95"]
        return row["mean"] > 3 * row["sem"], f"{row['mean']:.2f} ({low:.2f} to {high:.2f}) nats at t = {T}"

    def relevance_rises():
        before, after = mean("main", 0, "relevant_share"), mean("main", T, "relevant_share")
        return after >= 1.5 * before, f"{before:.3f} -> {after:.3f}"

    def order():
        ours, others = each("main", "gold_log_prob", "q_experimental"), each("main", "gold_log_prob", "q_random")
        positive = mean("main", 0, "gold_log_prob", "positive_control")
        return (all(positive > right > wrong for right, wrong in zip(ours, others)),
                f"{positive:.2f} > {listed(ours, 2)} > {listed(others, 2)}")

    def main_wins():
        best = max(range(1, T + 1), key=lambda t: mean("main", t, "win_rate"))
        interval = cells["main", best, "win_rate", ""]["interval_95"]
        return (mean("main", best, "win_rate") >= 0.6 and interval[0] > 0.5,
                f"{listed(each('main', 'win_rate'))}; t = {best}: 95 % interval {listed(interval)}")

    def no_reg_asks():
        asks, wins = each("no_reg", "question_share"), each("no_reg", "win_rate")
        return min(asks) > 0.5 and max(wins) < 0.35, f"questions {listed(asks)}; wins {listed(wins)}"

    def gold_invents():
        facts, wins = ([each(variant, metric) for variant in ("gold", "main")]
                       for metric in ("invented_facts", "win_rate"))
        return (all(gold > main for gold, main in zip(*facts)) and all(gold < main for gold, main in zip(*wins)),
                f"invents {listed(facts[0])}, main {listed(facts[1])}; wins {listed(wins[0])}")

    def gains_little(control):
        return (0 < rise("main") > 4 * rise(control) and 0 < specific("main") > 4 * specific(control),
                f"relevance {rise(control):+.3f}, main {rise('main'):+.3f}; person-specific gain "
                f"{specific(control):.2f} nats, main {specific('main'):.2f}; wins {listed(each(control, 'win_rate'))}")

    def compared(variant, other, sign):
        """Whether a variant's conversations make the golds more (sign 1) or less (-1) probable than another's."""
        both = [each(name, "gold_log_prob", "q_experimental") for name in (variant, other)]
        return (all(sign * a > sign * b for a, b in zip(*both)), f"{listed(both[0], 2)}; {other} {listed(both[1], 2)}")

    def random_rises():
        before, after = mean("main", 0, "gold_log_prob", "q_random"), each("main", "gold_log_prob", "q_random")
        return min(after) > before, f"{before:.2f} -> {listed(after, 2)}"

    def gold_loses():
        wins = each("gold", "win_rate")
        return max(wins) < 0.5, listed(wins)

    def base_answers_even():
        wins = each("base_answers", "win_rate")
        return max(abs(win - 0.5) for win in wins) < 0.08, listed(wins)         # the paper: .542, .571, .495

    checks = [
        ("the gold becomes more probable, by more than 3 clustered SEM", {"main"}, gold_gains),
        ("relevant questions rise by half", {"main"}, relevance_rises),
        ("positive control > Q-Experimental > Q-Random at every t", {"main"}, order),
        ("main wins at least .60 at its best", {"main"}, main_wins),
        ("no_reg mostly answers with a question, wins under .35", {"no_reg"}, no_reg_asks),
        ("gold invents more facts than main, wins less", {"gold", "main"}, gold_invents),
        ("control: selected at random, hardly any of main's gain", {"random", "main"}, lambda: gains_little("random")),
        ("control: selected by others' golds, hardly any", {"permuted", "main"}, lambda: gains_little("permuted")),
        # What else the paper found. The toy was not made to show these, and does not show most of them.
        ("Q-Random rises, too, above Q_BASE's at every t", {"main"}, random_rises),
        ("no_reg's conversations gain less than main's", {"no_reg", "main"}, lambda: compared("no_reg", "main", -1)),
        ("gold's conversations gain more than main's", {"gold", "main"}, lambda: compared("gold", "main", 1)),
        ("gold loses against Q_BASE at every t", {"gold"}, gold_loses),
        ("Q_BASE's answers on Q_t's conversations are about even", {"base_answers", "main"}, base_answers_even),
    ]
    found = []
    for what, variants, check in checks:
        if variants <= ran:
            try:
                found.append((what, *check()))
            except (KeyError, TypeError):  # an iteration that was not reached; a mean of one pair, without SEM
                found.append((what, None, "not measured at every t, or with too few pairs"))
    return found


def outcomes(run, split):
    """{(folder, t): (shares won, tied, lost)} of the judge's verdicts, by the scores that it names. It must say A or B,
    so it settles a tie by a hash; here a tie is a tie."""
    found = {}
    for path in Path(run).glob(f"*/[0-9]*/{split}/verdicts.jsonl"):
        points = []
        for row in read_rows(path, {**PAIR, "order": str}, {"raw": str}):
            if scores := re.search(r"response A scores (-?\d+), response B scores (-?\d+)", row["raw"]):
                a, b = map(int, scores.groups())
                points.append((a > b) - (a < b) if row["order"] == "ours_first" else (b > a) - (b < a))
        if points:
            found[path.parts[-4], int(path.parts[-3])] = tuple(points.count(x) / len(points) for x in (1, 0, -1))
    return found


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that run.sh wrote")
    parser.add_argument("--split", default="test", help="of the tasks and personas")
    parser.add_argument("--output", metavar="FILE", help="gets what is printed, too: the --notes of report.py")
    return parser.parse_args()


def main():
    args = parse_args()
    runs = {run: [row for row in read_results(f"{run}/results.jsonl") if row["split"] == args.split]
            for run in args.runs}
    for run, rows in runs.items():
        if not any(row["iteration"] for row in rows):
            fail(f"{run}/results.jsonl: no results of an iteration on split {args.split}. Run `RUN={run} bash run.sh`.")
    shares = [outcomes(run, args.split) for run in runs]
    lines = ["", "By the judge's scores: won, tied, lost, and the win rate with ties as halves (means over the runs)"]
    for variant, t in sorted(set.intersection(*map(set, shares)), key=lambda key: (key[0] != "main", key)):
        won, tied, lost = (statistics.mean(column) for column in zip(*(share[variant, t] for share in shares)))
        lines.append(f"{variant}, t = {t}: {won:.3f} {tied:.3f} {lost:.3f}  {won + tied / 2:.3f}")
    for run, rows in runs.items():
        lines += ["", f"Does it hold in {run}?"]
        user = read_settings(f"{run}/base/{args.split}/log_probs.jsonl").get("roleplayer", "roleplayer")
        for what, holds, figures in findings(rows, user):
            line = f"{ {True: 'yes', False: 'NO ', None: '-- '}[holds]}  {what}: {figures}"
            lines.append(textwrap.fill(line, 100, subsequent_indent=" " * 5))
    print(*lines, sep="\n")
    if args.output:
        write_whole(args.output, "\n".join(lines).lstrip() + "\n")


if __name__ == "__main__":
    main()
