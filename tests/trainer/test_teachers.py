"""Test self-teachers with weights, media or feedback of their own, against separate rows in float64."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from material import tiny_material, tiny_settings
from teacher_server import TeacherServer, completion, error
from train_runs import only_run, run_train

from rmsd_fast.config import ModelError, SettingsError
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.packing import gather_rows, make_rows
from rmsd_fast.data.preprocess import video_patches
from rmsd_fast.data.prompts import PromptError
from rmsd_fast.data.records import load_questions, write_questions
from rmsd_fast.evaluate_judge import JudgeError
from rmsd_fast.made.student import PREPROCESSORS, _build_model
from rmsd_fast.method.hints import Hint
from rmsd_fast.models.export import fill_export
from rmsd_fast.models.families.qwen2_5_vl import QWEN2_5_VL
from rmsd_fast.models.folders import load_tokenizer, resolve_folder
from rmsd_fast.models.shared_prefix import disable_shared_prefix, enable_shared_prefix
from rmsd_fast.models.students import Student, encode_media, forward_hidden
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill, teach
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.hints import missing_hint_media, plan_hints, read_hints
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.stages.plan import describe_plan
from rmsd_fast.stages.training_loop import open_loader
from rmsd_fast.train_feedback import Feedback

SMALL = (
    *("rollout.n=3", "rollout.max_new_tokens=8", "rollout.parity_every=0", "data.max_prompt_tokens=500"),
    *("micro_tokens=4000", "runtime.zero_stage=0", "discriminator.head=random", "reward.score_sd_offset=0"),
    "kd.kind=k1",
)
CUE = "The edge on the right."


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def material(folder):
    """Return material in which the first question has a cue and other media: a part of its video, and another one."""
    material = tiny_material(folder)
    videos = sorted({video for question in material.train for video in question.videos})
    first, *others = material.train
    media = {"videos": [first.videos[0], videos[-1]], "images": [], "spans": [(1.0, 3.0), None]}
    assert first.videos[0] != videos[-1]
    return replace(material, train=[replace(first, hints={"cue": CUE, "media": media}), *others])


@pytest.fixture(scope="module")
def larger(folder, material):
    """Return the folder of a larger model with the student's tokenizer."""
    tokenizer = load_tokenizer(resolve_folder(material.model_path), "Qwen3-VL")
    path = folder / "larger"
    path.mkdir()
    model = _build_model(tokenizer, 5, 96, 3, "qwen3_vl")
    fill_export(Student(model, tokenizer, PREPROCESSORS["qwen3_vl"]), path)
    return path


@pytest.fixture(scope="module")
def wider(folder, larger):
    """Return the folder of a teacher whose head has 64 rows more than the student's, and their number."""
    path = folder / "wider"
    shutil.copytree(larger, path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["vocab_size"] += 64
    (path / "config.json").write_text(json.dumps(config))
    return path, config["text_config"]["vocab_size"]


@pytest.fixture(scope="module")
def state(folder, material, larger, world):
    """Return a state with a reference, a policy that differs from it, and a larger teacher."""
    overrides = ["self_teacher.kind=path", f"self_teacher.path={larger}", "self_teacher.views=[cue,media]"]
    settings = tiny_settings(folder, *SMALL, *overrides, "distill.kl_coef=1e-3")
    state = build_distillation(material.model_path, settings, world, material)
    assert not state.shares_tower
    state.policy.set_lr(1e-2)
    assert not distill.step(state, prompts_of(state, material), 0).skipped
    return state


def prompts_of(state, material):
    prompts = [state.builder.build(question) for question in material.train[:2]]
    shown = [any(hint.media for hint in state.hints.get(prompt.question.id, ())) for prompt in prompts]
    teachers = [
        state.builder.build_teacher(p.question, max_tokens=500) if s else None
        for p, s in zip(prompts, shown, strict=True)
    ]
    return [replace(prompt, teacher=teacher) for prompt, teacher in zip(prompts, teachers, strict=True)]


def hints_of(material, state, settings, world):
    missing = missing_hint_media(material, settings, world)
    return read_hints(material, state.builder, state.targets, settings, world, missing)


def taught(state, material, world, monkeypatch, *overrides, hints=None):
    """Return groups, metrics and leads of the passes of a step with changed settings, which is not applied."""
    settings = tiny_settings(state.settings.made.folder, *SMALL, *overrides)
    state.settings = settings
    state.hints = hints_of(material, state, settings, world) if hints is None else hints
    leads, made = [], teach.passes

    def spy(state, prompts, responses, features, leads_of_each=None):
        leads.append(leads_of_each)
        return made(state, prompts, responses, features, leads_of_each)

    def discarded(engines):
        for engine in engines:
            engine.discard()
        return [0.0] * len(engines), True

    teacher = state.teacher
    with monkeypatch.context() as patched:
        patched.setattr(teach, "passes", spy)
        patched.setattr(distill, "apply_or_discard", discarded)
        if settings.self_teacher.kind != "path":
            patched.setattr(state, "teacher", None)
        result = distill.step(state, prompts_of(state, material), 1)
    assert state.teacher is teacher
    return result.groups, result.metrics, leads


def row_logp(model, prompt, hint, response, state):
    """Return log-probs of a response after a prompt with a hint, float64 [R], by transformers on a row of its own."""
    return row_distributions(model, prompt, hint, response, state).gather(1, response[:, None])[:, 0]


def row_distributions(model, prompt, hint, response, state):
    """Return the log-probs of the whole vocabulary at each of its tokens, float64 [R, V]."""
    ids, eos = prompt.input_ids, state.builder.eos_id
    if hint:
        end = int((ids == eos).nonzero()[-1])
        ids = torch.cat([ids[:end], torch.tensor(state.student.tokenizer("\n" + hint)["input_ids"]), ids[end:]])
    row = torch.cat([ids, response])
    types = torch.zeros_like(row)
    types[: len(prompt.mm_token_type_ids)] = prompt.mm_token_type_ids
    pixels = torch.cat([video_patches(frames.pixels, frames.preprocessor) for frames in prompt.media]).double()
    logits = model(
        input_ids=row[None],
        mm_token_type_ids=types[None],
        pixel_values_videos=pixels,
        video_grid_thw=torch.tensor([frames.grid_thw for frames in prompt.media]),
    ).logits[0, len(ids) - 1 : -1]
    return torch.log_softmax(logits / state.settings.rollout.temperature, -1)


def exact(model):
    model = copy.deepcopy(model).double()
    disable_shared_prefix(model)
    return model


def check_rows(groups, models, told, state):
    """Compare each group's log-probs with rows of their own; `told` gives (model, media, hint) of each view."""
    for group in groups:
        for i, rollout in enumerate(group.rollouts):
            views = told(group.prompt.question, i)
            assert len(group.teacher_logp) == 0 if not views else len(group.teacher_logp[i]) == len(views)
            for m, (name, media, hint) in enumerate(views):
                prompt = group.prompt.teacher if media else group.prompt
                with torch.no_grad():
                    expected = row_logp(models[name], prompt, hint, rollout.token_ids, state)
                assert float((group.teacher_logp[i][m].double() - expected).abs().max()) < 2e-4


def test_another_model_equals_separate_rows(state, material, larger, world, monkeypatch):
    models = {"path": exact(state.teacher.model)}
    path = ["self_teacher.kind=path", f"self_teacher.path={larger}"]
    # Without hints, all rollouts are scored, and the prompt is that of the student.
    groups, metrics, leads = taught(state, material, world, monkeypatch, *path, hints={})
    check_rows(groups, models, lambda question, i: [("path", False, "")], state)
    assert leads == [None] and metrics["self_teacher/hinted_share"] == 1
    assert metrics["self_teacher/gap_size"] > 0.01
    # A question without a hint is scored without one.
    cue = f"What to look at: {CUE}"
    groups, _, leads = taught(state, material, world, monkeypatch, *path, "self_teacher.views=[cue]")
    check_rows(groups, models, lambda q, i: [("path", False, cue if q.hints else "")], state)
    assert leads == [None]
    # Other media have a prompt and features of their own.
    groups, _, _ = taught(state, material, world, monkeypatch, *path, "self_teacher.views=[cue,media]")
    assert groups[0].prompt.teacher is not None and groups[1].prompt.teacher is None
    check_rows(groups, models, lambda q, i: [("path", bool(q.hints), cue if q.hints else "")], state)


def test_a_divergence_from_another_model_equals_separate_rows(state, material, larger, world, monkeypatch):
    """The teacher has wider hidden states, and reads other media for the first question."""
    overrides = ["self_teacher.kind=path", f"self_teacher.path={larger}", "self_teacher.views=[cue,media]"]
    overrides += ["kd.kind=reverse_kl", "credit.prune=overlap", "credit.prune_overlap=0.1", "credit.prune_decay=0.3"]
    groups, metrics, _ = taught(state, material, world, monkeypatch, *overrides)
    teacher, student = exact(state.teacher.model), exact(state.student.model)
    total, weights, overlaps = 0.0, 0.0, []
    for group in groups:
        hinted = bool(group.prompt.question.hints)
        prompt, hint = (group.prompt.teacher, f"What to look at: {CUE}") if hinted else (group.prompt, "")
        for rollout in group.rollouts:
            with torch.no_grad():
                log_q = row_distributions(teacher, prompt, hint, rollout.token_ids, state)
                log_p = row_distributions(student, group.prompt, "", rollout.token_ids, state)
            divergence, misses = (log_p.exp() * (log_p - log_q)).sum(-1).tolist(), 0
            best = [logp.topk(16).indices.tolist() for logp in (log_q, log_p)]
            for value, of_teacher, of_student in zip(divergence, *best, strict=True):
                overlaps.append(len({*of_teacher} & {*of_student}) / 16)
                misses += overlaps[-1] < 0.1
                weight = max(1 - 0.3 * misses, 0) + 0.5
                total, weights = total + weight * value, weights + weight
    assert metrics["kd/divergence"] == pytest.approx(total / weights, rel=1e-3) and total / weights > 0.1
    assert metrics["credit/overlap"] == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["kd.kind=k1", "credit.magnitude_topk=0"], ""),
        (["kd.kind=forward_kl"], "kd.kind=forward_kl: expected .* {rows:,} rows, .* {more:,}; set kd.kind=k1"),
        (["kd.kind=k1", "credit.prune=overlap"], "credit.prune=overlap: expected .* {rows:,} rows, .* {more:,};"),
        (
            ["credit.magnitude=teacher", "credit.magnitude_topk=8"],
            "credit.magnitude_topk=8: expected .* {rows:,} rows, .* {more:,};",
        ),
    ],
)
def test_heads_that_cannot_be_compared_are_refused_before_stage1(folder, material, wider, world, overrides, says):
    path, rows = wider
    says = says.format(rows=rows - 64, more=rows)
    paths = [f"data.train={material.files['train']}", "data.heldout="]
    paths += [f"model.path={material.model_path}", "self_teacher.kind=path", f"self_teacher.path={path}"]
    settings = load_settings("visd", [*paths, "self_teacher.views=[answer]", "runtime.trackers=[]", *overrides])
    text, ready = describe_plan(settings)
    if not says:
        assert ready, text
        prepare_material(settings, world)
        return
    assert not ready
    assert re.search(f"MISSING: {says}", text), text
    with pytest.raises(SettingsError, match=says):
        prepare_material(settings, world)


def test_other_media_equal_separate_rows(state, material, world, monkeypatch):
    models = {"frozen": exact(state.reference.model), "live": exact(state.student.model)}
    cue = f"What to look at: {CUE}"
    for kind, kl in (("live", 0), ("frozen", 1e-3)):
        overrides = [f"self_teacher.kind={kind}", "self_teacher.views=[media,cue]"]
        groups, metrics, leads = taught(state, material, world, monkeypatch, *overrides, f"distill.kl_coef={kl}")
        check_rows(groups, models, lambda q, i, kind=kind: [(kind, True, cue)] if q.hints else [], state)
        assert metrics["self_teacher/hinted_share"] == 0.5
        assert leads == [None]
        for group in groups if kind == "frozen" else []:
            for rollout, logp in zip(group.rollouts, group.ref_logp, strict=True):
                with torch.no_grad():
                    plain = row_logp(models["frozen"], group.prompt, "", rollout.token_ids, state)
                assert float((logp.double() - plain).abs().max()) < 2e-4
    # The reference's own log-probs need another lead after the same media.
    cued = ["self_teacher.kind=frozen", "self_teacher.views=[cue]"]
    groups, _, leads = taught(state, material, world, monkeypatch, *cued)
    check_rows(groups, models, lambda q, i: [("frozen", False, cue)] if q.hints else [], state)
    assert leads[0] is not None
    each = ["self_teacher.kind=live", "self_teacher.views=[media,cue]", "kd.kind=avsd"]
    groups, _, _ = taught(state, material, world, monkeypatch, *each)
    check_rows(groups, models, lambda q, i: [("live", True, ""), ("live", False, cue)] if q.hints else [], state)


@pytest.mark.parametrize(
    "overrides",
    [
        ("packing=padded",),
        ("distill.train_vision=true",),
        ("model.adapter=lora", "sft.train_vision=false", "discriminator.mode=shared", "runtime.zero_stage=2"),
    ],
    ids=" ".join,
)
def test_other_layouts_and_trained_towers(folder, material, larger, world, monkeypatch, overrides):
    names = ["self_teacher.kind=path", f"self_teacher.path={larger}", "self_teacher.views=[cue,media]", *overrides]
    settings = tiny_settings(folder, *SMALL[:-1], *names, "kd.kind=avsd")
    state = build_distillation(material.model_path, settings, world, material)
    models = {"path": exact(state.teacher.model), "live": exact(state.student.model)}
    cue = f"What to look at: {CUE}"
    told = {"path": [("path", False, cue), ("path", True, "")], "live": [("live", False, cue), ("live", True, "")]}
    groups, _, _ = taught(state, material, world, monkeypatch, *names, "kd.kind=avsd")
    check_rows(groups, models, lambda q, i: told["path"] if q.hints else [("path", False, "")], state)
    live = ["self_teacher.kind=live", *names[2:], "kd.kind=avsd"]
    groups, _, _ = taught(state, material, world, monkeypatch, *live)
    check_rows(groups, models, lambda q, i: told["live"] if q.hints else [], state)


def test_the_same_media_change_nothing(state, material, world, monkeypatch):
    own = [
        replace(q, hints={"media": {"videos": list(q.videos), "images": [], "spans": []}}) for q in material.train[:2]
    ]
    same = replace(material, train=own + material.train[2:])
    live = ["self_teacher.kind=live", "self_teacher.views=[media]", "data.max_bad_share=1"]
    groups, metrics, leads = taught(state, same, world, monkeypatch, *live)
    assert leads == [None] and metrics["self_teacher/hinted_share"] == 1
    # The teacher's passes are those that the trainer would make of the plain prompts.
    plain = {question.id: (Hint(""),) for question in own}
    expected, _, _ = taught(state, same, world, monkeypatch, *live, hints=plain)
    for group, other in zip(groups, expected, strict=True):
        assert group.prompt.teacher is not None and other.prompt.teacher is None
        assert torch.equal(group.prompt.teacher.input_ids, group.prompt.input_ids)
        assert torch.equal(group.prompt.teacher.position_ids, group.prompt.position_ids)
        for logp, other_logp in zip(group.teacher_logp, other.teacher_logp, strict=True):
            assert torch.equal(logp, other_logp)
    assert abs(metrics["self_teacher/gap"]) < 1e-5


def test_a_hint_in_the_prefix_equals_a_lead_in_float64(state, material):
    """The shared prompt ends with the hint, or each response begins with it."""
    model = copy.deepcopy(state.student.model).double()
    enable_shared_prefix(model)
    generator = torch.Generator().manual_seed(0)
    prompts = prompts_of(state, material)
    halves = [state.builder.split(prompt) for prompt in prompts]
    leads = [
        torch.cat([state.builder.encode_hint(f"Advice: {i} x", max_tokens=99), t]) for i, (_, t) in enumerate(halves)
    ]
    responses = [[torch.randint(20, 300, (r,), generator=generator) for r in lengths] for lengths in ((4, 1, 7), (5,))]
    hidden = []
    for packing in ("shared", "padded"):
        disable_shared_prefix(model) if packing == "padded" else enable_shared_prefix(model)
        for in_prefix in (False, True):
            if in_prefix:
                shown = [body.with_text(lead) for (body, _), lead in zip(halves, leads, strict=True)]
                rows = make_rows(packing, shown, responses, None, pad_id=0)
            else:
                shown = [body for body, _ in halves]
                each = [[lead] * len(ids) for lead, ids in zip(leads, responses, strict=True)]
                rows = make_rows(packing, shown, responses, each, pad_id=0)
            with torch.no_grad():
                out = forward_hidden(model, rows, encode_media(model, shown))
            hidden.append(gather_rows(out.flatten(0, 1), rows))
        # Three responses share the hint, so that it is computed once instead of three times.
    for other in hidden[1:]:
        assert float((other - hidden[0]).abs().max()) < 1e-12


def test_both_layouts_of_a_step_agree(state, material, world, monkeypatch):
    live = ["self_teacher.kind=live", "self_teacher.views=[answer]"]
    groups, _, leads = taught(state, material, world, monkeypatch, *live)
    with monkeypatch.context() as patched:
        patched.setattr(teach._Prefix, "one_lead", False)
        others, _, other_leads = taught(state, material, world, monkeypatch, *live)
    assert leads == [None] and other_leads[0] is not None
    for group, other in zip(groups, others, strict=True):
        for logp, other_logp in zip(group.teacher_logp, other.teacher_logp, strict=True):
            assert float((logp - other_logp).abs().max()) < 1e-4


def test_the_students_own_folder_shares_the_tower(folder, material, world):
    path = ["self_teacher.kind=path", f"self_teacher.path={material.model_path}", "self_teacher.views=[answer]"]
    settings = tiny_settings(folder, *SMALL, *path)
    state = build_distillation(material.model_path, settings, world, material)
    assert state.shares_tower
    prompts = prompts_of(state, material)
    own = distill.step(state, prompts, 0)
    # Before the first update, the student is its own reference.
    state = build_distillation(
        material.model_path, tiny_settings(folder, *SMALL, "self_teacher.kind=frozen", *path[2:]), world, material
    )
    frozen = distill.step(state, prompts, 0)
    for name in ("self_teacher/gap", "self_teacher/gap_size", "policy/grad_norm"):
        assert own.metrics[name] == pytest.approx(frozen.metrics[name], rel=1e-3)


def test_models_that_cannot_score_the_student_are_refused(folder, material, larger, world):
    def prepare(path):
        names = ["self_teacher.kind=path", f"self_teacher.path={path}"]
        return prepare_material(tiny_settings(folder, *SMALL, *names), world)

    assert prepare(larger).fingerprints()["self_teacher"].keys() >= {"config.json", "model.safetensors"}
    renamed = folder / "renamed"
    shutil.copytree(larger, renamed)
    file = renamed / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"self_teacher.path .*renamed: the vocabulary: expected .* as in .*, got .*"):
        prepare(renamed)
    pixels = folder / "pixels"
    shutil.copytree(larger, pixels)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((pixels / name).read_text()) | {"image_mean": [0.4, 0.5, 0.5]}
        (pixels / name).write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="pixels: the preprocessing: expected"):
        prepare(pixels)
    with pytest.raises(ModelError, match="self_teacher.path: expected a model directory or a Hub name .* got './none'"):
        prepare("./none")
    # The dry run says so, too.
    train = folder / "questions.jsonl"
    write_questions(train, material.train, media_root=folder)
    paths = [f"data.train={train}", f"data.media_root={folder}", "data.heldout=", f"model.path={material.model_path}"]
    for path, says in ((renamed, "MISSING: self_teacher.path"), (larger, f"  self_teacher.path: {larger}")):
        overrides = [*paths, "self_teacher.kind=path", f"self_teacher.path={path}", "self_teacher.views=[]"]
        text, ready = describe_plan(load_settings("opsd", overrides))
        assert says in text and ready == (path == larger) and "told nothing" in text


def test_hint_media_of_question_files(tmp_path):
    (tmp_path / "a.mp4").touch()
    record = {"id": "q", "videos": ["a.mp4"], "question": "<video>\nWhat moves?", "task_type": "open"}
    media = {"videos": [{"path": "a.mp4", "start": 1, "end": 2.5}], "images": ["b.png"]}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({**record, "hints": {"media": media}}))
    (question,) = load_questions(path)
    assert question.hints["media"]["spans"] == [(1.0, 2.5)]
    shown = question.with_hint_media()
    assert [(kind, span) for kind, _, span in shown.media] == [("video", (1.0, 2.5)), ("image", None)]
    assert shown.hints == {} and shown.question == "What moves?"
    write_questions(tmp_path / "again.jsonl", [question], media_root=tmp_path)
    assert load_questions(tmp_path / "again.jsonl") == [question]
    # Marks stay if the numbers of files are equal, and otherwise media come first.
    marked = {**record, "question": "First <image> and then <video>: what moves?", "images": ["c.png"]}
    path.write_text(json.dumps({**marked, "hints": {"media": media}}))
    assert load_questions(path)[0].with_hint_media().question == marked["question"]
    path.write_text(json.dumps({**marked, "hints": {"media": {"images": ["b.png"]}}}))
    assert load_questions(path)[0].with_hint_media().question == "First  and then : what moves?"


@pytest.mark.parametrize(
    ("hints", "says"),
    [
        ({"media": ["a.mp4"]}, r"'hints.media': expected an object with the lists videos, images or both"),
        ({"media": {"videos": []}}, r"'hints.media': expected at least one path"),
        ({"media": {"videos": ["../a.mp4"]}}, r"'hints.media.videos': expected a path inside the media root"),
        ({"media": {"videos": [{"path": "a.mp4", "start": 2, "end": 1}]}}, r"'hints.media.videos': expected an end"),
        ({"media": {"frames": ["a.png"]}}, r"'hints.media': expected an object with the lists"),
    ],
)
def test_damaged_hint_media_are_refused(tmp_path, hints, says):
    path = tmp_path / "train.jsonl"
    path.write_text(
        json.dumps({"id": "q", "videos": ["a.mp4"], "question": "What?", "task_type": "open", "hints": hints})
    )
    with pytest.raises(DataError, match=says):
        load_questions(path)


def test_missing_hint_media_are_left_out_or_refused(state, material, world):
    gone = {"videos": ["/nowhere.mp4"], "images": [], "spans": []}
    first, second, *others = material.train
    asked = replace(material, train=[first, replace(second, hints={"media": gone}), *others])
    kind = ["self_teacher.kind=live", "self_teacher.views=[media]"]

    def read(*overrides):
        settings = tiny_settings(state.settings.made.folder, *SMALL, *kind, *overrides)
        return hints_of(asked, state, settings, world)

    with pytest.raises(DataError, match="1 of 2 hints .* cannot be used: missing_media 1, first: /nowhere.mp4"):
        read()
    hints = read("data.max_bad_share=0.5")
    assert hints[first.id] == (Hint("", media=True),) and hints[second.id] == ()


def test_times_of_another_clock_are_refused(folder, state, material, world):
    """A question or a hint has times of the student's video, and the teacher is shown another one, or a part of it."""
    settings = tiny_settings(folder, *SMALL, "self_teacher.kind=live", "self_teacher.views=[media,window]")
    separate = tiny_settings(
        folder, *SMALL[:-1], "self_teacher.kind=live", "self_teacher.views=[media,window]", "kd.kind=avsd"
    )
    first, *others = material.train
    temporal = next(question for question in material.train if question.task_type == "temporal")
    assert first.task_type != "temporal"
    part = {"videos": list(temporal.videos), "images": [], "spans": [(1.0, 2.0)]}
    other = first.hints["media"]
    timed = replace(first, hints={**first.hints, "window": [1, 2]})
    by_times = (replace(temporal, hints={"media": other}), "expected no hints.media for a temporal question")
    for question, says, refusing in (
        (timed, "expected no window next to hints.media", [settings]),
        (*by_times, [settings, separate]),
        (replace(temporal, hints={"media": part}), "", []),
    ):
        asked = replace(material, train=[question, *(q for q in others if q.id != question.id)])
        for each in (settings, separate):
            if each in refusing:
                with pytest.raises(DataError, match=says):
                    hints_of(asked, state, each, world)
                with pytest.raises(DataError, match=says):
                    plan_hints(asked, each)
            else:
                assert hints_of(asked, state, each, world)[question.id]
                plan_hints(asked, each)
    # A student that counts times from the first frame cannot be told by a teacher that begins elsewhere.
    asked = replace(material, train=[replace(temporal, hints={"media": part}), *others])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(state.builder, "_family", QWEN2_5_VL)
        with pytest.raises(DataError, match=by_times[1]):
            hints_of(asked, state, settings, world)


def test_the_answers_times_are_not_those_of_the_teachers_media(state, material):
    temporal = next(question for question in material.train if question.task_type == "temporal")
    end = float(temporal.answer.split(" to ")[1])
    other = next(q.videos[0] for q in material.train if q.videos[0] != temporal.videos[0])
    late = replace(
        temporal,
        answer=f"{end + 500:g} to {end + 501:g}",
        hints={"media": {"videos": [other], "images": [], "spans": [(1.0, 2.0)]}},
    )
    with pytest.raises(PromptError, match="the answer is"):
        state.builder.build(late, max_tokens=500)
    teacher = state.builder.build_teacher(late, max_tokens=500)
    assert teacher.media[0].timestamps_s[0] >= 1
    with pytest.raises(PromptError, match=f"question '{temporal.id} .hints.media.': a prompt of .* tokens exceeds"):
        state.builder.build_teacher(late, max_tokens=5)


def test_teacher_media_are_read_in_taught_steps_and_may_be_damaged(folder, state, material, world, monkeypatch):
    damaged = folder / "damaged.mp4"
    damaged.write_bytes(b"no video")
    broken = {"videos": [str(damaged)], "images": [], "spans": []}
    first, second = material.train[:2]
    both = [first, replace(second, hints={"cue": CUE, "media": broken})]
    asked = replace(material, train=both + material.train[2:])
    overrides = ["self_teacher.kind=live", "self_teacher.views=[cue,media]", "self_teacher.until_step=1"]
    overrides += ["data.max_bad_share=1", "distill.batch_size=2", "distill.steps=2"]
    settings = tiny_settings(folder, *SMALL, *overrides)
    monkeypatch.setattr(state, "settings", settings)
    monkeypatch.setattr(state, "hints", hints_of(asked, state, settings, world))
    monkeypatch.setattr(state, "teacher", None)
    run = SimpleNamespace(settings=settings, world=world, material=asked)
    shown = {}
    for stage, step in (("control", 0), ("warm_up", 0), ("distill", 0), ("distill", 1)):
        loader = open_loader(run, state, stage, both, 2)
        prompts = sorted(loader.step(step, step + 1), key=lambda prompt: prompt.question.id != first.id)
        loader.close()
        # No question is replaced by another one, so the control has the same ones.
        assert [prompt.question.id for prompt in prompts] == [first.id, second.id]
        shown[stage, step] = [prompt.teacher is not None for prompt in prompts]
        taught_step = (stage, step) == ("distill", 0)
        assert [name for name, _ in loader.faults] == [second.id] * taught_step
        if taught_step:
            assert loader.faults[0][1].startswith(f"used without hints.media: {damaged}")
            kept = prompts
    assert shown == {("control", 0): [False] * 2, ("warm_up", 0): [False] * 2} | {
        ("distill", 0): [True, False],
        ("distill", 1): [False] * 2,
    }
    groups = distill.step(state, kept, 0).groups
    cue = f"What to look at: {CUE}"
    assert [group.hints[0] for group in groups] == [[Hint(cue, media=True)], [Hint(cue)]]


JUDGE = ("self_teacher.kind=live", "self_teacher.views=[answer,feedback]", "self_teacher.judge.model=m")


def advice_of(response):
    """Return what the fake judge says about a response, which differs from response to response."""
    return f"Look again, {len(response)} and {sum(map(ord, response)) % 97}."


def response_of(request):
    (user,) = [message["content"] for message in request["messages"] if message["role"] == "user"]
    return user.partition("Response of the model:\n")[2].partition("\n\nWrite advice")[0]


def advise(request, number):
    return completion(f"<think>Hm.</think>\n{advice_of(response_of(request))}")


@pytest.fixture
def signals():
    signals = StopSignal()
    yield signals
    signals.restore()


def judge_of(state, url, *more):
    return tiny_settings(
        state.settings.made.folder, *SMALL, *JUDGE, f"self_teacher.judge.endpoint={url}", *more
    ).self_teacher.judge


def test_feedback_on_each_rollout_equals_separate_rows(state, material, world, monkeypatch, tmp_path, signals):
    models = {"live": exact(state.student.model)}
    answers = {}
    with TeacherServer(advise) as server:
        endpoint = f"self_teacher.judge.endpoint={server.url}"
        feedback = Feedback(judge_of(state, server.url), tmp_path, world, signals)
        with monkeypatch.context() as patched:
            patched.setattr(state, "judge", feedback)
            groups, metrics, leads = taught(state, material, world, patched, *JUDGE, endpoint)
            assert metrics["self_teacher/feedback_share"] == metrics["self_teacher/hinted_share"] == 1
            for group in groups:
                for i, hints in enumerate(group.hints):
                    answers[group.prompt.question.id, i] = hints[0].text

            def told(question, i):
                response = next(g for g in groups if g.prompt.question is question).rollouts[i].text
                (answer,) = state.hints[question.id]
                text = f"{answer.text}\nAdvice: {advice_of(response.strip())}"
                assert answers[question.id, i] == text
                return [("live", False, text)]

            check_rows(groups, models, told, state)
            assert len(set(answers.values())) > 2 and leads[0] is not None
            # A resumed run asks for nothing again, even if the server is gone.
            asked = len(server.requests)
            feedback.close()
    with monkeypatch.context() as patched:
        patched.setattr(state, "judge", Feedback(judge_of(state, server.url), tmp_path, world, signals))
        again, _, _ = taught(state, material, world, patched, *JUDGE, endpoint)
        state.judge.close()
    assert [group.hints for group in again] == [group.hints for group in groups]
    texts = {(group.prompt.question.id, rollout.text) for group in groups for rollout in group.rollouts}
    assert asked == len(texts) == len((tmp_path / "feedback.jsonl").read_text().splitlines())
    # The request has the question and the ground truth, and no media.
    (user,) = [message["content"] for message in server.requests[0]["messages"][1:]]
    question = next(g.prompt.question for g in groups if g.prompt.question.question in user)
    assert "Correct answer: " in user and question.question in user and isinstance(user, str)


def test_replies_that_cannot_be_hints_leave_rollouts_without_feedback(
    state, material, world, monkeypatch, tmp_path, signals
):
    kinds = [
        completion("Fine. <|im_end|>"),
        completion("word " * 4000),
        completion(" "),
        completion("cut", reason="length"),
        error(400, "the prompt was rejected"),
        completion("Look at the left edge."),
    ]
    questions = [(material.train[0], f"response {i}") for i in range(6)]
    with TeacherServer(lambda request, number: kinds[int(response_of(request)[-1])]) as server:
        endpoint = f"self_teacher.judge.endpoint={server.url}"
        feedback = Feedback(judge_of(state, server.url), tmp_path, world, signals)
        replies = feedback(questions)
        assert replies[2:] == [None, None, None, "Look at the left edge."] and replies[0] and replies[1]
        monkeypatch.setattr(state, "judge", lambda asked: replies)
        groups, metrics, _ = taught(state, material, world, monkeypatch, *JUDGE, endpoint)
        assert metrics["self_teacher/feedback_share"] == pytest.approx(1 / 6)
        # These rollouts keep the other hints.
        told = [hints for group in groups for hints in group.hints]
        plain = [list(state.hints[group.prompt.question.id]) for group in groups for _ in group.rollouts]
        assert told[:5] == plain[:5] and told[5][0].text.endswith("Advice: Look at the left edge.")
        # With feedback alone, they have no hints at all.
        only = ["self_teacher.kind=live", "self_teacher.views=[feedback]", "self_teacher.judge.model=m", endpoint]
        groups, metrics, _ = taught(state, material, world, monkeypatch, *only)
        assert metrics["self_teacher/hinted_share"] == pytest.approx(1 / 6)
        assert [len(logp) for group in groups for logp in group.teacher_logp] == [0, 0, 1]
        asked = len(server.requests)
        assert feedback(questions) == replies and len(server.requests) == asked
        feedback.close()


def test_a_judge_that_helps_nobody_stops_the_run(state, material, world, tmp_path, signals):
    questions = [(material.train[0], f"response {i}") for i in range(12)]
    with TeacherServer(lambda request, number: completion("")) as server:
        feedback = Feedback(judge_of(state, server.url), tmp_path / "empty", world, signals)
        with pytest.raises(JudgeError, match="self_teacher.judge.model m: expected advice .* first 1. rollouts"):
            feedback(questions)
        feedback.close()
        gone = server.url
    feedback = Feedback(judge_of(state, gone), tmp_path / "gone", world, signals)
    with pytest.raises(JudgeError, match=r"self_teacher.judge.endpoint http://.*: expected a server .* --resume"):
        feedback(questions)
    feedback.close()


def ask(judge, folder, world, signals, rollouts):
    """Return what a new process is told about these rollouts."""
    with closing(Feedback(judge, folder, world, signals)) as feedback:
        return feedback(rollouts)


@pytest.mark.parametrize(("status", "failing"), [(500, 0), (400, 0), (403, 5)])
def test_a_rollout_without_feedback_stays_so(state, material, world, tmp_path, signals, status, failing):
    """The run is killed before or after the end of a step in which the judge never answers one request."""
    rollouts = [(material.train[0], f"response {i}") for i in range(6)]
    advice = [advice_of(text) if i != failing else None for i, (_, text) in enumerate(rollouts)]
    broken = True

    def script(request, number):
        fails = broken and response_of(request) == f"response {failing}"
        return error(status, "no") if fails else advise(request, number)

    with TeacherServer(script) as server:
        # The requests are sent in order.
        judge = judge_of(state, server.url, "self_teacher.judge.attempts=1", "self_teacher.judge.max_concurrency=1")
        assert ask(judge, tmp_path, world, signals, rollouts) == advice and len(server.requests) == 6
        file = tmp_path / "feedback.jsonl"
        *replies, failure = file.read_text().splitlines(keepends=True)
        assert len(replies) == 5 and json.loads(failure)["failure"] == ("failed" if status == 500 else "refused")
        # The retry would succeed.
        broken = False
        assert ask(judge, tmp_path, world, signals, rollouts) == advice and len(server.requests) == 6
        # Killed before the end of the step, the run asks about this rollout alone.
        file.write_text("".join(replies))
        broken = True
        for _ in range(2):
            assert ask(judge, tmp_path, world, signals, rollouts) == advice and len(server.requests) == 7
        assert file.read_text() == "".join([*replies, failure])


@pytest.mark.parametrize("status", [500, 400])
def test_feedback_of_a_step_without_any_reply_is_requested_again(state, material, world, tmp_path, signals, status):
    rollouts = [(material.train[0], f"response {i}") for i in range(12)]
    broken = True
    with TeacherServer(lambda *request: error(status, "no") if broken else advise(*request)) as server:
        judge = judge_of(state, server.url, "self_teacher.judge.attempts=1")
        for few, failed in ((rollouts[:3], "3 requests"), (rollouts, r"1\d requests")):
            with pytest.raises(JudgeError, match=rf"endpoint http://.*: expected .* no reply to {failed} .*{status}"):
                ask(judge, tmp_path, world, signals, few)
            assert not (tmp_path / "feedback.jsonl").exists()
        broken = False
        assert ask(judge, tmp_path, world, signals, rollouts) == [advice_of(text) for _, text in rollouts]


def test_feedback_is_kept_by_model_and_prompt(state, material, world, tmp_path, signals):
    """Another judge, or a corrected ground truth, needs other feedback; another server or limit does not."""
    first, second = material.train[:2]
    rollouts = [(first, f"response {i}") for i in range(12)]

    def script(request, number):
        useless = request["model"] == "other" or response_of(request) != "response 11"
        return completion("") if useless else advise(request, number)

    with TeacherServer(script) as server, TeacherServer(script) as moved:
        with closing(Feedback(judge_of(state, server.url), tmp_path, world, signals)) as feedback:
            assert feedback(rollouts[-1:]) == [advice_of("response 11")]
            assert feedback(rollouts[:-1]) == [None] * 11 and len(server.requests) == 12
        # A run that has had advice goes on, also if it continues with a step that has none.
        judge = judge_of(state, moved.url, "self_teacher.judge.max_tokens=2000")
        assert ask(judge, tmp_path, world, signals, rollouts[:-1]) == [None] * 11 and not moved.requests
        corrected = replace(first, answer=second.answer if second.answer != first.answer else "another")
        ask(judge, tmp_path, world, signals, [(corrected, "response 11")])
        ask(replace(judge, temperature=0.5), tmp_path, world, signals, rollouts[-1:])
        assert len(moved.requests) == 2
        with pytest.raises(JudgeError, match=r"self_teacher.judge.model other: expected advice .* first 1\d rollouts"):
            ask(replace(judge, model="other"), tmp_path, world, signals, rollouts)


def test_a_run_continues_after_its_judge_was_down(folder, material):
    """The judge is found before stage 1, answers in the first step only, and is back when the run continues."""
    train = folder / "judged.jsonl"
    write_questions(train, material.train, media_root=folder)
    failing = False
    answered = Counter()

    def script(request, number):
        if failing and number >= 9:
            return error(401, "no")
        answered[json.dumps(request["messages"])] += 1
        return advise(request, number)

    with TeacherServer(script) as server:
        sizes = ["data.heldout=", "data.max_prompt_tokens=500", "data.cache_mib=16", "video.num_frames=8"]
        sizes += ["rollout.n=2", "rollout.max_new_tokens=8", "distill.batch_size=4", "distill.steps=2"]
        sizes += ["checkpoint.every_steps=1", "runtime.trackers=[]", "runtime.zero_stage=0"]
        sizes += ["runtime.check_memory=false"]
        paths = [f"data.train={train}", f"data.media_root={folder}", f"model.path={material.model_path}"]
        judge = ["self_teacher.judge.model=m", f"self_teacher.judge.endpoint={server.url}"]
        failing = True
        wrong = [*judge[:1], "self_teacher.judge.endpoint=http://127.0.0.1:9", "self_teacher.judge.attempts=1"]
        done = run_train(["visd", *paths, *sizes, *wrong, f"output={folder / 'judged'}"])
        assert done.returncode == 2 and "self_teacher.judge.endpoint http://127.0.0.1:9" in done.stderr
        assert "expected a reply to a first request, got none" in done.stderr
        run = only_run(folder / "judged")
        assert f"use --resume {run}, with --allow-changes" in done.stderr and "checkpoint" not in done.stderr
        assert not (run / "metrics.jsonl").exists() and not server.requests
        # As the message says.
        done = run_train(["--resume", str(run), "--allow-changes", *judge[1:], "self_teacher.judge.attempts=4"])
        assert done.returncode == 2, done.stderr[-3000:]
        assert "self_teacher.judge" in done.stderr and "continue from the last checkpoint" in done.stderr
        file = run / "feedback.jsonl"
        replies = file.read_bytes()
        assert len(replies.splitlines()) == answered.total() == 9
        failing = False
        # A damaged file is found before the first stage.
        file.write_bytes(replies + b"damaged\n")
        asked = len(server.requests)
        done = run_train(["--resume", str(run)])
        assert done.returncode == 2 and f"{file}:10: expected a JSON object" in done.stderr
        assert "continuing after step" not in done.stdout + done.stderr and len(server.requests) == asked
        file.write_bytes(replies)
        done = run_train(["--resume", str(run)])
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Rollouts with a judge" in (run / "report.html").read_text()
        shares = [json.loads(line).get("self_teacher/feedback_share") for line in (run / "metrics.jsonl").open()]
        assert [share for share in shares if share is not None] == [1.0, 1.0]
        # Nothing is requested twice, and all requests of the second step were sent.
        assert set(answered.values()) == {1} and answered.total() > 9
        keys = [json.loads(line)["key"] for line in file.open()]
        assert len(set(keys)) == len(keys) == answered.total()


@pytest.mark.slow
def test_two_processes_under_zero3_equal_one(folder, material, larger):
    """The main process asks the judge for both, and every process has the whole teacher and encodes other media."""
    train = folder / "shown.jsonl"
    media = material.train[0].hints["media"]
    shown = [replace(q, hints={"media": media}) if q.task_type != "temporal" else q for q in material.train]
    write_questions(train, shown, media_root=folder)
    recorded = []
    with TeacherServer(advise) as server:
        paths = [f"data.train={train}", f"data.media_root={folder}", f"model.path={material.model_path}"]
        sizes = ["data.heldout=", "data.max_prompt_tokens=500", "data.cache_mib=16", "video.num_frames=8"]
        sizes += ["rollout.n=2", "rollout.max_new_tokens=8", "distill.batch_size=4", "distill.steps=1", "kd.kind=k1"]
        sizes += ["runtime.trackers=[]", "model.dtype=float32", "micro_tokens=2000", "credit.magnitude=none"]
        sizes += ["runtime.check_memory=false"]
        teacher = ["self_teacher.views=[answer,media,feedback]", "self_teacher.judge.model=m"]
        teacher += ["self_teacher.ema_rate=0.01", f"self_teacher.judge.endpoint={server.url}"]
        other = ["self_teacher.kind=path", f"self_teacher.path={larger}", *teacher[:2], teacher[3]]
        for number, (kind, processes, zero) in enumerate([(other, 2, 3), (teacher, 1, 0), (teacher, 2, 3)]):
            output = folder / f"processes-{number}"
            arguments = ["visd", *paths, *sizes, *kind, f"runtime.zero_stage={zero}", f"output={output}"]
            done = run_train(arguments, processes=processes)
            assert done.returncode == 0, done.stderr[-3000:]
            lines = (only_run(output) / "metrics.jsonl").read_text().splitlines()
            recorded.append(json.loads(lines[-1]))
            assert recorded[-1]["self_teacher/feedback_share"] == 1
    # A damaged file of replies ends both processes.
    run = only_run(output)
    with (run / "feedback.jsonl").open("a") as file:
        file.write("damaged\n")
    done = run_train(["--resume", str(run)], processes=2, timeout_s=120)
    assert done.returncode != 0 and "feedback.jsonl:" in done.stderr and "expected a JSON object" in done.stderr
    another, one, two = recorded
    for name in ("self_teacher/gap", "self_teacher/gap_size", "policy/grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
        assert abs(another[name] - one[name]) > 1e-2 * abs(one[name]), name


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["self_teacher.kind=path", "kd.kind=k1"], "self_teacher.path: expected the folder or Hub name of a model"),
        (
            ["self_teacher.kind=live", "self_teacher.views=[cue]", "kd.kind=k1", "self_teacher.path=x"],
            "self_teacher.path has no effect: self_teacher.kind=live has the student's weights",
        ),
        (
            ["self_teacher.kind=path", "self_teacher.path=x", "kd.kind=k1", "self_teacher.max_hint_tokens=9"],
            "self_teacher.max_hint_tokens has no effect: self_teacher.views has no texts",
        ),
        (
            ["self_teacher.kind=live", "self_teacher.views=[media]", "kd.kind=k1", "self_teacher.max_hint_tokens=9"],
            "self_teacher.max_hint_tokens has no effect: self_teacher.views has no texts",
        ),
        (
            [
                "self_teacher.kind=live",
                "self_teacher.views=[cue]",
                "kd.kind=k1",
                "self_teacher.judge.endpoint=http://a",
            ],
            "self_teacher.judge.endpoint has no effect: the judge writes feedback, which is not in self_teacher.views",
        ),
        (
            ["self_teacher.kind=live", "self_teacher.views=[feedback]", "kd.kind=k1", "self_teacher.judge.model=m"],
            "self_teacher.judge.model has no effect: there is no judge; set self_teacher.judge.endpoint",
        ),
        (
            [
                *("self_teacher.kind=live", "self_teacher.views=[feedback]", "kd.kind=k1"),
                "self_teacher.judge.endpoint=http://a",
            ],
            "self_teacher.judge.model: expected the name of a model, got nothing",
        ),
        (
            [*JUDGE, "kd.kind=k1", "self_teacher.judge.endpoint=http://a", "self_teacher.judge.extra_body={n: 2}"],
            "self_teacher.judge.extra_body: expected other fields, got 'n', which stage 2 sets",
        ),
    ],
)
def test_conflicting_settings_are_refused(overrides, says):
    with pytest.raises(SettingsError, match=says):
        load_settings("quickstart", overrides)
