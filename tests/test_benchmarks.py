"""The benchmark runs through with a model of no size: its figures mean nothing, but the sides' results must agree."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT, read_lines


def test_the_sides_agree_and_each_comparison_has_a_row(tmp_path):
    small = ["--rounds", "1", "--hidden", "64", "--layers", "1", "--rows", "10", "--texts", "6", "--threads", "1"]
    done = subprocess.run([sys.executable, ROOT / "benchmarks/run.py", "--only", "simulate", "score", "train", "limits", "paper", *small,
                           "--output", tmp_path / "b.jsonl"], capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    rows = read_lines(tmp_path / "b.jsonl")
    assert [row["stage"] for row in rows] == ["simulate, 3 turns", "simulate, decoding steps", "simulate, steps nearly empty",
                                              "score", "score, 32,000 words", "train, a step of 64"]
    assert rows[1]["ratio"] > 1.2, "others take the places of rows that have ended"
    assert all(set(row) == {"stage", "against", "ratio", "rounds", "min", "max"} for row in rows)
    assert all(0 < row["min"] <= row["ratio"] <= row["max"] and row["rounds"] == 1 for row in rows)
    assert all(words in done.stdout for words in ("scoring reaches", "a decoding step of 10 rows", "(respond)"))


@pytest.mark.slow
def test_scaling_has_a_row_for_each_stage_and_size(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "benchmarks/scaling.py", "--pairs", "3", "--finished", "5", "4",
                           "--output", tmp_path / "s.jsonl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_lines(tmp_path / "s.jsonl")
    assert [(row["stage"], row["pairs"]) for row in rows] == [
        *((stage, pairs) for pairs in (3, 6, 12) for stage in ("gold", "simulate", "select", "train", "evaluate")),
        ("simulate, finished", 20)]
    assert all(row["seconds"] > 0 and row["MiB"] > 30 for row in rows)
