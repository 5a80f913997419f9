#!/bin/sh
# What udev does on larger systems, as far as a tiny image needs it.
#   hotplug ports   give the virtio-serial ports their names below /dev/virtio-ports
#   hotplug         handle one event of the kernel (run by busybox uevent)

link_ports() {
    for port in /sys/class/virtio-ports/*; do
        [ -r "$port/name" ] || continue
        read -r name <"$port/name" || continue
        [ -n "$name" ] && [ ! -e "/dev/virtio-ports/$name" ] &&
            ln -sf "../${port##*/}" "/dev/virtio-ports/$name"
    done
}

if [ "$1" = ports ]; then
    # A port gets its name from the host a moment after it appears: wait for the first one.
    tries=0
    while [ -d /sys/bus/virtio/drivers/virtio_console ] && [ $((tries += 1)) -le 50 ]; do
        set -- /sys/bus/virtio/drivers/virtio_console/virtio*
        [ -e "$1" ] || break
        set -- /sys/class/virtio-ports/*/name
        [ -e "$1" ] && break
        usleep 5000
    done
    link_ports
    exit 0
fi

case $ACTION in
    add)
        [ -n "$MODALIAS" ] && modprobe -b "$MODALIAS" 2>/dev/null
        [ "$SUBSYSTEM" = virtio-ports ] && link_ports
        # A vCPU that has come is used at once, as on larger systems.
        [ "$SUBSYSTEM" = cpu ] && [ -e "/sys$DEVPATH/online" ] && echo 1 >"/sys$DEVPATH/online"
        ;;
    change)
        [ "$SUBSYSTEM" = virtio-ports ] && link_ports
        ;;
    remove)
        [ "$SUBSYSTEM" = virtio-ports ] &&
            for link in /dev/virtio-ports/*; do [ -e "$link" ] || rm -f "$link"; done
        ;;
esac
exit 0
