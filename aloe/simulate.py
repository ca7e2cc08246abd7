"""Simulate conversations, each a tree of preference pairs of which one path is walked (ALOE, section 2.1).

    m_i  ~  user(persona, history)              history = m_1, s_1, ..., m_{i-1}, s_{i-1}
    e_i  ~  inducer(persona, history, m_i)      the part of the persona that the user has shown so far
    p_i  ~  model(history, m_i + hint(e_i))     preferred
    r_i  ~  model(history, m_i)                 rejected
    s_i  =  p_i or r_i, by the row's own coin   continues the conversation;  i = 1..K

No judge decides which reply is preferred: the hint does. User and inducer see the persona; the model sees what the
inducer found, and that for p_i alone. Nothing of the hint stays in the history.

    reads   --personas  {"persona_id": "train0000", "split": "train", "profile": "He is 34 ...", "personality": "..."}
    writes  --output    {"persona_id": "train0000", "split": "train", "profile": "He is 34 ...", "personality": "...",
                         "rounds": [{"user": "Just back from the allotment!", "revealed": "Profile: He grows ...",
                                     "preferred": "...", "rejected": "...", "chosen": "rejected"}]}

On a laptop, with the embedded world's server (aloe/toy/server.py) running:
    python aloe/simulate.py --model aloe/toy/base --roleplayer openai:aloe-user@http://127.0.0.1:8766/v1 \\
        --inducer openai:aloe-inducer@http://127.0.0.1:8766/v1 --dtype float32 --limit 20 --max-tokens 32 \\
        --personas runs/ap.jsonl --output runs/ac.jsonl
The paper's scale, 3,000 x 10 x 4 = 120,000 calls (the paper: GPT-4o in all four parts):
    python aloe/simulate.py --model openai:MODEL --roleplayer openai:MODEL --inducer openai:MODEL --limit 3000 \\
        --personas runs/aloe/personas.jsonl --output runs/aloe/conversations.jsonl
"""
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first: there, too, are a simulate.py and a train.py
from common import (Request, Rows, add_model_flags, amount, fail, natural,  # noqa: E402
                    nucleus, open_model, read_prompts, read_rows, run, sample_pairs, say, seed_for,
                    stage_parser, start_processes)
from simulate import deal_users, save_blocks  # noqa: E402

PROMPTS = read_prompts("aloe_roleplay", "aloe_induction", "aloe_hint")


def roleplayer_chat(person, conversation, prompts=PROMPTS):
    """What the user's model sees: the persona, and the conversation with the roles turned around."""
    other = {"user": "assistant", "assistant": "user"}
    return [{"role": "user", "content": prompts["aloe_roleplay"].format(**person)},
            *({"role": other[turn["role"]], "content": turn["content"]} for turn in conversation)]


def inducer_chat(person, conversation, prompts=PROMPTS):
    """What the inducer sees: the persona, and the conversation up to the user's last message."""
    lines = "\n".join(f"{'A' if turn['role'] == 'user' else 'B'}: {turn['content']}" for turn in conversation)
    return [{"role": "user", "content": prompts["aloe_induction"].format(conversation=lines, **person)}]


def hinted(conversation, revealed, prompts=PROMPTS):
    """What the model sees for the preferred reply: the hint stands below the user's last message."""
    hint = prompts["aloe_hint"].format(revealed=revealed)
    return [*conversation[:-1], {"role": "user", "content": f"{conversation[-1]['content']}\n{hint}"}]


def walked(rounds):
    """The conversation of some rounds, of which the last may lack a reply, as messages: m_1, s_1, m_2, s_2, ..."""
    return [{"role": role, "content": r[field]} for r in rounds for role, field in (
        ("user", "user"), ("assistant", r.get("chosen", "reply"))) if field in r]


def invented(revealed, person):
    """The words of an inducer's answer that stand nowhere in the persona, by their first five letters. It was told to
    extract: what is new is made up, or somebody else's. (Of a model that rephrases this counts too many.)"""
    known, told = ({word[:5] for word in re.findall(r"[^\W_]{3,}", text.lower())} for text in (
        f"{person['profile']} {person['personality']} profile personalities none she", revealed))
    return sorted(told - known)


def simulate(people, K, steps, choose, ask):
    """Advances all conversations together, step by step, so that each step is one batch. Returns {key: row}.

    people: {key: persona}; steps: lists of the fields of a round that are asked for at once; choose: (key, k) -> what
    else a round has, such as which reply continues; ask: (k, [(key, field)], rows) -> yields ((key, field), Reply). A
    conversation in which somebody declines or says nothing ends there, and its row gets `refused`.
    """
    rows = {key: {**person, "rounds": [], "cut": 0} for key, person in people.items()}
    for k in range(K):
        alive = {key: row for key, row in rows.items() if "refused" not in row}
        for key, row in alive.items():
            row["rounds"].append({})
        for fields in steps:
            asked = [(key, field) for key, row in alive.items() if "refused" not in row for field in fields]
            replies = dict(ask(k, asked, rows))
            for key, field in asked:                            # in their order, whichever came first
                reply, now = replies[key, field], rows[key]["rounds"][-1]
                now[field] = reply.text
                if reply.refused or not reply.text:
                    rows[key].setdefault("refused", f"{field}, round {k + 1}: {reply.refused or 'empty'}")
                elif reply.cut:                                 # no end of it is to be learned
                    now["cut"], rows[key]["cut"] = [*now.get("cut", []), field], rows[key]["cut"] + 1
        for key, row in alive.items():
            row["rounds"].pop() if "refused" in row else row["rounds"][-1].update(choose(key, k))
    return rows


def talk(output, people, steps, speakers, choose, what):
    """Simulates the conversations that `output` does not have, and saves them, a block of people at a time.

    speakers: {field: (key -> model, temperature, (key, messages, this round) -> what it sees)}
    """
    args = output.args
    size = max(1, args.batch_size // max(map(len, steps)))      # two replies each: half as many
    blocks = [list(people)[i:i + size] for i in range(0, len(people), size)]
    todo = [block for block in blocks if not all(key in output for key in block)]
    specs = {model_of(key) for model_of, _, _ in speakers.values() for key in people}
    models = {spec: open_model(spec, args, output.processes) for spec in specs if todo}

    def ask(k, asked, rows):
        requests = defaultdict(dict)                            # two replies by one model share batch and history
        for key, field in asked:
            (model_of, temperature, chat), rounds = speakers[field], rows[key]["rounds"]
            requests[model_of(key), temperature][key, field] = Request(
                chat(key, walked(rounds), rounds[-1]), seed_for(args.seed, field, *key, k), key)
        for (spec, temperature), of_it in requests.items():
            yield from models[spec].generate(of_it, temperature, args.top_p, args.max_tokens)

    def simulate_block(block):
        rows = simulate({key: people[key] for key in block}, args.rounds, steps, choose, ask)
        return [(key, {name: value for name, value in row.items() if value or name == "rounds"})
                for key, row in rows.items()]

    save_blocks(output, people, todo, simulate_block, what)


def read_people(path, split, limit, seed):
    """{(persona_id,): row} of a split, or of a seeded sample of it. A persona that is "None" ends the program."""
    fields = {"split": str, "profile": str, "personality": str}
    rows = {(row["persona_id"],): {name: row[name] for name in ("persona_id", *fields)} for row in
            read_rows(path, {"persona_id": str}, fields) if "refused" not in row and row["split"] == split}
    for (persona_id,), row in rows.items():
        for name in ("profile", "personality"):
            if row[name].strip(" .\n").lower() in ("", "none"):
                fail(f"{path}: the {name} of {persona_id} is {row[name]!r}. Correct it, or take that persona out.")
    return {key: rows[key] for key in sample_pairs(rows, limit, seed)} if rows else fail(
        f"{path}: no persona of --split {split}. Name another one.")


def talk_parser(manual, output, split):
    """The parser of a stage that talks with the user."""
    parser = stage_parser(manual, output, "talk with a seeded sample of N personas")
    parser.add_argument("--model", required=True, help="whose replies these are; the paper simulates with GPT-4o")
    parser.add_argument("--roleplayer", nargs="+", metavar="MODEL", required=True,
                        help="plays the user; the paper: GPT-4o; several share the personas evenly")
    parser.add_argument("--personas", default="runs/aloe/personas.jsonl", help="personas (JSONL)")
    parser.add_argument("--split", default=split, help="of the personas")
    parser.add_argument("--rounds", type=natural, default=10, metavar="K", help="in a conversation")
    parser.add_argument("--temperature", type=amount, default=1.0, help="of the replies (the paper gives none)")
    parser.add_argument("--roleplayer-temperature", type=amount, default=1.0, help="of the user (nor here)")
    parser.add_argument("--top-p", type=nucleus, default=1.0, help="of the nucleus, for all")
    parser.add_argument("--max-tokens", type=natural, default=400, help="length of a message, of either side")
    add_model_flags(parser, batch_size=128)
    return parser


def user_speaker(args, people, prompts):
    """The users, as a speaker for `talk`. A hash deals each person one of --roleplayer; the row tells its name."""
    who, names = deal_users(people, args.roleplayer, args.seed)
    for key, row in people.items():
        row["roleplayer"] = names[who[key]]
    return who.get, args.roleplayer_temperature, lambda key, said, _: roleplayer_chat(people[key], said, prompts)


def parse_args():
    parser = talk_parser(__doc__, "conversations (JSONL)", "train")
    parser.add_argument("--inducer", required=True, help="says what the user has shown; the paper: GPT-4o")
    return parser.parse_args()


def main():
    args = parse_args()
    people = read_people(args.personas, args.split, args.limit, args.seed)
    prompts = read_prompts(*PROMPTS, folder=args.prompts)
    speakers = {
        "user": user_speaker(args, people, prompts),
        "revealed": (lambda _: args.inducer, 0.0, lambda key, said, _: inducer_chat(people[key], said, prompts)),
        "preferred": (lambda _: args.model, args.temperature,
                      lambda _, said, now: hinted(said, now["revealed"], prompts)),
        "rejected": (lambda _: args.model, args.temperature, lambda _, said, now: said)}
    output = Rows(args, args.output, ("persona_id",), start_processes(), **prompts)
    talk(output, people, [["user"], ["revealed"], ["preferred", "rejected"]], speakers, lambda key, k: {
        "chosen": ("preferred", "rejected")[seed_for(args.seed, "chosen", *key, k) % 2]}, "conversations")
    whole = [row for row in output.values() if "refused" not in row]
    found = [(r["revealed"], row) for row in whole for r in row["rounds"]]
    nothing = sum(set(re.findall(r"\w+", told.lower())) <= {"profile", "personalities", "none"} for told, _ in found)
    strange = [words for told, row in found if (words := invented(told, row))]
    examples = ", ".join(sorted(set(sum(strange, [])))[:3]) or "none"
    for row in whole[:1]:
        say(output.processes, "", row["profile"], row["personality"], *walked(row["rounds"]), "")
    say(output.processes, f"{output.summary()}; {len(found)} rounds: in {nothing} nothing was revealed, in "
        f"{len(strange)} the inducer has words that are not in the persona ({examples})")


if __name__ == "__main__":
    run(main)
