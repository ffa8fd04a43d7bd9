#!/bin/sh
# start.sh - MIT-or-Unlicense - what the header costs: time to a first prediction, size of a program, time to compile
#
# Prints `bench NAME ours V UNIT bar V UNIT ratio R`; above 1: better than the bar. Builds its programs in build/bench.
dir=build/bench
cc=${CC:-cc} flags="-std=c99 ${CFLAGS:--O2}"
mkdir -p $dir
openmp=-fopenmp
echo '#include <omp.h>' | $cc -fopenmp -fsyntax-only -x c - 2>/dev/null || openmp=

# line NAME VALUE UNIT BAR
line() {
    [ -n "$2" ] || exit 1
    echo "$*" | awk '{ printf "bench %s ours %s %s bar %s %s ratio %.2f\n", $1, $2, $3, $4, $3, $4 / $2 }'
}

# seconds COMMAND..: the median of three
seconds() {
    for i in 1 2 3; do
        start=$(date +%s.%N)
        "$@" >/dev/null || return 1
        echo "$start $(date +%s.%N)"
    done | awk '{ printf "%.3f\n", $2 - $1 }' | sort -n | sed -n 2p
}

# A program that includes everything in its one file keeps what it calls, so PADDLE_STATIC says what it costs.
$cc $flags $openmp -I. -DPADDLE_STATIC bench/start.c -o $dir/start -lm -pthread || exit 1
$dir/start || exit 1
strip -o $dir/start-stripped $dir/start
line size-static $(($(wc -c <$dir/start-stripped) / 1024)) KB 400
$cc $flags $openmp -I. bench/start.c -o $dir/start-whole -lm -pthread && strip $dir/start-whole
line size-whole $(($(wc -c <$dir/start-whole) / 1024)) KB 400

printf '#define PADDLE_IMPLEMENTATION\n#include "paddle.h"\n' >$dir/whole.c
printf '#include "paddle.h"\n' >$dir/plain.c
line compile-whole "$(seconds $cc $flags $openmp -I. -c $dir/whole.c -o $dir/whole.o)" s 15
line compile-include "$(seconds $cc $flags $openmp -I. -c $dir/plain.c -o $dir/plain.o)" s 0.1

# MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h.
