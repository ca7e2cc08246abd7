"""Select the conversations to train on, and answer them (Algorithm 1, lines 4 and 5).

    S_t = { argmax over c of log p_QBASE(g_ij | t_i, s_ij^c) }     the best of the n conversations of each pair
    R_t = { Q_{t-1}(t_i, s*_ij) }                                  the regularisation: Q_{t-1}'s own greedy response

No reward model, no advantage: a conversation is good if it makes the Oracle's gold response probable under the initial
model. The paper's KL term, which keeps the model's responses where they were, is realised by training on its own ones.

    reads   --conversations  the rows of simulate.py          --gold  the rows of gold.py
    writes  --output         a conversation's row with "gold_log_prob": -351.2, "response": "Since you have a ..."
            OUTPUT's neighbour .scores.jsonl, with {"task_id", "persona_id", "sample", "log_prob", "tokens"} for all

On a laptop (files from simulate.py's and gold.py's examples):
    python select.py --base toy/base --questioner toy/base --dtype float32 --tasks runs/t.jsonl \\
        --personas runs/p.jsonl --conversations runs/c.jsonl --gold runs/g.jsonl --output runs/s.jsonl
The paper's scale, 125,000 scores and 12,500 responses:
    accelerate launch select.py --personas runs/paper/personas.jsonl --gold runs/paper/gold.jsonl \\
        --conversations runs/paper/base/conversations.jsonl --output runs/paper/base/selected.jsonl
"""
if __name__ == "select":
    # This file's name hides the standard library's `select` from every program started in this folder. Whoever imports
    # `select` (subprocess, asyncio, torch ...) is handed the real module; as a script this file is the stage. Where
    # `select` is built into Python, the real one is found before this file is.
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    # Not from a folder with a select.py: this one, a link to it, another clone. The standard library's is compiled.
    folders = [folder for folder in sys.path if not os.path.exists(os.path.join(folder or ".", "select.py"))]
    spec = PathFinder.find_spec("select", folders)
    sys.modules["select"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["select"])
else:
    import math
    from collections import defaultdict

    from common import (Request, Rows, add_local_flags, digest, fail, key_of, known, local_model, model_name,
                        open_model, pair_of, positive, read_conversations, read_gold, read_personas, read_tasks,
                        response_form, rotation, sample_pairs, say, score_rows, seed_for, stage_parser,
                        start_processes)

# Not in the paper: the released code puts this before the first turn when it samples the response, and leaves it out
# again when it trains on that response, so that part of its gain is this prompt, distilled. --response-prompt uses it.
PERSONALISATION_PROMPT = (
    "You are a helpful AI assistant, able to provide highly personalized and useful answers to specific users' "
    "questions based on information they've given you. Your answer should be personal and tailored to the users' "
    "preferences and personality, but should also directly answer the question and be generally helpful. Their "
    "question may be one that is well-suited to personalized answers, or may be a more general objective or "
    "fact-based question. Regardless, your answer should be as helpful as possible to the user below. Your "
    "should incorporate as much relevant personal information they've given you as possible to as much as "
    "possible when constructing your helpful answer, such that the answer feels tailored to them. Whenever "
    "possible, tie your answer back to their background in order to ensure the answer is relevant or helpful to "
    "them. Feel free to use their name if it is given to you. The user's initial question is given below:"
)


def gold_chat(name, task, conversation, gold):
    """The chat whose last turn is scored: log p_QBASE(gold | task, conversation), on figure 17's form."""
    return [*response_form(name, task, conversation), {"role": "assistant", "content": gold}]


def candidates(log_probs):
    """The samples of one pair that may be selected: those with a finite score."""
    return [c for c in log_probs if log_probs[c] is not None and math.isfinite(log_probs[c])]


def select_best(log_probs, k):
    """Line 4. log_probs: {sample: log-probability of the gold, or None} for the conversations of one pair -> the k best
    samples, best first. A tie goes to the lower sample."""
    return sorted(candidates(log_probs), key=lambda c: (-log_probs[c], c))[:k]      # argmax_c log p_QBASE(g | t, s^c)


def select_random(log_probs, k, seed):
    """The control for line 4: k of the same candidates, whatever their scores."""
    return sorted(candidates(log_probs), key=lambda c: (seed_for(seed, c), c))[:k]


def permuted(golds, seed):
    """Another control for line 4: {(task_id, persona_id): gold} with the golds of each task dealt to other personas, by
    a rotation. The rule is the same, but what it prefers is good for somebody else. None where there is nobody else."""
    personas = defaultdict(list)
    for (task_id, persona_id), gold in sorted(golds.items()):
        if gold is not None:
            personas[task_id].append(persona_id)
    other = {task_id: rotation(ids, task_id, seed) for task_id, ids in personas.items()}
    return {(task_id, persona_id): golds.get((task_id, other.get(task_id, {}).get(persona_id)))
            for task_id, persona_id in golds}


def response_chat(name, task, conversation, prompt=None):
    """Line 5. What Q_{t-1} answers: figure 17's form, after the released code's prompt if there is one."""
    chat = response_form(name, task, conversation)
    if prompt:
        chat[0]["content"] = f"{prompt}\n\n{chat[0]['content']}"
    return chat


def parse_args():
    parser = stage_parser(__doc__, "selected conversations (JSONL)")
    parser.add_argument("--base", type=local_model, default="mistralai/Mistral-7B-Instruct-v0.2", help="Q_BASE scores")
    parser.add_argument("--questioner", type=local_model, default="mistralai/Mistral-7B-Instruct-v0.2",
                        help="Q_{t-1} responds")
    parser.add_argument("--tasks", default="data/tasks.jsonl", help="tasks (JSONL)")
    parser.add_argument("--personas", default="runs/personas.jsonl", help="personas (JSONL)")
    parser.add_argument("--gold", default="runs/gold.jsonl", help="gold responses (JSONL)")
    parser.add_argument("--conversations", required=True, help="conversations (JSONL)")
    parser.add_argument("--k", type=positive, default=1, help="conversations kept for each pair")
    parser.add_argument("--pick", choices=("best", "random", "permuted"), default="best",
                        help="controls: random ignores the score; permuted scores with another persona's gold")
    parser.add_argument("--no-response", action="store_true", help="no regularisation response (the no_reg ablation)")
    parser.add_argument("--response-prompt", action="store_true",
                        help="respond under the released code's extra prompt")
    parser.add_argument("--max-tokens", type=positive, default=700, help="length of a response")
    parser.add_argument("--score-tokens", type=positive, default=16384, help="tokens in a batch of scores")
    add_local_flags(parser, batch_size=64)
    args = parser.parse_args()
    if args.no_response and args.response_prompt:
        parser.error("--response-prompt has no meaning with --no-response")
    return args


def read_inputs(args):
    """tasks, personas, golds, the conversations that can be scored (in canonical order), and what was left out."""
    tasks, personas, golds = read_tasks(args.tasks), read_personas(args.personas), read_gold(args.gold)
    golds = permuted(golds, args.seed) if args.pick == "permuted" else golds
    rows, no_gold, refused = [], set(), 0
    for row in read_conversations(args.conversations):
        known(row, tasks, personas, args.conversations)
        if pair_of(row) not in golds:
            fail(f"{args.gold}: no gold response for {pair_of(row)}, which {args.conversations} talks about. Run "
                 "gold.py for that split, with simulate.py's --limit and --seed.")
        if golds[pair_of(row)] is None:
            no_gold.add(pair_of(row))
        elif "refused" in row:
            refused += 1
        else:
            rows.append(row)
    pairs = set(sample_pairs(sorted(set(map(pair_of, rows))), args.limit, args.seed))
    rows = sorted((row for row in rows if pair_of(row) in pairs), key=key_of)
    whose = "another persona's gold response" if args.pick == "permuted" else "a gold response"
    if no_gold and not rows:
        fail(f"{args.gold}: no pair has {whose}. Write the golds of more pairs (gold.py with a larger --limit).")
    left_out = f"{refused} refused conversations, {len(no_gold)} pairs without {whose}"
    return tasks, personas, golds, rows, left_out


def main():
    args = parse_args()
    tasks, personas, golds, rows, left_out = read_inputs(args)
    processes = start_processes(args.base, args.questioner)
    scoring = {"stage": "select, scores", "base": model_name(args.base), "dtype": args.dtype}
    columns = "task_id", "persona_id", "sample"
    scores = Rows(args.output.removesuffix(".jsonl") + ".scores.jsonl", columns, scoring, processes)
    output = Rows(args.output, columns, {
        **scoring, "stage": "select", "questioner": model_name(args.questioner), "k": args.k, "pick": args.pick,
        "response": not args.no_response, "max_tokens": args.max_tokens, "seed": args.seed,
        "response_prompt": PERSONALISATION_PROMPT if args.response_prompt else None}, processes)

    def form(row):
        return personas[row["persona_id"]]["name"], tasks[row["task_id"]]["task"], row["conversation"]

    # Line 4: log p_QBASE(g | t, s), for every conversation.
    def scored_chat(i):
        return gold_chat(*form(rows[i]), golds[pair_of(rows[i])])

    keys, base = [key_of(row) for row in rows], None
    done = scores.plan(keys, [digest(scored_chat(i)) for i in range(len(rows))], "gold log-probabilities")
    if len(done) < len(keys):
        base = open_model(args.base, args, processes)
        # No room for a response is found out before the scores.
        score_rows(scores, scored_chat, base, args, done, answer=0 if args.no_response else args.max_tokens)
    scores.finish()

    log_probs, wanted = defaultdict(dict), set(keys)            # pair -> {sample: log p(gold)}
    for score in scores.read():
        if key_of(score) in wanted:
            log_probs[pair_of(score)][score["sample"]] = score["log_prob"]
    keep = {pair: select_random(c, args.k, seed_for(args.seed, "pick", *pair)) if args.pick == "random" else
            select_best(c, args.k) for pair, c in log_probs.items()}
    chosen = [{**row, "gold_log_prob": log_probs[pair_of(row)][row["sample"]], "response": None}
              for row in rows if row["sample"] in keep[pair_of(row)]]
    strangers = {key for key in output.done if key[:2] in keep} - {key_of(row) for row in chosen}
    if strangers:
        fail(f"{args.output} holds conversations that are not selected now, such as {min(strangers)}: the rule or the "
             "scores have changed. Give another --output.")

    # Line 5: r <- Q_{t-1}(t, s*), greedily.
    prompt = PERSONALISATION_PROMPT if args.response_prompt else None
    requests = [Request(response_chat(*form(row), prompt)) for row in chosen]
    inputs = [digest(request.chat, row["gold_log_prob"]) for request, row in zip(requests, chosen)]
    done = output.plan([key_of(row) for row in chosen], inputs, "responses")
    if args.no_response:
        for i in range(len(chosen)) if processes.is_main_process else ():
            output.save(i, chosen[i])
    elif len(done) < len(chosen):
        if args.questioner != args.base:
            base = None                                         # frees Q_BASE before Q_{t-1} is loaded
        questioner = base or open_model(args.questioner, args, processes)
        for i, reply in questioner.generate(requests, 0.0, 1.0, args.max_tokens, done, processes):
            output.save(i, {**chosen[i], "response": reply.text, **({"cut_response": True} if reply.cut else {})})
    output.finish()

    if chosen:
        row = next(output.read())
        others = ", ".join(f"{p:.2f}" for p in sorted(filter(None, log_probs[pair_of(row)].values())))
        say(processes, "\n" + "\n".join([
            tasks[row["task_id"]]["task"], *(f"{turn['role']}: {turn['content']}" for turn in row["conversation"]),
            f"response: {row['response']}", f"log p(gold) = {row['gold_log_prob']:.2f}, chosen from {others}"]) + "\n")
    total, cut, _ = output.tally("cut_response")
    empty = sum(row["response"] == "" for row in output.read())
    scored = [p for c in log_probs.values() for p in c.values() if p is not None]
    kept = [row["gold_log_prob"] for row in chosen]
    say(processes, f"{args.output}: {total} conversations kept, mean log p(gold) {sum(kept) / max(1, len(kept)):.2f} "
                   f"of {sum(scored) / max(1, len(scored)):.2f} over all {len(rows)}; left out: {left_out}, "
                   f"{len(rows) - len(scored)} scores not finite; {cut} responses cut at {args.max_tokens} "
                   f"tokens, {empty} empty")


if __name__ == "__main__":
    main()
