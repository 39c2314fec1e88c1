"""Write the report of a run: one self-contained HTML page, or one SVG picture of the evaluation.

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
    """Write the report page of a run and return its path.

    The run does not have to be complete: the page lists missing stages, evaluations, samples and teacher statistics. A
    video that cannot be read is replaced by a placeholder.

    Args:
        run_folder: folder that training created.
        output: file to write; None = `report.html` in the run folder. The file is written atomically.
    Returns:
        The path of the page.
    Raises:
        ReportError: the folder is not a run, or a file in it is damaged.
    """
    page = render(load_run(run_folder))
    return _write(Path(output) if output else Path(run_folder) / "report.html", page)


def write_picture(run_folder: str | Path, output: str | Path) -> Path:
    """Write a picture of a run's evaluation as SVG, for light and dark pages, and return its path.

    Args:
        run_folder: folder that training created.
        output: file to write.
    Returns:
        The path of the picture.
    Raises:
        ReportError: the folder is not a run, a file in it is damaged, or the run has no evaluation.
    """
    return _write(Path(output), evaluation_picture(load_run(run_folder)))


def _write(path: Path, text: str) -> Path:
    if path.is_dir() or not path.parent.is_dir():
        raise ReportError(f"{path}: expected a file in an existing folder; create the folder or choose another file")
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
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="write the evaluation picture, not the page")
    arguments = parser.parse_args(argv)
    if arguments.output and arguments.picture:
        parser.error("--output and --picture cannot be combined: with --picture no page is written; leave one out")
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
