"""HF config.json -> plain values, whichever version of transformers wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1mega.config.model_files import HFConfig
from r1mega.errors import ConfigError

TRANSFORMERS_MODEL_TYPES = {"kimi_k2": "deepseek_v3"}
"""Models that transformers has under another `model_type` only. config.json keeps its own, which vLLM knows."""


def transformers_config(directory: Path) -> Any:
    """transformers' config of an HF directory. No code of the directory is run, whatever `auto_map` names."""
    from transformers import AutoConfig

    hf = json.loads((Path(directory) / "config.json").read_text())
    if (model_type := TRANSFORMERS_MODEL_TYPES.get(hf.get("model_type"))) is None:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    plain = {key: value for key, value in hf.items() if key not in ("model_type", "auto_map")}
    return AutoConfig.for_model(model_type, **plain)


def as_dict(config: Any) -> dict[str, Any]:
    """config.json's content, or a transformers config, as a dict."""
    return dict(config) if isinstance(config, Mapping) else config.to_dict()


def require(config: HFConfig, *keys: str) -> list[Any]:
    """The values of keys, all numbers, that a model cannot do without. Raises ConfigError naming every one that is missing
    or no number."""
    model_type = config.get("model_type")
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)} (model_type {model_type!r})")
    values = [config[key] for key in keys]
    wrong = [
        f"{key} = {value!r}" for key, value in zip(keys, values, strict=True) if not isinstance(value, (int, float))
    ]
    if wrong:
        raise ConfigError(f"config.json: {', '.join(wrong)} should be a number (model_type {model_type!r})")
    return values


def refuse(config: HFConfig, **unsupported: Any) -> None:
    """ConfigError when a key has another value than the one that is supported (absent keys pass)."""
    for key, supported in unsupported.items():
        value = config.get(key, supported)
        if value != supported:
            raise ConfigError(f"config.json: {key} = {value!r} is not supported, only {supported!r}")


def rope(config: HFConfig) -> dict[str, Any]:
    """{'rope_type': 'default' | 'yarn' | 'llama3' | ..., 'rope_theta': float, ...} from either spelling.

    transformers 5 writes `rope_parameters`; 4 and the published checkpoints write `rope_theta` and `rope_scaling`.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters["rope_type"] = parameters.get("rope_type") or parameters.pop("type", None) or "default"
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return parameters
