"""Test the student: loading, refusals, packed and padded rows against plain transformers, and gradients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from media_files import noise_frames, write_clip

from rmsd_fast.config import ModelError, VideoConfig
from rmsd_fast.data.media_cache import ByteLru
from rmsd_fast.data.packing import gather_rows, make_rows
from rmsd_fast.data.preprocess import video_patches
from rmsd_fast.data.prompts import HintError, Prompt, PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models import students
from rmsd_fast.models.families.qwen3_vl import add_deepstack_by_index, add_features
from rmsd_fast.models.folders import find_folder, open_folder, resolve_folder
from rmsd_fast.models.shared_prefix import enable_shared_prefix
from rmsd_fast.models.students import (
    Student,
    encode_media,
    forward_hidden,
    freeze,
    load_student,
)

TEXTS = ["What colour is the moving square?", "<think>A red square moves.</think><answer>B</answer>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students")
    build_tiny_student(folder / "student", texts=TEXTS, layers=2)
    write_clip(folder / "a.mp4", noise_frames(9, 64, 96, seed=1), fps=4.0)
    write_clip(folder / "b.mp4", noise_frames(6, 64, 64, seed=2), fps=3.0)
    from PIL import Image

    Image.fromarray(noise_frames(1, 64, 64)[0].permute(1, 2, 0).numpy()).save(folder / "c.png")
    return folder


@pytest.fixture
def student(folder: Path) -> Student:
    return load_student(folder / "student", dtype="float32")


@pytest.fixture
def ask(folder: Path, student: Student) -> Callable[[str], Prompt]:
    """Return a prompt about media by name: a and b are videos, and c is an image."""
    builder = PromptBuilder(student, VideoConfig(num_frames=4))

    def build(media: str) -> Prompt:
        videos = tuple(str(folder / f"{name}.mp4") for name in media if name != "c")
        images = tuple(str(folder / f"{name}.png") for name in media if name == "c")
        return builder.build(
            Question(id=media, question=f"What is {media}?", task_type="open", videos=videos, images=images)
        )

    return build


def _responses(student: Student, *texts: str) -> list[torch.Tensor]:
    builder = PromptBuilder(student, VideoConfig())
    return [builder.encode_response(text) for text in texts]


def _plain_hidden(student: Student, prompt: Prompt, response: torch.Tensor) -> torch.Tensor:
    """Return hidden states [P + R, D] from plain transformers for one row, with its own pixel inputs and positions."""
    arguments = {}
    for kind, pixels, grid in (
        ("video", "pixel_values_videos", "video_grid_thw"),
        ("image", "pixel_values", "image_grid_thw"),
    ):
        media = [frames for frames in prompt.media if frames.kind == kind]
        if media:
            arguments[pixels] = torch.cat([video_patches(frames.pixels, frames.preprocessor) for frames in media])
            arguments[grid] = torch.tensor([frames.grid_thw for frames in media])
    types = torch.cat([prompt.mm_token_type_ids, torch.zeros_like(response)])
    output = student.model.model(
        input_ids=torch.cat([prompt.input_ids, response])[None], mm_token_type_ids=types[None], **arguments
    )
    return output.last_hidden_state[0]


def _set_packing(student: Student, packing: str) -> None:
    if packing == "shared":
        enable_shared_prefix(student.model)


def test_cached_embeddings_equal_those_of_the_tower(
    ask: Callable[[str], Prompt], student: Student, monkeypatch
) -> None:
    prompts = [ask("ab"), ask("c"), ask(""), ask("a")]
    prompts = [replace(p, media=tuple(replace(m, key=f"{m.kind}{m.pixels.sum()}") for m in p.media)) for p in prompts]
    calls = []
    run = students._run_tower
    monkeypatch.setattr(students, "_run_tower", lambda model, media: calls.append(len(media)) or run(model, media))
    with torch.no_grad():
        expected = encode_media(student.model, prompts)
        assert calls == [3]
        cache = ByteLru(2**20)
        first, again = (encode_media(student.model, prompts, cache=cache) for _ in range(2))
        # The first call encodes each medium separately, and the second encodes none.
        assert calls == [3, 1, 1, 1]
        other = encode_media(student.model, [prompts[3]], cache=cache)
        # Media without a key are not cached.
        encode_media(student.model, [ask("a")], cache=cache)
        assert calls == [3, 1, 1, 1, 1]
    assert cache.bytes == sum(t.nbytes for t in first.pooled[:3]) * (1 + len(first.deepstack))
    for features in (first, again):
        assert (features.counts, features.kinds) == (expected.counts, expected.kinds)
        for one, two in zip(features.pooled, expected.pooled, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    flat = [[f.pooled, *f.deepstack] for f in (first, again)]
    assert all(torch.equal(a, b) for x, y in zip(*flat, strict=True) for a, b in zip(x, y, strict=True))
    assert torch.equal(other.pooled[0], first.pooled[0]) and torch.equal(first.pooled[3], first.pooled[0])
    # The least recently used entries are evicted. With room for one video, the first of two is encoded again.
    small = ByteLru(first.pooled[0].nbytes * (1 + len(first.deepstack)))
    with torch.no_grad():
        encode_media(student.model, prompts[:1], cache=small)
        encode_media(student.model, prompts[:1], cache=small)
    assert calls[5:] == [1, 1, 1, 1]


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_rows_equal_single_rows_of_plain_transformers(
    ask: Callable[[str], Prompt], student: Student, packing: str
) -> None:
    # The prompts have a video, two videos, an image, videos and an image, and no media.
    prompts = [ask("a"), ask("ab"), ask("c"), ask("bc"), ask("")]
    texts = [("red", "a much longer answer"), ("", "x"), ("<answer>B</answer>",), ("blue",), ("12.5", "13", "red")]
    responses = [_responses(student, *own) for own in texts]
    flat = [(prompt, response) for prompt, own in zip(prompts, responses, strict=True) for response in own]
    with torch.no_grad():
        expected = [_plain_hidden(student, prompt, response) for prompt, response in flat]
        # Different pixels must give different hidden states.
        other = _plain_hidden(student, ask("b"), responses[0][0])
        assert (expected[0][-1] - other[-1]).abs().max() > 1e-2
        rows = make_rows(packing, prompts, responses, pad_id=student.pad_id)
        features = encode_media(student.model, prompts)
        _set_packing(student, packing)
        hidden = forward_hidden(student.model, rows, features).flatten(0, 1)
    predicting = gather_rows(hidden, rows).split(rows.lengths_list)
    for own, whole, last, (_, response) in zip(predicting, expected, rows.last, flat, strict=True):
        assert (own - whole[-len(response) - 1 : -1]).abs().max() < 1e-5
        assert (hidden[last] - whole[-1]).abs().max() < 1e-5


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_hints_after_a_shared_video_equal_separate_rows(
    ask: Callable[[str], Prompt], folder: Path, packing: str
) -> None:
    """In float64, with real pixels: the oracle computes each row alone, and positions with `get_rope_index`."""
    student = load_student(folder / "student", dtype="float32")
    student.model.double()
    builder = PromptBuilder(student, VideoConfig(num_frames=4))
    prompts, words = [ask("a"), ask("ab")], ["A cue.", "Look at the end, and not at the start.", "no"]
    split = [builder.split(prompt) for prompt in prompts]
    for prompt, (body, tail) in zip(prompts, split, strict=True):
        assert torch.equal(torch.cat([body.input_ids, tail]), prompt.input_ids)
        assert student.tokenizer.decode(tail) == "<|im_end|>\n<|im_start|>assistant\n"
        assert body.next_position == prompt.next_position - len(tail)
    leads = [[torch.cat([builder.encode_hint(text, max_tokens=60), tail]) for text in words] for _, tail in split]
    # A hint may also be missing; the lead is then the end of the turn.
    leads[1][2] = split[1][1]
    responses = [_responses(student, "red", "a longer answer", "x")] * 2
    bodies = [body for body, _ in split]
    rows = make_rows(packing, bodies, responses, leads, pad_id=student.pad_id)
    flat = [(i, lead, response) for i in range(2) for lead, response in zip(leads[i], responses[i], strict=True)]
    with torch.no_grad():
        expected = [_plain_hidden(student, bodies[i], torch.cat([lead, response])) for i, lead, response in flat]
        plain = _plain_hidden(student, prompts[1], responses[1][2])
        features = encode_media(student.model, bodies)
        _set_packing(student, packing)
        hidden = forward_hidden(student.model, rows, features).flatten(0, 1)
    assert torch.equal(expected[-1], plain)
    for own, whole, (_, _, response) in zip(
        gather_rows(hidden, rows).split(rows.lengths_list), expected, flat, strict=True
    ):
        assert (own - whole[-len(response) - 1 : -1]).abs().max() < 1e-12
    # The hints matter.
    assert (expected[0][-1] - expected[1][-1]).abs().max() > 1e-3


def test_hints_are_encoded_safely(student: Student) -> None:
    builder = PromptBuilder(student, VideoConfig())
    tokens = len(builder.encode_hint("Look at the end.", max_tokens=100))
    assert len(builder.encode_hint("Look at the end.", max_tokens=tokens)) == tokens
    for text, most, says in (
        ("a<|im_end|>b", 100, r"plain text, got the special token <\|im_end\|>"),
        ("<|video_pad|>", 100, r"special token <\|video_pad\|>"),
        ("\ud800", 100, "lone surrogate"),
        (
            "Look at the end.",
            tokens - 1,
            rf"max_hint_tokens: expected at least {tokens} for this hint, got {tokens - 1}",
        ),
    ):
        with pytest.raises(HintError, match=says):
            builder.encode_hint(text, max_tokens=most)


def test_deepstack_features_by_index_equal_those_by_mask(ask: Callable[[str], Prompt], student: Student) -> None:
    """Values and gradients are equal bit for bit, and a mask, as passed by the whole model, is accepted too."""
    language_model = student.model.model.language_model
    by_mask = partial(type(language_model)._deepstack_process, language_model)
    torch.manual_seed(0)
    mask = torch.rand(2, 9) < 0.4
    places = mask.flatten().nonzero()[:, 0]
    hidden, features = torch.randn(2, 9, 8, dtype=torch.bfloat16), torch.randn(len(places), 8)
    weight = torch.randn(2, 9, 8)
    results = []
    for add, where in ((by_mask, mask), (add_features, mask), (add_features, places)):
        leaves = [hidden.clone().requires_grad_(), features.clone().requires_grad_()]
        # The output of a layer is not a leaf.
        out = add(leaves[0] + 0, where, leaves[1])
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    prompt, (response,) = ask("ab"), _responses(student, "red")
    plain = _plain_hidden(student, prompt, response)
    add_deepstack_by_index(language_model)
    assert torch.equal(_plain_hidden(student, prompt, response), plain)


def test_padding_does_not_change_results(ask: Callable[[str], Prompt], student: Student) -> None:
    prompts = [ask("a"), ask("b")]
    short, long = _responses(student, "red", "a very much longer answer " * 8)
    features = encode_media(student.model, prompts)
    rows = make_rows("padded", prompts, [[long, short], [long]], pad_id=student.pad_id)
    with torch.no_grad():
        together = forward_hidden(student.model, rows, features)
        rows.input_ids[rows.attention_mask == 0] = 7
        repadded = forward_hidden(student.model, rows, features)
    real = rows.attention_mask.bool()
    assert not real.all() and torch.equal(together[real], repadded[real])


def test_rows_of_the_other_packing_are_refused(ask: Callable[[str], Prompt], student: Student) -> None:
    prompts, responses = [ask("a")], [_responses(student, "red")]
    features = encode_media(student.model, prompts)
    with pytest.raises(RuntimeError, match="enable_shared_prefix"):
        forward_hidden(student.model, make_rows("shared", prompts, responses, pad_id=0), features)
    enable_shared_prefix(student.model)
    with pytest.raises(RuntimeError, match="disable_shared_prefix"):
        forward_hidden(student.model, make_rows("padded", prompts, responses, pad_id=0), features)


def test_a_video_that_several_prompts_show_is_encoded_once(ask: Callable[[str], Prompt], student: Student) -> None:
    prompts = [ask("ab"), ask("b"), ask("a"), ask("c")]
    tokens = []
    student.model.model.visual.register_forward_hook(lambda _, args, output: tokens.append(len(output.pooler_output)))
    features = encode_media(student.model, prompts)
    assert tokens == [12 + 8 + 4]
    assert [len(pooled) for pooled in features.pooled] == [12, 8, 8, 12, 4]
    alone = encode_media(student.model, [prompts[1]])
    assert (features.pooled[2] - alone.pooled[0]).abs().max() < 1e-5
    assert (features.deepstack[0][2] - alone.deepstack[0][0]).abs().max() < 1e-5


def test_features_are_split_by_medium_whatever_the_version_gives(
    ask: Callable[[str], Prompt], student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [ask("ab"), ask("c")]
    expected = encode_media(student.model, prompts)
    given = student.model.model.get_image_features

    def unsplit(*arguments, **options):
        output = given(*arguments, **options)
        layers = output.deepstack_features
        output.deepstack_features = [layer if torch.is_tensor(layer) else torch.cat(list(layer)) for layer in layers]
        return output

    # transformers 5.17 does this.
    monkeypatch.setattr(student.model.model, "get_image_features", unsplit)
    found = encode_media(student.model, prompts)
    for own, layer in zip(found.deepstack, expected.deepstack, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, layer, strict=True)) and len(own) == 3
    # Use several calls of the tower with one medium each.
    parts = encode_media(student.model, prompts, tokens_per_call=12)
    for own, whole in zip((parts.pooled, *parts.deepstack), (expected.pooled, *expected.deepstack), strict=True):
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(own, whole, strict=True)) and len(own) == 3


def test_features_that_do_not_match_their_placeholders_are_refused(
    ask: Callable[[str], Prompt], student: Student
) -> None:
    prompt = ask("a")
    types = prompt.mm_token_type_ids.clone()
    types[-1] = 2
    with pytest.raises(RuntimeError, match="expected 13 features .* got 12 from the vision tower"):
        encode_media(student.model, [replace(prompt, mm_token_type_ids=types)])


def test_one_vision_call_for_all_media_and_none_for_the_rows(
    ask: Callable[[str], Prompt], student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    visual = student.model.model.visual
    visual.register_forward_hook(lambda *_: calls.append(1))
    prompts = [ask("ab"), ask("c"), ask("")]
    features = encode_media(student.model, prompts)
    assert calls == [1] and features.counts == [2, 1, 0] and features.kinds == ["video", "video", "image"]
    # 4 frames make 2 temporal steps of 2x3 or 2x2 tokens, and the image has 2x2.
    assert [len(pooled) for pooled in features.pooled] == [12, 8, 4]
    assert [[len(layer) for layer in depth] for depth in features.deepstack] == [[12, 8, 4]]
    responses = [_responses(student, *"xy"), _responses(student, "z"), _responses(student, "w")]
    enable_shared_prefix(student.model)
    forward_hidden(student.model, make_rows("shared", prompts, responses, pad_id=0), features)
    assert calls == [1]
    empty = encode_media(student.model, [prompts[2]])
    assert calls == [1] and empty.pooled == [] and empty.deepstack == [[]]


def _gradients(student: Student) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_gradients_equal_those_of_plain_transformers(
    ask: Callable[[str], Prompt], student: Student, packing: str
) -> None:
    freeze(student.model, train_vision=True)
    prompts = [ask("ab"), ask("c")]
    responses = [_responses(student, "red", "a longer answer"), _responses(student, "blue")]
    weight = torch.randn(student.model.config.text_config.hidden_size)
    for prompt, own in zip(prompts, responses, strict=True):
        for response in own:
            expected = _plain_hidden(student, prompt, response)
            (expected[-len(response) - 1 : -1] @ weight).sum().backward()
    theirs = _gradients(student)
    student.model.zero_grad()
    rows = make_rows(packing, prompts, responses, pad_id=student.pad_id)
    _set_packing(student, packing)
    hidden = forward_hidden(student.model, rows, encode_media(student.model, prompts))
    (gather_rows(hidden.flatten(0, 1), rows) @ weight).sum().backward()
    ours = _gradients(student)
    assert ours.keys() == theirs.keys() and "model.visual.patch_embed.proj.weight" in ours
    for name, gradient in theirs.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (ours[name] - gradient).abs().max() <= 1e-4 * scale + 1e-6, name


def test_frozen_vision_gets_no_gradient_and_no_graph(ask: Callable[[str], Prompt], student: Student) -> None:
    freeze(student.model, train_vision=False)
    frozen = {name for name, p in student.model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in student.model.named_parameters() if ".visual." in name}
    assert any("deepstack_merger_list" in name for name in frozen) and any(".merger." in name for name in frozen)
    features = encode_media(student.model, [ask("a")])
    assert not features.pooled[0].requires_grad
    rows = make_rows("padded", [ask("a")], [_responses(student, "red")], pad_id=student.pad_id)
    forward_hidden(student.model, rows, features).sum().backward()
    assert set(_gradients(student)) == {name for name, p in student.model.named_parameters() if p.requires_grad}
    freeze(student.model, train_vision=True)
    features = encode_media(student.model, [ask("a")])
    assert features.pooled[0].requires_grad and features.deepstack[0][0].requires_grad
    assert not features.detach().pooled[0].requires_grad


def test_gradient_checkpointing_does_not_change_results(ask: Callable[[str], Prompt], student: Student) -> None:
    freeze(student.model, train_vision=True)
    prompts = [ask("a")]
    rows = make_rows("padded", prompts, [_responses(student, "red")], pad_id=student.pad_id)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
            student.model.train()
        student.model.zero_grad()
        hidden = forward_hidden(student.model, rows, encode_media(student.model, prompts))
        hidden.square().sum().backward()
        results.append((hidden.detach(), _gradients(student)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient)


def test_bfloat16_student_computes_in_bfloat16(folder: Path, ask: Callable[[str], Prompt], student: Student) -> None:
    low = load_student(folder / "student", dtype="bfloat16")
    prompts = [ask("a")]
    rows = make_rows("padded", prompts, [_responses(student, "red")], pad_id=student.pad_id)
    with torch.no_grad():
        exact = forward_hidden(student.model, rows, encode_media(student.model, prompts))
        rounded = forward_hidden(low.model, rows, encode_media(low.model, prompts))
    assert rounded.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rounded.float(), dim=-1).min() > 0.98


def _copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "student", tmp_path / "student"))


def _edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_model_of_another_family_is_refused(folder: Path, tmp_path: Path) -> None:
    path = _copy(folder, tmp_path)
    _edit_config(path, model_type="llama")
    message = r"expected a model of family qwen3_vl or qwen2_5_vl, got 'llama'.*Qwen3-VL model"
    with pytest.raises(ValueError, match=message):
        load_student(path, dtype="float32")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "expected a model directory with config.json, got none"),
        ("model.safetensors", r"expected weights in model\.safetensors, got no such file; download or export"),
        ("tokenizer.json", r"expected tokenizer\.json, or vocab\.json"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_missing_files_are_reported(folder: Path, tmp_path: Path, missing: str, message: str) -> None:
    path = _copy(folder, tmp_path)
    (path / missing).unlink()
    with pytest.raises(ValueError, match=message) as caught:
        load_student(path, dtype="float32")
    assert str(path) in str(caught.value)


def test_missing_preprocessor_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    path = _copy(folder, tmp_path)
    (path / "preprocessor_config.json").unlink()
    (path / "video_preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"expected video_preprocessor_config\.json or preprocessor_config\.json"):
        load_student(path, dtype="float32")


def test_damaged_and_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = _copy(folder, tmp_path)
    weights = path / "model.safetensors"
    # Copy the tensors, because load_file returns tensors mapped to the file that is cut below.
    complete = {key: value.clone() for key, value in load_file(weights).items()}
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged .*download or export the model again"):
        load_student(path, dtype="float32")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in complete.items() if key != name}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 weights are missing or have a different shape .first: {name}"):
        load_student(path, dtype="float32")


def test_files_of_two_models_are_refused(folder: Path, tmp_path: Path) -> None:
    path = _copy(folder, tmp_path)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**settings, "patch_size": 14}))
    with pytest.raises(
        ValueError, match=r"expected \(16, 2, 2\) as in config\.json, got \(14, 2, 2\) in the preprocessor"
    ):
        load_student(path, dtype="float32")
    path = _copy(folder, tmp_path / "second")
    config = json.loads((path / "config.json").read_text())
    _edit_config(path, video_token_id=config["image_token_id"])
    with pytest.raises(ValueError, match=r"the ids of .* as in config\.json, got .* in the preprocessor or tokenizer"):
        load_student(path, dtype="float32")


def test_the_chat_template_of_the_processor_is_used(folder: Path, tmp_path: Path) -> None:
    path = _copy(folder, tmp_path)
    (path / "chat_template.jinja").unlink()
    theirs = "{# theirs #}" + load_student(folder / "student", dtype="float32").tokenizer.chat_template
    (path / "chat_template.json").write_text(json.dumps({"chat_template": theirs}))
    assert load_student(path, dtype="float32").tokenizer.chat_template == theirs


def _write(name: str, content: object) -> Callable[[Path], None]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda path: (path / name).write_text(text)


def _legacy_template(content: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "chat_template.jinja").unlink()
        _write("chat_template.json", content)(path)

    return change


def _weights_of_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


SHARDS = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), r"expected weights in model\.safetensors"),
        (_weights_of_pickle, r"got only \*\.bin files; save the model with safe_serialization=True"),
        (_write("model.safetensors.index.json", SHARDS), r"expected weights in model-00001-of-00002\.safetensors"),
        (_write("model.safetensors.index.json", {"weight_map": 3}), r"expected an index of the weights"),
        (_write("model.safetensors.index.json", {"weight_map": {"a": 3}}), r"expected an index of the weights"),
        (_write("generation_config.json", {"do_sample": False, "temperature": 0.5}), "settings that transformers can"),
        (_write("generation_config.json", "{"), r"generation_config\.json: expected settings"),
        (lambda path: _edit_config(path, text_config="x"), r"text_config: expected an object, got 'x'"),
        (lambda path: _edit_config(path, vision_config={"depth": "x"}), "expected a configuration of a Qwen3-VL model"),
        (_legacy_template("{"), r"chat_template\.json: expected a chat template"),
        (_legacy_template({"template": ""}), r"chat_template\.json: expected a chat template"),
        (_write("preprocessor_config.json", {"patch_size": "x"}), "the preprocessor settings have an invalid value"),
    ],
)
def test_a_folder_is_checked_without_loading_its_weights(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = _copy(folder, tmp_path)
    open_folder(path)
    damage(path)
    with pytest.raises(ModelError, match=message):
        open_folder(path)


def test_the_preprocessor_of_another_family_is_refused(folder: Path, tmp_path: Path) -> None:
    path = _copy(folder, tmp_path)
    settings = json.loads((path / "video_preprocessor_config.json").read_text())
    settings["video_processor_type"] = "Qwen2VLVideoProcessor"
    (path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ModelError, match=r"the family: expected qwen3_vl as in config\.json, got qwen2_vl in the preprocessor"
    ):
        open_folder(path)


def test_an_interrupted_download_is_continued(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _copy(folder, tmp_path)
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").unlink()

    def snapshot_download(name: str, local_files_only: bool = False, **_: object) -> str:
        if not local_files_only:
            (path / "model.safetensors").write_bytes(weights)
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_folder("someone/student") == path
    open_folder(resolve_folder("someone/student"))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./here", "just-a-name"])
def test_paths_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"model\.path: expected a model directory or a Hub name"):
        load_student(name, dtype="float32")


def test_hub_name_without_a_network_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"could not be downloaded from the Hub.*copy the model here"):
        load_student("nobody/no-such-model", dtype="float32")


def test_unknown_dtype_and_attention_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.dtype: expected one of"):
        load_student(folder / "student", dtype="float16")
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(RuntimeError, match=r"model\.attention=sdpa"):
            load_student(folder / "student", dtype="float32", attn_implementation="flash_attention_2")
