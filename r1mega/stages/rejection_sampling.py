"""Stage `rejection_sampling`: many responses a prompt, the good and distinct ones kept, general data merged in."""

from __future__ import annotations

from typing import Any

from r1mega.config.stages.rejection_sampling import RejectionSamplingStage
from r1mega.data.card import describe_file
from r1mega.data.filters import FilterCount
from r1mega.data.selection import at_most_per_prompt, mix, read_general
from r1mega.stages.data_factory import DataFactory
from r1mega.stages.runtime import Runtime
from r1mega.stages.sampling import PosedPrompt
from r1mega.types import Deal


def run(config: RejectionSamplingStage, runtime: Runtime) -> int:
    """Write RUN_DIR/data. Returns the exit code (85: what was drawn is kept, start again for the rest)."""
    factory = DataFactory(config, runtime)
    posed = [PosedPrompt(prompt, source=f"sampled from {config.model.path}") for prompt in factory.load_prompts()]
    if not factory.sample(posed):
        return runtime.stopped()
    return factory.finish(factory.select(lambda deal: _select(config, factory, posed, deal)))


def _select(
    config: RejectionSamplingStage, factory: DataFactory, posed: list[PosedPrompt], deal: Deal
) -> dict[str, Any]:
    """Filter, thin out, merge and write; the card."""
    candidates = factory.candidates(posed)
    kept, funnel = factory.passing(candidates, deal)
    kept = factory.distinct(kept, funnel, deal)
    kept, count = at_most_per_prompt(kept, config.max_per_prompt)
    funnel.append(count)
    general = read_general(config.general, factory.tokenizer, config.data.template, config.licences)
    if general:
        counts: list[FilterCount] = []
        general = factory.distinct(general, counts, deal)
        kept, count = mix(kept, general, config.general.share, config.seed)
        funnel += [type(c)(f"general: {c.name}", c.seen, c.taken) for c in (*counts, count)]
    further = [describe_file(path, "general", config.licences) for path in config.general.files]
    made_by: dict[str, float] = {"prompts": len(posed), "sampled": len(candidates)}
    if general:
        made_by["general share asked"] = config.general.share
    return factory.write(kept, funnel, made_by, further)
