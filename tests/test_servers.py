"""Strangers: whose key goes where, what a server may repeat, models that bring code, texts that steer a terminal; and
two blocks of conversations at a time."""
import json
import time

import pytest

import common
import gold
import simulate
from conftest import read_lines

KEY = "sk-4f9c1d7e2b"


def ask(run, world, server, *more, status=None, output="g.jsonl"):
    return run(gold, *world.command("gold", None, server.url, output), "--limit", 2, *more, status=status)


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
    ask(run, world, server, "--oracle", "openai:m", output="i.jsonl")
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


@pytest.mark.parametrize("url, more", [("http://user:{}@127.0.0.1:9/v1", []), ("http://127.0.0.1:9/v1?api-key={}", []),
                                       ("http://127.0.0.1:9/v1", ["--extra", json.dumps({"api_key": KEY})])])
def test_a_key_in_a_url_or_among_a_requests_arguments_is_refused_and_not_shown(run, world, keys, url, more):
    out, err = run(gold, *world.command("gold", None, url.format(KEY)), *more, status=2)
    assert ("Set SERVER_API_KEY" in err or "keys belong in" in err) and KEY not in out + err
    assert common.json_object('{"add_bos_token": true}') == {"add_bos_token": True}        # no key, for all its name
    assert not any(KEY in path.read_text() for path in world.folder.rglob("*.json*"))


@pytest.mark.parametrize("status", [503, 429])                    # (401 and 404: test_bad_input, test_reports)
def test_a_server_that_is_away_is_no_wrong_input(run, world, server, status):
    server.reply = lambda request: (status, {"error": {"message": "sorry"}})
    _, err = ask(run, world, server, status=75)
    assert f"{status} " in err and "sorry" in err


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


def test_a_finished_block_is_saved_while_another_one_hangs(run, world, server, tiny, short):
    held = []

    def saved():
        return sum(len(read_lines(part)) for part in common.unfinished(world.path("out.jsonl")))

    def reply(request):
        if request is server.requests[0]:                         # the first answer takes all the time
            end = time.monotonic() + 20
            while saved() < 8 and time.monotonic() < end:
                time.sleep(0.05)
            held.append(saved())
        return 200, "Yes."
    server.reply = reply
    run(simulate, *world.command("simulate", tiny, server.url), "--batch-size", 4)
    assert held[0] >= 8


def test_a_person_has_one_conversation_at_a_time(run, world, server, tiny, short):
    under_way, at_once = [0], []

    def slow(request):
        under_way[0] += 1
        at_once.append(under_way[0])
        time.sleep(0.1)
        under_way[0] -= 1
        return 200, "Yes."
    server.reply = slow
    run(simulate, *world.command("simulate", tiny, server.url), "--batch-size", 1, "--limit", 3)
    assert set(at_once) == {1}
