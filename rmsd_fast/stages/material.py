"""Prepare the inputs of a run: questions, a teacher pool and a model folder, which are generated if requested."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from errno import EACCES, EPERM, EROFS
from pathlib import Path
from typing import Any

import torch

from rmsd_fast import environment
from rmsd_fast.config import MadeConfig, NotInstalled, RunConfig, SettingsError
from rmsd_fast.data.benchmarks import benchmark_files
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.records import load_questions
from rmsd_fast.files import FolderLock, file_digest, remove_leftovers
from rmsd_fast.made.clips import make_clips
from rmsd_fast.made.labels import write_label_share
from rmsd_fast.made.needles import make_needles
from rmsd_fast.made.real_clips import write_real_questions
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.made.teacher import SimulatedTeacher, write_simulated_pool
from rmsd_fast.models.adapters import import_peft
from rmsd_fast.models.families import Family, family_of
from rmsd_fast.models.folders import ModelFolder, model_digests, open_folder, resolve_folder
from rmsd_fast.models.liger import check_liger
from rmsd_fast.models.quantize import import_bitsandbytes
from rmsd_fast.models.students import DTYPES
from rmsd_fast.models.teacher_folder import check_teacher
from rmsd_fast.rollout.dump import INFO
from rmsd_fast.rollout.vllm import check_family, check_length
from rmsd_fast.rollout.vllm_group import check_groups, check_split
from rmsd_fast.rollout.vllm_process import check_vllm
from rmsd_fast.runtime.engine import import_adamw_8bit
from rmsd_fast.runtime.process_group import World, on_main
from rmsd_fast.runtime.trackers import check_trackers
from rmsd_fast.setting_rules.evaluation import refuse_evaluation_only
from rmsd_fast.setting_rules.uses import (
    asks_judge,
    makes_rollouts,
    uses_other_teacher,
    uses_pool,
    uses_servers,
    uses_vllm,
)
from rmsd_fast.stages.inputs import Inputs, read_inputs
from rmsd_fast.teacher.pool import load_pool
from rmsd_kernels.implementations import resolve_impl

# Seconds to wait for another program that generates the same material. It must be less than the time that the other
# processes of this program wait for the main process.
LONGEST_MAKING_S = 1500.0


@dataclass(frozen=True)
class Material(Inputs):
    """Inputs and model of a run.

    Attributes:
        model_path: folder or Hub name of the model.
        files: paths of the input files by role. Each file of a benchmark's folder has a role of its own.
        teacher_path: folder or Hub name of the model of `self_teacher.kind=path`; "" if there is none.
    """

    model_path: str
    files: dict[str, str]
    teacher_path: str = ""

    def fingerprints(self) -> dict:
        """Return the hash of every input file by role, and of every file of the models by name."""
        digests: dict[str, Any] = {role: file_digest(path) for role, path in self.files.items()}
        digests["model"] = model_digests(resolve_folder(self.model_path))
        if self.teacher_path:
            digests["self_teacher"] = model_digests(resolve_folder(self.teacher_path, setting="self_teacher.path"))
        return digests


def prepare_material(
    settings: RunConfig, world: World, *, training: bool = True, allow_missing: bool = False
) -> Material:
    """Read and check the inputs of a run. With `made.enabled`, the main process generates missing inputs.

    Args:
        settings: settings of the run.
        world: this process in the run.
        training: whether training inputs are needed; False reads only the held-out questions and the model.
        allow_missing: whether any number of media files may be missing.
    Raises:
        UserError: a required path is not given, a file is damaged, the pool belongs to other questions or has almost no
            valid answer, the batches cannot be divided among the processes, the model is of an unsupported family, or
            model.liger=on, the losses, a tracker or an optional package are not available here.
    """
    if training:
        refuse_evaluation_only(settings)
    check_liger(settings.model.liger, world.device)
    check_packages(settings, training=training)
    if training:
        check_batches(settings, world.size)
        if uses_vllm(settings):
            check_groups(settings.rollout.tensor_parallel, world.size)
        losses_of(settings, world)
        # Only the main process writes to trackers.
        on_main(world, lambda: check_trackers(settings.runtime.trackers))
    made = on_main(world, lambda: _make_locked(settings)) if settings.made.enabled else {}
    named = {"train": settings.data.train, "heldout": settings.data.heldout, "pool": settings.teacher.pool}
    files = {role: path or made.get(role, "") for role, path in named.items()}
    model_path = settings.model.path or made.get("student", "")
    needed = {"model.path": model_path}
    needed |= {"data.train": files["train"]} if training else {}
    needed |= {"teacher.pool": files["pool"]} if training and uses_pool(settings) else {}
    needed |= {} if training else {"data.heldout": files["heldout"]}
    for key, path in needed.items():
        if not path:
            raise SettingsError(f"{key}: expected a path, got nothing; set {key}=… or made.enabled=true")
    files = {role: path for role, path in files.items() if path and (training or role == "heldout")}
    roots = {role: settings.data.media_root or ("" if named[role] else made["media_root"]) for role in files}
    inputs = read_inputs(settings, files, roots, allow_missing=allow_missing)
    if settings.evaluate.benchmark and os.path.isdir(files.get("heldout", "")):
        folder = files.pop("heldout")
        annotation = benchmark_files(settings.evaluate.benchmark, folder)
        files |= {f"heldout/{file.relative_to(folder)}": str(file) for file in annotation}
    teacher_path = settings.self_teacher.path if training and uses_other_teacher(settings) else ""

    def check_models() -> None:
        model = check_model(resolve_folder(model_path), settings, training=training, processes=world.size)
        if teacher_path:
            teacher = open_folder(resolve_folder(teacher_path, setting="self_teacher.path"))
            check_teacher(teacher, model, settings)

    # This is checked before a run folder is created. The main process downloads a Hub model, and the other processes
    # find it in the cache.
    on_main(world, check_models)
    if training and makes_rollouts(settings) and settings.rollout.engine == "replay":
        files["replay"] = str(Path(settings.rollout.replay) / INFO)
    return Material(**vars(inputs), model_path=model_path, files=files, teacher_path=teacher_path)


def model_path_of(settings: RunConfig) -> str:
    """Return the folder or Hub name of the model that a run starts from. With `made.enabled`, it may be generated.

    Raises:
        SettingsError: no model is given.
    """
    if settings.model.path:
        return settings.model.path
    if not settings.made.enabled:
        raise SettingsError("model.path: expected a path, got nothing; set model.path=… or made.enabled=true")
    return _make_locked(settings)["student"]


def check_model(folder: Path, settings: RunConfig, *, training: bool, processes: int | None = None) -> ModelFolder:
    """Return the contents of a model folder. `processes` are those of the run; None = unknown.

    Raises:
        ModelError: the folder cannot be used, or not with `rollout.engine` or, in an evaluation, `evaluate.engine`.
        SettingsError: the family's boxes cannot be read with `evaluate.prompt`, or with vLLM, prompts and responses are
            too long for the model or, in this process, the KV cache, vLLM cannot split the model, or training compares
            more tokens than it has.
    """
    model = open_folder(folder)
    if training:
        check_top_tokens(settings, model.config.text_config.vocab_size)
    if settings.evaluate.benchmark == "vstar" and settings.evaluate.prompt == "benchmark":
        check_boxes(family_of(model.config))
    if training and (uses_vllm(settings) or uses_servers(settings)):
        check_family(family_of(model.config).title, str(folder), settings.rollout.engine)
        if uses_vllm(settings):
            check_split(model.config, settings.rollout.tensor_parallel, processes)
        check_length(
            model.config.text_config,
            dtype=settings.model.dtype,
            max_tokens=settings.data.max_prompt_tokens + settings.rollout.max_new_tokens,
            # The cache of a server may be larger than this recipe says.
            kv_cache_gib=settings.rollout.vllm_kv_cache_gib if uses_vllm(settings) else math.inf,
            tensor_parallel=settings.rollout.tensor_parallel if uses_vllm(settings) else 1,
        )
    if not training and settings.evaluate.engine == "vllm":
        check_family(family_of(model.config).title, str(folder), section="evaluate")
        check_length(
            model.config.text_config,
            dtype=settings.model.dtype,
            max_tokens=settings.data.max_prompt_tokens + settings.evaluate.max_new_tokens,
            kv_cache_gib=settings.rollout.vllm_kv_cache_gib,
            section="evaluate",
        )
    return model


def check_boxes(family: Family) -> None:
    """Raise SettingsError if a family does not write boxes from 0 to 1000 with the prompts of V-STaR."""
    if family.pixel_boxes:
        raise SettingsError(
            "evaluate.prompt: expected rmsd with evaluate.benchmark=vstar, got benchmark: that prompt does not name "
            f"the range of coordinates, and {family.title} models write pixels, which would be read as 0 to 1000; set "
            "evaluate.prompt=rmsd"
        )


def check_top_tokens(settings: RunConfig, vocabulary: int) -> None:
    """Raise SettingsError if more tokens are to be compared than there are."""
    credit = settings.credit
    for name, used in (("magnitude_topk", credit.magnitude != "none"), ("prune_topk", credit.prune != "none")):
        number = getattr(credit, name)
        if used and number > vocabulary:
            raise SettingsError(
                f"credit.{name}: expected at most {vocabulary:,}, the student's vocabulary, got {number:,}; set e.g. "
                f"credit.{name}=16"
            )


def check_packages(settings: RunConfig, *, training: bool) -> None:
    """Raise NotInstalled if an optional package that the settings need is missing."""
    if settings.model.quantize == "nf4":
        import_bitsandbytes()
    if training and settings.model.adapter == "lora":
        import_peft()
    if training and settings.runtime.optimizer == "adamw_8bit":
        import_adamw_8bit()
    if training and uses_vllm(settings):
        check_vllm()
    if not training and settings.evaluate.engine == "vllm":
        check_vllm(section="evaluate")
    if training and asks_judge(settings) and (reason := environment.why_not(("httpx2",), extras="collect")):
        raise NotInstalled(f"self_teacher.judge: {reason}")


def check_batches(settings: RunConfig, processes: int) -> None:
    """Raise SettingsError if a step's questions cannot be divided evenly among the processes."""
    batches = {"sft.batch_size": settings.sft.batch_size} if "sft" in settings.stages else {}
    if {"warm_up", "distill", "control"} & set(settings.stages):
        batches["distill.batch_size"] = settings.distill.batch_size
    for key, batch in batches.items():
        if batch % processes:
            raise SettingsError(
                f"{key}: expected a multiple of {processes} (processes), got {batch}; set {key}="
                f"{max(1, round(batch / processes)) * processes}, or start a different number of processes"
            )


def losses_of(settings: RunConfig, world: World) -> str:
    """Return the implementation of the heads that `auto` resolves to on this device.

    Raises:
        NotInstalled: the device is CUDA and triton is not installed.
    """
    try:
        return resolve_impl("auto", torch.empty(0, dtype=DTYPES[settings.model.dtype], device=world.device))
    except RuntimeError as error:
        raise NotInstalled(f"losses: {error}") from None


def _make_locked(settings: RunConfig) -> dict[str, str]:
    """Call `_make` from one program at a time, after removing temporary files of killed programs."""
    folder = Path(settings.made.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"made.folder: cannot create {folder} ({error.strerror}); choose another folder") from error
    try:
        lock = FolderLock(folder, wait_s=LONGEST_MAKING_S)
    except OSError as error:
        if error.errno not in (EACCES, EPERM, EROFS):
            raise
        # The folder may belong to another user and already hold everything needed; reading it needs no lock.
        return _make(settings)
    with lock:
        remove_leftovers(folder)
        for made in folder.glob("*/made.json"):
            remove_leftovers(made.parent)
        return _make(settings)


def _make(settings: RunConfig) -> dict[str, str]:
    """Generate missing inputs and return paths by role. File names contain a hash of the settings of their content."""
    made = settings.made
    if made.source == "clips":
        clips = make_clips(
            made.folder,
            train_clips=made.train_clips,
            heldout_clips=made.heldout_clips,
            questions_per_clip=made.questions_per_clip,
            seed=made.seed,
            tasks=made.tasks,
        )
        folder, train, heldout, root = clips.folder, clips.train, clips.heldout, clips.folder
    elif made.source == "needles":
        clips = make_needles(
            made.folder, train_clips=made.train_clips, heldout_clips=made.heldout_clips, seed=made.seed
        )
        folder, train, heldout, root = clips.folder, clips.train, clips.heldout, clips.folder
    else:
        folder = Path(made.folder).absolute() / f"real-clips-{made.seed}"
        train, heldout, root = write_real_questions(folder)
    questions = load_questions(train, media_root=root)
    teacher = SimulatedTeacher(made.teacher, error_rate=made.teacher_error_rate, wording=made.wording)
    pool_path = write_simulated_pool(folder, questions, k=made.responses, seed=made.seed, teacher=teacher)
    texts = [question_text(question) for question in questions[:2000]]
    texts += [response.text for responses in list(load_pool(pool_path).values())[:2000] for response in responses]
    if made.label_share < 1:
        train = write_label_share(train, questions, share=made.label_share, seed=made.seed, media_root=root)
    # Students of the first family keep the name that earlier versions gave them.
    family = "" if made.student_family == MadeConfig.student_family else f"{made.student_family}-"
    student = folder / f"student-{family}{made.student_hidden}x{made.student_layers}-{pool_path.stem}"
    build_tiny_student(
        student,
        texts=texts,
        seed=made.seed,
        hidden=made.student_hidden,
        layers=made.student_layers,
        family=made.student_family,
    )
    paths = {"train": train, "heldout": heldout, "pool": pool_path, "student": student, "media_root": root}
    return {role: str(path) for role, path in paths.items()}
