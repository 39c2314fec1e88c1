"""Compare readings of answers with lmms-eval's, and scores of V-STaR with its published script.

python -m bench.evaluation.agreement --lmms-eval DIR --vstar DIR [--answers 2000] [--seed 0]

DIR are checkouts of EvolvingLMMs-Lab/lmms-eval (or its unpacked wheel) and V-STaR-Bench/V-STaR. Their functions are
imported from there. The table is written to bench/results/agreement.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from bench.core.records import RESULTS, surroundings
from bench.core.report import table
from bench.evaluation.answers import KINDS, LETTERS, ONE_LETTER, UNCLEAR, Answer, generate
from bench.evaluation.vstar import compare_vstar
from rmsd_fast.files import write_text_atomic
from rmsd_fast.method.answers import parse_answer
from rmsd_fast.method.lenient import lenient_response

EXTRACTION = "lmms_eval/tasks/_task_utils/mcq_extract.py"
REASONING = "lmms_eval/api/reasoning.py"
# Default of lmms-eval's option --reasoning_tags.
REASONING_TAGS = [["<think>", "</think>"], ["<analysis>", "</analysis>"]]
HEAD = ("kind of answer", "answers", "agreement", "lmms-eval right", "lenient right")
_ARTICLE = "the article A counts as a letter"
_START = "the first letter counts, whatever follows"
# Why lmms-eval reads answers of these kinds differently. Answers that both misread begin with the article A.
REASONS = {
    "phrase and option": "the last capital after the phrase counts, which may belong to the option's text",
    **dict.fromkeys(("reason, then letter", "tags", "LaTeX", "Markdown", "JSON"), _ARTICLE),
    "text of the option": "texts of options are not compared, and a capital inside a word counts",
    "all options discussed": _START,
    "another option denied": f"{_START}; or the last capital after the phrase counts",
    "answer corrected": _START,
    "refusal": "a capital inside a word counts",
    "no letter": "a capital inside a word counts",
}
Reader = Callable[[str], str | None]


@dataclass(frozen=True)
class Reading:
    """The letters that lmms-eval and the lenient reading find in an answer, or None."""

    answer: Answer
    theirs: str | None
    ours: str | None

    @property
    def agrees(self) -> bool:
        return self.theirs == self.ours


def lmms_eval_reader(folder: Path) -> Reader:
    """Return the reading of a VideoMME answer by lmms-eval: its extraction, after it has removed reasoning in tags."""
    extract = _module(folder / EXTRACTION).extract_mcq_answer
    strip = _module(folder / REASONING).strip_reasoning_tags
    return lambda text: extract(strip(text, REASONING_TAGS), choices=list(LETTERS)) or None


def _module(path: Path) -> ModuleType:
    """Import a file without its package, whose other modules need many libraries."""
    if not path.is_file():
        raise SystemExit(
            f"--lmms-eval: expected a checkout of lmms-eval 0.7.2 or later, got no file {path}; check it out"
        )
    spec = importlib.util.spec_from_file_location(f"measured_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lenient_letter(answer: Answer) -> str | None:
    """Return the letter that the lenient reading finds in an answer, or None."""
    response = lenient_response(answer.text, "mcq", options=answer.options)
    return None if response is None else parse_answer(response, "mcq", answer.options)


def read_all(answers: Iterable[Answer], theirs: Reader) -> list[Reading]:
    return [Reading(answer, theirs(answer.text), lenient_letter(answer)) for answer in answers]


def one_capital(answer: Answer) -> bool:
    """Return whether an answer has one of the capitals A to D after its reasoning, and only once."""
    return len(re.findall(f"[{LETTERS}]", answer.text.rpartition("</think>")[2])) == 1


def row(name: str, readings: Sequence[Reading]) -> tuple[str, ...]:
    """Return a row of the table: shares of equal readings, and of readings that are the intended one on each side."""
    known = [reading for reading in readings if reading.answer.kind not in UNCLEAR]
    theirs = sum(reading.theirs == reading.answer.meant for reading in known)
    ours = sum(reading.ours == reading.answer.meant for reading in known)
    agreeing = sum(reading.agrees for reading in readings)
    right = [_share(theirs, len(known)), _share(ours, len(known))]
    return (name, f"{len(readings):,}", _share(agreeing, len(readings)), *right)


def _share(count: int, total: int) -> str:
    return f"{count / total:.2%}".replace(".00%", "%") if total else "-"


def agreement_tables(readings: Sequence[Reading]) -> str:
    """Return the table by kind, and an example of each kind of disagreement and error."""
    stated = [reading for reading in readings if reading.answer.kind in ONE_LETTER]
    rows = [row(kind, [reading for reading in readings if reading.answer.kind == kind]) for kind in KINDS]
    rows += [
        row("**all**", readings),
        row("**states one letter**", stated),
        row("**states one letter, no other capital A to D**", [r for r in stated if one_capital(r.answer)]),
    ]
    return f"{table(HEAD, rows)}\n\n**Disagreements, and answers that both misread**\n\n{examples_table(readings)}\n"


def examples_table(readings: Iterable[Reading]) -> str:
    """Return a table with an example of each kind of answer that the two sides read differently, or both misread."""
    groups: dict[tuple[str, str], list[Reading]] = {}
    for reading in readings:
        meant, kind = reading.answer.meant, reading.answer.kind
        correct = "lenient" if reading.ours == meant else "lmms-eval" if reading.theirs == meant else "neither"
        if not reading.agrees or (correct == "neither" and kind not in UNCLEAR):
            groups.setdefault((kind, "unclear" if kind in UNCLEAR else correct), []).append(reading)
    lines = []
    for (kind, correct), of in sorted(groups.items(), key=lambda item: list(KINDS).index(item[0][0])):
        first = of[0]
        meant = "unclear" if kind in UNCLEAR else first.answer.meant
        letters = (letter or "none" for letter in (meant, first.theirs, first.ours))
        reason = _ARTICLE if correct == "neither" else REASONS.get(kind, "")
        lines.append((kind, len(of), f"`{first.answer.text!r}`", *letters, correct, reason))
    head = ("kind of answer", "answers", "first example", "intended", "lmms-eval", "lenient", "right", "reason")
    return table(head, lines)


def version_of(folder: Path) -> str:
    """Return the version and commit of a checkout, or the version of an unpacked wheel."""
    files = [folder / "pyproject.toml", *folder.glob("*.dist-info/METADATA")]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    version = re.search(r"^version\s*[:=]\s*\"?([\w.]+)", text, re.MULTILINE | re.IGNORECASE)
    git = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    lines = subprocess.run(git, capture_output=True, text=True, check=False).stdout.split()
    # A folder inside another repository is not a checkout.
    commit = f"commit {lines[1][:12]}" if len(lines) == 2 and Path(lines[0]) == folder.resolve() else ""
    return " ".join(filter(None, (version[1] if version else "", commit))) or "unknown version"


def page(readings: Sequence[Reading], vstar: str, seed: int, versions: str) -> str:
    """Return the page of the results."""
    return (
        "# Agreement with lmms-eval and V-STaR's script\n\n"
        "Written by `python -m bench.evaluation.agreement`.\n\n"
        f"{len(readings):,} generated answers (seed {seed}) to questions with four options, read by lmms-eval as for\n"
        "VideoMME, and by `rmsd_fast.method.lenient`. A reading is right if it is the letter that the answer means,\n"
        "or none if it means no option. Unlike in answers of a model, all kinds are equally frequent here, and\n"
        "half of the options' texts begin with a capital from A to D.\n\n"
        f"{agreement_tables(readings)}\n"
        f"## V-STaR\n\n{vstar}\n\n{versions}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lmms-eval", type=Path, required=True, metavar="DIR", help="checkout of lmms-eval")
    parser.add_argument("--vstar", type=Path, required=True, metavar="DIR", help="checkout of V-STaR")
    parser.add_argument("--answers", type=int, default=2000, help="number of answers (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    theirs = lmms_eval_reader(arguments.lmms_eval)
    readings = read_all(generate(arguments.answers, arguments.seed), theirs)
    vstar = compare_vstar(arguments.vstar, arguments.seed)
    versions = (
        f"lmms-eval {version_of(arguments.lmms_eval)}, V-STaR {version_of(arguments.vstar)}, rmsd_fast at commit "
        f"{surroundings()['commit']}, Python {platform.python_version()}."
    )
    text = page(readings, vstar, arguments.seed, versions)
    write_text_atomic(RESULTS / "agreement.md", text)
    print(text)


if __name__ == "__main__":
    main()
