"""The one writer of Markdown and charts: pages of the committed records, summaries of bench.cuda, tables on a terminal.

    python -m bench.core.report [--results bench/results] [--hardware PART_OF_ITS_NAME]     # all pages and charts
    python -m bench.core.report bench/results/<gpu>-<date>                                  # the summary of a CUDA run

A page or chart says nothing that is not in the records. A chart has a group of bars per case and two columns: times,
those of the base set to 1, and peak memory. Bars that would not fit are cut and carry their number.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from bench.core.goals import HEADS, MET, MISSED, NOT_MEASURED, counted, verdicts
from bench.core.measure import EAGER, GEMMS, OURS, main_time
from bench.core.metrics import STEP_ONE
from bench.core.records import RECORDS, RESULTS, case_of, load, load_run, read_lines, sources
from rmsd_fast.report_page.style import svg_style
from rmsd_fast.report_page.svg import number, ticks

# Phases of a step that read tokens.
PASSES = ("vision", "discriminator", "reference", "policy")
_PHASES = ("vision", "rollout", "discriminator", "reference", "policy", "optimizer")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(own: dict, key: str, digits: int = 0) -> str:
    return f"{own[key]:,.{digits}f}" if own.get(key) is not None else "-"


# A case: what the terminal shows as soon as it is measured, and summaries repeat.


def case_table(record: dict) -> str:
    """A line per variant."""
    if record["bench"] == "media":
        return media_table(record["part"], [record])
    if any("passes_s" in own for own in record["variants"].values()):
        return _step_table(record)
    rows, base = [], main_time(record["variants"][record["baseline"]])
    for name, own in record["variants"].items():
        total = own.get("both") or own["forward"]
        parts = [f"{own[part]['median_ms']:.3f}" if part in own else "-" for part in ("forward", "backward")]
        share = f"{own['share_of_gemms']:.0%}" if "share_of_gemms" in own and name != GEMMS else "-"
        spread = f"{total['p20_ms']:.3f}..{total['p80_ms']:.3f}"
        times = (*parts, f"{total['median_ms']:.3f}", spread, f"{total['median_ms'] / base:.2f}", share)
        # One call without warm-up, for memory: it counts as no measurement.
        name += " *" * bool(own.get("memory_pass_only"))
        rows.append((name, *times, *(_number(own, key) for key in _NUMBERS), own["rounds"]))
    head = ("variant", "forward", "backward", "ms", "p20..p80", f"/ {record['baseline']}", "of GEMMs")
    return table((*head, *_NUMBERS.values(), "n"), rows)


_NUMBERS = dict(tflop_per_s="TFLOP/s", gb_per_s="GB/s", peak_mib="peak MiB", peak_beyond_gradients_mib="less gradients")
_NUMBERS |= dict(tokens_per_s="tokens/s", launches_per_token="launches/token")


def _step_table(record: dict) -> str:
    """A whole step by phase. Seconds; shares of the peak where one is known."""
    rows, base = [], record["variants"][record["baseline"]]
    for name, own in record["variants"].items():
        used, of_gemm = own["utilisation"], own["utilisation_of_measured_gemm"]
        shares = ["-" if share is None else f"{share:.1%}" for share in (*used.values(), of_gemm["whole"])]
        seconds = [*(own["phases_s"].get(phase, 0.0) for phase in PASSES), own["passes_s"]]
        times = [f"{s:.3f}" for s in seconds] + [f"{own['passes_s'] / base['passes_s']:.2f}"]
        times += [_number(own, key, 3) for key in ("predicted_s", "optimizer_s", "whole_s")]
        rows.append((name, *times, *shares, f"{own['peak_mib'] / 1024:.2f}", own["rounds"]))
    head = ("variant", *(f"{phase} s" for phase in PASSES), "passes s", f"/ {record['baseline']}", "predicted s")
    used = ("optimizers s", "whole s", "passes of peak", "whole of peak", "whole of GEMM rate", "peak GiB", "n")
    return table((*head, *used), rows)


def case_text(record: dict) -> str:
    """The case with its remarks, and with the variants that did not run."""
    lines = [f"## {record['bench']} {case_of(record)} ({record['device']})", "", case_table(record)]
    remarks = record.get("remarks", {}) | {n: f"not run: {why}" for n, why in record.get("not_run", {}).items()}
    return "\n".join([*lines, "", *(f"- {name}: {text}" for name, text in remarks.items())]).rstrip()


# Charts.


class Group(NamedTuple):
    """The bars of a case: name, time over the base, MiB or None; whether they are ours."""

    title: str
    rows: list[tuple[str, float, float | None, bool]]


_WIDTH, _LABEL, _BAR, _ROW, _GAP, _TOP = 880, 190, 300, 19, 46, 108
_RIGHT = _LABEL + _BAR + 60


def draw(title: str, source: str, columns: tuple[str, str], groups: list[Group], most_times: float | None) -> str:
    """SVG text. most_times: longer bars of time are cut.

    Raises:
        ValueError: there is no group.
    """
    if not groups:
        raise ValueError(f"{title}: expected at least one case; run pytest bench/ --record bench/results first")
    body, y = [], _TOP
    for group in groups:
        body.append(_bars(group, y, most_times))
        y += len(group.rows) * _ROW + _GAP
    height = y - 10
    head = [
        f'<rect class="board" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="10"/>',
        f'<text class="th" x="18" y="30">{escape(title)}</text>',
        f'<text class="t" x="18" y="48">{escape(source)}</text>',
        '<text class="t" x="18" y="64">medians, lower is better; * one call without warm-up</text>',
        *(
            f'<text class="tb" x="{x}" y="88">{escape(text)}</text>'
            for x, text in zip((_LABEL, _RIGHT), columns, strict=True)
        ),
    ]
    sentences = (f"{g.title}: " + ", ".join(f"{name} {times:.2f}" for name, times, *_ in g.rows) for g in groups)
    label = f"{title}; {columns[0]}: " + "; ".join(sentences)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(label, quote=True)}"><style>{svg_style()}</style>{"".join(head)}{"".join(body)}</svg>\n'
    )


def _bars(group: Group, y: float, most_times: float | None) -> str:
    longest = max(times for _, times, *_ in group.rows) * 1.1
    most = longest if most_times is None else min(most_times, longest)
    most_mib = max((mib or 0.0 for _, _, mib, _ in group.rows), default=0.0) * 1.1 or 1.0
    height = len(group.rows) * _ROW
    out = [f'<text class="tb" x="18" y="{y + 6:.1f}">{escape(group.title)}</text>']
    y += 14
    for x, value in ((_LABEL, most), (_RIGHT, most_mib)):
        for tick in ticks(0.0, value):
            at = x + tick / value * _BAR
            out.append(f'<path class="g" d="M{at:.1f} {y}V{y + height:.1f}"/>')
            out.append(
                f'<text class="t" x="{at:.1f}" y="{y + height + 12:.1f}" text-anchor="middle">{number(tick)}</text>'
            )
    for index, (name, times, mib, ours) in enumerate(group.rows):
        top, color = y + index * _ROW, 1 if ours else 6
        out.append(f'<text class="t" x="{_LABEL - 8}" y="{top + 13:.1f}" text-anchor="end">{escape(name)}</text>')
        out.append(_bar(_LABEL, top, times / most, f"{times:.2f}" if times < 10 else f"{times:.0f}", color))
        if mib is not None:
            out.append(_bar(_RIGHT, top, mib / most_mib, number(mib), color))
    # The base itself, over the bars.
    out.append(f'<path class="fl" d="M{_LABEL + _BAR / most:.1f} {y}v{height}"/>')
    return "".join(out)


def _bar(x: float, top: float, share: float, text: str, color: int) -> str:
    """A bar of a share of the full length; a longer one is cut with an open end."""
    width = min(share, 1.0) * _BAR
    shape = f'<rect class="f{color}" x="{x:.1f}" y="{top + 3:.1f}" width="{max(width, 1.0):.1f}" height="{_ROW - 6}"/>'
    if share > 1.0:
        shape += f'<path class="g" style="stroke-width:3" d="M{x + _BAR - 14:.1f} {top + _ROW - 1:.1f}l8 {2 - _ROW}"/>'
    return shape + f'<text class="t" x="{x + width + 5:.1f}" y="{top + 13:.1f}">{text}</text>'


# The fused losses.


def heads_chart(records: list[dict]) -> str:
    """For each loss and dtype, select the longest case with a trainable head, no mask and a random softmax."""
    longest: dict[tuple[int, str], dict] = {}
    for record in sorted((r for r in records if r["bench"] in HEADS), key=lambda r: (r["shape"]["D"], r["shape"]["T"])):
        plain = (record.get("mask_percent"), record.get("softmax"), record.get("head")) == (0, "random", "trainable")
        if plain and not record["case"].endswith("-conditions"):
            longest[HEADS.index(record["bench"]), record["dtype"]] = record
    chosen, groups = [longest[key] for key in sorted(longest)], []
    for record in chosen:
        variants, base = record["variants"], main_time(record["variants"][GEMMS])
        rows = []
        for name, own in variants.items():
            label = name + " *" * bool(own.get("memory_pass_only"))
            numbers = (main_time(own) / base, own.get("peak_beyond_gradients_mib"))
            rows += [(label, *numbers, name == record["baseline"])] * (name != GEMMS)
        title = f"{record['bench']}, {record['dtype']}, T = {record['shape']['T']}, D = {record['shape']['D']}"
        groups.append(Group(title, sorted(rows, key=lambda row: (not row[3], row[1]))))
    title = "Fused losses: forward and backward, V = 151,936"
    columns = ("time, bare GEMMs = 1", "peak memory beyond gradients, MiB")
    return draw(title, sources(chosen) if chosen else "", columns, groups, 4.0)


def heads_page(records: list[dict]) -> str:
    """All cases, then ours by condition."""
    compared, by_condition = [], []
    names = ("50% masked", "90% masked", "peaked", "frozen head")
    for record in records:
        variants, ours = record["variants"], record["variants"][OURS]
        if record["case"].endswith("-conditions"):
            times = [f"{variants[name]['times_base']:.2f}" for name in names]
            by_condition.append((*_names(record), *times, ours["rounds"]))
            continue
        peers = {
            name: main_time(own) / main_time(ours)
            for name, own in variants.items()
            if name not in (GEMMS, EAGER) and not name.startswith(OURS) and not own.get("memory_pass_only")
        }
        fastest, eager = min(peers, key=peers.get, default=None), variants.get(EAGER)
        memory = [
            f"{ours[key]:,.0f} / {eager[key]:,.0f} ({ours[key] / max(eager[key], 1e-9):.2f})"
            if eager and key in ours and key in eager
            else "-"
            for key in ("peak_mib", "peak_beyond_gradients_mib")
        ]
        rate = f"{ours['share_of_gemms']:.0%}" if "share_of_gemms" in ours else "-"
        over = f"{main_time(eager) / main_time(ours):.2f}" if eager else "-"
        best = f"{peers[fastest]:.2f} ({fastest})" if fastest else "-"
        compared.append((*_names(record), rate, over, best, *memory, ours["rounds"]))
    memory = ("peak, ours / eager MiB", "beyond gradients")
    legend = (
        "GEMMs' rate: share of the rate of the bare matrix products in the same rounds (8TDV for divergences: the "
        "teacher has a head too). Eager and the fastest peer (torch.compile or a library; a single cold call does not "
        "count): their time, ours = 1. Peak: memory that a call adds, then the same less the gradients that both "
        "sides produce. Conditions: time, without = 1. Rounds: of ours. Medians: forward and backward, or scoring. "
    )
    first = table(("loss", "case", "GEMMs' rate", "eager", "fastest peer", *memory, "rounds"), compared)
    second = table(("loss", "case", *names, "rounds"), by_condition)
    return f"{first}\n\n{second}\n\n{legend}{sources(records)}.\n"


def _names(record: dict) -> tuple[str, str]:
    """Loss and case in words; the usual conditions (nothing masked, random softmax, trainable head) are left out."""
    words = [record["dtype"], *(f"{axis} {size}" for axis, size in record["shape"].items() if axis != "V")]
    words += [f"{record['mask_percent']}% masked"] if record.get("mask_percent") else []
    words += [record["softmax"]] if record.get("softmax", "random") != "random" else []
    heads = {"trainable": [], "frozen": ["frozen head"], "score": ["scoring"]}
    words += heads[record.get("head", "trainable")] + [record[key] for key in ("kind", "mode") if key in record]
    return record["bench"].removeprefix("linear_").replace("_", " "), ", ".join(words)


# Shared prefixes and whole steps.


def sharing_chart(records: list[dict]) -> str:
    """Whole steps over K, those cases in which all ways were measured over K."""
    words = {"shared": "ours", "padded": "padded, video once", "copies": "copy per response"}
    groups, drawn = [], []
    for record in records:
        found = []
        for name, own in record["variants"].items():
            if matched := re.fullmatch(r"(\w+) K=(\d+) N=8", name):
                found.append((list(words).index(matched[1]), int(matched[2]), own))
        if STEP_ONE not in record["variants"] or sum(way == 2 for way, *_ in found) < 2:
            continue
        base, drawn = main_time(record["variants"][STEP_ONE]), [*drawn, record]
        rows = [
            (f"{list(words.values())[way]}, K={k}", main_time(own) / base, own.get("peak_mib"), way == 0)
            for way, k, own in sorted(found, key=lambda row: row[:2])
        ]
        shape = record["shape"]
        groups.append(Group(f"{shape['P']} prompt tokens, responses of {shape['R']}, N = 8 rollouts", rows))
    columns = ("time, ours at K=1 = 1", "peak memory of the step, MiB")
    title = "A whole stage-2 step over K teacher responses"
    return draw(title, sources(drawn) if drawn else "", columns, groups, None)


def sharing_page(records: list[dict]) -> str:
    """Whole steps by phase, then single passes, each measured against predicted."""
    steps, passes = [], []
    for record in records:
        whole, variants = record["bench"] == "step", record["variants"]
        base = variants[STEP_ONE if whole and STEP_ONE in variants else record["baseline"]]
        sizes = f"{record['shape']['P']}, {record['shape']['R']}"
        for name, own in variants.items():
            time = f"{main_time(own) / main_time(base):.2f}"
            predicted = f"{own['predicted_s'] / base['predicted_s']:.2f}" if "predicted_s" in own else "-"
            if not whole:
                memory = _number(own, "peak_beyond_gradients_mib")
                passes.append((sizes, name, time, predicted, memory, own["rounds"]))
                continue
            times = own.get("phases_s")
            phases = [f"{times.get(p, 0.0) / main_time(base) * 1e3:.2f}" if times else "-" for p in _PHASES]
            passed = own["training"]["median_ms"] / base["training"]["median_ms"] if "training" in own else None
            training = "-" if passed is None else f"{passed:.2f}"
            steps.append((sizes, name, time, *phases, training, predicted, _number(own, "peak_mib")))
    legend = (
        f"First table: whole stage-2 steps; step and phases over the step of `{STEP_ONE}`, training (vision, "
        f"discriminator, reference, policy) and its prediction over those of `{STEP_ONE}`. Second: one forward and "
        "backward of the policy on one group; time and prediction over `shared M=12`. Predicted: counted FLOPs at the "
        "rates of matrix products and of attention measured in the same process. Medians. "
    )
    what, memory = ("prompt, response", "variant"), "peak MiB beyond gradients"
    first = table((*what, "step", *_PHASES, "training", "predicted", "peak MiB"), steps)
    second = table((*what, "time", "predicted", memory, "rounds"), passes)
    return f"{first}\n\n{second}\n\n{legend}{sources(records)}.\n"


# Rollouts.


def rollout_page(records: list[dict]) -> str:
    """Each way by case, with the part that is decoding."""
    rows = []
    for record in records:
        shape, ways = record["shape"], record["variants"]
        for name, own in ways.items():
            # The others are parts of a way, or its weights.
            if "tokens_per_s" in own:
                times = f"{main_time(own) / main_time(ways[OURS]):.2f} ({own['times_ours_by_round']:.2f})"
                sent = ways.get(f"{name}, weights")
                step, operations = f"{own['decode_ms_per_token']:.2f}", f"{own['launches_per_token']:.0f}"
                row = (name, f"{own['tokens_per_s']:,.0f}", times, step, operations)
                rows.append(
                    (*(shape[key] for key in "PNR"), *row, f"{main_time(sent):.0f}" if sent else "", own["rounds"])
                )
    head = ("prompt", "N", "new tokens", "way", "tokens/s", "time over ours (by round)", "ms per step")
    legend = (
        "Tokens/s: N responses in the whole call, prefill included. ms per step: the call less a call for one token, "
        "by further token. Operations: those of a decode step that would launch kernels on a GPU. Weights: all weights "
        "sent to vLLM and compared, which is not part of the call. Medians. Greedy tokens of all ways were equal "
        "before. "
    )
    found = [(v.status, v.where.removeprefix("rollout "), v.what) for v in verdicts(records, "cpu", ["rollout"])]
    first = table((*head, "operations per step", "weights, ms", "rounds"), rows)
    goals = table(("verdict", "case", "found"), found)
    return f"{first}\n\n**Goals**\n\n{goals}\n\n{legend}{sources(records)}.\n"


# Self-teachers.


def teacher_page(records: list[dict]) -> str:
    """What each kind of self-teacher adds to a step."""
    rows = []
    for record in records:
        shape, base = record["shape"], main_time(record["variants"][record["baseline"]])
        for name, own in record["variants"].items():
            phases = [f"{1e3 * own['phases_s'].get(phase, 0.0):.0f}" for phase in ("teacher", "reference", "policy")]
            extra = "-" if name == record["baseline"] else f"{own['extra_share']:.1%}"
            rows.append(
                (*(shape[key] for key in ("P", "R", "hint")), name, *phases, f"{base:.0f}", extra, own["rounds"])
            )
    head = ("prompt", "response", "hint", "self-teacher", "teacher ms", "reference ms", "policy ms", "plain step ms")
    legend = (
        "A step of stage 2 with one question, N = 8 rollouts and K = 4 teacher answers, by the small student. Extra: "
        "teacher and reference beyond the reference of a plain step, over a whole plain step. Processor time, medians. "
    )
    found = [
        (v.status, v.where.removeprefix("self_teacher "), v.what) for v in verdicts(records, "cpu", ["self_teacher"])
    ]
    goals = table(("verdict", "case", "found"), found)
    return f"{table((*head, 'extra', 'rounds'), rows)}\n\n**Goals**\n\n{goals}\n\n{legend}{sources(records)}.\n"


# Evaluations of several questions per video.


def evaluation_page(records: list[dict]) -> str:
    """An evaluation against one generate() per question, and what each kind of sharing gains."""
    parts = []
    for record in records:
        rows, shape, before = [], record["shape"], None
        for name, own in record["variants"].items():
            # The first row is ours as a whole, and each row after the second adds one part.
            gain = f"{before / main_time(own):.2f}" if before is not None else ""
            before = main_time(own) if name != OURS else None
            times = f"{main_time(own) / main_time(record['variants'][OURS]):.2f} ({own['times_ours_by_round']:.2f})"
            rows.append(
                (name, f"{main_time(own) / 1e3:.1f}", f"{own['questions_per_s']:.1f}", times, gain, own["rounds"])
            )
        title = (
            f"{shape['questions']} questions about {shape['videos']} videos of {shape['frames']} frames, prompts of "
            f"{record['prompt_tokens']} tokens, {shape['R']} new tokens each"
        )
        head = ("way", "s", "questions/s", "time over ours (by round)", "times faster than the row above", "rounds")
        parts.append(f"{title}.\n\n{table(head, rows)}")
    legend = (
        "Ours is `answer_questions` from files to scores, with decoding in worker processes. Generate is transformers' "
        "`generate` for one question at a time, with decoding. The rows below it run in one thread without workers: "
        "batched does everything for each question, in batches of 16, and the others add one kind of sharing each. "
        "Medians of interleaved rounds. The greedy tokens of all ways are equal, for every question. "
    )
    found = [(v.status, v.where.removeprefix("evaluation "), v.what) for v in verdicts(records, "cpu", ["evaluation"])]
    goals = table(("verdict", "case", "found"), found)
    return "\n\n".join(parts) + f"\n\n**Goals**\n\n{goals}\n\n{legend}{sources(records)}.\n"


# The media path.

_TITLES = {
    "decode": "A file's chosen frames",
    "preprocess": "720p frames to patches",
    "file": "File to patches",
    "ahead": "How long a step waits for its data",
    "epochs": "Data of an epoch",
    "flat": "Many videos through one reader",
    "cuda": "File to patches on CUDA",
}
_WAITS = dict(first_wait_s="first step", epoch_1_wait_s="epoch 1", epoch_2_wait_s="epoch 2")
_SECONDS = {
    "ahead": _WAITS | {"compute_s": "step's own work"},
    "epochs": dict(epoch_1_s="epoch 1", epoch_2_s="epoch 2"),
}
_MARKS = dict(videos="videos", own_mib="process MiB", workers_mib="workers MiB")
_MARKS |= dict(descriptors="descriptors", processes="processes")


def media_table(part: str, records: list[dict]) -> str:
    """The cases of a part."""
    sides = [(record, name, own) for record in records for name, own in record["variants"].items()]
    if part == "flat":
        marks = [mark for _, _, own in sides for mark in own["marks"]]
        return table(tuple(_MARKS.values()), [[f"{mark[key]:.0f}" for key in _MARKS] for mark in marks])
    if part in _SECONDS:
        columns, rows = _SECONDS[part], []
        for record, name, own in sides:
            seconds = [own[key]["median"] for key in columns]
            faster = [f"{seconds[0] / seconds[1]:.1f}"] * (part == "epochs")
            rows.append((_shape(record), name, *(f"{s:.3f} s" for s in seconds), *faster, own["rounds"]))
        return table(("case", "variant", *columns.values(), *["times faster"] * (part == "epochs"), "n"), rows)
    rows = []
    for record, name, own in sides:
        cpu, base = own["cpu_s"], record["variants"][OURS]["cpu_s"]["median"]
        times = (f"{cpu['median']:.3f}", f"{cpu['p20']:.3f}..{cpu['p80']:.3f}", f"{own['wall_s']['median']:.3f}")
        far = _difference(record["differences"].get(name))
        memory = _number(own, "beyond_output_mib", 1)
        rows.append((_shape(record), name, *times, f"{cpu['median'] / base:.2f}", memory, far, own["rounds"]))
    head = ("case", "variant", "CPU s", "p20..p80", "wall s", "/ ours", "MiB beside output", "difference", "n")
    return table(head, rows)


def _difference(own: dict | None) -> str:
    if own is None:
        return "-"
    if "worst_frame" in own:
        return f"mean {own['mean']:.2f}, worst frame {own['worst_frame']:.2f} levels"
    return f"{own['levels']} levels, {own['values']:.1e}"


def _shape(record: dict) -> str:
    return ", ".join(f"{value} {key}" if key != "GOP" else f"GOP {value}" for key, value in record["shape"].items())


def media_page(records: list[dict]) -> str:
    """A table for each part, the variants that did not run, the goals, and what the numbers are."""
    parts = []
    for part, title in _TITLES.items():
        own = [record for record in records if record["part"] == part]
        parts += [f"**{title}**", media_table(part, own)] if own else []
    missing = sorted({(name, why) for record in records for name, why in record["not_run"].items()})
    parts += ["\n".join(f"- {name}: not run: {why}" for name, why in missing)] if missing else []
    found = list(verdicts(records, "cpu", ["media"]))
    rows = [(status, where.removeprefix("media "), what) for status, where, what in found]
    parts += ["**Goals**", table(("verdict", "case", "found"), rows), f"{counted(found)}."]
    libraries = sorted({text for record in records for text in record["libraries"].values() if text})
    legend = (
        "CPU s: of all threads and processes, with one thread where a library can be told so; medians over n rounds "
        "in turned order, each variant in a process of its own that has its imports done. MiB beside output: peak of a "
        "call in all its processes, less the frames or patches that it returns. Difference: of decoders, the mean over "
        "a frame against ours in levels of 256; of patches, the largest against ours before and after normalisation. "
    )
    return "\n\n".join([*parts, f"{legend}{sources(records)}; {'; '.join(libraries)}."]) + "\n"


# A run of bench.cuda.

LEGEND = """## Legend

K teacher responses and N rollouts of R tokens each to a prompt of P tokens; M responses; T tokens, D hidden; B pairs of
length L. n: rounds; times are medians, p20..p80 their spread. of GEMMs: time of the bare matrix products over the time
of the variant. less gradients: peak memory beyond the gradients that every variant has to write.

step: random weights, one GPU, rollouts given and not timed. passes: vision, discriminator, reference, policy;
predicted: the passes, by counted FLOPs at the measured rates; of peak: FLOPs of shared prompts, each counted once, over
the datasheet's dense bf16 rate; peak GiB: weights, gradients and activations of all three models."""


def summary(records: Path, *, tables: bool = True) -> str:
    """Of a results.jsonl, complete or not. Without tables it fits a terminal: goals, sections, failures, steps."""
    of: dict[str, list[dict]] = defaultdict(list)
    for line in read_lines(records):
        of[line["bench"]].append(line)
    cases = load_run(records)
    rehearsal = any(run["device"] != "cuda" for run in of["run"])
    parts = [_head(of, cases, rehearsal)]
    if not rehearsal:
        found = sorted(verdicts(cases, "cuda"), key=lambda v: (MISSED, NOT_MEASURED, MET).index(v.status))
        parts.append(f"## Goals: {counted(found)}\n\n" + table(("verdict", "case", "found"), found))
    parts += [_sections(of["section"], of["end"]), _tests(of["section"])]
    for case in cases:
        if tables or case["bench"] == "step":
            parts += [f"## {case['bench']} {case_of(case)}", case_table(case), *_findings(case)]
    parts += [_left_out(of, cases)] if tables else []
    return "\n\n".join([*(part for part in parts if part), LEGEND]) + "\n"


def _head(of: dict[str, list[dict]], cases: list[dict], rehearsal: bool) -> str:
    parts = ["# Rehearsal at toy sizes: nothing here is a measurement" if rehearsal else "# Measured on CUDA"]
    for run in of["run"][-1:]:
        parts.append(f"{run['name'] or 'CPU'}, {run['started']}, {run['minutes']:g} minutes at most.")
    for record in of["machine"][-1:]:
        versions = ("torch", "cuda", "triton", "transformers", "deepspeed", "python", "commit")
        facts = record["machine"] | {name: record[name] for name in versions if name in record}
        parts.append(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()) + ".")
        rates = record["ceilings"].items()
        found = ", ".join(f"{name.replace('_', ' ').replace(' per ', '/')} {value:.3g}" for name, value in rates)
        parts.append(f"Ceilings, measured first: {found}.")
    if not of["machine"] and cases:
        parts.append(f"Measured on {sources(cases)}.")
    return "\n\n".join(parts)


def _sections(sections: list[dict], ends: list[dict]) -> str:
    rows = []
    for section in sections:
        tests = Counter(test["outcome"] for test in section["tests"])
        counts = ", ".join(f"{count} {outcome}" for outcome, count in tests.items())
        rows.append((section["section"], section["outcome"], f"{section['seconds']:.0f}", counts, section["reason"]))
    text = "## Sections\n\n" + table(("section", "outcome", "s", "tests", "remark"), rows)
    for last in ends[-1:]:
        text += f"\n\nWhole run: {last['seconds']:.0f} s."
        text += "".join(f"\n\n**FAILED**: {fault}" for fault in last["faults"])
    return text if ends else text + "\n\nThe run has not ended."


def _tests(sections: list[dict]) -> str:
    """Failures one by one; skipped tests by reason."""
    tests = [(section["section"], test) for section in sections for test in section["tests"]]
    failed = [(section, test["test"], test["reason"]) for section, test in tests if test["outcome"] == "failed"]
    skipped = Counter((section, test["reason"]) for section, test in tests if test["outcome"] == "skipped")
    rows = [(section, count, reason) for (section, reason), count in skipped.items()]
    parts = [("Failed", ("section", "test", "reason"), failed), ("Skipped", ("section", "tests", "reason"), rows)]
    return "\n\n".join(f"## {title}\n\n{table(head, own)}" for title, head, own in parts if own)


def _findings(record: dict) -> list[str]:
    """What some records say beside times: launches, parts of a call, a floor; of a step, how it was measured."""
    found = [f"{name}: {text}." for name, text in record.get("remarks", {}).items() if name != "optimizer"]
    for name, own in record.get("launches", {}).items():
        found.append(f"{name}: {own['count']} kernels, {own['device_us']:.1f} µs on the device.")
    for name, own in record.get("parts", {}).items():
        found.append(f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in own.items())}.")
    if record.get("floor"):
        floor = ", ".join(f"{key} {value:.3f}" for key, value in record["floor"].items())
        found.append(f"Our pairs at the rate of causal flash take ..._ms; ours takes ..._times that: {floor}.")
    if record.get("ended", "complete") != "complete":
        found.append(f"Ended early: {record['ended']}.")
    if "liger" in record:
        rates = ", ".join(f"{name} {r / 1e12:.3g}" for name, r in record["rates"].items())
        found.append(f"Optimizers: {record['optimizer']['how']}. Liger: {record['liger']}. TFLOP/s: {rates}.")
    return found


def _left_out(of: dict[str, list[dict]], cases: list[dict]) -> str:
    """Sections, packages, and variants of any case that did not run, each with its reason."""
    rows = [("section", s["section"], s["reason"]) for s in of["section"] if s["outcome"] == "left out"]
    for run in of["run"]:
        rows += [("section", name, "not among --only") for name in run["not_chosen"]]
        rows += [("package", name, f"not in the folder: {why}") for name, why in run["packages"]["left_out"].items()]
    for machine in of["machine"][-1:]:
        rows += [("package", name, f"not installed: {why}") for name, why in machine["not_installed"].items()]
    reasons: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for case in cases:
        for name, why in case.get("not_run", {}).items():
            reasons[case["bench"], why][name] = None
    rows += [(bench, "; ".join(names), why) for (bench, why), names in reasons.items()]
    return "## Left out\n\n" + table(("what", "name", "reason"), rows) if rows else ""


# Page, chart and their writers, by subject.
PAGES = {
    "heads": {"fused-losses.md": heads_page, "fused-losses.svg": heads_chart},
    "sharing": {"shared-prefix.md": sharing_page, "shared-prefix.svg": sharing_chart},
    "rollouts": {"rollout.md": rollout_page},
    "evaluations": {"evaluation.md": evaluation_page},
    "teachers": {"self-teacher.md": teacher_page},
    "media": {"media.md": media_page},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run of bench.cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, help="records, pages and charts")
    parser.add_argument("--hardware", help="part of the name of the machine whose records count")
    options = parser.parse_args()
    if options.run is not None:
        if not (options.run / RECORDS).is_file():
            parser.error(f"{options.run}: expected a folder of bench.cuda, with {RECORDS}")
        written = {options.run / "summary.md": summary(options.run / RECORDS)}
    else:
        written = {}
        for subject, pages in PAGES.items():
            records = load(options.results, subject, hardware=options.hardware)
            written |= {options.results / name: write(records) for name, write in pages.items() if records}
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
