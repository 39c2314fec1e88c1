"""Test packed and padded rows, the gather of predicting rows, and the balance of micro-batches."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from rmsd_fast.config import SettingsError
from rmsd_fast.data.micro_batches import MicroBatch, plan_micro_batches
from rmsd_fast.data.packing import gather_rows, make_rows, pack, pad
from rmsd_fast.data.prompts import VIDEO_TYPE, Prompt
from rmsd_fast.data.transfer import to_device

VIDEO_ID = 9
# These are the ids of an image, a video, and the start and the end of either.
VISION_IDS = (62, VIDEO_ID, 60, 61)


def _prompt(ids: list[int], name: str = "q") -> Prompt:
    """Build a prompt; the tokens of a VIDEO_ID run share one time and form rows of two, as vision tokens do."""
    input_ids = torch.tensor(ids)
    types = torch.where(input_ids == VIDEO_ID, VIDEO_TYPE, 0)
    positions = torch.arange(len(ids)).expand(3, -1).clone()
    positions[1:] += types
    return Prompt(SimpleNamespace(id=name), input_ids, types, positions, (), VISION_IDS)


def _ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def _random_groups(seed: int) -> tuple[list[Prompt], list[list[torch.Tensor]]]:
    draw = random.Random(seed)
    prompts = [_prompt([draw.randrange(9, 50) for _ in range(draw.randrange(1, 9))], f"q{i}") for i in range(4)]
    responses = [
        [torch.tensor([draw.randrange(10, 50) for _ in range(draw.randrange(1, 6))]) for _ in range(draw.randrange(5))]
        for _ in prompts
    ]
    responses[2].append(_ids(11))
    return prompts, responses


def test_packed_row_by_hand() -> None:
    prompts = [_prompt([1, 9, 9]), _prompt([2, 3])]
    rows = pack(prompts, [[_ids(21, 22), _ids(23)], [_ids(31, 32, 33), _ids(34)]])
    assert rows.input_ids.tolist() == [[1, 9, 9, 2, 3, 21, 22, 23, 31, 32, 33, 34]]
    # The largest position of the first prompt is 4 (2 in time, 2 + 2 in height and width), and that of the second is 1.
    assert rows.position_ids[0].tolist() == [[0, 1, 2, 0, 1, 5, 6, 5, 2, 3, 4, 2]]
    assert rows.position_ids[1].tolist() == rows.position_ids[2].tolist() == [[0, 3, 4, 0, 1, 5, 6, 5, 2, 3, 4, 2]]
    assert rows.attention_mask is None
    assert rows.plan.prefix_lengths == (3, 2)
    assert rows.plan.response_lengths == ((2, 1), (3, 1))
    assert rows.plan.tokens == 12
    assert rows.predicts.tolist() == [2, 5, 2, 4, 8, 9, 4]
    assert rows.targets.tolist() == [21, 22, 23, 31, 32, 33, 34]
    assert rows.last.tolist() == [6, 7, 10, 11]
    assert rows.lengths.tolist() == rows.lengths_list == [2, 1, 3, 1]
    assert rows.forks == [(2, 0, 2), (4, 2, 2)]
    assert rows.media_order == [0, 1]


def test_a_lone_response_continues_its_prompt() -> None:
    prompts = [_prompt([1, 9]), _prompt([2, 3]), _prompt([4])]
    rows = pack(prompts, [[_ids(21, 22)], [_ids(31), _ids(32, 33)], [_ids(41)]])
    assert rows.input_ids.tolist() == [[1, 9, 21, 22, 2, 3, 4, 41, 31, 32, 33]]
    assert rows.plan.prefix_lengths == (4, 2, 2) and rows.plan.response_lengths == ((), (1, 2), ())
    assert rows.predicts.tolist() == [1, 2, 5, 5, 9, 6]
    assert rows.targets.tolist() == [21, 22, 31, 32, 33, 41]
    assert rows.last.tolist() == [3, 8, 10, 7]
    assert rows.forks == [(5, 1, 2)]
    assert rows.position_ids[0].tolist()[0][:8] == [0, 1, 4, 5, 0, 1, 0, 1]


def test_leads_are_read_and_not_scored() -> None:
    prompts = [_prompt([1, 9, 9]), _prompt([2, 3]), _prompt([4])]
    responses = [[_ids(21, 22), _ids(23)], [_ids(31, 32)], []]
    leads = [[_ids(51), _ids(52, 53)], [_ids(54, 55)], []]
    rows = pack(prompts, responses, leads)
    assert rows.input_ids.tolist() == [[1, 9, 9, 2, 3, 54, 55, 31, 32, 4, 51, 21, 22, 52, 53, 23]]
    assert rows.plan.prefix_lengths == (3, 6, 1) and rows.plan.response_lengths == ((3, 3), (), ())
    # Each response token is predicted by the token before it, of the lead or of the response.
    assert rows.predicts.tolist() == [10, 11, 14, 6, 7]
    assert rows.targets.tolist() == [21, 22, 23, 31, 32]
    assert rows.last.tolist() == [12, 15, 8] and rows.lengths_list == [2, 1, 2] and rows.forks == []
    assert rows.position_ids[0].tolist()[0] == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 5, 6, 7, 5, 6, 7]
    padded = pad(prompts, responses, leads, pad_id=7)
    assert padded.input_ids.tolist() == [[1, 9, 9, 51, 21, 22], [1, 9, 9, 52, 53, 23], [2, 3, 54, 55, 31, 32]]
    assert padded.predicts.tolist() == [3, 4, 10, 15, 16] and padded.last.tolist() == [5, 11, 17]
    assert torch.equal(padded.targets, rows.targets) and padded.lengths_list == rows.lengths_list


def test_bad_leads_are_refused() -> None:
    prompts = [_prompt([1, 2], "a")]
    for name in ("shared", "padded"):
        for lead, says in (
            (_ids(3, VIDEO_ID), "lead 1 of question 'a' contains the vision token 9"),
            (_ids().long(), "lead 1 of question 'a' is empty"),
        ):
            with pytest.raises(ValueError, match=says):
                make_rows(name, prompts, [[_ids(3), _ids(3)]], [[_ids(4), lead]], pad_id=0)
        with pytest.raises(ValueError, match=r"leads: expected one per response, \[2\] for the prompts, got \[1\]"):
            make_rows(name, prompts, [[_ids(3), _ids(3)]], [[_ids(4)]], pad_id=0)


def test_a_plan_marks_the_predicting_rows() -> None:
    for seed in range(20):
        prompts, responses = _random_groups(seed)
        responses = [own if len(own) != 1 else [] for own in responses]
        rows = pack(prompts, responses)
        assert torch.equal(rows.plan.predicting_rows(), rows.predicts)


def test_padded_rows_by_hand() -> None:
    prompts = [_prompt([1, 9, 9]), _prompt([2, 3])]
    rows = pad(prompts, [[_ids(21, 22), _ids(23)], [_ids(31, 32, 33)]], pad_id=7)
    assert rows.input_ids.tolist() == [[1, 9, 9, 21, 22], [1, 9, 9, 23, 7], [2, 3, 31, 32, 33]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert rows.position_ids[0].tolist() == [[0, 1, 2, 5, 6], [0, 1, 2, 5, 0], [0, 1, 2, 3, 4]]
    assert rows.position_ids[2].tolist() == [[0, 3, 4, 5, 6], [0, 3, 4, 5, 0], [0, 1, 2, 3, 4]]
    assert rows.plan is None
    assert rows.predicts.tolist() == [2, 3, 7, 11, 12, 13]
    assert rows.targets.tolist() == [21, 22, 23, 31, 32, 33]
    assert rows.last.tolist() == [4, 8, 14]
    assert rows.lengths_list == [2, 1, 3]
    assert rows.media_order == [0, 0, 1] and rows.forks == []


def test_packed_and_padded_rows_agree() -> None:
    for seed in range(20):
        prompts, responses = _random_groups(seed)
        packed, padded = (make_rows(name, prompts, responses, pad_id=0) for name in ("shared", "padded"))
        for name in ("targets", "lengths"):
            assert torch.equal(getattr(packed, name), getattr(padded, name))
        for rows in (packed, padded):
            assert rows.targets.dtype == rows.predicts.dtype == rows.last.dtype == rows.input_ids.dtype == torch.int64
            ends = rows.lengths.cumsum(0) - 1
            assert torch.equal(rows.input_ids.flatten()[rows.last], rows.targets[ends])
        # The inputs at the predicting rows agree: the preceding token and its positions.
        assert torch.equal(packed.input_ids.flatten()[packed.predicts], padded.input_ids.flatten()[padded.predicts])
        for axis in range(3):
            found = [rows.position_ids[axis].flatten()[rows.predicts] for rows in (packed, padded)]
            assert torch.equal(*found)


def test_prompts_without_responses_can_be_packed() -> None:
    prompts = [_prompt([1, 2]), _prompt([3])]
    rows = pack(prompts, [[], []])
    assert rows.input_ids.tolist() == [[1, 2, 3]]
    assert len(rows.predicts) == len(rows.targets) == len(rows.last) == len(rows.lengths_list) == 0
    assert rows.media_order == [0, 1]
    assert rows.plan.response_lengths == ((), ())
    padded = pad(prompts, [[], [_ids(5)]], pad_id=0)
    assert padded.media_order == [1]
    with pytest.raises(ValueError, match="at least one response, got none"):
        pad(prompts, [[], []], pad_id=0)


def test_rows_move_as_a_whole() -> None:
    for name in ("shared", "padded"):
        rows = make_rows(name, [_prompt([1, 2])], [[_ids(3), _ids(4, 5)]], pad_id=0)
        moved = rows.to("meta")
        tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == (7 if name == "shared" else 8)
        assert all(tensor.is_meta for tensor in tensors)
        assert moved.lengths_list == [1, 2]
        assert moved.media_order == rows.media_order
        assert (moved.plan is None) == (name == "padded")
        if moved.plan is not None:
            assert torch.device(moved.plan.device).type == "meta"


def test_tensors_of_all_kinds_move_in_one_buffer() -> None:
    tensors = [
        torch.arange(6).view(2, 3).t(),
        torch.tensor([0.5, -1.0]),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor([True, False, True]),
        torch.tensor(7, dtype=torch.int32),
    ]
    moved = to_device(tensors, "cpu")
    for before, after in zip(tensors, moved, strict=True):
        assert torch.equal(before, after) and before.dtype == after.dtype
        assert after.is_contiguous() and after.data_ptr() % 16 == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1
    assert to_device([], "cpu") == []


def test_media_positions_are_the_placeholders() -> None:
    prompts = [_prompt([1, VIDEO_ID, VIDEO_ID, 2]), _prompt([VIDEO_ID, 3])]
    for name in ("shared", "padded"):
        rows = make_rows(name, prompts, [[_ids(4), _ids(5, 6)], [_ids(7)]], pad_id=0)
        expected = (rows.input_ids.flatten() == VIDEO_ID).nonzero()[:, 0]
        assert torch.equal(rows.media_places, expected) and len(expected) == (3 if name == "shared" else 5)


def test_bad_responses_are_refused() -> None:
    prompts = [_prompt([1, 2], "a"), _prompt([1, VIDEO_ID], "b")]
    for name in ("shared", "padded"):
        with pytest.raises(ValueError, match="response 1 of question 'b' is empty"):
            make_rows(name, prompts, [[_ids(3)], [_ids(3), _ids().long()]], pad_id=0)
        with pytest.raises(TypeError, match="response 0 of question 'a': expected int64"):
            make_rows(name, prompts, [[_ids(3).float()], [_ids(3)]], pad_id=0)
        with pytest.raises(TypeError, match="response 0 of question 'a': expected int64"):
            make_rows(name, prompts, [[_ids(3)[None]], [_ids(3)]], pad_id=0)
        # No prompt has an image, and only one prompt has a video.
        for index in VISION_IDS:
            with pytest.raises(
                ValueError, match=rf"response 1 of question 'a' contains the vision token {index}, which"
            ):
                make_rows(name, prompts, [[_ids(3), _ids(3, index)], [_ids(3)]], pad_id=0)
        with pytest.raises(ValueError, match="a list of responses for each prompt"):
            make_rows(name, prompts, [[_ids(3)]], pad_id=0)
        with pytest.raises(ValueError, match="a list of responses for each prompt"):
            make_rows(name, [], [], pad_id=0)
    with pytest.raises(ValueError, match="packing: expected 'shared' or 'padded', got 'flat'"):
        make_rows("flat", prompts, [[_ids(3)], [_ids(3)]], pad_id=0)


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_gather_rows_in_float64(packing: str) -> None:
    prompts, responses = _random_groups(1)
    rows = make_rows(packing, prompts, responses, pad_id=0)
    hidden = torch.randn(rows.input_ids.numel(), 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gather_rows(hidden, rows), hidden[rows.predicts])
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, rows), hidden)
    # The upstream gradient is a view with its own strides.
    upstream = torch.randn(3, len(rows.predicts), dtype=torch.float64).T
    (found,) = torch.autograd.grad(gather_rows(hidden, rows), hidden, upstream)
    (expected,) = torch.autograd.grad(hidden[rows.predicts], hidden, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def _gather_gradient(rows, width: int, upstream: torch.Tensor) -> torch.Tensor:
    hidden = torch.zeros(rows.input_ids.numel(), width, dtype=upstream.dtype, device=upstream.device)
    hidden.requires_grad_()
    return torch.autograd.grad(gather_rows(hidden, rows), hidden, upstream)[0]


def test_gather_rows_rounds_the_shared_row_once() -> None:
    """The first tokens add 256, 1, 1 and 1, which bfloat16 sums to 256 one at a time; the true sum is 259."""
    rows = pack([_prompt([1]), _prompt([1, 2])], [[_ids(3), _ids(4, 5), _ids(6), _ids(7)], [_ids(8)]])
    upstream = torch.tensor([256, 1, 50, 1, 1, 5], dtype=torch.bfloat16)[:, None]
    found = _gather_gradient(rows, 1, upstream)
    assert found.dtype == torch.bfloat16
    # The rows are prefix 1, prefix 2 (two tokens) with response 8, and responses 3 | 4 5 | 6 | 7. The sum 259 rounds to
    # the even value 260.
    assert found.flatten().tolist() == [260, 0, 5, 0, 0, 50, 0, 0, 0]
    assert _gather_gradient(rows, 1, upstream.float()).flatten().tolist() == [259, 0, 5, 0, 0, 50, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gather_rows_error_is_at_most_one_rounding(dtype: torch.dtype) -> None:
    rows = pack([_prompt([1, 2])], [[torch.arange(10, 14)] * 64])
    upstream = torch.randn(len(rows.predicts), 33).to(dtype)
    found = _gather_gradient(rows, 33, upstream)
    exact = torch.zeros(found.shape, dtype=torch.float64).index_add_(0, rows.predicts, upstream.double())
    unit = torch.finfo(dtype).eps / 2
    # The float32 sum of 64 addends adds its own error to the final rounding.
    slack = 64 * torch.finfo(torch.float32).eps * upstream.double().abs().amax(0) * 8
    assert ((found.double() - exact).abs() <= unit * exact.abs() + slack).all()
    unique = torch.ones(len(found), dtype=torch.bool)
    unique[1] = False
    assert torch.equal(found[unique].double(), exact[unique])


def test_gather_rows_without_gradient_and_with_wrong_shapes() -> None:
    rows = pack([_prompt([1, 2])], [[_ids(3)]])
    assert not gather_rows(torch.zeros(3, 2), rows).requires_grad
    for shape in ((4, 2), (1, 3, 2)):
        with pytest.raises(ValueError, match=r"hidden: expected \[3, D\]"):
            gather_rows(torch.zeros(shape), rows)


@pytest.mark.cuda
def test_gather_rows_is_deterministic_on_cuda() -> None:
    prompts = [_prompt([1, 2, 3])] * 3
    cpu_rows = pack(prompts, [[torch.arange(10, 20)] * 12] * 3)
    rows = cpu_rows.to("cuda")
    upstream = torch.randn(len(rows.predicts), 257).bfloat16()
    found = [_gather_gradient(rows, 257, upstream.cuda()) for _ in range(5)]
    assert all(torch.equal(found[0], other) for other in found)
    torch.testing.assert_close(found[0].cpu(), _gather_gradient(cpu_rows, 257, upstream), rtol=2**-8, atol=0)


def _tokens(batch: MicroBatch, prefixes, responses, packing: str) -> int:
    lengths = [[responses[p][r] for r in own] for p, own in zip(batch.prompts, batch.responses, strict=True)]
    if packing == "shared":
        return sum(prefixes[p] + sum(own) for p, own in zip(batch.prompts, lengths, strict=True))
    rows = [prefixes[p] + one for p, own in zip(batch.prompts, lengths, strict=True) for one in own]
    return len(rows) * max(rows)


def _cost(batch: MicroBatch, prefixes, responses, packing: str, weights) -> float:
    per_token, per_pair = weights
    lengths = [[responses[p][r] for r in own] for p, own in zip(batch.prompts, batch.responses, strict=True)]
    if packing == "shared":
        pairs = 0
        for p, own in zip(batch.prompts, lengths, strict=True):
            pairs += prefixes[p] * (prefixes[p] + 1) / 2 + sum(r * (r + 1) / 2 + r * prefixes[p] for r in own)
        return per_token * _tokens(batch, prefixes, responses, packing) + per_pair * pairs
    rows = [prefixes[p] + one for p, own in zip(batch.prompts, lengths, strict=True) for one in own]
    return len(rows) * (per_token * max(rows) + per_pair * max(rows) * (max(rows) + 1) / 2)


def _check_plan(plan, prefixes, responses, packing: str, budget: int) -> None:
    seen = []
    for batch in plan:
        assert batch.prompts == sorted(set(batch.prompts))
        assert len(batch.prompts) == len(batch.responses) > 0
        assert all(own == sorted(set(own)) and own for own in batch.responses)
        assert _tokens(batch, prefixes, responses, packing) <= budget
        if not batch.filler:
            seen += [(p, r) for p, own in zip(batch.prompts, batch.responses, strict=True) for r in own]
    assert sorted(seen) == [(p, r) for p, own in enumerate(responses) for r in range(len(own))]
    kinds = [batch.filler for batch in plan]
    assert kinds == sorted(kinds), "expected empty micro-batches at the end"


def _parts_of(plan, prompt: int) -> list[list[int]]:
    return [
        own
        for batch in plan
        if not batch.filler
        for p, own in zip(batch.prompts, batch.responses, strict=True)
        if p == prompt
    ]


def _random_step(draw: random.Random) -> tuple[list[int], list[list[int]], int]:
    most = draw.choice([20, 200, 3000])
    prefixes = [draw.randint(1, most) for _ in range(draw.randint(1, 14))]
    responses = [[draw.randint(1, draw.choice([5, 300])) for _ in range(draw.randint(0, 12))] for _ in prefixes]
    responses[0] = responses[0] or [3]
    least = max(p + max(own) for p, own in zip(prefixes, responses, strict=True) if own)
    return prefixes, responses, int(least * draw.choice([1, 1.01, 1.5, 3, 10]))


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_plan_of_one_rank(packing: str) -> None:
    draw = random.Random(0)
    for _ in range(150):
        prefixes, responses, budget = _random_step(draw)
        weights = draw.choice([(1, 0), (1000.0, 1.0), (1, 1), (0, 1)])
        options = {"packing": packing, "micro_tokens": budget, "weights": weights}
        agree = Mock(side_effect=lambda count: count)
        plan = plan_micro_batches(prefixes, responses, **options, agree=agree)
        _check_plan(plan, prefixes, responses, packing, budget)
        agree.assert_called_once_with(len(plan))
        assert not any(batch.filler for batch in plan)
        assert plan == plan_micro_batches(prefixes, responses, **options)
        costs = [_cost(batch, prefixes, responses, packing, weights) for batch in plan]
        assert costs == sorted(costs, reverse=True)
        for prompt, own in enumerate(responses):
            everything = MicroBatch([prompt], [list(range(len(own)))], False)
            fits = not own or _tokens(everything, prefixes, responses, packing) <= budget
            assert fits == (len(_parts_of(plan, prompt)) <= 1), "expected a group to be split only if it does not fit"


def _least(sizes: list[int], count: int) -> int:
    """Return the smallest possible sum of the fullest of `count` bins by trying all assignments."""
    best = sum(sizes)

    def assign(index: int, bins: list[int]) -> None:
        nonlocal best
        if index == len(sizes):
            best = max(bins)
            return
        for number in range(count):
            # Bins with the same sum are interchangeable. Abandon an assignment that is not better than the best so far.
            if bins[number] not in bins[:number] and bins[number] + sizes[index] < best:
                assign(index + 1, [*bins[:number], bins[number] + sizes[index], *bins[number + 1 :]])

    assign(0, [0] * count)
    return best


def test_few_micro_batches() -> None:
    """For whole groups of 7, the plan almost always has the optimal number of micro-batches and never two more."""
    draw = random.Random(1)
    found = fewest = 0
    for _ in range(100):
        prefixes = [draw.randint(5, 60) for _ in range(7)]
        responses = [[draw.randint(1, 20), draw.randint(1, 20)] for _ in prefixes]
        own = len(plan_micro_batches(prefixes, responses, packing="shared", micro_tokens=100))
        sizes = [prefix + sum(lengths) for prefix, lengths in zip(prefixes, responses, strict=True)]
        possible = next(count for count in range(1, 8) if _least(sizes, count) <= 100)
        assert possible <= own <= possible + 1
        found, fewest = found + own, fewest + possible
    assert found <= 1.02 * fewest


def test_parts_of_an_oversized_group() -> None:
    """The parts are even, almost always as few as possible, and at most one more."""
    plan = plan_micro_batches([10], [[6, 5, 4, 3, 2, 1]], packing="shared", micro_tokens=21)
    assert sorted(batch.responses for batch in plan) == [[[0, 3, 4]], [[1, 2, 5]]]
    plan = plan_micro_batches([10], [[6, 5, 4, 3, 2, 1]], packing="shared", micro_tokens=20)
    assert sorted(batch.responses for batch in plan) == [[[0, 5]], [[1, 4]], [[2, 3]]]
    draw = random.Random(2)
    found = fewest = 0
    for _ in range(100):
        prefix, own = draw.randint(5, 60), [draw.randint(1, 40) for _ in range(7)]
        plan = plan_micro_batches([prefix], [own], packing="shared", micro_tokens=130)
        _check_plan(plan, [prefix], [own], "shared", 130)
        possible = next(count for count in range(1, 8) if _least(own, count) <= 130 - prefix)
        assert possible <= len(plan) <= possible + 1
        found, fewest = found + len(plan), fewest + possible
    assert found <= 1.02 * fewest


def test_padded_parts_by_hand() -> None:
    """Rows of 16, 14, 12 and 11 tokens give two parts of two rows: 2 x 16 = 32 and 2 x 14 = 28."""
    plan = plan_micro_batches([10], [[2, 6, 1, 4]], packing="padded", micro_tokens=32)
    assert [batch.responses for batch in plan] == [[[1, 2]], [[0, 3]]]
    assert len(plan_micro_batches([10], [[2, 6, 1, 4]], packing="padded", micro_tokens=31)) == 3


def test_balance_without_a_tight_budget() -> None:
    """Check the longest-processing-time bound: at most 4/3 - 1/(3n) of the optimum for n micro-batches."""
    draw = random.Random(3)
    for _ in range(150):
        count = draw.randint(2, 4)
        prefixes = [draw.randint(5, 60) for _ in range(8)]
        responses = [[draw.randint(1, 20), draw.randint(1, 20)] for _ in prefixes]
        plan = plan_micro_batches(
            prefixes, responses, packing="shared", micro_tokens=10**4, agree=lambda own, count=count: max(own, count)
        )
        assert len(plan) == count
        _check_plan(plan, prefixes, responses, "shared", 10**4)
        dearest = max(_tokens(batch, prefixes, responses, "shared") for batch in plan)
        best = _least([prefix + sum(own) for prefix, own in zip(prefixes, responses, strict=True)], count)
        assert best <= dearest <= (4 / 3 - 1 / (3 * count)) * best


@pytest.mark.parametrize("room", [1.15, 3.0])
def test_balance_of_a_large_step(room: float) -> None:
    """A plan of 128 prompts x 12 responses is short and close to the lower bound of the largest cost."""
    draw = random.Random(3)
    weights = (7.3e9, 5.9e5)
    prefixes = [draw.randint(500, 8000) for _ in range(128)]
    responses = [[draw.randint(30, 600) for _ in range(12)] for _ in prefixes]
    sizes = [prefix + sum(own) for prefix, own in zip(prefixes, responses, strict=True)]
    budget = int(room * max(sizes))
    plan = plan_micro_batches(prefixes, responses, packing="shared", micro_tokens=budget, weights=weights)
    _check_plan(plan, prefixes, responses, "shared", budget)
    costs = [_cost(batch, prefixes, responses, "shared", weights) for batch in plan]
    groups = [MicroBatch([prompt], [list(range(12))], False) for prompt in range(128)]
    alone = [_cost(group, prefixes, responses, "shared", weights) for group in groups]
    assert max(costs) <= 1.15 * max(sum(alone) / len(plan), max(alone))
    fewest = max(math.ceil(sum(sizes) / budget), sum(2 * size > budget for size in sizes))
    assert len(plan) <= 1.15 * fewest


def test_attention_pairs_are_balanced_besides_tokens() -> None:
    """Counting tokens puts a group of 50 and a prompt of 99 together; counting pairs leaves the prompt alone."""
    prefixes, responses = [99] + [1] * 4, [[1]] + [[1] * 49] * 4
    options = {"packing": "shared", "micro_tokens": 200}
    plan = plan_micro_batches(prefixes, responses, **options, weights=(1, 0))
    assert sorted(len(batch.prompts) for batch in plan) == [2, 3]
    plan = plan_micro_batches(prefixes, responses, **options, weights=(0, 1))
    assert [batch.prompts for batch in plan] == [[0], [1, 2, 3, 4]]


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_ranks_agree(packing: str) -> None:
    draw = random.Random(0)
    weights = (1000.0, 1.0)
    for _ in range(40):
        steps = [_random_step(draw) for _ in range(4)]
        budget = max(budget for *_, budget in steps)
        options = {"packing": packing, "micro_tokens": budget, "weights": weights}
        alone = [plan_micro_batches(p, r, **options) for p, r, _ in steps]
        count = max(len(plan) for plan in alone)
        for (prefixes, responses, _), before in zip(steps, alone, strict=True):
            plan = plan_micro_batches(prefixes, responses, **options, agree=lambda own, most=count: max(own, most))
            assert len(plan) == count
            _check_plan(plan, prefixes, responses, packing, budget)
            singles = [MicroBatch([p], [[r]], True) for p, own in enumerate(responses) for r in range(len(own))]
            cheapest = min(_cost(one, prefixes, responses, packing, weights) for one in singles)
            fillers = [batch for batch in plan if batch.filler]
            assert all(filler in singles for filler in fillers)
            assert all(_cost(one, prefixes, responses, packing, weights) == cheapest for one in fillers)
            # Whole groups stay whole. If there are fewer groups than micro-batches, fillers complete the number.
            if all(len(_parts_of(before, prompt)) <= 1 for prompt in range(len(prefixes))):
                assert len(fillers) == max(0, count - sum(map(bool, responses)))


def test_fillers_by_hand() -> None:
    plan = plan_micro_batches([10, 20], [[5, 4], [1]], packing="shared", micro_tokens=100, agree=lambda count: 4)
    assert plan == [
        MicroBatch([1], [[0]], False),
        MicroBatch([0], [[0, 1]], False),
        *[MicroBatch([0], [[1]], True)] * 2,
    ]


def test_greedy_placement_can_fail_with_more_micro_batches() -> None:
    """These groups fit into four micro-batches, but placing the most expensive first fails for five."""
    prefixes = [36, 15, 16, 5, 38, 35, 9, 33]
    responses = [[3, 3], [1, 1], [32], [17, 17], [31, 31], [1], [10, 10], [5]]
    options = {"packing": "padded", "micro_tokens": 138}
    before = plan_micro_batches(prefixes, responses, **options)
    assert len(before) == 4
    plan = plan_micro_batches(prefixes, responses, **options, agree=lambda count: 5)
    assert plan == [*before, MicroBatch([1], [[0]], True)]


def test_a_rank_without_work() -> None:
    options = {"packing": "shared", "micro_tokens": 100}
    assert plan_micro_batches([], [], **options) == []
    assert plan_micro_batches([5], [[]], **options) == []
    with pytest.raises(ValueError, match="this rank has no responses to repeat but other ranks have some"):
        plan_micro_batches([5], [[]], **options, agree=lambda count: 1)


def test_a_prompt_above_the_budget_is_refused() -> None:
    prefixes, responses = [50, 70], [[40], [10, 31]]
    for packing in ("shared", "padded"):
        options = {"packing": packing, "micro_tokens": 100}
        with pytest.raises(SettingsError, match="micro_tokens: question 'b' has 70 prompt tokens and a response of 31"):
            plan_micro_batches(prefixes, responses, **options, ids=["a", "b"])
        with pytest.raises(SettingsError, match="question number 1 of the step .* 101 in all.* at least 101"):
            plan_micro_batches(prefixes, responses, **options)
        plan = plan_micro_batches(prefixes, responses, packing=packing, micro_tokens=101)
        _check_plan(plan, prefixes, responses, packing, 101)


def test_bad_arguments_are_refused() -> None:
    options = {"packing": "shared", "micro_tokens": 100}
    with pytest.raises(ValueError, match="packing: expected 'shared' or 'padded', got 'flat'"):
        plan_micro_batches([5], [[1]], packing="flat", micro_tokens=100)
    with pytest.raises(ValueError, match="a list per prompt, got 1 for 2 prompts"):
        plan_micro_batches([5, 6], [[1]], **options)
    with pytest.raises(ValueError, match="prompt 0: expected lengths of at least 1"):
        plan_micro_batches([5], [[1, 0]], **options)
    for weights in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="weights: expected"):
            plan_micro_batches([5], [[1]], **options, weights=weights)
    with pytest.raises(ValueError, match="agree: expected at least 1 micro-batches, got 0"):
        plan_micro_batches([5], [[1]], **options, agree=lambda count: 0)
