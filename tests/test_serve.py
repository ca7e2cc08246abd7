"""A model behind a server that is not ours, `transformers serve`, gives what the same folder gives on this machine."""
import os
import socket
import string
import subprocess
import sys
import time
from urllib.request import urlopen

import openai
import pytest
import torch
from transformers import AutoTokenizer

import common
import gold
import simulate
from conftest import ROOT, make_model, make_tokenizer, read_lines, run_stage

GREEDY = ("--dtype", "float32", "--max-tokens", 24, "--tasks", ROOT / "data/tasks.jsonl", "--split", "A", "--limit", 12)
FOLD = ("--system", "fold")             # local models always do; this template knows no system role


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


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """`transformers serve` with the folder, offline, from its first answer to the module's end."""
    home = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--host", "127.0.0.1", "--port",
               address.rpartition(":")[2], "--device", "cpu", "--dtype", "float32"]
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


def written(run, world, stage, *flags):
    """The rows that a stage writes, and their keys where something was cut. To this server an answer whose end-of-turn
    token is the last one that it may say is cut, to us it is not."""
    output = world.path(f"{len(list(world.folder.iterdir()))}.jsonl")
    run(stage, *GREEDY, *world.flags("personas"), *flags, "--output", output)
    rows = read_lines(output)
    assert all(row.pop("usage")["completion_tokens"] > 0 for row in rows if "usage" in row)
    cut = {(*common.pair_of(row), row.get("sample")) for row in rows if row.pop("cut", 0)}
    return rows, cut


def test_gold_responses_are_those_of_the_same_model_on_this_machine(run, world, folder, url):
    local, local_cut = written(run, world, gold, "--oracle", folder)
    served, served_cut = written(run, world, gold, "--oracle", f"openai:{folder}@{url}", *FOLD)
    assert served == local and len(local) == 12 and not any("refused" in row for row in local)
    assert local_cut <= served_cut and 0 < len(local_cut) < 12
    assert len({row["gold"] for row in local}) > 8, "the model should say something else to each prompt"


def test_conversations_are_those_with_the_same_roleplayer_on_this_machine(run, world, folder, tiny, url):
    prompt = world.folder / "short.txt"
    prompt.write_text("Ask {name} about: {task}")
    flags = ["--questioner", tiny, "--samples", 2, "--limit", 6, "--elicitation-prompt", prompt]
    local, local_cut = written(run, world, simulate, *flags, "--roleplayer", folder)
    served, served_cut = written(run, world, simulate, *flags, "--roleplayer", f"openai:{folder}@{url}", *FOLD)
    assert served == local and local_cut <= served_cut
    assert {len(row["conversation"]) for row in local} == {2, 4, 6}
    answers = [turn["content"] for row in local for turn in row["conversation"] if turn["role"] == "user"]
    assert len(set(answers)) > 0.7 * len(answers)


def test_a_sampled_response_depends_on_its_seed_and_on_top_p(run, world, folder, url):
    """One request at a time: this server has one random generator for all."""
    def sampled(seed, *more):
        flags = ["--temperature", "0.9", "--seed", seed, "--concurrency", 1, *world.flags("tasks"), *FOLD, *more]
        rows, _ = written(run, world, gold, "--oracle", f"openai:{folder}@{url}", *flags)
        return [row["gold"] for row in rows]
    first, again, other = sampled(1), sampled(1), sampled(2)
    assert first == again and len(first) == 12 and sum(a == b for a, b in zip(first, other)) < 4
    assert sampled(1, "--top-p", "0.01") == sampled(2, "--temperature", "0")


def test_a_wrong_model_name_is_one_line(world, folder, url):
    flags = [*GREEDY, *world.flags("personas"), "--oracle", f"openai:another@{url}", "--output", world.path("g.jsonl")]
    _, err = run_stage("gold.py", *flags, status=2)
    assert len(err.splitlines()) == 1 and err.startswith(f"gold.py: error: openai:another at {url} refuses the request")
    assert f"pinned to '{folder}'; requested 'another'" in err


def test_the_server_counts_the_tokens_that_we_count(world, folder, url):
    """BOS once on both sides; `length` where an answer was cut."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reasons = set()
    with openai.OpenAI(base_url=url, api_key="none") as client:
        for persona in world.personas:
            chat = gold.oracle_chat(persona["persona"], "Help me.")
            answer = client.chat.completions.create(model=folder, messages=common.fold_system(chat), temperature=0,
                                                    max_tokens=9)
            ids = common.prompt_ids(tokenizer, chat)
            assert answer.usage.prompt_tokens == len(ids) and ids.count(tokenizer.bos_token_id) == 1
            assert answer.usage.completion_tokens <= 9
            if answer.choices[0].finish_reason == "length":
                assert answer.usage.completion_tokens == 9
            reasons.add(answer.choices[0].finish_reason)
    assert reasons == {"length", "stop"}
