"""A stage's loop on made-up inputs: random weights, prompts of random tokens, responses of a given length.

What runs is the stage's own code (`RLTrainer.step`, `SupervisedLoop`) on its own config, and what is reported are the
`perf/` and `memory/` metrics that every run writes. Replaced are the inputs alone:

- weights: drawn from N(0, initializer_range), so that no model is needed but its config.json;
- tokenizer, prompts, samples: files of random words, a word a token;
- responses (RL): sampled by the generator as ever, but each ends at a length that was drawn for it, and nowhere else;
- rewards (RL): 0 or 1 at random. Reward models, judges and sandboxes are not run, nor is the time for them in the figures.

Nothing is saved: no checkpoint, no export.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import shutil
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1mega import platform
from r1mega.config.launched import launched_place
from r1mega.config.load import load_config
from r1mega.config.model_files import HFConfig
from r1mega.config.rewards import RewardConfig
from r1mega.config.schema import CheckpointConfig, DataConfig, EvaluateConfig, ObserveConfig
from r1mega.config.stages.rl import RLStage
from r1mega.config.stages.sft import HeldOut, SFTData, SFTStage
from r1mega.config.validate import promised, validate
from r1mega.errors import ConfigError
from r1mega.model.flops import Work, model_flops
from r1mega.observe.metrics import read_metrics
from r1mega.observe.performance import RATED
from r1mega.observe.registry import PHASES
from r1mega.observe.trace import BETWEEN, OTHER
from r1mega.platform.launcher import adopt_launcher_environment
from r1mega.platform.validate import validate_platform
from r1mega.rollout.engine import sample_seed
from r1mega.types import (
    Completion,
    Cut,
    GenerationEngine,
    GenerationRequest,
    Prompt,
    Refill,
    Response,
    Reward,
    RewardStatus,
)
from r1mega.weights.explain import read_sizes

WARM_UP_STEPS = 1
MARKER = "synthetic.json"
"""A directory that this tool made, and may empty, has it."""

Lengths = Callable[[int], int]
"""Seed of a sample -> its tokens."""


# ---------------------------------------------------------------------- lengths


def draw_lengths(longest: int, mean: float | None, cv: float, file: Path | None) -> Lengths:
    """fixed (`mean`, or `longest` without it); log-normal with this mean and coefficient of variation; or drawn from the
    whole numbers in `file`. All within 1 and `longest`. Raises ConfigError for what cannot be.
    """
    if file is not None:
        try:
            given = [int(word) for word in file.read_text().split()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"--lengths {file}: {error}; it should hold whole numbers, one a response") from error
        if not given or min(given) < 1 or max(given) > longest:
            raise ConfigError(
                f"--lengths {file}: {len(given)} numbers; there must be some, all between 1 and {longest}"
            )
        return lambda seed: random.Random(seed).choice(given)
    center = longest if mean is None else mean
    if not 1 <= center <= longest or cv < 0:
        raise ConfigError(f"--mean {center} --cv {cv}: the mean must be between 1 and {longest}, cv at least 0")
    if cv == 0:
        return lambda seed: round(center)
    variance = math.log(1 + cv * cv)
    location = math.log(center) - variance / 2
    deviation = math.sqrt(variance)
    return lambda seed: min(longest, max(1, round(random.Random(seed).lognormvariate(location, deviation))))


class PacedEngine:
    """A generator whose responses end where `lengths` says, and at no stop token or text before."""

    def __init__(self, engine: GenerationEngine, lengths: Lengths):
        self._engine, self._lengths = engine, lengths

    def stream(
        self, requests: Sequence[GenerationRequest], cut: Cut | None = None, refill: Refill | None = None
    ) -> Generator[Completion]:
        """As the engine's own; each sample is a request by itself, as it is inside of the engine."""
        places: list[tuple[int, int]] = []
        num_known = 0

        def singles(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
            nonlocal num_known
            made = []
            for index, request in enumerate(requests, num_known):
                for sample in range(request.first_sample, request.first_sample + request.num_samples):
                    seed = sample_seed(request.seed, sample)
                    sampling = dataclasses.replace(
                        request.sampling, max_tokens=self._lengths(seed), stop_token_ids=(), stop_strings=()
                    )
                    made.append(GenerationRequest(request.prompt_token_ids, 1, seed, sampling, begun=request.begun))
                    places.append((index, sample))
            num_known += len(requests)
            return made

        further = None if refill is None else lambda: singles(refill())
        for done in self._engine.stream(singles(requests), cut, further):
            yield Completion(*places[done.request_index], done.response)


class RandomScorer:
    """0 or 1 at once, by the prompt and the first tokens of the response: the same on all ranks of a generator."""

    def __init__(self) -> None:
        self._rewards: list[Reward] = []

    def submit(self, prompt: Prompt, response: Response, text: str) -> int:
        value = float(random.Random(f"{prompt.id}/{response.token_ids[:16]}").random() < 0.5)
        self._rewards.append(Reward(value, {"accuracy": value}, RewardStatus.OK))
        return len(self._rewards) - 1

    def flush(self) -> None:
        """Nothing is waited for."""

    def result(self, ticket: int) -> Reward:
        return self._rewards[ticket]


# ---------------------------------------------------------------------- inputs


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """Where the made-up files are, and of what sizes they are. hf: the model's config.json."""

    directory: Path
    hf: HFConfig
    prompt_tokens: int
    lengths: Lengths
    steps: int

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def file(self) -> Path:
        return self.directory / "data.jsonl"

    @property
    def init_std(self) -> float:
        return self.hf.get("initializer_range") or 0.02


def synthetic_config(config: Any, inputs: Inputs, peak_tflops: float | None) -> Any:
    """The stage's config with made-up inputs in the place of its own; sizes, layout and algorithm stay."""
    common = {
        "run_dir": inputs.directory / "run",
        "model": config.model.model_copy(update={"path": inputs.model}),
        "checkpoint": CheckpointConfig(),
        "observe": ObserveConfig(tensorboard=False, peak_tflops=peak_tflops or config.observe.peak_tflops),
    }
    if isinstance(config, SFTStage):
        data = SFTData(files=(inputs.file,), template="{{ question }}", max_tokens=config.data.max_tokens)
        return config.model_copy(
            update=common
            | {"data": data, "tokenizer": inputs.model, "epochs": 1, "init_std": inputs.init_std,
               "held_out": HeldOut(share=0.0), "metrics_every_steps": 1}
        )  # fmt: skip
    balanced = config.model.force_expert_balance
    probe = {"probe_tolerance": 1e9} if balanced else {}  # the generator routes by its weights, the trainer does not
    replay = config.rollout.router_replay and not balanced
    return config.model_copy(
        update=common
        | {
            "steps": inputs.steps,
            "data": DataConfig(
                prompts=(inputs.file,), template="{{ question }}", max_prompt_tokens=config.data.max_prompt_tokens
            ),
            "rollout": config.rollout.model_copy(update={"stop": (), "router_replay": replay}),
            "weights": config.weights.model_copy(update=probe),
            "algorithm": config.algorithm.model_copy(update={"mask_truncated": False}),
            "reward": RewardConfig(),
            "evaluate": EvaluateConfig(),
        }
    )


def write_inputs(config: Any, inputs: Inputs) -> None:
    """config.json, a tokenizer of as many words as the model has tokens, and the prompts or samples. ConfigError for a
    directory with other things in it.
    """
    directory = inputs.directory
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).exists():
        raise ConfigError(f"--dir {directory}: there are other files in it; choose an empty or a new directory")
    shutil.rmtree(directory, ignore_errors=True)
    inputs.model.mkdir(parents=True)
    (directory / MARKER).write_text("{}\n")
    without = ("auto_map", "quantization_config")  # code and formats of published weights, which are not there
    hf = {key: value for key, value in inputs.hf.items() if key not in without}
    (inputs.model / "config.json").write_text(json.dumps(hf, indent=1))
    write_tokenizer(inputs.model, hf["vocab_size"])
    supervised = isinstance(config, SFTStage)
    count = config.batch_size * inputs.steps + 1 if supervised else 2 * config.rollout.num_prompts
    with inputs.file.open("w") as file:
        for index in range(count):
            rng = random.Random(f"{config.seed}/{index}")
            line = {"id": f"s{index}", "question": words(rng, inputs.prompt_tokens, hf["vocab_size"])}
            if supervised:
                line["response"] = words(rng, inputs.lengths(rng.getrandbits(60)), hf["vocab_size"])
            else:
                line["answer"] = "0"
            file.write(json.dumps(line) + "\n")


def words(rng: random.Random, count: int, vocabulary: int) -> str:
    return " ".join(f"t{rng.randrange(1, vocabulary)}" for _ in range(count))


def write_tokenizer(directory: Path, vocabulary: int, special: Mapping[str, str] | None = None) -> None:
    """The word "t17" is token 17. special: transformers' names of the first tokens and their words ({"eos_token": "<eos>"});
    without them no token ends a text.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    special = special or {}
    known = [*special.values(), *(f"t{i}" for i in range(len(special), vocabulary))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token=known[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


# ---------------------------------------------------------------------- the run


def run(arguments: Any) -> None:
    """The whole benchmark, on this rank."""
    loaded = load_config(arguments.config, arguments.overrides)
    if not isinstance(loaded, (RLStage, SFTStage)):
        raise ConfigError(f"stage {loaded.stage}: --synthetic runs RL stages, sft and distill")
    source, hf = architecture_of(loaded, arguments.config)
    inputs = sizes(arguments, loaded, hf)
    config = synthetic_config(loaded, inputs, arguments.peak_tflops)
    adopt_launcher_environment()
    check(config, inputs, source.parent)
    place = launched_place()
    if place is None or place.rank == 0:
        write_inputs(config, inputs)  # the others meet this rank in the process groups, before they read them
    lines, facts = _run_stage(config, inputs)
    if lines:
        summary = summarize(lines[WARM_UP_STEPS:], lines, facts["ranks"]) | facts | _asked(arguments, inputs)
        print(table(summary))
        output = arguments.json or inputs.directory / "throughput.json"
        output.write_text(json.dumps(summary, indent=1, default=str) + "\n")
        print(f"written to {output}, its steps to {config.run_dir}/metrics.jsonl")


def architecture_of(config: Any, path: Path) -> tuple[Path, dict[str, Any]]:
    """(which config.json, its content): the model's own, or what lies beside the YAML file until it is downloaded."""
    student = path.parent / "student"
    missing = not (config.model.path / "config.json").is_file()
    return read_sizes(student if missing and config.stage == "distill" else config.model.path, path)


def check(config: Any, inputs: Inputs, architecture: Path, world_size: int | None = None) -> None:
    """What `r1mega train` would say of the config, before anything is written or started: as if the files, weights
    included, were there. architecture: a directory with the model's config.json; world_size: as for `validate`.
    """
    there = {inputs.model: architecture, inputs.directory: None}
    with promised(there, damaged=list(there)):
        validate(config.model_copy(update={"init_std": None}) if isinstance(config, SFTStage) else config, world_size)
    validate_platform(config.model_copy(update={"model": config.model.model_copy(update={"path": architecture})}))
    platform.prepare()
    from r1mega.model.build import check_model

    check_model(inputs.hf, config.parallel, config.model)


def sizes(arguments: Any, config: Any, hf: HFConfig) -> Inputs:
    """How long prompts and responses are, by the command line and the config. Raises ConfigError."""
    supervised = isinstance(config, SFTStage)
    longest = config.data.max_tokens if supervised else config.data.max_prompt_tokens
    prompt = arguments.prompt_tokens or (max(1, longest // 8) if supervised else longest)
    room = config.data.max_tokens - prompt if supervised else config.rollout.max_response_tokens
    if not 1 <= prompt <= longest or room < 1:
        raise ConfigError(f"--prompt-tokens {prompt}: must be at least 1 and fit into the config's {longest} tokens")
    lengths = draw_lengths(room, arguments.mean, arguments.cv, arguments.lengths)
    path = arguments.config
    directory = arguments.dir or Path("runs/bench") / f"{path.resolve().parent.name}_{path.stem}"
    return Inputs(directory, hf, prompt, lengths, arguments.steps + WARM_UP_STEPS)


def _run_stage(config: Any, inputs: Inputs) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(metrics of every step on rank 0, what ran)."""
    from r1mega.stages.runtime import Runtime, Stopped

    class Unsaved(Runtime):
        """A run that stops after its steps and keeps nothing."""

        def save(self, trainer: Any, step: int, progress: Mapping[str, Any]) -> None:
            """A benchmark has no use for it."""

        def stop_requested(self) -> bool:
            return self._step >= inputs.steps

    with Unsaved.open(config) as runtime:
        if isinstance(config, SFTStage):
            from r1mega.stages import sft

            with contextlib.suppress(Stopped):
                sft.run(config, runtime)
        else:
            _run_rl(config, runtime, inputs)
        cuda = platform.current().name == "cuda"
        facts = {
            "device": torch.cuda.get_device_name() if cuda else "CPU",
            "ranks": dist.get_world_size(),
            "peak_tflops": runtime.peak_tflops,
        }
        return (read_metrics(runtime.run_dir) if runtime.is_main else []), facts


def _run_rl(config: RLStage, runtime: Any, inputs: Inputs) -> None:
    from r1mega.data.prompts import load_prompts
    from r1mega.rollout.partial import build_collector
    from r1mega.rollout.sampler import GroupSampler
    from r1mega.stages.rl import RLTrainer, rates

    trainer = RLTrainer(config, runtime, init_std=inputs.init_std)
    try:
        engine = PacedEngine(trainer.engine, inputs.lengths)
        group_size = config.rollout.group_size
        sampler = GroupSampler(engine, trainer.tokenizer, RandomScorer(), trainer.sampling, group_size, trainer.timer)
        prompts = load_prompts(config.data, trainer.tokenizer)
        trainer.collector = build_collector(sampler, prompts, trainer.cursor, config, None)
        with runtime.progress(total=inputs.steps, done=0):
            for step in range(1, inputs.steps + 1):
                trainer.timer.start_step()
                metrics, _ = trainer.step(step)
                runtime.write_metrics(step, metrics | rates(metrics, trainer.timer.finish_step()))
    finally:
        trainer.close()


# ---------------------------------------------------------------------- the report


RATES = ("tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "flops")
SHOWN = ("response/length_mean", "tokens/update", "expert/load_max_over_mean", "packing/fill_fraction")


def summarize(measured: Sequence[Mapping], all_lines: Sequence[Mapping], ranks: int) -> dict[str, Any]:
    """Medians of the measured steps' rates by phase; of memory the largest figure of all steps."""

    def median(name: str) -> float | None:
        values = [line[name] for line in measured if line.get(name) is not None]
        return statistics.median(values) if values else None

    phases: dict[str, dict[str, float | None]] = {}
    for phase in RATED:
        rate = f"perf/{phase}_tokens_per_second_per_gpu"
        seconds = [line[f"tokens/{phase}"] / line[rate] / ranks for line in measured if line.get(rate)]
        if seconds:
            rates = {name: median(f"perf/{phase}_{name}") for name in RATES}
            phases[phase] = {"seconds": statistics.median(seconds)} | rates
    memory = {}
    for name in sorted({name for line in all_lines for name in line if name.startswith("memory/")}):
        memory[name.removeprefix("memory/")] = max(line.get(name) or 0 for line in all_lines)
    figures = {name: value for name in SHOWN if (value := median(name)) is not None}
    return {"phases": phases, "memory": memory, "metrics": figures, "measured_steps": len(measured)}


def table(summary: Mapping[str, Any]) -> str:
    """Lines of text for a person."""
    memory, phases = summary["memory"], summary["phases"]
    kinds = [kind for kind in ("device", "host") if any(name.endswith(f"_{kind}_peak_bytes") for name in memory)]
    head = ["phase", "seconds", "tokens/s/GPU", "TFLOP/s/GPU", "MFU", *(f"peak {kind} GB" for kind in kinds)]
    rows = [head]
    for phase in (*PHASES, OTHER, BETWEEN, "step"):
        figures = phases.get(phase, {})
        peaks = [memory.get(f"{phase}_{kind}_peak_bytes") for kind in kinds]
        if not figures and not any(peaks):
            continue
        rows.append(
            [
                phase,
                _shown(figures.get("seconds"), "{:.3f}"),
                _shown(figures.get("tokens_per_second_per_gpu"), "{:,.1f}"),
                _shown(figures.get("tflops_per_gpu"), "{:.4g}"),
                _shown(figures.get("mfu"), "{:.2%}"),
                *(_shown(peak and peak / 1e9, "{:.3f}") for peak in peaks),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    peak, steps = summary["peak_tflops"], summary["measured_steps"]
    known = f"{peak:,g} TFLOP/s" if peak else "unknown (--peak-tflops gives it): no MFU"
    token, pair = summary["forward_flops_per_token"], summary["forward_flops_per_pair"]
    return "\n".join(
        [
            f"{summary['ranks']} x {summary['device']}, peak {known}; median of {steps} steps, memory of the fullest rank",
            f"forward pass of a token: {token:.4g} FLOP, and {pair:.4g} for every token that it attends to",
            *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
            *(f"{name}: {value:,.4g}" for name, value in summary["metrics"].items()),
        ]
    )


def _shown(value: float | None, form: str) -> str:
    return form.format(value) if value else "-"


def _asked(arguments: Any, inputs: Inputs) -> dict[str, Any]:
    flops = model_flops(inputs.hf)
    return {
        "config": arguments.config,
        "overrides": arguments.overrides,
        "prompt_tokens": inputs.prompt_tokens,
        "mean": arguments.mean,
        "cv": arguments.cv,
        "lengths": arguments.lengths,
        "forward_flops_per_token": flops.forward(Work(tokens=1, scored=1)),
        "forward_flops_per_pair": flops.forward(Work(pairs=1)),
    }
