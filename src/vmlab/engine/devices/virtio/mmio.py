"""virtio-mmio, version 2 (virtio 1.2, 4.2): a device's registers in the guest's address space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmlab.engine.devices.virtio.device import FEATURES_OK, VirtioDevice

SIZE: Final = 0x1000
_MAGIC: Final = 0x7472_6976  # "virt"
_VERSION: Final = 2
_VENDOR: Final = 0x424C_4D56  # "VMLB"

_MAGIC_VALUE: Final = 0x000
_VERSION_REGISTER: Final = 0x004
_DEVICE_ID: Final = 0x008
_VENDOR_ID: Final = 0x00C
_DEVICE_FEATURES: Final = 0x010
_DEVICE_FEATURES_SEL: Final = 0x014
_DRIVER_FEATURES: Final = 0x020
_DRIVER_FEATURES_SEL: Final = 0x024
_QUEUE_SEL: Final = 0x030
_QUEUE_NUM_MAX: Final = 0x034
_QUEUE_NUM: Final = 0x038
_QUEUE_READY: Final = 0x044
_QUEUE_NOTIFY: Final = 0x050
_INTERRUPT_STATUS: Final = 0x060
_INTERRUPT_ACK: Final = 0x064
_STATUS: Final = 0x070
_QUEUE_DESC: Final = 0x080
_QUEUE_DRIVER: Final = 0x090
_QUEUE_DEVICE: Final = 0x0A0
_SHM_LEN: Final = 0x0B0
_SHM_BASE: Final = 0x0B8
_CONFIG_GENERATION: Final = 0x0FC
_CONFIG: Final = 0x100

_ADDRESSES: Final = {
    _QUEUE_DESC: "descriptors",
    _QUEUE_DRIVER: "driver",
    _QUEUE_DEVICE: "device",
}


@dataclass
class MmioState:
    """What a snapshot must hold beside the device's state."""

    features_select: int = 0
    driver_features_select: int = 0
    queue_select: int = 0


class VirtioMmio:
    """The window of one device; with None, an empty slot (device id 0, 4.2.3.1.1).

    Args:
        device: The device behind it.
        line: Its interrupt line.
    """

    def __init__(self, device: VirtioDevice | None, line: Callable[[bool], None]) -> None:
        self.device = device
        self.state = MmioState()
        if device is not None:
            device.interrupt = line

    def reset(self) -> None:
        """As at power-on, the device included."""
        self.state = MmioState()
        if self.device is not None:
            self.device.reset()

    def read(self, offset: int, size: int) -> int:
        """Registers are words; the configuration space takes any size. The rest reads as zero."""
        device = self.device
        if offset >= _CONFIG:
            if device is None:
                return 0
            with device.lock:
                config = device.config()[offset - _CONFIG : offset - _CONFIG + size]
            return int.from_bytes(config, "little")
        if size != 4 or offset & 3:
            return 0
        if offset == _MAGIC_VALUE:
            return _MAGIC
        if offset == _VERSION_REGISTER:
            return _VERSION
        if offset == _VENDOR_ID:
            return _VENDOR
        if device is None:
            return 0
        with device.lock:
            return self._read(device, offset)

    def _read(self, device: VirtioDevice, offset: int) -> int:
        state = device.state
        if offset == _DEVICE_ID:
            return device.device_id
        if offset == _DEVICE_FEATURES:
            if self.state.features_select > 1:
                return 0
            return (device.offered >> (32 * self.state.features_select)) & 0xFFFF_FFFF
        if offset == _INTERRUPT_STATUS:
            return state.interrupt_status
        if offset == _STATUS:
            return state.status
        if offset == _CONFIG_GENERATION:
            return state.config_generation
        if _SHM_LEN <= offset < _SHM_BASE + 8:
            return 0xFFFF_FFFF  # there is no shared memory (4.2.2)
        if self.state.queue_select < len(state.queues):
            queue = state.queues[self.state.queue_select]
            if offset == _QUEUE_NUM_MAX:
                return queue.size_max
            if offset == _QUEUE_READY:
                return int(queue.ready)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Registers are words; what is not there is not written."""
        device = self.device
        if device is None:
            return
        if offset >= _CONFIG:
            with device.lock:
                device.write_config(offset - _CONFIG, value.to_bytes(size, "little"))
        elif size == 4 and not offset & 3:
            if offset == _QUEUE_NOTIFY:
                device.notify(value)
                return
            with device.lock:
                self._write(device, offset, value)

    def _write(self, device: VirtioDevice, offset: int, value: int) -> None:
        state = device.state
        if offset == _DEVICE_FEATURES_SEL:
            self.state.features_select = value
        elif offset == _DRIVER_FEATURES_SEL:
            self.state.driver_features_select = value
        elif offset == _DRIVER_FEATURES:
            if not state.status & FEATURES_OK and self.state.driver_features_select < 2:
                shift = 32 * self.state.driver_features_select
                state.features = (state.features & ~(0xFFFF_FFFF << shift)) | value << shift
        elif offset == _QUEUE_SEL:
            self.state.queue_select = value
        elif offset == _INTERRUPT_ACK:
            device.acknowledge(value)
        elif offset == _STATUS:
            device.set_status(value)
        elif self.state.queue_select < len(state.queues):
            self._write_queue(device, offset, value)

    def _write_queue(self, device: VirtioDevice, offset: int, value: int) -> None:
        queue = device.state.queues[self.state.queue_select]
        if offset == _QUEUE_READY:
            device.set_ready(self.state.queue_select, bool(value & 1))
        elif queue.ready:
            return  # the driver must not change a live queue (4.2.2.2)
        elif offset == _QUEUE_NUM:
            queue.size = value & 0xFFFF
        elif offset & ~7 in _ADDRESSES:
            name = _ADDRESSES[offset & ~7]
            address = getattr(queue, name)
            if offset & 4:
                address = (address & 0xFFFF_FFFF) | value << 32
            else:
                address = (address & ~0xFFFF_FFFF) | value
            setattr(queue, name, address)
