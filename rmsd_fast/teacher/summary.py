"""What a run is about to train on, in words: questions, teacher answers and why some of them cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rmsd_fast.config import RunConfig
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.records import DataError, Question
from rmsd_fast.method.answers import TASK_TYPES
from rmsd_fast.method.natural import REASONS
from rmsd_fast.teacher.diagnostics import pool_statistics
from rmsd_fast.teacher.scores import Pool, Scores

# Below this share of valid answers something is wrong with the pool as a whole.
LEAST_VALID = 0.05
SHOWN_IDS = 5
# Open questions with so short an answer look like closed ones; above this share of all questions it is said.
SHORT_WORDS, SHORT_SHARE = 2, 0.05


@dataclass
class Summary:
    """lines: what there is. warnings: what is probably not meant."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __add__(self, other: Summary) -> Summary:
        return Summary(self.lines + other.lines, self.warnings + other.warnings)

    def text(self) -> str:
        return "\n".join([*self.lines, *(f"WARNING: {warning}" for warning in self.warnings)])


def describe_questions(train: Sequence[Question], heldout: Sequence[Question]) -> Summary:
    """Questions by task type, the first prompt, and what looks wrong about them."""
    summary = Summary([f"questions: {_by_task(train)}"])
    if heldout:
        summary.lines.append(f"held out: {_by_task(heldout)}")
    shown = question_text(train[0]).replace("\n", "\n  | ")
    summary.lines.append(f"the user's turn, for a teacher too (question {train[0].id!r}):\n  | {shown}")
    if all(question.task_type == "open" for question in train):
        summary.warnings.append(
            "every question is `open`: any text that keeps the format scores 1, so neither teacher quality nor the "
            "content reward says anything; give the records a task_type and an answer, or set data.task_type"
        )
    short = [q for q in train if q.task_type == "open" and q.answer and len(q.answer.split()) <= SHORT_WORDS]
    if len(short) > SHORT_SHARE * len(train):
        summary.warnings.append(
            f"{len(short):,} open questions have an answer of one or two words ({short[0].id}: {short[0].answer!r}), "
            "which nothing is compared with: any text in the format scores 1; make them mcq (with options) or ocr"
        )
    summary.warnings += _overlaps(train, heldout)
    return summary


def describe_pool(
    questions: Sequence[Question], pool: Pool, scores: Scores, unanswered: Sequence[str], settings: RunConfig
) -> Summary:
    """Teacher answers by task type: how many, how many of use, and why the others are not.

    Args:
        questions: those that are trained on.
        scores: of their answers, from score_pool.
        unanswered: ids of questions that are left out because the pool has no answer to them.
    Raises:
        DataError: next to no answer can be used.
    """
    cfg = settings.teacher
    statistics = pool_statistics(scores, questions, cfg, simulated=False)
    every = statistics["all"]
    names = sorted({response.model for question in questions for response in pool[question.id] if response.model})
    found = Counter(len(pool[question.id]) for question in questions)
    counts = ", ".join(f"{number:,} have {k}" for k, number in sorted(found.items(), reverse=True))
    lines = [
        f"teacher: {every['responses']:,} answers{' of ' + ', '.join(names[:3]) if names else ''}, "
        f"K={cfg.responses} asked: {counts}, read with teacher.parse={cfg.parse}",
        *_table(statistics),
    ]
    if unanswered:
        many = "question" if len(unanswered) == 1 else "questions"
        lines.append(f"  left out: {len(unanswered):,} {many} without an answer ({some_ids(unanswered)})")
    if every["valid_share"] < LEAST_VALID or not every["best_share"]:
        raise DataError(
            f"teacher pool: {every['valid_share']:.1%} of {every['responses']} answers are valid, and "
            f"{every['best_share']:.1%} of the questions have one of quality above 0: expected most. "
            f"Reasons: {_reasons(every) or 'none is right'}. {_advice(cfg.parse)}\n" + "\n".join(lines)
        )
    warnings = []
    if every["valid_share"] < 0.5:
        warnings.append(
            f"only {every['valid_share']:.0%} of the teacher's answers are valid ({_reasons(every)}); "
            + _advice(cfg.parse)
        )
    if every["best_share"] < 0.5:
        warnings.append(
            f"only {every['best_share']:.0%} of the questions have an answer of quality above 0, which stage 1 could "
            "imitate; is the pool that of these questions, and does the ground truth have the teacher's units?"
        )
    return Summary(lines, warnings)


def _advice(parse: str) -> str:
    advice = "`python -m rmsd_fast.pool check POOL QUESTIONS` shows examples"
    return advice + ("; teacher.parse=natural reads answers in other forms" if parse == "strict" else "")


def some_ids(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN_IDS]) + (", …" if len(ids) > SHOWN_IDS else "")


def _by_task(questions: Sequence[Question]) -> str:
    counts = Counter(question.task_type for question in questions)
    parts = [f"{task} {counts[task]:,}" for task in TASK_TYPES if counts[task]]
    inferred = sum("inferred" in question.meta for question in questions)
    by_answer = f"; the task types of {inferred:,} were found by their answers" if inferred else ""
    return f"{len(questions):,} ({', '.join(parts)}){by_answer}"


def _table(statistics: dict) -> list[str]:
    rows = [("task", "questions", "answers", "valid", "as sent", "T_best", "why not")]
    groups = list(statistics["tasks"].items())
    groups += [("all", statistics["all"])] if len(groups) > 1 else []
    for task, group in groups:
        if group is None:
            continue
        shares = [f"{group[name]:.1%}" for name in ("valid_share", "as_sent_share", "best_share")]
        rows.append((task, f"{group['questions']:,}", f"{group['responses']:,}", *shares, _reasons(group, 3)))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in range(1, 6)), row[6]]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _reasons(group: dict, shown: int = 5) -> str:
    """`refusal 12, two_answers 3`; REASONS says what they mean."""
    reasons = list(group["reasons"].items())
    more = sum(count for _, count in reasons[shown:])
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons[:shown]) + (f", other {more:,}" if more else "")


def explain_reasons(reasons: Sequence[str]) -> list[str]:
    """One line for each reason, in the order of REASONS."""
    return [f"  {reason}: {text}" for reason, text in REASONS.items() if reason in reasons]


def _overlaps(train: Sequence[Question], heldout: Sequence[Question]) -> list[str]:
    """Held-out questions, or their media, that are trained on."""
    asked = {_content(question) for question in train}
    same = [question.id for question in heldout if _content(question) in asked]
    if same:
        return [
            f"{len(same):,} of {len(heldout):,} held-out questions are trained on too ({some_ids(same)}): scores on "
            "them say nothing about new questions; remove them from one of the two files"
        ]
    media = {path for question in train for path in (*question.videos, *question.images)}
    shared = [question.id for question in heldout if media & {*question.videos, *question.images}]
    if shared:
        return [
            f"{len(shared):,} of {len(heldout):,} held-out questions are about media that are trained on "
            f"({some_ids(shared)}): scores on them may be better than on new videos"
        ]
    return []


def _content(question: Question) -> tuple:
    return question.question, question.options, question.videos, question.images, question.spans
