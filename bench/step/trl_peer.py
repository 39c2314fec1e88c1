"""Time whole RL steps of TRL's GRPOTrainer and of ours on CPU, with the same small student and the same pictures.

A prompt has 16 pictures, and a step has one prompt with N = 8 rollouts of exactly R tokens. Both trainers do the same
work: rollouts, reference, policy with KL, and AdamW; the reward costs nothing. `ours with discriminator` adds what
R-MSD adds: a discriminator on N + K responses. All steps read and process their pictures. The variants run in separate
processes, several times in turn. The first step of a process is its start-up and does not count. `peak_mib` is the
memory of the whole process, including libraries. TRL's process must define two operators before anything imports
transformers, so this file imports late.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.core.measure import ORACLE, find_torchvision, in_turns, quantiles

OURS, FULL, TRL = "ours", "ours with discriminator", "TRL GRPOTrainer"
PICTURES, WIDTH, HEIGHT = 16, 512, 256
N, K = 8, 4


def missing() -> str:
    """Return why TRL's trainer cannot run here, or ""."""
    for name in ("trl", "datasets", "PIL"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    if importlib.util.find_spec("torchvision") is None and not (ORACLE / "torchvision").is_dir():
        return "torchvision is not installed, which Qwen3-VL's processor imports"
    return ""


def measure(steps: int, times: int, response: int) -> dict[str, Any]:
    """Run each variant in `times` processes, in rotating order, with `steps` steps after the first. Return a record."""
    from bench.prefix.groups import HIDDEN, LAYERS

    seconds: dict[str, list[float]] = {OURS: [], FULL: [], TRL: []}
    facts: dict[str, dict[str, Any]] = {}
    prompt = 0
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as folder:
        make_pictures(Path(folder), 1 + steps)
        for _, name in in_turns(list(seconds), times):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(run, name, 1 + steps, response, Path(folder)).result()
            seconds[name] += found["seconds"][1:]
            prompt = found.get("prompt_tokens", 0) or prompt
            own = {key: found[key] for key in ("peak_mib", "response_tokens")}
            facts[name] = max(own, facts.get(name, own), key=lambda own: own["peak_mib"])
    variants = {
        name: {"rounds": len(own), "forward": quantiles([1e3 * s for s in own]), **facts[name]}
        for name, own in seconds.items()
    }
    return {
        "bench": "step_trl",
        "case": f"pictures-P2048-R{response}-float32",
        "shape": {"P": prompt, "R": response, "N": N, "D": HIDDEN, "layers": LAYERS},
        "student": "small, random weights",
        "dtype": "float32",
        "device": "cpu",
        "baseline": OURS,
        "variants": variants,
        "remarks": {"peak MiB": "of the whole process, libraries included"},
    }


def make_pictures(folder: Path, steps: int) -> None:
    from PIL import Image

    for step in range(steps):
        for number in range(PICTURES):
            generator = torch.Generator().manual_seed(1000 * step + number)
            small = torch.randint(256, (HEIGHT // 32, WIDTH // 32, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(small.numpy()).resize((WIDTH, HEIGHT)).save(folder / f"{step}-{number}.png")


def pictures_of(folder: Path, step: int) -> list[Path]:
    return [folder / f"{step}-{number}.png" for number in range(PICTURES)]


def run_ours(steps: int, response: int, folder: Path, *, discriminator: bool) -> dict[str, Any]:
    from bench.prefix.groups import TEXTS
    from bench.step.models import SMALL, make_state, set_teacher, settings_of, start, stop
    from rmsd_fast.data.media import MediaReader
    from rmsd_fast.data.records import Question
    from rmsd_fast.stages import distill

    changes = ["model.dtype=float32", "video.max_frame_pixels=1048576"]
    if not discriminator:
        rewards = ("reward.alpha=0.0", "reward.beta=0.167", "reward.eta=0.167", "reward.delta=0.667")
        changes += [*rewards, "stages=[sft,distill]"]
    settings = settings_of(SMALL, "shared", 2560, response, K, N, *changes)
    media = MediaReader(settings.data)
    state = make_state(SMALL, settings, start(), media=media)
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        images = tuple(map(str, pictures_of(folder, step)))
        facts = {"question": TEXTS[0], "task_type": "temporal", "answer": "0.0 to 1.0"}
        prompt = state.builder.build(Question(id=f"q{step}", images=images, **facts))
        set_teacher(state, [prompt], response, K)
        result = distill.step(state, [prompt], 0)
        seconds.append(time.perf_counter() - began)
        assert not result.skipped
    media.close()
    stop()
    tokens = sum(len(rollout.token_ids) for rollout in result.groups[0].rollouts) / N
    return {"seconds": seconds, "prompt_tokens": len(prompt.input_ids), "response_tokens": tokens}


def run_trl(steps: int, response: int, folder: Path) -> dict[str, Any]:
    find_torchvision()
    from datasets import Dataset
    from PIL import Image
    from transformers import (
        AutoTokenizer,
        Qwen2VLImageProcessor,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer

    from bench.prefix.groups import HIDDEN, LAYERS, TEXTS, student_folder
    from rmsd_fast.made.student import CHAT_TEMPLATE

    student = student_folder(HIDDEN, LAYERS)
    tokenizer = AutoTokenizer.from_pretrained(student)
    sizes = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 1024, "max_pixels": 16777216}
    processors = {"image_processor": Qwen2VLImageProcessor(**sizes), "video_processor": Qwen3VLVideoProcessor()}
    processor = Qwen3VLProcessor(**processors, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)
    processor.pad_token, processor.eos_token = tokenizer.pad_token, tokenizer.eos_token
    model = Qwen3VLForConditionalGeneration.from_pretrained(student, dtype=torch.float32, attn_implementation="sdpa")
    model.model.visual.requires_grad_(False)
    message = [{"role": "user", "content": TEXTS[0]}]
    images = [[Image.open(path).convert("RGB") for path in pictures_of(folder, step)] for step in range(steps)]
    rows = [{"prompt": message, "images": own} for own in images]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.last)
            self.last += seconds[-1]

    rollouts = dict(num_generations=N, max_completion_length=response, generation_kwargs={"min_new_tokens": response})
    training = dict(per_device_train_batch_size=N, max_steps=steps, beta=0.01, learning_rate=1e-5)
    switches = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, use_vllm=False, shuffle_dataset=False)
    logs = dict(
        output_dir=str(folder / "trl"), report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(own[0]["content"]) % 7) for own in completions],
        args=GRPOConfig(**rollouts, **training, **switches, **logs),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = (line.get("completions/mean_length") for line in trainer.state.log_history)
    return {"seconds": seconds, "response_tokens": next(filter(None, lengths))}


def run(variant: str, steps: int, response: int, folder: Path) -> dict[str, Any]:
    """Run one variant in this process, and return its numbers."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.manual_seed(0)
    sizes = (steps, response, folder)
    found = run_trl(*sizes) if variant == TRL else run_ours(*sizes, discriminator=variant == FULL)
    return found | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
