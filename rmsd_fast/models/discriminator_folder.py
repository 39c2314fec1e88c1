"""Write and read discriminators: the files of a student without its language-model head, and a value head.

transformers has no sequence-classification class for the supported families. The folder therefore loads as the model of
its family, and `value_head.safetensors` has `weight` [D] and `bias` [1]. The score of a response is the hidden state of
its last token, after the final norm, times the weight, plus the bias. The folder's README has a loader for plain
transformers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from rmsd_fast.config import ModelError, first_line
from rmsd_fast.files import os_errors_of_safetensors, read_tensors, staged_folder
from rmsd_fast.models.adapters import adapted_layers, merged_weights
from rmsd_fast.models.discriminator import Discriminator
from rmsd_fast.models.export import check_replaceable, share_weights, write_model
from rmsd_fast.models.folders import VALUE_HEAD, resolve_folder
from rmsd_fast.models.model_card import discriminator_card
from rmsd_fast.models.quantize import quantized_layers
from rmsd_fast.models.students import LM_HEAD, Student, load_student


def export_discriminator(
    discriminator: Discriminator, student: Student, folder: str | Path, *, base_model: str = ""
) -> None:
    """Write a folder that `load_discriminator` and plain transformers load.

    The discriminator's adapter is merged into the weights. With only a trained head (`discriminator.mode=head`), the
    weights are those of the backbone. The folder is created atomically, and replaces an earlier export.

    Args:
        discriminator: the discriminator, with all weights on this process.
        student: a student with the tokenizer and preprocessor of the discriminator's prompts.
        folder: folder to write to.
        base_model: path or Hub name of the model that training began with; for the README.
    Raises:
        ModelError: the folder holds files that are not an export, or the backbone is quantized.
    """
    folder = Path(folder)
    model = discriminator.model
    if quantized_layers(model):
        raise ModelError(
            f"{folder}: expected a discriminator without quantized weights, got model.quantize=nf4, whose merged "
            "weights would be rounded again and score differently; set model.quantize=none"
        )
    check_replaceable(folder)
    weights = merged_weights(model, discriminator.adapter) if adapted_layers(model) else model.state_dict()
    # A head that is tied to the embeddings is written as part of them.
    weights.pop(LM_HEAD, None)
    value_head = {"weight": discriminator.value_weight, "bias": discriminator.value_bias}
    with staged_folder(folder, replace=True) as staged:
        write_model(Student(model, student.tokenizer, student.preprocessor), staged, weights)
        with os_errors_of_safetensors(staged):
            tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in value_head.items()}
            save_file(tensors, staged / VALUE_HEAD, metadata={"format": "pt"})
        share_weights(staged)
        (staged / "README.md").write_text(discriminator_card(student.family, base_model=base_model), encoding="utf-8")


def load_discriminator(
    path: str | Path, *, dtype: str, attn_implementation: str = "sdpa", liger: bool = False
) -> tuple[Discriminator, Student]:
    """Return the discriminator of a folder, frozen and in eval mode, and the student around its backbone.

    Arguments as `load_student`.

    Raises:
        ModelError: the folder does not hold a discriminator, or its files are damaged.
        NotInstalled: as `load_student`.
    """
    student = load_student(path, dtype=dtype, attn_implementation=attn_implementation, liger=liger, discriminator=True)
    file = resolve_folder(path) / VALUE_HEAD
    try:
        tensors = read_tensors(file)
    # The exception type of safetensors is derived from Exception directly.
    except Exception as error:
        raise ModelError(f"{file}: damaged ({first_line(error)}); export the discriminator again") from error
    expected = {"weight": [student.model.config.text_config.hidden_size], "bias": [1]}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ModelError(
            f"{file}: expected finite tensors {expected}, got {shapes if shapes != expected else 'other values'}; "
            "export the discriminator again"
        )
    discriminator = Discriminator(student.model, seed=0, adapter=None)
    with torch.no_grad():
        discriminator.value_weight.copy_(tensors["weight"])
        discriminator.value_bias.copy_(tensors["bias"])
    return discriminator.eval().requires_grad_(False), student
