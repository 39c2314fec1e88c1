"""Test the lab: checks of a plan, statistics, result files, and which runs are trained, resumed or kept.

Most tests train with a small script in place of the trainer, which writes the files that the lab reads.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from train_runs import MINI, environment

from rmsd_fast import lab, lab_results
from rmsd_fast.config import SettingsError
from rmsd_fast.lab_plan import PLANS, choose, plan_jobs, read_plan
from rmsd_fast.lab_results import Scored, compare, question_interval, score_records, t_interval, t_quantile

CONTROL = ["stages=[control]"]
PLAN = {
    "recipe": "quickstart",
    "settings": ["evaluate.rollouts=2", "rollout.temperature=1", "distill.steps=5"],
    "seeds": [0, 1],
    "stage1": {"best": []},
    "arms": {"D": {"from": "best"}, "control": {"from": "best", "settings": CONTROL}},
    "comparisons": [["D", "control"], ["D", "best"]],
}


def write_plan(folder: Path, **changes) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": ""}, "recipe: expected a recipe, got ''; write"),
        ({"recipe": "quickstat"}, "recipe 'quickstat': no such file"),
        (
            {"arm": {}},
            "expected the keys recipe, settings, seeds, threads, stage1, arms, comparisons, got 'arm'; did you",
        ),
        ({"settings": ["distill.steps"]}, "settings: expected a list of section.field=value, got ['distill.steps']"),
        ({"settings": ["distill.stepz=4"]}, "settings: unknown setting distill.stepz; did you mean distill.steps?"),
        ({"settings": ["distill.steps=x"]}, "settings: distill.steps"),
        ({"settings": ["seed=4"]}, "settings: expected settings that the lab leaves to the plan, got seed=4"),
        ({"seeds": [0, 0]}, "seeds: expected different numbers from 0, got [0, 0]"),
        ({"seeds": []}, "seeds: expected different numbers"),
        ({"seeds": ["a"]}, "seeds: expected different numbers"),
        ({"threads": 0}, "threads: expected a number of CPU threads, got 0"),
        ({"stage1": {}, "arms": {}, "comparisons": []}, "expected arms or stage-1 students, got none"),
        ({"stage1": {"best": ["stages=[sft]"]}}, "stage1: best: expected settings that the lab leaves to the plan"),
        ({"stage1": {"best": ["distill.steps=3"]}}, "stage1: best: override: distill.steps has no effect"),
        ({"arms": {"a/b": {}}}, "arms: a/b: expected a name of letters"),
        ({"arms": {"best": {}}}, "arms: best: expected different names, got 'best' twice"),
        ({"arms": {"D": {"from": "bast"}}}, "arms: D: from: expected one of best, got 'bast'; define it below stage1"),
        (
            {"arms": {"D": {"form": "best"}}},
            "arms: D: expected the keys from, settings, prediction, got 'form'; did you",
        ),
        ({"arms": {"D": {"settings": ["output=x"]}}}, "arms: D: expected settings that the lab leaves to the plan"),
        ({"arms": {"D": {"from": "best", "settings": ["model.path=x"]}}}, "got model.path=x; leave it out"),
        (
            {"arms": {"D": {"settings": ["distill.lr=-1"]}}, "comparisons": []},
            "arms: D: distill.lr: expected at least 0",
        ),
        (
            {"arms": {"D": {"prediction": "stage3"}}},
            "prediction: expected one of untrained, stage1, stage2, control, got 'stage3'",
        ),
        (
            {"arms": {"D": {"from": "best", "prediction": "untrained"}}, "comparisons": []},
            "arms: D: prediction: expected one of stage1, stage2",
        ),
        ({"comparisons": [["D"]]}, "comparisons: expected two different names, got ['D']"),
        ({"comparisons": [["D", "D"]]}, "comparisons: expected two different names, got ['D', 'D']"),
        ({"comparisons": [["D", "E"]]}, "comparisons: expected two of best, D, control, got 'E'; define it"),
        (
            {"arms": {**PLAN["arms"], "again": {"from": "best", "settings": ["discriminator.pairing=expected"]}}},
            "arms: expected different settings, got the same for D and again; remove one",
        ),
        ({"settings": ["data.heldout=", "made.enabled=false"]}, "data.heldout: expected held-out questions, got none"),
    ],
)
def test_a_wrong_plan_is_refused_before_any_training(tmp_path, changes, says, capsys):
    path = write_plan(tmp_path, **changes)
    assert lab.main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_plan_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="expected a YAML file, got none; give a file or one of: .*smoke"):
        read_plan("none")
    path = tmp_path / "plan.yaml"
    path.write_text("recipe: quickstart\narms:\n  D: {}\n  D: {}\n")
    with pytest.raises(SettingsError, match="expected YAML with distinct names, got: .*duplicate key D"):
        read_plan(str(path))
    path.write_text("recipe: quickstart\narms:\n  D: {settings: [stages=[distill]]}\n")
    with pytest.raises(SettingsError, match="write settings with brackets in quotes"):
        read_plan(str(path))
    path.write_text("- recipe\n")
    with pytest.raises(SettingsError, match="write them as a mapping"):
        read_plan(str(path))


def test_runs_are_queued_by_seed_and_start_from_their_stage_1(tmp_path):
    plan = read_plan(str(write_plan(tmp_path)), overrides=["distill.steps=7"])
    jobs = plan_jobs(plan, tmp_path)
    assert [job.name for job in jobs] == [
        f"seed {seed}, {name}" for seed in (0, 1) for name in ("best", "D", "control")
    ]
    best, full, control = jobs[3:]
    assert best.settings.stages == ["sft"] and full.settings.stages == ["warm_up", "distill"]
    assert full.settings.model.path == str(best.folder / "stage1") and full.needs is best
    assert {job.settings.seed for job in jobs[3:]} == {job.settings.made.seed for job in jobs[3:]} == {1}
    assert full.settings.distill.steps == 7 and control.settings.made.folder == str(tmp_path / "made")
    assert [job.name for job in choose(plan, jobs, ["control"], [1])] == ["seed 1, best", "seed 1, control"]
    with pytest.raises(SettingsError, match="--only: expected names among best, D, control, got 'E'"):
        choose(plan, jobs, ["E"], [])
    # Folders depend on what changes the result: on stage 1 too, but neither on checkpoints nor on the lab's folder.
    names = [job.folder.name for job in jobs]
    assert [job.folder.name for job in plan_jobs(plan, tmp_path / "elsewhere")] == names
    later = read_plan(str(write_plan(tmp_path)), overrides=["distill.steps=7", "checkpoint.every_steps=3"])
    assert [job.folder.name for job in plan_jobs(later, tmp_path)] == names
    other = plan_jobs(read_plan(str(write_plan(tmp_path, stage1={"best": ["sft.lr=1"]}))), tmp_path)
    assert not {job.folder.name for job in other} & set(names)
    assert read_plan(str(write_plan(tmp_path)), seeds=[5, 1]).seeds == (0, 1, 5)


def test_the_plans_of_the_package_are_valid(tmp_path):
    for path in PLANS.glob("*.yaml"):
        plan = read_plan(path.stem)
        # The settings of another seed differ only by the seed.
        assert plan_jobs(replace(plan, seeds=plan.seeds[:1]), tmp_path)


def test_the_plan_of_the_manual_is_valid(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "lab.md").read_text()
    (text,) = re.findall(r"^```\n(recipe: .*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "plan.yaml").write_text(text)
    jobs = plan_jobs(read_plan(str(tmp_path / "plan.yaml")), tmp_path)
    assert [job.entry.name for job in jobs[:6]] == ["best", "single", "D", "control", "content only", "D from single"]


def test_t_quantiles_are_those_of_printed_tables():
    printed = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980}
    assert {n: round(t_quantile(n), 3) for n in printed} == printed


def test_t_interval_by_hand():
    # Mean 3, standard deviation sqrt(2.5), standard error sqrt(0.5) = 0.70711, times 2.77645 = 1.96325.
    result = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (result["mean"], result["n"]) == (3.0, 5)
    assert result["low"] == pytest.approx(3 - 1.96325, abs=1e-4)
    assert result["high"] == pytest.approx(3 + 1.96325, abs=1e-4)
    assert t_interval([0.0, 0.0]) == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 2}
    assert t_interval([2.0]) == {"mean": 2.0, "low": None, "high": None, "n": 1}


def test_a_question_is_averaged_over_seeds_before_the_bootstrap():
    # Opposite differences of two seeds cancel for every question.
    first = {f"q{i}": 1.0 for i in range(20)}
    assert question_interval([first, {name: -value for name, value in first.items()}], {}) == (0.0, 0.0)
    # Half of 400 questions differ by 1: the standard error of the mean is 0.5 / 20 = 0.025.
    halves = [{f"q{i}": float(i % 2) for i in range(400)}]
    low, high = question_interval(halves, {})
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.01)
    # Four questions each with the same difference are about one video, which doubles the standard error.
    low, high = question_interval(halves, {f"q{i}": f"{i % 2}-{i // 8}.mp4" for i in range(400)})
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)


def scored(scores: list[float], **others) -> Scored:
    questions = {"greedy": {f"q{i}": score for i, score in enumerate(scores)}}
    return Scored("closed", {}, {}, questions, 1.0, simulated=True, **others)


def test_differences_are_paired_by_seed_and_question():
    after = {0: scored([1.0, 1.0]), 1: scored([1.0, 0.0]), 2: scored([1.0, 1.0])}
    before = {0: scored([0.0, 1.0]), 1: scored([0.0, 0.0])}
    result = compare(after, before, "greedy")
    # Half a point of difference in both of the common seeds; of the two questions, one differs always and one never.
    assert (result["mean"], result["low"], result["high"], result["n"]) == (0.5, 0.5, 0.5, 2)
    assert (result["questions_low"], result["questions_high"]) == (0.0, 1.0)
    assert result["excludes_0"] == {"trainings": True, "questions": False}
    assert compare(after, before, "sampled") is None and compare(after, {}, "greedy") is None
    assert compare(after, {1: before[1]}, "greedy")["excludes_0"]["trainings"] is None


def record(i: int, task: str, score: float, **others) -> dict:
    return {"id": f"{task}{i}", "task_type": task, "score": score, "valid": True, **others}


def test_the_metric_is_the_best_one_that_there_is():
    closed = [record(0, "mcq", 1.0, sampled=0.5), record(0, "ocr", 0.0, sampled=0.25)]
    opened = [record(0, "open", 1.0, sampled=0.5, meaning=0.0), record(1, "open", 1.0, sampled=1.0, meaning=1.0)]
    metric, means, tasks, questions = score_records([*closed, *opened])
    assert metric == "closed" and means == {"valid": 1.0, "greedy": 0.5, "sampled": 0.375, "meaning": 0.5}
    assert tasks["mcq"] == {"greedy": 1.0, "sampled": 0.5, "n": 1} and tasks["open"]["n"] == 2
    assert questions == {"greedy": {"mcq0": 1.0, "ocr0": 0.0}, "sampled": {"mcq0": 0.5, "ocr0": 0.25}}
    metric, _, _, questions = score_records(opened)
    assert (metric, questions) == ("meaning", {"greedy": {"open0": 0.0, "open1": 1.0}})
    metric, _, _, questions = score_records([{**r, "meaning": None} for r in opened])
    assert (metric, questions["sampled"]) == ("valid", {"open0": 0.5, "open1": 1.0})
    assert "sampled" not in score_records([record(0, "mcq", 1.0), *opened])[3]


# This script writes the files of a run that the lab reads. The score of a question is in `scores.json` next to the lab,
# by arm.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
lab = folder.parents[3]
seed, arm = folder.parts[-3:-1]
behavior = json.loads((lab / "behavior.json").read_text())
with (lab / "calls").open("a") as calls:
    calls.write(f"{seed} {arm}\\n")
assert (folder / "config.yaml").is_file() and os.environ["OMP_NUM_THREADS"] == "1"
assert os.environ["HF_HUB_OFFLINE"] == "1"
first = not (folder / "begun").exists()
(folder / "begun").touch()
(folder / "checkpoints").mkdir(exist_ok=True)
what = behavior.get(f"{seed} {arm}")
if what == "fail":
    print("out of luck")
    sys.exit(3)
if what == "killed" and first:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "waits" and first:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (lab / "waiting").touch()
    time.sleep(60)
score = {"best": 0.2, "control": 0.3, "D": 0.6}[arm] + 0.1 * int(seed)
rows = [{"id": f"q{i}", "task_type": "ocr", "score": score, "sampled": score / 2, "valid": True} for i in range(4)]
text = "".join(json.dumps(row) + "\\n" for row in rows)
for name in ("stage1", "stage2", "control"):
    path = folder / "predictions" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text(text)
(folder / "metrics.jsonl").write_text('{"seconds/step": 1.5}\\n{"seconds/step": 2.0}\\n')
(folder / "evaluation.json").write_text('{"teacher_simulated": true}')
(folder / "run.json").write_text(json.dumps({"finished": "now", "hardware": "a CPU", "versions": {"torch": "2"}}))
"""


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Return a function that runs the lab with a script in place of the trainer, and one that lists the calls."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    monkeypatch.setattr(lab, "train_command", lambda folder: [sys.executable, str(script), str(folder)])
    monkeypatch.setattr(lab, "POLL_S", 0.02)
    path = write_plan(tmp_path)
    out = tmp_path / "out"
    out.mkdir()

    def run(*arguments: str, **behavior: str) -> int:
        (out / "behavior.json").write_text(json.dumps(behavior))
        (out / "calls").unlink(missing_ok=True)
        return lab.main([str(path), "--out", str(out), *arguments])

    def calls() -> list[str]:
        return (out / "calls").read_text().splitlines() if (out / "calls").exists() else []

    return run, calls, out


def test_a_lab_writes_a_table_and_a_chart(trained, capsys):
    run, calls, out = trained
    assert run() == 0
    assert calls() == ["0 best", "0 D", "0 control", "1 best", "1 D", "1 control"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plan.yaml: 6 runs (2 of stage 1, 4 of arms) over 2 seeds, 0 already finished, 1 at")
    assert lines[1].startswith("[1/6] seed 0, best: greedy 0.200, sampled 0.100; about")
    assert lines[6] == "[6/6] seed 1, control: greedy 0.400, sampled 0.200"
    table = (out / "table.md").read_text()
    assert "Held-out mean score of the questions of closed tasks. The teacher is simulated." in table
    # Mean of .6 and .7; standard error .05, times 12.7062.
    assert "| D | 2 | 0.650 [0.015, 1.285] | 0.325 [0.007, 0.643] | 4 |" in table
    assert "| D - control | greedy | 2 | +30.0 | [+30.0, +30.0] | [+30.0, +30.0] | both |" in table
    assert "| D - best | sampled | 2 | +20.0 | [+20.0, +20.0] | [+20.0, +20.0] | both |" in table
    result = json.loads((out / "lab.json").read_text())
    assert (result["metric"], result["finished"], result["teacher_simulated"]) == ("closed", 6, True)
    numbers = {"greedy": 0.7, "sampled": 0.35, "n": 4}
    assert result["runs"]["D"]["1"]["tasks"] == {"ocr": numbers} and result["runs"]["D"]["1"]["train_seconds"] == 3.5
    assert result["arms"]["D"]["greedy"]["mean"] == 0.65 and result["versions"] == {"torch": "2"}
    assert (out / result["runs"]["D"]["1"]["folder"] / "config.yaml").is_file()
    assert not list(out.glob("runs/*/*/*/checkpoints"))
    root = ElementTree.fromstring((out / "chart.svg").read_text())
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"best", "D", "control", "greedy", "sampled"} <= words
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3 * 2 * 2


def test_finished_runs_are_kept_and_arms_get_the_answers_of_their_stage_1(trained, capsys):
    run, calls, out = trained
    assert run("--only", "control", "--seeds", "1", "--keep") == 0
    assert calls() == ["1 best", "1 control"]
    assert len(list(out.glob("runs/*/*/*/checkpoints"))) == 2
    (best,), (control,) = out.glob("runs/1/best/*"), out.glob("runs/1/control/*")
    answers = [folder / "predictions" / "stage1.jsonl" for folder in (best, control)]
    assert answers[0].read_text() == answers[1].read_text()
    capsys.readouterr()
    assert run("--dry-run") == 0 and calls() == []
    queue = capsys.readouterr().out
    assert "seed 1, control, from best: control (finished)" in queue and "seed 0, best: sft (new)" in queue
    assert run("--jobs", "2") == 0
    assert sorted(calls()) == ["0 D", "0 best", "0 control", "1 D"]
    # Different settings give new runs, and the earlier runs stay. Stage 1 has no distillation.
    assert run("distill.steps=6") == 0
    assert sorted(calls()) == ["0 D", "0 control", "1 D", "1 control"]
    assert len(list(out.glob("runs/1/control/*"))) == 2


def test_an_arm_that_evaluates_otherwise_answers_for_itself(tmp_path):
    arm = {"from": "best", "settings": ["rollout.temperature=2"]}
    plan = read_plan(str(write_plan(tmp_path, arms={**PLAN["arms"], "hot": arm}, seeds=[0])))
    best, *arms = plan_jobs(plan, tmp_path)
    answers = best.folder / "predictions" / "stage1.jsonl"
    answers.parent.mkdir(parents=True)
    answers.write_text("answers")
    for job in arms:
        lab.prepare(job, tmp_path)
    copied = {job.entry.name: (job.folder / "predictions" / "stage1.jsonl").exists() for job in arms}
    assert copied == {"D": True, "control": True, "hot": False}


def test_a_killed_run_is_resumed_and_a_failed_one_does_not_stop_the_others(trained, capsys):
    run, calls, out = trained
    assert run(**{"0 D": "killed", "1 best": "fail"}) == 1
    captured = capsys.readouterr()
    assert calls() == ["0 best", "0 D", "0 control", "1 best"]
    assert "seed 0, D: failed with exit code -9" in captured.out
    assert "seed 1, best: failed with exit code 3" in captured.out and "    out of luck" in captured.out
    assert "seed 1, D: not trained, because seed 1, best failed" in captured.out
    assert "4 of 6 runs failed: seed 0, D; seed 1, best; seed 1, D; seed 1, control" in captured.err
    assert json.loads((out / "lab.json").read_text())["finished"] == 2
    (folder,) = out.glob("runs/0/D/*")
    assert (folder / "begun").exists()
    assert run(**{"0 D": "killed"}) == 0
    assert calls() == ["0 D", "1 best", "1 D", "1 control"]
    assert [*out.glob("runs/0/D/*")] == [folder]


def test_ctrl_c_stops_the_runs_and_the_same_command_goes_on(trained, capsys):
    run, calls, out = trained

    def interrupt():
        end = time.monotonic() + 30
        while not (out / "waiting").exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run(**{"0 D": "waits"}) == 130
    thread.join()
    error = capsys.readouterr().err
    assert "stopping 1 runs after their current step" in error
    assert "interrupted with 5 runs left; run the same command again to continue" in error
    assert run(**{"0 D": "waits"}) == 0
    assert calls() == ["0 D", "0 control", "1 best", "1 D", "1 control"]


def test_a_folder_with_other_settings_is_refused(trained, capsys):
    run, _, out = trained
    assert run("--seeds", "0") == 0
    (config,) = out.glob("runs/0/D/*/config.yaml")
    config.write_text(config.read_text().replace("score_l2: 0.001", "score_l2: 0.5"))
    assert run("--seeds", "0") == 2
    assert "expected the settings of seed 0, D, got other values of discriminator.score_l2" in capsys.readouterr().err


def test_a_setting_after_a_list_of_names_is_a_setting():
    arguments = lab._parse(["plan", "--seeds", "0", "1", "a.b=c", "--out=x", "--only", "D", "d.e=f", "--jobs", "2"])
    assert (arguments.seeds, arguments.only, arguments.overrides) == ([0, 1], ["D"], ["a.b=c", "d.e=f"])
    with pytest.raises(SystemExit):
        lab._parse(["plan", "more", "--out", "x"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_lab_of_an_arm_and_two_seeds(tmp_path, monkeypatch, capsys):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    sizes = [*MINI, "evaluate.rollouts=2", "rollout.temperature=1", "distill.steps=2"]
    # Other arms are runs of the same program, which a small script replaces in the tests above.
    path = write_plan(tmp_path, settings=sizes, arms={"D": {"from": "best"}}, comparisons=[["D", "best"]])
    out = tmp_path / "out"
    assert lab.main([str(path), "--out", str(out), "--jobs", "2"]) == 0, capsys.readouterr().out
    result = json.loads((out / "lab.json").read_text())
    assert result["finished"] == 4 and result["metric"] == "closed" and result["teacher_simulated"]
    for by_seed in result["runs"].values():
        assert set(by_seed) == {"0", "1"} and all({"greedy", "sampled"} <= set(run) for run in by_seed.values())
    for arm in out.glob("runs/*/D/*"):
        evaluation = json.loads((arm / "evaluation.json").read_text())
        assert list(evaluation["students"]) == ["stage1", "stage2"]
        assert "sampled" in evaluation["differences"]["stage2-stage1"]
    assert len(list((out / "made").glob("*/train.jsonl"))) == 2
    assert lab_results.METRICS["closed"] in (out / "table.md").read_text()
