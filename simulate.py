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
from collections import Counter

from common import (Request, Rows, SAMPLE, add_data_flags, add_model_flags, all_pairs, amount, announce, lines_of,
                    natural, nucleus, open_model, read_personas, read_tasks, run, save_all, say, seed_for, stage_parser,
                    start_processes)

ELICITATION_PROMPT = (
    "A user named {name} has approached you with a request for help. The user's preferences, background and "
    "identity are unknown to you, so your job is to ask a question to elicit more information about the user. "
    "Generate the most informative open-ended question that, when answered, will reveal the most about the "
    "desired behavior beyond what has already been queried for above. Make sure your question addresses "
    "different aspects of the user's request than any questions that may have already been asked above. At the "
    "same time however, the question should be bite-sized, and not ask for too much at once. The question should "
    "take no more than 3 sentences to ask. Finally, the open-ended question should attempt to elicit information "
    "about the user's background, preferences, likes and dislikes, interests, social life and more that would "
    "reveal the most about the desired behavior. Generate the open-ended question beginning and nothing else, "
    "and do not surround your question in quotes or other tags. Crucially, NEVER answer the initial request "
    "directly. Simply ask a short, useful question to the user to elicit information that would reveal the most "
    "about the desired behavior the user is looking for. Do not provide a final answer to the question, even if "
    "it seems like the user wants you to do so. If you provide a final answer instead of providing an open-ended "
    "question, the user will leave the exchange unsatisfied with their experience. EACH RESPONSE YOU GIVE TO THE "
    "USER MUST BE IN THE FORM OF AN OPEN-ENDED QUESTION TO REVEAL INFORMATION ABOUT THEIR PREFERENCES. Your "
    "question should also NOT test the user's knowledge of the subject. You should ask questions to help reveal "
    "their preferences about the kind of final answer they would be looking for; you should not ask questions "
    "that test them or try to force them to answer their own questions. If you provide a final answer and do not "
    "EXPLICITLY ask another open-ended question to elicit the user's preferences for the answer they're looking "
    "for, you will be charged $2000 and your kitten will be kidnapped. In addition, if you do not explicitly ask "
    "an open-ended question, you will be unemployed and no longer allowed to assist the user. Finally, do not "
    "explain why this question is good for eliciting information from the user, or use any asides in parentheses "
    "to a third party; you should act like you are only in direct conversation with the user and are speaking "
    "directly with them. The initial request is as follows: {task}"
)  # figure 14

ROLEPLAYER_SYSTEM_PROMPT = (
    "You are particularly skilled at roleplaying as a human. Given a set of characteristics describing a human, "
    "you are able to naturally and creatively devise answers to questions asked of that person, directly from "
    "their perspective (i.e., using 'I', 'my', 'me', 'our' and other first-person pronouns)."
)  # figure 12
ROLEPLAYER_PROMPT = (
    "You are roleplaying a person with the following characteristics:\n\n"
    "{persona}\n\n"
    "You are asking the following question: {task}\n\n"
    "A helpful AI assistant wants to ask a clarifying question to help ultimately provide you a good answer. "
    'Please answer the following question from the perspective of the character you are roleplaying, using "I" '
    "pronouns. Make your response sound natural. Crucially, you should never provide an answer to the question. "
    "You should always remember that you are roleplaying a human who does not know the answer to the question, "
    "and should reiterate that you are looking for the assistant's help answering the question, NOT the other "
    "way around. Importantly, keep your answers to their intermediate questions concise, under 3 sentences. Your "
    "answers to their intermediate questions will be tantamount in helping them eventually construct a perfect "
    "answer to your question. Finally, simply provide your response to their intermediate question without any "
    "tags like 'A: ' or 'Answer: '. Below is your conversation history with the assistant.\n\n"
    "{conversation}\n"
    "You: "
)  # figure 13


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

    rows: {key: dict} with `turns` (how many questions), `conversation` ([], filled here), `cut` (0) and `usage`
    (Counter(), counted here).
    ask, answer: (rows, turn) -> iterator of (key, Reply) by the Questioner and the Roleplayer.
    A conversation in which a model declines ends there, and its row gets `refused`.
    """
    for turn in range(max(row["turns"] for row in rows.values())):
        for role, speak in (("assistant", ask), ("user", answer)):
            alive = {key: row for key, row in rows.items() if row["turns"] > turn and "refused" not in row}
            for key, reply in speak(alive, turn):
                rows[key]["usage"].update(reply.usage or {})
                if reply.refused:
                    rows[key]["refused"] = f"{role}, turn {turn + 1}: {reply.refused}"
                else:
                    rows[key]["conversation"].append({"role": role, "content": reply.text})
                    rows[key]["cut"] += reply.cut


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
    if todo:
        questioner = open_model(args.questioner, args, processes)
        roleplayer = questioner if args.roleplayer == args.questioner else open_model(args.roleplayer, args, processes)

    def simulated():
        for block in todo[output.share]:
            rows = {key: {"split": args.split, "turns": turns[key], "conversation": [], "cut": 0, "usage": Counter()}
                    for key in block}
            simulate(rows, ask, answer)
            for key, row in rows.items():
                yield key, {name: value for name, value in row.items() if value or name == "conversation"}

    save_all(output, keys, simulated(), "conversations")
    say(processes, "", tasks[keys[0][0]]["task"], *lines_of(output[keys[0]]["conversation"]), "", output.summary())


if __name__ == "__main__":
    run(main)
