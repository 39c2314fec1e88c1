"""The results of a lab: scores of its finished runs, intervals, and the files that show them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from rmsd_fast.bootstrap import mean_interval, t_quantile
from rmsd_fast.files import write_text_atomic
from rmsd_fast.lab_chart import chart
from rmsd_fast.lab_plan import Job, Plan
from rmsd_fast.method.answers import CLOSED_TASKS, TASK_TYPES

# Description of the score of a question, by metric.
METRICS = {
    "closed": "mean score of the questions of closed tasks",
    "meaning": "share of answers whose meaning is right",
    "valid": "share of valid answers",
}


@dataclass(frozen=True)
class Scored:
    """The scores of one finished run.

    Attributes:
        metric: one of METRICS.
        means: all available means over held-out questions, by name.
        tasks: means by task type.
        questions: score of each question by kind, `greedy` or `sampled`, and id.
        train_seconds: seconds of all training steps.
        simulated: whether the teacher was simulated.
        facts: content of the run's `run.json`.
        clusters: the cluster of each question by its id; see `stages.answer_records`. Predictions of earlier versions
            have none, and their questions count as independent.
    """

    metric: str
    means: dict[str, float]
    tasks: dict[str, dict[str, float]]
    questions: dict[str, dict[str, float]]
    train_seconds: float
    simulated: bool
    facts: dict = field(default_factory=dict)
    clusters: dict[str, str] = field(default_factory=dict)

    def score(self, kind: str) -> float | None:
        """Return the mean score of the metric's questions, or None if the run has no answers of this kind."""
        values = self.questions.get(kind)
        return fmean(values.values()) if values else None


def read_run(folder: Path, prediction: str) -> Scored:
    """Read the scores of a finished run from its predictions.

    Args:
        folder: the run folder.
        prediction: the student whose answers are scored.
    """
    lines = (folder / "predictions" / f"{prediction}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    metric, means, tasks, questions = score_records(records)
    steps = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Scored(
        metric=metric,
        means=means,
        tasks=tasks,
        questions=questions,
        train_seconds=sum(json.loads(line).get("seconds/step") or 0.0 for line in steps),
        simulated=bool(json.loads((folder / "evaluation.json").read_text()).get("teacher_simulated")),
        facts=json.loads((folder / "run.json").read_text()),
        clusters={record["id"]: record["cluster"] for record in records if "cluster" in record},
    )


def score_records(
    records: list[dict],
) -> tuple[str, dict[str, float], dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Return the metric, all available means, the means by task, and the score of each question by kind."""
    closed = [record for record in records if record["task_type"] in CLOSED_TASKS]
    meant = [record for record in records if record.get("meaning") is not None]
    metric = "closed" if closed else "meaning" if meant else "valid"
    rows = closed or meant or records
    read: Callable[[dict], float] = {
        "closed": lambda record: record["score"],
        "meaning": lambda record: float(record["meaning"]),
        "valid": lambda record: float(record["valid"]),
    }[metric]
    questions = {"greedy": {record["id"]: read(record) for record in rows}}
    sampled = "sampled_meaning" if metric == "meaning" else "sampled"
    if all(sampled in record for record in rows):
        questions["sampled"] = {record["id"]: record[sampled] for record in rows}
    means = {"valid": fmean(float(record["valid"]) for record in records)}
    means |= _means(closed) | ({"meaning": fmean(float(r["meaning"]) for r in meant)} if meant else {})
    tasks = {task: [r for r in records if r["task_type"] == task] for task in TASK_TYPES}
    return metric, means, {task: {**_means(rows), "n": len(rows)} for task, rows in tasks.items() if rows}, questions


def _means(records: list[dict]) -> dict[str, float]:
    """Return the mean scores of greedy and, if all records have them, of sampled answers."""
    if not records:
        return {}
    means = {"greedy": fmean(record["score"] for record in records)}
    if all("sampled" in record for record in records):
        means["sampled"] = fmean(record["sampled"] for record in records)
    return means


def t_interval(values: Sequence[float]) -> dict:
    """Return the mean and its 95% t interval over training runs. A single run has no interval."""
    mean, n = fmean(values), len(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = t_quantile(n - 1) * stdev(values) / n**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def question_interval(
    differences: Sequence[Mapping[str, float]], clusters: Mapping[str, str]
) -> tuple[float, float] | None:
    """Return a 95% bootstrap interval of the mean difference over questions, clustered by video.

    Args:
        differences: of each seed, the differences by question. A question's differences are averaged over seeds first.
        clusters: the cluster of each question. A question that is not in it is a cluster of its own.
    Returns:
        The interval, or None if all questions are of one cluster.
    """
    by_question: dict[str, list[float]] = defaultdict(list)
    for of_seed in differences:
        for name, value in of_seed.items():
            by_question[name].append(value)
    means = [fmean(values) for values in by_question.values()]
    return mean_interval(means, [clusters.get(name, name) for name in by_question])


def compare(after: Mapping[int, Scored], before: Mapping[int, Scored], kind: str) -> dict | None:
    """Return the paired difference of two entries over the seeds that both have, or None if there is no such seed."""
    differences: list[dict[str, float]] = []
    clusters: dict[str, str] = {}
    for seed in sorted(set(after) & set(before)):
        later, earlier = (scored[seed].questions.get(kind, {}) for scored in (after, before))
        if common := [name for name in later if name in earlier]:
            differences.append({name: later[name] - earlier[name] for name in common})
            # Generated questions with the same id differ between seeds, but come in the same clusters.
            clusters = after[seed].clusters | clusters
    if not differences:
        return None
    result = t_interval([fmean(of_seed.values()) for of_seed in differences])
    low, high = question_interval(differences, clusters) or (None, None)
    excludes = {
        "trainings": _excludes_0(result["low"], result["high"]),
        "questions": _excludes_0(low, high),
    }
    return {**result, "questions_low": low, "questions_high": high, "excludes_0": excludes}


def _excludes_0(low: float | None, high: float | None) -> bool | None:
    return None if low is None or high is None else low > 0 or high < 0


def summarize(plan: Plan, scored: Mapping[str, Mapping[int, Scored]]) -> dict:
    """Return mean and interval of every entry, and every comparison, for greedy and sampled answers."""
    arms: dict[str, dict] = {}
    for name, by_seed in scored.items():
        for kind in ("greedy", "sampled"):
            values = [value for run in by_seed.values() if (value := run.score(kind)) is not None]
            if values:
                arms.setdefault(name, {})[kind] = t_interval(values)
        if by_seed:
            arms[name]["train_seconds"] = fmean(run.train_seconds for run in by_seed.values())
    comparisons = []
    for after, before in plan.comparisons:
        results = {kind: compare(scored[after], scored[before], kind) for kind in ("greedy", "sampled")}
        comparisons.append({"after": after, "before": before, **{k: v for k, v in results.items() if v}})
    return {"arms": arms, "comparisons": comparisons}


def write_results(plan: Plan, jobs: Sequence[Job], finished: Mapping[Path, Scored], out: Path) -> dict:
    """Write `lab.json`, `table.md` and `chart.svg` for the runs finished so far, and return what `lab.json` holds.

    Args:
        plan: the plan.
        jobs: all training runs of the plan.
        finished: scores of the finished ones by run folder.
        out: folder of the lab.
    """
    scored: dict[str, dict[int, Scored]] = {name: {} for name in plan.entries}
    folders: dict[str, dict[int, str]] = {name: {} for name in plan.entries}
    for job in jobs:
        if job.folder in finished:
            scored[job.entry.name][job.seed] = finished[job.folder]
            folders[job.entry.name][job.seed] = str(job.folder.relative_to(out))
    runs = list(finished.values())
    metrics = {run.metric for run in runs}
    commits = {path.read_text().strip() for job in finished if (path := job / "commit.txt").is_file()}
    result = {
        "plan": plan.path.name,
        "recipe": Path(plan.recipe).name,
        "settings": plan.settings,
        "seeds": plan.seeds,
        "entries": {
            entry.name: {"from": entry.start, "settings": entry.settings, "prediction": entry.prediction}
            for entry in plan.entries.values()
        },
        "metric": metrics.pop() if len(metrics) == 1 else None,
        "teacher_simulated": any(run.simulated for run in runs),
        "clustered": all(run.clusters for run in runs),
        "commits": sorted(commits),
        "versions": runs[-1].facts.get("versions", {}) if runs else {},
        "hardware": sorted({run.facts.get("hardware", "") for run in runs}),
        "finished": len(runs),
        "planned": len(jobs),
        "runs": {
            name: {
                seed: {**run.means, "tasks": run.tasks, "train_seconds": round(run.train_seconds, 1), "folder": folder}
                for (seed, run), folder in zip(by_seed.items(), folders[name].values(), strict=True)
            }
            for name, by_seed in scored.items()
            if by_seed
        },
        **summarize(plan, scored),
    }
    # Six digits of each number are enough.
    result = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 6))
    write_text_atomic(out / "lab.json", json.dumps(result, indent=1) + "\n")
    write_text_atomic(out / "table.md", table(result))
    values = {
        kind: {
            name: [value for run in by_seed.values() if (value := run.score(kind)) is not None]
            for name, by_seed in scored.items()
            if kind in result["arms"].get(name, {})
        }
        for kind in ("greedy", "sampled")
    }
    if runs:
        write_text_atomic(out / "chart.svg", chart(result, values))
    return result


def describe(result: dict) -> list[str]:
    """Return the sentences that explain the numbers."""
    metric = METRICS.get(result["metric"] or "", "scores")
    simulated = " The teacher is simulated." if result["teacher_simulated"] else ""
    return [
        f"Held-out {metric}.{simulated} Recipe {result['recipe']}, seeds {', '.join(map(str, result['seeds']))}; "
        f"{result['finished']} of {result['planned']} runs are finished.",
        "Intervals are 95% intervals: t intervals over runs, and bootstrap intervals over questions for differences, "
        + ("clustered by video." if result["clustered"] else "which count questions about one video as independent."),
    ]


def table(result: dict) -> str:
    """Return the page with the means of all arms and the comparisons."""
    lines = [f"# {Path(result['plan']).stem}", "", *describe(result), ""]
    kinds = [kind for kind in ("greedy", "sampled") if any(kind in arm for arm in result["arms"].values())]
    lines += [f"| arm | n | {' | '.join(kinds)} | training time, s |", "|---" * (len(kinds) + 3) + "|"]
    for name, arm in result["arms"].items():
        cells = [_mean_cell(arm[kind]) if kind in arm else "-" for kind in kinds]
        lines.append(f"| {name} | {arm['greedy']['n']} | {' | '.join(cells)} | {arm['train_seconds']:.0f} |")
    compared = [(c, kind) for c in result["comparisons"] for kind in kinds if kind in c]
    if compared:
        lines += ["", "Differences in points, paired by seed and question:", ""]
        lines.append("| difference | answers | n | points | over runs | over questions | excludes 0 |")
        lines.append("|---" * 7 + "|")
    for comparison, kind in compared:
        d = comparison[kind]
        cells = [f"{comparison['after']} - {comparison['before']}", kind, str(d["n"]), f"{100 * d['mean']:+.1f}"]
        cells += [_points(d["low"], d["high"]), _points(d["questions_low"], d["questions_high"])]
        lines.append("| " + " | ".join([*cells, _verdict(d["excludes_0"])]) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += ["", f"Commits: {', '.join(result['commits']) or 'unknown'}. Hardware: {'; '.join(result['hardware'])}."]
    lines += [f"Versions: {versions}."] if versions else []
    return "\n".join(lines) + "\n"


def _mean_cell(interval: dict) -> str:
    if interval["low"] is None:
        return f"{interval['mean']:.3f}"
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _points(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"[{100 * low:+.1f}, {100 * high:+.1f}]"


def _verdict(excludes: dict) -> str:
    names = [name for key, name in (("trainings", "runs"), ("questions", "questions")) if excludes[key]]
    return "both" if len(names) == 2 else "".join(names) or "no"
