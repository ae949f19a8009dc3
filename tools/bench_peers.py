"""A GRPO step of r1mega against one of TRL's GRPOTrainer: same weights, prompts, lengths and batch sizes, in one run, on a CPU.

    python tools/bench_peers.py small [smollm2] [--rounds 5] [--ours 1x1 2x1] [--theirs 1x1 1x2 2x1] [--venv DIRECTORY] [--json FILE]

Workloads, random weights in float32:
  small    a Qwen3 of 0.66M parameters, 256 responses of 32 tokens: nothing is padded
  smollm2  the architecture of SmolLM2-135M, 8 responses with a long tail of lengths, at most 512 tokens
Each library takes steps in every layout that is asked for, processes x threads of each: r1mega's ranks, TRL's processes as
accelerate's launcher starts them (data parallel). What is compared is a step of the machine, each library in that of its
layouts which takes the least wall time for a step. All take their steps in turn, in an order that alternates, while the
others are stopped. A response ends at a
length that was drawn for it, the same in both (TRL: its end-of-text token is forced there), rewards are 0 or 1 at random, and
both score a reference model for their KL. TRL samples with transformers, the one generator that it has on a CPU. It comes
into a virtual environment of its own (`--venv`), with the torch and transformers of this one; where pip cannot install it
the tool says so, and ends well.

Prints medians of wall and processor seconds by phase, the slowest process and the sum of all, and medians of the pairs'
ratios. The goals are of wall time, which says nothing on a machine that others use as well: there only processor seconds of
one process and thread each (`--ours 1x1 --theirs 1x1`) can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import selectors
import signal
import socket
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
    """What a process says of a step, or all of a side together. tokens: sampled ones."""

    times: Times
    tokens: float


Round = dict[str, Step]
"""Step by side: "r1mega 2x1", "trl 1x2", ..."""


class Summary(TypedDict):
    """All rounds of one workload. trl: its version."""

    workload: str
    trl: str
    rounds: list[Round]


@dataclass(frozen=True, slots=True)
class Workload:
    """hf: config.json. mean, cv: of log-normal lengths of responses, cut at max_tokens. microbatch_tokens: of r1mega's packed
    microbatches; trl_batch: TRL's responses a forward pass, of a process that has as many.
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
        prompts=2, group_size=4, prompt_tokens=48, max_tokens=512, mean=128, cv=1.2, microbatch_tokens=1024, trl_batch=4,
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
    """A library in processes of its own (peer_side.py): builds its trainer, then takes a step whenever it is asked."""

    def __init__(self, library: str, layout: str, python: str | Path, directory: Path):
        """layout: processes x threads of each, "2x1"."""
        self.library, self.name = library, f"{library} {layout}"
        ranks, threads = map(int, layout.split("x"))
        root, own = Path(__file__).resolve().parents[1], directory / f"{library}-{layout}"
        own.mkdir()
        environment = _environment(threads)
        if library == "r1mega":
            environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'kernels'}"
        if ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "ACCELERATE_USE_CPU": "true"}
            environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self._logs = [own / f"rank{rank}.log" for rank in range(ranks)]
        self._processes = []
        for rank, path in enumerate(self._logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            with path.open("w") as log:
                self._processes.append(subprocess.Popen(
                    [python, Path(__file__).with_name("peer_side.py"), library, directory, own / "run"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment | place,
                    cwd=own,
                ))  # fmt: skip
        try:
            self._read()  # it is ready
        except BaseException:  # of ranks that wait for one that is gone, too
            self._kill()
            raise
        self._signal(signal.SIGSTOP)

    def step(self) -> Step:
        """One of all processes together. They stand still before and after: gloo's threads look around even where nobody calls."""
        self._signal(signal.SIGCONT)
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended, and `_read` says by what
                process.stdin.write("step\n")
                process.stdin.flush()
        said = self._read()
        self._signal(signal.SIGSTOP)
        return together(said)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _read(self) -> list[Step]:
        """A line of each process. Raises SystemExit when any of them ends, whoever else waits for it."""
        said: dict[int, Step] = {}
        with selectors.DefaultSelector() as outputs:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                outputs.register(process.stdout, selectors.EVENT_READ, (rank, process.stdout))
            while len(said) < len(self._processes):
                for key, _ in outputs.select():
                    rank, output = key.data
                    line = output.readline()
                    if not line:
                        code = self._processes[rank].wait()
                        tail = "\n".join(self._logs[rank].read_text().splitlines()[-30:])
                        raise SystemExit(f"{self.name} ended with {code}:\n{tail}")
                    said[rank] = json.loads(line)
                    outputs.unregister(output)
        return [said[rank] for rank in range(len(said))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(said: Sequence[Step]) -> Step:
    """A step of several processes: the wall seconds of the slowest, the processor seconds and tokens of all."""
    times = {
        phase: {
            "wall": max(step["times"][phase]["wall"] for step in said),
            "cpu": sum(step["times"][phase]["cpu"] for step in said),
        }
        for phase in said[0]["times"]
    }
    return {"times": times, "tokens": sum(step["tokens"] for step in said)}


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
    """Alternating steps of all layouts of both, without the first, which warms up."""
    make_inputs(WORKLOADS[name], directory, options.rounds + 1, options.seed)
    rounds: list[Round] = []
    pythons = {"r1mega": sys.executable, "trl": options.venv / "bin/python"}
    layouts = {"r1mega": options.ours, "trl": options.theirs}
    with contextlib.ExitStack() as stack:
        sides = [
            stack.enter_context(Side(library, layout, python, directory))
            for library, python in pythons.items()
            for layout in layouts[library]
        ]
        for number in range(options.rounds + 1):
            taken = {side.name: side.step() for side in sides[:: 1 if number % 2 else -1]}
            if len({step["tokens"] for step in taken.values()}) > 1:
                raise SystemExit(f"not the same lengths: { ({key: step['tokens'] for key, step in taken.items()}) }")
            if number:
                rounds.append(taken)
                print(f"{name} {number}/{options.rounds}: {_brief(taken)}", file=sys.stderr, flush=True)
    return {"workload": name, "trl": TRL, "rounds": rounds}


def _brief(taken: Round) -> str:
    return ", ".join(
        f"{key} {side['times']['step']['wall']:.2f} s ({side['times']['step']['cpu']:.2f} of a processor)"
        for key, side in taken.items()
    )


def median_seconds(rounds: Sequence[Round], side: str, phase: str, clock: str) -> float:
    """0 for a phase that the side does not have."""
    return statistics.median(taken[side]["times"].get(phase, {}).get(clock, 0.0) for taken in rounds)


def best(rounds: Sequence[Round], library: str) -> str:
    """That of the library's sides whose steps take the least wall time (median)."""
    sides = [side for side in rounds[0] if side.split()[0] == library]
    return min(sides, key=lambda side: median_seconds(rounds, side, "step", "wall"))


def ratios(rounds: Sequence[Round], phase: str, clock: str, ours: str, theirs: str) -> list[float]:
    """Seconds of one side (`theirs`) over another's, a round each. A phase that one does not have: []."""
    pairs = [[taken[side]["times"].get(phase, {}).get(clock) for side in (theirs, ours)] for taken in rounds]
    return [their_seconds / our_seconds for their_seconds, our_seconds in pairs if their_seconds and our_seconds]


def table(summary: Summary) -> str:
    """Lines for a person: all layouts; then of the best of each library medians in seconds by phase, and medians of the pairs'
    ratios (above 1: r1mega is faster)."""
    rounds = summary["rounds"]
    ours, theirs = (best(rounds, library) for library in ("r1mega", "trl"))
    tokens = statistics.median(taken[theirs]["tokens"] for taken in rounds)
    lines = [
        f"{summary['workload']}: TRL {summary['trl']}, median of {len(rounds)} rounds, {tokens:,.0f} sampled tokens a step; "
        "libraries in processes x threads",
        "a step, wall / processor s: "
        + ", ".join(
            " / ".join([side, *(f"{median_seconds(rounds, side, 'step', clock):.3f}" for clock in ("wall", "cpu"))])
            for side in sorted(rounds[0])
        ),
        f"{'':12s}{'wall, s':>36s}{'processor, s':>36s}",
        f"{'':12s}" + f"{ours:>12s}{theirs:>12s}{'ratio':>12s}" * 2,
    ]
    for phase in PHASES:
        cells = []
        for clock in ("wall", "cpu"):
            cells += [f"{median_seconds(rounds, side, phase, clock):12.3f}" for side in (ours, theirs)]
            pairs = ratios(rounds, phase, clock, ours, theirs)
            cells.append(f"{statistics.median(pairs):12.2f}" if pairs else f"{'-':>12s}")
        lines.append(f"{phase:12s}" + "".join(cells))
    for phase, goal in GOALS.get(summary["workload"], {}).items():
        wall = statistics.median(ratios(rounds, phase, "wall", ours, theirs))
        lines.append(
            f"goal: {phase} at least {goal} times as fast by wall time: {'holds' if wall >= goal else 'missed'}"
        )
    return "\n".join(lines)


def _layout(word: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", word):
        raise argparse.ArgumentTypeError(f"{word!r} is not processes x threads of each, as 2x1")
    return word


def _is_divided(workload: Workload, processes: int) -> bool:
    """Whether each process has as many prompts, and TRL's forward passes as many responses."""
    own = workload.prompts * workload.group_size // processes
    return not workload.prompts % processes and not own % min(workload.trl_batch, own)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each side (after one of warm-up)")
    for option, whose in (("--ours", "r1mega's ranks"), ("--theirs", "TRL's processes")):
        parser.add_argument(
            option, nargs="+", type=_layout, metavar="PxT",
            help=f"{whose} x threads of each, one or several; default: one process of one thread, one of all cores, and a "
            "process a core (or as many as the prompts can be divided among)",
        )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    parser.add_argument("--venv", type=Path, default=cache / f"r1mega/trl-{TRL}", help="where TRL is, or comes to")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(words)
    options.workloads = options.workloads or list(WORKLOADS)
    if unknown := [name for name in options.workloads if name not in WORKLOADS]:
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    chosen = [WORKLOADS[name] for name in options.workloads]
    cores = len(os.sched_getaffinity(0))
    processes = max(n for n in range(1, cores + 1) if all(_is_divided(workload, n) for workload in chosen))
    layouts = list(dict.fromkeys(["1x1", f"1x{cores}", f"{processes}x{cores // processes}"]))
    options.ours, options.theirs = options.ours or layouts, options.theirs or layouts
    for name, layout in itertools.product(options.workloads, options.ours + options.theirs):
        if not _is_divided(WORKLOADS[name], processes := int(layout.split("x")[0])):
            parser.error(
                f"the {WORKLOADS[name].prompts} prompts of {name} cannot be divided among {processes} processes"
            )
    options.venv = options.venv.resolve()
    return options


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or who is stopped stays so
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
