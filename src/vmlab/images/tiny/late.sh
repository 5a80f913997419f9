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
    # vCPUs that came before events were listened to; those that the command line leaves out stay so.
    read -r cmdline </proc/cmdline
    case " $cmdline " in *" maxcpus="* | *" nosmp "*) exit ;; esac
    sleep 1
    for cpu in /sys/devices/system/cpu/cpu[0-9]*/online; do
        read -r online <"$cpu" && [ "$online" = 0 ] && echo 1 >"$cpu"
    done
} </dev/null >/dev/null 2>&1 &
