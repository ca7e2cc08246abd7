"""Two real CPU processes (gloo) do what one does: the stages write the same bytes, and training the same weights."""
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import common
import train
from conftest import ROOT, load_stage, read_lines, write_rows
from test_train import selected, train_flags

RATE = 1e-3                                                      # the first of three; then 3/4 and 1/4 of it


def made_up(self, requests, temperature, top_p, max_tokens, skip=(), share=slice(None)):
    """What a local model says that says names, as a random one does not."""
    for key in [key for key in requests if key not in skip][share]:
        yield key, common.Reply(f"I'm P{random.Random(requests[key].seed).randrange(20)}x. I run.")


def run_stages(commands):
    """Runs stages, [(name, flags)], one after the other in this process, as their command lines would. Each process
    keeps the weights that it has trained, beside the model."""
    fit = train.fit

    def keep(accelerator, *given):
        model, outcome = fit(accelerator, *given)
        weights = [weight.detach().clone() for weight in model.parameters()]
        torch.save(weights, f"{given[1].output}.rank{accelerator.process_index}")
        return model, outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", keep)
        for name, flags in commands:
            stage = load_stage(name)
            patch.setattr(sys, "argv", [stage.__file__, *map(str, flags)])
            with patch.context() as invented:
                if name in ("generate_personas", "gold"):
                    invented.setattr(common.LocalModel, "generate", made_up)
                stage.main()


def run_two(commands):
    """Runs stages in two processes, and returns what they printed (stdout, stderr)."""
    call = f"import json, sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import test_devices as t; "
    path = Path(commands[0][1][-1] + ".py")
    path.write_text(f"{call} t.run_stages(json.loads({json.dumps(json.dumps(commands, default=str))}))")
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, path], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def loss_by_hand(model, batch):
    """Mean over all supervised tokens of a batch: plain transformers, one text at a time, no padding, no mask."""
    total = sum(F.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:]), reduction="sum")
                for ids, labels in batch)
    return total / sum(label != -100 for _, labels in batch for label in labels)


def train_by_hand(base, batches):
    """Each step's loss and norm of the gradient, and the weights."""
    model, steps = AutoModelForCausalLM.from_pretrained(base), []
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = loss_by_hand(model, batch)
        loss.backward()
        steps.append((loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()))
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.step()
    return steps, torch.cat([weight.detach().flatten() for weight in model.parameters()])


def three_steps(world, base, name, micro_batch_size, *more):
    """A training on 19 texts of very different lengths, in batches of 8."""
    write_rows(world.path("long.jsonl"), [
        {**row, "gold_log_prob": -1.0, "response": "So " * (11 * i % 17) + "on."}
        for i, row in enumerate(world.conversations("A"))][:23])
    return "train", [*train_flags(world, base, name), "--selected", world.path("long.jsonl"), "--lr", RATE,
                     "--epochs", 1, "--warmup", 0, "--validation", 0.1, "--micro-batch-size", micro_batch_size, *more]


def check_three_steps(world, base, monkeypatch):
    """2 processes x accumulation 4 (done before), 1 process x 8, 1 x accumulation 8 with gradient checkpointing: all
    against the same by hand."""
    batches, mean_loss = [], train.mean_loss

    def watched(accelerator, model, batch, *given, **more):
        if more.get("learn"):
            batches.append(batch)
        return mean_loss(accelerator, model, batch, *given, **more)

    monkeypatch.setattr(train, "mean_loss", watched)
    run_stages([three_steps(world, base, "whole", 8),
                three_steps(world, base, "checkpoints", 1, "--gradient-checkpointing")])
    assert [len(batch) for batch in batches] == [8, 8, 3] * 2 and batches[:3] == batches[3:]
    steps, by_hand = train_by_hand(base, batches[:3])
    for name in ("whole", "checkpoints", "accumulated"):
        log = [row for row in read_lines(world.path(f"{name}/log.jsonl")) if "loss" in row]
        assert [row["loss"] for row in log] == pytest.approx([loss for loss, _ in steps], rel=1e-5)
        assert [row["norm"] for row in log] == pytest.approx([norm for _, norm in steps], rel=1e-4)
        # What Adam allows: a step moves a weight by about the rate, however small its gradient, and where that is
        # nearly 0 rounding may choose the sign: at most twice the sum of the rates apart.
        weights = torch.cat([weight.flatten() for weight in torch.load(world.path(f"{name}.rank0"))])
        apart, rates = (weights - by_hand).abs(), RATE * (1 + 3 / 4 + 1 / 4)
        assert apart.max() <= 2 * rates and (apart <= rates / 1000).float().mean() >= 0.999


def test_two_processes_write_in_all_stages_what_one_writes(world, tiny, server, capfd, monkeypatch):
    """The bytes of all rows and settings, and the means; nothing is asked twice. Weights that are rounded at random are
    the same on both, and move as one process's, whose sums are rounded in another order."""
    server.reply = lambda request: (200, f"Final Response: {'AB'[request['seed'] % 2]}" if request["model"] == "j" else
                                    f"Answer {request['seed']}.")
    write_rows(world.path("talks.jsonl"), world.conversations("A", n=3))
    write_rows(world.path("blue.jsonl"), world.conversations("test", word="blue"))
    selected(world)
    (world.folder / "short").mkdir()
    (world.folder / "short/elicitation.txt").write_text("Ask {name} about: {task}")
    run_stages([("evaluate", world.command("evaluate", tiny, output="e0"))])
    results = {}

    def commands(folder):
        local = ["--dtype", "float32", "--output"]
        return [
            ("simulate", [*world.command("simulate", tiny, server.url), "--batch-size", 4, "--prompts",
                          world.path("short"), "--output", f"{folder}/simulate.jsonl"]),
            ("generate_personas", ["--model", tiny, "--splits", "A=8,test=4", *local,
                                   f"{folder}/personas.jsonl"]),
            ("gold", ["--oracle", tiny, *world.flags("tasks", "personas"), "--split", "A", *local,
                      f"{folder}/gold.jsonl"]),
            ("select", [*world.command("select", tiny), "--batch-size", 2, "--output", f"{folder}/select.jsonl"]),
            ("evaluate", [*world.judged(tiny, server.url, conversations="blue.jsonl"), "--both-orders", "--batch-size",
                          4, "--output", f"{folder}/evaluate"]),
            ("train", [*train_flags(world, tiny, "x"), "--dtype", "bfloat16", "--rounding", "stochastic", "--output",
                       f"{folder}/model"])]

    for name, start, more in (("one", run_stages, []), ("two", run_two, [three_steps(world, tiny, "accumulated", 1)])):
        server.requests.clear()
        capfd.readouterr()
        (here := world.folder / name).mkdir()
        _, err = start(commands(here) + more) or capfd.readouterr()
        asked = Counter((request["model"], request["seed"]) for request in server.requests)
        assert set(asked.values()) == {1} and Counter(model for model, _ in asked)["j"] == 24
        results[name] = asked, read_lines(world.path("results.jsonl")), {
            str(file.relative_to(here)): file.read_bytes() for of in ("*.jsonl", "*.settings.json", "evaluate/*")
            for file in here.glob(of)}
    assert results["one"] == results["two"] and len(results["one"][2]) == 19, "nine files of rows, and ten of settings"
    assert "| 18/18 [" in err and "| 6/6 [" in err, "each scores and answers its half"
    assert results["one"][2]["personas.replies.jsonl"].count(b"\n") > 12, "a name was taken"
    alone, first, second = (torch.load(world.path(f"{file}")) for file in (
        "one/model.rank0", "two/model.rank0", "two/model.rank1"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    base = [weight.detach().bfloat16() for weight in AutoModelForCausalLM.from_pretrained(tiny).parameters()]
    moved = [torch.cat([(a.float() - b.float()).flatten() for a, b in zip(weights, base)])
             for weights in (alone, first)]
    assert torch.cosine_similarity(*moved, dim=0) > 0.9 and (moved[0] != 0).float().mean() > 0.1
    check_three_steps(world, tiny, monkeypatch)
