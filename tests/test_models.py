"""Log-probabilities, generation, chats and servers, each against a second way to the same answer."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

import common
from common import LocalModel, Request
from conftest import make_tokenizer, save_model
from train import training_examples

CHAT = [{"role": "user", "content": "I'm Ann.\n\nWhat tea?"}, {"role": "assistant", "content": "Green or black?"},
        {"role": "user", "content": "Green.\n\nWhat tea?"}, {"role": "assistant", "content": "Try sencha, Ann."}]


def local(path, batch_size=16):
    return LocalModel(str(path), SimpleNamespace(dtype="float32", batch_size=batch_size), "cpu")


def answers(model, requests, *sampling):
    """The replies to a list of requests."""
    replies = dict(model.generate(dict(enumerate(requests)), *sampling))
    return [replies[i] for i in range(len(requests))]


def scores(model, examples):
    """The log-probabilities of a list of (ids, n)."""
    scored = dict(model.score(dict(enumerate(examples))))
    return [scored[i] for i in range(len(examples))]


def talks():
    """Requests for two or three samples of three pairs, in their first to third turn: 3 openings of very different
    lengths, 8 prompts of 30 to 350 bytes, with ends of very different lengths."""
    return [Request([{"role": "user", "content": f"Ask about {'tea and cake, ' * pair}please."}, *[
        {"role": role, "content": f"{sample} " * (1 + (3 * pair + 11 * sample) % 17)} for _ in range(sample % 3)
        for role in ("assistant", "user")]], 10 * pair + sample, pair) for pair, samples in ((1, 3), (3, 2), (16, 3))
        for sample in range(samples)]


def alone(model, ids, n):
    """The log-probability of the last n ids: all logits of one text, no padding."""
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids)))


# ------------------------------------------------------------ generation

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=1024,
             initializer_range=0.3, tie_word_embeddings=False, pad_token_id=None, bos_token_id=None)
HEADS = dict(SIZES, num_key_value_heads=2, intermediate_size=48)
ARCHITECTURES = {
    "llama": HEADS, "qwen3": dict(HEADS, head_dim=8), "mistral": dict(HEADS, sliding_window=24),
    "gemma3_text": dict(HEADS, head_dim=8, sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
    "falcon": dict(SIZES, alibi=True), "opt": dict(SIZES, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1),
    "gpt_neo": dict(SIZES, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=24),
}
STATEFUL = dict(HEADS, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
                linear_num_value_heads=4, linear_num_key_heads=2, linear_value_head_dim=8)


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
    torch.manual_seed(2)                                         # with which they say different things
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        name, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes))
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
        eos, ids = ours.tokenizer.eos_token_id, torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20,
                              eos_token_id=eos, pad_token_id=0)[0, len(prompt):].tolist()
        text = ours.tokenizer.decode(out, skip_special_tokens=True).strip()
        expected.append(common.Reply(text, cut=out[-1] != eos))
    assert len(set(expected)) > 4, "the model should say something else to each prompt"
    assert answers(ours, requests, 0.0, 1.0, 20) == expected
    with torch.no_grad():
        assert scores(ours, [(prompt, 9) for prompt in prompts]) == pytest.approx(
            [alone(theirs, prompt, 9) for prompt in prompts], abs=1e-3)


def test_models_that_keep_a_state_are_refused_in_one_line_and_scored(tmp_path, capsys):
    save_architecture(tmp_path, "qwen3_5_text", STATEFUL)
    ours, requests = local(tmp_path), talks()
    prompts = [common.prompt_ids(ours.tokenizer, request.chat) for request in requests]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        answers(ours, requests, 0.0, 1.0, 4)
    err = capsys.readouterr().err
    assert end.value.code == 2 and f"error: {tmp_path}: padding would change the state of its layers" in err
    assert err.count("\n") == 1
    assert scores(ours, [(prompt, 9) for prompt in prompts]) == pytest.approx(
        [alone(ours.model, prompt, 9) for prompt in prompts], abs=1e-3)


def shapes_computed(model, requests, *sampling):
    """The replies, and the shapes of the ids that the model was given."""
    seen = answers(model, requests[:1], *sampling) and []
    hook = model.model.register_forward_pre_hook(lambda module, ids, more: seen.append(tuple(
        (ids or [more["input_ids"]])[0].shape)), with_kwargs=True)
    replies = answers(model, requests, *sampling)
    hook.remove()
    return replies, seen


def test_samples_drawn_by_hand_one_row_at_a_time_and_what_is_computed(tiny):
    """A column a step for the rows that go on. By hand: a whole forward pass for each token, numpy's softmax, the
    seed's numbers in turn, and nothing of the checkpoint's own generation_config: a top_k and a penalty."""
    model, requests, T = local(tiny), talks(), 40
    assert model.model.generation_config.top_k == 1 and model.model.generation_config.repetition_penalty == 5.0
    say_few_letters(model.model, model.tokenizer)
    prompts, texts, lengths = [common.prompt_ids(model.tokenizer, r.chat) for r in requests], [], []
    replies, seen = shapes_computed(model, requests, 0.9, 0.9, T)
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
        text = model.tokenizer.decode(ids[len(prompt):], skip_special_tokens=True).strip()
        texts.append(common.Reply(text, cut=ids[-1] != model.tokenizer.eos_token_id))
        lengths.append(len(ids) - len(prompt))
    assert replies == texts and len(set(lengths)) > 4, lengths
    assert seen[0][0] == 3 and seen[0][1] > 200, "what a pair's samples begin with is computed once"
    assert seen[2:] == [(sum(length > t for length in lengths), 1) for t in range(1, max(lengths))]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.9, 0.9), (1.4, 0.5), (0.3, 0.01)])
def test_nucleus_sampling_has_the_distribution_of_transformers_warpers(temperature, top_p):
    scores = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 30)) * 2).float()
    warped = TemperatureLogitsWarper(temperature)(None, scores)
    expected = (TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped).softmax(-1).numpy()
    grid = torch.arange(4000, dtype=torch.float64).add(0.5).div(4000).repeat(2)         # all draws from 0 to 1
    tokens = common.next_tokens(scores.repeat_interleave(4000, 0), grid, temperature, top_p).view(2, 4000)
    frequency = np.stack([row.bincount(minlength=30).numpy() / 4000 for row in tokens])
    assert np.abs(frequency - expected).max() < 1 / 2000 and (expected[0] != expected[1]).any()


# ------------------------------------------------------------ folders, chats (test_templates.py has the families)

def test_a_folder_without_some_weights_is_refused(tmp_path, capsys):
    folder = save_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    del state["model.layers.0.mlp.up_proj.weight"]
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(SystemExit):
        local(folder)
    assert "weights are missing, such as model.layers.0.mlp.up_proj.weight" in capsys.readouterr().err


@pytest.mark.parametrize("old, new", [("assistant\n{% endif", "assistant\n<think>{% endif"),    # begins otherwise
                                      ("{{ m['content'] }}", "{{ m['content'][:5] }}")])        # shortens an answer
def test_a_template_that_shows_another_answer_than_it_invites_is_refused(old, new, capsys):
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    for function in (training_examples, common.scored_ids):
        with pytest.raises(SystemExit):
            function(tokenizer, CHAT)
        assert "invites the assistant to another beginning than it shows of the answer" in capsys.readouterr().err


# ------------------------------------------------------------ servers

def ask(server, chats, **more):
    args = SimpleNamespace(**{"timeout": 5.0, "system": "role", "extra": {}, "concurrency": 8, **more})
    requests = [Request(chat, i) for i, chat in enumerate(chats)]
    return answers(common.ServerModel(f"openai:m@{server.url}", args), requests, 0.5, 0.9, 20)


def test_every_request_goes_out_once_with_its_own_seed(server):
    chats = [[{"role": "system", "content": "S"}, {"role": "user", "content": f"U{i}"}] for i in range(40)]
    server.reply = lambda request: (200, f" {request['messages'][-1]['content']} ")
    assert [reply.text for reply in ask(server, chats)] == [f"U{i}" for i in range(40)]
    sent = sorted(server.requests, key=lambda request: request["seed"])
    assert sent == [{"model": "m", "messages": chat, "temperature": 0.5, "top_p": 0.9, "max_tokens": 20, "seed": i}
                    for i, chat in enumerate(chats)]
    server.requests.clear()
    ask(server, chats[:1], system="fold", extra={"max_tokens": None, "seed": None, "reasoning_effort": "low"})
    assert server.requests == [{"model": "m", "messages": [{"role": "user", "content": "S\n\nU0"}], "temperature": 0.5,
                                "top_p": 0.9, "reasoning_effort": "low"}]
