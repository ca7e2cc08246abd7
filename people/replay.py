"""People's logged answers as a test of the objective, and of a Questioner (docs/people.md has the commands).

gain         log p_BASE(gold | task, question, answer) - log p_BASE(gold | task), in nats
own, other   gain after a person's own answer; after that of a person with another need, who answers otherwise
own above    share of these questions after which the own answer gains more
chance       gain after the own answer, where each logged question of a person is equally likely
by total     sum of p_Q(question) gain: p_Q is a softmax of log p_Q(question | task) over a person's questions
by token     the same with log p_Q(question | task) divided by the question's tokens; by word: by its words
ceiling      without knowing the need: gain after the question that is best, on average, for the task's other persons
maximum      gain after each person's best question: a maximum over noise, since this gain is what picks the question
mean (95%)   over a person's questions, then over n persons; the interval is clustered by task
"""
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.special import softmax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages
from common import (FORM, PAIR, Rows, add_data_flags, add_model_flags, fingerprint, pair_of,  # noqa: E402
                    read_conversations, read_gold, read_personas, read_prompts, read_tasks, response_form, run,
                    sample_pairs, say, score_all, seed_for, stage_parser, start_processes)
from report.stats import mean  # noqa: E402
from simulate import questioner_chat  # noqa: E402


def expected(gains, scores):
    """Both {(task, person, question): value} -> {(task, person): sum over q of p(q) gain(q)}; p: softmax of scores."""
    people = defaultdict(list)
    for key in scores:
        people[key[:2]].append((scores[key], gains[key]))
    return {person: float(softmax(score) @ gain)                                    # sum_q p(q) gain(q)
            for person, pairs in people.items() for score, gain in [np.array(pairs).T]}


def main():
    parser = stage_parser(__doc__, "all scores (JSONL)", "work on a seeded sample of N tasks, with all their persons")
    parser.add_argument("--base", nargs="+", required=True, metavar="MODEL", help="score golds; the last one for (b)")
    parser.add_argument("--questioner", nargs="+", default=[], metavar="Q", help="might ask the logged questions")
    add_data_flags(parser)
    parser.add_argument("--gold", default="runs/gold.jsonl", help="gold responses (JSONL)")
    parser.add_argument("--conversations", required=True, help="the log (JSONL): of each the first question and answer")
    add_model_flags(parser, batch_size=16)
    args = parser.parse_args()
    tasks, personas = read_tasks(args.tasks, args.tasks_per_split), read_personas(args.personas)
    rows = [row for row in read_conversations(args.conversations, tasks, personas) if not row.get("refused")]
    golds, prompts = read_gold(args.gold, map(pair_of, rows)), read_prompts(*FORM, "elicitation", folder=args.prompts)
    kept, processes = sample_pairs([(row["task_id"],) for row in rows], args.limit, args.seed), start_processes()
    own = {(*pair_of(row), row["conversation"][0]["content"]): row["conversation"][:2] for row in rows
           if (row["task_id"],) in kept and golds[pair_of(row)]}                    # {(task, person, question): talk}
    other = {(t, p, q): found[seed_for(args.seed, t, p, q) % len(found)] for (t, p, q), talk in own.items()
             if (found := [own[t, o, q] for o in personas if own.get((t, o, q), talk) != talk])}
    talks = {"own": own, "other": other, "none": {(t, p, ""): [] for t, p, _ in own}}
    chats = {(t, p, q, of): [*response_form(personas[p]["name"], tasks[t]["task"], talk, form=prompts),
             {"role": "assistant", "content": golds[t, p]}] for of in talks for (t, p, q), talk in talks[of].items()}
    asked = {(t, "", q, "question"): [*questioner_chat(personas[p]["name"], tasks[t]["task"], [], prompts), talk[0]]
             for (t, p, q), talk in own.items()}                                    # once for all persons
    output = Rows(args, args.output, ("model", *PAIR, "question", "of"), processes, ("base", "questioner"), **prompts)

    def score(spec, chats):
        """{(task, person, question, of): chat} -> {the same: row with `log_prob` and `tokens` of its last turn}"""
        model = fingerprint(spec)                               # a name and a hash: --output keeps all models' scores
        score_all(output, [(model, *key) for key in chats], lambda key: chats[key[1:]], spec)
        return {key: output[(model, *key)] for key in chats}

    say(processes, f"{'(a) nats, mean (95%)':20}{'own':>25}{'other':>25}{'own above':>25}{'n':>5}")
    for base in args.base:
        rows, even = score(base, chats), dict.fromkeys(other, 0.0)
        gain, others = ({(t, p, q): rows[t, p, q, of]["log_prob"] - rows[t, p, "", "none"]["log_prob"]
                         for t, p, q in talks[of]} for of in ("own", "other"))
        above = {key: float(gain[key] > others[key]) for key in other}
        means = [expected(values, even) for values in (gain, others, above)]
        say(processes, f"{base[-20:]:20}{''.join(f'{mean(of):>25}' for of in means)}{len(means[0]):5}")

    scores, chance = {"chance": dict.fromkeys(own, 0.0)}, expected(gain, dict.fromkeys(own, 0.0))
    for spec in args.questioner:
        rows = score(spec, asked)
        for i, by in enumerate(("total", "token", "word")):
            scores[f"{spec} by {by}"] = {(t, p, q): row["log_prob"] / (1, row["tokens"], len(q.split()))[i]
                                         for t, p, q in own for row in [rows[t, "", q, "question"]]}
    scores["ceiling"] = {(t, p, q): 1e9 * np.mean(found) for t, p, q in own if (                    # 1e9: p is 1
        found := [gain[t, o, q] for o in personas if o != p and (t, o, q) in gain])}                # for the best
    scores["maximum"] = {key: 1e9 * gain[key] for key in own}
    say(processes, "", f"{'(b) nats, mean (95%)':20}{'gain':>25}{'above chance':>25}{'n':>5}")
    for name, choice in scores.items():
        value = expected(gain, choice)
        more = {person: value[person] - chance[person] for person in value}
        say(processes, f"{name[-20:]:20}{mean(value):>25}{mean(more):>25}{len(value):5}")
    say(processes, "", __doc__.split("\n\n")[1])


if __name__ == "__main__":
    run(main)
