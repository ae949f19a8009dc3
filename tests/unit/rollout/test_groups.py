"""Collecting groups: which are kept, what is refilled, and that nothing sampled is lost to the metrics."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from r1mega.config.schema import RolloutConfig
from r1mega.config.stages.rl import AlgorithmConfig
from r1mega.data.cursor import PromptCursor
from r1mega.platform import groups
from r1mega.platform.groups import GeneratorPlace
from r1mega.rollout.groups import GroupCollector, carry_signal
from r1mega.rollout.open_groups import OpenGroup
from r1mega.rollout.sampler import request_seed
from r1mega.rollout.work_sharing import NOBODY, WorkSharing
from r1mega.stages.rl_metrics import group_metrics
from r1mega.train.sample_exchange import SampleExchange
from r1mega.train.sample_plan import RankPlace, Routing
from r1mega.train.samples import training_samples
from r1mega.types import Prompt, Response, Reward, RewardStatus, RolloutGroup
from tests.dist.launch import launch

PROMPTS = [Prompt(str(i), f"q{i}", ("1",), "math", None, (i,)) for i in range(20)]


class Samples:
    """Stands where the generator is: prompt i is answered right by as many of its two samples as `right(i)` says."""

    def __init__(self, right):
        self.right, self.seeds = right, []

    def open(self, prompt, seed, born, slot, owner, index):
        return OpenGroup(index, prompt, seed, born, slot, owner, [])

    def holds(self, step, seed):
        return False

    def sample(self, groups, policy_version, more):
        groups = list(groups)
        while more is not None and (taken := more()):
            groups += taken
        self.seeds += [group.seed for group in groups]
        return [self.group(g.prompt, policy_version, g.slot) for g in sorted(groups, key=lambda group: group.slot)]

    def group(self, prompt, policy_version, slot):
        values = [float(n < self.right(int(prompt.id))) for n in range(2)]
        rewards = tuple(Reward(value, {"accuracy": value}, RewardStatus.OK) for value in values)
        responses = (Response((5, 6, 7), (0.0,) * 3, "stop"),) * 2
        return RolloutGroup(prompt, responses, ("", ""), rewards, policy_version, slot)


def collector(right, *, enabled, max_rounds=4, tp=1):
    config = SimpleNamespace(
        seed=1, rollout=RolloutConfig(num_prompts=4, group_size=2, max_num_seqs=2, tp=tp),  # one group; the others are shared
        algorithm=SimpleNamespace(dynamic_sampling=SimpleNamespace(enabled=enabled, max_rounds=max_rounds)),
    )  # fmt: skip
    samples = Samples(right)
    return GroupCollector(samples, PROMPTS, PromptCursor(len(PROMPTS), 0), config), samples


def figures(rollout):
    return group_metrics(rollout.sampled, contributes=rollout.is_first) | rollout.metrics()


def test_without_dynamic_sampling_all_groups_are_kept(alone):
    groups, _ = collector(lambda i: 0, enabled=False)
    rollout = groups.collect(1)
    assert len(rollout.groups) == 4
    assert figures(rollout)["group/no_signal_fraction"] == 1.0


def test_groups_without_signal_are_replaced_and_still_counted(alone):
    """Every third prompt is solved by one of two samples, the others by both: accuracy is that of all that was sampled."""
    groups, samples = collector(lambda i: 1 if i % 3 == 0 else 2, enabled=True, max_rounds=20)
    rollout = groups.collect(1)
    assert len(rollout.groups) == 4 and all(int(group.prompt.id) % 3 == 0 for group in rollout.groups)
    drawn = PromptCursor(len(PROMPTS), 0).draw(len(rollout.sampled))
    assert [int(group.prompt.id) for group in rollout.sampled] == drawn
    assert len(set(samples.seeds)) == len(drawn) > 4
    expected = sum(0.5 if i % 3 == 0 else 1.0 for i in drawn) / len(drawn)
    measured = figures(rollout)
    assert measured["reward/accuracy"] == pytest.approx(expected)
    assert measured["group/num_sampled"] == len(drawn) and measured["tokens/rollout"] == 6 * len(drawn)
    assert measured["group/no_signal_fraction"] == pytest.approx(1 - 4 / len(drawn))
    assert len(groups.collect(2).sampled) < len(PROMPTS)  # of its own step only


@pytest.mark.parametrize(("values", "carries"), [
    ((1.0, 1.0 + 1e-8, 1.0), False), ((0.3, 0.3 + 1e-6), True), ((-2.0, -2.0 + 1e-7), False), ((0.0, 1e-7), True),
    ((0.0, 0.0), False), ((0.5, None), False), ((None,), False), ((), False),
])  # fmt: skip
def test_the_rounding_of_a_reward_model_is_no_signal(values, carries):
    rewards = [None if value is None else Reward(value, {}, RewardStatus.OK) for value in values]
    assert carry_signal([*rewards, Reward(None, {}, RewardStatus.FAILED)]) is carries


def ranks_sample(tp, steps=3):
    """This rank's part of dynamic sampling over all ranks; what every rank trains on."""
    groups.init_distributed()
    config = AlgorithmConfig(normalize_std=False)
    collecting, _ = collector(lambda i: 1 if i % 3 == 0 else 2, enabled=True, max_rounds=20, tp=tp)
    exchange = SampleExchange([RankPlace(rank // tp, rank) for rank in range(dist.get_world_size())], Routing())
    found = []
    for step in range(1, steps + 1):
        rollout = collecting.collect(step)
        everything = exchange.index(training_samples(rollout.groups, config))
        everything.fetch([range(len(everything))] * dist.get_world_size())
        samples = [everything[place] for place in range(len(everything))]
        found.append([(s.slot, s.prompt_length, s.token_ids.tolist(), s.advantage) for s in samples])
    return found


@pytest.mark.heavy
def test_dynamic_sampling_trains_on_the_same_samples_over_any_number_of_ranks():
    (alone_,), *several = (launch(ranks_sample, *ranks) for ranks in ((1, 1), (4, 2), (3, 1)))
    assert all(len({slot for slot, *_ in step}) == 4 for step in alone_)
    for ranks in several:
        assert all(found == alone_ for found in ranks)


def test_what_a_generator_goes_on_with_takes_its_seats(alone):
    """After a kill: of two generators with a seat for one group each the first has two on disk; the last of the other's block is anyone's."""
    sampling, samples = collector(lambda i: 1, enabled=False)
    held = {request_seed(1, 1, slot) for slot in (0, 1)}
    sampling._place = GeneratorPlace(0, 2, True)
    sampling._work = WorkSharing(sampling._config.rollout, sampling._place, lambda step, seed: seed in held)
    sampling._sample_round(1, 0, 4)
    assert [group.slot for group in sampling._work._shared.groups] == [3]
    assert samples.seeds == [request_seed(1, 1, slot) for slot in (0, 1, 3)]  # it took that one, for nobody else did


@pytest.mark.parametrize("held", [(), (2, 3), (3,), (0, 2), (0, 1, 2, 3)])
def test_groups_that_a_kill_interrupted_are_made_where_they_would_have_been(alone, held):
    """Where all have seats: whatever was on disk. Else the ranks train on others, and add up their gradients in another order."""
    sampling, samples = collector(lambda i: 1, enabled=False)
    sampling._config.rollout = RolloutConfig(num_prompts=4, group_size=2, max_num_seqs=8)
    sampling._place = GeneratorPlace(0, 2, True)
    sampling._work = WorkSharing(sampling._config.rollout, sampling._place, lambda step, seed: False)
    sampling._work.holders = lambda step, seeds: [slot // 2 if slot in held else NOBODY for slot in range(4)]
    sampling._sample_round(1, 0, 4)
    assert samples.seeds == [request_seed(1, 1, slot) for slot in (0, 1)]


def test_it_gives_up_after_the_last_round(alone):
    groups, _ = collector(lambda i: 2, enabled=True, max_rounds=3)
    rollout = groups.collect(1)
    assert len(rollout.groups) == 4  # without signal: the step is still seen
    assert rollout.metrics() == {"group/num_sampled": 12.0, "group/num_rounds": 3.0}
