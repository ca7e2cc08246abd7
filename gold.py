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
The paper's scale, 2 x 250 x 50 + 50 x 10 = 25,500 calls: PRINT=1 bash run.sh paper prints the command.
"""
from common import (PAIR, Request, Rows, add_data_flags, add_model_flags, all_pairs, amount,
                    answer_all, natural, nucleus, read_personas, read_prompts, read_tasks, run, say, seed_for,
                    stage_parser, start_processes)

PROMPTS = read_prompts("gold_system", "gold_user")              # figures 10 and 11


def oracle_chat(persona, task, prompts=PROMPTS):
    """The Oracle's prompt: it sees the persona and the task, and no conversation."""
    return [{"role": "system", "content": prompts["gold_system"]},
            {"role": "user", "content": prompts["gold_user"].format(persona=persona, task=task)}]


def parse_args():
    parser = stage_parser(__doc__, "gold responses (JSONL)", "a seeded sample of N pairs of each split")
    parser.add_argument("--oracle", required=True, help="the paper: gpt-4-0613, which is no more")
    add_data_flags(parser)
    parser.add_argument("--split", nargs="+", default=["A", "B", "test"], help="one or more splits")
    parser.add_argument("--temperature", type=amount, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=nucleus, default=0.9, help="mass of the nucleus")
    parser.add_argument("--max-tokens", type=natural, default=300, help="length of a gold response")
    add_model_flags(parser, batch_size=32)
    return parser.parse_args()


def main():
    args = parse_args()
    tasks, personas = read_tasks(args.tasks, args.tasks_per_split), read_personas(args.personas)
    prompts, processes = read_prompts(*PROMPTS, folder=args.prompts), start_processes()
    pairs = [pair for split in args.split for pair in all_pairs(tasks, personas, split, args.limit, args.seed)]
    rows = Rows(args, args.output, PAIR, processes, without=("split",), **prompts)      # another split's may be added
    requests = {(i, j): Request(oracle_chat(personas[j]["persona"], tasks[i]["task"], prompts),
                                seed_for(args.seed, "gold", i, j)) for i, j in pairs}

    def fields(pair, reply):                                    # an empty gold would make any conversation the best
        return {"split": tasks[pair[0]]["split"], "gold": reply.text, **({} if reply.text else {"refused": "empty"})}

    answer_all(rows, requests, args.oracle, (args.temperature, args.top_p, args.max_tokens), "gold responses", fields)
    i, j = pairs[0]
    say(processes, "", tasks[i]["task"], personas[j]["persona"], f"-> {rows[i, j]['gold']}", "", rows.summary())


if __name__ == "__main__":
    run(main)
