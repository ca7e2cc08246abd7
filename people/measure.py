"""What evaluate.py cannot know: whether the questions found what matters, where data/in3.py says what that is.

    coverage          importance of the persona's lines that the user said, over the most that so many questions could
                      bring
    answered          share of the Questioner's replies to which the user said a line
    questions         share of the replies that are a question, that is, have a question mark
    cut               share of the conversations with a reply that ran into --max-tokens
    asked_once        share of the replies that occur once in the file, whatever their case and marks

It reads conversations of simulate.py with people/nearest.py, which says a line word for word or not at all. It adds a
row for each metric to the results file:

    python people/measure.py --variant main --iteration 1 --conversations runs/laptop/main/1/test.jsonl \\
        --tasks runs/laptop/data/tasks.jsonl --personas runs/laptop/data/personas.jsonl --results runs/results.jsonl

All means are over (task, persona) pairs; the samples of a pair are averaged first.
"""
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
from common import fail, pair_of, read_conversations, read_rows, read_tasks, run  # noqa: E402
from evaluate import by_pair, roleplayer_label, summary, write_results  # noqa: E402
from toy.measure import measure_parser  # noqa: E402

TITLES = {"coverage": "Importance of what the user told, of what so many questions could bring (share)",
          "answered": "Replies to which the user said a line (share)",
          "questions": "Replies that are questions (share)",
          "cut": "Conversations with a reply that was cut (share)",
          "asked_once": "Replies that occur once (share)"}


def words(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def coverage(told, importance, questions):
    """Importance (1 to 3) of the persona's lines that were told: sum over them / sum over the `questions` largest.
    told: [bool] for each line; None where the persona has no line."""
    most = sum(sorted(importance, reverse=True)[:questions])
    return sum(i for i, is_told in zip(importance, told) if is_told) / most if most else None


def measure(conversations, personas):
    """Rows of conversations, {persona_id: its row} -> {metric: {(task_id, persona_id): mean over its samples}}"""
    times = Counter(words(turn["content"]) for row in conversations for turn in row["conversation"][::2])
    rows = []
    for row in conversations:
        persona = personas[row["persona_id"]]
        asked = [turn["content"] for turn in row["conversation"][::2]]
        said = [turn["content"] for turn in row["conversation"][1::2]]
        told = [line in said for line in persona["persona"].splitlines()]
        rows.append({**row, "coverage": coverage(told, persona["importance"], len(asked)),
                     "answered": sum(told) / len(asked) if persona["importance"] else None,
                     "questions": sum("?" in text for text in asked) / len(asked),
                     "cut": float(bool(row.get("cut"))),
                     "asked_once": sum(times[words(text)] == 1 for text in asked) / len(asked)})
    return {metric: by_pair(rows, metric) for metric in TITLES}


def main():
    args = measure_parser(__doc__).parse_args()
    tasks, known = read_tasks(args.tasks), {"persona": str, "importance": list}
    personas = {row["persona_id"]: row for row in read_rows(args.personas, {"persona_id": str}, known)}
    conversations = [row for row in read_conversations(args.conversations, tasks, personas)
                     if tasks[row["task_id"]]["split"] == args.split and not row.get("refused")] or fail(
                         f"{args.conversations}: none on --split {args.split}. Name the split that was simulated.")
    common = {"variant": args.variant, "iteration": args.iteration, "condition": "", "split": args.split,
              "roleplayer": roleplayer_label(args.conversations, args.roleplayer)}
    rows = [{**common, "metric": metric, "title": TITLES[metric], **summary(pairs, share=True)}
            for metric, pairs in measure(conversations, personas).items() if pairs]
    write_results(args.results, rows)
    print(f"{args.results}: {len(rows)} means, from {len(conversations)} conversations of "
          f"{len(set(map(pair_of, conversations)))} pairs")


if __name__ == "__main__":
    run(main)
