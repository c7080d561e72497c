"""The endpoint against a real HTTP server on loopback that also fails in every way that servers do."""

from __future__ import annotations

import threading
import time

import pytest
from helpers.server import Server, chat, free_port
from helpers.waiting import HANG_S

from r1vl_jax.common.endpoint import (
    MAX_FAILURES_AT_FIRST,
    MAX_FAILURES_IN_A_ROW,
    Endpoint,
    EndpointError,
    EndpointStop,
    in_parallel,
)

HELLO = [{"role": "user", "content": "hello"}]


def says(text, **options):
    return lambda request, number: (200, {}, chat(text, **options))


def in_turn(*replies):
    """The n-th reply, and the last one ever after."""
    return lambda request, number: replies[min(number, len(replies)) - 1]


OK = (200, {}, chat("fine"))


def test_a_reply(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Server(says("hi there")) as server:
        text = Endpoint(server.url, "m", temperature=0.5, max_tokens=7).complete(HELLO)
    assert text == "hi there"
    (request,) = server.requests
    assert request == {"model": "m", "messages": HELLO, "temperature": 0.5, "max_tokens": 7}
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_options_may_be_left_to_the_server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)  # no key is no error: one's own servers want none
    with Server(says("hi")) as server:
        Endpoint(server.url, "m", temperature=None, max_tokens=None).complete(HELLO)
    assert set(server.requests[0]) == {"model", "messages"}


@pytest.fixture
def slept(monkeypatch):
    """The seconds that the client waits between its tries, told instead of waited. Other threads sleep as ever."""
    seconds, sleep = [], time.sleep

    def tell(wait):
        mine = threading.current_thread() is threading.main_thread()
        seconds.append(wait) if mine else sleep(wait)

    monkeypatch.setattr(time, "sleep", tell)
    return seconds


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_failures_of_the_server_are_tried_again(status, slept):
    with Server(in_turn((status, {}, {"error": {"message": "busy"}}), OK)) as server:
        assert Endpoint(server.url, "m", retries=1).complete(HELLO) == "fine"
        assert len(server.requests) == 2
    assert len(slept) == 1


def test_retry_after_is_obeyed(slept):
    with Server(in_turn((429, {"Retry-After": "2"}, {}), OK)) as server:
        assert Endpoint(server.url, "m", retries=1).complete(HELLO) == "fine"
    assert slept == [2.0]


def test_retries_end(slept):
    with Server(in_turn((500, {}, {"error": {"message": "broken"}}))) as server:
        with pytest.raises(EndpointError, match="500.*broken") as caught:
            Endpoint(server.url, "m", retries=1).complete(HELLO)
        assert caught.value.server
        assert len(server.requests) == 2


def test_a_bad_request_is_not_tried_again():
    with Server(in_turn((400, {}, {"error": {"message": "prompt too long"}}))) as server:
        with pytest.raises(EndpointError, match="prompt too long") as caught:
            Endpoint(server.url, "m", retries=3).complete(HELLO)
        assert not caught.value.server
        assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "hint"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "model")])
def test_what_no_request_can_survive_stops(status, hint):
    with Server(in_turn((status, {}, {"error": {"message": "no"}}))) as server:
        with pytest.raises(EndpointStop, match=hint) as caught:
            Endpoint(server.url, "my-model", retries=3).complete(HELLO)
        assert server.url in str(caught.value) and "my-model" in str(caught.value)
        assert len(server.requests) == 1


def test_a_server_that_does_not_answer_in_time(slept):
    """It answers once the client has given up: that is tried again, and is an error where no try is left."""
    given_up = threading.Event()

    def slow_then_fine(request, number):
        if number == 1:
            given_up.wait(HANG_S)
        return OK

    with Server(slow_then_fine) as server:
        # Further tries, since on a busy machine the second reply may come too late as well.
        assert Endpoint(server.url, "m", timeout=0.5, retries=20).complete(HELLO) == "fine"
        assert len(server.requests) >= 2 and not given_up.is_set()
    given_up.set()
    given_up = threading.Event()
    with Server(lambda *_: (given_up.wait(HANG_S), OK)[1]) as server:
        with pytest.raises(EndpointError, match="time limit") as caught:
            Endpoint(server.url, "m", timeout=0.3, retries=0).complete(HELLO)
        assert caught.value.server
        given_up.set()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, {}, b'{"choices": [{"mess'), "unusable"),
        ((200, {"Content-Type": "text/html"}, b"<html>welcome</html>"), "without choices.*welcome"),
        ((200, {"Content-Length": "5000"}, b'{"choices": ['), "no connection"),  # the body ends before its length
        ((200, {}, {"choices": []}), "without choices"),
        ((200, {}, {"choices": None}), "without choices"),
        ((200, {}, {"choices": [{}]}), "without choices"),
        ((200, {}, ["a list"]), "without choices"),
        ((200, {}, chat(None)), "without text"),
        ((200, {}, chat("  \n")), "without text"),
        ((200, {}, chat('{"Steps": [["a', finish="length")), "cut off by max_tokens"),
    ],
)
def test_replies_that_say_nothing(reply, message):
    def answer(request, number):
        return reply

    with Server(answer) as server, pytest.raises(EndpointError, match=message):
        endpoint = Endpoint(server.url, "m", retries=0)
        if "5000" in reply[1].values():
            server.http.RequestHandlerClass.protocol_version = "HTTP/1.0"  # the connection closes after the body
        endpoint.complete(HELLO)


def test_text_that_no_request_can_carry():
    with Server(says("hi")) as server, pytest.raises(EndpointError, match="surrogate"):
        Endpoint(server.url, "m").complete([{"role": "user", "content": "\ud800"}])


def test_no_server():
    with pytest.raises(EndpointError, match="no connection.*refused") as caught:
        Endpoint(f"http://127.0.0.1:{free_port()}/v1", "m", retries=0).complete(HELLO)
    assert caught.value.server


WRONG_URLS = [
    "", "x", "localhost:8000", "ftp://localhost/v1", "file:///etc/passwd", "http://", "http:///v1", "http://a b/v1",
    "http://a:b/v1", "http://a:99999/v1", "http://a:-1/v1", "http://a:0/v1", "http://[::1/v1", "http://a\0/v1",
    "http://a\n/v1", "http://me:password@a:b/v1", "http://\ud800/v1",
]  # fmt: skip


@pytest.mark.parametrize(("url", "model"), [*((url, "m") for url in WRONG_URLS), ("http://localhost/v1", "")])
def test_unusable_arguments(url, model):
    with pytest.raises(ValueError, match="^(url|model): .*expected") as caught:
        Endpoint(url, model)
    assert "\n" not in str(caught.value) and "password" not in str(caught.value)


def test_messages_do_not_have_the_key_nor_the_password(monkeypatch):
    """Messages are printed and stored; a server may send back what it was given."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private-key")
    for status, error in ((400, EndpointError), (401, EndpointStop)):
        body = {"error": {"message": "no: sk-private-key, private-password"}}
        with Server(in_turn((status, {}, body))) as server:
            endpoint = Endpoint(server.url.replace("://", "://me:private-password@"), "m", retries=0)
            with pytest.raises(error, match="no: ") as caught:
                endpoint.complete(HELLO)
        assert "private" not in str(caught.value) and "***" in str(caught.value)


def test_in_parallel_works_at_once_and_gives_results_as_they_finish():
    both = threading.Barrier(2, timeout=HANG_S)
    second_done = threading.Event()

    def work(job):
        both.wait()  # passes only with two at work
        if job == "slow":
            assert second_done.wait(HANG_S)
        else:
            second_done.set()
        return job.upper()

    assert list(in_parallel(work, ["slow", "fast"], threads=2)) == [("fast", "FAST"), ("slow", "SLOW")]


def test_in_parallel_gives_errors_as_values():
    def work(job):
        if job == 1:
            raise EndpointError("no")
        return job

    results = dict(in_parallel(work, range(3), threads=2))
    assert (results[0], results[2]) == (0, 2)
    assert isinstance(results[1], EndpointError)
    assert list(in_parallel(work, [], threads=3)) == []


@pytest.mark.parametrize("error", [ZeroDivisionError, EndpointStop, KeyboardInterrupt])
def test_in_parallel_raises_what_is_no_failed_request(error):
    def work(job):
        raise error("boom")

    with pytest.raises(error, match="boom"):
        list(in_parallel(work, range(50), threads=3))


def test_in_parallel_raises_what_the_jobs_raise():
    def jobs():
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(in_parallel(lambda job: job, jobs(), threads=2))


def test_in_parallel_stops_when_the_server_has_gone():
    tried = []

    def work(job):
        tried.append(job)
        if job >= answered:
            raise EndpointError("refused", server=True)

    for answered, limit in ((0, MAX_FAILURES_AT_FIRST), (1, MAX_FAILURES_IN_A_ROW)):
        tried.clear()
        with pytest.raises(EndpointStop, match=f"{limit} requests in a row failed: refused"):
            list(in_parallel(work, range(10_000), threads=1))
        assert len(tried) == answered + limit


def test_in_parallel_goes_on_after_failures_with_successes_between_or_of_the_request():
    def some(job):
        if job % MAX_FAILURES_IN_A_ROW:
            raise EndpointError("busy", server=True)
        return job

    assert len(list(in_parallel(some, range(100), threads=1))) == 100

    def own_fault(job):
        raise EndpointError("too long")

    assert len(list(in_parallel(own_fault, range(100), threads=1))) == 100


def test_in_parallel_takes_no_more_jobs_once_it_is_closed():
    taken, go_on = [], threading.Event()

    def jobs():
        for i in range(1000):
            taken.append(i)
            yield i

    def work(job):
        if job:
            go_on.wait(HANG_S)
        return job

    before = set(threading.enumerate())
    results = in_parallel(work, jobs(), threads=2)
    next(results)
    results.close()
    go_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG_S)
    assert len(taken) <= 4
