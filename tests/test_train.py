"""Training: what is learned from, the loss, its gradients, and that Q_BASE stays as it is."""
import hashlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import train
from conftest import END_OF_TURN, TEMPLATES, make_model, make_tokenizer, save_model, write_rows

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
    args = SimpleNamespace(selected=world.path("s.jsonl"), tasks=world.path("tasks.jsonl"), target=target, limit=None,
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
    args = SimpleNamespace(selected=world.path("s.jsonl"), tasks=world.path("tasks.jsonl"), target="response", limit=None,
                           personas=world.path("personas.jsonl"), seed=42, max_length=400)
    examples, left_out = train.read_examples(args, make_tokenizer("mistral"))
    assert len(examples) == 11 and "1 longer than 400 tokens dropped" in left_out
    assert max(len(ids) for of_pair in examples.values() for ids, _ in of_pair) <= 400


def test_the_loss_is_the_sum_over_supervised_tokens():
    """Against full logits, one text at a time, without padding or a mask."""
    tokenizer = make_tokenizer("mistral")
    model = make_model(len(tokenizer))
    chats = [train.example_chat("Ann", "Tea" * i, TALK[:2 * i], "r" * 3 * i) for i in (1, 2)]
    examples = [common.supervised_ids(tokenizer, chat) for chat in chats] + [([1, 2, 3], [-100] * 3)]
    ids, labels = train.collate(examples, pad=tokenizer.eos_token_id)
    assert ids.shape == labels.shape == (3, max(len(row) for row, _ in examples)) and tokenizer.eos_token_id in examples[1][0][1:-1]
    expected, supervised = 0.0, 0
    for row, targets in examples:
        log_p = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected -= sum(log_p[t - 1, target].item() for t, target in enumerate(targets) if target != -100)
        supervised += sum(target != -100 for target in targets)
    loss = train.sum_loss(model, ids, labels)
    assert loss.item() == pytest.approx(expected, abs=1e-3) and supervised > 30
    loss.backward()
    ours = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    sum(torch.nn.functional.cross_entropy(model(torch.tensor([row])).logits[0, :-1], torch.tensor(targets[1:]),
                                          ignore_index=-100, reduction="sum")
        for row, targets in examples[:2]).backward()
    assert all(torch.allclose(a, b.grad, atol=1e-4) for a, b in zip(ours, model.parameters()))


def test_batches_hold_every_example_once_and_micro_batches_little_padding():
    import numpy as np
    lengths = [(37 * i) % 200 + 1 for i in range(103)]
    batches = train.epoch_batches(lengths, 16, np.random.default_rng(0))
    assert sorted(i for batch in batches for i in batch) == list(range(103)) and [len(b) for b in batches] == [16] * 6 + [7]
    assert batches != train.epoch_batches(lengths, 16, np.random.default_rng(1))
    for batch in batches:
        assert [lengths[i] for i in batch] == sorted(lengths[i] for i in batch)
        for count in (1, 4, 16):
            parts = train.micro_batches(batch, lengths, count)
            assert len(parts) == count and [i for part in parts for i in part] == batch
    assert train.micro_batches([], lengths, 2) == [[], []]


@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [1, 1, 1, 1, 4, 4, 8], [5], [2, 3, 5, 7, 11, 13, 17, 19], [1] * 6 + [100]])
def test_the_largest_micro_batch_is_as_small_as_can_be(lengths):
    def tokens(parts):
        return max(len(part) * max(lengths[i] for i in part) for part in parts if part)
    for count in (1, 2, 3, 5):
        every = [[list(range(a, b)) for a, b in zip((0, *cuts), (*cuts, len(lengths)))]
                 for cuts in itertools.combinations_with_replacement(range(len(lengths) + 1), count - 1)]
        parts = train.micro_batches(list(range(len(lengths))), lengths, count)
        assert tokens(parts) == min(map(tokens, every)) and len(parts) == count


def test_the_lean_cross_entropy_is_the_plain_one():
    logits = torch.randn(600, 50, generator=torch.Generator().manual_seed(0)) * 4
    targets = torch.arange(600) % 50
    targets[::3] = -100
    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = (logits.to(dtype, copy=True).requires_grad_() for _ in range(2))
        loss = train.LeanCrossEntropy.apply(ours * 1, targets)
        expected = torch.nn.functional.cross_entropy(plain.float(), targets, ignore_index=-100, reduction="sum")
        (loss / 7).backward()
        (expected / 7).backward()
        assert torch.allclose(loss, expected) and torch.equal(ours.grad, plain.grad)
        own = plain.float().detach().softmax(1) - torch.nn.functional.one_hot(targets.clamp(min=0), 50)
        assert torch.allclose(ours.grad.float(), own.where(targets[:, None] != -100, 0.0) / 7, atol=2e-3)


def train_flags(world, base, output, *more):
    return ["--base", base, "--dtype", "float32", *world.flags("tasks", "personas"), "--selected", world.path("s.jsonl"),
            "--output", world.path(output), "--lr", "1e-3", "--batch-size", 8, "--micro-batch-size", 8, "--epochs", 2, *more]


def selected(world):
    rows = [{**row, "gold_log_prob": -1.0, "response": f"Say {i}."} for i, row in enumerate(world.conversations("A", n=1))]
    write_rows(world.path("s.jsonl"), rows)


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}


def test_training_from_the_command_line(run, world, tmp_path):
    base = save_model(tmp_path / "base")
    before = digest(base)
    selected(world)
    out, _ = run(train, *train_flags(world, base, "m"))
    assert digest(base) == before, "Q_BASE's files must not change"
    assert "11 examples + 1 held out" in out and "batch 8 = 8 x accumulation 1 x 1 processes; 4 steps" in out
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
    run(train, *train_flags(world, base, "again"))
    assert digest(world.path("again"))["model.safetensors"] == after["model.safetensors"], "the same seed, the same weights"
    assert not list(Path(world.folder).glob("*.tmp"))


def test_more_rows_are_another_training_and_one_step_learns(run, world, tmp_path):
    base = save_model(tmp_path / "base")
    rows = [{**row, "gold_log_prob": -1.0, "response": f"Say {i}."} for i, row in enumerate(world.conversations("A", n=1))]
    write_rows(world.path("s.jsonl"), rows[:2])
    flags = train_flags(world, base, "m", "--epochs", 1)
    out, _ = run(train, *flags)
    assert "1 examples + 1 held out" in out and "1 steps" in out
    assert digest(world.path("m"))["model.safetensors"] != digest(base)["model.safetensors"], "warm-up must not eat all steps"
    write_rows(world.path("s.jsonl"), rows)
    _, err = run(train, *flags, status=2)
    assert "examples:" in err
    out, _ = run(train, *train_flags(world, base, "all", "--validation", 0))
    assert "12 examples + 0 held out" in out


def test_a_diverging_training_saves_nothing(run, world, tmp_path):
    selected(world)
    _, err = run(train, *train_flags(world, save_model(tmp_path / "base"), "m", "--lr", "1e30"), status=2)
    assert "the loss is" in err and not Path(world.path("m")).exists()


def test_accumulation_gives_the_same_weights(run, world, tmp_path):
    """1 x 8, 4 x 2 and 8 x 1, also with a last batch that is not full; and with gradient checkpointing."""
    base = save_model(tmp_path / "base")
    selected(world)
    weights = []
    for micro in (8, 2, 1):
        checkpointing = ["--gradient-checkpointing"] * (micro == 2)
        out, _ = run(train, *train_flags(world, base, f"m{micro}", "--micro-batch-size", micro, *checkpointing))
        assert f"{micro} x accumulation {8 // micro} x 1" in out
        weights.append(AutoModelForCausalLM.from_pretrained(world.path(f"m{micro}")).state_dict())
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for other in weights[1:]:
        for name, weight in weights[0].items():
            moved = (weight - start[name]).abs().max()
            assert torch.allclose(weight, other[name], atol=max(1e-6, 0.02 * moved.item())), name


def test_bad_selected_rows(run, world, tiny):
    write_rows(world.path("s.jsonl"), [{**row, "gold_log_prob": -1.0, "response": None}
                                       for row in world.conversations("A", n=1)])
    _, err = run(train, *train_flags(world, tiny, "m"), status=2)
    assert "no response for ('A0', 'Ap0')" in err
    write_rows(world.path("s.jsonl"), [])
    _, err = run(train, *train_flags(world, tiny, "m"), status=2)
    assert "no example to train on" in err and not Path(world.path("m")).exists()
