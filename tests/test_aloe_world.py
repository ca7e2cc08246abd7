"""ALOE's embedded world: its rules, its server, and the base that is shipped."""
import itertools
import json
import random
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from aloe.toy import pretrain, server, world
from common import read_prompt, training_examples

ROOT = Path(__file__).resolve().parents[1]


def people(count, seed=0):
    """Random (rng, persona, profile, personality)."""
    rng = random.Random(seed)
    personas = [world.draw_persona(rng) for _ in range(count)]
    return [(rng, persona, *world.sentences(persona, rng)) for persona in personas]


# ---- the world

def test_every_word_says_one_thing():
    values = {value.lower() for slot in world.SLOTS.values() for value in slot}
    cues, phrases = list(world.CUES), list(world.SAID.values())
    assert len(cues) == sum(len(pole[3]) for pole in world.POLES) == len(world.POLE_OF) == 18 and len(phrases) == 6
    others = [*cues, *world.SMALL_TALK, *phrases, *world.POLE_OF, world.NO_FACT, *re.findall(
        r"\w+", f"{world.FACT} {world.USE} {world.TRAIT}".replace("{}", ""))]
    assert not values & set(re.findall(r"\w+", " ".join(others).lower())), "a fact is found by its word"
    for text in [*cues, *world.SMALL_TALK]:                        # no cue stands in another one, nor in small talk
        assert [cue for cue in cues if cue in text] == [text] * (text in cues)
    assert len(set(phrases)) == 6 and not any(a in b for a, b in itertools.permutations(phrases, 2))


def test_a_persona_in_words_and_back():
    for _, persona, profile, personality in people(200):
        assert world.read_persona(profile, personality) == persona
    assert len({personality for *_, personality in people(500)}) > 200, "one manner has many names"
    for half in ((profile, ""), ("", personality), (profile.replace("pet", "cat"), personality)):
        with pytest.raises(ValueError, match="no persona of this world"):
            world.read_persona(*half)


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


def test_a_reply_that_fits_all_that_is_known_gets_the_judges_best():
    for rng, persona, *_ in people(300):
        assert world.judge_score(world.reply(persona, rng), persona) == 5
        manners = {name: persona[name] for name in world.MANNERS}
        assert world.judge_score(world.reply(manners, rng), persona) == 4
    crowd = [(world.reply({}, rng), persona) for rng, persona, *_ in people(2000)]
    fitting = sum(world.fit(*pair)[0] for pair in crowd) / 2000
    assert fitting == pytest.approx(1.5, abs=0.1), "the crowd fits half of the manners of a random user"
    for manner, (first, _) in world.MANNERS.items():
        assert sum(world.SAID[manner, first] in text for text, _ in crowd) / 2000 == pytest.approx(0.75, abs=0.04)


def test_who_adapts_scores_higher_from_round_to_round():
    scores = [[] for _ in range(10)]
    for rng, persona, *_ in people(500):
        said = []
        for k in range(10):
            said.append(world.message(persona, world.revealed(said), rng))
            scores[k].append(world.judge_score(world.reply(world.revealed(said), rng), persona))
    al = [sum(row) / len(row) for row in scores]
    assert al[0] < 4 and al[9] > 4.8 and all(b > a - 0.05 for a, b in zip(al, al[1:]))


# ---- the judge

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


def test_judge_is_symmetrical():
    """Another pole, or another value, in persona and reply: the same score."""
    for rng, persona, *_ in people(300, seed=1):
        text = world.reply({**world.draw_persona(rng), **dict(rng.sample(list(persona.items()), 6))}, rng)
        for manner, poles in world.MANNERS.items():
            here, there = (world.SAID[manner, pole] for pole in poles)
            turned = text.replace(here, "#").replace(there, here).replace("#", there)
            other = next(pole for pole in poles if pole != persona[manner])
            assert world.judge_score(turned, {**persona, manner: other}) == world.judge_score(text, persona)
        for slot, values in world.SLOTS.items():
            following = dict(zip(values, values[1:] + values[:1]))
            turned = re.sub(r"\w+", lambda word: following.get(word[0], word[0]), text)
            assert world.judge_score(turned, {**persona, slot: following[persona[slot]]}) == world.judge_score(
                text, persona)


# ---- the server

@pytest.fixture(scope="module")
def url():
    running = server.Server(("127.0.0.1", 0), server.toy.Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def post(url, request):
    """-> (status, parsed answer)"""
    body = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(request).encode())
    try:
        with urllib.request.urlopen(body) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(model, prompt, *turns, seed=0, **fields):
    chat = [{"role": role, "content": text} for role, text in zip(
        itertools.cycle(["user", "assistant"]), [read_prompt(f"aloe_{prompt}").format(**fields), *turns])]
    return server.reply({"model": model, "messages": chat, "seed": seed})


def test_server_answers_the_papers_prompts_over_http(url):
    chat = [{"role": "user", "content": read_prompt("aloe_profiles").format(examples="A\nB\nC\nD\nE")}]
    status, answer = post(url, {"model": "aloe-writer", "messages": chat, "seed": 1})
    lines = answer["choices"][0]["message"]["content"].splitlines()
    assert status == 200 and len(lines) == len(set(lines)) == 20 and answer["model"] == "aloe-writer"
    assert post(url, {"model": "aloe-writer", "messages": chat, "seed": 2})[1]["choices"] != answer["choices"]
    traits = ask("aloe-writer", "personalities", examples="A").splitlines()
    assert len(traits) == 20 and len(set(traits)) > 15 and world.read_persona(lines[0], traits[0])
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == list(server.ROLES)


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
    assert len({ask("aloe-user", "roleplay", seed=seed, **fields) for seed in range(50)}) > 5


def test_inducer_extracts_what_the_users_lines_show():
    conversation = ("A: Good day. My pet is dog.\nB: My city is Rome. Yo. Hooray!\n"
                    "A: My city is Oslo. The sun is out.\nB: Noted.\nA: It is late. Ask me!")
    persona = world.draw_persona(random.Random(0))
    profile, personality = "My pet is dog. My job is acting. My city is Oslo.", "I am nosy. I am dry. I am polite."
    profile += "".join(f" My {slot} is {persona[slot]}." for slot in world.SLOTS if slot not in ("pet", "job", "city"))
    fields = {"conversation": conversation, "profile": profile, "personality": personality}
    assert ask("aloe-inducer", "induction", **fields) == (
        "Profile: My pet is dog. My city is Oslo.\nPersonalities: I am nosy. I am polite."), "in the persona's words"
    fields["conversation"] = "A: It rains again."
    assert ask("aloe-inducer", "induction", **fields) == "Profile: None\nPersonalities: None"
    assert ask("aloe-inducer-foreign", "induction", **fields) == "Profile: None\nPersonalities: None"


def test_a_foreign_inducer_tells_as_much_of_somebody_else_always_the_same():
    said, differ = [], 0
    for rng, persona, profile, personality in people(200):
        conversation, before = "", {}
        for k in range(5):
            said = [world.message(persona, world.revealed([conversation]), rng)]
            conversation += f"A: {said[0]}\nB: Noted.\n"
            fields = {"conversation": conversation, "profile": profile, "personality": personality}
            true, foreign = (world.read_sentences(ask(model, "induction", **fields))
                             for model in ("aloe-inducer", "aloe-inducer-foreign"))
            assert true.items() <= persona.items() and set(true) == set(foreign) and before.items() <= foreign.items()
            before = foreign
        differ += sum(true[name] != foreign[name] for name in true) / max(1, len(true))
    assert 100 < differ < 190, "nine of ten facts are others, and half of the manners"


def test_judge_answers_a_digit():
    for rng, persona, profile, personality in people(50):
        text = world.reply(world.draw_persona(rng), rng)
        said = ask("aloe-judge", "judge", profile=profile, personality=personality, message="Hi", response=text)
        assert said == str(world.judge_score(text, persona))


def test_server_refuses_everything_else():
    _, _, profile, personality = people(1)[0]
    prompt = read_prompt("aloe_roleplay").format(profile=profile, personality=personality)
    good = {"model": "aloe-user", "messages": [{"role": "user", "content": prompt}], "seed": 1}
    assert server.reply(good)
    turn = {"role": "assistant", "content": "Hiya."}
    for bad, reason in [
            ({**good, "model": "aloe"}, "no model"), ({**good, "model": "aloe-judge"}, "not the prompt"),
            ({**good, "n": 2}, "n = 1"), ({**good, "seed": 0.5}, "seed"), ([], "JSON object"),
            ({**good, "messages": []}, "end with the user"), ({**good, "messages": None}, "messages must be"),
            ({**good, "messages": [*good["messages"], turn]}, "end with the user"),
            ({**good, "messages": [{"role": "system", "content": prompt}]}, "end with the user"),
            ({**good, "messages": [{"role": "user", "content": None}]}, "must be texts"),
            ({**good, "messages": [{"role": "user"}]}, "role and content"),
            ({**good, "model": "aloe-judge", "messages": [*good["messages"], turn, *good["messages"]]}, "one message"),
            ({**good, "messages": [{**good["messages"][0], "content": prompt.replace("concise", "brief")}]},
             "not the prompt"),
            ({**good, "messages": [{**good["messages"][0], "content": prompt.replace(profile, "A cat.")}]},
             "no persona of this world")]:
        with pytest.raises(server.Refused, match=reason):
            server.reply(bad)


def test_programs_run_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "aloe/toy/world.py", "--output", "seeds"], cwd=tmp_path, check=True,
                          capture_output=True, text=True)
    profiles, personalities = ([json.loads(line)["text"] for line in (tmp_path / f"seeds/{name}.jsonl").open()]
                               for name in ("profiles", "personalities"))
    assert len(set(profiles)) == 20 and len(set(personalities)) == 20 and profiles[0] in done.stdout
    assert all(world.read_persona(profile, personality) for profile, personality in zip(profiles, personalities))
    process = subprocess.Popen([sys.executable, ROOT / "aloe/toy/server.py", "--port", "0", "--port-file", "url"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f"serving on {(tmp_path / 'url').read_text()}"
    process.terminate()
    assert process.communicate(timeout=5)[1] == "" and process.returncode == 0


# ---- the measures

def test_measure_by_hand(tmp_path):
    profile = " ".join(f"My {slot} is {values[0]}." for slot, values in world.SLOTS.items())       # a dog, Paris
    person = {"split": "dev", "profile": profile, "personality": "I am polite. I am dry. I am shy."}
    talks = [[("My pet is dog.", "Dear friend, your pet is dog. Noted. Take care."),           # 1, used, none invented
              ("It is late.", "Hey mate, your pet is dog. city: Paris. How lovely! Take care.")],      # 1/3, used, one
             [("It is late.", "Dear friend, is it acting?"), ("Yo. My job is acting.", "cat, jazz")]]  # 1/3, one; 0
    rows = [{**person, "persona_id": f"p{i}", "rounds": [dict(zip(("user", "reply"), pair)) for pair in talk]}
            for i, talk in enumerate(talks)] + [{"persona_id": "p2", "refused": "reply, round 1: empty"}]
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, ROOT / "aloe/toy/measure.py", "--variant", "sft", "--evaluation", tmp_path, "--results",
               tmp_path / "results.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no settings" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "conversations.jsonl.settings.json").write_text(json.dumps(
        {"temperature": 0.0, "split": "dev", "roleplayer": "openai:aloe-user"}))
    for _ in range(2):
        subprocess.run(command, check=True)
    found = {row["metric"]: row for row in map(json.loads, (tmp_path / "results.jsonl").open())}
    expected = {"fitting_manners": (2 / 3, 1 / 6), "used_facts": (1, 0), "invented_facts": (0.5, 1.5)}
    assert list(found) == sorted(expected)
    for metric, (first, second) in expected.items():
        row = found[metric]
        assert row["mean"] == pytest.approx((first + second) / 2) and row["n"] == 2, metric
        assert (row["condition"], row["roleplayer"], row["split"]) == ("T=0", "aloe-user", "dev")
    assert found["invented_facts"]["by_round"] == [0.5, 1.5] and found["used_facts"]["by_round"] == [0.5, 0.5]


# ---- the base

def test_hints_of_the_curriculum_are_the_stages():
    from aloe.simulate import hinted
    rng = random.Random(0)
    known = {"pet": "dog", "tone": "casual"}
    chat = [{"role": "user", "content": "Yo."}]
    long = pretrain.with_hint("Yo.", known, rng, full=1)
    revealed = "Profile: My pet is dog.\nPersonalities: I am relaxed."
    assert re.sub("casual|easygoing", "relaxed", long) == hinted(chat, revealed)[-1]["content"]
    short = [pretrain.with_hint("Yo.", known, rng, full=0) for _ in range(50)]
    assert all("My pet is dog.\nPersonalities: I am " in text and text.endswith("responses.)") for text in short)


def test_a_chat_is_never_taken_for_the_exercise_in_copying():
    """Chats whose only message was a fact once looked like it: DPO's first replies then had no manners."""
    rng = random.Random(0)
    for most in (1, 8):
        for _ in range(200):
            said, copied = (turn["content"] for turn in pretrain.echo(rng, most, pretrain.REPEAT + " "))
            assert said.startswith(pretrain.REPEAT) and world.facts_in(copied) == world.facts_in(said)
            assert not any(phrase in copied for phrase in world.SAID.values())
    for adapts in (0, 1):
        for turn in pretrain.chat(rng, 10, adapts, adapts, 0.1):
            assert pretrain.REPEAT not in turn["content"]


def test_adapting_replies_are_as_many_as_the_mixture_says():
    def share(adapts, obey, hinted):
        rng, fit, count = random.Random(0), 0, 0
        for _ in range(3000):
            chat = pretrain.chat(rng, 10, adapts, obey, 0)
            last = chat[-2]["content"]
            if ("(Hint" in last) != hinted:
                continue
            said = [turn["content"] for turn in chat[:-1:2]]
            known = world.read_sentences(last.rpartition("\n(")[2]) if hinted else world.revealed(said)
            if known.keys() & world.SLOTS.keys():                  # then who adapts uses a fact, and the crowd none
                fit += bool(world.facts_in(chat[-1]["content"]) & known.items())
                count += 1
        return fit / count

    assert share(0.2, 0.4, False) == pytest.approx(0.2, abs=0.05)
    assert share(0.2, 0.4, True) == pytest.approx(0.4, abs=0.05)
    assert share(1, 1, True) == share(1, 1, False) == 1


@pytest.fixture(scope="module")
def base():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = ROOT / "aloe/toy/base"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_base_is_small_and_its_words_are_tokens(base):
    model, tokenizer = base
    assert model.num_parameters() < 300_000
    assert sum(file.stat().st_size for file in (ROOT / "aloe/toy/base").iterdir()) < 1.5e6
    for word in [*world.POLE_OF, *(value for values in world.SLOTS.values() for value in values)]:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1
    chat = pretrain.chat(random.Random(0), 10, 1, 1, 0)
    (ids, labels), = training_examples(tokenizer, chat)
    assert tokenizer.decode([label for label in labels if label != -100]) == "".join(
        f" {turn['content']}</s>" for turn in chat[1::2])


def test_base_can_adapt_and_copy_but_is_as_the_crowd(base):
    assert pretrain.copying(*base, 8) >= pretrain.FLOORS["copy_8"]
    pretrain.pretrain.torch.manual_seed(0)
    (manners, facts, _), (hint_manners, hint_facts, hint_wrong) = (
        pretrain.adapting(*base, hinted, 192) for hinted in (False, True))
    assert hint_manners > manners + 0.05 and hint_facts > facts + 0.05 and hint_wrong < 0.2, "a hint helps"
    assert 0.5 < manners < 0.7 and 0.1 < facts < 0.3, "without one there is something to learn"
    first = pretrain.with_hint("My pet is dog.", {"pet": "dog"}, random.Random(0), full=1)
    replies = pretrain.pretrain.generate(*base, 100 * [[{"role": "user", "content": first}]], True, 32, 1.0, 1.0)
    assert sum(any(said in text for said in ("Dear friend,", "Hey mate,")) for text in replies) >= 95, "no mere echo"
    said = json.loads((ROOT / "aloe/toy/base/abilities.json").read_text())
    assert all(said[ability] >= floor for ability, floor in pretrain.FLOORS.items())
