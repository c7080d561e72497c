"""A model behind an OpenAI-compatible URL: one text for one conversation, many at a time.

    endpoint = Endpoint("http://localhost:8000/v1", "my-model")
    for job, text in in_parallel(lambda job: endpoint.complete(job.messages), jobs, threads=8): ...

The openai client does the retries: connections lost, time-outs, 408, 409, 429 and 5xx, with exponential back-off, or
after the seconds that the server's Retry-After names. What is left after them is an `EndpointError` and costs one job;
what no other job can survive either (wrong key, wrong address or model, a server that has gone) is an `EndpointStop`.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# So many failures of the server in a row, no answer between them, and it is taken for gone.
MAX_FAILURES_IN_A_ROW = 8
MAX_FAILURES_AT_FIRST = 3  # before any answer
_NO_MORE = object()
_STOPPING = {
    401: "the key is wrong or missing; it is read from OPENAI_API_KEY",
    403: "the key in OPENAI_API_KEY may not use this",
    404: "no such address or model; a base URL mostly ends in /v1",
}


class EndpointError(Exception):
    """One request failed, retries included.

    Attributes:
      server: the server could not be reached, or said that it cannot answer now; nothing was wrong with the request.
    """

    def __init__(self, message: str, *, server: bool = False):
        super().__init__(message)
        self.server = server


class EndpointStop(Exception):
    """The endpoint cannot be used at all: no request can succeed."""


class Endpoint:
    """One model of one server. Threads may share it.

    Args:
      url: base URL, up to the part before /chat/completions.
      model: the model's name there.
      timeout: seconds for one try.
      retries: tries after the first.
      temperature, max_tokens: as sent; None leaves them to the server.
    Raises:
      ValueError: an argument is unusable.
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
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: {url!r}; expected http://... or https://...")
        if not model:
            raise ValueError("model: expected a name")
        import openai  # here: it takes a while to load, and most commands need no endpoint

        self.url, self.model = url, model
        options = {"temperature": temperature, "max_tokens": max_tokens}
        self._options = {name: value for name, value in options.items() if value is not None}
        # Servers of one's own want no key, but the client does. Without one a paid server answers 401.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)

    def complete(self, messages: list[dict[str, Any]]) -> str:
        """The model's text for a conversation ({role, content} messages).

        Raises:
          EndpointError: this request failed, or its reply has no text or was cut off by max_tokens.
          EndpointStop: the key, the address or the model is wrong.
        """
        import openai

        try:
            reply = self._client.chat.completions.create(model=self.model, messages=messages, **self._options)
        except openai.APIStatusError as error:
            code, message = error.status_code, _short(error.message)
            if code in _STOPPING:
                raise EndpointStop(f"{self.url}, model {self.model!r}: {_STOPPING[code]} ({message})") from error
            raise EndpointError(message, server=code in (408, 409, 429) or code >= 500) from error
        except openai.APITimeoutError as error:
            raise EndpointError("no reply within the time limit", server=True) from error
        except openai.APIConnectionError as error:
            raise EndpointError(f"no connection: {_short(error.__cause__ or error)}", server=True) from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # no JSON; text that UTF-8 cannot carry
            raise EndpointError(f"unusable request or reply: {_short(error)}") from error
        try:
            choice = reply.choices[0]
            text, finish = choice.message.content, choice.finish_reason
        except (AttributeError, IndexError, TypeError) as error:  # the client does not check what a server sends
            raise EndpointError(f"a reply without choices: {_short(reply)}") from error
        if finish == "length":
            raise EndpointError(f"the reply was cut off by max_tokens; it starts {_short(text)!r}")
        if not isinstance(text, str) or not text.strip():
            raise EndpointError(f"a reply without text (finish_reason {finish!r})")
        return text


def in_parallel(work: Callable[[Any], Any], jobs: Iterable, threads: int) -> Iterator[tuple[Any, Any]]:
    """(job, work(job)) of all jobs, in the order in which they finish; for a job that failed, its EndpointError.

    Jobs are taken one by one, when a thread is free. Ending the iteration takes no further ones.

    Raises:
      EndpointStop: from a job, or after MAX_FAILURES_IN_A_ROW failures of the server. Whatever else a job raises.
    """
    rest, lock, stopped = iter(jobs), threading.Lock(), threading.Event()
    finished: queue.SimpleQueue = queue.SimpleQueue()
    failures, answered = 0, False  # of the server, in a row

    def attempt(job: Any) -> Any:
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
                    job = next(rest, _NO_MORE)
                if job is _NO_MORE:
                    break
                finished.put((job, attempt(job)))
            finished.put(_NO_MORE)
        except BaseException as error:  # for the thread that iterates
            stopped.set()
            finished.put(error)

    for _ in range(threads):
        # Daemons: Ctrl-C must not wait for requests under way.
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


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:197] + "..."
