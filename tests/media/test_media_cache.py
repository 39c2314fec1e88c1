"""Test the caches of decoded frames: bounds, concurrent use, damaged entries, and a full disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rmsd_fast.config import SettingsError
from rmsd_fast.data import media_cache
from rmsd_fast.data.media_cache import BLOCK, ByteLru, DiskCache
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import Frames


def frames_of(seed: int, count: int = 2) -> Frames:
    pixels = torch.randint(0, 256, (count, 3, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    kind = "video" if count > 1 else "image"
    stamps = tuple(i / 3 for i in range(count)) if count > 1 else ()
    rate = 3.0 if kind == "video" else None
    preprocessor = Preprocessor(14, family="qwen2_vl")
    return Frames(pixels, stamps, (1, 2, 4), kind, preprocessor, duration_s=1.5, frames_per_s=rate)


SIZE = BLOCK + 2 * 3 * 32 * 64


def key_of(seed: int) -> str:
    return f"{seed:032x}"


def used(cache: DiskCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.glob("??/*"))


def test_lru_is_bounded_and_drops_the_least_recently_used() -> None:
    cache: ByteLru[str] = ByteLru(1000)
    for name in "abc":
        cache.put(name, name.upper(), 400)
        cache.get("a")
    assert (cache.bytes, cache.get("a"), cache.get("b"), cache.get("c")) == (800, "A", None, "C")
    cache.put("large", "", 1001)
    assert cache.get("large") is None and cache.bytes == 800
    cache.put("a", "another", 10)
    assert cache.get("a") == "A" and cache.bytes == 800


@pytest.mark.parametrize("count", [2, 1])
def test_frames_come_back_as_they_were(tmp_path: Path, count: int) -> None:
    cache = DiskCache(tmp_path, 2**20)
    cache.put(key_of(1), frames_of(1, count))
    found = DiskCache(tmp_path, 2**20).get(key_of(1))
    expected = frames_of(1, count)
    assert torch.equal(found.pixels, expected.pixels) and found.key == key_of(1)
    assert (found.timestamps_s, found.grid_thw, found.kind) == (expected.timestamps_s, (1, 2, 4), expected.kind)
    assert (found.preprocessor, found.duration_s, found.decoder) == (expected.preprocessor, 1.5, "cpu")
    assert found.frames_per_s == expected.frames_per_s
    assert cache.get(key_of(2)) is None and cache.corrupt == 0
    peeked = cache.peek(key_of(1))
    assert (peeked.timestamps_s, peeked.grid_thw, peeked.kind) == (found.timestamps_s, found.grid_thw, found.kind)
    assert cache.peek(key_of(2)) is None
    cache._path(key_of(1)).write_bytes(b"short")
    assert cache.peek(key_of(1)) is None and cache.corrupt == 0


def test_disk_is_bounded_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10 * SIZE)
    for seed in range(10):
        cache.put(key_of(seed), frames_of(seed))
        os.utime(cache._path(key_of(seed)), (seed, seed))
    assert cache.get(key_of(0)) is not None  # This marks the entry as used.
    cache.put(key_of(10), frames_of(10))
    assert used(cache) <= 10 * SIZE
    assert cache.get(key_of(0)) is not None and cache.get(key_of(10)) is not None
    assert cache.get(key_of(1)) is None
    assert int((tmp_path / "bytes").read_text()) == used(cache)
    DiskCache(tmp_path, SIZE - 1).put(key_of(11), frames_of(11))
    assert cache.get(key_of(11)) is None


@pytest.mark.parametrize(
    "damage", ["short", "longer", "pixel", "stamp", "shape", "length", "magic", "other key", "not ours", "empty"]
)
def test_damaged_entries_are_removed_and_counted(tmp_path: Path, damage: str) -> None:
    cache = DiskCache(tmp_path, 2**20)
    cache.put(key_of(1), frames_of(1))
    path = cache._path(key_of(1))
    data = bytearray(path.read_bytes())
    if damage == "short":
        data = data[:-5]
    elif damage == "longer":
        data += b"x"
    elif damage == "pixel":
        data[-7] ^= 1
    elif damage == "stamp":
        # The damaged header is still valid JSON with another number.
        where = data.index(b"0.333")
        data[where + 2 : where + 3] = b"9"
    elif damage == "shape":
        where = data.index(b"[2, 3, 32")
        data[where + 1 : where + 2] = b"4"
    elif damage == "length":
        data[12:16] = (2**31).to_bytes(4, "little")
    elif damage == "magic":
        data[0] ^= 1
    elif damage == "other key":
        path.unlink()
        path = cache._path(key_of(2))
        path.parent.mkdir(exist_ok=True)
    elif damage == "not ours":
        data = bytearray(b"\xff" * 5000)
    else:
        data = bytearray()
    path.write_bytes(data)
    assert cache.get(path.stem) is None
    assert cache.corrupt == 1 and not path.exists()
    cache.put(path.stem, frames_of(1))
    assert cache.get(path.stem) is not None


def test_long_videos_have_long_headers(tmp_path: Path) -> None:
    pixels = torch.zeros(3000, 1, 1, 1, dtype=torch.uint8)
    frames = Frames(pixels, tuple(i / 7 for i in range(3000)), (1500, 2, 2), "video")
    cache = DiskCache(tmp_path, 2**20)
    cache.put(key_of(1), frames)
    assert cache.get(key_of(1)).timestamps_s == frames.timestamps_s


def test_a_disk_read_error_is_a_miss_and_not_damage(tmp_path: Path, monkeypatch) -> None:
    cache = DiskCache(tmp_path, 2**20)
    cache.put(key_of(1), frames_of(1))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    # An entry that belongs to another user can be read, but its access time cannot be set.
    monkeypatch.setattr(media_cache.os, "utime", refuse)
    assert cache.get(key_of(1)) is not None
    monkeypatch.setattr(media_cache, "_read", refuse)
    assert cache.get(key_of(1)) is None
    monkeypatch.undo()
    assert cache.corrupt == 0 and cache.get(key_of(1)) is not None


def test_a_folder_that_cannot_be_created_is_a_setting_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"data\.disk_cache: cannot create"):
        DiskCache(tmp_path / "file" / "cache", 2**20)


def test_a_process_that_keeps_the_lock_does_not_block_others(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(media_cache, "LOCK_S", 0.1)
    holder, waiting = DiskCache(tmp_path, 2**20), DiskCache(tmp_path, 2**20)
    with holder._locked():
        waiting.put(key_of(1), frames_of(1))
    assert waiting.get(key_of(1)) is None and "its frames are not kept" in caplog.text
    waiting.put(key_of(1), frames_of(1))
    assert waiting.get(key_of(1)) is not None


def test_a_full_disk_drops_entries_and_is_reported_once(tmp_path: Path, monkeypatch, caplog) -> None:
    cache = DiskCache(tmp_path, 2**20)
    cache.put(key_of(1), frames_of(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(media_cache, "write_all", full)
    cache.put(key_of(2), frames_of(2))
    cache.put(key_of(3), frames_of(3))
    monkeypatch.undo()
    assert len([record for record in caplog.records if "No space left" in record.message]) == 1
    assert [path.stem for path in tmp_path.glob("??/*.frames")] == [key_of(1)]
    # The disk has free space again.
    cache.put(key_of(4), frames_of(4))
    assert cache.get(key_of(1)) is not None and cache.get(key_of(4)) is not None


def test_unfinished_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 2**20)
    cache.put(key_of(1), frames_of(1))
    halves = [cache._path(key_of(9)).with_name(f".{key_of(9)}.frames.99999999.tmp"), tmp_path / ".bytes.99999999.tmp"]
    for half in halves:
        half.write_bytes(b"half")
    (tmp_path / "bytes").unlink()
    cache.put(key_of(2), frames_of(2))
    assert not any(half.exists() for half in halves) and int((tmp_path / "bytes").read_text()) == 2 * SIZE


PROCESS = """
import sys
sys.path.insert(0, sys.argv[3])
import torch
from test_media_cache import SIZE, frames_of, key_of
from rmsd_fast.data.media_cache import DiskCache
cache = DiskCache(sys.argv[1], 12 * SIZE)
for turn in range(3):
    for seed in range(20):
        seed = (seed * 7 + int(sys.argv[2])) % 20
        found = cache.get(key_of(seed))
        if found is None:
            cache.put(key_of(seed), frames_of(seed))
        else:
            assert torch.equal(found.pixels, frames_of(seed).pixels)
assert cache.corrupt == 0
"""


def test_several_processes_use_the_cache_at_once(tmp_path: Path) -> None:
    """There are more entries than fit, so processes evict entries that others read."""
    here = str(Path(__file__).parent)
    commands = [[sys.executable, "-c", PROCESS, str(tmp_path), str(start), here] for start in (0, 3)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    cache = DiskCache(tmp_path, 12 * SIZE)
    assert 0 < used(cache) <= 12 * SIZE
    assert not list(tmp_path.glob("??/*.tmp"))


def test_several_threads_use_the_cache_at_once(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 5 * SIZE)

    def work(seed: int) -> bool:
        cache.put(key_of(seed % 10), frames_of(seed % 10))
        found = cache.get(key_of(seed % 10))
        return found is None or torch.equal(found.pixels, frames_of(seed % 10).pixels)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(60)))
    assert used(cache) <= 5 * SIZE and cache.corrupt == 0
