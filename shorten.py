"""Cut conversations after their first k questions, so that evaluate.py can tell what each further question gains.

    python shorten.py --conversations runs/paper/main/1/test.jsonl --turns 1 --output runs/paper/after-1.jsonl

Of the conversations with the greatest length; shorter ones are left out, so that every k has the same pairs. run.sh
does this with VARIANTS=turns, and report.py makes the table.
"""
import argparse
import json
from pathlib import Path

from common import SAMPLE, fail, natural, read_rows, read_settings, run, write_whole


def shorten(rows, k):
    """The conversations of the greatest length, each cut after k questions and their answers."""
    longest = max(len(row["conversation"]) for row in rows)
    return [{**row, "turns": k, "conversation": row["conversation"][:2 * k]}
            for row in rows if len(row["conversation"]) == longest and 2 * k < longest]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", required=True, help="of simulate.py (JSONL)")
    parser.add_argument("--turns", type=natural, required=True, metavar="k", help="questions that are left")
    parser.add_argument("--output", required=True, help="shortened conversations (JSONL)")
    args = parser.parse_args()
    rows = [row for row in read_rows(args.conversations, SAMPLE, {"conversation": list}) if "refused" not in row]
    short = shorten(rows, args.turns) if rows else []
    if not short:
        fail(f"{args.conversations}: no conversation has more than {args.turns} questions.")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    write_whole(f"{args.output}.settings.json", json.dumps(read_settings(args.conversations)))     # who the user was
    write_whole(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in short))
    print(f"{args.output}: {len(short)} conversations of {len(rows)}, cut after {args.turns} questions")


if __name__ == "__main__":
    run(main)
