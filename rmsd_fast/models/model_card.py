"""The README.md of an export, a student or a discriminator: what it is, how to load it, and its prompts."""

from __future__ import annotations

from pathlib import Path

from rmsd_fast import __version__
from rmsd_fast.config import VideoConfig
from rmsd_fast.data.question_text import ANSWER_FORMAT
from rmsd_fast.models.families import Family

# The oldest version that exports were tested with, and the first one with Qwen3-VL.
OLDEST_TRANSFORMERS = "4.57"

# The phrase that identifies an export.
_MADE_BY = "trained and exported by rmsd_fast"
_FORMATS = "\n".join(f"| `{kind}` | `{text}` |" for kind, text in ANSWER_FORMAT.items())
_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---

# Student of the family `{family}`

A video language model, {made_by} {version} (R-MSD, arXiv 2603.11423).
{origin}
## Load it

Run this in the folder, or replace `"."` with its path. It requires torchvision, and torchcodec for videos.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(".")
model = AutoModelForImageTextToText.from_pretrained(".", dtype="auto")
question = "What moves?\\n{open_format}"
content = [{{"type": "video", "path": "clip.mp4"}}, {{"type": "text", "text": question}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
ids = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=512)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Pass an image as `{{"type": "image", "path": "picture.png"}}`. The processor's frame rate and pixel budgets are the
defaults of the family.{video}

## Versions

- The oldest version of transformers that loads this folder is {oldest}. Weights, tokenizer, chat template and prompts
  with images behave the same in every later version.
{family_card}
- `config.json` contains the rope settings twice: as `rope_parameters`, and as `rope_theta` and `rope_scaling` for
  versions before 5. If you change them, change both.

## Prompts

The chat template is the template of the base model. The last line of a question specifies the format of the answer:

| task type | last line |
|---|---|
{formats}

The options of a multiple-choice question (`mcq`) come before this line, one per line: `A. text`.

## Sampling

`<|im_end|>` ends a response. Evaluations of rmsd_fast decode greedily (`do_sample=False`). Without that argument, the
settings in `generation_config.json` apply, which come from the base model.

## License

The license of the base model applies.
"""


_DISCRIMINATOR_CARD = """\
---
library_name: transformers
---

# Discriminator of the family `{family}`

It scores responses to questions about videos and images: the higher, the more they look like good answers of the
teacher. {made_by} {version} (R-MSD, arXiv 2603.11423). Only scores of responses to the same prompt can be compared.
{origin}
## Load it

transformers has no sequence-classification class for this family. The folder loads as the model of its family, and
`value_head.safetensors` has the value head. The score is the hidden state of the last token, times `weight`, plus
`bias`. The language-model head is not used, and may be reported as newly initialized.

Run this in the folder. It requires torchvision, and torchcodec for videos.

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(".")
model = AutoModelForImageTextToText.from_pretrained(".", dtype="auto").eval()
head = load_file("value_head.safetensors")


@torch.no_grad()
def score(prompt, response):
    ids = processor.tokenizer(response + "<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids
    added = {{"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}}
    inputs = {{k: torch.cat([v, added[k]], 1) if k in added else v for k, v in prompt.items()}}
    hidden = model.model(**inputs).last_hidden_state[0, -1]
    return float(hidden.float() @ head["weight"].float() + head["bias"].float())


question = "What moves?\\n{open_format}"
content = [{{"type": "video", "path": "clip.mp4"}}, {{"type": "text", "text": question}}]
prompt = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
print(score(prompt, "<think>It turns.</think><answer>a wheel</answer>"))
```

Leave out `<think>` at the start of a response if the prompt already ends with it. White space around a response is
removed in training.

## Versions

- The files have the form of exported students, which transformers {oldest} and later versions load.
{family_card}

## Prompts

Prompts are those of the student. The last line of a question specifies the format of the answer:

| task type | last line |
|---|---|
{formats}

## License

The license of the base model applies.
"""


def discriminator_card(family: Family, *, base_model: str = "") -> str:
    """Return the text of a discriminator's README.md; `base_model` as in `model_card`."""
    return _DISCRIMINATOR_CARD.format(
        family=family.model_type,
        family_card=family.card,
        oldest=OLDEST_TRANSFORMERS,
        made_by=f"It was {_MADE_BY}",
        version=__version__,
        origin=_origin_lines({"Base model": _name_of(base_model)}),
        open_format=ANSWER_FORMAT["open"],
        formats=_FORMATS,
    )


def model_card(family: Family, *, base_model: str = "", stage: str = "", video: VideoConfig | None = None) -> str:
    """Return the text of README.md. The same arguments give the same text.

    Args:
        family: family of the model.
        base_model: path or Hub name of the model that training began with; left out if empty. Only the last component
            of a path is shown.
        stage: stage of training; left out if empty.
        video: how training read its media; left out if None.
    """
    return _CARD.format(
        family=family.model_type,
        family_card=family.card,
        made_by=_MADE_BY,
        version=__version__,
        origin=_origin_lines({"Base model": _name_of(base_model), "Stage of training": stage}),
        video=_video_lines(video) if video else "",
        open_format=ANSWER_FORMAT["open"],
        formats=_FORMATS,
        oldest=OLDEST_TRANSFORMERS,
    )


def _name_of(base_model: str) -> str:
    return base_model if base_model.count("/") == 1 and not Path(base_model).is_dir() else Path(base_model).name


def _origin_lines(origin: dict[str, str]) -> str:
    lines = [f"- {name}: `{value}`" for name, value in origin.items() if value]
    return "\n".join(["", *lines, ""]) if lines else ""


def is_export(folder: Path) -> bool:
    """Return whether a folder holds a README.md written by `model_card`, as every export does."""
    path = folder / "README.md"
    return path.is_file() and _MADE_BY in path.read_text(encoding="utf-8", errors="replace")


def _video_lines(video: VideoConfig) -> str:
    frames = f"{video.num_frames} evenly spaced frames"
    if video.num_frames is None:
        frames = f"{video.fps:g} frames per second, at least {video.min_frames} and at most {video.max_frames}"
    return (
        f" In training, media were read as follows:\n\n- videos: {frames};\n"
        f"- {video.min_video_pixels:,} to {video.max_video_pixels:,} pixels per video (all frames together), at most "
        f"{video.max_frame_pixels:,} per frame;\n"
        f"- {video.min_image_pixels:,} to {video.max_image_pixels:,} pixels per image."
    )
