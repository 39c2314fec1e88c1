"""Test that engines continue with other numbers of ranks and ZeRO stages; this file is also the ranks' program."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmsd_fast.config import CheckpointError
from rmsd_fast.runtime.reshard import Piece, SavedEngine, pieces

DTYPES = ("float32", "bfloat16")
# Numbers of ranks that one after another save, and load what the one before has saved.
RANKS = (4, 2, 1, 2)
# Sizes of the trained parameters of test_engine.Net.
NUMELS = [128 * 128, 128, 128, 128, 128, 1]


def stage_of(link: int, first: int) -> int:
    """Return the ZeRO stage of a link of the chain: the first one again at its end."""
    return (first + link) % 4 if link < len(RANKS) - 1 else first


def program(folder: Path, link: int) -> None:
    """Load the states of the link before, save them, and train on from them."""
    torch.set_num_threads(1)
    from test_engine import make, train, weights

    from rmsd_fast.runtime.moving_average import MovingAverage
    from rmsd_fast.runtime.process_group import barrier, start, stop

    world = start(timeout_s=60)
    results = {}
    for dtype in DTYPES:
        for first in range(4):
            name = f"{first}_{dtype}"
            engine = make(world, stage_of(link, first), dtype, seed=link)
            if link:
                # An engine that has already taken other steps must not keep any of their states.
                train(engine, range(7, 9))
                engine.load(folder / f"{link - 1}_{name}")
            else:
                train(engine, range(3))
            engine.save(folder / f"{link}_{name}")
            before = weights(engine)
            norms = train(engine, range(3, 6))
            after = weights(engine)
            if world.is_main:
                torch.save({"before": before, "after": after}, folder / f"{link}_{name}.pt")
            results[name] = norms
            engine.close()
    for dtype in DTYPES:
        engine = make(world, (link + 1) % 4, dtype, seed=link)
        average = MovingAverage(engine, 0.5)
        if link:
            average.load(folder / f"{link - 1}_average_{dtype}")
        else:
            train(engine, range(2))
            average.update()
        average.save(folder / f"{link}_average_{dtype}")
        with average.in_place():
            if world.is_main:
                torch.save(
                    {name: p.detach().clone() for name, p in engine.module.named_parameters()},
                    folder / f"{link}_average_{dtype}.pt",
                )
        engine.close()
    if world.is_main:
        (folder / f"norms_{link}.json").write_text(json.dumps(results))
    barrier(world)
    stop()


if __name__ == "__main__":
    from rmsd_fast.runtime.process_group import exit_process

    program(Path(sys.argv[1]), int(sys.argv[2]))
    exit_process(0)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Run all links of the chain, and return their folder."""
    from train_runs import environment
    from warm_process import run_program

    folder = tmp_path_factory.mktemp("chain")
    for link, ranks in enumerate(RANKS):
        run = run_program(__file__, [str(folder), str(link)], environment(), processes=ranks, timeout_s=400)
        assert run.returncode == 0, run.stderr[-6000:]
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_moving_average_continues_with_other_numbers_of_ranks(chain, dtype):
    first, *later = (torch.load(chain / f"{link}_average_{dtype}.pt") for link in range(len(RANKS)))
    # The frozen table is not part of an average, and differs by the seed.
    trained = [name for name in first if name != "table.weight"]
    assert all(torch.equal(first[name], weights[name]) for weights in later for name in trained)
    assert len(trained) == len(NUMELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("link", [1, 2, 3])
def test_another_number_of_ranks_and_stage_continues(chain, link, first, dtype):
    """Weights are bit-identical after loading, and three more steps give the same weights up to rounding."""
    name = f"{first}_{dtype}"
    start, here = (torch.load(chain / f"{i}_{name}.pt") for i in (0, link))
    assert all(torch.equal(value, here["before"][key]) for key, value in start["before"].items())
    norms = [json.loads((chain / f"norms_{i}.json").read_text())[name] for i in (0, link)]
    exact = dtype == "float32"
    assert norms[1] == pytest.approx(norms[0], rel=1e-5 if exact else 2e-2)
    for key, value in start["after"].items():
        torch.testing.assert_close(here["after"][key], value, rtol=0, atol=1e-6 if exact else 2e-3)
    moved = max((start["after"][key] - value).abs().max() for key, value in start["before"].items())
    assert moved > 5e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(4))
def test_all_states_pass_through_the_chain_unchanged(chain, first, dtype):
    """Read by one rank under ZeRO-0, the states that each link has loaded and saved again are the same bits."""
    found = []
    for link, ranks in enumerate(RANKS):
        folder = chain / f"{link}_{first}_{dtype}"
        layout = json.loads((folder / "engine.json").read_text())
        assert (layout["zero_stage"], layout["world_size"]) == (stage_of(link, first), ranks)
        saved = SavedEngine(folder, layout["zero_stage"], ranks, NUMELS)
        found.append(saved.states([torch.empty(sum(NUMELS))], [Piece(0, 0, sum(NUMELS))]))
    assert found[0].keys() == {"master.0", "state.0.exp_avg", "state.0.exp_avg_sq", "state.0.step"}
    assert found[0]["state.0.step"] == 3 and found[0]["state.0.exp_avg"].abs().sum() > 0
    for later in found[1:]:
        assert all(torch.equal(value, later[key]) for key, value in found[0].items())


def test_pieces_of_a_small_model_are_as_worked_out_by_hand():
    """Parameters of 5 and 2 elements on two ranks: the vector is 0 to 6."""
    assert pieces([5, 2], 0, 2, 1, held=7) == [Piece(0, 0, 7)]
    # ZeRO-2 pads 7 elements to 8 and gives 0 to 3 to the first rank, 4 to 6 and one of padding to the second.
    assert pieces([5, 2], 2, 2, 0, held=4) == [Piece(0, 0, 4)]
    assert pieces([5, 2], 2, 2, 1, held=4) == [Piece(4, 0, 3)]
    # Three ranks with 4 elements each: the last has only padding.
    assert pieces([5, 2], 1, 3, 2, held=4) == []
    # ZeRO-3 pads the first to 6: 0 to 2 and 5 of the first rank, and 3, 4, padding and 6 of the second.
    assert pieces([5, 2], 3, 2, 0, held=4) == [Piece(0, 0, 3), Piece(5, 3, 1)]
    assert pieces([5, 2], 3, 2, 1, held=4) == [Piece(3, 0, 2), Piece(6, 3, 1)]
    # One element on two ranks: the second has only padding.
    assert pieces([1], 3, 2, 1, held=1) == []


def test_files_of_other_ranks_or_parameters_are_not_accepted(chain):
    folder, stage = chain / "0_2_float32", stage_of(0, 2)
    SavedEngine(folder, stage, 4, NUMELS)
    for ranks, numels in ((2, NUMELS), (4, [*NUMELS, 5000])):
        with pytest.raises(CheckpointError, match="got a different number"):
            SavedEngine(folder, stage, ranks, numels)


def test_states_without_one_number_for_each_weight_are_not_divided(chain, tmp_path):
    """An 8-bit optimizer has one scale for many weights."""
    folder = Path(shutil.copytree(chain / "0_2_float32", tmp_path / "engine"))
    for path in folder.glob("rank_*"):
        save_file(load_file(path) | {"state.0.scale": torch.ones(7)}, path)
    saved = SavedEngine(folder, stage_of(0, 2), 4, NUMELS)
    with pytest.raises(CheckpointError, match="scale: expected optimizer states with one number for each weight"):
        saved.states([torch.empty(sum(NUMELS))], [Piece(0, 0, sum(NUMELS))])
