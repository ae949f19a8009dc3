"""GPTModel chunks of this rank for an HF config and a parallel layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from r1mega import platform
from r1mega.config.layout import NOT_BUILT, Layout, model_problems, mtp_stage
from r1mega.config.model_files import HFConfig
from r1mega.config.schema import MegatronConfig
from r1mega.errors import ConfigError, PlatformError
from r1mega.model.architecture import LatentAttention
from r1mega.model.families import family_of
from r1mega.model.hf_config import as_dict, refuse, require
from r1mega.platform.groups import seed_all


def build_model(
    hf_config: HFConfig | Any,
    layout: Layout,
    model: Any,
    *,
    seed: int = 0,
    init_std: float | None = None,
) -> list[Any]:
    """This rank's GPTModel chunks (one per virtual pipeline stage), in the dtype and on the device to train in.

    hf_config: config.json as a dict, or a transformers config. layout: ParallelConfig; init_parallel(layout) has been
    called. model: ModelConfig (dtype, fp8 and the layers without it, expert_bias_update_rate, sequence_aux_loss_coefficient,
    mtp_loss_coefficient, recompute, dispatcher, megatron). init_std: draw weights from N(0, init_std), output projections from
    N(0, init_std / sqrt(2 * layers)) (Megatron's rule; the DeepSeek-V3 report has one std for all); None: weights are
    to be loaded and are NaN until then. Each chunk has `unpadded_vocab_size`.
    Raises ConfigError when the layout does not divide the model.
    """
    platform.prepare()
    hf = as_dict(hf_config)
    config = megatron_config(hf, layout, model, init_std=init_std)
    seed_all(seed)
    virtual = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(hf, config, init_std, stage) for stage in (range(virtual) if virtual else [None])]


def packed_seq_params(cu_seqlens: torch.Tensor, padding: torch.Tensor | None = None) -> Any:
    """Megatron's description of packed sequences, from their bounds [sequences + 1] int32 (0 first, t last).

    Under context parallelism the bounds are those of the whole sequences; each rank holds `zigzag_rows` of them.
    padding: [tokens that this rank's layers see] bool, True for tokens that routers do not count; None: there are none.
    """
    platform.prepare()
    from r1mega.model.attention import PackedSequences

    longest = int(cu_seqlens.diff().max())
    cu_seqlens = cu_seqlens.to(platform.current().device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        padding_mask=None if padding is None else padding[None],
    )


def check_layout(hf: HFConfig, layout: Layout) -> None:
    """ConfigError, naming every number to change, unless the layout fits the model. Needs no processes."""
    problems = list(model_problems(layout, hf))
    if problems:
        raise ConfigError("; ".join(problems))


def check_model(hf: HFConfig, layout: Layout, model: Any) -> None:
    """Whatever `build_model` would raise for this config.json, layout and ModelConfig. Needs no processes.

    Raises ConfigError, PlatformError.
    """
    megatron_config(hf, layout, model)
    family_of(hf).position_arguments(hf)


def megatron_config(hf: HFConfig, layout: Layout, model: Any, *, init_std: float | None = None) -> Any:
    """TransformerConfig (MLATransformerConfig for latent attention) for one model, layout and platform."""
    platform.prepare()
    family = family_of(hf)
    check_layout(hf, layout)
    refuse(hf, hidden_act="silu")
    layers, hidden, heads, intermediate, eps = require(
        hf, "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "rms_norm_eps"
    )
    require(hf, "vocab_size", "max_position_embeddings")
    dtype = getattr(torch, model.dtype) if isinstance(model.dtype, str) else model.dtype
    arguments = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_hidden_size": intermediate,
        "normalization": "RMSNorm",
        "layernorm_epsilon": eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "calculate_per_token_loss": True,
        **_initialization_arguments(init_std),
        **_layout_arguments(layout),
        **_platform_arguments(model.fp8),
        **_handed_on(model.megatron),
        **_fp8_arguments(model),
        **_recompute_arguments(model.recompute),
        **_offload_arguments(model.offload_modules),
        **family.megatron_arguments(hf, model),
        **_dispatcher_arguments(model.dispatcher),
    }
    if layout.layers_per_stage is not None:
        arguments["pipeline_model_parallel_layout"] = _pipeline_layout(
            layout, layout.layers_per_stage, arguments.get("mtp_num_layers") or 0
        )
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    latent = isinstance(family.architecture(hf).attention, LatentAttention)
    try:
        return (MLATransformerConfig if latent else TransformerConfig)(**arguments)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"megatron-core refuses the model and its layout: {error}") from error


def _initialization_arguments(init_std: float | None) -> dict[str, Any]:
    """Where weights are to be loaded, Megatron still has to initialise, with a method that does nothing: the attributes
    by which its optimizer tells slices of a tensor from copies (gradient norm, clipping) are set there and nowhere else.
    """
    if init_std is not None:
        return {"init_method_std": init_std}
    return {"init_method": _leave, "output_layer_init_method": _leave}


def _leave(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _pipeline_layout(layout: Layout, layers_per_stage: Sequence[int], num_mtp_layers: int) -> list[list[str]]:
    """Megatron's pipeline_model_parallel_layout: what each stage holds, in the order of the model."""
    if layout.mtp_standalone and not num_mtp_layers:
        raise ConfigError(NOT_BUILT)
    stages = [["decoder"] * count for count in layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[mtp_stage(layout)] += ["mtp"] * num_mtp_layers
    stages[-1].append("loss")
    return stages


def _layout_arguments(layout: Layout) -> dict[str, Any]:
    pipelined = layout.pp > 1
    virtual = layout.vpp if layout.vpp and layout.vpp > 1 else None
    arguments = {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.tp > 1 if layout.sp is None else layout.sp and layout.tp > 1,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "variable_seq_lengths": pipelined,  # packed microbatches differ in length
        # swapping .data while gloo still sends it corrupts activations now and then
        "deallocate_pipeline_outputs": platform.current().name == "cuda",
    }
    if virtual:  # with two stages the previous rank is the next one, where batched p2p can pair the wrong messages
        arguments |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return arguments


def _platform_arguments(fp8: str) -> dict[str, Any]:
    """Transformer Engine's layers and grouped GEMM where it can run; else the local layers. The one place."""
    here = platform.current()
    if not here.has_transformer_engine:
        if fp8 != "off":
            raise PlatformError(f"model.fp8 = {fp8!r} needs Transformer Engine and a GPU; set it to 'off' here")
        return {
            "transformer_impl": "local",
            "moe_grouped_gemm": False,
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
        }
    return {
        "transformer_impl": "transformer_engine",
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "gradient_accumulation_fusion": here.has_apex,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
    }


def _handed_on(keys: MegatronConfig) -> dict[str, object]:
    """MegatronConfig as arguments. PlatformError for what only Transformer Engine's layers have, where these are not."""
    from megatron.core.transformer.enums import AttnBackend

    arguments = keys.model_dump()
    engine = ("moe_router_fusion", "apply_rope_fusion", "gradient_accumulation_fusion")
    if not platform.current().has_transformer_engine and (wanted := [key for key in engine if arguments[key]]):
        raise PlatformError(
            f"model.megatron.{wanted[0]} needs Transformer Engine and a GPU, which are not here; leave it out"
        )
    if arguments["gradient_accumulation_fusion"] is None:
        del arguments["gradient_accumulation_fusion"]
    return arguments | {"attention_backend": AttnBackend[keys.attention_backend]}


def _dispatcher_arguments(dispatcher: str) -> dict[str, str]:
    if dispatcher == "alltoall":
        return {}  # a family says so itself
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": dispatcher}


def _fp8_arguments(model: Any) -> dict[str, Any]:
    """The recipe, and which layers do without it.

    Experts' token counts are padded by zeros, before their layers (TEGroupedMLP). `moe_router_padding_for_quantization`
    would send real tokens to experts they did not choose: these count in scales, and are sent over the network.
    """
    recipes = {
        "off": {},
        "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
        # DeepSeek-V3 section 3.3: e4m3 everywhere, scales per 1x128 activation tile and 128x128 weight block
        "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    }
    first, last = model.fp8_skip_first_layers, model.fp8_skip_last_layers
    skipped = {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }
    return recipes[model.fp8] | (skipped if first or last else {})


def _recompute_arguments(recompute: str | Sequence[str]) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "none" or not recompute:
        return {}
    if "moe_act" in recompute and not platform.current().has_transformer_engine:
        raise PlatformError(
            "model.recompute: moe_act is the activation between grouped matrix products, and these need Transformer Engine "
            "and a GPU; leave it out here"
        )
    return {"recompute_granularity": "selective", "recompute_modules": list(recompute)}


def _offload_arguments(modules: Sequence[str]) -> dict[str, object]:
    if not modules:
        return {}
    if not platform.current().has_transformer_engine:
        raise PlatformError(
            "model.offload_modules needs Transformer Engine and a GPU, which are not here; leave it out"
        )
    return {"fine_grained_activation_offloading": True, "offload_modules": list(modules)}


def _build_chunk(hf: HFConfig, config: Any, init_std: float | None, virtual_stage: int | None) -> Any:
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel

    layer_specs, mtp_specs = _specs(config, virtual_stage)
    vocabulary, positions = require(hf, "vocab_size", "max_position_embeddings")
    tp = config.tensor_model_parallel_size
    model = GPTModel(
        config,
        layer_specs,
        vocab_size=-(-vocabulary // tp) * tp,
        max_sequence_length=positions,
        pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=bool(hf.get("tie_word_embeddings", False)),
        mtp_block_spec=mtp_specs,
        vp_stage=virtual_stage,
        **family_of(hf).position_arguments(hf),
    )
    model.to(platform.current().device)
    model.unpadded_vocab_size = vocabulary
    if vocabulary % tp and model.post_process:
        _mask_padded_vocabulary(model, vocabulary)
    for name, parameter in model.named_parameters():
        if ".experts." in name and ".shared_experts." not in name:
            # with EP 1 and ETP != TP Megatron would reduce expert gradients over the dense data-parallel group
            parameter.allreduce = False
            # Transformer Engine 2.20 leaves it out, and the gradient norm would lack the experts of all but one rank of TP
            parameter.tensor_model_parallel = True
        if name.endswith("_down_proj.weight"):
            # latent attention's, whole on every rank of TP: Transformer Engine marks them as slices, and the gradient norm
            # would count them tp times
            parameter.tensor_model_parallel = False
        if init_std is None:
            torch.nn.init.constant_(parameter, float("nan"))
    return model


def _specs(config: Any, virtual_stage: int | None) -> tuple[Any, Any]:
    """(decoder block spec, MTP block spec or None) with this platform's attention, linear layers and norms."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    engine = config.transformer_impl == "transformer_engine"
    block = specs.get_gpt_decoder_block_spec(config, engine, normalization="RMSNorm", vp_stage=virtual_stage)
    layers = specs.get_gpt_decoder_layer_specs(config, engine, normalization="RMSNorm")
    for layer in [*block.layer_specs, *layers]:
        if not engine:
            _use_local_layers(layer, config)
        elif config.context_parallel_size > 1 and platform.current().name == "cpu":
            _use_own_core_attention(layer)  # Transformer Engine's needs cuDNN or flash attention to be cut over ranks
    mtp = None
    if config.mtp_num_layers:
        mtp = specs.get_gpt_mtp_block_spec(config, layers[-1], use_transformer_engine=engine, vp_stage=virtual_stage)
    if not engine:
        _use_local_norms(block, *(layer.submodules for layer in (mtp.layer_specs if mtp else ())))
    return block, mtp


def _use_own_core_attention(layer: Any) -> None:
    from r1mega.model.attention import CausalAttention

    layer.submodules.self_attention.submodules.core_attention = CausalAttention


def _use_local_layers(layer: Any, config: Any) -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    from r1mega.platform.local_layers import DuplicatedLinear

    _use_own_core_attention(layer)
    attention = layer.submodules.self_attention.submodules
    _use_local_norms(layer.submodules, attention)
    if hasattr(attention, "linear_kv_down_proj"):
        attention.linear_q_down_proj = attention.linear_kv_down_proj = DuplicatedLinear
        if config.q_lora_rank is None:
            attention.q_layernorm = IdentityOp  # there is no latent query to normalise


def _use_local_norms(*submodules: Any) -> None:
    """Megatron's wrapper of torch's norms refuses sequence parallelism: it would keep the gradient of one rank's tokens only."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from r1mega.platform.local_layers import RMSNorm

    for owner in submodules:
        for name, module in list(vars(owner).items()):
            if module is WrappedTorchNorm:
                setattr(owner, name, RMSNorm)


def _mask_padded_vocabulary(model: Any, vocabulary: int) -> None:
    """Logits of the rows that only pad the vocabulary become the least finite number: no probability, no gradient."""
    from megatron.core import parallel_state as ps

    rows = model.vocab_size // model.config.tensor_model_parallel_size
    padding = (ps.get_tensor_model_parallel_rank() + 1) * rows - vocabulary
    if padding <= 0:
        return

    def mask(_layer: Any, _inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        columns = torch.arange(rows, device=logits.device) >= rows - padding
        return logits.masked_fill(columns, torch.finfo(logits.dtype).min), bias

    model.vocabulary_mask = model.output_layer.register_forward_hook(mask)
