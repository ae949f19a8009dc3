"""A microbatch cut for a layout, against plain loops: nothing lost, nothing twice, causal order per sequence kept."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.train.packing import build_microbatch
from r1mega.train.shard import Cut, shard
from r1mega.types import KeptIds

samples = st.lists(
    st.tuples(st.lists(st.integers(1, 90), min_size=1, max_size=13), st.integers(1, 13)).map(
        lambda s: (s[0], min(s[1], len(s[0])))
    ),
    max_size=5,
)


@given(samples, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([1, 16]))
@settings(max_examples=120, deadline=None)
def test_parts_of_all_ranks_make_up_the_microbatch(drawn, cp, tp, sequence_parallel, align):
    token_ids = [ids for ids, _ in drawn]
    routing = [
        np.array([[[n, i]] for i in range(len(ids) - 1)], dtype=np.uint8).reshape(-1, 1, 2)
        for n, ids in enumerate(token_ids)
    ]
    lists = [[np.arange(t, t + (t + i) % 4) for i, t in enumerate(ids)][prompt:] for ids, prompt in drawn]
    kept_ids = [KeptIds.of(one) for one in lists]
    batch = build_microbatch(token_ids, [prompt for _, prompt in drawn], range(len(drawn)), routing, kept_ids)
    wanted = [ids.tolist() for one in lists for ids in one]
    found: dict[int, list[tuple[int, int, int]]] = {}
    rows: dict[int, tuple[int, int]] = {}
    kept = 0
    for cp_rank in range(cp):
        parts = [shard(batch, Cut(cp, cp_rank, tp, r, sequence_parallel, align)) for r in range(tp)]
        part = parts[0]
        lengths = part.cu_seqlens.diff().tolist()
        assert len(part.tokens) * cp == part.cu_seqlens[-1]
        assert len(part.tokens) % tp == 0
        assert all(length % (2 * cp) == 0 for length in lengths) or cp == 1
        # the zigzag, sequence by sequence: chunks r and 2 cp - 1 - r
        held = []
        for number, length in enumerate(lengths):
            chunk = length // (2 * cp) if cp > 1 else length
            chunks = (cp_rank, 2 * cp - 1 - cp_rank) if cp > 1 else (0,)
            held += [(number, c * chunk + i) for c in chunks for i in range(chunk)]
        padding = [p.padding for p in parts]
        whole = (
            torch.zeros(len(held), dtype=torch.bool)
            if padding[0] is None
            else torch.cat(padding)
            if sequence_parallel
            else padding[0]
        )
        routed = [p.routed_experts for p in parts]
        if drawn:
            routed = (torch.cat(routed) if sequence_parallel else routed[0]).tolist()
        for place, (number, position) in enumerate(held):
            assert part.positions[place] == position
            is_real = number < len(drawn) and position < len(token_ids[number])
            assert whole[place] == (not is_real)
            if drawn:  # choices go with their token; the last token and padding take the first experts
                has_choice = is_real and position < len(token_ids[number]) - 1
                assert routed[place] == [[number, position] if has_choice else [0, 1]]
            if is_real:
                kept += 1
                found.setdefault(number, []).append((position, int(part.tokens[place]), int(part.labels[place])))
        for row, at in zip(part.rows.tolist(), part.places.tolist(), strict=True):
            assert at not in rows
            number, position = held[row]
            rows[at] = (number, int(part.labels[row]))
            first, last = part.kept.offsets[row : row + 2].tolist()
            assert part.kept.ids[first:last].tolist() == wanted[at]
        if drawn:
            assert len(part.kept.offsets) == len(part.tokens) + 1
            assert cp > 1 or part.kept.ids is batch.kept_ids  # not copied where all rows are here
            assert len(part.kept.ids) == sum(len(wanted[at]) for at in part.places.tolist())
    assert kept == sum(map(len, token_ids))
    for number, ids in enumerate(token_ids):
        assert sorted(found[number]) == [(i, t, ([*ids, 0][i + 1])) for i, t in enumerate(ids)]
    expected = list(zip(batch.sequence_ids.tolist(), batch.targets.tolist(), strict=True))
    assert [rows[i] for i in range(len(expected))] == expected
    assert len(rows) == len(expected)


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 2), (4, 4)])
def test_every_length_gives_every_rank_what_fp8_wants_and_no_more_than_needed(cp, tp):
    """By brute force: the smallest row that zigzag and ranks divide, of which every rank has a multiple of 16."""
    for length in range(201):
        batch = build_microbatch([[1] * length] if length else [], [1] if length else [], range(bool(length)))
        span = next(n for n in itertools.count(max(length, 1)) if cp == 1 or n % (2 * cp) == 0)
        wanted = next(
            n
            for n in itertools.count(span)
            if n % (cp * tp) == 0 and n // (cp * tp) % 16 == 0 and (cp == 1 or n % (2 * cp) == 0)
        )
        for cp_rank, tp_rank in itertools.product(range(cp), range(tp)):
            part = shard(batch, Cut(cp, cp_rank, tp, tp_rank, sequence_parallel=tp > 1, align=16))
            assert len(part.tokens) * cp == part.cu_seqlens[-1] == wanted
            if part.padding is not None:
                assert len(part.padding) == wanted // (cp * tp)
            assert (part.padding is None) == (wanted == length)


def test_choices_among_more_than_256_experts():
    """Which the generator gives as uint16, of which torch knows little."""
    routed = np.array([[[383, 256]], [[7, 300]]], dtype=np.uint16)
    batch = build_microbatch([[1, 2, 3]], [1], [0], [routed])
    part = shard(batch, Cut(tp=2, sequence_parallel=True, align=2))
    assert part.routed_experts.long().tolist() == [[[383, 256]], [[7, 300]]]
