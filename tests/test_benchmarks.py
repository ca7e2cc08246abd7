"""The benchmark runs through with a model of no size: its figures mean nothing, but the sides' results must agree."""
import json
import os
import subprocess
import sys

from conftest import ROOT


def test_the_sides_agree_and_each_comparison_has_a_row():
    stages = ["simulate", "score", "train"]                       # (tests/test_exact.py compares with TRL)
    done = subprocess.run([sys.executable, ROOT / "benchmarks/run.py", "--rounds", "1", "--hidden", "64", "--layers",
                           "1", "--rows", "5", "--only", *stages], text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # more threads wait
    assert done.returncode == 0, done.stderr
    machine, *rows = done.stdout.splitlines()
    assert "torch" in machine
    for stage, row in zip(stages, map(json.loads, rows), strict=True):
        ratio, least, most = row["ratio"]
        assert row["stage"] == stage and 0 < least <= ratio <= most and row["seconds"] > 0 and row["difference"] < 0.1
