"""Imports vLLM on a CPU, without what it would import for nothing there: seconds of a processor in every start."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

NOT_USED = ("torch._inductor.lowering", "scipy.optimize", "scipy.signal")
"""What vLLM imports for nothing here, and does without: Inductor, to know its own operators sooner where it compiles
(vllm/env_override.py), and of scipy what losses of object detection (transformers/loss) and resampling of audio
(vllm/multimodal/audio.py) use: those are not to be had in this process."""

STOOD_IN_FOR = {
    "vllm.reasoning": ("ReasoningParserManager",),
    "vllm.parser.engine.adapters": ("ParserEngineReasoningAdapter",),
    "vllm.renderers.chat_utils": (
        "PROMPT_EMBEDS_PLACEHOLDER_TOKEN", "ChatTemplateResolutionError", "load_chat_template", "parse_chat_messages",
        "parse_chat_messages_async",
    ),
}  # fmt: skip
"""Modules of a server of chats, and the names that an engine imports of each: with them come the types of OpenAI's interface, five hundred
modules. An engine here gets tokens, and does not tell thoughts from answers (vllm/config/reasoning.py, v1/structured_output, renderers/hf.py):
neither is to be had of vLLM in this process."""
ENGINE = (
    "vllm.v1.structured_output", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.renderers.hf"
)  # fmt: skip


def import_vllm() -> None:
    """Without NOT_USED and STOOD_IN_FOR. Each is kept from the one module that would import it: what is imported beside (scikit-learn by transformers,
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
    with stood_in_for():
        import vllm.config

        with hidden("scipy.signal"):
            import vllm.multimodal.audio  # noqa: F401
        for module in ENGINE:
            importlib.import_module(module)


@contextlib.contextmanager
def stood_in_for() -> Iterator[None]:
    """Inside, modules STOOD_IN_FOR that are not there already have those names alone, of empty classes; afterwards they can be imported."""
    absent = [name for name in STOOD_IN_FOR if name not in sys.modules]
    for name in absent:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update({attribute: type(attribute, (), {}) for attribute in STOOD_IN_FOR[name]})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


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
