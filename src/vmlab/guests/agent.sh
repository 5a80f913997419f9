#!/bin/sh
# vmlab's guest agent: runs commands that the host sends over virtio-serial ports.
# POSIX shell only (dash, busybox ash); the protocol is described in vmlab/guests/agent.py.
#
# agent.sh          serve all slots and the control port until killed
# agent.sh SLOT     serve one of them (what the first form starts; "control" is the control port)
#
# VMLAB_PORTS names a directory that holds the ports, where they are not virtio-serial ports.
#
# A slot is served by a process of a foreground pipeline and not by `&`, because a shell makes what
# it starts with `&` ignore SIGINT for good.

slots='0 1 2 3 4 5 6 7'
NL='
'

find_port() { # NAME: sets PORT
    if [ -n "$VMLAB_PORTS" ]; then
        PORT=$VMLAB_PORTS/$1
        [ -e "$PORT" ]
        return
    fi
    for entry in /sys/class/virtio-ports/*; do
        if read -r name 2>/dev/null <"$entry/name" && [ "$name" = "$1" ]; then
            PORT=/dev/${entry##*/}
            [ -e "$PORT" ]
            return
        fi
    done
    return 1
}

# The host sends input as "COUNT SIZE" lines, each followed by COUNT x SIZE bytes; "0 0" ends it.
feed() {
    while read -r count size && [ "$count" -gt 0 ] 2>/dev/null; do
        dd bs="$size" count="$count" iflag=fullblock 2>/dev/null
    done
}

# The command's shell leads a session of its own, tells its process id, and lets go of the port.
launch() { # TOKEN COMMAND
    $setsid sh -c 'printf "\001pid %s %s\n" "$1" "$$" >&3; exec 3>&- 4>&-; eval "$2"' \
        sh "$1" "$2" >&3 2>&4
}

finish() { # TOKEN STATUS
    printf '\001end %s %s\n' "$1" "$2" >&4
    printf '\001end %s %s\n' "$1" "$2" >&3
}

# What the host calls, by lines that are evaluated.

run() { # TOKEN COMMAND
    printf '\001begin %s\n' "$1" >&4
    launch "$1" "$2" </dev/null
    finish "$1" "$?"
}

run_with_input() { # TOKEN COMMAND
    printf '\001begin %s\n' "$1" >&4
    feed <&3 | {
        launch "$1" "$2"
        finish "$1" "$?"
        exec cat >/dev/null
    }
}

ping() { # TOKEN
    printf '\001pong %s\n' "$1" >&3
}

serve() { # SLOT
    if [ "$1" = control ]; then
        name=vmlab.agent
    else
        name=vmlab.$1
    fi
    find_port "$name" || return 1
    exec 3<>"$PORT" || return 1
    if [ "$1" != control ]; then
        find_port "$name.err" || return 1
        exec 4<>"$PORT" || return 1
    fi
    if command -v setsid >/dev/null; then setsid=setsid; else setsid=; fi
    printf '\001hello 1 %s\n' "$$" >&3
    while :; do
        while IFS= read -r line <&3; do
            eval "$line"
        done
        # The host has let go of the port; it may come back.
        sleep 0.1
    done
}

if [ $# -eq 1 ]; then
    serve "$1"
    exit
fi

supervise() { # SLOT
    while :; do
        "$0" "$1"
        sleep 0.2
    done
}

# The control port is the last one that the host declares: when it is there, all are.
until find_port vmlab.agent; do sleep 0.05; done
pipeline='supervise control </dev/null'
for slot in $slots; do
    find_port "vmlab.$slot" || continue
    pipeline="$pipeline | supervise $slot"
done
eval "$pipeline" >/dev/null
