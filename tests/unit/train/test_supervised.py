"""Supervised steps against transformers + torch.optim.AdamW: prompts without and with weight, packing, held-out loss."""

import dataclasses
import math

import pytest
import torch

from tests.unit.train.tiny_policy import LEARNING_RATE, hub_names, make_samples, make_trainer, transformers_model

pytestmark = pytest.mark.heavy


def weighted(samples, prompt_weight):
    from r1mega.train.supervised import WeightedSample

    return [
        WeightedSample(
            s.token_ids.tolist(), [prompt_weight] * s.prompt_length + [1.0] * (len(s.token_ids) - s.prompt_length)
        )
        for s in samples
    ]


def reference_loss(model, samples, prompt_weight):
    """(sum, weight) of each sample's cross-entropies, each sample alone in a batch."""
    sums = []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype("int64"))
        nll = -model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        weights = torch.ones(len(ids) - 1)
        weights[: sample.prompt_length - 1] = prompt_weight
        sums.append((torch.sum(nll * weights), weights.sum()))
    return sums


def entropies_asked(policy, monkeypatch) -> list[bool]:
    """Whether each pass of a microbatch from now on wants entropies."""
    read, asked = policy.read, []

    def spy(*arguments, entropies, **options):
        asked.append(entropies)
        return read(*arguments, entropies=entropies, **options)

    monkeypatch.setattr(policy, "read", spy)
    return asked


@pytest.mark.parametrize(("prompt_weight", "log_probs"), [(0.0, "logits"), (0.1, "logits"), (0.1, "hidden")])
def test_sft_steps_equal_transformers_and_adamw(one_rank, tmp_path, monkeypatch, prompt_weight, log_probs):
    from r1mega.train.supervised import mean_loss, pack_weighted, sample_losses, supervised_step

    trainer, samples = make_trainer(log_probs), make_samples()
    policy = trainer.policy
    if log_probs == "hidden":  # loss and gradient in one pass of three products, in several parts
        policy._head = dataclasses.replace(policy._head, chunk_tokens=5)
    asked = entropies_asked(policy, monkeypatch)
    model = transformers_model(policy, tmp_path)
    groups = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    lines = weighted(samples, prompt_weight)

    def pack(*members):
        return pack_weighted([lines[i] for i in members], members)

    for packs in ([pack(0, 1), pack(2, 3)], [pack(3), pack(0, 2, 1)]):
        result = supervised_step(trainer, packs)
        parts = reference_loss(model, samples, prompt_weight)
        loss = sum(total for total, _ in parts) / sum(weight for _, weight in parts)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        assert math.isclose(result.loss, loss.item(), abs_tol=1e-5)
        assert math.isclose(result.update.grad_norm, float(norm), rel_tol=1e-4)
        lengths = [len(s.token_ids) for s in samples]
        assert result.work.tokens == sum(lengths) and result.work.pairs == sum(n * (n + 1) / 2 for n in lengths)
        assert (len(result.update.statistics) == 2) == (log_probs == "logits")
    assert bool(asked) == (log_probs == "logits") and not any(asked)  # nobody reads them
    trained, expected = dict(policy.hf_tensors()), hub_names(model.state_dict())
    for name, value in expected.items():
        difference = (trained[name] - value).abs()  # where a gradient is near zero Adam's step has the sign of rounding
        assert difference.max() <= 2.1 * LEARNING_RATE * 2, name
        assert difference.mean() <= 2e-2 * LEARNING_RATE, name

    losses = sample_losses(policy, [pack(2, 0), pack(1)])
    with torch.no_grad():
        again = reference_loss(model, samples, prompt_weight)
    for index, found in ((2, losses[0][0]), (0, losses[0][1]), (1, losses[1][0])):
        assert math.isclose(float(found[0] / found[1]), float(again[index][0] / again[index][1]), abs_tol=5e-3)
        assert math.isclose(float(found[1]), float(again[index][1]), rel_tol=1e-6)
    whole = torch.cat(losses).sum(0)
    assert math.isclose(mean_loss(losses), float(whole[0] / whole[1]), rel_tol=1e-12)


def test_tokens_without_weight_are_not_scored(one_rank):
    from r1mega.train.supervised import pack_weighted

    samples = make_samples()
    batch = pack_weighted(weighted(samples, 0.0), range(4))
    responses = [token for s in samples for token in s.token_ids[s.prompt_length :].tolist()]
    assert batch.targets.tolist() == responses
    assert batch.tokens[batch.rows + 1].tolist() == responses
    assert batch.weights.tolist() == [1.0] * len(responses)
