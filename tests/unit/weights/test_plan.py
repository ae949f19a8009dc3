"""The reshard plan against brute force over element numbers, for layouts that hypothesis draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1mega.config.layout import num_experts
from r1mega.errors import ConfigError
from r1mega.weights.plan import GeneratorLayout, Plan
from r1mega.weights.trainer_layout import TrainerLayout, pipeline_stages
from tests.reference import Layout
from tests.unit.weights.brute_force import BLOCKS, DENSE, MODELS, MOE, execute, lower_bound, number_elements


@st.composite
def cases(draw):
    """(config, trainer layout, generator layout, bucket bytes, ranks a node)."""
    name = draw(st.sampled_from(sorted(MODELS)))
    config, world = MODELS[name], draw(st.sampled_from([1, 2, 4, 8]))
    powers = [size for size in (1, 2, 4, 8) if size <= world]
    pp = draw(st.sampled_from([p for p in powers if p <= 4]))
    tp = draw(st.sampled_from([t for t in powers if t * pp <= world and t <= 4]))
    cp = draw(st.sampled_from([c for c in powers if c * tp * pp <= world]))
    moe = num_experts(config) > 0
    ep = draw(st.sampled_from([e for e in powers if e * pp <= world])) if moe else 1
    etp = draw(st.sampled_from([e for e in powers if e * ep * pp <= world])) if moe else 1
    layers = config["num_hidden_layers"]
    if draw(st.booleans()):
        vpp = draw(st.sampled_from([None, *([2] if 1 < pp <= layers // 2 else [])]))
        stages = pipeline_stages(Layout(pp=pp, vpp=vpp), layers)
    else:  # uneven, in order; stages may be empty but for the first and the last
        stages = tuple(sorted(draw(st.lists(st.integers(0, pp - 1), min_size=layers, max_size=layers))))
    further = draw(st.sampled_from([None, pp - 1, max(pp - 2, stages[-1])]))  # layers of multi-token prediction
    trainer = TrainerLayout(world, tp, ep, etp, pp, cp, stages, config["tie_word_embeddings"], further)
    gtp = draw(st.sampled_from([t for t in powers if t <= 8 and config["num_attention_heads"] % t == 0]))
    gep = draw(st.sampled_from([1, *(e for e in powers if e > 1 and e % gtp == 0)])) if moe else 1
    bucket_bytes = draw(st.integers(64, 8192))
    return config, trainer, GeneratorLayout(world, gtp, gep), bucket_bytes, draw(st.sampled_from([None, *powers]))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_every_element_comes_once_from_the_right_place_at_the_lower_bound(case):
    config, trainer, generator, bucket_bytes, per_node = case
    plan = Plan(config, trainer, generator, model_dtype=torch.bfloat16, bucket_bytes=bucket_bytes,
                ranks_per_node=per_node)  # fmt: skip
    elements = number_elements(config, fp8=False)
    outcome = execute(config, plan, elements)
    assert outcome.problems == []
    received = outcome.received.sum(dim=0).tolist()
    assert received == [lower_bound(config, plan, elements, rank) for rank in range(trainer.world)]
    assert int(outcome.sent.max()) <= bucket_bytes
    assert int(outcome.received.max()) <= bucket_bytes


@pytest.mark.parametrize(("trainer", "generator"), [
    (TrainerLayout(4, 2, 2, 1, 1, 1, (0, 0)), GeneratorLayout(4, 2, fp8=True)),
    (TrainerLayout(4, 1, 2, 2, 1, 1, (0, 0)), GeneratorLayout(4, 2, 4, fp8=True)),
    (TrainerLayout(4, 1, 1, 1, 2, 2, (0, 1)), GeneratorLayout(4, 4, 4, fp8=True)),
])  # fmt: skip
def test_block_quantised_weights_and_their_scales(trainer, generator):
    config = BLOCKS | {"num_attention_heads": 8 if generator.tp == 4 else 4}
    plan = Plan(config, trainer, generator, model_dtype=torch.bfloat16, bucket_bytes=1 << 16)
    elements = number_elements(config, fp8=True)
    assert any(name.endswith("w2_weight_scale_inv") for name in (c.overlap.target_parameter for c in plan.copies(0)))
    outcome = execute(config, plan, elements)
    assert outcome.problems == []
    bounds = [lower_bound(config, plan, elements, rank) for rank in range(trainer.world)]
    assert outcome.received.sum(dim=0).tolist() == bounds


def test_a_layout_that_cuts_through_a_block_is_refused():
    config = BLOCKS | {"moe_intermediate_size": 192}
    with pytest.raises(ConfigError, match="FP8 block"):
        Plan(config, TrainerLayout(2, 1, 1, 2, 1, 1, (0, 0)), GeneratorLayout(2, fp8=True), model_dtype=torch.bfloat16,
             bucket_bytes=1 << 20)  # fmt: skip


def test_replicas_share_the_sending():
    """8 replicas of each stage: within a stage no rank sends more than another by more than one piece."""
    trainer = TrainerLayout(16, 1, 1, 1, 2, 1, (0, 0, 1, 1))
    plan = Plan(DENSE, trainer, GeneratorLayout(16, 2), model_dtype=torch.bfloat16, bucket_bytes=256)
    sent, piece = torch.zeros(16, dtype=torch.int64), 0
    for route in plan.routes():
        for source, target in zip(route.sources, route.targets, strict=True):
            if source != target:
                sent[source] += route.num_bytes
                piece = max(piece, route.num_bytes)
    for stage in (sent[:8], sent[8:]):
        assert int(stage.min()) > 10 * piece
        assert int(stage.max() - stage.min()) <= piece


def test_sources_are_of_the_same_node_where_there_are_any():
    """Stages on a node each hold nothing of each other's; expert replicas are one on each node."""
    trainer = TrainerLayout(8, 2, 2, 1, 1, 1, (0,) * 4)  # tp inside of pairs, experts repeated 4 times
    plan = Plan(MOE, trainer, GeneratorLayout(8), model_dtype=torch.bfloat16, bucket_bytes=4096, ranks_per_node=2)
    copies = [copy for copy in plan.copies() if copy.source != copy.target]
    assert copies and all(copy.source // 2 == copy.target // 2 for copy in copies)


def test_one_rank_sends_nothing_and_equal_layouts_keep_everything():
    for trainer, generator in ((TrainerLayout(1, 1, 1, 1, 1, 1, (0,) * 4), GeneratorLayout(1)),
                               (TrainerLayout(4, 1, 1, 1, 1, 2, (0,) * 4), GeneratorLayout(4, 2))):  # fmt: skip
        plan = Plan(MOE, trainer, generator, model_dtype=torch.float32, bucket_bytes=1 << 20)
        assert all(copy.source == copy.target for copy in plan.copies())
        assert {copy.bucket for copy in plan.copies()} == {0}


def test_all_stages_send_in_most_buckets():
    """A pipelined trainer does not send one stage after the other."""
    trainer = TrainerLayout(8, 1, 1, 1, 4, 1, (0, 1, 2, 3))
    config = MOE | {"first_k_dense_replace": 0}
    plan = Plan(config, trainer, GeneratorLayout(8), model_dtype=torch.bfloat16, bucket_bytes=2048)
    stages: dict[int, set[int]] = {}
    for copy in plan.copies():
        if copy.source != copy.target:
            stages.setdefault(copy.bucket, set()).add(copy.source // 2)
    busy = sum(len(found) == 4 for found in stages.values())
    assert len(stages) > 10 and busy >= 0.7 * len(stages), (busy, len(stages))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TrainerLayout(6, 4, 1, 1, 1, 1, (0,) * 4), "6 processes cannot be divided by tp"),
    (lambda: TrainerLayout(4, 1, 8, 1, 1, 1, (0,) * 4), "ep \\* etp \\* pp = 8"),
    (lambda: GeneratorLayout(4, 3), "rollout.tp"),
    (lambda: GeneratorLayout(8, 4, 2), "rollout.ep = 2"),
    (lambda: pipeline_stages(Layout(pp=16), 61), "num_hidden_layers = 61"),
    (lambda: Plan(MOE, TrainerLayout(16, 1, 1, 16, 1, 1, (0,) * 4), GeneratorLayout(16), model_dtype=torch.float32,
                  bucket_bytes=1024), "does not divide"),
])  # fmt: skip
def test_impossible_layouts_say_which_number(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
