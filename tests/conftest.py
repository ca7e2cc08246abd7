"""What the tests share: tiny random models with real chat templates, a stub server, and a way to run a stage."""
import gc
import importlib.util
import json
import subprocess
import sys
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

torch.set_num_threads(1)


@lru_cache
def load_stage(name):
    """A stage as a module. (`import select` would be the standard library's.)"""
    if name != "select":
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("select_stage", ROOT / "select.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in ("test_smoke", "test_serve"))  # the longest first, side by side


# The turn marks of three families of models, written from their published formats: (template, marks, bos, eos).
TEMPLATES = {
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
        "[/INST]{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}", [], "<s>", "</s>"),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
        "<|end_header_id|>\n\n{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>", "<|end_of_text|>"),
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", ["<|im_start|>", "<|im_end|>"],
        None, "<|im_end|>"),
}
END_OF_TURN = {"mistral": "</s>", "llama3": "<|eot_id|>", "qwen": "<|im_end|>"}


def make_tokenizer(family):
    """A byte-level tokenizer: one token a byte, and the special tokens; no pad token. family: a name, or its parts."""
    template, marks, bos, eos = TEMPLATES[family] if isinstance(family, str) else family
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = list(dict.fromkeys(filter(None, [bos, eos, *marks])))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in specials])
    if bos:                                                      # as real ones do: BOS could stand twice
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


def make_model(vocabulary, seed=0, room=4096):
    """A random Mistral of some 20,000 parameters."""
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=room, initializer_range=0.3, tie_word_embeddings=False,
        sliding_window=None)).eval()


def save_model(folder, **more):
    tokenizer = make_tokenizer("mistral")
    model = make_model(len(tokenizer), **more)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.top_k, model.generation_config.do_sample = 1, True     # these must not decide anything
    model.generation_config.repetition_penalty = 5.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The path of a random chat model with Mistral's format."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def select_stage():
    return load_stage("select")


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run_stage(script, *args, status=0, **more):
    """Runs a stage as a user does, and returns (stdout, stderr)."""
    command = [sys.executable, ROOT / script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **more)
    assert done.returncode == status, f"{script} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


@pytest.fixture
def run(monkeypatch, capfd):
    """Calls a stage with flags, as its command line would; returns what it printed (stdout, stderr)."""
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)      # so patient a client is not needed here
    monkeypatch.setattr("openai._base_client.BaseClient._parse_retry_after_header", lambda *_: None)

    def call(stage, *flags, status=None):
        monkeypatch.setattr(sys, "argv", [str(stage.__file__), *map(str, flags)])
        gc.freeze()
        try:
            common.run(stage.main)
            assert status is None, "the stage should have failed"
        except SystemExit as end:
            assert end.code == status, capfd.readouterr()
        gc.collect()                                             # it lets go of its outputs, as at a program's end
        return capfd.readouterr()
    return call


@pytest.fixture
def short(monkeypatch):
    """An elicitation prompt of a few tokens."""
    monkeypatch.setattr("simulate.read_prompts", lambda *names, **more: {
        **common.read_prompts(*names, **more), "elicitation": "Ask {name} about: {task}"})


def completion(content, reason="stop", usage=None, **message):
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage, "choices": [
        {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, **message}}]}


@pytest.fixture
def server():
    """An OpenAI-compatible server that keeps requests and keys; `server.reply(request) -> (status, answer or text)`."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version, log_message = "HTTP/1.1", lambda *_: None

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.requests.append(request)
            http.keys.add(self.headers["Authorization"].removeprefix("Bearer "))
            status, answer = http.reply(request)
            body = json.dumps(completion(answer) if isinstance(answer, str) else answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads, http.handle_error = True, lambda *_: None      # a client that hangs up is no news
    http.requests, http.keys, http.reply = [], set(), lambda request: (200, "Yes.")
    http.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield http
    http.shutdown()


class World:
    """A small data set in a folder: 4 tasks and 3 personas in each of two splits, a gold response for each pair, and
    conversations of both splits (talks.jsonl of A, also selected ones, and test.jsonl)."""

    def __init__(self, folder, tasks=4):
        self.folder = folder
        self.tasks = [{"task_id": f"{s}{i}", "split": s, "task": f"Help me with thing {i} of {s}."}
                      for s in ("A", "test") for i in range(tasks)]
        self.personas = [{"persona_id": f"{s}p{i}", "split": s, "name": name, "persona": f"I'm {name}. I like {like}."}
                         for s, names in (("A", ("Ann", "Bob", "Cid")), ("test", ("Dee", "Eve", "Fay")))
                         for i, (name, like) in enumerate(zip(names, ("tea", "soup", "pie")))]
        self.gold = [{"task_id": t["task_id"], "persona_id": p["persona_id"], "split": t["split"],
                      "gold": f"{p['name']}, try {p['persona'][-4:-1]} for {t['task_id']}."}
                     for t in self.tasks for p in self.personas if t["split"] == p["split"]]
        for name in ("tasks", "personas", "gold"):
            write_rows(self.path(f"{name}.jsonl"), getattr(self, name))
        write_rows(self.path("talks.jsonl"), self.conversations("A"))
        write_rows(self.path("test.jsonl"), self.conversations("test"))
        write_rows(self.path("chosen.jsonl"), [{**row, "gold_log_prob": -1.0, "response": "Say it."}
                                               for row in self.conversations("A", n=1)])

    def command(self, stage, model, url=None, output=None):
        """The flags of a stage that reads this data, and asks a model folder, and a server at url."""
        files, served, local = self.flags("tasks", "personas"), f"openai:m@{url}", ["--dtype", "float32"]
        both = ["--base", model, "--questioner", model, *local, *files, "--max-tokens", 4]
        return [*{
            "generate_personas": ["--model", served, "--splits", "A=2, test=2"],
            "gold": ["--oracle", served, *files, "--split", "A"],
            "simulate": [*both[2:], "--roleplayer", served, "--samples", 2],
            "select": [*both, *self.flags("gold"), "--conversations", self.path("talks.jsonl")],
            "train": ["--base", model, *local, *files, "--selected", self.path("chosen.jsonl"), "--batch-size", 4],
            "evaluate": [*both, *self.flags("gold"), "--conversations", self.path("test.jsonl"), "--iteration", 0,
                         "--roleplayer", "stub", "--results", self.path("results.jsonl")],
        }[stage], "--output", self.path(output or ("out" if stage in ("train", "evaluate") else "out.jsonl"))]

    def judged(self, model, url, output="e1", conversations="test.jsonl"):
        """The flags of an evaluation of Q_1, against that of Q_BASE in e0, which `command` is."""
        return [*self.command("evaluate", model, output=output), "--iteration", 1, "--baseline", self.path("e0"),
                "--conversations", self.path(conversations), "--judge", f"openai:j@{url}"]

    def path(self, name):
        return str(self.folder / name)

    def flags(self, *names):
        """["--tasks", its path, ...]"""
        return [part for name in names for part in (f"--{name}", self.path(f"{name}.jsonl"))]

    def conversations(self, split, n=2, word="red"):
        """Rows of conversations with 1, 2 or 3 questions, by pair."""
        pairs = [(g["task_id"], g["persona_id"]) for g in self.gold if g["split"] == split]
        return [{"task_id": task_id, "persona_id": persona_id, "sample": sample, "split": split, "conversation": [
            turn for k in range(1 + i % 3) for turn in (
                {"role": "assistant", "content": f"What about {word} {k}?"},
                {"role": "user", "content": f"Number {sample} of {persona_id}."})]}
                for i, (task_id, persona_id) in enumerate(pairs) for sample in range(n)]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)
