"""How fast each heavy stage is against what people would use instead: the table of docs/speed.md.

    python benchmarks/run.py                                    # a row for each line below
    python benchmarks/run.py --only score --words 32000         # with as many words as Mistral has
    python benchmarks/run.py --only simulate score --hidden 4096 --layers 32 --words 32000 --dtype bfloat16 --rows 160
                                                                # a 7B, on a GPU
    simulate      3 turns, 10 samples a pair   wrapper: `generate` on batches in the order of the data, padded on the
                                               left; a batch goes on until its longest answer has ended
    score         gold log-probabilities       wrapper: batches in the order of the data, logits of all positions
    train         a step of 64 texts           wrapper: micro-batches in the order of the data, all logits
    trl           the same step                TRL's SFTTrainer, grouped by length (with .3 s for its own start)

The model is random, of Mistral's shape. Texts are random words with the lengths of real ones: elicitation prompts of
450 tokens, conversations of 100 to 400, gold responses of 100 to 250, answers of 40 on average (geometric, at most
200). Both sides run in turn. Before anything is timed their results are compared: `difference` is the share of
conversations that are not the same to the letter, or the largest of a token's log-probability, or that of the losses.
A ratio is their time / ours: the median of the rounds, the least, the most. Time is processor time, which is disturbed
less by other programs on the machine; with a GPU it is the clock's.
"""
import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                   # the stages
import common  # noqa: E402
import simulate  # noqa: E402
import train  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]"]
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} [INST] {{ m['content'] }} [/INST]"
            "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}")


# ---------------------------------------------------------------- a model, and texts

def save_model(folder, args):
    """A random Mistral in which each word is one token."""
    words = [*SPECIAL, *(f"w{i}" for i in range(args.words - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE,
        additional_special_tokens=SPECIAL[3:], model_input_names=["input_ids", "attention_mask"],
        padding_side="left").save_pretrained(folder)
    torch.manual_seed(0)
    transformers.MistralForCausalLM(transformers.MistralConfig(
        vocab_size=args.words, hidden_size=args.hidden, num_hidden_layers=args.layers, sliding_window=None,
        num_attention_heads=args.hidden // 64, num_key_value_heads=max(1, args.hidden // 192),
        intermediate_size=3 * args.hidden, max_position_embeddings=4096)).save_pretrained(folder)


def open_local(folder, args, batch_size):
    return common.LocalModel(folder, SimpleNamespace(dtype=args.dtype, batch_size=batch_size), torch.device(DEVICE))


class Texts:
    """Random words; lengths are log-normal, cut to a range."""

    def __init__(self, words):
        self.words, self.rng = words - len(SPECIAL), np.random.default_rng(0)

    def length(self, shortest, longest):
        drawn = self.rng.lognormal(math.log(shortest * longest) / 2, math.log(longest / shortest) / 4)
        return int(min(max(drawn, shortest), longest))

    def __call__(self, shortest, longest):
        return " ".join(f"w{i}" for i in self.rng.integers(self.words, size=self.length(shortest, longest)))

    def chat(self):
        """Figure 17's form with a gold response, or another, at its end."""
        turns = int(self.rng.integers(1, 4))
        each = self.length(100, 400) // (2 * turns)
        conversation = [{"role": role, "content": self(each, each)} for role in ("assistant", "user") * turns]
        form = common.response_form("w1", self(8, 20), conversation)
        return [*form, {"role": "assistant", "content": self(100, 250)}]


def chunks(rows, size):
    return [rows[begin:begin + size] for begin in range(0, len(rows), size)]


# ---------------------------------------------------------------- the comparisons: (ours, theirs, difference, limit)
# Two functions that do the same work, one of their two results, and the most of it that rounding explains.

def compare_simulate(folder, args):
    local, texts = open_local(folder, args, args.rows), Texts(args.words)
    with torch.no_grad():                                       # some 40 tokens an answer, at the .9 and .9 below
        local.model.lm_head.bias = torch.nn.Parameter(torch.zeros_like(local.model.lm_head.weight[:, 0]), False)
        local.model.lm_head.bias[local.tokenizer.eos_token_id] = 0.9 * math.log(args.words / 80)
    elicitation = texts(450, 450)
    openings = [f"w{i} {elicitation} {texts(8, 20)}" for i in range(2 * args.rows // 10)]
    users = [[texts(20, 80) for _ in range(30)] for _ in openings]                  # their time is not ours

    def wrapper(requests, temperature, top_p, max_tokens):
        for batch in chunks(list(requests), args.rows):
            inputs = local.tokenizer.apply_chat_template([requests[key].chat for key in batch], return_tensors="pt",
                                                         padding=True, return_dict=True).to(DEVICE)
            draws = np.stack([np.random.default_rng(requests[key].seed).random(max_tokens) for key in batch])
            draws, end = torch.from_numpy(draws).to(DEVICE), inputs.input_ids.shape[1]

            def choose(said, logits):                           # by our random numbers, or no texts could be compared
                token = common.next_tokens(logits, draws[:, said.shape[1] - end], temperature, top_p)
                return torch.full_like(logits, -torch.inf).scatter(1, token[:, None], 0.0)
            said = local.model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens, logits_processor=[choose],
                                        pad_token_id=local.tokenizer.pad_token_id)[:, end:]
            for key, text in zip(batch, local.tokenizer.batch_decode(said, skip_special_tokens=True)):
                yield key, common.Reply(text.strip())

    def run(generate):
        rows = {(pair, sample): {"turns": 3, "conversation": []}
                for pair in range(len(openings)) for sample in range(10)}

        def ask(alive, turn):
            return generate({key: common.Request(
                [{"role": "user", "content": openings[key[0]]}, *row["conversation"]],
                common.seed_for(*key, turn), key[0]) for key, row in alive.items()}, 0.9, 0.9, 200)

        def answer(alive, turn):
            return [((pair, sample), common.Reply(users[pair][3 * sample + turn])) for pair, sample in alive]
        simulate.simulate(rows, ask, answer)
        return [row["conversation"] for row in rows.values()]

    # A random number within a rounding error of a token's border changes all that follows.
    return (lambda: run(local.generate), lambda: run(wrapper),
            lambda a, b: sum(x != y for x, y in zip(a, b)) / len(a), 0.1)


def compare_score(folder, args):
    local, texts = open_local(folder, args, 32), Texts(args.words)              # 32 x 256 tokens, as their 16 texts
    examples = [common.scored_ids(local.tokenizer, texts.chat()) for _ in range(64)]

    def wrapper():
        sums = []
        for batch in chunks(examples, 16):
            inputs = local.tokenizer.pad({"input_ids": [ids for ids, _ in batch]}, padding_side="right",
                                         return_tensors="pt").to(DEVICE)
            log_p = local.model(**inputs).logits[:, :-1].float().log_softmax(-1)
            log_p = log_p.gather(2, inputs.input_ids[:, 1:, None])[..., 0]
            sums += [row[len(ids) - n - 1:len(ids) - 1].sum().item() for row, (ids, n) in zip(log_p, batch)]
        return sums

    return (lambda: [p for _, p in sorted(local.score(dict(enumerate(examples))))], wrapper,
            lambda a, b: max(abs(x - y) / n for x, y, (_, n) in zip(a, b, examples)), 1e-4)


def training(folder, args):
    """64 examples, the tokenizer, and a step on a model of its own, which takes backward(model) -> loss."""
    tokenizer, texts = common.load_tokenizer(folder), Texts(args.words)
    examples = [train.training_examples(tokenizer, texts.chat())[0] for _ in range(64)]
    model = common.load_model(folder, args.dtype).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)

    def step(backward):
        loss = backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss
    return examples, tokenizer, step


def our_step(folder, args):
    (examples, tokenizer, step), accelerator = training(folder, args), Accelerator(cpu=DEVICE == "cpu")
    return lambda: step(lambda model: train.mean_loss(accelerator, model, examples, 4, learn=True))


def compare_train(folder, args):
    examples, tokenizer, step = training(folder, args)
    supervised = sum(label != -100 for _, labels in examples for label in labels[1:])

    def backward(model):
        total = 0.0
        for batch in chunks(examples, 4):
            ids, labels = train.collate(batch, DEVICE)          # padded with 0, which is this tokenizer's <pad>
            logits = model(ids, attention_mask=ids != tokenizer.pad_token_id, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / supervised
            loss.backward()
            total += loss.item()
        return total

    return our_step(folder, args), lambda: step(backward), lambda a, b: abs(a - b), 1e-4


def compare_trl(folder, args):
    import datasets
    import trl
    examples, tokenizer, _ = training(folder, args)
    trainer = trl.SFTTrainer(
        common.load_model(folder, args.dtype), processing_class=tokenizer, args=trl.SFTConfig(
            folder, per_device_train_batch_size=4, gradient_accumulation_steps=16, num_train_epochs=1, max_length=None,
            learning_rate=2e-5, weight_decay=0.0, train_sampling_strategy="group_by_length", bf16=False,
            activation_checkpointing=False, use_cpu=DEVICE == "cpu", save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True),
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in examples]))
    trainer.remove_callback(transformers.PrinterCallback)
    return our_step(folder, args), lambda: trainer.train().training_loss, lambda a, b: abs(a - b), 1e-4


COMPARISONS = {"simulate": compare_simulate, "score": compare_score, "train": compare_train, "trl": compare_trl}


# ---------------------------------------------------------------- clock and rows

def clocked(function):
    """Seconds of a call."""
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    begin = clock()
    function()
    torch.cuda.synchronize() if DEVICE == "cuda" else None
    return clock() - begin


def compare(name, args):
    """The row of a comparison."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, args)
        *sides, difference, limit = COMPARISONS[name](folder, args)
        row = {"stage": name, "difference": float(f"{difference(*(side() for side in sides)):.1g}")}    # and warm now
        if args.dtype == "float32" and row["difference"] > limit:
            sys.exit(f"{name}: the results differ by {row['difference']}, more than {limit}")
        orders = [(1, -1)[number % 2] for number in range(args.rounds)]         # each round the other side first
        ours, theirs = np.array([[clocked(side) for side in sides[::order]][::order] for order in orders]).T
    return {**row, "seconds": round(float(np.median(ours)), 2), "their_seconds": round(float(np.median(theirs)), 2),
            "ratio": [round(float(of(theirs / ours)), 3) for of in (np.median, np.min, np.max)]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20, help="answers side by side; twice as many conversations")
    parser.add_argument("--words", type=int, default=1000, help="the vocabulary")
    parser.add_argument("--hidden", type=int, default=384, help="width; 4096 is a 7B's")
    parser.add_argument("--layers", type=int, default=6, help="32 is a 7B's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {device}", flush=True)
    for name in args.only:
        print(json.dumps(compare(name, args)), flush=True)


if __name__ == "__main__":
    main()
