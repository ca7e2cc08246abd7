"""The smoke run by its real command, as a newcomer starts it, with fewer samples; and what README.md says of it."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from conftest import ROOT, read_lines


def start(folder):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the python that runs this test, activated or not
    log = open(folder / "log", "a")
    return subprocess.Popen(["bash", "run.sh", "smoke"], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                            env={**os.environ, "PATH": path, "RUN": str(folder), "SAMPLES": "4", "TEST_SAMPLES": "2"},
                            # Tests in the background have inherited that Ctrl-C is ignored; a terminal's do not.
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, (path.parent / "log").read_text()
        time.sleep(0.05)


def is_up(folder):
    address = urlsplit((folder / "server.url").read_text().strip())
    with socket.socket() as probe:
        return probe.connect_ex((address.hostname, address.port)) == 0


def is_down_soon(folder):
    return any(not is_up(folder) or time.sleep(0.1) for _ in range(100))


def test_smoke_run(tmp_path):
    """With Ctrl-C in the middle."""
    process, log = start(tmp_path), tmp_path / "log"
    wait_for(tmp_path / "base/test.jsonl.settings.json", process)
    assert is_up(tmp_path)
    os.killpg(process.pid, signal.SIGINT)                         # what a terminal does
    assert process.wait(timeout=30) != 0
    assert is_down_soon(tmp_path), "Ctrl-C takes the server down"
    before = len(log.read_text())
    process = start(tmp_path)
    process.wait(timeout=600)
    output = log.read_text()
    assert process.returncode == 0 and "Traceback" not in output and "arning" not in output, output[-3000:]
    assert "personas, attempt" in output[:before] and "personas, attempt" not in output[before:], "what is done is kept"
    assert is_down_soon(tmp_path) and "Does it hold in" in output and (tmp_path / "report/index.html").exists()

    results = {(row["variant"], row["iteration"], row["metric"], row["condition"]): row
               for row in read_lines(tmp_path / "results.jsonl")}
    models = ("main", 0), ("main", 1), ("no_reg", 1)
    relevant, asks = ([results[variant, t, metric, ""]["mean"] for variant, t in models]
                      for metric in ("relevant_share", "question_share"))
    assert min(relevant[1:]) > 1.3 * relevant[0], "the trained models ask for facts that matter"
    assert asks[0] < 0.5 > asks[1] and asks[2] > 0.5, "no_reg answers with one more question"
    wins = [results[variant, 1, "win_rate", ""]["mean"] for variant in ("main", "no_reg")]
    assert wins[0] > 0.5 > 0.35 > wins[1], "the judge prefers main's answers, and not no_reg's"
    nats = {key: row["mean"] for key, row in results.items() if key[0] == "main" and key[2] == "gold_log_prob"}
    experimental = nats.pop(("main", 1, "gold_log_prob", "q_experimental"))
    positive = nats.pop(("main", 0, "gold_log_prob", "positive_control"))
    assert positive > experimental > max(nats.values()), "the gold is more probable than in all other conditions"
    assert {row["n"] for row in results.values()} == {64}


def test_the_server_ends_when_run_sh_is_killed(tmp_path):
    process = start(tmp_path)
    wait_for(tmp_path / "personas.jsonl.settings.json", process)  # a stage is running
    process.kill()
    assert is_down_soon(tmp_path), "the server outlived run.sh"
    os.killpg(process.pid, signal.SIGKILL)                        # and the stage
