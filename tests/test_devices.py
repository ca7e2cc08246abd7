"""Two real CPU processes (gloo) do what one does: simulate, select, evaluate and train."""
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import evaluate
import simulate
import train
from conftest import ROOT, make_tokenizer, read_lines, save_model, write_rows
from test_stages import evaluate_flags, select_flags, simulate_flags
from test_train import selected, train_flags

RATE = 1e-3                                                      # the first of three; then 3/4 and 1/4 of it
RUNNER = '''
import os
import sys
from unittest.mock import patch

import torch
from accelerate import Accelerator

import train


def main():
    """train.py, except that each process keeps what train.py does not print in a file of its own, named by the first
    argument: the texts of each forward pass, each step's gradients before clipping, and each step's sum of losses."""
    path = f"{sys.argv.pop(1)}-{os.environ.get('RANK', 0)}"
    kept = {"texts": [], "gradients": [], "sums": []}
    collate, clip, reduce = train.collate, Accelerator.clip_grad_norm_, Accelerator.reduce

    def keep_texts(examples, pad, device):
        if torch.is_grad_enabled():                              # not those that are held out
            kept["texts"].append([ids for ids, _ in examples])
        return collate(examples, pad, device)

    def keep_gradients(self, parameters, *more):
        parameters = list(parameters)
        kept["gradients"].append([weight.grad.clone() for weight in parameters])
        return clip(self, parameters, *more)

    def keep_sums(self, total, *more):
        total = reduce(self, total, *more)
        if total.ndim == 0:
            kept["sums"].append(total.item())
        return total

    with (patch.object(train, "collate", keep_texts), patch.object(Accelerator, "clip_grad_norm_", keep_gradients),
          patch.object(Accelerator, "reduce", keep_sums)):
        train.main()
    torch.save(kept, path)


if __name__ == "__main__":
    main()
'''


def run_two(script, *flags):
    """Runs a script as two processes, and returns what they printed (stdout, stderr)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
           "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([*command, *map(str, flags)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{script} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def same_files(world, one, two):
    for a, b in zip(one, two):
        assert open(world.path(a), "rb").read() == open(world.path(b), "rb").read(), f"{a} and {b}"


def test_two_processes_simulate_as_one_and_ask_the_roleplayer_once(run, world, tiny, server):
    server.reply = lambda request: (200, f"Answer {request['seed']}.")
    run(simulate, *simulate_flags(world, tiny, server, output="one.jsonl"), "--batch-size", 15)
    alone = Counter(request["seed"] for request in server.requests)
    server.requests.clear()
    out, _ = run_two("simulate.py", *simulate_flags(world, tiny, server, output="two.jsonl"), "--batch-size", 15)
    same_files(world, ["one.jsonl", "one.jsonl.settings.json"], ["two.jsonl", "two.jsonl.settings.json"])
    rows = read_lines(world.path("two.jsonl"))
    assert len(rows) == 36 and out.count("36 conversations, 0 refused") == 1
    assert Counter(request["seed"] for request in server.requests) == alone
    assert len(alone) == alone.total() == sum(len(row["conversation"]) // 2 for row in rows), "each answer, once"


def test_two_processes_write_personas_and_golds_as_one(run, world, tiny, monkeypatch):
    """By a local model; its texts are made up, since a random model says no names."""
    (world.folder / "runner.py").write_text("""
import random, sys
from unittest.mock import patch
import common, generate_personas, gold

def say(self, requests, temperature, top_p, max_tokens, skip=(), share=common.OneProcess):
    for i in [i for i in range(len(requests)) if i not in skip][share.process_index::share.num_processes]:
        yield i, common.Reply(f"I'm P{random.Random(requests[i].seed).randrange(9)}x. I run.")

def main():
    stage = {"generate_personas": generate_personas, "gold": gold}[sys.argv.pop(1)]
    with patch.object(common.LocalModel, "generate", say):
        stage.main()

if __name__ == "__main__":
    main()
""")
    spec = importlib.util.spec_from_file_location("runner", world.folder / "runner.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    for name, flags in (("generate_personas", ["--model", tiny, "--splits", "A=4,test=3", "--attempts", 60]),
                        ("gold", ["--oracle", tiny, *world.flags("tasks", "personas"), "--split", "A", "test"])):
        more = [name, *flags, "--dtype", "float32", "--output"]
        out, _ = run(runner, *more, world.path(f"{name}-one.jsonl"))
        two, _ = run_two(world.folder / "runner.py", *more, world.path(f"{name}-two.jsonl"))
        files = [""] if name == "gold" else ["", ".replies"]
        same_files(world, [f"{name}-one{file}.jsonl" for file in files], [f"{name}-two{file}.jsonl" for file in files])
        assert out.splitlines()[-1].replace("-one", "-two") == two.splitlines()[-1]
    assert "asked again" in run(runner, "generate_personas", "--model", tiny, "--splits", "A=4,test=3", "--dtype", "float32",
                                "--attempts", 60, "--output", world.path("again.jsonl"))[0]


def test_two_processes_select_as_one(run, world, tiny, select_stage):
    write_rows(world.path("c.jsonl"), world.conversations("A", n=3))
    small = ["--score-tokens", 600, "--batch-size", 2]          # 16 batches of scores and 6 of responses, dealt evenly
    run(select_stage, *select_flags(world, tiny, "one.jsonl"), *small)
    out, err = run_two("select.py", *select_flags(world, tiny, "two.jsonl"), *small)
    same_files(world, ["one.jsonl", "one.scores.jsonl", "one.jsonl.settings.json"],
               ["two.jsonl", "two.scores.jsonl", "two.jsonl.settings.json"])
    assert len(read_lines(world.path("two.scores.jsonl"))) == 36 and out.count("12 conversations kept") == 1
    # The bars count the first process's rows twice: each process did its half, and not all of them.
    assert "| 36/36 [" in err and "| 12/12 [" in err


def test_two_processes_evaluate_as_one_and_ask_the_judge_once(run, world, tiny, server):
    for name, word in (("e0", "red"), ("e1", "blue"), ("two", "blue")):
        write_rows(world.path(f"{name}.jsonl"), world.conversations("test", word=word))
    run(evaluate, *evaluate_flags(world, tiny, "e0", "--iteration", 0))
    server.reply = lambda request: (200, "Final Response: " + "AB"[request["seed"] % 2])
    judged = ["--iteration", 1, "--baseline", world.path("e0"), "--judge", f"openai:j@{server.url}", "--both-orders"]
    run(evaluate, *evaluate_flags(world, tiny, "e1", *judged))
    results = open(world.path("results.jsonl")).read()
    assert len(server.requests) == 24
    out, _ = run_two("evaluate.py", *evaluate_flags(world, tiny, "two", *judged))
    assert len(server.requests) == 48 and out.count("Win rate against Q_BASE") == 1
    files = ["log_probs.jsonl", "responses.jsonl", "verdicts.jsonl"]
    same_files(world, [f"e1/{file}" for file in files], [f"two/{file}" for file in files])
    assert open(world.path("results.jsonl")).read() == results, "the same means, in the same rows"


def by_hand(world, rows, tokenizer):
    """{ids: labels} of the rows' training examples, from strings of Mistral's format."""
    names, tasks = ({row[f"{what}_id"]: row for row in rows_of} for what, rows_of in (
        ("persona", world.personas), ("task", world.tasks)))
    examples = {}
    for row in rows:
        task = tasks[row["task_id"]]["task"]
        said = [turn["content"] for turn in row["conversation"]] + [row["response"]]
        said[-2] += f"\n\n{task}"
        heard = [f"My name is {names[row['persona_id']]['name']}.\n\n{task}", *said[1::2]]
        ids, labels = [tokenizer.bos_token_id], [-100]
        for user, assistant in zip(heard, said[::2], strict=True):
            for text, learned in ((f"[INST] {user} [/INST]", False), (f" {assistant}</s>", True)):
                new = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids, labels = ids + new, labels + (new if learned else [-100] * len(new))
        examples[tuple(ids)] = labels
    return examples


def loss_by_hand(model, batch, labels):
    """Mean over all supervised tokens of a batch: plain transformers, one text at a time, no padding, no mask."""
    total = sum(F.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[ids][1:]),
                                ignore_index=-100, reduction="sum") for ids in batch)
    return total / sum(label != -100 for ids in batch for label in labels[ids])


def train_by_hand(base, batches, held_out, labels):
    """Each step's loss, the first step's gradients before clipping, the weights, and the numbers train.py prints."""
    model, losses, norms, gradients = AutoModelForCausalLM.from_pretrained(base), [], [], None
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    before = loss_by_hand(model, held_out, labels).item()
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = loss_by_hand(model, batch, labels)
        loss.backward()
        gradients = gradients or [weight.grad.clone() for weight in model.parameters()]
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.step()
    after = loss_by_hand(model, held_out, labels).item()
    return losses, gradients, list(model.parameters()), [losses[0], losses[-1], before, after, norms[0], norms[-1]]


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


def test_devices_and_accumulation_change_nothing_in_training(run, world, tmp_path):
    """Batches of 8 as 1 process x 8, 1 process x accumulation 8, and 2 processes x accumulation 4; and by hand."""
    base, tokenizer = save_model(tmp_path / "base"), make_tokenizer("mistral")
    rows = [{**row, "gold_log_prob": -1.0, "response": "So " * (11 * i % 17) + "on."}
            for i, row in enumerate(world.conversations("A"))][:23]
    write_rows(world.path("s.jsonl"), rows)
    (tmp_path / "runner.py").write_text(RUNNER)
    spec = importlib.util.spec_from_file_location("runner", tmp_path / "runner.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)

    def flags(name, micro):
        return [world.path(f"{name}.kept"), *train_flags(world, base, name), "--lr", RATE, "--warmup", 0, "--epochs", 1,
                "--micro-batch-size", micro, "--validation", 0.1]

    printed = {"whole": run(runner, *flags("whole", 8))[0], "one": run(runner, *flags("one", 1))[0],
               "two": run_two(tmp_path / "runner.py", *flags("two", 1))[0]}
    shapes = {"whole": "8 x accumulation 1 x 1", "one": "1 x accumulation 8 x 1", "two": "1 x accumulation 4 x 2"}
    for name, shape in shapes.items():
        assert "19 examples + 4 held out" in printed[name] and f"batch 8 = {shape} processes; 3 steps" in printed[name]
    kept = {name: torch.load(world.path(name)) for name in ("whole.kept-0", "one.kept-0", "two.kept-0", "two.kept-1")}
    models = {name: list(AutoModelForCausalLM.from_pretrained(world.path(name)).parameters()) for name in shapes}

    labels = by_hand(world, rows, tokenizer)
    batches = [list(map(tuple, texts)) for texts in kept["whole.kept-0"]["texts"]]
    assert [len(batch) for batch in batches] == [8, 8, 3], "the last one leaves some micro-batches empty"
    assert all(len({len(ids) for ids in batch}) > 1 for batch in batches)
    supervised = [sum(label != -100 for ids in batch for label in labels[ids]) for batch in batches]
    losses, gradients, weights, numbers = train_by_hand(base, batches, set(labels).difference(*batches), labels)
    for process in kept.values():
        for expected in (gradients, kept["whole.kept-0"]["gradients"][0]):
            check_gradients(process["gradients"][0], expected)
        means = [total / count for total, count in zip(process["sums"], supervised, strict=True)]
        assert means == pytest.approx(losses, rel=1e-5)
    for name in shapes:
        for expected in (weights, models["whole"]):
            check_weights(models[name], expected)
        summary = printed[name].split(": 3 steps, ")[-1]
        assert list(map(float, re.findall(r"\d+\.\d+", summary))) == pytest.approx(numbers, abs=1e-3)


def test_two_processes_train_one_model(run, world, tmp_path):
    """Without accumulation, for two epochs: the same numbers and weights as one process with the same global batch."""
    base = save_model(tmp_path / "base")
    selected(world)
    one, _ = run(train, *train_flags(world, base, "one", "--micro-batch-size", 4))
    two, _ = run_two("train.py", *train_flags(world, base, "two", "--micro-batch-size", 4))
    assert "4 x accumulation 1 x 2 processes" in two
    summary = lambda text: text.split(": 4 steps, ")[-1].strip()
    assert summary(one) == summary(two)
    a, b = (AutoModelForCausalLM.from_pretrained(world.path(name)).state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=5e-5) for name in a)
