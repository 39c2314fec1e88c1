"""Write a table of evaluations on needles: scores by length of the event, beside what the frames can show.

The results were made with these commands:

python -m rmsd_fast.train needles video.num_frames=16 name=needles16
python -m rmsd_fast.train needles video.num_frames=128 name=needles128
python -m rmsd_fast.evaluate runs/needles16-…/config.yaml model.path=runs/needles16-…/stage1 \\
    evaluate.num_frames=16 --output 16-16.json    # and 128 frames; both also for needles128
python -m rmsd_fast.evaluate runs/needles128-…/config.yaml model.path=runs/needles128-…/stage1 \\
    evaluate.num_frames=768 evaluate.max_questions=400 --output 128-768.json
python -m bench.media.needles made/needles-…/heldout.jsonl 16=16-16.json 16=16-128.json 128=128-16.json \\
    128=128-128.json 128=128-768.json --ran "trained at commit …, evaluated at …"

The number before a file is that of the frames in training. Predictions are expected beside each file.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable
from pathlib import Path

from bench.core.records import RESULTS
from bench.core.report import table
from rmsd_fast.config import VideoConfig
from rmsd_fast.data.preprocess import Preprocessor, frame_indices
from rmsd_fast.data.records import Question, load_questions
from rmsd_fast.files import write_text_atomic
from rmsd_fast.made.needles import EVENT_COLORS, SECONDS
from rmsd_fast.stages.summaries import compare, mean_entry, signed_interval


@functools.cache
def sampled(frames: int, family: str) -> tuple[int, ...]:
    """Return the frames that are taken from a video."""
    settings = VideoConfig(num_frames=frames)
    return tuple(frame_indices(SECONDS, 1.0, settings, Preprocessor(family=family)))


def is_seen(question: Question, frames: int, family: str) -> bool:
    """Return whether a sampled frame shows the event of a question."""
    start = question.meta["event"]["start"]
    return any(start <= frame < start + length_of(question) for frame in sampled(frames, family))


def length_of(question: Question) -> int:
    """Return the seconds of a question's event."""
    return int(question.meta["groups"]["event_s"].split()[0])


def ceiling(questions: Iterable[Question], frames: int, family: str) -> float:
    """Return the expected score of a student that answers the questions whose event it is shown, and else guesses."""
    seen = [is_seen(question, frames, family) for question in questions]
    return (sum(seen) + seen.count(False) / len(EVENT_COLORS)) / len(seen)


def read(pair: str, questions: dict[str, Question], family: str) -> dict:
    """Return the scores of an evaluation with its ceilings, its answers, and how it was made."""
    trained, _, name = pair.partition("=")
    path = Path(name)
    evaluation = json.loads(path.read_text())
    frames = evaluation["protocol"]["video"]["num_frames"]
    answers = [json.loads(line) for line in path.with_suffix(".predictions.jsonl").read_text().splitlines()]
    by_length: dict[str, list[dict]] = {}
    for answer in answers:
        question = questions[answer["id"]]
        keys = [f"{length_of(question)} s"]
        if length_of(question) == 1:
            keys.append("1 s, seen" if is_seen(question, frames, family) else "1 s, not seen")
        for key in keys:
            by_length.setdefault(key, []).append(answer)
    return {
        "trained": int(trained),
        "frames": frames,
        "seed": evaluation["seed"],
        "versions": evaluation["protocol"]["versions"],
        "scores": {
            key: mean_entry(of) | {"ceiling": ceiling([questions[answer["id"]] for answer in of], frames, family)}
            for key, of in by_length.items()
        },
        "answers": answers,
    }


def page(evaluations: list[dict], ran: str) -> str:
    """Return the page of the results.

    Args:
        evaluations: results of `read`.
        ran: commits of training and evaluation.
    Raises:
        ValueError: the evaluations were made with different versions or seeds.
    """
    first = evaluations[0]
    if any(e["versions"] != first["versions"] or e["seed"] != first["seed"] for e in evaluations):
        raise ValueError("evaluations: expected the same versions and seed, got others; evaluate all of them again")
    rows = []
    for key in [*(f"{length} s" for length in (1, 4, 16, 64, 256)), "1 s, seen", "1 s, not seen"]:
        entries = [evaluation["scores"].get(key) for evaluation in evaluations]
        cells = list(map(_cell, entries))
        rows.append([key, *cells, ", ".join(f"{entry['n']:,}" if entry else "0" for entry in entries)])
    head = ["event", *(f"trained {e['trained']}, shown {e['frames']}" for e in evaluations), "questions"]
    lines = [
        "Scores of tiny students on held-out needles (`made.source=needles`), by length of the event, with the\n"
        "numbers of frames in training and in the evaluation. The ceiling is the expected score of a student that\n"
        "answers what a sampled frame shows, and otherwise guesses. It is computed from the events of the same\n"
        "questions, whose starts are restricted for each color. The last column has the numbers of questions, in\n"
        "the order of the columns. One training for each number of frames, with seed "
        f"{first['seed']}.\n",
        table(head, rows).rstrip(),
        "\n**Paired differences, events of one second**\n",
        *_differences(evaluations),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines.append(f"\nVersions of the evaluations: {versions}; {ran}.")
    return "\n".join(lines) + "\n"


def _cell(entry: dict | None) -> str:
    if entry is None:
        return ""
    # A single question has no interval.
    interval = "" if entry["low"] is None else " [{low:.2f}, {high:.2f}]".format_map(entry)
    return f"{entry['mean']:.3f}{interval}, ceiling {entry['ceiling']:.3f}"


def _differences(evaluations: list[dict]) -> Iterable[str]:
    """Yield the differences from the last evaluation of the student that was trained with most frames, shown as many.

    A question that only one evaluation has is left out.
    """
    best = max(evaluations, key=lambda e: (e["frames"] == e["trained"], e["frames"]))
    for other in evaluations:
        if other is best:
            continue
        ours, theirs = ({a["id"]: a for a in e["answers"] if a["groups"]["event_s"] == "1 s"} for e in (best, other))
        common = sorted(ours.keys() & theirs.keys())
        difference = compare([ours[i] for i in common], [theirs[i] for i in common], details=False)["closed"]
        yield (
            f"- trained {best['trained']}, shown {best['frames']}, minus trained {other['trained']}, shown "
            f"{other['frames']}: {signed_interval(difference)}, {len(common)} questions"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heldout", type=Path, help="heldout.jsonl of the needles")
    parser.add_argument("evaluations", nargs="+", metavar="FRAMES=EVALUATION")
    parser.add_argument("--family", default="qwen2_vl", help="preprocessing of the student, which chooses the frames")
    parser.add_argument("--ran", required=True, help="commits of training and evaluation, as a text")
    arguments = parser.parse_args()
    questions = {q.id: q for q in load_questions(arguments.heldout, media_root=arguments.heldout.parent)}
    evaluations = [read(pair, questions, arguments.family) for pair in arguments.evaluations]
    text = page(evaluations, arguments.ran)
    write_text_atomic(RESULTS / "needles.md", text)
    records = [{name: value for name, value in e.items() if name != "answers"} for e in evaluations]
    results = {"ran": arguments.ran, "evaluations": records}
    write_text_atomic(RESULTS / "needles.json", json.dumps(results, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
