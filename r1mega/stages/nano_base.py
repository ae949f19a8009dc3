"""Stage `base`: the nano task, its tokenizer, and a base model pre-trained on its corpus of mixed quality."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path

from r1mega.checkpoint.hf import read_config
from r1mega.config.stages.nano_base import NanoBaseStage
from r1mega.data import nano, nano_general, nano_tokenizer
from r1mega.data.template import render
from r1mega.data.tokenizer import Tokenizer, load_tokenizer
from r1mega.errors import DataError
from r1mega.stages.runtime import Runtime
from r1mega.stages.supervised import SupervisedLoop
from r1mega.train.packing import best_fit, build_microbatch
from r1mega.train.phases import plan_phases
from r1mega.train.policy import Policy
from r1mega.train.supervised import WeightedMicrobatch, WeightedSample, pack_weighted
from r1mega.train.trainer import Trainer

WINDOW_SAMPLES = 2048
"""Corpus samples that are packed together; a window's microbatches are shuffled."""


def run(config: NanoBaseStage, runtime: Runtime) -> int:
    """Train to `config.steps` and export RUN_DIR/hf. Returns the exit code."""
    tokenizer_dir = runtime.run_dir / "tokenizer"
    if runtime.is_main:
        _make_task(config, runtime.run_dir, tokenizer_dir)
    runtime.barrier()
    tokenizer = load_tokenizer(tokenizer_dir)
    hf_config = read_config(config.model.path)
    policy = Policy(config.model, hf_config, config.parallel, seed=config.seed, init_std=config.init_std)
    plan = plan_phases(config.memory, cpu_adam=config.optimizer.cpu_offload)
    trainer = Trainer(policy, config.optimizer, total_steps=config.steps, plan=plan)
    start, _ = runtime.restore(trainer, hf_config, config.steps)
    loop = SupervisedLoop(runtime, trainer, hf_config, start, config.steps, config.metrics_every_steps)

    def measure(step: int) -> dict[str, float]:
        return _probe(policy, tokenizer, config.seed) if step == config.steps else {}

    loop.run(_batches(config, policy, tokenizer, start), measure)
    exported = runtime.export(policy, hf_config, tokenizer_from=tokenizer_dir)
    return runtime.finished({"steps": config.steps, "checkpoint": str(exported)})


def _make_task(config: NanoBaseStage, run_dir: Path, tokenizer_dir: Path) -> None:
    """Prompt files and tokenizer; what is there already stays (both depend on the config alone)."""
    task = config.task
    sizes: tuple[tuple[nano.Split, int, int], ...] = (
        ("train", task.num_train_prompts, task.num_general),
        ("eval", task.num_eval_prompts, task.num_general_eval),
    )
    for split, count, _ in sizes:
        path = run_dir / "data" / f"{split}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            nano.write_prompts(path, config.seed, count, split)
    for split, _, count in sizes:
        if not (last := run_dir / "data" / f"safety_{split}.jsonl").exists():  # the last one written
            nano_general.write_general(last.parent, config.seed, count, split)
    if not (tokenizer_dir / "tokenizer.model").exists():
        tokenizer_dir.mkdir(parents=True, exist_ok=True)
        nano_tokenizer.train_tokenizer(tokenizer_dir)


def _batches(
    config: NanoBaseStage, policy: Policy, tokenizer: Tokenizer, skip: int
) -> Iterator[list[WeightedMicrobatch]]:
    """This replica's microbatches, one list an optimizer step, from step `skip` on."""
    size, rank = policy.num_replicas, policy.replica
    if (end := tokenizer.eos_token_id) is None:
        raise DataError("the nano tokenizer has no token for the end of a text")
    step = 0
    for window in itertools.count():
        samples = [
            _weighted(
                tokenizer.encode_prompt(render("nano", question)),
                [*tokenizer.encode(completion), end],
                config.prompt_loss_weight,
            )
            for question, completion in nano.corpus(config.seed * 1_000_003 + window, WINDOW_SAMPLES)
        ]
        lengths = [len(sample.token_ids) for sample in samples]
        bins = best_fit(lengths, range(len(samples)), config.microbatch_tokens)
        random.Random(f"{config.seed}/{window}").shuffle(bins)
        for first in range(0, len(bins) - size + 1, size):
            step += 1
            if step > skip:
                members = bins[first + rank]
                yield [pack_weighted([samples[i] for i in members], members)]


def _weighted(prompt: list[int], completion: list[int], prompt_weight: float) -> WeightedSample:
    return WeightedSample(prompt + completion, [prompt_weight] * len(prompt) + [1.0] * len(completion))


def _probe(policy: Policy, tokenizer: Tokenizer, seed: int) -> dict[str, float]:
    """What RL can build on: by kind of token in clean, persistent reasoning, the share that the model finds likely
    (p > 1/2), teacher-forced, on problems that the corpus does not contain.

    Left out is where the habits lie that RL is to change: the first token after <think> and after a failed check.
    """
    rng = random.Random(seed)
    samples, kinds = [], []
    for problem in nano.problems(seed + 1, 64, "eval"):
        completion = nano.trace(problem, rng, style="search", language="en")
        samples.append((tokenizer.encode_prompt(render("nano", problem.question)), tokenizer.encode(completion)))
        words = completion.split()
        kinds += [None, None, *(_kind(before, word) for before, word in itertools.pairwise(words[1:]))]
    microbatch = build_microbatch([p + a for p, a in samples], [len(p) for p, _ in samples], range(len(samples)))
    (log_probs,) = policy.log_probs([microbatch])
    likely = (log_probs > math.log(0.5)).tolist()
    shares = {}
    for kind in ("candidate", "sum", "verdict", "answer"):
        hits = [hit for hit, k in zip(likely, kinds, strict=True) if k == kind]
        shares[f"probe/{kind}"] = sum(hits) / len(hits)
    return shares | {"probe/skills": min(shares.values())}


def _kind(before: str, word: str) -> str | None:
    """What skill predicting `word` after `before` takes."""
    if before in (nano.EN_WORDS["try"], *nano.LABELS):
        return "candidate"
    if before == nano.EN_WORDS["is"]:
        return "sum"
    if word in (nano.EN_WORDS["yes"], nano.EN_WORDS["no"]):
        return "verdict"
    return "answer" if before == "<answer>" else None
