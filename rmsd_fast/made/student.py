"""Build a tiny student with its own tokenizer, offline and in seconds: the student of the quickstart and the tests.

It is a Qwen3-VL or, for tests, a Qwen2.5-VL. The initialization lets the Qwen3-VL learn to see within minutes on a CPU:
weights at 0.06 instead of transformers' 0.02, the patch embedding at 0.02, and the position embedding of the vision
tower at 1.0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedModel, Qwen2Tokenizer

from rmsd_fast.config import ModelError, SettingsError
from rmsd_fast.data.chat_template import END_TOKEN, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.question_text import ANSWER_FORMAT
from rmsd_fast.files import staged_folder
from rmsd_fast.models.export import fill_export
from rmsd_fast.models.families import FAMILIES
from rmsd_fast.models.students import Student

SETTINGS_FILE = "tiny_student.json"
PAD_TOKEN = "<|endoftext|>"
SPECIAL_TOKENS = (
    PAD_TOKEN,
    "<|im_start|>",
    END_TOKEN,
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)
# Tags are plain text with their own ids, because they occur in every response and shorter rows train faster.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Words are split as in the family's tokenizer, and digits one by one.
SPLIT = (
    r"(?i:'(?:[sdmt]|re|ve|ll))"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'video' or 'video' in part -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif part.type == 'image' or 'image' in part -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

HEAD_DIM = 32
# With 31 positions per side, 2, 3, 4, 6, 7, 11, 16 or 31 patches per side need no interpolation, which would reduce the
# spread of the embedding.
VISION_POSITIONS = 31**2
PREPROCESSORS = {
    "qwen3_vl": Preprocessor(),
    # Patch size and normalization of the original models.
    "qwen2_5_vl": Preprocessor(
        patch_size=14,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        family="qwen2_vl",
    ),
}
INIT_STD = 0.06
PATCH_EMBED_STD = 0.02
POSITION_STD = 1.0


def build_tiny_student(
    folder: str | Path,
    *,
    texts: Iterable[str],
    seed: int = 0,
    vocab_size: int = 600,
    hidden: int = 64,
    layers: int = 3,
    family: str = "qwen3_vl",
) -> None:
    """Write a tiny model (0.5 million parameters by default), its tokenizer and preprocessor settings to a folder.

    The same arguments write the same files. A folder that already holds the same student is left unchanged. Otherwise,
    the folder is created atomically.

    Args:
        folder: output folder.
        texts: questions and responses to train the tokenizer on.
        seed: seed of the weights.
        vocab_size: largest number of tokens in the tokenizer; a few texts give fewer.
        hidden: width of language model and vision tower, a multiple of 32 (one attention head per 32).
        layers: number of decoder layers.
        family: "qwen3_vl" or "qwen2_5_vl".
    Raises:
        ValueError: the sizes are inconsistent, or the folder holds other files.
    """
    folder = Path(folder)
    texts = list(texts)
    smallest = 256 + len(SPECIAL_TOKENS) + len(TAGS)
    if hidden < HEAD_DIM or hidden % HEAD_DIM or layers < 1 or vocab_size < smallest:
        raise SettingsError(
            f"tiny student: expected hidden a multiple of {HEAD_DIM}, layers >= 1 and vocab_size >= {smallest}, "
            f"got hidden={hidden}, layers={layers}, vocab_size={vocab_size}"
        )
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    settings = {"seed": seed, "vocab_size": vocab_size, "hidden": hidden, "layers": layers, "texts_sha256": digest}
    if family != "qwen3_vl":
        settings["family"] = family
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _check_same(folder, settings)
        return
    tokenizer = build_tokenizer(texts, vocab_size)
    student = Student(_build_model(tokenizer, seed, hidden, layers, family), tokenizer, PREPROCESSORS[family])
    with staged_folder(folder, replace=False) as staged:
        fill_export(student, staged)
        (staged / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    # Another process may have built the same student in the meantime. Its copy is equivalent.
    _check_same(folder, settings)


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer with the family's special tokens, chat template and digit splitting."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(TAGS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Repeat the words of every prompt often enough to become tokens for any texts.
    texts = list(texts)
    scaffold = ["user\n", "assistant\n", "<0.5 seconds>", *ANSWER_FORMAT.values()]
    # Tags get their own ids below. If they remained in the texts, they would use up merges.
    tagless = [_without_tags(text) for text in [*texts, *scaffold * max(2, len(texts) // 4)]]
    backend.train_from_iterator(tagless, trainer)
    trained = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token=None,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _without_tags(text: str) -> str:
    for tag in TAGS:
        text = text.replace(tag, "\n")
    return text


def _build_model(tokenizer: Qwen2Tokenizer, seed: int, hidden: int, layers: int, family: str) -> PreTrainedModel:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    heads, ffn = hidden // HEAD_DIM, 2 * hidden
    preprocessor = PREPROCESSORS[family]
    # The sections divide half a head among time, height and width.
    sections = [HEAD_DIM // 2 - 2 * (HEAD_DIM // 6), HEAD_DIM // 6, HEAD_DIM // 6]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 32768,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": True,
        "pad_token_id": ids[PAD_TOKEN],
        "eos_token_id": ids[END_TOKEN],
    }
    vision = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_heads": heads,
        "patch_size": preprocessor.patch_size,
        "spatial_merge_size": preprocessor.merge_size,
        "temporal_patch_size": preprocessor.temporal_patch_size,
        "out_hidden_size": hidden,
        "initializer_range": INIT_STD,
    }
    if family == "qwen3_vl":
        text |= {"head_dim": HEAD_DIM, "rope_parameters": rope | {"mrope_interleaved": True}}
        vision |= {"depth": 1, "num_position_embeddings": VISION_POSITIONS, "deepstack_visual_indexes": [0]}
    else:
        text |= {"rope_parameters": rope, "bos_token_id": None}
        # Windows of 2 x 2 tokens, which are smaller than most pictures.
        vision |= {"depth": 2, "fullatt_block_indexes": [1], "window_size": 56, "tokens_per_second": 2}
    config = FAMILIES[family].config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
        pad_token_id=ids[PAD_TOKEN],
        eos_token_id=ids[END_TOKEN],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family].model_class(config)
        visual = model.model.visual
        with torch.no_grad():
            visual.patch_embed.proj.weight.normal_(std=PATCH_EMBED_STD)
            if family == "qwen3_vl":
                visual.pos_embed.weight.normal_(std=POSITION_STD)
    model.generation_config = GenerationConfig(eos_token_id=ids[END_TOKEN], pad_token_id=ids[PAD_TOKEN])
    return model


def _check_same(folder: Path, settings: dict[str, object]) -> None:
    path = folder / SETTINGS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        found = None
    if found != settings:
        raise ModelError(
            f"{folder}: expected no folder, or the tiny student with settings {settings}, "
            f"got {found or 'other files'}; choose another folder or remove this one"
        )
