"""Summarize the training data of a run: questions, teacher answers, and why some of them cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rmsd_fast.config import RunConfig, TeacherConfig
from rmsd_fast.data.errors import counted
from rmsd_fast.data.option_lists import find_options
from rmsd_fast.data.preprocess import Preprocessor, frame_rule
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.records import Question
from rmsd_fast.data.task_types import looks_closed
from rmsd_fast.method.answers import ALL_TASKS
from rmsd_fast.method.finish_reasons import finish_reason_of, is_known
from rmsd_fast.method.natural import REASONS
from rmsd_fast.teacher.pool import ADAPTIVE, HINTED
from rmsd_fast.teacher.scores import Pool, used_responses

# Below this share of valid answers, something is wrong with the pool as a whole.
LEAST_VALID = 0.05
SHOWN_IDS, SHOWN_NAMES, SHOWN_COUNTS = 5, 3, 4
# Warn if more than this share of a file's questions are named `open` but have an answer like that of a closed question.
CLOSED_SHARE = 0.05


@dataclass
class Summary:
    """Lines of a summary, warnings about probable mistakes, and errors that prevent a run from starting."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __add__(self, other: Summary) -> Summary:
        return Summary(self.lines + other.lines, self.warnings + other.warnings, self.faults + other.faults)

    def text(self) -> str:
        return "\n".join([*self.lines, *(f"WARNING: {warning}" for warning in self.warnings)])


def describe_questions(train: Sequence[Question], heldout: Sequence[Question]) -> Summary:
    """Describe questions by task type, the first prompt, and probable mistakes in them."""
    summary = Summary([f"questions: {_counts_by_task(train)}"])
    if heldout:
        summary.lines.append(f"held out: {_counts_by_task(heldout)}")
    for role, questions in (("training", train), ("held-out", heldout)):
        summary.lines += _ids_by_position(role, questions)
    shown = question_text(train[0]).replace("\n", "\n  | ")
    summary.lines.append(f"the user's turn, also for a teacher (question {train[0].id!r}):\n  | {shown}")
    if all(question.task_type == "open" for question in train):
        todo = "give the records another task_type and an answer"
        if any("inferred" in question.meta for question in train):
            todo = "name their task type in data.task_type, or in the records, with an answer"
        summary.warnings.append(
            "every question is `open`: any text in the right format scores 1, so neither teacher quality nor the "
            f"content reward carries information; {todo}"
        )
    for role, questions in (("training", train), ("held-out", heldout)):
        summary.warnings += _closed_answers(role, questions)
    summary.warnings += _overlaps(train, heldout)
    return summary


def _ids_by_position(role: str, questions: Sequence[Question]) -> list[str]:
    """Warn about questions whose id depends on the order of their file, which a pool without keys cannot detect."""
    ids = [question.id for question in questions if "id_by_position" in question.meta]
    if not ids:
        return []
    return [
        f"ids of {counted(len(ids), f'{role} question')} come from their positions in the file ({some_ids(ids)}): "
        "give each an `id` before the order changes"
    ]


def _closed_answers(role: str, questions: Sequence[Question]) -> list[str]:
    """Warn about open questions that look closed by their answers, separately for inferred and specified types."""
    answered = [question for question in questions if question.task_type == "open" and question.answer]
    closed = [q for q in answered if looks_closed(q.answer) or ("inferred" in q.meta and find_options(q.question))]
    inferred = [question for question in closed if "inferred" in question.meta]
    named = [question for question in closed if "inferred" not in question.meta]
    warnings = []
    if inferred:
        warnings.append(
            f"{counted(len(inferred), f'{role} question')} without a task type became `open`, with options or an "
            f"answer like those of a closed question ({inferred[0].id}: {inferred[0].answer!r:.60}): any text in the "
            "right format scores 1; name the task type in the records (mcq with options) or in data.task_type"
        )
    if len(named) > CLOSED_SHARE * len(questions):
        warnings.append(
            f"{counted(len(named), f'open {role} question')} with an answer like that of a closed question "
            f"({named[0].id}: {named[0].answer!r:.60}). No response is compared with it: any text in the right format "
            "scores 1; make them mcq (with options), numeric or ocr"
        )
    return warnings


def describe_pool(
    questions: Sequence[Question], pool: Pool, statistics: dict, unanswered: Sequence[str], settings: RunConfig
) -> Summary:
    """Describe teacher answers by task type: how many there are, how many can be used, and why the others cannot.

    Args:
        questions: the questions to train on.
        pool: all answers.
        statistics: result of pool_statistics for the answers that are used.
        unanswered: ids of questions that are left out because the pool has no answer to them.
    Returns:
        The summary. It contains an error if almost no answer can be used.
    """
    cfg = settings.teacher
    every = statistics["all"]
    used = [response for question in questions for response in used_responses(pool[question.id], cfg)]
    names = sorted({response.model for response in used if response.model})
    named = f" of {', '.join(names[:SHOWN_NAMES])}{', …' if len(names) > SHOWN_NAMES else ''}" if names else ""
    by_number = sorted(Counter(len(pool[question.id]) for question in questions).items(), reverse=True)
    counts = [f"{counted(number, 'question')} {'has' if number == 1 else 'have'} {k}" for k, number in by_number]
    counts = counts[:SHOWN_COUNTS] + (["…"] if len(counts) > SHOWN_COUNTS else [])
    summary = Summary(
        [
            f"teacher: {counted(every['responses'], 'answer')}{named}, up to K={cfg.responses} of each question "
            f"({', '.join(counts)}), read with teacher.parse={cfg.parse}",
            *_table(statistics),
            "  as sent: in the format before rewriting; T_best: questions with an answer of quality above 0, "
            "before the filter",
        ]
    )
    if every["unlabeled"]:
        summary.lines.append(
            f"  without ground truth: {counted(every['unlabeled'], 'closed question')}; the quality of their answers "
            "is agreement with the other valid answers, and their rollouts get no content reward"
        )
    if unanswered:
        left_out = counted(len(unanswered), "question")
        summary.lines.append(f"  left out: {left_out} without an answer ({some_ids(unanswered)})")
    summary.lines += _unused(questions, pool, cfg)
    summary += _endings([response.finish_reason for response in used])
    if every["valid_share"] < LEAST_VALID or not every["best_share"]:
        nothing = "no answer is correct" + (" or agrees with another" if every["unlabeled"] else "")
        summary.faults.append(
            f"teacher pool: {every['valid_share']:.1%} of {counted(every['responses'], 'answer')} are valid, and "
            f"{every['best_share']:.1%} of the questions have one of quality above 0: expected most in both cases. "
            f"Reasons: {_reasons(every) or nothing}{_advice(cfg.parse)}"
        )
        return summary
    if every["reasoned_share"] < 0.5:
        summary.warnings.append(
            f"{1 - every['reasoned_share']:.0%} of the valid answers have no reasoning: a student that imitates them "
            "learns to answer without any; ask the teacher for <think>…</think>, or put its reasoning into `text`, as "
            "<think>…</think> before the answer"
        )
    for task, group in statistics["tasks"].items():
        if group and group["valid_share"] < 0.5:
            summary.warnings.append(
                f"only {group['valid_share']:.0%} of the teacher's {task} answers are valid "
                f"({_reasons(group)}){_advice(cfg.parse)}"
            )
        elif group and group["best_share"] < 0.5:
            summary.warnings.append(
                f"only {group['best_share']:.0%} of the {task} questions have an answer of quality above 0, which "
                "stage 1 could imitate; check that the pool belongs to these questions, and that the ground truth has "
                "the teacher's units"
            )
    return summary


def describe_frames(
    questions: Sequence[Question], pool: Pool, settings: RunConfig, family: str | None = Preprocessor.family
) -> Summary:
    """Warn about answers to other frames than the student sees. Only pools of `rmsd_fast.collect` store frames.

    `family` is the student's `Preprocessor.family`. If it is None, because the model has not been downloaded yet,
    families are not compared.
    """
    summary = Summary()
    used = [response for question in questions for response in used_responses(pool[question.id], settings.teacher)]
    rules = [response.sampling.get("frames") for response in used]
    ours = frame_rule(settings.video) if family is None else frame_rule(settings.video, family)
    if whole := sum(isinstance(rule, str) for rule in rules):
        summary.lines.append(f"  whole videos: {counted(whole, 'answer')} to frames that the server chose")
    theirs = [rule for rule in rules if isinstance(rule, dict)]
    seen = theirs if family else [{name: rule[name] for name in rule if name != "family"} for rule in theirs]
    differ = [rule for rule in seen if rule != ours]
    if differ:
        then, now = map(_frames, (differ[0], ours))
        summary.warnings.append(
            f"{counted(len(differ), 'answer')} of the teacher to frames that the student does not see (the teacher saw "
            f"{then}, the student sees {now}): an answer may name what the student cannot see; use the same settings, "
            "or collect the answers again"
        )
    return summary


def _frames(rule: Mapping[str, Any]) -> str:
    """Return the settings of a rule of `frame_rule`, and the family of the student for which it chose frames."""
    named = [f"video.{name}={value}" for name, value in rule.items() if name != "family"]
    return ", ".join(named) + (f" for a student of the family {rule['family']}" if "family" in rule else "")


def _unused(questions: Sequence[Question], pool: Pool, cfg: TeacherConfig) -> list[str]:
    """Return lines about answers in the pool that a run or its statistics do not use."""
    asked = {question.id for question in questions}
    foreign = [identity for identity in pool if identity not in asked]
    all_answers = [response for identity in asked for response in pool[identity]]
    used = [response for identity in asked for response in used_responses(pool[identity], cfg)]
    hinted = 0 if cfg.hinted else sum(response.is_hinted for response in all_answers)
    beyond = len(all_answers) - len(used) - hinted
    lines = []
    if foreign:
        answers = counted(sum(len(pool[identity]) for identity in foreign), "answer")
        lines.append(f"  not used: {answers} to ids that no question has ({some_ids(foreign)})")
    for mark, what in ((ADAPTIVE, "drawn adaptively"), (HINTED, "with the ground truth as a hint")):
        if marked := sum(bool(response.sampling.get(mark)) for response in used):
            lines.append(f"  not in these statistics: {counted(marked, 'answer')} {what}")
    if beyond:
        lines.append(f"  not used: {counted(beyond, 'answer')} after the first {cfg.responses} (teacher.responses)")
    if hinted:
        lines.append(f"  not used: {counted(hinted, 'answer')} with the ground truth as a hint (teacher.hinted)")
    return lines


def _endings(words: Sequence[str | None]) -> Summary:
    """Return lines and warnings about answers whose `finish_reason` does not show whether they were truncated."""
    summary = Summary()
    if missing := sum(is_known(word) and finish_reason_of(word) is None for word in words):
        summary.lines.append(f"  no finish_reason: {counted(missing, 'answer')}; truncation may go undetected")
    unknown = Counter(word for word in words if not is_known(word))
    if unknown:
        named = ", ".join(f"{word!r:.40} {number:,}" for word, number in unknown.most_common(SHOWN_NAMES))
        summary.warnings.append(
            f"finish_reason of {counted(unknown.total(), 'answer')} is unknown ({named}"
            f"{', …' if len(unknown) > SHOWN_NAMES else ''}): truncation is not detected; write stop, length or "
            "content_filter"
        )
    return summary


def _advice(parse: str) -> str:
    return "; teacher.parse=natural reads answers in other forms" if parse == "strict" else ""


def some_ids(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN_IDS]) + (", …" if len(ids) > SHOWN_IDS else "")


def _counts_by_task(questions: Sequence[Question]) -> str:
    counts = Counter(question.task_type for question in questions)
    parts = [f"{task} {counts[task]:,}" for task in ALL_TASKS if counts[task]]
    inferred = sum("inferred" in question.meta for question in questions)
    by_answer = f"; the task types of {inferred:,} were inferred from options and answers" if inferred else ""
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
    """Return text such as `refusal 12, two_answers 3`; REASONS explains the names."""
    reasons = list(group["reasons"].items())
    more = sum(count for _, count in reasons[shown:])
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons[:shown]) + (f", other {more:,}" if more else "")


def explain_reasons(reasons: Sequence[str]) -> dict[str, str]:
    """Return one line for each reason, in the order of REASONS."""
    return {reason: f"  {reason}: {text}" for reason, text in REASONS.items() if reason in reasons}


def _overlaps(train: Sequence[Question], heldout: Sequence[Question]) -> list[str]:
    """Warn about held-out questions that are also training questions or share media with them."""
    asked = {_content(question) for question in train}
    media = {path for question in train for path in (*question.videos, *question.images)}
    same = [question.id for question in heldout if _content(question) in asked]
    shared = [
        question.id
        for question in heldout
        if _content(question) not in asked and media & {*question.videos, *question.images}
    ]
    total = f"{len(heldout):,}"
    warnings = []
    if same:
        warnings.append(
            f"held-out questions that are also training questions: {len(same):,} of {total} ({some_ids(same)}); scores "
            "on them say nothing about new questions; remove them from one of the two files"
        )
    if shared:
        warnings.append(
            f"held-out questions about the media of training questions: {len(shared):,} of {total} "
            f"({some_ids(shared)}); scores on them may be better than on new videos"
        )
    return warnings


def _content(question: Question) -> tuple:
    return question.question, question.options, question.videos, question.images, question.spans
