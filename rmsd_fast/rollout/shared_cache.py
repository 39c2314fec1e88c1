"""K/V of a batch of rollouts: those of each prompt once, whatever N, and those of each response's own tokens.

Both caches travel to the attention layers as `shared_prefix=` and are given each layer's q, k and v by `attend`.
"""

from __future__ import annotations

import torch

from rmsd_kernels.shared_prefix.attention import SharedPrefixPlan, shared_prefix_attention
from rmsd_kernels.shared_prefix.decode import DecodePlan, shared_prefix_decode

# Tokens by which the buffers of the responses' own K/V grow. Each growth copies one buffer: over 1,024 tokens that is
# 1.5% of what attention reads of it; most responses end long before the most they may have.
BLOCK = 64


class PrefixCache:
    """Prefill of packed prompts `[P_1 | P_2 | … | P_G]`, Tp tokens; afterwards their K/V.

    Args:
        prefix_lengths: tokens of each prompt.
        device: of the plan.
    Attributes:
        prefix_lengths: the same, a tuple.
        keys, values: one tensor [Tp, Hkv, d] per layer, in the model's dtype.
    """

    def __init__(self, prefix_lengths: list[int], *, device: torch.device | str = "cpu"):
        self.prefix_lengths = tuple(prefix_lengths)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._plan = SharedPrefixPlan.from_lengths(prefix_lengths, [[] for _ in prefix_lengths], device=device)

    def attend(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attention of the prompts to themselves; keeps K and V.

        Args:
            layer_idx: 0, 1, 2, … in turn.
            q: [1, H, Tp, d].
            k, v: [1, Hkv, Tp, d].
            scale: of the logits; None: 1 / sqrt(d).
        Returns:
            [1, Tp, H, d].
        Raises:
            RuntimeError: layers that do not come in turn.
        """
        if layer_idx != len(self.keys):
            raise RuntimeError(
                f"prefill: expected attention of layer {len(self.keys)} next, got layer {layer_idx}; "
                "a cache serves one forward pass in which each layer runs once, make a new one for another"
            )
        # Token-major, as the projections left them: no copy where each projection has a weight of its own.
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v))
        self.keys.append(k)
        self.values.append(v)
        return shared_prefix_attention(q, k, v, self._plan, scale=scale)[None]


class DecodeCache:
    """K/V while B rows are decoded, one token each per forward pass, on prompts that are kept once.

    Args:
        prefix: the prefilled prompts; shared, neither copied nor changed.
        rows: responses of each prompt; B is their sum, the rows are group-major.
    Attributes:
        prefix: the same.
        keys, values: one `OwnTokens` per layer.
    """

    def __init__(self, prefix: PrefixCache, rows: list[int]):
        self.prefix = prefix
        self.keys = [OwnTokens() for _ in prefix.keys]
        self.values = [OwnTokens() for _ in prefix.values]
        self._owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
        self._plan = self._make_plan()

    def attend(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attention of one new token per row to its prompt, the row's earlier tokens and itself; keeps K and V.

        Args:
            layer_idx: the layer.
            q: [B, H, 1, d].
            k, v: [B, Hkv, 1, d].
            scale: of the logits; None: 1 / sqrt(d).
        Returns:
            [B, 1, H, d].
        """
        own_k, own_v = self.keys[layer_idx].append(k), self.values[layer_idx].append(v)
        prefix_k, prefix_v = self.prefix.keys[layer_idx], self.prefix.values[layer_idx]
        out = shared_prefix_decode(q[:, :, 0], prefix_k, prefix_v, own_k, own_v, self._plan, scale=scale)
        return out[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with some of the rows, in ascending order: int64 [A] on the device of the K/V. Synchronises.

        The prompt of a group without rows stays in memory and is read no more.
        """
        self._owner = self._owner[rows.cpu()]
        self._plan = self._make_plan()
        for tokens in (*self.keys, *self.values):
            tokens.keep(rows)

    def _make_plan(self) -> DecodePlan:
        lengths = self.prefix.prefix_lengths
        counts = torch.bincount(self._owner, minlength=len(lengths)).tolist()
        return DecodePlan.from_counts(lengths, counts, device=self.prefix.keys[0].device)


class OwnTokens:
    """K or V of the rows' own tokens in one layer, in a buffer with room for more."""

    def __init__(self):
        self.length = 0
        self.buffer: torch.Tensor | None = None

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Write one token per row [B, Hkv, 1, d]; returns a view of all so far, [B, Hkv, t, d]."""
        if self.buffer is None or self.length == self.buffer.shape[2]:
            rows, heads, _, size = new.shape
            larger = new.new_empty(rows, heads, self.length + BLOCK, size)
            if self.buffer is not None:
                larger[:, :, : self.length] = self.buffer
            self.buffer = larger
        self.buffer[:, :, self.length] = new[:, :, 0]
        self.length += 1
        return self.buffer[:, :, : self.length]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with some of the rows, int64 [A]."""
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(0, rows)
