"""The protocol of the standard QEMU guest agent: requests and answers, in step.

QEMU's docs/interop/qemu-ga-ref: JSON lines on a virtio-serial port, one request at a time, each
answered in turn. `guest-sync-delimited` finds the beginning of an answer again after whatever came
between: a request that was cancelled, an agent that began anew, a snapshot that was loaded.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from vmlab.guests.agent import OpenChannel
from vmlab.guests.command import AgentRestarted
from vmlab.hypervisors.base import Channel
from vmlab.machine.errors import ChannelClosed, OperationFailed

_SENTINEL: Final = b"\xff"
_LONGEST_ANSWER: Final = 64 << 20
"""Bytes; the agent itself reads no request that is longer (MAX_TOKEN_SIZE in json-streamer.c)."""

ASK_AGAIN: Final = 5.0
"""Seconds without an answer after which the agent is asked whether it is still the same."""

_ANSWER_WITHIN: Final = 120.0


class QgaPort:
    """The agent's port.

    Args:
        open_channel: Opens a guest channel by name, as `Machine.channel` does.
        name: The channel's name.
    """

    def __init__(self, open_channel: OpenChannel, name: str) -> None:
        self._open = open_channel
        self._name = name
        self._channel: Channel | None = None
        self._lock = asyncio.Lock()
        self._buffer = bytearray()
        self._in_step = False

    async def open(self) -> None:
        """Open it anew and wait until the agent answers, however long that takes."""
        async with self._lock:
            await self.close()
            await self._get_in_step()

    async def call(self, name: str, **arguments: Any) -> Any:
        """Have the agent do one of its commands ("guest-ping"); underscores are hyphens.

        Returns what it answers, as JSON has it.

        Raises:
            OperationFailed: it refuses, or its answer is none.
            AgentRestarted: it began anew meanwhile; whether the command was done is unknown.
            ChannelClosed: the guest died.
        """
        request: dict[str, Any] = {"execute": name}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): arguments[key] for key in arguments}
        async with self._lock:
            if not self._in_step:
                await self._get_in_step()
            self._in_step = False
            try:
                await self._send(json.dumps(request).encode() + b"\n")
                answer = await self._answer(name)
            except ChannelClosed:
                await self.close()
                raise
        if "error" in answer:
            error = answer["error"]
            said = error.get("desc") if isinstance(error, dict) else None
            raise OperationFailed(
                f"the guest's qemu-ga refuses {name}: {said or error}", operation=name
            )
        return answer["return"]

    async def _answer(self, name: str) -> Mapping[str, Any]:
        """The answer to the request that was just sent."""
        token = None
        try:
            async with asyncio.timeout(_ANSWER_WITHIN):
                while True:
                    line = asyncio.ensure_future(self._line())
                    try:
                        while not (await asyncio.wait({line}, timeout=ASK_AGAIN))[0]:
                            # An agent that began anew knows nothing of the request.
                            token = await self._ask_to_sync()
                        text = line.result()
                    finally:
                        line.cancel()
                        await asyncio.wait({line})
                    if text.startswith(_SENTINEL):
                        raise AgentRestarted(
                            f"the guest's qemu-ga began anew before it answered {name}",
                            hint="what became of the command is unknown",
                        )
                    answer = _parsed(text, name)
                    if token is None or "JSON" not in str(answer.get("error")):
                        break
        except TimeoutError:
            raise AgentRestarted(
                f"the guest's qemu-ga has not answered {name} for {_ANSWER_WITHIN:g} s",
                hint="did the agent die? What became of the command is unknown",
            ) from None
        # With a question on its way the next answer is not to the next request.
        self._in_step = token is None
        return answer

    async def _ask_to_sync(self) -> int:
        token = secrets.randbelow(1 << 62)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
        # The sentinel ends what an earlier host may have left unfinished.
        await self._send(_SENTINEL + json.dumps(request).encode() + b"\n")
        return token

    async def _get_in_step(self) -> None:
        """Ask until the answer to that comes; whatever comes before it is dropped."""
        pause = 0.2
        while True:
            # Each question is answered twice (the sentinel itself is an error in JSON), so that
            # only the answer to the last one is the end of what is to be dropped.
            token = await self._ask_to_sync()
            try:
                async with asyncio.timeout(pause):
                    while True:
                        line = await self._line()
                        _, found, rest = line.rpartition(_SENTINEL)
                        if not found:
                            continue
                        with suppress(OperationFailed):
                            if _parsed(rest, "guest-sync-delimited").get("return") == token:
                                self._in_step = True
                                return
            except TimeoutError:
                # It boots, or what was sent went with an agent that is gone.
                pause = min(2 * pause, ASK_AGAIN)
            except ChannelClosed:
                await self.close()
                raise

    async def _send(self, data: bytes) -> None:
        if self._channel is None:
            self._channel = await self._open(self._name)
        await self._channel.write(data)

    async def _line(self) -> bytes:
        """The next line without its end. What has come of one is kept when this is cancelled."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > _LONGEST_ANSWER:
                self._buffer.clear()
                raise OperationFailed(
                    f"the guest's qemu-ga answers more than {_LONGEST_ANSWER >> 20} MiB in a line",
                    hint="is it a qemu-ga?",
                )
            if self._channel is None:
                raise ChannelClosed(f"channel {self._name!r} was closed")
            data = await self._channel.read(1 << 20)
            if not data:
                raise ChannelClosed(
                    f"channel {self._name!r} ended: the guest died or was stopped",
                    hint="the console tells what happened last",
                )
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    async def close(self) -> None:
        """Let go of it; the next request opens it again."""
        channel, self._channel, self._in_step = self._channel, None, False
        self._buffer.clear()
        if channel is not None:
            await channel.close()


# What the agent answers is what a guest says, and may be anything.


def strange(answer: object, name: str) -> OperationFailed:
    """The error of an answer to `name` that is none."""
    text = repr(answer)
    return OperationFailed(
        f"the guest's qemu-ga answered {name} with "
        f"{text if len(text) < 200 else text[:200] + '...'}, which is no answer to that",
        hint="is it a qemu-ga? Its port must be its own",
        operation=name,
    )


def _parsed(line: bytes, name: str) -> Mapping[str, Any]:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        raise strange(line, name) from None
    if not isinstance(answer, dict) or ("return" not in answer and "error" not in answer):
        raise strange(answer, name)
    return answer


def mapping(answer: object, name: str) -> Mapping[str, Any]:
    """An answer that has to be an object. Raises: OperationFailed."""
    if not isinstance(answer, dict):
        raise strange(answer, name)
    return answer


def number(answer: object, name: str) -> int:
    """An answer that has to be a whole number. Raises: OperationFailed."""
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise strange(answer, name)
    return answer


def field(answer: Mapping[str, Any], key: str, kind: type, name: str) -> Any:
    """A field of an answer, which has to be of a kind. Raises: OperationFailed."""
    value = answer.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise strange(answer, name)
    return value


def decoded(text: object, name: str) -> bytes:
    """The bytes that an answer has as base64. Raises: OperationFailed."""
    try:
        return b64decode(text if isinstance(text, str) else b"!", validate=True)
    except (Base64Error, ValueError):
        raise strange(text, name) from None
