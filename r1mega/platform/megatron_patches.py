"""Every change made to megatron-core, for each version that is supported, and why.

Changes are made to the source text as each module is imported, so that torch stays as it is, whatever is imported
before or after (vLLM replaces parts of torch.cuda itself). A text that is not found, or found another number of times,
raises PlatformError: a new version of megatron-core needs a look at this list. `versions` says where a patch belongs,
`upstream` which change of megatron-core is the reason that it does not belong everywhere.

Three causes:
- `cpu`: the code takes a CUDA device for granted;
- `no_te`: the local layer spec lacks something that only Transformer Engine's has;
- `always`: megatron-core differs from the model that it should be (DeepSeek-V3 as published and as in transformers).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

from r1mega.errors import PlatformError
from r1mega.platform.cuda_stand_in import CudaStandIn

_logger = logging.getLogger(__name__)

MEGATRON_VERSIONS = {"0.16.1": "3.11", "0.19.2": "3.12"}
"""Supported versions of megatron-core, and the Python that each is tested with (0.16.1 is the last one for 3.11)."""


@dataclass(frozen=True, slots=True)
class Patch:
    """Replace `old` by `new` in the source of megatron.core.`module`, `count` times exactly.

    versions: of megatron-core that need it, as a PEP 440 specifier; empty: all. upstream: what changed at that bound.
    """

    module: str
    when: Literal["cpu", "no_te", "always"]
    old: str
    new: str
    reason: str
    count: int = 1
    versions: str = ""
    upstream: str = ""

    def is_for(self, version: str) -> bool:
        """Whether this version of megatron-core needs the patch."""
        return version in SpecifierSet(self.versions)


_PADDING_MASK = (
    "the mask as an argument reaches neither the later pipeline stages (cut for sequence parallelism) nor MTP's layer"
)
_LOGITS_WITH_MTP = "a model with MTP layers must give logits too, where there are no labels (RL, log-probs)"
_IMITATION = "#3457 takes the input tokens for labels where there are none: RL would imitate what it sampled"

PATCHES = (
    Patch(
        "jit",
        "cpu",
        "jit_fuser = torch.compile",
        "jit_fuser = noop_decorator",
        "compiling costs seconds a shape and a C++ compiler on a CPU",
    ),
    Patch(
        "tensor_parallel.random",
        "cpu",
        "return torch.cuda.random.get_rng_state(device=device)",
        "return torch.get_rng_state()",
        "the random state is the CPU's",
    ),
    Patch(
        "tensor_parallel.random",
        "cpu",
        "    if hasattr(_C, '_cuda_setRNGState') and callable(_C._cuda_setRNGState):",
        "    return torch.set_rng_state(new_state)\n    if False:",
        "the random state is the CPU's",
    ),
    Patch(
        "tensor_parallel.random",
        "cpu",
        "if not torch.all(cpu_rng_state == torch.get_rng_state()).item():",
        "if False:",
        "the two generators are one, so the warning would come at every fork",
    ),
    Patch(
        "models.common.embeddings.rope_utils",
        "cpu",
        'device="cpu", pin_memory=True',
        'device="cpu"',
        "pinned memory needs an accelerator (context parallelism)",
    ),
    Patch(
        "transformer.moe.moe_utils",
        "cpu",
        "if torch.is_tensor(tensor) and tensor.is_cuda:",
        "if torch.is_tensor(tensor):",
        "the split sizes of the all-to-all must become numpy arrays for CPU tensors too",
    ),
    Patch(
        "tensor_parallel.mappings",
        "cpu",
        "torch.distributed.all_gather(output_tensor_list, input_, group=group)",
        "_uneven_all_gather(output_tensor_list, input_, group)",
        "gloo gathers equal sizes only (expert tensor parallelism with expert parallelism)",
    ),
    Patch(
        "tensor_parallel.mappings",
        "cpu",
        "torch.distributed.reduce_scatter(output, input_tensor_list, group=group)",
        "_uneven_reduce_scatter(output, input_tensor_list, group)",
        "gloo scatters equal sizes only (expert tensor parallelism with expert parallelism)",
    ),
    Patch(
        "transformer.multi_latent_attention",
        "no_te",
        "\n@dataclass\nclass MLASelfAttentionSubmodules:",
        "\nHAVE_TE = False\nfrom r1mega.platform.local_layers import DuplicatedLinear as TELinear\n"
        "TEColumnParallelLinear = Linear = ColumnParallelLinear\n"
        "\n@dataclass\nclass MLASelfAttentionSubmodules:",
        "without Transformer Engine TELinear is a mock; the down-projections need a duplicated linear layer",
    ),
    Patch(
        "transformer.torch_norm",
        "no_te",
        "        assert not config.sequence_parallel,",
        '        if config.normalization == "RMSNorm":\n'
        "            from r1mega.platform.local_layers import RMSNorm\n\n"
        "            return RMSNorm(config, hidden_size, eps)\n"
        "        assert not config.sequence_parallel,",
        "torch's norm under sequence parallelism would keep the gradient of one rank's tokens only",
    ),
    Patch(
        "transformer.moe.moe_utils",
        "no_te",
        "    HAVE_TE = False",
        "    HAVE_TE = False\n    te_general_gemm = None",
        "the name is used without Transformer Engine, but only defined with it",
        versions="<0.17",
        upstream="defined as None there",
    ),
    Patch(
        "optimizer",
        "no_te",
        "        from torch.optim import AdamW as Adam\n\n        USING_PYTORCH_OPTIMIZER = True",
        "        from r1mega.platform.adam import FusedAdam as Adam\n\n        USING_PYTORCH_OPTIMIZER = False",
        "torch's AdamW breaks sharded checkpoints of the distributed optimizer (see adam.py)",
    ),
    Patch(
        "optimizer.distrib_optimizer",
        "no_te",
        "        from torch.optim import Adam as Adam\n\n        HAVE_APEX_OR_TE = False",
        "        from r1mega.platform.adam import FusedAdam as Adam\n\n        USING_APEX_OPTIMIZER = True",
        "as above",
    ),
    Patch(
        "transformer.moe.moe_utils",
        "always",
        "scores.view(num_tokens, num_groups, -1).topk(topk // group_topk, dim=-1)[0].sum(dim=-1)",
        "scores.view(num_tokens, num_groups, -1).topk(2, dim=-1)[0].sum(dim=-1)",
        "DeepSeek-V3 (its own code, transformers, vLLM) scores a group by its two best experts, whatever top-k is",
    ),
    Patch(
        "transformer.moe.router",
        "always",
        '"seq_load_balancing_loss",\n            self.tp_cp_group,\n            valid_token_count=local_num_tokens,',
        '"seq_load_balancing_loss",\n            self.tp_cp_group,\n'
        "            valid_token_count=total_num_tokens * bsz,",
        "with calculate_per_token_loss the auxiliary loss shrank by tp * cp * sequences in the microbatch",
        versions="<0.19",
        upstream="NVIDIA/Megatron-LM#5047 (tp * cp) and #5798 (sequences)",
    ),
    Patch(
        "transformer.moe.router",
        "always",
        "valid_token_count=local_num_tokens * bsz,",
        "valid_token_count=total_num_tokens * bsz / self.tp_cp_group.size(),",
        "a rank's tokens times the ranks are all tokens only where padding is spread evenly: ranks would weigh unequally",
        versions=">=0.19",
        upstream="#5047 multiplies a rank's own count by the ranks",
    ),
    Patch(
        "transformer.moe.router",
        "always",
        "                self.expert_bias.data = self.expert_bias.data.to(torch.float32)",
        "                self.expert_bias.data = self.expert_bias.data.to(torch.float32)\n"
        "                self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.to(torch.float32)",
        "Float16Module turns the token counters into bfloat16, which cannot count beyond 256",
    ),
    Patch(
        "transformer.transformer_layer",
        "always",
        '            padding_mask=kwargs.get("padding_mask", None),\n        )\n        return output, context',
        '            padding_mask=getattr(kwargs.get("packed_seq_params"), "padding_mask", None),\n'
        "        )\n        return output, context",
        _PADDING_MASK,
        versions="<0.19",
    ),
    Patch(
        "transformer.transformer_layer",
        "always",
        '            padding_mask=kwargs.get("padding_mask", None),\n            packed_seq_params=kwargs.get(',
        '            padding_mask=getattr(kwargs.get("packed_seq_params"), "padding_mask", None),\n'
        "            packed_seq_params=kwargs.get(",
        _PADDING_MASK,
        versions=">=0.19",
        upstream="#5696 adds an argument after it; MTP's layers now get the mask, later pipeline stages still not",
    ),
    Patch(
        "transformer.moe.router",
        "always",
        "routing_map = routing_map & (~padding_mask)",
        "routing_map = routing_map & (~padding_mask)[:, None]",
        "[tokens, experts] and [tokens] do not go together",
    ),
    Patch(
        "transformer.moe.moe_utils",
        "always",
        "total_num_tokens = global_tokens_per_expert.sum() / topk",
        "total_num_tokens = (global_tokens_per_expert.sum() / topk).clamp(min=1)",
        "a microbatch of padding alone has the auxiliary loss 0, not 0 / 0",
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
        versions="<0.18",
        upstream="what is not a tensor is no argument of the checkpoint there",
    ),
    Patch(
        "extensions.transformer_engine",
        "always",
        "            if not fp8_checkpoint:\n                return [state] * self.num_gemms",
        "            if not fp8_checkpoint or state.numel() == 0:\n                return [state] * self.num_gemms",
        "Transformer Engine 2.16 and later have an empty extra state for recipes without one (current and block scaling)",
    ),
    Patch(
        "models.gpt.gpt_model",
        "always",
        "        if mtp_in_postprocess:\n            hidden_states = self.mtp(",
        "        if mtp_in_postprocess and labels is not None:\n            hidden_states = self.mtp(",
        _LOGITS_WITH_MTP,
        versions="<0.17",
        upstream="the condition has more to it since; see below",
    ),
    Patch(
        "models.gpt.gpt_model",
        "always",
        "if self.config.mtp_num_layers is not None:\n            mtp_labels = labels.clone()",
        "if self.config.mtp_num_layers is not None and labels is not None:\n            mtp_labels = labels.clone()",
        _LOGITS_WITH_MTP,
        versions="<0.17",
        upstream="process_mtp_loss has it since",
    ),
    Patch(
        "models.gpt.gpt_model",
        "always",
        "        if mtp_in_postprocess and not (in_inference_mode or is_spec_decode):",
        "        if mtp_in_postprocess and labels is not None and not (in_inference_mode or is_spec_decode):",
        "without labels the MTP layers have nothing to predict",
        versions=">=0.19",
        upstream=_IMITATION,
    ),
    Patch(
        "models.gpt.gpt_model",
        "always",
        "            elif not in_inference_mode:\n                # In training/eval, use the utility",
        "            elif not in_inference_mode and labels is not None:\n                # In training/eval, use the utility",
        "the loss of the MTP layers belongs where tokens are to be imitated: pre-training and SFT",
        versions=">=0.19",
        upstream=_IMITATION,
    ),
    Patch(
        "transformer.multi_token_prediction",
        "always",
        "mtp_loss_scale * mtp_loss * (original_num_tokens / num_tokens_safe)",
        "mtp_loss_scale * mtp_loss",
        "the DeepSeek-V3 report (2.2, equation 24) divides each depth's sum by all tokens, not by those that it predicts",
        versions=">=0.17",
        upstream="#3159 averages over the predicted tokens of the microbatch",
    ),
    Patch(
        "transformer.mla_qk_norm_config",
        "always",
        """            linear_q_proj_cls = self._mla_fused_linear_or_default(
                self.submodules.linear_q_proj, "linear_q_proj"
            )""",
        """            linear_q_proj_cls = self.submodules.linear_q_proj or self.linear_impl""",
        "DeepSeek-V2-Lite and Moonlight project the query without a norm; only the latent key and value have one",
        versions=">=0.19",
        upstream="#4452 puts a norm, with a weight, before the query's projection where q_lora_rank is None",
    ),
)

_KNOWN_LOG_MESSAGES = {
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # HybridModel has neither our names nor 0.16.1's
    "distributed.distributed_data_parallel": "full_param_layout not provided",  # what it then computes is what we want
    "dist_checkpointing.strategies.torch": "MCore's async save is deprecated",  # its plan is used, not its saving
    "dist_checkpointing.strategies.common": "load_common is deprecated",  # how 0.16.1 too keeps what is not tensors
}
"""Warnings of megatron-core 0.19 that ask nothing of the user, by module."""

_CUDA_TYPE_NAME = re.compile(r"(['\"])torch\.cuda\.(\w+Tensor)")
_CUDA_MODULE = re.compile(r"(?<!from )(?<!import )\btorch\.cuda\.(?=\w)")
_CUDA_METHOD = re.compile(r"\.cuda\([^()]*(?:\(\))?\)")
_CUDA_DEVICE = re.compile(r"\b(device|map_location)=(['\"])cuda\2")
_CUDA_DEVICE_CALL = re.compile(r"\btorch\.device\((['\"])cuda\1\)")
_EXPECTED_REWRITES = ("pipeline_parallel.schedules", "optimizer.clip_grads", "optimizer.optimizer")


def rewrite_for_cpu(source: str) -> str:
    """Turn every use of CUDA in a megatron-core module into its CPU form. Lines keep their numbers.

    'torch.cuda.FloatTensor' (a name) -> 'torch.FloatTensor'; torch.cuda.x -> the stand-in; t.cuda() -> t.cpu();
    device='cuda', map_location='cuda', torch.device('cuda') -> the same with 'cpu'. Tensors never move, because all are
    on the CPU already.
    """
    source = _CUDA_TYPE_NAME.sub(r"\1torch.\2", source)
    source = _CUDA_MODULE.sub("_cuda_stand_in.", source)
    source = _CUDA_METHOD.sub(".cpu()", source)
    source = _CUDA_DEVICE_CALL.sub("torch.device('cpu')", source)
    return _CUDA_DEVICE.sub(r"\1='cpu'", source)


def apply_patches(module: str, source: str, patches: Sequence[Patch]) -> str:
    """`patches` applied to the source of megatron.core.`module`. Raises PlatformError when one does not fit."""
    for patch in patches:
        found = source.count(patch.old)
        if found != patch.count:
            raise PlatformError(
                f"megatron.core.{module}: {patch.old!r} is there {found} times instead of {patch.count} "
                f"({patch.reason}). r1mega was made for megatron-core {' and '.join(MEGATRON_VERSIONS)}: install one of "
                "these, unchanged, or review r1mega/platform/megatron_patches.py"
            )
        source = source.replace(patch.old, patch.new)
    return source


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the changed source; unchanged modules take Python's own way, with its bytecode cache."""

    def __init__(self, fullname: str, path: str, patches: Sequence[Patch], cpu: bool, names: dict[str, Any]):
        super().__init__(fullname, path)
        self._patches, self._cpu, self._names = patches, cpu, names

    def get_code(self, fullname: str) -> CodeType | None:
        """See importlib. Raises PlatformError where a patch finds no longer what it replaces."""
        with open(self.path, encoding="utf-8") as file:
            original = file.read()
        module = fullname.removeprefix("megatron.core.")
        source = apply_patches(module, original, self._patches)
        if self._cpu:
            source = rewrite_for_cpu(source)
            if module in _EXPECTED_REWRITES and source == original:
                raise PlatformError(f"{fullname}: no use of CUDA found to rewrite; megatron-core has changed")
        if source == original:
            return super().get_code(fullname)
        return compile(source, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(self._names)
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, patches: Sequence[Patch], cpu: bool):
        self.cpu = cpu
        self.by_module: dict[str, list[Patch]] = {}
        for patch in patches:
            self.by_module.setdefault(patch.module, []).append(patch)
        self.names: dict[str, Any] = {}
        if cpu:
            self.names = {
                "_cuda_stand_in": CudaStandIn(),
                "_uneven_all_gather": _uneven_all_gather,
                "_uneven_reduce_scatter": _uneven_reduce_scatter,
            }

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None):
        """See importlib. None for every module but those of megatron.core that are to be changed."""
        if not fullname.startswith("megatron.core."):
            return None
        patches = self.by_module.get(fullname.removeprefix("megatron.core."), ())
        if not patches and not self.cpu:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        spec.loader = _Loader(fullname, spec.loader.path, patches, self.cpu, self.names)
        return spec


def is_installed() -> bool:
    """Whether imports of megatron.core take the patches."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install(platform: Any) -> None:
    """Make later imports of megatron.core take the patches for this platform. Idempotent.

    Raises PlatformError when megatron.core is imported already (unpatched) or is of a version that is not supported.
    """
    if is_installed():
        return
    loaded = sorted(name for name in sys.modules if name.startswith("megatron.core"))
    if loaded:
        raise PlatformError(f"{loaded[0]} was imported before r1mega.platform.prepare(): call it first")
    version = installed_version()
    _hide_unused(platform)
    for message in (r"(Transformer Engine|Apex).*not installed", "full scope is deprecated"):
        warnings.filterwarnings("ignore", message=message)  # known: `r1mega doctor` tells what is installed
    for name, message in _KNOWN_LOG_MESSAGES.items():
        logging.getLogger(f"megatron.core.{name}").addFilter(lambda record, known=message: known not in record.msg)
    sys.meta_path.insert(0, _Finder(needed_patches(platform, version), cpu=platform.name == "cpu"))


def _hide_unused(platform: Any) -> None:
    """Megatron-core takes Transformer Engine and apex wherever it can import them: without a GPU too, and of versions and builds
    that this platform refuses; one whose import fails with another error than ImportError ends the process.
    """
    for name, is_used in (("transformer_engine", platform.has_transformer_engine), ("apex", platform.has_apex)):
        if is_used or importlib.util.find_spec(name) is None:
            continue
        _logger.warning("%s is installed and not used: megatron-core does without it (r1mega doctor says why)", name)
        for module in [name, *(loaded for loaded in sys.modules if loaded.startswith(f"{name}."))]:
            sys.modules[module] = None  # whose import is then a ModuleNotFoundError


def installed_version() -> str:
    """The version of megatron-core that is installed. PlatformError unless it is one of MEGATRON_VERSIONS."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    advice = "; ".join(
        f"with Python {theirs}: pip install megatron-core=={version}"
        for version, theirs in MEGATRON_VERSIONS.items()
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


def _uneven_all_gather(outputs: list[Any], tensor: Any, group: Any) -> None:
    """all_gather into tensors of different first dimensions: padded to the largest on the way."""
    import torch.distributed as dist

    padded = tensor.new_zeros((max(o.shape[0] for o in outputs), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [padded.new_empty(padded.shape) for _ in outputs]
    dist.all_gather(gathered, padded, group=group)
    for output, whole in zip(outputs, gathered, strict=True):
        output.copy_(whole[: output.shape[0]])


def _uneven_reduce_scatter(output: Any, inputs: list[Any], group: Any) -> None:
    """reduce_scatter of tensors of different first dimensions: all are summed everywhere, one is kept."""
    import torch
    import torch.distributed as dist

    total = torch.cat(inputs)
    dist.all_reduce(total, group=group)
    output.copy_(torch.split(total, [i.shape[0] for i in inputs])[group.rank()])
