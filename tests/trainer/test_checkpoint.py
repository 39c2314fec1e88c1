"""Test that checkpoints are complete or absent. The kill test and the two-rank test also run this file as a program."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rmsd_fast.config import CheckpointError
from rmsd_fast.files import write_tensors
from rmsd_fast.runtime import checkpoint as checkpoint_module
from rmsd_fast.runtime.checkpoint import (
    compare_fingerprints,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from rmsd_fast.runtime.process_group import World, any_rank
from rmsd_fast.runtime.stop_signal import StopSignal

ALONE = World(0, 1, 0, torch.device("cpu"))


class OneTensor:
    """Provide the two methods that a checkpoint needs from an engine."""

    def __init__(self, value: float) -> None:
        self.tensor = torch.full((64,), float(value))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "tensor.safetensors", {"tensor": self.tensor})

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.tensor = load_file(folder / "tensor.safetensors")["tensor"]


def save(folder: Path, tag: int, **options) -> bool:
    options = {"world": ALONE, "engines": {"policy": OneTensor(tag)}, "state": {"step": tag, "lr": 0.1 + 0.2}} | options
    return save_checkpoint(folder, tag, **options)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def loaded(folder: Path) -> float:
    checkpoint = find_checkpoint(folder, world=ALONE)
    engine = OneTensor(-1)
    load_checkpoint(checkpoint, world=ALONE, engines={"policy": engine})
    assert engine.tensor.unique().numel() == 1
    return float(engine.tensor[0])


def test_roundtrip(tmp_path):
    """Engines, random generators, JSON state and the export are restored exactly."""
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.normal()  # Leave half of a pair in both generators.
    assert save(tmp_path, 5, writers={"export": lambda f: (f / "a").write_text("x")})
    draws = random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(3).tolist()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    checkpoint = find_checkpoint(tmp_path, world=ALONE)
    assert checkpoint.tag == 5 and checkpoint.damaged == []
    engine = OneTensor(-1)
    state = load_checkpoint(checkpoint, world=ALONE, engines={"policy": engine})
    assert state == {"step": 5, "lr": 0.1 + 0.2}  # Floats are exact and not rounded.
    assert torch.equal(engine.tensor, torch.full((64,), 5.0))
    assert draws == (random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(3).tolist())
    assert (checkpoint.folder / "export" / "a").read_text() == "x"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_5\n"


def test_no_checkpoint_and_no_pickle_files(tmp_path):
    assert find_checkpoint(tmp_path, world=ALONE) is None
    save(tmp_path, 1)
    suffixes = {p.suffix for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors", ""}  # The empty suffix is that of `latest`.


def test_keeps_the_newest(tmp_path):
    for tag in (1, 2, 3):
        save(tmp_path, tag, keep=2)
    assert names(tmp_path) == ["latest", "step_2", "step_3"]
    save(tmp_path, 10, keep=1)
    assert names(tmp_path) == ["latest", "step_10"]
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 11, keep=0)


def damage_flip(folder: Path) -> str:
    path = folder / "engines" / "policy" / "tensor.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    return "has a different sha256 than when it was written"


def damage_cut(folder: Path) -> str:
    path = folder / "engines" / "policy" / "tensor.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    return "bytes, expected"


def damage_lose(folder: Path) -> str:
    (folder / "state.json").unlink()
    return "state.json is missing"


def damage_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text('{"files": {"state.json"')
    return "manifest.json unreadable"


def damage_escape(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../elsewhere"] = {"size": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "is outside"


def damage_unlist(folder: Path) -> str:
    """Remove an entry from the list, so that its file would not be checked."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["engines/policy/tensor.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "engines/policy/tensor.safetensors is not in the manifest"


def damage_loop(folder: Path) -> str:
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to("state.json")
    return "state.json is missing"


DAMAGES = [damage_flip, damage_cut, damage_lose, damage_manifest, damage_escape, damage_unlist, damage_loop]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_with_a_message(tmp_path, damage, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2)
    words = damage(tmp_path / "checkpoints" / "step_2")
    assert loaded(tmp_path) == 1.0
    assert words in caplog.text and "step_2 is damaged" in caplog.text
    # Training from there passes step 2 again and must not count the damaged checkpoint among those that are kept.
    save(tmp_path, 2, engines={"policy": OneTensor(22)}, keep=1)
    assert loaded(tmp_path) == 22.0
    assert names(tmp_path) == ["latest", "step_2"]


def test_an_unreadable_checkpoint_falls_back_with_a_message(tmp_path, monkeypatch, caplog):
    """Permissions or a bad sector can cause this; root can ignore permissions, so the error is simulated."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    sha256 = checkpoint_module.file_sha256

    def unreadable(path):
        if path.parts[-4:-1] == ("step_2", "engines", "policy"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256(path)

    monkeypatch.setattr(checkpoint_module, "file_sha256", unreadable)
    assert loaded(tmp_path) == 1.0
    assert "engines/policy/tensor.safetensors cannot be read (Input/output error)" in caplog.text


def test_a_file_missing_from_disk_and_list_is_reported(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step_1"
    damage_unlist(folder)
    (folder / "engines" / "policy" / "tensor.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensor\.safetensors.*; resume from a copy"):
        loaded(tmp_path)


def test_checkpoints_after_a_fallback_are_removed(tmp_path):
    """After a fallback to 1, saving 2 removes the damaged 3 instead of keeping it as the newest."""
    save(tmp_path, 1)
    save(tmp_path, 3)
    damage_cut(tmp_path / "checkpoints" / "step_3")
    save(tmp_path, 2, keep=2)
    assert names(tmp_path) == ["latest", "step_1", "step_2"]
    assert loaded(tmp_path) == 2.0


def test_all_damaged(tmp_path):
    save(tmp_path, 1)
    damage_lose(tmp_path / "checkpoints" / "step_1")
    with pytest.raises(ValueError, match=r"state\.json is missing.*start a new run"):
        find_checkpoint(tmp_path, world=ALONE)


def test_latest_is_missing_or_truncated(tmp_path):
    save(tmp_path, 9)
    save(tmp_path, 10)
    for content in (b"", b"step_77\n", b"\xff\xfe"):
        (tmp_path / "checkpoints" / "latest").write_bytes(content)
        assert loaded(tmp_path) == 10.0
    (tmp_path / "checkpoints" / "latest").unlink()
    assert loaded(tmp_path) == 10.0


def test_kill_between_the_renames(tmp_path):
    """A checkpoint that was being replaced by another with the same tag is still found."""
    save(tmp_path, 4)
    root = tmp_path / "checkpoints"
    (root / "step_4").rename(root / "step_4.replaced")
    (root / ".step_4.tmp").mkdir()
    assert loaded(tmp_path) == 4.0
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["latest", "step_5"]


@pytest.mark.parametrize("where", ["engine", "writer", "manifest"])
def test_disk_full(tmp_path, where, monkeypatch, caplog):
    """Training continues, the old checkpoint stays, no partial files remain, and saving works again with free space."""
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = {"writers": {"export": full}} if where == "writer" else {}
    with monkeypatch.context() as patch:
        if where == "engine":
            patch.setattr(OneTensor, "save", full)
        if where == "manifest":
            patch.setattr("rmsd_fast.runtime.checkpoint._commit", full)
        assert save(tmp_path, 2, **options) is False
    assert "No space left" in caplog.text and "training continues without it" in caplog.text
    assert names(tmp_path) == ["latest", "step_1"]
    assert loaded(tmp_path) == 1.0
    assert save(tmp_path, 3) is True and loaded(tmp_path) == 3.0


def test_full_disk_of_safetensors_is_an_oserror(tmp_path, monkeypatch):
    """safetensors has its own error class; this is its message on a full file system."""
    from safetensors import SafetensorError

    def fail(text: str):
        def save_file(*args, **kwargs):
            raise SafetensorError(text)

        monkeypatch.setattr("safetensors.torch.save_file", save_file)
        write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})

    with pytest.raises(OSError) as caught:
        fail("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(PermissionError):
        fail("Error while serializing: I/O error: Permission denied (os error 13)")
    with pytest.raises(SafetensorError):
        fail("Error while serializing: tensors share memory")


def test_other_failures_are_raised_and_leave_no_files(tmp_path):
    save(tmp_path, 1)

    def broken(folder):
        (folder / "half").write_text("x")
        raise KeyError("no such layer")

    with pytest.raises(RuntimeError, match=r"rank 0: KeyError: 'no such layer'.*previous checkpoints remain"):
        save(tmp_path, 2, writers={"export": broken})
    assert names(tmp_path) == ["latest", "step_1"]
    with pytest.raises(ValueError):
        save(tmp_path, 2, state={"loss": float("nan")})
    assert names(tmp_path) == ["latest", "step_1"]


def test_other_engines_are_refused(tmp_path):
    save(tmp_path, 1)
    checkpoint = find_checkpoint(tmp_path, world=ALONE)
    with pytest.raises(ValueError, match=r"expected the engine 'discriminator', got \['policy'\]"):
        load_checkpoint(checkpoint, world=ALONE, engines={"discriminator": OneTensor(0)})


def test_compare_fingerprints():
    saved = {"settings": {"distill": {"lr": 1e-6, "kl": "k3"}, "stages": ["sft"]}, "pool": "aa"}
    same = {"settings": {"distill": {"kl": "k3", "lr": 1e-6}, "stages": ("sft",)}, "pool": "aa"}
    assert compare_fingerprints(saved, same) == []
    now = {"settings": {"distill": {"lr": 2e-6}, "stages": ["sft"]}, "pool": "bb", "data": "cc"}
    expected = [
        "data: was absent, now 'cc'",
        "pool: was 'aa', now 'bb'",
        "settings.distill.kl: was 'k3', now absent",
        "settings.distill.lr: was 1e-06, now 2e-06",
    ]
    assert compare_fingerprints(saved, now, allow_changes=True) == expected
    with pytest.raises(ValueError) as caught:
        compare_fingerprints(saved, now)
    assert all(line in str(caught.value) for line in expected) and "--allow-changes" in str(caught.value)


def start_program(*arguments: str, **env: str) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_kill_while_saving(tmp_path):
    """After kill -9 during the second checkpoint, the first one loads and saving continues after it."""
    process = start_program("kill", str(tmp_path))
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait(timeout=30)
    assert names(tmp_path) == [".step_2.tmp", "latest", "step_1"]
    assert (tmp_path / "checkpoints" / ".step_2.tmp" / "engines" / "policy" / "tensor.safetensors").exists()
    assert loaded(tmp_path) == 1.0
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_1", "step_2"]
    assert loaded(tmp_path) == 2.0


def test_two_ranks_agree(tmp_path):
    """A checkpoint has the parts of both ranks, and a full disk, damage or SIGTERM on one rank affects both."""
    ranks = [
        start_program("ranks", str(tmp_path), RANK=str(r), WORLD_SIZE="2", STORE=str(tmp_path / "store"))
        for r in range(2)
    ]
    outputs = [p.communicate(timeout=120)[0] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], outputs
    results = [json.loads((tmp_path / f"rank_{r}.json").read_text()) for r in range(2)]
    for rank, result in enumerate(results):
        assert result["full"] is False and result["after_full"] == ["latest", "step_1"]
        assert result["raised"].startswith("RuntimeError") and "rank 1: ValueError: only here" in result["raised"]
        assert result["stop"] == [False, True]
        assert result["loaded"] == rank + 1.0  # Each rank loads its own part.
        assert result["fallback"] == 1
    assert "step_3 is damaged" in outputs[0] and "step_3 is damaged" not in outputs[1]


def program_kill(folder: Path) -> None:
    save(folder, 1)

    def slow(export: Path) -> None:
        (export / "model.safetensors").write_bytes(b"half")
        print("writing", flush=True)
        time.sleep(60)

    save(folder, 2, writers={"export": slow})


class RankTensor(OneTensor):
    def __init__(self, value: float, rank: int, fault: Exception | None = None) -> None:
        super().__init__(value)
        self.rank, self.fault = rank, fault

    def save(self, folder: Path) -> None:
        if self.fault:
            raise self.fault
        super().save(folder / str(self.rank))

    def load(self, folder: Path) -> None:
        super().load(folder / str(self.rank))


def program_ranks(folder: Path) -> None:
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=2)
    world = World(rank, 2, rank, torch.device("cpu"))
    result = {}

    def put(tag: int, fault: Exception | None = None) -> bool:
        engine = RankTensor(rank + 1, rank, fault if rank == 1 else None)
        return save_checkpoint(folder, tag, world=world, engines={"policy": engine}, state={"step": tag})

    assert put(1)
    result["full"] = put(2, OSError(errno.ENOSPC, "No space left on device"))
    result["after_full"] = names(folder)
    dist.barrier()
    try:
        put(2, ValueError("only here"))
    except RuntimeError as error:
        result["raised"] = f"{type(error).__name__}: {error}"
    stop = StopSignal()
    with stop.deferred():
        result["stop"] = [any_rank(stop.asked, world)]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        result["stop"].append(any_rank(stop.asked, world))
    assert put(3)
    checkpoint = find_checkpoint(folder, world=world)
    assert checkpoint.tag == 3
    engine = RankTensor(-1, rank)
    load_checkpoint(checkpoint, world=world, engines={"policy": engine})
    result["loaded"] = float(engine.tensor[0])
    dist.barrier()
    if rank == 0:
        path = checkpoint.folder / "engines" / "policy" / "1" / "tensor.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    result["fallback"] = find_checkpoint(folder, world=world).tag
    (folder / f"rank_{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    {"kill": program_kill, "ranks": program_ranks}[sys.argv[1]](Path(sys.argv[2]))
