"""report/sweep.sh changes one setting a run, once; report/sweep.py counts what it says."""
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, write_rows
from report import sweep

ROW = {"task_id": "A", "persona_id": "a", "sample": 0, "conversation": [
    {"role": "assistant", "content": "Diet?"}, {"role": "user", "content": "Vegan."}]}


def test_a_run_changes_one_setting_keeps_what_is_the_same_and_is_made_once(tmp_path):
    (tmp_path / "report").mkdir()
    for name in ("run.sh", "settings", "toy", "report/sweep.sh"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("personas.jsonl", "base/test.jsonl", "base/conversations.jsonl", "base/scores-gold.jsonl",
                 "base/selected.jsonl"):
        file = tmp_path / "runs/sweep/main-100" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    write_rows(tmp_path / "runs/sweep/main-100/gold-A.jsonl", [
        {"task_id": "A", "persona_id": who, "gold": f"Your diet is {who}."} for who in ("vegan", "halal")])
    (done := tmp_path / "runs/sweep/k-5-100/seconds").parent.mkdir()
    done.touch()
    for expected in (["n-2", "n-5", "n-20", "oracle-0.1", "oracle-0.3", "oracle-1", "k-3"], []):
        told = subprocess.run(["bash", "report/sweep.sh", "n", "oracle", "k"], cwd=tmp_path, text=True,
                              capture_output=True, env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                                                        "PRINT": "1"})
        assert told.returncode == 2 and "main-101 is not there: bash report/sweep.sh main" in told.stderr, told
        assert re.findall(r"^runs/sweep/([\w.-]+)-100$", told.stdout, re.M) == expected
    logs = {name: (tmp_path / f"runs/sweep/{name}-100/log").read_text() for name in ("n-2", "k-3", "oracle-0.3")}
    assert "--samples 2 " in logs["n-2"] and "--samples 10" not in logs["n-2"] and "--k " not in logs["n-2"]
    assert "--samples 10 " in logs["k-3"] and re.search(r"select.py .* --k 3 ", logs["k-3"])
    assert " --gold runs/sweep/wrong-0.3.jsonl " in logs["oracle-0.3"]
    copied = [{path.name for path in (tmp_path / f"runs/sweep/{name}-100/base").iterdir()} for name in logs]
    assert copied == [{"test.jsonl"}, {"test.jsonl", "conversations.jsonl", "scores-gold.jsonl"},
                      {"test.jsonl", "conversations.jsonl"}]


def test_best_of_n_and_entropy_are_those_of_all_draws():
    values = [3.0, -1.0, 4.0, 1.0, -5.0]
    for n in (1, 2, 4, 5):
        draws = list(itertools.combinations(values, n))
        assert sweep.best_of(values, n) == pytest.approx(sum(map(max, draws)) / len(draws))
    assert sweep.entropy(["a", "b", "c", "d"]) == 2 and sweep.entropy(["a", "a"]) == 0


def test_several_seeds_show_their_spread():
    found = sweep.over_seeds([{"gain": (gain, None)} for gain in (1.0, 2.0, 4.5)])
    sd = ((1.5 ** 2 + 0.5 ** 2 + 2 ** 2) / 2) ** 0.5
    assert found["gain"] == (2.5, pytest.approx(2.5 - sd), pytest.approx(2.5 + sd), "2.50 ± 1.80")


def test_a_row_is_of_its_iteration_and_its_runs(tmp_path, monkeypatch, capsys):
    for run, gains in (("main-100", [2.0, 3.0]), ("main-101", [4.0]), ("main-103", [9.0]), ("k-3-100", [7.0])):
        for t, gain in enumerate(gains, 1):
            (tmp_path / run / f"main/{t}/test").mkdir(parents=True)
            (tmp_path / run / "base").mkdir(exist_ok=True)
            for name in (f"main/{t}/test.jsonl", f"main/{t}/test/verdicts.jsonl", f"main/{t}/selected.jsonl",
                         "base/selected.jsonl"):
                write_rows(tmp_path / run / name, [ROW])
        write_rows(tmp_path / run / "results.jsonl", [{
            "variant": "main", "iteration": t, "metric": "gold_log_prob_gain", "condition": "q_experimental",
            "roleplayer": "r", "split": "test", "mean": gain, "sem": 1.0, "interval_95": [gain - 1, gain + 1], "n": 4}
            for t, gain in enumerate(gains, 1)])
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--runs", str(tmp_path)])
    sweep.main()
    tables = dict(re.findall(r"^(\w+)\n.*\n((?:\S.*\n)+)", capsys.readouterr().out, re.M))
    cells = {name: [re.split("  +", line)[1] for line in table.splitlines()] for name, table in tables.items()}
    assert cells["iterations"] == ["3.00 ± 1.41", "3.00 (2.00 to 4.00)"]           # of 2 and 4; of 3
    assert cells["k"] == ["3.00 ± 1.41", "7.00 (6.00 to 8.00)"] and len(cells["seeds"]) == 3
