#!/bin/sh
# The first process of a tiny image: mounts, modules, name, network, agent; then busybox init.
# With root= on the kernel's command line it mounts that instead and hands over to its init.
#
# Understood on the command line:
#   vmlab.hostname=NAME   the guest's name
#   vmlab.net=dhcp|up     configure (or only raise) every network interface before the agent starts
#   vmlab.modules=A,B     load these modules as well
#   vmlab.agent=off       do not start the agent
#   root=DEVICE|LABEL=..|UUID=.. [rootfstype=] [rootflags=] [ro] [init=]   boot from a disk
# Kept short on purpose: every command here is paid for at every boot of an emulated CPU.

export PATH=/usr/bin HOME=/root TERM=linux
mount -t devtmpfs -o nosuid dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

hostname=vmlab net='' extra='' agent=on root='' types='ext4 auto' rootflags='' mode=rw
init=/sbin/init
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
        vmlab.hostname=*) hostname=${word#*=} ;;
        vmlab.net=*) net=${word#*=} ;;
        vmlab.modules=*) extra=${word#*=} ;;
        vmlab.agent=*) agent=${word#*=} ;;
        root=*) root=${word#root=} ;;
        rootfstype=*) types=${word#*=} ;;
        rootflags=*) rootflags=${word#*=} ;;
        ro) mode=ro ;;
        rw) mode=rw ;;
        init=*) init=${word#*=} ;;
    esac
done

# Modules: those that are listed, then those of the devices that are there. The rest is loaded
# while the first command is running (late), for devices that are plugged in later.
load=''
[ -r /usr/lib/vmlab/modules.load ] && read -r load </usr/lib/vmlab/modules.load
IFS=' ,'
# shellcheck disable=SC2086 # the lists are meant to be split
[ -n "$load$extra" ] && modprobe -a $load $extra
unset IFS
present=''
# Of ACPI's devices only QEMU's own: pvpanic on the ISA bus is found nowhere else (QEMU0001).
for file in /sys/bus/virtio/devices/*/modalias /sys/bus/pci/devices/*/modalias \
    /sys/bus/acpi/devices/QEMU*/modalias; do
    read -r alias <"$file" || continue
    present="$present $alias"
    case $alias in virtio:d00000008*) present="$present sd_mod" ;; esac # disks of virtio-scsi
done 2>/dev/null
# shellcheck disable=SC2086 # so is this one
[ -n "$present" ] && modprobe -a -q $present 2>/dev/null

if [ -n "$root" ]; then
    device=$root tries=0
    case $root in LABEL=* | UUID=*) device='' ;; esac
    while :; do
        [ -n "$device" ] || device=$(findfs "$root" 2>/dev/null)
        [ -b "$device" ] && break
        [ $((tries += 1)) -le 500 ] || break
        usleep 20000
    done
    mkdir -p /sysroot
    for type in $types; do # the kernel loads the module of the type that it is told
        mount -t "$type" -o "$mode${rootflags:+,$rootflags}" "$device" /sysroot && break
    done 2>/dev/null
    if [ -e "/sysroot$init" ] || [ -L "/sysroot$init" ]; then
        mount -t tmpfs -o mode=755,nosuid,nodev run /sysroot/run
        if [ "$hostname" != vmlab ]; then
            echo "$hostname" >/proc/sys/kernel/hostname
            echo "$hostname" >/sysroot/run/hostname # over the root's own, for its init
            mount -o bind /sysroot/run/hostname /sysroot/etc/hostname 2>/dev/null
        fi
        # shellcheck source=lend-agent.sh
        [ "$agent" != off ] && [ -r /usr/lib/vmlab/agent ] && . /usr/lib/vmlab/lend-agent
        mount -o move /dev /sysroot/dev
        mount -o move /proc /sysroot/proc
        mount -o move /sys /sysroot/sys
        exec switch_root /sysroot "$init"
    fi
    echo "vmlab: the root $root cannot be mounted, or has no $init; this is the initramfs" >/dev/kmsg
fi

echo "$hostname" >/proc/sys/kernel/hostname
mkdir -p /dev/pts /dev/shm /dev/virtio-ports
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
ln -s /proc/self/fd /dev/fd
ip link set lo up

case $net in
    dhcp | up)
        for interface in /sys/class/net/*; do
            interface=${interface##*/}
            [ "$interface" = lo ] && continue
            ip link set "$interface" up
            [ "$net" = dhcp ] && udhcpc -q -n -t 10 -T 1 -A 1 -s /etc/udhcpc/default.script -i "$interface" >/dev/kmsg 2>&1 &
        done
        wait
        ;;
esac

/usr/lib/vmlab/hotplug ports
for script in /usr/lib/vmlab/boot.d/*; do
    [ -x "$script" ] && "$script"
done

{
    echo '::sysinit:/usr/lib/vmlab/late'
    [ "$agent" != off ] && [ -x /usr/lib/vmlab/agent ] && echo '::respawn:/usr/lib/vmlab/agent'
    read -r consoles </sys/class/tty/console/active
    echo "${consoles##* }::askfirst:-/bin/sh"
    echo '::ctrlaltdel:/sbin/reboot'
    echo '::shutdown:/bin/umount -a -r'
} >/etc/inittab
exec /sbin/init
