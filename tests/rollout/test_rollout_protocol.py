"""Test messages between runs and rollout servers: equal after a round trip, and refused if damaged."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from rmsd_fast.config import SettingsError
from rmsd_fast.rollout import protocol
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.protocol import (
    MessageError,
    check_facts,
    pack,
    pack_completions,
    pack_request,
    unpack,
    unpack_completions,
    unpack_request,
)
from rmsd_fast.rollout.samples import Completion, Medium, Request
from rmsd_fast.rollout.server import check_host

SAMPLING = Sampling(n=2, temperature=0.8, max_new_tokens=7)


def joined(parts) -> bytearray:
    return bytearray(b"".join(parts))


def message(header: dict, data: bytes = b"") -> bytearray:
    text = json.dumps({"__metadata__": {"message": "{}"}, **header}).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def field(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def test_tensors_survive_with_all_of_their_bits():
    bits = torch.randint(-(2**15), 2**15, (3, 5), dtype=torch.int16)
    tensors = {
        "bf16": bits.view(torch.bfloat16),
        "odd": torch.tensor([1.5], dtype=torch.bfloat16),
        "transposed": torch.randn(4, 3).t(),
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
        "ids": torch.arange(5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
    }
    description, received = unpack(joined(pack({"names": ["ä", "b"], "version": 3}, tensors)))
    assert description == {"names": ["ä", "b"], "version": 3} and received.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert received[name].dtype == tensor.dtype and received[name].shape == tensor.shape
        same = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, received[name])]
        assert torch.equal(*same), name


def test_messages_are_safetensors():
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(7)}
    loaded = safetensors.load(bytes(joined(pack({"x": 1}, tensors))))
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert unpack(bytearray(safetensors.save(tensors, {"message": '{"x": 1}'})))[0] == {"x": 1}


def test_every_truncated_message_is_refused():
    whole = joined(pack({"x": 1}, {"a": torch.arange(3), "b": torch.randn(2)}))
    for size in range(len(whole)):
        with pytest.raises(MessageError):
            unpack(whole[:size])
    with pytest.raises(MessageError, match=f"expected {len(whole)} bytes, got {len(whole) + 1}"):
        unpack(whole + b"\0")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff" * 8 + b"{}",
        (3).to_bytes(8, "little") + b"nul",
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"null",
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
        message({"__metadata__": {"message": "[]"}}),
        message({"__metadata__": {}}),
        message({"a": 3}),
        message(field(dtype="F128"), b"\0" * 8),
        message(field(dtype=["F32"]), b"\0" * 8),
        message(field(shape=(-2,)), b"\0" * 8),
        message(field(shape=(2.0,)), b"\0" * 8),
        message(field(shape=(True, 2)), b"\0" * 8),
        message(field(shape=(2**50,)), b"\0" * 8),
        message(field(shape=(3,)), b"\0" * 8),
        message(field(shape=[1] * 9, offsets=(0, 4)), b"\0" * 4),
        message(field(shape=(2**47, 2**47, 0), offsets=(0, 0))),
        # Multiplied, they are a number with a megabyte.
        message(field(shape=[2**47] * 200_000)),
        message(field(offsets=(4, 12)), b"\0" * 12),
        message(field(offsets=(0, 8, 8)), b"\0" * 8),
        message(field(offsets=(8, 0)), b"\0" * 8),
        message({**field(), "b": field()["a"]}, b"\0" * 8),
    ],
)
def test_damaged_messages_are_refused(body):
    with pytest.raises(MessageError):
        unpack(bytearray(body))


def test_headers_have_a_limit(monkeypatch):
    body = joined(pack({"text": "x" * 200}))
    assert unpack(body)[0]["text"] == "x" * 200
    monkeypatch.setattr(protocol, "MOST_HEADER_BYTES", 100)
    with pytest.raises(MessageError, match="expected a header of at most 100 bytes"):
        unpack(body)


def request(**changes) -> Request:
    """Return a request of eight tokens, of which two are those of a video with two layers of features."""
    types = torch.tensor([0, 0, 0, 2, 2, 0, 0, 0])
    layers = (torch.randn(2, 3), torch.randn(2, 3))
    medium = Medium("video", (1, 4, 2), 2, 6, layers, "key")
    values = {"question_id": "q", "input_ids": torch.arange(8), "mm_token_type_ids": types, "media": (medium,)}
    values |= {"position_ids": torch.arange(8).expand(3, -1), "seed": 2**61, "salt": "salt"}
    return Request(**{**values, **changes})


def sent(made: Request, sampling: Sampling = SAMPLING, dtype=torch.float32):
    return unpack(joined(pack_request(made, sampling, {"session": "s"}, dtype)))


def received(description, tensors):
    return unpack_request(description, tensors, vocabulary=8, width=6, patches=4)


def test_requests_survive():
    made = request()
    description, tensors = sent(made)
    other, sampling = received(description, tensors)
    assert sampling == Sampling(2, 0.8, 7) and description["session"] == "s"
    for name in ("input_ids", "mm_token_type_ids", "position_ids"):
        assert torch.equal(getattr(other, name), getattr(made, name))
    assert (other.question_id, other.seed, other.salt, other.next_position) == ("q", 2**61, "salt", 8)
    (medium,), (before,) = other.media, made.media
    assert torch.equal(medium.layers[0], torch.cat(before.layers, -1)) and medium.key == "key"
    assert (medium.kind, medium.grid_thw, medium.start, medium.end) == ("video", (1, 4, 2), 2, 6)
    assert received(*sent(request(media=())))[0].media == ()
    half = received(*sent(made, dtype=torch.bfloat16))[0].media[0].layers[0]
    assert torch.equal(half, before.embeds(torch.bfloat16))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"input_ids": torch.arange(8) + 1}, "expected ids from 0 to 7, got 1 to 8"),
        ({"input_ids": torch.arange(8) - 1}, "expected ids from 0 to 7, got -1 to 6"),
        ({"input_ids": torch.arange(7)}, r"expected ids \[P\]"),
        ({"input_ids": torch.arange(0)}, r"expected ids \[P\]"),
        ({"input_ids": torch.arange(8).int()}, "in int64"),
        ({"position_ids": torch.zeros(4, 8, dtype=torch.int64)}, r"positions \[3, P\]"),
        ({"media": (Medium("video", (1, 4, 2), 2, 5, (torch.randn(1, 6),), "k"),)}, r"expected features \[2, 6\]"),
        ({"media": (Medium("video", (1, 4, 2), 2, 5, (torch.randn(2, 5),), "k"),)}, r"expected features \[2, 6\]"),
        ({"media": (Medium("video", (1, 4, 2), 2, 9, (torch.randn(2, 6),), "k"),)}, r"expected features \[0, 6\]"),
        ({"media": (Medium("video", (1, 4, 2), -5, 6, (torch.randn(2, 6),), "k"),)}, "start: expected a whole num"),
        ({"media": (Medium("audio", (1, 4, 2), 2, 6, (torch.randn(2, 6),), "k"),)}, "got a 'audio'"),
    ],
)
def test_requests_that_do_not_fit_are_refused(changes, expected):
    with pytest.raises(MessageError, match=expected):
        received(*sent(request(**changes)))


UNUSABLE = [("n", value) for value in (0, 7.9, True, "3", 10**9, math.inf, None)]
UNUSABLE += [("max_new_tokens", value) for value in (0, 1.0, 10**12)]
UNUSABLE += [("temperature", value) for value in (-1.0, math.nan, math.inf, 10**400, True, "1")]


@pytest.mark.parametrize(("name", "value"), UNUSABLE)
def test_sampling_parameters_are_checked(name, value):
    description, tensors = sent(request())
    description["sampling"][name] = value
    with pytest.raises(MessageError, match=f"request: expected all of its fields .*{name}: expected"):
        received(description, tensors)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 10**30}, "seed: expected a whole number from 0 to 9223372036854775805, got 1000"),
        ({"seed": 2**63 - 2}, "seed: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"question_id": 3}, "expected a text, got 3"),
        ({"salt": None}, "expected a text, got None"),
    ],
)
def test_fields_of_requests_are_checked(change, expected):
    description, tensors = sent(request())
    description["request"] |= change
    with pytest.raises(MessageError, match=expected):
        received(description, tensors)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"grid_thw": [10**6, 10**6, 10**6]}, "expected 8 patches, got a grid of"),
        ({"grid_thw": [1, 4, 4]}, r"expected 8 patches, got a grid of \[1, 4, 4\]"),
        ({"grid_thw": [-1, -4, 2]}, "grid_thw: expected a whole number from 1"),
        ({"grid_thw": [1, 4, 2.0]}, "grid_thw: expected a whole number from 1"),
        ({"grid_thw": [8, 1]}, "expected all of its fields"),
        ({"start": "2"}, "start: expected a whole number"),
        ({"end": True}, "end: expected a whole number"),
        ({"key": 3}, "expected a text, got 3"),
    ],
)
def test_media_of_requests_are_checked(change, expected):
    description, tensors = sent(request())
    description["request"]["media"][0] |= change
    with pytest.raises(MessageError, match=expected):
        received(description, tensors)


def test_missing_fields_are_named():
    description, tensors = sent(request())
    without = [{**description, "request": {}}, {**description, "sampling": None}, {**description, "request": 3}]
    for damaged in ({}, *without):
        with pytest.raises(MessageError, match="request: expected all of its fields"):
            received(damaged, tensors)
    for name in tensors:
        with pytest.raises(MessageError, match=name):
            received(description, {other: value for other, value in tensors.items() if other != name})


COMPLETIONS = [
    Completion(torch.tensor([4, 5, 6]), torch.tensor([-0.5, -1.0, math.nan]), 0.25),
    Completion(torch.tensor([7]), torch.tensor([-2.0]), 1e-9),
]


def test_completions_survive():
    received = unpack_completions(joined(pack_completions(COMPLETIONS)), 2, 8)
    for before, after in zip(COMPLETIONS, received, strict=True):
        assert torch.equal(before.token_ids, after.token_ids) and before.banned_mass == after.banned_mass
        assert torch.equal(before.logp.view(torch.int32), after.logp.view(torch.int32))


def test_incomplete_completions_are_refused():
    with pytest.raises(MessageError, match="expected 3 rollouts of at least one token, got lengths"):
        unpack_completions(joined(pack_completions(COMPLETIONS)), 3, 8)
    empty = [COMPLETIONS[0], Completion(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 0.0)]
    with pytest.raises(MessageError, match="at least one token"):
        unpack_completions(joined(pack_completions(empty)), 2, 8)
    without = [COMPLETIONS[0], Completion(torch.tensor([7]), torch.zeros(0), 0.0)]
    with pytest.raises(MessageError, match="expected 4 tokens with log-probs"):
        unpack_completions(joined(pack_completions(without)), 2, 8)
    with pytest.raises(MessageError, match="expected the columns"):
        unpack_completions(joined(pack({}, {"tokens": torch.tensor([1])})), 1, 8)
    with pytest.raises(MessageError, match="expected ids from 0 to 6, got 4 to 7"):
        unpack_completions(joined(pack_completions(COMPLETIONS)), 2, 7)
    _, whole = unpack(joined(pack_completions(COMPLETIONS)))
    for name in whole:
        for shape in ((), (1, -1)):
            column = whole[name][0] if shape == () else whole[name].view(shape)
            with pytest.raises(MessageError, match="expected the columns"):
                unpack_completions(joined(pack({}, {**whole, name: column})), 2, 8)


FACTS = {"protocol": 1, "model.dtype": "float32", "end token": 5, "max_tokens": 100, "text_config.hidden_size": 64}
FACTS["ids that are not sampled"] = "3 (ab)"


def test_a_server_with_more_room_fits():
    check_facts("http://h:1", FACTS, {**FACTS, "max_tokens": 200, "text_config.new_in_transformers": 1})
    check_facts("http://h:1", {**FACTS, "text_config.new_in_transformers": 1}, FACTS)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("protocol", 2, "protocol: expected 1 as in the run, got 2; install the same version of rmsd_fast"),
        ("model.dtype", "bfloat16", "model.dtype: expected 'float32' as in the run, got 'bfloat16'; start both"),
        ("ids that are not sampled", "4 (cd)", "their tokenizers differ: start both with the same model.path"),
        ("text_config.hidden_size", 128, "hidden_size: expected 64 as in the run, got 128; it serves another model"),
        ("end token", None, "end token: expected 5 as in the run, got None; it serves another model"),
        ("max_tokens", 99, "expected room for 100 tokens, .* got 99; start the server with the settings of the run"),
    ],
)
def test_differences_are_named(name, value, expected):
    with pytest.raises(SettingsError, match=f"rollout server http://h:1: .*{expected}"):
        check_facts("http://h:1", FACTS, {**FACTS, name: value})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e6, "rope_scaling": {"mrope_section": [24, 20, 20], "rope_type": "default"}},
        {"rope_theta": 5e6, "rope_scaling": {"mrope_section": [24, 20, 20], "type": "default", "rope_type": "default"}},
        {"rope_parameters": {"mrope_section": [24, 20, 20], "rope_type": "default", "rope_theta": 5e6}},
    ],
)
def test_spellings_of_the_rotary_embedding_are_compared(rope):
    """Versions 4.57 and 5 of transformers spell it differently."""

    def facts(settings):
        text = SimpleNamespace(to_dict=lambda: {"hidden_size": 8, **settings}, hidden_size=8)
        vision = SimpleNamespace(spatial_merge_size=2, deepstack_visual_indexes=[1])
        config = SimpleNamespace(text_config=text, vision_config=vision, model_type="qwen3_vl")
        made = protocol.model_facts(config, eos_id=1, banned_ids=torch.arange(3), dtype="float32")
        return {**made, "max_tokens": 5}

    known = {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default", "mrope_section": [24, 20, 20]}}
    check_facts("http://h:1", facts(rope), facts(known))
    with pytest.raises(SettingsError, match="rotary embedding: expected .*5000000.* got .*10000"):
        check_facts(
            "http://h:1", facts(rope), facts({"rope_parameters": {**known["rope_parameters"], "rope_theta": 1e4}})
        )


SECRET = "0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.1.1"])
def test_a_loopback_address_needs_no_token(host):
    check_host(host, "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "node7"])
def test_other_addresses_need_a_token(host):
    with pytest.raises(SettingsError, match="--host: expected 127.0.0.1 without a token"):
        check_host(host, "")
    check_host(host, SECRET)
    for token in ("short", "x" * 15, "with a space in it", "ümlaut-ümlaut-ümlaut", "line\nbreak-line-break"):
        with pytest.raises(SettingsError, match="RMSD_ROLLOUT_TOKEN: expected a secret of at least 16 ASCII"):
            check_host(host, token)


def test_the_largest_message_holds_a_bucket_and_a_prompt():
    """A prompt of 4,000,000 tokens with 2 x 64 features in float32 is larger than a bucket."""
    from transformers import Qwen3VLConfig

    sizes = {"hidden_size": 64, "vocab_size": 500, "intermediate_size": 128}
    config = Qwen3VLConfig(text_config=sizes, vision_config={"deepstack_visual_indexes": [1]})
    header = protocol.MOST_HEADER_BYTES
    most = lambda tokens: protocol.most_bytes(config, dtype=torch.float32, max_tokens=tokens)  # noqa: E731
    assert most(100) == protocol.BUCKET_BYTES + header
    assert most(4_000_000) == 4_000_000 * (2 * 64 * 4 + 40) + header
