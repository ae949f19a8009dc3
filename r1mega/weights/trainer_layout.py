"""Where each HF tensor lives inside the trainer's (Megatron's) parameters, in any layout.

Pure: the counterpart of `layout.py`, made of the rules in checkpoint/name_rules.py and of the order in which Megatron
numbers its ranks (tp-cp-ep-dp-pp, pipeline stages outermost). The same `Placement` says where: `parameter` is the first
HF name of the Megatron parameter, which is what `checkpoint.hf_state.local_entries` finds it by on every platform.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from r1mega.checkpoint.name_rules import EXPERT_RULES, RULES, TOP_RULES, Rule, regions
from r1mega.config.layout import Layout, expert_key, num_experts, stage_layers
from r1mega.config.model_files import HFConfig
from r1mega.errors import ConfigError
from r1mega.weights.layout import FP8_BLOCK, SCALE, Placement, block_region

_EMBEDDING = "model.embed_tokens.weight"
_NORM = "model.norm.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.*)")


def _by_hf_name(rules: Iterable[Rule]) -> dict[str, tuple[Rule, int]]:
    return {hf: (rule, index) for rule in rules for index, hf in enumerate(rule.hf)}


_COMMON = [rule for rule in (*RULES.values(), *TOP_RULES.values()) if not rule.hf[0].startswith("self_attn.q_proj")]
_QUERIES = [rule for rule in RULES.values() if rule.hf[0].startswith("self_attn.q_proj")]  # its name means either
_LATENT = _by_hf_name([*_COMMON, *(rule for rule in _QUERIES if rule.form != "qkv")])
_GROUPED = _by_hf_name(
    [*_COMMON, *(rule for rule in _QUERIES if rule.form == "qkv"), Rule("", ("self_attn.q_norm.weight",))]
)
_EXPERTS = _by_hf_name(EXPERT_RULES.values())


@dataclass(frozen=True, slots=True)
class Holders:
    """The ranks that hold one shard: those with this place in a stage. tensor: its rank in tp, or in etp for an expert
    (None: all of them); expert: its rank in ep, None for what is no expert."""

    tensor: int | None
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class TrainerLayout:
    """Megatron's layout on `world` processes. stages: the pipeline stage of every decoder layer.

    embedding_on_last: the last stage holds the embeddings too (tied to the head). mtp_stage: that of the layers of multi-token
    prediction, which read the embeddings there; the final norm is then behind the last decoder layer, not before the head.
    """

    world: int
    tp: int
    ep: int
    etp: int
    pp: int
    cp: int
    stages: tuple[int, ...]
    embedding_on_last: bool = False
    mtp_stage: int | None = None

    def __post_init__(self) -> None:
        dense, experts = self.tp * self.pp * self.cp, self.ep * self.etp * self.pp
        for keys, size in (("tp * pp * cp", dense), ("ep * etp * pp", experts)):
            if self.world % size:
                raise ConfigError(
                    f"parallel: {self.world} processes cannot be divided by {keys} = {size}; change one of them"
                )

    def holding_stages(self, name: str) -> tuple[int, ...]:
        """The pipeline stages that hold an HF tensor."""
        layer = _LAYER.fullmatch(name)
        if layer is not None:
            return (self.stages[int(layer[1])],)
        if name == _EMBEDDING:
            copies = (self.pp - 1 if self.embedding_on_last else 0, self.mtp_stage or 0)
            return tuple(sorted({0, *copies}))
        if name == _NORM and self.mtp_stage is not None:
            return (self.stages[-1],)
        return (self.pp - 1,)

    def ranks(self, holders: Holders, stages: Sequence[int]) -> np.ndarray:
        """[n] sorted ranks of `holders` in some pipeline stages."""
        inner = (self.cp, self.tp) if holders.expert is None else (self.ep, self.etp)
        grid = np.arange(self.world).reshape(self.pp, -1, *inner)[list(stages)]
        if holders.expert is not None:
            grid = grid[:, :, [holders.expert]]
        if holders.tensor is not None:
            grid = grid[..., [holders.tensor]]
        return np.sort(grid.reshape(-1))

    def shards(
        self, name: str, shapes: Mapping[str, tuple[int, ...]], config: HFConfig
    ) -> Iterator[tuple[Placement, Holders]]:
        """Every part into which the trainer cuts an HF tensor, once; replicas are in the holders. shapes: by name.

        For the scales of a block-quantised weight: the blocks of each part, those of one rank's parts below each other, for
        that is how the trainer quantises (quantize.py). Raises ConfigError for a layout that does not divide, or that cuts
        through a block.
        """
        weight = name.removesuffix(SCALE)
        rows: dict[Holders, int] = {}
        for part, holders in self._shards(weight, shapes[weight], config):
            if weight == name:
                yield part, holders
                continue
            blocks = block_region(part.source, part.shape)
            if blocks is None:
                raise ConfigError(
                    f"{weight}: parallel.tp or parallel.etp cuts it at {part.source}, through an FP8 "
                    f"block of {FP8_BLOCK} x {FP8_BLOCK}; choose another size, or leave rollout.quantization out"
                )
            (first, last), (left, right) = blocks
            start = rows.get(holders, 0)
            rows[holders] = start + last - first
            target = ((start, rows[holders]), (0, right - left))
            yield Placement(name, shapes[name], name, target, blocks), holders

    def _shards(self, name: str, shape: tuple[int, ...], config: HFConfig) -> Iterator[tuple[Placement, Holders]]:
        rule, index, key, expert_rank = self._find(name, config)
        ranks = (self.tp if expert_rank is None else self.etp) if rule.dim is not None else 1
        heads = _heads(config)
        if rule.form == "qkv":
            _divide(heads[0], ranks, "num_key_value_heads", "tp")
        elif rule.form != "vocabulary" and rule.dim is not None:
            _divide(shape[rule.dim], ranks, name, "tp or parallel.etp")
        for rank in range(ranks):
            holders = Holders(rank if rule.dim is not None else None, expert_rank)
            for target, source in regions(rule.form, rule.dim, index, shape, heads, rank, ranks):
                yield Placement(name, shape, key, target, source), holders

    def _find(self, name: str, config: HFConfig) -> tuple[Rule, int, str, int | None]:
        """(rule, which of its HF tensors, key of the Megatron parameter, the expert's rank in ep)."""
        layer = _LAYER.fullmatch(name)
        suffix, prefix, expert_rank = (layer[2], name.removesuffix(layer[2]), None) if layer else (name, "", None)
        expert = _EXPERT.fullmatch(suffix)
        if expert is not None:
            suffix, prefix = expert[2], name.removesuffix(expert[2])
            expert_rank = int(expert[1]) // _divide(num_experts(config), self.ep, expert_key(config), "ep")
        known = _EXPERTS if expert is not None else _LATENT if "kv_lora_rank" in config else _GROUPED
        rule, index = known.get(suffix, (None, 0))
        if rule is None:
            raise ConfigError(f"{name}: no rule of checkpoint/name_rules.py says how the trainer holds it")
        return rule, index, prefix + rule.hf[0], expert_rank


def _heads(config: HFConfig) -> tuple[int, int]:
    """(KV groups, queries a group)."""
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]
    return groups, config["num_attention_heads"] // groups


def _divide(size: int, parts: int, what: str, key: str) -> int:
    if size % parts:
        raise ConfigError(f"parallel.{key} = {parts} does not divide {what} = {size}; change it")
    return size // parts


def pipeline_stages(parallel: Layout, num_layers: int) -> tuple[int, ...]:
    """The pipeline rank of each decoder layer. Raises ConfigError when the stages do not hold them all."""
    owners = [stage % parallel.pp for stage, layers in enumerate(stage_layers(parallel, num_layers)) for _ in layers]
    if len(owners) != num_layers:
        raise ConfigError(
            f"parallel: the stages hold {len(owners)} layers, the model's num_hidden_layers = "
            f"{num_layers}; set parallel.layers_per_stage"
        )
    return tuple(owners)
