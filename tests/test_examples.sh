#!/bin/sh
# Runs the examples and looks at the last line that each says. They were built before, without a warning.
. tests/script.sh
root=$PWD programs=$PWD/build/example
mkdir -p build/examples/examples/data && cd build/examples || exit 1 # what they write stays here
cp "$root/examples/data/digits.csv" examples/data/

# says NAME PATTERN COMMAND..: the command must succeed and its last line match.
says() {
    name=$1 pattern=$2
    shift 2
    check "$name" last_line "$pattern" "$@"
}
last_line() {
    wanted=$1
    shift
    "$@" </dev/null && tail -n 1 "$log" | grep -Eq "$wanted"
}

# digits.csv as IDX files like MNIST's: 28 x 28 pixels, each digit enlarged threefold; every fifth is for the test.
make_idx() {
    for kind in train t10k; do
        LC_ALL=C awk -F, -v kind=$kind '
            function integer(v) { printf "%c%c%c%c", int(v / 16777216) % 256, int(v / 65536) % 256, int(v / 256) % 256, v % 256 > images }
            BEGIN { images = kind "-images-idx3-ubyte"; labels = kind "-labels-idx1-ubyte"; count = kind == "train" ? 1438 : 359
                    integer(2051); integer(count); integer(28); integer(28)
                    images = labels; integer(2049); integer(count); images = kind "-images-idx3-ubyte" }
            (NR % 5 == 0) == (kind == "t10k") && written < count {
                written++
                for (y = -2; y < 26; y++)
                    for (x = -2; x < 26; x++)
                        printf "%c", (x < 0 || y < 0 || x > 23 || y > 23 ? 0 : $(1 + int(y / 3) * 8 + int(x / 3)) * 15) > images
                printf "%c", $65 + 0 > labels
            }' examples/data/digits.csv
    done
}

says digits '^digits: accuracy (9[89]|100)\.[0-9]% \([0-9]+ held-out images\), [0-9.]+ s$' "$programs/digits"
says embed '^this is a 3 ' "$programs/embed"
says custom_layer '^accuracy 9[5-9]\.' "$programs/custom_layer"
says regression '^regression: root mean squared error 0\.0[0-7]' "$programs/regression"
says stream '^[0-9]+ samples, cost 0\.' sh -c "cat examples/data/* examples/data/* | '$programs/stream' 64 10"
says image_config '.' "$programs/image_config" 1
make_idx
says lenet '^lenet: accuracy 9[0-9]\.' "$programs/lenet" . 4
says wordorder '^wordorder: accuracy (99|100)\.' "$programs/wordorder"
says translate '^translate: (99|100)\.[0-9]% exact \([0-9]+ held-out numbers\), [0-9]+ s$' "$programs/translate"

# A language model of little text, with the model saved, and again from there.
rm -f char_lm.safetensors
head -c 40000 "$root/paddle.h" >short.txt
says char_lm '^char_lm: [23]\.[0-9]+ bits a held-out byte' "$programs/char_lm" short.txt 3
learned=$(tail -n 1 "$log" | sed 's/,.*//')
says 'char_lm: the saved model' "^$learned" "$programs/char_lm" short.txt 0
refused() { ! "$@" </dev/null && grep -q "$message" "$log"; }
message='short.txt: is too short, expected 320 bytes or more'
head -c 319 "$root/paddle.h" >short.txt
check 'char_lm: a text that is too short' refused "$programs/char_lm" short.txt 0

says readme '^readme: 3000 samples$' timeout 100 "$programs/readme"
if command -v mpiexec >/dev/null && [ -x "$programs/cluster" ]; then
    says cluster '^cluster: accuracy 9[5-9]\.' env OMP_NUM_THREADS=1 mpiexec -n 2 "$programs/cluster"
fi

# In double the gradient of the example's layer is checked sharply.
says custom_layer_of_double '^accuracy 9[5-9]\.' "$programs/custom_layer_of_double"
finds_fault() { ! "$@" </dev/null && grep -q '^gradients WRONG' "$log"; }
check 'custom_layer: a wrong gradient of the input' finds_fault "$programs/wrong_input"
check 'custom_layer: a wrong gradient of the parameter' finds_fault "$programs/wrong_param"
finish
