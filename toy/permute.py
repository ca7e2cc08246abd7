"""A control for the selection rule: a file of golds in which each task's gold responses are dealt to other personas.

Selected by these golds (`run.sh`, VARIANTS=permuted), a conversation is good for somebody else. A pair whose task has
no other persona with a gold response gets a row that is `refused`. `--share 0.3` replaces three of ten sentences, drawn
by chance, and is an Oracle that errs: in the embedded world a sentence of a gold holds one fact.

    python toy/permute.py --gold runs/toy/gold-A.jsonl --output runs/toy/permuted-A.jsonl
"""
import argparse
import json
import re
import sys
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
from common import fraction, read_gold, run, seed_for, write_whole  # noqa: E402
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


def mixed(gold, other, share, rng):
    """The gold with each sentence replaced, with probability `share`, by the other gold's sentence in its place."""
    sentences = (re.split(r"(?<=[.!?]) ", text) for text in (gold, other))
    return " ".join(b if rng.random() < share else a for a, b in zip_longest(*sentences, fillvalue=""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gold", required=True, help="gold responses (JSONL)")
    parser.add_argument("--output", required=True, help="the same rows with others' golds (JSONL)")
    parser.add_argument("--share", type=fraction, default=1.0, help="of a gold's sentences that are another's")
    parser.add_argument("--seed", type=int, default=42, help="of the rotation, and of which sentences")
    args = parser.parse_args()
    golds = read_gold(args.gold)
    rows = [{"task_id": pair[0], "persona_id": pair[1], **({"refused": "nobody else"} if other is None else {
        "gold": mixed(golds[pair], other, args.share, Random(seed_for(args.seed, "permute", *pair)))})}
            for pair, other in permuted(golds, args.seed).items()]
    write_whole(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{args.output}: {len(rows)} golds; {args.share:.0%} of each another persona's")


if __name__ == "__main__":
    run(main)
