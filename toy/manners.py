"""What remains of a win with users that the model has never met: the tables of docs/manners.md, of toy/manners.sh.

    python toy/manners.py runs/manners-100 runs/manners-101 runs/manners-102

Means over the (task, persona) pairs of all seeds, with 95 % intervals that are clustered by task and by persona
(report/stats.py). People of different seeds are different people.
"""
import argparse
import statistics
from pathlib import Path

import measure  # puts the stages on the path
from common import SAMPLE, fail, read_personas, read_tasks
from report.report import golds, points, read_evaluations
from report.stats import mean, minus, of_pairs, ratio
from toy.world import question_slot

PLAIN = "roleplayer"
MANNERS = [f"{PLAIN}-{manner}" for manner in ("terse", "evasive", "chatty", "erring")]
TRAINED = {"plain": "plain", "all but this": "not-{}", "all": "all"}        # with whom -> the run; {}: who is tested


def asks_again(conversation):
    """Share of the questions after the first that are about a fact that was asked for before."""
    slots = [question_slot(turn["content"]) for turn in conversation[::2]]
    again = [slot is not None and slot in slots[:i] for i, slot in enumerate(slots) if i]
    return statistics.mean(again) if again else None


def values_of(e, tasks, personas):
    """An evaluation -> {metric: {(task, persona): value}}"""
    rows = [{**dict(zip(SAMPLE, key)), "conversation": talk} for key, talk in e.talks.items()]
    measured = measure.measure(rows, list(e.responses.values()), tasks, personas)
    again = {key: share for key, talk in e.talks.items() if (share := asks_again(talk)) is not None}
    return {**{name: measured[name] for name in ("relevant_share", "coverage")}, "asks again": of_pairs(again),
            "used_facts": measured["used_facts"], "gain": minus(golds(e), golds(e.base)) if e.t else {},
            "win rate": points(e)}


def read_runs(folders, split):
    """{(run, tested with, t): {metric: {(task, persona of this seed): value}}} of all seeds together."""
    found = {}
    for folder in map(Path, folders):
        tasks, personas = read_tasks(folder / "plain/tasks.jsonl"), read_personas(folder / "plain/personas.jsonl")
        for run in sorted(path.parent for path in folder.glob("*/results.jsonl")):
            for e in read_evaluations(run, split, tasks, personas):
                if e.t or run.name == "plain":                  # the runs share Q_BASE's evaluations
                    of = found.setdefault((run.name if e.t else "Q_BASE", e.user, e.t), {})
                    for metric, values in values_of(e, tasks, personas).items():
                        of.setdefault(metric, {}).update(
                            {(task, f"{folder}/{persona}"): value for (task, persona), value in values.items()})
    for user, run in ((user, run.format(user)) for user in (PLAIN, *MANNERS) for run in ("Q_BASE", *TRAINED.values())):
        if not any(key[:2] == (run, user) for key in found):
            fail(f"{', '.join(folders)}: no {run} that was tested with {user}. Start toy/manners.sh again.")
    return found


def kept(found, t, tested, reference):
    """What remains of the win above one half, with each manner, and with all four together; "-" where there was none.
    tested, reference: a manner -> (run, user)"""
    each = []
    for user in MANNERS:
        there, plain = (found[(*which(user), t)]["win rate"] for which in (tested, reference))
        each.append({pair: (there[pair] - 0.5, plain[pair] - 0.5) for pair in there if pair in plain})
    together = {pair: tuple(map(statistics.mean, zip(*(both[pair] for both in each))))
                for pair in each[0] if all(pair in both for both in each)}
    return [mean(ratio(*({pair: wins[i] for pair, wins in both.items()} for i in (0, 1))))
            for both in (*each, together)]


def print_table(title, head, rows):
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of toy/manners.sh, one for each seed")
    parser.add_argument("--split", default="test", help="that was evaluated")
    args = parser.parse_args()
    found = read_runs(args.runs, args.split)
    for t in sorted({t for _, _, t in found if t}):
        rows = []
        for user in (PLAIN, *MANNERS):
            for name, run in (("(Q_BASE)", "Q_BASE"), *TRAINED.items()):
                of = found[run.format(user), user, t if name in TRAINED else 0]
                rows.append([user, name, *(mean(values, share=metric == "win rate") if values else ""
                                           for metric, values in of.items())])
        print_table(f"t = {t}", ["tested with", "trained with", *of], rows)
        head = ["trained with", *MANNERS, "all four"]
        print_table(f"t = {t}: what remains of the win (above .5) that the same model has with the plain user", head, [
            [name, *kept(found, t, lambda user: (run.format(user), user), lambda user: (run.format(user), PLAIN))]
            for name, run in TRAINED.items()])
        print_table(f"t = {t}: the share of the win with this user of a model that has met all", head, [
            [name, *kept(found, t, lambda user: (run.format(user), user), lambda user: ("all", user))]
            for name, run in TRAINED.items() if run != "all"])


if __name__ == "__main__":
    main()
