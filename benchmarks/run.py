"""How fast each heavy stage is, against what people would use instead: all sides in turn, in one run, on one machine.

    python benchmarks/run.py                  # a table, and a row for each comparison in runs/benchmarks.jsonl

The model is random, of Mistral's shape, and the texts are random words with the lengths of real ones: elicitation
prompts of 450 tokens, conversations of 100 to 400, gold responses of 100 to 250 (log-normal), answers of 40 on average
(geometric: in a batch of 256 the longest is 5 times the mean). Before anything is timed the sides' results are
compared. A ratio is the other side's time / ours, the median of the rounds.

    simulate   three turns, 10 samples a pair      wrapper: prompts repeated and prefilled for each sample and turn,
                                                   rows padded until the longest has ended
    score      gold log-probabilities              wrapper: batches in file order, padded to the longest, all logits
    train      a step of 64 texts                  wrapper: the same, in random order; trl: SFTTrainer,
                                                   grouped by length
    generate   64 greedy tokens                    continuous: transformers' continuous batching
    memory     peak above the loaded model         wrapper, with 32,000 words
    matrices   floating-point operations a second  the machine's own rate for large matrices
"""
import argparse
import json
import os
import platform
import resource
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
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers  # noqa: E402

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} [INST] {{ m['content'] }} [/INST]"
            "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}")
SPECIAL = ["<s>", "</s>", "[INST]", "[/INST]"]
MEAN_ANSWER = 40


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


def let_answers_end(model):
    """Adds to the logit of the end, so that a sampled answer ends after 40 tokens on average: geometric lengths."""
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[SPECIAL.index("</s>")] = 0.9 * np.log(model.config.vocab_size / (2 * MEAN_ANSWER))    # at .9 and .9
    model.lm_head = head


class Texts:
    """Random words; lengths are log-normal, cut to a range."""

    def __init__(self, words, seed=0):
        self.words, self.rng = words, np.random.default_rng(seed)

    def __call__(self, shortest, longest):
        middle = (shortest * longest) ** 0.5
        length = int(np.clip(self.rng.lognormal(np.log(middle), np.log(longest / shortest) / 4), shortest, longest))
        return " ".join(f"w{i}" for i in self.rng.integers(self.words - len(SPECIAL), size=length))

    def conversation(self):
        turns = int(self.rng.integers(1, 4))
        return [{"role": role, "content": self(100 // (2 * turns), 400 // (2 * turns))}
                for _ in range(turns) for role in ("assistant", "user")]

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
    """A step on all examples, in the order given, padded to the longest, with all logits."""
    supervised, total = sum(label != -100 for _, labels in examples for label in labels[1:]), 0.0
    for begin in range(0, len(examples), micro):
        ids, mask, labels = (t.to(model.device) for t in train.collate(examples[begin:begin + micro], pad))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        (loss / supervised).backward()
        total += loss.item()
    finish_step(model, optimizer)
    return total / supervised


def our_step(model, optimizer, examples, micro, pad):
    """train.py's step: sorted inside the batch, logits where a target is."""
    supervised, total = sum(label != -100 for _, labels in examples for label in labels[1:]), 0.0
    batch = sorted(range(len(examples)), key=lambda j: len(examples[j][0]))
    for run in train.micro_batches(batch, len(examples) // micro):
        loss = train.sum_loss(model, *(t.to(model.device) for t in train.collate([examples[i] for i in run], pad)))
        (loss / supervised).backward()
        total += loss.item()
    finish_step(model, optimizer)
    return total / supervised


def finish_step(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------- comparisons: yield (stage, against, [(ours, theirs)])

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


def compare_simulate(args, folder):
    local, texts = open_local(folder, args), Texts(args.words)
    let_answers_end(local.model)
    elicitation = texts(450, 450)
    pairs = [(f"w{i} {elicitation} {texts(8, 20)}", i) for i in range(max(1, args.rows // 10))]
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
    ours = lambda: run(lambda requests: local.generate(requests, *settings))                        # noqa: E731
    theirs = lambda: run(lambda requests: wrapper_generate(local, requests, *settings))             # noqa: E731
    a, b = ours(), theirs()
    same = sum(x == y for x, y in zip(a, b)) / len(a)
    assert same > 0.9 or args.dtype != "float32", f"only {same:.2f} of the conversations are the same"
    yield "simulate, 3 turns", "wrapper", in_turn(ours, theirs, args.rounds)


def compare_score(args, folder, name="score"):
    local, texts = open_local(folder, args), Texts(args.words)
    examples = [common.scored_ids(local.tokenizer, texts.chat()) for _ in range(args.texts)]
    ours = lambda: list(local.score(examples, 8192))                                                # noqa: E731
    theirs = lambda: wrapper_score(local, examples)                                                 # noqa: E731
    by_index, other = dict(ours()), theirs()
    assert max(abs(by_index[i] - other[i]) for i in by_index) < (1e-2 if args.dtype == "float32" else 10)
    yield name, "wrapper", in_turn(ours, theirs, args.rounds)


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
    yield "train, a step of 64", "wrapper", in_turn(lambda: our_step(ours, mine, examples, 4, pad),
                                                    lambda: wrapper_step(theirs, other, examples, 4, pad), args.rounds)


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
        yield "train, a step of 64", "trl", in_turn(lambda: our_step(model, optimizer, examples, 4, pad),
                                                    trainer.train, args.rounds)


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
    yield "generate, 64 tokens", "continuous batching", in_turn(ours, continuous, args.rounds)


def peak(stage, side, args):
    """MiB above the loaded model, of scoring or of a training step; in a process of its own."""
    command = [sys.executable, __file__, "--peak", stage, side, "--texts", "16", "--words", "32000", "--hidden",
               str(args.hidden), "--layers", str(args.layers), "--device", args.device, "--dtype", args.dtype]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2 ** 20


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
        before = resident()
        work()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - before


def compare_memory(args, folder):
    for stage in ("score", "train"):
        yield f"memory, {stage}, 32,000 words", "wrapper", [
            (peak(stage, "ours", args), peak(stage, "wrapper", args)) for _ in range(args.rounds)]


def shares_of_the_matrix_rate(args, folder):
    """What scoring and training reach of the rate of the machine's own large matrices: 2 (or, with the way back, 6)
    operations a weight and token."""
    size = 2048
    a = torch.randn(size, size, dtype=getattr(torch, args.dtype), device=args.device)
    a @ a
    rate = 2 * size ** 3 / min(seconds(lambda: a @ a) for _ in range(10))
    local, texts = open_local(folder, args), Texts(args.words)
    weights = sum(w.numel() for w in local.model.parameters()) - local.model.get_input_embeddings().weight.numel()
    scored = [common.scored_ids(local.tokenizer, texts.chat()) for _ in range(args.texts)]
    time_score = min(seconds(lambda: list(local.score(scored, 8192))) for _ in range(3))
    examples = examples_of(args, local.tokenizer, 64)
    model, optimizer = training(args, folder)
    time_step = min(seconds(lambda: our_step(model, optimizer, examples, 4, local.pad)) for _ in range(3))
    print(f"\nThe machine's matrices: {rate / 1e9:,.0f} GFLOP/s; of that scoring reaches "
          f"{2 * weights * sum(len(ids) for ids, _ in scored) / time_score / rate:.2f}, training "
          f"{6 * weights * sum(len(ids) for ids, _ in examples) / time_step / rate:.2f}")


COMPARISONS = {"simulate": compare_simulate, "score": compare_score, "train": compare_train, "trl": compare_trl,
               "continuous": compare_continuous, "memory": compare_memory}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*COMPARISONS, "matrices"), default=[*COMPARISONS, "matrices"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=40, help="conversations or answers side by side")
    parser.add_argument("--texts", type=int, default=64, help="texts to score")
    parser.add_argument("--words", type=int, default=1000, help="the vocabulary")
    parser.add_argument("--hidden", type=int, default=384, help="width; 4096 is a 7B's")
    parser.add_argument("--layers", type=int, default=8, help="32 is a 7B's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", default="runs/benchmarks.jsonl")
    parser.add_argument("--peak", nargs=2, metavar=("STAGE", "SIDE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(measure_peak(*args.peak, args))
        return
    print(f"{platform.machine()}, {args.threads} threads, {args.device}, {args.dtype}; torch {torch.__version__}, "
          f"transformers {transformers.__version__}; {args.hidden} x {args.layers}, {args.words} words")
    print(f"{'stage':<34}{'against':<22}{'ours':>10}{'theirs':>10}{'ratio':>8}{'min':>8}{'max':>8}")
    rows = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as large:
        save_model(folder, args.words, args.hidden, args.layers)
        save_model(large, 32000, args.hidden, args.layers)
        jobs = [(name, COMPARISONS[name], args, folder) for name in args.only if name in COMPARISONS]
        if "score" in args.only:
            many = SimpleNamespace(**{**vars(args), "words": 32000})
            jobs.insert([name for name, *_ in jobs].index("score") + 1, (
                "score", lambda a, f: compare_score(a, f, "score, 32,000 words"), many, large))
        for _, compare, settings, model in jobs:
            for stage, against, pairs in compare(settings, model):
                ratios = [theirs / ours for ours, theirs in pairs]
                unit = "MiB" if stage.startswith("memory") else "s"
                ours, theirs = (statistics.median(side) for side in zip(*pairs))
                rows.append({"stage": stage, "against": against, "ratio": round(statistics.median(ratios), 3),
                             "rounds": len(ratios), "min": round(min(ratios), 3), "max": round(max(ratios), 3)})
                row = rows[-1]
                print(f"{stage:<34}{against:<22}{ours:>7.1f} {unit:<3}{theirs:>6.1f} {unit:<3}{row['ratio']:>7.2f}"
                      f"{row['min']:>8.2f}{row['max']:>8.2f}", flush=True)
        if "matrices" in args.only:
            shares_of_the_matrix_rate(args, folder)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
