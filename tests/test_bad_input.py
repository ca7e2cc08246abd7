"""Mangled files: every reader takes a file or ends with one line and status 2; no traceback, whatever the bytes."""
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

import common
import evaluate
import generate_personas
import gold
import simulate
import train
from conftest import save_model, write_rows

set_hypothesis_home_dir(tempfile.mkdtemp())                       # leaves nothing in the checkout

TURNS = [{"role": "assistant", "content": "Which tea?"}, {"role": "user", "content": "Green."}]
READERS = {
    common.read_tasks: {"task_id": "A0", "split": "A", "task": "Tea?"},
    common.read_personas: {"persona_id": "A0", "split": "A", "name": "Ann", "persona": "I'm Ann."},
    common.read_gold: {"task_id": "A0", "persona_id": "A0", "split": "A", "gold": "Sencha."},
    common.read_conversations: {"task_id": "A0", "persona_id": "A0", "sample": 0, "split": "A", "conversation": TURNS},
    evaluate.read_responses: {"task_id": "A0", "persona_id": "A0", "sample": 0, "turns": 1, "response": "Sencha."},
    common.read_results: {"variant": "main", "iteration": 1, "metric": "win_rate", "condition": "", "roleplayer": "r",
                          "split": "test", "mean": 0.5, "sem": None, "n": 3},
}
ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                   max_leaves=4)


@st.composite
def mangled(draw):
    """(reader, bytes): a good file in which up to three things are wrong: fields, whole lines, bytes."""
    reader, rarely = draw(st.sampled_from(list(READERS))), st.sampled_from([False, False, False, True])
    rows = [json.loads(json.dumps(READERS[reader])) for _ in range(draw(st.integers(1, 3)))]
    for i, row in enumerate(rows):                               # ids differ, unless mangled
        row.update({name: f"A{i}" for name in ("task_id", "persona_id", "variant") if name in row})
    for _ in range(draw(st.integers(0, 2))):
        target = draw(st.sampled_from(rows))
        field = draw(st.sampled_from([*READERS[reader], "role", "refused"]))
        if isinstance(target.get("conversation"), list) and draw(st.booleans()):
            target = draw(st.sampled_from([target, *[turn for turn in target["conversation"] if isinstance(turn, dict)]]))
        if draw(st.booleans()):
            target.pop(field, None)
        else:
            target[field] = draw(ANY)
    lines = [json.dumps(row) for row in rows]
    if draw(rarely):
        lines.insert(draw(st.integers(0, len(lines))), draw(st.text(max_size=20) | ANY.map(json.dumps)))
    content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    if draw(rarely):
        at = draw(st.integers(0, len(content)))
        content[at:at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return reader, bytes(content)


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=mangled())
def test_readers_never_end_in_a_traceback(case, tmp_path_factory, capsys):
    reader, content = case
    path = tmp_path_factory.getbasetemp() / "mangled.jsonl"
    path.write_bytes(content)
    try:
        rows = list(reader(path))
        assert capsys.readouterr().err == "" and len(rows) <= content.count(b"\n") + 1
    except SystemExit as end:
        said = capsys.readouterr().err
        assert end.code == 2 and str(path) in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("reader", READERS)
def test_the_readers_take_what_is_right(reader, tmp_path):
    (tmp_path / "x").write_text(json.dumps(READERS[reader]) + "\n")
    assert len(list(reader(tmp_path / "x"))) == 1


# ------------------------------------------------------------ the stages, by their own command lines

LOADS = [("simulate", "--questioner"), ("select", "--base"), ("train", "--base"), ("evaluate", "--base")]
BAD_LINES = {                                                     # what -> (line 3 of a file, what is said of it)
    "not JSON": (lambda row, first: b"{", "not JSON"),
    "not UTF-8": (lambda row, first: b'{"task_id": "\xff"}', "not UTF-8"),
    "a list": (lambda row, first: b"[1]", "an object is expected"),
    "a missing field": (lambda row, first: {name: row[name] for name in list(row)[1:]}, "no field '[a-z]+_id'"),
    "a wrong type": (lambda row, first: {name: 3 for name in row}, "field '[a-z]+_id' is 3, not str"),
    "a duplicate id": (lambda row, first: first, "the same [a-z]+_id.* as on line 1")}
READ = {"personas": ["examples"], "gold": ["tasks", "personas"], "simulate": ["tasks", "personas"],
        "select": ["tasks", "personas", "gold", "talks"], "train": ["tasks", "personas", "chosen"],
        "evaluate": ["tasks", "personas", "gold", "talks"]}
STATUS = {401: "wrong key", 404: "no such model"}
WHAT_TO_DO = re.compile(r"[.:)}] (Correct|Give|Name|Remove|Run|Save|Shorten|Start|Use) |must be one |The README lists")
# What may be new beside settings: finished work that a later step of the same stage leaves as it is.
KEPT = {"select": ["out.scores.jsonl"],
        "evaluate": ["log_probs.jsonl", "responses.jsonl", "results.jsonl", "results.jsonl.lock"]}


class Bench:
    """A world with the inputs of every stage, and the flags that read them."""

    def __init__(self, world, model, stages, run, start):
        self.world, self.model, self.stages, self.run, self.start = world, model, stages, run, start
        self.output, self.folder = world.path("out.jsonl"), world.folder
        self.server, self.url = None, "http://127.0.0.1:9/v1"     # nobody is there: not even a connection is tried
        talks = world.conversations("A", n=1)
        write_rows(self.path("examples"), [{**row, "persona_id": f"s{i}"} for i, row in enumerate(world.personas)])
        write_rows(self.path("talks"), talks)
        write_rows(self.path("chosen"), [{**row, "gold_log_prob": -1.0, "response": "Try."} for row in talks])
        (self.folder / "ask.txt").write_text("Ask {name} about: {task}")

    def path(self, name):
        return self.world.path(f"{name}.jsonl")

    def serve(self):
        self.server = self.start("server")
        self.server.reply, self.url = lambda request: (200, f"I'm P{request['seed']}x. I run."), self.server.url

    def make(self, stage, *more, status=None):
        """Runs a stage."""
        return self.run(self.stages[stage], *self.flags(stage), *more, status=status)

    def flags(self, stage):
        files, url = self.world.flags("tasks", "personas"), f"openai:m@{self.url}"
        local = ["--base", self.model, *files, "--dtype", "float32"]
        return [*{
            "personas": ["--model", url, "--examples", self.path("examples"), "--splits", "A=2"],
            "gold": ["--oracle", url, *files, "--split", "A"],
            "simulate": ["--questioner", self.model, "--roleplayer", url, *files, "--dtype", "float32", "--samples", 2,
                         "--max-tokens", 4, "--elicitation-prompt", self.world.path("ask.txt")],
            "select": [*local, "--questioner", self.model, "--gold", self.path("gold"), "--conversations",
                       self.path("talks"), "--max-tokens", 4],
            "train": [*local, "--selected", self.path("chosen")],
            "evaluate": [*local, "--questioner", self.model, "--gold", self.path("gold"), "--conversations",
                         self.path("talks"), "--iteration", 0, "--split", "A", "--roleplayer", "r", "--max-tokens", 4,
                         "--results", self.path("results")]}[stage], "--output", self.output]

    def change(self, name, number, edit):
        """Line `number` of a file becomes edit(its row, the first row): bytes, or a row."""
        lines = Path(self.path(name)).read_bytes().splitlines()
        new = edit(json.loads(lines[number - 1]), json.loads(lines[0]))
        lines[number - 1] = new if type(new) is bytes else json.dumps(new).encode()
        Path(self.path(name)).write_bytes(b"\n".join(lines) + b"\n")

    def spoil(self, name, number=3, **fields):
        self.change(name, number, lambda row, _: {**row, **fields})

    def drop(self, name, number):
        lines = Path(self.path(name)).read_text().splitlines(True)
        Path(self.path(name)).write_text("".join(lines[:number - 1] + lines[number:]))

    def small(self, room):
        """A model with that many places."""
        return save_model(self.folder / "small", room=room)

    def broken(self, name, edit):
        """The model with one of its .json files edited."""
        folder = shutil.copytree(self.model, self.folder / "broken")
        (folder / "chat_template.jinja").unlink() if name == "chat_template" else (folder / name).write_text(
            json.dumps(edit(json.loads((folder / name).read_text()))))
        return str(folder)

    def files(self):
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def says(self, status):
        self.serve()
        self.server.reply = lambda request: (status, {"error": {"message": STATUS[status]}})
        return []


def no_eos(config):
    return {name: value for name, value in config.items() if name != "eos_token"}


def begun(stage, *then, **spoiled):
    """Runs a stage; then changes its settings file, or a line of a file that it has read."""
    def prepare(b):
        b.serve() if stage in ("personas", "gold", "simulate") else None
        b.make(stage)
        for path, content in then:
            target = Path(f"{b.output}{path}")
            target.unlink() if content is None else target.write_bytes(content)
        for name, fields in spoiled.items():
            b.spoil(name, 1, **fields)
        return []
    return prepare


def judged(then):
    """An evaluation of iteration 1, whose baseline is there."""
    def prepare(b):
        b.make("evaluate", "--output", b.world.path("e0"))
        more = then(b)
        return ["--iteration", 1, "--baseline", b.world.path("e0"), "--judge", f"openai:m@{b.url}", *more]
    return prepare


def folder_there(b):
    (b.folder / "out.jsonl").mkdir()
    (b.folder / "out.jsonl/kept").write_text("kept")


TALK = {"role": "assistant", "content": "Q?"}, {"role": "user", "content": "A."}
CASES = {                                                         # name -> stage, (bench -> more flags), what is said
    **{f"{what}: {stage}, {name}": (stage, lambda b, name=name, edit=edit: b.change(name, 3, edit),
                                    rf"{name}\.jsonl, line 3: .*{said}")
       for stage, names in READ.items() for name in names for what, (edit, said) in BAD_LINES.items()},
    **{f"{what}: {stage}": (stage, lambda b, name=name, talk=talk: b.spoil(name, conversation=talk),
                            rf"{name}\.jsonl, line 3: field 'conversation'")
       for stage, name in (("select", "talks"), ("train", "chosen"), ("evaluate", "talks"))
       for what, talk in (("from the user on", [TALK[1], *TALK]), ("up to the assistant", [*TALK, TALK[0]]))},
    **{f"a pair without a gold row: {stage}": (stage, lambda b: b.drop("gold", 4), r"gold\.jsonl: .*\('A1', 'Ap0'\)")
       for stage in ("select", "evaluate")},
    **{f"no such split: {stage}": (stage, lambda b: ["--split", "Z"], "--split Z")
       for stage in ("gold", "simulate", "evaluate")},
    **{f"no chat template: {stage}": (stage, lambda b, flag=flag: [flag, b.broken("chat_template", None)],
                                      "broken: .*no chat template")
       for stage, flag in LOADS},
    **{f"no eos: {stage}": (stage, lambda b, flag=flag: [flag, b.broken("tokenizer_config.json", no_eos)],
       "broken: .*no eos")
       for stage, flag in LOADS},
    "the Questioner's context": ("simulate", lambda b: b.serve() or ["--questioner", b.small(250), "--max-tokens", 60],
                                "small: .* room for 250"),
    "the Roleplayer's context": ("simulate", lambda b: ["--roleplayer", b.small(1900), "--max-tokens", 100],
                                 "small: .* room for 1900"),
    "a scored context: select": ("select", lambda b: ["--base", b.small(100)], "small: .* room for 100"),
    "a scored context: evaluate": ("evaluate", lambda b: ["--base", b.small(100)], "small: .* room for 100"),
    "a context and its response: select": ("select", lambda b: ["--questioner", b.small(600), "--max-tokens", 500],
                                           "small: .* room for 600"),
    "a context and its response: evaluate": ("evaluate", lambda b: ["--questioner", b.small(600), "--max-tokens", 500],
                                             "small: .* room for 600"),
    **{f"no server: {stage}": (stage, lambda b: [], "no server at http://127.0.0.1:9/v1")
       for stage in ("personas", "gold", "simulate")},
    **{f"{words}: {stage}": (stage, lambda b, status=status: b.says(status), f"answers {status}: .*{words}")
       for stage, status in (("personas", 401), ("gold", 404), ("simulate", 401)) for words in [STATUS[status]]},
    "no server: evaluate": ("evaluate", judged(lambda b: []), "no server at"),
    **{f"{words}: evaluate": ("evaluate", judged(lambda b, status=status: b.says(status)),
       f"answers {status}: .*{words}")
       for status, words in STATUS.items()},
    **{f"the output is a folder: {stage}": (stage, folder_there, r"out\.jsonl(: a folder| exists without)")
       for stage in READ if stage != "evaluate"},
    "the output is a file: evaluate": ("evaluate", lambda b: (b.folder / "out.jsonl").write_text("kept") and [],
        "out.jsonl.*: "),
    **{f"no settings: {stage}": (stage, begun(stage, (".settings.json", None)),
       "out.jsonl exists without out.jsonl.settings.json")
       for stage in ("gold", "select", "train")},
    "no settings: evaluate": ("evaluate", begun("evaluate", ("/log_probs.jsonl.settings.json", None)),
        "log_probs.jsonl exists without"),
    **{f"garbage for settings: {stage}": (stage, begun(stage, (".settings.json", content)),
       r"out\.jsonl.settings\.json: not as")
       for stage, content in (("personas", b"3"), ("simulate", b""), ("select", b"\xff\xfe"), ("train", b"null"))},
    "garbage for settings: evaluate": ("evaluate", begun("evaluate", ("/responses.jsonl.settings.json", b"{")),
                                       r"responses\.jsonl.settings\.json: not as"),
    **{f"unfinished {name}: {stage}": (stage, lambda b, name=name: Path(b.path(name) + ".part-0").write_text("") and [],
                                       rf"{name}\.jsonl: not finished")
       for stage, names in READ.items() for name in names},
    "no response: train": ("train", lambda b: b.spoil("chosen", response=None), r"chosen\.jsonl: .*\('A0', 'Ap2'\)"),
    "no field for a response: train": (
        "train", lambda b: b.change("chosen", 3, lambda row, _: {n: row[n] for n in row if n != "response"}),
        r"chosen\.jsonl, line 3: no field 'response'"),
    "another task now: gold": ("gold", begun("gold", tasks={"task": "New."}), r"out\.jsonl: .* made from other inputs"),
    "another task now: simulate": ("simulate", begun("simulate", tasks={"task": "New."}),
        r"out\.jsonl: .* made from other inputs"),
    "another gold now: select": ("select", begun("select", gold={"gold": "New."}),
        r"out\.scores\.jsonl: .* other inputs"),
    "another response now: train": ("train", begun("train", chosen={"response": "New."}),
        r"out\.jsonl was made with other settings"),
    "another gold now: evaluate": ("evaluate", begun("evaluate", gold={"gold": "New."}),
        r"log_probs\.jsonl: .* other inputs"),
    "other examples now: personas": ("personas", begun("personas", examples={"persona": "New."}),
        "out.jsonl was made with other settings"),
    **{f"garbage for the settings of conversations, {text}: evaluate": (
        "evaluate", lambda b, text=text: Path(b.path("talks") + ".settings.json").write_text(text) and [],
        r"talks\.jsonl\.settings\.json: ") for text in ("{", "[]", '{"K": "3"}')},
    "garbage for the settings of Q_BASE: evaluate": (
        "evaluate", judged(lambda b: (b.folder / "e0/log_probs.jsonl.settings.json").write_text("{") and []),
        r"e0/log_probs\.jsonl\.settings\.json: "),
    "the Questioner's context and the marks of its turns": (
        "simulate", lambda b: b.serve() or ["--questioner", b.small(357), "--max-tokens", 60],
        "small: .* room for 357"),
}
@pytest.fixture
def bench(world, tiny, run, select_stage, request):
    stages = {"personas": generate_personas, "gold": gold, "simulate": simulate, "select": select_stage, "train": train,
              "evaluate": evaluate}
    return Bench(world, tiny, stages, run, request.getfixturevalue)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_nothing_is_lost(name, bench):
    stage, prepare, said = CASES[name]
    more = prepare(bench) or []
    before, asked = bench.files(), bench.server and len(bench.server.requests)
    _, err = bench.make(stage, *more, status=2)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1 and re.search(": error: .*" + said, lines[0]), err
    assert "answers 4" in said or "conversations:" not in err, "a context is counted before the first conversation"
    assert WHAT_TO_DO.search(lines[0]), "it does not say what to do: " + lines[0]
    after, results = bench.files(), Path(bench.path("results"))
    old, new = before.pop(results, b""), after.get(results, b"")
    assert set(old.splitlines()) <= set(new.splitlines()), "a mean was lost"
    assert {path: after.get(path) for path in before} == before, "a file has changed or gone"
    new = {path.name for path in after.keys() - before.keys() if not path.name.endswith(".settings.json")}
    assert new <= set(KEPT.get(stage, [])), "something was written"
    assert "answers 4" in said or asked == (bench.server and len(bench.server.requests)), "something was asked for"


def test_an_output_in_folders_that_do_not_exist_yet(bench):
    bench.serve()
    for stage in READ:
        bench.output = bench.world.path(f"a/{stage}/b/out.jsonl")
        bench.make(stage)
        assert Path(bench.output).exists()
