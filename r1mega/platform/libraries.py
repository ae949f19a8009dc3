"""Transformer Engine and apex: missing, broken or working, found out by importing what is used of them.

That a package is there says little: Transformer Engine's own __init__ swallows the error of a compiled part that does not
load, and PyPI's `apex` is another package altogether.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Literal

from r1mega.errors import PlatformError

TRANSFORMER_ENGINE_VERSION = "2.20.2"
"""What requirements/cuda.txt pins: the one that the tests run."""

INSTALL = "bash launch/install_cuda.sh"


@dataclass(frozen=True, slots=True)
class Library:
    """problem: of one that is broken: what is wrong, and what to do; else empty."""

    name: str
    state: Literal["missing", "broken", "works"]
    version: str | None = None
    problem: str = ""

    @property
    def works(self) -> bool:
        return self.state == "works"

    def check(self) -> None:
        """Raises PlatformError, saying what to do, unless it works."""
        if not self.works:
            raise PlatformError(self.problem or f"{self.name} is not installed; {INSTALL}")


@cache
def transformer_engine() -> Library:
    """Its layers for torch, of the pinned version."""
    used = {
        "transformer_engine.pytorch": ("Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention", "RMSNorm"),
        "transformer_engine.pytorch.optimizers": ("FusedAdam",),
    }
    found = _look("Transformer Engine", "transformer_engine", "transformer-engine", used)
    release = (found.version or TRANSFORMER_ENGINE_VERSION).partition("+")[
        0
    ]  # built from a checkout it says of which commit
    if found.state == "missing" or release == TRANSFORMER_ENGINE_VERSION:
        return found
    return Library(
        found.name, "broken", found.version,
        f"Transformer Engine {found.version} is installed, r1mega is made for and tested with {TRANSFORMER_ENGINE_VERSION}; {INSTALL}",
    )  # fmt: skip


@cache
def apex() -> Library:
    """NVIDIA's, with the extensions that launch/install_cuda.sh builds."""
    used = {"apex.optimizers": ("FusedAdam",), "amp_C": (), "fused_weight_gradient_mlp_cuda": ()}
    return _look("apex", "apex", "apex", used)


def _look(name: str, package: str, distribution: str, used: dict[str, tuple[str, ...]]) -> Library:
    if importlib.util.find_spec(package) is None:
        return Library(name, "missing")
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = None
    try:
        for module, names in used.items():
            loaded = importlib.import_module(module)  # also where the package's __init__ swallowed its error
            absent = [attribute for attribute in names if not hasattr(loaded, attribute)]
            if absent:
                raise ImportError(f"{module} has no {', '.join(absent)}")
    except Exception as error:  # a broken build fails in any way: ImportError, OSError, RuntimeError, ...
        return Library(name, "broken", version, _problem(name, version, error))
    return Library(name, "works", version)


def _problem(name: str, version: str | None, error: Exception) -> str:
    import torch

    text = f"{type(error).__name__}: {error}"
    why = ""
    if "undefined symbol" in text:
        why = f"; it was built for another torch than {torch.__version__}: build it again, without build isolation"
    elif "shared object file" in text or "transformer_engine_torch" in text:
        why = "; its compiled part for torch is not installed"
    elif name == "apex":
        why = "; PyPI's apex is another package: NVIDIA's is built from its source"
    return f"{name}{f' {version}' if version else ''} is installed and does not load ({text}){why}; {INSTALL}, or pip uninstall it"
