"""A server of the GDB remote serial protocol (GDB manual, appendix E), for one client at a time.

Threads are harts, numbered from 1. The machine stands while a client is greeted, and stops as a
whole; breakpoints and watchpoints are those of vmlab.engine.accel.stopping, by virtual address.
Whoever hangs up without detaching leaves the machine as it is, without its points.

All of it runs on the thread that owns the machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Final

from vmlab.engine.accel.stopping import NO_POINTS, Points, Watchpoint
from vmlab.engine.control import Control
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.cpu.layout import WATCH_READS, WATCH_WRITES, WATCHPOINTS
from vmlab.engine.debug.files import RemoteFiles
from vmlab.engine.debug.kallsyms import symbol_file, symbols_in
from vmlab.engine.debug.packets import LIMIT, Mark, PacketReader, escaped, packet, unescaped
from vmlab.engine.debug.registers import GENERAL, PC, REGISTERS, target_description
from vmlab.engine.debug.view import read_memory, write_memory
from vmlab.engine.devices.channel import SocketChannel
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.harts import Order, Stop
from vmlab.engine.monitor.commands import CommandError
from vmlab.engine.monitor.server import Place
from vmlab.engine.qapi import RunState

OK: Final = b"OK"
_UNKNOWN: Final = b""
_BAD_ARGUMENT: Final = b"E16"  # EINVAL, in hexadecimal digits as GDB's own server writes them
_BAD_ADDRESS: Final = b"E0e"  # EFAULT
_FULL: Final = b"E1c"  # ENOSPC
_SIGINT, _SIGQUIT, _SIGTRAP, _SIGABRT = 2, 3, 5, 6
_SOFTWARE, _HARDWARE = 0, 1
_KINDS: Final = {2: WATCH_WRITES, 3: WATCH_READS, 4: WATCH_READS | WATCH_WRITES}
_WATCH_NAMES: Final = {
    WATCH_WRITES: "watch",
    WATCH_READS: "rwatch",
    WATCH_READS | WATCH_WRITES: "awatch",
}
_WORKING: Final = b"%Working#" + b"%02x" % (sum(b"Working") & 0xFF)
"""A notification that clients do not know and go on waiting after (GDB manual, E.10)."""
_WORKING_SECONDS: Final = 0.5  # a client waits for two
_EXECUTABLE: Final = "kernel"
"""The name of the file in which a client finds the kernel's symbols."""


class _Wrong(Exception):
    """A packet is not as it has to be; the answer."""

    def __init__(self, answer: bytes = _BAD_ARGUMENT) -> None:
        self.answer = answer
        super().__init__(answer)


class GdbServer:
    """A socket, and the client that may be there.

    Args:
        path: Of the socket, which must not exist.
        reactor: Serves it.
        control: The machine.
        place: Calls functions on the thread that owns it.

    Raises:
        VmlabError: the socket cannot be made.
    """

    def __init__(self, path: Path, reactor: Reactor, control: Control, place: Place) -> None:
        self._control = control
        self._place = place
        self._session: Session | None = None
        self._number = 0  # of the client that it is with
        self._channel = SocketChannel(reactor, path)
        self._channel.attach(self)
        control.changed.append(self._changed)

    # From the reactor's thread.

    def arrived(self) -> None:
        """The client has said something."""
        self._place(self._serve)

    def resume(self) -> None:
        """What the client is sent always has room."""

    def connection_changed(self) -> None:
        """A client has come or gone."""
        self._place(partial(self._met, self._channel.connected, self._channel.number))

    # On the owner's thread. By then the client may have gone, and another one have come: a session
    # reads what its own client has said, and nobody else is sent its answers.

    def _met(self, connected: bool, number: int) -> None:
        if self._session is not None:
            self._session.end()
            self._session = None
        if connected:
            _stop(self._control)
            self._number = number
            self._session = Session(self._control, lambda data: self._channel.send(data, number))
            self._serve()

    def _serve(self) -> None:
        session = self._session
        while session is not None and (data := self._channel.receive(1 << 16, self._number)):
            session.feed(data)

    def _changed(self, status: RunState) -> None:
        if self._session is not None:
            self._session.changed(status)

    def close(self) -> None:
        """Let the client go, and remove the socket."""
        if self._session is not None:
            self._session.finish()
            self._session = None
        self._channel.close()


def _stop(control: Control) -> None:
    """Let the machine stand; a device that is still at work is nothing to who looks at harts."""
    with suppress(CommandError):
        control.stop()


class Session:
    """One client's conversation.

    Args:
        control: The machine.
        send: Sends bytes.
    """

    def __init__(self, control: Control, send: Callable[[bytes], object]) -> None:
        self._control = control
        self._harts = control.machine.harts
        self._send_bytes = send
        self._reader = PacketReader()
        self._files = RemoteFiles({_EXECUTABLE: self._symbol_file})
        self._description = {name: text.encode() for name, text in target_description().items()}
        self._acknowledge = True
        self._last = b""
        self._running = False  # the client waits for the machine to stop
        self._said: set[bytes] = set()  # features of the client's
        self._physical = False
        self._hart = 0  # that registers and memory are of
        self._continued = 0  # that `c` and `s` are for
        self._breakpoints: dict[int, set[int]] = {_SOFTWARE: set(), _HARDWARE: set()}
        self._watchpoints: set[Watchpoint] = set()
        self._set = NO_POINTS
        self._symbols: bytes | None = None

    def _symbol_file(self) -> bytes:
        """The kernel's symbols as a file; the client is kept from losing its patience meanwhile."""
        if self._symbols is None:
            made: list[bytes] = []
            ram = self._control.machine.ram
            work = Thread(target=lambda: made.append(symbol_file(symbols_in(ram))), daemon=True)
            work.start()
            while work.is_alive():
                work.join(_WORKING_SECONDS)
                self._send_bytes(_WORKING)
            (self._symbols,) = made or [b""]
        return self._symbols

    # ------------------------------------------------------------------------------- packets

    def feed(self, data: bytes) -> None:
        """Do what the client says."""
        for each in self._reader.feed(data):
            match each:
                case Mark.INTERRUPT:
                    _stop(self._control)
                case Mark.BROKEN if self._acknowledge:
                    self._send_bytes(b"-")
                case Mark.REPEAT if self._acknowledge:
                    self._send_bytes(self._last)
                case bytes():
                    if self._acknowledge:
                        self._send_bytes(b"+")
                    self._do(each)

    def _send(self, data: bytes) -> None:
        self._last = packet(data)
        self._send_bytes(self._last)

    def _do(self, data: bytes) -> None:
        try:
            answer = self._answer(data)
        except _Wrong as wrong:
            answer = wrong.answer
        except ValueError:  # what should be a number is none
            answer = _BAD_ARGUMENT
        if answer is not None:
            self._send(answer)

    def _answer(self, data: bytes) -> bytes | None:
        """The answer to a packet; None where there is none, or not yet."""
        letter, rest = data[:1].decode("latin-1"), data[1:]
        if letter in "qQv":
            name = data.split(b":", 1)[0].split(b";", 1)[0].split(b",", 1)[0].decode("latin-1")
            handler = _NAMED.get(name)
            return handler(self, data[len(name) :]) if handler is not None else _UNKNOWN
        letters = _LETTERS.get(letter)
        return letters(self, rest) if letters is not None else _UNKNOWN

    # --------------------------------------------------------------------------------- hello

    def _supported(self, rest: bytes) -> bytes:
        self._said = set(rest.lstrip(b":").split(b";"))
        return (
            b"PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;vContSupported+;swbreak+;hwbreak+"
            b";qXfer:exec-file:read+;qXfer:threads:read+" % LIMIT
        )

    def _no_acknowledgement(self, rest: bytes) -> None:
        self._send(OK)
        self._acknowledge = False

    def _transfer(self, rest: bytes) -> bytes:
        what, operation, annex, place = rest.lstrip(b":").decode("latin-1").split(":", 3)
        if operation != "read":
            return _UNKNOWN
        match what:
            case "features":
                content = self._description.get(annex)
            case "threads":
                content = self._threads()
            case "exec-file":
                content = f"/{_EXECUTABLE}".encode()
            case _:
                return _UNKNOWN
        if content is None:
            return b"E00"
        offset, size = (int(part, 16) for part in place.split(","))
        part = content[offset : offset + min(size, LIMIT // 2 - 1)]
        more = offset + len(part) < len(content)
        return (b"m" if more else b"l") + escaped(part)

    def _threads(self) -> bytes:
        lines = "".join(
            f'<thread id="{number + 1:x}" core="{number}" name="hart {number}"/>'
            for number in range(len(self._harts))
        )
        return f'<?xml version="1.0"?><threads>{lines}</threads>'.encode()

    def _thread_list(self, rest: bytes) -> bytes:
        return b"m" + b",".join(b"%x" % (number + 1) for number in range(len(self._harts)))

    def _thread_details(self, rest: bytes) -> bytes:
        number = self._thread(rest.lstrip(b","), self._hart)
        mode = {0: "user", 1: "supervisor", 3: "machine"}[self._mode(number)]
        started = "" if self._harts.is_started(number) else ", not started"
        return f"hart {number}, {mode} mode{started}".encode().hex().encode()

    def _mode(self, number: int) -> int:
        mode = REGISTERS[max(REGISTERS)].read(self._hart_of(number))
        assert mode is not None
        return mode

    def _hart_of(self, number: int) -> Hart:
        return list(self._harts)[number]

    def _thread(self, text: bytes, otherwise: int) -> int:
        """The number of the hart of a thread; 0 and -1 are any."""
        number = int(text, 16)
        if number in (0, -1):
            return otherwise
        if not 1 <= number <= len(self._harts):
            raise _Wrong
        return number - 1

    def _choose(self, rest: bytes) -> bytes:
        number = self._thread(rest[1:], self._hart)
        if rest[:1] == b"g":
            self._hart = number
        else:
            self._continued = number
        return OK

    def _alive(self, rest: bytes) -> bytes:
        self._thread(rest, 0)
        return OK

    # ----------------------------------------------------------------------- registers, memory

    def _read_general(self, rest: bytes) -> bytes:
        return b"".join(self._register(number) for number in range(GENERAL))

    def _register(self, number: int) -> bytes:
        register = REGISTERS.get(number)
        value = register.read(self._hart_of(self._hart)) if register is not None else None
        if value is None:
            raise _Wrong
        return value.to_bytes(8, "little").hex().encode()

    def _read_register(self, rest: bytes) -> bytes:
        return self._register(int(rest, 16))

    def _write_register(self, rest: bytes) -> bytes:
        number, value = rest.split(b"=")
        return self._put(int(number, 16), bytes.fromhex(value.decode("latin-1")))

    def _put(self, number: int, value: bytes) -> bytes:
        register = REGISTERS.get(number)
        if register is None or len(value) != 8 or self._running:
            return _BAD_ARGUMENT
        done = register.write(self._hart_of(self._hart), int.from_bytes(value, "little"))
        return OK if done else _BAD_ARGUMENT

    def _write_general(self, rest: bytes) -> bytes:
        values = bytes.fromhex(rest.decode("latin-1"))
        for number in range(min(GENERAL, len(values) // 8)):
            self._put(number, values[8 * number : 8 * number + 8])
        return OK

    def _read_memory(self, rest: bytes) -> bytes:
        address, size = (int(part, 16) for part in rest.split(b","))
        size = min(size, LIMIT // 2 - 4)
        data = read_memory(self._hart_of(self._hart), address, size, physical=self._physical)
        return data.hex().encode() if data or not size else _BAD_ADDRESS

    def _write_memory(self, rest: bytes) -> bytes:
        where, data = rest.split(b":", 1)
        return self._fill(where, bytes.fromhex(data.decode("latin-1")))

    def _write_binary(self, rest: bytes) -> bytes:
        where, data = rest.split(b":", 1)
        return self._fill(where, unescaped(data))

    def _fill(self, where: bytes, data: bytes) -> bytes:
        address, size = (int(part, 16) for part in where.split(b","))
        if len(data) != size:
            return _BAD_ARGUMENT
        hart = self._hart_of(self._hart)
        done = write_memory(hart, address, data, physical=self._physical)
        return OK if done else _BAD_ADDRESS

    def _physical_mode(self, rest: bytes) -> bytes:
        self._physical = rest == b":1"
        return OK

    def _is_physical(self, rest: bytes) -> bytes:
        return b"%d" % self._physical

    # ---------------------------------------------------------------------------------- points

    def _insert(self, rest: bytes) -> bytes:
        return self._change(rest, inserted=True)

    def _remove(self, rest: bytes) -> bytes:
        return self._change(rest, inserted=False)

    def _change(self, rest: bytes, *, inserted: bool) -> bytes:
        kind, address, size = (int(part, 16) for part in rest.split(b";")[0].split(b","))
        if kind in self._breakpoints:
            change = set.add if inserted else set.discard
            change(self._breakpoints[kind], address)
            return OK
        if kind not in _KINDS:
            return _UNKNOWN
        point = Watchpoint(address, size, _KINDS[kind])
        if not inserted:
            self._watchpoints.discard(point)
        elif len(self._watchpoints | {point}) > WATCHPOINTS:
            return _FULL
        else:
            self._watchpoints.add(point)
        return OK

    def _set_points(self, points: Points) -> None:
        # The client takes its points out at each stop and puts them in again: most often nothing
        # has changed by the time that the machine goes on.
        if points != self._set:
            self._harts.stop_at(points, "gdb")
            self._set = points

    # ----------------------------------------------------------------------------------- going

    def _actions(self, rest: bytes) -> bytes | None:
        orders: dict[int, Order] = {}
        for action in rest.lstrip(b";").split(b";"):
            what, _, thread = action.partition(b":")
            order = _ORDERS.get(what[:1].decode("latin-1"))
            if order is None:
                return _BAD_ARGUMENT
            every = thread in (b"", b"-1")
            numbers = range(len(self._harts)) if every else [self._thread(thread, self._hart)]
            for number in numbers:
                orders.setdefault(number, order)
        return self._go(
            {number: orders.get(number, Order.HOLD) for number in range(len(self._harts))}
        )

    def _continue(self, rest: bytes) -> bytes | None:
        self._jump(rest)
        return self._go({})

    def _continue_with_signal(self, rest: bytes) -> bytes | None:
        return self._continue(rest.partition(b";")[2])

    def _step(self, rest: bytes) -> bytes | None:
        self._jump(rest)
        return self._go({self._continued: Order.STEP})

    def _step_with_signal(self, rest: bytes) -> bytes | None:
        return self._step(rest.partition(b";")[2])

    def _jump(self, address: bytes) -> None:
        if address:
            self._hart_of(self._continued).pc = int(address, 16)

    def _go(self, orders: dict[int, Order]) -> bytes | None:
        """Let the machine run; it is answered when it stops."""
        stepped = [number for number, order in orders.items() if order is Order.STEP]
        if stepped and not self._harts.is_started(stepped[0]):
            return self._stopped(_SIGTRAP, stepped[0])  # it executes nothing
        points = Points(
            frozenset().union(*self._breakpoints.values()), frozenset(self._watchpoints)
        )
        self._set_points(points)
        self._symbols = None  # they move when the kernel does
        self._harts.order(orders)
        self._running = True
        try:
            self._control.cont()
        except CommandError:
            self._running = False
            return self._stopped(_SIGABRT, self._hart)  # it has failed, or is off
        return None

    def changed(self, status: RunState) -> None:
        """The machine runs, or does not."""
        if not self._running or status is RunState.RUNNING:
            return
        self._running = False
        self._harts.order({})
        match status:
            case RunState.DEBUG:
                assert self._control.reason is not None
                self._send(self._trapped(self._control.reason))
            case RunState.SHUTDOWN:
                self._send(b"W00")
            case RunState.INTERNAL_ERROR:
                self._send(self._stopped(_SIGABRT, self._hart))
            case _:
                self._send(self._stopped(_SIGINT, self._hart))

    def _why(self, rest: bytes) -> bytes:
        status, reason = self._control.status, self._control.reason
        if status is RunState.DEBUG and reason is not None:
            return self._trapped(reason)
        return self._stopped(
            _SIGABRT if status is RunState.INTERNAL_ERROR else _SIGTRAP, self._hart
        )

    def _trapped(self, stop: Stop) -> bytes:
        hart, left = self._hart_of(stop.hart), stop.exit
        why = ""
        if left.reason is Reason.BREAKPOINT:
            kind = "hwbreak" if hart.pc in self._breakpoints[_HARDWARE] else "swbreak"
            if f"{kind}+".encode() in self._said:
                why = f"{kind}:;"
        elif left.reason is Reason.WATCHPOINT:
            for point in self._watchpoints:
                apart = left.address - point.address
                overlaps = -left.size < apart < point.size
                if overlaps and point.kinds & left.data:
                    place = max(left.address, point.address)
                    why = f"{_WATCH_NAMES[point.kinds]}:{place:x};"
                    break
        return self._stopped(_SIGTRAP, stop.hart, why)

    def _stopped(self, signal: int, number: int, why: str = "") -> bytes:
        self._hart = self._continued = number
        pc = self._hart_of(number).pc.to_bytes(8, "little").hex()
        return f"T{signal:02x}{why}{PC:02x}:{pc};thread:{number + 1:x};".encode()

    # ------------------------------------------------------------------------------------- end

    def _detach(self, rest: bytes) -> bytes:
        self.end()
        with suppress(CommandError):  # a machine that is off stays off
            self._control.cont()
        return OK

    def _kill(self, rest: bytes) -> bytes | None:
        self.end()
        self._control.quit()
        return None

    def _kill_process(self, rest: bytes) -> bytes | None:
        self._send(OK)
        return self._kill(rest)

    def end(self) -> None:
        """Take the client's points out; the machine stands or runs on as it did."""
        self._running = False
        self._harts.order({})
        self._set_points(NO_POINTS)
        self._control.late.clear()

    def finish(self) -> None:
        """The machine ends: so it is said, if the client waits."""
        if self._running:
            self._running = False
            self._send(b"W00")

    # --------------------------------------------------------------------------------- monitor

    def _monitor(self, rest: bytes) -> bytes:
        """A command of the machine's monitor, with its arguments in JSON."""
        line = bytes.fromhex(rest.lstrip(b",").decode("latin-1")).decode(errors="replace")
        name, _, arguments = line.strip().partition(" ")
        commands = self._control.commands
        try:
            if name in ("", "help"):
                names = [each.name for each in commands.query_commands()]
                text = "a command of the QMP monitor, and its arguments as JSON:\n"
                text += "\n".join(sorted(names)) + "\n"
            else:
                found = commands.find(name)
                given = json.loads(arguments) if arguments.strip() else {}
                if not isinstance(given, dict):
                    raise CommandError('arguments are a JSON object, as in {"file": "trace"}')
                text = json.dumps(found.call(given), indent=2) + "\n"
        except (CommandError, json.JSONDecodeError) as error:
            text = f"{error}\n"
        return text.encode()[: LIMIT // 2 - 4].hex().encode()


_ORDERS: Final = {
    "c": Order.RUN,
    "C": Order.RUN,
    "s": Order.STEP,
    "S": Order.STEP,
    "t": Order.HOLD,
}

_Handler = Callable[[Session, bytes], bytes | None]


def _always(answer: bytes) -> _Handler:
    return lambda session, rest: answer


_LETTERS: Final[dict[str, _Handler]] = {
    "?": Session._why,
    "H": Session._choose,
    "T": Session._alive,
    "g": Session._read_general,
    "G": Session._write_general,
    "p": Session._read_register,
    "P": Session._write_register,
    "m": Session._read_memory,
    "M": Session._write_memory,
    "X": Session._write_binary,
    "Z": Session._insert,
    "z": Session._remove,
    "c": Session._continue,
    "C": Session._continue_with_signal,
    "s": Session._step,
    "S": Session._step_with_signal,
    "D": Session._detach,
    "k": Session._kill,
}
_NAMED: Final[dict[str, _Handler]] = {
    "qSupported": Session._supported,
    "QStartNoAckMode": Session._no_acknowledgement,
    "qXfer": Session._transfer,
    "qfThreadInfo": Session._thread_list,
    "qsThreadInfo": _always(b"l"),
    "qThreadExtraInfo": Session._thread_details,
    "qC": lambda session, rest: b"QC%x" % (session._hart + 1),
    "qAttached": _always(b"1"),
    "qSymbol": _always(OK),
    "qRcmd": Session._monitor,
    "Qqemu.PhyMemMode": Session._physical_mode,
    "qqemu.PhyMemMode": Session._is_physical,
    "vCont?": _always(b"vCont;c;C;s;S;t"),
    "vCont": Session._actions,
    "vKill": Session._kill_process,
    "vFile": lambda session, rest: session._files.answer(rest.lstrip(b":")),
}
