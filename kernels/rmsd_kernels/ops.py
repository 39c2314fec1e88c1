"""Shared code of all ops: records as arguments, the dtype of sums, and the handling of autocast and backward."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of computations after the GEMM, and of results."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(op: Callable) -> Callable:
    """Wrap an op so that it computes in the dtypes of its inputs. Autocast would change the dtype of some GEMMs."""

    @functools.wraps(op)
    def run(tensor: Tensor, *arguments):
        with torch.autocast(tensor.device.type, enabled=False):
            return op(tensor, *arguments)

    return run


_SUMS_LOCK = threading.Lock()
_sums_inside, _sums_before = 0, []


@contextmanager
def full_precision_sums() -> Iterator[None]:
    """Sum products of 16-bit matrices on CUDA in float32; by default cuBLAS may add partial sums in 16 bits.

    The flags are global to the process: the first thread that enters saves them, and the last thread that leaves
    restores them.
    """
    global _sums_inside, _sums_before
    with _SUMS_LOCK:
        _sums_inside += 1
        if _sums_inside == 1:
            _sums_before = [get() for get, _ in _reduction_flags()]
        for (_, set_flags), flags in zip(_reduction_flags(), _sums_before, strict=True):
            set_flags(*(False for _ in _as_tuple(flags)))
    try:
        yield
    finally:
        with _SUMS_LOCK:
            _sums_inside -= 1
            if not _sums_inside:
                for (_, set_flags), flags in zip(_reduction_flags(), _sums_before, strict=True):
                    set_flags(*_as_tuple(flags))


def _reduction_flags() -> list[tuple[Callable, Callable]]:
    """Return (getter, setter) for bfloat16 and float16. The attributes of torch.backends hide the second flag."""
    names = ("cublas_allow_bf16_reduced_precision_reduction", "cublas_allow_fp16_reduced_precision_reduction")
    return [(getattr(torch._C, f"_get_{name}"), getattr(torch._C, f"_set_{name}")) for name in names]


def _as_tuple(flags: bool | tuple[bool, ...]) -> tuple[bool, ...]:
    """Return the flags in the format of the setter. Older torch has one flag, and its getter returns a bool."""
    return flags if isinstance(flags, tuple) else (flags,)


class RecordOp:
    """A torch.library op for a function whose arguments are records (NamedTuples), tensors and plain values.

    The op's schema has one argument per field of a record, named record_field. The op and its fake implementation are
    called by keyword with the function's own arguments, so arguments that several ops share are listed only once, in
    their record.
    """

    def __init__(self, function: Callable, name: str, mutates: tuple[str, ...]) -> None:
        hints = get_type_hints(function)
        self._records = {name: _record(hints[name]) for name in inspect.signature(function).parameters}
        self.__doc__, self.__name__ = function.__doc__, function.__name__
        fields = [field for argument, record in self._records.items() for field in _fields(argument, record)]

        def flat(*values):
            return function(**self._grouped(values))

        flat.__signature__ = inspect.Signature(
            [inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=k) for field, k in fields],
            return_annotation=hints["return"],
        )
        self.op = torch.library.custom_op(f"rmsd_kernels::{name}", flat, mutates_args=mutates)

    def __call__(self, **arguments):
        return self.op(*self.values(**arguments))

    def values(self, **arguments) -> list:
        """Return the arguments as a flat list for the op."""
        if arguments.keys() != self._records.keys():
            expected, got = sorted(self._records), sorted(arguments)
            raise TypeError(f"{self.__name__}: expected the arguments {expected}, got {got}")
        values = []
        for name, record in self._records.items():
            _flatten(record, arguments[name], values)
        return values

    def register_fake(self, fake: Callable) -> None:
        """Register the function that returns the op's outputs for tensors without data."""
        self.op.register_fake(lambda *values: fake(**self._grouped(values)))

    def _grouped(self, values: tuple) -> dict:
        remaining = iter(values)
        return {name: _build(record, remaining) for name, record in self._records.items()}


def record_op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable], RecordOp]:
    """Return a decorator that converts a function to a RecordOp."""
    return lambda function: RecordOp(function, name, mutates)


class _Record(NamedTuple):
    """The type of a record, and the type or nested record of each field. `flat` means that no field is a record."""

    kind: type
    fields: dict[str, Any]
    flat: bool


def _record(kind: Any) -> Any:
    if not (isinstance(kind, type) and hasattr(kind, "_fields")):
        return kind
    fields = {name: _record(field) for name, field in get_type_hints(kind).items()}
    return _Record(kind, fields, not any(isinstance(field, _Record) for field in fields.values()))


def _fields(name: str, record: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and type of every value."""
    if not isinstance(record, _Record):
        yield name, record
        return
    for field, inner in record.fields.items():
        yield from _fields(f"{name}_{field}", inner)


def _build(record: Any, values: Iterator) -> Any:
    if not isinstance(record, _Record):
        return next(values)
    if record.flat:
        return record.kind(*islice(values, len(record.fields)))
    return record.kind(*(_build(inner, values) for inner in record.fields.values()))


def _flatten(record: Any, value: Any, into: list) -> None:
    if not isinstance(record, _Record):
        into.append(value)
    elif type(value) is not record.kind:
        raise TypeError(f"expected a {record.kind.__name__}, got {type(value).__name__}")
    elif record.flat:
        into.extend(value)
    else:
        for inner, field in zip(record.fields.values(), value, strict=True):
            _flatten(inner, field, into)


def first_order(backward: Callable) -> Callable:
    """Make a backward raise under create_graph=True: autograd treats its result as constant, so terms would be lost."""

    @functools.wraps(backward)
    def run(ctx, *gradients):
        # In backward, grad mode is on only under create_graph=True, and always while torch.compile traces.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fused losses have no second derivatives (create_graph=True); use impl='reference' for them"
            )
        return backward(ctx, *gradients)

    return run
