"""Megatron's distributed optimizer on this platform: it continues a run bit by bit from what r1mega saves, and from its own."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from r1mega import platform

pytestmark = pytest.mark.heavy

platform.prepare()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from r1mega.checkpoint.hf_state import load_hf  # noqa: E402
from r1mega.checkpoint.store import MODEL_METADATA  # noqa: E402
from r1mega.model.build import build_model  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.train.optimizer import SHARDING_METADATA, shard_state  # noqa: E402
from tests.reference import DEEPSEEK, Layout, ModelSettings, Reference, make_reference  # noqa: E402

METADATA = SHARDING_METADATA | MODEL_METADATA
EARLIER = METADATA | {"distrib_optim_fully_reshardable_mem_efficient": False}
"""What checkpoints were written with that Megatron's own gathering made."""


@pytest.fixture(scope="module", autouse=True)
def one_process():
    groups.init_parallel(Layout(), seed=0)
    yield
    groups.destroy()


class Run:
    """A model in training: the parts of Megatron that a checkpoint must bring back."""

    def __init__(self, dtype: str, reference: Reference | None, metadata: dict):
        self.metadata = metadata
        settings = ModelSettings(dtype=dtype, expert_bias_update_rate=1e-3)
        (self.model,) = build_model(DEEPSEEK, Layout(), settings, init_std=None if reference else 0.01)
        wide = dtype == "float32"
        wrapped = self.model if wide else Float16Module(self.model.config, self.model)
        config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.ddp = DistributedDataParallel(self.model.config, config, wrapped)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                weight_decay=0.01,
                bf16=not wide,
                params_dtype=getattr(torch, dtype),
                use_distributed_optimizer=True,
                clip_grad=1.0,
            ),
            [self.ddp],
            use_gloo_process_groups=True,
        )
        if metadata is METADATA:
            for part in self.optimizer.chained_optimizers:
                part.sharded_param_state_fully_reshardable = functools.partial(shard_state, part)
        if reference:
            load_hf([self.ddp], reference.state)
            self.optimizer.reload_model_params()

    def step(self, reference: Reference) -> float:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        positions = torch.arange(reference.tokens.shape[1])[None].expand_as(reference.tokens)
        loss = self.ddp(reference.tokens, positions, None, labels=reference.labels).sum()
        self.optimizer.scale_loss(loss).backward()
        finalize_model_grads([self.ddp], torch.tensor(reference.tokens.numel()))
        self.optimizer.step()
        return float(loss)

    def state(self, *, is_loading: bool) -> dict:
        model = self.model.sharded_state_dict(metadata=dict(self.metadata))
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(self.metadata))
        return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize(("dtype", "saved"), [("float32", METADATA), ("bfloat16", METADATA), ("bfloat16", EARLIER)])
def test_a_restored_run_continues_bitwise(tmp_path: Path, dtype, saved):
    reference = make_reference(DEEPSEEK)
    whole = Run(dtype, reference, saved)
    first = [whole.step(reference) for _ in range(2)]
    dist_checkpointing.save(whole.state(is_loading=False), str(tmp_path), content_metadata=dict(saved))
    after = [whole.step(reference) for _ in range(2)]
    assert first[0] > first[1] > after[1]  # it learns, so that equal losses say something

    restored = Run(
        dtype, None, dict(METADATA)
    )  # with Megatron's own loading; r1mega's: tests/dist/test_optimizer_state.py
    state = dist_checkpointing.load(restored.state(is_loading=True), str(tmp_path))
    restored.model.load_state_dict(state["model"])
    restored.optimizer.load_state_dict(state["optimizer"])
    assert [restored.step(reference) for _ in range(2)] == after
    theirs = dict(restored.model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in whole.model.named_parameters())
    biases = [dict(r.model.named_buffers())["decoder.layers.2.mlp.router.expert_bias"] for r in (whole, restored)]
    assert torch.equal(*biases)
