"""Write invented annotations in the formats of all eight benchmarks, about generated clips and frames of them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rmsd_fast.data.benchmarks.mathverse import VERSIONS
from rmsd_fast.data.benchmarks.mlvu import TASKS
from rmsd_fast.data.benchmarks.videommmu import TRACKS
from rmsd_fast.made.clips import COLORS, FRAMES, SIZE, Content, encode_clip, render_clip, sample_content

COLOR, SHAPE, LIGHT = "Which colour is the shape?", "Where is the shape?", "When is the light on?"
# As many as LongVideoBench has groups of durations.
CLIPS = 4


@dataclass(frozen=True)
class Clip:
    """A clip, with a question about its color, whose options are `A. red` and so on."""

    name: str
    content: Content
    colors: tuple[str, ...]

    @property
    def letter(self) -> str:
        return "ABCD"[self.colors.index(self.content.color)]

    @property
    def options(self) -> list[str]:
        return [f"{letter}. {color}" for letter, color in zip("ABCD", self.colors, strict=True)]


def write_clips(folder: Path, seed: int = 0) -> list[Clip]:
    """Write CLIPS clips as `videos/<name>.mp4`, and `images/<name>.png`, which is a frame of the clip."""
    rng = random.Random(f"fixtures {seed}")
    for name in ("videos", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    clips = []
    for number in range(CLIPS):
        content, name = sample_content(rng, heldout=True), f"dev_Art_{number}"
        others = rng.sample([color for color in COLORS if color != content.color], 3)
        colors = tuple(rng.sample([content.color, *others], 4))
        frames = render_clip(content)
        encode_clip(frames, folder / "videos" / f"{name}.mp4")
        Image.fromarray(frames[-1].permute(1, 2, 0).numpy()).save(folder / "images" / f"{name}.png")
        clips.append(Clip(name, content, colors))
    return clips


def _videomme(clips: list[Clip]) -> dict[str, list | dict]:
    rows = [
        {"video_id": f"{number:03}", "videoID": clip.name, "question_id": f"{number:03}-1", "url": ""}
        | {"duration": duration, "domain": "Art", "sub_category": "Shapes", "task_type": "Attribute Perception"}
        | {"question": COLOR, "options": clip.options, "answer": clip.letter}
        for number, (clip, duration) in enumerate(zip(clips, ("short", "medium", "long", "short"), strict=True))
    ]
    return {"videomme.json": rows}


def _videommmu(clips: list[Clip]) -> dict[str, list | dict]:
    rows = [
        {"id": clip.name, "question": COLOR, "options": list(clip.colors), "answer": clip.letter}
        | {"question_type": "multiple-choice", "category": track.title()}
        for clip, track in zip(clips[: len(TRACKS)], TRACKS, strict=True)
    ]
    rows[-1]["image"] = f"images/{rows[-1]['id']}.png"
    return {"videommmu.json": rows}


def _worldsense(clips: list[Clip]) -> dict[str, list | dict]:
    records: dict[str, dict] = {}
    for clip in clips[:3]:
        asked = {"task_domain": "Recognition", "task_type": "Attribute Recognition", "question": COLOR}
        asked |= {"answer": clip.letter, "candidates": clip.options}
        records[clip.name] = {"video_id": clip.name, "video_duration": f"{FRAMES}s", "duration": "<1min"}
        records[clip.name] |= {"domain": "Art", "sub_category": "Shapes", "audio_class": ["Event"], "task0": asked}
    corner = {"task_domain": "Understanding", "task_type": "Spatial Relation", "question": "Is there a shape?"}
    records[clips[0].name]["task1"] = corner | {"answer": "A", "candidates": ["A. Yes.", "B. No.", "C. Unclear."]}
    return {"worldsense_qa.json": records}


def _longvideobench(clips: list[Clip]) -> dict[str, list | dict]:
    rows = [
        {"id": f"{clip.name}_0", "video_id": clip.name, "video_path": f"{clip.name}.mp4", "question": COLOR}
        | {f"option{index}": color for index, color in enumerate(clip.colors)}
        | {"option4": "N/A", "correct_choice": clip.colors.index(clip.content.color), "duration": float(FRAMES)}
        | {"duration_group": group, "question_category": "S2A", "topic_category": "AR-Art"}
        | {"subtitle_path": f"{clip.name}_en.json", "starting_timestamp_for_subtitles": 0}
        for clip, group in zip(clips, (15, 60, 600, 3600), strict=True)
    ]
    return {"lvb_val.json": rows}


def _mlvu(clips: list[Clip]) -> dict[str, list | dict]:
    return {
        f"{number}_{task}.json": [
            {"video": f"{clip.name}.mp4", "duration": FRAMES, "question": COLOR, "candidates": list(clip.colors)}
            | {"answer": clip.content.color, "question_type": task}
        ]
        for number, (task, clip) in enumerate(zip(TASKS, (2 * clips)[: len(TASKS)], strict=True), start=1)
    }


def _mathvista(clips: list[Clip]) -> dict[str, list | dict]:
    metadata = {"split": "testmini", "language": "english", "img_width": SIZE, "img_height": SIZE, "source": "made"}
    metadata |= {"category": "math-targeted-vqa", "task": "figure question answering", "context": "synthetic scene"}
    metadata |= {"grade": "elementary school", "skills": ["geometry reasoning"]}
    first, second, third = clips[:3]
    base = {"unit": None, "precision": None, "choices": None, "metadata": metadata}
    asked = [
        (first, COLOR, "multi_choice", "text", {"choices": list(first.colors), "answer": first.content.color}),
        (second, "How many shapes are there?", "free_form", "integer", {"answer": "1"}),
        (third, "How long is a side?", "free_form", "float", {"answer": "64.0", "unit": "pixels", "precision": 1}),
    ]
    return {
        "testmini.json": {
            f"{number}": base
            | {"pid": f"{number}", "question": text, "image": f"images/{clip.name}.png", "question_type": kind}
            | {"answer_type": form, **fields}
            for number, (clip, text, kind, form, fields) in enumerate(asked, start=1)
        }
    }


def _mathverse(clips: list[Clip]) -> dict[str, list | dict]:
    rows = []
    for problem, clip in enumerate(clips[:2], start=1):
        lettered = [f"{letter}:{color}" for letter, color in zip("ABCD", clip.colors, strict=True)]
        choices = "\n".join(["Choices:", *lettered])
        kinds = [("multi-choice", f"{COLOR}\n{choices}", clip.letter), ("free-form", "How many shapes?", "1")]
        kind, text, answer = kinds[problem - 1]
        for number, version in enumerate(VERSIONS, start=1):
            shown = "" if version == "Vision Only" else text
            rows.append(
                {"sample_index": f"{len(VERSIONS) * (problem - 1) + number}", "problem_index": f"{problem}"}
                | {"problem_version": version, "question": shown, "image": f"images/{clip.name}.png"}
                | {"answer": answer, "question_type": kind, "query_cot": shown, "question_for_eval": text}
                | {"query_wo": f"Please directly answer the question.\nQuestion: {shown}".strip()}
                | {
                    "metadata": {
                        "split": "testmini",
                        "source": "made",
                        "subject": "Plane Geometry",
                        "subfield": "Angle",
                    }
                }
            )
    return {"testmini.json": rows}


def _vstar(clips: list[Clip]) -> dict[str, list | dict]:
    records = []
    for clip in clips:
        content = clip.content
        corners = [value * SIZE // 1000 for value in content.box]
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        records.append(
            {"vid": clip.name, "domain": "Art", "fps": 1.0, "width": SIZE, "height": SIZE, "frame_count": FRAMES}
            | {"question": COLOR, "chain": "<think><think>", "object": "shape", "answer": content.color}
            | {"temporal_question": LIGHT, "timestamps": [float(content.start), float(content.end)]}
            | {"spatial_question": SHAPE, "spatial_question_2": SHAPE}
            | {
                "bboxes": [
                    {"timestamp": second, "frame_index": second, **box} for second in range(content.start, content.end)
                ]
            }
        )
    return {"V_STaR_test.json": records}


def write_annotation(benchmark: str, folder: Path, clips: list[Clip]) -> Path:
    """Write the annotation of a benchmark about the clips of `write_clips`, and return its path."""
    target = folder / benchmark
    target.mkdir(parents=True, exist_ok=True)
    for name, records in _WRITERS[benchmark](clips).items():
        (target / name).write_text(json.dumps(records, indent=1), encoding="utf-8")
    return target


_WRITERS = {
    "videomme": _videomme,
    "videommmu": _videommmu,
    "worldsense": _worldsense,
    "longvideobench": _longvideobench,
    "mlvu": _mlvu,
    "mathvista": _mathvista,
    "mathverse": _mathverse,
    "vstar": _vstar,
}
