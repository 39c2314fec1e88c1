"""Checkpoints: one folder per checkpoint that is there in whole or not at all.

`checkpoints/.step_N.tmp` is filled by all ranks, listed in `manifest.json` (sizes and sha256), brought to disk, renamed
to `step_N`, and only then named in `checkpoints/latest`. A kill at any point leaves the former checkpoint. Files are
safetensors and JSON: loading runs no code from them. All ranks must see the run folder.
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
    """A verified checkpoint: its folder, tag, the `state` it was saved with, and why newer ones were passed over."""

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
    """Write `checkpoints/step_<tag>`; all ranks call it at the same point, between two steps.

    Args:
        tag: grows over the run; checkpoints of a higher tag belong to a future that was given up and are removed.
        engines: by name, each with `save(folder)` and `load(folder)`.
        state: whatever JSON can hold: stage, step, data cursor, fingerprints, counters.
        writers: by sub-folder name, called on rank 0 with that folder inside the checkpoint, e.g. the export. One that
            reads an engine's weights under ZeRO-3 needs this call to stand inside `engine.full_weights()`.
        keep: newest checkpoints kept, this one included.
    Returns:
        False when the disk is full or fails: nothing is left of this checkpoint, the former ones stay, training can
            go on.
    Raises:
        ValueError: keep < 1, or a state that JSON cannot hold.
        CheckpointError: a place that cannot be written to, on all ranks.
        RuntimeError: any other failure of one rank, on all ranks.
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
                # Files in use can outlive their removal on NFS. Only the place of this checkpoint has to be free.
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
        # Of all ranks: on shared disks one may not see yet what another has just written.
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
    """Do `work` on every rank and agree on the outcome: all results, or None when a disk was full or failed."""
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
        raise RuntimeError(f"{name} could not be written ({texts['fault']}); former checkpoints stay")
    if texts["refused"]:
        raise CheckpointError(
            f"{name} could not be written ({texts['refused']}); former checkpoints stay; put that right and resume"
        )
    if world.is_main:
        log.warning(
            "%s not written (%s); training goes on without it; free some space, or see to the disk",
            name,
            texts["full"],
        )
    return None


def _to_disk(path: Path) -> dict[str, Any]:
    """Bring a file to disk; its size in bytes and sha256."""
    sync_file(path)
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def _commit(root: Path, tmp: Path, tag: int) -> None:
    sync_folders(tmp)
    final, replaced = root / f"step_{tag}", root / f"step_{tag}.replaced"
    if final.exists():  # a run that fell back to an earlier checkpoint comes past this step again
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    tmp.rename(final)
    write_text_atomic(root / "latest", final.name + "\n")


def _prune(root: Path, tag: int, keep: int) -> None:
    """Keep this checkpoint and the newest before it. A failure to delete is no reason to end a run."""
    tags = sorted({int(m[1]) for p in root.iterdir() if (m := _NAME.fullmatch(p.name))}, reverse=True)
    kept = [t for t in tags if t <= tag][:keep]
    for path in list(root.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and (int(match[1]) not in kept or match[2]):
            # Renamed first: a kill in the middle of the removal leaves nothing that looks like a checkpoint.
            removed = path.with_name(f".{path.name}.removed.tmp")
            try:
                path.rename(removed)
                shutil.rmtree(removed)
            except OSError as error:
                log.warning("%s could not be removed: %s", path, error)


def find_checkpoint(run_folder: str | Path, *, world: World) -> Checkpoint | None:
    """The newest checkpoint whose files are those of its manifest, or None where there is none at all.

    A damaged one is passed over for the one before it, with a warning that says what is wrong with it.

    Raises:
        ValueError: there are checkpoints and all of them are damaged.
    """
    root = Path(run_folder) / "checkpoints"
    names = on_main(world, lambda: _candidates(root))
    damaged: list[str] = []
    for name in names:
        problems = [p for part in all_gather_objects(_problems(root / name, world), world) for p in part]
        if not problems:
            if damaged and world.is_main:
                log.warning("going back to %s: %s", root / name, "; ".join(damaged))
            state = json.loads((root / name / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(root / name, int(_NAME.fullmatch(name)[1]), state, damaged)  # type: ignore[index]
        damaged.append(f"{name} is damaged ({'; '.join(problems[:3])})")
    if damaged:
        raise CheckpointError(f"no checkpoint of {root} can be loaded: {'; '.join(damaged)}; start the run anew")
    return None


def _candidates(root: Path) -> list[str]:
    """Names of checkpoints: the one in `latest`, then the others from new to old."""
    if not root.is_dir():
        return []
    try:
        matches = {p.name: m for p in root.iterdir() if p.is_dir() and (m := _NAME.fullmatch(p.name))}
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read ({error.strerror}); check the folder") from error
    names = sorted(matches, key=lambda n: (int(matches[n][1]), not matches[n][2]), reverse=True)
    try:
        # Reading a pipe that stands in its place would wait for ever.
        first = (root / "latest").read_text(encoding="utf-8").strip() if (root / "latest").is_file() else ""
    except (OSError, UnicodeDecodeError):
        return names
    return names if first not in names else [first, *(n for n in names if n != first)]


def _problems(folder: Path, world: World) -> list[str]:
    """What this rank's share of the files has against the manifest."""
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
        # NFS gives files that were removed while they were open such a name for a while.
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
    """What a file of a checkpoint has against its entry in the manifest; otherwise empty."""
    # Not by Path.resolve, which raises RuntimeError where links lead in a circle.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return "lies outside the checkpoint"
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, expected {size}"
    return "" if file_sha256(path) == sha256 else "has another sha256 than written"


def load_checkpoint(checkpoint: Checkpoint, *, world: World, engines: Mapping[str, Any]) -> dict[str, Any]:
    """Put engines and random generators back as they were; returns the saved `state`.

    Raises:
        ValueError: saved with other engines, ranks or ZeRO stage than these.
    """
    folder = checkpoint.folder
    for name, engine in engines.items():
        if not (folder / "engines" / name).is_dir():
            have = sorted(p.name for p in (folder / "engines").glob("*"))
            raise CheckpointError(
                f"{folder} has no engine '{name}', only {have}; resume with the settings it was saved with"
            )
        try:
            engine.load(folder / "engines" / name)
        except FileNotFoundError as error:
            # Neither there nor in the manifest.
            raise CheckpointError(f"{folder}: {first_line(error)}; resume from a copy of the run folder") from error
    path = folder / f"rng_{world.rank:05d}.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} was saved by fewer processes than {world.size}; use as many as then")
    _restore_rng(json.loads(path.read_text(encoding="utf-8")))
    return checkpoint.state


def _rng_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators as JSON."""
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
    """What differs between a run's former settings and hashes and those of now; nested mappings by dotted name.

    Raises:
        ValueError: something differs and `allow_changes` is false.
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
            "this run differs from the one that it should continue (files and stage1: hashes of their contents):\n  "
            + "\n  ".join(changes)
            + "\ngo back to the former settings and data, or continue all the same with --allow-changes"
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
