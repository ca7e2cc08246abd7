"""People at a terminal: behind a server in the place of a model, and in a talk of their own."""
import os
import pty
import re
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import openai
import pytest

import evaluate
import gold
import simulate
from conftest import ROOT, read_lines
from people import talk

TOY = ["--questioner", ROOT / "toy/base", "--dtype", "float32", "--max-tokens", 64, "--max-turns", 2]


class Server(threading.Thread):
    """people/server.py at a terminal. At each prompt the next of `lines` is typed. ~: readline wants pastes as one."""

    def __init__(self, answers, *texts, port=0):
        super().__init__(daemon=True)
        self.lines, self.shown, (self.terminal, other) = "\n\n".join([*texts, ""]).split("\n")[:-1], "", pty.openpty()
        self.process = subprocess.Popen([sys.executable, "people/server.py", "--answers", answers, "--port", str(port)],
                                        cwd=ROOT, stdin=other, stdout=other, stderr=other, start_new_session=True)
        os.close(other)
        self.start()
        while self.is_alive() and "kept\n" not in self.shown:
            time.sleep(0.01)
        self.url = self.shown.partition("serving on ")[2].partition(",")[0]

    def run(self):
        seen = 0
        with pytest.raises(OSError):                            # Linux's end of a terminal
            while part := os.read(self.terminal, 65536).decode("utf-8", "replace"):
                self.shown = re.sub(r"\x1b\[\?2004l|\r", "", (self.shown + part).replace("\x1b[?2004h", "~"))
                if self.lines and self.shown[seen:].endswith("> "):
                    seen = len(self.shown)
                    self.type(self.lines.pop(0))

    def type(self, line):
        os.write(self.terminal, f"{line}\n".encode("utf-8", "surrogateescape"))

    def ask(self, *texts, timeout=30, **more):
        """Sends a system and a user message -> the answer."""
        chat = [{"role": role, "content": text} for role, text in zip(("system", "user"), texts)]
        client = openai.OpenAI(base_url=self.url, api_key="-", max_retries=0, timeout=timeout)
        return client.chat.completions.create(model="anna", messages=chat, extra_body=more).choices[0].message.content


@pytest.fixture
def people(tmp_path):
    """people(texts to be typed ...) -> a server; all of them have the same answers."""
    servers = []
    yield lambda *texts: servers.append(Server(tmp_path / "new/people.jsonl", *texts)) or servers[-1]
    [server.process.kill() for server in servers]


def test_a_stage_asks_a_person_once_and_a_second_rater_anew(people, run, world, tmp_path):
    def simulated(name, output):
        run(simulate, *TOY, *world.flags("tasks", "personas"), "--samples", 1, "--limit", 1, "--batch-size", 1,
            "--seed", 2, "--timeout", 5, "--roleplayer", f"openai:{name}@{server.url}", "--output", tmp_path / output)
        return [turn["content"] for row in read_lines(tmp_path / output) for turn in row["conversation"]]
    server = people("\n\nMy diet is vegan.\n  I mean it.", "My budget is tiny.")
    said = simulated("anna", "1.jsonl")
    assert said[1::2] == ["My diet is vegan.\n  I mean it.", "My budget is tiny."], "an empty line begins no answer"
    assert re.search("\nsystem: You are .*\n\nuser: You are .*\nYou: \n\n~anna> ", server.shown, re.DOTALL)
    server.process.kill()
    (tmp_path / "new/people.jsonl").open("a").write('{"request": "torn by a k')
    server = people("I am Ben.", "Tea.")
    assert simulated("anna", "2.jsonl") == said and "2 answers kept" in server.shown and "> " not in server.shown
    assert simulated("ben", "3.jsonl")[1::2] == ["I am Ben.", "Tea."] and "\n~ben> " in server.shown
    assert len(read_lines(tmp_path / "new/people.jsonl")) == 4


def test_a_person_writes_golds_and_judges(people, run, world, tiny):
    server = people("Drink tea.\nEvery day.", *["Final Response: B"] * 3)
    run(gold, *world.command("gold", tiny, server.url, "g.jsonl"), "--limit", 1, "--timeout", 5)
    assert read_lines(world.path("g.jsonl"))[0]["gold"] == "Drink tea.\nEvery day."
    run(evaluate, *world.command("evaluate", tiny, output="e0"), "--metrics", "win_rate")
    run(evaluate, *world.judged(tiny, server.url), "--metrics", "win_rate", "--win-pairs", 3)
    assert [row["raw"] for row in read_lines(world.path("e1/verdicts.jsonl"))] == ["Final Response: B"] * 3
    assert "\n~m> " in server.shown and server.shown.count("\n~j> Final Response: B\n") == 3


def test_a_question_is_shown_once_and_harmless_and_no_answer_is_cut(people):
    server = people()
    for _ in range(2):                                          # a client that gives up, and asks again
        with pytest.raises(openai.APITimeoutError):
            server.ask("\x1b]0;title\x07", "Tea?", timeout=0.4, model="\x1b[1manna")
    server.type("Yes.\n")
    assert server.ask("\x1b]0;title\x07", "Tea?", model="\x1b[1manna", seed=1, temperature=0.5) == "Yes."
    assert "system: ?]0;title?\n\nuser: Tea?\n\n~?[1manna> Yes." in server.shown and "\x1b" not in server.shown
    server.lines = ["x" * 10_000, "", "\x1b[200~One.\r\rTwo.\x1b[201~", "", "caf\udcff", "café", ""]
    assert server.ask("Long?") == "x" * 10_000 and server.ask("A paste?") == "One.\n\nTwo."
    assert server.ask("Bytes?") == "café" and "not UTF-8" in server.shown and server.shown.count("Tea?") == 1


def test_what_is_no_question_and_what_ends_the_server(people, tmp_path):
    server = people("half an answer\n\x04")
    for wrong, why in ({"stream": True}, "no stream"), ({"n": 2}, "n = 1"), ({"messages": [{"role": "user"}]}, "texts"):
        with pytest.raises(openai.BadRequestError, match=why):
            server.ask("Why?", **wrong)
    assert not openai.OpenAI(base_url=server.url, api_key="-").models.list().data and "Why?" not in server.shown
    (tmp_path / "b").write_text('{"task_id": "A0"}\n')
    for file, port, line in (("a", server.url[-8:-3], "Address already in use"), ("b", 0, "b, line 1: no field 'req")):
        other = Server(tmp_path / file, port=port)
        assert other.process.wait() == 2 and line in other.shown and other.shown.count("\n") == 1
    with pytest.raises(openai.APIConnectionError):
        server.ask("Tea?")
    assert server.process.wait() == 130 and not read_lines(tmp_path / "new/people.jsonl")


def test_a_talk_about_a_request_of_ones_own(run, server, monkeypatch):
    def talked(lines, *flags, **more):
        monkeypatch.setattr("builtins.input", Mock(side_effect=[*lines.split("|"), EOFError]))     # Ctrl-D at last
        return run(talk, *flags, **more)
    out, _ = talked("Can you help me with a simple dinner?||My diet is vegan.||My budget is tiny.|", *TOY)
    assert re.search(r"\?\n\n\n.*\?\n\n\nHere is my advice for a simple dinner\..* vegan\..* Good luck!\n\n$", out)
    monkeypatch.setattr(os, "_exit", sys.exit)
    served = "--questioner", f"openai:q@{server.url}"
    assert talked("Help me.|", *served, status=130) == ("What would you like help with?\n\n\nYes.\n\n", "")
    server.reply = lambda request: (200, "")
    assert ": empty (finish_reason stop)\n" in talked("Help me.|", *served, status=1)[1]
