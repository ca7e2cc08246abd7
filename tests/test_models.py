"""Log-probabilities, generation and chats, each against a second way to the same answer."""
import os
import shutil
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

import common
from common import LocalModel, OneProcess, Request
from conftest import END_OF_TURN, TEMPLATES, make_tokenizer, save_bigram_model, save_model

CHAT = [{"role": "user", "content": "My name is Ann.\n\nWhat tea?"}, {"role": "assistant", "content": "Green or black?"},
        {"role": "user", "content": "Green.\n\nWhat tea?"}, {"role": "assistant", "content": "Try sencha, Ann."}]
CPU = SimpleNamespace(device="cpu")


def local(path, batch_size=16):
    return LocalModel(path, SimpleNamespace(dtype="float32", batch_size=batch_size), CPU)


def chats(count):
    """Chats of different lengths."""
    return [[{"role": "user", "content": f"{i} " * (1 + 7 * i % 23)}] for i in range(count)]


@pytest.fixture(scope="module")
def model(tiny):
    return local(tiny)


# ------------------------------------------------------------ log p(gold | task, conversation)

def test_log_probability_of_a_bigram_model_computed_by_hand(tmp_path):
    """A bigram model's log-probability of a text is a sum that numpy can do."""
    tokenizer = make_tokenizer("mistral")
    V = -4 * (-len(tokenizer) // 4)
    table = np.random.default_rng(0).normal(size=(V, V))         # logits [next, current]
    save_bigram_model(tmp_path, tokenizer, table)

    ids, n = common.scored_ids(tokenizer, CHAT)
    gold = list(" Try sencha, Ann.".encode())
    assert n == len(gold)
    path = tokenizer(" Try sencha, Ann.", add_special_tokens=False)["input_ids"]
    before = tokenizer("]", add_special_tokens=False)["input_ids"][0]    # the context ends with "[/INST]"
    by_hand = sum(table[token, previous] - np.log(np.exp(table[:, previous]).sum())
                  for previous, token in zip([before, *path], path))
    others = [common.scored_ids(tokenizer, [*chat, {"role": "assistant", "content": "x" * i + "y"}])
              for i, chat in enumerate(chats(9))]
    scored = dict(local(tmp_path).score([*others, (ids, n)], tokens_per_batch=300))
    assert scored[9] == pytest.approx(by_hand, abs=1e-4 * n)
    assert -1000 < by_hand < -n


def test_score_does_not_depend_on_batch_order_or_padding(model, tiny):
    examples = [common.scored_ids(model.tokenizer, [*chat, {"role": "assistant", "content": "g" * (1 + 5 * i % 11)}])
                for i, chat in enumerate(chats(12))]
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    alone = []
    for ids, n in examples:                                      # all logits, one text, no padding
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        alone.append(sum(logits[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids))))
    for budget in (1, 200, 10 ** 6):
        scored = dict(model.score(examples, budget))
        assert [scored[i] for i in range(12)] == pytest.approx(alone, abs=1e-4)
    backwards = dict(model.score(examples[::-1], 300))
    assert [backwards[11 - i] for i in range(12)] == pytest.approx(alone, abs=1e-4)


def test_score_skips_what_is_done_and_deals_batches_to_processes(model):
    examples = [common.scored_ids(model.tokenizer, [*chat, {"role": "assistant", "content": "gold"}]) for chat in chats(12)]
    everything = dict(model.score(examples, 200))
    shares = [dict(model.score(examples, 200, share=SimpleNamespace(process_index=r, num_processes=3))) for r in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(12))
    assert {i: p for share in shares for i, p in share.items()} == everything       # the very same batches
    left = dict(model.score(examples, 200, skip=set(shares[0])))
    assert left == {i: p for i, p in everything.items() if i not in shares[0]}


# ------------------------------------------------------------ generation

def plain_generate(tiny, tokenizer, chat, tokens):
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
    plain.generation_config.top_k = plain.generation_config.do_sample = plain.generation_config.repetition_penalty = None
    out = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()


def test_greedy_batches_equal_plain_greedy_generation(model, tiny):
    requests = [Request(chat) for chat in chats(7)]
    replies = dict(model.generate(requests, 0.0, 1.0, 12))
    assert [replies[i].text for i in range(7)] == [plain_generate(tiny, model.tokenizer, r.chat, 12) for r in requests]


def say_few_letters(model, tokenizer):
    """So that the end comes often."""
    few = [*range(65, 91), tokenizer.eos_token_id]
    with torch.no_grad():
        model.lm_head.weight[[i for i in range(len(tokenizer)) if i not in few]] = 0
        model.lm_head.weight[tokenizer.eos_token_id] *= 1.3


@pytest.mark.parametrize("batch_size", [9, 4])
def test_shared_openings_and_rows_that_leave_and_join_change_no_text(tiny, batch_size):
    """Samples of three pairs in their second and third turn; answers end anywhere in 100 tokens, or not at all. Of four
    that go side by side, some end, and others take their places, at other lengths."""
    model = local(tiny, batch_size=batch_size)
    say_few_letters(model.model, model.tokenizer)
    requests = [Request([{"role": "user", "content": f"Ask about {'tea ' * pair}."},
                         *[{"role": role, "content": f"{sample} " * (1 + (pair + 5 * sample) % 7)} for _ in range(1 + sample % 2)
                           for role in ("assistant", "user")]], 10 * pair + sample) for pair in (1, 2, 9) for sample in range(3)]
    prompts = [common.prompt_ids(model.tokenizer, request.chat) for request in requests]
    for temperature in (0.0, 0.9):
        seen = []
        hook = model.model.register_forward_pre_hook(with_kwargs=True, hook=lambda module, ids, more: seen.append(
            (ids or [more["input_ids"]])[0].shape))
        replies = dict(model.generate(requests, temperature, 0.9, 100, block=True))
        hook.remove()
        heads = [len(os.path.commonprefix(prompts[i // 3 * 3:i // 3 * 3 + 3])) for i in range(9)]
        if batch_size == 9:
            assert seen[0] == (3, max(heads)), "one row for an opening"
            assert seen[1] == (9, max(len(prompt) - head for prompt, head in zip(prompts, heads))), "the rest for each row"
        texts, lengths, cut = [], [], []
        for request, prompt in zip(requests, prompts):           # one row at a time, all of it, in a single call
            draws = torch.from_numpy(np.random.default_rng(request.seed).random((1, 100))).float()
            sampling = [common.nucleus_sampling(draws, temperature, 0.9, len(prompt))] if temperature else []
            out = model.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                       do_sample=False, max_new_tokens=100, logits_processor=sampling)[0, len(prompt):]
            texts.append(model.tokenizer.decode(out, skip_special_tokens=True).strip())
            lengths.append(len(out))
            cut.append(out[-1] != model.tokenizer.eos_token_id)
        assert [replies[i].text for i in range(9)] == texts and [replies[i].cut for i in range(9)] == cut
        if temperature:
            assert min(lengths) < 32 < max(lengths) and len(set(lengths)) > 4, lengths
            steps = [rows for rows, length in seen if length == 1]
            assert sum(steps) < 0.8 * 9 * max(lengths), "rows that have ended leave"
            if batch_size == 4:
                order = sorted(range(9), key=lambda i: -len(prompts[i]))
                apart = sum(max(lengths[i] for i in order[k:k + 4]) for k in (0, 4, 8))
                assert len(steps) < 0.9 * apart and 1 < max(steps) <= 4, "others take their places"


def test_a_sliding_window_sees_the_same_in_a_batch_as_alone(tiny, tmp_path):
    """Mistral v0.1, Gemma: no padding may stand inside of a row, and rows of another batch do not join."""
    folders = {window: shutil.copytree(tiny, tmp_path / str(window)) for window in (None, 24)}
    for window, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        say_few_letters(model, local(tiny).tokenizer)
        model.config.sliding_window = window
        model.save_pretrained(folder)
    requests = [Request([{"role": "user", "content": f"Ask about {'tea ' * pair}."},
                         {"role": "assistant", "content": "Why? " * sample}, {"role": "user", "content": "So. " * pair}], sample)
                for pair in (1, 2, 9) for sample in (1, 2, 6)]
    alone = {window: [dict(local(folder).generate([request], 0.9, 0.9, 100))[0].text for request in requests]
             for window, folder in folders.items()}              # no padding, no cache but its own
    assert alone[None] != alone[24], "the window must matter"
    assert len({len(text) // 32 for text in alone[24]}) > 1, "answers must end in different calls"
    for window, folder in folders.items():
        together = dict(local(folder, batch_size=4).generate(requests, 0.9, 0.9, 100, block=True))
        assert [together[i].text for i in range(9)] == alone[window]


def test_a_sample_depends_on_its_own_seed_alone(model, tiny):
    """Not on the batch, its neighbours, the order, or on whether its prompt was prefilled for several samples."""
    requests = [Request(chat, 100 * i + s) for i, chat in enumerate(chats(4)) for s in range(5)]
    together = dict(model.generate(requests, 0.9, 0.9, 10))
    assert len({together[i].text for i in range(5)}) > 1, "five samples of a prompt should differ"
    small = local(tiny, batch_size=3)
    backwards = dict(small.generate(requests[::-1], 0.9, 0.9, 10))
    assert [together[i] for i in range(20)] == [backwards[19 - i] for i in range(20)]
    alone = [dict(small.generate([request], 0.9, 0.9, 10))[0] for request in requests[:6]]
    assert [together[i] for i in range(6)] == alone
    assert together[0] != dict(small.generate([Request(requests[0].chat, 7)], 0.9, 0.9, 10))[0]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.9, 0.9), (1.4, 0.5), (0.3, 0.01)])
def test_nucleus_sampling_has_the_distribution_of_transformers_warpers(temperature, top_p):
    scores = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 30)) * 2).float()
    warped = TemperatureLogitsWarper(temperature)(None, scores)
    expected = (TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped).softmax(-1)[0].numpy()
    grid = (torch.arange(4000)[:, None] + 0.5) / 4000            # all draws from 0 to 1, one a row
    chosen = common.nucleus_sampling(grid, temperature, top_p, start=5)(torch.zeros(4000, 5), scores.expand(4000, -1))
    assert ((chosen == 0).sum(1) == 1).all() and ((chosen == -torch.inf).sum(1) == 29).all()
    frequency = chosen.argmax(-1).bincount(minlength=30).numpy() / 4000
    assert np.abs(frequency - expected).max() < 1 / 2000


def test_each_step_of_a_row_has_its_own_number():
    draws = torch.tensor([[0.1, 0.6, 0.9], [0.9, 0.1, 0.6]])
    choose = common.nucleus_sampling(draws, 1.0, 1.0, start=7)
    quarters = torch.zeros(2, 4)                                 # four equally likely tokens, in order
    picked = [choose(torch.zeros(2, 7 + t), quarters).argmax(-1).tolist() for t in range(3)]
    assert picked == [[0, 3], [2, 0], [3, 2]]


def test_learned_positions_do_not_see_the_padding(tmp_path):
    """Rotary positions are relative and would forgive it; GPT-2's are absolute."""
    tokenizer = make_tokenizer("qwen")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=512,
                               initializer_range=0.3)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = local(tmp_path)
    examples = [common.scored_ids(tokenizer, [*chat, {"role": "assistant", "content": "gold"}]) for chat in chats(6)]
    together, alone = dict(model.score(examples, 10 ** 6)), dict(model.score(examples, 1))
    assert [together[i] for i in range(6)] == pytest.approx([alone[i] for i in range(6)], abs=1e-4)
    requests = [Request(chat, s) for chat in chats(3) for s in range(2)]
    together = dict(model.generate(requests, 0.9, 0.9, 8))
    assert [together[i] for i in range(6)] == [dict(model.generate([r], 0.9, 0.9, 8))[0] for r in requests]


def test_a_checkpoints_own_generation_config_decides_nothing(model, tiny):
    """conftest's models carry top_k = 1, with which all samples of a prompt would be equal, and a repetition penalty
    that would change even greedy answers (see the test of those)."""
    carried = json.load(open(f"{tiny}/generation_config.json"))
    assert carried["top_k"] == 1 and carried["repetition_penalty"] == 5.0
    replies = dict(model.generate([Request(chats(1)[0], s) for s in range(8)], 1.0, 1.0, 5))
    assert len({reply.text for reply in replies.values()}) > 1


def test_answers_end_at_the_end_of_turn_and_cuts_are_reported(tmp_path):
    """A bigram model that says "A" and then its end-of-turn token, which is not the tokenizer's eos."""
    tokenizer = make_tokenizer("llama3")
    a, end = tokenizer.encode("A", add_special_tokens=False)[0], tokenizer.convert_tokens_to_ids("<|eot_id|>")
    table = np.zeros((-4 * (-len(tokenizer) // 4),) * 2)
    table[a], table[end, a] = 1.0, 2.0                           # logits [next, current]
    save_bigram_model(tmp_path, tokenizer, table)
    (_, reply), = local(tmp_path).generate([Request(chats(1)[0])], 0.0, 1.0, 5)
    assert reply == common.Reply("A", None, False)
    (_, reply), = local(tmp_path).generate([Request(chats(1)[0])], 0.0, 1.0, 1)
    assert reply == common.Reply("A", None, True)


def test_a_context_that_does_not_fit_is_counted_before_anything_is_generated(tmp_path, capsys):
    small = local(save_model(tmp_path / "small", room=64))
    with pytest.raises(SystemExit) as end:
        list(small.generate([Request(chats(20)[19])], 0.0, 1.0, 40))
    assert end.value.code == 2 and "has room for 64" in capsys.readouterr().err


# ------------------------------------------------------------ chats

@pytest.mark.parametrize("family", TEMPLATES)
def test_ids_are_those_of_the_chat_template_and_bos_stands_once(family):
    tokenizer = make_tokenizer(family)
    ids = common.prompt_ids(tokenizer, CHAT[:3])
    assert ids == tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True, return_dict=False)
    whole, _ = common.supervised_ids(tokenizer, CHAT)
    assert whole == tokenizer.apply_chat_template(CHAT, return_dict=False)
    for row in (ids, whole):
        assert tokenizer.bos_token_id is None or row.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", TEMPLATES)
def test_assistant_turns_and_gold_decode_to_themselves(family):
    tokenizer, end = make_tokenizer(family), END_OF_TURN[family]
    blank = " " if family == "mistral" else ""
    ids, labels = common.supervised_ids(tokenizer, CHAT)
    assert tokenizer.decode([token for token in labels if token != -100]) == (
        f"{blank}Green or black?{end}{blank}Try sencha, Ann.{end}")
    assert all(label in (-100, token) for label, token in zip(labels, ids))
    ids, n = common.scored_ids(tokenizer, CHAT)
    assert tokenizer.decode(ids[-n:]) == f"{blank}Try sencha, Ann."
    assert ids[:-n] == common.prompt_ids(tokenizer, CHAT[:3])


@pytest.mark.parametrize("family", TEMPLATES)
def test_empty_turns_and_turns_that_repeat_others(family):
    tokenizer, end = make_tokenizer(family), END_OF_TURN[family]
    for texts in (("", ""), ("What tea?", "user"), ("a", "a"), ("assistant", "Green.")):
        chat = [CHAT[0], {"role": "assistant", "content": texts[0]}, CHAT[2], {"role": "assistant", "content": texts[1]}]
        _, labels = common.supervised_ids(tokenizer, chat)
        turns = tokenizer.decode([token for token in labels if token != -100]).split(end)
        assert [turn.strip() for turn in turns] == [*texts, ""]


@pytest.mark.parametrize("family", TEMPLATES)
def test_text_that_spells_a_special_token_stays_text(family):
    tokenizer = make_tokenizer(family)
    marks = tokenizer.all_special_tokens
    clean = common.supervised_ids(tokenizer, CHAT)[0]
    for mark in marks:
        chat = [dict(message) for message in CHAT]
        chat[1]["content"], chat[2]["content"] = f"Is {mark} a tea?", f"{mark}No{mark}{mark}"
        ids, labels = common.supervised_ids(tokenizer, chat)
        for special in tokenizer.all_special_ids:
            assert ids.count(special) == clean.count(special), "a message opened or closed a turn"
        said = tokenizer.decode([token for token in labels if token != -100])
        assert f"Is {mark} a tea?" in said and "No" not in said
        assert f"{mark}No{mark}{mark}" in tokenizer.decode(ids)
        assert common.prompt_ids(tokenizer, chat[:3]) == ids[:len(common.prompt_ids(tokenizer, chat[:3]))]


def test_private_characters_in_a_text_stay_what_they_are():
    tokenizer = make_tokenizer("llama3")
    text = "".join(map(chr, range(0xF0000, 0xF0009))) + "<|eot_id|>"
    ids = common.prompt_ids(tokenizer, [{"role": "user", "content": text}])
    assert text in tokenizer.decode(ids) and ids.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 1


def test_broken_models_are_refused(tmp_path, capsys):
    folder = save_model(tmp_path / "nan")
    broken = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    broken.save_pretrained(folder)
    with pytest.raises(SystemExit):
        local(folder)
    assert "not all finite" in capsys.readouterr().err
    state = broken.state_dict()
    del state["model.layers.0.mlp.up_proj.weight"]
    broken.save_pretrained(folder, state_dict=state)
    with pytest.raises(SystemExit):
        local(folder)
    assert "weights are missing, such as model.layers.0.mlp.up_proj.weight" in capsys.readouterr().err
    open(f"{folder}/model.safetensors", "r+b").truncate(1000)
    with pytest.raises(SystemExit):
        local(folder)
    assert "no model to load" in capsys.readouterr().err


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each():
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = (                                  # what the assistant said before is dropped
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] if loop.last or m['role'] == 'user' else '...' "
        "}}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    examples = common.training_examples(tokenizer, CHAT)
    for (ids, labels), end in zip(examples, (2, 4), strict=True):
        prompt = common.prompt_ids(tokenizer, CHAT[:end - 1])    # the turn stands where the model would have said it
        said = tokenizer(CHAT[end - 1]["content"] + "<|im_end|>")["input_ids"]
        assert ids[:len(prompt)] == prompt and labels == [-100] * len(prompt) + said + [-100]
    assert "..." in tokenizer.decode(examples[1][0]) and CHAT[1]["content"] not in tokenizer.decode(examples[1][0])
    ids, n = common.scored_ids(tokenizer, CHAT)
    assert ids[:-n] == common.prompt_ids(tokenizer, CHAT[:3]) and tokenizer.decode(ids[-n:]) == CHAT[3]["content"]


def test_an_empty_thought_is_no_part_of_the_answer():
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = (                                  # as Qwen3's: before the last answer alone
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}<think>\n\n"
        "</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>"
        "assistant\n{% endif %}")
    for text in ("Try sencha.", "think", "t", ">"):              # some of which stand in the thought's marks, too
        (ids, labels), = common.training_examples(tokenizer, [*CHAT[:3], {"role": "assistant", "content": text}])
        assert tokenizer.decode([label for label in labels if label != -100]) == (
            f"{CHAT[1]['content']}<|im_end|>{text}<|im_end|>")


def test_a_template_that_begins_an_answer_otherwise_than_it_shows_it_is_refused(capsys):
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    for function in (common.training_examples, common.scored_ids):
        with pytest.raises(SystemExit):
            function(tokenizer, CHAT)
        assert "another beginning" in capsys.readouterr().err


def test_a_template_that_shortens_an_answer_is_refused(capsys):
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", "{{ m['content'][:5] }}")
    with pytest.raises(SystemExit):
        common.training_examples(tokenizer, CHAT)
    assert "than it shows of the answer" in capsys.readouterr().err


# ------------------------------------------------------------ servers

def args_for_server(**more):
    return SimpleNamespace(**{"timeout": 5.0, "system": "role", "extra": {}, "concurrency": 8, **more})


def ask(server, requests, **more):
    model = common.ServerModel(f"openai:m@{server.url}", args_for_server(**more))
    return [reply for _, reply in sorted(model.generate(requests, 0.5, 0.9, 20))]


CHATS = [[{"role": "system", "content": "S"}, {"role": "user", "content": f"U{i}"}] for i in range(40)]


def test_every_request_goes_out_once_with_its_own_seed(server):
    server.reply = lambda request: (200, f" {request['messages'][1]['content']} ")
    replies = ask(server, [Request(chat, i) for i, chat in enumerate(CHATS)])
    assert [reply.text for reply in replies] == [f"U{i}" for i in range(40)]
    sent = sorted(server.requests, key=lambda request: request["seed"])
    assert [request["messages"] for request in sent] == CHATS
    assert sent[3] == {"model": "m", "messages": CHATS[3], "temperature": 0.5, "top_p": 0.9, "max_tokens": 20, "seed": 3}


def test_system_text_folded_and_arguments_changed(server):
    ask(server, [Request(CHATS[0], 1)], system="fold", extra={"max_tokens": None, "seed": None, "reasoning_effort": "low"})
    assert server.requests == [{"model": "m", "messages": [{"role": "user", "content": "S\n\nU0"}], "temperature": 0.5,
                                "top_p": 0.9, "reasoning_effort": "low"}]


def test_refusals_are_replies(server):
    def reply(request):
        which = request["seed"]
        if which == 0:
            return 400, {"error": {"message": "filtered", "code": "content_filter", "type": "x", "param": None}}
        message = {"role": "assistant", "content": None if which == 2 else "", "refusal": "I cannot" if which == 2 else None}
        return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [
            {"index": 0, "finish_reason": {1: "content_filter", 2: "stop", 3: "length"}[which], "message": message}]}
    server.reply = reply
    assert [(r.refused, r.cut) for r in ask(server, [Request(CHATS[0], i) for i in range(4)])] == [
        ("content_filter (prompt)", False), ("content_filter (answer)", False), ("I cannot", False),
        ("empty, cut before it began: raise the limit of tokens", False)]


def test_passing_errors_are_repeated_and_lasting_ones_end_the_program(server, capsys):
    failures = iter([500, 429, 503])
    server.reply = lambda request: (next(failures, 200), "fine")
    assert [reply.text for reply in ask(server, [Request(CHATS[0])])] == ["fine"]
    server.reply = lambda request: (404, {"error": {"message": "no such model"}})
    with pytest.raises(SystemExit) as end:
        ask(server, [Request(CHATS[0])])
    assert end.value.code == 2 and "answers 404" in capsys.readouterr().err


def test_a_model_is_named_by_one_string(server):
    model = common.ServerModel(f"openai:a/b@{server.url}", args_for_server())
    assert (model.name, model.url) == ("a/b", server.url)
    assert common.model_name("openai:mistralai/Mixtral@http://h:1/v1") == "mistralai/Mixtral"
    assert common.model_name("openai:gpt-5") == "gpt-5"
    assert common.model_name("mistralai/Mistral-7B-Instruct-v0.2") == "mistralai/Mistral-7B-Instruct-v0.2"


def test_no_key_for_the_public_server(monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SystemExit):
        common.ServerModel("openai:gpt-5", args_for_server())
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_a_process_that_believes_it_is_alone_is_detected(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        common.start_processes("openai:gpt-5")
    assert "WORLD_SIZE is 2" in capsys.readouterr().err
    assert OneProcess.num_processes == 1
