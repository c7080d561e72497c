"""Sends conversations to a model at an OpenAI-compatible URL, several at a time, and returns one reply for each.

    endpoint = Endpoint("http://localhost:8000/v1", "my-model")
    for job, text in in_parallel(lambda job: endpoint.complete(job.messages), jobs, threads=8): ...

The openai client retries after lost connections, time-outs, and status 408, 409, 429 and 5xx. Before each retry it
waits as long as the server's Retry-After says, or with exponential back-off. If a request still fails, `EndpointError`
is raised and one job fails. If no other job can succeed either (wrong key, wrong address or model, the server does not
answer any more), `EndpointStop` is raised.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from r1vl_jax.common.text import one_line, shown

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

# After this many failures of the server in a row, the remaining jobs are not tried.
MAX_FAILURES_IN_A_ROW = 8
MAX_FAILURES_AT_FIRST = 3  # the limit that applies while the server has not answered any request
_NO_MORE = object()
_STOPPING = {
    401: "the key is wrong or missing; it is read from OPENAI_API_KEY",
    403: "the key in OPENAI_API_KEY may not use this",
    404: "no such address or model; a base URL usually ends in /v1",
}


class EndpointError(Exception):
    """One request failed after all its retries.

    Attributes:
      server: True if the server could not be reached or could not answer now, so that the request was not at fault.
    """

    def __init__(self, message: str, *, server: bool = False) -> None:
        super().__init__(message)
        self.server = server


class EndpointStop(Exception):
    """The endpoint cannot be used. No request can succeed."""


class Endpoint:
    """One model on one server. Several threads may use the same instance.

    Args:
      url: the base URL, which is the part before /chat/completions.
      model: the model's name on that server.
      timeout: time limit of one try, in seconds.
      retries: number of tries after the first.
      temperature: sampling temperature; None uses the server's default.
      max_tokens: token limit of a reply; None uses the server's default.

    Raises:
      ValueError: the URL or the model's name cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 120.0,
        retries: int = 4,
        temperature: float | None = 0.0,
        max_tokens: int | None = 2048,
    ) -> None:
        if not model:
            raise ValueError("model: expected a name")
        self.url, self.model = _checked(url), model
        import openai  # imported here because it loads slowly and most commands need no endpoint

        options = {"temperature": temperature, "max_tokens": max_tokens}
        self._options = {name: value for name, value in options.items() if value is not None}
        # A user's own server needs no key, but the client requires one. A paid server will answer with status 401.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._secrets = [secret for secret in (key, urlsplit(url).password) if secret and len(secret) >= 8]
        try:
            self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)
        except Exception as error:  # its HTTP library has an error of its own for URLs that it cannot read
            raise ValueError(f"url: {self.url!r}; {one_line(error)}") from error

    def complete(self, messages: list[dict[str, Any]]) -> str:
        """Returns the text of the model's reply to a conversation, which is a list of {role, content} messages.

        Raises:
          EndpointError: this request failed, or the reply has no text or was cut off by max_tokens.
          EndpointStop: the key, the address or the model is wrong.
        """
        import openai

        try:
            create: Callable[..., Any] = self._client.chat.completions.create  # the stubs require a class per role
            reply = create(model=self.model, messages=messages, **self._options)
        except openai.APIStatusError as error:
            code, message = error.status_code, self._line(error.message)
            if code in _STOPPING:
                raise EndpointStop(f"{self.url}, model {self.model!r}: {_STOPPING[code]} ({message})") from error
            raise EndpointError(message, server=code in (408, 409, 429) or code >= 500) from error
        except openai.APITimeoutError as error:
            raise EndpointError("no reply within the time limit", server=True) from error
        except openai.APIConnectionError as error:
            raise EndpointError(f"no connection: {self._line(error.__cause__ or error)}", server=True) from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # not JSON; text that UTF-8 cannot encode
            raise EndpointError(f"unusable request or reply: {self._line(error)}") from error
        try:
            choice = reply.choices[0]
            text, finish = choice.message.content, choice.finish_reason
        except (AttributeError, IndexError, TypeError) as error:  # the client does not check what a server sends
            raise EndpointError(f"a reply without choices: {self._line(reply)}") from error
        if finish == "length":
            raise EndpointError(f"the reply was cut off by max_tokens; it starts {self._line(text)!r}")
        if not isinstance(text, str) or not text.strip():
            raise EndpointError(f"a reply without text (finish_reason {self._line(finish)!r})")
        return text

    def _line(self, value: object) -> str:
        """Returns a text in one line for a message, without the key, which a server may send back."""
        text = str(value)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return one_line(text)


def _checked(url: str) -> str:
    """Returns a URL without user name, password and query, as messages show it. Raises ValueError on a wrong one."""
    named = shown(url.rpartition("@")[2])
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:  # a port that is no number up to 65535, a bracket that is not closed
        raise ValueError(f"url: {named}; expected http://HOST:PORT... ({error})") from error
    if parts.scheme not in ("http", "https") or not host or port == 0 or not url.isprintable() or " " in url:
        raise ValueError(f"url: {named}; expected http://HOST... or https://HOST...")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def in_parallel(
    work: Callable[[JobT], ResultT], jobs: Iterable[JobT], threads: int
) -> Generator[tuple[JobT, ResultT | EndpointError], None, None]:
    """Runs `work` on all jobs in `threads` threads. Yields (job, work(job)) in the order in which the jobs finish.

    If `work` raises EndpointError, (job, the error) is yielded. A free thread takes the next job. After the generator
    is closed, no thread takes another job.

    Raises:
      EndpointStop: `work` raised it, or the server failed MAX_FAILURES_IN_A_ROW times in a row (MAX_FAILURES_AT_FIRST
        times if it has not answered any request).
      Any other error that `work` raised.
    """
    rest, lock, stopped = iter(jobs), threading.Lock(), threading.Event()
    finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
    failures, answered = 0, False  # failures of the server in a row; whether it has answered

    def attempt(job: JobT) -> ResultT | EndpointError:
        nonlocal failures, answered
        try:
            result = work(job)
        except EndpointError as error:
            result = error
        with lock:
            failed = isinstance(result, EndpointError) and result.server
            failures, answered = failures + 1 if failed else 0, answered or not failed
            if failures >= (MAX_FAILURES_IN_A_ROW if answered else MAX_FAILURES_AT_FIRST):
                raise EndpointStop(f"no answer from the server: {failures} requests in a row failed: {result}")
        return result

    def worker() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    job: Any = next(rest, _NO_MORE)
                if job is _NO_MORE:
                    break
                finished.put((job, attempt(job)))
            finished.put(_NO_MORE)
        except BaseException as error:  # the iterating thread raises it
            stopped.set()
            finished.put(error)

    for _ in range(threads):
        # Daemon threads, so that Ctrl-C does not wait for open requests.
        threading.Thread(target=worker, daemon=True).start()
    running = threads
    try:
        while running:
            item = finished.get()
            if item is _NO_MORE:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        stopped.set()
