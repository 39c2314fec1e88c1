"""Test rollouts of the hf engine against transformers' own generation, full recomputation and decoding with K/V that
grow token by token, and test the caches.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from material import tiny_material
from media_files import write_images
from rollout_oracle import decode_plainly
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmsd_fast.config import SettingsError, VideoConfig
from rmsd_fast.data.packing import media_places, pack
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.losses import linear_logprob
from rmsd_fast.models.policy import Policy
from rmsd_fast.models.shared_prefix import is_shared_prefix, shared_prefix_enabled
from rmsd_fast.models.students import embed, encode_media, load_student
from rmsd_fast.rollout import decode, hf
from rmsd_fast.rollout.base import Sampling, sampling_noise
from rmsd_fast.rollout.decode import LEAST_REPLAYS, Graphs, choose
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.rollout.shared_cache import BLOCK, DecodeCache, PrefixCache
from rmsd_kernels.shared_prefix import decode as op


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout")
    material = tiny_material(folder)
    student = load_student(material.model_path, dtype="float32")
    builder = PromptBuilder(student, VideoConfig(num_frames=8))
    prompts = sorted((builder.build(q) for q in material.train[:12]), key=lambda p: len(p.input_ids))
    assert len(prompts[0].input_ids) < len(prompts[-1].input_ids)
    return student, builder, [prompts[0], prompts[5], prompts[-1]]


@pytest.fixture(scope="module")
def mixed_prompts(setup, tmp_path_factory):
    """Return prompts with one video, two videos, an image and a video, and no media."""
    _, builder, (short, other, long) = setup
    image = str(write_images(tmp_path_factory.mktemp("images"))["rgb"])
    questions = [
        long.question,
        replace(short.question, id="two", videos=short.question.videos + other.question.videos),
        replace(other.question, id="image", images=(image,)),
        replace(short.question, id="text", videos=()),
    ]
    return [builder.build(question) for question in questions]


def engine(builder, prompts_per_batch=8, device="cpu", **options):
    return HfRollout(builder, prompts_per_batch=prompts_per_batch, device=torch.device(device), **options)


SAMPLING = Sampling(n=3, temperature=0.8, max_new_tokens=10, seed=3, step=4)
# This value is added to the logit of the end token, so a response of the random student ends after about eight tokens.
ENDS_EARLY = 4.0


@torch.no_grad()
def recomputed(model, builder, prompts, sampling):
    """Return ids and log-probs of every rollout by group; the stock model reads the whole sequence for each token."""
    assert model.config.text_config._attn_implementation == "sdpa"
    groups = []
    for prompt in prompts:
        features = encode_media(model, [prompt])
        rows = [_recomputed_row(model, builder, prompt, features, sampling, index) for index in range(sampling.n)]
        groups.append(rows)
    return groups


def _recomputed_row(model, builder, prompt, features, sampling, index):
    noise = sampling_noise(sampling, prompt.question.id, index)
    ids, logps = [], []
    for t in range(sampling.max_new_tokens):
        positions = prompt.next_position + torch.arange(t).expand(3, -1)
        input_ids = torch.cat([prompt.input_ids, torch.tensor(ids, dtype=torch.int64)])[None]
        hidden = model.model.language_model(
            **embed(model, input_ids, features, [0], media_places([prompt], [0])),
            position_ids=torch.cat([prompt.position_ids, positions], 1)[:, None],
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden)[0, -1].double()
        logp = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
        logits[builder.banned_ids] = -torch.inf
        if sampling.temperature:
            cdf = (logits / sampling.temperature).softmax(-1).cumsum(-1)
            chosen = int((cdf <= noise[t] * cdf[-1]).sum())
        else:
            chosen = int(logits.argmax())
        ids.append(chosen)
        logps.append(float(logp[chosen]))
        if chosen == builder.eos_id:
            break
    return ids, logps


def assert_same(groups, expected, atol):
    """Require equal ids and log-probs within atol, and return the largest difference."""
    largest = 0.0
    for group, rows in zip(groups, expected, strict=True):
        for rollout, (ids, logps) in zip(group, rows, strict=True):
            assert rollout.token_ids.tolist() == ids
            assert rollout.logp.shape == (len(ids),)
            largest = max(largest, float((rollout.logp.double() - torch.tensor(logps).double()).abs().max()))
    assert largest <= atol, largest
    return largest


def test_noise_is_a_function_of_its_counter():
    a = sampling_noise(SAMPLING, "q", 1)
    assert np.array_equal(a, sampling_noise(SAMPLING, "q", 1))
    longer = sampling_noise(Sampling(n=9, temperature=0.1, max_new_tokens=20, seed=3, step=4), "q", 1)
    assert np.array_equal(a, longer[:10])
    for other in (("q", 2), ("p", 1)):
        assert not np.isclose(a, sampling_noise(SAMPLING, *other)).any()
    assert not np.isclose(a, sampling_noise(Sampling(3, 0.8, 10, seed=3, step=5), "q", 1)).any()


def test_noise_is_uniform():
    many = np.concatenate([sampling_noise(Sampling(1, 1.0, 100, seed=s), f"q{s}", 0) for s in range(200)])
    counts, _ = np.histogram(many, bins=20, range=(0, 1))
    expected = len(many) / 20
    # The chi-square statistic with 19 degrees of freedom exceeds 43.8 once in a thousand runs.
    assert ((counts - expected) ** 2 / expected).sum() < 43.8
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.03


def test_greedy_equals_transformers_generate(setup):
    student, builder, prompts = setup
    (ours,) = zip(*engine(builder).generate(student.model, prompts, Sampling(1, 0.0, 8)), strict=True)
    banned = [[int(i)] for i in builder.banned_ids]
    for prompt, rollout in zip(prompts, ours, strict=True):
        from rmsd_fast.data.preprocess import video_patches

        media = prompt.media[0]
        theirs = student.model.generate(
            input_ids=prompt.input_ids[None],
            attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.long),
            mm_token_type_ids=prompt.mm_token_type_ids[None],
            pixel_values_videos=video_patches(media.pixels, media.preprocessor),
            video_grid_thw=torch.tensor([media.grid_thw]),
            max_new_tokens=8,
            do_sample=False,
            bad_words_ids=banned,
            eos_token_id=builder.eos_id,
        )[0, len(prompt.input_ids) :]
        assert rollout.token_ids.tolist() == theirs.tolist()


def test_a_rollout_does_not_depend_on_its_batch(setup):
    student, builder, prompts = setup
    together = engine(builder).generate(student.model, prompts, SAMPLING)
    alone = [engine(builder).generate(student.model, [p], SAMPLING)[0] for p in reversed(prompts)][::-1]
    fewer = engine(builder, 2).generate(student.model, prompts, Sampling(2, 0.8, 10, seed=3, step=4))
    given = engine(builder, 1).generate(student.model, prompts, SAMPLING, features=encode_media(student.model, prompts))
    for a, b, c, d in zip(together, alone, fewer, given, strict=True):
        assert [r.token_ids.tolist() for r in a] == [r.token_ids.tolist() for r in b]
        assert [r.token_ids.tolist() for r in a] == [r.token_ids.tolist() for r in d]
        assert [r.token_ids.tolist() for r in a[:2]] == [r.token_ids.tolist() for r in c]
        assert len({tuple(r.token_ids.tolist()) for r in a}) > 1


@pytest.mark.parametrize("banned", ["of the student", "half of the ids", "vision ids"])
def test_log_probs_equal_those_of_the_training_forward(setup, banned):
    """The importance ratio is 1 however much probability the banned ids have; and that mass is recorded."""
    student, builder, prompts = setup
    ours = engine(builder)
    vocabulary = student.model.lm_head.weight.shape[0]
    # A packed row rejects sampled vision ids.
    vision = set(prompts[0].vision_ids)
    if banned == "half of the ids":
        ours.banned_ids = torch.tensor(sorted(vision | {*range(1 - builder.eos_id % 2, vocabulary, 2)}))
    elif banned == "vision ids":
        ours.banned_ids = torch.tensor(sorted(vision))
    groups = ours.generate(student.model, prompts, SAMPLING)
    rollouts = [r for group in groups for r in group]
    rows = pack(prompts, [[r.token_ids for r in group] for group in groups])
    head = partial(linear_logprob, temperature=SAMPLING.temperature)
    with torch.no_grad(), shared_prefix_enabled(student.model):
        logp = Policy(student.model)(prompts, rows, None, head)
        logits = Policy(student.model)(prompts, rows, None, lambda hidden, weight, targets: hidden @ weight.T)
    sampled = torch.cat([r.logp for r in rollouts])
    assert torch.allclose(logp, sampled, rtol=0, atol=2e-5)
    mass = (logits / SAMPLING.temperature).softmax(-1)[:, ours.banned_ids].sum(-1)
    for rollout, of_tokens in zip(rollouts, mass.split([len(r.token_ids) for r in rollouts]), strict=True):
        assert rollout.banned_mass == pytest.approx(float(of_tokens.mean()), rel=1e-4, abs=1e-9)
        assert not torch.isin(rollout.token_ids, ours.banned_ids).any()
    least = {"of the student": 1e-3, "half of the ids": 0.3, "vision ids": 1e-4}[banned]
    assert min(r.banned_mass for r in rollouts) >= least


def test_choosing_by_hand():
    """Probabilities 1/10, 2/10, 3/10 and 4/10; the last is banned, so the others are drawn with 1/6, 2/6 and 3/6."""
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
    banned = torch.tensor([3])
    noise = torch.tensor([0.0, 0.16, 0.17, 0.49, 0.51, 0.999], dtype=torch.float64)
    # A hidden state [1] and a head [4, 1] with these logits.
    hidden, weight = torch.ones(6, 1), logits[:, None].clone()
    chosen = choose(logits.repeat(6, 1), hidden, weight, noise, 1.0, banned, 0)
    assert chosen.ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert chosen.logp.exp().tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert chosen.banned_mass.tolist() == pytest.approx([0.4] * 6)
    # At temperature 1/2, the probabilities are 1, 4, 9 and 16 of 30.
    chosen = choose(logits.repeat(2, 1), hidden[:2], weight, noise[[0, 5]], 0.5, banned, 0)
    assert chosen.logp.exp().tolist() == pytest.approx([1 / 30, 9 / 30])
    assert chosen.banned_mass.tolist() == pytest.approx([16 / 30] * 2)
    greedy = choose(logits[None].clone(), hidden[:1], weight, noise[:1], 0.0, banned, 0)
    assert greedy.ids.tolist() == [2] and greedy.logp.exp().tolist() == pytest.approx([0.3])
    broken = choose(torch.stack([logits, logits * math.nan]), hidden[:2], weight, noise[:2], 1.0, banned, 1)
    assert broken.ids.tolist() == [0, 1] and broken.logp.isnan().tolist() == [False, True]
    assert broken.banned_mass.isnan().tolist() == [False, True]
    # If the logit of the chosen id is log 1 before rounding and log 3 after it, the draws are from 3, 2, 3 of 8, and
    # the log-prob is that of 1 in 1, 2, 3 and 4.
    rounded = torch.tensor([3.0, 2.0, 3.0, 4.0]).log()
    chosen = choose(rounded.repeat(2, 1), hidden[:2], weight, torch.tensor([0.3, 0.4]).double(), 1.0, banned, 0)
    assert chosen.ids.tolist() == [0, 1]
    assert chosen.logp.exp().tolist() == pytest.approx([1 / 10, 2 / 12])
    assert chosen.banned_mass.tolist() == pytest.approx([4 / 10, 4 / 12])
    chosen = choose(rounded[None].clone(), hidden[:1], weight, noise[:1], 0.0, torch.tensor([], dtype=torch.int64), 0)
    assert chosen.ids.tolist() == [3] and chosen.logp.exp().tolist() == pytest.approx([4 / 12])
    assert chosen.banned_mass.tolist() == [0.0]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_of_16_bit_logits_are_those_of_the_training_head(temperature):
    """In bfloat16, logits of about 24 are multiples of 1/8. The trainer's head does not round the chosen one."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(200, 48, generator=generator) + 1).bfloat16()
    weight = (torch.randn(300, 48, generator=generator) * 0.1 + 0.45).bfloat16()
    logits, banned = hidden @ weight.T, torch.arange(0, 300, 7)
    noise = torch.rand(200, dtype=torch.float64, generator=generator)
    assert 20 < float(logits.float().mean()) < 26 and logits.dtype == torch.bfloat16
    chosen = choose(logits.clone(), hidden, weight, noise, temperature, banned, 1)
    assert not torch.isin(chosen.ids, banned).any()
    assert len(chosen.ids.unique()) > (1 if temperature == 0 else 30)
    z = logits.double()
    of_rounded = (z / (temperature or 1.0)).log_softmax(-1).gather(1, chosen.ids[:, None])[:, 0]
    exact = (hidden.double() * weight[chosen.ids].double()).sum(-1)
    z = z.scatter(1, chosen.ids[:, None], exact[:, None]) / (temperature or 1.0)
    expected = z.log_softmax(-1)
    assert torch.allclose(chosen.logp.double(), expected.gather(1, chosen.ids[:, None])[:, 0], rtol=0, atol=1e-5)
    assert torch.allclose(chosen.banned_mass.double(), expected[:, banned].exp().sum(-1), rtol=1e-4, atol=0)
    trained = linear_logprob(hidden, weight, chosen.ids, temperature=temperature or 1.0).double()
    ours, before = ((logp - trained).abs().mean() for logp in (chosen.logp, of_rounded))
    assert float(ours) < 1e-3 and float(before) > 10 * float(ours)


def test_banned_ids_with_nearly_all_probability():
    """Exact numbers are in float64; the ids have between e-13 and nearly all of the mass."""
    logits = torch.randn(64, 50) * 3
    logits[:, 7] += torch.linspace(-25, 25, 64)
    noise = torch.rand(64, dtype=torch.float64)
    chosen = choose(logits.clone(), torch.eye(64), logits.T.clone(), noise, 1.0, torch.tensor([7]), 0)
    exact = logits.double().log_softmax(-1)
    mass = exact[:, 7].exp()
    assert float(mass.min()) < 1e-11 and float(mass.max()) > 0.999999
    assert torch.allclose(chosen.logp.double(), exact.gather(1, chosen.ids[:, None])[:, 0], rtol=1e-6, atol=1e-5)
    assert torch.allclose(chosen.banned_mass.double(), mass, rtol=1e-4, atol=0)


@contextmanager
def recorded_logits(model):
    """Collect the logits of every pass."""
    logits = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output.clone()))
    try:
        yield logits
    finally:
        handle.remove()


# The end token's logit is raised, or lowered so that no response ends.
@pytest.mark.parametrize(
    ("bonus", "sampling"),
    [
        (0.0, Sampling(1, 0.0, 12)),
        (-100.0, Sampling(2, 1.0, 2 * BLOCK + 7, seed=3)),
        (2.5, Sampling(8, 1.0, BLOCK + 20, seed=2)),
        (4.0, Sampling(16, 1.2, 40, seed=7)),
    ],
    ids=["greedy", "three blocks", "rows dropped beyond a block", "many early ends"],
)
@pytest.mark.parametrize("look_every", [1, 8])
def test_static_buffers_give_the_bits_of_growing_ones(setup, bonus, sampling, look_every):
    """Logits of every pass are bit-equal if rows are dropped at the same tokens; the tokens never depend on that."""
    student, builder, prompts = setup
    model = student.model
    with eager_end(model, builder.eos_id, bonus), recorded_logits(model) as ours:
        groups = engine(builder, look_every=look_every).generate(model, prompts, sampling)
    with eager_end(model, builder.eos_id, bonus), recorded_logits(model) as theirs:
        expected = decode_plainly(engine(builder), model, prompts, sampling, look_every=look_every)
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    sizes = {len(logits) for logits in ours[1:]}
    assert (len(sizes) > 1) == (bonus > 0)
    rollouts = [rollout for group in groups for rollout in group]
    assert [r.token_ids.tolist() for r in rollouts] == [ids for ids, _, _ in expected]
    assert max(len(r.token_ids) for r in rollouts) == sampling.max_new_tokens
    for rollout, (_, _, whole) in zip(rollouts, expected, strict=True):
        assert torch.allclose(rollout.logp, torch.tensor(whole), rtol=0, atol=2e-6)
    with eager_end(model, builder.eos_id, bonus):
        at_once = decode_plainly(engine(builder), model, prompts, sampling)
    assert [ids for ids, _, _ in at_once] == [ids for ids, _, _ in expected]


def test_log_probs_without_banned_ids_are_those_of_the_sampled_distribution(setup):
    """They differ in the last bits, because the chosen logit is summed in another order than the logits."""
    student, builder, prompts = setup
    ours, sampling = engine(builder), Sampling(8, 1.0, 30, seed=2)
    ours.banned_ids = torch.empty(0, dtype=torch.int64)
    with eager_end(student.model, builder.eos_id, bonus=2.5):
        groups = ours.generate(student.model, prompts, sampling)
        expected = decode_plainly(ours, student.model, prompts, sampling)
    for rollout, (ids, restricted, _) in zip([r for g in groups for r in g], expected, strict=True):
        assert rollout.token_ids.tolist() == ids and rollout.banned_mass == 0.0
        assert torch.allclose(rollout.logp, torch.tensor(restricted), rtol=0, atol=1e-6)


def test_samples_follow_the_distribution(setup):
    """Compare the first tokens of many rollouts with the model's own probabilities."""
    student, builder, prompts = setup
    n = 400
    group = engine(builder).generate(student.model, prompts[:1], Sampling(n, 0.8, 1, seed=11))[0]
    rows = pack(prompts[:1], [[torch.tensor([builder.eos_id])]])
    with torch.no_grad(), shared_prefix_enabled(student.model):
        logits = Policy(student.model)(prompts[:1], rows, None, lambda h, w, t: h @ w.T)[0]
    logits[builder.banned_ids] = -torch.inf
    p = (logits / 0.8).softmax(-1)
    counts = torch.bincount(torch.tensor([int(r.token_ids[0]) for r in group]), minlength=len(p))
    assert counts[builder.banned_ids].sum() == 0
    # Pool ids into 10 classes of about equal probability, and apply a chi-square test with 9 degrees of freedom at
    # 0.1%.
    classes = (p.cumsum(0) * 10).clamp_max(9.999).floor().long()
    expected = torch.zeros(10).index_add_(0, classes, p) * n
    got = torch.zeros(10).index_add_(0, classes, counts.float())
    assert float(((got - expected) ** 2 / expected).sum()) < 27.9
    assert math.isclose(float(p.sum()), 1.0, rel_tol=1e-5)


def test_end_token_truncation_and_text(setup):
    student, builder, prompts = setup
    with torch.no_grad():
        weight = student.model.lm_head.weight.clone()
        # An embedding far along the direction of the last hidden state makes the end token certain.
        rows = pack(prompts[:1], [[torch.tensor([builder.eos_id])]])
        with shared_prefix_enabled(student.model):
            hidden = Policy(student.model)(prompts[:1], rows, None, lambda h, w, t: h)[0]
        student.model.lm_head.weight[builder.eos_id] = hidden * 1000
    try:
        (rollout,) = engine(builder).generate(student.model, prompts[:1], Sampling(1, 0.8, 10))[0]
    finally:
        with torch.no_grad():
            student.model.lm_head.weight.copy_(weight)
    assert rollout.token_ids.tolist() == [builder.eos_id]
    assert rollout.text == "" and not rollout.truncated
    (cut,) = engine(builder).generate(student.model, prompts[:1], Sampling(1, 0.0, 3))[0]
    assert cut.truncated == (builder.eos_id not in cut.token_ids.tolist())


# The largest observed difference between two summation orders in fp32 is 1e-6 here.
@pytest.mark.parametrize(
    "sampling",
    [Sampling(1, 0.0, 10), Sampling(1, 1.0, 8, seed=1), Sampling(3, 0.8, 10, seed=3, step=4), Sampling(8, 1.2, 5)],
    ids=["greedy", "n1", "n3", "n8"],
)
def test_equals_recomputing_every_token(setup, mixed_prompts, sampling):
    student, builder, _ = setup
    groups = engine(builder).generate(student.model, mixed_prompts, sampling)
    assert_same(groups, recomputed(student.model, builder, mixed_prompts, sampling), atol=1e-5)


def test_equals_recomputing_every_token_in_fp64(setup, mixed_prompts):
    """Norms and rotary angles of transformers stay in fp32, and so do our log-probs."""
    student, builder, _ = setup
    model = copy.deepcopy(student.model).double()
    for sampling in (Sampling(1, 0.0, 6), Sampling(2, 1.0, 6, seed=5)):
        groups = engine(builder).generate(model, mixed_prompts, sampling)
        assert_same(groups, recomputed(model, builder, mixed_prompts, sampling), atol=1e-6)


@contextmanager
def eager_end(model, eos_id, bonus):
    """Make a model end its responses early: `bonus` is added to the logit of the end token.

    Hidden states get one more element, which is 1, and the head one more column, which is 0 for all other tokens.
    """

    def append(module, inputs, hidden):
        return torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)

    weight = model.lm_head.weight
    column = torch.zeros_like(weight[:, :1])
    column[eos_id] = bonus
    handle = model.model.language_model.norm.register_forward_hook(append)
    model.lm_head.weight = torch.nn.Parameter(torch.cat([weight.detach(), column], 1))
    try:
        yield
    finally:
        handle.remove()
        model.lm_head.weight = weight


@pytest.mark.parametrize("look_every", [1, 8])
def test_ended_rows_leave_the_batch(setup, look_every):
    """Lengths range from 1 to the limit, and the batch shrinks at least by halves."""
    student, builder, prompts = setup
    sampling = Sampling(n=8, temperature=1.0, max_new_tokens=32, seed=2)
    sizes = []
    layer = student.model.model.language_model.layers[0]
    with eager_end(student.model, builder.eos_id, bonus=ENDS_EARLY):
        expected = recomputed(student.model, builder, prompts, sampling)
        watch = layer.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
        try:
            groups = engine(builder, look_every=look_every).generate(student.model, prompts, sampling)
        finally:
            watch.remove()
    assert_same(groups, expected, atol=1e-5)
    lengths = [[len(ids) for ids, _ in rows] for rows in expected]
    assert min(map(min, lengths)) == 1 and max(map(max, lengths)) == sampling.max_new_tokens
    # sizes[0] is the prefill. Step t runs the rows that remained when at most half of the batch was still active.
    batch, wanted, groups_left = 24, [], set()
    for t in range(sampling.max_new_tokens - 1):
        active = [sum(n > t + 1 for n in group) for group in lengths]
        if (t + 1) % look_every == 0 and 2 * sum(active) <= batch:
            batch = sum(active)
            groups_left.add(sum(n > 0 for n in active))
        wanted.append(batch)
    assert sizes == [1, *wanted] and len(set(wanted)) > 2
    assert min(groups_left) < 3
    for group in groups:
        for rollout in group:
            assert rollout.truncated == (int(rollout.token_ids[-1]) != builder.eos_id)


class Reads(TorchDispatchMode):
    """Count the operations that make the host wait for a device: reads of numbers and shapes that depend on values."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("look_every", "waits"), [(1, 16), (8, 2)])
def test_the_host_waits_only_to_look_at_ended_rows(setup, look_every, waits):
    student, builder, prompts = setup
    features, counts = encode_media(student.model, prompts), []
    ours = engine(builder, look_every=look_every)
    with torch.no_grad(), shared_prefix_enabled(student.model), eager_end(student.model, builder.eos_id, bonus=-100.0):
        for tokens in (4, 20):
            with Reads() as reads:
                ours._decode(student.model, prompts, features, Sampling(2, 1.0, tokens))
            counts.append(reads.count)
    assert counts[1] - counts[0] == waits


def test_the_prefix_is_stored_once(setup, monkeypatch):
    """After a run, the caches hold K/V of each prompt once, the own K/V of the rows, and nothing else of that size."""
    student, builder, prompts = setup
    caches = []

    class Recorded(DecodeCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(hf, "DecodeCache", Recorded)
    engine(builder).generate(student.model, prompts, Sampling(n=8, temperature=1.0, max_new_tokens=4, seed=1))
    (cache,) = caches
    config = student.model.config.text_config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    prefix = sum(len(p.input_ids) for p in prompts)
    held = _storages(cache)
    assert sum(s.nbytes() for s in held.values()) == 4 * token * (prefix + 8 * len(prompts) * BLOCK)
    assert cache.used.tolist() == [4] * 24 and cache.slot.tolist() == [3]
    assert {len(buffer) for buffer in cache.keys + cache.values} == {24}
    assert {tuple(k.shape) for k in cache.prefix.keys} == {(prefix, config.num_key_value_heads, config.head_dim)}


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_the_caches_of_a_batch_are_freed_before_the_next_one(setup, monkeypatch, graphs):
    """Reference counts free them: no cycle waits for the collector, and the K/V of two batches never coexist."""
    student, builder, prompts = setup
    caches, alive = [], []

    def recorded(kind):
        def create(*args, **options):
            if kind is PrefixCache:
                alive.append(sum(cache() is not None for cache in caches))
            cache = kind(*args, **options)
            caches.append(weakref.ref(cache))
            return cache

        return create

    monkeypatch.setattr(hf, "PrefixCache", recorded(PrefixCache))
    monkeypatch.setattr(hf, "DecodeCache", recorded(DecodeCache))
    monkeypatch.setattr(hf, "Graphs", lambda device: StandInGraphs())
    ours, sampling = engine(builder, 1), Sampling(4, 1.0, 2 + LEAST_REPLAYS, seed=1)
    ours.cuda_graphs = graphs
    gc.collect()
    gc.disable()
    try:
        ours.generate(student.model, prompts, sampling)
        left = sum(cache() is not None for cache in caches)
    finally:
        gc.enable()
    assert len(caches) == 2 * len(prompts) and alive == [0, 0, 0] and left == 0


def _storages(value, found=None):
    """Return the storages of the floating-point tensors reachable from the attributes of the caches."""
    found = {} if found is None else found
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            found[value.untyped_storage().data_ptr()] = value.untyped_storage()
    elif isinstance(value, (list, tuple)):
        for item in value:
            _storages(item, found)
    elif hasattr(value, "__dict__"):
        _storages(list(vars(value).values()), found)
    return found


def test_a_rollout_does_not_change_the_model(setup):
    student, builder, prompts = setup
    model = student.model
    features, places = encode_media(model, prompts[:1]), media_places(prompts[:1], [0])
    inputs = embed(model, prompts[0].input_ids[None], features, [0], places)

    def state():
        with torch.no_grad():
            positions = prompts[0].position_ids[:, None]
            hidden = model.model.language_model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        names = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
        return hidden, names, model.training, is_shared_prefix(model)

    was_training = model.training
    try:
        for training in (True, False):
            model.train(training)
            before = state()
            engine(builder).generate(model, prompts, SAMPLING)
            after = state()
            assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
            with pytest.raises(KeyError, match="stopped"), _failing(model.lm_head):
                engine(builder).generate(model, prompts, SAMPLING)
            assert state()[1:] == before[1:]
        # A model that was enabled before stays enabled.
        with shared_prefix_enabled(model):
            engine(builder).generate(model, prompts[:1], Sampling(1, 0.0, 2))
            assert is_shared_prefix(model)
    finally:
        model.train(was_training)


@contextmanager
def _failing(module):
    def fail(*_):
        raise KeyError("stopped")

    handle = module.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_a_layer_without_the_op_is_refused(setup):
    """A layer with its own attention would leave its K/V out and read no prompt."""
    student, builder, prompts = setup
    model = copy.deepcopy(student.model)
    attention = model.model.language_model.layers[-1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RuntimeError, match=r"layer"):
        engine(builder).generate(model, prompts, Sampling(2, 0.0, 3))


class HostTensors(TorchDispatchMode):
    """List the operations that read or write a tensor in host memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.names += [str(func)] * any(t.device.type == "cpu" for t in tensors)
        return result


@pytest.mark.parametrize("suffixes", [None, [[4, 2], [1]]], ids=["whole prompts", "shared beginnings"])
def test_a_step_needs_no_values_and_no_host_memory(setup, monkeypatch, suffixes):
    """On tensors without values, any read by the host fails. Only the op of our own reads the plan's lengths."""
    student, _, _ = setup
    config = student.model.config
    with torch.device("meta"):
        model = type(student.model)._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    monkeypatch.setattr(op, "autocast", lambda *tensors: tensors)
    text, edges = config.text_config, torch.empty(3, dtype=torch.int32, device="meta")
    plan = op.DecodePlan((5, 7), (2, 3), torch.tensor([2, 5, 7, 2, 3]), edges, edges)
    suffix_plan = op.DecodePlan((4, 2, 1), (1, 1, 3), torch.tensor([3, 4, 2, 1, 1, 1, 3]), edges, edges)
    monkeypatch.setattr(DecodeCache, "_make_plan", lambda self: plan)
    monkeypatch.setattr(DecodeCache, "_make_suffix_plan", lambda self: suffix_plan if suffixes else None)
    kv, suffix_kv = (
        torch.empty(tokens, text.num_key_value_heads, text.head_dim, dtype=torch.bfloat16, device="meta")
        for tokens in (12, 7)
    )
    prefix = PrefixCache([5, 7], suffixes)
    prefix.keys = prefix.values = [kv] * text.num_hidden_layers
    prefix.suffix_keys = prefix.suffix_values = [suffix_kv] * text.num_hidden_layers
    decoder = decode.Decoder(
        model,
        DecodeCache(prefix, [1, 1, 3] if suffixes else [2, 3]),
        torch.empty(5, dtype=torch.int64, device="meta"),
        torch.empty(5, 8, dtype=torch.float64, device="meta"),
        temperature=0.8,
        banned_ids=torch.empty(2, dtype=torch.int64, device="meta"),
        eos_id=2,
    )
    with torch.no_grad(), shared_prefix_enabled(model), HostTensors() as host:
        decoder._step()
    assert host.names == ["rmsd_kernels.shared_prefix_decode.default"] * text.num_hidden_layers
    with pytest.raises(RuntimeError):
        int(decoder.active.sum())


class StandInGraph:
    """A graph on CPU: a replay runs the step, and requires that its tensors have the addresses of the capture.

    A real graph reads and writes these addresses, whatever the attributes name by then.
    """

    def __init__(self, step):
        self.step, self.replays = step, 0
        self.captured = _addresses(step.__self__)

    def replay(self):
        assert _addresses(self.step.__self__) == self.captured
        self.replays += 1
        self.step()
        # The next replay would not see a tensor that the step replaces.
        assert _addresses(self.step.__self__) == self.captured


def _addresses(decoder):
    """Return the addresses of all tensors in the attributes of a decoder, its caches and the plan."""
    cache = decoder._cache
    holders = {"decoder": decoder, "cache": cache, "prefix": cache.prefix, "plan": cache._plan}
    addresses = {
        (holder, name, number): tensor.data_ptr()
        for holder, value in holders.items()
        for name, attribute in vars(value).items()
        for number, tensor in enumerate(attribute if isinstance(attribute, list) else [attribute])
        if isinstance(tensor, torch.Tensor)
    }
    assert {"tokens", "active", "rows", "_column", "_last_ids", "_positions", "slot", "used", "keys", "lengths"} <= {
        name for _, name, _ in addresses
    }
    return addresses


class StandInGraphs(Graphs):
    """The decisions of Graphs with steps that run on CPU."""

    def __init__(self):
        self._graph, self._steps, self.eager, self.graphs = None, 0, 0, []

    def close(self):
        self._graph, self.closed = None, True

    def _on_side_stream(self, step):
        self.eager += 1
        step()

    def _captured(self, step):
        graph = StandInGraph(step)
        self.graphs.append(graph)
        return graph


@pytest.mark.parametrize("rebinds", ["positions", "active", "used", "keys"])
def test_a_step_that_replaces_a_tensor_fails_with_graphs(setup, monkeypatch, rebinds):
    """Check the check: each of these steps gives the right tokens on CPU, and wrong ones as a graph."""
    student, builder, prompts = setup
    step = decode.Decoder._step

    def replacing(decoder):
        step(decoder)
        cache = decoder._cache
        if rebinds == "positions":
            decoder._positions = decoder._positions + 0
        elif rebinds == "active":
            decoder.active = decoder.active.clone()
        elif rebinds == "used":
            cache.used = cache.used + 0
        else:
            cache.keys[-1] = cache.keys[-1].clone()

    monkeypatch.setattr(decode.Decoder, "_step", replacing)
    sampling = Sampling(2, 1.0, 4 + LEAST_REPLAYS, seed=2)
    with eager_end(student.model, builder.eos_id, bonus=-100.0):
        engine(builder).generate(student.model, prompts, sampling)
        monkeypatch.setattr(hf, "Graphs", lambda device: StandInGraphs())
        ours = engine(builder)
        ours.cuda_graphs = True
        with pytest.raises(AssertionError):
            ours.generate(student.model, prompts, sampling)


def test_each_step_runs_once_with_graphs(setup):
    """One graph per block and row count: the first step of each is eager, and short remainders stay eager."""
    student, builder, prompts = setup
    model, sampling = student.model, Sampling(8, 1.0, 2 * BLOCK + 1 + LEAST_REPLAYS, seed=2)
    ours = engine(builder, look_every=8)
    features = encode_media(model, prompts)
    used = []
    with torch.no_grad(), shared_prefix_enabled(model), eager_end(model, builder.eos_id, bonus=-100.0):
        expected = ours._decode(model, prompts, features, sampling)
        monkeypatch_graphs = pytest.MonkeyPatch()
        monkeypatch_graphs.setattr(hf, "Graphs", lambda device: used.append(StandInGraphs()) or used[-1])
        ours.cuda_graphs = True
        try:
            got = ours._decode(model, prompts, features, sampling)
        finally:
            monkeypatch_graphs.undo()
    assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.logp, expected.logp)
    (graphs,) = used
    assert graphs.closed
    # BLOCK steps, BLOCK steps, and LEAST_REPLAYS steps, of which one is the warm-up, so the rest is too short.
    assert [graph.replays for graph in graphs.graphs] == [BLOCK - 1, BLOCK - 1]
    assert graphs.eager == 2 + LEAST_REPLAYS


def test_dropped_rows_get_a_new_graph(setup, monkeypatch):
    student, builder, prompts = setup
    model, sampling = student.model, Sampling(8, 1.0, BLOCK - 1, seed=2)
    used, ours = [], engine(builder, look_every=8)
    with eager_end(model, builder.eos_id, bonus=2.5), recorded_logits(model) as logits:
        expected = ours.generate(model, prompts, sampling)
    sizes = [len(of_pass) for of_pass in logits[1:]]
    assert len(set(sizes)) > 1
    monkeypatch.setattr(hf, "Graphs", lambda device: used.append(StandInGraphs()) or used[-1])
    ours.cuda_graphs = True
    with eager_end(model, builder.eos_id, bonus=2.5):
        groups = ours.generate(model, prompts, sampling)
    for a, b in zip([r for g in groups for r in g], [r for g in expected for r in g], strict=True):
        assert torch.equal(a.token_ids, b.token_ids) and torch.equal(a.logp, b.logp)
    wanted = [sizes.count(size) - 1 for size in dict.fromkeys(sizes)]
    assert [graph.replays for graph in used[0].graphs] == [count for count in wanted if count >= LEAST_REPLAYS]


def test_a_step_that_cannot_be_captured_is_named(monkeypatch):
    class Capture:
        def __init__(self, *args, **options):
            assert options["capture_error_mode"] == "thread_local" and options["pool"] == "pool"

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(decode, "side_stream", lambda device: "stream")
    monkeypatch.setattr(Graphs, "_on_side_stream", lambda self, step: step())

    def fails():
        if failures:
            raise failures.pop()

    graphs, failures = Graphs(torch.device("cuda")), []
    graphs.run(fails, True, BLOCK)
    failures = [RuntimeError("operation not permitted when stream is capturing\nmore")]
    with pytest.raises(SettingsError, match="rollout.cuda_graphs: .* got operation not permitted .* capturing; set"):
        graphs.run(fails, False, BLOCK - 1)
    graphs.run(fails, True, BLOCK)
    failures = [torch.OutOfMemoryError("out of memory")]
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(fails, False, BLOCK - 1)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bonus", [-100.0, 2.5], ids=["two blocks", "rows dropped"])
def test_cuda_graphs_equal_eager_decoding(setup, mixed_prompts, dtype, bonus):
    """The same kernels run on the same inputs, so tokens and log-probs have the same bits."""
    student, builder, _ = setup
    model, sampling = copy.deepcopy(student.model).to("cuda", dtype), Sampling(8, 1.0, BLOCK + 30, seed=2)
    with eager_end(model, builder.eos_id, bonus):
        eager = engine(builder, device="cuda", cuda_graphs=False).generate(model, mixed_prompts, sampling)
        for _ in range(2):
            groups = engine(builder, device="cuda").generate(model, mixed_prompts, sampling)
            for a, b in zip([r for g in groups for r in g], [r for g in eager for r in g], strict=True):
                assert torch.equal(a.token_ids, b.token_ids) and torch.equal(a.logp, b.logp)


@pytest.mark.cuda
def test_cuda_graphs_replay_nearly_every_step(setup, mixed_prompts, monkeypatch):
    student, builder, _ = setup
    model, replays = copy.deepcopy(student.model).to("cuda", torch.bfloat16), []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(id(graph)) or replay(graph))
    with eager_end(model, builder.eos_id, bonus=-100.0):
        engine(builder, device="cuda").generate(model, mixed_prompts, Sampling(4, 1.0, 2 * BLOCK + 1))
    assert len(replays) == 2 * (BLOCK - 1)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_the_training_forward(setup, mixed_prompts, dtype):
    student, builder, _ = setup
    model = copy.deepcopy(student.model).to("cuda", dtype)
    with eager_end(model, builder.eos_id, bonus=ENDS_EARLY):
        groups = engine(builder, device="cuda").generate(model, mixed_prompts, Sampling(8, 1.0, 24, seed=2))
        rows = pack(mixed_prompts, [[r.token_ids for r in group] for group in groups]).to("cuda")
        with torch.no_grad(), shared_prefix_enabled(model):
            logp = Policy(model)(mixed_prompts, rows, None, linear_logprob).cpu()
    sampled = torch.cat([r.logp for group in groups for r in group])
    assert torch.allclose(logp, sampled, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
