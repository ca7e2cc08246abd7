"""Whatever goes wrong on the way: nothing is lost, nothing is paid for twice, nothing is silent.

Kills are real: each stage runs in a forked process (which saves the import of torch) and gets SIGKILL at a random moment.
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
import results
import evaluate
import generate_personas
import gold
import simulate
import train
from conftest import ROOT, World, load_stage, read_lines, run_stage, save_model, write_rows

STAGES = ("generate_personas", "gold", "simulate", "select", "train", "evaluate")


def rows_of(world, name="out.jsonl"):
    return read_lines(world.path(name))


# ------------------------------------------------------------ calls, tokens, dollars

@pytest.mark.parametrize("name", ["generate_personas", "gold", "simulate", "select", "evaluate"])
def test_a_dry_run_tells_the_calls_and_what_they_cost_and_leaves_nothing(name, run, world, tiny, server, short):
    flags, stage = world.command(name, tiny, server.url), load_stage(name)
    if name == "evaluate":
        run(evaluate, *world.command("evaluate", tiny, output="e0"))
        flags = world.judged(tiny, server.url)
    if name == "select":
        flags += ["--questioner", f"openai:m@{server.url}"]
    before = sorted(world.folder.rglob("*"))
    out, _ = run(stage, *flags, "--dry-run", "--prices", 1000, 1000, status=0)
    assert sorted(world.folder.rglob("*")) == before and not server.requests
    server.reply = lambda request: (200, f"I'm P{request['seed']}x. I run." if name == "generate_personas" else "A")
    run(stage, *flags)
    calls, most_in, most_out = (int(text.split()[-1].replace(",", "")) for text in (
        out.split(" calls")[0], out.split(" tokens in")[0], out.split(" out")[0]))
    assert f": ${(most_in + most_out) / 1000:,.2f}" in out and calls == len(server.requests)
    assert most_out == sum(request["max_tokens"] for request in server.requests)
    length = sum(len(message["content"]) for request in server.requests for message in request["messages"]) // 4
    assert most_in == length if name in ("generate_personas", "gold") else most_in > 0
    if name not in ("select", "evaluate"):                        # what is there is not counted
        status = None if name == "generate_personas" else 0
        assert " calls" not in run(stage, *flags, "--dry-run", status=status)[0]


def test_a_dry_run_knows_the_limits_of_other_arguments(run, world, server):
    flags = [*world.command("gold", None, server.url), "--dry-run", "--extra"]
    assert "10,800 out" in run(gold, *flags, '{"max_tokens": null, "max_completion_tokens": 900}', status=0)[0]


# ------------------------------------------------------------ refusals

def test_too_many_refusals_end_with_status_1_and_can_be_asked_again(run, world, server):
    server.reply = lambda request: (200, "" if "thing 2" in request["messages"][1]["content"] else "Gold.")
    flags = [*world.command("gold", None, server.url), "--max-refused"]
    _, err = run(gold, *flags, 0.24, status=1)
    assert "out.jsonl: 3 of 12 were refused (the last: empty (finish_reason stop)), more than --max-refused 0.24" in err
    assert len(rows_of(world)) == 12, "all was written"
    run(gold, *flags, 0.24, status=1)
    run(gold, *flags, 0.25)
    assert len(server.requests) == 12
    server.reply = lambda request: (200, "Gold.")                 # as the message says: without those lines, asked again
    path = Path(world.path("out.jsonl"))
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"refused"' not in line))
    assert "12 rows, 0 refused" in run(gold, *flags, 0)[0] and len(server.requests) == 15


def answer(content="Gold.", reason="stop", usage=None, **message):
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage, "choices": [
        {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, **message}}]}


def test_a_model_that_refuses_all_is_not_asked_25000_times(run, server, tmp_path):
    world = World(tmp_path, tasks=200)
    server.reply = lambda request: (200, answer("", "length"))
    for stage, more in ((gold, ()), (generate_personas, ("--splits", "A=150"))):
        server.requests.clear()
        flags = world.command(stage.__name__, None, server.url, f"of_{stage.__name__}.jsonl")
        _, err = run(stage, *flags, *more, "--concurrency", 4, status=1)
        assert "100 of 100 were refused (the last: empty (finish_reason length))" in err and len(server.requests) < 120


@pytest.mark.parametrize("name, flag, room", [
    ("generate_personas", "--model", 300), ("gold", "--oracle", 300), ("simulate", "--roleplayer", 300),
    ("select", "--questioner", 100), ("evaluate", "--questioner", 100)])
def test_a_prompt_that_is_too_long_is_a_refused_row(name, flag, room, run, world, tiny, server, short):
    small = save_model(world.folder / "small", room=room)
    flags = [*world.command(name, tiny, server.url), flag, small, "--dtype", "float32", "--max-refused", 1]
    _, err = run(load_stage(name), *flags, *{"generate_personas": ["--attempts", 1]}.get(name, []),
                 status=1 if name == "generate_personas" else None)
    path = {"generate_personas": "out.replies.jsonl", "evaluate": "out/responses.jsonl"}.get(name, "out.jsonl")
    refused = [row["refused"] for row in rows_of(world, path) if "refused" in row]
    assert refused and all("too long: " in why and why.endswith(f"room for {room}") for why in refused), err


def test_an_answer_that_outgrows_the_context_is_a_refused_conversation(run, world, tiny, server, short):
    server.reply = lambda request: (200, "Well, " * (900 if "I'm Ann" in request["messages"][1]["content"] else 1))
    run(simulate, *world.command("simulate", tiny, server.url), "--max-refused", 0.5)
    long = [row for row in rows_of(world) if row["persona_id"] == "Ap0" and row["turns"] > 1]
    assert long and [row for row in rows_of(world) if "refused" in row] == long
    assert all(row["refused"].startswith("assistant, turn 2: ") and "room for 4096" in row["refused"] for row in long)


# ------------------------------------------------------------ a server that fails

PASSING = {"429": 0.1, "500": 0.1, "dropped": 0.08, "stalled": 0.02}                       # 30 %
LASTING = {"empty": 0.03, "filtered_prompt": 0.03, "filtered_answer": 0.03}


@pytest.fixture
def toy(monkeypatch):
    """The toy server's module."""
    monkeypatch.syspath_prepend(ROOT / "toy")
    import server
    return server


@pytest.fixture
def faulty(toy):
    """start(shares) -> the toy server with these faults, in this process."""
    started = []

    def start(shares):
        http = toy.Server(("127.0.0.1", 0), toy.Handler)
        http.faults, http.stall = toy.Faults(shares), 1.5
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        started.append(http)
        return http
    yield start
    for http in started:
        http.shutdown()


def toy_flags(stage, http, folder, output):
    url = f"http://127.0.0.1:{http.server_port}/v1"
    people = ["--model", f"openai:persona-writer@{url}", "--splits", "A=6"]
    files = ["--tasks", folder / "t.jsonl", "--personas", folder / "p.jsonl", "--split", "A"]
    talk = ["--questioner", ROOT / "toy/base", "--roleplayer", f"openai:roleplayer@{url}", "--dtype", "float32", "--samples",
            2, "--max-tokens", 16, "--max-turns", 1]
    return {generate_personas: people, gold: ["--oracle", f"openai:oracle@{url}", *files], simulate: [*talk, *files]}[stage] + [
        "--output", folder / output, "--timeout", 1, "--max-refused", 0.6]


def test_thirty_percent_of_passing_faults_change_nothing(run, faulty, tmp_path):
    run_stage("toy/world.py", "--output", tmp_path / "t.jsonl", "--tasks-per-split", 5)
    good, bad = faulty({}), faulty(PASSING)
    for stage, name in ((generate_personas, "p"), (gold, "g"), (simulate, "c")):
        run(stage, *toy_flags(stage, good, tmp_path, f"{name}.jsonl"))
        run(stage, *toy_flags(stage, bad, tmp_path, f"{name}-bad.jsonl"))
        assert (tmp_path / f"{name}-bad.jsonl").read_text() == (tmp_path / f"{name}.jsonl").read_text()
    out, _ = run(gold, *toy_flags(gold, faulty({**PASSING, **LASTING}), tmp_path, "worse.jsonl"))
    rows, fewer = read_lines(tmp_path / "g.jsonl"), read_lines(tmp_path / "worse.jsonl")
    refused = [row for row in fewer if "refused" in row]
    assert len(rows) == len(fewer) and f"{len(refused)} refused" in out and refused
    assert [row for row, other in zip(rows, fewer) if "refused" not in other] == [row for row in fewer if "refused" not in row]
    asked = bad.faults.asked.values()
    assert 0.15 < 1 - len(asked) / (sum(asked) + len(asked)) < 0.45, "the share of requests that were repeated"


def test_faults_are_seeded_shares(toy):
    shares = {"429": 0.2, "torn": 0.1, "empty": 0.1}
    draws = [[toy.Faults(shares, seed).draw(b"%d" % i) for i in range(4000)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for kind, expected in (("429", 0.2), ("torn", 0.1), ("empty", 0.7 * 0.1), ("500", 0)):
        assert abs(draws[0].count(kind) / 4000 - expected) < 0.02, kind
    faults = toy.Faults(shares)
    again = [[faults.draw(b"x%d" % i) for _ in range(8)] for i in range(300)]
    empties = [occasions for occasions in again if "empty" in occasions]
    assert empties and all("empty" in occasions and None not in occasions for occasions in empties), "refusals last"
    assert any(occasions[0] == "429" and None in occasions for occasions in again), "the others pass"
    for wrong in ('{"tornado": 0.1}', '{"429": 1.1}', '{"429": "a"}', '{"429": 0.9, "500": 0.9}', "3", "[1]"):
        with pytest.raises(toy.argparse.ArgumentTypeError, match="shares of 429"):
            toy.fault_shares(wrong)


@pytest.mark.parametrize("reply, refused", [
    (answer(refusal="No."), "No."), (answer(content="\n "), "empty (finish_reason stop)"),
    (answer(reason="content_filter"), "content_filter (answer)"), (answer(content=None, reason=None), "empty (finish_reason None)"),
    (answer(reason=None), None), (answer(content="half \ud83d"), None),
    (answer(refusal="half \ud83d"), "half ?"), (answer(usage={"prompt_tokens": 10 ** 400, "completion_tokens": None}), None),
    (answer() | {"usage": "many"}, None)])
def test_odd_replies_become_clean_rows(run, world, server, reply, refused):
    server.reply = lambda request: (200, reply)
    flags = [*world.command("gold", None, server.url), "--max-refused", 1, "--prices", 1, 1]
    run(gold, *flags)
    assert {row.get("refused") for row in rows_of(world)} == {refused} and "�" not in str(rows_of(world))
    run(gold, *flags)
    assert len(server.requests) == 12


@pytest.mark.parametrize("body", [[], None, ["text"], {}, {"choices": []}, {"choices": {"a": 1}}, {"choices": [{}]},
                                  {"error": {"message": "busy"}}])
def test_what_is_no_chat_completion_is_an_error_and_no_refusal(run, world, server, body):
    server.reply = lambda request: (200, body)
    _, err = run(gold, *world.command("gold", None, server.url), "--limit", 1, status=2)
    said = [line for line in err.splitlines() if "error: " in line]
    assert len(said) == 1 and "sends what is no chat completion" in said[0] and "Traceback" not in err
    assert len(server.requests) == 1 and not Path(world.path("out.jsonl")).exists()


# ------------------------------------------------------------ kills

def forked(stage, flags, log, limit=None):
    """Starts a stage in a forked process and returns its id. limit: on the size of its files, in bytes."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        import tqdm
        tqdm.tqdm.set_lock(threading.RLock())                     # the parent's is shared, and might be killed while held
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
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
        "generate_personas": [*few, "--splits", "A=60"], "gold": few, "simulate": [*few, "--batch-size", 2, "--samples", 1, "--max-turns", 2], "select": few,
        "train": ["--lr", "1e-3", "--micro-batch-size", 2], "evaluate": [*few, "--results", folder / "results.jsonl"],
    }[name], "--output", folder / ("x" if name in ("train", "evaluate") else "x.jsonl")]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_twice(stage, flags, folder, undisturbed, seconds, rng):
    """Kills the stage at two random moments and lets it end; returns how often it was hit."""
    folder.mkdir()
    hits, left, log = 0, seconds, folder.parent / "log"
    for _ in range(2):
        pid = forked(stage, flags, log)
        time.sleep(rng.random() * left)
        os.kill(pid, signal.SIGKILL)
        hits += wait(pid) == -signal.SIGKILL
        left *= 0.7
    assert wait(forked(stage, flags, log)) == 0, log.read_text()
    assert contents(folder) == undisturbed
    return hits


def check_kills(name, repetitions, seed, big, tiny, server, tmp_path):
    def reply(request):
        time.sleep(0.01)
        number = random.Random(request["seed"]).randrange(10 ** 9)
        return 200, f"Final Response: {'AB'[number % 2]}" if request["model"] == "j" else f"I'm Q{number}x. I run."
    server.reply = reply
    stage, begin, folder = load_stage(name), time.monotonic(), tmp_path / "whole"
    folder.mkdir()
    assert wait(forked(stage, kill_flags(name, big, tiny, server, folder), tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    seconds, calls, undisturbed = time.monotonic() - begin, len(server.requests), contents(folder)
    rng, hits = random.Random(seed), 0
    for k in range(repetitions):
        server.requests.clear()
        flags = kill_flags(name, big, tiny, server, tmp_path / str(k))
        hits += kill_twice(stage, flags, tmp_path / str(k), undisturbed, seconds, rng)
        lost = 0.3 if name == "simulate" else 0.1                # two blocks are under way there
        assert calls <= len(server.requests) <= (1 + lost) * calls + 2, f"{len(server.requests)} calls instead of {calls}"
    assert hits >= repetitions or repetitions < 3, "most kills should hit"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_killed_twice_ends_with_the_same_bytes(name, big, tiny, server, tmp_path, short):
    check_kills(name, 1, name, big, tiny, server, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_twenty_kills(name, big, tiny, server, tmp_path, short):
    check_kills(name, 10, f"{name}, often", big, tiny, server, tmp_path)


ALONE = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1, wait_for_everyone=lambda: None)


def rows_at(path):
    return common.Rows(SimpleNamespace(dry_run=False, max_refused=0.05), str(path), ("a",), ALONE)


def test_leftovers_of_kills_at_the_worst_moments(tmp_path, monkeypatch):
    """Torn lines in parts, a merge that was cut off, a last line without its end in the finished file."""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    path = tmp_path / "x.jsonl"
    rows_at(path)
    path.write_text('{"a": 1}\n{"a": 2}')
    (tmp_path / "x.jsonl.part-00000000000000000000000000000000").write_text('{"a": 3}\n{"a": 9')
    (tmp_path / "x.jsonl.new").write_text('{"a": 7}\n')
    (tmp_path / "x.jsonl.part-10000000000000000000000000000000").write_text('{"a": 3}\n{"a": 0}\n')
    rows = rows_at(path)
    assert set(rows) == {(0,), (1,), (2,), (3,)}
    rows.add({"a": 4})
    rows.finish()
    assert read_lines(path) == [{"a": i} for i in range(5)] and not common.unfinished(path)


def test_files_that_only_look_like_parts_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    (tmp_path / "x.jsonl.part-0-copy-2").write_text("mine\n")
    rows = rows_at(tmp_path / "x.jsonl")
    rows.add({"a": 99})
    rows.finish()
    assert read_lines(tmp_path / "x.jsonl") == [{"a": 99}] and (tmp_path / "x.jsonl.part-0-copy-2").read_text() == "mine\n"


# ------------------------------------------------------------ lasting failures, Ctrl-C, disks

def said_in(log):
    """The one line with which a stage ended."""
    said = [line for line in log.read_text().splitlines() if "error: " in line]
    assert len(said) == 1 and "Traceback" not in log.read_text(), log.read_text()
    return said[0]


@pytest.mark.parametrize("stage", [gold, generate_personas])
def test_a_server_that_fails_for_good_loses_no_answer_not_even_those_under_way(stage, world, server, tmp_path):
    """And asks for nothing new. 12 calls, 4 at a time: the sixth fails while others are answered slowly."""
    answered = []

    def reply(request):
        if len(server.requests) == 6:
            return 401, {"error": {"message": "wrong key"}}
        time.sleep(0.5)
        answered.append(request)
        return 200, f"I'm P{request['seed']}x."
    server.reply = reply
    flags = [*world.command(stage.__name__, None, server.url), "--concurrency", 4]
    flags += ["--splits", "A=12"] if stage is generate_personas else []
    assert wait(forked(stage, flags, tmp_path / "log"), 10) == 2
    said = said_in(tmp_path / "log")
    assert "wrong key" in said and "start again with the same flags: what is done is kept" in said
    part, = common.unfinished(world.path("out.jsonl" if stage is gold else "out.replies.jsonl"))
    assert len(read_lines(part)) == len(answered) == len(server.requests) - 1 < 10
    server.reply = lambda request: (200, f"I'm P{request['seed']}x.")
    assert wait(forked(stage, flags, tmp_path / "log")) == 0
    assert len(rows_of(world)) == 12 and len(server.requests) == 13


def hanging(server):
    """From the ninth request on the server answers none, until the event is set."""
    release, reply = threading.Event(), server.reply
    server.reply = lambda request: reply(request) if len(server.requests) <= 8 or release.wait(20) else None
    return release


@pytest.mark.parametrize("name", ["gold", "simulate"])
def test_ctrl_c_is_one_line_and_keeps_what_is_done(name, world, tiny, server, short, tmp_path):
    release, flags = hanging(server), [*world.command(name, tiny, server.url), "--concurrency", 4, "--batch-size", 4]
    pid = forked(load_stage(name), flags, tmp_path / "log")
    while len(server.requests) < 12:
        time.sleep(0.02)
    os.kill(pid, signal.SIGINT)
    assert wait(pid, 10) == 130
    release.set()
    said = (tmp_path / "log").read_text().splitlines()
    assert said[-1].endswith("interrupted. What is done is kept: start again with the same flags.")
    assert "Traceback" not in str(said) and read_lines(common.unfinished(world.path("out.jsonl"))[0])


def test_ctrl_c_ends_at_once_while_the_server_hangs(world, server):
    release = hanging(server)
    process = subprocess.Popen(
        [sys.executable, "gold.py", *map(str, world.command("gold", None, server.url)), "--concurrency", "4"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while len(server.requests) < 12:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        out, _ = process.communicate(timeout=5)
    finally:
        release.set()
        process.kill()
    assert process.returncode == 130 and "interrupted" in out and "Traceback" not in out


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(world, server, tmp_path):
    server.reply = lambda request: (200, f"Gold {request['seed']} " + "and so on " * 60)
    flags = [*world.command("gold", None, server.url), "--concurrency", 1]
    assert wait(forked(gold, [*flags, "--output", world.path("whole.jsonl")], tmp_path / "log")) == 0
    server.requests.clear()
    assert wait(forked(gold, flags, tmp_path / "full", limit=4000)) == 2
    said = said_in(tmp_path / "full")
    assert said.startswith("gold.py: error: ") and "File too large" in said and "what is done is kept" in said
    asked = len(server.requests)
    assert not Path(world.path("out.jsonl")).exists() and 3 < asked < 9
    assert wait(forked(gold, flags, tmp_path / "log")) == 0 and rows_of(world) == rows_of(world, "whole.jsonl")
    assert asked < len(server.requests) <= 12 + 2, "those that did not fit, and no others, are asked for again"


def test_a_full_disk_leaves_no_half_model(big, tiny, server, tmp_path):
    flags = kill_flags("train", big, tiny, server, tmp_path)
    assert wait(forked(train, flags, tmp_path / "full", limit=20000)) == 2
    assert said_in(tmp_path / "full").startswith("train.py: error: ") and not (tmp_path / "x").exists()
    assert wait(forked(train, flags, tmp_path / "log")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "log", "x", "x.settings.json"]


def test_a_full_disk_leaves_the_old_results(tmp_path):
    row, path = {**dict.fromkeys(results.RESULT_KEY, ""), "iteration": 1, "mean": 0.5, "sem": None, "n": 3}, tmp_path / "r.jsonl"
    results.write_results(path, [row])
    many = [{**row, "iteration": t} for t in range(99)]
    stage = SimpleNamespace(__file__="r.py", main=lambda: results.write_results(path, many))
    assert wait(forked(stage, [], tmp_path / "full", limit=3000)) == 2 and read_lines(path) == [row]
