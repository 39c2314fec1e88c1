"""Test exported discriminators, and their use as rerankers of sampled answers."""

from __future__ import annotations

import json
import re

import pytest
import torch
from material import WORLD, tiny_material, tiny_settings
from media_files import write_images
from safetensors.torch import load_file, save_file
from train_runs import environment
from warm_process import run_program

from rmsd_fast.config import ModelError, SettingsError, VideoConfig
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.preprocess import video_patches
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models.adapters import DISCRIMINATOR, adapted_layers
from rmsd_fast.models.discriminator import Discriminator
from rmsd_fast.models.discriminator_folder import export_discriminator, load_discriminator
from rmsd_fast.models.folders import VALUE_HEAD
from rmsd_fast.models.students import load_student
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.discriminator_pass import discriminator_pass
from rmsd_fast.stages.evaluation import answer_questions
from rmsd_fast.stages.evaluation_table import format_table
from rmsd_fast.stages.groups import make_group
from rmsd_fast.stages.plan import describe_plan
from rmsd_fast.stages.reranker import Reranker, load_reranker
from rmsd_fast.stages.summaries import summarize
from rmsd_fast.train_run import train

SMALL = ("rollout.n=4", "rollout.max_new_tokens=8", "data.max_prompt_tokens=500", "micro_tokens=600")
LORA = ("model.adapter=lora", "model.lora_rank=4", "distill.train_vision=false", "sft.train_vision=false")


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reranker")


@pytest.fixture(scope="module")
def material(folder):
    return tiny_material(folder)


@pytest.fixture(scope="module")
def judge(folder, material):
    """Return the folder of a discriminator with a random head."""
    student = load_student(material.model_path, dtype="float32")
    export_discriminator(Discriminator(student.model, seed=3), student, folder / "judge")
    return folder / "judge"


def rollout_of(text, ids, index=0, finite=True):
    logp = torch.zeros(len(ids)) if finite else torch.full((len(ids),), torch.nan)
    return Rollout("q", index, ids, text, logp, truncated=False, policy_version=0)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("distill.train_vision=true", "packing=padded"),
        ("discriminator.mode=head",),
        (*LORA, "discriminator.mode=separate"),
        (*LORA, "discriminator.mode=shared"),
        (*LORA, "discriminator.mode=head"),
        ("runtime.zero_stage=3",),
    ],
    ids=" ".join,
)
def test_scores_equal_those_of_training(folder, material, world, tmp_path, overrides):
    settings = tiny_settings(folder, *SMALL, *overrides)
    state = build_distillation(material.model_path, settings, world, material)
    prompts = [state.builder.build(q) for q in material.train if state.targets[q.id].imitate][:3]
    # A first step changes the weights that are trained.
    state.discriminator.set_lr(0.02)
    distill.warm_up_step(state, prompts, 0)
    rollouts, features = distill.roll_out(state, prompts, 1)
    pairs = zip(prompts, rollouts, strict=True)
    groups = [make_group(p, own, state.targets[p.question.id], settings, step=1) for p, own in pairs]
    discriminator_pass(state, groups, features)
    with state.discriminator.full_weights():
        export_discriminator(state.discriminator.module, state.student, tmp_path / "judge")
    reader = tiny_settings(folder, *SMALL, f"evaluate.reranker={tmp_path / 'judge'}", "evaluate.rollouts=2")
    reranker = load_reranker(load_student(material.model_path, dtype="float32"), reader, world)
    scores = torch.tensor(reranker.score(prompts, rollouts, state.builder))
    expected = torch.stack([group.d_score for group in groups])
    assert expected.std() > 1e-3
    assert torch.allclose(scores, expected, atol=1e-5, rtol=0), (scores - expected).abs().max()
    # Without the trained weights, the scores are others.
    untrained = Discriminator(load_student(material.model_path, dtype="float32").model, seed=settings.seed)
    others = torch.tensor(Reranker(untrained.eval(), micro_tokens=600).score(prompts, rollouts, state.builder))
    assert (others - expected).abs().max() > 1e-3
    for engine in (state.discriminator, state.policy):
        engine.close()


def test_a_prompt_is_computed_once_for_its_distinct_responses(material, judge):
    discriminator, student = load_discriminator(judge, dtype="float32")
    builder = PromptBuilder(student, VideoConfig(num_frames=4))
    prompts = [builder.build(question) for question in material.heldout[:2]]
    texts = ["<answer>A</answer>", "<answer>B</answer>", "<answer>A</answer>", "a b"]
    ids = [builder.encode_response(text) for text in texts]
    drawn = [rollout_of(*pair, index) for index, pair in enumerate(zip(texts, ids, strict=True))]
    broken = rollout_of("", ids[0][:1], 4, finite=False)
    tokens = []
    discriminator.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[1].input_ids.numel()))
    scores = Reranker(discriminator, micro_tokens=4096).score(prompts, [[*drawn, broken], [broken]], builder)
    assert tokens == [len(prompts[0].input_ids) + sum(map(len, (ids[0], ids[1], ids[3])))]
    assert scores[1] == [None] and scores[0][4] is None
    assert scores[0][0] == scores[0][2] and len(set(scores[0][:4])) == 3
    # Responses that do not fit together are scored in parts, with the same result.
    tokens.clear()
    room = len(prompts[0].input_ids) + max(map(len, ids))
    parts = Reranker(discriminator, micro_tokens=room).score(prompts[:1], [drawn], builder)
    assert len(tokens) > 1 and parts[0] == pytest.approx(scores[0][:4], abs=1e-5)
    with torch.no_grad():
        discriminator.value_bias.fill_(torch.inf)
    with pytest.raises(ModelError, match=r"evaluate.reranker: expected finite scores, got \[inf"):
        Reranker(discriminator, micro_tokens=4096).score(prompts[:1], [drawn], builder)


ORACLE = """
folder, prompt, responses = sys.argv[1], sys.argv[2], sys.argv[3:]
import os, torch
prompt = torch.load(prompt)
os.chdir(folder)
code = open("README.md").read().split("```python\\n")[1].split("\\nquestion = ")[0]
exec(code)
print("SCORES", [score(prompt, response) for response in responses])
"""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_code_of_the_readme_gives_the_scores(run_with_torchvision, material, tmp_path, family, tied):
    texts = ["What colour is the moving square?", "<think>It is red.</think><answer>red</answer>"]
    build_tiny_student(tmp_path / "student", texts=texts, layers=2, family=family)
    student = load_student(tmp_path / "student", dtype="float32")
    if not tied:
        config, head = student.model.config, student.model.lm_head
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        head.weight = torch.nn.Parameter(head.weight.detach() + 0.02)
    discriminator = Discriminator(student.model, seed=1)
    with torch.no_grad():
        discriminator.value_bias.fill_(0.5)
    export_discriminator(discriminator, student, tmp_path / "judge", base_model="Qwen/a")
    assert "lm_head.weight" not in load_file(tmp_path / "judge" / "model.safetensors")
    loaded, reader = load_discriminator(tmp_path / "judge", dtype="float32")
    builder = PromptBuilder(reader, VideoConfig(num_frames=4))
    media = {"videos": material.heldout[0].videos}
    if family == "qwen2_5_vl":
        # transformers 5.3 to 5.23 has other positions after a video than those that the family was trained with.
        media = {"images": (str(write_images(tmp_path)["rgb"]),)}
    prompt = builder.build(Question("q", "What colour is the square?", "open", **media))
    responses = ["<think>It is red.</think><answer>red</answer>", "blue"]
    drawn = [rollout_of(text, builder.encode_response(text)) for text in responses]
    (scores,) = Reranker(loaded, micro_tokens=4096).score([prompt], [drawn], builder)
    inputs = {
        "input_ids": prompt.input_ids[None],
        "attention_mask": torch.ones_like(prompt.input_ids)[None],
        "mm_token_type_ids": prompt.mm_token_type_ids[None],
    }
    (frames,) = prompt.media
    pixels, grid = {"video": ("pixel_values_videos", "video_grid_thw"), "image": ("pixel_values", "image_grid_thw")}[
        frames.kind
    ]
    inputs[pixels] = video_patches(frames.pixels, frames.preprocessor)
    inputs[grid] = torch.tensor([frames.grid_thw])
    torch.save(inputs, tmp_path / "prompt.pt")
    printed = run_with_torchvision(ORACLE, str(tmp_path / "judge"), str(tmp_path / "prompt.pt"), *responses)
    plain = json.loads(re.search(r"SCORES (\[.*\])", printed)[1])
    assert plain == pytest.approx(scores, abs=1e-5) and abs(scores[0] - scores[1]) > 1e-3


def test_answers_have_the_scores_of_the_reranker(folder, material, judge):
    student = load_student(material.model_path, dtype="float32")

    def answers(*overrides):
        many = ("evaluate.rollouts=4", "evaluate.max_new_tokens=6", "rollout.temperature=2", *overrides)
        settings = tiny_settings(folder, *many, f"evaluate.reranker={judge}")
        reranker = load_reranker(student, settings, WORLD)
        questions = [*material.heldout, Question("gone", "Where?", "numeric", videos=("no.mp4",), answer=1.0)]
        with MediaReader(settings.data, WORLD.device) as media:
            return answer_questions(student, questions, settings, WORLD, media, name="x", reranker=reranker)

    records, others = answers(), answers("evaluate.prompts_per_batch=2")
    closed = [record for record in records if "samples" in record]
    assert len(closed) > 3 and any(record["task_type"] == "open" for record in records)
    for record, other in zip(records, others, strict=True):
        assert ("best_response" in record) == (record["task_type"] != "open")
        if "samples" in record and "error" not in record:
            assert record["samples"]["reranker"] == pytest.approx(other["samples"]["reranker"], abs=1e-4)
            assert len(set(record["samples"]["reranker"])) > 1
    missing = records[-1]
    assert missing["samples"]["reranker"] == [None] * 4 and missing["best_response"] == ""
    result = summarize(records)
    assert list(result["sampled"]["best"]) == ["1", "2", "4"]
    assert result["sampled"]["best"]["1"]["mean"] == pytest.approx(result["sampled"]["pass"]["1"]["mean"])


def test_the_table_shows_the_best_of_n_by_hand():
    def record(number, greedy, scores, answers, ranks):
        samples = {"score": scores, "strict": scores, "lenient": scores, "answers": answers, "reranker": ranks}
        means = {"score": greedy, "strict": greedy, "lenient": greedy, "sampled": sum(scores) / 4}
        record = {"id": f"q{number}", "task_type": "mcq", "cluster": f"{number}.mp4", "response": "", **means}
        return {**record, "valid": True, "readable": True, "truncated": False, "samples": samples}

    # The reranker prefers a right answer to the first question, and a wrong one to the second.
    records = [
        record(0, 0.0, [1.0, 0.0, 0.0, 0.0], ["A", "B", "B", "C"], [2.0, 1.0, 0.0, -1.0]),
        record(1, 1.0, [1.0, 1.0, 1.0, 0.0], ["A", "A", "A", "B"], [-1.0, 0.0, 0.5, 3.0]),
    ]
    result = summarize(records)["sampled"]
    # Of the 6 pairs, 3 have the response that is preferred to all others.
    assert [result["best"][k]["mean"] for k in ("1", "2", "4")] == pytest.approx([0.5, 0.5, 0.5])
    assert result["best"]["4"]["n"] == result["best"]["4"]["clusters"] == 2
    gains = {name: entry["mean"] for name, entry in result["best_gain"].items()}
    assert gains == {"greedy": 0.0, "sampled": 0.0, "majority": 0.0}
    better = summarize(
        [records[0], {**records[1], "samples": {**records[1]["samples"], "reranker": [3.0, 0.0, 0.5, -1.0]}}]
    )
    gains = {name: entry["mean"] for name, entry in better["sampled"]["best_gain"].items()}
    # Best 1, 1; greedy 0, 1; means 1/4, 3/4; majorities 0, 1.
    assert gains == {"greedy": 0.5, "sampled": 0.5, "majority": 0.5}
    table = format_table({"students": {"model": better}, "floors": {}, "differences": {}})
    rows = [line.split()[0] for line in table.splitlines() if "@4" in line]
    assert rows == ["majority@4", "best@4", "pass@4"]
    assert "model, best of the samples minus the majority: +0.500 [" in table
    # Without a reranker, there is none of it.
    del records[0]["samples"]["reranker"], records[1]["samples"]["reranker"]
    assert "best" not in summarize(records)["sampled"]


def test_the_program_ranks_and_refuses_a_student(folder, material, judge, tmp_path):
    output = tmp_path / "evaluation.json"
    settings = [f"made.folder={folder}", "made.train_clips=12", "made.heldout_clips=3", "made.questions_per_clip=3"]
    settings += ["made.tasks=[mcq,temporal,spatial,numeric,ocr,open]", "made.teacher=noisy", "made.student_layers=2"]
    settings += ["evaluate.rollouts=3", "evaluate.max_new_tokens=6", "evaluate.prompts_per_batch=8"]

    def evaluate(*overrides):
        arguments = ["quickstart", *settings, *overrides, "--output", str(output)]
        return run_program("rmsd_fast.evaluate", arguments, environment(), timeout_s=300)

    done = evaluate(f"evaluate.reranker={judge}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\nbest@3" in done.stdout and "best of the samples minus the mean" in done.stdout
    result = json.loads(output.read_text())
    assert result["protocol"]["reranker"]["path"] == str(judge) and result["protocol"]["reranker"]["hash"]
    assert set(result["students"]["model"]["sampled"]["best_gain"]) == {"greedy", "sampled", "majority"}
    refused = evaluate(f"evaluate.reranker={material.model_path}")
    assert refused.returncode == 2 and "expected a discriminator with value_head.safetensors" in refused.stderr


def test_damaged_and_other_discriminators_are_refused(folder, material, judge, tmp_path, world):
    with pytest.raises(ModelError, match="expected a student, got a discriminator"):
        load_student(judge, dtype="float32")
    build_tiny_student(tmp_path / "other", texts=["Other words make another vocabulary."], layers=2)
    other = load_student(tmp_path / "other", dtype="float32")
    settings = tiny_settings(folder, f"evaluate.reranker={judge}", "evaluate.rollouts=2")
    with pytest.raises(ModelError, match="expected a discriminator with the student's vocabulary"):
        load_reranker(other, settings, world)
    student = load_student(material.model_path, dtype="float32")
    discriminator = Discriminator(student.model, seed=0)
    for name, tensors in (
        ("shape", {"weight": torch.zeros(3), "bias": torch.zeros(1)}),
        ("value", {"weight": torch.full((64,), torch.nan), "bias": torch.zeros(1)}),
        ("name", {"weight": torch.zeros(64)}),
    ):
        export_discriminator(discriminator, student, tmp_path / name)
        save_file(tensors, tmp_path / name / VALUE_HEAD)
        with pytest.raises(ModelError, match=r"value_head.safetensors: expected finite tensors .* got"):
            load_discriminator(tmp_path / name, dtype="float32")
    (tmp_path / "shape" / VALUE_HEAD).write_bytes(b"damaged")
    with pytest.raises(ModelError, match="value_head.safetensors: damaged"):
        load_discriminator(tmp_path / "shape", dtype="float32")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="expected no folder, an empty one or an earlier export"):
        export_discriminator(discriminator, student, tmp_path / "mine")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["evaluate.reranker=x"], "evaluate.reranker: expected evaluate.rollouts of 2 or more"),
        (
            ["evaluate.reranker=x", "evaluate.rollouts=2", "micro_tokens=1096"],
            "micro_tokens: expected room for .* a response of evaluate.max_new_tokens and its end token",
        ),
        (["stages=[sft]", "discriminator.export=true"], "discriminator.export has no effect: no discriminator"),
        (
            ["discriminator.export=true", "discriminator.mode=shared", "model.quantize=nf4", *LORA],
            "discriminator.export: expected false with model.quantize",
        ),
    ],
)
def test_settings_without_effect_are_refused(overrides, says):
    with pytest.raises(SettingsError, match=says):
        load_settings("quickstart", ["evaluate.rollouts=0", *overrides])


def test_training_refuses_a_reranker():
    settings = load_settings("quickstart", ["evaluate.reranker=x"])
    with pytest.raises(SettingsError, match="evaluate.reranker: expected none in training"):
        train(settings, WORLD, None)
    with pytest.raises(SettingsError, match="evaluate.reranker: expected none in training"):
        describe_plan(settings)


def test_the_backbone_of_a_head_has_no_adapter(folder, material, world, tmp_path):
    settings = tiny_settings(folder, *SMALL, *LORA, "discriminator.mode=head")
    state = build_distillation(material.model_path, settings, world, material)
    with torch.no_grad():
        for layer in adapted_layers(state.student.model).values():
            layer.lora_B["policy"].weight.normal_()
            assert DISCRIMINATOR not in layer.lora_B
    export_discriminator(state.discriminator.module, state.student, tmp_path / "judge")
    base = load_student(material.model_path, dtype="float32")
    _, got = load_discriminator(tmp_path / "judge", dtype="float32")
    expected, weights = base.model.state_dict(), got.model.state_dict()
    assert expected.keys() == weights.keys() and all(torch.equal(expected[name], weights[name]) for name in expected)
