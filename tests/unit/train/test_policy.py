"""The policy: GRPO steps against transformers + torch.optim.AdamW, and whatever must not change them."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r1mega import platform
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from r1mega.config.stages.rl import AlgorithmConfig
from r1mega.train.packing import build_microbatch
from r1mega.train.sample_plan import Reads
from r1mega.types import KeptIds
from tests.dist.loss_worker import VARIANTS
from tests.unit.train.tiny_policy import (
    HF,
    LEARNING_RATE,
    TEMPERATURE,
    hub_names,
    make_samples,
    make_trainer,
    run_update,
    transformers_model,
)

pytestmark = pytest.mark.heavy

platform.prepare()


def test_kept_ids_go_where_a_head_is():
    """To one chunk of two, of a rank that holds both."""
    from r1mega.train.policy import Policy, _Pass

    batch = build_microbatch([[1, 2, 3]], [1], [0], kept=[KeptIds.of([np.arange(4), np.arange(3)])])
    policy = object.__new__(Policy)
    policy.device, policy.modules = batch.tokens.device, ["body", "head"]
    policy._chunks = [SimpleNamespace(post_process=False), SimpleNamespace(post_process=True)]
    policy.forward = lambda module, batch, **_: (batch, None)
    one = _Pass(policy, loss=None, temperature=1.0, mtp_loss=False, sums_over=None, records=None, entropies=False)
    (body, _), (head, _) = (one.forward(iter([batch]), module) for module in policy.modules)
    assert head is batch and body.kept_ids is body.kept_offsets is None and body.tokens is batch.tokens


def test_more_microbatches_are_the_same_step(one_rank):
    """The samples of each optimizer step, what their losses are divided by, every gradient, the loss: as in one microbatch."""
    from r1mega.config.schema import DataConfig
    from r1mega.config.stages.rl import RLStage, UpdateConfig
    from r1mega.gpu_check.tensors import gradients_by_name
    from r1mega.observe.trace import PhaseTimer
    from r1mega.train.grpo_update import update_policy

    samples = make_samples()
    found = {}
    for least in (1, 3, 9):
        trainer = make_trainer()
        steps = found[least] = []
        updating, stepping = trainer.update, trainer.optimizer.step

        def update(batches, loss, steps=steps, updating=updating, **rest):
            members = [index for batch in batches for index in batch.sample_indices]
            steps.append([len(batches), sorted(members), rest["total_response_tokens"]])
            result = updating(batches, loss, **rest)
            steps[-1].append(float(sum(statistics.loss for statistics in result.statistics)))
            return result

        def step(steps=steps, trainer=trainer, stepping=stepping):
            steps[-1].append(gradients_by_name(trainer))
            return stepping()

        trainer.update, trainer.optimizer.step = update, step
        config = RLStage(
            stage="zero", run_dir="unused", model=ModelConfig(path="unused"), data=DataConfig(prompts=()),
            update=UpdateConfig(num_minibatches=1, microbatch_tokens=64, min_microbatches=least),
            algorithm=AlgorithmConfig(old_log_probs="rollout", kl_coefficient=0.0),
        )  # fmt: skip
        update_policy(trainer, samples, config, 1, PhaseTimer())
    assert [[step[0] for step in steps] for steps in found.values()] == [[1], [3], [4]]
    ((_, members, total, gradients, loss),) = found[1]
    assert members == list(range(len(samples)))
    for steps in (found[3], found[9]):
        assert steps[0][1:3] == [members, total]
        assert math.isclose(steps[0][4], loss, rel_tol=1e-6)
        for name, gradient in gradients.items():
            assert (steps[0][3][name] - gradient).abs().max() <= 2e-6 * gradient.abs().max(), name


def test_a_loss_is_of_tokens_where_it_adds_up_over_any_parts():
    """Responses cut in two, the halves as responses of their own: the same sum, or a variant of whole responses."""
    from r1mega.train.grpo_update import _loss, _rules
    from r1mega.train.heads import TokenScores
    from r1mega.train.samples import pack_for_loss

    samples = make_samples()
    weights = {place: 0.1 + 0.05 * place for place in range(len(samples))}
    whole = pack_for_loss(samples, range(len(samples)), weights)
    generator = torch.Generator().manual_seed(3)
    old = whole.sampler_log_probs + 0.4 * torch.randn(len(whole.rows), generator=generator)
    whole = dataclasses.replace(whole, old_log_probs=old, reference_log_probs=old + 0.2)
    halves = torch.arange(len(whole.rows)) % 2 + 2 * whole.sequence_ids
    cut = dataclasses.replace(whole, sequence_ids=halves, sample_indices=tuple(range(2 * len(samples))))
    scores = TokenScores(old + 0.3 * torch.randn(len(old), generator=generator), torch.zeros(len(old)))
    for name, keys in VARIANTS.items():
        algorithm = AlgorithmConfig(**({"kl_coefficient": 0.1} | keys))
        found = [
            float(_loss(b, scores, algorithm=algorithm, rules=_rules(algorithm), tolerance=1.0, kernels=None)[0])
            for b in (whole, cut)
        ]
        assert math.isclose(*found, rel_tol=1e-4) == algorithm.is_of_tokens, (name, found)


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_ratios_of_responses_in_one_pass_are_the_two_step_way(one_rank, name):
    """Gradients, loss and metrics, by chunks of whole responses; a response longer than a chunk is scored first, as whole."""
    from r1mega.gpu_check.tensors import gradients_by_name
    from r1mega.train.grpo_update import _loss, _rules
    from r1mega.train.samples import pack_for_loss

    trainer, samples = make_trainer("hidden"), make_samples()
    head, stepping, found = trainer.policy._head, trainer.optimizer.step, []
    algorithm = AlgorithmConfig(
        **VARIANTS[name], clip_low=0.01, clip_high=0.01, kl_coefficient=0, off_policy={"reject_ratio": 1e-2}
    )
    batch = pack_for_loss(samples, range(len(samples)), {place: 0.1 + 0.05 * place for place in range(len(samples))})
    old = batch.sampler_log_probs + 0.01
    old[8] -= 5  # for this token the third response is rejected, all of it
    batch = dataclasses.replace(batch, old_log_probs=old)
    assert batch.row_offsets() == [0, 5, 6, 15, 19]
    loss = functools.partial(_loss, algorithm=algorithm, rules=_rules(algorithm), tolerance=1.0, kernels=None)
    for chunk_tokens, parts in ((8, 1), (9, 3), (4096, 1)):
        trainer.policy._head = dataclasses.replace(head, chunk_tokens=chunk_tokens)
        trainer.optimizer.step = lambda: (found[-1].append(gradients_by_name(trainer)), (True, 1.0, 0))[
            1
        ]  # no weight moves
        found.append([])
        result = trainer.update([batch], loss, total_response_tokens=19, sums_over="samples")
        assert len(result.statistics) == parts
        totals = [
            sum(float(getattr(s.tokens, key)) for s in result.statistics)
            for key in ("clipped", "ratio_sum", "mismatch_sum")
        ]
        masked, rejected = (
            sum(float(getattr(s.off_policy, key)) for s in result.statistics) for key in ("masked", "rejected")
        )
        assert masked == rejected == 15 - 6
        found[-1] += [sum(float(s.loss) for s in result.statistics), sum(float(s.entropy) for s in result.statistics)]
        found[-1] += totals
    trainer.optimizer.step = stepping
    (two_steps, *figures), *others = found
    for gradients, *rest in others:
        assert rest == pytest.approx(figures, rel=1e-6, abs=1e-6)
        for key, gradient in two_steps.items():
            assert (gradients[key] - gradient).abs().max() <= 1e-6 * max(1e-3, gradient.abs().max()), key


def test_kl_in_the_reward_reaches_the_loss(one_rank):
    """The advantages of every microbatch are those of rewards less the coefficient times the sum of log pi_old - log pi_ref."""
    from r1mega.config.schema import DataConfig
    from r1mega.config.stages.rl import RLStage, UpdateConfig
    from r1mega.observe.trace import PhaseTimer
    from r1mega.train.grpo_update import update_policy

    samples = [
        dataclasses.replace(sample, reward=reward, opens_group=place % 2 == 0)
        for place, (sample, reward) in enumerate(zip(make_samples(), (1.0, 0.0, 0.0, 1.0), strict=True))
    ]
    trainer = make_trainer()
    policy = trainer.policy
    policy.take_reference()
    run_update(trainer, samples, [[0, 1, 2, 3]], AlgorithmConfig())  # away from the reference
    with policy.as_reference():
        reference = policy.sequence_log_probs([s.token_ids.tolist() for s in samples])
    trainer.enter("logprob")
    net = []
    for sample, log_probs in zip(samples, reference, strict=True):
        gaps = sample.sampler_log_probs - np.array(log_probs[sample.prompt_length - 1 :])
        net.append(sample.reward - 0.3 * gaps.sum())
    seen, updating = {}, trainer.update

    def update(batches, loss, **rest):
        for batch in batches:
            for place, index in enumerate(batch.sample_indices):
                (value,) = set(batch.advantages[batch.sequence_ids == place].tolist())
                seen.setdefault(index, []).append(value)
        return updating(batches, loss, **rest)

    trainer.update = update
    config = RLStage(
        stage="zero", run_dir="unused", model=ModelConfig(path="unused"), data=DataConfig(prompts=()),
        update=UpdateConfig(num_minibatches=2, num_epochs=2, microbatch_tokens=64),
        algorithm=AlgorithmConfig(
            old_log_probs="rollout", kl_coefficient=0.3, kl_in="reward", baseline="leave_one_out", normalize_std=False
        ),
    )  # fmt: skip
    metrics = update_policy(trainer, samples, config, 1, PhaseTimer())
    expected = [net[0] - net[1], net[1] - net[0], net[2] - net[3], net[3] - net[2]]  # of the other one, each
    for index, value in enumerate(expected):
        assert seen[index] == pytest.approx([value] * 2, rel=1e-4), "once an epoch"
    assert metrics["policy/kl"] > 0


def test_a_step_of_rejected_responses_changes_nothing(one_rank):
    """A sampler that was certain of every token: the trainer's ratio to it is below any veto."""
    from r1mega.config.schema import DataConfig
    from r1mega.config.stages.rl import OffPolicyConfig, RLStage, UpdateConfig
    from r1mega.observe.trace import PhaseTimer
    from r1mega.train.grpo_update import update_policy

    samples = [dataclasses.replace(s, sampler_log_probs=np.zeros_like(s.sampler_log_probs)) for s in make_samples()]
    config = RLStage(
        stage="zero", run_dir="unused", model=ModelConfig(path="unused"), data=DataConfig(prompts=()),
        update=UpdateConfig(num_minibatches=1, microbatch_tokens=64),
        algorithm=AlgorithmConfig(kl_coefficient=0.0, off_policy=OffPolicyConfig(reject_ratio=0.5)),
    )  # fmt: skip
    metrics = update_policy(make_trainer(), samples, config, 1, PhaseTimer())
    assert metrics["policy/masked_fraction"] == metrics["policy/rejected_fraction"] == 1
    assert metrics["policy/effective_sample_fraction"] == 0, "null says that there are no corrections"
    assert metrics["policy/loss"] == metrics["policy/grad_norm"] == 0


@pytest.mark.parametrize(
    ("aggregation", "log_probs"),
    [("sequence", "logits"), ("token", "logits"), ("sequence", "hidden"), ("sequence", "reference")],
)
def test_one_grpo_step_equals_transformers_and_adamw(one_rank, tmp_path, aggregation, log_probs):
    algorithm = AlgorithmConfig(loss_aggregation=aggregation)
    trainer, samples = make_trainer(log_probs), make_samples()
    policy = trainer.policy
    if log_probs == "hidden":  # the loss and its gradient in one pass, in several parts
        policy._head = dataclasses.replace(policy._head, chunk_tokens=5)
    model = transformers_model(policy, tmp_path)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]  # Megatron decays neither norms nor biases
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for packs in ([[0, 1], [2, 3]], [[3], [0, 2, 1]]):
        result = run_update(trainer, samples, packs, algorithm)
        loss, total = 0.0, sum(s.response_length for s in samples)
        for sample in samples:
            ids = torch.from_numpy(sample.token_ids.astype(np.int64))
            logits = model(ids[None]).logits[0, :-1] / TEMPERATURE
            log_probs = logits.log_softmax(-1).gather(1, ids[1:, None])[sample.prompt_length - 1 :, 0]
            ratio = (log_probs - torch.from_numpy(sample.sampler_log_probs)).exp()
            term = -torch.minimum(ratio * sample.advantage, ratio.clamp(0.8, 1.2) * sample.advantage)
            weight = 1 / total if aggregation == "token" else 1 / (len(samples) * sample.response_length)
            loss = loss + weight * term.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        assert (len(result.statistics) == 2) == (policy.one_pass_head is None)
        assert math.isclose(sum(value for value, _ in result.statistics), loss.item(), abs_tol=1e-5)
        assert math.isclose(result.grad_norm, float(norm), rel_tol=1e-4)
    trained = dict(policy.hf_tensors())
    expected = hub_names(model.state_dict())
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        # an Adam step is lr * m / sqrt(v): where a gradient is near zero its sign is rounding, so bound by steps
        difference = (trained[name] - value).abs()
        assert difference.max() <= 2.1 * LEARNING_RATE * 2, name
        assert difference.mean() <= 2e-2 * LEARNING_RATE, name


def test_forward_only_equals_transformers_per_token(one_rank, tmp_path):
    policy, samples = make_trainer().policy, make_samples(1)
    model = transformers_model(policy, tmp_path)
    batch = build_microbatch(
        [s.token_ids.tolist() for s in samples], [s.prompt_length for s in samples], range(len(samples))
    )
    (scores,) = policy.scores([batch], TEMPERATURE, entropies=True)
    expected, expected_entropy = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        with torch.no_grad():
            full = (model(ids[None]).logits[0, :-1].double() / TEMPERATURE).log_softmax(-1)[sample.prompt_length - 1 :]
        expected.append(full.gather(1, ids[sample.prompt_length :, None])[:, 0])
        expected_entropy.append(-(full.exp() * full).sum(-1))
    torch.testing.assert_close(scores.values.double(), torch.cat(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.entropies.double(), torch.cat(expected_entropy), rtol=0, atol=1e-5)


def test_the_auxiliary_loss_is_of_all_tokens_however_many_are_trained_on(one_rank):
    """The gradient of the auxiliary loss alone, of the same tokens cut into prompt and response in several ways."""
    from r1mega.gpu_check.tensors import gradients_by_name
    from r1mega.train.policy import Policy
    from r1mega.train.trainer import Trainer

    tokens = np.random.default_rng(0).integers(0, HF["vocab_size"], (2, 32)).tolist()
    found = []
    for responses in ((31, 31), (16, 16), (4, 4), (1, 1), (1, 31)):
        model = ModelConfig(path="unused", dtype="float32", sequence_aux_loss_coefficient=0.5)
        policy = Policy(model, HF, ParallelConfig(), seed=1, init_std=0.08)
        trainer = Trainer(policy, OptimizerConfig(lr=1e-3), total_steps=4)
        stepping = trainer.optimizer.step
        trainer.optimizer.step = lambda t=trainer, s=stepping: (found.append(gradients_by_name(t)), s())[1]
        batches = [
            build_microbatch([ids], [32 - n], [i]) for i, (ids, n) in enumerate(zip(tokens, responses, strict=True))
        ]
        trainer.update(
            batches, lambda _, scores: (0.0 * scores.values.sum(), 0), total_response_tokens=sum(responses)
        )  # fmt: skip
        assert policy.megatron_config.moe_aux_loss_coeff == 0.5, "as configured, for whoever runs it next"
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in found[0].values())
    for gradients in found[1:]:
        for name, gradient in found[0].items():
            assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_labels_path_with_mtp_gives_the_same_log_probs_and_trains_the_mtp_layer(one_rank, dtype):
    from r1mega.train.policy import Policy
    from r1mega.train.trainer import Trainer

    hf = HF | {"num_nextn_predict_layers": 1}
    model = ModelConfig(path="unused", dtype=dtype, mtp_loss_coefficient=0.3)
    policy = Policy(model, hf, ParallelConfig(), seed=1, init_std=0.08)
    trainer = Trainer(policy, OptimizerConfig(lr=1e-3), total_steps=4)
    samples = make_samples()
    batch = build_microbatch([s.token_ids.tolist() for s in samples], [s.prompt_length for s in samples], range(4))
    (expected,) = policy.log_probs([batch])
    before = {name: value.clone() for name, value in policy.hf_tensors()}
    result = trainer.update(
        [batch], lambda _, scores: (-scores.values.sum(), scores.values.detach().clone()),
        total_response_tokens=len(batch.rows), mtp_loss=True,
    )  # fmt: skip
    torch.testing.assert_close(result.statistics[0], expected, rtol=0, atol=1e-5)
    moved = {name for name, value in policy.hf_tensors() if not torch.equal(value, before[name])}
    assert any(name.startswith("model.layers.3.") for name in moved), "layer 3 is the MTP layer"
    for predicts in (True, False):  # a pipeline stage of MTP layers alone embeds tokens, one in the middle reads none
        policy._chunks = [SimpleNamespace(pre_process=False, post_process=False, mtp_process=predicts)]
        policy._place_in_layout()
        assert policy.reads == Reads(tokens=predicts, log_probs=False)


def test_the_kernel_of_hidden_states_agrees_with_that_of_logits_in_bfloat16(one_rank):
    """As far as the one's logits are rounded to bfloat16, 0.01 of a logit of 2.5; the other's are float32."""
    found = []
    for log_probs in ("logits", "hidden"):
        trainer, samples = make_trainer(log_probs, "bfloat16"), make_samples()
        batch = build_microbatch([s.token_ids.tolist() for s in samples], [s.prompt_length for s in samples], range(4))
        (scores,) = trainer.policy.scores([batch], TEMPERATURE, entropies=True)
        (values,) = trainer.policy.scores([batch], TEMPERATURE)
        assert torch.equal(values.values, scores.values) and values.entropies is None
        result = run_update(trainer, samples, [[0, 1], [2, 3]], AlgorithmConfig())
        found.append((scores.values, scores.entropies, result.grad_norm))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-2)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-2)
    assert math.isclose(found[0][2], found[1][2], rel_tol=2**-7)


def test_what_must_not_be_rounded_is_float32_in_a_bfloat16_model(one_rank):
    """Buffers that decide routing, and rotary frequencies: Float16Module casts whatever it finds."""
    drawn = make_trainer(dtype="bfloat16").policy
    bias = torch.linspace(-0.1, 0.1, HF["n_routed_experts"])  # not of bfloat16's values
    weights = {name: bias.clone() if name.endswith("correction_bias") else value for name, value in drawn.hf_tensors()}
    trainer = make_trainer(dtype="bfloat16", weights=weights)
    policy = trainer.policy
    with pytest.raises(RuntimeError, match="copies of the weights"):
        policy.load_hf(weights)
    with pytest.raises(RuntimeError, match="has a trainer"):
        type(trainer)(policy, OptimizerConfig(), total_steps=1)
    run_update(trainer, make_samples(), [[0, 1, 2, 3]], AlgorithmConfig())
    for name, value in policy.hf_tensors():
        assert value.dtype == (torch.float32 if name.endswith("correction_bias") else torch.bfloat16), name
        assert not name.endswith("correction_bias") or torch.equal(value, bias)
    floats = {n: b.dtype for c in policy.chunks for n, b in c.named_buffers() if b.is_floating_point()}
    assert set(floats.values()) == {torch.float32}, floats
