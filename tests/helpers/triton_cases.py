"""Run cases of the Triton kernels in Triton's interpreter, and compare them with eager errors.

Triton decides on import whether its kernels run on a GPU or in its interpreter. The interpreter's cases therefore run
in a separate process, with the test file as the program. It prints one JSON line per case, and each test looks up its
case there.
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
# A case checks (device, dtype) and returns the largest error as a multiple of the eager error in the same dtype.
Case = Callable[[torch.device, torch.dtype], float]


def as_stored(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a float32 gradient as it is stored; Triton's interpreter truncates to bfloat16 instead of rounding."""
    if dtype == torch.bfloat16 and gradient.device.type == "cpu":
        return (gradient.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return gradient.to(dtype)


def compare(name: str, kernel: Tensor, eager: Tensor, exact: Tensor, floor: float = 4e-7) -> float:
    """Check that err(kernel) <= 2 * err(eager) + floor, and that NaN and inf are at the same positions.

    floor: in units of the largest result, or of 1 if that is larger.

    Return the error as a multiple of the eager error + floor.
    """
    finite = exact.isfinite()
    assert torch.equal(kernel.isnan(), exact.isnan()), f"{name}: NaN at other positions: {kernel} {exact}"
    assert torch.equal(kernel.double()[~finite & ~exact.isnan()], exact[~finite & ~exact.isnan()]), (
        f"{name}: inf at other positions"
    )
    if not finite.any():
        return 0.0
    exact = exact[finite]
    errors = [(result.double()[finite] - exact).abs().max().item() for result in (kernel, eager)]
    floor *= max(1.0, exact.abs().max().item())
    assert errors[0] <= 2 * errors[1] + floor, (
        f"{name}: error {errors[0]:.3g}, eager's {errors[1]:.3g}, floor {floor:.1g}"
    )
    return errors[0] / max(errors[1] + floor, 1e-300)


def round_once_in_fma() -> None:
    """Make the interpreter's fma round once, as on a GPU; its own fma multiplies and adds in float32."""
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        exact = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def repair_interpreter() -> None:
    """Let triton 3.6's interpreter run loops whose bound a launch passes, as it does with numpy before 2.4."""
    import triton

    round_once_in_fma()
    if not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_index(tensor, scope) -> None:
        patch(tensor, scope)
        # A scalar is an array with one element, which numpy no longer converts to an int. triton 3.7 does the same.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = with_index


def main(cases: dict[str, Case]) -> None:
    """Run every case on CPU and print a record of each: case, dtype, error ratio, and the traceback of a failure."""
    repair_interpreter()
    # numpy warns about inf - inf in the interpreter, which the cases contain on purpose.
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
    """Run a file of cases in Triton's interpreter, and return the printed records by (case, dtype)."""
    helpers = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, (helpers, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return {(record["case"], record["dtype"]): record for record in records}
