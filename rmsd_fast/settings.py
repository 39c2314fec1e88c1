"""Read, check and print settings: a YAML recipe, then `section.field=value` overrides, into a `RunConfig`."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rmsd_fast.config import RECIPES, RunConfig, SettingsError
from rmsd_fast.files import write_text_atomic
from rmsd_fast.setting_rules.training import check_together
from rmsd_fast.setting_rules.useless import is_evaluated, refuse_training_settings, refuse_useless

# Settings of earlier versions, and their replacements.
RENAMED = {
    "sft.micro_batch": "micro_tokens",
    "distill.micro_batch": "micro_tokens",
    "distill.micro_prompts": "micro_tokens",
    "sft.target": "sft.responses=best, all or random",
    "teacher.quality": "teacher.weighting=quality or uniform, and teacher.filter",
}
# Settings of earlier versions that have no replacement.
REMOVED = {
    "distill.objective": "the control of stage 2 is a stage; set stages=[sft,control], or add control to the stages",
    "teacher.spatial_format": "box coordinates always range from 0 to 1000 of the picture's width and height, as the "
    "prompt says, because the student sees resized frames, not the file's pixels; convert ground truths in pixels "
    "(1000 * pixels / width, 1000 * pixels / height) and leave the setting out",
}
# Removed settings that said how questions are read, with the value that still holds.
FORMER_READING = {"teacher.spatial_format": "relative"}
# Settings whose values are paths.
PATHS = [
    "output",
    "data.train",
    "data.heldout",
    "data.media_root",
    "data.disk_cache",
    "teacher.pool",
    "model.path",
    "made.folder",
    "rollout.dump",
    "rollout.replay",
]
# Settings that say how to read questions and teacher answers.
POOL_SETTINGS = (
    "data.format",
    "data.task_type",
    "data.media_root",
    "data.follow_symlinks",
    "teacher.parse",
    "teacher.numeric_metric",
    "teacher.numeric_eps",
    "teacher.ocr_metric",
    "teacher.unlabeled",
)
# Settings whose values are objects with keys of the user's choice.
FREE = ("collect.extra_body", "evaluate.judge.extra_body", "self_teacher.judge.extra_body")


@functools.cache
def _rules(owner: type, prefix: str = "") -> dict[str, Mapping[str, Any]]:
    rules: dict[str, Mapping[str, Any]] = {}
    for item in fields(owner):
        if is_dataclass(item.default_factory):
            rules |= _rules(item.default_factory, f"{prefix}{item.name}.")
        elif item.metadata:
            rules[f"{prefix}{item.name}"] = item.metadata
    return rules


# Choices or bounds of each setting, by key: the metadata of its field.
RULES = _rules(RunConfig)


def load_settings(
    recipe: str,
    overrides: Iterable[str] = (),
    *,
    resumed: bool = False,
    schema: type[RunConfig] = RunConfig,
    folders: Sequence[Path] = (RECIPES,),
    trains: bool = True,
) -> RunConfig:
    """Read and check a recipe and its overrides, and return the run's settings.

    Args:
        recipe: path of a YAML file, or the name of a recipe of the package (`quickstart`); "" = all defaults. A recipe
            may start with `base: <recipe>` and then overrides that recipe.
        overrides: `section.field=value` strings.
        resumed: whether the file was saved by a run, possibly of an earlier version; missing keys get their defaults.
        schema: RunConfig, or a dataclass that adds sections to it.
        folders: folders in which recipes are found by name.
        trains: whether the program trains. One that does not accepts settings of training in a file, such as
            config.yaml of a run, also those of earlier versions, and refuses them as overrides.
    Returns:
        The settings.
    Raises:
        SettingsError: the recipe cannot be read, a key is unknown, a value has the wrong type or range, or a setting
            has no effect.
    """
    overrides = list(overrides)
    defaults = _defaults(schema)
    from_recipe, own_keys, is_saved = (
        _read_recipe(recipe, folders, defaults) if recipe else (OmegaConf.create({}), [], False)
    )
    if not trains:
        from_recipe, own_keys = _without_former(from_recipe, own_keys, defaults, recipe, is_saved=is_saved)
    merged = _merge(defaults, from_recipe, where=f"recipe {recipe}")
    _check(OmegaConf.to_object(merged), trains=trains)
    # Only settings that the recipe sets itself must have an effect, not settings of its base, and not those that a run
    # has saved. The section `evaluate` is useful without held-out questions, because rmsd_fast.evaluate reads the same
    # file and accepts data.heldout on its command line.
    if not resumed and not is_saved:
        checked_keys = [key for key in own_keys if not key.startswith("evaluate.") and (trains or is_evaluated(key))]
        refuse_useless(OmegaConf.to_object(merged), checked_keys, where=f"recipe {recipe}", trains=trains)
    for override in overrides:
        if "=" not in override:
            raise SettingsError(f"override {override!r}: expected section.field=value, e.g. distill.steps=20")
    try:
        from_user = OmegaConf.from_dotlist(overrides)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise SettingsError(f"overrides {overrides}: {' '.join(str(error).split())}") from None
    _refuse_references(from_user, "override")
    merged = _merge(merged, from_user, where="override")
    settings = OmegaConf.to_object(merged)
    if not trains:
        refuse_training_settings(settings, _keys(from_user))
    _check(settings, trains=trains)
    refuse_useless(settings, _keys(from_user), where="override", trains=trains)
    return settings


@functools.cache
def _defaults(schema: type[RunConfig]) -> DictConfig:
    """Return the defaults of all settings, which nobody may change."""
    return OmegaConf.structured(schema)


def save_settings(settings: RunConfig, path: Path) -> None:
    """Write the settings as YAML that `load_settings` can read."""
    write_text_atomic(path, to_yaml(settings))


def to_yaml(settings: RunConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(settings))


def settings_as_dict(settings: RunConfig) -> dict:
    """Return a nested dict of all settings, for fingerprints and JSON."""
    return OmegaConf.to_container(OmegaConf.structured(settings))


def describe_settings(
    schema: type = RunConfig, sections: Sequence[str] = (), read: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Return the text of `--help`: all settings with default and documentation.

    Args:
        schema: the settings.
        sections: only these sections; () = all settings.
        read: names of the settings to describe, by section; other sections are described as a whole.
    """
    lines, read = [], read or {}
    for owner in fields(schema):
        if is_dataclass(owner.default_factory) and (not sections or owner.name in sections):
            cls = owner.default_factory
            lines.append(f"\n{owner.name}: {inspect.getdoc(cls)}")
            lines += _describe_fields(cls, prefix=f"{owner.name}.", names=read.get(owner.name))
    return "\n".join(([] if sections else _describe_fields(schema, prefix="")) + lines)


def _describe_fields(cls: type, prefix: str, names: Sequence[str] | None = None) -> list[str]:
    documents = _field_documents(cls)
    default = cls()
    lines = [
        f"  {prefix}{f.name}={_as_yaml(getattr(default, f.name))}\n"
        + textwrap.fill(documents[f.name], 110, initial_indent="      ", subsequent_indent="      ")
        for f in fields(cls)
        if f.name in documents and (names is None or f.name in names)
    ]
    nested = [f for f in fields(cls) if prefix and names is None and is_dataclass(f.default_factory)]
    for f in nested:
        lines += _describe_fields(f.default_factory, f"{prefix}{f.name}.")
    return lines


def _as_yaml(value: object) -> str:
    """Return a default in the notation of the command line."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def _field_documents(cls: type) -> dict[str, str]:
    """Return the string that follows each field in the source of a class, by field."""
    documents: dict[str, str] = {}
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    for item, after in zip(node.body, node.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(item, ast.AnnAssign) and is_text:
            documents[item.target.id] = " ".join(after.value.value.split())
    return documents


def _read_recipe(
    recipe: str, folders: Sequence[Path], defaults: DictConfig, seen: tuple[str, ...] = ()
) -> tuple[DictConfig, list[str], bool]:
    """Return a recipe merged onto its base, the keys that the recipe sets itself, and whether a run has saved it."""
    path = Path(recipe)
    # Path.is_file would raise for names that are too long.
    if not os.path.isfile(path):
        name = recipe if recipe.endswith(".yaml") else f"{recipe}.yaml"
        path = next((folder / name for folder in folders if os.path.isfile(folder / name)), path)
    if not os.path.isfile(path):
        names = ", ".join(sorted(p.stem for folder in folders for p in folder.glob("*.yaml")))
        raise SettingsError(f"recipe {recipe!r}: no such file; give a YAML file or one of: {names}")
    if str(path) in seen:
        raise SettingsError(f"recipe {recipe}: 'base' refers back to itself: {' -> '.join((*seen, str(path)))}")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:
        raise SettingsError(f"recipe {path}: not readable as YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise SettingsError(f"recipe {path}: expected sections with settings, got a {type(loaded).__name__}")
    _refuse_references(loaded, f"recipe {path}")
    base = loaded.pop("base", None)
    own_keys = _keys(loaded)
    if base is None:
        # A run saves all settings of its version, and a recipe names a few.
        return loaded, own_keys, 2 * len(own_keys) > len(_keys(defaults))
    beside = path.parent / str(base)
    below = str(beside) if beside.is_file() else str(base)
    base_settings, _, _ = _read_recipe(below, folders, defaults, (*seen, str(path)))
    return OmegaConf.merge(base_settings, loaded), own_keys, False


def _without_former(
    recipe: DictConfig, own_keys: list[str], schema: DictConfig, name: str, *, is_saved: bool
) -> tuple[DictConfig, list[str]]:
    """Return a recipe of rmsd_fast.evaluate without settings of training that this version does not know.

    They are named in a warning. In a file that a person wrote, a name that resembles a setting of evaluations is kept,
    to be refused.

    Args:
        recipe: the recipe.
        own_keys: keys that the file sets itself.
        schema: all settings.
        name: name of the recipe for the message.
        is_saved: whether a run has saved the file.
    """
    known = set(_keys(schema))
    former = []
    for key in _keys(recipe):
        if _is_known(key, known) or is_evaluated(key) or _changes_reading(recipe, key):
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        if is_saved or key in RENAMED or key in REMOVED or not close or not is_evaluated(close[0]):
            former.append(key)
    if not former:
        return recipe, own_keys
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"recipe {name}: warning: ignored settings that this version does not know and that only mattered in "
            f"training: {', '.join(former)}",
            file=sys.stderr,
        )
    container = OmegaConf.to_container(recipe)
    for key in former:
        *sections, last = key.split(".")
        del functools.reduce(lambda node, section: node[section], sections, container)[last]
    return OmegaConf.create(container), [key for key in own_keys if key not in former]


def _changes_reading(recipe: DictConfig, key: str) -> bool:
    """Return whether a removed setting has a value that means another reading of the questions."""
    return key in FORMER_READING and OmegaConf.select(recipe, key) != FORMER_READING[key]


def _is_known(key: str, known: set[str]) -> bool:
    return key in known or any(name.startswith(key + ".") for name in known)


def _merge(schema: DictConfig, changes: DictConfig, where: str) -> DictConfig:
    known, keys = set(_keys(schema)), _keys(changes)
    _refuse_unknown(keys, known, where)
    for key in keys:
        # `data.heldout=` and `data.heldout: null` both mean an empty value.
        if OmegaConf.select(changes, key) is None and isinstance(OmegaConf.select(schema, key), str):
            OmegaConf.update(changes, key, "")
        # YAML reads a bare `on` or `off` as true or false.
        value = OmegaConf.select(changes, key)
        rules = _rules(OmegaConf.get_type(schema))
        if isinstance(value, bool) and "on" in rules.get(key, {}).get("choices", ()):
            OmegaConf.update(changes, key, "on" if value else "off")
    try:
        return OmegaConf.merge(schema, changes)
    except OmegaConfBaseException as error:
        raise SettingsError(f"{where}: {_wrong_kind(schema, changes) or str(error).splitlines()[0]}") from None


# By type of the default; optional settings are numbers.
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "a number or null",
}


def _wrong_kind(schema: DictConfig, changes: DictConfig) -> str:
    """Return a message about the first setting whose value is of another kind than expected; "" if there is none."""
    for key in (*OmegaConf.to_container(changes), *_keys(changes)):
        value = OmegaConf.select(changes, key)
        try:
            OmegaConf.merge(schema, _nested(key, value))
        except OmegaConfBaseException:
            default = OmegaConf.select(schema, key)
            if isinstance(default, DictConfig) and is_dataclass(OmegaConf.get_type(default)):
                if isinstance(value, DictConfig):
                    continue
                example = next(f"{key}.{name}=…" for name in default)
                return f"{key}: expected settings below it, got {value}; write e.g. {example}"
            if OmegaConf.is_list(default):
                expected, example = "a list", f"[{value}]" if _is_plain(value) else _as_yaml(list(default))
            elif OmegaConf.is_dict(default):
                expected, example = "a mapping", "{name: value}"
            else:
                expected = _KINDS[type(default)]
                example = _as_yaml(default)
            return f"{key}: expected {expected}, got {_as_yaml(value)}; set e.g. {key}={example}"
    return ""


def _nested(key: str, value: object) -> DictConfig:
    nested = OmegaConf.create({})
    OmegaConf.update(nested, key, value, force_add=True)
    return nested


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _refuse_unknown(keys: Sequence[str], known: set[str], where: str) -> None:
    """Raise for all keys that are not settings, with the setting that may be meant by each."""
    faults = []
    for key in keys:
        if key in REMOVED:
            faults.append(f"{key} was removed: {REMOVED[key]}")
        elif not _is_known(key, known):
            close = [RENAMED[key]] if key in RENAMED else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "--help lists all settings"
            faults.append(f"unknown setting {key}; {hint}")
    if len(faults) == 1:
        raise SettingsError(f"{where}: {faults[0]}")
    if faults:
        raise SettingsError(
            f"{where}: {len(faults)} settings are unknown to this version; delete or rename them (in a copy, if a run "
            "wrote the file):\n" + "\n".join(f"  {fault}" for fault in faults)
        )


def _refuse_references(changes: DictConfig, where: str) -> None:
    """Raise for references that OmegaConf would resolve, which could copy environment secrets into run files."""

    def check(value: object, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                check(item, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list):
            for item in value:
                check(item, key)
        elif isinstance(value, str) and "${" in value:
            raise SettingsError(
                f"{where}: {key}: expected a value, got the reference {value!r}; write the value itself"
            )

    check(OmegaConf.to_container(changes, resolve=False), "")


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and f"{prefix}{name}" not in FREE:
            keys += _keys(child, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _values(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all settings with their keys."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            yield from _values(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def _value(settings: RunConfig, key: str):
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def _check_value(key: str, value: object, rule: Mapping[str, Any]) -> None:
    """Raise for a value outside of its field's choices or bounds; an optional value may be None."""
    choices = rule.get("choices")
    if choices and value not in choices:
        if key == "distill.kl" and value == "k1":
            raise SettingsError(
                "distill.kl=k1: expected k2, k3 or full, because the gradient of k1 as a loss is zero in expectation; "
                "set reward.kl_in_reward=<weight> for k1 as a reward"
            )
        named = ", ".join(str(choice) or "empty" for choice in choices)
        raise SettingsError(f"{key}: expected one of {named}, got {value!r}")
    if choices or value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{key}: expected a finite number, got {value}")
    least, above, most = (rule[name] for name in ("least", "above", "most"))
    if (least is None or value >= least) and (above is None or value > above) and (most is None or value <= most):
        return
    if least is not None and most is not None:
        expected = f"{least} to {most}"
    else:
        low = f"at least {least}" if least is not None else f"a number above {above}"
        expected = low if most is None else f"{low} and at most {most:g}"
    raise SettingsError(f"{key}: expected {expected}, got {value}")


def _check(settings: RunConfig, *, trains: bool) -> None:
    for key, rule in _rules(type(settings)).items():
        _check_value(key, _value(settings, key), rule)
    for key, value in _values(settings):
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise SettingsError(f"{key}: expected text without NUL and unpaired surrogates, got {value!r}")
    for key in PATHS:
        if _value(settings, key).startswith("~"):
            raise SettingsError(
                f"{key}: expected a path, got {_value(settings, key)!r}, in which '~' is not expanded; write the "
                "absolute path, or a path relative to the current folder"
            )
    check_together(settings, trains=trains)
