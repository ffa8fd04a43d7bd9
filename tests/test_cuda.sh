#!/bin/sh
# paddle_cuda.cu: by nvcc, where there is one, for the GPUs that it is meant for, without a warning and with every kernel
# in registers; then tests/test_cuda.c with CUDA on the CPU. Ends with the line that tests/run counts.
tools=tests/cuda_on_cpu
$tools/headers >/dev/null || { echo 'skipped: no CUDA headers; tests/cuda_on_cpu/setup gets them'; exit 77; }
out=build/cuda
passed=0 failed=0 skipped=0
nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
mkdir -p $out
export TSAN_OPTIONS="${TSAN_OPTIONS:+$TSAN_OPTIONS:}atexit_sleep_ms=0"
randomly=
! setarch "$(uname -m)" -R true 2>/dev/null || randomly="setarch $(uname -m) -R" # old TSan wants low addresses

fail() {
    failed=$((failed + 1))
    echo "FAILED $*"
}

# compiles NUMBER: one call for all of these GPUs
compiles() {
    archs='75 80 86 89 90' define= gpus=
    [ "$1" = float ] || define=-DPADDLE_DOUBLE
    for arch in $archs; do
        gpus="$gpus -gencode arch=compute_$arch,code=sm_$arch"
    done
    if ! "$nvcc" -std=c++17 -O2 $gpus $define -Xcompiler -Wall,-Wextra -Werror all-warnings -Xptxas -v \
        -c paddle_cuda.cu -o $out/nvcc.$1.o >$out/nvcc.$1.log 2>&1; then
        fail "nvcc, $1"
        tail -n 20 $out/nvcc.$1.log
        return
    fi
    for arch in $archs; do # ptxas says first which function, and for which GPU, and later what it spills
        if ! spills=$(awk -v gpu="'sm_$arch'" '
            /Compiling entry function/ { here = $NF == gpu }
            here && /bytes spill/ { all++; if ($0 !~ / 0 bytes spill stores/) spilling++ }
            END { print spilling + 0; exit !all }' $out/nvcc.$1.log)
        then fail "sm_$arch, $1: nothing is said of its kernels in $out/nvcc.$1.log"
        elif [ "$spills" != 0 ]; then fail "sm_$arch, $1: $spills kernels spill registers; see $out/nvcc.$1.log"
        else passed=$((passed + 1))
        fi
    done
}

# program KIND NUMBER SEED [TESTS NOT_THESE]; without the larger kernels of the CPU, which take long to compile
program() {
    define=-DPADDLE_NO_AVX run=$randomly
    [ "$2" = float ] || define="$define -DPADDLE_DOUBLE"
    [ "$1" = tsan ] || run=
    name=$out/$1.$2
    [ -x "$name" ] && [ "$name" -nt paddle_cuda.cu ] && [ "$name" -nt paddle.h ] && [ "$name" -nt tests/test_cuda.c ] &&
        [ "$name" -nt $tools/runtime.cpp ] ||
        $tools/build "$1" "$name" paddle_cuda.cu tests/test_cuda.c -DSTAND_IN -Itests $define -lcmocka ||
        { fail "$1 $2 does not build"; return; }
    timeout 800 $run "$name" "$3" "${4:-*}" "${5:-nothing}" >"$name.log" 2>&1
    status=$?
    good=$(grep -c '^\[ *OK \]' "$name.log") bad=$(grep -c '^\[ *RUN *\]' "$name.log")
    bad=$((bad - good))
    [ $status = 0 ] && [ $good -gt 0 ] || [ $bad -gt 0 ] || bad=1
    passed=$((passed + good)) failed=$((failed + bad))
    [ $bad = 0 ] || { echo "FAILED $1 $2:" && grep -vE '^\[ +(RUN|OK) +\]' "$name.log" | tail -n 40; }
}

# ThreadSanitizer is slow with fibers: the kernels with shared memory, or, with ALL=1, all but what takes minutes.
threads() {
    if [ "$ALL" = 1 ]; then
        program tsan float 5 '*' test_gradient_check
    else
        for test in test_muladd test_sum_squares test_activations test_cross_entropy test_layer_norm test_batch_norm; do
            program tsan float 5 $test
        done
    fi
}

# A job's output ends with its counts.
if [ $# -gt 0 ]; then
    "$@"
    echo "$passed $failed"
    exit
fi
[ -n "$nvcc" ] || { skipped=$((skipped + 1)) && echo 'skipped: no nvcc'; }
{
    echo 'plain.double program plain double 2 * test_failures'
    echo 'asan.float program asan float 3 * test_failures'
    echo 'tsan.float threads'
    echo 'plain.float program plain float 1'
    [ "$ALL" != 1 ] || echo 'asan.double program asan double 4 test_failures'
    [ -z "$nvcc" ] || printf 'nvcc.%s compiles %s\n' float float double double
} >$out/jobs
xargs -P "$(nproc)" -L 1 sh -c 'name=$1 && shift && sh tests/test_cuda.sh "$@" >build/cuda/$name.job 2>&1' sh <$out/jobs
while read -r job rest; do
    set -- $(tail -n 1 $out/"$job".job)
    [ $# = 2 ] || { echo "$job gave no counts" && set -- 0 1; }
    passed=$((passed + $1)) failed=$((failed + $2))
    sed '$d' $out/"$job".job
done <$out/jobs
[ $skipped = 0 ] && echo "$passed passed, $failed failed" || echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
