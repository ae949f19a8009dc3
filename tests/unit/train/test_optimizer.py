"""The optimizer: Adam against torch's, moments in bfloat16, gradients that are not finite, the learning rate."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist

from r1mega import platform
from r1mega.config.schema import ParallelConfig
from r1mega.config.stages.rl import AlgorithmConfig
from r1mega.platform import groups
from tests.dist.launch import launch
from tests.unit.train.tiny_policy import LEARNING_RATE, PRECISION_AWARE, make_samples, make_trainer, run_update

pytestmark = pytest.mark.heavy

platform.prepare()


def torchs_adam(parameters, **options):
    """As the trainer's: weights of matrices decay."""
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    rest = [parameter for parameter in parameters if parameter.ndim == 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, **options,
    )  # fmt: skip


def test_adam_on_the_cpu_equals_torchs_on_float32_main_parameters(one_rank):
    """Megatron's HybridDeviceOptimizer: the gradients of every step, applied to float32 copies by torch's AdamW."""
    from r1mega.train.optimizer import parts

    trainer, samples = make_trainer(dtype="bfloat16", cpu_offload=True), make_samples()
    parameters = [p for chunk in trainer.policy.chunks for p in chunk.parameters()]
    mains = [p.detach().float().clone().requires_grad_() for p in parameters]
    reference = torchs_adam(mains, fused=True)
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


def test_moments_in_bfloat16_equal_torchs_adam_that_starts_each_step_from_rounded_ones(one_rank):
    from r1mega.train.optimizer import own_state, parts

    trainer, samples = make_trainer(dtype="bfloat16", **PRECISION_AWARE), make_samples()
    parameters = [p for chunk in trainer.policy.chunks for p in chunk.parameters()]
    mains = [p.detach().float().clone().requires_grad_() for p in parameters]
    reference = torchs_adam(mains)
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
    from r1mega.train.optimizer import _prepare_finite

    groups.init_parallel(ParallelConfig(), seed=0)
    own = math.inf if dist.get_rank() == 1 else 1.0  # a norm that one rank alone knows
    assert _prepare_finite(lambda: False, lambda: own) and not _prepare_finite(lambda: False, lambda: 1.0)
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


def test_learning_rate_schedule(one_rank):
    trainer, samples = make_trainer(warmup_steps=2, schedule="cosine", decay_steps=4, min_lr=1e-4), make_samples()
    rates = [run_update(trainer, samples, [[0, 1, 2, 3]], AlgorithmConfig()).lr for _ in range(10)]
    cosine = [1e-4 + (1e-3 - 1e-4) * (math.cos(math.pi * i / 4) + 1) / 2 for i in range(1, 5)]
    expected = [0.5e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, *cosine]
    assert np.allclose(rates, expected, rtol=1e-9), json.dumps(rates)
