"""Groups of a given size for a small student: what the benchmarks of shared prefixes run on.

A group: one video prompt of about `prefix` tokens (random pixels, so that the vision tower has its real work) and
responses of exactly so many tokens each.
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.packing import Rows
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.data.video import Frames
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models.students import Student, load_student

# Grid of 32-pixel tokens of a frame and temporal steps that make a prompt of about so many tokens.
GRIDS = {128: (4, 4, 4), 512: (4, 8, 8), 1024: (8, 8, 15), 2048: (8, 16, 15), 4096: (16, 16, 15), 8192: (16, 22, 22)}
# The small student: 4 layers of 8 heads of 32, 3 million parameters.
HIDDEN, LAYERS = 256, 4
TEXTS = ("What happens in the video?", "<think>A red square moves.</think><answer>0.0 to 10.0</answer>")


@dataclass(frozen=True)
class Case:
    """A shape: about `prefix` tokens of a prompt, exactly `response` of each response."""

    prefix: int
    response: int
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"P{self.prefix}-R{self.response}-{self.dtype}"


@functools.cache
def student_folder(hidden: int, layers: int) -> Path:
    """A student with random weights, written once per process."""
    made = tempfile.mkdtemp(prefix="bench-student-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    folder = Path(made) / "student"
    build_tiny_student(folder, texts=TEXTS, hidden=hidden, layers=layers)
    return folder


def load(hidden: int, layers: int, dtype: str, device: str) -> Student:
    student = load_student(student_folder(hidden, layers), dtype=dtype)
    student.model.to(device)
    return student


def make_prompt(builder: PromptBuilder, prefix: int, number: int) -> Prompt:
    """A question about a video of its own."""
    steps, height, width = GRIDS[prefix]
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (2 * steps, 3, 32 * height, 32 * width), dtype=torch.uint8, generator=generator)
    times = tuple(0.5 * frame for frame in range(2 * steps))
    frames = Frames(pixels, times, (steps, 2 * height, 2 * width), "video", builder.preprocessor)
    question = Question(id=f"q{number}", question=TEXTS[0], task_type="temporal", videos=("made",), answer="0.0 to 1.0")
    return builder.build_from_media(question, (frames,))


def make_builder(student: Student) -> PromptBuilder:
    return PromptBuilder(student, VideoConfig(num_frames=16))


def make_responses(builder: PromptBuilder, count: int, length: int, seed: int) -> list[torch.Tensor]:
    """Random plain tokens that end with the end token, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    banned = set(builder.banned_ids.tolist()) | {builder.eos_id}
    allowed = torch.tensor([i for i in range(len(builder.tokenizer)) if i not in banned])
    drawn = allowed[torch.randint(len(allowed), (count, length - 1), generator=generator)]
    return [torch.cat([row, torch.tensor([builder.eos_id])]) for row in drawn]


def make_texts(builder: PromptBuilder, count: int, length: int, seed: int) -> list[str]:
    """Random texts of exactly so many tokens, end token included, of words that are one token wherever they stand."""
    encode = builder.tokenizer.encode
    tokens = [builder.tokenizer.decode([index]) for index in range(len(builder.tokenizer))]
    tokens = [word for index, word in enumerate(tokens) if encode(word, add_special_tokens=False) == [index]]
    words = [word for word in tokens if re.fullmatch(" [a-z]+", word)]
    # encode_response strips the blank of a first word.
    first = next(word for word in tokens if re.fullmatch("[a-z]+", word))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(words), (count, length - 2), generator=generator).tolist()
    texts = [first + "".join(words[index] for index in row) for row in drawn]
    assert all(len(builder.encode_response(text)) == length for text in texts)
    return texts


def media_each(rows: Rows) -> Rows:
    """Rows that take each a copy of the features of its own: prompts and features are given once per row."""
    return replace(rows, media_order=list(range(len(rows.lengths_list))))
