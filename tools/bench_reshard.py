"""Seconds and GB/s of both reshard strategies, and of plain memory copies of the same bytes, in one run.

    python tools/bench_reshard.py [--ranks 4] [--tp 2] [--ep 2] [--pp 1] [--generator-tp 1] [--generator-ep 1]
                                  [--dtype ...] [--repeats 5]

Real Megatron shards and real vLLM engines in each process, random weights. In turns, after a barrier, the slowest rank
counting:
  copy      every rank copies tensors of the shapes of its generator's parameters onto others
  direct    shards into vLLM's plain parameters (the plan's exchange)
  gather    whole HF tensors out of Megatron and through vLLM's loader
and the whole pushes as a run makes them: with vLLM's packing of the weights for its kernels, and the digests of both
sides. GB/s: bytes of the generator's parameters, summed over the ranks, a second. CPU seconds (of all ranks together) hold on
a machine that others use as well.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 8192, "hidden_size": 512,
    "intermediate_size": 2048, "moe_intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 8, "n_shared_experts": 1, "n_routed_experts": 16, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512, "q_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 64, "qk_nope_head_dim": 64,
    "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 512, "initializer_range": 0.02, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 4), ("tp", 2), ("ep", 2), ("pp", 1), ("etp", 1), ("generator-tp", 1),
                          ("generator-ep", 1), ("repeats", 5), ("bucket-megabytes", 32)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def run_rank(rank: int, options: argparse.Namespace, port: int, directory: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(options.ranks), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from r1mega.config.schema import ModelConfig, ParallelConfig
    from r1mega.platform import groups

    parallel = ParallelConfig(tp=options.tp, ep=options.ep, pp=options.pp, etp=options.etp)
    groups.init_parallel(parallel, seed=0)
    from r1mega.model.build import build_model
    from r1mega.rollout.engine import EngineSettings
    from r1mega.rollout.vllm_engine import VllmEngine

    chunks = build_model(MODEL, parallel, ModelConfig(path=directory, dtype=options.dtype), seed=0, init_std=0.02)
    engine = VllmEngine(EngineSettings(
        directory, 64, dtype=options.dtype, max_num_seqs=8, kv_cache_bytes=32 << 20, tp=options.generator_tp,
        ep=options.generator_ep, bucket_bytes=options.bucket_megabytes << 20))  # fmt: skip
    report = measure(options, chunks, engine)
    if rank == 0:
        print(report, flush=True)
    engine.close()
    groups.destroy()


def measure(options: argparse.Namespace, chunks: list[Any], engine: Any) -> str:
    import torch
    import torch.distributed as dist

    from r1mega.checkpoint.hf_state import export_hf
    from r1mega.weights import verify
    from r1mega.weights.direct import DirectTransfer, local_parameters
    from r1mega.weights.plan import GeneratorLayout
    from r1mega.weights.transfer import DigestTap, bucketed

    dtype = getattr(torch, options.dtype)
    layout = GeneratorLayout(options.ranks, options.generator_tp, options.generator_ep)
    direct = DirectTransfer(lambda: chunks, engine, MODEL, layout, model_dtype=dtype,
                            bucket_bytes=options.bucket_megabytes << 20)  # fmt: skip
    target, worker, platform = engine._target, engine._worker, engine._platform
    platform.begin_write(worker)
    parameters = dict(worker.model_runner.model.named_parameters())
    placed = {placement.parameter for placement in target.placements}
    plain = {name: torch.zeros_like(tensor.data) for name, tensor in parameters.items() if name in placed}
    direct.write(plain)
    copies = {name: tensor.clone() for name, tensor in plain.items()}
    platform.finish_write(worker)
    tap = DigestTap(dtype, MODEL)

    def copy() -> None:
        for name, tensor in plain.items():
            tensor.copy_(copies[name])

    def whole_direct() -> None:
        direct.push()
        verify.compare_digests(direct.digest(), engine.weights_digest())

    def whole_gather() -> None:
        engine.update_weights(tap(export_hf(chunks)))
        verify.compare_digests(tap.digest, engine.weights_digest())

    def gather_seconds() -> tuple[float, float]:
        platform.begin_reload(worker)
        seconds = slowest(lambda: [platform.load_weights(worker, bucket) for bucket in bucketed(
            export_hf(chunks), options.bucket_megabytes << 20)])  # fmt: skip
        platform.finish_reload(worker)
        return seconds

    sources = local_parameters(chunks)
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.repeats + 1):
        for name, seconds in (
            ("copy", slowest(copy)), ("direct", slowest(lambda: direct.exchange.run(sources, plain))),
            ("gather", gather_seconds()), ("whole push, direct", slowest(whole_direct)),
            ("whole push, gather", slowest(whole_gather)),
        ):  # fmt: skip
            times.setdefault(name, []).append(seconds)
    totals = torch.tensor([sum(t.nbytes for t in plain.values()), *direct.exchange.num_bytes])
    dist.all_reduce(totals)
    return format_report(options, times, totals.tolist())


def slowest(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the slowest rank, all starting together, and CPU seconds of all."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    begun, cpu = time.perf_counter(), time.process_time()
    function()
    seconds, cpu_seconds = torch.tensor(time.perf_counter() - begun), torch.tensor(time.process_time() - cpu)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(cpu_seconds)
    return float(seconds), float(cpu_seconds)


def format_report(options: argparse.Namespace, times: dict[str, list[tuple[float, float]]], totals: list[int]) -> str:
    whole, sent, _, kept = totals
    lines = [f"{options.ranks} ranks, trainer tp {options.tp} ep {options.ep} etp {options.etp} pp {options.pp}, "
             f"generator tp {options.generator_tp} ep {options.generator_ep}, {options.dtype}: {whole / 1e6:.0f} MB of generator parameters "
             f"over all ranks, "
             f"{sent / 1e6:.0f} MB sent, {kept / 1e6:.0f} MB kept"]  # fmt: skip
    lines += ["", "| | seconds (median) | min | max | GB/s | CPU seconds |", "|---|---|---|---|---|---|"]
    for name, turns in times.items():
        seconds, cpu = zip(*turns[1:], strict=True)  # the first warms up
        median = statistics.median(seconds)
        figures = f"{median:.3f} | {min(seconds):.3f} | {max(seconds):.3f} | {whole / 1e9 / median:.2f} | {statistics.median(cpu):.3f}"
        lines.append(f"| {name} | {figures} |")

    def ratio(a: str, b: str, kind: int) -> float:
        return statistics.median(x[kind] / y[kind] for x, y in zip(times[a][1:], times[b][1:], strict=True))

    for kind, what in enumerate(("seconds", "CPU seconds")):
        lines += ["", f"Medians of the ratios of each turn, {what}:",
                  f"gather / direct {ratio('gather', 'direct', kind):.2f}; "
                  f"whole pushes {ratio('whole push, gather', 'whole push, direct', kind):.2f}; "
                  f"direct's rate / copy's {ratio('copy', 'direct', kind):.2f}"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(MODEL))
        rest = (options, port, Path(directory))
        ranks = [context.Process(target=run_rank, args=(rank, *rest)) for rank in range(options.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if failed := [rank for rank, process in enumerate(ranks) if process.exitcode]:
        raise SystemExit(f"ranks {failed} failed")


if __name__ == "__main__":
    main()
