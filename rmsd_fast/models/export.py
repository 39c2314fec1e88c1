"""Write exports: model folders that transformers 4.57 and all later versions read identically, with a model card.

Versions 5 write the files. Version 4.57 differs from them in four ways (tests/models/test_export_versions.py):

- 4.57 does not know `rope_parameters`. It reads `rope_theta` (default 5e6) and fails if `rope_scaling` is missing.
- 4.57 fails if `extra_special_tokens` is a list. All versions read the list under the name `additional_special_tokens`.
- 4.57 does not know the tokenizer class `TokenizersBackend`. All versions know its older name
    `PreTrainedTokenizerFast`.
- If `generation_config.json` says that it was derived from the model, 4.57 derives it again.

Versions 5.5 to 5.16 also warn about the rope type `axial`, which later versions write for the vision tower.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rmsd_fast.config import ModelError, VideoConfig
from rmsd_fast.files import os_errors_of_safetensors, staged_folder
from rmsd_fast.models.adapters import ADAPTER_FOLDER, POLICY, adapted_layers, merged_weights, write_adapter
from rmsd_fast.models.folders import write_preprocessor
from rmsd_fast.models.model_card import is_export, model_card
from rmsd_fast.models.students import Student

# The rope settings of the vision tower. Older versions hard-code them; 5.17 and later use them if config.json has none.
VISION_ROPE = {"rope_theta": 10000.0, "rope_type": "axial"}


def export_student(
    student: Student,
    folder: str | Path,
    *,
    base_model: str = "",
    stage: str = "",
    video: VideoConfig | None = None,
    adapter_base: str = "",
) -> None:
    """Write a folder that plain transformers loads: weights, config, tokenizer, chat template, preprocessor, README.

    Adapters are merged into the weights, and also written alone, to the folder `adapter`.
    The folder is created atomically, and replaces an earlier export at the same path. The same arguments write the same
    bytes.

    Args:
        student: student to write.
        folder: folder to write to.
        base_model: path or Hub name of the model that training began with, as given by the user; for the README.
        stage: stage of training that produced the student; for the README.
        video: how training read its media; for the README.
        adapter_base: the model that the adapter was trained on, for `adapter_config.json`. Not used if the backbone is
            quantized, since the student then holds its base.
    Raises:
        ModelError: the folder holds files that are not an export of a student.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with staged_folder(folder, replace=True) as staged:
        fill_export(student, staged, base_model=base_model, stage=stage, video=video, adapter_base=adapter_base)


def check_replaceable(folder: Path) -> None:
    """Raise ModelError if a folder holds files that are not an export."""
    # A folder with config.json may be the base model or contain the user's files.
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not is_export(folder))):
        raise ModelError(
            f"{folder}: expected no folder, an empty one or an earlier export (recognized by its README.md), got other "
            "files; choose another folder"
        )


def fill_export(
    student: Student,
    folder: Path,
    *,
    base_model: str = "",
    stage: str = "",
    video: VideoConfig | None = None,
    adapter_base: str = "",
) -> None:
    """Write the files of `export_student` into an empty folder, which the caller later moves into place."""
    adapted = bool(adapted_layers(student.model))
    write_model(student, folder, merged_weights(student.model, POLICY) if adapted else None)
    if adapted:
        write_adapter(student, POLICY, folder / ADAPTER_FOLDER, base_model=adapter_base)
    card = model_card(student.family, base_model=base_model, stage=stage, video=video)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_model(student: Student, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write weights, settings, tokenizer and preprocessor in the form that all versions of transformers read.

    Args:
        student: the student.
        folder: an empty folder.
        weights: the weights to write by name; None = those of the student's model.
    """
    with os_errors_of_safetensors(folder):
        student.model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    student.tokenizer.save_pretrained(folder)
    write_preprocessor(student.preprocessor, folder, student.family)
    make_portable(folder, eos_id=student.eos_id)
    share_weights(folder)


def share_weights(folder: Path) -> None:
    """Make the weights of a folder as readable as its config.json."""
    # safetensors creates files that only their owner can read, but a server may run under another account.
    mode = (folder / "config.json").stat().st_mode & 0o777
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)


def make_portable(folder: Path, *, eos_id: int) -> None:
    """Rewrite the settings that `save_pretrained` wrote to a folder so that 4.57 reads them as versions 5 do.

    Args:
        folder: folder with config.json, generation_config.json and tokenizer_config.json.
        eos_id: id of the token that ends a response and must stop generation.
    """
    _edit(folder / "config.json", _spell_rope_twice)
    _edit(folder / "tokenizer_config.json", _name_special_tokens_for_both)
    _edit(folder / "generation_config.json", lambda settings: _end_responses(settings, eos_id))


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    change(settings)
    # Same format as save_pretrained.
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _spell_rope_twice(config: dict[str, Any]) -> None:
    text, vision = config["text_config"], config["vision_config"]
    rope = text["rope_parameters"]
    text["rope_theta"] = rope["rope_theta"]
    # Versions 5 prefer this to rope_parameters. 4.57 warns if rope_theta is inside.
    text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if vision.get("rope_parameters") == VISION_ROPE:
        del vision["rope_parameters"]


def _name_special_tokens_for_both(config: dict[str, Any]) -> None:
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # These keys describe how this process loaded the tokenizer.
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)


def _end_responses(settings: dict[str, Any], eos_id: int) -> None:
    ids = settings.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids] if ids is not None else []
    if eos_id not in ids:
        settings["eos_token_id"] = [eos_id, *ids]
    # With this key, 4.57 ignores the token ids in this file and uses the ids in config.json.
    settings.pop("_from_model_config", None)
