"""What README, docstrings and run.sh name must exist; every flag must be read; defaults must be the paper's."""
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

STAGES = ["generate_personas", "gold", "simulate", "select", "train", "evaluate"]
SCRIPTS = [*(f"{stage}.py" for stage in STAGES), *(f"toy/{name}.py" for name in ("world", "server", "pretrain", "measure", "report"))]
FOREIGN = {"--n", "--nnodes", "--index-url", "--nproc_per_node", "--config_file", "--tensor-parallel-size", "--generation-config", "--help"}     # of other programs
PAPER = {  # star_gate.md's "Settings of the published run"
    "generate_personas": {"splits": "A=50,B=50,test=10", "temperature": 1.4, "top-p": 0.9, "max-tokens": 400},
    "gold": {"temperature": 0.0, "top-p": 0.9, "max-tokens": 300},
    "simulate": {"questioner": "mistralai/Mistral-7B-Instruct-v0.2", "roleplayer": "mistralai/Mixtral-8x7B-Instruct-v0.1",
                 "samples": 10, "max-turns": 3, "temperature": 0.9, "top-p": 0.9, "max-tokens": 700,
                 "roleplayer-temperature": 0.0},
    "select": {"base": "mistralai/Mistral-7B-Instruct-v0.2", "k": 1, "pick": "best", "max-tokens": 700},
    "train": {"base": "mistralai/Mistral-7B-Instruct-v0.2", "target": "response", "lr": 2e-05, "warmup": 0.1, "epochs": 1,
              "batch-size": 64, "max-length": 2048, "validation": 0.05, "clip": 1.0, "seed": 42, "dtype": "bfloat16"},
    "evaluate": {"win-pairs": 300, "max-tokens": 700, "temperature": 0.0, "judge-temperature": 0.0, "top-p": 0.9,
                 "judge-max-tokens": 300},
}


@pytest.fixture(scope="module")
def helps():
    """{script: its --help}"""
    return {script: subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True,
                                   check=True, env={"COLUMNS": "100", "PATH": ""}).stdout for script in SCRIPTS}


@pytest.fixture(scope="module")
def flags(helps):
    """{script: its flags}, read off the option lines of --help."""
    return {script: set(re.findall(r"^  (?:-h, )?(--[a-z][a-z-]*)", text, re.M)) for script, text in helps.items()}


def commands(text):
    """The shell commands of a text, with continued lines joined: [("simulate.py", [flags])]."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        started = r"(?:python|\$LAUNCH\w*|launch(?: --config_file \S+)?|--nproc_per_node \d+) ((?:toy/)?\w+\.py)([^`|;&)]*)"
        for script, rest in re.findall(started, line):
            if script in SCRIPTS:
                found.append((script, re.findall(r"(?<![\w-])--[a-z][a-z_-]*", rest)))
    return found


TEXTS = ["README.md", "run.sh", "NOTES.md", *SCRIPTS]


@pytest.mark.parametrize("name", TEXTS)
def test_every_flag_that_is_named_exists(name, flags):
    text = (ROOT / name).read_text()
    benchmarks = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
    known = set.union(*flags.values(), re.findall(r'add_argument\("(--[a-z-]+)"', benchmarks)) | FOREIGN
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text))
    assert named <= known, f"{name} names {named - known}"
    doc = text if name.endswith((".md", ".sh")) else text.split('"""')[1]
    for script, used in commands(doc):
        assert set(used) - FOREIGN <= flags[script], f"{name}: {script} has no {set(used) - FOREIGN - flags[script]}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script, flags):
    source = (ROOT / script).read_text() + (ROOT / "common.py").read_text()
    for flag in flags[script] - {"--help"}:
        field = flag[2:].replace("-", "_")
        read = re.search(rf"args\.{field}\b(?! *=[^=])", source) or re.search(rf'fingerprints\(args[^)]*"{field}"', source)
        assert read, f"{script}: {flag} is never read"


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_that_is_named_exists(name):
    text = (ROOT / name).read_text()
    ours = r"(?<![\w./-])((?:tests|data|toy|configs|benchmarks|\.ci)/[\w./-]*\w|(?:" + "|".join(
        [*STAGES, "common", "run"]) + r")\.(?:py|sh)|requirements(?:-dev)?\.txt|NOTES\.md)\b"
    for path in set(re.findall(ours, text)):
        assert (ROOT / path).exists(), f"{name} names {path}"


def test_functions_that_the_readme_names_exist(select_stage):
    table = (ROOT / "README.md").read_text().split("## The algorithm, step by step")[1].split("##")[0]
    modules = {stage: select_stage if stage == "select" else importlib.import_module(stage) for stage in STAGES}
    rows = re.findall(r"\| `(\w+)\.py` \| (.*?) \|\n", table)
    assert {stage for stage, _ in rows} == set(STAGES)
    for stage, functions in rows:
        for function in re.findall(r"`(\w+)`", functions):
            assert callable(getattr(modules[stage], function)), f"{stage}.{function}"


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_the_papers_and_help_shows_them(stage, helps):
    text = " ".join(helps[f"{stage}.py"].split())
    for flag, value in PAPER[stage].items():
        assert re.search(rf"--{flag} [^\]]*?\(default: {re.escape(str(value))}\)", text.split("options:")[1]), (flag, value)


def test_the_launchers_leave_the_stages_flags_alone(flags):
    """argparse takes a beginning of an option for the option: `torchrun simulate.py --n 10` would end in an error."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser
    for launcher in (get_args_parser(), launch_command_parser()):
        for flag in set.union(*flags.values()):
            begun = [option for option in launcher._option_string_actions if option.startswith(flag) and option != flag]
            assert not begun or not launcher.allow_abbrev, f"{flag} is the beginning of {begun}"


def test_nothing_else_at_the_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:                                       # an unpacked archive has no git: look at the folder
        tops = {path.name for path in ROOT.iterdir()} - {"runs", "__pycache__", ".pytest_cache"}
    else:
        tops = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert tops <= {*(f"{stage}.py" for stage in STAGES), "common.py", "run.sh", "requirements.txt", "requirements-dev.txt",
                    "README.md", "NOTES.md", "LICENSE", ".gitignore", "tests", "data", "toy", "configs", "benchmarks", ".ci"}


def test_the_core_does_not_know_the_toy():
    for script in (*STAGES, "common"):
        code = re.sub(r'""".*?"""', "", (ROOT / f"{script}.py").read_text(), flags=re.S)
        assert not re.search(r"\b(import|from) (toy|world)\b", code) and "toy" not in code, script


def test_the_docstrings_laptop_commands_run_one_after_the_other(tmp_path):
    """The server, then the six commands exactly as the six docstrings print them, in a copy of the project."""
    for name in ("common.py", *(f"{stage}.py" for stage in STAGES)):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "toy", tmp_path / "toy")
    shutil.copytree(ROOT / "data", tmp_path / "data")
    (tmp_path / "runs").mkdir()
    server = subprocess.Popen([sys.executable, "toy/server.py", "--port", "0"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[-1]
        for stage in STAGES:
            laptop = (ROOT / f"{stage}.py").read_text().split('"""')[1].split("On a laptop")[1].split("The paper's scale")[0]
            script = laptop.split(":\n", 1)[1].replace("\\\\\n", "\\\n").replace("http://127.0.0.1:8765/v1", url)
            done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, env={
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    finally:
        server.terminate()
    assert (tmp_path / "runs/model/config.json").exists() and (tmp_path / "runs/results.jsonl").exists()
