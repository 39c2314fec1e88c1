"""Test the tiny student: size, initialization, tokenizer, and a folder that is complete or absent."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rmsd_fast.data.question_text import ANSWER_FORMAT
from rmsd_fast.made import student as made_student
from rmsd_fast.made.student import SPECIAL_TOKENS, TAGS, build_tiny_student, build_tokenizer
from rmsd_fast.models.students import load_student

WORDS = [
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "moves",
    "left",
    "right",
    "top",
    "bottom",
    "appears",
    "between",
    "seconds",
    "and",
    "then",
    "leaves",
]
# The texts have enough different words for every merge of the answer format and more.
TEXTS = [
    f"<think>The {a} {b} {c} here.</think><answer>{a} {c}</answer>" for a in WORDS for b in WORDS for c in WORDS[:4]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "deep" / "student"
    build_tiny_student(folder, texts=TEXTS, seed=3)
    return folder


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_size_and_shape(folder: Path) -> None:
    model = load_student(folder, dtype="float32").model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 0.5e6 <= parameters <= 0.8e6
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    config = model.config
    assert len(model.model.language_model.layers) == 3 and config.text_config.hidden_size == 64
    assert config.vision_config.depth == 1 and list(config.vision_config.deepstack_visual_indexes) == [0]
    # Time, height and width share half a head of 32.
    assert sum(config.text_config.rope_parameters["mrope_section"]) == 16


def test_other_sizes(tmp_path: Path) -> None:
    build_tiny_student(tmp_path / "wide", texts=TEXTS[:9], hidden=96, layers=1)
    config = load_student(tmp_path / "wide", dtype="float32").model.config
    assert (config.text_config.hidden_size, config.text_config.num_attention_heads) == (96, 3)
    assert config.text_config.num_hidden_layers == 1 and config.vision_config.out_hidden_size == 96


@pytest.mark.parametrize("sizes", [{"hidden": 48}, {"hidden": 0}, {"layers": 0}, {"vocab_size": 200}])
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected hidden a multiple of 32"):
        build_tiny_student(tmp_path / "student", texts=TEXTS, **sizes)
    assert list(tmp_path.iterdir()) == []


def test_initialization_lets_it_learn_from_pixels(folder: Path) -> None:
    model = load_student(folder, dtype="float32").model
    visual = model.model.visual
    assert visual.patch_embed.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert visual.pos_embed.weight.std().item() == pytest.approx(1.0, rel=0.05)
    for weight in (
        visual.merger.linear_fc1.weight,
        visual.deepstack_merger_list[0].linear_fc2.weight,
        visual.blocks[0].attn.qkv.weight,
        model.model.language_model.layers[2].mlp.gate_proj.weight,
        model.model.language_model.embed_tokens.weight,
    ):
        assert weight.std().item() == pytest.approx(0.06, rel=0.1)


def test_same_arguments_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    build_tiny_student(tmp_path / "again", texts=iter(TEXTS), seed=3)
    assert _digests(tmp_path / "again") == _digests(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    build_tiny_student(tmp_path / "other", texts=TEXTS, seed=4)
    ours, other = _digests(folder), _digests(tmp_path / "other")
    assert {name for name in ours if ours[name] != other[name]} == {"model.safetensors", made_student.SETTINGS_FILE}


def test_a_finished_folder_is_reused_and_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    build_tiny_student(folder, texts=TEXTS, seed=3)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="choose another folder"):
        build_tiny_student(folder, texts=TEXTS, seed=5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="got other files"):
        build_tiny_student(tmp_path, texts=TEXTS)
    (tmp_path / "empty").mkdir()
    build_tiny_student(tmp_path / "empty", texts=TEXTS[:9])
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="No space left"):
        build_tiny_student(tmp_path / "student", texts=TEXTS[:9])
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_has_the_tokens_of_the_family(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(build_tokenizer(TEXTS, 360)) == 360
    for token in (*SPECIAL_TOKENS, *TAGS):
        assert (
            tokenizer(f"a{token}b", add_special_tokens=False).input_ids.count(tokenizer.convert_tokens_to_ids(token))
            == 1
        )
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == set(SPECIAL_TOKENS)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    config = json.loads((folder / "config.json").read_text())
    assert config["video_token_id"] == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_digits_are_single_tokens_and_any_text_round_trips(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [tokenizer.decode([index]) for index in tokenizer("100,250 to 1987.5", add_special_tokens=False).input_ids]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("10025019875")
    for text in [
        "<think>é 漢字 😀\t\n\n  x</think>\n<answer>12.5 to 20.0</answer>",
        " leading",
        "trailing \n",
        "DON'T",
    ]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_prompts_and_responses_are_short(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    assert max(count(text) for text in ANSWER_FORMAT.values()) <= 30
    assert count("<think>The red circle moves here.</think><answer>B</answer>") <= 14
    assert count("<0.5 seconds>") <= 6


def test_few_texts_give_a_smaller_vocabulary() -> None:
    tokenizer = build_tokenizer([], 600)
    assert 256 + len(SPECIAL_TOKENS) + len(TAGS) < len(tokenizer) < 600
    assert tokenizer.decode(tokenizer("any text", add_special_tokens=False).input_ids) == "any text"


def test_chat_template_takes_strings_parts_and_several_turns(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "Me."},
    ]
    video, image = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image"))
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{video}{image}Who?<|im_end|>\n"
        "<|im_start|>assistant\nMe.<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == expected + "<|im_start|>assistant\n"
