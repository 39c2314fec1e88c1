"""Count the parameters of a model by its config.json, without allocating weights."""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

import torch

from rmsd_fast.config import ModelConfig
from rmsd_fast.models.adapters import target_layers
from rmsd_fast.models.families import family_of
from rmsd_fast.models.pass_memory import complete_config
from rmsd_fast.models.quantize import quantizable_layers


class Parameters(NamedTuple):
    """Numbers of parameters.

    Of the whole model, its vision tower, an untied head, one adapter, the largest parameter, the largest of an adapter,
    the weights that `model.quantize` stores in 4 bits, and the largest of these.
    """

    total: int
    vision: int
    head: int
    adapter: int
    largest: int
    largest_of_adapter: int
    quantizable: int
    largest_quantizable: int


def count_parameters(config: dict[str, Any], model_config: ModelConfig) -> Parameters:
    """Count the parameters of a model by the contents of its config.json, without allocating weights.

    Raises:
        SettingsError: a target of the adapters is not a linear layer of the language model.
        ModelError: the family is not supported.
    """
    return _count_parameters(
        json.dumps(complete_config(config), sort_keys=True),
        model_config.adapter,
        model_config.lora_rank,
        tuple(model_config.lora_targets),
    )


@functools.lru_cache(maxsize=8)
def _count_parameters(config: str, adapter: str, rank: int, targets: tuple[str, ...]) -> Parameters:
    with torch.device("meta"):
        family = family_of(json.loads(config))
        model = family.model_class(family.config_class(**json.loads(config)))
    distinct = {id(p): p.numel() for p in model.parameters()}
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    layers = target_layers(model, list(targets)) if adapter == "lora" else []
    quantizable = [layer.weight.numel() for layer in quantizable_layers(model).values()]
    return Parameters(
        total=sum(distinct.values()),
        vision=sum(p.numel() for p in model.model.visual.parameters()),
        head=0 if head is embeddings else head.numel(),
        adapter=sum(rank * (layer.in_features + layer.out_features) for layer in layers),
        largest=max(distinct.values()),
        largest_of_adapter=max((rank * max(layer.in_features, layer.out_features) for layer in layers), default=0),
        quantizable=sum(quantizable),
        largest_quantizable=max(quantizable),
    )
