"""Test rollouts with real vLLM on the CPU: equal to transformers, proven weights, and planted faults.

These tests run with a Python that has vLLM and the trainer (`make test-vllm`).
"""

from __future__ import annotations

import gc
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from material import tiny_material, tiny_settings
from media_files import write_images
from train_runs import forget_steps, metrics, mini_arguments, only_run, run_train
from vllm_media import WatchedMedia
from vllm_world import vllm_world

from rmsd_fast.config import NotInstalled, SettingsError
from rmsd_fast.data.packing import media_places
from rmsd_fast.models.adapters import POLICY, adapted_layers
from rmsd_fast.models.export import export_student
from rmsd_fast.models.shared_prefix import disable_shared_prefix, enable_shared_prefix
from rmsd_fast.models.students import embed, encode_media, load_student
from rmsd_fast.rollout import vllm_process
from rmsd_fast.rollout.base import RolloutError, Sampling
from rmsd_fast.rollout.copied import check_sums
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.rollout.weights import group_sums, source_weights, stream, to_host
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.stages import distill
from rmsd_fast.stages.build import build_distillation

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
ENGINE = ("rollout.engine=vllm", "rollout.vllm_kv_cache_gib=0.1", "model.dtype=float32", "runtime.zero_stage=2")
ENGINE += ("rollout.parity_every=1",)
SMALL = ("rollout.n=3", "rollout.max_new_tokens=10", "data.max_prompt_tokens=500", "micro_tokens=600")
LORA = ("model.adapter=lora", "model.lora_rank=4", "sft.train_vision=false", "distill.train_vision=false")
GREEDY = Sampling(n=1, temperature=0.0, max_new_tokens=10)
SAMPLING = Sampling(n=3, temperature=0.8, max_new_tokens=10, seed=3, step=4)
REMEDY = "set rollout.engine=hf"
# Equal models differ by rounding only; a fault changes log-probs by far more.
ROUNDING, FAULT = 1e-4, 1e-3


@pytest.fixture(scope="module")
def world():
    with vllm_world() as world:
        yield world


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    return SimpleNamespace(folder=folder, inputs=tiny_material(folder))


def build(material, world, *overrides):
    settings = tiny_settings(material.folder, *SMALL, *ENGINE, *overrides)
    return build_distillation(material.inputs.model_path, settings, world, material.inputs)


@pytest.fixture(scope="module")
def full(material, world):
    return build(material, world)


@pytest.fixture
def state(full):
    """Return the state with the policy's weights in the engine. Later changes to the policy are undone."""
    before = {name: p.detach().clone() for name, p in full.student.model.named_parameters()}
    full.rollouts.update(full.policy, 0)
    yield full
    with torch.no_grad():
        for name, p in full.student.model.named_parameters():
            p.copy_(before[name])


@pytest.fixture(scope="module")
def prompts(material, full, tmp_path_factory):
    """Return prompts with one video, two videos, an image and a video, no media, and the first under another id."""
    built = [full.builder.build(question) for question in material.inputs.train[:12]]
    built.sort(key=lambda prompt: len(prompt.input_ids))
    short, other, long = built[0], built[5], built[-1]
    image = str(write_images(tmp_path_factory.mktemp("images"))["rgb"])
    questions = [
        long.question,
        replace(short.question, id="two", videos=short.question.videos + other.question.videos),
        replace(other.question, id="image", images=(image,)),
        replace(short.question, id="text", videos=()),
        replace(long.question, id="again"),
    ]
    return [full.builder.build(question) for question in questions]


@contextmanager
def stock_attention(model):
    """Run the model as transformers does, one padded row at a time."""
    disable_shared_prefix(model)
    try:
        yield
    finally:
        enable_shared_prefix(model)


@torch.no_grad()
def trainer_logp(state, prompt, rollout, temperature):
    """Return the model's log-probs of the sampled ids, and the mean mass of the banned ids, from one stock pass."""
    model = state.student.model
    sampled = rollout.token_ids[:-1]
    ids = torch.cat([prompt.input_ids, sampled])[None]
    positions = prompt.next_position + torch.arange(len(sampled)).expand(3, -1)
    with stock_attention(model):
        hidden = model.model.language_model(
            **embed(model, ids, encode_media(model, [prompt]), [0], media_places([prompt], [0])),
            position_ids=torch.cat([prompt.position_ids, positions], 1)[:, None],
            use_cache=False,
        ).last_hidden_state
    logits = model.lm_head(hidden)[0, len(prompt.input_ids) - 1 :].double()
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    mass = logp[:, state.builder.banned_ids].exp().sum(-1).mean()
    return logp.gather(-1, rollout.token_ids[:, None])[:, 0], float(mass)


def difference(state, prompts, groups, temperature=SAMPLING.temperature):
    """Return the largest difference between the rollouts' log-probs and the trainer's."""
    return max(
        float((rollout.logp - trainer_logp(state, prompt, rollout, temperature)[0]).abs().max())
        for prompt, group in zip(prompts, groups, strict=True)
        for rollout in group
    )


def sample(state, prompts, sampling=SAMPLING, **options):
    return state.rollouts.generate(state.student.model, prompts, sampling, **options)


@torch.no_grad()
def change(state, seed=0):
    """Change the trained weights."""
    generator = torch.Generator().manual_seed(seed)
    for p in state.student.model.parameters():
        if p.requires_grad:
            p.add_(0.02 * torch.randn(p.shape, generator=generator))


def test_greedy_rollouts_are_those_of_hf(state, prompts):
    change(state)
    state.rollouts.update(state.policy, 1)
    groups = sample(state, prompts, GREEDY, policy_version=7)
    hf = HfRollout(state.builder, prompts_per_batch=8, device=torch.device("cpu"))
    expected = hf.generate(state.student.model, prompts, GREEDY, policy_version=7)
    for (rollout,), (other,) in zip(groups, expected, strict=True):
        assert torch.equal(rollout.token_ids, other.token_ids)
        for name in ("question_id", "index", "text", "truncated", "policy_version"):
            assert getattr(rollout, name) == getattr(other, name)
    assert difference(state, prompts, groups, 0.0) < ROUNDING


def test_log_probs_are_the_trainers_at_the_temperature(state, prompts):
    groups = sample(state, prompts)
    assert [len(group) for group in groups] == [3] * len(prompts)
    assert difference(state, prompts, groups) < ROUNDING
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            mass = trainer_logp(state, prompt, rollout, SAMPLING.temperature)[1]
            assert rollout.banned_mass == pytest.approx(mass, abs=1e-6) and mass > 1e-3
            assert not set(rollout.token_ids.tolist()) & set(state.builder.banned_ids.tolist())


def test_a_rollout_depends_on_seed_step_and_question_only(state, prompts):
    def ids(prompts, sampling=SAMPLING, **options):
        return [[r.token_ids.tolist() for r in group] for group in sample(state, prompts, sampling, **options)]

    together = ids(prompts)
    assert ids(prompts, features=encode_media(state.student.model, prompts)) == together
    assert [ids([prompt])[0] for prompt in prompts] == together
    # The same video and question under two ids.
    assert together[0] != together[-1]
    assert all(len({tuple(row) for row in group}) == 3 for group in together)
    assert ids(prompts, replace(SAMPLING, step=5)) != together != ids(prompts, replace(SAMPLING, seed=4))


@torch.no_grad()
def test_responses_end_with_the_end_token(state, prompts):
    """The end token gets twice the embedding of the likeliest token, and so twice its logit."""
    model, eos = state.student.model, state.builder.eos_id
    ((rollout,),) = sample(state, prompts[:1], GREEDY)
    assert rollout.truncated and len(rollout.token_ids) == GREEDY.max_new_tokens
    embeddings = model.model.language_model.embed_tokens.weight
    embeddings[eos] = 2 * embeddings[int(rollout.token_ids[0])]
    state.rollouts.update(state.policy, 1)
    ((rollout,),) = sample(state, prompts[:1], GREEDY)
    assert rollout.token_ids.tolist() == [eos] and not rollout.truncated and rollout.text == ""


def test_sync_takes_the_changed_weights(state, prompts, capsys):
    old = sample(state, prompts)
    change(state)
    assert difference(state, prompts, old) > FAULT
    began = time.perf_counter()
    state.rollouts.update(state.policy, 1)
    seconds = time.perf_counter() - began
    numel = sum(p.numel() for p in state.student.model.parameters())
    with capsys.disabled():
        print(f"\nsync of {numel:,} weights: {1000 * seconds:.1f} ms")
    assert difference(state, prompts, sample(state, prompts)) < ROUNDING


@torch.no_grad()
def nudge(state):
    """Change one element by the smallest amount, as a step with a low learning rate may."""
    state.student.model.model.language_model.layers[1].mlp.up_proj.weight.view(torch.int32)[0, 0] += 1


def test_a_skipped_sync_is_caught(state, prompts, monkeypatch):
    nudge(state)

    def pretend(weights):
        return {state.rollouts.sampler._name_of(name) for name, _ in weights}

    monkeypatch.setattr(state.rollouts.sampler._model, "load_weights", pretend)
    expected = r"rollout step 1: expected the policy's weights in vLLM, got others in layers.1 \(1 of 4 groups\)"
    with pytest.raises(RolloutError, match=expected):
        state.rollouts.update(state.policy, 1)
    # Log-probs cannot show this fault.
    assert difference(state, prompts, sample(state, prompts)) < ROUNDING
    monkeypatch.undo()
    state.rollouts.update(state.policy, 1)


def test_a_partial_sync_is_caught(state, monkeypatch):
    load, left_out = state.rollouts.sampler._model.load_weights, "model.language_model.layers.0.mlp.down_proj.weight"
    monkeypatch.setattr(
        state.rollouts.sampler._model,
        "load_weights",
        lambda weights: load(pair for pair in weights if pair[0] != left_out),
    )
    with pytest.raises(RolloutError, match=r"expected 18 to be loaded, got 17; first difference: .*0.mlp.down_proj"):
        state.rollouts.update(state.policy, 1)


def test_a_sync_that_stops_early_is_caught(state, monkeypatch):
    load = state.rollouts.sampler._model.load_weights
    names = {state.rollouts.sampler._name_of(source.name) for source in source_weights(state.policy)}

    def stop_early(weights):
        load([next(weights)])
        return names

    monkeypatch.setattr(state.rollouts.sampler._model, "load_weights", stop_early)
    with pytest.raises(RolloutError, match="weights in vLLM: expected it to take 24, it took 0"):
        state.rollouts.update(state.policy, 1)


def test_swapped_layers_are_caught(state, monkeypatch):
    model, other = state.rollouts.sampler._model, {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    load = model.load_weights

    def renamed(name):
        part = next((part for part in other if part in name), None)
        return name.replace(part, other[part]) if part else name

    monkeypatch.setattr(
        state.rollouts.sampler._model,
        "load_weights",
        lambda weights: load((renamed(name), value) for name, value in weights),
    )
    with pytest.raises(RolloutError, match=r"got others in layers.0, layers.1 \(2 of 4 groups\)"):
        state.rollouts.update(state.policy, 1)


@torch.no_grad()
def test_changed_weights_in_vllm_are_caught(state):
    sums = [to_host(group_sums(stream(state.policy, source_weights(state.policy))))]
    check_sums(sums, state.rollouts.sampler.weight_sums(), "expected them", REMEDY)
    dict(state.rollouts.sampler._model.named_parameters())["language_model.model.norm.weight"][0] += 1
    with pytest.raises(RolloutError, match=r"got others in norm \(1 of 4"):
        check_sums(sums, state.rollouts.sampler.weight_sums(), "expected them", REMEDY)


def with_ids(prompt, ids):
    """Return a prompt of text with other ids."""
    positions = torch.arange(len(ids)).expand(3, -1).contiguous()
    return replace(prompt, input_ids=ids, mm_token_type_ids=torch.zeros_like(ids), position_ids=positions)


def test_stale_prefixes_are_not_used(state, prompts, monkeypatch):
    """Each call has its own salt. Without salt and reset, stale prefixes are used, and the log-probs show it."""
    long = [with_ids(prompts[3], prompts[3].input_ids.repeat(20)[:300])]
    monkeypatch.setattr(state.rollouts.sampler, "_forget", lambda: None)
    inputs = state.rollouts.sampler._inputs
    for salted in (True, False):
        if not salted:
            monkeypatch.setattr(
                state.rollouts.sampler, "_inputs", lambda *args: {**inputs(*args), "cache_salt": "same"}
            )
        sample(state, long)
        change(state, seed=int(salted))
        state.rollouts.update(state.policy, 1)
        assert (difference(state, long, sample(state, long)) < ROUNDING) == salted
    monkeypatch.undo()
    monkeypatch.setattr(state.rollouts.sampler, "_inputs", lambda *args: {**inputs(*args), "cache_salt": "same"})
    state.rollouts.sampler._forget()
    assert difference(state, long, sample(state, long)) < ROUNDING


def test_features_do_not_outlive_a_call(state, prompts, monkeypatch):
    """On a GPU, they would take memory of the training while vLLM sleeps."""
    watched = WatchedMedia(state.rollouts.sampler, monkeypatch)
    sample(state, prompts)
    assert watched.kept() == {"given": 6, "alive": 0, "encoded": 0, "requests": 0}


def test_another_prompt_is_caught(state, prompts, monkeypatch):
    inputs = state.rollouts.sampler._inputs

    def wrong(request):
        made = inputs(request)
        if request.question_id == "two":
            made["prompt_token_ids"][-1] += 1
        return made

    monkeypatch.setattr(state.rollouts.sampler, "_inputs", wrong)
    with pytest.raises(RolloutError, match="question 'two': expected the trainer's prompt ids in vLLM"):
        sample(state, prompts)


def test_other_positions_are_caught(state, prompts):
    shifted = replace(prompts[0], position_ids=prompts[0].position_ids + 1)
    with pytest.raises(RolloutError, match=r"question .*: expected the trainer's position ids in vLLM"):
        sample(state, [shifted])


def test_other_positions_of_the_response_are_caught(state, prompts, monkeypatch):
    positions = state.rollouts.sampler._model.get_mrope_input_positions

    def shifted(ids, features):
        of_prompt, delta = positions(ids, features)
        return of_prompt, delta + 1

    monkeypatch.setattr(state.rollouts.sampler._model, "get_mrope_input_positions", shifted)
    following = prompts[0].next_position
    expected = f"expected the response to begin at position {following} in vLLM, got {following + 1}; set rollout"
    with pytest.raises(RolloutError, match=expected):
        sample(state, prompts[:1])


def test_two_copies_of_a_question_keep_their_own_log_probs(state, prompts, monkeypatch):
    """A banned id gets a higher logit in the second copy, which changes log-probs but not the sampled ids."""
    mask, banned = state.rollouts.sampler._mask, int(state.builder.banned_ids[0])
    apply = mask.apply
    expected = sample(state, prompts[:1])[0]
    first_number = next(state.rollouts.sampler._numbers) + 1

    def rigged(logits):
        copies = [mask._rows[i][0] == first_number + 1 for i in range(len(logits))]
        logits[copies, banned] = logits.amax() + 2
        return apply(logits)

    monkeypatch.setattr(mask, "apply", rigged)
    first, second = sample(state, [prompts[0], prompts[0]])
    for one, alone, two in zip(first, expected, second, strict=True):
        assert torch.equal(one.token_ids, alone.token_ids) and torch.equal(one.token_ids, two.token_ids)
        assert torch.allclose(one.logp, alone.logp, atol=ROUNDING)
        assert one.banned_mass == pytest.approx(alone.banned_mass, abs=ROUNDING)
        assert two.banned_mass > one.banned_mass + 0.05
        assert (two.logp < one.logp - FAULT).all()


@pytest.mark.parametrize("fault", ["missing", "another", "without deepstack", "swapped"])
def test_another_video_shows_in_the_log_probs(state, prompts, fault):
    features = encode_media(state.student.model, prompts[:2])
    (deep,) = features.deepstack
    pooled = features.pooled
    if fault == "missing":
        pooled[0], deep[0] = torch.zeros_like(pooled[0]), torch.zeros_like(deep[0])
    elif fault == "another":
        pooled[0], deep[0] = pooled[1], deep[1]
    elif fault == "without deepstack":
        deep[0] = torch.zeros_like(deep[0])
    else:
        pooled[1:3], deep[1:3] = pooled[2:0:-1], deep[2:0:-1]
    wrong = 1 if fault == "swapped" else 0
    groups = sample(state, prompts[:2], features=features)
    assert difference(state, [prompts[wrong]], [groups[wrong]]) > FAULT
    assert difference(state, [prompts[1 - wrong]], [groups[1 - wrong]]) < ROUNDING


def test_a_prompt_over_the_limit(state, prompts):
    long = with_ids(prompts[3], prompts[3].input_ids.repeat(50)[:501])
    with pytest.raises(RolloutError, match="question 'text': expected a prompt and response of at most 510 tokens, go"):
        sample(state, [long])


@torch.no_grad()
def test_logits_that_are_not_finite_end_a_rollout(state, prompts):
    state.student.model.model.language_model.norm.weight.fill_(torch.nan)
    state.rollouts.update(state.policy, 1)
    for group in sample(state, prompts[:2]):
        assert all(rollout.token_ids.tolist() == [state.builder.eos_id] and not rollout.finite for rollout in group)


def test_an_engine_that_fails_can_be_used_again(state, prompts, monkeypatch):
    step, steps = state.rollouts.sampler._engine.step, iter(range(3))

    def failing():
        if next(steps, None) is None:
            raise RuntimeError("the device has failed")
        return step()

    monkeypatch.setattr(state.rollouts.sampler._engine, "step", failing)
    expected = (
        r"vLLM failed while it generated responses \(RuntimeError: the device has failed\); set rollout.engine=hf"
    )
    with pytest.raises(RolloutError, match=expected):
        sample(state, prompts)
    monkeypatch.undo()
    assert difference(state, prompts, sample(state, prompts)) < ROUNDING


def test_vllm_is_awake_only_for_a_step(state, prompts, monkeypatch):
    """vLLM cannot sleep on a CPU, so this only tests when it would."""
    calls, engine, rollouts = [], state.rollouts.sampler._engine, state.rollouts
    for name in ("sleep", "wake_up", "reset_prefix_cache"):
        function = getattr(engine, name) if name == "reset_prefix_cache" else lambda **options: None
        monkeypatch.setattr(
            engine, name, lambda name=name, function=function, **options: calls.append((name, options)) or function()
        )
    monkeypatch.setattr(rollouts.sampler, "_sleeps", True)
    rollouts.sampler._sleep()
    rollouts.update(state.policy, 1)
    sample(state, prompts[:1])
    sample(state, prompts[:1])
    asleep, awake, reset = ("sleep", {"level": 1}), ("wake_up", {}), ("reset_prefix_cache", {})
    assert calls == [asleep, awake, reset, asleep, awake, asleep]
    rollouts.sampler._wake()


def test_incomplete_outputs_are_caught(state, prompts, monkeypatch):
    step = state.rollouts.sampler._engine.step

    def without_logprobs():
        outputs = step()
        for output in outputs:
            output.outputs[1].logprobs = None
        return outputs

    monkeypatch.setattr(state.rollouts.sampler._engine, "step", without_logprobs)
    with pytest.raises(
        RolloutError, match="expected tokens with log-probs in response 1, got 10 tokens and 0 log-prob"
    ):
        sample(state, prompts[:1])


def test_packed_weights_are_refused():
    """By default, vLLM's layers on a CPU compute with packed copies."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(64, 32, bias=False, dtype=dtype)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        with pytest.raises(NotInstalled, match="got a packed copy in 0; set rollout.engine=hf"):
            vllm_process.check_plain(torch.nn.Sequential(layer))
        with vllm_process._plain_cpu_layers(torch.device("cpu")):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        vllm_process.check_plain(torch.nn.Sequential(layer))
        x = torch.randn(3, 64, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(32, 64))
            assert torch.equal(layer.cpu_linear(x, layer.weight, None), torch.nn.functional.linear(x, layer.weight))


def test_the_start_leaves_the_process_as_it_was(full):
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"
    assert gc.get_freeze_count() == 0 and torch.distributed.is_initialized()


def stage2_steps(state, material, steps=3):
    """Run steps of stage 2 with a high learning rate. Return their metrics and the prompts."""
    prompts = [state.builder.build(q) for q in material.inputs.train if state.targets[q.id].has_teacher][:4]
    state.timer = PhaseTimer(torch.device("cpu"))
    state.policy.set_lr(1e-2)
    return [distill.step(state, prompts, number).metrics for number in range(steps)], prompts


def check_agreement(lines, *, largest_kl=1e-5, largest_difference=1e-5):
    """Check that engine and trainer agree. The mean importance ratio is 1 for any engine."""
    for line in lines:
        assert line["policy/importance_ratio"] == pytest.approx(1, abs=10 * largest_kl)
        assert abs(line["policy/engine_kl"]) < largest_kl
        assert line["parity/mean_difference"] < largest_difference


def test_steps_of_stage_2(full, material):
    lines, _ = stage2_steps(full, material)
    check_agreement(lines)
    # The weights have changed between the steps.
    assert lines[0]["policy/kl"] < 1e-6 and lines[2]["policy/kl"] > 1e-4


def test_a_cache_without_room_for_one_response(material, world):
    expected = (
        r"rollout.vllm_kv_cache_gib: expected room for one prompt and response, got 0.0002 GiB \(.*; raise it, or"
    )
    with pytest.raises(SettingsError, match=expected):
        build(material, world, "rollout.vllm_kv_cache_gib=0.0002")


def test_adapters(material, world):
    """The second engine of this process. Its policy shares the backbone with discriminator and reference."""
    state = build(material, world, *LORA, "discriminator.mode=shared")
    for layer in adapted_layers(state.student.model).values():
        layer.lora_B[POLICY].weight.data.normal_(0, 0.05)
    lines, prompts = stage2_steps(state, material)
    check_agreement(lines)
    assert lines[2]["policy/kl"] > 1e-4
    state.policy.module.activate()
    state.rollouts.update(state.policy, 4)
    assert difference(state, prompts, sample(state, prompts)) < ROUNDING
    # Weights without adapters are not sent, but compared.
    names = dict(state.rollouts.sampler._model.named_parameters())
    with torch.no_grad():
        names["language_model.model.layers.1.input_layernorm.weight"][0] += 1
    with pytest.raises(RolloutError, match=r"got others in layers.1 \(1 of 4"):
        state.rollouts.update(state.policy, 5)


def test_untied_head_with_a_padded_vocabulary_in_bfloat16(material, world, tmp_path):
    """vLLM pads 590 rows to 640. Log-probs differ by bfloat16's rounding, and the sums not at all."""
    student = load_student(material.inputs.model_path, dtype="float32")
    student.model.resize_token_embeddings(590, pad_to_multiple_of=None)
    student.model.config.text_config.tie_word_embeddings = student.model.config.tie_word_embeddings = False
    student.model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(590, 64))
    export_student(student, tmp_path / "untied")
    inputs = replace(material.inputs, model_path=str(tmp_path / "untied"))
    state = build(SimpleNamespace(folder=material.folder, inputs=inputs), world, "model.dtype=bfloat16")
    lines, prompts = stage2_steps(state, material, steps=2)
    check_agreement(lines, largest_kl=0.005, largest_difference=0.02)
    state.rollouts.update(state.policy, 2)
    assert set(state.rollouts.sampler.weight_sums()) == {"embeddings", "layers.0", "layers.1", "norm", "head"}
    assert difference(state, prompts, sample(state, prompts)) < 0.05
    names = dict(state.rollouts.sampler._model.named_parameters())
    assert len(names["language_model.lm_head.weight"]) == 640
    with torch.no_grad():
        names["language_model.lm_head.weight"][589, 0] += 1
    sums = to_host(group_sums(stream(state.policy, source_weights(state.policy))))
    with pytest.raises(RolloutError, match=r"got others in head \(1 of 5"):
        check_sums([sums], state.rollouts.sampler.weight_sums(), "expected them", REMEDY)


def test_an_engine_that_is_no_longer_used_is_released(state, material, world, prompts):
    unused = build(material, world)
    model = weakref.ref(unused.rollouts.sampler._model)
    assert model() is not state.rollouts.sampler._model
    del unused
    gc.collect()
    assert model() is None
    assert torch.distributed.is_initialized()
    # The other engine of this process still works.
    assert difference(state, prompts, sample(state, prompts)) < ROUNDING


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ("runtime.zero_stage=1", "checkpoint.every_steps=2", "checkpoint.keep=9")),
        (2, ("runtime.zero_stage=3",)),
        (2, LORA),
        (2, (*LORA, "rollout.tensor_parallel=2")),
    ],
    ids=["full", "two processes with ZeRO-3", "two processes with adapters", "adapters and one copy of the model"],
)
def test_runs(tmp_path, processes, overrides, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    settings = (*ENGINE, "distill.lr=1e-2", *overrides)
    done = run_train(
        mini_arguments(tmp_path / "runs", tmp_path / "made", *settings), processes=processes, timeout_s=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(tmp_path / "runs")
    before = metrics(run)
    steps = [line for line in before if line["stage"] == "distill"]
    assert len(steps) == 5
    check_agreement(steps)
    assert steps[-1]["policy/kl"] > 1e-6
    if processes > 1:
        return
    # A run that is killed and resumed starts a new engine, which gets the weights of the checkpoint.
    forget_steps(run, after=6)
    done = run_train(["--resume", str(run)], timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(run) == before
