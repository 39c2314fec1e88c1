"""Measure the memory of an evaluation in a process of its own, and print it next to the plan, as a JSON line.

As in step.py, a tiny student first runs the same code, so that libraries and their pages are loaded, and the process
notes its resident memory. Then the measured student answers two batches by the functions of `rmsd_fast.evaluate`, the
second of which is read while the first is answered. Each phase's high-water mark of resident memory is noted, less the
memory noted before.

Frames have random pixels and are made in this process, because those that a decoder shares with it only count as
resident when they are read. No response ends before its last token.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.core.memory import status_bytes
from bench.memory.step import PeakTimer, load_copied, write_student
from rmsd_fast.config import RunConfig
from rmsd_fast.data.media_cache import ByteLru
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.data.video import Frames, MediaLayout, MediaRequest
from rmsd_fast.models.discriminator import Discriminator
from rmsd_fast.models.discriminator_folder import export_discriminator
from rmsd_fast.models.students import load_student
from rmsd_fast.runtime.process_group import World, start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.answer_records import clusters_of
from rmsd_fast.stages.evaluation import Answering, HfAnswers
from rmsd_fast.stages.evaluation_batches import largest_batches, plan_batches
from rmsd_fast.stages.memory import StagePlan, plan_evaluation
from rmsd_fast.stages.protocol import video_of
from rmsd_fast.stages.reranker import Reranker, load_reranker


@dataclass(frozen=True)
class EvaluationCase:
    """An evaluation of two batches.

    Attributes:
        name: name of the configuration.
        prompts: questions per batch.
        each: questions about each video.
        frames: frames of a video.
        side: width and height of a frame, in tokens of 32 pixels.
        micro_tokens: settings.micro_tokens.
        response: new tokens of each answer.
        rollouts: sampled answers per question.
        reranker: whether a discriminator ranks them.
        dtype: dtype of the models.
    """

    name: str
    prompts: int = 4
    each: int = 1
    frames: int = 16
    side: int = 11
    micro_tokens: int = 32768
    response: int = 16
    rollouts: int = 0
    reranker: bool = False
    dtype: str = "float32"

    @property
    def vision_tokens(self) -> int:
        return self.frames // 2 * self.side**2


class MadeMedia:
    """Make the frames of a video when it is read, and keep them in a cache, as a `MediaReader` keeps decoded ones."""

    def __init__(self, case: EvaluationCase, cache_mib: int) -> None:
        self._case, self._cache = case, ByteLru(cache_mib * 2**20)

    def layout(self, request: MediaRequest) -> MediaLayout:
        case = self._case
        times = tuple(0.5 * number for number in range(case.frames))
        return MediaLayout(times, (case.frames // 2, 2 * case.side, 2 * case.side), "video")

    def read(self, request: MediaRequest) -> Frames:
        frames = self._cache.get(request.path)
        if frames is None:
            layout, side = self.layout(request), 32 * self._case.side
            generator = torch.Generator().manual_seed(int(Path(request.path).stem))
            pixels = torch.randint(256, (self._case.frames, 3, side, side), dtype=torch.uint8, generator=generator)
            frames = Frames(pixels, layout.timestamps_s, layout.grid_thw, "video", request.preprocessor)
            self._cache.put(request.path, frames, pixels.nbytes)
        return frames


def settings_of(case: EvaluationCase, prompt_tokens: int) -> RunConfig:
    # A video that several questions share stays in the cache until the last of them is read.
    shared = 2 * 2 * case.vision_tokens * 32 * 32 * 3 if case.each > 1 else 0
    return load_settings(
        "quickstart",
        [
            f"micro_tokens={case.micro_tokens}",
            f"model.dtype={case.dtype}",
            f"data.max_prompt_tokens={prompt_tokens}",
            f"data.cache_mib={-(-shared // 2**20)}",
            "data.decode_threads=2",
            f"video.num_frames={case.frames}",
            f"video.max_frame_pixels={(32 * case.side) ** 2}",
            f"video.max_video_pixels={case.vision_tokens * 2048}",
            f"evaluate.prompts_per_batch={case.prompts}",
            f"evaluate.max_new_tokens={case.response}",
            f"evaluate.rollouts={case.rollouts}",
            *(["evaluate.reranker=discriminator"] if case.reranker else []),
        ],
        trains=False,
    )


def questions_of(case: EvaluationCase) -> list[Question]:
    """Return the questions of two batches."""
    return [
        Question(f"{number}", f"What happens in the video? ({number})", "mcq", options=("a", "b"), answer="A")
        for number in range(2 * case.prompts)
    ]


def with_videos(case: EvaluationCase, questions: list[Question]) -> list[Question]:
    return [replace(q, videos=(f"/made/{number // case.each}.mp4",)) for number, q in enumerate(questions)]


def watched(call: Callable, timer: PeakTimer, phase: str) -> Callable:
    """Return a function with a phase of its own."""

    def measured(*args, **options) -> Any:
        with timer(phase):
            return call(*args, **options)

    return measured


def run(case: EvaluationCase, folder: Path, world: World) -> tuple[RunConfig, list[Question], dict[str, int]]:
    """Answer two batches, and return the settings, the questions and the peaks of the phases."""
    questions = with_videos(case, questions_of(case))
    # Long enough for any of the prompts, whose lengths only a student's tokenizer knows.
    settings = settings_of(case, 2 * case.vision_tokens + 1000)
    student = load_copied(str(folder), settings, world)
    builder = PromptBuilder(student, settings.video, MadeMedia(case, 0))
    settings = settings_of(case, max(builder.length(question, max_tokens=2**20) for question in questions))
    reranker = None
    if case.reranker:
        settings.evaluate.reranker = str(folder / "discriminator")
        reranker = load_reranker(student, settings, world)
        copy_weights(reranker)
    media = MadeMedia(case, settings.data.cache_mib)
    builder = PromptBuilder(student, video_of(settings), media, prompt=settings.evaluate.prompt)
    engine = HfAnswers(student, builder, settings, world)
    timer = PeakTimer(world.device)
    for rollout, phase in ((engine._greedy, "answers"), (engine._sampler, "samples")):
        rollout.banned_ids = torch.cat([rollout.banned_ids, torch.tensor([builder.eos_id])])
        rollout.generate = watched(rollout.generate, timer, phase)
    engine._greedy.encode = watched(engine._greedy.encode, timer, "vision")
    if reranker is not None:
        reranker.score = watched(reranker.score, timer, "reranker")
    answering = Answering(student, settings, world, media, clusters_of(questions), engine=engine, reranker=reranker)
    gc.collect()
    for batch in answering.prompts_ahead(plan_batches(questions, case.prompts, 1)):
        records = answering.answer(batch)
        assert all(not record.get("error") for record in records), records
    return settings, questions, dict(timer.peaks)


def copy_weights(reranker: Reranker) -> None:
    """Copy the weights out of the mapped model file."""
    for parameter in reranker._discriminator.parameters():
        parameter.data = parameter.data.clone()


def make_folder(folder: Path, case: EvaluationCase, *, tiny: bool) -> None:
    write_student(folder, tiny=tiny)
    if case.reranker:
        student = load_student(folder, dtype="float32")
        export_discriminator(Discriminator(student.model, seed=0), student, folder / "discriminator")


def planned(case: EvaluationCase, settings: RunConfig, questions: list[Question], config: dict) -> StagePlan:
    """Return the plan that an evaluation prints before it starts."""
    batches = largest_batches(plan_batches(questions, case.prompts, 1))
    return plan_evaluation(settings, config, device="cpu", batches=batches)


def main() -> None:
    case = EvaluationCase(**json.loads(sys.argv[1]))
    made = Path(tempfile.mkdtemp(prefix="bench-memory-"))
    try:
        make_folder(made / "tiny", case, tiny=True)
        make_folder(made / "student", case, tiny=False)
        world = start()
        run(replace(case, prompts=2 * case.each, frames=4, side=2, response=4), made / "tiny", world)
        gc.collect()
        baseline = status_bytes("RssAnon")
        settings, questions, peaks = run(case, made / "student", world)
        plan = planned(case, settings, questions, json.loads((made / "student" / "config.json").read_text()))
        stop()
    finally:
        shutil.rmtree(made, ignore_errors=True)
    record = {"case": case.name, "settings": asdict(case), "prompt_tokens": settings.data.max_prompt_tokens}
    measured = {phase: peak - baseline for phase, peak in peaks.items()}
    print(json.dumps(record | {"baseline": baseline, "measured": measured, "plan": plan.phases}))


if __name__ == "__main__":
    main()
