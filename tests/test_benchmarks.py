"""The benchmark runs through with a model of no size: its figures mean nothing, but the sides' results must agree."""
import os
import subprocess
import sys

from conftest import ROOT, read_lines


def test_the_sides_agree_and_each_comparison_has_a_row(tmp_path):
    small = ["--rounds", "2", "--hidden", "64", "--layers", "1", "--rows", "10", "--texts", "6", "--threads", "1"]
    done = subprocess.run([sys.executable, ROOT / "benchmarks/run.py", "--only", "simulate", "train", "matrices", *small,
                           "--output", tmp_path / "b.jsonl"], capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    rows = read_lines(tmp_path / "b.jsonl")
    assert [(row["stage"], row["against"]) for row in rows] == [("simulate, 3 turns", "wrapper"), ("train, a step of 64", "wrapper")]
    assert all(set(row) == {"stage", "against", "ratio", "rounds", "min", "max"} for row in rows)
    assert all(0 < row["min"] <= row["ratio"] <= row["max"] and row["rounds"] == 2 for row in rows)
    assert "scoring reaches" in done.stdout
