"""Keep a collection within its budget of tokens and cost."""

from __future__ import annotations

import asyncio
import math

from rmsd_fast.collect_run.config import CollectConfig, cost_of


class BudgetReached(Exception):
    """The next request might exceed the budget, and no other request is in flight."""


class Budget:
    """Reserve the tokens of each request before it is sent, so that the budget is never exceeded.

    A request reserves its prompt, as estimated, and the longest possible answers. When its reply arrives, the server's
    counts take their place. If prompts turn out to be longer than estimated, or answers longer than their limit (some
    servers do not limit the reasoning), later reservations are larger.

    Args:
        collect: budget and prices.
        spent: prompt and completion tokens that the pool has used before.
    Attributes:
        spent: prompt and completion tokens that the pool has used.
    """

    def __init__(self, collect: CollectConfig, spent: tuple[int, int]) -> None:
        self._collect, self.spent = collect, spent
        self._factors = (1.0, 1.0)
        self._reserved: list[tuple[int, int]] = []
        self._changed = asyncio.Condition()

    @property
    def is_limited(self) -> bool:
        return self._collect.max_cost is not None or self._collect.max_total_tokens is not None

    async def reserve(self, prompt_tokens: int, completion_tokens: int) -> tuple[int, int]:
        """Wait until the request fits into the budget, and reserve its tokens.

        Raises:
            BudgetReached: the request does not fit although nothing else is reserved.
        """
        wanted = (prompt_tokens, completion_tokens)
        async with self._changed:
            while not self._fits(wanted):
                if not self._reserved:
                    raise BudgetReached
                await self._changed.wait()
            self._reserved.append(wanted)
        return wanted

    async def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """Replace a reservation by the tokens that were used."""
        async with self._changed:
            self._reserved.remove(reserved)
            shares = zip(self._factors, used, reserved, strict=True)
            self._factors = tuple(max(factor, tokens / most) for factor, tokens, most in shares)
            self.spent = (self.spent[0] + used[0], self.spent[1] + used[1])
            self._changed.notify_all()

    def _fits(self, wanted: tuple[int, int]) -> bool:
        collect = self._collect
        reserved = map(sum, zip(wanted, *self._reserved, strict=True))
        prompt, completion = (
            spent + math.ceil(tokens * factor)
            for spent, tokens, factor in zip(self.spent, reserved, self._factors, strict=True)
        )
        if collect.max_total_tokens is not None and prompt + completion > collect.max_total_tokens:
            return False
        return collect.max_cost is None or cost_of(collect, prompt, completion) <= collect.max_cost
