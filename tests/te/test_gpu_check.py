"""The FP8 step of tools/gpu_check.py over the stand-in: by the command it runs on a GPU alone. Minutes, when asked for:

R1MEGA_CLAIMS=1 python -m pytest tests/te/test_gpu_check.py
"""

from __future__ import annotations

import os

import pytest

from tests.dist.launch import launch
from tests.te.fp8_worker import RECIPES, gpu_check_step


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("R1MEGA_CLAIMS"), reason="minutes of a core: set R1MEGA_CLAIMS")
def test_fp8_steps_are_within_fp8s_error_and_quantised(tmp_path):
    launch(gpu_check_step, 1, "make_reference", tmp_path)  # by the local layers, as on a GPU machine
    [found] = launch(gpu_check_step, 1, "fp8", tmp_path, preload="tests.te.preload", timeout_seconds=3000)
    assert found.figures["the device has a recipe"] and not found.failures and not found.notes
    for recipe in RECIPES:  # bfloat16 alone: 0.017
        assert found.figures[f"bfloat16 {recipe} logits, step 1: largest log-prob error"] > 0.03
