"""A direct push of a Megatron model into an FP8 generator's parameters: without the generator, and into vLLM's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from r1mega import platform
from r1mega.config.schema import ModelConfig, ParallelConfig
from tests.reference import DEEPSEEK
from tests.release import release_models

platform.prepare()

from r1mega.checkpoint.hf_state import export_hf  # noqa: E402
from r1mega.model.build import build_model  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.weights import verify  # noqa: E402
from r1mega.weights.digest import generator_digest  # noqa: E402
from r1mega.weights.direct import DirectTransfer  # noqa: E402
from r1mega.weights.layout import divided_names, generator_layout, weight_dtype  # noqa: E402
from r1mega.weights.plan import GeneratorLayout  # noqa: E402
from r1mega.weights.transfer import DigestTap, sum_digests  # noqa: E402

CONFIG = DEEPSEEK | {
    "hidden_size": 192, "intermediate_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 2, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip

OF_VLLM = CONFIG | {"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512}
"""What vLLM's attention on a CPU exists for."""


class Parameters:
    """A generator's rank: room for what its layout has, and nothing that computes."""

    def __init__(self, layout: GeneratorLayout):
        place = layout.place(dist.get_rank())
        self.placements = generator_layout(CONFIG, place)
        self.divided = divided_names(CONFIG, place)
        self.held: dict[str, torch.Tensor] = {}
        for one in self.placements:
            stops = [stop for _, stop in one.target]
            before = self.held.get(one.parameter)
            extent = stops if before is None else [max(pair) for pair in zip(stops, before.shape, strict=True)]
            self.held[one.parameter] = torch.zeros(extent, dtype=weight_dtype(one.name, torch.bfloat16, True))

    @contextlib.contextmanager
    def parameters_for_writing(self) -> Iterator[Mapping[str, torch.Tensor]]:
        yield self.held

    def digest(self, group: dist.ProcessGroup | None) -> dict[str, int]:
        """group: of the generator's ranks."""
        partial = generator_digest(self.placements, self.held)
        return sum_digests(partial, self.divided, lambda values: dist.all_reduce(values, group=group))


def run(cases: list[tuple[dict[str, Any], int, int]]) -> list[list[str]]:
    """For each trainer's layout, and tp and ep of the generator: the tensors that differ on the way."""
    groups.init_distributed()
    found = []
    for layout, tp, ep in cases:
        parallel = ParallelConfig(**layout)
        groups.init_parallel(parallel, seed=0)
        chunks = build_model(CONFIG, parallel, ModelConfig(path="unused", dtype="bfloat16"), seed=1, init_std=0.3)
        generator = GeneratorLayout(dist.get_world_size(), tp, ep, fp8=True)
        engine: Any = Parameters(generator)
        transfer = DirectTransfer(
            lambda chunks=chunks: chunks, engine, CONFIG, generator, model_dtype=torch.bfloat16, bucket_bytes=1 << 17
        )  # fmt: skip
        for _ in range(2):
            transfer.push()
        tap = DigestTap(torch.bfloat16, CONFIG, fp8=True)
        for _ in tap(export_hf(chunks)):
            pass
        group = dist.new_subgroups(tp)[0] if tp > 1 else None
        arrived = engine.digest(group) if group is not None else generator_digest(engine.placements, engine.held)
        sent, whole = transfer.digest(), tap.digest
        names = sent.keys() | whole.keys() | arrived.keys()
        found.append([name for name in sorted(names) if not sent.get(name) == whole.get(name) == arrived.get(name)])
        groups.destroy_parallel()
        release_models()
    groups.destroy()
    return found


def run_in_vllm(directory: Path, cases: list[tuple[dict[str, Any], int]]) -> list[list[str]]:
    """For each trainer's layout and ep of a generator over all ranks: vLLM's parameters (scales, decoding matrices) of this rank
    that a push leaves in other bits than vLLM's own loaders do, given the exported checkpoint in its published form.
    """
    from r1mega.rollout.engine import EngineSettings
    from r1mega.rollout.vllm_engine import VllmEngine
    from tests.unit.rollout import cuda_on_cpu

    groups.init_distributed()
    ranks, found = dist.get_world_size(), []
    for layout, ep in cases:
        parallel = ParallelConfig(**layout)
        groups.init_parallel(parallel, seed=0)
        chunks = build_model(OF_VLLM, parallel, ModelConfig(path="unused", dtype="bfloat16"), seed=1, init_std=0.3)
        with pytest.MonkeyPatch.context() as patch:
            allocator = cuda_on_cpu.install_fp8(patch)
            engine = VllmEngine(EngineSettings(
                directory, 128, max_num_seqs=8, kv_cache_bytes=32 << 20, tp=ranks, ep=ep, dtype="bfloat16",
                quantization="fp8", weights="empty",
            ))  # fmt: skip
            transfer = DirectTransfer(
                lambda chunks=chunks: chunks, engine, OF_VLLM, GeneratorLayout(ranks, ranks, ep, fp8=True),
                model_dtype=torch.bfloat16, bucket_bytes=1 << 18,
            )  # fmt: skip
            tap = DigestTap(torch.bfloat16, OF_VLLM, fp8=True)
            states = []
            for push in (lambda: engine.update_weights(tap(export_hf(chunks))), transfer.push):  # noqa: B023
                engine.sleep(keep_weights=False)
                push()
                engine.wake_up()
                verify.compare_digests(tap.digest, engine.weights_digest())
                states.append(_bits(engine))
            model = engine._worker.model_runner.get_model()
            lost = [name for name in allocator.unwritten(model) if not name.endswith("_scale_cpu")]
            engine.close()
        loaded, pushed = states
        kinds = {name.rpartition(".")[2] for name in loaded}
        assert kinds >= {"weight_scale_inv", "w13_weight_scale_inv", "w2_weight_scale_inv", "W_UV", "W_UK_T"}
        found.append([*lost, *(name for name in loaded if loaded[name] != pushed[name])])
        groups.destroy_parallel()
        release_models()
    groups.destroy()
    return found


def _bits(engine: Any) -> dict[str, bytes]:
    named = engine._worker.model_runner.get_model().named_parameters(remove_duplicate=False)
    return {name: value.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, value in named}
