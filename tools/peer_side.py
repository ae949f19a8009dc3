"""One process of a side of bench_peers.py, in its own virtual environment: `peer_side.py r1mega|trl DIRECTORY RUN_DIRECTORY`.

DIRECTORY is what bench_peers.make_inputs wrote. With RANK and WORLD_SIZE it is one of several, and takes its share of the
responses; all seconds and tokens that it says are its own. Says one line of JSON when the trainer is built; then, for each line that it
reads, takes a step and says {"times": {phase: {"wall": s, "cpu": s}}, "tokens": sampled tokens}. What libraries print goes to stderr.
The environment of TRL has no r1mega: each side imports its own library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share(lengths: list[int], rank: int, size: int) -> list[int]:
    """Of a step's lengths those of one process."""
    return lengths[rank * len(lengths) // size : (rank + 1) * len(lengths) // size]


class Stopwatch:
    """Seconds of blocks by name, on both clocks."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`."""
        begun = {key: clock() for key, clock in CLOCKS.items()}
        try:
            yield
        finally:
            own = self.seconds.setdefault(name, dict.fromkeys(CLOCKS, 0.0))
            for key, clock in CLOCKS.items():
                own[key] += clock() - begun[key]

    def around(self, owner: object, method: str, name: str) -> None:
        """Counts what `owner.method` takes for `name` from now on."""
        inner = getattr(owner, method)

        def timed(*positional: object, **named: object) -> object:
            with self.timed(name):
                return inner(*positional, **named)

        setattr(owner, method, timed)

    def taken(self) -> dict[str, dict[str, float]]:
        """All, and forgets it."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def differences(whole: Mapping[str, float], *parts: Mapping[str, float]) -> dict[str, float]:
    """What is left of `whole`."""
    return {clock: whole[clock] - sum(part[clock] for part in parts) for clock in CLOCKS}


# ---------------------------------------------------------------------- r1mega


def run_r1mega(directory: Path, run: Path, say: Callable[[object], None]) -> None:
    """Steps of `stages.rl.RLTrainer` on DIRECTORY/zero.yaml, in the run directory `run`."""
    from r1mega import platform
    from r1mega.config.load import load_config
    from r1mega.config.stages.rl import RLStage
    from r1mega.config.validate import validate
    from r1mega.platform.validate import validate_platform

    platform.prepare()
    import synthetic

    from r1mega.data.prompts import load_prompts
    from r1mega.observe.trace import PhaseTimer
    from r1mega.rollout.partial import build_collector
    from r1mega.rollout.sampler import GroupSampler
    from r1mega.stages.rl import RLTrainer
    from r1mega.stages.runtime import Runtime

    spec = json.loads((directory / "spec.json").read_text())
    config = load_config(directory / "zero.yaml", [f"threads={os.environ['OMP_NUM_THREADS']}", f"run_dir={run}"])
    assert isinstance(config, RLStage)
    validate(config)
    validate_platform(config)
    with Runtime.open(config) as runtime:

        class Both(PhaseTimer):
            """Also counts the seconds of the processor, in `cpu`."""

            @contextlib.contextmanager
            def phase(self, name: str) -> Iterator[None]:
                with cpu.phase(name), super().phase(name):
                    yield

        cpu = PhaseTimer(time.process_time)
        wall = runtime.timer = Both()
        trainer = RLTrainer(config, runtime)
        waiting: list[int] = []
        engine = synthetic.PacedEngine(trainer.engine, lambda seed: waiting.pop(0))
        scorer = synthetic.RandomScorer()
        sampler = GroupSampler(
            engine, trainer.tokenizer, scorer, trainer.sampling, config.rollout.group_size, wall, trainer.journal
        )
        prompts = load_prompts(config.data, trainer.tokenizer)
        trainer.collector = build_collector(sampler, prompts, trainer.cursor, config, None)
        say("ready")
        for number, lengths in enumerate(spec["lengths"], 1):
            if not sys.stdin.readline():
                break
            waiting[:] = share(lengths, RANK, SIZE)
            for timer in (cpu, wall):
                timer.start_step()
            metrics, _ = trainer.step(number)
            found = {clock: timer.finish_step() for clock, timer in (("cpu", cpu), ("wall", wall))}
            times = {
                name: {clock: found[clock][f"time/{phase}_seconds"] for clock in CLOCKS}
                for name, phase in (
                    ("rollout", "rollout"),
                    ("log-probs", "logprob"),
                    ("update", "update"),
                    ("step", "step"),
                )
            }
            times["the rest"] = differences(times["step"], times["rollout"], times["log-probs"], times["update"])
            say({"times": times, "tokens": metrics["tokens/rollout"] / SIZE, "phases": found})
        trainer.close()


# ---------------------------------------------------------------------- TRL


def run_trl(directory: Path, run: Path, say: Callable[[object], None]) -> None:
    """Steps of TRL's GRPOTrainer; `transformers.Trainer` calls back where one begins and ends."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    spec = json.loads((directory / "spec.json").read_text())
    questions = [json.loads(line)["question"] for line in (directory / "prompts.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    responses = spec["prompts"] * spec["group_size"]
    batch = min(spec["trl_batch"], responses // SIZE)
    steps, watch, tokens = iter(spec["lengths"]), Stopwatch(), 0

    class Lengths(LogitsProcessor):
        """Ends each row at its own length, and none before."""

        def __init__(self, lengths: list[int]):
            self._lengths, self._done = torch.tensor(lengths), 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self._done += 1
            scores[:, tokenizer.eos_token_id] = -torch.inf
            ends = self._lengths == self._done
            scores[ends] = -torch.inf
            scores[ends, tokenizer.eos_token_id] = 0.0
            return scores

    class Turns(TrainerCallback):
        """Waits for its turn before each step."""

        def on_step_begin(self, *_: object, **__: object) -> None:
            if not self.is_ready:
                say("ready")
                self.is_ready = True
            if not sys.stdin.readline():
                os._exit(0)
            self.open = watch.timed("step")
            self.open.__enter__()

        def on_step_end(self, *_: object, **__: object) -> None:
            nonlocal tokens
            self.open.__exit__(None, None, None)
            times = watch.taken()
            whole = times["scored"]
            times["log-probs"] = times.pop("reference", dict.fromkeys(CLOCKS, 0.0))
            times["update"] = differences(times["step"], whole)
            times["the rest"] = differences(times.pop("scored"), times["rollout"], times["log-probs"])
            say({"times": times, "tokens": tokens})

        is_ready = False

    def reward(completions: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        nonlocal tokens
        tokens = sum(len(ids) for ids in completion_ids)
        return [float(random.random() < 0.5) for _ in completions]

    settings = GRPOConfig(
        output_dir=str(run), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=batch, gradient_accumulation_steps=responses // batch // SIZE,
        num_generations=spec["group_size"], max_completion_length=spec["max_tokens"], beta=0.001, learning_rate=1e-6,
        max_steps=len(spec["lengths"]), logging_steps=10**6, save_strategy="no", report_to="none", disable_tqdm=True,
        seed=spec["seed"], ddp_backend="gloo" if SIZE > 1 else None, model_init_kwargs={"dtype": "float32"}, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        str(directory / "model"), reward, args=settings, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": questions * len(spec["lengths"])}), callbacks=[Turns()],
    )  # fmt: skip
    model = trainer.model
    generate = model.generate
    model.generate = lambda **named: generate(
        **named, logits_processor=LogitsProcessorList([Lengths(share(next(steps), RANK, SIZE))])
    )
    watch.around(trainer, "_generate", "rollout")
    watch.around(trainer, "_generate_and_score_completions", "scored")
    scores = trainer._get_per_token_logps_and_entropies

    def watched(model, *positional, **named):
        if model is trainer.ref_model:
            with watch.timed("reference"):
                return scores(model, *positional, **named)
        return scores(model, *positional, **named)

    trainer._get_per_token_logps_and_entropies = watched
    trainer.train()


def main() -> None:
    side, directory, run = sys.argv[1], *map(Path, sys.argv[2:])
    lines: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they like

    def say(line: object) -> None:
        lines.write(json.dumps(line) + "\n")
        lines.flush()

    {"r1mega": run_r1mega, "trl": run_trl}[side](directory, run, say)


if __name__ == "__main__":
    main()
