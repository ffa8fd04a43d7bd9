# make               build the examples into build/
# make run           train on real handwritten digits and predict some: needs a C compiler and make, nothing else
# make translate     train on numbers in figures and in words, and translate some; half a minute
# make setup test    install what the tests use (Debian, Ubuntu), then run them: 10 minutes or less on 2 cores
# make test-all      the same tests and all that takes longer: README.md says what
# make try TEST=test_sequences CASE=gru BUILD=try64   one program, some layers or tests: 10 s from an edit of paddle.h
# make fuzz          FUZZ_RUNS (a million) hostile inputs for everything that reads files
# make seams         two nets on the CPU, a GPU's stand-in and 1 to 3 ranks of mpiexec: the same results, in a table
# make gpu-check     the GPU's tests on a real one, with a report in bench/results; without one it only says so
# make portability   the digits and a self-check under every toolchain found; `make setup-portability` installs them
# make bench         build and run what bench/ has that needs nothing else
# make bench-sparse  training steps with tables of up to 100 million rows; takes 7 GB and two minutes
# make bench-sequences  recurrent nets and translation beside PyTorch, which it installs; takes minutes
# make bench-busy    small nets beside busy loops on all processors; takes minutes
# make bench-peers   installs OpenBLAS, PyTorch and ONNX Runtime (6 GB), and runs the same beside them
# make bench-report  leaves what they print, and a picture, in bench/results
# make lib           build/libpaddle.a and libpaddle.so; make install PREFIX=/usr/local DESTDIR=
# make format clean

CC      ?= cc
CFLAGS  ?= -O2
PREFIX  ?= /usr/local
JOBS    ?= $(shell nproc 2>/dev/null || echo 2)

# -fopenmp where the compiler can compile, link and find the header, else nothing.
OPENMP := $(shell mkdir -p build; echo 'int main(void) { return omp_get_max_threads() < 1; }' | \
            $(CC) -fopenmp -include omp.h -x c -o build/openmp-probe - >/dev/null 2>&1 && echo -fopenmp)
LIBS    = -lm -pthread
COMPILE = $(CC) -std=c99 -Wall -Wextra $(CFLAGS) $(OPENMP) -I.

MPI_ONLY = build/cluster
EXAMPLES = $(filter-out $(MPI_ONLY),$(patsubst examples/%.c,build/%,$(wildcard examples/*.c))) \
           $(if $(shell command -v mpicc 2>/dev/null),$(MPI_ONLY))
BENCHES  = build/bench/step build/bench/gemm # what `make bench` runs
PEERS    = build/bench/gemm-openblas build/bench/nets

all: $(EXAMPLES)

build/%: examples/%.c paddle.h
	$(COMPILE) $< -o $@ $(LIBS)

$(MPI_ONLY): override CC = mpicc
$(MPI_ONLY): paddle_mpi.c

run: build/digits
	@cd build && ./digits ../examples/data/digits.csv

translate: build/translate
	@cd build && ./translate

bench: $(BENCHES)
	@for program in $(BENCHES) bench/start.sh; do echo "$$program"; CC='$(CC)' CFLAGS='$(CFLAGS)' $$program || exit 1; done

build/bench/%: bench/%.c paddle.h
	@mkdir -p $(@D)
	$(COMPILE) $< -o $@ $(LIBS)

# Of the OpenBLAS libraries the one on OpenMP where there are several: both sides then use the same threads, and none
# of theirs spins while the other side is measured.
OPENBLAS = openblas-openmp
OPENBLAS_FLAGS = $(foreach d,$(wildcard /usr/include/*/$(OPENBLAS)),-I$d) \
                 $(foreach d,$(wildcard /usr/lib/*/$(OPENBLAS)),-L$d -Wl,-rpath,$d) -lopenblas

build/bench/gemm-openblas: bench/gemm.c paddle.h
	@mkdir -p $(@D)
	$(COMPILE) -DPEER_OPENBLAS $< -o $@ $(OPENBLAS_FLAGS) $(LIBS)

# PyTorch for Linux comes with CUDA from the Python package index; there is no smaller one there.
setup-bench:
	@tests/setup libopenblas-openmp-dev python3-venv librsvg2-bin
	@[ -x build/bench-venv/bin/pip ] || python3 -m venv build/bench-venv
	@build/bench-venv/bin/pip install --quiet torch onnx onnxruntime

bench-sparse: build/bench/sparse
	@build/bench/sparse

# PYTHON: one that has PyTorch; by default that of setup-bench.
bench-sequences: build/bench/sequences $(if $(PYTHON),,setup-bench)
	@for n in $(or $(THREADS),1 2); do $(or $(PYTHON),build/bench-venv/bin/python) bench/sequences.py $$n $(PARTS) || exit 1; done

bench-busy: build/bench/nets
	@bench/busy.sh

bench-peers: setup-bench $(PEERS)
	@bench/peers

bench-report: setup-bench $(PEERS)
	@bench/report

# ---- library ----

VERSION = $(shell sed -n 's/.*define PD_VERSION "\(.*\)"/\1/p' paddle.h)
SONAME  = libpaddle.so.$(basename $(basename $(VERSION)))
SHARED  = libpaddle.so.$(VERSION)

lib: build/libpaddle.a build/$(SHARED) build/paddle.pc

build/paddle.c:
	printf '#define PADDLE_IMPLEMENTATION\n#include "paddle.h"\n' >$@

build/paddle.o: build/paddle.c paddle.h
	$(COMPILE) -fPIC -c $< -o $@

build/libpaddle.a: build/paddle.o
	$(AR) rcs $@ $<

build/$(SHARED): build/paddle.o
	$(CC) -shared -Wl,-soname,$(SONAME) $(OPENMP) $< -o $@ $(LIBS)
	ln -sf $(SHARED) build/$(SONAME)
	ln -sf $(SHARED) build/libpaddle.so

# Made anew each time: PREFIX is not a file whose date make could compare.
build/paddle.pc: always
	@printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' 'libdir=$${prefix}/lib' '' 'Name: paddle' \
	    'Description: Deep learning in one C header' 'Version: $(VERSION)' \
	    'Cflags: $(strip -I$${includedir} $(filter -DPADDLE_DOUBLE,$(CFLAGS)))' \
	    'Libs: -L$${libdir} -lpaddle -lm' 'Libs.private: $(OPENMP) -pthread' >$@

install: lib
	mkdir -p $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/lib/pkgconfig
	cp paddle.h paddle_mpi.c paddle_cuda.cu $(DESTDIR)$(PREFIX)/include/
	cp -P build/libpaddle.a build/libpaddle.so* $(DESTDIR)$(PREFIX)/lib/
	cp build/paddle.pc $(DESTDIR)$(PREFIX)/lib/pkgconfig/

# ---- tests; see tests/Makefile ----

# tests/setup explains the bars. The Python packages are for tests/peer, which makes what tests/cuda_on_cpu adds to.
setup:
	@tests/setup g++ libcmocka-dev valgrind pkg-config clang 'libclang-rt-dev|' libomp-dev mpich libmpich-dev \
	    python3-venv python3-numpy 'python3-torch|'
	@tests/peer/setup
	@tests/cuda_on_cpu/setup

setup-portability:
	@tests/setup gcc g++ clang tcc musl-tools gcc-mingw-w64-x86-64 'wine64|wine' gcc-aarch64-linux-gnu \
	    libc6-dev-arm64-cross 'qemu-user-static|qemu-user' lld wasi-libc 'libclang-rt-dev-wasm32|' nodejs \
	    bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso busybox-static cpio

# In steps, so that compiling is parallel and goes on after a failure; tests/run counts what is missing then.
TESTS = @$(MAKE) --no-print-directory -f tests/Makefile CC='$(CC)' OPENMP='$(OPENMP)'
test test-all:
	$(TESTS) snippets
	$(TESTS) ALL=$(ALL) -Otarget -k -j$(JOBS) programs || echo 'some tests did not build'
	$(TESTS) ALL=$(ALL) run
test-all: ALL = 1

try:
	$(TESTS) -Otarget try

fuzz:
	$(TESTS) -k fuzz

# KIND=asan or tsan: under sanitizers.
seams:
	$(TESTS) -Otarget -j$(JOBS) seams KIND=$(or $(KIND),plain)
	@tests/seams/run $(KIND)

gpu-check:
	@tests/gpu_check

portability:
	@tests/portability/run

format:
	clang-format -i $(wildcard *.h *.c examples/*.c bench/*.c tests/*.c tests/*.h tests/*/*.c tests/*/*.h tests/*/*.cpp tests/*/*.cu)
	tests/contents paddle.h

clean:
	rm -rf build

always:
.PHONY: all run translate bench bench-sparse bench-sequences bench-busy bench-peers bench-report setup-bench lib install setup setup-portability test test-all try fuzz seams gpu-check portability format clean always
.DELETE_ON_ERROR:
