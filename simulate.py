"""Simulate conversations: the Questioner asks; the Roleplayer, who sees the persona, answers (Algorithm 1, line 3).

    { s_ij^c },  c = 1..n   <-   Q_{t-1} talking with the Roleplayer about (task i, persona j)

For each (task, persona) pair, n = 10 conversations of 1 to K = 3 questions. The length is drawn once for a pair, so
that its conversations compare, and by a hash, so that every model and iteration meets the same lengths. The random
numbers of a question are drawn so too: Q_BASE and Q_t, sampled with the same numbers, differ by what they learned.
The Questioner is told the user's name and the task, and to ask; it never sees the persona.

Several Roleplayers share the pairs, by weight and by a hash. `--roleplayer human` is you, at the terminal.

    reads   --tasks     {"task_id": "A000", "split": "A", "task": "How do I start a small herb garden?"}
            --personas  {"persona_id": "A00", "split": "A", "name": "June", "persona": "I'm June. ..."}
    writes  --output    {"task_id": "A000", "persona_id": "A00", "sample": 0, "split": "A", "turns": 1, "roleplayer":
                         "mixtral", "conversation":
                         [{"role": "assistant", "content": "Where would you like to grow them?"},
                          {"role": "user", "content": "On my balcony in Brooklyn. ..."}]}

On a laptop, with the embedded world's server (toy/server.py) running:
    python simulate.py --questioner toy/base --roleplayer openai:roleplayer@http://127.0.0.1:8765/v1 --dtype float32 \\
        --tasks runs/t.jsonl --personas runs/p.jsonl --split A --limit 20 --max-tokens 64 --output runs/c.jsonl
The paper's scale, 250 x 50 x 10 = 125,000 conversations (and the Roleplayer on a server of its own):
    accelerate launch simulate.py --roleplayer openai:mistralai/Mixtral-8x7B-Instruct-v0.1@http://host:8000/v1 \\
        --personas runs/paper/personas.jsonl --split A --output runs/paper/base/conversations.jsonl
"""
from collections import defaultdict

from common import (Request, Rows, SAMPLE, add_data_flags, add_model_flags, all_pairs, amount, announce, has_human,
                    lines_of, natural, nucleus, open_model, read_personas, read_prompt, read_tasks, response_form, run,
                    save_blocks, say, seed_for, stage_parser, start_processes)
from users import add_user_flags, read_users, user_of, users_setting

ELICITATION_PROMPT = read_prompt("elicitation")  # figure 14
ROLEPLAYER_SYSTEM_PROMPT = read_prompt("roleplayer_system")  # figure 12
ROLEPLAYER_PROMPT = read_prompt("roleplayer_user")  # figure 13


def number_of_turns(task_id, persona_id, K, seed):
    """The length of all conversations of a pair: uniform on 1..K, the same for every model and iteration."""
    return 1 + seed_for(seed, "turns", task_id, persona_id) % K


def questioner_chat(name, task, conversation):
    """What the Questioner sees: the elicitation prompt, then its questions and the user's answers as plain turns."""
    return [{"role": "user", "content": ELICITATION_PROMPT.format(name=name, task=task)}, *conversation]


def roleplayer_chat(persona, task, conversation, prompt=ROLEPLAYER_PROMPT):
    """What the Roleplayer sees: the persona and the history, which ends with the question to be answered."""
    speaker = {"assistant": "AI Assistant", "user": "You"}
    history = "\n".join(f"{speaker[turn['role']]}: {turn['content']}" for turn in conversation)
    return [{"role": "system", "content": ROLEPLAYER_SYSTEM_PROMPT},
            {"role": "user", "content": prompt.format(persona=persona, task=task, conversation=history)}]


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
    add_user_flags(parser, default=["mistralai/Mixtral-8x7B-Instruct-v0.1"],
                   help="plays the user; several share the pairs")
    parser.add_argument("--task", metavar="TEXT", help="one conversation about a request of your own, and its answer; "
                                                       "with --roleplayer human")
    add_data_flags(parser)
    parser.add_argument("--split", default="A", help="A, B, A for iterations 1, 2, 3; test to evaluate")
    parser.add_argument("--samples", type=natural, default=10, metavar="n", help="conversations for each pair")
    parser.add_argument("--max-turns", type=natural, default=3, metavar="K", help="most questions in one")
    parser.add_argument("--temperature", type=amount, default=0.9, help="of the Questioner")
    parser.add_argument("--top-p", type=nucleus, default=0.9, help="of the nucleus, for both")
    parser.add_argument("--roleplayer-temperature", type=amount, default=0.0, help="0: greedy")
    parser.add_argument("--max-tokens", type=natural, default=700, help="length of a question, and of an answer")
    add_model_flags(parser, batch_size=160)
    args = parser.parse_args()
    if args.task is not None:
        parser.set_defaults(samples=1)
        args = parser.parse_args()
        if args.roleplayer != ["human"] or args.samples > 1 or args.roleplayer_prompt or not args.task.strip():
            parser.error("--task is one talk about your own request: with --roleplayer human, without another prompt")
    return args


def main():
    args = parse_args()
    if args.task:                                               # a person's own request, without a persona
        tasks = personas = {"own": {"split": args.split, "task": args.task, "name": "User"}}
    else:
        tasks, personas = read_tasks(args.tasks), read_personas(args.personas)
    users, processes = read_users(args, ROLEPLAYER_PROMPT), start_processes()
    output = Rows(args, args.output, SAMPLE, processes, **users_setting(args, users),
                  prompts=[ELICITATION_PROMPT, ROLEPLAYER_SYSTEM_PROMPT, ROLEPLAYER_PROMPT])
    keys = [(*pair, sample) for pair in all_pairs(tasks, personas, args.split, args.limit, args.seed)
            for sample in range(args.samples)]
    turns = {key: args.max_turns if args.task else number_of_turns(*key[:2], args.max_turns, args.seed) for key in keys}
    who = {key: user_of(users, args.seed, *key[:2]) for key in keys}
    keys.sort(key=turns.get)                                    # stable; a block's conversations mostly have one length
    # A block goes turn by turn, and is saved as a whole. A pair's n samples share it, and the beginning of a prompt.
    size = 1 if has_human(args) else max(1, args.batch_size // args.samples) * args.samples
    blocks = [keys[i:i + size] for i in range(0, len(keys), size)]
    todo = [block for block in blocks if not all(key in output for key in block)]

    def ask(alive, turn):
        return models[args.questioner].generate({key: Request(
            questioner_chat(personas[key[1]]["name"], tasks[key[0]]["task"], row["conversation"]),
            seed_for(args.seed, "ask", *key, turn)) for key, row in alive.items()},
            args.temperature, args.top_p, args.max_tokens)

    def seen_by_user(key, conversation=()):
        if args.task:
            return list(conversation[-1:]) or questioner_chat("User", args.task, [])       # the question, and no more
        return roleplayer_chat(personas[key[1]]["persona"], tasks[key[0]]["task"], conversation, who[key].prompt)

    def answer(alive, turn):
        for model in dict.fromkeys(who[key].model for key in alive):
            yield from models[model].generate({key: Request(
                seen_by_user(key, row["conversation"]), seed_for(args.seed, "answer", *key, turn))
                for key, row in alive.items() if who[key].model == model},
                args.roleplayer_temperature, args.top_p, args.max_tokens)

    # An estimate: the history is not known yet, and the Questioner's prompts are about as long.
    prompts = defaultdict(list)
    for key in (key for block in todo for key in block):
        prompts[who[key].model] += [seen_by_user(key)] * turns[key]
    answers = [response_form("User", args.task, [])] * bool(args.task)             # what it was all for
    announce(output, (args.questioner, sum(prompts.values(), answers), args.max_tokens),
             *((model, prompts[model], args.max_tokens) for model in prompts))
    models = {spec: open_model(spec, args, processes) for spec in {args.questioner, *prompts} if todo or args.task}
    del prompts                                                 # 250,000 texts at the paper's scale

    def simulate_block(block):
        rows = {key: {"split": args.split, "turns": turns[key], "roleplayer": who[key].name, "conversation": []}
                for key in block}
        simulate(rows, ask, answer)
        return rows.items()

    save_blocks(output, keys, todo, simulate_block, "conversations")
    talk = output[keys[0]]["conversation"]
    if args.task and "refused" not in output[keys[0]]:
        answer = {0: Request(response_form("User", args.task, talk))}
        (_, reply), = models[args.questioner].generate(answer, 0.0, args.top_p, args.max_tokens)
        talk = [{"role": "assistant", "content": reply.text or reply.refused}]
    say(processes, "", tasks[keys[0][0]]["task"], *lines_of(talk), "", output.summary())


if __name__ == "__main__":
    run(main)
