"""Test how replies of servers are read: answers, reasoning, errors, pauses, and flow control."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timezone

import pytest

from rmsd_fast.collect_run.budget import Budget, BudgetReached
from rmsd_fast.collect_run.config import CollectConfig
from rmsd_fast.collect_run.pacing import Pacer
from rmsd_fast.collect_run.replies import Fatal, Refused, Transient, failure, read_reply, retry_after_s, tokens_of


def reply(**message) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "<think>a</think><answer>B</answer>"}, "<think>a</think><answer>B</answer>"),
        ({"content": "<answer>B</answer>", "reasoning_content": "why"}, "<think>why</think><answer>B</answer>"),
        ({"content": "B", "reasoning": "why", "reasoning_content": None}, "<think>why</think>B"),
        # vLLM and OpenRouter send the reasoning under both names.
        ({"content": "B", "reasoning": "why", "reasoning_content": "why"}, "<think>why</think>B"),
        ({"content": "<think>why</think>B", "reasoning": "why"}, "<think>why</think>B"),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "I can't help with that."}, "I can't help with that."),
        ({"content": [{"type": "text", "text": "B."}, {"type": "text", "text": " Yes."}]}, "B. Yes."),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}, {"text": "B"}]},
            "<think>why</think>B",
        ),
    ],
)
def test_text_and_reasoning(message, text):
    assert read_reply(reply(**message)).answers == [(text, "stop")]


def test_finish_reasons_and_usage():
    choices = [{"message": {"content": "x"}, "finish_reason": reason} for reason in ({"type": "length"}, None, 3)]
    read = read_reply(json.dumps({"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 4}}).encode())
    assert [reason for _, reason in read.answers] == ["length", None, None]
    assert tokens_of(read.usage) == (3, 4)
    assert tokens_of({"prompt_tokens": 14, "completion_tokens": 1, "total_tokens": 399}) == (14, 385)
    assert tokens_of({}) is None and tokens_of({"prompt_tokens": True, "completion_tokens": -1}) is None


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (b"<html><head><title>Log in</title>", "garbage", "expected JSON, got an HTML page titled 'Log in'"),
        (b"", "garbage", "got an empty body"),
        (b"[" * 100_000, "garbage", "expected JSON"),
        (b'{"object": "list"}', "garbage", "expected a list of choices"),
        (b'{"choices": []}', "no answer", "at least one choice with a message"),
        (b'{"choices": [{"error": {"code": 502}, "message": {"content": ""}}]}', "no answer", "at least one choice"),
        (b'{"choices": [{"finish_reason": "error", "message": {"content": "failed"}}]}', "no answer", "at least one"),
        (b'{"error": {"code": 429, "message": "slow"}}', "429", "^status 429: slow"),
        (b'{"error": "overloaded"}', "500", "overloaded"),
    ],
)
def test_bodies_that_are_no_answers(data, kind, says):
    with pytest.raises(Transient, match=says) as caught:
        read_reply(data)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("status", "message", "kind", "says"),
    [
        (
            401,
            "Incorrect API key provided",
            Fatal,
            "collect.api_key_env: expected a key that the server accepts, got status 401: Incorrect API key",
        ),
        (403, "no access", Fatal, "set the environment variable that it names"),
        (403, "Your input was flagged", "filtered", "flagged"),
        (403, "moderation is required", "filtered", "moderation"),
        (402, "pay", Fatal, "collect.endpoint: expected an account with credit, got status 402: pay"),
        (429, "You exceeded your current quota", Fatal, "expected an account with credit"),
        (400, "This model's maximum context length is 8192 tokens", "context_too_long", "8192"),
        (413, "", "context_too_long", "413"),
        (400, "m is not a multimodal model", "no_vision", "multimodal"),
        (400, "This model does not support image inputs", "no_vision", "image"),
        (400, "The response was filtered due to the content management policy", "filtered", "policy"),
        (400, "At most 8 image(s) may be provided in one prompt.", "too_many_media", "At most 8"),
        (400, "At most 0 image(s) may be provided in one prompt.", "no_vision", "At most 0"),
        (500, "Cannot load local files without `--allowed-local-media-path`.", "no_files", "local files"),
        (400, "max_tokens=4096 cannot be greater than max_model_len=2048", "context_too_long", "4096"),
        (400, "1 item, which exceeds the pre-allocated encoder cache size 64", "context_too_long", "cache size 64"),
        (
            404,
            "The model `m` does not exist. Valid aliases: n.",
            Fatal,
            "collect.model: expected a model that the serv",
        ),
        (404, 'model "m" not found, try pulling it first', Fatal, "set it to a name that the server lists"),
        (422, "top_p must be below 1", "refused", "top_p"),
        (500, "Only one completion choice is allowed", "refused", "Only one"),
    ],
)
def test_rejections_are_named(status, message, kind, says):
    error = failure(status, {}, json.dumps({"error": {"message": message}}).encode())
    assert says in str(error)
    assert isinstance(error, kind) if isinstance(kind, type) else (isinstance(error, Refused) and error.reason == kind)


def test_messages_of_all_servers_are_shown():
    for body in ({"error": "bad"}, {"message": "bad"}, {"detail": "bad"}, {"error": {"message": "bad"}}):
        assert str(failure(500, {}, json.dumps(body).encode())) == "status 500: bad"
    # vLLM repeats the status as the code.
    repeated = json.dumps({"error": {"message": "bad", "code": 400}}).encode()
    assert str(failure(400, {}, repeated)) == "status 400: bad" and str(failure(422, {}, repeated)).endswith("400: bad")
    assert len(str(failure(500, {}, b"x" * 10_000))) < 400
    assert failure(404, {}, b"").wrong_server and not failure(503, {}, b"").wrong_server
    assert failure(503, {}, b"").overloaded and not failure(408, {}, b"").overloaded


def test_retry_after_in_every_form():
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=timezone.utc)
    for headers, seconds in (
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "1000000"}, 3600.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ):
        assert retry_after_s(headers, now) == seconds, headers


def test_the_number_in_flight_follows_the_server():
    async def work() -> None:
        pacer = Pacer(4, 6)
        started = [await pacer.acquire() for _ in range(4)]
        late = asyncio.create_task(pacer.acquire())
        await asyncio.sleep(0)
        assert pacer.in_flight == 4 and not late.done()
        pacer.overloaded(started[0] + 1e-6, None)
        # The other requests in flight started before the cut.
        pacer.overloaded(started[1], None)
        assert pacer.limit == 2.0
        for _ in range(3):
            pacer.release()
        await asyncio.wait_for(late, 1)
        assert pacer.in_flight == 2
        # An increase of 1 for each round of requests, up to the maximum.
        pacer.succeeded()
        pacer.succeeded()
        assert pacer.limit == pytest.approx(2.5 + 1 / 2.5)
        for _ in range(40):
            pacer.succeeded()
        assert pacer.limit == 6

    asyncio.run(work())


def test_a_pause_holds_all_requests_and_cancelled_ones_pass_their_place_on():
    async def work() -> None:
        loop = asyncio.get_running_loop()
        pacer = Pacer(1, 1)
        start = await pacer.acquire()
        pacer.overloaded(start, 0.05)
        first, second = (asyncio.create_task(pacer.acquire()) for _ in range(2))
        await asyncio.sleep(0)
        pacer.release()
        await asyncio.sleep(0)
        first.cancel()
        assert await asyncio.wait_for(second, 1) >= start + 0.05
        assert loop.time() >= start + 0.05

    asyncio.run(work())


def test_the_budget_is_never_exceeded():
    async def work() -> None:
        budget = Budget(CollectConfig(input_price=10.0, output_price=30.0, max_cost=0.01), (0, 0))
        # 100 prompt and 200 completion tokens cost 0.007.
        first = await budget.reserve(100, 200)
        waiting = asyncio.create_task(budget.reserve(100, 200))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        await budget.settle(first, (100, 50))
        second = await asyncio.wait_for(waiting, 1)
        assert budget.spent == (100, 50)
        await budget.settle(second, (200, 100))
        # The prompt was twice as long as estimated, so later ones are expected to be so too.
        with pytest.raises(BudgetReached):
            await budget.reserve(100, 100)
        await budget.reserve(10, 1)

    asyncio.run(work())


def test_answers_longer_than_their_limit_enlarge_later_reservations():
    async def work() -> None:
        budget = Budget(CollectConfig(max_total_tokens=1000), (0, 0))
        await budget.settle(await budget.reserve(10, 100), (10, 400))
        # 410 + 10 + 4 * 100 fit; 4 * 200 do not.
        with pytest.raises(BudgetReached):
            await budget.reserve(10, 200)
        await budget.reserve(10, 100)

    asyncio.run(work())
