"""Check a teacher pool before training, or rewrite its answers in the format that training requires.

python -m rmsd_fast.pool check pool.jsonl questions.jsonl
python -m rmsd_fast.pool repair pool.jsonl questions.jsonl --output repaired.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rmsd_fast import environment
from rmsd_fast.command_line import Parser
from rmsd_fast.process import run_main

if TYPE_CHECKING:
    from rmsd_fast.teacher.summary import Summary

# Settings that a command reads, in addition to those that say how to read files and answers.
ALSO_READ = {"check": ("teacher.responses", "teacher.max_unanswered_share"), "repair": ()}
EXAMPLES = 3
SHOWN_CHARACTERS = 160


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and run one command. Return 2 if almost no answer can be used."""
    arguments = _parse(argv)
    if reason := environment.why_not(("torch", "omegaconf")):
        print(f"rmsd_fast.pool: {reason}", file=sys.stderr)
        return 2
    from rmsd_fast.config import UserError

    faults: list[str] = []
    try:
        if arguments.command == "check":
            summary = check(arguments.pool, arguments.questions, arguments.overrides)
            print(summary.text())
            faults = summary.faults
        else:
            print(repair(arguments.pool, arguments.questions, arguments.output, arguments.overrides))
    except UserError as error:
        faults = [str(error)]
    for fault in faults:
        print(f"rmsd_fast.pool: {fault}", file=sys.stderr)
    return 2 if faults else 0


def check(pool_path: Path, questions_path: Path, overrides: Sequence[str] = ()) -> Summary:
    """Count all answers by task and by reason, and show three examples of each reason.

    Returns:
        The summary. Its faults are the reasons why a run could not start.
    Raises:
        UserError: a file is damaged, or the pool belongs to other questions.
    """
    from rmsd_fast.data.errors import DataError
    from rmsd_fast.made.teacher import is_simulated
    from rmsd_fast.stages.inputs import read_pool_files
    from rmsd_fast.teacher.diagnostics import pool_statistics
    from rmsd_fast.teacher.pool import check_answered, check_keys
    from rmsd_fast.teacher.scores import score_pool, used_responses
    from rmsd_fast.teacher.summary import Summary, describe_pool, describe_questions, explain_reasons

    settings, questions, pool = read_pool_files("pool check", ALSO_READ["check"], pool_path, questions_path, overrides)
    answered = [question for question in questions if question.id in pool]
    unanswered = [question.id for question in questions if question.id not in pool]
    faults = []
    try:
        check_answered(pool, questions, max_unanswered_share=settings.teacher.max_unanswered_share)
    except DataError as error:
        # The existing answers can be checked anyway.
        if not answered:
            raise
        faults.append(str(error))
    check_keys(pool, questions)
    used = settings.teacher.responses
    most = max(sum(not response.is_hinted for response in pool[question.id]) for question in answered)
    settings = replace(settings, teacher=replace(settings.teacher, responses=most, hinted=True))
    scores = score_pool(pool, answered, settings.teacher)
    statistics = pool_statistics(scores, answered, settings.teacher, simulated=is_simulated(pool))
    summary = describe_questions(questions, [])
    summary += describe_pool(answered, pool, statistics, unanswered, settings)
    summary.faults += faults
    if used != most:
        summary.lines.append(f"  all answers were checked; a run reads the first teacher.responses={used} per question")
    examples: dict[str, list[str]] = defaultdict(list)
    for question in answered:
        for answer, response in zip(
            scores[question.id], used_responses(pool[question.id], settings.teacher), strict=True
        ):
            if answer.reason and len(examples[answer.reason]) < EXAMPLES:
                examples[answer.reason].append(f"    {question.id} k={answer.k}: {_short(response.text)}")
    for reason, explained in explain_reasons(list(examples)).items():
        summary += Summary([explained, *examples[reason]])
    return summary


def repair(pool_path: Path, questions_path: Path, output: Path, overrides: Sequence[str] = ()) -> str:
    """Write a pool with readable answers in canonical form, each next to its text as sent. Return a report.

    Answers that stay invalid are kept unchanged, with their reason. Answers to questions that are not in the file are
    also kept unchanged.

    Raises:
        UserError: a file is damaged, the pool belongs to other questions, or the output exists or cannot be written.
    """
    from rmsd_fast.config import SettingsError
    from rmsd_fast.stages.inputs import read_pool_files
    from rmsd_fast.teacher.pool import check_pool, write_pool
    from rmsd_fast.teacher.scores import repair_pool

    # A dangling symbolic link also counts as existing.
    if output.exists() or output.is_symlink():
        raise SettingsError(f"--output {output}: expected a new file, got an existing one; choose another name")
    settings, questions, pool = read_pool_files(
        "pool repair", ALSO_READ["repair"], pool_path, questions_path, overrides
    )
    check_pool(pool, questions, max_unanswered_share=1.0)
    repaired = repair_pool(pool, questions, settings.teacher)
    try:
        write_pool(output, repaired.responses)
    except OSError as error:
        raise SettingsError(
            f"--output {output}: cannot be written ({error.strerror or error}); choose a folder that you can write to"
        ) from error
    return f"{output}: {repaired.text()}"


def _short(text: str) -> str:
    shown = repr(text)
    return (
        shown
        if len(shown) <= SHOWN_CHARACTERS
        else f"{shown[: SHOWN_CHARACTERS // 2]} … {shown[-SHOWN_CHARACTERS // 2 :]}"
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="rmsd_fast.pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("check", "count answers by task and by reason, with examples"),
        ("repair", "write a pool with canonical texts, and each text as sent under `raw`"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("pool", type=Path, help="teacher answers, JSONL")
        command.add_argument("questions", type=Path, help="the questions that the pool answers")
        command.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="section.field=value",
            help="settings, e.g. teacher.parse=strict",
        )
        if name == "repair":
            command.add_argument("--output", type=Path, required=True, help="pool to write; must not exist")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_main(main))
