"""The smoke run by its real command."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from common import pair_of
from conftest import ROOT, read_lines


def start(folder, **more):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the python that runs this test, activated or not
    log = open(folder / "log", "a")
    return subprocess.Popen(["bash", "run.sh", "smoke"], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                            env={**os.environ, "PATH": path, "RUN": str(folder), "SAMPLES": "4",
                                 "TEST_SAMPLES": "4", "VARIANTS": "main", **more},      # a part of it: time
                            # Tests that run in the background have inherited that Ctrl-C is ignored; a terminal's do not.
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def is_up(folder):
    address = urlsplit((Path(folder) / "server.url").read_text().strip())
    with socket.socket() as probe:
        return probe.connect_ex((address.hostname, address.port)) == 0


def test_smoke_run(tmp_path):
    """With Ctrl-C in the middle."""
    process = start(tmp_path)
    while not (tmp_path / "base/selected.jsonl.settings.json").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    assert is_up(tmp_path)
    os.killpg(process.pid, signal.SIGINT)                         # what a terminal does
    assert process.wait(timeout=30) != 0
    time.sleep(0.5)
    assert not is_up(tmp_path), "Ctrl-C takes the server down"
    log = tmp_path / "log"
    before = len(log.read_text())
    process = start(tmp_path)
    process.wait(timeout=600)
    output = log.read_text()
    assert process.returncode == 0 and "Traceback" not in output and "arning" not in output, output[-3000:]
    assert "personas, attempt" in output[:before] and "personas, attempt" not in output[before:], "what is done is kept"
    assert not is_up(tmp_path), "the server must be down again"
    for name in ("base/conversations.jsonl", "main/1/model/model.safetensors", "main/1/test/verdicts.jsonl",
                 "main/1/test/log_probs.jsonl"):
        assert (tmp_path / name).exists(), name
    results = {(row["variant"], row["iteration"], row["metric"], row["condition"]): row
               for row in read_lines(tmp_path / "results.jsonl")}
    assert results["main", 1, "win_rate", ""]["n"] == 64
    assert results["main", 1, "gold_log_prob_gain", "q_experimental"]["n"] == 64
    assert {"relevant_share", "question_share", "invented_facts"} <= {key[2] for key in results if key[:2] == ("main", 1)}
    positive, negative = (results["main", 0, "gold_log_prob", f"{c}_control"]["mean"] for c in ("positive", "negative"))
    assert positive > negative, "the base should make use of a persona that it is told"
    assert "Does it hold in" in output
    golds = read_lines(tmp_path / "gold-A.jsonl") + read_lines(tmp_path / "gold-test.jsonl")
    assert len(golds) == 8 * 28 + 64 and all(row["gold"] and "refused" not in row for row in golds)
    # Every kept conversation is the best of its pair.
    scores = {}
    for row in read_lines(tmp_path / "base/selected.scores.jsonl"):
        scores.setdefault(pair_of(row), []).append(row["log_prob"])
    selected = read_lines(tmp_path / "base/selected.jsonl")
    assert len(selected) == 64 and all(row["gold_log_prob"] == max(scores[pair_of(row)]) for row in selected)
    settings = json.loads((tmp_path / "base/conversations.jsonl.settings.json").read_text())
    assert settings["roleplayer"] == "openai:roleplayer" and settings["questioner"].startswith("base (")


def test_the_server_ends_when_run_sh_is_killed(tmp_path):
    process = start(tmp_path)
    while not (tmp_path / "personas.jsonl.settings.json").exists() or not is_up(tmp_path):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    process.kill()
    begin = time.time()
    while is_up(tmp_path):
        assert time.time() - begin < 10, "the server outlived run.sh"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)                        # the stage that was running
