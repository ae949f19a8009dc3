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


DTYPES = ["float32", "bfloat16"]


def run(python: str, *asked: tuple[str, str, str]) -> list[dict]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [python, str(WORKER), *(word for each in asked for word in each)],
        capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(saved by, dtype): (the run that saved, what the other version made of its checkpoint)}, of three starts."""
    places = [{dtype: str(tmp_path_factory.mktemp(f"by{saved_by}")) for dtype in DTYPES} for saved_by in (0, 1)]
    save, go_on = ([[(do, place[dtype], dtype) for dtype in DTYPES] for place in places] for do in ("save", "continue"))
    saved = [run(INTERPRETERS[0], *save[0]), []]
    both = run(INTERPRETERS[1], *go_on[0], *save[1])
    continued, saved[1] = [both[: len(DTYPES)]], both[len(DTYPES) :]
    continued.append(run(INTERPRETERS[0], *go_on[1]))
    pairs = {saved_by: zip(saved[saved_by], continued[saved_by], strict=True) for saved_by in (0, 1)}
    return {(saved_by, dtype): pair for saved_by in (0, 1) for dtype, pair in zip(DTYPES, pairs[saved_by], strict=True)}


@pytest.mark.skipif(len(INTERPRETERS) < 2, reason="needs bash launch/test.sh --megatron 0.19 --set-up, beside .venv")
@pytest.mark.skipif(sys.version_info < (3, 12), reason="runs with megatron-core 0.19's tests")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("saved_by", [0, 1])
def test_a_checkpoint_continues_with_the_other_version(runs, saved_by, dtype):
    """Weights, Adam's moments, schedule, expert bias, MTP layer: the next two steps are those of the run that saved."""
    expected, result = runs[saved_by, dtype]
    assert expected["version"] != result["version"], ".venv was made with Python 3.12 too: remove it, and R1MEGA_PYTHON"
    assert expected["steps"][0][1] > expected["steps"][1][1]  # it learns, so that equal losses say something
    tolerance = 1e-6 if dtype == "float32" else 1e-4
    for theirs, ours in zip(expected["steps"], result["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    assert result["sums"] == pytest.approx(expected["sums"], rel=tolerance, abs=tolerance)
