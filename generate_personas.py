"""Write personas: a language model invents people, shown two examples a prompt (Section 4, "Persona Generation").

Input of Algorithm 1: the personas U. Splits A and B are trained on in turn, `test` never is. Two people may not share a
text or a name, since the name is all that the Questioner is told; a reply that opens without a name is asked for again.

    reads   --examples  {"persona_id": "seed00", "name": "Mirela", "persona": "I'm Mirela. ..."}
    writes  --output    {"persona_id": "A00", "split": "A", "name": "June", "persona": "I'm June. I'm from a small ..."}

On a laptop, with the embedded world's server (toy/server.py) running:
    python generate_personas.py --model openai:persona-writer@http://127.0.0.1:8765/v1 --splits A=8,test=4 \\
        --output runs/p.jsonl
The paper's scale, 110 calls: PRINT=1 bash run.sh paper prints the command.
"""
import random
from argparse import Namespace
from collections import Counter
from difflib import SequenceMatcher

import regex

from common import (Request, Rows, add_model_flags, amount, answer_all, fail, natural, nucleus,
                    read_prompts, read_rows, run, say, seed_for, stage_parser, start_processes)

PROMPTS = read_prompts("persona_system", "persona_user")        # figures 8 and 9


def persona_request(examples, seed, prompts=PROMPTS):
    """The chat that asks for one persona, with two of the examples (texts) drawn at random without replacement."""
    shown = random.Random(seed).sample(examples, 2)
    return Request([{"role": "system", "content": prompts["persona_system"]},
                    {"role": "user", "content": "\n\n".join([prompts["persona_user"], *shown])}], seed)


def name_in(persona):
    """The first name with which a persona opens, in any script: "I'm REECE. ...", "Meet Zara, an ...". None where the
    word may be no name: "I'm Deaf and ...", "I'm Maria's grandson", "I'm Canadian, ... Call me Jo". ("I'm Deaf, ..." is
    taken for one.)"""
    title = r"(?:(?:Dr|Mr|Mrs|Ms|Prof|Professor|Captain|Sir|Lady|Lord)\.?\s+)?"
    surnames = r"(?:\s+\p{Lu}[\w\p{M}.'’-]*)*\s*(?:[^\s\w#('’]|$)"                         # and a comma, or a stop
    match = regex.match(r"[^\p{L}]*(?:(?:My name is|My name['’]s|(I['’]m|I am|Meet|This is|Introducing))\s+"
                        rf"{title}(\p{{L}}(?:[\w\p{{M}}'’-]*[\w\p{{M}}])?)(?(1){surnames}))", persona)
    name = match[2] if match else ""
    if not name or name[0].islower() or name in ("An", "The", "One", "Your") or regex.search("[Cc]all me", persona):
        return None
    return name.title() if name.isupper() and name.lower() != name else name


def persona_splits(text):
    """"A=50,test=10" -> {"A": ["A00", ..., "A49"], "test": ["test00", ...]}."""
    sizes = dict(part.strip().split("=") for part in text.split(","))
    return {split: [f"{split}{i:02d}" for i in range(natural(size))] for split, size in sizes.items()}


def parse_args():
    parser = stage_parser(__doc__, "personas (JSONL)", "write the first N of each split")
    parser.add_argument("--model", required=True, help="who writes; the paper: gpt-4-0613, which is no more")
    parser.add_argument("--examples", default="data/seed_personas.jsonl", help="two of them stand in each prompt")
    parser.add_argument("--splits", type=persona_splits, default="A=50,B=50,test=10", help="how many for each split")
    parser.add_argument("--temperature", type=amount, default=1.4, help="high: people should differ")
    parser.add_argument("--top-p", type=nucleus, default=0.9, help="mass of the nucleus")
    parser.add_argument("--max-tokens", type=natural, default=400, help="length of a persona")
    parser.add_argument("--attempts", type=natural, default=20, help="how often a persona is asked for at most")
    add_model_flags(parser, batch_size=32)
    return parser.parse_args()


def main():
    args = parse_args()
    examples = [row["persona"] for row in read_rows(args.examples, {"persona_id": str}, {"persona": str})]
    if len(examples) < 2:
        fail(f"{args.examples}: each prompt shows two personas. Add some.")
    prompts, processes, rejected = read_prompts(*PROMPTS, folder=args.prompts), start_processes(), Counter()
    # Every reply is kept: it was paid for, and more people or attempts may be wanted later.
    settings = {"without": ("splits", "attempts"), **prompts}
    rows = Rows(args, args.output, ("persona_id",), processes, **settings)
    replies = Rows(args, args.output.removesuffix(".jsonl") + ".replies.jsonl", ("persona_id", "attempt"), processes,
                   **settings)
    replies.args = Namespace(**{**vars(args), "max_refused": 1})                # while there are attempts left
    taken = {row["name"].lower(): row for row in rows.values()}
    missing = [(persona_id, split) for split, ids in args.splits.items() for persona_id in ids[:args.limit]
               if (persona_id,) not in rows]
    for attempt in range(args.attempts if missing else 0):
        requests = {(persona_id, attempt): persona_request(examples, seed_for(args.seed, persona_id, attempt), prompts)
                    for persona_id, _ in missing}
        answer_all(replies, requests, args.model, (args.temperature, args.top_p, args.max_tokens),
                   f"personas, attempt {attempt + 1}", lambda key, reply: {"reply": reply.text})
        asked, missing = missing, []
        for persona_id, split in asked:
            answer = replies[persona_id, attempt]
            name = name_in(answer["reply"])
            why = ("refused" if answer.get("refused") else "cut" if answer.get("cut") else
                   "no name" if name is None else "name taken" if name.lower() in taken else
                   "a copy" if any(SequenceMatcher(None, text.split(), answer["reply"].split()).ratio() > 0.8
                                   for text in examples) else None)
            if why:
                rejected[why] += 1
                missing.append((persona_id, split))
            else:
                row = {"persona_id": persona_id, "split": split, "name": name, "persona": answer["reply"]}
                taken[name.lower()] = row
                if processes.is_main_process:
                    rows.add(row)
        if rejected.total() > 0.9 * max(10, len(replies)):      # of all: a restart begins with those rejected
            fail(f"{args.model}: {rejected.total()} of {len(replies)} replies could not be a persona: "
                 f"{dict(rejected)}. Look at {replies.path}, and try another --model or --max-tokens.", status=1)
        if not missing:
            break
    again = ", ".join(f"{number} {why}" for why, number in sorted(rejected.items())) or "none"
    say(processes, "", *[row["persona"] for row in taken.values()][:1], "", replies.summary(),
        f"{args.output}: {len(taken)} personas; replies that could not be one: {again}")
    if missing:                                                 # the next run goes on with the parts
        replies.args = args
        replies.limit_refusals()
        fail(f"{len(missing)} personas are still missing after {args.attempts} attempts each: start again with more "
             "--attempts, or with another --model.", status=1)
    rows.finish()


if __name__ == "__main__":
    run(main)
