"""What an HF directory says of its model and tokenizer, read without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def context_length(hf: Mapping[str, Any]) -> int | None:
    """Positions that the model can attend to; None when config.json does not say.

    YaRN multiplies the original context. DeepSeek-V3's config has the product in max_position_embeddings already, Qwen's
    has the original there: the larger of both is right for each. Llama 3's scaling is included in its value.
    """
    positions = hf.get("max_position_embeddings")
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if positions is not None and (scaling.get("rope_type") or scaling.get("type")) == "yarn":
        original = scaling.get("original_max_position_embeddings") or positions
        return max(positions, int(original * scaling.get("factor", 1.0)))
    return positions


def tokenizer_size(directory: Path) -> int | None:
    """One more than the largest token id of the directory's tokenizer; None when it has no file that tells.

    Raises ValueError for a tokenizer.json that is not JSON.
    """
    if (file := directory / "tokenizer.json").exists():
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content.get("model", {}).get("vocab", {})
        base = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
        return max([base, *(token["id"] for token in content.get("added_tokens", []))]) + 1
    if (file := directory / "tokenizer.model").exists():
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(file)).vocab_size()
    return None
