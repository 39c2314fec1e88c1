"""Shared entry point of the training and evaluation programs: process group, exit codes and final messages."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from rmsd_fast.config import RunConfig, UserError, first_line
from rmsd_fast.files import ENVIRONMENT_ADVICE
from rmsd_fast.process import lenient_output
from rmsd_fast.runtime.ends import Ends, is_lost_peer
from rmsd_fast.runtime.process_group import World, start, stop
from rmsd_fast.runtime.stop_signal import Stopped, StopSignal
from rmsd_fast.setting_rules.uses import uses_vllm


def run_program(name: str, settings: RunConfig, work: Callable[[World, StopSignal], None], *, trains: bool) -> int:
    """Join the process group, do the work, leave the group, and return the exit code.

    Args:
        name: name of the program, for messages.
        settings: settings of the run.
        work: function that does the work.
        trains: whether this is a training run, which can be resumed.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    signals = StopSignal()
    with lenient_output():
        try:
            return _run(name, settings, work, signals, trains=trains)
        finally:
            signals.restore()


def _run(
    name: str, settings: RunConfig, work: Callable[[World, StopSignal], None], signals: StopSignal, *, trains: bool
) -> int:
    error: BaseException | None = None
    ends: Ends | None = None
    try:
        world = start()
        ends = Ends(world)
        work(world, signals)
    except BaseException as caught:
        error = caught
    # The remaining work takes seconds, and a second signal must not suppress the message.
    signals.ignore()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    code, message = 0, ""
    match error:
        case None:
            pass
        case Stopped():
            # torchrun also sends SIGTERM to the remaining processes after one has ended.
            if error.together or ends is None or not ends.noted("fault"):
                message = f"stopped by SIGTERM: {error}"
            # A nonzero exit code makes torchrun end the remaining processes.
            code = 0 if alone or error.together else 128 + signal.SIGTERM
        case UserError():
            code, message = 2, f"{name}: {error}"
        case KeyboardInterrupt():
            code, message = 130, f"interrupted: {signals.advice}"
        case torch.OutOfMemoryError():
            code, message = 2, f"{name}: {_out_of_memory(settings, error, signals.run_folder, trains=trains)}"
        case OSError() if error.errno in ENVIRONMENT_ADVICE:
            # If a rename failed, name its target.
            path = error.filename2 or error.filename
            where = f"{path}: " if path else ""
            code, message = 2, f"{name}: {where}{error.strerror}; {ENVIRONMENT_ADVICE[error.errno]}; {signals.advice}"
        case _ if ends is not None and is_lost_peer(error) and ends.noted("fault", "stop"):
            # The process that ended first has already printed the reason.
            code = 2
        case _:
            if ends is not None:
                ends.note("fault")
            if isinstance(error, BrokenPipeError):
                # `run_main` would take it for the end of the program that reads the output.
                raise RuntimeError("the connection to another process has ended") from error
            raise error
    if message:
        if ends is not None:
            ends.note("stop" if isinstance(error, Stopped) else "fault")
        if ends is None or ends.is_mine_to_tell(message):
            print(message, file=sys.stderr)
    # Leaving the group would wait for the other processes, which may wait for this one, so it is skipped.
    if alone or error is None or (isinstance(error, Stopped) and error.together):
        stop()
    return code


def _out_of_memory(settings: RunConfig, error: Exception, run_folder: Path | None, *, trains: bool) -> str:
    """Return which settings to lower after a GPU ran out of memory, with their current values."""
    video, runtime, evaluate = settings.video, settings.runtime, settings.evaluate
    head = f"out of GPU memory ({first_line(error)}). Lower, in this order:"
    pixels = f"  video.max_video_pixels={video.max_video_pixels}"
    no_graphs = "  or decode without CUDA graphs: rollout.cuda_graphs=false, if it happened in rollouts or evaluation"
    if not trains:
        frames = f"evaluate.num_frames={evaluate.num_frames}, " if evaluate.num_frames else ""
        lines = [head, f"  evaluate.prompts_per_batch={evaluate.prompts_per_batch}", f"  {frames}{pixels.strip()}"]
        if evaluate.engine == "vllm":
            lines.append(f"  rollout.vllm_kv_cache_gib={settings.rollout.vllm_kv_cache_gib:g} (vLLM's cache)")
        passes = "tokens of one pass of the tower, the prefill and evaluate.reranker"
        lines.append(f"  micro_tokens={settings.micro_tokens} ({passes})")
        captured = settings.rollout.cuda_graphs and evaluate.engine == "hf"
        return "\n".join([*lines, no_graphs] if captured else lines)
    lines = [
        head,
        f"  micro_tokens={settings.micro_tokens} (tokens of one forward pass)",
        f"  rollout.prompts_per_batch={settings.rollout.prompts_per_batch}, if it happened in rollouts; "
        f"evaluate.prompts_per_batch={evaluate.prompts_per_batch}, if in evaluation",
        f"{pixels}, data.max_prompt_tokens={settings.data.max_prompt_tokens}",
    ]
    if uses_vllm(settings):
        lines.append(f"  rollout.vllm_kv_cache_gib={settings.rollout.vllm_kv_cache_gib:g} (vLLM's cache)")
        parallel = settings.rollout.tensor_parallel
        processes = os.environ.get("WORLD_SIZE", "1")
        numbers = (processes, os.environ.get("LOCAL_WORLD_SIZE", processes))
        # Other numbers of processes cannot form groups of this size.
        if not any(int(number) % (2 * parallel) for number in numbers):
            lines.append(f"  or split vLLM's weights: rollout.tensor_parallel={parallel} -> {2 * parallel}")
    if settings.rollout.cuda_graphs:
        lines.append(no_graphs)
    if not settings.model.gradient_checkpointing:
        lines.append("  and set model.gradient_checkpointing=true")
    if runtime.zero_stage < 3:
        lines.append(f"  or shard more: runtime.zero_stage={runtime.zero_stage} -> 3, on all available GPUs")
    if not runtime.offload_optimizer:
        lines.append("  or keep optimizer states in host memory: runtime.offload_optimizer=true")
    again = f"continue with --resume {run_folder} --allow-changes" if run_folder else "start it again with"
    return "\n".join([*lines, f"then {again} section.field=value"])
