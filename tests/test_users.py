"""Several Roleplayers, users of other manners, and people at a terminal."""
import fcntl
import os
import pty
import random
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest

import common
import evaluate
import gold
import simulate
import users
from aloe import simulate as aloe
from conftest import ROOT, read_lines, write_rows
from toy import server as toy
from toy import world as toy_world

TOY = ["--questioner", ROOT / "toy/base", "--dtype", "float32", "--max-tokens", 64]


# ------------------------------------------------------------ a person at the terminal

def at_terminal(command, typed, marker="> ", seconds=120):
    """Runs a command in a pseudo-terminal; types the next of `typed` at each prompt -> (exit status, what was shown)."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, *map(str, command)], {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 40, 200, 0, 0))        # tqdm draws nothing without a width
    shown, typed, seen, end = b"", list(typed), 0, time.time() + seconds
    while time.time() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                part = os.read(terminal, 4096)
            except OSError:                                      # Linux: the other side is closed
                break
            if not part:
                break
            shown += part
            if typed and shown[seen:].endswith(marker.encode()):
                seen = len(shown)
                os.write(terminal, typed.pop(0).encode())
    else:
        os.kill(pid, 9)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return status, re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", shown.decode()).replace("\r", "")


def test_a_person_talks_about_a_request_of_their_own(tmp_path):
    command = ["simulate.py", *TOY, "--roleplayer", "human", "--task", "Can you help me with a simple dinner?",
               "--max-turns", 2, "--output", tmp_path / "talk.jsonl"]
    status, shown = at_terminal(command, ["\n", "\n", "My diet is vegan.\n", "I mean it.\n", "\n", "My budget is tiny.\n", "\n"])
    row, = read_lines(tmp_path / "talk.jsonl")
    assert status == 0 and row["roleplayer"] == "human" and len(row["conversation"]) == 4
    assert row["conversation"][1]["content"] == "My diet is vegan.\nI mean it.", "an empty line ends, but does not begin"
    for turn in row["conversation"][::2]:
        assert f"\n{turn['content']}\n" in shown, "each question is shown"
    assert "assistant: Here is my advice for a simple dinner." in shown and "1 rows, 0 refused" in shown, "and then the answer"
    assert "conversations:" not in shown, "no bar"


def test_ctrl_d_keeps_what_is_done_and_the_same_command_goes_on(tmp_path, world, server):
    command = ["simulate.py", "--questioner", f"openai:q@{server.url}", *world.flags("tasks", "personas"), "--roleplayer", "human",
               "--samples", 1, "--limit", 3, "--max-turns", 1, "--output", tmp_path / "talk.jsonl"]
    status, shown = at_terminal(command, ["First.\n", "\n", "half of an answ\n", "\x04"])
    assert status == 130 and "What is done is kept" in shown and not (tmp_path / "talk.jsonl").exists()
    assert shown.count("You are roleplaying a person") == 2, "the persona is shown, with the question"
    status, shown = at_terminal(command, ["Second.\n", "\n", "Third.\n", "\n"])
    rows = read_lines(tmp_path / "talk.jsonl")
    assert status == 0 and shown.count("You are roleplaying a person") == 2
    assert {row["conversation"][1]["content"] for row in rows} == {"First.", "Second.", "Third."}


def test_an_answer_that_was_lost_is_asked_again_and_a_request_may_be_long(tmp_path, server):
    """The Questioner's closing answer fails; the same command asks for it again, and for nothing else."""
    server.reply = lambda request: (400, "no") if len(request["messages"]) == 3 and len(server.requests) < 3 else (
        200, "Here you are." if len(request["messages"]) == 3 else "What for?")
    command = ["simulate.py", "--questioner", f"openai:q@{server.url}", "--roleplayer", "human", "--task", "Help me. " * 99,
               "--max-turns", 1, "--output", tmp_path / "talk.jsonl"]
    status, shown = at_terminal(command, ["Tea.\n", "\n"])
    assert status == 2 and "openai:q: 2 calls" in shown
    status, shown = at_terminal(command, [])
    assert status == 0 and "assistant: Here you are." in shown and "What for?" not in shown and len(server.requests) == 3


ASK = """
from types import SimpleNamespace
from common import Request
from human import Human
person = Human(SimpleNamespace(num_processes=1))
print(list(person.generate({1: Request([{"role": "user", "content": "Why?"}])}, 0, 1, 9)))
"""


def test_bytes_that_are_no_text_are_asked_for_again():
    done = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, env={
        **os.environ, "PYTHONIOENCODING": "utf-8:surrogateescape"}, input=b"\n caf\xe9\n  two  \n caf\xc3\xa9\n\n")
    assert b"This line is not UTF-8" in done.stdout and "text='two\\n café'".encode() in done.stdout, done.stderr


def test_a_line_longer_than_a_terminal_takes_is_not_cut():
    text = "My diet is vegan. " * 400                            # 7,200 characters; a terminal's own line has 4,095
    status, shown = at_terminal(["-c", ASK], [text + "\n", "\n"])
    assert status == 0 and f"text='{text.strip()}'" in shown.replace("\n", "")


def test_a_person_judges_blind_and_writes_golds(world, tiny, run, server):
    run(evaluate, *world.command("evaluate", tiny, output="e0"))
    flags = [*world.judged(tiny, server.url), "--judge", "human", "--metrics", "win_rate", "--win-pairs", 6]
    status, shown = at_terminal(["evaluate.py", *flags], ["a\n", "\n", "Final Response: B\n", "\n", *["B\n", "\n"] * 4])
    rows = read_lines(world.path("e1/verdicts.jsonl"))
    assert status == 0 and len(rows) == 6 and {row["raw"] for row in rows} == {"a", "B", "Final Response: B"}
    assert {(row["raw"][-1].upper(), row["order"], row["verdict"]) for row in rows} <= {
        (place, order, "ours" if (place == "A") == (order == "ours_first") else "base")
        for place in "AB" for order in evaluate.ORDERS}
    for word in ("ours", "base_first", "Q_BASE"):
        assert word not in shown.partition("For the following user query")[2].rpartition("> ")[0], "the judge is blind"
    status, _ = at_terminal(["gold.py", *world.command("gold", tiny, server.url, "g.jsonl"), "--oracle", "human", "--limit", 1],
                            ["Drink tea.\n", "Every day.\n", "\n"])
    assert status == 0 and read_lines(world.path("g.jsonl"))[0]["gold"] == "Drink tea.\nEvery day."
    assert not server.requests


def test_people_need_one_process_and_a_request_of_ones_own_needs_a_person(world, run, tiny, server):
    with pytest.raises(SystemExit):
        common.open_model("human", SimpleNamespace(), SimpleNamespace(num_processes=2))
    _, err = run(simulate, *world.command("simulate", tiny, server.url), "--task", "Help me.", status=2)
    _, err = run(simulate, *world.command("simulate", tiny, server.url), "--roleplayer", "human", "--task", " ", status=2)
    assert "--task is one talk about your own request: with --roleplayer human" in err


def test_a_person_plays_aloes_user(tmp_path, server):
    write_rows(tmp_path / "p.jsonl", [{"persona_id": "a", "split": "train", "profile": "He has 4 hens.", "personality": "He is calm."}])
    server.reply = lambda request: (200, f"Reply {len(request['messages'])}.")
    status, shown = at_terminal(["aloe/simulate.py", "--model", f"openai:m@{server.url}", "--inducer", f"openai:i@{server.url}",
                                 "--roleplayer", "human", "--personas", tmp_path / "p.jsonl", "--rounds", 2, "--output",
                                 tmp_path / "c.jsonl"], ["Hello!\n", "\n", "Bye.\n", "\n"])
    row, = read_lines(tmp_path / "c.jsonl")
    assert status == 0 and [r["user"] for r in row["rounds"]] == ["Hello!", "Bye."] and row["roleplayer"] == "human"
    assert "He has 4 hens." in shown and "\nReply 1.\n" in shown


# ------------------------------------------------------------ several Roleplayers

def several(world, tiny, server, output="out.jsonl", *more):
    flags = world.command("simulate", tiny, server.url, output)
    at = flags.index("--roleplayer")
    return [*flags[:at], *flags[at + 2:], "--roleplayer", *(f"openai:{name}@{server.url}" for name in ("m1", "m2")), *more]


def test_several_share_the_pairs_and_rows_say_who_answered(run, world, tiny, server, short):
    server.reply = lambda request: (200, f"I am {request['model']}.")
    out, _ = run(simulate, *several(world, tiny, server))
    rows = read_lines(world.path("out.jsonl"))
    of_pair = defaultdict(set)
    for row in rows:
        assert {turn["content"] for turn in row["conversation"][1::2]} == {f"I am {row['roleplayer']}."}
        of_pair[row["task_id"], row["persona_id"]].add(row["roleplayer"])
    assert all(len(names) == 1 for names in of_pair.values()) and set.union(*of_pair.values()) == {"m1", "m2"}
    calls = Counter(request["model"] for request in server.requests)
    for name in ("m1", "m2"):
        assert f"openai:{name}: {calls[name]} calls" in out, "what is announced is what is asked"
    before = open(world.path("out.jsonl"), "rb").read()
    run(simulate, *several(world, tiny, server, "again.jsonl", "--batch-size", 2))
    assert open(world.path("again.jsonl"), "rb").read() == before, "who answers does not depend on the blocks"
    settings = common.read_settings(world.path("out.jsonl"))
    assert settings["roleplayer"] == ["openai:m1", "openai:m2"] and evaluate.roleplayer_label(world.path("out.jsonl"), None) == "m1 + m2"
    _, err = run(simulate, *several(world, tiny, server), "--roleplayer-weights", 1, 2, status=2)
    assert "made with other settings: roleplayer_weights" in err
    assert [len(of) for of in several_dry(run, world, tiny, server)] == [2, 0]


def several_dry(run, world, tiny, server):
    asked = len(server.requests)
    out, _ = run(simulate, *several(world, tiny, server, "dry.jsonl", "--dry-run"), status=0)
    return re.findall(r"openai:m\d: \d+ calls", out), server.requests[asked:]


def test_weights_are_kept():
    several = {users.User(name, name, "p"): weight for name, weight in (("a", 3.0), ("b", 1.0))}
    count = Counter(users.user_of(several, 42, f"t{i}", f"p{j}").name for i in range(100) for j in range(40))
    assert abs(count["a"] / 4000 - 0.75) < 3 * (0.75 * 0.25 / 4000) ** 0.5
    other = [users.user_of(several, seed, "t", "p").name for seed in range(50)]
    assert len(set(other)) == 2, "another seed, another user"


def test_one_model_under_several_prompts(run, world, tiny, server, short, tmp_path):
    for name, opening in (("brief", "Be brief."), ("chatty", "Tell more.")):
        (tmp_path / f"{name}.txt").write_text(f"{opening} {{persona}} asks {{task}}\n{{conversation}}\nYou: \n")
    server.reply = lambda request: (200, request["messages"][-1]["content"].split(".")[0])
    prompts = ["--roleplayer-prompt", tmp_path / "brief.txt", tmp_path / "chatty.txt"]
    run(simulate, *world.command("simulate", tiny, server.url), *prompts)
    rows = read_lines(world.path("out.jsonl"))
    said = {(row["roleplayer"], turn["content"]) for row in rows for turn in row["conversation"][1::2]}
    assert said == {("m (brief.txt)", "Be brief"), ("m (chatty.txt)", "Tell more")}
    persona = {row["persona_id"]: row["persona"] for row in world.personas}
    for request in server.requests:
        text = request["messages"][-1]["content"]
        assert any(text.split(". ", 1)[1].startswith(f"{one} asks Help me with thing") for one in persona.values())
    assert evaluate.roleplayer_label(world.path("out.jsonl"), None) == "m (brief.txt) + m (chatty.txt)"
    (tmp_path / "chatty.txt").write_text("Other. {persona} {task} {conversation}")
    _, err = run(simulate, *world.command("simulate", tiny, server.url), *prompts, status=2)
    assert "made with other settings: roleplayer_prompt" in err
    one = world.command("simulate", tiny, server.url, "one.jsonl")
    run(simulate, *one, *prompts[:2])
    assert {row["roleplayer"] for row in read_lines(world.path("one.jsonl"))} == {"m (brief.txt)"}


@pytest.mark.parametrize("text, more", [("{persona} {task}", []), ("{persona} {task} {conversation} {name}", []),
                                        ("{persona} {task} {conversation} {", []),
                                        ("{persona} {task} {conversation}", ["--roleplayer-weights", 1, 2])])
def test_a_prompt_or_weights_that_do_not_fit(run, world, tiny, server, tmp_path, text, more):
    (tmp_path / "p.txt").write_text(text)
    _, err = run(simulate, *world.command("simulate", tiny, server.url), "--roleplayer-prompt", tmp_path / "p.txt", *more, status=2)
    assert ("no other braces" if not more else "1 --roleplayer, 1 --roleplayer-prompt and 2 --roleplayer-weights: give as many") in err and err.count("\n") == 1


def test_names_that_are_the_same(run, world, tiny, server, short, tmp_path):
    """The same model twice is one user, with a label; two of one name are refused: rows could not tell them apart."""
    flags = several(world, tiny, server)
    at = flags.index("--roleplayer")
    run(simulate, *flags[:at + 2], *flags[at + 1:at + 2], *flags[at + 3:])
    assert {row["roleplayer"] for row in read_lines(world.path("out.jsonl"))} == {"m1"}
    assert evaluate.roleplayer_label(world.path("out.jsonl"), None) == "m1"
    twice = SimpleNamespace(roleplayer=["a", "a", "b"], roleplayer_prompt=None, roleplayer_weights=None)
    assert {user.name: weight for user, weight in users.read_users(twice, "{persona}").items()} == {"a": 2.0, "b": 1.0}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.txt").write_text(f"{folder} {{persona}} {{task}} {{conversation}}")
    (tmp_path / "other.txt").write_text("Other. {persona} {task} {conversation}")
    prompts = ["--roleplayer-prompt", tmp_path / "a/p.txt", tmp_path / "b/p.txt", tmp_path / "other.txt"]
    _, err = run(simulate, *world.command("simulate", tiny, server.url, "two.jsonl"), *prompts, status=2)
    assert "Two Roleplayers are called m (p.txt). Rename" in err
    (tmp_path / "a/p.txt").write_bytes("\xe9 {persona} {task} {conversation}".encode("latin-1"))
    _, err = run(simulate, *world.command("simulate", tiny, server.url, "two.jsonl"), *prompts, status=2)
    assert "p.txt: 'utf-8' codec can't decode" in err and "Save it as UTF-8" in err


def test_one_roleplayer_has_the_settings_that_it_always_had(run, world, tiny, server, short):
    run(simulate, *world.command("simulate", tiny, server.url))
    settings = common.read_settings(world.path("out.jsonl"))
    assert settings["roleplayer"] == "openai:m" and "users" not in settings
    assert {row["roleplayer"] for row in read_lines(world.path("out.jsonl"))} == {"m"}


def test_aloe_takes_several_users(run, tmp_path, server):
    write_rows(tmp_path / "p.jsonl", [{"persona_id": f"a{i}", "split": "train", "profile": f"He has {i} hens.",
                                       "personality": "He is calm."} for i in range(12)])
    server.reply = lambda request: (200, f"I am {request['model']}.")
    out, _ = run(aloe, "--model", f"openai:m@{server.url}", "--inducer", f"openai:i@{server.url}", "--personas", tmp_path / "p.jsonl",
                 "--rounds", 2, "--output", tmp_path / "c.jsonl", "--roleplayer", f"openai:u1@{server.url}", f"openai:u2@{server.url}")
    rows, calls = read_lines(tmp_path / "c.jsonl"), Counter(request["model"] for request in server.requests)
    assert {row["roleplayer"] for row in rows} == {"u1", "u2"} and all(f"openai:{u}: {calls[u]} calls" in out for u in ("u1", "u2"))
    assert all({r["user"] for r in row["rounds"]} == {f"I am {row['roleplayer']}."} for row in rows)


# ------------------------------------------------------------ users of other manners

def answers(manner, history, persona, seeds):
    prompt = common.read_prompt("roleplayer_user").format(
        persona=toy_world.persona_text(persona, random.Random(0)), task="I am looking for a classic trip.", conversation=history)
    system = common.read_prompt("roleplayer_system")
    return [toy.reply({"model": f"roleplayer{manner}", "seed": seed, "messages": [
        {"role": "system", "content": system}, {"role": "user", "content": prompt}]}) for seed in range(seeds)]


def test_the_manners_of_the_embedded_world():
    persona, ask = toy_world.draw_persona(random.Random(1)), "AI Assistant: What is your pet?"
    plain = {form.format("pet", persona["pet"]) for form in toy_world.ANSWERS}
    assert set(answers("", ask, persona, 40)) == plain and set(answers("-terse", ask, persona, 40)) == {f"{persona['pet']}."}
    evasive = Counter(answers("-evasive", ask, persona, 400))
    assert set(evasive) == plain | {toy_world.EVASIVE} and 70 < evasive[toy_world.EVASIVE] < 130       # 100 +- 3 x 8.7
    for said in answers("-chatty", ask, persona, 40):
        facts = toy_world.facts_in(said)
        assert len(facts) == 3 and ("pet", persona["pet"]) in facts and all(persona[slot] == value for slot, value in facts)
    assert len(set(answers("-chatty", ask, persona, 40))) > 20
    erring = answers("-erring", ask, persona, 1000)
    wrong = [said for said in erring if said not in plain]
    assert 70 < len(wrong) < 130                                                                       # 100 +- 3 x 9.5
    assert all(slot == "pet" and value != persona["pet"] for said in wrong for slot, value in toy_world.facts_in(said))
    again = f"{ask}\nYou: {wrong[0]}\nAI Assistant: May I ask about your pet?"
    assert set(answers("-erring", again, persona, 300)) == plain, "asked again, it is corrected"
    other = f"AI Assistant: What is your job?\nYou: My job is {persona['job']}.\n{ask}"
    assert len(set(answers("-erring", other, persona, 300))) > 2, "another question before is none of the same"
    for manner in ("", "-terse", "-evasive", "-chatty", "-erring"):
        assert set(answers(manner, "AI Assistant: Why?", persona, 20)) == {toy_world.UNSURE}
    assert set(toy.USERS) == {f"roleplayer{manner}" for manner in ("", "-terse", "-evasive", "-chatty", "-erring")}


def test_the_tables_of_other_manners_by_hand():
    """Shares of a win (.625 and .75 above one half are .125 and .25); facts told: a wrong one is none, unasked ones are."""
    done = subprocess.run([sys.executable, "-c", """if True:
        import sys; sys.path.insert(0, "toy"); import manners, measure
        print(manners.share_kept([(1, 1), (0.5, 1), (1, 1), (0, 0)]), manners.share_kept([(1, 0), (1, 1)]))
        def talk(*texts):
            return [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(texts)]
        print(manners.asks_again(talk("What is your pet?", "No.", "Your pet?", "dog.", "Why?", "dog.")))
        task, persona = "Help me plan a bold dinner.", "I'm Anna. My diet is vegan. My budget is tiny. My pet is dog."
        print(*(measure.coverage(talk("What is your diet?", told), task, persona) for told in (
            "My diet is vegan.", "My diet is keto.", "My diet is vegan. My budget is tiny.", "My pet is dog.")))
        pairs = [(t, p) for t in "ab" for p in "xyz"]
        def run(*points):
            return {"win rate": dict(zip(pairs, points))}
        won = {("plain", "roleplayer", 1): run(1, 1, 1, 1, 1, 0), ("plain", "roleplayer-terse", 1): run(1, 1, 1, 1, 0, 0)}
        won |= {("plain", user, 1): run(1, 1, 1, 0, 0, 0) for user in manners.MANNERS[1:]}
        for text in manners.kept(won, 1, lambda user: ("plain", user), lambda user: ("plain", "roleplayer")):
            print(text.split()[0])"""], cwd=ROOT, capture_output=True, text=True)
    # of wins 5/6, 4/6 and 3/6: (1/6) / (2/6), 0, and together (4/6 + 3 x 3/6) / 4 - 1/2 = 1/24 of 1/3
    assert done.stdout.split() == "0.5 None 0.5 1.0 0.0 2.0 0.0 0.50 0.00 0.00 0.00 0.12".split(), done.stdout + done.stderr
