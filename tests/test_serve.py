"""A model behind a server that is not ours, `transformers serve`, gives what the same folder gives on this machine; and
settings/serve.sh, which starts such a server for a stage."""
import os
import socket
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import gold
import simulate
from conftest import ROOT, make_model, make_tokenizer, read_lines

GREEDY = ("--dtype", "float32", "--max-tokens", 24, "--limit", 12)
FOLD = ("--system", "fold")             # local models always do; this template knows no system role
SERVE = f"{sys.executable} -m transformers.cli.transformers serve --host 127.0.0.1 --device cpu --dtype float32"
ENV = {**os.environ, "SERVE": SERVE, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/nowhere", "OMP_NUM_THREADS": "1",
       "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


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
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def start(port, *words, **env):
    return subprocess.Popen(["bash", ROOT / "settings/serve.sh", *map(str, words)], cwd=ROOT, text=True,
                            env={**ENV, "SERVE_PORT": port, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def running(word):
    lines = subprocess.getoutput("ps -ww -eo stat,args").splitlines()           # -ww: in full, into a pipe, too
    return [line for line in lines if word in line and line[0] != "Z"]


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """A server of the folder, offline, while a command sleeps. A signal at the module's end leaves neither."""
    up, port = tmp_path_factory.mktemp("serve") / "up", free_port()
    job = start(port, "bash", "-c", f"sleep {port} & touch $0; wait", up, "--questioner", folder, "--output", f"{up}.o")
    while not up.exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/v1"
    job.terminate()
    assert job.communicate(timeout=60) == ("", "") and job.returncode == 143 and not running(port)


def written(run, stage, flags, output, file=""):
    """The rows that a stage writes, and their keys where something was cut. To this server an answer whose end-of-turn
    token is the last one that it may say is cut, to us it is not."""
    run(stage, *flags, "--output", output)
    rows = read_lines(output + file)
    cut = {(*common.pair_of(row), row.get("sample")) for row in rows if row.pop("cut", 0)}
    assert not any("refused" in row for row in rows)
    return rows, cut


def gold_flags(world, *oracle):
    return [*GREEDY, *world.flags("personas"), "--tasks", "data/tasks.jsonl", "--split", "A", "--oracle", *oracle]


def test_gold_responses_are_those_of_the_same_model_on_this_machine(run, world, folder, url):
    here, here_cut = written(run, gold, gold_flags(world, folder), world.path("1.jsonl"))
    there, there_cut = written(run, gold, gold_flags(world, f"openai:{folder}@{url}", *FOLD), world.path("2.jsonl"))
    assert there == here and len(here) == 12 and here_cut <= there_cut and 0 < len(here_cut) < 12
    assert len({row["gold"] for row in here}) > 8, "the model should say something else to each prompt"


def test_a_stage_with_its_own_server(run, world, folder, server):
    """Its conversations are those of the same model on this machine; once they are there, no server is needed."""
    Path(world.path("prompts")).mkdir()
    Path(world.path("prompts/elicitation.txt")).write_text("Ask {name} about: {task}")
    flags = [*GREEDY, *FOLD, *world.flags("tasks", "personas"), "--prompts", world.path("prompts"), "--samples", 1,
             "--temperature", 0, "--questioner", folder, "--roleplayer", f"openai:r@{server.url}"]
    (here, here_cut), port = written(run, simulate, flags, world.path("1.jsonl")), free_port()
    for engine in SERVE, "/no/engine":
        stage = start(port, "python", "simulate.py", *flags, "--output", world.path("2.jsonl"), SERVE=engine)
        assert (stage.communicate(), stage.returncode)[1] == 0 and not running(port)
    there, there_cut = written(lambda *_: None, simulate, [], world.path("2.jsonl"))
    assert there == here and here_cut <= there_cut and {len(row["conversation"]) for row in here} == {2, 4, 6}
    assert common.read_settings(world.path("2.jsonl"))["questioner"] == f"openai:{common.fingerprint(folder)}"


def test_a_commands_failure_comes_through(folder, tmp_path):
    output, port = tmp_path / "new/o", free_port()
    stage = start(port, "bash", "-c", 'echo "$@"; exit 7', "", "--questioner", folder, "--output", output)
    out, err = stage.communicate()
    assert out == f"--questioner openai:{folder}@http://127.0.0.1:{port}/v1 --output {output}\n" and not err
    assert stage.returncode == 7 and not running(port)


@pytest.mark.parametrize("engine, why", [("", "set it"), ("false", "o.serve.log"), ("/no/engine", "o.serve.log")])
def test_what_goes_wrong_is_one_line(engine, why, folder, tmp_path):
    output = ["--output", tmp_path / "o"]
    stage = start(free_port(), "echo", "--questioner", folder, *output, SERVE=engine)
    out, err = stage.communicate(timeout=60)
    assert stage.returncode == 2 and not out and len(err.splitlines()) == 1 and why in err, err
    served = start(free_port(), "echo", "--questioner", "openai:m", *output, SERVE=engine)      # by somebody else
    assert served.communicate()[0] == f"--questioner openai:m --output {tmp_path}/o\n"
