#!/bin/sh
# What may happen while the first command is running already: started by init, in the background.
{
    # Files that are given their size before their contents, as copies are, get huge pages.
    mount -o remount,huge=within_size /
    read -r late </usr/lib/vmlab/modules.late
    # shellcheck disable=SC2086 # the list is meant to be split
    [ -n "$late" ] && modprobe -a $late
    mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
    uevent /usr/lib/vmlab/hotplug &
    /usr/lib/vmlab/hotplug ports
    [ -e /dev/input/event0 ] && acpid -d >/dev/null &
} </dev/null >/dev/null 2>&1 &
