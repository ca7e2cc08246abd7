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
                               "mixtral", "split": "test", "mean": 0.68, "sem": 0.03, "n": 289}, a line a combination

On a laptop (files from simulate.py's and gold.py's examples):
    python evaluate.py --base toy/base --questioner toy/base --dtype float32 --iteration 0 --split A \\
        --tasks runs/t.jsonl --personas runs/p.jsonl --gold runs/g.jsonl --conversations runs/c.jsonl \\
        --output runs/e0 --results runs/results.jsonl
The paper's scale, 5,000 conversations and 300 verdicts:
    accelerate launch evaluate.py --questioner runs/paper/main/1/model --iteration 1 --baseline runs/paper/base/test \\
        --conversations runs/paper/main/1/test.jsonl --judge openai:MODEL --personas runs/paper/personas.jsonl \\
        --gold runs/paper/gold.jsonl --output runs/paper/main/1/test --results runs/paper/results.jsonl
"""
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from common import (Reply, Request, Rows, add_local_flags, add_server_flags, announce, by_pair, digest, fail, fraction,
                    key_of, known, letters, local_model, mean_sem, model_name, open_model, output_path, pair_of,
                    positive, read_conversations, read_gold, read_personas, read_rows, read_tasks, response_form,
                    rotation, sample_pairs, say, score_rows, seed_for, spent, stage_parser, start_processes,
                    temperature, write_results)

JUDGE_SYSTEM_PROMPT = (
    "You are an expert in evaluating assistant responses, particularly skilled in analyzing their alignment with "
    "user backgrounds and preferences."
)  # figure 15
JUDGE_PROMPT = (
    "For the following user query to an assistant, which of the assistant responses is more aligned with the "
    "user's background and preferences?\n\n"
    "User Background: {persona}\n\n"
    "User Query: {task}\n\n"
    "Assistant Response A: {response_a}\n\n"
    "Assistant Response B: {response_b}\n\n"
    "FIRST, provide a step-by-step comparison of the two responses and explain which you feel is more aligned "
    "with the user's background and preferences (no more than 100 words). \n\n"
    "SECOND, on a new line, state only \"A\" or \"B\" to indicate which response is more aligned with the user's "
    "background and preferences. \n\n"
    "Comparison: <step-by-step comparison and explanation>\n\n"
    'Final Response: <"A" or "B">'
)  # figure 16


def conditions(conversations, persona_ids, seed, controls):
    """{(task_id, persona_id, sample, condition): conversation, or None for the positive control}.

    conversations: {(task_id, persona_id, sample): list of turns}; persona_ids: all of the split, so that a row stays
    what it is when --limit grows. The controls need no Questioner: one row a pair.
    """
    other = {task_id: rotation(persona_ids, task_id, seed) for task_id, _, _ in conversations}
    rows = {}
    for (task_id, persona_id, sample), conversation in conversations.items():
        rows[task_id, persona_id, sample, "q_experimental"] = conversation
        source = task_id, other[task_id].get(persona_id), sample
        if source in conversations:
            rows[task_id, persona_id, sample, "q_random"] = conversations[source]
        if controls:
            rows[task_id, persona_id, 0, "negative_control"] = []
            rows[task_id, persona_id, 0, "positive_control"] = None
    return rows


def win_pairs(turns, how_many, K, seed):
    """The pairs of the win rate: floor(how_many / K) of each conversation length 1..K, drawn by a hash, so that they
    are the same for every model. turns: {pair: length}."""
    return [pair for length in range(1, K + 1)
            for pair in sorted((pair for pair in turns if turns[pair] == length),
                               key=lambda pair: (seed_for(seed, "win", *pair), pair))[:how_many // K]]


def judge_chat(persona, task, ours, base, order):
    """The judge's prompt. order: "ours_first" puts our response at A, "base_first" Q_BASE's."""
    a, b = (ours, base) if order == "ours_first" else (base, ours)
    return [{"role": "system", "content": JUDGE_SYSTEM_PROMPT},
            {"role": "user", "content": JUDGE_PROMPT.format(persona=persona, task=task, response_a=a, response_b=b)}]


def read_verdict(raw, order):
    """"ours", "base", or None if the judge's last line does not say A or B alone, as it was told to: never a guess."""
    lines = [line for line in raw.splitlines() if line.strip()]
    answer = r"\W*(?:Final Response\W*)?(?:(?:Assistant )?Response )?([AB])\W*"
    match = re.fullmatch(answer, lines[-1]) if lines else None
    return match and ("ours" if (match.group(1) == "A") == (order == "ours_first") else "base")


def combine(verdicts):
    """One verdict of a pair from one order or both: None if one is unreadable, a disagreement is a tie."""
    return None if None in verdicts else verdicts[0] if len(set(verdicts)) == 1 else "tie"


def sem_two_way(values):
    """Standard error of a mean over {(task, persona): value}, clustered by task and by persona: pairs that share either
    are not independent. Variance = by task + by persona - by pair, and at least that of independent pairs. None where a
    task or a persona stands alone."""
    pairs, x = list(values), np.array(list(values.values()), float)
    error, variance = x - x.mean() if len(x) else x, []
    for cluster in (lambda pair: pair[0], lambda pair: pair[1], lambda pair: pair):
        sums = defaultdict(float)
        for pair, e in zip(pairs, error):
            sums[cluster(pair)] += e
        G = len(sums)
        if G < 2:
            return None
        variance.append(G / (G - 1) * sum(s * s for s in sums.values()) / len(x) ** 2)
    by_task, by_persona, independent = variance
    return math.sqrt(max(by_task + by_persona - independent, independent))


TITLES = {"gold_log_prob": "Log-probability of the gold responses under Q_BASE (nats; mean ± SEM over pairs)",
          "gold_log_prob_gain": "Gain in gold log-probability over Q_BASE (nats; mean ± SEM of paired differences)",
          "win_rate": "Win rate against Q_BASE (wins + half the ties, ± SEM, over readable verdicts)"}
CONDITIONS = {"q_experimental": "Q-Experimental", "q_random": "Q-Random", "negative_control": "negative control",
              "positive_control": "positive control", "": ""}


def table(results, metric, title):
    """Lines of the paper's table for one metric: a line for each condition, variant and Roleplayer, a column for each
    iteration. Q_BASE stands in the first column of `main`."""
    rows = [row for row in results if row["metric"] == metric]
    several = len({row["roleplayer"] for row in rows}) > 1
    cells, iterations = defaultdict(dict), sorted({row["iteration"] for row in rows})
    order = list(CONDITIONS)
    for row in sorted(rows, key=lambda row: ([*order, row["condition"]].index(row["condition"]),
                                             row["variant"] != "main", row["variant"], row["roleplayer"])):
        control = row["condition"].endswith("control")
        label = ", ".join(filter(None, (CONDITIONS.get(row["condition"], row["condition"]),
                                        "" if control else row["variant"],
                                        f"with {row['roleplayer']}" if several and not control else "")))
        digits = 3 if metric.endswith(("rate", "share")) else 2
        cell = " ± ".join(f"{value:.{digits}f}" for value in (row["mean"], row["sem"]) if value is not None)
        cells[label][row["iteration"]] = f"{cell} ({row['n']})"
    if not rows:
        return []
    width = max(map(len, cells))
    head = ["Q_BASE" if t == 0 else f"t={t}" for t in iterations]
    return ["", title, " " * width + "".join(f"{h:>24}" for h in head),
            *(f"{label:<{width}}" + "".join(f"{line.get(t, ''):>24}" for t in iterations)
              for label, line in cells.items())]


def parse_args():
    parser = stage_parser(__doc__, "folder of the per-pair rows")
    parser.add_argument("--results", type=output_path, default="runs/results.jsonl",
                        help="gets a row for each mean; a rerun replaces it")
    parser.add_argument("--base", type=local_model, default="mistralai/Mistral-7B-Instruct-v0.2",
                        help="Q_BASE scores the golds")
    parser.add_argument("--questioner", type=local_model, default="mistralai/Mistral-7B-Instruct-v0.2",
                        help="Q_t responds")
    parser.add_argument("--judge", help="names the better response; the paper: gpt-4-0613, which is no more")
    parser.add_argument("--tasks", default="data/tasks.jsonl", help="tasks (JSONL)")
    parser.add_argument("--personas", default="runs/personas.jsonl", help="personas (JSONL)")
    parser.add_argument("--gold", default="runs/gold.jsonl", help="gold responses (JSONL)")
    parser.add_argument("--conversations", required=True, help="Q_t's conversations on the split (JSONL)")
    parser.add_argument("--baseline", metavar="FOLDER", help="the --output of Q_BASE's evaluation (not at iteration 0)")
    parser.add_argument("--variant", default="main", help="main, no_reg, gold, base_answers, or a name of yours")
    parser.add_argument("--iteration", type=int, default=1, help="t; 0 is Q_BASE")
    parser.add_argument("--roleplayer", metavar="NAME", help="label; default: as --conversations' settings say")
    parser.add_argument("--split", default="test", help="of the tasks and personas")
    parser.add_argument("--metrics", nargs="+", choices=("log_prob", "win_rate"), default=["log_prob", "win_rate"],
                        help="what to measure")
    parser.add_argument("--win-pairs", type=positive, default=300, help="pairs judged, as many of each length")
    parser.add_argument("--both-orders", action="store_true",
                        help="judge each pair in both orders; a disagreement is a tie")
    parser.add_argument("--max-tokens", type=positive, default=700, help="length of a response")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="of the responses; 0: greedy")
    parser.add_argument("--judge-temperature", type=temperature, default=0.0, help="0: greedy")
    parser.add_argument("--judge-max-tokens", type=positive, default=300, help="length of a verdict with its reasons")
    parser.add_argument("--top-p", type=fraction, default=0.9, help="of the judge, and of sampled responses")
    parser.add_argument("--score-tokens", type=positive, default=16384, help="tokens in a batch of scores")
    add_local_flags(parser, batch_size=64)
    add_server_flags(parser)
    args = parser.parse_args()
    if args.iteration < 0:
        parser.error("--iteration is 0 or more")
    if (args.iteration == 0 or "win_rate" not in args.metrics) and (args.judge or args.both_orders):
        parser.error("--judge and --both-orders belong to win rates, and there are none of Q_BASE against itself")
    if (args.iteration == 0) != (args.baseline is None):
        parser.error("--baseline belongs to every iteration but 0: evaluate Q_BASE with --iteration 0 first")
    if args.iteration > 0 and "win_rate" in args.metrics and args.judge is None:
        parser.error("--judge is needed for win rates; or --metrics log_prob")
    if args.dry_run and args.judge is None:
        parser.error("--dry-run tells of the judge's calls, and there is no --judge")
    return args


def read_responses(path):
    """Yields the rows of responses.jsonl."""
    fields = {"task_id": str, "persona_id": str, "sample": int, "turns": int, "response": str}
    return read_rows(path, fields, ("task_id", "persona_id", "sample"))


def settings_of(output):
    """The settings with which a stage wrote an output; {} for other people's files."""
    path = Path(f"{output}.settings.json")
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if type(settings) is not dict or type(settings.get("K", 1)) is not int or settings.get("K", 1) < 1:
            raise ValueError("no object with a whole number K")
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path}: not as a stage writes it ({error}). Remove it, and give --roleplayer or run its stage again.")
    return settings


def roleplayer_label(conversations, given):
    """Who played the user in a file of conversations: the name given, or what its settings say (a folder's name)."""
    name = given or settings_of(conversations).get("roleplayer") or fail(
        f"--roleplayer: {conversations}.settings.json is not there to say who played the user. Give a name.")
    return re.sub(r" \(\w{12}\)$", "", name)


class Evaluation:
    """The inputs of one evaluation, read and checked, and what its two measurements share."""

    def __init__(self, args):
        self.args, self.left_out = args, Counter()
        self.tasks, self.personas = read_tasks(args.tasks), read_personas(args.personas)
        self.golds, rows = read_gold(args.gold), sorted(read_conversations(args.conversations), key=key_of)
        for row in rows:
            for owner in known(row, self.tasks, self.personas, args.conversations):
                if owner["split"] != args.split:
                    fail(f"{args.conversations}: {pair_of(row)} is not of --split {args.split}. Name the split that "
                         "was simulated.")
        kept = set(sample_pairs(sorted(set(map(pair_of, rows))), args.limit, args.seed))
        rows = [row for row in rows if pair_of(row) in kept]
        self.left_out["refused conversations"] = sum("refused" in row for row in rows)
        self.conversations = {key_of(row): row["conversation"] for row in rows if "refused" not in row}
        self.turns = {key[:2]: len(conversation) // 2 for key, conversation in self.conversations.items()}
        simulated = settings_of(args.conversations)
        if not self.turns:
            fail(f"{args.conversations}: no conversation to evaluate. Simulate some first.")
        self.K = simulated.get("K") or max(self.turns.values())
        if args.win_pairs < self.K:
            fail(f"--win-pairs {args.win_pairs}: below the number of conversation lengths, {self.K}. Raise it.")
        self.label = {"variant": args.variant, "iteration": args.iteration, "split": args.split,
                      "roleplayer": roleplayer_label(args.conversations, args.roleplayer)}
        self.settings = {"stage": "evaluate", **self.label, "dtype": args.dtype, "seed": args.seed}
        self.score_settings = {**self.settings, "base": model_name(args.base)}
        self.response_settings = {
            **self.settings, "questioner": model_name(args.questioner), "max_tokens": args.max_tokens,
            "temperature": args.temperature, "top_p": args.top_p if args.temperature else None}
        if args.baseline and "log_prob" in args.metrics:
            self.check_baseline("log_probs.jsonl", self.score_settings)
        if args.baseline and "win_rate" in args.metrics:
            self.check_baseline("responses.jsonl", self.response_settings)
        self.win_pairs = win_pairs(self.turns, args.win_pairs, self.K, args.seed)
        self.processes = start_processes(args.base, args.questioner)
        self.loaded = None, None

    def check_baseline(self, file, settings):
        """Q_BASE must have met the same users and answered in the same way: like is compared with like."""
        path = Path(self.args.baseline) / file
        theirs = path.exists() and settings_of(path) or fail(
            f"--baseline {self.args.baseline}: no {file} of Q_BASE. Run evaluate.py --iteration 0 with these --metrics")
        for name in set(settings) - {"variant", "iteration", "questioner"}:
            if theirs.get(name) != settings[name]:
                fail(f"--baseline {self.args.baseline}: Q_BASE was evaluated with another {name} "
                     f"({theirs.get(name)!r}, here {settings[name]!r}). Evaluate Q_BASE in the same way.")

    def model(self, spec):
        """A model, loaded when it is needed; the one before it is let go, since two might not fit side by side."""
        if self.loaded[0] != spec:
            self.loaded = None, None
            self.loaded = spec, open_model(spec, self.args, self.processes)
        return self.loaded[1]

    def form(self, pair, conversation, with_persona=False):
        """Figure 17's form for a pair."""
        persona = self.personas[pair[1]]
        return response_form(persona["name"], self.tasks[pair[0]]["task"], conversation,
                             persona["persona"] if with_persona else None)

    def result(self, metric, condition, values, **more):
        """A row of results.jsonl from {pair: value}."""
        mean, sem, n = mean_sem(list(values.values()))
        return {**self.label, "metric": metric, "condition": condition, "mean": mean, "sem": sem,
                "sem_two_way": sem_two_way(values), "n": n, **more}


def log_probs(e):
    """Scores every condition; writes log_probs.jsonl; returns the means, and the paired gains over Q_BASE."""
    args = e.args
    for pair in e.turns:
        if pair not in e.golds:
            fail(f"{args.gold}: no gold response for {pair}. Run gold.py for the split, with simulate.py's --limit and "
                 "--seed.")
    talks = {key: conversation for key, conversation in conditions(
        e.conversations, [persona_id for persona_id, row in e.personas.items() if row["split"] == args.split],
        args.seed, controls=args.iteration == 0).items() if e.golds[key[:2]] is not None}
    count = Counter(key[3] for key in talks)
    e.left_out["pairs without a gold response"] = sum(e.golds[pair] is None for pair in e.turns)
    e.left_out["conversations without another persona's"] = count["q_experimental"] - count["q_random"]
    rows = Rows(f"{args.output}/log_probs.jsonl", ("task_id", "persona_id", "sample", "condition"), e.score_settings,
                e.processes)
    keys = list(talks)

    def scored_chat(i):
        form = e.form(keys[i][:2], talks[keys[i]] or [], with_persona=keys[i][3] == "positive_control")
        return [*form, {"role": "assistant", "content": e.golds[keys[i][:2]]}]

    done = rows.plan(keys, [digest(scored_chat(i)) for i in range(len(keys))], "gold log-probabilities")
    if len(done) < len(keys):
        score_rows(rows, scored_chat, e.model(args.base), args, done)
    rows.finish()

    def pair_means(rows_of):
        finite = [row for row in rows_of if row["log_prob"] is not None]
        return {condition: by_pair([row for row in finite if row["condition"] == condition], "log_prob")
                for condition in CONDITIONS if condition}

    mine = [row for row in rows.read() if tuple(row[name] for name in rows.key) in talks]
    e.left_out["log-probabilities not finite"] = sum(row["log_prob"] is None for row in mine)
    ours = pair_means(mine)
    results = [e.result("gold_log_prob", condition, ours[condition]) for condition in ours if ours[condition]]
    if args.baseline:
        base = pair_means(read_rows(f"{args.baseline}/log_probs.jsonl", {
            "task_id": str, "persona_id": str, "sample": int, "condition": str, "log_prob": (float, int, type(None))},
            rows.key))
        for condition in ("q_experimental", "q_random"):
            gain = {pair: ours[condition][pair] - base[condition][pair]
                    for pair in ours[condition] if pair in base[condition]}
            e.left_out[f"pairs without Q_BASE's {condition}"] = len(ours[condition]) - len(gain)
            results += [e.result("gold_log_prob_gain", condition, gain)] if gain else []
    return results


def responses(e):
    """Lets Q_t answer after one conversation of each of the win rate's pairs; writes responses.jsonl; returns
    {pair: response}."""
    args, pairs, each = e.args, e.win_pairs, e.args.win_pairs // e.K
    if len(pairs) < each * e.K:
        there = Counter(e.turns.values())
        found = ", ".join(f"{there[length]} of length {length}" for length in range(1, e.K + 1))
        say(e.processes, f"Win rate: {len(pairs)} pairs instead of {each * e.K}: {each} of each length are "
                         f"wanted, {found} are there")
    samples = defaultdict(list)
    for task_id, persona_id, sample in e.conversations:
        samples[task_id, persona_id].append(sample)
    keys = [(*pair, samples[pair][seed_for(args.seed, "sample", *pair) % len(samples[pair])]) for pair in pairs]
    rows = Rows(f"{args.output}/responses.jsonl", ("task_id", "persona_id", "sample"), e.response_settings, e.processes)
    requests = [Request(e.form(key[:2], e.conversations[key]), seed_for(args.seed, "respond", *key)) for key in keys]

    done = rows.plan(keys, [digest(request.chat) for request in requests], "responses")
    if len(done) < len(keys):
        questioner = e.model(args.questioner)
        for i, reply in questioner.generate(requests, args.temperature, args.top_p, args.max_tokens, done, e.processes):
            first = rows.save(i, {"turns": e.turns[keys[i][:2]], "response": reply.text, **reply.marks()})
            if first:
                say(e.processes, f"\n{e.tasks[keys[i][0]]['task']}\n-> {reply.text}\n")
    rows.finish()
    wanted = set(keys)
    ours = {pair_of(row): row["response"] for row in rows.read() if key_of(row) in wanted}
    if "" in ours.values():
        say(e.processes, f"{rows.path}: {list(ours.values()).count('')} of {len(ours)} responses are empty")
    return ours


def open_verdicts(e):
    """The Rows of verdicts.jsonl; says how many calls the judge will get, and tries its server."""
    args = e.args
    rows = Rows(f"{args.output}/verdicts.jsonl", ("task_id", "persona_id"), {
        **e.settings, "questioner": model_name(args.questioner), "judge": model_name(args.judge),
        "judge_system_prompt": JUDGE_SYSTEM_PROMPT, "judge_prompt": JUDGE_PROMPT, "both_orders": args.both_orders,
        "judge_temperature": args.judge_temperature, "top_p": args.top_p,
        "judge_max_tokens": args.judge_max_tokens, "system": args.system, "extra": args.extra}, e.processes,
        args.max_refused)
    calls = [letters(judge_chat(e.personas[persona_id]["persona"], e.tasks[task_id]["task"], "", "", "ours_first")) +
             2 * args.max_tokens * 4 for task_id, persona_id in e.win_pairs if (task_id, persona_id) not in rows]
    announce(e.processes, args, args.judge, calls * (1 + args.both_orders), args.judge_max_tokens, [rows])
    if calls and args.judge.startswith("openai:"):
        open_model(args.judge, args, e.processes)               # a wrong URL is found out now, not after the scores
    return rows


def verdicts(e, ours, rows):
    """Asks the judge about our responses and Q_BASE's; adds to verdicts.jsonl; returns the win rate."""
    args = e.args
    base = {pair_of(row): row["response"] for row in read_responses(f"{args.baseline}/responses.jsonl")}
    pairs = [pair for pair in ours if pair in base]
    if not pairs:
        fail(f"{args.baseline}/responses.jsonl: none of the {len(ours)} pairs. Evaluate Q_BASE on the same pairs.")
    e.left_out["pairs without a response of Q_BASE"] = len(ours) - len(pairs)

    def orders(pair):
        both = ["ours_first", "base_first"]
        return both if args.both_orders else [both[seed_for(args.seed, "order", *pair) % 2]]

    def judged(pair, order):
        return judge_chat(e.personas[pair[1]]["persona"], e.tasks[pair[0]]["task"], ours[pair], base[pair], order)

    inputs = [digest([judged(pair, order) for order in orders(pair)]) for pair in pairs]
    done, replies = rows.plan(pairs, inputs, "verdicts"), defaultdict(dict)
    mine = range(e.processes.process_index, len(pairs), e.processes.num_processes)     # both orders by one process
    calls = [(i, order) for i in mine for order in orders(pairs[i])]
    requests = [Request(judged(pairs[i], order), seed_for(args.seed, "judge", *pairs[i], order)) for i, order in calls]
    skip = {call for call, (i, _) in enumerate(calls) if i in done}
    answers = e.model(args.judge).generate(requests, args.judge_temperature, args.top_p, args.judge_max_tokens,
                                           skip) if len(done) < len(pairs) else ()
    for call, reply in answers:
        i, order = calls[call]
        replies[i][order] = reply
        if len(replies[i]) < len(orders(pairs[i])):
            continue                                            # the other order's answer is still to come
        raw = [replies[i][order].text for order in orders(pairs[i])]
        refused = next((reply.refused for reply in replies[i].values() if reply.refused), None)
        usage = sum((Counter(reply.usage) for reply in replies[i].values()), Counter())
        verdict = combine([read_verdict(text, order) for text, order in zip(raw, orders(pairs[i]))])
        first = rows.save(i, {"turns": e.turns[pairs[i]], "order": "both" if args.both_orders else order,
                              "verdict": verdict, "raw": raw if args.both_orders else raw[0],
                              **Reply("", refused, any(reply.cut for reply in replies[i].values()), usage).marks()})
        if first:
            say(e.processes, "\n" + "\n".join([
                e.tasks[pairs[i][0]]["task"], e.personas[pairs[i][1]]["persona"], f"ours: {ours[pairs[i]]}",
                f"base: {base[pairs[i]]}", f"judge, {order}: {reply.text}", f"-> {verdict}"]) + "\n")
    rows.finish()

    given = [row for row in rows.read() if pair_of(row) in set(pairs)]
    count = Counter(row["verdict"] for row in given)
    refused = sum("refused" in row for row in given)
    e.left_out["refused verdicts"], e.left_out["unreadable verdicts"] = refused, count[None] - refused
    points = {pair_of(row): {"ours": 1.0, "tie": 0.5, "base": 0.0}[row["verdict"]] for row in given if row["verdict"]}
    if not points:
        rows.limit_refusals()
        fail(f"{rows.path}: no readable verdict among {len(given)}. Look at `raw` there; then try another --judge, or "
             "a larger --judge-max-tokens.")
    mean, sem, _ = mean_sem(list(points.values()))
    return e.result("win_rate", "", points, wins=count["ours"], losses=count["base"], ties=count["tie"],
                    refused_verdicts=refused, unreadable=count[None] - refused,
                    interval_95=[mean - 1.96 * (sem or 0), mean + 1.96 * (sem or 0)])


def main():
    args = parse_args()
    e = Evaluation(args)

    def save(rows):
        return write_results(args.results, rows) if e.processes.is_main_process else []

    judged = open_verdicts(e) if args.baseline and "win_rate" in args.metrics else None
    save([])                                                    # finds out now if it can be written, not after the work
    results = log_probs(e) if "log_prob" in args.metrics else []
    save(results)
    if "win_rate" in args.metrics:
        ours = responses(e)
        results += [verdicts(e, ours, judged)] if judged else []
    if e.processes.is_main_process:
        rows = [row for row in save(results) if row["split"] == args.split]
        for metric, title in TITLES.items():
            say(e.processes, *table(rows, metric, title), sep="\n")
    left_out = ", ".join(f"{count} {what}" for what, count in e.left_out.items() if count) or "nothing"
    usage = judged.tally()[1] if judged else {}
    say(e.processes, f"{args.output}: {len(e.conversations)} conversations of {len(e.turns)} pairs, {len(results)} "
                     f"means written to {args.results}; left out: {left_out}{spent(args, usage)}")
    if judged:
        judged.limit_refusals()


if __name__ == "__main__":
    main()
