"""The policy: one GRPO step against transformers + torch.optim.AdamW, and bitwise continuation from a checkpoint."""

import dataclasses
import functools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r1mega import platform
from r1mega.algorithm.grpo import grpo_loss
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from r1mega.config.stages.rl import AlgorithmConfig
from r1mega.platform import groups
from r1mega.train.packing import build_microbatch
from r1mega.train.sample_plan import Reads
from r1mega.types import KeptIds, TrainingSample
from tests.dist.launch import launch
from tests.dist.loss_worker import VARIANTS

pytestmark = pytest.mark.heavy

platform.prepare()

HF = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 67, "hidden_size": 48,
    "intermediate_size": 80, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4,
    "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_layer_freq": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_interleave": True, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LEARNING_RATE, TEMPERATURE = 1e-3, 0.8


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


@pytest.fixture
def one_rank():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    groups.init_parallel(ParallelConfig(), seed=0)
    yield
    groups.destroy()
    torch.set_num_threads(threads)


def make_trainer(log_probs="logits", dtype="float32", weights=None, bias_rate=0.0, **optimizer):
    """weights: of the model; None: drawn. bias_rate: of the routers."""
    from r1mega.train.policy import Policy
    from r1mega.train.trainer import Trainer

    model = ModelConfig(path="unused", dtype=dtype, log_probs=log_probs, expert_bias_update_rate=bias_rate)
    policy = Policy(model, HF, ParallelConfig(), seed=1, init_std=0.08)
    if weights is not None:
        policy.load_hf(weights)
    settings = OptimizerConfig(**{"lr": LEARNING_RATE, "weight_decay": 0.1, "clip_grad": 0.05} | optimizer)
    return Trainer(policy, settings, total_steps=10)


def make_samples(seed=0):
    generator = np.random.default_rng(seed)
    samples = []
    for prompt, response in ((3, 5), (6, 1), (2, 9), (4, 4)):
        samples.append(
            TrainingSample(
                token_ids=generator.integers(0, HF["vocab_size"], prompt + response).astype(np.int32),
                prompt_length=prompt,
                advantage=float(generator.normal()),
                sampler_log_probs=(-4 + 0.1 * generator.normal(size=response)).astype(np.float32),
            )
        )
    return samples


def run_update(trainer, samples, packs, algorithm):
    from r1mega.train.samples import minibatch_weights, pack_for_loss

    weights = minibatch_weights(samples, range(len(samples)), algorithm.loss_aggregation, 16)

    def loss(batch, scores):
        value, stats = grpo_loss(scores.values, batch.policy_tokens, clip_low=0.2, clip_high=0.2)
        return value, (value.item(), stats)

    total = sum(s.response_length for s in samples)
    batches = [pack_for_loss(samples, indices, weights) for indices in packs]
    return trainer.update(
        batches,
        loss,
        temperature=TEMPERATURE,
        total_response_tokens=total,
        sums_over="tokens" if algorithm.is_of_tokens else "samples",
    )


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


def transformers_model(policy, tmp_path):
    from transformers import AutoModelForCausalLM

    from r1mega.checkpoint.hf import write_hf

    write_hf(tmp_path / "hf", policy.hf_tensors(), HF)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")


def test_the_norm_of_gradients_is_the_same_however_many_ranks_share_them(one_rank):
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    gradients = torch.randn(100_003, generator=torch.Generator().manual_seed(1))
    for share in (100_003, 50_002, 777):
        norm = get_grad_norm_fp32(list(gradients.split(share)), grad_stats_parallel_group=None)
        assert math.isclose(norm, float(gradients.double().norm()), rel_tol=1e-13)


@pytest.mark.parametrize("kernel", [None, torch.float32, torch.float64])
def test_every_rank_adds_up_its_part_of_the_norm_in_the_same_type(one_rank, monkeypatch, kernel):
    """None: of a rank without a share. float32: of apex's kernel."""
    from megatron.core.optimizer import clip_grads

    summed = []
    monkeypatch.setattr(clip_grads, "l2_norm_impl", lambda *_: (torch.full((1,), 2.0, dtype=kernel), None))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: summed.append(tensor.dtype))
    norm = clip_grads.get_grad_norm_fp32([torch.ones(4)] if kernel else [])
    assert norm == (2.0 if kernel else 0.0) and summed == [torch.float64]


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
    expected = _hub_names(model.state_dict())
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


def test_adam_on_the_cpu_equals_torchs_on_float32_main_parameters(one_rank):
    """Megatron's HybridDeviceOptimizer: the gradients of every step, applied to float32 copies by torch's AdamW."""
    from r1mega.train.optimizer import parts

    trainer, samples = make_trainer(dtype="bfloat16", cpu_offload=True), make_samples()
    parameters = [p for chunk in trainer.policy.chunks for p in chunk.parameters()]
    mains = [p.detach().float().clone().requires_grad_() for p in parameters]
    decayed = [main for main in mains if main.ndim > 1]
    rest = [main for main in mains if main.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    for _ in range(3):
        result = run_update(trainer, samples, [[0, 1], [2, 3]], AlgorithmConfig())
        assert result.grad_norm > 0.05  # so it was clipped, in the buffers
        for main, parameter in zip(mains, parameters, strict=True):
            main.grad = parameter.main_grad.clone()
        reference.step()
        for main, parameter in zip(mains, parameters, strict=True):
            assert torch.equal(main.detach().bfloat16(), parameter.detach())
    gradients = [kept for part in parts(trainer.optimizer) for kept in part.optimizer.cpu_copy_map_grad.values()]
    assert sum(kept.nbytes for kept in gradients) == sum(
        4 * p.numel() for p in parameters
    )  # which `r1mega plan` counts


PRECISION_AWARE = {"precision_aware": True, "grad_reduce_in_fp32": False}


def test_moments_in_bfloat16_equal_torchs_adam_that_starts_each_step_from_rounded_ones(one_rank):
    from r1mega.train.optimizer import own_state, parts

    trainer, samples = make_trainer(dtype="bfloat16", **PRECISION_AWARE), make_samples()
    parameters = [p for chunk in trainer.policy.chunks for p in chunk.parameters()]
    mains = [p.detach().float().clone().requires_grad_() for p in parameters]
    decayed = [main for main in mains if main.ndim > 1]
    rest = [main for main in mains if main.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    of = [next(p for p in parts(trainer.optimizer) if w in p.model_param_group_index_map) for w in parameters]
    for _ in range(3):
        result = run_update(trainer, samples, [[0, 1], [2, 3]], AlgorithmConfig())
        assert result.grad_norm > 0.05  # so it was clipped, in the buffers
        for main, parameter in zip(mains, parameters, strict=True):
            assert parameter.main_grad.dtype == torch.bfloat16
            main.grad = parameter.main_grad.float()
        reference.step()
        for main, parameter, part in zip(mains, parameters, of, strict=True):
            held, state = own_state(part, parameter), reference.state[main]
            torch.testing.assert_close(held["param"], main.detach().flatten(), rtol=1e-6, atol=1e-6)
            assert torch.equal(held["param"].bfloat16(), parameter.detach().flatten())
            for name in ("exp_avg", "exp_avg_sq"):
                rounded = state[name].bfloat16()
                torch.testing.assert_close(
                    held[name], rounded.flatten(), rtol=2**-7, atol=1e-12
                )  # on a tie either side
                state[name].copy_(held[name].view_as(main))
            main.detach().copy_(held["param"].view_as(main))


DTYPES = [("float32", "logits"), ("bfloat16", "logits"), ("bfloat16", "hidden"), ("bfloat16", "reference")]


@pytest.mark.parametrize(("dtype", "log_probs"), DTYPES)
def test_reference_weights_are_swapped_in_and_out(one_rank, dtype, log_probs):
    trainer, samples = make_trainer(log_probs, dtype), make_samples()
    policy = trainer.policy
    batch = build_microbatch([s.token_ids.tolist() for s in samples], [s.prompt_length for s in samples], range(4))
    policy.take_reference()
    before = policy.log_probs([batch])[0]
    run_update(trainer, samples, [[0, 1, 2, 3]], AlgorithmConfig())
    after = policy.log_probs([batch])[0]
    assert not torch.equal(before, after)
    with policy.as_reference():
        assert torch.equal(policy.log_probs([batch])[0], before)
    assert torch.equal(policy.log_probs([batch])[0], after)


@pytest.mark.parametrize(
    ("dtype", "log_probs", "more"),
    [
        *((*pair, {}) for pair in DTYPES),
        *(("bfloat16", "logits", more) for more in ({"cpu_offload": True}, PRECISION_AWARE)),
    ],
)
def test_checkpoint_continues_bitwise(one_rank, tmp_path, dtype, log_probs, more):
    from r1mega.checkpoint.store import CheckpointStore, deciding_keys

    samples, packs, algorithm = make_samples(), [[0, 1], [2, 3]], AlgorithmConfig()
    trainer = make_trainer(log_probs, dtype, warmup_steps=3, **more)
    policy = trainer.policy
    policy.take_reference()
    run_update(trainer, samples, packs, algorithm)
    store = CheckpointStore(tmp_path, keep=2, architecture=deciding_keys(HF))
    path = store.save(1, trainer.sharded_state(is_loading=False), {"cursor": {"num_drawn": 4}})
    results = [run_update(trainer, samples, packs, algorithm) for _ in range(2)]
    weights = {name: value.clone() for name, value in policy.hf_tensors()}
    with policy.as_reference():
        reference = {name: value.clone() for name, value in policy.hf_tensors()}

    groups.destroy()
    groups.init_parallel(ParallelConfig(), seed=5)
    again = make_trainer(log_probs, dtype, warmup_steps=3, **more)
    again.policy.take_reference()
    assert store.latest() == path
    state, progress = store.load(path, again.sharded_state(is_loading=True))
    again.load_sharded_state(state)
    assert progress == {"step": 1, "cursor": {"num_drawn": 4}}
    for expected in results:
        result = run_update(again, samples, packs, algorithm)
        assert (result.grad_norm, result.lr) == (expected.grad_norm, expected.lr)
        assert [v for v, _ in result.statistics] == [v for v, _ in expected.statistics]
    assert all(torch.equal(value, weights[name]) for name, value in again.policy.hf_tensors())
    with again.policy.as_reference():
        assert all(torch.equal(value, reference[name]) for name, value in again.policy.hf_tensors())


def test_torn_and_foreign_checkpoints_are_refused(one_rank, tmp_path, caplog):
    from r1mega.checkpoint.store import CheckpointStore, deciding_keys
    from r1mega.errors import CheckpointError

    trainer = make_trainer()
    run_update(trainer, make_samples(), [[0, 1, 2, 3]], AlgorithmConfig())
    store = CheckpointStore(tmp_path, keep=2, architecture=deciding_keys(HF))
    first = store.save(1, trainer.sharded_state(is_loading=False), {})
    second = store.save(2, trainer.sharded_state(is_loading=False), {})
    victim = max(second.rglob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    victim.write_bytes(bytes(content))
    assert store.latest() == first
    assert victim.name in caplog.text
    assert "xxh3_128" in caplog.text
    store.save(3, trainer.sharded_state(is_loading=False), {})
    store.save(4, trainer.sharded_state(is_loading=False), {})
    left = sorted(p.name for p in store.directory.iterdir())
    assert left == ["step_000002.damaged", "step_000003", "step_000004"], "only `keep` are kept"
    other = CheckpointStore(tmp_path, keep=2, architecture=deciding_keys(HF | {"hidden_size": 64}))
    with pytest.raises(CheckpointError, match="hidden_size 48 there, 64 here"):
        other.load(store.latest(), trainer.sharded_state(is_loading=True))


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


@pytest.mark.parametrize("optimizer", [{}, {"clip_grad": 0.0}])
def test_a_gradient_that_is_not_finite_moves_nothing_and_can_be_left_out(one_rank, tmp_path, caplog, optimizer):
    """The steps after it are those of a run that never had it (the rate is constant)."""
    from r1mega.errors import NonFiniteError

    algorithm, samples, packs = AlgorithmConfig(), make_samples(), [[0, 1], [2, 3]]
    broken = [dataclasses.replace(s, advantage=math.nan if i == 2 else s.advantage) for i, s in enumerate(samples)]
    control, strict, lenient = (make_trainer(**optimizer, skip_nonfinite=n, bias_rate=0.01) for n in (0, 0, 1))
    for trainer in (control, strict, lenient):
        trainer.evidence = tmp_path / "nonfinite"
        run_update(trainer, samples, packs, algorithm)
    after_one = {name: value.clone() for name, value in control.policy.hf_tensors()}
    assert any(value.any() for name, value in after_one.items() if name.endswith("e_score_correction_bias"))
    with pytest.raises(
        NonFiniteError, match=r"optimizer step 2: gradient norm nan.*optimizer\.skip_nonfinite=1 "
    ) as raised:
        run_update(strict, broken, packs, algorithm)
    assert all(torch.equal(value, after_one[name]) for name, value in strict.policy.hf_tensors())
    (path,) = (tmp_path / "nonfinite").iterdir()
    assert str(path.parent) in str(raised.value) and path.name == "update_000002_rank_00000.pt"
    found = torch.load(path)
    assert [list(b["sample_indices"]) for b in found["microbatches"]] == packs
    assert [bool(b["advantages"].isnan().any()) for b in found["microbatches"]] == [False, True]
    assert found["parameters"] and math.isnan(found["grad_norm"])

    assert run_update(lenient, broken, packs, algorithm).skipped and "left out (1 in a row" in caplog.text
    for _ in range(2):
        expected, result = (run_update(t, samples, packs, algorithm) for t in (control, lenient))
        assert (result.grad_norm, result.skipped) == (expected.grad_norm, False)
    expected = dict(control.policy.hf_tensors())
    assert all(torch.equal(value, expected[name]) for name, value in lenient.policy.hf_tensors())
    for number in range(100, 107):  # with that of step 2, as many as are kept
        (tmp_path / "nonfinite" / f"update_{number:06d}_rank_00000.pt").touch()
    run_update(lenient, broken, packs, algorithm)  # the count begins anew after a good one
    assert len(list((tmp_path / "nonfinite").iterdir())) == 8
    shutil.rmtree(tmp_path / "nonfinite")
    (tmp_path / "nonfinite").touch()  # nothing can be written there: told, and no more than that
    with pytest.raises(NonFiniteError, match="optimizer.skip_nonfinite=2"):
        run_update(lenient, broken, packs, algorithm)
    assert f"{tmp_path / 'nonfinite'}: could not be written" in caplog.text


def broken_on_one_rank():
    """Two replicas, one of them with a broken sample, twice: (left out, no weight moved, the error of the second)."""
    from r1mega.errors import NonFiniteError

    groups.init_parallel(ParallelConfig(), seed=0)
    trainer, samples = make_trainer(skip_nonfinite=1), make_samples()
    samples[2] = dataclasses.replace(samples[2], advantage=math.nan)
    before = {name: value.clone() for name, value in trainer.policy.hf_tensors()}
    packs = [[[0, 1]], [[2, 3]]][trainer.policy.replica]
    skipped = run_update(trainer, samples, packs, AlgorithmConfig()).skipped
    equal = all(torch.equal(value, before[name]) for name, value in trainer.policy.hf_tensors())
    try:
        run_update(trainer, samples, packs, AlgorithmConfig())
    except NonFiniteError as error:
        return skipped, equal, str(error)
    return skipped, equal, None


def test_all_ranks_leave_out_what_one_cannot_use():
    for skipped, equal, error in launch(broken_on_one_rank, 2):
        assert skipped and equal and "optimizer.skip_nonfinite=2" in error


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


def test_learning_rate_schedule(one_rank):
    trainer, samples = make_trainer(warmup_steps=2, schedule="cosine", decay_steps=4, min_lr=1e-4), make_samples()
    rates = [run_update(trainer, samples, [[0, 1, 2, 3]], AlgorithmConfig()).lr for _ in range(10)]
    cosine = [1e-4 + (1e-3 - 1e-4) * (math.cos(math.pi * i / 4) + 1) / 2 for i in range(1, 5)]
    expected = [0.5e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, *cosine]
    assert np.allclose(rates, expected, rtol=1e-9), json.dumps(rates)


def _hub_names(state):
    """transformers 5 stacks the experts; checkpoints on the hub have one tensor each."""
    out = {}
    for name, value in state.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                out[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                out[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
        elif name.endswith("mlp.experts.down_proj"):
            for expert, down in enumerate(value):
                out[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            out[name] = value
    return out


@pytest.mark.parametrize("own", [True, False])
def test_router_replay_equals_transformers_told_to_take_those_experts(one_rank, tmp_path, own):
    """own: the experts that the routers would choose anyway; otherwise any."""
    from r1mega.train.samples import pack_samples

    policy = make_trainer().policy
    model = transformers_model(policy, tmp_path)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    generator = np.random.default_rng(3)
    samples, expected = [], []
    for sample in make_samples():
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
        chosen = [generator.permuted(np.tile(np.arange(8), (ids.numel(), 1)), axis=1)[:, :4] for _ in gates]
        hooks = [gate.register_forward_hook(_taking(chosen, i, own)) for i, gate in enumerate(gates)]
        with torch.no_grad():
            logits = model(ids).logits[0] / TEMPERATURE
        for hook in hooks:
            hook.remove()
        picked = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        expected.append(picked[sample.prompt_length - 1 :])
        routed = np.stack(chosen, axis=1)[:-1].astype(np.uint8)
        samples.append(dataclasses.replace(sample, routed_experts=routed))
    order = [2, 0, 3, 1]
    packs = [pack_samples(samples, order[:3]), pack_samples(samples, order[3:])]
    found = torch.cat(policy.log_probs(packs, TEMPERATURE))
    assert (found - torch.cat([expected[i] for i in order])).abs().max() <= 1e-5
    packs = [pack_samples(samples, order)]
    unguided = policy.scores(packs, TEMPERATURE, replay=False)[0].values
    assert ((found - unguided).abs().max() <= 1e-5) == own
    routers = [m for c in policy.chunks for m in c.modules() if hasattr(m, "router_replay")]
    assert all(router.router_replay.router_replay_action is None for router in routers)


@pytest.mark.parametrize("repeats", [True, False])
def test_an_update_repeats_the_experts_of_its_log_prob_pass(one_rank, repeats):
    """R2: in the second optimizer step the routers would choose otherwise."""
    from r1mega.config.schema import DataConfig
    from r1mega.config.stages.rl import RLStage, UpdateConfig
    from r1mega.observe.trace import PhaseTimer
    from r1mega.train.grpo_update import update_policy

    trainer, taken = make_trainer(lr=0.05), []
    for chunk in trainer.policy.chunks:
        for router in chunk.modules():
            if hasattr(router, "router_replay"):
                router.register_forward_hook(
                    lambda _router, _inputs, outputs: taken.append(outputs[1].nonzero().tolist())
                )
    config = RLStage(
        stage="zero", run_dir="unused", model=ModelConfig(path="unused"), data=DataConfig(prompts=()),
        update=UpdateConfig(num_minibatches=2, microbatch_tokens=64),
        algorithm=AlgorithmConfig(router_replay=repeats, kl_coefficient=0.1),
    )  # fmt: skip
    trainer.policy.take_reference()
    update_policy(trainer, make_samples(), config, 1, PhaseTimer())
    layers, updates = 2, 2
    assert len(taken) == 3 * layers * updates  # old, reference, update
    old, reference, updated = taken[:4], taken[4:8], taken[8:]
    assert old == reference and old[:2] == updated[:2]  # the weights are still the same
    assert (old == updated) == repeats


def _taking(chosen, index, own):
    """A hook that makes a router of transformers take chosen[index]; own: one that writes down what it took."""

    def hook(gate, inputs, outputs):
        logits, weights, indices = outputs
        if own:
            chosen[index] = indices.numpy()  # [tokens, top-k]
            return outputs
        indices = torch.from_numpy(chosen[index])
        weights = logits.sigmoid().gather(1, indices)
        return logits, weights / weights.sum(-1, keepdim=True) * 2.5, indices

    return hook
