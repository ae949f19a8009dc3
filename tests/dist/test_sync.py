"""The proof of a push over several generators: all ranks probe again, or none."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.dist.launch import launch
from tests.unit.weights import test_sync


class Policy(test_sync.Policy):
    """Its forward pass is a collective call, as Megatron's is; it counts them."""

    calls = 0

    def sequence_log_probs(self, sequences):
        Policy.calls += 1
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == dist.get_world_size()
        return super().sequence_log_probs(sequences)


def push_where_one_generator_is_off() -> tuple[int, dict[str, float], float]:
    from r1mega.config.schema import WeightsConfig
    from r1mega.platform import groups
    from r1mega.weights.sync import WeightSync

    groups.init_distributed()
    bad = (1,) if dist.get_rank() == 1 else ()  # its first sequences show it, the further ones do not
    sequences = [[first, 7, 8, 9, 9, 9] for first in (1, 2, 3, 4, 5)]
    config = WeightsConfig(probe_sequences=2)
    metrics = WeightSync(Policy(torch.float32), test_sync.Engine(bad), config, {"vocab_size": 40}, sequences).push()
    after = torch.ones(1) * dist.get_rank()  # what comes next in a step: it meets its like
    dist.all_reduce(after)
    groups.destroy()
    return Policy.calls, metrics, float(after)


def test_a_generator_that_fails_alone_is_not_probed_alone():
    for calls, metrics, after in launch(push_where_one_generator_is_off, 2):
        assert calls == 2
        assert metrics == {"weights/probe_diff_max": 0.0, "weights/probe_outlier_fraction": 0.0}
        assert after == 1.0
