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

Its command, on a laptop and at the paper's scale (3,000 x 10 x 4 = 120,000 calls): PRINT=1 bash aloe/run.sh [paper]
"""
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first: there, too, are a simulate.py and a train.py
from common import (Request, Rows, add_model_flags, amount, fail, natural,  # noqa: E402
                    nucleus, open_model, read_prompts, read_rows, run, sample_pairs, say, seed_for,
                    stage_parser, start_processes)
from simulate import deal_users, own_words, save_blocks  # noqa: E402

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


def extracted(revealed, person):
    """The words in which an inducer describes the user, by their first five letters, and those of them that are not in
    the persona. It was told to extract: these are made up, or somebody else's. (Of one that rephrases: too many.)"""
    told, known = ({word[:5] for word in re.findall(r"[^\W_]{3,}", text.lower())} - {"profi", "perso", "none", "she"}
                   for text in (revealed, f"{person['profile']} {person['personality']}"))
    return told, told - known


def tree(person, rounds, K, coin, prompts=PROMPTS):
    """A conversation of K rounds, step by step. Each step says who is asked, as {field: messages that are seen};
    whoever goes through the steps puts the answers into the last of `rounds`. coin: round -> 0 or 1."""
    for i in range(K):
        rounds.append({})
        yield {"user": roleplayer_chat(person, walked(rounds), prompts)}                                # m_i
        yield {"revealed": inducer_chat(person, walked(rounds), prompts)}                               # e_i
        yield {"preferred": hinted(walked(rounds), rounds[-1]["revealed"], prompts), "rejected": walked(rounds)}
        rounds[-1]["chosen"] = ("preferred", "rejected")[coin(i)]                                       # s_i


def simulate(talks, rows, ask):
    """Advances all conversations together, so that each step is one batch.

    talks: {key: steps, as of `tree`}; rows: {key: {"rounds": [], ...}}, whose rounds the talks fill; ask:
    ({(key, field): messages}, rows) -> yields ((key, field), Reply). A conversation in which somebody declines or says
    nothing ends there, and its row gets `refused`.
    """
    while asked := {(key, field): chat for key, talk in talks.items() if not rows[key].get("refused")
                    for field, chat in next(talk, {}).items()}:
        replies = dict(ask(asked, rows))
        for key, field in asked:                                # in their order, whichever came first
            reply, row = replies[key, field], rows[key]
            row["rounds"][-1][field] = reply.text
            if reply.refused or not reply.text:
                row.setdefault("refused", f"{field}, round {len(row['rounds'])}: {reply.refused or 'empty'}")
            elif reply.cut:                                     # no end of it is to be learned
                row["rounds"][-1].setdefault("cut", []).append(field)
                row["cut"] = row.get("cut", 0) + 1
    for row in rows.values():
        if row.get("refused"):
            row["rounds"].pop()


def talk(output, people, steps, cast):
    """Simulates the conversations that `output` does not have, and saves them, a block of people at a time.

    steps: (key, rounds) -> the steps of a conversation, as of `tree`; cast: {field: (model, temperature)} of all but
    the user. A hash deals each person one of --roleplayer; the row tells its name.
    """
    args, (who, names) = output.args, deal_users(people, output.args.roleplayer, output.args.seed)
    size = max(1, args.batch_size // 2)                         # a step may ask for two replies
    blocks = [list(people)[i:i + size] for i in range(0, len(people), size)]
    todo = [block for block in blocks if not all(key in output for key in block)]
    models = {spec: open_model(spec, args, output.processes)
              for spec in {*who.values(), *(spec for spec, _ in cast.values())} if todo}

    def ask(asked, rows):
        requests = defaultdict(dict)                            # two replies by one model share batch and history
        for (key, field), chat in asked.items():
            speaker, k = cast.get(field, (who[key], args.roleplayer_temperature)), len(rows[key]["rounds"]) - 1
            requests[speaker][key, field] = Request(chat, seed_for(args.seed, field, *key, k), key)
        for (spec, temperature), of_it in requests.items():
            for (key, field), reply in models[spec].generate(of_it, temperature, args.top_p, args.max_tokens):
                yield (key, field), own_words(reply) if field == "user" else reply

    def simulate_block(block):
        rows = {key: {**people[key], "roleplayer": names[who[key]], "rounds": []} for key in block}
        simulate({key: steps(key, row["rounds"]) for key, row in rows.items()}, rows, ask)
        return rows.items()

    save_blocks(output, people, todo, simulate_block, "conversations")


def read_people(path, split, limit, seed):
    """{(persona_id,): row} of a split, or of a seeded sample of it. A persona that is "None" ends the program."""
    fields = {"split": str, "profile": str, "personality": str}
    rows = {(row["persona_id"],): {name: row[name] for name in ("persona_id", *fields)} for row in
            read_rows(path, {"persona_id": str}, fields) if not row.get("refused") and row["split"] == split}
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
    parser.add_argument("--max-tokens", type=natural, default=400,
                        help="length of a message, of either side (the release: 2048)")
    add_model_flags(parser, batch_size=32)                      # a kill loses the calls of so many conversations
    return parser


def cuts(rows):
    """ "of 240 rounds user 12, reply 11": how many texts of each kind were cut."""
    rounds = [r for row in rows if not row.get("refused") for r in row["rounds"]]
    found = Counter(field for r in rounds for field in r.get("cut", ()))
    return f"of {len(rounds)} rounds " + (", ".join(f"{field} {n}" for field, n in found.items()) or "none")


def parse_args():
    parser = talk_parser(__doc__, "conversations (JSONL)", "train")
    parser.add_argument("--inducer", required=True, help="says what the user has shown; the paper: GPT-4o")
    parser.add_argument("--rejected-model", metavar="MODEL", help="writes the rejected replies; default: --model")
    return parser.parse_args()


def main():
    args = parse_args()
    people = read_people(args.personas, args.split, args.limit, args.seed)
    prompts = read_prompts(*PROMPTS, folder=args.prompts)
    cast = {"revealed": (args.inducer, 0.0), "preferred": (args.model, args.temperature),
            "rejected": (args.rejected_model or args.model, args.temperature)}
    output = Rows(args, args.output, ("persona_id",), start_processes(), **prompts)
    talk(output, people, lambda key, rounds: tree(
        people[key], rounds, args.rounds, lambda i: seed_for(args.seed, "chosen", *key, i) % 2, prompts), cast)
    whole = [row for row in output.values() if not row.get("refused")]
    found = [extracted(r["revealed"], row) for row in whole for r in row["rounds"]]
    nothing, strange = sum(not told for told, _ in found), [new for _, new in found if new]
    examples = ", ".join(sorted(set().union(*strange))[:3]) or "none"
    for row in whole[:1]:
        say(output.processes, "", row["profile"], row["personality"], *walked(row["rounds"]), "")
    say(output.processes, f"{output.summary()} ({cuts(whole)}); in {nothing} rounds nothing was revealed, in "
        f"{len(strange)} the inducer has words that are not in the persona ({examples})")
    if whole:
        p, r = np.array([[len(r[name].split()) for row in whole for r in row["rounds"]]
                         for name in ("preferred", "rejected")])                                        # (pairs,) each
        say(output.processes, f"{p.mean():.1f} words in a preferred reply, {r.mean():.1f} in a rejected one; "
            f"{(p > r).mean():.0%} of these are shorter")


if __name__ == "__main__":
    run(main)
