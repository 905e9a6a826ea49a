/* What surrounds the recurrence: a block of channels, and the element-wise work on its rows before and after a tile. */
#ifndef LN_SCAN_ROWS_H
#define LN_SCAN_ROWS_H

#include "scan_core.h"

enum { TILE = LN_CHUNK * WIDTH };

/* A block of channels: its parameters, and what it carries from chunk to chunk. */
typedef struct {
    int64_t channel;         /* in the image */
    int64_t row;             /* in A, D, delta_bias */
    int channels, registers; /* 1 .. WIDTH, 1 .. REGISTERS */
    real steepest;           /* max |A log2(e)| */
    real *A;                 /* (states, WIDTH), times log2(e) */
    real *state;             /* (states, WIDTH): h; in the backward pass dh */
    real *dA;                /* (states, WIDTH) */
    real *D, *bias, *dD, *dbias, *dt_sum; /* (WIDTH) */
} block;

/* Row t, of the channels of a block, begins at base + at[t]; the same row of the chunk to come at base + next[t]. */
typedef struct {
    real *base;
    const int64_t *at, *next;
} rows;

INLINE vec row_load(rows x, int t, int r) { return load_loose(x.base + x.at[t] + r * LANES); }
INLINE void row_store(rows x, int t, int r, vec v) { store_loose(x.base + x.at[t] + r * LANES, v); }

/* A chunk's rows are far apart in memory, which the processor's own prefetching does not see through. */
INLINE void prefetch(rows x, int t) { __builtin_prefetch(x.base + x.next[t], 0, 2); }
INLINE void prefetch_to_write(rows x, int t) { __builtin_prefetch(x.base + x.next[t], 1, 2); }

/* dt = softplus(delta + bias), x = dt u, slope = d dt / d delta where asked for. Returns max |dt|. */
static real prepare(real *restrict dt_tile, real *restrict x_tile, real *restrict slope_tile, rows delta, rows u,
                    const block *k, int tokens, bool softplus) {
    vec most = splat(0);
    for (int r = 0; r < k->registers; r++) {
        const vec bias = load(k->bias + r * LANES);
        real *dt = dt_tile + r * LANES, *x = x_tile + r * LANES, *slope = slope_tile + r * LANES;
        for (int t = 0; t < tokens; t++) {
            const vec v = row_load(delta, t, r) + bias;
            store(dt + t * WIDTH, v);
            if (softplus) store(x + t * WIDTH, folded_exp(v));
            if (r == 0) prefetch(delta, t);
        }
        if (softplus && slope_tile)
            for (int t = 0; t < tokens; t++)
                store(slope + t * WIDTH, sigmoid_from(load(dt + t * WIDTH), load(x + t * WIDTH)));
        if (softplus)
            for (int t = 0; t < tokens; t++)
                store(dt + t * WIDTH, softplus_from(load(dt + t * WIDTH), load(x + t * WIDTH)));
        for (int t = 0; t < tokens; t++) {
            const vec v = load(dt + t * WIDTH);
            store(x + t * WIDTH, v * row_load(u, t, r));
            most = at_least(magnitude(v), most);
            if (r == 0) prefetch(u, t);
        }
    }
    real result = 0;
    for (int i = 0; i < LANES; i++)
        if (!(most[i] <= result)) result = most[i];
    return result;
}

/* gate = sigmoid(z) */
static void open_gate(real *restrict gate, rows z, const block *k, int tokens) {
    for (int r = 0; r < k->registers; r++) {
        for (int t = 0; t < tokens; t++) {
            store(gate + t * WIDTH + r * LANES, folded_exp(row_load(z, t, r)));
            if (r == 0) prefetch(z, t);
        }
        for (int t = 0; t < tokens; t++) {
            real *at = gate + t * WIDTH + r * LANES;
            store(at, sigmoid_from(row_load(z, t, r), load(at)));
        }
    }
}

/* gy = grad_out times z sigmoid(z) where a gate is given; gate becomes what y has to be multiplied with to be dz. */
static void gradient_of_y(real *restrict gy, real *restrict gate, rows grad_out, rows z, const block *k, int tokens) {
    for (int r = 0; r < k->registers; r++)
        for (int t = 0; t < tokens; t++) {
            const int at = t * WIDTH + r * LANES;
            vec g = row_load(grad_out, t, r);
            if (r == 0) prefetch(grad_out, t);
            if (gate) {
                const vec v = row_load(z, t, r), sigmoid = load(gate + at);
                store(gate + at, g * sigmoid * (1 + v * (1 - sigmoid)));
                g *= v * sigmoid;
            }
            store(gy + at, g);
        }
}

/* Results of the backward walk of a block, and where its gradients go. */
typedef struct {
    real *dx, *ddt, *dt, *gy, *slope, *y, *gate; /* tiles; slope, y and gate may be NULL */
    rows u, du, ddelta, dz;
    bool add; /* to du */
} walked;

static void finish_backward(const walked *w, const block *k, int tokens) {
    for (int r = 0; r < k->registers; r++) {
        const vec D = load(k->D + r * LANES);
        vec dD = splat(0), dbias = splat(0);
        for (int t = 0; t < tokens; t++) {
            const int at = t * WIDTH + r * LANES;
            const vec gy = load(w->gy + at), u = row_load(w->u, t, r), dx = load(w->dx + at);
            vec du = dx * load(w->dt + at) + D * gy, ddelta = load(w->ddt + at) * (real)LN_2 + dx * u;
            if (w->slope) ddelta *= load(w->slope + at);
            if (w->gate) row_store(w->dz, t, r, load(w->gate + at) * (load(w->y + at) + D * u));
            if (w->add) du += row_load(w->du, t, r);
            row_store(w->du, t, r, du);
            row_store(w->ddelta, t, r, ddelta);
            if (r == 0) prefetch_to_write(w->du, t), prefetch_to_write(w->ddelta, t);
            dD += gy * u;
            dbias += ddelta;
        }
        store(k->dD + r * LANES, load(k->dD + r * LANES) + dD);
        store(k->dbias + r * LANES, load(k->dbias + r * LANES) + dbias);
    }
}

static bool may_leave_range(real most, const block *k) { return !(most * k->steepest < EXPONENT_RANGE - 1); }

static void zero_rows(real *tile, int from, int to) {
    memset(tile + from * WIDTH, 0, sizeof(real) * (size_t)((to - from) * WIDTH));
}

/* From blocks of sums, see index_dB, to rows of states, `row` apart. */
static void sort_dBC(const real *dBC, real *dB, real *dC, int64_t row, int padded, int tokens) {
    for (int t = 0; t < tokens; t++)
        for (int n = 0; n < padded; n += GROUP_BACKWARD) {
            const real *sums = dBC + index_dB(padded, t, n);
            memcpy(dB + t * row + n, sums, sizeof(real) * GROUP_BACKWARD);
            memcpy(dC + t * row + n, sums + GROUP_BACKWARD, sizeof(real) * GROUP_BACKWARD);
        }
}

#endif
