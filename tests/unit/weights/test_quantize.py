"""Blocks quantised where they are, against those of whole tensors, byte for byte."""

from __future__ import annotations

import random

import pytest
import torch

from r1mega.config.precision import generator_precision_problems
from r1mega.config.schema import ParallelConfig, RolloutConfig
from r1mega.errors import ConfigError
from r1mega.weights.digest import generator_digest, tensor_digest
from r1mega.weights.direct import owned_placements
from r1mega.weights.layout import generator_layout, tensor_shapes, weight_dtype
from r1mega.weights.plan import GeneratorLayout, Plan
from r1mega.weights.quantize import QuantizedParameters, quantized_parts, quantized_tensors
from r1mega.weights.trainer_layout import TrainerLayout
from tests.unit.weights.brute_force import BLOCKS, Elements, trainer_parameters

GROUPED = {
    "model_type": "qwen3", "vocab_size": 96, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
CASES = [
    (BLOCKS, TrainerLayout(4, 2, 2, 1, 1, 1, (0, 0)), GeneratorLayout(4, 2, fp8=True)),
    (BLOCKS, TrainerLayout(4, 1, 2, 2, 1, 1, (0, 0)), GeneratorLayout(4, 2, 2, fp8=True)),
    (BLOCKS, TrainerLayout(2, 1, 1, 1, 2, 1, (0, 1)), GeneratorLayout(2, fp8=True)),
    (GROUPED, TrainerLayout(2, 1, 1, 1, 1, 1, (0,), True), GeneratorLayout(2, 2, fp8=True)),
    (GROUPED, TrainerLayout(2, 2, 1, 1, 1, 1, (0,), True), GeneratorLayout(2, fp8=True)),
]


def weights(config) -> dict[str, torch.Tensor]:
    """Whole HF tensors in bfloat16 whose blocks have scales far apart."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, shape in tensor_shapes(config).items():
        rows = (10 * torch.rand(shape[0], generator=generator)).exp().view(-1, *[1] * (len(shape) - 1))
        value = torch.randn(shape, generator=generator) * rows
        made[name] = value.to(weight_dtype(name, torch.bfloat16))
    return made


@pytest.mark.parametrize(("config", "trainer", "generator"), CASES)
def test_what_arrives_are_the_bytes_of_the_quantised_checkpoint(config, trainer, generator):
    """Of every generator rank, and both digests of them; with room in the cache for two parameters at most."""
    whole = weights(config)
    published = dict(quantized_tensors(whole.items()))
    shapes = tensor_shapes(config, fp8=True)
    assert {name: tuple(tensor.shape) for name, tensor in published.items()} == shapes
    sources = [
        QuantizedParameters(
            trainer_parameters(config, trainer, rank, Elements(whole, torch.zeros(0))),
            quantized_parts(trainer, shapes, config, rank), cache_bytes=1 << 18,
        )
        for rank in range(trainer.world)
    ]  # fmt: skip
    layouts = [generator_layout(config, generator.place(rank)) for rank in range(trainer.world)]
    targets = [allocate(places) for places in layouts]
    plan = Plan(config, trainer, generator, model_dtype=torch.bfloat16, bucket_bytes=1 << 16)
    for copy in plan.copies():
        one, source = copy.overlap, sources[copy.source]
        assert source.shape(one.source_parameter) == tuple(source[one.source_parameter].shape)
        part = source[one.source_parameter][tuple(slice(*span) for span in one.source)]
        held = targets[copy.target][one.target_parameter][tuple(slice(*span) for span in one.target)]
        held.copy_(part.view(held.shape))
        assert part.nbytes == one.num_bytes
    for places, parameters in zip(layouts, targets, strict=True):
        for place in places:
            expected = published[place.name][tuple(slice(*span) for span in place.source)]
            assert bits(place.read(parameters)) == bits(expected), place.name
    expected = {name: tensor_digest(tensor) for name, tensor in published.items()}
    assert summed(trainer, sources, shapes, config) == expected
    for name, value in expected.items():
        ranks = [
            generator_digest(places, parameters).get(name, 0)
            for places, parameters in zip(layouts, targets, strict=True)
        ]
        one = ranks[: generator.tp] if is_divided(name, layouts) else ranks[:1]
        assert sum(one) % 2**64 == value, name


def is_divided(name: str, layouts) -> bool:
    return not all(any(place.name == name and place.is_whole for place in places) for places in layouts)


def allocate(places) -> dict[str, torch.Tensor]:
    """Room for a rank's parameters."""
    extents, dtypes = {}, {}
    for place in places:
        stops = [stop for _, stop in place.target]
        extents[place.parameter] = [max(pair) for pair in zip(extents.get(place.parameter, stops), stops, strict=True)]
        dtypes[place.parameter] = weight_dtype(place.name, torch.bfloat16, True)
    return {name: torch.zeros(extent, dtype=dtypes[name]) for name, extent in extents.items()}


def summed(trainer, sources, shapes, config) -> dict[str, int]:
    """The trainer's digest: each rank's share, added up."""
    total = dict.fromkeys(shapes, 0)
    for rank, source in enumerate(sources):
        for place in owned_placements(trainer, shapes, config, rank):
            total[place.name] = (total[place.name] + tensor_digest(place.read(source), place.source)) % 2**64
    return total


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_only_so_much_is_kept():
    config, trainer = BLOCKS, TrainerLayout(1, 1, 1, 1, 1, 1, (0, 0))
    whole, shapes = weights(config), tensor_shapes(config, fp8=True)
    parameters = trainer_parameters(config, trainer, 0, Elements(whole, torch.zeros(0)))
    parts = quantized_parts(trainer, shapes, config, 0)
    source = QuantizedParameters(parameters, parts, cache_bytes=1 << 17)
    largest = max(parameters[name].numel() for name in parts)
    for name in source:
        assert source[name] is source[name]
        assert source._held_bytes() <= max(1 << 17, 1.01 * largest)


def test_the_config_says_what_the_layouts_would():
    """Over drawn sizes and layouts: refused by the checks before a start where a layout cuts a block, and only there."""
    numbers = random.Random(0)
    refused = 0
    for _ in range(150):
        tp, etp, gtp, gep = (numbers.choice((1, 2)) for _ in range(4))
        gep = gtp if gep > 1 else 1
        grouped = numbers.random() < 0.3
        changes = {"intermediate_size": numbers.choice((256, 384, 512))}
        if grouped:
            changes |= {"head_dim": numbers.choice((64, 128)), "num_key_value_heads": numbers.choice((1, 2))}
        else:
            changes |= {
                "moe_intermediate_size": numbers.choice((128, 256, 192)), "q_lora_rank": numbers.choice((128, 192)),
                "qk_rope_head_dim": numbers.choice((64, 32)), "kv_lora_rank": 128,  # that is asked for by decoding alone
            }  # fmt: skip
        config = (GROUPED if grouped else BLOCKS) | changes
        if grouped:
            etp, gep, tp = 1, 1, min(tp, config["num_key_value_heads"])
        rollout = RolloutConfig(quantization="fp8", tp=gtp, ep=gep)
        layout = ParallelConfig(tp=tp, etp=etp)
        problems = list(generator_precision_problems(rollout, "bfloat16", layout, config))
        stages = (0,) * config["num_hidden_layers"]
        try:
            trainer = TrainerLayout(4, tp, 1, etp, 1, 1, stages)
            Plan(config, trainer, GeneratorLayout(4, gtp, gep, True), model_dtype=torch.bfloat16, bucket_bytes=1 << 20)
            cut = False
        except ConfigError as error:
            assert "block" in str(error)
            cut = True
        assert bool(problems) == cut, (config, rollout, layout, problems)
        refused += cut
    assert 25 <= refused <= 125
