"""A model behind a server that is not ours, `transformers serve`, gives what the same folder gives on this machine."""
import os
import socket
import string
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

import common
import results
import evaluate
import gold
import simulate
from conftest import ROOT, make_model, make_tokenizer, read_lines
from test_models import answers, local

GREEDY = ("--dtype", "float32", "--max-tokens", 24, "--limit", 12)
FOLD = ("--system", "fold")             # local models always do; this template knows no system role
SERVE = (sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--device", "cpu", "--dtype",
         "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random chat model that says small letters alone, and samples where it is not told otherwise."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "letters", make_tokenizer("mistral")
    model = make_model(len(tokenizer), seed=3)
    said = tokenizer.convert_tokens_to_ids([*string.ascii_lowercase, ".", ",", "Ġ", tokenizer.eos_token])
    with torch.no_grad():                                        # the best of those 30 has a logit above 0
        model.lm_head.weight[[i for i in range(len(tokenizer)) if i not in said]] = 0
    model.generation_config.eos_token_id, model.generation_config.do_sample = tokenizer.eos_token_id, True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """`transformers serve` with the folder, offline, from its first answer to the module's end."""
    home = tmp_path_factory.mktemp("serve")
    address = f"http://127.0.0.1:{free_port()}"
    command = [*SERVE, folder, "--port", address.rpartition(":")[2]]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(home), "OMP_NUM_THREADS": "1"}
    with open(home / "log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        begin = time.time()
        while not is_up(address):
            assert process.poll() is None and time.time() - begin < 120, (home / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield address + "/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_up(address):
    try:
        return urlopen(address + "/health", timeout=5).status == 200
    except OSError:
        return False


def written(run, stage, flags, output, file=""):
    """The rows that a stage writes, and their keys where something was cut. To this server an answer whose end-of-turn
    token is the last one that it may say is cut, to us it is not."""
    run(stage, *flags, "--output", output)
    rows = read_lines(output + file)
    assert not any("refused" in row for row in rows)
    cut = {(*common.pair_of(row), row.get("sample")) for row in rows if row.pop("cut", 0)}
    return rows, cut


def gold_flags(world, *more):
    return [*GREEDY, *world.flags("personas"), "--tasks", ROOT / "data/tasks.jsonl", "--split", "A", *more]


def test_gold_responses_are_those_of_the_same_model_on_this_machine(run, world, folder, url):
    here, here_cut = written(run, gold, gold_flags(world, "--oracle", folder), world.path("1.jsonl"))
    there, there_cut = written(run, gold, gold_flags(world, "--oracle", f"openai:{folder}@{url}", *FOLD), world.path("2.jsonl"))
    assert there == here and len(here) == 12 and here_cut <= there_cut and 0 < len(here_cut) < 12
    assert len({row["gold"] for row in here}) > 8, "the model should say something else to each prompt"


def test_conversations_with_a_served_questioner_and_roleplayer(run, world, folder, url, short):
    flags = [*GREEDY, *world.flags("tasks", "personas"), "--samples", 1, "--limit", 6, "--temperature", 0]
    served = f"openai:{folder}@{url}"
    (here, here_cut), (there, there_cut) = (
        written(run, simulate, [*flags, "--questioner", model, "--roleplayer", model, *FOLD], world.path(f"{i}.jsonl"))
        for i, model in ((1, folder), (2, served)))
    assert there == here and here_cut <= there_cut and {len(row["conversation"]) for row in here} == {2, 4, 6}
    texts = [turn["content"] for row in here for turn in row["conversation"]]
    assert len(set(texts)) > 0.7 * len(texts)
    assert common.read_settings(world.path("2.jsonl"))["questioner"] == f"openai:{common.fingerprint(folder)}"


def test_responses_of_a_served_questioner(run, world, folder, url, select_stage):
    """In select.py and evaluate.py; scores and the choice are Q_BASE's, on this machine."""
    for stage, name, file in ((select_stage, "select", ""), (evaluate, "evaluate", "/responses.jsonl")):
        flags = [*world.command(name, folder), *GREEDY]
        here, here_cut = written(run, stage, flags, world.path(f"{name}-1"), file)
        there, there_cut = written(run, stage, [*flags, "--questioner", f"openai:{folder}@{url}"], world.path(f"{name}-2"), file)
        assert there == here and len(here) == 12 and here_cut <= there_cut and len({row["response"] for row in here}) > 8


def test_a_sampled_response_depends_on_its_seed_and_on_top_p(run, world, folder, url):
    """One request at a time: this server has one random generator for all."""
    def sampled(seed, *more):
        flags = gold_flags(world, "--temperature", "0.9", "--seed", seed, "--concurrency", 1, *world.flags("tasks"), *FOLD, *more)
        rows, _ = written(run, gold, [*flags, "--oracle", f"openai:{folder}@{url}"], world.path(f"{len(os.listdir(world.folder))}"))
        return [row["gold"] for row in rows]
    first, again, other = sampled(1), sampled(1), sampled(2)
    assert first == again and len(first) == 12 and sum(a == b for a, b in zip(first, other)) < 4
    assert sampled(1, "--top-p", "0.01") == sampled(2, "--temperature", "0")


def test_a_wrong_model_name_is_one_line(run, world, folder, url):
    flags = gold_flags(world, "--oracle", f"openai:another@{url}", "--limit", 1)
    _, err = run(gold, *flags, "--output", world.path("g.jsonl"), status=2)
    lines = [line for line in err.splitlines() if line and "gold responses:" not in line]        # the bar's
    assert len(lines) == 1 and lines[0].startswith(f"gold.py: error: openai:another@{url}: ")
    assert f"pinned to '{folder}'; requested 'another'" in lines[0]


def processes_with(*words):
    """The command lines of all processes that have these words."""
    def command(process):
        try:
            return (process / "cmdline").read_text().split("\0")
        except OSError:                                          # it has just ended
            return []
    return [line for line in map(command, Path("/proc").glob("[0-9]*")) if set(words) <= set(line)]


def test_run_sh_serves_each_questioner_and_leaves_no_server(tmp_path):
    """One small iteration with SERVE: each Q_t is served from its folder, answers as it does on this machine, and is gone
    afterwards. (This server samples only where a checkpoint's generation_config says so, which toy/base's does not.)"""
    port, here = str(free_port()), tmp_path / "run"
    serve = tmp_path / "serve"
    serve.write_text(f"#!/bin/sh\necho \"$1\" >> {tmp_path}/served\nexec {' '.join(SERVE)} \"$@\"\n")
    serve.chmod(0o755)
    env = {**os.environ, "SERVE": str(serve), "SERVE_PORT": port, "RUN": str(here), "HF_HUB_CACHE": str(tmp_path),
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LIMIT": "3", "VARIANTS": "main", "ITERATIONS": "1"}
    done = subprocess.run(["bash", "run.sh", "smoke"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    model = f"{here}/main/1/model"
    assert (tmp_path / "served").read_text().split() == ["toy/base", model], "each once, one after the other"
    begin = time.time()
    while processes_with(port, "--port"):
        assert time.time() - begin < 20, "a server is left behind"
        time.sleep(0.1)
    tasks, personas = common.read_tasks(here / "tasks.jsonl"), common.read_personas(here / "personas.jsonl")
    for folder, spec, output in (("base", "toy/base", here / "base"), ("model", model, here / "main/1")):
        for file in ("test.jsonl", "test/responses.jsonl"):
            assert common.read_settings(output / file)["questioner"].startswith(f"openai:{folder} (")
        talks = {common.key_of(row): row["conversation"] for row in read_lines(output / "test.jsonl")}
        rows = read_lines(output / "test/responses.jsonl")
        forms = [common.response_form(personas[row["persona_id"]]["name"], tasks[row["task_id"]]["task"], talks[common.key_of(row)])
                 for row in rows]
        replies = answers(local(ROOT / spec), [common.Request(form) for form in forms], 0.0, 1.0, 64)
        assert [row["response"] for row in rows] == [reply.text for reply in replies] and len(rows) == 3
    assert {row["iteration"] for row in results.read_results(here / "results.jsonl")} == {0, 1}
    assert "not a pid" not in done.stderr
