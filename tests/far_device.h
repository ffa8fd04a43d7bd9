/* A device without host memory, for tests without a GPU: the CPU under other addresses. What `alloc` gives can't be read
   or written by anyone but the device's own operations, so code that takes numbers of the device for the host's crashes.
   It can also be told that it lacks operations. Included after paddle.h. */
#ifndef PADDLE_TESTS_FAR_DEVICE_H
#define PADDLE_TESTS_FAR_DEVICE_H

#include <string.h>

typedef struct far_device {
    pd_device device;
    pd_device *cpu;
} far_device;

/* No processor of today has memory there. */
#define FAR_OFFSET ((uintptr_t)1 << 62)

static inline void *near_bytes(const void *memory) { return memory ? (void *)((uintptr_t)memory - FAR_OFFSET) : NULL; }
static inline pd_real *near(const pd_real *numbers) { return (pd_real *)near_bytes(numbers); }
static inline pd_device *far_cpu(pd_device *d) { return ((far_device *)d->self)->cpu; }

static void *far_alloc(pd_device *d, size_t size) {
    void *memory = far_cpu(d)->alloc(far_cpu(d), size);
    return memory ? (void *)((uintptr_t)memory + FAR_OFFSET) : NULL;
}
static void far_free(pd_device *d, void *memory) { far_cpu(d)->free(far_cpu(d), near_bytes(memory)); }
static void far_upload(pd_device *d, void *to, const void *from_host, size_t size) {
    far_cpu(d)->upload(far_cpu(d), near_bytes(to), from_host, size);
}
static void far_download(pd_device *d, void *to_host, const void *from, size_t size) {
    far_cpu(d)->download(far_cpu(d), to_host, near_bytes(from), size);
}
static pd_status far_wait(pd_device *d, char *message, size_t size) {
    return far_cpu(d)->wait(far_cpu(d), message, size);
}
static void far_fill(pd_device *d, int64_t n, pd_real value, pd_real *y) {
    far_cpu(d)->fill(far_cpu(d), n, value, near(y));
}
static void far_contract(pd_device *d, const int64_t size[4], pd_real alpha, const pd_real *a, const int64_t as[4],
                         const pd_real *b, const int64_t bs[4], pd_real *y, const int64_t ys[4]) {
    far_cpu(d)->contract(far_cpu(d), size, alpha, near(a), as, near(b), bs, near(y), ys);
}
/* `to` is where the twin of an epilogue may be. */
static const pd_epilogue *near_epilogue(const pd_epilogue *after, pd_epilogue *to) {
    if (!after) return NULL;
    *to = *after;
    to->scale = near(after->scale);
    to->center = near(after->center);
    to->bias = near(after->bias);
    return to;
}
static void far_gemm(pd_device *d, bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, pd_real alpha,
                     const pd_real *a, int64_t lda, const pd_real *b, int64_t ldb, pd_real beta, pd_real *c,
                     int64_t ldc, const pd_epilogue *after) {
    pd_epilogue to;
    far_cpu(d)->gemm(far_cpu(d), transpose_a, transpose_b, m, n, k, alpha, near(a), lda, near(b), ldb, beta, near(c),
                     ldc, near_epilogue(after, &to));
}
static double far_norm(pd_device *d, int64_t n, const pd_real *x) { return far_cpu(d)->norm(far_cpu(d), n, near(x)); }
static void far_update(pd_device *d, const pd_update *u, int64_t n, pd_real *w, const pd_real *g,
                       const unsigned char *mask, pd_real *const *states) {
    pd_real *near_states[PD_MAX_STATES];
    for (int k = 0; k < PD_MAX_STATES; k++) near_states[k] = near(states[k]);
    far_cpu(d)->update(far_cpu(d), u, n, near(w), near(g), mask, near_states);
}
static void far_update_rows(pd_device *d, const pd_update *u, int64_t count, int64_t width, const int64_t *rows,
                            const int64_t *state_rows, const double *carry, pd_real *w, const pd_real *g,
                            pd_real *state) {
    far_cpu(d)->update_rows(far_cpu(d), u, count, width, rows, state_rows, carry, near(w), near(g), near(state));
}
static void far_gather_rows(pd_device *d, int64_t count, int64_t width, const int64_t *rows, const int64_t *state_rows,
                            const double *carry, const pd_real *w, const pd_real *state, pd_real *y) {
    far_cpu(d)->gather_rows(far_cpu(d), count, width, rows, state_rows, carry, near(w), near(state), near(y));
}
static void far_activate(pd_device *d, pd_act act, pd_real alpha, int64_t rows, int64_t width, const pd_real *x,
                         pd_real *y) {
    far_cpu(d)->activate(far_cpu(d), act, alpha, rows, width, near(x), near(y));
}
static void far_activate_backward(pd_device *d, pd_act act, pd_real alpha, int64_t rows, int64_t width,
                                  const pd_real *x, const pd_real *y, pd_real *grad) {
    far_cpu(d)->activate_backward(far_cpu(d), act, alpha, rows, width, near(x), near(y), near(grad));
}
static void far_conv(pd_device *d, const pd_conv_shape *s, const pd_real *x, const pd_real *w, pd_real beta, pd_real *y,
                     const pd_epilogue *after) {
    pd_epilogue to;
    far_cpu(d)->conv(far_cpu(d), s, near(x), near(w), beta, near(y), near_epilogue(after, &to));
}
static void far_conv_backward_data(pd_device *d, const pd_conv_shape *s, const pd_real *w, const pd_real *dy,
                                   pd_real *dx) {
    far_cpu(d)->conv_backward_data(far_cpu(d), s, near(w), near(dy), near(dx));
}
static void far_conv_backward_filter(pd_device *d, const pd_conv_shape *s, const pd_real *x, const pd_real *dy,
                                     pd_real *dw) {
    far_cpu(d)->conv_backward_filter(far_cpu(d), s, near(x), near(dy), near(dw));
}
static void far_pool(pd_device *d, const pd_pool_shape *s, const pd_real *x, pd_real *y) {
    far_cpu(d)->pool(far_cpu(d), s, near(x), near(y));
}
static void far_pool_backward(pd_device *d, const pd_pool_shape *s, const pd_real *x, const pd_real *y,
                              const pd_real *dy, pd_real *dx) {
    far_cpu(d)->pool_backward(far_cpu(d), s, near(x), near(y), near(dy), near(dx));
}
static void far_cross_entropy(pd_device *d, int64_t rows, int64_t width, const pd_real *x, const pd_real *p,
                              const int64_t *ids, const pd_real *soft, const pd_real *row_weights,
                              const pd_real *class_weights, pd_real *cost) {
    far_cpu(d)->cross_entropy(far_cpu(d), rows, width, near(x), near(p), ids, near(soft), near(row_weights),
                              near(class_weights), near(cost));
}
static void far_cross_entropy_backward(pd_device *d, int64_t rows, int64_t width, const pd_real *p, const int64_t *ids,
                                       const pd_real *soft, const pd_real *class_weights, const pd_real *dcost,
                                       bool by_x, pd_real *dx) {
    far_cpu(d)->cross_entropy_backward(far_cpu(d), rows, width, near(p), ids, near(soft), near(class_weights),
                                       near(dcost), by_x, near(dx));
}
static void far_dropout(pd_device *d, int64_t n, uint64_t key, double p, const pd_real *x, pd_real *y) {
    far_cpu(d)->dropout(far_cpu(d), n, key, p, near(x), near(y));
}
static void far_channel_moments(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                                pd_real *moments) {
    far_cpu(d)->channel_moments(far_cpu(d), rows, channels, area, near(x), near(moments));
}
static void far_batch_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                           const pd_real *mean, const pd_real *rest, const pd_real *variance, double epsilon,
                           const pd_real *weight, const pd_real *bias, pd_real *y) {
    far_cpu(d)->batch_norm(far_cpu(d), rows, channels, area, near(x), near(mean), near(rest), near(variance), epsilon,
                           near(weight), near(bias), near(y));
}
static void far_batch_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                                    const pd_real *mean, const pd_real *rest, const pd_real *variance, double epsilon,
                                    bool batch_moments, const pd_real *weight, const pd_real *dy, pd_real *dx,
                                    pd_real *dweight, pd_real *dbias) {
    far_cpu(d)->batch_norm_backward(far_cpu(d), rows, channels, area, near(x), near(mean), near(rest), near(variance),
                                    epsilon, batch_moments, near(weight), near(dy), near(dx), near(dweight),
                                    near(dbias));
}
static void far_layer_norm(pd_device *d, int64_t rows, int64_t width, const pd_real *x, double epsilon,
                           const pd_real *weight, const pd_real *bias, pd_real *moments, pd_real *y) {
    far_cpu(d)->layer_norm(far_cpu(d), rows, width, near(x), epsilon, near(weight), near(bias), near(moments), near(y));
}
static void far_layer_norm_backward(pd_device *d, int64_t rows, int64_t width, const pd_real *x, const pd_real *moments,
                                    const pd_real *weight, const pd_real *dy, pd_real *dx, pd_real *dweight,
                                    pd_real *dbias) {
    far_cpu(d)->layer_norm_backward(far_cpu(d), rows, width, near(x), near(moments), near(weight), near(dy), near(dx),
                                    near(dweight), near(dbias));
}
static void far_group_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t groups, const pd_real *x,
                           double epsilon, const pd_real *weight, const pd_real *bias, pd_real *moments, pd_real *y) {
    far_cpu(d)->group_norm(far_cpu(d), rows, channels, area, groups, near(x), epsilon, near(weight), near(bias),
                           near(moments), near(y));
}
static void far_group_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t groups,
                                    const pd_real *x, const pd_real *moments, const pd_real *weight, const pd_real *dy,
                                    pd_real *dx, pd_real *dweight, pd_real *dbias) {
    far_cpu(d)->group_norm_backward(far_cpu(d), rows, channels, area, groups, near(x), near(moments), near(weight),
                                    near(dy), near(dx), near(dweight), near(dbias));
}
static void far_response_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t size, double alpha,
                              double beta, double k, const pd_real *x, pd_real *scales, pd_real *y) {
    far_cpu(d)->response_norm(far_cpu(d), rows, channels, area, size, alpha, beta, k, near(x), near(scales), near(y));
}
static void far_response_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t size,
                                       double alpha, double beta, const pd_real *x, const pd_real *scales,
                                       const pd_real *dy, pd_real *dx) {
    far_cpu(d)->response_norm_backward(far_cpu(d), rows, channels, area, size, alpha, beta, near(x), near(scales),
                                       near(dy), near(dx));
}
static void far_sparse_product(pd_device *d, const pd_csr *s, int64_t width, const pd_real *x, pd_real *y) {
    far_cpu(d)->sparse_product(far_cpu(d), s, width, near(x), near(y));
}
static void far_gru(pd_device *d, int64_t rows, int64_t width, pd_real *gates, const pd_real *recurrent,
                    const pd_real *before, pd_real *after) {
    far_cpu(d)->gru(far_cpu(d), rows, width, near(gates), near(recurrent), near(before), near(after));
}
static void far_gru_backward(pd_device *d, int64_t rows, int64_t width, pd_real *gates, pd_real *recurrent,
                             const pd_real *before, const pd_real *dafter, pd_real *dbefore) {
    far_cpu(d)->gru_backward(far_cpu(d), rows, width, near(gates), near(recurrent), near(before), near(dafter),
                             near(dbefore));
}
static void far_lstm(pd_device *d, int64_t rows, int64_t width, pd_real *gates, const pd_real *peephole,
                     const pd_real *before, pd_real *cells, pd_real *after) {
    far_cpu(d)->lstm(far_cpu(d), rows, width, near(gates), near(peephole), near(before), near(cells), near(after));
}
static void far_lstm_backward(pd_device *d, int64_t rows, int64_t width, pd_real *gates, const pd_real *peephole,
                              const pd_real *before, const pd_real *cells, const pd_real *dafter, pd_real *dcells) {
    far_cpu(d)->lstm_backward(far_cpu(d), rows, width, near(gates), near(peephole), near(before), near(cells),
                              near(dafter), near(dcells));
}

static void far_attention(pd_device *d, const pd_attention_shape *s, const pd_real *query, const pd_real *keys,
                          const pd_real *values, const pd_real *v, pd_real *weights, pd_real *y) {
    far_cpu(d)->attention(far_cpu(d), s, near(query), near(keys), near(values), near(v), near(weights), near(y));
}
static void far_attention_backward(pd_device *d, const pd_attention_shape *s, const pd_real *query, const pd_real *keys,
                                   const pd_real *values, const pd_real *v, const pd_real *weights, const pd_real *dy,
                                   pd_real *dquery, pd_real *dkeys, pd_real *dvalues, pd_real *dv) {
    far_cpu(d)->attention_backward(far_cpu(d), s, near(query), near(keys), near(values), near(v), near(weights),
                                   near(dy), near(dquery), near(dkeys), near(dvalues), near(dv));
}
static void far_freeze(pd_device *d, const pd_real *w, bool frozen) { far_cpu(d)->freeze(far_cpu(d), near(w), frozen); }

/* The CPU, from a net that is given no other device; adds a layer to it. */
static inline pd_device *cpu_of(pd_net *net) { return pd_vector(net, NULL, 1)->device; }

/* A far twin of `cpu`, which must outlive it. ops: the PD_OP bits of what it has beside the basic operations. */
static far_device make_far(pd_device *cpu, uint64_t ops) {
    const uint64_t basic = 0
#define FAR_BASIC(name) | PD_OP(name)
        PD_BASIC_OPERATIONS(FAR_BASIC);
    far_device far;
    memset(&far, 0, sizeof far);
    far.device.api_version = PD_API_VERSION;
    far.device.name = "far";
    far.device.alloc = far_alloc;
    far.device.free = far_free;
    far.device.upload = far_upload;
    far.device.download = far_download;
    far.device.wait = far_wait;
    far.device.freeze = far_freeze;
#define FAR_OPERATION(operation)                                                                                       \
    if ((ops | basic) & PD_OP(operation)) far.device.operation = far_##operation;
    PD_OPERATIONS(FAR_OPERATION)
    far.cpu = cpu;
    return far;
}

#endif
