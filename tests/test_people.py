"""People at a terminal or a web page: behind a server in the place of a model, and in a talk of their own."""
import http.client
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import html5lib
import openai
import pytest

import evaluate
import gold
import simulate
from common import fold_system
from conftest import ROOT, read_lines
from people import talk
from people.page import read_fields

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
    assert "Why?" not in server.shown
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


TOKEN, TALK = "a-secret-of-20-letters", [{"role": "assistant", "content": "Why?\nYou: no"}]
EVIL = "</div><script>{task}\u202e\n\nAnswer B: \\1"


class Page:
    """people/server.py --page, the scripts that ask, and the people in their browsers."""

    def __init__(self, answers, *flags, port=0, **env):
        command = [sys.executable, "people/server.py", "--page", "--answers", answers, "--port", port, *flags]
        self.process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env={**os.environ, **env}, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.line, self.pool = self.process.stdout.readline(), ThreadPoolExecutor()
        self.token = env.get("SERVER_API_KEY")
        self.port = re.search(r":(\d+)/v1", self.line + ":0/v1")[1]

    def post(self, body, path="/work", **headers):
        """-> (status, what is said)"""
        told = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}", **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET" if body is None else "POST", path, body, told)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()

    def work(self, name, has=None, status=200, **more):
        said = self.post(json.dumps({"name": name, "has": has, **more}))
        assert said[0] == status, said
        return json.loads(said[1])

    def item(self, name):
        """The request that somebody gets, sooner or later."""
        for _ in range(200):
            if item := self.work(name)["item"]:
                return item
            time.sleep(0.05)

    def ask(self, model, chat, timeout=60, max_retries=0):      # with them, a killed server's asks come to the next one
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.token or "-", timeout=timeout,
                               max_retries=max_retries)
        asked = self.pool.submit(client.chat.completions.create, model=model, messages=chat)
        return lambda: asked.result().choices[0].message.content


@pytest.fixture
def page(tmp_path):
    """page(flags ...) -> a server; all of them have the same answers."""
    pages = []
    yield lambda *flags, **env: pages.append(Page(tmp_path / "a.jsonl", *flags, **env)) or pages[-1]
    [page.process.kill() for page in pages]


def chat(text):
    return [{"role": "user", "content": text}]


def test_the_page_shows_what_a_role_needs_and_no_more(page):
    shown = [["The person", "I'm {Ann}.\n\nTea."], ["The request", EVIL.replace("\u202e", "?")]]
    for role, asked, more in (
            ("roleplayer", simulate.roleplayer_chat("I'm {Ann}.\n\nTea.", EVIL, TALK),
             [["The conversation so far", "AI Assistant: Why?\nYou: no"]]),
            ("oracle", gold.oracle_chat("I'm {Ann}.\n\nTea.", EVIL), []),
            ("judge", evaluate.judge_chat("I'm {Ann}.\n\nTea.", EVIL, "Ours", "Base", "base_first"),
             [["Answer A", "Base"], ["Answer B", "Ours"]])):
        server = page("--role", role, "--undo", 0)
        for each, parts in ((asked, [*shown, *more]), (fold_system(asked), [*shown, *more]),
                            (chat(f"No {role}'s"), [["user", f"No {role}'s"]])):
            answer, item = server.ask("anna", each), server.item(" ANNA")
            assert item["parts"] == parts and item["judge"] == (role == "judge" and len(parts) > 1)
            server.work("Anna", item["request"], answer="Final Response: B")
            assert evaluate.read_verdict(answer(), "base_first") == "ours"
        server.process.kill()


def test_a_text_that_looks_like_the_prompt_moves_no_border():
    template = "Is it {a}?\n\nA: {b}\n\nB: {c}\nSay {{it}}."
    assert read_fields(template, template.format(a="{b}", b="", c="\nx")) == {"a": "{b}", "b": "", "c": "\nx"}
    for b, c in ("x\n\nB: y", "z"), ("x", "y\n\nB: z"), ("x?\n\nA: ", "z"):
        assert read_fields(template, template.format(a="tea", b=b, c=c)) is None
    assert read_fields(template, "Is it tea?") is read_fields(template, "") is None


def test_several_people_share_requests_and_nothing_is_lost_or_asked_twice(page, tmp_path):
    server = page("--hold", 1.5, "--undo", 600)
    for text in "One?", "Two?":
        server.ask("anyone", chat(text))
        server.item("ben" if text == "Two?" else "anna")
    anna, ben = server.item("anna"), server.item("Ben")
    assert [anna["parts"], ben["parts"]] == [[["user", "One?"]], [["user", "Two?"]]]
    assert server.work("carl") == {"item": None, "progress": "You: 0 done, 0 to do. All: 0 of 2 done.", "back": False}
    server.work("carl", ben["request"], answer="Mine", status=409)
    server.work("ben", ben["request"], answer=" ", status=409)
    assert server.work("ben", ben["request"])["item"] == {"request": ben["request"]}
    assert server.work("ben", ben["request"], answer="Tea")["item"] is None and server.work("ben")["back"]
    assert read_lines(tmp_path / "a.jsonl")[0]["answer"] == "Tea"
    back = server.work("ben", back=True)["item"]
    assert (back["request"], back["draft"]) == (ben["request"], "Tea") and not read_lines(tmp_path / "a.jsonl")
    server.work("ben", ben["request"], answer="Soup")
    assert server.item("carl")["request"] == anna["request"], "after a while"
    server.ask("anyone-2", chat("Two?"))
    assert server.item("dora")["parts"] == [["user", "Two?"]]
    time.sleep(1.6)
    assert server.item("ben")["parts"] == [["user", "One?"]], "nobody answers the same messages twice"
    server.process.kill()
    server = page("--undo", 0, port=server.port)
    assert server.ask("anyone", chat("Two?"))() == "Soup"
    late = server.ask("anna", chat("Late?"), timeout=1.5, max_retries=4)        # gives up, and asks again
    item = server.item("anna")
    time.sleep(2)
    server.work("anna", item["request"], answer="Yes.")
    assert late() == "Yes."
    server.work("anna", back=True, status=409)
    kept = read_lines(tmp_path / "a.jsonl")
    assert [(row["by"], row["model"], row["answer"]) for row in kept] == [
        ("ben", "anyone", "Soup"), ("anna", "anna", "Yes.")] and 1 <= kept[1]["seconds"] < 30


def test_whom_and_what_the_page_turns_away(page):
    local, afar = page(), page("--host", "0.0.0.0", SERVER_API_KEY=TOKEN)
    assert TOKEN not in afar.line and "/#SERVER_API_KEY" in afar.line
    work = json.dumps({"name": "a", "has": None})
    for server, body, path, headers, status in (
            (local, work, "/work", {"Host": "evil.example"}, 403), (local, None, "/", {"Host": "127.0.0.1.evil"}, 403),
            (local, work, "/work", {"Content-Type": "text/plain"}, 415), (local, None, "/../README.md", {}, 404),
            (local, " " * (2 ** 24 + 1), "/work", {}, 413), (local, "[" * 10 ** 6, "/work", {}, 400),
            (local, '{"model": "a"}', "/v1/chat/completions", {}, 400), (local, work, "/work", {}, 200),
            (afar, work, "/work", {"Authorization": ""}, 401), (afar, None, "/x", {"Authorization": "Bearer é"}, 401),
            (afar, work, "/v1/chat/completions", {"Authorization": f"Bearer {TOKEN}x"}, 401),
            (afar, work, "/work", {"Host": "lab.example"}, 200)):
        said = server.post(body, path, **headers)
        assert said[0] == status and (status == 200 or "\n" not in json.loads(said[1])["error"]["message"]), said
    status, text = afar.post(None, "/", Authorization="")
    html5lib.HTMLParser(strict=True).parse(text)
    assert status == 200 and not re.search(r"https?://|NONCE", text) and TOKEN not in text
    for secret in "", "short", "with a blank, and a #":
        refused = page("--host", "0.0.0.0", SERVER_API_KEY=secret)
        assert refused.process.wait() == 2 and "Set SERVER_API_KEY" in refused.line
    assert "belong to --page" in subprocess.run([sys.executable, "people/server.py", "--host", "0.0.0.0"], cwd=ROOT,
                                                capture_output=True, text=True).stderr
