"""Test that a dump has the rollouts bit for bit, and that training from it equals the training that wrote it."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from material import tiny_material, tiny_settings

from rmsd_fast.config import SettingsError, UserError
from rmsd_fast.data.errors import DataError
from rmsd_fast.files import Locked, file_digest
from rmsd_fast.models.folders import model_digests
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.rollout.dump import dumped_steps, join, pack, read_info, read_step, step_file, unpack, write_step
from rmsd_fast.rollout.replay import ReplayRollout
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.stages.memory import plan_memory
from rmsd_fast.stages.plan import describe_plan
from rmsd_fast.stages.rollout_dump import RolloutDump, begin_dump, check_replay, check_replay_start, dump_folder
from rmsd_fast.stages.state import StageState

SMALL = ("rollout.n=3", "rollout.max_new_tokens=8", "data.max_prompt_tokens=500", "micro_tokens=600")
SMALL += ("stages=[warm_up,distill]", "discriminator.warm_up_steps=1", "distill.steps=2", "distill.batch_size=4")
# With a zero head, the first rewards of an untrained student would be equal and its gradient zero.
SMALL += ("discriminator.head=random", "distill.lr=1e-3", "distill.warmup_steps=0")
SHARED = ("model.adapter=lora", "model.lora_rank=4", "discriminator.mode=shared")


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def material(folder):
    return tiny_material(folder)


def settings_of(folder, *overrides):
    # A replay does not have the metrics of this check.
    return tiny_settings(folder, *SMALL, "rollout.parity_every=0", *overrides)


def train(settings, material, world, *, dump: str = "") -> tuple[StageState, list[dict], list]:
    """Take a step of the warm-up and two of stage 2. Return the state, the metrics, and the rollouts of each step."""
    state = build_distillation(material.model_path, settings, world, material)
    if dump:
        files = {"model": model_digests(Path(material.model_path)), "train": file_digest(material.files["train"])}
        state.dump = begin_dump(settings, world, Path("runs/first"), {"files": files}, material.model_path, 0)
    prompts = [state.builder.build(q) for q in material.train[:12]]
    # The second step has a question twice.
    steps = [prompts[:4], [*prompts[4:7], prompts[4]], prompts[8:12]]
    metrics, drawn = [], []
    for number, (take, some) in enumerate(zip((distill.warm_up_step, distill.step, distill.step), steps, strict=True)):
        result = take(state, some, max(0, number - 1))
        metrics.append(result.metrics)
        drawn.append([group.rollouts for group in result.groups])
    return state, metrics, drawn


def trained(state: StageState) -> dict[str, torch.Tensor]:
    engines = {"policy": state.policy, "discriminator": state.discriminator}
    return {f"{name}.{key}": p.detach() for name, e in engines.items() for key, p in e.module.named_parameters()}


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and one.numpy().tobytes() == two.numpy().tobytes()


@pytest.fixture(scope="module")
def dumped(folder, material, world, tmp_path_factory):
    """Return a dump of three steps, and what the training that wrote it computed."""
    path = tmp_path_factory.mktemp("dump") / "a"
    settings = settings_of(folder, f"rollout.dump={path}")
    with dump_folder(settings, world, None):
        state, metrics, drawn = train(settings, material, world, dump=str(path))
    return path, metrics, {name: value.clone() for name, value in trained(state).items()}, drawn


def replaying(folder, path, *overrides):
    return tiny_settings(folder, *SMALL, "rollout.engine=replay", f"rollout.replay={path}", *overrides)


def test_a_dump_has_every_rollout_bit_for_bit(dumped, material):
    path, _, _, drawn = dumped
    assert dumped_steps(path) == [0, 1, 2]
    key = read_info(path, "rollout.replay").key
    for step, groups in enumerate(drawn):
        packed = read_step(path, step, key)
        assert packed.questions == [group[0].question_id for group in groups]
        texts = {tuple(r.token_ids.tolist()): r.text for group in groups for r in group}
        for place, group in enumerate(groups):
            for one, two in zip(group, unpack(packed, place, lambda ids, t=texts: t[tuple(ids.tolist())]), strict=True):
                assert same_bits(one.token_ids, two.token_ids) and same_bits(one.logp, two.logp)
                for name in ("question_id", "index", "text", "truncated", "policy_version", "banned_mass"):
                    assert getattr(one, name) == getattr(two, name)
        assert {rollout.policy_version for group in groups for rollout in group} == {step}


def test_a_replay_equals_the_training_that_wrote_the_dump(dumped, folder, material, world):
    path, metrics, weights, drawn = dumped
    state, again, replayed = train(replaying(folder, path), material, world)
    assert isinstance(state.rollouts, ReplayRollout)
    assert again == metrics
    now = trained(state)
    assert now.keys() == weights.keys() and all(same_bits(weights[name], now[name]) for name in weights)
    assert [[r.text for r in g] for step in replayed for g in step] == [[r.text for r in g] for s in drawn for g in s]
    # The training has changed the student, so the equality is not that of two untrained students.
    start = build_distillation(material.model_path, settings_of(folder), world, material)
    before = trained(start)
    assert any(not torch.equal(before[name], now[name]) for name in now if name.startswith("policy"))


def test_a_replay_with_shared_adapters_equals_its_training(folder, material, world, tmp_path):
    path = tmp_path / "dump"
    settings = settings_of(folder, f"rollout.dump={path}", *SHARED)
    with dump_folder(settings, world, None):
        state, metrics, _ = train(settings, material, world, dump=str(path))
    weights = {name: value.clone() for name, value in trained(state).items()}
    state, again, _ = train(replaying(folder, path, *SHARED), material, world)
    now = trained(state)
    assert again == metrics and all(same_bits(weights[name], now[name]) for name in weights)


def test_a_replay_generates_nothing_and_takes_no_rollout_from_the_model(dumped, folder, material, world, monkeypatch):
    path, _, _, drawn = dumped
    monkeypatch.setattr("rmsd_fast.rollout.hf.HfRollout.generate", lambda *_, **__: pytest.fail("generated"))
    state = build_distillation(material.model_path, replaying(folder, path), world, material)
    prompts = [state.builder.build(q) for q in material.train[:4]]
    with torch.no_grad():
        for parameter in state.policy.module.parameters():
            parameter.add_(0.01)
    # Prompts are found by their ids, in any order.
    rollouts, _ = distill.roll_out(state, prompts[::-1], 0)
    for one, two in zip(rollouts[::-1], drawn[0], strict=True):
        assert all(same_bits(a.logp, b.logp) for a, b in zip(one, two, strict=True))
    # Another policy gives the sampled tokens other probabilities.
    metrics = distill.step(state, [state.builder.build(q) for q in material.train[8:12]], 1).metrics
    assert abs(metrics["policy/importance_ratio"] - 1) > 1e-3


def rollout(question: str, index: int, ids: list[int], logp: list[float]) -> Rollout:
    return Rollout(question, index, torch.tensor(ids), f"{ids}", torch.tensor(logp), index == 1, 7)


def test_the_file_of_a_step_does_not_depend_on_the_number_of_processes(tmp_path):
    """The values include NaN, infinities and ids of a large vocabulary."""
    groups = [
        [rollout("a", 0, [5, 151_935], [-0.1, float("nan")]), rollout("a", 1, [1], [float("-inf")])],
        [rollout("ü\n", 0, [2, 3, 4], [-1e-38, -3.0, 0.0]), rollout("ü\n", 1, [9], [-2.5])],
    ]
    write_step(tmp_path, 3, pack(groups), "key")
    once = step_file(tmp_path, 3).read_bytes()
    write_step(tmp_path, 3, join([pack(groups[:1]), pack(groups[1:])]), "key")
    assert step_file(tmp_path, 3).read_bytes() == once
    packed = read_step(tmp_path, 3, "key")
    for place, group in enumerate(groups):
        for one, two in zip(group, unpack(packed, place, lambda ids: f"{ids.tolist()}"), strict=True):
            assert same_bits(one.token_ids, two.token_ids) and same_bits(one.logp, two.logp)
            assert (one.text, one.truncated, one.question_id) == (two.text, two.truncated, two.question_id)


def test_two_copies_of_a_question_keep_their_own_rollouts(tmp_path):
    class Builder:
        def decode_response(self, ids):
            return f"{ids.tolist()}"

    class Asked:
        class question:
            id = "a"

    groups = [[rollout("a", 0, [1], [-0.1])], [rollout("b", 0, [2], [-0.1])], [rollout("a", 0, [3], [-0.1])]]
    write_step(tmp_path, 0, pack([*groups, groups[1]]), "key")
    sampling = distill.Sampling(n=1, temperature=1.0, max_new_tokens=4)
    for rank, expected in ((0, [1]), (1, [3])):
        engine = ReplayRollout.__new__(ReplayRollout)
        engine.folder, engine.builder, engine.rank, engine.key = tmp_path, Builder(), rank, "key"
        # Each of two processes has two places of the step.
        asked = [Asked(), Asked()]
        assert engine.generate(None, asked, sampling)[0][0].token_ids.tolist() == expected


def test_a_step_that_cannot_be_written_raises_and_leaves_the_others(world, tmp_path):
    groups = [[rollout("a", 0, [1] * 3000, [-0.1] * 3000)]]
    write_step(tmp_path, 0, pack(groups), "key")
    before = step_file(tmp_path, 0).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        for step in (0, 1):
            with pytest.raises(OSError, match="File too large") as caught:
                RolloutDump(tmp_path, "key", world).write(groups, step)
            # The program prints this name, with advice, and how to continue the run.
            assert caught.value.filename == str(step_file(tmp_path, step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == [step_file(tmp_path, 0).name]
    assert step_file(tmp_path, 0).read_bytes() == before


def test_bytes_per_rollout(dumped, tmp_path):
    """A file has 8 bytes per token and 17 per rollout, besides its header and the ids of the questions."""
    groups = [[rollout(f"question-{g}", i, [7] * 100, [-0.5] * 100) for i in range(8)] for g in range(16)]
    write_step(tmp_path, 0, pack(groups), "key")
    size = step_file(tmp_path, 0).stat().st_size
    assert 0 <= size - 128 * (17 + 8 * 100) < 1300


def spoil(path: Path, kind: str) -> None:
    file = step_file(path, 1)
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
        return
    if kind == "a bit of a log-prob":
        content[-6] ^= 1
    elif kind == "a bit of a question":
        content[content.index(b"train-") + 3] ^= 1
    elif kind == "truncated":
        del content[-9:]
    elif kind == "empty":
        content.clear()
    elif kind == "another step":
        content = bytearray(step_file(path, 0).read_bytes())
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "expected the rollouts of every step, got none for distill step 1"),
        ("a bit of a log-prob", "step_000001.safetensors: damaged (its content does not have its checksum)"),
        ("a bit of a question", "step_000001.safetensors: damaged"),
        ("truncated", "step_000001.safetensors: damaged"),
        ("empty", "step_000001.safetensors: damaged"),
        ("another step", "expected step 1 of this dump, got step 0 of this dump"),
    ],
)
def test_damaged_dumps_are_refused_before_the_start(dumped, folder, material, tmp_path, kind, words):
    path = Path(shutil.copytree(dumped[0], tmp_path / "dump"))
    spoil(path, kind)
    settings = replaying(folder, path)
    with pytest.raises(UserError) as caught:
        check_replay(settings, Path(material.model_path), file_digest(material.files["train"]))
    assert words in str(caught.value)
    # The dry run finds it too.
    settings.model.path = material.model_path
    with pytest.raises(UserError) as caught:
        describe_plan(settings)
    assert words in str(caught.value)


def test_a_file_of_another_dump_is_refused(dumped, folder, material, world, tmp_path):
    path = Path(shutil.copytree(dumped[0], tmp_path / "dump"))
    packed = read_step(path, 1, read_info(path, "rollout.replay").key)
    write_step(path, 1, packed, "another")
    with pytest.raises(DataError, match="got step 1 of another dump"):
        check_replay(replaying(folder, path), Path(material.model_path), file_digest(material.files["train"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.n=4"], "expected rollout.n=3 as in the run that wrote it, got 4; set rollout.n=3"),
        (["rollout.temperature=0.5"], "expected rollout.temperature=1.0 as in the run that wrote it, got 0.5"),
        (["rollout.max_new_tokens=9"], "expected rollout.max_new_tokens=8 as in the run that wrote it, got 9"),
        (["seed=1"], "expected seed=0 as in the run that wrote it, got 1"),
        (["distill.batch_size=8"], "expected distill.batch_size=4 as in the run that wrote it, got 8"),
        (["video.num_frames=4"], "expected video.num_frames=8 as in the run that wrote it, got 4"),
        (["stages=[distill]"], "discriminator.warm_up_steps=1 as in the run that wrote it, got 0; set stages and"),
        (["distill.steps=5"], "got none for distill steps 3 to 5; set distill.steps=2, or continue first"),
    ],
)
def test_other_settings_are_refused_before_the_start(dumped, folder, material, overrides, words):
    if "stages=[distill]" in overrides:
        settings = replaying(folder, dumped[0])
        settings.stages = ["distill"]
    else:
        settings = replaying(folder, dumped[0], *overrides)
    with pytest.raises(SettingsError) as caught:
        check_replay(settings, Path(material.model_path), file_digest(material.files["train"]))
    assert words in str(caught.value) and str(dumped[0]) in str(caught.value)


def test_another_student_and_other_questions_are_refused(dumped, folder, material, tmp_path):
    settings = replaying(folder, dumped[0])
    (line,) = check_replay(settings, Path(material.model_path), file_digest(material.files["train"]))
    assert line.startswith("rollout.replay: 3 steps of first, 0.0 MiB")
    with pytest.raises(SettingsError, match="expected the training questions of first"):
        check_replay(settings, Path(material.model_path), "others")
    student = Path(shutil.copytree(material.model_path, tmp_path / "student"))
    check_replay(settings, student, file_digest(material.files["train"]))
    for name in ("tokenizer.json", "model.safetensors"):
        content = bytearray((student / name).read_bytes())
        content[-3] ^= 1
        (student / name).write_bytes(bytes(content))
        with pytest.raises(SettingsError, match=f"differs in .*{name}; set model.path={material.model_path}"):
            check_replay(settings, student, file_digest(material.files["train"]))
        shutil.copy(Path(material.model_path) / name, student / name)


def test_a_changed_dump_is_another_input_of_a_resumed_run(dumped, folder, world, tmp_path):
    path = Path(shutil.copytree(dumped[0], tmp_path / "dump"))
    settings = replaying(folder, path)
    before = prepare_material(settings, world).fingerprints()
    assert prepare_material(settings, world).fingerprints() == before
    (path / "dump.json").write_text((path / "dump.json").read_text() + "\n")
    after = prepare_material(settings, world).fingerprints()
    assert {name for name in before if before[name] != after[name]} == {"replay"}


def test_stage_1_before_a_replay_is_refused(dumped, folder, material, tmp_path):
    settings = replaying(folder, dumped[0])
    settings.stages = ["sft", "control", "warm_up", "distill"]
    for resume in (None, tmp_path):
        with pytest.raises(SettingsError) as caught:
            check_replay_start(settings, material, resume)
        expected = (
            f"got [sft,control,warm_up,distill]; set stages=[control,warm_up,distill] model.path={material.model_path}"
        )
        assert str(caught.value).endswith(expected)
    with pytest.raises(SettingsError, match="expected no sft with rollout.engine=replay"):
        describe_plan(settings)
    # A run that has completed stage 1 can continue as a replay, if its student is that of the dump.
    shutil.copytree(material.model_path, tmp_path / "stage1")
    (line,) = check_replay_start(settings, material, tmp_path)
    assert line.startswith("rollout.replay: 3 steps of first")
    (tmp_path / "stage1" / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match="stage1, which differs in config.json"):
        check_replay_start(settings, material, tmp_path)


def test_a_question_that_the_step_lacks_is_named(dumped, folder, material, world):
    state = build_distillation(material.model_path, replaying(folder, dumped[0]), world, material)
    prompts = [state.builder.build(material.train[9])]
    with pytest.raises(SettingsError) as caught:
        distill.roll_out(state, prompts, 0)
    assert f"step_000000.safetensors: expected rollouts of question {material.train[9].id!r}" in str(caught.value)
    with pytest.raises(DataError, match="step_000009.safetensors: expected the rollouts of a step, got no file"):
        distill.roll_out(state, prompts, 9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected a folder that a run has written with rollout.dump, got a folder without dump.json at"),
        ("{", "dump.json: damaged ("),
        ("[]", "dump.json: damaged ("),
        ('{"format": 9}', "format 9 instead of 1"),
        ('{"format": 1, "run": "a"}', "dump.json: damaged ("),
    ],
)
def test_damaged_descriptions_are_refused(folder, material, tmp_path, content, words):
    if content is not None:
        (tmp_path / "dump.json").write_text(content)
    with pytest.raises(UserError) as caught:
        check_replay(replaying(folder, tmp_path), None, "")
    assert words in str(caught.value)


def test_a_replay_plans_no_memory_for_rollouts(folder, material):
    config = json.loads((Path(material.model_path) / "config.json").read_text())
    generating, reading = (
        plan_memory(settings, config, processes=1, device="cuda").stages["distill"].phases
        for settings in (settings_of(folder), replaying(folder, "a"))
    )
    assert generating.pop("rollout") and generating == reading


def test_the_dry_run_names_a_missing_dump(folder, material, tmp_path):
    text, ready = describe_plan(replaying(folder, tmp_path / "gone"))
    assert f"MISSING: rollout.replay: {tmp_path / 'gone'}, a folder that a run has written" in text and not ready
    text, ready = describe_plan(settings_of(folder, f"rollout.dump={tmp_path / 'new'}"))
    # (1 + 2) steps of 4 questions with 3 rollouts each.
    assert "rollout.dump: 36 rollouts, at most 0.00 GiB" in text and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.engine=replay"], "rollout.replay: expected the folder of a dump with rollout.engine=replay"),
        (["rollout.replay=a"], "rollout.engine: expected replay with rollout.replay=a, got hf; set rollout.engine="),
        (["rollout.engine=replay", "rollout.replay=a", "rollout.dump=b"], "rollout.dump: expected nothing with"),
        (
            ["rollout.engine=replay", "rollout.replay=a", "rollout.prompts_per_batch=2"],
            "rollout.prompts_per_batch has no effect: rollout.engine=replay generates nothing",
        ),
        (
            ["rollout.engine=replay", "rollout.replay=a", "rollout.parity_bound=2"],
            "rollout.parity_bound has no effect: rollout.engine=replay has rollouts of another run",
        ),
        (["stages=[sft]", "rollout.dump=a"], "rollout.dump has no effect: no stage samples rollouts"),
        (["rollout.engine=remote"], "rollout.engine: expected one of hf, "),
        (["rollout.dump=~/a"], "'~' is not expanded"),
    ],
)
def test_settings_without_effect_are_refused(overrides, words):
    with pytest.raises(SettingsError) as caught:
        load_settings("quickstart", overrides)
    assert words in str(caught.value)


def test_a_dump_needs_a_folder_of_its_own(dumped, folder, world, tmp_path):
    def take(path, resume=None):
        with dump_folder(settings_of(folder, f"rollout.dump={path}"), world, resume):
            pass

    with pytest.raises(SettingsError, match="expected a new or empty folder, got the rollouts of first in"):
        take(dumped[0])
    with pytest.raises(SettingsError, match="expected a new or empty folder, got the rollouts of first in"):
        take(dumped[0], Path("runs/second"))
    take(dumped[0], Path("runs/first"))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingsError, match="expected a new or empty folder, got thesis.tex"):
        take(tmp_path)
    with pytest.raises(SettingsError, match="expected a folder, got the file"):
        take(tmp_path / "thesis.tex")
    with pytest.raises(SettingsError, match="rollout.dump: cannot create"):
        take(tmp_path / "thesis.tex" / "below")
    take(tmp_path / "a" / "b")
    # A run that was killed before its first step leaves no rollouts.
    take(tmp_path / "a" / "b")
    locked = dump_folder(settings_of(folder, f"rollout.dump={tmp_path / 'a' / 'b'}"), world, None)
    with locked, pytest.raises(Locked, match="is writing to this folder"):
        take(tmp_path / "a" / "b")


def test_a_resumed_run_continues_its_dump(dumped, folder, material, world, tmp_path, caplog):
    path = Path(shutil.copytree(dumped[0], tmp_path / "dump"))
    (path / ".step_000002.safetensors.99999999.tmp").write_text("half a step")
    info = read_info(path, "rollout.dump")
    files = {"model": info.student, "train": info.questions}
    settings = settings_of(folder, f"rollout.dump={path}")

    def begin(first, **changed):
        with dump_folder(settings, world, Path("runs/first")):
            return begin_dump(settings, world, Path("runs/first"), {"files": files | changed}, info.student_path, first)

    # The steps after the checkpoint are taken again. Earlier ones are kept.
    assert begin(2).key == info.key and dumped_steps(path) == [0, 1] and not list(path.glob("*.tmp"))
    assert not caplog.messages
    begin(5)
    expected = "the rollouts of 3 steps before the next step are missing (distill steps 2 to 4)"
    assert expected in caplog.text
    with pytest.raises(SettingsError, match="expected the student and the questions of its earlier steps"):
        begin(2, train="others")
    settings.rollout.n = 5
    with pytest.raises(SettingsError, match=r"rollout.dump=.*expected rollout.n=3 as in the run that wrote it, got 5"):
        begin(2)
    # Without earlier steps, the dump begins again.
    begin(0)
    assert dumped_steps(path) == [] and json.loads((path / "dump.json").read_text())["settings"]["rollout.n"] == 5


@pytest.mark.parametrize(
    ("accuracy", "lost", "following", "named"),
    [
        # The dump has the first 8 steps of a warm-up of 12, and 2 steps of stage 2.
        ("0.9", None, 14, None),
        ("0.9", 1, 14, "warm_up step 2"),
        ("0.9", 13, 14, "distill step 2"),
        ("null", None, 14, "warm_up steps 9 to 12"),
        # A warm-up takes at least 8 steps, over which it averages.
        ("0.9", 7, 14, "warm_up steps 8 to 12"),
        # The run continues from a checkpoint within the warm-up, which has not ended there.
        ("0.9", None, 8, None),
        ("0.9", None, 10, "warm_up steps 9 to 10"),
    ],
)
def test_a_warm_up_that_ended_early_lacks_its_last_steps_only(
    folder, material, world, tmp_path, caplog, accuracy, lost, following, named
):
    path = tmp_path / "dump"
    path.mkdir()
    early = ("discriminator.warm_up_steps=12", f"discriminator.warm_up_accuracy={accuracy}")
    settings = settings_of(folder, f"rollout.dump={path}", *early)
    files = {"model": model_digests(Path(material.model_path)), "train": file_digest(material.files["train"])}

    def begin(step):
        return begin_dump(settings, world, Path("runs/first"), {"files": files}, material.model_path, step)

    key = begin(0).key
    for step in (*range(8), 12, 13):
        if step != lost:
            write_step(path, step, pack([[rollout("a", 0, [1], [-0.1])]]), key)
    replay = replaying(folder, path, *early)
    accuracy_advice = ", or set discriminator.warm_up_accuracy as in that run" if accuracy == "null" else ""
    if following == 14 and named:
        expected = f"expected the rollouts of every step, got none for {named}; "
        with pytest.raises(SettingsError, match=expected) as caught:
            check_replay(replay, Path(material.model_path), files["train"])
        advice = "continue first, which wrote it, to its end" if lost == 13 else "restore the missing files"
        assert str(caught.value).endswith(advice + accuracy_advice)
    elif following == 14:
        (line,) = check_replay(replay, Path(material.model_path), files["train"])
        assert line.startswith("rollout.replay: 10 steps of first")
    begin(following)
    assert (f"before the next step are missing ({named});" in caplog.text) if named else not caplog.messages


def test_non_finite_rollouts_are_dumped_and_skip_the_step_again(folder, material, world, tmp_path):
    path = tmp_path / "dump"
    settings = settings_of(folder, f"rollout.dump={path}")
    state = build_distillation(material.model_path, settings, world, material)
    with dump_folder(settings, world, None):
        files = {"model": model_digests(Path(material.model_path)), "train": ""}
        state.dump = begin_dump(settings, world, Path("runs/a"), {"files": files}, material.model_path, 0)
        generate = state.rollouts.generate

        def spoiled(*args, **options):
            groups = generate(*args, **options)
            groups[0][0] = dataclasses.replace(groups[0][0], logp=groups[0][0].logp * torch.nan)
            return groups

        state.rollouts.generate = spoiled
        prompts = [state.builder.build(q) for q in material.train[:2]]
        assert distill.step(state, prompts, 0).skipped
    state = build_distillation(material.model_path, replaying(folder, path), world, material)
    assert distill.step(state, prompts, 0).skipped
