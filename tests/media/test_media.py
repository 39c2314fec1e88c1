"""Test the media reader: caches, decoder processes, remembered failures, and decoder faults."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damaged_files import encoded
from media_files import write_images
from PIL import Image
from processes import wait_until_gone

from rmsd_fast.config import DataConfig, NotInstalled, SettingsError, VideoConfig
from rmsd_fast.data import media
from rmsd_fast.data.decode_worker import MOST_MEMORY_BYTES, Worker
from rmsd_fast.data.media import COUNTS, MediaReader, MediaUnreachable, choose_decoder
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import MediaRequest, read_media

PREPROCESSOR = Preprocessor()
NONE = dict.fromkeys(COUNTS, 0)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    encoded(path)
    return path


@pytest.fixture
def reader():
    with MediaReader(DataConfig(decode_timeout_s=60.0)) as reader:
        yield reader


def request(path: Path, frames: int = 4, **changes) -> MediaRequest:
    return MediaRequest(str(path), "video", VideoConfig(num_frames=frames), PREPROCESSOR, **changes)


def same(one, other) -> bool:
    fields = [replace(frames, pixels=torch.empty(0), key="") for frames in (one, other)]
    return torch.equal(one.pixels, other.pixels) and repr(fields[0]) == repr(fields[1])


def test_frames_from_a_worker_are_those_of_the_file(clip: Path, tmp_path: Path, reader: MediaReader) -> None:
    assert same(reader.read(request(clip, span=(0.4, None))), read_media(request(clip, span=(0.4, None))))
    (tmp_path / "images").mkdir()
    for path in write_images(tmp_path / "images").values():
        image = replace(request(path), kind="image")
        assert same(reader.read(image), read_media(image))
        assert reader.layout(image).grid_thw == reader.read(image).grid_thw


def test_frames_outlive_the_worker_and_the_reader(clip: Path) -> None:
    with MediaReader(DataConfig()) as reader:
        frames = reader.read(request(clip))
    frames.pixels.add_(1)
    assert len(frames.pixels) == 4


def test_concurrent_requests_decode_a_file_once(clip: Path, reader: MediaReader) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: reader.read(request(clip)), range(16)))
    assert all(frames.pixels.data_ptr() == found[0].pixels.data_ptr() for frames in found)
    counts = reader.take_counts()
    assert counts["decoded"] == 1 and counts["memory_hits"] <= 15
    assert reader.take_counts() == NONE


def test_cache_key_depends_on_content_and_settings(clip: Path, tmp_path: Path, reader: MediaReader) -> None:
    wanted = request(clip)
    key = reader.read(wanted).key
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    # The key depends on the content and not on the name, nor on the settings of the other kind of medium.
    for alike in (request(copy), replace(wanted, settings=VideoConfig(num_frames=4, max_image_pixels=4096))):
        assert reader.read(alike).key == key
    others = [request(clip, 5), request(clip, span=(0.0, 1.0))]
    for change in ({"max_frame_pixels": 32 * 32}, {"max_video_pixels": 4096}, {"min_video_pixels": 1024}):
        others.append(replace(wanted, settings=VideoConfig(num_frames=4, **change)))
    others.append(replace(wanted, settings=VideoConfig(num_frames=None, fps=2.0)))
    others.append(replace(wanted, preprocessor=Preprocessor(14)))
    reader.data.check_frames = False
    unchecked = reader.read(wanted).key
    reader.data.check_frames = True
    others.append(replace(wanted, preprocessor=Preprocessor(family="qwen2_vl")))
    encoded(copy, g="5")
    others.append(request(copy))
    keys = [reader.read(other).key for other in others]
    assert len({key, unchecked, *keys}) == 2 + len(others)
    assert wanted.key("digest", "cpu") != wanted.key("digest", "cuda")


def test_cached_frames_hold_no_descriptors(tmp_path: Path) -> None:
    """A run keeps thousands of videos in memory, and many systems allow 1024 open files."""
    from PIL import Image

    code = f"""
import resource
from pathlib import Path
from rmsd_fast.config import DataConfig, VideoConfig
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import MediaRequest
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with MediaReader(DataConfig()) as reader:
    kept = [
        reader.read(MediaRequest(str(path), "image", VideoConfig(), Preprocessor()))
        for path in sorted(Path({str(tmp_path)!r}).glob("*.png"))
    ]
assert len({{frames.pixels.data_ptr() for frames in kept}}) == 150
assert all(frames.pixels.float().mean() == number for number, frames in enumerate(kept))
"""
    for number in range(150):
        Image.new("RGB", (64, 64), (number,) * 3).save(tmp_path / f"{number:03}.png")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_changed_file_is_read_again(clip: Path, reader: MediaReader) -> None:
    before = reader.read(request(clip))
    encoded(clip, g="3")
    after = reader.read(request(clip))
    assert after.key != before.key and reader.take_counts()["decoded"] == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(clip: Path, reader: MediaReader, monkeypatch) -> None:
    read = Worker.read

    def replaced(self: Worker, request: MediaRequest, timeout_s: float):
        encoded(clip, g="3")
        return read(self, request, timeout_s)

    monkeypatch.setattr(Worker, "read", replaced)
    with pytest.raises(MediaError, match="the file changed while it was read"):
        reader.read(request(clip))
    monkeypatch.undo()
    assert same(reader.read(request(clip)), read_media(request(clip)))


def test_a_bad_file_is_opened_once_until_it_changes(tmp_path: Path, reader: MediaReader) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no video \0 at all")
    for _ in range(2):
        with pytest.raises(MediaError, match="got an unknown kind of file"):
            reader.read(request(path))
    reader._take_worker = None  # type: ignore[assignment]
    with pytest.raises(MediaError, match="got an unknown kind of file"):
        reader.read(request(path))
    del reader._take_worker
    encoded(path)
    assert len(reader.read(request(path)).pixels) == 4


def test_a_hanging_decoder_fails_one_file(clip: Path, reader: MediaReader) -> None:
    reader.read(request(clip))
    (worker,) = reader._idle
    os.kill(worker.pid, signal.SIGSTOP)
    reader.data.decode_timeout_s = 0.5
    with pytest.raises(MediaError, match=r"not read within data\.decode_timeout_s=0\.5"):
        reader.read(request(clip, 5))
    reader.data.decode_timeout_s = 60.0
    assert len(reader.read(request(clip, 6)).pixels) == 6
    wait_until_gone(worker.pid)
    assert reader.take_counts() == {**NONE, "decoded": 2, "timeouts": 1}


def test_a_crashed_decoder_is_retried_once(clip: Path, reader: MediaReader, monkeypatch) -> None:
    reader.read(request(clip))
    read, crashes = Worker.read, [signal.SIGSEGV]

    def crashing(self: Worker, request: MediaRequest, timeout_s: float):
        if crashes:
            os.kill(self.pid, crashes.pop())
            wait_until_gone(self.pid)
        return read(self, request, timeout_s)

    monkeypatch.setattr(Worker, "read", crashing)
    assert len(reader.read(request(clip, 5)).pixels) == 5
    assert reader.take_counts() == {**NONE, "decoded": 2, "crashes": 1}


def test_killed_idle_workers_do_not_count_as_crashes(clip: Path, reader: MediaReader) -> None:
    """Two dead workers would look like a file that crashes its decoder twice."""
    workers = [reader._take_worker() for _ in range(3)]
    for frames, worker in enumerate(workers, start=4):
        worker.read(reader._complete(request(clip, frames)), 60.0)
        reader._give_back(worker)
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        wait_until_gone(worker.pid)
    assert len(reader.read(request(clip, 7)).pixels) == 7
    assert reader.take_counts() == {**NONE, "decoded": 1}


def test_a_worker_that_dies_with_its_fork_server_does_not_blame_the_file(
    clip: Path, reader: MediaReader, monkeypatch
) -> None:
    read, kills = Worker.read, [1, 2, 3]

    def killed(self: Worker, request: MediaRequest, timeout_s: float):
        if kills and self.pid is not None:
            kills.pop()
            self.fork_server.process.kill()
            wait_until_gone(self.pid)
        return read(self, request, timeout_s)

    reader.layout(request(clip))
    monkeypatch.setattr(Worker, "read", killed)
    assert len(reader.read(request(clip)).pixels) == 4
    assert len(reader.read(request(clip, 5)).pixels) == 5
    assert reader.take_counts() == {**NONE, "decoded": 2}


def test_signals_to_all_processes_do_not_reach_decoders(clip: Path, reader: MediaReader) -> None:
    reader.read(request(clip))
    (worker,) = reader._idle
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.pid, number)
        reader._fork_server.process.send_signal(number)
    assert len(reader.read(request(clip, 5)).pixels) == 5
    assert reader._idle == [worker]


def test_a_file_that_crashes_every_decoder_is_bad(clip: Path, reader: MediaReader, monkeypatch) -> None:
    def doomed(self: Worker, request: MediaRequest, timeout_s: float):
        if self.pid is None:
            self.pid = self._connection.recv()
        os.kill(self.pid, signal.SIGKILL)
        return read(self, request, timeout_s)

    reader.layout(request(clip))
    read = Worker.read
    monkeypatch.setattr(Worker, "read", doomed)
    with pytest.raises(MediaError, match="the decoder process ended"):
        reader.read(request(clip))
    assert reader.take_counts() == {**NONE, "crashes": 2}
    monkeypatch.undo()
    # The failure is remembered, and other files can still be read.
    with pytest.raises(MediaError, match="the decoder process ended"):
        reader.read(request(clip))
    assert len(reader.read(request(clip, 5)).pixels) == 5


def test_consecutive_hanging_files_are_not_blamed(clip: Path, reader: MediaReader, monkeypatch) -> None:
    def hanging(self: Worker, request: MediaRequest, timeout_s: float):
        raise media.WorkerLost(f"{request.path}: not read", timed_out=True)

    reader.read(request(clip))
    monkeypatch.setattr(Worker, "read", hanging)
    for frames in (5, 6):
        with pytest.raises(MediaError):
            reader.read(request(clip, frames))
    with pytest.raises(MediaUnreachable, match="3 files in a row were not read, or not in time"):
        reader.read(request(clip, 7))
    monkeypatch.undo()
    # The last file is not remembered as bad either, and a successful read resets the count.
    assert len(reader.read(request(clip, 7)).pixels) == 7
    assert reader._failures_in_a_row == 0


def test_missing_machine_resources_do_not_blame_the_file(clip: Path, reader: MediaReader) -> None:
    reader.read(request(clip))
    (worker,) = reader._idle
    limit = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (3, limit[1]))
    for frames in (5, 6):
        with pytest.raises(
            MediaError, match=r"clip\.mp4: cannot be read on this machine \(Too many open files\); check"
        ):
            reader.read(request(clip, frames))
    with pytest.raises(MediaUnreachable, match="3 files in a row were not read"):
        reader.read(request(clip, 7))
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, limit)
    assert len(reader.read(request(clip, 5)).pixels) == 5


def test_a_worker_has_a_memory_limit(tmp_path: Path, reader: MediaReader) -> None:
    path = tmp_path / "large.png"
    Image.new("RGB", (5000, 5000)).save(path)
    asked = replace(request(path), kind="image")
    reader.layout(asked)
    (worker,) = reader._idle
    limit, _ = resource.prlimit(worker.pid, resource.RLIMIT_DATA)
    assert MOST_MEMORY_BYTES < limit < MOST_MEMORY_BYTES + 2 * 2**30
    resource.prlimit(worker.pid, resource.RLIMIT_DATA, (limit - MOST_MEMORY_BYTES + 16 * 2**20, limit))
    with pytest.raises(MediaError, match=r"large\.png: cannot be decoded"):
        reader.read(asked)


def test_a_lost_fork_server_is_started_again(clip: Path, reader: MediaReader) -> None:
    for frames in range(4, 5 + media.MOST_STARTS):
        assert len(reader.read(request(clip, frames)).pixels) == frames
        pid = reader._idle[0].pid
        reader._fork_server.process.kill()
        wait_until_gone(pid)


def test_a_fork_server_that_cannot_start_ends_the_run(clip: Path, monkeypatch, capfd) -> None:
    original = subprocess.Popen

    def broken(command, **options):
        return original([sys.executable, "-c", "raise SystemExit('no decoder here')"], **options)

    monkeypatch.setattr("rmsd_fast.data.decode_worker.subprocess.Popen", broken)
    with MediaReader(DataConfig()) as reader:
        for _ in range(2):
            with pytest.raises(NotInstalled, match="has ended 3 times in a row"):
                reader.read(request(clip))
    assert capfd.readouterr().err.count("no decoder here") == media.MOST_STARTS


def test_a_worker_ends_quietly_if_the_program_ends_first(clip: Path) -> None:
    script = f"""
import os
from rmsd_fast.config import VideoConfig
from rmsd_fast.data.decode_worker import ForkServer
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import MediaRequest

worker = ForkServer().worker()
request = MediaRequest({str(clip)!r}, "video", VideoConfig(), Preprocessor())
worker.read(request, 300.0)
worker._connection.send(("read", request))
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_closing_ends_a_decode_in_the_middle(clip: Path) -> None:
    reader = MediaReader(DataConfig(decode_timeout_s=300.0))
    reader.read(request(clip))
    pid = reader._idle[0].pid
    os.kill(pid, signal.SIGSTOP)
    failure: list[BaseException] = []

    def read() -> None:
        try:
            reader.read(request(clip, 5))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(1000):
        if reader._busy:
            break
        time.sleep(0.01)
    reader.close()
    thread.join(timeout=20)
    # The error is not a MediaError, because the file is not at fault.
    assert not thread.is_alive() and str(failure[0]) == "the media reader was closed"
    assert not isinstance(failure[0], MediaError)
    wait_until_gone(pid)


def test_workers_end_with_a_program_that_is_killed(clip: Path) -> None:
    code = f"""
import sys, time
from rmsd_fast.config import DataConfig, VideoConfig
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import MediaRequest
reader = MediaReader(DataConfig())
reader.read(MediaRequest({str(clip)!r}, "video", VideoConfig(num_frames=4), Preprocessor()))
print(reader._fork_server.process.pid, reader._idle[0].pid, flush=True)
time.sleep(300)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    for pid in pids:
        wait_until_gone(pid)


def test_workers_are_replaced_after_a_while(clip: Path, reader: MediaReader, monkeypatch) -> None:
    monkeypatch.setattr(media, "MOST_ANSWERS", 2)
    pids = set()
    for frames in range(4, 10):
        # The first read takes the hash and the frames, and the other reads take only the frames.
        reader.read(request(clip, frames))
        pids |= {worker.pid for worker in reader._idle}
    assert len(pids) == 3 and reader.take_counts() == {**NONE, "decoded": 6}


def test_a_user_error_in_a_worker_is_raised_in_the_caller(clip: Path, reader: MediaReader) -> None:
    with pytest.raises(SettingsError, match=r"video\.num_frames: expected at least 2"):
        reader.read(request(clip, 1))
    assert len(reader._idle) == 1


def test_an_unexpected_library_error_fails_one_file(clip: Path, reader: MediaReader, monkeypatch) -> None:
    """Check a worker and the thread that decodes on the GPU; for the thread only the exception is tested."""

    def broken(*_, **__):
        raise ZeroDivisionError("Fraction(1, 0)")

    monkeypatch.setattr(media, "read_media", broken)
    with pytest.raises(MediaError, match=r"clip\.mp4: cannot be decoded \(ZeroDivisionError: Fraction\(1, 0\)\); drop"):
        reader._on_cuda(request(clip), reader._state(request(clip)))
    # The file is not blamed for a fault of the device.
    monkeypatch.setattr(media, "read_media", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        reader._on_cuda(request(clip, 5), reader._state(request(clip, 5)))
    assert not isinstance(caught.value, MediaError)


def test_disk_cache_serves_another_reader(clip: Path, tmp_path: Path, monkeypatch) -> None:
    data = DataConfig(disk_cache=str(tmp_path / "cache"))
    with MediaReader(data) as first:
        frames = first.read(request(clip))
    with MediaReader(data) as second:
        again = second.read(request(clip))
        assert same(frames, again) and again.key == frames.key
        assert second.take_counts() == {**NONE, "disk_hits": 1}
        second.read(request(clip))
        assert second.take_counts() == {**NONE, "memory_hits": 1}
    # A cache hit does not open a decoder, not even to read the layout.
    monkeypatch.setattr(Worker, "layout", None)
    with MediaReader(data) as second:
        layout = second.layout(request(clip))
        assert (layout.timestamps_s, layout.grid_thw, layout.kind) == (frames.timestamps_s, frames.grid_thw, "video")
    (entry,) = (tmp_path / "cache").glob("*/*.frames")
    with entry.open("r+b") as file:
        file.seek(8000)
        file.write(b"\xff\x00\xff\x00")
    with MediaReader(data) as third:
        assert same(frames, third.read(request(clip)))
        assert third.take_counts() == {**NONE, "decoded": 1, "disk_rebuilt": 1}


def test_decoder_selection() -> None:
    assert choose_decoder("cpu", torch.device("cuda")) == ("cpu", "")
    assert choose_decoder("auto", torch.device("cpu")) == ("cpu", "")
    with pytest.raises(SettingsError, match=r"data\.decoder=cpu or auto"):
        choose_decoder("cuda", torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines whose torchcodec cannot decode on CUDA")
def test_auto_says_why_it_is_not_cuda() -> None:
    decoder, reason = choose_decoder("auto", torch.device("cuda"))
    assert decoder == "cpu" and "a test video could not be decoded with CUDA" in reason
    with pytest.raises(NotInstalled, match=r"data\.decoder=cuda: a test video"):
        choose_decoder("cuda", torch.device("cuda"))


@pytest.mark.cuda
def test_nvdec_leaves_pixels_on_the_gpu(tmp_path: Path) -> None:
    from media_files import noise_frames
    from torchcodec.encoders import VideoEncoder

    path = tmp_path / "clip.mp4"
    VideoEncoder(noise_frames(20, 256, 320), frame_rate=10).to_file(path, pixel_format="yuv420p")
    with MediaReader(DataConfig(decoder="cuda"), "cuda:0") as reader:
        frames = reader.read(request(path))
        assert frames.pixels.is_cuda and frames.decoder == "cuda"
        # The pixels do not match bit for bit, because the decoder differs and the resize is in floating point.
        expected = read_media(request(path))
        assert (frames.pixels.cpu().float() - expected.pixels.float()).abs().mean() < 3
        assert frames.timestamps_s == expected.timestamps_s
        assert reader.read(request(path)).pixels.data_ptr() == frames.pixels.data_ptr()


@pytest.mark.cuda
def test_frames_for_a_gpu_come_pinned(clip: Path) -> None:
    with MediaReader(DataConfig(decoder="cpu"), "cuda:0") as reader:
        assert reader.read(request(clip)).pixels.is_pinned()
