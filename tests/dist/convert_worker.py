"""One rank of the conversion tests: converted checkpoints into models of a layout, and policies into checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from r1mega import platform

platform.prepare()

from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.optimizer import DistributedOptimizer  # noqa: E402

from r1mega.checkpoint.hf import HFTensors  # noqa: E402
from r1mega.checkpoint.store import CheckpointStore, deciding_keys  # noqa: E402
from r1mega.checkpoint.torch_dist import TorchDistReader  # noqa: E402
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.train.heads import TokenScores  # noqa: E402
from r1mega.train.packing import build_microbatch  # noqa: E402
from r1mega.train.phases import PhasePlan  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.train.trainer import Trainer  # noqa: E402
from tests.policy_reference import any_experts  # noqa: E402

SEQUENCES = [[i * 7 % 90 + 1 for i in range(start, start + 16)] for start in range(8)]
PROMPT = 4


def make_trainer(
    config: dict[str, Any],
    layout: dict[str, int],
    dtype: str,
    source: Path | None = None,
    *,
    init_std: float | None = None,
    fp8: str = "off",
    plan: PhasePlan | None = None,
    **keys: bool,
) -> Trainer:
    """source: where its weights are from; else they are drawn, or there are none. keys: of the optimizer."""
    groups.init_parallel(ParallelConfig(**layout), seed=1)
    mtp = 0.3 if config.get("num_nextn_predict_layers") else 0.0
    rate = 1e-2 if "n_routed_experts" in config else 0.0  # Qwen3-MoE's routers have no bias, and it says so
    model = ModelConfig(path="unused", dtype=dtype, fp8=fp8, mtp_loss_coefficient=mtp, expert_bias_update_rate=rate)
    policy = Policy(model, config, ParallelConfig(**layout), seed=1, init_std=init_std)
    if source is not None:
        policy.load_pretrained(source)
    optimizer = OptimizerConfig(
        lr=1e-2, warmup_steps=2, weight_decay=0.1, eps=1e-3, **keys
    )  # eps: rounding is no direction
    return Trainer(policy, optimizer, total_steps=8, plan=plan)


def update(trainer: Trainer, dictated: bool = False) -> tuple[float, float]:
    """One step on the same eight sequences, whatever the layout; (loss, gradient norm).

    dictated: experts are not chosen by the routers, whose choice may be the rounding's.
    """
    replicas, replica = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    mine = range(replica, len(SEQUENCES), replicas)
    batches = []
    for pair in (mine[i : i + 2] for i in range(0, len(mine), 2)):
        experts = [experts_of(trainer.policy, i) for i in pair] if dictated else None
        batches.append(build_microbatch([SEQUENCES[i] for i in pair], [PROMPT] * 2, range(2), experts))
    total = sum(len(s) - PROMPT for s in SEQUENCES)

    def loss(_batch: Any, scores: TokenScores) -> tuple[torch.Tensor, torch.Tensor]:
        return -scores.values.sum() / total, -scores.values.detach().sum() / total

    result = trainer.update(batches, loss, total_response_tokens=total)
    value = torch.stack(result.statistics).sum() if result.statistics else torch.zeros(())
    dist.all_reduce(value, group=ps.get_data_parallel_group())
    dist.broadcast(value, dist.get_world_size() - 1)  # the last pipeline stage has it
    return float(value), result.grad_norm


def saves_as_megatron(part: Any, model: dict[str, Any]) -> bool:
    """Whether what all ranks save of one optimizer's state is, bit by bit and each parameter once, what Megatron's own way
    gathers on the first rank. model: the sharded weights. A collective call of the optimizer's ranks.
    """
    group = part.data_parallel_group_gloo
    way = {"distrib_optim_fully_reshardable_mem_efficient": True}
    expected = DistributedOptimizer.sharded_param_state_fully_reshardable(part, model, metadata=way)
    saved: list[Any] = [None] * group.size()
    dist.all_gather_object(saved, _plain(part.sharded_param_state_fully_reshardable(model)), group=group)
    if expected is None:
        return True  # the first rank compares
    together = {index: tensors for theirs in saved for index, tensors in theirs.items()}
    if sum(map(len, saved)) != len(together) or together.keys() != expected.keys():
        return False
    return all(
        theirs[key][:2] == tensors[key][:2] and torch.equal(theirs[key][2], tensors[key][2])
        for index, theirs in _plain(expected).items()
        for tensors in [together[index]]
        for key in theirs.keys() | tensors.keys()
    )


def saves_what_ranks_hold(part: Any, model: dict[str, Any]) -> bool:
    """The same against what each rank holds, by Megatron's own account of which elements these are: its gathering shifts what
    lies behind the padding of a bucket (it warns of "data corruption"), so that it is no reference for several buckets.
    """
    group, index = part.data_parallel_group_gloo, 0
    held: dict[int, tuple[int, dict[str, torch.Tensor]]] = {}
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        local = {
            p: places["param"] for bucket in next(iter(ranges.values())) for p, places in bucket["param_map"].items()
        }
        for param in buffer.param_index_map:
            if param in local:
                state = part._get_main_param_and_optimizer_states(param)
                held[index] = local[param].start, {key: value.detach().clone() for key, value in state.items()}
            index += 1
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, (held, _plain(part.sharded_param_state_fully_reshardable(model))), group=group)
    saved = [(place, tensors) for _, theirs in everyone for place, tensors in theirs.items()]
    if sorted(place for place, _ in saved) != list(range(index)):
        return False
    return all(
        torch.equal(torch.cat([piece[key] for _, piece in sorted(pieces, key=lambda one: one[0])]), value.flatten())
        for place, tensors in saved
        for pieces in [[theirs[place] for theirs, _ in everyone if place in theirs]]
        for key, (_, _, value) in tensors.items()
    )


def _plain(state: dict[int, dict[str, Any]]) -> dict[int, dict[str, tuple[str, Any, torch.Tensor]]]:
    return {
        index: {key: (item.key, item.replica_id, item.data) for key, item in items.items()}
        for index, items in state.items()
    }


def experts_of(policy: Policy, sequence: int) -> np.ndarray:
    """[tokens - 1, MoE layers, top-k]: any, but the same in every layout."""
    config = policy.megatron_config
    layers = sum(config.moe_layer_freq)
    return any_experts(len(SEQUENCES[sequence]) - 1, layers, config.num_moe_experts, config.moe_router_topk, sequence)


def load_converted(cases: list[tuple[Path, dict[str, int], Path]]) -> dict[str, list[str]]:
    """For (checkpoint, layout, HF directory): load by dist_checkpointing; names whose exported bits differ."""
    from r1mega.checkpoint.hf import read_config

    groups.init_distributed()
    differences = {}
    for checkpoint, layout, original in cases:
        trainer = make_trainer(read_config(checkpoint), layout, "bfloat16", checkpoint)
        exported, expected = dict(trainer.policy.hf_tensors()), HFTensors(original)
        wrong = [n for n, t in exported.items() if not torch.equal(t, expected[n]) or t.dtype != expected[n].dtype]
        saved = set(TorchDistReader(checkpoint).saved)
        template = trainer.sharded_state(is_loading=False)["model"]
        asked = {item.key for chunk in template.values() for item in chunk.values() if "extra_state" not in item.key}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, asked)
        wrong += sorted(set().union(*everyone) ^ saved)  # what Megatron would save is what the conversion wrote
        copies = ("embed_tokens.weight", "shared_head.head.weight")  # which MTP layers repeat
        wrong += [n for n in expected if n not in exported and not (".layers." in n and n.endswith(copies))]
        differences[f"{original.parent.name} {layout}"] = wrong
        groups.destroy_parallel()
    groups.destroy()
    return differences


def save_run(
    run: Path,
    config: dict[str, Any],
    layout: dict[str, int],
    source: Path,
    dtype: str,
    asynchronous: bool,
    fp8: str = "off",
) -> None:
    """Two steps, a checkpoint, two more steps; what an uninterrupted run gives: losses, and every weight at the end.

    bfloat16: experts are dictated; and the same steps in float32 tell how far rounding leads ("rounding": `differences`).
    """
    groups.init_distributed()
    trainer, dictated = make_trainer(config, layout, dtype, source, fp8=fp8), dtype == "bfloat16"
    store = CheckpointStore(run, keep=2, architecture=deciding_keys(config), asynchronous=asynchronous)
    store.save(0, trainer.sharded_state(is_loading=False), {})  # before the first step
    losses = [update(trainer, dictated) for _ in range(2)]
    store.save(2, trainer.sharded_state(is_loading=False), {})
    at_save = all_weights(trainer)
    losses += [update(trainer, dictated) for _ in range(2)]  # while an asynchronous save writes
    store.wait()
    kept = {"losses": losses, "weights": all_weights(trainer), "at_save": at_save}
    if dictated and fp8 == "off":
        groups.destroy_parallel()
        wide = make_trainer(config, layout, "float32", source)
        kept["rounding"] = differences([update(wide, dictated) for _ in range(4)], all_weights(wide), kept)
    if dist.get_rank() == 0:
        torch.save(kept, run / "uninterrupted.pt")
    dist.barrier()
    groups.destroy()


def all_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.policy.hf_tensors()}


def differences(
    losses: list[tuple[float, float]], weights: dict[str, torch.Tensor], expected: dict[str, Any]
) -> tuple[float, float, float]:
    """From an uninterrupted run: the largest of losses and gradient norms; the largest of the weights; the Euclidean
    distance of all weights, over the one that its last two steps went."""
    pairs = zip(losses, expected["losses"][-len(losses) :], strict=True)
    off, moved = (
        torch.cat([(tensor.float() - other[name].float()).flatten() for name, tensor in expected["weights"].items()])
        for other in (weights, expected["at_save"])
    )
    largest = max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))
    return largest, float(off.abs().max()), float(off.norm() / moved.norm())


def resume_run(
    run: Path, config: dict[str, Any], dtype: str, cases: list[tuple[dict[str, int], int]], fp8: str = "off"
) -> dict[str, Any]:
    """In each layout, from the checkpoint of a step: save it again, then the steps up to 4.

    {case: (tensors that the second checkpoint has otherwise, *`differences`)}.
    """
    groups.init_distributed()
    expected = torch.load(run / "uninterrupted.pt")
    results = {}
    for layout, step in cases:
        trainer = make_trainer(config, layout, dtype, fp8=fp8)
        store = CheckpointStore(run, keep=2, architecture=deciding_keys(config))
        assert store.latest().name == "step_000002"
        path = store.directory / f"step_{step:06d}"
        state, progress = store.load(path, trainer.sharded_state(is_loading=True))
        trainer.load_sharded_state(state)
        again = CheckpointStore(run / f"{layout} {step}", keep=1, architecture=deciding_keys(config))
        changed = unequal_tensors(path, again.save(step, trainer.sharded_state(is_loading=False), {}))
        losses = [update(trainer, dtype == "bfloat16") for _ in range(progress["step"], 4)]
        results[f"{layout} from {step}"] = (changed, *differences(losses, all_weights(trainer), expected))
        groups.destroy_parallel()
    groups.destroy()
    return results


def unequal_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors (weights, float32 copies, Adam's moments) that two checkpoints do not hold bit for bit.

    Rows that pad the vocabulary depend on the layout.
    """
    from megatron.core.dist_checkpointing import load_plain_tensors

    first, second = (
        {name: value for name, value in load_plain_tensors(str(path)).items() if torch.is_tensor(value)}
        for path in (one, other)
    )
    assert any("exp_avg_sq" in name for name in first)
    wrong = sorted(first.keys() ^ second.keys())
    for name in first.keys() & second.keys():
        rows = min(len(first[name]), len(second[name])) if first[name].dim() else None
        a, b = (t if rows is None else t[:rows] for t in (first[name], second[name]))
        if a.dtype != b.dtype or not torch.equal(a, b):
            wrong.append(name)
    return wrong
