"""Test rollouts of the hf engine against transformers' own generation and full recomputation, and test the caches."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from material import tiny_material
from media_files import write_images
from torch.utils._python_dispatch import TorchDispatchMode

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.packing import media_places, pack
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.losses import linear_logprob
from rmsd_fast.models.policy import Policy
from rmsd_fast.models.shared_prefix import is_shared_prefix, shared_prefix_enabled
from rmsd_fast.models.students import embed, encode_media, load_student
from rmsd_fast.rollout import hf
from rmsd_fast.rollout.base import Sampling, sampling_noise
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.rollout.shared_cache import BLOCK, DecodeCache


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


def engine(builder, prompts_per_batch=8, device="cpu"):
    return HfRollout(builder, prompts_per_batch=prompts_per_batch, device=torch.device(device))


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
        logits[builder.banned_ids] = -torch.inf
        logp = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
        if sampling.temperature:
            cdf = logp.exp().cumsum(-1)
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


def test_log_probs_equal_those_of_the_training_forward(setup):
    student, builder, prompts = setup
    groups = engine(builder).generate(student.model, prompts, SAMPLING)
    rows = pack(prompts, [[r.token_ids for r in group] for group in groups])
    with torch.no_grad(), shared_prefix_enabled(student.model):
        logp = Policy(student.model)(prompts, rows, None, _banned_logprob(builder, SAMPLING.temperature))
    sampled = torch.cat([r.logp for g in groups for r in g])
    assert torch.allclose(logp, sampled, atol=2e-5)


def _banned_logprob(builder, temperature):
    """Return log-probs over the ids that generation may choose."""

    def head(hidden, weight, targets):
        bias = torch.zeros(len(weight))
        bias[builder.banned_ids] = -1e9
        return linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature)

    return head


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
    """Return a model that ends its responses early: `bonus` is added to the logit of the end token."""

    def add(module, inputs, logits):
        logits = logits.clone()
        logits[..., eos_id] += bonus
        return logits

    handle = model.lm_head.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def test_ended_rows_leave_the_batch(setup):
    """Lengths range from 1 to the limit, and the batch shrinks at least by halves."""
    student, builder, prompts = setup
    sampling = Sampling(n=8, temperature=1.0, max_new_tokens=32, seed=2)
    sizes = []
    layer = student.model.model.language_model.layers[0]
    with eager_end(student.model, builder.eos_id, bonus=ENDS_EARLY):
        expected = recomputed(student.model, builder, prompts, sampling)
        watch = layer.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
        try:
            groups = engine(builder).generate(student.model, prompts, sampling)
        finally:
            watch.remove()
    assert_same(groups, expected, atol=1e-5)
    lengths = [[len(ids) for ids, _ in rows] for rows in expected]
    assert min(map(min, lengths)) == 1 and max(map(max, lengths)) == sampling.max_new_tokens
    # sizes[0] is the prefill. Step t runs the rows that remained when at most half of the batch was still active.
    batch, wanted, groups_left = 24, [], set()
    for t in range(sampling.max_new_tokens - 1):
        active = [sum(n > t + 1 for n in group) for group in lengths]
        if 2 * sum(active) <= batch:
            batch = sum(active)
            groups_left.add(sum(n > 0 for n in active))
        wanted.append(batch)
    assert sizes == [1, *wanted] and len(set(wanted)) > 3
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


def test_the_host_waits_once_per_token(setup):
    student, builder, prompts = setup
    features, counts = encode_media(student.model, prompts), []
    with torch.no_grad(), shared_prefix_enabled(student.model), eager_end(student.model, builder.eos_id, bonus=-100.0):
        for tokens in (4, 10):
            with Reads() as reads:
                engine(builder)._decode(student.model, prompts, features, Sampling(2, 1.0, tokens))
            counts.append(reads.count)
    assert counts[1] - counts[0] == 6


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
    own = cache.keys + cache.values
    assert {tokens.length for tokens in own} == {3}
    assert {tuple(k.shape) for k in cache.prefix.keys} == {(prefix, config.num_key_value_heads, config.head_dim)}


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


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_the_training_forward(setup, mixed_prompts, dtype):
    student, builder, _ = setup
    model = copy.deepcopy(student.model).to("cuda", dtype)
    with eager_end(model, builder.eos_id, bonus=ENDS_EARLY):
        groups = engine(builder, device="cuda").generate(model, mixed_prompts, Sampling(8, 1.0, 24, seed=2))
    rows = pack(mixed_prompts, [[r.token_ids for r in group] for group in groups]).to("cuda")

    def head(hidden, weight, targets):
        logits = (hidden @ weight.T).float()
        logits[:, builder.eos_id] += ENDS_EARLY
        logits[:, builder.banned_ids] = -torch.inf
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    with torch.no_grad(), shared_prefix_enabled(model):
        logp = Policy(model)(mixed_prompts, rows, None, head).cpu()
    sampled = torch.cat([r.logp for group in groups for r in group])
    assert torch.allclose(logp, sampled, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
