"""What a guest's shell does with its devices for the suite: listen to keys and wires, draw, echo.

Each is a command for a POSIX shell with busybox's programs, as the tiny images have it. What has
to be there before something happens (whoever reads a line, a keyboard, a wire) is begun by the
first question and stays.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final

_AWAY: Final = "</dev/null >/dev/null 2>&1 &"
"""How something is left running that has nothing of the agent's open."""

TYPED: Final = f"""
read -r names </sys/class/tty/console/active
line=/dev/${{names##* }} kept=/dev/shm/typed
if ! [ -e $kept ]; then
    : >$kept
    # The shell on the console, or what waits for its Enter, would take what is typed.
    for other in /proc/[0-9]*; do
        process=${{other##*/}}
        [ "$process" != 1 ] && [ "$(readlink $other/fd/0)" = $line ] && kill -STOP $process
    done
    stty -F $line raw -echo
    (exec cat <$line >>$kept) {_AWAY}
fi
cat $kept
"""
"""Prints what was typed on the serial console since the first time."""

PRESSED: Final = f"""
modprobe -q evdev
# Its nodes are made by a thread of the kernel's.
while ! ls /dev/input/event* >/dev/null 2>&1; do usleep 10000; done
for keys in /dev/input/event*; do
    kept=/dev/shm/${{keys##*/}}
    [ -e $keys ] && ! [ -e $kept ] || continue
    : >$kept
    (exec cat <$keys >>$kept) {_AWAY}
done
cat /dev/shm/event*
"""
"""Prints the events of all keyboards since the first time, for `chords`."""

_EVENT: Final = struct.Struct("<qqHHi")
"""struct input_event (include/uapi/linux/input.h) where a long has 64 bits."""
_EV_KEY: Final = 1
_KEY_NAMES: Final = {
    1: "esc",
    **{code: str((code - 1) % 10) for code in range(2, 12)},
    14: "backspace",
    15: "tab",
    **dict(enumerate("qwertyuiop", 16)),
    28: "ret",
    29: "ctrl",
    **dict(enumerate("asdfghjkl", 30)),
    42: "shift",
    **dict(enumerate("zxcvbnm", 44)),
    56: "alt",
    57: "spc",
}
"""Linux's codes of keys (input-event-codes.h) and their names here (vmlab.machine.keys)."""


def chords(events: bytes) -> tuple[str, ...]:
    """The keys in a stream of input events, those held together joined by a dash."""
    found: list[str] = []
    held: dict[int, None] = {}
    pressed: list[int] = []
    by_time = sorted(_EVENT.iter_unpack(events), key=lambda event: event[:2])
    for _seconds, _microseconds, kind, code, value in by_time:
        if kind != _EV_KEY:
            continue
        if value == 1:
            held[code] = None
            pressed.append(code)
        elif value == 0 and held.pop(code, 0) is None and not held:
            found.append("-".join(_KEY_NAMES.get(key, f"key-{key}") for key in pressed))
            pressed = []
    return tuple(found)


_WORDS: Final = 16


def drawing(text: str) -> str:
    """A command that sets QEMU's bochs-display to a mode and draws what stands for `text`.

    For a guest without a driver of it (registers: docs/specs/standard-vga, "MMIO area spec").
    """
    words = struct.unpack(f"<{_WORDS}I", hashlib.shake_128(text.encode()).digest(4 * _WORDS))
    registers = {1: 320, 2: 200, 3: 32, 4: 0x41}
    lines = [
        "for device in /sys/bus/pci/devices/*; do",
        "    read -r vendor <$device/vendor && read -r model <$device/device",
        "    [ $vendor:$model = 0x1234:0x1111 ] || continue",
        "    echo 1 >$device/enable",
        "    { read -r frame _; read -r _; read -r registers _; } <$device/resource",
        "done",
        *(
            f"devmem $((registers + {0x500 + 2 * index})) 16 {value} || exit"
            for index, value in registers.items()
        ),
        *(f"devmem $((frame + {4 * place})) 32 {word} || exit" for place, word in enumerate(words)),
    ]
    return "\n".join(lines)


_PORT: Final = 4242


def address_of(mac: str) -> str:
    """The IPv4 address that a NIC is given for the suite's packets, by its MAC address."""
    return "10." + ".".join(str(byte) for byte in bytes.fromhex(mac.replace(":", ""))[3:])


def _up(mac: str) -> str:
    """Commands that give the NIC its address."""
    return f"""
for nic in /sys/class/net/*; do
    [ "$(cat $nic/address)" = {mac} ] && break
done
nic=${{nic##*/}}
ip link set $nic up && ip address replace {address_of(mac)}/8 dev $nic || exit
"""


def sending(mac: str, to: str) -> str:
    """A command that sends its input from one NIC to another; whether it arrives is not told."""
    # A packet of the suite's is a connection, since busybox's nc knows no others.
    return _up(mac) + f"timeout 30 nc -w 10 {address_of(to)} {_PORT} >/dev/null 2>&1; true"


def receiving(mac: str) -> str:
    """A command that prints what has come since the last time, a line of hexadecimal each."""
    one = "f=/dev/shm/net/$$; cat >$f && mv $f $f.whole"
    return (
        _up(mac)
        + f"""
if ! [ -e /dev/shm/net ]; then
    mkdir /dev/shm/net
    (exec nc -ll -p {_PORT} -e /bin/sh -c '{one}') {_AWAY}
    until grep -q ':{_PORT:04X} 0*:0000 0A ' /proc/net/tcp /proc/net/tcp6; do usleep 20000; done
fi
for packet in /dev/shm/net/*.whole; do
    [ -e $packet ] && xxd -p $packet | tr -d '\\n' && echo && rm $packet
done
true
"""
    )


def echoing(channel: str) -> str:
    """A command after which what comes on a channel is sent back."""
    return f"""
for port in /sys/class/virtio-ports/*; do
    [ "$(cat $port/name)" = {channel} ] && break
done
# Open all the time: what has come when a port is closed is lost. It is at its end for as long as
# nobody has it open on the host.
(exec 5<>/dev/${{port##*/}} && while :; do cat <&5 >&5; usleep 20000; done) {_AWAY}
"""
