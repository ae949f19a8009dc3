"""Kept ids beside ties of the last one: which are told, when that is an error, and what its advice does. What they take in the making."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from r1mega.config.load import load_config
from r1mega.errors import GenerationError
from r1mega.observe.run import RunDirectory
from r1mega.rollout.kept import KeptLists, check_kept, kept_ids, kept_width
from r1mega.rollout.transformers_engine import sampling_log_probs
from r1mega.types import KeptIds, SamplingSettings

VOCABULARY = 5000


def told(logits: torch.Tensor, sampling: SamplingSettings) -> list[int]:
    """As the vLLM engine reads them, and as the one of transformers counts them: of logits, cut as on a CPU."""
    log_probs = sampling_log_probs(logits[None], sampling)[0]
    check_kept(int(log_probs.isfinite().sum()), sampling, len(logits))
    values, ids = log_probs.topk(kept_width(sampling, len(logits)))
    return kept_ids(ids.int().numpy(), values.numpy(), sampling, len(logits)).tolist()


@pytest.mark.parametrize(
    ("top_k", "likely", "tied"), [(1, [], [7, 4000]), (2, [3], [7, 40, 4000]), (2, [], [40, 7, 4000]), (1, [], [3])]
)
def test_ids_as_likely_as_the_last_of_few_are_all_told(top_k, likely, tied):
    """Logits in bfloat16 have a thousand values: ties of the last one are ordinary."""
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)).clamp(max=4)
    logits[likely], logits[tied] = 6.0, 5.0
    assert told(logits, SamplingSettings(top_k=top_k, max_kept=1024)) == sorted(likely + tied)


def test_nothing_is_missing_where_the_whole_vocabulary_is_told():
    assert told(torch.zeros(60), SamplingSettings(top_k=2, max_kept=3)) == list(range(60))


@pytest.mark.parametrize(("cut", "binds"), [({"top_k": 5}, "top_k = 5"), ({}, "max_kept_ids = 1024")])
def test_what_the_error_about_more_than_there_is_room_for_advises(tmp_path, cut, binds):
    """A run that ended with it goes on with the key that it names."""

    def config(**keys):
        overrides = [f"rollout.{key}={value}" for key, value in {"top_p": 0.9, **cut, **keys}.items()]
        file = Path(__file__).parents[3] / "configs/nano/zero.yaml"
        return load_config(file, [f"run_dir={tmp_path}", *overrides])

    (tmp_path / "checkpoints").mkdir()
    RunDirectory(tmp_path).write_config(config().model_dump(mode="json"))
    keys: dict[str, str] = {}
    for ended in range(4):
        resumed = config(**keys)
        RunDirectory(tmp_path).check_config(resumed.model_dump(mode="json"))
        assert not [problem for problem in resumed.problems({}, 1) if "kept" in problem]
        sampling = SamplingSettings(top_k=resumed.rollout.top_k, max_kept=resumed.rollout.max_kept_ids)
        try:
            assert told(torch.zeros(VOCABULARY), sampling) == list(range(VOCABULARY)) and ended
            return
        except GenerationError as error:
            assert f"rollout.{binds} allows" in str(error) or keys
            keys = dict(re.findall(r"Set rollout\.(\w+)=(\d+)", str(error)))
    raise AssertionError("the advice does not help")


def test_lists_in_the_making_take_four_bytes_an_id_and_four_a_token():
    ids = [np.arange(n % 5 + 1) * 3 for n in range(20000)]
    tracemalloc.start()
    lists = KeptLists()
    for one in ids:
        lists.add(one)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 1.2 * 4 * (20000 + sum(map(len, ids)))  # room to grow
    found, wanted = lists.finished(), KeptIds.of(ids)
    assert found.counts.dtype == found.ids.dtype == np.int32
    assert np.array_equal(found.counts, wanted.counts) and np.array_equal(found.ids, wanted.ids)


@pytest.mark.parametrize("num_kept", [1, 2, 37, 1024, 1025, 2047])
def test_what_was_cut_is_told_from_what_was_not(num_kept):
    numbers = np.random.default_rng(num_kept)
    ids = numbers.permutation(VOCABULARY)[:2048].astype(np.int32)
    log_probs = np.sort(numbers.normal(size=2048).astype(np.float32))[::-1].copy()
    log_probs[num_kept:] = -np.inf
    found = kept_ids(ids, log_probs, SamplingSettings(max_kept=1024), VOCABULARY)
    assert found.dtype == np.int32 and np.array_equal(found, np.sort(ids[:num_kept]))
