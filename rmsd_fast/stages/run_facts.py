"""Write `run.json`: time, hardware and versions of a run."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import torch

from rmsd_fast.files import write_text_atomic
from rmsd_fast.models.liger import describe_liger
from rmsd_fast.rollout.vllm_process import check_vllm
from rmsd_fast.runtime.process_group import World
from rmsd_fast.setting_rules.uses import uses_vllm
from rmsd_fast.stages.material import losses_of
from rmsd_fast.stages.protocol import version_of
from rmsd_fast.stages.run import TrainingRun
from rmsd_kernels import native

log = logging.getLogger("rmsd_fast")

RUN_PACKAGES = (
    *("rmsd-fast", "torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "deepspeed"),
    "torchcodec",
)


def write_facts(run: TrainingRun, *, finished: bool) -> None:
    """Write `run.json`: time, hardware and versions of the run. A resumed run keeps its original start time."""
    path = run.folder / "run.json"
    facts = _facts(path)
    facts.pop("finished", None)
    facts |= {
        "recipe": run.settings.name,
        "world_size": run.world.size,
        "hardware": _hardware(run.world),
        "versions": {
            **{name: version_of(name) for name in RUN_PACKAGES},
            **({"vllm": check_vllm()} if uses_vllm(run.settings) else {}),
        },
        "decoder": run.media.decoder + (f" ({run.media.decoder_reason})" if run.media.decoder_reason else ""),
        "liger": describe_liger(run.settings.model.liger, run.world.device),
        "losses": _losses(run),
    }
    facts.pop("rollout_servers", None)
    if run.servers:
        facts["rollout_servers"] = run.servers
    if finished:
        facts["finished"] = _now()
    write_text_atomic(path, json.dumps(facts, indent=2) + "\n")


def _facts(path: Path) -> dict:
    """Read `run.json`. Only the start time is needed, so a damaged file is simply replaced."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return facts if isinstance(facts.get("started"), str) else {"started": _now()}
    except FileNotFoundError:
        return {"started": _now()}
    except (OSError, ValueError, AttributeError) as error:
        log.warning("%s: cannot be read (%s); the current time is recorded as the start of the run", path, error)
        return {"started": _now()}


def _losses(run: TrainingRun) -> str:
    """Return the implementation of the heads that `auto` resolves to, with a reason for the slow CPU fallback."""
    chosen = losses_of(run.settings, run.world)
    return f"torch ({native.why_not()})" if chosen == "torch" and not native.available() else chosen


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def _hardware(world: World) -> str:
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads per process"
