"""Rollout servers of a run: what a server and a run must agree on, the start of a server, and the connection to it."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch

from rmsd_fast.config import RunConfig, SettingsError, first_line
from rmsd_fast.data.chat_template import END_TOKEN
from rmsd_fast.data.prompts import banned_ids
from rmsd_fast.models.families import family_of
from rmsd_fast.models.folders import open_folder, resolve_folder
from rmsd_fast.models.students import DTYPES
from rmsd_fast.rollout.protocol import model_facts, most_bytes
from rmsd_fast.rollout.server import RolloutServer, check_host
from rmsd_fast.rollout.server_client import ServerSampler, describe_server, server_token, wait_until_free
from rmsd_fast.rollout.service import EngineLoop, Service
from rmsd_fast.rollout.vllm import VllmSampler, check_family, check_length
from rmsd_fast.rollout.vllm_process import check_vllm
from rmsd_fast.runtime.process_group import World
from rmsd_fast.setting_rules.uses import uses_servers
from rmsd_fast.stages.material import model_path_of

log = logging.getLogger("rmsd_fast")


def facts_of(folder: Path, settings: RunConfig) -> dict[str, Any]:
    """Return what run and server must agree on; see `protocol.check_facts`."""
    model = open_folder(folder)
    facts = model_facts(
        model.config,
        eos_id=model.tokenizer.convert_tokens_to_ids(END_TOKEN),
        banned_ids=banned_ids(model.tokenizer, model.config.text_config.vocab_size),
        dtype=settings.model.dtype,
    )
    return {**facts, "max_tokens": settings.data.max_prompt_tokens + settings.rollout.max_new_tokens}


def describe_servers(settings: RunConfig, folder: Path) -> list[str]:
    """Return a line about each server of a run.

    Raises:
        SettingsError: a server cannot be reached, or does not fit the run.
    """
    facts = facts_of(folder, settings)
    return [describe_server(url, facts, server_token()) for url in settings.rollout.server_urls]


def check_servers(settings: RunConfig, model_path: str) -> list[str]:
    """Return a line about each server, before a run begins with hours of other work.

    Raises:
        SettingsError: a server cannot be reached, does not fit the run, or serves another run.
    """
    if not uses_servers(settings):
        return []
    lines = describe_servers(settings, resolve_folder(model_path))
    for url in settings.rollout.server_urls:
        if owner := wait_until_free(url, server_token()):
            raise SettingsError(
                f"rollout server {url}: expected a server without a run, got one that serves {owner}; wait for that "
                "run to end, or start another server on another port"
            )
    return lines


def connect(model_path: str, settings: RunConfig, world: World) -> ServerSampler:
    """Connect a run to its servers. All processes call it together.

    Args:
        model_path: folder of the model that the stage starts from.
        settings: settings of the run.
        world: this process in the run.
    """
    rollout = settings.rollout
    return ServerSampler(
        [url.rstrip("/") for url in rollout.server_urls],
        facts_of(resolve_folder(model_path), settings),
        dtype=DTYPES[settings.model.dtype],
        world=world,
        owner=f"run {settings.name!r} (process {os.getpid()} on {socket.gethostname()})",
        at_once=rollout.prompts_per_batch,
        token=server_token(),
    )


def start_server(
    settings: RunConfig, world: World, host: str, port: int, sequences: int
) -> tuple[RolloutServer, EngineLoop]:
    """Start vLLM in this process, and return a server and its loop, which must run in this thread.

    Args:
        settings: settings of the run that it will serve.
        world: this process, which is alone.
        host, port: address to listen on.
        sequences: responses that are decoded together; 0 = those of one process of the run.
    Raises:
        SettingsError: the address, the cache or the length of prompts cannot be used.
        ModelError: the model cannot be used with vLLM.
        NotInstalled: vLLM is missing or was not tested.
    """
    if world.size > 1:
        raise SettingsError(
            f"rmsd_fast.serve_rollouts: expected one process, got {world.size}; start one server per GPU, each on "
            "another port and with its own CUDA_VISIBLE_DEVICES, and list all in rollout.server_urls"
        )
    # These are reported before minutes of loading.
    check_host(host, server_token())
    version = check_vllm(settings.rollout.engine)
    folder = resolve_folder(model_path_of(settings))
    model, facts = open_folder(folder), facts_of(folder, settings)
    rollout, dtype, max_tokens = settings.rollout, settings.model.dtype, facts["max_tokens"]
    check_family(family_of(model.config).title, str(folder), rollout.engine)
    check_length(model.config.text_config, dtype=dtype, max_tokens=max_tokens, kv_cache_gib=rollout.vllm_kv_cache_gib)
    limit = most_bytes(model.config, dtype=DTYPES[dtype], max_tokens=max_tokens)
    server = RolloutServer(host, port, token=server_token(), most_bytes=limit)
    server.start()
    log.info("starting vLLM with %s", folder)
    try:
        engine = VllmSampler(
            folder,
            model.config,
            banned_ids=banned_ids(model.tokenizer, model.config.text_config.vocab_size),
            eos_id=facts["end token"],
            dtype=dtype,
            max_tokens=max_tokens,
            sequences=sequences or rollout.prompts_per_batch * rollout.n,
            kv_cache_gib=rollout.vllm_kv_cache_gib,
            device=world.device,
        )
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            f"rollout.vllm_kv_cache_gib: expected room for the weights and a cache of {rollout.vllm_kv_cache_gib:g} "
            f"GiB, got too little memory ({first_line(error)}); lower it, or stop other programs on this GPU"
        ) from error
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    loop = EngineLoop(engine)
    server.service = Service(loop, facts, {"vLLM": version, "on": device})
    return server, loop
