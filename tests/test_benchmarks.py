"""The benchmark runs through with a model of no size: its figures mean nothing, but the sides' results must agree."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT, read_lines


def benchmark(output, *flags):
    done = subprocess.run([sys.executable, ROOT / "benchmarks/run.py", "--output", output, "--rounds", "1",
                           "--hidden", "64", "--layers", "1", "--rows", "5", *flags], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})      # more threads than cores wait for one another
    assert done.returncode == 0, done.stderr
    rows = read_lines(output)
    assert all(row["machine"]["cores"] and row["configuration"]["hidden"] == 64 for row in rows)
    return rows


def test_the_sides_agree_and_each_comparison_has_a_row(tmp_path):
    stages = ["simulate", "score", "train"]                       # (tests/test_exact.py compares with TRL)
    rows = benchmark(tmp_path / "b.jsonl", "--only", *stages)
    assert [row["stage"] for row in rows] == stages
    for row in rows:
        ratio, least, most = row["ratio"]
        assert 0 < least <= ratio <= most and row["seconds"] > 0 and row["difference"] < 0.1


@pytest.mark.slow
def test_scaling_has_a_row_for_each_stage_and_size(tmp_path):
    rows = benchmark(tmp_path / "s.jsonl", "--only", "scaling", "--pairs", "3")
    assert [(row["stage"], row["pairs"]) for row in rows] == [
        *((f"{stage}.py", pairs) for pairs in (3, 6, 12) for stage in ("simulate", "select", "train", "evaluate")),
        ("finished", 650)]
    assert all(row["seconds"] > 0 and row["MiB"] > 30 for row in rows)
