"""One rank of the tests of names: what Transformer Engine's parameters are called, hold, and are sent as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from r1mega import platform

platform.prepare()

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import apply_factories  # noqa: E402

from r1mega.checkpoint.hf_state import export_hf, load_hf, local_entries  # noqa: E402
from r1mega.checkpoint.store import MODEL_METADATA  # noqa: E402
from r1mega.config.layout import num_experts  # noqa: E402
from r1mega.model.build import build_model  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from tests.reference import Layout, ModelSettings  # noqa: E402


def describe(directory: Path, models: dict[str, dict[str, Any]], layouts: list[Layout]) -> dict[str, dict[str, Any]]:
    """{model and layout: what its chunks are}. directory: `<model>.pt`, its weights by HF names."""
    groups.init_distributed()
    found = {}
    for layout in layouts:
        groups.init_parallel(layout, seed=0)
        for name, config in models.items():
            if layout.ep > 1 and not num_experts(config):
                continue  # nothing to spread
            state = torch.load(directory / f"{name}.pt")
            mtp = 0.3 if config.get("num_nextn_predict_layers") else 0.0
            chunks = build_model(config, layout, ModelSettings(mtp_loss_coefficient=mtp))
            load_hf(chunks, state)
            exported = dict(export_hf(chunks))
            found[f"{name} {layout}"] = {
                "different": [n for n, t in exported.items() if not torch.equal(t, state[n])],
                "missing": sorted(state.keys() - exported.keys()),
                "exported": len(exported),
                "sharded": sharded(chunks),
                "counted": counted_on_every_rank(chunks),
            }
        groups.destroy_parallel()
    groups.destroy()
    return found


def sharded(chunks: list[Any]) -> dict[str, tuple[int, ...]]:
    """{key of a tensor in a checkpoint: its whole shape}; extra states are left out."""
    template = [chunk.sharded_state_dict(metadata=dict(MODEL_METADATA)) for chunk in chunks]
    apply_factories(template)
    tensors = [item for item in nested_values(template) if isinstance(item, ShardedTensor)]
    return {item.key: tuple(item.global_shape) for item in tensors}


def counted_on_every_rank(chunks: list[Any]) -> set[str]:
    """HF names of what the gradient norm adds up over the tensor-parallel ranks."""
    counted = {
        (i, name)
        for i, chunk in enumerate(chunks) for name, parameter in chunk.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }  # fmt: skip
    return {
        hf for i, chunk in enumerate(chunks) for entry, _ in local_entries([chunk])
        if (i, entry.name) in counted for hf in entry.hf_names
    }  # fmt: skip
