"""GB/s of both conversions against `cp` of the same bytes, alternating in one run, with everything in the page cache.

python tools/bench_convert.py [--gigabytes 1] [--rounds 3] [--directory DIR]

`cp` leaves its data in the page cache; a conversion makes them durable (fsync), and computes digests (to Megatron) or
compares them (to HF). So `cp` is also timed with a sync of its files, and to HF also without the comparison. The best of
the rounds counts; CPU seconds (user and system) hold on a machine that others use as well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from r1mega.checkpoint.convert import ConvertOptions, convert
from r1mega.checkpoint.hf import write_hf
from r1mega.checkpoint.parameters import parameters
from r1mega.checkpoint.workers import Alone

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


def make_model(directory: Path, num_bytes: int) -> int:
    """A dense bfloat16 model of about that size; its bytes."""

    def size(layers: int) -> int:
        return 2 * sum(torch.Size(p.shape).numel() for p in parameters(CONFIG | {"num_hidden_layers": layers}))

    layers = max(1, round((num_bytes - size(0)) / (size(1) - size(0))))
    config = CONFIG | {"num_hidden_layers": layers}
    tensors = (
        (name, torch.randn(shape).bfloat16())
        for p in parameters(config)
        for name, shape in zip(p.entry.hf_names, p.entry.hf_shapes, strict=True)
    )
    write_hf(directory, tensors, config, shard_bytes=512 << 20)
    return size(layers)


def cpu_seconds() -> float:
    """Of this process and those that it ran."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(function: Callable[[], object], out: Path) -> tuple[float, float]:
    """(seconds, CPU seconds); the output is removed after, the disk is at rest before."""
    subprocess.run(["sync"], check=True)
    begun, cpu = time.perf_counter(), cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()):
        function()
    taken = time.perf_counter() - begun, cpu_seconds() - cpu
    shutil.rmtree(out)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as base:
        source, megatron, out = Path(base, "hf"), Path(base, "megatron"), Path(base, "out")
        num_bytes = make_model(source, int(arguments.gigabytes * 1e9))
        options, alone = ConvertOptions(max_file_bytes=512 << 20), Alone()
        convert(source, megatron, "megatron", options, alone)
        trusting = ConvertOptions(max_file_bytes=512 << 20, verify=False)

        def copy(sync: bool) -> None:
            subprocess.run(["cp", "-r", "--reflink=never", source, out], check=True)
            if sync:
                subprocess.run(["sync", *out.iterdir()], check=True)

        cases = {
            "cp": lambda: copy(False),
            "cp and sync": lambda: copy(True),
            "to megatron": lambda: convert(source, out, "megatron", options, alone),
            "to hf": lambda: convert(megatron, out, "hf", options, alone),
            "to hf --no-verify": lambda: convert(megatron, out, "hf", trusting, alone),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for round_ in range(arguments.rounds + 1):
            for name, function in cases.items():
                taken = timed(function, out)
                if round_:  # the first warms the page cache
                    seconds[name].append(taken)
    for what, i in (("wall", 0), ("CPU", 1)):
        rates = {name: num_bytes / 1e9 / min(times[i] for times in taken) for name, taken in seconds.items()}
        for name, rate in rates.items():
            shares = "  ".join(f"{rate / rates[other]:5.2f} of {other}" for other in ("cp", "cp and sync"))
            print(f"{name:20} {rate:6.2f} GB/s {what:4}  {shares}")


if __name__ == "__main__":
    main()
