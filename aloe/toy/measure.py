"""What a judge's score does not tell: the manners and the facts in the replies of an evaluation, told or invented.

    fitting_manners   of the three of the persona: shown by the reply (share)
    used_facts        replies that use a fact which the user has told by then (share)
    invented_facts    facts in a reply that the user has not told by then (number)

It reads the conversations of aloe/evaluate.py, and adds a row for each metric to the results file:

    python aloe/toy/measure.py --variant sft_dpo --evaluation runs/aloe/eval/sft_dpo --results runs/aloe/results.jsonl

    {"variant": "sft_dpo", "iteration": 0, "metric": "invented_facts", "condition": "T=1", "roleplayer": "aloe-user",
     "split": "test", "mean": 0.17, "sem": 0.02, "n": 100, "by_round": [0.3, ...]}

All means are over personas; the rounds of a conversation are averaged first.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root; first, since PyPI has an "aloe", too
from aloe.evaluate import mean_sem  # noqa: E402
from aloe.toy import world  # noqa: E402
from common import fail, read_rows, read_settings, run  # noqa: E402
from evaluate import roleplayer_label, write_results  # noqa: E402


def measure(persona, rounds):
    """[{"user", "reply"}] of K rounds -> {metric: K values}."""
    found = {"fitting_manners": [], "used_facts": [], "invented_facts": []}
    for k, r in enumerate(rounds):
        told = world.facts_in(" ".join(one["user"] for one in rounds[:k + 1]))
        said = world.facts_in(r["reply"])
        found["fitting_manners"].append(world.fit(r["reply"], persona)[0] / len(world.MANNERS))
        found["used_facts"].append(float(bool(said & told)))
        found["invented_facts"].append(len(said - told))
    return found


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", required=True, help="the model's name in the table: base, sft, rejected, sft_dpo")
    parser.add_argument("--evaluation", required=True, help="the folder that aloe/evaluate.py has written")
    parser.add_argument("--results", required=True, help="gets a row for each metric; a rerun replaces it")
    return parser.parse_args()


def main():
    args = parse_args()
    path = f"{args.evaluation}/conversations.jsonl"
    settings, found = read_settings(path), []
    for row in read_rows(path, {"persona_id": str}, {"profile": str, "personality": str, "rounds": list}):
        if "refused" not in row:
            found.append(measure(world.read_persona(row["profile"], row["personality"]), row["rounds"]))
    if not found or not settings:
        fail(f"{path}: no whole conversation, or no settings beside it. Run aloe/evaluate.py first.")
    write_results(args.results, [{
        "variant": args.variant, "iteration": 0, "metric": metric, "condition": f"T={settings['temperature']:g}",
        "roleplayer": roleplayer_label(path, None), "split": settings["split"],
        **mean_sem([float(np.mean(one[metric])) for one in found]),
        "by_round": np.mean([one[metric] for one in found], 0).round(6).tolist()} for metric in found[0]])


if __name__ == "__main__":
    run(main)
