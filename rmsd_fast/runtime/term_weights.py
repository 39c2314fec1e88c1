"""Train the log-variances of the terms of a loss, which `method.uncertainty` defines, in float32 on the host.

They are a few numbers, or a small network. Every rank holds all of them, sums the gradients of all ranks, and takes the
same step. They belong to the training and not to the student, so exports and rollouts do not contain them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rmsd_fast.config import CheckpointError
from rmsd_fast.data.transfer import to_device
from rmsd_fast.files import read_tensors, write_tensors
from rmsd_fast.method.uncertainty import HIDDEN, LIMIT, uncertainty_loss
from rmsd_fast.runtime.process_group import World

_LAYOUT, _STATE = "terms.json", "state.safetensors"


class TermWeights:
    """Log-variances of the terms, with their Adam. They start at 0.

    Args:
        form: `task` or `instance`.
        terms: names of the terms.
        features: size of a question's features, for `instance`.
        seed: seed of the network's first layer.
        world: this process in the run.
    """

    def __init__(self, form: str, terms: Sequence[str], *, features: int, seed: int, world: World) -> None:
        self.form, self.terms, self.features, self.world = form, tuple(terms), features, world
        shapes = {"log_variance": (len(terms),)}
        if form == "instance":
            shapes = {"in.weight": (HIDDEN, features), "in.bias": (HIDDEN,)}
            shapes |= {"out.weight": (len(terms), HIDDEN), "out.bias": (len(terms),)}
        self.params = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        if form == "instance":
            # As in a linear layer of torch. The output layer is zero, so that all s are 0 at first.
            generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(features)
            for name in ("in.weight", "in.bias"):
                nn.init.uniform_(self.params[name], -bound, bound, generator=generator)
        self._optimizer = torch.optim.Adam(self.params.values(), lr=0.0)
        for param in self.params.values():
            # The states that Adam would create in its first step, so that a checkpoint before it contains them.
            moments = {name: torch.zeros_like(param.data) for name in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[param] = {"step": torch.tensor(0.0), **moments}

    def log_variances(self, features: Tensor | None, questions: int) -> Tensor:
        """Return s of each question and term, float32 [Q, M], in [-5, 5].

        Args:
            features: features of the questions, float32 [Q, D], constants; unused by `task`.
            questions: Q.
        """
        if self.form == "task":
            return self.params["log_variance"].expand(questions, -1)
        hidden = nn.functional.linear(features.detach(), self.params["in.weight"], self.params["in.bias"]).relu()
        return nn.functional.linear(hidden, self.params["out.weight"], self.params["out.bias"]).clamp(-LIMIT, LIMIT)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def step(self, values: Tensor, shares: Tensor, features: Tensor | None) -> None:
        """Take one step on this rank's questions, together with all ranks. See `uncertainty_loss` for the arguments."""
        self._optimizer.zero_grad()
        loss = uncertainty_loss(values, shares, self.log_variances(features, len(values)), form=self.form)
        loss.backward()
        self._sum_gradients()
        self._optimizer.step()
        if self.form == "task":
            with torch.no_grad():
                self.params["log_variance"].clamp_(-LIMIT, LIMIT)

    def _sum_gradients(self) -> None:
        if self.world.size == 1:
            return
        gradients = [param.grad for param in self.params.values()]
        (flat,) = to_device([torch.cat([gradient.flatten() for gradient in gradients]).double()], self.world.device)
        dist.all_reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, summed in zip(gradients, flat.cpu().split(sizes), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def save(self, folder: Path) -> None:
        """Write the parameters and the state of Adam, on the main process and without a collective."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.world.is_main:
            (folder / _LAYOUT).write_text(json.dumps(self._layout(), indent=1) + "\n", encoding="utf-8")
            write_tensors(folder / _STATE, self._tensors())

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restore what `save` has written, with any number of ranks.

        Raises:
            CheckpointError: it was saved with another form, other terms or features of another size.
        """
        saved = json.loads((folder / _LAYOUT).read_text(encoding="utf-8"))
        if saved != self._layout():
            raise CheckpointError(
                f"{folder}: expected {self._layout()}, got {saved}; resume with the same credit.uncertainty, rewards, "
                "kd.kind and distill.sft_coef"
            )
        tensors = read_tensors(folder / _STATE)
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])

    def _layout(self) -> dict[str, Any]:
        shapes = {name: list(param.shape) for name, param in self.params.items()}
        return {"form": self.form, "terms": list(self.terms), "shapes": shapes}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: param.data for name, param in self.params.items()}
        for name, param in self.params.items():
            tensors |= {f"adam.{name}.{key}": value for key, value in self._optimizer.state[param].items()}
        return tensors

    def close(self) -> None:
        """Free nothing: the parameters are few."""
