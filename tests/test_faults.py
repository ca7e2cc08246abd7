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

import pytest

import common
import evaluate
import generate_personas
import gold
import simulate
import train
from conftest import ROOT, World, read_lines, run_stage, write_rows

# ------------------------------------------------------------ calls, tokens, dollars


def gold_flags(world, server, output="g.jsonl"):
    return ["--oracle", f"openai:m@{server.url}", *world.flags("tasks", "personas"), "--split", "A",
            "--output", world.path(output)]


def test_usage_stands_in_the_rows_and_is_summed_and_priced(run, world, server):
    server.usage = True
    out, _ = run(gold, *gold_flags(world, server), "--prices", 2, 1000)
    assert all(row["usage"] == {"prompt_tokens": 100, "completion_tokens": 7} for row in read_lines(world.path("g.jsonl")))
    assert "servers counted 1,200 tokens in and 84 out: $0.09" in out       # 12 calls: (2 x 1200 + 1000 x 84) / 10^6
    out, _ = run(gold, *gold_flags(world, server))
    assert "servers counted 1,200 tokens in and 84 out\n" in out and len(server.requests) == 12
    server.usage = False
    out, _ = run(gold, *gold_flags(world, server, "h.jsonl"))
    assert "servers counted" not in out and not any("usage" in row for row in read_lines(world.path("h.jsonl")))


def simulate_flags(world, model, server, output="c.jsonl"):
    (world.folder / "short.txt").write_text("Ask {name} about: {task}")
    return ["--questioner", model, "--roleplayer", f"openai:m@{server.url}", *world.flags("tasks", "personas"), "--dtype",
            "float32", "--split", "A", "--samples", 2, "--max-tokens", 4, "--elicitation-prompt", world.path("short.txt"),
            "--output", world.path(output)]


def test_a_conversation_counts_the_tokens_of_all_its_answers(run, world, tiny, server):
    server.usage = True
    out, _ = run(simulate, *simulate_flags(world, tiny, server))
    rows = read_lines(world.path("c.jsonl"))
    assert all(row["usage"] == {"prompt_tokens": 100 * row["turns"], "completion_tokens": 7 * row["turns"]} for row in rows)
    assert f"servers counted {100 * len(server.requests):,} tokens in" in out


def evaluate_flags(world, model, server, name, *more):
    return ["--base", model, "--questioner", model, "--dtype", "float32", *world.flags("tasks", "personas", "gold"),
            "--max-tokens", 4, "--conversations", world.path(f"{name}.jsonl"), "--output", world.path(name), "--roleplayer",
            "stub", "--results", world.path("results.jsonl"), *more]


def test_a_dry_run_tells_the_calls_and_makes_none(run, world, tiny, server, monkeypatch):
    """In each of the four stages; what was made before stands, and is not counted."""
    def files():
        return sorted(str(path.relative_to(world.folder)) for path in world.folder.rglob("*") if path.is_file())

    def told(stage, *flags):
        before, asked = files(), len(server.requests)
        out, _ = run(stage, *flags, "--dry-run", "--prices", 1000, 1000, status=0)
        assert files() == before and len(server.requests) == asked, "a dry run leaves nothing behind"
        calls, most_in, most_out = (int(text.split()[-1].replace(",", "")) for text in (
            out.split(" calls")[0], out.split(" tokens in")[0], out.split(" out")[0]))
        assert f": ${(most_in + most_out) / 1000:,.2f}" in out
        return calls, most_in, most_out

    plain, judged = world.conversations("test"), evaluate_flags(
        world, tiny, server, "e1", "--iteration", 1, "--baseline", world.path("e0"), "--judge", f"openai:j@{server.url}")
    write_rows(world.path("e0.jsonl"), plain)
    write_rows(world.path("e1.jsonl"), plain)
    run(evaluate, *evaluate_flags(world, tiny, server, "e0", "--iteration", 0))
    people = ["--model", f"openai:m@{server.url}", "--splits", "A=7", "--output", world.path("p.jsonl")]
    talk = simulate_flags(world, tiny, server)
    for stage, flags, before in ((gold, gold_flags(world, server), ["--limit", 5]), (simulate, [*talk, "--batch-size", 2], ["--limit", 5]),
                                 (evaluate, judged, ["--limit", 5]), (generate_personas, people, ["--limit", 3])):
        server.reply = lambda request: (200, f"I'm P{request['seed']}x. I run." if stage is generate_personas else "A")
        made = len(server.requests)
        told(stage, *flags)
        run(stage, *flags, *before)
        first = len(server.requests) - made
        calls, most_in, most_out = told(stage, *flags)
        run(stage, *flags)
        sent = server.requests[made + first:]
        assert first > 0 and calls == len(sent), stage.__name__
        length = sum(common.letters(request["messages"]) for request in sent) / 4
        assert length - 1 <= most_in and sum(request["max_tokens"] for request in sent) == most_out, stage.__name__
        assert told(stage, *flags)[0] == 0
    assert "--dry-run" in run(evaluate, *evaluate_flags(world, tiny, server, "e0", "--iteration", 0, "--dry-run"), status=2)[1]


def test_a_dry_run_knows_the_limits_of_other_arguments(run, world, server):
    flags = [*gold_flags(world, server), "--dry-run", "--prices", 1, 1]
    assert "10,800 out: $" in run(gold, *flags, "--extra", '{"max_tokens": null, "max_completion_tokens": 900}', status=0)[0]
    out, _ = run(gold, *flags, "--extra", '{"max_tokens": null}', status=0)
    assert "answers of any length out" in out and "$" not in out
    out, _ = run(gold, "--oracle", "some/model", *flags[2:], status=0)
    assert "runs on this machine: no paid calls" in out


# ------------------------------------------------------------ refusals

def test_too_many_refusals_end_with_status_1_and_can_be_asked_again(run, world, server):
    server.reply = lambda request: (200, "" if "thing 2" in request["messages"][1]["content"] else "Gold.")
    flags = [*gold_flags(world, server), "--max-refused"]
    out, err = run(gold, *flags, 0.24, status=1)
    assert "12 gold responses, 3 refused" in out and "3 of 12 were refused (3 empty), more than --max-refused 0.24" in err
    assert len(read_lines(world.path("g.jsonl"))) == 12, "all was written"
    run(gold, *flags, 0.24, status=1)
    run(gold, *flags, 0.25)
    assert len(server.requests) == 12
    server.reply = lambda request: (200, "Gold.")                 # as the message says: without those lines, asked again
    path = Path(world.path("g.jsonl"))
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"refused"' not in line))
    out, _ = run(gold, *flags, 0)
    assert "12 gold responses, 0 refused" in out and len(server.requests) == 15


def test_a_model_that_refuses_all_is_not_asked_25000_times(run, server, tmp_path):
    world = World(tmp_path, tasks=200)
    server.reply = lambda request: (200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [
        {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": ""}}]})
    _, err = run(gold, *gold_flags(world, server), "--concurrency", 4, status=1)
    assert "100 of 100 were refused (100 empty, cut before it began: raise the limit of tokens)" in err
    assert len(server.requests) <= 104
    people = ["--model", f"openai:m@{server.url}", "--splits", "A=150", "--output", world.path("p.jsonl"), "--concurrency", 4]
    _, err = run(generate_personas, *people, status=1)
    assert "100 of 100 were refused" in err and len(server.requests) <= 208


# ------------------------------------------------------------ a server that fails

PASSING = {"429": 0.08, "500": 0.08, "dropped": 0.06, "stalled": 0.02, "torn": 0.06}       # 30 %
LASTING = {"empty": 0.03, "filtered_prompt": 0.03, "filtered_answer": 0.03}


@pytest.fixture
def faulty(monkeypatch, tmp_path):
    """start(shares) -> the URL of the toy server with these faults, in this process."""
    monkeypatch.syspath_prepend(ROOT / "toy")
    import server as toy
    started = []

    def start(shares):
        http = toy.Server(("127.0.0.1", 0), toy.Handler)
        http.faults, http.stall = toy.Faults(shares), 2
        threading.Thread(target=http.serve_forever, daemon=True).start()
        started.append(http)
        return http
    yield start
    for http in started:
        http.shutdown()


def toy_flags(stage, url, folder, output):
    people = ["--model", f"openai:persona-writer@{url}", "--splits", "A=6"]
    files = ["--tasks", folder / "t.jsonl", "--personas", folder / "p.jsonl", "--split", "A"]
    talk = ["--questioner", ROOT / "toy/base", "--roleplayer", f"openai:roleplayer@{url}", "--dtype", "float32", "--samples",
            2, "--max-tokens", 16]
    return {generate_personas: people, gold: ["--oracle", f"openai:oracle@{url}", *files], simulate: [*talk, *files]}[stage] + [
        "--output", folder / output, "--timeout", 1, "--max-refused", 0.6]


def test_thirty_percent_of_passing_faults_change_nothing(run, faulty, tmp_path):
    run_stage("toy/world.py", "--output", tmp_path / "t.jsonl", "--tasks-per-split", 5)
    good, bad, worse = faulty({}), faulty(PASSING), faulty({**PASSING, **LASTING})
    url = lambda http: f"http://127.0.0.1:{http.server_port}/v1"
    for stage, name in ((generate_personas, "p"), (gold, "g"), (simulate, "c")):
        run(stage, *toy_flags(stage, url(good), tmp_path, f"{name}.jsonl"))
        run(stage, *toy_flags(stage, url(bad), tmp_path, f"{name}-bad.jsonl"))
        assert (tmp_path / f"{name}-bad.jsonl").read_text() == (tmp_path / f"{name}.jsonl").read_text()
        if stage is generate_personas:                            # a filter makes another person, who is not comparable
            continue
        out, _ = run(stage, *toy_flags(stage, url(worse), tmp_path, f"{name}-worse.jsonl"))
        rows, fewer = read_lines(tmp_path / f"{name}.jsonl"), read_lines(tmp_path / f"{name}-worse.jsonl")
        refused = [row for row in fewer if "refused" in row]
        assert len(rows) == len(fewer) and f"{len(refused)} refused" in out and refused
        assert [row for row, other in zip(rows, fewer) if "refused" not in other] == [
            row for row in fewer if "refused" not in row]
    asked = bad.faults.asked.values()
    assert 0.15 < 1 - len(asked) / (sum(asked) + len(asked)) < 0.45, "the share of requests that were repeated"


def test_faults_are_seeded_shares(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "toy")
    import server as toy
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


def test_torn_json_is_asked_for_again_and_a_lasting_one_ends_the_program(run, world, server):
    asked = []

    def reply(request):                                           # no JSON at first
        asked.append(request["seed"])
        return 200, "Gold." if asked.count(request["seed"]) > 2 else {"choices": []}
    server.reply = reply
    run(gold, *gold_flags(world, server))
    assert len(asked) == 36 and all(row["gold"] == "Gold." for row in read_lines(world.path("g.jsonl")))


def answer(content="Gold.", reason="stop", usage=None, **message):
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage, "choices": [
        {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, **message}}]}


@pytest.mark.parametrize("reply, refused", [
    (answer(refusal={"why": "policy"}), "{'why': 'policy'}"), (answer(refusal=True), "True"), (answer(refusal=["no"]), "['no']"),
    (answer(refusal="no\n  way"), "no way"), (answer(refusal="half \ud83d"), "half ?"), (answer(content="\n "), "empty"),
    (answer(usage={"prompt_tokens": [1], "completion_tokens": {}}), None), (answer(usage={"prompt_tokens": "7"}), None),
    (answer(usage="many"), None), (answer(reason=None), None), (answer(content="half \ud83d"), None)])
def test_odd_replies_become_clean_rows(run, world, server, reply, refused):
    server.reply = lambda request: (200, reply)
    flags = [*gold_flags(world, server), "--max-refused", 1, "--prices", 1, 1]
    run(gold, *flags)
    rows = read_lines(world.path("g.jsonl"))
    assert {row.get("refused") for row in rows} == {refused} and not any("usage" in row for row in rows)
    run(gold, *flags)
    assert len(server.requests) == 12


def test_a_server_that_refuses_all_is_one_line_however_many_are_under_way(run, world, server, monkeypatch):
    """A call that were still pending would be reported by asyncio, with a traceback, when Python ends."""
    loops, new_event_loop = [], common.asyncio.new_event_loop
    monkeypatch.setattr(common.asyncio, "new_event_loop", lambda: loops.append(new_event_loop()) or loops[-1])

    def reply(request):
        time.sleep(random.random() / 5)
        return 401, {"error": {"message": "wrong key"}}
    server.reply = reply
    _, err = run(gold, *gold_flags(world, server), status=2)
    assert len(err.strip().splitlines()) == 1 and 'answers 401: {"error": {"message": "wrong key"}} Correct' in err
    assert len(loops) == 1 and not common.asyncio.all_tasks(loops[0])


@pytest.mark.parametrize("reply", [answer() | {"choices": {}}, answer() | {"choices": {"a": 1}}, answer() | {"choices": None}])
def test_what_is_no_completion_ends_the_program_after_five_tries(run, world, server, reply):
    server.reply = lambda request: (200, reply)
    _, err = run(gold, *gold_flags(world, server), "--limit", 1, status=2)
    assert "no chat completion" in err and len(err.strip().splitlines()) == 1 and len(server.requests) == 5


def test_an_answer_that_outgrows_the_context_is_a_refused_conversation(run, world, tiny, server):
    server.reply = lambda request: (200, "Well, " * (900 if "I'm Ann" in request["messages"][1]["content"] else 1))
    flags = [*simulate_flags(world, tiny, server), "--max-refused", 0.5]
    run(simulate, *flags)
    rows = read_lines(world.path("c.jsonl"))
    long = [row for row in rows if row["persona_id"] == "Ap0" and row["turns"] > 1]
    assert long and [row for row in rows if "refused" in row] == long
    assert all(row["refused"].startswith("assistant, turn 2: ") and "room for 4096" in row["refused"] for row in long)


def test_a_call_has_an_end(run, world, server, monkeypatch):
    """Whatever the client's own time-outs and repetitions do: with bytes that trickle they never strike."""
    wait_for = common.asyncio.wait_for
    monkeypatch.setattr(common.asyncio, "wait_for", lambda call, seconds: wait_for(call, seconds / 549))   # 549 s for --timeout 1
    over = threading.Event()
    server.reply = lambda request: over.wait(5) and None or (200, "Late.")
    begin = time.monotonic()
    _, err = run(gold, *gold_flags(world, server), "--limit", 1, "--timeout", 1, status=2)
    over.set()
    assert "does not answer (it never ends)" in err and time.monotonic() - begin < 8


def test_a_split_named_twice_is_paid_once(run, world, server):
    run(gold, *gold_flags(world, server), "--split", "A", "A")
    assert len(server.requests) == 12


@pytest.mark.parametrize("extra", ['{"max_tokens": "900"}', '{"max_completion_tokens": -5}', '{"a": 1e999}', "[" * 9999, '{"a": NaN}'])
def test_odd_extra_arguments_are_refused(run, world, server, extra):
    _, err = run(gold, *gold_flags(world, server), "--extra", extra, status=2)
    assert "argument --extra" in err and not server.requests


def test_a_dry_run_after_a_kill_leaves_the_settings(run, world, server):
    Path(world.path("g.jsonl.part-0")).write_text('{"task_id": "A0", "pers')
    run(gold, *gold_flags(world, server, "h.jsonl"), "--limit", 1)
    os.rename(world.path("h.jsonl.settings.json"), world.path("g.jsonl.settings.json"))
    run(gold, *gold_flags(world, server), "--dry-run", status=0)
    run(gold, *gold_flags(world, server))
    assert len(read_lines(world.path("g.jsonl"))) == 12


def test_whoever_stops_to_listen_does_not_stop_the_work(world, server):
    command = f"{sys.executable} gold.py {' '.join(map(str, gold_flags(world, server)))} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "0" and "Traceback" not in done.stderr, done
    assert len(read_lines(world.path("g.jsonl"))) == 12


# ------------------------------------------------------------ kills

def forked(stage, flags, log, limit=None):
    """Starts stage.main() in a forked process and returns its id. limit: on the size of its files, in bytes."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        import tqdm
        tqdm.tqdm.set_lock(threading.RLock())                     # the parent's is shared, and might be killed while held
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = [f"{stage.__name__}.py", *map(str, flags)]
        stage.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def big(tmp_path_factory, tiny):
    """Inputs of every stage: 48 pairs in a split; and the evaluation of Q_BASE."""
    world = World(tmp_path_factory.mktemp("big"), tasks=16)
    write_rows(world.path("c.jsonl"), world.conversations("A"))
    write_rows(world.path("e0.jsonl"), world.conversations("test"))
    write_rows(world.path("e1.jsonl"), world.conversations("test", word="blue"))
    write_rows(world.path("s.jsonl"), [{**row, "gold_log_prob": -1.0, "response": "Say it."} for row in world.conversations("A")])
    pid = forked(evaluate, evaluate_flags(world, tiny, None, "e0", "--iteration", 0), world.path("log"))
    assert wait(pid) == 0, Path(world.path("log")).read_text()
    return world


def stage_flags(name, world, tiny, server, folder):
    local = ["--dtype", "float32", "--batch-size", 2]
    files = world.flags("tasks", "personas")
    return {
        "generate_personas": ["--model", f"openai:m@{server.url}", "--splits", "A=60", "--concurrency", 2],
        "gold": [*gold_flags(world, server)[:-2], "--concurrency", 2],
        "simulate": [*simulate_flags(world, tiny, server)[:-2], "--batch-size", 2, "--concurrency", 2],
        "select": ["--base", tiny, "--questioner", tiny, *local, *files, *world.flags("gold"), "--conversations",
                   world.path("c.jsonl"), "--max-tokens", 8, "--score-tokens", 400],
        "train": ["--base", tiny, "--dtype", "float32", *files, "--selected", world.path("s.jsonl"), "--lr", "1e-3",
                  "--batch-size", 4, "--micro-batch-size", 2],
        "evaluate": [*evaluate_flags(world, tiny, server, "e1", "--iteration", 1, "--baseline", world.path("e0"), "--judge",
                                     f"openai:j@{server.url}", "--concurrency", 2, "--batch-size", 4, "--score-tokens", 400),
                     "--results", folder / "results.jsonl"],
    }[name] + ["--output", folder / ("x" if name in ("train", "evaluate") else "x.jsonl")]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_twice(stage, name, world, tiny, server, folder, undisturbed, seconds, rng):
    """Kills the stage at two random moments and lets it end; returns how often it was hit."""
    folder.mkdir()
    hits, left = 0, seconds
    for _ in range(2):
        pid = forked(stage, stage_flags(name, world, tiny, server, folder), folder.parent / "log")
        time.sleep(rng.random() * left)
        os.kill(pid, signal.SIGKILL)
        hits += wait(pid) == -signal.SIGKILL
        left *= 0.7
    pid = forked(stage, stage_flags(name, world, tiny, server, folder), folder.parent / "log")
    assert wait(pid) == 0, (folder.parent / "log").read_text()
    assert contents(folder) == undisturbed
    return hits


def check_kills(name, repetitions, seed, big, tiny, server, tmp_path, select_stage):
    stage = {"generate_personas": generate_personas, "gold": gold, "simulate": simulate, "select": select_stage,
             "train": train, "evaluate": evaluate}[name]

    def reply(request):
        time.sleep(0.01)
        number = random.Random(request["seed"]).randrange(10 ** 9)
        return 200, f"I'm Q{number}x. I run." if number % 5 else "Final Response: A"
    server.reply = reply
    (tmp_path / "whole").mkdir()
    begin = time.monotonic()
    pid = forked(stage, stage_flags(name, big, tiny, server, tmp_path / "whole"), tmp_path / "log")
    assert wait(pid) == 0, (tmp_path / "log").read_text()
    seconds, calls, undisturbed = time.monotonic() - begin, len(server.requests), contents(tmp_path / "whole")
    rng, hits = random.Random(seed), 0
    for k in range(repetitions):
        server.requests.clear()
        hits += kill_twice(stage, name, big, tiny, server, tmp_path / str(k), undisturbed, seconds, rng)
        assert calls <= len(server.requests) <= 1.1 * calls + 2, f"{len(server.requests)} calls instead of {calls}"
    assert hits >= repetitions, "most kills should hit"


STAGES = ("generate_personas", "gold", "simulate", "select", "train", "evaluate")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_killed_twice_ends_with_the_same_bytes(name, big, tiny, server, tmp_path, select_stage):
    check_kills(name, 1, name, big, tiny, server, tmp_path, select_stage)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_twenty_kills(name, big, tiny, server, tmp_path, select_stage):
    check_kills(name, 10, f"{name}, often", big, tiny, server, tmp_path, select_stage)


# ------------------------------------------------------------ Ctrl-C, disks

@pytest.mark.parametrize("name", ["gold", "simulate"])
def test_ctrl_c_ends_at_once_in_one_line_and_keeps_what_is_done(name, world, tiny, server):
    """While 4 requests hang."""
    seen, release = [], threading.Event()

    def reply(request):
        seen.append(request)
        if len(seen) > 8:
            release.wait(20)
        return 200, "Yes."
    server.reply = reply
    flags = {"gold": gold_flags(world, server), "simulate": [*simulate_flags(world, tiny, server), "--batch-size", 4]}[name]
    process = subprocess.Popen([sys.executable, f"{name}.py", *map(str, flags), "--concurrency", "4"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    begin = time.monotonic()
    while len(seen) < 12:
        assert process.poll() is None and time.monotonic() - begin < 120, process.communicate()
        time.sleep(0.02)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=15)
    release.set()
    assert time.monotonic() - begin < 5 and process.returncode in (-signal.SIGINT, 130), err
    assert [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line and "%|" not in line
            ] == ["Interrupted. Rows that are done are kept: start again with the same flags."], err
    part = Path(flags[flags.index("--output") + 1] + ".part-0")
    assert read_lines(part), "what is done is kept"


def said_in(log):
    """The one line with which a stage ended."""
    said = [line for line in log.read_text().splitlines() if "error: " in line]
    assert len(said) == 1 and "Traceback" not in log.read_text()
    return said[0]


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(world, server, tmp_path):
    server.reply = lambda request: (200, f"Gold {request['seed']} " + "and so on " * 60)
    assert wait(forked(gold, gold_flags(world, server), tmp_path / "log")) == 0
    server.requests.clear()
    flags = gold_flags(world, server, "again.jsonl")
    assert wait(forked(gold, [*flags, "--concurrency", 1], tmp_path / "full", limit=4000)) == 2
    said = said_in(tmp_path / "full")
    assert said.startswith(f"gold.py: error: {world.path('again.jsonl')}: File too large. What was done before is kept")
    assert not Path(world.path("again.jsonl")).exists() and 3 < len(server.requests) < 9
    assert wait(forked(gold, flags, tmp_path / "log")) == 0
    assert Path(world.path("again.jsonl")).read_text() == Path(world.path("g.jsonl")).read_text()
    assert len(server.requests) == 12 + 1, "the row that did not fit, and no other, is asked for again"


def test_a_full_disk_leaves_the_old_results_and_no_half_model(big, tiny, server, tmp_path):
    flags = stage_flags("train", big, tiny, server, tmp_path)
    assert wait(forked(train, flags, tmp_path / "full", limit=20000)) == 2
    said = said_in(tmp_path / "full")
    assert said.startswith(f"train.py: error: {tmp_path / 'x'}: ") and "make room" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "x.settings.json"]
    assert wait(forked(train, flags, tmp_path / "log")) == 0

    row = {"variant": "main", "iteration": 1, "metric": "m", "condition": "", "roleplayer": "r", "split": "test", "mean": 0.5,
           "sem": None, "n": 3}
    results = tmp_path / "results.jsonl"
    common.write_results(results, [row])
    before = results.read_text()
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
            common.write_results(results, [{**row, "iteration": t} for t in range(9)])
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    assert wait(pid) == 2 and results.read_text() == before and not list(tmp_path.glob("*.unfinished"))


def test_nothing_that_is_not_ours_is_removed_or_replaced(big, tiny, server, tmp_path):
    """A folder beside the model, a device, the target of a link."""
    for name in ("x.tmp", "x.old", "x2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    assert wait(forked(train, stage_flags("train", big, tiny, server, tmp_path), tmp_path / "log")) == 0
    assert all((tmp_path / name / "mine").read_text() == "mine" for name in ("x.tmp", "x.old", "x2"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit):
        common.write_results(tmp_path / "pipe", [])
    (tmp_path / "target.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "target.jsonl")
    row = {**dict.fromkeys(common.RESULT_KEY, ""), "iteration": 1, "mean": 0.5, "sem": None, "n": 3}
    common.write_results(tmp_path / "link.jsonl", [row])
    assert (tmp_path / "link.jsonl").is_symlink() and read_lines(tmp_path / "target.jsonl") == [row]


def test_a_training_whose_last_step_goes_astray_saves_nothing(big, tiny, server, tmp_path):
    flags = [*stage_flags("train", big, tiny, server, tmp_path), "--limit", 2, "--lr", "1e308", "--validation", 0]
    assert wait(forked(train, flags, tmp_path / "log")) == 2
    assert "not finite after the last step" in said_in(tmp_path / "log") and not (tmp_path / "x").exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_written(run, world, server):
    locked = world.folder / "locked"
    locked.mkdir(mode=0o500)
    _, err = run(gold, *gold_flags(world, server)[:-1], locked / "g.jsonl", status=2)
    assert "Permission denied" in err and not server.requests


def test_an_output_below_a_file(run, world, server):
    _, err = run(gold, *gold_flags(world, server)[:-1], world.path("tasks.jsonl") + "/g.jsonl", status=2)
    assert "Give an --output in a folder that can be written" in err and len(err.splitlines()) == 1 and not server.requests
