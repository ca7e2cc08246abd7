"""How much of AdamW's step bfloat16 loses, and what keeps it: the two tables of docs/precision.md.

    bash run.sh smoke && python benchmarks/precision.py         # train.py on toy/base; 3 times 1.5 minutes
    python benchmarks/precision.py --noise 1 3 10 30            # weights and gradients drawn at random; 15 seconds

The base is toy/base, saved in bfloat16 as published models are. Its rate is to the standard deviation of its matrices
as 2e-5 is to --std: bfloat16 is a floating-point format, so that about the same share of a step is lost as with a large
model of that standard deviation. Training: 3 epochs of all conversations of the smoke run, with Q_BASE's responses: 192
steps of 8 examples (the paper has 186 of 64). With --noise a weight's gradient is a constant, drawn once, plus fresh
noise in each of 186 steps, so many times larger.

    moves      share of the weights that a step of the whole rate would change if it were rounded to nearest
    share      of float32's fall of the mean loss over all examples
    slope      of the update (weights after - before) on float32's, by least squares; 1: nothing is lost
    cosine     between the two updates
    changed    share of the weights that are not what they were
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                   # the stages
import common  # noqa: E402
import train  # noqa: E402

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup  # noqa: E402

RATE = 2e-5                                                     # the published one
PRECISIONS = {                                                  # flags, and the launcher's mixed_precision
    "float32": (["--dtype", "float32"], "no"),
    "bfloat16, nearest": ([], "no"),
    "bfloat16, stochastic": (["--rounding", "stochastic"], "no"),
    "mixed": ([], "bf16")}


def show(update, full, **row):
    """Prints a row; update and float32's: vectors."""
    row.update(slope=(update @ full / (full @ full)).item(), changed=(update != 0).float().mean().item(),
               cosine=torch.cosine_similarity(update, full, dim=0).item())
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def noisy(std, noise, steps=186):
    """Weights N(0, std), gradients N(0, 1) + noise * N(0, 1)."""
    torch.manual_seed(0)
    start, gradient = (torch.randn(30_000) * std).bfloat16().float(), torch.randn(30_000)
    for name in list(PRECISIONS)[:3]:
        weights = torch.nn.Parameter(start.clone() if name == "float32" else start.bfloat16())
        optimizer = (train.StochasticAdamW if "stochastic" in name else torch.optim.AdamW)(
            [weights], lr=RATE, weight_decay=0.0, fused=True)
        optimizer.generator, draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        for _ in range(steps):
            weights.grad = (gradient + noise * torch.randn(30_000, generator=draws)).to(weights.dtype)
            optimizer.step()
            schedule.step()
        update = weights.detach().float() - start
        full = update if name == "float32" else full
        show(update, full, std=std, noise=noise, precision=name)


def trained(run, std, seed):
    """The stages as they are; the model in four precisions."""
    def stage(*command, mixed_precision="no"):
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True, env={
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_MIXED_PRECISION": mixed_precision})

    def state(path):
        """(mean loss, the matrices inside the blocks as one vector)."""
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        matrices = [p.detach().flatten() for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
        return train.mean_loss(Accelerator(cpu=True), model, examples, 16), torch.cat(matrices)

    with tempfile.TemporaryDirectory() as folder:
        base, selected = f"{folder}/base", f"{folder}/selected.jsonl"
        data = ["--tasks", f"{run}/tasks.jsonl", "--personas", f"{run}/personas.jsonl"]
        AutoModelForCausalLM.from_pretrained(ROOT / "toy/base", dtype=torch.bfloat16).save_pretrained(base)
        tokenizer = common.load_tokenizer(str(ROOT / "toy/base"))
        tokenizer.save_pretrained(base)
        stage("select.py", "--base", base, "--questioner", base, "--dtype", "float32", *data, "--k", 8,
              "--conversations", f"{run}/base/conversations.jsonl", "--gold", f"{run}/gold-A.jsonl", "--max-tokens", 64,
              "--output", selected)
        args = SimpleNamespace(selected=selected, tasks=data[1], personas=data[3], tasks_per_split=None, limit=None,
                               seed=0, target="response", split=["A"], max_length=2048, prompts=common.PROMPTS)
        examples = [example for pair in train.read_examples(args, tokenizer)[0].values() for example in pair]
        before, start = state(base)
        rate = RATE * start.std().item() / std
        for name, (flags, mixed_precision) in PRECISIONS.items():
            output = f"{folder}/{name}"
            stage("train.py", "--base", base, *data, "--selected", selected, "--output", output, "--lr", rate,
                  "--seed", seed, "--batch-size", 8, "--micro-batch-size", 8, "--epochs", 3, "--validation", 0,
                  *flags, mixed_precision=mixed_precision)
            after, weights = state(output)
            fall, update = before - after, weights - start
            whole, full = (fall, update) if name == "float32" else (whole, full)
            show(update, full, std=std, seed=seed, precision=name, fall=fall, share=fall / whole,
                 moves=(start.bfloat16() + rate != start).float().mean().item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    parser.add_argument("--std", type=float, nargs="+", default=[0.02, 0.01, 0.003], help="of a large model's weights")
    parser.add_argument("--run", default="runs/smoke", help="folder of a smoke run")
    parser.add_argument("--seed", type=int, nargs="+", default=[42], help="of the training")
    parser.add_argument("--noise", type=float, nargs="+", default=[], help="random weights and gradients instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for std in args.std:
        for noise in args.noise:
            noisy(std, noise)
        for seed in args.seed if not args.noise else ():
            trained(args.run, std, seed)
