"""The Markdown summary of a run of bench.cuda: goals, sections, failures, a table per case, what was left out.

python -m bench.cuda_summary bench/results/<gpu>-<date>      # writes its summary.md anew
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from bench import cuda_goals
from bench.chart_media import part_table
from bench.measure import GEMMS, main_time
from bench.records import RECORDS, load_run, read_lines, sources
from bench.verdicts import MET, MISSED, NOT_MEASURED

PHASES = ("vision", "discriminator", "reference", "policy")
# Of a variant, where it has them.
_NUMBERS = {
    "tflop_per_s": "TFLOP/s",
    "gb_per_s": "GB/s",
    "peak_mib": "peak MiB",
    "peak_beyond_gradients_mib": "less gradients",
}


LEGEND = """## Legend

K teacher responses and N rollouts of R tokens each to a prompt of P tokens; M responses; T tokens, D hidden; B pairs of
length L. n: rounds; times are medians, p20..p80 their spread. of GEMMs: time of the bare matrix products over the time
of the variant. less gradients: peak memory beyond the gradients that all have to write.

step_4b: random weights, one GPU, rollouts given and not in the time. passes: vision, discriminator, reference, policy;
predicted: the passes, by counted FLOPs at the measured rates; of peak: FLOPs of shared prompts, each counted once, over
the datasheet's dense bf16 rate; peak GiB: weights, gradients and activations of all three models."""


def markdown(records: Path, *, tables: bool = True) -> str:
    """Of a results.jsonl, complete or not; without tables what fits a terminal: goals, sections, failures, steps."""
    of: dict[str, list[dict]] = defaultdict(list)
    for line in read_lines(records):
        of[line["bench"]].append(line)
    cases = load_run(records)
    rehearsal = any(run["device"] != "cuda" for run in of["run"])
    parts = [_head(of, cases, rehearsal)]
    parts += [] if rehearsal else [_goals(cases)]
    parts += [_sections(of["section"], of["end"]), _tests(of["section"])]
    parts += [_case(case) for case in cases if tables or case["bench"] == "step_4b"]
    parts += [_left_out(of, cases)] if tables else []
    return "\n\n".join([*(part for part in parts if part), LEGEND]) + "\n"


def _table(*head: str, rows: Iterator[tuple] | list[tuple]) -> str:
    rows = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


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


def _goals(cases: list[dict]) -> str:
    found = list(cuda_goals.verdicts(cases))
    counts = Counter(verdict.status for verdict in found)
    rows = sorted(found, key=lambda verdict: (MISSED, NOT_MEASURED, MET).index(verdict.status))
    total = ", ".join(f"{counts[status]} {status}" for status in (MET, MISSED, NOT_MEASURED))
    return f"## Goals: {total}\n\n" + _table("verdict", "case", "found", rows=rows)


def _sections(sections: list[dict], ends: list[dict]) -> str:
    rows = []
    for section in sections:
        tests = Counter(test["outcome"] for test in section["tests"])
        counts = ", ".join(f"{count} {outcome}" for outcome, count in tests.items())
        rows.append((section["section"], section["outcome"], f"{section['seconds']:.0f}", counts, section["reason"]))
    text = "## Sections\n\n" + _table("section", "outcome", "s", "tests", "remark", rows=rows)
    for last in ends[-1:]:
        text += f"\n\nWhole run: {last['seconds']:.0f} s."
        text += "".join(f"\n\n**FAILED**: {fault}" for fault in last["faults"])
    return text if ends else text + "\n\nThe run has not ended."


def _tests(sections: list[dict]) -> str:
    """Failures one by one; skipped ones by reason."""
    failed = [(s["section"], t["test"], t["reason"]) for s in sections for t in s["tests"] if t["outcome"] == "failed"]
    skipped = Counter((s["section"], t["reason"]) for s in sections for t in s["tests"] if t["outcome"] == "skipped")
    parts = []
    if failed:
        parts.append("## Failed\n\n" + _table("section", "test", "reason", rows=failed))
    if skipped:
        rows = [(section, count, reason) for (section, reason), count in skipped.items()]
        parts.append("## Skipped\n\n" + _table("section", "tests", "reason", rows=rows))
    return "\n\n".join(parts)


def _case(record: dict) -> str:
    """A case of a benchmark: a line per variant."""
    bench = record["bench"]
    if bench == "media":
        return f"## media {record['name']}\n\n" + "\n".join(part_table(record["part"], [record]))
    title = f"## {bench} {record['case']}"
    if bench == "step_4b":
        return f"{title}\n\n{_steps(record)}"
    base = main_time(record["variants"][record["baseline"]])
    rows = []
    for name, own in record["variants"].items():
        total = own.get("both") or own["forward"]
        share = f"{own['share_of_gemms']:.0%}" if "share_of_gemms" in own and name != GEMMS else ""
        rows.append(
            (
                name,
                f"{total['median_ms']:.3f}",
                f"{total['p20_ms']:.3f}..{total['p80_ms']:.3f}",
                f"{total['median_ms'] / base:.2f}",
                share,
                *(f"{own[key]:,.0f}" if key in own else "" for key in _NUMBERS),
                own["rounds"],
            )
        )
    head = ("variant", "ms", "p20..p80", f"/ {record['baseline']}", "of GEMMs", *_NUMBERS.values(), "n")
    return "\n\n".join([title, _table(*head, rows=rows), *_findings(record)])


def _findings(record: dict) -> list[str]:
    """What some records say beside times: launches, parts of a call, a floor."""
    found = []
    for name, own in record.get("launches", {}).items():
        found.append(f"{name}: {own['count']} kernels, {own['device_us']:.1f} µs on the device.")
    for name, own in record.get("parts", {}).items():
        facts = ", ".join(f"{key} {value:.3g}" for key, value in own.items())
        found.append(f"{name}: {facts}.")
    if record.get("floor"):
        floor = ", ".join(f"{key} {value:.3f}" for key, value in record["floor"].items())
        found.append(f"Our pairs at the rate of causal flash take ..._ms; ours takes ..._times that: {floor}.")
    if record.get("ended", "complete") != "complete":
        found.append(f"Ended early: {record['ended']}.")
    return found


def _steps(record: dict) -> str:
    base = record["variants"][record["baseline"]]
    rows = []
    for name, own in record["variants"].items():
        shares = (
            own["utilisation"]["passes"],
            own["utilisation"]["whole"],
            own["utilisation_of_measured_gemm"]["whole"],
        )
        optimizer = own["optimizer_s"]
        rows.append(
            (
                name,
                *(f"{own['phases_s'].get(phase, 0.0):.3f}" for phase in PHASES),
                f"{own['passes_s']:.3f}",
                f"{own['passes_s'] / base['passes_s']:.2f}",
                f"{own['predicted_s']:.3f}",
                "?" if optimizer is None else f"{optimizer:.3f}",
                f"{own['whole_s']:.3f}",
                *("" if share is None else f"{share:.1%}" for share in shares),
                f"{own['peak_mib'] / 1024:.1f}",
                own["rounds"],
            )
        )
    head = ("variant", *(f"{phase} s" for phase in PHASES), "passes s", f"/ {record['baseline']}", "predicted s")
    used = ("both optimisers s", "whole s", "passes of peak", "whole of peak", "whole of GEMM rate", "peak GiB", "n")
    facts = {"Optimisers": record["optimizer"]["how"], **record["remarks"], "Liger": record["liger"]}
    facts["TFLOP/s measured beside"] = ", ".join(f"{name} {r / 1e12:.3g}" for name, r in record["rates"].items())
    text = "\n\n".join(f"{name}: {value}." for name, value in facts.items() if name != "optimizer")
    return f"{_table(*head, *used, rows=rows)}\n\n{text}"


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
    return "## Left out\n\n" + _table("what", "name", "reason", rows=rows) if rows else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    if not (given.folder / RECORDS).is_file():
        parser.error(f"{given.folder}: expected a folder of bench.cuda, with {RECORDS}")
    target = given.folder / "summary.md"
    target.write_text(markdown(given.folder / RECORDS), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
