"""Look at a teacher pool before training, or bring its answers into the format that training asks for.

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

from rmsd_fast import environment

EXAMPLES = 3
SHOWN_CHARACTERS = 160


def main(argv: list[str] | None = None) -> int:
    """Parse and do one of the two; ends with 2 where next to no answer can be used."""
    arguments = _parse(argv)
    if reason := environment.why_not(("torch", "omegaconf")):
        print(f"rmsd_fast.pool: {reason}", file=sys.stderr)
        return 2
    from rmsd_fast.config import UserError

    try:
        if arguments.command == "check":
            print(check(arguments.pool, arguments.questions, arguments.overrides))
        else:
            print(repair(arguments.pool, arguments.questions, arguments.output, arguments.overrides))
    except UserError as error:
        print(f"rmsd_fast.pool: {error}", file=sys.stderr)
        return 2
    return 0


def check(pool_path: Path, questions_path: Path, overrides: Sequence[str] = ()) -> str:
    """Counts by task and by reason, and three examples of each reason, as text.

    Raises:
        UserError: a file is damaged, the pool belongs to other questions, or next to no answer can be used.
    """
    from rmsd_fast.teacher.pool import check_pool
    from rmsd_fast.teacher.scores import score_pool
    from rmsd_fast.teacher.summary import describe_pool, describe_questions, explain_reasons

    settings, questions, pool = _load(pool_path, questions_path, overrides)
    unanswered = set(check_pool(pool, questions, max_unanswered_share=settings.teacher.max_unanswered_share))
    answered = [question for question in questions if question.id not in unanswered]
    scores = score_pool(pool, answered, settings.teacher)
    summary = describe_questions(questions, [])
    summary += describe_pool(answered, pool, scores, sorted(unanswered), settings)
    examples: dict[str, list[str]] = defaultdict(list)
    for question in answered:
        for answer, response in zip(scores[question.id], pool[question.id], strict=False):
            if answer.reason and len(examples[answer.reason]) < EXAMPLES:
                examples[answer.reason].append(f"    {question.id} k={answer.k}: {_short(response.text)}")
    lines = [summary.text()]
    for explained in explain_reasons(list(examples)):
        reason = explained.split(":")[0].strip()
        lines += [explained, *examples[reason]]
    return "\n".join(lines)


def repair(pool_path: Path, questions_path: Path, output: Path, overrides: Sequence[str] = ()) -> str:
    """Write a pool whose clear answers are in canonical form, the text as sent beside each; says what was done.

    Answers that stay invalid are kept as they are, with their reason. Answers to questions that the file does not have
    are left alone.
    """
    from rmsd_fast.config import SettingsError
    from rmsd_fast.teacher.pool import write_pool
    from rmsd_fast.teacher.scores import score_response

    settings, questions, pool = _load(pool_path, questions_path, overrides)
    if output.exists() and output.resolve() == pool_path.resolve():
        raise SettingsError(f"--output {output}: expected another file than the pool, which stays as it is")
    by_id = {question.id: question for question in questions}
    repaired, rewritten, invalid, foreign = [], 0, 0, 0
    for identity, responses in pool.items():
        for response in responses:
            if identity not in by_id:
                foreign += 1
                repaired.append(response)
                continue
            # The text as sent, also where the pool was repaired before.
            sent = replace(response, text=response.raw if response.raw is not None else response.text)
            answer = score_response(sent, by_id[identity], settings.teacher)
            changed = answer.text != sent.text
            rewritten, invalid = rewritten + changed, invalid + (not answer.valid)
            raw = sent.text if changed else None
            quality = answer.quality if by_id[identity].answer is not None else None
            repaired.append(
                replace(sent, text=answer.text, raw=raw, reason=answer.reason, valid=answer.valid, quality=quality)
            )
    write_pool(output, repaired)
    alone = f", {foreign:,} to questions that {questions_path} lacks left alone" if foreign else ""
    return f"{output}: {len(repaired):,} answers, {rewritten:,} brought into canonical form, {invalid:,} invalid{alone}"


def _load(pool_path: Path, questions_path: Path, overrides: Sequence[str]):
    from rmsd_fast.data.records import load_questions
    from rmsd_fast.settings import load_settings
    from rmsd_fast.teacher.pool import load_pool

    settings = load_settings("", overrides)
    data = settings.data
    questions = load_questions(
        questions_path,
        media_root=data.media_root,
        format=data.format,
        task_type=data.task_type,
        follow_symlinks=data.follow_symlinks,
    )
    return settings, questions, load_pool(pool_path)


def _short(text: str) -> str:
    shown = repr(text)
    return (
        shown
        if len(shown) <= SHOWN_CHARACTERS
        else f"{shown[: SHOWN_CHARACTERS // 2]} … {shown[-SHOWN_CHARACTERS // 2 :]}"
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rmsd_fast.pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("check", "counts by task and by reason, with examples"),
        ("repair", "write a pool with canonical texts, each text as sent beside it under `raw`"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("pool", type=Path, help="teacher answers, JSONL")
        command.add_argument("questions", type=Path, help="the questions that they answer")
        command.add_argument(
            "overrides", nargs="*", metavar="section.field=value", help="settings, e.g. teacher.parse=strict"
        )
        if name == "repair":
            command.add_argument("--output", type=Path, required=True, help="pool to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
