"""A GRPO step of r1mega against one of TRL's GRPOTrainer: same weights, prompts, lengths and batch sizes, in one run, on a CPU.

    python tools/bench_peers.py small [smollm2] [--rounds 5] [--threads 1] [--venv DIRECTORY] [--json FILE]

Workloads, random weights in float32:
  small    a Qwen3 of 0.66M parameters, 256 responses of 32 tokens: nothing is padded
  smollm2  the architecture of SmolLM2-135M, 16 responses with a long tail of lengths, at most 512 tokens
Each library has a process, which takes its steps in turn with the other, who goes first alternating. A response ends at a
length that was drawn for it, the same in both (TRL: its end-of-text token is forced there), rewards are 0 or 1 at random, and
both score a reference model for their KL. TRL samples with transformers, the one generator that it has on a CPU. It comes
into a virtual environment of its own (`--venv`), with the torch and transformers of this one; where pip cannot install it
the tool says so, and ends well.

Prints medians of wall and processor seconds by phase, and medians of the pairs' ratios. On a machine that others use as
well the processor seconds are the ones to look at.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TypedDict

TRL = "1.16.0"
SHARED = ("torch", "transformers", "accelerate", "datasets")
"""Packages of which TRL's environment gets the versions of this one."""
PHASES = ("rollout", "log-probs", "update", "the rest", "step")
GOALS = {"small": {"step": 1.3, "rollout": 1.2}, "smollm2": {"step": 1.5, "rollout": 1.2}}
_COMMON = {
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True,
    "initializer_range": 0.02, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip
Times = dict[str, dict[str, float]]
"""Of one step: phase -> {"wall": seconds, "cpu": seconds}."""


class Step(TypedDict):
    """What a side says of a step. tokens: sampled ones."""

    times: Times
    tokens: float


Round = dict[str, Step]
"""Step by side, "r1mega" and "trl"."""


class Summary(TypedDict):
    """All rounds of one workload. trl: its version."""

    workload: str
    threads: int
    trl: str
    rounds: list[Round]


@dataclass(frozen=True, slots=True)
class Workload:
    """hf: config.json. mean, cv: of log-normal lengths of responses, cut at max_tokens. microbatch_tokens: of r1mega's packed
    microbatches; trl_batch: TRL's responses a forward pass.
    """

    hf: Mapping[str, object]
    prompts: int
    group_size: int
    prompt_tokens: int
    max_tokens: int
    mean: float
    cv: float
    microbatch_tokens: int
    trl_batch: int


WORKLOADS = {
    "small": Workload(
        _COMMON | {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 512, "hidden_size": 128,
            "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "max_position_embeddings": 512, "use_sliding_window": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        prompts=32, group_size=8, prompt_tokens=16, max_tokens=32, mean=32, cv=0.0, microbatch_tokens=4096, trl_batch=64,
    ),
    "smollm2": Workload(
        _COMMON | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "head_dim": 64, "max_position_embeddings": 8192, "mlp_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
        prompts=4, group_size=4, prompt_tokens=48, max_tokens=512, mean=128, cv=1.2, microbatch_tokens=1024, trl_batch=4,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------- the two sides


def install(venv: Path, version: str = TRL) -> str | None:
    """Makes `venv` with TRL in it, unless it is there; what pip said when it cannot, else None."""
    python = venv / "bin/python"
    found = f"import importlib.metadata as m; assert m.version('trl') == {version!r}; import torch, trl"
    if python.exists() and not subprocess.run([python, "-c", found], capture_output=True).returncode:
        return None
    pinned = [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in SHARED]
    print(f"installing TRL {version} into {venv} (minutes, once)", flush=True)
    commands = (
        [sys.executable, "-m", "venv", "--clear", str(venv)],
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", f"trl=={version}", *pinned],
        [str(python), "-c", found],
    )
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment())
        if done.returncode:
            return (done.stdout.strip().splitlines() or ["no reason given"])[-1]
    return None


def _environment(threads: int = 1) -> dict[str, str]:
    """Ours, without the paths that bring the modules of this Python into another."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class Side:
    """A library in a process of its own (peer_side.py): builds its trainer, then takes a step whenever it is asked."""

    def __init__(self, name: str, python: str | Path, directory: Path, threads: int):
        self.name, self._log = name, directory / f"{name}.log"
        root = Path(__file__).resolve().parents[1]
        environment = _environment(threads)
        if name == "r1mega":
            environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'kernels'}"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, Path(__file__).with_name("peer_side.py"), name, directory], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=directory,
            )  # fmt: skip
        self._read()  # it is ready

    def step(self) -> Step:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Step:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = "\n".join(self._log.read_text().splitlines()[-30:])
            raise SystemExit(f"{self.name} ended with {self._process.returncode}:\n{tail}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def make_inputs(workload: Workload, directory: Path, steps: int, seed: int) -> None:
    """model/ (weights and a tokenizer of a word a token), prompts.jsonl, zero.yaml for r1mega, and spec.json for both sides."""
    import random

    import synthetic
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = directory / "model"
    hf = dict(workload.hf)
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf), dtype=torch.float32)
    made.save_pretrained(model)
    (model / "config.json").write_text(json.dumps(hf, indent=1))
    (model / "generation_config.json").unlink(missing_ok=True)
    vocabulary = workload.hf["vocab_size"]
    assert isinstance(vocabulary, int)
    synthetic.write_tokenizer(model, vocabulary, {"pad_token": "<pad>", "eos_token": "<eos>"})  # tokens 0 and 1
    rng = random.Random(seed)
    lines = [
        {"id": f"p{i}", "question": synthetic.words(rng, workload.prompt_tokens, vocabulary), "answer": "0"}
        for i in range(2 * workload.prompts)
    ]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw = synthetic.draw_lengths(workload.max_tokens, float(workload.mean), workload.cv, None)
    responses = workload.prompts * workload.group_size
    lengths = [[draw(rng.getrandbits(60)) for _ in range(responses)] for _ in range(steps)]
    stage = _stage(workload, directory, steps, seed)
    (directory / "zero.yaml").write_text(json.dumps(stage, indent=1))  # which is YAML too
    spec = {key: value for key, value in asdict(workload).items() if key != "hf"} | {"lengths": lengths, "seed": seed}
    (directory / "spec.json").write_text(json.dumps(spec))


def _stage(workload: Workload, directory: Path, steps: int, seed: int) -> dict[str, object]:
    """r1mega's config: what TRL is asked for as well, the rest by default."""
    return {
        "stage": "zero", "run_dir": str(directory / "run"), "seed": seed, "steps": steps,
        "model": {"path": str(directory / "model"), "dtype": "float32"},
        "data": {
            "prompts": [str(directory / "prompts.jsonl")], "template": "{{ question }}",
            "max_prompt_tokens": workload.prompt_tokens,
        },
        "rollout": {
            "num_prompts": workload.prompts, "group_size": workload.group_size, "max_response_tokens": workload.max_tokens,
            "kv_cache_bytes": 2**29,
        },
        "algorithm": {"kl_coefficient": 0.001, "old_log_probs": "rollout"},
        "update": {"num_minibatches": 1, "microbatch_tokens": workload.microbatch_tokens},
        "optimizer": {"lr": 1e-6, "weight_decay": 0.0},
        "observe": {"tensorboard": False},
    }  # fmt: skip


# ---------------------------------------------------------------------- the comparison


def compare(name: str, options: argparse.Namespace, directory: Path) -> Summary:
    """Alternating steps of both, without the first, which warms up."""
    workload = WORKLOADS[name]
    make_inputs(workload, directory, options.rounds + 1, options.seed)
    rounds: list[Round] = []
    with (
        Side("r1mega", sys.executable, directory, options.threads) as ours,
        Side("trl", options.venv / "bin/python", directory, options.threads) as theirs,
    ):
        for number in range(options.rounds + 1):
            order = (ours, theirs) if number % 2 else (theirs, ours)
            taken = {side.name: side.step() for side in order}
            if taken["r1mega"]["tokens"] != taken["trl"]["tokens"]:
                raise SystemExit(f"not the same lengths: { ({key: value['tokens'] for key, value in taken.items()}) }")
            if number:
                rounds.append(taken)
                print(f"{name} {number}/{options.rounds}: {_brief(taken)}", file=sys.stderr, flush=True)
    return {"workload": name, "threads": options.threads, "trl": TRL, "rounds": rounds}


def _brief(taken: Round) -> str:
    return ", ".join(
        f"{key} {side['times']['step']['wall']:.2f} s ({side['times']['step']['cpu']:.2f} of a processor)"
        for key, side in taken.items()
    )


def ratios(rounds: Sequence[Round], phase: str, clock: str) -> list[float]:
    """TRL's seconds over r1mega's, a round each. A phase that one does not have: []."""
    pairs = [[taken[side]["times"].get(phase, {}).get(clock) for side in ("trl", "r1mega")] for taken in rounds]
    return [theirs / ours for theirs, ours in pairs if theirs and ours]


def table(summary: Summary) -> str:
    """Lines for a person: medians in seconds by phase, and medians of the pairs' ratios (above 1: r1mega is faster)."""
    rounds = summary["rounds"]
    tokens = statistics.median(taken["trl"]["tokens"] for taken in rounds)
    lines = [
        f"{summary['workload']}: TRL {summary['trl']}, {summary['threads']} thread(s), median of {len(rounds)} rounds, "
        f"{tokens:,.0f} sampled tokens a step",
        f"{'':12s}{'wall, s':>27s}{'processor, s':>27s}",
        f"{'':12s}" + f"{'r1mega':>9s}{'TRL':>9s}{'ratio':>9s}" * 2,
    ]
    for phase in PHASES:
        cells = []
        for clock in ("wall", "cpu"):
            for side in ("r1mega", "trl"):
                seen = [taken[side]["times"].get(phase, {}).get(clock, 0.0) for taken in rounds]
                cells.append(f"{statistics.median(seen):9.3f}")
            pairs = ratios(rounds, phase, clock)
            cells.append(f"{statistics.median(pairs):9.2f}" if pairs else f"{'-':>9s}")
        lines.append(f"{phase:12s}" + "".join(cells))
    for phase, goal in GOALS.get(summary["workload"], {}).items():
        wall, cpu = (statistics.median(ratios(rounds, phase, clock)) for clock in ("wall", "cpu"))
        held = "holds" if min(wall, cpu) >= goal else "missed" if max(wall, cpu) < goal else "holds by one clock only"
        lines.append(f"goal: {phase} at least {goal} times as fast: {held}")
    return "\n".join(lines)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each side (after one of warm-up)")
    parser.add_argument("--threads", type=int, default=1, help="of either library")
    parser.add_argument("--seed", type=int, default=1)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    parser.add_argument("--venv", type=Path, default=cache / f"r1mega/trl-{TRL}", help="where TRL is, or comes to")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(words)
    options.workloads = options.workloads or list(WORKLOADS)
    if unknown := [name for name in options.workloads if name not in WORKLOADS]:
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    options.venv = options.venv.resolve()
    return options


def main() -> None:
    options = arguments()
    if problem := install(options.venv):
        print(f"skipped: TRL {TRL} cannot be installed into {options.venv}: {problem}")
        return
    summaries: list[Summary] = []
    for name in options.workloads:
        with tempfile.TemporaryDirectory() as scratch:
            summaries.append(compare(name, options, Path(scratch)))
        print(table(summaries[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(summaries, indent=1))


if __name__ == "__main__":
    main()
