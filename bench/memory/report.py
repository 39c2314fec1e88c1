"""Write the tables of docs/memory.md from the records: `python -m bench.memory.report`."""

from __future__ import annotations

import textwrap

from bench.core.records import RESULTS, read_lines, sources

MIB = 2**20
NAMES = ("vision", "rollout", "discriminator", "reference", "policy", "optimizer")
# The default of micro_tokens, which no batch of these evaluations exceeds.
MOST_TOKENS = 32768


def plan_table() -> list[str]:
    """Return the table of planned and measured peaks, one line per configuration."""
    records = list({r["case"]: r for r in read_lines(RESULTS / "memory.jsonl")}.values())
    lines = ["| configuration | planned | measured | ratio |", "|---|---|---|---|"]
    for record in records:
        planned, measured = record["planned"] / MIB, record["peak"] / MIB
        lines.append(f"| {_name(record)} | {planned:,.0f} | {measured:,.0f} | {planned / measured:.2f} |")
    return [*lines, "", *textwrap.wrap(f"{sources(records)}.", 120)]


def evaluations_table() -> list[str]:
    """Return the table of planned and measured peaks of evaluations, one line per configuration."""
    records = list({r["case"]: r for r in read_lines(RESULTS / "evaluation_memory.jsonl")}.values())
    lines = ["| evaluation | planned | measured | ratio | by phase |", "|---|---|---|---|---|"]
    for record in records:
        settings, measured = record["settings"], record["measured"]
        videos = f"{settings['frames']} frames, prompts of {record['prompt_tokens']:,} tokens"
        parts = [f"{settings['prompts']} questions{' about a video' * (settings['each'] > 1)}", videos]
        parts += [f"{settings['response']} new tokens", settings["dtype"]]
        parts += [f"{settings['rollouts']} samples"] * bool(settings["rollouts"]) + ["reranker"] * settings["reranker"]
        parts += [f"`micro_tokens={settings['micro_tokens']}`"] * (settings["micro_tokens"] < MOST_TOKENS)
        planned, most = record["planned"] / MIB, record["peak"] / MIB
        phases = ", ".join(f"{name} {_planned(record, name) / size:.2f}" for name, size in measured.items())
        lines.append(f"| {', '.join(parts)} | {planned:,.0f} | {most:,.0f} | {planned / most:.2f} | {phases} |")
    return [*lines, "", *textwrap.wrap(f"{sources(records)}.", 120)]


def _planned(record: dict, phase: str) -> int:
    """Return the planned bytes of a measured phase, which may consist of several planned ones."""
    return max(sum(parts.values()) for name, parts in record["plan"].items() if name.startswith(phase))


def modes_table() -> list[str]:
    """Return the table of the discriminator modes."""
    (*_, record) = read_lines(RESULTS / "modes.jsonl")
    whole = record["variants"]["separate"]["states_bytes"]
    lines = ["| mode | states, MiB | share | time | " + " | ".join(NAMES) + " |", "|---|---|---|---|" + "---|" * 6]
    for mode, found in record["variants"].items():
        adapter = "adapters" if mode.endswith(", lora") else "full"
        name = f"`{mode.removesuffix(', lora')}`, {adapter}"
        seconds = " | ".join(f"{found['phases_s'][phase]:.2f}" for phase in NAMES)
        size = f"{found['states_bytes'] / MIB:.1f} | {found['states_bytes'] / whole:.0%}"
        lines.append(f"| {name} | {size} | {found['ratio']:.2f} | {seconds} |")
    return [*lines, "", f"{sources([record])}."]


def _name(record: dict) -> str:
    settings = record["settings"]
    adapter = "adapters" if settings["adapter"] == "lora" else "full"
    parts = [f"`{settings['mode']}`, {adapter}", settings["dtype"], settings["packing"], f"ZeRO-{settings['zero']}"]
    groups = settings["groups"]
    parts += ["recomputed layers"] * settings["checkpointing"]
    # Earlier records have neither.
    parts += ["nf4"] * (settings.get("quantize") == "nf4") + ["8-bit moments"] * (
        "8bit" in settings.get("optimizer", "")
    )
    return ", ".join([*parts, f"{groups} group{'s' * (groups > 1)}"])


if __name__ == "__main__":
    print("\n".join([*plan_table(), "", *evaluations_table(), "", *modes_table()]))
