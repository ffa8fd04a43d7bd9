#!/bin/sh
# Installs the library into a folder and builds a program with what pkg-config says of it, shared and static.
unset MAKEFLAGS MAKELEVEL
passed=0 failed=0 dir=$PWD/build/install
check() { # NAME COMMAND..
    name=$1
    shift
    if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "failed: $name"; fi
}
flags() { PKG_CONFIG_PATH=$dir/lib/pkgconfig pkg-config "$@" paddle; }

rm -rf "$dir"
check 'make install' make install PREFIX="$dir" DESTDIR=
if command -v pkg-config >/dev/null; then
    check 'pkg-config: version' [ "$(flags --modversion)" = "$(sed -n 's/.*define PD_VERSION "\(.*\)"/\1/p' paddle.h)" ]
    check 'shared: build' ${CC:-cc} tests/compile/declarations.c -o "$dir/shared" $(flags --cflags --libs)
    check 'shared: run' env LD_LIBRARY_PATH="$dir/lib" "$dir/shared"
    check 'static: build' ${CC:-cc} -static tests/compile/declarations.c -o "$dir/static" $(flags --cflags --libs --static)
    check 'static: run' "$dir/static"
else
    echo 'skipped: pkg-config is not here'
fi
echo "$passed passed, $failed failed"
