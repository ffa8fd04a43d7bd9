#!/bin/sh
# tests/seams/run, which `make seams` runs too, counted path by path.
tests/seams/run "$@" >build/seams.log 2>&1
cat build/seams.log
awk '/^seams: [0-9]+ of [0-9]+ paths agree/ { found = 1; print $2 " passed, " $4 - $2 " failed" }
     END { if (!found) print "0 passed, 1 failed" }' build/seams.log
