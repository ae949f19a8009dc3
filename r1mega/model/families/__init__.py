"""Model families: every module in this folder is one, found by the `model_type` of a config.json.

A family is the three functions and the name of `Family`; docs/extending.md shows how to write one.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol

from r1mega.config.model_files import HFConfig
from r1mega.errors import ConfigError
from r1mega.model.architecture import Architecture


class Family(Protocol):
    """What a module in this folder defines. hf: config.json; each raises ConfigError for what it does not cover."""

    MODEL_TYPES: tuple[str, ...]

    def architecture(self, hf: HFConfig) -> Architecture:
        """What the model is made of."""
        ...

    def megatron_arguments(self, hf: HFConfig, model: Any) -> dict[str, Any]:
        """Arguments of Megatron's TransformerConfig that say what the model computes. model: ModelConfig."""
        ...

    def position_arguments(self, hf: HFConfig) -> dict[str, Any]:
        """Arguments of GPTModel for its position embeddings."""
        ...


def _find() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        family: Any = importlib.import_module(f"{__name__}.{module.name}")
        if taken := found.keys() & set(family.MODEL_TYPES):
            raise ValueError(f"{family.__name__}: another family has {', '.join(sorted(taken))}")
        found |= dict.fromkeys(family.MODEL_TYPES, family)
    return found


FAMILIES = _find()


def family_of(hf: HFConfig) -> Family:
    """The module that knows this model_type. Raises ConfigError for others."""
    family = FAMILIES.get(hf.get("model_type", ""))
    if family is None:
        raise ConfigError(f"config.json: model_type {hf.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    return family


def architecture_of(hf: HFConfig) -> Architecture:
    """What the model of a config.json is made of. Raises ConfigError for unknown families and missing keys."""
    return family_of(hf).architecture(hf)
