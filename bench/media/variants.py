"""The variants of each part of the media path: ours, and the libraries that users have instead.

decode: file -> the chosen uint8 frames. preprocess: frames -> patches. file: file -> patches. Each function builds a
`Work` in the variant's own process, with one thread where a library has such a setting. The parts `ahead`, `epochs` and
`flat` are in loader.py.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rmsd_kernels
from bench.core.measure import Unavailable, find_torchvision, need
from bench.media import loader
from bench.media.process import Work
from rmsd_fast.config import DataConfig, VideoConfig
from rmsd_fast.data import preprocess, video, video_file
from rmsd_fast.data.media_file import open_media
from rmsd_fast.data.preprocess import Preprocessor

PREPROCESSOR = Preprocessor()
Build = Callable[..., Work]


# Decoding. Frames stay in the layout that each library gives them in; all are H x W x 3 in memory.


def save_frames(frames: list[Any], path: Path) -> None:
    """Save as one array [F, H, W, 3]."""
    np.save(path, np.concatenate([_hwc(chunk) for chunk in frames]))


def _hwc(chunk: Any) -> np.ndarray:
    if isinstance(chunk, torch.Tensor):
        return chunk.permute(0, 2, 3, 1).cpu().numpy()
    return chunk if chunk.ndim == 4 else chunk[None]


def _decode_work(run: Callable[[], list[Any]], library: str) -> Work:
    return Work(lambda _: run(), output=lambda frames: frames, save=save_frames, library=library)


def _torchcodec_versions() -> str:
    core = need("torchcodec._core")
    return f"torchcodec {metadata.version('torchcodec')}, FFmpeg {core.get_ffmpeg_library_versions()['ffmpeg_version']}"


def decode_ours(path: str, indices: list[int], device: str = "cpu") -> Work:
    """The decoder of rmsd_fast.data.video, in its chunks of frames. There each is resized and goes, here all stay."""
    need("torchcodec.decoders")
    _need_device(device)

    def run() -> list[torch.Tensor]:
        with open_media(path, DataConfig.max_file_mib) as media:
            decoder = video_file.open_clip(media, device).decoder
            per_call = max(1, video_file.RAW_BYTES // (3 * decoder.metadata.height * decoder.metadata.width))
            starts = range(0, len(indices), per_call)
            frames = [decoder.get_frames_at(indices=indices[start : start + per_call]).data for start in starts]
        if device != "cpu":
            torch.cuda.synchronize()
        return frames

    return _decode_work(run, _torchcodec_versions())


def decode_torchcodec(path: str, indices: list[int], seek_mode: str) -> Work:
    decoders = need("torchcodec.decoders")

    def run() -> list[torch.Tensor]:
        decoder = decoders.VideoDecoder(path, num_ffmpeg_threads=1, seek_mode=seek_mode)
        return [decoder.get_frames_at(indices=indices).data]

    return _decode_work(run, _torchcodec_versions())


def decode_av(path: str, indices: list[int], seek: bool) -> Work:
    """All frames up to the last wanted one; or, for each frame, from the key frame before it."""
    av = need("av")

    def run() -> list[np.ndarray]:
        with av.open(path) as container:
            stream, found = container.streams.video[0], []
            stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"
            if not seek:
                wanted = set(indices)
                frames = itertools.islice(container.decode(stream), max(indices) + 1)
                return [f.to_ndarray(format="rgb24") for number, f in enumerate(frames) if number in wanted]
            for index in indices:
                target = round(index / stream.average_rate / stream.time_base) + (stream.start_time or 0)
                container.seek(target, stream=stream, backward=True)
                frame = next(frame for frame in container.decode(stream) if frame.pts >= target)
                found.append(frame.to_ndarray(format="rgb24"))
            return found

    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return _decode_work(run, f"PyAV {metadata.version('av')}, libavcodec {codec}")


def decode_decord(path: str, indices: list[int]) -> Work:
    decord = need("decord")

    def run() -> list[np.ndarray]:
        return [decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()]

    return _decode_work(run, f"decord {metadata.version('decord')}")


def decode_opencv(path: str, indices: list[int], seek: bool) -> Work:
    cv2 = need("cv2")
    cv2.setNumThreads(1)
    found = re.search(r"avcodec:\s+YES \(([\d.]+)\)", cv2.getBuildInformation())

    def run() -> list[np.ndarray]:
        capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        wanted, frames = set(indices), []
        for number in indices if seek else range(max(indices) + 1):
            if seek:
                capture.set(cv2.CAP_PROP_POS_FRAMES, number)
            if not capture.grab():
                raise RuntimeError(f"{path}: OpenCV found no frame {number}")
            if number in wanted:
                frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
        capture.release()
        return frames

    return _decode_work(run, f"OpenCV {cv2.__version__}, libavcodec {found[1] if found else '?'}")


# Preprocessing.


def _target_size(frames: torch.Tensor) -> dict[str, int]:
    """Height and width that ours resizes to."""
    count, (height, width) = len(frames), frames.shape[-2:]
    found = preprocess.video_size(count, height, width, VideoConfig(num_frames=count), PREPROCESSOR)
    return dict(zip(("height", "width"), found, strict=True))


def load_raw(path: str) -> torch.Tensor:
    """Frames [F, 3, H, W] as torchcodec gives them: a view of H x W x 3 in memory."""
    return torch.from_numpy(np.load(path)).permute(0, 3, 1, 2)


def save_patches(patches: torch.Tensor, path: Path) -> None:
    np.save(path, patches.float().cpu().numpy())


def _need_device(device: str) -> None:
    if device != "cpu" and not torch.cuda.is_available():
        raise Unavailable("needs a CUDA device")


def _ours_library() -> str:
    from rmsd_kernels import native

    return f"rmsd_kernels, {'compiled' if native.available() else 'torch loop'}"


def patches_ours(raw: str, dtype: str = "float32", impl: str = "auto", device: str = "cpu") -> Work:
    """From 720p to patches in one call."""
    _need_device(device)
    frames = load_raw(raw).to(device)
    own = _target_size(frames) | {"mean": PREPROCESSOR.image_mean, "std": PREPROCESSOR.image_std}

    def run(_: None) -> torch.Tensor:
        patches = rmsd_kernels.video_patches(frames, **own, dtype=getattr(torch, dtype), impl=impl)
        if device != "cpu":
            torch.cuda.synchronize()
        return patches

    return Work(run, save=save_patches, library=_ours_library())


def patches_two_steps(raw: str) -> Work:
    """As a run does it: resized uint8 frames, which the caches keep, then their patches."""
    frames = load_raw(raw)
    size = _target_size(frames)

    def run(_: None) -> torch.Tensor:
        return preprocess.video_patches(rmsd_kernels.resize_frames(frames, **size), PREPROCESSOR)

    return Work(run, save=save_patches, library=_ours_library())


@functools.cache
def hf_processor() -> Any:
    """Qwen3-VL's video processor, which needs torchvision; it is kept where nothing but an oracle finds it."""
    find_torchvision()
    need("torchvision")
    module = need("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    processor = module.Qwen3VLVideoProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    settings = VideoConfig()
    processor.max_video_tokens = settings.max_frame_pixels // PREPROCESSOR.factor**2
    size = {"shortest_edge": settings.min_video_pixels, "longest_edge": settings.max_video_pixels}
    return functools.partial(
        processor, do_sample_frames=False, cap_pixels_per_frame=True, size=size, return_tensors="pt"
    )


def _hf_library() -> str:
    return f"transformers {metadata.version('transformers')}"


def patches_hf(raw: str, layout: str) -> Work:
    processor = hf_processor()
    frames = load_raw(raw)
    if layout == "planes":
        frames = frames.contiguous()
    return Work(lambda _: processor(videos=[frames])["pixel_values_videos"], save=save_patches, library=_hf_library())


# File to patches.


def file_ours(path: str, indices: list[int], warm: str, device: str = "cpu") -> Work:
    """A new MediaReader for each call, its worker started before; `warm` is a small file that starts it."""
    _need_device(device)
    request = video.MediaRequest(path, "video", VideoConfig(num_frames=len(indices)), PREPROCESSOR)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    data = loader.data_config(cache_mib=0, decoder=device.partition(":")[0])

    def run(reader: Any) -> tuple[torch.Tensor, video.Frames]:
        frames = reader.read(request)
        patches = preprocess.video_patches(frames.pixels, PREPROCESSOR, dtype)
        if device != "cpu":
            torch.cuda.synchronize()
        return patches, frames

    return Work(
        run,
        functools.partial(loader.warm_reader, data, warm, device=device),
        lambda reader: reader.close(),
        output=lambda result: [result[0]],
        twice=lambda result: 0 if result[1].pixels.is_cuda else result[1].pixels.nbytes,
        facts=lambda result: {"decoder": result[1].decoder, "on_device": result[0].is_cuda},
        save=lambda result, out: save_patches(result[0], out),
        library=_torchcodec_versions(),
    )


def file_ours_counted(path: str, indices: list[int], warm: str) -> Work:
    """Ours on CUDA under torch's profiler: what is copied to the host."""
    work = file_ours(path, indices, warm, device="cuda:0")

    def run(reader: Any) -> tuple[torch.Tensor, int]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            patches, _ = work.run(reader)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        return patches, sum(event["args"]["bytes"] for event in events if "DtoH" in event.get("name", ""))

    facts = {"facts": lambda result: {"to_host_mib": result[1] / 2**20}}
    return replace(work, run=run, twice=lambda result: 0, save=None, **facts)


def file_hf(path: str, indices: list[int], decoder: str) -> Work:
    """The library's frames into a tensor, as users' loaders do, and that into the processor."""
    frames_of = {
        "torchcodec": functools.partial(decode_torchcodec, seek_mode="exact"),
        "PyAV": functools.partial(decode_av, seek=False),
        "decord": decode_decord,
    }[decoder](path, indices)
    processor = hf_processor()

    def run(_: None) -> torch.Tensor:
        found = frames_of.run(None)
        if decoder == "torchcodec":
            frames = found[0]
        else:
            frames = torch.from_numpy(found[0] if decoder == "decord" else np.stack(found)).permute(0, 3, 1, 2)
        return processor(videos=[frames])["pixel_values_videos"]

    return Work(run, save=save_patches, library=f"{_hf_library()}, {frames_of.library}")


OURS, HF = "ours", "HF processor"
PARTS: dict[str, dict[str, Build]] = {
    "decode": {
        OURS: decode_ours,
        "torchcodec exact": functools.partial(decode_torchcodec, seek_mode="exact"),
        "torchcodec approximate": functools.partial(decode_torchcodec, seek_mode="approximate"),
        "PyAV sequential": functools.partial(decode_av, seek=False),
        "PyAV seek": functools.partial(decode_av, seek=True),
        "decord": decode_decord,
        "OpenCV grab": functools.partial(decode_opencv, seek=False),
        "OpenCV seek": functools.partial(decode_opencv, seek=True),
    },
    "preprocess": {
        OURS: patches_ours,
        "ours, bfloat16": functools.partial(patches_ours, dtype="bfloat16"),
        "ours, resize then patches": patches_two_steps,
        "ours, impl=torch": functools.partial(patches_ours, impl="torch"),
        f"{HF}, frames as decoded": functools.partial(patches_hf, layout="interleaved"),
        f"{HF}, contiguous planes": functools.partial(patches_hf, layout="planes"),
    },
    "file": {
        OURS: file_ours,
        f"PyAV, {HF}": functools.partial(file_hf, decoder="PyAV"),
        f"decord, {HF}": functools.partial(file_hf, decoder="decord"),
        f"torchcodec, {HF}": functools.partial(file_hf, decoder="torchcodec"),
    },
    "cuda": {
        OURS: functools.partial(file_ours, device="cuda:0"),
        "ours, copies counted": file_ours_counted,
        "ours, decode alone": functools.partial(decode_ours, device="cuda:0"),
        "ours, patches alone": functools.partial(patches_ours, dtype="bfloat16", device="cuda:0"),
        f"decord, {HF}": functools.partial(file_hf, decoder="decord"),
        f"torchcodec, {HF}": functools.partial(file_hf, decoder="torchcodec"),
    },
    "ahead": loader.AHEAD,
    "epochs": loader.EPOCHS,
    "flat": loader.FLAT,
}
