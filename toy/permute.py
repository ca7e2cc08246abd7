"""A control for the selection rule: a file of golds in which each task's gold responses are dealt to other personas.

Selected by these golds (`run.sh`, VARIANTS=permuted), a conversation is good for somebody else. A pair whose task has
no other persona with a gold response gets a row that is `refused`.

    python toy/permute.py --gold runs/toy/gold-A.jsonl --output runs/toy/permuted-A.jsonl
"""
import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
from common import read_gold, run, write_whole  # noqa: E402
from evaluate import rotation  # noqa: E402


def permuted(golds, seed):
    """{(task_id, persona_id): gold, or None} -> the same pairs with the golds of each task rotated among its personas;
    None where there is nobody else."""
    personas = defaultdict(list)
    for (task_id, persona_id), gold in sorted(golds.items()):
        if gold is not None:
            personas[task_id].append(persona_id)
    other = {task_id: rotation(ids, task_id, seed) for task_id, ids in personas.items()}
    return {(task_id, persona_id): golds.get((task_id, other.get(task_id, {}).get(persona_id)))
            for task_id, persona_id in golds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gold", required=True, help="gold responses (JSONL)")
    parser.add_argument("--output", required=True, help="the same rows with others' golds (JSONL)")
    parser.add_argument("--seed", type=int, default=42, help="of the rotation")
    args = parser.parse_args()
    rows = [{"task_id": task_id, "persona_id": persona_id, **({"gold": gold} if gold else {"refused": "nobody else"})}
            for (task_id, persona_id), gold in permuted(read_gold(args.gold), args.seed).items()]
    write_whole(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{args.output}: {len(rows)} golds, each another persona's")


if __name__ == "__main__":
    run(main)
