"""A model behind a server that is not ours, `transformers serve`, gives what the same folder gives on this machine; and
settings/serve.sh, which starts such a server for a stage."""
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
import simulate
from conftest import ROOT, make_model, make_tokenizer, read_lines
from test_models import say_few_letters

SERVE = f"{sys.executable} -m transformers.cli.transformers serve --host 127.0.0.1 --device cpu --dtype float32"
ENV = {**os.environ, "SERVE": SERVE, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/nowhere", "OMP_NUM_THREADS": "1",
       "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random chat model that says few letters, and samples where it is not told otherwise."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "letters", make_tokenizer("mistral")
    model = make_model(len(tokenizer))
    say_few_letters(model, tokenizer)
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


def rows_and_cuts(path):
    """The rows of a file, and the keys of those where something was cut. To this server an answer whose end-of-turn
    token is the last one that it may say is cut, to us it is not."""
    rows = read_lines(path)
    assert not any("refused" in row for row in rows)
    return rows, {common.key_of(row) for row in rows if row.pop("cut", 0)}


def test_a_stage_with_its_own_server(run, world, folder, server):
    """Its conversations are those of the same model on this machine; once they are there, no server is needed."""
    Path(world.path("prompts")).mkdir()
    Path(world.path("prompts/elicitation.txt")).write_text("Ask {name} about: {task}")
    flags = [*world.command("simulate", folder, server.url), "--prompts", world.path("prompts"), "--samples", 1,
             "--temperature", 0, "--max-tokens", 24]
    run(simulate, *flags, "--output", world.path("1.jsonl"))
    port = free_port()
    for engine in SERVE, "/no/engine":
        stage = start(port, "python", "simulate.py", *flags, "--output", world.path("2.jsonl"), SERVE=engine)
        assert (stage.communicate(), stage.returncode)[1] == 0 and not running(port)
    (here, here_cut), (there, there_cut) = map(rows_and_cuts, (world.path("1.jsonl"), world.path("2.jsonl")))
    assert there == here and 0 < len(here_cut) < len(here) == 12 and here_cut <= there_cut
    assert {len(row["conversation"]) for row in here} == {2, 4, 6}
    assert len({str(row["conversation"]) for row in here}) > 8, "the model should say something else to each prompt"
    assert common.read_settings(world.path("2.jsonl"))["questioner"] == f"openai:{common.fingerprint(folder)}"


def test_a_commands_failure_comes_through(folder, tmp_path):
    output, port = tmp_path / "new/o", free_port()
    stage = start(port, "bash", "-c", 'echo "$@"; exit 7', "", "--questioner", folder, "--output", output)
    out, err = stage.communicate()
    assert out == f"--questioner openai:{folder}@http://127.0.0.1:{port}/v1 --output {output}\n" and not err
    assert stage.returncode == 7 and not running(port)


def test_a_signal_ends_the_command_and_the_server(folder, tmp_path):
    up, port = tmp_path / "up", free_port()
    job = start(port, "bash", "-c", f"sleep {port} & touch $0; wait", up, "--questioner", folder, "--output", f"{up}.o")
    while not up.exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.2)
    job.terminate()
    assert job.communicate(timeout=60) == ("", "") and job.returncode == 143 and not running(port)


@pytest.mark.parametrize("engine, why", [("", "set it"), ("false", "o.serve.log"), ("/no/engine", "o.serve.log")])
def test_what_goes_wrong_is_one_line(engine, why, folder, tmp_path):
    output = ["--output", tmp_path / "o"]
    stage = start(free_port(), "echo", "--questioner", folder, *output, SERVE=engine)
    out, err = stage.communicate(timeout=60)
    assert stage.returncode == 2 and not out and len(err.splitlines()) == 1 and why in err, err
    served = start(free_port(), "echo", "--questioner", "openai:m", *output, SERVE=engine)      # by somebody else
    assert served.communicate()[0] == f"--questioner openai:m --output {tmp_path}/o\n"
