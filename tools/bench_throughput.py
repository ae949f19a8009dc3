"""How fast a stage is: on made-up inputs, or against the bare libraries.

    python tools/bench_throughput.py CONFIG [key=value ...] --synthetic [--ranks N] [--mean L --cv c | --lengths FILE]

runs the steps of an RL stage, sft or distill on random weights and prompts (also under torchrun or srun): tokens, model
FLOPs and their share of the peak by phase, and peak memory. See `synthetic.py` and docs/performance.md.

    python tools/bench_throughput.py configs/nano/zero.yaml [key=value ...] [--steps 6]

alternates whole training steps with (a) a bare `vllm.LLM.generate` on the same prompts, in a process of its own so that
nothing of ours is in it, and (b) a bare Megatron forward, backward and optimizer step on the microbatches of the step.
Prints medians, the two ratios, and the share of the step that is neither rollout nor update.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def bare_vllm(connection: Any, model: str, settings: dict[str, Any], threads: int) -> None:
    """Child process: plain vLLM with its own weights loading; answers each list of prompts with (seconds, tokens)."""
    import torch

    from r1mega.platform import groups
    from r1mega.platform.generator import vllm_platform

    torch.set_num_threads(threads)
    platform = vllm_platform()
    platform.prepare_environment()
    from vllm import LLM, SamplingParams

    groups.init_distributed()
    platform.apply_patches()
    config = json.loads((Path(model) / "config.json").read_text())
    llm = LLM(
        model=model, skip_tokenizer_init=True, dtype=settings["dtype"], max_model_len=settings["max_model_len"],
        max_num_seqs=settings["max_num_seqs"], max_num_batched_tokens=settings["max_batched_tokens"],
        logprobs_mode="processed_logprobs", distributed_executor_backend="external_launcher",
        **platform.engine_arguments(config, settings["kv_cache_bytes"], settings["gpu_memory_utilization"]),
    )  # fmt: skip
    while (job := connection.recv()) is not None:
        prompts, seed = job
        params = [
            SamplingParams(
                n=settings["group_size"], temperature=settings["temperature"], top_p=settings["top_p"],
                max_tokens=settings["max_response_tokens"], stop_token_ids=settings["stop_token_ids"], logprobs=0,
                flat_logprobs=True, detokenize=False, seed=seed + 1000 * i,
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        llm.reset_prefix_cache()
        begun = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        connection.send((seconds, sum(len(c.token_ids) for o in outputs for c in o.outputs)))


def bare_megatron(trainer: Any, microbatches: list[Any], *, forward_only: bool = False) -> float:
    """Seconds of one plain language-model step (Megatron's own loss) on the same packed microbatches.

    trainer: one that serves as holder of Megatron's model and optimizer only.
    """
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from r1mega.model.build import packed_seq_params

    def forward_step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        output = model(
            batch.tokens[None], batch.positions[None], None, labels=batch.labels[None],
            packed_seq_params=packed_seq_params(batch.cu_seqlens),
        )  # fmt: skip
        return output, lambda losses: (losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {})

    model = trainer.ddp_chunks[0]
    begun = time.perf_counter()
    model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(microbatches), model=model,
        num_microbatches=len(microbatches), seq_length=max(b.num_tokens for b in microbatches), micro_batch_size=1,
        forward_only=forward_only,
    )  # fmt: skip
    if not forward_only:
        trainer.optimizer.step()
    return time.perf_counter() - begun


def measure(config: Any, runtime: Any, steps: int) -> dict[str, list[float]]:
    """Alternate our steps with the bare ones. Returns lists of figures by name, one entry a step after the warm-up."""
    from r1mega.checkpoint.hf import HFTensors
    from r1mega.stages.rl import RLTrainer
    from r1mega.train import grpo_update
    from r1mega.train.policy import Policy
    from r1mega.train.trainer import Trainer
    from r1mega.types import Cut

    trainer = RLTrainer(config, runtime)
    policy = Policy(config.model, trainer.hf_config, config.parallel, seed=config.seed)
    policy.load_hf(HFTensors(config.model.path))
    bare = Trainer(policy, config.optimizer, total_steps=10**6)
    seen: dict[str, Any] = {}
    plan, sample = grpo_update._plan, trainer.engine.stream

    def watched_plan(*arguments: Any) -> Any:
        seen["minibatches"], fill = plan(*arguments)
        return seen["minibatches"], fill

    def watched_stream(requests: Any, cut: Cut | None) -> Any:
        seen["prompts"] = [list(r.prompt_token_ids) for r in requests]
        return sample(requests, cut)

    for owner, name, watched in ((grpo_update, "_plan", watched_plan), (trainer.engine, "stream", watched_stream)):
        setattr(owner, name, watched)
    rollout = config.rollout
    settings = rollout.model_dump() | {
        "dtype": config.model.dtype,
        "max_model_len": config.data.max_prompt_tokens + rollout.max_response_tokens + 1,
        "stop_token_ids": list(trainer.sampling.stop_token_ids),
    }
    import torch

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(
        target=bare_vllm, args=(theirs, str(config.model.path), settings, torch.get_num_threads()), daemon=True
    )
    child.start()
    figures: dict[str, list[float]] = {}
    for step in range(1, steps + 2):
        trainer.timer.start_step()
        metrics, _ = trainer.step(step)
        times = trainer.timer.finish_step()
        ours.send((seen["prompts"], step))
        bare_seconds, bare_tokens = ours.recv()
        batches = [m.microbatches for m in seen["minibatches"]]
        megatron_seconds = sum(bare_megatron(bare, part) for part in batches)
        forward_seconds = bare_megatron(bare, [b for part in batches for b in part], forward_only=True)
        if step == 1:
            continue  # warm-up of all four
        other = times["time/step_seconds"] - times["time/rollout_seconds"] - times["time/update_seconds"]
        row = {
            "rollout tokens/s": metrics["tokens/rollout"] / times["time/rollout_seconds"],
            "bare vLLM tokens/s": bare_tokens / bare_seconds,
            "update tokens/s": metrics["tokens/update"] / times["time/update_seconds"],
            "bare Megatron tokens/s": metrics["tokens/update"] / megatron_seconds,
            "bare Megatron forward seconds": forward_seconds,
            "neither / step": other / times["time/step_seconds"],
            "neither but log-probs / step": (other - times["time/logprob_seconds"]) / times["time/step_seconds"],
            **{name: value for name, value in times.items()},
        }
        for name, value in row.items():
            figures.setdefault(name, []).append(value)
    ours.send(None)
    child.join(30)
    trainer.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--steps", type=int, default=6, help="measured steps (after one of warm-up)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    made = parser.add_argument_group("--synthetic")
    made.add_argument("--synthetic", action="store_true", help="random weights and inputs, no bare libraries")
    made.add_argument("--ranks", type=int, help="start so many of it on this machine, as torchrun does")
    made.add_argument("--prompt-tokens", type=int, help="default: data.max_prompt_tokens; sft: data.max_tokens / 8")
    made.add_argument("--mean", type=float, help="tokens of a response; default: as many as the config allows")
    made.add_argument("--cv", type=float, default=0.0, help="deviation of lengths over their mean; 0: all alike")
    made.add_argument("--lengths", type=Path, help="a file of whole numbers to draw lengths from")
    made.add_argument("--peak-tflops", type=float, help="of one device, where its name does not tell")
    made.add_argument("--dir", type=Path, help="for the made-up files, seen by all ranks; default: runs/bench/...")
    arguments = parser.parse_intermixed_args()
    if arguments.synthetic:
        run_synthetic(arguments)
    else:
        compare(arguments)


def run_synthetic(arguments: argparse.Namespace) -> None:
    """On this rank, or on `--ranks` of them."""
    from r1mega.errors import R1MegaError

    if arguments.ranks is not None:
        from r1mega.platform.local_ranks import run_ranks

        words = iter(sys.argv[1:])
        others = [word for word in words if not (word == "--ranks" and next(words)) and not word.startswith("--ranks=")]
        sys.exit(run_ranks([__file__, *others], arguments.ranks))
    import synthetic

    try:
        synthetic.run(arguments)
    except R1MegaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def compare(arguments: argparse.Namespace) -> None:
    """Our phases and the bare libraries."""
    from r1mega import platform
    from r1mega.config.load import load_config
    from r1mega.config.validate import validate
    from r1mega.platform.validate import validate_platform

    platform.prepare()
    from r1mega.stages.runtime import Runtime

    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(arguments.config, [*arguments.overrides, f"run_dir={scratch}/run"])
        validate(config)
        validate_platform(config)
        with Runtime.open(config) as runtime:
            figures = measure(config, runtime, arguments.steps)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    for name, value in medians.items():
        low, high = min(figures[name]), max(figures[name])
        print(f"{name:28s} median {value:10.3f}   min {low:10.3f}   max {high:10.3f}")

    def paired(ours: str, bare: str) -> float:
        return statistics.median(a / b for a, b in zip(figures[ours], figures[bare], strict=True))

    print(f"rollout / bare vLLM          {paired('rollout tokens/s', 'bare vLLM tokens/s'):.3f}   (goal >= 0.9)")
    print(f"update / bare Megatron       {paired('update tokens/s', 'bare Megatron tokens/s'):.3f}   (goal >= 0.8)")
    print(f"neither / step               {medians['neither / step']:.3f}   (goal <= 0.10)")
    print(f"  of which reference log-probs {medians['time/logprob_seconds'] / medians['time/step_seconds']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from r1mega import ending

    ending.run(main)
