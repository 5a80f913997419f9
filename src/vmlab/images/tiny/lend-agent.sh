# Sourced by init before it hands over to a root on a disk: gives that root the agent, without
# changing anything on the disk. Under systemd the agent is a unit that lives in /run; elsewhere
# it is a process in the new root that was started before its init.
# shellcheck shell=sh
mkdir -p /sysroot/run/vmlab
cp /usr/lib/vmlab/agent /sysroot/run/vmlab/agent
if [ -e /sysroot/usr/lib/systemd/systemd ] || [ -e /sysroot/lib/systemd/systemd ]; then
    units=/sysroot/run/systemd/system
    mkdir -p "$units/basic.target.wants"
    cat >"$units/vmlab-agent.service" <<'UNIT'
[Unit]
Description=vmlab's guest agent
IgnoreOnIsolate=yes

[Service]
ExecStart=/bin/sh /run/vmlab/agent
Restart=always
RestartSec=100ms
StartLimitInterval=0
KillMode=process
UNIT
    ln -s ../vmlab-agent.service "$units/basic.target.wants/vmlab-agent.service"
else
    chroot /sysroot /bin/sh -c 'while :; do /bin/sh /run/vmlab/agent; sleep 1; done' \
        </dev/null >/dev/null 2>&1 &
fi
