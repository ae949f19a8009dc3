"""The retry of the probe: a fault on all sequences stops the run, one that other sequences do not show does not."""

import pytest
import torch

from r1mega.config.schema import WeightsConfig
from r1mega.errors import WeightSyncError
from r1mega.types import Response
from r1mega.weights.verify import made_up_sequences


class Policy:
    """log-prob of every token: -1."""

    def __init__(self, dtype):
        self.dtype, self.fp8 = dtype, False

    def hf_tensors(self):
        yield "lm_head.weight", torch.ones(2, 2)

    def sequence_log_probs(self, sequences):
        return [[-1.0] * (len(sequence) - 1) for sequence in sequences]


class Engine:
    """Answers as the policy does, but for sequences that begin with a bad token."""

    def __init__(self, bad):
        self.bad = bad

    def update_weights(self, tensors):
        from r1mega.weights.digest import tensor_digest

        self.digest = {name: tensor_digest(tensor) for name, tensor in tensors}

    def weights_digest(self):
        return self.digest

    def wake_up(self):
        pass

    def prompt_log_probs(self, sequences):
        return [tuple(-1.5 if s[0] in self.bad else -1.0 for _ in s[1:]) for s in sequences]

    def generate(self, requests):
        return [(Response((9,) * r.sampling.max_tokens, (-1.0,) * r.sampling.max_tokens, "length"),) for r in requests]


def push(bad, dtype=torch.float32, count=2):
    from r1mega.weights.sync import WeightSync

    sequences = [[first, 7, 8, 9, 9, 9] for first in (1, 2, 3, 4, 5)]
    config = {"vocab_size": 40}
    return WeightSync(Policy(dtype), Engine(bad), WeightsConfig(probe_sequences=count), config, sequences).push()


def test_agreement():
    assert push(bad=()) == {"weights/probe_diff_max": 0.0, "weights/probe_outlier_fraction": 0.0}


def test_a_difference_that_other_sequences_do_not_show_is_a_warning(caplog):
    assert push(bad=(1,)) == {"weights/probe_diff_max": 0.0, "weights/probe_outlier_fraction": 0.0}
    assert "probing again" in caplog.text


def test_a_difference_everywhere_stops_the_run():
    with pytest.raises(WeightSyncError, match="does not compute what the trainer computes"):
        push(bad=(1, 2, 3, 4, 5))


def test_what_the_policy_said_is_asked_once_while_it_is_the_same(monkeypatch):
    """Of a push that is made again; one of new weights asks anew. What was said before is still what counts."""
    from r1mega.weights.sync import WeightSync

    asked = []

    def answers(policy, sequences):
        asked.append(len(sequences))
        return [[policy.said] * (len(sequence) - 1) for sequence in sequences]

    monkeypatch.setattr(Policy, "sequence_log_probs", answers)
    monkeypatch.setattr(Policy, "said", -1.0, raising=False)
    policy = Policy(torch.float32)
    sync = WeightSync(
        policy, Engine(()), WeightsConfig(probe_sequences=2), {"vocab_size": 40}, [[i, 7, 8, 9, 9] for i in range(5)]
    )
    sync.push(again=True)
    assert asked == [2, 2], "there was none before it"
    policy.said = -1.5
    sync.push(again=True)
    assert asked == [2, 2]
    with pytest.raises(WeightSyncError, match="does not compute what the trainer computes"):
        sync.push()
    assert asked == [2, 2, 2, 2]


def test_in_bfloat16_a_tenth_of_the_log_probs_may_be_off(caplog):
    """16 made-up sequences: few of them may be off, and no second try is wanted."""
    first = [sequence[0] for sequence in made_up_sequences([6] * 32, 40, seed=0)][:16]
    rare = next(token for token in first if first.count(token) == 1)
    metrics = push(bad=(rare,), dtype=torch.bfloat16, count=None)
    assert metrics == {"weights/probe_diff_max": 0.5, "weights/probe_outlier_fraction": 1 / 16}
    assert "probing again" not in caplog.text


def test_in_bfloat16_a_fifth_may_not():
    with pytest.raises(WeightSyncError, match=r"differ by more than 0\.15, where 10% may"):
        push(bad=range(0, 40, 4), dtype=torch.bfloat16, count=None)
