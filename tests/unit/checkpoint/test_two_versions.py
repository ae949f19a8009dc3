"""A checkpoint saved with one supported version of megatron-core continues with the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("two_versions_worker.py")
VENVS = [ROOT / ".venv", ROOT / ".venv-megatron-0.19"]
INTERPRETERS = [str(venv / "bin" / "python") for venv in VENVS if (venv / "installed.sha256").exists()]


def run(python: str, *arguments: str) -> dict:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [python, str(WORKER), *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(len(INTERPRETERS) < 2, reason="needs bash launch/test.sh --megatron 0.19 --set-up, beside .venv")
@pytest.mark.skipif(sys.version_info < (3, 12), reason="runs with megatron-core 0.19's tests")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("saved_by", [0, 1])
def test_a_checkpoint_continues_with_the_other_version(tmp_path, saved_by, dtype):
    """Weights, Adam's moments, schedule, expert bias, MTP layer: the next two steps are those of the run that saved."""
    expected = run(INTERPRETERS[saved_by], "save", str(tmp_path), dtype)
    result = run(INTERPRETERS[1 - saved_by], "continue", str(tmp_path), dtype)
    assert expected["version"] != result["version"], ".venv was made with Python 3.12 too: remove it, and R1MEGA_PYTHON"
    assert expected["steps"][0][1] > expected["steps"][1][1]  # it learns, so that equal losses say something
    tolerance = 1e-6 if dtype == "float32" else 1e-4
    for theirs, ours in zip(expected["steps"], result["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    assert result["sums"] == pytest.approx(expected["sums"], rel=tolerance, abs=tolerance)
