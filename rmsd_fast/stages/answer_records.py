"""Score the answers to held-out questions: strictly and leniently, greedy and sampled, with the cluster of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from operator import itemgetter

from rmsd_fast.config import BENCHMARKS, RunConfig
from rmsd_fast.data.marks import MARK
from rmsd_fast.data.records import Question, groups_of
from rmsd_fast.made.meaning import has_content, meaning_score
from rmsd_fast.method.answers import GRADED_TASKS, ParsedAnswer, parse_answer
from rmsd_fast.method.lenient import lenient_response
from rmsd_fast.method.quality import exact_match, fold_text, quality_score
from rmsd_fast.stages.judge import is_judged, rules_decide
from rmsd_fast.teacher.scores import quality_settings

# Why a question could not be answered, and the words of messages.
REASONS = {
    "missing_media": "media files are missing",
    "unreadable_media": "media files cannot be used",
    "prompt_too_long": "prompts are longer than data.max_prompt_tokens",
    "refused_question": "questions were refused",
    "not_finite": "the student's logits were not finite",
}
NOT_FINITE = "the student's logits are not finite"


def clusters_of(questions: Sequence[Question]) -> dict[str, str]:
    """Return the cluster of each question by its id.

    It is the text `meta["cluster"]` after the name of the benchmark and a colon, which no absolute path begins with.
    Without that text, it is the path of a medium, or the id of a question about text alone. Questions that share a
    medium are then in one cluster, also if they share it only through other questions.
    """
    parents: dict[str, str] = {}

    def root(path: str) -> str:
        while parents.setdefault(path, path) != path:
            parents[path] = path = parents[parents[path]]
        return path

    clusters: dict[str, str] = {}
    by_media = []
    for question in questions:
        named = question.meta.get("cluster")
        if isinstance(named, str) and named:
            clusters[question.id] = f"{question.meta.get('benchmark') or 'cluster'}:{named}"
            continue
        by_media.append(question)
        paths = [path for _, path, _ in question.media]
        for path in paths[1:]:
            parents[root(path)] = root(paths[0])
    return clusters | {q.id: root(q.media[0][1]) if q.media else q.id for q in by_media}


def reason_of(error: str, *, of_prompt: bool = False) -> str:
    """Return the key of REASONS for the error text of a question.

    Args:
        error: text of a MediaError or PromptError, or NOT_FINITE.
        of_prompt: whether the error is a PromptError.
    """
    if error == NOT_FINITE:
        return "not_finite"
    if "exceeds data.max_prompt_tokens" in error:
        return "prompt_too_long"
    if of_prompt:
        return "refused_question"
    return "missing_media" if "no such file" in error else "unreadable_media"


def asked_hash(question: Question) -> str:
    """Return a short hash of a question's task type, text, options and answer, without white space and marks of media.

    Ids of different benchmarks may be equal, and an annotation may be corrected; with this hash, only answers to the
    same question are compared. Paths are not part of it, because they differ between machines, and marks are not,
    because a question that is asked without its video has none.
    """
    asked = (question.task_type, question.question, *(question.options or ()), str(question.answer))
    text = json.dumps([" ".join(MARK.sub(" ", part).split()) for part in asked])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def answer_record(
    question: Question,
    cluster: str,
    response: str,
    settings: RunConfig,
    *,
    truncated: bool = False,
    error: str = "",
    reason: str | None = None,
) -> dict:
    """Return the record of a greedy answer, in JSON types only.

    If the field scores such answers with a language model, `decided` says whether rules can do so for sure.

    Args:
        question: the question.
        cluster: its cluster; see `clusters_of`.
        response: the text of the answer.
        settings: settings of the run.
        truncated: whether the response was truncated.
        error: why the question was not answered. Text generated before the error is not an answer.
        reason: key of REASONS; None finds it in the error's text.
    """
    record = {"id": question.id, "asked_hash": asked_hash(question), "task_type": question.task_type}
    record["cluster"] = cluster
    if groups := groups_of(question):
        record["groups"] = groups
    if question.meta.get("benchmark") in BENCHMARKS:
        record["benchmark"] = question.meta["benchmark"]
    record["response"] = response
    if error:
        nothing = {"score": 0.0, "strict": 0.0, "lenient": 0.0, "valid": False, "readable": False}
        meaning = {"meaning": 0.0} if _has_meaning(question) else {}
        return {
            **record,
            **nothing,
            "truncated": truncated,
            "error": error,
            "reason": reason or reason_of(error),
            **meaning,
        }
    scores, _ = score_response(question, response, settings, truncated=truncated)
    if is_judged(question):
        read = lenient_response(response, question.task_type, options=question.options, truncated=truncated)
        scores["decided"] = rules_decide(question, response, read)
    return {**record, **scores}


def score_response(
    question: Question, response: str, settings: RunConfig, *, truncated: bool
) -> tuple[dict, ParsedAnswer | None]:
    """Return the scores of a response by name, and its parsed answer as read by `evaluate.parse`."""
    task, options = question.task_type, question.options
    lenient_text = lenient_response(response, task, options=options, truncated=truncated)
    texts = {"strict": response, "lenient": lenient_text or response}
    quality = quality_settings(settings.teacher)
    scores = {
        name: quality_score(text, task, question.answer, options=options, **quality) for name, text in texts.items()
    }
    valid = parse_answer(response, task, options) is not None
    answer = parse_answer(texts[settings.evaluate.parse], task, options)
    record = {
        "score": scores[settings.evaluate.parse],
        **scores,
        # Whether the format is followed is a result of its own, regardless of the reading.
        "valid": valid,
        "readable": valid or lenient_text is not None,
        "truncated": truncated,
    }
    if _has_meaning(question):
        record["meaning"] = 0.0 if answer is None else meaning_score(answer, question.meta["made"])
    return record, answer


def with_samples(
    record: dict,
    question: Question,
    responses: Sequence[tuple[str, bool, bool]],
    settings: RunConfig,
    ranks: Sequence[float | None] | None = None,
) -> dict:
    """Return the record of a greedy answer with those of sampled ones.

    `sampled` is their mean score. For closed questions, `samples` has the scores of each, and the answer that
    `evaluate.parse` reads, as text (see `votes_of`) or null, for majority votes. With a reranker, it also has the
    reranker's scores, and `best_response` is the text with the highest one.

    Args:
        record: result of `answer_record`.
        question: the question.
        responses: (text, whether it was truncated, whether all logits were finite) of each sampled response.
        settings: settings of the run.
        ranks: the reranker's score of each response to a closed question, None for one whose logits were not finite.
    """
    nothing = {"score": 0.0, "strict": 0.0, "lenient": 0.0, "meaning": 0.0}
    scores, answers = [], []
    for text, truncated, finite in responses:
        scored, answer = score_response(question, text, settings, truncated=truncated) if finite else (nothing, None)
        scores.append(scored)
        answers.append(answer)
    samples = {name: [scored[name] for scored in scores] for name in ("score", "strict", "lenient")}
    result = {**record, "sampled": _mean([scored["score"] for scored in scores])}
    if "meaning" in record:
        result["sampled_meaning"] = _mean([scored["meaning"] for scored in scores])
    if question.task_type in GRADED_TASKS:
        result["samples"] = {**samples, "answers": votes_of(answers, question.task_type)}
        if ranks is not None:
            result["samples"]["reranker"] = list(ranks)
            ranked = [(rank, text) for rank, (text, _, _) in zip(ranks, responses, strict=True) if rank is not None]
            result["best_response"] = max(ranked, key=itemgetter(0))[1] if ranked else ""
    return result


def without_samples(record: dict, question: Question, settings: RunConfig) -> dict:
    """Return the record of a question that could not be used, with scores 0 of its sampled responses."""
    count = settings.evaluate.rollouts
    if not count:
        return record
    ranks = [None] * count if settings.evaluate.reranker else None
    return with_samples(record, question, [("", False, False)] * count, settings, ranks)


def votes_of(answers: Sequence[ParsedAnswer | None], task: str) -> list[str | None]:
    """Return answers to one question as texts for a majority vote, equal if the metric does not distinguish them.

    Two `exact` answers are equal if each is right with the other as reference, such as "3" and "3.0", and both are
    then the first of them.
    """
    votes: list[str | None] = []
    for answer in answers:
        if answer is None:
            votes.append(None)
        elif task == "exact":
            equal = (v for v in votes if v is not None and exact_match(str(answer), v) == exact_match(v, answer) == 1)
            votes.append(next(equal, str(answer)))
        elif isinstance(answer, dict):
            # The metric ignores the order of seconds, and that of the boxes of a second.
            votes.append(json.dumps({second: sorted(boxes) for second, boxes in answer.items()}, sort_keys=True))
        elif task == "ocr":
            votes.append(fold_text(str(answer)))
        else:
            votes.append(answer if isinstance(answer, str) else json.dumps(answer))
    return votes


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 6)


def _has_meaning(question: Question) -> bool:
    """Return whether the meaning of an answer can be scored: an open question about a generated clip."""
    return question.task_type == "open" and has_content(question)
