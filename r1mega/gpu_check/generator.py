"""vLLM's life in the trainer's process: built, given the policy's weights, proven, asleep at both levels, awake, closed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from r1mega.config.schema import ParallelConfig, WeightsConfig
from r1mega.gpu_check.findings import Context, Findings
from r1mega.gpu_check.policy import HF, SEQUENCES, Case, load_reference, make_samples, make_trainer, rl_step
from r1mega.platform import groups
from r1mega.rollout.engine import EngineSettings
from r1mega.train.samples import pack_samples
from r1mega.types import GenerationRequest, SamplingSettings
from r1mega.weights.sync import WeightSync

KV_CACHE_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
NEW_TOKENS = 24


def engine(context: Context, findings: Findings) -> None:
    """One process, one engine: every call that a run makes, in a run's order."""
    groups.init_parallel(ParallelConfig(), seed=0)
    live(context, findings, ParallelConfig(), tp=1)
    groups.destroy()


def live(context: Context, findings: Findings, layout: ParallelConfig, tp: int, ep: int = 1, label: str = "") -> None:
    """An engine's whole life beside a policy in `layout`. Figures begin with `label`."""
    from r1mega.rollout.vllm_engine import VllmEngine

    case = Case("bfloat16" if context.device == "cuda" else "float32", layout=layout)
    state, _ = load_reference(context)
    directory = _model_directory(context.work)
    trainer = make_trainer(case, state)
    policy = trainer.policy
    settings = EngineSettings(
        directory, 256, dtype=case.dtype, max_num_seqs=16, max_batched_tokens=1024, tp=tp, ep=ep,
        kv_cache_bytes=KV_CACHE_BYTES[context.device], gpu_memory_utilization=0.5,
    )  # fmt: skip
    generator = _timed(findings, f"{label}build", lambda: VllmEngine(settings))
    sequences = [sample.token_ids.tolist() for sample in make_samples("chosen")]
    sync = WeightSync(policy, generator, WeightsConfig(), HF, [s for s in sequences if len(s) > 20])
    try:
        first = _timed(findings, f"{label}push", sync.push)
        findings.figure(f"{label}largest difference of a probed log-prob", first["weights/probe_diff_max"])
        batch = [pack_samples(make_samples("chosen"), [0, 2])]
        (before,) = policy.log_probs(batch)
        generated = _generate(generator)
        finite = all(tokens and all(map(math.isfinite, scores)) for tokens, scores in generated)
        findings.holds(f"{label}generates", finite)
        largest = float((policy.log_probs(batch)[0] - before).abs().max())
        findings.at_most(f"{label}the policy beside the generator changes by", largest, 1e-3)
        _sleep(context, findings, generator, label, keep_weights=True)
        generator.wake_up()
        same = _same_tokens(generated, _generate(generator))
        # on a GPU rounding may differ, and a token with it; with other weights hardly any is the same
        findings.figure(f"{label}share of tokens that are the same after sleep", same)
        enough = 0.5 if context.device == "cuda" else 1.0
        findings.holds(f"{label}answers after sleep as before", same >= enough, f"{same:.0%}")
        _sleep(context, findings, generator, label, keep_weights=False)
        rl_step(trainer, make_samples("chosen"), 1, **case.algorithm)
        second = _timed(findings, f"{label}push while asleep", sync.push)  # wakes it up, digests and probes
        findings.figure(f"{label}largest difference after a step", second["weights/probe_diff_max"])
        _generate(generator)
    finally:
        _timed(findings, f"{label}close", generator.close)


def _sleep(context: Context, findings: Findings, generator: Any, label: str, *, keep_weights: bool) -> None:
    """Asleep, the KV cache's memory is free; twice is once."""
    free, kind = _free_bytes(context), f"{label}sleep, weights {'kept' if keep_weights else 'dropped'}"
    _timed(findings, kind, lambda: generator.sleep(keep_weights=keep_weights))
    generator.sleep(keep_weights=keep_weights)
    if context.device == "cuda":
        freed = _free_bytes(context) - free
        findings.figure(f"{kind}: bytes freed", freed)
        findings.holds(f"{kind}: frees the KV cache", freed >= 0.9 * KV_CACHE_BYTES["cuda"], str(freed))


def _free_bytes(context: Context) -> int:
    if context.device != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def _generate(generator: Any) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    sampling = SamplingSettings(temperature=1.0, max_tokens=NEW_TOKENS)
    prompts = [sample.token_ids[: SEQUENCES[i][0]].tolist() for i, sample in enumerate(make_samples("chosen"))]
    requests = [GenerationRequest(tuple(prompt), 2, seed, sampling) for seed, prompt in enumerate(prompts)]
    return [(response.token_ids, response.log_probs) for group in generator.generate(requests) for response in group]


def _same_tokens(before: list[tuple], after: list[tuple]) -> float:
    """Share of the tokens whose log-prob agrees too."""
    pairs = [pair for (tokens, scores), (again, others) in zip(before, after, strict=True)
             for pair in zip_longest(zip(tokens, scores, strict=True), zip(again, others, strict=True))]  # fmt: skip
    agree = [(a, b) for a, b in pairs if a and b and a[0] == b[0] and math.isclose(a[1], b[1], abs_tol=0.05)]
    return len(agree) / len(pairs)


def _timed(findings: Findings, name: str, function: Callable[[], Any]) -> Any:
    start = time.monotonic()
    value = function()
    findings.figure(f"{name}, seconds", time.monotonic() - start)
    return value


def _model_directory(work: Path) -> Path:
    """An HF directory with config.json; weights come from the policy. Ranks may write it at the same time."""
    directory = work / "model"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(HF))
    return directory
