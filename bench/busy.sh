#!/bin/sh
# busy.sh - MIT-or-Unlicense - small nets beside busy loops: what threads that wait for each other cost there
#
# bench/busy.sh [NET=BATCH].. trains each for about a second (of one thread, alone), ROUNDS times (default 5) and all
# cases by turns, and prints the median:
#     bench busy-NET loops K threads N wait POLICY ours V s ratio R
# beside K busy loops, none or one for each processor; POLICY is OMP_WAIT_POLICY, "-" where it is not set. The ratio is
# to one thread beside as many loops; above 1: threads pay. `make bench-busy` builds what this runs.
nets=${*:-digits=32 small=32 gru=16}
processors=$(nproc 2>/dev/null || echo 2)
loops=
trap 'for pid in $loops; do kill $pid; done 2>/dev/null' EXIT
trap 'exit 1' INT TERM

# seconds NET=BATCH STEPS THREADS POLICY: of each step, after one to warm up.
seconds() {
    if [ "$4" = - ]; then unset OMP_WAIT_POLICY; else export OMP_WAIT_POLICY="$4"; fi
    printf '1\n%s\n' "$2" | build/bench/nets "${1%=*}" "${1#*=}" "$3" train | awk 'NR == 4 { print $1 }'
}

cases() {
    echo 1 -
    echo "$processors" -
    echo "$processors" passive
}

for net in $nets; do
    steps=$(seconds "$net" 20 1 - | awk '{ print 1 + int(1 / $1) }') || exit 1
    for count in 0 "$processors"; do
        loops=
        for i in $(seq "$count"); do
            sh -c 'while :; do :; done' &
            loops="$loops $!"
        done
        for round in $(seq "${ROUNDS:-5}"); do
            cases | while read -r threads policy; do
                echo "$threads $policy $(seconds "$net" "$steps" "$threads" "$policy")"
            done
        done | sort -k 1,1n -k 2,2 -k 3,3g | awk -v net="${net%=*}" -v loops="$count" -v steps="$steps" '
            function line() {
                if (!n) return
                median = steps * times[int((n + 1) / 2)]
                if (!one) one = median
                printf "bench busy-%s loops %d threads %s ours %.2f s ratio %.2f\n", net, loops, which, median, one / median
                n = 0
            }
            which != $1 " wait " $2 { line(); which = $1 " wait " $2 }
            { times[++n] = $3 }
            END { line() }'
        for pid in $loops; do kill "$pid"; done
        wait
    done
    loops=
done

# MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h.
