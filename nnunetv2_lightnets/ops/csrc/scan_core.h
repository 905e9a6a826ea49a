/* The recurrence on tiles in cache; all time is spent here.
 *
 *   h[t] = exp(dt[t] A) h[t-1] + x[t] B[t],   y[t] = C[t] . h[t],   x = dt u
 *
 * Lanes are channels. A group of states is carried through all tokens of a tile before the next one, so that h stays in
 * registers. `A` holds A log2(e): exp(dt A) is then one multiplication and exp2.
 *
 * Tiles: dt, x, y, gy, dx, ddt (token, WIDTH); B, C (token, states); A, h and the like (states, WIDTH).
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
    GROUP_BACKWARD = LANES >= 4 ? 2 : 1,
    TOKENS_BACKWARD = LANES / (2 * GROUP_BACKWARD),
};
enum { STATE_PADDING = 4 }; /* a multiple of both groups */

typedef struct {
    int tokens;       /* backward: a multiple of TOKENS_BACKWARD */
    int states;       /* a multiple of STATE_PADDING */
    int registers;    /* vectors per row that hold channels, 1 .. REGISTERS */
    bool clamp;       /* dt A may leave the range of exp2 */
    const real *A, *dt, *x, *B, *C;
    real *h;          /* the state before the tile; forward: on return the one after it */
    real *y;          /* forward: result; backward: result where not NULL */
    const real *gy;   /* backward: gradient of y */
    real *dh;         /* gradient of h after the tile; on return of the one before it */
    real *dx, *ddt;   /* backward: results; ddt without x's part and without the factor ln 2 */
    real *dA;         /* added to */
    real *dBC;        /* added to; see index_dB */
    real *history, *decay; /* backward: scratch, (LN_CHUNK + 1, GROUP_BACKWARD, WIDTH) and (LN_CHUNK, ...) */
} ln_tile;

/* dBC holds one vector of sums per TOKENS_BACKWARD x GROUP_BACKWARD block; dC stands GROUP_BACKWARD after dB. */
INLINE int index_dB(int states, int t, int n) {
    const int block = (t / TOKENS_BACKWARD) * (states / GROUP_BACKWARD) + n / GROUP_BACKWARD;
    return block * LANES + (t % TOKENS_BACKWARD) * 2 * GROUP_BACKWARD + n % GROUP_BACKWARD;
}

INLINE void forward_core(const ln_tile *k, const int registers, const bool clamp) {
    for (int n = 0; n < k->states; n += GROUP_FORWARD) {
        vec A[GROUP_FORWARD][REGISTERS], h[GROUP_FORWARD][REGISTERS];
        UNROLL for (int j = 0; j < GROUP_FORWARD; j++)
            UNROLL for (int r = 0; r < registers; r++) {
                A[j][r] = load(k->A + (n + j) * WIDTH + r * LANES);
                h[j][r] = load(k->h + (n + j) * WIDTH + r * LANES);
            }
        const real *B = k->B + n, *C = k->C + n;
        for (int t = 0; t < k->tokens; t++, B += k->states, C += k->states)
            UNROLL for (int r = 0; r < registers; r++) {
                const int at = t * WIDTH + r * LANES;
                const vec dt = load(k->dt + at), x = load(k->x + at);
                vec y = n ? load(k->y + at) : splat(0);
                UNROLL for (int j = 0; j < GROUP_FORWARD; j++) {
                    h[j][r] = exp2_of(dt * A[j][r], clamp) * h[j][r] + x * B[j];
                    y += C[j] * h[j][r];
                }
                store(k->y + at, y);
            }
        UNROLL for (int j = 0; j < GROUP_FORWARD; j++)
            UNROLL for (int r = 0; r < registers; r++) store(k->h + (n + j) * WIDTH + r * LANES, h[j][r]);
    }
}

/* Recomputes states and decays of the tile, then walks it backwards. */
INLINE void backward_core(const ln_tile *k, const int registers, const bool clamp) {
    enum { GROUP = GROUP_BACKWARD, ROW = GROUP_BACKWARD * WIDTH };
    for (int n = 0; n < k->states; n += GROUP) {
        vec A[GROUP][REGISTERS], h[GROUP][REGISTERS], dh[GROUP][REGISTERS], dA[GROUP][REGISTERS];
        UNROLL for (int j = 0; j < GROUP; j++)
            UNROLL for (int r = 0; r < registers; r++) {
                const int at = (n + j) * WIDTH + r * LANES;
                A[j][r] = load(k->A + at), h[j][r] = load(k->h + at);
                dh[j][r] = load(k->dh + at), dA[j][r] = load(k->dA + at);
            }
        for (int t = 0; t < k->tokens; t++)
            UNROLL for (int r = 0; r < registers; r++) {
                const int at = t * WIDTH + r * LANES;
                const vec dt = load(k->dt + at), x = load(k->x + at);
                vec y = splat(0);
                UNROLL for (int j = 0; j < GROUP; j++) {
                    const int scratch = t * ROW + j * WIDTH + r * LANES;
                    const vec a = exp2_of(dt * A[j][r], clamp);
                    store(k->decay + scratch, a);
                    store(k->history + scratch, h[j][r]);
                    h[j][r] = a * h[j][r] + x * k->B[t * k->states + n + j];
                    if (k->y) y += k->C[t * k->states + n + j] * h[j][r];
                }
                if (k->y) store(k->y + at, n ? load(k->y + at) + y : y);
            }
        UNROLL for (int j = 0; j < GROUP; j++)
            UNROLL for (int r = 0; r < registers; r++)
                store(k->history + k->tokens * ROW + j * WIDTH + r * LANES, h[j][r]);

        for (int t0 = k->tokens - TOKENS_BACKWARD; t0 >= 0; t0 -= TOKENS_BACKWARD) {
            vec sums[LANES]; /* per token: dB of the group, then dC */
            UNROLL for (int i = TOKENS_BACKWARD - 1; i >= 0; i--) {
                const int t = t0 + i;
                const real *B = k->B + t * k->states + n, *C = k->C + t * k->states + n;
                UNROLL for (int r = 0; r < registers; r++) {
                    const int at = t * WIDTH + r * LANES;
                    const vec dt = load(k->dt + at), x = load(k->x + at), gy = load(k->gy + at);
                    vec dx = n ? load(k->dx + at) : splat(0), ddt = n ? load(k->ddt + at) : splat(0);
                    UNROLL for (int j = 0; j < GROUP; j++) {
                        const int scratch = t * ROW + j * WIDTH + r * LANES;
                        const vec g = dh[j][r] + C[j] * gy;
                        const vec dB = g * x, dC = gy * load(k->history + scratch + ROW);
                        vec *sum = sums + i * 2 * GROUP + j;
                        if (r) sum[0] += dB, sum[GROUP] += dC;
                        else sum[0] = dB, sum[GROUP] = dC;
                        dx += g * B[j];
                        dh[j][r] = g * load(k->decay + scratch);
                        const vec w = dh[j][r] * load(k->history + scratch);
                        ddt += w * A[j][r];
                        dA[j][r] += w * dt;
                    }
                    store(k->dx + at, dx);
                    store(k->ddt + at, ddt);
                }
            }
            real *total = k->dBC + index_dB(k->states, t0, n);
            store(total, load(total) + sum_lanes(sums));
        }
        UNROLL for (int j = 0; j < GROUP; j++)
            UNROLL for (int r = 0; r < registers; r++) {
                const int at = (n + j) * WIDTH + r * LANES;
                store(k->dh + at, dh[j][r]), store(k->dA + at, dA[j][r]);
            }
    }
}

/* The part of the backward walk that carries dh alone; h, y and the other results are left as they are. */
INLINE void adjoint_core(const ln_tile *k, const int registers, const bool clamp) {
    for (int n = 0; n < k->states; n += GROUP_FORWARD) {
        vec A[GROUP_FORWARD][REGISTERS], dh[GROUP_FORWARD][REGISTERS];
        UNROLL for (int j = 0; j < GROUP_FORWARD; j++)
            UNROLL for (int r = 0; r < registers; r++) {
                A[j][r] = load(k->A + (n + j) * WIDTH + r * LANES);
                dh[j][r] = load(k->dh + (n + j) * WIDTH + r * LANES);
            }
        for (int t = k->tokens - 1; t >= 0; t--)
            UNROLL for (int r = 0; r < registers; r++) {
                const vec dt = load(k->dt + t * WIDTH + r * LANES), gy = load(k->gy + t * WIDTH + r * LANES);
                UNROLL for (int j = 0; j < GROUP_FORWARD; j++)
                    dh[j][r] = exp2_of(dt * A[j][r], clamp) * (dh[j][r] + k->C[t * k->states + n + j] * gy);
            }
        UNROLL for (int j = 0; j < GROUP_FORWARD; j++)
            UNROLL for (int r = 0; r < registers; r++) store(k->dh + (n + j) * WIDTH + r * LANES, dh[j][r]);
    }
}

/* One copy of each loop per number of registers, with and without the clamp. */
#define SPECIALISE(function, core)                                              \
    static void function(const ln_tile *k) {                                    \
        if (k->registers == 1) k->clamp ? core(k, 1, true) : core(k, 1, false); \
        else k->clamp ? core(k, REGISTERS, true) : core(k, REGISTERS, false);   \
    }
SPECIALISE(scan_tile, forward_core)
SPECIALISE(scan_tile_backward, backward_core)
SPECIALISE(scan_tile_adjoint, adjoint_core)

#endif
