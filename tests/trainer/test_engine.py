"""Test engines on one and two real processes (gloo); this file is also the program that those processes run."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

CASES = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32")] + [(z, "bfloat16") for z in range(4)]
ROWS, WIDTH, STEPS, MICRO = 12, 128, 3, 3


class Net(nn.Module):
    """A model with a frozen table, a layer that ZeRO-3 splits, and small parameters that it keeps whole."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(16, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)
        for p in self.parameters():
            if p.ndim == 2:
                p.data = torch.randn(p.shape) * 0.1
        self.table.weight.requires_grad_(False)

    def forward(self, ids, mask):
        """Return the masked sum of squared errors over tokens [B, L] against the token id."""
        score = self.head(self.norm(torch.tanh(self.layer(self.table(ids))))).squeeze(-1)
        return ((score.float() - ids / 8) ** 2 * mask).sum()


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU and counts how often the host reads it or a result of it."""

    READS = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.numpy} | {
        getattr(torch.Tensor, f"__{kind}__") for kind in ("bool", "int", "float", "array", "index")
    }
    reads = 0

    @staticmethod
    def __new__(cls, value):
        return torch.as_tensor(value).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        cls.reads += func in cls.READS
        return super().__torch_function__(func, types, args, kwargs)


def batch(step: int):
    """Return token ids [ROWS, 5] and a mask with 0 to 4 tokens per row, so that ranks and micro-batches are unequal."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 16, (ROWS, 5), generator=generator)
    lengths = torch.tensor([4, 4, 4, 4, 3, 4, 1, 0, 2, 0, 0, 1])
    return ids, (torch.arange(5) < lengths[:, None]).float()


def accumulate(engine, step: int, *, scale: float = 1.0, poison: bool = False, added: float = 0.0):
    """Run forward and backward of this rank's rows in MICRO micro-batches; rank r of w has rows r*ROWS/w onward."""
    from rmsd_fast.runtime.process_group import global_sum

    world = engine.world
    ids, mask = (t.chunk(world.size)[world.rank] for t in batch(step))
    count = global_sum({"tokens": mask.sum()}, world)["tokens"]
    for i, (rows, keep) in enumerate(zip(ids.chunk(MICRO), mask.chunk(MICRO), strict=True)):
        loss = engine(rows, keep) / count * scale
        if poison and i == 1:
            loss = loss * float("nan")
        if i == 1:
            loss = loss + added
        engine.backward(loss, last=i == MICRO - 1)


def finite(engine) -> bool:
    from rmsd_fast.runtime.engine import gradients_finite

    return gradients_finite([engine])


def train(engine, steps) -> list[float]:
    norms = []
    for step in steps:
        engine.set_lr(1e-2 / (step + 1))
        accumulate(engine, step)
        assert finite(engine)
        norms.append(float(engine.step()))
    return norms


def weights(engine) -> dict:
    with engine.full_weights():
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def optimizer_state(engine) -> list:
    state = engine.engine.basic_optimizer.state
    return [m.detach().clone() for m in engine.masters()] + [
        torch.as_tensor(v).clone() for m in engine.masters() for _, v in sorted(state[m].items())
    ]


def identical(a, b) -> bool:
    pairs = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def make(world, stage, dtype, seed=0, **options):
    from rmsd_fast.runtime.engine import Engine

    options = {"lr": 1e-2, "weight_decay": 0.1, "grad_clip": 0.5} | options
    return Engine(Net(seed), zero_stage=stage, dtype=dtype, world=world, **options)


def check_case(world, stage, dtype, folder: Path) -> dict:
    """Run all checks of one ZeRO stage and dtype; the names of the results are the tests below."""
    result = {}
    engine, other = make(world, stage, dtype), make(world, stage, dtype, seed=1)
    frozen = engine.module.table.weight.detach().clone() if stage < 3 else None
    result["norms"] = train(engine, range(STEPS))
    train(other, range(STEPS))
    torch.save(weights(engine), folder / f"weights_{stage}_{dtype}_{world.size}.pt")
    if frozen is not None:
        result["frozen_kept"] = torch.equal(frozen, engine.module.table.weight)

    engine.save(folder / f"engine_{stage}_{dtype}_{world.size}")
    before = weights(engine), optimizer_state(engine)
    accumulate(engine, 5, poison=world.rank == world.size - 1)
    result["seen_on_all"] = not finite(engine)
    engine.discard()
    result["discard_nonfinite"] = identical(before[0], weights(engine)) and identical(
        before[1], optimizer_state(engine)
    )
    accumulate(engine, 6)  # These finite gradients are discarded because those of the other model are not finite.
    result["finite_again"] = finite(engine)
    engine.discard()
    result["discard_finite"] = identical(before[0], weights(engine)) and identical(before[1], optimizer_state(engine))
    expected_norms = train(engine, range(3, 6))  # An undisturbed engine must give the same result: see continue_exact.
    expected = weights(engine), optimizer_state(engine)
    result["moved"] = not identical(before[0], expected[0])
    torch.distributed.barrier()
    fresh = make(world, stage, dtype, seed=7)
    fresh.load(folder / f"engine_{stage}_{dtype}_{world.size}")
    result["load_exact"] = identical(before[0], weights(fresh))
    result["continue_exact"] = expected_norms == train(fresh, range(3, 6)) and identical(expected[0], weights(fresh))
    engine.load(folder / f"engine_{stage}_{dtype}_{world.size}")  # The engine has taken steps since then.
    result["rewind_exact"] = expected_norms == train(engine, range(3, 6)) and identical(
        expected[1], optimizer_state(engine)
    )
    before = weights(engine), optimizer_state(engine)
    # The gradients are finite, but their squares are not.
    accumulate(engine, 7, scale=1e25)
    seen = not finite(engine)
    engine.discard()
    unchanged = identical(before[0], weights(engine)) and identical(before[1], optimizer_state(engine))
    result["discard_overflow"] = seen and unchanged
    # Only the loss is not finite; its gradients are.
    accumulate(engine, 7, added=float("-inf") if world.rank == 0 else 0.0)
    result["loss_seen_on_all"] = not finite(engine)
    engine.discard()
    # Large finite gradients are clipped.
    accumulate(engine, 7, scale=1e12)
    result["large_is_applied"] = finite(engine) and 1e9 < float(engine.step()) < 1e18
    if stage == 3:
        result |= check_full_weights(engine)
    result |= check_average(engine, folder / f"average_{stage}_{dtype}")
    result["two_engines_apart"] = not identical(weights(engine), weights(other))
    module = other.module
    kept = weights(other)
    other.close()
    again_engine = type(other)(module, lr=1e-2, zero_stage=stage, dtype=dtype, world=world)
    result["reused"] = identical(kept, weights(again_engine)) and all(n > 0 for n in train(again_engine, range(2)))
    result["reused_moved"] = not identical(kept, weights(again_engine))
    for left in (engine, fresh, again_engine):
        left.close()
    return result


def check_average(engine, folder: Path) -> dict:
    """Check a moving average of the weights: its values, the passes with it, and its files."""
    from rmsd_fast.runtime.moving_average import MovingAverage

    def held():
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}

    def passed():
        with torch.no_grad():
            return engine(*rows).item()

    folder, rows = folder.with_name(f"{folder.name}_{engine.world.size}"), batch(0)
    average = MovingAverage(engine, 0.25)
    start, masters, before = weights(engine), [master.detach().clone() for master in engine.masters()], passed()
    with average.in_place():
        result = {"average_starts": identical(start, held()) and passed() == before}
    train(engine, range(1))
    average.update()
    end, after = weights(engine), passed()
    pairs = zip(average.values, masters, engine.masters(), strict=True)
    result["average_values"] = all(torch.allclose(v, 0.75 * a + 0.25 * b, rtol=1e-6, atol=1e-9) for v, a, b in pairs)
    addresses = [p.data_ptr() for p in engine.module.parameters()]
    with average.in_place():
        inside, found = held(), passed()
    with torch.no_grad():
        expected = torch.func.functional_call(Net().to(end["layer.weight"].dtype), inside, rows).item()
    close = {"rtol": 1e-5, "atol": 1e-7} if engine.dtype == "float32" else {"rtol": 2e-2, "atol": 1e-4}
    mixed = {name: 0.75 * start[name].float() + 0.25 * end[name].float() for name in start}
    result["average_in_place"] = all(torch.allclose(inside[name].float(), mixed[name], **close) for name in start)
    result["average_is_used"] = abs(found - expected) <= 1e-5 * abs(expected) and found not in (before, after)
    result["average_leaves"] = identical(end, weights(engine)) and passed() == after
    if engine.zero_stage < 3:
        result["average_leaves"] &= addresses == [p.data_ptr() for p in engine.module.parameters()]
    average.save(folder)
    torch.distributed.barrier()
    fresh = MovingAverage(engine, 0.25)
    fresh.load(folder)
    result["average_loads"] = identical(average.values, fresh.values)
    # Training goes on as without the average.
    engine.save(folder.with_name(f"{folder.name}_engine"))
    torch.distributed.barrier()
    norms = train(engine, range(2))
    engine.load(folder.with_name(f"{folder.name}_engine"))
    with average.in_place():
        passed()
    result["average_apart"] = norms == train(engine, range(2))
    return result


def check_offload(world, stage: int, folder: Path) -> dict:
    """Check optimizer states in host memory with torch's fused AdamW."""
    path = folder / f"offload_{stage}_{world.size}"
    engine = make(world, stage, "bfloat16", offload_optimizer=True)
    train(engine, range(2))
    engine.save(path)
    torch.distributed.barrier()
    norms, expected = train(engine, range(2, 4)), weights(engine)
    engine.close()
    fresh = make(world, stage, "bfloat16", seed=7, offload_optimizer=True)
    fresh.load(path)
    exact = norms == train(fresh, range(2, 4)) and identical(expected, weights(fresh))
    fused = fresh.engine.basic_optimizer.defaults["fused"] is True
    fresh.close()
    return {"exact": exact, "fused": fused}


def check_8bit(world, stage: int, dtype: str, folder: Path) -> dict:
    """Check 8-bit moments: they stay close to torch's AdamW, and are discarded, saved and restored exactly."""
    path = folder / f"8bit_{stage}_{dtype}_{world.size}"
    engine = make(world, stage, dtype, optimizer="adamw_8bit")
    new = make(world, stage, dtype, seed=7, optimizer="adamw_8bit")
    new.save(path / "new")  # No step has been taken, so there are no moments yet.
    first = weights(new)
    train(engine, range(3))
    result = {}
    moments = [v for m in engine.masters() for k, v in engine.engine.basic_optimizer.state[m].items() if k == "state1"]
    result["8bit"] = any(moment.dtype == torch.uint8 for moment in moments)
    engine.save(path / "trained")
    before = weights(engine), optimizer_state(engine)
    accumulate(engine, 5)
    engine.discard()
    result["discard"] = identical(before[0], weights(engine)) and identical(before[1], optimizer_state(engine))
    torch.distributed.barrier()
    norms, expected = train(engine, range(3, 6)), weights(engine)
    fresh = make(world, stage, dtype, seed=9, optimizer="adamw_8bit")
    fresh.load(path / "trained")
    result["load"] = identical(before[0], weights(fresh)) and identical(before[1], optimizer_state(fresh))
    result["continue"] = norms == train(fresh, range(3, 6)) and identical(expected, weights(fresh))
    # A state from before the first step, loaded by an engine that has taken steps.
    expected = train(new, range(2)), weights(new)
    fresh.load(path / "new")
    result["rewind"] = identical(first, weights(fresh))
    result["rewind_continue"] = expected[0] == train(fresh, range(2)) and identical(expected[1], weights(fresh))
    plain = make(world, stage, dtype)
    train(plain, range(3))
    start, exact = weights(make(world, stage, dtype))["layer.weight"].float(), weights(plain)["layer.weight"].float()
    moved, error = (exact - start).norm(), (before[0]["layer.weight"].float() - exact).norm()
    result["close"], result["rounded"] = bool(error < 0.03 * moved), bool(error > 0)
    try:
        plain.load(path / "trained")
        result["refused"] = "no error"
    except ValueError as error:
        result["refused"] = str(error)
    for left in (engine, fresh, new, plain):
        left.close()
    return result


def check_full_weights(engine) -> dict:
    """Check that ranks may call the module a different number of times inside `full_weights`."""
    ids, mask = batch(0)
    with engine.full_weights(), torch.no_grad():
        values = [engine.module(ids, mask).item() for _ in range(1 + 2 * engine.world.rank)]
    layer = engine.module.layer
    rows = torch.ones(1, WIDTH, dtype=layer.weight.dtype)
    released = layer.weight.numel() == 0
    with engine.full_weights(layer), torch.no_grad():
        of_part = [layer(rows) for _ in range(1 + 2 * engine.world.rank)]
    with engine.gathered(layer.parameters()), torch.no_grad():
        expected = nn.functional.linear(rows, layer.weight, layer.bias)
    gathered = all(torch.equal(value, expected) for value in of_part)
    with torch.no_grad():
        plain = engine(ids, mask).item()
    return {
        "full_weights": all(v == plain for v in values),
        "part": released and gathered and layer.weight.numel() == 0,
        "after_full": train(engine, range(1))[0] > 0,
    }


def check_helpers(world) -> dict:
    from rmsd_fast.runtime.process_group import all_gather_objects, any_rank, broadcast_object, global_max, global_sum

    return {
        "sum": global_sum({"b": world.rank + 1, "a": torch.tensor(0.5)}, world),
        "exact": global_sum({"a": 0.1, "b": torch.tensor([2**40 + 1]), "c": 2.0**40 + 1}, world),
        "max": global_max({"a": -float(world.rank)}, world),
        # A rank with only filler passes has a number where the others have a tensor.
        "mixed": global_sum({"a": 1.0, "b": OnDevice(2.0) if world.rank else 2.0, "c": torch.tensor(3.0)}, world),
        "any": [any_rank(world.rank == world.size - 1, world), any_rank(False, world)],
        "broadcast": broadcast_object(f"from {world.rank}", world),
        "gather": all_gather_objects(world.rank, world),
    }


def check_refusals(world, folder: Path) -> dict:
    """Check the messages for mistakes that a user can correct."""

    def message(call) -> str:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            return str(error)
        return "no error"

    engine = make(world, 2, "float32")
    engine.save(folder / f"refuse_{world.size}")
    torch.distributed.barrier()
    other_stage = make(world, 1, "float32")
    other_stage._hooks[0].remove() if world.rank == 1 else None
    accumulate(other_stage, 0)
    ranks_differ = message(lambda: finite(other_stage))
    other_stage.discard()
    saved = folder / f"refuse_{world.size}"
    other_dtype = make(world, 2, "bfloat16")
    found = {
        "other_dtype": message(lambda: other_dtype.load(saved)),
        "ranks_differ": ranks_differ,
        "range": message(lambda: make(world, 4, "float32")),
        "dtype": message(lambda: make(world, 2, "float16")),
        "offload": message(lambda: make(world, 0, "float32", offload_optimizer=True)),
    }
    # The other rank may still be reading the files that are changed next.
    torch.distributed.barrier()
    if world.rank == 0:
        meta = json.loads((saved / "engine.json").read_text())
        (saved / "engine.json").write_text(json.dumps(meta | {"trainable": meta["trainable"][1:]}))
    torch.distributed.barrier()
    found["trainable"] = message(lambda: engine.load(saved))
    for left in (engine, other_stage, other_dtype):
        left.close()
    return found


def program(folder: Path) -> None:
    torch.set_num_threads(1)
    from rmsd_fast.runtime.process_group import all_gather_objects, barrier, start, stop

    world = start(timeout_s=60)
    results = {"helpers": check_helpers(world), "refusals": check_refusals(world, folder)}
    for stage, dtype in CASES:
        results[f"{stage}-{dtype}"] = check_case(world, stage, dtype, folder)
    results["offload"] = [check_offload(world, stage, folder) for stage in (1, 2, 3)]
    if importlib.util.find_spec("bitsandbytes"):
        results["8bit"] = {f"{stage}-{dtype}": check_8bit(world, stage, dtype, folder) for stage, dtype in CASES}
    gathered = all_gather_objects(results, world)
    if world.is_main:
        (folder / f"results_{world.size}.json").write_text(json.dumps(gathered))
    # Wait until the other rank has finished writing.
    barrier(world)
    stop()


if __name__ == "__main__":
    from rmsd_fast.runtime.process_group import exit_process

    program(Path(sys.argv[1]))
    exit_process(0)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Run the program on one process (without the variables of torchrun) and on two."""
    from train_runs import environment
    from warm_process import run_program

    folder = tmp_path_factory.mktemp("engines")
    ended = [
        run_program(__file__, [str(folder)], environment(), processes=processes, timeout_s=400) for processes in (1, 2)
    ]
    outputs = [done.stdout + done.stderr for done in ended]
    for done, output in zip(ended, outputs, strict=True):
        assert done.returncode == 0, output[-6000:]
    read = {n: json.loads((folder / f"results_{n}.json").read_text()) for n in (1, 2)}
    return folder, read, outputs


@pytest.mark.parametrize(("stage", "dtype"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_faults_and_exact_continuation(outcome, stage, dtype, ranks):
    """Every check of a ZeRO stage holds on every rank: discard is bit-identical, and save and load continue exactly."""
    for rank, results in enumerate(outcome[1][ranks]):
        result = results[f"{stage}-{dtype}"]
        assert result.pop("norms")[0] > 0
        failed = [name for name, value in result.items() if value is not True]
        assert not failed, f"rank {rank}: {failed}"
        assert len(result) >= 11


def test_offloaded_states_continue_exactly(outcome):
    for results in (outcome[1][1][0], outcome[1][2][0], outcome[1][2][1]):
        assert results["offload"] == [{"exact": True, "fused": True}] * 3


@pytest.mark.parametrize(("stage", "dtype"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_8_bit_moments_continue_exactly(outcome, stage, dtype, ranks):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'rmsd-fast[quantize]')")
    for results in outcome[1][ranks]:
        result = dict(results["8bit"][f"{stage}-{dtype}"])
        assert "optimizer: expected adamw as in this run, got adamw_8bit; resume with" in result.pop("refused")
        assert [name for name, value in result.items() if value is not True] == []
        assert len(result) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", range(4))
def test_a_new_engine_has_taken_no_step(stage, dtype):
    """DeepSpeed takes one in some modes. It would decay the weights, all of them with this weight decay, and count."""
    from rmsd_fast.runtime.process_group import start, stop

    world = start()
    try:
        engine = make(world, stage, dtype, lr=1.0, weight_decay=1.0)
        expected = {name: p.to(getattr(torch, dtype)) for name, p in Net().named_parameters()}
        assert identical(expected, weights(engine))
        masters = torch.cat([master.detach().flatten() for master in engine.masters()])
        assert float(masters.abs().sum()) == pytest.approx(
            sum(float(p.float().abs().sum()) for name, p in expected.items() if name != "table.weight"), rel=1e-5
        )
        assert not any(engine.engine.basic_optimizer.state.values())
        assert engine.engine.basic_optimizer.param_groups[0]["lr"] == 1.0
        engine.close()
    finally:
        stop()


def test_8_bit_moments_are_not_offloaded():
    from rmsd_fast.config import SettingsError
    from rmsd_fast.settings import load_settings

    assert load_settings("quickstart", ["runtime.optimizer=adamw_8bit"]).runtime.optimizer == "adamw_8bit"
    for wrong, says in (
        (["runtime.optimizer=adamw_8bit", "runtime.offload_optimizer=true"], "runtime.optimizer: expected adamw with"),
        (["runtime.optimizer=lion"], "runtime.optimizer: expected one of adamw, adamw_8bit, got 'lion'"),
    ):
        with pytest.raises(SettingsError, match=says):
            load_settings("quickstart", wrong)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    from rmsd_fast.config import NotInstalled
    from rmsd_fast.runtime.engine import _adamw

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        NotInstalled, match=r"runtime\.optimizer=adamw_8bit: .* run pip install 'rmsd-fast\[quantize\]'"
    ):
        _adamw("adamw_8bit", [torch.nn.Parameter(torch.zeros(1))], 0.0, None)


@pytest.mark.parametrize("fused", [True, None])
def test_a_restored_step_count_is_on_the_device_that_adamw_expects(fused):
    """Fused AdamW on a GPU refuses a step count in host memory, and the other AdamW refuses a step count on the GPU."""
    from rmsd_fast.runtime.engine import _restore_state

    master, part = torch.zeros(2, device="meta"), {"state.0.step": torch.tensor(3.0), "state.0.exp_avg": torch.ones(2)}
    optimizer = SimpleNamespace(state={master: {}}, defaults={"fused": fused})
    _restore_state(optimizer, master, part, "state.0.")
    state = optimizer.state[master]
    assert state["step"].is_meta == bool(fused) and state["exp_avg"].is_meta


@pytest.mark.parametrize("stage", range(4))
def test_ranks_and_stages_do_not_change_the_result(outcome, stage):
    """After 3 steps with unequal token counts, two ranks equal one and every ZeRO stage equals plain torch."""
    folder, results, _ = outcome
    expected, norms = plain_torch()
    for ranks in (1, 2):
        got = torch.load(folder / f"weights_{stage}_float32_{ranks}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(results[ranks][0][f"{stage}-float32"].get("norms", norms), norms, rtol=1e-5, atol=0)


def plain_torch():
    """Take the same three steps with only torch: whole batch, one backward, clip, AdamW."""
    net = Net()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    norms = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        ids, mask = batch(step)
        (net(ids, mask) / mask.sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in net.named_parameters()}, norms


@pytest.mark.parametrize("stage", range(4))
def test_bfloat16_follows_float32(outcome, stage):
    """bfloat16 weights equal the float32 weights within bfloat16's rounding of gradients and weights."""
    folder = outcome[0]
    start, (end, _) = dict(Net().named_parameters()), plain_torch()
    for ranks in (1, 2):
        got = torch.load(folder / f"weights_{stage}_bfloat16_{ranks}.pt", weights_only=True)
        for name in ("layer.weight", "head.weight"):
            assert got[name].dtype == torch.bfloat16
            moved, error = (end[name] - start[name]).norm(), (got[name].float() - end[name]).norm()
            assert error < 0.35 * moved, (name, ranks, float(error / moved))


def test_collective_helpers(outcome):
    for rank in range(2):
        got = outcome[1][2][rank]["helpers"]
        assert got["sum"] == {"a": 1.0, "b": 3.0}
        assert got["max"] == {"a": 0.0}
        assert got["any"] == [True, False]
        assert got["mixed"] == {"a": 2.0, "b": 4.0, "c": 6.0}
        assert got["broadcast"] == "from 0"
        assert got["gather"] == [0, 1]
    assert outcome[1][1][0]["helpers"]["sum"] == {"a": 0.5, "b": 1.0}
    # The values stay in float64, because float32 cannot represent either of them.
    assert outcome[1][1][0]["helpers"]["exact"] == {"a": 0.1, "b": 2**40 + 1, "c": 2**40 + 1}


def test_one_process_reads_the_device_once_and_only_for_values_that_are_on_it(monkeypatch):
    from rmsd_fast.runtime import process_group
    from rmsd_fast.runtime.process_group import World, any_rank, global_sum

    def refuse(*_):
        raise AssertionError("copied host numbers to the device")

    monkeypatch.setattr(process_group, "to_device", refuse)
    monkeypatch.setattr(OnDevice, "reads", 0)
    # No tensor can be created on this device, so host numbers must stay where they are.
    world = World(0, 1, 0, torch.device("cuda", 99))
    assert any_rank(True, world) and not any_rank(False, world)
    assert global_sum({"b": 2**40 + 1, "a": torch.tensor([0.5])}, world) == {"a": 0.5, "b": 2**40 + 1}
    assert OnDevice.reads == 0
    values = {"c": OnDevice(3), "b": 0.1, "a": OnDevice([0.25]), "d": OnDevice(True)}
    assert list(global_sum(values, world).items()) == [("a", 0.25), ("b", 0.1), ("c", 3.0), ("d", 1.0)]
    assert OnDevice.reads == 1


@pytest.mark.parametrize("stage", range(4))
def test_engines_are_judged_together_with_one_read(monkeypatch, stage):
    """One engine that is not finite keeps all from stepping, whichever it is, and the host reads the device once."""
    from rmsd_fast.runtime import engine as engine_module
    from rmsd_fast.runtime.process_group import start, stop
    from rmsd_fast.stages.state import apply_or_discard

    reduced = []

    def counted(values, world):
        reduced.append(values)
        return global_max(values, world)

    global_max = engine_module.global_max
    monkeypatch.setattr(engine_module, "global_max", counted)
    world = start()
    engines = [make(world, stage, "float32", seed) for seed in range(2)]
    try:
        for engine in engines:
            engine._probe = OnDevice(engine._probe)
        before = [weights(engine) for engine in engines]
        for poisoned in (0, 1):
            for number, engine in enumerate(engines):
                accumulate(engine, 0, poison=number == poisoned)
            monkeypatch.setattr(OnDevice, "reads", 0)
            norms, skipped = apply_or_discard(engines)
            assert skipped and all(norm != norm for norm in norms) and OnDevice.reads == 1
            assert all(identical(old, weights(engine)) for old, engine in zip(before, engines, strict=True))
        for engine in engines:
            accumulate(engine, 0)
        monkeypatch.setattr(OnDevice, "reads", 0)
        norms, skipped = apply_or_discard(engines)
        assert not skipped and all(norm > 0 for norm in norms) and OnDevice.reads == 1
        assert not any(identical(old, weights(engine)) for old, engine in zip(before, engines, strict=True))
        assert len(reduced) == 3
    finally:
        for engine in engines:
            engine.close()
        stop()


def test_error_messages_of_refused_calls(outcome):
    for results in (outcome[1][1][0], outcome[1][2][0], outcome[1][2][1]):
        found = results["refusals"]
        assert "dtype: expected bfloat16 as in this run, got float32" in found["other_dtype"]
        assert "trainable: expected 6 parameters as in this run, got 5 parameters" in found["trainable"]
        assert "expected 0, 1, 2 or 3, got 4" in found["range"]
        assert "float16" in found["dtype"] and "offload_optimizer" in found["offload"]
    assert "expected the same modules in the same order" in outcome[1][2][0]["refusals"]["ranks_differ"]
    assert outcome[1][1][0]["refusals"]["ranks_differ"] == "no error"


def test_other_trained_parameters_of_the_same_number_are_named_in_an_error(tmp_path):
    from rmsd_fast.config import CheckpointError
    from rmsd_fast.runtime.process_group import start, stop

    world = start()
    try:
        engine = make(world, 0, "float32")
        engine.save(tmp_path)
        meta = json.loads((tmp_path / "engine.json").read_text())
        first, second, *others = meta["trainable"]
        (tmp_path / "engine.json").write_text(json.dumps(meta | {"trainable": [first, f"{second}.other", *others]}))
        with pytest.raises(
            CheckpointError, match=rf"trainable: expected {second} as in this run, got {second}\.other; resume with"
        ):
            engine.load(tmp_path)
        engine.close()
    finally:
        stop()


def test_deepspeed_does_not_log_to_the_terminal(outcome):
    """DeepSpeed's own lines would hide the progress of a run."""
    assert all(len(output.splitlines()) < 25 for output in outcome[2]), outcome[2][1][-3000:]


def test_a_cast_buffer_is_not_accepted(monkeypatch):
    """DeepSpeed 0.19.0 casts a module with all its buffers, as this stand-in does."""
    import deepspeed

    from rmsd_fast.config import NotInstalled
    from rmsd_fast.runtime.engine import Engine
    from rmsd_fast.runtime.process_group import start, stop

    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("inv_freq", torch.rand(8))

    world = start()
    try:
        frequencies = Rotary().inv_freq
        engine = Engine(Rotary(), lr=1e-3, zero_stage=2, dtype="bfloat16", world=world)
        assert engine.module.inv_freq.dtype == frequencies.dtype == torch.float32
        initialize = deepspeed.initialize

        def casting(*, model, **others):
            return initialize(model=model.bfloat16(), **others)

        monkeypatch.setattr(deepspeed, "initialize", casting)
        with pytest.raises(
            NotInstalled, match=r"buffer inv_freq to stay torch\.float32, got torch\.bfloat16.*0\.19\.4"
        ):
            Engine(Rotary(), lr=1e-3, zero_stage=2, dtype="bfloat16", world=world)
    finally:
        stop()


def test_a_single_process_listens_only_on_the_loopback():
    """No socket of the process group is open on an interface that other machines can reach."""
    from rmsd_fast.runtime.process_group import start, stop

    start()
    try:
        # Exclude the descriptor that lists the folder, which is already closed.
        numbers = [number for number in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{number}")]
        sockets = [os.readlink(f"/proc/self/fd/{number}") for number in numbers]
        inodes = {name.removeprefix("socket:[").removesuffix("]") for name in sockets}
        listening = [
            fields[1]
            for name in ("tcp", "tcp6")
            for fields in map(str.split, Path(f"/proc/net/{name}").read_text().splitlines()[1:])
            if fields[3] == "0A" and fields[9] in inodes
        ]
        # The address is 127.0.0.1 in the byte order of the file.
        assert all(address.startswith("0100007F") for address in listening), listening
    finally:
        stop()
