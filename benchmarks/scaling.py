"""How each stage's time and memory grow with the number of pairs (x1, x2, x4), in the embedded world; and how long a
finished file of 125,000 conversations takes to be resumed.

    python benchmarks/scaling.py              # a table, and a row for each run in runs/scaling.jsonl

Memory is the largest that the process held, with torch and the model. `a pair` is (x4 - x2) / the pairs between them:
what starting costs is not in it. Linear is a growth from x2 to x4 that is twice the one from x1 to x2.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                   # the stages
import common  # noqa: E402


def run(script, *flags):
    """(seconds, MiB at most) of one stage; what it says is shown where it fails."""
    with tempfile.TemporaryFile() as said:
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            said.seek(0)
            sys.exit(f"{script} ended with {os.waitstatus_to_exitcode(status)}:\n{said.read().decode()[-2000:]}")
        return time.perf_counter() - begin, usage.ru_maxrss // (1024 if sys.platform == "linux" else 2 ** 20)


def stages(folder, url, pairs):
    """(stage, seconds, MiB) of one pass through the pipeline with so many pairs, 10 conversations each."""
    here = folder / str(pairs)
    rows = ["--tasks", folder / "tasks.jsonl", "--personas", folder / "personas.jsonl"]
    golds, base = ["--gold", folder / "gold.jsonl"], ["--base", ROOT / "toy/base", "--dtype", "float32"]
    limit, asks = ["--limit", pairs], ["--max-tokens", 64, "--concurrency", 8]
    talk = ["--dtype", "float32", "--temperature", 1, "--top-p", 1, "--questioner", ROOT / "toy/base"]
    questioner = ["--questioner", ROOT / "toy/base"]
    conversations = ["--conversations", here / "c.jsonl"]
    yield "gold", *run("gold.py", *rows, *limit, "--oracle", f"openai:oracle@{url}", "--split", "A", *asks,
                       "--output", here / "g.jsonl")
    yield "simulate", *run("simulate.py", *rows, *limit, *talk, "--roleplayer", f"openai:roleplayer@{url}", *asks,
                           "--output", here / "c.jsonl")
    yield "select", *run("select.py", *rows, *golds, *base, *questioner, *conversations, "--max-tokens", 64,
                         "--output", here / "s.jsonl")
    yield "train", *run("train.py", *rows, *base, "--selected", here / "s.jsonl", "--batch-size", 8,
                        "--micro-batch-size", 8, "--epochs", 3, "--output", here / "model")
    yield "evaluate", *run("evaluate.py", *rows, *golds, *base, *questioner, *conversations, "--iteration", 0,
                           "--split", "A", "--max-tokens", 64, "--results", here / "r.jsonl", "--output", here / "e")


def resume(folder, tasks, personas):
    """(seconds, MiB) of simulate.py where tasks x personas x 10 conversations of 2 kB are there already."""
    texts = {"tasks": [{"task_id": f"A{i:03d}", "split": "A", "task": f"How do I do {i}?"} for i in range(tasks)],
             "personas": [{"persona_id": f"A{j:02d}", "split": "A", "name": f"N{j}", "persona": f"I am {j}."}
                          for j in range(personas)]}
    for name, rows in texts.items():
        (folder / f"many-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--tasks", folder / "many-tasks.jsonl", "--personas", folder / "many-personas.jsonl", "--dtype", "float32",
             "--questioner", ROOT / "toy/base", "--roleplayer", ROOT / "toy/base", "--max-tokens", 1]
    output = folder / "many.jsonl"
    run("simulate.py", *flags, "--limit", 1, "--output", output)                # for its settings
    turn = {"assistant": "word " * 60, "user": "answer " * 50}
    conversation = [{"role": role, "content": turn[role]} for _ in range(3) for role in turn]
    with open(output, "w") as file:
        for task in texts["tasks"]:
            for persona in texts["personas"]:
                inputs = common.digest(task["task"], persona["name"], persona["persona"])
                file.writelines(json.dumps({
                    "task_id": task["task_id"], "persona_id": persona["persona_id"], "sample": sample, "split": "A",
                    "turns": 3, "conversation": conversation, "inputs": inputs}) + "\n" for sample in range(10))
    return run("simulate.py", *flags, "--output", output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=56, help="of the smallest run")
    parser.add_argument("--finished", type=int, nargs=2, default=(250, 50), metavar=("TASKS", "PERSONAS"),
                        help="pairs of the finished file, 10 conversations each")
    parser.add_argument("--output", default="runs/scaling.jsonl")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    rows, counts = [], [args.pairs, 2 * args.pairs, 4 * args.pairs]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        server = subprocess.Popen([sys.executable, ROOT / "toy/server.py", "--port", "0", "--port-file", folder / "url",
                                   "--end-with-parent"])
        try:
            while not (folder / "url").exists() or not (folder / "url").read_text():
                if server.poll() is not None:
                    sys.exit("toy/server.py has ended")
                time.sleep(0.1)
            url = (folder / "url").read_text().strip()
            run("toy/world.py", "--output", folder / "tasks.jsonl", "--tasks-per-split", 28)
            run("generate_personas.py", "--model", f"openai:persona-writer@{url}", "--splits", "A=28", "--output",
                folder / "personas.jsonl")
            run("gold.py", "--tasks", folder / "tasks.jsonl", "--personas", folder / "personas.jsonl", "--split", "A",
                "--oracle", f"openai:oracle@{url}", "--output", folder / "gold.jsonl")
            for pairs in counts:
                rows += [{"stage": stage, "pairs": pairs, "seconds": round(seconds, 2), "MiB": memory}
                         for stage, seconds, memory in stages(folder, url, pairs)]
        finally:
            server.terminate()
            server.wait()
        print(f"{'stage':<12}" + "".join(f"{n:>8} pairs{'':>9}" for n in counts) +
              f"{'a pair':>12}{'growth x2-x4 / x1-x2':>24}")
        for stage in dict.fromkeys(row["stage"] for row in rows):
            (a, m), (b, n), (c, k) = [(row["seconds"], row["MiB"]) for row in rows if row["stage"] == stage]
            print(f"{stage:<12}" + "".join(f"{s:>8.1f} s {mib:>6} MiB{'':>3}" for s, mib in ((a, m), (b, n), (c, k))) +
                  f"{1e3 * (c - b) / (2 * args.pairs):>9.1f} ms{(c - b) / (b - a):>24.2f}")
        seconds, memory = resume(folder, *args.finished)
        pairs = args.finished[0] * args.finished[1]
        rows.append({"stage": "simulate, finished", "pairs": pairs, "seconds": round(seconds, 2), "MiB": memory})
        print(f"simulate.py on a finished file of {10 * pairs:,} conversations: {seconds:.1f} s, {memory} MiB")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
