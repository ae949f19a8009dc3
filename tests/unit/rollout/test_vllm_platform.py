"""The environment and the patches that vLLM gets on a CPU."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.distributed as dist

from r1mega.errors import PlatformError
from r1mega.platform import groups, vllm_cpu, vllm_cpu_patches, vllm_cuda, vllm_import
from tests.dist.launch import launch

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "1"),
        ("VLLM_CPU_OMP_THREADS_BIND", "0-1"),
        ("VLLM_CPU_KVCACHE_SPACE", "4"),
    ],
)
def test_an_environment_that_cannot_work_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(PlatformError, match=name):
        vllm_cpu.prepare_environment()


def test_queries_that_each_rank_holds_more_of_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setenv("VLLM_DCP_Q_REPLICATE", "1")
    with pytest.raises(PlatformError, match="VLLM_DCP_Q_REPLICATE"):
        vllm_cuda.prepare_environment()


def test_values_of_the_user_are_kept(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    vllm_cpu.prepare_environment()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO" and os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert torch._dynamo.config.disable


def test_what_is_hidden_is_not_there_meanwhile_only(monkeypatch):
    """That vLLM is imported without what it can do without, tests/fork_server.py holds."""
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with vllm_import.hidden("colorsys", "json"):
        assert sys.modules["json"] is json
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("colorsys")
    assert importlib.import_module("colorsys").rgb_to_hls


def test_what_is_stood_in_for_can_be_imported_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    monkeypatch.setattr(vllm_import, "STOOD_IN_FOR", {"colorsys": ("rgb_to_hls",), "json": ("loads",)})
    with vllm_import.stood_in_for():
        assert sys.modules["json"] is json
        assert isinstance(importlib.import_module("colorsys").rgb_to_hls, type)
    assert importlib.import_module("colorsys").rgb_to_hls(0, 0, 0) == (0, 0, 0)


def test_scikit_learn_finds_scipy_while_vllm_is_imported(tmp_path):
    """transformers imports it where it is installed; and what needs scipy later finds it."""
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn/__init__.py").touch()
    (tmp_path / "sklearn/metrics.py").write_text("import scipy.optimize\nroc_curve = scipy.optimize.minimize\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); from r1mega.platform import vllm_cpu; vllm_cpu.prepare_environment()\n"
        "from transformers.utils import is_scipy_available\n"
        "assert 'sklearn.metrics' in sys.modules and is_scipy_available() and not sys.modules.get('torch._inductor.lowering')"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def rotary():
    """vLLM's rotary embedding of 64 dimensions as MLA uses it (interleaved pairs), patched."""
    vllm_cpu.prepare_environment()
    groups.init_distributed()
    vllm_cpu.apply_patches()
    vllm_cpu.apply_patches()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    with set_current_vllm_config(VllmConfig()):
        yield RotaryEmbedding(64, 64, 128, 10000.0, False, torch.float32)
    groups.destroy()


def rotated(vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, 64] float64, each pair (2i, 2i + 1) turned by position / 10000^(2i / 64)."""
    angles = positions[:, None].double() / 10000.0 ** (torch.arange(0, 64, 2).double() / 64)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(vectors.double().unflatten(-1, (32, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def test_rotary_embedding_of_strided_heads(rotary):
    """A view of the last 64 of 96 dimensions, [tokens, heads, 64]: what the unpatched kernel rotates wrongly."""
    positions = torch.tensor([0, 5, 17, 3])
    whole, shared = torch.randn(4, 3, 96), torch.randn(4, 1, 64)
    query, key = rotary.forward_cpu(positions, whole[..., 32:], shared.clone())
    assert torch.allclose(query.double(), rotated(whole[..., 32:], positions), atol=1e-5)
    assert torch.allclose(key.double(), rotated(shared, positions), atol=1e-5)
    unpatched = type(rotary).forward_cpu.__closure__
    (original,) = [cell.cell_contents for cell in unpatched if callable(cell.cell_contents)]
    query, _ = original(rotary, positions, whole[..., 32:].clone(memory_format=torch.preserve_format), shared.clone())
    assert not torch.allclose(query.double(), rotated(whole[..., 32:], positions), atol=1e-2), "drop the patch"


def rows_of(rank: int) -> torch.Tensor:
    """[6, 257], all rows the same."""
    return torch.randn(257, generator=torch.Generator().manual_seed(rank)).repeat(6, 1)


def sum_of_rows() -> tuple[list, list]:
    groups.init_distributed()
    rank, sizes = dist.get_rank(), [1, 3, 2]
    here = SimpleNamespace(world_size=3, rank_in_group=rank, device_group=dist.group.WORLD)
    mine = vllm_cpu_patches.reduce_scatterv(here, rows_of(rank), 0, sizes)
    return mine.tolist(), vllm_cpu_patches.all_gatherv(here, [mine], 0, sizes)[0].tolist()


def test_a_tokens_sum_over_experts_does_not_depend_on_its_row():
    """Of three ranks: two addends have one order."""
    expected = functools.reduce(torch.add, map(rows_of, range(3)))
    for (mine, everyone), size in zip(launch(sum_of_rows, 3), (1, 3, 2), strict=True):
        assert mine == expected[:size].tolist() and everyone == expected.tolist()


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_rows_draw_what_they_draw_without_the_patch(rotary, mode):
    """Tokens, log-probs and the generators' states after, with rows that have none among them."""
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    sampler = TopKTopPSampler(mode)
    cells = [cell.cell_contents for cell in TopKTopPSampler.forward_cpu.__closure__]
    (original,) = [content for content in cells if getattr(content, "__name__", "") == "forward_cpu"]
    top_k = torch.tensor([50, 3, 50, 7, 50, 50, 1])

    def drawn(draw):
        torch.manual_seed(3)
        generators = {row: torch.Generator().manual_seed((row << 40) + 11) for row in (0, 1, 3, 6)}
        logits = torch.randn(7, 50)
        turns = [draw(logits.clone(), generators, k, None) for k in (None, top_k, None)]
        return turns, [generator.get_state() for generator in generators.values()], torch.get_rng_state()

    torch.testing.assert_close(drawn(sampler.forward_cpu), drawn(functools.partial(original, sampler)), rtol=0, atol=0)


def test_a_prefix_cache_forgets_all_that_it_knew(rotary):
    """Blocks with a hash, used and given back in any order; and none while one is in use."""
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(40, True, 16)
    blocks = list(pool.blocks)
    taken = pool.get_new_blocks(9)
    for number, block in enumerate(taken):
        name = bytes([number])
        block.set_block_hash(name)
        pool.cached_block_hash_to_block.insert(name, block)
    assert not pool.reset_prefix_cache() and all(block.block_hash for block in taken)
    pool.free_blocks(taken)
    assert pool.reset_prefix_cache()
    assert pool.blocks == blocks and not any(block.block_hash for block in blocks)
    assert all(pool.cached_block_hash_to_block.get_one_block(bytes([number])) is None for number in range(9))
    assert pool.get_num_free_blocks() == 39
