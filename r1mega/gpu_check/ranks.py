"""Several ranks, one a device (gloo on a CPU): transport, the policy in parallel layouts, resharding into vLLM."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from r1mega import platform
from r1mega.config.schema import LogProbs, ParallelConfig
from r1mega.errors import PlatformError
from r1mega.gpu_check.findings import Context, Findings
from r1mega.gpu_check.runner import show_stacks
from r1mega.platform import groups
from r1mega.platform.local_ranks import run_ranks

LAYOUTS = {
    2: ({}, {"tp": 2}, {"ep": 2}, {"tp": 2, "ep": 2}, {"pp": 2}, {"etp": 2}),
    4: ({"tp": 2, "pp": 2, "ep": 2}, {"tp": 2, "cp": 2, "ep": 2}, {"pp": 2, "vpp": 2, "ep": 2}, {"ep": 4}),
}
RANKS_ON_CPU = 3
"""Of `transport`: no power of two, for devices may be left out."""
MESSAGE_BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}


def transport(context: Context, findings: Findings) -> None:
    """Over all devices of the machine."""
    ranks = torch.cuda.device_count() if context.device == "cuda" else RANKS_ON_CPU
    findings.figure("ranks", ranks)
    _on_ranks("exchange_messages", ranks, context, findings)


def parity(context: Context, findings: Findings) -> None:
    """Layouts of two processes against one."""
    _on_ranks("compare_layouts", 2, context, findings)


def parity_of_four(context: Context, findings: Findings) -> None:
    """Layouts of four processes against one."""
    _on_ranks("compare_layouts", 4, context, findings)


def reshard(context: Context, findings: Findings) -> None:
    """An engine a process: each pair of layouts gets processes of its own."""
    for function in ("two_to_one", "two_to_two"):
        _on_ranks(function, 2, context, findings)


def _on_ranks(function: str, ranks: int, context: Context, findings: Findings) -> None:
    """Run `function` of this module on so many ranks; rank 0's findings, and every rank's failures, become the step's."""
    code = run_ranks(["-m", "r1mega.gpu_check.ranks", function, context.device, str(context.work)], ranks)
    for rank in range(ranks):
        path = context.work / f"{function}.{rank}.json"
        if not path.exists():
            findings.failures.append(f"{function}: rank {rank} left no result")
            continue
        record = json.loads(path.read_text())
        path.unlink()
        findings.failures += [f"rank {rank}: {failure}" for failure in record["failures"]]
        if rank == 0:
            findings.figures |= record["figures"]
            findings.notes += record["notes"]
    findings.holds(f"{function}: all ranks end with 0", code == 0, f"exit code {code}")


def _rank(function: str, device: str, work: Path) -> None:
    """One rank's part."""
    show_stacks()
    findings = Findings()
    if platform.current().name != device:
        raise PlatformError(f"this rank is on {platform.current().name}, {device} was asked for")
    context = Context(device, work)
    groups.init_distributed()
    getattr(import_module("r1mega.gpu_check.ranks"), function)(context, findings)
    (work / f"{function}.{dist.get_rank()}.json").write_text(json.dumps(asdict(findings)))
    dist.barrier()
    groups.destroy()


# ---------------------------------------------------------------------- on every rank


def exchange_messages(context: Context, findings: Findings) -> None:
    """All-reduce, all-gather and the weight transfer's own batched messages, of random bytes that each side knows.

    Messages go round a ring in both directions, so that of every device a link is used.
    """
    from r1mega.weights.transport import Message, MessageTransport, Side

    device, size = platform.current().device, MESSAGE_BYTES[context.device]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    around = sorted({(rank - 1) % ranks, (rank + 1) % ranks})

    def content(sender: int, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * sender + index)
        return torch.randint(-(2**63), 2**63 - 1, (size // 8,), generator=generator).view(torch.uint8).to(device)

    total = content(rank, 0).float()
    expected = functools.reduce(torch.add, (content(sender, 0).float() for sender in range(ranks)))
    dist.all_reduce(total)
    findings.holds("all-reduce adds", torch.equal(total, expected))
    gathered = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(ranks)]
    dist.all_gather(gathered, content(rank, 1))
    findings.holds("all-gather gathers", all(torch.equal(g, content(r, 1)) for r, g in enumerate(gathered)))
    buckets = 4
    side = Side(tuple(Message(other, place * size, size, ()) for place, other in enumerate(around)))
    way = MessageTransport([(len(around) * size, len(around) * size)] * buckets, device)
    held, right = [content(rank, index) for index in range(buckets)], True
    for turn in range(2):  # the first connects and compares, the second is timed
        _wait(context)
        start = time.monotonic()
        for index in range(buckets + 1):
            if index < buckets:
                for part in way.outgoing(index).split(size):
                    part.copy_(held[index])
                way.post(index, side, side)
            if index:
                for message, received in way.received(index - 1, side):
                    right = right and (turn == 1 or torch.equal(received, content(message.rank, index - 1)))
        way.finish()
        _wait(context)
        seconds = time.monotonic() - start
    findings.holds("messages arrive whole", right)
    findings.figure("bytes_per_s_each_way", buckets * size * len(around) / seconds)
    _time_collectives(context, findings, torch.zeros(size // 4, device=device))


def _time_collectives(context: Context, findings: Findings, tensor: torch.Tensor) -> None:
    for _ in range(2):
        dist.all_reduce(tensor)
    _wait(context)
    start = time.monotonic()
    for _ in range(5):
        dist.all_reduce(tensor)
    _wait(context)
    findings.figure("all_reduce_bytes_per_s", 5 * tensor.nbytes / (time.monotonic() - start))


def _wait(context: Context) -> None:
    if context.device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def compare_layouts(context: Context, findings: Findings) -> None:
    """float32 steps in every layout of as many ranks against the reference's."""
    platform.prepare()  # before the first import of megatron

    from r1mega.gpu_check.policy import EXACT, Case, compare, load_reference, make_trainer, take_steps, with_layout

    state, expected = load_reference(context)
    modes: tuple[LogProbs, ...] = ("logits", "hidden")
    for sizes, mode in itertools.product(LAYOUTS[dist.get_world_size()], modes):
        case = with_layout(Case(log_probs=mode), **sizes)
        if mode == "hidden" and sizes not in ({"tp": 2}, {"tp": 2, "cp": 2, "ep": 2}):
            continue
        groups.init_parallel(case.layout, seed=0)
        compare(findings, case, state, expected["chosen"], take_steps(make_trainer(case, state), case), EXACT)
        groups.destroy_parallel()


def two_to_one(context: Context, findings: Findings) -> None:
    """TP 2 x EP 2 into generators of one process."""
    _reshard(context, findings, ParallelConfig(tp=2, ep=2), 1)


def two_to_two(context: Context, findings: Findings) -> None:
    """PP 2 into one generator of two processes."""
    _reshard(context, findings, ParallelConfig(pp=2), 2)


def _reshard(context: Context, findings: Findings, layout: ParallelConfig, tp: int) -> None:
    from r1mega.gpu_check.generator import live

    groups.init_parallel(layout, seed=0)
    sizes = "".join(
        f"{key}{value}" for key, value in layout.model_dump().items() if isinstance(value, int) and value > 1
    )
    live(context, findings, layout, tp, label=f"{sizes} to tp{tp}: ")


if __name__ == "__main__":
    _rank(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
