"""How libraries are imported: seconds of a processor in every start."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, nobody looks for garbage. Imports make none, and what they make is gone through again and again: with torch and vLLM a
    sixth of their time. Around imports only: what a model leaves behind may be large.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
