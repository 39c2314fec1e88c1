"""Examine whether a recipe can train correctly on this machine, and how long it takes, before a run is started.

torchrun --standalone --nproc-per-node 1 -m rmsd_fast.doctor quickstart
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from typing import TYPE_CHECKING

from rmsd_fast import environment
from rmsd_fast.command_line import Parser
from rmsd_fast.process import run_main, tell

if TYPE_CHECKING:
    from rmsd_fast.stages.findings import Finding


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, examine and print. Heavy imports are delayed so that `--help` is fast."""
    arguments = _parse(argv)
    if reason := environment.why_not():
        tell(f"rmsd_fast.doctor: {reason}")
        return 2
    from rmsd_fast.config import UserError
    from rmsd_fast.settings import load_settings

    try:
        settings = load_settings(arguments.recipe, arguments.overrides)
    except UserError as error:
        tell(f"rmsd_fast.doctor: {error}")
        return 2
    from rmsd_fast.program import run_program
    from rmsd_fast.stages.checkup import examine

    findings: list[Finding] = []

    def work(world, stop) -> None:
        def show(finding: Finding) -> None:
            findings.append(finding)
            if world.is_main and not arguments.json:
                print("\n".join(finding.lines()), flush=True)
            stop.check()

        examine(settings, world, arguments.questions, show)

    code = run_program("rmsd_fast.doctor", settings, work, trains=True)
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process and arguments.json:
        print(_json(findings))
    if code:
        return code
    if main_process and not arguments.json:
        print(_verdict(findings))
    return int(any(finding.status == "fault" for finding in findings))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="rmsd_fast.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit code: 0 = no fault, 1 = at least one fault, 2 = the examination could not be completed",
    )
    parser.add_argument("recipe", help="YAML file or name of a recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.field=value", help="settings to change")
    parser.add_argument(
        "--questions",
        type=_count,
        metavar="N",
        help="questions per process that are examined (default: those of one batch of rollouts)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser.parse_intermixed_args(argv)


def _count(text: str) -> int:
    if text.isdecimal() and 0 < int(text) < 10_000:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number of questions from 1 to 9,999, got {text!r}")


def _json(findings: list[Finding]) -> str:
    def plain(value: float | int | str | None) -> float | int | str | None:
        """Replace NaN and infinity, which JSON does not have."""
        return None if isinstance(value, float) and not math.isfinite(value) else value

    records = [vars(f) | {"numbers": {name: plain(value) for name, value in f.numbers.items()}} for f in findings]
    return json.dumps({"healthy": not any(f.status == "fault" for f in findings), "findings": records}, indent=2)


def _verdict(findings: list[Finding]) -> str:
    names = {status: [f.name for f in findings if f.status == status] for status in ("fault", "warning", "skipped")}
    if names["fault"]:
        return f"not healthy: {', '.join(names['fault'])}"
    rest = [f"{status}: {', '.join(of_status)}" for status, of_status in names.items() if of_status]
    return "; ".join(["no fault", *rest]) if rest else "healthy"


if __name__ == "__main__":
    code = run_main(main)
    if "torch" not in sys.modules:
        sys.exit(code)
    from rmsd_fast.runtime.process_group import exit_process

    exit_process(code)
