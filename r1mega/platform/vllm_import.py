"""Imports vLLM on a CPU, without what it would import for nothing there: seconds of a processor in every start."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

NOT_USED = ("torch._inductor.lowering", "scipy.optimize", "scipy.signal")
"""What vLLM imports for nothing here, and does without: Inductor, to know its own operators sooner where it compiles
(vllm/env_override.py), and of scipy what losses of object detection (transformers/loss) and resampling of audio
(vllm/multimodal/audio.py) use: those are not to be had in this process."""


def import_vllm() -> None:
    """Without NOT_USED. Each is kept from the one module that would import it: what is imported beside (scikit-learn by transformers,
    where it is installed) may need it."""
    import transformers.utils

    with hidden("torch._inductor.lowering"):
        import vllm.env_override
    found = transformers.utils.is_scipy_available
    transformers.utils.is_scipy_available = lambda: False
    try:
        import transformers.loss.loss_utils
    finally:
        transformers.utils.is_scipy_available = found
    import vllm.config

    with hidden("scipy.signal"):
        import vllm.multimodal.audio  # noqa: F401


@contextlib.contextmanager
def hidden(*modules: str) -> Iterator[None]:
    """Inside, these are not to be found, but for those that are there already: for what others import and do without.

    In all threads, and by whatever is imported meanwhile: around one module, whose own imports have come before.
    """
    absent = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: importing it is a ModuleNotFoundError
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
