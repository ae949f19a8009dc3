"""From filtered candidates to a data set: duplicates, contamination, samples a prompt, the mix, the files."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from r1mega.config.data_factory import DecontaminationConfig, DuplicateConfig, GeneralConfig
from r1mega.data.contamination import Contamination, evaluation_questions
from r1mega.data.duplicates import Signature, near_duplicates
from r1mega.data.filters import Candidate, FilterCount
from r1mega.data.sft import read_lines
from r1mega.data.tokenizer import Tokenizer
from r1mega.errors import DataError
from r1mega.files import replacing, write_atomic

logger = logging.getLogger(__name__)


def without_duplicates(
    candidates: Sequence[Candidate], config: DuplicateConfig, signed: Sequence[Signature] | None = None
) -> tuple[list[Candidate], FilterCount]:
    """The first of each group of near-duplicates. signed: `signatures` of `text_of` each, where they were made elsewhere."""
    twins = near_duplicates(
        [text_of(c) for c in candidates],
        threshold=config.threshold, ngram=config.ngram, num_permutations=config.num_permutations, signed=signed,
    )  # fmt: skip
    kept = [c for c, twin in zip(candidates, twins, strict=True) if twin is None]
    return kept, FilterCount("near-duplicate", len(candidates), len(candidates) - len(kept))


def text_of(candidate: Candidate) -> str:
    """What is compared of a candidate to find duplicates."""
    return f"{candidate.question}\n{candidate.response}"


def contaminated(config: DecontaminationConfig, candidates: Sequence[Candidate]) -> list[bool]:
    """Which share an n-gram with an evaluation question, in question or response, or pose a shorter one."""
    is_contaminated = Contamination(evaluation_questions(config.files), config.ngram)
    return [is_contaminated(c.question) or is_contaminated(c.response, shorter=False) for c in candidates]


def without_contamination(
    candidates: Sequence[Candidate], config: DecontaminationConfig, found: Sequence[bool] | None = None
) -> tuple[list[Candidate], FilterCount]:
    """Those that are not `contaminated`. found: what that says, where it was asked elsewhere."""
    found = contaminated(config, candidates) if found is None else found
    kept = [c for c, is_out in zip(candidates, found, strict=True) if not is_out]
    return kept, FilterCount("contamination", len(candidates), len(candidates) - len(kept))


def at_most_per_prompt(candidates: Sequence[Candidate], limit: int) -> tuple[list[Candidate], FilterCount]:
    """The first `limit` of each prompt: samples are exchangeable, so this is no choice by quality."""
    seen: Counter[str] = Counter()
    kept = []
    for candidate in candidates:
        seen[candidate.prompt_id] += 1
        if seen[candidate.prompt_id] <= limit:
            kept.append(candidate)
    return kept, FilterCount("more of a prompt", len(candidates), len(candidates) - len(kept))


def read_general(
    config: GeneralConfig, tokenizer: Tokenizer, template: str, licences: dict[str, str]
) -> list[Candidate]:
    """The lines of the general files, as candidates of kind `general`."""
    candidates = []
    for path in config.files:
        for where, item in read_lines(path):
            if not isinstance(item.get("question"), str) or not isinstance(item.get("response"), str):
                raise DataError(f"{where}: general data wants 'question' and 'response'")
            identity = str(item.get("id", where))
            candidates.append(
                Candidate(
                    id=identity,
                    prompt_id=identity,
                    question=item["question"],
                    response=item["response"],
                    kind="general",
                    merged=True,
                    language=item.get("language"),
                    template=item.get("template", template),
                    source=item.get("source", str(path)),
                    tokens=len(tokenizer.encode(item["response"])),
                    licence=item.get("licence") or licences.get(str(path), "unknown"),
                )  # fmt: skip
            )
    return candidates


def mix(
    reasoning: Sequence[Candidate], general: Sequence[Candidate], share: float, seed: int
) -> tuple[list[Candidate], FilterCount]:
    """Reasoning samples and so many general ones (a seeded choice) that they are `share` of the result, shuffled.

    All general samples, and a warning, when there are too few: none is repeated, and no reasoning is thrown away for the
    ratio's sake.
    """
    rng = random.Random(f"mix/{seed}")
    wanted = round(len(reasoning) * share / (1 - share))
    if len(general) < wanted:
        logger.warning(
            "general.share = %g wants %d general samples, there are %d: all are taken", share, wanted, len(general)
        )
        wanted = len(general)
    chosen = [general[i] for i in sorted(rng.sample(range(len(general)), wanted))]
    merged = [*reasoning, *chosen]
    rng.shuffle(merged)
    return merged, FilterCount("general beyond the mix", len(general), len(general) - wanted)


def write_data(kept: Sequence[Candidate], directory: Path) -> None:
    """directory/train.jsonl and train.parquet: the same lines, each file written whole or not at all."""
    import datasets

    if not kept:
        raise DataError(f"{directory}: no sample passed the filters; the counts are in {directory / 'card.md'}")
    lines = [candidate.line() for candidate in kept]
    features = datasets.Features(
        {name: datasets.Value("int32" if name == "tokens" else "large_string") for name in lines[0]}
    )
    write_atomic(directory / "train.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    with replacing(directory / "train.parquet") as temporary:
        datasets.Dataset.from_list(lines, features=features).to_parquet(str(temporary))
