"""Weights into a running generator, by either strategy, and the digest of what then is in it.

`gather`: whole HF-named tensors through vLLM's loaders, in buckets of bounded bytes, each checked against the
generator's layout and digested as it was sent. `direct` (direct.py): shards written straight into the parameters. After
both the digest of what arrived is read back from the generator's own parameters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from r1mega.checkpoint.fp8_blocks import SCALE, dequantize
from r1mega.checkpoint.hf import HFTensors
from r1mega.config.model_files import HFConfig
from r1mega.errors import ConfigError, WeightSyncError
from r1mega.platform.generator import VllmPlatform
from r1mega.platform.vllm_version import DERIVED
from r1mega.types import GenerationEngine, WritableEngine
from r1mega.weights.digest import generator_digest, tensor_digest
from r1mega.weights.layout import VOCABULARY, Placement, is_ignored, weight_dtype
from r1mega.weights.quantize import quantized_tensors

if TYPE_CHECKING:
    from r1mega.config.schema import WeightsConfig
    from r1mega.weights.direct import DirectTransfer

NamedTensors = Iterable[tuple[str, torch.Tensor]]
_DERIVED_OF = ".self_attn.kv_b_proj.weight"


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

    def __init__(self, model_dtype: torch.dtype, config: HFConfig, fp8: bool = False):
        self._dtype, self._fp8 = model_dtype, fp8
        self._config = config
        self.digest: dict[str, int] = {}

    def __call__(self, named_tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each tensor in the form in which the generator holds it: cast, or with fp8 quantised and followed by its
        scales.
        """
        self.digest = {}
        held = ((name, tensor) for name, tensor in named_tensors if not is_ignored(name, self._config))
        for name, tensor in quantized_tensors(held) if self._fp8 else held:
            tensor = tensor.detach().to(weight_dtype(name, self._dtype, self._fp8))
            self.digest[name] = tensor_digest(tensor)
            yield name, tensor


class Trainer(Protocol):
    """What a push asks of the trained model; `train.policy.Policy` is it. Its methods are collective calls."""

    dtype: torch.dtype
    fp8: bool

    @property
    def chunks(self) -> Sequence[Any]: ...  # of Megatron's model, one a virtual pipeline stage
    def hf_tensors(self) -> NamedTensors: ...
    def sequence_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...


class GatherTransfer:
    """Strategy `gather`: the policy's tensors, whole, through the generator's loader."""

    def __init__(self, policy: Trainer, engine: GenerationEngine, hf_config: HFConfig):
        self._policy, self._engine = policy, engine
        self._tap = DigestTap(policy.dtype, hf_config, isinstance(engine, WritableEngine) and engine.fp8)

    def push(self) -> None:
        """A collective call."""
        self._engine.update_weights(self._tap(self._policy.hf_tensors()))

    def digest(self, *, again: bool = False) -> dict[str, int]:
        """What the last push sent, digested as it passed, whether it was the same `again` or not."""
        return self._tap.digest


def build_transfer(
    policy: Trainer, engine: GenerationEngine, config: WeightsConfig, hf_config: HFConfig
) -> GatherTransfer | DirectTransfer:
    """What `weights.strategy` asks for. A collective call. ConfigError for `direct` into another engine than vLLM."""
    if config.strategy == "gather" or (config.strategy is None and not isinstance(engine, WritableEngine)):
        return GatherTransfer(policy, engine, hf_config)
    if not isinstance(engine, WritableEngine):
        raise ConfigError("weights.strategy = direct writes into vLLM's parameters; set rollout.engine=vllm, or gather")
    from r1mega.weights.direct import DirectTransfer
    from r1mega.weights.plan import GeneratorLayout

    world = dist.get_world_size()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return DirectTransfer(
        lambda: policy.chunks,
        engine,
        hf_config,
        GeneratorLayout(world, engine.tp, engine.ep, engine.fp8),
        model_dtype=policy.dtype,
        bucket_bytes=config.bucket_bytes,
        ranks_per_node=per_node,
        shared_memory=config.shared_memory,
    )


@dataclass(frozen=True, slots=True)
class ReloadTarget:
    """One rank's vLLM worker, its platform module, the model's config and this rank's placements in it.

    shapes: of all HF tensors, by name; the rank may hold nothing of some of them. fp8: among them are e4m3 blocks and scales.
    """

    worker: Any
    platform: VllmPlatform
    config: HFConfig
    placements: Sequence[Placement]
    shapes: Mapping[str, tuple[int, ...]]
    model_dtype: torch.dtype
    fp8: bool = False


def reload_weights(target: ReloadTarget, named_tensors: NamedTensors, bucket_bytes: int) -> dict[str, int]:
    """Loads a complete set of tensors in place; returns this rank's digest of what the generator then holds.

    named_tensors: every full (unsharded) tensor of the model once, in any order, in any float dtype; into FP8 as `DigestTap`
    gives them.
    Raises WeightSyncError naming all missing, repeated, unknown and misshapen tensors. After an error the generator
    holds no usable weights: it must be reloaded before it generates.
    """
    problems: list[str] = []
    seen: set[str] = set()
    target.platform.begin_reload(target.worker)
    for bucket in bucketed(_checked(target, named_tensors, seen, problems), bucket_bytes):
        target.platform.load_weights(target.worker, bucket)
    _refuse(target, seen, problems)
    return _finish(target, target.platform.finish_reload)


@torch.no_grad()
def read_weights(target: ReloadTarget, tensors: HFTensors, parameters: Mapping[str, torch.Tensor]) -> None:
    """Fills this rank's parameters, of `parameters_to_write`, from an HF directory: the rows that the rank holds something of
    are read, and no others. Raises WeightSyncError as `reload_weights` does, before anything is read.
    """
    seen: set[str] = set()
    problems = [problem for name in tensors if (problem := _problem(target, name, tensors.infos[name].shape, seen))]
    _refuse(target, seen, problems)
    for placement in sorted(target.placements, key=lambda one: _place(tensors, one)):
        if all(start < stop for start, stop in placement.source):
            part = tensors.rows(placement.name, *placement.source[0])
            columns = (slice(start, stop) for start, stop in placement.source[1:])
            placement.write(parameters, part[(slice(None), *columns)])


def _place(tensors: HFTensors, placement: Placement) -> tuple[Path, int]:
    """For reading on in a file."""
    info = tensors.infos[placement.name]
    return info.path, info.start


def parameters_to_write(target: ReloadTarget) -> Mapping[str, torch.Tensor]:
    """This rank's parameters by vLLM's names, plain, to be filled in place; `finish_writing` follows.

    What pads the vocabulary becomes zero, as vLLM's loader leaves it. Raises WeightSyncError for parameters that no
    placement covers, which nobody would write. From here to `finish_writing` the generator holds no usable weights.
    """
    target.platform.begin_write(target.worker)
    parameters = _parameters(target)
    _check_covered(target, parameters)
    return parameters


def finish_writing(target: ReloadTarget) -> dict[str, int]:
    """Makes what was written ready for generation; returns this rank's digest of it."""
    return _finish(target, target.platform.finish_write)


def _finish(target: ReloadTarget, finish: Callable[[Any], None]) -> dict[str, int]:
    """Processes the parameters for the kernels; the digest, taken while they are plain. Raises WeightSyncError for
    parameters that the processing should have derived of the new ones and has not."""
    if target.platform.PARAMETERS_ARE_PLAIN_BEFORE_FINISH:
        plain = _parameters(target)
        digest = generator_digest(target.placements, plain)
        sources = {name: tensor.clone() for name, tensor in plain.items() if name.endswith(_DERIVED_OF)}
        finish(target.worker)
    else:
        finish(target.worker)
        sources = plain = _parameters(target)
        digest = generator_digest(target.placements, plain)
    _check_derived(target.config, sources, _parameters(target), target.model_dtype)
    return digest


@torch.no_grad()
def _check_derived(
    config: HFConfig,
    sources: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    model_dtype: torch.dtype,
) -> None:
    """Derives W_UV and W_UK_T of kv_b_proj once more, as vllm/model_executor/layers/attention/mla_attention.py does
    (process_weights_after_loading), and compares the bits: no digest is of them, and only decoding reads them.
    """
    stale = []
    for name, source in sources.items():
        if not name.endswith(_DERIVED_OF):
            continue
        if (scales := parameters.get(name + SCALE)) is not None:
            source = dequantize(source, scales, torch.empty(source.shape, dtype=model_dtype, device=source.device))
        prefix, nope = name.removesuffix("kv_b_proj.weight"), config["qk_nope_head_dim"]
        by_head = source.view(-1, nope + config["v_head_dim"], config["kv_lora_rank"])
        expected = {"W_UK_T": by_head[:, :nope], "W_UV": by_head[:, nope:].transpose(1, 2)}
        for kind, value in expected.items():
            held = parameters.get(f"{prefix}mla_attn.mla_attn.{kind}")
            if held is not None and not _same_bits(held, value):
                stale.append(f"{prefix}mla_attn.mla_attn.{kind}")
    if stale:
        raise WeightSyncError(
            "the generator decodes with matrices that are not those of its kv_b_proj, as if it had not "
            "derived them after the push:\n  " + "\n  ".join(stale)
        )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also where they are NaN: what a transfer left unwritten is the digest's to find."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _check_covered(target: ReloadTarget, parameters: Mapping[str, torch.Tensor]) -> None:
    """Clears the padding of the vocabulary; finds what a direct write would leave as it is."""
    covered = dict.fromkeys(parameters, 0)
    for placement in target.placements:
        covered[placement.parameter] += math.prod(stop - start for start, stop in placement.target)
    aliases = {parameters[name].data_ptr() for name, count in covered.items() if count}  # of modules that share
    problems = []
    for name, tensor in parameters.items():
        if name in VOCABULARY and not is_ignored(name, target.config):  # a tied head is the embedding
            tensor.data[covered[name] // tensor.shape[1] :].zero_()
            continue
        is_whole = covered[name] == tensor.numel() or (covered[name] == 0 and tensor.data_ptr() in aliases)
        if not is_whole and name.rpartition(".")[2] not in DERIVED:
            problems.append(f"{name}: {covered[name]} of {tensor.numel()} elements")
    if problems:
        raise WeightSyncError(
            "the generator has parameters that weights/layout.py does not cover:\n  " + "\n  ".join(problems)
        )


def _parameters(target: ReloadTarget) -> dict[str, torch.Tensor]:
    return dict(target.worker.model_runner.get_model().named_parameters(remove_duplicate=False))


def _checked(
    target: ReloadTarget, named_tensors: NamedTensors, seen: set[str], problems: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes on what the layout knows, cast to the generator's dtype; notes the rest in `problems`."""
    for name, tensor in named_tensors:
        dtype = weight_dtype(name, target.model_dtype, target.fp8)
        if problem := _problem(target, name, tuple(tensor.shape), seen):
            problems.append(problem)
        elif not is_ignored(name, target.config):
            if dtype.itemsize == 1 != tensor.element_size():
                problems.append(f"{name}: {tensor.dtype}, and the generator holds {dtype} by blocks; quantise it first")
                continue
            yield name, tensor.detach().to(dtype)


def _problem(target: ReloadTarget, name: str, shape: tuple[int, ...], seen: set[str]) -> str | None:
    """Why a tensor cannot be loaded, if so; it has then been seen."""
    if is_ignored(name, target.config):
        return None
    if name not in target.shapes:
        return f"{name}: the generator's model has no such tensor"
    if name in seen:
        return f"{name}: sent twice"
    seen.add(name)
    expected = target.shapes[name]
    return None if shape == expected else f"{name}: shape {list(shape)}, expected {list(expected)}"


def _refuse(target: ReloadTarget, seen: set[str], problems: Sequence[str]) -> None:
    """WeightSyncError for problems, and for what was not seen."""
    problems = [*problems, *(f"{name}: missing" for name in target.shapes if name not in seen)]
    if problems:
        raise WeightSyncError(
            f"{len(problems)} of {len(target.shapes)} tensors cannot be loaded into the generator:\n  "
            + "\n  ".join(problems)
        )


def checkpoint_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of an HF checkpoint directory, one at a time. CheckpointError if a file is missing or torn."""
    yield from HFTensors(directory).items()


def sum_digests(
    partial: Mapping[str, int], names: Sequence[str], all_reduce: Callable[[torch.Tensor], None]
) -> dict[str, int]:
    """Completes digests over the ranks of a sharded generator. all_reduce: sums an int64 CPU tensor in place.

    names: of `layout.divided_names`. Every rank must call it; these tensors are summed (wrapping mod 2^64), the others
    stay this rank's own.
    """
    own = [partial.get(name, 0) for name in names]
    values = torch.tensor([value - (1 << 64) if value >> 63 else value for value in own], dtype=torch.int64)
    all_reduce(values)
    return dict(partial) | {name: value % 2**64 for name, value in zip(names, values.tolist(), strict=True)}
