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

import pytest

from common import pair_of
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


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of a smoke run that nothing disturbed, and its seconds."""
    folder, begin = tmp_path_factory.mktemp("smoke"), time.time()
    process = start(folder)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return folder, time.time() - begin


def test_smoke_run(smoke):
    tmp_path, seconds = smoke
    assert seconds < 400, "under two minutes on two idle cores; a busy machine may take more than twice that"
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


def test_a_smoke_run_in_which_thirty_percent_of_the_calls_fail(smoke, tmp_path):
    """Smaller than the other: the pairs of a smaller --limit are among those of a larger one."""
    faults = {"429": 0.08, "500": 0.08, "dropped": 0.06, "stalled": 0.01, "torn": 0.05, "empty": 0.01,
              "filtered_prompt": 0.005, "filtered_answer": 0.005}
    process = start(tmp_path, FAULTS=json.dumps(faults), LIMIT="12", VARIANTS="main",
                    SERVER_FLAGS="--timeout 2 --max-refused 0.3")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    before = {row["persona_id"]: row for row in read_lines(smoke[0] / "personas.jsonl")}
    same = {row["persona_id"] for row in read_lines(tmp_path / "personas.jsonl") if row == before[row["persona_id"]]}
    assert len(same) >= len(before) - 4, "whom a filter refuses is drawn anew"
    refusals = 0
    for file in ("gold.jsonl", "base/conversations.jsonl", "base/test.jsonl"):
        undisturbed = {(*pair_of(row), row.get("sample")): row for row in read_lines(smoke[0] / file)}
        rows = read_lines(tmp_path / file)
        refused = [row for row in rows if "refused" in row]
        refusals += len(refused)
        assert len(rows) == (36 if file == "gold.jsonl" else 96)
        assert f"{file}: {len(rows)} " in output and f", {len(refused)} refused" in output.split(f"{file}: ")[1]
        for row in rows:
            if "refused" not in row and row["persona_id"] in same:
                assert row == undisturbed[(*pair_of(row), row.get("sample"))]
    assert refusals > 0 and (tmp_path / "main/1/test/verdicts.jsonl").exists()


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
