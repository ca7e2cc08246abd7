"""Training: what is learned from, the loss, its gradients, and that Q_BASE stays as it is."""
import hashlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
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
    run(train, *train_flags(world, base, "again"))
    assert digest(world.path("again"))["model.safetensors"] == after["model.safetensors"], "the same seed, the same weights"
    card = Path(world.path("m"), "README.md").read_text()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert card.startswith(f"---\nbase_model: {base}\n") and "\n- Data: 11 examples + 1 held out (0 refused" in card
    assert f", held out {held_out[0]:.3f} -> {held_out[1]:.3f}\n" in card and f"- Code: commit {commit or 'unknown'}\n" in card
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
    args = SimpleNamespace(selected=world.path("s.jsonl"), tasks=world.path("tasks.jsonl"), target="response", limit=None,
                           personas=world.path("personas.jsonl"), seed=42, max_length=2048)
    examples, _ = train.read_examples(args, make_tokenizer("mistral"))
    pair = {str(example): pair for pair in examples for example in examples[pair]}
    learned, held = ([pair[str(example)] for learn, batch in seen if learn is want for example in batch] for want in (True, False))
    assert len(held) == 2 * 12 and len(learned) == 24 and not set(held) & set(learned)


def test_a_diverging_training_saves_nothing(run, world, tmp_path):
    selected(world)
    _, err = run(train, *train_flags(world, save_model(tmp_path / "base"), "m", "--lr", "1e9"), status=2)
    assert "the loss is" in err and not Path(world.path("m")).exists()


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
