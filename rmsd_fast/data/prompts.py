"""Convert questions to prompt tokens (chat template, frame stamps, vision tokens, M-RoPE), and responses to tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.chat_template import (
    END_TOKEN,
    IMAGE_PAD,
    VIDEO_PAD,
    render,
    response_opening,
)
from rmsd_fast.data.ground_truths import GroundTruthError, check_times
from rmsd_fast.data.marks import is_unicode
from rmsd_fast.data.preprocess import check_frame_counts
from rmsd_fast.data.question_text import content_parts, question_text
from rmsd_fast.data.records import Question
from rmsd_fast.data.subtitles import with_subtitles
from rmsd_fast.data.video import Frames, MediaLayout, MediaRequest, read_layout, read_media

# Values of `mm_token_type_ids` in the model's get_rope_index.
IMAGE_TYPE, VIDEO_TYPE = 1, 2


class PromptError(ValueError):
    """A question that cannot be given to the student. The message names it, the problem and what to do."""


class ResponseError(ValueError):
    """A response text that cannot be trained on.

    `reason` is a key of `method.natural.REASONS`. The message gives the reason for this text, and says what to do.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class HintError(ValueError):
    """A hint that the self-teacher cannot read. The message gives the reason, and says what to do.

    `reason` is "not_unicode", "special_token" or "too_long".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Prompt:
    """One question as the student sees it.

    Fields:
        question: the question that the prompt was built from.
        input_ids: int64 [P].
        mm_token_type_ids: int64 [P]: 0 text, 1 image, 2 video.
        position_ids: int64 [3, P]: time, height, width. The first response token has `next_position` on each axis.
        media: decoded media in the order of their placeholders, which is the order of `question.media`.
        vision_ids: the ids that a model treats as media or their delimiters, whether or not this prompt contains them.
        teacher: the prompt with the media that a self-teacher is shown instead (`hints.media`); None = the same media.
    """

    question: Question
    input_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor
    position_ids: torch.Tensor
    media: tuple[Frames, ...]
    vision_ids: tuple[int, ...] = ()
    teacher: Prompt | None = None

    @property
    def next_position(self) -> int:
        return int(self.position_ids.max()) + 1

    def with_text(self, ids: torch.Tensor) -> Prompt:
        """Return the prompt with more text at its end, whose token ids are given, int64 [H]."""
        following = (self.next_position + torch.arange(len(ids))).expand(3, len(ids))
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, ids]),
            mm_token_type_ids=torch.cat([self.mm_token_type_ids, torch.zeros_like(ids)]),
            position_ids=torch.cat([self.position_ids, following], dim=1),
        )


class PromptBuilder:
    """Build prompts and encode responses for one student. Thread-safe.

    Args:
        student: `rmsd_fast.models.students.Student`, or any object with its `family`, `model`, `tokenizer` and
            `preprocessor`.
        video: frames and pixel budgets.
        media: a `rmsd_fast.data.media.MediaReader`; None reads each file in the calling thread, without caches.
        prompt: "rmsd" shows question, options and answer format; "benchmark" shows `Question.prompt` verbatim.
    Raises:
        SettingsError: `video` could choose fewer frames than a temporal patch has.
    Attributes:
        eos_id: id of `<|im_end|>`, which ends every response.
        opening: text that the chat template adds at the start of a response: "", or `<think>` and a line break for
            Thinking models. It belongs to the prompt: a response's text includes it, but its ids begin after it.
        banned_ids: int64, ids that generation must never choose: every special token except the end token, and
            embedding rows beyond the tokenizer's vocabulary.
    """

    def __init__(self, student: Any, video: VideoConfig, media: Any = None, *, prompt: str = "rmsd") -> None:
        self.tokenizer = student.tokenizer
        self.preprocessor = student.preprocessor
        self.video = video
        self.prompt = prompt
        check_frame_counts(video, self.preprocessor)
        self._read, self._layout = (media.read, media.layout) if media else (read_media, read_layout)
        self._family, self._model = student.family, student.model
        config = student.model.config
        self._image_id, self._video_id = config.image_token_id, config.video_token_id
        edges = (config.vision_start_token_id, config.vision_end_token_id)
        self._vision_ids = (self._image_id, self._video_id, *edges)
        self.opening = response_opening(self.tokenizer, self._family.title)
        self.eos_id: int = self.tokenizer.convert_tokens_to_ids(END_TOKEN)
        special = {
            index: token.content for index, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        # Most texts contain no special token, so search for the first two characters of the tokens first.
        self._special_starts = sorted({content[:2] for content in special.values()})
        self._special = re.compile("|".join(map(re.escape, sorted(special.values(), key=len, reverse=True))))
        self.banned_ids = banned_ids(self.tokenizer, config.text_config.vocab_size)

    def build(self, question: Question, *, max_tokens: int | None = None) -> Prompt:
        """Decode the question's media and build its prompt.

        Args:
            question: the question.
            max_tokens: length of the longest prompt. The length is computed from media headers, so media of a longer
                prompt are not decoded.
        Raises:
            MediaError: a media file cannot be used.
            PromptError: the text contains a special token, the prompt is longer than max_tokens, the answer's times are
                after the end of the video, or the student cannot see on which clock they are.
        """
        if max_tokens is not None:
            self.length(question, max_tokens=max_tokens)
        prompt = self._decode(question, max_tokens)
        self._refuse_times(prompt)
        return prompt

    def build_teacher(self, question: Question, *, max_tokens: int) -> Prompt:
        """Decode the media of `hints.media` and build the prompt with them in place of the question's.

        The answer's times are those of the student's media, so they are not compared with these.

        Raises:
            MediaError: a media file cannot be used.
            PromptError: the prompt is longer than max_tokens.
        """
        shown = question.with_hint_media()
        layouts = [self._layout(request) for request in self.media_requests(shown)]
        _refuse_long(shown, self._length(shown, layouts), max_tokens)
        return self._decode(shown, max_tokens)

    def _decode(self, question: Question, max_tokens: int | None) -> Prompt:
        media = tuple(self._read(request) for request in self.media_requests(question))
        prompt = self.build_from_media(question, media)
        if max_tokens is not None:
            _refuse_long(question, len(prompt.input_ids), max_tokens)
        return prompt

    def length(self, question: Question, *, max_tokens: int) -> int:
        """Return the number of tokens of a question's prompt, from the headers of its media.

        Raises:
            MediaError: the headers of a media file cannot be read.
            PromptError: the text contains a special token, the prompt is longer than `max_tokens`, or the student
                cannot see on which clock the answer's times are. Whether they are after the end of the video is only
                known when it is decoded.
        """
        layouts = [self._layout(request) for request in self.media_requests(question)]
        tokens = self._length(question, layouts)
        _refuse_long(question, tokens, max_tokens)
        self._refuse_clock(question, layouts)
        return tokens

    def media_requests(self, question: Question) -> list[MediaRequest]:
        """Return requests for the question's media, in the order of their placeholders."""
        media = question.media_in(self.text(question)) if self.prompt == "benchmark" else question.media
        return [MediaRequest(path, kind, self.video, self.preprocessor, span) for kind, path, span in media]

    def text(self, question: Question) -> str:
        """Return the user's turn, with the marks of media.

        Raises:
            PromptError: `prompt` is "benchmark", and the question has no prompt of a benchmark.
        """
        if self.prompt != "benchmark":
            return question_text(question)
        if question.prompt is None:
            raise PromptError(
                f"question {question.id!r}: expected a prompt of its benchmark, got none; set evaluate.benchmark, or "
                "evaluate.prompt=rmsd"
            )
        return question.prompt

    def _length(self, question: Question, layouts: list[MediaLayout]) -> int:
        """Return the number of tokens of the prompt.

        The tokenizer processes one vision token in place of all vision tokens of a temporal patch.
        """
        merge = self.preprocessor.merge_size
        short = [replace(layout, grid_thw=(layout.grid_thw[0], merge, merge)) for layout in layouts]
        vision = sum(math.prod(layout.grid_thw) // merge**2 - layout.grid_thw[0] for layout in layouts)
        return len(self._prompt_ids(question, short)) + vision

    def _prompt_ids(self, question: Question, media: Sequence[Frames | MediaLayout]) -> torch.Tensor:
        text = self.text(question)
        if self.prompt == "benchmark":
            text = with_subtitles(text, question.meta, [time for item in media for time in item.timestamps_s])
        self._refuse_special(question, f"{question.system or ''}{text}")
        rendered = render(self.tokenizer, content_parts(text, [frames.kind for frames in media]), question.system)
        return self._encode(self._expand(rendered, media, question))

    def build_from_media(self, question: Question, media: tuple[Frames, ...]) -> Prompt:
        """Build the prompt from media that are already decoded, in the order of `media_requests`."""
        ids = self._prompt_ids(question, media)
        types = torch.zeros_like(ids)
        types[ids == self._image_id] = IMAGE_TYPE
        types[ids == self._video_id] = VIDEO_TYPE
        positions = self._family.position_ids(self._model, ids, types, media)
        return Prompt(question, ids, types, positions, media, self._vision_ids)

    def encode_response(self, text: str) -> torch.Tensor:
        """Return the token ids of a response, int64 [R], including the end token.

        White space around the text is stripped for both teacher and student, so that it does not distinguish them.

        Raises:
            ResponseError: as `check_response`.
        """
        self.check_response(text)
        text = text.strip()
        if self.opening:
            text = text.removeprefix(self.opening) if text.startswith(self.opening) else text.removeprefix("<think>")
        return torch.cat([self._encode(text), torch.tensor([self.eos_id])])

    def check_response(self, text: str) -> None:
        """Raise ResponseError for a text that cannot be trained on, without encoding it.

        Raises:
            ResponseError: the text contains a special token (vision tokens would be treated as pixels), is not valid
                Unicode, or does not begin with the `<think>` that the prompt ends with.
        """
        if not is_unicode(text):
            message = "a response must be Unicode text, got a lone surrogate; leave the response out"
            raise ResponseError("not_unicode", message)
        if token := self._find_special(text):
            raise ResponseError(
                "special_token",
                f"a response must be plain text, got the special token {token[0]}; "
                "remove it from the teacher pool, or leave the response out",
            )
        if self.opening and not text.lstrip().startswith("<think>"):
            raise ResponseError(
                "no_think",
                "the student's chat template opens a response with <think>, and this one does not begin with it; "
                "leave the response out",
            )

    @property
    def states_times(self) -> bool:
        """Whether prompts state the times of videos. If not, the student counts them from the first frame."""
        return self._family.time_stamps

    def split(self, prompt: Prompt) -> tuple[Prompt, torch.Tensor]:
        """Return the prompt up to the end of the user's text, and the tokens after it, int64.

        These tokens end the user's turn and open the response. A hint belongs before them.
        """
        # The user's text contains no special token, so the last end token ends the user's turn.
        end = int((prompt.input_ids == self.eos_id).nonzero()[-1])
        body = replace(
            prompt,
            input_ids=prompt.input_ids[:end],
            mm_token_type_ids=prompt.mm_token_type_ids[:end],
            position_ids=prompt.position_ids[:, :end],
        )
        return body, prompt.input_ids[end:]

    def encode_hint(self, text: str, *, max_tokens: int) -> torch.Tensor:
        """Return the token ids of a hint on a line of its own after the user's text, int64 [H].

        Raises:
            HintError: as `check_hint`.
        """
        self.check_hint(text, max_tokens=max_tokens)
        return self._encode(f"\n{text}")

    def check_hint(self, text: str, *, max_tokens: int) -> None:
        """Raise HintError if a hint contains a special token or more than `max_tokens` tokens, or is not Unicode."""
        if not is_unicode(text):
            raise HintError("not_unicode", "a hint must be Unicode text, got a lone surrogate; fix the text")
        if token := self._find_special(text):
            raise HintError(
                "special_token",
                f"a hint must be plain text, got the special token {token[0]}; remove it from the text",
            )
        # A token has at least one byte, so only a text that might be too long needs to be tokenized.
        if len(text.encode()) < max_tokens:
            return
        tokens = len(self._encode(f"\n{text}"))
        if tokens > max_tokens:
            raise HintError(
                "too_long",
                f"self_teacher.max_hint_tokens: expected at least {tokens} for this hint, got {max_tokens}; raise it, "
                "or shorten the hint",
            )

    def decode_response(self, ids: torch.Tensor | list[int]) -> str:
        """Return the full text of a response.

        It consists of the template's opening and the text of the ids up to the first end token, without special tokens.
        """
        ids = [int(index) for index in ids]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self.opening + text

    def pieces(self, ids: torch.Tensor | list[int]) -> list[tuple[str, int]]:
        """Return the text of a response in pieces of as few tokens as possible, each with its number of tokens.

        A character of several tokens is one piece. Special tokens have an empty text.
        """
        pieces, waiting = [], []
        for index in map(int, ids):
            waiting.append(index)
            text = self.tokenizer.decode(waiting, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # A character has at most 4 bytes, and a token at least one.
            if not text.endswith("\ufffd") or len(waiting) == 4:
                pieces.append((text, len(waiting)))
                waiting = []
        return pieces + ([("\ufffd", len(waiting))] if waiting else [])

    def _encode(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    def _find_special(self, text: str) -> re.Match[str] | None:
        return self._special.search(text) if any(start in text for start in self._special_starts) else None

    def _refuse_special(self, question: Question, text: str) -> None:
        if not is_unicode(text):
            raise PromptError(f"question {question.id!r}: expected Unicode, got a lone surrogate; fix the text")
        if token := self._find_special(text):
            raise PromptError(
                f"question {question.id!r}: expected plain text, got the special token {token[0]}; "
                "remove it from the question"
            )

    def _refuse_times(self, prompt: Prompt) -> None:
        """Reject times that the video cannot contain or that the student cannot know.

        The duration comes from the file, not from the record.
        """
        question = prompt.question
        if question.task_type != "temporal":
            return
        self._refuse_clock(question, prompt.media)
        if len(prompt.media) != 1 or not question.answer:
            return
        start, end = map(float, question.answer.split(" to "))
        try:
            check_times(start, end, duration=prompt.media[0].duration_s, span=None)
        except GroundTruthError as error:
            raise PromptError(
                f"{question.id}: the answer is {question.answer}; {error}, or drop the question"
            ) from None

    def _refuse_clock(self, question: Question, media: Sequence[Frames | MediaLayout]) -> None:
        """Reject a question about times if the prompt does not state when the frames begin."""
        if question.task_type != "temporal":
            return
        late = max((frames.timestamps_s[0] for frames in media if frames.timestamps_s), default=0.0)
        if late and not self._family.time_stamps:
            title = self._family.title
            raise PromptError(
                f"{question.id}: its frames begin at {late:g} s of the file's clock, which prompts of {title} "
                "do not state; cut the section into a file of its own with times from 0, or use a Qwen3-VL"
            )

    def _expand(self, rendered: str, media: Sequence[Frames | MediaLayout], question: Question) -> str:
        """Replace the pad token of each medium by the text that the family has in its place."""
        pieces = re.split(f"{re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)}", rendered)
        if len(pieces) != len(media) + 1:
            raise PromptError(
                f"question {question.id!r}: expected the chat template to mark {len(media)} media, "
                f"got {len(pieces) - 1}; the model folder needs the chat template of the {self._family.title} family"
            )
        marks = [self._family.media_text(frames, self.preprocessor) for frames in media]
        return pieces[0] + "".join(mark + piece for mark, piece in zip(marks, pieces[1:], strict=True))


def banned_ids(tokenizer: Any, vocabulary: int) -> torch.Tensor:
    """Return the ids that generation must never choose, int64, ascending; see `PromptBuilder`.

    Args:
        tokenizer: tokenizer of the student.
        vocabulary: number of embedding rows.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = range(len(tokenizer), vocabulary)
    return torch.tensor(sorted({*special, *beyond} - {tokenizer.convert_tokens_to_ids(END_TOKEN)}), dtype=torch.int64)


def _refuse_long(question: Question, tokens: int, most: int) -> None:
    if tokens > most:
        raise PromptError(
            f"question {question.id!r}: a prompt of {tokens} tokens exceeds data.max_prompt_tokens={most}; "
            "lower video.max_video_pixels or video.num_frames, or raise the limit"
        )
