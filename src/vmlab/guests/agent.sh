#!/bin/sh
# vmlab's guest agent: runs commands that the host sends over virtio-serial ports.
# POSIX shell only (dash, busybox ash); the protocol is described in vmlab/guests/agent.py.
#
# agent.sh          serve all slots and the control port until killed
# agent.sh SLOT     serve one of them (what the first form starts; "control" is the control port)
#
# VMLAB_PORTS names a directory that holds the ports, where they are not virtio-serial ports.
#
# On an emulated CPU starting a program takes 5 ms and reading a byte with `read` 0.04 ms: a command
# is run by a fork of this shell, and lines are short. A slot is served by a process of a foreground
# pipeline and not by `&`, because a shell makes what it starts with `&` ignore SIGINT for good.

slots='0 1 2 3 4 5 6 7'
NL='
'
SOH=$(printf '\001')

find_port() { # NAME: sets PORT
    if [ -n "$VMLAB_PORTS" ]; then
        PORT=$VMLAB_PORTS/$1
        [ -e "$PORT" ]
        return
    fi
    for entry in /sys/class/virtio-ports/*; do
        if read -r found 2>/dev/null <"$entry/name" && [ "$found" = "$1" ]; then
            PORT=/dev/${entry##*/}
            [ -e "$PORT" ]
            return
        fi
    done
    return 1
}

# The host sends input as "COUNT SIZE" lines, each followed by COUNT x SIZE bytes; "0 0" ends it.
# Where it ends otherwise nobody is there any more, and the command is told as by a terminal.
feed() {
    while read -r count size; do
        [ "$count" -gt 0 ] 2>/dev/null || return 0
        dd bs="$size" count="$count" iflag=fullblock 2>/dev/null
    done
    hang_up
}

# The other part of the pipeline that this process feeds has the command for its child.
hang_up() {
    cd -P /proc/self
    for process in $(cat "/proc/$$/task/$$/children"); do
        [ "$process" = "${PWD#/proc/}" ] && continue
        below= MEMBERS=
        read -r below 2>/dev/null <"/proc/$process/task/$process/children"
        # shellcheck disable=SC2086 # it is a list
        members $below
        # shellcheck disable=SC2086 # so is this
        [ -z "$MEMBERS" ] || kill -HUP $MEMBERS 2>/dev/null
    done
}

# What a command of `fill` calls to have its input as its output: one copy less than by a pipe, and
# on an emulated CPU twice as fast. Another number than 0 at the end: the host gives up.
take() {
    {
        while read -r count size && [ "$count" -gt 0 ] 2>/dev/null; do
            said=$(dd bs="$size" count="$count" iflag=fullblock 2>&1 >&5) && continue
            printf '%s\n' "$said" >&2
            whole=${said%%+* records in*} whole=${whole##*[!0-9]}
            [ "${whole:-$count}" -ge "$count" ] ||
                dd bs="$size" count="$((count - whole))" iflag=fullblock of=/dev/null 2>/dev/null
            return 1
        done
    } 5>&1
    [ "$count" = 0 ]
}

# What nobody took of the input, up to the line that the host ends it with.
skip() { # TOKEN
    while read -r count size && [ "$count $size" != "0 $1" ]; do
        [ "$count" -gt 0 ] 2>/dev/null &&
            dd bs="$size" count="$count" iflag=fullblock of=/dev/null 2>/dev/null
    done
}

# A fork of this shell tells its process id, lets go of the ports, forgets what is the agent's, and
# becomes the command.
launch() { # TOKEN COMMAND [take]
    (
        cd -P /proc/self
        printf '\001pid %s %s\n' "$1" "${PWD#/proc/}" >&3
        cd /
        exec >&3 2>&4 3>&- 4>&-
        trap - INT # which dash would put off while it starts a program
        [ -n "$3" ] || unset -f take
        unset -f run pipe fill text ping signal wake reset find_port feed hang_up launch finish members \
            serve skip supervise
        unset OLDPWD PORT ERROR NL SOH slots holders adopted held now status token process name found \
            line entry count size AGENT VMLAB_PORTS
        eval "set --
$2"
    )
}

# A process that outlives its command and still has the ports open would write into the output of
# the next one: init's children are looked at for such, and the host is told ("held").
finish() { # TOKEN STATUS
    held=
    read -r now 2>/dev/null </proc/1/task/1/children
    if [ "$now" != "$adopted" ]; then
        for process in $now; do
            case " $adopted " in *" $process "*) continue ;; esac
            if [ "/proc/$process/fd/1" -ef "$PORT" ] || [ "/proc/$process/fd/2" -ef "$ERROR" ]; then
                holders="$holders $process"
            fi
        done
        adopted=$now
    fi
    if [ -n "$holders" ]; then
        set -- "$1" "$2" $holders
        token=$1 status=$2 holders=
        shift 2
        for process; do
            case " $now " in *" $process "*) holders="$holders $process" held=' held' ;; esac
        done
        set -- "$token" "$status"
    fi
    printf '\001end %s %s\n' "$1" "$2" >&4
    printf '\001end %s %s%s\n' "$1" "$2" "$held" >&3
}

# What the host calls, by lines that begin with SOH.

run() { # TOKEN COMMAND
    printf '\001begin %s\n' "$1" >&4
    launch "$1" "$2" </dev/null
    finish "$1" "$?"
}

pipe() { # TOKEN COMMAND: with input
    printf '\001begin %s\n' "$1" >&4
    feed <&3 | {
        launch "$1" "$2"
        status=$?
        exec 5<&0 </dev/null
        finish "$1" "$status"
        exec cat <&5 >/dev/null
    }
}

fill() { # TOKEN COMMAND: with input that it takes
    printf '\001begin %s\n' "$1" >&4
    launch "$1" "$2" take <&3
    status=$?
    finish "$1" "$status"
    [ "$status" = 0 ] || skip "$1" <&3
}

text() { # VERB TOKEN SIZE: the command follows in SIZE bytes
    "$1" "$2" "$(dd bs="$3" count=1 iflag=fullblock 2>/dev/null <&3)"
}

ping() { # TOKEN
    printf '\001pong %s\n' "$1" >&3
}

members() { # PROCESS...: adds them and all that descend from them to MEMBERS
    for process; do
        [ -z "$freeze" ] || kill -STOP "$process" 2>/dev/null
        MEMBERS="$MEMBERS $process"
        for task in "/proc/$process/task"/*/children; do
            below=
            read -r below 2>/dev/null <"$task"
            # shellcheck disable=SC2086 # it is a list
            [ -z "$below" ] || members $below
        done
    done
}

# All are stopped before the first is signalled, so that none starts another meanwhile.
signal() { # NUMBER PROCESS: also to what descended from it when it was signalled before
    MEMBERS= freeze=yes
    members "$2"
    freeze=
    eval "MEMBERS=\"\$MEMBERS \$signalled_$2\"; signalled_$2=\$MEMBERS"
    # shellcheck disable=SC2086 # it is a list
    kill "-$1" $MEMBERS 2>/dev/null
    # shellcheck disable=SC2086 # so is this
    kill -CONT $MEMBERS 2>/dev/null
}

wake() { # the slots that stopped because nobody was connected to their ports
    read -r supervisors <"/proc/$AGENT/task/$AGENT/children"
    for process in $supervisors; do
        read -r below 2>/dev/null <"/proc/$process/task/$process/children"
        kill -CONT "$below" 2>/dev/null
    done
}

reset() { # SLOT: end what it does, for a host that knows nothing of it
    MEMBERS=
    members "$AGENT"
    for process in $MEMBERS; do
        read -r line 2>/dev/null <"/proc/$process/cmdline"
        case $line in
            *"$0$1")
                MEMBERS=
                members "$process"
                # shellcheck disable=SC2086 # it is a list
                kill -9 $MEMBERS 2>/dev/null
                # What is sent to a port that they have open yet would be lost.
                for process in $MEMBERS; do
                    tries=0
                    while kill -0 "$process" 2>/dev/null && [ $((tries += 1)) -le 2000 ]; do :; done
                done
                return
                ;;
        esac
    done
}

serve() { # SLOT
    if [ "$1" = control ]; then
        name=vmlab.agent
    else
        name=vmlab.$1
        find_port "$name.err" || return 1
        ERROR=$PORT
        exec 4<>"$ERROR" || return 1
    fi
    find_port "$name" || return 1
    exec 3<>"$PORT" || return 1
    holders= adopted=
    read -r adopted 2>/dev/null </proc/1/task/1/children
    printf '\001hello 1 %s\n' "$$" >&3
    while :; do
        while IFS= read -r line <&3; do
            # Nothing else is evaluated: it may be what is left of input whose host has died.
            case $line in
                "${SOH}run "* | "${SOH}pipe "* | "${SOH}fill "* | "${SOH}text "* | "${SOH}ping "* | \
                    "${SOH}signal "* | "${SOH}wake" | "${SOH}reset "*) eval "${line#"$SOH"}" ;;
            esac
        done
        # Nobody is connected. The control port is looked at again and again, and wakes the others.
        if [ "$1" = control ]; then sleep 0.2; else kill -STOP "$$"; fi
    done
}

if [ $# -eq 1 ]; then
    serve "$1"
    exit
fi

supervise() { # SLOT
    while :; do
        # It may lie where nothing is executed (a /run that is mounted noexec).
        if [ -x "$0" ]; then "$0" "$1"; else /bin/sh "$0" "$1"; fi
        sleep 0.2
    done
}

# The control port is the last one that the host declares: when it is there, all are.
until find_port vmlab.agent; do sleep 0.05; done
export AGENT="$$"
cd /
pipeline='supervise control </dev/null'
for slot in $slots; do
    find_port "vmlab.$slot" || continue
    pipeline="$pipeline | supervise $slot"
done
eval "$pipeline" >/dev/null
