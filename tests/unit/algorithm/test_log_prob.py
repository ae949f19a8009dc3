"""token_log_probs against float64 log_softmax, value and gradient."""

import pytest
import torch

from r1mega.algorithm.log_prob import token_log_probs


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("offset", [0.0, -200.0, 300.0])
def test_value_and_gradient(temperature, offset):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(17, 33, generator=generator) * 4 + offset
    targets = torch.randint(0, 33, (17,), generator=generator)
    upstream = torch.randn(17, generator=generator)

    x = logits.clone().requires_grad_()
    log_probs, entropy = token_log_probs(x, targets, temperature)
    (log_probs * upstream).sum().backward()

    y = logits.double().requires_grad_()
    reference = (y / temperature).log_softmax(-1)
    picked = reference.gather(1, targets[:, None])[:, 0]
    (picked * upstream.double()).sum().backward()

    scale = 1e-5 if offset == 0 else 2e-4  # fp32 logits of magnitude 300 carry 3e-5 each before any arithmetic
    torch.testing.assert_close(log_probs.double(), picked, rtol=0, atol=scale)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=0, atol=scale)
    torch.testing.assert_close(entropy.double(), -(reference.exp() * reference).sum(-1), rtol=0, atol=scale)
