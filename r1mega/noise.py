"""What the libraries say that nobody can act on: each message by name, silenced before they are imported.

Imports none of them. Only these: any other warning of the same module is shown, and every error.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from pathlib import Path

_WARNINGS = (
    (r"(Transformer Engine|Apex).*not installed", ""),  # megatron-core: `r1mega doctor` tells what is installed
    ("full scope is deprecated", ""),  # megatron-core
    (r"`torch\.distributed\.reduce_op` is deprecated", ""),  # vLLM looks at every name of every module
    # megatron-core calls them
    (r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated", ""),
    # of experts that are not cut, beside layers that are: the config's one switch is of both
    (r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1\.", r"megatron\.core\."),
    # megatron-core asks every parameter whether it has a gradient; of anyone else it is a mistake
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\.core\."),
)
"""Warnings (Python's) by what they and the names of the modules that they are of begin with."""

NVIDIA = Path("/dev/nvidiactl")
"""There where the machine has a GPU; told without torch."""

_TRITON = "torch._library.triton"
_LOG_MESSAGES = {
    _TRITON: "Triton not available",  # a CPU has none, and needs none; shown where there is a GPU
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # HybridModel has neither our names nor 0.16.1's
    # what it computes then is right
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    # its plan is used, not its saving
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # 0.16.1 too keeps so what is no tensor
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}
"""Log messages that ask nothing of the user, by logger."""

_VARIABLES = {
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Against bars over loading weights, capturing graphs, writing files: a stage has one line of its own.
Read at import; what the environment has already wins.
"""


def silence() -> None:
    """Leave out the messages above, in this process. Idempotent."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    for message, module in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
    for name, message in _LOG_MESSAGES.items():
        logger = logging.getLogger(name)
        known = any(isinstance(f, functools.partial) and f.func is _is_to_be_shown for f in logger.filters)
        if not known and not (name == _TRITON and NVIDIA.exists()):
            logger.addFilter(functools.partial(_is_to_be_shown, message))


def _is_to_be_shown(known: str, record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or known not in str(record.msg)
