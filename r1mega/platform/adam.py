"""Adam in the shape of Transformer Engine's and apex's FusedAdam, for machines without both.

torch.optim.AdamW keeps one `step` a parameter; Megatron's distributed optimizer then refuses its own sharded
checkpoints. With `step` in the param group, as FusedAdam has it, the very code paths of the GPU are taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, overload

import torch
from torch.optim.optimizer import ParamsT


class FusedAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015); with adam_w_mode weight decay is decoupled (Loshchilov and Hutter 2019).

    Arithmetic is float32's. State is rounded to nearest when it is stored in another type: what a step adds to a parameter is
    of the moments before that (transformer_engine/pytorch/optimizers/fused_adam.py of 2.20.2, and its kernels).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
        *,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ):
        """master_weights: what is updated is a copy of each parameter, `master_param` of its state, which the parameter then
        takes over. use_decoupled_grad: gradients, of any type, are `decoupled_grad` of the parameters.
        """
        if capturable:
            raise ValueError("FusedAdam's stand-in on the CPU cannot be captured in a CUDA graph")
        if store_param_remainders:
            raise ValueError("FusedAdam's stand-in on the CPU keeps main parameters whole, not their remainders")
        self.adam_w_mode = adam_w_mode
        self._gradient_name = "decoupled_grad" if use_decoupled_grad else "grad"
        self._types = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        if master_weights:
            self._types["master_param"] = master_weight_dtype
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool = False) -> None:
        """Moments of zero, and the copy that is updated in the parameter's place."""
        for name, dtype in self._types.items():
            value = param.detach() if name == "master_param" else torch.zeros_like(param)
            self.state[param][name] = value.to(dtype, copy=True)

    def get_unscaled_state(self, param: torch.Tensor, state_name: str) -> torch.Tensor:
        """In float32."""
        return self.state[param][state_name].float()

    def set_scaled_state(self, param: torch.Tensor, state_name: str, unscaled_state: torch.Tensor) -> None:
        """Rounded to the type that it is stored in."""
        self.state[param][state_name].copy_(unscaled_state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's own would turn state into the types of the parameters."""
        super().load_state_dict(state_dict | {"state": {}})
        numbers = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, param in zip(numbers, self._params(), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[param][name] = value.to(self._types[name])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of both kinds."""
        super().zero_grad(set_to_none)
        for param in self._params():
            gradient = getattr(param, "decoupled_grad", None)
            if gradient is not None and set_to_none:
                setattr(param, "decoupled_grad", None)  # noqa: B010  # torch's type of tensors does not have it
            elif gradient is not None:
                gradient.zero_()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> NoReturn: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step on every parameter that has a gradient; the group's `step` counts also without parameters."""
        if closure is not None:
            raise ValueError("FusedAdam takes no closure")
        for group in self.param_groups:
            if not group["params"]:
                continue  # as FusedAdam: Megatron fills in the step of empty groups itself
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if self._gradient(p) is not None]
            together = len(params) if all(self._is_float32(p) for p in params) else 1  # else copies are made
            for first in range(0, len(params), max(1, together)):
                self._update(group, params[first : first + together])

    def _params(self) -> Iterable[torch.Tensor]:
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    def _gradient(self, param: torch.Tensor) -> torch.Tensor | None:
        return getattr(param, self._gradient_name, None)

    def _is_float32(self, param: torch.Tensor) -> bool:
        return param.dtype == torch.float32 and set(self._types.values()) == {torch.float32}

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.initialize_state(p)
        gradients = [g.float() for g in map(self._gradient, params) if g is not None]
        kept = [self.state[p].get("master_param", p) if p.dtype != torch.float32 else p for p in params]
        kept += [self.state[p][name] for name in ("exp_avg", "exp_avg_sq") for p in params]
        values = [tensor.float() for tensor in kept]  # itself where it is float32
        weights, first, second = (values[i : i + len(params)] for i in range(0, len(values), len(params)))
        beta1, beta2 = group["betas"]
        correction1, correction2 = 1.0, 1.0
        if group["bias_correction"]:
            correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
        if group["weight_decay"] and self.adam_w_mode:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, correction2**0.5)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(weights, first, denominators, -group["lr"] / correction1)
        for target, value in zip([*params, *kept], [*weights, *values], strict=True):
            if target is not value:
                target.copy_(value)
