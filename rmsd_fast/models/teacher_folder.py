"""Compare a teacher of its own with the student: whether it can score the student's tokens, and has the same tower."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from rmsd_fast.config import ModelError, RunConfig, SettingsError
from rmsd_fast.models.families import family_of
from rmsd_fast.models.folders import ModelFolder
from rmsd_fast.setting_rules.uses import compared_tokens, distills_vocabulary


def check_teacher(teacher: ModelFolder, student: ModelFolder, settings: RunConfig) -> None:
    """Check that a teacher reads the token ids, positions and pixels of the student's prompts as the student does.

    The sizes of the models may differ. So may the rows of their heads beyond the tokenizer's vocabulary, if stage 2
    compares only log-probs of sampled tokens.

    Raises:
        ModelError: family, vocabulary, special tokens, positions or preprocessing differ.
        SettingsError: stage 2 compares more tokens than the sampled ones, and the heads have different numbers of rows.
    """
    pairs = {
        "the family": (family_of(teacher.config).title, family_of(student.config).title),
        "the vocabulary": _first_difference(teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()),
        "the special tokens": _first_difference(_special_tokens(teacher.tokenizer), _special_tokens(student.tokenizer)),
        "the ids of media": (_media_ids(teacher.config), _media_ids(student.config)),
        "tokens_per_second": tuple(
            getattr(folder.config.vision_config, "tokens_per_second", None) for folder in (teacher, student)
        ),
        "the preprocessing": (teacher.preprocessor, student.preprocessor),
    }
    for what, (got, expected) in pairs.items():
        if got != expected:
            raise ModelError(
                f"self_teacher.path {teacher.path}: {what}: expected {expected} as in {student.path}, got {got}; the "
                "teacher scores the student's tokens, so use a model of the same release, or another self_teacher.kind"
            )
    _check_heads(teacher.config.text_config.vocab_size, student.config.text_config.vocab_size, settings)


def _check_heads(got: int, expected: int, settings: RunConfig) -> None:
    """Raise SettingsError if the heads of teacher and student have different rows, and the settings compare them."""
    top, overlap = compared_tokens(settings)
    credit = settings.credit
    if distills_vocabulary(settings):
        name, instead = f"kd.kind={settings.kd.kind}", "kd.kind=k1"
    elif overlap:
        name, instead = f"credit.prune={credit.prune}", "credit.prune=none"
    elif top:
        name, instead = f"credit.magnitude_topk={credit.magnitude_topk}", "credit.magnitude_topk=0"
    else:
        return
    if got != expected:
        raise SettingsError(
            f"{name}: expected a model in self_teacher.path whose head has {expected:,} rows, like the student's, got "
            f"{got:,}; set {instead}, or choose another model"
        )


def equal_towers(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    """Return whether the vision towers of two models have the same settings and weights, and so the same features."""
    if first.config.vision_config.to_dict() != second.config.vision_config.to_dict():
        return False
    ours, theirs = first.model.visual.state_dict(), second.model.visual.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _media_ids(config: Any) -> tuple[int, ...]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return tuple(getattr(config, name) for name in names)


def _first_difference(got: dict[str, int], expected: dict[str, int]) -> tuple[str, str]:
    """Return the first token whose id differs, as texts for a message; two empty texts if there is none."""
    if got == expected:
        return "", ""
    token = min((*(got.items() ^ expected.items()),), key=lambda item: (item[1], item[0]))[0]

    def text(vocabulary: dict[str, int]) -> str:
        number = f"{len(vocabulary)} tokens, "
        return number + (f"{token!r} with id {vocabulary[token]}" if token in vocabulary else f"without {token!r}")

    return text(got), text(expected)
