"""Simulate conversations: the Questioner asks; the Roleplayer, who sees the persona, answers (Algorithm 1, line 3).

    { s_ij^c },  c = 1..n   <-   Q_{t-1} talking with the Roleplayer about (task i, persona j)

For each (task, persona) pair, n = 10 conversations of 1 to K = 3 questions. The length is drawn once for a pair, so
that its conversations compare, and by a hash, so that every model and iteration meets the same lengths. The random
numbers of a question are drawn so too: Q_BASE and Q_t, sampled with the same numbers, differ by what they learned.
The Questioner is told the user's name and the task, and to ask; it never sees the persona.

    reads   --tasks     {"task_id": "A000", "split": "A", "task": "How do I start a small herb garden?"}
            --personas  {"persona_id": "A00", "split": "A", "name": "June", "persona": "I'm June. ..."}
    writes  --output    {"task_id": "A000", "persona_id": "A00", "sample": 0, "split": "A", "conversation":
                         [{"role": "assistant", "content": "Where would you like to grow them?"},
                          {"role": "user", "content": "On my balcony in Brooklyn. ..."}]}

On a laptop, with the embedded world's server (toy/server.py) running:
    python simulate.py --questioner toy/base --roleplayer openai:roleplayer@http://127.0.0.1:8765/v1 --dtype float32 \\
        --tasks runs/t.jsonl --personas runs/p.jsonl --split A --limit 20 --max-tokens 64 --output runs/c.jsonl
The paper's scale, 250 x 50 x 10 = 125,000 conversations (and the Roleplayer on a server of its own):
    accelerate launch simulate.py --roleplayer openai:mistralai/Mixtral-8x7B-Instruct-v0.1@http://host:8000/v1 \\
        --personas runs/paper/personas.jsonl --split A --output runs/paper/base/conversations.jsonl
"""
from concurrent.futures import ThreadPoolExecutor, as_completed

from common import (Request, Rows, SAMPLE, add_data_flags, add_model_flags, all_pairs, amount, announce, lines_of,
                    natural, nucleus, open_model, read_personas, read_prompt, read_tasks, run, save_all, say, seed_for,
                    stage_parser, start_processes)

ELICITATION_PROMPT = read_prompt("elicitation")  # figure 14
ROLEPLAYER_SYSTEM_PROMPT = read_prompt("roleplayer_system")  # figure 12
ROLEPLAYER_PROMPT = read_prompt("roleplayer_user")  # figure 13


def number_of_turns(task_id, persona_id, K, seed):
    """The length of all conversations of a pair: uniform on 1..K, the same for every model and iteration."""
    return 1 + seed_for(seed, "turns", task_id, persona_id) % K


def questioner_chat(name, task, conversation):
    """What the Questioner sees: the elicitation prompt, then its questions and the user's answers as plain turns."""
    return [{"role": "user", "content": ELICITATION_PROMPT.format(name=name, task=task)}, *conversation]


def roleplayer_chat(persona, task, conversation):
    """What the Roleplayer sees: the persona and the history, which ends with the question to be answered."""
    speaker = {"assistant": "AI Assistant", "user": "You"}
    history = "\n".join(f"{speaker[turn['role']]}: {turn['content']}" for turn in conversation)
    return [{"role": "system", "content": ROLEPLAYER_SYSTEM_PROMPT},
            {"role": "user", "content": ROLEPLAYER_PROMPT.format(persona=persona, task=task, conversation=history)}]


def simulate(rows, ask, answer):
    """Advances all conversations together, turn by turn, so that each step is one batch.

    rows: {key: dict} with `turns` (how many questions), `conversation` ([], filled here); `cut` counts cut replies.
    ask, answer: (rows, turn) -> iterator of (key, Reply) by the Questioner and the Roleplayer.
    A conversation in which a model declines ends there, and its row gets `refused`.
    """
    for turn in range(max(row["turns"] for row in rows.values())):
        for role, speak in (("assistant", ask), ("user", answer)):
            alive = {key: row for key, row in rows.items() if row["turns"] > turn and "refused" not in row}
            for key, reply in speak(alive, turn):
                if reply.refused:
                    rows[key]["refused"] = f"{role}, turn {turn + 1}: {reply.refused}"
                else:
                    rows[key]["conversation"].append({"role": role, "content": reply.text})
                    if reply.cut:
                        rows[key]["cut"] = rows[key].get("cut", 0) + 1


def parse_args():
    parser = stage_parser(__doc__, "conversations (JSONL)")
    parser.add_argument("--questioner", default="mistralai/Mistral-7B-Instruct-v0.2", help="Q_{t-1} asks")
    parser.add_argument("--roleplayer", default="mistralai/Mixtral-8x7B-Instruct-v0.1", help="plays the user")
    add_data_flags(parser)
    parser.add_argument("--split", default="A", help="A, B, A for iterations 1, 2, 3; test to evaluate")
    parser.add_argument("--samples", type=natural, default=10, metavar="n", help="conversations for each pair")
    parser.add_argument("--max-turns", type=natural, default=3, metavar="K", help="most questions in one")
    parser.add_argument("--temperature", type=amount, default=0.9, help="of the Questioner")
    parser.add_argument("--top-p", type=nucleus, default=0.9, help="of the nucleus, for both")
    parser.add_argument("--roleplayer-temperature", type=amount, default=0.0, help="0: greedy")
    parser.add_argument("--max-tokens", type=natural, default=700, help="length of a question, and of an answer")
    add_model_flags(parser, batch_size=160)
    return parser.parse_args()


def main():
    args = parse_args()
    tasks, personas, processes = read_tasks(args.tasks), read_personas(args.personas), start_processes()
    output = Rows(args, args.output, SAMPLE, processes,
                  prompts=[ELICITATION_PROMPT, ROLEPLAYER_SYSTEM_PROMPT, ROLEPLAYER_PROMPT])
    keys = [(*pair, sample) for pair in all_pairs(tasks, personas, args.split, args.limit, args.seed)
            for sample in range(args.samples)]
    turns = {key: number_of_turns(*key[:2], args.max_turns, args.seed) for key in keys}
    keys.sort(key=turns.get)                                    # stable; a block's conversations mostly have one length
    # A block goes turn by turn, and is saved as a whole. A pair's n samples share it, and the beginning of a prompt.
    size = max(1, args.batch_size // args.samples) * args.samples
    blocks = [keys[i:i + size] for i in range(0, len(keys), size)]
    todo = [block for block in blocks if not all(key in output for key in block)]

    def ask(alive, turn):
        return questioner.generate({key: Request(
            questioner_chat(personas[key[1]]["name"], tasks[key[0]]["task"], row["conversation"]),
            seed_for(args.seed, "ask", *key, turn)) for key, row in alive.items()},
            args.temperature, args.top_p, args.max_tokens)

    def seen_by_user(key, conversation=()):
        return roleplayer_chat(personas[key[1]]["persona"], tasks[key[0]]["task"], conversation)

    def answer(alive, turn):
        return roleplayer.generate({key: Request(
            seen_by_user(key, row["conversation"]), seed_for(args.seed, "answer", *key, turn))
            for key, row in alive.items()}, args.roleplayer_temperature, args.top_p, args.max_tokens)

    prompts = [seen_by_user(key) for block in todo for key in block for turn in range(turns[key])]
    # An estimate: the history is not known yet, and the Questioner's prompts are about as long.
    announce(output, *((spec, prompts, args.max_tokens) for spec in (args.questioner, args.roleplayer)))
    del prompts                                                 # 250,000 texts at the paper's scale
    if todo:
        questioner = open_model(args.questioner, args, processes)
        roleplayer = questioner if args.roleplayer == args.questioner else open_model(args.roleplayer, args, processes)

    def simulate_block(block):
        rows = {key: {"split": args.split, "turns": turns[key], "conversation": []} for key in block}
        simulate(rows, ask, answer)
        return rows.items()

    # Two blocks at a time: while a server answers one, the other asks. Each is saved when it is there.
    pool = ThreadPoolExecutor(2)
    simulated = as_completed([pool.submit(simulate_block, block) for block in todo[output.share]])
    try:
        save_all(output, keys, (row for block in simulated for row in block.result()), "conversations")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    say(processes, "", tasks[keys[0][0]]["task"], *lines_of(output[keys[0]]["conversation"]), "", output.summary())


if __name__ == "__main__":
    run(main)
