"""Read previews of media files for the page in a separate process, because a bad file may hang or crash it."""

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

# Fewer frames would miss events of a second or two in a short clip.
FRAMES_PER_FILM = 8
LONGEST_PX = 240
# After this many lost files, no more files are read, so the page is written even if a disk hangs.
MOST_LOST = 3


@dataclass(frozen=True)
class Film:
    """The preview of a media file: (source, caption) of its frames, or an error message if there are none.

    seconds: end of a video in the file's time; None for a picture.
    """

    shots: list[tuple[str, str]]
    fault: str = ""
    seconds: float | None = None


class Films:
    """Read previews, and read each part of a file only once.

    Args:
        timeout_s: time limit of a file.
        max_file_mib: larger files are not read, as in the run.
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
        """Return the preview of a file. If the file cannot be read, the preview has an error message instead of frames.

        Args:
            path: the media file.
            is_video: whether it is a video, not a picture.
            span: start and end in seconds of the part of a video to show; None = the whole video.
        """
        key = (path, is_video, span)
        if key not in self._read:
            self._read[key] = self._film(path, is_video, span)
        return self._read[key]

    def _film(self, path: str, is_video: bool, span: Span) -> Film:
        # The page is useful even if the media were deleted after the run, or no decoder is installed here.
        from rmsd_fast.config import UserError, first_line
        from rmsd_fast.data.decode_worker import ForkServer, NotStarted, WorkerLost
        from rmsd_fast.data.media_file import MediaError
        from rmsd_fast.data.video import PreviewRequest

        if not Path(path).is_file():
            return Film([], f"no such file: {path}")
        if self._lost == MOST_LOST:
            return Film([], f"not read, because {MOST_LOST} files before it could not be read")
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
