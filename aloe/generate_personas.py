"""Grow two pools, of profiles and of personalities, and pair them to personas (ALOE, section 2.1).

    repeat    5 random members of a pool are shown to a language model, which writes 20 new ones
              one is discarded whose highest cosine similarity with the pool exceeds 0.6
    until     a round adds fewer than --until

Each split but the first keeps --held-out members of the pools for itself. Its personas are random pairs of them.

    reads   --profiles, --personalities     {"text": "She is 41 and drives the mobile library ..."}       the seeds
    writes  --output        {"persona_id": "train0000", "split": "train", "profile": "...", "personality": "..."}
            OUTPUT's .pools.jsonl       {"pool": "profiles", "round": 1, "item": 7, "text": "...", "kept": false,
                                         "similarity": 0.71, "nearest": "..."}     all that were written, and the seeds
            OUTPUT's .replies.jsonl     {"pool": "profiles", "round": 1, "reply": "..."}      what was paid for

Its command, on a laptop and at the paper's scale (some 30 calls): PRINT=1 bash aloe/run.sh [paper]
"""
import random
import re
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first: there, too, is a generate_personas.py
from common import (Request, Rows, add_model_flags, amount, answer_all, fail, natural,  # noqa: E402
                    nucleus, number, read_prompts, read_rows, run, say, seed_for, stage_parser,
                    start_processes)

POOLS = ("profiles", "personalities")


def ngrams(texts, n=4, d=4096):
    """Unit vectors (N, d): how often each n letters in a row occur, by a hash. Wording, no meaning."""
    vectors = np.zeros((len(texts), d))
    for vector, text in zip(vectors, texts):
        text = " ".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])
        for i in range(len(text) - n + 1):
            vector[zlib.crc32(text[i:i + n].encode()) % d] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)


def encoder(path):
    """A Sentence-Transformers model as a function: texts -> unit vectors (N, d). MiniLM cuts texts at 128 tokens."""
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        fail("--embedder: `pip install -r aloe/requirements.txt` brings Sentence-Transformers; ngrams needs no model.")
    return partial(SentenceTransformer(path).encode, normalize_embeddings=True, show_progress_bar=False)


def filtered(pool, new, most):
    """[(highest cosine similarity with the pool, its index there, kept)] of each new one, in order: what is kept joins
    the pool for those after it. pool: (P, d), new: (N, d), unit vectors."""
    results = []
    for vector in new:
        similarity = pool @ vector                                                              # (P,)
        nearest = int(similarity.argmax())
        kept = bool(similarity[nearest] <= most)
        results.append((float(similarity[nearest]), nearest, kept))
        if kept:
            pool = np.vstack([pool, vector])
    return results


CHATTER = re.compile(r"(sure|certainly|of course|okay|here|below|i hope|i've|let me know|feel free|these)\b", re.I)


def texts_in(reply, cut=False):
    """The texts of a reply, one a line, without numbers or bullets; not a line that was cut, a heading, a very short
    one, or what the writer says to whoever asked ("Here are twenty profiles for you")."""
    lines = reply.splitlines()[:-1 if cut else None]
    lines = [re.sub(r"^\s*(?:\d+[.):]|[-*•])\s+", "", line).strip() for line in lines]
    return [line for line in lines
            if len(re.findall(r"\w+", line)) > 4 and not line.endswith(":") and not CHATTER.match(line)]


def split_pool(pool, splits, size, seed):
    """{split: its members}: so many of a seeded draw for each split but the first, which has all others."""
    order, (first, *others) = sorted(pool, key=lambda text: (seed_for(seed, "split", text), text)), splits
    parts = {split: order[i * size:(i + 1) * size] for i, split in enumerate(others)}
    return {first: order[len(others) * size:], **parts}


def pairs_of(profiles, personalities, how_many, seed):
    """`how_many` random pairs, none twice. The profiles come in turn, each equally often, or once less."""
    chance = random.Random(seed)
    shuffled = lambda pool: chance.sample(pool, len(pool))                                 # noqa: E731
    orders = [(profile, shuffled(personalities)) for profile in shuffled(profiles)]
    return [(profile, order[turn]) for turn in range(len(personalities)) for profile, order in orders][:how_many]


def grow(args, pools, embed, replies, prompts):
    """Grows {pool: texts} round by round, in place, and returns a row for each text that was written, the seeds' first,
    the number of rounds, and the pools that were still growing. What the writer answered is in `replies`."""
    vectors = {pool: embed(pools[pool]) for pool in pools}
    rows = [{"pool": pool, "round": 0, "item": i, "text": text, "kept": True} for pool in pools
            for i, text in enumerate(pools[pool])]
    growing, r = list(pools), 0
    while growing and r < args.rounds:
        r += 1
        requests = {}
        for pool in growing:
            seed = seed_for(args.seed, pool, r)
            shown = random.Random(seed).sample(pools[pool], min(args.examples, len(pools[pool])))
            prompt = prompts[f"aloe_{pool}"].format(examples="\n".join(shown))
            requests[pool, r] = Request([{"role": "user", "content": prompt}], seed)
        answer_all(replies, requests, args.model, (args.temperature, args.top_p, args.max_tokens), f"pools, round {r}",
                   lambda key, reply: {"reply": reply.text})
        for pool in [pool for pool in growing if not replies[pool, r].get("refused")]:
            new = texts_in(replies[pool, r]["reply"], replies[pool, r].get("cut"))
            new_vectors = embed(new) if new else vectors[pool][:0]
            found = filtered(vectors[pool], new_vectors, args.similarity)
            added = [text for text, (_, _, kept) in zip(new, found) if kept]
            pools[pool] += added
            rows += [{"pool": pool, "round": r, "item": i, "text": new[i], "kept": kept,
                      "similarity": round(highest, 6), "nearest": pools[pool][nearest]}
                     for i, (highest, nearest, kept) in enumerate(found)]
            vectors[pool] = np.vstack([vectors[pool], new_vectors[[kept for _, _, kept in found]]])
            if len(added) < args.until:
                growing.remove(pool)
    return rows, r, growing


def split_sizes(text):
    """"train=3310,test=100" -> {"train": 3310, "test": 100}"""
    return {name: natural(size) for name, size in (part.split("=") for part in text.split(","))}


def parse_args():
    here = Path(__file__).resolve().parent / "data"
    parser = stage_parser(__doc__, "personas (JSONL)", "write the first N of each split")
    parser.add_argument("--model", required=True, help="who writes; the paper: GPT-4o")
    for pool in POOLS:
        parser.add_argument(f"--{pool}", default=str(here / f"{pool}.jsonl"), metavar="PATH", help=f"seeds of {pool}")
    parser.add_argument("--splits", type=split_sizes, default="train=3310,test=100", help="how many personas of each")
    parser.add_argument("--held-out", type=natural, nargs=2, default=[20, 7], metavar=("PROFILES", "PERSONALITIES"),
                        help="members that each split but the first has for itself")
    parser.add_argument("--examples", type=natural, default=5, help="members in a prompt")
    parser.add_argument("--similarity", type=number(float, -1, 1), default=0.6, help="above it, a new one is discarded")
    parser.add_argument("--embedder", default="sentence-transformers/paraphrase-MiniLM-L6-v2", metavar="NAME",
                        help="folder or hub name of an encoder; `ngrams` compares wordings, without a model")
    parser.add_argument("--until", type=natural, default=2, help="a round that adds fewer than N is a pool's last")
    parser.add_argument("--rounds", type=natural, default=100, help="and there are no more than N")
    parser.add_argument("--temperature", type=amount, default=0.8, help="of the writer")
    parser.add_argument("--top-p", type=nucleus, default=1.0, help="of the nucleus")
    parser.add_argument("--max-tokens", type=natural, default=4096, help="length of a reply of 20")
    add_model_flags(parser, batch_size=2)
    return parser.parse_args()


def main():
    args = parse_args()
    pools = {pool: [row["text"] for row in read_rows(getattr(args, pool), {"text": str}, {})] for pool in POOLS}
    if not all(pools.values()):
        fail(f"{args.profiles}, {args.personalities}: no text in one of them. A pool grows from some.")
    prompts, processes = read_prompts(*(f"aloe_{pool}" for pool in POOLS), folder=args.prompts), start_processes()
    # A pool follows from the replies: these alone must survive a kill. `limit` and `splits` say what is made of it.
    name, made_of_it = args.output.removesuffix(".jsonl"), ("splits", "held_out")
    replies = Rows(args, f"{name}.replies.jsonl", ("pool", "round"), processes, ("rounds", *made_of_it), **prompts)
    everything = Rows(args, f"{name}.pools.jsonl", ("pool", "round", "item"), processes, made_of_it, **prompts)
    personas = Rows(args, args.output, ("persona_id",), processes, **prompts)
    embed = ngrams if args.embedder == "ngrams" else encoder(args.embedder)
    rows, rounds, growing = grow(args, pools, embed, replies, prompts)

    parts = [split_pool(pools[pool], args.splits, size, args.seed) for pool, size in zip(POOLS, args.held_out)]
    made = []
    for split, size in args.splits.items():
        profiles, personalities = parts[0][split], parts[1][split]
        if len(profiles) * len(personalities) < size:
            fail(f"{len(profiles)} profiles x {len(personalities)} personalities are too few for {split}={size}. Lower "
                 "--splits, or let the pools grow: --until, --rounds, --held-out.", status=1)
        made += [{"persona_id": f"{split}{i:04d}", "split": split, "profile": profile, "personality": personality}
                 for i, (profile, personality) in enumerate(pairs_of(
                     profiles, personalities, size, seed_for(args.seed, "pairs", split))[:args.limit])]
    for output, of_it in ((everything, rows), (personas, made)):
        for row in of_it if processes.is_main_process else ():
            if tuple(row[name] for name in output.key) not in output:
                output.add(row)
        output.finish()
    lines = sum(bool(line.strip()) for row in replies.values() for line in row.get("reply", "").splitlines())
    say(processes, "", made[0]["profile"], made[0]["personality"], "", f"{args.output}: {len(made)} personas of "
        f"{len(pools['profiles'])} profiles and {len(pools['personalities'])} personalities; {rounds} rounds, of "
        f"{len(rows)} texts {sum(not row['kept'] for row in rows)} discarded as similar by {args.embedder}; "
        f"{lines - sum(row['round'] > 0 for row in rows)} lines were no texts"
        + (f"; still growing: {' '.join(growing)}" if growing else ""))


if __name__ == "__main__":
    run(main)
