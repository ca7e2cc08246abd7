"""Log-probabilities, generation, chats and servers, each against a second way to the same answer."""
import os
import threading
from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

import common
from common import LocalModel, Request
from conftest import make_tokenizer, save_bigram_model, save_model

CHAT = [{"role": "user", "content": "My name is Ann.\n\nWhat tea?"}, {"role": "assistant", "content": "Green or black?"},
        {"role": "user", "content": "Green.\n\nWhat tea?"}, {"role": "assistant", "content": "Try sencha, Ann."}]


def local(path, batch_size=16):
    return LocalModel(str(path), SimpleNamespace(dtype="float32", batch_size=batch_size), "cpu")


def sized(model, batch_size):
    """The same model, for other batches."""
    model = copy(model)
    model.batch_size = batch_size
    return model


def answers(model, requests, *sampling):
    """The replies to a list of requests."""
    replies = dict(model.generate(dict(enumerate(requests)), *sampling))
    return [replies[i] for i in range(len(requests))]


def scores(model, examples):
    """The log-probabilities of a list of (ids, n)."""
    scored = dict(model.score(dict(enumerate(examples))))
    return [scored[i] for i in range(len(examples))]


def chats(count):
    """Chats of different lengths."""
    return [[{"role": "user", "content": f"{i} " * (1 + 7 * i % 23)}] for i in range(count)]


def talks():
    """Requests for two or three samples of three pairs, in their first to third turn: 3 openings of very different
    lengths, 8 prompts of 30 to 350 bytes, with ends of very different lengths."""
    return [Request([{"role": "user", "content": f"Ask about {'tea and cake, ' * pair}please."}, *[
        {"role": role, "content": f"{sample} " * (1 + (3 * pair + 11 * sample) % 17)} for _ in range(sample % 3)
        for role in ("assistant", "user")]], 10 * pair + sample) for pair, samples in ((1, 3), (3, 2), (16, 3))
        for sample in range(samples)]


def alone(model, ids, n):
    """The log-probability of the last n ids: all logits of one text, no padding."""
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids)))


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
    assert scores(local(tmp_path, batch_size=2), [*others, (ids, n)])[9] == pytest.approx(by_hand, abs=1e-4 * n)
    assert -1000 < by_hand < -n


def test_score_does_not_depend_on_batch_order_or_padding(model):
    examples = [common.scored_ids(model.tokenizer, [*chat, {"role": "assistant", "content": "g" * (1 + 5 * i % 11)}])
                for i, chat in enumerate(chats(12))]
    expected = [alone(model.model, ids, n) for ids, n in examples]
    for batch_size in (1, 2, 100):
        assert scores(sized(model, batch_size), examples) == pytest.approx(expected, abs=1e-4)
    assert scores(sized(model, 2), examples[::-1]) == pytest.approx(expected[::-1], abs=1e-4)


def test_work_is_dealt_to_processes_and_what_is_done_is_skipped(model):
    """By the very same batches: to the last bit, whoever computes them."""
    examples = {f"key {i}": common.scored_ids(model.tokenizer, [*chat, {"role": "assistant", "content": "gold"}])
                for i, chat in enumerate(chats(12))}
    requests = {f"key {i}": Request(chat, i) for i, chat in enumerate(chats(12))}
    for work in (lambda *more: dict(sized(model, 1).score(examples, *more)),
                 lambda *more: dict(sized(model, 2).generate(requests, 0.9, 0.9, 4, *more))):
        everything = work()
        shares = [work((), slice(rank, None, 3)) for rank in range(3)]
        assert sorted(key for share in shares for key in share) == sorted(requests) and all(len(share) < 7 for share in shares)
        assert {key: result for share in shares for key, result in share.items()} == everything
        left = work(shares[0])
        assert left == {key: result for key, result in everything.items() if key not in shares[0]}


# ------------------------------------------------------------ generation

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=1024, initializer_range=0.3,
             tie_word_embeddings=False, pad_token_id=None, bos_token_id=None)
HEADS = dict(SIZES, num_key_value_heads=2, intermediate_size=48)
GPT = dict(n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=None, tie_word_embeddings=False)
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = dict(HEADS, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
              linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
ARCHITECTURES = {
    "mistral": dict(HEADS, sliding_window=24), "llama": HEADS, "gemma2": dict(HEADS, head_dim=8, **WINDOWS),
    "gemma3_text": dict(HEADS, head_dim=8, **WINDOWS), "qwen3": dict(HEADS, head_dim=8), "phi3": HEADS,
    "falcon": dict(SIZES, alibi=False), "falcon, alibi": dict(SIZES, alibi=True), "gpt_neox": dict(SIZES, intermediate_size=48),
    "bloom": dict(GPT, hidden_size=32), "gpt2": dict(GPT, n_positions=1024), "stablelm": HEADS, "cohere2": dict(HEADS, **WINDOWS),
    "opt": dict(SIZES, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1), "olmo2": HEADS, "granite": HEADS,
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=1024, expansion_ratio=2, tie_word_embeddings=False),
    "gpt_neo": dict(SIZES, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=24),
}
STATEFUL = {
    "mamba": dict(hidden_size=32, state_size=8, num_hidden_layers=2), "qwen3_5_text": LINEAR,
    "qwen3_next": dict(LINEAR, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                       shared_expert_intermediate_size=16),
    "lfm2": dict(HEADS, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "falcon_h1": dict(HEADS, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1),
    "recurrent_gemma": dict(HEADS, lru_width=32, attention_window_size=24, block_types=["recurrent", "attention"]),
    "rwkv": dict(hidden_size=32, num_hidden_layers=2, context_length=1024),
}


def say_few_letters(model, tokenizer):
    """So that the end comes often."""
    few, head = [*range(65, 91), tokenizer.eos_token_id], model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        with torch.no_grad():
            head[[i for i in range(len(tokenizer)) if i not in few]] = 0
            head[tokenizer.eos_token_id] *= 1.3


def save_architecture(folder, name, sizes):
    """A random model of another architecture."""
    tokenizer = make_tokenizer("qwen")
    torch.manual_seed(3 if name in ("mpt", "stablelm") else 2)        # with which they say different things
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        name.partition(",")[0], vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes))
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if weight.ndim > 1 and weight.std() < 0.1:           # not all read initializer_range
                weight.normal_(0, 0.3)
    say_few_letters(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_batches_and_scores_are_those_of_one_text_at_a_time(name, tmp_path):
    """Windows, ALiBi, learned positions and local attention may see no padding, between opening and rest or before."""
    save_architecture(tmp_path, name, ARCHITECTURES[name])
    ours, requests, expected = local(tmp_path), talks(), []
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = [common.prompt_ids(ours.tokenizer, request.chat) for request in requests]
    assert min(map(len, prompts)) < 70 and max(map(len, prompts)) > 300
    for prompt in prompts:
        out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                              do_sample=False, max_new_tokens=20, eos_token_id=ours.tokenizer.eos_token_id, pad_token_id=0)
        tokens, cut = out[0, len(prompt):].tolist(), out[0, -1] != ours.tokenizer.eos_token_id
        expected.append(common.Reply(ours.tokenizer.decode(tokens, skip_special_tokens=True).strip(), cut=bool(cut)))
    assert len(set(expected)) > 4, "the model should say something else to each prompt"
    assert answers(ours, requests, 0.0, 1.0, 20) == expected
    with torch.no_grad():
        assert scores(sized(ours, 99), [(prompt, 9) for prompt in prompts]) == pytest.approx(
            [alone(theirs, prompt, 9) for prompt in prompts], abs=1e-3)


@pytest.mark.parametrize("name", STATEFUL)
def test_models_that_keep_a_state_are_refused_in_one_line_and_scored(name, tmp_path, capsys):
    save_architecture(tmp_path, name, STATEFUL[name])
    ours, requests = local(tmp_path), talks()
    prompts = [common.prompt_ids(ours.tokenizer, request.chat) for request in requests]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        answers(ours, requests, 0.0, 1.0, 4)
    err = capsys.readouterr().err
    assert end.value.code == 2 and f"error: {tmp_path}: padding would change the state of its layers" in err
    assert err.count("\n") == 1
    if name not in ("recurrent_gemma", "rwkv"):                   # their padding enters the state: NOTES.md
        assert scores(sized(ours, 99), [(prompt, 9) for prompt in prompts]) == pytest.approx(
        [alone(ours.model, prompt, 9) for prompt in prompts], abs=1e-3)


def test_samples_drawn_by_hand_one_row_at_a_time_and_what_is_computed(tiny):
    """Openings once, the rest of each row, then a column a step for the rows that go on. By hand: a whole forward pass
    for each token, numpy's softmax, the seed's numbers one after the other, and none of what the checkpoint's own
    generation_config says: top_k = 1 and a repetition penalty."""
    model, requests, T = local(tiny), talks(), 40
    assert model.model.generation_config.top_k == 1 and model.model.generation_config.repetition_penalty == 5.0
    say_few_letters(model.model, model.tokenizer)
    prompts, seen, texts, lengths = [common.prompt_ids(model.tokenizer, r.chat) for r in requests], [], [], []
    hook = model.model.register_forward_pre_hook(lambda module, ids, more: seen.append(
        (ids or [more["input_ids"]])[0].shape), with_kwargs=True)
    replies = answers(model, requests, 0.9, 0.9, T)
    hook.remove()
    for request, prompt in zip(requests, prompts):
        ids = list(prompt)
        for draw in np.random.default_rng(request.seed).random(T):
            with torch.no_grad():
                p = np.exp(model.model(torch.tensor([ids])).logits[0, -1].double().numpy() / 0.9)
            order = np.argsort(-p, kind="stable")
            nucleus = order[:1 + (np.cumsum(p[order]) / p.sum() < 0.9).sum()]
            ids.append(int(nucleus[(np.cumsum(p[nucleus]) / p[nucleus].sum() <= draw).sum()]))
            if ids[-1] == model.tokenizer.eos_token_id:
                break
        texts.append(common.Reply(model.tokenizer.decode(ids[len(prompt):], skip_special_tokens=True).strip(),
                                  cut=ids[-1] != model.tokenizer.eos_token_id))
        lengths.append(len(ids) - len(prompt))
    assert replies == texts and len(set(lengths)) > 4, lengths
    heads = [len(os.path.commonprefix([p[:-1] for p in prompts[a:b]])) for a, b in ((0, 3), (3, 5), (5, 8)) for _ in range(a, b)]
    assert seen[:2] == [(3, max(heads)), (8, max(len(p) - head for p, head in zip(prompts, heads)))]
    assert seen[2:] == [(sum(length > t for length in lengths), 1) for t in range(1, max(lengths))]


def test_a_sample_depends_on_its_own_seed_alone(model):
    """Not on the batch, its neighbours, the order, or on whether its prompt was prefilled for several samples."""
    requests = [Request(chat, 100 * i + s) for i, chat in enumerate(chats(4)) for s in range(5)]
    together = answers(model, requests, 0.9, 0.9, 10)
    assert len({reply.text for reply in together[:5]}) > 1, "five samples of a prompt should differ"
    assert answers(sized(model, 3), requests[::-1], 0.9, 0.9, 10) == together[::-1]
    assert answers(model, [Request(requests[0].chat, 7)], 0.9, 0.9, 10) != together[:1]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.9, 0.9), (1.4, 0.5), (0.3, 0.01)])
def test_nucleus_sampling_has_the_distribution_of_transformers_warpers(temperature, top_p):
    scores = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 30)) * 2).float()
    warped = TemperatureLogitsWarper(temperature)(None, scores)
    expected = (TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped).softmax(-1).numpy()
    grid = torch.arange(4000, dtype=torch.float64).add(0.5).div(4000).repeat(2)         # all draws from 0 to 1, one a row
    tokens = common.next_tokens(scores.repeat_interleave(4000, 0), grid, temperature, top_p).view(2, 4000)
    frequency = np.stack([row.bincount(minlength=30).numpy() / 4000 for row in tokens])
    assert np.abs(frequency - expected).max() < 1 / 2000 and (expected[0] != expected[1]).any()
    edges = torch.tensor([0.0, 1 - 2 ** -53], dtype=torch.float64)                      # the least and the largest draw
    assert (expected[[0, 1], common.next_tokens(scores, edges, temperature, top_p)] > 0).all()
    assert (common.next_tokens(scores, edges, 0, top_p) == scores.argmax(-1)).all()


def test_answers_end_at_the_end_of_turn_and_cuts_are_reported(tmp_path):
    """A bigram model that says "A" and then its end-of-turn token, which is not the tokenizer's eos."""
    tokenizer = make_tokenizer("llama3")
    a, end = tokenizer.encode("A", add_special_tokens=False)[0], tokenizer.convert_tokens_to_ids("<|eot_id|>")
    table = np.zeros((-4 * (-len(tokenizer) // 4),) * 2)
    table[a], table[end, a] = 1.0, 2.0                           # logits [next, current]
    save_bigram_model(tmp_path, tokenizer, table)
    for tokens, cut in ((5, False), (1, True)):
        assert answers(local(tmp_path), [Request(chats(1)[0])], 0.0, 1.0, tokens) == [common.Reply("A", None, cut)]


def test_a_prompt_that_does_not_fit_is_a_refusal_and_a_text_to_score_an_error(tmp_path, capsys):
    small = local(save_model(tmp_path / "small", room=64))
    replies = answers(small, [Request(chat) for chat in chats(20)], 0.0, 1.0, 24)
    lengths = [len(common.prompt_ids(small.tokenizer, chat)) for chat in chats(20)]
    assert [reply.refused for reply in replies] == [
        f"too long: {n} + 24 tokens, room for 64" if n > 40 else None for n in lengths] and 0 < sum(n > 40 for n in lengths) < 20
    with pytest.raises(SystemExit) as end:
        scores(small, [([1] * 64, 3), ([1] * 65, 3)])
    assert end.value.code == 2 and "65 tokens are to be scored, but the model has room for 64" in capsys.readouterr().err


# ------------------------------------------------------------ chats (test_templates.py has the families)

def test_broken_models_are_refused(tmp_path, capsys):
    folder = save_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    del state["model.layers.0.mlp.up_proj.weight"]
    model.save_pretrained(folder, state_dict=state)
    for damage, message in ((lambda: None, "weights are missing, such as model.layers.0.mlp.up_proj.weight"),
                            (lambda: open(f"{folder}/model.safetensors", "r+b").truncate(1000), "cannot be loaded")):
        damage()
        with pytest.raises(SystemExit):
            local(folder)
        assert message in capsys.readouterr().err


def test_bos_stands_once(capsys):
    tokenizer = make_tokenizer("llama3")
    assert common.prompt_ids(tokenizer, CHAT[:1]).count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(SystemExit):
        common.prompt_ids(tokenizer, CHAT[:1])
    assert "BOS stands twice" in capsys.readouterr().err


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


def test_any_character_may_stand_in_a_text():
    tokenizer, odd = make_tokenizer("llama3"), "".join(map(chr, (0x10FFFD, 0xFFFFD, 0xF0000, 0xE000, 0xFFFD, 1)))
    chat = [{"role": role, "content": f"a {odd} b"} for role in ("user", "assistant")]
    (ids, labels), = common.training_examples(tokenizer, chat)
    assert tokenizer.decode(ids).count(odd) == 2 and tokenizer.decode([t for t in labels if t != -100]) == f"a {odd} b<|eot_id|>"


@pytest.mark.parametrize("old, new", [("assistant\n{% endif", "assistant\n<think>{% endif"),        # begins otherwise
                                      ("{{ m['content'] }}", "{{ m['content'][:5] }}")])            # shortens an answer
def test_a_template_that_shows_another_answer_than_it_invites_is_refused(old, new, capsys):
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    for function in (common.training_examples, common.scored_ids):
        with pytest.raises(SystemExit):
            function(tokenizer, CHAT)
        assert "invites the assistant to another beginning than it shows of the answer" in capsys.readouterr().err


# ------------------------------------------------------------ servers

def args_for_server(**more):
    return SimpleNamespace(**{"timeout": 5.0, "system": "role", "extra": {}, "concurrency": 8, **more})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


def ask(server, requests, **more):
    return answers(common.ServerModel(f"openai:m@{server.url}", args_for_server(**more)), requests, 0.5, 0.9, 20)


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
        ("empty (finish_reason length)", False)]


def test_passing_errors_are_repeated_and_lasting_ones_raise_after_all_that_was_paid_for(server):
    """Also where more requests wait than are under way."""
    failures = iter([500, 429, 503])
    server.reply = lambda request: (next(failures, 200), "fine")
    assert [reply.text for reply in ask(server, [Request(CHATS[0])])] == ["fine"]
    server.reply = lambda request: (404, {"error": {"message": "no such model"}}) if request["seed"] == 3 else (200, "fine")
    model, arrived, raised = common.ServerModel(f"openai:m@{server.url}", args_for_server(concurrency=4)), [], []
    server.requests.clear()

    def collect():
        try:
            for key, _ in model.generate({i: Request(chat, i) for i, chat in enumerate(CHATS)}, 0.5, 0.9, 20):
                arrived.append(key)
        except OSError as error:
            raised.append(str(error))
    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert not thread.is_alive(), "it waits for ever"
    assert raised[0].startswith("openai:m@http") and "no such model" in raised[0]
    asked = [request["seed"] for request in server.requests]
    assert sorted(arrived) == sorted(set(asked) - {3}) and len(asked) < 40, "nothing that was asked for is lost"
