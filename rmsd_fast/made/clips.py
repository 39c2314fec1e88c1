"""Generate clips: small real h264 files with known content, and questions of all six task types about them.

A clip has 8 frames of 64x64 at 1 fps. For 2 s it shows a card: a sign of one letter and one digit, each 32x32 pixels,
above up to seven dots. For the other 6 s it shows one colored shape on black. During an interval of these 6 s, a light
is on: the background turns gray. Everything is aligned to the 16-pixel grid of a vision tower with patches of 16 and
2x2 merging, so that the card is 2x2 vision tokens. Pixels have no noise, because a student with half a million
parameters learned nothing from noisy clips.

The contents of held-out clips and of training clips are disjoint for each kind of question: (color, shape, box)
for mcq, spatial and open, (color, shape, interval) for temporal, (dot color, pattern) for numeric, and (letter,
digit) for ocr. The split rule is fixed and balanced, so every single attribute occurs on both sides for every seed.

Multiple choice with shuffled options is by far the hardest kind of question for a tiny student, which has to find the
option and then its letter. It is therefore 2.5 times as frequent as any other kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from rmsd_fast.config import NotInstalled, SettingsError, first_line
from rmsd_fast.data.records import Question, write_questions
from rmsd_fast.files import staged_folder
from rmsd_fast.method.answers import TASK_TYPES

SIZE = 64
FRAMES = 8
PATCH = 16
CARD_FRAMES = 2
# Increase it whenever the same settings would give different files.
VERSION = 3

COLORS = {
    "red": (230, 30, 30),
    "green": (30, 200, 30),
    "blue": (40, 60, 240),
    "yellow": (240, 230, 30),
    "cyan": (30, 220, 220),
    "pink": (240, 60, 200),
    "white": (240, 240, 240),
    "orange": (250, 130, 20),
}
DOT_COLORS = ("white", "yellow", "cyan")
SHAPES = ("block", "oval", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
# 5x7 block glyphs, drawn with 4x4 pixels per cell.
GLYPHS = {
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
    "C": "11111 10000 10000 10000 10000 10000 11111",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "11111 00001 00001 11111 10000 10000 11111",
    "4": "10001 10001 10001 11111 00001 00001 00001",
    "5": "11111 10000 10000 11111 00001 00001 11111",
    "7": "11111 00001 00010 00100 00100 01000 01000",
    "8": "11111 10001 10001 11111 10001 10001 11111",
}
LETTERS, DIGITS = "HLTXZC", "124578"
CARD_COLOR = (70, 70, 70)
LIGHT = 90
# Frequency of each kind of question, relative to the others.
SHARES = {"mcq": 2.5}

# Along each axis: (first patch, number of patches). A shape covers a quarter of the frame.
_SPANS = [(0, 2), (1, 2), (2, 2)]
# 18 intervals of 1 to 4 s within the 6 s after the card.
_INTERVALS = [(start, start + length) for length in (1, 2, 3, 4) for start in range(CARD_FRAMES, FRAMES - length + 1)]
_PATTERNS = {count: [p for p in range(1, 256) if p.bit_count() == count] for count in range(1, 8)}


@dataclass(frozen=True)
class Content:
    """The content of a clip, stored in `meta["made"]`. Only the simulated teacher and tests read it."""

    color: str
    shape: str
    box: tuple[int, int, int, int]
    """x1, y1, x2, y2 in 0-1000."""
    start: int
    """First second in which the light is on."""
    end: int
    """Second at which the light goes out."""
    sign: str
    """Letter and digit, for example "H 4"."""
    dots: int
    """Number of dots."""
    dot_color: str
    pattern: int
    """Bit i is set if there is a dot on patch i of the lower half, row by row."""

    @property
    def place(self) -> str:
        """Return the position of the box's center: "top left", "left", "centre", …"""
        x, y = (self.box[0] + self.box[2]) // 2, (self.box[1] + self.box[3]) // 2
        row = "top" if y < 500 else "bottom" if y > 500 else ""
        column = "left" if x < 500 else "right" if x > 500 else ""
        return f"{row} {column}".strip() or "centre"


@dataclass(frozen=True)
class MadeMaterial:
    """Paths of generated clips and questions."""

    folder: Path
    train: Path
    heldout: Path
    clips: Path


def make_clips(
    folder: str | os.PathLike,
    *,
    train_clips: int,
    heldout_clips: int,
    questions_per_clip: int,
    seed: int,
    tasks: Sequence[str] = TASK_TYPES,
) -> MadeMaterial:
    """Write clips, `train.jsonl` and `heldout.jsonl` to `folder/<hash of the settings>`, unless they exist.

    The folder is created atomically. `made.json` in it records the settings.

    Args:
        folder: parent of the new folder.
        train_clips, heldout_clips: number of clips of each split.
        questions_per_clip: questions per clip, each of a different task type.
        seed: seed of all draws.
        tasks: task types of the questions, in any order.
    Raises:
        ValueError: a number is out of range, or a task type is unknown, repeated or missing.
        NotInstalled: torchcodec or FFmpeg is missing.
    """
    if not tasks or sorted(tasks) != sorted(set(tasks) & set(TASK_TYPES)):
        raise SettingsError(
            f"made.tasks: expected some of {list(TASK_TYPES)}, each at most once, got {list(tasks)}; change the setting"
        )
    tasks = [task for task in TASK_TYPES if task in tasks]
    for name, value, low, high in (
        ("train_clips", train_clips, 1, None),
        ("heldout_clips", heldout_clips, 1, None),
        ("questions_per_clip", questions_per_clip, 1, len(tasks)),
    ):
        if value < low or (high is not None and value > high):
            limit = f"{low} to {high}" if high else f"at least {low}"
            raise SettingsError(f"made.{name}: expected {limit}, got {value}; change the setting")
    settings = {
        "version": VERSION,
        "train_clips": train_clips,
        "heldout_clips": heldout_clips,
        "questions_per_clip": questions_per_clip,
        "seed": seed,
    }
    # With all task types, the settings are those of earlier versions, so existing material keeps its name.
    if len(tasks) < len(TASK_TYPES):
        settings["tasks"] = tasks
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    final = Path(folder).absolute() / name
    material = MadeMaterial(final, final / "train.jsonl", final / "heldout.jsonl", final / "clips")
    if final.exists():
        check_made(final, settings)
        return material
    with staged_folder(final, replace=False) as temporary:
        (temporary / "clips").mkdir()
        for split, clips in (("train", train_clips), ("heldout", heldout_clips)):
            questions = _make_split(temporary, split, clips, questions_per_clip, seed, tasks)
            write_questions(temporary / f"{split}.jsonl", questions, media_root=temporary)
        (temporary / "made.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    # Another process may have generated the same material in the meantime. Its copy is equivalent.
    check_made(final, settings)
    return material


def render_clip(content: Content) -> torch.Tensor:
    """Return the clip's frames, uint8 [F=8, 3, 64, 64]; frame i is shown from second i to i + 1."""
    frames = torch.zeros(FRAMES, 3, SIZE, SIZE, dtype=torch.uint8)
    frames[:CARD_FRAMES] = _card(content)
    frames[content.start : content.end] = LIGHT
    x1, y1, x2, y2 = (value * SIZE // 1000 for value in content.box)
    mask = _shape_mask(content.shape, y2 - y1, x2 - x1)
    color = torch.tensor(COLORS[content.color], dtype=torch.uint8)[:, None, None]
    region = frames[CARD_FRAMES:, :, y1:y2, x1:x2]
    frames[CARD_FRAMES:, :, y1:y2, x1:x2] = torch.where(mask, color, region)
    return frames


def encode_clip(frames: torch.Tensor, path: str | os.PathLike, *, long: bool = False) -> None:
    """Write frames uint8 [F, 3, H, W] as h264 in mp4 at 1 fps.

    Args:
        frames: the frames.
        path: the new file.
        long: whether to encode for speed, on one thread, which takes a quarter of the time for half an hour.
    Raises:
        NotInstalled: torchcodec or its FFmpeg libraries cannot be loaded.
    """
    try:
        from torchcodec.encoders import VideoEncoder
    except (ImportError, RuntimeError, OSError) as error:
        reason = first_line(error)
        raise NotInstalled(
            "making clips needs torchcodec and the FFmpeg libraries (versions 4 to 8), which could not be loaded: "
            f"{reason}; pip install 'rmsd-fast[video]' and apt-get install ffmpeg"
        ) from error
    # Key frames every 4 or 60 frames, so that sampled frames may depend on other frames, as in a real file.
    options = {"g": "60", "threads": "1"} if long else {"g": "4"}
    preset = "ultrafast" if long else None
    VideoEncoder(frames, frame_rate=1).to_file(
        path, codec="libx264", pixel_format="yuv420p", crf=12, preset=preset, extra_options=options
    )


def sample_content(rng: random.Random, *, heldout: bool, dots: int | None = None, sign: str | None = None) -> Content:
    """Draw random content for one side of the split. `dots` and `sign` are also drawn unless they are passed."""
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    box = rng.choice([box for box in _boxes() if is_heldout_box(color, shape, box) == heldout])
    start, end = rng.choice([i for i in _INTERVALS if is_heldout_interval(color, shape, i) == heldout])
    dot_color, dots = rng.choice(DOT_COLORS), dots or rng.choice(list(_PATTERNS))
    pattern = rng.choice([p for p in _PATTERNS[dots] if is_heldout_pattern(dot_color, p) == heldout])
    sign = sign or rng.choice(_signs(heldout))
    return Content(color, shape, box, start, end, sign, dots, dot_color, pattern)


def is_heldout_box(color: str, shape: str, box: tuple[int, int, int, int]) -> bool:
    """Return whether a box is held out: 2 of 9 boxes per (color, shape)."""
    column, row = box[0] // 250, box[1] // 250
    return (column + 3 * row + list(COLORS).index(color) + 2 * SHAPES.index(shape)) % 9 in (0, 4)


def is_heldout_interval(color: str, shape: str, interval: tuple[int, int]) -> bool:
    """Return whether an interval is held out: about one in 6 (start, end) per (color, shape)."""
    start, end = interval
    return (start + 2 * (end - start) + list(COLORS).index(color) + 3 * SHAPES.index(shape)) % 6 == 0


def is_heldout_pattern(dot_color: str, pattern: int) -> bool:
    """Return whether a pattern is held out: one in 8 patterns per number of dots and dot color."""
    same = _PATTERNS[pattern.bit_count()]
    return (same.index(pattern) + 3 * DOT_COLORS.index(dot_color)) % 8 == 0


def is_heldout_sign(sign: str) -> bool:
    """Return whether a sign is held out: 6 of 36 signs, with every letter and every digit once."""
    letter, digit = sign.split()
    return (LETTERS.index(letter) + DIGITS.index(digit)) % 6 == 0


def make_question(
    content: Content, task: str, rng: random.Random, *, identity: str, clip: Path, letter: str | None = None
) -> Question:
    """Return a question of the given type about the clip, with its ground truth. `letter` is the correct mcq option."""
    shape = f"{content.color} {content.shape}"
    options, asked = None, task
    if task == "mcq":
        asked, text, options, answer = _choice(content, rng, letter or rng.choice("ABCD"))
    elif task == "temporal":
        text = rng.choice(
            (
                "When is the light on?",
                "During which time is the light on?",
                "Find the moment with the light on.",
            )
        )
        answer = f"{content.start}.0 to {content.end}.0"
    elif task == "spatial":
        text = rng.choice(("Where is the shape?", "Give the box of the shape.", "Locate the shape."))
        answer = ",".join(map(str, content.box))
    elif task == "numeric":
        text = rng.choice(("How many dots are on the card?", "Count the dots.", "What is the number of dots?"))
        answer = str(content.dots)
    elif task == "ocr":
        text = rng.choice(("What does the sign say?", "Read the sign.", "Which text is on the card?"))
        answer = content.sign
    else:
        text = rng.choice(("What appears in the clip?", "Describe the clip.", "What do you see beside the card?"))
        answer = f"{article(content.color).capitalize()} {shape} at the {content.place}."
    return Question(
        id=identity,
        question=text,
        task_type=task,
        videos=(str(clip),),
        options=options,
        answer=answer,
        duration=float(FRAMES),
        meta={"made": asdict(content) | {"place": content.place}, "asked": asked},
    )


def _choice(content: Content, rng: random.Random, letter: str) -> tuple[str, str, tuple[str, ...], str]:
    """Return an mcq question: the attribute, the text, the options in random order, and the correct letter."""
    asked = rng.choice(("color", "shape", "place"))
    # A box across the middle is not in a corner, so ask about its color instead.
    if asked == "place" and content.place not in PLACES:
        asked = "color"
    if asked == "color":
        text = rng.choice(("Which colour is the shape?", "What is the colour of the shape?"))
        right, others = content.color, [name for name in COLORS if name != content.color]
    elif asked == "shape":
        text = rng.choice(("Which shape is it?", "What is the form of the shape?"))
        right, others = content.shape, [name for name in SHAPES if name != content.shape]
    else:
        text = rng.choice(("In which corner is the shape?", "Where does the shape stand?"))
        right, others = content.place, [name for name in PLACES if name != content.place]
    options = rng.sample(others, 3)
    options.insert("ABCD".index(letter), right)
    return asked, text, tuple(options), letter


def article(word: str) -> str:
    """Return "a" or "an"."""
    return "an" if word[0] in "aeiou" else "a"


def _make_split(
    folder: Path, split: str, clips: int, per_clip: int, seed: int, task_types: Sequence[str]
) -> list[Question]:
    rng = random.Random(f"made clips {seed} {split}")
    heldout = split == "heldout"
    # The answers are dealt from decks, each equally often, which minimizes the score of a constant answer.
    dots, signs, letters = deal(rng, list(_PATTERNS)), deal(rng, _signs(heldout)), deal(rng, list("ABCD"))
    asked = dict.fromkeys(task_types, 0)
    questions = []
    for index in range(clips):
        # Choose the least frequent types so far, with random ties. Counts then differ by at most one, and no type
        # occurs twice for a clip.
        tasks = sorted(task_types, key=lambda name: (asked[name] / SHARES.get(name, 1), rng.random()))[:per_clip]
        content = sample_content(
            rng,
            heldout=heldout,
            dots=next(dots) if "numeric" in tasks else None,
            sign=next(signs) if "ocr" in tasks else None,
        )
        name = f"{split}-{index:05d}"
        clip = folder / "clips" / f"{name}.mp4"
        encode_clip(render_clip(content), clip)
        for task in tasks:
            asked[task] += 1
            letter = next(letters) if task == "mcq" else None
            questions.append(make_question(content, task, rng, identity=f"{name}-{task}", clip=clip, letter=letter))
    return questions


def deal(rng: random.Random, values: list) -> Iterator:
    """Yield the values forever, in a new random order in each round."""
    while True:
        yield from rng.sample(values, len(values))


def _signs(heldout: bool) -> list[str]:
    return [sign for a, b in product(LETTERS, DIGITS) if is_heldout_sign(sign := f"{a} {b}") == heldout]


def _card(content: Content) -> torch.Tensor:
    """Return the card, uint8 [3, 64, 64]: letter and digit at the top, dots at the bottom."""
    card = torch.tensor(CARD_COLOR, dtype=torch.uint8)[:, None, None].repeat(1, SIZE, SIZE)
    for index, glyph in enumerate(content.sign.split()):
        cells = torch.tensor([[int(cell) for cell in row] for row in GLYPHS[glyph].split()], dtype=torch.bool)
        mask = cells.repeat_interleave(4, 0).repeat_interleave(4, 1)
        left = 32 * index + 6
        card[:, 2 : 2 + mask.shape[0], left : left + mask.shape[1]][:, mask] = 240
    dot = torch.tensor(COLORS[content.dot_color], dtype=torch.uint8)[:, None, None]
    for cell in range(8):
        if content.pattern >> cell & 1:
            top, left = SIZE // 2 + PATCH * (cell // 4), PATCH * (cell % 4)
            card[:, top + 3 : top + 13, left + 3 : left + 13] = dot
    return card


def _shape_mask(shape: str, height: int, width: int) -> torch.Tensor:
    """Return a mask, bool [H, W]; the shape touches all four sides of its box."""
    y = ((torch.arange(height) + 0.5) / height * 2 - 1)[:, None].expand(height, width)
    x = ((torch.arange(width) + 0.5) / width * 2 - 1)[None, :].expand(height, width)
    if shape == "block":
        mask = torch.ones(height, width, dtype=torch.bool)
    elif shape == "oval":
        mask = x**2 + y**2 <= 1
    elif shape == "triangle":
        mask = x.abs() <= (y + 1) / 2 + 1 / width
    else:
        mask = (x.abs() < 0.3) | (y.abs() < 0.3)
    return mask


def _boxes() -> list[tuple[int, int, int, int]]:
    return [(250 * x, 250 * y, 250 * (x + w), 250 * (y + h)) for (x, w), (y, h) in product(_SPANS, _SPANS)]


def check_made(folder: Path, settings: dict[str, Any]) -> None:
    """Reject a folder whose settings differ from these."""
    try:
        found = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = f"none that can be read ({error})"
    missing = [name for name in ("train.jsonl", "heldout.jsonl", "clips") if not (folder / name).exists()]
    if found != settings or missing:
        got = f"{found}" + (f", without {', '.join(missing)}" if missing else "")
        raise SettingsError(
            f"{folder}: expected generated clips with the settings {settings}, got {got}; remove the folder"
        )
