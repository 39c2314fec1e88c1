"""Say what an evaluation will take before it starts: questions, prompt lengths, memory and, after a batch, time."""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from tqdm import tqdm

from rmsd_fast.config import RunConfig, SettingsError, UserError, first_line
from rmsd_fast.data.errors import counted
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.prompts import PromptBuilder, PromptError
from rmsd_fast.data.records import Question
from rmsd_fast.models.families import family_of
from rmsd_fast.models.folders import open_folder, resolve_folder
from rmsd_fast.models.pass_memory import complete_config
from rmsd_fast.rollout.vllm import cache_gib
from rmsd_fast.runtime.process_group import World, all_gather_objects, global_max, on_main, raise_together
from rmsd_fast.stages.answer_records import reason_of
from rmsd_fast.stages.evaluation_batches import largest_batches, plan_batches, spread
from rmsd_fast.stages.inputs import absent_media
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
    path: str,
    questions: Sequence[Question],
    settings: RunConfig,
    media: MediaReader,
    world: World,
    *,
    most: int | None = None,
) -> PromptLengths:
    """Return the lengths of the prompts of an evaluation. Nothing is decoded, and no weights are loaded.

    Every process reads its share of the headers and returns all lengths. All processes call it together.

    Args:
        path: folder or Hub name of the student.
        questions: the questions.
        settings: settings of the evaluation.
        media: reader of the videos and images.
        world: this process in the run.
        most: read only this many questions, spread over the list; None = all.
    """
    chosen = spread(questions, most or len(questions))
    measured: list[tuple[str, int | tuple[str, str]]] = []
    error: Exception | None = None
    try:
        measured = _measure(path, chosen[world.rank :: world.size], settings, media, shown=world.is_main)
    except Exception as caught:
        error = caught
    raise_together(error, world)
    # In the order of the questions, so that the first fault is the same with any number of processes.
    by_id = dict(pair for share in all_gather_objects(measured, world) for pair in share)
    results = {question.id: by_id[question.id] for question in chosen}
    tokens = sorted(result for result in results.values() if isinstance(result, int))
    faults = {name: result for name, result in results.items() if not isinstance(result, int)}
    return PromptLengths(len(chosen), tokens, faults)


def _measure(
    path: str, questions: Sequence[Question], settings: RunConfig, media: MediaReader, *, shown: bool
) -> list[tuple[str, int | tuple[str, str]]]:
    """Return the length of each prompt, or the reason and the message of its fault, with the question's id."""
    builder = _builder(path, settings, media)
    limit = settings.data.max_prompt_tokens

    def measure(question: Question) -> tuple[str, int | tuple[str, str]]:
        try:
            return question.id, builder.length(question, max_tokens=limit)
        except (MediaError, PromptError) as error:
            return question.id, (reason_of(str(error), of_prompt=isinstance(error, PromptError)), str(error))

    live = sys.stderr.isatty()
    with ThreadPoolExecutor(settings.data.decode_threads) as pool:
        lengths = pool.map(measure, questions)
        # Without a terminal, print one line every ten seconds.
        return list(
            tqdm(
                lengths,
                desc="headers",
                unit="question",
                total=len(questions),
                disable=not shown,
                leave=False,
                mininterval=0.1 if live else 10,
                delay=2 if live else 10,
            )
        )


def _builder(path: str, settings: RunConfig, media: MediaReader) -> PromptBuilder:
    files = open_folder(resolve_folder(path))
    model = SimpleNamespace(config=files.config)
    student = SimpleNamespace(
        family=family_of(files.config), model=model, tokenizer=files.tokenizer, preprocessor=files.preprocessor
    )
    return PromptBuilder(student, video_of(settings), media, prompt=settings.evaluate.prompt)


def describe_protocol(path: str, settings: RunConfig) -> str:
    """Return a line about the model, and how it is asked and scored."""
    evaluate = settings.evaluate
    asked = [f"{evaluate.benchmark or 'own questions'}", f"prompt {evaluate.prompt}", f"parsing {evaluate.parse}"]
    asked += ["subtitles"] * evaluate.subtitles + ["without video"] * evaluate.without_video
    asked += [f"{counted(evaluate.rollouts, 'sample')} each"] if evaluate.rollouts else []
    asked += ["engine vllm"] if evaluate.engine == "vllm" else []
    asked += [f"reranker {evaluate.reranker}"] if evaluate.reranker else []
    judge = evaluate.judge
    asked += [f"judge {judge.model} at {judge.endpoint} (not asked yet)"] if judge.endpoint else []
    return f"model: {path}; {', '.join(asked)}"


def describe_questions(questions: Sequence[Question], lengths: PromptLengths, settings: RunConfig) -> list[str]:
    """Return lines about the questions of an evaluation, their media and their prompts."""
    absent, files = absent_media(questions)
    videos = len({path for question in questions for path in question.videos})
    images = len({path for question in questions for path in question.images})
    about = [counted(count, name) for count, name in ((videos, "video"), (images, "image")) if count]
    lines = [f"questions: {counted(len(questions), 'question')} about {' and '.join(about) or 'text'}"]
    if absent:
        lines.append(f"MISSING: {len(absent):,} of {counted(files, 'media file')}, first {absent[0]}")
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

    All processes call it together. The lines are those of the main process, and empty on the others.

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
    lengths = read_lengths(path, questions, settings, media, world, most=most)

    def describe() -> list[str]:
        lines = [describe_protocol(path, settings), *describe_questions(questions, lengths, settings)]
        if not lengths.tokens:
            return [*lines, "memory: not planned, since no prompt could be read"]
        return lines + check_evaluation_memory(path, questions, lengths.tokens[-1], settings, world)

    lines = on_main(world, describe)
    return lines if world.is_main else [], lengths


def check_evaluation_memory(
    path: str, questions: Sequence[Question], longest: int, settings: RunConfig, world: World
) -> list[str]:
    """Return lines about the memory of an evaluation on each process.

    Args:
        path: folder or Hub name of the student.
        questions: the questions, whose batches are planned.
        longest: tokens of the longest prompt.
        settings: settings of the evaluation.
        world: this process in the run.
    Raises:
        SettingsError: the plan exceeds the memory of the GPU, and `runtime.check_memory` is set.
    """
    device = world.device
    try:
        config = json.loads((resolve_folder(path) / "config.json").read_text())

        def planned(changed: RunConfig) -> StagePlan:
            return _plan(changed, config, questions, longest, world)

        plan = planned(settings)
        lines = [f"memory: {_size(plan.total)} planned per process, at most in {plan.peak}: {_parts(plan)}"]
        if device.type != "cuda":
            return lines
        room, free = device_room(device)
        if plan.total <= room:
            return [*lines, f"{free}"]
        advice = _advice(settings, questions, planned, room, _least_cache(settings, config))
    except UserError:
        raise
    except Exception as error:
        return [f"memory: could not be planned ({type(error).__name__}: {first_line(error)})"]
    exceeds = (
        f"memory: expected at most {_size(room)} per process ({free}), got a plan of {_size(plan.total)} with prompts "
        f"of {longest:,} tokens, at most in {plan.peak}; {advice}"
    )
    if settings.runtime.check_memory:
        raise SettingsError(f"{exceeds}, or set runtime.check_memory=false to start anyway")
    return [*lines, exceeds]


def _advice(
    settings: RunConfig,
    questions: Sequence[Question],
    planned: Callable[[RunConfig], StagePlan],
    room: int,
    least_cache: int = 0,
) -> str:
    """Return what to change so that an evaluation fits into `room` bytes. It names only settings that lower the plan.

    Args:
        settings: settings of the evaluation.
        questions: the questions.
        planned: returns the plan of changed settings.
        room: bytes of the device.
        least_cache: GiB of the smallest KV cache of vLLM that holds a prompt and its response; 0 = there is none.
    """
    best, lower = planned(settings).total, []
    cache = "rollout.vllm_kv_cache_gib"
    changes: list[tuple[str, list]] = [
        *([(cache, _halves(int(settings.rollout.vllm_kv_cache_gib), least_cache))] if least_cache else []),
        ("evaluate.prompts_per_batch", _halves(settings.evaluate.prompts_per_batch, 1)),
        ("micro_tokens", _halves(settings.micro_tokens, 1024)),
        ("data.decoder", ["cpu"] if settings.data.decoder != "cpu" else []),
    ]
    for key, values in changes:
        helps = False
        for value in values:
            changed = copy.deepcopy(settings)
            section, _, name = key.rpartition(".")
            setattr(getattr(changed, section) if section else changed, name, value)
            total = planned(changed).total
            if total <= room:
                return f"set {key}={value}, planned {_size(total)}"
            helps = helps or total < best
        if helps:
            lower.append(f"{key}={values[-1]}" if key == "data.decoder" else key)
    videos, images = any(q.videos for q in questions), any(q.images for q in questions)
    video, evaluate = settings.video, settings.evaluate
    if videos:
        frames = (
            "evaluate.num_frames" if evaluate.num_frames else "video.num_frames" if video.num_frames else "video.fps"
        )
        lower += [frames, "video.max_video_pixels"]
    if images:
        lower.append("video.max_image_pixels")
    if not lower:
        return "use a smaller model or a larger GPU"
    return f"lower {', '.join(lower[:-1])}{' or ' if lower[1:] else ''}{lower[-1]}, or use a larger GPU"


def _least_cache(settings: RunConfig, config: dict) -> int:
    """Return the GiB of the smallest KV cache of vLLM, rounded up; 0 if the evaluation does not use vLLM."""
    if settings.evaluate.engine != "vllm":
        return 0
    text = SimpleNamespace(**complete_config(config)["text_config"])
    tokens = settings.data.max_prompt_tokens + settings.evaluate.max_new_tokens
    return math.ceil(cache_gib(text, dtype=settings.model.dtype, max_tokens=tokens))


def _halves(value: int, least: int) -> list[int]:
    """Return half the value, a quarter and so on, down to `least`."""
    values = []
    while value // 2 >= least:
        value //= 2
        values.append(value)
    return values


def _plan(settings: RunConfig, config: dict, questions: Sequence[Question], longest: int, world: World) -> StagePlan:
    shorter = copy.deepcopy(settings)
    shorter.data.max_prompt_tokens = longest
    shorter.video = video_of(settings)
    if shorter.model.quantize == "nf4":
        # The export of a quantized run has an adapter.
        shorter.model.adapter = "lora"
    batches = plan_batches(questions, settings.evaluate.prompts_per_batch, world.size)
    limit = settings.data.max_prompt_tokens
    return plan_evaluation(shorter, config, device=world.device.type, batches=largest_batches(batches), limit=limit)


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


def time_batch(answering, batch: list[Question], world: World, *, questions: int | None = None) -> BatchTime:
    """Answer a batch of this process, and return the seconds. The answers are dropped. All processes call it together.

    Args:
        answering: a `stages.evaluation.Answering`.
        batch: questions of this process, at least one.
        world: this process in the run.
        questions: number of questions of all processes; None = each has as many.
    """
    began = time.perf_counter()
    (prompts,) = answering.prompts_ahead([batch])
    read = time.perf_counter() - began
    answering.answer(prompts)
    seconds = global_max({"read": read, "answer": time.perf_counter() - began - read}, world)
    return BatchTime(questions or len(batch) * world.size, seconds["read"], seconds["answer"])


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
