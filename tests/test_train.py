"""Training: what is learned from, the loss, its gradients, and that Q_BASE stays as it is."""
import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import rounding
import train
from conftest import END_OF_TURN, ROOT, TEMPLATES, make_model, make_tokenizer, save_model, write_rows

TALK = [{"role": "assistant", "content": "Green or black?"}, {"role": "user", "content": "Green."},
        {"role": "assistant", "content": "Hot?"}, {"role": "user", "content": "Yes."}]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("target, said", [("response", ["Green or black?", "Hot?", "Try sencha."]),
                                          ("none", ["Green or black?", "Hot?"]),
                                          ("gold", ["Green or black?", "Hot?", "Ann, gyokuro!"])])
def test_supervised_tokens_for_each_target(world, family, target, said):
    tokenizer = make_tokenizer(family)
    row = {"task_id": "A0", "persona_id": "Ap0", "sample": 1, "conversation": TALK, "gold_log_prob": -3.5,
           "response": "Try sencha."}
    write_rows(world.path("s.jsonl"), [row])
    write_rows(world.path("gold.jsonl"), [{**world.gold[0], "gold": "Ann, gyokuro!"}])
    args = SimpleNamespace(split=["A"], selected=world.path("s.jsonl"), tasks=world.path("tasks.jsonl"), target=target, limit=None,
                           personas=world.path("personas.jsonl"), gold=world.path("gold.jsonl"), seed=42, max_length=2048)
    examples, left_out = train.read_examples(args, tokenizer)
    (ids, labels), = examples["A0", "Ap0"]
    blank = " " if family == "mistral" else ""
    assert tokenizer.decode([label for label in labels if label != -100]) == "".join(
        blank + text + END_OF_TURN[family] for text in said)
    context = tokenizer.decode(ids)
    assert "My name is Ann." in context and "Help me with thing 0 of A." in context and "charged $2000" not in context
    assert context.count("Help me with thing 0 of A.") == (1 if target == "none" else 2)


def test_too_long_examples_are_dropped_and_counted_never_cut(world):
    rows = [{**row, "gold_log_prob": -1.0, "response": "r" * (500 if i == 3 else 5)}
            for i, row in enumerate(world.conversations("A", n=1))]
    write_rows(world.path("s.jsonl"), rows)
    args = SimpleNamespace(split=["A"], selected=world.path("s.jsonl"), tasks=world.path("tasks.jsonl"), target="response", limit=None,
                           personas=world.path("personas.jsonl"), seed=42, max_length=400)
    examples, left_out = train.read_examples(args, make_tokenizer("mistral"))
    assert len(examples) == 11 and "1 longer than 400 tokens dropped" in left_out
    assert max(len(ids) for of_pair in examples.values() for ids, _ in of_pair) <= 400


def loss_alone(model, ids, labels):
    """Sum over the supervised tokens of one text: full logits, no padding, no mask."""
    return torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:]),
                                             ignore_index=-100, reduction="sum")


def test_the_loss_is_the_mean_over_the_supervised_tokens_of_the_batch():
    """Not over texts or micro-batches, whose answers are of very different lengths; also with texts without any."""
    tokenizer = make_tokenizer("mistral")
    model = make_model(len(tokenizer))
    chats = [train.example_chat("Ann", "Tea" * i, TALK[:2 * i], "r" * 13 ** i) for i in (1, 2)]
    examples = [common.training_examples(tokenizer, chat)[0] for chat in chats] + [([1, 2, 3], [-100] * 3), ([5, 6], [5, 6])]
    ids, labels = train.collate(examples)
    assert ids.shape == labels.shape == (4, max(len(row) for row, _ in examples)) and tokenizer.eos_token_id in examples[1][0][1:-1]
    supervised = sum(target != -100 for _, targets in examples for target in targets[1:])
    parts = [loss_alone(model, *example) for example in examples]
    assert train.sum_loss(model, ids, labels).item() == pytest.approx(sum(parts).item(), rel=1e-5) and supervised > 200
    (sum(parts) / supervised).backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    for size in (1, 3, 8):
        model.zero_grad()
        loss = train.mean_loss(Accelerator(), model, examples, size, learn=True)
        assert loss == pytest.approx(sum(parts).item() / supervised, rel=1e-5)
        assert all(torch.allclose(a.grad, b, atol=1e-5) for a, b in zip(model.parameters(), expected))
        model.zero_grad()
        assert train.mean_loss(Accelerator(), model, examples, size) == loss and model.lm_head.weight.grad is None


def train_flags(world, base, output, *more):
    return ["--base", base, "--dtype", "float32", *world.flags("tasks", "personas"), "--selected", world.path("s.jsonl"),
            "--output", world.path(output), "--lr", "1e-3", "--batch-size", 8, "--micro-batch-size", 8, "--epochs", 2, *more]


def selected(world, count=12):
    write_rows(world.path("s.jsonl"), [{**row, "gold_log_prob": -1.0, "response": f"Say {i}."}
                                       for i, row in enumerate(world.conversations("A", n=1))][:count])


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}


def test_training_from_the_command_line(run, world, tmp_path):
    base = save_model(tmp_path / "base")
    before = digest(base)
    selected(world)
    out, _ = run(train, *train_flags(world, base, "m"))
    assert digest(base) == before, "Q_BASE's files must not change"
    assert "11 examples + 1 held out" in out and "; 4 steps of 8, on 1 processes 8 at a time" in out
    held_out = [float(x) for x in out.split("held out ")[-1].split(",")[0].split(" -> ")]
    assert held_out[1] < held_out[0], "the loss on held-out examples should fall"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world.path("m")), AutoTokenizer.from_pretrained(world.path("m"))
    assert tokenizer.chat_template and not torch.equal(
        model.lm_head.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)
    after = digest(world.path("m"))
    out, _ = run(train, *train_flags(world, base, "m"))
    assert "trained already" in out and digest(world.path("m")) == after
    _, err = run(train, *train_flags(world, base, "m", "--target", "none"), status=2)
    assert "target: 'response' there, 'none' now" in err
    out, _ = run(train, *train_flags(world, base, "again"))
    assert digest(world.path("again")) == after, "the same seed: the same weights, log and card"
    log = [json.loads(line) for line in Path(world.path("m"), "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4] and all(row["norm"] > 0 for row in log)
    assert f"loss {log[0]['loss']:.3f} -> {log[-1]['loss']:.3f} nats" in out
    assert [row["rate"] for row in log] == pytest.approx([0, 1e-3, 0.75e-3, 0.25e-3]), "one step of warm-up, cosine"
    card = Path(world.path("m"), "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {base}\n") and "\n- Data: 11 examples + 1 held out (0 refused" in card
    assert f", held out {held_out[0]:.3f} -> {held_out[1]:.3f}\n" in card
    settings = json.loads(card.split("```json\n")[1].split("```")[0])
    assert settings == common.read_settings(world.path("m")) and settings["lr"] == 1e-3 and settings["target"] == "response"
    assert "base (" in settings["base"] and common.fingerprint(world.path("again")) != common.fingerprint(base)


def test_an_interrupted_training_starts_anew(run, world, tiny, monkeypatch):
    """Interrupted in its third step, and when all but the model card is saved: nothing has its name."""
    selected(world)
    run(train, *train_flags(world, tiny, "whole"))
    for name in ("mean_loss", "model_card"):
        calls, real = iter(range(9)), getattr(train, name)

        def interrupted(*given, **more):
            if name == "mean_loss" and next(calls) < 3:
                return real(*given, **more)
            raise OSError("pulled out")
        with monkeypatch.context() as patch:
            patch.setattr(train, name, interrupted)
            _, err = run(train, *train_flags(world, tiny, "m"), status=2)
        assert "pulled out" in err and not Path(world.path("m")).exists()
    assert Path(world.path("m.unfinished/model.safetensors")).exists()
    run(train, *train_flags(world, tiny, "m"))
    assert digest(world.path("m"))["model.safetensors"] == digest(world.path("whole"))["model.safetensors"]
    assert not Path(world.path("m.unfinished")).exists()


def test_more_rows_are_another_training_and_one_step_learns(run, world, tmp_path):
    base = save_model(tmp_path / "base")
    selected(world, count=2)
    flags = train_flags(world, base, "m", "--epochs", 1)
    out, _ = run(train, *flags)
    assert "1 examples + 1 held out" in out and "1 steps" in out
    assert digest(world.path("m"))["model.safetensors"] != digest(base)["model.safetensors"], "warm-up must not eat all steps"
    selected(world)
    _, err = run(train, *flags, status=2)
    assert "selected: 's.jsonl (" in err
    _, err = run(train, *train_flags(world, base, "m", "--epochs", 1, "--limit", 2), status=2)
    assert "limit: 'None' there, '2' now" in err
    out, _ = run(train, *train_flags(world, base, "all", "--validation", 0))
    assert "12 examples + 0 held out" in out


def test_whole_pairs_are_held_out(run, world, tiny):
    """Several conversations of a pair: none of them is learned from if one is held out."""
    rows = [{**row, "gold_log_prob": -1.0, "response": "Say."} for row in world.conversations("A", n=3)]
    write_rows(world.path("s.jsonl"), rows)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "mean_loss", lambda *given, learn=False: seen.append((learn, given[2])) or 1.0)
        run(train, *train_flags(world, tiny, "m", "--validation", 0.3, "--epochs", 1))
    args = SimpleNamespace(split=["A"], selected=world.path("s.jsonl"), tasks=world.path("tasks.jsonl"), target="response", limit=None,
                           personas=world.path("personas.jsonl"), seed=42, max_length=2048)
    examples, _ = train.read_examples(args, make_tokenizer("mistral"))
    pair = {str(example): pair for pair in examples for example in examples[pair]}
    learned, held = ([pair[str(example)] for learn, batch in seen if learn is want for example in batch] for want in (True, False))
    assert len(held) == 2 * 12 and len(learned) == 24 and not set(held) & set(learned)


def test_a_diverging_training_saves_nothing(run, world, tmp_path):
    selected(world)
    _, err = run(train, *train_flags(world, save_model(tmp_path / "base"), "m", "--lr", "1e9"), status=1)
    assert re.search("step [34]: loss", err) and "lower --lr" in err and not Path(world.path("m")).exists()


def test_rows_without_a_response_are_left_out_and_counted(run, world, tiny):
    rows = [{**row, "gold_log_prob": -1.0, "response": None if i < 2 else "Say."}
            for i, row in enumerate(world.conversations("A", n=1))]
    rows[2] = {name: rows[2][name] for name in ("task_id", "persona_id", "sample")} | {"refused": "declined"}
    write_rows(world.path("s.jsonl"), rows)
    out, _ = run(train, *train_flags(world, tiny, "m", "--epochs", 1))
    assert "8 examples + 1 held out (3 refused or without a response" in out
    write_rows(world.path("s.jsonl"), rows[:2])
    _, err = run(train, *train_flags(world, tiny, "none"), status=2)
    assert "no example to train on (2 refused or without a response" in err and not Path(world.path("none")).exists()


def test_micro_batches_follow_the_examples_and_not_the_flag(run, world, tiny, monkeypatch):
    """--batch-size 1000000 once ran through a million empty micro-batches."""
    selected(world)
    sizes, real = [], train.sum_loss
    monkeypatch.setattr(train, "sum_loss", lambda model, ids, labels: sizes.append(len(ids)) or real(model, ids, labels))
    run(train, *train_flags(world, tiny, "m", "--epochs", 1, "--batch-size", 1000000, "--micro-batch-size", 2))
    assert sizes == [1, 2, 2, 2, 2, 2, 1, 1], "one is held out: before, 11 in one step, after"


def test_a_cut_response_is_not_taught_an_end(world):
    """The question before it is; so are responses that ended, and golds."""
    rows = [{**row, "gold_log_prob": -1.0, "response": "Say it.", "cut": True} for row in world.conversations("A", n=1)[:1]]
    write_rows(world.path("s.jsonl"), rows)
    for family, mark in END_OF_TURN.items():
        tokenizer, said = make_tokenizer(family), {}
        for target in ("response", "gold", "none"):
            args = SimpleNamespace(split=["A"], selected=world.path("s.jsonl"), tasks=world.path("tasks.jsonl"), limit=None, target=target,
                                   personas=world.path("personas.jsonl"), gold=world.path("gold.jsonl"), seed=42, max_length=2048)
            ((ids, labels),), = train.read_examples(args, tokenizer)[0].values()
            said[target] = tokenizer.decode([label for label in labels if label != -100])
            assert len(ids) == len(labels)
        assert said["response"].endswith("Say it.") and said["response"].count(mark) == 1, said
        assert said["gold"].endswith(mark) and said["none"].endswith(mark)
        assert tokenizer.decode(ids).count("Say it.") == 0


def test_rows_of_another_split_are_trained_on_only_when_it_is_named(run, world, tiny):
    write_rows(world.path("s.jsonl"), [{**row, "gold_log_prob": -1.0, "response": "Say."} for split in ("A", "test")
                                       for row in world.conversations(split, n=1)[:2]])
    _, err = run(train, *train_flags(world, tiny, "m"), status=2)
    assert "s.jsonl: has rows of another split. To train on it: --split A test\n" in err
    assert not Path(world.path("m")).exists() and not Path(world.path("m.unfinished")).exists()
    out, _ = run(train, *train_flags(world, tiny, "m", "--split", "A", "test", "--epochs", 1))
    assert "3 examples + 1 held out" in out


@pytest.mark.parametrize("there", ["file", "folder", "link", "empty", "ours"])
def test_what_is_not_ours_is_kept_and_found_out_before_training(run, world, tiny, there, tmp_path, monkeypatch):
    selected(world)
    path, other = Path(world.path("m.unfinished")), tmp_path / "other"
    folder = other if there == "link" else path
    folder.write_text("mine") if there == "file" else folder.mkdir()
    if there in ("folder", "link"):
        (folder / "thesis.txt").write_text("mine")
    if there == "link":
        path.symlink_to(other)
    if there == "ours":
        (path / "log.jsonl").write_text("{}\n")
    if there in ("empty", "ours"):                               # what kills leave
        run(train, *train_flags(world, tiny, "m", "--epochs", 1))
        assert not path.exists() and len((Path(world.path("m")) / "log.jsonl").read_text().splitlines()) == 2
    else:
        with monkeypatch.context() as patch:
            patch.setattr(train, "load_model", None)             # it would be called
            _, err = run(train, *train_flags(world, tiny, "m"), status=2)
        assert err.count("error: ") == 1 and "m.unfinished: " in err and not Path(world.path("m")).exists()
        assert "mine" == (path.read_text() if there == "file" else (folder / "thesis.txt").read_text())


@pytest.mark.parametrize("failure, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. " + "GPU 0 " * 99), "lower --micro-batch-size"),
    (math.nan, "step 2: loss nan"), (math.inf, "step 2: loss inf")])
def test_running_out_of_memory_and_diverging_are_one_line(run, world, tiny, monkeypatch, failure, said):
    selected(world)
    calls, real = iter(range(9)), train.mean_loss

    def failing(*given, **more):
        if next(calls) < 2:
            return real(*given, **more)
        if isinstance(failure, Exception):
            raise failure
        return real(*given, **more) * failure
    monkeypatch.setattr(train, "mean_loss", failing)
    _, err = run(train, *train_flags(world, tiny, "m"), status=2 if isinstance(failure, Exception) else 1)
    assert said in err and err.count("error: ") == 1 and "Traceback" not in err and not Path(world.path("m")).exists()


def test_an_infinite_gradient_does_not_reach_the_weights(run, world, tiny, monkeypatch):
    selected(world)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    _, err = run(train, *train_flags(world, tiny, "m"), status=1)
    assert "gradient norm inf" in err


# ------------------------------------------------------------ precision

def test_rounding_at_random_is_right_on_average_and_nowhere_far_off():
    generator = torch.Generator().manual_seed(0)
    for number in (1 + 2 ** -10, -1 - 2 ** -10, 3e-5, -0.3, 1.9999, 1e-30, 2.0 ** 127 * 1.001):
        x = torch.full((100_000,), number)
        y = rounding.rounded(x, generator)
        assert y.dtype == torch.bfloat16 and len(y.unique()) == 2
        last_bit = (y.max().double() - y.min().double()).item()
        assert abs(y.double().mean().item() - x[0].double().item()) < 0.01 * last_bit
        assert x[0].bfloat16() in y.unique() and last_bit <= abs(number) / 2 ** 7
    exact = torch.randn(1000).bfloat16().float()
    exact[:3] = torch.tensor([0.0, -0.0, math.inf])
    assert torch.equal(rounding.rounded(exact, generator).float(), exact), "what bfloat16 has is kept"


def test_steps_below_half_a_last_bit_count_on_average():
    """4,000 weights of each size under a gradient that stops: against AdamW in float32, and in bfloat16."""
    start = torch.tensor([0.02, -0.3, 1.0]).bfloat16().float().repeat_interleave(4000)
    runs = {name: torch.nn.Parameter(start.clone().to(dtype)) for name, dtype in (
        ("float32", torch.float32), ("nearest", torch.bfloat16), ("stochastic", torch.bfloat16))}
    optimizers = {name: (rounding.StochasticAdamW if name == "stochastic" else torch.optim.AdamW)(
        [weight], lr=2e-5, weight_decay=0.0, fused=True) for name, weight in runs.items()}
    optimizers["stochastic"].generator = torch.Generator().manual_seed(0)
    for t in range(200):
        for name, weight in runs.items():
            weight.grad = torch.full_like(weight, 1.0 if t < 5 else 0.01)
            optimizers[name].step()
    moved = {name: (weight.detach().float() - start).view(3, -1).mean(1) for name, weight in runs.items()}
    assert torch.allclose(moved["stochastic"], moved["float32"], rtol=0.05), moved
    assert (moved["nearest"].abs() < 0.1 * moved["float32"].abs()).all(), "all are lost"
    second = {name: optimizers[name].state[weight]["exp_avg_sq"].float().mean().item() for name, weight in runs.items()}
    assert second["stochastic"] == pytest.approx(second["float32"], rel=0.01)
    assert second["nearest"] > 1.15 * second["float32"], "it cannot fall"
    assert {value.dtype for value in optimizers["stochastic"].state[runs["stochastic"]].values()} == {
        torch.bfloat16, torch.float32} and runs["stochastic"].dtype == torch.bfloat16, "(float32: the count of steps)"


def changed(folder, base):
    a, b = (torch.cat([weight.detach().float().flatten() for weight in AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16).parameters()]) for path in (folder, base))
    return (a != b).float().mean().item()


def test_precisions_from_the_command_line(run, world, tiny, monkeypatch):
    """Each saves bfloat16; nearest rounding says what it loses, and the others lose less."""
    selected(world)
    flags = lambda output, *more: [*train_flags(world, tiny, output, *more), "--dtype", "bfloat16", "--lr", "1e-4"]   # noqa: E731
    out, _ = run(train, *flags("nearest"))
    said = re.search(r"a step of 0.0001 changes (\d+)% of them, and is lost on others. --rounding stochastic", out)
    assert int(said[1]) < 15
    assert 0.2 * int(said[1]) / 100 < changed(world.path("nearest"), tiny) < 3 * int(said[1]) / 100
    run(train, *flags("stochastic", "--rounding", "stochastic"))
    AcceleratorState._reset_state(True)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")       # as `accelerate launch` passes it on
        seen, real = [], train.load_model
        patch.setattr(train, "load_model", lambda path, dtype: seen.append(dtype) or real(path, dtype))
        out, _ = run(train, *flags("mixed", "--rounding", "stochastic"))        # as run.sh paper's; nothing is to be rounded
        assert seen == ["float32"] and "is lost" not in out
    AcceleratorState._reset_state(True)
    _, err = run(train, *flags("mixed", "--rounding", "stochastic"), status=2)
    assert "mixed_precision: 'bf16' there, 'no' now" in err
    for name in ("nearest", "stochastic", "mixed"):
        with safe_open(world.path(f"{name}/model.safetensors"), "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}
        assert json.loads(Path(world.path(f"{name}/config.json")).read_text())["dtype"] == "bfloat16"
        if name != "nearest":
            assert changed(world.path(name), tiny) > 1.5 * changed(world.path("nearest"), tiny)


def train_on(rank, port, flags, kept):
    """One of two processes; forked, which saves the imports. It keeps its own weights."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      ACCELERATE_USE_CPU="true")
    AcceleratorState._reset_state(True)
    fit, sys.argv = train.fit, [train.__file__, *map(str, flags)]

    def keep(accelerator, *given):
        model, outcome = fit(accelerator, *given)
        torch.save(accelerator.unwrap_model(model).state_dict(), f"{kept}{rank}")
        return model, outcome
    train.fit = keep
    train.main()


def test_two_processes_round_alike(run, world, tiny):
    """And move as far as one process does, whose sums are rounded in another order."""
    selected(world)
    flags = [*train_flags(world, tiny, "two", "--rounding", "stochastic"), "--dtype", "bfloat16"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]                           # a free one
    both = [get_context("fork").Process(target=train_on, args=(rank, port, flags, world.path("kept"))) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    out, _ = run(train, *flags)
    assert "trained already" in out
    run(train, *flags, "--output", world.path("one"))
    first, second = (torch.load(world.path(f"kept{rank}")) for rank in "01")
    assert all(torch.equal(first[name], second[name]) for name in first) and changed(world.path("two"), tiny) > 0.1
    saved, alone, base = (torch.cat([weight.detach().flatten() for weight in AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32).parameters()]) for path in (world.path("two"), world.path("one"), tiny))
    assert torch.cosine_similarity(saved - base.bfloat16().float(), alone - base.bfloat16().float(), dim=0) > 0.9


@pytest.mark.slow
def test_the_benchmark_of_precisions():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/precision.py", "--noise", "3", "--std", "0.02"], capture_output=True,
                          text=True, check=True)
    slope = {row["precision"]: row["slope"] for row in map(json.loads, done.stdout.splitlines())}
    assert slope["bfloat16, nearest"] < 0.2 and slope["bfloat16, stochastic"] == pytest.approx(1, abs=0.02)
