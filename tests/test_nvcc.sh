#!/bin/sh
# paddle_cuda.cu by nvcc, as the Makefile compiled it for some of the GPUs that it is meant for, or all: without a warning
# and, looked at here, with every kernel in registers. ptxas says first which function, and for which GPU, and later what
# it spills.
. tests/script.sh
dir=build/nvcc${ALL:+-all}
[ -d $dir ] || { echo 'skipped: no nvcc'; exit 77; }
for object in $dir/float.o $dir/double.o; do
    name=$(basename $object .o) said=${object%.o}.log
    [ -f "$said" ] || continue # not asked for
    gpus=$(sed -n "s/.*for '\(sm_[0-9]*\)'.*/\1/p" "$said" | sort -u)
    check "$name: nvcc says for which GPUs" [ -f $object -a -n "$gpus" ]
    for gpu in $gpus; do
        spilling=$(awk -v gpu="'$gpu'" '
            /Compiling entry function/ { here = $NF == gpu }
            here && /bytes spill/ { all++; if ($0 !~ / 0 bytes spill stores/) spilling++ }
            END { print all ? spilling + 0 : "unknown" }' "$said")
        check "$name, $gpu: $spilling kernels spill registers" [ "$spilling" = 0 ]
    done
done
finish
