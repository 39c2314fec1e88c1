"""Generate needles: videos of half an hour in which the picture has a color for a moment, and questions about it.

A video has 1,800 frames of 32x32 pixels, 1 fps, which is one vision token for each pair of frames. A gray shape on
black moves to another place every 15 s. Once, the whole picture has one of four colors, except for a black dot: this is
the event. The question is which color it was, with the options always in the same order, so that a tiny student has to
learn to look and not to find the letter of an option. A student that does not see the event can only guess.

How many frames are needed is arithmetic: F frames that are evenly spaced over 1,800 s show an event of d seconds with a
probability of about F * d / 1,800, at most 1. Half of the held-out events last one second. In training, every length is
equally frequent, so that a student with few frames sees enough events to learn from.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import torch

from rmsd_fast.data.records import Question, write_questions
from rmsd_fast.files import staged_folder
from rmsd_fast.made.clips import COLORS, MadeMaterial, check_made, deal, encode_clip

SECONDS = 1800
SIDE = 32
# Increase it whenever the same settings would give different files.
VERSION = 2
# The options of every question, in this order.
EVENT_COLORS = ("red", "green", "blue", "yellow")
# Lengths of events in seconds, as often as they occur in a round.
TRAIN_LENGTHS = (1, 4, 16, 64, 256)
HELDOUT_LENGTHS = (1, 1, 1, 1, 4, 16, 64, 256)
SCENE_SECONDS = 15
QUESTIONS = (
    "Once, the picture has a color. Which one?",
    "Which color fills the picture for a moment?",
    "In which color does the picture flash?",
)


def make_needles(folder: str | os.PathLike, *, train_clips: int, heldout_clips: int, seed: int) -> MadeMaterial:
    """Write videos, `train.jsonl` and `heldout.jsonl` to `folder/needles-<hash of the settings>`, unless they exist.

    The folder is created atomically. `made.json` in it records the settings. Each video has one question.

    Args:
        folder: parent of the new folder.
        train_clips, heldout_clips: number of videos of each split.
        seed: seed of all draws.
    Raises:
        SettingsError: the folder exists with other settings.
        NotInstalled: torchcodec or FFmpeg is missing.
    """
    settings = {
        "version": VERSION,
        "source": "needles",
        "train_clips": train_clips,
        "heldout_clips": heldout_clips,
        "seed": seed,
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    final = Path(folder).absolute() / f"needles-{name}"
    material = MadeMaterial(final, final / "train.jsonl", final / "heldout.jsonl", final / "clips")
    if not final.exists():
        with staged_folder(final, replace=False) as temporary:
            (temporary / "clips").mkdir()
            for split, clips in (("train", train_clips), ("heldout", heldout_clips)):
                questions = _make_split(temporary, split, clips, seed)
                write_questions(temporary / f"{split}.jsonl", questions, media_root=temporary)
            (temporary / "made.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    # Another process may have generated the same material in the meantime. Its copy is equivalent.
    check_made(final, settings)
    return material


def render_needle(color: str, start: int, length: int, rng: random.Random) -> torch.Tensor:
    """Return the frames of a video, uint8 [1800, 3, 32, 32]. The event is on the frames start to start + length - 1."""
    frames = torch.zeros(SECONDS, 3, SIDE, SIDE, dtype=torch.uint8)
    for scene in range(0, SECONDS, SCENE_SECONDS):
        x, y, width, height = rng.randrange(20), rng.randrange(20), rng.randint(6, 12), rng.randint(6, 12)
        frames[scene : scene + SCENE_SECONDS, :, y : y + height, x : x + width] = rng.randint(90, 200)
    event = frames[start : start + length]
    event[:] = torch.tensor(COLORS[color], dtype=torch.uint8)[:, None, None]
    event[:, :, 14:18, 14:18] = 0
    return frames


def is_heldout_start(color: str, start: int) -> bool:
    """Return whether an event that starts in this second is held out: one in 6 seconds for each color."""
    return (start + EVENT_COLORS.index(color)) % 6 == 0


def _make_split(folder: Path, split: str, clips: int, seed: int) -> list[Question]:
    rng = random.Random(f"needles {seed} {split}")
    heldout = split == "heldout"
    # The colors are dealt from decks, each equally often, which minimizes the score of a constant answer.
    colors = deal(rng, list(EVENT_COLORS))
    lengths = deal(rng, list(HELDOUT_LENGTHS if heldout else TRAIN_LENGTHS))
    questions = []
    for index in range(clips):
        color, length = next(colors), next(lengths)
        start = rng.choice(
            [second for second in range(SECONDS - length + 1) if is_heldout_start(color, second) == heldout]
        )
        name = f"{split}-{index:05d}"
        clip = folder / "clips" / f"{name}.mp4"
        encode_clip(render_needle(color, start, length, rng), clip, long=True)
        questions.append(
            Question(
                id=name,
                question=rng.choice(QUESTIONS),
                task_type="mcq",
                videos=(str(clip),),
                options=EVENT_COLORS,
                answer="ABCD"[EVENT_COLORS.index(color)],
                duration=float(SECONDS),
                meta={"event": {"color": color, "start": start}, "groups": {"event_s": f"{length} s"}},
            )
        )
    return questions
