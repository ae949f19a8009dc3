"""The planner against arithmetic that is written down here, for models whose layers are small enough to add up."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1mega.config.load import load_config
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from r1mega.config.stages.rl import AlgorithmConfig
from r1mega.errors import ConfigError
from r1mega.plan import rank
from r1mega.plan.generator import (
    generator_memory,
)
from r1mega.plan.given import read_model
from r1mega.plan.gpu import gpu_kind
from r1mega.plan.memory import (
    PhaseMemory,
    StageRank,
    host_memory,
    in_flight,
    node_verdict,
    phase_memory,
    plan_memory,
)
from r1mega.plan.memory import _advice as advice
from r1mega.plan.memory import _head_bytes as head_bytes
from r1mega.plan.memory import _Placed as Placed
from r1mega.plan.parameters import checkpoint_bytes, largest_parameter_bytes
from r1mega.plan.place import _rank_groups as rank_groups
from r1mega.plan.place import as_rank
from r1mega.plan.rank import Activations, RankMemory, Routes, Static, measure
from r1mega.plan.residency import residency
from r1mega.plan.samples import Sizes, planned_samples, sample_memory
from r1mega.plan.shapes import ShapesOnly
from r1mega.plan.workload import Lengths, workload
from r1mega.train.policy import Policy
from r1mega.train.samples import pack_for_loss, training_samples
from r1mega.types import KeptIds, Prompt, Response, Reward, RewardStatus, RolloutGroup
from r1mega_kernels import linear, linear_loss
from tests.reference import DEEPSEEK as TINY

CONFIGS = Path(__file__).parents[3] / "configs"
DEEPSEEK = json.loads((CONFIGS / "deepseek_v3_671b/model/config.json").read_text())
HIDDEN, EXPERT = 7168, 3 * 7168 * 2048


def deepseek(recompute: str, imbalance: float = 1.0, offload: tuple[str, ...] = (), rank: int = 32):
    """The second of 16 stages, with four layers of 8 experts each, as one rank of 512; rank 0: the first, with one of these."""
    layout = ParallelConfig(pp=16, ep=32, layers_per_stage=(*[4] * 15, 1))
    model = ModelConfig(path="unused", recompute=recompute, offload_modules=offload)
    return measure(
        DEEPSEEK, model, layout, OptimizerConfig(), world=512, rank=rank, tokens=512, imbalance=imbalance
    )  # fmt: skip


def test_deepseek_v3_on_512():
    plan = deepseek("full")
    static, (activations,) = plan.static, plan.activations
    assert static.num_expert_parameters == 4 * 8 * EXPERT
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    norms = 2 * HIDDEN + 1536 + 512
    assert static.num_parameters == 4 * (8 * EXPERT + EXPERT + 256 * HIDDEN + attention + norms)
    assert static.weights == pytest.approx(2 * static.num_parameters, rel=1e-3)
    dense = static.num_parameters - static.num_expert_parameters
    state = static.main_params + static.exp_avg + static.exp_avg_sq
    assert state == pytest.approx(12 * (static.num_expert_parameters + dense / 32), rel=1e-3)
    assert activations.kept == pytest.approx(4 * 512 * HIDDEN * 2, rel=0.01)  # the inputs of four layers


def test_imbalance_adds_tokens_of_experts_alone():
    """Kept of a dispatched token: its hidden state, gate and up, their product, in bfloat16."""
    even, uneven = deepseek("none").activations[0], deepseek("none", 1.5).activations[0]
    dispatched = 8 * (HIDDEN + 2 * 2048 + 2048) * 2
    assert uneven.kept - even.kept == pytest.approx(0.5 * 512 * 4 * dispatched, rel=0.01)


def test_what_is_moved_to_host_memory_is_not_kept():
    """Of a dispatched token its hidden state, and gate and up: 4,096 tokens of each layer, too few for a norm's input to move."""
    without = deepseek("none").activations[0]
    moved = deepseek("none", offload=("attn_norm", "expert_fc1", "moe_act")).activations[0]
    tensors = [4096 * HIDDEN * 2, 4096 * 2 * 2048 * 2]
    smaller = 4 * 512 * HIDDEN * 2
    assert moved.moved == pytest.approx(4 * sum(tensors) + smaller, rel=0.001)
    assert without.kept - moved.kept == pytest.approx(moved.moved, rel=0.001)
    assert moved.pinned == 4 * (2**26 + 2**25 + 2**23)
    config = load_config(CONFIGS / "moonlight_16b/sft.yaml", [])
    rank = StageRank(0, RankMemory(Static(0, 0, 0, 0, 0, 0, 0, 0), (moved,)), in_flight=3, head_bytes=0)
    host = host_memory(config, (rank,), None, 8)
    assert host["activations"] == 8 * 3 * moved.pinned


def test_a_layer_alone_of_its_kind_is_on_its_way_too():
    """Three dense layers, which move nothing here, and one of experts: back for its own backward pass, and under way."""
    without, moved = (deepseek("none", offload=o, rank=0).activations[0] for o in ((), ("expert_fc1", "moe_act")))
    assert moved.working - without.working == pytest.approx(2 * moved.moved, rel=0.01) and moved.moved > 0


@pytest.mark.parametrize("imbalance", [1.0, 1.5, 2.0])
def test_routes_send_their_share_here_and_choose_no_expert_twice(imbalance):
    layout = ParallelConfig(ep=32)
    routes = Routes.of(DEEPSEEK, layout, rank=5, imbalance=imbalance)
    chosen = routes(1024, 256, 8)
    assert all(len(set(row)) == 8 for row in chosen.tolist())
    loads = torch.bincount(chosen.flatten(), minlength=256).view(32, 8).sum(1)
    assert loads[5] == pytest.approx(imbalance * 1024 * 8 / 32, rel=0.01)
    others = torch.cat([loads[:5], loads[6:]]).float()
    assert others.max() / others.min() < 1.1


def test_groups_of_ranks_are_megatrons():
    from megatron.core import parallel_state

    for sizes in ((2, 1, 3, 4, 1), (2, 2, 2), (1, 6), (4,)):
        for mask in itertools.product((True, False), repeat=len(sizes)):
            world = math.prod(sizes)
            wanted = parallel_state.generate_masked_orthogonal_rank_groups(world, list(sizes), list(mask))
            assert rank_groups(world, sizes, mask) == wanted, (sizes, mask)


def test_layers_measured_in_one_pipeline_are_those_of_another():
    """What the second one finds measured already, against a process that has measured nothing."""
    layouts = [
        ParallelConfig(pp=16, ep=32, layers_per_stage=(*[4] * 15, 1)),
        ParallelConfig(pp=8, ep=32, layers_per_stage=(*[8] * 7, 5)),
    ]
    model = ModelConfig(path="unused", recompute="full")
    shared = [measure(DEEPSEEK, model, one, None, world=512, rank=64, tokens=512) for one in layouts]
    for known in (rank._measured.cache_clear, rank._ends.clear, rank._further.clear):
        known()
    assert measure(DEEPSEEK, model, layouts[1], None, world=512, rank=64, tokens=512) == shared[1] != shared[0]


def test_activations_in_flight():
    assert [in_flight(ParallelConfig(pp=4), stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(ParallelConfig(pp=4), 0, 2) == 2
    beside = ModelConfig(path="unused", megatron={"overlap_moe_expert_parallel_comm": True})
    assert in_flight(ParallelConfig(), 0, 8, model=beside) == 2 and in_flight(ParallelConfig(), 0, 1, model=beside) == 1
    assert in_flight(ParallelConfig(pp=4, vpp=2), 3, 8, model=beside) == 3
    assert in_flight(ParallelConfig(pp=4, vpp=2), 3, 8) == 2.5  # megatron: 0 + 4 + 1 chunks of two


def test_a_dispatcher_of_a_library_that_is_not_here_is_planned():
    hf = json.loads((CONFIGS / "nano/model/config.json").read_text())
    one, other = (
        measure(hf, ModelConfig(path="unused", dispatcher=name), ParallelConfig(ep=2), None, world=2, rank=0, tokens=8)
        for name in ("alltoall", "deepep")
    )
    assert one == other


def test_fp8_is_refused_where_there_is_none():
    config = load_config(CONFIGS / "deepseek_v3_671b/sft.yaml", ["model.fp8=blockwise"])
    with pytest.raises(ConfigError, match="a100-80 has no FP8; set model.fp8=off"):
        plan_memory(config, DEEPSEEK, 256, gpu_kind("a100-80"), None, imbalance=1.0, per_node=8)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.offload_modules=[core_attn]", "recompute = full nothing of a layer is kept"),
        ("model.megatron.overlap_moe_expert_parallel_comm=true", "wants parallel.vpp > 1 in a pipeline"),
        ("model.dispatcher=deepep", "moe_shared_expert_overlap wants model.dispatcher = alltoall, not deepep"),
    ],
)
def test_keys_that_a_run_refuses_together_are_not_planned(key, message):
    config = load_config(CONFIGS / "deepseek_v3_671b/zero.yaml", [key])
    with pytest.raises(ConfigError, match=message):
        plan_memory(config, DEEPSEEK, 512, gpu_kind("h100-80"), None, imbalance=1.0, per_node=8)


def test_a_save_has_the_layers_of_multi_token_prediction():
    sizes = []
    for words in ((), ("model.mtp_loss_coefficient=0.3",)):
        config = load_config(CONFIGS / "deepseek_v3_671b/sft.yaml", list(words))
        sizes.append(checkpoint_bytes(config, DEEPSEEK))
    assert sizes[1] - sizes[0] == pytest.approx(14 * 11.6e9, rel=0.02)  # one more layer, and what joins two states


def test_phases_of_a_step():
    plan, phases = residency(load_config(CONFIGS / "moonlight_16b/zero.yaml", []))
    assert phases == ("rollout", "logprob", "reference", "update", "step", "reshard", "save")
    assert plan.places["rollout"]["weights"] == "host" and plan.places["save"]["kv_cache"] == "dropped"
    assert "score" in residency(load_config(CONFIGS / "deepseek_v3_671b/align.yaml", []))[1]
    assert residency(load_config(CONFIGS / "moonlight_16b/sft.yaml", []))[1] == ("update", "step", "save")


def stage_rank() -> StageRank:
    """Of 1,000 elements, as an optimizer of bfloat16 moments keeps them."""
    static = Static(2000, 4000, 4000, 2000, 2000, num_parameters=1000, num_expert_parameters=0, reference=0)
    return StageRank(0, RankMemory(static, (Activations(8, 1, 1, 1, {}),)), in_flight=1, head_bytes=0)


@pytest.mark.parametrize(
    ("keys", "passing"),
    [
        (["optimizer.precision_aware=true"], {}),
        (["optimizer.precision_aware=true", "optimizer.exp_avg_sq_dtype=float32"], {"a moment in float32": 4000}),
        (["optimizer.grad_reduce_in_fp32=false"], {"gradients in float32": 4000}),
    ],
)
def test_what_comes_and_goes_in_a_step(keys, passing):
    config = load_config(CONFIGS / "moonlight_16b/sft.yaml", keys)
    (step,) = (memory for memory in phase_memory(config, DEEPSEEK, (stage_rank(),), None) if memory.phase == "step")
    assert {name: size for name, size in step.parts.items() if name not in ("trainer", "context")} == passing


def test_the_advice_to_compute_all_again_names_what_does_not_go_with_it():
    keys = ["model.recompute=[moe_act]", "model.offload_modules=[core_attn]"]
    config = load_config(CONFIGS / "moonlight_16b/sft.yaml", keys)
    update = PhaseMemory("update", {"activations": 1e12}, 0)
    assert advice(config, update) == "set model.recompute=full, and leave model.offload_modules out"


@pytest.mark.parametrize(
    ("gigabytes", "said"), [(0, "fits"), (1959, "fits"), (1961, "at risk"), (2001, "does not fit")]
)
def test_a_node_keeps_five_gigabytes_for_each_of_its_ranks(gigabytes, said):
    assert node_verdict({"save": 1e9 * gigabytes} if gigabytes else {}, 8, 2000e9) == said


def trainer_of(parameters: float, kept: float) -> StageRank:
    """As many bfloat16 weights, whose float32 state is shared by two; kept: bytes of activations."""
    n = int(parameters)
    static = Static(2 * n, 4 * n, 2 * n, 2 * n, 2 * n, num_parameters=n, num_expert_parameters=0, reference=2 * n)
    return StageRank(0, RankMemory(static, (Activations(8, kept, 1e9, 1e9, {}),)), in_flight=1, head_bytes=0)


def test_a_trainer_is_told_its_keys_beside_a_generator_that_cannot_start():
    path, gpu = CONFIGS / "moonlight_16b/zero.yaml", gpu_kind("h100-80")
    config = load_config(path, ["rollout.kv_cache_bytes=1000", "memory.optimizer_offload=none", "model.recompute=full"])
    hf = read_model(config, path)
    memory = generator_memory(hf, torch.bfloat16, config.rollout, gpu.memory_bytes)
    placed = Placed(hf, gpu, 8, (trainer_of(7e9, 1e9),), memory, 8, 4000e9, None, 1e9)
    said = dict(problem.split(": ", 1) for problem in placed.problems(config, starts=False))
    assert "set " in said["update"] and "optimizer.cpu_offload=true" in said["update"] and "rollout" not in said


def test_what_is_told_to_set_makes_it_fit():
    """Of drawn trainers and generators: where keys are named for a phase or a node, it fits with them."""
    path, gpu, numbers = CONFIGS / "moonlight_16b/zero.yaml", gpu_kind("h100-80"), random.Random(3)
    hf = read_model(load_config(path), path)
    told: Counter[str] = Counter()
    for _ in range(40):
        keys = [
            f"memory.optimizer_offload={numbers.choice(('none', 'rollout'))}", f"memory.reference_swap={numbers.random() < 0.5}",
            f"memory.param_offload={numbers.random() < 0.5}", f"checkpoint.async_save={numbers.random() < 0.5}",
            f"rollout.gpu_memory_utilization={numbers.choice((0.9, 0.97))}", "model.recompute=full",
        ]  # fmt: skip
        config = load_config(path, keys)
        memory = generator_memory(hf, torch.bfloat16, config.rollout, gpu.memory_bytes)
        trainer = trainer_of(numbers.uniform(1e9, 12e9), numbers.uniform(0, 30e9))
        placed = Placed(hf, gpu, 8, (trainer,), memory, 8, 2000e9, None, 1e9)
        if numbers.random() < 0.5:
            placed = dataclasses.replace(placed, node_bytes=0.9 * sum(placed.host(config).values()) + 40e9)
        for problem in placed.problems(config):
            where, words = problem.split(":")[0], problem.partition("set ")[2].split()
            told["" if not words else words[0].split("=")[0]] += 1
            if not words:
                continue
            after = load_config(path, [*keys, *words])
            memory = generator_memory(hf, torch.bfloat16, after.rollout, gpu.memory_bytes)
            there = dataclasses.replace(placed, generator=memory)
            left = [phase for phase in there.phases(after) if phase.verdict(gpu) != "fits"]
            assert where not in [phase.phase for phase in left], (keys, problem)
            assert words[0].startswith("rollout.") or (not left and not list(there.problems(after))), (keys, problem)
            told |= Counter(host=1) if where == "host" else Counter()
    assert {"", "rollout.gpu_memory_utilization", "host"} < set(told) and len(told) > 4, told


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "etp": 2}, {}])
def test_a_model_leaves_a_rank_by_its_largest_parameter(layout):
    """The export itself, on tensors without memory: its peak is that of the largest parameter, and what is cast of none."""
    layout = ParallelConfig(**layout)
    words = [f"parallel.tp={layout.tp}", f"parallel.etp={layout.etp}", "parallel.ep=1", "parallel.pp=1"]
    config = load_config(CONFIGS / "moonlight_16b/sft.yaml", words)
    with as_rank(layout, 2, 0), ShapesOnly() as mode:
        policy = Policy(ModelConfig(path="unused"), TINY, layout, seed=0)
        before = mode.live_bytes
        mode.restart_peak()
        for _ in policy.hf_tensors():
            pass
        peak = mode.peak_bytes - before
    assert peak == pytest.approx(largest_parameter_bytes(TINY, config), rel=0.1, abs=4096)


def test_a_save_in_the_background_takes_its_share_again():
    """Of 8 ranks with 1,000 elements each."""
    saved = []
    for background in ("false", "true"):
        config = load_config(CONFIGS / "moonlight_16b/sft.yaml", [f"checkpoint.async_save={background}"])
        aware = config.optimizer.model_copy(update={"precision_aware": True})
        host = host_memory(config.model_copy(update={"optimizer": aware}), (stage_rank(),), None, 8)
        saved.append(host["save"])
    assert saved == [8 * (20 * 1000 + 2000), 8 * (32 * 1000 + 2000)]


class Counted(TorchDispatchMode):
    """The most bytes at once of storages that are made in the block; `given` were there before."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.seen:
                self.seen.add(key)
                self.live += (size := tensor.untyped_storage().nbytes())
                self.peak = max(self.peak, self.live)
                weakref.finalize(tensor.untyped_storage(), self.gone, key, size)
        return result

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def head_peak(monkeypatch, rows: int, words: int) -> int:
    """Of the loss in one pass as a GPU runs it, on tensors that say so and have no memory; the kernels, which allocate
    nothing, are left out, and the loss's own gradient is as good as any."""
    monkeypatch.setattr(linear, "stats_into", lambda *_: None)
    monkeypatch.setattr(linear, "backward_into", lambda *_: None)
    monkeypatch.setattr(linear, "kernels", lambda _: SimpleNamespace(log_prob_merge=lambda *_: None))
    monkeypatch.setattr(linear_loss, "gradient_scratch", lambda _: None)
    monkeypatch.setattr(linear_loss, "refuse_second_derivative", lambda: None)
    monkeypatch.setattr(
        linear_loss, "_loss_and_gradient", lambda loss, results, *_: (results.new_zeros(()), torch.empty_like(results))
    )
    context = SimpleNamespace(save_for_backward=lambda *saved: setattr(context, "saved_tensors", saved))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with torch.no_grad():
        hidden, weight = (torch.empty(n, HIDDEN, dtype=torch.bfloat16, device="meta") for n in (rows, words))
        weight.main_grad, weight.grad_added_to_main_grad = torch.empty_like(weight, dtype=torch.float32), False
        layer = linear.OutputLayer(
            weight, words, 0, words, None,
            softcap=None, entropy=False, reduce_hidden_grad=False, use_reference=False, dtype=torch.float32,
        )  # fmt: skip
        ids, inverse = torch.empty(rows, dtype=torch.int64, device="meta"), torch.ones(1, device="meta")
        with Counted(hidden, weight, weight.main_grad, ids, inverse) as counted:
            chosen = hidden.index_select(0, ids)
            chunks = linear_loss.chunks_of(rows, linear_loss.DEFAULT_CHUNK_TOKENS)
            tokens, both = linear.Tokens(ids, inverse, None, None), (True, True)
            loss = linear_loss._LinearLoss.forward(context, chosen, weight, (layer, tokens, None, chunks, both))
            given = linear_loss._LinearLoss.backward(context, torch.ones_like(loss))
    assert given[0].dtype == torch.bfloat16 and weight.grad_added_to_main_grad
    return counted.peak


@pytest.mark.parametrize("rows", [8192, 67584])
def test_beside_the_last_layers_the_fuller_of_both_passes(monkeypatch, rows):
    """Of a rank's 32,320 words; what the tensors of the pass itself take. Of SFT too, whose config is another model's."""
    config = load_config(CONFIGS / "deepseek_v3_671b/zero.yaml", ["parallel.tp=4", f"update.microbatch_tokens={rows}"])
    supervised = load_config(CONFIGS / "moonlight_16b/sft.yaml", ["parallel.tp=4", "parallel.cp=1"])
    expected = pytest.approx(head_peak(monkeypatch, rows, 129280 // 4), rel=0.01)
    assert head_bytes(config, DEEPSEEK, rows) == expected and head_bytes(supervised, DEEPSEEK, rows) == expected


def test_lengths_and_microbatches():
    config = load_config(CONFIGS / "moonlight_16b/zero.yaml", [])
    work = workload(config, Lengths(mean=1300, cv=0.5), replicas=8)
    responses = work.responses
    assert len(responses) == 8192 and sum(responses) / 8192 == pytest.approx(1300, rel=0.03)
    assert work == workload(config, Lengths(mean=1300, cv=0.5), replicas=8)
    assert work.microbatch_tokens <= 8192
    # 512 samples of 1,556 tokens over 8 replicas
    assert work.microbatches == pytest.approx(512 * (1300 + 256) / 8 / 8192, abs=1.5)
    given = workload(config, Lengths(given=(100, 200)), replicas=8)
    assert set(given.responses) == {100, 200}


def test_a_length_beyond_any_integer_of_a_machine_is_clipped():
    assert set(Lengths(given=(10**30, 5)).draw(64, 100, seed=1)) == {5, 100}


def test_an_unknown_gpu_names_the_known():
    with pytest.raises(ConfigError, match="h100-80, h200"):
        gpu_kind("h101")


def test_samples_take_a_share_of_host_memory_and_not_all_of_it():
    """On 512 ranks, for a rank's host memory. Bytes are measured below, and on 8 ranks in tests/dist."""
    config = load_config(CONFIGS / "deepseek_v3_671b/zero.yaml", [])
    replays = config.model_copy(update={"rollout": config.rollout.model_copy(update={"router_replay": True})})
    work = workload(config, Lengths(mean=9000), replicas=8)
    plain, routed = (planned_samples(one, DEEPSEEK, 512, work) for one in (config, replays))
    host = host_memory(config, (stage_rank(),), None, 8, plain)
    assert host["samples"] == 8 * plain.peak
    assert 1.0e9 < plain.peak < 1.1e9 and 3.4e9 < routed.peak < 3.9e9, (plain, routed, routed.peak)
    algorithm = config.algorithm.model_copy(update={"router_replay": True})
    recorded = planned_samples(config.model_copy(update={"algorithm": algorithm}), DEEPSEEK, 512, work)
    p, tokens = config.parallel, sum(map(sum, work.samples)) * config.update.num_epochs
    layers = (recorded.packed - plain.packed) / (
        8 * tokens / (512 / p.pp)
    )  # of 58 in stages of at most so many; 8 of 256
    assert 58 / p.pp <= layers <= 1 + 61 / p.pp and layers == pytest.approx(round(layers))
    assert (recorded.made, recorded.share, recorded.passing) == (plain.made, plain.share, plain.passing)
    cuts = ({"top_p": 0.9}, {"top_k": 1}, {"top_k": 1, "max_kept_ids": 64}, {"top_k": 50, "max_kept_ids": 2})
    rollouts = [config.rollout.model_copy(update=cut) for cut in cuts]
    told = [planned_samples(config.model_copy(update={"rollout": one}), DEEPSEEK, 512, work).share for one in rollouts]
    assert told[1] == told[2] < told[3] < told[0]  # 1, 2 and 4 ids a token


@pytest.mark.parametrize(("kind", "sizes", "kept"), [(np.uint8, (1, 1), 0), (np.uint16, (2, 4), 3)])
def test_bytes_of_samples_are_those_of_the_objects(kind, sizes, kept):
    """One generator and replica make and train on what there is; half of it where there are two."""
    numbers, groups = np.random.default_rng(0), []
    for slot, length in enumerate((2000, 3000)):
        routed = numbers.integers(0, 250, (63 + length, 3, 8)).astype(kind)
        ids, log_probs = numbers.integers(1000, 1 << 17, length), numbers.normal(size=length)
        lists = KeptIds.of([np.arange(kept)] * length) if kept else None
        response = Response(tuple(ids.tolist()), tuple(log_probs.tolist()), "stop", routed, kept=lists)
        prompt = Prompt("p", "q", ("1",), "math", None, tuple(range(64)))
        reward = Reward(1.0, {}, RewardStatus.OK)
        groups.append(RolloutGroup(prompt, (response,), ("text" * length,), (reward,), 0, slot))
    samples = training_samples(groups, AlgorithmConfig())
    arrays = sum(s.token_ids.nbytes + s.sampler_log_probs.nbytes for s in samples)
    arrays += sum(s.kept.counts.nbytes + s.kept.ids.nbytes for s in samples if kept)
    choices = sum(s.routed_experts.nbytes for s in samples)
    python = sum(
        sys.getsizeof(values) + sum(map(sys.getsizeof, values))
        for group in groups
        for values in (group.responses[0].token_ids, group.responses[0].log_probs)
    ) + sum(sys.getsizeof(group.texts[0]) for group in groups)
    batch = pack_for_loss(samples, [0, 1], {0: 0.5, 1: 0.5})
    tensors = [value for field in dataclasses.fields(batch) if torch.is_tensor(value := getattr(batch, field.name))]
    distinct = {value.data_ptr(): value.nbytes for value in tensors}  # old log-probs are the sampler's at first
    found = sample_memory(2, 5000 + 2 * 64, 5000, Sizes(2, 2, 1, 1, 8 * sizes[0], 8 * sizes[1], 3, 3, kept=kept))
    assert 2 * found.share == pytest.approx(arrays + choices, rel=0.002)  # a last token has no choices
    assert 2 * found.made == pytest.approx(python + arrays + choices, rel=0.05)
    assert 2 * found.packed == pytest.approx(
        sum(distinct.values()) + 2 * 4 * 5000, rel=0.02
    )  # old, reference log-probs
