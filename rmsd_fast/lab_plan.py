"""The plan of an ablation: a YAML file whose runs are all checked before the first one is trained."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from rmsd_fast.config import STUDENTS, RunConfig, SettingsError
from rmsd_fast.setting_rules.useless import refuse_useless
from rmsd_fast.settings import load_settings, settings_as_dict

PLANS = Path(__file__).parent / "plans"
KEYS = ("recipe", "settings", "seeds", "threads", "stage1", "arms", "comparisons")
ARM_KEYS = ("from", "settings", "prediction")
# Settings that the lab gives every run.
LAB_SETTINGS = ("seed", "made.seed", "output")
# Settings that do not change the result of a run. Its folder's name does not depend on them.
WITHOUT_EFFECT = ("output", "made.folder", "checkpoint.every_steps", "checkpoint.keep")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*")


@dataclass(frozen=True)
class Entry:
    """A stage-1 student or an arm: one training run per seed.

    Attributes:
        name: its name in the plan.
        start: name of the stage-1 student that it starts from; "" = the recipe's model.
        settings: its own settings, as overrides.
        prediction: the student whose answers are scored, one of STUDENTS.
        is_arm: False for a stage-1 student.
    """

    name: str
    start: str
    settings: tuple[str, ...]
    prediction: str
    is_arm: bool


@dataclass(frozen=True)
class Plan:
    """A plan whose structure has been checked.

    Attributes:
        path: its file.
        recipe: recipe of every run.
        settings: settings for every run, including those from the command line.
        seeds: seeds of the training runs.
        threads: CPU threads of a run.
        entries: stage-1 students, then arms, by name.
        comparisons: pairs of names.
    """

    path: Path
    recipe: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    threads: int
    entries: dict[str, Entry]
    comparisons: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Job:
    """One training run of the plan.

    Attributes:
        entry: stage-1 student or arm.
        seed: its seed.
        settings: all settings of the run.
        folder: its run folder. The name contains a hash of the settings, so a changed plan gets new folders.
        needs: the run whose `stage1/` it starts from, or None.
    """

    entry: Entry
    seed: int
    settings: RunConfig
    folder: Path
    needs: Job | None

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.entry.name}"


def read_plan(plan: str, *, overrides: Sequence[str] = (), seeds: Sequence[int] = ()) -> Plan:
    """Read a plan and check its structure.

    Args:
        plan: path of a YAML file, or name of a plan of the package.
        overrides: settings for every run, in addition to those of the plan.
        seeds: seeds to add to the seeds of the plan.
    Raises:
        SettingsError: the plan cannot be read, or one of its entries is wrong.
    """
    path = Path(plan) if os.path.isfile(plan) else PLANS / f"{plan.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in PLANS.glob("*.yaml")))
        raise SettingsError(f"plan {plan!r}: expected a YAML file, got none; give a file or one of: {names}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:
        raise SettingsError(
            f"{path}: expected YAML with distinct names, got: {' '.join(str(error).split())}; write settings with "
            "brackets in quotes, such as 'stages=[distill]'"
        ) from None
    _check_keys(content, KEYS, f"{path}")
    recipe = content.get("recipe", "")
    if not isinstance(recipe, str) or not recipe:
        raise SettingsError(f"{path}: recipe: expected a recipe, got {recipe!r}; write e.g. recipe: quickstart")
    beside = path.parent / recipe
    file = next((file for file in (beside, Path(recipe)) if os.path.isfile(file)), None)
    entries = _entries(content, path)
    threads = content.get("threads", 1)
    if type(threads) is not int or threads < 1:
        raise SettingsError(f"{path}: threads: expected a number of CPU threads, got {threads!r}; write threads: 1")
    return Plan(
        path=path,
        recipe=str(file.resolve()) if file else recipe,
        settings=(*_settings(content.get("settings"), f"{path}: settings"), *_allowed(overrides, "command line")),
        seeds=tuple(dict.fromkeys((*check_seeds(content.get("seeds", [0]), f"{path}: seeds"), *seeds))),
        threads=threads,
        entries=entries,
        comparisons=_comparisons(content.get("comparisons"), entries, path),
    )


def _check_keys(content: object, keys: Iterable[str], where: str) -> None:
    if not isinstance(content, dict):
        raise SettingsError(f"{where}: expected the keys {', '.join(keys)}, got {content!r}; write them as a mapping")
    for key in content:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            advice = f"did you mean {close[0]}?" if close else "leave it out"
            raise SettingsError(f"{where}: expected the keys {', '.join(keys)}, got {key!r}; {advice}")


def _settings(value: object, where: str) -> tuple[str, ...]:
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(item, str) and "=" in item for item in value):
        raise SettingsError(
            f"{where}: expected a list of section.field=value, got {value!r}; write e.g. [distill.steps=20]"
        )
    return _allowed(value, where)


def _allowed(settings: Iterable[str], where: str, taken: Iterable[str] = LAB_SETTINGS) -> tuple[str, ...]:
    for item in settings:
        if item.partition("=")[0] in taken:
            raise SettingsError(f"{where}: expected settings that the lab leaves to the plan, got {item}; leave it out")
    return tuple(settings)


def check_seeds(value: object, where: str) -> tuple[int, ...]:
    """Return the seeds. Raise SettingsError if they are not distinct, or if a setting does not accept one of them."""
    numbers = isinstance(value, list) and value and all(type(seed) is int and 0 <= seed < 2**32 for seed in value)
    if not numbers or len(set(value)) != len(value):
        raise SettingsError(f"{where}: expected different numbers from 0, got {value!r}; write e.g. [0, 1, 2]")
    return tuple(value)


def _entries(content: dict, path: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for section in ("stage1", "arms"):
        named = content.get(section) or {}
        if not isinstance(named, dict):
            raise SettingsError(f"{path}: {section}: expected names with settings, got {named!r}; write name: []")
        for name, value in named.items():
            name = str(name)
            where = f"{path}: {section}: {name}"
            if not _NAME.fullmatch(name):
                raise SettingsError(
                    f"{where}: expected a name of letters, digits, spaces and ._+-, got {name!r}; rename it"
                )
            if name in entries:
                raise SettingsError(f"{where}: expected different names, got {name!r} twice; rename one of them")
            entries[name] = _arm(name, value, entries, where) if section == "arms" else _stage1(name, value, where)
    if not entries:
        raise SettingsError(f"{path}: expected arms or stage-1 students, got none; write them below arms")
    return entries


def _stage1(name: str, value: object, where: str) -> Entry:
    settings = _allowed(_settings(value, where), where, ("stages",))
    return Entry(name, "", ("stages=[sft]", *settings), "stage1", is_arm=False)


def _arm(name: str, value: object, entries: dict[str, Entry], where: str) -> Entry:
    arm = {} if value is None else value
    _check_keys(arm, ARM_KEYS, where)
    start = "" if arm.get("from") is None else str(arm["from"])
    students = [entry.name for entry in entries.values() if not entry.is_arm]
    if start and start not in students:
        expected = f"one of {', '.join(students)}" if students else "a name of the section stage1, which is empty"
        raise SettingsError(f"{where}: from: expected {expected}, got {start!r}; define it below stage1")
    settings = _settings(arm.get("settings"), where)
    if start:
        settings = ("stages=[warm_up,distill]", *_allowed(settings, where, ("model.path",)))
    # The last student of the arm, unless the plan names one.
    only_control = any(re.fullmatch(r"stages=\[(sft, ?)?control\]", setting) for setting in settings)
    prediction = arm.get("prediction", "control" if only_control else "stage2")
    if prediction not in STUDENTS:
        raise SettingsError(
            f"{where}: prediction: expected one of {', '.join(STUDENTS)}, got {prediction!r}; write stage2"
        )
    return Entry(name, start, settings, prediction, is_arm=True)


def _comparisons(value: object, entries: dict[str, Entry], path: Path) -> tuple[tuple[str, str], ...]:
    pairs = []
    for pair in value or []:
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
            raise SettingsError(f"{path}: comparisons: expected two different names, got {pair!r}; write [D, control]")
        for name in map(str, pair):
            if name not in entries:
                raise SettingsError(
                    f"{path}: comparisons: expected two of {', '.join(entries)}, got {name!r}; define it, or leave "
                    "the comparison out"
                )
        pairs.append((str(pair[0]), str(pair[1])))
    return tuple(pairs)


def choose(plan: Plan, jobs: Sequence[Job], only: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Return the training runs of some entries, and of the stage-1 students that they need, over some seeds.

    Args:
        plan: the plan.
        jobs: all of its training runs.
        only: names of the entries; empty = all.
        seeds: their seeds; empty = all.
    Raises:
        SettingsError: a name is not in the plan.
    """
    for name in only:
        if name not in plan.entries:
            raise SettingsError(f"--only: expected names among {', '.join(plan.entries)}, got {name!r}; correct it")
    names = {*only, *(plan.entries[name].start for name in only)} if only else plan.entries
    return [job for job in jobs if job.entry.name in names and job.seed in (seeds or plan.seeds)]


def plan_jobs(plan: Plan, out: Path) -> list[Job]:
    """Return all training runs in the order in which they start: by seed, stage-1 students first.

    Args:
        plan: the plan.
        out: folder of the lab.
    Raises:
        SettingsError: an entry's settings are wrong, or equal to another entry's; the message names the entry.
    """
    load_settings(plan.recipe)
    with tempfile.TemporaryDirectory() as temporary:
        recipe = _common_recipe(plan, Path(temporary))
        checked = {entry.name: _checked(plan, entry, recipe) for entry in plan.entries.values()}
    _refuse_equal(plan, checked)
    jobs = []
    for seed in plan.seeds:
        of_seed: dict[str, Job] = {}
        for entry in plan.entries.values():
            of_seed[entry.name] = _job(entry, seed, checked[entry.name], out, of_seed.get(entry.start))
        jobs += of_seed.values()
    return jobs


def _common_recipe(plan: Plan, folder: Path) -> Path:
    """Write the plan's recipe with the settings for every run as a separate recipe, and check it.

    As a recipe, it may have settings that only some of the runs use.
    """
    recipe = folder / "plan.yaml"
    try:
        OmegaConf.save(OmegaConf.merge(OmegaConf.from_dotlist(list(plan.settings)), {"base": plan.recipe}), recipe)
        load_settings(str(recipe))
    except Exception as error:
        text = str(error).replace(f"recipe {recipe}", "").lstrip(": ")
        raise SettingsError(f"{plan.path}: settings: {' '.join(text.split())}") from None
    return recipe


def _checked(plan: Plan, entry: Entry, recipe: Path) -> RunConfig:
    """Return the settings of an entry without those that depend on the seed; `model.path` names its stage-1 student."""
    try:
        model = [f"model.path={entry.start}/stage1"] if entry.start else []
        settings = load_settings(str(recipe), [*entry.settings, *model])
        if not settings.made.enabled and not settings.data.heldout:
            raise SettingsError("data.heldout: expected held-out questions, got none; the lab scores their answers")
        # Without stage 1 the model itself is evaluated as the stage-1 student.
        first = ("untrained", "stage1") if "sft" in settings.stages else ("stage1",)
        late = {"distill": "stage2", "control": "control"}
        students = (*first, *(student for stage, student in late.items() if stage in settings.stages))
        if entry.prediction not in students:
            raise SettingsError(
                f"prediction: expected one of {', '.join(students)}, which stages={settings.stages} has, got "
                f"{entry.prediction}; change one of the two"
            )
    except SettingsError as error:
        raise SettingsError(f"{plan.path}: {'arms' if entry.is_arm else 'stage1'}: {entry.name}: {error}") from None
    return settings


def _refuse_equal(plan: Plan, checked: dict[str, RunConfig]) -> None:
    by_settings: dict[str, str] = {}
    for name, settings in checked.items():
        former = by_settings.setdefault(json.dumps(with_effect(settings, Path()), sort_keys=True), name)
        if former != name:
            raise SettingsError(
                f"{plan.path}: arms: expected different settings, got the same for {former} and {name}; remove one"
            )


def _job(entry: Entry, seed: int, checked: RunConfig, out: Path, needs: Job | None) -> Job:
    settings = copy.deepcopy(checked)
    folder = out / "runs" / str(seed) / entry.name
    settings.seed, settings.output = seed, str(folder)
    if settings.made.enabled:
        settings.made.seed = seed
        if settings.made.folder == RunConfig().made.folder:
            settings.made.folder = str(out / "made")
    if needs:
        settings.model.path = str(needs.folder / "stage1")
    changed = json.dumps(with_effect(settings, out), sort_keys=True)
    digest = hashlib.blake2b(changed.encode(), digest_size=4).hexdigest()
    return Job(entry, seed, settings, folder / f"{settings.name}-{digest}", needs)


def with_effect(settings: RunConfig, out: Path) -> dict[str, object]:
    """Return the settings that differ from their defaults and have an effect in this run, by key.

    The lab's folder is left out of `model.path`, so the names of run folders do not depend on it.
    """
    flat, defaults = flat_settings(settings), flat_settings(RunConfig())
    changed = {
        key: value
        for key, value in flat.items()
        if value != defaults[key] and key not in WITHOUT_EFFECT and _has_effect(settings, key)
    }
    if "model.path" in changed:
        changed["model.path"] = changed["model.path"].removeprefix(f"{out}/")
    return changed


def _has_effect(settings: RunConfig, key: str) -> bool:
    try:
        refuse_useless(settings, [key], where="")
    except SettingsError:
        return False
    return True


def flat_settings(settings: RunConfig) -> dict[str, object]:
    """Return all settings by key, such as `distill.steps`."""
    flat: dict[str, object] = {}
    for name, value in settings_as_dict(settings).items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat
