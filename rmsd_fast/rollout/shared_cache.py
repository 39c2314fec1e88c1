"""K/V caches of a batch of rollouts: one copy per prompt, regardless of N, and one per response for its own tokens.

The beginning that several prompts have in common, such as a video with several questions, is also stored once.

Both caches are passed to the attention layers as `shared_prefix=`, and each layer calls `attend` with its q, k and v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rmsd_kernels.shared_prefix.attention import SharedPrefixPlan, shared_prefix_attention
from rmsd_kernels.shared_prefix.decode import DecodePlan, shared_prefix_decode

# Number of tokens by which the buffers of the responses' own K/V grow. Each growth copies a buffer; over 1,024 tokens,
# the copies amount to 1.5% of the bytes that attention reads from it. Buffers grow because most responses end long
# before their maximum length.
BLOCK = 64


class PrefixCache:
    """Collect the K/V of packed prompts `[P_1 | P_2 | … | P_G]` with Tp tokens during prefill.

    With suffixes, the row is `[P_1 | … | P_G | S_11 S_12 … | S_21 …]`, and each suffix completes a prefix to a prompt.

    Args:
        prefix_lengths: number of tokens of each prompt or, with suffixes, of each shared beginning.
        suffix_lengths: number of tokens of each suffix, a list per prefix with at least one suffix each; None means
            that the prefixes are whole prompts.
        device: device of the plan.
    Attributes:
        prefix_lengths: as given, a tuple.
        suffix_lengths: the lengths of all suffixes, a tuple; empty without suffixes.
        suffix_groups: the lengths of the suffixes of each prefix, as given.
        suffix_owner: index of the prefix of each suffix.
        keys: one tensor [Tp, Hkv, d] of the prefixes per layer, in the model's dtype.
        values: one tensor [Tp, Hkv, d] of the prefixes per layer, in the model's dtype.
        suffix_keys: one tensor [Ts, Hkv, d] of the suffixes per layer; empty without suffixes.
        suffix_values: one tensor [Ts, Hkv, d] of the suffixes per layer; empty without suffixes.
    """

    def __init__(
        self,
        prefix_lengths: list[int],
        suffix_lengths: list[list[int]] | None = None,
        *,
        device: torch.device | str = "cpu",
    ):
        suffixes = suffix_lengths if suffix_lengths is not None else [[] for _ in prefix_lengths]
        self.prefix_lengths = tuple(prefix_lengths)
        self.suffix_lengths = tuple(length for group in suffixes for length in group)
        self.suffix_owner = [index for index, group in enumerate(suffixes) for _ in group]
        self.suffix_groups = suffix_lengths
        if suffix_lengths is not None and not all(suffixes):
            raise ValueError(f"suffix_lengths: expected at least one suffix per prefix, got {suffix_lengths}")
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.suffix_keys: list[torch.Tensor] = []
        self.suffix_values: list[torch.Tensor] = []
        self._plan = SharedPrefixPlan.from_lengths(prefix_lengths, suffixes, device=device)

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.suffix_lengths or self.prefix_lengths)

    def attend(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Compute the attention of the prompts to themselves, and store K and V.

        Args:
            layer_idx: index of the layer. Layers must be called in the order 0, 1, 2, …
            q: queries, [1, H, Tp, d].
            k: keys, [1, Hkv, Tp, d].
            v: values, [1, Hkv, Tp, d].
            scale: scale of the scores; None means 1 / sqrt(d).
        Returns:
            The attention output, [1, Tp, H, d].
        Raises:
            RuntimeError: a layer is called out of order.
        """
        if layer_idx != len(self.keys):
            raise RuntimeError(
                f"prefill: expected attention of layer {len(self.keys)} next, got layer {layer_idx}; "
                "create a new cache for each forward pass, in which each layer runs once"
            )
        # The projections return token-major tensors, so this copies nothing if each projection has its own weight.
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v))
        end = self._plan.prefix_tokens
        self.keys.append(k[:end])
        self.values.append(v[:end])
        if self.suffix_lengths:
            self.suffix_keys.append(k[end:])
            self.suffix_values.append(v[end:])
        return shared_prefix_attention(q, k, v, self._plan, scale=scale)[None]


def join_caches(caches: Sequence[PrefixCache]) -> PrefixCache:
    """Return one cache of the prompts of several, either all with suffixes or all without.

    The tensors of the given caches are moved to it, layer by layer, so that few of them exist twice at a time.
    """
    if len(caches) == 1:
        return caches[0]
    groups = [group for cache in caches for group in cache.suffix_groups or ()]
    lengths = [length for cache in caches for length in cache.prefix_lengths]
    joined = PrefixCache(lengths, groups or None, device=caches[0].keys[0].device)
    for _ in range(len(caches[0].keys)):
        # Prefixes and suffixes are views of one row, which is freed after both were copied.
        for name in ("keys", "suffix_keys", "values", "suffix_values"):
            if groups or not name.startswith("suffix"):
                getattr(joined, name).append(torch.cat([getattr(cache, name).pop(0) for cache in caches]))
    return joined


class DecodeCache:
    """Hold the K/V of B rows that are decoded one token per forward pass, on prompts that are stored once.

    The K/V of the rows' own tokens are in buffers with room for a multiple of BLOCK tokens. A pass writes to the place
    in `slot` and reads as many tokens as `used` says. Both are on the device, so that a CUDA graph of the pass can be
    replayed for every token of a block. Call `make_room` before each pass, and `advance` after it.

    Args:
        prefix: cache of the prefilled prompts, which is neither copied nor changed.
        rows: number of responses of each prompt, in the order of the suffixes if there are any. B is their sum, and
            rows are group-major.
        tokens_first: whether buffers are [B, room, Hkv, d], which CUDA's flash kernels need, or [B, Hkv, room, d], in
            which a head's tokens are adjacent: a CPU reads these faster. None means the order for the device.
    Attributes:
        prefix: cache of the prefilled prompts.
        keys: one buffer per layer, in the model's dtype.
        values: one buffer per layer, in the model's dtype.
        slot: place of the next token in the buffers, int64 [1] on the device.
        used: number of tokens of each row including the next one, int32 [B] on the device.
    """

    def __init__(self, prefix: PrefixCache, rows: list[int], *, tokens_first: bool | None = None):
        self.prefix = prefix
        first = prefix.keys[0]
        self._tokens_first = first.device.type != "cpu" if tokens_first is None else tokens_first
        self._token_axis = 1 if self._tokens_first else 2
        if len(rows) != prefix.prompts:
            raise ValueError(f"rows: expected one number per prompt, {prefix.prompts}, got {len(rows)}")
        self._owner = torch.tensor([group for group, count in enumerate(rows) for _ in range(count)])
        self._plan, self._suffix_plan = self._make_plan(), self._make_suffix_plan()
        # Unused places must be finite: kernels multiply their values by a probability of 0.
        heads, size = first.shape[1:]
        shape = (len(self._owner), *((BLOCK, heads) if self._tokens_first else (heads, BLOCK)), size)
        self.keys = [first.new_zeros(shape) for _ in prefix.keys]
        self.values = [first.new_zeros(shape) for _ in prefix.values]
        self.slot = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.used = torch.ones(len(self._owner), dtype=torch.int32, device=first.device)

    @property
    def room(self) -> int:
        """Number of own tokens per row that the buffers can hold."""
        return self.keys[0].shape[self._token_axis]

    def attend(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Compute the attention of one new token per row to its prompt, earlier tokens and itself, and store K and V.

        Args:
            layer_idx: index of the layer.
            q: queries, [B, H, 1, d].
            k: keys, [B, Hkv, 1, d].
            v: values, [B, Hkv, 1, d].
            scale: scale of the scores; None means 1 / sqrt(d).
        Returns:
            The attention output, [B, 1, H, d].
        """
        own_k, own_v = self._by_head(self.keys[layer_idx]), self._by_head(self.values[layer_idx])
        own_k.index_copy_(2, self.slot, k)
        own_v.index_copy_(2, self.slot, v)
        out = shared_prefix_decode(
            q[:, :, 0],
            self.prefix.keys[layer_idx],
            self.prefix.values[layer_idx],
            own_k,
            own_v,
            self._plan,
            own_lengths=self.used,
            suffix_k=self.prefix.suffix_keys[layer_idx] if self._suffix_plan is not None else None,
            suffix_v=self.prefix.suffix_values[layer_idx] if self._suffix_plan is not None else None,
            suffix_plan=self._suffix_plan,
            scale=scale,
        )
        return out[:, None]

    def advance(self) -> None:
        """Move to the next token, on the device."""
        self.slot += 1
        self.used += 1

    def make_room(self, tokens: int) -> bool:
        """Grow the buffers by BLOCK if they cannot hold so many tokens per row. Return whether they were replaced."""
        room = self.room
        if tokens <= room:
            return False
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                shape = list(buffer.shape)
                shape[self._token_axis] += BLOCK
                larger = buffer.new_zeros(shape)
                self._by_head(larger)[:, :, :room] = self._by_head(buffer)
                buffers[layer] = larger
        return True

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only the given rows, in new buffers. Synchronizes with the device.

        The prompt of a group without rows stays in memory but is no longer read.

        Args:
            rows: indices of the rows in ascending order, int64 [A], on the device of the K/V.
        """
        self._owner = self._owner[rows.cpu()]
        self._plan, self._suffix_plan = self._make_plan(), self._make_suffix_plan()
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = buffer.index_select(0, rows)
        self.used = self.used.index_select(0, rows)

    def _by_head(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return a view of a buffer, [B, Hkv, room, d]."""
        return buffer.transpose(1, 2) if self._tokens_first else buffer

    def _make_plan(self) -> DecodePlan:
        """Return the prefix of each row."""
        owner = torch.tensor(self.prefix.suffix_owner)[self._owner] if self.prefix.suffix_lengths else self._owner
        return self._plan_of(self.prefix.prefix_lengths, owner)

    def _make_suffix_plan(self) -> DecodePlan | None:
        """Return the suffix of each row, or None if prompts have none."""
        return self._plan_of(self.prefix.suffix_lengths, self._owner) if self.prefix.suffix_lengths else None

    def _plan_of(self, lengths: tuple[int, ...], owner: torch.Tensor) -> DecodePlan:
        counts = torch.bincount(owner, minlength=len(lengths)).tolist()
        return DecodePlan.from_counts(lengths, counts, device=self.prefix.keys[0].device)
