#!/bin/sh
# Runs the examples that take seconds and looks at what they say. Each was built without a warning before.
programs=$PWD/build/check/example
passed=0 failed=0 skipped=0
mkdir -p build/examples

# check NAME PATTERN COMMAND..: the command must succeed and its last line match.
check() {
    name=$1 pattern=$2
    shift 2
    [ -x "$programs/$name" ] || { echo "failed: $name did not build"; failed=$((failed + 1)); return; }
    if "$@" >"build/examples/$name.log" 2>&1 </dev/null && tail -n 1 "build/examples/$name.log" | grep -Eq "$pattern"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "failed: $name; the end of what it said:"
        tail -n 20 "build/examples/$name.log"
    fi
}

check digits '^digits: accuracy (9[89]|100)\.[0-9]% \([0-9]+ held-out images\), [0-9.]+ s$' "$programs/digits"

echo "$passed passed, $failed failed, $skipped skipped"
