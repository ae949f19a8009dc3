"""Streams HF-named tensors into a running generator in buckets of bounded bytes.

Each tensor is checked against the generator's layout on its way and digested as it was sent; after the last one the
digest of what arrived is read back from the generator's own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from r1mega.checkpoint.hf import HFTensors
from r1mega.errors import WeightSyncError
from r1mega.weights.digest import generator_digest, tensor_digest
from r1mega.weights.layout import Placement, is_ignored, weight_dtype

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def bucketed(named_tensors: NamedTensors, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Groups a stream into lists of at most `bucket_bytes`; a larger single tensor is a bucket of its own.

    The next tensor is not drawn before the bucket is full or handed out, so a lazy source holds one bucket at a time.
    """
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


class DigestTap:
    """Digests tensors as they stream past: the sender's half of the proof, without a second export.

    Example: `tap = DigestTap(dtype, config); engine.update_weights(tap(policy.named_tensors()));
    verify.compare_digests(tap.digest, engine.weights_digest())`.
    """

    def __init__(self, model_dtype: torch.dtype, config: Mapping[str, Any]):
        self._dtype = model_dtype
        self._config = config
        self.digest: dict[str, int] = {}

    def __call__(self, named_tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each tensor, cast to the dtype in which the generator holds it."""
        self.digest = {}
        for name, tensor in named_tensors:
            tensor = tensor.detach().to(weight_dtype(name, self._dtype))
            if not is_ignored(name, self._config):
                self.digest[name] = tensor_digest(tensor)
            yield name, tensor


@dataclass(frozen=True, slots=True)
class ReloadTarget:
    """One rank's vLLM worker, its platform module, the model's config and this rank's placements in it."""

    worker: Any
    platform: ModuleType
    config: Mapping[str, Any]
    placements: Sequence[Placement]
    model_dtype: torch.dtype


def reload_weights(target: ReloadTarget, named_tensors: NamedTensors, bucket_bytes: int) -> dict[str, int]:
    """Loads a complete set of tensors in place; returns this rank's digest of what the generator then holds.

    named_tensors: every full (unsharded) tensor of the model once, in any order, in any float dtype.
    Raises WeightSyncError naming all missing, repeated, unknown and misshapen tensors. After an error the generator
    holds no usable weights: it must be reloaded before it generates.
    """
    expected = {placement.name: placement.shape for placement in target.placements}
    problems: list[str] = []
    seen: set[str] = set()
    target.platform.begin_reload(target.worker)
    for bucket in bucketed(_checked(target, named_tensors, expected, seen, problems), bucket_bytes):
        target.platform.load_weights(target.worker, bucket)
    missing = [name for name in expected if name not in seen]
    problems += [f"{name}: missing" for name in missing]
    if problems:
        raise WeightSyncError(f"{len(problems)} of {len(expected)} tensors cannot be loaded into the generator:\n  "
                              + "\n  ".join(problems))
    if target.platform.PARAMETERS_ARE_PLAIN_BEFORE_FINISH:
        digest = generator_digest(target.placements, _parameters(target))
        target.platform.finish_reload(target.worker)
        return digest
    target.platform.finish_reload(target.worker)
    return generator_digest(target.placements, _parameters(target))


def _parameters(target: ReloadTarget) -> dict[str, torch.Tensor]:
    return dict(target.worker.model_runner.model.named_parameters(remove_duplicate=False))


def _checked(target: ReloadTarget, named_tensors: NamedTensors, expected: Mapping[str, tuple[int, ...]],
             seen: set[str], problems: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes on what the layout knows, cast to the generator's dtype; notes the rest in `problems`."""
    for name, tensor in named_tensors:
        if is_ignored(name, target.config):
            continue
        if name not in expected:
            problems.append(f"{name}: the generator's model has no such tensor")
        elif name in seen:
            problems.append(f"{name}: sent twice")
        elif tuple(tensor.shape) != expected[name]:
            seen.add(name)
            problems.append(f"{name}: shape {list(tensor.shape)}, expected {list(expected[name])}")
        else:
            seen.add(name)
            yield name, tensor.detach().to(weight_dtype(name, target.model_dtype))


def checkpoint_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of an HF checkpoint directory, one at a time. Raises CheckpointError if a file is missing or torn."""
    yield from HFTensors(directory).items()


def sum_digests(partial: Mapping[str, int], placements: Sequence[Placement],
                all_reduce: Callable[[torch.Tensor], None]) -> dict[str, int]:
    """Completes digests over the ranks of a sharded generator. all_reduce: sums an int64 CPU tensor in place.

    Every rank must call it; sharded tensors are summed (wrapping mod 2^64), whole ones stay this rank's own.
    """
    names = sorted({placement.name for placement in placements if not placement.is_whole})
    values = torch.tensor([partial[name] - (1 << 64) if partial[name] >> 63 else partial[name] for name in names],
                          dtype=torch.int64)
    all_reduce(values)
    return dict(partial) | {name: value % 2**64 for name, value in zip(names, values.tolist(), strict=True)}
