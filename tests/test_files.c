/* Saving and loading: .safetensors files, checkpoints, TensorBoard event files. */
#define _GNU_SOURCE
#include "../paddle.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "inside.h"
#include "support.h"

/* ---- a directory of our own, and files in it ---- */

static char directory[128], path[160];

static int make_directory(void **state) {
    const char *parent = getenv("TMPDIR");
    (void)state;
    snprintf(directory, sizeof directory, "%.100s/test_files.XXXXXX", parent ? parent : "/tmp");
    if (!mkdtemp(directory)) return -1;
    snprintf(path, sizeof path, "%s/file", directory);
    return 0;
}

/* Entries of the directory, which are removed if wanted. */
static int list_directory(const char *where, bool remove_them) {
    DIR *dir = opendir(where);
    struct dirent *entry;
    int n = 0;
    while (dir && (entry = readdir(dir)) != NULL) {
        char name[512];
        if (entry->d_name[0] == '.') continue;
        n++;
        snprintf(name, sizeof name, "%s/%s", where, entry->d_name);
        if (remove_them && remove(name) != 0) {
            list_directory(name, true);
            remove(name);
        }
    }
    if (dir) closedir(dir);
    return n;
}

static int remove_directory(void **state) {
    (void)state;
    list_directory(directory, true);
    return rmdir(directory);
}

static uint64_t little_endian(const unsigned char *bytes, int size) {
    uint64_t value = 0;
    while (size > 0) value = value << 8 | bytes[--size];
    return value;
}

/* What TensorBoard puts behind the parts of a record: a CRC-32C (RFC 3720), bit by bit, turned and added to. */
static uint32_t masked_crc(const unsigned char *bytes, size_t n) {
    uint32_t crc = ~(uint32_t)0;
    for (size_t i = 0; i < n; i++) {
        crc ^= bytes[i];
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
    }
    crc = ~crc;
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

static void write_bytes(const char *name, const void *bytes, size_t n) {
    FILE *f = fopen(name, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static size_t read_bytes(const char *name, unsigned char *bytes, size_t capacity) {
    FILE *f = fopen(name, "rb");
    size_t n;
    assert_non_null(f);
    n = fread(bytes, 1, capacity, f);
    fclose(f);
    return n;
}

/* header_size -1: that of the header. Data: `data_size` bytes, or zeros. */
static size_t build(unsigned char *to, const void *header, int64_t header_size, const void *data, size_t data_size) {
    size_t n = header_size < 0 ? strlen((const char *)header) : (size_t)header_size;
    for (int i = 0; i < 8; i++) to[i] = (unsigned char)((uint64_t)n >> 8 * i);
    memcpy(to + 8, header, n);
    if (data) memcpy(to + 8 + n, data, data_size);
    else memset(to + 8 + n, 0, data_size);
    return 8 + n + data_size;
}

static void write_file(const void *header, int64_t header_size, const void *data, size_t data_size) {
    static unsigned char bytes[1 << 17];
    write_bytes(path, bytes, build(bytes, header, header_size, data, data_size));
}

/* ---- a small net: parameters fc.weight 3x2 and fc.bias 2 ---- */

static pd_net *small_net(const pd_net_opts *opts) {
    pd_net *net = pd_net_new(opts);
    pd_fc_opts fc;
    memset(&fc, 0, sizeof fc);
    fc.name = "fc";
    fc.bias.init = pd_constant(7);
    if (net) pd_fc(net, pd_vector(net, "x", 3), 2, &fc);
    return net;
}

static void get(pd_net *net, const char *name, pd_real *values) {
    pd_param *p = pd_param_find(net, name);
    assert_non_null(p);
    assert_int_equal(pd_param_get(p, values, p->size), PD_OK);
}

/* All 8 numbers. */
static void get_all(pd_net *net, pd_real *values) {
    get(net, "fc.weight", values);
    get(net, "fc.bias", values + 6);
}

#define SMALL_TENSORS                                                                                                  \
    "\"fc.weight\":{\"dtype\":\"F32\",\"shape\":[3,2],\"data_offsets\":[0,24]},"                                       \
    "\"fc.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[24,32]}"
#define SMALL "{" SMALL_TENSORS "}"

/* Loads `path`: `status` and a message with `text` must come, and no value may change unless it works. */
static void expect_load(pd_net *net, const pd_load_opts *opts, pd_status status, const char *text) {
    pd_real before[8], after[8];
    pd_status got;
    get_all(net, before);
    got = pd_load(net, path, opts);
    if (status != PD_OK) check_contains(pd_error(net), text);
    assert_int_equal(got, status);
    get_all(net, after);
    if (status != PD_OK) {
        assert_memory_equal(before, after, sizeof before);
        assert_null(strchr(pd_error(net), '\n'));
        assert_int_equal(pd_error_status(net), status);
    }
}

/* ---- good files ---- */

static void test_round_trip(void **state) {
    pd_net *net = small_net(NULL), *other;
    pd_net_opts opts;
    pd_real a[8], b[8];
    unsigned char bytes[1024], again[1024];
    size_t n;
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.seed = 5;
    other = small_net(&opts);
    get_all(net, a);
    get_all(other, b);
    assert_memory_not_equal(a, b, sizeof a);
    assert_int_equal(pd_save(net, path), PD_OK);
    assert_int_equal(pd_load(other, path, NULL), PD_OK);
    get_all(other, b);
    assert_memory_equal(a, b, sizeof a);
    n = read_bytes(path, bytes, sizeof bytes);
    assert_int_equal(pd_save(other, path), PD_OK);
    assert_int_equal(read_bytes(path, again, sizeof again), n);
    assert_memory_equal(bytes, again, n);
    assert_int_equal(little_endian(bytes, 8) % 8, 0);
    assert_int_equal(list_directory(directory, false), 1); /* no temporary left */
    pd_net_free(net);
    pd_net_free(other);
}

/* More than one chunk, buffers, NaN and infinity, a shared parameter, a shared net. */
static void test_large_round_trip(void **state) {
    pd_net *nets[2], *shared;
    static pd_real a[130 * 257], b[130 * 257];
    pd_param *p, *q;
    (void)state;
    for (int i = 0; i < 2; i++) {
        pd_net_opts opts;
        pd_layer *x;
        pd_fc_opts fc;
        memset(&opts, 0, sizeof opts);
        memset(&fc, 0, sizeof fc);
        fc.weight.name = "wort \xc3\xa4 / 100%"; /* names may hold anything but quotes, backslashes and controls */
        opts.seed = (uint64_t)i;
        nets[i] = pd_net_new(&opts);
        x = pd_batch_norm(nets[i], pd_image(nets[i], "x", 13, 5, 2), NULL);
        x = pd_add(nets[i], (pd_layer *[]){ pd_fc(nets[i], x, 257, &fc), pd_fc(nets[i], x, 257, &fc) }, 2, NULL);
        assert_non_null(x);
    }
    p = pd_param_find(nets[0], "wort \xc3\xa4 / 100%");
    assert_int_equal(p->size, 130 * 257);
    get(nets[0], p->name, a);
    a[3] = sizeof(pd_real) == 8 ? (pd_real)-DBL_MAX : (pd_real)-FLT_MAX;
    a[4] = sizeof(pd_real) == 8 ? (pd_real)1e-320 : (pd_real)1e-44;
    a[5] = (pd_real)-0.0;
    assert_int_equal(pd_param_set(p, a, p->size), PD_OK);
    assert_int_equal(pd_save(nets[0], path), PD_OK);
    assert_int_equal(pd_load(nets[1], path, NULL), PD_OK);
    for (p = pd_param_first(nets[0]), q = pd_param_first(nets[1]); p; p = p->next, q = q->next) {
        assert_string_equal(p->name, q->name);
        pd_param_get(p, a, p->size);
        pd_param_get(q, b, q->size);
        assert_memory_equal(a, b, (size_t)p->size * sizeof *a);
    }
    assert_null(q);
    shared = pd_net_share(nets[0]);
    assert_non_null(shared);
    assert_int_equal(pd_load(shared, path, NULL), PD_E_STATE);
    assert_int_equal(pd_save(shared, path), PD_OK);
    assert_int_equal(pd_load(nets[1], path, NULL), PD_OK);
    pd_net_free(shared);
    pd_net_free(nets[0]);
    pd_net_free(nets[1]);
}

/* Every 16-bit pattern of both short formats against arithmetic, and F64 with its rounding. */
static void test_element_types(void **state) {
    static pd_real values[65536];
    static unsigned char bytes[8 * 65536], all[65536 * 2 + 200];
    pd_net *net = pd_net_new(NULL);
    pd_prelu_opts opts;
    char header[200];
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.weight.name = "w";
    pd_prelu(net, pd_vector(net, "x", 65536), &opts);
    for (int bf16 = 0; bf16 < 2; bf16++) {
        for (int i = 0; i < 65536; i++) {
            int finite = ~i & (bf16 ? 0x7f80 : 0x7c00) ? i : 0;
            bytes[2 * i] = (unsigned char)finite, bytes[2 * i + 1] = (unsigned char)(finite >> 8);
        }
        snprintf(header, sizeof header, "{\"w\":{\"dtype\":\"%s\",\"shape\":[65536],\"data_offsets\":[0,131072]}}",
                 bf16 ? "BF16" : "F16");
        write_bytes(path, all, build(all, header, -1, bytes, 131072));
        assert_int_equal(pd_load(net, path, NULL), PD_OK);
        get(net, "w", values);
        for (int i = 0; i < 65536; i++) {
            int fraction_bits = bf16 ? 7 : 10, bias = bf16 ? 127 : 15;
            int top = (1 << (15 - fraction_bits)) - 1, exponent = i >> fraction_bits & top;
            int fraction = i & ((1 << fraction_bits) - 1);
            double want = exponent == 0 ? ldexp(fraction, 1 - bias - fraction_bits)
                                        : ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
            if (i & 0x8000) want = -want;
            if (exponent == top) want = 0; /* not finite: not in this file */
            assert_true((double)values[i] == want && !signbit(values[i]) == !signbit(want));
        }
    }
    pd_net_free(net);
}

static void test_double_and_float(void **state) {
    pd_net *net = small_net(NULL);
    double d[8] = { 0.1, 3e38, -1e-50, 16777217.0, 16777219.0, 1 + 1e-17, 3.4028235e38, -1e-320 };
    float f[8] = { 0.1f, 3e38f, -1e-40f, 16777216.0f, 1e-45f, -0.0f, FLT_MAX, -FLT_MIN };
    pd_real v[8];
    (void)state;
    write_file("{\"fc.bias\":{\"dtype\":\"F64\",\"shape\":[2],\"data_offsets\":[48,64]},"
               "\"fc.weight\":{\"dtype\":\"F64\",\"shape\":[3,2],\"data_offsets\":[0,48]}}",
               -1, d, sizeof d);
    assert_int_equal(pd_load(net, path, NULL), PD_OK);
    get_all(net, v);
    for (int i = 0; i < 8; i++) assert_true(v[i] == (pd_real)d[i]);
    if (sizeof(pd_real) == 4) assert_true(v[3] == 16777216 && v[4] == 16777220 && v[6] == (pd_real)FLT_MAX);
    write_file(SMALL, -1, f, sizeof f);
    assert_int_equal(pd_load(net, path, NULL), PD_OK);
    get_all(net, v);
    for (int i = 0; i < 8; i++) assert_true(v[i] == (pd_real)f[i]);
    pd_net_free(net);
}

/* A number of any type that is not finite, or not in float, is refused by its tensor's name, wherever it stands. */
static void test_not_finite(void **state) {
    static const struct {
        const char *dtype;
        int size;
        uint64_t bits;
        const char *shown;
    } bad[] = {
        { "F64", 8, 0x7ff0000000000000, "inf" },
        { "F64", 8, 0xfff0000000000000, "-inf" },
        { "F64", 8, 0x7ff8000000000001, "nan" },
        { "F64", 8, 0x7e37e43c8800759c, "1e+300" }, /* the last four not in float only */
        { "F64", 8, 0xfe37e43c8800759c, "-1e+300" },
        { "F64", 8, 0x47efffffffffffff, "3.40282e+38" },
        { "F64", 8, 0x47f0000000000000, "3.40282e+38" },
        { "F32", 4, 0x7f800000, "inf" },
        { "F32", 4, 0xff800000, "-inf" },
        { "F32", 4, 0x7fc00000, "nan" },
        { "F32", 4, 0x7f800001, "nan" },
        { "F16", 2, 0x7c00, "inf" },
        { "F16", 2, 0xfc00, "-inf" },
        { "F16", 2, 0x7e00, "nan" },
        { "F16", 2, 0x7c01, "nan" },
        { "BF16", 2, 0x7f80, "inf" },
        { "BF16", 2, 0xff80, "-inf" },
        { "BF16", 2, 0xff81, "nan" },
    };
    pd_net *net = small_net(NULL);
    pd_load_map map = { .from = "fc.weight", .to = "fc.weight", .transpose = true };
    pd_load_opts turned;
    char header[300], text[100];
    (void)state;
    memset(&turned, 0, sizeof turned);
    turned.map = &map;
    turned.map_count = 1;
    for (int i = 0; i < COUNT(bad); i++)
        for (int place = 0; place < 8; place++)
            for (int transposed = 0; transposed < 2; transposed++) {
                unsigned char data[64] = { 0 };
                int size = bad[i].size;
                bool refused = size < 8 || sizeof(pd_real) == 4 || strpbrk(bad[i].shown, "in"); /* inf, nan */
                for (int k = 0; k < size; k++) data[place * size + k] = (unsigned char)(bad[i].bits >> 8 * k);
                snprintf(header, sizeof header,
                         "{\"fc.weight\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[0,%d]},"
                         "\"fc.bias\":{\"dtype\":\"%s\",\"shape\":[2],\"data_offsets\":[%d,%d]}}",
                         bad[i].dtype, transposed ? "2,3" : "3,2", 6 * size, bad[i].dtype, 6 * size, 8 * size);
                write_file(header, -1, data, 8 * (size_t)size);
                snprintf(text, sizeof text, "tensor \"%s\": number %d, ", place < 6 ? "fc.weight" : "fc.bias",
                         place < 6 ? place : place - 6);
                expect_load(net, transposed ? &turned : NULL, refused ? PD_E_NUMERIC : PD_OK, text);
                if (refused) check_contains(pd_error(net), "is not a finite number of this build");
                if (refused) check_contains(pd_error(net), bad[i].shown);
            }
    pd_net_free(net);
}

/* Nor can such numbers be put in by hand, or saved: what was saved before stays. */
static void test_not_finite_in_the_net(void **state) {
    pd_net *net = small_net(NULL);
    pd_param *w = pd_param_find(net, "fc.weight");
    pd_real before[8], after[8], v[6] = { 0 };
    (void)state;
    get_all(net, before);
    assert_int_equal(pd_save(net, path), PD_OK);
    v[4] = (pd_real)NAN;
    assert_int_equal(pd_param_set(w, v, 6), PD_E_NUMERIC);
    assert_string_equal(pd_error(net), "pd_param_set: parameter \"fc.weight\": number 4 is nan");
    v[0] = (pd_real)-INFINITY;
    assert_int_equal(pd_param_set(w, v, 6), PD_E_NUMERIC);
    assert_string_equal(pd_error(net), "pd_param_set: parameter \"fc.weight\": number 0 is -inf");
    get_all(net, after);
    assert_memory_equal(before, after, sizeof before);
    w->value[5] = (pd_real)INFINITY; /* as by a training that went astray */
    assert_int_equal(pd_save(net, path), PD_E_NUMERIC);
    check_contains(pd_error(net), "/file: \"fc.weight\" can't be saved: number 5 is inf");
    assert_int_equal(list_directory(directory, false), 1);
    assert_int_equal(pd_load(net, path, NULL), PD_OK);
    get_all(net, after);
    assert_memory_equal(before, after, sizeof before);
    pd_net_free(net);
}

/* What is allowed though it looks odd: white space, escapes, unknown fields and types, empty and high-dimensional
   tensors, metadata, padding. */
static void test_odd_but_good(void **state) {
    static const char header[] =
        "{ \"\\u0066c.\\u0062ias\" : {\"shape\":[ 2 ],\t\"dtype\":\"F32\" , \"data_offsets\":[24,32], "
        "\"note\":{\"a\":[1,-2.5e+7,0.1E-3,true,false,null,\"x\\n\",[],{}],\"b\":{\"\":0}}},\n"
        "\"__metadata__\":{\"format\":\"pt\",\"\\ud83d\\ude00\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\u20AC\"},"
        "\"later\":{\"dtype\":\"F9_NEW\",\"shape\":[7],\"data_offsets\":[32,35]},"
        "\"empty\":{\"dtype\":\"I64\",\"shape\":[0,9],\"data_offsets\":[35,35]},"
        "\"one\":{\"dtype\":\"BOOL\",\"shape\":[],\"data_offsets\":[35,36]},"
        "\"quarter\":{\"dtype\":\"F4\",\"shape\":[1,1,1,1,1,1,1,1,1,1,2,2],\"data_offsets\":[36,38]},"
        "\"fc.weight\":{\"dtype\":\"F32\",\"shape\":[3,2],\"data_offsets\":[0,24]}}  \n\t\r ";
    float data[10] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    pd_net *net = small_net(NULL);
    pd_real v[8];
    inside_tensors *t;
    inside_tensor tensor;
    FILE *f;
    (void)state;
    write_file(header, -1, data, 38);
    if (pd_load(net, path, NULL) != PD_OK) fail_msg("%s", pd_error(net));
    get_all(net, v);
    for (int i = 0; i < 8; i++) assert_true(v[i] == (pd_real)(i + 1));
    f = fopen(path, "rb");
    t = inside_tensors_open(net, f, path);
    assert_non_null(t);
    assert_int_equal(inside_tensors_count(t), 6);
    assert_string_equal(inside_tensors_text(t, "for", "mat"), "pt");
    assert_string_equal(inside_tensors_text(t, "", "\xf0\x9f\x98\x80"), "\"\\/\b\f\n\r\t\xc3\xa9\xe2\x82\xac");
    assert_null(inside_tensors_text(t, "", "forma"));
    assert_null(inside_tensors_text(t, "format", "s"));
    assert_true(inside_tensors_find(t, "", "quarter", &tensor));
    assert_int_equal(tensor.dim_count, 12);
    assert_true(inside_tensors_find(t, "quar", "ter", &tensor));
    assert_int_equal(tensor.size, 4);
    assert_false(inside_tensors_find(t, "", "", &tensor));
    inside_tensors_close(t);
    fclose(f);
    pd_net_free(net);
}

/* ---- bad files ---- */

#define T(rest) "{\"fc.bias\":{" rest "}}"
#define V(value) T("\"x\":" value ",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]")

static const struct {
    const char *header;
    size_t data;
    const char *text;
} malformed[] = {
    { "", 0, "expected '{', found its end" },
    { "[]", 0, "header, byte 0: expected '{', found '['" },
    { " {}", 0, "expected '{', found byte 0x20" },
    { "{", 0, "expected a string, found its end" },
    { "{]", 0, "expected a string, found ']'" },
    { "{}}", 0, "byte 2: expected nothing but spaces after the last '}', found '}'" },
    { "{}  x", 0, "expected nothing but spaces" },
    { "{'a':1}", 0, "expected a string, found '''" },
    { "{a:1}", 0, "expected a string, found 'a'" },
    { "{\"a", 0, "expected the end of the string, found its end" },
    { "{\"a\"", 0, "expected ':', found its end" },
    { "{\"a\"}", 0, "expected ':', found '}'" },
    { "{\"a\":", 0, "expected '{', found its end" },
    { "{\"a\":1}", 0, "expected '{', found '1'" },
    { "{\"a\":null}", 0, "expected '{', found 'n'" },
    { "{\"a\":{}}", 0, "tensor \"a\" has no \"dtype\"" },
    { T("\"dtype\":\"F32\",\"shape\":[2]"), 8, "has no \"data_offsets\"" },
    { T("\"dtype\":\"F32\",\"data_offsets\":[0,8]"), 8, "has no \"shape\"" },
    { T("\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"), 8, "no second value" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"shape\":[2],\"data_offsets\":[0,8]"), 8, "no second value" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"data_offsets\":[0,8]"), 8, "no second value" },
    { T("\"dtype\":32,\"shape\":[2],\"data_offsets\":[0,8]"), 8, "expected a string, found '3'" },
    { T("\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]"), 8, "expected '[', found '2'" },
    { T("\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]"), 8, "whole number without sign" },
    { T("\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]"), 8, "whole number without sign" },
    { T("\"dtype\":\"F32\",\"shape\":[2e0],\"data_offsets\":[0,8]"), 8, "whole number without sign" },
    { T("\"dtype\":\"F32\",\"shape\":[02],\"data_offsets\":[0,8]"), 8, "leading zeros" },
    { T("\"dtype\":\"F32\",\"shape\":[\"2\"],\"data_offsets\":[0,8]"), 8, "whole number" },
    { T("\"dtype\":\"F32\",\"shape\":[2,],\"data_offsets\":[0,8]"), 8, "whole number" },
    { T("\"dtype\":\"F32\",\"shape\":[,2],\"data_offsets\":[0,8]"), 8, "whole number" },
    { T("\"dtype\":\"F32\",\"shape\":[2 1],\"data_offsets\":[0,8]"), 8, "expected ',' or ']', found '1'" },
    { T("\"dtype\":\"F32\",\"shape\":[2},\"data_offsets\":[0,8]"), 8, "expected ',' or ']', found '}'" },
    { T("\"dtype\":\"F32\",\"shape\":[9223372036854775808],\"data_offsets\":[0,8]"), 8, "a number below 2^63" },
    { T("\"dtype\":\"F32\",\"shape\":[99999999999999999999999],\"data_offsets\":[0,8]"), 8, "a number below 2^63" },
    { T("\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]"), 0, "fewer than 2^63 numbers" },
    { T("\"dtype\":\"F32\",\"shape\":[9223372036854775807,9223372036854775807,0],\"data_offsets\":[0,0]"), 0, "2^63" },
    { T("\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]"), 0,
      "do not make 4611686018427387904" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]"), 8, "expected ',', found ']'" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]"), 8, "expected ']', found ','" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":{}"), 8, "expected '[', found '{'" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]"), 8,
      "data_offsets 8, 0, but the next free byte is 0" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,9223372036854775807]"), 8,
      "do not make 2 numbers of F32" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,7]"), 7,
      "has 7 bytes, which do not make 2 numbers of F32" },
    { T("\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]"), 8, "has 8 bytes, which do not make 3 numbers" },
    { T("\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,2]"), 2, "do not make 3 numbers of F4" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"), 7,
      "7 bytes of data, but its tensors have 8: it is cut off" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"), 9, "9 bytes of data, but its tensors have 8" },
    { T("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]"), 12,
      "data_offsets 4, 12, but the next free byte is 0" },
    { "{}", 1, "1 bytes of data, but its tensors have 0" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],"
      "\"data_offsets\":[2,6]}}",
      6, "tensor \"b\" has data_offsets 2, 6, but the next free byte is 4" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],"
      "\"data_offsets\":[5,9]}}",
      9, "tensor \"b\" has data_offsets 5, 9, but the next free byte is 4" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[4],"
      "\"data_offsets\":[4,8]}}",
      8, "two tensors \"a\"" },
    { "{\"a\\nb\":{}}", 0, "tensor \"a?b\" has no \"dtype\"" }, /* messages stay on one line */
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},}", 4, "expected a string, found '}'" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],}}", 4, "expected a string, found '}'" },
    { "{\"a\":{\"dtype\":\"U8\" \"shape\":[4],\"data_offsets\":[0,4]}}", 4, "expected ',' or '}'" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]} \"b\":1}", 4, "expected ',' or '}'" },
    { "{\"__metadata__\":[]}", 0, "expected '{', found '['" },
    { "{\"__metadata__\":null}", 0, "expected '{', found 'n'" },
    { "{\"__metadata__\":{\"a\":1}}", 0, "expected a string, found '1'" },
    { "{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "two metadata entries \"a\"" },
    { "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "no second value" },
    { "{\"a\tb\":{}}", 0, "found byte 0x09" },
    { "{\"\\x\":{}}", 0, "expected an escape sequence, found 'x'" },
    { "{\"\\", 0, "expected an escape sequence, found its end" },
    { "{\"\\u12G4\":{}}", 0, "four hexadecimal digits, found 'G'" },
    { "{\"\\u12", 0, "four hexadecimal digits, found its end" },
    { "{\"\\u0000\":{}}", 0, "a character other than zero" },
    { "{\"\\ud800\":{}}", 0, "the second half of a UTF-16 pair" },
    { "{\"\\ud800\\u0041\":{}}", 0, "a character other than zero" },
    { "{\"\\udc00\":{}}", 0, "a character other than zero" },
    { "{\"\xff\":{}}", 0, "byte 2: expected UTF-8, found byte 0xff" },
    { "{\"\xc0\x80\":{}}", 0, "expected UTF-8" },
    { "{\"\xe0\x80\x80\":{}}", 0, "expected UTF-8" },
    { "{\"\xed\xa0\x80\":{}}", 0, "expected UTF-8" },
    { "{\"\xf0\x80\x80\x80\":{}}", 0, "expected UTF-8" },
    { "{\"\xf4\x90\x80\x80\":{}}", 0, "expected UTF-8" },
    { "{\"\xe2\x82\":{}}", 0, "expected UTF-8" },
    { "{}\xe2\x82", 0, "byte 2: expected UTF-8" },
    { V("tru"), 8, "expected a value, found 't'" },
    { V("True"), 8, "expected a value, found 'T'" },
    { V("01"), 8, "expected ',' or '}', found '1'" },
    { V("+1"), 8, "expected a value, found '+'" },
    { V("1."), 8, "expected a digit" },
    { V("1e"), 8, "expected a digit" },
    { V("1e+"), 8, "expected a digit" },
    { V("-"), 8, "expected a digit" },
    { V(".5"), 8, "expected a value, found '.'" },
    { V(""), 8, "expected a value, found ','" },
    { V("[1,2"), 8, "',' or ']'" },
    { V("[1}"), 8, "expected ',' or ']', found '}'" },
    { V("{\"a\"}"), 8, "expected ':'" },
    { V("[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]"), 8, "less nesting" },
    { V("{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":"
        "{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":"
        "{\"a\":{\"a\":1"),
      8, "less nesting" },
};

static void test_malformed_headers(void **state) {
    pd_net *net = small_net(NULL);
    (void)state;
    for (size_t i = 0; i < sizeof malformed / sizeof *malformed; i++) {
        write_file(malformed[i].header, -1, NULL, malformed[i].data);
        expect_load(net, NULL, PD_E_FORMAT, malformed[i].text);
    }
    write_file("{}\0", 3, NULL, 0);
    expect_load(net, NULL, PD_E_FORMAT, "byte 2: expected nothing but spaces after the last '}', found byte 0x00");
    write_file("{\"a\0b\":1}", 9, NULL, 0);
    expect_load(net, NULL, PD_E_FORMAT, "found byte 0x00");
    pd_net_free(net);
}

static void test_malformed_sizes(void **state) {
    static const struct {
        unsigned char bytes[16];
        size_t n;
        const char *text;
    } files[] = { { { 0 }, 0, "0 bytes are too few for a safetensors file" },
                  { { 2, 0, 0, 0, 0, 0, 0 }, 7, "7 bytes are too few" },
                  { { 2, 0, 0, 0, 0, 0, 0, 0 }, 8, "a header of 2 bytes does not fit into a file of 8" },
                  { { 2, 0, 0, 0, 0, 0, 0, 0, '{' }, 9, "a header of 2 bytes does not fit into a file of 9" },
                  { { 1, 0xe1, 0xf5, 5, 0, 0, 0, 0, '{', '}' }, 10, "a header of 100000001 bytes; at most 100000000" },
                  { { 0, 0xe1, 0xf5, 5, 0, 0, 0, 0, '{', '}' }, 10, "a header of 100000000 bytes does not fit" },
                  { { 2, 0, 0, 0, 0, 0, 0, 0x80, '{', '}' }, 10, "a header of 9223372036854775810 bytes" },
                  { { 255, 255, 255, 255, 255, 255, 255, 255, '{', '}' }, 10, "a header of 18446744073709551615" } };
    pd_net *net = small_net(NULL);
    (void)state;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        write_bytes(path, files[i].bytes, files[i].n);
        expect_load(net, NULL, PD_E_FORMAT, files[i].text);
    }
    remove(path);
    expect_load(net, NULL, PD_E_IO, "could not be opened: No such file");
    strcpy(path + strlen(directory), "/.");
    expect_load(net, NULL, PD_E_IO, "could not be read: Is a directory");
    strcpy(path + strlen(directory), "/file");
    pd_net_free(net);
}

static void test_truncation(void **state) {
    unsigned char bytes[1024];
    pd_net *net = small_net(NULL);
    size_t n;
    (void)state;
    assert_int_equal(pd_save(net, path), PD_OK);
    n = read_bytes(path, bytes, sizeof bytes);
    for (size_t i = 0; i < n; i++) {
        write_bytes(path, bytes, i);
        expect_load(net, NULL, PD_E_FORMAT, path);
    }
    pd_net_free(net);
}

/* Each flipped bit, and each byte replaced by a few others, must give a load or a message. */
static void test_bit_flips(void **state) {
    static const char replacements[] = "{}[]\",:0-\\u ";
    unsigned char good[1024], bad[1024];
    pd_net *net = small_net(NULL);
    size_t n, header;
    int loaded = 0;
    (void)state;
    n = build(good, SMALL, -1, NULL, 32);
    header = strlen(SMALL) + 8;
    for (size_t i = 0; i < header; i++)
        for (int k = 0; k < 8 + (int)sizeof replacements; k++) {
            pd_real before[8], after[8];
            memcpy(bad, good, n);
            bad[i] = k < 8 ? good[i] ^ (unsigned char)(1 << k) : (unsigned char)replacements[k - 8];
            write_bytes(path, bad, n);
            get_all(net, before);
            if (pd_load(net, path, NULL) == PD_OK) {
                loaded++;
                continue;
            }
            get_all(net, after);
            assert_memory_equal(before, after, sizeof before);
            assert_true(strncmp(pd_error(net), path, strlen(path)) == 0);
        }
    assert_true(loaded > 0 && loaded < 200); /* mostly a byte replaced by itself */
    pd_net_free(net);
}

static void test_wrong_for_the_net(void **state) {
    pd_net *net = small_net(NULL);
    char text[400];
    (void)state;
    write_file("{\"fc.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, NULL, 8);
    expect_load(net, NULL, PD_E_FORMAT, "no tensor \"fc.weight\" for parameter \"fc.weight\" (3x2)");
#define WITH(dtype, shape, end)                                                                                        \
    "{\"fc.weight\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[0," end "]},"                       \
    "\"fc.bias\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[" end "," end "]}}"
    write_file(WITH("F32", "[2,3]", "24"), -1, NULL, 24);
    expect_load(net, NULL, PD_E_SHAPE,
                "tensor \"fc.weight\": expected 3x2 for parameter \"fc.weight\", found 2x3 (pd_load_map");
    write_file(WITH("F32", "[6]", "24"), -1, NULL, 24);
    expect_load(net, NULL, PD_E_SHAPE, "expected 3x2 for parameter \"fc.weight\", found 6");
    write_file(WITH("F32", "[3,2,1]", "24"), -1, NULL, 24);
    expect_load(net, NULL, PD_E_SHAPE, "found 3x2x1");
    write_file(WITH("F32", "[]", "4"), -1, NULL, 4);
    expect_load(net, NULL, PD_E_SHAPE, "found a single number");
    write_file(WITH("F32", "[1,1,1,1,1,1,1,1,3,2]", "24"), -1, NULL, 24);
    expect_load(net, NULL, PD_E_SHAPE, "found 1x1x1x1x1x1x1x1");
    write_file(WITH("I32", "[3,2]", "24"), -1, NULL, 24);
    expect_load(net, NULL, PD_E_UNSUPPORTED, "tensor \"fc.weight\" holds I32, which can't be loaded here");
    write_file(WITH("NEW\\n", "[3,2]", "24"), -1, NULL, 24);
    expect_load(net, NULL, PD_E_UNSUPPORTED, "tensor \"fc.weight\" holds NEW?, which");
    write_file(WITH("F32", "[3,2]", "24"), -1, NULL, 24); /* the second one is wrong: the first stays as it was */
    expect_load(net, NULL, PD_E_UNSUPPORTED, "tensor \"fc.bias\" holds U8");
    snprintf(text, sizeof text, "{\"%0300d\":{}}", 1); /* a long name is cut off */
    write_file(text, -1, NULL, 0);
    expect_load(net, NULL, PD_E_FORMAT, "0\" has no \"dtype\"");
    assert_int_equal(pd_load(NULL, path, NULL), PD_E_MEMORY);
    assert_int_equal(pd_load(net, NULL, NULL), PD_E_ARGUMENT);
    assert_int_equal(pd_save(net, NULL), PD_E_ARGUMENT);
    pd_net_free(net);
}

/* ---- maps ---- */

static void test_map(void **state) {
    static const char header[] = "{\"kernel\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
                                 "\"fc.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[24,32]}}";
    float data[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    static const pd_real turned[8] = { 1, 4, 2, 5, 3, 6, 7, 8 };
    pd_load_map map[2] = { { .from = "kernel", .to = "fc.weight", .transpose = true },
                           { .from = "fc.bias", .to = "fc.bias" } };
    pd_load_opts opts;
    pd_net *net = small_net(NULL);
    pd_real v[8];
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.map = map;
    opts.map_count = 1;
    write_file(header, -1, data, sizeof data);
    expect_load(net, NULL, PD_E_FORMAT, "no tensor \"fc.weight\"");
    expect_load(net, &opts, PD_OK, "");
    get_all(net, v);
    assert_memory_equal(v, turned, sizeof v);
    opts.map_count = 2;
    expect_load(net, &opts, PD_OK, "");
    map[0].transpose = false;
    expect_load(net, &opts, PD_E_SHAPE,
                "tensor \"kernel\": expected 3x2 for parameter \"fc.weight\", found 2x3 (pd_load_map");
    map[1].transpose = true;
    expect_load(net, &opts, PD_E_ARGUMENT, "parameter \"fc.bias\" is 2; only two dimensions can be transposed");
    map[1].to = "fc.weight";
    expect_load(net, &opts, PD_E_ARGUMENT, "map entries 0 and 1 both load parameter \"fc.weight\"");
    map[1].to = "fc2.weight";
    expect_load(net, &opts, PD_E_ARGUMENT, "the net has no parameter \"fc2.weight\"");
    map[1].to = NULL;
    expect_load(net, &opts, PD_E_ARGUMENT, "map entry 1 lacks a name");
    map[1].to = "fc.bias";
    map[1].from = NULL;
    expect_load(net, &opts, PD_E_ARGUMENT, "map entry 1 lacks a name");
    opts.map_count = 1;
    map[0].from = "fc.bias";
    expect_load(net, &opts, PD_E_SHAPE, "tensor \"fc.bias\": expected 3x2 for parameter \"fc.weight\", found 2");
    map[0].transpose = true;
    write_file(SMALL, -1, data, sizeof data);
    map[0].from = "fc.weight";
    expect_load(net, &opts, PD_E_SHAPE, "expected 3x2 transposed for parameter \"fc.weight\", found 3x2");
    opts.map_count = -1;
    expect_load(net, &opts, PD_E_ARGUMENT, "-1 map entries");
    opts.map_count = 1;
    opts.map = NULL;
    expect_load(net, &opts, PD_E_ARGUMENT, "no map");
    pd_net_free(net);
}

static void test_partial(void **state) {
    float data[2] = { 70, 80 };
    pd_load_map map = { .from = "missing", .to = "fc.weight", .transpose = true };
    pd_load_opts opts;
    pd_net *net = small_net(NULL);
    pd_real before[8], after[8];
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.partial = true;
    write_file("{\"fc.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, data, 8);
    get_all(net, before);
    expect_load(net, &opts, PD_OK, "");
    get_all(net, after);
    assert_memory_equal(before, after, 6 * sizeof *after);
    assert_true(after[6] == 70 && after[7] == 80);
    opts.map = &map;
    opts.map_count = 1; /* what is named must be there */
    expect_load(net, &opts, PD_E_FORMAT, "no tensor \"missing\" for parameter \"fc.weight\" (3x2)");
    map.to = "fc.bias";
    map.transpose = false;
    expect_load(net, &opts, PD_E_FORMAT, "no tensor \"missing\" for parameter \"fc.bias\" (2)");
    map.from = "fc.bias";
    expect_load(net, &opts, PD_OK, "");
    map.to = "head.bias";
    expect_load(net, &opts, PD_E_ARGUMENT, "the net has no parameter \"head.bias\"");
    opts.map_count = 0;
    write_file("{\"fc.bias\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", -1, data, 4);
    expect_load(net, &opts, PD_E_SHAPE, "expected 2 for parameter \"fc.bias\", found 1");
    write_file("{\"fc.Bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, data, 8);
    expect_load(net, &opts, PD_E_FORMAT,
                "none of its 1 tensors, such as \"fc.Bias\", has the name of a parameter, such as \"fc.weight\"; see");
    write_file("{}", -1, NULL, 0);
    expect_load(net, &opts, PD_E_FORMAT, "none of its 0 tensors has the name of a parameter, such as \"fc.weight\"");
    pd_net_free(net);

    net = pd_net_new(NULL); /* without parameters there is nothing that could be missing */
    pd_vector(net, "x", 1);
    assert_int_equal(pd_load(net, path, &opts), PD_OK);
    assert_int_equal(pd_save(net, path), PD_OK);
    assert_int_equal(pd_load(net, path, NULL), PD_OK);
    pd_net_free(net);
}

/* A transposed matrix of more than one chunk. */
static void test_large_transpose(void **state) {
    enum { IN = 150, OUT = 111 };
    static float data[IN * OUT];
    static pd_real v[IN * OUT];
    static unsigned char bytes[sizeof data + 200];
    pd_net *net = pd_net_new(NULL);
    pd_load_map map = { .from = "w", .to = "fc1.weight", .transpose = true };
    pd_load_opts opts;
    pd_fc_opts fc;
    (void)state;
    memset(&opts, 0, sizeof opts);
    memset(&fc, 0, sizeof fc);
    fc.no_bias = true;
    opts.map = &map;
    opts.map_count = 1;
    pd_fc(net, pd_vector(net, "x", IN), OUT, &fc);
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i < IN; i++) data[o * IN + i] = (float)(o * 1000 + i);
    write_bytes(path, bytes,
                build(bytes, "{\"w\":{\"dtype\":\"F32\",\"shape\":[111,150],\"data_offsets\":[0,66600]}}", -1, data,
                      sizeof data));
    assert_int_equal(pd_load(net, path, &opts), PD_OK);
    get(net, "fc1.weight", v);
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i < IN; i++) assert_true(v[i * OUT + o] == (pd_real)(o * 1000 + i));
    pd_net_free(net);
}

/* ---- failures of the world outside ---- */

/* A file whose reads fail from some offset on: with EIO, or by ending. */
typedef struct sick_file {
    unsigned char bytes[2048];
    int64_t size, at, sick;
    bool ends;
} sick_file;

static ssize_t sick_read(void *cookie, char *to, size_t n) {
    sick_file *f = (sick_file *)cookie;
    int64_t left = smaller(f->size, f->sick) - f->at;
    if (f->at >= f->sick && !f->ends) {
        errno = EIO;
        return -1;
    }
    if (left <= 0) return 0;
    n = (size_t)smaller((int64_t)n, left);
    memcpy(to, f->bytes + f->at, n);
    f->at += (int64_t)n;
    return (ssize_t)n;
}

static int sick_seek(void *cookie, off64_t *offset, int whence) {
    sick_file *f = (sick_file *)cookie;
    f->at = *offset = (whence == SEEK_SET ? 0 : whence == SEEK_CUR ? f->at : f->size) + *offset;
    return 0;
}

static void test_read_errors(void **state) {
    static sick_file sick;
    cookie_io_functions_t calls = { sick_read, NULL, sick_seek, NULL };
    pd_net *net = small_net(NULL);
    pd_real before[8], after[8];
    (void)state;
    get_all(net, before);
    sick.size = (int64_t)build(sick.bytes, SMALL, -1, NULL, 32);
    for (int ends = 0; ends < 2; ends++)
        for (sick.sick = 0; sick.sick <= sick.size; sick.sick++) {
            FILE *f = fopencookie(&sick, "rb", calls);
            pd_status status;
            setvbuf(f, NULL, _IONBF, 0);
            sick.at = 0;
            sick.ends = ends;
            status = inside_load_file(net, f, "sick", NULL);
            fclose(f);
            if (sick.sick == sick.size) {
                assert_int_equal(status, PD_OK);
                pd_param_set(pd_param_find(net, "fc.weight"), before, 6);
                pd_param_set(pd_param_find(net, "fc.bias"), before + 6, 2);
                continue;
            }
            assert_int_equal(status, PD_E_IO);
            check_contains(pd_error(net), ends ? "sick: could not be read: it became shorter"
                                               : "sick: could not be read: Input/output error");
            get_all(net, after);
            assert_memory_equal(before, after, sizeof before);
        }
    pd_net_free(net);
}

/* A limit on the size of files stands for a full disk, at every place where it can get full. */
static void test_full_disk(void **state) {
    static unsigned char old[1 << 18], now[1 << 18];
    struct rlimit limit;
    rlim_t kept;
    pd_net *net = pd_net_new(NULL);
    size_t n;
    pd_fc(net, pd_vector(net, "x", 100), 301, NULL);
    (void)state;
    assert_int_equal(pd_save(net, path), PD_OK);
    n = read_bytes(path, old, sizeof old);
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &limit);
    kept = limit.rlim_cur;
    for (size_t i = 0; i < n; i += i < 300 || n - i < 300 ? 1 : 997) {
        pd_status status;
        limit.rlim_cur = i;
        setrlimit(RLIMIT_FSIZE, &limit);
        status = pd_save(net, path);
        limit.rlim_cur = kept;
        setrlimit(RLIMIT_FSIZE, &limit);
        assert_int_equal(status, PD_E_IO);
        check_contains(pd_error(net), "could not be written: File too large");
        assert_int_equal(read_bytes(path, now, sizeof now), n);
        assert_memory_equal(old, now, n);
        assert_int_equal(list_directory(directory, false), 1);
    }
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(pd_save(net, path), PD_OK);
    pd_net_free(net);
}

static void test_dev_full(void **state) {
    pd_net *net = small_net(NULL);
    FILE *f = fopen("/dev/full", "wb");
    (void)state;
    assert_int_equal(pd_save(net, "/dev/full"), PD_E_IO);
    assert_string_equal(pd_error(net), "/dev/full: is not a regular file");
    if (!f) skip();
    assert_int_equal(inside_save_file(net, f), ENOSPC);
    fclose(f);
    pd_net_free(net);
}

static void test_unwritable(void **state) {
    pd_net *net = small_net(NULL);
    char text[300];
    (void)state;
    assert_int_equal(pd_save(net, "/nowhere/at/all"), PD_E_IO);
    assert_string_equal(pd_error(net), "/nowhere/at/all: could not be written: No such file or directory");
    assert_int_equal(pd_save(net, directory), PD_E_IO);
    snprintf(text, sizeof text, "%s: is not a regular file", directory);
    assert_string_equal(pd_error(net), text);
    pd_net_free(net);
}

/* A name without a directory goes to the current one. */
static void test_relative_path(void **state) {
    pd_net *net = small_net(NULL);
    char *here = getcwd(NULL, 0);
    (void)state;
    assert_int_equal(chdir(directory), 0);
    assert_int_equal(pd_save(net, "relative"), PD_OK);
    assert_int_equal(pd_load(net, "relative", NULL), PD_OK);
    assert_int_equal(remove("relative"), 0);
    assert_int_equal(chdir(here), 0);
    free(here);
    pd_net_free(net);
}

/* Killed while saving again and again, at any instant: what is there loads, and holds one of the two models. */
static void test_killed(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_param *p;
    static pd_real v[300 * 300];
    pd_fc_opts fc;
    (void)state;
    memset(&fc, 0, sizeof fc);
    fc.no_bias = true;
    pd_fc(net, pd_vector(net, "x", 300), 300, &fc);
    p = pd_param_first(net);
    pd_param_set(p, v, p->size);
    assert_int_equal(pd_save(net, path), PD_OK);
    for (int i = 0; i < 40; i++) {
        pid_t child = fork();
        int status;
        if (child == 0)
            for (int value = 0;; value ^= 1) {
                for (int k = 0; k < 300 * 300; k++) v[k] = (pd_real)value;
                pd_param_set(p, v, p->size);
                if (pd_save(net, path) != PD_OK) _exit(1);
            }
        usleep((useconds_t)(i * 700 + 300));
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
        assert_true(WIFSIGNALED(status));
        assert_int_equal(pd_load(net, path, NULL), PD_OK);
        pd_param_get(p, v, p->size);
        for (int k = 1; k < 300 * 300; k++) assert_true(v[k] == v[0]);
        assert_true(list_directory(directory, false) <= 2); /* of those before, their successors have cleared away */
    }
    assert_int_equal(pd_save(net, path), PD_OK);
    assert_int_equal(list_directory(directory, false), 1);
    pd_net_free(net);
}

/* ---- what a save does to the files beside it ---- */

static const char *beside(const char *name) {
    static char texts[4][300];
    static int turn;
    char *text = texts[turn++ % 4];
    snprintf(text, sizeof texts[0], "%s/%s", directory, name);
    return text;
}

static int mode_of(const char *name) {
    struct stat s;
    return lstat(name, &s) == 0 ? (int)(s.st_mode & 0777) : -1;
}

static bool is_link(const char *name) {
    struct stat s;
    return lstat(name, &s) == 0 && S_ISLNK(s.st_mode);
}

/* Links of all kinds stay, and the file that they lead to is replaced. */
static void test_links(void **state) {
    static const struct {
        const char *name, *text; /* %s: the directory */
    } links[] = { { "relative", "sub/model" }, { "sub/beside", "model" },   { "absolute", "%s/sub/model" },
                  { "chain", "absolute" },     { "sub/up", "../relative" }, { "to nothing", "sub/new" } };
    pd_net *net = small_net(NULL);
    pd_real v[6];
    char text[300], *whole = realpath(directory, NULL);
    (void)state;
    assert_int_equal(mkdir(beside("sub"), 0700), 0);
    assert_int_equal(pd_save(net, beside("sub/model")), PD_OK);
    for (int i = 0; i < COUNT(links); i++) {
        const char *target = i + 1 < COUNT(links) ? beside("sub/model") : beside("sub/new"),
                   *link = beside(links[i].name);
        snprintf(text, sizeof text, strchr(links[i].text, '%') ? "%s/sub/model" : "%s",
                 strchr(links[i].text, '%') ? whole : links[i].text);
        assert_int_equal(symlink(text, link), 0);
        for (int k = 0; k < 6; k++) v[k] = (pd_real)(10 * i + k);
        assert_int_equal(pd_param_set(pd_param_find(net, "fc.weight"), v, 6), PD_OK);
        if (pd_save(net, link) != PD_OK) fail_msg("%s: %s", link, pd_error(net));
        assert_true(is_link(link) && !is_link(target));
        memset(v, 0, sizeof v);
        assert_int_equal(pd_param_set(pd_param_find(net, "fc.weight"), v, 6), PD_OK);
        assert_int_equal(pd_load(net, target, NULL), PD_OK);
        get(net, "fc.weight", v);
        assert_true(v[0] == 10 * i && v[5] == 10 * i + 5);
    }
    assert_int_equal(list_directory(beside("sub"), false), 4); /* model, new, two links */
    assert_int_equal(symlink("loop", beside("loop")), 0);
    assert_int_equal(pd_save(net, beside("loop")), PD_E_IO);
    check_contains(pd_error(net), "loop: could not be written: Too many levels of symbolic links");
    assert_true(is_link(beside("loop")));
    free(whole);
    pd_net_free(net);
}

/* A file that is there keeps its mode; a new one gets what the umask leaves. */
static void test_modes(void **state) {
    static const mode_t modes[] = { 0600, 0444, 0640, 0666, 0755 };
    pd_net *net = small_net(NULL);
    mode_t kept = umask(027);
    (void)state;
    assert_int_equal(pd_save(net, path), PD_OK);
    assert_int_equal(mode_of(path), 0640);
    for (int i = 0; i < COUNT(modes); i++) {
        assert_int_equal(chmod(path, modes[i]), 0);
        assert_int_equal(pd_save(net, path), PD_OK);
        assert_int_equal(mode_of(path), modes[i]);
    }
    umask(kept);
    pd_net_free(net);
}

/* What dead savers to this path have left goes; what a live one holds, or is something else, stays. */
static void test_leftovers(void **state) {
    static const char *const others[] = { "file.tmp-0123456789abcde",   "file.tmp-0123456789abcdef0",
                                          "file.tmp-0123456789ABCDEF",  "file.tmp-0123456789abcdeg",
                                          "file2.tmp-0123456789abcdef", "file.tmp-0123456789abcdef.bak",
                                          "afile.tmp-0123456789abcdef", "file.tmp-1234",
                                          "file.tmp0123456789abcdef" };
    pd_net *net = small_net(NULL);
    int held;
    (void)state;
    for (int i = 0; i < COUNT(others); i++) write_bytes(beside(others[i]), "x", 1);
    write_bytes(beside("file.tmp-0123456789abcdef"), "x", 1);
    write_bytes(beside("file.tmp-fedcba9876543210"), "x", 1);
    assert_int_equal(chmod(beside("file.tmp-fedcba9876543210"), 0400), 0);
    write_bytes(beside("file.tmp-aaaaaaaaaaaaaaaa"), "x", 1);
    held = open(beside("file.tmp-aaaaaaaaaaaaaaaa"), O_WRONLY);
    assert_int_equal(flock(held, LOCK_EX), 0);
    write_bytes(beside("precious"), "x", 1);
    assert_int_equal(symlink("precious", beside("file.tmp-bbbbbbbbbbbbbbbb")), 0);
    assert_int_equal(mkdir(beside("file.tmp-cccccccccccccccc"), 0700), 0);
    assert_int_equal(mkfifo(beside("file.tmp-dddddddddddddddd"), 0600), 0);

    assert_int_equal(pd_save(net, path), PD_OK);
    for (int i = 0; i < COUNT(others); i++) assert_int_equal(remove(beside(others[i])), 0);
    assert_int_equal(list_directory(directory, false), 6); /* held, precious, link, directory, pipe, and the model */
    assert_true(mode_of(beside("file.tmp-aaaaaaaaaaaaaaaa")) >= 0 && mode_of(beside("precious")) >= 0);
    assert_int_equal(close(held), 0);
    assert_int_equal(pd_save(net, path), PD_OK);
    assert_int_equal(list_directory(directory, false), 5);
    assert_int_equal(mode_of(beside("file.tmp-aaaaaaaaaaaaaaaa")), -1);
    pd_net_free(net);
}

/* Saves the number `user`, again and again, until told to stop. */
static int stop_saving, failed_saves;
static void *save_repeatedly(void *user) {
    enum { WIDTH = 150 };
    static const pd_net_opts opts = { .threads = 1 };
    pd_net *net = pd_net_new(&opts);
    pd_param *p;
    pd_real *v = (pd_real *)malloc(WIDTH * WIDTH * sizeof *v);
    for (int k = 0; k < WIDTH * WIDTH; k++) v[k] = *(const pd_real *)user;
    pd_fc(net, pd_vector(net, "x", WIDTH), WIDTH, &(pd_fc_opts){ .no_bias = true });
    p = pd_param_first(net);
    if (pd_param_set(p, v, p->size) != PD_OK) __sync_add_and_fetch(&failed_saves, 1);
    while (__sync_add_and_fetch(&failed_saves, 0) == 0 && __sync_add_and_fetch(&stop_saving, 0) == 0)
        if (pd_save(net, path) != PD_OK) {
            print_message("%s\n", pd_error(net));
            __sync_add_and_fetch(&failed_saves, 1);
        }
    free(v);
    pd_net_free(net);
    return NULL;
}

/* Two threads, and two processes, save to one path: each load finds the file of one of them, and none of them fails. */
static void test_savers_of_one_path(void **state) {
    static pd_real numbers[4] = { 1, 2, 3, 4 };
    pthread_t threads[2];
    pid_t children[2];
    pd_net *net = pd_net_new(NULL);
    pd_param *p;
    pd_real *v;
    int seen[5] = { 0 };
    (void)state;
    pd_fc(net, pd_vector(net, "x", 150), 150, &(pd_fc_opts){ .no_bias = true });
    p = pd_param_first(net);
    v = (pd_real *)malloc((size_t)p->size * sizeof *v);
    for (int i = 0; i < p->size; i++) v[i] = 1;
    assert_int_equal(pd_param_set(p, v, p->size), PD_OK);
    assert_int_equal(pd_save(net, path), PD_OK);
    for (int i = 0; i < 2; i++) {
        children[i] = fork();
        if (children[i] == 0) {
            save_repeatedly(&numbers[2 + i]);
            _exit(failed_saves);
        }
    }
    for (int i = 0; i < 2; i++) assert_int_equal(pthread_create(&threads[i], NULL, save_repeatedly, &numbers[i]), 0);
    for (double begin = seconds(); seconds() - begin < 0.5;) {
        if (pd_load(net, path, NULL) != PD_OK) fail_msg("%s", pd_error(net));
        assert_int_equal(pd_param_get(p, v, p->size), PD_OK);
        for (int i = 1; i < p->size; i++) assert_true(v[i] == v[0]);
        seen[(int)v[0]]++;
    }
    __sync_add_and_fetch(&stop_saving, 1);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++) {
        int status;
        assert_int_equal(waitpid(children[i], &status, WNOHANG), 0); /* still at it: it has not failed */
        kill(children[i], SIGKILL);
        waitpid(children[i], &status, 0);
    }
    assert_int_equal(failed_saves, 0);
    print_message("loads of each saver: %d %d %d %d\n", seen[1], seen[2], seen[3], seen[4]);
    assert_int_equal(pd_save(net, path), PD_OK);
    assert_int_equal(list_directory(directory, false), 1);
    free(v);
    pd_net_free(net);
}

/* ---- checksums ---- */

/* Checksums that stand for nothing any more, for tests of what is looked at beside them. */
static void drop_checksums(unsigned char *bytes, size_t n) {
    unsigned char *at;
    while ((at = (unsigned char *)memmem(bytes, n, "\"checksum", 9)) != NULL) at[1] = 'C';
}

/* Whichever bit of a model's file is flipped: an error, or the same numbers. */
static void test_flipped_bits(void **state) {
    static unsigned char good[2048], bad[2048];
    pd_net *net = small_net(NULL);
    pd_load_opts partial;
    pd_real saved[8], v[8];
    pd_status status;
    size_t n;
    FILE *f;
    int loaded = 0;
    (void)state;
    memset(&partial, 0, sizeof partial);
    partial.partial = true;
    get_all(net, saved);
    assert_int_equal(pd_save(net, path), PD_OK);
    n = read_bytes(path, good, sizeof good);
    for (size_t bit = 0; bit < 8 * n; bit++)
        for (int k = 0; k < 2; k++) {
            memcpy(bad, good, n);
            bad[bit / 8] ^= (unsigned char)(1 << bit % 8);
            pd_param_set(pd_param_find(net, "fc.weight"), saved + 2, 6); /* others */
            f = fmemopen(bad, n, "rb");
            status = inside_load_file(net, f, path, k ? &partial : NULL);
            fclose(f);
            if (status != PD_OK) continue;
            loaded++;
            get_all(net, v);
            if (memcmp(v, saved, sizeof v) != 0) fail_msg("bit %d of byte %d", (int)(bit % 8), (int)(bit / 8));
        }
    assert_true(loaded > 100 && loaded < 1000); /* of the checksums' names, and of spaces */
    for (int i = 0; i < 8; i++) {               /* each number by the name of its tensor */
        memcpy(bad, good, n);
        bad[n - sizeof saved + (size_t)i * sizeof *saved] ^= 1;
        write_bytes(path, bad, n);
        expect_load(net, NULL, PD_E_FORMAT,
                    i < 6 ? "tensor \"fc.weight\" is damaged: its checksum is " : "tensor \"fc.bias\" is damaged");
    }
    pd_net_free(net);
}

/* What another program keeps of the metadata, in its own order, still counts; a tensor that it took away is missed. */
static void test_kept_checksums(void **state) {
    static unsigned char bytes[2048];
    static const char *const headers[] = {
        "{\"fc.bias\":{\"dtype\":\"%s\",\"shape\":[2],\"data_offsets\":[0,%d]},\"__metadata__\":{\"note\":\"ours\","
        "\"checksum/fc.bias\":\"%s\",\"checksum/fc.weight\":\"%s\"}}",
        "{\"fc.bias\":{\"dtype\":\"%s\",\"shape\":[2],\"data_offsets\":[0,%d]},\"__metadata__\":{\"note\":\"ours\","
        "\"checksum/fc.bias\":\"%s\",\"Checksum/fc.weight\":\"%s\"}}",
    };
    pd_net *net = small_net(NULL);
    pd_load_opts partial;
    inside_tensors *t;
    char sums[2][100], header[600];
    size_t n;
    FILE *f;
    (void)state;
    memset(&partial, 0, sizeof partial);
    partial.partial = true;
    assert_int_equal(pd_save(net, path), PD_OK);
    n = read_bytes(path, bytes, sizeof bytes);
    f = fopen(path, "rb");
    t = inside_tensors_open(net, f, path);
    assert_non_null(t);
    snprintf(sums[0], sizeof sums[0], "%s", inside_tensors_text(t, "checksum/", "fc.bias"));
    snprintf(sums[1], sizeof sums[1], "%s", inside_tensors_text(t, "checksum/", "fc.weight"));
    assert_null(inside_tensors_text(t, "", "checksum"));
    inside_tensors_close(t);
    fclose(f);
    for (int k = 0; k < 2; k++)
        for (int changed = 0; changed < 2; changed++) {
            snprintf(header, sizeof header, headers[k], sizeof(pd_real) == 8 ? "F64" : "F32",
                     (int)(2 * sizeof(pd_real)), sums[0], sums[1]);
            write_file(header, -1, bytes + n - 2 * sizeof(pd_real), 2 * sizeof(pd_real));
            if (k == 0)
                expect_load(net, &partial, PD_E_FORMAT, "no tensor \"fc.weight\", of which it has the checksum");
            else if (changed)
                expect_load(net, &partial, PD_E_FORMAT, "tensor \"fc.bias\" is damaged: its checksum is ");
            else expect_load(net, &partial, PD_OK, "");
            bytes[n - 1] ^= 1;
        }
    pd_net_free(net);
}

/* Blocks of columns, with and without a transposition, against a plain loop. */
static void test_map_blocks(void **state) {
    static const struct {
        const char *blocks;
        int count, place[6]; /* in the file; of each column of the parameter its column in the file, -1: zeros */
    } cases[] = {
        { NULL, 6, { 0, 1, 2, 3, 4, 5 } },
        { "abc->bac", 6, { 2, 3, 0, 1, 4, 5 } },
        { "abcd->dba", 8, { 6, 7, 2, 3, 0, 1 } },
        { "ab->b", 12, { 6, 7, 8, 9, 10, 11 } },
        { "rzn->zr-", 6, { 2, 3, 0, 1, -1, -1 } },
        { "x->-x", 3, { -1, -1, -1, 0, 1, 2 } },
        { "abcdef->fedcba", 6, { 5, 4, 3, 2, 1, 0 } },
    };
    pd_net *net = pd_net_new(NULL);
    pd_fc_opts fc;
    pd_load_map map[2];
    pd_load_opts opts;
    (void)state;
    memset(&fc, 0, sizeof fc);
    memset(map, 0, sizeof map);
    memset(&opts, 0, sizeof opts);
    fc.name = "fc";
    pd_fc(net, pd_vector(net, "x", 4), 6, &fc);
    map[0].to = "fc.weight";
    map[1].to = "fc.bias";
    map[0].from = "w";
    map[1].from = "b";
    opts.map = map;
    opts.map_count = 2;
    for (int i = 0; i < COUNT(cases); i++)
        for (int transpose = 0; transpose < 2; transpose++) {
            int columns = cases[i].count;
            float data[60];
            pd_real w[24], b[6];
            char header[300];
            for (int k = 0; k < 5 * columns; k++) data[k] = (float)(k + 1);
            map[0].transpose = transpose;
            map[0].blocks = map[1].blocks = cases[i].blocks;
            snprintf(header, sizeof header,
                     "{\"w\":{\"dtype\":\"F32\",\"shape\":[%d,%d],\"data_offsets\":[0,%d]},"
                     "\"b\":{\"dtype\":\"F32\",\"shape\":[%d],\"data_offsets\":[%d,%d]}}",
                     transpose ? columns : 4, transpose ? 4 : columns, 16 * columns, columns, 16 * columns,
                     20 * columns);
            write_file(header, -1, data, 20 * (size_t)columns);
            if (pd_load(net, path, &opts) != PD_OK) fail_msg("%s: %s", cases[i].blocks, pd_error(net));
            get(net, "fc.weight", w);
            get(net, "fc.bias", b);
            for (int c = 0; c < 6; c++) {
                int from = cases[i].place[c];
                assert_true(b[c] == (pd_real)(from < 0 ? 0 : data[4 * columns + from]));
                for (int r = 0; r < 4; r++)
                    assert_true(w[6 * r + c] == (pd_real)(from < 0    ? 0
                                                          : transpose ? data[4 * from + r]
                                                                      : data[columns * r + from]));
            }
        }
    pd_net_free(net);
}

static void test_map_refused(void **state) {
    static const struct {
        const char *blocks, *message;
    } bad[] = {
        { "", "blocks \"\": expected letters, \"->\" and letters" },
        { "ab", "expected letters" },
        { "->a", "expected letters" },
        { "ab->", "expected letters" },
        { "abcdefghijklmnopqrstuvwxyzABCDEFG->a", "more than 32 blocks" },
        { "a->---------------------------------", "more than 32 blocks" },
        { "a-b->a", "a '-' in front of \"->\"" },
        { "aba->a", "two blocks with the same letter" },
        { "ab->aa", "a block that is taken twice" },
        { "ab->ac", "a block that the file doesn't have" },
        { "abc->abc", "parameter \"fc.weight\" is 3x2; its columns are not 3 blocks" },
    };
    pd_load_map map[3];
    pd_load_opts opts;
    pd_net *net = small_net(NULL);
    float data[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    (void)state;
    memset(map, 0, sizeof map);
    memset(&opts, 0, sizeof opts);
    opts.map = map;
    opts.map_count = 1;
    map[0].from = "fc.weight", map[0].to = "fc.weight";
    write_file(SMALL, -1, data, sizeof data);
    for (int i = 0; i < COUNT(bad); i++) {
        map[0].blocks = bad[i].blocks;
        expect_load(net, &opts, PD_E_ARGUMENT, bad[i].message);
    }
    map[0].blocks = "abcd->ba";
    expect_load(net, &opts, PD_E_SHAPE, "tensor \"fc.weight\": expected 3x4 for parameter \"fc.weight\", found 3x2");
    map[0].blocks = NULL;
    map[0].add = true;
    expect_load(net, &opts, PD_E_ARGUMENT,
                "map entry 0 adds to parameter \"fc.weight\", which no entry before it loads");
    map[0].add = false;
    opts.map_count = 2;
    map[1] = map[0];
    expect_load(net, &opts, PD_E_ARGUMENT,
                "map entries 0 and 1 both load parameter \"fc.weight\", and the latter doesn't add");
    map[1].add = true;
    expect_load(net, &opts, PD_OK, "");
    map[1].from = "missing";
    expect_load(net, &opts, PD_E_FORMAT, "no tensor \"missing\" for parameter \"fc.weight\" (3x2)");
    opts.partial = true;
    expect_load(net, &opts, PD_E_FORMAT, "no tensor \"missing\"");
    map[1].from = "fc.bias";
    expect_load(net, &opts, PD_E_SHAPE, "tensor \"fc.bias\": expected 3x2 for parameter \"fc.weight\", found 2");
    map[1].from = "fc.weight";
    data[3] = FLT_MAX; /* twice that is too much in float */
    write_file(SMALL, -1, data, sizeof data);
    expect_load(net, &opts, sizeof(pd_real) == 8 ? PD_OK : PD_E_NUMERIC,
                "tensor \"fc.weight\": added to parameter \"fc.weight\", number 3 is not finite");
    pd_net_free(net);
}

/* Weights as PyTorch's nn.GRU saves them, by the map in the header, against the formulas in its documentation. */
static void test_map_gru(void **state) {
    enum { IN = 3, N = 4, ROWS = 5, W = 3 * N * IN, U = 3 * N * N, ALL = W + U + 6 * N };
    static const pd_load_map map[] = { { "rnn.weight_ih_l0", "gru.weight", true, "rzn->zrn", false },
                                       { "rnn.weight_hh_l0", "gru.recurrent", true, "rzn->zrn", false },
                                       { "rnn.bias_ih_l0", "gru.bias", false, "rzn->zrn", false },
                                       { "rnn.bias_hh_l0", "gru.bias", false, "rzn->zr-", true },
                                       { "rnn.bias_hh_l0", "gru.recurrent_bias", false, "rzn->n", false } };
    float data[ALL], *w = data, *u = w + W, *b = u + U, *c = b + 3 * N;
    double x[ROWS][IN], h[N] = { 0 };
    char header[600];
    pd_net *net = pd_net_new(NULL);
    pd_gru_opts gru;
    pd_load_opts opts;
    pd_layer *y;
    pd_batch *batch;
    const pd_real *out;
    (void)state;
    random_seed(7);
    memset(&gru, 0, sizeof gru);
    memset(&opts, 0, sizeof opts);
    gru.name = "gru";
    y = pd_gru(net, pd_sequence(pd_vector(net, "x", IN)), N, &gru);
    for (int i = 0; i < ALL; i++) data[i] = (float)uniform(-1, 1);
    snprintf(header, sizeof header,
             "{\"rnn.weight_ih_l0\":{\"dtype\":\"F32\",\"shape\":[%d,%d],\"data_offsets\":[0,%d]},"
             "\"rnn.weight_hh_l0\":{\"dtype\":\"F32\",\"shape\":[%d,%d],\"data_offsets\":[%d,%d]},"
             "\"rnn.bias_ih_l0\":{\"dtype\":\"F32\",\"shape\":[%d],\"data_offsets\":[%d,%d]},"
             "\"rnn.bias_hh_l0\":{\"dtype\":\"F32\",\"shape\":[%d],\"data_offsets\":[%d,%d]}}",
             3 * N, IN, 4 * W, 3 * N, N, 4 * W, 4 * (W + U), 3 * N, 4 * (W + U), 4 * (W + U + 3 * N), 3 * N,
             4 * (W + U + 3 * N), 4 * ALL);
    write_file(header, -1, data, sizeof data);
    opts.map = map;
    opts.map_count = COUNT(map);
    if (pd_load(net, path, &opts) != PD_OK) fail_msg("%s", pd_error(net));
    batch = pd_batch_new(net);
    for (int t = 0; t < ROWS; t++) {
        pd_real *row = pd_batch_add_row(batch, 0);
        for (int i = 0; i < IN; i++) row[i] = (pd_real)(x[t][i] = (float)uniform(-1, 1));
    }
    assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &y, 1), PD_OK);
    out = pd_output(y, NULL, NULL);
    for (int t = 0; t < ROWS; t++) {
        double from_x[3 * N], from_h[3 * N]; /* r, z, n */
        for (int k = 0; k < 3 * N; k++) {
            from_x[k] = (double)b[k];
            from_h[k] = (double)c[k];
            for (int i = 0; i < IN; i++) from_x[k] += (double)w[k * IN + i] * x[t][i];
            for (int i = 0; i < N; i++) from_h[k] += (double)u[k * N + i] * h[i];
        }
        for (int k = 0; k < N; k++) {
            double r = 1 / (1 + exp(-from_x[k] - from_h[k])), z = 1 / (1 + exp(-from_x[N + k] - from_h[N + k]));
            h[k] = (1 - z) * tanh(from_x[2 * N + k] + r * from_h[2 * N + k]) + z * h[k];
            check_near((double)out[t * N + k], h[k], REAL_TOLERANCE, "h");
        }
    }
    pd_batch_free(batch);
    pd_net_free(net);
}

/* ---- texts ---- */

/* Every character that JSON wants escaped, all lengths of UTF-8, an empty text. */
static const char *const odd_texts[] = {
    "", "\"\\/\b\f\n\r\t\x01\x1f\x7f", "\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 \xc2\x80 \xef\xbf\xbf \xf4\x8f\xbf\xbf",
    "{\"a\": [1, \"\\u0041\"]}\n\n", "\\\\\""
};

static void set_odd_texts(pd_net *net) {
    char name[] = "text 0";
    for (int i = COUNT(odd_texts) - 1; i >= 0; i--) { /* names need not come in order */
        name[5] = (char)('0' + i);
        assert_int_equal(pd_net_set_text(net, name, odd_texts[i]), PD_OK);
    }
}

static void expect_odd_texts(const pd_net *net) {
    char name[] = "text 0";
    for (int i = 0; i < COUNT(odd_texts); i++) {
        name[5] = (char)('0' + i);
        assert_non_null(pd_net_text(net, name));
        assert_string_equal(pd_net_text(net, name), odd_texts[i]);
    }
}

static void test_texts(void **state) {
    static unsigned char bytes[4096], again[4096];
    pd_net *net = small_net(NULL), *other = small_net(NULL), *empty = pd_net_new(NULL), *shared;
    size_t n;
    (void)state;
    assert_null(pd_net_text(net, "text 0"));
    set_odd_texts(net);
    set_odd_texts(net);
    expect_odd_texts(net);
    assert_int_equal(pd_save(net, path), PD_OK);
    n = read_bytes(path, bytes, sizeof bytes);
    assert_int_equal(pd_net_set_text(other, "text 1", "changed"), PD_OK);
    assert_int_equal(pd_net_set_text(other, "kept", "own"), PD_OK);
    assert_int_equal(pd_load(other, path, NULL), PD_OK);
    expect_odd_texts(other);
    assert_string_equal(pd_net_text(other, "kept"), "own");
    assert_null(pd_net_text(other, "text"));
    assert_int_equal(pd_net_set_text(other, "kept", NULL), PD_OK);
    assert_int_equal(pd_net_set_text(other, "kept", NULL), PD_OK);
    assert_null(pd_net_text(other, "kept"));
    assert_int_equal(pd_save(other, path), PD_OK);
    assert_int_equal(read_bytes(path, again, sizeof again), n);
    assert_memory_equal(bytes, again, n);

    assert_int_equal(pd_load(empty, path, NULL), PD_OK); /* before the net is built */
    expect_odd_texts(empty);
    shared = pd_net_share(net);
    expect_odd_texts(shared);
    assert_int_equal(pd_net_set_text(shared, "a", "b"), PD_E_STATE);
    check_contains(pd_error(shared), "set it in that one");
    assert_int_equal(pd_save(shared, path), PD_OK);
    assert_int_equal(read_bytes(path, again, sizeof again), n);
    assert_memory_equal(bytes, again, n);
    pd_net_free(shared);

    assert_int_equal(pd_net_set_text(net, "a\"b", "x"), PD_E_ARGUMENT);
    assert_int_equal(pd_net_set_text(net, "\xff", "x"), PD_E_ARGUMENT);
    assert_int_equal(pd_net_set_text(net, "", "x"), PD_E_ARGUMENT);
    assert_int_equal(pd_net_set_text(net, NULL, "x"), PD_E_ARGUMENT);
    check_contains(pd_error(net), "a name has 1 to 200 characters");
    assert_int_equal(pd_net_set_text(net, "bad", "ab\xc0\x80"), PD_E_FORMAT);
    check_contains(pd_error(net), "\"bad\" is not UTF-8 at byte 3");
    assert_null(pd_net_text(net, "bad"));
    assert_null(pd_net_text(NULL, "bad"));
    assert_int_equal(pd_net_set_text(NULL, "a", "x"), PD_E_MEMORY);
    pd_net_free(empty);
    pd_net_free(other);
    pd_net_free(net);
}

/* Texts whose entries stand in the way of others: no name is taken. And metadata of other programs are none. */
static void test_texts_apart(void **state) {
    pd_net *net = small_net(NULL), *other = small_net(NULL);
    (void)state;
    assert_int_equal(pd_net_set_text(net, "checksum", "1"), PD_OK);
    assert_int_equal(pd_net_set_text(net, "checksum/fc.bias", "2"), PD_OK);
    assert_int_equal(pd_net_set_text(net, "checkpoint", "3"), PD_OK);
    assert_int_equal(pd_save(net, path), PD_OK);
    assert_int_equal(pd_load(other, path, NULL), PD_OK);
    assert_string_equal(pd_net_text(other, "checksum"), "1");
    assert_string_equal(pd_net_text(other, "checksum/fc.bias"), "2");
    assert_string_equal(pd_net_text(other, "checkpoint"), "3");
    write_file("{\"__metadata__\":{\"format\":\"pt\",\"text/a\":\"\\u00e9\\n\",\"text/\\u00e9\":\"x\"}," SMALL_TENSORS
               "}",
               -1, NULL, 32);
    expect_load(other, NULL, PD_OK, "");
    assert_null(pd_net_text(other, "format"));
    assert_string_equal(pd_net_text(other, "a"), "\xc3\xa9\n");
    assert_string_equal(pd_net_text(other, "\xc3\xa9"), "x");
    assert_string_equal(pd_net_text(other, "checksum"), "1");
    write_file("{\"__metadata__\":{\"text/\":\"a\"}," SMALL_TENSORS "}", -1, NULL, 32);
    expect_load(other, NULL, PD_E_FORMAT, "metadata \"text/\": no name that a text can have");
    write_file("{\"__metadata__\":{\"text/a\\\"\":\"a\"}," SMALL_TENSORS "}", -1, NULL, 32);
    expect_load(other, NULL, PD_E_FORMAT, "no name that a text can have");
    write_file("{\"__metadata__\":{\"text/a\":\"\\u0000\"}," SMALL_TENSORS "}", -1, NULL, 32);
    expect_load(other, NULL, PD_E_FORMAT, "a character other than zero");
    pd_net_free(net);
    pd_net_free(other);
}

/* A flipped bit of the metadata is found, or leaves the texts whole; a failure leaves those that there were. */
static void test_texts_damaged(void **state) {
    static unsigned char good[2048], bad[2048];
    pd_net *net = small_net(NULL), *other;
    size_t n;
    int loaded = 0;
    (void)state;
    assert_int_equal(pd_net_set_text(net, "classes", "cat\ndog\n\"\xc3\xa9\"\n"), PD_OK);
    assert_int_equal(pd_save(net, path), PD_OK);
    n = read_bytes(path, good, sizeof good);
    for (size_t bit = 0; bit < 8 * n; bit++) {
        FILE *f;
        pd_status status;
        memcpy(bad, good, n);
        bad[bit / 8] ^= (unsigned char)(1 << bit % 8);
        other = small_net(NULL);
        assert_int_equal(pd_net_set_text(other, "classes", "old"), PD_OK);
        f = fmemopen(bad, n, "rb");
        status = inside_load_file(other, f, path, NULL);
        fclose(f);
        loaded += status == PD_OK;
        if (strcmp(pd_net_text(other, "classes"), status == PD_OK ? "cat\ndog\n\"\xc3\xa9\"\n" : "old") != 0)
            fail_msg("bit %d of byte %d: %s", (int)(bit % 8), (int)(bit / 8), pd_net_text(other, "classes"));
        pd_net_free(other);
    }
    assert_true(loaded > 10 && loaded < 200);
    pd_net_free(net);
}

/* Some MB, and more than a header may have. */
static void test_long_texts(void **state) {
    enum { BYTES = 6000000, TOO_LONG = 50000001 };
    char *text = (char *)malloc(TOO_LONG + 1);
    pd_net *net = small_net(NULL), *other = small_net(NULL);
    (void)state;
    random_seed(5);
    assert_non_null(text);
    for (int i = 0; i < BYTES; i++) text[i] = (char)(1 + below(127));
    text[BYTES] = 0;
    assert_int_equal(pd_net_set_text(net, "long", text), PD_OK);
    assert_int_equal(pd_save(net, path), PD_OK);
    assert_int_equal(pd_load(other, path, NULL), PD_OK);
    assert_string_equal(pd_net_text(other, "long"), text);
    memset(text, '\n', TOO_LONG); /* two bytes each */
    text[TOO_LONG] = 0;
    assert_int_equal(pd_net_set_text(net, "longer", text), PD_OK);
    assert_int_equal(pd_save(net, path), PD_E_ARGUMENT);
    check_contains(pd_error(net), "its header, with the net's texts, would exceed 100000000 bytes");
    assert_int_equal(list_directory(directory, false), 1);
    assert_int_equal(pd_load(other, path, NULL), PD_OK); /* the old file is there still */
    pd_net_free(net);
    pd_net_free(other);
    free(text);
}

/* ---- memory ---- */

static pd_net_opts counting_opts(failing_allocator *c) {
    pd_net_opts opts;
    memset(&opts, 0, sizeof opts);
    memset(c, 0, sizeof *c);
    c->fail_at = -1;
    opts.allocator.alloc = failing_alloc;
    opts.allocator.free = failing_free;
    opts.allocator.user = c;
    return opts;
}

static void test_out_of_memory(void **state) {
    failing_allocator c;
    pd_net_opts counting = counting_opts(&c);
    pd_net *net = small_net(&counting);
    pd_status status;
    int64_t in_use = c.in_use, failures = 0;
    (void)state;
    for (c.fail_at = 0, status = PD_E_MEMORY; status != PD_OK; c.fail_at++) {
        c.calls = 0;
        status = pd_save(net, path);
        assert_true(status == PD_OK || status == PD_E_MEMORY);
        assert_int_equal(c.in_use, in_use);
        if (status != PD_OK) check_contains(pd_error(net), "out of memory");
        assert_int_equal(list_directory(directory, false), status == PD_OK);
        failures += status != PD_OK;
    }
    assert_true(failures >= 3);
    failures = 0;
    write_file("{\"__metadata__\":{\"a\":\"b\",\"c\":\"d\",\"e\":\"f\"},\"g\":{\"dtype\":\"U8\",\"shape\":[0],"
               "\"data_offsets\":[32,32]},\"fc.weight\":{\"dtype\":\"F32\",\"shape\":[3,2],\"data_offsets\":[0,24]},"
               "\"fc.bias\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[24,32]}}",
               -1, NULL, 32);
    for (c.fail_at = 0, status = PD_E_MEMORY; status != PD_OK; c.fail_at++) {
        pd_real before[8], after[8];
        c.calls = 0;
        get_all(net, before);
        status = pd_load(net, path, NULL);
        get_all(net, after);
        assert_true(status == PD_OK || status == PD_E_MEMORY);
        assert_int_equal(c.in_use, in_use);
        if (status != PD_OK) assert_memory_equal(before, after, sizeof before);
        failures += status != PD_OK;
    }
    assert_true(failures >= 8);
    pd_net_free(net);
    assert_int_equal(c.in_use, 0);
}

/* Three tensors into one parameter, another time in another order; and no memory for it at every point. */
static void test_map_added(void **state) {
    failing_allocator c;
    pd_net_opts counting = counting_opts(&c);
    pd_net *net = small_net(&counting);
    float data[8] = { 1, 2, 3, 4, 5, 6, 70, 80 };
    pd_load_map map[4] = { { "fc.bias", "fc.bias", false, NULL, false },
                           { "fc.weight", "fc.weight", false, NULL, false },
                           { "fc.bias", "fc.bias", false, "ab->ba", true },
                           { "fc.bias", "fc.bias", false, "ab->-b", true } };
    pd_load_opts opts;
    pd_real v[8], before[8];
    pd_status status = PD_E_MEMORY;
    int64_t in_use = c.in_use, failures = 0;
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.map = map;
    opts.map_count = 4;
    write_file(SMALL, -1, data, sizeof data);
    get_all(net, before);
    for (c.fail_at = 0; status != PD_OK; c.fail_at++) {
        c.calls = 0;
        status = pd_load(net, path, &opts);
        get_all(net, v);
        if (status == PD_OK) break;
        assert_int_equal(status, PD_E_MEMORY);
        assert_memory_equal(v, before, sizeof v);
        assert_int_equal(c.in_use, in_use);
        failures++;
    }
    assert_true(failures >= 10);
    for (int i = 0; i < 6; i++) assert_true(v[i] == (pd_real)data[i]);
    assert_true(v[6] == 150 && v[7] == 230);
    pd_net_free(net);
    assert_int_equal(c.in_use, 0);
}

static void test_texts_out_of_memory(void **state) {
    failing_allocator c;
    pd_net_opts counting = counting_opts(&c);
    pd_net *net = small_net(NULL), *other;
    int failures = 0;
    (void)state;
    set_odd_texts(net);
    assert_int_equal(pd_save(net, path), PD_OK);
    for (int64_t fail_at = 0, done = 0; !done; fail_at++) {
        pd_status status;
        counting.allocator.user = &c;
        c.fail_at = -1;
        other = small_net(&counting);
        assert_int_equal(pd_net_set_text(other, "text 1", "old"), PD_OK);
        c.calls = 0;
        c.fail_at = fail_at;
        status = pd_net_set_text(other, "new", "x");
        assert_true(status == PD_OK ? strcmp(pd_net_text(other, "new"), "x") == 0 : !pd_net_text(other, "new"));
        if (status == PD_OK) status = pd_load(other, path, NULL);
        assert_true(status == PD_OK || status == PD_E_MEMORY);
        failures += status != PD_OK;
        done = status == PD_OK;
        if (done) expect_odd_texts(other);
        else assert_string_equal(pd_net_text(other, "text 1"), "old");
        pd_net_free(other);
        assert_int_equal(c.in_use, 0);
    }
    assert_true(failures >= 15);
    pd_net_free(net);
}

/* ---- checkpoints ---- */

/* A net and trainer with everything that has state: momentum and the like, averages, a pruning mask, running
   statistics, dropout. */
typedef struct training {
    pd_net *net;
    pd_trainer *trainer;
} training;

static training new_training(uint64_t seed, pd_optimizer optimizer, const pd_trainer_opts *trainer_opts,
                             const pd_net_opts *net_opts) {
    training t;
    pd_net_opts opts;
    pd_fc_opts fc;
    pd_layer *x, *label;
    memset(&opts, 0, sizeof opts);
    memset(&fc, 0, sizeof fc);
    if (net_opts) opts = *net_opts;
    opts.seed = seed;
    t.net = pd_net_new(&opts);
    x = pd_vector(t.net, "x", 4);
    label = pd_label(t.net, "label", 3);
    fc.name = "hidden";
    fc.act = PD_TANH;
    fc.weight.prune = 0.25;
    x = pd_dropout(t.net, pd_batch_norm(t.net, pd_fc(t.net, x, 6, &fc), NULL), 0.3, NULL);
    t.trainer =
        pd_trainer_new(t.net, pd_cross_entropy(t.net, pd_fc(t.net, x, 3, NULL), label, NULL), optimizer, trainer_opts);
    if (!t.trainer) fail_msg("%s", pd_error(t.net));
    return t;
}

static void free_training(training *t) {
    pd_trainer_free(t->trainer);
    pd_net_free(t->net);
}

/* 30 samples, other ones in each pass; the net learns little from them, which is fine here. */
typedef struct number_reader {
    pd_reader reader;
    int64_t pass, at;
} number_reader;

static pd_status number_next(pd_reader *r, pd_batch *batch, int64_t count) {
    number_reader *n = (number_reader *)r->self;
    for (int64_t i = 0; i < count; i++, n->at++) {
        pd_real *row;
        if (n->at == 30) return PD_END;
        row = pd_batch_add_row(batch, 0);
        if (!row) return PD_E_MEMORY;
        for (int k = 0; k < 4; k++)
            row[k] = (pd_real)(pd_random((uint64_t)n->pass, (uint64_t)(n->at * 4 + k)) % 1000) / 500;
        if (pd_batch_add_id(batch, 1, row[0] > row[1] ? 0 : row[2] > row[3] ? 1 : 2) != PD_OK) return PD_E_MEMORY;
        if (pd_batch_end_sample(batch) != PD_OK) return PD_E_MEMORY;
    }
    return PD_OK;
}

static pd_status number_reset(pd_reader *r, int64_t pass) {
    number_reader *n = (number_reader *)r->self;
    n->pass = pass;
    n->at = 0;
    return PD_OK;
}

static pd_reader *number_start(number_reader *n) {
    memset(n, 0, sizeof *n);
    n->reader.api_version = PD_API_VERSION;
    n->reader.name = "numbers";
    n->reader.self = n;
    n->reader.next = number_next;
    n->reader.reset = number_reset;
    return &n->reader;
}

static int stop_after(void *user, const pd_event *event) { return event->kind == PD_END_BATCH && --*(int *)user == 0; }

/* Trains up to 3 passes of 5 batches, with a test after each, or stops after `batches` (0: does not stop). */
static pd_status train(training *t, int batches) {
    number_reader data, test;
    pd_train_opts opts;
    memset(&opts, 0, sizeof opts);
    opts.batch_size = 7;
    opts.test = number_start(&test);
    opts.patience = 10;
    opts.on_event = batches ? stop_after : NULL;
    opts.user = &batches;
    return pd_train(t->trainer, number_start(&data), 3, &opts);
}

/* The state of a training: its checkpoint's bytes. */
static size_t state_of(training *t, unsigned char *bytes, size_t capacity) {
    char name[200];
    snprintf(name, sizeof name, "%s/state", directory);
    if (pd_checkpoint_save(t->trainer, name) != PD_OK) fail_msg("%s", pd_error(t->net));
    return read_bytes(name, bytes, capacity);
}

static void expect_same_state(training *a, training *b) {
    static unsigned char x[1 << 16], y[1 << 16];
    size_t n = state_of(a, x, sizeof x), m = state_of(b, y, sizeof y);
    assert_true(n == m && n < sizeof x);
    assert_memory_equal(x, y, n);
}

/* Stopped after any number of batches, and continued by a net with another seed: the same bits at the end. */
static void test_resume(void **state) {
    pd_optimizer optimizers[] = { pd_sgd(0.1),    pd_momentum(0.1, 0.9), pd_nesterov(0.1, 0.9),    pd_adagrad(0.1),
                                  pd_adadelta(1), pd_rmsprop(0.01),      pd_decayed_adagrad(0.01), pd_adam(0.01),
                                  pd_adamw(0.01), pd_adamax(0.01),       pd_rmsprop(0.01) };
    pd_trainer_opts opts;
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.l2 = 0.01;
    opts.schedule.kind = PD_SCHEDULE_POLY;
    opts.schedule.a = opts.schedule.b = 0.5;
    optimizers[10].centered = true;
    optimizers[10].momentum = 0.5;
    for (int k = 0; k < 11; k++) {
        training whole;
        opts.average_window = k % 2 ? 0.4 : 0;
        whole = new_training(1, optimizers[k], &opts, NULL);
        assert_int_equal(train(&whole, 0), PD_OK);
        for (int batches = 1; batches < 15; batches += k == 7 ? 1 : 4) {
            training first = new_training(1, optimizers[k], &opts, NULL), second;
            assert_int_equal(train(&first, batches), PD_STOPPED);
            assert_int_equal(pd_checkpoint_save(first.trainer, path), PD_OK);
            second = new_training(2, optimizers[k], &opts, NULL);
            if (pd_checkpoint_load(second.trainer, path) != PD_OK) fail_msg("%s", pd_error(second.net));
            expect_same_state(&first, &second);
            free_training(&first);
            assert_int_equal(train(&second, 0), PD_OK);
            expect_same_state(&whole, &second);
            free_training(&second);
        }
        free_training(&whole);
    }
}

/* Back to an earlier point in the same process: best values that came later must go. */
static void test_go_back(void **state) {
    static unsigned char first[1 << 16], again[1 << 16];
    training t = new_training(1, pd_adam(0.01), NULL, NULL), whole = new_training(1, pd_adam(0.01), NULL, NULL);
    size_t n;
    (void)state;
    assert_int_equal(train(&t, 3), PD_STOPPED);
    assert_int_equal(pd_checkpoint_save(t.trainer, path), PD_OK);
    n = state_of(&t, first, sizeof first);
    assert_int_equal(train(&t, 0), PD_OK);
    assert_non_null(inside_best(t.trainer));
    assert_int_equal(pd_checkpoint_load(t.trainer, path), PD_OK);
    assert_int_equal(state_of(&t, again, sizeof again), n);
    assert_memory_equal(first, again, n);
    assert_int_equal(train(&t, 0), PD_OK);
    assert_int_equal(train(&whole, 0), PD_OK);
    expect_same_state(&whole, &t);
    free_training(&t);
    free_training(&whole);
}

/* Averaged values that are swapped in are neither saved as if they were the true ones, nor left behind by loading. */
static void test_averaged(void **state) {
    static unsigned char plain[1 << 16], swapped[1 << 16];
    pd_trainer_opts opts;
    training t;
    number_reader data;
    pd_real v[24], average[24];
    size_t n;
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.average_window = 0.5;
    t = new_training(1, pd_sgd(0.1), &opts, NULL);
    assert_int_equal(pd_train(t.trainer, number_start(&data), 2, &(pd_train_opts){ .batch_size = 7 }), PD_OK);
    assert_int_equal(pd_checkpoint_save(t.trainer, path), PD_OK);
    get(t.net, "hidden.weight", v);
    n = state_of(&t, plain, sizeof plain);
    assert_int_equal(pd_use_average(t.trainer, true), PD_OK);
    get(t.net, "hidden.weight", average);
    assert_memory_not_equal(v, average, sizeof v);
    assert_int_equal(state_of(&t, swapped, sizeof swapped), n);
    assert_memory_equal(plain, swapped, n);
    assert_int_equal(pd_checkpoint_load(t.trainer, path), PD_OK);
    get(t.net, "hidden.weight", average);
    assert_memory_equal(v, average, sizeof v);
    assert_int_equal(pd_use_average(t.trainer, false), PD_OK);
    assert_int_equal(state_of(&t, swapped, sizeof swapped), n);
    assert_memory_equal(plain, swapped, n);
    free_training(&t);
}

/* As plain parameters, a checkpoint loads into a net without a trainer. */
static void test_checkpoint_as_parameters(void **state) {
    training t = new_training(1, pd_adam(0.01), NULL, NULL), other = new_training(2, pd_sgd(0.01), NULL, NULL);
    pd_real a[24], b[24];
    (void)state;
    assert_int_equal(train(&t, 0), PD_OK);
    assert_int_equal(pd_checkpoint_save(t.trainer, path), PD_OK);
    assert_int_equal(pd_load(other.net, path, NULL), PD_OK);
    for (pd_param *p = pd_param_first(t.net); p; p = p->next) {
        assert_true(p->size <= 24);
        get(t.net, p->name, a);
        get(other.net, p->name, b);
        assert_memory_equal(a, b, (size_t)p->size * sizeof *a);
    }
    free_training(&t);
    free_training(&other);
}

/* Loading `path` must fail so, and leave the training as it was. */
static void expect_no_resume(training *t, pd_status status, const char *text) {
    static unsigned char before[1 << 16], after[1 << 16];
    size_t n = state_of(t, before, sizeof before);
    pd_status got = pd_checkpoint_load(t->trainer, path);
    check_contains(pd_error(t->net), text);
    assert_int_equal(got, status);
    assert_int_equal(state_of(t, after, sizeof after), n);
    assert_memory_equal(before, after, n);
}

static void test_wrong_checkpoint(void **state) {
    static const struct {
        const char *from, *to, *text; /* from and to are equally long */
        pd_status status;
    } edits[] = {
        { "\"checkpoint\":\"1\"", "\"checkpoint\":\"2\"", "a checkpoint of version \"2\", expected \"1\"",
          PD_E_UNSUPPORTED },
        { "\"checkpoint\":", "\"checkpoinX\":", "not a checkpoint", PD_E_FORMAT },
        { "\"optimizer\":\"adam\"", "\"optimizer\":\"ad\\n\"", "a checkpoint of ad?, but this trainer uses adam",
          PD_E_ARGUMENT },
        { "\"optimizer\":\"", "\"Optimizer\":\"", "the metadata lacks \"optimizer\"", PD_E_FORMAT },
        { "\"seed\":\"1\"", "\"seed\":\"x\"",
          "metadata \"seed\": expected a whole number up to 18446744073709551615, found \"x\"", PD_E_FORMAT },
        { "\"pass\":\"1\"", "\"pass\":\"-\"", "metadata \"pass\": expected a whole number", PD_E_FORMAT },
        { "\"samples\":\"58\"", "\"samples\":\"5 \"", "metadata \"samples\": expected a whole number", PD_E_FORMAT },
        { "\"samples\":\"58\"", "\"samples\":\" 8\"", "metadata \"samples\": expected a whole number", PD_E_FORMAT },
        { "\"samples\":\"58\"", "\"samples\":\"+8\"", "metadata \"samples\": expected a whole number", PD_E_FORMAT },
        { "\"samples\":", "\"sample5\":", "the metadata lacks \"samples\"", PD_E_FORMAT },
        { "\"pass_cost\":\"0x", "\"pass_cost\":\"zx", "metadata \"pass_cost\": expected a number", PD_E_FORMAT },
        { "\"best_cost\":\"0", "\"best_cost\":\"\\", "header, byte", PD_E_FORMAT },
        { "\"best_cost\":", "\"bestXcost\":", "the metadata lacks \"best_cost\"", PD_E_FORMAT },
        { "\"updates/hidden.bias\"", "\"updatez/hidden.bias\"", "the metadata lacks \"updates/hidden.bias\"",
          PD_E_FORMAT },
        { "\"updates/hidden.bias\":\"9", "\"updates/hidden.bias\":\"x",
          "metadata \"updates/hidden.bias\": expected a whole", PD_E_FORMAT },
        { "\"optimizer/1/hidden.bias\"", "\"optimizer/2/hidden.bias\"",
          "no tensor \"optimizer/1/hidden.bias\", which this trainer needs", PD_E_FORMAT },
        { "\"best/hidden.bias\"", "\"bezt/hidden.bias\"", "no tensor \"best/hidden.bias\"", PD_E_FORMAT },
        { "\"mask/hidden.weight\":{\"dtype\":\"U8\"", "\"mask/hidden.weight\":{\"dtype\":\"I8\"",
          "tensor \"mask/hidden.weight\" holds I8", PD_E_UNSUPPORTED },
        { "\"shape\":[4,6]", "\"shape\":[6,4]", "expected 4x6 for parameter \"hidden.weight\", found 6x4", PD_E_SHAPE },
    };
    static unsigned char good[1 << 16], bad[1 << 16];
    pd_trainer_opts averaging;
    training t = new_training(1, pd_adam(0.01), NULL, NULL), other;
    size_t n;
    (void)state;
    memset(&averaging, 0, sizeof averaging);
    averaging.average_window = 0.5;
    assert_int_equal(train(&t, 9), PD_STOPPED);
    n = state_of(&t, good, sizeof good);
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        size_t length = strlen(edits[i].from);
        unsigned char *at;
        assert_int_equal(length, strlen(edits[i].to));
        memcpy(bad, good, n);
        at = (unsigned char *)memmem(bad, n, edits[i].from, length);
        if (!at) fail_msg("the checkpoint has no %s", edits[i].from);
        memcpy(at, edits[i].to, length);
        write_bytes(path, bad, n);
        expect_no_resume(&t, edits[i].status, edits[i].text);
    }
    for (size_t i = 0; i < n; i += i < 16 || n - i < 16 ? 1 : 101) {
        write_bytes(path, good, i);
        expect_no_resume(&t, PD_E_FORMAT, path);
    }
    assert_int_equal(pd_save(t.net, path), PD_OK);
    expect_no_resume(&t, PD_E_FORMAT, "not a checkpoint; pd_load takes plain parameters");
    write_bytes(path, good, n);
    other = new_training(1, pd_sgd(0.01), NULL, NULL);
    expect_no_resume(&other, PD_E_ARGUMENT, "a checkpoint of adam, but this trainer uses sgd");
    free_training(&other);
    other = new_training(1, pd_adam(0.01), &averaging, NULL);
    expect_no_resume(&other, PD_E_FORMAT, "no tensor \"averages/0/hidden.weight\", which this trainer needs");
    assert_int_equal(train(&other, 9), PD_STOPPED);
    assert_int_equal(pd_checkpoint_save(other.trainer, path), PD_OK);
    expect_no_resume(&t, PD_E_FORMAT, "this trainer has no place for tensor \"averages/");
    free_training(&other);
    assert_int_equal(pd_checkpoint_load(NULL, path), PD_E_ARGUMENT);
    assert_int_equal(pd_checkpoint_save(NULL, path), PD_E_ARGUMENT);
    assert_int_equal(pd_checkpoint_load(t.trainer, NULL), PD_E_ARGUMENT);
    assert_int_equal(pd_checkpoint_save(t.trainer, NULL), PD_E_ARGUMENT);
    remove(path);
    expect_no_resume(&t, PD_E_IO, "could not be opened");
    free_training(&t);
}

/* Numbers that no training leaves behind are refused by the name of their tensor, by loading and by saving. */
static void test_wrong_state(void **state) {
    static const struct {
        const char *tensor;
        double value;
        const char *text;
    } wrong[] = {
        { "hidden.weight", NAN, "tensor \"hidden.weight\": number 1, nan, is not a finite number" },
        { "optimizer/0/hidden.weight", -INFINITY, "tensor \"optimizer/0/hidden.weight\": number 1, -inf, is not a" },
        { "optimizer/0/hidden.weight", -3, NULL }, /* a mean of gradients may be */
        { "optimizer/1/hidden.weight", -3, "tensor \"optimizer/1/hidden.weight\": number 1, -3, is negative" },
        { "optimizer/1/hidden.weight", INFINITY, NULL }, /* the square of a gradient may be */
        { "optimizer/1/hidden.weight", NAN, "tensor \"optimizer/1/hidden.weight\": number 1, nan, is not a finite" },
        { "averages/0/hidden.bias", INFINITY, "tensor \"averages/0/hidden.bias\": number 1, inf, is not a finite" },
        { "best/hidden.bias", NAN, "tensor \"best/hidden.bias\": number 1, nan, is not a finite" },
    };
    static unsigned char good[1 << 16], bad[1 << 16];
    pd_trainer_opts averaging;
    training t;
    size_t n;
    char name[100];
    (void)state;
    memset(&averaging, 0, sizeof averaging);
    averaging.average_window = 0.5;
    t = new_training(1, pd_adam(0.01), &averaging, NULL);
    assert_int_equal(train(&t, 9), PD_STOPPED);
    n = state_of(&t, good, sizeof good);
    for (int i = 0; i < COUNT(wrong); i++) {
        pd_real value = (pd_real)wrong[i].value;
        unsigned long long begin;
        const char *at;
        snprintf(name, sizeof name, "\"%s\":{", wrong[i].tensor);
        at = (const char *)memmem(good, n, name, strlen(name));
        assert_non_null(at);
        assert_int_equal(sscanf(strstr(at, "data_offsets"), "data_offsets\":[%llu", &begin), 1);
        memcpy(bad, good, n);
        memcpy(bad + 8 + little_endian(good, 8) + begin + sizeof value, &value, sizeof value);
        drop_checksums(bad, n);
        write_bytes(path, bad, n);
        if (wrong[i].text) expect_no_resume(&t, PD_E_NUMERIC, wrong[i].text);
        else assert_int_equal(pd_checkpoint_load(t.trainer, path), PD_OK);
    }
    write_bytes(path, good, n);
    pd_param_find(t.net, "hidden.bias")->value[2] = (pd_real)NAN;
    assert_int_equal(pd_checkpoint_save(t.trainer, path), PD_E_NUMERIC);
    check_contains(pd_error(t.net), "/file: \"hidden.bias\" can't be saved: number 2 is nan");
    assert_int_equal(pd_checkpoint_load(t.trainer, path), PD_OK);
    free_training(&t);
}

/* Costs in the metadata: of the pass finite, of the best test perhaps not yet there. */
static void test_wrong_costs(void **state) {
    static const struct {
        const char *name, *value;
        pd_status status;
    } costs[] = {
        { "pass_cost", "inf", PD_E_FORMAT }, { "pass_cost", "nan", PD_E_FORMAT }, { "pass_cost", "1e999", PD_E_FORMAT },
        { "pass_cost", "2", PD_OK },         { "best_cost", "nan", PD_E_FORMAT }, { "best_cost", "inf", PD_OK },
        { "best_cost", "2", PD_OK },
    };
    static unsigned char good[1 << 16];
    char header[1 << 14], text[100];
    training t = new_training(1, pd_sgd(0.01), NULL, NULL);
    size_t n = state_of(&t, good, sizeof good), length = (size_t)little_endian(good, 8);
    (void)state;
    for (int i = 0; i < COUNT(costs); i++) {
        char *value, *end;
        assert_true(length + 100 < sizeof header);
        memcpy(header, good + 8, length);
        header[length] = 0;
        snprintf(text, sizeof text, "\"%s\":\"", costs[i].name);
        value = strstr(header, text) + strlen(text);
        end = strchr(value, '"');
        memmove(value + strlen(costs[i].value), end, strlen(end) + 1);
        memcpy(value, costs[i].value, strlen(costs[i].value));
        drop_checksums((unsigned char *)header, strlen(header));
        write_file(header, -1, good + 8 + length, n - 8 - length);
        snprintf(text, sizeof text, "metadata \"%s\": expected a number, found \"%s\"", costs[i].name, costs[i].value);
        if (costs[i].status != PD_OK) expect_no_resume(&t, costs[i].status, text);
        else assert_int_equal(pd_checkpoint_load(t.trainer, path), PD_OK);
    }
    free_training(&t);
}

/* One bit of each byte flipped: an error, and nothing has changed, or the same state. */
static void test_flipped_bits_of_checkpoints(void **state) {
    static unsigned char good[1 << 16], bad[1 << 16], before[1 << 16], after[1 << 16];
    training t = new_training(1, pd_adam(0.01), NULL, NULL), other = new_training(2, pd_adam(0.01), NULL, NULL);
    pd_status status;
    size_t n, m;
    FILE *f;
    (void)state;
    assert_int_equal(train(&t, 9), PD_STOPPED);
    n = state_of(&t, good, sizeof good);
    m = state_of(&other, before, sizeof before);
    for (size_t i = 0; i < n; i++) {
        memcpy(bad, good, n);
        bad[i] ^= (unsigned char)(1 << (i * 5 + i / 8) % 8);
        f = fmemopen(bad, n, "rb");
        status = inside_checkpoint_load_file(other.trainer, f, path);
        fclose(f);
        if (status == PD_OK) {
            assert_int_equal(state_of(&other, after, sizeof after), n);
            if (memcmp(good, after, n) != 0) fail_msg("byte %d", (int)i);
            free_training(&other);
            other = new_training(2, pd_adam(0.01), NULL, NULL);
        } else if (i % 50 == 0) {
            assert_int_equal(state_of(&other, after, sizeof after), m);
            assert_memory_equal(before, after, m);
        }
    }
    memcpy(bad, good, n);
    *((unsigned char *)memmem(bad, n, "\"samples\":\"58\"", 14) + 12) ^= 1;
    write_bytes(path, bad, n);
    expect_no_resume(&other, PD_E_FORMAT, "the metadata are damaged: their checksum is ");
    memcpy(bad, good, n);
    bad[n - 1] ^= 1; /* a mask comes last */
    write_bytes(path, bad, n);
    expect_no_resume(&other, PD_E_FORMAT, "tensor \"mask/hidden.weight\" is damaged: its checksum is ");
    memcpy(bad, good, n);
    drop_checksums(bad, n); /* as files from before have none */
    write_bytes(path, bad, n);
    assert_int_equal(pd_checkpoint_load(other.trainer, path), PD_OK);
    expect_same_state(&t, &other);
    free_training(&t);
    free_training(&other);
}

static void test_texts_in_checkpoints(void **state) {
    training t = new_training(1, pd_adam(0.01), NULL, NULL), other = new_training(2, pd_adam(0.01), NULL, NULL);
    pd_net *empty = pd_net_new(NULL);
    (void)state;
    set_odd_texts(t.net);
    assert_int_equal(train(&t, 9), PD_STOPPED);
    assert_int_equal(pd_checkpoint_save(t.trainer, path), PD_OK);
    assert_int_equal(pd_checkpoint_load(other.trainer, path), PD_OK);
    expect_odd_texts(other.net);
    expect_same_state(&t, &other);
    assert_int_equal(pd_load(empty, path, NULL), PD_OK);
    expect_odd_texts(empty);
    pd_net_free(empty);
    free_training(&t);
    free_training(&other);
}

/* A file of floats does not continue a training in double, nor the other way round. */
static void test_checkpoint_of_other_numbers(void **state) {
    training t = new_training(1, pd_sgd(0.01), NULL, NULL);
    static unsigned char bytes[1 << 16], wide[1 << 16];
    const char *other = sizeof(pd_real) == 8 ? "F32" : "F64";
    inside_tensors *index;
    char *header = (char *)wide + 8;
    size_t length, at = 0;
    FILE *f;
    (void)state;
    f = fmemopen(bytes, state_of(&t, bytes, sizeof bytes), "rb");
    index = inside_tensors_open(t.net, f, path);
    assert_non_null(index);
    memcpy(header, bytes + 8, (size_t)little_endian(bytes, 8));
    drop_checksums((unsigned char *)header, (size_t)little_endian(bytes, 8));
    length = (size_t)(strstr(header, "},\"") - header + 2); /* the metadata, then all tensors with the other size */
    for (int64_t i = 0; i < inside_tensors_count(index); i++) {
        inside_tensor tensor = inside_tensors_at(index, i);
        size_t size = (size_t)tensor.size * (tensor.is_mask ? 1 : sizeof(pd_real) == 8 ? 4 : 8);
        length += (size_t)sprintf(header + length, "\"%s\":{\"dtype\":\"%s\",\"shape\":[%lld", tensor.name,
                                  tensor.is_mask ? "U8" : other, (long long)tensor.dims[0]);
        if (tensor.dim_count == 2) length += (size_t)sprintf(header + length, ",%lld", (long long)tensor.dims[1]);
        length += (size_t)sprintf(header + length, "],\"data_offsets\":[%llu,%llu]}%s", (unsigned long long)at,
                                  (unsigned long long)(at + size), i + 1 < inside_tensors_count(index) ? "," : "}");
        at += size;
    }
    inside_tensors_close(index);
    fclose(f);
    write_file(header, (int64_t)length, NULL, at);
    expect_no_resume(&t, PD_E_UNSUPPORTED, other);
    assert_int_equal(pd_load(t.net, path, NULL), PD_OK); /* as plain parameters they are fine */
    free_training(&t);
}

static void test_checkpoint_out_of_memory(void **state) {
    static unsigned char before[1 << 16], after[1 << 16];
    failing_allocator c;
    pd_net_opts counting = counting_opts(&c);
    pd_trainer_opts opts;
    training t, other;
    int64_t in_use, failures = 0;
    size_t n;
    pd_status status = PD_E_MEMORY;
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.average_window = 0.5;
    other = new_training(2, pd_momentum(0.1, 0.5), &opts, NULL);
    assert_int_equal(train(&other, 8), PD_STOPPED);
    t = new_training(1, pd_momentum(0.1, 0.5), &opts, &counting);
    assert_int_equal(train(&t, 9), PD_STOPPED);
    in_use = c.in_use;
    for (int64_t k = 0; status != PD_OK; k++) {
        c.calls = 0;
        c.fail_at = k;
        status = pd_checkpoint_save(t.trainer, path);
        assert_true(status == PD_OK || status == PD_E_MEMORY);
        assert_int_equal(c.in_use, in_use);
        failures += status != PD_OK;
    }
    assert_int_equal(pd_checkpoint_save(other.trainer, path), PD_OK);
    c.fail_at = -1;
    n = state_of(&t, before, sizeof before);
    status = PD_E_MEMORY;
    for (int64_t k = 0; status != PD_OK; k++) {
        c.calls = 0;
        c.fail_at = k;
        status = pd_checkpoint_load(t.trainer, path);
        c.fail_at = -1;
        assert_true(status == PD_OK || status == PD_E_MEMORY);
        assert_int_equal(c.in_use, in_use);
        if (status == PD_OK) break;
        failures++;
        assert_int_equal(state_of(&t, after, sizeof after), n);
        assert_memory_equal(before, after, n);
    }
    assert_true(failures > 50);
    expect_same_state(&t, &other);
    free_training(&t);
    free_training(&other);
    assert_int_equal(c.in_use, 0);
}

/* Names of parameters that could be taken for something else of a checkpoint. */
static void test_checkpoint_names(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 2);
    pd_fc_opts fc;
    pd_trainer *trainer;
    (void)state;
    memset(&fc, 0, sizeof fc);
    fc.no_bias = true;
    fc.weight.name = "optimizer/0/w";
    trainer = pd_trainer_new(net, pd_sum_cost(net, pd_fc(net, x, 2, &fc), NULL), pd_sgd(1), NULL);
    assert_non_null(trainer);
    assert_int_equal(pd_checkpoint_save(trainer, path), PD_E_ARGUMENT);
    check_contains(pd_error(net), "parameter \"optimizer/0/w\" can't be saved under this name");
    assert_int_equal(pd_save(net, path), PD_OK);
    pd_trainer_free(trainer);
    pd_net_free(net);
}

/* An updater that keeps parameters elsewhere is asked for them first. */
static pd_status failing_sync(pd_updater *u) {
    return pd_trainer_fail((pd_trainer *)u->self, PD_E_IO, "no connection");
}
static void test_checkpoint_syncs(void **state) {
    training t = new_training(1, pd_sgd(0.1), NULL, NULL);
    (void)state;
    inside_local(t.trainer)->sync = failing_sync;
    assert_int_equal(pd_checkpoint_save(t.trainer, path), PD_E_IO);
    assert_string_equal(pd_error(t.net), "no connection");
    assert_int_equal(list_directory(directory, false), 0);
    free_training(&t);
}

/* Exact in any locale: all sizes, zeros, infinities, NaN. */
static void test_double_texts(void **state) {
    static const double values[] = { 0,       -0.0,     1,       -1.5,     0.1,       1e308,   DBL_MAX,
                                     DBL_MIN, 4.9e-324, -7e-320, INFINITY, -INFINITY, 1.0 / 3, 123456789.123456789 };
    (void)state;
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        char text[200] = "", *value;
        FILE *f = fmemopen(text, sizeof text, "wb");
        double back;
        inside_put_double(f, "x", values[i]);
        fclose(f);
        assert_null(strpbrk(text + 1, ",."));
        value = strchr(text, ':') + 2;
        *strchr(value, '"') = '\0';
        back = strtod(value, NULL);
        assert_memory_equal(&back, &values[i], sizeof back);
    }
}

/* ---- the rest ---- */

static void log_line(void *user, pd_status status, const char *text) {
    snprintf((char *)user, 300, "%d %s", (int)status, text);
}

static void test_log(void **state) {
    pd_net_opts opts;
    char line[300] = "", want[300];
    pd_net *net;
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.logger.log = log_line;
    opts.logger.user = line;
    net = small_net(&opts);
    assert_int_equal(pd_save(net, path), PD_OK);
    snprintf(want, sizeof want, "0 saved %s", path);
    assert_string_equal(line, want);
    pd_net_free(net);
}

static void test_bad_names(void **state) {
    static const char *const names[] = { "__metadata__", "latin-1 \xe9" };
    (void)state;
    for (int i = 0; i < 2; i++) {
        pd_net *net = pd_net_new(NULL);
        pd_prelu_opts opts;
        memset(&opts, 0, sizeof opts);
        opts.weight.name = names[i];
        assert_non_null(pd_prelu(net, pd_vector(net, "x", 2), &opts));
        assert_int_equal(pd_save(net, path), PD_E_ARGUMENT);
        check_contains(pd_error(net), "can't be saved under this name");
        pd_net_free(net);
    }
    assert_int_equal(list_directory(directory, false), 0);
}

/* A net whose builder failed keeps its message and neither saves nor loads. */
static void test_broken_net(void **state) {
    pd_net *net = small_net(NULL);
    (void)state;
    assert_null(pd_vector(net, "x", 3));
    assert_int_equal(pd_save(net, path), PD_E_ARGUMENT);
    assert_int_equal(pd_load(net, path, NULL), PD_E_ARGUMENT);
    check_contains(pd_error(net), "already used");
    assert_int_equal(list_directory(directory, false), 0);
    pd_net_free(net);
}

/* But what was learned before is saved, and is the same in another net. */
static void test_broken_later(void **state) {
    training t = new_training(1, pd_momentum(0.1, 0.9), NULL, NULL), other = new_training(2, pd_sgd(1), NULL, NULL);
    pd_real learned[24], loaded[24];
    number_reader data;
    (void)state;
    assert_int_equal(pd_train(t.trainer, number_start(&data), 3, NULL), PD_OK);
    get(t.net, "hidden.weight", learned);
    assert_null(pd_fc(t.net, pd_vector(t.net, "x2", 3), 0, NULL));
    assert_int_equal(train(&t, 0), PD_E_ARGUMENT); /* nothing runs any more */
    assert_int_equal(pd_save(t.net, path), PD_OK);
    assert_int_equal(pd_load(other.net, path, NULL), PD_OK);
    get(other.net, "hidden.weight", loaded);
    assert_memory_equal(loaded, learned, sizeof learned);
    assert_int_equal(pd_checkpoint_save(t.trainer, path), PD_OK);
    free_training(&other);
    other = new_training(3, pd_momentum(0.1, 0.9), NULL, NULL);
    if (pd_checkpoint_load(other.trainer, path) != PD_OK) fail_msg("%s", pd_error(other.net));
    get(other.net, "hidden.weight", loaded);
    assert_memory_equal(loaded, learned, sizeof learned);
    free_training(&other);
    free_training(&t);
}

/* ---- TensorBoard ---- */

/* The only file in `where`: its bytes. */
static size_t read_events(const char *where, unsigned char *bytes, size_t capacity) {
    DIR *dir = opendir(where);
    struct dirent *entry;
    char name[512] = "";
    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL)
        if (strncmp(entry->d_name, "events.out.tfevents.", 20) == 0)
            snprintf(name, sizeof name, "%s/%s", where, entry->d_name);
    closedir(dir);
    return read_bytes(name, bytes, capacity);
}

static void test_events(void **state) {
    static unsigned char bytes[4096];
    static const unsigned char point[] = { 0x10, 0xac, 0x02,       /* step 300 */
                                           0x2a, 0x0d, 0x0a, 0x0b, /* summary of 13 bytes, value of 11 */
                                           0x0a, 0x04, 'c',  'o',  's', 't', 0x15, 0, 0, 0xc0, 0x3f }; /* 1.5f */
    char where[200], tag[400];
    pd_net *net = pd_net_new(NULL);
    inside_events *e;
    size_t n, at;
    int records = 0;
    (void)state;
    assert_int_equal(masked_crc((const unsigned char *)"123456789", 9),
                     ((0xe3069283u >> 15 | 0xe3069283u << 17) + 0xa282ead8u)); /* RFC 3720 */
    snprintf(where, sizeof where, "%s/runs//one/", directory);
    e = inside_events_open(net, where);
    if (!e) fail_msg("%s", pd_error(net));
    assert_int_equal(inside_events_scalar(e, "cost", 300, 1.5), PD_OK);
    memset(tag, 'x', sizeof tag);
    memcpy(tag + 249, "\xc3\xa4\xc3\xa4", 5); /* must not be cut in the middle of a character */
    assert_int_equal(inside_events_scalar(e, tag, 1, NAN), PD_OK);
    n = read_events(where, bytes, sizeof bytes); /* all is there while it is still open */
    inside_events_close(e);
    for (at = 0; at < n; records++) {
        size_t length = (size_t)little_endian(bytes + at, 8);
        const unsigned char *record = bytes + at + 12;
        uint64_t bits;
        double written;
        assert_int_equal(little_endian(bytes + at + 8, 4), masked_crc(bytes + at, 8));
        assert_int_equal(little_endian(record + length, 4), masked_crc(record, length));
        assert_int_equal(record[0], 0x09);
        bits = little_endian(record + 1, 8);
        memcpy(&written, &bits, sizeof written);
        assert_true(fabs(written - (double)time(NULL)) < 60);
        if (records == 0)
            assert_memory_equal(record + 9,
                                "\x1a\x0d"
                                "brain.Event:2",
                                15);
        if (records == 1) assert_memory_equal(record + 9, point, sizeof point);
        if (records == 2) assert_int_equal(length, 9 + 2 + 3 + 3 + 3 + 249 + 5);
        at += 16 + length;
    }
    assert_int_equal(at, n);
    assert_int_equal(records, 3);
    inside_events_close(NULL);
    pd_net_free(net);
}

static void test_events_failures(void **state) {
    failing_allocator c;
    pd_net_opts counting = counting_opts(&c);
    pd_net *net = small_net(&counting);
    inside_events *e = NULL, *second;
    int64_t in_use = c.in_use;
    char where[200];
    (void)state;
    write_bytes(path, "", 0);
    assert_null(inside_events_open(net, path)); /* a file is in the way */
    assert_int_equal(pd_error_status(net), PD_E_IO);
    snprintf(where, sizeof where, "%s/below", path);
    assert_null(inside_events_open(net, where));
    check_contains(pd_error(net), "the directory could not be made: Not a directory");
    assert_null(inside_events_open(net, ""));
    assert_int_equal(pd_error_status(net), PD_E_IO);
    assert_int_equal(c.in_use, in_use);
    snprintf(where, sizeof where, "%s/events", directory);
    for (c.fail_at = 0; !e; c.fail_at++) {
        c.calls = 0;
        e = inside_events_open(net, where);
        assert_true(e || c.in_use == in_use);
    }
    assert_true(c.fail_at > 3);
    c.fail_at = -1;
    second = inside_events_open(net, where); /* not the same file */
    assert_non_null(second);
    assert_int_equal(list_directory(where, false), 2);
    if (inside_events_redirect(second, "/dev/full")) assert_int_equal(inside_events_scalar(second, "a", 0, 0), PD_E_IO);
    inside_events_close(second);
    inside_events_close(e);
    assert_int_equal(c.in_use, in_use);
    pd_net_free(net);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_directory, remove_directory)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_round_trip),
        TEST(test_large_round_trip),
        TEST(test_element_types),
        TEST(test_double_and_float),
        TEST(test_not_finite),
        TEST(test_not_finite_in_the_net),
        TEST(test_odd_but_good),
        TEST(test_malformed_headers),
        TEST(test_malformed_sizes),
        TEST(test_truncation),
        TEST(test_bit_flips),
        TEST(test_wrong_for_the_net),
        TEST(test_map),
        TEST(test_map_blocks),
        TEST(test_map_refused),
        TEST(test_map_added),
        TEST(test_map_gru),
        TEST(test_partial),
        TEST(test_large_transpose),
        TEST(test_read_errors),
        TEST(test_full_disk),
        TEST(test_dev_full),
        TEST(test_unwritable),
        TEST(test_relative_path),
        TEST(test_killed),
        TEST(test_links),
        TEST(test_modes),
        TEST(test_leftovers),
        TEST(test_savers_of_one_path),
        TEST(test_flipped_bits),
        TEST(test_kept_checksums),
        TEST(test_texts),
        TEST(test_texts_apart),
        TEST(test_texts_damaged),
        TEST(test_long_texts),
        TEST(test_out_of_memory),
        TEST(test_texts_out_of_memory),
        TEST(test_resume),
        TEST(test_go_back),
        TEST(test_averaged),
        TEST(test_checkpoint_as_parameters),
        TEST(test_wrong_checkpoint),
        TEST(test_wrong_state),
        TEST(test_wrong_costs),
        TEST(test_flipped_bits_of_checkpoints),
        TEST(test_texts_in_checkpoints),
        TEST(test_checkpoint_of_other_numbers),
        TEST(test_checkpoint_out_of_memory),
        TEST(test_checkpoint_names),
        TEST(test_checkpoint_syncs),
        TEST(test_double_texts),
        TEST(test_log),
        TEST(test_bad_names),
        TEST(test_broken_net),
        TEST(test_broken_later),
        TEST(test_events),
        TEST(test_events_failures),
    };
    return run_group(tests, NULL, NULL);
}
