"""Optimizer state on its way to a checkpoint and back: the bits that Megatron's own ways give, in less memory."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.checkpoints import DEEPSEEK, MTP
from tests.dist.launch import launch

BLOCK = 1000  # elements of a message here, so that there are many


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Those in lists, tuples and dicts; in a third of the time of torch's own, which knows other trees too."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors([*tree.values()])
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from tensors(branch)


class PeakMemory(TorchDispatchMode):
    """peak: most bytes at one time of tensors that were made inside, on any device. Storages that inputs bring are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tensors([args, kwargs]):
            self._know(tensor.untyped_storage(), 0)
        result = function(*args, **(kwargs or {}))
        for tensor in tensors(result):
            self._know(tensor.untyped_storage(), 0 if tensor.is_meta else tensor.untyped_storage().nbytes())
        return result

    def _know(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self._now += num_bytes
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._now -= num_bytes


def measure(directory: Path, dtype: str, keys: dict[str, bool]) -> tuple[list[dict[str, Any]], int, int]:
    """(one step of a model with experts on both ranks; then each of its optimizers' state, as both ways save it; most bytes of
    new tensors in a whole save, bytes of the model's weights on this rank).
    """
    from r1mega.checkpoint.store import MODEL_METADATA, CheckpointStore
    from r1mega.train import optimizer as module  # prepares megatron
    from tests.dist.convert_worker import make_trainer, saves_as_megatron, update  # isort: skip
    from megatron.core.optimizer import DistributedOptimizer

    module._BLOCK = BLOCK
    trainer = make_trainer(MTP, {"ep": 2}, dtype, init_std=0.02, **keys)
    update(trainer)
    model = trainer.policy.sharded_weights(module.SHARDING_METADATA | MODEL_METADATA)
    way = {"distrib_optim_fully_reshardable_mem_efficient": True}
    found = []
    for part in trainer.optimizer.chained_optimizers:
        with PeakMemory() as theirs:
            DistributedOptimizer.sharded_param_state_fully_reshardable(part, model, metadata=way)
        with PeakMemory() as ours:
            state = part.sharded_param_state_fully_reshardable(model)
        described = part.sharded_param_state_fully_reshardable(model, is_loading=True)
        sizes = [param.numel() for buffer in part.buffers for param in buffer.param_index_map]
        found.append({
            "ranks": part.data_parallel_group.size(),
            "first": part.data_parallel_group.rank() == 0,
            "elements": sum(sizes),
            "largest": max(sizes),
            "saves": sum(sizes[index] for index in state),
            "equal": saves_as_megatron(part, model),
            "moved": all(any(items[key].data.any() for items in state.values()) for key in module._STATE),
            "described": [items["param"].data.numel() for items in described.values()] == sizes
            and all(item.data.is_meta for items in described.values() for item in items.values()),
            "ours": ours.peak,
            "theirs": theirs.peak,
        })  # fmt: skip
    store = CheckpointStore(directory, keep=1, architecture={})
    with PeakMemory() as memory:
        store.save(1, trainer.sharded_state(is_loading=False), {})
    return (
        found,
        memory.peak,
        sum(p.numel() * p.itemsize for chunk in trainer.policy.chunks for p in chunk.parameters()),
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


@pytest.mark.parametrize("keys", [{}, {"precision_aware": True}], ids=str)
def test_each_rank_saves_its_share_in_the_memory_of_what_it_saves(keys, tmp_path):
    ranks, peaks, weights = zip(*launch(measure, 2, tmp_path, "bfloat16", keys, timeout_seconds=600), strict=True)
    assert {part["ranks"] for part in ranks[0]} == {1, 2}  # experts, and what both ranks have
    for parts, peak, own_weights in zip(ranks, peaks, weights, strict=True):
        assert peak <= 24 * sum(part["saves"] for part in parts) + own_weights + 2 * 4 * BLOCK
    for parts in zip(*ranks, strict=True):
        for part in parts:
            assert part["equal"] and part["moved"] and part["described"]
            assert part["saves"] <= part["elements"] / part["ranks"] + part["largest"]
            assert 12 * part["saves"] <= part["ours"] <= 12 * part["saves"] + 2 * 4 * BLOCK
            if part["first"] and not keys:  # the tracker sees what Megatron's own needs beside the result
                assert part["theirs"] > 1.5 * 12 * part["elements"]
        assert sum(part["saves"] for part in parts) == sum(p["elements"] / p["ranks"] for p in parts)


def several_buckets() -> list[tuple[int, bool, bool]]:
    """Of each optimizer: (its buckets, whether what is saved is what ranks hold, whether main parameters are the weights)."""
    from r1mega.checkpoint.store import MODEL_METADATA
    from r1mega.platform import groups
    from r1mega.train.optimizer import SHARDING_METADATA
    from tests.dist.convert_worker import make_trainer, saves_what_ranks_hold, update
    from tests.dist.policy_worker import small_buckets

    groups.init_distributed()
    with small_buckets():
        trainer = make_trainer(DEEPSEEK, {"ep": 2}, "float32", init_std=0.02, overlap_grad_reduce=True)
    update(trainer)
    model = trainer.policy.sharded_weights(SHARDING_METADATA | MODEL_METADATA)
    found = []
    for part in trainer.optimizer.chained_optimizers:
        params = [param.detach() for buffer in part.buffers for param in buffer.param_index_map]
        state = part.sharded_param_state_fully_reshardable(model)
        same = [torch.equal(items["param"].data, params[index]) for index, items in state.items()]
        buckets = sum(len(buffer.buckets) for buffer in part.buffers)
        found.append((buckets, saves_what_ranks_hold(part, model), bool(same) and all(same)))
    groups.destroy()
    return found


def test_state_in_several_buckets_is_saved_as_it_is():
    """Megatron's gathering shifts what lies behind the padding of a bucket; float32 weights are their main parameters."""
    for found in launch(several_buckets, 2):
        assert min(buckets for buckets, _, _ in found) > 1
        assert [(right, same) for _, right, same in found] == [(True, True)] * 2


@dataclass(frozen=True, slots=True)
class Case:
    layout: tuple[tuple[str, Any], ...] = ()
    dtype: str = "bfloat16"
    layers: int = 2
    keys: tuple[tuple[str, bool], ...] = ()
    weighed: bool = False  # the memory of loading is asked for; to watch it takes as long as the loading


PRECISION_AWARE = (("precision_aware", True), ("grad_reduce_in_fp32", False))
DENSE_FIRST = (("pp", 2), ("layers_per_stage", (1, 2)))
"""Of three layers, the first of them dense: rank 0, which writes what all ranks have in common, has no experts."""
CASES = {
    1: [Case(dtype="float32"), Case(), Case(keys=PRECISION_AWARE)],
    2: [
        Case((("ep", 2),), weighed=True),
        Case((("ep", 2),), layers=4, weighed=True),
        Case((("tp", 2),), "float32"),
        Case(DENSE_FIRST, layers=3),
        Case(DENSE_FIRST, layers=3, keys=PRECISION_AWARE),
        Case(DENSE_FIRST, layers=3, keys=(("cpu_offload", True),)),
    ],
    4: [Case((("tp", 2), ("ep", 2)), keys=PRECISION_AWARE)],
}
"""By the number of ranks."""


def load_in_both_ways(directory: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """Each case saved after a step, and loaded into new policies by Megatron's own way and by r1mega's.

    {way: (most bytes of new tensors while loading, of those that are weighed; what is not as in the run that went on)},
    elements of the optimizers.
    """
    from r1mega.checkpoint import torch_dist
    from r1mega.platform import groups

    torch_dist.BLOCK = BLOCK
    groups.init_distributed()
    found = [_load_in_both_ways(directory / str(number), case) for number, case in enumerate(cases)]
    groups.destroy()
    return found


def _load_in_both_ways(directory: Path, case: Case) -> dict[str, Any]:
    from r1mega.checkpoint.store import CheckpointStore, deciding_keys
    from r1mega.platform import groups
    from r1mega.train import optimizer as module
    from tests.dist.convert_worker import make_trainer, update

    config = MTP | {"num_hidden_layers": case.layers}
    store = CheckpointStore(directory, keep=1, architecture=deciding_keys(config))

    def bits(trainer: Any) -> dict[Any, torch.Tensor]:
        found = {name: tensor.clone() for name, tensor in trainer.policy.hf_tensors()}
        for place, part in enumerate(module.parts(trainer.optimizer)):
            for number, parameter in enumerate(part.model_param_group_index_map):
                state = part._get_main_param_and_optimizer_states(parameter)
                found |= {(place, number, key): value.clone() for key, value in state.items()}
        return found

    def started() -> Any:
        return make_trainer(config, dict(case.layout), case.dtype, init_std=0.02, **dict(case.keys))

    trainer = started()
    update(trainer)
    path = store.save(1, trainer.sharded_state(is_loading=False), {})
    expected = [bits(trainer), update(trainer), bits(trainer)]
    found: dict[str, Any] = {
        "elements": sum(b.numel_unpadded for part in module.parts(trainer.optimizer) for b in part.buffers)
    }
    for way in ("theirs", "ours"):
        groups.destroy_parallel()
        fresh = started()
        if way == "theirs":
            for part in module.parts(fresh.optimizer):
                del part.sharded_param_state_fully_reshardable, part.load_parameter_state_from_fully_reshardable
        module.fill_empty_state(fresh.optimizer)  # which stays; what passes is counted
        assert not equal(bits(fresh), expected[0])
        with PeakMemory() if case.weighed else contextlib.nullcontext() as memory:
            state, _ = store.load(path, fresh.sharded_state(is_loading=True))
            fresh.load_sharded_state(state)
        now = [bits(fresh), update(fresh), bits(fresh)]
        names = ("what is loaded", "loss and gradient norm of a step", "state after it")
        wrong = [name for name, one, other in zip(names, now, expected, strict=True) if not equal(one, other)]
        found[way] = memory.peak if memory else None, wrong
    groups.destroy_parallel()
    return found


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A function: what `load_in_both_ways` finds on so many ranks, by rank and case."""
    return functools.cache(
        lambda ranks: launch(
            load_in_both_ways, ranks, tmp_path_factory.mktemp("runs"), CASES[ranks], timeout_seconds=600
        )
    )


@pytest.mark.parametrize("ranks", CASES)
def test_a_run_goes_on_bitwise_from_state_that_is_read_a_block_at_a_time(loaded, ranks):
    for found in loaded(ranks):
        for case, result in zip(CASES[ranks], found, strict=True):
            assert result["ours"][1] == result["theirs"][1] == [], case


def test_groups_that_count_no_steps_are_saved_and_loaded_with_those_of_the_others():
    """Experts of a first rank without any: never stepped, or as they were when it last loaded a checkpoint."""
    from r1mega.train.optimizer import even_steps

    for experts in ({}, {"step": 0}, {"step": 2}):
        state = {i: {"optimizer": {"param_groups": groups}} for i, groups in enumerate([[{"step": 4}, {}], [experts]])}
        even_steps(state)
        assert [group["step"] for part in state.values() for group in part["optimizer"]["param_groups"]] == [4, 4, 4]
    alone: dict[str, Any] = {"optimizer": {"param_groups": [{}, {"step": 3}]}}
    even_steps(alone)
    assert alone["optimizer"]["param_groups"] == [{"step": 3}, {"step": 3}]


def test_memory_to_load_state_does_not_grow_with_the_model(loaded):
    for found in loaded(2):
        small, large = (result for case, result in zip(CASES[2], found, strict=True) if case.weighed)
        print({found["elements"]: (found["theirs"][0], found["ours"][0]) for found in (small, large)})
        more = large["elements"] - small["elements"]
        assert (
            large["theirs"][0] - small["theirs"][0] > 11 * more
        )  # the tracker sees 12 bytes an element of whole buffers
        assert (
            large["ours"][0] - small["ours"][0] < 2.5 * more
        )  # Megatron puts weights of fused layers together, 2 bytes each
