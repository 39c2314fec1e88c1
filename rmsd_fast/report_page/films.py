"""Previews of media files for the page, read by a process that a bad file may hang or crash."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rmsd_fast.data.decode_worker import ForkServer, Worker
    from rmsd_fast.data.media_paths import Span

# Fewer would miss what is seen for a second or two of a short clip.
FRAMES_PER_FILM = 8
LONGEST_PX = 240
# A page with many files on a disk that hangs is written all the same.
MOST_LOST = 3


@dataclass(frozen=True)
class Film:
    """What the page shows of a media file: (source, caption) of its frames, or the fault that left it without them.

    seconds: when a video ends, on the file's clock; None for a picture.
    """

    shots: list[tuple[str, str]]
    fault: str = ""
    seconds: float | None = None


class Films:
    """Reads previews, each part of a file once.

    Args:
        timeout_s: for one file.
        max_file_mib: larger files are refused, as the run refuses them.
    """

    def __init__(self, timeout_s: float, max_file_mib: int) -> None:
        self._timeout_s = timeout_s
        self._max_file_mib = max_file_mib
        self._read: dict[tuple[str, bool, Span], Film] = {}
        self._fork_server: ForkServer | None = None
        self._worker: Worker | None = None
        self._lost = 0

    def __enter__(self) -> Films:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._fork_server is not None:
            self._fork_server.close()

    def read(self, path: str, *, is_video: bool, span: Span = None) -> Film:
        """The film of a file; a file that cannot be read has a fault in place of frames.

        Args:
            span: start and end in seconds of the part of a video that is shown; None = all of it.
        """
        key = (path, is_video, span)
        if key not in self._read:
            self._read[key] = self._film(path, is_video, span)
        return self._read[key]

    def _film(self, path: str, is_video: bool, span: Span) -> Film:
        # The media may have gone since the run, or no decoder is installed here: the page is still worth having.
        from rmsd_fast.config import UserError, first_line
        from rmsd_fast.data.decode_worker import ForkServer, NotStarted, WorkerLost
        from rmsd_fast.data.media_file import MediaError
        from rmsd_fast.data.video import PreviewRequest

        if not Path(path).is_file():
            return Film([], f"no such file: {path}")
        if self._lost == MOST_LOST:
            return Film([], f"not read: {MOST_LOST} files before it could not be")
        request = PreviewRequest(
            path, "video" if is_video else "image", FRAMES_PER_FILM, LONGEST_PX, self._max_file_mib, span
        )
        try:
            if self._fork_server is None:
                self._fork_server = ForkServer()
            if self._worker is None or self._worker.lost:
                self._worker = self._fork_server.worker()
            preview = self._worker.preview(request, self._timeout_s)
        except (MediaError, UserError, NotStarted, OSError) as error:
            self._lost += isinstance(error, WorkerLost)
            self._lost = MOST_LOST if isinstance(error, NotStarted) else self._lost
            reason = first_line(error)
            return Film([], reason[:200])
        captions = [f"{time:.1f} s" for time in preview.times_s] or ["picture"]
        shots = [(_jpeg(frame), caption) for frame, caption in zip(preview.frames, captions, strict=True)]
        return Film(shots, "", preview.seconds)


def _jpeg(frame: object) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
