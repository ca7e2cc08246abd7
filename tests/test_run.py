"""run.sh without the work: what it would start, in which order, with which flags. (tests/test_smoke.py runs it for real.)"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from conftest import ROOT

RECORDER = """#!/bin/sh
case "$1 $2" in
"-c import fcntl"*)                                               # run.sh's locks are real
    exec REAL "$@" ;;
plan.py*)
    echo "$*" >> "$RECORD.plans" ;;
toy/server.py*)                                                   # says where it listens, and stays, as the real one does
    printf '%s\\t' "$@" >> "$RECORD"; echo >> "$RECORD"
    while [ $# -gt 0 ]; do [ "$1" = --port-file ] && echo http://127.0.0.1:1/v1 > "$2"; shift; done
    exec /bin/sleep 60 ;;
toy/world.py*)
    printf '%s\\t' "$@" >> "$RECORD"; echo >> "$RECORD"; echo "the tasks of $*" > "$3" ;;
-c*)                                                              # is the served model there?
    until [ -e "$RECORD.up" ] || [ "$SERVE" = false ]; do /bin/sleep 0.02; done
    [ -e "$RECORD.up" ]; exit ;;
serve.py*)                                                        # a model's server, which ends when it is told to
    trap 'kill $!; printf "stop.py\\t--folder\\t$2\\n" >> "$RECORD"; rm "$RECORD.up"; exit' TERM
    /bin/sleep 60 & printf "serve.py\\t--folder\\t$2\\t$3\\t$4\\n" >> "$RECORD"; touch "$RECORD.up"; wait ;;
*)
    printf '%s\\t' "$@" >> "$RECORD"; echo >> "$RECORD"
    [ -n "$AT" ] || exit 0                                        # AT: a stage that hangs, or fails TIMES times
    case "$*" in *"$AT"*) ;; *) exit 0 ;; esac
    [ -n "$STATUS" ] || { /bin/sleep 60 & echo $! > "$RECORD.hangs"; wait; }
    [ "$(grep -c -e "$AT" "$RECORD")" -gt "${TIMES:-99}" ] || { [ -z "$SIGN" ] || touch "$AWAY_FILE"; exit "$STATUS"; } ;;
esac
"""


@pytest.fixture
def bash(tmp_path):
    """(mode, environment) -> `bash run.sh mode`, started, with programs that only record in the place of python, accelerate
    and nvidia-smi, and a sleep that does not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"python": RECORDER.replace("REAL", sys.executable), "nvidia-smi": "#!/bin/sh\nseq -f 'GPU %g' 4\n",
                       "sleep": '#!/bin/sh\n[ $1 -ge 60 ] 2> /dev/null && echo $1 >> "$RECORD.sleeps" || exec /bin/sleep $1\n'
                       }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "accelerate").symlink_to(folder / "python")

    def start(*mode, **more):
        return subprocess.Popen(["bash", "run.sh", *mode], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={"PATH": f"{folder}:/usr/bin:/bin", "RECORD": str(tmp_path / "record"),
                                     "RUN": str(tmp_path / "r"), **more},
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return start


@pytest.fixture
def record(bash, tmp_path):
    """(mode, environment) -> the commands that `bash run.sh mode` starts: [(script, {flag: words})]."""
    def run(*mode, status=0, **more):
        out = tmp_path / "record"
        out.write_text("")
        done = bash(*mode, **more)
        run.out, run.said = done.communicate(timeout=60)
        assert done.returncode == status, run.said
        commands = []
        for line in out.read_text().splitlines():
            words = line.rstrip("\t").split("\t")
            script, *rest = words[words.index(next(word for word in words if word.endswith(".py"))):]
            flags, flag = {"": [], "launch": words[:words.index(script)]}, ""
            for word in rest:
                if word.startswith("--"):
                    flag, flags[word] = word, []                   # of a repeated flag the last one counts
                else:
                    flags[flag].append(word)
            commands.append((script, flags))
        return commands
    return run


def of(commands, script, folder=""):
    return [flags for name, flags in commands if name == script and folder in flags.get("--output", [""])[0]]


def test_the_full_run(record, tmp_path):
    commands = record()
    run = str(tmp_path / "r")
    assert [name for name, _ in commands[:4]] == ["toy/world.py", "toy/server.py", "generate_personas.py", "gold.py"]
    assert [name for name, _ in commands[-2:]] == ["toy/check.py", "report.py"]
    assert commands[-1][1]["--notes"] == commands[-2][1]["--output"] == [f"{run}/check.txt"]
    for variant in ("main", "no_reg", "gold"):
        models = of(commands, "train.py", f"/{variant}/")
        assert [flags["--output"][0] for flags in models] == [f"{run}/{variant}/{t}/model" for t in (1, 2, 3)]
        assert {flags["--base"][0] for flags in models} == {"toy/base"}, "every Q_t starts from Q_BASE"
        assert {flags["--target"][0] for flags in models} == {{"main": "response", "no_reg": "none"}.get(variant, variant)}
        # Q_{t-1} simulates and answers on A, B, A; iteration 1 is shared.
        train = of(commands, "simulate.py", f"/{variant}/2/conv") + of(commands, "simulate.py", f"/{variant}/3/conv")
        assert [(flags["--questioner"][0], flags["--split"][0]) for flags in train] == [
            (f"{run}/{variant}/1/model", "B"), (f"{run}/{variant}/2/model", "A")]
        selections = of(commands, "select.py", f"/{variant}/")
        assert [flags["--questioner"][0] for flags in selections] == [f"{run}/{variant}/{t}/model" for t in (1, 2)]
        assert all(("--no-response" in flags) == (variant != "main") and "--pick" not in flags for flags in selections)
        assert [flags["--selected"][0] for flags in models] == [
            f"{run}/base/selected.jsonl", *(f"{run}/{variant}/{t}/selected.jsonl" for t in (2, 3))]
    assert {flags["--split"][0] for flags in of(commands, "simulate.py", "base/conversations")} == {"A"}
    # (variant, iteration, who answers, on which conversations, into which folder, against which answers of Q_BASE)
    base, other = "toy/base", f"{run}/other_user/roleplayer-terse"
    models = {(v, t): f"{run}/{v}/{t}/model" for v in ("main", "no_reg", "gold") for t in (1, 2, 3)}
    own = [(v, t, model, f"{run}/{v}/{t}/test.jsonl", f"{run}/{v}/{t}/test", f"{run}/base/test")
           for (v, t), model in models.items()]
    expected = [
        ("main", 0, base, f"{run}/base/test.jsonl", f"{run}/base/test", None), *own[:3],
        *[("base_answers", t, base, f"{run}/main/{t}/test.jsonl", f"{run}/base_answers/{t}/test", f"{run}/base/test")
          for t in (1, 2, 3)],
        ("main", 0, base, f"{other}/base/test.jsonl", f"{other}/base/test", None),
        *[("main", t, models["main", t], f"{other}/{t}/test.jsonl", f"{other}/{t}/test", f"{other}/base/test")
          for t in (1, 2, 3)], *own[3:]]
    assert [(flags["--variant"][0], int(flags["--iteration"][0]), flags["--questioner"][0], flags["--conversations"][0],
             flags["--output"][0], flags.get("--baseline", [None])[0]) for flags in of(commands, "evaluate.py")] == expected
    assert [(flags["--variant"][0], int(flags["--iteration"][0]), flags["--conversations"][0], flags["--responses"][0])
            for flags in of(commands, "toy/measure.py")] == [
        (variant, t, talk, f"{folder}/responses.jsonl") for variant, t, _, talk, folder, _ in expected]
    assert [flags["--metrics"] for flags in of(commands, "evaluate.py") if "--metrics" in flags] == [["win_rate"]] * 3
    # Each of those conversations is its own Questioner's with the right user.
    talks = {flags["--output"][0]: (flags["--questioner"][0], flags["--roleplayer"][0].split("@")[0])
             for flags in of(commands, "simulate.py") if flags["--split"] == ["test"]}
    assert talks == {talk: (models["main", t] if variant == "base_answers" else model,
                            "openai:roleplayer-terse" if "other_user" in talk else "openai:roleplayer")
                     for variant, t, model, talk, *_ in expected}


def test_the_controls_select_in_another_way(record, tmp_path):
    commands, run = record(VARIANTS="main random permuted", ITERATIONS="2"), f"{tmp_path}/r"
    for control in ("random", "permuted"):
        selections = of(commands, "select.py", f"/{control}/")
        assert [flags.get("--pick") for flags in selections] == [["random"] if control == "random" else None] * 2
        assert [flags["--gold"] for flags in selections] == [
            [f"{run}/{'gold' if control == 'random' else 'permuted'}.jsonl"]] * 2
        assert selections[0]["--conversations"] == [f"{run}/base/conversations.jsonl"]
        assert [flags["--selected"] for flags in of(commands, "train.py", f"/{control}/")] == [
            flags["--output"] for flags in selections]
        assert all(flags["--target"] == ["response"] for flags in of(commands, "train.py", f"/{control}/"))
    assert all("--pick" not in flags and flags["--gold"] == [f"{run}/gold.jsonl"]
               for flags in of(commands, "select.py", "/base/"))
    assert {flags["--gold"][0] for flags in of(commands, "evaluate.py")} == {f"{run}/gold-test.jsonl"}
    assert {(flags["--gold"][0], flags["--output"][0]) for flags in of(commands, "toy/permute.py")} == {
        (f"{run}/gold.jsonl", f"{run}/permuted.jsonl")}


def test_each_questioner_is_served_while_it_asks_and_answers_and_while_nothing_trains(record, tmp_path):
    """One at a time; Q_BASE scores from its folder."""
    run, folder, served = f"{tmp_path}/r", None, []
    for name, flags in record(VARIANTS="main base_answers no_reg", ITERATIONS="2", SERVE="python serve.py", SERVE_PORT="9"):
        if name in ("serve.py", "stop.py"):
            assert (folder is None) == (name == "serve.py")
            folder = flags["--folder"][0] if name == "serve.py" else None
            served += [folder] if folder else []
        elif name in ("simulate.py", "select.py", "evaluate.py"):
            assert flags["--questioner"] == [f"openai:{folder}@http://127.0.0.1:9/v1"]
            assert name == "simulate.py" or flags["--base"] == ["toy/base"]
        elif name == "train.py":
            assert folder is None and "--questioner" not in flags
    assert folder is None, "the last is down at the end"
    models = {v: [f"{run}/{v}/{t}/model" for t in (1, 2)] for v in ("main", "no_reg")}
    assert served == ["toy/base", *models["main"], "toy/base", *models["no_reg"]]


def test_what_is_done_needs_no_server(record, tmp_path):
    for path in ("base/test.jsonl", "base/test/responses.jsonl", "base/conversations.jsonl", "base/selected.jsonl",
                 "main/1/test.jsonl", "main/1/test/responses.jsonl"):
        (tmp_path / "r" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / path).write_text("")
    commands = record("smoke", VARIANTS="main no_reg", SERVE="python serve.py")
    assert [flags["--folder"] for flags in of(commands, "serve.py")] == [[f"{tmp_path}/r/no_reg/1/model"]]


def test_serving_is_quiet(record):
    record("smoke", SERVE="python serve.py")
    assert record.said == ""


def test_a_server_that_does_not_start(record):
    with pytest.raises(AssertionError):
        record("smoke", SERVE="false")
    assert record.said.splitlines()[-1].startswith("run.sh: SERVE ended: see ")


def test_another_split_may_be_evaluated_in_the_same_folder(record):
    before, then = ({flags["--output"][0]: flags["--split"] for flags in of(record(**more), "gold.py")}
                    for more in ({}, {"SPLIT": "dev"}))
    assert all(then.get(path, splits) == splits for path, splits in before.items())


def test_the_papers_run(record):
    commands = record("paper", ORACLE="openai:o", ROLEPLAYER="openai:r@http://h/v1")
    assert {name for name, _ in commands} == {f"{name}.py" for name in ("generate_personas", "gold", "simulate", "select",
                                                                         "train", "evaluate", "report")}
    assert all(flags["--samples"] == ["10"] and "--limit" not in flags for flags in of(commands, "simulate.py"))
    for flag in ("--lr", "--epochs", "--batch-size", "--temperature", "--max-tokens"):
        assert not any(flag in flags for _, flags in commands), f"{flag}: the stages' defaults are the paper's"


def test_one_model_in_every_role(record):
    """On this machine, on all GPUs."""
    commands = record("paper", BASE="m", ORACLE="m", ROLEPLAYER="m")
    assert not any("openai:" in word for _, flags in commands for words in flags.values() for word in words)
    for script, flag in (("generate_personas", "--model"), ("gold", "--oracle"), ("simulate", "--roleplayer"),
                         ("evaluate", "--judge")):
        assert {flags[flag][0] for flags in of(commands, f"{script}.py") if flag in flags} == {"m"}
        assert all("launch" in flags["launch"] for flags in of(commands, f"{script}.py"))
    asked = record("paper", ORACLE="openai:o", ROLEPLAYER="m", SERVER_FLAGS="--max-refused 0.1 --concurrency 9")
    assert all((flags.get("--concurrency") == ["9"]) == (name not in ("train.py", "report.py")) for name, flags in asked)


def test_a_limit_holds_for_every_stage(record):
    commands = record(LIMIT="5", FAULTS='{"429": 0.1}')
    assert commands[1][1]["--faults"] == ['{"429": 0.1}']
    assert all(flags["--limit"] == ["5"] for name, flags in commands if name in ("simulate.py", "select.py", "gold.py"))
    assert all(flags["--limit"] == ["224"] for flags in of(record(), "simulate.py", "conversations.jsonl"))


@pytest.mark.parametrize("mode, more, said", [
    ("smoke", {"VARIANTS": "main no-reg"}, "no variant no-reg"), ("toy", {"VARIANTS": "base_answers main"}, "comes after main"),
    ("toy", {"ITERATIONS": "0"}, "not a whole number above 0"), ("toy", {"ITERATIONS": "two"}, "not a whole number above 0"),
    ("paper", {"GPUS": "2", "LAUNCH": "python"}, "GPUS=2 is of no use beside LAUNCH=python"),
    ("toy", {"LIMIT": "abc"}, "LIMIT=abc is not a whole number"), ("toy", {"SAMPLES": "1.5"}, "SAMPLES=1.5 is not a whole"),
    ("paper", {}, "set ORACLE"), ("small", {"ORACLE": "x"}, "set ROLEPLAYER"),
    ("paper", {"ORACLE": "x", "ROLEPLAYER": "y", "LAUNCH": ""}, "no GPU here (nvidia-smi -L)"),
    ("paper", {"SPLIT": "dev", "ORACLE": "x", "ROLEPLAYER": "y"}, "no task has this split"),
    ("paper", {"TASKS": "no.jsonl", "ORACLE": "x", "ROLEPLAYER": "y"}, "no.jsonl: there is no such file"),
    ("paper", {"PERSONAS": "no.jsonl", "ORACLE": "x", "ROLEPLAYER": "y"}, "no.jsonl: there is no such file"),
    ("toy", {"GOLD": "no.jsonl"}, "no.jsonl: there is no such file"), ("toy", {"EXAMPLES": "no.jsonl"}, "there is no such file"),
    ("toy", {"SIMULATE_FLAGS": "--temprature 1"}, "simulate.py: error: unrecognized arguments"),
    ("paper", {"ORACLE": "x", "ROLEPLAYER": "openai:y@http://a/v1", "OTHER_ROLEPLAYER": "z openai:y@http://b/v1",
               "VARIANTS": "main other_user"}, "same model as ROLEPLAYER"),
    ("paper", {"ORACLE": "x", "ROLEPLAYER": "x", "OTHER_ROLEPLAYER": "openai:y@http://a/v1 openai:y@http://b/v1",
               "VARIANTS": "main other_user"}, "or there twice"),
    ("smoke", {"LIMIT": "3", "PERSONA_SPLITS": "A=5,B"}, "B is not as A=50"),
    ("toy", {"ROLEPLAYER": "openai:me"}, "a Roleplayer is a name of toy/server.py"),
    ("small", {"ORACLE": "openai:x", "ROLEPLAYER": "human"}, "--roleplayer human: the stages of run.sh have no terminal")])
def test_what_cannot_run_is_refused_before_anything_starts(mode, more, said, tmp_path):
    done = subprocess.run(["bash", "run.sh", mode], cwd=ROOT, capture_output=True, text=True, env={
        "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin", "RUN": str(tmp_path / "r"), "LAUNCH": "python", **more})
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "r").exists()


def test_tasks_of_the_users_own_are_not_overwritten(record, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/tasks.jsonl").write_text("mine")
    record("smoke", status=2)
    assert "there before the run" in record.said and (tmp_path / "r/tasks.jsonl").read_text() == "mine"


def test_as_many_gpus_as_there_are(record):
    who = {"ORACLE": "o", "ROLEPLAYER": "r"}
    for more, number in (({}, "4"), ({"GPUS": "3"}, "3")):         # (the recorder's nvidia-smi shows four)
        assert {" ".join(flags["launch"]) for name, flags in record("paper", **who, **more) if name != "report.py"} == {
            f"launch --config_file configs/{name}.yaml --num_processes {number}" for name in ("ddp", "fsdp")}
    assert all(flags["launch"] == [] for _, flags in record("small", **who)), "one card"
    record("paper", status=2, GPUS="5", **who)
    assert record.said == "run.sh: GPUS=5, but there are 4 here (nvidia-smi -L)\n"
    assert all(flags["launch"] == [] for _, flags in record("paper", GPUS="1", **who))


def test_a_users_flags_come_last_and_drop_none_of_the_modes(record):
    commands = record("paper", ORACLE="o", ROLEPLAYER="r", SIMULATE_FLAGS="--samples 3 --top-p 1", GOLD_FLAGS="--temperature 1")
    for flags in of(commands, "simulate.py"):
        assert flags["--samples"] == ["3"] and flags["--top-p"] == ["1"] and flags["--system"] == ["fold"]
    assert all(flags["--temperature"] == ["1"] for flags in of(commands, "gold.py"))
    commands = record("toy", SAMPLES="5", TEST_SAMPLES="2", SIMULATE_FLAGS="--temperature 2")
    assert {(flags["--split"][0], flags["--samples"][0], flags["--temperature"][0]) for flags in of(commands, "simulate.py")} == {
        ("A", "5", "2"), ("B", "5", "2"), ("test", "2", "2")}


def test_data_of_ones_own(record):
    commands = record("paper", ORACLE="o", ROLEPLAYER="r", EXAMPLES="e.jsonl")
    assert of(commands, "generate_personas.py")[0]["--examples"] == ["e.jsonl"]
    commands = record("paper", ORACLE="o", ROLEPLAYER="r", PERSONAS="p.jsonl", GOLD="g.jsonl", TEST_GOLD="t.jsonl")
    assert not {"generate_personas.py", "gold.py"} & {name for name, _ in commands}
    golds = {(name, *flags["--gold"]) for name, flags in commands if "--gold" in flags}
    assert golds == {("select.py", "g.jsonl"), ("train.py", "g.jsonl"), ("evaluate.py", "t.jsonl"), ("report.py", "t.jsonl")}
    assert all(flags["--personas"] == ["p.jsonl"] for _, flags in commands if "--personas" in flags)
    one = record("paper", ORACLE="o", ROLEPLAYER="r", GOLD="g.jsonl")
    assert {flags["--gold"][0] for _, flags in one if "--gold" in flags} == {"g.jsonl"} and not of(one, "gold.py")


def test_a_limit_asks_for_no_more_personas_than_there_are_pairs(record):
    for limit, splits in (("3", "A=3,B=3,test=3"), ("20", "A=20,B=20,test=10")):
        commands = record("paper", ORACLE="o", ROLEPLAYER="r", LIMIT=limit)
        assert of(commands, "generate_personas.py")[0]["--splits"] == [splits]


def test_several_other_users(record, tmp_path):
    commands, there = record("paper", ORACLE="o", ROLEPLAYER="r", VARIANTS="main other_user", ITERATIONS="1",
                             OTHER_ROLEPLAYER="google/gemma-7b-it openai:x/y@http://h/v1"), f"{tmp_path}/r/other_user"
    for name, spec in (("google-gemma-7b-it", "google/gemma-7b-it"), ("x-y", "openai:x/y@http://h/v1")):
        assert {(flags["--output"][0], flags["--roleplayer"][0]) for flags in of(commands, "simulate.py", f"{there}/{name}/")} == {
            (f"{there}/{name}/{t}/test.jsonl", spec) for t in ("base", 1)}
        assert [flags.get("--baseline") for flags in of(commands, "evaluate.py", f"{there}/{name}/")] == [
            None, [f"{there}/{name}/base/test"]]


def test_several_share_the_training_and_one_answers_in_the_evaluations(record, tmp_path):
    def played(commands, output):
        return [[spec.split("@")[0] for spec in flags["--roleplayer"]] for flags in of(commands, "simulate.py", output)]
    toy = record("toy", ROLEPLAYER="roleplayer roleplayer-chatty", TEST_ROLEPLAYER="roleplayer-erring", ITERATIONS="2",
                 OTHER_ROLEPLAYER="roleplayer-terse", VARIANTS="main other_user")
    both = ["openai:roleplayer", "openai:roleplayer-chatty"]
    assert played(toy, "conversations.jsonl") == [both, both]
    assert played(toy, "r/main/1/test.jsonl") == played(toy, "r/base/test.jsonl") == [["openai:roleplayer-erring"]]
    assert played(toy, "other_user/roleplayer-terse/1/test.jsonl") == [["openai:roleplayer-terse"]]
    small = record("small", ORACLE="o", ROLEPLAYER="a b --roleplayer-weights 3 1", ITERATIONS="1", VARIANTS="main")
    assert all(flags["--roleplayer"] == ["a", "b"] and flags["--roleplayer-weights"] == ["3", "1"]
               for flags in of(small, "simulate.py"))


def test_the_small_run(record, tmp_path):
    commands = record("small", ORACLE="openai:o", ROLEPLAYER="openai:r@http://h/v1")
    tasks = [json.loads(line) for line in (tmp_path / "r/tasks.jsonl").read_text().splitlines()]
    assert Counter(row["split"] for row in tasks) == {"A": 20, "B": 20, "test": 20}
    assert of(commands, "generate_personas.py")[0]["--splits"] == ["A=10,B=10,test=10"]
    assert all(flags["--tasks"] == [f"{tmp_path}/r/tasks.jsonl"] and "--limit" not in flags
               for _, flags in commands if "--tasks" in flags)
    assert [flags["--output"][0].removeprefix(f"{tmp_path}/r/") for flags in of(commands, "train.py")] == [
        f"{variant}/{t}/model" for variant in ("main", "no_reg") for t in (1, 2)]


def test_each_stage_has_a_heading(record):
    commands = record("smoke")
    heads = [line for line in record.out.splitlines() if re.match(r"\d+/\d+ ", line)]
    assert [line.split()[0] for line in heads] == [f"{n}/20" for n in range(1, 21)]
    assert heads[0] == "1/20 personas" and "9/20 train main t=1" in heads and len(commands) == 20 + 2


def test_a_server_that_is_away_is_waited_for(record, tmp_path):
    for more in ({"STATUS": "75"}, {"STATUS": "1", "SIGN": "yes"}):            # accelerate makes 1 of every status
        (tmp_path / "record.sleeps").unlink(missing_ok=True)
        commands = record("smoke", AT="base/conversations.jsonl", TIMES="6", **more)
        assert (tmp_path / "record.sleeps").read_text().split() == ["60", "120", "240", "480", "600", "600"]
        assert record.said.count("a server is away") == 6 and commands[-1][0] == "report.py"
        assert len([1 for flags in of(commands, "simulate.py") if "base/conv" in flags["--output"][0]]) == 8    # 7, no_reg's


def test_other_ends_of_a_stage_end_the_run(record, tmp_path):
    for status in (1, 2, 137):
        commands = record("smoke", AT="simulate.py", STATUS=str(status), status=status)
        assert commands[-1][0] == "simulate.py"
    assert record("smoke", AT="simulate.py", STATUS="75", WAIT_HOURS="1", status=75)[-1][0] == "simulate.py"
    assert 3600 <= sum(map(int, (tmp_path / "record.sleeps").read_text().split())) <= 3600 + 600


def alive(pid):
    try:
        os.kill(pid, 0)
        return "Z" not in subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    except ProcessLookupError:
        return False


def hang(bash, tmp_path, **more):
    """A run whose first simulate.py does not come back: (run.sh's process, the pid of a grandchild)."""
    (tmp_path / "record.hangs").unlink(missing_ok=True)
    process = bash("smoke", AT="simulate.py", **more)
    for _ in range(1000):
        if (tmp_path / "record.hangs").exists() and (text := (tmp_path / "record.hangs").read_text()):
            return process, int(text)
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("name, status", [("TERM", 143), ("INT", 130), ("HUP", 129)])
def test_a_signal_ends_the_stage_at_once(name, status, bash, tmp_path):
    process, stage = hang(bash, tmp_path)
    begin = time.time()
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert process.wait(timeout=20) == status and time.time() - begin < 5
    assert not alive(stage), "it would go on beside the next start"


def test_one_run_at_a_time(bash, record, tmp_path):
    process, stage = hang(bash, tmp_path)
    tasks = (tmp_path / "r/tasks.jsonl").read_text()
    for mode in ("smoke", "toy"):
        second = bash(mode)
        assert second.communicate(timeout=20)[1] == f"run.sh: another run is at work in {tmp_path}/r\n" and second.returncode == 2
    assert len((tmp_path / "record.plans").read_text().splitlines()) == 1, "which might remove what is stale"
    assert process.poll() is None and alive(stage) and (tmp_path / "r/tasks.jsonl").read_text() == tasks
    process.terminate()
    process.wait(timeout=20)
    assert record("smoke")[-1][0] == "report.py"


def test_what_a_killed_run_has_left_running_is_ended(bash, record, tmp_path):
    process, stage = hang(bash, tmp_path, SERVE="python serve.py")
    process.kill()
    process.wait(timeout=20)
    assert alive(stage) and (tmp_path / "record.up").exists()
    commands = record("smoke")
    assert not alive(stage) and not (tmp_path / "record.up").exists() and commands[-1][0] == "report.py"


def test_usage():
    done = subprocess.run(["bash", "run.sh", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "bash run.sh smoke" in done.stderr and "set -eo" not in done.stderr
    assert "start it again with the same words" in done.stderr


def test_attribution(record, tmp_path):
    """Who asks and who answers, before and after training; the hidden prompt; the golds after each question."""
    run, commands = f"{tmp_path}/r", record("smoke", VARIANTS="main base_questions hidden turns", ITERATIONS="2")
    asked = {(flags["--variant"][0], flags["--iteration"][0]): (flags["--questioner"][0].removeprefix(run),
             flags["--conversations"][0].removeprefix(run), flags.get("--response-prompt", [""])[0], *flags.get("--metrics", ()))
             for flags in of(commands, "evaluate.py")}
    hidden = "prompts/personalisation.txt"
    assert asked["base_questions", "2"] == ("/main/2/model", "/base/test.jsonl", "", "win_rate")
    assert asked["base_hidden", "1"] == ("toy/base", "/base/test.jsonl", hidden, "win_rate")
    assert asked["hidden", "1"] == ("/hidden/1/model", "/hidden/1/test.jsonl", ""), "after training without the prompt"
    assert [flags.get("--response-prompt") for flags in of(commands, "select.py", "/hidden/")] == [[hidden], [hidden]]
    assert asked["main-after-2", "0"] == ("toy/base", "/main-after-2/0/test.jsonl", "", "log_prob")
    assert asked["main-after-1", "2"] == ("/main/2/model", "/main-after-1/2/test.jsonl", "", "log_prob")
    cut = {(flags["--conversations"][0], flags["--turns"][0], flags["--output"][0]) for flags in of(commands, "shorten.py")}
    assert cut == {(f"{run}/{'main/' * (t > 0)}{t or 'base'}/test.jsonl", str(k), f"{run}/main-after-{k}/{t}/test.jsonl")
                   for t in range(3) for k in (1, 2)}
    measured = {flags["--variant"][0] for flags in of(commands, "toy/measure.py")} if of(commands, "toy/measure.py") else set()
    assert not any("-after-" in name for name in measured), "there are no responses"
    commands = record("smoke", VARIANTS="main turns", SIMULATE_FLAGS="--max-turns 2")
    assert {flags["--turns"][0] for flags in of(commands, "shorten.py")} == {"1"}


def test_benchmark(record, tmp_path):
    run, who = f"{tmp_path}/r", {"ORACLE": "openai:o", "ROLEPLAYER": "openai:r@http://h/v1"}
    for model, name in (("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("openai:a/b@http://x:1/v1", "a/b")):
        commands, there = record("benchmark", model, **who), f"{run}/models/{name.replace('/', '-')}/1"
        assert not of(commands, "train.py") + of(commands, "select.py")
        assert [flags["--split"] for flags in of(commands, "gold.py")] == [["test"]]
        assert of(commands, "generate_personas.py")[0]["--splits"] == ["test=10"]
        base, ours = of(commands, "evaluate.py")
        assert base["--iteration"] == ["0"] and ours["--baseline"] == base["--output"] == [f"{run}/base/test"]
        assert (ours["--variant"], ours["--questioner"], ours["--output"]) == ([name], [model], [f"{there}/test"])
        assert ours["--base"] == ["mistralai/Mistral-7B-Instruct-v0.2"] != ours["--questioner"], "the golds are Q_BASE's to score"
        assert [flags["--questioner"] for flags in of(commands, "simulate.py")] == [["mistralai/Mistral-7B-Instruct-v0.2"], [model]]
    record("benchmark", status=2, **who)
    assert "benchmark: name the model" in record.said
