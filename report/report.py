"""What a run has learned, to look at: tables, pictures, and conversations before and after training.

    python report/report.py runs/toy             reads the run's folder; no model, no server
    python report/report.py --power 300 10       the smallest win rate that 300 pairs of 10 people can show

    writes  RUN/report/index.html       one file, which opens without a network
            RUN/report/report.md        the same as text
            RUN/report/NAME.png, .svg   the pictures, if matplotlib is there (report/requirements.txt)

Evaluations are found by the settings that evaluate.py leaves beside its rows. Each table is a function; its docstring
stands on the page. Means and shares are over (task, persona) pairs, with 95 % intervals clustered by both.
"""
import argparse
import base64
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import jinja2                                                   # transformers' chat templates need it, too

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
from common import (PAIR, SAMPLE, fail, fingerprint, key_of, natural, pair_of, printable,  # noqa: E402
                    read_conversations, read_gold, read_personas, read_rows, read_settings, read_tasks, run,
                    write_whole)
from evaluate import combine, read_results  # noqa: E402
from report.stats import (as_table, as_text, cell, jackknife, kappa, length_controlled, mean, minus,  # noqa: E402
                          of_pairs, power, share_of, smallest_difference, tables)

HERE = Path(__file__).parent

# ---------------------------------------------------------------- the rows of all evaluations

def read_evaluations(folder, split, tasks, personas):
    """Every evaluation of the split under a run's folder: Q_BASE's, then main's, the first user before others:

    talks      {(task, persona, sample): conversation}      responses  {pair: row}
    log_probs  {condition: {(task, persona, sample): nats}} verdicts   {pair: its rows, one for each order}
    base       Q_BASE's evaluation with the same user       settings, name, variant, t, user, turns
    """
    there = [(path.parent, read_settings(str(path).removesuffix(".settings.json")))
             for path in sorted(Path(folder).rglob("*.settings.json"))]
    settings = {path: s for path, s in there if s.get("split") == split and "iteration" in s}
    names = {s["conversations"].split(" (")[0] for s in settings.values()}
    files = {fingerprint(str(path)): path for path in sorted(Path(folder).rglob("*.jsonl")) if path.name in names}
    found = []
    for path, s in settings.items():
        if s["conversations"] not in files:
            fail(f"{path}: made from {s['conversations']}, which is not in {folder}. Evaluate again.")
        rows = {name: list(read_rows(path / f"{name}.jsonl", key, fields)) if (path / f"{name}.jsonl").exists() else []
                for name, key, fields in (
                    ("log_probs", {**SAMPLE, "condition": str}, {"log_prob": float | int | None}),
                    ("responses", SAMPLE, {"turns": int, "response": str}),
                    ("verdicts", {**PAIR, "order": str}, {"turns": int, "verdict": str | None, "raw": str}))}
        e = SimpleNamespace(settings=s, variant=s["variant"], t=s["iteration"], user=s["roleplayer"],
                            turns=s.get("turns"), verdicts={}, log_probs=defaultdict(dict),
                            refused=sum("refused" in r for f in rows.values() for r in f))
        e.name = f"{e.variant}, t={e.t}" if e.t or e.variant != "main" else "Q_BASE"
        talks = read_conversations(files[s["conversations"]], tasks, personas)
        e.talks = {key_of(row): row["conversation"] for row in talks if "refused" not in row}
        e.users = {pair_of(row): row.get("roleplayer", e.user) for row in talks}
        e.responses = {pair_of(row): row for row in rows["responses"] if "refused" not in row}
        for row in rows["log_probs"]:
            if row.get("log_prob") is not None:
                e.log_probs[row["condition"]][key_of(row)] = row["log_prob"]
        e.golds = {condition: of_pairs(nats) for condition, nats in e.log_probs.items()}
        for row in rows["verdicts"]:
            e.verdicts.setdefault(pair_of(row), []).append(row)
        found.append(e)
    if not found:
        fail(f"{folder}: no evaluation of split {split} is there. evaluate.py writes them.")
    # The first user is whom Q_BASE has met in the least deep folder: others have a folder each.
    user = settings[min(settings, key=lambda path: (settings[path]["iteration"], len(path.parts)))]["roleplayer"]
    found.sort(key=lambda e: (e.t > 0, e.user != user, e.user, e.variant != "main", e.variant, e.t))
    nobody = SimpleNamespace(golds={}, responses={})         # Q_BASE has not met this user
    for e in found:
        e.base = next((other for other in found if other.t == 0 and other.user == e.user), nobody)
    return found


def golds(e, condition="q_experimental"):
    """{pair: log p_QBASE(gold) in nats}"""
    return e.golds.get(condition, {})


def alone(e):
    """{pair: Q-Experimental minus Q-Random}"""
    return minus(golds(e), golds(e, "q_random"))


def points(e):
    """{pair: 1 for a win, .5 for a tie, 0 for a loss} of the pairs with readable verdicts"""
    verdicts = {pair: combine([row["verdict"] for row in rows]) for pair, rows in e.verdicts.items()}
    return {pair: {"ours": 1.0, "tie": 0.5, "base": 0.0}[verdict] for pair, verdict in verdicts.items() if verdict}


# ---------------------------------------------------------------- what a sceptic asks: a generator of rows each

def summary(evaluations):
    """Each model in one line.

    log p(gold): nats under Q_BASE after the model's conversation (Q-Experimental). For this user alone: Q-Experimental
    minus Q-Random, the same gold after another user's conversation: how much it matters whom the model asked. A part of
    it is the harm that a stranger's answers do. Gain: the paired difference to Q_BASE's log p(gold). n: pairs with a
    gold, with a verdict; rows refused or unreadable. Where several users answered, the pairs of each follow.

    log_probs.jsonl, verdicts.jsonl; section 4 of the paper."""
    for e in evaluations:
        users = sorted(set(e.users.values()))
        for user in [None, *(users if len(users) > 1 else ())]:
            nats, own, gain, won = ({pair: x for pair, x in values.items() if user in (None, e.users[pair])}
                                    for values in (golds(e), alone(e), minus(golds(e), golds(e.base)), points(e)))
            yield {"model": e.name, "user": user or e.user, "log p(gold)": mean(nats), "for this user alone": mean(own),
                   "gain": mean(gain) if e.t else "", "win rate": mean(won, share=True) if e.t else "",
                   "n": f"{len(nats)}, {len(won)}" + f"; {e.refused}" * (user is None)}


def differences(evaluations):
    """Paired differences.

    The same pairs under two models, with the first user. Where the interval leaves out 0 there is a difference;
    by chance alone 1 in 20 does. Smallest: the true difference that so many pairs would show in 8 of 10 studies, at the
    5 % level. For this user alone: Q-Experimental minus Q-Random.

    log_probs.jsonl, verdicts.jsonl; Cameron, Gelbach and Miller 2011; Bloom 1995."""
    of = {(e.variant, e.t): e for e in reversed(evaluations) if e.user == evaluations[0].user}
    for (variant, t), e in reversed(of.items()):
        others = {(variant, t - 1) if t > 1 else ("main", 0), ("main", t), (f"base_{variant}", t)} - {(variant, t)}
        for other in sorted(others) if t else ():
            a, b = (e, of.get(other)) if other[1] < t else (of.get(other), e)
            for what, values, digits in (("log p(gold)", golds, 2), ("for this user alone", alone, 2),
                                         ("win rate", points, 3)):
                if a and b and (values := minus(values(a), values(b))):
                    smallest = smallest_difference(values)
                    yield {"difference": f"{a.name} - {b.name}", "of": what, "mean": mean(values, digits),
                           "smallest": cell(smallest, None, digits), "n": str(len(values))}


def win_rates(evaluations):
    """Win rate by length of the conversation, and by order.

    Wins + half the ties. At A, at B: where the model's answer stood; a judge without a bias for a place gives both the
    same. A tie: the judge saw both orders, and contradicted itself.

    verdicts.jsonl."""
    for e in filter(points, evaluations):
        turns, won = {pair: rows[0]["turns"] for pair, rows in e.verdicts.items()}, Counter(points(e).values())
        verdicts = [(pair, row) for pair, rows in e.verdicts.items() for row in rows if row["verdict"]]
        yield {"model": e.name, "user": e.user,
               **{f"{k} question{'s' * (k > 1)}": mean({pair: x for pair, x in points(e).items() if turns[pair] == k},
                                                       share=True) for k in sorted(set(turns.values()))},
               **{f"at {place}": mean(of_pairs([(pair, row["verdict"] == "ours") for pair, row in verdicts
                                                if row["order"] == order]), share=True)
                  for place, order in (("A", "ours_first"), ("B", "base_first"))},
               "won, tied, lost": f"{won[1]}, {won[0.5]}, {won[0]}", "unreadable": str(len(turns) - won.total())}


def answers(evaluations):
    """The answers, and the win rate if both had the same length.

    log(p / (1 - p)) = a + b x (difference in words / its standard deviation), fitted to the verdicts, a tie as half a
    win, b held by a ridge of .01. Length-controlled is p at difference 0. With a question: with a question mark.

    verdicts.jsonl, responses.jsonl; after Dubois et al. 2024 (AlpacaEval 2)."""
    for e in evaluations:
        texts = {pair: row["response"] for pair, row in e.responses.items()}
        words = {pair: float(len(text.split())) for pair, text in texts.items()}
        longer = minus(words, {pair: len(row["response"].split()) for pair, row in e.base.responses.items()})
        both = {pair: (x, longer[pair]) for pair, x in points(e).items() if pair in longer}
        if texts:
            yield {"model": e.name, "user": e.user, "words": mean(words, 1),
                   "more than Q_BASE": mean(longer, 1) if e.t else "",
                   "with a question": mean({pair: float("?" in text) for pair, text in texts.items()}, share=True),
                   "win rate": mean(points(e), share=True) if both else "",
                   "length-controlled": cell(*map(share_of, jackknife(length_controlled, both))) if both else "",
                   "n": str(len(texts))}


def judges(evaluations):
    """Two judges of the same answers.

    Cohen's kappa = (agreement - agreement by chance) / (1 - agreement by chance). To have a second judge, run
    evaluate.py again with another --judge, --variant and --output.

    verdicts.jsonl of both; Cohen 1960."""
    for i, a in enumerate(evaluations):
        for b in evaluations[i + 1:]:
            first, second = points(a), points(b)
            if first and second and a.responses == b.responses and a.settings["judge"] != b.settings["judge"]:
                both = {pair: (x, second[pair]) for pair, x in first.items() if pair in second}
                yield {"model": a.name, "judges": f"{a.settings['judge']}, {b.settings['judge']}",
                       "first": mean(first, share=True), "second": mean(second, share=True),
                       "kappa": cell(*jackknife(kappa, both)), "n": str(len(both))}


def words_of(text):
    return re.findall(r"[\w']+", text.lower().replace("’", "'"))


def ngrams(texts, n):
    return [gram for text in texts for gram in zip(*(words_of(text)[i:] for i in range(n)))]


def talked(evaluations):
    """The evaluations of different conversations: Q_BASE's answers on Q_t's conversations add none."""
    first = {e.settings["conversations"]: e for e in reversed(evaluations)}
    return [e for e in evaluations if first[e.settings["conversations"]] is e]


def questions(evaluations):
    """The questions.

    Repeated: share of a conversation's questions that it has asked before, word for word. Distinct-n: different n-grams
    / all n-grams of a pair's questions. Asked of others: share of the questions that some other user with the same task
    is asked, too, word for word; 1: nothing is tailored to the user. More users or samples make it larger.

    The conversations; Li et al. 2016 (distinct-n)."""
    for e in talked(evaluations):
        asked = [(key, turn["content"]) for key, talk in e.talks.items() for turn in talk[::2]]
        of_talk, of_pair, users = defaultdict(list), defaultdict(list), defaultdict(set)
        for (task, persona, sample), text in asked:
            of_talk[task, persona, sample].append(text)
            of_pair[task, persona].append(text)
            users[task, text].add(persona)
        yield {"model": e.name, "user": e.user,
               "repeated": mean(of_pairs({key: 1 - len(set(texts)) / len(texts) for key, texts in of_talk.items()}), 3),
               **{f"distinct-{n}": mean({pair: len(set(grams)) / len(grams) for pair, texts in of_pair.items()
                                         if (grams := ngrams(texts, n))}) for n in (1, 2)},
               "asked of others": mean(of_pairs([(key, len(users[key[0], text]) > 1) for key, text in asked])),
               "words": mean(of_pairs([(key, len(words_of(text))) for key, text in asked]), 1), "n": str(len(of_pair))}


def simulated_users(evaluations, personas):
    """The simulated users.

    Shares of the user's answers: with a question mark; with "you should", "I recommend" or the like, which is the
    assistant's part; without I, me, my, we, us or our. Persona told: share of the persona's word trigrams that one
    answer repeats; whoever tells everything at once makes any question a good one.

    The conversations. tau2-bench counts such faults of its simulator among the failures of agents."""
    known = {i: set(ngrams([row["persona"]], 3)) for i, row in personas.items()}
    advice, first = (r"you (should|could|might want to|can try)|i('d| would)? (recommend|suggest)|as an ai",
                    "i|me|my|mine|we|us|our|i'm|i've|i'd|i'll")
    rules = {"asks back": lambda i, text: "?" in text,
             "advises": lambda i, text: bool(re.search(rf"\b({advice})\b", " ".join(words_of(text)))),
             "not in the first person": lambda i, text: not set(first.split("|")) & set(words_of(text)),
             "persona told": lambda i, text: len(known[i] & set(ngrams([text], 3))) / max(1, len(known[i]))}
    for e in talked(evaluations):
        told = [(key, turn["content"]) for key, talk in e.talks.items() for turn in talk[1::2]]
        yield {"asked by": e.name, "user": e.user, "n": str(len({key[:2] for key, _ in told})),
               **{name: mean(of_pairs([(key, rule(key[1], text)) for key, text in told]), 3)
                  for name, rule in rules.items()}}


def gain_a_turn(evaluations):
    """Log-probability of the gold after so many questions.

    Nats under Q_BASE, of the pairs with the longest conversations, cut after 0, 1, ... questions.

    log_probs.jsonl of VARIANTS=turns (evaluate.py --turns)."""
    for e in [e for e in evaluations if golds(e) and not e.turns]:
        cut = {c.turns: golds(c) for c in evaluations
               if c.turns and (c.t, c.settings["conversations"]) == (e.t, e.settings["conversations"])}
        steps = {0: golds(e.base, "negative_control"), **cut, max(map(len, e.talks.values())) // 2: golds(e)}
        pairs = [pair for pair in golds(e) if all(pair in step for step in steps.values())]
        if cut:
            yield {"model": e.name, "user": e.user, "n": str(len(pairs)),
                   **{str(k): mean({pair: steps[k][pair] for pair in pairs}) for k in sorted(steps)}}


# ---------------------------------------------------------------- conversations to read

def examples(e):
    """{why a pair is shown: pair}, by the gain in its gold's log-probability over Q_BASE."""
    gains = {pair: x for pair, x in minus(golds(e), golds(e.base)).items()
             if pair in e.responses and pair in e.base.responses}
    ranked = sorted(gains, key=gains.get)
    same = [pair for pair in ranked if e.responses[pair]["response"] == e.base.responses[pair]["response"]]
    torn = [pair for pair in ranked if {row["verdict"] for row in e.verdicts.get(pair, ())} >= {"ours", "base"}]
    chosen = {"the best gain": ranked[-1:], "the median": ranked[len(ranked) // 2:], "the worst": ranked,
              "a tie: the same answer": same, "the judge contradicts itself in the other order": torn}
    return {f"{why} ({gains[pairs[0]]:+.2f} nats)": pairs[0] for why, pairs in chosen.items() if pairs}


def side(e, pair):
    """A pair's conversation that was answered, its answer, and log p(gold) of each of its samples."""
    row = e.responses[pair]
    return {"name": e.name, "talk": e.talks[key_of(row)], "response": row["response"], "sample": row["sample"],
            "nats": {key[2]: x for key, x in e.log_probs["q_experimental"].items() if key[:2] == pair}}


# ---------------------------------------------------------------- the page

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", nargs="?", help="a folder that run.sh wrote, or evaluate.py into")
    parser.add_argument("--split", default="test", help="of the tasks and personas")
    parser.add_argument("--tasks", help="tasks (JSONL); default: RUN/tasks.jsonl, or data/tasks.jsonl")
    parser.add_argument("--personas", help="personas (JSONL); default: RUN/personas.jsonl")
    parser.add_argument("--gold", help="gold responses (JSONL); default: RUN/gold-SPLIT.jsonl")
    parser.add_argument("--notes", metavar="FILE", help="a text that is shown on the page")
    parser.add_argument("--published", action="store_true", help="draw the paper's values beside the run's")
    parser.add_argument("--power", nargs=2, type=natural, metavar=("PAIRS", "PERSONAS"), help="what so many can show")
    args = parser.parse_args()
    return args if args.run or args.power else parser.error("name a run's folder, or --power PAIRS PERSONAS")


def main():
    args = parse_args()
    if args.power:
        return print(*as_text(as_table(power, *args.power)), sep="\n")
    rows = [row for row in read_results(f"{args.run}/results.jsonl") if row["split"] == args.split]
    if not rows:
        fail(f"{args.run}/results.jsonl: no results on split {args.split}. evaluate.py writes them.")
    tasks = read_tasks(args.tasks or next(filter(Path.exists, (
        Path(args.run, "tasks.jsonl"), HERE.parent / "data/tasks.jsonl"))))
    personas = read_personas(args.personas or f"{args.run}/personas.jsonl")
    gold = read_gold(args.gold or f"{args.run}/gold-{args.split}.jsonl")
    evaluations = read_evaluations(args.run, args.split, tasks, personas)
    whole = [e for e in evaluations if not e.turns]             # cut conversations have a table of their own
    rows = [row for row in rows if row["variant"] not in {e.variant for e in evaluations if e.turns}]
    means = tables(rows)
    print(*(line for one in means for line in as_text(one)), sep="\n")
    folder = Path(args.run, "report" if args.split == "test" else f"report-{args.split}")
    folder.mkdir(exist_ok=True)
    try:
        from report.pictures import draw
        published = read_results(HERE.parent / "data/published.jsonl") if args.published else []
        pictures = draw(folder, rows, args.run, evaluations[0].user, published)
    except ModuleNotFoundError as error:
        pictures = {}
        print(f"\nNo pictures: {error}. `pip install -r report/requirements.txt` brings matplotlib.")
    mine = [e for e in whole if (e.variant, e.user) == ("main", whole[0].user)]     # in order of t
    page = {"last": mine[-1].t if mine else 0, "won": mean(points(mine[-1]), share=True) if mine else "-",
            "gain": mean(minus(golds(mine[-1]), golds(mine[-1].base))) if mine else "-",
            "run": args.run, "split": args.split, "settings": evaluations[0].settings, "pictures": pictures,
            "variants": list(dict.fromkeys(e.variant for e in whole)),
            "svg": {name: base64.b64encode((folder / f"{name}.svg").read_bytes()).decode() for name in pictures},
            "notes": Path(args.notes).read_text(encoding="utf-8") if args.notes else "",
            "tables": [as_table(summary, whole), *means,
                       *(as_table(each, whole) for each in (differences, win_rates, answers, judges, questions)),
                       as_table(gain_a_turn, evaluations), as_table(simulated_users, whole, personas)],
            "examples": [(e, {why: (tasks[pair[0]]["task"], personas[pair[1]]["persona"], gold[pair],
                                    [side(of, pair) for of in (e.base, e)], e.verdicts.get(pair, []))
                              for why, pair in chosen.items()}) for e in whole if e.t and (chosen := examples(e))]}
    for name in ("index.html", "report.md"):
        templates = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), trim_blocks=True,
                                       lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape="html" in name)
        write_whole(folder / name, printable(templates.get_template(f"{name}.jinja").render(page)))
    print(f"\n{folder}/index.html: {sum(map(bool, page['tables']))} tables, {len(pictures)} pictures, conversations of "
          f"{len(page['examples'])} models")


if __name__ == "__main__":
    run(main)
