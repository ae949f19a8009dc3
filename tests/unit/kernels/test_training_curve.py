"""A model trained by the kernels, from logits and from hidden states, beside the same in plain torch functions."""

from __future__ import annotations

import torch

from r1mega_kernels import grouped_log_prob, grpo_token_loss, linear_log_prob


def plain_loss(log_probs, advantages, old, kl_coefficient):
    ratio = (log_probs - old).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    gap = old - log_probs
    return (kl_coefficient * (gap.exp() - gap - 1) - surrogate).mean()


def test_ten_steps_give_the_same_losses(implementation):
    """To 1e-5 a step in fp32, over a curve that falls by much more."""
    generator = torch.Generator().manual_seed(3)
    hidden, targets = torch.randn(96, 16, generator=generator), torch.randint(0, 300, (96,), generator=generator)
    start, rows = torch.randn(300, 16, generator=generator) * 0.1, torch.arange(10, 96)
    advantages = torch.randn(86, generator=generator)

    def plain_log_probs(weight):
        return (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[rows, 0]

    old = plain_log_probs(start)

    def kernel_loss(log_probs):
        weights = torch.full((86,), 1 / 86)
        return grpo_token_loss(
            log_probs,
            advantages,
            old,
            reference_log_probs=old,
            weights=weights,
            kl_coefficient=0.1,
            backend=implementation,
        )[0]

    def train(loss_of):
        weight = start.clone().requires_grad_()
        optimizer, losses = torch.optim.Adam([weight], lr=0.02), []
        for _ in range(10):
            loss = loss_of(weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return torch.tensor(losses)

    expected = train(lambda weight: plain_loss(plain_log_probs(weight), advantages, old, 0.1))
    assert expected[-1] < expected[0] - 0.05
    common = {"rows": rows, "backend": implementation}
    from_logits = train(lambda w: kernel_loss(grouped_log_prob(hidden @ w.t(), targets, **common).log_prob))
    from_hidden = train(lambda w: kernel_loss(linear_log_prob(hidden, w, targets, **common).log_prob))
    torch.testing.assert_close(from_logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(from_hidden, expected, rtol=0, atol=1e-5)
