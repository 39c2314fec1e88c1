"""Test how the collector meets servers with limits of their own, and servers that reject everything."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace

import pytest
from collect_runs import answers, collect_plainly, expected, plain_questions, run, write_questions
from teacher_server import RIGHT, Act, TeacherServer, completion, error, question_of, right

from rmsd_fast.collect_run.replies import Fatal
from rmsd_fast.collect_run.requests import request_body


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr("rmsd_fast.collect_run.client.FIRST_BACKOFF_S", 0.002)


def failed(out) -> list[dict]:
    path = out.with_name(f"{out.stem}.failed.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_all_answers_in_one_request_with_seeds(tmp_path):
    out = tmp_path / "pool.jsonl"
    with TeacherServer() as server:
        collect_plainly(plain_questions(tmp_path, 3), [server.url], out, "collect.extra_body={top_k: 20}")
    assert [request["n"] for request in server.requests] == [4, 4, 4]
    assert len({request["seed"] for request in server.requests}) == 3
    assert server.requests[0]["top_k"] == 20 and server.requests[0]["max_tokens"] == 2048
    pool = answers(out)
    assert set(pool) == expected(3)
    # The token counts of a reply belong to its first answer.
    assert pool["q0", 0].usage == {"prompt_tokens": 100, "completion_tokens": 20} and pool["q0", 3].usage == {"with": 0}


def test_requests_share_connections(tmp_path):
    def slow(request, number):
        return replace(right(request, number), delay_s=0.01)

    limits = ["collect.start_concurrency=8", "collect.max_concurrency=8"]
    with TeacherServer(slow) as server:
        collect_plainly(plain_questions(tmp_path, 100), [server.url], tmp_path / "pool.jsonl", *limits)
    assert server.count == 100 and server.connections == server.most_in_flight == 8


def test_endpoints_have_connections_of_their_own(tmp_path):
    """A client that serves two endpoints would keep a connection to both."""

    def slow(request, number):
        return replace(right(request, number), delay_s=0.01)

    limits = ["collect.start_concurrency=4", "collect.max_concurrency=4"]
    with TeacherServer(slow) as one, TeacherServer(slow) as two:
        collect_plainly(plain_questions(tmp_path, 100), [one.url, two.url], tmp_path / "pool.jsonl", *limits)
    assert one.count + two.count == 100
    assert one.connections <= 4 and two.connections <= 4


@pytest.mark.parametrize("rejects", [False, True])
def test_servers_without_n(tmp_path, rejects):
    def one(request, number):
        if rejects and "n" in request:
            return error(400, "Only n=1 is supported")
        return completion(RIGHT)

    out = tmp_path / "pool.jsonl"
    with TeacherServer(one) as server:
        collect_plainly(plain_questions(tmp_path, 30), [server.url], out, "collect.start_concurrency=1")
    assert set(answers(out)) == expected(30) and len(out.read_text().splitlines()) == 120
    # An ignored n costs nothing, and each rejected one is a request.
    assert server.count <= 120 + (30 if rejects else 0)
    singles = [request for request in server.requests if "n" not in request]
    assert len({request["seed"] for request in singles}) == len(singles) >= 80


def test_more_choices_than_requested_are_ignored(tmp_path):
    with TeacherServer(lambda request, number: completion(*[RIGHT] * 9)) as server:
        collect_plainly(plain_questions(tmp_path, 2), [server.url], tmp_path / "pool.jsonl")
    assert set(answers(tmp_path / "pool.jsonl")) == expected(2) and server.count == 2


def test_empty_answers_refusals_and_truncated_answers_are_data(tmp_path):
    replies = {
        "0": completion(None, None, None, None),
        "1": completion(*["I'm sorry, but I cannot help with that."] * 4),
        "2": completion(*["<think>a</think><answer>B"] * 4, reason="length"),
        "3": completion(*["The answer is **B**."] * 4),
    }
    out = tmp_path / "pool.jsonl"
    with TeacherServer(lambda request, _: replies[question_of(request).split(" in ")[1][0]]) as server:
        collect_plainly(plain_questions(tmp_path, 4), [server.url], out)
    pool = answers(out)
    assert [pool[f"q{i}", 0].reason for i in range(4)] == ["empty", "refusal", "truncated", None]
    assert [pool[f"q{i}", 0].valid for i in range(4)] == [False, False, False, True]
    assert pool["q3", 0].raw == "The answer is **B**." and pool["q3", 0].quality == 1
    assert pool["q3", 0].text == "<think></think><answer>B</answer>"
    assert pool["q1", 0].text == "I'm sorry, but I cannot help with that." and pool["q1", 0].raw is None


def test_rejected_requests_are_noted_and_not_repeated(tmp_path, caplog):
    def script(request, number):
        if " 1?" in question_of(request):
            return error(400, "This model's maximum context length is 8192 tokens")
        return right(request, number)

    out, questions = tmp_path / "pool.jsonl", plain_questions(tmp_path, 3)
    with TeacherServer(script) as server:
        collection = collect_plainly(questions, [server.url], out)
        (record,) = failed(out)
        assert (record["id"], record["k"], record["reason"]) == ("q1", [0, 1, 2, 3], "context_too_long")
        assert "8192 tokens" in record["error"] and "video.num_frames" in record["todo"]
        assert collection.refused == {"context_too_long": 4}
        assert "question 'q1': context_too_long" in caplog.text
        before = server.count
        collect_plainly(questions, [server.url], out)
        assert server.count == before
        server.script = right
        collect_plainly(questions, [server.url], out, "collect.retry_failed=true")
    assert set(answers(out)) == expected(3) and failed(out) == []


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (error(401, "Incorrect API key provided: sk-secret"), "expected a key that the server accepts, got status 401"),
        # The message is cut in the middle of the key.
        (error(401, "x" * 295 + "sk-secret"), r"got status 401: x*\[API …; set"),
        (Act(b"<html><title>" + b"x" * 295 + b"sk-secret</title></html>"), r"HTML page titled 'x*\[API …'"),
        (error(400, "m is not a multimodal model"), "got 5 rejections and no answer, first .*use a model that accepts"),
        (error(404, "The model `m` does not exist"), "collect.model: .*404: The model `m` does not exist; set it to"),
        (error(404, "Not Found"), "got status 404: Not Found; check the URL and collect.model"),
        (Act(b"<html><title>Welcome</title></html>"), "got expected JSON, got an HTML page titled 'Welcome'"),
        (Act(b"", 301, {"Location": "http://elsewhere/"}), "status 301"),
        (error(429, "You exceeded your current quota"), "expected an account with credit"),
    ],
)
def test_errors_that_every_request_would_meet_stop_the_collection(tmp_path, act, says, monkeypatch, caplog):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    out = tmp_path / "pool.jsonl"
    with TeacherServer(lambda request, number: act) as server, pytest.raises(Fatal, match=says) as caught:
        collect_plainly(plain_questions(tmp_path, 40), [server.url], out, "collect.api_key_env=[TEACHER_KEY]")
    assert server.count <= 40 and failed(out) == []
    assert "Authorization: Bearer sk-secret" in server.headers[0]
    # The key is in the header only, even if the server repeats it.
    assert "sk-" not in f"{caught.value}{caplog.text}{out.read_text() if out.exists() else ''}"


def test_answers_that_no_server_gave_are_counted_once(tmp_path, capsys):
    """A collection that stops notes no rejection, so its answers are only missing."""
    says = "At most 8 image(s) may be provided in one prompt."
    with TeacherServer(lambda request, number: error(400, says)) as server:
        assert run(write_questions(tmp_path, 2), server.url, tmp_path / "pool.jsonl") == 2
    # The server does not reject `n`, so no question is asked again for one answer.
    assert [request["n"] for request in server.requests] == [4, 4]
    output = capsys.readouterr()
    assert "still missing: 8 answers\n" in output.out and "rejected for good" not in output.out
    assert "got 2 rejections and no answer, first status 400: At most 8 image(s)" in output.err
    assert "lower video.num_frames, or raise the limit of the server" in output.err


def test_a_server_that_does_not_answer_any_more(tmp_path):
    def script(request, number):
        return right(request, number) if number < 3 else error(503, "restarting")

    out = tmp_path / "pool.jsonl"
    with TeacherServer(script) as server, pytest.raises(Fatal, match=r"within collect.outage_s=0.2, got none .*503"):
        collect_plainly(plain_questions(tmp_path, 40), [server.url], out, "collect.outage_s=0.2")
    assert len(answers(out)) == 12


def test_replies_that_are_too_large(tmp_path, caplog):
    huge = completion("x" * 10_000_000)

    def script(request, number):
        return huge if " 0?" in question_of(request) else right(request, number)

    out = tmp_path / "pool.jsonl"
    with TeacherServer(script, keep=False) as server:
        collection = collect_plainly(plain_questions(tmp_path, 3), [server.url], out, "collect.attempts=2")
    assert set(answers(out)) == expected(3) - expected(1) and collection.gave_up == 4
    assert "question 'q0': 2 attempts failed, the last with a reply of more than 8 MiB" in caplog.text


def test_retry_after_is_waited_for(tmp_path):
    def script(request, number):
        return error(429, "later", retry_after="0.3") if number == 0 else right(request, number)

    with TeacherServer(script) as server:
        collect_plainly(
            plain_questions(tmp_path, 2), [server.url], tmp_path / "pool.jsonl", "collect.start_concurrency=1"
        )
    assert server.times_s[1] - server.times_s[0] >= 0.3


def test_the_budget_stops_the_collection(tmp_path):
    prices = ["collect.input_price=10", "collect.output_price=10", "collect.max_tokens=100"]
    out, questions = tmp_path / "pool.jsonl", plain_questions(tmp_path, 50)
    with TeacherServer() as server:
        # A reply costs 0.0012, and a request reserves up to 0.005.
        collection = collect_plainly(questions, [server.url], out, *prices, "collect.max_cost=0.03")
        assert collection.stopped == "the budget is reached"
        assert 15 <= server.count <= 25 and len(answers(out)) == 4 * server.count
        # The budget is that of the pool.
        again = collect_plainly(questions, [server.url], out, *prices, "collect.max_cost=0.03")
        assert again.stopped and again.budget.spent[0] * 1e-5 + again.budget.spent[1] * 1e-5 <= 0.03
        collect_plainly(questions, [server.url], out, *prices, "collect.max_cost=1")
    assert set(answers(out)) == expected(50) and server.count == 50


def test_a_budget_needs_token_counts(tmp_path):
    questions, out = plain_questions(tmp_path, 50), tmp_path / "p.jsonl"
    says = r"expected token counts \(`usage`\) in each reply"
    script = lambda request, number: completion(*[RIGHT] * 4, usage=None)  # noqa: E731
    with TeacherServer(script) as server, pytest.raises(Fatal, match=says):
        collect_plainly(questions, [server.url], out, "collect.max_total_tokens=9000000")
    assert server.count < 50 and len(answers(tmp_path / "p.jsonl")) == 4 * server.count


def test_several_models_and_endpoints(tmp_path):
    out = tmp_path / "pool.jsonl"
    with TeacherServer() as first, TeacherServer() as second:
        models = ["collect.model=[a,b]", "collect.k=3"]
        collect_plainly(plain_questions(tmp_path, 4), [first.url, second.url], out, *models)
    pool = answers(out)
    assert {k: pool["q0", k].model for k in range(3)} == {0: "a", 1: "b", 2: "a"}
    assert [request["model"] for request in first.requests] == ["a"] * 4
    assert [request.get("n") for request in first.requests] == [2] * 4
    assert [request["model"] for request in second.requests] == ["b"] * 4
    with TeacherServer() as first, TeacherServer() as second:
        replicas = tmp_path / "replicas.jsonl"
        collect_plainly(plain_questions(tmp_path, 40), [first.url, second.url], replicas)
    assert set(answers(replicas)) == expected(40) and min(first.count, second.count) >= 10


def test_servers_on_this_machine_need_no_proxy(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with TeacherServer() as server:
        urls = [server.url.replace("127.0.0.1", "localhost"), server.url]
        collect_plainly(plain_questions(tmp_path, 4), urls, tmp_path / "pool.jsonl")
    assert set(answers(tmp_path / "pool.jsonl")) == expected(4)


def test_one_log_message_for_each_problem(tmp_path, caplog):
    """The HTTP client itself would log each URL."""
    caplog.set_level(logging.INFO)
    with TeacherServer() as server:
        collect_plainly(plain_questions(tmp_path, 3), [server.url], tmp_path / "pool.jsonl")
    assert caplog.text == ""


def test_requests_that_are_rejected_with_and_without_n(tmp_path):
    def script(request, number):
        return error(422, "no") if " 2?" in question_of(request) else completion(RIGHT)

    out = tmp_path / "pool.jsonl"
    with TeacherServer(script) as server:
        collection = collect_plainly(plain_questions(tmp_path, 4), [server.url], out, "collect.start_concurrency=1")
    assert collection.refused == {"refused": 4} and set(answers(out)) == expected(4) - {("q2", k) for k in range(4)}
    assert [record["k"] for record in failed(out)] == [[0, 1, 2, 3]]


def test_one_of_two_servers_rejects_everything(tmp_path):
    out = tmp_path / "pool.jsonl"
    questions = plain_questions(tmp_path, 40)
    says = "b: expected answers, got 5 rejections and no answer"
    with TeacherServer() as one, TeacherServer(lambda *_: error(400, "no")) as two, pytest.raises(Fatal, match=says):
        collect_plainly(questions, [one.url, two.url], out, "collect.model=[a,b]", "collect.k=2")
    assert failed(out) == [] and {k for _, k in answers(out)} == {0}


def test_a_long_pause_is_no_outage(tmp_path):
    def script(request, number):
        return error(503, "later", retry_after="0.4") if number < 2 else right(request, number)

    with TeacherServer(script) as server:
        overrides = ["collect.outage_s=0.3", "collect.start_concurrency=1"]
        collect_plainly(plain_questions(tmp_path, 2), [server.url], tmp_path / "pool.jsonl", *overrides)
    assert set(answers(tmp_path / "pool.jsonl")) == expected(2)


# Nothing listens there.
DEAD = "http://127.0.0.1:1/v1"


@pytest.mark.parametrize("fails", ["refuses", "500", "garbage"])
def test_a_broken_replica_gets_few_requests(tmp_path, fails, monkeypatch):
    monkeypatch.setattr("rmsd_fast.collect_run.client.FIRST_BACKOFF_S", 0.05)
    acts = {"500": error(500, "no GPU"), "garbage": Act(b"<html></html>"), "refuses": Act()}
    slow = lambda request, number: replace(right(request, number), delay_s=0.05)  # noqa: E731
    out = tmp_path / "pool.jsonl"
    with TeacherServer(slow) as good, TeacherServer(lambda *_: acts[fails]) as broken:
        urls = [DEAD if fails == "refuses" else broken.url, good.url]
        collection = collect_plainly(plain_questions(tmp_path, 200), urls, out, "collect.max_concurrency=16")
    (client,) = collection.clients
    assert set(answers(out)) == expected(200) and collection.gave_up == 0
    # A burst for each period of rest, whose length doubles.
    assert client.counts["requests"] - client.counts["answered"] <= 100


def test_a_dead_replica_does_not_stop_a_collection_that_waits_for_its_first_answer(tmp_path, monkeypatch):
    monkeypatch.setattr("rmsd_fast.collect_run.client.FIRST_BACKOFF_S", 0.02)
    slow = lambda request, number: replace(right(request, number), delay_s=0.5)  # noqa: E731
    with TeacherServer(slow) as server:
        collect_plainly(plain_questions(tmp_path, 16), [DEAD, server.url], tmp_path / "pool.jsonl")
    assert set(answers(tmp_path / "pool.jsonl")) == expected(16)
    with pytest.raises(Fatal, match="expected a server with chat completions, got .*; check the URL"):
        collect_plainly(plain_questions(tmp_path, 30), [DEAD, "http://127.0.0.1:2/v1"], tmp_path / "other.jsonl")


@pytest.mark.parametrize("wait", ["0", "Thu, 01 Jan 2015 12:00:00 GMT"])
def test_a_pause_of_zero_does_not_remove_the_back_off(tmp_path, wait, monkeypatch):
    monkeypatch.setattr("rmsd_fast.collect_run.client.FIRST_BACKOFF_S", 0.05)
    start_s = time.monotonic()

    def script(request, number):
        return right(request, number) if time.monotonic() > start_s + 1 else error(429, "slow down", retry_after=wait)

    with TeacherServer(script) as server:
        collect_plainly(plain_questions(tmp_path, 2), [server.url], tmp_path / "pool.jsonl")
    assert set(answers(tmp_path / "pool.jsonl")) == expected(2)
    # The pauses are at least 0.025, 0.05, 0.1, 0.2, 0.4 and 0.8 seconds.
    assert server.count <= 2 * 7


def test_forbidden_requests(tmp_path):
    """A server that has answered accepts the key, so its 403 concerns the request."""

    def script(request, number):
        text = question_of(request)
        if " 3?" in text:
            return error(403, "Your chosen model requires moderation. Your input was flagged.")
        return error(403, "not for you") if " 2?" in text else right(request, number)

    out, questions = tmp_path / "pool.jsonl", plain_questions(tmp_path, 4)
    with TeacherServer(script) as server:
        collection = collect_plainly(questions, [server.url], out, "collect.start_concurrency=1")
        assert collection.refused == {"refused": 4, "filtered": 4} and set(answers(out)) == expected(2)
        assert {record["id"]: record["error"] for record in failed(out)} == {
            "q2": "status 403: not for you",
            "q3": "status 403: Your chosen model requires moderation. Your input was flagged.",
        }
        with pytest.raises(Fatal, match="expected a key that the server accepts, got status 403: not for you"):
            collect_plainly(questions[2:3], [server.url], tmp_path / "other.jsonl")


def test_a_rejection_is_noted_if_the_pool_has_answers_of_the_model(tmp_path):
    script = lambda request, number: error(400, "no") if " 2?" in question_of(request) else right(request, number)  # noqa: E731
    out, questions = tmp_path / "pool.jsonl", plain_questions(tmp_path, 3)
    with TeacherServer(script) as server:
        collect_plainly(questions[:2], [server.url], out)
        assert collect_plainly(questions, [server.url], out).refused == {"refused": 4}
        before = server.count
        collect_plainly(questions, [server.url], out)
        assert server.count == before and [record["id"] for record in failed(out)] == ["q2"]


def test_only_requests_in_flight_have_a_body(tmp_path, monkeypatch):
    made, answered, waiting = [], [], []

    def body(*args, **fields):
        made.append(1)
        return request_body(*args, **fields)

    def script(request, number):
        waiting.append(len(made) - len(answered))
        answered.append(1)
        return replace(right(request, number), delay_s=0.01)

    monkeypatch.setattr("rmsd_fast.collect_run.loop.request_body", body)
    with TeacherServer(script) as server:
        settings = ["collect.start_concurrency=2", "collect.max_concurrency=2", "collect.several=never"]
        collect_plainly(plain_questions(tmp_path, 10), [server.url], tmp_path / "pool.jsonl", *settings)
    assert len(made) == 40 and max(waiting) <= 2


def test_reasoning_outside_of_the_completion_counts_for_the_budget(tmp_path):
    usage = {"prompt_tokens": 14, "completion_tokens": 1, "total_tokens": 414}
    with TeacherServer(lambda request, _: completion(*[RIGHT] * 4, usage=usage)) as server:
        settings = ["collect.max_tokens=100", "collect.max_total_tokens=2000", "collect.start_concurrency=1"]
        collection = collect_plainly(plain_questions(tmp_path, 20), [server.url], tmp_path / "pool.jsonl", *settings)
    assert collection.budget.spent == (14 * 4, 400 * 4) and server.count == 4
