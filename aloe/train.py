"""Fine-tune on preference pairs, first by SFT, then by DPO (ALOE, section 2.2).

    --stage sft    L  =  - sum_i  log p(p_i | m_i, history)                                               (eq. 1)
    --stage dpo    L  =  - sum_i  log sigma(beta log p(p_i | ...) / p_ref(p_i | ...)
                                          - beta log p(r_i | ...) / p_ref(r_i | ...))                     (eq. 2)

The history is m_1, s_1, ..., m_{i-1}, s_{i-1}: the path that was walked, a rejected reply where the coin chose it. Each
round is an example of its own, and a loss falls on its reply alone, with its end-of-turn token. `--target rejected` is
the paper's ablation. p_ref is --base: for `--stage dpo` the model that `--stage sft` has made. Each process keeps a
frozen copy of it, which sees the very batches that the policy sees. (Left out: the paper mixes CodeActInstruct into its
SFT data.)

    reads   --conversations     the rows of aloe/simulate.py
    writes  --output            a model folder that AutoModelForCausalLM and vLLM open; its log.jsonl as train.py's;
                                of dpo with the accuracy and the mean margin of the rewards, too

Its commands, on a laptop and at the paper's scale (30,000 examples): PRINT=1 bash aloe/run.sh [paper]
"""
import sys
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first: there, too, are a simulate.py and a train.py
from aloe.simulate import walked  # noqa: E402
from common import (amount, fail, fraction, last_turn, load_model, natural, read_rows,  # noqa: E402
                    read_settings, run, sample_pairs, say, seed_for, stage_parser, start_processes)
from train import collate, sum_loss, train  # noqa: E402


def reply_example(tokenizer, history, reply, cut=False):
    """(ids, labels) of a chat that ends with a reply: labels are the ids of the reply with its end-of-turn token, which
    one that was cut does not have, and -100 before it."""
    ids, first, end, close = last_turn(tokenizer, [*history, {"role": "assistant", "content": reply}])
    ids = ids[:end if cut else close]
    return ids, [-100] * first + ids[first:]


def round_examples(tokenizer, rounds, coin=None):
    """[{"preferred": (ids, labels), "rejected": (ids, labels)}], a dict a round; both follow the walked history.
    coin: round -> whether the two change places."""
    made = []
    for i, r in enumerate(rounds):
        history = walked([*rounds[:i], {"user": r["user"]}])
        pair = {name: reply_example(tokenizer, history, r[name], name in r.get("cut", ()))
                for name in ("preferred", "rejected")}
        made.append(dict(zip(pair, reversed(pair.values()))) if coin and coin(i) else pair)
    return made


def dpo_loss(log_p, log_p_ref, beta):
    """Losses (B,) and rewards (2, B) from the log-probabilities (2, B) of B preferred and B rejected replies."""
    rewards = beta * (log_p - log_p_ref)                        # r(y) = beta log p(y | x) / p_ref(y | x)
    preferred, rejected = rewards
    return -F.logsigmoid(preferred - rejected), rewards         # eq. 2: -log sigma(r(p_i) - r(r_i))


@lru_cache
def reference(path, dtype, device):
    """p_ref, frozen: the model folder as it was when training began, whole on this process's device."""
    return load_model(path, dtype).to(device).requires_grad_(False)


class PairLoss:
    """Sum of the DPO losses of [(ids, labels, ids, labels)]: of a preferred and a rejected reply.

    The reference scores the same batch as the policy. In bfloat16 a batch of another shape gives other
    log-probabilities: a model's rewards over itself would not be 0.
    """
    def __init__(self, args):
        self.args, self.margins = args, []

    def __call__(self, model, examples, device):
        ids, labels = collate([*(example[:2] for example in examples), *(example[2:] for example in examples)], device)

        def log_p(of):                                          # (2, B): of the preferred, of the rejected
            return -sum_loss(of, ids, labels, "none").view(2, len(examples), -1).sum(2)

        with torch.no_grad():
            log_p_ref = log_p(reference(self.args.base, self.args.dtype, device))
        losses, (preferred, rejected) = dpo_loss(log_p(model), log_p_ref, self.args.beta)
        if torch.is_grad_enabled():
            self.margins += (preferred - rejected).tolist()
        return losses.sum()

    def figures(self):
        """For the log, of a step's pairs on this process: the share whose preferred reply has more reward, and by how
        much on average."""
        margins, self.margins = self.margins, []
        return {"accuracy": sum(m > 0 for m in margins) / len(margins), "margin": sum(margins) / len(margins)}


def read_examples(args, tokenizer):
    """{(persona_id,): examples}, as train.py's loop wants them, and what was left out."""
    rows = {(row["persona_id"],): row for row in read_rows(args.conversations, {"persona_id": str}, {"rounds": list})}
    whole = {key: row for key, row in rows.items() if not row.get("refused")}
    for (persona_id,), row in whole.items():
        if not all(isinstance(r, dict) and r.get("chosen") in ("preferred", "rejected")
                   and isinstance(r.get("cut", []), list)
                   and all(isinstance(text, str) and text.strip() for text in map(r.get, (
                       "user", "preferred", "rejected"))) for r in row["rounds"]):
            fail(f"{args.conversations}: a round of {persona_id} lacks a text, or its `cut` is no list. These are rows "
                 "of aloe/simulate.py.")
    pairs, too_long = defaultdict(list), 0
    for key in sample_pairs(whole, args.limit, args.seed):
        coin = (lambda i: seed_for(args.seed, "pairs", *key, i) % 2) if args.pairs == "coin" else None  # noqa: B023
        for pair in round_examples(tokenizer, whole[key]["rounds"], coin):
            if max(len(ids) for ids, _ in pair.values()) <= args.max_length:
                pairs[key].append(pair)
            else:
                too_long += 1
    left_out = (f"{len(rows) - len(whole)} conversations refused, {too_long} rounds longer than {args.max_length} "
                "tokens dropped")
    if not pairs:
        fail(f"{args.conversations}: no example to train on ({left_out}). Run aloe/simulate.py, or raise --max-length.")
    if args.stage == "sft":
        return {key: [pair[args.target] for pair in of] for key, of in pairs.items()}, left_out
    return {key: [(*pair["preferred"], *pair["rejected"]) for pair in of] for key, of in pairs.items()}, left_out


def parse_args():
    parser = stage_parser(__doc__, "model folder", "train on the conversations of a seeded sample of N personas", None)
    parser.add_argument("--stage", choices=("sft", "dpo"), required=True, help="which loss")
    parser.add_argument("--base", required=True, help="the model to start from; for dpo the one that sft has made")
    parser.add_argument("--conversations", required=True, help="conversations (JSONL)")
    parser.add_argument("--target", choices=("preferred", "rejected"), default="preferred", help="what sft learns")
    parser.add_argument("--pairs", choices=("hint", "coin"), default="hint",
                        help="coin: a control, in which chance says which of the two was preferred")
    parser.add_argument("--beta", type=amount, default=0.9, help="of dpo: how dear it is to leave the reference")
    parser.add_argument("--lr", type=amount, default=1e-5, help="peak; linear to 0")
    parser.add_argument("--warmup", type=fraction, default=0.0, help="share of the steps (the paper gives none)")
    parser.add_argument("--epochs", type=natural, help="passes over the examples; default: 3 for sft, 1 for dpo")
    parser.add_argument("--batch-size", type=natural, default=48, help="rounds in a step, on all devices")
    parser.add_argument("--micro-batch-size", type=natural, default=4, help="rounds on a device at a time")
    parser.add_argument("--max-length", type=natural, default=4096,
                        help="tokens; a longer example is dropped and counted, never cut")
    parser.add_argument("--validation", type=fraction, default=0.05, help="share of the personas held out")
    parser.add_argument("--clip", type=amount, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest",
                        help="of bfloat16 weights: docs/precision.md tells what nearest loses")
    args = parser.parse_args()
    if args.stage == "dpo" and args.target != "preferred":
        parser.error("--target belongs to --stage sft: dpo learns from both replies")
    args.epochs = args.epochs or {"sft": 3, "dpo": 1}[args.stage]
    return args


def main():
    args = parse_args()
    if args.stage == "dpo":
        processes = start_processes()
        if processes.mixed_precision != "no":
            fail("--stage dpo: its reference is computed in --dtype. Launch with mixed_precision 'no' (fsdp.yaml).")
        if read_settings(args.base).get("stage") != "sft":
            say(processes, f"warning: --base {args.base} is not made by --stage sft, where the paper's DPO starts.")
    train(args, read_examples, "linear", PairLoss(args) if args.stage == "dpo" else None)


if __name__ == "__main__":
    run(main)
