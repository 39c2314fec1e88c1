"""Test that trackers get the metrics and rollouts of a run once, and that their failures do not end it."""

from __future__ import annotations

import html.parser
import importlib
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tracker_files import trackio_run, wandb_exit_codes, wandb_run
from train_runs import command, environment, mini_arguments, only_run

from rmsd_fast import train_run
from rmsd_fast.config import CheckpointError, NotInstalled, SettingsError
from rmsd_fast.runtime.metrics import MetricsLog
from rmsd_fast.runtime.process_group import World
from rmsd_fast.runtime.stop_signal import Stopped
from rmsd_fast.runtime.trackers import Trackers, markdown_table
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.stages.plan import describe_plan
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


def test_a_tracker_stores_values_that_are_missing_or_not_finite(tracker, tmp_path, recwarn):
    run = tmp_path / "run"
    rows = [{"text": "x", "score": None, "p": math.nan}, {"text": None, "score": 1.0, "p": -math.inf}]
    metrics = make(run, [tracker], config={"unset": None})
    metrics.start("sft")
    values = {"loss": torch.tensor(math.nan), "most": math.inf, "least": -math.inf, "none": None, "lr": 0.5}
    metrics.log("sft", 1, values, rows)
    metrics.log("sft", 2, {"loss": 2.0})
    metrics.close()

    # trackio reports what it leaves out as a warning.
    assert not [warning for warning in recwarn if "trackio" in str(warning.message)]
    steps, config = stored(tracker, run, "sft")
    assert config["unset"] is None
    (first, numbers), (second, rest) = steps
    assert (first, second, rest) == (1, 2, {"loss": 2.0})
    table = numbers.pop("rollouts")
    # wandb stores JSON's extensions, and trackio stores texts, which its dashboard reads as numbers.
    assert json.loads(json.dumps(numbers), parse_constant=str) == {
        **{"loss": "NaN", "most": "Infinity", "least": "-Infinity"},
        "lr": 0.5,
    }
    if tracker == "trackio":
        cells = [list(row.values()) for row in table["_value"]]
        assert cells == [["x", None, "NaN"], [None, 1.0, "-Infinity"]]
        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        name = f"run-sft-{json.loads((run / 'trackers.json').read_text())['trackio']['sft']['id']}"
        loss = [entry["loss"] for entry in storage.get_logs("tiny", name)]
        assert math.isnan(loss[0]) and loss[1] == 2.0
    else:
        content = json.loads(next(run.glob(f"wandb/offline-run-*/files/{table['path']}")).read_text())
        assert json.loads(json.dumps(content["data"]), parse_constant=str) == [
            ["x", None, "NaN"],
            [None, 1.0, "-Infinity"],
        ]


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
            # The tracker's run was closed, so what it had before is stored, and wandb shows it as failed.
            steps, _ = stored(tracker, tmp_path / "run", "sft")
            assert steps == [(1, {"loss": 1.0})]
            if tracker == "wandb":
                run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]["sft"]["id"]
                assert wandb_exit_codes(tmp_path / "run", run_id) == [1]
        metrics.close()
    assert [record.getMessage() for record in caplog.records if record.name == "rmsd_fast"] == [
        f"{tracker}: no longer written: Connection lost; metrics.jsonl has all numbers"
    ]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "sft")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_a_tracker_that_cannot_be_closed_either_warns_once(tracker, tmp_path, caplog, monkeypatch):
    metrics = make(tmp_path / "run", [tracker])
    metrics.start("sft")
    closed = []

    def fail(*args, **options):
        raise ConnectionResetError("Connection lost")

    def finish(*args, **options):
        closed.append(options)
        raise TimeoutError("no answer")

    run = metrics._trackers._open[tracker]._run
    monkeypatch.setattr(run, "log", fail)
    with caplog.at_level(logging.WARNING), monkeypatch.context() as broken:
        broken.setattr(run, "finish", finish)
        for step in (1, 2):
            metrics.log("sft", step, {"loss": 1.0})
        metrics.close()
    run.finish()
    assert [record.getMessage() for record in caplog.records if record.name == "rmsd_fast"] == [
        f"{tracker}: no longer written: Connection lost; metrics.jsonl has all numbers"
    ]
    assert len(closed) == 1


def test_a_full_disk_does_not_drop_a_tracker(tracker, tmp_path, caplog, monkeypatch):
    """trackers.json cannot be written at the start and at steps 1 and 3."""
    run = tmp_path / "run"
    replace, full = Path.replace, [True]

    def replace_if_there_is_space(path, target):
        if full[0] and Path(target).name == "trackers.json":
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(path))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_if_there_is_space)
    metrics = make(run, [tracker])
    warnings = []
    with caplog.at_level(logging.WARNING):
        metrics.start("sft")
        for step, full[0] in enumerate((True, False, True), start=1):
            metrics.log("sft", step, {"loss": float(step)})
            warnings.append([record.getMessage() for record in caplog.records if record.name == "rmsd_fast"])
            if not full[0]:
                (entry,) = json.loads((run / "trackers.json").read_text())[tracker].values()
                assert entry["step"] == step
        full[0] = False
        metrics.close()
    warning = "trackers.json: No space left on device; it is kept in memory until it can be written"
    assert warnings == [[warning], [warning], [warning] * 2]
    # The state of step 3 is written at the end.
    (entry,) = json.loads((run / "trackers.json").read_text())[tracker].values()
    assert entry["step"] == 3
    steps, _ = stored(tracker, run, "sft")
    assert steps == [(step, {"loss": float(step)}) for step in (1, 2, 3)]


def test_the_state_is_written_once_per_step_before_the_step_is_sent(tmp_path, monkeypatch):
    sent, written, synced = [], [], []

    class Run:
        def __init__(self, *args):
            pass

        def log(self, step, numbers, table):
            state = json.loads((tmp_path / "trackers.json").read_text())
            assert [runs["sft"]["step"] for runs in state.values()] == [step, step]
            sent.append(step)

        def close(self, **options):
            pass

    monkeypatch.setattr("rmsd_fast.runtime.trackers.importlib.util.find_spec", lambda name: pytest)
    monkeypatch.setattr(pytest, "origin", "here", raising=False)
    for kind in ("WandbRun", "TrackioRun"):
        monkeypatch.setattr(f"rmsd_fast.runtime.trackers.{kind}", Run)
    trackers = Trackers(["wandb", "trackio"], tmp_path)
    trackers.start("sft")
    replace, fsync = Path.replace, os.fsync
    monkeypatch.setattr(Path, "replace", lambda path, target: (written.append(target), replace(path, target)))
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), fsync(handle)))
    for step in (1, 2, 3, 3):
        trackers.log("sft", step, {"loss": 1.0})
    trackers.close()
    assert sent == [1, 1, 2, 2, 3, 3]
    assert written == [tmp_path / "trackers.json"] * 3 and synced == []


def test_an_error_in_our_table_is_not_a_failure_of_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    metrics = make(tmp_path, ["tensorboard"])
    with pytest.raises(KeyError, match="source"):
        metrics.log("distill", 1, {"policy/loss": 1.0}, [ROWS[0], {"id": "q2"}])
    metrics.close()


@pytest.mark.parametrize(
    ("error", "processes", "code"),
    [
        (None, 1, 0),
        (RuntimeError("broken"), 1, 1),
        (SettingsError("wrong"), 1, 1),
        (KeyboardInterrupt(), 1, 1),
        (Stopped("step 1 is saved", together=True), 2, 0),
        (Stopped("during an evaluation"), 1, 0),
        (Stopped("ended by the launcher after an error of another process"), 2, 1),
    ],
)
def test_wandb_shows_a_run_that_ends_with_an_error_as_failed(tmp_path, monkeypatch, error, processes, code):
    pytest.importorskip("wandb", reason="needs wandb (pip install 'rmsd-fast[wandb]')")
    use_local("wandb", tmp_path, monkeypatch)
    metrics = make(tmp_path, ["wandb"])

    def stages(run):
        run.metrics.log("sft", 1, {"loss": 1.0})
        run.metrics.log("distill", 1, {"policy/loss": 1.0})
        if error is not None:
            raise error

    monkeypatch.setattr(train_run, "_run_stages", stages)
    run = SimpleNamespace(world=World(0, processes, 0, torch.device("cpu")), metrics=metrics, logs={})
    if error is None:
        train_run.run_stages(run)
    else:
        with pytest.raises(type(error)):
            train_run.run_stages(run)
    ids = {stage: entry["id"] for stage, entry in json.loads((tmp_path / "trackers.json").read_text())["wandb"].items()}
    # Stage 1 was complete before the error.
    assert [wandb_exit_codes(tmp_path, ids[stage]) for stage in ("sft", "distill")] == [[0], [code]]


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


def test_a_missing_package_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    gone = ("wandb", "trackio")
    monkeypatch.setattr(
        "rmsd_fast.runtime.trackers.importlib.util.find_spec", lambda n, *rest: None if n in gone else find_spec(n)
    )
    names = "runtime.trackers=[tensorboard,wandb,trackio]"
    settings = load_settings("quickstart", [names, f"made.folder={tmp_path / 'made'}", f"output={tmp_path / 'runs'}"])
    with pytest.raises(NotInstalled) as caught:
        prepare_material(settings, ALONE)
    messages = str(caught.value).splitlines()
    assert [re.match(r"runtime\.trackers: expected the package (\w+), got none; ", line)[1] for line in messages] == [
        "wandb",
        "trackio",
    ]
    assert list(tmp_path.iterdir()) == []
    plan, ready = describe_plan(settings)
    assert not ready and "not ready: provide the missing inputs above" in plan
    assert all(f"  MISSING: {line}\n" in plan for line in messages)


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
