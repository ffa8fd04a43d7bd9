/* Batches, and everything that reads samples: good and malformed files, numbers against strtod, options, shards,
   shuffling, reading ahead, and a lack of memory at every point. */
#define _GNU_SOURCE
#include "../paddle.h"

#include <float.h>
#include <locale.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <dirent.h>
#include <unistd.h>
#include <cmocka.h>

#include "inside.h"
#include "support.h"

#undef skip /* cmocka's hides that of readers */
#define skip_test() _skip(__FILE__, __LINE__)

/* ---- a directory of our own to work in ---- */

static char directory[256], home[1024];

static int enter_directory(void **state) {
    const char *parent = getenv("TMPDIR");
    (void)state;
    snprintf(directory, sizeof directory, "%.100s/test_readers.XXXXXX", parent ? parent : "/tmp");
    return getcwd(home, sizeof home) && mkdtemp(directory) && chdir(directory) == 0 ? 0 : -1;
}

static int leave_directory(void **state) {
    DIR *dir = opendir(".");
    struct dirent *entry;
    (void)state;
    while (dir && (entry = readdir(dir)) != NULL) remove(entry->d_name);
    if (dir) closedir(dir);
    return chdir(home) == 0 ? rmdir(directory) : -1;
}

static void write_bytes(const char *name, const void *bytes, size_t n) {
    FILE *f = fopen(name, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static void write_text(const char *name, const char *text) { write_bytes(name, text, strlen(text)); }

/* ---- nets ---- */

/* A vector of `width` and a label of 4 classes; with `sequences`, both carry them. */
static pd_net *make_net(int64_t width, bool sequences, const pd_net_opts *opts) {
    pd_net *net = pd_net_new(opts);
    pd_layer *x = pd_vector(net, "x", width), *label;
    if (x && sequences) pd_sequence(x);
    label = pd_label(net, "label", 4);
    if (label && sequences) pd_sequence(label);
    return net;
}

static pd_reader_opts no_opts(void) {
    pd_reader_opts o;
    memset(&o, 0, sizeof o);
    return o;
}

/* ---- what a reader gives, as text: a line per sample, "1 2 3|2", rows of sequences with commas, "! message" ---- */

typedef struct text {
    char s[65536];
    size_t n;
} text;

static void say(text *t, const char *format, ...) {
    va_list args;
    va_start(args, format);
    t->n += (size_t)vsnprintf(t->s + t->n, sizeof t->s - t->n, format, args);
    va_end(args);
    assert_true(t->n < sizeof t->s);
}

static void put_sample(text *t, const pd_batch *b, int64_t i) {
    for (int k = 0; k < b->slot_count; k++) {
        const pd_slot *slot = &b->slots[k];
        int64_t first = slot->sequence ? slot->starts[i] : i,
                end = slot->sequence ? slot->starts[i + 1] : i + (slot->rows > 0);
        if (k) say(t, "|");
        for (int64_t row = first; row < end; row++) {
            if (row > first) say(t, ",");
            if (slot->kind == PD_SLOT_IDS) say(t, "%lld", (long long)slot->ids[row]);
            for (int64_t j = 0; slot->kind == PD_SLOT_DENSE && j < slot->width; j++)
                say(t, "%s%g", j ? " " : "", (double)slot->data[row * slot->width + j]);
        }
    }
    say(t, "\n");
}

/* Reads on to the end of the pass in batches of `count`; 0: of 1, 2, 3 .. samples. */
static void read_rest(pd_reader *r, pd_net *net, int64_t count, text *t) {
    pd_batch *b = pd_batch_new(net);
    pd_status status = PD_OK;
    assert_non_null(b);
    for (int64_t turn = 1; status != PD_END; turn++) {
        int64_t wanted = count ? count : turn;
        pd_batch_clear(b);
        status = r->next(r, b, wanted);
        assert_true(b->samples <= wanted && (status != PD_OK || b->samples == wanted));
        for (int64_t i = 0; i < b->samples; i++) put_sample(t, b, i);
        if (status != PD_OK && status != PD_END) {
            assert_int_equal(r->error.status, status);
            assert_null(strpbrk(r->error.text, "\r\n"));
            say(t, "! %s\n", r->error.text);
        }
        assert_true(turn < 5000);
    }
    pd_batch_clear(b);
    assert_int_equal(r->next(r, b, 1), PD_END); /* and again */
    assert_int_equal(b->samples, 0);
    pd_batch_free(b);
}

static const char *read_pass(pd_reader *r, pd_net *net, int64_t pass, int64_t count) {
    static text texts[4];
    static int turn;
    text *t = &texts[turn++ % 4];
    t->n = 0;
    t->s[0] = 0;
    assert_int_equal(r->reset(r, pass), PD_OK);
    read_rest(r, net, count, t);
    return t->s;
}

/* A reader that must have been made. */
static pd_reader *made(pd_net *net, pd_reader *r) {
    if (!r) fail_msg("no reader: %s", pd_error(net));
    return r;
}

/* Whatever the size of the batches and the pass. Frees the reader. */
static void expect(pd_net *net, pd_reader *r, const char *expected) {
    made(net, r);
    for (int64_t count = 0; count <= 4; count++) assert_string_equal(read_pass(r, net, count, count), expected);
    pd_reader_free(r);
}

static void expect_none(pd_net *net, pd_reader *r, pd_status status, const char *message) {
    assert_null(r);
    check_contains(pd_error(net), message);
    assert_int_equal(pd_error_status(net), status);
}

/* ---- batches ---- */

static void add(pd_batch *b, pd_real x, pd_real y, int64_t id) {
    pd_real *row = pd_batch_add_row(b, 0);
    assert_non_null(row);
    row[0] = x;
    row[1] = y;
    assert_int_equal(pd_batch_add_id(b, 1, id), PD_OK);
}

static const char *batch_text(const pd_batch *b) {
    static text t;
    t.n = 0;
    t.s[0] = 0;
    for (int64_t i = 0; i < b->samples; i++) put_sample(&t, b, i);
    return t.s;
}

static void expect_batch_failure(const pd_batch *b, pd_status got, pd_status status, const char *message) {
    assert_int_equal(got, status);
    assert_int_equal(b->error.status, status);
    check_contains(b->error.text, message);
}

static void test_batch(void **state) {
    pd_net *net = make_net(2, false, NULL);
    pd_batch *b = pd_batch_new(net), *c = pd_batch_new(net);
    (void)state;
    expect_batch_failure(b, pd_batch_end_sample(b), PD_E_SHAPE, "no input got a row");
    add(b, 1, 2, 3);
    assert_int_equal(pd_batch_end_sample(b), PD_OK);
    expect_batch_failure(b, pd_batch_end_sample(b), PD_E_SHAPE, "\"x\" got 0 rows, expected 1");
    add(b, 4, 5, 0);
    add(b, 6, 7, 0);
    expect_batch_failure(b, pd_batch_end_sample(b), PD_E_SHAPE,
                         "sample 2 of the batch: input \"x\" got 2 rows, expected 1");
    expect_batch_failure(b, pd_batch_add_id(b, 1, 4), PD_E_FORMAT, "\"label\": id 4, expected 0 to 3");
    expect_batch_failure(b, pd_batch_add_id(b, 1, -1), PD_E_FORMAT, "id -1");
    expect_batch_failure(b, pd_batch_add_id(b, 0, 0), PD_E_ARGUMENT, "slot 0 is not an input of ids");
    assert_null(pd_batch_add_row(b, 1));
    assert_null(pd_batch_add_row(b, 2));
    assert_null(pd_batch_add_row(b, -1));
    add(b, 8, 9, 1);
    pd_batch_drop_sample(b);
    add(b, 10, 11, 2);
    assert_int_equal(pd_batch_end_sample(b), PD_OK);
    assert_string_equal(batch_text(b), "1 2|3\n10 11|2\n");

    assert_int_equal(pd_batch_copy_sample(c, b, 1), PD_OK);
    for (int i = 0; i < 100; i++) assert_int_equal(pd_batch_copy_sample(b, b, i), PD_OK); /* while its memory moves */
    assert_string_equal(batch_text(c), "10 11|2\n");
    assert_int_equal(b->samples, 102);
    expect_batch_failure(c, pd_batch_copy_sample(c, b, 102), PD_E_ARGUMENT, "sample 102 does not exist");
    expect_batch_failure(c, pd_batch_copy_sample(c, b, -1), PD_E_ARGUMENT, "has 102");
    pd_batch_clear(c);
    assert_int_equal(c->samples + c->slots[0].rows + c->slots[1].rows, 0);
    pd_batch_free(b);
    pd_batch_free(c);
    pd_batch_free(NULL);
    pd_net_free(net);
}

/* An input is left out of all samples or of none. */
static void test_batch_left_out(void **state) {
    pd_net *net = make_net(2, false, NULL);
    pd_batch *b = pd_batch_new(net), *c = pd_batch_new(net);
    (void)state;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pd_batch_add_id(b, 1, i), PD_OK);
        assert_int_equal(pd_batch_end_sample(b), PD_OK);
        assert_null(pd_batch_add_row(b, 0));
        check_contains(b->error.text, "\"x\" was left out of the samples before");
        pd_batch_drop_sample(b);
    }
    assert_string_equal(batch_text(b), "|0\n|1\n");
    assert_int_equal(pd_batch_copy_sample(c, b, 1), PD_OK);
    assert_string_equal(batch_text(c), "|1\n");
    pd_batch_clear(c);
    add(c, 1, 2, 3);
    assert_int_equal(pd_batch_end_sample(c), PD_OK);
    assert_int_equal(pd_batch_copy_sample(c, b, 1), PD_E_SHAPE);
    assert_int_equal(pd_batch_copy_sample(b, c, 0), PD_E_SHAPE);
    assert_string_equal(batch_text(c), "1 2|3\n");
    assert_string_equal(batch_text(b), "|0\n|1\n");
    pd_batch_free(b);
    pd_batch_free(c);
    pd_net_free(net);
}

static void test_batch_sequences(void **state) {
    pd_net *net = make_net(2, true, NULL), *other = make_net(2, false, NULL);
    pd_batch *b = pd_batch_new(net), *c = pd_batch_new(net), *d = pd_batch_new(other);
    const unsigned char marks[] = { 1, 0, 0, 1, 0 };
    (void)state;
    assert_int_equal(b->slots[0].starts[0], 0);
    for (int i = 0; i < 5; i++) {
        for (int k = 0; k < i; k++) add(b, (pd_real)i, (pd_real)k, k);
        assert_int_equal(pd_batch_end_sample(b), PD_OK);
        add(b, 9, 9, 3);
        pd_batch_drop_sample(b);
    }
    assert_string_equal(batch_text(b), "|\n1 0|0\n2 0,2 1|0,1\n3 0,3 1,3 2|0,1,2\n4 0,4 1,4 2,4 3|0,1,2,3\n");
    for (int i = 4; i >= 0; i -= 2) assert_int_equal(pd_batch_copy_sample(c, b, i), PD_OK);
    assert_string_equal(batch_text(c), "4 0,4 1,4 2,4 3|0,1,2,3\n2 0,2 1|0,1\n|\n");
    expect_batch_failure(d, pd_batch_copy_sample(d, b, 0), PD_E_SHAPE, "nets with different inputs");
    inside_remove_samples(b, marks);
    assert_string_equal(batch_text(b), "1 0|0\n2 0,2 1|0,1\n4 0,4 1,4 2,4 3|0,1,2,3\n");
    pd_batch_clear(b);
    assert_int_equal(pd_batch_end_sample(b), PD_OK); /* an empty sequence */
    assert_string_equal(batch_text(b), "|\n");
    pd_batch_free(b);
    pd_batch_free(c);
    pd_batch_free(d);
    pd_net_free(net);
    pd_net_free(other);
}

static void test_batch_sparse(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_sequence(pd_sparse_vector(net, "x", 6));
    pd_batch *b = pd_batch_new(net);
    const int64_t columns[3] = { 4, 0, 2 };
    const unsigned char marks[3] = { 0, 1, 0 };
    (void)state;
    (void)x;
    for (int64_t sample = 0; sample < 3; sample++) { /* of 1, 2, 3 rows with 0, 1 2, 2 3 0 entries */
        for (int64_t row = 0; row <= sample; row++)
            assert_int_equal(pd_batch_add_sparse(b, 0, columns, NULL, (sample + row) % 4), PD_OK);
        assert_int_equal(pd_batch_end_sample(b), PD_OK);
    }
    inside_remove_samples(b, marks);
    assert_int_equal(b->samples, 2);
    assert_int_equal(b->slots[0].starts[2], 4);
    assert_int_equal(b->slots[0].row_starts[1], 0);
    assert_int_equal(b->slots[0].row_starts[2], 2);
    assert_int_equal(b->slots[0].row_starts[3], 5);
    assert_int_equal(b->slots[0].row_starts[4], 5);
    for (int i = 0; i < 5; i++) assert_int_equal(b->slots[0].ids[i], columns[i < 2 ? i : i - 2]);
    pd_batch_free(b);
    pd_net_free(net);
}

/* ---- numbers ---- */

static void check_number(const char *s, pd_status status, double expected) {
    double x = 0;
    char copy[2000]; /* without a 0 behind it */
    size_t n = strlen(s);
    memcpy(copy, s, n);
    copy[n] = '7';
    if (inside_parse_number(copy, copy + n, &x) != status) fail_msg("\"%s\" has not the status %d", s, (int)status);
    if (status == PD_OK && (x != expected || signbit(x) != signbit(expected)))
        fail_msg("\"%s\" read as %.17g, expected %.17g", s, x, expected);
}

static void check_by_strtod(const char *s) { check_number(s, PD_OK, strtod(s, NULL)); }

static void check_random_numbers(void) {
    char s[64];
    for (int i = 0; i < 20000; i++) {
        uint64_t bits = pd_random(1, (uint64_t)i);
        double x;
        memcpy(&x, &bits, sizeof x);
        if (!(fabs(x) <= DBL_MAX)) continue;
        snprintf(s, sizeof s, "%.*g", (int)(bits % 18) + 1, x);
        if (fabs(strtod(s, NULL)) <= DBL_MAX) check_by_strtod(s);
        snprintf(s, sizeof s, "%.*f", (int)(bits % 12), ldexp(x, -ilogb(x) + (int)(bits % 60) - 30));
        check_by_strtod(s);
    }
}

static void test_numbers(void **state) {
    static const char *const good[] = {
        "0",
        "-0",
        "+0",
        "1",
        "-1",
        "+1",
        "1.",
        ".5",
        "-.5",
        "007",
        "1e5",
        "1E-5",
        "1e+5",
        "0e999999999999999999999",
        "-0.0",
        "9007199254740992",
        "9007199254740993",
        "9007199254740993.00000000000000000000000000000000001",
        "1e22",
        "1e23",
        "8.5e-22",
        "123456789012345678",
        "1152921504606846976",
        "0.000000000000000000000000000000000000001",
        "1.7976931348623157e308",
        "2.2250738585072011e-308",
        "4.9e-324",
        "2.4703282292062327e-324",
        "1e-400",
        "1e-99999999999999999999",
        "100000000000000000000000000000000000000000000000000",
        "0.1",
        "0.3",
        "3.14159265358979",
    };
    static const char *const bad[] = { "",      "-",    "+",    ".",   "e5",       "1e",  "1e+",    "1e5.",
                                       "1.2.3", "abc",  "0x10", "1 2", "--1",      "+-1", "1,5",    "1e5e5",
                                       "1d5",   "nano", "in",   "1_0", "\xd9\xa3", "1-",  "infinit" };
    static const char *const infinite[] = { "nan",
                                            "NaN",
                                            "-nan",
                                            "inf",
                                            "-Inf",
                                            "+INFINITY",
                                            "1e999",
                                            "-1e309",
                                            "1.7976931348623159e308",
                                            "1e99999999999999999999" };
    char digits[1600];
    (void)state;
    for (int i = 0; i < COUNT(good); i++) check_by_strtod(good[i]);
    for (int i = 0; i < COUNT(bad); i++) check_number(bad[i], PD_E_FORMAT, 0);
    for (int i = 0; i < COUNT(infinite); i++) check_number(infinite[i], PD_E_NUMERIC, 0);
    check_random_numbers();
    for (int i = 0; i < 1500; i++) digits[i] = (char)('0' + (i * 7 + 3) % 10);
    for (int n = 10; n <= 1500; n += 149) { /* with the point in all places */
        for (int at = 0; at < n; at += 97) {
            char c = digits[at];
            digits[at] = '.';
            digits[n] = 0;
            if (fabs(strtod(digits, NULL)) <= DBL_MAX) check_by_strtod(digits);
            digits[at] = c;
            digits[n] = '1';
        }
    }
    /* half-way between two doubles, and a little above after more digits than are kept */
    memset(digits, '0', sizeof digits);
    memcpy(digits, "9007199254740993.", 17);
    digits[1001] = 0;
    check_number(digits, PD_OK, 9007199254740992.0);
    digits[1000] = '1';
    check_number(digits, PD_OK, 9007199254740994.0);
}

/* A program's locale may have a decimal comma. */
static void test_locale(void **state) {
    bool found;
    (void)state;
    assert_int_equal(setenv("LOCPATH", ".", 1), 0);
    found = system("localedef -i de_DE -f UTF-8 ./de_DE >/dev/null 2>&1") == 0 && setlocale(LC_NUMERIC, "de_DE");
    found = found && strtod("1,5", NULL) == 1.5;
    if (found) {
        check_number("1.5", PD_OK, 1.5);
        check_number("123456789.123456789123456789", PD_OK, 123456789.12345679);
        check_number("1,5", PD_E_FORMAT, 0);
    }
    setlocale(LC_NUMERIC, "C");
    unsetenv("LOCPATH");
    if (system("rm -rf de_DE") != 0 || !found) {
        print_message("[  SKIPPED ] no locale with a decimal comma here\n");
        skip_test();
    }
}

/* ---- CSV ---- */

static void expect_csv(const char *content, const pd_reader_opts *opts, const char *expected) {
    pd_net *net = make_net(3, false, NULL);
    write_text("data.csv", content);
    expect(net, pd_csv_reader(net, "data.csv", opts), expected);
    pd_net_free(net);
}

static void test_csv(void **state) {
    pd_reader_opts o = no_opts();
    (void)state;
    expect_csv("", NULL, "");
    expect_csv("\n \n\r\n", NULL, "");
    expect_csv("1,2,3,0\n4,5,6,1\n", NULL, "1 2 3|0\n4 5 6|1\n");
    expect_csv("1,2,3,0\r\n4,5,6,1\r\n\r\n\n", NULL, "1 2 3|0\n4 5 6|1\n");
    expect_csv("1,2,3,0\n4,5,6,1", NULL, "1 2 3|0\n4 5 6|1\n");
    expect_csv("\xEF\xBB\xBF"
               "1,2,3,0\r\n4,5,6,1\r",
               NULL, "1 2 3|0\n4 5 6|1\n");
    expect_csv(" 1\t, -2.5e1 ,\"3\", \" 2\" \n\n\"+.5\",1e-2,0,3.0", NULL, "1 -25 3|2\n0.5 0.01 0|3\n");

    o.delimiter = ';';
    o.order = "label,-, x ,-";
    o.skip_lines = 2;
    expect_csv("a;b\n\n1;\"a;\"\"b\";1;2;3;\n2;;4;5;6;\"", &o, "1 2 3|1\n4 5 6|2\n");
    o = no_opts();
    o.delimiter = '\t';
    o.scale = 0.5;
    o.shift = 1;
    expect_csv("2\t4 \t 6\t1\n", &o, "2 3 4|1\n");
    o = no_opts();
    o.delimiter = ' ';
    expect_csv("1 2 3 0\n", &o, "1 2 3|0\n");
}

static void test_csv_malformed(void **state) {
    (void)state;
    expect_csv("1,2,3,0\n1,2,3\n4,5,6,1\n", NULL, "1 2 3|0\n! data.csv:2: 3 columns, expected 4\n4 5 6|1\n");
    expect_csv("1,2,3,0,5\n4,5,6,1\n", NULL, "! data.csv:1: 5 columns, expected 4\n4 5 6|1\n");
    expect_csv("\n1,2,3,0,\n", NULL, "! data.csv:2: 5 columns, expected 4\n");
    expect_csv("a,b,c,d\n4,5,6,1\n", NULL,
               "! data.csv:1: column 1 (x; for headings see skip_lines): \"a\" is not a number\n4 5 6|1\n");
    expect_csv("\n1,,3,0\n4,5,6,1\n", NULL, "! data.csv:2: column 2 (x): empty, expected a number\n4 5 6|1\n");
    expect_csv("\n1,2,\"3,0\n4,5,6,1\n", NULL, "! data.csv:2: column 3 (x): \"\"3\" is not a number\n4 5 6|1\n");
    expect_csv("\n1,2,\"3\"4,0\n", NULL, "! data.csv:2: column 3 (x): \"\"3\"4\" is not a number\n");
    expect_csv("\n1,2,nan,0\n", NULL, "! data.csv:2: column 3 (x): \"nan\" is not a finite number\n");
    expect_csv("\n1,2,1e999,0\n", NULL, "! data.csv:2: column 3 (x): \"1e999\" is not a finite number\n");
    expect_csv("\n1,2,3,4\n", NULL, "! data.csv:2: column 4 (label): 4 is not an id of 0 to 3\n");
    expect_csv("\n1,2,3,-1\n1,2,3,1.5\n", NULL,
               "! data.csv:2: column 4 (label): -1 is not an id of 0 to 3\n"
               "! data.csv:3: column 4 (label): \"1.5\" is not a whole number\n");
    expect_csv("\n1,a\tb\rc,3,1\n", NULL, "! data.csv:2: column 2 (x): \"a?b?c\" is not a number\n");
    if (sizeof(pd_real) == sizeof(float))
        expect_csv("\n1,1e39,3,1\n", NULL, "! data.csv:2: column 2 (x): 1e+39 is not a finite number of this build\n");
    else expect_csv("\n1,1e160,-1e308,1\n", NULL, "1 1e+160 -1e+308|1\n");
    expect_csv("3.4028235e38,-3.4028235e38,3,1\n", NULL, /* FLT_MAX, rounded up */
               "3.40282e+38 -3.40282e+38 3|1\n");
}

static void expect_csv_refused(const pd_reader_opts *o, pd_status status, const char *message) {
    pd_net *net = make_net(3, false, NULL);
    write_text("data.csv", "1,2,3,0\n");
    expect_none(net, pd_csv_reader(net, "data.csv", o), status, message);
    pd_net_free(net);
}

static void test_csv_refused(void **state) {
    pd_net *net = make_net(3, true, NULL);
    pd_reader_opts o = no_opts();
    (void)state;
    expect_none(net, pd_csv_reader(net, "data.csv", NULL), PD_E_UNSUPPORTED, "input \"x\" carries sequences");
    pd_net_free(net);
    o.order = "x,lable";
    expect_csv_refused(&o, PD_E_ARGUMENT, "order names \"lable\", but no input");
    o.order = "";
    expect_csv_refused(&o, PD_E_ARGUMENT, "order names \"\"");
    o.order = "x,-";
    expect_csv_refused(&o, PD_E_ARGUMENT, "order leaves out input \"label\"");
    o.order = "x,label,x";
    expect_csv_refused(&o, PD_E_ARGUMENT, "order names \"x\" twice");
    o = no_opts();
    o.delimiter = '.';
    expect_csv_refused(&o, PD_E_ARGUMENT, "'.' can't be the delimiter");
    o = no_opts();
    o.skip_lines = -1;
    expect_csv_refused(&o, PD_E_ARGUMENT, "skip_lines must be 0 or more");
    o = no_opts();
    o.first = -1;
    expect_csv_refused(&o, PD_E_ARGUMENT, "first, count");
    o = no_opts();
    o.count = -1;
    expect_csv_refused(&o, PD_E_ARGUMENT, "first, count");
    o = no_opts();
    o.first = PD_ZERO;
    expect_csv_refused(&o, PD_E_ARGUMENT, "first, count");
    o = no_opts();
    o.shift = PD_ZERO;
    expect_csv_refused(&o, PD_E_ARGUMENT, "scale and shift take no PD_ZERO");
    o.shift = 0, o.scale = PD_ZERO;
    expect_csv_refused(&o, PD_E_ARGUMENT, "scale and shift take no PD_ZERO");
    o = no_opts();
    o.fold = 2, o.folds = 2;
    expect_csv_refused(&o, PD_E_ARGUMENT, "fold 2 of 2 does not exist");
    o = no_opts();
    o.not_fold = true;
    expect_csv_refused(&o, PD_E_ARGUMENT, "fold 0 of 0 does not exist");
    o = no_opts();
    o.scale = (double)INFINITY;
    expect_csv_refused(&o, PD_E_ARGUMENT, "scale and shift must be finite");
}

static void test_paths(void **state) {
    pd_net *net = make_net(3, false, NULL);
    pd_reader_opts o = no_opts();
    (void)state;
    expect_none(net, pd_csv_reader(net, "absent.csv", NULL), PD_E_IO, "absent.csv: No such file");
    expect_none(net, pd_csv_reader(net, NULL, NULL), PD_E_ARGUMENT, "csv reader: no path");
    expect_none(net, pd_csv_reader(net, "", NULL), PD_E_ARGUMENT, "csv reader: no path");
    expect_none(net, pd_csv_reader(net, "@absent", NULL), PD_E_IO, "absent: No such file");
    write_text("list", "\n");
    expect_none(net, pd_csv_reader(net, "@list", NULL), PD_E_FORMAT, "list: no paths in it");

    write_text("list", "a.csv\r\nb.csv\n\nabsent.csv\nc.csv");
    write_text("a.csv", "heading\n1,2,3,0\n1,2\n");
    write_text("b.csv", "");
    write_text("c.csv", "heading\n4,5,6,1");
    o.skip_lines = 1;
    expect(net, pd_csv_reader(net, "@list", &o),
           "1 2 3|0\n! a.csv:3: 2 columns, expected 4\n! absent.csv: No such file or directory\n4 5 6|1\n");
    expect(net, pd_csv_reader(net, ".", NULL), "! .:1: Is a directory\n");
    pd_net_free(net);
}

static void test_stdin(void **state) {
    pd_net *net = make_net(3, false, NULL);
    pd_reader *r;
    (void)state;
    write_text("data.csv", "1,2,3,0\n4,5,6,1\n");
    assert_non_null(freopen("data.csv", "r", stdin));
    r = made(net, pd_csv_reader(net, "-", NULL));
    assert_string_equal(read_pass(r, net, 0, 4), "1 2 3|0\n4 5 6|1\n");
    assert_int_equal(r->reset(r, 1), PD_E_UNSUPPORTED);
    check_contains(r->error.text, "stdin: it can be read only once");
    pd_reader_free(r);
    pd_net_free(net);
}

/* Lines longer than the buffer, and numbers and ends of lines across its border. */
static void test_long_lines(void **state) {
    enum { WIDTH = 30000, LINES = 3 };
    pd_net *net = pd_net_new(NULL);
    FILE *f = fopen("data.csv", "wb");
    pd_reader *r;
    pd_batch *b;
    (void)state;
    for (int i = 0; i < LINES; i++)
        for (int j = 0; j < WIDTH; j++) fprintf(f, "%d%c", j + 7 * i, j + 1 < WIDTH ? ',' : '\n');
    for (int i = 0; i < LINES; i++) fprintf(f, "\"%*d\"\n", i * 40000, i);
    fclose(f);
    pd_vector(net, "x", WIDTH);
    r = made(net, pd_csv_reader(net, "data.csv", NULL));
    b = pd_batch_new(net);
    for (int pass = 0; pass < 2; pass++) {
        pd_batch_clear(b);
        assert_int_equal(r->next(r, b, LINES), PD_OK);
        for (int64_t i = 0; i < LINES * WIDTH; i++)
            assert_true(b->slots[0].data[i] == (pd_real)(i % WIDTH + 7 * (i / WIDTH)));
        for (int i = 0; i < LINES; i++) assert_int_equal(r->next(r, b, 1), PD_E_FORMAT);
        check_contains(r->error.text, "data.csv:6: 1 columns, expected 30000");
        assert_int_equal(r->next(r, b, 1), PD_END);
        assert_int_equal(r->reset(r, 0), PD_OK);
    }
    pd_batch_free(b);
    pd_reader_free(r);
    pd_net_free(net);
}

/* ---- options, shards, sizes: sample i is "i i i|i % 4" in every source ---- */

enum { MANY = 53 };

typedef pd_reader *(*open_source)(pd_net *net, const pd_reader_opts *opts);

static void write_many(void) {
    FILE *csv = fopen("many.csv", "wb"), *libsvm = fopen("many.libsvm", "wb"), *idx = fopen("many.idx", "wb");
    FILE *npy = fopen("many.npy", "wb"), *labels = fopen("labels.idx", "wb");
    char header[128];
    fwrite("\0\0\10\2\0\0\0\65\0\0\0\3", 1, 12, idx);
    fwrite("\0\0\10\1\0\0\0\65", 1, 8, labels);
    snprintf(header, sizeof header, "{'descr': '<u2', 'fortran_order': False, 'shape': (%d, 3), }", MANY);
    fprintf(npy, "\x93NUMPY%c%c%c%c%s", 1, 0, (int)strlen(header), 0, header);
    for (int i = 0; i < MANY; i++) {
        const char values[] = { (char)i, 0, (char)i, 0, (char)i, 0 };
        fprintf(csv, "%d,%d,%d,%d\n", i, i, i, i % 4);
        fprintf(libsvm, "%d 1:%d 2:%d 3:%d\n", i % 4, i, i, i);
        fprintf(idx, "%c%c%c", i, i, i);
        fprintf(labels, "%c", i % 4);
        fwrite(values, 1, sizeof values, npy);
    }
    fclose(csv), fclose(libsvm), fclose(idx), fclose(npy), fclose(labels);
}

static pd_reader *open_csv(pd_net *net, const pd_reader_opts *o) { return pd_csv_reader(net, "many.csv", o); }
static pd_reader *open_libsvm(pd_net *net, const pd_reader_opts *o) { return pd_libsvm_reader(net, "many.libsvm", o); }
static pd_reader *open_idx(pd_net *net, const pd_reader_opts *o) {
    const char *const paths[] = { "many.idx", "labels.idx" };
    return pd_idx_reader(net, paths, 2, o);
}
/* npy files cut in three, and a label from elsewhere: IDX can't be mixed in, so the label is made of npy too. */
static pd_reader *open_npy(pd_net *net, const pd_reader_opts *o) {
    const char *const paths[] = { "many.npy", "@labels.list" };
    for (int part = 0; part < 3; part++) {
        int first = part * 20, count = part < 2 ? 20 : MANY - 40;
        char name[32], bytes[128];
        memset(bytes, '\n', sizeof bytes);
        snprintf(bytes, 79, "\x93NUMPY\x01%c%c%c{'descr':'|u1','fortran_order':False,'shape':(%2d,)} ", 0, 70, 0,
                 count);
        bytes[strlen(bytes + 10) + 10] = ' ';
        for (int i = 0; i < count; i++) bytes[80 + i] = (char)((first + i) % 4);
        snprintf(name, sizeof name, "labels%d.npy", part);
        write_bytes(name, bytes, 80 + (size_t)count);
    }
    write_text("labels.list", "labels0.npy\nlabels1.npy\nlabels2.npy\n");
    return pd_npy_reader(net, paths, 2, o);
}

static pd_real many_numbers[3 * MANY];
static int64_t many_ids[MANY];
static pd_reader *open_array(pd_net *net, const pd_reader_opts *o) {
    pd_array arrays[2];
    (void)o;
    memset(arrays, 0, sizeof arrays);
    for (int i = 0; i < MANY; i++) {
        for (int j = 0; j < 3; j++) many_numbers[3 * i + j] = (pd_real)i;
        many_ids[i] = i % 4;
    }
    arrays[0].data = many_numbers;
    arrays[1].ids = many_ids;
    return pd_array_reader(net, MANY, arrays, 2);
}
static int64_t streamed;
static pd_status stream_next(void *user, pd_batch *b) {
    pd_real *row;
    (void)user;
    if (streamed == MANY) {
        streamed = 0;
        return PD_END;
    }
    row = pd_batch_add_row(b, 0);
    if (!row) return b->error.status;
    row[0] = row[1] = row[2] = (pd_real)streamed;
    return pd_batch_add_id(b, 1, streamed++ % 4);
}
static pd_reader *open_stream(pd_net *net, const pd_reader_opts *o) {
    (void)o;
    streamed = 0;
    return pd_stream_reader(net, stream_next, NULL, NULL);
}
static pd_status stream_reset(void *user, int64_t pass) {
    (void)user;
    streamed = 0;
    return pass == 99 ? PD_E_IO : PD_OK;
}
static pd_reader *open_stream_again(pd_net *net, const pd_reader_opts *o) {
    (void)o;
    streamed = MANY; /* where an earlier user has left it */
    return pd_stream_reader(net, stream_next, stream_reset, NULL);
}

static const struct {
    open_source open;
    bool options, sized;
} sources[] = {
    { open_csv, true, false },
    { open_libsvm, true, false },
    { open_idx, true, true },
    { open_npy, true, true },
    { open_array, false, true },
    { open_stream, false, false },
    { open_stream_again, false, false },
};

/* What should come, sample by sample. */
static const char *expected_samples(const pd_reader_opts *o, int rank, int ranks, int64_t *count) {
    static text t;
    int64_t chosen = 0;
    t.n = 0;
    t.s[0] = 0;
    *count = 0;
    for (int i = 0; i < MANY; i++) {
        bool in = i >= o->first && (!o->count || i - o->first < (o->count == PD_ZERO ? 0 : o->count));
        if (o->folds && (i % o->folds == o->fold) == o->not_fold) in = false;
        if (!in || chosen++ % ranks != rank) continue;
        say(&t, "%d %d %d|%d\n", i, i, i, i % 4);
        ++*count;
    }
    return t.s;
}

static void check_choice(pd_net *net, int source, const pd_reader_opts *o) {
    for (int ranks = 1; ranks <= 3; ranks++)
        for (int rank = 0; rank < ranks; rank++) {
            pd_reader *r = made(net, sources[source].open(net, o));
            int64_t count;
            const char *expected = expected_samples(o, rank, ranks, &count);
            assert_int_equal(pd_reader_shard(r, rank, ranks), PD_OK);
            assert_string_equal(read_pass(r, net, 0, 4), expected);
            assert_string_equal(read_pass(r, net, 1, 0), expected);
            assert_int_equal(r->size(r), sources[source].sized ? count : -1);
            pd_reader_free(r);
        }
}

static void test_choices(void **state) {
    pd_net *net = make_net(3, false, NULL);
    (void)state;
    write_many();
    for (int source = 0; source < COUNT(sources); source++) {
        pd_reader_opts o = no_opts();
        check_choice(net, source, &o);
        for (int i = 0; sources[source].options && i < 60; i++) {
            random_seed((uint64_t)i);
            o.first = below(3) ? below(MANY + 5) : 0;
            o.count = below(3) ? below(MANY + 5) : below(2) ? INT64_MAX : below(2) ? PD_ZERO : 0;
            o.folds = below(3) ? (int)below(7) : 0;
            o.fold = o.folds ? (int)below(o.folds) : 0;
            o.not_fold = o.folds && below(2);
            check_choice(net, source, &o);
        }
    }
    pd_net_free(net);
}

/* Skipping is as if the samples had been taken: of a shard of a fold. */
static void test_skip(void **state) {
    pd_net *net = make_net(3, false, NULL);
    (void)state;
    write_many();
    for (int source = 0; source < COUNT(sources); source++) {
        pd_reader_opts o = no_opts();
        int64_t count;
        const char *expected;
        pd_reader *r;
        if (sources[source].options) o.folds = 3, o.fold = 1, o.not_fold = true;
        expected = expected_samples(&o, 1, 2, &count);
        r = made(net, sources[source].open(net, &o));
        for (int64_t skipped = 0; skipped <= count + 1; skipped++) {
            text t;
            const char *rest = expected;
            t.n = 0;
            t.s[0] = 0;
            assert_int_equal(pd_reader_shard(r, 1, 2), PD_OK);
            if (sources[source].open == open_stream) { /* what was seen of a stream is gone already */
                assert_int_equal(r->skip(r, skipped), PD_OK);
            } else {
                assert_int_equal(r->skip(r, skipped), skipped > count ? PD_END : PD_OK);
                for (int64_t i = 0; i < skipped && *rest; i++) rest = strchr(rest, '\n') + 1;
            }
            read_rest(r, net, 3, &t);
            assert_string_equal(t.s, rest);
        }
        pd_reader_free(r);
    }
    pd_net_free(net);
}

static void test_shard_refused(void **state) {
    pd_net *net = make_net(3, false, NULL);
    pd_reader *r = made(net, open_array(net, NULL));
    (void)state;
    assert_int_equal(pd_reader_shard(NULL, 0, 1), PD_E_ARGUMENT);
    assert_int_equal(pd_reader_shard(r, 0, 0), PD_E_ARGUMENT);
    assert_int_equal(pd_reader_shard(r, 3, 3), PD_E_ARGUMENT);
    check_contains(r->error.text, "array reader: shard 3 of 3 does not exist");
    r->shard = NULL;
    assert_int_equal(pd_reader_shard(r, 0, 2), PD_E_UNSUPPORTED);
    pd_reader_free(r);
    pd_reader_free(NULL);
    pd_net_free(net);
}

/* ---- arrays ---- */

static void test_arrays(void **state) {
    pd_net *net = make_net(2, true, NULL), *plain = make_net(2, false, NULL);
    const pd_real data[] = { 1, 2, 3, 4, 5, 6 };
    const int64_t ids[] = { 0, 1, 7, 3 }, x_starts[] = { 0, 2, 2, 3 }, starts[] = { 0, 1, 2, 4 },
                  falling[] = { 0, 2, 1, 3 };
    pd_array a[2];
    (void)state;
    memset(a, 0, sizeof a);
    a[0].data = data;
    a[0].starts = x_starts;
    a[1].ids = ids;
    a[1].starts = starts;
    expect(net, pd_array_reader(net, 3, a, 2),
           "1 2,3 4|0\n|1\n! array reader: sample 2: input \"label\": id 7, expected 0 to 3\n");
    a[0].starts = falling;
    expect_none(net, pd_array_reader(net, 3, a, 2), PD_E_ARGUMENT,
                "input \"x\": starts[2] is 1; they must rise from 0");
    a[0].starts = x_starts + 1;
    expect_none(net, pd_array_reader(net, 2, a, 2), PD_E_ARGUMENT, "starts[0] is 2");
    a[0].starts = NULL;
    expect_none(net, pd_array_reader(net, 3, a, 2), PD_E_ARGUMENT, "input \"x\" carries sequences and needs starts");
    expect_none(plain, pd_array_reader(plain, 3, a, 2), PD_E_ARGUMENT, "input \"label\" has starts but no sequences");
    a[1].starts = NULL;
    expect(plain, pd_array_reader(plain, 2, a, 2), "1 2|0\n3 4|1\n");
    expect_none(plain, pd_array_reader(plain, 2, a, 1), PD_E_ARGUMENT,
                "2 samples of 1 arrays, expected 0 or more of 2");
    expect_none(plain, pd_array_reader(plain, -1, a, 2), PD_E_ARGUMENT, "-1 samples");
    expect_none(plain, pd_array_reader(plain, 2, NULL, 2), PD_E_ARGUMENT, "0 arrays");
    a[1].data = data;
    expect_none(plain, pd_array_reader(plain, 2, a, 2), PD_E_ARGUMENT, "input \"label\" takes ids, and nothing else");
    memset(a, 0, sizeof a);
    expect_none(plain, pd_array_reader(plain, 2, a, 2), PD_E_ARGUMENT, "input \"x\" takes data, and nothing else");
    expect(plain, pd_array_reader(plain, 0, a, 2), "");
    pd_net_free(net);
    pd_net_free(plain);
}

/* A batch of another net must not be written to: its rows may be shorter. */
static void test_other_batch(void **state) {
    pd_net *net = make_net(3, false, NULL), *other = make_net(2, false, NULL);
    pd_reader *r = made(net, pd_shuffle(net, pd_prefetch(net, open_array(net, NULL), 1), 5, 1));
    pd_batch *b = pd_batch_new(other), *own = pd_batch_new(net);
    (void)state;
    assert_int_equal(r->next(r, b, 1), PD_E_SHAPE);
    assert_int_equal(r->next(r, NULL, 1), PD_E_ARGUMENT);
    assert_int_equal(r->next(r, own, -1), PD_E_ARGUMENT);
    assert_int_equal(r->next(r, own, 0), PD_OK);
    assert_int_equal(r->next(r, own, 7), PD_OK);
    pd_reader_free(r);
    r = made(net, open_array(net, NULL));
    assert_int_equal(r->next(r, b, 1), PD_E_SHAPE);
    check_contains(r->error.text, "array reader: the batch is of a net with other inputs");
    pd_reader_free(r);
    pd_batch_free(b);
    pd_batch_free(own);
    pd_net_free(net);
    pd_net_free(other);
}

static void test_bad_net(void **state) {
    pd_net *net = pd_net_new(NULL);
    (void)state;
    expect_none(net, pd_csv_reader(net, "data.csv", NULL), PD_E_STATE, "csv reader: the net has no inputs yet");
    pd_vector(net, "x", -1);
    expect_none(net, pd_csv_reader(net, "data.csv", NULL), pd_error_status(net), "x");
    assert_null(pd_batch_new(net));
    assert_null(pd_batch_new(NULL));
    assert_null(pd_csv_reader(NULL, "data.csv", NULL));
    assert_null(pd_shuffle(net, NULL, 1, 1));
    assert_null(pd_prefetch(net, NULL, 1));
    assert_null(pd_shuffle(NULL, NULL, 1, 1));
    pd_net_free(net);
}

/* ---- bytes of binary files ---- */

typedef struct bytes {
    unsigned char b[4096];
    size_t n;
} bytes;

static void put(bytes *to, const void *from, size_t n) {
    assert_true(to->n + n <= sizeof to->b);
    memcpy(to->b + to->n, from, n);
    to->n += n;
}

/* The number x as kind f, i, u or b of `size` bytes. */
static void put_number(bytes *to, double x, char kind, int size, bool big) {
    uint64_t bits = x < 0 ? ~(uint64_t)(-x - 1) : (uint64_t)x;
    float single = (float)x;
    if (kind == 'f' && size == 8) memcpy(&bits, &x, 8);
    if (kind == 'f' && size == 4) {
        uint32_t low;
        memcpy(&low, &single, 4);
        bits = low;
    }
    if (kind == 'f' && size == 2)
        bits = x == 0 ? 0 : (x < 0 ? 0x8000u : 0) | (unsigned)(ilogb(x) + 15) << 10; /* powers of 2 */
    for (int i = 0; i < size; i++) {
        unsigned char byte = (unsigned char)(bits >> 8 * (big ? size - 1 - i : i));
        put(to, &byte, 1);
    }
}

/* An IDX file of `type` with `count` dims and some numbers. */
static void write_idx(const char *name, int type, int count, const int64_t *dims, int64_t numbers,
                      const double *values) {
    static const struct {
        char kind;
        int size;
    } types[] = { { 'u', 1 }, { 'i', 1 }, { 'x', 1 }, { 'i', 2 }, { 'i', 4 }, { 'f', 4 }, { 'f', 8 } };
    const unsigned char magic[] = { 0, 0, (unsigned char)type, (unsigned char)count };
    bytes f;
    f.n = 0;
    put(&f, magic, 4);
    for (int i = 0; i < count; i++) put_number(&f, (double)dims[i], 'u', 4, true);
    for (int64_t i = 0; i < numbers; i++) put_number(&f, values[i], types[type - 8].kind, types[type - 8].size, true);
    write_bytes(name, f.b, f.n);
}

static const int64_t idx_dims[] = { 2, 1, 3 };
static const double idx_values[] = { 1, 2, 4, 0, 64, 8, 1, 3 };
static const char *const idx_paths[] = { "x.idx", "label.idx" };
#define IDX_SAMPLES "1 2 4|1\n0 64 8|3\n"

static void write_good_idx(void) {
    write_idx("x.idx", 8, 3, idx_dims, 6, idx_values);
    write_idx("label.idx", 8, 1, idx_dims, 2, idx_values + 6);
}

static void test_idx(void **state) {
    static const double negative[] = { -1, -128, 127, -1, 1, 0 };
    pd_net *net = make_net(3, false, NULL);
    pd_reader_opts o = no_opts();
    (void)state;
    write_good_idx();
    expect(net, pd_idx_reader(net, idx_paths, 2, NULL), IDX_SAMPLES);
    o.scale = 0.25;
    o.shift = -1;
    expect(net, pd_idx_reader(net, idx_paths, 2, &o), "-0.75 -0.5 0|1\n-1 15 1|3\n");
    for (int type = 8; type <= 14; type++) {
        if (type == 10) continue;
        write_idx("x.idx", type, 3, idx_dims, 6, idx_values);
        write_idx("label.idx", type, 1, idx_dims, 2, idx_values + 6);
        expect(net, pd_idx_reader(net, idx_paths, 2, NULL), IDX_SAMPLES);
        if (type == 8) continue;
        write_idx("x.idx", type, 3, idx_dims, 6, negative);
        expect(net, pd_idx_reader(net, idx_paths, 2, NULL), "-1 -128 127|1\n-1 1 0|3\n");
    }
    pd_net_free(net);
}

static void expect_idx_refused(pd_net *net, pd_status status, const char *message) {
    expect_none(net, pd_idx_reader(net, idx_paths, 2, NULL), status, message);
    write_good_idx();
}

static void test_idx_malformed(void **state) {
    static const int64_t huge[] = { 2, 0xffffffff, 0xffffffff, 0xffffffff }, three[] = { 3 };
    static const double bad_labels[] = { 1, 4 };
    pd_net *net = make_net(3, false, NULL), *other = make_net(4, false, NULL);
    pd_reader_opts o = no_opts();
    (void)state;
    write_good_idx();
    for (size_t n = 0; n < 16; n++) {
        char message[100];
        int64_t part = n < 4 ? 0 : (int64_t)n / 4 * 4;
        write_bytes("x.idx", "\0\0\10\3\0\0\0\2\0\0\0\1\0\0\0\3", n);
        snprintf(message, sizeof message, "x.idx: it ends within the 4 bytes of the header at offset %d", (int)part);
        expect_idx_refused(net, PD_E_FORMAT, message);
    }
    write_bytes("x.idx", "\0\0\12\3\0\0\0\2\0\0\0\1\0\0\0\3......", 22);
    expect_idx_refused(net, PD_E_FORMAT, "x.idx: it begins with 00 00 0a 03, which is not an IDX file");
    write_bytes("x.idx", "\1\0\10\3\0\0\0\2\0\0\0\1\0\0\0\3......", 22);
    expect_idx_refused(net, PD_E_FORMAT, "begins with 01 00 08 03");
    write_bytes("x.idx", "\0\0\10\0", 4);
    expect_idx_refused(net, PD_E_FORMAT, "begins with 00 00 08 00");
    write_idx("x.idx", 8, 3, idx_dims, 5, idx_values);
    expect_idx_refused(net, PD_E_FORMAT, "x.idx: 5 bytes behind offset 16, expected 2 samples of 3 numbers of 1 bytes");
    write_idx("x.idx", 8, 3, idx_dims, 7, idx_values);
    expect_idx_refused(net, PD_E_FORMAT, "7 bytes behind offset 16");
    write_idx("x.idx", 8, 4, huge, 0, NULL);
    expect_idx_refused(net, PD_E_FORMAT, "product of the dims is too large");
    write_idx("x.idx", 8, 2, huge, 0, NULL);
    expect_idx_refused(net, PD_E_SHAPE, "x.idx: 4294967295 numbers per sample, but input \"x\" takes 3");
    write_idx("label.idx", 8, 1, three, 3, idx_values);
    expect_idx_refused(net, PD_E_SHAPE, "label.idx: 3 samples for input \"label\", but input \"x\" has 2");
    write_idx("label.idx", 8, 2, idx_dims + 1, 3, idx_values);
    expect_idx_refused(net, PD_E_SHAPE, "label.idx: 3 numbers per sample, but input \"label\" takes 1");
    remove("label.idx");
    expect_idx_refused(net, PD_E_IO, "label.idx: No such file");
    expect_none(other, pd_idx_reader(other, idx_paths, 2, NULL), PD_E_SHAPE, "input \"x\" takes 4");
    expect_none(net, pd_idx_reader(net, idx_paths, 1, NULL), PD_E_ARGUMENT, "idx reader: 1 paths, expected 2");
    expect_none(net, pd_idx_reader(net, NULL, 2, NULL), PD_E_ARGUMENT, "0 paths");
    o.order = "x,label";
    expect_none(net, pd_idx_reader(net, idx_paths, 2, &o), PD_E_ARGUMENT, "are options for CSV");
    write_idx("label.idx", 8, 1, idx_dims, 2, bad_labels);
    expect(net, pd_idx_reader(net, idx_paths, 2, NULL),
           "1 2 4|1\n! label.idx: offset 9 (sample 1): 4 is not an id of 0 to 3\n");
    pd_net_free(net);
    pd_net_free(other);
}

static void test_idx_not_finite(void **state) {
    static const double values[] = { 1, 2, 4, 0, (double)INFINITY, 8 };
    pd_net *net = make_net(3, false, NULL);
    pd_reader *r;
    (void)state;
    write_good_idx();
    write_idx("x.idx", 13, 3, idx_dims, 6, values);
    expect(net, pd_idx_reader(net, idx_paths, 2, NULL),
           "1 2 4|1\n! x.idx: offset 32 (sample 1): inf is not a finite number of this build\n");
    write_good_idx();
    r = made(net, pd_idx_reader(net, idx_paths, 2, NULL));
    assert_int_equal(truncate("x.idx", 18), 0);
    assert_string_equal(read_pass(r, net, 0, 2), "! x.idx: offset 16 (sample 0): the file has become shorter\n"
                                                 "! x.idx: offset 19 (sample 1): the file has become shorter\n");
    pd_reader_free(r);
    pd_net_free(net);
}

/* Samples behind 2 and 4 GiB; the files are sparse. */
static void test_large_file(void **state) {
    static const int64_t samples = INT64_C(3000000000);
    const char *const path = "large.idx";
    pd_net *net = pd_net_new(NULL);
    pd_reader_opts o = no_opts();
    pd_reader *r;
    FILE *f = fopen(path, "wb");
    bytes head;
    (void)state;
    head.n = 0;
    put(&head, "\0\0\13\1", 4);
    put_number(&head, (double)samples, 'u', 4, true);
    fwrite(head.b, 1, head.n, f);
    if (fseeko(f, 8 + 2 * samples - 1, SEEK_SET) != 0 || fputc(3, f) != 3 || fclose(f) != 0) {
        print_message("[  SKIPPED ] no sparse files of 6 GB here\n");
        skip_test();
    }
    pd_ids(net, "word", 1000);
    o.first = samples - 3;
    r = made(net, pd_idx_reader(net, &path, 1, &o));
    assert_int_equal(r->size(r), 3);
    expect(net, r, "0\n0\n3\n");
    pd_net_free(net);
}

/* ---- npy ---- */

static void write_npy(const char *name, int version, const char *header, const void *data, size_t n) {
    bytes f;
    size_t length = strlen(header);
    const unsigned char start[] = { 0x93, 'N', 'U', 'M', 'P', 'Y', (unsigned char)version, 0 };
    f.n = 0;
    put(&f, start, sizeof start);
    put_number(&f, (double)length, 'u', version == 1 ? 2 : 4, false);
    put(&f, header, length);
    put(&f, data, n);
    write_bytes(name, f.b, f.n);
}

static const char *const npy_paths[] = { "x.npy", "label.npy" };

static void write_npy_label(void) {
    write_npy("label.npy", 1, "{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }", "\1\3", 2);
}

static void check_npy_type(pd_net *net, char order, char kind, int size) {
    bytes data;
    char header[200];
    bool big = order == '>';
    data.n = 0;
    for (int i = 0; i < 6; i++) {
        double value = kind == 'b'                 ? (double)(idx_values[i] != 0)
                       : i % 4 == 1 && kind != 'u' ? -idx_values[i]
                                                   : idx_values[i];
        put_number(&data, value, kind, size, big);
    }
    for (int version = 1; version <= 3; version++) {
        snprintf(header, sizeof header, "{'descr': '%c%c%d', 'fortran_order': False, 'shape': (2, 1, 3), }   \n", order,
                 kind, size);
        write_npy("x.npy", version, header, data.b, data.n);
        expect(net, pd_npy_reader(net, npy_paths, 2, NULL),
               kind == 'b'   ? "1 1 1|1\n0 1 1|3\n"
               : kind == 'u' ? IDX_SAMPLES
                             : "1 -2 4|1\n0 64 -8|3\n");
    }
}

static void test_npy(void **state) {
    static const char kinds[] = "fiub", orders[] = "<>=|";
    pd_net *net = make_net(3, false, NULL);
    (void)state;
    write_npy_label();
    for (int k = 0; k < 4; k++)
        for (int size = 1; size <= 8; size *= 2)
            for (int order = 0; order < 4; order++) {
                if ((kinds[k] == 'f' && size == 1) || (kinds[k] == 'b' && size > 1)) continue;
                if (orders[order] == '|' && size > 1) continue;
                check_npy_type(net, orders[order], kinds[k], size);
            }
    /* other ways to write the header */
    write_npy("x.npy", 1, "{ \"shape\" :( 2,3 ) ,'fortran_order':False,\n\t'descr':\"|i1\"}", "\1\2\4\0\100\10", 6);
    expect(net, pd_npy_reader(net, npy_paths, 2, NULL), IDX_SAMPLES);
    write_npy("label.npy", 2, "{'descr': '|u1', 'fortran_order': True, 'shape': (2,), }", "\1\3", 2);
    expect(net, pd_npy_reader(net, npy_paths, 2, NULL), IDX_SAMPLES);
    write_npy("label.npy", 2, "{'descr': '<i2', 'fortran_order': False, 'shape': (2,1)}", "\1\0\3\0", 4);
    expect(net, pd_npy_reader(net, npy_paths, 2, NULL), IDX_SAMPLES);
    pd_net_free(net);
}

static void expect_npy_refused(const char *header, size_t data, pd_status status, const char *message) {
    pd_net *net = make_net(3, false, NULL);
    static const char zeros[64];
    write_npy_label();
    write_npy("x.npy", 1, header, zeros, data);
    expect_none(net, pd_npy_reader(net, npy_paths, 2, NULL), status, message);
    pd_net_free(net);
}

static void test_npy_malformed(void **state) {
    static const char *const malformed[] = {
        "",
        "{",
        "}",
        "{}",
        "[]",
        "{'descr': '<f4'}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)",
        "{'descr': '<f4', 'fortran_order': False, 'shape': ()}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, -3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 6}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 9223372036854775807, 3)}",
        "{'descr': '<f4', 'fortran_order': Falsch, 'shape': (2, 3)}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 3)}",
        "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'more': 1}",
        "{'descr' '<f4', 'fortran_order': False}",
        "{'descr': '<f4' 'fortran_order': False, 'shape': (2, 3)}",
        "{'descr",
        "{'a very long key that does not fit': 1}",
        "{'descr': '<f4\\",
        "{'descr': '<f4', , 'fortran_order': False, 'shape': (2, 3)}",
    };
    static const char *const types[] = { "|O", "<c8", "<U3", "|S4", "<M8", "<f16", "f4",
                                         "<f", "<i3", "|f4", "<f1", "|b2", "",     "<u4x" };
    pd_net *net = make_net(3, false, NULL);
    char header[200], big[3000];
    (void)state;
    for (int i = 0; i < COUNT(malformed); i++)
        expect_npy_refused(malformed[i], 24, PD_E_FORMAT, "x.npy: malformed near byte");
    for (int i = 0; i < COUNT(types); i++) {
        snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (2, 3)}", types[i]);
        expect_npy_refused(header, 24, PD_E_UNSUPPORTED, "x.npy: elements of type \"");
    }
    expect_npy_refused("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 3)}", 24, PD_E_UNSUPPORTED,
                       "structured");
    expect_npy_refused("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3)}", 24, PD_E_UNSUPPORTED,
                       "in Fortran order");
    expect_npy_refused("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}", 16, PD_E_SHAPE,
                       "2 numbers per sample");
    expect_npy_refused("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 3)}", 36, PD_E_SHAPE,
                       "2 samples for input \"label\"");
    expect_npy_refused("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}", 23, PD_E_FORMAT,
                       "23 bytes behind offset 67");
    expect_npy_refused("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}", 25, PD_E_FORMAT,
                       "expected 2 samples of 3 numbers");
    expect_npy_refused("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 3)}", 0, PD_E_FORMAT,
                       "0 bytes behind");
    write_bytes("x.npy", "\x93NUMPY\4\0", 8);
    expect_none(net, pd_npy_reader(net, npy_paths, 2, NULL), PD_E_FORMAT, "x.npy: it is not an .npy file");
    write_bytes("x.npy", "\x93NUMPY\2\0\xff\xff\xff\xff", 12);
    expect_none(net, pd_npy_reader(net, npy_paths, 2, NULL), PD_E_FORMAT, "offset 8: the header has 4294967295 bytes");
    write_bytes("x.npy", "\x93NUMPY\1\0\x20\0{", 11);
    expect_none(net, pd_npy_reader(net, npy_paths, 2, NULL), PD_E_FORMAT,
                "ends within the 32 bytes of the header at offset 10");
    write_bytes("x.npy", "\x93NUM", 4);
    expect_none(net, pd_npy_reader(net, npy_paths, 2, NULL), PD_E_FORMAT, "ends within the 8 bytes");
    memset(big, ' ', sizeof big);
    memcpy(big, "{'shape': (", 11);
    for (int i = 0; i < 100; i++) memcpy(big + 11 + 2 * i, "1,", 2);
    memcpy(big + 2950, ")}", 3);
    expect_npy_refused(big, 4, PD_E_FORMAT, "malformed near byte");
    pd_net_free(net);
}

/* ---- whole numbers, which double can't hold all of ---- */

/* Written as text, and what comes of it among as many ids as can be. */
static const struct {
    const char *text, *expected;
} wholes[] = {
    { "9007199254740993", "9007199254740993" },
    { "72048431380967005", "72048431380967005" },
    { "+9223372036854775806", "9223372036854775806" },
    { "9007199254740993.000", "9007199254740993" },
    { "0.9007199254740993e16", "9007199254740993" },
    { "90071992547409930000000000000000000000e-22", "9007199254740993" },
    { "9007199254740993e2", "900719925474099300" },
    { "000000000000000000000000000000009007199254740993", "9007199254740993" },
    { "3.0", "3" },
    { "1e3", "1000" },
    { "-0", "0" },
    { "0e99999999999999999999", "0" },
    { "0.0e-5", "0" },
    { "9223372036854775807", "! 9223372036854775807 is not an id of 0 to 9223372036854775806" },
    { "18446744073709551615", "! 18446744073709551615 is not an id" },
    { "-18446744073709551615", "! -18446744073709551615 is not an id" },
    { "-1", "! -1 is not an id of 0 to 9223372036854775806" },
    { "18446744073709551616", "! \"18446744073709551616\" is beyond 64 bits" },
    { "1e19e", "! \"1e19e\" is not a number" },
    { "1e20", "! \"1e20\" is beyond 64 bits" },
    { "99999999999999999999999999999999999999999", "is beyond 64 bits" },
    { "1e999999999999999999999", "! \"1e999999999999999999999\" is beyond 64 bits" },
    { "9007199254740993.5", "! \"9007199254740993.5\" is not a whole number" },
    { "90071992547409935e-1", "is not a whole number" },
    { "1e-99999999999999999999", "is not a whole number" },
    { "nan", "! \"nan\" is not a finite number" },
    { "", "! empty, expected a number" },
};

/* The id that the reader gives, as text, or "! " and the end of its message. Frees the reader. */
static const char *read_id(pd_net *net, pd_reader *r, int slot) {
    static char got[600];
    pd_batch *b = pd_batch_new(net);
    pd_status status = made(net, r)->next(r, b, 1);
    if (status == PD_OK) snprintf(got, sizeof got, "%lld", (long long)b->slots[slot].ids[0]);
    else snprintf(got, sizeof got, "!%s", strrchr(r->error.text, ':') + 1);
    pd_batch_free(b);
    pd_reader_free(r);
    return got;
}

static void check_id(const char *got, const char *expected) {
    if (expected[0] != '!' && !strchr(expected, ' ')) assert_string_equal(got, expected);
    else check_contains(got, expected);
}

static void test_whole_numbers(void **state) {
    pd_net *csv = pd_net_new(NULL), *libsvm = pd_net_new(NULL);
    char line[200];
    (void)state;
    pd_ids(csv, "id", INT64_MAX);
    pd_vector(libsvm, "x", 1);
    pd_ids(libsvm, "id", INT64_MAX);
    for (int i = 0; i < COUNT(wholes); i++) {
        snprintf(line, sizeof line, "\"%s\"\n", wholes[i].text);
        write_text("id.csv", line);
        check_id(read_id(csv, pd_csv_reader(csv, "id.csv", NULL), 0), wholes[i].expected);
        snprintf(line, sizeof line, "%s 1:1\n", wholes[i].text);
        write_text("id.txt", line);
        if (wholes[i].text[0])
            check_id(read_id(libsvm, pd_libsvm_reader(libsvm, "id.txt", NULL), 1), wholes[i].expected);
    }
    pd_net_free(csv);
    pd_net_free(libsvm);
}

/* Of all types of 64 bits, in both orders, the integer bits or the double x. */
static void check_binary_id(pd_net *net, char kind, bool big, uint64_t bits, double x, const char *expected) {
    static const char *const paths[] = { "id.npy", "id.idx" };
    char header[100];
    bytes data, idx;
    data.n = idx.n = 0;
    if (kind == 'f') memcpy(&bits, &x, sizeof bits);
    for (int i = 0; i < 8; i++) {
        unsigned char byte = (unsigned char)(bits >> 8 * (big ? 7 - i : i));
        put(&data, &byte, 1);
    }
    snprintf(header, sizeof header, "{'descr': '%c%c8', 'fortran_order': False, 'shape': (1,), }", big ? '>' : '<',
             kind);
    write_npy("id.npy", 1, header, data.b, 8);
    check_id(read_id(net, pd_npy_reader(net, paths, 1, NULL), 0), expected);
    if (kind != 'f' || !big) return;
    put(&idx, "\0\0\16\1\0\0\0\1", 8);
    put(&idx, data.b, 8);
    write_bytes("id.idx", idx.b, idx.n);
    check_id(read_id(net, pd_idx_reader(net, paths + 1, 1, NULL), 0), expected);
}

static void test_binary_whole_numbers(void **state) {
    pd_net *net = pd_net_new(NULL);
    (void)state;
    pd_ids(net, "id", INT64_MAX);
    for (int big = 0; big < 2; big++) {
        check_binary_id(net, 'i', big, 9007199254740993u, 0, "9007199254740993");
        check_binary_id(net, 'u', big, 72048431380967005u, 0, "72048431380967005");
        check_binary_id(net, 'i', big, (uint64_t)INT64_MAX - 1, 0, "9223372036854775806");
        check_binary_id(net, 'i', big, (uint64_t)1 << 63, 0, "! -9223372036854775808 is not an id of 0 to 922");
        check_binary_id(net, 'u', big, (uint64_t)1 << 63, 0, "! 9223372036854775808 is not an id");
        check_binary_id(net, 'i', big, UINT64_MAX, 0, "! -1 is not an id");
        check_binary_id(net, 'u', big, UINT64_MAX, 0, "! 18446744073709551615 is not an id");
        check_binary_id(net, 'f', big, 0, 9007199254740994.0, "9007199254740994");
        check_binary_id(net, 'f', big, 0, 9223372036854774784.0, "9223372036854774784");
        check_binary_id(net, 'f', big, 0, 9223372036854775808.0, "! 9223372036854775808 is not an id");
        check_binary_id(net, 'f', big, 0, 18446744073709551616.0, "is not an id of 0 to 9223372036854775806");
        check_binary_id(net, 'f', big, 0, -0.0, "0");
        check_binary_id(net, 'f', big, 0, -2, "! -2 is not an id");
        check_binary_id(net, 'f', big, 0, 0.5, "! 0.5 is not an id");
        check_binary_id(net, 'f', big, 0, (double)INFINITY, "! inf is not an id");
        check_binary_id(net, 'f', big, 0, (double)NAN, "nan is not an id");
    }
    pd_net_free(net);
}

/* Columns, queries and labels that differ only beyond 53 bits stay apart, from the file to the evaluator. */
static void test_ids_beyond_double(void **state) {
    pd_net *net = pd_net_new(NULL), *sparse = pd_net_new(NULL);
    pd_layer *score = pd_vector(net, "score", 1);
    pd_layer *label = pd_label(net, "label", INT64_MAX), *query = pd_ids(net, "query", INT64_MAX);
    pd_evaluator_opts o;
    pd_evaluator *pairs;
    pd_batch *b;
    pd_reader *r;
    (void)state;
    memset(&o, 0, sizeof o);
    o.query = query;
    pairs = pd_eval_pnpair(net, score, label, &o);
    if (!pairs) fail_msg("%s", pd_error(net));
    write_text("data.csv", "0.5,9007199254740992,9223372036854775805\n0.7,9007199254740993,9223372036854775805\n"
                           "0.9,9007199254740992,9223372036854775804\n");
    r = made(net, pd_csv_reader(net, "data.csv", NULL));
    b = pd_batch_new(net);
    assert_int_equal(r->next(r, b, 3), PD_OK);
    assert_int_equal(pd_forward(net, b, PD_PREDICT, (pd_layer *[]){ score, label, query }, 3), PD_OK);
    assert_int_equal(inside_evaluators_update(net), PD_OK);
    assert_true(pairs->sums[0] == 1 && pairs->sums[1] == 0 && pairs->sums[2] == 0);
    pd_reader_free(r);
    pd_batch_free(b);

    pd_sparse_vector(sparse, "x", INT64_MAX);
    pd_vector(sparse, "y", 1);
    write_text("data.txt", "1 9007199254740993:1 9007199254740994:1 9223372036854775807:2\n"
                           "1 9223372036854775807:2 9223372036854775807:2\n");
    r = made(sparse, pd_libsvm_reader(sparse, "data.txt", NULL));
    b = pd_batch_new(sparse);
    assert_int_equal(r->next(r, b, 1), PD_OK);
    assert_int_equal(b->slots[0].row_starts[1], 3);
    assert_true(b->slots[0].ids[0] == 9007199254740992 && b->slots[0].ids[1] == 9007199254740993);
    assert_true(b->slots[0].ids[2] == INT64_MAX - 1);
    assert_int_equal(r->next(r, b, 1), PD_E_FORMAT);
    check_contains(r->error.text, "index 9223372036854775807, expected 9223372036854775808 to 9223372036854775807");
    pd_reader_free(r);
    pd_batch_free(b);
    pd_net_free(net);
    pd_net_free(sparse);
}

/* ---- LibSVM ---- */

static pd_net *libsvm_net(int64_t classes, bool sequences) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 3), *y;
    if (sequences) pd_sequence(x);
    y = classes ? pd_label(net, "y", classes) : pd_vector(net, "y", 1);
    if (sequences) pd_sequence(y);
    return net;
}

static void expect_libsvm(int64_t classes, bool sequences, const char *content, const pd_reader_opts *o,
                          const char *expected) {
    pd_net *net = libsvm_net(classes, sequences);
    write_text("data.txt", content);
    expect(net, pd_libsvm_reader(net, "data.txt", o), expected);
    pd_net_free(net);
}

static void test_libsvm(void **state) {
    pd_reader_opts o = no_opts();
    (void)state;
    expect_libsvm(2, false, "+1 1:0.5 3:2\n# all of it\n-1 2:1 # 3:7\r\n0\n\n1 qid:7 2:3", NULL,
                  "0.5 0 2|1\n0 1 0|0\n0 0 0|0\n0 3 0|1\n");
    expect_libsvm(0, false, "-1.5 1:1\n2e1  \t2:2 ", NULL, "1 0 0|-1.5\n0 2 0|20\n");
    o.shift = 1;
    expect_libsvm(3, false, "2 2:3\n", &o, "1 4 1|2\n");
    expect_libsvm(0, true, "1 qid:1 1:1\n2 qid:1 2:2\n3 qid:2 1:1\n4 qid:1\n", NULL,
                  "1 0 0,0 2 0|1,2\n1 0 0|3\n0 0 0|4\n");
}

static void test_libsvm_malformed(void **state) {
    static const struct {
        const char *line, *message;
    } bad[] = {
        { "x 1:1", "label: \"x\" is not a number" },
        { "3 1:1", "label: 3 is not an id of 0 to 2" },
        { "-1 1:1", "label: -1 is not an id of 0 to 2" },
        { "1.5", "label: \"1.5\" is not a whole number" },
        { "1:1", "label: \"1:1\" is not a number" },
        { "1 1", "\"1\", expected index:value" },
        { "1 :1", "index: empty, expected a number" },
        { "1 1:", "value of index 1: empty, expected a number" },
        { "1 1: 2", "value of index 1: empty" },
        { "1 1:nan", "value of index 1: \"nan\" is not a finite number" },
        { "1 0:1", "index 0, expected 1 to 3" },
        { "1 4:1", "index 4, expected 1 to 3" },
        { "1 2:1 2:1", "index 2, expected 3 to 3" },
        { "1 3:1 1:1", "index 1, expected 4 to 3" },
        { "1 1.5:1", "index: \"1.5\" is not a whole number" },
        { "1 1e99:1", "index: \"1e99\" is beyond 64 bits" },
        { "1 18446744073709551615:1", "index 18446744073709551615, expected 1 to 3" },
        { "1 -1:1", "index -1, expected 1 to 3" },
        { "1 1:1:1", "\"1:1\" is not a number" },
        { "1 qid:x 1:1", "qid: \"x\" is not a number" },
        { "1 qid:1.5 1:1", "qid: \"1.5\" is not a whole number" },
        { "1 qid:18446744073709551616 1:1", "qid: \"18446744073709551616\" is beyond 64 bits" },
        { "1 1:1 qid:2", "index: \"qid\" is not a number" },
    };
    pd_net *net = libsvm_net(3, false);
    (void)state;
    for (int i = 0; i < COUNT(bad); i++) {
        char content[200], place[] = "! data.txt:2: ";
        pd_reader *r;
        const char *got;
        snprintf(content, sizeof content, "0 1:1\n%s\n1 3:1\n", bad[i].line);
        write_text("data.txt", content);
        r = made(net, pd_libsvm_reader(net, "data.txt", NULL));
        got = read_pass(r, net, 0, 2);
        check_contains(got, "1 0 0|0\n! data.txt:2: ");
        check_contains(strstr(got, place) + strlen(place), bad[i].message);
        check_contains(got, "\n0 0 1|1\n");
        pd_reader_free(r);
    }
    pd_net_free(net);
}

/* Queries that differ in the last digit, in the sign, or beyond what int64_t holds. */
static void test_large_queries(void **state) {
    (void)state;
    expect_libsvm(0, true,
                  "1 qid:72048431380967004\n2 qid:72048431380967005\n3 qid:18446744073709551615\n"
                  "4 qid:18446744073709551614\n5 qid:1.8446744073709551614e19\n6 qid:-7\n7 qid:7\n8 qid:0\n9 qid:-0",
                  NULL, "0 0 0|1\n0 0 0|2\n0 0 0|3\n0 0 0,0 0 0|4,5\n0 0 0|6\n0 0 0|7\n0 0 0,0 0 0|8,9\n");
}

/* A bad line makes its whole query bad, and nothing else. */
static void test_bad_queries(void **state) {
    (void)state;
    expect_libsvm(0, true, "1 qid:1\n2 qid:2\nx qid:2 1:1\n4 qid:2\n5 qid:3\n", NULL,
                  "0 0 0|1\n! data.txt:3: label: \"x\" is not a number\n0 0 0|5\n");
    expect_libsvm(0, true, "1 qid:1\nx qid:2\n3 qid:2 1:1\n4 qid:2", NULL,
                  "0 0 0|1\n! data.txt:2: label: \"x\" is not a number\n");
    expect_libsvm(0, true, "1 qid:1\n2 1:1\n3 qid:1\n", NULL,
                  "0 0 0|1\n! data.txt:2: no qid behind the label\n0 0 0|3\n");
    expect_libsvm(0, true, "1 qid:\n2\n", NULL,
                  "! data.txt:1: qid: empty, expected a number\n! data.txt:2: no qid behind the label\n");
}

/* Samples are queries for options too: stepping over them needs no look inside. */
static void test_query_choice(void **state) {
    pd_reader_opts o = no_opts();
    (void)state;
    o.first = 1;
    o.folds = 2;
    expect_libsvm(0, true, "1 qid:1\n2 qid:1\n3 qid:2\n4 qid:3\n5 qid:3\n6 qid:4\n7 qid:5 1:1", &o,
                  "0 0 0,0 0 0|4,5\n1 0 0|7\n");
}

static void test_libsvm_refused(void **state) {
    pd_net *net = make_net(3, false, NULL), *mixed = pd_net_new(NULL), *swapped = pd_net_new(NULL);
    pd_reader_opts o = no_opts();
    (void)state;
    o.delimiter = ';';
    expect_none(net, pd_libsvm_reader(net, "data.txt", &o), PD_E_ARGUMENT, "libsvm reader: order, delimiter");
    pd_sequence(pd_vector(mixed, "x", 3));
    pd_label(mixed, "y", 2);
    expect_none(mixed, pd_libsvm_reader(mixed, "data.txt", NULL), PD_E_SHAPE, "both or none carry sequences");
    pd_vector(net, "z", 1);
    expect_none(net, pd_libsvm_reader(net, "data.txt", NULL), PD_E_SHAPE, "the net must have two inputs");
    pd_vector(swapped, "y", 1);
    pd_vector(swapped, "x", 2);
    write_text("data.txt", "7 1:1 2:2\n");
    expect(swapped, pd_libsvm_reader(swapped, "data.txt", NULL), "7|1 2\n");
    pd_net_free(net);
    pd_net_free(mixed);
    pd_net_free(swapped);
}

/* ---- vocabularies and text ---- */

static pd_vocab_opts no_vocab_opts(void) {
    pd_vocab_opts o;
    memset(&o, 0, sizeof o);
    return o;
}

static pd_vocab *made_vocab(pd_net *net, pd_vocab *v) {
    if (!v) fail_msg("no vocabulary: %s", pd_error(net));
    return v;
}

/* Builds one of a text as a file; the result is the words, one per line. Frees it. */
static void expect_vocab(const char *file, const pd_vocab_opts *o, const char *expected) {
    pd_net *net = pd_net_new(NULL);
    pd_vocab *v;
    write_text("words.txt", file);
    v = made_vocab(net, pd_vocab_build(net, "words.txt", o));
    assert_string_equal(pd_vocab_text(v), expected);
    for (int64_t i = 0; i < pd_vocab_size(v); i++) assert_int_equal(pd_vocab_id(v, pd_vocab_word(v, i)), i);
    assert_null(pd_vocab_word(v, -1));
    assert_null(pd_vocab_word(v, pd_vocab_size(v)));
    pd_vocab_free(v);
    pd_net_free(net);
}

/* The same must fail, and leave a failed net. */
static void expect_no_vocab(const char *file, const pd_vocab_opts *o, pd_status status, const char *message) {
    pd_net *net = pd_net_new(NULL);
    if (file) write_text("words.txt", file);
    assert_null(pd_vocab_build(net, file ? "words.txt" : "missing.txt", o));
    check_contains(pd_error(net), message);
    assert_int_equal(pd_error_status(net), status);
    assert_null(pd_ids(net, "x", pd_vocab_size(NULL))); /* whose message is not that of the sizes */
    check_contains(pd_error(net), message);
    pd_net_free(net);
}

#define SPECIALS "<unk>\n<s>\n</s>\n"

static void test_vocab_build(void **state) {
    static const char file[] = "b a  c\tb\r\n\n   \nb\vd\fa\xc3\xa9 <s>\nc"; /* b 3, c 2, a, aé and d 1 */
    pd_vocab_opts o = no_vocab_opts();
    (void)state;
    expect_vocab(file, NULL, SPECIALS "b\nc\na\na\xc3\xa9\nd\n");
    o.min_count = 2;
    expect_vocab(file, &o, SPECIALS "b\nc\n");
    o.min_count = 1;
    o.max_size = 6;
    expect_vocab(file, &o, SPECIALS "b\nc\na\n"); /* of equal counts the first in order of bytes */
    o.max_size = 3;
    expect_vocab(file, &o, SPECIALS);
    o = no_vocab_opts();
    o.unknown = "UNK", o.begin = "", o.end = "c";
    expect_vocab(file, &o, "UNK\nc\nb\n<s>\na\na\xc3\xa9\nd\n");
    o.unknown = o.end = "";
    expect_vocab("\xEF\xBB\xBFz y", &o, "y\nz\n");
    o.column = 2;
    expect_vocab("a b\tc d c\te\n\td\n\t\t", &o, "c\nd\n");
    o.characters = true;
    expect_vocab("x\tab \xe2\x82\xac"
                 "b\ty\r\nx\t\xf0\x9f\x98\x80\r\r\n",
                 &o, "b\n \na\n\xe2\x82\xac\n\xf0\x9f\x98\x80\n");
    o.column = 0;
    expect_vocab("ba\tb", &o, "b\na\n");
    o = no_vocab_opts();
    o.characters = true;
    expect_vocab("<s>s", &o, SPECIALS "s\n<\n>\n"); /* a special word is no character */
    write_text("more.txt", "b");
    write_text("words.list", "words.txt\nmore.txt\n");
    {
        pd_net *net = pd_net_new(NULL);
        pd_vocab *v;
        write_text("words.txt", "a a c\n");
        v = made_vocab(net, pd_vocab_build(net, "@words.list", NULL));
        assert_string_equal(pd_vocab_text(v), SPECIALS "a\nb\nc\n");
        assert_int_equal(pd_vocab_unknown(v), 0);
        assert_int_equal(pd_vocab_begin(v), 1);
        assert_int_equal(pd_vocab_end(v), 2);
        assert_int_equal(pd_vocab_id(v, "c"), 5);
        assert_int_equal(pd_vocab_id(v, "cc"), 0);
        assert_int_equal(pd_vocab_id(v, ""), 0);
        pd_vocab_free(v);
        pd_net_free(net);
    }
}

/* Against a plain count of random words, more than any table begins with. */
static void test_vocab_twin(void **state) {
    enum { WORDS = 700, LINES = 400 };
    static int counts[WORDS];
    static char expected[WORDS * 8];
    pd_net *net = pd_net_new(NULL);
    pd_vocab_opts o = no_vocab_opts();
    (void)state;
    o.unknown = o.begin = o.end = "";
    for (int seed = 0; seed < 4; seed++) {
        FILE *f = fopen("random.txt", "wb");
        pd_vocab *v;
        size_t n = 0;
        int most = 0, words = 0;
        random_seed((uint64_t)seed);
        memset(counts, 0, sizeof counts);
        for (int i = 0; i < LINES; i++)
            for (int64_t k = below(30); k >= 0; k--) {
                int word = (int)(uniform(0, 1) * uniform(0, 1) * WORDS);
                fprintf(f, "%x%c", word, k ? ' ' : '\n');
                if (++counts[word] > most) most = counts[word];
            }
        fclose(f);
        o.min_count = 1 + seed;
        o.max_size = seed == 3 ? 100 : 0;
        expected[0] = 0;
        for (int count = most; count >= o.min_count; count--) {
            char last[8] = "";
            for (int found = 1; found && (!o.max_size || words < o.max_size); words += found) { /* in order of bytes */
                char next[8] = "", name[8];
                for (int i = 0; i < WORDS; i++) {
                    snprintf(name, sizeof name, "%x", (unsigned)i);
                    if (counts[i] == count && strcmp(name, last) > 0 && (!next[0] || strcmp(name, next) < 0))
                        memcpy(next, name, sizeof next);
                }
                found = next[0] != 0;
                if (found) n += (size_t)snprintf(expected + n, sizeof expected - n, "%s\n", next);
                memcpy(last, next, sizeof last);
            }
        }
        v = made_vocab(net, pd_vocab_build(net, "random.txt", &o));
        if (strcmp(pd_vocab_text(v), expected) != 0) fail_msg("seed %d", seed);
        assert_int_equal(pd_vocab_size(v), words);
        assert_int_equal(pd_vocab_id(v, "ffff"), -1);
        pd_vocab_free(v);
    }
    pd_net_free(net);
}

static void test_vocab_refused(void **state) {
    pd_vocab_opts o = no_vocab_opts();
    (void)state;
    expect_no_vocab(NULL, NULL, PD_E_IO, "missing.txt: No such file");
    expect_no_vocab("", NULL, PD_E_FORMAT, "words.txt: no word that occurs 1 times");
    o.min_count = 3;
    expect_no_vocab("a a b", &o, PD_E_FORMAT, "words.txt: no word that occurs 3 times");
    o.min_count = -1;
    expect_no_vocab("a", &o, PD_E_ARGUMENT, "pd_vocab_build: column, min_count and max_size must not be negative");
    o = no_vocab_opts();
    o.column = 3;
    expect_no_vocab("a\tb\tc\na\tb\n", &o, PD_E_FORMAT, "words.txt:2: 2 columns, expected 3 or more");
    o = no_vocab_opts();
    o.max_size = 2;
    expect_no_vocab("a", &o, PD_E_ARGUMENT, "max_size has no room for the special words");
    o = no_vocab_opts();
    o.end = "<s>";
    expect_no_vocab("a", &o, PD_E_ARGUMENT, "two special words have the same name");
    o.end = "a\nb";
    expect_no_vocab("a", &o, PD_E_ARGUMENT, "special words are UTF-8, without tabs and ends of lines");
    o.end = "\xc3";
    expect_no_vocab("a", &o, PD_E_ARGUMENT, "special words are UTF-8");
    assert_null(pd_vocab_build(NULL, "words.txt", NULL));
    {
        pd_net *net = pd_net_new(NULL);
        assert_null(pd_vocab_build(net, NULL, NULL));
        check_contains(pd_error(net), "no path");
        pd_net_free(net);
    }
    pd_vocab_free(NULL);
    assert_null(pd_vocab_text(NULL));
    assert_null(pd_vocab_word(NULL, 0));
    assert_int_equal(pd_vocab_id(NULL, "a"), -1);
    assert_int_equal(pd_vocab_begin(NULL), -1);
}

static void test_vocab_parse(void **state) {
    static const struct {
        const char *text, *message;
        bool characters;
    } bad[] = {
        { NULL, "pd_vocab_parse: no text", false },
        { "", "pd_vocab_parse: there are no words", false },
        { "a\n\nb\n", "line 2: an empty line, expected a word", false },
        { "a\nb\n\n", "line 3: an empty line", false },
        { "a\nb c\n", "line 2: a word with white space in it", false },
        { " a\n", "line 1: a word with white space in it", false },
        { "a\nb\na\n", "line 3: a word that was there before", false },
        { "a\nb\na\xff\n", "line 3: not UTF-8", false },
        { "a\nbc\n", "line 2: expected one character", true },
        { "\t\n", "line 1: expected one character", true },
    };
    pd_vocab_opts o = no_vocab_opts();
    pd_net *net = pd_net_new(NULL);
    pd_vocab *v = made_vocab(net, pd_vocab_parse(net, "b\r\n</s>\na", NULL));
    (void)state;
    assert_string_equal(pd_vocab_text(v), "b\n</s>\na\n");
    assert_int_equal(pd_vocab_unknown(v), -1);
    assert_int_equal(pd_vocab_begin(v), -1);
    assert_int_equal(pd_vocab_end(v), 1);
    assert_int_equal(pd_vocab_id(v, "c"), -1);
    pd_vocab_free(v);
    o.characters = true;
    o.begin = "the begin";
    v = made_vocab(net, pd_vocab_parse(net, " \nthe begin\n\xe2\x82\xac\n", &o));
    assert_int_equal(pd_vocab_begin(v), 1);
    assert_string_equal(pd_vocab_word(v, 0), " ");
    pd_vocab_free(v);
    pd_net_free(net);
    for (int i = 0; i < COUNT(bad); i++) {
        o = no_vocab_opts();
        o.characters = bad[i].characters;
        net = pd_net_new(NULL);
        assert_null(pd_vocab_parse(net, bad[i].text, &o));
        check_contains(pd_error(net), bad[i].message);
        assert_int_equal(pd_error_status(net), bad[i].text ? PD_E_FORMAT : PD_E_ARGUMENT);
        pd_net_free(net);
    }
    net = pd_net_new(NULL);
    o.max_size = 5;
    assert_null(pd_vocab_parse(net, "a\n", &o));
    check_contains(pd_error(net), "column, min_count and max_size are options of pd_vocab_build");
    pd_net_free(net);
}

/* Into a model's file and out of it, before the net is built. */
static void test_vocab_in_a_file(void **state) {
    pd_vocab_opts o = no_vocab_opts();
    (void)state;
    for (int characters = 0; characters < 2; characters++) {
        pd_net *net = pd_net_new(NULL), *other = pd_net_new(NULL);
        pd_vocab *v, *w;
        o.characters = characters != 0;
        write_text("words.txt",
                   "\"quoted\" back\\slash \x01\x02 \xc3\xa9t\xc3\xa9 a/b a/b {\"x\":1}\n\xf0\x9f\x98\x80\n");
        v = made_vocab(net, pd_vocab_build(net, "words.txt", &o));
        pd_embedding(net, pd_ids(net, "words", pd_vocab_size(v)), 2, NULL);
        assert_int_equal(pd_net_set_text(net, "words", pd_vocab_text(v)), PD_OK);
        assert_int_equal(pd_save(net, "model"), PD_OK);
        assert_int_equal(pd_load(other, "model", NULL), PD_OK);
        w = made_vocab(other, pd_vocab_parse(other, pd_net_text(other, "words"), &o));
        pd_embedding(other, pd_ids(other, "words", pd_vocab_size(w)), 2, NULL);
        assert_int_equal(pd_load(other, "model", NULL), PD_OK);
        assert_int_equal(pd_vocab_size(w), pd_vocab_size(v));
        for (int64_t i = 0; i < pd_vocab_size(v); i++) assert_string_equal(pd_vocab_word(w, i), pd_vocab_word(v, i));
        assert_int_equal(pd_vocab_end(w), 2);
        pd_vocab_free(v);
        pd_vocab_free(w);
        pd_net_free(net);
        pd_net_free(other);
    }
}

/* Three inputs as a translator has them, over the words a b c of 3 to 5. */
static pd_net *translator(const pd_net_opts *opts, pd_vocab **v, pd_text_field fields[3]) {
    pd_net *net = pd_net_new(opts);
    memset(fields, 0, 3 * sizeof *fields);
    *v = net ? pd_vocab_parse(net, SPECIALS "a\nb\nc\n", NULL) : NULL;
    if (!*v) return net;
    pd_sequence(pd_ids(net, "source", 6));
    pd_sequence(pd_ids(net, "so far", 6));
    pd_sequence(pd_label(net, "next", 7));
    fields[0].vocab = fields[1].vocab = fields[2].vocab = *v;
    fields[0].end = fields[1].begin = fields[2].end = true;
    fields[2].column = 2;
    return net;
}

static void test_text(void **state) {
    pd_text_field fields[3];
    pd_vocab *v;
    pd_net *net = translator(NULL, &v, fields);
    pd_reader_opts o = no_opts();
    (void)state;
    write_text("pairs.tsv", "\xEF\xBB\xBF"
                            "a b c\tc b\r\n" /* a byte order mark, and an end of line from Windows */
                            "b \t\n"         /* an empty column */
                            "\n \t \r\n"     /* blank lines */
                            "\tc zz a\v \n"  /* an unknown word */
                            "a<s> <s>\tb");  /* a special word; no end of line */
    expect(net, pd_text_reader(net, "pairs.tsv", fields, 3, NULL),
           "3,4,5,2|1,5,4|5,4,2\n4,2|1|2\n2|1,5,0,3|5,0,3,2\n0,1,2|1,4|4,2\n");
    o.columns = 3;
    o.skip_lines = 1;
    write_text("pairs3.tsv", "heading\na\tb\tby somebody\n");
    write_text("pairs.list", "pairs3.tsv\npairs3.tsv\n");
    expect(net, pd_text_reader(net, "@pairs.list", fields, 3, &o), "3,2|1,4|4,2\n3,2|1,4|4,2\n");
    pd_vocab_free(v);
    pd_net_free(net);

    net = pd_net_new(NULL); /* lines of characters, predicted from those before */
    {
        pd_vocab_opts vo = no_vocab_opts();
        vo.characters = true;
        v = made_vocab(net, pd_vocab_parse(net, SPECIALS " \n\xc3\xa9\nx\n", &vo));
    }
    pd_sequence(pd_ids(net, "so far", 6));
    pd_sequence(pd_label(net, "next", 6));
    memset(fields, 0, sizeof fields);
    fields[0].vocab = fields[1].vocab = v;
    fields[0].column = fields[1].column = 1;
    fields[0].begin = fields[1].end = true;
    write_text("lines.txt", "x \xc3\xa9y\n\n  \nx");
    expect(net, pd_text_reader(net, "lines.txt", fields, 2, NULL), "1,5,3,4,0|5,3,4,0,2\n1,5|5,2\n");
    pd_vocab_free(v);
    pd_net_free(net);

    net = pd_net_new(NULL); /* a class by its name, one by its number, and numbers in a row */
    v = made_vocab(net, pd_vocab_parse(net, "no\nyes\n", NULL));
    pd_label(net, "class", 2);
    pd_label(net, "number", 4);
    pd_sequence(pd_ids(net, "row", 10));
    memset(fields, 0, sizeof fields);
    fields[0].vocab = v;
    write_text("classes.tsv", "yes\t3\t\nno\t 0 \t9 8 7\n");
    expect(net, pd_text_reader(net, "classes.tsv", fields, 3, NULL), "1|3|\n0|0|9,8,7\n");
    write_text("classes.tsv", "maybe\t3\t\nno no\t0\t1\nno\t4\t1\nno\t\t1\nno\t1.5\t1\nyes\t1\t1 10\nyes\t2\t1\n");
    expect(net, pd_text_reader(net, "classes.tsv", fields, 3, NULL),
           "! classes.tsv:1: column 1 (class): \"maybe\" is not in the vocabulary, which has no unknown word\n"
           "! classes.tsv:2: column 1 (class): 2 words, expected 1\n"
           "! classes.tsv:3: column 2 (number): 4 is not an id of 0 to 3\n"
           "! classes.tsv:4: column 2 (number): 0 words, expected 1\n"
           "! classes.tsv:5: column 2 (number): \"1.5\" is not a whole number\n"
           "! classes.tsv:6: column 3 (row): 10 is not an id of 0 to 9\n"
           "1|2|1\n");
    pd_vocab_free(v);
    pd_net_free(net);
}

static void test_text_malformed(void **state) {
    static const char *const bad[] = {
        "\xc0\x80",         /* two bytes for what takes one */
        "\xe0\x80\xaf",     /* three */
        "\xf0\x80\x80\xaf", /* four */
        "\xed\xa0\x80",     /* half of a UTF-16 pair */
        "\xf4\x90\x80\x80", /* beyond U+10FFFF */
        "\x80",
        "\xff", /* no beginnings */
        "\xc3",
        "\xe2\x82",
        "\xf0\x9f\x98", /* cut off */
    };
    pd_text_field fields[3];
    pd_vocab *v;
    pd_net *net = translator(NULL, &v, fields);
    pd_batch *b = pd_batch_new(net);
    (void)state;
    write_text("pairs.tsv", "a\tb\na\na\tb\tc\na\tb\n\ta\t\n\nb\ta");
    expect(net, pd_text_reader(net, "pairs.tsv", fields, 3, NULL),
           "3,2|1,4|4,2\n! pairs.tsv:2: 1 columns, expected 2\n! pairs.tsv:3: 3 columns, expected 2\n3,2|1,4|4,2\n"
           "! pairs.tsv:5: 3 columns, expected 2\n4,2|1,3|3,2\n");
    for (int i = 0; i < COUNT(bad); i++)
        for (int end = 0; end < 2; end++) { /* at the end of a line, and before other text */
            char file[64], message[80];
            snprintf(file, sizeof file, "a\tb\nb\xc3\xa9\tc%s%s\nc\tc\n", bad[i], end ? "" : "a");
            snprintf(message, sizeof message, "byte 6: 0x%02x, expected text in UTF-8",
                     (unsigned)(unsigned char)bad[i][0]);
            write_text("pairs.tsv", file);
            {
                char expected[160];
                snprintf(expected, sizeof expected, "3,2|1,4|4,2\n! pairs.tsv:2: %s\n5,2|1,5|5,2\n", message);
                expect(net, pd_text_reader(net, "pairs.tsv", fields, 3, NULL), expected);
            }
            expect_no_vocab(file, NULL, PD_E_FORMAT, "words.txt:2: byte 6: 0x");
            file[strlen(file) - 5] = 0;
            pd_batch_drop_sample(b);
            assert_int_equal(pd_batch_add_text(b, 0, v, file), PD_E_FORMAT);
            check_contains(b->error.text, "slot 0: byte 10: 0x");
            assert_int_equal(b->slots[0].rows, 0);
        }
    write_bytes("pairs.tsv", "a\0b\tc\na\tb\n", 10); /* a zero is no text */
    expect(net, pd_text_reader(net, "pairs.tsv", fields, 3, NULL),
           "! pairs.tsv:1: byte 2: 0x00, expected text in UTF-8\n3,2|1,4|4,2\n");
    pd_batch_free(b);
    pd_vocab_free(v);
    pd_net_free(net);
}

static void test_text_refused(void **state) {
    pd_text_field fields[3];
    pd_vocab *v, *bare;
    pd_net *net = translator(NULL, &v, fields);
    pd_reader_opts o = no_opts();
    (void)state;
    bare = made_vocab(net, pd_vocab_parse(net, "a\nb\n", NULL));
    write_text("pairs.tsv", "a\tb\n");
    expect_none(net, pd_text_reader(net, "missing.tsv", fields, 3, NULL), PD_E_IO, "missing.tsv: No such file");
    expect_none(net, pd_text_reader(net, "pairs.tsv", fields, 2, NULL), PD_E_ARGUMENT,
                "text reader: 2 fields, expected 3, one per input");
    expect_none(net, pd_text_reader(net, "pairs.tsv", NULL, 3, NULL), PD_E_ARGUMENT, "0 fields, expected 3");
    fields[1].vocab = bare;
    expect_none(net, pd_text_reader(net, "pairs.tsv", fields, 3, NULL), PD_E_ARGUMENT,
                "input \"so far\" has a vocabulary without that word, and can't get the begin");
    fields[1].vocab = NULL;
    expect_none(net, pd_text_reader(net, "pairs.tsv", fields, 3, NULL), PD_E_ARGUMENT,
                "input \"so far\" has no vocabulary, and can't get the begin");
    fields[1].vocab = v;
    fields[1].column = -1;
    expect_none(net, pd_text_reader(net, "pairs.tsv", fields, 3, NULL), PD_E_ARGUMENT, "input \"so far\": column -1");
    fields[1].column = 3;
    o.columns = 2;
    expect_none(net, pd_text_reader(net, "pairs.tsv", fields, 3, &o), PD_E_ARGUMENT,
                "lines of 2 columns, but a field reads column 3");
    fields[1].column = 0;
    o.columns = -1;
    expect_none(net, pd_text_reader(net, "pairs.tsv", fields, 3, &o), PD_E_ARGUMENT, "columns must be 0 or more");
    o.columns = 1;
    expect_none(net, pd_csv_reader(net, "pairs.tsv", &o), PD_E_ARGUMENT, "csv reader: columns is an option for text");
    for (int k = 0; k < 4; k++) {
        o = no_opts();
        if (k == 0) o.order = "so far";
        if (k == 1) o.delimiter = ';';
        if (k == 2) o.scale = 2;
        if (k == 3) o.shift = 1;
        expect_none(net, pd_text_reader(net, "pairs.tsv", fields, 3, &o), PD_E_ARGUMENT,
                    "order, delimiter, scale and shift are no options for text");
    }
    pd_vocab_free(v);
    pd_vocab_free(bare);
    pd_net_free(net);

    net = pd_net_new(NULL);
    v = made_vocab(net, pd_vocab_parse(net, SPECIALS "a\n", NULL));
    pd_label(net, "kind", 3);
    pd_vector(net, "x", 1);
    memset(fields, 0, sizeof fields);
    expect_none(net, pd_text_reader(net, "pairs.tsv", fields, 2, NULL), PD_E_SHAPE, "input \"x\" takes no ids");
    fields[0].vocab = v;
    expect_none(net, pd_text_reader(net, "pairs.tsv", fields, 2, NULL), PD_E_SHAPE,
                "input \"kind\" takes 3 ids, but its vocabulary has 4");
    pd_vocab_free(v);
    v = made_vocab(net, pd_vocab_parse(net, "</s>\na\n", NULL));
    fields[0].vocab = v;
    fields[0].end = true;
    expect_none(net, pd_text_reader(net, "pairs.tsv", fields, 2, NULL), PD_E_ARGUMENT,
                "input \"kind\" has no sequences, and can't get the end");
    pd_vocab_free(v);
    pd_net_free(net);
}

/* Samples of two ids: what the options and shards leave, skipped or not, shuffled and read ahead. */
static void test_text_choices(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_text_field field;
    pd_reader_opts o = no_opts();
    FILE *f = fopen("many.txt", "wb");
    (void)state;
    memset(&field, 0, sizeof field);
    pd_sequence(pd_ids(net, "x", MANY));
    for (int i = 0; i < MANY; i++) fprintf(f, "%d %d\n%s", i, i, i % 5 ? "" : "\n");
    fclose(f);
    o.first = 4, o.folds = 3, o.fold = 1, o.not_fold = true;
    for (int rank = 0; rank < 2; rank++)
        for (int skipped = 0; skipped < 12; skipped++) {
            pd_reader *r = made(net, pd_text_reader(net, "many.txt", &field, 1, &o));
            text got, expected;
            int chosen = 0;
            got.n = expected.n = 0;
            got.s[0] = expected.s[0] = 0;
            for (int i = 4; i < MANY; i++)
                if (i % 3 != 1 && chosen++ % 2 == rank && chosen > 2 * skipped) say(&expected, "%d,%d\n", i, i);
            assert_int_equal(pd_reader_shard(r, rank, 2), PD_OK);
            assert_int_equal(r->skip(r, skipped), PD_OK);
            read_rest(r, net, 3, &got);
            assert_string_equal(got.s, expected.s);
            pd_reader_free(r);
        }
    {
        pd_reader *a = pd_shuffle(net, pd_text_reader(net, "many.txt", &field, 1, NULL), 10, 3);
        pd_reader *b = pd_prefetch(net, pd_shuffle(net, pd_text_reader(net, "many.txt", &field, 1, NULL), 10, 3), 2);
        const char *first = read_pass(made(net, a), net, 1, 4);
        assert_string_equal(read_pass(made(net, b), net, 1, 3), first);
        assert_string_not_equal(read_pass(b, net, 2, 3), first);
        assert_string_equal(read_pass(b, net, 1, 5), first);
        pd_reader_free(a);
        pd_reader_free(b);
    }
    pd_net_free(net);
}

static void test_add_text(void **state) {
    pd_text_field fields[3];
    pd_vocab *v, *bare;
    pd_net *net = translator(NULL, &v, fields);
    pd_batch *b = pd_batch_new(net);
    (void)state;
    bare = made_vocab(net, pd_vocab_parse(net, "a\nb\n", NULL));
    assert_int_equal(pd_batch_add_text(b, 0, v, " c b\tzz\n"), PD_OK);
    assert_int_equal(pd_batch_add_id(b, 0, pd_vocab_end(v)), PD_OK);
    assert_int_equal(pd_batch_add_text(b, 1, v, ""), PD_OK);
    assert_int_equal(pd_batch_add_text(b, 2, bare, "b a"), PD_OK);
    assert_int_equal(pd_batch_end_sample(b), PD_OK);
    assert_string_equal(batch_text(b), "5,4,0,2||1,0\n");
    expect_batch_failure(b, pd_batch_add_text(b, 2, bare, "b zz"), PD_E_FORMAT,
                         "slot 2: \"zz\" is not in the vocabulary");
    pd_batch_drop_sample(b);
    expect_batch_failure(b, pd_batch_add_text(b, 3, v, "a"), PD_E_ARGUMENT, "slot 3 is not an input of ids");
    expect_batch_failure(b, pd_batch_add_text(b, 0, NULL, "a"), PD_E_ARGUMENT, "slot 0: no vocabulary");
    expect_batch_failure(b, pd_batch_add_text(b, 0, v, NULL), PD_E_ARGUMENT, "slot 0: no text");
    assert_int_equal(pd_batch_add_text(NULL, 0, v, "a"), PD_E_ARGUMENT);
    pd_vocab_free(v);
    pd_vocab_free(bare);
    pd_batch_free(b);
    pd_net_free(net);
}

/* ---- streams ---- */

/* What the function does in its calls, a letter each: g good, e ends the pass, b bad id, n nothing added, f fails,
   s ends the sample itself, c clears the batch. */
static pd_status scripted_next(void *user, pd_batch *b) {
    const char **script = (const char **)user;
    char what = **script ? *(*script)++ : 'e';
    pd_real *row = what == 'n' ? NULL : pd_batch_add_row(b, 0);
    if (row) row[0] = row[1] = row[2] = 1;
    if (what == 'b') return pd_batch_add_id(b, 1, 9);
    if (what != 'n') pd_batch_add_id(b, 1, 2);
    if (what == 's') pd_batch_end_sample(b);
    if (what == 'c') pd_batch_clear(b);
    return what == 'e' ? PD_END : what == 'f' ? PD_E_IO : PD_OK;
}

static void test_stream(void **state) {
    static const char *const messages = "1 1 1|2\n"
                                        "! stream reader: sample 1: input \"label\": id 9, expected 0 to 3\n"
                                        "1 1 1|2\n"
                                        "! sample 1 of the batch: no input got a row\n"
                                        "! stream reader: sample 4: file could not be read or written\n"
                                        "! stream reader: sample 5: the function ended the sample itself\n"
                                        "1 1 1|2\n";
    pd_net *net = make_net(3, false, NULL);
    const char *script = "gegg";
    pd_reader *r = made(net, pd_stream_reader(net, scripted_next, NULL, &script));
    (void)state;
    assert_string_equal(read_pass(r, net, 0, 2), "1 1 1|2\n");
    assert_string_equal(read_pass(r, net, 1, 3), "1 1 1|2\n1 1 1|2\n"); /* goes on */
    script = "gbgnfsg";
    assert_string_equal(read_pass(r, net, 2, 1), messages);
    script = "c";
    assert_string_equal(read_pass(r, net, 2, 1), "! sample 1 of the batch: no input got a row\n");
    pd_reader_free(r);
    expect_none(net, pd_stream_reader(net, NULL, stream_reset, NULL), PD_E_ARGUMENT,
                "stream reader: no function given");
    pd_net_free(net);
}

/* A pass that stopped half-way, or that was never begun, is begun by the next reset, or by the first sample. */
static void test_stream_reset(void **state) {
    pd_net *net = make_net(3, false, NULL);
    pd_reader *r = made(net, open_stream_again(net, NULL)), *outer;
    pd_batch *b = pd_batch_new(net);
    pd_reader_opts all = no_opts();
    int64_t count;
    const char *expected = expected_samples(&all, 0, 1, &count);
    (void)state;
    assert_int_equal(r->next(r, b, 7), PD_OK);
    assert_true(b->slots[0].data[18] == 6);
    assert_string_equal(read_pass(r, net, 0, 5), expected);
    pd_batch_clear(b);
    assert_int_equal(r->next(r, b, 1), PD_END);
    assert_int_equal(r->reset(r, 99), PD_E_IO);
    assert_string_equal(r->error.text, "stream reader: pass 99 could not be begun: file could not be read or written");
    assert_int_equal(r->next(r, b, 1), PD_E_IO); /* it tries that pass again */
    assert_int_equal(r->reset(r, 0), PD_OK);
    assert_int_equal(r->next(r, b, 1), PD_OK);
    assert_true(b->slots[0].data[0] == 0);
    outer = made(net, pd_prefetch(net, pd_shuffle(net, r, 1, 1), 2));
    for (int64_t pass = 0; pass < 3; pass++) assert_string_equal(read_pass(outer, net, pass, 5), expected);
    pd_batch_free(b);
    pd_reader_free(outer);
    pd_net_free(net);
}

/* ---- readers of a user's own, with no more than they must have, or with some ---- */

typedef struct counter {
    pd_reader reader;
    int64_t at, count;
    int freed;
} counter;

/* Sample i is "i i i|i % 4"; every 13th fails, and leaves no message. */
static pd_status counter_next(pd_reader *r, pd_batch *b, int64_t count) {
    counter *c = (counter *)r->self;
    while (count-- > 0) {
        pd_real *row;
        if (c->at == c->count) return PD_END;
        if (++c->at % 13 == 0) return PD_E_FORMAT;
        row = pd_batch_add_row(b, 0);
        if (!row || pd_batch_add_id(b, 1, c->at % 4) != PD_OK) return PD_E_MEMORY;
        row[0] = row[1] = row[2] = (pd_real)c->at;
        if (pd_batch_end_sample(b) != PD_OK) return PD_E_MEMORY;
    }
    return PD_OK;
}
static pd_status counter_reset(pd_reader *r, int64_t pass) {
    ((counter *)r->self)->at = 0;
    return pass == 99 ? PD_E_IO : PD_OK;
}
static void counter_free(pd_reader *r) { ((counter *)r->self)->freed++; }

static pd_reader *start_counter(counter *c, int64_t count) {
    memset(c, 0, sizeof *c);
    c->count = count;
    c->reader.api_version = PD_API_VERSION;
    c->reader.name = "counter";
    c->reader.self = c;
    c->reader.next = counter_next;
    c->reader.reset = counter_reset;
    c->reader.free = counter_free;
    return &c->reader;
}

static void test_own_reader(void **state) {
    pd_net *net = make_net(3, false, NULL);
    counter c;
    pd_reader *r;
    text t;
    (void)state;
    for (int depth = 0; depth <= 3; depth++) {
        pd_reader *own = start_counter(&c, 30);
        r = made(net, depth ? pd_prefetch(net, own, depth) : pd_shuffle(net, own, 1, 0));
        check_contains(read_pass(r, net, 0, 5), "12 12 12|0\n! counter reader: malformed data\n14 14 14|2\n");
        assert_int_equal(r->size(r), -1);
        assert_int_equal(pd_reader_shard(r, 0, 2), PD_E_UNSUPPORTED);
        check_contains(r->error.text, "counter reader: it can't be split into shards");
        assert_int_equal(r->reset(r, 99), PD_E_IO);
        assert_int_equal(r->reset(r, 0), PD_OK);
        assert_int_equal(r->skip(r, 8), PD_OK);
        t.n = 0;
        read_rest(r, net, 3, &t);
        check_contains(t.s, "9 9 9|1\n10 10 10|2\n11 11 11|3\n12 12 12|0\n! ");
        assert_int_equal(t.s[0], '9');
        assert_int_equal(r->reset(r, 0), PD_OK);
        assert_int_equal(r->skip(r, 20), PD_E_FORMAT); /* the bad one on the way */
        pd_reader_free(r);
        assert_int_equal(c.freed, 1);
    }
    assert_null(pd_shuffle(net, start_counter(&c, 1), 0, 1));
    check_contains(pd_error(net), "pd_shuffle: the pool is 0, expected 1 or more");
    assert_int_equal(c.freed, 1);
    assert_null(pd_prefetch(net, start_counter(&c, 1), 0));
    check_contains(pd_error(net), "pd_prefetch: depth is 0, expected 1 or more");
    assert_int_equal(c.freed, 1);
    assert_null(pd_prefetch(NULL, start_counter(&c, 1), 1));
    assert_int_equal(c.freed, 1);
    pd_net_free(net);
}

/* ---- shuffling ---- */

/* The samples' numbers in the order in which they come. */
static int64_t read_order(pd_reader *r, pd_net *net, int64_t pass, int64_t count, int64_t *order) {
    pd_batch *b = pd_batch_new(net);
    pd_status status = r->reset(r, pass);
    int64_t n = 0;
    while (status == PD_OK) {
        pd_batch_clear(b);
        status = r->next(r, b, count);
        for (int64_t i = 0; i < b->samples; i++) {
            assert_true(n < MANY);
            order[n++] = (int64_t)b->slots[0].data[3 * i];
            assert_int_equal(b->slots[1].ids[i], order[n - 1] % 4);
        }
    }
    assert_int_equal(status, PD_END);
    pd_batch_free(b);
    return n;
}

static void test_shuffle(void **state) {
    static const int64_t pools[] = { 1, 2, 3, 10, 40, 52, 53, 54, INT64_MAX };
    pd_net *net = make_net(3, false, NULL);
    (void)state;
    for (int p = 0; p < COUNT(pools); p++) {
        pd_reader *r = made(net, pd_shuffle(net, open_array(net, NULL), pools[p], 7));
        pd_reader *same = made(net, pd_shuffle(net, open_array(net, NULL), pools[p], 7));
        pd_reader *other = made(net, pd_shuffle(net, open_array(net, NULL), pools[p], 8));
        int64_t a[MANY], b[MANY], c[MANY], d[MANY];
        bool seen[MANY] = { false };
        assert_int_equal(r->size(r), MANY);
        assert_int_equal(read_order(r, net, 3, 8, a), MANY);
        assert_int_equal(read_order(same, net, 3, 5, b), MANY);
        assert_int_equal(read_order(other, net, 3, 8, c), MANY);
        assert_int_equal(read_order(same, net, 4, 8, d), MANY);
        assert_memory_equal(a, b, sizeof a);
        if (pools[p] > 2) assert_memory_not_equal(a, c, sizeof a);
        if (pools[p] > 2) assert_memory_not_equal(a, d, sizeof a);
        for (int i = 0; i < MANY; i++) {
            assert_false(seen[a[i]]);
            seen[a[i]] = true;
            assert_true(a[i] - i < pools[p]); /* no sample comes before the pool can have it */
            if (pools[p] == 1) assert_int_equal(a[i], i);
        }
        pd_reader_free(r);
        pd_reader_free(same);
        pd_reader_free(other);
    }
    pd_net_free(net);
}

/* Every sample is as likely in every place when the pool holds them all: chi-square of 10 x 10 counts, 81 degrees of
   freedom, which is below 130 in all but one of a thousand cases. */
static void test_shuffle_uniform(void **state) {
    enum { N = 10, PASSES = 2000 };
    pd_net *net = make_net(3, false, NULL);
    int64_t order[MANY], counts[N][N] = { { 0 } };
    double chi = 0;
    pd_array arrays[2];
    pd_reader *r;
    (void)state;
    pd_reader_free(open_array(net, NULL)); /* fills in the numbers */
    memset(arrays, 0, sizeof arrays);
    arrays[0].data = many_numbers;
    arrays[1].ids = many_ids;
    r = made(net, pd_shuffle(net, pd_array_reader(net, N, arrays, 2), N, 5));
    for (int pass = 0; pass < PASSES; pass++) {
        assert_int_equal(read_order(r, net, pass, 4, order), N);
        for (int i = 0; i < N; i++) counts[i][order[i]]++;
    }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) chi += pow((double)counts[i][j] - PASSES / N, 2) / (PASSES / N);
    if (!(chi < 130)) fail_msg("chi-square %g", chi);
    pd_reader_free(r);
    pd_net_free(net);
}

static void test_shuffle_skip(void **state) {
    pd_net *net = make_net(3, false, NULL);
    (void)state;
    for (int64_t pool = 1; pool <= 60; pool += 7) {
        pd_reader *r = made(net, pd_shuffle(net, open_array(net, NULL), pool, 7));
        text all, rest;
        for (int skipped = 0; skipped <= MANY + 1; skipped += 6) {
            const char *expected = all.s;
            all.n = rest.n = 0;
            assert_int_equal(r->reset(r, 2), PD_OK);
            read_rest(r, net, 7, &all);
            assert_int_equal(r->reset(r, 2), PD_OK);
            assert_int_equal(r->skip(r, skipped), skipped > MANY ? PD_END : PD_OK);
            rest.s[0] = 0;
            read_rest(r, net, 4, &rest);
            for (int i = 0; i < skipped && *expected; i++) expected = strchr(expected, '\n') + 1;
            assert_string_equal(rest.s, expected);
        }
        pd_reader_free(r);
    }
    pd_net_free(net);
}

/* Sequences of different lengths go through the pool unharmed, while it is tidied again and again. */
static void test_shuffle_sequences(void **state) {
    enum { N = 300 };
    pd_net *net = libsvm_net(0, true);
    FILE *f = fopen("data.txt", "wb");
    pd_reader *r;
    pd_batch *b;
    int64_t seen = 0;
    (void)state;
    for (int q = 0; q < N; q++)
        for (int k = 0; k <= q % 5; k++) fprintf(f, "%d qid:%d 1:%d 2:%d\n", k, q, q, k);
    fclose(f);
    r = made(net, pd_shuffle(net, pd_libsvm_reader(net, "data.txt", NULL), 17, 3));
    b = pd_batch_new(net);
    assert_int_equal(r->next(r, b, N + 1), PD_END);
    assert_int_equal(b->samples, N);
    for (int i = 0; i < N; i++) {
        int64_t first = b->slots[0].starts[i], n = b->slots[0].starts[i + 1] - first, q;
        assert_true(n > 0);
        q = (int64_t)b->slots[0].data[3 * first];
        assert_int_equal(n, q % 5 + 1);
        assert_int_equal(b->slots[1].starts[i], first);
        for (int64_t k = 0; k < n; k++) {
            assert_true(b->slots[0].data[3 * (first + k) + 1] == (pd_real)k &&
                        b->slots[1].data[first + k] == (pd_real)k);
            assert_true(b->slots[0].data[3 * (first + k)] == (pd_real)q);
        }
        seen += q;
    }
    assert_int_equal(seen, N * (N - 1) / 2);
    pd_batch_free(b);
    pd_reader_free(r);
    pd_net_free(net);
}

/* Bad samples are told, and lose nothing but themselves. */
static void test_shuffle_errors(void **state) {
    pd_net *net = make_net(3, false, NULL);
    counter c;
    (void)state;
    for (int64_t pool = 1; pool < 40; pool += 6) {
        pd_reader *r = made(net, pd_shuffle(net, start_counter(&c, 30), pool, 1));
        const char *got = read_pass(r, net, 0, 4);
        int samples = 0, errors = 0;
        for (; *got; got = strchr(got, '\n') + 1) *got == '!' ? errors++ : samples++;
        assert_int_equal(samples, 28);
        assert_int_equal(errors, 2);
        pd_reader_free(r);
    }
    pd_net_free(net);
}

/* The shards of a shuffled reader share out all samples. */
static void test_shuffle_shards(void **state) {
    pd_net *net = make_net(3, false, NULL);
    int64_t order[MANY], n = 0;
    bool seen[MANY] = { false };
    (void)state;
    for (int rank = 0; rank < 3; rank++) {
        pd_reader *r = made(net, pd_prefetch(net, pd_shuffle(net, open_array(net, NULL), 10, 1), 2));
        int64_t size;
        assert_int_equal(pd_reader_shard(r, rank, 3), PD_OK);
        size = read_order(r, net, 0, 4, order);
        assert_int_equal(r->size(r), size);
        for (int64_t i = 0; i < size; i++, n++) {
            assert_int_equal(order[i] % 3, rank);
            assert_false(seen[order[i]]);
            seen[order[i]] = true;
        }
        pd_reader_free(r);
    }
    assert_int_equal(n, MANY);
    pd_net_free(net);
}

/* ---- reading ahead ---- */

static void test_prefetch(void **state) {
    static const int depths[] = { 1, 3 };
    pd_net *net = make_net(3, false, NULL);
    (void)state;
    write_many();
    for (int source = 0; source < COUNT(sources); source++)
        for (int d = 0; d < 2; d++) {
            pd_reader *r = made(net, pd_prefetch(net, sources[source].open(net, NULL), depths[d]));
            int64_t count;
            pd_reader_opts o = no_opts();
            const char *expected = expected_samples(&o, 0, 1, &count);
            for (int64_t n = 0; n <= MANY + 1; n += n < 8 ? 1 : 15)
                assert_string_equal(read_pass(r, net, n, n), expected); /* n = 0: batches of 1, 2, 3 .. */
            assert_int_equal(r->size(r), sources[source].sized ? MANY : -1);
            pd_reader_free(r);
        }
    pd_net_free(net);
}

/* Skipping, sharding, resetting and freeing while the thread reads. */
static void test_prefetch_interrupted(void **state) {
    pd_net *net = make_net(3, false, NULL);
    pd_batch *b = pd_batch_new(net);
    pd_reader_opts o = no_opts();
    (void)state;
    write_many();
    for (int turn = 0; turn < 60; turn++) {
        pd_reader *r = made(net, pd_prefetch(net, open_csv(net, NULL), 1 + turn % 3));
        int64_t count, taken = turn % 7, skipped = turn % 11, batch = 1 + turn % 4;
        const char *expected = expected_samples(&o, 0, 1, &count);
        text rest;
        rest.n = 0;
        pd_batch_clear(b);
        if (turn % 5 == 0) assert_int_equal(pd_reader_shard(r, 0, 1), PD_OK);
        for (int64_t i = 0; i < taken; i++) assert_int_equal(r->next(r, b, batch), PD_OK);
        assert_int_equal(r->skip(r, skipped), PD_OK);
        if (turn % 2) assert_int_equal(r->skip(r, skipped), PD_OK);
        if (turn % 13 == 12) {
            pd_reader_free(r);
            continue;
        }
        read_rest(r, net, 3, &rest);
        for (int64_t i = 0; i < taken * batch + skipped * (1 + turn % 2); i++) expected = strchr(expected, '\n') + 1;
        assert_string_equal(rest.s, expected);
        assert_int_equal(r->next(r, b, 1), PD_END);
        assert_int_equal(r->skip(r, 1), PD_END);
        assert_int_equal(r->reset(r, 1), PD_OK);
        assert_int_equal(r->skip(r, MANY), PD_OK);
        assert_int_equal(r->next(r, b, 1), PD_END);
        assert_int_equal(r->reset(r, 2), PD_OK);
        assert_int_equal(r->next(r, b, 2), PD_OK);
        assert_int_equal(r->skip(r, MANY), PD_END);
        pd_reader_free(r);
    }
    pd_batch_free(b);
    pd_net_free(net);
}

/* Every error comes after the samples before it, once, and reading goes on. */
static void test_prefetch_errors(void **state) {
    const char *const expected =
        "1 1 1|1\n! data.csv:2: column 1 (x): \"a\" is not a number\n2 2 2|2\n3 3 3|3\n"
        "! data.csv:5: 2 columns, expected 4\n! data.csv:6: column 3 (x): \"b\" is not a number\n4 4 4|0\n";
    pd_net *net = make_net(3, false, NULL);
    (void)state;
    write_text("data.csv", "1,1,1,1\na,2,2,2\n2,2,2,2\n3,3,3,3\n1,2\n1,1,b,1\n4,4,4,0\n");
    for (int depth = 1; depth <= 3; depth++)
        expect(net, pd_prefetch(net, pd_prefetch(net, pd_csv_reader(net, "data.csv", NULL), depth), 4 - depth),
               expected);
    pd_net_free(net);
}

/* ---- memory ---- */

/* Several threads take memory at the same time. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *locked_alloc(void *user, size_t size, size_t align) {
    void *memory;
    pthread_mutex_lock(&lock);
    memory = failing_alloc(user, size, align);
    pthread_mutex_unlock(&lock);
    return memory;
}
static void locked_free(void *user, void *memory, size_t size) {
    pthread_mutex_lock(&lock);
    failing_free(user, memory, size);
    pthread_mutex_unlock(&lock);
}
static pd_net *counted_net(failing_allocator *f, bool sequences) {
    pd_net_opts o;
    memset(&o, 0, sizeof o);
    memset(f, 0, sizeof *f);
    f->fail_at = -1;
    o.allocator.alloc = locked_alloc;
    o.allocator.free = locked_free;
    o.allocator.user = f;
    return make_net(3, sequences, &o);
}
static int64_t calls_of(failing_allocator *f) {
    int64_t calls;
    pthread_mutex_lock(&lock);
    calls = f->calls;
    pthread_mutex_unlock(&lock);
    return calls;
}

static pd_reader *open_listed_csv(pd_net *net, const pd_reader_opts *o) {
    write_text("csv.list", "many.csv\nlong.csv\n");
    return pd_csv_reader(net, "@csv.list", o);
}
static pd_reader *open_queries(pd_net *net, const pd_reader_opts *o) { return pd_libsvm_reader(net, "queries.txt", o); }
static pd_reader *open_sequences(pd_net *net, const pd_reader_opts *o) {
    static const int64_t starts[] = { 0, 3, 3, 4, 9 };
    pd_array arrays[2];
    (void)o;
    pd_reader_free(open_array(net, NULL));
    memset(arrays, 0, sizeof arrays);
    arrays[0].data = many_numbers;
    arrays[1].ids = many_ids;
    arrays[0].starts = arrays[1].starts = starts;
    return pd_array_reader(net, 4, arrays, 2);
}
static pd_reader *open_shuffle(pd_net *net, const pd_reader_opts *o) { return pd_shuffle(net, open_idx(net, o), 9, 1); }
static pd_reader *open_shuffled_sequences(pd_net *net, const pd_reader_opts *o) {
    return pd_shuffle(net, open_sequences(net, o), 2, 1);
}
static pd_reader *open_prefetch(pd_net *net, const pd_reader_opts *o) {
    return pd_prefetch(net, pd_shuffle(net, open_csv(net, o), 9, 1), 3);
}

static const struct {
    open_source open;
    bool sequences;
} all_readers[] = {
    { open_csv, false },
    { open_listed_csv, false },
    { open_libsvm, false },
    { open_idx, false },
    { open_npy, false },
    { open_array, false },
    { open_stream, false },
    { open_queries, true },
    { open_sequences, true },
    { open_shuffle, false },
    { open_shuffled_sequences, true },
    { open_prefetch, false },
};

static void write_all(void) {
    FILE *f = fopen("long.csv", "wb");
    write_many();
    fprintf(f, "1,2,%100000d,3\n4,5,6,0\n", 7); /* a line that the buffer must grow for */
    fclose(f);
    f = fopen("queries.txt", "wb");
    for (int i = 0; i < 40; i++) fprintf(f, "%d qid:%d 1:1\n", i % 4, i / 3);
    fclose(f);
}

/* Reads all, past failures of memory, of which at least one must be told unless it did no harm. */
static void read_all_past_failures(pd_reader *r, pd_net *net) {
    pd_batch *b = pd_batch_new(net);
    pd_status status = PD_OK;
    if (!b) return;
    for (int i = 0; status != PD_END; i++) {
        pd_batch_clear(b);
        status = r->next(r, b, 5);
        assert_true(status == PD_OK || status == PD_END || status == PD_E_MEMORY);
        if (status == PD_E_MEMORY) check_contains(r->error.text, "out of memory");
        for (int k = 0; k < b->slot_count; k++) {
            const pd_slot *s = &b->slots[k];
            assert_int_equal(s->rows, s->sequence ? s->starts[b->samples] : b->samples);
        }
        assert_true(i < 1000);
    }
    pd_batch_free(b);
}

static void test_out_of_memory(void **state) {
    (void)state;
    write_all();
    for (int k = 0; k < COUNT(all_readers); k++) {
        failing_allocator f;
        pd_net *net = counted_net(&f, all_readers[k].sequences);
        int64_t before = f.in_use, total = 1;
        for (int64_t n = -1; n < total; n++) {
            pd_reader *r;
            f.calls = 0;
            f.fail_at = n;
            streamed = 0;
            r = all_readers[k].open(net, NULL);
            if (r) {
                read_all_past_failures(r, net);
                assert_int_equal(r->reset(r, 1), PD_OK);
                streamed = 0;
                read_all_past_failures(r, net);
                pd_reader_free(r);
            } else {
                assert_int_equal(pd_error_status(net), PD_E_MEMORY);
                check_contains(pd_error(net), "out of memory");
            }
            if (n < 0) total = f.calls;
            assert_int_equal(f.in_use, before);
        }
        f.fail_at = -1;
        pd_net_free(net);
        assert_int_equal(f.in_use, 0);
    }
}

/* Vocabularies and the reader of text, with a net of their own each time, since a vocabulary that fails leaves a failed
   net. */
static void test_text_out_of_memory(void **state) {
    int failures = 0;
    FILE *f = fopen("words.txt", "wb");
    (void)state;
    for (int i = 0; i < 200; i++)
        fprintf(f, "w%d w%d\tx%0*d\n", i, i / 2, i == 150 ? 70000 : 1, i); /* and a long line */
    fclose(f);
    for (int64_t fail_at = 0, done = 0; !done; fail_at++) {
        failing_allocator fa;
        pd_net_opts o;
        pd_net *net;
        pd_vocab *v = NULL, *w = NULL;
        pd_text_field fields[2];
        pd_reader *r = NULL;
        memset(&o, 0, sizeof o);
        memset(&fa, 0, sizeof fa);
        memset(fields, 0, sizeof fields);
        fa.fail_at = -1;
        o.allocator.alloc = failing_alloc;
        o.allocator.free = failing_free;
        o.allocator.user = &fa;
        net = pd_net_new(&o);
        fa.calls = 0;
        fa.fail_at = fail_at;
        v = pd_vocab_build(net, "words.txt", NULL);
        if (v) w = pd_vocab_parse(net, pd_vocab_text(v), NULL);
        if (w) pd_sequence(pd_ids(net, "x", pd_vocab_size(w)));
        if (w) pd_sequence(pd_ids(net, "y", pd_vocab_size(w)));
        fields[0].vocab = fields[1].vocab = w;
        fields[0].begin = fields[1].end = true;
        if (pd_error_status(net) == PD_OK) r = pd_text_reader(net, "words.txt", fields, 2, NULL);
        if (r) {
            read_all_past_failures(r, net);
            done = fa.calls <= fail_at;
        } else {
            assert_int_equal(pd_error_status(net), PD_E_MEMORY);
            check_contains(pd_error(net), "out of memory");
            failures++;
        }
        pd_reader_free(r);
        pd_vocab_free(w);
        pd_vocab_free(v);
        pd_net_free(net);
        assert_int_equal(fa.in_use, 0);
    }
    assert_true(failures > 40);
}

/* A line that there is no memory for is passed over, and the next one read. */
static void test_line_out_of_memory(void **state) {
    failing_allocator f;
    pd_net *net = counted_net(&f, false);
    pd_reader *r;
    (void)state;
    write_all();
    r = made(net, pd_csv_reader(net, "long.csv", NULL));
    f.calls = 0;
    f.fail_at = 4; /* after the batch: itself, its slots; then the buffer */
    for (f.fail_at = 0; f.fail_at < 20; f.fail_at++) {
        pd_batch *b;
        int64_t fail_at = f.fail_at;
        f.fail_at = -1;
        b = pd_batch_new(net);
        assert_int_equal(r->reset(r, 0), PD_OK);
        f.fail_at = fail_at;
        f.calls = 0;
        if (r->next(r, b, 1) == PD_E_MEMORY && strstr(r->error.text, "for a line")) {
            assert_string_equal(r->error.text, "long.csv:1: out of memory for a line");
            assert_int_equal(r->next(r, b, 1), PD_OK);
            assert_true(b->slots[0].data[0] == 4 && b->slots[1].ids[0] == 0);
            pd_batch_free(b);
            break;
        }
        pd_batch_free(b);
    }
    assert_true(f.fail_at < 20);
    f.fail_at = -1;
    pd_reader_free(r);
    pd_net_free(net);
}

/* After the first passes nothing takes memory any more. */
static void test_steady_memory(void **state) {
    (void)state;
    write_all();
    for (int k = 0; k < COUNT(all_readers); k++) {
        failing_allocator f;
        pd_net *net = counted_net(&f, all_readers[k].sequences);
        pd_reader *r = made(net, all_readers[k].open(net, NULL));
        pd_batch *b = pd_batch_new(net);
        int64_t calls = 0;
        for (int pass = 0; pass < 12; pass++) {
            pd_status status = r->reset(r, pass % 2);
            streamed = 0;
            if (pass == 8) calls = calls_of(&f); /* by then every batch of a ring has been everywhere */
            while (status == PD_OK) {
                pd_batch_clear(b);
                status = r->next(r, b, 5);
            }
            assert_int_equal(status, PD_END);
        }
        if (calls_of(&f) != calls) fail_msg("reader %d takes memory in the steady state", k);
        pd_batch_free(b);
        pd_reader_free(r);
        pd_net_free(net);
        assert_int_equal(f.in_use, 0);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter_directory, leave_directory)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_batch),
        TEST(test_batch_left_out),
        TEST(test_batch_sequences),
        TEST(test_batch_sparse),
        TEST(test_numbers),
        TEST(test_locale),
        TEST(test_csv),
        TEST(test_csv_malformed),
        TEST(test_csv_refused),
        TEST(test_paths),
        TEST(test_stdin),
        TEST(test_long_lines),
        TEST(test_choices),
        TEST(test_skip),
        TEST(test_shard_refused),
        TEST(test_arrays),
        TEST(test_other_batch),
        TEST(test_bad_net),
        TEST(test_idx),
        TEST(test_idx_malformed),
        TEST(test_idx_not_finite),
        TEST(test_large_file),
        TEST(test_npy),
        TEST(test_npy_malformed),
        TEST(test_whole_numbers),
        TEST(test_binary_whole_numbers),
        TEST(test_ids_beyond_double),
        TEST(test_libsvm),
        TEST(test_libsvm_malformed),
        TEST(test_large_queries),
        TEST(test_bad_queries),
        TEST(test_query_choice),
        TEST(test_libsvm_refused),
        TEST(test_vocab_build),
        TEST(test_vocab_twin),
        TEST(test_vocab_refused),
        TEST(test_vocab_parse),
        TEST(test_vocab_in_a_file),
        TEST(test_text),
        TEST(test_text_malformed),
        TEST(test_text_refused),
        TEST(test_text_choices),
        TEST(test_add_text),
        TEST(test_stream),
        TEST(test_stream_reset),
        TEST(test_own_reader),
        TEST(test_shuffle),
        TEST(test_shuffle_uniform),
        TEST(test_shuffle_skip),
        TEST(test_shuffle_sequences),
        TEST(test_shuffle_errors),
        TEST(test_shuffle_shards),
        TEST(test_prefetch),
        TEST(test_prefetch_interrupted),
        TEST(test_prefetch_errors),
        TEST(test_out_of_memory),
        TEST(test_text_out_of_memory),
        TEST(test_line_out_of_memory),
        TEST(test_steady_memory),
    };
    return run_group(tests, NULL, NULL);
}
