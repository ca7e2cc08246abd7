"""The benchmark runs through with a model of no size: its figures mean nothing, but the sides' results must agree."""
import os
import subprocess
import sys

from conftest import ROOT, read_lines


def test_the_sides_agree_and_each_comparison_has_a_row(tmp_path):
    stages = ["simulate", "score", "train"]                       # (tests/test_exact.py compares with TRL)
    done = subprocess.run([sys.executable, ROOT / "benchmarks/run.py", "--output", tmp_path / "b.jsonl", "--rounds",
                           "1", "--hidden", "64", "--layers", "1", "--rows", "5", "--only", *stages], text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # more threads wait
    assert done.returncode == 0, done.stderr
    rows = read_lines(tmp_path / "b.jsonl")
    assert [row["stage"] for row in rows] == stages
    for row in rows:
        assert row["machine"]["cores"] and row["configuration"]["hidden"] == 64
        ratio, least, most = row["ratio"]
        assert 0 < least <= ratio <= most and row["seconds"] > 0 and row["difference"] < 0.1
