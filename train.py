"""Fine-tune Q_BASE on the selected conversations (Algorithm 1, line 6).

    Q_t  <-  argmax over Q of  sum over ij of  log p_Q(questions of s*_ij, r_ij | t_i, answers of s*_ij),
             starting from Q_BASE, never from Q_{t-1}

One example is the conversation in figure 17's form with the response at its end. The loss covers every assistant turn,
the questions and the response, each with its end-of-turn token; the user's turns are masked.
`--target none` leaves the response out (the paper's "w/o Reg."), `--target gold` puts the Oracle's in its place.

    reads   --selected  the rows of select.py      (and --gold, the rows of gold.py, for --target gold)
    writes  --output    a model folder that AutoModelForCausalLM and vLLM open

On a laptop (files from select.py's example):
    python train.py --base toy/base --selected runs/s.jsonl --tasks runs/t.jsonl --personas runs/p.jsonl \\
        --dtype float32 --lr 1.5e-3 --batch-size 8 --micro-batch-size 8 --epochs 6 --output runs/model
The paper's scale, 12,500 examples in batches of 64:
    accelerate launch --config_file configs/fsdp.yaml train.py --selected runs/paper/base/selected.jsonl \\
        --personas runs/paper/personas.jsonl --output runs/paper/main/1/model
A training that was interrupted starts from the beginning; one that is finished is not repeated.
"""
import json
import math
import os
import shutil
from bisect import bisect_left
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

from common import (add_dtype_flag, claim, digest, fail, known, lasting_imports, load_model, load_tokenizer,
                    local_model, model_name, not_negative, pair_of, positive, progress, read_conversations, read_gold,
                    read_personas, read_tasks, response_form, sample_pairs, say, stage_parser, start_processes,
                    training_examples, writing)

import numpy as np  # noqa: E402  (after common: Ctrl-C while torch loads is one line)
with lasting_imports():
    import torch
    import torch.nn.functional as F


def example_chat(name, task, conversation, response=None):
    """One training example: figure 17's form with the response at its end; without one (`--target none`) it ends with
    the last question, since nothing after that is learned from."""
    form = response_form(name, task, conversation)
    return form[:-1] if response is None else [*form, {"role": "assistant", "content": response}]


def collate(examples, pad, device=None):
    """[(ids, labels)] -> ids and labels, each (B, T), padded on the right. A causal model needs no mask for that: no
    token sees what comes after it. (Made from `ids != pad`, where pad is EOS, a mask would hide each end of a turn.)"""
    T = max(len(ids) for ids, _ in examples)
    ids = [row + [pad] * (T - len(row)) for row, _ in examples]
    labels = [row + [-100] * (T - len(row)) for _, row in examples]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


def cross_entropy(logits, targets):
    """Sum over the rows with a target of -log softmax(logits)[target], a scalar. logits: (N, V), targets: (N,)."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


class LeanCrossEntropy(torch.autograd.Function):
    """`cross_entropy` in a third of the memory: autograd would hold three tensors as large as the logits (the
    log-probabilities and two gradients). This one goes through a few rows at a time, and writes their gradient over
    them."""

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        return sum(cross_entropy(*rows) for rows in zip(logits.split(256), targets.split(256)))

    @staticmethod
    def backward(ctx, gradient):
        logits, targets = ctx.saved_tensors
        for rows, target in zip(logits.split(256), targets.split(256)):
            with torch.enable_grad():
                own = rows.detach().requires_grad_()
                loss = cross_entropy(own, target)
            rows.copy_(torch.autograd.grad(loss, own, gradient)[0])
        return logits, None


def sum_loss(model, ids, labels):
    """Sum over the supervised tokens of -log p(token | all before it), a scalar. ids, labels: (B, T).

    Logits are computed only in columns where some row has a target: at 32,000 words a full tensor is the largest one.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)          # (B, T): column t is predicted from columns 0..t
    columns = (targets != -100).any(0).nonzero()[:, 0]          # (C,)
    columns = columns if len(columns) else columns.new_zeros(1)
    logits = model(input_ids=ids, logits_to_keep=columns, use_cache=False).logits                       # (B, C, V)
    return LeanCrossEntropy.apply(logits.flatten(0, 1), targets[:, columns].flatten())  # -sum log p_Q(token | before)


def epoch_batches(lengths, batch_size, generator):
    """One epoch: random batches of indices; inside a batch examples are sorted by length, so that the micro-batches cut
    from it need little padding, while every batch remains a fair sample."""
    order = generator.permutation(len(lengths)).tolist()
    return [sorted(order[i:i + batch_size], key=lambda j: lengths[j]) for i in range(0, len(order), batch_size)]


def micro_batches(batch, lengths, count):
    """A batch of indices, sorted by length, as `count` runs, some of which may be empty. The largest has as few tokens
    as can be (rows x longest, with padding), so that none needs much more memory or time than the others."""
    def runs(budget):
        cut = [[]]
        for i in batch:                                         # each is the longest of its run so far
            if cut[-1] and (len(cut[-1]) + 1) * lengths[i] > budget:
                cut.append([])
            cut[-1].append(i)
        return cut
    longest = max((lengths[i] for i in batch), default=0)
    budgets = range(longest, longest * len(batch) + 1)          # bisection: the smallest one that `count` runs keep to
    cut = runs(budgets[bisect_left(budgets, True, key=lambda budget: len(runs(budget)) <= count)])
    return cut + [[]] * (count - len(cut))


def step(accelerator, model, optimizer, runs, supervised, pad, clip):
    """One step of the optimizer: (mean loss of a supervised token in nats, norm of the gradient before clipping).

    runs: this process's micro-batches [(ids, labels)]; supervised: the number of supervised tokens in the whole batch,
    on all processes. The loss of a step is the sum over the batch's supervised tokens, divided by their number. (A mean
    of micro-batch means would weigh the tokens of short conversations more.)
    """
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for number, run in enumerate(runs):
        with accelerator.no_sync(model) if number < len(runs) - 1 else nullcontext():
            loss = sum_loss(model, *collate(run, pad, accelerator.device))
            accelerator.backward(loss * accelerator.num_processes / supervised)     # DDP and FSDP average over them
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return (accelerator.reduce(total).item() / supervised,
            float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))    # FSDP2 returns a DTensor


def count_supervised(examples):
    """How many tokens of some examples are learned from; the first one has nothing before it."""
    return sum(label != -100 for _, labels in examples for label in labels[1:])


def parse_args():
    parser = stage_parser(__doc__, "model folder", "train on the conversations of a seeded sample of N pairs")
    parser.add_argument("--base", type=local_model, default="mistralai/Mistral-7B-Instruct-v0.2",
                        help="Q_BASE, loaded anew every time")
    parser.add_argument("--selected", required=True, help="selected conversations (JSONL)")
    parser.add_argument("--tasks", default="data/tasks.jsonl", help="tasks (JSONL)")
    parser.add_argument("--personas", default="runs/personas.jsonl", help="personas (JSONL)")
    parser.add_argument("--gold", default="runs/gold.jsonl", help="gold responses (JSONL), read for --target gold")
    parser.add_argument("--target", choices=("response", "none", "gold"), default="response",
                        help="what follows a conversation: the method, the ablation w/o regularisation, w/ gold")
    parser.add_argument("--lr", type=not_negative, default=2e-5, help="peak; cosine to 0")
    parser.add_argument("--warmup", type=not_negative, default=0.1, help="share of the steps")
    parser.add_argument("--epochs", type=positive, default=1, help="passes over the examples")
    parser.add_argument("--batch-size", type=positive, default=64, help="examples in a step, on all devices together")
    parser.add_argument("--micro-batch-size", type=positive, default=4,
                        help="examples on a device at a time, on average: fewer long ones, more short ones")
    parser.add_argument("--max-length", type=positive, default=2048,
                        help="tokens; a longer example is dropped and counted, never cut (the release cut at 1024)")
    parser.add_argument("--validation", type=not_negative, default=0.05, help="share of the examples held out")
    parser.add_argument("--clip", type=not_negative, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add_dtype_flag(parser)
    args = parser.parse_args()
    if args.validation >= 1 or args.warmup > 1 or args.clip == 0:
        parser.error("--validation must be below 1, --warmup at most 1, and --clip above 0")
    return args


def read_examples(args, tokenizer):
    """[(ids, labels)] of all usable selected rows, by pair: {(task_id, persona_id): examples}; what was left out."""
    tasks, personas = read_tasks(args.tasks), read_personas(args.personas)
    golds = read_gold(args.gold) if args.target == "gold" else {}
    rows = list(read_conversations(args.selected, gold_log_prob=(int, float), response=(str, type(None))))
    pairs = set(sample_pairs(sorted(set(map(pair_of, rows))), args.limit, args.seed))
    examples, refused, too_long = defaultdict(list), 0, 0
    for row in rows:
        pair = pair_of(row)
        task, persona = known(row, tasks, personas, args.selected)
        target = {"response": row.get("response"), "none": None, "gold": golds.get(pair)}[args.target]
        if pair not in pairs:
            continue
        if "refused" in row or (args.target == "gold" and pair in golds and target is None):
            refused += 1
        elif target is None and args.target != "none":
            fail(f"{args.selected if args.target == 'response' else args.gold}: no {args.target} for {pair}. Run "
                 "select.py without --no-response, or gold.py for that split.")
        else:
            chat = example_chat(persona["name"], task["task"], row["conversation"], target)
            for example in training_examples(tokenizer, chat):
                if len(example[0]) <= args.max_length:
                    examples[pair].append(example)
                else:
                    too_long += 1
    if not examples:
        fail(f"{args.selected}: no example to train on ({refused} refused, {too_long} above --max-length tokens). "
             "Select conversations first, or raise --max-length.")
    return examples, f"{refused} refused, {too_long} longer than {args.max_length} tokens dropped"


def main():
    args = parse_args()
    from transformers import get_cosine_schedule_with_warmup, set_seed
    processes = accelerator = start_processes(args.base)
    tokenizer = load_tokenizer(args.base)
    examples, left_out = read_examples(args, tokenizer)
    settings = {"stage": "train", "base": model_name(args.base), "target": args.target, "lr": args.lr,
                "warmup": args.warmup, "epochs": args.epochs, "batch_size": args.batch_size, "clip": args.clip,
                "max_length": args.max_length, "validation": args.validation, "dtype": args.dtype, "seed": args.seed,
                # More rows make another model, not more of the same: so the examples themselves are a setting.
                "examples": f"{sum(map(len, examples.values()))}, {digest(sorted(examples.items()))}"}
    claimed = claim(args.output, settings) if processes.is_main_process else None
    processes.wait_for_everyone()
    if Path(args.output).exists():
        return say(processes, f"{args.output}: trained already, with these settings")

    set_seed(args.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generator = np.random.default_rng(args.seed)
    pairs = generator.permutation(sorted(examples)).tolist()    # whole pairs are held out
    held_out = min(math.ceil(args.validation * len(pairs)), len(pairs) - 1)
    validation = sorted((example for pair in pairs[:held_out] for example in examples[tuple(pair)]),
                        key=lambda example: len(example[0]))
    examples = [example for pair in pairs[held_out:] for example in examples[tuple(pair)]]

    world = accelerator.num_processes
    accumulation = math.ceil(args.batch_size / (args.micro_batch_size * world))
    epochs = [epoch_batches([len(ids) for ids, _ in examples], args.batch_size, generator) for _ in range(args.epochs)]
    batches = [batch for epoch in epochs for batch in epoch]
    micro = math.ceil(args.batch_size / (accumulation * world))
    say(processes, f"{len(examples)} examples + {len(validation)} held out ({left_out}); batch {args.batch_size} = "
                   f"{micro} x accumulation {accumulation} x {world} processes; {len(batches)} steps")
    say(processes, "Supervised, in the first example:",
        json.dumps(tokenizer.decode([label for label in examples[0][1] if label != -100]), ensure_ascii=False))

    model = load_model(args.base, args.dtype)                   # Q_BASE, not Q_{t-1}
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Not prepared: Accelerate would step it once for each process. Warm-up starts at 0, so a single step has none.
    warmup = min(math.ceil(args.warmup * len(batches)), len(batches) - 1)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))

    nothing = examples[0][0][:2], [-100, -100]                  # all processes must go backward together: a loss of 0

    def dealt(pool, indices, count):
        """This process's share of `count` micro-batches: lists of examples."""
        lengths = {i: len(pool[i][0]) for i in indices}
        runs = micro_batches(indices, lengths, count)[accelerator.process_index::world]
        return [[pool[i] for i in run] or [nothing] for run in runs]

    def validation_loss():
        """Mean loss of a supervised token, in nats; the examples are dealt to the processes. NaN without examples."""
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        with torch.no_grad():
            count = world * max(1, math.ceil(len(validation) / (args.micro_batch_size * world)))
            for run in dealt(validation, range(len(validation)), count) if validation else []:
                loss = sum_loss(model, *collate(run, pad, accelerator.device))
                total += torch.tensor([loss.item(), count_supervised(run)], device=accelerator.device)
        model.train()
        total = accelerator.reduce(total)
        return (total[0] / total[1]).item() if validation else float("nan")

    before, losses, norms = validation_loss(), [], []
    bar = progress(len(batches), "steps", processes)
    model.train()
    for batch in batches:
        loss, norm = step(accelerator, model, optimizer, dealt(examples, batch, accumulation * world),
                          count_supervised(examples[i] for i in batch), pad, args.clip)
        schedule.step()
        losses.append(loss)
        norms.append(norm)
        if not math.isfinite(losses[-1]):
            fail(f"the loss is {losses[-1]} after {len(losses)} steps; nothing is saved. Lower --lr.")
        bar.update()
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    bar.close()
    after = validation_loss()

    state = accelerator.get_state_dict(model)                   # all processes: under FSDP the weights are gathered
    if processes.is_main_process:
        unfinished = f"{args.output}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        state = {name: weight.to(getattr(torch, args.dtype)) for name, weight in state.items()}
        if not all(weight.isfinite().all() for weight in state.values()):      # after the last step no loss tells
            fail("the weights are not finite after the last step; nothing is saved. Lower --lr.")
        with writing(args.output, Exception):                   # safetensors and tokenizers raise errors of their own
            try:
                accelerator.unwrap_model(model).save_pretrained(unfinished, state_dict=state)
                tokenizer.save_pretrained(unfinished)
                os.replace(unfinished, args.output)             # whole or not at all
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        claimed.close()
    processes.wait_for_everyone()
    say(processes, f"{args.output}: {len(batches)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token, held "
                   f"out {before:.3f} -> {after:.3f}, norm of the gradient {norms[0]:.3f} -> {norms[-1]:.3f}")


if __name__ == "__main__":
    main()
