"""Messages between a training run and a rollout server: bytes in the format of safetensors, with a description in JSON.

Nothing is unpickled. A message that does not have exactly the expected form is refused with `MessageError`. The library
safetensors is not used, since it would copy every tensor once more on each side. Here, tensors are sent from where they
are, and received ones use the memory of the message.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rmsd_fast.config import SettingsError
from rmsd_fast.models.families import family_of
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.samples import Completion, Medium, Request

# Changed with every change of a message. Run and server must have the same.
PROTOCOL = 2
# Environment variable with the secret that run and server share.
TOKEN = "RMSD_ROLLOUT_TOKEN"
CONTENT_TYPE = "application/x-rmsd-fast"
# Weights are sent in buckets of so many bytes, or one weight if it is larger.
BUCKET_BYTES = 256 * 2**20
# Descriptions are small: names of weights, or the fields of a request.
MOST_HEADER_BYTES = 16 * 2**20
# Tensors of messages have at most so many dimensions: convolutions have five.
MOST_DIMENSIONS = 8
# Above what any run uses: a server must not try them.
MOST_RESPONSES, MOST_TEMPERATURE = 4096, 1e4
# Settings of a language model that do not change what it computes, or that exports may change.
_NOT_COMPARED = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "_attn_implementation"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "id2label", "label2id"),
    *("use_cache", "problem_type", "return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder"),
    *("chunk_size_feed_forward",),
}
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class MessageError(ValueError):
    """Bytes that are not a message of this protocol."""


def pack(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> list[memoryview]:
    """Return a message in parts, without copying tensors that are contiguous and in host memory.

    Args:
        description: JSON values by name.
        tensors: tensors by name.
    """
    # Larger elements first, so that each tensor begins at a multiple of the size of its elements.
    ordered = sorted((tensors or {}).items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"message": json.dumps(description)}}
    parts, end = [], 0
    for name, tensor in ordered:
        data = tensor.detach().cpu().contiguous()
        start, end = end, end + data.numel() * data.element_size()
        header[name] = {"dtype": _NAMES[data.dtype], "shape": list(data.shape), "data_offsets": [start, end]}
        parts.append(memoryview(data.reshape(-1).view(torch.uint8).numpy()))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


def unpack(body: bytes | bytearray) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the description of a message and its tensors, which use the memory of `body`.

    Raises:
        MessageError: the bytes are truncated, too many, or not such a message.
    """
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > min(len(body) - 8, MOST_HEADER_BYTES):
        raise MessageError(f"expected a header of at most {MOST_HEADER_BYTES} bytes in {len(body)} bytes")
    try:
        header = json.loads(bytes(body[8 : 8 + length]))
        description = json.loads(header.pop("__metadata__")["message"])
        fields = sorted(
            (tuple(map(_count, field["data_offsets"])), name, field["dtype"], list(map(_count, field["shape"])))
            for name, field in header.items()
        )
        dtypes = [_DTYPES[dtype] for _, _, dtype, _ in fields]
        if not isinstance(description, dict) or any(len(shape) > MOST_DIMENSIONS for *_, shape in fields):
            raise TypeError("a description that is not an object, or too many dimensions")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"expected a header in JSON, got a damaged one ({type(error).__name__})") from error
    tensors, first, done = {}, 8 + length, 0
    for (offsets, name, _, shape), dtype in zip(fields, dtypes, strict=True):
        count = math.prod(shape)
        if offsets != (done, done + count * dtype.itemsize) or (first + done) % dtype.itemsize:
            raise MessageError(f"tensor {name!r}: expected its bytes at {done}, got {list(offsets)}")
        done = offsets[1]
        if first + done > len(body):
            break
        try:
            # torch.frombuffer refuses to return no elements.
            flat = torch.frombuffer(body, dtype=dtype, count=count, offset=first + offsets[0]) if count else None
            tensors[name] = torch.empty(shape, dtype=dtype) if flat is None else flat.view(shape)
        except RuntimeError as error:
            raise MessageError(f"tensor {name!r}: expected a shape, got {shape}") from error
    if first + done != len(body):
        raise MessageError(f"expected {first + done} bytes, got {len(body)}")
    return description, tensors


def digest(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes in host memory, which depends on their order, unlike `bit_sum`."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _count(value: Any) -> int:
    return integer(value, "a size", 0, 2**48)


def pack_request(
    request: Request, sampling: Sampling, description: Mapping[str, Any], dtype: torch.dtype
) -> list[memoryview]:
    """Return the message of a request, with its vision features in `dtype`."""
    tensors = {name: getattr(request, name) for name in ("input_ids", "mm_token_type_ids", "position_ids")}
    for index, medium in enumerate(request.media):
        tensors[f"medium.{index}"] = medium.embeds(dtype)
    media = [
        {"kind": m.kind, "grid_thw": list(map(int, m.grid_thw)), "start": m.start, "end": m.end, "key": m.key}
        for m in request.media
    ]
    of_request = {"question_id": request.question_id, "seed": request.seed, "salt": request.salt, "media": media}
    of_sampling = {"n": sampling.n, "temperature": sampling.temperature, "max_new_tokens": sampling.max_new_tokens}
    return pack({**description, "request": of_request, "sampling": of_sampling}, tensors)


def unpack_request(
    description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, vocabulary: int, width: int, patches: int
) -> tuple[Request, Sampling]:
    """Return the request of a message, and its sampling parameters without seed and step.

    Args:
        description: description of the message.
        tensors: tensors of the message.
        vocabulary: number of ids.
        width: width of a token's vision features over all layers.
        patches: patches of a medium per vision token.
    Raises:
        MessageError: a field is missing or has another form, a value is out of range, or features do not fit.
    """
    try:
        fields, params = description["request"], description["sampling"]
        sampling = _sampling(params)
        ids, types, positions = (tensors[name] for name in ("input_ids", "mm_token_type_ids", "position_ids"))
        media = tuple(_medium(field, tensors[f"medium.{i}"]) for i, field in enumerate(fields["media"]))
        seed = integer(fields["seed"], "seed", 0, 2**63 - 1 - sampling.n)
        request = Request(_text(fields["question_id"]), ids, types, positions, media, seed, _text(fields["salt"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MessageError(f"request: expected all of its fields ({type(error).__name__}: {error})") from error
    name, size = f"question {request.question_id!r}", len(ids) if ids.dim() == 1 else 0
    if any(t.dtype != torch.int64 for t in (ids, types, positions)):
        raise MessageError(f"{name}: expected ids, types and positions in int64")
    if not size or types.shape != (size,) or positions.shape != (3, size):
        raise MessageError(f"{name}: expected ids [P], types [P] and positions [3, P]")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise MessageError(f"{name}: expected ids from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}")
    for medium in media:
        (features,) = medium.layers
        tokens = int((types[medium.start : medium.end] != 0).sum()) if 0 <= medium.start < medium.end <= size else 0
        is_whole = features.is_floating_point() and features.shape == (tokens, width)
        if not tokens or not is_whole or medium.kind not in ("video", "image"):
            raise MessageError(
                f"{name}: expected features [{tokens}, {width}] of a video or an image at its place, got a "
                f"{medium.kind!r:.20} with {list(features.shape)}"
            )
        if math.prod(medium.grid_thw) != tokens * patches:
            raise MessageError(f"{name}: expected {tokens * patches} patches, got a grid of {list(medium.grid_thw)}")
    return request, sampling


def _sampling(params: Mapping[str, Any]) -> Sampling:
    temperature = params["temperature"]
    if type(temperature) not in (int, float) or not 0 <= temperature < MOST_TEMPERATURE:
        raise ValueError(f"temperature: expected 0 to {MOST_TEMPERATURE:g}, got {temperature!r:.40}")
    n = integer(params["n"], "n", 1, MOST_RESPONSES)
    return Sampling(n, float(temperature), integer(params["max_new_tokens"], "max_new_tokens", 1, 2**31))


def _medium(field: Mapping[str, Any], features: torch.Tensor) -> Medium:
    time, height, width = (integer(count, "grid_thw", 1, 2**20) for count in field["grid_thw"])
    start, end = (integer(field[name], name, 0, 2**31) for name in ("start", "end"))
    return Medium(_text(field["kind"]), (time, height, width), start, end, (features,), _text(field["key"]))


def integer(value: Any, name: str, least: int, most: int) -> int:
    """Return a whole number of a description.

    Raises:
        MessageError: it is another value, or out of range.
    """
    if type(value) is not int or not least <= value <= most:
        raise MessageError(f"{name}: expected a whole number from {least} to {most}, got {value!r:.40}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"expected a text, got {value!r:.40}")
    return value


def unpack_update(description: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return the version of an update and the names of its weights.

    Raises:
        MessageError: a field is missing or has another form.
    """
    try:
        version, names = description["version"], description["names"]
        if type(names) is not list:
            raise TypeError(f"names: expected a list, got {names!r:.40}")
        return integer(version, "version", 1, 2**31), list(map(_text, names))
    except (KeyError, TypeError) as error:
        raise MessageError(f"update: expected all of its fields ({type(error).__name__}: {error})") from error


def pack_completions(completions: Sequence[Completion]) -> list[memoryview]:
    """Return the message of a request's completions."""
    tensors = {
        "tokens": torch.tensor([len(completion.token_ids) for completion in completions]),
        "banned_mass": torch.tensor([completion.banned_mass for completion in completions], dtype=torch.float64),
        "token_ids": torch.cat([completion.token_ids for completion in completions]),
        "logp": torch.cat([completion.logp for completion in completions]),
    }
    return pack({}, tensors)


def unpack_completions(body: bytes | bytearray, n: int, vocabulary: int) -> list[Completion]:
    """Return the `n` completions of a message.

    Raises:
        MessageError: the message is damaged, a completion is missing or empty, or has an id outside of `vocabulary`.
    """
    _, columns = unpack(body)
    expected = {"tokens": torch.int64, "banned_mass": torch.float64, "token_ids": torch.int64, "logp": torch.float32}
    if {name: column.dtype for name, column in columns.items() if column.dim() == 1} != expected:
        raise MessageError(f"expected the columns {', '.join(expected)}, got {', '.join(columns)}")
    lengths = columns["tokens"].tolist()
    token_ids, logp = columns["token_ids"], columns["logp"]
    if len(lengths) != n or len(columns["banned_mass"]) != n or min(lengths) < 1:
        raise MessageError(f"expected {n} rollouts of at least one token, got lengths {lengths}")
    if not sum(lengths) == len(token_ids) == len(logp):
        raise MessageError(f"expected {sum(lengths)} tokens with log-probs, got {len(token_ids)} and {len(logp)}")
    if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocabulary:
        raise MessageError(
            f"expected ids from 0 to {vocabulary - 1}, got {int(token_ids.min())} to {int(token_ids.max())}"
        )
    masses = columns["banned_mass"].tolist()
    return [Completion(*values) for values in zip(token_ids.split(lengths), logp.split(lengths), masses, strict=True)]


def model_facts(config: Any, *, eos_id: int, banned_ids: torch.Tensor, dtype: str) -> dict[str, Any]:
    """Return what run and server must agree on, as JSON values.

    Args:
        config: configuration of the model.
        eos_id: id that ends a response.
        banned_ids: ids that must not be sampled.
        dtype: `model.dtype`.
    """
    text = {name: value for name, value in config.text_config.to_dict().items() if name not in _NOT_COMPARED}
    # Before version 5, transformers has two settings for the rotary embedding, and later one. `type` is an older name.
    rope = {"rope_theta": text.pop("rope_theta", None), **(text.pop("rope_scaling", None) or {})}
    rope |= text.pop("rope_parameters", None) or {}
    rope.pop("type", None)
    digest = hashlib.blake2b(json.dumps(banned_ids.tolist()).encode(), digest_size=8).hexdigest()
    return json.loads(
        json.dumps(
            {
                "protocol": PROTOCOL,
                "model.dtype": dtype,
                "end token": eos_id,
                "ids that are not sampled": f"{len(banned_ids)} ({digest})",
                "features per vision token": feature_width(config),
                "patches per vision token": config.vision_config.spatial_merge_size**2,
                "rotary embedding": dict(sorted(rope.items())),
                **{f"text_config.{name}": value for name, value in sorted(text.items())},
            }
        )
    )


def feature_width(config: Any) -> int:
    """Return the width of a vision token's features over all layers."""
    return (1 + family_of(config).deepstack_layers(config)) * config.text_config.hidden_size


def check_facts(url: str, run: Mapping[str, Any], server: Mapping[str, Any]) -> None:
    """Raise SettingsError if a server does not fit the run.

    Settings of the language model that only one of the two knows are not compared, because versions of transformers
    differ in them.

    Args:
        url: URL of the server.
        run: `model_facts` of the run, and `max_tokens`, the most tokens of a prompt and its response.
        server: the same of the server.
    """
    other_model = "it serves another model: start both with the same model.path"
    advice = {
        "protocol": "install the same version of rmsd_fast for both",
        "model.dtype": "start both with the same model.dtype",
        "ids that are not sampled": "their tokenizers differ: start both with the same model.path",
    }
    for name in sorted(run, key=lambda name: (name != "protocol", name.startswith("text_config"), name)):
        if name == "max_tokens" or (name.startswith("text_config.") and name not in server):
            continue
        if run[name] != server.get(name):
            raise SettingsError(
                f"rollout server {url}: {name}: expected {run[name]!r:.200} as in the run, got "
                f"{server.get(name)!r:.200}; {advice.get(name, other_model)}"
            )
    if run["max_tokens"] > server.get("max_tokens", 0):
        raise SettingsError(
            f"rollout server {url}: expected room for {run['max_tokens']} tokens, data.max_prompt_tokens and "
            f"rollout.max_new_tokens of the run together, got {server.get('max_tokens')}; start the server with the "
            "settings of the run"
        )


def most_bytes(config: Any, *, dtype: torch.dtype, max_tokens: int) -> int:
    """Return the size of the largest message of a run: a bucket with the largest weight, or a prompt with features."""
    text = config.text_config
    weight = text.hidden_size * max(text.vocab_size, text.intermediate_size) * dtype.itemsize
    # Ids, types and positions take five numbers of 8 bytes.
    prompt = max_tokens * (feature_width(config) * dtype.itemsize + 5 * 8)
    return max(weight, BUCKET_BYTES, prompt) + MOST_HEADER_BYTES
