"""A process that runs its command anew in its place (platform/launcher.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[3]


def test_ranks_start_anew_and_meet_again():
    """Under torchrun: the same processes to the launcher, which starts none and sees one exit code each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "tests/unit/platform/restart_worker.py"]  # fmt: skip
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    seen = re.findall(r"start (\d) rank (\d) pid (\d+) sum 2", done.stdout)
    assert sorted((start, rank) for start, rank, _ in seen) == [(s, r) for s in "012" for r in "01"], done.stdout
    assert len({pid for _, _, pid in seen}) == 2
