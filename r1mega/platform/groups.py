"""Process groups: torch.distributed and Megatron's parallel groups for one layout, and how long ranks wait in them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from r1mega import platform
from r1mega.config.layout import Layout, mtp_stage, process_problems
from r1mega.config.schema import TimeoutsConfig
from r1mega.errors import ConfigError, R1MegaError, StragglerError
from r1mega.platform import processors
from r1mega.types import Deal, by_itself

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")
Helper = Callable[[Sequence[Any]], list[Any]]
Task = tuple[int | None, Any]
"""Place of the helper and its items; None and the outcome at the end."""
Kind = Literal["startup", "collective", "rollout", "checkpoint"]

_timeouts = TimeoutsConfig()
_num_waits = 0  # equal on all ranks, for `wait_for_all` is a collective call
_begun = time.monotonic()  # when this rank's own part of what the next one waits for began
_generators: dict[int, dist.ProcessGroup] = {}  # by their size

PAIR_CLOSED = "Application timeout caused pair closure"
"""gloo's, of what follows on a time-out: alone of its errors it does not say where in gloo it comes from."""
LOST_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Connection was likely closed", "Connection refused",
    "Connection timed out", "Broken pipe", "remote process exited", "Timed out waiting", "Socket Timeout", "wait timeout after",
    "has timed out after", PAIR_CLOSED,
)  # fmt: skip
"""In the words of gloo, NCCL (2.27, its error code 6) and torch's store: what another rank's end or silence becomes here."""
PACKAGE = Path(__file__).parents[1]

TIMES_OWN_WORK = 10
"""How much longer than this rank's own part a part of another may take, in places of kind `rollout`; a rank that does nothing
meanwhile is the watchdog's to find.
"""


def init_distributed(timeouts: TimeoutsConfig | None = None) -> None:
    """Join the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name, or be a job of one process. Idempotent.

    The variables are set for a single process too: libraries in the same process (vLLM's external launcher) read them.

    The device is not given to init_process_group (`device_id`). Bound to it, torch 2.13 splits WORLD's communicator for
    every new group, on members and all others alike (distributed_c10d.py, _new_process_group_helper): thousands of
    ncclCommSplit over the whole job, most of groups in which nobody ever communicates; and for a group that is gloo's
    alone the others split and the members do not, which hangs (pytorch#145376). Without it a communicator is made at the
    first use of its group, by the members alone.
    """
    global _timeouts
    if timeouts is not None:
        _timeouts = timeouts
    if dist.is_initialized():
        return
    here = platform.current()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    os.environ.setdefault("LOCAL_RANK", "0")
    if here.name == "cuda":
        torch.cuda.set_device(here.device)
        processors.stay_near(here.device)
    alone = os.environ["WORLD_SIZE"] == "1"  # then nobody needs to find anybody: no port that could be taken
    backend, limit = here.distributed_backend, timeout("startup")
    if alone:
        dist.init_process_group(backend, timeout=limit, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=limit)
    wait_for_all("startup", "the start of the process groups")  # on gloo, where who is missing is named
    if here.name == "cuda" and not alone:
        _start_nccl(here.device)
    dist.distributed_c10d._set_pg_timeout(timeout("collective"))


def _start_nccl(device: torch.device) -> None:
    """NCCL's communicator of the world. All must be there when it is made, and its first use may be messages between some
    (dist.batch_isend_irecv).
    """
    dist.all_reduce(torch.zeros(1, device=device))
    torch.cuda.synchronize(device)


def timeout(kind: Kind) -> timedelta:
    """How long a rank waits for others in groups or places of this kind, by the config."""
    return timedelta(seconds=getattr(_timeouts, f"{kind}_seconds"))


def wait_for_all(kind: Kind, what: str) -> None:
    """Until all ranks are here; a collective call, for places that ranks may reach at very different times.

    The time-out of `kind` holds for this wait alone, not for what follows; of a rollout it follows the work: it is at least
    TIMES_OWN_WORK the time since this rank's last wait or `begin_work`. what: for the message, "the rollout of step 3".
    StragglerError naming the ranks that did not come in time. Nothing happens without other ranks.
    """
    global _num_waits
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    _num_waits += 1
    store = dist.distributed_c10d._get_default_store()
    prefix = f"r1mega/wait/{_num_waits}/"  # who is here is also written down: gloo does not say for whom it waited
    store.set(f"{prefix}{dist.get_rank()}", "")
    limit = timeout(kind)
    if kind == "rollout":
        limit = max(limit, timedelta(seconds=TIMES_OWN_WORK * (time.monotonic() - _begun)))
    try:
        dist.barrier(timeout=limit)  # on gloo, for the device is not bound
    except RuntimeError as error:
        try:
            absent = [rank for rank in range(dist.get_world_size()) if not store.check([f"{prefix}{rank}"])]
        except RuntimeError:  # rank 0 keeps the store where no launcher does
            raise StragglerError(
                f"{what}: rank 0 ended while the others waited; its own log says why ({error})"
            ) from error
        raise StragglerError(_absent_text(kind, what, absent, limit, str(error))) from error
    with contextlib.suppress(dist.DistError):  # all came; rank 0, where the store may be, may have ended since
        store.delete_key(f"{prefix}{dist.get_rank()}")
    begin_work()


@contextlib.contextmanager
def peers_named() -> Iterator[None]:
    """StragglerError in the place of what a library says in the block where another rank has ended or does not answer: this rank's
    own error it is not, and whoever looks for the first that failed must not take it for that.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_peer(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if PACKAGE in Path(frame.filename).parents] or list(frames)
        raise StragglerError(
            f"another rank ended, or did not answer in time, while this one was in {own[-1].name} ({own[-1].filename}:{own[-1].lineno}); "
            f"its own log says why ({str(error).splitlines()[0]})"
        ) from error


def _is_of_a_peer(error: RuntimeError) -> bool:
    """Others may use LOST_PEER's words of other connections: a reward of its service, say."""
    text = str(error)
    speaks = isinstance(error, dist.DistError) or "gloo/transport" in text or PAIR_CLOSED in text
    return speaks and any(words in text for words in LOST_PEER)


def begin_work() -> None:
    """From here on this rank's time counts as its own part of a rollout, by which `wait_for_all` measures how long others may
    take. Where other work lies between a rollout and the wait before it.
    """
    global _begun
    _begun = time.monotonic()


def generator_ranks(tp: int) -> dist.ProcessGroup:
    """This rank's generator as a group on gloo: tp neighbouring ranks, one set of groups for all that talk there. A collective call
    of all ranks the first time. A rank waits in it for timeouts.rollout_seconds, whatever its own work took: what these ranks
    do between two messages they do together, in the same passes.
    """
    if (made := _generators.get(tp)) is None or made not in dist.distributed_c10d._world.pg_map:
        made, _ = dist.new_subgroups(tp, timeout=timeout("rollout"), backend="gloo")
        _generators[tp] = made
    return made


def claim(name: str) -> int:
    """How many ranks' calls with this name came before, over all ranks: no two get the same. StragglerError where the process
    that keeps the store, rank 0 or the launcher, has ended.
    """
    try:
        return dist.distributed_c10d._get_default_store().add(f"r1mega/{name}", 1) - 1
    except RuntimeError as error:
        raise StragglerError(
            f"{name}: the store of torch.distributed, which counts, does not answer ({error}). Rank 0 or the launcher keeps it: if "
            "that ended, its own log says why"
        ) from error


def forget_claims(name: str) -> None:
    """Count anew. By one rank, once all are done with it."""
    dist.distributed_c10d._get_default_store().delete_key(f"r1mega/{name}")


def _absent_text(kind: Kind, what: str, absent: list[int], limit: timedelta, cause: str) -> str:
    """limit: that ran out; longer than the config's where it follows the work."""
    if not absent:  # all came, but the connection to one broke meanwhile
        return f"{what}: a rank ended while the others waited; its own log says why ({cause})"
    shown = ", ".join(map(str, absent[:16])) + (f" and {len(absent) - 16} more" if len(absent) > 16 else "")
    said = timeout(kind)
    own = f", for which {TIMES_OWN_WORK} times what this rank's own part took, {_seconds(limit)} s, stood in"
    return (
        f"{what}: waited for rank {shown} ({cause}). If it ended, its own log says why; if it is only slow, raise "
        f"timeouts.{kind}_seconds ({_seconds(said)}{own if limit > said else ''})"
        + (f" above {_seconds(limit)}" if limit > said else "")
    )


def _seconds(time: timedelta) -> str:
    return f"{round(time.total_seconds(), 3):g}"


@dataclass(frozen=True, slots=True)
class GeneratorPlace:
    """Which generator this rank belongs to: `tp` neighbouring ranks are one. is_first: of its ranks; the others hold copies
    of what it generates.
    """

    replica: int
    num_replicas: int
    is_first: bool

    @classmethod
    def of_this_rank(cls, tp: int) -> GeneratorPlace:
        rank, world = dist.get_rank(), dist.get_world_size()
        return cls(rank // tp, world // tp, rank % tp == 0)

    def block(self, count: int) -> range:
        """This generator's share of range(count): the blocks of all, in order, are the whole."""
        return range(count * self.replica // self.num_replicas, count * (self.replica + 1) // self.num_replicas)

    def owners(self, count: int) -> list[int]:
        """Which generator has each of range(count) in its block."""
        return [((place + 1) * self.num_replicas - 1) // count for place in range(count)]


def share_out(items: Sequence[T], work: Callable[[Sequence[T]], list[U]], what: str, *, tp: int = 1) -> list[U]:
    """`work` on each generator's block of the items: the results of all blocks, in order, on every rank. A collective call.

    tp: ranks of a generator, which do the same block; 1: each rank has one of its own. Ranks wait for each other as in a
    rollout. what: for the message of one that does not come. An R1MegaError of one rank is raised on all.
    """
    place = GeneratorPlace.of_this_rank(tp)
    found: list[U] | R1MegaError
    begin_work()
    try:
        found = work([items[i] for i in place.block(len(items))])
    except R1MegaError as error:
        found = error
    wait_for_all("rollout", what)
    everyone: list[list[U] | R1MegaError] = [found]
    if dist.get_world_size() > 1:
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, found)
    for theirs in everyone:
        if isinstance(theirs, R1MegaError):
            raise theirs
    return [result for theirs in everyone[::tp] if isinstance(theirs, list) for result in theirs]


DEALT_AT_A_TIME = 1 << 16
"""Items that `lead` hands out at one time, over all ranks: what is on its way is bounded, whatever there is of them."""


def lead(make: Callable[[Deal], T], helpers: Sequence[Helper]) -> T:
    """What `make` returns on rank 0, on every rank, where all ranks help: its argument takes one of `helpers`, functions that
    every rank has made alike, and items, which rank 0 alone needs to have. A collective call.

    Ranks wait for rank 0 and for each other as in a rollout. An R1MegaError, of any rank's work, is raised on all.
    """
    world = dist.get_world_size()
    if dist.get_rank() > 0:
        while (task := _hand_out(None))[0] is not None:
            _collect(_done(helpers[task[0]], task[1]))
        result, error = task[1]
    else:

        def deal(work: Callable[[Sequence[U]], list[V]], items: Sequence[U]) -> list[V]:
            results: list[V] = []
            for start in range(0, len(items), DEALT_AT_A_TIME):
                given = items[start : start + DEALT_AT_A_TIME]
                place, bounds = helpers.index(work), [len(given) * rank // world for rank in range(world + 1)]
                blocks = [given[first:last] for first, last in itertools.pairwise(bounds)]
                _hand_out([(place, block) for block in blocks])
                results += _collect(_done(work, blocks[0]))
            return results

        result = error = None
        try:
            result = make(deal if world > 1 else by_itself)
        except R1MegaError as caught:
            error = caught
        _hand_out([(None, (result, error))] * world)
    if error is not None:
        raise error
    return result


def _hand_out(tasks: list[Task] | None) -> Task:
    """Rank 0 gives every rank its task."""
    if dist.get_world_size() == 1:
        return (None, None)
    wait_for_all("rollout", "what rank 0 hands out")
    own: list[Task] = [(None, None)]
    dist.scatter_object_list(own, tasks, src=0)
    return own[0]


def _done(work: Callable[[Sequence[T]], list[U]], items: Sequence[T]) -> list[U] | R1MegaError:
    try:
        return work(items)
    except R1MegaError as error:
        return error


def _collect(found: list[U] | R1MegaError) -> list[U]:
    """The results of all ranks on rank 0, in order; [] elsewhere."""
    wait_for_all("rollout", "what rank 0 handed out")
    everyone: list[list[U] | R1MegaError] | None = [[]] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(found, everyone, dst=0)
    results: list[U] = []
    for theirs in everyone or ():
        if isinstance(theirs, R1MegaError):
            raise theirs
        results += theirs
    return results


def init_parallel(layout: Layout, seed: int, timeouts: TimeoutsConfig | None = None) -> None:
    """init_distributed, Megatron's groups for `layout`, and random seeds (each pipeline stage and TP rank its own).

    Raises ConfigError when the world size does not fit the layout.
    """
    platform.prepare()
    init_distributed(timeouts)
    for problem in process_problems(layout, dist.get_world_size()):
        raise ConfigError(problem)
    make_groups(layout, timeout("collective"))
    seed_all(seed)


def make_groups(layout: Layout, wait: timedelta) -> None:
    """Megatron's groups for `layout`, among the ranks of the world. wait: of a collective for its last rank."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if (layout.vpp or 1) > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=wait / timedelta(minutes=1),
        get_embedding_ranks=functools.partial(_with_mtp, layout) if layout.mtp_standalone else None,
    )


def _with_mtp(layout: Layout, pipeline: Sequence[int]) -> list[int]:
    """Of a pipeline's ranks those that add up the embedding's gradient: the first and, in the place of the last, which Megatron
    takes and which here holds no embedding but an output layer of its own, the one that has the layers of multi-token prediction.
    """
    return sorted({pipeline[0], pipeline[mtp_stage(layout) % layout.pp]})


def seed_all(seed: int) -> None:
    """Seed Python, torch and Megatron's generators: equal on ranks that hold the same weights, else different."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def destroy_parallel() -> None:
    """Take down Megatron's groups; the world stays, and `init_parallel` may make another layout's. Nothing happens when there
    are none. Each group of a rank has threads and sockets (gloo: three threads that wake a hundred times a second).
    """
    if "megatron.core.parallel_state" in sys.modules:
        parallel_state: Any = sys.modules["megatron.core.parallel_state"]
        if parallel_state.model_parallel_is_initialized():
            made = parallel_state._global_process_group_list or []
            parallel_state.destroy_model_parallel()
            for group in made:
                if group in dist.distributed_c10d._world.pg_map:  # None is the world's; some Megatron has destroyed
                    dist.destroy_process_group(group)
    # what a class or a module keeps of the last model: the scale has its schedule's shape, the metrics (0.19) its layers
    if (moe_utils := sys.modules.get("megatron.core.transformer.moe.moe_utils")) is not None:
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    if (moe_logging := sys.modules.get("megatron.core.transformer.moe.moe_logging")) is not None:
        moe_logging.destroy_moe_metrics_tracker()


def destroy() -> None:
    """Take down Megatron's groups and torch.distributed; nothing happens when there are none."""
    destroy_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
