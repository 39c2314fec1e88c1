"""Find, check and complete the model folders of students."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from rmsd_fast.config import ModelError, first_line
from rmsd_fast.data.chat_template import (
    END_TOKEN,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    response_opening,
)
from rmsd_fast.data.media_paths import is_number
from rmsd_fast.data.preprocess import Preprocessor, load_preprocessor
from rmsd_fast.files import file_digest
from rmsd_fast.models.families import Family, family_of

# Files that are read from a folder. Weights must be safetensors, so that nothing is unpickled.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "adapter/*.json", "adapter/*.safetensors")
# File of a discriminator that a student does not have.
VALUE_HEAD = "value_head.safetensors"
MOST_HASHED_AT_ONCE = 4


def find_folder(path: str | Path, *, setting: str = "model.path") -> Path | None:
    """Return the local folder of a model: the path itself or a downloaded Hub snapshot. None if it is not downloaded.

    Args:
        path: local folder, or name of a model on the Hub.
        setting: the setting with the path, for messages.
    Raises:
        ModelError: the path is neither a folder nor a valid Hub name.
    """
    folder = Path(path)
    if os.path.isdir(folder):
        return folder
    name = str(path)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ModelError(
            f"{setting}: expected a model directory or a Hub name such as Qwen/Qwen3-VL-4B-Instruct, got {name!r}, "
            "which does not exist; check the path"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES), local_files_only=True))
    # LocalEntryNotFoundError is a FileNotFoundError.
    except (OSError, HFValidationError):
        return None


def resolve_folder(path: str | Path, *, setting: str = "model.path") -> Path:
    """Return the local folder of a model, downloading it from the Hub if necessary. Arguments are as in `find_folder`.

    Raises:
        ModelError: the model does not exist or cannot be downloaded.
    """
    folder = find_folder(path, setting=setting)
    # An interrupted download is continued.
    if folder is not None and (Path(path).is_dir() or not missing_weights(folder)):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name = str(path)
    try:
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES)))
    # LocalEntryNotFoundError and OfflineModeIsEnabled are OSErrors (FileNotFoundError, ConnectionError).
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        offline = " unset HF_HUB_OFFLINE to download it;" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelError(
            f"{setting}: {name!r} is not a local directory and could not be downloaded from the Hub "
            f"({first_line(error)});{offline} without a network, copy the model here and give its directory"
        ) from error


def read_family(folder: Path) -> Family:
    """Return the family of the model in a folder. Raise ModelError, naming it, if it is not supported."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: expected a model directory with config.json, got none; check the path")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: expected a model configuration ({first_line(error)}); restore the file") from error
    return family_of(config, str(folder))


@dataclass(frozen=True)
class ModelFolder:
    """The contents of a model folder except for its weights.

    Attributes:
        path: the folder.
        config: model configuration.
        tokenizer: tokenizer with chat template and padding token.
        preprocessor: settings for videos and images.
        response_opening: text that the chat template adds at the start of a response: "", or `<think>` and a line
            break.
    """

    path: Path
    config: PreTrainedConfig
    tokenizer: Any
    preprocessor: Preprocessor
    response_opening: str


def open_folder(path: Path, *, discriminator: bool = False) -> ModelFolder:
    """Read a model folder and check that a run can use it. Of the weights, only the headers are read.

    Args:
        path: the folder.
        discriminator: whether a discriminator is expected, and not a student.
    Raises:
        ModelError: the model is of an unsupported family, files are missing or damaged, they belong to different
            models, or the folder holds a student instead of a discriminator or the reverse.
    """
    family = read_family(path)
    if (path / VALUE_HEAD).is_file() != discriminator:
        raise ModelError(
            f"{path}: expected a discriminator with {VALUE_HEAD}, got none; use the folder discriminator/ of a run "
            "with discriminator.export=true"
            if discriminator
            else f"{path}: expected a student, got a discriminator ({VALUE_HEAD}), which only scores responses; use "
            "the folder export/ of the run"
        )
    _check_rope(path, family)
    _check_weights(path)
    _check_generation(path)
    try:
        config = family.config_class.from_pretrained(path, local_files_only=True)
    # A value of the wrong type can raise any exception.
    except Exception as error:
        raise ModelError(
            f"{path / 'config.json'}: expected a configuration of a {family.title} model ({first_line(error)}); "
            "restore it"
        ) from error
    preprocessor, tokenizer = load_preprocessor(path), load_tokenizer(path, family.title)
    _check_agreement(path, config, preprocessor, tokenizer)
    return ModelFolder(path, config, tokenizer, preprocessor, response_opening(tokenizer, family.title))


def missing_weights(folder: Path) -> list[str]:
    """Return the names of the safetensors files that are missing from a model folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [] if (folder / "model.safetensors").is_file() else ["model.safetensors"]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(name for name in names if not (folder / name).is_file())
    # TypeError: a name is not a string.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index}: expected an index of the weights ({first_line(error)}); download it again"
        ) from error


def _check_weights(folder: Path) -> None:
    """Raise ModelError if weights are missing or shorter than their headers say."""
    if missing := missing_weights(folder):
        only_bin = any(folder.glob("*.bin"))
        raise ModelError(
            f"{folder}: expected weights in {missing[0]}, got {'only *.bin files' if only_bin else 'no such file'}; "
            + ("save the model with safe_serialization=True" if only_bin else "download or export the model again")
        )
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        # The exception type of safetensors is derived from Exception directly.
        except Exception as error:
            raise ModelError(f"{file}: damaged ({first_line(error)}); download or export the model again") from error


def _check_generation(folder: Path) -> None:
    """Raise ModelError if transformers would load the generation settings with a warning but refuse to save them."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True).validate(strict=True)
    # A value of the wrong type can raise any exception.
    except Exception as error:
        # The first line only says that there are errors. Each error has its own line, including advice.
        fault = next((line for line in str(error).splitlines() if line.startswith("- ")), first_line(error))
        raise ModelError(
            f"{path}: expected settings that transformers can save with an export, "
            f"got a fault in {fault.removeprefix('- ')}"
        ) from error


def _check_agreement(folder: Path, config: PreTrainedConfig, preprocessor: Preprocessor, tokenizer: Any) -> None:
    """Raise ModelError if the files of a folder belong to different models."""
    vision = config.vision_config
    for what, expected, got in (
        (
            "patch, temporal patch and merge size",
            (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size),
            (preprocessor.patch_size, preprocessor.temporal_patch_size, preprocessor.merge_size),
        ),
        (
            f"the ids of {IMAGE_PAD} and {VIDEO_PAD}",
            (config.image_token_id, config.video_token_id),
            tuple(tokenizer.convert_tokens_to_ids([IMAGE_PAD, VIDEO_PAD])),
        ),
        ("the family", family_of(config).preprocessing, preprocessor.family),
    ):
        if expected != got:
            raise ModelError(
                f"{folder}: {what}: expected {expected} as in config.json, got {got} in the preprocessor or tokenizer "
                "files; restore the files of one model"
            )
    if len(tokenizer) > config.text_config.vocab_size:
        raise ModelError(
            f"{folder}: expected at most {config.text_config.vocab_size} tokens in the tokenizer, as in config.json, "
            f"got {len(tokenizer)}; restore the files of one model"
        )


def _check_rope(folder: Path, family: Family) -> None:
    """Raise ModelError unless config.json gives exactly one rope theta and one set of rope settings for the text model.

    transformers 4.57 calls them `rope_theta` and `rope_scaling`, versions 5 call them `rope_parameters`. If theta is
    missing, the versions assume different values (5e6 and 5e5). If both names are present and disagree, the versions
    read different values.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    nested = "text_config" in config or not family.flat_text_config
    text = (config.get("text_config") or {}) if nested else config
    if not isinstance(text, dict):
        raise ModelError(f"{path}: text_config: expected an object, got {text!r}; restore the original file")
    new, old = text.get("rope_parameters") or {}, text.get("rope_scaling") or {}
    for name, rope in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(rope, dict):
            raise ModelError(f"{path}: {name}: expected an object, got {rope!r}; restore the original file")
    thetas = [theta for theta in (text.get("rope_theta"), new.get("rope_theta"), old.get("rope_theta")) if theta]
    for theta in thetas:
        if not is_number(theta):
            raise ModelError(f"{path}: rope_theta: expected a number, got {theta!r}; restore the original file")
    if len(set(thetas)) != 1:
        raise ModelError(
            f"{path}: expected one rope theta, as rope_theta or in rope_parameters of the language model, "
            f"got {thetas or 'none'}; restore the settings of the original model"
        )
    new, old = ({key: value for key, value in rope.items() if key != "rope_theta"} for rope in (new, old))
    if new and old and new != old:
        raise ModelError(
            f"{path}: expected the same settings in rope_parameters and rope_scaling of the language model, "
            f"got {new} and {old}; change both, or remove one of them"
        )


def load_tokenizer(folder: Path, family: str) -> Any:
    """Load a folder's tokenizer with chat template and padding token. Raise ModelError, naming what is missing.

    `family` is the name of the model's family in messages.
    """
    # Without these files, transformers silently builds a tokenizer with an empty vocabulary.
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ModelError(f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, got neither; restore them")
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
        raise ModelError(f"{folder}: the tokenizer lacks {', '.join(missing)}; use a tokenizer of the {family} family")
    # Processors keep their template in these files. It takes precedence over a template in the tokenizer.
    legacy = folder / "chat_template.json"
    if not (folder / "chat_template.jinja").is_file() and legacy.is_file():
        try:
            tokenizer.chat_template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{legacy}: expected a chat template ({first_line(error)}); restore the file") from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder}: the tokenizer has no chat template; copy chat_template.jinja from the original model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = "<|endoftext|>" if "<|endoftext|>" in vocabulary else END_TOKEN
    return tokenizer


def write_preprocessor(preprocessor: Preprocessor, folder: Path, family: Family) -> None:
    """Write `video_preprocessor_config.json` and `preprocessor_config.json` in the format of transformers.

    The files contain the pixel budgets of the family. A run's own budgets are settings of the run.
    """
    for name, settings in family.processor_files(preprocessor).items():
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def model_digests(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a student by name: weights, settings, tokenizer, template, preprocessors.

    Several files are hashed in parallel. A process hashes a file again only if it has changed.

    Raises:
        ModelError: a file cannot be read.
    """
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    with ThreadPoolExecutor(MOST_HASHED_AT_ONCE) as pool:
        try:
            names = (path.relative_to(folder).as_posix() for path in files)
            return dict(zip(names, pool.map(_digest, files), strict=True))
        except OSError as error:
            raise ModelError(f"{error.filename}: cannot be read ({error.strerror}); check the file") from error


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_of_state(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=1024)
def _digest_of_state(path: Path, *state: int) -> str:
    """Return the hash of a file. Its inode, size and times in `state` change whenever its content does."""
    return file_digest(path)
