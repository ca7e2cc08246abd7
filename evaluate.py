"""Evaluate a Questioner: gold log-probabilities in four conditions, and a judge's verdicts against Q_BASE (Section 4).

    log-probabilities   log p_QBASE(g | t, s) for the test golds g, where s is Q_t's conversation (Q-Experimental), its
                        conversation with another persona (Q-Random), none (negative control), or not needed, since the
                        prompt tells the persona (positive control)
    win rates           Q_t and Q_BASE each answer after a conversation of their own; a judge who sees the persona picks

Q_BASE is evaluated first (`--iteration 0`); the folder that this writes is the `--baseline` of all others.

    reads   --conversations   the rows of simulate.py for the test split        --gold    the rows of gold.py
    writes  --output FOLDER   log_probs.jsonl  {"task_id", "persona_id", "sample", "condition", "log_prob", "tokens"}
                              responses.jsonl  {"task_id", "persona_id", "sample", "turns", "response"}
                              verdicts.jsonl   {"task_id", "persona_id", "turns", "order", "verdict", "raw"}
            --results         {"variant": "main", "iteration": 1, "metric": "win_rate", "condition": "", "roleplayer":
                               "mixtral", "split": "test", "mean": 0.68, "sem": 0.03, "interval_95": [...], "n": 289}

On a laptop (files from simulate.py's and gold.py's examples):
    python evaluate.py --base toy/base --questioner toy/base --dtype float32 --iteration 0 --split A \\
        --tasks runs/t.jsonl --personas runs/p.jsonl --gold runs/g.jsonl --conversations runs/c.jsonl \\
        --output runs/e0 --results runs/results.jsonl
The paper's scale, 5,000 conversations and 300 verdicts: PRINT=1 bash run.sh paper prints the command.
"""
import fcntl
import json
import math
import os
import re
from argparse import Namespace
from collections import Counter, defaultdict

import numpy as np

from common import (FORM, PAIR, Request, Rows, SAMPLE, add_data_flags, add_model_flags, amount,
                    answer_all, fail, fingerprint, json_object, key_of, name_of, natural, nucleus, number, pair_of,
                    read_conversations, read_gold, read_personas, read_prompts, read_rows, read_settings, read_tasks,
                    read_text, response_form, run, sample_pairs, say, score_all, seed_for, settings_of, stage_parser,
                    start_processes, write_whole)

PROMPTS = read_prompts("judge_system", "judge_user")            # figures 15 and 16
CONDITIONS = ("q_experimental", "q_random", "negative_control", "positive_control")
RESULT_KEY = {"variant": str, "iteration": int, "metric": str, "condition": str, "roleplayer": str, "split": str}


def rotation(persona_ids, task_id, seed):
    """{persona: another persona} for one task, by a seeded rotation of 1..P-1 places, so that nobody meets itself and
    each is met once. Empty where there are fewer than two."""
    P = len(persona_ids)
    shift = 1 + seed_for(seed, "rotation", task_id) % (P - 1) if P > 1 else 0
    return {persona_ids[j]: persona_ids[(j + shift) % P] for j in range(P)} if shift else {}


def conditions(conversations, pairs, seed, controls):
    """{(task_id, persona_id, sample, condition): conversation} for some pairs, with --limit not all.

    conversations: {(task_id, persona_id, sample): list of turns}, all that there are: among them another persona's is
    drawn. The controls need no Questioner: one row a pair.
    """
    people = defaultdict(list)
    for task_id, persona_id in sorted({key[:2] for key in conversations}):
        people[task_id].append(persona_id)
    other = {task_id: rotation(ids, task_id, seed) for task_id, ids in people.items()}
    rows = {}
    for (task_id, persona_id, sample), conversation in conversations.items():
        if (task_id, persona_id) not in pairs:
            continue
        rows[task_id, persona_id, sample, "q_experimental"] = conversation
        source = task_id, other[task_id].get(persona_id), sample
        if source in conversations:
            rows[task_id, persona_id, sample, "q_random"] = conversations[source]
        rows |= {(task_id, persona_id, 0, control): [] for control in CONDITIONS[2:] if controls}
    return rows


ORDERS = ["ours_first", "base_first"]                           # which response stands at A


def win_pairs(turns, how_many, K, seed):
    """{pair: its order before the judge} of the win rate's pairs: floor(how_many / K) of each conversation length 1..K,
    drawn by a hash, so that they are the same for every model, half of each in either order. turns: {pair: length}."""
    return {pair: ORDERS[rank % 2] for length in range(1, K + 1) for rank, pair in enumerate(
        sorted((pair for pair in turns if turns[pair] == length),
               key=lambda pair: (seed_for(seed, "win", *pair), pair))[:how_many // K])}


def judge_chat(persona, task, ours, base, order, prompts=PROMPTS):
    """The judge's prompt. order: "ours_first" puts our response at A, "base_first" Q_BASE's."""
    a, b = (ours, base) if order == "ours_first" else (base, ours)
    return [{"role": "system", "content": prompts["judge_system"]}, {"role": "user", "content":
            prompts["judge_user"].format(persona=persona, task=task, response_a=a, response_b=b)}]


def read_verdict(raw, order):
    """"ours", "base", or None if the judge's last line does not say A or B alone, as it was told to: never a guess.
    "B", "Final Response: A", "final answer: **B**" and "Assistant A." do; "A is better than B" does not."""
    words = "the|my|final|assistant|response|answer|verdict|choice|option|winner|is|boxed"
    match = re.fullmatch(rf"[\W_]*(?:(?:{words})\b[\W_]*)*([AB])[\W_]*", "".join(raw.strip().splitlines()[-1:]), re.I)
    return match and ("ours" if (match[1].upper() == "A") == (order == "ours_first") else "base")


def combine(verdicts):
    """One verdict of a pair from one order or both: None if one is unreadable, a disagreement is a tie."""
    return None if None in verdicts else verdicts[0] if len(set(verdicts)) == 1 else "tie"


# ---------------------------------------------------------------- means over pairs, and their errors

def by_pair(rows, value):
    """{(task_id, persona_id): mean over its samples}: a pair's samples are not independent of one another. A value that
    is None is left out."""
    groups = defaultdict(list)
    for row in rows:
        if row[value] is not None:
            groups[pair_of(row)].append(row[value])
    return {pair: float(np.mean(group)) for pair, group in groups.items()}


def clustered_sem(values):
    """Standard error of a mean over {(task, persona): value}, clustered by task and by persona: pairs that share either
    are not independent. Variance = by task + by persona - by pair, and at least that of independent pairs (Cameron,
    Gelbach and Miller 2011). None where a task or a persona stands alone."""
    n, mean, variance = len(values), sum(values.values()) / max(1, len(values)), []
    for cluster in (lambda pair: pair[0], lambda pair: pair[1], lambda pair: pair):
        sums = defaultdict(float)
        for pair, value in values.items():
            sums[cluster(pair)] += value - mean
        if len(sums) < 2:
            return None
        variance.append(len(sums) / (len(sums) - 1) * sum(s * s for s in sums.values()) / n ** 2)
    by_task, by_persona, independent = variance
    return math.sqrt(max(by_task + by_persona - independent, independent))


def quantile(pairs, p):
    """The p-quantile of Student's t with one degree of freedom less than there are tasks or personas, whichever are
    fewer. (scipy.stats has it, too, and takes a second to import.)"""
    from scipy.special import stdtrit
    return float(stdtrit(min(len(set(ids)) for ids in zip(*pairs)) - 1, p))


def interval_95(values, share=False):
    """The 95 % interval [low, high] of a mean over {(task, persona): value}: `clustered_sem` times Student's t. A share
    has Wilson's interval, which stays inside 0..1, for as many independent pairs as would have that standard error.
    None where that is None."""
    if (sem := clustered_sem(values)) is None:
        return None
    mean, q = sum(values.values()) / len(values), quantile(values, 0.975)
    if not share:
        return [float(mean - q * sem), float(mean + q * sem)]
    n = mean * (1 - mean) / sem ** 2 if sem else len(values)
    half = q * math.sqrt(mean * (1 - mean) / n + q * q / (4 * n * n))
    low, high = ((mean + q * q / (2 * n) + side) / (1 + q * q / n) for side in (-half, half))
    return [max(0.0, float(low)), min(1.0, float(high))]


def summary(values, share=False):
    """{"mean", "sem", "interval_95", "n"} of {(task, persona): value}; error and interval are clustered."""
    return {"mean": float(np.mean(list(values.values()))) if values else None, "sem": clustered_sem(values),
            "interval_95": interval_95(values, share), "n": len(values)}


def read_results(path):
    """Rows of results.jsonl: RESULT_KEY + `mean`, `sem`, `n`."""
    fields = {"mean": float | int | None, "sem": float | int | None, "n": int}
    return list(read_rows(path, RESULT_KEY, fields)) if os.path.exists(path) else []


def write_results(path, rows, who="{variant}, t={iteration}"):
    """Prints rows and adds them to results.jsonl; a row for the same combination of RESULT_KEY is replaced."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.lock", "a") as lock:                     # evaluations may run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = {tuple(row[name] for name in RESULT_KEY): row for row in [*read_results(path), *rows]}
        write_whole(path, "".join(json.dumps(results[key]) + "\n" for key in sorted(results)))
    for row in rows:
        mean = "{mean:.3f} ({interval_95[0]:.3f} to {interval_95[1]:.3f})" if row.get("interval_95") else "{mean!s:.7}"
        print((who + ": {metric} {condition} " + mean + ", n={n}").format(**row))


# ---------------------------------------------------------------- the stage

def parse_args():
    parser = stage_parser(__doc__, "folder of the per-pair rows")
    parser.add_argument("--results", default="runs/results.jsonl", help="gets a row for each mean; a rerun replaces it")
    parser.add_argument("--base", default="mistralai/Mistral-7B-Instruct-v0.2", help="Q_BASE scores the golds")
    parser.add_argument("--questioner", default="mistralai/Mistral-7B-Instruct-v0.2", help="Q_t responds")
    parser.add_argument("--judge", help="names the better response; the paper: gpt-4-0613, which is no more")
    add_data_flags(parser)
    parser.add_argument("--gold", default="runs/gold.jsonl", help="gold responses (JSONL)")
    parser.add_argument("--conversations", required=True, help="Q_t's conversations on the split (JSONL)")
    parser.add_argument("--baseline", metavar="FOLDER", help="the --output of Q_BASE's evaluation (not at iteration 0)")
    parser.add_argument("--variant", default="main", help="main, no_reg, gold, base_answers, or a name of yours")
    parser.add_argument("--iteration", type=number(int, 0), default=1, help="t; 0 is Q_BASE")
    parser.add_argument("--roleplayer", metavar="NAME", help="label; default: as --conversations' settings say")
    parser.add_argument("--turns", type=natural, metavar="k", help="of the longest conversations the first k questions")
    parser.add_argument("--split", default="test", help="of the tasks and personas")
    parser.add_argument("--metrics", nargs="+", choices=("log_prob", "win_rate"), default=["log_prob", "win_rate"],
                        help="what to measure")
    parser.add_argument("--win-pairs", type=natural, default=300, help="pairs judged, as many of each length")
    parser.add_argument("--both-orders", action="store_true", help="judge each pair twice; a disagreement is a tie")
    parser.add_argument("--response-prompt", metavar="FILE", help="put this text before Q_t's task, as select.py can")
    parser.add_argument("--max-tokens", type=natural, default=700, help="length of a response")
    parser.add_argument("--temperature", type=amount, default=0.0, help="of the responses; 0: greedy")
    parser.add_argument("--judge-max-tokens", type=natural, default=300, help="length of a verdict")
    parser.add_argument("--judge-extra", type=json_object, default={}, metavar="JSON", help="the judge's --extra")
    parser.add_argument("--top-p", type=nucleus, default=0.9, help="of judge and sampled responses")
    add_model_flags(parser, batch_size=64)
    args = parser.parse_args()
    if (args.iteration == 0) != (args.baseline is None):
        parser.error("--baseline belongs to every iteration but 0: evaluate Q_BASE with --iteration 0 first")
    if (args.judge is not None) != (args.iteration > 0 and "win_rate" in args.metrics):
        parser.error("--judge is needed for win rates (or --metrics log_prob), and only for these; Q_BASE has none")
    return args


def roleplayer_label(conversations, given):
    """Who played the user in a file of conversations: the name given, or its settings', such as "mixtral", "A + B"."""
    users = read_settings(conversations).get("roleplayer", given) or fail(
        f"--roleplayer: {conversations}.settings.json is not there to say who played the user. Give a name.")
    return given or " + ".join(name_of(user) for user in (users if isinstance(users, list) else [users]))


MUST_AGREE = ("base tasks personas gold split roleplayer seed dtype max_tokens temperature top_p system "
              "chat_template_kwargs").split()


def check_baseline(baseline, settings):
    """Q_BASE must have met the same users in the same way, and answered so: like is compared with like."""
    theirs = read_settings(f"{baseline}/responses.jsonl") or read_settings(f"{baseline}/log_probs.jsonl")
    if not theirs:
        fail(f"--baseline {baseline}: no evaluation is there. Evaluate Q_BASE (--iteration 0) first.")
    for name, ours in settings.items():
        if (name in MUST_AGREE or name.startswith("simulate ")) and theirs.get(name, ours) != ours:
            fail(f"--baseline {baseline}: Q_BASE was evaluated with another {name} ({theirs[name]!r}, here {ours!r}). "
                 "Evaluate Q_BASE (--iteration 0) in the same way.")


OF_VERDICTS = ("judge", "judge_max_tokens", "judge_extra", "both_orders", "win_pairs", "baseline")
OF_RESPONSES = ("questioner", "response_prompt", "max_tokens", "temperature", "top_p", "system", "extra")


def main():
    args = parse_args()
    tasks, personas = read_tasks(args.tasks, args.tasks_per_split), read_personas(args.personas)
    all_conversations = read_conversations(args.conversations, tasks, personas)
    kept = set(sample_pairs(map(pair_of, all_conversations), args.limit, args.seed))
    golds = read_gold(args.gold, kept)
    for task_id, persona_id in sorted(kept):
        if not tasks[task_id]["split"] == personas[persona_id]["split"] == args.split:
            fail(f"{args.conversations}: {task_id} is not of --split {args.split}. Name the split that was simulated.")
    conversations = {key_of(row): row["conversation"] for row in all_conversations if not row.get("refused")}
    if args.turns:                                              # the same pairs for every k
        most = max(map(len, conversations.values()), default=0)
        conversations = {key: talk[:2 * args.turns] for key, talk in conversations.items()
                         if len(talk) == most > 2 * args.turns}
    samples = defaultdict(list)                                 # pair -> the conversations that it has
    for *pair, sample in conversations:
        if tuple(pair) in kept:
            samples[tuple(pair)].append(sample)
    if not samples:
        fail(f"{args.conversations}: no conversation of more than {args.turns or 0} questions. Simulate some first.")
    simulation = read_settings(args.conversations)
    args.roleplayer = roleplayer_label(args.conversations, args.roleplayer)
    prompts = read_prompts(*FORM, *PROMPTS, folder=args.prompts)
    made_with = {**prompts, **{f"simulate {name}": value for name, value in simulation.items() if name != "questioner"}}
    if args.baseline:
        check_baseline(args.baseline, settings_of(args, **made_with))
    processes = start_processes()

    def output(name, *key, without=(), **more):
        return Rows(args, f"{args.output}/{name}.jsonl", (*PAIR, *key), processes, without, **made_with, **more)

    def form(pair, conversation, **more):
        return response_form(personas[pair[1]]["name"], tasks[pair[0]]["task"], conversation, form=prompts, **more)

    def add_result(metric, condition, values, **counts):
        """Writes and prints a mean. values: {(task_id, persona_id): value}"""
        row = {"variant": args.variant, "iteration": args.iteration, "split": args.split, "roleplayer": args.roleplayer,
               "metric": metric, "condition": condition, **summary(values, metric == "win_rate"), **counts}
        if processes.is_main_process:
            write_results(args.results, [row])

    # 1. Gold log-probabilities: log p_QBASE(gold | task, conversation) in each condition.
    if "log_prob" in args.metrics:
        log_probs = output("log_probs", "sample", "condition", without=OF_RESPONSES + OF_VERDICTS)
        talks = {key: talk for key, talk in conditions(conversations, samples, args.seed, args.iteration == 0).items()
                 if golds[key[:2]] is not None}

        def scored_chat(key):
            persona = personas[key[1]]["persona"] if key[3] == "positive_control" else None
            return [*form(key, talks[key], persona=persona), {"role": "assistant", "content": golds[key[:2]]}]

        score_all(log_probs, talks, scored_chat, args.base)
        base = list(read_rows(f"{args.baseline}/log_probs.jsonl", {**SAMPLE, "condition": str},
                              {"log_prob": float | int | None})) if args.baseline else []
        for condition in CONDITIONS:
            ours, theirs = (by_pair([row for row in rows if row["condition"] == condition], "log_prob")
                            for rows in ([log_probs[key] for key in talks], base))
            if ours:
                add_result("gold_log_prob", condition, ours)
            if ours and args.baseline:
                add_result("gold_log_prob_gain", condition, {p: ours[p] - theirs[p] for p in ours if p in theirs})

    # 2. Responses to one random conversation of each of the win rate's pairs.
    judged = {pair: (*pair, of_pair[seed_for(args.seed, "sample", *pair) % len(of_pair)])
              for pair, of_pair in samples.items()}
    turns = {pair: len(conversations[key]) // 2 for pair, key in judged.items()}
    K = simulation.get("max_turns") or max(turns.values())
    pairs = win_pairs(turns, args.win_pairs, K, args.seed) or fail(f"--win-pairs: too few. Give {K} or more.")
    keys = [judged[pair] for pair in pairs]
    if "win_rate" in args.metrics:
        responses = output("responses", "sample", without=OF_VERDICTS)
        prompt = args.response_prompt and read_text(args.response_prompt).strip()
        requests = {key: Request(form(key, conversations[key], prompt=prompt), seed_for(args.seed, "respond", *key))
                    for key in keys}
        answer_all(responses, requests, args.questioner, (args.temperature, args.top_p, args.max_tokens), "responses",
                   lambda key, reply: {"turns": turns[key[:2]], "response": reply.text})

    # 3. Verdicts: a judge who sees the persona compares them with Q_BASE's.
    if args.judge:
        ours = {key[:2]: responses[key]["response"] for key in keys if not responses[key].get("refused")}
        theirs = read_rows(f"{args.baseline}/responses.jsonl", SAMPLE, {"turns": int, "response": str})
        base = {pair_of(row): row["response"] for row in theirs if not row.get("refused")}
        orders = {pair: ORDERS if args.both_orders else [order] for pair, order in pairs.items()
                  if pair in ours and pair in base}
        requests = {(*pair, order): Request(
            judge_chat(personas[pair[1]]["persona"], tasks[pair[0]]["task"], ours[pair], base[pair], order, prompts),
            seed_for(args.seed, "judge", *pair, order)) for pair in orders for order in orders[pair]}
        args = Namespace(**{**vars(args), "extra": args.judge_extra})       # --extra is the Questioner's
        # Responses that are made again make the verdicts on the old ones stale.
        verdicts = output("verdicts", "order", responses=fingerprint(f"{args.output}/responses.jsonl"))

        def verdict_row(key, reply):
            verdict = None if reply.cut else read_verdict(reply.text, key[2])
            return {"turns": turns[key[:2]], "verdict": verdict, "raw": reply.text, **({} if verdict else {
                "refused": f"no verdict, --judge-max-tokens {args.judge_max_tokens}: ...{reply.text[-80:]!r}"})}

        answer_all(verdicts, requests, args.judge, (0.0, args.top_p, args.judge_max_tokens), "verdicts", verdict_row)
        verdict = {pair: combine([verdicts[(*pair, order)]["verdict"] for order in orders[pair]]) for pair in orders}
        points, count = {"ours": 1.0, "tie": 0.5, "base": 0.0}, Counter(verdict.values())
        add_result("win_rate", "", {pair: points[v] for pair, v in verdict.items() if v}, wins=count["ours"],
                   losses=count["base"], ties=count["tie"], unreadable=count[None])
        say(processes, f"{verdicts.summary()}; {args.win_pairs // K * K} pairs wanted, {len(pairs)} there, "
                       f"{len(verdict)} answered, {count[None]} without a verdict")

    say(processes, f"{args.output}: {sum(map(len, samples.values()))} conversations of {len(samples)} pairs; left out: "
                   f"{len(all_conversations) - len(conversations)} conversations, "
                   f"{sum(golds[pair] is None for pair in samples)} pairs without a gold response")


if __name__ == "__main__":
    run(main)
