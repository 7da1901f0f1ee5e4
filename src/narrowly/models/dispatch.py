"""Many requests at once: bounded, tried again, within a budget, stopped cleanly."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, TypeVar

from narrowly.errors import NarrowlyError
from narrowly.models.messages import Reply
from narrowly.models.wire import (
    LONGEST_WAIT,
    RefusedError,
    RequestError,
    UnreachableError,
    UnsupportedError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT = 0.5
"""Seconds before the second try; it doubles with each, less a random part."""

FIRST_TRIES = 3
"""Tries at a server from which nothing ever came, before it is said not to be there."""


@dataclass(frozen=True)
class Job:
    """One request, and how its response is read."""

    key: str
    path: str
    body: Callable[[set[str]], dict[str, Any]]
    """Given the fields that the server does not take."""
    read: Callable[[Any], Reply]
    """May raise `RequestError`."""
    tokens: int
    """An estimate, of prompt and reply together, from above."""


@dataclass
class Account:
    """What was sent to a server so far, and what may be."""

    requests: int | None
    tokens: int | None
    sent: int = 0
    used: int = 0
    reserved: int = 0
    """Tokens that requests under way may yet use."""

    def fits(self, tokens: int) -> bool:
        """Whether one more request of so many tokens is within the budget."""
        return (self.requests is None or self.sent < self.requests) and (
            self.tokens is None or self.used + self.reserved + tokens <= self.tokens
        )


@dataclass
class Memory:
    """What is learned of a server while it is asked."""

    reached: bool = False
    """Something came back, if only an error."""
    succeeded: bool = False
    failures: int = 0
    """Requests in a row that failed for good."""
    refused_fields: set[str] = field(default_factory=set)
    resume_at: float = 0.0
    """Before this (the loop's clock) nothing is sent: the server asked for a pause."""


class BudgetError(NarrowlyError):
    """The budget is spent; what was answered is kept."""


class Dispatch:
    """One round of requests.

    Args:
        send: posts a body to a path and gives the parsed JSON, or raises `RequestError`.
        keep: is given each reply as soon as it has come.
        tick: is called for each request that is done with, answered or not.
        concurrency: most requests under way.
        retries: further tries of a request that failed for a passing reason.
        account: counts what is sent, over all rounds.
        memory: what earlier rounds learned.
    """

    def __init__(
        self,
        send: Callable[[str, dict[str, Any]], Awaitable[Any]],
        keep: Callable[[str, Reply], None],
        tick: Callable[[], None],
        *,
        concurrency: int,
        retries: int,
        account: Account,
        memory: Memory,
    ):
        self._send, self._keep, self._tick = send, keep, tick
        self._concurrency, self._retries = concurrency, retries
        self._account, self._memory = account, memory
        self._replies: dict[str, Reply] = {}
        self._why: RequestError | None = None
        self._over_budget = False

    async def run(self, jobs: Sequence[Job]) -> dict[str, Reply]:
        """Every reply; one with an error for each request that failed for good.

        Raises:
            RequestError: no request can be answered, or none is any more; the last one's reason.
            BudgetError: the budget is spent, with the number of requests that are left.
        """
        self._stopping = asyncio.Event()
        self._freed = asyncio.Condition()
        self._jobs = iter(jobs)
        workers = [
            asyncio.create_task(self._work()) for _ in range(min(self._concurrency, len(jobs)))
        ]
        # A server that answered before is given up when it fails as often as requests are under
        # way; one that never did, when all it is first asked fails.
        self._most_failures = self._concurrency if self._memory.succeeded else len(workers)
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self._why:
            raise self._why
        if self._over_budget:
            raise BudgetError(
                f"the budget of {_budget(self._account)} is spent ({self._account.sent} requests, "
                f"{self._account.used} tokens): {len(jobs) - len(self._replies)} of {len(jobs)} "
                "requests remain. What was answered is kept: the same command again goes on."
            )
        return self._replies

    async def _work(self) -> None:
        for job in self._jobs:
            try:
                reply = await self._answer(job)
            except (UnreachableError, RefusedError) as failure:
                return self._stop(failure)
            except RequestError as failure:
                self._memory.failures += 1
                if self._memory.failures >= self._most_failures:
                    return self._stop(failure)
                reply = Reply(None, failure.reason)
            else:
                if reply is None:
                    return
                self._memory.failures, self._memory.succeeded = 0, True
                self._keep(job.key, reply)
            self._replies[job.key] = reply
            self._tick()

    async def _answer(self, job: Job) -> Reply | None:
        """The reply; None where all stops first."""
        tries = 0
        while True:
            await self._sleep(self._memory.resume_at - asyncio.get_running_loop().time())
            if not await self._reserve(job.tokens):
                return None
            used = 0
            try:
                content = await self._send(job.path, job.body(self._memory.refused_fields))
                self._memory.reached, used = True, job.tokens
                reply = job.read(content)
                used = reply.prompt_tokens + reply.completion_tokens or job.tokens
                return reply
            except UnsupportedError as failure:
                if failure.field in self._memory.refused_fields:
                    raise
                self._memory.refused_fields.add(failure.field)
                logger.warning("asked without `%s`: %s", failure.field, failure.reason)
            except RequestError as failure:
                self._memory.reached |= not isinstance(failure, UnreachableError)
                tries += 1
                most = self._retries + 1 if self._memory.reached else FIRST_TRIES
                if not failure.retry or tries >= most:
                    raise
                await self._wait(tries, failure)
            finally:
                await self._release(job.tokens, used)

    async def _wait(self, tries: int, failure: RequestError) -> None:
        if failure.wait is not None:
            # The one that was refused waits with all the others.
            now = asyncio.get_running_loop().time()
            self._memory.resume_at = max(self._memory.resume_at, now + failure.wait)
        backoff = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1))
        await self._sleep(backoff * random.uniform(0.5, 1.0))

    async def _sleep(self, seconds: float) -> None:
        """Sleep, unless all stops."""
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _reserve(self, tokens: int) -> bool:
        """Count a request before it is sent; False where all stops, or nothing is left for it."""
        async with self._freed:
            while not self._stopping.is_set():
                if self._account.fits(tokens):
                    self._account.sent += 1
                    self._account.reserved += tokens
                    return True
                if not self._account.reserved:
                    self._over_budget = True
                    self._stopping.set()
                    self._freed.notify_all()
                    return False
                # Requests under way may use less than they reserved; another thread's tell nobody.
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._freed.wait(), 1.0)
            return False

    async def _release(self, reserved: int, used: int) -> None:
        self._account.reserved -= reserved
        self._account.used += used
        async with self._freed:
            self._freed.notify_all()

    def _stop(self, why: RequestError) -> None:
        self._why = self._why or why
        self._stopping.set()


def _budget(account: Account) -> str:
    limits = {"requests": account.requests, "tokens": account.tokens}
    return " and ".join(f"{limit} {name}" for name, limit in limits.items() if limit is not None)


def run_apart(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in a thread of its own, so that it also works within a notebook's loop.

    Ctrl-C cancels it, and does not wait for it long.
    """
    outcome: Future[T] = Future()
    under_way: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def watched() -> T:
        task = asyncio.current_task()
        assert task is not None
        under_way.append((asyncio.get_running_loop(), task))
        return await main()

    def target() -> None:
        try:
            outcome.set_result(asyncio.run(watched()))
        except BaseException as error:
            outcome.set_exception(error)

    thread = Thread(target=target, daemon=True)
    thread.start()
    try:
        return outcome.result()
    finally:
        if not outcome.done():
            for loop, task in under_way:
                loop.call_soon_threadsafe(task.cancel)
        thread.join(1.0)
