"""Test which steps rollouts.jsonl contains, and that a line has the values that the step computed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from material import tiny_material, tiny_settings

from rmsd_fast.config import RolloutConfig
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.stages import distill
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.rollout_log import log_rollouts

SMALL = ("rollout.n=3", "rollout.max_new_tokens=8", "data.max_prompt_tokens=500", "micro_tokens=600")
# Some tests replace rollouts by texts with made-up log-probs.
SMALL += ("rollout.parity_every=0",)


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rollout_log")


@pytest.fixture(scope="module")
def material(folder):
    return tiny_material(folder)


@pytest.fixture
def take_step(folder, material, world, tmp_path):
    """Take a step with these settings, and return its groups and the records of rollouts.jsonl."""

    def run(*overrides, change=None, warm_up=False):
        settings = tiny_settings(folder, *SMALL, *overrides)
        state = build_distillation(material.model_path, settings, world, material)
        prompts = [state.builder.build(q) for q in material.train if state.targets[q.id].imitate][:2]
        if change is not None:
            change(state, prompts)
        step = distill.warm_up_step if warm_up else distill.step
        groups = step(state, prompts, 0).groups
        file = JsonLines(tmp_path / "rollouts.jsonl")
        log_rollouts(file, groups, settings.rollout, builder=None, stage="distill", step=1, total=9)
        return groups, file.records()

    return run


def test_a_line_has_the_values_of_the_step(take_step, material):
    groups, records = take_step()
    assert len(records) == len(groups) == 2
    for group, record in zip(groups, records, strict=True):
        question = group.prompt.question
        assert (record["stage"], record["step"], record["id"]) == ("distill", 1, question.id)
        assert (record["question"], record["answer"]) == (question.question, question.answer)
        assert record["videos"] == list(question.videos) and record["images"] == [] and record["spans"] == []
        assert record["duration"] == 8
        assert [r["text"] for r in record["rollouts"]] == [r.text for r in group.rollouts]
        assert [r["tokens"] for r in record["rollouts"]] == [len(r.token_ids) for r in group.rollouts]
        for key, values in (("d_score", group.d_score), ("reward", group.reward), ("advantage", group.advantages)):
            assert [r[key] for r in record["rollouts"]] == values.tolist()
        assert "match" not in record["rollouts"][0] and "log_ratio" not in record["rollouts"][0]
        answers = material.scores[question.id]
        assert [(t["k"], t["text"]) for t in record["teacher"]] == [(a.k, a.text) for a in answers]
        assert [t["p"] for t in record["teacher"]] == group.targets.p.tolist()
        scores = [t["d_score"] for t in record["teacher"] if t["p"] > 0]
        assert scores == group.teacher_d_score.tolist() and len(scores) == len(group.kept) > 0
        assert all(t["d_score"] is None for t in record["teacher"] if t["p"] == 0)


def test_equal_texts_have_equal_scores_on_both_sides(take_step, material):
    """A rollout with exactly the text of a teacher answer has the same score as that answer."""

    def speak(state, prompts):
        generate = state.rollouts.generate

        def with_teacher_texts(model, prompts, *args, **options):
            found = generate(model, prompts, *args, **options)
            for prompt, own in zip(prompts, found, strict=True):
                kept = int(state.targets[prompt.question.id].p.argmax())
                text = material.scores[prompt.question.id][kept].text
                ids = state.builder.encode_response(text)
                logp = torch.full((len(ids),), -1.0)
                own[0] = replace(own[0], text=text, token_ids=ids, logp=logp, truncated=False)
            return found

        state.rollouts.generate = with_teacher_texts

    groups, records = take_step("rollout.max_new_tokens=60", change=speak)
    for group, record in zip(groups, records, strict=True):
        kept = int(group.targets.p.argmax())
        assert record["rollouts"][0]["text"] == record["teacher"][kept]["text"]
        assert record["rollouts"][0]["d_score"] == record["teacher"][kept]["d_score"]


def test_sampled_pairing_names_the_match(take_step):
    groups, records = take_step("discriminator.pairing=sampled", "reward.kl_in_reward=0.1")
    for group, record in zip(groups, records, strict=True):
        assert [r["match"] for r in record["rollouts"]] == [record["teacher"][int(m)]["k"] for m in group.matches]
        assert [r["log_ratio"] for r in record["rollouts"]] == group.log_ratio.tolist()


def test_scores_that_were_not_computed_are_null(take_step):
    _, (record, _) = take_step("reward.alpha=0", "stages=[sft,distill]")
    assert {r["d_score"] for r in (*record["rollouts"], *record["teacher"])} == {None}
    assert record["rollouts"][0]["advantage"] is not None
    _, (record, _) = take_step(warm_up=True)
    assert {r[key] for r in record["rollouts"] for key in ("reward", "advantage")} == {None}
    assert record["rollouts"][0]["d_score"] is not None

    def forget_teacher(state, prompts):
        targets = state.targets[prompts[0].question.id]
        state.targets[prompts[0].question.id] = replace(targets, p=torch.zeros_like(targets.p))

    _, (record, _) = take_step(change=forget_teacher)
    assert {r["d_score"] for r in (*record["rollouts"], *record["teacher"])} == {None}
    assert record["rollouts"][0]["advantage"] is not None


def test_non_finite_numbers_are_null(take_step):
    def spoil(state, prompts):
        state.discriminator.module.register_forward_hook(lambda module, given, scores: scores * torch.nan)

    _, records = take_step(change=spoil)
    for record in records:
        assert {r[key] for r in record["rollouts"] for key in ("d_score", "reward", "advantage")} == {None}
        assert {t["d_score"] for t in record["teacher"]} == {None}


@pytest.mark.parametrize(
    ("every", "total", "written"),
    [(0, 9, []), (1, 3, [1, 2, 3]), (4, 9, [1, 5, 9]), (4, 11, [1, 5, 9, 11]), (50, 3, [1, 3]), (50, 1, [1])],
)
def test_selection_of_the_logged_steps(tmp_path, take_step, material, every, total, written):
    groups, _ = take_step()
    file = JsonLines(tmp_path / "some.jsonl")
    settings = RolloutConfig(log_every_steps=every, log_questions=1)
    for step in range(1, total + 1):
        log_rollouts(file, groups, settings, builder=None, stage="distill", step=step, total=total)
    assert [record["step"] for record in file.records()] == written
    assert (tmp_path / "some.jsonl").exists() == bool(written)


def test_lines_are_strict_json(tmp_path, take_step):
    take_step()
    for line in (tmp_path / "rollouts.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
