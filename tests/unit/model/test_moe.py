"""Mixture of experts beyond the forward pass: auxiliary loss, bias updates, multi-token prediction, recomputation."""

from __future__ import annotations

import pytest
import torch

from r1mega.checkpoint.hf_state import load_hf, local_entries, model_shape
from r1mega.checkpoint.name_rules import to_full
from r1mega.errors import PlatformError
from r1mega.model.build import build_model, check_model, packed_seq_params
from r1mega.platform import groups
from tests.reference import (
    DEEPSEEK,
    Layout,
    ModelSettings,
    make_hf_model,
    make_reference,
    randomize,
    unfuse,
)


def forget_logged_losses() -> None:
    """Megatron's log of auxiliary losses has as many places as the first model of the process had layers."""
    try:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    except ImportError:  # 0.16
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
    else:
        destroy_moe_metrics_tracker()


@pytest.fixture(scope="module", autouse=True)
def one_process():
    groups.init_parallel(Layout(), seed=0)
    forget_logged_losses()
    yield
    groups.destroy()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    shape, parameters, result = model_shape(model), dict(model.named_parameters()), {}
    for entry, _ in local_entries([model]):
        if entry.name in parameters:
            result.update(zip(entry.hf_names, to_full([parameters[entry.name].grad], entry, shape), strict=True))
    return result


def assert_equal_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        difference = (ours[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        assert difference <= tolerance, (name, float(difference))


def loss_sum(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    return model(tokens, positions, None, labels=labels).sum()


def packed_step(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a forward and backward pass over packed sequences of several lengths."""
    lengths = torch.tensor([0, 31, 40, 103, tokens.numel()], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths.diff().tolist()])
    packed = packed_seq_params(lengths)
    losses = model(
        tokens.flatten()[None], positions[None], None, labels=labels.flatten()[None], packed_seq_params=packed
    )
    losses.sum().backward()
    return gradients(model)


PARTS = {  # a module of each part, and how many layers of DEEPSEEK (one dense, three of experts) have one
    "core_attn": ("core_attention", 4),
    "mla_up_proj": ("linear_kv_up_proj", 4),
    "layernorm": ("pre_mlp_layernorm", 4),
    "mlp": ("layers.0.mlp", 1),
    "moe": ("mlp.router", 3),
    "shared_experts": ("mlp.shared_experts", 3),
}


@pytest.mark.parametrize(
    "recompute", [*((part,) for part in PARTS), tuple(PARTS), ("layernorm", "mla_up_proj"), "full"], ids=str
)
def test_recomputation_computes_twice_and_changes_nothing(recompute):
    reference = make_reference(DEEPSEEK)
    parts = PARTS if recompute == "full" else recompute
    found, calls = {}, dict.fromkeys(parts, 0)
    for setting in ("none", recompute):
        (model,) = build_model(DEEPSEEK, Layout(), ModelSettings(recompute=setting))
        load_hf([model], reference.state)
        for part in parts if setting != "none" else ():
            modules = [module for name, module in model.named_modules() if name.endswith(PARTS[part][0])]
            assert len(modules) == PARTS[part][1]
            for module in modules:
                module.register_forward_hook(lambda *_, part=part: calls.__setitem__(part, calls[part] + 1))
        found[setting] = packed_step(model, reference.tokens, reference.labels)
    # torch's RMSNorm takes another kernel where no gradient is asked for
    assert_equal_gradients(found[recompute], found["none"], 2e-6 if "layernorm" in recompute else 0.0)
    assert all(calls[part] >= 2 * PARTS[part][1] for part in parts), calls


@pytest.mark.parametrize("recompute", [("moe", "layernorm"), "full"], ids=str)
def test_recomputation_has_the_gradients_of_transformers(recompute):
    reference = make_reference(DEEPSEEK)
    (model,) = build_model(DEEPSEEK, Layout(), ModelSettings(recompute=recompute))
    load_hf([model], reference.state)
    loss = loss_sum(model, reference.tokens, reference.labels) / reference.tokens.numel()
    loss.backward()
    assert abs(float(loss) - reference.loss) <= 1e-5
    assert_equal_gradients(gradients(model), reference.gradients)


def test_the_activation_between_grouped_products_is_not_of_a_machine_without_them():
    with pytest.raises(PlatformError, match="moe_act .* leave it out here"):
        check_model(DEEPSEEK, Layout(), ModelSettings(recompute=("layernorm", "moe_act")))


def test_sequence_auxiliary_loss_has_the_published_gradient():
    reference = make_reference(DEEPSEEK, aux_coefficient=0.5)
    plain = make_reference(DEEPSEEK)
    (model,) = build_model(DEEPSEEK, Layout(), ModelSettings(sequence_aux_loss_coefficient=0.5))
    load_hf([model], reference.state)
    loss_sum(model, reference.tokens, reference.labels).backward()  # per-token loss: divided afterwards
    ours = {n: g / reference.tokens.numel() for n, g in gradients(model).items()}
    assert_equal_gradients(ours, reference.gradients)
    router = "model.layers.2.mlp.gate.weight"  # the auxiliary loss must matter for this to say anything
    assert (reference.gradients[router] - plain.gradients[router]).abs().max() > 0.05 * ours[router].abs().max()


def test_expert_bias_moves_by_its_rate_towards_the_less_loaded():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    reference = make_reference(DEEPSEEK)
    hf = make_hf_model(DEEPSEEK)
    (model,) = build_model(DEEPSEEK, Layout(), ModelSettings(expert_bias_update_rate=0.01))
    load_hf([model], reference.state)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    loss_sum(ddp, reference.tokens, reference.labels).backward()
    finalize_model_grads([ddp], torch.tensor(reference.tokens.numel()))
    chosen: dict[int, torch.Tensor] = {}
    for i, layer in enumerate(hf.model.layers):
        if hasattr(layer.mlp, "gate"):  # transformers' own routing decisions, layer by layer
            experts = layer.mlp.experts
            experts.register_forward_pre_hook(lambda _m, inputs, i=i: chosen.__setitem__(i, inputs[1]))
    hf(input_ids=reference.tokens)
    assert sorted(chosen) == [1, 2, 3]
    for i, indices in chosen.items():
        load = torch.bincount(indices.flatten(), minlength=8).float()
        expected = hf.model.layers[i].mlp.gate.e_score_correction_bias + 0.01 * torch.sign(load.mean() - load)
        torch.testing.assert_close(model.decoder.layers[i].mlp.router.expert_bias, expected)


def test_multi_token_prediction_equals_transformers():
    """Loss gradients of L_main + 0.3 * L_mtp (DeepSeek-V3 report, section 2.2), with transformers' MTP layer."""
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

    config = DEEPSEEK | {"num_nextn_predict_layers": 1, "num_hidden_layers": 2}
    hf = make_hf_model(config)
    mtp = MtpLayer(hf.config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, layer_idx=1).eval()
    hf._init_weights(mtp.mtp_block.mlp.gate)
    for parameter in mtp.parameters():
        torch.nn.init.normal_(parameter, std=0.06)
    randomize(mtp)
    tokens = torch.randint(0, config["vocab_size"], (3, 16))
    labels = torch.roll(tokens, -1, 1)

    hidden = hf.model(input_ids=tokens).last_hidden_state
    later = hidden.shape[1] - 1  # position t sees the token t + 1 and predicts t + 2; the last one has neither
    embedded = hf.model.embed_tokens(tokens[:, 1:])
    rotary = hf.model.rotary_emb(embedded, position_ids=torch.arange(later)[None])
    mask = torch.full((later, later), -torch.inf).triu(1)[None, None]
    predicted = mtp(embedded, hidden[:, :-1], rotary, mask, None, None)
    main = torch.nn.functional.cross_entropy(hf.lm_head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    extra = torch.nn.functional.cross_entropy(
        hf.lm_head(predicted).flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    (main + 0.3 * extra).backward()

    named = lambda model, get: {n: get(p) for n, p in model.named_parameters()}  # noqa: E731
    renamed = lambda state: {  # noqa: E731
        "model.layers.2." + n.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm"): t
        for n, t in state.items()
    }
    state = unfuse(dict(hf.state_dict()) | renamed(mtp.state_dict()))
    expected = unfuse(named(hf, lambda p: p.grad) | renamed(named(mtp, lambda p: p.grad)))
    (model,) = build_model(config, Layout(), ModelSettings(mtp_loss_coefficient=0.3))
    load_hf([model], state)
    loss_sum(model, tokens, labels).backward()
    assert_equal_gradients(gradients(model), expected)


def test_a_model_with_prediction_layers_still_gives_logits():
    config = DEEPSEEK | {"num_nextn_predict_layers": 1, "num_hidden_layers": 2}
    (model,) = build_model(config, Layout(), ModelSettings(mtp_loss_coefficient=0.3), init_std=0.05)
    tokens = torch.arange(12)[None]
    assert model(tokens, tokens, None).shape == (1, 12, config["vocab_size"])
