"""Test that trackers get the metrics and rollouts of a run once, and that their failures do not end it."""

from __future__ import annotations

import html.parser
import importlib
import io
import json
import logging
import re
import subprocess
import sys

import pytest
import torch
from tracker_files import trackio_run, wandb_run
from train_runs import command, environment, mini_arguments, only_run

from rmsd_fast.config import CheckpointError, NotInstalled, SettingsError
from rmsd_fast.runtime.metrics import MetricsLog
from rmsd_fast.runtime.process_group import World
from rmsd_fast.runtime.trackers import Trackers, markdown_table
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.rollout_log import rollout_rows

ALONE = World(0, 1, 0, torch.device("cpu"))
CONFIG = {"seed": 3, "sft": {"lr": 2e-6, "steps": 4}}
ROWS = [
    {"id": "q1", "source": "rollout 0", "text": "<think>a|b</think>\nno", "reward": 0.25, "p": None},
    {"id": "q1", "source": "teacher 2", "text": "yes", "reward": None, "p": 1.0},
]


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, tmp_path, monkeypatch):
    """Return the name of a tracker that stores everything below `tmp_path`."""
    pytest.importorskip(request.param, reason=f"needs {request.param} (pip install 'rmsd-fast[{request.param}]')")
    use_local(request.param, tmp_path, monkeypatch)
    return request.param


def use_local(name, tmp_path, monkeypatch):
    if name == "wandb":
        monkeypatch.setenv("WANDB_MODE", "offline")
        for variable in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_API_KEY"):
            monkeypatch.delenv(variable, raising=False)
    if name == "trackio":
        # trackio reads its folder when it is imported.
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        for module in [m for m in sys.modules if m.partition(".")[0] == "trackio"]:
            monkeypatch.delitem(sys.modules, module)
        importlib.import_module("trackio")


def make(folder, names, **options) -> MetricsLog:
    options = {"project": "tiny", "config": CONFIG, "stream": io.StringIO(), "trackers": names} | options
    return MetricsLog(folder, ALONE, **options)


def stored(tracker, run, stage):
    """Return the steps that the tracker has stored for a stage, and its settings."""
    run_id = json.loads((run / "trackers.json").read_text())[tracker][stage]["id"]
    if tracker == "wandb":
        steps, about = wandb_run(run, run_id)
        assert {record.run_id for record in about} == {run_id} and {record.run_group for record in about} == {run.name}
        return steps, {item.key: json.loads(item.value_json) for item in about[-1].config.update}
    steps, (config,) = trackio_run(run.parent / "trackio", "tiny", f"{run.name}-{stage}-{run_id}")
    return steps, config


def table_of(tracker, run, value):
    """Return the rows of a stored table."""
    if tracker == "trackio":
        return [list(row.values()) for row in value["_value"]]
    # The name holds a hash of the content, which both tables of the run have in common.
    table = json.loads(next(run.glob(f"wandb/offline-run-*/files/{value['path']}")).read_text())
    assert table["columns"] == list(ROWS[0])
    return table["data"]


def test_a_tracker_gets_each_step_of_each_stage_once(tracker, tmp_path):
    """A run is killed after step 3 of stage 2 and continues from its checkpoint after step 1, twice."""
    run = tmp_path / "run"
    metrics = make(run, [tracker])
    metrics.start("sft")
    for step in (1, 2):
        metrics.log("sft", step, {"loss": torch.tensor(step / 4), "lr": 0.1, "note": "text", "none": None})
    metrics.log("distill", 1, {"policy/loss": 1.0}, ROWS)
    metrics.sync()
    saved = metrics.lines
    for step in (2, 3):
        metrics.log("distill", step, {"policy/loss": float(step)})
    metrics._trackers.close()  # The process is killed: the file of metrics is not closed.
    for last in (2, 5):
        metrics = make(run, [tracker], resume_lines=saved)
        metrics.start("distill")
        for step in range(2, last + 1):
            metrics.log("distill", step, {"policy/loss": float(step)}, ROWS if step == 4 else ())
        metrics._trackers.close()
    metrics.close()

    steps, config = stored(tracker, run, "sft")
    assert steps == [(1, {"loss": 0.25, "lr": 0.1}), (2, {"loss": 0.5, "lr": 0.1})]
    assert config.items() >= {**CONFIG, "stage": "sft"}.items()
    steps, _ = stored(tracker, run, "distill")
    assert [(step, values["policy/loss"]) for step, values in steps] == [(n, float(n)) for n in range(1, 6)]
    for step, values in steps:
        assert ("rollouts" in values) == (step in (1, 4))
    assert table_of(tracker, run, steps[0][1]["rollouts"]) == [list(row.values()) for row in ROWS]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines[2:]] == [("distill", n) for n in range(1, 6)]


def test_tensorboard_shows_rollouts_as_a_table(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    metrics = make(tmp_path, ["tensorboard"])
    metrics.log("distill", 1, {"policy/loss": 1.0}, ROWS)
    metrics.close()
    assert not (tmp_path / "trackers.json").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "distill")).Reload()
    (event,) = events.Tensors("rollouts/text_summary")
    cells: list[list[str]] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag == "tr":
                cells.append([])
            if tag in ("td", "th"):
                cells[-1].append("")
            if tag == "br":
                cells[-1][-1] += "\n"

        def handle_data(self, data):
            if cells and cells[-1] and data.strip():
                cells[-1][-1] += data

    Reader().feed(markdown_to_safe_html(event.tensor_proto.string_val[0].decode()))
    assert cells == [
        ["id", "source", "text", "reward", "p"],
        ["q1", "rollout 0", "<think>a|b</think>\nno", "0.25", ""],
        ["q1", "teacher 2", "yes", "", "1"],
    ]


def test_rollout_rows_have_one_row_per_answer():
    question = {"stage": "distill", "step": 1, "id": "q", "question": "What?", "answer": "A"}
    rollouts = [{"text": "x", "d_score": 0.5, "reward": None, "tokens": 3, "advantage": -1.0}]
    teacher = [{"k": 2, "text": "y", "quality": 0.75, "p": 1.0, "d_score": None}]
    rows = rollout_rows([{**question, "rollouts": rollouts, "teacher": teacher}])
    assert [row["source"] for row in rows] == ["rollout 0", "teacher 2"]
    assert rows[0].keys() == rows[1].keys() and {row["truth"] for row in rows} == {"A"}
    assert [(row["d_score"], row["advantage"], row["quality"], row["p"]) for row in rows] == [
        (0.5, -1.0, None, None),
        (None, None, 0.75, 1.0),
    ]
    assert rollout_rows([]) == []


def test_a_tracker_that_fails_later_is_left_out_with_one_warning(tracker, tmp_path, caplog, monkeypatch):
    """The tracker raises from step 2 on, and the other one and metrics.jsonl get everything."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = make(tmp_path / "run", ["tensorboard", tracker])
    metrics.start("sft")
    metrics.log("sft", 1, {"loss": 1.0})

    def fail(*args, **options):
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(metrics._trackers._open[tracker]._run, "log", fail)
    with caplog.at_level(logging.WARNING):
        for stage, step in (("sft", 2), ("sft", 3), ("distill", 1)):
            metrics.log(stage, step, {"loss": float(step)})
        metrics.close()
    assert [record.getMessage() for record in caplog.records if record.name == "rmsd_fast"] == [
        f"{tracker}: no longer written: Connection lost; metrics.jsonl has all numbers"
    ]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "sft")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


KILL_WANDB = """
import logging, psutil, torch
from rmsd_fast.runtime.metrics import MetricsLog
from rmsd_fast.runtime.process_group import World, exit_process

logging.basicConfig(format="%(name)s %(message)s")
metrics = MetricsLog("run", World(0, 1, 0, torch.device("cpu")), trackers=["wandb"], project="tiny")
metrics.start("sft")
metrics.log("sft", 1, {"loss": 1.0})
killed = [process for process in psutil.Process().children(recursive=True) if "wandb" in process.name()]
for process in killed:
    process.kill()
psutil.wait_procs(killed)
for step in range(2, 40):
    metrics.log("sft", step, {"loss": 1.0})
metrics.close()
exit_process(len(killed))
"""


def test_the_end_of_wandbs_process_does_not_end_the_run(tmp_path):
    pytest.importorskip("psutil")
    pytest.importorskip("wandb", reason="needs wandb (pip install 'rmsd-fast[wandb]')")
    # Without WANDB_SERVICE, it starts a process of wandb that it does not share with the other tests.
    variables = {k: v for k, v in environment().items() if k != "WANDB_SERVICE"} | {"WANDB_MODE": "offline"}
    command = [sys.executable, "-c", KILL_WANDB]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode >= 1, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("rmsd_fast")]
    assert re.fullmatch(r"rmsd_fast wandb: no longer written: .*Connection.*; metrics\.jsonl has all numbers", warning)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 39


def test_a_tracker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb (pip install 'rmsd-fast[wandb]')")
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics = make(tmp_path / "run", ["wandb"], project="a:b")
    with pytest.raises(SettingsError, match=r"runtime\.trackers: expected wandb to start, got .*; log in with `wandb "):
        metrics.start("sft")


def test_a_run_ends_before_it_loads_a_model_if_a_tracker_cannot_start(tmp_path):
    pytest.importorskip("wandb", reason="needs wandb (pip install 'rmsd-fast[wandb]')")
    account = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE")
    variables = {k: v for k, v in environment().items() if k not in account} | {"HOME": str(tmp_path / "home")}
    arguments = mini_arguments(tmp_path / "runs", tmp_path / "made", "runtime.trackers=[tensorboard,wandb]")
    done = subprocess.run(command(arguments), env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "runtime.trackers: expected wandb to start, got UsageError: No API key configured" in done.stderr
    assert "Traceback" not in done.stderr and "evaluate untrained" not in done.stderr
    assert not (only_run(tmp_path / "runs") / "predictions").exists()


def test_a_folder_that_trackio_cannot_use_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="needs trackio (pip install 'rmsd-fast[trackio]')")
    (tmp_path / "trackio").write_text("a file")
    use_local("trackio", tmp_path, monkeypatch)
    with pytest.raises(SettingsError, match=r"expected trackio to start, got FileExistsError: .*check the folder"):
        make(tmp_path / "run", ["trackio"]).start("sft")


@pytest.mark.parametrize(("name", "extra"), [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "train")])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, name, extra):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "rmsd_fast.runtime.trackers.importlib.util.find_spec", lambda n, *rest: None if n == name else find_spec(n)
    )
    says = rf"runtime\.trackers: expected the package {name}, got none; run pip install 'rmsd-fast\[{extra}\]'"
    with pytest.raises(NotInstalled, match=says):
        Trackers([name], tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"wandb": {"sft": {"id": 3, "step": 1}}}', '{"wandb": {"sft": {}}}'])
def test_a_damaged_list_of_runs_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr("rmsd_fast.runtime.trackers.importlib.util.find_spec", lambda name: pytest)
    monkeypatch.setattr(pytest, "origin", "here", raising=False)
    (tmp_path / "trackers.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"trackers\.json: expected the id and the last step"):
        Trackers(["wandb"], tmp_path)
    Trackers(["tensorboard"], tmp_path)


def test_only_rank_0_starts_trackers(tmp_path):
    metrics = MetricsLog(tmp_path / "run", World(1, 2, 1, torch.device("cpu")), trackers=["wandb", "trackio"])
    metrics.start("sft")
    metrics.log("sft", 1, {"loss": 1.0})
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_unknown_and_repeated_trackers_are_refused():
    for names in (["mlflow"], ["wandb", "wandb"]):
        says = f"runtime.trackers: expected some of ['tensorboard', 'wandb', 'trackio'], each at most once, got {names}"
        with pytest.raises(SettingsError, match=re.escape(says)):
            load_settings("quickstart", [f"runtime.trackers=[{','.join(names)}]"])
    assert load_settings("quickstart", ["runtime.trackers=[]"]).runtime.trackers == []
    assert load_settings("quickstart").runtime.trackers == ["tensorboard"]


def test_markdown_escapes_what_would_end_a_cell():
    assert markdown_table([{"a": "x|y\n<b>&", "b": 0.123456}]) == (
        "| a | b |\n| --- | --- |\n| x&#124;y<br>&lt;b&gt;&amp; | 0.1235 |"
    )
