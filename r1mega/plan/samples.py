"""Host memory that a step's samples take of a rank: what its generator made, what it trains on, what passes between."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from r1mega.config.layout import num_experts, num_stages, stage_layers
from r1mega.config.model_files import HFConfig
from r1mega.config.stages.rl import RLStage
from r1mega.model.families import architecture_of
from r1mega.plan.partial import played_steps
from r1mega.plan.workload import Workload
from r1mega.train.sample_plan import BUFFER_BYTES

MADE_BYTES = 8 + 32 + 8 + 24 + 4
"""Of a response token as a generator hands it over: a Python number and a place for it in a tuple, the same of its log-prob,
and some characters of text."""
ARRAY_BYTES = 4
"""Of a token of a sample, and of a log-prob."""
PACKED_BYTES, PACKED_RESPONSE_BYTES = 3 * 8, 3 * 8 + 5 * 4
"""Of a token, and of a response token beside it, in a microbatch: tokens, positions, labels; rows, targets, which sample;
advantage, weight and the log-probs of sampler, old and reference weights."""
KEPT_IDS = 4.0
"""That a response token is taken to be drawn from in the mean, where the sampler cuts the vocabulary: `logprob/kept_ids` of a run says
how many they are."""
KNOWN_BYTES = 600
"""Of a sample of the step, whoever trains on it: what every rank knows of it, and its place in the plan beside the ranks."""


@dataclass(frozen=True, slots=True)
class SampleMemory:
    """Bytes of a rank. made: by its generator, with what partial rollouts left unfinished; share: the samples that it trains on; packed: its microbatches; passing: the
    plan, and buffers while samples are on their way, which is before they are packed.
    """

    made: float
    share: float
    packed: float
    passing: float

    @property
    def peak(self) -> float:
        return self.made + self.share + max(self.packed, self.passing)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What samples are cut by. choices: bytes of a token's routed experts in one MoE layer (0: none are replayed),
    packed_choices: the same in a microbatch; layers: MoE layers of the model, own_layers: of this rank. ranks: of a replica.
    kept: ids that a response token was drawn from, in the mean; 0: it is not told.
    """

    replicas: int
    generators: int
    ranks: int
    epochs: int = 1
    choices: int = 0
    packed_choices: int = 0
    layers: int = 0
    own_layers: int = 0
    buffer_bytes: int = BUFFER_BYTES
    kept: float = 0.0


def sample_memory(num_samples: int, tokens: float, responses: float, sizes: Sizes) -> SampleMemory:
    """tokens: of all samples of the step; responses: those of responses alone."""
    routed, own_routed = (sizes.choices * layers for layers in (sizes.layers, sizes.own_layers))
    counts = 1 if sizes.kept else 0
    arrays = ARRAY_BYTES * (tokens + responses * (1 + counts + sizes.kept))
    made = (MADE_BYTES * responses + arrays + routed * tokens) / sizes.generators
    trained = min(1.0, sizes.epochs / sizes.replicas)
    moved = 0.0 if sizes.replicas == sizes.generators == sizes.ranks == 1 else trained * (arrays + own_routed * tokens)
    packed = (PACKED_BYTES * tokens + PACKED_RESPONSE_BYTES * responses) / sizes.replicas
    packed += (8 * counts + ARRAY_BYTES * sizes.kept) * responses / sizes.replicas  # offsets are int64
    packed += sizes.packed_choices * sizes.own_layers * tokens / sizes.replicas
    known = num_samples * (KNOWN_BYTES + 16 * sizes.ranks * trained * sizes.replicas)
    buffers = 4 * min(float(sizes.buffer_bytes), moved)
    return SampleMemory(made, moved, packed * sizes.epochs, known + buffers)


def planned_samples(config: RLStage, hf: HFConfig, gpus: int, work: Workload) -> SampleMemory:
    """Of a rank of the pipeline stage that has most MoE layers."""
    p, model, rollout = config.parallel, architecture_of(hf), config.rollout
    ranks = p.tp * p.pp * p.cp
    flags = [model.has_experts(layer) for layer in range(model.num_layers)]
    layers = stage_layers(p, model.num_layers)
    own = [sum(flags[i] for chunk in range(stage, num_stages(p), p.pp) for i in layers[chunk]) for stage in range(p.pp)]
    chosen = int(hf["num_experts_per_tok"]) if any(flags) else 0
    top_k = chosen if rollout.router_replay else 0
    fits = num_experts(hf) <= 256  # uint8; otherwise uint16, and int32 in a microbatch
    sizes = Sizes(
        max(1, gpus // ranks), max(1, gpus // rollout.tp), ranks, config.update.num_epochs,
        top_k * (1 if fits else 2), top_k * (1 if fits else 4), sum(flags), max(own),
        kept=min(KEPT_IDS, rollout.max_kept_ids, rollout.top_k or KEPT_IDS) if rollout.cuts_vocabulary else 0.0,
    )  # fmt: skip
    tokens = work.whole.tokens
    found = sample_memory(len(work.samples), tokens, work.whole.scored, sizes)
    if config.algorithm.router_replay:  # what a rank's own routers took of the tokens that they see
        seen = tokens * config.update.num_epochs / (sizes.replicas * p.cp * p.tp)
        recorded = chosen * (1 if fits else 2) * sizes.own_layers * seen
        found = dataclasses.replace(found, packed=found.packed + recorded)
    if not rollout.partial.is_on:
        return found
    steps = played_steps(rollout.partial, tuple(work.responses), rollout.num_prompts, rollout.group_size, 0)
    left = max(step.left for step in steps)  # beside what a step trains on
    return dataclasses.replace(
        found, made=found.made + (MADE_BYTES + sizes.choices * sizes.layers) * left / sizes.generators
    )
