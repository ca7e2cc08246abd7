"""ALOE's embedded world: its rules, its server, and the base that is shipped."""
import itertools
import json
import random
import subprocess
import sys
import time

import pytest
from openai import OpenAI

from aloe.toy import measure, pretrain, server, world
from common import read_prompts
from conftest import ROOT, read_lines, run_stage, write_rows


def people(count, seed=0):
    """Random (rng, persona, profile, personality)."""
    rng = random.Random(seed)
    personas = [world.draw_persona(rng) for _ in range(count)]
    return [(rng, persona, *world.sentences(persona, rng)) for persona in personas]


# ---- the world


def test_a_user_shows_a_little_in_each_message_and_all_of_it_in_time():
    known = {k: [] for k in range(1, 11)}
    for rng, persona, *_ in people(500):
        said = []
        for k in known:
            before = world.revealed(said)
            said.append(world.message(persona, before, rng))
            now = world.revealed(said)
            assert now.items() <= persona.items() and before.items() <= now.items(), "users do not lie"
            assert sum(name in world.SLOTS for name in now) - sum(name in world.SLOTS for name in before) <= 1
            assert len(now) - len(before) <= 2 and world.message(persona, now, rng, mute=True) in world.SMALL_TALK
            known[k].append(sum(name in world.MANNERS for name in now))
    mean = {k: sum(counts) / len(counts) for k, counts in known.items()}
    for k in known:                 # a manner is shown with 3/4 x 1/3 = 1/4 in each round
        assert mean[k] == pytest.approx(3 * (1 - 0.75 ** k), abs=0.12)


def test_judge_agrees_with_a_count_by_hand():
    persona = {**dict.fromkeys(world.SLOTS), "pet": "dog", "city": "Oslo", "tone": "casual", "mood": "dry",
               "close": "curious"}
    for text, score in [
            ("Hey mate, your pet is dog. Noted. What comes next?", 5),
            ("What comes next? Noted. your pet is DOG. Hey mate,", 5),                 # order and case count nothing
            ("Hey mate, your pet is dog. your city is Oslo. Noted. What comes next?", 5),
            ("Hey mate, I hear you. Noted. What comes next?", 4),
            ("Dear friend, your pet is dog. Noted. What comes next?", 4),
            ("Hey mate, Dear friend, your pet is dog. Noted. What comes next?", 4),    # both poles are none
            ("Hey mate, your pet is cat. Noted. What comes next?", 3),
            ("Hey mate, your pet is cat. your city is Oslo. Noted. What comes next?", 4),
            ("Dear friend, your pet is cat. How lovely! Take care.", 1),               # never below 1
            ("Dear friend, your pet is dog. How lovely! Take care.", 2), ("", 1), ("dog", 2), ("cat dog parrot", 1)]:
        assert world.judge_score(text, persona) == score, text


# ---- the server

def filled(prompt, **fields):
    return read_prompts(f"aloe_{prompt}")[f"aloe_{prompt}"].format(**fields)


def ask(model, prompt, *turns, seed=0, **fields):
    chat = [{"role": role, "content": text} for role, text in zip(
        itertools.cycle(["user", "assistant"]), [filled(prompt, **fields), *turns])]
    return server.reply({"model": model, "messages": chat, "seed": seed})


def test_the_server_starts_answers_the_papers_prompts_and_ends(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "aloe/toy/server.py", "--port", "0", "--port-file",
                                tmp_path / "url", "--end-with-parent"])
    while not (tmp_path / "url").exists():
        assert process.poll() is None, "it ended before it listened"
        time.sleep(0.1)
    client = OpenAI(base_url=(tmp_path / "url").read_text().strip(), api_key="none")
    chat = [{"role": "user", "content": filled("profiles", examples="A\nB\nC\nD\nE")}]
    first, second = (client.chat.completions.create(model="aloe-writer", messages=chat, seed=seed)
                     .choices[0].message.content for seed in (1, 2))
    lines, traits = first.splitlines(), ask("aloe-writer", "personalities", examples="A").splitlines()
    assert len(lines) == len(set(lines)) == 20 and first != second
    assert len(traits) == 20 and len(set(traits)) > 15 and world.read_persona(lines[0], traits[0])
    process.terminate()
    assert process.wait(timeout=10) == 0


def test_a_users_messages_do_not_depend_on_the_replies():
    for _, persona, profile, personality in people(20):
        fields, talks = {"profile": profile, "personality": personality}, ([], [])
        for k in range(10):
            for talk, reply in zip(talks, ("Hey mate, your job is acting.", "A: My pet is cat.\nB: No.")):
                talk += [ask("aloe-user", "roleplay", *talk, seed=k, **fields), reply]
        assert talks[0][::2] == talks[1][::2]
        assert world.revealed(talks[0][::2]).items() <= persona.items()
        slots = [world.facts_in(text) for text in talks[0][::2]]
        assert len(set().union(*slots)) == sum(map(len, slots)), "each fact is told once"
        assert ask("aloe-user-mute", "roleplay", *talks[0], **fields) in world.SMALL_TALK


def test_inducer_extracts_what_the_users_lines_show():
    conversation = ("A: Good day. My pet is dog.\nB: My city is Rome. Yo. Hooray!\n"
                    "A: My city is Oslo. The sun is out.\nB: Noted.\nA: It is late. Ask me!")
    persona = world.draw_persona(random.Random(0))
    profile, personality = "My pet is dog. My job is acting. My city is Oslo.", "I am nosy. I am dry. I am polite."
    profile += "".join(f" My {slot} is {persona[slot]}." for slot in world.SLOTS if slot not in ("pet", "job", "city"))
    fields = {"conversation": conversation, "profile": profile, "personality": personality}
    assert ask("aloe-inducer", "induction", **fields) == (
        "Profile: My pet is dog. My city is Oslo.\nPersonalities: I am nosy. I am polite."), "in the persona's words"
    foreign = ask("aloe-inducer-foreign", "induction", **fields)
    true, other = map(world.read_sentences, (ask("aloe-inducer", "induction", **fields), foreign))
    assert set(other) == set(true) and other["pet"] != "dog" and other["city"] != "Oslo", "as much of somebody else"
    assert ask("aloe-inducer-foreign", "induction", **fields) == foreign, "always the same"
    fields["conversation"] = "A: It rains again."
    assert ask("aloe-inducer", "induction", **fields) == "Profile: None\nPersonalities: None"
    assert ask("aloe-inducer-foreign", "induction", **fields) == "Profile: None\nPersonalities: None"


def test_server_judges_and_refuses_everything_else():
    _, _, profile, personality = people(1)[0]
    person, turn = {"profile": profile, "personality": personality}, "Hiya."
    text = world.reply(world.draw_persona(random.Random(1)), random.Random(2))
    assert ask("aloe-judge", "judge", message="Hi", response=text, **person) == str(
        world.judge_score(text, world.read_persona(profile, personality)))
    for model, prompt, turns, fields, reason in [
            ("aloe", "roleplay", [], person, "no model"), ("aloe-judge", "roleplay", [], person, "not the prompt"),
            ("aloe-user", "roleplay", [turn], person, "end with the user"),
            ("aloe-inducer", "roleplay", [turn, turn], person, "one message"),
            ("aloe-user", "roleplay", [], {**person, "profile": "A cat."}, "no persona of this world")]:
        with pytest.raises(server.Refused, match=reason):
            ask(model, prompt, *turns, **fields)


def test_measure_by_hand(tmp_path):
    profile = " ".join(f"My {slot} is {values[0]}." for slot, values in world.SLOTS.items())       # a dog, Paris
    person = {"split": "dev", "profile": profile, "personality": "I am polite. I am dry. I am shy."}
    talks = [[("My pet is dog.", "Dear friend, your pet is dog. Noted. Take care."),           # 1, used, none invented
              ("It is late.", "Hey mate, your pet is dog. city: Paris. How lovely! Take care.")],      # 1/3, used, one
             [("It is late.", "Dear friend, is it acting?"), ("Yo. My job is acting.", "cat, jazz")]]  # 1/3, one; 0
    rows = [{**person, "persona_id": f"p{i}", "rounds": [dict(zip(("user", "reply"), pair)) for pair in talk]}
            for i, talk in enumerate(talks)] + [{"persona_id": "p2", "refused": "reply, round 1: empty"}]
    write_rows(tmp_path / "c", rows)
    write_rows(tmp_path / "c.settings.json", [{"temperature": 0.0, "split": "dev", "roleplayer": "openai:aloe-user"}])
    run_stage("aloe/toy/measure.py", "--variant", "sft", "--conversations", tmp_path / "c", "--results", tmp_path / "r")
    found = {row["metric"]: row for row in read_lines(tmp_path / "r")}
    expected = {"fitting_manners": (2 / 3, 1 / 6), "used_facts": (1, 0), "invented_facts": (0.5, 1.5),
                "ceiling": (3.5, (2.5 + 4) / 2)}                # 1 + 3/2, + 1 for a fact, + 1/2 for a manner
    assert list(found) == sorted(expected)
    for metric, (first, second) in expected.items():
        row = found[metric]
        assert row["mean"] == pytest.approx((first + second) / 2) and row["n"] == 2, metric
        assert row["sem"] == pytest.approx(abs(first - second) / 2), "of two independent values"
        assert (row["condition"], row["roleplayer"], row["split"]) == ("T=0", "aloe-user", "dev")
    pairs = [{"user": "Yo.", "preferred": "Dear friend, Noted.", "rejected": said} for said in ("Noted.", "Oslo", "")]
    pairs.append({**pairs[0], "rejected": "Dear friend, dog, Noted. Take care."})
    scores = measure.measure(world.read_persona(profile, person["personality"]), pairs)
    assert scores == {"preferred": [3] * 4, "rejected": [2, 1, 1, 5], "better": [1, 1, 1, 0], "worse": [0, 0, 0, 1],
                      "ceiling": [3] * 4}
    assert found["invented_facts"]["by_round"] == [0.5, 1.5] and found["used_facts"]["by_round"] == [0.5, 0.5]


# ---- the base

def test_base_is_small_and_can_adapt_and_copy_but_is_as_the_crowd():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    base = [kind.from_pretrained(ROOT / "aloe/toy/base") for kind in (AutoModelForCausalLM, AutoTokenizer)]
    assert base[0].num_parameters() < 300_000
    assert pretrain.copying(*base, 8) >= pretrain.FLOORS["copy_8"]
    pretrain.pretrain.torch.manual_seed(0)
    (manners, facts, _), (hint_manners, hint_facts, hint_wrong) = (
        pretrain.adapting(*base, hinted, 96) for hinted in (False, True))
    assert hint_manners > manners + 0.05 and hint_facts > facts + 0.05 and hint_wrong < 0.2, "a hint helps"
    assert 0.5 < manners < 0.7 and 0.1 < facts < 0.3, "without one there is something to learn"
    said = json.loads((ROOT / "aloe/toy/base/abilities.json").read_text())
    assert all(said[ability] >= floor for ability, floor in pretrain.FLOORS.items())
