"""What a config would use of this machine: platform, layout, generator, kernels, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r1mega import platform
from r1mega.config.layout import num_experts
from r1mega.config.load import load_config
from r1mega.config.schema import ModelConfig, RolloutConfig, Stage, TrainingStage
from r1mega.config.stages.evaluate import GeneratorConfig
from r1mega.config.stages.rl import RLStage
from r1mega.config.validate import launched_processes, validate
from r1mega.data.prompts import scan_data
from r1mega.doctor.facts import Fact
from r1mega.errors import R1MegaError
from r1mega.observe.inputs import check_inputs
from r1mega.plan.command import generator_refusals
from r1mega.platform.validate import validate_platform
from r1mega.stages import check_model, check_rewards, check_run_directory, is_finished


def config_facts(
    path: Path, overrides: list[str], gpus: int | None = None, gpu: str = "h100-80"
) -> tuple[str, list[Fact], R1MegaError | None]:
    """(title, facts, what would keep it from running or None). Raises ConfigError for a file that is no config.

    gpus: as if it were started on so many of kind `gpu`; None: as it would be started now.
    """
    config = load_config(path, overrides)
    problem: R1MegaError | None = None
    try:
        validate(config, gpus)
        scan_data(config)
        validate_platform(config)
        check_run_directory(config)
        check_inputs(config)
        check_model(config)
        check_rewards(config)
    except R1MegaError as error:
        problem = error
    try:
        hf = json.loads((config.model.path / "config.json").read_text())
    except (OSError, ValueError):
        hf = {}  # validate has said so
    facts = [*_training_facts(config, hf), *_layout_facts(config, gpus or launched_processes())]
    if hasattr(config, "rollout"):
        facts += _generator_facts(config.rollout, hf)
    if gpus is not None:
        facts += [Fact("memory", False, refusal) for refusal in generator_refusals(config, path, gpus, gpu)]
        facts.append(Fact("memory", None, f"of each phase: r1mega plan {path} --gpus {gpus} --gpu {gpu}"))
    if isinstance(config, RLStage):
        facts.append(Fact("update", None, _update_text(config)))
    return f"{path}: stage {config.stage}", [*facts, *_file_facts(config)], problem


def _training_facts(config: Stage, hf: dict[str, Any]) -> list[Fact]:
    here = platform.current()
    facts = [Fact("platform", None, f"{here.device}, {here.distributed_backend}, {config.model.dtype}")]
    if config.model.dtype == "bfloat16" and here.name == "cpu":
        text = "bfloat16 on a CPU: slower at small sizes, and log-probs agree less; consider model.dtype=float32"
        facts.append(Fact("dtype", False, text))
    layers = "Transformer Engine" if here.has_transformer_engine else "Megatron's local layers"
    fp8 = config.model.fp8
    facts.append(Fact("layers", None, f"{layers}, fp8 {fp8}{_unquantized(config.model)}"))
    facts.append(Fact("log-probs", None, _log_prob_choice(config)))
    if fp8 != "off" and not here.has_transformer_engine:
        facts.append(Fact("fp8", False, f"model.fp8={fp8} needs Transformer Engine and a GPU; set model.fp8=off here"))
    if hf:
        experts = num_experts(hf)
        size = f"{hf.get('num_hidden_layers')} layers, hidden {hf.get('hidden_size')}"
        facts.append(
            Fact("model", True, f"{hf.get('model_type')}: {size}" + (f", {experts} experts" if experts else ""))
        )
    else:
        facts.append(Fact("model", False, f"{config.model.path}: no readable config.json"))
    return facts


def _unquantized(model: ModelConfig) -> str:
    """Which layers compute without FP8, where some do."""
    first, last = model.fp8_skip_first_layers, model.fp8_skip_last_layers
    return f" but in the first {first} and the last {last} layers" if first or last else ""


def _layout_facts(config: Stage, world: int) -> list[Fact]:
    p = config.parallel
    dp = world // (p.tp * p.pp * p.cp)
    text = f"{world} process{'es' * (world > 1)}: tp {p.tp}, pp {p.pp}, cp {p.cp}, dp {p.dp or dp}; experts ep {p.ep}, etp {p.etp}"
    return [Fact("layout", None, text)]


def _generator_facts(rollout: RolloutConfig | GeneratorConfig, hf: dict[str, Any]) -> list[Fact]:
    sampling = f", temperature {rollout.temperature:g}" if hasattr(rollout, "temperature") else ""  # else a task's own
    experts = f", experts ep {rollout.ep}" if rollout.ep > 1 else ""
    experts += f", cache over dcp {rollout.dcp}" if rollout.dcp > 1 else ""
    facts = [Fact("generator", None, f"{rollout.engine}, tp {rollout.tp}{experts}{sampling}")]
    if rollout.engine == "vllm":
        from r1mega.platform.generator import vllm_platform

        vllm = vllm_platform()
        if hf and (refusal := vllm.check_model(hf)) is not None:
            facts.append(Fact("attention", False, refusal))
        elif hf:
            arguments = vllm.engine_arguments(hf, rollout.kv_cache_bytes, rollout.gpu_memory_utilization)
            backend = arguments.get("attention_config", {}).get("backend", "vLLM's own choice")
            facts.append(Fact("attention", True, backend))
            if (cache := arguments.get("kv_cache_memory_bytes")) is not None:
                facts.append(Fact("KV cache", None, f"{cache / 2**20:.0f} MiB"))
    return facts


def _update_text(config: RLStage) -> str:
    rollout, update = config.rollout, config.update
    return (
        f"{rollout.num_prompts} prompts x {rollout.group_size} responses a step, "
        f"{update.num_minibatches * update.num_epochs} optimizer steps, microbatches of {update.microbatch_tokens} tokens"
    )


def _log_prob_choice(config: Stage) -> str:
    if config.model.log_probs == "reference":
        return "torch (model.log_probs=reference)"
    import r1mega_kernels

    try:
        return f"kernels, {r1mega_kernels.backend()}"
    except r1mega_kernels.PlatformError as error:  # no error of r1mega's; validate_platform has made one of it
        return f"kernels: {error}"


def _file_facts(config: Stage) -> list[Fact]:
    files = [path for data in config.prompt_data() for path in data.prompts]
    facts = [Fact("reads", path.is_file(), str(path)) for path in files]
    saved = sorted(
        path.name for path in (config.run_dir / "checkpoints").glob("step_*") if (path / "manifest.json").exists()
    )
    state = (
        "holds what it makes already"
        if is_finished(config)
        else f"goes on after {saved[-1]}"
        if saved
        else "a fresh run"
    )
    facts.append(Fact("run directory", None, f"{config.run_dir}: {state}"))
    names = ["config.yaml", "environment.json", "status.json", *config.outputs]
    if isinstance(config, TrainingStage):
        names.append(
            f"metrics.jsonl, the last {config.checkpoint.keep} checkpoints, one every {config.checkpoint.every_steps} steps"
        )
    if isinstance(config, TrainingStage) and config.observe.tensorboard:
        names.append("tensorboard/")
    if isinstance(config, RLStage):
        names.append("samples.jsonl")
    return [*facts, Fact("writes", None, ", ".join(names))]
