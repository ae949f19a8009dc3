"""What the generator of this machine cannot hold is said before anything starts."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from r1mega import platform
from r1mega.config.load import load_config
from r1mega.errors import ConfigError, PlatformError, R1MegaError
from r1mega.platform.validate import validate_platform


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("rollout.quantization=fp8", PlatformError, "FP8 kernels for GPUs.*leave it out"),
        ("rollout.kv_cache_dtype=fp8", ConfigError, "latent attention has its cache in model.dtype"),
    ],
)
def test_a_cpu_has_neither_fp8_weights_nor_an_fp8_latent_cache(tmp_path, override, kind, message):
    shutil.copy("configs/nano/model/config.json", tmp_path)
    config = load_config(Path("configs/nano/zero.yaml"), [f"model.path={tmp_path}", override])
    with pytest.raises(R1MegaError, match=message) as found:
        validate_platform(config)
    assert found.type is kind


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 0), True), ((8, 9), False)])
def test_a_gpu_without_fp8_is_refused(tmp_path, monkeypatch, capability, is_refused):
    shutil.copy("configs/nano/model/config.json", tmp_path)
    gpu = platform.Platform("cuda", torch.device("cuda"), "nccl", False, False)
    monkeypatch.setattr(platform, "current", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("r1mega_kernels.backend", lambda device: "present")
    config = load_config(Path("configs/nano/zero.yaml"), [f"model.path={tmp_path}", "rollout.quantization=fp8"])
    with pytest.raises(PlatformError, match="of compute capability 8.0 has no FP8") if is_refused else nullcontext():
        validate_platform(config)
