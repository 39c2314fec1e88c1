"""Run rmsd_fast.train with non-finite or huge numbers in one step of a stage.

python tests/attack/poisoned.py KIND STAGE STEP [--rank R] [--kill saved] [--digests FOLDER] -- quickstart …

Only objects of this process are patched, never the package. KIND is PLACE.WHAT.VALUE:

policy, discriminator or both
    loss     multiply the loss, and so its gradients, by the value in every micro-batch
    value    add the value to the loss, which leaves its gradients unchanged
    gradient set one element of the gradient of one parameter to the value
rollouts     the language model's head, while responses are sampled
reference    the log-probs of the reference
scores       the output of the discriminator's value head
    all      add the value to every number
    row      add the value to the numbers of the last row
    one      add the value to the last number
"""

from __future__ import annotations

import argparse
import hashlib
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from rmsd_fast.process import prepare_process


@contextmanager
def poison(kind: str, state) -> Iterator[None]:
    """Poison one step of this state inside the context."""
    place, what, number = kind.split(".")
    value = float(number)
    with ExitStack() as stack:
        if place in ("policy", "discriminator", "both"):
            for name in ("policy", "discriminator") if place == "both" else (place,):
                engine = getattr(state, name)
                if what == "gradient":
                    stack.callback(spoil_gradient(engine, value).remove)
                else:
                    engine.backward = partial(spoilt_backward, engine.backward, what, value)
                    stack.callback(delattr, engine, "backward")
        else:
            module = {
                "rollouts": lambda: state.student.model.lm_head,
                "reference": lambda: state.reference,
                "scores": lambda: state.discriminator.module,
            }[place]()
            stack.callback(module.register_forward_hook(partial(spoil_output, what, value)).remove)
        yield


def spoilt_backward(backward, what: str, value: float, loss, *, last: bool) -> None:
    backward(loss * value if what == "loss" else loss + value, last=last)


def spoil_gradient(engine, value: float):
    """Change the last element of the gradient of a parameter in the middle of the model."""
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    parameter = trained[len(trained) // 2]

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    handle = parameter.register_hook(spoil)
    # The hook runs before the engine's own hooks, as if the model's backward had made the value. Autograd follows the
    # order of insertion.
    hooks = parameter._backward_hooks
    first = {handle.id: hooks.pop(handle.id), **hooks}
    hooks.clear()
    hooks.update(first)
    return handle


def spoil_output(what: str, value: float, module, given, output):
    """Add to the output, so that gradients still flow into the module."""
    spoilt = output.new_zeros(output.shape)
    rows = spoilt if spoilt.ndim > 1 else spoilt[:, None]
    {"all": rows, "row": rows[-1], "one": rows[-1, -1:]}[what].fill_(value)
    return output + spoilt


def digest(engine) -> str:
    """Return a hash of this rank's weights, which are the same on all ranks below ZeRO-3."""
    total = hashlib.sha256()
    for parameter in engine.module.parameters():
        total.update(parameter.detach().float().numpy().tobytes())
    return total.hexdigest()


def main() -> None:
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind")
    parser.add_argument("stage", choices=("sft", "warm_up", "distill"))
    parser.add_argument("step", type=int, help="first poisoned step, from 1; 0 = every step of the stage")
    parser.add_argument("--rank", type=int, default=-1, help="poison only this rank")
    parser.add_argument(
        "--kill", choices=("saved", "unsaved"), help="kill the run before or after the checkpoint of this step"
    )
    parser.add_argument("--digests", type=Path, help="folder for the hashes of each rank's weights after every step")
    options = parser.parse_args(sys.argv[1:split])
    rank = int(os.environ.get("RANK", "0"))
    prepare_process()
    from rmsd_fast import train_run
    from rmsd_fast.stages import training_loop as loop

    def is_chosen(stage: str, number: int) -> bool:
        return stage == options.stage and options.step in (0, number)

    def run_steps(run, stage, state, loader, engines, step, rates, *, run_steps=train_run.run_steps):
        def one(state, prompts, number):
            with ExitStack() as stack:
                if is_chosen(stage, number + 1) and options.rank in (-1, rank):
                    stack.enter_context(poison(options.kind, state))
                result = step(state, prompts, number)
            if options.digests:
                hashes = {name: digest(engine) for name, engine in engines.items()}
                with (options.digests / f"rank-{rank}.txt").open("a") as file:
                    file.write(f"{stage} {number + 1} {hashes}\n")
            return result

        run_steps(run, stage, state, loader, engines, one, rates)

    def save(run, stage, step, *others, save=loop.save, **named):
        killed = options.kill if is_chosen(stage, step) else None
        if killed == "unsaved":
            os.kill(os.getpid(), signal.SIGKILL)
        saved = save(run, stage, step, *others, **named)
        if killed == "saved":
            os.kill(os.getpid(), signal.SIGKILL)
        return saved

    train_run.run_steps, loop.save = run_steps, save
    sys.argv = ["rmsd_fast.train", *sys.argv[split + 1 :]]
    runpy.run_module("rmsd_fast.train", run_name="__main__")


if __name__ == "__main__":
    main()
