"""Select the conversations to train on, and answer them (Algorithm 1, lines 4 and 5).

    S_t = { argmax over c of log p_QBASE(g_ij | t_i, s_ij^c) }     the best of the n conversations of each pair
    R_t = { Q_{t-1}(t_i, s*_ij) }                                  the regularisation: Q_{t-1}'s own greedy response

No reward model, no advantage: a conversation is good if it makes the Oracle's gold response probable under the initial
model. The paper's KL term keeps the model's responses where they were. Line 5 does that: its own are trained on.

    reads   --conversations  the rows of simulate.py          --gold  the rows of gold.py
    writes  --output         a conversation's row with "gold_log_prob": -351.2, "response": "Since you have a ..."
            --scores         of all conversations {"task_id", "persona_id", "sample", "log_prob", "tokens"}

On a laptop (files from simulate.py's and gold.py's examples):
    python select.py --base toy/base --questioner toy/base --dtype float32 --tasks runs/t.jsonl \\
        --personas runs/p.jsonl --conversations runs/c.jsonl --gold runs/g.jsonl --output runs/s.jsonl
The paper's scale, 125,000 scores and 12,500 responses: PRINT=1 bash run.sh paper prints the command.
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
    from collections import defaultdict

    from common import (FORM, Request, Rows, SAMPLE, add_data_flags, add_model_flags, answer_all,
                        fail, key_of, natural, pair_of, read_conversations, read_gold, read_personas,
                        read_prompts, read_tasks, read_text, response_form, run, sample_pairs, save_all, say, score_all,
                        seed_for, stage_parser, start_processes)


def select_best(log_probs, k):
    """Line 4. log_probs: {sample: log-probability of the gold} for the conversations of one pair -> the k best samples,
    best first. A tie goes to the lower sample."""
    return sorted(log_probs, key=lambda c: (-log_probs[c], c))[:k]                  # argmax_c log p_QBASE(g | t, s^c)


def select_random(log_probs, k, seed):
    """The control for line 4: k of the same conversations, whatever their scores."""
    return sorted(log_probs, key=lambda c: (seed_for(seed, c), c))[:k]


def parse_args():
    parser = stage_parser(__doc__, "selected conversations (JSONL)")
    parser.add_argument("--base", default="mistralai/Mistral-7B-Instruct-v0.2", help="Q_BASE scores")
    parser.add_argument("--questioner", default="mistralai/Mistral-7B-Instruct-v0.2", help="Q_{t-1} responds")
    add_data_flags(parser)
    parser.add_argument("--gold", default="runs/gold.jsonl", help="gold responses (JSONL)")
    parser.add_argument("--conversations", required=True, help="conversations (JSONL)")
    parser.add_argument("--scores", metavar="PATH", help="log-probabilities (JSONL), the same for each --pick; "
                        "by default beside --output")
    parser.add_argument("--k", type=natural, default=1, help="conversations kept for each pair")
    parser.add_argument("--pick", choices=("best", "random"), default="best", help="random: a control")
    parser.add_argument("--no-response", action="store_true", help="no regularisation response (the no_reg ablation)")
    parser.add_argument("--response-prompt", metavar="FILE", help="put this text before the task when Q_{t-1} responds:"
                        " prompts/personalisation.txt is the released code's hidden prompt")
    parser.add_argument("--max-tokens", type=natural, default=700, help="length of a response")
    add_model_flags(parser, batch_size=64)
    return parser.parse_args()


# On these log p_QBASE(gold | task, conversation) does not depend: another --pick computes no score anew.
NOT_OF_SCORES = ("pick", "k", "questioner", "no_response", "response_prompt", "max_tokens", "system", "extra")


def main():
    args = parse_args()
    tasks, personas = read_tasks(args.tasks, args.tasks_per_split), read_personas(args.personas)
    all_conversations = read_conversations(args.conversations, tasks, personas)
    pairs = set(sample_pairs(map(pair_of, all_conversations), args.limit, args.seed))
    golds = read_gold(args.gold, pairs)
    rows = {key_of(row): row for row in all_conversations
            if not row.get("refused") and pair_of(row) in pairs and golds[pair_of(row)]}
    prompts, processes = read_prompts(*FORM, folder=args.prompts), start_processes()
    path = args.scores or args.output.removesuffix(".jsonl") + ".scores.jsonl"
    scores = Rows(args, path, SAMPLE, processes, NOT_OF_SCORES, **prompts)
    output = Rows(args, args.output, SAMPLE, processes, **prompts)
    # Training leaves this prompt out, so that a part of the gain is its effect, distilled.
    prompt = args.response_prompt and read_text(args.response_prompt).strip()

    def form(row, prompt=None):
        return response_form(personas[row["persona_id"]]["name"], tasks[row["task_id"]]["task"], row["conversation"],
                             prompt=prompt, form=prompts)

    # Line 4: log p_QBASE(g | t, s) of every conversation; the best of each pair.
    score_all(scores, rows, lambda key: [*form(rows[key]), {"role": "assistant", "content": golds[key[:2]]}], args.base)
    log_probs = defaultdict(dict)                               # pair -> {sample: log p(gold)}, those that are finite
    for key in rows:
        if scores[key]["log_prob"] is not None:
            log_probs[key[:2]][key[2]] = scores[key]["log_prob"]
    chosen = {}
    for pair, c in log_probs.items():
        keep = (select_best(c, args.k) if args.pick == "best" else
                select_random(c, args.k, seed_for(args.seed, "pick", *pair)))
        for sample in sorted(keep):
            row = {**rows[(*pair, sample)], "gold_log_prob": c[sample], "response": None}
            cut = row.pop("cut", None)                          # is the response's in this file
            chosen[(*pair, sample)] = {**row, "cut_turns": cut} if cut else row
    if not chosen:
        fail(f"{args.conversations}: no gold response has a finite log-probability. Look at its rows, and at --base.")
    if any(key not in chosen for key in output if key[:2] in log_probs):
        fail(f"{args.output}: has conversations that are not selected now: the scores have changed. Give another one.")

    # Line 5: r <- Q_{t-1}(t, s*), greedily.
    if args.no_response:
        save_all(output, chosen, chosen.items() if processes.is_main_process else (), "selected")
    else:
        answer_all(output, {key: Request(form(row, prompt)) for key, row in chosen.items()},
                   args.questioner, (0.0, 1.0, args.max_tokens), "responses",
                   lambda key, reply: {**chosen[key], "response": reply.text})
    finite = [p for c in log_probs.values() for p in c.values()]
    kept = [row["gold_log_prob"] for row in chosen.values()]
    row = output[min(chosen)]
    others = ", ".join(f"{p:.2f}" for p in sorted(log_probs[pair_of(row)].values()))
    say(processes, "", tasks[row["task_id"]]["task"], *row["conversation"],
        f"response: {row['response']}", f"log p(gold) = {row['gold_log_prob']:.2f}, chosen from {others}", "",
        f"{output.summary()}; mean log p(gold) {sum(kept) / len(kept):.2f} of {sum(finite) / len(finite):.2f} over all "
        f"{len(rows)}; left out: {sum(pair_of(row) in pairs for row in all_conversations) - len(rows)} conversations "
        f"(refused or without a gold), {len(rows) - len(finite)} scores not finite")


if __name__ == "__main__":
    run(main)
