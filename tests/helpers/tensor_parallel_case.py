"""Sample and train with vLLM on two processes that hold one copy of the model, and write what they did.

    python -m tensor_parallel_case FOLDER

Two processes run it. FOLDER has the material of `tiny_material`. Each process writes `results_RANK.json`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from material import tiny_settings
from vllm_media import WatchedMedia

from rmsd_fast.models.export import export_student
from rmsd_fast.models.students import load_student
from rmsd_fast.rollout.base import RolloutError, Sampling
from rmsd_fast.rollout.copied import check_sums
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.rollout.weights import group_sums, source_weights, stream, to_host
from rmsd_fast.runtime.process_group import exit_process, start
from rmsd_fast.stages import distill
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.material import prepare_material

OVERRIDES = ("rollout.n=3", "rollout.max_new_tokens=10", "data.max_prompt_tokens=500", "micro_tokens=600")
OVERRIDES += ("rollout.engine=vllm", "rollout.vllm_kv_cache_gib=0.1", "model.dtype=float32", "runtime.zero_stage=2")
GREEDY = Sampling(n=1, temperature=0.0, max_new_tokens=10)
SAMPLING = Sampling(n=3, temperature=0.8, max_new_tokens=10, seed=3, step=4)


class Case:
    """A state of stage 2 on this process, its engine, and its prompts.

    The processes have different numbers of prompts, which have one video, two videos or none.
    """

    def __init__(self, folder, world, tensor_parallel, model_path=None):
        settings = tiny_settings(folder, *OVERRIDES, f"rollout.tensor_parallel={tensor_parallel}")
        material = prepare_material(settings, world)
        if model_path:
            material = replace(material, model_path=str(model_path))
        self.state = build_distillation(material.model_path, settings, world, material)
        self.sampler, self.model = self.state.rollouts.sampler, self.state.student.model
        first, second, third = material.train[:3]
        both = replace(second, id="two", videos=first.videos + third.videos)
        questions = [[first, replace(first, id="text", videos=())], [third, both, replace(third, id="again")]]
        self.prompts = [self.state.builder.build(question) for question in questions[world.rank]]
        usable = [question for question in material.train if self.state.targets[question.id].has_teacher]
        self.batch = [self.state.builder.build(question) for question in usable[2 * world.rank : 2 * world.rank + 2]]
        self.update()

    def update(self):
        self.state.rollouts.update(self.state.policy, 1)

    def sample(self, sampling, prompts=None):
        drawn = self.state.rollouts.generate(self.model, self.prompts if prompts is None else prompts, sampling)
        return [described(rollout) for group in drawn for rollout in group]

    def sums(self):
        """Return the sums of the engine's weights, and those of the policy's."""
        policy = self.state.policy
        return [self.sampler.weight_sums(), to_host(group_sums(stream(policy, source_weights(policy))))]

    def fault(self, work, *, load=None):
        """Return the message of the RolloutError that `work` raises, and correct the engine's weights.

        `load` replaces the function that loads weights into vLLM's model.
        """
        message = "no error"
        with pytest.MonkeyPatch.context() as patch:
            if load:
                patch.setattr(self.sampler._model, "load_weights", load)
            try:
                work()
            except RolloutError as error:
                message = str(error)
        self.update()
        return message

    def weight(self, end):
        """Return the weight of vLLM's model whose name ends in this way."""
        (weight,) = [param for name, param in self.sampler._model.named_parameters() if name.endswith(end)]
        return weight


def described(rollout):
    return {
        "question": rollout.question_id,
        "ids": rollout.token_ids.tolist(),
        "logp": rollout.logp.tolist(),
        "banned_mass": rollout.banned_mass,
    }


@torch.no_grad()
def change(model):
    """Change the trained weights, in the same way on all processes."""
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        if param.requires_grad:
            param.add_(0.02 * torch.randn(param.shape, generator=generator))


def compare_with_hf(case):
    """Change the weights, and return greedy rollouts, those of transformers, and the sums of the weights."""
    change(case.model)
    case.update()
    hf = HfRollout(case.state.builder, prompts_per_batch=8, device=torch.device("cpu"))
    expected = hf.generate(case.model, case.prompts, GREEDY)
    return {
        "vllm": case.sample(GREEDY),
        "hf": [described(rollout) for group in expected for rollout in group],
        "sums": case.sums(),
    }


@torch.no_grad()
def faults_of_loading(case):
    """Return the messages about weights that did not arrive, or in the wrong place, on both processes."""
    found, load = {}, case.sampler._model.load_weights
    rows = case.model.model.language_model.layers[1].mlp.up_proj.weight
    # The first row is on the first process, and the last one on the second.
    for row in (0, -1):
        rows.view(torch.int32)[row, 0] += 1
        found[f"skipped, row {row}"] = case.fault(
            case.update, load=lambda weights: {case.sampler._name_of(name) for name, _ in weights}
        )
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}

    def renamed(name):
        part = next((part for part in other if part in name), None)
        return name.replace(part, other[part]) if part else name

    found["swapped"] = case.fault(
        case.update, load=lambda weights: load((renamed(name), value) for name, value in weights)
    )
    return found


def fault_of_element(case, rank, end):
    """Return the message about one element of a weight that differs on the second process."""

    def compare():
        if rank:
            case.weight(end).view(torch.int32).view(-1)[-1] += 1
        held, expected = case.sums()
        check_sums([expected], held, "expected the policy's weights", "set rollout.engine=hf")

    return case.fault(compare)


@torch.no_grad()
def faults_of_one_process(case, rank):
    """Return the messages of both processes about a fault of the second one."""
    found = {end: fault_of_element(case, rank, end) for end in ("model.norm.weight", "layers.1.mlp.down_proj.weight")}
    # A prompt of the second process that is too long.
    long = case.prompts[-1]
    ids = long.input_ids.repeat(9)[:501]
    positions = torch.arange(len(ids)).expand(3, -1).contiguous()
    long = replace(long, input_ids=ids, mm_token_type_ids=torch.zeros_like(ids), position_ids=positions, media=())
    found["long"] = case.fault(lambda: case.sample(GREEDY, [long] if rank else case.prompts))
    step = case.sampler.step

    def other_tokens():
        ended = step()
        if rank:
            for completions in ended.values():
                completions[0].token_ids[0] += 1
        return ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case.sampler, "step", other_tokens)
        found["tokens"] = case.fault(lambda: case.sample(GREEDY))
    return found


def few_heads(source, folder):
    """Write a student with one head of keys and values, an untied head, and a vocabulary that vLLM pads by 50 rows."""
    student = load_student(source, dtype="float32")
    config = student.model.config
    student.model.resize_token_embeddings(590, pad_to_multiple_of=None)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = False
    student.model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(590, config.text_config.hidden_size))
    config.text_config.num_key_value_heads = 1
    for layer in student.model.model.language_model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight = torch.nn.Parameter(projection.weight[: config.text_config.head_dim].clone())
    export_student(student, folder)


def train(case):
    """Return the rollouts and the metrics of three steps of stage 2 with a high learning rate."""
    case.state.policy.set_lr(1e-2)
    steps = []
    for number in range(3):
        result = distill.step(case.state, case.batch, number)
        drawn = [described(rollout) for group in result.groups for rollout in group.rollouts]
        steps.append({"rollouts": drawn, "metrics": result.metrics})
    return steps


def main(folder):
    from vllm.distributed.parallel_state import destroy_model_parallel

    world = start()
    results = {}
    case = Case(folder, world, 2)
    with pytest.MonkeyPatch.context() as patch:
        watched = WatchedMedia(case.sampler, patch)
        results["sampled"] = case.sample(SAMPLING)
        results["kept"] = watched.kept()
    results["few media"] = case.sample(SAMPLING, case.prompts if world.rank else case.prompts[1:])
    results["training"] = train(case)
    results["greedy"] = compare_with_hf(case)
    results |= {"loading": faults_of_loading(case), "one process": faults_of_one_process(case, world.rank)}
    # The engines can still be used.
    results["after faults"] = case.sample(GREEDY)
    results["parts"] = {name: list(p.shape) for name, p in case.sampler._model.named_parameters()}
    del case
    few = Case(folder, world, 2, folder / "few")
    results["few heads"] = compare_with_hf(few)
    with torch.no_grad():
        # The second copy of the only head of values.
        results["one copy"] = fault_of_element(few, world.rank, "layers.1.self_attn.qkv_proj.weight")
    del few
    # An engine that is not split needs other groups.
    destroy_model_parallel()
    whole = Case(folder, world, 1)
    results["sampled whole"] = whole.sample(SAMPLING)
    results["training whole"] = train(whole)
    (folder / f"results_{world.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process(0)
