"""Test that every Triton kernel compiles for compute capability 9.0 within the hardware limits."""

from __future__ import annotations

import re
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

from rmsd_kernels import triton_compile  # noqa: E402
from rmsd_kernels.discriminator import triton_loss  # noqa: E402
from rmsd_kernels.heads import triton_rows  # noqa: E402
from rmsd_kernels.heads.row_types import PolicySettings, PolicyTerms, RowInputs, RowReference  # noqa: E402
from rmsd_kernels.video import triton_patches  # noqa: E402

REGISTERS_OF_AN_SM = 65536
SHARED_BYTES_OF_A_PROGRAM = 227 * 1024
DTYPES = ("bf16", "fp16", "fp32")
OTHERS = ("target_logit", "scale", "merge", "discriminator", "patches", "resize")
ROW_KERNELS = ("score", "policy", "gradient", "divergence")


@pytest.fixture(scope="module")
def reports() -> dict[str, triton_compile.Report]:
    if not sys.platform.startswith("linux"):
        pytest.skip("triton's compiler is available only for Linux")
    return {report.name: report for dtype in DTYPES for report in triton_compile.reports(dtype)}


def test_no_kernel_spills_or_exceeds_the_limits(reports):
    table = triton_compile.table(list(reports.values()))
    print(table)
    for report in reports.values():
        assert report.stack_bytes == report.local_bytes == 0, f"{report.name} spills registers\n{table}"
        assert 0 < report.registers <= 255
        assert report.registers * 32 * report.warps <= REGISTERS_OF_AN_SM, report.name
        assert report.shared_bytes <= SHARED_BYTES_OF_A_PROGRAM, report.name


def test_all_kernels_are_in_the_report(reports):
    assert {name.split()[0] for name in reports} == {*ROW_KERNELS, *OTHERS}
    # "discriminator pairs" and "resize" have no 16-bit tensors.
    assert len(reports) == 3 * 23 + 2


def test_row_offsets_are_64_bit(reports):
    """row * stride may exceed 2^31, so rows must be widened before the product and not after it."""
    for name, report in reports.items():
        if name.split()[0] in ROW_KERNELS:
            (row,) = re.findall(r"(%\S+) = tt\.get_program_id x : i32", report.ttir)
            (wide,) = re.findall(rf"(%\S+) = arith\.extsi {re.escape(row)} : i32 to i64", report.ttir)
            assert re.search(rf"arith\.muli {re.escape(wide)}, %\S+ : i64", report.ttir), name
            assert not re.search(rf"arith\.muli {re.escape(row)},", report.ttir), name


def test_frame_offsets_are_64_bit(reports):
    """Frames, channels, rows and columns are widened before they are multiplied by a stride."""
    for name in ("patches 16 bf16", "patches 14 fp32", "resize"):
        widened = re.findall(r"arith\.extsi (%stride_\w) : i32 to i64", reports[name].ttir)
        assert set(widened) == {"%stride_f", "%stride_c", "%stride_y", "%stride_x"}, name
        assert not re.search(r"arith\.muli [^:]*%stride_", reports[name].ttir), name


def test_patches_are_divided_with_ieee_rounding(reports):
    """div.full has an error of up to 2 units in the last place, but results must equal those of the torch form."""
    for name in ("patches 16 bf16", "patches 14 bf16"):
        ptx = reports[name].ptx
        assert "div.rn.f32" in ptx and "div.full" not in ptx and re.search(r"cvt\.rn\.bf16", ptx), name


def test_no_float64_and_no_atomics(reports):
    for report in reports.values():
        assert "f64" not in report.ptx and not re.search(r"\b(atom|red)\.", report.ptx), report.name


# The bounds are machine instructions per logit of each pass, or per pair of logits if two rows are read. They are the
# counts of triton 3.7.1 plus a margin for other versions.
INSTRUCTIONS = {
    "score bf16": [10.5],
    # The last loop is for logits beyond 1e9.
    "policy k3 temperature bf16": [10.5, 6.5, 8.5],
    "policy k3 entropy bf16": [10.5, 11.5],
    "gradient bf16": [8.5],
    "score full_kl bf16": [19.5],
    "policy full_kl entropy bf16": [19.5, 17.0],
    "divergence reverse_kl bf16": [17.0, 14.0, 17.5],
    "divergence jsd bf16": [16.5, 55.0, 53.0],
    "divergence forward_kl clip bf16": [17.0, 20.0, 21.5],
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_per_logit(reports, name):
    """Instructions limit the row kernels if the memory is fast enough, and their loops must have no barriers."""
    two_rows = "full_kl" in name or "divergence" in name
    loops = reports[name].loops
    counts = [loop.per_element(itemsize=2) * (1 + two_rows) for loop in loops]
    print(name, [f"{count:.2f}" for count in counts])
    assert len(counts) == len(INSTRUCTIONS[name])
    assert all(count <= most for count, most in zip(counts, INSTRUCTIONS[name], strict=True)), counts
    assert not any(loop.barriers for loop in loops)


def test_a_policy_row_costs_at_most_17_instructions_per_logit(reports):
    for dtype in ("bf16", "fp16"):
        assert sum(loop.per_element(itemsize=2) for loop in reports[f"policy k3 {dtype}"].loops[:2]) <= 17


def test_wide_loads_and_rounding_to_nearest(reports):
    """Each load takes 16 bytes per thread. bfloat16 gradients are rounded, whereas the interpreter truncates them."""
    assert "ld.global.v4.b32" in reports["policy k3 bf16"].ptx
    assert "st.global.v4.b32" in reports["policy k3 bf16"].ptx
    for name in ("policy k3 bf16", "gradient bf16", "divergence jsd bf16", "discriminator gradient bf16"):
        assert re.search(r"cvt\.rn\.bf16", reports[name].ptx), name


def global_accesses(ptx: str) -> list[str]:
    """Return barriers, and loads and stores of global memory, in program order."""
    return [word.split("{")[0] for word in re.findall(r"\b(bar\.sync|(?:ld|st)\.global[.\w]*)", ptx)]


def test_a_hidden_target_is_visible_to_all_threads(reports):
    """-inf is stored after all threads have read the target's logit and before any thread reads the row."""
    for name in ("score bf16", "policy k3 bf16", "policy full_kl entropy bf16"):
        steps = global_accesses(reports[name].ptx)
        store = next(i for i, step in enumerate(steps) if step.startswith("st.global"))
        assert steps[store].startswith("st.global.b16") and steps[store - 1] == steps[store + 1] == "bar.sync", name
        assert not any(".v4" in step for step in steps[:store]), name
        # The gradient of the target, or its restored logit, is written after a barrier.
        last = max(i for i, step in enumerate(steps) if step.startswith("st.global.b16"))
        assert "bar.sync" in steps[max(i for i in range(last) if ".v4" in steps[i]) : last], name


def test_a_merge_reads_all_log_sum_exps_before_it_writes(reports):
    for dtype in DTYPES:
        steps = global_accesses(reports[f"merge {dtype}"].ptx)
        barrier = steps.index("bar.sync")
        assert not any(step.startswith("ld") for step in steps[barrier:]), dtype
        assert any(step.startswith("st.global.b32") for step in steps[barrier:]), dtype


def test_nan_survives_a_maximum(reports):
    """max.f32 drops a NaN operand, which the interpreter cannot show."""
    for dtype in DTYPES:
        assert "max.NaN.f32" in reports[f"divergence jsd {dtype}"].ptx


class _Device:
    """A fake GPU with what Triton queries before a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return triton_compile.TARGET


@pytest.fixture
def launched(monkeypatch) -> list:
    """Return the compiled kernels of the launches in order; CPU tensors are used and the launch itself is skipped."""
    run, kernels = triton.JITFunction.run, []

    def compile_only(self, *arguments, grid, warmup, **options):
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **options))

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Device())
    return kernels


def test_launches_pass_float32_and_compile_once_for_all_batches(launched):
    """New numbers of rows and unaligned slices do not recompile, and no Python float becomes a float64."""
    vocab, ones = 5000, torch.ones(64)
    for start, rows in ((0, 16), (1, 1), (3, 15), (2, 34)):
        part = slice(start, start + rows)
        logits = torch.zeros(rows, vocab, dtype=torch.bfloat16)
        targets = torch.zeros(64, dtype=torch.int64)[part]
        inputs = RowInputs(targets, ones[part], torch.ones(vocab), ones[part], 30.0)
        ref = RowReference(logits, torch.ones(vocab), ones[part], ones[part])
        stats = triton_rows.score(logits, inputs, ref)
        settings = {"kl_coef": 0.1, "kl_log_ratio_clip": 5.0, "tis_cap": 2.0, "entropy_coef": 0.01}
        for kl in ("k3", "full"):
            terms = PolicyTerms(*[ones[part]] * 5, settings=PolicySettings(kl_loss=kl, **settings))
            triton_rows.policy_(logits, inputs, terms, ref if kl == "full" else None)
        triton_rows.target_logit(logits[:, :48], torch.ones(8, 48, dtype=torch.bfloat16), targets)
        triton_rows.gradient_(logits, inputs, stats, ones[part], ones[part], ref, ones[part])
        triton_rows.divergence_(logits, logits, ones[part], "jsd", None, ones[part])

        hidden = torch.zeros(rows + 48, 64, dtype=torch.bfloat16, requires_grad=True)
        index = torch.arange(64)[part]
        pairs = (index % rows, index % 1, ones[part])
        last = torch.arange(rows + 1)
        triton_loss.discriminator_loss(
            hidden, last, hidden[0], *pairs, num_students=rows, score_l2=0.1, normalizer=3.0, norm_weight=hidden[1]
        ).loss.backward()
        scores = torch.zeros(rows, requires_grad=True)
        triton_loss.pairwise_discriminator_loss(scores, scores[:1], *pairs).loss.backward()
        triton_loss.last_token_values(hidden, last, hidden[0])
    assert len(launched) == 4 * 10
    for i, kernel in enumerate(launched):
        assert "fp64" not in kernel.src.signature.values(), kernel.src.signature
        assert kernel is launched[i % 10], f"{kernel.name} is compiled again for another batch"


def test_media_kernels_compile_once_for_all_videos(launched):
    """Check sizes of one pixel and of any multiple, both layouts, and unaligned slices."""
    source, room = (torch.zeros(3 * 5 * 90 * 160 + 1, dtype=torch.uint8) for _ in range(2))
    numbers = torch.ones(3)
    for count, in_height, in_width, height, width in ((5, 90, 160, 32, 64), (1, 1, 1, 64, 32), (2, 32, 48, 32, 96)):
        for start in (0, 1):
            flat = source[start : start + 3 * count * in_height * in_width]
            out = room[start : start + 3 * count * height * width].view(count, 3, height, width)
            rows_last = flat.view(count, in_height, in_width, 3).permute(0, 3, 1, 2)
            for frames in (flat.view(count, 3, in_height, in_width), rows_last):
                sizes = (height, width, 16, 2, 2, numbers, numbers, torch.bfloat16)
                triton_patches.video_patches(frames, *sizes)
                triton_patches.resize_frames_(out, frames)
    assert len(launched) == 2 * 3 * 2 * 2
    for i, kernel in enumerate(launched):
        assert kernel is launched[i % 2], f"{kernel.name} is compiled again for another video"


def test_the_table_is_printed(reports, capsys):
    # The reports are those of the fixture, which are compiled once.
    triton_compile.main(["fp32"])
    printed = capsys.readouterr().out
    assert re.search(r"policy k3 fp32 +\d+ +0 +0 +\d+ +32", printed), printed
