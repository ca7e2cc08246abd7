"""Whatever goes wrong on the way: nothing is lost, nothing is paid for twice, nothing is silent.

Kills are real: a stage runs in a forked process (which saves the import of torch) and gets SIGKILL at a random moment.
"""
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

import common
import evaluate
import generate_personas
import gold
from conftest import ROOT, World, completion, load_stage, read_lines, save_model, write_rows

STAGES = ("generate_personas", "gold", "simulate", "select", "train", "evaluate")


def rows_of(world, name="out.jsonl"):
    return read_lines(world.path(name))


# ------------------------------------------------------------ refusals

def test_too_many_refusals_end_with_status_1_and_can_be_asked_again(run, world, server):
    server.reply = lambda request: (200, "" if "thing 2" in request["messages"][1]["content"] else "Gold.")
    flags = [*world.command("gold", None, server.url), "--max-refused"]
    _, err = run(gold, *flags, 0.24, status=1)
    assert "out.jsonl: 3 of 12 were refused (the last: empty (finish_reason stop)), more than --max-refused 0.24" in err
    assert len(rows_of(world)) == 12, "all was written"
    golds = common.read_gold(world.path("out.jsonl"))
    assert golds["A2", "Ap0"] is None and golds["A1", "Ap0"] == "Gold."
    run(gold, *flags, 0.24, status=1)
    run(gold, *flags, 0.25)
    assert len(server.requests) == 12
    server.reply = lambda request: (200, "Gold.")    # as the message says: without those lines, asked again
    path = Path(world.path("out.jsonl"))
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"refused"' not in line))
    assert "12 rows, 0 refused" in run(gold, *flags, 0)[0] and len(server.requests) == 15


def test_a_model_that_refuses_all_is_not_asked_25000_times(run, server, tmp_path):
    world = World(tmp_path, tasks=200)
    server.reply = lambda request: (200, completion("", "length"))
    _, err = run(gold, *world.command("gold", None, server.url), "--concurrency", 4, status=1)
    assert "100 of 100 were refused (the last: empty (finish_reason length))" in err and len(server.requests) < 120


def test_a_writer_whose_replies_are_no_personas_is_stopped_and_those_on_disk_say_nothing_of_another(run, world, server):
    """After a kill, or with more --attempts, the rejected ones are met first."""
    flags = [*world.command("generate_personas", None, server.url), "--splits", "A=20"]
    server.reply = lambda request: (200, "Sure! Here is a persona.")
    _, err = run(generate_personas, *flags, "--output", world.path("none.jsonl"), status=1)
    assert "20 of 20 replies could not be a persona" in err and "'no name': 20" in err and len(server.requests) == 20
    server.reply = lambda request: (200, f"I'm P{request['seed']}x." if request["seed"] % 5 < 1 else "Sure!")
    run(generate_personas, *flags, "--attempts", 1, status=1)
    server.reply = lambda request: (200, f"I'm P{request['seed']}x.")
    run(generate_personas, *flags)
    assert len(rows_of(world)) == 20


@pytest.mark.parametrize("name, flag", [("gold", "--oracle"), ("select", "--questioner")])
def test_a_prompt_that_is_too_long_is_a_refused_row(name, flag, run, world, tiny, server):
    small = save_model(world.folder / "small", room=100)
    flags = [*world.command(name, tiny, server.url), flag, small, "--dtype", "float32", "--max-refused", 1]
    run(load_stage(name), *flags)
    refused = [row["refused"] for row in rows_of(world) if "refused" in row]
    assert refused and all("too long: " in why and why.endswith("room for 100") for why in refused)


# ------------------------------------------------------------ a server that fails

@pytest.mark.parametrize("reply, refused", [
    (completion("Gold", "abort"), "abort (answer)"), (completion("Gold.", "content_filter"), "content_filter (answer)"),
    (completion("<think>\nHm.", "length"), "a thought without an answer: raise --max-tokens, or switch thinking off"),
    (completion("Gold.", refusal="half \ud83d"), "half ?"), (completion("\n "), "empty (finish_reason stop)"),
    (completion(None, None), "empty (finish_reason None)"), (completion("half \ud83d", usage="many"), None)])
def test_odd_replies_become_clean_rows(run, world, server, reply, refused):
    server.reply = lambda request: (200, reply)
    flags = [*world.command("gold", None, server.url), "--max-refused", 1]
    run(gold, *flags)
    assert {row.get("refused") for row in rows_of(world)} == {refused} and "\ufffd" not in str(rows_of(world))
    run(gold, *flags)
    assert len(server.requests) == 12


@pytest.mark.parametrize("body", [[], None, {}, {"choices": [{}]}])
def test_what_is_no_chat_completion_is_an_error_and_no_refusal(run, world, server, body):
    server.reply = lambda request: (200, body)
    _, err = run(gold, *world.command("gold", None, server.url), "--limit", 1, status=2)
    said = [line for line in err.splitlines() if "error: " in line]
    assert len(said) == 1 and "no chat completion" in said[0] and "Traceback" not in err
    assert len(server.requests) == 2 and not Path(world.path("out.jsonl")).exists()


# ------------------------------------------------------------ kills

def forked(stage, flags, log):
    """Starts a stage in a forked process and returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        import tqdm
        tqdm.tqdm.set_lock(threading.RLock())    # the parent's is shared, and might be killed while held
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [stage.__file__, *map(str, flags)]
        common.run(stage.main)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid, seconds=120):
    """The exit status of a process; it is killed when it takes too long."""
    end = time.monotonic() + seconds
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(done[1])


@pytest.fixture(scope="module")
def big(tmp_path_factory, tiny):
    """Inputs of every stage: 48 pairs in a split; and the evaluation of Q_BASE."""
    world = World(tmp_path_factory.mktemp("big"), tasks=16)
    write_rows(world.path("blue.jsonl"), world.conversations("test", word="blue"))
    pid = forked(evaluate, world.command("evaluate", tiny, output="e0"), world.path("log"))
    assert wait(pid) == 0, Path(world.path("log")).read_text()
    return world


def kill_flags(name, world, tiny, server, folder):
    """Flags with which a stage goes in small steps."""
    flags = world.judged(tiny, server.url, conversations="blue.jsonl") if name == "evaluate" else world.command(
        name, tiny, server.url)
    few = ["--concurrency", 2, "--batch-size", 4]
    return [*flags, *{
        "generate_personas": [*few, "--splits", "A=60"], "gold": few, "select": few,
        "simulate": [*few, "--batch-size", 2, "--samples", 1, "--max-turns", 2],
        "train": ["--lr", "1e-3", "--micro-batch-size", 2], "evaluate": [*few, "--results", folder / "results.jsonl"],
    }[name], "--output", folder / ("x" if name in ("train", "evaluate") else "x.jsonl")]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_killed_twice_ends_with_the_same_bytes(name, big, tiny, server, tmp_path, short):
    """Killed at two random moments; then it ends. What was under way is asked for again, and nothing else."""
    def reply(request):
        time.sleep(0.01)
        number = random.Random(request["seed"]).randrange(10 ** 9)
        return 200, f"Final Response: {'AB'[number % 2]}" if request["model"] == "j" else f"I'm Q{number}x. I run."
    server.reply = reply
    stage, begin, whole, killed = load_stage(name), time.monotonic(), tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    log, rng = tmp_path / "log", random.Random(name)
    assert wait(forked(stage, kill_flags(name, big, tiny, server, whole), log)) == 0, log.read_text()
    seconds, calls = time.monotonic() - begin, len(server.requests)
    server.requests.clear()
    flags = kill_flags(name, big, tiny, server, killed)
    for share in (1, 0.7):
        pid = forked(stage, flags, log)
        time.sleep(rng.random() * seconds * share)
        os.kill(pid, signal.SIGKILL)
        wait(pid)
    assert wait(forked(stage, flags, log)) == 0, log.read_text()
    assert contents(killed) == contents(whole)
    lost = 0.3 if name == "simulate" else 0.1                    # two blocks are under way there
    assert calls <= len(server.requests) <= (1 + lost) * calls + 2


ALONE = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1, wait_for_everyone=lambda: None)


def rows_at(path):
    return common.Rows(SimpleNamespace(seed=1, max_refused=0.05), str(path), ("a",), ALONE)


def test_leftovers_of_kills_at_the_worst_moments(tmp_path, monkeypatch):
    """Torn lines in parts, a merge that was cut off, a last line without its end in the finished file."""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    path = tmp_path / "x.jsonl"
    rows_at(path)
    for end, text in (("", '{"a": 1}\n{"a": 2}'), (f".part-{'0' * 32}", '{"a": 3}\n{"a": 9'), (".new", '{"a": 7}\n'),
                      (f".part-{'1' * 32}", '{"a": 3}\n{"a": 0}\n'), (".part-0-copy", "mine\n")):
        Path(f"{path}{end}").write_text(text)
    rows = rows_at(path)
    assert set(rows) == {(0,), (1,), (2,), (3,)}
    rows.add({"a": 4})
    rows.finish()
    assert read_lines(path) == [{"a": i} for i in range(5)] and not common.unfinished(path)
    assert (tmp_path / "x.jsonl.part-0-copy").read_text() == "mine\n", "it only looks like a part"


# ------------------------------------------------------------ lasting failures, Ctrl-C, disks, pipes

def test_a_server_that_fails_for_good_loses_no_answer_not_even_those_under_way(world, server, tmp_path):
    """And asks for nothing new. 12 calls, 4 at a time: the sixth fails while others are answered slowly."""
    answered = []

    def reply(request):
        if len(server.requests) == 6:
            return 401, {"error": {"message": "wrong key"}}
        time.sleep(0.5)
        answered.append(request)
        return 200, "Gold."
    server.reply = reply
    flags = [*world.command("gold", None, server.url), "--concurrency", 4]
    assert wait(forked(gold, flags, tmp_path / "log"), 10) == 2
    said = (tmp_path / "log").read_text()
    assert "wrong key" in said and "start again with the same flags: what is done is kept" in said
    assert said.count("error: ") == 1 and "Traceback" not in said
    part, = common.unfinished(world.path("out.jsonl"))
    assert len(read_lines(part)) == len(answered) == len(server.requests) - 1 < 10
    server.reply = lambda request: (200, "Gold.")
    assert wait(forked(gold, flags, tmp_path / "log")) == 0
    assert len(rows_of(world)) == 12 and len(server.requests) == 13


@pytest.mark.parametrize("name", ["gold", "simulate"])
def test_ctrl_c_is_one_line_and_keeps_what_is_done(name, world, tiny, server, short, tmp_path):
    """From the ninth request on the server answers none, until it is released."""
    release, flags = threading.Event(), [*world.command(name, tiny, server.url), "--concurrency", 4, "--batch-size", 4]
    server.reply = lambda request: (200, "Yes.") if len(server.requests) <= 8 or release.wait(20) else None
    pid = forked(load_stage(name), flags, tmp_path / "log")
    while len(server.requests) < 12:
        time.sleep(0.02)
    os.kill(pid, signal.SIGINT)
    assert wait(pid, 10) == 130
    release.set()
    said = (tmp_path / "log").read_text().splitlines()
    assert any(line.endswith("interrupted. What is done is kept: start again with the same flags.") for line in said)
    assert "Traceback" not in str(said) and read_lines(common.unfinished(world.path("out.jsonl"))[0])


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(world, server, tmp_path):
    server.reply = lambda request: (200, f"Gold {request['seed']} " + "and so on " * 60)
    flags, endless = [*world.command("gold", None, server.url), "--concurrency", 1], resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, endless))  # bytes of a file; the forked process inherits it
    pid = forked(gold, flags, tmp_path / "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (endless, endless))
    assert wait(pid) == 2 and "Traceback" not in (tmp_path / "full").read_text()
    said, = [line for line in (tmp_path / "full").read_text().splitlines() if "error: " in line]
    assert "File too large" in said and "what is done is kept" in said and 3 < len(server.requests) < 9
    assert not Path(world.path("out.jsonl")).exists()
    assert wait(forked(gold, flags, tmp_path / "log")) == 0
    assert len(server.requests) <= 12 + 2, "those that did not fit, and no others, are asked for again"
    assert wait(forked(gold, [*flags, "--output", world.path("whole.jsonl")], tmp_path / "log")) == 0
    assert rows_of(world) == rows_of(world, "whole.jsonl")


def test_a_reader_that_has_read_enough_gets_no_complaint():
    count = "import common; common.run(lambda: [print(i, flush=True) for i in range(10 ** 6)])"
    told = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} -c '{count}' | head -1"], cwd=ROOT,
                          capture_output=True)
    assert (told.returncode, told.stdout, told.stderr) == (141, b"0\n", b"")
