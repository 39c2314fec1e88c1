"""Test runs with rollout servers over HTTP, without vLLM: the servers here sample with transformers."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection
from threading import Thread
from threading import enumerate as enumerate_threads
from types import SimpleNamespace

import pytest
import rollout_servers
import torch
from material import tiny_material, tiny_settings
from rollout_servers import ServerProcess, free_port, serving
from train_runs import MINI, metrics, only_run, run_train

from rmsd_fast.config import SettingsError
from rmsd_fast.models.adapters import POLICY, adapted_layers
from rmsd_fast.rollout import server, server_client
from rmsd_fast.rollout.base import RolloutError, Sampling
from rmsd_fast.rollout.protocol import CONTENT_TYPE, pack
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.checkup import examine
from rmsd_fast.stages.plan import describe_plan
from rmsd_fast.stages.rollout_servers import check_servers

SMALL = ("rollout.n=2", "rollout.max_new_tokens=6", "data.max_prompt_tokens=500", "micro_tokens=600")
SMALL += ("model.dtype=float32", "runtime.zero_stage=2", "rollout.parity_every=1", "rollout.engine=vllm_server")
LORA = ("model.adapter=lora", "model.lora_rank=4", "sft.train_vision=false", "distill.train_vision=false")
SAMPLING = Sampling(n=2, temperature=0.8, max_new_tokens=6, seed=3, step=4)
SECRET = "0123456789abcdef0123456789abcdef"
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    return SimpleNamespace(folder=folder, inputs=tiny_material(folder))


def settings_of(material, *urls, overrides=()):
    return tiny_settings(material.folder, *SMALL, f"rollout.server_urls=[{','.join(urls)}]", *overrides)


@contextmanager
def serve(material, **options):
    made = settings_of(material, "http://127.0.0.1:1")
    with serving(made, material.inputs.model_path, **options) as found:
        yield found


@pytest.fixture(scope="module")
def served(material):
    with serve(material) as found:
        yield found


def build(material, world, *urls, overrides=()):
    return build_distillation(
        material.inputs.model_path, settings_of(material, *urls, overrides=overrides), world, material.inputs
    )


@contextmanager
def connected(material, world, *urls, overrides=()):
    """Yield the state of a run, and end its connection."""
    state = build(material, world, *urls, overrides=overrides)
    state.timer = PhaseTimer(torch.device("cpu"))
    try:
        yield state
    finally:
        state.rollouts.sampler.close()
        state.policy.close()


def prompts_of(state, material, count=4):
    wanted = [q for q in material.inputs.train if state.targets[q.id].has_teacher][:count]
    return [state.builder.build(question) for question in wanted]


def sample(state, prompts):
    return state.rollouts.generate(state.student.model, prompts, SAMPLING)


def owner_of(found):
    """Return which run a server serves, after a moment in which it may notice that the last one has ended."""
    end = time.monotonic() + 10
    while found.service.status()["owner"] and time.monotonic() < end:
        time.sleep(0.02)
    return found.service.status()["owner"]


@pytest.mark.parametrize("overrides", [(), (*LORA, "discriminator.mode=shared")], ids=["full", "adapters"])
def test_steps_of_stage_2(material, world, served, overrides):
    """The weights and prompts of a server are the trainer's, also after its weights have changed."""
    with connected(material, world, served.url, overrides=overrides) as state:
        for layer in adapted_layers(state.student.model).values():
            layer.lora_B[POLICY].weight.data.normal_(0, 0.05)
        state.policy.set_lr(1e-2)
        prompts = prompts_of(state, material)
        assert any(prompt.media for prompt in prompts)
        for number in range(3):
            line = distill.step(state, prompts, number).metrics
            assert line["parity/largest_difference"] < ROUNDING and abs(line["policy/engine_kl"]) < ROUNDING
            assert line["policy/importance_ratio"] == pytest.approx(1, abs=ROUNDING)
        assert line["policy/kl"] > 1e-4
    assert owner_of(served) == ""


def test_only_trained_weights_are_sent_after_the_first_update(material, world, served, monkeypatch):
    sent = []
    load = served.engine.load
    monkeypatch.setattr(served.engine, "load", lambda weights, names: sent.append(names) or load(weights, names))
    # A bucket holds 30,000 bytes, and the embeddings alone have more.
    monkeypatch.setattr(server_client, "BUCKET_BYTES", 30_000)
    with connected(material, world, served.url, overrides=LORA) as state:
        state.rollouts.update(state.policy, 0)
        first, sent[:] = [name for names in sent for name in names], []
        state.rollouts.update(state.policy, 1)
    assert len(first) == 24 and "model.language_model.norm.weight" in first
    # Seven adapted layers in each of the two decoder layers, whose weights are 8 to 32 KiB.
    assert len(sent) > 3 and sum(map(len, sent)) == 14 and all("_proj" in name for names in sent for name in names)
    assert {name for names in sent for name in names} < set(first)


def test_a_run_with_several_servers(material, world, served):
    with serve(material) as other, connected(material, world, served.url, other.url) as state:
        state.rollouts.update(state.policy, 0)
        prompts = prompts_of(state, material)
        added = []
        for found in (served, other):
            add = found.engine.add
            found.engine.add = lambda request, sampling, add=add, url=found.url: (
                added.append((url, request.question_id)) or add(request, sampling)
            )
        both = sample(state, prompts)
        assert sorted(added) == sorted(
            ((served.url, other.url)[i % 2], prompt.question.id) for i, prompt in enumerate(prompts)
        )
        del served.engine.add, other.engine.add
    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
        for group, expected in zip(both, sample(state, prompts), strict=True):
            for rollout, alone in zip(group, expected, strict=True):
                assert torch.equal(rollout.token_ids, alone.token_ids) and rollout.text == alone.text
                assert torch.allclose(rollout.logp, alone.logp, atol=ROUNDING)


def test_a_server_with_other_weights_than_another_one(material, world, served):
    with serve(material) as other, connected(material, world, served.url, other.url) as state:
        load = other.engine.load

        def changed(weights, names):
            load(((name, value + ("norm" in name)) for name, value in weights), names)

        other.engine.load = changed
        with pytest.raises(RolloutError, match=f"server {other.url}: expected the weights of {served.url}, got others"):
            state.rollouts.update(state.policy, 0)


def test_a_changed_weight_is_caught(material, world, served):
    """One bit of one element is enough."""
    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
        load = served.engine.load

        def changed(weights, names):
            load(weights, names)
            name = "model.language_model.layers.1.mlp.up_proj.weight"
            if name in names:
                served.engine._params[name].data.view(torch.int32)[0, 0] += 1

        served.engine.load = changed
        try:
            with pytest.raises(RolloutError, match=r"policy's weights in vLLM, got others in layers.1 \(1 of 4 groups"):
                state.rollouts.update(state.policy, 1)
        finally:
            del served.engine.load


def test_rollouts_with_weights_of_another_update_are_refused(material, world, served):
    with connected(material, world, served.url) as state:
        prompts = prompts_of(state, material, 1)
        with pytest.raises(RolloutError, match="weights of update 0 of the run, it holds those of no complete update"):
            sample(state, prompts)
        state.rollouts.update(state.policy, 0)
        # A run that believes to have sent an update.
        state.rollouts.sampler._version += 1
        expected = (
            f"rollout server {served.url}: expected the weights of update 2 of the run, it holds those of update 1"
        )
        with pytest.raises(RolloutError, match=expected):
            sample(state, prompts)


def test_an_update_that_lost_a_bucket_is_refused(material, world, served, monkeypatch):
    monkeypatch.setattr(server_client, "BUCKET_BYTES", 30_000)
    buckets = server_client._buckets
    monkeypatch.setattr(
        server_client, "_buckets", lambda weights: (b for i, b in enumerate(buckets(weights)) if i != 1)
    )
    with connected(material, world, served.url) as state:
        with pytest.raises(
            RolloutError, match="expected 24 weights in update 1, got .*; first missing: model.language"
        ):
            state.rollouts.update(state.policy, 0)
        with pytest.raises(RolloutError, match="it holds those of no complete update"):
            sample(state, prompts_of(state, material, 1))


def test_a_second_run_is_refused_and_the_first_one_goes_on(material, world, served, monkeypatch):
    monkeypatch.setattr(server_client, "FREE_S", 0.5)
    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
        expected = (
            rf"rollout server {served.url}: expected a server without a run, got one that serves run 'quickstart' "
            rf"\(process {os.getpid()} on .*\) at 127.0.0.1; wait for that run to end, or start another server"
        )
        with pytest.raises(RolloutError, match=expected):
            build(material, world, served.url)
        with pytest.raises(SettingsError, match=expected):
            check_servers(state.settings, material.inputs.model_path)
        assert len(sample(state, prompts_of(state, material, 1))[0]) == 2
    (line,) = check_servers(settings_of(material, served.url), material.inputs.model_path)
    assert line == f"rollout server {served.url}: vLLM none, on CPU"


def test_a_server_that_was_started_again_is_recognized(material, world):
    port = free_port()
    with serve(material, port=port) as first:
        state = build(material, world, first.url)
        state.rollouts.update(state.policy, 0)
    with serve(material, port=port) as second:
        assert second.url == first.url
        expected = (
            f"rollout server {first.url}: expected the server that the run had connected to, got one that was started "
            "again and has lost the weights of the run; the last checkpoint is unaffected: continue the run with --res"
        )
        for call in (
            lambda: sample(state, prompts_of(state, material, 1)),
            lambda: state.rollouts.update(state.policy, 1),
        ):
            with pytest.raises(RolloutError, match=expected):
                call()
    with pytest.raises(
        RolloutError, match=r"expected an answer, got ConnectionRefusedError .*continue the run with --res"
    ):
        state.rollouts.update(state.policy, 2)
    state.rollouts.sampler.close()


def test_a_connection_that_has_ended_ends_the_run(material, world, served):
    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
        close_session(state)
        assert owner_of(served) == ""
        with pytest.raises(
            RolloutError, match="the run to stay open, got a server without a run; the last checkpoint is unaffected"
        ):
            sample(state, prompts_of(state, material, 1))


def in_thread(work):
    """Return the future of a call in a thread of its own."""
    return ThreadPoolExecutor(1).submit(work)


def close_session(state):
    """Close the connection, as a kernel does for a process that was killed."""
    ((connection, response),) = state.rollouts.sampler._connections
    response.close()
    connection.close()


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_requests_of_a_run_that_was_killed_are_dropped(material, world, served):
    loop = served.service.loop
    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
        prompts = prompts_of(state, material, 2)
        served.engine.ready.clear()
        drawn = in_thread(lambda: sample(state, prompts))
        # A request is being decoded. The other one is too, or it will be added before the session is closed.
        wait_until(lambda: loop.in_progress and loop.in_progress + loop._jobs.qsize() == 2)
        close_session(state)
        wait_until(lambda: loop.in_progress + loop._jobs.qsize() == 3)
        served.engine.ready.set()
        with pytest.raises(RolloutError, match=r"but the run has ended; the last checkpoint .* --resume"):
            drawn.result(60)
    assert owner_of(served) == "" and not loop.in_progress and not served.engine._waiting


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "the server was stopped while the run used it; start it again; the last checkpoint is unaffected"),
        (
            torch.OutOfMemoryError("Tried to allocate 2 GiB"),
            r"out of memory on the server \(Tried to allocate 2 GiB\); start it again with a lower rollout.vllm_kv_"
            "cache.*the server has ended; the last checkpoint is unaffected: continue the run with --resume",
        ),
        (RolloutError("vLLM failed"), "vLLM failed; the server has ended: start it again; the last checkpoint"),
        (ValueError("two features"), r"the server has ended \(ValueError: two features\); look at its output, and st"),
    ],
    ids=["signal", "memory", "engine", "fault"],
)
def test_a_server_that_ends_while_it_decodes(material, world, error, expected):
    """The run learns why, and how to go on. An engine is not used again after an error of its own."""
    with serve(material) as found, connected(material, world, found.url) as state:
        state.rollouts.update(state.policy, 0)
        found.engine.ready.clear()
        drawn = in_thread(lambda: sample(state, prompts_of(state, material, 2)))
        wait_until(lambda: found.service.loop.in_progress)
        if error is None:
            found.stop()
        found.engine.error = error
        found.engine.ready.set()
        with pytest.raises(RolloutError, match=f"rollout server {found.url}: {expected}"):
            drawn.result(60)
        wait_until(lambda: found.ended is not None)
        assert found.ended is error or error is None
        with pytest.raises(RolloutError, match=f"rollout server {found.url}: {expected}"):
            state.rollouts.update(state.policy, 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyError("model.weird"), "KeyError: 'model.weird'; look at the output of the server; the last checkpoint"),
        (torch.AcceleratorError("CUDA error: illegal access"), "the server has ended .*CUDA error: illegal access"),
        (KeyboardInterrupt(), "the server was stopped while the run used it; start it again; the last checkpoint"),
    ],
    ids=["fault", "GPU", "signal"],
)
def test_an_error_of_the_engine_in_a_call(material, world, error, expected, caplog):
    """It is not the fault of the client. Only signals and errors of the GPU end the server."""

    def fail(weights, names):
        raise error

    with serve(material) as found, connected(material, world, found.url) as state:
        found.engine.load = fail
        with pytest.raises(RolloutError, match=expected):
            state.rollouts.update(state.policy, 0)
        if isinstance(error, KeyError):
            assert "/weights failed" in caplog.text and found.service.loop.call(lambda: 3) == 3
        else:
            wait_until(lambda: found.ended is error)


def test_a_connection_that_breaks_during_a_question_ends_the_run(material, world, served, monkeypatch):
    """The question is not sent again: its first copy would still be decoded when the next weights arrive."""
    calls = []

    def lost(handler, *parts):
        calls.append(handler.path)
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
        monkeypatch.setattr(server._Handler, "_answer", lost)
        with pytest.raises(
            RolloutError, match=r"expected an answer, got RemoteDisconnected .*continue the run with --"
        ):
            sample(state, prompts_of(state, material, 1))
    assert calls == ["/generate"]


def test_an_error_of_the_weights_is_raised_at_once(material, world, served, monkeypatch):
    """Other processes may wait in a gather of ZeRO-3, so this process must enter no other collective."""

    def weights():
        yield "model.language_model.norm.weight", torch.zeros(64)
        raise torch.OutOfMemoryError("merged weight")

    with connected(material, world, served.url) as state:
        monkeypatch.setattr(server_client, "raise_together", lambda *_: pytest.fail("a collective"))
        with pytest.raises(torch.OutOfMemoryError, match="merged weight"):
            state.rollouts.sampler.load(weights(), ["model.language_model.norm.weight"])


def test_all_weights_are_gathered_if_a_server_fails(material, world, served, monkeypatch):
    monkeypatch.setattr(server_client, "BUCKET_BYTES", 1)
    gathered = []

    def weights():
        for i in range(4):
            gathered.append(i)
            yield f"unknown.{i}", torch.zeros(1)

    expected = f"rollout server {served.url}: KeyError: 'unknown.0'"
    with connected(material, world, served.url) as state, pytest.raises(RolloutError, match=expected):
        state.rollouts.sampler.load(weights(), [])
    assert gathered == [0, 1, 2, 3]


def test_one_bucket_of_weights_is_held(material, world, served, monkeypatch):
    monkeypatch.setattr(server_client, "BUCKET_BYTES", 1)
    held, buckets = [], server_client._buckets

    def watched(weights):
        for bucket in buckets(weights):
            held.append([weakref.ref(value) for value in bucket.values()])
            yield bucket
            del bucket
            assert not any(ref() is not None for refs in held for ref in refs)

    monkeypatch.setattr(server_client, "_buckets", watched)
    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
    assert len(held) == 24


def test_exchanged_weights_are_caught(material, world, served, monkeypatch):
    """Both are of one group, whose sum is the same."""
    up, gate = (f"model.language_model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate"))
    load = served.service.load
    monkeypatch.setattr(
        served.service,
        "load",
        lambda description, tensors: load(description, {**tensors, up: tensors[gate], gate: tensors[up]}),
    )
    with connected(material, world, served.url) as state:
        expected = "weights of update 1 as they were sent, got other bytes for .*_proj.weight .2 of 24.; start"
        with pytest.raises(RolloutError, match=f"rollout server {served.url}: expected the {expected}"):
            state.rollouts.update(state.policy, 0)


def test_the_requests_in_progress_on_each_server_are_limited(material, world, served):
    """A slow server does not get the share of a fast one."""
    with serve(material) as other, connected(material, world, served.url, other.url) as state:
        state.rollouts.update(state.policy, 0)
        prompts = prompts_of(state, material, 1) * 40
        most = state.settings.rollout.prompts_per_batch
        assert most < 20
        served.engine.ready.clear()
        drawn = in_thread(lambda: sample(state, prompts))
        loop, added = served.service.loop, []
        add = other.engine.add
        other.engine.add = lambda request, sampling: added.append(1) or add(request, sampling)
        wait_until(lambda: len(added) == 20 and loop.in_progress + loop._jobs.qsize() >= most)
        wait_until(lambda: other.service.loop.in_progress == 0)
        assert loop.in_progress + loop._jobs.qsize() == most
        served.engine.ready.set()
        assert len(drawn.result(60)) == 40


def test_an_update_and_a_batch_of_rollouts_have_one_deadline(material, world, served, monkeypatch):
    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
        prompts = prompts_of(state, material, 2)
        monkeypatch.setattr(server_client, "ANSWER_S", 0.0)
        for call in (lambda: sample(state, prompts), lambda: state.rollouts.update(state.policy, 1)):
            with pytest.raises(RolloutError, match=r"got TimeoutError \(an update, or a batch of rollouts, takes more"):
                call()


def test_a_refused_question_is_named(material, world, served):
    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
        good, bad = prompts_of(state, material, 2)
        bad = replace(bad, question=replace(bad.question, id="refused"))
        with pytest.raises(
            RolloutError, match=f"rollout server {served.url}: question 'refused': expected another one"
        ):
            sample(state, [good, bad])
        assert len(sample(state, [good])) == 1


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"text_config.num_hidden_layers": 3}, "num_hidden_layers: expected 2 as in the run, got 3; it serves another"),
        ({"model.dtype": "bfloat16"}, "model.dtype: expected 'float32' as in the run, got 'bfloat16'"),
        ({"max_tokens": 505}, "expected room for 506 tokens"),
        ({"ids that are not sampled": "0 ()"}, "their tokenizers differ"),
        ({"protocol": 0}, "install the same version of rmsd_fast for both"),
    ],
)
def test_a_server_of_another_recipe_is_refused_before_the_run(material, world, facts, expected):
    with serve(material, **facts) as found:
        for check in (
            lambda: check_servers(settings_of(material, found.url), material.inputs.model_path),
            lambda: build(material, world, found.url),
        ):
            with pytest.raises(SettingsError, match=f"rollout server {found.url}: .*{expected}"):
                check()


def test_no_server_and_another_program(material, world):
    url = f"http://127.0.0.1:{free_port()}"
    expected = rf"expected a rollout server at {url}, got no answer \(.*refused.*\); start one with python -m rmsd_fast"
    with pytest.raises(SettingsError, match=expected):
        check_servers(settings_of(material, url), material.inputs.model_path)
    with pytest.raises(SettingsError, match=expected):
        build(material, world, url)
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connection, _ = other.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}")
            connection.close()

        Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(SettingsError, match=r"got another program \(status 404\); start one with"):
            check_servers(settings_of(material, url), material.inputs.model_path)


def test_a_server_whose_vllm_is_starting(material):
    """It has its port before minutes of loading, so that a second server on this port is refused at once."""
    starting = server.RolloutServer("127.0.0.1", 0, token="", most_bytes=2**20)
    starting.start()
    try:
        with pytest.raises(
            SettingsError, match=f"server {starting.url}: expected a server that is ready, got one that"
        ):
            check_servers(settings_of(material, starting.url), material.inputs.model_path)
        with pytest.raises(SettingsError, match="expected an address to listen on, .* in use.; choose another port"):
            server.RolloutServer("127.0.0.1", starting.server_address[1], token="", most_bytes=2**20)
    finally:
        starting.shutdown()
        starting.server_close()


def test_a_hundred_connections_wait_for_a_busy_server():
    busy = server.RolloutServer("127.0.0.1", 0, token="", most_bytes=2**20)
    with closing(busy.socket), ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(busy.server_address, timeout=20))


def test_a_server_on_all_addresses_names_its_machine():
    everywhere = server.RolloutServer("0.0.0.0", 0, token=SECRET, most_bytes=2**20)
    everywhere.server_close()
    assert everywhere.url == f"http://{socket.gethostname()}:{everywhere.server_address[1]}"


def test_tokens(material, world, monkeypatch):
    with serve(material, token=SECRET) as found:
        settings = settings_of(material, found.url)
        for token, what in (("", "none"), ("wrong" * 5, "another")):
            monkeypatch.setenv("RMSD_ROLLOUT_TOKEN", token)
            with pytest.raises(
                SettingsError, match=f"expected the token of the server, got {what}; set RMSD_ROLLOUT_T"
            ):
                check_servers(settings, material.inputs.model_path)
            for path, body in (("/open", {"owner": "x"}), ("/weights", {}), ("/commit", {}), ("/generate", {})):
                assert post(found, path, b"".join(pack(body)), token=token)[0] == 401
        monkeypatch.setenv("RMSD_ROLLOUT_TOKEN", SECRET)
        with connected(material, world, found.url) as state:
            state.rollouts.update(state.policy, 0)
            assert len(sample(state, prompts_of(state, material, 1))) == 1


def post(found, path, body, *, token="", **headers):
    """Return the status of a call and its answer."""
    headers = {"Content-Type": CONTENT_TYPE, "Content-Length": str(len(body)), **headers}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    with closing(HTTPConnection("127.0.0.1", found.server.server_address[1], timeout=20)) as connection:
        connection.request("POST", path, body=body, headers={k: v for k, v in headers.items() if v is not None})
        response = connection.getresponse()
        return response.status, json.loads(response.read())["error"]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "expected"),
    [
        ("/other", b"x", {}, 404, "expected a call of this protocol"),
        ("/status", b"x", {}, 404, "expected a call of this protocol"),
        ("/generate", b"{}", {"Content-Type": "text/plain"}, 415, "expected Content-Type .*, got 'text/plain'"),
        ("/generate", b"{}", {}, 400, "expected a header of at most"),
        ("/generate", b"".join(pack({})), {}, 400, "request: expected all of its fields"),
        ("/weights", b"".join(pack({})), {}, 400, "update: expected all of its fields"),
        ("/weights", b"".join(pack({"version": 1, "names": ["a"]})), {}, 400, "expected 1 weights, got 0"),
        ("/weights", b"".join(pack({"version": 1, "names": []})), {}, 410, "started again"),
        ("/commit", b"".join(pack({"version": 1, "names": 3})), {}, 400, "update: expected all of its fields"),
        ("/open", b"".join(pack({})), {}, 400, "owner: expected the name of a run, got None"),
        (
            "/weights",
            b"",
            {"Host": "evil.example:8400"},
            403,
            "expected Host 127.0.0.1 without a token, got 'evil.exam",
        ),
        ("/weights", b"", {"Content-Length": str(10**15)}, 413, "expected at most .* bytes, got 1000000000000000"),
        ("/weights", b"".join(pack({"version": 1.5, "names": []})), {}, 400, "version: expected a whole number"),
        ("/weights", b"", {"Content-Length": "-1"}, 411, "expected a Content-Length"),
    ],
)
def test_damaged_calls_are_refused(served, path, body, headers, status, expected):
    answer = post(served, path, body, **headers)
    assert answer[0] == status and re.search(expected, answer[1]), answer


@pytest.mark.parametrize("sent", [b"", b"POST /wei", b"whole"], ids=["nothing", "headers", "body"])
def test_a_client_that_stops_in_the_middle_is_dropped(served, monkeypatch, sent):
    monkeypatch.setattr(server, "READ_S", 0.2)
    # Read timeouts are also shorter than the time for headers.
    if sent == b"whole":
        head = f"POST /weights HTTP/1.1\r\nHost: localhost\r\nContent-Type: {CONTENT_TYPE}\r\n"
        sent = f"{head}Content-Length: 1000\r\n\r\n".encode() + b"x" * 10
    before = set(enumerate_threads())
    with socket.create_connection(("127.0.0.1", served.server.server_address[1]), timeout=60) as half:
        half.sendall(sent)
        wait_until(lambda: not set(enumerate_threads()) - before)
        # The server has closed the connection.
        assert half.recv(1) == b""


def test_clients_without_headers_are_few_and_have_a_deadline(served, monkeypatch):
    """Each byte would otherwise give them more time, and each connection has a thread."""
    monkeypatch.setattr(server, "MOST_UNKNOWN", 2)
    monkeypatch.setattr(server, "HEADERS_S", 1.0)
    one = server.RolloutServer("127.0.0.1", 0, token=SECRET, most_bytes=2**20)
    one.service = served.service
    most, address = 0, one.server_address[:2]
    before = set(enumerate_threads())
    one.start()
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(5)]
        first = idle[0]
        first.settimeout(0.01)
        first.sendall(b"GET /status HTTP/1.1\r\nX: ")
        with suppress(ConnectionError):
            while True:
                most = max(most, len(set(enumerate_threads()) - before))
                with suppress(TimeoutError):
                    if first.recv(1) == b"":
                        break
                first.sendall(b"x")
        assert server_client.server_status(one.url, SECRET)["owner"] == ""
    one.shutdown()
    one.server_close()
    # The thread that accepts connections, and those of two of them.
    assert most == 3


def test_dry_runs(material, served):
    unused = f"http://127.0.0.1:{free_port()}"
    for url, fits in ((served.url, True), (unused, False)):
        own = [*SMALL, f"rollout.server_urls=[{url}]", f"model.path={material.inputs.model_path}"]
        text, ready = describe_plan(load_settings("quickstart", own))
        assert ready == fits
        fault = f"MISSING: rollout.server_urls: expected a rollout server at {url}, got no answer"
        assert (f"rollout server {url}: vLLM none, on CPU" if fits else fault) in text


def test_the_doctor(material, world, served, monkeypatch):
    """It connects to the servers as a run does. Without one, it says so before any other work."""
    findings = []
    closed, close = [], server_client.ServerSampler.close
    monkeypatch.setattr(server_client.ServerSampler, "close", lambda sampler: closed.append(close(sampler)))
    examine(settings_of(material, served.url), world, 2, findings.append)
    assert len(closed) == 1 and owner_of(served) == ""
    by_name = {finding.name: finding for finding in findings}
    assert by_name["servers"].text == f"rollout server {served.url}: vLLM none, on CPU"
    for name in ("servers", "log-probs", "media", "new weights"):
        assert by_name[name].status == "ok", by_name[name]
    assert by_name["new weights"].numbers["mean"] < ROUNDING
    findings.clear()
    examine(settings_of(material, f"http://127.0.0.1:{free_port()}"), world, 2, findings.append)
    assert [(finding.name, finding.status) for finding in findings[-2:]] == [
        ("servers", "fault"),
        ("the rest", "skipped"),
    ]
    assert "got no answer" in findings[-2].text


def run_arguments(tmp_path, *overrides):
    """Return the arguments of a run with stage 2 alone, without the URL of its server."""
    small = [setting for setting in MINI if not setting.startswith(("stages", "sft.", "discriminator."))]
    engine = ("rollout.engine=vllm_server", "rollout.parity_every=1", "model.dtype=float32", "distill.lr=1e-2")
    folders = (f"output={tmp_path / 'runs'}", f"made.folder={tmp_path / 'made'}")
    stages = ("stages=[distill]", "discriminator.head=random", "evaluate.max_questions=1", "checkpoint.every_steps=1")
    return ["quickstart", *small, *engine, *folders, *stages, *overrides]


@pytest.mark.slow
def test_a_server_that_is_killed_ends_the_run(tmp_path):
    """Both processes end with one message, and the run continues with another server from its last checkpoint.

    Under ZeRO-3, both must gather all weights also if they cannot be sent.
    """
    arguments = run_arguments(tmp_path, "runtime.zero_stage=3", "distill.steps=200")
    helper, port = [sys.executable, rollout_servers.__file__, *arguments], free_port()
    arguments.append(f"rollout.server_urls=[http://127.0.0.1:{port}]")
    with ServerProcess(helper, tmp_path / "server.log", port=port) as found, ThreadPoolExecutor(1) as thread:
        run = thread.submit(run_train, arguments, processes=2)
        # After the checkpoint of the second step.
        while not run.done() and not list(tmp_path.glob("runs/*/checkpoints/step_*2")):
            time.sleep(0.05)
        found.kill()
        ended = run.result(timeout=120)
    errors = ended.stderr
    assert ended.returncode, errors[-3000:]
    assert errors.count("rmsd_fast.train: rollout server") == 1 and "rmsd_fast/rollout" not in errors, errors[-3000:]
    assert "continue the run with --resume" in errors
    folder = only_run(tmp_path / "runs")
    stored = json.loads((folder / "run.json").read_text())
    assert stored["rollout_servers"] == [f"rollout server {found.url}: vLLM none, on CPU"]
    done_before = len(metrics(folder))
    # The new server has the weights of the generated student.
    steps = done_before + 2
    with ServerProcess(helper, tmp_path / "server.log") as other:
        changed = ["--resume", str(folder), "--allow-changes", f"distill.steps={steps}"]
        changed.append(f"rollout.server_urls=[{other.url}]")
        done = run_train(changed, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"rollout server {other.url}: vLLM none, on CPU" in done.stdout + done.stderr
    lines = [line for line in metrics(folder) if line["stage"] == "distill"]
    assert len(lines) == steps and lines[-1]["policy/kl"] > 1e-6
    assert all(line["parity/largest_difference"] < ROUNDING for line in lines)
