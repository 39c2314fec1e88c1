"""Test that an evaluation continues after a kill, with the same result, and never with other settings."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from material import WORLD
from train_runs import MINI, environment
from warm_process import run_program, start_programs

from rmsd_fast.runtime.process_group import World
from rmsd_fast.stages.answer_store import AnswerStore, OtherAnswers, delete_parts

IDENTITY = {"model": {"path": "m", "hash": "1"}, "protocol": {"seed": 0, "versions": {"torch": "2"}}}


def record(name: str) -> dict:
    return {"id": name, "score": 0.1, "response": "é\u2028x"}


def fill(path: Path, *names: str, world: World = WORLD) -> dict[str, dict]:
    """Append answers to the store, and return those that it had."""
    with AnswerStore(path, IDENTITY, world) as store:
        store.append([record(name) for name in names])
        return store.done


def test_answers_of_all_processes_are_found_by_any_number_of_them(tmp_path):
    path = tmp_path / "sub" / "x.predictions.jsonl"
    assert fill(path, "a", "b") == {}
    assert (path.parent / "x.predictions.jsonl.part0").is_file()
    # Another process of the same evaluation, as rank 1 of 2 would write it.
    part = path.with_name(f"{path.name}.part1")
    head = path.with_name(f"{path.name}.part0").read_text().splitlines()[0]
    part.write_text(f"{head}\n{json.dumps(record('c'))}\n{json.dumps(record('b'))}\n")
    assert fill(path, "d") == {name: record(name) for name in "abc"}
    assert set(fill(path)) == set("abcd")
    delete_parts(path, World(rank=1, size=2, local_rank=1, device=WORLD.device))
    assert len(list(path.parent.iterdir())) == 2
    # The first process of another node deletes what it sees there.
    delete_parts(path, World(rank=1, size=2, local_rank=0, device=WORLD.device))
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 12])
def test_a_torn_line_is_dropped(tmp_path, cut, caplog):
    path = tmp_path / "x.jsonl"
    fill(path, "a", "b")
    part = tmp_path / "x.jsonl.part0"
    part.write_bytes(part.read_bytes()[:-cut])
    assert set(fill(path, "c")) == {"a"}
    assert "x.jsonl.part0: line 3 is damaged" in caplog.text
    assert set(fill(path)) == {"a", "c"}


def test_a_damaged_line_ends_what_is_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    fill(path, "a", "b", "c")
    part = tmp_path / "x.jsonl.part0"
    part.write_bytes(part.read_bytes().replace(b'"id": "b"', b'"id"; "b"'))
    assert set(fill(path, "d")) == {"a"} and set(fill(path)) == {"a", "d"}
    # Without its first line, a file says nothing about its settings.
    part.write_bytes(part.read_bytes()[5:])
    assert fill(path, "e") == {} and set(fill(path)) == {"e"}


def test_answers_with_other_settings_are_refused(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    fill(path, "a")
    other = {"model": {"path": "m", "hash": "2"}, "protocol": {"seed": 3, "versions": {"torch": "2"}}}
    with pytest.raises(
        OtherAnswers, match=r"x.jsonl.part0: .* got other ones \(model.hash: 1, not 2; protocol.seed: 0"
    ):
        AnswerStore(path, other, WORLD)
    # They are still there, and a training run that was allowed to change replaces them with a warning.
    assert set(fill(path)) == {"a"}
    with AnswerStore(path, other, WORLD, discard=True) as store:
        assert store.done == {}
        store.append([record("z")])
    assert "will be answered again" in caplog.text
    with AnswerStore(path, other, WORLD) as store:
        assert set(store.done) == {"z"}


def test_questions_that_could_not_be_used_are_asked_again(tmp_path):
    """The missing file may be there now."""
    path = tmp_path / "x.jsonl"
    missing = {"id": "b", "score": 0.0, "error": "b.mp4: no such file", "reason": "missing_media"}
    with AnswerStore(path, IDENTITY, WORLD) as store:
        store.append([record("a"), missing])
    with AnswerStore(path, IDENTITY, WORLD) as store:
        assert store.done == {"a": record("a")}
        store.append([record("b")])
    assert fill(path) == {"a": record("a"), "b": record("b")}


def test_a_file_without_answers_refuses_nothing(tmp_path):
    """The program may end before its first batch, for example because the model cannot be loaded."""
    path = tmp_path / "x.jsonl"
    fill(path)
    with AnswerStore(path, {"model": "another"}, WORLD) as store:
        assert store.done == {}
        store.append([record("a")])
    with AnswerStore(path, {"model": "another"}, WORLD) as store:
        assert set(store.done) == {"a"}


def test_every_node_has_a_folder_of_its_own(tmp_path):
    """Two processes on different nodes, without a shared file system: each writes and deletes its answers."""
    script = """if True:
        import sys
        from pathlib import Path
        import torch, torch.distributed as dist
        from rmsd_fast.runtime.process_group import World
        from rmsd_fast.stages.answer_store import AnswerStore, delete_parts

        rank, folder = int(sys.argv[1]), Path(sys.argv[2])
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        world = World(rank, 2, 0, torch.device("cpu"))
        path = folder / f"node{rank}" / "answers" / "x.jsonl"
        with AnswerStore(path, {}, world) as store:
            store.append([{"id": str(rank)}])
        assert [file.name for file in path.parent.iterdir()] == [f"x.jsonl.part{rank}"]
        delete_parts(path, world)
        assert not list(path.parent.iterdir())
    """
    nodes = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)], env=environment())
        for rank in range(2)
    ]
    assert [node.wait(timeout=120) for node in nodes] == [0, 0]


@pytest.mark.timeout(600)
def test_a_killed_evaluation_continues_with_the_same_result(tmp_path):
    """Kill the program in the middle, tear its last line, continue with two processes, and compare the files."""
    sizes = ["made.heldout_clips=24", "evaluate.prompts_per_batch=4", "evaluate.max_new_tokens=24"]
    sampled = ["evaluate.rollouts=2", "rollout.temperature=1"]
    # The program refuses settings of training on its command line.
    small = [setting for setting in MINI if setting.startswith("made.")]
    shared = ["quickstart", *small, f"made.folder={tmp_path / 'made'}", *sizes, *sampled]

    def evaluate(output: Path, processes: int = 1) -> subprocess.CompletedProcess:
        arguments = [*shared, "--output", str(output)]
        return run_program("rmsd_fast.evaluate", arguments, environment(), processes=processes, timeout_s=200)

    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    done = evaluate(whole)
    assert whole.is_file(), done.stderr
    part = tmp_path / "killed.predictions.jsonl.part0"
    (first,) = start_programs("rmsd_fast.evaluate", [*shared, "--output", str(killed)], environment(), [{}])
    while first.poll() is None and not (part.exists() and len(part.read_bytes().splitlines()) > 9):
        time.sleep(0.01)
    first.kill()
    first.wait(timeout=60)
    before = part.read_bytes()
    # Five of 18 batches of 4 were to come, or the kill came too late to test anything.
    assert not killed.exists() and 9 < len(before.splitlines()) < 60
    part.write_bytes(before[:-20])
    done = evaluate(killed, processes=2)
    assert done.returncode == 0 and "continuing an interrupted evaluation" in done.stderr, done.stderr
    results = [path.with_suffix(".predictions.jsonl").read_bytes() for path in (whole, killed)]
    assert results[0] == results[1] and len(results[0].splitlines()) == 72
    assert whole.read_bytes() == killed.read_bytes()
    assert not list(tmp_path.glob("*.part*"))
