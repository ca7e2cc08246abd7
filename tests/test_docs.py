"""What README, docs/, docstrings and run.sh name must exist; their code must be code; defaults must be the paper's."""
import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from conftest import ROOT

STAGES = ["generate_personas", "gold", "simulate", "select", "train", "evaluate"]
SCRIPTS = [f"{stage}.py" for stage in STAGES] + ["report.py", "shorten.py"] + [
    f"toy/{name}.py" for name in ("world", "server", "pretrain", "measure", "permute", "check")]
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
SOURCES = "".join((ROOT / file).read_text() for file in (*SCRIPTS, "common.py", "users.py"))
TEXTS = [*PAGES, "NOTES.md", "run.sh", *SCRIPTS]
FOREIGN = set("--n --nnodes --index-url --nproc_per_node --config_file --tensor-parallel-size --generation-config "
              "--gpu-memory-utilization --device --help --always --dirty --num_processes --rdzv_backend --rdzv_endpoint "
              "--nodes --ntasks-per-node --gpus-per-node --time".split())               # of other programs
Q, PAPER = "mistralai/Mistral-7B-Instruct-v0.2", {              # the published settings
    "generate_personas.py": "splits A=50,B=50,test=10 temperature 1.4 top-p 0.9 max-tokens 400",
    "gold.py": "temperature 0.0 top-p 0.9 max-tokens 300",
    "simulate.py": "questioner Q roleplayer mistralai/Mixtral-8x7B-Instruct-v0.1 samples 10 max-turns 3 top-p 0.9 "
                   "temperature 0.9 max-tokens 700 roleplayer-temperature 0.0",
    "select.py": "base Q k 1 pick best max-tokens 700",
    "train.py": "base Q target response lr 2e-05 warmup 0.1 epochs 1 batch-size 64 max-length 2048 validation 0.05 "
                "clip 1.0 seed 42 dtype bfloat16",
    "evaluate.py": "base Q win-pairs 300 max-tokens 700 temperature 0.0 top-p 0.9 judge-max-tokens 300"}


@lru_cache
def manual(script):
    return subprocess.check_output([sys.executable, script, "--help"], cwd=ROOT, text=True, env={"COLUMNS": "100"})


def flags(*scripts):
    return {flag for script in scripts for flag in re.findall(r"^  (?:-h, )?(--[a-z][a-z-]*)", manual(script), re.M)}


def blocks(name, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)


@pytest.mark.parametrize("name", TEXTS)
def test_flags_that_are_named_exist(name):
    text = (ROOT / name).read_text()
    more = [ROOT / "plan.py", *(ROOT / "benchmarks").glob("*.py")]
    code = "".join([text, *(file.read_text() for file in more)])                                 # (a diff adds flags)
    known = flags(*SCRIPTS).union(re.findall(r'add_argument\("(--[a-z-]+)"', code))
    used = re.compile(r"(?<![\w-])--[a-z][a-z_-]*").findall
    assert set(used(text)) <= known | FOREIGN, f"{name} names {set(used(text)) - known - FOREIGN}"
    doc = text if name.endswith((".md", ".sh")) else text.split('"""')[1]
    started = r"(?:python|\$LAUNCH\w*|launch(?: --config_file \S+)?|--nproc_per_node \d+) ((?:toy/)?\w+\.py)([^`|;&)]*)"
    for script, rest in re.findall(started, doc.replace("\\\n", " ")):
        wrong = set(used(rest.split("\n")[0])) - FOREIGN - flags(*{script} & set(SCRIPTS))
        assert not wrong or script not in SCRIPTS, f"{name}: {script} has no {wrong}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_its_default_the_papers(script):
    source, shown = "".join((ROOT / file).read_text() for file in (script, "common.py", "users.py")), " ".join(manual(script).split())
    words = PAPER.get(script, "").replace(" Q", f" {Q}").split()
    for flag in flags(script) - {"--help"}:
        assert re.search(rf"args\.{flag[2:].replace('-', '_')}\b(?! *=[^=])", source), f"{script}: {flag} is never read"
    for flag, value in zip(words[::2], words[1::2]):
        assert re.search(rf"--{flag} (?:\w+ \[\w+ \.\.\.\] )?[^\]]*?\(default: (?:\[')?{re.escape(value)}(?:'\])?\)", shown.split("options:")[1]), (flag, value)


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_links_lead_somewhere(name):
    ours = r"(?<![\w./-])((?:tests|data|toy|configs|benchmarks|docs|\.ci)/[\w./-]*\w|(?:" + "|".join(
        [*STAGES, "common", "run"]) + r")\.(?:py|sh)|requirements(?:-dev)?\.txt|NOTES\.md)\b"
    text = (ROOT / name).read_text()
    for path in re.findall(ours, text):
        assert (ROOT / path).exists(), f"{name} names {path}"
    for target, anchor in re.findall(r"\]\((?!http)([^)# ]*)(?:#([^) ]*))?\)", text) if name in PAGES else ():
        page = (ROOT / name).parent / target if target else ROOT / name
        assert page.exists(), f"{name} links to {target}"
        heads = [re.sub(r"[^\w -]", "", head.lower()) for head in re.findall(r"^#+ (.*)", page.read_text(), re.M)]
        assert not anchor or anchor in [head.replace(" ", "-") for head in heads], f"{name}: no {target}#{anchor}"


@pytest.mark.parametrize("name", PAGES)
def test_code_on_a_page_is_code(name, tmp_path):
    for line in (ROOT / name).read_text().splitlines():         # (121: a diff; a row of a table cannot be broken)
        assert len(line) <= 121 or line.startswith(("|", "<", "{", "assistant: ")), line
    for script in blocks(name, "bash"):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0, script
    for node in (node for code in blocks(name, "python") for node in ast.parse(code).body):
        assert not isinstance(node, ast.FunctionDef) or f"def {node.name}(" in SOURCES, f"{name} changes {node.name}"
    for diff in blocks(name, "diff"):                           # each applies to the code as it is
        for stage in STAGES:
            shutil.copy(ROOT / f"{stage}.py", tmp_path)
        subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
        assert all(ast.parse((tmp_path / f"{stage}.py").read_text()) for stage in STAGES)


def test_rows_and_functions_that_the_pages_show_exist(select_stage):
    assert len([json.loads(row) for row in "".join(blocks("docs/data.md")).replace("\n ", " ").splitlines()[:11]]) == 11
    table = (ROOT / "README.md").read_text().split("## The algorithm")[1].split("##")[0]
    rows = re.findall(r"\| `(\w+)\.py` \| (.*?) \|\n", table)
    assert {stage for stage, _ in rows} == set(STAGES)
    for stage, functions in rows:
        module = select_stage if stage == "select" else importlib.import_module(stage)
        assert all(callable(getattr(module, name)) for name in re.findall(r"`(\w+)`", functions)), stage
    for name in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", (ROOT / "docs/walkthrough.md").read_text()):
        assert name in SOURCES, name


def test_the_launchers_leave_the_stages_flags_alone():
    """argparse takes a beginning of an option for the option: `torchrun simulate.py --n 10` would end in an error."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser
    for launcher in (get_args_parser(), launch_command_parser()):
        for flag in flags(*SCRIPTS):
            begun = [option for option in launcher._option_string_actions if option.startswith(flag) and option != flag]
            assert not begun or not launcher.allow_abbrev, f"{flag} is the beginning of {begun}"


def test_nothing_else_at_the_top_level_and_no_toy_in_the_core():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tops = {line.split("/")[0] for line in tracked.stdout.splitlines()} if not tracked.returncode else {  # an archive
        path.name for path in ROOT.iterdir()} - {"runs", "__pycache__", ".pytest_cache"}
    assert tops <= {*SCRIPTS, *("common.py users.py human.py run.sh stage.sh pytest.ini requirements.txt requirements-dev.txt README.md NOTES.md LICENSE "
                                ".gitignore tests data aloe toy configs benchmarks docs prompts requirements-report.txt results.py pictures.py rounding.py plan.py .ci").split()}
    for script in (*STAGES, "common"):
        code = re.sub(r'""".*?"""', "", (ROOT / f"{script}.py").read_text(), flags=re.S)
        assert not re.search(r"\b(import|from) (toy|world)\b", code) and "toy" not in code, script


def test_the_docstrings_laptop_commands_run_one_after_the_other(tmp_path):
    """The server, then the six commands exactly as the six docstrings print them, in a copy of the project."""
    shutil.copytree(ROOT, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", ".git"))
    server = subprocess.Popen([sys.executable, "toy/server.py", "--port", "0"], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        url = server.stdout.readline().decode().split()[-1]
        env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for stage in STAGES:
            laptop = (ROOT / f"{stage}.py").read_text().split("On a laptop")[1].split("The paper's scale")[0]
            script = laptop.split(":\n", 1)[1].replace("\\\\\n", "\\\n").replace("http://127.0.0.1:8765/v1", url)
            done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    finally:
        server.terminate()
    assert (tmp_path / "runs/model/config.json").exists() and (tmp_path / "runs/results.jsonl").exists()
