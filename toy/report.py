"""The tables of a run, what the paper found and whether it holds here, and conversations before and after training.

    python toy/report.py runs/toy
    python toy/report.py runs/toy-100 runs/toy-101 runs/toy-102       # runs that differ in their seed

Of several runs: means over the seeds, ± the standard deviation between them. The findings are checked run by run.
"""
import argparse
import statistics
import sys
import textwrap
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

import measure

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the stages: appended, so that they shadow nothing
import evaluate  # noqa: E402
from common import (RESULT_KEY, fail, key_of, known, read_conversations, read_personas, read_results,  # noqa: E402
                    read_rows, read_tasks)

WIDTH = 58  # of a column of text


def over_seeds(runs):
    """[results of a run, ...] -> rows for `evaluate.table`: the mean of the runs' means, their standard deviation in the
    place of the SEM, and the number of runs. The results of a single run stay what they are."""
    if len(runs) == 1:
        return runs[0]
    means = defaultdict(list)
    for row in (row for rows in runs for row in rows):
        means[tuple(row[name] for name in RESULT_KEY)].append(row["mean"])
    return [{**dict(zip(RESULT_KEY, key)), "mean": statistics.mean(values), "n": len(values),
             "sem": statistics.stdev(values) if len(values) > 1 else None} for key, values in means.items()]


def findings(rows):
    """Results of one run -> [(what the paper found, does it hold, the figures)], for the variants that were run.

    The thresholds were fixed before the test split was looked at. T is the last iteration.
    """
    cells = {(row["variant"], row["iteration"], row["metric"], row["condition"]): row
             for row in rows if row["roleplayer"] == "roleplayer"}
    ran, T = {variant for variant, t, _, _ in cells if t}, max(t for _, t, _, _ in cells)

    def mean(variant, t, metric, condition=""):
        return cells[variant, t, metric, condition]["mean"]

    def each(variant, metric, condition=""):
        return [mean(variant, t, metric, condition) for t in range(1, T + 1)]

    def listed(values, digits=3):
        return ", ".join(f"{value:.{digits}f}" for value in values)

    def relevance(variant):
        return mean("main", 0, "relevant_share"), mean(variant, T, "relevant_share")

    def specific(variant):
        """Gain in the gold's log-probability beyond what the conversation of another user gains."""
        return (mean(variant, T, "gold_log_prob_gain", "q_experimental")
                - mean(variant, T, "gold_log_prob_gain", "q_random"))

    found = []
    if "main" in ran:
        gain = cells["main", T, "gold_log_prob_gain", "q_experimental"]
        found.append(("the gold becomes more probable, by 3 SEM and more", gain["mean"] > 3 * gain["sem"],
                      f"{gain['mean']:.2f} ± {gain['sem']:.2f} nats at t = {T}"))
        before, after = relevance("main")
        found.append(("relevant questions rise by half", after >= 1.5 * before, f"{before:.3f} -> {after:.3f}"))
        ours, others = each("main", "gold_log_prob", "q_experimental"), each("main", "gold_log_prob", "q_random")
        positive = mean("main", 0, "gold_log_prob", "positive_control")
        found.append(("positive control > Q-Experimental > Q-Random",
                      all(positive > right > wrong for right, wrong in zip(ours, others)),
                      f"{positive:.2f} > {listed(ours, 2)} > {listed(others, 2)}"))
        best = max((cells["main", t, "win_rate", ""] for t in range(1, T + 1)), key=lambda row: row["mean"])
        found.append(("main wins at least .60 at its best", best["mean"] >= 0.6 and best["interval_95"][0] > 0.5,
                      f"{listed(each('main', 'win_rate'))}; the best's 95 % interval: {listed(best['interval_95'])}"))
    if "no_reg" in ran:
        asks, wins = each("no_reg", "question_share"), each("no_reg", "win_rate")
        found.append(("no_reg mostly answers with a question, wins under .35", min(asks) > 0.5 and max(wins) < 0.35,
                      f"questions {listed(asks)}; wins {listed(wins)}"))
    if {"main", "gold"} <= ran:
        pairs = [list(zip(each("gold", metric), each("main", metric))) for metric in ("invented_facts", "win_rate")]
        found.append(("gold invents more facts than main, wins less",
                      all(gold > main for gold, main in pairs[0]) and all(gold < main for gold, main in pairs[1]),
                      f"invents {listed(each('gold', 'invented_facts'))}; main {listed(each('main', 'invented_facts'))}; "
                      f"wins {listed(each('gold', 'win_rate'))}"))
    for control in ("random", "permuted"):
        if {"main", control} <= ran:  # a fourth: fine-tuning alone, on so few examples, moves relevance by some .05
            (before, after), (_, trained) = relevance(control), relevance("main")
            found.append((f"selected at {control}: hardly any of main's gain" if control == "random" else
                          "selected by other users' golds: hardly any of main's gain",
                          after - before < (trained - before) / 4 and specific(control) < specific("main") / 4,
                          f"relevant {before:.3f} -> {after:.3f}; person-specific gain {specific(control):.2f} nats "
                          f"(main {specific('main'):.2f}); wins {listed(each(control, 'win_rate'))}"))
    return found


def sharpening(rows):
    """[(t, main's win rate, Q_BASE's on the same conversations)]: what of the win is due to the questions, and what to
    Q_t's own way of answering."""
    wins = {(row["variant"], row["iteration"]): row["mean"] for row in rows
            if row["metric"] == "win_rate" and row["roleplayer"] == "roleplayer"}
    return [(t, wins["main", t], wins["base_answers", t]) for variant, t in sorted(wins) if variant == "base_answers"]


def lines_of(row, response, who):
    """A conversation and the response to it, as lines of text."""
    parts = [f"[{who}]", *(f"{turn['role']}: {turn['content']}" for turn in row["conversation"]), f"response: {response}"]
    return [line for part in parts for line in textwrap.wrap(part, WIDTH, subsequent_indent="    ")]


def side_by_side(run, split, count):
    """Lines of text: the first judged pairs with the most questions (nobody chose them), Q_BASE's conversation beside the
    last Q_t's."""
    folders = sorted((folder for folder in Path(run, "main").glob("[0-9]*") if (folder / split).exists()),
                     key=lambda folder: int(folder.name))
    if not folders:
        return []
    tasks, personas = read_tasks(f"{run}/tasks.jsonl"), read_personas(f"{run}/personas.jsonl")
    fields = {"task_id": str, "persona_id": str, "sample": int, "turns": int, "response": str}
    talks, answers = [], []
    for folder in (Path(run, "base"), folders[-1]):
        talks.append({key_of(row): row for row in read_conversations(f"{folder}/{split}.jsonl")})
        answers.append({key_of(row): row for row in read_rows(f"{folder}/{split}/responses.jsonl", fields, tuple(fields)[:3])})
    both, lines = sorted(set(answers[0]) & set(answers[1])), []
    longest = max((answers[0][key]["turns"] for key in both), default=0)
    for key in [key for key in both if answers[0][key]["turns"] == longest][:count]:
        task, persona = known(talks[0][key], tasks, personas, f"{run}/base/{split}.jsonl")
        left, right = (lines_of(talk[key], answer[key]["response"], who)
                       for talk, answer, who in zip(talks, answers, ("Q_BASE", f"Q_{folders[-1].name}")))
        lines += ["", task["task"], persona["persona"], ""]
        lines += [f"{a:<{WIDTH}}  {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    return lines


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that run.sh wrote")
    parser.add_argument("--split", default="test", help="of the tasks and personas")
    parser.add_argument("--conversations", type=int, default=3, help="how many of the first run are shown")
    return parser.parse_args()


def main():
    args = parse_args()
    runs = {run: [row for row in read_results(f"{run}/results.jsonl") if row["split"] == args.split] for run in args.runs}
    for run, rows in runs.items():
        if not any(row["iteration"] for row in rows):
            fail(f"{run}/results.jsonl: no results of an iteration on split {args.split}. Run `RUN={run} bash run.sh`.")
    for metric, title in {**evaluate.TITLES, **measure.TITLES}.items():
        if len(runs) > 1:
            title = f"{title.split(' (')[0]} (mean over {len(runs)} seeds ± standard deviation)"
        print(*evaluate.table(over_seeds(list(runs.values())), metric, title), sep="\n")
    for run, rows in runs.items():
        print(f"\nDoes it hold in {run}?")
        for what, holds, figures in findings(rows):
            print(f"{'yes' if holds else 'NO '}  {what}: {figures}")
        for t, ours, base in sharpening(rows):
            print(f"     t = {t}: Q_t answers its conversations and wins {ours:.3f}; Q_BASE answers them, {base:.3f}")
    print(*side_by_side(args.runs[0], args.split, args.conversations), sep="\n")


if __name__ == "__main__":
    main()
