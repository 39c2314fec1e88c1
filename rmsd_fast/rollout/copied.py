"""Generate rollouts with a copy of the language model, whose weights are proven to be the policy's.

Before each step's rollouts, `update` sends the weights that training has changed, and compares a sum over the bits of
all weights of each layer with that of the policy. The copy may be in this process or in another one.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence

import torch

from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.models.students import MediaFeatures, encode_media
from rmsd_fast.rollout.base import PolicyEngine, Rollout, RolloutError, Sampling
from rmsd_fast.rollout.samples import Sampler, advice, make_request, rollouts_of
from rmsd_fast.rollout.weights import bit_sum, source_weights, stream, to_host, weight_group


class CopyRollout:
    """Generate rollouts with a copy of the language model.

    The first update sends all weights of the language model, and later ones only those that training changes.

    Args:
        sampler: the copy.
        builder: builder of the prompts, which also decodes responses.
    """

    runs_policy = False

    def __init__(self, sampler: Sampler, builder: PromptBuilder) -> None:
        self.sampler, self.builder = sampler, builder
        self._frozen_sums: dict[str, int] | None = None
        # A prefix is shared only within one call of `draw`, and therefore only with the same weights.
        self._name, self._calls = uuid.uuid4().hex, 0

    def update(self, policy: PolicyEngine, version: int) -> None:
        """Send weights, and check that all weights of the copy are those of the policy; see `RolloutEngine`."""
        self.send(policy, f"rollout step {version}: expected the policy's weights", advice())

    def send(self, policy: PolicyEngine, expects: str, remedy: str) -> None:
        """Send weights, and check that all weights of the copy are those of `policy`.

        Args:
            policy: the source of the weights.
            expects, remedy: what was expected and what to do if others have arrived; see `check_sums`.
        Raises:
            RolloutError: the copy has other weights.
        """
        weights = source_weights(policy)
        trained = {weight.name for weight in weights if weight.trained}
        sent = [weight for weight in weights if weight.trained or self._frozen_sums is None]
        trained_sums: dict[str, torch.Tensor] = {}
        frozen_sums: dict[str, torch.Tensor] = {}

        def watched() -> Iterator[tuple[str, torch.Tensor]]:
            for name, value in stream(policy, sent):
                value = value.to(self.sampler.dtype)
                sums, group = trained_sums if name in trained else frozen_sums, weight_group(name)
                sums[group] = bit_sum(value) + sums.get(group, 0)
                yield name, value

        with torch.no_grad():
            self.sampler.load(watched(), [weight.name for weight in sent])
        held = self.sampler.commit()
        # Only a complete first update has sent the frozen weights.
        frozen = to_host(frozen_sums) if self._frozen_sums is None else self._frozen_sums
        check_sums([to_host(trained_sums), frozen], held, expects, remedy)
        self._frozen_sums = frozen

    def close(self) -> None:
        """Leave the servers; see `RolloutEngine`."""
        self.sampler.close()

    @torch.no_grad()
    def generate(
        self,
        model: torch.nn.Module,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        features: MediaFeatures | None = None,
        policy_version: int = 0,
    ) -> list[list[Rollout]]:
        """Return N rollouts per prompt; see `RolloutEngine`.

        Sampling is seeded by (seed, step, id, index). A rollout does not depend on the rest of its batch, except for
        rounding.

        Args:
            model: the policy's model, whose vision tower encodes the media if `features` is None.
            prompts: prompts to answer.
            sampling: sampling parameters. Greedy decoding needs n = 1.
            features: vision features of the prompts.
            policy_version: version to record in the rollouts.
        Raises:
            RolloutError: the copy read another prompt than the trainer, or a rollout is empty or incomplete.
        """
        features = encode_media(model, prompts) if features is None else features
        (groups,) = self.draw(prompts, [sampling], features, policy_version=policy_version)
        return groups

    @torch.no_grad()
    def draw(
        self, prompts: list[Prompt], samplings: Sequence[Sampling], features: MediaFeatures, *, policy_version: int = 0
    ) -> list[list[list[Rollout]]]:
        """Return the rollouts of each prompt for each of `samplings`, all of which are decoded together.

        The requests are in the order of the prompts. The other arguments and the errors are those of `generate`.
        """
        self._calls += 1
        salt = f"{self._name}-{self._calls}"
        pairs = [(index, sampling) for index in range(len(prompts)) for sampling in samplings]
        drawn = self.sampler.sample(
            [
                (make_request(prompts[index], index, features, sampling, salt=salt, key=salt), sampling)
                for index, sampling in pairs
            ]
        )
        groups = [
            rollouts_of(prompts[index], completions, self.builder, policy_version)
            for (index, _), completions in zip(pairs, drawn, strict=True)
        ]
        return [groups[number :: len(samplings)] for number in range(len(samplings))]


def check_sums(expected: list[dict[str, int]], held: dict[str, int], expects: str, remedy: str) -> None:
    """Raise RolloutError if the copy's weights are not those of the policy.

    Args:
        expected: sums of the groups of the policy's weights, in parts that add up.
        held: sums of the groups of the copy's weights.
        expects: what was expected, for the message.
        remedy: what to do, for the message.
    """
    groups = sorted({group for sums in (*expected, held) for group in sums})
    wrong = [group for group in groups if sum(sums.get(group, 0) for sums in expected) != held.get(group, 0)]
    if wrong:
        raise RolloutError(
            f"{expects} in vLLM, got others in {', '.join(wrong)} ({len(wrong)} of {len(groups)} groups); {remedy}"
        )
