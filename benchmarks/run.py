"""How fast each heavy stage is, against what people would use instead: all sides in turn, in one run, on one machine.

    python benchmarks/run.py                  # a table, and a row for each comparison in runs/benchmarks.jsonl
    python benchmarks/run.py --hidden 4096 --layers 32 --words 32000 --dtype bfloat16 --rows 160     # a 7B, on a GPU

The model is random, of Mistral's shape, and the texts are random words with the lengths of real ones: elicitation
prompts of 450 tokens, conversations of 100 to 400, gold responses of 100 to 250 (log-normal), answers of 40 on average
(geometric, at most 200: of 256 the longest is 5 times the mean). Before anything is timed the sides' results are
compared. A ratio is the other side's time / ours, the median of the rounds.

    simulate   three turns, 10 samples a pair      wrapper: prompts repeated and prefilled for each sample and turn,
                                                   batches that wait for their longest answer
    score      gold log-probabilities              wrapper: batches in file order, padded to the longest, all logits
    train      a step of 64 texts                  wrapper: the same, in random order; trl: SFTTrainer,
                                                   grouped by length
    generate   64 greedy tokens                    continuous: transformers' continuous batching
    memory     peak above the loaded model         wrapper, with 32,000 words
    limits     what is reached of the machine's own rate for matrices and for memory
    paper      hours for the paper's scale, extrapolated from this model on this machine
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages
import common  # noqa: E402
import simulate  # noqa: E402
import train  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers  # noqa: E402

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} [INST] {{ m['content'] }} [/INST]"
            "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}")
SPECIAL = ["<s>", "</s>", "[INST]", "[/INST]"]


def save_model(folder, words, hidden, layers):
    """A random Mistral in which each word is one token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(
        [*SPECIAL, *(f"w{i}" for i in range(words - len(SPECIAL)))])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                                additional_special_tokens=["[INST]", "[/INST]"])
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    transformers.MistralForCausalLM(transformers.MistralConfig(
        vocab_size=words, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192), intermediate_size=3 * hidden, sliding_window=None,
        max_position_embeddings=4096)).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def open_local(folder, args):
    processes = SimpleNamespace(device=torch.device(args.device))
    return common.LocalModel(folder, SimpleNamespace(dtype=args.dtype, batch_size=args.rows), processes)


def let_answers_end(model, mean=40):
    """Adds to the logit of the end, so that a sampled answer has about `mean` tokens: geometric lengths."""
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[SPECIAL.index("</s>")] = 0.9 * np.log(model.config.vocab_size / (2 * mean))    # at .9 and .9
    model.lm_head = head


class Texts:
    """Random words; lengths are log-normal, cut to a range."""

    def __init__(self, words, seed=0):
        self.words, self.rng = words, np.random.default_rng(seed)

    def length(self, shortest, longest):
        middle, deviation = (shortest * longest) ** 0.5, np.log(longest / shortest) / 4
        return int(np.clip(self.rng.lognormal(np.log(middle), deviation), shortest, longest))

    def __call__(self, shortest, longest):
        words = self.rng.integers(self.words - len(SPECIAL), size=self.length(shortest, longest))
        return " ".join(f"w{i}" for i in words)

    def conversation(self):
        turns = int(self.rng.integers(1, 4))
        each = self.length(100, 400) // (2 * turns)
        return [{"role": role, "content": self(each, each)} for _ in range(turns) for role in ("assistant", "user")]

    def chat(self):
        """Figure 17's form with a gold response, or another, at its end."""
        form = common.response_form("w1", self(8, 20), self.conversation())
        return [*form, {"role": "assistant", "content": self(100, 250)}]


# ---------------------------------------------------------------- the wrapper: how the released code calls the library

def wrapper_generate(local, requests, temperature, top_p, max_tokens):
    """Batches in file order, each row prefilled by itself, all rows until the longest has ended. The random numbers are
    ours, so that the texts can be compared."""
    for begin in range(0, len(requests), local.batch_size):
        batch = requests[begin:begin + local.batch_size]
        ids, mask = local._left_pad([common.prompt_ids(local.tokenizer, r.chat) for r in batch])
        draws = np.stack([np.random.default_rng(r.seed).random(max_tokens) for r in batch])
        draws = torch.from_numpy(draws).to(local.model.device, torch.float32)
        sampling = [common.nucleus_sampling(draws, temperature, top_p, ids.shape[1])] if temperature > 0 else []
        out = local.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens,
                                   logits_processor=sampling)
        for i, text in enumerate(local.tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)):
            yield begin + i, common.Reply(text.strip())


def wrapper_score(local, examples, batch_size=16):
    sums = []
    for begin in range(0, len(examples), batch_size):
        batch = examples[begin:begin + batch_size]
        ids, mask = local._left_pad([ids for ids, _ in batch])
        with torch.inference_mode():
            logits = local.model(ids, attention_mask=mask, position_ids=common.positions(mask)).logits.float()
            log_p = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        sums += [log_p[b, -n:].sum().item() for b, (_, n) in enumerate(batch)]
    return sums


def wrapper_step(model, optimizer, examples, micro, pad):
    """A step on all examples, in the order given, padded to the longest, with a mask and all logits."""
    supervised, total = train.count_supervised(examples), 0.0
    for begin in range(0, len(examples), micro):
        ids, labels = train.collate(examples[begin:begin + micro], pad, model.device)
        lengths = torch.tensor([len(row) for row, _ in examples[begin:begin + micro]], device=model.device)
        mask = (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        (loss / supervised).backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total / supervised


def our_step(model, optimizer, examples, micro, pad):
    """train.py's own step: micro-batches of similar lengths, logits where a target is, and their gradient in place."""
    lengths = [len(ids) for ids, _ in examples]
    batch = sorted(range(len(examples)), key=lambda j: lengths[j])                 # as train.epoch_batches does
    runs = train.micro_batches(batch, lengths, max(1, len(examples) // micro))
    runs = [[examples[i] for i in run] for run in runs if run]
    loss, _ = train.step(Accelerator(cpu=model.device.type == "cpu"), model, optimizer, runs,
                         train.count_supervised(examples), pad, clip=1.0)
    return loss


# ---------------------------------------------------------------- comparisons
# Each yields (stage, against, unit, [(ours, theirs)], rows): how many of the stage's rows that was.

def seconds(function):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turn(ours, theirs, rounds):
    """Seconds of both sides, in turn, in each round the other one first."""
    pairs = []
    for r in range(rounds):
        if r % 2:
            t = seconds(theirs)
            pairs.append((seconds(ours), t))
        else:
            o = seconds(ours)
            pairs.append((o, seconds(theirs)))
    return pairs


def decoding_steps(model, end, work, side_by_side):
    """(steps of one token, those in which at most a tenth of the rows have not ended yet) of some work."""
    steps = []

    def note(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids.shape[1] == 1:                                   # an ended row is given its end again and again
            steps.append(int((ids != end).sum()))
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    work()
    hook.remove()
    return len(steps), sum(alive <= side_by_side / 10 for alive in steps)


def compare_simulate(args, folder):
    local, texts = open_local(folder, args), Texts(args.words)
    let_answers_end(local.model)
    elicitation = texts(450, 450)
    pairs = [(f"w{i} {elicitation} {texts(8, 20)}", i)
             for i in range(max(1, 4 * args.rows // 10))]
    answers = {}                                                # the Roleplayer is elsewhere: its time is not ours

    def run(generate):
        rows = [{"pair": i, "opening": opening, "sample": c, "turns": 3, "conversation": [], "cut": 0,
                 "usage": simulate.Counter()} for opening, i in pairs for c in range(10)]

        def ask(alive, turn):
            return generate([common.Request([{"role": "user", "content": row["opening"]}, *row["conversation"]],
                                            common.seed_for(row["pair"], row["sample"], turn)) for row in alive])

        def answer(alive, turn):
            for i, row in enumerate(alive):
                key = row["pair"], row["sample"], turn
                answers.setdefault(key, texts(20, 80))
                yield i, common.Reply(answers[key])
        simulate.simulate(rows, ask, answer)
        return [row["conversation"] for row in rows]

    settings = 0.9, 0.9, 200
    ours = lambda: run(lambda requests: local.generate(requests, *settings, block=True))            # noqa: E731
    theirs = lambda: run(lambda requests: wrapper_generate(local, requests, *settings))             # noqa: E731
    a, b = ours(), theirs()
    same = sum(x == y for x, y in zip(a, b)) / len(a)
    assert same > 0.9 or args.dtype != "float32", f"only {same:.2f} of the conversations are the same"
    yield "simulate, 3 turns", "wrapper", "s", in_turn(ours, theirs, args.rounds), len(a)
    counts = [decoding_steps(local.model, local.pad, side, args.rows) for side in (ours, theirs)]
    for name, (our_count, their_count) in zip(("decoding steps", "steps nearly empty"), zip(*counts)):
        if our_count:
            yield f"simulate, {name}", "wrapper", "", [(our_count, their_count)], len(a)


def compare_score(args, folder, name="score"):
    local, texts = open_local(folder, args), Texts(args.words)
    examples = [common.scored_ids(local.tokenizer, texts.chat()) for _ in range(args.texts)]
    ours = lambda: list(local.score(examples, 8192))                                                # noqa: E731
    theirs = lambda: wrapper_score(local, examples)                                                 # noqa: E731
    by_index, other = dict(ours()), theirs()
    assert max(abs(by_index[i] - other[i]) for i in by_index) < (1e-2 if args.dtype == "float32" else 10)
    yield name, "wrapper", "s", in_turn(ours, theirs, args.rounds), len(examples)


def examples_of(args, tokenizer, count, seed=0):
    texts = Texts(args.words, seed)
    return [common.supervised_ids(tokenizer, texts.chat()) for _ in range(count)]


def training(args, folder):
    model = common.load_model(folder, args.dtype).to(args.device).train()
    return model, torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)


def compare_train(args, folder):
    tokenizer = common.load_tokenizer(folder)
    examples, pad = examples_of(args, tokenizer, 64), tokenizer.eos_token_id
    (ours, mine), (theirs, other) = training(args, folder), training(args, folder)
    a, b = our_step(ours, mine, examples, 4, pad), wrapper_step(theirs, other, examples, 4, pad)
    assert abs(a - b) < (1e-4 if args.dtype == "float32" else 0.05), (a, b)
    yield "train, a step of 64", "wrapper", "s", in_turn(
        lambda: our_step(ours, mine, examples, 4, pad), lambda: wrapper_step(theirs, other, examples, 4, pad),
        args.rounds), len(examples)


def compare_trl(args, folder):
    """SFTTrainer on texts that are tokenised already, grouped by length: a step of 64 in micro-batches of 4."""
    import datasets
    import trl
    tokenizer = common.load_tokenizer(folder)
    examples, pad = examples_of(args, tokenizer, 64), tokenizer.eos_token_id
    rows = datasets.Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in examples])
    tokenizer.pad_token = tokenizer.eos_token
    model, optimizer = training(args, folder)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trl.SFTTrainer(common.load_model(folder, args.dtype), train_dataset=rows, eval_dataset=rows,
                                 processing_class=tokenizer, args=trl.SFTConfig(
            scratch, per_device_train_batch_size=4, gradient_accumulation_steps=16, learning_rate=2e-5,
            weight_decay=0.0, num_train_epochs=1, max_length=None, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, train_sampling_strategy="group_by_length",
            use_cpu=args.device == "cpu", bf16=False, gradient_checkpointing=False, per_device_eval_batch_size=4))
        theirs = trainer.evaluate()["eval_loss"]
        ours = our_step(model, optimizer, examples, 4, pad)
        assert abs(ours - theirs) < 0.02, (ours, theirs)     # its evaluation is a mean of batch means
        trainer.train()                                         # as ours, once before it is timed
        yield "train, a step of 64", "trl", "s", in_turn(lambda: our_step(model, optimizer, examples, 4, pad),
                                                         trainer.train, args.rounds), len(examples)


def compare_continuous(args, folder):
    local, texts = open_local(folder, args), Texts(args.words)
    requests = [common.Request([{"role": "user", "content": texts(100, 400)}]) for _ in range(args.rows)]
    prompts = [common.prompt_ids(local.tokenizer, request.chat) for request in requests]
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=64, eos_token_id=local.stops,
                                           pad_token_id=local.pad)

    def continuous():
        out = local.model.generate_batch(prompts, generation_config=config, progress_bar=False)
        assert len(out) == len(prompts), "a request went missing"
        return [r.generated_tokens for r in sorted(out.values(), key=lambda r: int(r.request_id.split("_")[-1]))]
    ours = lambda: [reply.text for _, reply in sorted(local.generate(requests, 0.0, 1.0, 64))]      # noqa: E731
    a, b = ours(), [local.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in continuous()]
    same = sum(x == y for x, y in zip(a, b)) / len(a)
    assert same > 0.9, f"only {same:.2f} of the texts are the same"
    yield "generate, 64 tokens", "continuous batching", "s", in_turn(ours, continuous, args.rounds), len(requests)


def peak(stage, side, args):
    """MiB above the loaded model, of scoring or of a training step; in a process of its own."""
    command = [sys.executable, __file__, "--peak", stage, side, "--texts", str(args.texts), "--words", "32000",
               "--hidden", str(args.hidden), "--layers", str(args.layers), "--device", args.device,
               "--dtype", args.dtype]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}    # what is freed goes back: the peak is of what is held
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()[-1])


def resident(what):
    """MiB of this process in memory: "VmRSS" now, "VmHWM" at most so far. (getrusage would tell its parent's, too.)"""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) // 1024


def measure_peak(stage, side, args):
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, args.words, args.hidden, args.layers)
        if stage == "score":
            local, texts = open_local(folder, args), Texts(args.words)
            examples = [common.scored_ids(local.tokenizer, texts.chat()) for _ in range(args.texts)]
            work = {"ours": lambda: list(local.score(examples, 8192)),
                    "wrapper": lambda: wrapper_score(local, examples)}[side]
        else:
            tokenizer = common.load_tokenizer(folder)
            examples, (model, optimizer) = examples_of(args, tokenizer, args.texts), training(args, folder)
            step = our_step if side == "ours" else wrapper_step
            work = lambda: step(model, optimizer, examples, 4, tokenizer.eos_token_id)              # noqa: E731
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() // 2 ** 20
            work()
            return torch.cuda.max_memory_allocated() // 2 ** 20 - before
        Path("/proc/self/clear_refs").write_text("5")           # forget what loading took
        before = resident("VmRSS")
        work()
        return resident("VmHWM") - before


def compare_memory(args, folder):
    for stage in ("score", "train"):
        yield f"memory, {stage}, 32,000 words", "wrapper", "MiB", [
            (peak(stage, "ours", args), peak(stage, "wrapper", args)) for _ in range(min(2, args.rounds))], args.texts


# ---------------------------------------------------------------- limits of the machine, and the paper's scale

def limits(args, folder):
    """What is reached of the machine's own rates: in scoring and training, of large matrices, with 2 (or, with the way
    back, 6) operations a weight and token; in decoding, of memory, from which weights and caches are read."""
    dtype, size = getattr(torch, args.dtype), 2048 if args.device == "cpu" else 8192
    a = torch.randn(size, size, dtype=dtype, device=args.device)
    a @ a
    rate = 2 * size ** 3 / min(seconds(lambda: a @ a) for _ in range(10))
    local, texts = open_local(folder, args), Texts(args.words)
    head = local.model.get_output_embeddings().weight.numel()
    weights = sum(w.numel() for w in local.model.parameters()) - local.model.get_input_embeddings().weight.numel()
    body = weights - head                                       # the head is needed for some tokens only
    scored = [common.scored_ids(local.tokenizer, texts.chat()) for _ in range(args.texts)]
    time_score = min(seconds(lambda: list(local.score(scored, 8192))) for _ in range(3))
    examples = examples_of(args, local.tokenizer, 64)
    model, optimizer = training(args, folder)
    time_step = min(seconds(lambda: our_step(model, optimizer, examples, 4, local.pad)) for _ in range(3))
    print(f"\nThe machine's matrices: {rate / 1e9:,.0f} GFLOP/s; of that scoring reaches "
          f"{2 * body * sum(len(ids) for ids, _ in scored) / time_score / rate:.2f}, training "
          f"{6 * body * sum(len(ids) for ids, _ in examples) / time_step / rate:.2f}")

    block = torch.ones(2 ** 28 if args.device == "cuda" else 2 ** 26, device=args.device)
    copy = block.clone()
    bandwidth = 2 * block.numel() * 4 / min(seconds(lambda: copy.copy_(block)) for _ in range(5))   # reads and writes
    ids = torch.randint(len(SPECIAL), args.words, (args.rows, 600), device=args.device)
    ban = [[0] * args.words]
    ban[0][SPECIAL.index("</s>")] = -torch.inf                  # all rows stay alive
    stay = [lambda _, scores: scores + torch.tensor(ban, device=scores.device, dtype=scores.dtype)]

    def decode(tokens):
        return seconds(lambda: local.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                                    max_new_tokens=tokens, logits_processor=stay))
    decode(2)
    step = (min(decode(34) for _ in range(3)) - min(decode(2) for _ in range(3))) / 32
    config = local.model.config
    cache = (2 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size
             // config.num_attention_heads * args.rows * 616)                                    # numbers, on average
    limit = (weights + cache) * torch.finfo(dtype).bits / 8 / bandwidth
    print(f"The machine's memory: {bandwidth / 1e9:,.0f} GB/s; a decoding step of {args.rows} rows takes "
          f"{1e3 * step:,.1f} ms, {step / limit:.1f} times what it takes to read weights and caches")


PAPER = {"simulate, 3 turns": 125_000, "score": 125_000, "respond": 12_500, "train, a step of 64": 12_500}


def paper_scale(args, folder, cost):
    """Hours for one iteration at the paper's scale, by the measured seconds a row: its conversations have two turns on
    average, the measured ones three; and 12,500 responses of about 200 tokens."""
    local, texts = open_local(folder, args), Texts(args.words)
    let_answers_end(local.model, 200)
    requests = [common.Request(common.response_form("w1", texts(8, 20), texts.conversation()), i)
                for i in range(4 * args.rows)]
    respond = seconds(lambda: list(local.generate(requests, 0.9, 0.9, 700, block=True))) / len(requests)
    cost = {**cost, "respond": respond}
    hours = {stage: cost[stage] * PAPER[stage] / 3600 for stage in PAPER if stage in cost}
    if "simulate, 3 turns" in hours:
        hours["simulate, 3 turns"] *= 2 / 3
    print("At the paper's scale, with this model on this machine, an iteration takes " +
          ", ".join(f"{value:.2f} h ({stage.split(',')[0]})" for stage, value in hours.items()) +
          f": {sum(hours.values()):.2f} h")


COMPARISONS = {"simulate": compare_simulate, "score": compare_score, "train": compare_train, "trl": compare_trl,
               "continuous": compare_continuous, "memory": compare_memory}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*COMPARISONS, "limits", "paper"),
                        default=[*COMPARISONS, "limits", "paper"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20, help="conversations or answers side by side")
    parser.add_argument("--texts", type=int, default=64, help="texts to score")
    parser.add_argument("--words", type=int, default=1000, help="the vocabulary")
    parser.add_argument("--hidden", type=int, default=384, help="width; 4096 is a 7B's")
    parser.add_argument("--layers", type=int, default=6, help="32 is a 7B's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", default="runs/benchmarks.jsonl")
    parser.add_argument("--peak", nargs=2, metavar=("STAGE", "SIDE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    if args.peak:
        print(measure_peak(*args.peak, args))
        return
    print(f"{platform.machine()}, {args.threads} threads, {args.device}, {args.dtype}; torch {torch.__version__}, "
          f"transformers {transformers.__version__}; {args.hidden} x {args.layers}, {args.words} words")
    print(f"{'stage':<34}{'against':<22}{'ours':>10}{'theirs':>10}{'ratio':>8}{'min':>8}{'max':>8}")
    rows, cost = [], {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as large:
        save_model(folder, args.words, args.hidden, args.layers)
        save_model(large, 32000, args.hidden, args.layers)
        jobs = [(name, COMPARISONS[name], args, folder) for name in args.only if name in COMPARISONS]
        if "score" in args.only:
            many = SimpleNamespace(**{**vars(args), "words": 32000})
            jobs.insert([name for name, *_ in jobs].index("score") + 1, (
                "score", lambda a, f: compare_score(a, f, "score, 32,000 words"), many, large))
        for _, compare, settings, model in jobs:
            for stage, against, unit, pairs, count in compare(settings, model):
                ratios = [theirs / ours for ours, theirs in pairs]
                ours, theirs = (statistics.median(side) for side in zip(*pairs))
                rows.append({"stage": stage, "against": against, "ratio": round(statistics.median(ratios), 3),
                             "rounds": len(ratios), "min": round(min(ratios), 3), "max": round(max(ratios), 3)})
                cost.setdefault(stage, ours / count)
                row, digits = rows[-1], 1 if unit == "s" else 0
                print(f"{stage:<34}{against:<22}{ours:>7.{digits}f} {unit:<3}{theirs:>6.{digits}f} {unit:<3}"
                      f"{row['ratio']:>7.2f}{row['min']:>8.2f}{row['max']:>8.2f}", flush=True)
        if "limits" in args.only:
            limits(args, folder)
        if "paper" in args.only:
            paper_scale(args, folder, cost)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
