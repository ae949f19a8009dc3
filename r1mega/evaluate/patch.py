"""SWE-bench: the patch in a response, and the predictions file that the benchmark's own harness judges.

The harness builds each repository in a container and runs its tests; that is not done here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from r1mega.evaluate.result import EvaluationRow
from r1mega.files import write_atomic
from r1mega.reward.extract import final_text

_TAGGED = re.compile(r"<([\w-]+)>(.*?)</\1>", re.DOTALL)
_FENCED = re.compile(r"```(\w+)?\n(.*?)```", re.DOTALL)


def extract_patch(response: str) -> str:
    """The first block tagged or fenced as diff or patch after the reasoning, else the first other block, else the whole
    final text: the order of the benchmark's own extraction (swebench/inference), with the reasoning cut off first.
    """
    text = final_text(response)
    blocks = [match.groups() for pattern in (_TAGGED, _FENCED) for match in pattern.finditer(text)]
    named = [content for label, content in blocks if label in ("diff", "patch")]
    chosen = named[0] if named else blocks[0][1] if blocks else text
    return chosen.strip("\n") + "\n" if chosen.strip() else ""


def write_predictions(rows: Sequence[EvaluationRow], model: str, path: Path) -> None:
    """JSONL of {"instance_id", "model_name_or_path", "model_patch"}, from each row's first sample."""
    lines = [
        {"instance_id": row.prompt_id, "model_name_or_path": model, "model_patch": extract_patch(row.texts[0])}
        for row in rows
    ]
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
