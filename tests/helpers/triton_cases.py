"""What the tests of the Triton kernels share: cases in Triton's interpreter, and errors judged against eager's.

Triton decides on import whether its kernels run on a GPU or in its interpreter. So the interpreter's cases run in a
process of their own, the test file as a program, which prints one JSON line per case; tests look their case up in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A check of (device, dtype). Returns the largest error as a multiple of the eager form's in the same dtype.
Case = Callable[[torch.device, torch.dtype], float]


def as_stored(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """What the store leaves of a float32 gradient. Triton's interpreter cuts bfloat16 off instead of rounding."""
    if dtype == torch.bfloat16 and gradient.device.type == "cpu":
        return (gradient.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return gradient.to(dtype)


def compare(name: str, kernel: Tensor, eager: Tensor, exact: Tensor, floor: float = 4e-7) -> float:
    """err(kernel) <= 2 * err(eager) + floor, the floor in units of the largest result or 1; NaN and inf in the same
    places. Returns the error as a multiple of eager's error + floor."""
    finite = exact.isfinite()
    assert torch.equal(kernel.isnan(), exact.isnan()), f"{name}: NaN in other places: {kernel} {exact}"
    assert torch.equal(kernel.double()[~finite & ~exact.isnan()], exact[~finite & ~exact.isnan()]), f"{name}: inf"
    if not finite.any():
        return 0.0
    exact = exact[finite]
    errors = [(found.double()[finite] - exact).abs().max().item() for found in (kernel, eager)]
    floor *= max(1.0, exact.abs().max().item())
    assert errors[0] <= 2 * errors[1] + floor, (
        f"{name}: error {errors[0]:.3g}, eager's {errors[1]:.3g}, floor {floor:.1g}"
    )
    return errors[0] / max(errors[1] + floor, 1e-300)


def repair_interpreter() -> None:
    """Let triton 3.6's interpreter run loops up to a number that a launch passes, as it does with numpy before 2.4."""
    import triton

    if not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_index(tensor, scope) -> None:
        patch(tensor, scope)
        # A scalar is an array of one element here, which numpy turns into an int no longer. triton 3.7 does the same.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = with_index


def main(cases: dict[str, Case]) -> None:
    """Run every case on CPU and print a record of each: case, dtype, error ratio, and the traceback of a failure."""
    repair_interpreter()
    # The interpreter's numpy speaks of inf - inf, which is in the cases on purpose.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for dtype in ("float32", "bfloat16"):
        for name, function in cases.items():
            record = {"case": name, "dtype": dtype, "ratio": 0.0, "failure": ""}
            try:
                record["ratio"] = function(torch.device("cpu"), DTYPES[dtype])
            except Exception:
                record["failure"] = traceback.format_exc()
            print(json.dumps(record), flush=True)


def interpret(program: str, timeout_s: float = 300.0) -> dict[tuple[str, str], dict]:
    """What a file of cases prints when its kernels run in Triton's interpreter, by (case, dtype)."""
    helpers = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, (helpers, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return {(record["case"], record["dtype"]): record for record in records}
