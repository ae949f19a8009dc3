"""How often the probe of a weight transfer stops a healthy run, and how often it finds wrong weights.

    python tools/probe_error_rates.py runs/nano/base/hf [--dtype bfloat16] [--fp8 blockwise] [--tolerances 0.1 0.2 0.4]

A Megatron policy and a vLLM engine hold the weights of an HF directory of DeepSeek-V3's form. Faults are planted in the
engine alone, one after the other; what both compute on made-up sequences is judged on many draws of as many sequences
as a push probes, by the limit that a push has and by others. Prints how far the healthy pair is apart and a table; nothing
is written. One process, minutes on a CPU for the nano base. --fp8 needs Transformer Engine; over the tests' stand-in:

    python -m tests.te.measure_probe runs/nano/base/hf --fp8 blockwise
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from r1mega import platform

platform.prepare()

from r1mega.checkpoint.hf import HFTensors, read_config  # noqa: E402
from r1mega.config.schema import Dtype, Fp8, ModelConfig, ParallelConfig  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.rollout.engine import EngineSettings  # noqa: E402
from r1mega.rollout.vllm_engine import VllmEngine  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.types import GenerationRequest, SamplingSettings  # noqa: E402
from r1mega.weights.verify import NUM_SEQUENCES, ProbeLimit, made_up_sequences, probe_limit  # noqa: E402

LENGTH, DECODED = 32, 4  # tokens a sequence, and how many of them are decoded, as a push has it
STEP = 1e-5  # of Adam, about its learning rate
CUT_BY_ROWS = ("q_b_proj.weight", "q_proj.weight", "kv_b_proj.weight", "gate_proj.weight", "up_proj.weight")
CUT_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Distances:
    """Of one sequence: how far log-probs are apart, in nats (below `beyond` nats: in proportion, as ProbeLimit allows it)."""

    prompt: list[float]
    decoded: list[float]


class Pair:
    """The policy's log-probs of the sequences, and an engine to compare with them."""

    def __init__(self, directory: Path, dtype: Dtype, fp8: Fp8, count: int):
        config = read_config(directory)
        model = ModelConfig(path=directory, dtype=dtype, fp8=fp8)
        policy = Policy(model, config, ParallelConfig(), seed=0)
        policy.load_hf(HFTensors(directory))
        self.weights: Weights = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
        self.probed = NUM_SEQUENCES[policy.dtype]
        self.sequences = made_up_sequences([LENGTH] * count, config["vocab_size"], seed=0)
        self.expected = []
        for start in range(0, count, self.probed):  # as a push packs them: scales of FP8 may be of all that is packed
            part = self.sequences[start : start + self.probed]
            self.expected += policy.sequence_log_probs(part)
        self.engine = VllmEngine(
            EngineSettings(directory, 2 * LENGTH, dtype=dtype, max_num_seqs=64, kv_cache_bytes=64 << 20)
        )
        self.limit = probe_limit(policy.dtype, fp8=policy.fp8)

    def distances(self) -> list[Distances]:
        """Of each sequence; what is decoded is compared with the generator's own prompt path, as a push does."""
        prompts = [tuple(sequence[:-DECODED]) for sequence in self.sequences]
        sampling = SamplingSettings(temperature=0.0, max_tokens=DECODED)
        decoded = [r[0] for r in self.engine.generate([GenerationRequest(p, 1, 0, sampling) for p in prompts])]
        again = self.engine.prompt_log_probs([(*p, *r.token_ids) for p, r in zip(prompts, decoded, strict=True)])
        found = self.engine.prompt_log_probs(self.sequences)
        return [
            Distances(self._apart(ours, theirs), self._apart(values[len(prompt) - 1 :], response.log_probs))
            for ours, theirs, prompt, response, values in zip(
                self.expected, found, prompts, decoded, again, strict=True
            )
        ]

    def _apart(self, reference: Sequence[float], found: Sequence[float]) -> list[float]:
        unit = dataclasses.replace(self.limit, tolerance=1.0)
        scaled = (abs(a - b) / unit.allowed(a) for a, b in zip(reference, found, strict=True))
        return [distance if math.isfinite(distance) else math.inf for distance in scaled]


def faults(pair: Pair) -> Iterator[tuple[str, Callable[[Weights], None]]]:
    """(name, what it does to the weights that are sent)."""
    config = pair.engine.config
    last = config["num_hidden_layers"] - 1
    generator = torch.Generator().manual_seed(0)

    def exchange(kinds: tuple[str, ...], a: int, b: int) -> Callable[[Weights], None]:
        def change(weights: Weights) -> None:
            for kind in kinds:
                one, other = (f"model.layers.{last}.mlp.experts.{e}.{kind}_proj.weight" for e in (a, b))
                weights[one], weights[other] = weights[other], weights[one]

        return change

    def redraw(prefix: str, end: str) -> Callable[[Weights], None]:
        def change(weights: Weights) -> None:
            for name, tensor in weights.items():
                if name.startswith(prefix) and name.endswith(end):
                    drawn = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
                    weights[name] = drawn.to(tensor.dtype)

        return change

    def redraw_shard(prefix: str, end: str) -> Callable[[Weights], None]:
        """The second of two tensor-parallel shards: columns where a product sums over ranks, else rows."""

        def change(weights: Weights) -> None:
            for name, tensor in weights.items():
                cut = name.endswith(CUT_BY_ROWS) or name.endswith(CUT_BY_COLUMNS)
                if cut and name.startswith(prefix) and name.endswith(end):
                    weights[name] = mixed = tensor.clone()
                    part = mixed.chunk(2, dim=1 if name.endswith(CUT_BY_COLUMNS) else 0)[1]
                    part.copy_(torch.randn(part.shape, generator=generator) * tensor.float().std())

        return change

    def older(weights: Weights) -> None:
        for name, tensor in weights.items():
            if tensor.dim() == 2:
                moved = tensor.float() + STEP * torch.randint(0, 2, tensor.shape, generator=generator).mul(2).sub(1)
                weights[name] = moved.to(tensor.dtype)

    for a, b in ((0, 1), (2, 5), (3, 7)):
        yield f"experts {a} and {b} of layer {last} exchanged", exchange(("gate", "up", "down"), a, b)
    yield f"up_proj of experts 0 and 1 of layer {last} exchanged", exchange(("up",), 0, 1)
    for layer in range(last + 1):
        yield f"layer {layer} never written", redraw(f"model.layers.{layer}.", "proj.weight")
        yield f"o_proj of layer {layer} of another model", redraw(f"model.layers.{layer}.", "o_proj.weight")
    for layer in range(last + 1):
        yield f"half of layer {layer} (a shard of tp 2) never written", redraw_shard(f"model.layers.{layer}.", "")
        yield f"half of o_proj of layer {layer} never written", redraw_shard(f"model.layers.{layer}.", "o_proj.weight")
    yield f"all matrices older by a step of {STEP:g}", older


def stale_matrices(pair: Pair) -> Iterator[str]:
    """Names of faults, each planted while it is held; in what vLLM derives for decoding."""
    generator = torch.Generator().manual_seed(1)
    for layer, module in enumerate(pair.engine._worker.model_runner.model.model.layers):
        for kind in ("W_UV", "W_UK_T"):
            held = getattr(module.self_attn.mla_attn.mla_attn, kind).data
            right = held.clone()
            held.copy_(torch.randn(held.shape, generator=generator).mul(right.float().std()))
            yield f"{kind} of layer {layer} of another model"
            held.copy_(right)


def judge(name: str, pair: Pair, limits: list[ProbeLimit], draws: int) -> list[Distances]:
    """Print a row: how many log-probs are beyond the first limit, and how many draws each of the limits refuses."""
    distances, chooser = pair.distances(), random.Random(0)
    chosen = [chooser.sample(range(len(distances)), min(pair.probed, len(distances))) for _ in range(draws)]
    cells: list[str] = []
    for limit in limits:
        tolerances = (limit.tolerance, limit.of_decoding().tolerance)
        beyond = [[torch.tensor(part).gt(bound).float().mean().item() for part, bound in zip((d.prompt, d.decoded), tolerances, strict=True)]
                  for d in distances]  # fmt: skip
        shares = torch.tensor([[beyond[i] for i in draw] for draw in chosen]).mean(dim=1)  # [draws, 2]
        if not cells:
            means = torch.tensor(beyond).mean(dim=0)
            cells = [f"{mean:.3f} ({most:.3f})" for mean, most in zip(means, shares.max(dim=0).values, strict=True)]
        cells.append(f"{(shares > 1 - limit.share + 1e-6).any(dim=1).float().mean():.1%}")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return distances


def print_quantiles(distances: list[Distances]) -> None:
    for what, values in (("prompt", [d.prompt for d in distances]), ("decoded", [d.decoded for d in distances])):
        flat = torch.tensor(values).flatten()
        print(f"{what}: " + ", ".join(f"{q:g}: {torch.quantile(flat, q):.3f}" for q in (0.5, 0.9, 0.95, 0.99, 1.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--fp8", default="off", choices=["off", "tensorwise", "blockwise"])
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--tolerances", type=float, nargs="*", default=[], help="in nats, besides that of a push")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    groups.init_parallel(ParallelConfig(), seed=0)
    pair = Pair(arguments.directory, arguments.dtype, arguments.fp8, arguments.sequences)
    limits = [pair.limit, *(dataclasses.replace(pair.limit, tolerance=tolerance) for tolerance in arguments.tolerances)]
    heads = [f"refused at {limit.tolerance:g}" for limit in limits]
    print("| weights of the generator | beyond, of a prompt (largest draw) | decoded | " + " | ".join(heads) + " |")
    print("|---|---|---" + "|---" * len(limits) + "|")
    pair.engine.update_weights(pair.weights.items())
    healthy = judge("those of the policy", pair, limits, arguments.draws)
    for name, change in faults(pair):
        weights = dict(pair.weights)
        change(weights)
        pair.engine.update_weights(weights.items())
        judge(name, pair, limits, arguments.draws)
    pair.engine.update_weights(pair.weights.items())
    for name in stale_matrices(pair):
        judge(name, pair, limits, arguments.draws)
    print("\nhealthy pair, quantiles of the distance in nats")
    print_quantiles(healthy)
    pair.engine.close()
    groups.destroy()


if __name__ == "__main__":
    main()
