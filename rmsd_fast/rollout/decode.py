"""Decode the rows of a batch token by token over static buffers, eagerly or by replaying CUDA graphs.

Everything that a step reads and writes is in tensors that keep their addresses, and the host reads nothing of it. The
same code therefore runs eagerly, and on CUDA is captured once per row count and block of tokens and then replayed: a
step has thousands of small kernels, which the host would enqueue more slowly than the device runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from rmsd_fast.config import SettingsError, first_line
from rmsd_fast.models.shared_prefix import run_shared_prefix
from rmsd_fast.rollout.shared_cache import DecodeCache

# Number of steps between two looks at which rows have ended. On CUDA a look waits for the device, which then idles; on
# CPU it is free, and rows that have ended are dropped at once.
LOOK_EVERY = {"cuda": 8, "cpu": 1}
# A graph for fewer replays would not pay. This is an estimate that no GPU has measured: a capture enqueues a step once
# and instantiates the graph, and torch.cuda.graph also waits for the device and empties the memory caches.
LEAST_REPLAYS = 4


# A decoding step: all that it reads and writes is in tensors.
Step = Callable[[], None]


class Chosen(NamedTuple):
    """The next ids [rows], their log-probs over the whole vocabulary, and the probability of all banned ids."""

    ids: torch.Tensor
    logp: torch.Tensor
    banned_mass: torch.Tensor


def choose(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    noise: torch.Tensor,
    temperature: float,
    banned_ids: torch.Tensor,
    eos_id: int,
) -> Chosen:
    """Choose the next ids by inverting the cumulative distribution in float64, in which banned ids are left out.

    As in the trainer's heads, the chosen id's logit is then replaced by a dot product in float32: log-probs of 16-bit
    logits would otherwise have their rounding, and differ from the trainer's. For rows whose logits are not finite, the
    result is the end token with NaN.

    Args:
        logits: hidden @ weight.T, [rows, V], floating. Float32 logits are overwritten.
        hidden: inputs of the head, [rows, D], floating.
        weight: weight of the head, [V, D], floating.
        noise: uniform numbers in [0, 1), float64 [rows].
        temperature: sampling temperature; 0 means the most probable id, with log-probs at temperature 1.
        banned_ids: ids that must not be chosen, int64.
        eos_id: the end token.
    """
    logits = logits.float()
    # One pass less over the logits than isfinite().all().
    broken = ~torch.isfinite(logits.abs().amax(-1))
    banned = logits.index_select(1, banned_ids) / (temperature or 1.0)
    logits.index_fill_(1, banned_ids, -torch.inf)
    scaled = logits if temperature == 0 else logits / temperature
    logp = scaled.log_softmax(-1)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        cdf = logp.double().exp().cumsum(-1)
        # With right=True, an id with probability 0 has an empty interval and is never chosen.
        ids = torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0]
        ids = ids.clamp_max(logits.shape[-1] - 1)
    ids = ids.masked_fill(broken, eos_id)
    without_banned, rounded = (t.gather(-1, ids[:, None])[:, 0] for t in (logp, scaled))
    exact = (hidden.float() * weight[ids].float()).sum(-1) / (temperature or 1.0)
    change = exact - rounded
    # Of the log-sum-exp of all ids but the banned ones, which is rounded - without_banned before.
    growth = torch.log1p(without_banned.exp() * torch.expm1(change))
    # The log of the ratio of banned to other mass.
    ratio = banned.logsumexp(-1) - (rounded - without_banned + growth)
    whole = (without_banned + (change - growth)).clamp_max(0.0) - F.softplus(ratio)
    results = (whole, torch.sigmoid(ratio))
    return Chosen(ids, *(result.masked_fill(broken, torch.nan) for result in results))


class Decoder:
    """Sample tokens for all rows of a batch.

    Args:
        model: the student's model, with shared prefixes enabled.
        cache: K/V of the prompts and the rows.
        positions: position of each row's first token, int64 [S].
        noise: uniform numbers for each row and token, float64 [S, R].
        temperature: sampling temperature.
        banned_ids: ids that must not be chosen, int64.
        eos_id: the end token.
    Attributes:
        tokens: sampled ids, int64 [S, R]; -1 after a row's end token.
        logp: their log-probs over the whole vocabulary, float32 [S, R].
        banned_mass: probability of all banned ids before each token, float32 [S, R].
        rows: rows of these tensors that are still decoded, int64 [B].
        active: which of them have not ended, bool [B].
    """

    def __init__(
        self,
        model: nn.Module,
        cache: DecodeCache,
        positions: torch.Tensor,
        noise: torch.Tensor,
        *,
        temperature: float,
        banned_ids: torch.Tensor,
        eos_id: int,
    ):
        self._model, self._cache, self._noise = model, cache, noise
        self._temperature, self._banned_ids, self._eos_id = temperature, banned_ids, eos_id
        device = noise.device
        self.tokens = torch.full(noise.shape, -1, dtype=torch.int64, device=device)
        self.logp = torch.zeros(noise.shape, device=device)
        self.banned_mass = torch.zeros(noise.shape, device=device)
        self.rows = torch.arange(len(noise), device=device)
        self.active = torch.ones_like(self.rows, dtype=torch.bool)
        # The inputs of the next pass: the last ids [B, 1] and their positions [B, 1].
        self._last_ids = torch.zeros_like(self.rows)[:, None]
        self._positions = positions[:, None].clone()
        # The column of the next token, [1].
        self._column = torch.zeros(1, dtype=torch.int64, device=device)

    def run(self, hidden: torch.Tensor, logits: torch.Tensor, *, look_every: int, graphs: Graphs | None = None) -> None:
        """Sample until all rows have ended or have R tokens.

        Args:
            hidden: inputs of the head for the first tokens, [S, D].
            logits: logits of the first tokens, [S, V].
            look_every: number of tokens between two looks at which rows have ended. Rows that have ended are decoded
                until at most half of the batch is active, and then dropped.
            graphs: captures and replays the steps. If None, they run eagerly.
        """
        self._record(hidden, logits)
        most = self._noise.shape[1]
        for tokens in range(1, most):
            replaced = False
            if tokens % look_every == 0:
                # This is the only synchronization of a decoding step.
                left = int(self.active.sum())
                if left == 0:
                    break
                if 2 * left <= len(self.rows):
                    self._keep(self.active.nonzero()[:, 0])
                    replaced = True
            replaced = self._cache.make_room(tokens) or replaced
            if graphs is None:
                self._step()
            else:
                graphs.run(self._step, replaced, min(most - tokens, self._cache.room - tokens + 1))

    def _step(self) -> None:
        """Read the last token of each row and sample the next one, without waiting for the device."""
        hidden = run_shared_prefix(
            self._model.model.language_model,
            self._cache,
            input_ids=self._last_ids,
            position_ids=self._positions.expand(3, -1, -1),
        )
        self._cache.advance()
        self._positions += 1
        hidden = hidden[:, -1]
        self._record(hidden, self._model.lm_head(hidden))

    def _record(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Choose the next token of each row and store it, unless the row has ended."""
        place = (self.rows, self._column)
        weight, noise = self._model.lm_head.weight, self._noise[place]
        chosen = choose(logits, hidden, weight, noise, self._temperature, self._banned_ids, self._eos_id)
        ended = ~self.active
        self.tokens[place] = chosen.ids.masked_fill(ended, -1)
        self.logp[place] = chosen.logp.masked_fill(ended, 0.0)
        self.banned_mass[place] = chosen.banned_mass.masked_fill(ended, 0.0)
        self.active &= chosen.ids != self._eos_id
        self._last_ids[:, 0] = chosen.ids
        self._column += 1

    def _keep(self, kept: torch.Tensor) -> None:
        """Drop all rows but these, int64 [A], so that one long response does not keep the others in the batch."""
        self._cache.keep(kept)
        self.rows, self.active = self.rows[kept], self.active[kept]
        self._last_ids, self._positions = self._last_ids[kept], self._positions[kept]


class Graphs:
    """Run steps on CUDA: the first one after buffers were replaced eagerly, the others by replaying a graph of it.

    Only one graph is alive at a time, except while the next one is captured, so that both use the same memory.
    """

    def __init__(self, device: torch.device):
        self._device = device
        # A pool cannot be used again after its last graph is gone, so each batch has its own.
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0

    def run(self, step: Step, replaced: bool, left: int) -> None:
        """Run one step.

        Args:
            step: the step, which must not wait for the device.
            replaced: whether a tensor that the step reads or writes was replaced since the last call.
            left: number of steps until buffers are replaced or the batch ends, including this one.
        Raises:
            SettingsError: CUDA cannot capture the step.
        """
        self._steps = 1 if replaced else self._steps + 1
        if self._steps == 1 or (self._steps == 2 and left < LEAST_REPLAYS):
            # An eager step loads and compiles kernels and allocates workspaces, which cannot be captured.
            self._on_side_stream(step)
            self._steps = 1
            return
        if self._steps == 2:
            self._graph = self._captured(step)
        self._graph.replay()

    def close(self) -> None:
        """Wait for the last replay, and free the graph and its memory."""
        torch.cuda.current_stream(self._device).synchronize()
        self._graph = None

    def _on_side_stream(self, step: Step) -> None:
        stream, current = side_stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()
        current.wait_stream(stream)

    def _captured(self, step: Step) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that decode the next videos may allocate device memory meanwhile, which the default mode forbids.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=side_stream(self._device), capture_error_mode="thread_local"
            ):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise SettingsError(
                "rollout.cuda_graphs: expected a decode step that CUDA can capture, got "
                f"{first_line(error)}; set rollout.cuda_graphs=false"
            ) from error
        return graph


@lru_cache(maxsize=8)
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which steps are warmed up and captured. Each stream has its own cuBLAS workspace."""
    return torch.cuda.Stream(device)
