"""What a run has learned, to look at: did it work, for whom, and how one knows.

    python report/report.py runs/toy             reads the run's folder; no model, no server
    python report/report.py runs/a runs/b        runs that differ in their seed: their spread, on the page of runs/a
    python report/report.py --power 300 10       the smallest win rate that 300 pairs of 10 people can show

    writes  RUN/report/index.html       one file, which opens without a network
            RUN/report/NAME.svg         the pictures, if matplotlib is there (report/requirements.txt)

Evaluations are found by the settings that evaluate.py leaves beside its rows. Each table is a function; its docstring
stands on the page. Means and shares are over (task, persona) pairs, with 95 % intervals clustered by both.
"""
import argparse
import base64
import json
import re
import statistics
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import jinja2                                                   # transformers' chat templates need it, too

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
from common import (PAIR, SAMPLE, fail, fingerprint, key_of, name_of, natural, pair_of, printable,  # noqa: E402
                    read_conversations, read_gold, read_personas, read_rows, read_settings, read_tasks, read_text,
                    run, write_whole)
from evaluate import CONDITIONS, combine, interval_95, read_results  # noqa: E402
from report.stats import (agreement, as_table, as_text, cell, length_controlled, mean, minus, of_pairs,  # noqa: E402
                          power, ratio)

HERE = Path(__file__).parent

# ---------------------------------------------------------------- the rows of all evaluations

def model_name(variant, t, user, first_user):
    return (f"{variant}, t={t}" if t or variant != "main" else "Q_BASE") + f" ({user})" * (user != first_user)


def read_evaluations(folder, split, tasks, personas):
    """Every evaluation of the split under a run's folder: the first user's, of these Q_BASE's, main's, then others'.
    Each has talks {(task, persona, sample): conversation}, log_probs {condition: {the same: nats}}, golds {condition:
    {pair: nats}}, responses {pair: row}, verdicts {pair: its rows, one for each order}, users {pair: who answered},
    missing {what: (how many are not there, of how many)}, and base: Q_BASE's evaluation with the same user."""
    there = {path.parent: read_settings(str(path).removesuffix(".settings.json"))
             for path in sorted(Path(folder).rglob("*.settings.json"))}
    settings = {path: s for path, s in there.items() if s.get("split") == split and "iteration" in s}
    names = {s["conversations"].split(" (")[0] for s in settings.values()}
    files = {fingerprint(str(path)): path for path in sorted(Path(folder).rglob("*.jsonl")) if path.name in names}
    # The first user is whom Q_BASE has met in the least deep folder: others have a folder each.
    first = min(settings, key=lambda path: (settings[path]["iteration"], len(path.parts)), default=None)
    user = settings[first]["roleplayer"] if first else fail(
        f"{folder}: no evaluation of split {split} is there. evaluate.py writes them.")
    found = []
    for path, s in settings.items():
        if s["conversations"] not in files:
            fail(f"{path}: made from {s['conversations']}, which is not in {folder}. Evaluate again.")
        rows = {name: list(read_rows(path / f"{name}.jsonl", key, fields))
                if read_settings(path / f"{name}.jsonl") else [] for name, key, fields in (
                    ("log_probs", {**SAMPLE, "condition": str}, {"log_prob": float | int | None}),
                    ("responses", SAMPLE, {"turns": int, "response": str}),
                    ("verdicts", {**PAIR, "order": str}, {"turns": int, "verdict": str | None, "raw": str}))}
        rows["conversations"] = read_conversations(files[s["conversations"]], tasks, personas)
        e = SimpleNamespace(settings=s, variant=s["variant"], t=s["iteration"], user=s["roleplayer"],
                            turns=s.get("turns"), verdicts=defaultdict(list), log_probs=defaultdict(dict))
        e.name = model_name(e.variant, e.t, e.user, user)
        e.talks = {key_of(row): row["conversation"] for row in rows["conversations"] if not row.get("refused")}
        e.users = {pair_of(row): row.get("roleplayer", e.user) for row in rows["conversations"]}
        e.responses = {pair_of(row): row for row in rows["responses"] if not row.get("refused")}
        for row in rows["log_probs"]:
            if row.get("log_prob") is not None:
                e.log_probs[row["condition"]][key_of(row)] = row["log_prob"]
        e.golds = {condition: of_pairs(nats) for condition, nats in e.log_probs.items()}
        for row in rows["verdicts"]:
            e.verdicts[pair_of(row)].append(row)
        e.missing = {what: (sum(bool(row.get("refused")) for row in of), len(of)) for what, of in rows.items() if of}
        e.cut = sum(bool(row.get("cut")) for row in rows["conversations"])
        found.append(e)
    found.sort(key=lambda e: (e.user != user, e.user, e.t > 0, e.variant != "main", e.variant, e.t))
    nobody = SimpleNamespace(name="Q_BASE", golds={}, responses={}, log_probs=defaultdict(dict), talks={})
    for e in found:                                             # nobody: Q_BASE has not met this user
        e.base = next((other for other in found if other.t == 0 and other.user == e.user), nobody)
    return found


def golds(e, condition="q_experimental"):
    """{pair: log p_QBASE(gold) in nats}"""
    return e.golds.get(condition, {})


def gain(e, condition="q_experimental"):
    """{pair: log p(gold) minus that after Q_BASE's own conversation}"""
    return minus(golds(e, condition), golds(e.base))


def beyond(e, condition):
    """{pair: log p(gold) minus that in another condition}"""
    return minus(golds(e), golds(e if condition == "q_random" else e.base, condition))


def possible(e):
    """The ratio (own - none) / (all - none): the share of what the gold can gain."""
    told = minus(golds(e.base, "positive_control"), golds(e.base, "negative_control"))
    return ratio(beyond(e, "negative_control"), told)


def points(e):
    """{pair: 1 for a win, .5 for a tie, 0 for a loss} of the pairs with readable verdicts"""
    verdicts = {pair: combine([row["verdict"] for row in rows]) for pair, rows in e.verdicts.items()}
    return {pair: {"ours": 1.0, "tie": 0.5, "base": 0.0}[verdict] for pair, verdict in verdicts.items() if verdict}


def last_of(evaluations):
    """{variant: its last evaluation} with the first user"""
    return {e.variant: e for e in evaluations if e.t and e.user == evaluations[0].user}


def headline(e):
    """What was found, in a sentence whose words follow the intervals."""
    nats, won = gain(e), points(e)
    if not (interval := interval_95(nats or won)):
        return f"{e.name}: nothing is shown. It takes two tasks and two personas, with golds or with verdicts."
    more = "more" if interval[0] > 0 else "less" if interval[1] < 0 else "not distinguishably more or less"
    low, high = interval_95(won, share=True) or (0, 1)
    prefers = "its answers" if low > 0.5 else "Q_BASE's answers" if high < 0.5 else "neither distinguishably"
    return f"{e.name}: " + (
        f"the gold response is {more} probable than after Q_BASE's conversation: {mean(nats)} nats. " if nats else
        "log-probabilities were not measured. ") + (
        f"The judge prefers {prefers}: it wins {mean(won, share=True)}." if won else
        "No verdict is readable." if e.verdicts else "No judge was asked.")


# ---------------------------------------------------------------- what a sceptic asks: a generator of rows each

def summary(evaluations):
    """Each model in one line.

    Win rate: against Q_BASE; wins + half the ties. Gain: log p(gold), in nats under Q_BASE after the model's own
    conversation (Q-Experimental), minus that after Q_BASE's. Of the possible: (own - none) / (all - none), where none
    is without a conversation (negative control), all with the persona in the prompt (positive control); the paper has
    8 % for Q_BASE, 28 % at t=3. Beyond another's: own minus another user's conversation (Q-Random), a part of which is
    the harm that this does. Beyond none: own minus none. Missing: rows refused or unreadable.

    log_probs.jsonl, verdicts.jsonl; section 4 of the paper."""
    for e in evaluations:
        users = sorted(set(e.users.values()))
        for user in [None, *(users if len(users) > 1 else ())]:
            nats, more, other, none, won = (
                {pair: x for pair, x in values.items() if user in (None, e.users[pair])} for values in (
                    golds(e), gain(e), beyond(e, "q_random"), beyond(e, "negative_control"), points(e)))
            yield {"model": e.name + (f": {user}" if user else ""),
                   "win rate": mean(won, share=True), "gain": mean(more) if e.t else "",
                   "of the possible": "" if user else mean(possible(e), share="difference"),
                   "beyond another's": mean(other), "beyond none": mean(none), "log p(gold)": mean(nats),
                   "pairs": str(len(nats or won)), "judged": str(len(won)),
                   "missing": "" if user else str(sum(missing for missing, _ in e.missing.values()))}


def planned(evaluations):
    """Main minus each variant.

    Paired differences, at the variant's last t, with the first user; the win rate's in percentage points. These, the
    gain at the last t, and beyond another's were planned. Of so many intervals one in 20 leaves out 0 by chance alone.

    log_probs.jsonl, verdicts.jsonl; Cameron, Gelbach and Miller 2011."""
    for e in last_of(evaluations).values():
        for main in [m for m in evaluations if (m.variant, m.t, m.user) == ("main", e.t, e.user) and m is not e]:
            nats, other, won = (minus(values(main), values(e)) for values in (
                golds, lambda of: beyond(of, "q_random"), points))
            yield {"main minus": e.name, "win rate": mean(won, share="difference"), "log p(gold)": mean(nats),
                   "beyond another's": mean(other), "pairs": str(len(nats or won))}


def verdicts(evaluations, second):
    """The verdicts, and the answers.

    B minus A: the win rate where the model's answer stood at B, minus that at A, in percentage points: 0 without a bias
    for a place. A tie: the judge, who saw both orders, contradicted itself. Length-controlled: the win rate at a
    difference of 0 words, by linear regression; "-" where 0 lies outside what was observed. Words: a Chinese or
    Japanese character is one. With a question: with a question mark. Kappa: (agreement with a second judge - that by
    chance) / (1 - that by chance). To have one, run evaluate.py again with another --judge, --variant and --output.

    verdicts.jsonl, responses.jsonl; Cohen 1960."""
    for e in filter(lambda e: e.responses, evaluations):
        turns, won = {pair: rows[0]["turns"] for pair, rows in e.verdicts.items()}, Counter(points(e).values())
        at_a, at_b = (ratio(*({pair: sum(row["verdict"] in of for row in rows if row["order"] == order)
                               for pair, rows in e.verdicts.items()} for of in (("ours",), ("ours", "base"))))
                      for order in ("ours_first", "base_first"))
        words, of_base = ({pair: len(words_of(row["response"])) for pair, row in of.responses.items()}
                          for of in (e, e.base))
        asked = {pair: float(bool(asks(row["response"]))) for pair, row in e.responses.items()}
        counts = {"won": won[1], "tied": won[0.5], "lost": won[0], "unreadable": len(turns) - won.total()}
        yield {"model": e.name, **{name: str(n) if turns else "" for name, n in counts.items()},
               "B minus A": mean(minus(at_b, at_a), share="difference"),
               "length-controlled": mean(length_controlled(points(e), minus(words, of_base)), share="difference"),
               "words": mean(words, 1), "more than Q_BASE": mean(minus(words, of_base), 1) if e.t else "",
               "with a question": mean(asked, share=True),
               **{f"after {k}": mean({pair: x for pair, x in points(e).items() if turns[pair] == k}, share=True)
                  for k in sorted(set(turns.values()))},
               **{name: text for other in second.get(e.name, ()) for name, text in (
                   (name_of(other.settings["judge"]), mean(points(other), share=True)),
                   *agreement(points(e), points(other)).items())}}


CJK = "\u3040-\u30ff\u3400-\u9fff"                              # written without blanks: a character is a word
words_of, asks = re.compile(rf"[{CJK}]|(?:[^\W{CJK}]|['’])+").findall, re.compile("[?？؟]").search


def conversations(evaluations, personas):
    """The questions, and the simulated users.

    Repeated: of a conversation's questions those that it has asked before, word for word. Asked of others: those that
    some other user with the same task is asked, too; all: nothing is tailored to the user. Of the user's answers: asks
    back, with a question mark; persona told, the share of the persona's words that one answer has: whoever tells
    everything at once makes any question a good one. Cut: with a text that ran into --max-tokens.

    The conversations. tau2-bench counts its simulator's faults among the agents' failures."""
    known = {i: {*words_of(row["persona"].lower())} for i, row in personas.items()}
    different = {e.settings["conversations"]: e for e in reversed(evaluations)}     # Q_BASE's answers add none
    for e in (e for e in evaluations if different[e.settings["conversations"]] is e):
        asked, told = ([(key, turn["content"]) for key, talk in e.talks.items() for turn in talk[i::2]] for i in (0, 1))
        users = defaultdict(set)
        for (task, persona, _), text in asked:
            users[task, text].add(persona)
        again = {key: 1 - len({turn["content"] for turn in talk[::2]}) / len(talk[::2])
                 for key, talk in e.talks.items()}
        shares = {"repeated": again, "asked of others": [(key, len(users[key[0], text]) > 1) for key, text in asked],
                  "asks back": [(key, bool(asks(text))) for key, text in told],
                  "persona told": [(key, len(known[key[1]] & {*words_of(text.lower())}) / max(1, len(known[key[1]])))
                                   for key, text in told]}
        yield {"model": e.name, **{name: mean(of_pairs(values), share=True) for name, values in shares.items()},
               "words": mean(of_pairs([(key, len(words_of(text))) for key, text in asked]), 1),
               "conversations": str(len(e.talks)), "cut": str(e.cut), "refused": str(e.missing["conversations"][0])}


def gain_a_turn(evaluations):
    """Log-probability of the gold after so many questions.

    Nats under Q_BASE, of the pairs with the longest conversations, cut after 0, 1, ... questions.

    log_probs.jsonl of VARIANTS=turns (evaluate.py --turns)."""
    for e in evaluations:
        cut = {c.turns: golds(c) for c in evaluations if c.turns and not e.turns and golds(e)
               and (c.t, c.settings["conversations"]) == (e.t, e.settings["conversations"])}
        steps = {0: golds(e.base, "negative_control"), **cut, max(map(len, e.talks.values())) // 2: golds(e)}
        pairs = [pair for pair in golds(e) if all(pair in step for step in steps.values())]
        if cut:
            yield {"model": e.name, **{str(k): mean({pair: steps[k][pair] for pair in pairs}) for k in sorted(steps)},
                   "pairs": str(len(pairs))}


def measures(runs, user):
    """Other means, and other trainings.

    Of one run: what evaluate.py does not know, such as toy/measure.py's. Of several: all means, their mean over the
    runs, and the standard deviation (and range) between the runs.

    results.jsonl."""
    lines = defaultdict(dict)                                   # (what, model): {run: row}
    for name, results in runs.items():
        for row in results:
            known = row["metric"] in ("gold_log_prob", "gold_log_prob_gain", "win_rate")
            if len(runs) > 1 or not known or row["condition"] not in ("", *CONDITIONS):
                what = f"{row.get('title', row['metric'])} {row['condition']}".strip()
                lines[what, model_name(row["variant"], row["iteration"], row["roleplayer"], user)][name] = row
    for (what, model), of in sorted(lines.items(), key=lambda line: line[0][0]):
        share = "share)" in what or what == "win_rate"
        means = [row["mean"] for row in of.values() if row["mean"] is not None]
        yield {"model": model, **({"mean": cell(statistics.mean(means), share=share), "between runs": cell(
            statistics.stdev(means), (min(means), max(means)), share=share)} if len(means) > 1 else {}),
            **{name: cell(row["mean"], row.get("interval_95"), share=share) for name, row in of.items()}, "of": what}


def trainings(run):
    """The trainings.

    Kept: mean log p(gold) of the conversations that were kept; all: of those they were chosen from. Loss: nats a token,
    first and last step; held out: on pairs that were not trained on, before and after.

    selected.jsonl, the scores, and log.jsonl of each model."""
    made = {path: tuple(map(read_settings(path).get, ("conversations", "gold"))) for path in Path(run).rglob("*.jsonl")}
    chosen = {fingerprint(str(path)): path for path in made if path.name == "selected.jsonl"}
    for path in sorted(Path(run).glob("*/[0-9]*/model/log.jsonl")):
        selected = chosen.get(read_settings(path.parent).get("selected"))
        scores = next((file for file in made if "scores" in file.name and made[file] == made.get(selected)), None)
        kept, scored, held_out, losses = (
            [row[name] for row in map(json.loads, open(file)) if row.get(name) is not None] if file else []
            for file, name in ((selected, "gold_log_prob"), (scores, "log_prob"), (path, "held_out"), (path, "loss")))
        yield {"model": f"{path.parts[-4]}, t={path.parts[-3]}", **{
            name: cell(statistics.mean(nats)) for name, nats in (("kept", kept), ("all", scored)) if nats},
            **{name: f"{x[0]:.3f} to {x[-1]:.3f}" for name, x in (("held out", held_out), ("loss", losses)) if x},
            "steps": str(len(losses)), "kept conversations": str(len(kept))}


def who_what_when(stages):
    """Who, what, when."""
    for stage, settings in stages.items():
        for name, value in settings.items():
            if value not in (None, {}, "") and len(str(value)) < 80:
                yield {"what": f"{stage} {name.replace('_', ' ')}".strip(), "value": str(value)}


def pictures_of(evaluations, rows):
    """Figures 4 to 7 of the paper, paired, as report/pictures.py draws them."""
    def line(of, values, share=False):
        means = [(e.t, x, sum(x.values()) / len(x)) for e in of if (x := values(e))]
        return [(t, mean, *(interval_95(x, share) or (mean, mean))) for t, x, mean in means]

    users = dict.fromkeys(e.user for e in evaluations)
    of = {variant: [e for e in evaluations if e.user == evaluations[0].user and (e.variant == variant or not e.t)]
          for variant in last_of(evaluations)}
    return {
        "gains": ("Gain in log p(gold) over Q_BASE's own conversation (nats)", 0, "t={}", {variant: {
            "own conversation": line(es, gain), "another user's (Q-Random)": line(es, lambda e: gain(e, "q_random")),
            "none (negative control)": line(es[:1], lambda e: gain(e, "negative_control"))}
            for variant, es in of.items()}),
        "win_rates": ("Win rate against Q_BASE", 0.5, "t={}", {variant: {user: [(0, 0.5, 0.5, 0.5)] + line(
            [e for e in evaluations if (e.variant, e.user) == (variant, user)], points, True) for user in users}
            for variant in of}),
        "coverage": ("What the user told, of what matters for the task", None, "t={}", {variant: {user: [
            (row["iteration"], row["mean"], *(row["interval_95"] or (row["mean"], row["mean"]))) for row in rows
            if (row["metric"], row["roleplayer"]) == ("coverage", user) and row["variant"] in (
                variant, row["iteration"] or "main")] for user in users} for variant in of})}


def examples(e, tasks, personas, gold):
    """What the page shows of each pair, worst first: by the gain of the conversation that was answered and judged, or
    else of the pair's first, over Q_BASE's. Four have a heading: best, worst, of the rest the median won and lost."""
    sides = [(of, {key[:2]: key for key in sorted(of.talks, reverse=True)} | {
        pair: key_of(row) for pair, row in of.responses.items()}) for of in (e.base, e)]
    base, ours = ({pair: of.log_probs["q_experimental"].get(key) for pair, key in keys.items()} for of, keys in sides)
    gains = {pair: x - base[pair] for pair, x in ours.items() if None not in (x, base.get(pair))
             and (pair in e.responses or not e.responses)}
    found, won = [], {pair: {1: "won", 0: "lost"}.get(x, "tied") for pair, x in points(e).items()}
    names = {"ours": [e.name, e.base.name], "base": [e.base.name, e.name]}
    for pair in sorted(gains, key=gains.get):
        texts = zip_longest(*([turn["content"] for turn in of.talks[keys[pair]]] for of, keys in sides), fillvalue="")
        found.append({
            "request": tasks[pair[0]]["task"], "persona": personas[pair[1]]["persona"], "gold": gold[pair], "why": "",
            "won": won.get(pair, "no verdict"), "outcome": f"{gains[pair]:+.2f} nats, {won.get(pair, 'no verdict')}",
            "lines": [("", names["base"]), *(("user" if i % 2 else "asks", both) for i, both in enumerate(texts)),
                      ("answers", [of.responses.get(pair, {}).get("response", "") for of, _ in sides]),
                      ("log p(gold)", [f"{nats[pair]:.2f}" for nats in (base, ours)])],
            "judge": ["The judge, who read {} as A, preferred {}. {}".format(
                names[row["order"].removesuffix("_first")][0], names.get(row["verdict"], ["neither: unreadable"])[0],
                row["raw"]) for row in e.verdicts.get(pair, ())]})
    for why, of in (("best", found[-1:]), ("worst", found[:1]), ("won", found), ("lost", found)):
        if of := [it for it in of if not it["why"] and why in ("best", "worst", it["won"])]:
            of[len(of) // 2]["why"] = why
    return found


# ---------------------------------------------------------------- the page

def write_page(template, run, split, evaluations, pictures, shown, page):
    """Draws the pictures, writes RUN/report/index.html from a template and what it names (page: lines, tables, ...),
    and prints lines, alarms (what the evaluations lack), and the tables `shown`. For aloe/report.py, too."""
    folder, drawn = Path(run, "report" if split == "test" else f"report-{split}"), {}
    folder.mkdir(exist_ok=True)
    try:
        from report.pictures import draw
        drawn = draw(folder, pictures)
    except ModuleNotFoundError as error:
        print(f"No pictures: {error}. `pip install -r report/requirements.txt` brings matplotlib.")
    files = [path.stat().st_mtime for path in [*Path(run).rglob("*.settings.json"), Path(run, "results.jsonl")]]
    start, end = datetime.fromtimestamp(min(files)), datetime.fromtimestamp(max(files))
    when = f"{end:%Y-%m-%d}; {str(end - start).split('.')[0]} from the first file to the last"
    alarms = [f"{e.name}: {no} of {n} {what.replace('_', '-')} are missing or unreadable ({cell(no / n, share=True)})."
              for e in evaluations for what, (no, n) in e.missing.items() if no > 0.05 * n]
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE.parent), trim_blocks=True, lstrip_blocks=True,
                                   undefined=jinja2.StrictUndefined, autoescape=True)
    write_whole(folder / "index.html", printable(templates.get_template(template).render(
        page, run=Path(run).resolve().name, alarms=alarms, when=when,
        pictures=[(base64.b64encode((folder / f"{name}.svg").read_bytes()).decode(), seen)
                  for name, seen in drawn.items()],
        commit=subprocess.getoutput(f"git -C '{HERE}' describe --always --dirty"))))
    print(*(row for text in (*page["lines"], *alarms) for row in textwrap.wrap(text, 100)),
          *(line for table in shown for line in ("", *as_text(table))), "", when, f"{folder}/index.html", sep="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="*", help="a folder that run.sh wrote, or evaluate.py into")
    parser.add_argument("--split", default="test", help="of the tasks and personas")
    parser.add_argument("--tasks", help="tasks (JSONL); default: RUN/tasks.jsonl, or data/tasks.jsonl")
    parser.add_argument("--personas", help="personas (JSONL); default: RUN/personas.jsonl")
    parser.add_argument("--gold", help="gold responses (JSONL); default: RUN/gold-SPLIT.jsonl")
    parser.add_argument("--notes", metavar="FILE", help="a text that is shown on the page")
    parser.add_argument("--power", nargs=2, type=natural, metavar=("PAIRS", "PERSONAS"), help="what so many can show")
    args = parser.parse_args()
    if args.power:
        table = as_table(power, *args.power)
        return print(*as_text(table), *textwrap.wrap(table.notes[0], 100), sep="\n")
    run = args.runs[0] if args.runs else parser.error("name a run's folder, or --power PAIRS PERSONAS")
    results = {folder: [row for row in read_results(f"{folder}/results.jsonl") if row["split"] == args.split] or fail(
        f"{folder}/results.jsonl: no results on split {args.split}. evaluate.py writes them.") for folder in args.runs}
    places = Path(run, "tasks.jsonl"), HERE.parent / "data/tasks.jsonl"
    tasks = read_tasks(args.tasks or next(filter(Path.exists, places)))
    personas = read_personas(args.personas or f"{run}/personas.jsonl")
    evaluations = read_evaluations(run, args.split, tasks, personas)
    gold = read_gold(gold_path := args.gold or f"{run}/gold-{args.split}.jsonl",
                     {pair for e in evaluations for pair in golds(e)})
    # Second judges' verdicts stand beside the first's, and conversations that were cut have a table of their own.
    second = {a.name: [b for b in evaluations[i + 1:] if a.verdicts and b.verdicts and a.responses == b.responses
                       and a.settings["judge"] != b.settings["judge"]] for i, a in enumerate(evaluations)}
    whole = [e for e in evaluations if not e.turns and not any(e in others for others in second.values())]
    last = last_of(whole)
    heads = [last["main"]] if "main" in last else list(last.values())
    e = (heads or whole)[0]
    tasks_met, people_met = (len({key[i] for key in e.talks}) for i in (0, 1))
    tables = [as_table(summary, whole), as_table(planned, whole), as_table(verdicts, whole, second),
              as_table(conversations, whole, personas), as_table(gain_a_turn, evaluations),
              as_table(measures, results, whole[0].user), as_table(trainings, run),
              as_table(who_what_when, {
                  "": {"tasks": tasks_met, "personas": people_met, **e.settings}, "gold": read_settings(gold_path),
                  "training": read_settings(f"{run}/{e.variant}/{e.t}/model")})]
    write_page("report/index.html.jinja", run, args.split, whole, pictures_of(whole, results[run]),
               [tables[5 if len(results) > 1 else 0]], {
        "lines": [*map(headline, heads)], "tables": tables,
        "examples": [(e.name, e in heads, found) for e in [*heads, *(e for e in last.values() if e not in heads)]
                     if (found := examples(e, tasks, personas, gold))],
        "about": re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", read_text(HERE.parent / "README.md"), re.M),
        "variants": {e.variant for e in whole}, "notes": read_text(args.notes) if args.notes else ""})


if __name__ == "__main__":
    run(main)
