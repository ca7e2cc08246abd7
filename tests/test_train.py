"""Training: what is learned from, the loss, its gradients, and that Q_BASE stays as it is."""
import hashlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import train
from conftest import END_OF_TURN, TEMPLATES, make_tokenizer, read_lines, save_model, write_rows

PAIR = {"task_id": "A0", "persona_id": "Ap0"}
TALK = [{"role": "assistant", "content": "Green or black?"}, {"role": "user", "content": "Green."},
        {"role": "assistant", "content": "Hot?"}, {"role": "user", "content": "Yes."}]


def examples_of(world, tokenizer, rows=None, target="response", max_length=2048):
    """What train.py makes of selected rows."""
    write_rows(world.path("s.jsonl"), rows or read_lines(world.path("s.jsonl")))
    args = SimpleNamespace(**{name: world.path(f"{name}.jsonl") for name in ("tasks", "personas", "gold")}, split=["A"],
                           selected=world.path("s.jsonl"), target=target, limit=None, seed=42, max_length=max_length,
                           tasks_per_split=None, prompts=common.PROMPTS)
    return train.read_examples(args, tokenizer)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("target, said", [("response", ["Green or black?", "Hot?", "Try sencha."]),
                                          ("none", ["Green or black?", "Hot?"]),
                                          ("gold", ["Green or black?", "Hot?", "Ann, gyokuro!"])])
def test_supervised_tokens_for_each_target(world, family, target, said):
    """A response that was cut did not end there: no end is learned of it."""
    tokenizer, end = make_tokenizer(family), END_OF_TURN[family]
    row = {**PAIR, "sample": 1, "conversation": TALK, "gold_log_prob": -3.5, "response": "Try sencha."}
    write_rows(world.path("gold.jsonl"), [{**world.gold[0], "gold": "Ann, gyokuro!"}])
    (ids, labels), = examples_of(world, tokenizer, [row], target)[0]["A0", "Ap0"]
    learned = "".join((" " if family == "mistral" else "") + text + end for text in said)
    assert tokenizer.decode([label for label in labels if label != -100]) == learned
    context = tokenizer.decode(ids)
    assert "My name is Ann." in context and "charged $2000" not in context
    assert context.count("Help me with thing 0 of A.") == (1 if target == "none" else 2)
    (ids, labels), = examples_of(world, tokenizer, [{**row, "cut": True}], target)[0]["A0", "Ap0"]
    assert tokenizer.decode([label for label in labels if label != -100]) == (
        learned.removesuffix(end) if target == "response" else learned) and len(ids) == len(labels)


def train_flags(world, base, output, *more):
    return [*world.command("train", base, output=output), "--selected", world.path("s.jsonl"), "--lr", "1e-3",
            "--batch-size", 8, "--micro-batch-size", 8, "--epochs", 2, *more]


def selected(world, count=12, n=1):
    write_rows(world.path("s.jsonl"), [{**row, "gold_log_prob": -1.0, "response": f"Say {i}."}
                                       for i, row in enumerate(world.conversations("A", n))][:count])


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
    assert AutoTokenizer.from_pretrained(world.path("m")).chat_template and changed(world.path("m"), base) > 0.1
    after = digest(world.path("m"))
    assert "trained already" in run(train, *train_flags(world, base, "m"))[0] and digest(world.path("m")) == after
    _, err = run(train, *train_flags(world, base, "m", "--target", "none"), status=2)
    assert "target: 'response' there, 'none' now" in err
    out, _ = run(train, *train_flags(world, base, "again"))
    assert digest(world.path("again")) == after, "the same seed: the same weights and log"
    *log, before, after = read_lines(world.path("m/log.jsonl"))
    assert f"held out {before['held_out']:.3f} -> {after['held_out']:.3f}" in out
    assert [row["step"] for row in log] == [1, 2, 3, 4] and all(row["norm"] > 0 for row in log)
    assert f"loss {log[0]['loss']:.3f} -> {log[-1]['loss']:.3f} nats" in out
    assert [row["rate"] for row in log] == pytest.approx([0, 1e-3, 0.75e-3, 0.25e-3]), "one step of warm-up, cosine"
    selected(world, count=2)
    out, _ = run(train, *train_flags(world, base, "one", "--epochs", 1))
    assert "1 examples + 1 held out" in out and "1 steps" in out
    assert changed(world.path("one"), base) > 0, "warm-up must not eat all steps"


def test_whole_pairs_are_held_out(run, world, tiny):
    """Several conversations of a pair: none of them is learned from if one is held out."""
    selected(world, count=36, n=3)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "mean_loss", lambda *given, learn=False: seen.append((learn, given[2])) or 1.0)
        run(train, *train_flags(world, tiny, "m", "--validation", 0.3, "--epochs", 1))
    examples, _ = examples_of(world, make_tokenizer("mistral"))
    pair = {str(example): pair for pair in examples for example in examples[pair]}
    learned, held = ([pair[str(example)] for learn, batch in seen if learn is want for example in batch]
                     for want in (True, False))
    assert len(held) == 2 * 12 and len(learned) == 24 and not set(held) & set(learned)


def test_what_is_left_out_is_counted_and_nothing_is_cut(run, world, tiny):
    rows = [{**row, "gold_log_prob": -1.0, "response": {0: None, 1: None, 3: "r" * 500}.get(i, "Say.")}
            for i, row in enumerate(world.conversations("A", n=1))]
    rows[2] = {**PAIR, "sample": 9, "refused": "declined"}
    examples, left_out = examples_of(world, make_tokenizer("mistral"), rows, max_length=400)
    assert left_out == "3 refused or without a target, 1 longer than 400 tokens dropped"
    assert len(examples) == 8 and max(len(ids) for of_pair in examples.values() for ids, _ in of_pair) <= 400
    assert examples_of(world, make_tokenizer("mistral"), rows, "none")[1].startswith("1 refused or without a target")
    write_rows(world.path("s.jsonl"), rows[:2])
    _, err = run(train, *train_flags(world, tiny, "none"), status=2)
    assert "no example to train on (2 refused or without a target" in err and not Path(world.path("none")).exists()


def test_the_messages_that_the_data_page_makes_are_what_is_learned(world, tiny):
    """docs/data.md, for TRL: without the rows that are refused or cut."""
    marks = [{"response": None}, {"cut": True}, {"cut_turns": [0]}, {"refused": "declined"}]
    rows = [{**row, "gold_log_prob": -1.0, "response": "Say </s>. ", **(marks[i] if i < 4 else {})}
            for i, row in enumerate(world.conversations("A", n=1))]
    examples, _ = examples_of(world, tokenizer := common.load_tokenizer(tiny), rows)
    code = (common.PROMPTS.parent / "docs/data.md").read_text().split("```python\n")[1].split("```")[0]
    for there, here in (("runs/smoke", world.folder), ("/base/selected", "/s"), ("toy/base", tiny)):
        code = code.replace(there, str(here))
    exec(code, {})
    chats = [row["messages"] for row in read_lines(world.path("messages.jsonl"))]
    assert [[tokenizer.apply_chat_template(chat, return_dict=False)] for chat in chats] == [
        [ids for ids, _ in examples[common.pair_of(row)]] for row in rows[4:]]


def test_rows_of_another_split_are_trained_on_only_when_it_is_named(run, world, tiny):
    write_rows(world.path("s.jsonl"), [{**row, "gold_log_prob": -1.0, "response": "Say."} for split in ("A", "test")
                                       for row in world.conversations(split, n=1)[:2]])
    _, err = run(train, *train_flags(world, tiny, "m"), status=2)
    assert "s.jsonl: has rows of another split. To train on it: --split A test\n" in err
    assert not Path(world.path("m")).exists() and not Path(world.path("m.unfinished")).exists()
    out, _ = run(train, *train_flags(world, tiny, "m", "--split", "A", "test", "--epochs", 1))
    assert "3 examples + 1 held out" in out


def test_what_is_not_ours_is_kept_and_found_out_before_training(run, world, tiny, monkeypatch):
    selected(world)
    folder, flags = Path(world.path("m.unfinished")), train_flags(world, tiny, "m", "--epochs", 1)
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_model", None)                 # it would be called
        _, err = run(train, *flags, status=2)
    assert err.count("error: ") == 1 and "m.unfinished: " in err and (folder / "thesis.txt").read_text() == "mine"
    (folder / "thesis.txt").rename(folder / "log.jsonl")         # as a kill leaves it
    run(train, *flags)
    assert not folder.exists() and len(read_lines(world.path("m/log.jsonl"))) == 2 + 2


@pytest.mark.parametrize("failure, status, said", [
    (torch.OutOfMemoryError("CUDA out of memory. " + "GPU 0 " * 99), 2, "lower --micro-batch-size"),
    (math.nan, 1, "step 2: loss nan")])
def test_running_out_of_memory_and_diverging_are_one_line(run, world, tiny, monkeypatch, failure, status, said):
    selected(world)
    monkeypatch.setattr(train, "mean_loss", Mock(side_effect=[2.0, 1.9, failure]))      # held out, step 1, step 2
    _, err = run(train, *train_flags(world, tiny, "m"), status=status)
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
        y = train.rounded(x, generator)
        assert y.dtype == torch.bfloat16 and len(y.unique()) == 2
        last_bit = (y.max().double() - y.min().double()).item()
        assert abs(y.double().mean().item() - x[0].double().item()) < 0.01 * last_bit
        assert x[0].bfloat16() in y.unique() and last_bit <= abs(number) / 2 ** 7
    exact = torch.randn(1000).bfloat16().float()
    exact[:3] = torch.tensor([0.0, -0.0, math.inf])
    assert torch.equal(train.rounded(exact, generator).float(), exact), "what bfloat16 has is kept"


def test_steps_below_half_a_last_bit_count_on_average():
    """4,000 weights of each size under a gradient that stops: against AdamW in float32, and in bfloat16."""
    start = torch.tensor([0.02, -0.3, 1.0]).bfloat16().float().repeat_interleave(4000)
    runs = {name: torch.nn.Parameter(start.clone().to(dtype)) for name, dtype in (
        ("float32", torch.float32), ("nearest", torch.bfloat16), ("stochastic", torch.bfloat16))}
    optimizers = {name: (train.StochasticAdamW if name == "stochastic" else torch.optim.AdamW)(
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


def changed(folder, base):
    a, b = (torch.cat([weight.detach().float().flatten() for weight in AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16).parameters()]) for path in (folder, base))
    return (a != b).float().mean().item()


def test_on_apples_gpu_which_has_no_float64_the_cpu_works(monkeypatch):
    for name in ("is_available", "is_built"):
        monkeypatch.setattr(torch.backends.mps, name, lambda: True)
    AcceleratorState._reset_state(True)
    assert common.start_processes().device.type == "cpu"
    AcceleratorState._reset_state(True)


def test_precisions_from_the_command_line(run, world, tiny, monkeypatch):
    """Each saves bfloat16; nearest rounding says what it loses, and the others lose less."""
    selected(world)

    def flags(output, *more):
        return [*train_flags(world, tiny, output, *more), "--dtype", "bfloat16", "--lr", "1e-4"]
    out, _ = run(train, *flags("nearest"))
    said = re.search(r"a step of 0.0001 changes (\d+)% of them, and is lost on others. --rounding stochastic", out)
    assert int(said[1]) < 15
    assert 0.2 * int(said[1]) / 100 < changed(world.path("nearest"), tiny) < 3 * int(said[1]) / 100
    run(train, *flags("stochastic", "--rounding", "stochastic"))
    AcceleratorState._reset_state(True)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")       # as `accelerate launch` passes it on
        seen, real = [], train.load_model
        patch.setattr(train, "load_model", lambda path, dtype, **more: seen.append(dtype) or real(path, dtype, **more))
        out, _ = run(train, *flags("mixed", "--rounding", "stochastic"))        # as run.sh paper's: no rounding
        assert seen == ["float32", "bfloat16"] and "is lost" not in out
    AcceleratorState._reset_state(True)
    _, err = run(train, *flags("mixed", "--rounding", "stochastic"), status=2)
    assert "mixed_precision: 'bf16' there, 'no' now" in err
    for name in ("nearest", "stochastic", "mixed"):
        with safe_open(world.path(f"{name}/model.safetensors"), "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}
        assert json.loads(Path(world.path(f"{name}/config.json")).read_text())["dtype"] == "bfloat16"
        if name != "nearest":
            assert changed(world.path(name), tiny) > 1.5 * changed(world.path("nearest"), tiny)
