"""Qulac as our rows: vague requests, the needs behind them, clarifying questions, and people's answers.

    python data/qulac.py qulac.json --output runs/qulac

The file is at github.com/aliannejadi/qulac. Whoever answered a question had been shown the need. Written are the files
tasks.jsonl (the requests), personas.jsonl and gold.jsonl (the needs; a persona's "task_id" is the one task of a person)
and conversations-A.jsonl and -test.jsonl (a question and its answer a row; "sample" numbers those of a need).
"""
import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages
from common import fail, run, seed_for, write_whole  # noqa: E402

TEST = 0.4                              # the chance of a task to be held out, by a hash: 87 of the 198 are


def read_qulac(path):
    """Yields (request's number, need's number, request, need, question, answer); the last two may be empty."""
    try:
        column = json.loads(Path(path).read_text(encoding="utf-8"))                 # {"topic": {"0": ..., "1": ...}}
        for row in column["topic"] or fail(f"{path}: no rows. Give qulac.json as it was released."):
            texts = (column[name][row] for name in ("topic", "facet_desc", "question", "answer"))
            yield (int(column["topic_id"][row]), int(column["facet_id"][row]),
                   *(text.replace("\\", "").strip() for text in texts))             # Obama\'s
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path}: not Qulac's table ({type(error).__name__}: {error}). Give qulac.json as it was released.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("qulac", help="the released file")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="of the files")
    args = parser.parse_args()
    # Needs are numbered anew behind each request (8 numbers, 762 needs), so that only both numbers together are an id.
    needs, empty, again = {}, 0, 0                              # {(request, need): (texts, {question: answer})}
    for request, need, *texts, question, answer in read_qulac(args.qulac):
        _, talks = needs.setdefault((request, need), (texts, {}))
        empty += not (question and answer)
        again += question in talks                              # asked twice: the first answer stands
        if question and answer:
            talks.setdefault(question, answer)
    tasks, rows = {}, defaultdict(list)
    for (request, need), ((task, persona), talks) in needs.items():
        split = "test" if seed_for("qulac", request) < TEST * 2 ** 31 else "A"
        pair = {"task_id": f"qulac{request:03d}", "persona_id": f"qulac{request:03d}-{need}", "split": split}
        tasks[request] = {"task_id": pair["task_id"], "split": split, "task": task}
        rows["personas"].append({"persona_id": pair["persona_id"], "split": split, "name": "User", "persona": persona,
                                 "task_id": pair["task_id"]})
        rows["gold"].append({**pair, "gold": persona})
        rows[f"conversations-{split}"] += [{**pair, "sample": k, "turns": 1, "roleplayer": "people", "conversation": [
            {"role": "assistant", "content": question}, {"role": "user", "content": answer}]}
            for k, (question, answer) in enumerate(talks.items())]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, table in ({"tasks": tasks.values(), **rows}).items():
        write_whole(args.output / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in table))
    print(f"{args.output}: {len(tasks)} tasks, {len(needs)} needs, {sum(len(talks) for _, talks in needs.values())} "
          f"conversations; left out: {empty} empty questions or answers, {again} questions that were asked twice")


if __name__ == "__main__":
    run(main)
