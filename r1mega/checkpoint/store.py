"""Checkpoints of a run: torch_dist directories that appear whole or not at all.

RUN_DIR/checkpoints/step_000010/ holds Megatron's torch_dist files, `progress.json` (what is not tensors: step, data
cursor, ...) and `manifest.json` (size and sha256 of every file, written last). A checkpoint is written under a
temporary name and renamed, so a kill at any moment leaves the ones before it as they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from r1mega.errors import CheckpointError, PlatformError
from r1mega.observe.files import sync_path

logger = logging.getLogger(__name__)

MANIFEST, PROGRESS = "manifest.json", "progress.json"


class CheckpointStore:
    """Saves, finds and loads the checkpoints of one run directory. All ranks call the methods together."""

    def __init__(self, run_dir: Path, *, keep: int, architecture: Mapping[str, Any]):
        """architecture: what must be equal for a checkpoint to fit (see `architecture_of`)."""
        self.directory = Path(run_dir) / "checkpoints"
        self.keep, self.architecture = keep, dict(architecture)

    def save(self, step: int, sharded_state: dict[str, Any], progress: Mapping[str, Any]) -> Path:
        """Write step `step`; return its directory. CheckpointError when the disk does not take it (nothing is kept)."""
        from megatron.core import dist_checkpointing
        from torch.distributed.checkpoint import CheckpointException

        _collect_results_in_process()
        final = self.directory / f"step_{step:06d}"
        temporary = final.with_name(final.name + ".tmp")
        if _rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _barrier()
        try:
            dist_checkpointing.save(sharded_state, str(temporary), sharded_strategy=("torch_dist", 1))
        except (OSError, RuntimeError, CheckpointException) as error:  # Megatron's writers wrap an OSError
            if _rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"{temporary}: could not be written ({error}); free some disk and start again") from error
        _barrier()
        if _rank() == 0:
            (temporary / PROGRESS).write_text(json.dumps({"step": step, **progress}, indent=1))
            _write_manifest(temporary, self.architecture)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            sync_path(self.directory)
            for old in self._steps()[: -self.keep]:
                shutil.rmtree(self.directory / f"step_{old:06d}")
        _barrier()
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None. Torn or altered ones are skipped with a warning that names them."""
        found: list[Path | None] = [None]
        if _rank() == 0:
            for leftover in self.directory.glob("*.tmp"):
                shutil.rmtree(leftover)
            for step in reversed(self._steps()):
                path = self.directory / f"step_{step:06d}"
                problem = verify(path)
                if problem is None:
                    found = [path]
                    break
                logger.warning("%s is not whole (%s); using the one before it", path, problem)
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def load(self, path: Path, sharded_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state as described by the `sharded_state` template, progress). CheckpointError for another architecture."""
        from megatron.core import dist_checkpointing

        check_architecture(path, self.architecture)
        state = dist_checkpointing.load(sharded_state, str(path))
        return state, json.loads((path / PROGRESS).read_text())

    def _steps(self) -> list[int]:
        names = (p.name.removeprefix("step_") for p in self.directory.glob("step_*") if p.is_dir())
        return sorted(int(name) for name in names if name.isdigit())


def _collect_results_in_process() -> None:
    """megatron-core 0.16.1, strategies/filesystem_async.py: results of a save go through the queue of a manager process,
    which an asynchronous save needs. A synchronous one does not, and the manager (seconds to start, 250 MB) would outlive
    a killed run: give it a plain queue.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not hasattr(filesystem_async, "_results_queue"):
        raise PlatformError("megatron-core is not version 0.16.1: dist_checkpointing has no _results_queue to replace")
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def check_architecture(path: Path, architecture: Mapping[str, Any]) -> None:
    """CheckpointError naming the keys in which a checkpoint's architecture differs. Reads the manifest only."""
    saved, wanted = json.loads((path / MANIFEST).read_text())["architecture"], json.loads(json.dumps(dict(architecture)))
    keys = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
    if keys:
        raise CheckpointError(
            f"{path}: saved from another architecture: "
            + ", ".join(f"{k} {saved.get(k)} there, {wanted.get(k)} here" for k in keys)
            + ". Use another run_dir, or the model that made it."
        )


def architecture_of(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an HF config.json that decide names and shapes of tensors."""
    deciding = (
        "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
        "vocab_size tie_word_embeddings q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "moe_intermediate_size n_routed_experts n_shared_experts first_k_dense_replace num_nextn_predict_layers"
    ).split()
    return {key: hf_config[key] for key in deciding if hf_config.get(key) is not None}


def verify(path: Path) -> str | None:
    """None when every file of the manifest is there with its size and sha256; otherwise what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        return "no manifest"
    except ValueError:
        return "manifest is not JSON"
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} has another sha256 than when it was written"
    return None


def _write_manifest(directory: Path, architecture: Mapping[str, Any]) -> None:
    files = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        files[str(file.relative_to(directory))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        sync_path(file)
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"architecture": dict(architecture), "files": files}, indent=1))
    sync_path(manifest)
    sync_path(directory)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
