"""Stages `sft` and `distill`: cross-entropy on responses, packed; held-out loss after each epoch; HF export."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from r1mega.checkpoint.hf import read_config
from r1mega.config.stages.sft import SFTStage
from r1mega.data.sft import LINES_AT_A_TIME, Line, Row, SFTDataset, build_token_file, held_out_indices, tokenise
from r1mega.data.tokenizer import Tokenizer, load_tokenizer
from r1mega.errors import DataError
from r1mega.platform import groups
from r1mega.stages.runtime import Runtime
from r1mega.stages.supervised import SupervisedLoop
from r1mega.train.packing import plan_packing
from r1mega.train.phases import plan_phases
from r1mega.train.policy import Policy
from r1mega.train.supervised import WeightedMicrobatch, WeightedSample, mean_loss, pack_weighted, sample_losses
from r1mega.train.trainer import Trainer
from r1mega.types import Deal


def run(config: SFTStage, runtime: Runtime) -> int:
    """Train for `config.epochs` and export RUN_DIR/hf. Returns the exit code."""
    tokenizer = load_tokenizer(config.tokenizer_path)
    work = functools.partial(tokenise, config.data, tokenizer)

    def build(deal: Deal) -> Path:
        at_a_time = min(LINES_AT_A_TIME * dist.get_world_size(), groups.DEALT_AT_A_TIME)
        done = 0

        def rows_of(lines: Sequence[Line]) -> list[Row | DataError]:
            nonlocal done
            rows = deal(work, lines)
            done += len(lines)
            runtime.note(f"{done} lines tokenised")
            return rows

        return build_token_file(config.data, tokenizer, runtime.run_dir / "data", rows_of, at_a_time)

    path = groups.lead(build, (work,))
    batches = _Batches(config, runtime, SFTDataset(path))
    hf_config = read_config(config.model.path)
    policy = Policy(config.model, hf_config, config.parallel, seed=config.seed, init_std=config.init_std)
    if config.init_std is None:
        policy.load_pretrained(config.model.path)
    plan = plan_phases(config.memory, cpu_adam=config.optimizer.cpu_offload)
    trainer = Trainer(policy, config.optimizer, total_steps=batches.num_steps, plan=plan)
    start, _ = runtime.restore(trainer, hf_config, batches.num_steps)
    loop = SupervisedLoop(runtime, trainer, hf_config, start, batches.num_steps, config.metrics_every_steps)
    measures = _HeldOut(batches, trainer, tokenizer)
    if start == 0:
        measures.note(0, measures.measure(0))
    loop.run(batches.after(start, policy), measures.after_step)
    exported = runtime.export(policy, hf_config, tokenizer_from=config.tokenizer_path)
    summary = {"steps": batches.num_steps, "samples": len(batches.training), "checkpoint": str(exported)}
    return runtime.finished(summary | measures.last)


class _Batches:
    """Which samples each step trains on; every rank plans it alike from lengths and seed."""

    def __init__(self, config: SFTStage, runtime: Runtime, dataset: SFTDataset):
        self.config, self.runtime, self.dataset = config, runtime, dataset
        held_out = held_out_indices(dataset.prompts(), config.held_out.share, config.seed)
        if len(held_out) == len(dataset):
            held_out = set()  # nothing would be left to train on
        self.held_out = sorted(held_out)
        self.training = [i for i in range(len(dataset)) if i not in held_out]
        self.steps_per_epoch = -(-len(self.training) // config.batch_size)
        self.num_steps = config.epochs * self.steps_per_epoch

    def after(self, skip: int, policy: Policy) -> Iterator[list[WeightedMicrobatch]]:
        """This rank's microbatches of each step after `skip`. The last batch of an epoch may be smaller."""
        size = self.config.batch_size
        for epoch in range(skip // self.steps_per_epoch, self.config.epochs):
            order = list(self.training)
            random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
            first = max(0, skip - epoch * self.steps_per_epoch)
            for start in range(first * size, len(order), size):
                yield self.pack(order[start : start + size], policy)

    def pack(self, members: Sequence[int], policy: Policy) -> list[WeightedMicrobatch]:
        """This data-parallel rank's share of these samples, by the best-fit plan."""
        plan = plan_packing(
            self.dataset.lengths,
            [members],
            self.config.microbatch_tokens,
            policy.num_replicas,
            policy.microbatch_multiple,
            self.config.min_microbatches or policy.min_microbatches,
        )
        return [pack_weighted([self._weighted(i) for i in part], part) for part in plan.bins[0][policy.replica]]

    def _weighted(self, index: int) -> WeightedSample:
        return WeightedSample(*self.dataset.sample(index, self.config.prompt_loss_weight))


class _HeldOut:
    """The loss on samples that are not trained on, and a few of them for a person to read."""

    def __init__(self, batches: _Batches, trainer: Trainer, tokenizer: Tokenizer):
        self._batches, self._trainer, self._policy, self._tokenizer = batches, trainer, trainer.policy, tokenizer
        self.last: dict[str, float] = {}

    def after_step(self, step: int) -> dict[str, float]:
        """The metrics of a step after which a measurement is due; {} after others."""
        every = self._batches.config.held_out.every_steps or self._batches.steps_per_epoch
        due = step % every == 0 or step == self._batches.num_steps
        return self.measure(step) if due else {}

    def measure(self, step: int) -> dict[str, float]:
        """{"train/held_out_loss": ...}; {} when no samples are held out. A collective call."""
        if not self._batches.held_out:
            return {}
        self._trainer.enter("logprob")
        batches = self._batches.pack(self._batches.held_out, self._policy)
        losses = sample_losses(self._policy, batches)
        self.last = {"train/held_out_loss": mean_loss(losses)}
        self._write_samples(step, batches, losses)
        return self.last

    def note(self, step: int, metrics: dict[str, float]) -> None:
        if metrics:
            self._batches.runtime.note(f"held-out loss after step {step}: {metrics['train/held_out_loss']:.4f}")

    def _write_samples(self, step: int, batches: Sequence[WeightedMicrobatch], losses: Sequence[torch.Tensor]) -> None:
        """The first held-out samples: the same ones each time, with what they cost (nats a token)."""
        local = {
            index: float(total / weight) if weight else math.nan
            for batch, sums in zip(batches, losses, strict=False)
            for index, (total, weight) in zip(batch.sample_indices, sums.tolist(), strict=True)
        }
        everyone: list[dict[int, float]] = [local]
        if dist.get_world_size() > 1:
            everyone = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, local)
        merged = {index: loss for part in everyone for index, loss in part.items()}
        source = self._batches
        shown = source.held_out[: source.config.observe.samples_per_step]
        source.runtime.write_sample_lines(
            *(self._line(step, index, merged[index]) for index in shown if index in merged)
        )

    def _line(self, step: int, index: int, loss: float) -> dict:
        sample = self._batches.dataset.describe(index)
        return {
            "step": step,
            "prompt_id": sample["id"],
            "question": sample["question"],
            "answers": [],
            "response": self._tokenizer.decode(sample["token_ids"]),
            "tokens": len(sample["token_ids"]),
            "finish_reason": "stop",
            "reward": None,
            "parts": {} if math.isnan(loss) else {"loss": loss},
            "status": "held out",
        }
