"""What the programs that compute have in common: the process group around the work, and how each end is told."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from rmsd_fast.config import RunConfig, UserError, first_line
from rmsd_fast.files import ENVIRONMENT_ERRORS, environment_advice
from rmsd_fast.process import lenient_output
from rmsd_fast.runtime.stop_signal import Stopped, StopSignal
from rmsd_fast.runtime.world import World, note_end, others_ended, start, stop


def run_program(name: str, settings: RunConfig, work: Callable[[World, StopSignal], None], *, trains: bool) -> int:
    """Join the process group, do the work, leave the group; returns the exit code.

    Args:
        name: of the program, for messages.
        trains: it is a run, which can be continued.
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
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    code, message, together = 0, "", alone
    try:
        work(start(), signals)
        together = True
    except Stopped as stopped:
        message, together = f"stopped by SIGTERM: {stopped}", together or stopped.together
        # Another code than 0 has torchrun end the processes that this one leaves.
        code = 0 if together else 128 + signal.SIGTERM
    except UserError as error:
        code, message = 2, f"{name}: {error}"
    except KeyboardInterrupt:
        code, message = 130, f"interrupted: {signals.advice}"
    except torch.OutOfMemoryError as error:
        code, message = 2, f"{name}: {_out_of_memory(settings, error, signals.run_folder, trains=trains)}"
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        # Of a renaming, what the file was to be called.
        path = error.filename2 or error.filename
        where = f"{path}: " if path else ""
        code, message = 2, f"{name}: {where}{error.strerror}; {environment_advice(error)}; {signals.advice}"
    except RuntimeError:
        # A collective with a process that has ended: that one has said why.
        if alone or not others_ended():
            raise
        code = 2
    # What several processes have to say alike is said once.
    if message and note_end(message):
        print(message, file=sys.stderr)
    # Leaving the group waits for the others, who may wait for this process. The process ends soon in any case.
    if together:
        stop()
    return code


def _out_of_memory(settings: RunConfig, error: Exception, run_folder: Path | None, *, trains: bool) -> str:
    """What to lower where a GPU ran out of memory, with the values of now."""
    video, runtime, evaluate = settings.video, settings.runtime, settings.evaluate
    head = f"out of GPU memory ({first_line(error)}). Lower, in this order:"
    pixels = f"  video.max_video_pixels={video.max_video_pixels}"
    if not trains:
        frames = f"evaluate.num_frames={evaluate.num_frames}, " if evaluate.num_frames else ""
        return f"{head}\n  evaluate.prompts_per_batch={evaluate.prompts_per_batch}\n  {frames}{pixels.strip()}"
    lines = [
        head,
        f"  micro_tokens={settings.micro_tokens} (tokens of one forward pass)",
        f"  rollout.prompts_per_batch={settings.rollout.prompts_per_batch}, where it happened in rollouts; "
        f"evaluate.prompts_per_batch={evaluate.prompts_per_batch}, in evaluation",
        f"{pixels}, data.max_prompt_tokens={settings.data.max_prompt_tokens}",
    ]
    if not settings.model.gradient_checkpointing:
        lines.append("  and write model.gradient_checkpointing=true")
    if runtime.zero_stage < 3:
        lines.append(f"  or shard more: runtime.zero_stage={runtime.zero_stage} -> 3, on as many GPUs as there are")
    if not runtime.offload_optimizer:
        lines.append("  or keep optimiser states in host memory: runtime.offload_optimizer=true")
    again = f"continue with --resume {run_folder} --allow-changes" if run_folder else "start it again with"
    return "\n".join([*lines, f"then {again} section.field=value"])
