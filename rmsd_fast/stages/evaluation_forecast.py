"""Say what an evaluation will take before it starts: questions, prompt lengths, memory and, after a batch, time."""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from rmsd_fast.config import RunConfig, SettingsError, UserError, first_line
from rmsd_fast.data.errors import counted
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.prompts import PromptBuilder, PromptError
from rmsd_fast.data.records import Question
from rmsd_fast.models.families import family_of
from rmsd_fast.models.folders import open_folder, resolve_folder
from rmsd_fast.runtime.process_group import World, global_max
from rmsd_fast.stages.answer_records import reason_of
from rmsd_fast.stages.memory import GIB, StagePlan, plan_evaluation
from rmsd_fast.stages.memory_advice import device_room
from rmsd_fast.stages.protocol import video_of

log = logging.getLogger("rmsd_fast")
# An evaluation reads the headers of so many questions before it starts; a dry run reads all.
READ_FIRST = 64


@dataclass(frozen=True)
class PromptLengths:
    """Lengths of prompts, from the headers of their media.

    Attributes:
        read: number of questions that were read.
        tokens: tokens of each prompt that can be used, ascending.
        faults: why the others cannot be used, by the question's id: the reason and the message.
    """

    read: int
    tokens: list[int]
    faults: dict[str, tuple[str, str]]


def read_lengths(
    path: str, questions: Sequence[Question], settings: RunConfig, media: MediaReader, *, most: int | None = None
) -> PromptLengths:
    """Return the lengths of the prompts of an evaluation. Nothing is decoded, and no weights are loaded.

    Args:
        path: folder or Hub name of the student.
        questions: the questions.
        settings: settings of the evaluation.
        media: reader of the videos and images.
        most: read only this many questions, spread over the list; None = all.
    """
    builder = _builder(path, settings, media)
    chosen = spread(questions, most or len(questions))
    limit = settings.data.max_prompt_tokens

    def measure(question: Question) -> int | tuple[str, str]:
        try:
            return builder.length(question, max_tokens=limit)
        except (MediaError, PromptError) as error:
            return reason_of(str(error), of_prompt=isinstance(error, PromptError)), str(error)

    with ThreadPoolExecutor(settings.data.decode_threads) as pool:
        found = list(pool.map(measure, chosen))
    tokens = sorted(size for size in found if isinstance(size, int))
    pairs = zip(chosen, found, strict=True)
    faults = {question.id: fault for question, fault in pairs if not isinstance(fault, int)}
    return PromptLengths(len(chosen), tokens, faults)


def spread(items: Sequence, count: int) -> list:
    """Return `count` items that are evenly spaced, or all if there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]


def _builder(path: str, settings: RunConfig, media: MediaReader) -> PromptBuilder:
    files = open_folder(resolve_folder(path))
    model = SimpleNamespace(config=files.config)
    student = SimpleNamespace(
        family=family_of(files.config), model=model, tokenizer=files.tokenizer, preprocessor=files.preprocessor
    )
    return PromptBuilder(student, video_of(settings), media, prompt=settings.evaluate.prompt)


def describe_questions(questions: Sequence[Question], lengths: PromptLengths, settings: RunConfig) -> list[str]:
    """Return lines about the questions of an evaluation, their media and their prompts."""
    files = {path for question in questions for path in (*question.videos, *question.images)}
    absent = sorted(path for path in files if not os.path.exists(path))
    videos = len({path for question in questions for path in question.videos})
    images = len({path for question in questions for path in question.images})
    about = [counted(count, name) for count, name in ((videos, "video"), (images, "image")) if count]
    lines = [f"questions: {counted(len(questions), 'question')} about {' and '.join(about) or 'text'}"]
    if absent:
        lines.append(f"MISSING: {len(absent):,} of {counted(len(files), 'media file')}, first {absent[0]}")
    video = video_of(settings)
    if videos:
        frames = f"{video.num_frames} frames" if video.num_frames else f"{video.fps:g} frames/s"
        lines.append(f"frames: {frames} of each video, at most {settings.micro_tokens:,} tokens in a call of its tower")
    what = "all" if lengths.read == len(questions) else f"{lengths.read:,}"
    if lengths.tokens:
        low, high, middle = lengths.tokens[0], lengths.tokens[-1], lengths.tokens[len(lengths.tokens) // 2]
        size = f"{low:,}" if low == high else f"{low:,} to {high:,} tokens, median {middle:,}"
        lines.append(f"prompts: {size}{' tokens' if low == high else ''} ({what} of {len(questions):,} read)")
    if lengths.faults:
        reasons = Counter(reason for reason, _ in lengths.faults.values())
        _, first = next(iter(lengths.faults.values()))
        causes = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        lines.append(
            f"UNUSABLE: {len(lengths.faults):,} of the {lengths.read:,} questions read would score 0 ({causes}); "
            f"first: {first}"
        )
    return lines


def describe_evaluation(
    path: str,
    questions: Sequence[Question],
    settings: RunConfig,
    world: World,
    media: MediaReader,
    *,
    most: int | None = None,
) -> tuple[list[str], PromptLengths]:
    """Return lines about an evaluation before it starts, and the lengths of its prompts.

    Args:
        path: folder or Hub name of the student.
        questions: the questions.
        settings: settings of the evaluation.
        world: this process in the run.
        media: reader of the videos and images.
        most: see `read_lengths`.
    Raises:
        SettingsError: the memory plan exceeds the memory of the GPU.
    """
    lengths = read_lengths(path, questions, settings, media, most=most)
    lines = describe_questions(questions, lengths, settings)
    if lengths.tokens:
        lines += check_evaluation_memory(path, lengths.tokens[-1], settings, world)
    return lines, lengths


def check_evaluation_memory(path: str, longest: int, settings: RunConfig, world: World) -> list[str]:
    """Return lines about the memory of an evaluation on each process.

    Args:
        path: folder or Hub name of the student.
        longest: tokens of the longest prompt.
        settings: settings of the evaluation.
        world: this process in the run.
    Raises:
        SettingsError: the plan exceeds the memory of the GPU, and `runtime.check_memory` is set.
    """
    config = json.loads((resolve_folder(path) / "config.json").read_text())
    device = world.device
    try:
        plan = _plan(settings, config, longest, device)
        lines = [f"memory: {_size(plan.total)} planned per process, at most in {plan.peak}: {_parts(plan)}"]
        if device.type != "cuda":
            return lines
        room, free = device_room(device)
        if plan.total <= room:
            return [*lines, f"{free}"]
        batch, smaller = settings.evaluate.prompts_per_batch, ""
        while batch > 1 and not smaller:
            batch //= 2
            changed = copy.deepcopy(settings)
            changed.evaluate.prompts_per_batch = batch
            if (total := _plan(changed, config, longest, device).total) <= room:
                smaller = f"set evaluate.prompts_per_batch={batch}, planned {_size(total)}; "
    except UserError:
        raise
    except Exception as error:
        return [f"memory: could not be planned ({type(error).__name__}: {first_line(error)})"]
    exceeds = (
        f"memory: expected at most {_size(room)} per process ({free}), got a plan of {_size(plan.total)} with prompts "
        f"of {longest:,} tokens; {smaller}lower evaluate.num_frames, video.max_video_pixels or micro_tokens"
    )
    if settings.runtime.check_memory:
        raise SettingsError(f"{exceeds}, or set runtime.check_memory=false to start anyway")
    return [*lines, exceeds]


def _plan(settings: RunConfig, config: dict, longest: int, device: torch.device) -> StagePlan:
    shorter = copy.deepcopy(settings)
    shorter.data.max_prompt_tokens = longest
    shorter.video = video_of(settings)
    return plan_evaluation(shorter, config, device=device.type)


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _parts(plan: StagePlan) -> str:
    parts = sorted(plan.parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {_size(size)}" for name, size in parts if size)


@dataclass(frozen=True)
class BatchTime:
    """Seconds of one batch on the slowest process: to read its media, and to answer it. They overlap between batches.

    Attributes:
        questions: number of questions of all processes.
        read_s: seconds from the request of the prompts until the last one was there.
        answer_s: seconds of the vision tower and of decoding, for greedy and sampled answers.
    """

    questions: int
    read_s: float
    answer_s: float

    def seconds_per_question(self, device: torch.device) -> float:
        """Return the seconds per question of many batches. On a CPU, reading and answering share the cores."""
        both = self.read_s + self.answer_s if device.type == "cpu" else max(self.read_s, self.answer_s)
        return both / self.questions


def time_batch(answering, batch: list[Question], world: World) -> BatchTime:
    """Answer a batch of this process, and return the seconds. The answers are dropped. All processes call it together.

    Args:
        answering: a `stages.evaluation.Answering`.
        batch: questions of this process, at least one.
        world: this process in the run.
    """
    began = time.perf_counter()
    (prompts,) = answering.prompts_ahead([batch])
    read = time.perf_counter() - began
    answering.answer(prompts)
    seconds = global_max({"read": read, "answer": time.perf_counter() - began - read}, world)
    return BatchTime(len(batch) * world.size, seconds["read"], seconds["answer"])


def forecast_line(seconds_per_question: float, left: int, measured: int) -> str:
    """Return a line about the time that the remaining questions take.

    Args:
        seconds_per_question: as measured, over all processes.
        left: number of questions.
        measured: number of questions that were timed.
    """
    hours = seconds_per_question / 3600
    return (
        f"time: about {duration(hours * left)} for {counted(left, 'question')}, {duration(1000 * hours)} per 1,000 "
        f"(from {counted(measured, 'question')})"
    )


def duration(hours: float) -> str:
    """Return hours as text."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s" if hours * 3600 < 9.5 else f"{hours * 3600:.0f} s"
    minutes = round(hours * 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
