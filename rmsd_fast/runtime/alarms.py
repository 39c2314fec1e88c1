"""Define alarms: conditions on the metrics of a stage under which a run needs attention, in one table.

Alarms depend only on the metrics. Training prints each alarm once per stage, and the report derives the same alarms
from metrics.jsonl.
"""

from __future__ import annotations

import math
import textwrap
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

# The report also draws these as lines in its charts.
SEPARATED = 0.95
LENGTH_BIAS = 0.3
# In each of 100 steps of the demonstration, 0.03 to 0.08 of the 4-grams are repeated, as in the teacher's answers, and
# rollouts are 0.97 to 1.02 times as long as these. In ablations with open questions, they shrank to 0.62 of their first
# length.
REPETITION = 0.3
# Nats per token. An engine with the weights of the policy has less than 1e-5 in float32. Rollouts of the stage-1
# student would have about 0.04 after the 60 steps of the demonstration.
ENGINE_KL = 0.01
LENGTH_RATIO = (0.5, 2.0)
# Nats per token, by model.dtype: above the gap of an empty hint, which was 0.003 in bfloat16 with the hf engine, where
# passes of different lengths round differently.
LEAST_GAP = {"float32": 1e-3, "bfloat16": 1e-2}
# Shares of tokens and of rollouts. No run has tried these bounds yet.
CLIPPED_CREDIT = 0.9
HINTED = 0.5


@dataclass(frozen=True)
class Condition:
    """A metric whose mean over each of the last two windows of `window` steps should be within [low, high].

    An alarm requires that both means are out of bounds by more than two standard errors, computed from the variation
    within each window. Noise in single steps therefore does not raise an alarm. One window would not be enough, because
    metrics drift, and the variation within ten steps is a poor estimate of the drift over ten steps.

    Attributes:
        title: name of the alarm.
        metric: key in metrics.jsonl.
        meaning: what the alarm means, in sentences.
        advice: what to do about it, in sentences.
        low: lower bound.
        high: upper bound.
        window: number of steps of a window.
        first_share: share of the stage's steps after which the condition is checked, once two windows are complete.
        stages: stages in which the condition is checked.
        only_if: another metric and a bound; steps where that metric is below the bound are skipped.
        only_without: other metrics; steps that have a value of one of them are skipped.
        dtype: the `model.dtype` that the bounds are for; None = any.
    """

    title: str
    metric: str
    meaning: str
    advice: str
    low: float = -math.inf
    high: float = math.inf
    window: int = 10
    first_share: float = 0.0
    stages: tuple[str, ...] = ("warm_up", "distill")
    only_if: tuple[str, float] | None = None
    only_without: tuple[str, ...] = ()
    dtype: str | None = None

    def is_broken(self, values: Sequence[float]) -> bool:
        """Return whether the means of both windows are significantly out of bounds, on the same side."""
        windows = values[: self.window], values[self.window :]
        slack = [2 * stdev(window) / self.window**0.5 for window in windows]
        below = all(fmean(window) + extra < self.low for window, extra in zip(windows, slack, strict=True))
        above = all(fmean(window) - extra > self.high for window, extra in zip(windows, slack, strict=True))
        return below or above

    @property
    def expected(self) -> str:
        """The bounds as text."""
        if self.low == -math.inf:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Alarm:
    """A violated condition, with the stage and the first step of it where it was violated.

    Attributes:
        condition: the condition.
        stage: name of the stage.
        step: step within the stage.
        value: mean of the last two windows.
    """

    condition: Condition
    stage: str
    step: int
    value: float

    def text(self) -> str:
        """Return the alarm as lines for a terminal."""
        condition = self.condition
        lines = [
            f"{condition.metric}: expected {condition.expected}, got {self.value:.3g}, the mean of "
            f"{2 * condition.window} steps",
            condition.meaning,
            f"What to do: {condition.advice}",
        ]
        head = f"ALARM: {condition.title} ({self.stage} step {self.step})"
        return "\n".join([head, *(textwrap.indent(textwrap.fill(line, 98), "  ") for line in lines)])


CONDITIONS = (
    Condition(
        "the discriminator is at chance late in its warm-up",
        "discriminator/pair_accuracy",
        "It cannot distinguish teacher answers from rollouts yet, so the reward of stage 2 would start as noise.",
        "raise discriminator.warm_up_lr or discriminator.warm_up_steps. Also check teacher/kept_share: "
        "teacher.responses (K) and teacher.min_quality (tau) must leave pairs.",
        low=0.55,
        first_share=0.75,
        stages=("warm_up",),
    ),
    Condition(
        "the discriminator is at chance",
        "discriminator/pair_accuracy",
        "It cannot distinguish teacher answers from rollouts, so its part of the reward is noise.",
        "compare teacher answers and rollouts in the report. If the rollouts are worse, raise discriminator.lr or "
        "discriminator.warm_up_steps, and check that teacher.responses (K) and teacher.min_quality (tau) leave pairs "
        "(teacher/kept_share). If they are equally good, stage 2 has nothing left to learn from this pool.",
        low=0.55,
        window=20,
        stages=("distill",),
        # Once the rollouts are better than the answers, the discriminator should not prefer the answers.
        only_if=("teacher/headroom", 0.0),
    ),
    Condition(
        "the student has passed the teacher answers",
        "teacher/headroom",
        "On closed questions, the rollouts are better than the answers that the discriminator is trained toward. Its "
        "score can no longer raise their quality. The content reward still can.",
        "nothing if reward/content/raw still rises. Otherwise end stage 2, or raise teacher.weight_power or "
        "teacher.min_quality so that only the best answers count.",
        low=0.0,
        window=20,
        stages=("distill",),
    ),
    Condition(
        "the discriminator separates answers and rollouts almost perfectly",
        "discriminator/pair_accuracy",
        "It has likely found a cue other than quality (length, format, wording), and its reward teaches that cue.",
        "compare teacher answers and rollouts in the report. Lower discriminator.lr or discriminator.warm_up_steps; "
        "if the formats differ, train stage 1 for longer.",
        high=SEPARATED,
    ),
    Condition(
        "the discriminator judges by length",
        "discriminator/length_correlation",
        "Among the answers to one question, its score correlates with length: above 0 it prefers long answers, below "
        "0 short ones.",
        "compare rollout/tokens_mean with the length of the teacher's answers. Lower discriminator.lr or reward.alpha, "
        "or raise rollout.max_new_tokens if rollouts are truncated.",
        low=-LENGTH_BIAS,
        high=LENGTH_BIAS,
    ),
    Condition(
        "many rollouts are invalid",
        "rollout/valid_share",
        "Their format is broken or their answer does not parse, so they earn no content reward.",
        "read some in the report. Train stage 1 for longer, lower rollout.temperature, or raise rollout.max_new_tokens "
        "if they are truncated.",
        low=0.7,
    ),
    Condition(
        "many rollouts are truncated",
        "rollout/truncated_share",
        "They reach rollout.max_new_tokens before they end, so they have no answer.",
        "raise rollout.max_new_tokens, or train stage 1 for longer so that answers end.",
        high=0.2,
    ),
    Condition(
        "rollouts are empty",
        "rollout/empty_share",
        "They have no text, or nothing inside <answer>.",
        "read some in the report. Lower discriminator.lr or reward.alpha: an empty answer should never earn more than "
        "a wrong one.",
        high=0.05,
    ),
    Condition(
        "rollouts repeat themselves",
        "rollout/repeated_4grams",
        "Many of their sequences of four tokens occurred before in the same rollout, as in a loop.",
        "read some in the report. Go back to an earlier checkpoint, then lower distill.lr or reward.alpha, or raise "
        "distill.kl_coef. If teacher answers repeat themselves too, clean the pool.",
        high=REPETITION,
    ),
    Condition(
        "rollouts are much shorter or longer than teacher answers",
        "rollout/length_ratio",
        "Lengths are compared on the same questions. The student drifts to a length that no teacher answer has taught.",
        "read some in the report. Compare discriminator/length_correlation and reward/content/raw. If the content does "
        "not improve, lower distill.lr or reward.alpha, raise distill.kl_coef, or train stage 1 for longer.",
        low=LENGTH_RATIO[0],
        high=LENGTH_RATIO[1],
    ),
    Condition(
        "many questions have no usable teacher answer",
        "teacher/empty_share",
        "None of their answers reaches teacher.min_quality, so they yield no pair and no discriminator reward.",
        "lower teacher.min_quality (tau), collect more answers per question, or remove these questions. "
        "The report's table of teacher responses shows the task types.",
        high=0.3,
        window=20,
    ),
    Condition(
        "many groups have only zero advantages",
        "advantage/zero_share",
        "All rollouts of these questions earn the same reward, so the policy learns nothing from them.",
        "raise rollout.temperature or rollout.n, or use harder questions.",
        high=0.5,
        window=20,
        # With distillation from the self-teacher, tokens of these rollouts have advantages.
        only_without=("kd/clipped_share", "kd/divergence"),
    ),
    Condition(
        "the student drifts far from the stage-1 student",
        "policy/kl",
        "A KL of more than one nat per token means that it writes entirely different text.",
        "lower distill.lr or raise distill.kl_coef, and read some rollouts in the report. Go back to an earlier "
        "checkpoint if they are broken.",
        high=1.0,
    ),
    *(
        Condition(
            "the self-teacher says the same as the student",
            "self_teacher/gap_size",
            "Its log-probs hardly differ from the student's, so its hints change nothing.",
            "read some hints in data.train, and choose other self_teacher.views. Without an effect, "
            "self_teacher.kind=none saves the time of its passes.",
            low=least,
            dtype=dtype,
        )
        for dtype, least in LEAST_GAP.items()
    ),
    Condition(
        "many rollouts have no hint",
        "self_teacher/hinted_share",
        "The self-teacher does not score the rollouts of questions without hints, so they learn from rewards alone.",
        "add hints to the questions in data.train, choose self_teacher.views that they have, or raise "
        "self_teacher.max_hint_tokens if hints were left out.",
        low=HINTED,
        window=20,
    ),
    Condition(
        "many rollouts have no feedback",
        "self_teacher/feedback_share",
        "The judge's replies about the others were empty, cut off or rejected, or the self-teacher cannot read them.",
        "see the warnings in the output; raise self_teacher.judge.max_tokens or self_teacher.max_hint_tokens, or use "
        "another model.",
        low=HINTED,
        window=20,
    ),
    Condition(
        "most magnitude weights are clipped",
        "credit/clipped_share",
        "The weights then say only on which side of the student the self-teacher is, and not how far.",
        "raise credit.magnitude_clip, or use shorter hints: self_teacher.views.",
        high=CLIPPED_CREDIT,
    ),
    Condition(
        "most distillation advantages are clipped",
        "kd/clipped_share",
        "The self-teacher gives the tokens of the student almost no probability.",
        "read some hints in data.train, choose other self_teacher.views, or raise kd.gap_clip.",
        high=CLIPPED_CREDIT,
    ),
    Condition(
        "trainer and rollout engine disagree",
        "policy/importance_ratio",
        "Trainer and engine give the sampled tokens different probabilities, so the gradient is biased.",
        "set distill.tis_cap=2 and distill.sequence_mask_cap=3, or model.dtype=float32 to look for the cause.",
        low=0.9,
        high=1.1,
    ),
    Condition(
        "the rollouts are not those of the policy",
        "policy/engine_kl",
        "On the sampled tokens, the rollout engine has another distribution than the trainer's policy, for example "
        "that of earlier weights.",
        "set model.dtype=float32 to look for the cause. With rollout.engine=replay, use the settings of the run that "
        "wrote the dump.",
        low=-ENGINE_KL,
        high=ENGINE_KL,
    ),
)


class AlarmWatch:
    """Check the steps of a run in order, and raise the alarm of each condition once per stage.

    Args:
        totals: number of steps of each stage; unknown stages may be left out.
        dtype: `model.dtype` of the run.
    """

    def __init__(self, totals: Mapping[str, int], dtype: str = "float32") -> None:
        self._totals = totals
        self._conditions = [c for c in CONDITIONS if c.dtype in (None, dtype)]
        self._values: dict[tuple[str, Condition], deque[float]] = {}
        self._raised: set[tuple[str, Condition]] = set()

    def see(self, stage: str, step: int, values: Mapping[str, Any]) -> list[Alarm]:
        """Add the metrics of a step and return the alarms that they raise. Non-finite values are skipped."""
        alarms = []
        for condition in self._conditions:
            value = values.get(condition.metric)
            if stage not in condition.stages or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            if condition.only_if:
                other, least = condition.only_if
                if isinstance(values.get(other), int | float) and values[other] < least:
                    continue
            if any(isinstance(values.get(name), int | float) for name in condition.only_without):
                continue
            recent = self._values.setdefault((stage, condition), deque(maxlen=2 * condition.window))
            recent.append(value)
            early = len(recent) < 2 * condition.window or step < condition.first_share * self._totals.get(stage, 0)
            if early or (stage, condition) in self._raised:
                continue
            if condition.is_broken(list(recent)):
                self._raised.add((stage, condition))
                alarms.append(Alarm(condition, stage, step, fmean(recent)))
        return alarms


def find_alarms(rows: Iterable[Mapping[str, Any]], totals: Mapping[str, int], dtype: str = "float32") -> list[Alarm]:
    """Return the alarms of a run, given its lines of metrics.jsonl, the steps of each stage, and its `model.dtype`."""
    watch = AlarmWatch(totals, dtype)
    return [alarm for row in rows for alarm in watch.see(row["stage"], row["step"], row)]
