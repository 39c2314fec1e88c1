"""Compile every Triton kernel for compute capability 9.0 and report the resources of the binaries. No GPU is needed.

`python -m rmsd_kernels.triton_compile` prints a table: registers per thread, bytes of stack (for spilled registers) and
of shared memory, warps per program, and the vector and asynchronous loads from global memory.
"""

import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_launch as launch
from .discriminator import triton_kernels as discriminator
from .heads import triton_divergence as divergence
from .heads import triton_rows as rows
from .shared_prefix import triton_merge as merge
from .video import triton_patches as video

TARGET = GPUTarget("cuda", 90, 32)
VOCAB = 151936
_FLOATS = {"fp32": 4, "bf16": 2, "fp16": 2}


class Variant(NamedTuple):
    """A kernel with a choice of arguments: Triton type names of arguments other than None, and constexpr values."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    registers: int | None = None  # at most


class Loop(NamedTuple):
    """A loop of a compiled kernel: instructions, bytes loaded per thread, and barriers per iteration."""

    instructions: int
    loaded_bytes: int
    barriers: int

    def per_element(self, itemsize: int) -> float:
        """Return the number of instructions per element loaded."""
        return self.instructions * itemsize / self.loaded_bytes


class Report(NamedTuple):
    """Resources of a compiled kernel. shared_bytes includes memory requested at launch; loops are innermost loops."""

    name: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    warps: int
    ttir: str
    ptx: str
    loops: list[Loop]


def row_variants(dtype: str) -> Iterator[Variant]:
    """Yield the row kernels with no options, with all options, and with some combinations of options."""
    shape = {"stride": "i32", "vocab": "i32"}
    common = {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64", "target_logit_ptr": "*fp32", **shape}
    stats = dict.fromkeys(("logp_ptr", "entropy_ptr", "lse_ptr"), "*fp32")
    head = {"temperature_ptr": "*fp32", "bias_ptr": "*fp32", "softcap": "fp32"}
    ref = dict.fromkeys(("ref_bias_ptr", "ref_lse_ptr", "ref_logp_ptr", "full_kl_ptr"), "*fp32")
    ref |= {"ref_ptr": f"*{dtype}", "ref_stride": "i32"}
    terms = dict.fromkeys(("scale_ptr", "advantage_ptr", "old_logp_ptr", "kl_ref_logp_ptr"), "*fp32")
    terms |= dict.fromkeys(("kl_coef", "log_ratio_clip", "ratio_low", "ratio_high", "entropy_coef"), "fp32")

    def variant(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Variant:
        two_rows = "ref_ptr" in types or "teacher_ptr" in types
        config = launch.row_launch(VOCAB, _FLOATS[dtype], plain="bias_ptr" not in types, two_rows=two_rows)
        sizes = {"BLOCK": config.block, "LANE": config.lane, "STAGES": launch.STAGES}
        return Variant(f"{name} {dtype}", kernel, types, constants | sizes, config.warps, config.registers)

    plain, everything = common | stats, common | stats | head | ref
    yield variant("score", rows._score_kernel, plain, {"ref_stride": 0})
    yield variant("score full_kl head", rows._score_kernel, everything, {})
    both = {name: kind for name, kind in everything.items() if "bias" not in name and name != "softcap"}
    yield variant("score full_kl", rows._score_kernel, both, {})
    constants = {"KL": "k3", "ref_stride": 0, "HAS_ENTROPY": True}
    yield variant("policy k3", rows._policy_kernel, plain | terms, constants | {"HAS_ENTROPY": False})
    trainer = plain | terms | {"temperature_ptr": "*fp32", "tis_cap": "fp32"}
    yield variant("policy k3 temperature", rows._policy_kernel, trainer, constants | {"HAS_ENTROPY": False})
    corrected = trainer | {"rollout_logp_ptr": "*fp32"}
    yield variant("policy k3 correction", rows._policy_kernel, corrected, constants | {"HAS_ENTROPY": False})
    yield variant("policy k3 entropy", rows._policy_kernel, plain | terms, constants)
    yield variant("policy k3 entropy head", rows._policy_kernel, plain | terms | head, constants)
    constants = {"KL": "full", "HAS_ENTROPY": True}
    yield variant("policy full_kl entropy", rows._policy_kernel, both | terms, constants)
    yield variant("policy full_kl entropy head", rows._policy_kernel, everything | terms, constants)
    grads = {"g_logp_ptr": "*fp32"}
    off = {"HAS_FULL_KL": False, "HAS_ENTROPY": False, "ref_stride": 0}
    yield variant("gradient", rows._gradient_kernel, plain | grads, off)
    grads |= {"g_entropy_ptr": "*fp32", "g_full_kl_ptr": "*fp32"}
    on = {"HAS_FULL_KL": True, "HAS_ENTROPY": True}
    yield variant("gradient full_kl entropy head", rows._gradient_kernel, everything | grads, on)
    types = shape | dict.fromkeys(("logits_ptr", "teacher_ptr"), f"*{dtype}") | {"teacher_stride": "i32"}
    types |= dict.fromkeys(("temperature_ptr", "scale_ptr", "value_ptr"), "*fp32")
    types |= dict.fromkeys(("share", "log_share", "log_rest"), "fp32")
    for kind in ("reverse_kl", "jsd"):
        yield variant(f"divergence {kind}", divergence._divergence_kernel, types, {"KIND": kind})
    clipped = types | {"vocab_clip": "fp32"}
    yield variant("divergence forward_kl clip", divergence._divergence_kernel, clipped, {"KIND": "forward_kl"})
    types = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "targets_ptr": "*i64", "logit_ptr": "*fp32"}
    types |= dict.fromkeys(("hidden_row", "weight_row", "dim", "vocab"), "i32")
    constants = {"BLOCK": rows.DOT_BLOCK, "hidden_col": 1, "weight_col": 1}
    yield Variant(f"target_logit {dtype}", rows._target_logit_kernel, types, constants, rows.DOT_WARPS)
    types = {"values_ptr": f"*{dtype}", "scalar_ptr": "*fp32", "numel": "i64"}
    yield Variant(f"scale {dtype}", rows._scale_kernel, types, {"BLOCK": rows.SCALE_BLOCK}, rows.SCALE_WARPS)


def discriminator_variants(dtype: str) -> Iterator[Variant]:
    """Yield the discriminator's kernels with all options on, hidden and head in dtype."""
    d = discriminator
    sizes = dict.fromkeys(("count", "tokens", "stride", "dim", "students", "teachers", "pairs"), "i32") | {
        "eps": "fp32"
    }
    head = dict.fromkeys(("hidden_ptr", "head_ptr", "bias_ptr", "norm_ptr"), f"*{dtype}") | {"last_index_ptr": "*i64"}
    saved = dict.fromkeys(("scores_ptr", "saved_ptr"), "*fp32")
    pairs = dict.fromkeys(("student_index_ptr", "teacher_index_ptr"), "*i64")
    pairs |= dict.fromkeys(("student_ptr", "teacher_ptr", "quality_ptr", "pair_weight_ptr", "normalizer_ptr"), "*fp32")
    pairs |= dict.fromkeys(("loss_ptr", "accuracy_ptr", "margin_ptr", "score_grad_ptr"), "*fp32")
    pairs |= {"score_l2": "fp32", "l2_normalizer": "fp32"}
    gradient = dict.fromkeys(("d_hidden_ptr", "d_head_ptr", "d_bias_ptr", "d_norm_ptr"), f"*{dtype}")
    gradient |= dict.fromkeys(("score_grad_ptr", "grad_loss_ptr"), "*fp32")
    blocks = {"SCORE_BLOCK": d.SCORE_BLOCK, "PAIR_BLOCK": d.PAIR_BLOCK}
    tile = {"ROWS": d.TILE_ROWS, "BLOCK_D": d.ROW_BLOCK_D}
    types = sizes | head | saved
    yield Variant(f"discriminator {dtype}", d._forward_kernel, types | pairs, tile | blocks, d.WARPS)
    yield Variant(f"discriminator rows {dtype}", d._rows_kernel, types, tile | {"ROWS": 1}, d.ROWS_WARPS)
    if dtype == "fp32":
        yield Variant("discriminator pairs", d._pairs_kernel, sizes | pairs, blocks, d.WARPS)
    tile = {"ROWS": d.GRAD_ROWS, "BLOCK_D": d.GRAD_BLOCK_D}
    types |= gradient
    yield Variant(f"discriminator gradient {dtype}", d._row_gradient_kernel, types, tile, d.GRAD_WARPS)


def shared_prefix_variants(dtype: str) -> Iterator[Variant]:
    """Yield the merge of two parts of attention, with heads of size 128."""
    types = dict.fromkeys(("out_ptr", "other_ptr"), f"*{dtype}") | dict.fromkeys(("lse_ptr", "other_lse_ptr"), "*fp32")
    strides = [f"{tensor}_{axis}" for tensor in ("out", "lse", "other", "other_lse") for axis in ("row", "head")]
    types |= dict.fromkeys((*strides, "heads", "dim"), "i32")
    constants = {"HEADS": merge.HEADS, "DIM": 128}
    yield Variant(f"merge {dtype}", merge._merge_kernel, types, constants, merge.WARPS)


def video_variants(dtype: str) -> Iterator[Variant]:
    """Yield the media kernels: patches of Qwen3-VL's and Qwen2.5-VL's size in dtype, and the resize, for fp32 only."""
    types = {"frames_ptr": "*u8"} | dict.fromkeys(("start_x_ptr", "start_y_ptr"), "*i32")
    types |= dict.fromkeys(("mean_ptr", "std_ptr", "weight_x_ptr", "weight_y_ptr"), "*fp32")
    types |= dict.fromkeys(video.SIZES, "i32")
    for patch in (16, 14):
        constants = {"PATCH": patch, "BLOCK": triton.next_power_of_2(patch)}
        name = f"patches {patch} {dtype}"
        yield Variant(name, video._patches_kernel, types | {"out_ptr": f"*{dtype}"}, constants, video.WARPS)
    if dtype == "fp32":
        constants = {"ROWS": video.TILE_ROWS, "COLUMNS": video.TILE_COLUMNS}
        yield Variant("resize", video._resize_kernel, types | {"out_ptr": "*u8"}, constants, video.WARPS)


def variants(dtype: str) -> Iterator[Variant]:
    """Yield all kernels for tensors of dtype."""
    yield from row_variants(dtype)
    yield from discriminator_variants(dtype)
    yield from shared_prefix_variants(dtype)
    yield from video_variants(dtype)


def compile_variant(variant: Variant) -> Report:
    """Compile for TARGET. Pointers and sizes are assumed to be divisible by 16, as they are for V = 151936."""
    if not hasattr(variant.kernel, "arg_names") or not hasattr(variant.kernel, "cache_key"):
        raise RuntimeError("TRITON_INTERPRET: expected it to be unset, got 1; unset it to compile the kernels")
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    constants = {name: variant.constants.get(name) for name in names if signature[name] == "constexpr"}
    attributes = {}
    for i, parameter in enumerate(variant.kernel.params):
        special = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if signature[parameter.name][0] in "*i" and not special:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constants, attributes)
    options = {"num_warps": variant.warps, "maxnreg": variant.registers}
    compiled = triton.compile(source, target=TARGET, options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    shared = max(compiled.metadata.shared, usage["SHARED"])
    return Report(
        variant.name,
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        shared,
        variant.warps,
        compiled.asm["ttir"],
        compiled.asm["ptx"],
        loops_of(_dumped(compiled.asm["cubin"], "nvdisasm", "-c")),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    text = _dumped(cubin, "cuobjdump", "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _dumped(cubin: bytes, tool: str, option: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    if not program.is_file():
        raise RuntimeError(f"{program} is missing; install a triton wheel that includes NVIDIA's tools")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(program), option, file.name], capture_output=True, text=True, check=True).stdout


def loops_of(assembly: str) -> list[Loop]:
    """Return the innermost loops of a disassembled kernel that read global memory, from label to backward branch."""
    code = [line for line in assembly.splitlines() if re.match(r"\.L_\w+:|\s+/\*[0-9a-f]{4,}\*/", line)]
    labels = {line.split(":")[0]: i for i, line in enumerate(code) if line.startswith(".L_")}
    ends: dict[int, int] = {}
    for i, line in enumerate(code):
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if branch and labels[branch[1]] < i:
            ends[labels[branch[1]]] = i
    loops = []
    for start, end in sorted(ends.items()):
        if any(start < inner_start and ends[inner_start] < end for inner_start in ends):
            continue
        body = [line for line in code[start : end + 1] if not line.startswith(".L_")]
        loads = [re.search(r"\bLDG(?:STS)?\.E\S*", line) for line in body]
        sizes = [int((re.search(r"\.(32|64|128)\b", load[0]) or [0, 32])[1]) // 8 for load in loads if load]
        if sizes:
            loops.append(Loop(len(body), sum(sizes), sum("BAR" in line for line in body)))
    return loops


def table(reports: list[Report]) -> str:
    """Return the reports as a text table."""
    lines = [
        f"{'kernel':34} {'registers':>9} {'stack':>6} {'local':>6} {'shared':>7} {'warps':>6}  "
        f"{'instructions / bytes per thread':40} loads"
    ]
    for r in reports:
        wide = sorted(set(re.findall(r"ld\.global[.\w]*\.v\d\.b\d+|cp\.async\.c[ag]\.shared\.global", r.ptx)))
        numbers = f"{r.registers:9} {r.stack_bytes:6} {r.local_bytes:6} {r.shared_bytes:7} {r.warps:6}"
        loops = " ".join(f"{loop.instructions}/{loop.loaded_bytes}" for loop in r.loops)
        lines.append(f"{r.name:34} {numbers}  {loops:40} {' '.join(wide)}")
    return "\n".join(lines)


@functools.cache
def reports(dtype: str) -> tuple[Report, ...]:
    """Compile all kernels for tensors of dtype, once in this process."""
    return tuple(compile_variant(variant) for variant in variants(dtype))


def main(arguments: list[str]) -> None:
    """Print the table for the dtypes in `arguments`, or for all."""
    dtypes = arguments or list(_FLOATS)
    print(table([report for dtype in dtypes for report in reports(dtype)]))


if __name__ == "__main__":
    main(sys.argv[1:])
