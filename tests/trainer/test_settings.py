"""Test recipes, overrides, and refused settings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from rmsd_fast.config import RECIPES, RunConfig, SettingsError
from rmsd_fast.settings import RULES, describe_settings, load_settings, save_settings
from rmsd_fast.stages.plan import describe_plan

ALL_RECIPES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_all_recipes_exist():
    wanted = {
        "quickstart",
        "quickstart_long",
        "real_clips",
        "rmsd_qwen3vl_4b",
        "rmsd_qwen3vl_4b_lora",
        "rmsd_qwen25vl_7b_lora",
        "rmsd_literal",
        "sft_rl_baseline",
        "gad",
    }
    assert wanted <= set(ALL_RECIPES)


@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_every_recipe_passes_a_dry_run_and_lists_its_needs(recipe):
    assert load_settings(recipe).name
    assert "settings are consistent" in describe_plan(load_settings(recipe))[0]
    head = (RECIPES / f"{recipe}.yaml").read_text().split("\nname:")[0]
    for word in ("Hardware", "Purpose"):
        assert word in head
    assert re.search(r"[Tt]ime\b", head)


def test_the_paper_recipe_has_the_numbers_of_the_paper():
    s = load_settings("rmsd_qwen3vl_4b")
    assert (s.reward.alpha, s.reward.beta, s.reward.eta, s.reward.delta) == (0.4, 0.1, 0.1, 0.4)
    assert (s.teacher.responses, s.teacher.min_quality, s.rollout.n) == (4, 0.3, 8)
    assert (s.sft.lr, s.distill.lr, s.sft.batch_size, s.distill.batch_size) == (2e-6, 1e-6, 128, 128)
    # The paper uses one epoch of 50K and 60K inputs.
    assert (s.sft.steps, s.distill.steps) == (50_000 // 128, 60_000 // 128)
    assert (s.video.num_frames, s.evaluate.num_frames) == (16, 64)


def test_saved_settings_read_back_the_same(tmp_path):
    settings = load_settings("quickstart", ["seed=7", "stages=[sft,distill]"])
    save_settings(settings, tmp_path / "config.yaml")
    assert load_settings(str(tmp_path / "config.yaml")) == settings


def test_help_documents_every_field():
    text = describe_settings()

    def check(owner: type, prefix: str) -> None:
        for field in dataclasses.fields(owner):
            if dataclasses.is_dataclass(field.default_factory):
                check(field.default_factory, f"{prefix}{field.name}.")
            elif prefix:
                assert f"  {prefix}{field.name}=" in text

    check(RunConfig, "")
    assert "  evaluate.judge.max_concurrency=16\n" in text


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["distill.stps=3"], "did you mean distill.steps"),
        (["nonsense.x=3"], "unknown setting nonsense.x"),
        (["distill.kl=k1"], "reward.kl_in_reward"),
        (["distill.kl=k4"], "expected one of k2, k3, full"),
        (["sft.lr=fast"], "sft.lr"),
        (["sft.lr=-1"], "sft.lr: expected at least 0, got -1"),
        (["sft.lr=nan"], "sft.lr: expected a finite number, got nan"),
        (["teacher.min_quality=5"], "expected 0 to 1"),
        (["distill.tis_cap=-1"], "a number above 0"),
        (["evaluate.num_frames=1"], "evaluate.num_frames: expected at least 2"),
        (["evaluate.benchmark=mmbench"], "evaluate.benchmark: expected one of empty, videomme, "),
        (["evaluate.prompt=benchmark"], "evaluate.prompt=benchmark: expected evaluate.benchmark"),
        (
            ["data.heldout=a.json", "evaluate.benchmark=mlvu", "data.format=rmsd"],
            "data.format has no effect: evaluate.benchmark says how to read the questions",
        ),
        (["made.questions_per_clip=9"], "expected 1 to 6"),
        (["made.tasks=[]"], "made.tasks: expected some of ['mcq', 'temporal', 'spatial', 'numeric', 'ocr', 'open']"),
        (["made.tasks=[ocr,open,mcq,ocr]"], "each at most once, got ['ocr', 'open', 'mcq', 'ocr']; set e.g."),
        (["made.tasks=[ocr,open,counting]"], "set e.g. made.tasks=[temporal,open]"),
        (["made.tasks=[temporal,open]", "made.questions_per_clip=3"], "got 3; set made.questions_per_clip=2"),
        (["made.source=real_clips", "made.tasks=[mcq,open,ocr]"], "the set of real clips is fixed"),
        (["made.source=real_clips", "made.tasks=[mcq,open]", "made.wording=paraphrased"], "set made.source=clips"),
        (["made.source=real_clips", "made.teacher=blind"], "made.teacher=blind: expected made.source=clips"),
        (["made.tasks=[mcq,spatial,ocr]", "made.wording=paraphrased"], "add it to made.tasks"),
        (
            ["made.label_share=0.5"],
            "made.label_share: expected 1, since teacher.unlabeled=refuse needs every ground truth",
        ),
        (["made.label_share=2", "teacher.unlabeled=agreement"], "made.label_share: expected 0 to 1"),
        (["made.source=real_clips", "made.label_share=1"], "the set of real clips is fixed"),
        (["data.train=q.jsonl", "made.label_share=1"], "data.train sets the questions"),
        (["teacher.unlabeled=vote"], "teacher.unlabeled: expected one of refuse, agreement"),
        (["made.teacher=late"], "made.teacher: expected one of noisy, reported, biased, imprecise, blind, got 'late'"),
        (["made.wording=other"], "made.wording: expected one of reference, paraphrased"),
        (["made.teacher=biased", "made.teacher_error_rate=0.2"], "made.teacher=biased has its own errors"),
        (["teacher.pool=p.jsonl", "made.teacher=biased"], "teacher.pool sets the pool"),
        (["distill.kl=full", "distill.kl_coef=0"], "distill.kl_coef is 0"),
        (["stages=[sft,warm_up]", "reward.normalization=sum_then_gn"], "the warm-up does not compute rewards"),
        (["stages=[sft]", "distill.batch_size=4"], "no stage uses it"),
        (["stages=[sft]", "teacher.filter=matching"], "only applies when a discriminator is trained"),
        (["teacher.filter=none", "teacher.min_quality=0.5"], "teacher.filter is none; set teacher.filter=both"),
        (["stages=[sft]", "teacher.weighting=uniform"], "no discriminator is trained"),
        (["teacher.weighting=uniform", "teacher.weight_power=2"], "weights follow the quality only with"),
        (["stages=[sft]", "teacher.empty_pools=drop"], "no stage uses it; add distill or control"),
        (["stages=[warm_up,distill]", "teacher.filter=imitation"], "no stage imitates; set teacher.filter=none"),
        (["discriminator.warm_up_steps=7", "discriminator.warm_up_accuracy=0.6"], "it averages 8 steps"),
        (["reward.alpha=0", "stages=[sft,distill]", "reward.score_sd_offset=1"], "no discriminator is trained"),
        (["reward.normalization=sum_then_gn", "reward.score_sd_offset=1"], "sum_then_gn does not normalize"),
        (["teacher.quality=uniform"], "did you mean teacher.weighting=quality or uniform"),
        (["model.path=x", "made.student_hidden=96"], "model.path sets the student"),
        (["reward.alpha=0", "stages=[sft,distill]", "reward.score_clip=3"], "reward.alpha > 0"),
        (["stages=[control]", "sft.lr=1"], "the control uses distill.*"),
        (["rollout.n=0"], "at least 1"),
        (["rollout.log_every_steps=-1"], "rollout.log_every_steps: expected at least 0, got -1"),
        (["rollout.log_questions=0"], "rollout.log_questions: expected at least 1, got 0"),
        (["rollout.log_every_steps=0", "rollout.log_questions=2"], "set rollout.log_every_steps=10"),
        (["stages=[sft]", "rollout.log_every_steps=5"], "no stage samples rollouts"),
        (["rollout.temperature=0"], "rollout.temperature"),
        (["video.fps=2"], "cannot both be set"),
        (["video.min_video_pixels=10000", "video.max_video_pixels=5000"], "at most video.max_video_pixels=5000"),
        (
            ["video.num_frames=null", "video.fps=2", "video.min_frames=9", "video.max_frames=4"],
            "at most video.max_frames",
        ),
        (
            ["video.num_frames=null", "video.fps=2", "video.min_frames=1"],
            "video.min_frames: expected at least 2, got 1",
        ),
        (
            ["video.num_frames=null", "video.fps=2", "video.min_frames=2", "video.max_frames=1"],
            "video.max_frames: expected at least 2, got 1",
        ),
        (["data.decoder=gpu"], "data.decoder: expected one of auto, cpu, cuda"),
        (["data.decode_timeout_s=0"], "a number above 0"),
        (["data.disk_cache_gib=8"], "data.disk_cache is empty"),
        (["data.embedding_cache_mib=8", "distill.train_vision=true"], "only with a frozen vision tower"),
        (["data.embedding_cache_mib=8", "stages=[sft]"], "only with a frozen vision tower"),
        (
            ["data.embedding_cache_mib=8", "stages=[sft]", "sft.train_vision=false", "runtime.zero_stage=3"],
            "not in stage 1 under ZeRO-3",
        ),
        (["video.min_frames=2"], "has no effect"),
        (["stages=[distill,sft]"], "expected a subsequence of"),
        (["stages=[]"], "stages"),
        (["stages=[sft]", "distill.steps=4"], "distill.steps has no effect"),
        (["stages=[sft,distill]", "discriminator.warm_up_steps=4"], "add it to stages"),
        (["stages=[sft]", "evaluate.rollouts=0", "rollout.temperature=1"], "no stage samples rollouts"),
        (["stages=[sft]", "evaluate.rollouts=2", "rollout.n=4"], "no stage samples rollouts"),
        (["stages=[sft]", "rollout.prompts_per_batch=4"], "no stage samples rollouts"),
        (["reward.alpha=0", "stages=[sft,distill]", "discriminator.lr=1"], "reward.alpha > 0"),
        (["reward.alpha=0"], "warm_up trains the discriminator"),
        (["distill.objective=sft"], "distill.objective was removed: the control of stage 2 is a stage; set stages="),
        (["stages=[sft,control]", "rollout.n=3"], "no stage samples rollouts"),
        (["stages=[sft,control]", "distill.kl_coef=0.1"], "the control has no policy loss"),
        (["stages=[sft,distill,control]"], "expected a subsequence of"),
        (["stages=[sft]", "evaluate.every_steps=5"], "only distill and control are evaluated during training"),
        (["teacher.responses=8"], "teacher.responses: expected at most made.responses=4"),
        (["evaluate.every_steps=60"], "evaluate.every_steps has no effect: stage 2 ends after distill.steps=60"),
        (
            ["reward.unlabeled=teacher"],
            "reward.unlabeled has no effect: teacher.unlabeled=refuse requires every ground",
        ),
        (
            ["reward.unlabeled=teacher", "teacher.unlabeled=agreement", "reward.delta=0"],
            "reward.unlabeled has no effect: reward.delta is 0",
        ),
        (["teacher.numeric_metric=mra", "teacher.numeric_eps=0.1"], "teacher.numeric_metric is mra"),
        (["runtime.zero_stage=0", "runtime.offload_optimizer=true"], "runtime.zero_stage=2"),
        (["sft.micro_batch=4"], "did you mean micro_tokens?"),
        (["packing=flat"], "packing: expected one of shared, padded"),
        (["model.attention=eager"], "set packing=padded"),
        (["micro_tokens=0"], "micro_tokens: expected at least 1"),
        (["data.max_prompt_tokens=1000", "rollout.max_new_tokens=99", "micro_tokens=1099"], "together, 1100, got 1099"),
        (["data.train=~/q.jsonl"], "data.train: expected a path, got '~/q.jsonl', in which '~' is not expanded; write"),
        (["model.path=~/m"], "model.path: expected a path, got '~/m'"),
        (["steps"], "expected section.field=value"),
    ],
)
def test_impossible_or_ineffective_settings_are_refused(overrides, says):
    with pytest.raises(SettingsError, match=re.escape(says)):
        load_settings("quickstart", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["made.tasks=[temporal,open]", "made.questions_per_clip=2", "made.teacher=biased", "made.wording=paraphrased"],
        ["made.source=real_clips", "made.teacher=imprecise"],
        ["made.label_share=0", "teacher.unlabeled=agreement"],
        ["made.label_share=1"],
        ["distill.kl_coef=0"],
        ["distill.kl_coef=0", "reward.kl_in_reward=0.1"],
        ["stages=[sft,warm_up]", "distill.batch_size=8", "micro_tokens=20000"],
        ["stages=[sft,control]", "teacher.empty_pools=drop", "teacher.weighting=uniform"],
        ["stages=[control]", "sft.responses=all", "distill.steps=3", "distill.lr=1e-3"],
        ["stages=[sft,control,warm_up,distill]", "distill.kl=k2", "rollout.n=3"],
        ["packing=padded", "model.attention=eager"],
        ["stages=[sft]", "micro_tokens=16385"],
        ["data.heldout="],
        ["rollout.log_every_steps=0"],
        ["rollout.log_every_steps=1", "rollout.log_questions=2"],
        ["data.embedding_cache_mib=8"],
        ["data.embedding_cache_mib=8", "stages=[sft]", "sft.train_vision=false"],
        ["data.embedding_cache_mib=8", "runtime.zero_stage=3"],
        ["data.disk_cache=x", "data.disk_cache_gib=0.5"],
        ["stages=[sft]", "evaluate.rollouts=2", "rollout.temperature=1"],
        ["stages=[sft]", "evaluate.rollouts=0", "rollout.cuda_graphs=false"],
        ["stages=[control]", "evaluate.rollouts=2", "rollout.temperature=1"],
    ],
)
def test_effective_settings_are_accepted(overrides):
    load_settings("quickstart", overrides)


def test_evaluation_settings_without_held_out_questions_are_accepted(tmp_path):
    """A copy of the 4B recipe without data.heldout has such settings, and so has a run with `data.heldout=`."""
    copy = tmp_path / "my.yaml"
    text = (RECIPES / "rmsd_qwen3vl_4b.yaml").read_text()
    copy.write_text(text.replace("  heldout: data/heldout.jsonl\n", ""))
    settings = load_settings(str(copy))
    assert settings.data.heldout == "" and settings.evaluate.num_frames == 64
    assert settings == load_settings("rmsd_qwen3vl_4b", ["data.heldout="])
    assert load_settings(str(copy), ["data.heldout=h.jsonl", "evaluate.num_frames=32"]).evaluate.num_frames == 32
    with pytest.raises(SettingsError, match=r"override: evaluate\.num_frames has no effect: there are no held-out"):
        load_settings(str(copy), ["evaluate.num_frames=32"])


def test_unknown_keys_of_a_recipe_file_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("base: quickstart\nsft:\n  stepz: 3\n")
    with pytest.raises(SettingsError, match=r"sft\.stepz.*did you mean sft\.steps"):
        load_settings(str(tmp_path / "x.yaml"))
    (tmp_path / "y.yaml").write_text("base: y.yaml\n")
    with pytest.raises(SettingsError, match="refers back to itself"):
        load_settings(str(tmp_path / "y.yaml"))
    (tmp_path / "z.yaml").write_text("a: [1\n")
    with pytest.raises(SettingsError, match="not readable"):
        load_settings(str(tmp_path / "z.yaml"))


def test_a_missing_recipe_error_lists_the_recipes():
    with pytest.raises(SettingsError, match="quickstart_long"):
        load_settings("quikstart")


def test_dry_run_lists_missing_inputs():
    plan, ready = describe_plan(load_settings("rmsd_qwen3vl_4b"))
    assert not ready and "if it is a Hub name, the run downloads it from the Hub" in plan
    # The paths are absolute, because relative paths start at the current folder and not at the folder of the recipe.
    for key, path in (("data.train", "train"), ("data.heldout", "heldout"), ("teacher.pool", "pool")):
        assert f"  MISSING: {key}: {Path.cwd()}/data/{path}.jsonl" in plan
    assert plan.endswith("not ready: provide the missing inputs above")


def test_learning_rate_by_hand():
    from rmsd_fast.stages.state import learning_rate

    given = {"steps": 12, "lr": 1.0, "warmup_steps": 2}
    assert [learning_rate(s, schedule="constant", **given) for s in (0, 1, 2, 11)] == [0.5, 1.0, 1.0, 1.0]
    # The cosine has ten steps from step 2: it is half way at step 7, and at step 3 the value is cos(0.1 pi).
    assert learning_rate(7, schedule="cosine", **given) == pytest.approx(0.5)
    assert learning_rate(3, schedule="cosine", **given) == pytest.approx(0.9755282581)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sft.lr=.inf", "sft.lr: expected a finite number, got inf"),
        ("sft.lr=1e400", "sft.lr: expected a finite number, got inf"),
        ("sft.lr=.nan", "sft.lr: expected a finite number, got nan"),
        ("seed=-1", "seed: expected 0 to 4294967295, got -1"),
        ("name=${oc.env:HOME}", "override: name: expected a value, got the reference '${oc.env:HOME}'"),
        ("stages=[sft,'${oc.env:HOME}']", "override: stages: expected a value, got the reference '${oc.env:HOME}'"),
        ("sft.lr=${distill.lr}", "override: sft.lr: expected a value, got the reference '${distill.lr}'"),
        ("name=${", "overrides ['name=${']: "),
        ("sft.steps=[1", "overrides ['sft.steps=[1']: while parsing a flow sequence"),
        ("name='a\ud800'", "overrides"),
    ],
)
def test_file_errors_are_printed_as_one_line(override, says):
    with pytest.raises(SettingsError) as caught:
        load_settings("quickstart", [override])
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_recipe_cannot_copy_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    for text in ("output: runs/${oc.env:TOKEN}\n", "base: ${oc.env:TOKEN}\n", 'name: "a${oc.env:TOKEN}"\n'):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(SettingsError, match="expected a value, got the reference") as caught:
            load_settings(str(tmp_path / "x.yaml"))
        assert "secret" not in str(caught.value)
    (tmp_path / "x.yaml").write_text('name: "a\\0b"\n')
    with pytest.raises(SettingsError, match="name: expected text without NUL"):
        load_settings(str(tmp_path / "x.yaml"))


def number_fields(owner: type = RunConfig, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Return the fields of all sections that hold a number, optional or not, by key."""
    found = {}
    for item in dataclasses.fields(owner):
        if dataclasses.is_dataclass(item.default_factory):
            found |= number_fields(item.default_factory, f"{prefix}{item.name}.")
        elif set(item.type.split(" | ")) & {"int", "float"}:
            found[f"{prefix}{item.name}"] = item
    return found


@pytest.mark.parametrize("key", number_fields())
def test_every_number_has_bounds_that_are_checked(key):
    rule = RULES[key]
    if "choices" in rule:
        wrong = [max(rule["choices"]) + 1]
    else:
        assert (rule["least"] is None) != (rule["above"] is None)
        wrong = [rule["above"] if rule["least"] is None else rule["least"] - 1]
        wrong += [] if rule["most"] is None else [rule["most"] + 1]
    for value in wrong:
        written = str(int(value)) if number_fields()[key].type.startswith("int") else str(value)
        with pytest.raises(SettingsError, match=rf"{key}: expected .*, got "):
            load_settings("", [f"{key}={written}"])


def test_a_value_above_both_bounds_names_them():
    with pytest.raises(SettingsError, match="expected a number above 0 and at most 86400, got 100000.0"):
        load_settings("", ["data.decode_timeout_s=100000"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "rollout.server_urls=http://a:1",
            "rollout.server_urls: expected a list, got http://a:1; set e.g. .*=.http://a:1.$",
        ),
        ("stages=null", r"stages: expected a list, got null; set e.g. stages=\[sft,control,warm_up,distill\]$"),
        ("rollout.n=[1]", r"rollout.n: expected a whole number, got \[1\]; set e.g. rollout.n=8$"),
        ("sft.lr=fast", "sft.lr: expected a number, got fast"),
        ("video.fps=fast", "video.fps: expected a number or null, got fast; set e.g. video.fps=null"),
        ("evaluate.subtitles=perhaps", "evaluate.subtitles: expected true or false, got perhaps"),
        ("name=[1]", r"name: expected a text, got \[1\]"),
        ("rollout=3", "rollout: expected settings below it, got 3; write e.g. rollout.n=…$"),
        ("evaluate.judge.extra_body=3", "evaluate.judge.extra_body: expected a mapping, got 3"),
    ],
)
def test_values_of_another_kind_are_refused_with_an_example(override: str, says: str) -> None:
    with pytest.raises(SettingsError, match=rf"^override: {says}"):
        load_settings("quickstart", [override])
