/* The recurrence on tiles in cache; all time is spent here.
 *
 *   h[t] = exp(dt[t] A) h[t-1] + x[t] B[t],   y[t] = C[t] . h[t],   x = dt u
 *
 * Lanes are channels. One vector of channels and a group of its states are carried through all tokens of a tile before
 * the next, so that h stays in registers. `A` holds A log2(e): exp(dt A) is then one multiplication and exp2.
 *
 * Tiles: dt, x, y, gy, dx, ddt (token, WIDTH); B, C (token, row); A, h and the like (states, WIDTH).
 */
#ifndef LN_SCAN_CORE_H
#define LN_SCAN_CORE_H

#include "lightnets.h"
#include "tile.h"
#include "vector_math.h"

/* States per group. In the backward pass the sums over channels of dB and dC are taken for LANES vectors at once:
 * TOKENS_BACKWARD tokens of GROUP_BACKWARD states each. */
enum {
    GROUP_FORWARD = 4,
    GROUP_BACKWARD = LANES >= 8 ? 4 : LANES / 2,
    TOKENS_BACKWARD = LANES / (2 * GROUP_BACKWARD),
};
enum { STATE_PADDING = 4 }; /* a multiple of both groups */

typedef struct {
    int tokens;    /* backward: a multiple of TOKENS_BACKWARD */
    int states;    /* a multiple of STATE_PADDING */
    int64_t row;   /* from one token to the next in B and C */
    int registers; /* vectors per row that hold channels, 1 .. REGISTERS */
    bool clamp;    /* dt A may leave the range of exp2 */
    const real *A, *dt, *x, *B, *C;
    real *h;                    /* the state before the tile; forward: on return the one after it */
    real *y;                    /* forward: result; backward: result where not NULL */
    const real *gy;             /* backward: gradient of y */
    real *dh;                   /* gradient of h after the tile; on return of the one before it */
    real *dx, *ddt;             /* backward: results; ddt without x's part and without the factor ln 2 */
    real *dA;                   /* added to */
    real *dBC;                  /* added to; see index_dB */
    real *restrict history;     /* backward: scratch, (LN_CHUNK + 1, GROUP_BACKWARD, LANES) */
    real *restrict decay;       /* (LN_CHUNK, GROUP_BACKWARD, LANES) */
} ln_tile;

/* dBC holds one vector of sums per TOKENS_BACKWARD x GROUP_BACKWARD block; dC stands GROUP_BACKWARD after dB. */
INLINE int index_dB(int states, int t, int n) {
    const int block = (t / TOKENS_BACKWARD) * (states / GROUP_BACKWARD) + n / GROUP_BACKWARD;
    return block * LANES + (t % TOKENS_BACKWARD) * 2 * GROUP_BACKWARD + n % GROUP_BACKWARD;
}

INLINE void forward_group(const ln_tile *k, int r, int n, const bool clamp) {
    const int tokens = k->tokens;
    const real *dt_row = k->dt + r * LANES, *x_row = k->x + r * LANES, *B = k->B + n, *C = k->C + n;
    real *y_row = k->y + r * LANES;
    vec A[GROUP_FORWARD], h[GROUP_FORWARD];
    UNROLL for (int j = 0; j < GROUP_FORWARD; j++) {
        A[j] = load(k->A + (n + j) * WIDTH + r * LANES);
        h[j] = load(k->h + (n + j) * WIDTH + r * LANES);
    }
    for (int t = 0; t < tokens; t++, dt_row += WIDTH, x_row += WIDTH, y_row += WIDTH, B += k->row, C += k->row) {
        const vec dt = load(dt_row), x = load(x_row);
        vec y = n ? load(y_row) : splat(0);
        UNROLL for (int j = 0; j < GROUP_FORWARD; j++) {
            h[j] = exp2_of(dt * A[j], clamp) * h[j] + x * B[j];
            y += C[j] * h[j];
        }
        store(y_row, y);
    }
    UNROLL for (int j = 0; j < GROUP_FORWARD; j++) store(k->h + (n + j) * WIDTH + r * LANES, h[j]);
}

/* Recomputes states and decays of the tile, then walks it backwards. */
INLINE void backward_group(const ln_tile *k, int r, int n, const bool clamp) {
    enum { GROUP = GROUP_BACKWARD, ROW = GROUP_BACKWARD * LANES };
    const int states = k->states, tokens = k->tokens, first = n * WIDTH + r * LANES;
    const real *dt_row = k->dt + r * LANES, *x_row = k->x + r * LANES, *B = k->B + n, *C = k->C + n;
    real *history = k->history, *decay = k->decay;
    vec A[GROUP], h[GROUP], dh[GROUP], dA[GROUP];
    UNROLL for (int j = 0; j < GROUP; j++) {
        A[j] = load(k->A + first + j * WIDTH), h[j] = load(k->h + first + j * WIDTH);
        dh[j] = load(k->dh + first + j * WIDTH), dA[j] = splat(0);
    }
    for (int t = 0; t < tokens; t++) {
        const vec dt = load(dt_row), x = load(x_row);
        UNROLL for (int j = 0; j < GROUP; j++) {
            const vec a = exp2_of(dt * A[j], clamp);
            store(decay + j * LANES, a);
            store(history + j * LANES, h[j]);
            h[j] = a * h[j] + x * B[j];
        }
        dt_row += WIDTH, x_row += WIDTH, history += ROW, decay += ROW, B += k->row, C += k->row;
    }
    UNROLL for (int j = 0; j < GROUP; j++) store(history + j * LANES, h[j]);

    const real *gy_row = k->gy + tokens * WIDTH + r * LANES;
    real *dx_row = k->dx + tokens * WIDTH + r * LANES, *ddt_row = k->ddt + tokens * WIDTH + r * LANES;
    for (int t = tokens - TOKENS_BACKWARD; t >= 0; t -= TOKENS_BACKWARD) {
        vec sums[LANES]; /* of each token: dB of the group, then dC */
        UNROLL for (int i = TOKENS_BACKWARD - 1; i >= 0; i--) {
            dt_row -= WIDTH, x_row -= WIDTH, gy_row -= WIDTH, dx_row -= WIDTH, ddt_row -= WIDTH;
            history -= ROW, decay -= ROW, B -= k->row, C -= k->row;
            const vec dt = load(dt_row), x = load(x_row), gy = load(gy_row);
            vec dx = n ? load(dx_row) : splat(0), ddt = n ? load(ddt_row) : splat(0);
            UNROLL for (int j = 0; j < GROUP; j++) {
                const vec g = dh[j] + C[j] * gy;
                sums[i * 2 * GROUP + j] = g * x;
                sums[i * 2 * GROUP + GROUP + j] = gy * load(history + ROW + j * LANES);
                dx += g * B[j];
                dh[j] = g * load(decay + j * LANES);
                const vec w = dh[j] * load(history + j * LANES);
                ddt += w * A[j];
                dA[j] += w * dt;
            }
            store(dx_row, dx);
            store(ddt_row, ddt);
        }
        real *total = k->dBC + index_dB(states, t, n);
        store(total, load(total) + sum_lanes(sums));
    }
    UNROLL for (int j = 0; j < GROUP; j++) {
        store(k->dh + first + j * WIDTH, dh[j]);
        store(k->dA + first + j * WIDTH, load(k->dA + first + j * WIDTH) + dA[j]);
    }
}

/* y of a group from its states in `history`, which the gate's gradient needs. */
INLINE void output_group(const ln_tile *k, int r, int n) {
    for (int t = 0; t < k->tokens; t++) {
        const real *h = k->history + (t + 1) * GROUP_BACKWARD * LANES;
        vec y = n ? load(k->y + t * WIDTH + r * LANES) : splat(0);
        UNROLL for (int j = 0; j < GROUP_BACKWARD; j++) y += k->C[t * k->row + n + j] * load(h + j * LANES);
        store(k->y + t * WIDTH + r * LANES, y);
    }
}

/* The part of the backward walk that carries dh alone; h, y and the other results are left as they are. */
INLINE void adjoint_group(const ln_tile *k, int r, int n, const bool clamp) {
    vec A[GROUP_FORWARD], dh[GROUP_FORWARD];
    UNROLL for (int j = 0; j < GROUP_FORWARD; j++) {
        A[j] = load(k->A + (n + j) * WIDTH + r * LANES);
        dh[j] = load(k->dh + (n + j) * WIDTH + r * LANES);
    }
    for (int t = k->tokens - 1; t >= 0; t--) {
        const vec dt = load(k->dt + t * WIDTH + r * LANES), gy = load(k->gy + t * WIDTH + r * LANES);
        const real *C = k->C + t * k->row + n;
        UNROLL for (int j = 0; j < GROUP_FORWARD; j++) dh[j] = exp2_of(dt * A[j], clamp) * (dh[j] + C[j] * gy);
    }
    UNROLL for (int j = 0; j < GROUP_FORWARD; j++) store(k->dh + (n + j) * WIDTH + r * LANES, dh[j]);
}

/* Loops over a tile's groups, compiled with and without the clamp. */
#define EACH_GROUP(k, group, call)                     \
    for (int r = 0; r < (k)->registers; r++)           \
        for (int n = 0; n < (k)->states; n += (group)) \
            if ((k)->clamp) {                          \
                const bool clamp = true;               \
                call;                                  \
            } else {                                   \
                const bool clamp = false;              \
                call;                                  \
            }

static void scan_tile(const ln_tile *k) { EACH_GROUP(k, GROUP_FORWARD, forward_group(k, r, n, clamp)) }

static void scan_tile_adjoint(const ln_tile *k) { EACH_GROUP(k, GROUP_FORWARD, adjoint_group(k, r, n, clamp)) }

static void scan_tile_backward(const ln_tile *k) {
    EACH_GROUP(k, GROUP_BACKWARD, (backward_group(k, r, n, clamp), k->y ? output_group(k, r, n) : (void)0))
}

#endif
