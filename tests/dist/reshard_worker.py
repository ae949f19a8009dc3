"""One rank of a reshard test: a Megatron model and a vLLM engine in the same processes, every strategy, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1mega import platform
from tests.reference import Layout, ModelSettings

platform.prepare()


from r1mega.checkpoint.hf import HFTensors, read_config  # noqa: E402
from r1mega.checkpoint.hf_state import export_hf, load_hf  # noqa: E402
from r1mega.errors import WeightSyncError  # noqa: E402
from r1mega.model.build import build_model  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.platform.vllm_version import DERIVED  # noqa: E402
from r1mega.rollout.engine import EngineSettings  # noqa: E402
from r1mega.rollout.vllm_engine import VllmEngine  # noqa: E402
from r1mega.types import GenerationRequest, SamplingSettings  # noqa: E402
from r1mega.weights import direct as direct_module  # noqa: E402
from r1mega.weights import verify  # noqa: E402
from r1mega.weights.direct import DirectTransfer, local_parameters  # noqa: E402
from r1mega.weights.exchange import Exchange  # noqa: E402
from r1mega.weights.plan import GeneratorLayout  # noqa: E402
from r1mega.weights.transfer import DigestTap, checkpoint_tensors  # noqa: E402
from tests.unit.rollout.sharing import sample_together  # noqa: E402

BUCKET_BYTES = 200_000  # many buckets for models of 3 MB


@dataclass(frozen=True, slots=True)
class Case:
    """model: a directory of HF checkpoints `<model>_0`, `<model>_1`; tp, ep: of the generator; mtp: the trainer has a layer of
    multi-token prediction, of which the generator knows nothing.
    """

    model: str
    trainer: Layout
    tp: int
    dtype: str = "float32"
    ep: int = 1
    mtp: bool = False

    @property
    def name(self) -> str:
        sizes = [f"{k}{v}" for k, v in asdict(self.trainer).items() if v not in (None, 1, False)]
        return " ".join(
            [
                self.model,
                self.dtype,
                *["mtp"] * self.mtp,
                *["alone"] * self.trainer.mtp_standalone,
                *(sizes or ["dp"]),
                "to",
                f"tp{self.tp}",
                *([f"ep{self.ep}"] if self.ep > 1 else []),
            ]
        )


def generator_of(case: Case) -> tuple[str, int, int, str]:
    """Cases in which it is the same share an engine."""
    return case.model, case.tp, case.ep, case.dtype


def run_cases(directories: dict[str, tuple[Path, Path]], cases: list[Case]) -> dict[str, dict[str, Any]]:
    """{name: what was found} of every case. directories: by model, two checkpoints of one architecture."""
    groups.init_distributed()
    results = {}
    for key in dict.fromkeys(generator_of(case) for case in cases):
        model, tp, ep, dtype = key
        old, new = directories[model]
        engine = VllmEngine(EngineSettings(
            new, 64, dtype=dtype, max_num_seqs=8, kv_cache_bytes=32 << 20, tp=tp, ep=ep,
            bucket_bytes=BUCKET_BYTES))  # fmt: skip
        engine.update_weights(checkpoint_tensors(new))  # in the freshly built engine
        expected = observe(engine, lambda e, new=new: e.update_weights(checkpoint_tensors(new)))
        alone = off_alone(engine)
        if ep > tp:
            sample_together(engine)
        for case in cases:
            if generator_of(case) == key:
                groups.init_parallel(case.trainer, seed=0)
                results[case.name] = measure(case, engine, expected, old, new) | {"alone": alone}
                groups.destroy_parallel()
        engine.close()
    groups.destroy()
    return results


def observe(engine: VllmEngine, update: Any) -> dict[str, Any]:
    """The generator's plain parameters before they are packed, what is derived of them, its digest, its answers."""
    plain: dict[str, torch.Tensor] = {}
    target, finishes = engine._target, {}

    def recording(finish):
        def record(worker):
            model = worker.model_runner.model
            named = dict(model.named_parameters(remove_duplicate=False))
            before = {name: tensor for name, tensor in named.items() if not name.endswith(DERIVED)}
            plain.update({name: tensor.detach().clone() for name, tensor in before.items()})
            finish(worker)  # makes W_UV and W_UK_T of the others, and packs
            named = dict(model.named_parameters(remove_duplicate=False))
            plain.update({name: tensor.detach().clone() for name, tensor in named.items() if name.endswith(DERIVED)})

        return record

    for name in ("finish_reload", "finish_write"):
        finishes[name] = getattr(target.platform, name)
        setattr(target.platform, name, recording(finishes[name]))
    try:
        update(engine)
    finally:
        for name, finish in finishes.items():
            setattr(target.platform, name, finish)
    sampling = SamplingSettings(temperature=1.0, max_tokens=6)
    prompts = [tuple(range(3 + i, 12 + 2 * i)) for i in range(3)]
    answers = engine.generate([GenerationRequest(prompt, 2, 5, sampling) for prompt in prompts])
    return {
        "plain": plain, "digest": dict(engine.weights_digest()), "prompts": engine.prompt_log_probs(prompts),
        "answers": [[(response.token_ids, response.log_probs) for response in samples] for samples in answers],
    }  # fmt: skip


def off_alone(engine: VllmEngine) -> float:
    """How far log-probs of a response that is sampled alone, in passes over a token, are off those that it has as a prompt."""
    prompt = tuple(range(3, 12))
    ((response,),) = engine.generate([GenerationRequest(prompt, 1, 5, SamplingSettings(temperature=1.0, max_tokens=6))])
    (whole,) = engine.prompt_log_probs([(*prompt, *response.token_ids)])
    return max(abs(a - b) for a, b in zip(whole[len(prompt) - 1 :], response.log_probs, strict=True))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is not the same to the last bit."""
    wrong = [f"parameter {name}" for name in found["plain"].keys() ^ expected["plain"].keys()]
    wrong += [f"parameter {name}" for name, tensor in found["plain"].items()
              if name in expected["plain"] and not torch.equal(tensor, expected["plain"][name])]  # fmt: skip
    return wrong + [key for key in ("digest", "prompts", "answers") if found[key] != expected[key]]


def measure(case: Case, engine: VllmEngine, expected: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
    config, dtype = read_config(new), getattr(torch, case.dtype)
    if case.mtp:
        chunks = build_model(
            config | {"num_nextn_predict_layers": 1},
            case.trainer,
            ModelSettings(dtype=case.dtype, mtp_loss_coefficient=0.3),
        )
        load_hf(chunks, with_mtp(HFTensors(new), config))
    else:
        chunks = build_model(config, case.trainer, ModelSettings(dtype=case.dtype))
        load_hf(chunks, HFTensors(new))
    direct = DirectTransfer(
        lambda: chunks, engine, config, GeneratorLayout(dist.get_world_size(), case.tp, case.ep), model_dtype=dtype,
        bucket_bytes=BUCKET_BYTES)  # fmt: skip
    result: dict[str, Any] = {"bytes": direct.exchange.num_bytes}

    def push_direct(engine: VllmEngine) -> None:
        direct.push()
        verify.compare_digests(direct.digest(), engine.weights_digest())

    def push_gathered(engine: VllmEngine) -> None:
        tap = DigestTap(dtype, config)
        engine.update_weights(tap(export_hf(chunks)))
        verify.compare_digests(tap.digest, engine.weights_digest())
        result["senders_agree"] = tap.digest == direct.digest()

    for name, push in (("direct", push_direct), ("gather", push_gathered), ("direct again", push_direct)):
        engine.update_weights(checkpoint_tensors(old))
        result[name] = differences(observe(engine, push), expected)
    result["digested"] = digested_bytes(direct)
    result["moved meanwhile"] = caught_moved(direct, engine, chunks)
    result["stale"] = caught(direct, engine, lambda: engine.update_weights(checkpoint_tensors(old)))
    result["corrupted"] = caught_corruption(direct, engine, old)
    return result


def with_mtp(tensors: Mapping[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A layer of multi-token prediction beside them, made of the last layer's tensors."""
    layers, size = config["num_hidden_layers"], config["hidden_size"]
    last, further = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    found = dict(tensors) | {further + n.removeprefix(last): tensors[n] for n in tensors if n.startswith(last)}
    found |= {f"{further}{name}.weight": torch.ones(size) for name in ("enorm", "hnorm", "shared_head.norm")}
    return found | {f"{further}eh_proj.weight": torch.ones(size, 2 * size)}


def digested_bytes(direct: DirectTransfer) -> list[int]:
    """What this rank looks at for the trainer's digest: of new weights, and of the same again."""
    counts = []
    real = direct_module.tensor_digest
    for again in (False, True):
        looked_at: list[int] = []

        def counting(tensor: torch.Tensor, region: Any, looked_at: list[int] = looked_at) -> int:
            looked_at.append(tensor.nbytes)
            return real(tensor, region)

        direct_module.tensor_digest = counting
        try:
            direct.digest(again=again)
        finally:
            direct_module.tensor_digest = real
        counts.append(sum(looked_at))
    return counts


def caught_moved(direct: DirectTransfer, engine: VllmEngine, chunks: Any) -> str:
    """The message of the proof where weights that are said to be the same are not."""
    moved = next(iter(local_parameters(chunks).values())).data
    before = moved.clone()
    moved.add_(1.0)
    try:
        return caught(direct, engine, direct.push, again=True)
    finally:
        moved.copy_(before)


def caught(direct: DirectTransfer, engine: VllmEngine, update: Any, *, again: bool = False) -> str:
    """The message of the proof that fails; empty when it does not."""
    update()
    try:
        verify.compare_digests(direct.digest(again=again), engine.weights_digest())
    except WeightSyncError as error:
        return str(error)
    return ""


def caught_corruption(direct: DirectTransfer, engine: VllmEngine, old: Path) -> dict[str, tuple[str, str]]:
    """{fault: (tensor that was hit on this rank, message of the proof)}. Faults are rank 0's."""
    rank, overlaps = dist.get_rank(), direct.plan.copies(dist.get_rank())
    hit = [c.overlap for c in overlaps if c.target == rank and "_proj.weight" in c.overlap.name][-1]
    region = tuple(slice(start, stop) for start, stop in hit.target)

    def altered(change):
        with engine.parameters_for_writing() as parameters:
            direct.write(parameters)
            if rank == 0:
                change(parameters[hit.target_parameter].data[region])

    def flip(part):
        flat = part.reshape(-1)[:1].clone()
        flat.view(torch.int8)[0] ^= 1
        part[(0,) * part.dim()] = flat[0]

    faults = {"one bit": flip, "rows moved": lambda part: part.copy_(part.roll(1, -1).clone())}
    found = {}
    for name, change in faults.items():
        found[name] = (hit.name, caught(direct, engine, lambda change=change: altered(change)))
    engine.update_weights(checkpoint_tensors(old))  # what is not written shall not be right by chance
    unpack = Exchange.__dict__["_unpack"]
    received = direct.exchange.num_bytes[1] > 0
    try:
        Exchange._unpack = staticmethod(lambda way, index, bucket, _: list(way.received(index, bucket.receives)))
        found["nothing unpacked"] = ("" if not received else "weight", caught(direct, engine, direct.push))
    finally:
        Exchange._unpack = unpack
    return found
