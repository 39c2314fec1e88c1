"""Build the requests of a question: the student's prompt as OpenAI's chat messages, with media as data URLs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import mimetypes
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from rmsd_fast.collect_run.config import CollectConfig, CollectionConfig
from rmsd_fast.collect_run.plan import VIDEO_TOKENS, picture_tokens, text_tokens
from rmsd_fast.data.errors import counted
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.media_file import open_media, stat_file
from rmsd_fast.data.media_paths import Span
from rmsd_fast.data.preprocess import Preprocessor, frame_rule
from rmsd_fast.data.question_text import content_parts, question_text
from rmsd_fast.data.records import Question
from rmsd_fast.data.video import SETTINGS_OF, Frames, MediaLayout, MediaRequest
from rmsd_fast.teacher.pool import request_key

# Added to a question whose answers were all wrong.
HINT = "A correct answer is: {answer}\nExplain how it follows from what you see, as if you had found it yourself."


class Messages(NamedTuple):
    """The messages of a question as JSON, and their estimated number of tokens."""

    json: bytes
    tokens: int


class RequestBuilder:
    """Build the messages of questions. Thread-safe.

    Args:
        settings: settings of the collection.
        preprocessor: the student's preprocessing settings, which determine the choice and the size of frames.
        media: reads the frames.
    """

    def __init__(self, settings: CollectionConfig, preprocessor: Preprocessor, media: MediaReader) -> None:
        self._settings, self._preprocessor, self._media = settings, preprocessor, media
        self._short: dict[str, int] = {}

    def messages(self, question: Question, *, hinted: bool = False) -> Messages:
        """Return the messages of a question.

        Args:
            question: the question.
            hinted: whether the messages show the ground truth.
        Raises:
            MediaError: a media file cannot be used.
            MediaUnreachable, NotInstalled: nothing can be read on this machine.
        """
        content: list[dict[str, Any]] = []
        tokens = text_tokens(question)
        media = iter(question.media)
        for part in content_parts(question_text(question), [kind for kind, _, _ in question.media]):
            if part["type"] == "text":
                content.append(part)
                continue
            kind, path, span = next(media)
            if self._sends_frames(kind):
                frames = self._media.read(self._request(kind, path, span))
                self._note_short(path, frames)
                content += frame_parts(frames, self._settings.collect.jpeg_quality)
                tokens += len(frames.pixels) * picture_tokens(*frames.pixels.shape[2:])
            else:
                content.append({"type": "video_url", "video_url": {"url": self._url(path)}})
                tokens += VIDEO_TOKENS
        if hinted:
            content.append({"type": "text", "text": HINT.format(answer=question.answer)})
        turns = [{"role": "system", "content": question.system}] if question.system else []
        return Messages(json.dumps([*turns, {"role": "user", "content": content}]).encode(), tokens)

    def estimate(self, question: Question) -> int:
        """Return the estimated number of tokens of a question's messages, from the headers of its media.

        Raises:
            MediaError: a media file cannot be used.
        """
        tokens = text_tokens(question)
        for kind, path, span in question.media:
            if not self._sends_frames(kind):
                stat_file(path, self._settings.data.max_file_mib)
                tokens += VIDEO_TOKENS
                continue
            layout = self._media.layout(self._request(kind, path, span))
            self._note_short(path, layout)
            height, width = (side * self._preprocessor.patch_size for side in layout.grid_thw[1:])
            tokens += max(1, len(layout.timestamps_s)) * picture_tokens(height, width)
        return tokens

    def short_videos(self) -> str:
        """Return a warning about the videos so far that have fewer frames than `video.num_frames`; "" without any."""
        if not self._short:
            return ""
        path, frames = next(iter(self._short.items()))
        have = "has" if len(self._short) == 1 else "have"
        repeats = self._preprocessor.repeats_frames
        return (
            f"{counted(len(self._short), 'video')} {have} fewer frames than video.num_frames="
            f"{self._settings.video.num_frames}, such as {path} with {frames}; "
            f"{'some frames are sent more than once' if repeats else 'fewer are sent'}, as the student sees them"
        )

    def _note_short(self, path: str, frames: Frames | MediaLayout) -> None:
        # A frame that is sent twice has the same time twice.
        different = len(set(frames.timestamps_s))
        if frames.kind == "video" and different < (self._settings.video.num_frames or 0):
            self._short[path] = different

    def _sends_frames(self, kind: str) -> bool:
        return kind == "image" or self._settings.collect.video_as == "frames"

    def _request(self, kind: str, path: str, span: Span) -> MediaRequest:
        return MediaRequest(path, kind, self._settings.video, self._preprocessor, span)

    def _url(self, path: str) -> str:
        """Return the URL of a whole video: of the file, or with its content."""
        with open_media(path, self._settings.data.max_file_mib) as media:
            if self._settings.collect.video_as == "file":
                return Path(path).absolute().as_uri()
            media.file.seek(0)
            data = base64.b64encode(media.file.read()).decode()
            return f"data:{mimetypes.guess_type(path)[0] or 'video/mp4'};base64,{data}"


def frame_parts(frames: Frames, quality: int) -> list[dict[str, Any]]:
    """Return one content part for each frame, after a text part with its time, as in prompts of Qwen3-VL."""
    parts: list[dict[str, Any]] = []
    for index, picture in enumerate(frames.pixels.permute(0, 2, 3, 1).numpy()):
        if frames.kind == "video":
            parts.append({"type": "text", "text": f"<{frames.timestamps_s[index]:.1f} seconds>"})
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        data = base64.b64encode(buffer.getbuffer()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    return parts


def request_body(collect: CollectConfig, model: str, messages: bytes, *, n: int, seed: int | None) -> bytes:
    """Return the body of a request for n answers. A request for one answer does not contain `n`."""
    values: dict[str, Any] = {"model": model, collect.token_limit: collect.max_tokens}
    optional = {"temperature": collect.temperature, "top_p": collect.top_p, "seed": seed, "n": n if n > 1 else None}
    values |= {name: value for name, value in optional.items() if value is not None}
    # The messages hold megabytes, so they are converted to JSON only once per question.
    return b'{"messages": ' + messages + b", " + json.dumps(values | collect.extra_body).encode()[1:]


def sample_seed(seed: int | None, question_id: str, k: int) -> int | None:
    """Return the seed of answer k to a question, which most servers accept: 31 bits."""
    if seed is None:
        return None
    digest = hashlib.blake2b(json.dumps([seed, question_id, k]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def sampling_of(settings: CollectionConfig, question: Question, family: str) -> dict[str, Any]:
    """Return what determines a request besides the question and its media, as it is stored in the pool.

    Frames are stored as the rule that chooses them: `{"num_frames": 16}`, or the fields of `video` that apply to
    `fps`. Media that were sent as a whole are stored as `video_as`. Without videos, there is no entry `frames`.
    """
    collect, video = settings.collect, settings.video
    names = ("temperature", "top_p", "seed", "max_tokens", "extra_body")
    sampling = {name: value for name in names if (value := getattr(collect, name)) not in (None, {})}
    kinds = {kind for kind, _, _ in question.media}
    if "video" in kinds:
        sampling["frames"] = frame_rule(video, family) if collect.video_as == "frames" else collect.video_as
    sent = [kind for kind in ("video", "image") if kind in kinds and (kind == "image" or collect.video_as == "frames")]
    if sent:
        pixels = [name for kind in sent for name in SETTINGS_OF[kind] if name.endswith("_pixels")]
        sampling |= {"jpeg_quality": collect.jpeg_quality} | {name: getattr(video, name) for name in pixels}
    return sampling


def answer_key(question: Question, model: str, sampling: dict[str, Any], media_digest: str) -> str:
    """Return the key of an answer: request_key with the model among the sampling parameters."""
    return request_key(question, sampling={"model": model, **sampling}, frame_indices=None, media_digest=media_digest)
