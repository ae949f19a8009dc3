"""What an HF directory says of its model and tokenizer, read without torch or transformers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

HFConfig: TypeAlias = Mapping[str, Any]
"""What config.json says, in either spelling of transformers. A value may be anything until it is looked at: `model/hf_config.py`."""

TRUST_REMOTE_CODE = "R1MEGA_TRUST_REMOTE_CODE"


def context_length(hf: HFConfig) -> int | None:
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


def identity(directory: Path) -> str:
    """A text that changes when the weights are written anew: names, sizes and times of the files."""
    files = sorted(file for pattern in ("*.safetensors", "config.json") for file in directory.glob(pattern))
    text = "".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def trusts_remote_code() -> bool:
    """Whether Python files that come with a model may be run."""
    return os.environ.get(TRUST_REMOTE_CODE) == "1"


def tokenizer_code_problem(directory: Path) -> str | None:
    """What to do about a tokenizer that is a Python file of the directory (`auto_map`, as Moonlight's is); None where there
    is nothing to do.
    """
    config = directory / "tokenizer_config.json"
    if trusts_remote_code() or (directory / "tokenizer.json").exists() or not config.exists():
        return None
    entry = json.loads(config.read_text(encoding="utf-8")).get("auto_map", {}).get("AutoTokenizer")
    names = [name for name in ([entry] if isinstance(entry, str) else entry or ()) if name]
    if not names:
        return None
    return (
        f"{directory}: the tokenizer is Python code that came with the model ({names[0].partition('.')[0]}.py); read it, then set "
        f"{TRUST_REMOTE_CODE}=1 to let it run"
    )
