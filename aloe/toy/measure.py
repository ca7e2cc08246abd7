"""What a judge's score does not tell: manners and facts in replies, told or invented; the ceiling; the teacher.

    fitting_manners   of the three of the persona: shown by the reply (share)
    used_facts        replies that use a fact which the user has told by then (share)
    invented_facts    facts in a reply that the user has not told by then (number)
    ceiling           the score that an ideal chatbot could expect, who knows what was shown and guesses the rest
Of the pairs of aloe/simulate.py, what the teacher's replies would score:
    preferred, rejected     the judge's score of either
    better, worse           the preferred reply scores more, less than the rejected one (share)

It reads the conversations of either stage, and adds a row for each metric to the results file:

    python aloe/toy/measure.py --variant sft_dpo --conversations runs/aloe/eval/sft_dpo/conversations.jsonl \\
        --results runs/aloe/results.jsonl

    {"variant": "sft_dpo", "iteration": 0, "metric": "invented_facts", "condition": "T=1", "roleplayer": "aloe-user",
     "split": "test", "mean": 0.17, "sem": 0.02, "n": 100, "by_round": [0.3, ...]}

All means are over personas; the rounds of a conversation are averaged first.
"""
import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root; first, since PyPI has an "aloe", too
from aloe.evaluate import mean_sem  # noqa: E402
from aloe.toy import world  # noqa: E402
from common import fail, read_rows, read_settings, run  # noqa: E402
from evaluate import roleplayer_label, write_results  # noqa: E402


def ceiling(shown):
    """The expected score of the best reply to a user of whom {slot or manner: value} is known: a manner that was not
    shown is right by chance in half of the replies, and a fact that was not told is not worth the guess."""
    manners = sum(name in world.MANNERS for name in shown)
    return 1 + manners + (len(world.MANNERS) - manners) / 2 + (len(shown) > manners)


def measure(persona, rounds):
    """[{"user", "reply"}] of K rounds, or [{"user", "preferred", "rejected"}] -> {metric: K values}."""
    found = defaultdict(list)
    for k, r in enumerate(rounds):
        heard = [one["user"] for one in rounds[:k + 1]]
        if "reply" in r:
            told, said = world.facts_in(" ".join(heard)), world.facts_in(r["reply"])
            found["fitting_manners"].append(world.fit(r["reply"], persona)[0] / len(world.MANNERS))
            found["used_facts"].append(float(bool(said & told)))
            found["invented_facts"].append(len(said - told))
        else:
            p, r = (world.judge_score(r[name], persona) for name in ("preferred", "rejected"))
            for name, value in (("preferred", p), ("rejected", r), ("better", p > r), ("worse", p < r)):
                found[name].append(float(value))
        found["ceiling"].append(ceiling(world.revealed(heard)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", required=True, help="the model's name in the table: base, sft, rejected, sft_dpo")
    parser.add_argument("--conversations", required=True, help="what aloe/evaluate.py or aloe/simulate.py has written")
    parser.add_argument("--results", required=True, help="gets a row for each metric; a rerun replaces it")
    args = parser.parse_args()
    path, found = args.conversations, []
    settings = read_settings(path)
    for row in read_rows(path, {"persona_id": str}, {"profile": str, "personality": str, "rounds": list}):
        if not row.get("refused"):
            found.append(measure(world.read_persona(row["profile"], row["personality"]), row["rounds"]))
    if not found or not settings:
        fail(f"{path}: no whole conversation, or no settings beside it. Run the stage first.")
    write_results(args.results, [{
        "variant": args.variant, "iteration": 0, "metric": metric, "condition": f"T={settings['temperature']:g}",
        "roleplayer": roleplayer_label(path, None), "split": settings["split"],
        **mean_sem([float(np.mean(one[metric])) for one in found]),
        "by_round": np.mean([one[metric] for one in found], 0).round(6).tolist()} for metric in found[0]], "{variant}")


if __name__ == "__main__":
    run(main)
