"""Megatron's distributed Adam, its learning-rate schedule, and its state before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from r1mega import platform

platform.prepare()  # before the first import of megatron

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

from r1mega.config.schema import OptimizerConfig  # noqa: E402


def build_optimizer(config: OptimizerConfig, ddp_chunks: Sequence[torch.nn.Module], dtype: torch.dtype) -> Any:
    """Adam over the gradient buffers of DDP-wrapped model chunks, its state shared out over the data-parallel ranks."""
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        ddp_chunks,
        use_gloo_process_groups=True,
    )


def learning_rate_schedule(optimizer: Any, config: OptimizerConfig, total_steps: int) -> OptimizerParamScheduler:
    """Warm-up, then constant, or a decay over the last `decay_steps` steps (warmup-stable-decay)."""
    longest = max(1, total_steps - config.warmup_steps)
    decay = min(config.decay_steps or longest, longest)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps, config.warmup_steps + 1),
        lr_decay_style="constant" if config.schedule == "constant" else "WSD",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        wsd_decay_steps=decay,
        lr_wsd_decay_style=None if config.schedule == "constant" else config.schedule,
        use_checkpoint_opt_param_scheduler=False,  # a run that goes on with more steps decays over those
        override_opt_param_scheduler=True,
    )


def fill_empty_state(optimizer: Any) -> None:
    """Give an optimizer that has not stepped yet its state of zeros: without it Megatron cannot save it."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer.state or not any(group["params"] for group in part.optimizer.param_groups):
            continue
        rates = [(group, group["lr"], group["weight_decay"]) for group in part.optimizer.param_groups]
        for group, _, _ in rates:
            group["lr"] = group["weight_decay"] = 0.0  # the step that makes the state must not move a weight
        part._init_optimizer_states_with_dummy_values()
        for group, lr, weight_decay in rates:
            group["lr"], group["weight_decay"], group["step"] = lr, weight_decay, 0
