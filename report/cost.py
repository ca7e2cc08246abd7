"""What commands will ask and compute: calls, tokens, dollars, trainings, conversations and scores.

    PRINT=1 bash run.sh paper | python report/cost.py --prices 1.25 10          (or aloe/run.sh)
    echo python gold.py --oracle openai:MODEL --personas p.jsonl --output g.jsonl | python report/cost.py

Each stage's own parser reads its commands. An output that several share counts once, and as if nothing of it were there
yet. Tokens are estimates. Dollars are for "openai:" models, but not for a folder's, which settings/serve.sh serves.
"""
import argparse
import shlex
import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parents[1]))
from common import SAMPLE, amount, fail, pair_of, read_rows, read_tasks, response_form, run  # noqa: E402

STAGES = "generate_personas.py gold.py simulate.py select.py train.py evaluate.py".split()
# Estimates, in tokens. Prompts are measured, four characters a token, with such texts in them. The last are ALOE's.
PERSONA, GOLD, QUESTION, ANSWER, RESPONSE, VERDICT, MESSAGE, SCORE, SEEDS = 170, 250, 50, 60, 250, 150, 50, 2, 800
TASK, WORD = "How do I start a small herb garden?", "word"
TALK = [{"role": "assistant", "content": WORD * QUESTION}, {"role": "user", "content": WORD * ANSWER}]


def calls_of(name, stage, a, people, talks, work):
    """Yields (role, models, calls, a prompt, tokens of an answer) of a command with flags `a`, and adds to `work`. What
    files will have: people, {path: {split: how many}}; talks, {path: (pairs, samples of each)}."""
    def users(split):
        return (people.get(a.personas) or Counter(
            row["split"] for row in read_rows(a.personas, {"persona_id": str}, {"split": str})))[split]

    def pairs(split):                                           # a toy's tasks are written by the run
        tasks = Counter({split: a.tasks_per_split}) if a.tasks_per_split and not Path(a.tasks).exists() else Counter(
            row["split"] for row in read_tasks(a.tasks, a.tasks_per_split).values())
        return min(most, users(split) * tasks[split])

    most = a.limit or sys.maxsize
    work["trainings"] += name.endswith("train.py")
    if name in ("select.py", "evaluate.py"):
        there = a.conversations not in talks and Counter(map(pair_of, read_rows(a.conversations, SAMPLE, {})))
        n, samples = talks.get(a.conversations) or (len(there), max(there.values(), default=0))
        n, chat = min(n, most), response_form("June", TASK, TALK * 2)
    if name.endswith("generate_personas.py"):
        people[a.output] = Counter({split: min(most, n if type(n) is int else len(n)) for split, n in a.splits.items()})
        yield "writer", [a.model], *((30, [{"content": WORD * 400}], SEEDS) if "aloe" in name else (       # some 30
            people[a.output].total(), stage.persona_request([WORD * PERSONA] * 2, 0).chat, PERSONA))
    elif name == "gold.py":
        yield "Oracle", [a.oracle], sum(map(pairs, a.split)), stage.oracle_chat(WORD * PERSONA, TASK), GOLD
    elif name == "simulate.py":
        n, samples = talks[a.output] = pairs(a.split), a.samples
        work["conversations"] += n * samples
        turns = n * samples * (a.max_turns + 1) // 2            # of 1..K, on average
        yield "Questioner", [a.questioner], turns, stage.questioner_chat("June", TASK, TALK), QUESTION
        yield "Roleplayer", a.roleplayer, turns, stage.roleplayer_chat(WORD * PERSONA, TASK, TALK), ANSWER
    elif name == "select.py":
        work["scores"] += n * samples
        yield "Questioner", [a.questioner], n * a.k * (not a.no_response), chat, RESPONSE
    elif name == "evaluate.py":
        n = n // 3 if a.turns else n                            # the longest alone, of K = 3 questions
        work["scores"] += 2 * n * (samples + (a.iteration == 0)) * ("log_prob" in a.metrics)    # Q_BASE has controls
        yield "Questioner", [a.questioner], min(n, a.win_pairs) * ("win_rate" in a.metrics), chat, RESPONSE
        chat = stage.judge_chat(WORD * PERSONA, TASK, WORD * RESPONSE, WORD * RESPONSE, "ours_first")
        yield "judge", [a.judge] * bool(a.judge), min(n, a.win_pairs) * (1 + a.both_orders), chat, VERDICT
    elif name in ("aloe/simulate.py", "aloe/evaluate.py"):
        work["conversations"] += (n := min(users(a.split), most))
        chat = [{"content": WORD * (MESSAGE * a.rounds + 300)}]                 # half of a conversation, and its prompt
        yield "Roleplayer", a.roleplayer, n * a.rounds, chat, MESSAGE
        yield "model", [a.model], n * a.rounds * (2 if "inducer" in a else 1), chat, MESSAGE
        yield ("inducer", [a.inducer], n * a.rounds, chat, MESSAGE) if "inducer" in a else (
            "judge", [a.judge], n * a.rounds, [{"content": WORD * 450}], SCORE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prices", type=amount, nargs=2, default=[0, 0], metavar=("IN", "OUT"), help="of 1e6 tokens")
    args, table, work, people, talks, seen = parser.parse_args(), {}, Counter(), {}, {}, set()
    argparse.ArgumentParser.error = lambda _, message: fail(message)            # a stage's: one line
    lines = [shlex.split(line) for line in sys.stdin if ".py" in line and not line.startswith("#")]
    for words in (line[i:] for line in lines for i, word in enumerate(line) if word.removeprefix("aloe/") in STAGES):
        spec, sys.argv = spec_from_file_location("stage", ROOT / words[0]), words       # (`import select` is Python's.)
        spec.loader.exec_module(stage := module_from_spec(spec))
        if (a := stage.parse_args()).output not in seen:
            seen.add(a.output)
            for role, models, n, chat, answer in calls_of(words[0], stage, a, people, talks, work):
                tokens = sum(len(turn["content"]) for turn in chat) // 4, min(answer, a.max_tokens)
                for name in (model.split("@http")[0] for model in models if n):
                    paid, each = name.startswith("openai:") and not Path(name[7:]).is_dir(), n // len(models)
                    table.setdefault((role, name if paid else "on this machine"), Counter()).update(
                        calls=each, tokens_in=each * tokens[0], out=each * tokens[1],
                        dollars=paid * each * (args.prices[0] * tokens[0] + args.prices[1] * tokens[1]) / 1e6)
    seen or fail("no command of a stage. PRINT=1 bash run.sh paper prints some.")
    for who, row in table.items():
        print("{:10}  {:40} {:>11,} calls {:>15,} tokens in {:>13,} out {:>12,.2f} $".format(*who, *row.values()))
    print(*(f"{work[what]:,} {what}," for what in ("trainings", "conversations", "scores")),
          f"{sum(row['dollars'] for row in table.values()):,.2f} $")


if __name__ == "__main__":
    run(main)
