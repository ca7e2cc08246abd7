"""ALOE: its metric against the published table, its loss against TRL, its mask as text, its stages from end to end."""
import gc
import json
import math
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from argparse import Namespace

import html5lib
import numpy as np
import pytest
import torch
from accelerate import Accelerator

import common
import train as loop
from aloe import evaluate, generate_personas, report, simulate, train
from conftest import END_OF_TURN, ROOT, TEMPLATES, make_model, make_tokenizer, read_lines, run_stage, write_rows
from test_prompts import text

# ------------------------------------------------------------ the metric

def test_every_published_row_is_reproduced():
    for row in (ROOT / "tests/aloe_published.txt").read_text().splitlines():           # tables 1 and 2
        numbers = [float(number) for number in row.split()[:14]]
        found = evaluate.improvement(numbers[:10])
        assert found["AL"] == pytest.approx(numbers[10], abs=0.0051), "two digits are printed"
        assert [found[name] for name in ("IR", "N-IR", "R2")] == pytest.approx(numbers[11:], abs=0.001), row
    flat, one = evaluate.improvement([3.0] * 10), evaluate.improvement([3.0])
    assert flat["AL"] == one["AL"] == 3 and flat["IR"] == 0 and math.isnan(flat["N-IR"] + flat["R2"])
    assert all(math.isnan(one[name]) for name in ("IR", "N-IR", "R2")), "it has no normalised slope"


def test_an_answer_that_is_no_score_is_not_guessed_at():
    assert [evaluate.read_score(raw) for raw in ("'1'", " 2\n", "Score: 3.", "4", "**5**")] == [1, 2, 3, 4, 5]
    for raw in ("0", "6", "4.5", "-3", "4/5", "4 or 5", "four", "45", "I give it a 4", "", "1-5"):
        assert evaluate.read_score(raw) is None, raw


def test_the_bootstrap_is_over_people_and_seeded():
    rng = np.random.default_rng(0)
    level, slope = rng.normal(3, 0.5, 200), 0.1
    scores = level[:, None] + slope * np.arange(10) + rng.normal(0, 0.1, (200, 10))
    scores[3, 4] = np.nan
    found = evaluate.bootstrap(scores, 7)
    assert found == evaluate.bootstrap(scores, 7) != evaluate.bootstrap(scores, 8)
    (low, high), sem = found["AL"], evaluate.mean_sem(np.nanmean(scores, 1))["sem"]
    assert high - low == pytest.approx(2 * 1.96 * sem, rel=0.1), "as wide as people differ, and not as scores do"
    assert found["IR"][0] < slope < found["IR"][1] and found["IR"][1] - found["IR"][0] < 0.02
    assert evaluate.bootstrap(scores[:1], 7) == {} and evaluate.mean_sem([2.0]) == {"mean": 2, "sem": None, "n": 1}


# ------------------------------------------------------------ personas

def test_the_filter_by_hand():
    """Unit vectors in a plane, by their angles: cos 53.13 = .6 is kept, and what is kept counts for those after it."""
    vectors = {a: np.array([math.cos(math.radians(a)), math.sin(math.radians(a))]) for a in (0, 30, 60, 100, 110, 180)}
    found = generate_personas.filtered(vectors[0][None], [vectors[a] for a in (30, 60, 100, 110, 180)], 0.6)
    assert [kept for _, _, kept in found] == [False, True, False, False, True]
    assert [similarity for similarity, _, _ in found] == pytest.approx(
        [math.cos(math.radians(a)) for a in (30, 60, 40, 50, 120)])
    assert [nearest for _, nearest, _ in found] == [0, 0, 1, 1, 1], "60 degrees joined the pool as its second"
    assert generate_personas.filtered(np.eye(2)[:1], np.array([[0.6, 0.8]]), 0.6)[0][2], "0.6 does not exceed 0.6"
    a, b, none = generate_personas.ngrams(["Ab, cd!", "ab ce", ""])     # " ab ", "ab c" of these, "b cd", " cd "
    assert a @ b == pytest.approx(2 / 4) and a @ a == pytest.approx(1) and not none.any()
    for name in ("profiles", "personalities"):                  # the seeds are twenty of each, and differ
        vectors = generate_personas.ngrams([row["text"] for row in read_lines(ROOT / f"aloe/data/{name}.jsonl")])
        found = generate_personas.filtered(vectors[:1], vectors[1:], 0.6)
        assert len(vectors) == 20 and all(kept for *_, kept in found)


def test_an_encoders_vectors_have_length_1(tmp_path):
    """As its own mean over the tokens has not."""
    pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel
    tokenizer = make_tokenizer("llama3")
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, None
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=16, max_position_embeddings=64)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vectors = generate_personas.encoder(str(tmp_path))(["Tea.", "A much longer text than that."])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1])


def test_what_a_writer_writes_as_texts():
    reply = ("Here are the 20 user profiles:\nHere are twenty of them, as you asked\n---\nSure! Here you go.\n"
             "1. She sings in a small choir.\n"
             "2) He is 3. He naps a lot.\n- Calm, kind, loud, shy, slow.\nNone\nI hope these are varied enough!\n"
             "17 years ago he skated.\nThe last is a")
    whole = ["She sings in a small choir.", "He is 3. He naps a lot.", "Calm, kind, loud, shy, slow.",
             "17 years ago he skated."]
    assert generate_personas.texts_in(reply, cut=True) == generate_personas.texts_in(reply) == whole
    assert generate_personas.texts_in(reply + " baker.")[-1] == "The last is a baker."


WORDS = "acorn bronze cedar delta ember fjord garnet hazel indigo jasper kelp lotus maple nectar opal pearl".split()


def writer(request):
    """16 texts, of which 8 are the same at every call."""
    kind = "profile" if "different user profiles" in request["messages"][0]["content"] else "trait"
    return "\n".join(f"{i + 1}. {kind} {word} {word[::-1]} {request['seed'] * (i % 2) % 9999 * 7} {word}"
                     for i, word in enumerate(WORDS))


def test_pools_grow_and_personas_are_pairs(run, server, tmp_path):
    def grow(name, *more, **status):
        return run(generate_personas, "--model", f"openai:writer@{server.url}", "--embedder", "ngrams", "--held-out", 4,
                   2, "--splits", "train=30,test=8", "--rounds", 3, "--output", tmp_path / name, *more, **status)[1]
    server.reply = lambda request: (200, writer(request))
    grow("p.jsonl")
    people, texts = read_lines(tmp_path / "p.jsonl"), read_lines(tmp_path / "p.pools.jsonl")
    assert [p["persona_id"] for p in people[:9]] == [*(f"test{i:04d}" for i in range(8)), "train0000"]
    for field, held_out in (("profile", 4), ("personality", 2)):
        train_has, test_has = ({p[field] for p in people if p["split"] == split} for split in ("train", "test"))
        assert not train_has & test_has and len(test_has) <= held_out
    assert len({(p["profile"], p["personality"]) for p in people}) == 38
    pairs = generate_personas.pairs_of("abcd", "xyz", 7, 0)     # all profiles, equally often
    assert len(set(pairs)) == 7 and sorted(Counter(profile for profile, _ in pairs).values()) == [1, 2, 2, 2]
    discarded, members = ([row for row in texts if row["kept"] == kept] for kept in (False, True))
    assert discarded and all((row["similarity"] > 0.6) != row["kept"] for row in texts if row["round"])
    assert {row["nearest"] for row in discarded} | {p["profile"] for p in people} <= {row["text"] for row in members}
    asked = server.requests[0]["messages"][0]["content"]
    assert sum(row["text"] in asked for row in texts if row["round"] == 0) == 5

    before, count = [path.read_bytes() for path in sorted(tmp_path.glob("*.jsonl"))], len(server.requests)
    (tmp_path / "p.jsonl").unlink(), (tmp_path / "p.pools.jsonl").unlink()
    grow("p.jsonl")
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.jsonl"))] == before
    assert len(server.requests) == count == 2 * max(row["round"] for row in texts), "nothing is paid twice"
    assert "too few for train=9999999" in grow("q.jsonl", "--splits", "train=9999999", status=1)


# ------------------------------------------------------------ conversations

PROMPTS = simulate.PROMPTS
PERSON = {"profile": "He has {two} hens.", "personality": "He is dry."}
TALK = [{"role": "user", "content": "My hens {lay}."}, {"role": "assistant", "content": "Good."},
        {"role": "user", "content": "Yes."}]


def test_what_each_of_them_sees():
    def said(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    role, before = text("aloe_roleplay", **PERSON), json.dumps(TALK)
    assert simulate.roleplayer_chat(PERSON, []) == said(role)
    assert simulate.roleplayer_chat(PERSON, TALK[:2]) == said(role, "My hens {lay}.", "Good.")
    assert simulate.inducer_chat(PERSON, TALK) == said(text(
        "aloe_induction", conversation="A: My hens {lay}.\nB: Good.\nA: Yes.", **PERSON))
    hint = text("aloe_hint", revealed="He has {two} hens.")
    assert simulate.hinted(TALK, "He has {two} hens.") == [*TALK[:2], *said(f"Yes.\n{hint}")]
    assert json.dumps(TALK) == before
    assert evaluate.judge_chat(PERSON, "Yes.", "{Good}.") == said(text(
        "aloe_judge", message="Yes.", response="{Good}.", **PERSON))
    assert simulate.extracted("Profile: None\nPersonalities: None", PERSON) == (set(), set())
    assert simulate.extracted("Profile: He has two hens.", PERSON) == ({"has", "two", "hens"}, set())
    assert simulate.extracted("Profile: He has three cats.\nPersonalities: dry", PERSON)[1] == {"cats", "three"}


ROUNDS = [{"user": "Hi!", "revealed": "R1", "preferred": "p one", "rejected": "r one", "chosen": "rejected"},
          {"user": "Tea?", "revealed": "R2", "preferred": "p two", "rejected": "r two", "chosen": "preferred"},
          {"user": "Bye.", "revealed": "R3", "preferred": "p three", "rejected": "r three", "chosen": "rejected",
           "cut": ["rejected"]}]


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_mask_as_text(family):
    """One reply a round. The walked history is before it, with the rejected reply that was walked, and nothing else."""
    tokenizer = make_tokenizer(family)
    blank, end = " " if family == "mistral" else "", END_OF_TURN[family]
    pairs, history = train.round_examples(tokenizer, ROUNDS), []
    for r, pair in zip(ROUNDS, pairs):
        asked = [*history, {"role": "user", "content": r["user"]}]
        for name, (ids, labels) in pair.items():
            first = len(common.prompt_ids(tokenizer, asked))
            assert ids[:first] == common.prompt_ids(tokenizer, asked), "what the model sees when it is asked"
            assert labels == [-100] * first + ids[first:]
            assert tokenizer.decode(ids[first:]) == blank + r[name] + ("" if name in r.get("cut", ()) else end)
        history = [*asked, {"role": "assistant", "content": r[r["chosen"]]}]
    dealt = train.round_examples(tokenizer, ROUNDS, coin=lambda i: i == 1)
    assert dealt[0] == pairs[0] and dealt[1] == {"preferred": pairs[1]["rejected"], "rejected": pairs[1]["preferred"]}


# ------------------------------------------------------------ DPO

@pytest.mark.filterwarnings("default::FutureWarning")            # TRL's own
def test_dpo_is_trls(tmp_path, monkeypatch):
    """Loss, gradients and rewards on the same ids, with a reference that is another model; and two pairs by hand."""
    losses, rewards = train.dpo_loss(torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-1.5], [-1.0]]), 0.9)
    assert rewards[:, 0].tolist() == pytest.approx([0.45, -0.9])
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-1.35)))
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    tokenizer = make_tokenizer("llama3")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model, reference = make_model(len(tokenizer), 0), make_model(len(tokenizer), 1)
    pairs = train.round_examples(tokenizer, ROUNDS)
    config = DPOConfig(output_dir=str(tmp_path), beta=0.9, report_to=[], use_cpu=True, bf16=False,
                       gradient_checkpointing=False, disable_dropout=False)
    trainer = DPOTrainer(model, reference, config, processing_class=tokenizer, train_dataset=Dataset.from_list(
        [{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    split = [sum(label == -100 for label in pair["preferred"][1]) for pair in pairs]
    batch = trainer.data_collator([{"prompt_ids": pair["preferred"][0][:n], "chosen_ids": pair["preferred"][0][n:],
                                    "rejected_ids": pair["rejected"][0][n:]} for pair, n in zip(pairs, split)])
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    margin = trainer._metrics["train"]["rewards/margins"][0]
    monkeypatch.setattr(train, "reference", lambda *_: reference)
    examples, args = [(*pair["preferred"], *pair["rejected"]) for pair in pairs], Namespace(
        base="", dtype="float32", beta=0.9)
    for size in (1, 2, 8):
        model.zero_grad()
        loss_of = train.PairLoss(args)
        loss = loop.mean_loss(Accelerator(cpu=True), model, examples, size, loss_of, learn=True)
        assert [loss, loss_of.figures()["margin"]] == pytest.approx([theirs.item(), margin], abs=1e-5, rel=1e-5)
        for name, weight in model.named_parameters():
            assert torch.allclose(weight.grad, expected[name], atol=1e-5, rtol=1e-4), name


# ------------------------------------------------------------ the stages, from end to end

PEOPLE = [{"persona_id": f"{split}{i:04d}", "split": split, "profile": f"She has {i} hens.",
           "personality": "She is calm."} for split in ("train", "test") for i in range(6)]


def cast(request):
    """The user, the inducer, the judge: what they say depends on what they are shown."""
    *before, last = request["messages"]
    name = request["model"]
    if name.startswith("user"):
        assert "Your task is to play the role" in (before or [last])[0]["content"]
        return f"You: Message {len(before) // 2}, seed {request['seed'] % 100}.\nAssistant: What I never said."
    if name == "inducer":
        assert not before and request["temperature"] == 0
        return f"Profile: She has {'cats' if '1 hens' in last['content'] else 'hens'}.\nPersonalities: None"
    if name == "second":
        return "?" if "3 hens" in last["content"] else "4" if "Message 1" in last["content"] else "1"
    if name == "judge":
        assert not before
        return "4" if "Message 1" in last["content"] else "about 3" if "4 hens" in last["content"] else "2"
    return "A warm reply." if "(Hint:" in last["content"] else "A reply."


@pytest.fixture
def world(tmp_path, server):
    server.reply = lambda request: (200, cast(request))
    write_rows(tmp_path / "p.jsonl", PEOPLE)
    return tmp_path


def talk_flags(world, server, model=None, output="c.jsonl", *more):
    return ["--model", model or f"openai:chat@{server.url}", "--roleplayer", f"openai:user@{server.url}",
            "--personas", world / "p.jsonl", "--rounds", 2, "--max-tokens", 6, "--dtype", "float32",
            "--output", world / output, "--inducer", f"openai:inducer@{server.url}", *more]


def evaluate_flags(world, server, model):
    return [*talk_flags(world, server, model)[:-2], "--judge", f"openai:judge@{server.url}", "--results",
            world / "r.jsonl", "--max-refused", 0.5]


def test_conversations(run, world, server):
    out, _ = run(simulate, *talk_flags(world, server))
    rows = read_lines(world / "c.jsonl")
    assert [row["persona_id"] for row in rows] == [f"train000{i}" for i in range(6)]
    assert len(server.requests) == 6 * 2 * 4
    for row in rows:
        assert [set(r) for r in row["rounds"]] == 2 * [{"user", "revealed", "preferred", "rejected", "chosen"}]
        assert {(r["preferred"], r["rejected"]) for r in row["rounds"]} == {("A warm reply.", "A reply.")}
        assert all(re.fullmatch(r"Message [01], seed \d+\.", r["user"]) for r in row["rounds"]), "the user's own words"
    assert {r["chosen"] for row in rows for r in row["rounds"]} == {"preferred", "rejected"}
    lengths = Counter(len(request["messages"]) for request in server.requests if request["model"] == "chat")
    assert lengths == {1: 12, 3: 12}, "both replies of a round see its history"
    for request in server.requests:                              # who walked on which reply
        if request["model"] == "chat" and len(request["messages"]) == 3:
            first, said, last = (message["content"] for message in request["messages"])
            assert "(Hint" not in first, "no hint stays in the history"
            assert any(row["rounds"][0]["user"] == first and row["rounds"][0][row["rounds"][0]["chosen"]] == said
                       and last.startswith(row["rounds"][1]["user"]) for row in rows)
    assert "0 cut at --max-tokens (of 12 rounds none); in 0 rounds nothing was revealed, in 2 the inducer has" in out
    assert "(cats)\n3.0 words in a preferred reply, 2.0 in a rejected one; 100% of these are shorter" in out
    run(simulate, *talk_flags(world, server, None, "again.jsonl", "--batch-size", 1))
    assert read_lines(world / "again.jsonl") == rows, "the size of a block is no matter"
    run(simulate, *talk_flags(world, server, None, "few.jsonl", "--limit", 2))
    assert [row in rows for row in read_lines(world / "few.jsonl")] == [True, True]


def test_users_and_prompts_of_ones_own(run, world, server):
    """A hash of the person deals the users. A folder's prompt takes the place of the paper's, and is a setting."""
    (world / "prompts").mkdir()
    (world / "prompts/aloe_hint.txt").write_text("(Hint: {revealed})\n")
    (world / "prompts/aloe_judge.txt").write_text("{message} {reply}")
    more = ["--prompts", world / "prompts", "--roleplayer", f"openai:user1@{server.url}", f"openai:user2@{server.url}"]
    run(simulate, *talk_flags(world, server, None, "c.jsonl", *more))
    assert "".join(row["roleplayer"] for row in read_lines(world / "c.jsonl")) == "user2user1user1user1user2user1"
    assert any(r["messages"][-1]["content"].endswith("\n(Hint: Profile: She has hens.\nPersonalities: None)")
               for r in server.requests)
    settings = common.read_settings(world / "c.jsonl")
    assert settings["roleplayer"] == ["openai:user1", "openai:user2"] and settings["aloe_hint"] == "(Hint: {revealed})"
    _, err = run(evaluate, *evaluate_flags(world, server, None), *more, "--variant", "x", status=2)
    assert "aloe_judge.txt: KeyError('reply')" in err and err.count("\n") == 1
    write_rows(world / "p.jsonl", [{**PEOPLE[2], "personality": "None."}])
    _, err = run(simulate, *talk_flags(world, server), status=2)
    assert "the personality of train0002 is 'None.'" in err


def test_who_declines_or_says_nothing_talks_no_longer():
    """A server's empty answer comes as a refusal; a local model's does not. Others talk on."""
    said = {((1,), "reply", 0): common.Reply(""), ((3,), "user", 1): common.Reply("", "content_filter")}

    def ask(asked, rows):
        for key, field in reversed(asked):
            k = len(rows[key]["rounds"]) - 1
            yield (key, field), said.get((key, field, k), common.Reply("x", cut=key == (2,)))
    rows = {(i,): {"rounds": []} for i in range(4)}
    simulate.simulate({key: evaluate.chat(PERSON, row["rounds"], 2, PROMPTS) for key, row in rows.items()}, rows, ask)
    assert rows[(1,)] == {"rounds": [], "refused": "reply, round 1: empty"}
    assert rows[(3,)]["refused"] == "user, round 2: content_filter"
    assert rows[(0,)]["rounds"] == 2 * [{"user": "x", "reply": "x"}] and rows[(2,)]["cut"] == 4
    assert simulate.cuts(rows.values()) == "of 4 rounds user 2, reply 2"
    assert rows[(2,)]["rounds"] == 2 * [{"user": "x", "reply": "x", "cut": ["user", "reply"]}]


def test_from_conversations_to_the_table(run, world, server, tiny, monkeypatch):
    """Simulate, SFT, DPO and evaluation with a model on this machine."""
    generate, asked = common.LocalModel.generate, []
    monkeypatch.setattr(common.LocalModel, "generate", lambda self, requests, *more: asked.append(requests)
                        or generate(self, requests, *more))
    run(simulate, *talk_flags(world, server, tiny))
    assert {key: request.group for key, request in asked[0].items()} == {
        ((f"train000{i}",), reply): (f"train000{i}",) for i in range(6) for reply in ("preferred", "rejected")}
    rows = read_lines(world / "c.jsonl")
    assert sum(row["cut"] for row in rows) == sum(len(r.get("cut", ())) for row in rows for r in row["rounds"]) > 0
    learn = ["--conversations", world / "c.jsonl", "--dtype", "float32", "--lr", "1e-3", "--batch-size", 6]
    out, _ = run(train, *learn, "--stage", "sft", "--base", tiny, "--output", world / "sft")
    assert "10 examples + 2 held out (0 conversations refused, 0 rounds longer" in out and "6 steps of 6" in out
    rates = [row["rate"] for row in read_lines(world / "sft/log.jsonl")[:-2]]
    assert rates == pytest.approx([1e-3 * (6 - i) / 6 for i in range(6)]), "linear, to 0"
    out, _ = run(train, *learn, "--stage", "dpo", "--base", world / "sft", "--output", world / "dpo")
    losses = [row["loss"] for row in read_lines(world / "dpo/log.jsonl")[:-2]]
    assert "nats a pair" in out and losses[0] == pytest.approx(math.log(2), abs=1e-4), "the reference is the start"
    assert len(losses) == 2 and losses[1] != pytest.approx(math.log(2), abs=1e-4), "one epoch; something was learned"

    for variant, model in (("base", tiny), ("dpo", world / "dpo")):
        flags = [*evaluate_flags(world, server, model), "--variant", variant, "--output", world / f"e_{variant}"]
        out, _ = run(evaluate, *flags)
    scores = read_lines(world / "e_base/scores.jsonl")
    assert [row["raw"] for row in scores if "refused" in row] == ["about 3"] and "1 unreadable" in out
    found = {(row["variant"], row["metric"]): row for row in read_lines(world / "r.jsonl")}
    al, ir = found["base", "AL"], found["base", "IR"]
    assert len(found) == 8 and al["by_round"] == [2, 4] and ir["mean"] == 2 and ir["interval_95"] == [2, 2]
    assert (al["n"], al["roleplayer"], al["condition"]) == (6, "user", "T=1")
    del server.requests[:]                                      # a second judge comes later: no more is asked
    for cases, n, readable in ((2, 4, 2), (6, 11, 9)):          # of one of six people it makes nothing
        out, _ = run(evaluate, *flags, "--second-judge", f"openai:second@{server.url}", "--second-cases", cases)
        found = {row["metric"]: row for row in read_lines(world / "r.jsonl") if row["variant"] == "dpo"}
        assert n == len(server.requests) and f"; {n - readable} unreadable\n" in out
        assert found["kappa with second"]["n"] == found["agreement with second"]["n"] == readable
    assert found["agreement with second"]["mean"] == pytest.approx(5 / 9)          # (4, 4) five times, (2, 1) four
    assert found["kappa with second"]["mean"] == pytest.approx((5 / 9 - 25 / 81) / (1 - 25 / 81))


def test_dpo_starts_from_a_reward_of_nothing_in_bfloat16(run, world, tiny):
    """With the reference's own weights each margin is 0, whatever a batch looks like, and the first loss is ln 2."""
    write_rows(world / "c.jsonl", [{**PEOPLE[i], "rounds": ROUNDS[:1 + i % 3]} for i in range(6)])
    flags = ["--stage", "dpo", "--base", tiny, "--conversations", world / "c.jsonl", "--lr", "1e-3", "--batch-size", 5,
             "--validation", 0, "--output", world / "m"]
    out, _ = run(train, *flags)
    assert "is not made by --stage sft" in out and "12 examples + 0 held out" in out
    log = read_lines(world / "m/log.jsonl")
    losses = [row["loss"] for row in log]
    assert (log[0]["margin"], log[0]["accuracy"]) == (0, 0) and log[1]["margin"] != 0
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7) != losses[1]
    model, tokenizer = common.load_model(tiny, "bfloat16"), common.load_tokenizer(tiny)
    pairs = [(*pair["preferred"], *pair["rejected"]) for pair in train.round_examples(tokenizer, ROUNDS)]
    args = Namespace(base=tiny, dtype="bfloat16", beta=0.9)
    for batch in (pairs[:1], pairs[1:], pairs):
        assert train.PairLoss(args)(model, batch, "cpu").item() == pytest.approx(len(batch) * math.log(2), abs=1e-6)
    lacks, flags = "a round of train0000 lacks a text", [*flags, "--output", world / "other"]
    for row, why in (({"rounds": [{"user": "Hi"}]}, lacks), ({"rounds": [{**ROUNDS[0], "chosen": "other"}]}, lacks),
                     ({"rounds": [{**ROUNDS[0], "preferred": " "}]}, lacks),
                     ({"rounds": [{**ROUNDS[0], "cut": 5}]}, lacks),
                     ({"refused": "user, round 1: empty"}, "no example to train on (1 conversations refused")):
        write_rows(world / "c.jsonl", [{**PEOPLE[0], **row}])
        assert why in run(train, *flags, status=2)[1]
    assert "--target belongs to --stage sft" in run(train, *flags, "--target", "rejected", status=2)[1]


# ------------------------------------------------------------ kills, command lines, the report

def test_a_run_that_was_interrupted_ends_with_the_same_bytes(world, server, tiny, run):
    run(simulate, *talk_flags(world, server, tiny, "whole.jsonl", "--batch-size", 2))
    count, whole = [0], (world / "whole.jsonl").read_bytes()
    flags = talk_flags(world, server, tiny, "killed.jsonl", "--batch-size", 2)

    def mortal(request):
        count[0] += 1
        return (200, cast(request)) if count[0] < 14 else (401, {"error": {"message": "gone"}})

    server.reply = mortal
    run(simulate, *flags, status=2)
    assert not (world / "killed.jsonl").exists() and common.unfinished(world / "killed.jsonl")
    time.sleep(1)                                               # until the other block's thread has ended, too
    gc.collect()
    server.reply = lambda request: (200, cast(request))
    run(simulate, *flags)
    assert (world / "killed.jsonl").read_bytes() == whole


PAPER = {"generate_personas": "examples 5,similarity 0.6,temperature 0.8,"
                              "embedder sentence-transformers/paraphrase-MiniLM-L6-v2",
         "simulate": "rounds 10,split train", "evaluate": "rounds 10,split test",
         "train": "lr 1e-05,batch-size 48,beta 0.9,epochs 3,target preferred"}


@pytest.mark.parametrize("stage", PAPER)
def test_each_stage_starts_and_its_defaults_are_the_papers(stage):
    """(In this folder there are other simulate.py, train.py, evaluate.py, generate_personas.py.)"""
    out, _ = run_stage(f"aloe/{stage}.py", "--help", env={**os.environ, "COLUMNS": "400"})
    options = " ".join(out.split()).split("options:")[1]
    for setting in PAPER[stage].split(","):
        flag, value = setting.split()
        assert re.search(rf"--{flag} [^\]]*?default: {re.escape(value)}(?!\d)", options), setting


def test_run_sh_prints_the_papers_run_and_names_what_is_wrong(tmp_path):
    def run_sh(mode, **more):
        done = subprocess.run(["bash", "run.sh", mode], cwd=ROOT / "aloe", capture_output=True, text=True, env={
            **os.environ, "PRINT": "1", "ORACLE": "openai:o", "GPUS": "8", "RUN": str(tmp_path / "run"), **more})
        return done.returncode, done.stderr, done.stdout.splitlines()
    status, _, lines = run_sh("paper", JUDGE="openai:j", LIMIT="6", EXTRA='{"a": 1}', SERVE="vllm serve")
    assert status == 0 and not list(tmp_path.iterdir()), "nothing has run"
    stages = [re.search(r"aloe/(\w+)\.py", line)[1] for line in lines]
    assert stages == ["generate_personas", "simulate", "evaluate", *3 * ["train", "evaluate"], "report"]
    for stage, line in zip(stages[:-1], lines):
        assert f"configs/{'fsdp' if stage == 'train' else 'ddp'}.yaml --num_processes 8" in line
        assert ("--limit 6" in line) == (r"--extra \{\"a\":\ 1\}" in line) == (stage != "train")
        assert line.startswith("bash settings/serve.sh") == (stage in ("simulate", "evaluate"))
        assert ("--judge openai:j" in line) == (stage == "evaluate")
    for more, words in (({"VARIANTS": "sft_dpo"}, "comes after sft"), ({"VARIANTS": "best"}, "no variant best"),
                        ({"VARIANTS": "mute"}, "no variant mute in paper"), ({"ORACLE": ""}, "set ORACLE")):
        status, err, lines = run_sh("paper", **more)
        assert status == 2 and words in err and not lines
    assert "bash aloe/run.sh smoke" in run_sh("large")[1]


def test_differences_are_of_the_same_users_and_seeds_are_of_one_base(run, tmp_path):
    """People who differ a lot, and a model that is better for each by .5: narrow for the difference alone."""
    level, rows = np.random.default_rng(0).normal(3, 1, 40), []
    for variant, gain in (("base", 0), ("sft", 0.5)):
        (folder := tmp_path / f"run/{variant}/test-T0").mkdir(parents=True)
        write_rows(folder / "scores.jsonl", [
            {"persona_id": f"p{i:02d}", "round": k, "score": round(1000 * (level[i] + (k + 1) * gain))}
            for i in range(40) for k in range(2) if (variant, i) not in (("sft", 7), ("base", 3))])  # count in neither
        write_rows(folder / "conversations.jsonl", [
            {**PERSON, "persona_id": f"p{i:02d}", "rounds": [{"user": f"<b>{k}", "reply": variant} for k in range(2)]}
            for i in range(40)])
        rows += [{"variant": variant, "iteration": 0, "metric": metric, "condition": "T=0", "roleplayer": "u", "split":
                  "test", "mean": 3.0 + gain, "n": 40, "sem": None, "by_round": [2.0, 4.0], "interval_95": [2.5, 3.5]}
                 for metric in ("AL", "IR", "N-IR", "R2")]
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    other = [{**row, "mean": None if row["metric"] == "R2" else row["mean"] + 1} for row in rows]
    write_rows(tmp_path / "run/results.jsonl", rows), write_rows(tmp_path / "other/results.jsonl", other)
    runs = [report.read_evaluations(tmp_path / name, "test") for name in ("run", "other")]
    base, _, difference = report.intervals(runs[0])
    assert [*base.values()][:4] == ["base T=0", "40", "3.00 (2.50 to 3.50)", "3.000 (2.500 to 3.500)"]
    assert [*difference.values()] == ["sft - base T=0", "38", "750.00 (750.00 to 750.00)",
                                      "500.000 (500.000 to 500.000)"]
    assert next(report.table(runs[0])) == dict(zip("model k=1 k=2 AL IR N-IR R2".split(), [
        "base T=0", "2.00", "4.00", "3.00", "3.000", "3.000", "3.000"]))
    first, _, last = report.over_seeds(runs)
    assert first == {"model": "base T=0", **dict.fromkeys(("AL", "IR", "N-IR"), "3.500 ± 0.707"), "R2": "-"}
    assert last == {"model": "sft - base T=0", **dict.fromkeys(("AL", "IR"), "0.500 ± 0.000")}
    shutil.copytree(tmp_path / "run", tmp_path / "smoke")
    for name, rounds in (("run", 10), ("other", 10), ("smoke", 6)):
        (tmp_path / f"{name}/base/test-T0/scores.jsonl.settings.json").write_text(json.dumps({
            "rounds": rounds, "seed": len(name)}))
    out, _ = run(report, tmp_path / "run", tmp_path / "other")
    page = (tmp_path / "run/report/index.html").read_text()
    html5lib.HTMLParser(strict=True).parse(page)                # raises at the first error
    for words in ("than base&#39;s: AL 3.50, a difference of 750.00 (750.00 to 750.00). They improve more over",
                  "He has {two} hens.", "&lt;b&gt;1", "3.500 ± 0.707", "All 38 users, worst first"):
        assert words in page, words
    assert "<b>1" not in page and "3.500 ± 0.707" in out
    _, err = run(report, tmp_path / "run", tmp_path / "smoke", status=2)
    assert "smoke are not seeds of one run: they differ in base's rounds." in err
    for name, lr in (("run", 1), ("other", 2)):
        (tmp_path / f"{name}/sft/model.settings.json").write_text(json.dumps({"lr": lr, "seed": lr, "base": name}))
    assert "they differ in sft's lr." in run(report, tmp_path / "run", tmp_path / "other", status=2)[1]
    (tmp_path / "run/sft/test-T0/scores.jsonl").write_text("")
    assert "its files do not fit" in run(report, tmp_path / "run", status=2)[1]


def test_the_headlines_words_follow_the_intervals():
    def model(name, level):
        scores = {i: np.array([level + (-1) ** i, level + (-1) ** i], float) for i in range(20)}
        return Namespace(name=name, variant=name, scores=scores, results={"AL": {"mean": 3.0}})
    base = Namespace(variant="base", scores={i: np.array([3.0, 3.0]) for i in range(20)})
    for level, words in ((4, "more"), (2, "less"), (3, "not distinguishably more or less")):
        assert f"finds its replies {words} tailored to the user than base's" in report.headline(model("sft", level), base)
    base.scores = {0: np.array([3.0, 3.0])}
    assert "nothing is shown" in report.headline(model("sft", 4), base)
    first_rounds = model("sft", 4), Namespace(variant="base", scores=base.scores)
    for one in first_rounds:
        one.scores = {i: np.array([3.0]) for i in range(20)}
    assert "a difference in IR of -." in report.headline(*first_rounds)
