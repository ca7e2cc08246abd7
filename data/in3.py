"""Vague tasks whose missing details are known -> tasks, users and golds: data/details.jsonl, or IN3's released files.

    python data/in3.py data/details.jsonl --output runs/in3
    python data/in3.py test.jsonl --split test --output runs/in3-test          # of github.com/OpenBMB/Tell_Me_More

    reads   {"task": "Which bicycle is right for me?", "vague": true, "split": "A", "missing_details": [{"description":
             "Distance of a usual ride", "importance": 3, "inquiry": "How far ...?", "options": ["ten miles", ...]}]}
    writes  tasks.jsonl, personas.jsonl, gold.jsonl in the folder --output

For each user of a task one option is drawn for each missing detail. Two users of a task differ in all of them, as long
as there are options. The persona has a line for each detail: "Distance of a usual ride: ten miles". The gold response
names them all. A task that is not vague gets the split `clear`, and a user without preferences: a Questioner has
nothing to ask there.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages
from common import fail, number, run, seed_for, write_whole  # noqa: E402

NAMES = ("Sam", "Kim", "Alex")


def one_line(text):
    """A text without line feeds, since a line of a persona is one detail. Half of a character is an error."""
    return " ".join(text.encode().decode().split())


def read_details(path):
    """Yields (task, row, [(description, importance, options)], how many had no options); ends at the first bad line."""
    for place, line in enumerate(open(path, "rb"), 1):
        try:
            row = json.loads(line)
            details = [(one_line(d["description"]), ("1", "2", "3").index(str(d["importance"])) + 1,
                        [option for option in map(one_line, [*d["options"]]) if option])
                       for d in (row["missing_details"] if row["vague"] else ())]
            known = [detail for detail in details if detail[2]]
            yield one_line(row["task"]), row, known, len(details) - len(known)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{path}, line {place}: {type(error).__name__}: {error}. A line of IN3 has task, vague, "
                 "missing_details; each of these has description, importance (1 to 3), options.")


def make(path, split, users, seed):
    """-> tasks, personas, golds (lists of rows); the vague tasks and the details that were left out: no options."""
    tasks, personas, golds, empty, without = [], [], [], 0, 0
    for place, (task, row, details, dropped) in enumerate(read_details(path), 1):
        without += dropped
        if row["vague"] and not details:
            empty += 1
            continue
        here = "clear" if not row["vague"] else split or row.get("split") or fail(
            f"{path}, line {place}: no split. Give --split, such as --split test.")
        task_id = row.get("task_id") or f"{Path(path).stem}-{place:04d}"
        tasks.append({"task_id": task_id, "split": here, "task": task})
        for user in range(users if details else 1):
            lines = [f"{about}: {options[(seed_for(seed, task_id, about) + user) % len(options)]}"
                     for about, _, options in details]
            person = {"persona_id": f"{task_id}-u{user}", "split": here}
            personas.append({**person, "name": NAMES[user], "persona": "\n".join(lines) or "I have no preferences.",
                             "task_id": task_id, "importance": [importance for _, importance, _ in details]})
            if details:
                golds.append({"task_id": task_id, **person, "gold": " ".join(
                    ["Here is what suits you.", *(f"{line}." for line in lines)])})
    return tasks, personas, golds, empty, without


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="rows in IN3's form (JSONL)")
    parser.add_argument("--output", required=True, metavar="FOLDER", type=Path, help="tasks, personas, gold (JSONL)")
    parser.add_argument("--split", help="of all vague tasks; default: as the rows say")
    parser.add_argument("--users", type=number(int, 1, len(NAMES)), default=2, help="of each task")
    parser.add_argument("--seed", type=number(int, 0), default=42, help="of the options")
    args = parser.parse_args()
    *files, empty, without = make(args.file, args.split, args.users, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("tasks", "personas", "gold"), files):
        write_whole(args.output / f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    print(f"{args.output}: {len(files[0])} tasks, {len(files[1])} users; left out: {empty} vague tasks "
          f"and {without} details without options")


if __name__ == "__main__":
    run(main)
