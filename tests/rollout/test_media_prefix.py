"""Test that questions about the same media share the beginnings of their prompts, without another result."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from material import tiny_material
from media_files import write_images

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models.shared_prefix import run_shared_prefix
from rmsd_fast.models.students import encode_media, load_student
from rmsd_fast.rollout import hf
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.rollout.media_prefix import SharedBeginnings, shared_beginnings
from rmsd_fast.rollout.shared_cache import DecodeCache, PrefixCache

CPU = torch.device("cpu")
# The largest difference between two summation orders in fp32 that was observed is 1e-6.
ATOL = 1e-5


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def setup(request, tmp_path_factory):
    """Return student, builder, and prompts about three videos in mixed order, an image, and text alone."""
    folder = tmp_path_factory.mktemp("media_prefix")
    material = tiny_material(folder)
    path = material.model_path
    if request.param != "qwen3_vl":
        path = folder / "student"
        build_tiny_student(path, texts=["What is shown?", "Count."], layers=2, family=request.param)
    student = load_student(path, dtype="float32")
    builder = PromptBuilder(student, VideoConfig(num_frames=8))
    videos = list({q.videos: q for q in material.train}.values())[:3]
    image = str(write_images(tmp_path_factory.mktemp("images"))["rgb"])
    texts = ["What is shown?", "When does the block move, and where does it go?", "Count."]
    questions = [
        replace(question, id=f"{number}-{i}", question=text, task_type="open", options=None, answer=None)
        for i, text in enumerate(texts)
        for number, question in enumerate(videos[: 3 - i])
    ]
    first = questions[0]
    questions += [replace(first, id=f"image-{i}", question=text, images=(image,)) for i, text in enumerate(texts[:2])]
    questions.append(replace(first, id="text", videos=()))
    # The same file with other frames, and the same frames behind another system turn, are other beginnings.
    questions.append(replace(first, id="span", spans=((0.5, None),)))
    questions.append(replace(first, id="system", system="Answer in a few words."))
    return student, builder, [builder.build(question) for question in questions]


def engine(builder, *, share: bool, batch: int = 16, device: torch.device = CPU) -> HfRollout:
    return HfRollout(builder, prompts_per_batch=batch, device=device, share_media=share)


def test_beginnings_are_equal_tokens_positions_and_media(setup):
    student, _, prompts = setup
    with torch.no_grad():
        beginnings = shared_beginnings(prompts, encode_media(student.model, prompts))
    names = [[prompts[index].question.id for index in group] for group in beginnings.groups]
    assert names == [
        ["0-0", "0-1", "0-2"],
        ["1-0", "1-1"],
        ["2-0"],
        ["image-0", "image-1"],
        ["text"],
        ["span"],
        ["system"],
    ]
    assert sorted(beginnings.order) == list(range(len(prompts)))
    for group, length, suffixes in zip(beginnings.groups, beginnings.lengths, beginnings.suffixes, strict=True):
        for index, suffix in zip(group, suffixes, strict=True):
            prompt = prompts[index]
            assert suffix >= 1 and length + suffix == len(prompt.input_ids)
            assert not prompt.mm_token_type_ids[length:].any()
            assert torch.equal(prompt.input_ids[:length], prompts[group[0]].input_ids[:length])
    # Without two questions about the same media, or without anything after them, nothing is shared.
    with torch.no_grad():
        alone = [prompts[0], prompts[1], prompts[-1]]
        assert shared_beginnings(alone, encode_media(student.model, alone)) is None
        ends = [replace(p, mm_token_type_ids=torch.ones_like(p.input_ids)) for p in prompts[:2]]
        assert shared_beginnings(ends, encode_media(student.model, prompts[:2])) is None


def test_beginnings_are_split_between_groups():
    # 6, 4 + 2 and 5 tokens.
    whole = SharedBeginnings([[0], [1, 2], [3]], [5, 4, 2], [[1], [1, 1], [3]])
    assert whole.split(None) == whole.split(17) == [whole]
    first = SharedBeginnings([[0]], [5], [[1]])
    assert whole.split(11) == [first, SharedBeginnings([[1, 2], [3]], [4, 2], [[1, 1], [3]])]
    assert [part.groups for part in whole.split(1)] == [[[0]], [[1, 2]], [[3]]]
    assert [part.suffixes for part in SharedBeginnings([[0], [1]], [5, 4], None).split(5)] == [None, None]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1, 0.0, 24), Sampling(3, 1.0, 24, seed=2)],
    ids=["greedy", "three sampled"],
)
def test_sharing_changes_nothing(setup, sampling):
    student, builder, prompts = setup
    apart = engine(builder, share=False).generate(student.model, prompts, sampling)
    for batch in (16, 5):
        shared = engine(builder, share=True, batch=batch).generate(student.model, prompts, sampling)
        for prompt, ours, theirs in zip(prompts, shared, apart, strict=True):
            assert [r.question_id for r in ours] == [prompt.question.id] * sampling.n
            for a, b in zip(ours, theirs, strict=True):
                assert a.token_ids.tolist() == b.token_ids.tolist() and a.index == b.index
                assert (a.logp - b.logp).abs().max() <= ATOL
    # Sampled responses end at different tokens, so that rows leave the batch.
    assert sampling.n == 1 or len({len(r.token_ids) for group in apart for r in group}) > 1


def test_a_beginning_is_computed_and_stored_once(setup, monkeypatch):
    student, builder, prompts = setup
    caches = []

    class Recorded(DecodeCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(hf, "DecodeCache", Recorded)
    chosen = [prompts[index] for index in (0, 1, 3, 4, 5)]
    engine(builder, share=True).generate(student.model, chosen, Sampling(2, 1.0, 4, seed=1))
    (cache,) = caches
    with torch.no_grad():
        lengths = shared_beginnings(chosen, encode_media(student.model, chosen)).lengths
    # Two videos and, in the order of the groups, what the three and two questions about them add.
    tails = [len(chosen[i].input_ids) - lengths[group] for group, i in ((0, 0), (0, 2), (0, 4), (1, 1), (1, 3))]
    assert cache.prefix.prefix_lengths == tuple(lengths) and list(cache.prefix.suffix_lengths) == tails
    assert {len(keys) for keys in cache.prefix.keys} == {sum(lengths)}
    assert {len(keys) for keys in cache.prefix.suffix_keys} == {sum(tails)}
    # The whole rows hold each token once.
    assert cache.prefix.keys[0].untyped_storage().nbytes() == 4 * cache.prefix.keys[0][0].numel() * (
        sum(lengths) + sum(tails)
    )


def test_the_prefill_is_split_by_tokens(setup, monkeypatch):
    """In fp64: a limit below, between and above the tokens of the beginnings changes passes, but not the result."""
    student, builder, prompts = setup
    model, rows, caches = copy.deepcopy(student.model).double(), [], []

    def recorded(*args, **inputs):
        rows.append(inputs["position_ids"].shape[-1])
        return run_shared_prefix(*args, **inputs)

    class Recorded(DecodeCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self.prefix)

    monkeypatch.setattr(hf, "run_shared_prefix", recorded)
    monkeypatch.setattr(hf, "DecodeCache", Recorded)
    for share in (True, False):
        results, stored, total = [], [], 0
        for limit in ("none", "one token", "half", "all"):
            rows.clear()
            most = {"none": None, "one token": 1, "half": total // 2, "all": total}[limit]
            ours = HfRollout(builder, prompts_per_batch=16, device=CPU, share_media=share, tokens_per_call=most)
            features = engine(builder, share=share).encode(model, prompts)
            results.append(ours.generate(model, prompts, Sampling(2, 1.0, 6, seed=1), features=features))
            stored.append(caches.pop())
            groups = shared_beginnings(prompts, features).groups if share else [[i] for i in range(len(prompts))]
            total = total or rows[0]
            passes = {"one token": range(len(groups), len(groups) + 1), "half": range(2, len(groups))}
            assert len(rows) in passes.get(limit, [1]) and sum(rows) == total
            assert limit != "half" or max(rows) <= most
        for other, cache in zip(results[1:], stored[1:], strict=True):
            assert cache.prefix_lengths == stored[0].prefix_lengths and cache.suffix_owner == stored[0].suffix_owner
            for name in ("keys", "values", "suffix_keys", "suffix_values"):
                for ours, theirs in zip(getattr(cache, name), getattr(stored[0], name), strict=True):
                    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
            for ours, theirs in zip(other, results[0], strict=True):
                for a, b in zip(ours, theirs, strict=True):
                    assert a.token_ids.tolist() == b.token_ids.tolist()
                    assert (a.logp - b.logp).abs().max() <= 1e-6


@pytest.mark.parametrize("tokens_first", [True, False])
def test_caches_with_suffixes_follow_the_formula(tokens_first):
    """In fp64, against attention over prefix, suffix and own tokens of each row, while rows end."""
    torch.manual_seed(0)
    prefixes, suffixes, size = [4, 2], [[3, 1], [5]], 8
    cache = PrefixCache(prefixes, suffixes)
    q, k, v = (torch.randn(1, heads, 15, size, dtype=torch.float64) for heads in (4, 2, 2))
    out = cache.attend(0, q, k, v, None)[0].transpose(0, 1)
    spans = [(slice(0, 4), slice(6, 9)), (slice(0, 4), slice(9, 10)), (slice(4, 6), slice(10, 15))]

    def attend(query, keys, values):
        keys, values = (x.repeat_interleave(2, 0) for x in (keys, values))
        return (query @ keys.mT * size**-0.5).softmax(-1) @ values

    prompts = [[torch.cat([x[0, :, head], x[0, :, tail]], 1) for x in (k, v)] for head, tail in spans]
    for (_, tail), (keys, values) in zip(spans, prompts, strict=True):
        # The last token of a prompt sees all of it.
        assert torch.allclose(
            out[:, tail.stop - 1 : tail.stop], attend(q[0, :, tail.stop - 1 : tail.stop], keys, values)
        )
    decode, owner = DecodeCache(cache, [2, 1, 1], tokens_first=tokens_first), [0, 0, 1, 2]
    own: list[list] = [[] for _ in owner]
    for step in range(5):
        if step == 2:
            decode.keep(torch.tensor([1, 3]))
            owner, own = [0, 2], [own[1], own[3]]
        q, k, v = (torch.randn(len(owner), heads, 1, size, dtype=torch.float64) for heads in (4, 2, 2))
        out = decode.attend(0, q, k, v, None)
        for row, prompt in enumerate(owner):
            own[row].append((k[row], v[row]))
            keys, values = (
                torch.cat([x, *new], 1) for x, new in zip(prompts[prompt], zip(*own[row], strict=True), strict=True)
            )
            assert torch.allclose(out[row].transpose(0, 1), attend(q[row], keys, values), rtol=0, atol=1e-12)
        decode.advance()
    with pytest.raises(ValueError, match="rows: expected one number per prompt, 3, got 2"):
        DecodeCache(cache, [1, 1])
    with pytest.raises(ValueError, match="at least one suffix per prefix"):
        PrefixCache([4, 2], [[3], []])


@pytest.mark.cuda
@pytest.mark.parametrize("graphs", [False, True])
def test_sharing_changes_nothing_on_cuda(setup, graphs):
    student, builder, prompts = setup
    device, sampling = torch.device("cuda"), Sampling(2, 1.0, 24, seed=2)
    model = student.model.to(device)
    try:
        apart, shared = (
            HfRollout(builder, prompts_per_batch=16, device=device, share_media=share, cuda_graphs=graphs).generate(
                model, prompts, sampling
            )
            for share in (False, True)
        )
    finally:
        student.model.to("cpu")
    for ours, theirs in zip(shared, apart, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist() and (a.logp - b.logp).abs().max() <= 1e-4
