# Takes the code blocks, ```c to ```, out of README.md and of the comments of paddle.h into files out/FILE-LINE.c.
#
# What a block is follows from what stands in it:
#   a program      has a `main(`: taken as it is, and linked
#   declarations   has a line at the block's left edge that begins with #include, static, typedef, struct or enum, or
#                  that begins a function: taken as it is
#   statements     else: put into a function, where the usual variables (net, image, label, ...) are already there;
#                  they are those of prelude.h, and a block may declare its own of the same name
# Declarations and statements are compiled, not linked, after prelude.h.

function finish(    file, kind, i) { # the names after the gap are local
    kind = "statements"
    for (i = 0; i < count; i++) {
        if (lines[i] ~ /(^|[^a-z_])main\(/) { kind = "program"; break }
        if (lines[i] ~ /^(# *include|static|typedef|struct|enum)/) kind = "declarations"
        if (lines[i] ~ /^[a-z][a-zA-Z0-9_ *]*[ *][a-z_0-9]+\(.*\) *\{/ && lines[i] !~ /^(else|return)/) kind = "declarations"
    }
    file = out "/" name "-" begin ".c"
    printf "/* %s */\n", kind > file
    if (kind != "program") print "#include \"tests/snippets/prelude.h\"" > file
    if (kind == "statements") print "int snippet(void);\nint snippet(void) {\n{" > file
    printf "#line %d \"%s\"\n", begin + 1, FILENAME > file
    for (i = 0; i < count; i++) print lines[i] > file
    if (kind == "statements") print "}\nreturn 0;\n}" > file
    close(file)
}

FNR == 1 { block = ""; name = FILENAME; sub(/.*\//, "", name) }

/^ *```/ {
    if (block == "c") finish()
    if (block != "") { block = ""; next }
    block = $0 ~ /^ *```c *$/ ? "c" : "other"
    match($0, /^ */)
    indent = RLENGTH
    begin = FNR
    count = 0
    next
}

block == "c" {
    line = $0
    if (substr(line, 1, indent) ~ /^ *$/) line = substr(line, indent + 1)
    lines[count++] = line
}
