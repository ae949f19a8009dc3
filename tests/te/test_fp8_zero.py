"""RL in FP8 to nine tenths, as docs/fp8.md measures it: three quarters of an hour of a core a seed, so only when asked for.

    python tools/run_claims.py --claims 1 --seeds 1 2 3                   # the bases, and float32's accuracy
    R1MEGA_CLAIMS=runs/claims python -m pytest tests/te/test_fp8_zero.py

Without R1MEGA_CLAIMS it is skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import metrics
from tests.processes import REPOSITORY, environment

CLAIMS = os.environ.get("R1MEGA_CLAIMS")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(
    not CLAIMS, reason="hours of a core: set R1MEGA_CLAIMS to the folder of seed1, seed2, seed3 with a base in each"
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_zero_in_fp8_reaches_nine_tenths(tmp_path, seed):
    base = Path(CLAIMS).resolve() / f"seed{seed}" / "base"
    command = [
        sys.executable, "-m", "tests.te.run", "train", "configs/nano/zero_fp8.yaml", f"run_dir={tmp_path}/run", f"seed={seed}",
        f"model.path={base}/hf", f"data.prompts=[{base}/data/train.jsonl]", f"evaluate.data={base}/data/eval.jsonl", "threads=1",
    ]  # fmt: skip
    subprocess.run(command, env=environment(), cwd=REPOSITORY, check=True)
    evaluations = [json.loads(line) for line in (tmp_path / "run/evaluations.jsonl").read_text().splitlines()]
    assert evaluations[0]["eval/accuracy"] < 0.5
    assert evaluations[-1]["eval/accuracy"] >= 0.9
    for line in metrics(tmp_path / "run"):  # FP8 against bfloat16: there, and small
        assert 1e-4 < line["logprob/diff_mean"] < 0.05
