"""Compare the discriminator modes on a stage-2 step of the small student: `python -m bench.memory.modes [--rounds 7]`.

The models of all modes are in one process and take turns, a step each. Recorded are the bytes of weights and optimizer
states that live after the steps, without those of the file, and seconds and CPU seconds of the phases.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

from bench.core.records import RESULTS, save
from bench.memory.step import make_state
from bench.prefix.groups import HIDDEN, LAYERS, make_builder, make_prompt, student_folder
from bench.step.models import set_teacher
from rmsd_fast.config import RunConfig
from rmsd_fast.models.students import load_student
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill
from rmsd_fast.stages.memory import plan_memory
from rmsd_fast.stages.state import StageState

PREFIX, RESPONSE, TEACHERS, ROLLOUTS = 2048, 64, 4, 8
_LORA = ("model.adapter=lora", "sft.train_vision=false")
MODES = {
    "separate": (),
    "head": ("discriminator.mode=head",),
    "separate, lora": _LORA,
    "shared, lora": (*_LORA, "discriminator.mode=shared"),
    "head, lora": (*_LORA, "discriminator.mode=head"),
}
PHASES = ("vision", "rollout", "matching", "discriminator", "reference", "policy", "optimizer")


def state_bytes(state: StageState) -> int:
    """Return the bytes of weights, master weights and moments."""
    storages = {}
    models = [state.student.model]
    models += [] if state.reference is None else [state.reference]
    models += [] if state.discriminator is None else [state.discriminator.module]
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    for engine in (state.policy, state.discriminator):
        if engine is not None:
            tensors += engine.masters()
            tensors += [t for s in engine.engine.basic_optimizer.state.values() for t in s.values()]
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder or .jsonl file for the record")
    arguments = parser.parse_args()
    folder = student_folder(HIDDEN, LAYERS)
    config = json.loads((folder / "config.json").read_text())
    world = start()
    builder = make_builder(load_student(folder, dtype="float32"))
    tokens = len(make_prompt(builder, PREFIX, 0).input_ids)
    states, seconds, processor = {}, {}, {}
    for mode, overrides in MODES.items():
        state = make_state(folder, _settings(tokens, overrides), world)
        state.timer = PhaseTimer(world.device)
        states[mode] = (state, [make_prompt(state.builder, PREFIX, 0)])
        set_teacher(state, states[mode][1], RESPONSE, TEACHERS)
        seconds[mode], processor[mode] = [], []
    for number in range(arguments.rounds + 1):
        for mode, (state, prompts) in states.items():
            began = time.process_time()
            assert not distill.step(state, prompts, number).skipped
            processor[mode].append(time.process_time() - began)
            taken = state.timer.take()
            seconds[mode].append({name: taken[f"seconds/{name}"] for name in PHASES})
    # The first step also allocates the optimizers' states.
    variants = {
        mode: {
            "states_bytes": state_bytes(state),
            "planned_states_bytes": _planned(state.settings, config),
            "cpu_s": median(processor[mode][1:]),
            "cpu_ratio": median(a / b for a, b in zip(processor[mode][1:], processor["separate"][1:], strict=True)),
            "phases_s": {name: median(s[name] for s in seconds[mode][1:]) for name in PHASES},
            "ratio": median(
                sum(own.values()) / sum(base.values())
                for own, base in zip(seconds[mode][1:], seconds["separate"][1:], strict=True)
            ),
        }
        for mode, (state, _) in states.items()
    }
    shape = {"P": tokens, "R": RESPONSE, "K": TEACHERS, "N": ROLLOUTS, "D": HIDDEN, "layers": LAYERS}
    record = {"bench": "modes", "case": f"P{PREFIX}-R{RESPONSE}-float32", "device": "cpu", "shape": shape}
    save(record | {"rounds": arguments.rounds, "variants": variants}, arguments.out)
    whole = variants["separate"]["states_bytes"]
    for mode, found in variants.items():
        phases = ", ".join(f"{name} {found['phases_s'][name]:.2f}" for name in PHASES)
        print(
            f"{mode:<16} states {found['states_bytes'] / 2**20:6.1f} MiB ({found['states_bytes'] / whole:.0%}), "
            f"planned {found['planned_states_bytes'] / 2**20:6.1f}; time x{found['ratio']:.3f}, CPU x"
            f"{found['cpu_ratio']:.3f}; {phases}"
        )
    stop()


def _settings(tokens: int, overrides: tuple[str, ...]) -> RunConfig:
    changes = [f"rollout.n={ROLLOUTS}", f"rollout.max_new_tokens={RESPONSE}", f"data.max_prompt_tokens={tokens}"]
    changes += [f"micro_tokens={40 * tokens}", "discriminator.head=random", "distill.batch_size=1"]
    return load_settings("quickstart", [*changes, *overrides])


def _planned(settings: RunConfig, config: dict) -> int:
    phases = plan_memory(settings, config, processes=1, device="cpu").stages["distill"].phases
    return sum(phases["policy"][part] for part in ("weights", "optimizer"))


if __name__ == "__main__":
    main()
