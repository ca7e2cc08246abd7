"""Bad input: one line that says where, what is wrong, and what to do, with status 2; and nothing is lost."""
import re
import shutil
from pathlib import Path

import pytest

import common
from conftest import load_stage, read_lines, save_model, write_rows

TURNS = [{"role": "assistant", "content": "Which tea?"}, {"role": "user", "content": "Green."}]


@pytest.mark.parametrize("line, why", [
    (b"{", "Expecting property name"), (b"[1]", "no attribute"), (b'{"task_id": "\xff"}', "utf-8"),
    (b'{"task_id": "x", "split": "A"}', "no field 'task'"), (b'{"split": "A", "refused": "r"}', "no field 'task_id'"),
    (b'{"task_id": 3, "split": "A", "task": "t"}', "task_id is 3, not str"), (b"[" * 99999, "recursion"),
    (b'{"task_id": "x", "split": "A", "task": NaN}', "not JSON compliant"),
    (b'{"task_id": "A0", "split": "A", "task": "t"}', "the same task_id as on line 1")])
def test_bad_lines_are_named(world, capsys, line, why):
    with open(world.path("tasks.jsonl"), "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(SystemExit):
        common.read_tasks(world.path("tasks.jsonl"))
    err = capsys.readouterr().err
    assert re.search(f"tasks.jsonl, line 9: .*({why}).* docs/data.md lists ", err) and len(err.splitlines()) == 1, err


# ------------------------------------------------------------ the stages, by their own command lines

STAGES = ("generate_personas", "gold", "simulate", "select", "train", "evaluate")
READ = {"generate_personas": ["examples"], "gold": ["tasks", "personas"], "simulate": ["tasks", "personas"],
        "select": ["tasks", "personas", "gold", "talks"], "train": ["tasks", "personas", "chosen"],
        "evaluate": ["tasks", "personas", "gold", "test"]}
WHAT_TO_DO = re.compile(r"[.)] (Correct|Give|Look|Name|Remove|Run|Simulate|Use|Start|Each line)|from \S+ to \S+$|"
                        "invalid|evaluate Q_BASE")
# What may be new beside settings: finished work that a later step of the same stage leaves as it is.
KEPT = {"select": ["out.scores.jsonl"], "evaluate": ["log_probs.jsonl", "responses.jsonl"]}


class Bench:
    """A world with the inputs of every stage, and the flags that read them."""

    def __init__(self, world, model, run, server):
        self.world, self.model, self.run, self.server, self.folder = world, model, run, server, world.folder
        write_rows(self.path("examples"), [{**row, "persona_id": f"s{i}"} for i, row in enumerate(world.personas)])
        server.reply = lambda request: (200, f"I'm P{request['seed']}x. I run.")

    def path(self, name):
        return self.world.path(f"{name}.jsonl")

    def make(self, stage, *more, status=None):
        """Runs a stage."""
        examples = ["--examples", self.path("examples")] if stage == "generate_personas" else []
        flags = self.world.command(stage, self.model, self.server.url)
        return self.run(load_stage(stage), *flags, *examples, *more, status=status)

    def spoil(self, name, line=3, drop=(), **fields):
        rows = read_lines(self.path(name))
        rows[line - 1] = {field: value for field, value in {**rows[line - 1], **fields}.items() if field not in drop}
        write_rows(self.path(name), rows)

    def drop(self, name, line):
        rows = read_lines(self.path(name))
        write_rows(self.path(name), rows[:line - 1] + rows[line:])

    def without(self, name):
        """The model without one of its files."""
        folder = shutil.copytree(self.model, self.folder / "broken")
        (folder / name).unlink()
        return str(folder)

    def files(self):
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def torn(self, stage):
        """Runs a stage, and tears the settings beside its output."""
        self.make(stage)
        path = self.folder / {"train": "out.settings.json", "evaluate": "out/log_probs.jsonl.settings.json"}.get(
            stage, "out.jsonl.settings.json")
        path.write_text("{")
        return []


TASKS, NOBODY = ("tasks", "gold", "talks", "chosen", "test"), "http://127.0.0.1:9/v1"
CASES = {                                                         # name -> stage, (bench -> more flags), what is said
    **{f"a bad line: {stage}, {name}": (
        stage, lambda b, name=name: b.spoil(name, drop=["task_id" if name in TASKS else "persona_id"]),
        rf"{name}\.jsonl, line 3: no field '\w+_id'") for stage in READ for name in READ[stage]},
    **{f"unfinished: {stage}": (
        stage, lambda b, name=names[-1]: write_rows(f"{b.path(name)}.part-{'0' * 32}", []) and [],
        rf"{names[-1]}\.jsonl: not finished") for stage, names in READ.items()},
    "no file: train": ("train", lambda b: ["--selected", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    **{f"a conversation that is none: {stage}": (
        stage, lambda b, name=name: b.spoil(name, conversation=TURNS[::-1]),
        rf"{name}\.jsonl, line 3: a conversation is a list of")
       for stage, name in (("select", "talks"), ("train", "chosen"), ("evaluate", "test"))},
    "a turn that is none: select": ("select", lambda b: b.spoil("talks", conversation=[3]), r"talks\.jsonl, line 3: "),
    "a pair without a gold row: select": (
        "select", lambda b: b.drop("gold", 4), r"gold\.jsonl: no gold response for \('A1', 'Ap0'\)"),
    **{f"other tasks: {stage}": (
        stage, lambda b: b.drop("tasks", 1) or b.drop("tasks", 4), r"is not among the given --tasks")
       for stage in ("select", "train", "evaluate")},
    "a judged pair for no length: evaluate": ("evaluate", lambda b: ["--win-pairs", 1], "--win-pairs: too few. Give 3"),
    "no such split: gold": ("gold", lambda b: ["--split", "Z"], "--split Z"),
    **{f"no chat template: {stage}": (
        stage, lambda b, flag=flag: [flag, b.without("chat_template.jinja")], "broken: .*no chat template")
       for stage, flag in (("simulate", "--questioner"), ("train", "--base"))},
    "no such model: simulate": ("simulate", lambda b: ["--questioner", "./nowhere"], "nowhere: cannot be loaded"),
    "a context that is scored: select": (
        "select", lambda b: ["--base", save_model(b.folder / "small", room=100)], "small: .* room for 100"),
    **{f"a served --base: {stage}": (
        stage, lambda b: ["--base", "openai:m"], "--base openai:m: gives no log-probabilities")
       for stage in ("select", "evaluate")},
    **{f"no server: {stage}": (
        stage, lambda b, flag=flag: [flag, f"openai:m@{NOBODY}", "--limit", 1], "Connection error")
       for stage, flag in (("gold", "--oracle"), ("simulate", "--roleplayer"))},
    "the output is a file: evaluate": ("evaluate", lambda b: write_rows(b.folder / "out", []) and [], r"out.*: "),
    **{f"torn settings: {stage}": (stage, lambda b, stage=stage: b.torn(stage), "not written by this stage")
       for stage in STAGES},
    "nothing to train on": ("train", lambda b: ["--max-length", 9], "no example to train on"),
    "nothing to select": ("select", lambda b: write_rows(b.path("talks"), []) and [], r"talks\.jsonl: "),
    **{f"{flag} {value}": ("gold", lambda b, flag=flag, value=value: [flag, value], f"argument {flag}")
       for flag, value in (("--limit", "0"), ("--temperature", "nan"), ("--extra", "{"), ("--max-tokens", "none"))},
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_nothing_is_lost(name, world, tiny, run, server, short, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    stage, prepare, said = CASES[name]
    bench = Bench(world, tiny, run, server)
    more = prepare(bench) or []
    before, asked = bench.files(), len(server.requests)
    _, err = bench.make(stage, *more, status=75 if "no server" in name else 2)     # the server may come back
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()
             and "%|" not in line and not line.startswith(("usage: ", "  "))]         # neither a bar nor usage
    assert len(lines) == 1 and re.search(r"^\w+\.py: error: .*" + said, lines[0]), err
    assert WHAT_TO_DO.search(lines[0]), "it does not say what to do: " + lines[0]
    after, results = bench.files(), Path(bench.path("results"))
    old, new = before.pop(results, b""), after.pop(results, b"")
    assert set(old.splitlines()) <= set(new.splitlines()), "a mean was lost"
    assert {path: after.get(path) for path in before} == before, "a file has changed or gone"
    new = {path.name for path in after.keys() - before.keys() if not path.name.endswith((".settings.json", ".lock"))}
    assert new <= set(KEPT.get(stage, [])), "something was written"
    assert len(server.requests) == asked, "something was asked for"
