"""What every plan starts from: this process as one that builds models without memory, and the model's config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1mega.config.load import load_config
from r1mega.config.schema import Stage
from r1mega.config.validate import architecture_directory
from r1mega.errors import ConfigError


def on_the_host() -> None:
    """Models are built of Megatron's local layers, without memory: on a machine with GPUs as on one without.

    Raises ConfigError in a process that has taken a GPU for its platform.
    """
    import torch

    from r1mega import platform
    from r1mega.platform import megatron_import

    if not megatron_import.is_installed():
        platform.use(platform.Platform("cpu", torch.device("cpu"), "gloo", False, False))
    elif platform.current().name != "cpu":
        raise ConfigError("a plan is made in a process of its own, which uses no GPU: run `r1mega plan`")


def read_model(config: Stage, path: Path) -> dict[str, Any]:
    """config.json of the model, or while it has not been downloaded of the `model` directory beside the YAML file (a
    student's: `student`). Raises ConfigError when there is none.
    """
    names = ("student", "model") if config.stage == "distill" else ("model",)
    places = [
        architecture_directory(config.model.path) / "config.json",
        *(path.parent / name / "config.json" for name in names),
    ]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(
            f"model.path = {config.model.path}: {' and '.join(map(str, places))} are missing; put the model's config.json into "
            "one of them (a plan wants no weights)"
        )
    try:
        return json.loads(found.read_text())
    except ValueError as error:
        raise ConfigError(f"{found}: not JSON ({error})") from error


def made_for(path: Path, stage: str, gpus: int) -> Iterator[Path]:
    """Other configs of this stage, beside a YAML file, that say at their head that they are made for so many GPUs:
    `# r1mega plan --gpus N ...`. None where the file says so itself.
    """

    def said(file: Path) -> bool:
        found = re.search(r"^# r1mega plan --gpus (\d+)\b", file.read_text(errors="replace"), re.M)
        return found is not None and int(found[1]) == gpus

    if said(path):
        return
    for other in filter(said, sorted(path.parent.glob("*.yaml"))):
        try:
            same = load_config(other).stage == stage
        except ConfigError:
            continue
        if same:
            yield other
