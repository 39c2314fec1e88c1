"""Test which settings identify the answers of an evaluation."""

from __future__ import annotations

import pytest

from rmsd_fast.data.records import Question
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.protocol import differences_of, evaluation_identity

ASKED = [Question("1", "?", "mcq", videos=("a.mp4",), options=("a", "b"), answer="A")]
MODEL = {"path": "m", "hash": "1"}


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("data.decoder=cpu", "protocol.decoder: auto, not cpu"),
        ("data.check_frames=false", "protocol.check_frames: True, not False"),
        ("data.max_file_mib=9", "protocol.max_file_mib: 16384, not 9"),
        ("model.attention=eager", "protocol.model.attention: sdpa, not eager"),
        ("model.liger=off", "protocol.model.liger: auto, not off"),
        ("packing=shared", "protocol.packing: padded, not shared"),
        ("evaluate.prompts_per_batch=5", "prompts_per_batch: 64, not 5"),
    ],
)
def test_settings_that_can_change_an_answer_identify_it(override, difference):
    # With packing=shared, model.attention has no effect.
    padded = "packing=padded"
    before, after = (load_settings("quickstart", overrides) for overrides in ([padded], [padded, override]))
    identities = [evaluation_identity(settings, ASKED, MODEL) for settings in (after, before)]
    assert differences_of(*identities) == [difference]


def test_settings_that_cannot_change_an_answer_do_not():
    before, after = (load_settings("quickstart", o) for o in ([], ["evaluate.samples=3", "data.decode_threads=1"]))
    assert evaluation_identity(after, ASKED, MODEL) == evaluation_identity(before, ASKED, MODEL)


def test_differences_name_each_value():
    ours = {"seed": 0, "video": {"num_frames": 64, "fps": None}}
    assert differences_of(ours, {"seed": 1, "video": {"num_frames": 64, "fps": None}}) == ["seed: 1, not 0"]
    # A record of an earlier version lacks values, or all of them.
    assert differences_of(ours, {"seed": 0}) == ["video.num_frames: absent, not 64", "video.fps: absent, not None"]
    assert differences_of({"seed": 0}, None) == ["seed: absent, not 0"]
    assert differences_of({}, {"a": {"b": 2}}) == ["a.b: 2, not absent"]
