#!/bin/sh
# Checks the program, and tells of each check in TAP: a test of its own in the report.
program=$1
number=0
failed=0

check() {
    number=$((number + 1))
    if [ "$2" = "$3" ]; then
        echo "ok $number - $1"
    else
        failed=1
        echo "not ok $number - $1"
        printf '  ---\n  message: "expected %s, got %s"\n  ...\n' "$3" "$2"
    fi
}

echo "TAP version 14"
check "nothing adds up to nothing" "$("$program" </dev/null)" 0
check "numbers are added" "$(printf '1\n2\n3\n' | "$program")" 6
check "numbers may be negative" "$(printf '%s\n' 5 -7 | "$program")" -2
echo x | "$program" 2>/dev/null
check "what is no number is refused" $? 2
echo "1..$number"
exit $failed
