"""Write personas: a language model invents people, shown two examples a prompt (Section 4, "Persona Generation").

Input of Algorithm 1: the personas U. Splits A and B are trained on in turn, `test` never is. Two people may not share a
text or a name, since the name is all that the Questioner is told; a reply that opens without a name is asked for again.

    reads   --examples  {"persona_id": "seed00", "name": "Mirela", "persona": "I'm Mirela. ..."}    or PRODIGy's file
    writes  --output    {"persona_id": "A00", "split": "A", "name": "June", "persona": "I'm June. I'm from a small ..."}

On a laptop, with the embedded world's server (toy/server.py) running:
    python generate_personas.py --model openai:persona-writer@http://127.0.0.1:8765/v1 --splits A=8,test=4 \\
        --output runs/p.jsonl
The paper's scale, 110 calls (the paper's writer, gpt-4-0613, was shut down in October 2026):
    python generate_personas.py --model openai:MODEL --output runs/paper/personas.jsonl
"""
import json
import random
import re
from collections import Counter

from common import (Request, Rows, add_local_flags, add_server_flags, announce, digest, fail, fingerprint, fraction,
                    letters, model_name, not_json, open_model, positive, read_rows, say, seed_for, spent, stage_parser,
                    start_processes, temperature)

SYSTEM_PROMPT = (
    "You are a helpful AI assistant, particularly skilled at writing creative, diverse personas in the form of "
    "characteristics of humans. These characteristics describe a user's personality, identity, characteristics, "
    "likes and dislikes, social life and other information."
)  # figure 8
PROMPT = (
    "Take a deep breath. Please generate exactly one persona describing a user. Make sure you generate personas "
    "with a diverse set of information that is interesting, unpredictable and creative. Crucially, the persona "
    "itself need not exhibit an appreciation or focus on diversity, although it could; however, what is "
    "important is that you generate an interesting, engaging, creative persona that could serve as a character "
    "in a story with an interesting, complex plot. The persona should be concise- less than ~10 sentences. Here "
    "are a few examples of personas to help you understand what sorts of categories of characteristics are "
    "important to describe."
)  # figure 9

# The 21 characters of PRODIGy that the authors picked by hand as free of violence, profanity and filtered content.
PRODIGY_IDS = ("u0 u9 u498 u838 u861 u1106 u1172 u1273 u1323 u1456 u1767 u2563 u2585 u2746 u3105 u3125 u3171 u3283 "
               "u3321 u3667 u3681").split()


def persona_request(examples, seed):
    """The chat that asks for one persona, with two of the examples (texts) drawn at random without replacement."""
    shown = random.Random(seed).sample(examples, 2)
    return Request([{"role": "system", "content": SYSTEM_PROMPT},
                    {"role": "user", "content": "\n\n".join([PROMPT, *shown])}], seed)


def name_in(persona):
    """The first name with which a persona opens ("I'm REECE. ...", "Meet Zara, an ..."), as a word with a capital; None
    if it opens otherwise."""
    match = re.match(r"\W*(?:I['’]m|I am|My name is|My name['’]s|Meet|This is|Introducing)\s+"
                     r"(?:(?:Dr|Mr|Mrs|Ms|Prof|Professor|Captain|Sir|Lady|Lord)\.?\s+)?([^\W\d_][\w'’-]*\w)", persona)
    name = match.group(1).removesuffix("'s").removesuffix("’s") if match else ""
    if not name[:1].isupper() or name in ("An", "The", "One", "Your"):
        return None
    return name.title() if name.isupper() else name


def why_not(persona, name, taken):
    """Why a reply cannot be a persona, or None. taken: the personas so far, each with `name` and `persona`."""
    if not persona:
        return "empty"
    if name is None:
        return "no name"
    if any(name.lower() == other["name"].lower() for other in taken):
        return "name taken"
    if any(persona == other["persona"] for other in taken):
        return "text taken"


def read_examples(path):
    """The example personas as texts: a JSONL file with `persona`, or PRODIGy's characters.json."""
    if not path.endswith(".json"):
        examples = [row["persona"] for row in read_rows(path, {"persona_id": str, "persona": str}, ("persona_id",))]
    else:
        try:
            characters = json.load(open(path, encoding="utf-8"), parse_constant=not_json)
            chosen = [characters[i] for i in PRODIGY_IDS]
            if not all(type(c["biography"]) is list for c in chosen):
                raise TypeError("a biography is a list of sentences")
            examples = [f"I'm {c['character_name']}. {' '.join(c['biography'])}" for c in chosen]
            "".join(examples).encode("utf-8")                   # half of a surrogate pair could not be sent
        except OSError as error:
            fail(f"{path}: {error.strerror}. Give PRODIGy's characters.json, or a JSONL file of personas.")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            fail(f"{path}: not PRODIGy's characters.json ({type(error).__name__}: {error}). It maps ids such as u0 to "
                 "objects with character_name and biography; a file of one persona a line is called .jsonl.")
    if len(examples) < 2:
        fail(f"{path}: {len(examples)} personas, but each prompt shows two. Add some.")
    return examples


def persona_splits(text):
    """"A=50,test=10" -> [("A00", "A"), ..., ("test09", "test")]."""
    if not re.fullmatch(r"[A-Za-z]+=[1-9]\d*(,[A-Za-z]+=[1-9]\d*)*", text):
        raise ValueError
    sizes = [part.split("=") for part in text.split(",")]
    return [(f"{split}{i:02d}", split) for split, size in sizes for i in range(int(size))]


def parse_args():
    parser = stage_parser(__doc__, "personas (JSONL)", "write a seeded sample of N of the personas")
    parser.add_argument("--model", required=True, help="who writes; the paper: gpt-4-0613, which is no more")
    parser.add_argument("--examples", default="data/seed_personas.jsonl", help="or PRODIGy's characters.json (21 ids)")
    parser.add_argument("--splits", type=persona_splits, default="A=50,B=50,test=10", help="how many for each split")
    parser.add_argument("--temperature", type=temperature, default=1.4, help="high: people should differ")
    parser.add_argument("--top-p", type=fraction, default=0.9, help="mass of the nucleus")
    parser.add_argument("--max-tokens", type=positive, default=400, help="length of a persona")
    parser.add_argument("--attempts", type=positive, default=20, help="how often a persona is asked for at most")
    add_local_flags(parser, batch_size=32)
    add_server_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    examples = read_examples(args.examples)
    processes = start_processes(args.model)
    settings = {
        "stage": "generate_personas", "model": model_name(args.model), "system_prompt": SYSTEM_PROMPT,
        "prompt": PROMPT, "examples": fingerprint(args.examples), "temperature": args.temperature, "top_p": args.top_p,
        "max_tokens": args.max_tokens, "system": args.system, "extra": args.extra, "dtype": args.dtype,
        "seed": args.seed}
    rows = Rows(args.output, ("persona_id",), settings, processes)
    # Every reply is kept as it comes: it was paid for, and who is accepted depends on the order of the personas, not
    # on which reply was fastest.
    replies = Rows(args.output.removesuffix(".jsonl") + ".replies.jsonl", ("persona_id", "attempt"),
                   {**settings, "stage": "generate_personas, replies"}, processes, args.max_refused)

    wanted = args.splits
    if args.limit is not None:
        wanted = sorted(wanted, key=lambda w: seed_for(args.seed, "limit", w[0]))[:args.limit]
        wanted = [w for w in args.splits if w in wanted]
    missing = [w for w in wanted if (w[0],) not in rows]
    taken, rejected, model = list(rows.read()), Counter(), None
    tried = Counter(persona_id for persona_id, _ in replies.done)
    announce(processes, args, args.model,
             [letters(persona_request(examples, seed_for(args.seed, persona_id, tried[persona_id])).chat)
              for persona_id, _ in missing if tried[persona_id] < args.attempts], args.max_tokens, [rows, replies],
             f"; and for each unusable reply another call, {args.attempts} a persona at most")
    for attempt in range(args.attempts):
        keys = [(persona_id, attempt) for persona_id, _ in missing]
        requests = [persona_request(examples, seed_for(args.seed, *key)) for key in keys]
        done = replies.plan(keys, [digest(request.chat) for request in requests], f"personas, attempt {attempt + 1}")
        if len(done) < len(keys):
            model = model or open_model(args.model, args, processes)
            for i, reply in model.generate(requests, args.temperature, args.top_p, args.max_tokens, done, processes):
                if replies.save(i, {"reply": reply.text, **reply.marks()}):
                    say(processes, f"\n{keys[i][0]}: {reply.text}\n")
        replies.finish()

        answers, asked, missing = {(row["persona_id"], row["attempt"]): row for row in replies.read()}, missing, []
        for (persona_id, split), key in zip(asked, keys):
            answer = answers[key]
            text, name = answer["reply"], name_in(answer["reply"])
            why = "refused" if "refused" in answer else "cut" if "cut" in answer else why_not(text, name, taken)
            if why:
                rejected[why] += 1
                missing.append((persona_id, split))
            else:
                taken.append({"persona_id": persona_id, "split": split, "name": name, "persona": text})
                if processes.is_main_process:
                    rows.add(taken[-1:])
        if not missing:
            break
    if not missing:                                             # else the next run goes on with the parts
        rows.finish()
    count, usage = replies.tally()
    again = ", ".join(f"{number} {why}" for why, number in sorted(rejected.items()))
    say(processes, f"{args.output}: {len(taken)} personas from {count} replies{again and f'; asked again: {again}'}"
                   f"{spent(args, usage)}")
    replies.limit_refusals()
    if missing:
        say(processes, f"{len(missing)} of {len(wanted)} personas are still missing after {args.attempts} attempts "
                       "each: start again with more --attempts, or with another --model.")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
