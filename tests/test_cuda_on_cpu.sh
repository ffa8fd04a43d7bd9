#!/bin/sh
# Does CUDA on the CPU find bugs? Each case of tests/cuda_on_cpu/planted.cu without its bug must pass in all three builds
# and several orders, and with it must fail in the way given here. Ends with the line that tests/run counts.
tools=tests/cuda_on_cpu
tests/cuda_on_cpu/headers >/dev/null || { echo 'skipped: no CUDA headers; tests/cuda_on_cpu/setup gets them'; exit 77; }
ulimit -c 0 # many cases end by abort
. tests/script.sh
out=build/cuda_on_cpu
export TSAN_OPTIONS="${TSAN_OPTIONS:+$TSAN_OPTIONS:}atexit_sleep_ms=0" # by default it sleeps a second

pass() { passed=$((passed + 1)); }
fail() {
    failed=$((failed + 1))
    echo "FAILED $*"
    tail -n 30 "$log"
}

# planted KIND CASE right|wrong: the output in $log
planted() {
    devices=1 randomly=
    case $2 in peer*) devices=2 ;; esac
    [ "$1" != tsan ] || ! setarch "$(uname -m)" -R true 2>/dev/null || randomly="setarch $(uname -m) -R"
    CUDA_ON_CPU_DEVICES=$devices timeout 120 $randomly "$out/$1/planted" "$2" "$3" >"$log" 2>&1
}

expect_right() {
    if planted "$1" "$2" right && ! grep -qE 'Sanitizer|runtime error' "$log"; then pass; else fail "$1 $2 without the bug"; fi
}

# expect_wrong KIND CASE PATTERN: it fails and says so
expect_wrong() {
    [ -n "$3" ] || return
    if planted "$1" "$2" wrong; then fail "$1 $2: the bug is not found"
    elif grep -qE "$3" "$log"; then pass
    else fail "$1 $2: found, but without \"$3\""
    fi
}

# case_ CASE PLAIN ASAN TSAN: what the bug shows in each build; - for nothing
case_() {
    name=$1 begin=$(date +%s%N)
    for kind in plain asan tsan; do
        expect_right $kind "$name"
        shift
        [ "$1" = - ] || expect_wrong $kind "$name" "$1"
    done
    export CUDA_ON_CPU_ORDER CUDA_ON_CPU_SEED
    for CUDA_ON_CPU_ORDER in forward reverse; do expect_right plain "$name"; done
    CUDA_ON_CPU_ORDER=random
    for CUDA_ON_CPU_SEED in 2 3 4 5; do expect_right plain "$name"; done
    unset CUDA_ON_CPU_ORDER CUDA_ON_CPU_SEED
    took "$begin" "$name"
}

# What depends on which stream gets ahead: some of 20 seeds must show it in the plain build.
some_seed() {
    found=0
    for seed in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        CUDA_ON_CPU_SEED=$seed planted plain "$1" wrong || found=$((found + 1))
    done
    if [ $found -gt 0 ]; then pass; else fail "plain $1: not found with any seed"; fi
}

line() { echo "planted\\.cu:$(grep -n "HERE $1" $tools/planted.cu | cut -d: -f1)"; }

wrong='wrong result'
race='WARNING: ThreadSanitizer: data race'
case_ missing_barrier "$wrong" "$wrong" "$race"
case_ missing_syncwarp "$wrong" "$wrong" "$race"
case_ uninitialised_shared "$wrong" "$wrong" "$wrong"
case_ uninitialised_dynamic "$wrong" "$wrong" "$wrong"
barrier='kernel diverge \(launched at tests/cuda_on_cpu/planted.cu:[0-9]+\), block \(0,0,0\): divergent barrier: thread .* has returned'
case_ divergent_barrier "$barrier" "$barrier" "$barrier"
barrier='kernel diverge_in_two .* divergent barrier: .*planted.cu.*but.*planted.cu'
case_ two_barriers "$barrier" "$barrier" "$barrier"
lane='kernel warp_sum .*absent lane: .* thread \((5|37),0,0\) has returned'
case_ absent_lane "$lane" "$lane" "$lane"
lane='kernel warp_sum .*absent lane: .*names lanes beyond the block of 31 threads'
case_ lane_beyond_block "$lane" "$lane" "$lane"
end='store_up_to wrote past the end: byte 400 of allocation 1 of 400 bytes'
case_ out_of_bounds "$end" "SUMMARY: AddressSanitizer.*$(line out_of_bounds) " "$end"
end='kernel store_shared .* past the 128 of its dynamic shared memory'
case_ shared_out_of_bounds "$end" "SUMMARY: AddressSanitizer.*$(line shared_out_of_bounds) " "$end"
case_ static_out_of_bounds - "$(line static_out_of_bounds):.*index 32 out of bounds" -
case_ use_after_free "$wrong" 'freed memory of device 0' "$wrong"
case_ free_before_use "$wrong" 'freed memory of device 0' "$wrong"
case_ uninitialised_memory "$wrong" "$wrong" "$wrong"
host='host code touches device memory it has no access to: byte 8 of allocation 1'
case_ host_touches_device "$host" "$host" "$host"
host='launch of copy: argument 1 points to host memory'
case_ host_pointer "$host" "$host" "$host"
peer='launch of copy on device 1: argument 1 points to byte 0 of allocation 1 of 128 bytes on device 0'
case_ peer_argument "$peer" "$peer" "$peer"
peer='kernel store_in_struct .* touches device memory it has no access to: byte [0-9]+ of allocation 1 of 128 bytes on device 0'
case_ peer_struct "$peer" "$peer" "$peer"
peer='from device 0 to device 1 without peer access'
case_ peer_copy "$peer" "$peer" "$peer"
case_ blocks_race - - "$race"
case_ missing_event - - "$race"
case_ missing_event_before_gemm - - "$race"
some_seed missing_event
some_seed missing_event_before_gemm
case_ pinned_reuse - - "$race|$wrong"
some_seed pinned_reuse
case_ missing_synchronize - - "$race|$wrong"
some_seed missing_synchronize
case_ failing_malloc 'not freed: allocation' 'not freed: allocation' 'not freed: allocation'
bounds='gemm: A of 2x3, leading dimension 3, .*32 bytes do not fit at byte 0 of allocation 1 of 24 bytes'
case_ gemm_bounds "$bounds" "$bounds" "$bounds"
for name in functions gemms interface peer_threads; do case_ $name - - -; done

finish
