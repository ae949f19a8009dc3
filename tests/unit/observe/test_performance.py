"""Rates of a step by hand."""

import pytest

from r1mega.observe.performance import performance, stragglers


def test_rates_by_hand():
    metrics = {"tokens/rollout": 800, "perf/rollout_flops": 6e12, "tokens/update": 1000, "perf/update_flops": 24e12,
               "tokens/step": 1000, "perf/step_flops": 30e12}  # fmt: skip
    rates = performance(
        metrics, {"rollout": 4.0, "update": 2.0, "step": 10.0, "logprob": 0.0}, ranks=2, peak_tflops=100
    )
    expected = {
        "perf/rollout_tokens_per_second_per_gpu": 100.0, "perf/rollout_tflops_per_gpu": 0.75, "perf/rollout_mfu": 0.0075,
        "perf/update_tokens_per_second_per_gpu": 250.0, "perf/update_tflops_per_gpu": 6.0, "perf/update_mfu": 0.06,
        "perf/step_tokens_per_second_per_gpu": 50.0, "perf/step_tflops_per_gpu": 1.5, "perf/step_mfu": 0.015,
    }  # fmt: skip
    assert rates == pytest.approx(expected)


def test_what_is_not_known_is_not_made_up():
    metrics = {"tokens/logprob": 0.0, "perf/logprob_flops": 0.0, "tokens/update": 10, "perf/update_flops": 1e12}
    rates = performance(metrics, {"logprob": 0.5, "update": 1.0}, ranks=1, peak_tflops=None)
    assert rates.pop("perf/update_tflops_per_gpu") == 1.0 and rates.pop("perf/update_tokens_per_second_per_gpu") == 10
    assert set(rates.values()) == {None} and set(rates) == {
        "perf/update_mfu", "perf/logprob_mfu", "perf/logprob_tflops_per_gpu", "perf/logprob_tokens_per_second_per_gpu"
    }  # fmt: skip
    assert performance({"eval/accuracy": 1.0}, {}, ranks=1, peak_tflops=None) == {}


def test_the_slowest_rank_of_each_phase_by_hand():
    found = stragglers({"rollout": [2.0, 1.0, 9.0, 3.0], "update": [4.0, 4.0, 4.0, 4.0], "reward": [0.0] * 4})
    assert found == {
        "straggler/rollout_worst_rank": 2, "straggler/rollout_worst_seconds": 9.0, "straggler/rollout_median_seconds": 2.5,
        "straggler/update_worst_rank": 0, "straggler/update_worst_seconds": 4.0, "straggler/update_median_seconds": 4.0,
    }  # fmt: skip
    assert stragglers({"rollout": [2.0]}) == {}
