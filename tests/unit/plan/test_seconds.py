"""The time model: what must hold of any, and that the document shows what the back-test prints."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from r1mega.checkpoint.parameters import parameters
from r1mega.config.load import load_config
from r1mega.model.flops import Work, model_flops, sequences_work
from r1mega.plan.decoding import rollout_seconds, sum_latency
from r1mega.plan.generator import generator_memory
from r1mega.plan.gpu import GPU as GPUKind
from r1mega.plan.gpu import Efficiency, gpu_kind
from r1mega.plan.seconds import (
    moving_seconds,
    nodes_of_a_token,
    optimizer_seconds,
    optimizer_steps,
    plan_seconds,
    reshard_seconds,
    stage_parameters,
)
from r1mega.plan.workload import Lengths, Workload, workload
from r1mega.weights.explain import Bandwidth, layouts, summarize
from r1mega.weights.plan import Plan
from tools.plan_back_test import held_memory, memory_table, table

REPOSITORY = Path(__file__).parents[3]
GPU = gpu_kind("h100-80")


def loaded(overrides: tuple[str, ...] = ()):
    return load_config(REPOSITORY / "configs/moonlight_16b/zero.yaml", list(overrides))


def predict(overrides: tuple[str, ...] = (), mean: float = 1300, imbalance: float = 1.0, **options):
    config = loaded(overrides)
    hf = json.loads((REPOSITORY / "configs/moonlight_16b/model/config.json").read_text())
    work = workload(config, Lengths(mean, 0.5), 8 // (config.parallel.tp * config.parallel.pp * config.parallel.cp))
    generator = generator_memory(hf, torch.bfloat16, config.rollout, GPU.memory_bytes)
    found = plan_seconds(
        config, hf, 8, options.pop("gpu", GPU), work, generator, imbalance=imbalance, per_node=8, **options
    )
    return found, work, hf


def test_phases_tokens_and_utilisation():
    found, work, hf = predict()
    assert list(found.phases) == ["rollout", "logprob", "update", "reshard", "offload"]
    whole = sequences_work((prompt + response, response) for prompt, response in work.samples)
    flops = model_flops(hf).training(whole) + 2 * model_flops(hf).forward(whole)
    assert found.flops == pytest.approx(flops)
    assert found.mfu(8, GPU) == pytest.approx(flops / (found.total * 8 * 989.4e12))
    assert found.tokens_per_gpu(8) * 8 * found.total == pytest.approx(work.tokens)


def test_what_takes_longer():
    plain = predict()[0].phases
    assert predict(mean=2600)[0].phases["rollout"] > plain["rollout"]
    full = predict(("model.recompute=full",))[0].phases
    assert full["update"] > plain["update"] and full["logprob"] == plain["logprob"]
    without = predict(("algorithm.kl_coefficient=0",))[0].phases
    assert without["logprob"] == pytest.approx(plain["logprob"] / 2)
    slower = dataclasses.replace(GPU, memory_bandwidth=GPU.memory_bandwidth / 2)
    assert predict(gpu=slower)[0].phases["rollout"] > plain["rollout"]
    better = predict(efficiency=Efficiency(matmul=0.9))[0].phases
    assert better["update"] < plain["update"] and better["rollout"] == plain["rollout"]


def test_activations_that_move_take_time_where_passes_are_shorter():
    plain = predict()[0].phases["update"]
    hidden, seen = (predict(moved=moved)[0].phases["update"] for moved in (1e3, 1e7))
    assert plain < hidden < 1.01 * plain  # but for the layer that moved last
    assert predict(moved=2e7)[0].phases["update"] == pytest.approx(2 * seen, rel=1e-3)  # but for the optimizer
    assert seen > 2 * plain


def test_exchanges_of_experts_beside_computation():
    """Of 8 ranks without a pipeline all but a microbatch's are hidden; in the log-probs none is."""
    keys = ("model.megatron.moe_shared_expert_overlap=false", "model.megatron.overlap_moe_expert_parallel_comm=")
    (plain, work, hf), (beside, _, _) = (predict((keys[0], keys[1] + on)) for on in ("false", "true"))
    config = load_config(REPOSITORY / "configs/moonlight_16b/zero.yaml", [])
    m, p = work.microbatches, config.parallel
    sparse, tokens = hf["num_hidden_layers"] - 1, work.tokens / 8
    sent = 2 * 2 * sparse * tokens * 6 * hf["hidden_size"] * 2 * (1 - 1 / p.ep) / (GPU.nvlink_bandwidth * 0.5)
    saved = plain.phases["update"] - beside.phases["update"]
    assert p.pp == 1 and saved == pytest.approx((1 - 1 / m) * sent, rel=0.02)
    assert beside.phases["logprob"] == plain.phases["logprob"]


def test_what_memory_moves_takes_time():
    """Of 16e9 parameters on 8 GPUs in 16 optimizer steps; a link of 64 GB/s at half of its speed."""
    nothing = ("memory.optimizer_offload=none", "memory.param_offload=false", "memory.reference_swap=false")
    assert "offload" not in predict(nothing)[0].phases
    state = predict((*nothing[1:], "memory.optimizer_offload=rollout"))[0].phases["offload"]
    assert state == pytest.approx(2 * 12 * 15.96e9 / 8 / 32e9, rel=0.005)
    assert predict((*nothing[1:], "memory.optimizer_offload=update"))[0].phases["offload"] == pytest.approx(16 * state)
    on_cpu = predict((*nothing, "optimizer.cpu_offload=true"))[0].phases["offload"]
    assert on_cpu == pytest.approx(16 * state * (4 + 2 + 28) / 24)


@pytest.mark.parametrize(
    ("name", "gpus", "overrides"),
    [
        ("moonlight_16b", 8, ()),
        ("moonlight_16b", 16, ()),
        ("qwen3_30b_a3b", 32, ()),
        ("moonlight_16b", 16, ("parallel.ep=16",)),
        ("moonlight_16b", 16, ("parallel.tp=8", "parallel.ep=1")),
        ("moonlight_16b", 32, ("parallel.tp=2", "parallel.cp=8", "parallel.ep=4")),
        ("moonlight_16b", 16, ("parallel.ep=4", "parallel.pp=2", "parallel.layers_per_stage=[14,13]")),
        ("moonlight_16b", 8, ("parallel.ep=2", "parallel.pp=4", "parallel.layers_per_stage=[7,7,7,6]")),
        ("deepseek_v3_671b", 512, ()),
    ],
)
def test_a_reshard_takes_what_its_plan_moves(name, gpus, overrides):
    """Over the links of a rank at half of their speed, if no rank waits; the fullest sender has more than the average."""
    path = REPOSITORY / f"configs/{name}/zero.yaml"
    config = load_config(path, list(overrides))
    hf = json.loads((path.parent / "model/config.json").read_text())
    generator = generator_memory(hf, torch.bfloat16, config.rollout, GPU.memory_bytes)
    seconds = generator.weights * reshard_seconds(config.parallel, hf, gpus, GPU, 8)
    plan = Plan(
        hf, *layouts(config, hf, gpus), model_dtype=torch.bfloat16, bucket_bytes=config.weights.bucket_bytes, ranks_per_node=8
    )  # fmt: skip
    without_waiting, _ = summarize(plan, Bandwidth(GPU.network_bandwidth / 2, GPU.nvlink_bandwidth / 2)).seconds
    assert without_waiting / 1.2 < seconds < 1.1 * without_waiting


def test_a_step_has_the_reshard_of_its_own_layout():
    found, _, hf = predict()
    config = load_config(REPOSITORY / "configs/moonlight_16b/zero.yaml")
    weights = generator_memory(hf, torch.bfloat16, config.rollout, GPU.memory_bytes).weights
    assert found.phases["reshard"] == pytest.approx(weights * reshard_seconds(config.parallel, hf, 8, GPU, 8))


def test_moments_in_bfloat16_are_half_as_much_to_move():
    """Main parameters of 4 bytes and two moments of 2, instead of three times 4."""
    rest = ("memory.optimizer_offload=rollout", "memory.param_offload=false", "memory.reference_swap=false")
    plain, aware = (
        predict((*rest, f"optimizer.precision_aware={aware}"))[0].phases["offload"] for aware in ("false", "true")
    )
    assert aware == pytest.approx(plain * 8 / 12)


def test_multi_token_prediction_is_computed_by_the_last_stage():
    """Of 4 + 4 layers one more on either stage; what a save holds, too."""
    path = REPOSITORY / "configs/deepseek_v3_671b/sft.yaml"
    hf = json.loads((path.parent / "model/config.json").read_text()) | {"num_hidden_layers": 8, "vocab_size": 1}
    layout = ["parallel.pp=2", "parallel.ep=8", "parallel.tp=1"]
    found = {}
    for further in (0, 0.3):
        for stages in ("[4,4]", "[5,3]", "[2,2,2,2]", "[3,1,1,3]"):
            words = [*layout, f"parallel.layers_per_stage={stages}", f"model.mtp_loss_coefficient={further}"]
            words += ["parallel.vpp=2"] if len(stages) > 5 else []
            config = load_config(path, words)
            work = workload(config, Lengths(4000), 4)
            seconds = plan_seconds(config, hf, 8, GPU, work, None, imbalance=1.0, per_node=8)
            stepping = optimizer_seconds(config, hf, 8, GPU, 8)
            found[further, stages] = seconds.phases["update"] - stepping, seconds.flops
    assert found[0.3, "[4,4]"][0] == pytest.approx(found[0, "[4,4]"][0] * 5 / 4, rel=1e-4)
    assert found[0.3, "[5,3]"][0] == found[0, "[5,3]"][0] == pytest.approx(found[0.3, "[4,4]"][0], rel=1e-4)
    assert found[0.3, "[5,3]"][1] > 1.1 * found[0, "[5,3]"][1]
    for stages in ("[2,2,2,2]", "[3,1,1,3]"):  # a rank has the first and the third, or the others
        assert found[0, stages][0] == found[0, "[2,2,2,2]"][0]
        assert found[0.3, stages][0] == pytest.approx(found[0, stages][0] * 5 / 4, rel=1e-4)
    words = [*layout[1:], "parallel.pp=4", "parallel.layers_per_stage=[2,3,3,0]", "model.mtp_loss_coefficient=0.3"]
    took = []
    for where in ("false", "true"):  # three layers in a stage at most, and four
        config = load_config(path, [*words, f"parallel.mtp_standalone={where}"])
        seconds = plan_seconds(config, hf, 32, GPU, work, None, imbalance=1.0, per_node=8)
        took.append(seconds.phases["update"] - optimizer_seconds(config, hf, 32, GPU, 8))
    assert took[1] == pytest.approx(took[0] * 4 / 3, rel=1e-4)


@pytest.mark.parametrize(
    ("nodes", "chosen", "groups", "limit", "experts"),
    [(2, 8, 1, 1, 256), (8, 8, 8, 4, 256), (16, 8, 8, 4, 256), (4, 6, 8, 4, 64)],
)
def test_a_token_goes_to_so_many_nodes(nodes, chosen, groups, limit, experts):
    """Against a router that chooses groups, and experts in them, at random."""
    drawn, found = np.random.default_rng(0), []
    for _ in range(2000):
        members = np.arange(experts).reshape(groups, -1)[drawn.permutation(groups)[:limit]].ravel()
        found.append(len(set(drawn.permutation(members)[:chosen] * nodes // experts)))
    hf = {"n_group": groups, "topk_group": limit}
    assert nodes_of_a_token(hf, chosen, nodes) == pytest.approx(np.mean(found), rel=0.1)


def test_experts_of_one_s_own_node_are_reached_over_nvlink():
    """Of 16 ranks on two nodes: 7 parts of 16 stay in the node while 8 leave it; all of 8 ranks stay."""
    free = dataclasses.replace(GPU, network_bandwidth=math.inf)
    none = dataclasses.replace(free, nvlink_bandwidth=math.inf)
    two, one = ("parallel.ep=16", "model.recompute=none"), ("parallel.ep=8", "model.recompute=none")

    def exchanged(words: tuple[str, ...], gpu: GPUKind) -> float:
        work = Workload(((256, 4096),) * 16, 1, 1, 1)
        hf = predict()[2]
        both = [
            plan_seconds(loaded(words), hf, 16, one, work, None, imbalance=1.0, per_node=8).phases["logprob"]
            for one in (gpu, none)
        ]
        return both[0] - both[1]

    a_part = 2 * 2 * 26 * 6 * 2048 * 2 * (256 + 4096)  # two passes, there and back, of a replica's tokens
    assert exchanged(one, GPU) == exchanged(one, free) == pytest.approx(a_part * 7 / 8 / GPU.nvlink_bandwidth / 0.5)
    assert exchanged(two, free) == pytest.approx(a_part * 7 / 16 / GPU.nvlink_bandwidth / 0.5)
    assert exchanged(two, GPU) == pytest.approx(a_part * 8 / 16 / GPU.network_bandwidth / 0.5)
    once = exchanged((*two, "model.dispatcher=deepep"), GPU)  # a node of two nearly always has one of six
    assert once == pytest.approx(a_part * 0.5 / 6 * 2 / GPU.network_bandwidth / 0.5, rel=0.05)


def test_a_fuller_rank_s_experts_are_waited_for():
    """By what they compute; without expert parallelism no rank has more than another."""
    free = dataclasses.replace(GPU, nvlink_bandwidth=math.inf)
    (even, work, hf), (uneven, _, _) = (predict(imbalance=r, gpu=free) for r in (1.0, 1.5))
    routed = 26 * 6 * 3 * 2048 * 1408 * 2 * work.tokens
    ratio = 1 + 0.5 * routed / model_flops(hf).forward(work.whole)
    assert uneven.phases["logprob"] / even.phases["logprob"] == pytest.approx(ratio)
    alone = {predict(("parallel.ep=1",), imbalance=r)[0].phases["logprob"] for r in (1.0, 1.5)}
    assert len(alone) == 1


def test_an_optimizer_step_reduces_updates_and_gathers():
    """16 of two nodes with ep 8: dense gradients over 16 ranks, those of experts over two on either node; Adam of 28 bytes
    and gradients and weights of 6 a number.
    """
    config, hf = (
        loaded(("parallel.ep=8", "optimizer.grad_reduce_in_fp32=true", "optimizer.precision_aware=false")),
        predict()[2],
    )
    experts = 26 * 64 * 3 * 2048 * 1408
    dense = 15.96e9 - experts
    sent = 6 * (dense * 15 / 16 / 8 + experts / 8 / 2) / GPU.network_bandwidth / 0.5
    updated = (4 + 2 + 2 * 12) * (dense + experts) / 16 / GPU.memory_bandwidth / 0.7
    assert optimizer_seconds(config, hf, 16, GPU, 8) == pytest.approx(sent + updated, rel=0.02)


@pytest.mark.parametrize(
    ("name", "changes", "mtp", "copies"),
    [
        ("moonlight_16b", {}, 0.0, 0),
        ("moonlight_16b", {"tie_word_embeddings": True}, 0.0, 1),  # on the first rank and on the last
        ("qwen3_30b_a3b", {}, 0.0, 0),
        ("deepseek_v3_671b", {}, 0.3, 1),
    ],
)
def test_ranks_of_a_pipeline_hold_all_parameters(name, changes, mtp, copies):
    """Norms and routers apart, of the list that checkpoints are made by; copies of a table on another rank beside them."""
    path = REPOSITORY / "configs" / name / "zero.yaml"
    hf = json.loads((path.parent / "model/config.json").read_text()) | changes
    config = load_config(path, [f"model.mtp_loss_coefficient={mtp}", "parallel.layers_per_stage=null"])
    layers, table = hf["num_hidden_layers"], hf["vocab_size"] * hf["hidden_size"]
    counts = {1: (layers,), 4: (0, layers // 2, layers - layers // 2, 0)}
    listed = sum(math.prod(shape) for one in parameters(hf, 1 if mtp else 0) for shape in one.entry.hf_shapes)
    for pp, held in counts.items():
        parallel = config.parallel.model_copy(update={"pp": pp, "vpp": None, "layers_per_stage": held})
        found = stage_parameters(config.model_copy(update={"parallel": parallel}), hf)
        if pp > 1 and mtp:
            apart = parallel.model_copy(update={"mtp_standalone": True})
            alone = stage_parameters(config.model_copy(update={"parallel": apart}), hf)
            assert alone[-1] == (table, 0.0) and [sum(part) for part in zip(*alone, strict=True)] == pytest.approx(
                [sum(part) for part in zip(*found, strict=True)]
            )
        assert len(found) == pp and sum(map(sum, found)) == pytest.approx(listed + table * copies * (pp > 1), rel=5e-4)
        if pp > 1:
            assert found[0] == (table, 0.0) and found[-1][0] >= table


def test_a_sum_over_ranks_waits_as_nccl_says():
    """2.30.7, src/graph/tuning.cc: 6.8 us, and up and down a tree 0.6 a rank of a node and 5 for every doubling of the nodes."""
    assert sum_latency(1, 8) == 0
    assert sum_latency(8, 8) == pytest.approx(15.2e-6)
    assert sum_latency(32, 8) == pytest.approx(35.2e-6)


def test_fewer_responses_than_generators_take_as_long_as_the_longest():
    config = load_config(REPOSITORY / "configs/moonlight_16b/zero.yaml")
    hf = json.loads((REPOSITORY / "configs/moonlight_16b/model/config.json").read_text())
    memory = generator_memory(hf, torch.bfloat16, config.rollout, GPU.memory_bytes)

    def seconds(*lengths: int) -> float:
        work = Workload(tuple((256, length) for length in lengths), 1, 1, 1)
        return rollout_seconds(config.rollout, torch.bfloat16, hf, 64, GPU, work, memory)

    assert seconds(100, 200, 4000) == seconds(4000) > seconds(100)


@pytest.fixture(scope="module")
def decoded():
    """Seconds of Moonlight's decoding on one generator, whose places are given."""
    config = load_config(REPOSITORY / "configs/moonlight_16b/zero.yaml")
    hf = json.loads((REPOSITORY / "configs/moonlight_16b/model/config.json").read_text())
    memory = generator_memory(hf, torch.bfloat16, config.rollout, GPU.memory_bytes)

    def seconds(lengths: list[int], places: int, tokens: float | None = None, gpu: GPUKind = GPU) -> float:
        rollout = config.rollout.model_copy(update={"max_num_seqs": places})
        work = Workload(tuple((256, length) for length in lengths), 1, 1, 1)
        share = 1 if tokens is None else tokens / memory.kv_tokens
        held = dataclasses.replace(memory, kv_cache=share * memory.kv_cache)
        return rollout_seconds(rollout, torch.bfloat16, hf, config.rollout.tp, gpu, work, held)

    return seconds


def test_responses_wait_for_a_place_and_for_the_cache(decoded):
    """Of one length: as many waves as do not fit at once. Of others: not all at once because one of them is long."""
    wave = decoded([640] * 10, 64)
    assert decoded([640] * 40, 10) == pytest.approx(4 * wave)
    cached = decoded([640] * 40, 64, tokens=10_000)  # as many as 40 have half way, or all at their ends
    assert 40 * (256 + 320) / 10_000 * wave < cached < 40 * (256 + 640) / 10_000 * wave
    uneven = [1000] * 63 + [4200]
    assert decoded(uneven, 16) > 1.2 * decoded(uneven, 64)
    assert decoded(uneven, 64, tokens=16 * 1500) > 1.1 * decoded(uneven, 64)


def test_more_to_do_takes_longer_and_a_better_gpu_less(decoded):
    drawn = random.Random()
    seed = drawn.randrange(10**6)
    drawn.seed(seed)
    lengths = [drawn.randint(1, 3000) for _ in range(drawn.randint(2, 100))]
    places = drawn.randint(1, 100)
    taken = decoded(lengths, places)
    assert decoded([2 * length for length in lengths], places) > taken, seed
    assert decoded([*lengths, 3000], 2 * places + 100) >= decoded([max(lengths)], 1), seed
    for kind in ("h200", "b200"):
        assert decoded(lengths, places, gpu=gpu_kind(kind)) < taken, (seed, kind)
        better = predict(gpu=gpu_kind(kind))[0].phases
        assert all(seconds <= predict()[0].phases[phase] for phase, seconds in better.items()), kind


def test_a_sum_over_two_ranks_sends_half_of_what_many_do():
    """Scattered and gathered: (n - 1) / n of the hidden states each way, two sums of each of 27 layers."""
    config = load_config(REPOSITORY / "configs/moonlight_16b/zero.yaml")
    hf = json.loads((REPOSITORY / "configs/moonlight_16b/model/config.json").read_text())
    free = dataclasses.replace(GPU, nvlink_bandwidth=math.inf)
    for ranks in (2, 8):
        rollout = config.rollout.model_copy(update={"tp": ranks, "ep": 1, "dcp": 1})
        memory = generator_memory(hf, torch.bfloat16, rollout, GPU.memory_bytes)
        work = Workload(((256, 64),) * 32, 1, 1, 1)
        timed = [rollout_seconds(rollout, torch.bfloat16, hf, ranks, gpu, work, memory) for gpu in (GPU, free)]
        sent = 64 * 27 * 2 * 2 * (ranks - 1) / ranks * 32 * 2048 * 2
        assert timed[0] - timed[1] == pytest.approx(sent / GPU.nvlink_bandwidth / Efficiency().network)


def test_sharing_a_cache_pays_where_it_bounds_what_runs_and_costs_a_response_alone():
    path = REPOSITORY / "configs/deepseek_v3_671b/zero.yaml"
    hf = json.loads((path.parent / "model/config.json").read_text())
    many = Workload(tuple((256, 8000 + 100 * i) for i in range(256)), 1, 1, 1)
    alone = Workload(((256, 8000),), 1, 1, 1)

    def seconds(work: Workload, *keys: str) -> float:
        rollout = load_config(path, list(keys)).rollout
        memory = generator_memory(hf, torch.bfloat16, rollout, GPU.memory_bytes)
        return rollout_seconds(rollout, torch.bfloat16, hf, 32, GPU, work, memory)

    assert seconds(many, "rollout.dcp=4") < seconds(many) / 2
    assert seconds(alone, "rollout.dcp=4") > seconds(alone)


def test_generators_that_share_experts_send_each_other_their_tokens():
    path = REPOSITORY / "configs/deepseek_v3_671b/zero.yaml"
    hf = json.loads((path.parent / "model/config.json").read_text())
    rollout = load_config(path, ["rollout.tp=8", "rollout.ep=16"]).rollout
    memory = generator_memory(hf, torch.bfloat16, rollout, GPU.memory_bytes)
    work = Workload(((256, 64),), 1, 1, 1)

    def seconds(gpu: GPUKind) -> float:
        return rollout_seconds(rollout, torch.bfloat16, hf, 16, gpu, work, memory)

    free = dataclasses.replace(GPU, network_bandwidth=math.inf)
    sent = 64 * 2 * 58 * 2 * 7168 * 2  # passes, there and back, layers of experts, a token of each of two, in bfloat16
    across, within = sent * 8 / 16 / GPU.network_bandwidth, sent * 7 / 16 / GPU.nvlink_bandwidth  # both at once
    assert seconds(GPU) - seconds(free) == pytest.approx((across - within) / Efficiency().network)


def test_every_epoch_of_the_update_takes_its_time():
    one, two = (predict((f"update.num_epochs={n}", "memory.optimizer_offload=update"))[0] for n in (1, 2))
    assert two.phases["update"] == pytest.approx(2 * one.phases["update"])
    assert two.phases["logprob"] == one.phases["logprob"]
    assert one.phases["offload"] < two.phases["offload"] < 2.01 * one.phases["offload"]
    assert one.flops < two.flops < 2 * one.flops


def test_a_reference_that_nobody_asks_moves_nothing():
    config = load_config(REPOSITORY / "configs/moonlight_16b/zero.yaml")
    hf = json.loads((REPOSITORY / "configs/moonlight_16b/model/config.json").read_text())

    def seconds(swap: bool, coefficient: float) -> float:
        algorithm = config.algorithm.model_copy(update={"kl_coefficient": coefficient})
        memory = config.memory.model_copy(update={"reference_swap": swap})
        held = config.model_copy(update={"algorithm": algorithm, "memory": memory})
        return moving_seconds(held, hf, 8, GPU, 1)

    assert seconds(True, 0.0) == seconds(False, 0.0) == seconds(False, 0.001) < seconds(True, 0.001)


def test_a_pipeline_waits_for_itself():
    """One stage of two does half, the other one the output layer too, and of m microbatches m + 1 pass."""
    words = ("parallel.ep=1", "model.recompute=none")
    halved = ("parallel.pp=2", "parallel.layers_per_stage=[14,13]")
    alone, halves = predict(words), predict((*words, *halved))
    whole, flops, m = alone[1].whole, model_flops(alone[2]), halves[1].microbatches
    layer, head = flops.forward(Work(whole.tokens, whole.pairs)) / 27, flops.forward(Work(scored=whole.scored))
    updated = [
        found.phases["update"] - optimizer_steps(config, work.minibatches) * optimizer_seconds(config, hf, 8, GPU, 8)
        for (found, work, hf), config in zip((alone, halves), map(loaded, (words, (*words, *halved))), strict=True)
    ]
    tokens = 2 * alone[1].microbatches / m  # of a microbatch, for half as many replicas
    slowest = max(14 * layer, 13 * layer + head) / (27 * layer + head)
    assert updated[1] / updated[0] == pytest.approx(tokens * slowest * (m + 1) / alone[1].microbatches)


def test_the_document_shows_the_back_test():
    assert "\n".join(table()) in (REPOSITORY / "docs/plan.md").read_text()


@pytest.mark.slow
@pytest.mark.heavy
def test_the_document_shows_memory_that_was_published():
    found = held_memory()
    assert all(abs(planned / held.gigabytes - 1) <= 0.1 for held, planned in found)
    assert "\n".join(memory_table(found)) in (REPOSITORY / "docs/plan.md").read_text()
