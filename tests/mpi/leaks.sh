# Leaks under the address sanitizer of programs that use MPI, sourced by what starts them. MPICH and what it loads (hwloc
# and its plugins, drivers) keep memory to the end, of which nothing is ours to mend; some of it belongs to modules that
# are unloaded by then and have no name any more, so the stacks must reach back to the call of MPI, or of the loader, which
# takes exact unwinding. A leak of ours has neither in its stack and is found: `worker leak` is there to see that.
export ASAN_OPTIONS="detect_leaks=1:fast_unwind_on_malloc=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export LSAN_OPTIONS="suppressions=$PWD/tests/mpi/leaks.suppressed:print_suppressions=0"
