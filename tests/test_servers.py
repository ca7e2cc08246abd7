"""Strangers: whose key goes where, what a server may repeat, models that bring code, texts that steer a terminal; and two
blocks of conversations at a time."""
import json
import socket
import time

import pytest

import common
import generate_personas
import gold
import simulate
from conftest import read_lines

KEY = "sk-4f9c1d7e2b"


def ask(run, world, server, *more, status=None, output="g.jsonl"):
    flags = [*world.flags("tasks", "personas"), "--split", "A", "--limit", "2", "--output", world.path(output)]
    return run(gold, "--oracle", f"openai:m@{server.url}", *flags, *more, status=status)


@pytest.fixture
def keys(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("SERVER_API_KEY", raising=False)
    return monkeypatch


def test_openais_key_goes_to_openai_and_a_servers_own_key_to_the_server(run, world, server, keys):
    ask(run, world, server)
    assert not any(KEY in key for key in server.keys)
    server.keys.clear()
    keys.setenv("SERVER_API_KEY", "another-key\n")                # as `cat key.txt` leaves it
    ask(run, world, server, output="h.jsonl")
    assert server.keys == {"another-key"}
    server.keys.clear()
    keys.setenv("OPENAI_BASE_URL", server.url)
    run(gold, "--oracle", "openai:m", *world.flags("tasks", "personas"), "--split", "A", "--output", world.path("i.jsonl"))
    assert server.keys == {KEY}


def test_a_key_that_a_server_repeats_is_neither_printed_nor_stored(run, world, server, keys):
    keys.setenv("SERVER_API_KEY", KEY)
    server.reply = lambda request: (200, f"Your key is {KEY}.")
    out, err = ask(run, world, server)
    assert read_lines(world.path("g.jsonl"))[0]["gold"] == "Your key is ***."
    server.reply = lambda request: (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})
    out, err = ask(run, world, server, output="h.jsonl", status=2)
    assert "Incorrect API key provided: ***" in err and KEY not in out + err
    assert not any(KEY in path.read_text() for path in world.folder.rglob("*.json*"))


@pytest.mark.parametrize("url", ["http://user:{}@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?api-key={}"])
def test_a_key_in_a_url_is_refused_and_not_shown(run, world, keys, url):
    flags = [*world.flags("tasks", "personas"), "--split", "A", "--output", world.path("g.jsonl")]
    out, err = run(gold, "--oracle", "openai:m@" + url.format(KEY), *flags, status=2)
    assert "Set SERVER_API_KEY" in err and KEY not in out + err
    assert not any(KEY in path.read_text() for path in world.folder.rglob("*.json*"))


def test_a_key_among_a_requests_arguments_is_refused_and_not_shown(run, world, server):
    out, err = ask(run, world, server, "--extra", json.dumps({"api_key": KEY}), status=2)
    assert "keys belong in" in err and KEY not in out + err and not server.requests


def test_a_url_may_be_written_in_capitals():
    assert common.served_model("openai:a/b@HTTP://h:1/v1") == ("a/b", "HTTP://h:1/v1")
    assert common.served_model("openai:gpt-5") == ("gpt-5", None) and common.served_model("openai:a@b") == ("a@b", None)


def test_loopback_does_not_go_through_a_proxy(run, world, server, monkeypatch):
    with socket.socket() as dead:                                 # nobody listens
        dead.bind(("127.0.0.1", 0))
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{dead.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        ask(run, world, server)
    assert len(server.requests) == 2


@pytest.mark.parametrize("status, ends", [(503, 75), (429, 75), (401, 2), (404, 2)])
def test_a_server_that_is_away_is_no_wrong_input(run, world, server, status, ends):
    server.reply = lambda request: (status, {"error": {"message": "sorry"}})
    _, err = ask(run, world, server, status=ends)
    assert f"{status} " in err and "sorry" in err


def test_an_error_in_the_place_of_an_answer_is_told_in_the_servers_words(run, world, server):
    server.reply = lambda request: (200, {"error": {"message": "the engine is asleep"}})
    assert "the engine is asleep" in ask(run, world, server, status=2)[1]


def test_texts_do_not_steer_the_terminal(run, world, server):
    server.reply = lambda request: (200, "A\x1b[2Jclean\x07 \x9b31m page.\nLine.")
    out, err = ask(run, world, server)
    assert "A?[2Jclean? ?31m page.\nLine." in out and not any(c in out + err for c in "\x1b\x07\x9b")


def test_a_models_own_code_is_not_run(tiny, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {
        "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(SystemExit) as end:
        common.load_model(str(folder), "float32")
    assert end.value.code == 2 and "cannot be loaded" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_a_writer_whose_replies_are_no_personas_is_stopped_and_told_why(run, world, server):
    server.reply = lambda request: (200, "Sure! Here is a persona.")
    flags = ["--model", f"openai:m@{server.url}", "--splits", "A=20", "--output", world.path("p.jsonl")]
    _, err = run(generate_personas, *flags, status=1)
    assert "20 of 20 replies could not be a persona" in err and "'no name': 20" in err and len(server.requests) == 20


def test_one_block_asks_while_another_is_answered(run, world, server, tiny, short, monkeypatch):
    answering, asked_meanwhile, decode = [0], [], common.LocalModel._answer

    def slow(request):
        answering[0] += 1
        time.sleep(0.2)
        answering[0] -= 1
        return 200, "Yes."

    def watched(self, *args):
        begun, texts = answering[0], decode(self, *args)
        asked_meanwhile.append(begun)
        return texts
    server.reply = slow
    monkeypatch.setattr(common.LocalModel, "_answer", watched)
    flags = world.command("simulate", tiny, server.url, "c.jsonl")
    run(simulate, *flags, "--batch-size", 4)
    assert any(asked_meanwhile)


def test_a_start_with_rejected_replies_on_disk_goes_on(run, world, server):
    """After a kill, or with more --attempts, those are met first: they say nothing about the writer."""
    flags = ["--model", f"openai:m@{server.url}", "--splits", "A=20", "--output", world.path("p.jsonl")]
    server.reply = lambda request: (200, f"I'm P{request['seed']}x." if request["seed"] % 5 < 1 else "Sure!")
    run(generate_personas, *flags, "--attempts", 1, status=1)
    assert 10 <= sum(row["reply"] == "Sure!" for row in read_lines(world.path("p.replies.jsonl"))) < 18
    server.reply = lambda request: (200, f"I'm P{request['seed']}x.")
    run(generate_personas, *flags)
    assert len(read_lines(world.path("p.jsonl"))) == 20


def test_a_finished_block_is_saved_while_another_one_hangs(run, world, server, tiny, short):
    first = []

    def reply(request):                                           # the first answer that is asked for takes all the time
        first.append(request)
        if len(first) == 1:
            saved = lambda: [line for part in common.unfinished(world.path("c.jsonl")) for line in read_lines(part)]
            begin = time.monotonic()
            while len(saved()) < 8 and time.monotonic() < begin + 20:
                time.sleep(0.05)
            first.append(len(saved()))
        return 200, "Yes."
    server.reply = reply
    run(simulate, *world.command("simulate", tiny, server.url, "c.jsonl"), "--batch-size", 4)
    assert max(n for n in first if isinstance(n, int)) >= 8
