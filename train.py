"""Fine-tune Q_BASE on the selected conversations (Algorithm 1, line 6).

    Q_t  <-  argmax over Q of  sum over ij of  log p_Q(questions of s*_ij, r_ij | t_i, answers of s*_ij),
             starting from Q_BASE, never from Q_{t-1}

One example is the conversation in figure 17's form with the response at its end. The loss covers every assistant turn,
the questions and the response, each with its end-of-turn token; the user's turns are masked.

    reads   --selected  the rows of select.py      (and --gold, the rows of gold.py, for --target gold)
    writes  --output    a model folder that transformers 5 opens, and a vLLM built on it (4.57 ignores its rope
                        settings), with the losses in its log.jsonl:
                        {"step": 1, "loss": 1.934, "rate": 2e-05, "norm": 0.612}

On a laptop (files from select.py's example):
    python train.py --base toy/base --selected runs/s.jsonl --tasks runs/t.jsonl --personas runs/p.jsonl \\
        --dtype float32 --lr 1.5e-3 --batch-size 8 --micro-batch-size 8 --epochs 6 --output runs/model
The paper's scale, 12,500 examples in batches of 64: PRINT=1 bash run.sh paper prints the command.
A training that was interrupted starts from the beginning; one that is finished is not repeated.
"""
import json
import math
import os
import shutil
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from common import (FORM, add_data_flags, amount, fail, fraction, last_turn, load_model,
                    load_tokenizer, natural, pair_of, read_conversations, read_gold, read_personas, read_prompts,
                    read_tasks, response_form, run, sample_pairs, say, settings_of, stage_parser,
                    start_processes, take_output, tqdm)


def example_chat(name, task, conversation, response=None, form=FORM):
    """One training example: figure 17's form with the response at its end; without one (`--target none`) it ends with
    the last question, since nothing after that is learned from."""
    chat = response_form(name, task, conversation, form=form)
    return chat[:-1] if response is None else [*chat, {"role": "assistant", "content": response}]


def training_examples(tokenizer, chat, cut=()):
    """[(ids, labels)] of a chat: labels are the ids on every assistant turn with its end-of-turn token, and -100
    elsewhere. One example; where a template rewrites what came before, more: each turn is learned as it was said.
    cut: numbers of the turns (of `chat[1:]`) that ran into --max-tokens; they did not end there: no end is learned."""
    examples, said = [], 0                                      # said: tokens until the end of the turn before
    for i in [i for i, message in enumerate(chat) if message["role"] == "assistant"]:
        ids, first, end, close = last_turn(tokenizer, chat[:i + 1])
        stop = end if i - 1 in cut else close
        labels = [-100] * first + ids[first:stop] + [-100] * (len(ids) - stop)
        if examples and ids[:said] == examples[-1][0][:said]:   # the turns before are shown as they were said
            labels[:said] = examples.pop()[1][:said]
        examples.append((ids, labels))
        said = close
    return examples


def collate(examples, device=None):
    """[(ids, labels)] -> ids and labels, each (B, T), padded on the right. A causal model needs no mask for that: no
    token sees what comes after it. (Made from `ids != pad`, where pad is EOS, a mask would hide each end of a turn.)"""
    return [pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)
            for rows, value in zip(zip(*examples), (0, -100))]


def sum_loss(model, ids, labels, reduction="sum"):
    """Sum over the supervised tokens of -log p(token | all before it), a scalar. ids, labels: (B, T).

    Logits are computed only in columns where some row has a target: at 32,000 words a full tensor is the largest one.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)          # (B, T): column t is predicted from columns 0..t
    columns = (targets != -100).any(0).nonzero()[:, 0]          # (C,)
    columns = columns if len(columns) else columns.new_zeros(1)
    logits = model(input_ids=ids, logits_to_keep=columns, use_cache=False).logits                       # (B, C, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets[:, columns].flatten(),     # -sum log p_Q(token | past)
                           ignore_index=-100, reduction=reduction)


def mean_loss(accelerator, model, batch, micro_batch_size, loss_of=None, learn=False):
    """Mean loss of a supervised token of a batch, in nats; to `learn`, with its gradient. batch: [(ids, labels)], the
    same on all processes, which share it out. With loss_of(model, examples, device), a sum: the mean of an example.

    It is the sum over the batch's supervised tokens, divided by their number: a mean of micro-batch means would weigh
    the tokens of short conversations more. Sorted by length, micro-batches need little padding.
    """
    world, device = accelerator.num_processes, accelerator.device
    supervised = len(batch) if loss_of else sum(label != -100 for _, labels in batch for label in labels[1:])
    share = sorted(batch, key=lambda example: len(example[0]))[accelerator.process_index::world]
    model.train(learn)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i in range(0, math.ceil(len(batch) / world), micro_batch_size):     # all processes go backward together
        examples = share[i:i + micro_batch_size] or batch[:1]
        with torch.set_grad_enabled(learn):
            loss = loss_of(model, examples, device) if loss_of else sum_loss(model, *collate(examples, device))
            loss = loss * (i < len(share))                      # 0 where a process has none left
            if learn:
                accelerator.backward(loss * world / supervised)     # DDP and FSDP average over the processes
        total += loss.detach()
    return accelerator.reduce(total).item() / max(supervised, 1)


def read_examples(args, tokenizer):
    """[(ids, labels)] of all usable selected rows, by pair: {(task_id, persona_id): examples}; what was left out."""
    tasks, personas = read_tasks(args.tasks, args.tasks_per_split), read_personas(args.personas)
    form = read_prompts(*FORM, folder=args.prompts)
    rows = read_conversations(args.selected, tasks, personas, gold_log_prob=float | int, response=str | None)
    pairs = set(sample_pairs(map(pair_of, rows), args.limit, args.seed))
    splits = {tasks[task_id]["split"] for task_id, _ in pairs}
    if not splits <= {*args.split}:
        fail(f"{args.selected}: has rows of another split. To train on it: --split {' '.join(sorted(splits))}")
    golds = read_gold(args.gold, pairs) if args.target == "gold" else {}
    examples, refused, too_long = defaultdict(list), 0, 0
    for row in (row for row in rows if pair_of(row) in pairs):
        pair = pair_of(row)
        target = {"response": row.get("response"), "none": None, "gold": golds.get(pair)}[args.target]
        if row.get("refused") or target is None and args.target != "none":
            refused += 1
        else:
            chat = example_chat(personas[pair[1]]["name"], tasks[pair[0]]["task"], row["conversation"], target, form)
            response_cut = [len(row["conversation"])] if row.get("cut") and args.target == "response" else []
            for example in training_examples(tokenizer, chat, [*response_cut, *(row.get("cut_turns") or ())]):
                if len(example[0]) <= args.max_length:
                    examples[pair].append(example)
                else:
                    too_long += 1
    left_out = f"{refused} refused or without a target, {too_long} longer than {args.max_length} tokens dropped"
    return (examples, left_out) if examples else fail(
        f"{args.selected}: no example to train on ({left_out}). Run select.py, or raise --max-length.")


class StochasticAdamW(torch.optim.AdamW):
    """AdamW for bfloat16 weights that rounds up or down at random, so that the mean is exact: a step of a tenth of a
    weight's last bit, which rounding to nearest loses, moves one weight in ten. The moments are rounded so, too: a step
    changes the second by .1 %, less than half of its last bit. Processes with the same seed round alike."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in [p for p in self.param_groups[0]["params"] if p.grad is not None]:         # float32 for one at a time
            weight, grad = (t.to_local() if isinstance(t, DTensor) else t for t in (p, p.grad))         # FSDP: a shard
            exact = torch.nn.Parameter(weight.float())
            exact.grad = grad.float()
            settings = {name: self.param_groups[0][name] for name in ("lr", "betas", "eps", "weight_decay")}
            adam = torch.optim.AdamW([exact], **settings, fused=True)
            adam.state[exact] = {name: value.float() for name, value in self.state[p].items()}
            adam.step()
            self.state[p] = {name: value if name == "step" else rounded(value, self.generator)
                             for name, value in adam.state[exact].items()}
            weight.copy_(rounded(exact, self.generator))


def rounded(x, generator):
    """float32 -> bfloat16, its upper 16 bits; adding random ones to the lower carries in proportion to them."""
    noise = torch.randint(2 ** 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return (x.view(torch.int32) + noise & -2 ** 16).view(torch.float32).bfloat16()


def fit(accelerator, model, args, training, validation, batches, folder, shape="cosine", loss_of=None):
    """One AdamW step on training[i], i in batch, for each of the batches; folder/log.jsonl tells of them. Returns the
    model, as Accelerate has wrapped it, and the outcome in words."""
    from transformers import get_scheduler
    stochastic = args.rounding == "stochastic" and model.dtype == torch.bfloat16           # float32 loses nothing
    kind = StochasticAdamW if stochastic else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)     # fused: no copy of all weights
    optimizer.generator = torch.Generator(accelerator.device).manual_seed(args.seed)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Not prepared: Accelerate would step it once for each process. Warm-up starts at 0, so a single step has none.
    warmup = min(math.ceil(args.warmup * len(batches)), len(batches) - 1)
    schedule = get_scheduler(shape, optimizer, warmup, len(batches))

    before, losses = mean_loss(accelerator, model, validation, args.micro_batch_size, loss_of), []
    log = open(f"{folder}/log.jsonl" if accelerator.is_main_process else os.devnull, "a")
    for batch in (bar := tqdm(batches, "steps", disable=not accelerator.is_main_process)):
        examples = [training[i] for i in batch]
        losses.append(mean_loss(accelerator, model, examples, args.micro_batch_size, loss_of, learn=True))
        norm = accelerator.clip_grad_norm_(model.parameters(), args.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)          # under FSDP2 a shard
        if not math.isfinite(losses[-1] + norm):
            fail(f"step {len(losses)}: loss {losses[-1]}, gradient norm {norm}. Not saved: lower --lr.", status=1)
        row = {"step": len(losses), "loss": losses[-1], "rate": schedule.get_last_lr()[0], "norm": norm}
        print(json.dumps({**row, **getattr(loss_of, "figures", dict)()}), file=log, flush=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    after = mean_loss(accelerator, model, validation, args.micro_batch_size, loss_of)
    for nats in (before, after) if validation else ():
        print(json.dumps({"held_out": nats}), file=log, flush=True)
    return model, f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a {'pair' if loss_of else 'token'}" + (
        f", held out {before:.3f} -> {after:.3f}" if validation else "")


def parse_args():
    parser = stage_parser(__doc__, "model folder", "train on the conversations of a seeded sample of N pairs")
    parser.add_argument("--base", default="mistralai/Mistral-7B-Instruct-v0.2", help="Q_BASE, loaded anew every time")
    parser.add_argument("--selected", required=True, help="selected conversations (JSONL)")
    add_data_flags(parser)
    parser.add_argument("--split", nargs="+", default=["A", "B"], help="of the tasks; rows of another are refused")
    parser.add_argument("--gold", default="runs/gold.jsonl", help="gold responses (JSONL), read for --target gold")
    parser.add_argument("--target", choices=("response", "none", "gold"), default="response",
                        help="what follows a conversation: the method, the ablation w/o regularisation, w/ gold")
    parser.add_argument("--lr", type=amount, default=2e-5, help="peak; cosine to 0")
    parser.add_argument("--warmup", type=fraction, default=0.1, help="share of the steps")
    parser.add_argument("--epochs", type=natural, default=1, help="passes over the examples")
    parser.add_argument("--batch-size", type=natural, default=64, help="examples in a step, on all devices")
    parser.add_argument("--micro-batch-size", type=natural, default=4, help="examples on a device at a time")
    parser.add_argument("--max-length", type=natural, default=2048,
                        help="tokens; a longer example is dropped and counted, never cut (the release cut at 1024)")
    parser.add_argument("--validation", type=fraction, default=0.05, help="share of the pairs held out")
    parser.add_argument("--clip", type=amount, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the weights; of those that are saved, if the launcher's mixed_precision is bf16")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest",
                        help="of bfloat16 weights: docs/precision.md tells what nearest, as published, loses")
    return parser.parse_args()


def train(args, read_examples, schedule="cosine", loss_of=None, **more):
    """The stage, for aloe/train.py, too, which has other examples. more: settings beside the flags."""
    accelerator, tokenizer = start_processes(), load_tokenizer(args.base, args)
    if accelerator.gradient_accumulation_steps > 1 or accelerator.distributed_type in ("DEEPSPEED", "MEGATRON_LM"):
        fail("Gradient accumulation, DeepSpeed and Megatron-LM would change batches or steps. Launch without them.")
    dtype = args.dtype if accelerator.mixed_precision == "no" else "float32"        # where matrices alone are bfloat16
    examples, left_out = read_examples(args, tokenizer)
    # Here these are settings: more rows make another model, not more of the same.
    settings = settings_of(args, limit=args.limit, batch_size=args.batch_size,
                           mixed_precision=accelerator.mixed_precision, **more)
    lock = accelerator.is_main_process and take_output(args.output, settings)              # noqa: F841 (kept open)
    accelerator.wait_for_everyone()
    if os.path.exists(args.output):
        return say(accelerator, f"{args.output}: trained already, with these settings")
    unfinished = f"{args.output}.unfinished"
    if accelerator.is_main_process:
        if os.path.isdir(unfinished):       # what a killed training left there goes; what is not ours ends the program
            shutil.rmtree(unfinished) if os.path.exists(f"{unfinished}/log.jsonl") else os.rmdir(unfinished)
        os.mkdir(unfinished)

    torch.manual_seed(args.seed)
    generator = np.random.default_rng(args.seed)
    pairs = generator.permutation(sorted(examples)).tolist()    # whole pairs are held out
    held_out = min(math.ceil(args.validation * len(pairs)), len(pairs) - 1)
    validation = [example for pair in pairs[:held_out] for example in examples[tuple(pair)]]
    training = [example for pair in pairs[held_out:] for example in examples[tuple(pair)]]
    orders = [generator.permutation(len(training)) for _ in range(args.epochs)]     # every batch is a fair sample
    batches = [order[i:i + args.batch_size] for order in orders for i in range(0, len(order), args.batch_size)]
    data = (f"{len(training)} examples + {len(validation)} held out ({left_out}); {len(batches)} steps of "
            f"{args.batch_size}, on {accelerator.num_processes} processes {args.micro_batch_size} at a time")
    say(accelerator, data, "Supervised, in the first example: " + json.dumps(tokenizer.decode(
        [label for label in training[0][1] if label != -100]), ensure_ascii=False))

    model = load_model(args.base, dtype)                        # Q_BASE, not Q_{t-1}
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if dtype == "bfloat16" and accelerator.is_main_process:
        moved = sum((w + args.lr != w).sum().item() for w in model.parameters()) / model.num_parameters()
        say(accelerator, f"bfloat16 weights: rounded to nearest, a step of {args.lr:g} changes {moved:.0%} of them, "
                         "and is lost on others. --rounding stochastic keeps it on average (docs/precision.md).")
    try:
        model, outcome = fit(accelerator, model, args, training, validation, batches, unfinished, schedule, loss_of)
    except torch.OutOfMemoryError as error:
        raise OSError(f"lower --micro-batch-size, add --gradient-checkpointing, or use more GPUs: {error}")
    state = accelerator.get_state_dict(model.to(getattr(torch, args.dtype)))        # all processes: FSDP gathers here
    if accelerator.is_main_process:
        try:
            model = accelerator.unwrap_model(model, keep_torch_compile=False)
            state = {name.replace("_orig_mod.", ""): weight for name, weight in state.items()}      # torch.compile's
            model.save_pretrained(unfinished, state_dict=state)
            tokenizer.save_pretrained(unfinished)
            load_model(unfinished, args.dtype, device_map="meta")       # it opens, and no weight is missing
            os.replace(unfinished, args.output)                 # whole or not at all
        except Exception as error:                              # safetensors has errors of its own for a full disk
            raise OSError(f"{args.output}: {error}")
    accelerator.wait_for_everyone()
    say(accelerator, f"{args.output}: {len(batches)} steps, {outcome}")


def main():
    args = parse_args()
    train(args, read_examples, **read_prompts(*FORM, folder=args.prompts))


if __name__ == "__main__":
    run(main)
