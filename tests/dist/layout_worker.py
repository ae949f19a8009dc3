"""One rank of a layout test: the policy's own way through Megatron's schedules, compared with transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1mega import platform
from tests.reference import Layout, ModelSettings, Reference
from tests.release import release_models  # noqa: E402

platform.prepare()

from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # noqa: E402
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy  # noqa: E402

from r1mega.checkpoint.hf_state import coordinates, export_hf, load_hf, local_entries, model_shape  # noqa: E402
from r1mega.checkpoint.name_rules import to_local  # noqa: E402
from r1mega.model.build import build_model, packed_seq_params  # noqa: E402
from r1mega.model.context_parallel import zigzag_rows  # noqa: E402
from r1mega.platform import groups  # noqa: E402


@dataclass(frozen=True, slots=True)
class Case:
    """A model (the name of a reference) in a layout; packed: two sequences to a microbatch, thd."""

    model: str
    layout: Layout
    packed: bool = False

    @property
    def name(self) -> str:
        sizes = [f"{k}{v}" for k, v in asdict(self.layout).items() if v not in (None, 1)]
        return " ".join([self.model, *(sizes or ["dp"]), *(["packed"] if self.packed else [])])


def run_layouts(directory: Path, cases: list[Case]) -> dict[str, dict[str, Any]]:
    """{name: measured differences} of every case, one after the other in this process."""
    groups.init_distributed()
    results = {}
    for case in cases:
        reference = torch.load(directory / f"{case.model}.pt", weights_only=False)
        groups.init_parallel(case.layout, seed=0)
        results[case.name] = measure(reference, case.layout, case.packed)
        groups.destroy_parallel()
        release_models()
    groups.destroy()
    return results


def measure(reference: Reference, layout: Layout, packed: bool) -> dict[str, Any]:
    """Largest relative differences of logits, loss and gradients on this rank; whether the export is bit-exact."""
    settings = ModelSettings(sequence_aux_loss_coefficient=reference.aux_coefficient)
    chunks = build_model(reference.config, layout, settings)
    load_hf(chunks, reference.state)
    config = chunks[0].config
    ddp = [DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), c) for c in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    replicas, replica = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    mine = range(reference.tokens.shape[0])[replica::replicas]
    size = 2 if packed else 1
    rows = [list(mine[i : i + size]) for i in range(0, len(mine), size)]
    differences: dict[str, Any] = {"logits": 0.0}
    vocabulary = reference.config["vocab_size"]

    def forward_step(iterator: Any, model: torch.nn.Module) -> Any:
        sequences = next(iterator)
        length = reference.tokens.shape[1]
        bounds = torch.arange(len(sequences) + 1, dtype=torch.int32) * length
        local = zigzag_rows(bounds, layout.cp, ps.get_context_parallel_rank())
        flat = [reference.tokens[sequences].flatten(), reference.labels[sequences].flatten()]
        tokens, labels = (t[local][None] for t in flat)
        positions = (torch.arange(len(sequences) * length) % length)[local][None]
        extra = {"packed_seq_params": packed_seq_params(bounds)} if packed else {}
        output = model(tokens, positions, None, **extra)

        def loss(logits: torch.Tensor) -> Any:
            full = gather_from_tensor_model_parallel_region(logits.detach().clone())[0, :, :vocabulary]
            expected = reference.logits[sequences].flatten(0, 1)[local]
            difference = float((full - expected).abs().max() / reference.logits.abs().max())
            differences["logits"] = max(differences["logits"], difference)
            values = vocab_parallel_cross_entropy(logits.transpose(0, 1).contiguous(), labels.T.contiguous())
            return values.sum(), torch.tensor(values.numel(), dtype=torch.int), {"loss": float(values.detach().sum())}

        return output, loss

    iterators = [iter(rows) for _ in ddp]
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(ddp) > 1 else iterators[0],
        model=ddp if len(ddp) > 1 else ddp[0],
        num_microbatches=len(rows),
        seq_length=reference.tokens.shape[1] * len(rows[0]),
        micro_batch_size=1,
        forward_only=False,
    )
    if ps.is_pipeline_last_stage():
        total = torch.tensor([sum(r["loss"] for r in results)])
        dist.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
        differences["loss"] = abs(float(total) / reference.tokens.numel() - reference.loss)
    differences["gradients"], differences["worst"] = gradient_difference(chunks, reference)
    exported = dict(export_hf(chunks))
    differences["export_names"] = sorted(exported.keys() ^ reference.state.keys())
    differences["export_exact"] = all(torch.equal(exported[n], t) for n, t in reference.state.items() if n in exported)
    return differences


def gradient_difference(chunks: list[Any], reference: Reference) -> tuple[float, str]:
    """The largest relative difference of a local gradient from its part of transformers' gradient, and its name."""
    place, worst = coordinates(), (0.0, "")
    for chunk in chunks:
        shape = model_shape(chunk)
        parameters = dict(chunk.named_parameters())
        for entry, _ in local_entries([chunk]):
            if entry.name not in parameters:
                continue
            rank, ranks = (place.etp_rank, place.etp) if entry.expert is not None else (place.tp_rank, place.tp)
            parts = [reference.gradients[n] for n in entry.hf_names]
            expected = to_local(parts, entry, shape, rank, ranks)
            difference = (parameters[entry.name].main_grad - expected).abs().max()
            worst = max(worst, (float(difference / expected.abs().max().clamp(min=1e-9)), entry.name))
    return worst
