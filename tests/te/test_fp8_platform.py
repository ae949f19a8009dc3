"""A recipe that the device lacks is refused with the config, in the words of Transformer Engine's own checks."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

from r1mega.config.load import load_config
from r1mega.errors import PlatformError
from r1mega.platform import Platform


@pytest.mark.parametrize(
    ("capability", "recipe", "problem"),
    [
        ((9, 0), "tensorwise", None),
        ((9, 0), "blockwise", None),
        ((8, 9), "tensorwise", None),
        ((8, 9), "blockwise", r"blockwise: .*capability 9\.0 or higher.* has compute capability 8\.9; set model\.fp8=tensorwise or model\.fp8=off$"),
        ((8, 0), "tensorwise", r"tensorwise: Device compute capability 8\.9 or higher.* capability 8\.0; set model\.fp8=off$"),
        ((8, 0), "blockwise", r"blockwise: .* has compute capability 8\.0; set model\.fp8=off$"),
        ((10, 0), "tensorwise", None),
        ((10, 0), "blockwise", None),
    ],
)  # fmt: skip
def test_recipes_by_device(transformer_engine, monkeypatch, caplog, capability, recipe, problem):
    from transformer_engine.pytorch import quantization, utils

    from r1mega.platform import validate

    here = Platform("cuda", torch.device("cuda", 0), "nccl", has_transformer_engine=True, has_apex=False)
    monkeypatch.setattr(validate.platform, "current", lambda: here)
    for module in (quantization, utils):
        monkeypatch.setattr(module, "get_device_compute_capability", lambda: capability)
    for answer in ("_FP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
        monkeypatch.setattr(quantization, answer, None)
    config = load_config(Path("configs/nano/base.yaml"), [f"model.fp8={recipe}", "model.log_probs=reference"])
    with caplog.at_level(logging.WARNING):
        if problem is None:
            validate.validate_platform(config)
        else:
            with pytest.raises(PlatformError) as caught:
                validate.validate_platform(config)
            assert re.search(problem, str(caught.value)), str(caught.value)
    assert ("MXFP8" in caplog.text) == (recipe == "blockwise" and capability >= (10, 0))


def test_fp8_without_transformer_engine_is_refused(monkeypatch):
    from r1mega.platform import validate

    here = Platform("cpu", torch.device("cpu"), "gloo", has_transformer_engine=False, has_apex=False)
    monkeypatch.setattr(validate.platform, "current", lambda: here)
    config = load_config(Path("configs/nano/base.yaml"), ["model.fp8=tensorwise"])
    with pytest.raises(
        PlatformError, match=r"model\.fp8 = tensorwise needs Transformer Engine and a GPU.*set model\.fp8=off"
    ):
        validate.validate_platform(config)
