"""What the generator of this machine cannot hold is said before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

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
