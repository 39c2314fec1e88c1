"""Find the most probable tokens of each row, and log-probs of chosen tokens, from hidden states, without gradients.

    logp[t, v] = z[v] - log sum_u exp z_u,  z = hidden[t] @ weight.T / temperature[t]

Work: 2TDV. Logits exist for one chunk of tokens at a time, and float32 copies of them for a few rows. With a 16-bit
head, logits of the returned tokens are dot products in float32, like the target's logit in `linear_logprob`. Rounded
logits of neighboring ranks are often equal, so the k tokens are chosen by these dot products among 2k + 8 candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..ops import accumulation_dtype
from .arguments import execution_of, per_row_temperature
from .chunks import Loop

# Bytes of the temporaries of a block of rows.
TEMPORARY_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
# Of a logit and of what is computed from it, each in float32 or an index.
_BYTES_PER_LOGIT = 16


class TopK(NamedTuple):
    """Most probable tokens of T rows, with falling log-probs, and log-probs of given tokens.

    Attributes:
        logp: log-probs of the k tokens, [T, k].
        ids: these tokens, int64 [T, k].
        at_ids: log-probs of the given ids, [T, j]; None without ids.
    """

    logp: Tensor
    ids: Tensor
    at_ids: Tensor | None


@torch.no_grad()
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    memory_budget_bytes: int | None = None,
) -> TopK:
    """Compute the k most probable tokens of each row with their log-probs, and log-probs of given tokens.

    Args:
        hidden: hidden states, [T, D], floating.
        weight: the head, [V, D], dtype of hidden.
        k: number of tokens, 0 to V.
        ids: further tokens, int64 [T, j].
        temperature: divides the logits; above 0, one number or one per row, [T].
        memory_budget_bytes: see rmsd_fast.losses.
    Returns:
        TopK in float32 (float64 for float64 inputs), without a gradient.
    Raises:
        ValueError: shapes, devices or values do not match. Ids out of range raise for CPU tensors; on other devices
            they are clamped to 0..V-1.
        TypeError: a dtype does not match.
    """
    checks.check_head(hidden, weight)
    checks.check_temperature(temperature, hidden)
    if not 0 <= k <= len(weight):
        raise ValueError(f"k: expected 0 to V={len(weight)}, got {k}")
    if ids is not None:
        if ids.dtype != torch.int64 or ids.ndim != 2 or len(ids) != len(hidden):
            raise ValueError(f"ids: expected int64 [{len(hidden)}, j], got {ids.dtype} {list(ids.shape)}")
        checks.check_index("ids", ids.flatten(), None, len(weight), hidden)
        ids = ids.clamp(0, len(weight) - 1)
    temperature = per_row_temperature(temperature, hidden)
    candidates = k if hidden.element_size() > 2 else min(len(weight), 2 * k + 8)
    parts = []
    with Loop(hidden, weight, None, execution_of("torch", memory_budget_bytes), buffers=1) as loop:
        workspace = loop.workspace()
        rows_at_once = _rows_at_once(hidden, weight, candidates + (0 if ids is None else ids.shape[1]))
        for _, index in loop:
            rows = hidden[index]
            logits = torch.mm(rows, weight.t(), out=workspace[: len(rows)])
            for start in range(0, len(rows), rows_at_once):
                block = slice(start, start + rows_at_once)
                of_block = (None if t is None else t[index][block] for t in (ids, temperature))
                parts.append(_topk(logits[block], rows[block], weight, k, candidates, *of_block))
    if not parts:
        dtype, none = accumulation_dtype(hidden), (0, k)
        empty = None if ids is None else hidden.new_empty(ids.shape, dtype=dtype)
        return TopK(hidden.new_empty(none, dtype=dtype), hidden.new_empty(none, dtype=torch.int64), empty)
    return TopK(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


def _topk(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    k: int,
    candidates: int,
    ids: Tensor | None,
    temperature: Tensor | None,
) -> TopK:
    """Return the result for a block of rows with these logits [n, V], which are only read."""
    dtype = accumulation_dtype(hidden)
    z = logits.to(dtype, copy=True)
    top = z.topk(candidates, dim=-1).indices
    chosen = top if ids is None else torch.cat([top, ids], dim=1)
    if hidden.element_size() == 2:
        exact = torch.einsum("nd,njd->nj", hidden.to(dtype), weight[chosen].to(dtype))
        z.scatter_(1, chosen, exact)
    if temperature is not None:
        z /= temperature.unsqueeze(1)
    logp = z.gather(1, chosen) - z.logsumexp(dim=-1, keepdim=True)
    best, order = logp[:, :candidates].topk(k, dim=-1)
    return TopK(best, top.gather(1, order), None if ids is None else logp[:, candidates:])


def _rows_at_once(hidden: Tensor, weight: Tensor, chosen: int) -> int:
    """Return how many rows fit into TEMPORARY_BYTES, with rows of the head for the chosen tokens of a 16-bit head."""
    row_bytes = _BYTES_PER_LOGIT * len(weight)
    if hidden.element_size() == 2:
        row_bytes += 2 * 4 * chosen * weight.shape[1]
    return max(1, TEMPORARY_BYTES.get(hidden.device.type, TEMPORARY_BYTES["cpu"]) // row_bytes)
