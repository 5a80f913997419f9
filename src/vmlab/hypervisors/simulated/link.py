"""One connection to a `vmlab simulate`: calls that wait for their answers, and streams.

What the calls mean is the client's; how messages look is in `wire`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from vmlab.hypervisors.base import Progress
from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.simulated.channels import Pipe
from vmlab.hypervisors.simulated.wire import Line, Message, decode, garbled, plain
from vmlab.machine.errors import HypervisorUnavailable, from_record


class Link:
    """One connection to a server: calls that wait for answers, and streams.

    Args:
        line: The connection.
        on_machine: Told what has become of a machine.
    """

    def __init__(self, line: Line, on_machine: Callable[[Message], None]) -> None:
        self.lost: HypervisorUnavailable | None = None
        self._line = line
        self._on_machine = on_machine
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._progress: dict[int, Progress] = {}
        # Streams that the server has begun to fill may not have been asked for yet here.
        self.streams: dict[int, Pipe] = {}
        self.events: dict[int, asyncio.Queue[Message]] = {}
        self._task = asyncio.ensure_future(self._listen())

    def begin(
        self,
        call: str,
        of: Message | None = None,
        arguments: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> tuple[int, asyncio.Future[Any]]:
        """Send a call now; the future is its answer."""
        if self.lost is not None:
            raise self.lost
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        if progress is not None:
            self._progress[number] = progress
        self._line.send({"id": number, "call": call, "of": of, "arguments": plain(arguments or {})})
        return number, answer

    async def call(
        self,
        call: str,
        of: Message | None = None,
        arguments: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        *,
        makes: bool = False,
    ) -> Any:
        """Call and wait; a cancellation is passed on, and its end is waited for.

        A machine that a cancelled call `makes` all the same, because it was done already when the
        cancellation arrived, is deleted again.
        """
        number, answer = self.begin(call, of, arguments, progress)
        try:
            await self._line.drained()
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            await uninterrupted(self._take_back(number, answer, makes))
            raise
        finally:
            # Nobody else asks how it ended.
            if answer.done() and not answer.cancelled():
                answer.exception()

    async def _take_back(self, number: int, answer: asyncio.Future[Any], makes: bool) -> None:
        if not answer.done():
            self._line.send({"cancel": number})
            await asyncio.wait((answer,))
        if makes and not answer.cancelled() and answer.exception() is None:
            await self.call("delete", {"machine": answer.result()["id"]}, {"force": True})

    def pipe(self, number: int) -> Pipe:
        """The bytes of a stream, which may have begun to come already."""
        pipe = self.streams.setdefault(number, Pipe())
        if self.lost is not None:
            pipe.end()
        return pipe

    def queue(self, number: int) -> asyncio.Queue[Message]:
        """The events of a stream, which may have begun to come already."""
        queue = self.events.setdefault(number, asyncio.Queue())
        if self.lost is not None:
            queue.put_nowait({"error": self.lost.to_record()})
        return queue

    def tell(self, call: str, of: Message) -> None:
        """Call without waiting for the answer."""
        _, answer = self.begin(call, of)
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def close(self) -> None:
        """End the connection."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._line.close()

    async def _listen(self) -> None:
        reason = "the connection to the simulated hypervisor was lost"
        try:
            while (message := await self._line.receive()) is not None:
                self._take(message)
        except HypervisorUnavailable as error:
            reason = error.message
        finally:
            self._end(reason)

    def _take(self, message: Message) -> None:
        if "machine" in message:
            self._on_machine(message["machine"])
        elif "stream" in message:
            self._take_stream(message["stream"], message)
        elif "progress" in message:
            progress = self._progress.get(message["id"])
            if progress is not None:
                progress(*message["progress"])
        elif "id" in message:
            self._take_answer(message)
        else:
            raise garbled(f"neither an answer nor news: {sorted(message)}")

    def _take_answer(self, message: Message) -> None:
        number = message["id"]
        self._progress.pop(number, None)
        answer = self._waiting.pop(number, None)
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(from_record(message["error"]))
        elif "cancelled" in message:
            answer.cancel()
        else:
            answer.set_result(message.get("result"))

    def _take_stream(self, number: int, message: Message) -> None:
        if "data" in message:
            self.streams.setdefault(number, Pipe()).feed(decode(message["data"]))
        elif "eof" in message:
            self.streams.setdefault(number, Pipe()).end()
        else:
            self.events.setdefault(number, asyncio.Queue()).put_nowait(message)

    def _end(self, reason: str) -> None:
        self.lost = HypervisorUnavailable(
            reason,
            hint="is `vmlab simulate` still running? A run's machines died with the connection",
            hypervisor="simulated",
        )
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self.lost)
        self._waiting.clear()
        for pipe in self.streams.values():
            pipe.end()
        for queue in self.events.values():
            queue.put_nowait({"error": self.lost.to_record()})
