"""Define the settings of a collection: those of a run, and the section `collect`.

A recipe of a run is therefore a recipe of a collection. The section `collect` is not part of RunConfig, so that the
settings that a run records do not depend on how its pool was collected.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from rmsd_fast.config import RECIPES, REQUEST_FIELDS, RunConfig, SettingsError, choice, number
from rmsd_fast.settings import POOL_SETTINGS, load_settings
from rmsd_fast.teacher.usage import Prices

log = logging.getLogger("rmsd_fast")
TEACHERS = Path(__file__).parent.parent / "teachers"
# Sections that a collection reads; from these sections, only some settings.
SECTIONS = ("collect", "video", "data", "teacher")
_READING = {
    section: tuple(key.removeprefix(f"{section}.") for key in POOL_SETTINGS if key.startswith(f"{section}."))
    for section in ("data", "teacher")
}
_MEDIA = ("max_file_mib", "check_frames", "decode_threads", "decode_timeout_s", "cache_mib", "disk_cache")
READ = {"data": (*_READING["data"], *_MEDIA, "disk_cache_gib"), "teacher": _READING["teacher"]}
# Fields of a request that settings of their own determine.
RESERVED = (*REQUEST_FIELDS, "seed", "top_p")
DEFAULT_KEY = "OPENAI_API_KEY"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class CollectConfig:
    """Requests to the teacher."""

    endpoint: list[str] = field(default_factory=list)
    """Base URLs of servers with OpenAI's chat completions, such as http://localhost:8000/v1. Several URLs with one
    model share the questions; with several models, there is one URL for each model, or one for all."""
    model: list[str] = field(default_factory=list)
    """Names of the models. With several models, answer k comes from model k modulo their number."""
    api_key_env: list[str] = field(default_factory=lambda: [DEFAULT_KEY])
    """Environment variables with the API keys: one for all endpoints on the same host, or one for each endpoint; [] =
    no key. The default, OPENAI_API_KEY, is optional and sent only with https."""
    k: int = number(4, least=1, most=100_000)
    """K, answers per question (2603.11423: K=4)."""
    adaptive: bool = False
    """Draw `k0` answers to each question, and further ones, up to K, only while the best answer is not settled: none
    has quality 1, or the valid answers to a closed question differ (open). Answers after the first `k0` are marked and
    are not part of the statistics."""
    k0: int = number(2, least=1)
    """Number of answers that `adaptive` draws at a time."""
    hint_empty: bool = False
    """If no answer to a question has a quality above 0, ask once more, with the ground truth as a hint (open). This
    answer is marked, and is not part of the statistics. Training uses it with `teacher.hinted=true`."""
    temperature: float | None = number(1.0, least=0)
    """Sampling temperature (open); null = the server's default, for models that accept no other value."""
    top_p: float | None = number(None, above=0, most=1)
    """Nucleus sampling; null = the server's default."""
    seed: int | None = number(0, least=0, most=2**31 - 1)
    """Seed from which the seed of each request is derived, with the question's id and its first k; null = none is
    sent."""
    max_tokens: int = number(2048, least=1)
    """Maximum length of an answer in tokens, with its reasoning."""
    token_limit: str = choice("max_tokens", of=("max_tokens", "max_completion_tokens"))
    """Name under which `max_tokens` is sent; OpenAI's reasoning models accept only `max_completion_tokens`."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as {top_k: 20} or {reasoning_effort: low}."""
    several: str = choice("auto", of=("auto", "never"))
    """`auto` = all answers that a question lacks are requested with one `n`, and singly from servers that do not
    support it; `never` = each answer has a request of its own."""
    video_as: str = choice("frames", of=("frames", "base64", "file"))
    """`frames` = the frames that the student sees (`video.*`) as JPEG pictures with their times; `base64` = the whole
    file as `data:video/mp4;base64`; `file` = its URL, for servers that read the same disk."""
    jpeg_quality: int = number(90, least=1, most=100)
    """JPEG quality of frames and images."""
    max_concurrency: int = number(64, least=1, most=4096)
    """Maximum number of requests in flight at each endpoint. The number is adapted: it grows with each success and is
    halved when the server is overloaded."""
    start_concurrency: int = number(8, least=1)
    """Number of requests in flight at the start."""
    timeout_s: float = number(600.0, above=0, most=86400)
    """Time-out of a request in seconds."""
    attempts: int = number(8, least=1)
    """Attempts of a request that fails at the server or on the way. Refusals because of rate limits do not count."""
    outage_s: float = number(900.0, above=0, most=604800)
    """Stop after this time in seconds in which requests were sent and none was answered."""
    input_price: float | None = number(None, least=0)
    """Price of a million prompt tokens, in any currency; null = unknown. The pool report reads both prices too."""
    output_price: float | None = number(None, least=0)
    """Price of a million completion tokens, reasoning included."""
    max_cost: float | None = number(None, above=0)
    """Stop before the pool has cost more than this, according to the server's token counts and the prices."""
    max_total_tokens: int | None = number(None, least=1)
    """Stop before the pool has used more prompt and completion tokens than this."""
    changed: str = choice("refuse", of=("refuse", "keep", "replace"))
    """Answers in the pool to other requests, with another model, sampling or frames: `refuse` = stop with an error,
    `keep` = they count as answers, `replace` = they are moved to a file next to the pool and collected again. Answers
    to questions that were edited are always replaced."""
    check_media: bool = False
    """Also replace answers about media files whose contents have changed, which reads all media at the start."""
    retry_failed: bool = False
    """Also send requests again that the server has rejected, which are listed next to the pool."""


@dataclass
class CollectionConfig(RunConfig):
    """One collection. The sections that are read are SECTIONS."""

    collect: CollectConfig = field(default_factory=CollectConfig)


@dataclass(frozen=True)
class Teacher:
    """A model at one or more endpoints; it gives the answers k with k modulo the number of teachers = its index."""

    model: str
    endpoints: tuple[str, ...]
    keys: tuple[str, ...]
    """API key of each endpoint; "" = none."""
    section: str = "collect"
    """Section of the settings, for messages."""


def load_collection(recipe: str, overrides: Iterable[str]) -> CollectionConfig:
    """Read and check the settings of a collection.

    Args:
        recipe: path or name of a recipe of a run or of a teacher; "" = all defaults.
        overrides: `section.field=value` strings.
    Raises:
        SettingsError: as load_settings, or an override sets a setting that a collection does not read.
    """
    overrides = list(overrides)
    settings = load_settings(recipe, overrides, schema=CollectionConfig, folders=(TEACHERS, RECIPES))
    for key in (override.partition("=")[0] for override in overrides):
        section, _, name = key.partition(".")
        if section not in SECTIONS or name.partition(".")[0] not in READ.get(section, (name.partition(".")[0],)):
            read = ", ".join(f"{part}.{{{','.join(READ[part])}}}" if part in READ else f"{part}.*" for part in SECTIONS)
            raise SettingsError(f"override: {key} has no effect: a collection reads {read}; leave {key} out")
    _check(settings)
    return settings


def _check(settings: CollectionConfig) -> None:
    collect = settings.collect
    for endpoint in collect.endpoint:
        check_url(endpoint)
    if len(collect.model) > 1 and len(collect.endpoint) not in (0, 1, len(collect.model)):
        raise SettingsError(
            f"collect.endpoint: expected one URL, or one for each of the {len(collect.model)} models, got "
            f"{len(collect.endpoint)}; list them in the order of collect.model"
        )
    for name in ("endpoint", "model"):
        values = getattr(collect, name)
        if len(set(values)) < len(values) and (name == "model" or len(collect.model) <= 1):
            raise SettingsError(f"collect.{name}: expected different values, got {values}; remove the repeated ones")
    for budget, price in (("max_cost", "input_price"), ("max_cost", "output_price")):
        if getattr(collect, budget) is not None and getattr(collect, price) is None:
            raise SettingsError(f"collect.{budget}: expected prices, got no collect.{price}; set it")
    if collect.adaptive and collect.k0 >= collect.k:
        raise SettingsError(
            f"collect.k0: expected less than collect.k={collect.k} with collect.adaptive, got {collect.k0}; lower it"
        )
    for name in RESERVED:
        if name in collect.extra_body:
            what = "a setting of its own" if name in CollectConfig.__dataclass_fields__ else "set by the collection"
            raise SettingsError(f"collect.extra_body: expected other fields, got {name!r}, which is {what}; remove it")


def check_url(endpoint: str, section: str = "collect") -> None:
    """Reject anything that is not a plain base URL. Credentials in a URL would be written to messages."""
    try:
        url = urlsplit(endpoint)
        usable = url.scheme in ("http", "https") and url.hostname and (url.port is None or url.port > 0)
    except ValueError:
        usable = False
    if usable and (url.username is not None or url.password is not None or url.query or url.fragment):
        raise SettingsError(
            f"{section}.endpoint: expected a URL without user, password and query, got one for {url.hostname}; put "
            f"the key into the environment variable that {section}.api_key_env names"
        )
    if not usable:
        raise SettingsError(
            f"{section}.endpoint: expected a URL such as http://localhost:8000/v1, got {endpoint!r}; write the base "
            "URL of the server"
        )


def teachers(collect: CollectConfig, section: str = "collect") -> list[Teacher]:
    """Return the teachers with their endpoints and keys.

    Args:
        collect: settings of the requests.
        section: section of the settings, for messages.
    Raises:
        SettingsError: an endpoint or a model is missing, or a key is missing or malformed. No message contains a key.
    """
    for name in ("endpoint", "model"):
        if not getattr(collect, name):
            raise SettingsError(f"collect.{name}: expected a value, got nothing; set --{name}")
    endpoints = [endpoint.rstrip("/").removesuffix("/chat/completions") for endpoint in collect.endpoint]
    keys = _keys(collect, endpoints, section)
    if len(collect.model) == 1:
        return [Teacher(collect.model[0], tuple(endpoints), tuple(keys), section)]
    if len(endpoints) == 1:
        endpoints, keys = endpoints * len(collect.model), keys * len(collect.model)
    return [Teacher(*row, section) for row in zip(collect.model, zip(endpoints), zip(keys), strict=True)]


def _keys(collect: CollectConfig, endpoints: list[str], section: str) -> list[str]:
    names = collect.api_key_env
    hosts = {urlsplit(endpoint).hostname for endpoint in endpoints}
    if len(names) != len(endpoints):
        is_away = len(hosts) > 1 and not hosts <= set(_LOOPBACK)
        if len(names) > 1 or (is_away and names and os.environ.get(names[0])):
            raise SettingsError(
                f"collect.api_key_env: expected one variable for each of the {len(endpoints)} endpoints, got "
                f"{len(names)}; list them in the order of collect.endpoint, '' for none, so that no server gets the "
                "key of another one"
            )
        names = (names or [""]) * len(endpoints)
    keys = []
    for name, endpoint in zip(names, endpoints, strict=True):
        key = os.environ.get(name, "").strip() if name else ""
        if name and not key and name != DEFAULT_KEY:
            raise SettingsError(f"{section}.api_key_env: expected a key in the variable {name}, got nothing; set it")
        if not (key.isascii() and (not key or key.isprintable())):
            raise SettingsError(
                f"{section}.api_key_env: expected printable ASCII in {name}, got other characters; fix it"
            )
        # The variable is often set for another service, and http is not encrypted.
        if key and name == DEFAULT_KEY and urlsplit(endpoint).scheme == "http":
            log.warning(
                "%s.endpoint %s: %s is sent only with https; to send a key to this server, name another variable in "
                "%s.api_key_env",
                section,
                endpoint,
                DEFAULT_KEY,
                section,
            )
            key = ""
        keys.append(key)
    return keys


def print_config(settings: CollectionConfig) -> str:
    """Return the settings that a collection reads, as YAML."""
    values = OmegaConf.to_container(OmegaConf.structured(settings))
    return OmegaConf.to_yaml(
        {
            section: {name: value for name, value in values[section].items() if name in READ.get(section, (name,))}
            for section in SECTIONS
        }
    )


def cost_of(collect: CollectConfig, prompt_tokens: float, completion_tokens: float) -> float:
    """Return the cost of these tokens, or NaN if a price is unknown."""
    if collect.input_price is None or collect.output_price is None:
        return math.nan
    return Prices(collect.input_price, collect.output_price).cost(prompt_tokens, completion_tokens)
