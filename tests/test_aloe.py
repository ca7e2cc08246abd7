"""ALOE: its metric against the published table, its loss against TRL, its mask as text, and its stages from end to end."""
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import common
import train as loop
from aloe import evaluate, generate_personas, report, simulate, train
from conftest import END_OF_TURN, ROOT, TEMPLATES, make_model, make_tokenizer, read_lines, run_stage, save_model, write_rows

# ------------------------------------------------------------ the metric: table 1 (and, below the line, table 2)

PUBLISHED = """
2.87 2.94 2.88 3.10 3.65 4.13 4.50 4.65 4.63 4.70 3.81 0.254 0.138 0.917   Qwen2-7B-Instruct Base
4.05 4.26 4.66 4.86 4.93 4.95 4.95 4.98 4.98 4.98 4.76 0.093 0.099 0.695   Qwen2-7B-Instruct Ours
4.12 4.18 4.38 4.52 4.53 4.56 4.81 4.90 4.86 4.83 4.57 0.089 0.114 0.912   Qwen2-7B-Instruct SFT-Preferred
3.80 3.82 4.04 4.11 4.16 4.25 4.43 4.46 4.14 4.35 4.16 0.063 0.095 0.690   Qwen2-7B-Instruct SFT-Rejected
3.38 3.35 3.40 3.48 3.45 3.48 3.41 3.45 3.35 3.46 3.42 0.005 0.037 0.084   Llama-3-8B-Instruct Base
4.06 4.14 4.17 4.15 4.17 4.19 4.22 4.23 4.20 4.29 4.18 0.018 0.080 0.819   Llama-3-8B-Instruct Ours
4.21 4.10 4.07 4.19 4.07 4.21 4.18 4.22 4.14 4.22 4.16 0.007 0.050 0.136   Llama-3-8B-Instruct SFT-Preferred
3.80 3.72 3.63 3.94 3.65 3.66 3.73 3.99 3.93 3.94 3.80 0.024 0.066 0.266   Llama-3-8B-Instruct SFT-Rejected
3.40 3.62 3.62 3.47 3.38 3.43 3.35 3.54 3.61 3.68 3.51 0.011 0.032 0.072   Mistral-7B-Instruct-v0.3 Base
3.85 3.85 3.98 3.91 4.26 4.17 4.35 4.52 4.57 4.60 4.21 0.095 0.127 0.932   Mistral-7B-Instruct-v0.3 Ours
3.64 3.69 3.75 3.75 3.88 3.89 3.85 4.03 3.93 4.08 3.85 0.045 0.102 0.890   Mistral-7B-Instruct-v0.3 SFT-Preferred
3.59 3.40 3.69 3.36 3.35 3.32 3.36 3.56 3.68 3.78 3.51 0.018 0.040 0.103   Mistral-7B-Instruct-v0.3 SFT-Rejected
2.55 2.69 2.99 3.26 3.17 3.07 2.82 2.80 2.74 2.82 2.89 0.002 0.003 0.001   OLMo-7B-0724-Instruct Base
4.23 4.14 4.38 4.64 4.84 4.83 4.85 4.85 4.86 4.88 4.65 0.084 0.114 0.771   OLMo-7B-0724-Instruct Ours
3.51 3.19 3.27 3.80 3.61 3.39 4.00 3.90 4.08 4.15 3.69 0.094 0.098 0.681   OLMo-7B-0724-Instruct SFT-Preferred
3.26 3.16 3.12 3.11 3.26 3.23 3.06 3.11 3.97 3.79 3.31 0.062 0.068 0.360   OLMo-7B-0724-Instruct SFT-Rejected
2.63 2.60 2.61 2.79 3.15 3.62 3.98 4.12 4.20 4.27 3.40 0.228 0.136 0.931   Qwen2 CodeActInstruct
3.85 4.00 4.11 4.24 4.31 4.57 4.60 4.66 4.67 4.66 4.37 0.097 0.119 0.925   Qwen2 Preferred
""".strip().splitlines()


@pytest.mark.parametrize("row", PUBLISHED)
def test_every_published_row_is_reproduced(row):
    numbers = [float(number) for number in row.split()[:14]]
    found = evaluate.improvement(numbers[:10])
    assert list(found) == ["AL", "IR", "N-IR", "R2"] and all(type(value) is float for value in found.values())
    assert found["AL"] == pytest.approx(numbers[10], abs=0.0051), "two digits are printed"
    assert [found[name] for name in ("IR", "N-IR", "R2")] == pytest.approx(numbers[11:], abs=0.001)


def test_a_flat_curve_has_no_normalised_slope():
    flat, one = evaluate.improvement([3.0] * 10), evaluate.improvement([3.0])
    assert flat["AL"] == one["AL"] == 3 and flat["IR"] == 0 and math.isnan(flat["N-IR"] + flat["R2"])
    assert all(math.isnan(one[name]) for name in ("IR", "N-IR", "R2"))


@pytest.mark.parametrize("raw, score", [("4", 4), (" 1\n", 1), ("**5**", 5), ("Score: 3.", 3), ("'2'", 2), ("0", None), ("6", None),
                                        ("4.5", None), ("-3", None), ("4/5", None), ("4 or 5", None), ("four", None), ("45", None),
                                        ("I give it a 4", None), ("", None), ("1-5", None)])
def test_an_answer_that_is_no_score_is_not_guessed_at(raw, score):
    assert evaluate.read_score(raw) == score


def test_the_bootstrap_is_over_people_and_seeded():
    rng = np.random.default_rng(0)
    level, slope = rng.normal(3, 0.5, 200), 0.1
    scores = level[:, None] + slope * np.arange(10) + rng.normal(0, 0.1, (200, 10))
    scores[3, 4] = np.nan
    found = evaluate.bootstrap(scores, 7)
    assert found == evaluate.bootstrap(scores, 7) != evaluate.bootstrap(scores, 8)
    low, high = found["AL"]
    sem = np.nanmean(scores, 1).std(ddof=1) / 200 ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * sem, rel=0.1), "as wide as people differ, and not as scores do"
    assert found["IR"][0] < slope < found["IR"][1] and found["IR"][1] - found["IR"][0] < 0.02
    assert evaluate.bootstrap(scores[:1], 7) == {}


# ------------------------------------------------------------ personas

def test_the_filter_by_hand():
    """Unit vectors in a plane, by their angles: cos 53.13 = .6 is kept, and what is kept counts for those after it."""
    vectors = {a: np.array([math.cos(math.radians(a)), math.sin(math.radians(a))]) for a in (0, 30, 60, 100, 110, 180)}
    found = generate_personas.filtered(np.array([vectors[0]]), [vectors[a] for a in (30, 60, 100, 110, 180)], 0.6)
    assert [kept for _, _, kept in found] == [False, True, False, False, True]
    assert [similarity for similarity, _, _ in found] == pytest.approx(
        [math.cos(math.radians(a)) for a in (30, 60, 40, 50, 120)])
    assert [nearest for _, nearest, _ in found] == [0, 0, 1, 1, 1], "60 degrees joined the pool as its second"
    exact = generate_personas.filtered(np.eye(2)[:1], np.array([[0.6, 0.8]]), 0.6)
    assert exact[0][2], "0.6 does not exceed 0.6"


def test_ngrams_by_hand():
    """'ab cd' and 'ab ce' share ' ab ', 'ab c' of ' ab ', 'ab c', 'b cd', ' cd '."""
    a, b, none = generate_personas.ngrams(["Ab, cd!", "ab ce", ""])
    assert a @ b == pytest.approx(2 / 4) and a @ a == pytest.approx(1) and not none.any()


def test_an_encoders_mean_leaves_padding_out(tmp_path):
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    tokenizer = make_tokenizer("llama3")
    tokenizer.pad_token = tokenizer.eos_token
    model = BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=16, max_position_embeddings=64)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embed, texts = generate_personas.encoder(str(tmp_path)), ["Tea.", "A much longer text than that."]
    for text, vector in zip(texts, embed(texts)):
        with torch.no_grad():
            mean = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].double().mean(0)
        assert torch.allclose(torch.tensor(vector), mean / mean.norm(), atol=1e-6)
    with pytest.raises(SystemExit):
        embed(["x" * 100])
    model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):                              # else nothing would be similar to anything
        generate_personas.encoder(str(tmp_path))(texts)


def test_what_a_writer_writes_as_texts():
    reply = ("Here are the 20 user profiles:\n---\nSure! Here you go.\n1. She sings in a small choir.\n2) He is 3. He naps a lot."
             "\n- Calm, kind, loud, shy, slow.\nNone\nnone.\n\n17 years old, he skates.\nThe last one here is a baker")
    assert generate_personas.texts_in(reply, cut=True) == [
        "She sings in a small choir.", "He is 3. He naps a lot.", "Calm, kind, loud, shy, slow.", "17 years old, he skates."]
    assert generate_personas.texts_in(reply)[-1] == "The last one here is a baker"


WORDS = "acorn bronze cedar delta ember fjord garnet hazel indigo jasper kelp lotus maple nectar opal pearl quartz raven sable thyme".split()


def writer(request):
    """20 texts, of which 10 are the same at every call."""
    kind = "profile" if "different user profiles" in request["messages"][0]["content"] else "trait"
    return "\n".join(f"{i + 1}. {kind} {word} {word[::-1]} {request['seed'] * (i % 2) % 9999 * 7} {word}"
                     for i, word in enumerate(WORDS))


def grow(path, server, *more):
    return ["--model", f"openai:writer@{server.url}", "--embedder", "ngrams", "--splits", "train=30,test=8", "--held-out", 4, 2,
            "--rounds", 3, "--output", path, *more]


def test_pools_grow_and_personas_are_pairs(run, server, tmp_path):
    server.reply = lambda request: (200, writer(request))
    out, _ = run(generate_personas, *grow(tmp_path / "p.jsonl", server))
    people, texts = read_lines(tmp_path / "p.jsonl"), read_lines(tmp_path / "p.pools.jsonl")
    assert {(p["split"], p["persona_id"]) for p in people} == {(s, f"{s}{i:04d}") for s, n in (("train", 30), ("test", 8))
                                                              for i in range(n)}
    for field in ("profile", "personality"):
        train_has, test_has = ({p[field] for p in people if p["split"] == split} for split in ("train", "test"))
        assert not train_has & test_has and len(test_has) <= (4 if field == "profile" else 2)
    assert len({(p["profile"], p["personality"]) for p in people}) == 38
    discarded = [row for row in texts if not row["kept"]]
    assert discarded and all(row["similarity"] > 0.6 for row in discarded)
    members = {row["text"] for row in texts if row["kept"]}
    assert all(row["nearest"] in members for row in discarded) and {p["profile"] for p in people} <= members
    assert all(row["similarity"] <= 0.6 for row in texts if row["kept"] and row["round"])
    assert f"of {len(texts)} texts {len(discarded)} discarded as similar by ngrams (a deviation" in out
    assert [row["round"] for row in texts].count(0) == 40 and len(server.requests) == 2 * max(row["round"] for row in texts)
    asked = server.requests[0]["messages"]
    assert len(asked) == 1 and server.requests[0]["temperature"] == 0.8
    seeds = [row["text"] for row in texts if row["round"] == 0]
    assert sum(seed in asked[0]["content"] for seed in seeds) == 5

    files = ("p.jsonl", "p.pools.jsonl", "p.replies.jsonl")
    before = [(tmp_path / file).read_bytes() for file in files]
    run(generate_personas, *grow(tmp_path / "p.jsonl", server))
    assert [(tmp_path / file).read_bytes() for file in files] == before
    (tmp_path / "p.jsonl").unlink(), (tmp_path / "p.pools.jsonl").unlink()
    count = len(server.requests)
    run(generate_personas, *grow(tmp_path / "p.jsonl", server))
    assert [(tmp_path / file).read_bytes() for file in files] == before and len(server.requests) == count, "nothing is paid twice"
    _, err = run(generate_personas, *grow(tmp_path / "q.jsonl", server), "--splits", "train=9999999", status=1)
    assert "too few for train=9999999" in err


def test_an_empty_pool_ends_in_one_line(run, server, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    _, err = run(generate_personas, *grow(tmp_path / "p.jsonl", server), "--profiles", tmp_path / "empty.jsonl", status=2)
    assert "no text in one of them" in err


def test_the_seeds_are_twenty_of_each_and_differ():
    for name in ("profiles", "personalities"):
        texts = [row["text"] for row in read_lines(ROOT / "aloe/data" / f"{name}.jsonl")]
        found = generate_personas.filtered(generate_personas.ngrams(texts[:1]), generate_personas.ngrams(texts[1:]), 0.6)
        assert len(texts) == 20 and all(kept for _, _, kept in found)


# ------------------------------------------------------------ conversations

PERSON = {"profile": "He has {two} hens.", "personality": "He is dry."}
TALK = [{"role": "user", "content": "My hens {lay}."}, {"role": "assistant", "content": "Good."}, {"role": "user", "content": "Yes."}]


def prompt(name):
    return (ROOT / f"prompts/aloe_{name}.txt").read_text()[:-1]


def filled(name, **fields):
    return re.sub(r"\{(\w+)\}", lambda field: fields[field[1]], prompt(name))


def test_what_each_of_them_sees():
    role = filled("roleplay", **PERSON)
    assert simulate.roleplayer_chat(PERSON, []) == [{"role": "user", "content": role}]
    assert simulate.roleplayer_chat(PERSON, TALK[:2]) == [
        {"role": "user", "content": role}, {"role": "assistant", "content": "My hens {lay}."}, {"role": "user", "content": "Good."}]
    assert simulate.inducer_chat(PERSON, TALK) == [{"role": "user", "content": filled(
        "induction", conversation="A: My hens {lay}.\nB: Good.\nA: Yes.", **PERSON)}]
    before = json.dumps(TALK)
    assert simulate.hinted(TALK, "He has {two} hens.") == [
        *TALK[:2], {"role": "user", "content": "Yes.\n" + filled("hint", revealed="He has {two} hens.")}]
    assert json.dumps(TALK) == before
    assert evaluate.judge_chat(PERSON, "Yes.", "{Good}.") == [
        {"role": "user", "content": filled("judge", message="Yes.", response="{Good}.", **PERSON)}]


def test_invented_words_are_found():
    assert simulate.invented("Profile: He has two hens.\nPersonalities: None", PERSON) == []
    assert simulate.invented("Profile: He has three cats.\nPersonalities: dry", PERSON) == ["cats", "three"]


ROUNDS = [{"user": "Hi!", "revealed": "R1", "preferred": "p one", "rejected": "r one", "chosen": "rejected"},
          {"user": "Tea?", "revealed": "R2", "preferred": "p two", "rejected": "r two", "chosen": "preferred"},
          {"user": "Bye.", "revealed": "R3", "preferred": "p three", "rejected": "r three", "chosen": "rejected", "cut": ["rejected"]}]


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_mask_as_text(family):
    """One reply a round, the walked history before it, which has the rejected reply that was walked, and nothing else."""
    tokenizer = make_tokenizer(family)
    blank, end = " " if family == "mistral" else "", END_OF_TURN[family]
    for i, pair in enumerate(train.round_examples(tokenizer, ROUNDS)):
        for name, (ids, labels) in pair.items():
            cut = name in ROUNDS[i].get("cut", ())
            supervised = [t for t, label in enumerate(labels) if label != -100]
            assert tokenizer.decode([labels[t] for t in supervised]) == blank + ROUNDS[i][name] + ("" if cut else end)
            assert supervised == list(range(supervised[0], len(ids))) and [labels[t] for t in supervised] == ids[supervised[0]:]
            history = [m for r in ROUNDS[:i] for m in ({"role": "user", "content": r["user"]},
                                                       {"role": "assistant", "content": r[r["chosen"]]})]
            asked = [*history, {"role": "user", "content": ROUNDS[i]["user"]}]
            assert ids[:supervised[0]] == common.prompt_ids(tokenizer, asked), "what the model sees when it is asked"
            context = tokenizer.decode(ids[:supervised[0]])
            assert ("r one" in context, "p one" in context) == (i > 0, False) and "R1" not in context and "Hint" not in context
            assert ("p two" in context, "r two" in context) == (i > 1, False)


def test_the_coin_of_the_control_changes_places():
    tokenizer = make_tokenizer("llama3")
    straight = train.round_examples(tokenizer, ROUNDS)
    dealt = train.round_examples(tokenizer, ROUNDS, coin=lambda i: i == 1)
    assert dealt[0] == straight[0] and dealt[1] == {"preferred": straight[1]["rejected"], "rejected": straight[1]["preferred"]}


# ------------------------------------------------------------ DPO

def test_dpo_is_trls(tmp_path):
    """Loss, rewards and gradients on the same ids, with a reference that is another model."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    tokenizer = make_tokenizer("llama3")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model, reference = make_model(len(tokenizer), 0), make_model(len(tokenizer), 1)
    pairs = train.round_examples(tokenizer, ROUNDS)
    config = DPOConfig(output_dir=str(tmp_path), beta=0.9, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
                       disable_dropout=False)
    trainer = DPOTrainer(model, reference, config, processing_class=tokenizer, train_dataset=Dataset.from_list(
        [{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    split = [sum(label == -100 for label in pair["preferred"][1]) for pair in pairs]
    batch = trainer.data_collator([{"prompt_ids": pair["preferred"][0][:n], "chosen_ids": pair["preferred"][0][n:],
                                    "rejected_ids": pair["rejected"][0][n:]} for pair, n in zip(pairs, split)])
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    rewards = [trainer._metrics["train"][f"rewards/{kind}"][0] for kind in ("chosen", "rejected")]

    def log_p(of, name):
        with torch.no_grad():
            return torch.stack([-loop.sum_loss(of, *loop.collate([pair[name]])) for pair in pairs])
    both = [torch.stack([log_p(of, name) for name in ("preferred", "rejected")]) for of in (model, reference)]
    losses, ours = train.dpo_loss(*both, 0.9)
    assert losses.mean().item() == pytest.approx(theirs.item(), abs=1e-5, rel=1e-5)
    assert ours.mean(1).tolist() == pytest.approx(rewards, abs=1e-5, rel=1e-5)
    examples = [(*pair["preferred"], *pair["rejected"], ref.tolist()) for pair, ref in zip(pairs, both[1].T)]
    for size in (1, 2, 8):
        model.zero_grad()
        loss = loop.mean_loss(Accelerator(cpu=True), model, examples, size, lambda *given: train.pair_loss(*given, beta=0.9), learn=True)
        assert loss == pytest.approx(theirs.item(), abs=1e-5, rel=1e-5)
        for name, weight in model.named_parameters():
            assert torch.allclose(weight.grad, expected[name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("beta", [None, 0.9])
def test_processes_that_run_out_of_examples_add_nothing(beta):
    """Three examples on two processes, one at a time: the second process has one, and goes backward twice."""
    tokenizer = make_tokenizer("llama3")
    model, pairs = make_model(len(tokenizer)), train.round_examples(tokenizer, ROUNDS)
    batch = [(*pair["preferred"], *pair["rejected"], [-9.0, -8.0]) if beta else pair["preferred"] for pair in pairs]
    loss_of = beta and (lambda *given: train.pair_loss(*given, beta=beta))
    alone = loop.mean_loss(Accelerator(cpu=True), model, batch, 8, loss_of, learn=True)
    expected, total, backward = model.lm_head.weight.grad.clone(), 0, []
    model.zero_grad()
    for rank in (0, 1):
        total += loop.mean_loss(SimpleNamespace(num_processes=2, process_index=rank, device="cpu", reduce=lambda value: value,
                                                backward=lambda loss: backward.append(rank) or loss.backward()),
                                model, batch, 1, loss_of, learn=True)
    assert backward == [0, 0, 1, 1] and total == pytest.approx(alone, rel=1e-5)
    assert torch.allclose(model.lm_head.weight.grad / 2, expected, atol=1e-5)


def test_dpo_by_hand():
    losses, rewards = train.dpo_loss(torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-1.5], [-1.0]]), 0.9)
    assert rewards[:, 0].tolist() == pytest.approx([0.45, -0.9]) and losses.item() == pytest.approx(math.log(1 + math.exp(-1.35)))


# ------------------------------------------------------------ the stages, from end to end

PEOPLE = [{"persona_id": f"{split}{i:04d}", "split": split, "profile": f"She has {i} hens.", "personality": "She is calm."}
          for split in ("train", "test") for i in range(6)]


def cast(request):
    """The user, the inducer, the judge: what they say depends on what they are shown."""
    *before, last = request["messages"]
    name = request["model"]
    if name == "user":
        assert "Your task is to play the role" in (before or [last])[0]["content"]
        assert [m["role"] for m in request["messages"]] == (["user", "assistant"] * 9)[:len(before) + 1]
        return f"Message {len(before) // 2}, seed {request['seed'] % 100}."
    if name == "inducer":
        assert not before and request["temperature"] == 0
        return "Profile: She has hens.\nPersonalities: None" if "1 hens" not in last["content"] else "Profile: She has cats."
    if name == "judge":
        assert not before
        return "4" if "Message 1" in last["content"] else "about 3" if "4 hens" in last["content"] else "2"
    assert name == "chat"
    return "A warm reply." if "(Hint:" in last["content"] else "A reply."


@pytest.fixture
def world(tmp_path, server):
    server.reply = lambda request: (200, cast(request))
    write_rows(tmp_path / "p.jsonl", PEOPLE)
    return tmp_path


def talk_flags(world, server, model, output="c.jsonl", *more):
    return ["--model", model or f"openai:chat@{server.url}", "--roleplayer", f"openai:user@{server.url}", "--dtype", "float32",
            "--inducer", f"openai:inducer@{server.url}", "--personas", world / "p.jsonl", "--rounds", 2, "--max-tokens", 6,
            "--output", world / output, *more]


def evaluate_flags(world, server, model, output="e", *more):
    flags = talk_flags(world, server, model, output)
    at = flags.index("--inducer")
    return [*flags[:at], *flags[at + 2:], "--judge", f"openai:judge@{server.url}", "--results", world / "r.jsonl",
            "--variant", "base", "--max-refused", 0.5, *more]


def test_conversations(run, world, server):
    out, _ = run(simulate, *talk_flags(world, server, None))
    rows = read_lines(world / "c.jsonl")
    assert [row["persona_id"] for row in rows] == [f"train000{i}" for i in range(6)] and len(server.requests) == 6 * 2 * 4
    for row in rows:
        assert row["profile"].startswith("She has") and row["personality"] == "She is calm." and row["split"] == "train"
        assert [set(r) for r in row["rounds"]] == 2 * [{"user", "revealed", "preferred", "rejected", "chosen"}]
        assert {(r["preferred"], r["rejected"]) for r in row["rounds"]} == {("A warm reply.", "A reply.")}
    chosen = [r["chosen"] for row in rows for r in row["rounds"]]
    assert set(chosen) == {"preferred", "rejected"}
    for request in server.requests:                              # who walked on which reply
        if request["model"] == "chat" and len(request["messages"]) == 3:
            assert "(Hint" not in request["messages"][0]["content"], "no hint stays in the history"
            said = request["messages"][1]["content"]
            row = next(row for row in rows if row["rounds"][0]["user"] == request["messages"][0]["content"]
                       and row["rounds"][0][row["rounds"][0]["chosen"]] == said)
            assert request["messages"][2]["content"].startswith(row["rounds"][1]["user"])
    assert "6 rows, 0 refused, 0 cut at --max-tokens; 12 rounds: in 0 nothing was revealed, in 2 the inducer" in out and "(cats)" in out
    seen = (world / "c.jsonl").read_bytes()
    run(simulate, *talk_flags(world, server, None, "again.jsonl", "--batch-size", 2))
    assert (world / "again.jsonl").read_bytes() == seen, "the size of a block is no matter"
    run(simulate, *talk_flags(world, server, None, "few.jsonl", "--limit", 2))
    few = (world / "few.jsonl").read_bytes().splitlines()
    assert len(few) == 2 and set(few) < set(seen.splitlines())


@pytest.mark.parametrize("who, what", [("user", "user, round 1"), ("inducer", "revealed, round 1"), ("chat", "preferred, round 1")])
def test_an_empty_reply_is_refused_and_named(run, world, server, who, what):
    server.reply = lambda request: (200, "" if request["model"] == who and "0 hens" in json.dumps(request["messages"])
                                    or request["model"] == who == "chat" and "(Hint" in request["messages"][-1]["content"]
                                    and request["seed"] % 2 else cast(request))
    out, _ = run(simulate, *talk_flags(world, server, None, "c.jsonl", "--max-refused", 1))
    refused = [row for row in read_lines(world / "c.jsonl") if "refused" in row]
    assert refused and refused[0]["refused"].startswith(what if who != "chat" else "preferred, round ") and "empty" in refused[0]["refused"]
    assert f"6 rows, {len(refused)} refused" in out


def test_who_says_nothing_on_this_machine_is_refused_too():
    """A server's empty answer comes as a refusal; a local model's does not. Nobody talks on; others do."""
    def ask(k, asked, rows):
        for key, field in reversed(asked):
            yield (key, field), common.Reply("" if (key, field, k) == ((1,), "reply", 0) else "x", cut=key == (2,))
    rows = simulate.simulate({(i,): PERSON for i in range(3)}, 2, [["user"], ["reply"]], lambda key, k: {}, ask)
    assert rows[(1,)] == {**PERSON, "rounds": [], "cut": 0, "refused": "reply, round 1: empty"}
    assert rows[(0,)]["rounds"] == 2 * [{"user": "x", "reply": "x"}] and rows[(2,)]["cut"] == 4
    assert rows[(2,)]["rounds"] == 2 * [{"user": "x", "reply": "x", "cut": ["user", "reply"]}]


def test_a_persona_that_is_none_is_named(run, world, server):
    write_rows(world / "p.jsonl", [*PEOPLE[:2], {**PEOPLE[2], "personality": "None."}])
    _, err = run(simulate, *talk_flags(world, server, None), status=2)
    assert "the personality of train0002 is 'None.'" in err and not server.requests
    _, err = run(simulate, *talk_flags(world, server, None, "c.jsonl", "--split", "dev"), status=2)
    assert "no persona of --split dev" in err


def test_a_dry_run_counts_the_calls(run, world, server):
    out, _ = run(simulate, *talk_flags(world, server, None), "--dry-run", status=0)
    assert [re.search(rf"openai:{name}: 12 calls", out) is not None for name in ("user", "inducer")] == [True, True]
    assert "openai:chat: 24 calls" in out
    out, _ = run(evaluate, *evaluate_flags(world, server, None), "--dry-run", status=0)
    assert "openai:judge: 12 calls" in out and not server.requests and not (world / "e").exists() and not (world / "c.jsonl").exists()


def test_from_conversations_to_the_table(run, world, server, tiny):
    """Simulate, SFT, DPO and evaluation with a model on this machine; each stage again gives the same bytes."""
    def twice(stage, flags, first, again, *names):
        out, _ = run(stage, *flags, "--output", world / first)
        run(stage, *flags, "--output", world / again)
        for name in names:
            assert (world / first / name).read_bytes() == (world / again / name).read_bytes()
        return out
    twice(simulate, talk_flags(world, server, tiny), "c.jsonl", "c2.jsonl", "")
    rows = read_lines(world / "c.jsonl")
    assert any("cut" in r for row in rows for r in row["rounds"]) and sum(row["cut"] for row in rows) > 0
    learn = ["--conversations", world / "c.jsonl", "--dtype", "float32", "--lr", "1e-3", "--batch-size", 6, "--micro-batch-size", 4]
    out = twice(train, [*learn, "--stage", "sft", "--base", tiny], "sft", "sft2", "model.safetensors", "log.jsonl")
    assert "10 examples + 2 held out (0 conversations refused, 0 rounds longer" in out and "6 steps of 6" in out
    log = read_lines(world / "sft/log.jsonl")
    assert [row["rate"] for row in log] == pytest.approx([1e-3 * (6 - i) / 6 for i in range(6)]), "linear, to 0"
    out = twice(train, [*learn, "--stage", "dpo", "--base", world / "sft"], "dpo", "dpo2", "model.safetensors")
    log = read_lines(world / "dpo/log.jsonl")
    assert "nats a pair" in out and log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4), "the reference is the start"
    assert len(log) == 2 and log[1]["loss"] != pytest.approx(math.log(2), abs=1e-4), "one epoch, and something was learned"
    reference = read_lines(world / "dpo.reference.jsonl")
    assert len(reference) == 24 and set(reference[0]) == {"persona_id", "round", "reply", "log_prob"}
    card = (world / "dpo/README.md").read_text()
    assert "`aloe/train.py --stage dpo`: it infers" in card and '"beta": 0.9' in card

    for variant, model in (("base", tiny), ("sft_dpo", world / "dpo")):
        out = twice(evaluate, [*evaluate_flags(world, server, model), "--variant", variant], f"e_{variant}", "again_" + variant,
                    "conversations.jsonl", "scores.jsonl")
    scores = read_lines(world / "e_base/scores.jsonl")
    assert len(scores) == 12 and [row["raw"] for row in scores if "refused" in row] == ["about 3"], "the judge's second was a 4"
    assert "1 unreadable" in out
    results = {(row["variant"], row["metric"]): row for row in read_lines(world / "r.jsonl")}
    assert len(results) == 8 and results["base", "AL"]["by_round"] == [2, 4] and results["base", "IR"]["mean"] == 2
    assert results["base", "IR"]["interval_95"] == [2, 2] and results["base", "AL"]["n"] == 6
    assert results["base", "AL"]["roleplayer"] == "user" and results["base", "AL"]["condition"] == "T=1"
    table = out[out.index("k=1"):].splitlines()
    assert table[1].split()[:7] == ["base", "T=1", "2.00", "4.00", "3.08", "2.000", "1.000"] or table[1].split()[:5] == [
        "base", "T=1", "2.00", "4.00", "3.00"]


def test_the_reference_is_computed_once(run, world, tiny, monkeypatch):
    """A training that was killed finds its log-probabilities again; they are those of the replies with their ends."""
    write_rows(world / "c.jsonl", [{**PEOPLE[i], "rounds": ROUNDS} for i in range(3)])
    flags = ["--stage", "dpo", "--base", tiny, "--conversations", world / "c.jsonl", "--dtype", "float32", "--output", world / "m"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "mean_loss", lambda *_, **__: (_ for _ in ()).throw(OSError("pulled out")))
        run(train, *flags, status=2)
    saved = {(row["round"], row["reply"]): row["log_prob"] for row in read_lines(world / "m.reference.jsonl")}
    with monkeypatch.context() as patch:
        patch.setattr(train, "open_model", None)                 # it would be called
        out, _ = run(train, *flags)
    assert "is not made by --stage sft" in out
    assert "6 examples + 3 held out" in out and "trained already" in run(train, *flags)[0]
    tokenizer, model = common.load_tokenizer(tiny), common.load_model(tiny, "float32").eval()
    for i, pair in enumerate(train.round_examples(tokenizer, ROUNDS)):
        for name, example in pair.items():
            with torch.no_grad():
                assert saved[i, name] == pytest.approx(-loop.sum_loss(model, *loop.collate([example])).item(), rel=1e-5)
    write_rows(world / "c.jsonl", [{**PEOPLE[0], "rounds": [{"user": "Hi"}]}])
    _, err = run(train, *flags, "--output", world / "other", status=2)
    assert "a round of train0000 lacks a text" in err
    for wrong in ({"user": 1}, {"chosen": "other"}):
        write_rows(world / "c.jsonl", [{**PEOPLE[0], "rounds": [{**ROUNDS[0], **wrong}]}])
        _, err = run(train, *flags, "--output", world / "other", status=2)
        assert "a round of train0000 lacks a text" in err
    write_rows(world / "c.jsonl", [{"persona_id": "a", "refused": "user, round 1: empty"}])
    _, err = run(train, *flags, "--output", world / "other", status=2)
    assert "no example to train on (1 conversations refused" in err


def test_what_belongs_to_the_other_stage_is_refused(run, world, tiny):
    _, err = run(train, "--stage", "dpo", "--target", "rejected", "--base", tiny, "--conversations", world / "c.jsonl", "--output",
                 world / "m", status=2)
    assert "--target belongs to --stage sft" in err


# ------------------------------------------------------------ kills, processes, folders

def test_a_kill_faults_and_two_processes_leave_the_same_bytes(world, server, tiny, run):
    flags = talk_flags(world, server, tiny, "whole.jsonl", "--batch-size", 2)
    run(simulate, *flags)
    count, whole = [0], (world / "whole.jsonl").read_bytes()

    def mortal(request):
        count[0] += 1
        return (200, cast(request)) if count[0] < 14 else (400, {"error": {"message": "gone"}})
    server.reply = mortal
    flags[flags.index(world / "whole.jsonl")] = world / "killed.jsonl"
    run(simulate, *flags, status=2)
    assert not (world / "killed.jsonl").exists() and common.unfinished(world / "killed.jsonl")

    def faulty(request):                                         # it is repeated by the client
        count[0] += 1
        return (200, cast(request)) if count[0] % 4 else ((429, 500, 503)[count[0] % 3], {"error": {"message": "busy"}})
    server.reply = faulty
    run(simulate, *flags)
    assert (world / "killed.jsonl").read_bytes() == whole
    server.reply = lambda request: (200, cast(request))
    flags[flags.index(world / "killed.jsonl")] = world / "two.jsonl"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "aloe/simulate.py",
                           *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (world / "two.jsonl").read_bytes() == whole


PAPER = {"generate_personas": "examples 5,similarity 0.6,temperature 0.8,embedder sentence-transformers/paraphrase-MiniLM-L6-v2",
         "simulate": "rounds 10,split train", "evaluate": "rounds 10,split test",
         "train": "lr 1e-05,batch-size 48,beta 0.9,epochs 3,target preferred"}


@pytest.mark.parametrize("stage", ["generate_personas", "simulate", "train", "evaluate"])
def test_from_any_folder_and_beside_files_of_the_same_name(stage, tmp_path):
    """From aloe/, from a folder that has a simulate.py and a package `aloe` of its own, and through a link."""
    (tmp_path / "aloe").mkdir()
    for name in ("simulate.py", "train.py", "evaluate.py", "common.py", "aloe/__init__.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    (tmp_path / "link.py").symlink_to(ROOT / f"aloe/{stage}.py")
    for folder, script in ((ROOT / "aloe", f"{stage}.py"), (tmp_path, ROOT / f"aloe/{stage}.py"), (tmp_path, "link.py")):
        done = subprocess.run([sys.executable, script, "--help"], cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "400"})
        assert done.returncode == 0 and "ALOE, section" in done.stdout, done.stderr
    said, source = " ".join(done.stdout.split()), "".join((ROOT / file).read_text() for file in (
        f"aloe/{stage}.py", "aloe/simulate.py", "common.py", "train.py", "users.py"))
    flags = set(re.findall(r"^  (--[a-z][a-z-]*)", done.stdout, re.M))
    for flag in flags - {"--profiles", "--personalities"}:       # read by their names in a loop
        assert re.search(rf"args\.{flag[2:].replace('-', '_')}\b", source), f"{flag} is never read"
    manual, options = said.split("On a laptop")[1].split("options:")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", manual)) <= flags | {"--config_file", "--config"}
    for setting in PAPER[stage].split(","):
        flag, value = setting.split()
        assert re.search(rf"--{flag} [^\]]*?default: {re.escape(value)}(?!\d)", options), setting


def test_a_dry_run_of_everything_counts_and_bad_words_are_refused():
    def run_sh(*words, **more):
        return subprocess.run(["bash", ROOT / "aloe/run.sh", *words], capture_output=True, text=True, cwd="/",
                              env={**os.environ, "DRY_RUN": "1", **more})
    said = run_sh("paper").stdout
    assert "3000 conversations x 10 rounds x 4 (user, inducer, two replies) x 1 = 120000 calls" in said
    assert "4 x 100 cases x 10 rounds x 2 (user, judge) = 8000 calls" in said and "trainings: 3, each on about 30000 rounds" in said
    for more, words in (({"VARIANTS": "sft_dpo"}, "comes after sft"), ({"VARIANTS": "best"}, "no variant best"),
                        ({"VARIANTS": "mute"}, "control of the embedded world")):
        done = run_sh("paper", **more)
        assert done.returncode == 2 and words in done.stderr
    assert run_sh("large").returncode == 2 and not (ROOT / "runs/aloe/paper").exists()


def test_the_two_of_one_name_do_not_meet():
    import simulate as theirs
    assert theirs.__file__ == str(ROOT / "simulate.py") and simulate.__file__ == str(ROOT / "aloe/simulate.py")
    assert loop.__file__ == str(ROOT / "train.py") and train.train is loop.train and theirs is not simulate


def test_the_curve_that_is_drawn(tmp_path):
    """The rows are AL's, a temperature apart; the picture is the rows."""
    rows = [{"variant": name, "iteration": 0, "metric": metric, "condition": condition, "roleplayer": "u", "split": "test",
             "mean": 3.0, "sem": None, "n": 2, **({"by_round": [2.0, height]} if metric == "AL" else {})}
            for name, height in (("base", 2.5), ("sft", 4.0)) for condition in ("T=0", "T=1") for metric in ("AL", "IR", "N-IR", "R2")]
    write_rows(tmp_path / "results.jsonl", rows)
    assert report.curves(rows, "T=1") == {"base": [2.0, 2.5], "sft": [2.0, 4.0]} and report.curves(rows, "T=2") == {}
    done = subprocess.run([sys.executable, ROOT / "aloe/report.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and "2.00  4.00" in done.stdout, done.stderr
    assert {path.name for path in (tmp_path / "report").iterdir()} == {f"al-T{t}.{kind}" for t in "01" for kind in ("png", "svg")}
    other = [{**row, "mean": None if row["metric"] == "R2" else row["mean"] + 1} for row in rows]
    lines = report.over_seeds([rows, other])
    assert lines[0].split() == ["AL", "IR", "N-IR", "R2"] and lines[1].split() == "base T=0 3.500 ± 0.707 3.500 ± 0.707 3.500 ± 0.707 -".split()
    done = subprocess.run([sys.executable, ROOT / "aloe/report.py", tmp_path, "--split", "dev"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no results on split dev" in done.stderr
