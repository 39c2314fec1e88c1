"""Turn the numbers of a pool into recommendations with reasons, and list what a pool cannot show.

The rules are conservative: a setting departs from the paper's default only if the interval over questions supports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.errors import counted

PAPER_K, PAPER_TAU = TeacherConfig.responses, TeacherConfig.min_quality
# Doubling K pays if it raises the expected quality of the best answer by this much.
LEAST_GAIN = 0.01
# The paper's students became worse when tau kept fewer than half of the answers (45% at tau = 0.5).
LEAST_KEPT = 0.5
LOWER_TAUS = (0.2, 0.1, 0.0)
# Questions without a kept answer: the alarm of training (runtime.alarms) has the same limit.
MOST_EMPTY = 0.3
LEAST_VALID, MOST_REPEATED = 0.9, 0.05
# With fewer questions, an interval for a share near a half is wider than ±0.14. The bootstrap of a share near 0 or 1
# may have no width at all, although an error that no question shows may occur in more than 6% of them.
LEAST_QUESTIONS = 50
# Agreement can stand in for labels if at least this share of the answers that it keeps would also pass with labels.
LEAST_PRECISION = 0.9

UNKNOWN = (
    "The quality of the student. The discriminator raises it only while it is below the values above. A run prints the "
    "student's own quality next to them before stage 2 (the forecast, forecast.json).",
    "Whether a higher tau, a larger K or another weighting gives a better student. Only training shows this; "
    "rmsd_fast.lab compares settings over several seeds.",
    "The quality of answers to open questions. They have no metric, and any valid answer counts as 1.",
    "Whether a right answer comes from right reasoning. The best of many mcq answers may be a lucky guess.",
    "Whether the ground truths are right. A wrong ground truth looks like a wrong answer.",
    "Answers that are too long for micro_tokens, or that do not fit the student's chat template. A run finds them when "
    "it tokenizes them.",
)


class Advice(NamedTuple):
    """One recommendation: what it is about, the recommended value ("" if it is not a setting), and the reason."""

    subject: str
    value: str
    reason: str


def advise(analysis: Mapping[str, Any]) -> list[Advice]:
    """Return recommendations for a pool.

    Args:
        analysis: result of pool_analysis.analyze_pool.
    """
    return [
        *_few_questions(analysis),
        _k_advice(analysis),
        _tau_advice(analysis),
        _weight_advice(analysis),
        *_agreement_advice(analysis),
        *_answer_advice(analysis),
    ]


def plain(value: float) -> str:
    """Return a quality with three decimals, and with a sign that every font has."""
    return f"{value:.3f}".replace("-", "−")


def percent_with_interval(estimated: Mapping[str, Any]) -> str:
    """Return `12.3% [10.0, 14.5]`, or the percentage alone if there is no interval."""
    value = estimated["mean"] if "mean" in estimated else estimated["value"]
    if estimated["low"] is None:
        return f"{100 * value:.1f}%"
    return f"{100 * value:.1f}% [{100 * estimated['low']:.1f}, {100 * estimated['high']:.1f}]"


def with_interval(estimated: Mapping[str, Any], *, sign: bool = False) -> str:
    """Return `0.123 [0.100, 0.145]`, or the value alone if there is no interval."""
    value = estimated["mean"] if "mean" in estimated else estimated["value"]
    shown = [
        f"{v:{'+' if sign else ''}.3f}".replace("-", "−")
        for v in (value, estimated["low"], estimated["high"])
        if v is not None
    ]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else shown[0]


def _few_questions(analysis: Mapping[str, Any]) -> list[Advice]:
    """Return a warning if a recommendation, or the numbers of a task type, come from too few questions."""
    means, best, gain, check = (analysis[key] for key in ("means", "best_of", "stage2", "agreement"))
    used = {
        "K": best and best["groups"]["closed"]["questions"],
        "tau": next((means[name]["n"] for name in ("closed", "unlabeled") if name in means), None),
        "weights": gain and gain["closed"]["questions"],
        "agreement": check and check["closed"]["questions"],
    }
    few = {subject: n for subject, n in used.items() if n is not None and n < LEAST_QUESTIONS}
    tasks = {task: group["n"] for task, group in means.items() if group["n"] < LEAST_QUESTIONS}
    by_task = ", ".join(f"{task} {n}" for task, n in tasks.items() if task not in ("closed", "unlabeled"))
    reasons = []
    if few:
        n = min(few.values())
        half_width = 1.96 * 0.5 / n**0.5
        # The share of errors for which no error among n questions has a probability of 5%.
        unseen = 1 - 0.05 ** (1 / n)
        reasons.append(
            f"These recommendations come from fewer than {LEAST_QUESTIONS} questions: "
            f"{', '.join(f'{subject} {count}' for subject, count in few.items())}. With {counted(n, 'question')}, a "
            f"share near a half is known only to ±{100 * half_width:.0f} percentage points, and an error that no "
            f"question shows may still occur in {unseen:.0%} of them. Add questions"
            f"{' with ground truth' if 'closed' in means else ''} before you rely on this advice."
        )
    if by_task:
        reasons.append(f"Numbers by task type come from fewer than {LEAST_QUESTIONS} questions for: {by_task}.")
    return [Advice("too few questions" if few else "few questions", "", " ".join(reasons))] if reasons else []


def _k_advice(analysis: Mapping[str, Any]) -> Advice:
    subject = "K (collect.k)"
    best = analysis["best_of"]
    if best is None:
        return Advice(
            subject,
            str(PAPER_K),
            "This is the paper's value. The pool says nothing about K, because no question has a ground truth, and "
            "agreement cannot show which answer is best.",
        )
    if best["most"] == 1:
        return Advice(
            subject,
            str(PAPER_K),
            "This is the paper's value. Most questions have one answer, so the pool does not show what more answers "
            f"would add. Collect {2 * PAPER_K} answers to about 200 questions, and run this report on them.",
        )
    group = best["groups"]["closed"]
    quality = [point["mean"] for point in group["quality"]]
    if quality[-1] == 0:
        return Advice(
            subject, str(PAPER_K), "This is the paper's value. No answer has a quality above 0, so none is best."
        )
    pays = 1
    for step in group["steps"]:
        gain = f"from K = {step['from']} to {step['to']}, the expected best quality changes by "
        gain += with_interval(step, sign=True)
        if step["low"] is None or step["low"] < LEAST_GAIN:
            is_small = step["high"] is not None and step["high"] < LEAST_GAIN
            if not is_small:
                verdict = f"The pool does not show whether more answers pay: {gain}."
            elif best["most"] < PAPER_K:
                verdict = f"More answers may add little: {gain}, less than {LEAST_GAIN}."
            else:
                verdict = f"No need to collect more: {gain}, less than {LEAST_GAIN}."
            break
        pays = step["to"]
    else:
        more = max(2 * pays, PAPER_K)
        verdict = f"The last doubling pays: {gain}. The pool does not show whether {more} would pay; to find out, "
        verdict += f"collect {more} answers to about 200 questions."
    value = max(PAPER_K, pays)
    shown = min(value, best["most"])
    papers = "This is the paper's value. " if value == PAPER_K else ""
    reason = (
        f"{papers}The expected quality of one answer is {plain(quality[0])}, that of the best of {shown} is "
        f"{plain(quality[shown - 1])}. "
        f"{verdict}{_luck(best, shown)} Keep all answers that are already in the pool: K decides about further "
        "collecting."
    )
    return Advice(subject, str(value), reason)


def _luck(best: Mapping[str, Any], k: int) -> str:
    """Return a sentence about guessed options, if the pool has mcq questions with options."""
    chance = best["groups"].get("mcq", {}).get("chance")
    if not chance or k == 1:
        return ""
    return (
        f" In mcq, a part of this is luck: {k} random guesses contain the right option in {chance[k - 1]:.0%} of cases."
    )


def _tau_advice(analysis: Mapping[str, Any]) -> Advice:
    subject = "tau (teacher.min_quality)"
    groups, taus = analysis["kept"]["groups"], analysis["kept"]["tau"]
    name = "closed" if "closed" in groups else "unlabeled"
    if name not in groups:
        return Advice(
            subject, str(PAPER_TAU), "It has no effect: all questions are open, and every valid answer has quality 1."
        )
    kept = dict(zip(taus, groups[name]["answers"], strict=True))
    covered = dict(zip(taus, groups[name]["questions"], strict=True))
    measured = "agreement" if name == "unlabeled" else "quality"
    k = analysis["kept"]["responses"]
    at = (
        f"At {PAPER_TAU}, {kept[PAPER_TAU]:.0%} of the answers are kept, and {covered[PAPER_TAU]:.0%} of the questions "
    )
    at += f"have a kept one among K = {k}."
    if kept[0.0] == kept[1.0]:
        return Advice(subject, str(PAPER_TAU), f"{at} Any tau has the same effect, because every {measured} is 0 or 1.")
    empty = [
        task
        for task, shares in groups.items()
        if task != "closed" and 1 - dict(zip(taus, shares["questions"], strict=True))[PAPER_TAU] > MOST_EMPTY
    ]
    starved = (
        f" More than {MOST_EMPTY:.0%} of the questions have no kept answer in: {', '.join(empty)}." if empty else ""
    )
    most_kept = analysis["kept"]["at_default"][name]["high"]
    if kept[PAPER_TAU] < LEAST_KEPT and (most_kept is None or most_kept >= LEAST_KEPT):
        reason = f"{at} This is the paper's value. The pool has too few questions to show that it keeps too little."
        return Advice(subject, str(PAPER_TAU), reason + starved)
    if kept[PAPER_TAU] >= LEAST_KEPT:
        reason = (
            f"{at} This is the paper's value; its teacher kept 72%, and a tau that kept 45% made the student worse."
        )
        return Advice(subject, str(PAPER_TAU), reason + starved)
    for tau in LOWER_TAUS:
        if kept[tau] >= LEAST_KEPT:
            reason = f"{at} At {tau}, {kept[tau]:.0%} are kept. A tau that kept 45% made the paper's student worse."
            return Advice(subject, str(tau), reason + starved)
    reason = f"{at} No tau helps: {1 - kept[0.0]:.0%} of the answers have {measured} 0. Improve the answers first."
    return Advice(subject, str(PAPER_TAU), reason + starved)


def _weight_advice(analysis: Mapping[str, Any]) -> Advice:
    subject = "weights (teacher.weight_power)"
    gain = analysis["stage2"]
    if gain is None:
        return Advice(
            subject,
            "1",
            "This is the paper's value. No question has both a ground truth and a kept answer to measure it.",
        )
    closed = gain["closed"]
    more, base = closed["power_4-power_1"], closed["power_1"]
    reason = (
        f"With K = {gain['responses']} and tau = {gain['min_quality']:g}, the discriminator leads to a quality of "
        f"{with_interval(base)}; a random answer has {plain(closed['random']['mean'])}, the best of K "
        f"{plain(closed['best']['mean'])}. "
    )
    bound = more["high"] if more["high"] is not None else more["mean"]
    if bound < LEAST_GAIN:
        reason += (
            f"A power of 4 would add {plain(more['mean'])}, because the kept answers to a question are about equal."
        )
    else:
        reason += (
            f"A power of 4 would lead to {plain(closed['power_4']['mean'])} ({with_interval(more, sign=True)}). This "
            "is a limit for the discriminator, not a result of training. Raise the power if the forecast shows that "
            "the student is already near the value for 1."
        )
    return Advice(subject, "1", reason)


def _agreement_advice(analysis: Mapping[str, Any]) -> list[Advice]:
    """Return whether agreement can stand in for labels, if the pool has questions with ground truth to show it."""
    check = analysis["agreement"]
    unlabeled = analysis["counts"]["unlabeled"]
    subject = "agreement (teacher.unlabeled)"
    if check is None:
        if not unlabeled:
            return []
        return [
            Advice(
                subject,
                "",
                f"{counted(unlabeled, 'question')} {'has' if unlabeled == 1 else 'have'} no ground truth, and no "
                "question has one to compare with. Agreement shows how "
                "consistent the teacher is, not whether it is right. Label about 200 questions to find out.",
            )
        ]
    closed = check["closed"]
    precision, recovered = closed["precision"], closed["recovered"]
    if precision is None:
        nothing = f"Not a substitute for labels here: agreement keeps no answer at tau = {check['min_quality']:g}."
        return [Advice(subject, "", nothing)]
    if recovered is None:
        return [Advice(subject, "", "The valid answers to a question are equally good, so there is nothing to choose.")]
    shown = (
        f"Of the answers that agreement keeps at tau, {precision['value']:.0%} would be kept with labels too. "
        f"The answer of highest agreement recovers {recovered['value']:.0%} of the way from a random answer to the "
        "best one."
    )
    by_chance = [task for task, group in check["tasks"].items() if not _beats_chance(group["recovered"])]
    weak = [task for task, group in check["tasks"].items() if not _is_precise(group["precision"])]
    if not _beats_chance(recovered):
        verdict = "Not a substitute for labels here: agreement does not find better answers than chance."
    elif weak or by_chance or not _is_precise(precision):
        verdict = "A partial substitute: it finds better answers, but it also keeps wrong ones"
        verdict += f" ({', '.join(weak)})." if weak else "."
        verdict += f" It is not shown to beat chance in: {', '.join(by_chance)}." if by_chance else ""
    else:
        verdict = "It can stand in for labels on questions like these."
    return [Advice(subject, "", f"{verdict} {shown} An error that all answers share has full agreement.")]


def _beats_chance(recovered: Mapping[str, Any] | None) -> bool:
    return recovered is not None and recovered["low"] is not None and recovered["low"] > 0


def _is_precise(precision: Mapping[str, Any] | None) -> bool:
    return precision is not None and precision["low"] is not None and precision["low"] >= LEAST_PRECISION


def _answer_advice(analysis: Mapping[str, Any]) -> list[Advice]:
    advice = []
    for key in ("quality", "agreement_quality"):
        for task, group in (analysis[key] or {"tasks": {}})["tasks"].items():
            if group and group["valid_share"] < LEAST_VALID:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in list(group["reasons"].items())[:3])
                advice.append(
                    Advice(
                        f"invalid {task} answers",
                        "",
                        f"{1 - group['valid_share']:.0%} of them cannot be used ({reasons}). Look at the examples; ask "
                        "the teacher for the required format, or raise its token limit if answers are truncated.",
                    )
                )
    texts = analysis["texts"]["all"]
    if texts["repeated_share"] > MOST_REPEATED:
        advice.append(
            Advice(
                "repeated answers",
                "",
                f"{texts['repeated_share']:.0%} of the answers repeat an earlier answer to the same question word for "
                "word. Short answers do so by chance. If yours have reasoning, check the temperature and the cache of "
                "the teacher's server: copies add nothing to K.",
            )
        )
    return advice
