"""Does a saved checkpoint hold what a model asks for? Told before anything is read, with everything that is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r1mega.checkpoint.workers import Workers, agree
from r1mega.errors import CheckpointError

_FUSED_NORMS = {  # Transformer Engine keeps a norm in the linear layer after it, the local layers keep it apart
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_ALIASES = _FUSED_NORMS | {apart: fused for fused, apart in _FUSED_NORMS.items()}


def read_metadata(path: Path) -> Any:
    """torch's Metadata of a torch_dist directory. CheckpointError when there is none or it is damaged."""
    import pickle

    from torch.distributed.checkpoint import FileSystemReader

    try:
        return FileSystemReader(str(path)).read_metadata()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no torch_dist checkpoint (it has no .metadata)") from None
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise CheckpointError(f"{path}/.metadata: damaged ({error})") from error


def alias(key: str) -> str | None:
    """The name under which the other kind of layers keeps the same tensor, if they differ in it."""
    for suffix, other in _ALIASES.items():
        if key.endswith("." + suffix):
            return key.removesuffix(suffix) + other
    return None


def fit_template(template: dict[str, Any], path: Path, workers: Workers) -> list[tuple[Any, ...]]:
    """Make Megatron's sharded template ask for what is in the checkpoint; CheckpointError lists all that is not there.

    Norms are looked up under either of their names. Extra states (of FP8 layers) that were not saved are taken out of
    the template; where they were is returned, for `put_back`. A collective call.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    saved = read_metadata(path).state_dict_metadata
    problems, absent = [], []
    for where, leaf in list(_leaves(template)):
        if isinstance(leaf, ShardedObject):
            if leaf.unique_key not in saved:
                if "_extra_state" in leaf.key:
                    absent.append(where)
                else:
                    problems.append(f"missing: {leaf.unique_key}")
            continue
        if leaf.key not in saved:
            other = alias(leaf.key)
            if other not in saved:
                problems.append(f"missing: {leaf.key}")
                continue
            leaf.key = other
        problems += _misfit(leaf, saved[leaf.key])
    agree(workers, problems, f"{path} does not hold what this model needs")
    for where in absent:
        del _at(template, where[:-1])[where[-1]]
    return absent


def take_out_described(template: dict[str, Any]) -> dict[tuple[Any, ...], Any]:
    """Take the tensors out of the template that have no memory to be loaded into (torch's meta device): {where: leaf}."""
    described = {where: leaf for where, leaf in _leaves(template) if getattr(leaf.data, "is_meta", False)}
    for where in described:
        del _at(template, where[:-1])[where[-1]]
    return described


def put_back(state: dict[str, Any], values: Mapping[tuple[Any, ...], Any]) -> None:
    """Put something where `fit_template` or `take_out_described` took something out."""
    for where, value in values.items():
        node = state
        for key in where[:-1]:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
        node[where[-1]] = value


def _misfit(leaf: Any, saved: Any) -> list[str]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    parts = list(nested_values(leaf.build())) if isinstance(leaf, ShardedTensorFactory) else [leaf]
    shapes = {tuple(p.global_shape) for p in parts if not p.allow_shape_mismatch}
    return [
        f"shape: {leaf.key} is {list(saved.size)}, the model wants {list(shape)}"
        for shape in shapes - {tuple(saved.size)}
    ]


def _leaves(node: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    if isinstance(node, ShardedBase):
        yield where, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*where, key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _leaves(value, (*where, i))


def _at(node: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        node = node[key]
    return node
