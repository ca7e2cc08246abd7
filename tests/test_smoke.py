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

from conftest import ROOT, read_lines


def start(folder, **more):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the python that runs this test, activated or not
    return subprocess.Popen(["bash", "run.sh", "smoke"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "PATH": path, "RUN": str(folder), **more}, start_new_session=True,
                            # Tests that run in the background have inherited that Ctrl-C is ignored; a terminal's do not.
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def is_up(folder):
    address = urlsplit((Path(folder) / "server.url").read_text().strip())
    with socket.socket() as probe:
        return probe.connect_ex((address.hostname, address.port)) == 0


def test_smoke_run(tmp_path):
    begin = time.time()
    process = start(tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    assert time.time() - begin < 360, "three minutes on two idle cores; a busy machine may take twice that"
    assert not is_up(tmp_path), "the server must be down again"
    for name in ("personas.jsonl", "gold.jsonl", "base/conversations.jsonl", "base/selected.jsonl",
                 "main/1/model/model.safetensors", "no_reg/1/model/model.safetensors", "main/1/test/verdicts.jsonl",
                 "no_reg/1/test/log_probs.jsonl"):
        assert (tmp_path / name).exists(), name
    results = {(row["variant"], row["iteration"], row["metric"], row["condition"]): row
               for row in read_lines(tmp_path / "results.jsonl")}
    for variant in ("main", "no_reg"):
        assert results[variant, 1, "win_rate", ""]["n"] == 64
        assert results[variant, 1, "gold_log_prob_gain", "q_experimental"]["n"] == 64
        assert {"relevant_share", "question_share", "invented_facts"} <= {key[2] for key in results if key[:2] == (variant, 1)}
    positive, negative = (results["main", 0, "gold_log_prob", f"{c}_control"]["mean"] for c in ("positive", "negative"))
    assert positive > negative, "the base should make use of a persona that it is told"
    golds = read_lines(tmp_path / "gold.jsonl")
    assert len(golds) == 2 * 8 * 28 + 64 and all(row["gold"] and "refused" not in row for row in golds)
    # The model asks, and every kept conversation is the best of its pair.
    scores = {}
    for row in read_lines(tmp_path / "base/selected.scores.jsonl"):
        scores.setdefault((row["task_id"], row["persona_id"]), []).append(row["log_prob"])
    selected = read_lines(tmp_path / "base/selected.jsonl")
    assert len(selected) == 64 and all(row["gold_log_prob"] == max(scores[row["task_id"], row["persona_id"]]) for row in selected)
    settings = json.loads((tmp_path / "base/conversations.jsonl.settings.json").read_text())
    assert settings["roleplayer"] == "roleplayer" and settings["questioner"].startswith("base (")
    # Started again, it finds everything done.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    process = start(tmp_path, VARIANTS="main")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "trained already" in output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_ctrl_c_takes_the_server_down(tmp_path):
    process = start(tmp_path)
    while not (tmp_path / "gold.jsonl.settings.json").exists():   # somewhere in the middle of a stage
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    assert is_up(tmp_path)
    os.killpg(process.pid, signal.SIGINT)                         # what a terminal does on Ctrl-C
    process.communicate(timeout=30)
    assert process.returncode != 0
    time.sleep(0.5)
    assert not is_up(tmp_path)


def test_the_server_ends_when_run_sh_is_killed(tmp_path):
    process = start(tmp_path)
    while not (tmp_path / "server.url").exists() or not is_up(tmp_path):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    begin = time.time()
    while is_up(tmp_path):
        assert time.time() - begin < 10, "the server outlived run.sh"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)                        # the stage that was running
