"""Render the whole page: header, headline numbers, sections, settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rmsd_fast.config import DataConfig
from rmsd_fast.report_page.curves import STAGE_TITLES, duration, stage_section
from rmsd_fast.report_page.evaluation import (
    SIMULATED,
    difference_name,
    evaluation_section,
    in_order,
    interval,
    percent,
    student_names,
    value,
    verdict,
)
from rmsd_fast.report_page.films import Films
from rmsd_fast.report_page.layout import document, tile
from rmsd_fast.report_page.progress import progress_section
from rmsd_fast.report_page.rollouts import rollouts_section
from rmsd_fast.report_page.run_folder import ReportedRun
from rmsd_fast.report_page.samples import STUDENT_ORDER, is_number, sample_cards
from rmsd_fast.report_page.svg import Series, last_smoothed, number
from rmsd_fast.report_page.teacher import is_simulated, teacher_section
from rmsd_fast.report_page.text import visible
from rmsd_fast.runtime.alarms import SEPARATED

_STAMP = re.compile(r"(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)(\d\d)")
_WORDS = {"up": "above 0", "down": "below 0", "same": "interval contains 0"}


def render(run: ReportedRun) -> str:
    """Return the report of a run as one self-contained HTML document."""
    data = run.settings.get("data")
    # A config.yaml that was written by hand, or by another version, may lack these settings.
    timeout_s, max_file_mib = (
        data[name] if isinstance(data, Mapping) and is_number(data.get(name)) else getattr(DataConfig, name)
        for name in ("decode_timeout_s", "max_file_mib")
    )
    with Films(timeout_s, max_file_mib) as films:
        return _render(run, films)


def _render(run: ReportedRun, films: Films) -> str:
    name = visible(run.settings.get("name") or run.folder.name)
    stages = in_order(list(run.metrics), tuple(STAGE_TITLES))
    links = [("evaluation", "Evaluation"), *((f"stage-{s}", _short(s)) for s in stages), ("rollouts", "Rollouts")]
    links += [("teacher", "Teacher"), ("samples", "Samples"), ("settings", "Settings")]
    nav = "".join(f'<a href="#{visible(anchor)}">{visible(text)}</a>' for anchor, text in links)
    body = [
        f'<header><p class="muted small">rmsd_fast run report</p><h1>{name}</h1>{_facts(run)}<nav>{nav}</nav></header>',
        _notes(run),
        _alarms(run),
        _tiles(run),
        evaluation_section(run),
        progress_section((run.evaluation or {}).get("progress", [])),
        *(stage_section(stage, run.metrics[stage]) for stage in stages),
        "" if stages else '<h2>Training</h2><p class="muted">No training step has been logged (no metrics.jsonl).</p>',
        rollouts_section(run.rollouts, films),
        teacher_section(run.teacher),
        _samples(run, films),
        f'<h2 id="settings">Settings</h2><details class="card"><summary>config.yaml</summary>'
        f'<pre class="text" style="max-height:none">{visible(run.settings_text)}</pre></details>',
    ]
    return document(f"{name} · rmsd_fast report", "".join(body))


def _short(stage: str) -> str:
    return STAGE_TITLES.get(stage, stage).partition(":")[0]


def _facts(run: ReportedRun) -> str:
    """Return name, date, recipe, machine and other facts. Facts that the run did not record are left out."""
    info = run.info
    versions = info.get("versions")
    started = _time(info.get("started")) or _time_of_name(run.folder.name)
    finished = _time(info.get("finished"))
    steps = {stage: max(s.steps[-1] for s in keys.values()) for stage, keys in run.metrics.items() if keys}
    facts = [
        ("Folder", run.folder.resolve().name),
        ("Started", started.strftime("%Y-%m-%d %H:%M") if started else None),
        ("Duration", _spent(run, started, finished)),
        ("Recipe", info.get("recipe")),
        ("Hardware", info.get("hardware")),
        ("World size", info.get("world_size")),
        ("Model", (run.settings.get("model") or {}).get("path") or ("tiny, generated" if _made(run) else None)),
        ("Seed", run.settings.get("seed")),
        ("Steps", ", ".join(f"{_short(s).lower()} {steps[s]}" for s in in_order(list(steps), tuple(STAGE_TITLES)))),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, Mapping) else None),
    ]
    shown = "".join(f"<div><dt>{k}</dt><dd>{visible(v)}</dd></div>" for k, v in facts if v not in (None, ""))
    return f'<dl class="facts">{shown}</dl>'


def _made(run: ReportedRun) -> bool:
    return bool((run.settings.get("made") or {}).get("enabled"))


def _time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")) if isinstance(text, str) else None
    except ValueError:
        return None


def _time_of_name(name: str) -> datetime | None:
    """Return the creation time at the end of a run folder's name."""
    stamp = _STAMP.search(name)
    try:
        return datetime(*map(int, stamp.groups())) if stamp else None
    except ValueError:
        return None


def _spent(run: ReportedRun, started: datetime | None, finished: datetime | None) -> str | None:
    if started and finished and (started.tzinfo is None) == (finished.tzinfo is None):
        return duration(max((finished - started).total_seconds(), 0.0))
    seconds = [keys["seconds/step"] for keys in run.metrics.values() if "seconds/step" in keys]
    total = sum(v for s in seconds for v in s.values if math.isfinite(v))
    return f"{duration(total)} in training steps" if total else None


def _notes(run: ReportedRun) -> str:
    """Return notes that must come before any number: a simulated teacher, damaged files."""
    out = []
    if is_simulated(run.evaluation) or is_simulated(run.teacher):
        out.append(
            f'<div class="note" role="note"><p><b>{SIMULATED}.</b> The responses in training were written by a program '
            "that knows the ground truth and makes deliberate errors, not by a model. The scores show that the method "
            "runs end to end; they say nothing about a real teacher.</p></div>"
        )
    if run.notes:
        text = "".join(f"<p>{visible(note)}</p>" for note in run.notes)
        out.append(f'<div class="note" role="note">{text}</div>')
    return "".join(out)


def _alarms(run: ReportedRun) -> str:
    """Return the alarms of the training, each with advice; "" for a run without alarms."""
    out = []
    for alarm in run.alarms:
        condition = alarm.condition
        value = (
            f"{_short(alarm.stage)}, step {alarm.step}: {condition.metric} is {number(alarm.value)} over "
            f"{condition.window} steps, expected {condition.expected}"
        )
        out.append(
            f'<li><b>{visible(condition.title)}</b><p class="small muted">{visible(value)}</p>'
            f"<p>{visible(condition.meaning)}</p><p><b>What to do:</b> {visible(condition.advice)}</p></li>"
        )
    return f'<section class="note alarms"><h2>Alarms</h2><ul>{"".join(out)}</ul></section>' if out else ""


def _tiles(run: ReportedRun) -> str:
    """Return headline numbers: the final student's score, the change by each stage, and pair accuracy."""
    tiles = []
    names = student_names(run)
    evaluation = run.evaluation or {"students": {}, "differences": {}}
    students = [name for name in in_order(list(evaluation["students"]), STUDENT_ORDER) if name != "control"]
    if students and isinstance(evaluation["students"][students[-1]].get("closed"), Mapping):
        entry = evaluation["students"][students[-1]]["closed"]
        below = f"95% interval {interval(entry).partition(' ')[2]}, n = {number(value(entry, 'n'), 6)}"
        tiles.append(tile(f"Closed tasks, {names[students[-1]]}", f"{percent(value(entry, 'mean'))}%", below))
    for key, difference in evaluation["differences"].items():
        entry = difference.get("closed")
        if isinstance(entry, Mapping):
            kind, words = verdict(entry)
            shown = f"{percent(value(entry, 'mean'), sign=True)} points"
            low_high = interval(entry, sign=True).partition(" ")[2]
            tiles.append(
                tile(f"{difference_name(key, names)}, closed", shown, f"{low_high} {_WORDS.get(kind, words)}", kind)
            )
    for stage in ("distill", "warm_up"):
        curve = run.metrics.get(stage, {}).get("discriminator/pair_accuracy")
        if curve is not None:
            tiles.append(_pair_tile(stage, curve))
            break
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _pair_tile(stage: str, curve: Series) -> str:
    last = last_smoothed(curve)
    high = last > SEPARATED
    below = f"0.5 = undecided, warning above {SEPARATED}"
    if high:
        below = f"above {SEPARATED}: separated by cues other than quality?"
    return tile(f"Pair accuracy, end of {_short(stage).lower()}", number(last), below, "down" if high else "")


def _samples(run: ReportedRun, films: Films) -> str:
    head = '<h2 id="samples">Answers side by side</h2>'
    if not run.samples:
        return f'{head}<p class="muted">No answers were kept (no samples.jsonl).</p>'
    cards = sample_cards(run.samples, student_names(run), films)
    lead = "Held-out questions with frames of their video. The color of an answer's edge shows its score."
    return f'{head}<p class="muted">{lead}</p>{cards}'
