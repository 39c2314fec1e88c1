"""Answering several questions about each video: an evaluation against one `generate` of transformers per question.

- `generate`: per question, decode the video, build the prompt, and call `model.generate`, as plain scripts do.
- `ours`: `answer_questions` of an evaluation, from video files to scored answers. It decodes in worker processes while
  the model runs.
- The parts of the difference, in one thread: `batched` decodes, encodes and prefills everything for each question, but
  for 16 of them at a time; `decoded once`, `encoded once` and `prefilled once` add the kinds of sharing, one by one.

All decode greedily in float32, with the same banned ids, and no response ends early. All must give equal tokens for the
questions of a small case before timing, and for every question of the timed calls. Rounds are interleaved, and what is
reported are medians.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import GenerationConfig

from bench.core.measure import OURS, Effort, Samples, Variant, facts_of, interleaved, main_time, numbers_of
from bench.prefix.groups import HIDDEN, LAYERS, load
from rmsd_fast.config import DataConfig, RunConfig, VideoConfig
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.preprocess import video_patches
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.data.video import Frames, MediaRequest, read_media
from rmsd_fast.models.students import MediaFeatures, Student, encode_media
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.runtime.process_group import World
from rmsd_fast.stages import evaluation
from rmsd_fast.stages.evaluation import answer_questions
from rmsd_fast.stages.evaluation_batches import plan_batches

NAME = "evaluation"
GENERATE = "generate"
PARTS = ("batched", "decoded once", "encoded once", "prefilled once")
BATCH = 16
# The student's tokenizer knows few words, so a question has about as many tokens as one with options does elsewhere.
_WORDS = "What happens in the video after the red square moves?"


@dataclass(frozen=True)
class Case:
    """`videos` videos of `frames` frames of `side` pixels, `each` questions about each, `response` new tokens."""

    videos: int = 40
    each: int = 5
    frames: int = 16
    side: int = 256
    response: int = 32
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"V{self.videos}-Q{self.videos * self.each}-F{self.frames}-R{self.response}-{self.dtype}"


def cases(quick: bool, device: str) -> list[Case]:
    if device == "cuda":
        return []
    return [Case(4, 5, 16, 128, 16) if quick else Case()]


def toy_cases(device: str) -> list[Case]:
    return [Case(2, 2, 4, 64, 4)] if device == "cpu" else []


def write_clips(folder: Path, case: Case) -> list[str]:
    """Write videos of moving random patches, and return their paths."""
    from torchcodec.encoders import VideoEncoder

    paths = []
    for number in range(case.videos):
        generator = torch.Generator().manual_seed(number)
        picture = torch.randint(256, (3, case.side // 8, case.side // 8), generator=generator, dtype=torch.uint8)
        picture = picture.repeat_interleave(8, 1).repeat_interleave(8, 2)
        pixels = torch.stack([picture.roll(4 * frame, 2) for frame in range(case.frames)])
        path = folder / f"{number}.mp4"
        VideoEncoder(pixels, frame_rate=2).to_file(path, codec="libx264", pixel_format="yuv420p")
        paths.append(str(path))
    return paths


class CachedMedia:
    """Decode each file once, in the calling thread."""

    layout = None

    def __init__(self) -> None:
        self._frames: dict[str, Frames] = {}

    def read(self, request: MediaRequest) -> Frames:
        if request.path not in self._frames:
            self._frames[request.path] = read_media(request)
        return self._frames[request.path]


class Rig:
    """A student, questions about videos, and all ways to answer them, each of which returns ids by question, [Q, R]."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.device = case, torch.device(case.device)
        self.student: Student = load(HIDDEN, LAYERS, case.dtype, case.device)
        self.student.model.eval()
        self.video = VideoConfig(num_frames=case.frames, max_video_pixels=case.frames * case.side**2)
        paths = write_clips(folder, case)
        self.questions = [
            Question(f"{Path(path).stem}-{i}", f"{_WORDS} ({i})", "open", videos=(path,))
            for i in range(case.each)
            for path in paths
        ]
        builder = PromptBuilder(self.student, self.video)
        self.banned = torch.cat([builder.banned_ids, torch.tensor([builder.eos_id])])
        self.sampling = Sampling(1, 0.0, case.response)

    def generate(self) -> torch.Tensor:
        builder, model = PromptBuilder(self.student, self.video), self.student.model
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.case.response,
            suppress_tokens=self.banned.tolist(),
            eos_token_id=None,
            pad_token_id=builder.eos_id,
        )
        answers = []
        for question in self.questions:
            prompt = builder.build(question)
            (frames,) = prompt.media
            out = model.generate(
                input_ids=prompt.input_ids[None],
                attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.int64),
                mm_token_type_ids=prompt.mm_token_type_ids[None],
                pixel_values_videos=video_patches(frames.pixels, frames.preprocessor),
                video_grid_thw=torch.tensor([frames.grid_thw]),
                generation_config=config,
            )
            answers.append(out[0, len(prompt.input_ids) :])
        return torch.stack(answers)

    def part(self, name: str) -> torch.Tensor:
        """Answer in one thread, with the kinds of sharing up to the named one."""
        kinds = PARTS.index(name)
        builder = PromptBuilder(self.student, self.video, CachedMedia() if kinds >= 1 else None)
        engine = self._engine(builder, share_media=kinds >= 3)
        answers: dict[str, torch.Tensor] = {}
        for batch in plan_batches(self.questions, BATCH, 1):
            prompts = [builder.build(question) for question in batch]
            features = encode_media(self.student.model, prompts, distinct=kinds >= 2)
            for (rollout,) in engine.generate(self.student.model, prompts, self.sampling, features=features):
                answers[rollout.question_id] = rollout.token_ids
        return torch.stack([answers[question.id] for question in self.questions])

    def ours(self, media: MediaReader) -> torch.Tensor:
        """Answer as an evaluation does. `media` has empty caches."""
        answers: dict[str, torch.Tensor] = {}
        settings = RunConfig(video=self.video)
        settings.evaluate.max_new_tokens, settings.evaluate.prompts_per_batch = self.case.response, BATCH
        world = World(0, 1, 0, self.device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "HfRollout", functools.partial(self._recording, answers))
            answer_questions(self.student, self.questions, settings, world, media, name="bench")
        return torch.stack([answers[question.id] for question in self.questions])

    def _engine(self, builder: PromptBuilder, **options) -> HfRollout:
        engine = HfRollout(builder, prompts_per_batch=BATCH, device=self.device, **options)
        engine.banned_ids = self.banned
        return engine

    def _recording(self, answers: dict[str, torch.Tensor], builder: PromptBuilder, **options) -> HfRollout:
        """Return the engine of an evaluation, with our banned ids, that also keeps the tokens."""
        engine = HfRollout(builder, **options)
        engine.banned_ids = self.banned
        generate = engine.generate

        def keep(model, prompts: list[Prompt], sampling: Sampling, *, features: MediaFeatures):
            groups = generate(model, prompts, sampling, features=features)
            answers.update({rollout.question_id: rollout.token_ids for (rollout,) in groups})
            return groups

        engine.generate = keep
        return engine


def warm_reader(case: Case, path: str) -> MediaReader:
    """Return a reader whose worker has started, as it does while a model is loaded, with empty caches of the videos."""
    reader = MediaReader(DataConfig(decoder="cpu", cache_mib=2048), case.device)
    request = MediaRequest(
        path, "video", VideoConfig(num_frames=2), load(HIDDEN, LAYERS, case.dtype, case.device).preprocessor
    )
    reader.layout(request)
    return reader


@functools.cache
def gate() -> int:
    """Return the number of questions to which all ways give equal tokens. AssertionError: they differ."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rig = Rig(Case(3, 3, 8, 128, 16), Path(folder))
        expected = rig.generate()
        for name in PARTS:
            assert torch.equal(rig.part(name), expected), name
        with warm_reader(rig.case, rig.questions[0].videos[0]) as reader:
            assert torch.equal(rig.ours(reader), expected)
    return len(rig.questions)


@torch.no_grad()
def measure_evaluation(case: Case, effort: Effort, folder: Path) -> dict[str, object]:
    """Measure what the record of a case says beside its shape. AssertionError: the tokens of two ways differ."""
    gate()
    rig, rounds = Rig(case, folder), min(effort.most_rounds, 3)
    readers = [warm_reader(case, rig.questions[0].videos[0]) for _ in range(rounds)]
    tokens: dict[str, torch.Tensor] = {}

    def ours() -> torch.Tensor:
        with readers.pop() as reader:
            return rig.ours(reader)

    ways: dict[str, Callable[[], torch.Tensor]] = {OURS: ours, GENERATE: rig.generate}
    ways |= {name: functools.partial(rig.part, name) for name in PARTS}

    def variant(name: str) -> Variant:
        def forward() -> torch.Tensor:
            tokens[name] = ways[name]()
            return torch.tensor(float(tokens[name].numel()))

        return Variant(name, forward)

    variants = [variant(name) for name in ways]
    everything = Effort(1e9, rounds, 1e9, least_rounds=rounds, always_rounds=rounds)
    timings = interleaved(variants, everything, torch.device(case.device))
    equal = {name: int((ids == tokens[GENERATE]).all(1).sum()) for name, ids in tokens.items()}
    assert set(equal.values()) == {len(rig.questions)}, f"of {len(rig.questions)} questions, equal tokens: {equal}"
    samples = {name: Samples(of_way) for name, of_way in timings.items()}
    numbers = numbers_of(samples, variants, baseline=None)
    for name in ways:
        numbers[name]["questions_per_s"] = len(rig.questions) / main_time(numbers[name]) * 1e3
        ratios = [timings[name][i].total_ms / timings[OURS][i].total_ms for i in range(rounds)]
        numbers[name]["times_ours_by_round"] = median(ratios)
    prompt = PromptBuilder(rig.student, rig.video).build(rig.questions[0])
    return {"variants": numbers, "prompt_tokens": len(prompt.input_ids), "equal_answers": len(rig.questions)}


@pytest.mark.timeout(3600)
def test_evaluation(case: Case, effort: Effort, publish) -> None:
    shape = {"videos": case.videos, "questions": case.videos * case.each, "frames": case.frames, "R": case.response}
    with tempfile.TemporaryDirectory() as folder:
        publish(facts_of(NAME, case, shape) | {"student": "small"} | measure_evaluation(case, effort, Path(folder)))
