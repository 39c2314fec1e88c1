"""Write and read checkpoints: one folder per checkpoint, written atomically.

All ranks fill `checkpoints/.step_N.tmp`. Its files are synced to disk and listed in `manifest.json` with their sizes
and sha256. Then the folder is renamed to `step_N`, and finally its name is written to `checkpoints/latest`. If the run
is killed at any point, the previous checkpoint remains. All files are safetensors or JSON, so loading does not execute
code. The run folder must be visible to all ranks.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmsd_fast.config import CheckpointError, SettingsError, first_line
from rmsd_fast.files import (
    ENVIRONMENT_ADVICE,
    file_sha256,
    is_disk_error,
    make_folder,
    sync_file,
    sync_folders,
    write_text_atomic,
)
from rmsd_fast.runtime.ends import is_lost_peer
from rmsd_fast.runtime.process_group import World, all_gather_objects, barrier, on_main

log = logging.getLogger("rmsd_fast")
_NAME = re.compile(r"step_(\d+)(\.replaced)?")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        folder: folder of the checkpoint.
        tag: tag of the checkpoint.
        state: `state` as given to `save_checkpoint`.
        damaged: problems of the newer checkpoints that were skipped.
    """

    folder: Path
    tag: int
    state: dict[str, Any]
    damaged: list[str] = field(default_factory=list)


def save_checkpoint(
    run_folder: str | Path,
    tag: int,
    *,
    world: World,
    engines: Mapping[str, Any],
    state: Mapping[str, Any],
    writers: Mapping[str, Callable[[Path], None]] | None = None,
    keep: int = 2,
) -> bool:
    """Write `checkpoints/step_<tag>`. All ranks must call this at the same point, between two steps.

    Args:
        run_folder: the run folder.
        tag: number that increases during the run. Checkpoints with a higher tag belong to an abandoned continuation and
            are removed.
        world: this process in the run.
        engines: engines by name, each with `save(folder)` and `load(folder)`.
        state: JSON-serializable state: stage, step, data cursor, fingerprints, counters.
        writers: functions by sub-folder name, called on rank 0 with that folder inside the checkpoint, e.g. for the
            export. If one reads an engine's weights under ZeRO-3, call this function inside `engine.full_weights()`.
        keep: number of newest checkpoints to keep, including this one.
    Returns:
        Whether the checkpoint was written. If the disk is full or fails, this checkpoint is removed, previous
        checkpoints remain, and training can continue.
    Raises:
        ValueError: keep < 1, or the state is not JSON-serializable.
        CheckpointError: on all ranks, if the folder is not writable.
        RuntimeError: on all ranks, if any other failure occurs on one rank.
    """
    if keep < 1:
        raise SettingsError(f"checkpoint.keep: expected 1 or more, got {keep}")
    text = json.dumps(dict(state), indent=1, allow_nan=False)
    root = Path(run_folder) / "checkpoints"
    tmp = root / f".step_{tag}.tmp"

    def prepare() -> dict[str, Any]:
        if world.is_main:
            make_folder(root)
            for leftover in root.glob("*.tmp"):
                # On NFS, files in use can remain after they are removed. Only this checkpoint's folder must be removed.
                shutil.rmtree(leftover, ignore_errors=leftover != tmp) if leftover.is_dir() else leftover.unlink()
            tmp.mkdir()
        return {}

    def write() -> dict[str, Any]:
        for name, engine in engines.items():
            engine.save(tmp / "engines" / name)
        (tmp / f"rng_{world.rank:05d}.json").write_text(json.dumps(_rng_state()), encoding="utf-8")
        if world.is_main:
            (tmp / "state.json").write_text(text + "\n", encoding="utf-8")
            for name, writer in (writers or {}).items():
                (tmp / name).mkdir()
                writer(tmp / name)
        return {}

    def finish() -> dict[str, Any]:
        # Gather names from all ranks: on shared disks, a rank may not see files that another rank has just written.
        seen = [str(p.relative_to(tmp)) for p in tmp.rglob("*") if p.is_file()]
        files = sorted({name for part in all_gather_objects(seen, world) for name in part})
        return {name: _to_disk(tmp / name) for name in files[world.rank :: world.size]}

    def commit() -> dict[str, Any]:
        if world.is_main:
            entries = {k: v for part in parts for k, v in sorted(part.items())}
            manifest = {"tag": tag, "world_size": world.size, "files": entries}
            write_text_atomic(tmp / "manifest.json", json.dumps(manifest, indent=1))
            _commit(root, tmp, tag)
        return {}

    for work in (prepare, write, finish, commit):
        parts = _together(work, tmp, world)
        if parts is None:
            return False
    if world.is_main:
        _prune(root, tag, keep)
    return True


def _together(work: Callable[[], dict[str, Any]], tmp: Path, world: World) -> list[dict[str, Any]] | None:
    """Run `work` on every rank and agree on the outcome. Return all results, or None if a disk was full or failed."""
    result, kind, text = {}, "", ""
    try:
        result = work()
    except Exception as caught:
        if is_lost_peer(caught):
            raise
        text = f"rank {world.rank}: {caught}"
        if is_disk_error(caught):
            kind = "full"
        elif isinstance(caught, OSError) and caught.errno in ENVIRONMENT_ADVICE:
            kind = "refused"
        else:
            kind, text = "fault", f"rank {world.rank}: {type(caught).__name__}: {caught}"
            log.error("checkpoint: rank %d failed", world.rank, exc_info=caught)
    outcomes = all_gather_objects((result, kind, text), world)
    texts = {kind: "; ".join(text for _, its, text in outcomes if its == kind) for kind in ("fault", "refused", "full")}
    if not any(texts.values()):
        return [result for result, _, _ in outcomes]
    if world.is_main:
        shutil.rmtree(tmp, ignore_errors=True)
    barrier(world)
    name = tmp.with_name(tmp.stem.removeprefix("."))
    if texts["fault"]:
        raise RuntimeError(f"{name} could not be written ({texts['fault']}); previous checkpoints remain")
    if texts["refused"]:
        raise CheckpointError(
            f"{name} could not be written ({texts['refused']}); previous checkpoints remain; fix the cause and resume"
        )
    if world.is_main:
        log.warning(
            "%s not written (%s); training continues without it; free some space or check the disk",
            name,
            texts["full"],
        )
    return None


def _to_disk(path: Path) -> dict[str, Any]:
    """Sync a file to disk and return its size in bytes and sha256."""
    sync_file(path)
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def _commit(root: Path, tmp: Path, tag: int) -> None:
    sync_folders(tmp)
    final, replaced = root / f"step_{tag}", root / f"step_{tag}.replaced"
    if final.exists():  # A run that fell back to an earlier checkpoint reaches this step again.
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    tmp.rename(final)
    write_text_atomic(root / "latest", final.name + "\n")


def _prune(root: Path, tag: int, keep: int) -> None:
    """Keep this checkpoint and the newest ones before it. A failure to delete does not end the run."""
    tags = sorted({int(m[1]) for p in root.iterdir() if (m := _NAME.fullmatch(p.name))}, reverse=True)
    kept = [t for t in tags if t <= tag][:keep]
    for path in list(root.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and (int(match[1]) not in kept or match[2]):
            # Rename first, so that a folder that is only partly removed does not look like a checkpoint.
            removed = path.with_name(f".{path.name}.removed.tmp")
            try:
                path.rename(removed)
                shutil.rmtree(removed)
            except OSError as error:
                log.warning("%s could not be removed: %s", path, error)


def find_checkpoint(run_folder: str | Path, *, world: World) -> Checkpoint | None:
    """Return the newest checkpoint whose files match its manifest, or None if there are no checkpoints.

    Damaged checkpoints are skipped with a warning that describes the problems.

    Args:
        run_folder: the run folder.
        world: this process in the run.
    Raises:
        CheckpointError: checkpoints exist, but all of them are damaged.
    """
    root = Path(run_folder) / "checkpoints"
    names = on_main(world, lambda: _candidates(root))
    damaged: list[str] = []
    for name in names:
        problems = [p for part in all_gather_objects(_problems(root / name, world), world) for p in part]
        if not problems:
            if damaged and world.is_main:
                log.warning("falling back to %s: %s", root / name, "; ".join(damaged))
            state = json.loads((root / name / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(root / name, int(_NAME.fullmatch(name)[1]), state, damaged)  # type: ignore[index]
        damaged.append(f"{name} is damaged ({'; '.join(problems[:3])})")
    if damaged:
        raise CheckpointError(f"no checkpoint of {root} can be loaded: {'; '.join(damaged)}; start a new run")
    return None


def _candidates(root: Path) -> list[str]:
    """Return the names of the checkpoints: first the name in `latest`, then the others from newest to oldest."""
    if not root.is_dir():
        return []
    try:
        matches = {p.name: m for p in root.iterdir() if p.is_dir() and (m := _NAME.fullmatch(p.name))}
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read ({error.strerror}); check the folder") from error
    names = sorted(matches, key=lambda n: (int(matches[n][1]), not matches[n][2]), reverse=True)
    try:
        # Without is_file, reading a named pipe at this path would block forever.
        first = (root / "latest").read_text(encoding="utf-8").strip() if (root / "latest").is_file() else ""
    except (OSError, UnicodeDecodeError):
        return names
    return names if first not in names else [first, *(n for n in names if n != first)]


def _problems(folder: Path, world: World) -> list[str]:
    """Return the mismatches between the manifest and this rank's share of the files."""
    if not (folder / "manifest.json").is_file():
        return ["manifest.json is missing"]
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        entries = [(str(n), int(e["size"]), str(e["sha256"])) for n, e in sorted(files.items())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"manifest.json unreadable: {error}"]
    problems = [] if "state.json" in files else ["state.json is not in the manifest"]
    try:
        unlisted = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {*files, "manifest.json"}
        # NFS temporarily gives names like this to files that were removed while open.
        unlisted = {name for name in unlisted if not Path(name).name.startswith(".nfs")}
    except OSError as error:
        return [*problems, f"{error.filename} cannot be read ({error.strerror})"]
    problems += [f"{name} is not in the manifest" for name in sorted(unlisted)]
    for name, size, sha256 in entries[world.rank :: world.size]:
        try:
            problem = _problem(folder, folder / name, size, sha256)
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        if problem:
            problems.append(f"{name} {problem}")
    return problems


def _problem(folder: Path, path: Path, size: int, sha256: str) -> str:
    """Return how a file of a checkpoint differs from its entry in the manifest, or ""."""
    # Path.resolve raises RuntimeError for circular links; realpath does not.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return "is outside the checkpoint"
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, expected {size}"
    return "" if file_sha256(path) == sha256 else "has a different sha256 than when it was written"


def load_checkpoint(checkpoint: Checkpoint, *, world: World, engines: Mapping[str, Any]) -> dict[str, Any]:
    """Restore engines and random generators, and return the saved `state`.

    Raises:
        CheckpointError: the checkpoint was saved with other engines, another dtype or other trained parameters.
    """
    folder = checkpoint.folder
    for name, engine in engines.items():
        if not (folder / "engines" / name).is_dir():
            have = sorted(p.name for p in (folder / "engines").glob("*"))
            raise CheckpointError(
                f"{folder}: expected the engine '{name}', got {have}; resume with the settings it was saved with"
            )
        try:
            engine.load(folder / "engines" / name)
        except FileNotFoundError as error:
            # The file is neither on disk nor in the manifest, so the verification could not detect that it is missing.
            raise CheckpointError(f"{folder}: {first_line(error)}; resume from a copy of the run folder") from error
    path = folder / f"rng_{world.rank:05d}.json"
    # If the checkpoint was saved by fewer ranks, the others keep their generators. Training does not draw from these
    # generators: every draw has its own seed.
    if path.is_file():
        _restore_rng(json.loads(path.read_text(encoding="utf-8")))
    return checkpoint.state


def _rng_state() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators as JSON."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state["cuda"])), dtype=torch.uint8))


def compare_fingerprints(saved: Mapping[str, Any], now: Mapping[str, Any], *, allow_changes: bool = False) -> list[str]:
    """Return the differences between saved and current settings and hashes. Nested keys are joined by dots.

    Args:
        saved: settings and hashes of the run to continue.
        now: current settings and hashes.
        allow_changes: whether differences are allowed.
    Raises:
        CheckpointError: there are differences and `allow_changes` is false.
    """
    old, new = _flatten(saved), _flatten(now)
    missing = object()
    changes = [
        f"{key}: was {_show(old.get(key, missing), missing)}, now {_show(new.get(key, missing), missing)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    ]
    if changes and not allow_changes:
        raise CheckpointError(
            "this run differs from the run to continue (values of files and stage1 are hashes of their contents):\n  "
            + "\n  ".join(changes)
            + "\nrestore the previous settings and data, or continue anyway with --allow-changes"
        )
    return changes


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _show(value: Any, missing: object) -> str:
    return "absent" if value is missing else repr(value)
