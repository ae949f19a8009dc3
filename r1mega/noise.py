"""What the libraries say that nobody can act on: each message by name, silenced before they are imported. Imports none of them.

Only these: any other warning of the same module is shown.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings

_WARNINGS = (
    r"(Transformer Engine|Apex).*not installed",  # megatron-core: `r1mega doctor` tells what is installed
    "full scope is deprecated",  # megatron-core
    r"`torch\.distributed\.reduce_op` is deprecated",  # vLLM looks at every name of every module
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",  # megatron-core calls them
    r"The \.grad attribute of a Tensor that is not a leaf",  # megatron-core asks every parameter whether it has a gradient
)
"""Warnings (Python's) by what they begin with."""

_LOG_MESSAGES = {
    "torch._library.triton": "Triton not available",  # a CPU has none, and needs none
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # HybridModel has neither our names nor 0.16.1's
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",  # what it computes then is right
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",  # its plan is used, not its saving
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",  # 0.16.1 too keeps so what is no tensor
}
"""Log messages that ask nothing of the user, by logger."""

_VARIABLES = {
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Against bars over the loading of weights, the capture of graphs, the writing of files: a stage has one line of its own. Read at
import; what the environment has already wins.
"""


def silence() -> None:
    """Leave out the messages above, in this process. Idempotent."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, message in _LOG_MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, functools.partial) for known in logger.filters):
            logger.addFilter(functools.partial(_says_else, message))


def _says_else(known: str, record: logging.LogRecord) -> bool:
    return known not in str(record.msg)
