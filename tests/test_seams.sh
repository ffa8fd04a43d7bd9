#!/bin/sh
# tests/seams/run, which `make seams` runs too, counted path by path; with ALL=1 under the sanitizers too.
passed=0 failed=0
for kind in plain ${ALL:+asan tsan}; do
    [ $kind != tsan ] || [ -x build/seams/tsan/cpu ] || continue # no clang
    tests/seams/run $kind >build/seams.log 2>&1
    cat build/seams.log
    set -- $(awk '/^seams: [0-9]+ of [0-9]+ paths agree/ { found = 1; print $2, $4 - $2 } END { if (!found) print "0 1" }' build/seams.log)
    passed=$((passed + $1)) failed=$((failed + $2))
done
echo "$passed passed, $failed failed"
