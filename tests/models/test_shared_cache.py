"""Test the caches of a rollout in fp64 against attention over the whole sequence of each row."""

from __future__ import annotations

import math

import pytest
import torch

from rmsd_fast.rollout.shared_cache import BLOCK, DecodeCache, PrefixCache

LAYERS, HEADS, KV_HEADS, SIZE = 2, 4, 2, 8
LENGTHS = (5, 1, 9)


def tensors(batch, tokens):
    draw = torch.randn(batch, HEADS + 2 * KV_HEADS, tokens, SIZE, dtype=torch.float64)
    return draw.split([HEADS, KV_HEADS, KV_HEADS], 1)


def dense(q, k, v, *, causal=False):
    """Return [H, tq, d] of one row by the formula."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v


def prefilled():
    cache, seen = PrefixCache(list(LENGTHS)), []
    for layer in range(LAYERS):
        q, k, v = tensors(1, sum(LENGTHS))
        out = cache.attend(layer, q, k, v, None)
        assert out.shape == (1, sum(LENGTHS), HEADS, SIZE)
        cuts = [x[0].split(LENGTHS, 1) for x in (q, k, v)]
        wanted = torch.cat([dense(*part, causal=True) for part in zip(*cuts, strict=True)], 1)
        assert torch.allclose(out[0].transpose(0, 1), wanted, rtol=0, atol=1e-12)
        seen.append(list(zip(cuts[1], cuts[2], strict=True)))
    return cache, seen


@pytest.mark.parametrize("tokens_first", [True, False])
def test_decoding_beyond_a_block_while_rows_end(tokens_first):
    prefix, seen = prefilled()
    cache = DecodeCache(prefix, [2, 3, 1], tokens_first=tokens_first)
    owner = [0, 0, 1, 1, 1, 2]
    own = [[[] for _ in owner] for _ in range(LAYERS)]
    for t in range(BLOCK + 6):
        # All rows of the middle group and one row of the first group end; all but one row end after the first growth.
        leave = {3: [1, 5], BLOCK + 2: [1]}.get(t)
        if leave:
            cache.keep(torch.tensor(leave))
            owner = [owner[row] for row in leave]
            own = [[rows[row] for row in leave] for rows in own]
        assert cache.make_room(t + 1) == (t == BLOCK)
        for layer in range(LAYERS):
            q, k, v = tensors(len(owner), 1)
            out = cache.attend(layer, q, k, v, None)
            assert out.shape == (len(owner), 1, HEADS, SIZE)
            for row, group in enumerate(owner):
                own[layer][row].append((k[row], v[row]))
                parts = [seen[layer][group], *own[layer][row]]
                keys, values = (torch.cat(x, 1) for x in zip(*parts, strict=True))
                wanted = dense(q[row], keys, values)
                assert torch.allclose(out[row].transpose(0, 1), wanted, rtol=0, atol=1e-12)
        cache.advance()
    assert {tuple(buffer.shape) for buffer in cache.keys + cache.values} == {
        (1, 2 * BLOCK, KV_HEADS, SIZE) if tokens_first else (1, KV_HEADS, 2 * BLOCK, SIZE)
    }


def test_a_token_beyond_the_buffers_is_refused():
    prefix, _ = prefilled()
    cache = DecodeCache(prefix, [1, 0, 0])
    for _ in range(BLOCK):
        for layer in range(LAYERS):
            cache.attend(layer, *tensors(1, 1), None)
        cache.advance()
    with pytest.raises(IndexError):
        cache.attend(0, *tensors(1, 1), None)


def test_scale_is_forwarded():
    q, k, v = tensors(1, sum(LENGTHS))
    scaled, plain = PrefixCache(list(LENGTHS)), PrefixCache(list(LENGTHS))
    assert torch.allclose(scaled.attend(0, q, k, v, 0.5), plain.attend(0, q * 0.5 * SIZE**0.5, k, v, None))
    q, k, v = tensors(3, 1)
    out = DecodeCache(scaled, [1, 1, 1]).attend(0, q, k, v, 0.5)
    assert torch.allclose(out, DecodeCache(plain, [1, 1, 1]).attend(0, q * 0.5 * SIZE**0.5, k, v, None))


def test_a_prefill_cache_is_used_for_one_pass():
    cache, _ = prefilled()
    q, k, v = tensors(1, sum(LENGTHS))
    with pytest.raises(RuntimeError, match="expected attention of layer 2 next, got layer 0"):
        cache.attend(0, q, k, v, None)
    with pytest.raises(RuntimeError, match="expected attention of layer 0 next, got layer 1"):
        PrefixCache(list(LENGTHS)).attend(1, q, k, v, None)


def test_strided_projections_keep_no_more_than_they_need():
    """K and V sliced from a fused projection are copied, so that its q is not kept alive."""
    fused = torch.randn(1, sum(LENGTHS), (HEADS + 2 * KV_HEADS) * SIZE, dtype=torch.float64)
    q, k, v = (
        x.unflatten(-1, (-1, SIZE)).transpose(1, 2)
        for x in fused.split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], -1)
    )
    cache = PrefixCache(list(LENGTHS))
    cache.attend(0, q, k, v, None)
    for kept in cache.keys + cache.values:
        assert kept.untyped_storage().nbytes() == 8 * sum(LENGTHS) * KV_HEADS * SIZE
