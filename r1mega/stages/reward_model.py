"""Stage `reward_model`: preference pairs (or safe and unsafe responses) -> a scalar head on the model, exported to
RUN_DIR/hf as a sequence classifier that `reward/preference.py` and transformers load.
"""

from __future__ import annotations

import logging
import random
from collections import ChainMap
from collections.abc import Sequence

import torch

from r1mega.algorithm import pairwise
from r1mega.checkpoint.hf import HFTensors, read_config
from r1mega.config.stages.reward_model import RewardModelStage
from r1mega.data.preferences import Judgement, Pair, encode, read_judgements, read_pairs
from r1mega.data.tokenizer import Tokenizer, load_tokenizer
from r1mega.errors import DataError
from r1mega.model.flops import model_flops
from r1mega.model.reward_head import SCORE, classifier_config, initial_head, untied
from r1mega.reward.extract import final_text
from r1mega.stages.runtime import Runtime
from r1mega.stages.supervised import work_metrics
from r1mega.train.phases import plan_phases
from r1mega.train.policy import Policy
from r1mega.train.reward_model import PreferenceSample, preference_scores, preference_step
from r1mega.train.trainer import Trainer

logger = logging.getLogger(__name__)


def run(config: RewardModelStage, runtime: Runtime) -> int:
    """Train for `config.num_epochs` over the data and export RUN_DIR/hf. Returns the exit code."""
    tokenizer, hf_config = load_tokenizer(config.model.path), untied(read_config(config.model.path))
    samples = load_samples(config, tokenizer, config.data.files)
    held_out = load_samples(config, tokenizer, config.data.held_out) if config.data.held_out else []
    steps_an_epoch = -(-len(samples) // config.batch_size)
    steps = config.num_epochs * steps_an_epoch
    policy = Policy(config.model, hf_config, config.parallel, seed=config.seed, scalar_head=True)
    tensors = HFTensors(config.model.path)
    head = {SCORE: initial_head(hf_config["hidden_size"], config.seed)}
    # a ChainMap is only written to in its first mapping, but its type asks for all of them to be mutable
    policy.load_hf(tensors if SCORE in tensors else ChainMap(head, tensors))  # type: ignore[arg-type]
    plan = plan_phases(config.memory, cpu_adam=config.optimizer.cpu_offload)
    trainer = Trainer(policy, config.optimizer, total_steps=steps, plan=plan)
    start, _ = runtime.restore(trainer, hf_config, steps)
    flops = model_flops(hf_config)
    figures: dict[str, float] = {}
    if start == 0 and held_out:
        runtime.note(_line(0, evaluate(config, trainer, held_out)))
    for step in runtime.steps(trainer, start, steps):
        indices = _members(config, len(samples), *divmod(step - 1, steps_an_epoch))
        with runtime.timer.phase("update"):
            result = preference_step(trainer, samples, indices, config.objective, config.microbatch_tokens)
        metrics = {
            "preference/loss": result.loss,
            "preference/accuracy": result.accuracy,
            "policy/grad_norm": result.update.grad_norm,
            "policy/skipped_updates": float(result.update.skipped),
            "policy/learning_rate": result.update.lr,
            "expert/load_max_over_mean": result.update.expert_load,
        }
        metrics |= work_metrics(flops, result.work)
        every = config.evaluate.every_steps
        if held_out and (step == steps or (every is not None and step % every == 0)):
            with runtime.timer.phase("evaluate"):
                figures = evaluate(config, trainer, held_out)
            runtime.note(_line(step, figures))
        runtime.write_metrics(step, metrics | figures_named(figures) | runtime.timer.finish_step())
        figures = figures if step == steps else {}
    reader = {"template": config.data.template, "reads": config.text_read}
    exported = runtime.export(policy, classifier_config(hf_config, reader), tokenizer_from=config.model.path)
    return runtime.finished({"steps": steps, "checkpoint": str(exported)} | figures)


def load_samples(config: RewardModelStage, tokenizer: Tokenizer, paths: Sequence) -> list[PreferenceSample]:
    """The files' lines as the model reads them. Raises DataError for bad lines, and (unless data.on_long says to skip)
    for texts of more than data.max_tokens.
    """
    data = config.data
    records: Sequence[Pair | Judgement]
    records = read_pairs(paths, data.min_margin) if config.objective == "pairwise" else read_judgements(paths)
    samples, alike, too_long = [], 0, 0
    for record in records:
        stated = (record.chosen, record.rejected) if isinstance(record, Pair) else (record.response,)
        texts = [_read(config, text) for text in stated]
        if len(texts) == 2 and texts[0] == texts[1]:
            alike += 1
            continue
        sequences = tuple(tuple(encode(tokenizer, data.template, record.question, text)) for text in texts)
        longest = max(map(len, sequences))
        if longest > data.max_tokens:
            if data.on_long == "error":
                raise DataError(
                    f"{record.where}: {longest} tokens, data.max_tokens is {data.max_tokens}; raise it, or set "
                    "data.on_long=skip"
                )
            too_long += 1
            continue
        samples.append(
            PreferenceSample(sequences, _target(config, record), tuple(len(tokenizer.encode(text)) for text in texts))
        )
    if alike:
        logger.warning("%d pairs whose summaries are the same were left out", alike)
    if too_long:
        logger.warning("%d lines longer than data.max_tokens = %d were left out", too_long, data.max_tokens)
    if not samples:
        raise DataError(f"{', '.join(map(str, paths))}: nothing left to train on")
    return samples


def evaluate(config: RewardModelStage, trainer: Trainer, samples: Sequence[PreferenceSample]) -> dict[str, float]:
    """What the model makes of samples: loss, accuracy and how much its scores follow the length of the texts."""
    trainer.enter("logprob")
    scores = preference_scores(trainer.policy, samples, config.microbatch_tokens)
    lengths = torch.tensor([sample.lengths for sample in samples], dtype=torch.float64)
    targets = torch.tensor([sample.target for sample in samples], dtype=torch.float64)
    if config.objective == "pairwise":
        chosen, rejected = scores.unbind(1)
        loss = pairwise.pairwise_losses(chosen, rejected, targets).mean()
        figures = {"accuracy": pairwise.accuracy(chosen, rejected)}
        figures |= pairwise.length_bias(chosen, rejected, *lengths.unbind(1))
    else:
        scores, safe = scores[:, 0], targets > 0.5
        loss = pairwise.pointwise_losses(scores, targets).mean()
        figures = {
            "accuracy": float(((scores > 0) == safe).double().mean()),
            "separation": pairwise.separation(scores[safe], scores[~safe]),
            "length_correlation": pairwise.correlation(scores, lengths[:, 0]),
        }
    return {
        "loss": float(loss),
        **figures,
        "pairs" if config.objective == "pairwise" else "responses": float(len(samples)),
    }


def figures_named(figures: dict[str, float]) -> dict[str, float]:
    """The figures under the names of metrics."""
    return {f"eval/{name}": value for name, value in figures.items()}


def _read(config: RewardModelStage, text: str) -> str:
    return final_text(text) if config.text_read == "summary" else text


def _target(config: RewardModelStage, record: Pair | Judgement) -> float:
    if isinstance(record, Judgement):
        return float(record.safe)
    return (record.margin or 0.0) if config.margin == "stated" else 0.0


def _members(config: RewardModelStage, count: int, epoch: int, place: int) -> list[int]:
    """The samples of one step: a seeded shuffle an epoch, the last batch of it may be smaller."""
    order = list(range(count))
    random.Random(f"{config.seed}/{epoch}").shuffle(order)
    return order[place * config.batch_size : (place + 1) * config.batch_size]


def _line(step: int, figures: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    return f"held-out preferences after step {step}: {shown}"
