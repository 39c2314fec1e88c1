"""Run a student with and without Liger's kernels in Triton's interpreter (TRITON_INTERPRET=1).

The program prints as JSON the differences in logits and gradients, and the kernels that ran. Its argument is the folder
that contains the student and a.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton_cases import repair_interpreter

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.packing import make_rows
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.models.students import encode_media, forward_hidden, load_student


def prepare_interpreter() -> set[str]:
    """Patch the interpreter for these kernels, and return a set to which each kernel adds its name when it runs."""
    import liger_kernel.ops.rms_norm

    repair_interpreter()
    convert, launch, ran = interpreter._implicit_cvt, interpreter.GridExecutor.__call__, set()

    def with_floats(argument):
        # A real launch passes a Python float to a kernel as a float32 scalar. The interpreter passes a Python float,
        # which has no `.to`, so it is converted here.
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    def recorded_launch(self, *arguments, **named):
        ran.add(self.fn.__name__)
        return launch(self, *arguments, **named)

    interpreter._implicit_cvt, interpreter.GridExecutor.__call__ = with_floats, recorded_launch
    # libdevice is a CUDA library, so its rsqrt has no body here. Triton's own rsqrt replaces it.
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    return ran


def logits_and_gradients(folder: Path, *, liger: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    student = load_student(folder / "student", dtype="float32", liger=liger)
    student.model.train().requires_grad_(True)
    builder = PromptBuilder(student, VideoConfig(max_image_pixels=4096))
    picture = str(folder / "a.png")
    prompt = builder.build(Question(id="q", question="What colour?", task_type="open", videos=(), images=(picture,)))
    responses = [builder.encode_response("<answer>B</answer>"), builder.encode_response("A red")]
    rows = make_rows("padded", [prompt], [responses], pad_id=student.pad_id)
    hidden = forward_hidden(student.model, rows, encode_media(student.model, [prompt]))
    logits = student.model.lm_head(hidden)[rows.attention_mask.bool()]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}


def main(folder: Path) -> None:
    ran = prepare_interpreter()
    plain, plain_gradients = logits_and_gradients(folder, liger=False)
    logits, gradients = logits_and_gradients(folder, liger=True)
    differences = [
        float((gradients[name] - value).abs().max() / value.abs().max()) for name, value in plain_gradients.items()
    ]
    report = {
        "tokens": len(plain),
        "spread": float(plain.std()),
        "logits": float((logits - plain).abs().max()),
        "gradients": max(differences),
        "same_parameters": gradients.keys() == plain_gradients.keys(),
        "kernels": sorted(ran),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
