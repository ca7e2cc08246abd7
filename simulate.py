"""Simulate conversations: the Questioner asks; the Roleplayer, who sees the persona, answers (Algorithm 1, line 3).

    { s_ij^c },  c = 1..n   <-   Q_{t-1} talking with the Roleplayer about (task i, persona j)

For each (task, persona) pair, n = 10 conversations of 1 to K = 3 questions. All conversations of a pair have the same
length, which a hash of the pair draws: every model and every iteration meets the same lengths. A hash draws the random
numbers of each question, too. So Q_BASE and Q_t are sampled with the same numbers, and differ by what Q_t has learned.
The Questioner is told the user's name and the task, and to ask; it never sees the persona.

    reads   --tasks     {"task_id": "A000", "split": "A", "task": "How do I start a small herb garden?"}
            --personas  {"persona_id": "A00", "split": "A", "name": "June", "persona": "I'm June. ..."}
    writes  --output    {"task_id": "A000", "persona_id": "A00", "sample": 0, "split": "A", "turns": 1, "roleplayer":
                         "mixtral", "conversation":
                         [{"role": "assistant", "content": "Where would you like to grow them?"},
                          {"role": "user", "content": "On my balcony in Brooklyn. ..."}]}

On a laptop, with the embedded world's server (toy/server.py) running:
    python simulate.py --questioner toy/base --roleplayer openai:roleplayer@http://127.0.0.1:8765/v1 --dtype float32 \\
        --tasks runs/t.jsonl --personas runs/p.jsonl --split A --limit 20 --max-tokens 64 --output runs/c.jsonl
The paper's scale, 250 x 50 x 10 = 125,000 conversations an iteration: PRINT=1 bash run.sh paper prints the command.
"""
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from random import Random

from common import (Request, Rows, SAMPLE, add_data_flags, add_model_flags, all_pairs, amount, fail,
                    name_of, natural, nucleus, open_model, read_personas, read_prompts, read_tasks, run,
                    save_all, say, seed_for, stage_parser, start_processes)

PROMPTS = read_prompts("elicitation", "roleplayer_system", "roleplayer_user")   # figures 14, 12 and 13


def number_of_turns(task_id, persona_id, K, seed):
    """The length of all conversations of a pair: uniform on 1..K, the same for every model and iteration."""
    return 1 + seed_for(seed, "turns", task_id, persona_id) % K


def questioner_chat(name, task, conversation, prompts=PROMPTS):
    """What the Questioner sees: the elicitation prompt, then its questions and the user's answers as plain turns."""
    return [{"role": "user", "content": prompts["elicitation"].format(name=name, task=task)}, *conversation]


def roleplayer_chat(persona, task, conversation, prompts=PROMPTS):
    """What the Roleplayer sees: the persona and the history, which ends with the question to be answered."""
    speaker = {"assistant": "AI Assistant", "user": "You"}
    history = "\n".join(f"{speaker[turn['role']]}: {turn['content']}" for turn in conversation)
    return [{"role": "system", "content": prompts["roleplayer_system"]}, {"role": "user", "content":
            prompts["roleplayer_user"].format(persona=persona, task=task, conversation=history)}]


def own_words(reply):
    """What the user says: without the label in which the prompt ends, and without the turns that it invents after."""
    label, turn = (rf"^[\W_]*(?:{who})[ *_]*[:：][ *_]*" for who in (    # "**You:** ..."
        "You|User|Human", "You|User|Human|AI Assistant|AI|Assistant"))
    text = re.sub(label, "", reply.text, flags=re.IGNORECASE)
    own = re.split(turn, text, flags=re.IGNORECASE | re.MULTILINE)[0]
    return reply._replace(text=own.strip(), cut=reply.cut and own == text,
                          refused=reply.refused or (None if own.strip() else "speaks for the assistant"))


def deal_users(keys, roleplayers, seed):
    """{key: Roleplayer} by a hash of the key, here a pair, and {Roleplayer: its name}. A pair has one for all its
    conversations, the same for every model and iteration. Two of one name end the program."""
    names = {model: name_of(model) for model in roleplayers}
    if len(set(names.values())) < len(roleplayers):
        fail("--roleplayer: two have one name. Rename one: the rows tell them apart by name.")
    return {key: Random(seed_for(seed, "roleplayer", *key)).choices(roleplayers)[0] for key in keys}, names


def simulate(rows, ask, answer):
    """Advances all conversations together, turn by turn, so that each step is one batch.

    rows: {key: dict} with `turns` (how many questions), `conversation` ([], filled here); `cut` lists the cut turns.
    ask, answer: (rows, turn) -> iterator of (key, Reply) by the Questioner and the Roleplayer.
    A conversation in which a model declines ends there, and its row gets `refused`.
    """
    for turn in range(max(row["turns"] for row in rows.values())):
        for role, speak in (("assistant", ask), ("user", answer)):
            alive = {key: row for key, row in rows.items() if row["turns"] > turn and not row.get("refused")}
            for key, reply in speak(alive, turn):
                if reply.refused:
                    rows[key]["refused"] = f"{role}, turn {turn + 1}: {reply.refused}"
                else:
                    rows[key]["conversation"].append({"role": role, "content": reply.text})
                    if reply.cut:
                        rows[key].setdefault("cut", []).append(2 * turn + (role == "user"))


def save_blocks(rows, keys, blocks, work, what):
    """Saves what work(block), a list of (key, fields), has for each block. Two blocks are under way: while a server
    answers one, the other asks. With --batch-size 1 it is one: a person answers one conversation after the other."""
    pool, blocks = ThreadPoolExecutor(min(2, rows.args.batch_size)), blocks[rows.share]
    done = as_completed([pool.submit(work, block) for block in blocks])
    try:
        save_all(rows, keys, (row for block in done for row in block.result()), what)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def parse_args():
    parser = stage_parser(__doc__, "conversations (JSONL)")
    parser.add_argument("--questioner", default="mistralai/Mistral-7B-Instruct-v0.2", help="Q_{t-1} asks")
    parser.add_argument("--roleplayer", nargs="+", metavar="MODEL", default=["mistralai/Mixtral-8x7B-Instruct-v0.1"],
                        help="plays the user; several share the pairs evenly")
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
    tasks, personas = read_tasks(args.tasks, args.tasks_per_split), read_personas(args.personas)
    prompts, processes = read_prompts(*PROMPTS, folder=args.prompts), start_processes()
    pairs = all_pairs(tasks, personas, args.split, args.limit, args.seed)
    turns = {pair: number_of_turns(*pair, args.max_turns, args.seed) for pair in pairs}
    who, names = deal_users(pairs, args.roleplayer, args.seed)
    output = Rows(args, args.output, SAMPLE, processes, **prompts)
    pairs.sort(key=turns.get)                                   # stable; a block's conversations mostly have one length
    keys = [(*pair, sample) for pair in pairs for sample in range(args.samples)]
    # A block goes turn by turn, and is saved as a whole. A pair's n samples share it, and the beginning of a prompt.
    size = args.batch_size // args.samples * args.samples or args.batch_size
    blocks = [keys[i:i + size] for i in range(0, len(keys), size)]
    todo = [block for block in blocks if not all(key in output for key in block)]
    models = {spec: open_model(spec, args, processes) for spec in {args.questioner, *who.values()} if todo}

    def ask(alive, turn):
        return models[args.questioner].generate({key: Request(
            questioner_chat(personas[key[1]]["name"], tasks[key[0]]["task"], row["conversation"], prompts),
            seed_for(args.seed, "ask", *key, turn), key[:2]) for key, row in alive.items()},
            args.temperature, args.top_p, args.max_tokens)

    def answer(alive, turn):
        requests = defaultdict(dict)                            # model -> {key: Request}
        for key, row in alive.items():
            requests[who[key[:2]]][key] = Request(
                roleplayer_chat(personas[key[1]]["persona"], tasks[key[0]]["task"], row["conversation"], prompts),
                seed_for(args.seed, "answer", *key, turn), key[:2])
        for model in requests:
            for key, reply in models[model].generate(requests[model], args.roleplayer_temperature, args.top_p,
                                                     args.max_tokens):
                yield key, own_words(reply)

    def simulate_block(block):
        rows = {key: {"split": args.split, "turns": turns[key[:2]], "roleplayer": names[who[key[:2]]],
                      "conversation": []} for key in block}
        simulate(rows, ask, answer)
        return rows.items()

    save_blocks(output, keys, todo, simulate_block, "conversations")
    say(processes, "", tasks[keys[0][0]]["task"], *output[keys[0]]["conversation"], "", output.summary())


if __name__ == "__main__":
    run(main)
