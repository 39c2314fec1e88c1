"""Write the report of a run (one self-contained HTML page, or one SVG picture) or of a teacher pool (a page and JSON).

python -m rmsd_fast.report runs/quickstart-20260101-120000
python -m rmsd_fast.report runs/quickstart-20260101-120000 --picture accuracy.svg
python -m rmsd_fast.report pool.jsonl questions.jsonl [--output report.html] [section.field=value …]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rmsd_fast import environment
from rmsd_fast.command_line import Parser
from rmsd_fast.config import SettingsError, UserError
from rmsd_fast.files import write_text_atomic
from rmsd_fast.process import run_main
from rmsd_fast.report_page.evaluation import evaluation_picture
from rmsd_fast.report_page.page import render
from rmsd_fast.report_page.run_folder import ReportError, load_run

if TYPE_CHECKING:
    from rmsd_fast.collect_run.config import CollectConfig
    from rmsd_fast.teacher.usage import Prices

__all__ = ["ReportError", "main", "write_picture", "write_pool_report", "write_report"]

# Settings that a pool report reads, in addition to those that say how to read files and answers.
ALSO_READ = ("teacher.responses", "teacher.min_quality", "collect.input_price", "collect.output_price")


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


def write_pool_report(
    pool: str | Path, questions: str | Path, output: str | Path | None = None, overrides: Sequence[str] = ()
) -> Path:
    """Write the report page of a teacher pool, and its numbers as JSON next to it, and return the path of the page.

    Args:
        pool: teacher answers, JSONL.
        questions: the questions that the pool answers.
        output: page to write, `.html`; None = `<pool>-report.html` next to the pool.
        overrides: `section.field=value` settings.
    Returns:
        The path of the page.
    Raises:
        ReportError: the page would not be an .html file, or would replace one of the inputs.
        UserError: a file is damaged, the pool belongs to other questions, or a setting is wrong.
    """
    from rmsd_fast.collect_run.config import CollectionConfig
    from rmsd_fast.made.teacher import is_simulated
    from rmsd_fast.report_page.pool_page import render_pool
    from rmsd_fast.stages.inputs import read_pool_files
    from rmsd_fast.teacher.pool import check_pool
    from rmsd_fast.teacher.pool_advice import UNKNOWN, advise
    from rmsd_fast.teacher.pool_analysis import analyze_pool

    pool, questions = Path(pool), Path(questions)
    path = Path(output) if output else pool.with_name(f"{pool.stem}-report.html")
    if path.suffix != ".html":
        raise ReportError(f"--output {path}: expected a name that ends in .html; the JSON file gets the same name")
    numbers = path.with_suffix(".json")
    if numbers.resolve() in (pool.resolve(), questions.resolve()):
        raise ReportError(f"--output {path}: {numbers} is an input and would be replaced; choose another name")
    _check_place(path)
    settings, asked, answers = read_pool_files("report", ALSO_READ, pool, questions, overrides, schema=CollectionConfig)
    prices = _prices(settings.collect)
    check_pool(answers, asked, max_unanswered_share=1.0)
    analysis = analyze_pool(answers, asked, settings.teacher, simulated=is_simulated(answers), prices=prices)
    if prices and "priced" not in analysis["pool_usage"]:
        raise SettingsError(
            "collect.input_price: expected an answer with prompt and completion tokens in its `usage`, got none in "
            f"{pool}; leave the prices out, because they have no effect"
        )
    advice = advise(analysis)
    listed = [{"subject": entry.subject, "value": entry.value, "reason": entry.reason} for entry in advice]
    content = {"pool": str(pool), "questions": str(questions), **analysis, "advice": listed, "not_shown": UNKNOWN}
    page = render_pool(analysis, advice, pool, questions)
    _write(numbers, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return _write(path, page)


def _prices(collect: CollectConfig) -> Prices | None:
    from rmsd_fast.teacher.usage import Prices

    prices = (collect.input_price, collect.output_price)
    if prices == (None, None):
        return None
    if None in prices:
        raise SettingsError(
            "collect.input_price and collect.output_price: expected both prices, got one; set the other one too, to 0 "
            "if these tokens are free"
        )
    return Prices(*prices)


def _check_place(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise ReportError(f"{path}: expected a file in an existing folder; create the folder or choose another file")


def _write(path: Path, text: str) -> Path:
    _check_place(path)
    write_text_atomic(path, text)
    return path


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if reason := environment.why_not(("torch", "omegaconf") if arguments.files else ("omegaconf",)):
        print(f"rmsd_fast.report: {reason}", file=sys.stderr)
        return 2
    try:
        if arguments.picture:
            path = write_picture(arguments.path, arguments.picture)
        elif arguments.files:
            path = write_pool_report(arguments.path, arguments.files[0], arguments.output, arguments.files[1:])
        else:
            path = write_report(arguments.path, arguments.output)
    except (ReportError, UserError, PermissionError) as error:
        print(f"rmsd_fast.report: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments. `files` is empty for a run, and otherwise has the question file and the settings."""
    parser = Parser(prog="rmsd_fast.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of a run, such as runs/<name>-<time>, or a pool of answers")
    parser.add_argument(
        "files",
        nargs="*",
        default=[],
        metavar="QUESTIONS section.field=value",
        help="for a pool: the questions that it answers, and settings such as teacher.unlabeled=agreement",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="page to write; default: next to the run or pool")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="write the evaluation picture of a run")
    arguments = parser.parse_intermixed_args(argv)
    path, files = arguments.path, arguments.files
    if arguments.output and arguments.picture:
        parser.error("--output and --picture cannot be combined: with --picture no page is written; leave one out")
    if path.is_dir() and files:
        parser.error(f"{path} is a folder, so the report is that of a run, which takes no other arguments: {files}")
    if path.is_file() and arguments.picture:
        parser.error(f"--picture: expected the folder of a run, got the file {path}; leave --picture out")
    if path.is_file() and (not files or ("=" in files[0] and not Path(files[0]).exists())):
        parser.error(
            f"{path} is a file, so the report is that of a pool: expected its questions as the second argument, got "
            f"{files[0] if files else 'nothing'}; write rmsd_fast.report {path} QUESTIONS, or give the folder of a run"
        )
    return arguments


if __name__ == "__main__":
    sys.exit(run_main(main))
