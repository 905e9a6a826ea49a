/* Causal depthwise convolution with bias and SiLU in one pass over memory.
 *
 *   s[l] = bias + sum_k weight[k] x[l - width + 1 + k],   y = s, or s sigmoid(s)
 *
 * A task owns a span of tokens of one image and all its channels; tokens outside the span are read again, so tasks share
 * nothing. Backward, s is computed anew for the chunk and the width - 1 tokens after it, whose gradients reach back.
 */
#include <stdlib.h>

#include "tile.h"
#include "vector_math.h"

typedef struct {
    const ln_conv *c;
    int64_t spans, chunks;
    real *partial_rows; /* (batch * spans, channels, width + 1): dweight, dbias */
} plan;

enum { HALO_MOST = LN_CHUNK }; /* width - 1; causal_conv1d_native.py refuses wider kernels */
enum { ROWS_MOST = LN_CHUNK + 2 * HALO_MOST + LANES }; /* read_tile rounds up to whole vectors of tokens */

typedef struct {
    real x[ROWS_MOST * WIDTH], g[ROWS_MOST * WIDTH], s[ROWS_MOST * WIDTH], gate[ROWS_MOST * WIDTH], out[LN_CHUNK * WIDTH];
    real weight[(HALO_MOST + 1) * WIDTH], bias[WIDTH]; /* (width, WIDTH) */
} tiles;

/* Reads tokens [from, to) of a block of channels into consecutive rows; outside the image they are zero. */
static void read_span(real *tile, const ln_tensor *x, int64_t offset, int channels, int64_t from, int64_t to, int64_t length) {
    for (; from < to && from < 0; from++, tile += WIDTH) memset(tile, 0, sizeof(real) * WIDTH);
    while (from < to && from < length) {
        const int64_t end = to < length ? to : length, left = end - from;
        const ln_tokens tokens = {from, left < LN_CHUNK ? (int)left : LN_CHUNK, NULL};
        read_tile(tile, x, offset, channels, &tokens);
        from += tokens.count, tile += tokens.count * WIDTH;
    }
    for (; from < to; from++, tile += WIDTH) memset(tile, 0, sizeof(real) * WIDTH);
}

static void read_weights(tiles *m, const ln_conv *c, int64_t channel, int channels) {
    memset(m->weight, 0, sizeof m->weight);
    memset(m->bias, 0, sizeof m->bias);
    for (int i = 0; i < channels; i++) {
        for (int64_t k = 0; k < c->width; k++)
            m->weight[k * WIDTH + i] = ((const real *)c->weight)[(channel + i) * c->width + k];
        if (c->bias) m->bias[i] = ((const real *)c->bias)[channel + i];
    }
}

/* s of the token whose first input row is `x`, lanes from r * LANES on. */
INLINE vec convolve(const tiles *m, const real *x, int width) {
    vec s = load(m->bias + (x - m->x) % WIDTH);
    for (int k = 0; k < width; k++) s += load(m->weight + k * WIDTH + (x - m->x) % WIDTH) * load(x + k * WIDTH);
    return s;
}

static void forward_task(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_conv *c = p->c;
    tiles *m = scratch;
    const int64_t span = task % p->spans, b = task / p->spans;
    const int width = (int)c->width, halo = width - 1;
    for (int64_t chunk = span * p->chunks / p->spans; chunk < (span + 1) * p->chunks / p->spans; chunk++) {
        const int64_t first = chunk * LN_CHUNK, left = c->length - first;
        const ln_tokens tokens = {first, left < LN_CHUNK ? (int)left : LN_CHUNK, NULL};
        for (int64_t channel = 0; channel < c->channels; channel += WIDTH) {
            const int channels = c->channels - channel < WIDTH ? (int)(c->channels - channel) : WIDTH;
            read_weights(m, c, channel, channels);
            read_span(m->x, &c->x, b * c->x.batch + channel * c->x.channel, channels, first - halo, first + tokens.count,
                      c->length);
            for (int i = 0; i < tokens.count * WIDTH; i += LANES) store(m->out + i, convolve(m, m->x + i, width));
            if (c->silu) {
                for (int i = 0; i < tokens.count * WIDTH; i += LANES) store(m->gate + i, folded_exp(load(m->out + i)));
                for (int i = 0; i < tokens.count * WIDTH; i += LANES) {
                    const vec s = load(m->out + i);
                    store(m->out + i, s * sigmoid_from(s, load(m->gate + i)));
                }
            }
            write_tile(m->out, &c->y, b * c->y.batch + channel * c->y.channel, channels, &tokens, false);
        }
    }
}

static void backward_task(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_conv *c = p->c;
    tiles *m = scratch;
    const int64_t span = task % p->spans, b = task / p->spans;
    const int width = (int)c->width, halo = width - 1;
    real *rows = p->partial_rows + task * c->channels * (c->width + 1);
    memset(rows, 0, sizeof(real) * (size_t)(c->channels * (c->width + 1)));
    for (int64_t chunk = span * p->chunks / p->spans; chunk < (span + 1) * p->chunks / p->spans; chunk++) {
        const int64_t first = chunk * LN_CHUNK, left = c->length - first;
        const ln_tokens tokens = {first, left < LN_CHUNK ? (int)left : LN_CHUNK, NULL};
        for (int64_t channel = 0; channel < c->channels; channel += WIDTH) {
            const int channels = c->channels - channel < WIDTH ? (int)(c->channels - channel) : WIDTH;
            const int64_t end = first + tokens.count;
            read_weights(m, c, channel, channels);
            read_span(m->x, &c->x, b * c->x.batch + channel * c->x.channel, channels, first - halo, end + halo, c->length);
            read_span(m->g, &c->grad_y, b * c->grad_y.batch + channel * c->grad_y.channel, channels, first, end + halo,
                      c->length);
            if (c->silu) {
                const int reach = (tokens.count + halo) * WIDTH;
                for (int i = 0; i < reach; i += LANES) {
                    const vec s = convolve(m, m->x + i, width);
                    store(m->s + i, s);
                    store(m->gate + i, folded_exp(s));
                }
                for (int i = 0; i < reach; i += LANES) {
                    const vec s = load(m->s + i), gate = sigmoid_from(s, load(m->gate + i));
                    store(m->g + i, load(m->g + i) * gate * (1 + s * (1 - gate)));
                }
            }
            for (int i = 0; i < tokens.count * WIDTH; i += LANES) {
                vec dx = splat(0);
                for (int k = 0; k < width; k++)
                    dx += load(m->weight + k * WIDTH + i % WIDTH) * load(m->g + i + (halo - k) * WIDTH);
                store(m->out + i, dx);
            }
            write_tile(m->out, &c->dx, b * c->dx.batch + channel * c->dx.channel, channels, &tokens, false);
            for (int k = 0; k <= width; k++) /* the last is the bias */
                for (int lane = 0; lane < channels; lane += LANES) {
                    vec sum = splat(0);
                    for (int i = lane; i < tokens.count * WIDTH; i += WIDTH)
                        sum += k < width ? load(m->g + i) * load(m->x + i + k * WIDTH) : load(m->g + i);
                    for (int i = 0; i < LANES && lane + i < channels; i++)
                        rows[(channel + lane + i) * (c->width + 1) + k] += sum[i];
                }
        }
    }
}

/* Spans of tokens: enough for all threads, none so short that waking a thread costs more. */
static plan plan_of(const ln_conv *c) {
    plan p = {.c = c, .spans = 1, .chunks = (c->length + LN_CHUNK - 1) / LN_CHUNK};
    const int64_t worthwhile = 1 + c->batch * c->channels * c->length / 50000;
    const int64_t threads = c->threads < worthwhile ? c->threads : worthwhile;
    if (threads > 1 && c->batch > 0) p.spans = (threads + c->batch - 1) / c->batch * (c->batch > 1 ? 2 : 1);
    if (p.spans > p.chunks) p.spans = p.chunks > 0 ? p.chunks : 1;
    return p;
}

int NAME(conv_forward)(const ln_conv *c) {
    const plan p = plan_of(c);
    return ln_parallel(c->threads, c->batch * p.spans, sizeof(tiles), forward_task, &p);
}

int NAME(conv_backward)(const ln_conv *c) {
    plan p = plan_of(c);
    const int64_t tasks = c->batch * p.spans, rows = c->channels * (c->width + 1);
    p.partial_rows = ln_allocate(sizeof(real) * (size_t)(tasks * rows));
    if (!p.partial_rows) return LN_NO_MEMORY;
    const int status = ln_parallel(c->threads, tasks, sizeof(tiles), backward_task, &p);
    if (!status)
        for (int64_t channel = 0; channel < c->channels; channel++)
            for (int64_t k = 0; k <= c->width; k++) {
                real total = 0;
                for (int64_t i = 0; i < tasks; i++) total += p.partial_rows[i * rows + channel * (c->width + 1) + k];
                if (k < c->width) ((real *)c->dweight)[channel * c->width + k] = total;
                else if (c->dbias) ((real *)c->dbias)[channel] = total;
            }
    free(p.partial_rows);
    return status;
}
