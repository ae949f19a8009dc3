"""How long ranks wait for each other: each kind of wait by its own key, and who was waited for in vain."""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist

from r1mega.config.schema import RolloutConfig, TimeoutsConfig
from r1mega.errors import StragglerError
from r1mega.platform import groups
from r1mega.rollout.open_groups import OpenGroup
from r1mega.rollout.vllm_groups import SharedPasses
from r1mega.rollout.work_sharing import NOBODY, SharedGroups
from r1mega.types import Prompt
from tests.dist.launch import launch

SHORT = 3.0
PROMPT = Prompt("p", "q", ("1",), "math", None, (1,))


class SlowOnRankOne:
    """Stands where the generator and its rewards are; rank 1 takes `seconds`."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def open(self, prompt, seed, born, slot, owner, index):
        return OpenGroup(index, prompt, seed, born, slot, owner, [])

    def holds(self, step, seed):
        return False

    def sample(self, groups, policy_version, more):
        if dist.get_rank() == 1:
            time.sleep(self._seconds)
        return [group.closed(policy_version) for group in groups]


def collect(seconds: float, step: int) -> int:
    """A step's rollout by the stage's own collector; the number of groups of this rank."""
    from r1mega.data.cursor import PromptCursor
    from r1mega.rollout.groups import GroupCollector

    config = SimpleNamespace(
        seed=1, rollout=RolloutConfig(num_prompts=6),
        algorithm=SimpleNamespace(dynamic_sampling=SimpleNamespace(enabled=False)),
    )  # fmt: skip
    return len(GroupCollector(SlowOnRankOne(seconds), range(6), PromptCursor(6, 0), config).collect(step).groups)


def error_of(function) -> str:
    try:
        with groups.peers_named():
            function()
    except (StragglerError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def a_slow_rollout() -> dict[str, object]:
    """Twice as long as a collective may take, within what a rollout may take; then a collective as slow as that."""
    from r1mega.checkpoint.workers import TorchWorkers

    groups.init_distributed(TimeoutsConfig(collective_seconds=SHORT, rollout_seconds=61, checkpoint_seconds=62))
    made = {"world": dist.group.WORLD, "checkpoint": TorchWorkers()._group}
    options = {name: group._get_backend(torch.device("cpu")).options for name, group in made.items()}
    found: dict[str, object] = {"limits": {name: o._timeout.total_seconds() for name, o in options.items()}}
    found["groups"] = collect(2 * SHORT, 1)
    groups.wait_for_all("rollout", "the keys of the wait before")
    store = dist.distributed_c10d._get_default_store()
    found["left behind"] = [
        f"{n}/{rank}" for n in (1, 2) for rank in range(2) if store.check([f"r1mega/wait/{n}/{rank}"])
    ]
    if dist.get_rank() == 1:
        time.sleep(2 * SHORT)
    found["collective"] = error_of(lambda: dist.all_reduce(torch.zeros(1)))
    return found


def a_leader_and_a_helper_that_are_slow() -> list[object]:
    """Each in turn works longer than a collective may take."""
    groups.init_distributed(TimeoutsConfig(collective_seconds=SHORT, rollout_seconds=61))

    def work(items):
        time.sleep((SHORT + 1) * (dist.get_rank() == 1))
        return list(items)

    def make(deal):
        time.sleep(SHORT + 1)  # a file that rank 0 reads alone
        return deal(work, [1, 2, 3])

    return groups.lead(make, (work,))


def test_work_of_the_first_rank_may_take_longer_than_a_collective():
    assert launch(a_leader_and_a_helper_that_are_slow, 2, timeout_seconds=600) == [[1, 2, 3]] * 2


def a_rollout_that_takes_too_long() -> str:
    groups.init_distributed(TimeoutsConfig(rollout_seconds=SHORT))
    import r1mega.data.cursor  # seconds that are none of the rollout
    import r1mega.rollout.groups  # noqa: F401

    groups.wait_for_all("startup", "the imports")
    time.sleep(2 * SHORT if dist.get_rank() == 1 else SHORT / 2)
    groups.wait_for_all("rollout", "a part that took longer than SHORT, and as long as others' parts do")
    time.sleep(SHORT / 2)  # an update, which is no part of the rollout either
    text = error_of(lambda: collect(2 * SHORT, 7))
    store = dist.distributed_c10d._get_default_store()  # rank 0 keeps it: it stays until the others have looked
    store.set(f"said/{dist.get_rank()}", "")
    if dist.get_rank() == 0:
        store.wait([f"said/{rank}" for rank in range(3)], timedelta(seconds=120))
    return text


def a_rank_that_ends() -> str:
    """It has taken one of four groups: the others go on, until they wait for it."""
    groups.init_distributed(TimeoutsConfig(rollout_seconds=600))
    open_groups = [OpenGroup(0, PROMPT, 1, 1, slot, NOBODY, []) for slot in range(4)]
    shared = SharedGroups(open_groups, "work/1", groups.GeneratorPlace.of_this_rank(1), None)
    if dist.get_rank() == 1:
        shared()
    groups.wait_for_all("startup", "one is taken")
    if dist.get_rank() == 1:
        return ""
    slots = [group.slot for taken in iter(shared, []) for group in taken]
    waited = error_of(lambda: groups.wait_for_all("rollout", "the rollout of step 7"))
    return f"{slots} {waited}\n{error_of(lambda: dist.all_reduce(torch.zeros(1)))}\n{error_of(lambda: torch.zeros(2) @ torch.zeros(3))}"


def test_a_rollout_may_take_longer_than_a_collective():
    for found in launch(a_slow_rollout, 2, timeout_seconds=600):
        assert found["limits"] == {"world": SHORT, "checkpoint": 62}
        assert found["groups"] == 3
        assert found["left behind"] == []
        assert found["collective"].startswith(
            "StragglerError: another rank ended, or did not answer in time, while this one was in "
        )


def test_a_rank_that_is_waited_for_in_vain_is_named():
    first, slow, last = launch(a_rollout_that_takes_too_long, 3, timeout_seconds=600)
    for text in (first, last):
        assert text.startswith("StragglerError: the rollout of step 7: waited for rank 1 (")
        assert "raise timeouts.rollout_seconds (3" in text  # on a loaded machine ", for which 10 times ..." follows
    assert "the rollout of step 7" in slow


def test_the_limit_that_ran_out_is_named():
    """Also where it followed the work: to raise the config's to less than that would change nothing."""
    text = groups._absent_text("rollout", "the rollout", [3], timedelta(seconds=60_000), "Timed out")
    assert (
        "raise timeouts.rollout_seconds (21600, for which 10 times what this rank's own part took, 60000 s, stood in) above"
        in text
    )
    assert text.endswith("above 60000")
    text = groups._absent_text("rollout", "the rollout", [3], timedelta(seconds=21_600), "Timed out")
    assert text.endswith("raise timeouts.rollout_seconds (21600)")


def test_a_rank_that_ends_is_noticed_at_once():
    first, _ = launch(a_rank_that_ends, 2, timeout_seconds=600)  # of the 600 that it would wait
    waited, communicated, multiplied = first.splitlines()
    assert waited.startswith("[1, 2, 3] StragglerError: the rollout of step 7: waited for rank 1 (")
    assert communicated.startswith(
        "StragglerError: another rank ended, or did not answer in time, while this one was in "
    )
    assert multiplied.startswith("RuntimeError: inconsistent tensor size"), "an error of its own"


def a_disk_that_is_full_for_the_first() -> list[str]:
    """Where the others wait for what it prepares; then what they may go on with."""
    from r1mega.stages.runtime import Runtime

    groups.init_distributed()
    here = SimpleNamespace(is_main=dist.get_rank() == 0)

    def fail() -> None:
        raise OSError(28, "No space left on device", "RUN_DIR/config.yaml")

    found = []
    for make in (fail, lambda: 3):
        try:
            found.append(repr(Runtime.broadcast(here, make)))
        except OSError as error:
            found.append(str(error))
    return found


def test_a_file_of_the_first_rank_is_the_error_of_all():
    """Else the launcher names whoever lost the connection to it."""
    told = ["[Errno 28] No space left on device: 'RUN_DIR/config.yaml'", "3"]
    assert launch(a_disk_that_is_full_for_the_first, 2) == [told, told]


def a_store_that_is_gone_once_all_came(of_rank: int) -> str:
    groups.init_distributed()
    store = dist.distributed_c10d._get_default_store()

    class Gone:
        set, check = store.set, store.check

        def delete_key(self, _name: str) -> None:
            raise dist.DistNetworkError("Connection reset by peer")

    if dist.get_rank() == of_rank:
        dist.distributed_c10d._get_default_store = Gone
    groups.wait_for_all("startup", "the end")
    return "all came"


def test_who_has_waited_for_all_needs_no_store_any_more():
    """Rank 0, which keeps it, may end as soon as all came."""
    assert launch(a_store_that_is_gone_once_all_came, 2, 1) == ["all came"] * 2


def passes_that_are_shared() -> list[object]:
    groups.init_distributed()
    rank, gone = dist.get_rank(), dist.new_group(timeout=timedelta(seconds=SHORT), backend="gloo")
    passes = SharedPasses(gone, [0, 1])
    found: list[object] = [passes.go_on(rank == 0), passes.go_on(False)]
    found.append(passes.tell_failure() if rank else passes.go_on(True))
    if rank == 0:
        found.append(error_of(lambda: passes.go_on(True)))
    groups.wait_for_all("startup", "the end")
    return found


def test_generators_that_share_passes_name_those_that_do_not_come():
    waited, absent = launch(passes_that_are_shared, 2)
    assert waited[:3] == [(True, None), (False, None), (True, 1)] and absent == [(True, None), (False, None), None]
    assert waited[3].startswith("StragglerError: the generators of ranks 0, 1 share experts")
    assert "raise timeouts.rollout_seconds" in waited[3]
