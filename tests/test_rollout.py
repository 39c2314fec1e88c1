"""Rollouts of the hf engine against transformers' own generation and against the training forward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from material import tiny_material

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.losses import linear_logprob
from rmsd_fast.models.policy import Policy
from rmsd_fast.models.students import encode_media, load_student, make_rows
from rmsd_fast.rollout.base import Sampling, sampling_noise
from rmsd_fast.rollout.hf import HfRollout


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    material = tiny_material(tmp_path_factory.mktemp("rollout"))
    student = load_student(material.model_path, dtype="float32")
    builder = PromptBuilder(student, VideoConfig(num_frames=8))
    # Prompts of different lengths, so that padding is met.
    prompts = sorted((builder.build(q) for q in material.train[:12]), key=lambda p: len(p.input_ids))
    assert len(prompts[0].input_ids) < len(prompts[-1].input_ids)
    return student, builder, [prompts[0], prompts[5], prompts[-1]]


def engine(builder, prompts_per_batch=8):
    return HfRollout(builder, prompts_per_batch=prompts_per_batch, device=torch.device("cpu"))


SAMPLING = Sampling(n=3, temperature=0.8, max_new_tokens=10, seed=3, step=4)


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
    # Chi-square with 19 degrees of freedom: 43.8 is passed once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 43.8
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.03


def test_greedy_equals_transformers_generate(setup):
    student, builder, prompts = setup
    (ours,) = zip(*engine(builder).generate(student.model, prompts, Sampling(1, 0.0, 8)), strict=True)
    banned = [[int(i)] for i in builder.banned_ids]
    for prompt, rollout in zip(prompts, ours, strict=True):
        from rmsd_fast.data.video import video_patches

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


def test_log_probs_are_those_of_the_training_forward(setup):
    student, builder, prompts = setup
    groups = engine(builder).generate(student.model, prompts, SAMPLING)
    responses = [r.token_ids for g in groups for r in g]
    rows = make_rows(prompts, responses, [i for i, g in enumerate(groups) for _ in g], pad_id=builder.eos_id)
    with torch.no_grad():
        logp = Policy(student.model)(prompts, rows, None, _banned_logprob(builder, SAMPLING.temperature))
    sampled = torch.cat([r.logp for g in groups for r in g])
    assert torch.allclose(logp, sampled, atol=2e-5)


def _banned_logprob(builder, temperature):
    """Log-probs over the ids that generation may choose."""

    def head(hidden, weight, targets):
        bias = torch.zeros(len(weight))
        bias[builder.banned_ids] = -1e9
        return linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature)

    return head


def test_samples_follow_the_distribution(setup):
    """The first token of many rollouts, against the model's own probabilities."""
    student, builder, prompts = setup
    n = 400
    group = engine(builder).generate(student.model, prompts[:1], Sampling(n, 0.8, 1, seed=11))[0]
    rows = make_rows(prompts[:1], [torch.tensor([builder.eos_id])], [0], pad_id=builder.eos_id)
    with torch.no_grad():
        logits = Policy(student.model)(prompts[:1], rows, None, lambda h, w, t: h @ w.T)[0]
    logits[builder.banned_ids] = -torch.inf
    p = (logits / 0.8).softmax(-1)
    counts = torch.bincount(torch.tensor([int(r.token_ids[0]) for r in group]), minlength=len(p))
    assert counts[builder.banned_ids].sum() == 0
    # Pool ids into 10 classes of about equal probability, then chi-square with 9 degrees of freedom at 0.1%.
    classes = (p.cumsum(0) * 10).clamp_max(9.999).floor().long()
    expected = torch.zeros(10).index_add_(0, classes, p) * n
    got = torch.zeros(10).index_add_(0, classes, counts.float())
    assert float(((got - expected) ** 2 / expected).sum()) < 27.9
    assert math.isclose(float(p.sum()), 1.0, rel_tol=1e-5)


def test_end_token_truncation_and_text(setup):
    student, builder, prompts = setup
    with torch.no_grad():
        weight = student.model.lm_head.weight.clone()
        # An embedding that is far along the last hidden state's direction makes the end token certain.
        rows = make_rows(prompts[:1], [torch.tensor([builder.eos_id])], [0], pad_id=builder.eos_id)
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
