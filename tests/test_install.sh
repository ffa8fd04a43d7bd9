#!/bin/sh
# Installs the library into a folder and builds a program with what pkg-config says of it, shared and static. The library
# is that of a copy, compiled quickly: what is looked at here is where things lie and what they are linked with.
unset MAKEFLAGS MAKELEVEL
. tests/script.sh
dir=$PWD/build/install
flags() { PKG_CONFIG_PATH=$dir/lib/pkgconfig pkg-config "$@" paddle; }

rm -rf "$dir"
mkdir -p "$dir/source"
cp Makefile paddle.h paddle_mpi.c paddle_cuda.cu "$dir/source"
check 'make install' make -C "$dir/source" install PREFIX="$dir" DESTDIR= CFLAGS='-O0 -DPADDLE_NO_AVX'
if command -v pkg-config >/dev/null; then
    check 'pkg-config: version' [ "$(flags --modversion)" = "$(sed -n 's/.*define PD_VERSION "\(.*\)"/\1/p' paddle.h)" ]
    check 'shared: build' ${CC:-cc} tests/compile/declarations.c -o "$dir/shared" $(flags --cflags --libs)
    check 'shared: run' env LD_LIBRARY_PATH="$dir/lib" "$dir/shared"
    check 'static: build' ${CC:-cc} -static tests/compile/declarations.c -o "$dir/static" $(flags --cflags --libs --static)
    check 'static: run' "$dir/static"
else
    echo 'skipped: pkg-config is not here'
    skipped=5
fi
finish
