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
