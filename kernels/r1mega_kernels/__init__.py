"""Kernels of the policy update: log-probs of chosen tokens, group advantages, the GRPO token loss; on CUDA and on CPUs.

`grouped_log_prob` from logits, `linear_log_prob` from hidden states, `group_advantage`, `grpo_token_loss`;
`linear_grpo_loss` from hidden states to the loss and its gradient in one pass; `backend` says which implementation
serves a device. See docs/kernels.md.
"""

from r1mega_kernels.advantage import group_advantage
from r1mega_kernels.kept import KeptTokens
from r1mega_kernels.library import PlatformError, backend
from r1mega_kernels.linear import linear_log_prob
from r1mega_kernels.linear_loss import linear_grpo_loss
from r1mega_kernels.log_prob import LogProbs, grouped_log_prob
from r1mega_kernels.loss import GRPOMetrics, grpo_token_loss

__all__ = [
    "GRPOMetrics",
    "KeptTokens",
    "LogProbs",
    "PlatformError",
    "backend",
    "group_advantage",
    "grouped_log_prob",
    "grpo_token_loss",
    "linear_grpo_loss",
    "linear_log_prob",
]
