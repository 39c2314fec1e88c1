"""Reads, checks and prints settings: a YAML recipe, then `section.field=value` overrides, into a `RunConfig`."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import os
import textwrap
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rmsd_fast import config as config_module
from rmsd_fast.config import FORMATS, RECIPES, STAGES, RunConfig, SettingsError
from rmsd_fast.files import write_text_atomic
from rmsd_fast.method.answers import TASK_TYPES

CHOICES = {
    "packing": ("shared", "padded"),
    "made.source": ("clips", "real_clips"),
    "model.dtype": ("bfloat16", "float32"),
    "model.attention": ("sdpa", "eager", "flash_attention_2"),
    "model.liger": ("auto", "on", "off"),
    "data.decoder": ("auto", "cpu", "cuda"),
    "data.format": FORMATS,
    "data.task_type": ("auto", *TASK_TYPES),
    "teacher.parse": ("strict", "natural"),
    "teacher.quality": ("metric", "uniform"),
    "teacher.numeric_metric": ("epsilon", "mra"),
    "teacher.ocr_metric": ("wer", "anls"),
    "evaluate.parse": ("strict", "natural"),
    "sft.schedule": ("cosine", "constant"),
    "sft.responses": ("best", "all", "random"),
    "discriminator.pairing": ("expected", "sampled"),
    "discriminator.normalizer": ("pairs", "quality"),
    "reward.normalization": ("gn_then_sum", "sum_then_gn"),
    "distill.schedule": ("cosine", "constant"),
    "distill.objective": ("policy", "sft"),
    "distill.kl": ("k2", "k3", "full"),
    "distill.aggregation": ("token_mean", "sequence_mean"),
    "runtime.zero_stage": (0, 1, 2, 3),
}
# Settings of earlier versions and what to write instead.
RENAMED = {
    "sft.micro_batch": "micro_tokens",
    "distill.micro_batch": "micro_tokens",
    "distill.micro_prompts": "micro_tokens",
    "sft.target": "sft.responses=best, all or random",
}
# Settings of earlier versions that nothing replaces.
REMOVED = {
    "teacher.spatial_format": "boxes are always from 0 to 1000 of the picture's width and height, as the prompt says: "
    "the student sees resized frames, never the file's pixels; convert ground truths in pixels "
    "(1000 * pixels / width, 1000 * pixels / height) and leave the setting out",
}
# Settings that are paths.
PATHS = [
    "output",
    "data.train",
    "data.heldout",
    "data.media_root",
    "data.disk_cache",
    "teacher.pool",
    "model.path",
    "made.folder",
]
# Lowest and highest value of the other numbers; None = no bound. Optional ones may be null.
COUNT, NUMBER, SHARE, ABOVE_0 = (1, None), (0, None), (0, 1), (1e-12, None)
RANGES = {
    COUNT: "sft.steps sft.batch_size distill.steps distill.batch_size rollout.n micro_tokens "
    "rollout.max_new_tokens rollout.prompts_per_batch rollout.log_questions teacher.responses evaluate.max_new_tokens "
    "evaluate.prompts_per_batch data.decode_threads data.max_file_mib data.max_prompt_tokens checkpoint.keep "
    "runtime.max_skipped_steps "
    "made.train_clips made.heldout_clips made.responses made.student_layers "
    "video.min_video_pixels video.max_video_pixels video.max_frame_pixels video.min_image_pixels "
    "video.max_image_pixels",
    NUMBER: "sft.lr sft.warmup_steps sft.weight_decay discriminator.lr discriminator.warm_up_steps "
    "discriminator.warm_up_lr discriminator.score_l2 distill.lr distill.warmup_steps distill.weight_decay "
    "distill.kl_coef reward.alpha reward.beta reward.eta reward.delta reward.kl_in_reward runtime.grad_clip "
    "teacher.numeric_eps data.cache_mib data.decode_ahead data.embedding_cache_mib checkpoint.every_steps "
    "rollout.log_every_steps "
    "evaluate.max_questions evaluate.samples",
    SHARE: "teacher.min_quality teacher.max_unanswered_share data.max_bad_share made.teacher_error_rate",
    ABOVE_0: "rollout.temperature distill.tis_cap distill.sequence_mask_cap reward.score_clip video.fps",
    (1e-12, 86400): "data.decode_timeout_s",
    (1e-12, 1e6): "data.disk_cache_gib",
    (2, None): "video.num_frames video.min_frames video.max_frames evaluate.num_frames",
    (1, 6): "made.questions_per_clip",
    (0, 2**32 - 1): "seed made.seed",
}


def load_settings(recipe: str, overrides: Iterable[str] = (), *, resumed: bool = False) -> RunConfig:
    """Read a recipe and its overrides, check them, return the run's settings.

    Args:
        recipe: path of a YAML file, or the name of a recipe of the package (`quickstart`); "" = all defaults. A recipe
            may start with `base: <recipe>`: it then changes that one.
        overrides: `section.field=value` strings.
        resumed: the file was saved by a run, perhaps of an earlier version: keys that it lacks get their defaults.
    Raises:
        SettingsError: unreadable recipe, unknown key, value of the wrong type or range, setting without effect.
    """
    overrides = list(overrides)
    schema = OmegaConf.structured(RunConfig)
    from_recipe, own_keys = _read_recipe(recipe) if recipe else (OmegaConf.create({}), [])
    merged = _merge(schema, from_recipe, where=f"recipe {recipe}")
    _check(OmegaConf.to_object(merged))
    # What a recipe takes over from its base may be of no use to it; what it writes itself must be. A file with all
    # settings was saved by a run. How to evaluate is useful without held-out questions: rmsd_fast.evaluate takes the
    # same file, with data.heldout on its command line.
    if not resumed and set(own_keys) != set(_keys(schema)):
        checked_keys = [key for key in own_keys if not key.startswith("evaluate.")]
        _refuse_useless(OmegaConf.to_object(merged), checked_keys, where=f"recipe {recipe}")
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
    _check(settings)
    _refuse_useless(settings, _keys(from_user), where="override")
    return settings


def save_settings(settings: RunConfig, path: Path) -> None:
    """Write the settings as YAML that `load_settings` reads back."""
    write_text_atomic(path, to_yaml(settings))


def to_yaml(settings: RunConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(settings))


def settings_as_dict(settings: RunConfig) -> dict:
    """Plain nested dict of all settings, for fingerprints and JSON."""
    return OmegaConf.to_container(OmegaConf.structured(settings))


def uses_reference(settings: RunConfig) -> bool:
    """Whether stage 2 scores its rollouts with the stage-1 student."""
    policy = "distill" in settings.stages and settings.distill.objective == "policy"
    return policy and (settings.distill.kl_coef > 0 or settings.reward.kl_in_reward > 0)


def uses_discriminator(settings: RunConfig) -> bool:
    """Whether this run trains a discriminator at all (the reward gives it weight, and the policy is rewarded)."""
    late = "warm_up" in settings.stages or "distill" in settings.stages
    return late and settings.reward.alpha > 0 and settings.distill.objective == "policy"


def uses_frozen_tower(settings: RunConfig) -> bool:
    """Whether any stage encodes media apart from the training passes, with a tower that does not change."""
    late = {"warm_up", "distill"} & set(settings.stages)
    imitates = {"sft": settings.sft} if "sft" in settings.stages else {}
    imitates |= {"distill": settings.distill} if late and settings.distill.objective == "sft" else {}
    frozen = [not stage.train_vision and settings.runtime.zero_stage < 3 for stage in imitates.values()]
    return any(frozen) or bool(late and settings.distill.objective == "policy" and not settings.distill.train_vision)


def check_room(settings: RunConfig, response: int, what: str) -> None:
    """Raise SettingsError where the longest prompt and a response of so many tokens do not fit one forward pass."""
    longest = settings.data.max_prompt_tokens + response
    if settings.micro_tokens < longest:
        raise SettingsError(
            f"micro_tokens: expected room for data.max_prompt_tokens={settings.data.max_prompt_tokens} and {what} "
            f"({response} tokens) together, {longest}, got {settings.micro_tokens}; raise it, or lower these"
        )


def describe_settings() -> str:
    """All settings with type, default and documentation, for `--help`."""
    lines = []
    for owner in fields(RunConfig):
        if is_dataclass(owner.default_factory):
            cls = owner.default_factory
            lines.append(f"\n{owner.name}: {inspect.getdoc(cls)}")
            lines += _describe_fields(cls, prefix=f"{owner.name}.")
    return "\n".join(_describe_fields(RunConfig, prefix="") + lines)


def _describe_fields(cls: type, prefix: str) -> list[str]:
    documents = _field_documents()[cls.__name__]
    default = cls()
    return [
        f"  {prefix}{f.name}={_as_yaml(getattr(default, f.name))}\n"
        + textwrap.fill(documents[f.name], 110, initial_indent="      ", subsequent_indent="      ")
        for f in fields(cls)
        if f.name in documents
    ]


def _as_yaml(value: object) -> str:
    """A default as it would be written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _field_documents() -> dict[str, dict[str, str]]:
    """The string that follows each field in config.py, by class and field."""
    documents: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(config_module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        found = documents.setdefault(node.name, {})
        for item, after in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(item, ast.AnnAssign) and is_text:
                found[item.target.id] = " ".join(after.value.value.split())
    return documents


def _read_recipe(recipe: str, seen: tuple[str, ...] = ()) -> tuple[DictConfig, list[str]]:
    """A recipe merged onto its base, and the keys that it writes itself."""
    path = Path(recipe)
    # Not by Path.is_file, which raises for names that are too long.
    if not os.path.isfile(path):
        path = RECIPES / (recipe if recipe.endswith(".yaml") else f"{recipe}.yaml")
    if not os.path.isfile(path):
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise SettingsError(f"recipe {recipe!r}: no such file; give a YAML file or one of: {known}")
    if str(path) in seen:
        raise SettingsError(f"recipe {recipe}: 'base' leads back to itself: {' -> '.join((*seen, str(path)))}")
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
        return loaded, own_keys
    beside = path.parent / str(base)
    under, _ = _read_recipe(str(beside) if beside.is_file() else str(base), (*seen, str(path)))
    return OmegaConf.merge(under, loaded), own_keys


def _merge(schema: DictConfig, given: DictConfig, where: str) -> DictConfig:
    known = set(_keys(schema))
    for key in _keys(given):
        if key in REMOVED:
            raise SettingsError(f"{where}: {key} was removed: {REMOVED[key]}")
        if key not in known and not any(name.startswith(key + ".") for name in known):
            close = [RENAMED[key]] if key in RENAMED else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else "; --help lists all settings"
            raise SettingsError(f"{where}: unknown setting {key}{hint}")
        # `data.heldout=` and `data.heldout: null` both mean: none given.
        if OmegaConf.select(given, key) is None and isinstance(OmegaConf.select(schema, key), str):
            OmegaConf.update(given, key, "")
        # YAML reads a bare `on` or `off` as true or false.
        value = OmegaConf.select(given, key)
        if isinstance(value, bool) and "on" in CHOICES.get(key, ()):
            OmegaConf.update(given, key, "on" if value else "off")
    try:
        return OmegaConf.merge(schema, given)
    except OmegaConfBaseException as error:
        raise SettingsError(f"{where}: {error.full_key}: {str(error).splitlines()[0]}") from None


def _refuse_references(given: DictConfig, where: str) -> None:
    """Refuse values that OmegaConf would look up: whoever writes a recipe could have secrets of the environment copied
    into the files of a run.
    """

    def look(value: object, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                look(item, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list):
            for item in value:
                look(item, key)
        elif isinstance(value, str) and "${" in value:
            raise SettingsError(
                f"{where}: {key}: expected a value, got the reference {value!r}; write the value itself"
            )

    look(OmegaConf.to_container(given, resolve=False), "")


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            found += _keys(child, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def _value(settings: RunConfig, key: str):
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


def _check(settings: RunConfig) -> None:
    for key, choices in CHOICES.items():
        if _value(settings, key) not in choices:
            if key == "distill.kl" and settings.distill.kl == "k1":
                raise SettingsError(
                    "distill.kl=k1: as a loss its gradient is zero in expectation; write reward.kl_in_reward=<weight> "
                    "for k1 as a reward, or distill.kl=k2, k3 or full"
                )
            allowed = ", ".join(map(str, choices))
            raise SettingsError(f"{key}: expected one of {allowed}, got {_value(settings, key)!r}")
    for key in _keys(OmegaConf.structured(settings)):
        value = _value(settings, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{key}: expected a finite number, got {value}")
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise SettingsError(f"{key}: expected text without NUL and half characters, got {value!r}")
    for key in PATHS:
        if _value(settings, key).startswith("~"):
            raise SettingsError(
                f"{key}: expected a path, got {_value(settings, key)!r}, in which '~' is not expanded; write the whole "
                "path, or one relative to the current folder"
            )
    for (low, high), keys in RANGES.items():
        for key in keys.split():
            value = _value(settings, key)
            # Written so that NaN fails too.
            if value is not None and not (value >= low and (high is None or value <= high)):
                expected = f"at least {low}" if high is None else f"{low} to {high}"
                raise SettingsError(f"{key}: expected {expected if low != 1e-12 else 'a number above 0'}, got {value}")
    if settings.stages != [s for s in STAGES if s in settings.stages] or not settings.stages:
        raise SettingsError(
            f"stages: expected some of {list(STAGES)}, in this order, got {settings.stages}; e.g. stages=[sft]"
        )
    if "warm_up" in settings.stages and not uses_discriminator(settings):
        raise SettingsError(
            "stages: warm_up trains the discriminator, and with reward.alpha=0 or distill.objective=sft there is none; "
            "leave it out, e.g. stages=[sft,distill]"
        )
    video = settings.video
    if (video.num_frames is None) == (video.fps is None):
        raise SettingsError(
            "video.num_frames and video.fps exclude each other: write video.num_frames=null with video.fps=2, "
            f"or video.fps=null with video.num_frames=16 (got {video.num_frames} and {video.fps})"
        )
    for low, high in (
        ("min_frames", "max_frames"),
        ("min_video_pixels", "max_video_pixels"),
        ("min_image_pixels", "max_image_pixels"),
    ):
        least, most = getattr(video, low), getattr(video, high)
        if least > most:
            raise SettingsError(f"video.{low}={least}: expected at most video.{high}={most}; change one of them")
    if {"warm_up", "distill"} & set(settings.stages) and settings.distill.objective == "policy":
        # The discriminator reads rollouts that were cut with an end token.
        check_room(settings, settings.rollout.max_new_tokens + 1, "a rollout of rollout.max_new_tokens and its end")
    if not settings.name or "/" in settings.name:
        raise SettingsError(f"name: expected a folder name without '/', got {settings.name!r}")


def _refuse_useless(settings: RunConfig, given: list[str], where: str) -> None:
    """Raise for a setting that was written but changes nothing in the chosen mode."""
    stages, distill = settings.stages, settings.distill
    late = "warm_up" in stages or "distill" in stages
    control = distill.objective == "sft"
    warm_up, judged = "warm_up" in stages, uses_discriminator(settings)
    own_clips = settings.made.enabled and settings.made.source == "clips"
    # (settings, whether they have no effect, why and what to write); a name that ends in "." is a whole section
    rules = [
        (["sft."], "sft" not in stages and not control, "stage sft is not in stages; add it to stages"),
        (
            [f"distill.{f.name}" for f in fields(distill) if f.name not in ("batch_size", "train_vision")],
            "distill" not in stages,
            "stage distill is not in stages; add it to stages",
        ),
        (["distill."], not late, "no stage uses it; add warm_up or distill to stages"),
        (["reward."], late and "distill" not in stages, "the warm-up pays no rewards; add distill to stages"),
        (["reward.score_clip"], not judged, "no discriminator is trained; give reward.alpha > 0"),
        (["model.attention"], settings.packing == "shared", "shared prompts have their own; write packing=padded"),
        (
            ["teacher.min_quality"],
            not judged or settings.teacher.quality == "uniform",
            "it filters what the discriminator is matched with, by a quality that is not uniform",
        ),
        (
            ["made.student_hidden", "made.student_layers"],
            bool(settings.model.path),
            "model.path names the student",
        ),
        (
            ["made.responses", "made.teacher_error_rate"],
            bool(settings.teacher.pool),
            "teacher.pool names the pool",
        ),
        (["rollout.", "reward."], not late, "no stage makes rollouts; add warm_up or distill to stages"),
        (
            [
                "reward.",
                "rollout.",
                "distill.kl",
                "distill.kl_coef",
                "distill.tis_cap",
                "distill.sequence_mask_cap",
                "distill.aggregation",
            ],
            control,
            "distill.objective=sft imitates T_best without rollouts; write distill.objective=policy",
        ),
        (
            ["rollout.log_questions"],
            settings.rollout.log_every_steps == 0,
            "rollout.log_every_steps is 0, so no rollouts are written; write rollout.log_every_steps=10",
        ),
        (["distill.kl"], distill.kl_coef == 0, "distill.kl_coef is 0; give it a weight"),
        (
            [f"sft.{f.name}" for f in fields(settings.sft) if f.name != "responses"],
            "sft" not in stages,
            "stage sft is not in stages; the control takes distill.* for it",
        ),
        (["discriminator."], not uses_discriminator(settings), "no discriminator is trained; give reward.alpha > 0"),
        (
            ["discriminator.warm_up_steps", "discriminator.warm_up_lr"],
            not warm_up,
            "stage warm_up is not in stages; add it to stages",
        ),
        (["discriminator.lr"], "distill" not in stages, "stage distill is not in stages; add it to stages"),
        (
            [f"made.{f.name}" for f in fields(settings.made) if f.name != "enabled"],
            not settings.made.enabled,
            "nothing is made; write made.enabled=true",
        ),
        (
            ["made.train_clips", "made.heldout_clips", "made.questions_per_clip"],
            not own_clips,
            "the real clips are what they are; write made.source=clips",
        ),
        (
            ["video.min_frames", "video.max_frames"],
            settings.video.num_frames is not None,
            "they bound video.fps, and video.num_frames is given",
        ),
        (
            ["evaluate."],
            not settings.data.heldout and not settings.made.enabled,
            "there is nothing to evaluate on; give data.heldout",
        ),
        (["data.task_type"], settings.data.format == "rmsd", "records of our own format name their task type"),
        (["data.disk_cache_gib"], not settings.data.disk_cache, "there is no data.disk_cache; name a folder"),
        (
            ["data.embedding_cache_mib"],
            not uses_frozen_tower(settings),
            "embeddings are kept only where the vision tower is frozen, and not in stage 1 under ZeRO-3; set "
            "distill.train_vision=false or sft.train_vision=false",
        ),
        (["teacher.numeric_eps"], settings.teacher.numeric_metric != "epsilon", "teacher.numeric_metric is mra"),
        (["runtime.offload_optimizer"], settings.runtime.zero_stage == 0, "ZeRO-0 keeps it; use runtime.zero_stage=2"),
    ]
    for prefixes, useless, reason in rules:
        for key in given:
            if useless and any(key == name or (name.endswith(".") and key.startswith(name)) for name in prefixes):
                raise SettingsError(f"{where}: {key} has no effect: {reason}, or leave {key} out")
