"""What README, docs/, docstrings and run.sh name must exist; their code must be code; defaults must be the paper's."""
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
SCRIPTS = [f"{name}.py" for name in (*STAGES, *"report/report report/cost report/sweep people/server people/talk "
                                     "people/measure people/replay data/in3 data/qulac toy/world toy/server "
                                     "toy/pretrain toy/measure toy/permute toy/check".split())]
PAGES = ["README.md", "forks/README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
SOURCES = "".join((ROOT / file).read_text() for file in (*SCRIPTS, "common.py"))
LOOP = ["run.sh", *(f"settings/{file.name}" for file in sorted((ROOT / "settings").glob("*.sh")))]
TEXTS = [*PAGES, *LOOP, "forks/run.sh", "report/sweep.sh", *SCRIPTS]
FOREIGN = set("""--n --nnodes --index-url --nproc_per_node --config_file --tensor-parallel-size --generation-config
    --device --gpu-memory-utilization --help --always --dirty --num_processes --rdzv_backend --rdzv_endpoint --nodes
    --ntasks-per-node --gpus-per-node --time --no-deps --exclude --directory""".split())         # of other programs
Q, PAPER = "mistralai/Mistral-7B-Instruct-v0.2", {              # the published settings
    "generate_personas.py": "splits A=50,B=50,test=10 temperature 1.4 top-p 0.9 max-tokens 400",
    "gold.py": "temperature 0.0 top-p 0.9 max-tokens 300",
    "simulate.py": "questioner Q roleplayer mistralai/Mixtral-8x7B-Instruct-v0.1 samples 10 max-turns 3 max-tokens 700 "
                   "temperature 0.9 top-p 0.9 roleplayer-temperature 0.0",
    "select.py": "base Q k 1 pick best max-tokens 700",
    "train.py": "base Q target response lr 2e-05 warmup 0.1 epochs 1 batch-size 64 max-length 2048 validation 0.05 "
                "clip 1.0 seed 42 dtype bfloat16",
    "evaluate.py": "base Q win-pairs 300 max-tokens 700 temperature 0.0 top-p 0.9 judge-max-tokens 300"}
CORE = [*SCRIPTS[:6], "common.py", "run.sh"]
FOLDERS = "prompts data configs settings report people toy aloe forks docs tests benchmarks".split()


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
    more = [*(ROOT / "benchmarks").glob("*.py"), ROOT / "people/nearest.py", *(ROOT / "forks").glob("*.diff")]
    code = "".join(file.read_text() for file in more)           # (a fork adds flags)
    known = flags(*SCRIPTS).union(re.findall(r'add_argument\("(--[a-z-]+)"', code))
    used = re.compile(r"(?<![\w-])--[a-z][a-z_-]*").findall
    assert set(used(text)) <= known | FOREIGN, f"{name} names {set(used(text)) - known - FOREIGN}"
    doc = text if name.endswith((".md", ".sh")) else text.split('"""')[1]
    started = r"(?:python|\$LAUNCH\w*|launch(?: --config_file \S+)?|--nproc_per_node \d+) ((?:\w+/)?\w+\.py)([^`|;&)]*)"
    for script, rest in re.findall(started, doc.replace("\\\n", " ")):
        wrong = set(used(rest.split("\n")[0])) - FOREIGN - flags(*{script} & set(SCRIPTS))
        assert not wrong or script not in SCRIPTS, f"{name}: {script} has no {wrong}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_its_default_the_papers(script):
    source = "".join((ROOT / file).read_text() for file in (script, "common.py", "toy/measure.py"))
    shown = " ".join(manual(script).split())
    words = PAPER.get(script, "").replace(" Q", f" {Q}").split()
    for flag in flags(script) - {"--help"}:
        assert re.search(rf"args\.{flag[2:].replace('-', '_')}\b(?! *=[^=])", source), f"{script}: {flag} is never read"
    for flag, value in zip(words[::2], words[1::2]):
        assert re.search(rf"--{flag} (?:\w+ \[\w+ \.\.\.\] )?[^\]]*?\(default: (?:\[')?{re.escape(value)}(?:'\])?\)",
                         shown.split("options:")[1]), (flag, value)


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_links_lead_somewhere(name):
    ours = rf"(?<![\w./-])((?:{'|'.join(FOLDERS)}|\.ci)/[\w./-]*\w|{'|'.join(CORE)}|requirements(?:-dev)?\.txt)\b"
    text = (ROOT / name).read_text()
    for path in set(re.findall(ours, text)) - {"settings/MODE.sh", "forks/NAME.diff"}:
        assert (ROOT / path).exists(), f"{name} names {path}"
    for target, anchor in re.findall(r"\]\((?!http)([^)# ]*)(?:#([^) ]*))?\)", text) if name in PAGES else ():
        page = (ROOT / name).parent / target if target else ROOT / name
        assert page.exists(), f"{name} links to {target}"
        heads = [re.sub(r"[^\w -]", "", head.lower()) for head in re.findall(r"^#+ (.*)", page.read_text(), re.M)]
        assert not anchor or anchor in [head.replace(" ", "-") for head in heads], f"{name}: no {target}#{anchor}"


@pytest.mark.parametrize("name", PAGES)
def test_code_on_a_page_is_code(name):
    for script in blocks(name, "bash"):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0, script


def test_rows_functions_and_variables_that_the_pages_show_exist(select_stage):
    assert all(json.loads(row) for row in "".join(blocks("docs/data.md")).replace("\n ", " ").splitlines()[:11])
    table = (ROOT / "README.md").read_text().split("## Read the scripts")[1].split("##")[0]
    assert {*re.findall(r"\| `(\w+)\.py`", table)} == {*STAGES}
    for stage, functions in re.findall(r"\| `(\w+)\.py` \| (.*?) \|\n", table):
        module = select_stage if stage == "select" else importlib.import_module(stage)
        assert all(callable(getattr(module, name)) for name in re.findall(r"`(\w+)`", functions)), stage
    for name in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", (ROOT / "docs/walkthrough.md").read_text()):
        assert name in SOURCES, name
    table, loop = (ROOT / "docs/scale.md").read_text(), "".join((ROOT / file).read_text() for file in LOOP)
    for name in re.findall(r"`([A-Z_]+)`", "".join(re.findall(r"^\| (`[A-Z]{2}.*?) \|", table, re.M))):
        assert re.search(rf"\${{?{name}\b", loop), f"nothing reads {name}"


def test_the_top_level_is_seven_scripts_and_a_loop_short_and_made_of_nothing_below():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert {path.split("/")[0] for path in tracked} <= {
        *CORE, *FOLDERS, *"README.md LICENSE requirements.txt requirements-dev.txt pytest.ini .ci .gitignore".split()}
    code = {name: (ROOT / name).read_text() for name in {*CORE, *LOOP}}
    assert not re.search(rf"^\s*(from|import) ({'|'.join(FOLDERS)})\b", "".join(map(code.get, CORE)), re.M)
    assert max(len(line) for text in code.values() for line in text.splitlines()) <= 120
    lines = {name: text.count("\n") for name, text in code.items()}
    assert sum(map(lines.get, CORE)) <= 2061 and lines["common.py"] <= 820 and lines["run.sh"] <= 131, lines
    assert sum(map(lines.get, LOOP[1:])) <= 107 and (ROOT / "README.md").read_text().count("\n") <= 250


def test_the_scripts_run_one_by_one_as_the_docstrings_and_the_readme_print_them(tmp_path):
    shutil.copytree(ROOT, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", ".git"))
    script = blocks("README.md", "bash")[1]
    for stage in STAGES:
        laptop = (ROOT / f"{stage}.py").read_text().split("On a laptop")[1].split("The paper's scale")[0]
        commands = re.sub("^    ", "", laptop.split(":\n", 1)[1].replace("\\\\\n", "\\\n"), flags=re.M).strip()
        assert all(command in script for command in re.split(r"\n(?! )", commands)), commands
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = script.replace("http://127.0.0.1:8765/v1", "$(cat url)")
    server = "python toy/server.py --port 0 --port-file url & trap 'kill %1' EXIT; until [ -s url ]; do sleep 1; done\n"
    done = subprocess.run(["bash", "-exc", server + script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "win_rate" in (tmp_path / "runs/results.jsonl").read_text()
