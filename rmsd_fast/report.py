"""Draw the report of a run: one self-contained HTML page, or one SVG picture of the evaluation.

python -m rmsd_fast.report runs/quickstart-20260101-120000
python -m rmsd_fast.report runs/quickstart-20260101-120000 --picture accuracy.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rmsd_fast import environment
from rmsd_fast.files import write_text_atomic
from rmsd_fast.report_page.evaluation import evaluation_picture
from rmsd_fast.report_page.page import render
from rmsd_fast.report_page.run_folder import ReportError, load_run

__all__ = ["ReportError", "main", "write_picture", "write_report"]


def write_report(run_folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run and return its path.

    Works for a run at any point: stages, evaluation, samples and teacher statistics that are not there yet are named as
    missing. A video that cannot be read becomes a placeholder.

    Args:
        run_folder: folder that training made.
        output: file to write; default `report.html` in the folder. It appears whole or not at all.
    Raises:
        ReportError: the folder is no run, or a file in it is damaged.
    """
    page = render(load_run(run_folder))
    return _write(Path(output) if output else Path(run_folder) / "report.html", page)


def write_picture(run_folder: str | Path, output: str | Path) -> Path:
    """Write the picture of a run's evaluation as SVG, legible on white and on dark pages, and return its path.

    Raises:
        ReportError: the folder is no run, a file in it is damaged, or nothing was evaluated.
    """
    return _write(Path(output), evaluation_picture(load_run(run_folder)))


def _write(path: Path, text: str) -> Path:
    if path.is_dir() or not path.parent.is_dir():
        raise ReportError(f"{path}: expected a file name in a folder that exists; make the folder or name another file")
    write_text_atomic(path, text)
    return path


def main(argv: list[str] | None = None) -> int:
    if reason := environment.why_not(("omegaconf",)):
        print(f"rmsd_fast.report: {reason}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        prog="rmsd_fast.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/<name>-<time>")
    parser.add_argument("--output", type=Path, metavar="FILE", help="page to write; default <run>/report.html")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="write the evaluation picture, and no page")
    arguments = parser.parse_args(argv)
    if arguments.output and arguments.picture:
        parser.error("--output and --picture exclude each other: the first names the page, the second draws no page")
    try:
        if arguments.picture:
            path = write_picture(arguments.run, arguments.picture)
        else:
            path = write_report(arguments.run, arguments.output)
    except (ReportError, PermissionError) as error:
        print(f"rmsd_fast.report: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
