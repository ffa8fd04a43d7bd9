#!/bin/sh
# Starts build/mpi/*/worker, made of tests/mpi/worker.c, on 1 to 4 ranks: paddle_mpi.c against training in one process,
# counted bytes, and all sorts of failures. Ends with the line `N passed, N failed`.
command -v mpicc >/dev/null && command -v mpiexec >/dev/null || { echo 'skipped: MPI is not here'; exit 77; }
. tests/script.sh
dir=build/mpi
export OMP_WAIT_POLICY=passive UBSAN_OPTIONS=print_stacktrace=1
. tests/mpi/leaks.sh

# RANKS BUILD WORD.. on this machine, or with HOSTS=..: as if every rank were on its own.
start() {
    n=$1 build=$2
    shift 2
    timeout -k 5 60 mpiexec $HOSTS -n "$n" $dir/$build/worker "$@"
}
works() { check "$*" start "$@"; }

# ---- the same as one process ----

for n in 1 2 3 4; do
    works $n float compare mlp momentum
    works $n double compare conv sgd uneven
    works $n double compare rows nesterov l2 schedule
    works $n double compare words momentum l2 clip uneven
done
for method in sgd momentum nesterov adagrad adadelta rmsprop decayed_adagrad adam adamw adamax; do
    works 3 double compare mlp $method l2 schedule
done
works 3 double compare mlp adam clip
works 3 float compare wide momentum
works 4 double compare wide far uneven clip
works 3 double compare conv far momentum
works 4 double compare words far momentum l2 uneven
works 3 pieces compare broad momentum
works 3 pieces compare words momentum l2
works 3 pieces compare rows far uneven
works 3 float again words momentum
for n in 1 2 4; do
    works $n double reduce conv
done

# ---- the example ----

data=$PWD/examples/data/digits.csv begin=$(date +%s%N)
(cd $dir && timeout -k 5 100 mpiexec -n 3 ../example/cluster "$data") >$log 2>&1 && grep -Eq 'accuracy (98|99|100)' $log
result $? examples/cluster.c $begin

# ---- the same bits every time ----

for words in 'mlp adam' 'words momentum l2 clip uneven' 'norm momentum'; do
    start 3 float bits $words >$dir/first 2>&1
    start 3 float bits $words >$dir/second 2>&1
    check "bits $words, twice" diff $dir/first $dir/second
    grep -Eq '^[0-9a-f]{16}$' $dir/first
    result $? "bits $words"
done

# ---- what is sent, what is taken ----

for n in 1 2 3 4; do
    works $n float bytes mlp
    works $n double bytes words momentum clip
    works $n float bytes rows momentum l2
done
works 3 float reads rows momentum l2
works 2 double reads words momentum clip far
works 3 double bytes conv far
works 3 pieces bytes broad
for words in 'mlp adam' 'rows momentum l2' 'words clip' 'conv far'; do
    works 3 float steady $words
done

# ---- memory and undefined behaviour ----

for words in 'mlp adam' 'words momentum l2 clip uneven' 'rows far' 'conv far uneven' 'norm'; do
    works 3 asan bits $words
done
leaks() { ! start "$@" && grep -q 'LeakSanitizer: detected memory leaks' $log && grep -q 'in pd_batch_new' $log; }
check 'a leak is found' leaks 2 asan leak mlp
works 3 asan again words momentum
works 2 asan reduce mlp
for words in mlp 'words momentum clip' rows; do
    works 1 asan memory $words
done

# ---- failures: all ranks end, with the reason ----

# STATUS SECONDS TEXT TIMES COMMAND..: the text must come so many times.
fails() {
    expected=$1 seconds=$2 text=$3 times=$4
    shift 4
    begin=$(date +%s%N)
    "$@" >$log 2>&1
    status=$? ms=$((($(date +%s%N) - begin) / 1000000)) found=$(grep -c "$text" $log)
    [ $status = "$expected" ] && [ $ms -le "${seconds}000" ] && [ "$found" = "$times" ]
    result $? "$* (status $status, $found times \"$text\")" "$begin"
}
# Without the process manager noticing: its child and the descriptors stay.
killed() {
    timeout -k 5 60 mpiexec -n 3 sh -c \
        "$dir/float/worker signal kill mlp quick; status=\$?; [ \$status = 137 ] && exec sleep 40; exit \$status"
}
for HOSTS in '' '-launcher fork -hosts a:1,b:1,c:1,d:1'; do
    works 4 float compare mlp momentum
    works 3 float compare words momentum uneven
    for words in 'mlp nan' 'conv nan clip'; do
        fails 3 10 'the input is not finite in row' 3 start 3 float fails $words
    done
    fails 3 10 'rank 1: line 13: this is not a number' 3 start 3 float reader mlp
    fails 3 10 'rank 1 has layer "fc1" (fc) of width 12, activation' 3 start 3 float mismatch mlp wrong
    fails 3 10 'rank 1 has ended with exit code 3' 2 start 3 float early mlp
    fails 3 10 'all must make the same calls' 3 start 3 float calls norm
    fails 3 10 'rank [02].*truncate\|rank 0 has sent 8 bytes' 3 start 3 float sums mlp
    fails 3 10 'rank 1 has ended its training' 2 start 3 float leaves mlp
    for words in mlp 'rows momentum'; do fails 3 10 '^rank' 2 start 3 float lost $words; done
    fails 3 10 '^rank' 2 start 3 float lost mlp impatient
    fails 3 10 'rank 1 has not been heard from for 2 s' 2 start 3 float signal mlp quick
    fails 3 10 'the input is not finite in row' 3 start 3 asan fails mlp nan
done
HOSTS=
# Rank 1 lacks memory for one allocation after the other, from the making of its net on, until the training ends.
step=20 # one in so many allocations
[ -z "$ALL" ] || step=9
lack() {
    for k in $(seq 60 $step 400); do
        start 2 asan lack "$k" words momentum clip >$dir/lack 2>&1
        status=$?
        echo "allocation $k, status $status:" && cat $dir/lack
        case $status in 0) return 0 ;; 3) grep -q 'rank 1: .*memory' $dir/lack || return 1 ;; *) return 1 ;; esac
    done
    return 1
}
begin=$(date +%s%N)
lack >$log && [ "$(grep -c '^rank 0: rank 1: .*memory' $log)" -ge 3 ] &&
    grep -q 'rank 0: rank 1: out of memory for training with MPI' $log
result $? 'lack of memory' $begin
[ -z "$ALL" ] || fails 3 30 'rank 1 has not been heard from for 10 s' 3 start 4 float signal words
fails 3 10 'rank 1 has not been heard from for 2 s' 2 killed
fails 9 10 'Killed' 1 start 3 float signal kill mlp # the process manager does it
finish
