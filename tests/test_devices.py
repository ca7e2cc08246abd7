"""Two real CPU processes (gloo) do what one does: the stages write the same bytes, and training the same weights."""
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

import common
import train
from conftest import ROOT, load_stage, make_tokenizer, read_lines, save_model, write_rows
from test_train import selected, train_flags

RATE = 1e-3                                                      # the first of three; then 3/4 and 1/4 of it


def made_up(self, requests, temperature, top_p, max_tokens, skip=(), share=slice(None)):
    """What a local model says that says names, as a random one does not."""
    for key in [key for key in requests if key not in skip][share]:
        yield key, common.Reply(f"I'm P{random.Random(requests[key].seed).randrange(9)}x. I run.")


def run_stages(commands):
    """Runs stages, [(name, flags)], one after the other in this process, as their command lines would."""
    with pytest.MonkeyPatch.context() as patch:
        for name, flags in commands:
            stage = load_stage(name)
            patch.setattr(sys, "argv", [stage.__file__, *map(str, flags)])
            with patch.context() as invented:
                if name in ("generate_personas", "gold"):
                    invented.setattr(common.LocalModel, "generate", made_up)
                stage.main()


def run_training(path, flags):
    """train.py, except that each process keeps what it does not print in a file of its own: the texts of each forward
    pass, each step's gradients before clipping, and each step's sum of losses."""
    kept = {"texts": [], "gradients": [], "sums": []}
    collate, clip, reduce = train.collate, Accelerator.clip_grad_norm_, Accelerator.reduce

    def keep_texts(examples, device):
        if torch.is_grad_enabled():                              # not those that are held out
            kept["texts"].append([ids for ids, _ in examples])
        return collate(examples, device)

    def keep_gradients(self, parameters, *more):
        parameters = list(parameters)
        kept["gradients"].append([weight.grad.clone() for weight in parameters])
        return clip(self, parameters, *more)

    def keep_sums(self, total, *more):
        kept["sums"].append(reduce(self, total, *more))
        return kept["sums"][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "collate", keep_texts)
        patch.setattr(Accelerator, "clip_grad_norm_", keep_gradients)
        patch.setattr(Accelerator, "reduce", keep_sums)
        run_stages([("train", flags)])
    torch.save(kept, f"{path}-{os.environ.get('RANK', 0)}")


def run_two(function, *given):
    """Calls one of these functions in two processes, and returns what they printed (stdout, stderr)."""
    call = f"import json, sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import test_devices as t; "
    path = Path(given[0][0][1][-1] + ".py" if function is run_stages else f"{given[0]}.py")
    path.write_text(f"{call} t.{function.__name__}(*json.loads({json.dumps(json.dumps(given, default=str))}))")
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", path],
                          cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def test_two_processes_write_in_all_stages_what_one_writes(world, tiny, server, capfd):
    """The bytes of all rows and settings, the means, and what is printed; nothing is asked twice."""
    server.reply = lambda request: (200, "Final Response: " + "AB"[request["seed"] % 2] if request["model"] == "j" else
                                    f"Answer {request['seed']}.")
    write_rows(world.path("talks.jsonl"), world.conversations("A", n=3))
    write_rows(world.path("blue.jsonl"), world.conversations("test", word="blue"))
    selected(world)
    run_stages([("evaluate", world.command("evaluate", tiny, output="e0"))])
    results, files = {}, [
        "simulate.jsonl", "simulate.jsonl.settings.json", "personas.jsonl", "personas.replies.jsonl", "gold.jsonl", "select.jsonl",
        "select.scores.jsonl", "select.jsonl.settings.json", "evaluate/log_probs.jsonl", "evaluate/responses.jsonl",
        "evaluate/verdicts.jsonl"]

    def commands(folder):
        local = ["--dtype", "float32", "--output"]
        return [
            ("simulate", [*world.command("simulate", tiny, server.url), "--batch-size", 4, "--output", f"{folder}/simulate.jsonl"]),
            ("generate_personas", ["--model", tiny, "--splits", "A=4,test=3", "--attempts", 60, *local,
                                   f"{folder}/personas.jsonl"]),
            ("gold", ["--oracle", tiny, *world.flags("tasks", "personas"), "--split", "A", *local, f"{folder}/gold.jsonl"]),
            ("select", [*world.command("select", tiny), "--batch-size", 2, "--output", f"{folder}/select.jsonl"]),
            ("evaluate", [*world.judged(tiny, server.url, conversations="blue.jsonl"), "--both-orders", "--batch-size", 4,
                          "--output", f"{folder}/evaluate"]),
            ("train", [*train_flags(world, tiny, "x"), "--micro-batch-size", 4, "--output", f"{folder}/model"])]

    for name, start in (("one", run_stages), ("two", lambda commands: run_two(run_stages, commands))):
        server.requests.clear()
        capfd.readouterr()
        (world.folder / name).mkdir()
        out, err = start(commands(world.path(name))) or capfd.readouterr()
        asked = Counter((request["model"], request["seed"]) for request in server.requests)
        assert set(asked.values()) == {1} and Counter(model for model, _ in asked)["j"] == 24
        results[name] = (asked, read_lines(world.path("results.jsonl")), {
            file: (world.folder / name / file).read_bytes() for file in files}, out.replace(f"/{name}/", "/").replace(
                "on 2 processes", "on 1 processes"))
    assert results["one"] == results["two"]
    assert "| 18/18 [" in err and "| 6/6 [" in err, "each scores and answers its half"
    assert b"name taken" not in results["one"][2]["personas.jsonl"] and results["one"][2]["personas.replies.jsonl"].count(b"\n") > 7
    a, b = (AutoModelForCausalLM.from_pretrained(world.path(f"{name}/model")).state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=5e-5) for name in a)


def loss_by_hand(model, batch, labels):
    """Mean over all supervised tokens of a batch: plain transformers, one text at a time, no padding, no mask."""
    total = sum(F.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[ids][1:]),
                                ignore_index=-100, reduction="sum") for ids in batch)
    return total / sum(label != -100 for ids in batch for label in labels[ids])


def train_by_hand(base, batches, held_out, labels):
    """Each step's loss, the first step's gradients before clipping, the weights, and the numbers train.py prints."""
    model, losses, gradients = AutoModelForCausalLM.from_pretrained(base), [], None
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    before = loss_by_hand(model, held_out, labels).item()
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = loss_by_hand(model, batch, labels)
        loss.backward()
        gradients = gradients or [weight.grad.clone() for weight in model.parameters()]
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.step()
    after = loss_by_hand(model, held_out, labels).item()
    return losses, gradients, list(model.parameters()), [losses[0], losses[-1], before, after]


def check_gradients(ours, theirs):
    """float32: within 1e-5 of the largest gradient, of each weight matrix by itself."""
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-3 and (a - b).abs().max() <= 1e-5 * b.abs().max()


def check_weights(ours, theirs):
    """What Adam allows: a step moves a weight by about the rate, however small its gradient, and where that is nearly 0
    rounding may choose the sign: at most twice the sum of the rates apart, and 999 of 1000 a thousandth of that sum."""
    apart = torch.cat([(a - b).detach().abs().flatten() for a, b in zip(ours, theirs, strict=True)])
    rates = RATE * (1 + 3 / 4 + 1 / 4)
    assert apart.max() <= 2 * rates and (apart <= rates / 1000).float().mean() >= 0.999


def test_devices_and_accumulation_change_nothing_in_training(world, tmp_path, capfd):
    """Batches of 8 as 1 process x 8, 1 process x accumulation 8 (with gradient checkpointing), and 2 processes x
    accumulation 4; and by hand."""
    base, tokenizer = save_model(tmp_path / "base"), make_tokenizer("mistral")
    rows = [{**row, "gold_log_prob": -1.0, "response": "So " * (11 * i % 17) + "on."}
            for i, row in enumerate(world.conversations("A"))][:23]
    write_rows(world.path("s.jsonl"), rows)
    shapes, printed = {"whole": (1, 8), "one": (1, 1), "two": (2, 1)}, {}
    for name, (processes, micro) in shapes.items():
        given = world.path(f"{name}.kept"), [*train_flags(world, base, name), "--lr", RATE, "--warmup", 0, "--epochs", 1,
                                             "--micro-batch-size", micro, "--validation", 0.1,
                                             *["--gradient-checkpointing"] * (name == "one")]
        printed[name], _ = run_two(run_training, *given) if processes == 2 else run_training(*given) or capfd.readouterr()
        assert f"; 3 steps of 8, on {processes} processes {micro} at a time" in printed[name]
        assert "19 examples + 4 held out" in printed[name]
    kept = {name: torch.load(world.path(name)) for name in ("whole.kept-0", "one.kept-0", "two.kept-0", "two.kept-1")}
    models = {name: list(AutoModelForCausalLM.from_pretrained(world.path(name)).parameters()) for name in shapes}

    tasks, personas = common.read_tasks(world.path("tasks.jsonl")), common.read_personas(world.path("personas.jsonl"))
    labels = {}
    for row in rows:
        chat = train.example_chat(personas[row["persona_id"]]["name"], tasks[row["task_id"]]["task"], row["conversation"],
                                  row["response"])
        labels.update((tuple(ids), labels) for ids, labels in common.training_examples(tokenizer, chat))
    batches = [list(map(tuple, texts)) for texts in kept["whole.kept-0"]["texts"]]
    assert [len(batch) for batch in batches] == [8, 8, 3]
    seen = [ids for rank in (0, 1) for texts in kept[f"two.kept-{rank}"]["texts"] for ids in texts]
    assert len(seen) == 19 + 1, "3 texts in 4 parts: one stands in two, and counts once, as the sums and gradients show"
    assert all(len({len(ids) for ids in batch}) > 1 for batch in batches)
    supervised = [sum(label != -100 for ids in batch for label in labels[ids]) for batch in batches]
    losses, gradients, weights, numbers = train_by_hand(base, batches, set(labels).difference(*batches), labels)
    for process in kept.values():
        for expected in (gradients, kept["whole.kept-0"]["gradients"][0]):
            check_gradients(process["gradients"][0], expected)
        means = [total.item() / count for total, count in zip(process["sums"][1:-1], supervised, strict=True)]
        assert means == pytest.approx(losses, rel=1e-5)         # (before and after them: those that are held out)
    for name in shapes:
        for expected in (weights, models["whole"]):
            check_weights(models[name], expected)
        summary = printed[name].split(": 3 steps, ")[-1]
        assert list(map(float, re.findall(r"\d+\.\d+", summary))) == pytest.approx(numbers, abs=1e-3)
