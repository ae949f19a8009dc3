"""Checkpoints of a run: torch_dist directories that appear whole or not at all.

RUN_DIR/checkpoints/step_000010/ holds Megatron's torch_dist files, `progress.json` (what is not tensors: step, data
cursor, ...) and `manifest.json` (size and digest of every file, written last). A checkpoint is written under a
temporary name and renamed, so a kill at any moment leaves the ones before it as they were. One that is found damaged is
moved aside, to `step_000010.damaged`: it neither counts among those that are kept nor is taken for the newest.
"""

from __future__ import annotations

import inspect
import io
import itertools
import json
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.storage import WriteResult

from r1mega.checkpoint.fit import fit_template, put_back, take_out_described
from r1mega.checkpoint.manifest import (
    FileRecords,
    UnreadableError,
    file_record,
    lacks,
    read_manifest,
    verify,
    write_manifest,
)
from r1mega.checkpoint.torch_dist import (
    COMMON,
    METADATA,
    Piece,
    Stored,
    TorchDistReader,
    without_crc,
    write_index,
    write_pieces,
)
from r1mega.checkpoint.workers import Alone, TorchWorkers, Workers, agree, on_first_rank
from r1mega.config.layout import num_experts
from r1mega.config.model_files import HFConfig
from r1mega.errors import CheckpointError, PlatformError
from r1mega.files import sync_path

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
DAMAGED = ".damaged"
NO_SPACE = "nothing was kept of this checkpoint, those before it are whole; free some disk and start again"


MODEL_METADATA = {"singleton_local_shards": False}
"""How Megatron describes a model's tensors in checkpoints. Pass a copy: it keeps its process groups in there."""


@dataclass(frozen=True, slots=True)
class _Save:
    """One planned save of this rank: its data files, the state that rank 0 writes, the index of all ranks' pieces."""

    directory: Path
    files: dict[str, list[Piece]]
    common: dict[str, Any]
    metadata: Any  # torch's Metadata on rank 0


class CheckpointStore:
    """Saves, finds and loads the checkpoints of one run directory. All ranks call the methods together.

    asynchronous: `save` returns once the state is copied to host memory, a thread writes it; errors of the writing are
    raised by the next `save` or `wait`.
    """

    def __init__(self, run_dir: Path, *, keep: int, architecture: Mapping[str, Any], asynchronous: bool = False):
        """architecture: what must be equal for a checkpoint to fit (see `deciding_keys`)."""
        self.directory = Path(run_dir) / "checkpoints"
        self.keep, self.architecture, self.asynchronous = keep, dict(architecture), asynchronous
        self._workers: Workers = Alone()
        self._world: Any = None  # the process group that _workers were made for
        self._pending: _Background | None = None
        self.background_seconds = 0.0
        """The longest that a thread has written a checkpoint beside the training; known once it was waited for."""

    def save(self, step: int, sharded_state: dict[str, Any], progress: Mapping[str, Any]) -> Path:
        """Write step `step`; the name of its directory, which is there once it is whole (`wait`).

        CheckpointError on every rank when the disk does not take it on any (nothing of it is kept).
        """
        self.wait()
        workers = self._everyone()
        final = self.directory / f"step_{step:06d}"
        temporary = final.with_name(final.name + ".tmp")

        def make() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        on_first_rank(workers, make, NO_SPACE)
        save = _plan(sharded_state, temporary, copy=self.asynchronous)
        record = json.dumps({"step": step, **progress}, indent=1)
        if self.asynchronous:
            self._pending = _Background(lambda: self._write(save, final, record, workers))
        else:
            self._write(save, final, record, workers)
        return final

    def wait(self) -> None:
        """Until an asynchronous save is whole. CheckpointError when it could not be written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.wait()
            self.background_seconds = max(self.background_seconds, pending.seconds)

    def latest(self) -> Path | None:
        """The newest whole checkpoint; None when there are none at all. Newer ones that are torn or altered are moved aside,
        with a warning that names them. CheckpointError when there are some and none is whole, and when the system does not read
        one: all stay where they are.
        """
        self.wait()
        workers = self._everyone()

        def clean() -> None:  # what killed runs left half-written
            for leftover in self.directory.glob("*.tmp"):
                shutil.rmtree(leftover)

        on_first_rank(workers, clean, f"{self.directory} could not be read")
        try:
            newest, problems = _search(self.directory, workers)
        except UnreadableError as error:
            raise UnreadableError(
                f"{error}; nothing was moved. Start again once it can be read, by the program that wrote it if that is newer; to go on "
                f"from the checkpoint before it, rename it to NAME{DAMAGED}"
            ) from error
        if newest is None and problems:
            lines = "".join(f"\n  {path}: {problem}" for path, problem in problems.items())
            raise CheckpointError(
                f"{self.directory}: no checkpoint of this run is whole:{lines}\nput a whole one there (a copy, or one that was moved "
                f"aside), or remove this directory to begin anew: what the run wrote before is then kept beside the new files"
            )

        def set_aside() -> None:
            for path in problems:
                _set_aside(path)

        on_first_rank(workers, set_aside, "damaged checkpoints could not be moved")
        return newest

    def load(self, path: Path, sharded_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state as described by the `sharded_state` template, progress), in any layout.

        Tensors of the template without memory (on torch's meta device) are not read: `Stored` stands for them.
        CheckpointError for another architecture, and for tensors that are missing or of another shape (all are listed).
        """
        from megatron.core import dist_checkpointing

        check_architecture(path, self.architecture)
        absent = fit_template(sharded_state, path, self._everyone())
        described, reader = take_out_described(sharded_state), TorchDistReader(path)
        state = dist_checkpointing.load(sharded_state, str(path))
        put_back(state, {where: Stored(leaf, reader) for where, leaf in described.items()} | dict.fromkeys(absent))
        return state, json.loads((path / PROGRESS).read_text())

    def _everyone(self) -> Workers:
        world = dist.group.WORLD if dist.is_initialized() else None
        if world is not self._world:
            self._world = world
            self._workers = TorchWorkers() if world is not None and dist.get_world_size() > 1 else Alone()
        return self._workers

    def _write(self, save: _Save, final: Path, progress: str, workers: Workers) -> None:
        """Each rank its files, at the same time; then rank 0 the index, the manifest, and the final name."""
        results: list[WriteResult] = []
        records: FileRecords = {}
        problems: list[str] = []
        try:
            results, records = _write_files(save, first=workers.rank == 0)
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a stream's OSError
            problems = [f"{save.directory}: could not be written ({error})"]
        everyone = workers.gather((results, records))

        def finish() -> None:
            """Index, manifest and final name, once every process has written its files; the oldest checkpoint goes."""
            write_index(save.directory, save.metadata, [r for theirs, _ in everyone for r in theirs])
            (save.directory / PROGRESS).write_text(progress)
            files = {name: record for _, theirs in everyone for name, record in theirs.items()}
            small = (p for p in save.directory.iterdir() if p.name not in files)
            write_manifest(save.directory, self.architecture, files | {p.name: file_record(p) for p in small})
            shutil.rmtree(final, ignore_errors=True)
            os.replace(save.directory, final)
            sync_path(self.directory)
            self._prune(final)

        try:
            agree(workers, problems, NO_SPACE)
            on_first_rank(workers, finish, NO_SPACE)
        except CheckpointError:
            if workers.rank == 0:
                shutil.rmtree(save.directory, ignore_errors=True)
            raise

    def _prune(self, newest: Path) -> None:
        """Of the whole ones, `keep` stay: `newest`, which was just written, and those with the highest steps beside it. Only
        sizes are looked at; what lacks something is moved aside, and nothing goes in its place. `newest` is whole whatever
        becomes of the others: what the system does not do is told, and left to the next save.
        """
        try:
            others = [path for path in checkpoints(self.directory) if path != newest]
            torn = [path for path in others if lacks(path)]
            for path in torn:
                _set_aside(path)
            whole = [path for path in others if path not in torn]
            for path in whole[: max(0, len(whole) + 1 - self.keep)]:
                shutil.rmtree(path)
        except (OSError, UnreadableError) as error:
            logger.warning("%s: older checkpoints were not all removed (%s)", self.directory, error)


class _Background:
    """A function in a thread that ends with the process; `wait` raises what it raised."""

    def __init__(self, function: Callable[[], None]):
        self._function = function
        self._error: BaseException | None = None
        self.seconds = 0.0  # that it took
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self._function()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - began

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def _plan(sharded_state: dict[str, Any], directory: Path, *, copy: bool) -> _Save:
    """Which pieces this rank writes, on the host. copy: also those in host memory already, so that training goes on.

    A collective call, of Megatron's own planning (megatron-core, dist_checkpointing/strategies).
    """
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    if not hasattr(filesystem_async, "_results_queue"):
        raise PlatformError("megatron-core has changed: dist_checkpointing has no _results_queue to replace")
    if filesystem_async._results_queue is None:  # else it starts a manager process, which would outlive a killed run
        filesystem_async._results_queue = queue.Queue()

    class PlanOnly(TorchDistSaveShardedStrategy):
        def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, _async_strategy: str = "mcore") -> None:
            self.buckets, self.metadata = writer.write_buckets, planned[1]

    sharded, common = save_preprocess(sharded_state)
    strategy = PlanOnly("torch_dist", 1)
    choice = "async_strategy" in inspect.signature(strategy.async_save).parameters
    strategy.async_save(sharded, directory, **({"async_strategy": "mcore"} if choice else {}))
    files = {
        name: [(item.index, data) for item, data in held]
        + [(item.index, tensor.to("cpu", copy=copy).contiguous()) for item, tensor in tensors]
        for _path, name, (held, tensors) in strategy.buckets
    }
    return _Save(directory, files, common, strategy.metadata)


def _write_files(save: _Save, *, first: bool) -> tuple[list[Any], dict[str, Any]]:
    """This rank's data files, two at a time; ([where each piece lies], manifest records)."""
    with without_crc(), ThreadPoolExecutor(2) as pool:
        written = list(pool.map(lambda item: write_pieces(save.directory / item[0], item[1]), save.files.items()))
    if first:
        content = io.BytesIO()  # torch.save to a file would not say why the disk did not take it
        torch.save(save.common, content)
        (save.directory / COMMON).write_bytes(content.getvalue())
    records = {name: record for name, (_, record) in zip(save.files, written, strict=True)}
    return [result for results, _ in written for result in results], records


def newest_whole(directory: Path, workers: Workers) -> Path | None:
    """The newest whole checkpoint in RUN_DIR/checkpoints, or None; each worker verifies its share of the files.

    Torn or altered ones are skipped with a warning that names them; UnreadableError where the system does not read one. A
    collective call.
    """
    return _search(directory, workers)[0]


def _search(directory: Path, workers: Workers) -> tuple[Path | None, dict[Path, str]]:
    """(the newest whole checkpoint, what is wrong with each newer one)."""
    problems: dict[Path, str] = {}
    for path in reversed(on_first_rank(workers, lambda: checkpoints(directory), f"{directory} could not be read")):
        problem = verify(path, workers)
        if problem is None:
            return path, problems
        problems[path] = problem
        if workers.rank == 0:
            logger.warning("%s is not whole (%s); looking at the one before it", path, problem)
    return None, problems


def _set_aside(path: Path) -> None:
    """Out of the way of the checkpoints that count, under the first free name that says why: .damaged, .damaged.2, ..."""
    names = itertools.chain([DAMAGED], (f"{DAMAGED}.{number}" for number in itertools.count(2)))
    aside = next(p for p in (path.with_name(path.name + name) for name in names) if not p.exists())
    path.rename(aside)
    logger.warning("%s: moved to %s; remove it once nobody needs it", path, aside.name)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a torch_dist checkpoint (and not an HF directory)."""
    return (Path(directory) / METADATA).exists()


def load_weights(path: Path, chunks: Sequence[Any]) -> None:
    """Copy a checkpoint's weights into this rank's part of the model, in any layout; each rank reads what it holds.

    chunks: of build_model. path: a checkpoint of a run, or made by a conversion. A collective call. CheckpointError,
    listing all of them, for tensors that are missing or of another shape, and for a torn or altered checkpoint.
    """
    from megatron.core import dist_checkpointing

    workers = TorchWorkers() if dist.get_world_size() > 1 else Alone()
    if problem := verify(path, workers):
        raise CheckpointError(f"{path} is not a whole checkpoint ({problem}); convert or copy it again")
    template = {f"model{i}": chunk.sharded_state_dict(metadata=dict(MODEL_METADATA)) for i, chunk in enumerate(chunks)}
    absent = fit_template(template, path, workers)
    state = dist_checkpointing.load(template, str(path))
    put_back(state, dict.fromkeys(absent))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{i}"])


def checkpoints(directory: Path) -> list[Path]:
    """The directories of RUN_DIR/checkpoints that are checkpoints by their names, whole or not, by step."""
    steps = {p: p.name.removeprefix("step_") for p in directory.glob("step_*") if p.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: int(steps[path]))


def check_architecture(path: Path, architecture: Mapping[str, Any]) -> None:
    """CheckpointError naming the keys in which a checkpoint's architecture differs. Reads the manifest only."""
    saved, wanted = read_manifest(path)["architecture"], json.loads(json.dumps(dict(architecture)))
    keys = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
    if keys:
        raise CheckpointError(
            f"{path}: saved from another architecture: "
            + ", ".join(f"{k} {saved.get(k)} there, {wanted.get(k)} here" for k in keys)
            + ". Use another run_dir, or the model that made it."
        )


def deciding_keys(hf_config: HFConfig) -> dict[str, Any]:
    """The keys of an HF config.json that decide names and shapes of tensors."""
    deciding = (
        "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
        "vocab_size tie_word_embeddings q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "moe_intermediate_size n_routed_experts n_shared_experts first_k_dense_replace num_nextn_predict_layers "
        "mlp_only_layers decoder_sparse_step"
    ).split()
    found = {key: hf_config[key] for key in deciding if hf_config.get(key) is not None}
    if "n_routed_experts" not in found and (experts := num_experts(hf_config)):  # of two spellings
        found["num_experts"] = experts
    defaults = {"mlp_only_layers": [], "decoder_sparse_step": 1}
    return {key: value for key, value in found.items() if key not in defaults or value != defaults[key]}
