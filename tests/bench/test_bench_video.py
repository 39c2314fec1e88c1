"""Test the benchmark of the media path: its processes, comparisons, verdicts and table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import noise_frames, write_clip

MIB = 2**20


@pytest.fixture(autouse=True)
def _malloc_restored():
    """Restore malloc's defaults, because bench/memory.py configures malloc for the whole process."""
    yield
    from bench.core.memory import plain_malloc

    with plain_malloc():
        pass


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4", noise_frames(12, 64, 96))


def _spread(seconds: float) -> dict[str, float]:
    return {"median": seconds, "p20": seconds, "p80": seconds}


def _side(cpu_s: float, mib: float = 1.0, **facts) -> dict:
    return {"cpu_s": _spread(cpu_s), "wall_s": _spread(cpu_s), "beyond_output_mib": mib, "rounds": 4, **facts}


def _record(name: str, part: str, variants: dict, **changes) -> dict:
    record = {
        "bench": "media",
        "name": name,
        "part": part,
        "shape": {"frames": 64, "GOP": 30},
        "device": "cpu",
        "quick": False,
        "variants": variants,
        "differences": {},
        "not_run": {},
        "libraries": {"ours": "torchcodec 1"},
        "cpu": "X",
        "threads": 2,
        "torch": "2",
        "commit": "a" * 40,
    }
    return record | changes


def _decode_record(ours: float = 6.0, **changes) -> dict:
    variants = {"ours": _side(ours), "decord": _side(5.0, mib=60.0), "PyAV seek": _side(9.0)}
    differences = {name: {"mean": 0.5, "worst_frame": 1.0} for name in ("decord", "PyAV seek")}
    return _record("decode-720p-64f-gop30", "decode", variants, differences=differences, **changes)


def _statuses(record: dict) -> list[str]:
    from bench.core.goals import verdicts

    found = verdicts([record], record["device"], ["media"])
    return [verdict.status for verdict in found if verdict.where == f"media {record['name']}"]


def test_decoding_is_compared_with_the_best_peer():
    assert _statuses(_decode_record(6.2)) == ["met", "met"]
    assert _statuses(_decode_record(6.3)) == ["MISSED", "met"]
    other = _decode_record()
    other["differences"]["decord"] = {"mean": 0.5, "worst_frame": 30.0}
    assert _statuses(other) == ["met", "MISSED"]
    alone = _decode_record()
    alone["variants"] = {"ours": _side(6.0)}
    assert _statuses(alone) == ["NOT MEASURED", "met"]


def test_preprocessing_is_compared_with_the_faster_layout():
    names = ("HF processor, frames as decoded", "HF processor, contiguous planes")
    variants = {"ours": _side(0.5, mib=2.0), names[0]: _side(2.0, 100.0), names[1]: _side(1.4, 9.0)}
    same = {name: {"levels": 0, "values": 0.0} for name in names}
    record = _record("preprocess-720p-64f", "preprocess", variants, differences=same)
    # The ratio is 2.8 in time and 2/9 in memory.
    assert _statuses(record) == ["MISSED", "MISSED", "met", "met"]
    variants[names[1]] = _side(1.5, 10.0)
    assert _statuses(record) == ["met", "met", "met", "met"]
    record["differences"] = {name: {"levels": 1, "values": 0.01} for name in names}
    assert _statuses(record) == ["met", "met", "MISSED", "MISSED"]
    record["variants"], record["not_run"] = {"ours": _side(0.5)}, {names[0]: "torchvision is not installed"}
    assert _statuses(record) == ["NOT MEASURED"] * 4


def test_verdicts_on_epochs_memory_and_cuda():
    two = {"epoch_1_s": _spread(10.0), "epoch_2_s": _spread(1.0), "rounds": 1}
    slow = two | {"epoch_2_s": _spread(1.1)}
    assert _statuses(_record("epochs-720p", "epochs", {"memory cache": two, "disk cache, new reader": slow})) == [
        "met",
        "MISSED",
    ]
    assert _statuses(_record("epochs-720p", "epochs", {"memory cache": two})) == ["met", "NOT MEASURED"]

    def mark(videos: int, own: float, workers: float, descriptors: int, processes: int) -> dict:
        sizes = {"own_mib": own, "workers_mib": workers, "descriptors": descriptors, "processes": processes}
        return {"videos": videos, **sizes}

    marks = [mark(100, 300, 900, 60, 3), mark(1000, 307, 920, 69, 4)]
    record = _record("flat", "flat", {"one reader": {"marks": marks, "decoded": 1001, "rounds": 1}})
    assert _statuses(record) == ["met", "MISSED", "MISSED", "MISSED", "met"]

    ours = _side(0.1, decoder="cuda")
    variants = {"ours": ours, "ours, copies counted": _side(0.1, to_host_mib=0.01), "decord, HF processor": _side(2.1)}
    assert _statuses(_record("cuda-720p-64f-gop30", "cuda", variants, device="cuda")) == ["met", "met", "met"]
    # The peer with the shortest wall time is used, regardless of its CPU time.
    variants["another, HF processor"] = _side(1.0) | {"wall_s": _spread(2.2)}
    assert _statuses(_record("cuda-720p-64f-gop30", "cuda", variants, device="cuda")) == ["met", "met", "met"]
    variants["decord, HF processor"]["wall_s"] = _spread(1.9)
    variants["another, HF processor"]["cpu_s"] = _spread(0.1)
    assert _statuses(_record("cuda-720p-64f-gop30", "cuda", variants, device="cuda")) == ["MISSED", "met", "met"]
    variants["decord, HF processor"] = _side(2.1)
    ours["decoder"], variants["ours, copies counted"]["to_host_mib"] = "cpu fallback", 72.0
    assert _statuses(_record("cuda-720p-64f-gop30", "cuda", variants, device="cuda")) == ["met", "MISSED", "MISSED"]


def test_newest_record_of_a_case_is_used_and_machines_are_never_mixed(tmp_path):
    from bench.core.records import load, save

    path = save(_decode_record(9.0), tmp_path)
    save(_decode_record(5.0), tmp_path)
    save(_decode_record(1.0, quick=True), tmp_path)
    assert path.name == "media.jsonl"
    (found,) = load(tmp_path, "media")
    assert found["variants"]["ours"]["cpu_s"]["median"] == 5.0
    # The charts of the losses do not include these records.
    assert load(tmp_path, "heads") == []
    with path.open("a") as file:
        file.write(json.dumps(_record("flat", "flat", {}, cpu="another")) + "\n")
    with pytest.raises(ValueError, match="several machines"):
        load(tmp_path, "media")
    assert [record["name"] for record in load(tmp_path, "media", hardware="another")] == ["flat"]
    assert load(tmp_path / "nothing", "media") == []


def test_table_has_every_case_and_every_goal():
    from bench.core.goals import GOALS
    from bench.core.report import media_page

    waits = {key: _spread(0.25) for key in ("first_wait_s", "epoch_1_wait_s", "epoch_2_wait_s", "compute_s")}
    mark = {"videos": 100, "own_mib": 300.0, "workers_mib": 900.0, "descriptors": 60, "processes": 3}
    two = {"epoch_1_s": _spread(10.0), "epoch_2_s": _spread(0.5), "rounds": 1}
    records = [
        _decode_record(not_run={"OpenCV grab": "cv2 is not installed"}),
        _record("ahead-720p", "ahead", {"one step ahead": {**waits, "rounds": 2}}, shape={"clips": 12}),
        _record("epochs-720p", "epochs", {"memory cache": two}, shape={"clips": 12}),
        _record("flat", "flat", {"one reader": {"marks": [mark], "decoded": 100}}, shape={"videos": 100}),
    ]
    text = media_page(records)
    assert (
        "| 64 frames, GOP 30 | decord | 5.000 | 5.000..5.000 | 5.000 | 0.83 | 60.0 | "
        "mean 0.50, worst frame 1.00 levels | 4 |"
    ) in text
    assert "| 12 clips | one step ahead | 0.250 s | 0.250 s | 0.250 s | 0.250 s | 2 |" in text
    assert "| 12 clips | memory cache | 10.000 s | 0.500 s | 20.0 | 1 |" in text
    assert "| 100 | 300 | 900 | 60 | 3 |" in text
    assert "- OpenCV grab: not run: cv2 is not installed" in text
    assert "| met | decode-720p-64f-gop30 | 1.20 of the CPU seconds of the best, decord" in text
    assert all(goal.case in text for goal in GOALS if (goal.bench, goal.device) == ("media", "cpu"))
    assert "| NOT MEASURED | preprocess-720p-16f | no record; promised: preprocessing time at least 3 |" in text
    assert "X, 2 threads, torch 2, commit aaaaaaaaaa; torchcodec 1." in text


def test_frames_and_patches_are_compared_in_levels():
    from bench.media.bench_video import frame_differences, patch_differences

    ours = np.zeros((2, 4, 4, 3), np.uint8)
    theirs = ours.copy()
    theirs[1] = 200
    assert frame_differences(ours, theirs) == {"mean": 100.0, "worst_frame": 200.0}
    patches = (torch.arange(256).float() - 127.5).div(127.5).view(8, 32).numpy()
    assert patch_differences(patches, patches + np.float32(1e-7))["levels"] == 0
    far = patch_differences(patches, patches + np.float32(2 / 127.5))
    assert far["levels"] == 2 and far["values"] == pytest.approx(2 / 127.5, rel=1e-4)
    with pytest.raises(AssertionError, match="expected"):
        frame_differences(ours, theirs[:1])


def test_rounds_rotate_and_slow_variants_run_in_fewer():
    from bench.media.bench_video import Pace, interleaved, numbers

    order: list[str] = []

    def call(name: str, seconds: float):
        def run() -> dict:
            order.append(name)
            return {"cpu_s": seconds, "wall_s": seconds, "decoder": "cpu"}

        return run

    calls = {"a": call("a", 1.0), "b": call("b", 3.0), "c": call("c", 1.5)}
    found = interleaved(calls, Pace(seconds=4.5, least=3, most=5, slow_s=2.5))
    # "b" takes more than twice as long as the fastest, and "c" has used its 4.5 s after three rounds.
    assert order == [*"abc", *"bca", *"ca", "a", "a"]
    assert numbers(found["b"]) == {"rounds": 2, "cpu_s": _spread(3.0), "wall_s": _spread(3.0), "decoder": "cpu"}


def test_cpu_and_memory_of_child_processes_count():
    import subprocess

    from bench.media.process import Work, memory_call, timed_call

    code = "\n".join(
        (
            "import sys, time",
            "sys.stdin.readline()",
            "while time.process_time() < 0.3: pass",
            "block = bytes([1]) * (64 << 20)",
            "print('done', flush=True)",
            "sys.stdin.readline()",
        )
    )

    def prepare() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(child: subprocess.Popen) -> torch.Tensor:
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "done\n"
        torch.ones(32 * MIB, dtype=torch.uint8)
        return torch.ones(16 * MIB, dtype=torch.uint8)

    def clean(child: subprocess.Popen) -> None:
        child.communicate("\n", timeout=30)

    work = Work(run, prepare, clean, facts=lambda result: {"bytes": result.nbytes})
    found = timed_call(work)
    assert 0.2 < found["cpu_s"] < 3 and found["wall_s"] > 0.2 and found["bytes"] == 16 * MIB
    found = memory_call(work, None)
    assert found["output_mib"] == 16
    # The child uses 64 MiB, and the process itself 32 and then 16.
    assert "peak_mib" not in found or 90 < found["peak_mib"] < 110
    assert "peak_mib" not in found or found["beyond_output_mib"] == pytest.approx(found["peak_mib"] - 16)


def test_a_variant_runs_in_its_own_process(clip: Path, tmp_path: Path):
    from bench.media.bench_video import frame_differences, started

    arguments = {"path": str(clip), "indices": [0, 5, 11], "warm": str(clip)}
    with started("decode", arguments, names=["ours"]) as (running, not_run):
        assert not not_run and running["ours"].library.startswith("torchcodec ")
        call = running["ours"].call()
        assert call["cpu_s"] > 0 and call["wall_s"] > 0
        found = running["ours"].memory(tmp_path / "ours.npy")
        assert found["output_mib"] == pytest.approx(3 * 64 * 96 * 3 / MIB)
        with pytest.raises(FileNotFoundError, match="no-folder") as failed:
            running["ours"].memory(tmp_path / "no-folder" / "ours.npy")
        # The traceback of its process comes with the error.
        assert "save_frames" in str(failed.value.__cause__)
    # The content is known, because smooth frames survive the encoding.
    expected = noise_frames(12, 64, 96)[[0, 5, 11]].permute(0, 2, 3, 1).numpy()
    assert frame_differences(np.load(tmp_path / "ours.npy"), expected)["worst_frame"] < 8


def test_files_for_cuda_are_prepared_once(clip: Path, tmp_path: Path, monkeypatch):
    from bench.media import bench_video
    from bench.media import files as video_files

    asked = []
    monkeypatch.setattr(video_files, "FOLDER", tmp_path)
    monkeypatch.setattr(video_files, "long_video", lambda gop: asked.append(gop) or clip)
    monkeypatch.setattr(bench_video, "chosen", lambda frames: [0, 5, 11])
    bench_video.make_files()
    path = Path(bench_video.decoded(64))
    changed = path.stat().st_mtime_ns
    assert np.load(path).shape[0] == 3 and asked == [30, 30] and not list(tmp_path.glob("unfinished*"))
    bench_video.make_files()
    assert path.stat().st_mtime_ns == changed


# decord and OpenCV have their own FFmpeg libraries, which must not be loaded into this process.
@pytest.mark.parametrize("name", ["PyAV sequential", "PyAV seek"])
def test_peers_find_the_same_frames(name: str, clip: Path, tmp_path: Path):
    from bench.core.measure import Unavailable
    from bench.media import variants as video_variants
    from bench.media.bench_video import frame_differences

    shown = []
    for variant in ("ours", name):
        try:
            work = video_variants.PARTS["decode"][variant](path=str(clip), indices=[0, 5, 11])
        except Unavailable as why:
            pytest.skip(str(why))
        work.save(work.run(None), tmp_path / "frames.npy")
        shown.append(np.load(tmp_path / "frames.npy"))
    assert frame_differences(*shown)["worst_frame"] < 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests variants for CUDA on a machine without CUDA")
def test_unavailable_variants_are_reported(clip: Path):
    from bench.core.measure import Unavailable
    from bench.media import variants as video_variants
    from bench.media.bench_video import started

    arguments = {"path": str(clip), "indices": [0, 1], "warm": str(clip)}
    with started("cuda", arguments, names=["ours, decode alone"]) as (running, not_run):
        assert not running and not_run == {"ours, decode alone": "needs a CUDA device"}
    # Without our variant there is nothing to compare.
    with pytest.raises(Unavailable, match="CUDA"):
        video_variants.PARTS["cuda"]["ours"](**arguments)


def test_copies_differ_in_content_but_not_in_frames(clip: Path, tmp_path: Path):
    from bench.media.files import copies
    from rmsd_fast.config import VideoConfig
    from rmsd_fast.data.preprocess import Preprocessor
    from rmsd_fast.data.video import MediaRequest, read_media

    made = copies(clip, tmp_path / "copies", 3)
    assert len({path.read_bytes() for path in (clip, *made)}) == 4
    requests = [MediaRequest(str(path), "video", VideoConfig(num_frames=4), Preprocessor()) for path in (clip, made[2])]
    assert torch.equal(*(read_media(request).pixels for request in requests))


def test_the_scene_continues_across_the_cut(tmp_path: Path):
    from bench.media.files import encoded, scene

    assert torch.equal(scene(0, 4, 48, 64)[2:], scene(2, 2, 48, 64))
    path = encoded(tmp_path / "made.mp4", frames=10, height=48, width=64, gop=5)
    changed = path.stat().st_mtime_ns
    assert encoded(path, frames=10, height=48, width=64, gop=5).stat().st_mtime_ns == changed
    from torchcodec.decoders import VideoDecoder

    assert VideoDecoder(path).metadata.num_frames == 10


def test_every_goal_has_its_case():
    import inspect

    from bench.core.goals import GOALS, GOPS, SIZES
    from bench.media import bench_video

    names = {"epochs-720p", "flat", "cuda-720p-64f-gop30"} | {f"preprocess-720p-{frames}f" for frames in SIZES}
    names |= {f"decode-720p-{frames}f-gop{gop}" for frames in SIZES for gop in GOPS}
    assert {goal.case for goal in GOALS if goal.bench == "media"} == names
    source = inspect.getsource(bench_video)
    # Cases are checked against the programs that run them.
    for name in ("epochs-720p", "flat", "cuda-720p-64f-gop30"):
        assert f'"{name}"' in source
