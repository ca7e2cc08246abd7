"""Write gold responses: an Oracle that sees the persona answers every (task, persona) pair (Section 4).

Input of Algorithm 1: the responses G. The Questioner never sees them; they only score its conversations, and the
`gold` ablation trains on them.

    reads   --tasks     {"task_id": "A000", "split": "A", "task": "How do I start a small herb garden?"}
            --personas  {"persona_id": "A00", "split": "A", "name": "June", "persona": "I'm June. ..."}
    writes  --output    {"task_id": "A000", "persona_id": "A00", "split": "A", "gold": "Since your balcony faces ..."}

A pair that the Oracle refused carries `refused` with the reason instead, and is left out of everything that follows.

On a laptop, with the embedded world's server (toy/server.py) running:
    python toy/world.py --output runs/t.jsonl --tasks-per-split 6
    python gold.py --oracle openai:oracle@http://127.0.0.1:8765/v1 --tasks runs/t.jsonl --personas runs/p.jsonl \\
        --split A --limit 20 --output runs/g.jsonl
The paper's scale, 2 x 250 x 50 + 50 x 10 = 25,500 calls:
    python gold.py --oracle openai:MODEL --personas runs/paper/personas.jsonl --output runs/paper/gold.jsonl
"""
from common import (Request, Rows, add_local_flags, add_server_flags, all_pairs, announce, digest, fraction, letters,
                    model_name, open_model, positive, read_personas, read_tasks, say, seed_for, spent, stage_parser,
                    start_processes, temperature)

SYSTEM_PROMPT = (
    "You are a helpful AI assistant, particularly skilled at providing personalized, satisfying answers to users "
    "given information about their background. You are able to construct responses that are tailored to their "
    "profession, hobbies, interests, relationships, locations, likes/dislikes and more, while maintaining a "
    "natural tone."
)  # figure 10
PROMPT = (
    "You are answering questions for the following user:\n\n"
    "{persona}\n\n"
    "Answer the question below, tailoring your answer to the user and their characteristics. Answer directly to "
    "the user (i.e., 'you', 'your' pronouns). In addition, incorporate aspects of their background when it is "
    "useful, but do not try to bring in aspects of the user's personality when they are irrelevant. Make sure to "
    "keep your answer concise and organized, but thorough. Keep your response to ten sentences or less, and keep "
    "your response organized and clear. Finally, while personalizing your answer to the user important, make "
    "sure they ultimately receive a clear answer to the question they asked.\n\n"
    "{task}"
)  # figure 11


def oracle_chat(persona, task):
    """The Oracle's prompt: it sees the persona and the task, and no conversation."""
    return [{"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": PROMPT.format(persona=persona, task=task)}]


def parse_args():
    parser = stage_parser(__doc__, "gold responses (JSONL)", "a seeded sample of N pairs of each split")
    parser.add_argument("--oracle", required=True, help="the paper: gpt-4-0613, which is no more")
    parser.add_argument("--tasks", default="data/tasks.jsonl", help="tasks (JSONL)")
    parser.add_argument("--personas", default="runs/personas.jsonl", help="personas (JSONL)")
    parser.add_argument("--split", nargs="+", default=["A", "B", "test"], help="one or more splits")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=fraction, default=0.9, help="mass of the nucleus")
    parser.add_argument("--max-tokens", type=positive, default=300, help="length of a gold response")
    add_local_flags(parser, batch_size=32)
    add_server_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    tasks, personas = read_tasks(args.tasks), read_personas(args.personas)
    pairs = [pair for split in dict.fromkeys(args.split)
             for pair in all_pairs(tasks, personas, split, args.limit, args.seed)]
    processes = start_processes(args.oracle)
    rows = Rows(args.output, ("task_id", "persona_id"), {
        "stage": "gold", "oracle": model_name(args.oracle), "system_prompt": SYSTEM_PROMPT, "prompt": PROMPT,
        "temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens, "extra": args.extra,
        "system": args.system, "dtype": args.dtype, "seed": args.seed}, processes, args.max_refused)

    keys = [(task["task_id"], persona["persona_id"]) for task, persona in pairs]
    requests = [Request(oracle_chat(persona["persona"], task["task"]), seed_for(args.seed, "gold", *key))
                for (task, persona), key in zip(pairs, keys)]

    done = rows.plan(keys, [digest(request.chat) for request in requests], "gold responses")
    announce(processes, args, args.oracle, [letters(request.chat) for i, request in enumerate(requests)
                                            if i not in done], args.max_tokens, [rows])
    if len(done) < len(keys):
        oracle = open_model(args.oracle, args, processes)
        for i, reply in oracle.generate(requests, args.temperature, args.top_p, args.max_tokens, done, processes):
            if not reply.text and not reply.refused:
                reply = reply._replace(refused="empty")         # an empty gold would make any conversation the best
            first = rows.save(i, {"split": pairs[i][0]["split"], "gold": reply.text, **reply.marks()})
            if first:
                say(processes, f"\n{pairs[i][0]['task']}\n{pairs[i][1]['persona']}\n-> {reply.text}\n")
    rows.finish()
    total, refused, cut, usage = rows.tally("refused", "cut")
    say(processes, f"{args.output}: {total} gold responses, {refused} refused, {cut} cut at {args.max_tokens} tokens"
                   f"{spent(args, usage)}")
    rows.limit_refusals()


if __name__ == "__main__":
    main()
