"""Every change made to megatron-core, for each version that is supported, why, and what will end it.

`megatron_import` makes them, to the source text as each module is imported. A text that is not found, or found another number
of times, raises PlatformError: a new version of megatron-core needs a look at this list. `since` and `fixed_in` say where a
patch belongs, `upstream` which change of megatron-core ends it; a patch that no supported version needs any more fails
tests/unit/platform/test_megatron_patches.py, by name. What a ModuleSpec can say is no patch: `model/build.py`.

Three causes:
- `cpu`: the code takes a CUDA device for granted;
- `no_te`: the local layer spec lacks something that only Transformer Engine's has;
- `always`: megatron-core differs from the model that it should be (DeepSeek-V3 as published and as in transformers).
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

from r1mega.errors import PlatformError
from r1mega.platform.megatron_patch import Patch
from r1mega.platform.offload_patches import OFFLOAD_PATCHES

MEGATRON_VERSIONS = {"0.16.1": "3.11", "0.19.2": "3.12"}
"""Supported versions of megatron-core, and the Python that each is tested with (0.16.1 is the last one for 3.11)."""


_ASKS_DEVICE = "none known; it would have to ask what device it runs on"
_ASKS_BACKEND = "none known; it would have to pad where the backend gathers equal sizes only"
_TAKES_ANY_ADAM = "none known; it would have to take any Adam that has the arguments"
_SAVES_ADAMW = "none known; its checkpoints would have to take the `step` that torch's AdamW keeps for each parameter"
_TAKES_MASK = "none known; packed_seq_params would have to carry the mask, which goes to every stage and layer"
_PADDING_MASK = (
    "the mask as an argument reaches neither the later pipeline stages (cut for sequence parallelism) nor MTP's layer"
)
_LOGITS_WITH_MTP = "a model with MTP layers must give logits too, where there are no labels (RL, log-probs)"
_LABELS = "none known; a pass without labels would have to leave the MTP layers out"
_IMITATION = "#3457 takes the input tokens for labels where there are none: RL would imitate what it sampled"

_NARROW = "heads widen what they read themselves, as after a pass of the other schedules (fp32_output=False)"
_ASKED_FOR_FP32 = "none known; the schedule that overlaps the all-to-all would have to take fp32_output"

PATCHES = (
    *OFFLOAD_PATCHES,
    Patch(
        "jit",
        "cpu",
        "jit_fuser = torch.compile",
        "jit_fuser = noop_decorator",
        "compiling costs seconds a shape and a C++ compiler on a CPU",
        _ASKS_DEVICE,
    ),
    Patch(
        "tensor_parallel.random",
        "cpu",
        "return torch.cuda.random.get_rng_state(device=device)",
        "return torch.get_rng_state()",
        "the random state is the CPU's",
        _ASKS_DEVICE,
    ),
    Patch(
        "tensor_parallel.random",
        "cpu",
        "    if hasattr(_C, '_cuda_setRNGState') and callable(_C._cuda_setRNGState):",
        "    return torch.set_rng_state(new_state)\n    if False:",
        "the random state is the CPU's",
        _ASKS_DEVICE,
    ),
    Patch(
        "tensor_parallel.random",
        "cpu",
        "if not torch.all(cpu_rng_state == torch.get_rng_state()).item():",
        "if False:",
        "the two generators are one, so the warning would come at every fork",
        _ASKS_DEVICE,
    ),
    Patch(
        "tensor_parallel.random",
        "no_te",
        "        self.fp8 = fp8 is not None",
        "        self.fp8 = False",
        "its default, False, is not None, and what is computed again asks Transformer Engine, which is not there, for its state",
        "none known; it would have to ask whether fp8 is on, not whether it is given",
    ),
    Patch(
        "transformer.moe.moe_utils",
        "cpu",
        "if torch.is_tensor(tensor) and tensor.is_cuda:",
        "if torch.is_tensor(tensor):",
        "the split sizes of the all-to-all must become numpy arrays for CPU tensors too",
        _ASKS_DEVICE,
    ),
    Patch(
        "tensor_parallel.mappings",
        "cpu",
        "torch.distributed.all_gather(output_tensor_list, input_, group=group)",
        "_uneven_all_gather(output_tensor_list, input_, group)",
        "gloo gathers equal sizes only (expert tensor parallelism with expert parallelism)",
        _ASKS_BACKEND,
    ),
    Patch(
        "tensor_parallel.mappings",
        "cpu",
        "torch.distributed.reduce_scatter(output, input_tensor_list, group=group)",
        "_uneven_reduce_scatter(output, input_tensor_list, group)",
        "gloo scatters equal sizes only (expert tensor parallelism with expert parallelism)",
        _ASKS_BACKEND,
    ),
    Patch(
        "transformer.multi_latent_attention",
        "no_te",
        "\n@dataclass\nclass MLASelfAttentionSubmodules:",
        "\nHAVE_TE = False\nfrom r1mega.platform.local_layers import DuplicatedLinear as TELinear\n"
        "TEColumnParallelLinear = Linear = ColumnParallelLinear\n"
        "\n@dataclass\nclass MLASelfAttentionSubmodules:",
        "without Transformer Engine TELinear is a mock; the down-projections need a duplicated linear layer",
        "none known; MLASelfAttention would have to take any class in its spec for them, not four by name",
    ),
    Patch(
        "transformer.moe.moe_utils",
        "no_te",
        "    HAVE_TE = False",
        "    HAVE_TE = False\n    te_general_gemm = None",
        "the name is used without Transformer Engine, but only defined with it",
        "#3763 defines it as None",
        fixed_in="0.17",
    ),
    Patch(
        "optimizer",
        "no_te",
        "        from torch.optim import AdamW as Adam\n\n        USING_PYTORCH_OPTIMIZER = True",
        "        from r1mega.platform.adam import FusedAdam as Adam\n\n        USING_PYTORCH_OPTIMIZER = False",
        "torch's AdamW breaks sharded checkpoints of the distributed optimizer (see adam.py)",
        _SAVES_ADAMW,
    ),
    Patch(
        "optimizer.distrib_optimizer",
        "no_te",
        "        from torch.optim import Adam as Adam\n\n        HAVE_APEX_OR_TE = False",
        "        from r1mega.platform.adam import FusedAdam as Adam\n\n        USING_APEX_OPTIMIZER = True",
        "as above",
        _SAVES_ADAMW,
    ),
    Patch(
        "tensor_parallel.layers",
        "always",
        "        if config.gradient_accumulation_fusion and not _grad_accum_fusion_available:\n            raise RuntimeError(",
        "        if config.gradient_accumulation_fusion and not _grad_accum_fusion_available and not HAVE_TE:\n"
        "            raise RuntimeError(",
        "the output layer alone needs apex to add up its gradient in place; all others are Transformer Engine's",
        "none known; its output layer would have to let Transformer Engine add up its gradient, or fall back",
    ),
    Patch(
        "tensor_parallel.layers",
        "always",
        "            )\n        self.gradient_accumulation_fusion = config.gradient_accumulation_fusion\n\n        if self.allreduce_dgrad",
        "            )\n        self.gradient_accumulation_fusion = (\n"
        "            config.gradient_accumulation_fusion and _grad_accum_fusion_available\n        )\n\n"
        "        if self.allreduce_dgrad",
        "as above",
        "none known; its output layer would have to let Transformer Engine add up its gradient, or fall back",
    ),
    Patch(
        "optimizer.cpu_offloading.hybrid_optimizer",
        "cpu",
        "                if offload_params_numel < offload_threshold and param.is_cuda:\n"
        "                    param = param.detach().clone().cpu().pin_memory()",
        "                if offload_params_numel < offload_threshold:\n"
        "                    param = param.detach().clone()",
        "optimizer.cpu_offload: parameters of the device, here the CPU, are copied and updated as those of a GPU are",
        _ASKS_DEVICE,
    ),
    Patch(
        "optimizer.optimizer_config",
        "no_te",
        'if not is_te_min_version("2.1.0"):',
        "if True:",
        "without Transformer Engine there is no version to compare (optimizer.cpu_offload)",
        "none known; it would have to ask whether Transformer Engine is there before its version",
    ),
    Patch(
        "optimizer.optimizer_config",
        "no_te",
        "from transformer_engine.pytorch.optimizers import FusedAdam as Adam",
        "from r1mega.platform.adam import FusedAdam as Adam",
        "optimizer.precision_aware without Transformer Engine: the CPU's Adam has the same arguments",
        _TAKES_ANY_ADAM,
    ),
    Patch(
        "optimizer",
        "no_te",
        'if is_te_min_version("2.1.0.dev0"):',
        "if True:",
        "as above: it has the argument store_param_remainders too",
        _TAKES_ANY_ADAM,
    ),
    Patch(
        "utils",
        "no_te",
        "[(torch.norm(tensor)) for tensor in tensor_list]",
        "[(torch.norm(tensor, dtype=torch.float32)) for tensor in tensor_list]",
        "the norm of gradients in bfloat16 would be rounded to it; Transformer Engine's and apex's is float32",
        "none known; it would have to give the norm the type of the kernels that it stands for",
    ),
    Patch(
        "optimizer.cpu_offloading.hybrid_optimizer",
        "cpu",
        "sum([param.numel() for param in params if param.is_cuda])",
        "params_total_numel",
        "as above",
        _ASKS_DEVICE,
    ),
    Patch(
        "transformer.moe.moe_utils",
        "always",
        "scores.view(num_tokens, num_groups, -1).topk(topk // group_topk, dim=-1)[0].sum(dim=-1)",
        "scores.view(num_tokens, num_groups, -1).topk(2, dim=-1)[0].sum(dim=-1)",
        "DeepSeek-V3 (its own code, transformers, vLLM) scores a group by its two best experts, whatever top-k is",
        "#4667 (open) makes their number an argument",
    ),
    Patch(
        "transformer.moe.router",
        "always",
        '"seq_load_balancing_loss",\n            self.tp_cp_group,\n            valid_token_count=local_num_tokens,',
        '"seq_load_balancing_loss",\n            self.tp_cp_group,\n'
        "            valid_token_count=total_num_tokens * bsz,",
        "with calculate_per_token_loss the auxiliary loss shrank by tp * cp * sequences in the microbatch",
        "#5047 (tp * cp) and #5798 (sequences); what is left of it is the next patch",
        fixed_in="0.19",
    ),
    Patch(
        "transformer.moe.router",
        "always",
        "valid_token_count=local_num_tokens * bsz,",
        "valid_token_count=total_num_tokens * bsz / self.tp_cp_group.size(),",
        "a rank's tokens times the ranks are all tokens only where padding is spread evenly: ranks would weigh unequally",
        "none known; #5047 brought it, which multiplies a rank's own count by the ranks: it would have to sum their counts",
        since="0.19",
    ),
    Patch(
        "transformer.moe.router",
        "always",
        "                self.expert_bias.data = self.expert_bias.data.to(torch.float32)",
        "                self.expert_bias.data = self.expert_bias.data.to(torch.float32)\n"
        "                self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.to(torch.float32)",
        "Float16Module turns the token counters into bfloat16, which cannot count beyond 256",
        "#7081 (after 0.19.2) makes them integers",
        fault="'local_tokens_per_expert',\n                torch.zeros(\n                    self.config.num_moe_experts,\n"
        "                    dtype=torch.float32,",
    ),
    Patch(
        "transformer.transformer_layer",
        "always",
        '            padding_mask=kwargs.get("padding_mask", None),\n        )\n        return output, context',
        '            padding_mask=getattr(kwargs.get("packed_seq_params"), "padding_mask", None),\n'
        "        )\n        return output, context",
        _PADDING_MASK,
        f"{_TAKES_MASK}; #5696 changes the text, not the fault: see the next patch",
        fixed_in="0.19",
    ),
    Patch(
        "transformer.transformer_layer",
        "always",
        '            padding_mask=kwargs.get("padding_mask", None),\n            packed_seq_params=kwargs.get(',
        '            padding_mask=getattr(kwargs.get("packed_seq_params"), "padding_mask", None),\n'
        "            packed_seq_params=kwargs.get(",
        _PADDING_MASK,
        f"{_TAKES_MASK}: since #5696 MTP's layers get it, later pipeline stages still not",
        since="0.19",
    ),
    Patch(
        "models.gpt.fine_grained_callables",
        "always",
        "layer.mlp.route(pre_mlp_layernorm_output)",
        'layer.mlp.route(\n                    pre_mlp_layernorm_output, getattr(packed_seq_params, "padding_mask", None)\n'
        "                )",
        f"the schedule that overlaps the experts' all-to-all: {_PADDING_MASK}",
        _TAKES_MASK,
    ),
    Patch(
        "models.gpt.fine_grained_callables",
        "always",
        "return float16_to_fp32(loss)",
        "return loss",
        _NARROW,
        f"{_ASKED_FOR_FP32}; in 0.19 it stands in another module: see below",
        fixed_in="0.19",
    ),
    Patch(
        "models.common.utils",
        "always",
        "return float16_to_fp32(loss)",
        "return loss",
        _NARROW,
        _ASKED_FOR_FP32,
        since="0.19",
    ),
    Patch(
        "transformer.moe.router",
        "always",
        "routing_map = routing_map & (~padding_mask)\n",
        "routing_map = routing_map & (~padding_mask)[:, None]\n",
        "[tokens, experts] and [tokens] do not go together",
        "#6114 (after 0.19.2)",
    ),
    Patch(
        "transformer.moe.moe_utils",
        "always",
        "total_num_tokens = global_tokens_per_expert.sum() / topk",
        "total_num_tokens = (global_tokens_per_expert.sum() / topk).clamp(min=1)",
        "a microbatch of padding alone has the auxiliary loss 0, not 0 / 0",
        "none known; switch_load_balancing_loss_func would have to take no tokens at all",
    ),
    Patch(
        "transformer.multi_token_prediction",
        "always",
        "                return tensor_parallel.checkpoint(\n"
        "                    forward_func, self.config.distribute_saved_activations, *args, *kwargs.values()\n"
        "                )",
        "                tensors = {name: value for name, value in kwargs.items() if torch.is_tensor(value)}\n"
        "                return tensor_parallel.checkpoint(\n"
        "                    lambda *given: forward_func(*args, **(kwargs | dict(zip(tensors, given)))),\n"
        "                    self.config.distribute_saved_activations,\n"
        "                    *tensors.values(),\n"
        "                )",
        "save_for_backward takes tensors only, and packed sequences are described by something else",
        "#4593: what is not a tensor is no argument of the checkpoint",
        fixed_in="0.18",
    ),
    Patch(
        "extensions.transformer_engine",
        "always",
        "            state = self._decode_extra_state(state)\n            extra_states = []",
        "            if state.numel() == 0:\n                return [state] * self.num_gemms\n"
        "            state = self._decode_extra_state(state)\n            extra_states = []",
        "Transformer Engine 2.16 and later have an empty extra state for recipes without one (current and block scaling)",
        "#5997 returns empty states where there is nothing to decode",
        fixed_in="0.19",
    ),
    Patch(
        "models.gpt.gpt_model",
        "always",
        "        if mtp_in_postprocess:\n            hidden_states = self.mtp(",
        "        if mtp_in_postprocess and labels is not None:\n            hidden_states = self.mtp(",
        _LOGITS_WITH_MTP,
        f"{_LABELS}; in 0.17 and 0.18 they run for nothing, from 0.19 they are trained: see below",
        fixed_in="0.17",
    ),
    Patch(
        "models.gpt.gpt_model",
        "always",
        "if self.config.mtp_num_layers is not None:\n            mtp_labels = labels.clone()",
        "if self.config.mtp_num_layers is not None and labels is not None:\n            mtp_labels = labels.clone()",
        _LOGITS_WITH_MTP,
        "#2363: process_mtp_loss has it",
        fixed_in="0.17",
    ),
    Patch(
        "models.gpt.gpt_model",
        "always",
        "        if mtp_in_postprocess and not (in_inference_mode or is_spec_decode):",
        "        if mtp_in_postprocess and labels is not None and not (in_inference_mode or is_spec_decode):",
        f"without labels the MTP layers have nothing to predict; {_IMITATION}",
        _LABELS,
        since="0.19",
    ),
    Patch(
        "models.gpt.gpt_model",
        "always",
        "            elif not in_inference_mode:\n                # In training/eval, use the utility",
        "            elif not in_inference_mode and labels is not None:\n                # In training/eval, use the utility",
        f"the loss of the MTP layers belongs where tokens are to be imitated: pre-training and SFT; {_IMITATION}",
        _LABELS,
        since="0.19",
    ),
    Patch(
        "transformer.multi_token_prediction",
        "always",
        "mtp_loss_scale * mtp_loss * (original_num_tokens / num_tokens_safe)",
        "mtp_loss_scale * mtp_loss",
        "the DeepSeek-V3 report (2.2, equation 24) divides each depth's sum by all tokens, not by those that it predicts",
        "none known; #3159 brought it, which averages over the predicted tokens of the microbatch",
        since="0.17",
    ),
    Patch(
        "transformer.mla_qk_norm_config",
        "always",
        """            linear_q_proj_cls = self._mla_fused_linear_or_default(
                self.submodules.linear_q_proj, "linear_q_proj"
            )""",
        """            linear_q_proj_cls = self.submodules.linear_q_proj or self.linear_impl""",
        "DeepSeek-V2-Lite and Moonlight project the query without a norm; only the latent key and value have one",
        "none known; #4452 brought it, which puts a norm, with a weight, before it where q_lora_rank is None",
        since="0.19",
    ),
)


def installed_version() -> str:
    """The version of megatron-core that is installed. PlatformError unless it is one of MEGATRON_VERSIONS."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    advice = "; ".join(
        f"with Python {theirs}: pip install megatron-core=={version}" for version, theirs in MEGATRON_VERSIONS.items()
    )
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise PlatformError(f"megatron-core is not installed (this is Python {python}). {advice}") from error
    if version not in MEGATRON_VERSIONS:
        raise PlatformError(
            f"megatron-core {version} is installed (for Python {python}); the patches of r1mega are for "
            f"{' and '.join(MEGATRON_VERSIONS)}. {advice}"
        )
    return version


def needed_patches(platform: Any, version: str) -> tuple[Patch, ...]:
    """The patches that this version of megatron-core needs on this platform, in the order in which they are applied."""
    conditions: dict[str, bool] = {
        "always": True,
        "cpu": platform.name == "cpu",
        "no_te": not platform.has_transformer_engine,
    }
    return tuple(patch for patch in PATCHES if patch.is_for(version) and conditions[patch.when])
