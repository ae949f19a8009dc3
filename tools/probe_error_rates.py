"""How often the probe of a weight transfer stops a healthy run, and how often it finds wrong weights.

    python tools/probe_error_rates.py runs/nano/base/hf [--dtype bfloat16] [--sequences 48] [--draws 2000]

A Megatron policy and a vLLM engine hold the weights of an HF directory of DeepSeek-V3's form. Faults are planted in the
engine alone, one after the other; what both compute on made-up sequences is judged on many draws of as many sequences
as a push probes. Prints a table; nothing is written. One process, a minute on a CPU for the nano base.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from r1mega import platform

platform.prepare()

from r1mega.checkpoint.hf import HFTensors, read_config  # noqa: E402
from r1mega.config.schema import ModelConfig, ParallelConfig  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.rollout.engine import EngineSettings  # noqa: E402
from r1mega.rollout.vllm_engine import VllmEngine  # noqa: E402
from r1mega.train.packing import build_microbatch  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.types import GenerationRequest, SamplingSettings  # noqa: E402
from r1mega.weights.verify import NUM_SEQUENCES, PROBE_LIMITS, made_up_sequences  # noqa: E402

LENGTH, DECODED = 32, 4  # tokens a sequence, and how many of them are decoded, as a push has it
Weights = dict[str, torch.Tensor]


class Pair:
    """The policy's log-probs of the sequences, and an engine to compare with them."""

    def __init__(self, directory: Path, dtype: str, count: int):
        config = read_config(directory)
        policy = Policy(ModelConfig(path=directory, dtype=dtype), config, ParallelConfig(), None, total_steps=1, seed=0)
        policy.load_hf(HFTensors(directory))
        self.weights: Weights = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
        self.sequences = made_up_sequences([LENGTH] * count, config["vocab_size"], seed=0)
        self.expected = [
            policy.log_probs([build_microbatch([sequence], [1], [0])])[0][0].tolist() for sequence in self.sequences
        ]
        self.engine = VllmEngine(EngineSettings(directory, 2 * LENGTH, dtype=dtype, max_num_seqs=64, kv_cache_bytes=64 << 20))
        self.limit = PROBE_LIMITS[getattr(torch, dtype)]

    def beyond(self) -> list[tuple[list[bool], list[bool]]]:
        """For each sequence: which log-probs of the prompt, and of decoded tokens, are beyond the tolerance."""
        prompts = [tuple(sequence[:-DECODED]) for sequence in self.sequences]
        sampling = SamplingSettings(temperature=0.0, max_tokens=DECODED)
        decoded = [r[0] for r in self.engine.generate([GenerationRequest(p, 1, 0, sampling) for p in prompts])]
        again = self.engine.prompt_log_probs([(*p, *r.token_ids) for p, r in zip(prompts, decoded, strict=True)])
        found = self.engine.prompt_log_probs(self.sequences)
        return [
            (self._far(ours, theirs), self._far(values[len(prompt) - 1 :], response.log_probs))
            for ours, theirs, prompt, response, values in zip(self.expected, found, prompts, decoded, again, strict=True)
        ]

    def _far(self, reference: list[float], found: list[float]) -> list[bool]:
        return [not abs(a - b) <= self.limit.allowed(a) for a, b in zip(reference, found, strict=True)]


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

    for a, b in ((0, 1), (2, 5), (3, 7)):
        yield f"experts {a} and {b} of layer {last} exchanged", exchange(("gate", "up", "down"), a, b)
    yield f"up_proj of experts 0 and 1 of layer {last} exchanged", exchange(("up",), 0, 1)
    for layer in range(last + 1):
        yield f"layer {layer} never written", redraw(f"model.layers.{layer}.", "proj.weight")
        yield f"o_proj of layer {layer} of another model", redraw(f"model.layers.{layer}.", "o_proj.weight")


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


def report(name: str, pair: Pair, draws: int) -> None:
    beyond, count = pair.beyond(), NUM_SEQUENCES[getattr(torch, pair.engine.settings.dtype)]
    allowed, chooser, refused = 1 - pair.limit.share + 1e-12, random.Random(0), 0
    largest = [0.0, 0.0]
    for _ in range(draws):
        chosen = chooser.sample(beyond, min(count, len(beyond)))
        parts = [[flag for sequence in chosen for flag in sequence[kind]] for kind in (0, 1)]
        shares = [sum(part) / len(part) for part in parts]
        largest = [max(both) for both in zip(largest, shares, strict=True)]
        refused += any(share > allowed for share in shares)
    every = [[flag for sequence in beyond for flag in sequence[kind]] for kind in (0, 1)]
    means = [sum(part) / len(part) for part in every]
    print(f"| {name} | {means[0]:.3f} ({largest[0]:.3f}) | {means[1]:.3f} ({largest[1]:.3f}) | {refused / draws:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--draws", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    groups.init_parallel(ParallelConfig(), seed=0)
    pair = Pair(arguments.directory, arguments.dtype, arguments.sequences)
    print("| weights of the generator | beyond, of a prompt (largest draw) | decoded | draws refused |\n|---|---|---|---|")
    pair.engine.update_weights(pair.weights.items())
    report("those of the policy", pair, arguments.draws)
    for name, change in faults(pair):
        weights = dict(pair.weights)
        change(weights)
        pair.engine.update_weights(weights.items())
        report(name, pair, arguments.draws)
    pair.engine.update_weights(pair.weights.items())
    for name in stale_matrices(pair):
        report(name, pair, arguments.draws)
    pair.engine.close()
    groups.destroy()


if __name__ == "__main__":
    main()
