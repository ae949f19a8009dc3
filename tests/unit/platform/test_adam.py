"""FusedAdam against torch's AdamW and Adam."""

from __future__ import annotations

import pytest
import torch

from r1mega.platform.adam import FusedAdam


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_torch(decoupled, weight_decay):
    torch.manual_seed(0)
    ours = [torch.randn(5, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    mine = FusedAdam(ours, adam_w_mode=decoupled, **settings)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **settings)
    for _ in range(12):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_step_is_kept_in_the_group_and_parameters_without_gradient_rest():
    moving, resting = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = FusedAdam([moving, resting], lr=0.1)
    moving.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2
    assert not torch.equal(moving, torch.ones(2))
    assert torch.equal(resting, torch.ones(2))
    assert resting not in optimizer.state


@pytest.mark.parametrize("narrow", [("exp_avg", "exp_avg_sq"), ("exp_avg_sq",)], ids=str)
def test_moments_in_bfloat16_are_those_of_float64_rounded_when_they_are_stored(narrow):
    """Main parameters stay float32, gradients are bfloat16, weights are main parameters rounded."""
    torch.manual_seed(1)
    types = {name: torch.bfloat16 if name in narrow else torch.float32 for name in ("exp_avg", "exp_avg_sq")}
    weights = [torch.randn(40, 25).bfloat16().requires_grad_(), torch.randn(33).bfloat16().requires_grad_()]
    lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.95, 1e-6, 0.1
    optimizer = FusedAdam(
        weights, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, master_weights=True, use_decoupled_grad=True,
        **{f"{name}_dtype": dtype for name, dtype in types.items()},
    )  # fmt: skip
    exact = [{"param": w.detach().double(), "exp_avg": w.detach().double() * 0, "exp_avg_sq": w.detach().double() * 0}
             for w in weights]  # fmt: skip
    for step in range(1, 9):
        for weight, state in zip(weights, exact, strict=True):
            weight.decoupled_grad = torch.randn_like(weight) * 0.1
            gradient = weight.decoupled_grad.double()
            first = beta1 * state["exp_avg"] + (1 - beta1) * gradient
            second = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient**2
            state["param"] *= 1 - lr * decay
            state["param"] -= lr * (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
            state["exp_avg"], state["exp_avg_sq"] = first, second
        optimizer.step()
        for weight, state in zip(weights, exact, strict=True):
            held = optimizer.state[weight]
            assert held["master_param"].dtype == torch.float32
            torch.testing.assert_close(held["master_param"].double(), state["param"], rtol=1e-5, atol=1e-6)
            assert torch.equal(weight, held["master_param"].bfloat16())
            for name, dtype in types.items():
                assert held[name].dtype == dtype
                rounded = state[name].float().to(dtype)
                one_bit = 2.0**-7 if name in narrow else 2.0**-20  # float32 may stand on the other side of a tie
                torch.testing.assert_close(held[name].double(), rounded.double(), rtol=one_bit, atol=1e-7)
                assert (held[name] == rounded).double().mean() > (0.99 if name in narrow else 0.2)
                state[name] = held[name].double()  # the next step starts from what is stored


def test_state_keeps_its_types_when_it_is_loaded():
    def made():
        torch.manual_seed(2)
        weight = torch.randn(8).bfloat16().requires_grad_()
        optimizer = FusedAdam([weight], master_weights=True, exp_avg_dtype=torch.bfloat16, use_decoupled_grad=True)
        return weight, optimizer

    def move(weight, optimizer):
        weight.decoupled_grad = torch.full((8,), 0.3)
        optimizer.step()
        optimizer.zero_grad()

    (one, saved), (other, loaded) = made(), made()
    move(one, saved)
    assert one.decoupled_grad is None
    loaded.load_state_dict(saved.state_dict())
    assert {name: value.dtype for name, value in loaded.state[other].items()} == {
        "exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32, "master_param": torch.float32,
    }  # fmt: skip
    move(one, saved)
    move(other, loaded)
    assert torch.equal(saved.state[one]["master_param"], loaded.state[other]["master_param"])
