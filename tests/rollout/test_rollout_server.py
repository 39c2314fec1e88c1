"""Test runs with rollout servers over HTTP, without vLLM: the servers here sample with transformers."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from threading import Thread
from types import SimpleNamespace

import pytest
import rollout_servers
import torch
from material import tiny_material, tiny_settings
from rollout_servers import ServerProcess, free_port, serving
from train_runs import MINI, command, environment, metrics, only_run, run_train

from rmsd_fast.config import SettingsError
from rmsd_fast.models.adapters import POLICY, adapted_layers
from rmsd_fast.rollout import server, server_client
from rmsd_fast.rollout.base import RolloutError, Sampling
from rmsd_fast.rollout.protocol import CONTENT_TYPE, pack
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.setting_rules import check_together
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
            f"rollout server {first.url}: it was started again after the run had connected, and has lost the weights "
            "of the run; the last checkpoint is unaffected: continue the run with --resume"
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
        ((connection, response),) = state.rollouts.sampler._connections
        response.close()
        connection.close()
        assert owner_of(served) == ""
        with pytest.raises(
            RolloutError, match="the connection of the run has ended; the last checkpoint is unaffected"
        ):
            sample(state, prompts_of(state, material, 1))


def test_the_requests_of_a_run_that_was_killed_are_dropped(material, world, served):
    """A kernel closes the connections of a process that was killed."""
    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
        request = prompts_of(state, material, 1)
        served.engine.ready.clear()
        drawn = state.rollouts.sampler._pool.submit(sample, state, request)
        while not served.service.loop.busy:
            time.sleep(0.01)
        ((connection, response),) = state.rollouts.sampler._connections
        response.close()
        connection.close()
        served.engine.ready.set()
        with pytest.raises(RolloutError, match="the run has ended"):
            # The first of the two may have been completed before the server noticed.
            drawn.result(60)
            raise RolloutError("the run has ended")
    assert owner_of(served) == "" and not served.service.loop.busy


def test_an_interrupted_request_is_sent_again(material, world, served, monkeypatch):
    call, calls = server_client._call, []
    monkeypatch.setattr(server_client, "PAUSE_S", 0.0)

    def interrupted(url, path, body, token):
        calls.append(path)
        if len(calls) == 1:
            raise server_client._Interrupted("the network has failed")
        return call(url, path, body, token)

    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)
        prompts = prompts_of(state, material, 1)
        expected = sample(state, prompts)
        monkeypatch.setattr(server_client, "_call", interrupted)
        ((first, second),) = sample(state, prompts)
        assert calls == ["/generate"] * 2
        assert [r.token_ids.tolist() for r in (first, second)] == [r.token_ids.tolist() for r in expected[0]]


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
        ("/generate", b"{}", {"Content-Type": "text/plain"}, 415, "expected Content-Type"),
        ("/generate", b"{}", {}, 400, "expected a header of at most"),
        ("/generate", b"".join(pack({})), {}, 400, "request: expected all of its fields"),
        ("/weights", b"".join(pack({})), {}, 400, "expected all fields of /weights"),
        ("/weights", b"".join(pack({"version": 1, "names": ["a"]})), {}, 400, "expected 1 weights, got 0"),
        ("/weights", b"".join(pack({"version": 1, "names": []})), {}, 410, "started again"),
        ("/commit", b"".join(pack({"version": 1, "names": 3})), {}, 400, "expected all fields of /commit"),
        ("/open", b"".join(pack({})), {}, 400, "expected all fields of /open"),
        ("/weights", b"", {"Content-Length": str(10**15)}, 413, "expected at most .* bytes, got 1000000000000000"),
        ("/weights", b"", {"Content-Length": "-1"}, 411, "expected a Content-Length"),
    ],
)
def test_damaged_calls_are_refused(served, path, body, headers, status, expected):
    answer = post(served, path, body, **headers)
    assert answer[0] == status and re.search(expected, answer[1]), answer


def test_a_message_that_stops_in_the_middle_changes_nothing(material, world, served, monkeypatch):
    """The server drops it, and serves the next call."""
    monkeypatch.setattr(server._Handler, "timeout", 0.3)
    for sent, pause_s in ((10, 0.0), (10, 1.0)):
        with socket.create_connection(("127.0.0.1", served.server.server_address[1])) as half:
            head = f"POST /weights HTTP/1.1\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 1000\r\n\r\n"
            half.sendall(head.encode() + b"x" * sent)
            time.sleep(pause_s)
    monkeypatch.undo()
    with connected(material, world, served.url) as state:
        state.rollouts.update(state.policy, 0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["rollout.engine=vllm_server"],
            "rollout.server_urls: expected one or more URLs with rollout.engine=vllm_server",
        ),
        (
            ["rollout.server_urls=[http://h:1]"],
            r"rollout.engine: expected vllm_server with rollout.server_urls=\['http",
        ),
        (["rollout.engine=vllm", "rollout.server_urls=[http://h:1]"], "rollout.engine: expected vllm_server with"),
        *(
            (["rollout.engine=vllm_server", f"rollout.server_urls=['{url}']"], "expected http://<host>:<port>, got")
            for url in (
                "h:1",
                "http://h",
                "https://h:1",
                "http://h:0",
                "http://h:99999",
                "http://h:1/v1",
                "http://u@h:1",
                "",
            )
        ),
        (["rollout.engine=vllm_server", "rollout.server_urls=[http://h:1,http://h:1]"], "expected different servers"),
    ],
)
def test_settings(settings, expected):
    with pytest.raises(SettingsError, match=expected):
        load_settings("quickstart", settings)


def test_settings_that_fit_or_not():
    both = ["rollout.engine=vllm_server", "rollout.server_urls=[http://h:1,'http://[::1]:2']"]
    assert load_settings("quickstart", [*both, "rollout.vllm_kv_cache_gib=3"]).rollout.vllm_kv_cache_gib == 3
    with pytest.raises(SettingsError, match="expected hf with model.quantize.*got vllm_server with model.quantize=nf4"):
        check_together(load_settings("quickstart", [*both, "model.adapter=lora", "model.quantize=nf4"]))
    with pytest.raises(SettingsError, match="rollout.server_urls has no effect: no stage samples rollouts"):
        load_settings("quickstart", ["stages=[sft]", "rollout.server_urls=[http://h:1]"])


def test_dry_runs(material, served):
    unused = f"http://127.0.0.1:{free_port()}"
    for url, fits in ((served.url, True), (unused, False)):
        own = [*SMALL, f"rollout.server_urls=[{url}]", f"model.path={material.inputs.model_path}"]
        text, ready = describe_plan(load_settings("quickstart", own))
        assert ready == fits
        fault = f"MISSING: rollout.server_urls: expected a rollout server at {url}, got no answer"
        assert (f"rollout server {url}: vLLM none, on CPU" if fits else fault) in text


def test_the_doctor(material, world, served):
    """It connects to the servers as a run does. Without one, it says so before any other work."""
    findings = []
    examine(settings_of(material, served.url), world, 2, findings.append)
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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--host", "0.0.0.0"], "rmsd_fast.serve_rollouts: --host: expected 127.0.0.1 without a token, since anybody"),
        (["made.enabled=false"], "expected the package vllm, got none|model.path: expected a path, got nothing"),
        (["--port", "70000"], "expected a port from 1 to 65535, got '70000'"),
    ],
)
def test_the_program_says_what_is_wrong(arguments, expected):
    done = subprocess.run(
        [sys.executable, "-m", "rmsd_fast.serve_rollouts", "quickstart", *arguments],
        env={**environment(), "RMSD_ROLLOUT_TOKEN": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and re.search(expected, done.stderr) and "Traceback" not in done.stderr, done.stderr


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
    with ServerProcess(helper, tmp_path / "server.log", port=port) as found:
        run = subprocess.Popen(
            command(arguments, processes=2),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # After the checkpoint of the second step.
        while run.poll() is None and not list(tmp_path.glob("runs/*/checkpoints/step_*2")):
            time.sleep(0.05)
        found.kill()
        _, errors = run.communicate(timeout=120)
    assert run.returncode, errors[-3000:]
    assert errors.count("rmsd_fast.train: rollout server") == 1 and "rmsd_fast/rollout" not in errors, errors[-3000:]
    assert "continue the run with --resume" in errors
    folder = only_run(tmp_path / "runs")
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
