"""run.sh without the work: the commands that it prints, and how it runs one. (tests/test_smoke.py runs it for real.)"""
import shlex
import signal
import subprocess
import time

import pytest

from conftest import ROOT

WHO = {"ORACLE": "openai:o", "ROLEPLAYER": "openai:r@http://h/v1"}


def printed(*mode, **more):
    """(mode, environment) -> the commands of `PRINT=1 bash run.sh mode`: [(script, {flag: words, "launch": words})]."""
    done = subprocess.run(["bash", "run.sh", *mode], cwd=ROOT, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "PRINT": "1", "RUN": "r", **more})
    assert done.returncode == 0 and not (ROOT / "r").exists(), done.stderr
    commands = []
    for words in map(shlex.split, done.stdout.splitlines()):
        script = next(word for word in words if word.endswith(".py"))
        launch, rest = words[:words.index(script)], words[words.index(script) + 1:]
        flags, flag = {"": [], "launch": launch}, ""
        for word in rest:
            if word.startswith("--"):
                flag, flags[word] = word, []                       # of a repeated flag the last one counts
            else:
                flags[flag].append(word)
        commands.append((script, flags))
    return commands


def of(commands, script, folder=""):
    return [flags for name, flags in commands if name == script and folder in flags.get("--output", [""])[0]]


def said(commands, script, *names, folder=""):
    """What these flags say in each command of a script, into a folder: a text or None; of several flags a tuple."""
    rows = [tuple(" ".join(flags[f"--{name}"]) if f"--{name}" in flags else None for name in names)
            for flags in of(commands, script, folder)]
    return rows if len(names) > 1 else [value for value, in rows]


def test_the_full_run():
    commands, world = printed(), "http://127.0.0.1:8765/v1"
    assert [name for name, _ in commands[:3]] == ["toy/world.py", "generate_personas.py", "gold.py"]
    assert [name for name, _ in commands[-2:]] == ["toy/check.py", "report/report.py"]
    assert said(commands, "gold.py", "split") == ["A", "B", "test"]
    for variant, target in (("main", "response"), ("no_reg", "none"), ("gold", "gold")):
        here, no_response = f"r/{variant}", None if variant == "main" else ""
        assert said(commands, "train.py", "output", "base", "target", "selected", folder=f"{here}/") == [
            (f"{here}/{t}/model", "toy/base", target, f"{talked}/selected.jsonl")
            for t, talked in ((1, "r/base"), (2, f"{here}/2"), (3, f"{here}/3"))], "each starts from Q_BASE"
        # Q_{t-1} asks and answers on A, B, A; iteration 1 is shared.
        assert [said(commands, "simulate.py", "questioner", "split", folder=f"{here}/{t}/conv") for t in (2, 3)] == [
            [(f"{here}/1/model", "B")], [(f"{here}/2/model", "A")]]
        assert said(commands, "select.py", "questioner", "gold", "no-response", "pick", folder=f"{here}/") == [
            (f"{here}/{t}/model", f"r/gold-{split}.jsonl", no_response, None) for t, split in ((1, "B"), (2, "A"))]
    assert {*said(commands, "simulate.py", "split", folder="base/conversations")} == {"A"}
    # (variant, iteration, who answers, on which conversations, into which folder, against which answers of Q_BASE)
    other = "r/other_user/roleplayer-terse"
    own = {v: [(v, t, f"r/{v}/{t}/model", f"r/{v}/{t}/test.jsonl", f"r/{v}/{t}/test", "r/base/test") for t in (1, 2, 3)]
           for v in ("main", "no_reg", "gold")}
    expected = [
        ("main", 0, "toy/base", "r/base/test.jsonl", "r/base/test", None), *own["main"],
        *[("base_answers", t, "toy/base", f"r/main/{t}/test.jsonl", f"r/base_answers/{t}/test", "r/base/test")
          for t in (1, 2, 3)],
        ("main", 0, "toy/base", f"{other}/base/test.jsonl", f"{other}/base/test", None),
        *[("main", t, f"r/main/{t}/model", f"{other}/{t}/test.jsonl", f"{other}/{t}/test", f"{other}/base/test")
          for t in (1, 2, 3)], *own["no_reg"], *own["gold"]]
    assert said(commands, "evaluate.py", "variant", "iteration", "questioner", "conversations", "output",
                "baseline") == [(variant, str(t), *rest) for variant, t, *rest in expected]
    assert said(commands, "toy/measure.py", "variant", "iteration", "conversations", "responses") == [
        (variant, str(t), talk, f"{folder}/responses.jsonl") for variant, t, _, talk, folder, _ in expected]
    # Each of those conversations is its own Questioner's with the right user.
    asked = {talk: who for talk, split, *who in said(
        commands, "simulate.py", "output", "split", "questioner", "roleplayer") if split == "test"}
    assert asked == {talk: [f"r/main/{t}/model" if variant == "base_answers" else model,
                            f"openai:roleplayer{'-terse' if 'other_user' in talk else ''}@{world}"]
                     for variant, t, model, talk, *_ in expected}


def test_the_controls_select_in_another_way():
    commands = printed(VARIANTS="main random permuted", ITERATIONS="2")
    for control, golds, pick in (("random", "gold", "random"), ("permuted", "permuted", None)):
        here = f"r/{control}/"
        assert said(commands, "select.py", "pick", "gold", "conversations", "scores", folder=here) == [
            (pick, f"r/{golds}-{split}.jsonl", f"{talked}conversations.jsonl", f"{talked}scores-{golds}.jsonl")
            for split, talked in (("A", "r/base/"), ("B", f"{here}2/"))], "main's scores, where there are some"
        assert said(commands, "train.py", "selected", "target", folder=here) == [
            (selected, "response") for selected in said(commands, "select.py", "output", folder=here)]
    assert {*said(commands, "select.py", "pick", "gold", folder="/base/")} == {(None, "r/gold-A.jsonl")}
    assert said(commands, "toy/permute.py", "gold", "output") == [
        (f"r/gold-{split}.jsonl", f"r/permuted-{split}.jsonl") for split in "AB"]


def test_who_asks_and_who_answers():
    """Before and after training; the hidden prompt; the golds after each question; untrained models."""
    commands = printed("smoke", VARIANTS="main base_questions hidden turns models", ITERATIONS="2",
                       MODELS="a/b openai:c/d@http://x:1/v1")
    asked = {(variant, t): tuple(filter(None, who)) for variant, t, *who in said(
        commands, "evaluate.py", "variant", "iteration", "questioner", "conversations", "response-prompt", "metrics",
        "turns")}
    hidden = "prompts/personalisation.txt"
    assert asked["base_questions", "2"] == ("r/main/2/model", "r/base/test.jsonl", "win_rate")
    assert asked["base_hidden", "1"] == ("toy/base", "r/base/test.jsonl", hidden, "win_rate")
    assert asked["hidden", "1"] == ("r/hidden/1/model", "r/hidden/1/test.jsonl"), "after training without the prompt"
    assert said(commands, "select.py", "response-prompt", folder="/hidden/") == [hidden, hidden]
    assert asked["main-after-2", "0"] == ("toy/base", "r/base/test.jsonl", "log_prob", "2")
    assert asked["main-after-1", "2"] == ("r/main/2/model", "r/main/2/test.jsonl", "log_prob", "1")
    assert asked["a/b", "1"] == ("a/b", "r/models/a-b/test.jsonl")
    assert asked["c/d", "1"] == ("openai:c/d@http://x:1/v1", "r/models/c-d/test.jsonl")
    assert not any("-after-" in variant for variant in said(commands, "toy/measure.py", "variant")), "no responses"
    commands = printed("smoke", VARIANTS="main turns", SIMULATE_FLAGS="--max-turns 2")
    assert {*said(commands, "evaluate.py", "turns", folder="-after-")} == {"1"}


def test_no_more_is_bought_than_is_needed():
    assert said(printed("paper", ITERATIONS="1", **WHO), "gold.py", "split") == ["A", "test"]
    commands = printed("paper", VARIANTS="models", MODELS="m", **WHO)
    assert said(commands, "gold.py", "split") == ["test"]
    assert not of(commands, "train.py") + of(commands, "select.py") and len(of(commands, "evaluate.py")) == 2
    commands = printed("paper", JUDGE="", VARIANTS="main no_reg", **WHO)
    assert {*said(commands, "evaluate.py", "metrics", "judge")} == {("log_prob", None)}
    rehearsal = printed("paper", LIMIT="6", ITERATIONS="1", RUN="", **WHO)
    assert all(flags["--limit"] == ["6"] and flags["--output"][0].startswith("runs/paper-6/")
               for name, flags in rehearsal if "report" not in name)


def test_the_papers_run():
    commands = printed("paper", **WHO)
    for flag in ("--lr", "--epochs", "--batch-size", "--temperature", "--max-tokens", "--limit"):
        assert not any(flag in flags for _, flags in commands), f"{flag}: the stages' defaults are the paper's"
    assert {*said(commands, "simulate.py", "samples")} == {"10"}
    assert {*said(commands, "train.py", "rounding")} == {"stochastic"}
    small = printed("small", **WHO)
    assert {*said(small, "simulate.py", "tasks-per-split"), *said(small, "gold.py", "tasks-per-split")} == {"20"}
    assert said(small, "generate_personas.py", "splits") == ["A=10,B=10,test=10"]
    assert all(flags["launch"] == ["python"] for _, flags in small), "one card"


def test_a_users_flags_come_last_and_the_judges_arguments_are_the_judges_alone():
    commands = printed("paper", SIMULATE_FLAGS="--samples 3 --top-p 1", SERVER_FLAGS="--concurrency 9",
                       EXTRA=(extra := '{"a b": 1}'), **WHO)
    assert {*said(commands, "simulate.py", "samples", "top-p", "system")} == {("3", "1", "fold")}
    assert all(flags.get("--concurrency") == (["9"] if name not in ("train.py", "report/report.py") else None)
               for name, flags in commands)
    with_extra = {name for name, flags in commands if flags.get("--extra") == [extra]}
    assert with_extra == {"generate_personas.py", "gold.py"}
    assert {more for judge, more in said(commands, "evaluate.py", "judge", "judge-extra") if judge} == {extra}
    commands = printed("toy", SAMPLES="5", TEST_SAMPLES="2", TRAIN_FLAGS="--lr 1")
    assert {*said(commands, "simulate.py", "split", "samples")} == {("A", "5"), ("B", "5"), ("test", "2")}
    assert {*said(commands, "train.py", "lr")} == {"1"}


def test_data_of_ones_own():
    commands = printed("paper", PERSONAS="p.jsonl", GOLD="g.jsonl", TEST_GOLD="t.jsonl", TASKS="mine.jsonl", BASE="m",
                       **WHO)
    assert not {"generate_personas.py", "gold.py"} & {name for name, _ in commands}
    assert {(name, *flags["--gold"]) for name, flags in commands if "--gold" in flags} == {
        *((name, "g.jsonl") for name in ("select.py", "train.py")),
        *((name, "t.jsonl") for name in ("evaluate.py", "report/report.py"))}
    for flag, value in (("--personas", "p.jsonl"), ("--tasks", "mine.jsonl"), ("--base", "m")):
        assert {flags[flag][0] for _, flags in commands if flag in flags} == {value}
    own = printed("paper", EXAMPLES="e.jsonl", TASKS_PER_SPLIT="7", PERSONA_SPLITS="A=2,test=3", **WHO)
    assert said(own, "generate_personas.py", "examples", "splits") == [("e.jsonl", "A=2,test=3")]
    assert {*said(own, "simulate.py", "tasks-per-split")} == {"7"}
    assert said(printed("toy", SPLIT="dev"), "gold.py", "split") == ["A", "B", "dev"]


def test_a_laptop():
    """No judge, no Oracle: golds and users come from one file, and what was told is measured after each evaluation."""
    commands, measured = printed("laptop", BASE="m", PROMPTS="p"), ("variant", "iteration", "conversations")
    assert [name for name, _ in commands[:3]] == ["data/in3.py", "simulate.py", "evaluate.py"]
    for flag, value in (("--gold", "r/data/gold.jsonl"), ("--tasks", "r/data/tasks.jsonl"), ("--prompts", "p")):
        used = [flags[flag] for name, flags in commands if flag in flags and name != "toy/permute.py"]
        assert {value} == {word for words in used for word in words} - {"r/permuted-A.jsonl"}, flag
    assert {*said(commands, "evaluate.py", "metrics", "judge")} == {("log_prob", None)}
    assert said(commands, "people/measure.py", *measured) == said(commands, "evaluate.py", *measured)
    own = printed("laptop", BASE="m", GOLD="g.jsonl", PERSONAS="p.jsonl", TASKS="t.jsonl", VARIANTS="main")
    assert {name for name, _ in own} == {*"simulate.py evaluate.py select.py train.py report/report.py".split()}
    assert {*said(own, "select.py", "gold", "tasks")} == {("g.jsonl", "t.jsonl")}


def test_several_users():
    commands = printed("paper", VARIANTS="main other_user", ITERATIONS="1", ORACLE="o", ROLEPLAYER="a b",
                       TEST_ROLEPLAYER="c", OTHER_ROLEPLAYER="google/gemma openai:x/y@http://h/v1")
    played = dict(said(commands, "simulate.py", "output", "roleplayer"))
    assert played["r/base/conversations.jsonl"] == "a b" and played["r/main/1/test.jsonl"] == "c"
    for name, spec in (("google-gemma", "google/gemma"), ("x-y", "openai:x/y@http://h/v1")):
        there = f"r/other_user/{name}"
        assert played[f"{there}/base/test.jsonl"] == played[f"{there}/1/test.jsonl"] == spec
        assert said(commands, "evaluate.py", "baseline", folder=f"{there}/") == [None, f"{there}/base/test"]


def test_gpus_and_engines():
    commands = printed("paper", GPUS="3", SERVE="vllm serve", **WHO)
    served = ["bash", "settings/serve.sh"]
    for name, flags in commands[:-1]:
        config = "fsdp" if name == "train.py" else "ddp"
        assert " ".join(flags["launch"]).endswith(
            f"accelerate launch --config_file configs/{config}.yaml --num_processes 3")
        assert (flags["launch"][:2] == served) == (name in ("simulate.py", "select.py", "evaluate.py"))


@pytest.mark.parametrize("mode, more, said", [
    ("smok", {}, "no mode smok"), ("serve", {}, "no mode serve"),
    ("smoke", {"VARIANTS": "main no-reg"}, "no variant no-reg"), ("paper", {}, "set ORACLE"),
    ("small", {"ORACLE": "x"}, "set ROLEPLAYER"), ("paper", {"VARIANTS": "models", **WHO}, "set MODELS"),
    ("paper", {"VARIANTS": "base_answers main", **WHO}, "main comes first"),
    ("paper", {"JUDGE": "", "VARIANTS": "main base_answers", **WHO}, "JUDGE"),
    ("paper", {"LAUNCH": "", **WHO}, "nvidia-smi -L lists 0 GPUs"),
    ("paper", {"LAUNCH": "", "GPUS": "4", **WHO}, "wants more"),
    ("paper", {"ORACLE": "x", "ROLEPLAYER": "openai:y@http://a/v1", "OTHER_ROLEPLAYER": "z openai:y@http://b/v1",
               "VARIANTS": "main other_user"}, "openai:y is there twice")])
def test_what_cannot_run_is_refused_before_anything_starts(mode, more, said, tmp_path):
    done = subprocess.run(["bash", "run.sh", mode], cwd=ROOT, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "RUN": str(tmp_path / "r"), "LAUNCH": "python", **more})
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------- how a command is run

STAND_IN = """#!/bin/sh
echo "$*" >> "$RECORD"
case "$*" in *"$AT"*) ;; *) exit 0 ;; esac                          # AT: a stage that hangs, or fails TIMES times
[ -n "$STATUS" ] || { echo $$ > "$RECORD.hangs"; exec /bin/sleep 60; }
[ "$(grep -c -e "$AT" "$RECORD")" -gt "${TIMES:-999}" ] || { [ -z "$AWAY" ] || touch "$AWAY_FILE"; exit "$STATUS"; }
"""


@pytest.fixture
def bash(tmp_path):
    """(environment) -> `bash run.sh paper`, started, with a program that only records in the place of python."""
    for name, text in (("python", STAND_IN), ("sleep", '#!/bin/sh\necho $1 >> "$RECORD.sleeps"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(**more):
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RECORD": str(tmp_path / "record"), "LAUNCH": "python",
               "RUN": str(tmp_path / "r"), "VARIANTS": "main", "ITERATIONS": "1", **WHO, **more}
        return subprocess.Popen(["bash", "run.sh", "paper"], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return start


def test_each_command_is_printed_as_it_runs(bash, tmp_path):
    out, err = (process := bash(AT="nothing", EXTRA='{"a b": 1}')).communicate(timeout=60)
    assert process.returncode == 0 and not err
    run = (tmp_path / "record").read_text().splitlines()
    assert [" ".join(shlex.split(line)[1:]) for line in out.splitlines()] == run


def test_a_server_that_is_away_is_waited_for(bash, tmp_path):
    for status in ("75", "1"):                                      # accelerate makes 1 of every status
        (tmp_path / "record").unlink(missing_ok=True)
        process = bash(AT="--samples 10 --output", TIMES="3", STATUS=status, AWAY="yes")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and err.count("a server is away; again in 5 minutes") == 3
    assert set((tmp_path / "record.sleeps").read_text().split()) == {"300"}
    process = bash(AT="simulate.py", STATUS="75", AWAY="yes", WAIT_HOURS="1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err.count("again in") == 12


def test_other_ends_of_a_stage_end_the_run(bash, tmp_path):
    for status in (1, 2, 137):
        (process := bash(AT="simulate.py", STATUS=str(status))).communicate(timeout=60)
        assert process.returncode == status and "simulate.py" in (tmp_path / "record").read_text().splitlines()[-1]


@pytest.mark.parametrize("name, status", [("TERM", 143), ("INT", 130), ("HUP", 129)])
def test_a_signal_ends_the_stage_at_once(name, status, bash, tmp_path):
    process, begin = bash(AT="simulate.py"), time.time()
    while not (tmp_path / "record.hangs").exists() or not (tmp_path / "record.hangs").read_text():
        assert time.time() - begin < 20 and process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.5)                                         # bash waits by now: just before, it would hear it late
    begin = time.time()
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert process.wait(timeout=20) == status and time.time() - begin < 5
    state = f"ps -o stat= -p {(tmp_path / 'record.hangs').read_text()}"
    assert any(subprocess.getoutput(state).strip() in ("", "Z") or time.sleep(0.1) for _ in range(100)), (
        "it would go on beside the next start")
