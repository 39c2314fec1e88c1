"""Measure the memory of a stage-2 step in a process of its own, and print it next to the plan, as a JSON line.

The process first runs a step of a tiny student, so that libraries and their pages are loaded, and notes its resident
memory. Then it builds the models by the trainer's own functions and runs two steps. The second one, when the optimizers
have their states, is measured: the high-water mark of resident memory in each phase, less the memory noted. Pages of
files are left out, because the kernel can drop those of libraries at any time. Weights are therefore copied out of the
mapped model file.

malloc maps each large block and returns it when freed, so that resident memory is what lives (see __main__.py).
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from bench.core.memory import status_bytes
from bench.prefix.groups import GRIDS, make_builder, make_prompt, student_folder
from bench.step.models import set_teacher
from rmsd_fast.config import RunConfig
from rmsd_fast.models.students import Student, load_student
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.runtime.process_group import World, start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import build, distill
from rmsd_fast.stages.build import load
from rmsd_fast.stages.memory import plan_memory
from rmsd_fast.stages.state import StageState

_CLEAR_REFS = Path("/proc/self/clear_refs")
# Sizes of the measured student; the rest is that of the tiny student.
TEXT = dict(hidden_size=512, intermediate_size=1280, num_hidden_layers=4, num_attention_heads=8) | dict(
    num_key_value_heads=4, head_dim=64, vocab_size=8192
)
VISION = dict(depth=2, hidden_size=128, intermediate_size=256, num_heads=2, out_hidden_size=512)
PREFIX, RESPONSE, TEACHERS, ROLLOUTS = 1024, 16, 1, 4


@dataclass(frozen=True)
class Case:
    """A configuration. groups: questions that fit in a forward pass of the discriminator; a step has twice as many."""

    name: str
    mode: str = "separate"
    adapter: str = "none"
    dtype: str = "float32"
    packing: str = "shared"
    checkpointing: bool = False
    zero: int = 2
    groups: int = 2
    quantize: str = "none"
    optimizer: str = "adamw"


def write_student(folder: Path, tiny: bool) -> None:
    """Write a student with the tokenizer of the tiny one."""
    shutil.copytree(student_folder(64, 3), folder)
    if tiny:
        return
    config = Qwen3VLConfig.from_pretrained(folder)
    sizes = config.to_dict()
    rope = sizes["text_config"]["rope_parameters"] | {"mrope_section": [12, 10, 10]}
    sizes["text_config"] |= TEXT | {"rope_parameters": rope}
    sizes["vision_config"] |= VISION
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**sizes))
    model.save_pretrained(folder)


def settings_of(case: Case, prompt_tokens: int, vision_tokens: int) -> RunConfig:
    group = prompt_tokens + (ROLLOUTS + TEACHERS) * (RESPONSE + 1)
    rows = (ROLLOUTS + TEACHERS) * (prompt_tokens + RESPONSE + 1)
    tokens = case.groups * (group if case.packing == "shared" else rows)
    # After stage 1, a quantized student would also have its frozen adapter, and the measured one does not.
    stages = ["stages=[warm_up,distill]"]
    if case.quantize == "none":
        stages = ["stages=[sft,warm_up,distill]", "sft.train_vision=false"]
    return load_settings(
        "quickstart",
        [
            *stages,
            f"packing={case.packing}",
            f"micro_tokens={tokens}",
            f"model.dtype={case.dtype}",
            f"model.adapter={case.adapter}",
            f"model.quantize={case.quantize}",
            f"model.gradient_checkpointing={str(case.checkpointing).lower()}",
            f"discriminator.mode={case.mode}",
            "discriminator.head=random",
            f"data.max_prompt_tokens={prompt_tokens}",
            "data.cache_mib=0",
            "data.decode_ahead=0",
            f"video.num_frames={2 * GRIDS[PREFIX][0]}",
            f"video.max_video_pixels={vision_tokens * 2048}",
            f"teacher.responses={TEACHERS}",
            f"rollout.n={ROLLOUTS}",
            f"rollout.max_new_tokens={RESPONSE}",
            f"rollout.prompts_per_batch={case.groups}",
            f"distill.batch_size={2 * case.groups}",
            f"runtime.zero_stage={case.zero}",
            f"runtime.optimizer={case.optimizer}",
        ],
    )


class PeakTimer(PhaseTimer):
    """Note the highest resident memory of each phase, too."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        _CLEAR_REFS.write_text("5")
        with super().__call__(phase):
            yield
        peak = status_bytes("VmHWM") - status_bytes("RssFile") - status_bytes("RssShmem")
        self.peaks[phase] = max(self.peaks.get(phase, 0), peak)


def load_copied(path: str, settings: RunConfig, world: World) -> Student:
    """Load a student whose weights are copied out of the mapped model file."""
    student = load(path, settings, world)
    for parameter in student.model.parameters():
        parameter.data = parameter.data.clone()
    return student


def make_state(folder: Path, settings: RunConfig, world: World) -> StageState:
    """Return the state of stage 2, without targets. Rollouts do not end before their last token."""
    nothing = SimpleNamespace(train=[], scores={})
    with mock.patch.object(build, "load", load_copied):
        state = build.build_distillation(str(folder), settings, world, nothing)
    banned = state.rollouts.banned_ids
    state.rollouts.banned_ids = torch.cat([banned, banned.new_tensor([state.builder.eos_id])])
    state.timer = PeakTimer(world.device)
    return state


def run(case: Case, folder: Path, world: World, steps: int) -> tuple[RunConfig, dict[str, int], list[dict[str, float]]]:
    """Build the models, run steps, and return the settings, peaks of the last step, and seconds of the phases."""
    student = load_student(folder, dtype=case.dtype)
    builder = make_builder(student)
    prompt = make_prompt(builder, PREFIX, 0)
    tokens = len(prompt.input_ids)
    settings = settings_of(case, tokens, int((prompt.mm_token_type_ids != 0).sum()))
    del student, builder, prompt
    state = make_state(folder, settings, world)
    prompts = [make_prompt(state.builder, PREFIX, number) for number in range(settings.distill.batch_size)]
    set_teacher(state, prompts, RESPONSE, TEACHERS)
    seconds = []
    for number in range(steps):
        gc.collect()
        state.timer.peaks.clear()
        result = distill.step(state, prompts, number)
        assert not result.skipped
        seconds.append(state.timer.take())
    for engine in (state.discriminator, state.policy):
        if engine is not None:
            engine.close()
    return settings, dict(state.timer.peaks), seconds


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    made = Path(tempfile.mkdtemp(prefix="bench-memory-"))
    try:
        write_student(made / "tiny", tiny=True)
        write_student(made / "student", tiny=False)
        world = start()
        small = Case(**asdict(case) | {"groups": 1})
        run(small, made / "tiny", world, 1)
        gc.collect()
        baseline = status_bytes("RssAnon")
        settings, peaks, seconds = run(case, made / "student", world, 2)
        config = json.loads((made / "student" / "config.json").read_text())
        stop()
    finally:
        shutil.rmtree(made, ignore_errors=True)
    plan = plan_memory(settings, config, processes=1, device="cpu").stages["distill"]
    measured = {phase: peak - baseline for phase, peak in peaks.items()}
    print(
        json.dumps(
            {
                "case": case.name,
                "settings": asdict(case),
                "baseline": baseline,
                "measured": measured,
                "plan": plan.phases,
                "seconds": seconds[-1],
            }
        )
    )


if __name__ == "__main__":
    main()
