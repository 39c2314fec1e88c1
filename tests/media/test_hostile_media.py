"""Test files made to have a library read other files, run a program, or never end.

Each file is tried as a video and as a picture, with the reader of a run and with the reader of the report.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hostile_files import PROGRAMS, STRANGE_NAMES, is_magenta, make_hostile, make_secret, shown

from rmsd_fast.config import DataConfig, UserError, VideoConfig
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import MediaRequest
from rmsd_fast.report_page.films import Films

pytestmark = pytest.mark.timeout(300)
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    return make_secret(tmp_path_factory.mktemp("outside"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, secret) -> dict[str, Path]:
    return make_hostile(tmp_path_factory.mktemp("hostile"), secret)


def test_hostile_files_read_nothing_run_nothing_and_do_not_hang(tmp_path, monkeypatch, hostile, secret) -> None:
    ran = tmp_path / "ran"
    for name in PROGRAMS:
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {ran}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    read = []
    # Each request uses a new report, because a report keeps what it has read of a file.
    with (
        MediaReader(DataConfig(decode_timeout_s=LIMIT_S)) as reader,
        Films(LIMIT_S, 100) as videos,
        Films(LIMIT_S, 100) as images,
    ):
        # Check that the secret is recognized if it is read.
        assert is_magenta(reader.read(request(secret, "video")).pixels)
        shots = videos.read(str(secret), is_video=True).shots
        assert shots and all(map(is_magenta, map(shown, shots)))
        for name, path in hostile.items():
            for kind in ("video", "image"):
                began = time.monotonic()
                try:
                    frames = reader.read(request(path, kind))
                    read.append(name)
                    assert not is_magenta(frames.pixels), (name, kind)
                except (MediaError, UserError) as error:
                    assert "\n" not in str(error), (name, kind)
                film = (videos if kind == "video" else images).read(str(path), is_video=kind == "video")
                assert not any(map(is_magenta, map(shown, film.shots))), (name, kind)
                assert time.monotonic() - began < 3 * LIMIT_S, (name, kind)
        assert videos._lost == images._lost == 0
    # Check that the harmless video is read under each of the names.
    assert sorted(set(read)) == sorted(STRANGE_NAMES)
    assert not ran.exists(), ran.read_text()


def request(path: Path, kind: str) -> MediaRequest:
    return MediaRequest(str(path), kind, VideoConfig(num_frames=4), Preprocessor())
