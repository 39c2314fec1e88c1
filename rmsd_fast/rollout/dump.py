"""Write and read a dump of rollouts: a folder with `dump.json` and one file per step.

A step's file is `step_<number>.safetensors`. Steps are counted from 0 over warm-up and stage 2, like
`Rollout.policy_version`. The questions are in the order of the step's batch over all processes, so the file does not
depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rmsd_fast.config import SettingsError, first_line
from rmsd_fast.data.errors import DataError
from rmsd_fast.files import replacing, write_all, write_text_atomic
from rmsd_fast.rollout.base import Rollout

FORMAT = 1
INFO = "dump.json"
_STEP_FILE = re.compile(r"step_(\d{6,})\.safetensors")
# Columns of a step's file, with their dtypes. A column has one value per question, per rollout, or per token.
_OF_QUESTIONS = {"rollouts": torch.int32}
_OF_ROLLOUTS = {
    **{"index": torch.int32, "tokens": torch.int32, "truncated": torch.bool, "policy_version": torch.int32},
    # NaN = the engine did not know it.
    "banned_mass": torch.float32,
}
_OF_TOKENS = {"token_ids": torch.int32, "logp": torch.float32}
# Without the header of a file, and the questions.
BYTES_PER_ROLLOUT, BYTES_PER_TOKEN = 17, 8


@dataclass(frozen=True)
class DumpInfo:
    """Description of a dump.

    Attributes:
        run: name of the run folder.
        student: hashes of the files of the student with which warm-up and stage 2 began, by name.
        student_path: where that student was.
        questions: hash of the file with the training questions.
        settings: settings on which the rollouts depend, by name.
    """

    run: str
    student: dict[str, str]
    student_path: str
    questions: str
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash of everything on which the rollouts depend. Every step's file has it."""
        text = json.dumps([self.student, self.questions, self.settings], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class PackedRollouts:
    """The rollouts of a step.

    Attributes:
        questions: question ids, [G]. An id occurs twice if the step has the question twice.
        columns: tensors by name, on the CPU: `rollouts` [G]; the columns of `_OF_ROLLOUTS` [R];
            `token_ids` and `logp` [T].
    """

    questions: list[str]
    columns: dict[str, torch.Tensor]


def pack(groups: Sequence[Sequence[Rollout]]) -> PackedRollouts:
    """Return the rollouts of one or more questions in columns."""
    rollouts = [rollout for group in groups for rollout in group]
    values = {
        "rollouts": [len(group) for group in groups],
        "index": [rollout.index for rollout in rollouts],
        "tokens": [len(rollout.token_ids) for rollout in rollouts],
        "truncated": [rollout.truncated for rollout in rollouts],
        "policy_version": [rollout.policy_version for rollout in rollouts],
        "banned_mass": [math.nan if rollout.banned_mass is None else rollout.banned_mass for rollout in rollouts],
    }
    columns = {
        name: torch.tensor(values[name], dtype=dtype) for name, dtype in {**_OF_QUESTIONS, **_OF_ROLLOUTS}.items()
    }
    for name, dtype in _OF_TOKENS.items():
        columns[name] = torch.cat([getattr(rollout, name) for rollout in rollouts]).to(dtype)
    return PackedRollouts([group[0].question_id for group in groups], columns)


def join(parts: Sequence[PackedRollouts]) -> PackedRollouts:
    """Return the rollouts of several processes, in their order."""
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    return PackedRollouts([question for part in parts for question in part.questions], columns)


def unpack(packed: PackedRollouts, place: int, decode) -> list[Rollout]:
    """Return the rollouts of the question at a place of the step.

    Args:
        packed: rollouts of the step.
        place: index of the question.
        decode: function that returns the text of token ids, int64 [R].
    """
    columns = packed.columns
    first = int(columns["rollouts"][:place].sum())
    rollouts = []
    for row in range(first, first + int(columns["rollouts"][place])):
        start = int(columns["tokens"][:row].sum())
        tokens = slice(start, start + int(columns["tokens"][row]))
        ids = columns["token_ids"][tokens].long()
        banned = float(columns["banned_mass"][row])
        rollouts.append(
            Rollout(
                question_id=packed.questions[place],
                index=int(columns["index"][row]),
                token_ids=ids,
                text=decode(ids),
                logp=columns["logp"][tokens].clone(),
                truncated=bool(columns["truncated"][row]),
                policy_version=int(columns["policy_version"][row]),
                banned_mass=None if math.isnan(banned) else banned,
            )
        )
    return rollouts


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.safetensors"


def dumped_steps(folder: Path) -> list[int]:
    """Return the steps in a folder, ascending."""
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _STEP_FILE.fullmatch(path.name)))


def write_step(folder: Path, step: int, packed: PackedRollouts, key: str) -> None:
    """Write the rollouts of a step, and sync them to disk. Readers see either the whole file or none.

    Args:
        folder: the dump.
        step: rollout step, counted from 0 over warm-up and stage 2.
        packed: rollouts of all processes.
        key: `DumpInfo.key` of the dump.
    Raises:
        OSError: the disk is full or fails. An earlier file of this step is then unchanged.
    """
    from safetensors.torch import save

    description = {"format": FORMAT, "step": step, "dump": key, "questions": packed.questions}
    # One entry, because safetensors writes several in random order.
    text = json.dumps({**description, "checksum": _checksum(description, packed.columns)})
    content = save(packed.columns, {"step": text})
    path = step_file(folder, step)
    try:
        with replacing(path) as file:
            write_all(file, content)
    except OSError as error:
        # Errors of writing and syncing do not name a file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_step(folder: Path, step: int, key: str) -> PackedRollouts:
    """Read the rollouts of a step and check them.

    Args:
        folder: the dump.
        step: rollout step, counted from 0 over warm-up and stage 2.
        key: `DumpInfo.key` of the dump.
    Raises:
        DataError: the file is missing, damaged or from another dump.
    """
    from safetensors import safe_open

    path = step_file(folder, step)
    if not path.is_file():
        raise DataError(f"{path}: expected the rollouts of a step, got no file; restore it, or replay fewer steps")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("step", "{}"))
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum = description.pop("checksum", "")
        if description.get("format") != FORMAT:
            raise ValueError(f"format {description.get('format')} instead of {FORMAT}")
        if checksum != _checksum(description, columns):
            raise ValueError("its content does not have its checksum")
        packed = PackedRollouts(description["questions"], columns)
        _check_sizes(packed)
    # The exception type of safetensors is derived from Exception directly.
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path}: damaged ({first_line(error)}); restore the file, or write the dump again") from error
    if (description["step"], description["dump"]) != (step, key):
        raise DataError(
            f"{path}: expected step {step} of this dump, got step {description['step']} of "
            f"{'this' if description['dump'] == key else 'another'} dump; restore the file, or write the dump again"
        )
    return packed


def _check_sizes(packed: PackedRollouts) -> None:
    columns = packed.columns
    expected = {**_OF_QUESTIONS, **_OF_ROLLOUTS, **_OF_TOKENS}
    if {name: column.dtype for name, column in columns.items()} != expected:
        raise ValueError(f"expected the columns {', '.join(expected)}")
    rollouts, tokens = int(columns["rollouts"].sum()), int(columns["tokens"].sum())
    sizes = dict.fromkeys(_OF_QUESTIONS, len(packed.questions))
    sizes |= dict.fromkeys(_OF_ROLLOUTS, rollouts) | dict.fromkeys(_OF_TOKENS, tokens)
    for name, size in sizes.items():
        if len(columns[name]) != size:
            raise ValueError(f"{name}: expected {size} values, got {len(columns[name])}")


def _checksum(description: Mapping[str, Any], columns: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(json.dumps(sorted(description.items())).encode(), digest_size=16)
    for name in sorted(columns):
        digest.update(name.encode())
        digest.update(memoryview(columns[name].contiguous().numpy()).cast("B"))
    return digest.hexdigest()


def write_info(folder: Path, info: DumpInfo) -> None:
    write_text_atomic(folder / INFO, json.dumps({"format": FORMAT, **vars(info)}, indent=1) + "\n")


def read_info(folder: Path, setting: str) -> DumpInfo:
    """Read the description of a dump.

    Args:
        folder: the dump.
        setting: setting that names the folder, for messages.
    Raises:
        SettingsError: the folder is missing or not a dump.
        DataError: the description is damaged.
    """
    path = folder / INFO
    if not path.is_file():
        what = f"a folder without {INFO}" if folder.is_dir() else "no folder"
        raise SettingsError(
            f"{setting}: expected a folder that a run has written with rollout.dump, got {what} at {folder}; check the "
            "path"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record.pop("format")
        if version != FORMAT:
            raise ValueError(f"format {version} instead of {FORMAT}")
        info = DumpInfo(**record)
        if not isinstance(info.student, dict) or not isinstance(info.settings, dict):
            raise ValueError("student and settings are not objects")
        return info
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({first_line(error)}); restore the file, or write the dump again") from error
