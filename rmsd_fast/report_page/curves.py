"""Draw the curves of the report, by stage and in order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape

from rmsd_fast.report_page.svg import Series, curve_chart, stacked_chart
from rmsd_fast.runtime.alarms import (
    CLIPPED_CREDIT,
    ENGINE_KL,
    LENGTH_BIAS,
    LENGTH_RATIO,
    REPETITION,
    SEPARATED,
)

STAGE_TITLES = {
    "sft": "Stage 1: imitation of teacher responses",
    "warm_up": "Discriminator warm-up",
    "distill": "Stage 2: adversarial distillation",
    "control": "Control: imitation in place of stage 2",
}
PHASE = "seconds/"
# All other phases are drawn as a single one.
MAX_PHASES = 6


@dataclass(frozen=True)
class Chart:
    """One chart: title, a line on how to read it, (metric key, name) of its curves, and its axis.

    A line of `warn` above 0 is an upper bound of all curves, one below 0 a lower bound. Counts and settings are not
    `smoothed`, because they have no noise. `skip_zero` omits the chart if all values are 0.
    """

    title: str
    hint: str
    keys: tuple[tuple[str, str], ...]
    y_range: tuple[float, float] | None = None
    include: tuple[float, ...] = ()
    warn: tuple[tuple[float, str], ...] = ()
    skip_zero: bool = False
    smoothed: bool = True


PAIR_ACCURACY = Chart(
    "Pair accuracy",
    "share of (teacher, student) pairs in which the teacher scores higher; 0.5 = chance",
    (("discriminator/pair_accuracy", "pair accuracy"),),
    y_range=(0.0, 1.0),
    warn=((SEPARATED, f"{SEPARATED}: separated too easily"),),
)
GROUPS: tuple[tuple[str, tuple[Chart, ...]], ...] = (
    (
        "Imitation",
        (
            Chart("Loss", "cross-entropy per response token, nats", (("loss", "loss"),)),
            Chart("Gradient norm", "before clipping", (("grad_norm", "norm"),), include=(0.0,)),
        ),
    ),
    (
        "Discriminator",
        (
            PAIR_ACCURACY,
            Chart(
                "Margin", "mean score of teacher minus student", (("discriminator/margin", "margin"),), include=(0.0,)
            ),
            Chart(
                "Length correlation",
                "between length and score of the answers to a question; far from 0: the discriminator judges by length",
                (("discriminator/length_correlation", "correlation"),),
                y_range=(-1.0, 1.0),
                warn=((LENGTH_BIAS, f"{LENGTH_BIAS}"), (-LENGTH_BIAS, f"{-LENGTH_BIAS}")),
            ),
            Chart(
                "Content correlation",
                "between content reward and score of the rollouts of a question; above 0: it rewards correct answers",
                (("discriminator/content_correlation", "correlation"),),
                y_range=(-1.0, 1.0),
                include=(0.0,),
            ),
            Chart(
                "Scores",
                "only the gap between the two matters; the level is arbitrary",
                (("discriminator/score_teacher", "teacher"), ("discriminator/score_student", "student")),
            ),
            Chart(
                "Discriminator loss",
                "0.69 = undecided at full quality",
                (("discriminator/loss", "loss"),),
                include=(0.0,),
            ),
            Chart(
                "Gradient norm, discriminator",
                "before clipping",
                (("discriminator/grad_norm", "norm"),),
                include=(0.0,),
            ),
        ),
    ),
    (
        "Rewards",
        (
            Chart(
                "Rewards, raw: format and content",
                "mean over rollouts, 0 to 1",
                (
                    ("reward/outer/raw", "outer format"),
                    ("reward/task/raw", "task format"),
                    ("reward/content/raw", "content"),
                ),
                include=(0.0, 1.0),
            ),
            Chart(
                "Reward, raw: discriminator",
                "mean score of rollouts; stays near 0 while the discriminator keeps learning",
                (("reward/discriminator/raw", "discriminator"),),
                include=(0.0,),
            ),
            Chart(
                "Rewards, weighted",
                "contribution of each component to the total",
                (
                    ("reward/discriminator/weighted", "discriminator"),
                    ("reward/outer/weighted", "outer format"),
                    ("reward/task/weighted", "task format"),
                    ("reward/content/weighted", "content"),
                ),
                include=(0.0,),
                skip_zero=True,
            ),
            Chart(
                "Quality of closed questions",
                "of the rollouts, and with a teacher pool of its best answers and of what a discriminator leads to",
                (
                    ("rollout/quality", "rollouts"),
                    ("teacher/target_quality", "discriminator's target"),
                    ("teacher/best_quality", "best of K"),
                ),
                include=(0.0, 1.0),
            ),
            Chart(
                "Headroom",
                "the discriminator's target minus the quality of the rollouts; below 0 it can only lower the quality",
                (("teacher/headroom", "headroom"),),
                include=(0.0,),
            ),
            Chart(
                "Groups with different content",
                "share of closed questions whose rollouts differ in content reward",
                (("rollout/signal_share", "groups"),),
                include=(0.0, 1.0),
            ),
            Chart(
                "Total reward",
                "an increase alone does not show a better student",
                (("reward/total", "total"),),
                skip_zero=True,
            ),
            Chart(
                "Groups without a signal",
                "share of questions whose rollouts all had the same reward",
                (("advantage/zero_share", "groups"),),
                include=(0.0,),
            ),
        ),
    ),
    (
        "Policy",
        (
            Chart("Policy loss", "watch for jumps; the level is not informative", (("policy/loss", "loss"),)),
            Chart(
                "KL to the stage-1 student",
                "nats per token",
                (("policy/kl", "KL"), ("policy/kl_k1", "k1 estimate")),
                include=(0.0,),
            ),
            Chart(
                "Entropy",
                "nats per token; a fall to 0 means collapse",
                (("policy/entropy", "entropy"),),
                include=(0.0,),
            ),
            Chart(
                "Importance ratio",
                "probability in the trainer / in the rollout engine; 1 = both agree",
                (("policy/importance_ratio", "ratio"),),
                include=(0.99, 1.01),
            ),
            Chart(
                "Log-probs, trainer against rollout engine",
                "difference on the same tokens in nats, and share of ratios outside [0.9, 1.1]",
                (
                    ("parity/mean_difference", "mean"),
                    ("parity/worst_difference", "worst question"),
                    ("parity/largest_difference", "largest"),
                    ("parity/outside_share", "outside"),
                ),
                include=(0.0,),
            ),
            Chart(
                "KL of the rollout engine to the policy",
                "nats per token; 0 = the rollouts are those of the policy",
                (("policy/engine_kl", "KL"),),
                include=(-0.001, 0.001),
                warn=((ENGINE_KL, f"{ENGINE_KL}"), (-ENGINE_KL, f"{-ENGINE_KL}")),
            ),
            Chart(
                "Mismatch correction",
                "share of tokens whose weight is capped, and of tokens in excluded responses",
                (("policy/tis_capped_fraction", "capped"), ("policy/sequence_masked_fraction", "excluded")),
                include=(0.0,),
            ),
            Chart("Log-probability", "mean of the rollouts' tokens", (("policy/logp", "log-probability"),)),
            Chart(
                "Imitation loss in stage 2",
                "cross entropy of the imitated teacher answers, nats per token",
                (("policy/sft_loss", "loss"),),
            ),
            Chart("Gradient norm, policy", "before clipping", (("policy/grad_norm", "norm"),), include=(0.0,)),
        ),
    ),
    (
        "Self-teacher and token credit",
        (
            Chart(
                "Gap of the self-teacher",
                "log-prob under the self-teacher minus that under the student, nats per token; size: absolute value",
                (("self_teacher/gap", "mean"), ("self_teacher/gap_size", "size")),
                include=(0.0,),
            ),
            Chart(
                "Rollouts with a hint",
                "share of rollouts that the self-teacher has scored",
                (("self_teacher/hinted_share", "rollouts"),),
                include=(0.0, 1.0),
            ),
            Chart(
                "Overlap with the self-teacher",
                "share of common most probable tokens, and the mean weight that follows from it",
                (("credit/overlap", "overlap"), ("credit/prune_weight", "weight")),
                include=(0.0, 1.0),
            ),
            Chart(
                "Divergence of the self-teacher",
                "between the distributions of self-teacher and student, nats per token",
                (("kd/divergence", "divergence"),),
                include=(0.0,),
            ),
            Chart(
                "Rollouts with a judge's feedback",
                "share of rollouts whose feedback the self-teacher is told",
                (("self_teacher/feedback_share", "rollouts"),),
                include=(0.0, 1.0),
            ),
            Chart(
                "Log-variances of the terms of the loss",
                "s of rewards, distillation and imitation; the weight of a term falls as its s rises",
                (("uncertainty/pg", "rewards"), ("uncertainty/kd", "distillation"), ("uncertainty/sft", "imitation")),
                include=(0.0,),
            ),
            Chart(
                "Clipped token credit",
                "share of tokens whose magnitude weight, or distillation advantage, is at its bound",
                (("credit/clipped_share", "weights"), ("kd/clipped_share", "distillation")),
                include=(0.0, 1.0),
                warn=((CLIPPED_CREDIT, f"{CLIPPED_CREDIT:g}"),),
            ),
        ),
    ),
    (
        "Teacher and rollouts",
        (
            Chart(
                "Teacher responses",
                "quality q, share with valid format, share kept by the filter",
                (
                    ("teacher/quality", "quality"),
                    ("teacher/valid_share", "valid"),
                    ("teacher/kept_share", "kept"),
                ),
                y_range=(0.0, 1.0),
            ),
            Chart(
                "Questions without a teacher",
                "no response passed the filter",
                (("teacher/empty_share", "questions"),),
                include=(0.0,),
            ),
            Chart(
                "Overlap of imitated answers with the student",
                "share of tokens among the student's 16 most probable; share of questions with several best answers",
                (
                    ("selection/overlap", "chosen"),
                    ("selection/overlap_of_all", "all best answers"),
                    ("selection/tied_share", "questions"),
                ),
                y_range=(0.0, 1.0),
            ),
            Chart("Rollout length", "tokens, mean", (("rollout/tokens_mean", "tokens"),), include=(0.0,)),
            Chart(
                "Length against the teacher's",
                "tokens of the rollouts / tokens of kept teacher answers to the same questions",
                (("rollout/length_ratio", "ratio"),),
                include=(0.0, 1.0),
                warn=((LENGTH_RATIO[1], f"{LENGTH_RATIO[1]:g}"),),
            ),
            Chart(
                "Repetition",
                "share of 4-grams of tokens that occurred before in the same rollout; near 1: loops",
                (("rollout/repeated_4grams", "repeated"),),
                include=(0.0,),
                warn=((REPETITION, f"{REPETITION}"),),
            ),
            Chart(
                "Banned tokens",
                "probability of ids that rollouts must not contain; near 0 once the student is trained",
                (("rollout/banned_mass", "probability"),),
                include=(0.0,),
            ),
            Chart(
                "Rollouts",
                "shares: cut at the token limit, with a valid answer, with an empty answer",
                (
                    ("rollout/truncated_share", "truncated"),
                    ("rollout/valid_share", "valid"),
                    ("rollout/empty_share", "empty"),
                ),
                y_range=(0.0, 1.0),
            ),
        ),
    ),
    (
        "Speed and faults",
        (
            Chart(
                "Throughput",
                "per second, each response with its prompt; computed: by policy and discriminator, with padding",
                (("rate/tokens_per_s", "tokens/s"), ("rate/computed_tokens_per_s", "computed tokens/s")),
                include=(0.0,),
            ),
            Chart(
                "Tokens per step",
                "each response with its prompt; computed: by policy and discriminator, with padding",
                (("tokens", "tokens"), ("tokens_computed", "computed tokens")),
                include=(0.0,),
            ),
            Chart(
                "Shared-prefix ratio",
                "tokens per computed token: 1 = nothing shared, below 1 = padding",
                (("rate/shared_prefix_ratio", "ratio"),),
                include=(1.0,),
            ),
            Chart(
                "Media files per step",
                "over all processes: decoded, read from the memory cache, read from the disk cache",
                (
                    ("media/decoded", "decoded"),
                    ("media/memory_hits", "from memory"),
                    ("media/disk_hits", "from disk"),
                ),
                include=(0.0,),
            ),
            Chart(
                "Media errors",
                "files per step",
                (
                    ("media/timeouts", "timed out"),
                    ("media/crashes", "crashed the decoder"),
                    ("media/cpu_fallbacks", "decoded on the CPU instead of NVDEC"),
                    ("media/disk_rebuilt", "damaged cache entries"),
                ),
                skip_zero=True,
                smoothed=False,
            ),
            Chart("Learning rate", "of the stage's model", (("lr", "rate"),), include=(0.0,), smoothed=False),
            Chart("Peak memory", "MiB on one process", (("memory/peak_mib", "MiB"),), include=(0.0,), smoothed=False),
            Chart(
                "Faults",
                "bad samples and skipped steps since the start of the run",
                (("samples/bad", "bad samples"), ("samples/skipped_steps", "skipped steps")),
                include=(0.0,),
                skip_zero=True,
                smoothed=False,
            ),
        ),
    ),
)


def draw(chart: Chart, curves: Mapping[str, Series]) -> str:
    """Return the chart's card, or "" if the stage has none of its curves (or only zeros, with skip_zero)."""
    series = [replace(curves[key], name=name) for key, name in chart.keys if key in curves]
    if not series or (chart.skip_zero and not any(v for s in series for v in s.values)):
        return ""
    return curve_chart(
        chart.title,
        chart.hint,
        series,
        y_range=chart.y_range,
        include=chart.include,
        warn=chart.warn,
        smoothed=chart.smoothed,
    )


def phases(curves: Mapping[str, Series]) -> str:
    """Return stacked seconds per phase, largest phase first; the remaining time of the step is drawn as `other`."""
    phase_series = [
        replace(s, name=key.removeprefix(PHASE).replace("_", " "))
        for key, s in curves.items()
        if key.startswith(PHASE) and key != f"{PHASE}step"
    ]
    step_series = curves.get(f"{PHASE}step")
    if not phase_series:
        phase_series = [replace(step_series, name="step")] if step_series else []
        step_series = None
    if not phase_series:
        return ""
    phase_series.sort(key=lambda s: -sum(v for v in s.values if math.isfinite(v)))
    other: dict[int, float] = {}
    for s in phase_series[MAX_PHASES:]:
        for step, value in zip(s.steps, s.values, strict=True):
            other[step] = other.get(step, 0.0) + value
    if step_series is not None:
        known: dict[int, float] = {}
        for s in phase_series:
            for step, value in zip(s.steps, s.values, strict=True):
                known[step] = known.get(step, 0.0) + value
        for step, value in zip(step_series.steps, step_series.values, strict=True):
            other[step] = other.get(step, 0.0) + max(value - known.get(step, 0.0), 0.0)
    phase_series = phase_series[:MAX_PHASES]
    # A remainder of less than half a percent is below the resolution of the clock.
    shown = sum(v for s in phase_series for v in s.values if math.isfinite(v))
    if sum(v for v in other.values() if math.isfinite(v)) > 0.005 * shown:
        phase_series.append(Series("other", tuple(sorted(other)), tuple(other[step] for step in sorted(other))))
    return stacked_chart("Seconds per step", "by phase, with each phase's share of the time", phase_series)


def stage_section(stage: str, curves: Mapping[str, Series]) -> str:
    """Return heading and charts of one stage. Metrics without a chart follow in a folded block."""
    title = STAGE_TITLES.get(stage, stage)
    counts = {s.steps[-1] for s in curves.values() if s.steps}
    steps = max(counts) if counts else 0
    seconds = curves.get(f"{PHASE}step")
    spent = sum(v for v in seconds.values if math.isfinite(v)) if seconds else None
    lead = f"{steps} steps" + (f", {duration(spent)} in total." if spent is not None else ".")
    out = [f'<h2 id="stage-{escape(stage, quote=True)}">{escape(title)}</h2><p class="muted">{escape(lead)}</p>']
    named: set[str] = set()
    for heading, charts in GROUPS:
        cards = [draw(chart, curves) for chart in charts]
        named.update(key for chart in charts for key, _ in chart.keys)
        if heading == "Speed and faults":
            cards.insert(0, phases(curves))
        cards = [card for card in cards if card]
        if cards:
            out.append(f'<h3>{escape(heading)}</h3><div class="charts">{"".join(cards)}</div>')
    others = [key for key in curves if key not in named and not key.startswith(PHASE)]
    if others:
        cards = [curve_chart(key, "", [replace(curves[key], name=key.rsplit("/", 1)[-1])]) for key in sorted(others)]
        out.append(
            f'<details><summary>Other metrics ({len(cards)})</summary><div class="charts">{"".join(cards)}</div>'
        )
        out.append("</details>")
    return "".join(out)


def duration(seconds: float) -> str:
    """Return a time span as `12 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
