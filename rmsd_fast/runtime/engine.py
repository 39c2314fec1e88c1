"""Wrap each trained model in a DeepSpeed engine, on CPU (gloo) and on CUDA (nccl).

Every caller must follow three rules. Otherwise, DeepSpeed's collectives hang or sum the wrong values:

1. Every rank calls `Engine.__call__` and `Engine.backward` the same number of times between two steps, through the same
   modules in the same order. A rank without samples runs filler rows and multiplies their loss by zero.
2. Losses are local sums divided by a GLOBAL count (`global_sum`). `backward` reverts DeepSpeed's mean over ranks.
3. The forward goes through `engine(...)`, not `engine.module`, because DeepSpeed's bookkeeping depends on that call.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmsd_fast.config import CheckpointError, NotInstalled, SettingsError
from rmsd_fast.files import write_tensors
from rmsd_fast.runtime.process_group import World, global_max
from rmsd_fast.runtime.reshard import SavedEngine

# Parameters below this size stay gathered under ZeRO-3, because gathering norms and biases costs more than their
# memory.
PERSISTENT_NUMEL = 10_000
# Gradients with a larger norm are treated as not finite, because their squares could overflow float32 in DeepSpeed's
# norm.
LARGEST_NORM = 1e18
# DeepSpeed allocates a whole bucket per backward. Its default of 5e8 elements takes 2 GB for a model of any size.
LARGEST_BUCKET = 200_000_000


class Engine:
    """One DeepSpeed engine with its AdamW.

    Args:
        module: the model, on any device. Parameters with `requires_grad=False` are not trained. DeepSpeed casts all
            parameters to `dtype` in place, and under ZeRO-3 splits them over the ranks in place.
        lr: learning rate of torch's AdamW. DeepSpeed's own CPU Adam compiles for minutes and rounds differently.
        weight_decay: weight decay of AdamW.
        optimizer: `adamw`, or `adamw_8bit` for that of bitsandbytes, whose moments have 8 bits.
        zero_stage: 0 to 3.
        grad_clip: largest global gradient norm; 0 means no clipping.
        dtype: `float32` or `bfloat16`. With bfloat16, master weights are float32, and gradients are accumulated in
            float32 except under ZeRO-0, where DeepSpeed keeps them in bfloat16.
        offload_optimizer: keep optimizer states and master weights in host memory; requires ZeRO 1 to 3.
        save_frozen: whether `save` also writes the parameters that are not trained. If not, `load` expects them to be
            those of the saved engine.
        world: this process in the run.
    Raises:
        SettingsError: a setting is out of range, or no parameter is trainable.
        NotInstalled: bitsandbytes is not installed.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        optimizer: str = "adamw",
        zero_stage: int = 2,
        grad_clip: float = 1.0,
        dtype: str = "bfloat16",
        offload_optimizer: bool = False,
        save_frozen: bool = True,
        world: World,
    ) -> None:
        import deepspeed

        trainable = [p for p in module.parameters() if p.requires_grad]
        _check(zero_stage, dtype, offload_optimizer, optimizer, len(trainable))
        self.world, self.zero_stage, self.dtype, self.save_frozen = world, zero_stage, dtype, save_frozen
        self.optimizer = optimizer
        self.names = [n for n, p in module.named_parameters() if p.requires_grad]
        self.numels = [getattr(p, "ds_numel", p.numel()) for p in trainable]
        config = _config(sum(self.numels), zero_stage, grad_clip, dtype, offload_optimizer)
        if dtype == "float32":
            module = module.float()
        dtypes = {name: buffer.dtype for name, buffer in module.named_buffers()}
        # The fused kernel makes one pass over weights and moments without a temporary of their size. Without a GPU,
        # torch's default is kept because the fused CPU kernel rounds differently.
        fused = world.device.type == "cuda" or offload_optimizer
        with redirect_stdout(StringIO()):  # DeepSpeed prints memory figures.
            self.engine, _, _, _ = deepspeed.initialize(
                model=module,
                optimizer=_adamw(optimizer, trainable, weight_decay, fused=fused or None),
                config=config,
                dist_init_required=False,
            )
        if zero_stage == 0:
            # In bfloat16, DeepSpeed has taken a step without gradients, which AdamW would count.
            self.engine.basic_optimizer.state.clear()
        self.set_lr(lr)
        for name, buffer in self.engine.module.named_buffers():
            # DeepSpeed before 0.19.4 also casts buffers. Rotary frequencies in bfloat16 are off by many radians at late
            # positions.
            if buffer.dtype != dtypes[name]:
                raise NotInstalled(
                    f"deepspeed: expected the buffer {name} to stay {dtypes[name]}, got {buffer.dtype} from version "
                    f"{deepspeed.__version__}; install deepspeed>=0.19.4"
                )
        self._trace = 0  # Hash of the order in which parameters received gradients.
        # Sum of the norms of all gradients: an upper bound of their global norm, and not finite if any gradient is not.
        self._probe = torch.zeros((), device=world.device)
        self._hooks = [p.register_hook(self._watch(i)) for i, p in enumerate(trainable)]

    @property
    def module(self) -> nn.Module:
        """The wrapped model, for generation and export (inside `full_weights`), and for reading its config."""
        return self.engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def _watch(self, index: int) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            # vector_norm makes one pass over the gradient without a temporary of its size.
            self._probe.add_(torch.linalg.vector_norm(grad.detach(), dtype=torch.float32))
            self._trace = (self._trace * 1_000_003 + index + 1) % 2_147_483_647

        return hook

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch.

        Args:
            loss: scalar, a local sum divided by a GLOBAL count. The sum over micro-batches and ranks is the loss.
            last: whether this is the last micro-batch before `step`; the same on every rank.
        """
        # A loss that is not finite can have finite gradients if it contains a clamp.
        self._probe.add_(loss.detach().float() * 0)
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = lr

    def watched(self) -> dict[str, float | Tensor]:
        """Return the values of this rank whose maxima over the ranks `gradients_finite` checks."""
        # The norm of the mean over the ranks is at most the largest norm of a rank. NaN is not in this range either.
        bad = (self._probe <= LARGEST_NORM).logical_not()
        return {"bad": bad, "high": self._trace, "low": -self._trace}

    def step(self) -> Tensor:
        """Run one optimizer step and return the global gradient norm before clipping.

        The norm is a float64 scalar that the host has not waited for. It is on the device, except where DeepSpeed keeps
        it on the host.

        Raises:
            RuntimeError: DeepSpeed did not apply the step. This does not happen if `gradients_finite` is true.
        """
        optimizer = self.engine.optimizer
        if self.zero_stage == 0:
            grads = [p.grad for p in self.module.parameters() if p.requires_grad and p.grad is not None]
            # Norms in float32 of 16-bit gradients, without a float32 copy of all of them.
            norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
            norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.world.device)
            self.engine.step()
        else:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
        if self.zero_stage == 3:
            # Without this, a parameter that gets no gradient before the next step would use its old gradient.
            optimizer.grad_partitions_flat_buffer.zero_()
        self._reset_watch()
        if not self.engine.was_step_applied():
            raise RuntimeError(
                f"DeepSpeed did not apply a step with gradient norm {norm}; call gradients_finite() before step()"
            )
        return torch.as_tensor(norm, dtype=torch.float64)

    def discard(self) -> None:
        """Discard the accumulated gradients. Weights and optimizer states stay bitwise unchanged.

        This makes the same calls as DeepSpeed after an overflow, because DeepSpeed has no public function for it.
        """
        optimizer = self.engine.optimizer
        if self.zero_stage == 0:
            self.engine.zero_grad()
        optimizer.zero_grad()
        if self.zero_stage == 3:
            optimizer.grad_partitions_flat_buffer.zero_()
            optimizer.averaged_gradients = {}
            if optimizer.offload_optimizer:
                optimizer.reset_cpu_buffers()
        elif hasattr(optimizer, "averaged_gradients"):  # ZeRO 1 and 2. bfloat16 under ZeRO-1 has another optimizer.
            optimizer.micro_step_id = -1
            optimizer._release_preflattened_grad_buffers()
            for key in optimizer.averaged_gradients:
                optimizer.averaged_gradients[key] = None
            for key in optimizer.all_grad_tensors:
                optimizer.all_grad_tensors[key] = None
            if optimizer.cpu_offload:
                optimizer.reset_cpu_buffers()
        self._reset_watch()

    def _reset_watch(self) -> None:
        self._probe.zero_()
        self._trace = 0

    @contextmanager
    def gathered(self, params: Iterable[nn.Parameter]) -> Iterator[None]:
        """Hold these parameters of `module` whole on every rank inside the context.

        Under ZeRO-3, all ranks must enter and leave together. With other stages, this does nothing. Do not change
        weights inside.
        """
        params = list(params)
        if self.zero_stage != 3 or not params:
            yield
            return
        import deepspeed

        for param in params:
            param.ds_active_sub_modules.clear()
        with deepspeed.zero.GatheredParameters(params):
            yield

    @contextmanager
    def full_weights(self, part: nn.Module | None = None) -> Iterator[None]:
        """Hold all weights of `module` on every rank inside the context, so that calling it needs no collective.

        Under ZeRO-3, all ranks must enter and leave together. With other stages, this does nothing. Do not change
        weights or call `backward` inside.

        Args:
            part: a submodule. Only its weights are held, and only it can be called; None = the whole module.
        """
        if self.zero_stage != 3:
            yield
            return
        offload = self.engine.optimizer.parameter_offload
        with self.gathered((part or self.module).parameters()):
            # DeepSpeed's hooks would release weights after each call and gather them again with a collective, which
            # hangs if ranks generate different numbers of tokens.
            offload._remove_module_hooks()
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()

    def close(self) -> None:
        """Remove this engine's hooks from the module, so that another engine can use it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.zero_stage == 3:
            with self.full_weights():
                whole = {n: p.data.clone() for n, p in self.module.named_parameters()}
        self.engine.destroy()
        if self.zero_stage == 3:
            _unpartition(self.module, whole)

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights, master weights and optimizer states, without a collective or pickle.

        The files are `engine.json` and `weights.safetensors` (both from rank 0, the latter not under ZeRO-3), and
        `rank_<r>.safetensors`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        main = self.world.is_main
        if main:
            (folder / "engine.json").write_text(json.dumps(self.layout(), indent=1) + "\n", encoding="utf-8")
            if self.zero_stage != 3:
                write_tensors(folder / "weights.safetensors", self._weights())
        if main or self.zero_stage > 0:  # Under ZeRO-0, all ranks hold the same states.
            tensors = {} if self.zero_stage != 3 else {f"weight.{k}": v for k, v in self._weights().items()}
            state = self.engine.basic_optimizer.state
            for i, master in enumerate(self.masters()):
                tensors[f"master.{i}"] = master
                # bitsandbytes counts its steps in a Python number.
                tensors |= {f"state.{i}.{k}": torch.as_tensor(v) for k, v in state.get(master, {}).items()}
            write_tensors(folder / self.part_name(), tensors)

    def saved_states(self, folder: Path) -> SavedEngine:
        """Open states that an engine with the same trained parameters has saved.

        Raises:
            CheckpointError: they were saved with another dtype, optimizer or other trainable parameters.
        """
        # Earlier versions had no other optimizer.
        saved, now = {"optimizer": "adamw", **json.loads((folder / "engine.json").read_text())}, self.layout()
        for key in ("dtype", "optimizer", "elements", "trainable"):
            if saved.get(key) != now[key]:
                value, got = now[key], saved.get(key)
                if key == "trainable" and len(value) == len(got):
                    value, got = next(pair for pair in zip(value, got, strict=True) if pair[0] != pair[1])
                elif key == "trainable":
                    value, got = (f"{len(v)} parameters" for v in (value, got))
                raise CheckpointError(
                    f"{folder}: {key}: expected {value} as in this run, got {got}; resume with the same dtype, "
                    "optimizer and trained parameters, or start a run from the exported model"
                )
        return SavedEngine(folder, saved["zero_stage"], saved["world_size"], self.numels)

    def load(self, folder: Path) -> None:
        """Restore the exact state saved by `save`.

        If it was saved with another number of ranks or another ZeRO stage, it is redistributed. Values are the same,
        and later steps are equal up to rounding.

        Raises:
            CheckpointError: as `saved_states`, or the state has 8-bit moments and was saved with another number of
                ranks or ZeRO stage.
        """
        stored = self.saved_states(folder)
        masters = self.masters()
        part = stored.part(masters, self.zero_stage, self.world.size, self.world.rank)
        params = dict(self.module.named_parameters())
        with torch.no_grad(), self.replaced_parts():
            for name, target in self._weights().items():
                if name in params:
                    start, length = self._held(params[name])
                    target.view(-1)[:length].copy_(stored.weight(name, start, length))
                else:
                    target.copy_(stored.buffer(name))
            for i, master in enumerate(masters):
                master.copy_(part[f"master.{i}"])
                _restore_state(self.engine.basic_optimizer, master, part, f"state.{i}.")
        self.discard()

    def _held(self, param: nn.Parameter) -> tuple[int, int]:
        """Return the first element and the number of elements of a parameter that this rank holds."""
        if self.zero_stage != 3:
            return 0, param.numel()
        part = param.ds_tensor.numel()
        start = min(self.world.rank * part, param.ds_numel)
        return start, min(part, param.ds_numel - start)

    @contextmanager
    def replaced_parts(self) -> Iterator[None]:
        """Let the caller change this rank's parts of the weights inside the context. All ranks must leave together.

        ZeRO-3 keeps whole copies of small parameters, and of those that it has used last, which would hide the changes.
        They are released at first, and those of small parameters gathered again at the end.
        """
        if self.zero_stage != 3:
            yield
            return
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        available = [p for p in self.module.parameters() if p.ds_status == ZeroParamStatus.AVAILABLE]
        for param in available:
            param.ds_active_sub_modules.clear()
        if available:
            available[0].partition(available)
        yield
        persistent = list(self.engine.optimizer.persistent_parameters)
        if persistent:
            persistent[0].all_gather(persistent)

    def part_name(self) -> str:
        """Return the name of the file that holds this rank's states."""
        return f"rank_{0 if self.zero_stage == 0 else self.world.rank:05d}.safetensors"

    def layout(self) -> dict[str, Any]:
        """Return what describes saved states, the contents of `engine.json`."""
        return {
            "world_size": self.world.size,
            "zero_stage": self.zero_stage,
            "dtype": self.dtype,
            "optimizer": self.optimizer,
            "elements": sum(self.numels),
            "trainable": self.names,
        }

    def _weights(self) -> dict[str, Tensor]:
        """Return the parameters to save (under ZeRO-3, this rank's part of each) and buffers, by name."""
        part, trained = self.zero_stage == 3, set(self.names)
        named = [(name, p) for name, p in self.module.named_parameters() if self.save_frozen or name in trained]
        return {name: p.ds_tensor.data if part else p.data for name, p in named} | dict(self.module.named_buffers())

    def masters(self) -> list[Tensor]:
        """Return the float32 tensors that AdamW updates; under ZeRO 1 to 3, this rank's flattened part."""
        if self.zero_stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self.engine.basic_optimizer.param_groups for p in group["params"]]


def release_memory() -> None:
    """Free the engines of a stage that has ended. They hold reference cycles, and the next stage needs the memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gradients_finite(engines: Sequence[Engine]) -> bool:
    """Return whether all losses and gradients since the last step or discard are finite, in all engines on all ranks.

    The global norm of each engine's gradients must be finite too. Call this after the last backward and before any
    engine's `step`. It runs one collective and waits for the device once, regardless of the number of engines.

    Raises:
        RuntimeError: gradients arrived for different parameters, or in a different order, on different ranks. ZeRO 1
            to 3 have then summed gradients of different parameters.
    """
    values = {f"{name} {i}": value for i, engine in enumerate(engines) for name, value in engine.watched().items()}
    most = global_max(values, engines[0].world)
    for i, engine in enumerate(engines):
        if engine.zero_stage > 0 and most[f"high {i}"] != -most[f"low {i}"]:
            raise RuntimeError(
                "backward: expected the same modules in the same order on all ranks, got different ones; run filler "
                "rows with a zero loss if a rank has no samples of a kind, or set runtime.zero_stage=0"
            )
    return all(most[f"bad {i}"] == 0 for i in range(len(engines)))


def _restore_state(optimizer: torch.optim.Optimizer, master: Tensor, part: dict[str, Tensor], prefix: str) -> None:
    """Restore AdamW's saved state of one tensor, in place if state exists, because DeepSpeed holds views of it."""
    saved = {k.removeprefix(prefix): v for k, v in part.items() if k.startswith(prefix)}
    current = optimizer.state.get(master, {})
    # bitsandbytes counts its steps in a Python number.
    torchs_own = "fused" in optimizer.defaults
    for key, value in saved.items():
        if key == "step" and not torchs_own:
            optimizer.state[master][key] = int(value)
        elif key in current:
            current[key].copy_(value)
        else:
            # Fused AdamW keeps its step count on the device of the weights, the default AdamW in host memory.
            on_host = key == "step" and not optimizer.defaults["fused"]
            optimizer.state[master][key] = value if on_host else value.to(master.device)
    for key in current.keys() - saved.keys():
        # The state was saved before the first step, and AdamW starts with zeros. The table of the values that 8 bits
        # stand for does not change.
        if key == "step" and not torchs_own:
            current[key] = 0
        elif not key.startswith("qmap"):
            current[key].zero_()


def _adamw(name: str, params: list[nn.Parameter], weight_decay: float, fused: bool | None) -> torch.optim.Optimizer:
    """Return an optimizer with a learning rate of 0: DeepSpeed may take a step while it is initialized."""
    if name == "adamw":
        return torch.optim.AdamW(params, lr=0.0, weight_decay=weight_decay, fused=fused)
    return import_adamw_8bit()(params, lr=0.0, weight_decay=weight_decay)


def import_adamw_8bit() -> type[torch.optim.Optimizer]:
    """Return the 8-bit AdamW of bitsandbytes, or raise NotInstalled."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise NotInstalled(
            f"runtime.optimizer=adamw_8bit: expected the package bitsandbytes, got none ({error}); run pip install "
            "'rmsd-fast[quantize]', or set runtime.optimizer=adamw"
        ) from error
    return AdamW8bit


def _unpartition(module: nn.Module, whole: dict[str, Tensor]) -> None:
    """Give ordinary parameters to a module that ZeRO-3 had partitioned. Tied parameters stay tied."""
    fresh: dict[int, nn.Parameter] = {}
    for name, param in module.named_parameters():
        fresh[id(param)] = nn.Parameter(whole[name], requires_grad=param.requires_grad)
    for child in module.modules():
        child._parameters = {k: None if p is None else fresh[id(p)] for k, p in dict.items(child._parameters)}


def _check(zero_stage: int, dtype: str, offload_optimizer: bool, optimizer: str, trainable: int) -> None:
    if zero_stage not in (0, 1, 2, 3):
        raise SettingsError(f"runtime.zero_stage: expected 0, 1, 2 or 3, got {zero_stage!r}")
    if dtype not in ("float32", "bfloat16"):
        raise SettingsError(f"model.dtype: expected float32 or bfloat16, got {dtype!r}")
    if offload_optimizer and zero_stage == 0:
        raise SettingsError(
            "runtime.zero_stage: expected 1, 2 or 3 with runtime.offload_optimizer, got 0; raise the stage or switch "
            "offloading off"
        )
    if optimizer not in ("adamw", "adamw_8bit"):
        raise SettingsError(f"runtime.optimizer: expected adamw or adamw_8bit, got {optimizer!r}")
    if trainable == 0:
        raise SettingsError("model: expected one or more parameters with requires_grad, got none")


def _config(numel: int, zero_stage: int, grad_clip: float, dtype: str, offload_optimizer: bool) -> dict[str, Any]:
    """Return DeepSpeed's settings, with 1 accumulation step because `backward(last=...)` handles the accumulation."""
    bucket = min(numel + numel % 2, LARGEST_BUCKET)  # DeepSpeed requires an even number.
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": PERSISTENT_NUMEL,
        "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(grad_clip),
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if zero_stage > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
