"""select.py has the name of a standard module: programs started in this folder must get the real one."""
import os
import shutil
import subprocess
import sys

from conftest import ROOT

REAL = "import select, sys; assert hasattr(select, 'select') and not hasattr(select, 'select_best'), select"


def python(*args, **more):
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=100, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_may_be_given_in_other_ways(tmp_path):
    """On PYTHONPATH, through symbolic links to the folder and to the file, and beside another clone."""
    (tmp_path / "link").symlink_to(ROOT)
    for name in ("linked", "clone"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked" / "select.py").symlink_to(ROOT / "select.py")
    shutil.copy(ROOT / "select.py", tmp_path / "clone")
    folders = [ROOT, *(tmp_path / name for name in ("link", "linked", "clone"))]
    python("-c", REAL, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))})


def test_a_launcher_runs_the_stage():
    """`accelerate launch select.py`, by the module behind the command; torchrun's is beneath."""
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    assert "Algorithm 1, lines 4 and 5" in python(*launcher, "select.py", "--help")
