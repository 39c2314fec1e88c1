"""Write a table of evaluations on needles: scores by length of the event, beside what the frames can show.

python -m bench.media.needles HELDOUT 16=a.json 16=b.json 128=c.json   # frames in training = evaluation

The evaluations are those of `rmsd_fast.evaluate` on `made.source=needles`, with their predictions beside them.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable
from pathlib import Path

from bench.core.records import RESULTS, surroundings
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


def seen_share(frames: int, length: int, family: str) -> float:
    """Return the share of the possible starts of an event of `length` seconds at which a sampled frame shows it."""
    starts = {frame - back for frame in sampled(frames, family) for back in range(length)}
    possible = range(SECONDS - length + 1)
    return len(starts & set(possible)) / len(possible)


def is_seen(question: Question, frames: int, family: str) -> bool:
    """Return whether a sampled frame shows the event of a question."""
    start = question.meta["event"]["start"]
    return any(start <= frame < start + length_of(question) for frame in sampled(frames, family))


def length_of(question: Question) -> int:
    """Return the seconds of a question's event."""
    return int(question.meta["groups"]["event_s"].split()[0])


def ceiling(seen: float) -> float:
    """Return the best expected score if a share `seen` of the events is seen, and the others are guessed."""
    return seen + (1 - seen) / len(EVENT_COLORS)


def read(pair: str, questions: dict[str, Question], family: str) -> dict:
    """Return the scores of an evaluation, and its answers."""
    trained, _, name = pair.partition("=")
    path = Path(name)
    frames = json.loads(path.read_text())["protocol"]["video"]["num_frames"]
    answers = [json.loads(line) for line in path.with_suffix(".predictions.jsonl").read_text().splitlines()]
    by_length: dict[str, list[dict]] = {}
    for answer in answers:
        question = questions[answer["id"]]
        seen = is_seen(question, frames, family)
        keys = [f"{length_of(question)} s", "1 s, " * (length_of(question) == 1) + ("seen" if seen else "not seen")]
        for key in keys if length_of(question) == 1 else keys[:1]:
            by_length.setdefault(key, []).append(answer)
    return {
        "trained": int(trained),
        "frames": frames,
        "scores": {key: mean_entry(of) for key, of in by_length.items()},
        "answers": answers,
    }


def page(evaluations: list[dict], family: str, facts: dict, ran: str) -> str:
    """Return the page of the results."""
    order = [f"{length} s" for length in (1, 4, 16, 64, 256)] + ["1 s, seen", "1 s, not seen"]
    rows = []
    for key in order:
        row = [key]
        for evaluation in evaluations:
            entry = evaluation["scores"].get(key)
            row.append("{mean:.3f} [{low:.2f}, {high:.2f}]".format_map(entry) if entry else "")
        rows.append(row)
    for length in (1, 4, 16, 64, 256):
        rows[order.index(f"{length} s")] += [
            f"{ceiling(seen_share(frames, length, family)):.3f}" for frames in _frames(evaluations)
        ]
    for row in rows[5:]:
        row += ["1.000" if row[0] == "1 s, seen" else "0.250"] * len(_frames(evaluations))
    head = ["event", *(f"trained {e['trained']}, shown {e['frames']}" for e in evaluations)]
    head += [f"ceiling {frames}" for frames in _frames(evaluations)]
    counts = ", ".join(f"{len(e['answers']):,}" for e in evaluations)
    lines = [
        "Scores of a tiny student on held-out needles (`made.source=needles`), by length of the event, with the\n"
        "numbers of frames in training and in the evaluation. The ceiling is the expected score of a student that\n"
        f"answers what a sampled frame shows, and guesses otherwise. Questions: {counts}.\n",
        table(head, rows).rstrip(),
        "\n**Paired differences, events of one second**\n",
        *_differences(evaluations),
    ]
    names = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "torchcodec") if name in facts)
    lines.append(f"\n{facts['cpu']}, {facts['threads']} thread(s), {names}, {ran}.")
    return "\n".join(lines) + "\n"


def _frames(evaluations: list[dict]) -> list[int]:
    return sorted({evaluation["frames"] for evaluation in evaluations})


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
    facts = surroundings()
    text = page(evaluations, arguments.family, facts, arguments.ran)
    write_text_atomic(RESULTS / "needles.md", text)
    records = [{name: value for name, value in e.items() if name != "answers"} for e in evaluations]
    write_text_atomic(
        RESULTS / "needles.json", json.dumps({**facts, "ran": arguments.ran, "evaluations": records}, indent=1) + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
