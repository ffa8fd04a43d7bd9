# For the test scripts: counts what they check and says how long each check took, as tests/run wants it. Sourced.
passed=0 failed=0 skipped=0
log=$PWD/build/tmp/$(basename "$0").out # what the check at hand says
mkdir -p build/tmp

# check NAME COMMAND..: the command must succeed; what it says is shown if it does not.
check() {
    what=$1 begin=$(date +%s%N)
    shift
    "$@" >"$log" 2>&1
    result $? "$what" "$begin"
}

# result STATUS NAME [BEGIN]: BEGIN is from date +%s%N
result() {
    case $1 in
    0) passed=$((passed + 1)) ;;
    *) failed=$((failed + 1)) && echo "FAILED: $2" && cat "$log" ;;
    esac
    [ -z "$3" ] || took "$3" "$2"
}

# took BEGIN NAME: as the C programs say it
took() {
    ms=$((($(date +%s%N) - $1) / 1000000))
    printf '[   TIME   ] %4d.%03d s %s\n' $((ms / 1000)) $((ms % 1000)) "$2"
}

# Ends the script with its counts.
finish() {
    echo "$passed passed, $failed failed, $skipped skipped"
    [ $failed = 0 ]
    exit
}
