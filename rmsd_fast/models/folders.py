"""Model folders of the Qwen3-VL family: finding, checking and completing them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rmsd_fast.config import ModelError
from rmsd_fast.data.chat_template import (
    END_TOKEN,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    response_opening,
)
from rmsd_fast.data.preprocess import Preprocessor

FAMILIES = ("qwen3_vl",)
# What a folder has to hold; weights as safetensors only, so that nothing is unpickled.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


def find_folder(path: str | Path) -> Path | None:
    """Local folder of a model: the path itself, or the Hub snapshot of that name; None where it is not downloaded yet.

    Raises:
        ModelError: neither a folder nor a name that the Hub could know.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ModelError(
            f"model.path: expected a model directory or a Hub name such as Qwen/Qwen3-VL-4B-Instruct, got {name!r}, "
            "which does not exist here"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES), local_files_only=True))
    # LocalEntryNotFoundError is a FileNotFoundError.
    except (OSError, HFValidationError):
        return None


def resolve_folder(path: str | Path) -> Path:
    """Local folder of a model, downloaded from the Hub where it is not here yet.

    Raises:
        ModelError: there is no such model, or it cannot be downloaded.
    """
    folder = find_folder(path)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name = str(path)
    try:
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES)))
    # LocalEntryNotFoundError and OfflineModeIsEnabled are OSErrors (FileNotFoundError, ConnectionError).
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        offline = " HF_HUB_OFFLINE is set: unset it to download." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelError(
            f"model.path: {name!r} is not a local directory and could not be downloaded from the Hub "
            f"({first_line(error)}).{offline} Without a network, copy the model here and give its directory"
        ) from error


def check_family(folder: Path) -> None:
    """Raise ValueError, naming the family found, unless config.json is that of a supported family."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: expected a model directory with config.json, found none; check model.path")
    try:
        family = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: not readable as a model configuration ({first_line(error)})") from error
    if family not in FAMILIES:
        raise ModelError(
            f"{folder}: expected a model of family {' or '.join(FAMILIES)}, got {family!r}; "
            "give model.path a Qwen3-VL model, e.g. Qwen/Qwen3-VL-4B-Instruct"
        )


def check_folder(folder: Path) -> str:
    """Refuse a model folder that a run could not use, without loading its weights.

    Returns:
        What its chat template opens a response with: "", or `<think>` and a line break.
    Raises:
        ModelError: it is of another family, or its rope settings, tokenizer or chat template cannot be right.
    """
    check_family(folder)
    check_rope(folder)
    return response_opening(load_tokenizer(folder))


def check_rope(folder: Path) -> None:
    """Raise ModelError unless config.json gives exactly one rope theta and one set of rope settings for the text model.

    transformers 4.57 spells them `rope_theta` and `rope_scaling`, versions 5 `rope_parameters`. If theta is missing,
    the versions assume different values (5e6 and 5e5). If the spellings disagree, they follow different ones.
    """
    path = folder / "config.json"
    text = json.loads(path.read_text(encoding="utf-8")).get("text_config") or {}
    new, old = text.get("rope_parameters") or {}, text.get("rope_scaling") or {}
    thetas = [theta for theta in (text.get("rope_theta"), new.get("rope_theta"), old.get("rope_theta")) if theta]
    if len(set(thetas)) != 1:
        raise ModelError(
            f"{path}: expected one rope theta, as text_config.rope_theta or in text_config.rope_parameters, "
            f"got {thetas or 'none'}; restore the settings of the original model"
        )
    new, old = ({key: value for key, value in rope.items() if key != "rope_theta"} for rope in (new, old))
    if new and old and new != old:
        raise ModelError(
            f"{path}: expected the same settings in text_config.rope_parameters and text_config.rope_scaling, "
            f"got {new} and {old}; change both, or remove one of them"
        )


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer with chat template and padding token. Raises ValueError naming what is missing."""
    # Without these files transformers builds a tokenizer that knows no words, and says nothing.
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ModelError(
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, found neither; restore them"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # tokenizers raises bare Exception for a damaged tokenizer.json.
    except Exception as error:
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded ({first_line(error)}); "
            "restore tokenizer.json and tokenizer_config.json"
        ) from error
    vocabulary = tokenizer.get_vocab()
    missing = [
        token for token in (END_TOKEN, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD) if token not in vocabulary
    ]
    if missing:
        raise ModelError(
            f"{folder}: the tokenizer lacks {', '.join(missing)}; use the tokenizer of the Qwen3-VL family"
        )
    # Processors keep their template in these files; where a tokenizer carries another one, theirs counts.
    legacy = folder / "chat_template.json"
    if not (folder / "chat_template.jinja").is_file() and legacy.is_file():
        tokenizer.chat_template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder}: the tokenizer has no chat template; copy chat_template.jinja from the original model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = "<|endoftext|>" if "<|endoftext|>" in vocabulary else END_TOKEN
    return tokenizer


def write_preprocessor(preprocessor: Preprocessor, folder: Path) -> None:
    """Write `video_preprocessor_config.json` and `preprocessor_config.json` in the format of transformers.

    The pixel budgets in them are those of the Qwen3-VL family; a run's own budgets are settings of the run.
    """
    common = {
        "patch_size": preprocessor.patch_size,
        "temporal_patch_size": preprocessor.temporal_patch_size,
        "merge_size": preprocessor.merge_size,
        "image_mean": list(preprocessor.image_mean),
        "image_std": list(preprocessor.image_std),
    }
    image = {
        **common,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    video = {
        **common,
        "size": {"shortest_edge": 4096, "longest_edge": 25165824},
        "processor_class": "Qwen3VLProcessor",
        "video_processor_type": "Qwen3VLVideoProcessor",
        # `video_size` limits frames too. transformers before 5.16 ignores the setting and does not limit them.
        "cap_pixels_per_frame": True,
    }
    for name, settings in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type where there is none."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
