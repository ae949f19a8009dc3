"""What hangs on a model's parameters alone, each of which is listed once in a process: a save, and the largest of them."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch

from r1mega.checkpoint.parameters import parameters
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import Stage, TrainingStage
from r1mega.config.stages.rl import RLStage


class _Alike(NamedTuple):
    """Parameters of so many numbers. cut: whether ranks of tp, of etp where they are an expert's, each have a part of one."""

    numel: int
    is_expert: bool
    cut: bool


def has_reference(config: Stage) -> bool:
    """Whether a stage keeps the weights that it is compared with."""
    return isinstance(config, RLStage) and config.algorithm.kl_coefficient > 0


def checkpoint_bytes(config: TrainingStage, hf: HFConfig) -> float:
    """Of one save."""
    numel = sum(alike.numel * count for alike, count in _parameters(config, hf).items())
    weights = getattr(torch, config.model.dtype).itemsize
    return numel * (weights * (2 if has_reference(config) else 1) + 12.0)


def largest_parameter_bytes(hf: HFConfig, config: TrainingStage) -> float:
    """What a rank has of a parameter beside its own part while the model leaves it whole (`checkpoint/hf_state.py: export_hf`),
    of the largest one: what ranks of tp or etp cut, in pieces and put together; what another stage or rank of ep has, once.
    """
    p, itemsize = config.parallel, getattr(torch, config.model.dtype).itemsize

    def times(alike: _Alike) -> int:
        if alike.cut and (p.etp if alike.is_expert else p.tp) > 1:
            return 2
        return int(p.pp > 1 or (alike.is_expert and p.ep > 1))

    return max(float(itemsize * times(alike) * alike.numel) for alike in _parameters(config, hf))


def _parameters(config: TrainingStage, hf: HFConfig) -> Mapping[_Alike, int]:
    """How many there are of each."""
    further = (hf.get("num_nextn_predict_layers") or 0) if config.model.mtp_loss_coefficient > 0 else 0
    return _counted(json.dumps(hf), further)


@functools.cache
def _counted(hf: str, further: int) -> Mapping[_Alike, int]:
    entries = (parameter.entry for parameter in parameters(json.loads(hf), further))
    return Counter(
        _Alike(sum(map(math.prod, entry.hf_shapes)), entry.expert is not None, entry.dim is not None)
        for entry in entries
    )
