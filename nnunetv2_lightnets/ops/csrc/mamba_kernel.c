/* A whole Mamba layer in one walk over the tokens, see ln_mamba.
 *
 * A task takes a run of tokens from the first norm to the last projection; nothing of it leaves the caches but the result.
 * Runs are handed out from the first to the last, those of all images in turn. What a run needs of the one before it is
 * the scan's state, block of channels by block of channels: a thread waits for each until the run before has left it, so
 * threads follow one another through the blocks.
 *
 * Backward, runs are handed out from the last to the first. A run is computed again from the state before it; what is
 * handed on is the gradient of that state, and that of the first tokens after the run, which the convolution reaches back
 * from. Gradients of weights are summed in slots: a run adds to slot (its number mod slots) after the run that did so
 * before, so the order of additions, and with it the result, does not depend on who is faster.
 */
#include <math.h>
#include <stdlib.h>

#include "product.h"
#include "scan_rows.h"

enum { TILES = 7 };
enum { DECAY = LN_CHUNK * GROUP_BACKWARD * LANES, HISTORY = DECAY + GROUP_BACKWARD * LANES };

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t fill_up(int64_t n) { return divide_up(n, WIDTH) * WIDTH; }

/* Hands out parts of a piece of memory; without one it only counts. */
typedef struct {
    char *base;
    size_t used;
} arena;

static void *take(arena *a, int64_t items, size_t size) {
    void *at = a->base ? a->base + a->used : NULL;
    a->used += ((size_t)items * size + 63) / 64 * 64;
    return at;
}
static real *take_reals(arena *a, int64_t count) { return take(a, count, sizeof(real)); }

/* Sums for the gradients of the parameters, rows filled up. */
typedef struct {
    real *in_u, *in_z, *conv, *conv_bias; /* (inner, channels) twice, (width, inner), (inner) */
    real *x, *dt;                         /* (coefficients, inner), (inner, rank) */
    real *A, *D, *dt_bias;                /* (blocks, states, WIDTH), (inner) twice */
    real *out, *proj, *proj_bias;         /* (channels, inner), (outputs, channels), (outputs) */
    real *norm_weight, *norm_bias, *skip; /* (channels) each */
    real *group;                          /* (batch, 2, channels): of g, and of g times the normalised tokens */
} sums;

/* The same for what is added up token by token: of one run first, so that no sum of floats gets too long. */
typedef struct {
    real *norm_weight, *norm_bias, *skip, *group, *proj_bias; /* (channels) .., (2, channels), (outputs) */
} run_sums;

typedef struct {
    const ln_mamba *l;
    int64_t runs, blocks, slots;
    int states;                            /* a multiple of STATE_PADDING */
    int64_t C, D, O, K, R;                 /* channels, inner, outputs, coefficients (dt, B, C), rank: filled up */
    panels in_u, in_z, x, dt, out, proj;   /* weights, transposed: (inputs, outputs) */
    panels in_back, x_back, dt_back, out_back, proj_back; /* as they are */
    real *A, *skip_D, *dt_bias, *steepest; /* (blocks, states, WIDTH), (inner) twice, (blocks) */
    real *conv, *conv_bias;                /* (width, inner), (inner) */
    real *norm_weight, *norm_bias, *is_channel, *proj_bias; /* is_channel: 1, and 0 where filled up */
    real *middle, *rstd, *scale, *group_bias; /* (batch, channels): x = relu((token - middle) scale + group_bias) */
    real *state;                           /* (batch, blocks, states, WIDTH): h or dh between two runs */
    real *reach;                           /* (batch, width - 1, inner): gradients of the tokens after a run */
    ln_count *scanned, *convolved, *added; /* (batch, blocks), (batch), (slots): runs that are done */
    sums *sums;                            /* (slots) */
    double *moments;                       /* (batch, parts, channels, 2), see measure_part */
} plan;

enum { PART = 1024 }; /* tokens whose moments are taken together */

/* ---- Set up ---- */

static void lay_out_sums(const plan *p, sums *s, arena *a) {
    const ln_mamba *l = p->l;
    s->in_u = take_reals(a, l->inner * p->C), s->in_z = take_reals(a, l->inner * p->C);
    s->conv = take_reals(a, l->width * p->D), s->conv_bias = take_reals(a, p->D);
    s->x = take_reals(a, p->K * p->D), s->dt = take_reals(a, l->inner * p->R);
    s->A = take_reals(a, p->D * p->states), s->D = take_reals(a, p->D), s->dt_bias = take_reals(a, p->D);
    s->out = take_reals(a, l->channels * p->D);
    s->proj = take_reals(a, l->outputs * p->C), s->proj_bias = take_reals(a, p->O);
    s->norm_weight = take_reals(a, p->C), s->norm_bias = take_reals(a, p->C), s->skip = take_reals(a, p->C);
    s->group = take_reals(a, l->batch * 2 * p->C);
}

static panels take_panels(arena *a, int64_t depth, int64_t columns) {
    return (panels){take_reals(a, panel_numbers(depth, columns)), PANEL, depth * PANEL};
}

static void lay_out_plan(plan *p, bool backward, arena *a) {
    const ln_mamba *l = p->l;
    p->in_u = take_panels(a, l->channels, l->inner), p->in_z = take_panels(a, l->channels, l->inner);
    p->x = take_panels(a, l->inner, p->K), p->dt = take_panels(a, l->rank, l->inner);
    p->out = take_panels(a, l->inner, l->channels);
    if (l->proj_weight) p->proj = take_panels(a, l->channels, l->outputs);
    p->A = take_reals(a, p->D * p->states), p->skip_D = take_reals(a, p->D), p->dt_bias = take_reals(a, p->D);
    p->steepest = take_reals(a, p->blocks);
    p->conv = take_reals(a, l->width * p->D), p->conv_bias = take_reals(a, p->D);
    p->norm_weight = take_reals(a, p->C), p->norm_bias = take_reals(a, p->C), p->is_channel = take_reals(a, p->C);
    p->proj_bias = take_reals(a, p->O);
    p->middle = take_reals(a, l->batch * p->C), p->rstd = take_reals(a, l->batch * p->C);
    p->scale = take_reals(a, l->batch * p->C), p->group_bias = take_reals(a, l->batch * p->C);
    p->state = take_reals(a, l->batch * p->D * p->states);
    p->scanned = take(a, l->batch * p->blocks, sizeof(ln_count));
    p->convolved = take(a, l->batch, sizeof(ln_count));
    p->moments = take(a, l->batch * divide_up(l->length, PART) * l->channels * 2, sizeof(double));
    if (!backward) return;
    p->in_back = take_panels(a, 2 * l->inner, l->channels), p->x_back = take_panels(a, p->K, l->inner);
    p->dt_back = take_panels(a, l->inner, l->rank), p->out_back = take_panels(a, l->channels, l->inner);
    if (l->proj_weight) p->proj_back = take_panels(a, l->outputs, l->channels);
    p->reach = take_reals(a, l->batch * l->width * p->D);
    p->added = take(a, p->slots, sizeof(ln_count));
    p->sums = take(a, p->slots, sizeof(sums));
    for (int64_t slot = 0; slot < p->slots; slot++) {
        sums s;
        lay_out_sums(p, &s, a);
        if (a->base) p->sums[slot] = s;
    }
}

/* Row of x_weight behind coefficient j; -1 where dt, B or C is filled up. */
static int64_t row_of_coefficient(const plan *p, int64_t j) {
    const ln_mamba *l = p->l;
    if (j < p->R) return j < l->rank ? j : -1;
    const int64_t which = (j - p->R) / p->states, n = (j - p->R) % p->states;
    return which < 2 && n < l->states ? l->rank + which * l->states + n : -1;
}

static void read_weights(plan *p, bool backward) {
    const ln_mamba *l = p->l;
    const int64_t C = l->channels, D = l->inner, R = l->rank;
    const real *in = l->in_weight, *dt = l->dt_weight, *out = l->out_weight, *proj = l->proj_weight;
    pack((real *)p->in_u.base, C, 0, in, C, D, 1, C), pack((real *)p->in_z.base, C, 0, in + D * C, C, D, 1, C);
    pack((real *)p->dt.base, R, 0, dt, R, D, 1, R), pack((real *)p->out.base, D, 0, out, D, C, 1, D);
    if (proj) pack((real *)p->proj.base, C, 0, proj, C, l->outputs, 1, C);
    if (backward) {
        pack((real *)p->in_back.base, 2 * D, 0, in, 2 * D, C, C, 1);
        pack((real *)p->dt_back.base, D, 0, dt, D, R, R, 1), pack((real *)p->out_back.base, C, 0, out, C, D, D, 1);
        if (proj) pack((real *)p->proj_back.base, l->outputs, 0, proj, l->outputs, C, C, 1);
    }
    for (int64_t j = 0; j < p->K; j++) {
        const int64_t row = row_of_coefficient(p, j);
        if (row < 0) continue;
        const real *weight = (const real *)l->x_weight + row * D;
        pack((real *)p->x.base, D, j, weight, D, 1, 1, 0);
        if (backward) pack((real *)p->x_back.base + j * PANEL, p->K, 0, weight, 1, D, 0, 1);
    }
    for (int64_t d = 0; d < D; d++) {
        real *steepest = &p->steepest[d / WIDTH];
        for (int64_t n = 0; n < l->states; n++) {
            const real a = ((const real *)l->A)[d * l->states + n] * (real)LOG2_E, size = a < 0 ? -a : a;
            p->A[(d / WIDTH * p->states + n) * WIDTH + d % WIDTH] = a;
            if (!(size <= *steepest)) *steepest = size;
        }
        for (int64_t k = 0; k < l->width; k++) p->conv[k * p->D + d] = ((const real *)l->conv_weight)[d * l->width + k];
    }
    memcpy(p->skip_D, l->D, sizeof(real) * (size_t)D);
    memcpy(p->dt_bias, l->dt_bias, sizeof(real) * (size_t)D);
    memcpy(p->conv_bias, l->conv_bias, sizeof(real) * (size_t)D);
    for (int64_t c = 0; c < C; c++) {
        p->is_channel[c] = 1;
        if (l->norm_weight) p->norm_weight[c] = ((const real *)l->norm_weight)[c];
        if (l->norm_weight) p->norm_bias[c] = ((const real *)l->norm_bias)[c];
    }
    if (l->proj_bias) memcpy(p->proj_bias, l->proj_bias, sizeof(real) * (size_t)l->outputs);
}

/* ---- Group norm: its moments, merged from those of parts and channels (Chan et al., 1983) ---- */

/* Mean and sum of squared distances from it of each channel in a part of the tokens. */
static void measure_part(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_mamba *l = p->l;
    const int64_t parts = divide_up(l->length, PART), b = task / parts, part = task % parts, C = l->channels;
    const int64_t first = part * PART, count = l->length - first < PART ? l->length - first : PART;
    const real *tokens = (const real *)l->tokens + (b * l->length + first) * C;
    double *result = p->moments + task * C * 2;
    real *mean = scratch, *squares = mean + C, *missed = squares + C; /* missed: by the mean, which is a long sum */
    memset(mean, 0, sizeof(real) * (size_t)C * 3);
    for (int64_t t = 0; t < count; t++)
        for (int64_t c = 0; c < C; c++) mean[c] += tokens[t * C + c];
    for (int64_t c = 0; c < C; c++) mean[c] /= (real)count;
    for (int64_t t = 0; t < count; t++)
        for (int64_t c = 0; c < C; c++) {
            const real distance = tokens[t * C + c] - mean[c];
            squares[c] += distance * distance;
            missed[c] += distance;
        }
    for (int64_t c = 0; c < C; c++)
        result[2 * c] = (double)mean[c] + (double)missed[c] / (double)count, result[2 * c + 1] = squares[c];
}

static int find_moments(const plan *p) {
    const ln_mamba *l = p->l;
    const int64_t parts = divide_up(l->length, PART), per_group = l->channels / l->groups;
    const int status = ln_parallel(l->threads, l->batch * parts, 3 * sizeof(real) * (size_t)l->channels, measure_part, p);
    if (status) return status;
    for (int64_t b = 0; b < l->batch; b++)
        for (int64_t g = 0; g < l->groups; g++) {
            double count = 0, mean = 0, squares = 0;
            for (int64_t part = 0; part < parts; part++)
                for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) {
                    const double *more = p->moments + ((b * parts + part) * l->channels + c) * 2;
                    const double n = (double)(part < parts - 1 ? PART : l->length - part * PART), apart = more[0] - mean;
                    squares += more[1] + apart * apart * count * n / (count + n);
                    mean += apart * n / (count + n), count += n;
                }
            real *moments = (real *)l->moments + (b * l->groups + g) * 2;
            moments[0] = (real)mean, moments[1] = (real)(1 / sqrt(squares / count + l->group_eps));
        }
    return LN_OK;
}

/* The group norm of each channel; tokens are centred first, so that a large mean costs no digits. */
static void find_scale(const plan *p) {
    const ln_mamba *l = p->l;
    const int64_t per_group = l->channels / l->groups;
    for (int64_t b = 0; b < l->batch; b++)
        for (int64_t c = 0; c < l->channels; c++) {
            const real *moments = (const real *)l->moments + (b * l->groups + c / per_group) * 2;
            const int64_t at = b * p->C + c;
            p->middle[at] = moments[0], p->rstd[at] = moments[1];
            p->scale[at] = moments[1] * ((const real *)l->group_weight)[c];
            p->group_bias[at] = ((const real *)l->group_bias)[c];
        }
}

/* ---- A run ---- */

typedef struct {
    int64_t b, index, first;
    int tokens, before; /* before: tokens that the convolution reaches back to, at most width - 1 */
    int chunks;
} run;

static run run_of(const plan *p, int64_t b, int64_t index) {
    const ln_mamba *l = p->l;
    const int64_t first = index * l->run, left = l->length - first, reach = l->width - 1;
    run r = {.b = b, .index = index, .first = first};
    r.tokens = (int)(left < l->run ? left : l->run);
    r.before = (int)(first < reach ? first : reach);
    r.chunks = (int)divide_up(r.tokens, LN_CHUNK);
    return r;
}

static int tokens_of_chunk(const run *r, int chunk) {
    const int left = r->tokens - chunk * LN_CHUNK;
    return left < LN_CHUNK ? left : LN_CHUNK;
}

/* Activations of a run, rows of tokens. Where it says "before", row width - 1 + t is token t. */
typedef struct {
    int64_t c, d, o, k;            /* from one row to the next: channels, inner, outputs, coefficients */
    real *x, *n, *r;               /* channels; x and n before: the layer's input, its norm; m + skip_scale x */
    real *mean, *rstd, *mean2, *rstd2; /* of both layer norms */
    real *u_in, *u, *z, *delta, *y; /* inner; u_in before; y gated */
    real *coefficients;            /* dt, B, C */
    real *result;                  /* outputs */
    real *tile[TILES];
    int64_t at_d[LN_CHUNK];        /* where rows of inner channels begin */
    /* The backward pass alone. */
    real *scanned;                 /* y as it was before the gate; then dz */
    real *dy;                      /* inner, width - 1 rows more: gradient of y, then of u, then of u_in */
    real *dr, *dn, *token;         /* channels; token: one row */
    run_sums sums;
    real *dcoefficients, *dBC, *starts, *h, *history, *decay; /* starts: (blocks, chunks, states, WIDTH) */
} activations;

static void lay_out_run(const plan *p, bool backward, activations *m, arena *a) {
    const ln_mamba *l = p->l;
    const int64_t rows = l->run, before = rows + l->width - 1;
    /* One vector more, or rows of 4 KB would all meet in the same few lines of the cache. */
    m->c = p->C + LANES, m->d = p->D + LANES, m->o = p->O + LANES, m->k = p->K + LANES;
    m->x = take_reals(a, before * m->c), m->n = take_reals(a, before * m->c);
    m->mean = take_reals(a, before + LANES), m->rstd = take_reals(a, before + LANES);
    m->mean2 = take_reals(a, rows + LANES), m->rstd2 = take_reals(a, rows + LANES);
    m->u_in = take_reals(a, before * m->d), m->u = take_reals(a, rows * m->d), m->z = take_reals(a, rows * m->d);
    m->delta = take_reals(a, rows * m->d);
    m->coefficients = take_reals(a, (rows + TOKENS_BACKWARD) * m->k);
    for (int i = 0; i < TILES; i++) m->tile[i] = take_reals(a, TILE);
    m->result = take_reals(a, rows * m->o);
    m->y = m->delta, m->r = m->n;
    if (!backward) return;
    m->y = take_reals(a, rows * m->d), m->scanned = take_reals(a, rows * m->d), m->r = take_reals(a, rows * m->c);
    m->dy = take_reals(a, before * m->d);
    m->dr = take_reals(a, rows * m->c), m->dn = take_reals(a, rows * m->c), m->token = take_reals(a, p->C);
    m->dcoefficients = take_reals(a, (rows + TOKENS_BACKWARD) * m->k);
    m->dBC = take_reals(a, rows * 2 * p->states);
    m->starts = take_reals(a, p->D * p->states * (rows / LN_CHUNK));
    m->sums.norm_weight = take_reals(a, p->C), m->sums.norm_bias = take_reals(a, p->C), m->sums.skip = take_reals(a, p->C);
    m->sums.group = take_reals(a, 2 * p->C), m->sums.proj_bias = take_reals(a, p->O);
    m->h = take_reals(a, p->states * WIDTH), m->history = take_reals(a, HISTORY), m->decay = take_reals(a, DECAY);
}

static activations lay_out(const plan *p, bool backward, void *scratch) {
    activations m;
    arena a = {scratch, 0};
    lay_out_run(p, backward, &m, &a);
    for (int t = 0; t < LN_CHUNK; t++) m.at_d[t] = t * m.d;
    return m;
}

static size_t scratch_bytes(const plan *p, bool backward) {
    activations m;
    arena a = {0};
    lay_out_run(p, backward, &m, &a);
    return a.used;
}

static block block_of(const plan *p, int64_t b, int64_t index, const sums *s) {
    const int64_t matrix = index * p->states * WIDTH, row = index * WIDTH;
    block k = {.channel = row, .channels = WIDTH, .registers = REGISTERS, .steepest = p->steepest[index]};
    k.A = p->A + matrix, k.D = p->skip_D + row, k.bias = p->dt_bias + row;
    k.state = p->state + b * p->D * p->states + matrix;
    if (s) k.dA = s->A + matrix, k.dD = s->D + row, k.dbias = s->dt_bias + row;
    return k;
}

/* The state before a run, (states, inner) in memory. */
static void keep_state(const plan *p, const run *r, const block *k, real *state, bool write) {
    const ln_mamba *l = p->l;
    const int64_t left = l->inner - k->channel;
    const size_t bytes = sizeof(real) * (size_t)(left < WIDTH ? left : WIDTH);
    real *kept = (real *)l->run_states + (r->b * p->runs + r->index) * l->states * l->inner + k->channel;
    for (int64_t n = 0; n < l->states; n++, kept += l->inner) {
        if (write) memcpy(kept, state + n * WIDTH, bytes);
        else memcpy(state + n * WIDTH, kept, bytes);
    }
}

/* ---- Forward ---- */

/* Layer norm of rows; also their mean and reciprocal deviation. */
static void layer_norm(const plan *p, real *out, real *mean, real *rstd, const real *x, int64_t row, int rows) {
    const int64_t C = p->C;
    const real share = 1 / (real)p->l->channels;
    for (int first = 0; first < rows; first += LANES) {
        const int count = rows - first < LANES ? rows - first : LANES;
        vec partial[LANES];
        for (int i = 0; i < LANES; i++) {
            const real *from = x + (first + (i < count ? i : 0)) * row;
            partial[i] = splat(0);
            for (int64_t c = 0; c < C; c += LANES) partial[i] += load(from + c);
        }
        store_loose(mean + first, sum_lanes(partial) * share);
        for (int i = 0; i < LANES; i++) {
            const real *from = x + (first + (i < count ? i : 0)) * row;
            const vec middle = splat(mean[first + i]);
            partial[i] = splat(0);
            for (int64_t c = 0; c < C; c += LANES) {
                const vec apart = (load(from + c) - middle) * load(p->is_channel + c);
                partial[i] += apart * apart;
            }
        }
        store_loose(rstd + first, sum_lanes(partial) * share);
        for (int i = 0; i < LANES; i++) rstd[first + i] = 1 / (real)sqrt(rstd[first + i] + (real)p->l->norm_eps);
        for (int i = 0; i < count; i++) {
            const real *from = x + (first + i) * row;
            real *to = out + (first + i) * row;
            const vec middle = splat(mean[first + i]), scale = splat(rstd[first + i]);
            for (int64_t c = 0; c < C; c += LANES)
                store(to + c, (load(from + c) - middle) * scale * load(p->norm_weight + c) + load(p->norm_bias + c));
        }
    }
}

/* A token's channels, filled up with zeros. */
static void read_token(real *row, const void *tokens, int64_t channels, int64_t filled, int64_t index) {
    memcpy(row, (const real *)tokens + index * channels, sizeof(real) * (size_t)channels);
    if (filled > channels) memset(row + channels, 0, sizeof(real) * (size_t)(filled - channels));
}

/* s before SiLU of vectors from `d` on; x is row t of u_in. */
INLINE vec convolve(const plan *p, const real *x, int64_t row, int64_t d, const int width) {
    vec s = load(p->conv_bias + d);
    UNROLL for (int k = 0; k < width; k++) s += load(p->conv + k * p->D + d) * load(x + k * row + d);
    return s;
}

INLINE void convolve_run(const plan *p, const activations *m, const run *r, const int width) {
    for (int t = 0; t < r->tokens; t++)
        for (int64_t d = 0; d < p->D; d += LANES) {
            const vec s = convolve(p, m->u_in + t * m->d, m->d, d, width);
            store(m->u + t * m->d + d, s * sigmoid_from(s, folded_exp(s)));
        }
}

/* From the tokens to what the scan reads: x, n, u_in, z, u, coefficients, delta. */
static void before_scan(const plan *p, const activations *m, const run *r) {
    const ln_mamba *l = p->l;
    const int reach = (int)l->width - 1, missing = reach - r->before, rows = r->before + r->tokens;
    real *const x = m->x + missing * m->c, *const n = m->n + missing * m->c, *const u_in = m->u_in + missing * m->d;
    const real *middle = p->middle + r->b * p->C, *scale = p->scale + r->b * p->C, *bias = p->group_bias + r->b * p->C;
    for (int t = 0; t < rows; t++) {
        real *row = x + t * m->c;
        read_token(row, l->tokens, l->channels, p->C, r->b * l->length + r->first - r->before + t);
        if (l->group_weight)
            for (int64_t c = 0; c < p->C; c += LANES)
                store(row + c, at_least((load(row + c) - load(middle + c)) * load(scale + c) + load(bias + c), splat(0)));
    }
    const real *input = x;
    if (l->norm_weight) layer_norm(p, n, m->mean + missing, m->rstd + missing, x, m->c, rows), input = n;
    const factor tokens = {input + r->before * m->c, m->c, 1};
    if (missing) memset(m->u_in, 0, sizeof(real) * (size_t)(missing * m->d));
    product(u_in, m->d, (factor){input, m->c, 1}, p->in_u, rows, l->inner, (int)l->channels, false);
    product(m->z, m->d, tokens, p->in_z, r->tokens, l->inner, (int)l->channels, false);
    if (l->width == 4) convolve_run(p, m, r, 4);
    else convolve_run(p, m, r, (int)l->width);
    product(m->coefficients, m->k, (factor){m->u, m->d, 1}, p->x, r->tokens, p->K, (int)l->inner, false);
    product(m->delta, m->d, (factor){m->coefficients, m->k, 1}, p->dt, r->tokens, l->inner, (int)l->rank, false);
}

static rows rows_at(const activations *m, real *base, int chunk, const block *k) {
    return (rows){base + chunk * LN_CHUNK * m->d + k->channel, m->at_d, m->at_d};
}

/* y = (y + D u) z sigmoid(z); before the gate it is written to `scanned`, too, where that is asked for. */
static void close_scan(const activations *m, int chunk, const block *k, const real *y, real *gate, int tokens) {
    const int64_t first = chunk * LN_CHUNK * m->d + k->channel;
    open_gate(gate, rows_at(m, m->z, chunk, k), k, tokens);
    for (int r = 0; r < k->registers; r++) {
        const vec D = load(k->D + r * LANES);
        for (int t = 0; t < tokens; t++) {
            const int64_t at = first + t * m->d + r * LANES;
            const vec v = load(y + t * WIDTH + r * LANES) + D * load(m->u + at);
            if (m->scanned) store(m->scanned + at, v);
            store(m->y + at, v * load(m->z + at) * load(gate + t * WIDTH + r * LANES));
        }
    }
}

/* The scan of a block of channels over a run, from k->state on; states at the chunks' starts go to `starts`. */
static void scan_run(const plan *p, const activations *m, const run *r, const block *k, real *starts) {
    for (int chunk = 0; chunk < r->chunks; chunk++) {
        const int tokens = tokens_of_chunk(r, chunk);
        const real *B = m->coefficients + chunk * LN_CHUNK * m->k + p->R, *C = B + p->states;
        real *const dt = m->tile[0], *const x = m->tile[1], *const y = m->tile[2];
        if (starts) memcpy(starts + chunk * p->states * WIDTH, k->state, sizeof(real) * (size_t)(p->states * WIDTH));
        const real most = prepare(dt, x, NULL, rows_at(m, m->delta, chunk, k), rows_at(m, m->u, chunk, k), k, tokens, true);
        scan_tile(&(ln_tile){.tokens = tokens, .states = p->states, .row = m->k, .registers = k->registers,
                             .clamp = may_leave_range(most, k), .A = k->A, .dt = dt, .x = x, .B = B, .C = C,
                             .h = k->state, .y = y});
        close_scan(m, chunk, k, y, m->tile[3], tokens);
    }
}

/* From y to what is projected: m in r, or r = m + skip_scale x, and its norm, if there is one, in `normalised`. */
static void after_scan(const plan *p, const activations *m, const run *r, real *normalised) {
    const ln_mamba *l = p->l;
    product(m->r, m->c, (factor){m->y, m->d, 1}, p->out, r->tokens, l->channels, (int)l->inner, false);
    if (!l->proj_weight) return;
    const vec skip = splat(*(const real *)l->skip_scale);
    for (int t = 0; t < r->tokens; t++) {
        real *row = m->r + t * m->c;
        const real *x = m->x + (l->width - 1 + t) * m->c;
        for (int64_t c = 0; c < p->C; c += LANES) store(row + c, load(row + c) + skip * load(x + c));
    }
    if (l->norm_weight) layer_norm(p, normalised, m->mean2, m->rstd2, m->r, m->c, r->tokens);
}

static void forward_task(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_mamba *l = p->l;
    const run r = run_of(p, task % l->batch, task / l->batch);
    activations m = lay_out(p, false, scratch);
    m.scanned = NULL;
    before_scan(p, &m, &r);
    for (int64_t i = 0; i < p->blocks; i++) {
        ln_count *scanned = &p->scanned[r.b * p->blocks + i];
        const block k = block_of(p, r.b, i, NULL);
        ln_wait(scanned, r.index);
        if (l->run_states) keep_state(p, &r, &k, k.state, true);
        scan_run(p, &m, &r, &k, NULL);
        atomic_store_explicit(scanned, r.index + 1, memory_order_release);
    }
    after_scan(p, &m, &r, m.r);
    real *rows = m.r;
    int64_t row = m.c;
    if (l->proj_weight) {
        product(m.result, m.o, (factor){m.r, m.c, 1}, p->proj, r.tokens, l->outputs, (int)l->channels, false);
        rows = m.result, row = m.o;
        for (int t = 0; t < r.tokens; t++)
            for (int64_t c = 0; c < p->O; c += LANES) store(rows + t * row + c, load(rows + t * row + c) + load(p->proj_bias + c));
    }
    real *out = (real *)l->out + (r.b * l->length + r.first) * l->outputs;
    for (int t = 0; t < r.tokens; t++) memcpy(out + t * l->outputs, rows + t * row, sizeof(real) * (size_t)l->outputs);
}

/* ---- Backward ---- */

/* dx from the gradient of a layer norm's result, and what that adds to the norm's parameters. `rows` of x and dx. */
static void layer_norm_backward(const plan *p, real *dx, const real *grad, const real *mean, const real *rstd, const real *x,
                                int64_t row, int rows, const run_sums *s) {
    const int64_t C = p->C;
    const real share = 1 / (real)p->l->channels;
    for (int first = 0; first < rows; first += LANES) {
        const int count = rows - first < LANES ? rows - first : LANES;
        vec plain[LANES], slanted[LANES];
        for (int i = 0; i < LANES; i++) {
            plain[i] = slanted[i] = splat(0);
            if (i >= count) continue;
            const int64_t at = (first + i) * row;
            const vec middle = splat(mean[first + i]), scale = splat(rstd[first + i]);
            for (int64_t c = 0; c < C; c += LANES) {
                const vec g = load(grad + at + c), normal = (load(x + at + c) - middle) * scale, w = g * load(p->norm_weight + c);
                store(s->norm_bias + c, load(s->norm_bias + c) + g);
                store(s->norm_weight + c, load(s->norm_weight + c) + g * normal);
                plain[i] += w;
                slanted[i] += w * normal;
            }
        }
        real offset[LANES] __attribute__((aligned(64))), slope[LANES] __attribute__((aligned(64)));
        store(offset, sum_lanes(plain) * share), store(slope, sum_lanes(slanted) * share);
        for (int i = 0; i < count; i++) {
            const int64_t at = (first + i) * row;
            const vec middle = splat(mean[first + i]), scale = splat(rstd[first + i]);
            for (int64_t c = 0; c < C; c += LANES) {
                const vec normal = (load(x + at + c) - middle) * scale, w = load(grad + at + c) * load(p->norm_weight + c);
                store(dx + at + c, (w - offset[i] - normal * slope[i]) * scale * load(p->is_channel + c));
            }
        }
    }
}

/* From the gradient of the result to that of y (dy) and of r (dr). */
static void after_scan_backward(const plan *p, const activations *m, const run *r, const sums *s) {
    const ln_mamba *l = p->l;
    real *const normalised = l->norm_weight ? m->dn : m->r, *const grad = m->result;
    after_scan(p, m, r, normalised);
    for (int t = 0; t < r->tokens; t++)
        read_token(l->proj_weight ? grad + t * m->o : m->dr + t * m->c, l->grad_out, l->outputs, l->proj_weight ? p->O : p->C,
                   r->b * l->length + r->first + t);
    if (l->proj_weight) {
        for (int t = 0; t < r->tokens; t++)
            for (int64_t c = 0; c < p->O; c += LANES) store(m->sums.proj_bias + c, load(m->sums.proj_bias + c) + load(grad + t * m->o + c));
        product(s->proj, p->C, (factor){grad, 1, m->o}, as_panels(normalised, m->c), (int)l->outputs, l->channels, r->tokens, true);
        product(m->dr, m->c, (factor){grad, m->o, 1}, p->proj_back, r->tokens, l->channels, (int)l->outputs, false);
        if (l->norm_weight) layer_norm_backward(p, m->dr, m->dr, m->mean2, m->rstd2, m->r, m->c, r->tokens, &m->sums);
        for (int t = 0; t < r->tokens; t++)
            for (int64_t c = 0; c < p->C; c += LANES)
                store(m->sums.skip + c, load(m->sums.skip + c) + load(m->dr + t * m->c + c) * load(m->x + (l->width - 1 + t) * m->c + c));
    }
    product(s->out, p->D, (factor){m->dr, 1, m->c}, as_panels(m->y, m->d), (int)l->channels, l->inner, r->tokens, true);
    product(m->dy, m->d, (factor){m->dr, m->c, 1}, p->out_back, r->tokens, l->inner, (int)l->channels, false);
}

/* The scan of a block of channels over a run, backwards: dy becomes du, delta its gradient, scanned dz. */
static void scan_run_backward(const plan *p, const activations *m, const run *r, const block *k, const real *starts) {
    real *const dt = m->tile[0], *const x = m->tile[1], *const gy = m->tile[2], *const gate = m->tile[3], *const dx = m->tile[4],
         *const ddt = m->tile[5], *const slope = m->tile[6];
    for (int chunk = r->chunks - 1; chunk >= 0; chunk--) {
        const int tokens = tokens_of_chunk(r, chunk), count = (int)divide_up(tokens, TOKENS_BACKWARD) * TOKENS_BACKWARD;
        const real *B = m->coefficients + chunk * LN_CHUNK * m->k + p->R, *C = B + p->states;
        const rows u = rows_at(m, m->u, chunk, k), z = rows_at(m, m->z, chunk, k), dy = rows_at(m, m->dy, chunk, k),
                   delta = rows_at(m, m->delta, chunk, k), dz = rows_at(m, m->scanned, chunk, k);
        open_gate(gate, z, k, tokens);
        gradient_of_y(gy, gate, dy, z, k, tokens);
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < k->registers; i++) row_store(dz, t, i, row_load(dz, t, i) * load(gate + t * WIDTH + i * LANES));
        const real most = prepare(dt, x, slope, delta, u, k, tokens, true);
        zero_rows(dt, tokens, count), zero_rows(x, tokens, count), zero_rows(gy, tokens, count);
        memcpy(m->h, starts + chunk * p->states * WIDTH, sizeof(real) * (size_t)(p->states * WIDTH));
        scan_tile_backward(&(ln_tile){.tokens = count, .states = p->states, .row = m->k, .registers = k->registers,
                                      .clamp = may_leave_range(most, k), .A = k->A, .dt = dt, .x = x, .B = B, .C = C, .h = m->h,
                                       .gy = gy, .dh = k->state, .dx = dx, .ddt = ddt,
                                      .dA = k->dA, .dBC = m->dBC + chunk * LN_CHUNK * 2 * p->states, .history = m->history,
                                      .decay = m->decay});
        finish_backward(&(walked){.dx = dx, .ddt = ddt, .dt = dt, .gy = gy, .slope = slope, .u = u, .du = dy, .ddelta = delta},
                        k, tokens);
    }
}

/* ds, the gradient before SiLU, from du in dy; sums for the convolution's weights; then dy becomes the gradient of u_in.
 * The width - 1 rows after the run's in dy are ds of the tokens that follow. */
INLINE void convolve_run_backward(const plan *p, const activations *m, const run *r, const sums *sum, const int width) {
    for (int64_t d = 0; d < p->D; d += LANES) {
        vec bias = splat(0);
        for (int t = 0; t < r->tokens; t++) {
            const vec s = convolve(p, m->u_in + t * m->d, m->d, d, width), gate = sigmoid_from(s, folded_exp(s));
            real *at = m->dy + t * m->d + d;
            const vec ds = load(at) * gate * (1 + s * (1 - gate));
            store(at, ds);
            bias += ds;
        }
        store(sum->conv_bias + d, load(sum->conv_bias + d) + bias);
        for (int k = 0; k < width; k++) {
            vec weight = splat(0);
            for (int t = 0; t < r->tokens; t++) weight += load(m->dy + t * m->d + d) * load(m->u_in + (t + k) * m->d + d);
            store(sum->conv + k * p->D + d, load(sum->conv + k * p->D + d) + weight);
        }
    }
}

INLINE void reach_back(const plan *p, const activations *m, const run *r, const int width) {
    for (int t = 0; t < r->tokens; t++)
        for (int64_t d = 0; d < p->D; d += LANES) {
            vec sum = splat(0);
            UNROLL for (int k = 0; k < width; k++)
                sum += load(p->conv + (width - 1 - k) * p->D + d) * load(m->dy + (t + k) * m->d + d);
            store(m->dy + t * m->d + d, sum);
        }
}

/* Takes ds of the tokens after the run from the run that has them, and leaves its own first ones. */
static void hand_on_reach(const plan *p, const activations *m, const run *r) {
    const int reach = (int)p->l->width - 1;
    const size_t row = sizeof(real) * (size_t)p->D;
    real *handed = p->reach + r->b * p->l->width * p->D;
    ln_count *convolved = &p->convolved[r->b];
    ln_wait(convolved, p->runs - 1 - r->index);
    for (int t = 0; t < reach; t++) memcpy(m->dy + (r->tokens + t) * m->d, handed + t * p->D, row);
    for (int t = 0; t < reach; t++) memcpy(handed + t * p->D, m->dy + t * m->d, row);
    atomic_store_explicit(convolved, p->runs - r->index, memory_order_release);
}

/* From the gradients of u, z, delta and coefficients to that of the layer norm's result, in dn. */
static void before_scan_backward(const plan *p, const activations *m, const run *r, const sums *s) {
    const ln_mamba *l = p->l;
    const int tokens = r->tokens, inner = (int)l->inner, width = (int)l->width;
    real *const ddelta = m->delta, *const dz = m->scanned;
    const int coefficients = (int)p->R + 2 * p->states;
    const real *input = (l->norm_weight ? m->n : m->x) + (width - 1) * m->c;
    for (int chunk = 0; chunk < r->chunks; chunk++) {
        real *row = m->dcoefficients + chunk * LN_CHUNK * m->k + p->R;
        sort_dBC(m->dBC + chunk * LN_CHUNK * 2 * p->states, row, row + p->states, m->k, p->states, tokens_of_chunk(r, chunk));
    }
    product(s->dt, p->R, (factor){ddelta, 1, m->d}, as_panels(m->coefficients, m->k), inner, l->rank, tokens, true);
    product(m->dcoefficients, m->k, (factor){ddelta, m->d, 1}, p->dt_back, tokens, l->rank, inner, false);
    product(s->x, p->D, (factor){m->dcoefficients, 1, m->k}, as_panels(m->u, m->d), coefficients, l->inner, tokens,
            true);
    product(m->dy, m->d, (factor){m->dcoefficients, m->k, 1}, p->x_back, tokens, l->inner, coefficients, true);
    if (width == 4) convolve_run_backward(p, m, r, s, 4);
    else convolve_run_backward(p, m, r, s, width);
    hand_on_reach(p, m, r);
    if (width == 4) reach_back(p, m, r, 4);
    else reach_back(p, m, r, width);
    const panels tokens_in = as_panels(input, m->c), z_back = {p->in_back.base + inner * PANEL, PANEL, p->in_back.panel};
    product(s->in_u, p->C, (factor){m->dy, 1, m->d}, tokens_in, inner, l->channels, tokens, true);
    product(s->in_z, p->C, (factor){dz, 1, m->d}, tokens_in, inner, l->channels, tokens, true);
    product(m->dn, m->c, (factor){m->dy, m->d, 1}, p->in_back, tokens, l->channels, inner, false);
    product(m->dn, m->c, (factor){dz, m->d, 1}, z_back, tokens, l->channels, inner, true);
}

/* From the gradients of the layer norm's result (dn) and of r (dr) to that of the tokens; where there is a group norm to
 * that of its result before ReLU, which finish_group_norm goes on with. */
static void input_backward(const plan *p, const activations *m, const run *r) {
    const ln_mamba *l = p->l;
    const real *x = m->x + (l->width - 1) * m->c, *rstd = p->rstd + r->b * p->C, *middle = p->middle + r->b * p->C;
    if (l->norm_weight)
        layer_norm_backward(p, m->dn, m->dn, m->mean + l->width - 1, m->rstd + l->width - 1, x, m->c, r->tokens, &m->sums);
    const vec skip = splat(l->proj_weight ? *(const real *)l->skip_scale : 0);
    real *token = m->token, *plain = m->sums.group, *slanted = plain + p->C;
    for (int t = 0; t < r->tokens; t++) {
        const int64_t index = r->b * l->length + r->first + t;
        real *dx = m->dn + t * m->c;
        if (l->proj_weight)
            for (int64_t c = 0; c < p->C; c += LANES) store(dx + c, load(dx + c) + skip * load(m->dr + t * m->c + c));
        if (l->group_weight) {
            read_token(token, l->tokens, l->channels, p->C, index);
            for (int64_t c = 0; c < p->C; c += LANES) {
                const vec g = pick(load(x + t * m->c + c) > 0, load(dx + c), splat(0));
                store(dx + c, g);
                store(plain + c, load(plain + c) + g);
                store(slanted + c, load(slanted + c) + g * (load(token + c) - load(middle + c)) * load(rstd + c));
            }
        }
        memcpy((real *)l->dtokens + index * l->channels, dx, sizeof(real) * (size_t)l->channels);
    }
}

static void add_up(real *restrict to, const real *restrict from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

static void add_run_sums(const plan *p, const run_sums *run, const sums *s, int64_t b) {
    add_up(s->norm_weight, run->norm_weight, p->C), add_up(s->norm_bias, run->norm_bias, p->C);
    add_up(s->skip, run->skip, p->C), add_up(s->proj_bias, run->proj_bias, p->O);
    add_up(s->group + b * 2 * p->C, run->group, 2 * p->C);
}

static void backward_task(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_mamba *l = p->l;
    const int64_t slot = task % p->slots;
    const run r = run_of(p, task % l->batch, p->runs - 1 - task / l->batch);
    const activations m = lay_out(p, true, scratch);
    const sums *s = &p->sums[slot];
    before_scan(p, &m, &r);
    memset(m.coefficients + r.tokens * m.k, 0, sizeof(real) * (size_t)(TOKENS_BACKWARD * m.k));
    memset(m.dBC, 0, sizeof(real) * (size_t)(l->run * 2 * p->states));
    memset(m.sums.norm_weight, 0, (size_t)((char *)(m.sums.proj_bias + p->O) - (char *)m.sums.norm_weight));
    for (int64_t i = 0; i < p->blocks; i++) {
        block k = block_of(p, r.b, i, s);
        k.state = m.h;
        memset(m.h, 0, sizeof(real) * (size_t)(p->states * WIDTH));
        keep_state(p, &r, &k, m.h, false);
        scan_run(p, &m, &r, &k, m.starts + i * r.chunks * p->states * WIDTH);
    }
    ln_wait(&p->added[slot], task / p->slots);
    after_scan_backward(p, &m, &r, s);
    for (int64_t i = 0; i < p->blocks; i++) {
        ln_count *scanned = &p->scanned[r.b * p->blocks + i];
        const block k = block_of(p, r.b, i, s);
        ln_wait(scanned, p->runs - 1 - r.index);
        scan_run_backward(p, &m, &r, &k, m.starts + i * r.chunks * p->states * WIDTH);
        atomic_store_explicit(scanned, p->runs - r.index, memory_order_release);
    }
    before_scan_backward(p, &m, &r, s);
    input_backward(p, &m, &r);
    add_run_sums(p, &m.sums, s, r.b);
    atomic_store_explicit(&p->added[slot], task / p->slots + 1, memory_order_release);
}

/* The part of the group norm's moments in the gradient of the tokens: rstd (w g - mean(w g) - normalised mean(w g normalised)),
 * with means over a group. A task is a part of an image. */
static void finish_group_norm(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_mamba *l = p->l;
    const int64_t parts = divide_up(l->length, PART), b = task / parts, first = task % parts * PART, C = l->channels;
    const int64_t count = l->length - first < PART ? l->length - first : PART, per_group = C / l->groups;
    const real *tokens = (const real *)l->tokens + (b * l->length + first) * C, *weight = l->group_weight;
    const real *middle = p->middle + b * p->C, *rstd = p->rstd + b * p->C;
    const real *plain = p->sums[0].group + b * 2 * p->C, *slanted = plain + p->C;
    real *dtokens = (real *)l->dtokens + (b * l->length + first) * C, *scale = scratch, *shift = scale + C, *slope = shift + C;
    for (int64_t g = 0; g < l->groups; g++) {
        double mean = 0, mean_slanted = 0;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; c++)
            mean += (double)weight[c] * (double)plain[c], mean_slanted += (double)weight[c] * (double)slanted[c];
        const double n = (double)(per_group * l->length);
        for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) {
            scale[c] = rstd[c] * weight[c];
            slope[c] = -rstd[c] * rstd[c] * (real)(mean_slanted / n);
            shift[c] = -rstd[c] * (real)(mean / n);
        }
    }
    for (int64_t t = 0; t < count; t++, tokens += C, dtokens += C)
        for (int64_t c = 0; c < C; c++) dtokens[c] = dtokens[c] * scale[c] + (tokens[c] - middle[c]) * slope[c] + shift[c];
}

/* Adds the slots up in the first. */
static void add_slots(const plan *p) {
    const char *from = (const char *)p->sums[0].in_u;
    const int64_t count = ((const char *)(p->sums[0].group + p->l->batch * 2 * p->C) - from) / (int64_t)sizeof(real);
    for (int64_t slot = 1; slot < p->slots; slot++) add_up(p->sums[0].in_u, p->sums[slot].in_u, count);
}

/* Rows of sums to a dense gradient. */
static void hand_out(void *gradient, const real *sum, int64_t rows, int64_t columns, int64_t row, int64_t first_row) {
    real *to = (real *)gradient + first_row * columns;
    for (int64_t i = 0; i < rows; i++) memcpy(to + i * columns, sum + i * row, sizeof(real) * (size_t)columns);
}

static void hand_out_sums(const plan *p) {
    const ln_mamba *l = p->l;
    const sums *s = p->sums;
    const int64_t C = l->channels, D = l->inner;
    hand_out(l->din_weight, s->in_u, D, C, p->C, 0), hand_out(l->din_weight, s->in_z, D, C, p->C, D);
    for (int64_t j = 0; j < p->K; j++) {
        const int64_t row = row_of_coefficient(p, j);
        if (row >= 0) hand_out(l->dx_weight, s->x + j * p->D, 1, D, p->D, row);
    }
    hand_out(l->ddt_weight, s->dt, D, l->rank, p->R, 0), hand_out(l->ddt_bias, s->dt_bias, 1, D, D, 0);
    hand_out(l->dD, s->D, 1, D, D, 0), hand_out(l->dconv_bias, s->conv_bias, 1, D, D, 0);
    hand_out(l->dout_weight, s->out, C, D, p->D, 0);
    for (int64_t d = 0; d < D; d++) {
        for (int64_t k = 0; k < l->width; k++) ((real *)l->dconv_weight)[d * l->width + k] = s->conv[k * p->D + d];
        for (int64_t n = 0; n < l->states; n++)
            ((real *)l->dA)[d * l->states + n] = s->A[(d / WIDTH * p->states + n) * WIDTH + d % WIDTH];
    }
    if (l->norm_weight) hand_out(l->dnorm_weight, s->norm_weight, 1, C, C, 0), hand_out(l->dnorm_bias, s->norm_bias, 1, C, C, 0);
    if (l->proj_weight) {
        hand_out(l->dproj_weight, s->proj, l->outputs, C, p->C, 0);
        if (l->proj_bias) hand_out(l->dproj_bias, s->proj_bias, 1, l->outputs, p->O, 0);
        double skip = 0;
        for (int64_t c = 0; c < C; c++) skip += (double)s->skip[c];
        *(real *)l->dskip_scale = (real)skip;
    }
    if (!l->group_weight) return;
    real *weight = l->dgroup_weight, *bias = l->dgroup_bias;
    memset(weight, 0, sizeof(real) * (size_t)C), memset(bias, 0, sizeof(real) * (size_t)C);
    for (int64_t b = 0; b < l->batch; b++)
        add_up(bias, s->group + b * 2 * p->C, C), add_up(weight, s->group + (b * 2 + 1) * p->C, C);
}

/* ---- Calls ---- */

static plan plan_of(const ln_mamba *l) {
    const double updates = (double)l->batch * (double)l->length * (double)l->inner * (double)l->states;
    plan p = {.l = l, .runs = divide_up(l->length, l->run), .blocks = divide_up(l->inner, WIDTH)};
    p.states = (int)(divide_up(l->states, STATE_PADDING) * STATE_PADDING);
    p.C = fill_up(l->channels), p.D = fill_up(l->inner), p.O = fill_up(l->outputs), p.R = fill_up(l->rank);
    p.K = fill_up(p.R + 2 * p.states);
    const int64_t tasks = l->batch * p.runs, worthwhile = 1 + (int64_t)(updates / 1e5);
    p.slots = l->threads < worthwhile ? l->threads : worthwhile;
    if (p.slots > tasks) p.slots = tasks;
    return p;
}

/* Bytes that a call allocates. */
int64_t NAME(mamba_bytes)(const ln_mamba *l, bool backward) {
    plan p = plan_of(l);
    arena a = {0};
    lay_out_plan(&p, backward, &a);
    return (int64_t)a.used + p.slots * (int64_t)scratch_bytes(&p, backward);
}

static int start(plan *p, const ln_mamba *l, bool backward, void **memory) {
    *p = plan_of(l);
    arena a = {0};
    lay_out_plan(p, backward, &a);
    const size_t bytes = a.used;
    *memory = ln_allocate(bytes);
    if (!*memory) return LN_NO_MEMORY;
    memset(*memory, 0, bytes);
    a = (arena){*memory, 0};
    lay_out_plan(p, backward, &a);
    read_weights(p, backward);
    int status = LN_OK;
    if (l->group_weight && !backward) status = find_moments(p);
    if (l->group_weight) find_scale(p);
    return status;
}

int NAME(mamba_forward)(const ln_mamba *l) {
    plan p;
    void *memory = NULL;
    int status = start(&p, l, false, &memory);
    if (!status) status = ln_parallel(p.slots, l->batch * p.runs, scratch_bytes(&p, false), forward_task, &p);
    free(memory);
    return status;
}

int NAME(mamba_backward)(const ln_mamba *l) {
    plan p;
    void *memory = NULL;
    int status = start(&p, l, true, &memory);
    if (!status) status = ln_parallel(p.slots, l->batch * p.runs, scratch_bytes(&p, true), backward_task, &p);
    if (!status) {
        add_slots(&p);
        hand_out_sums(&p);
        const int64_t parts = l->batch * divide_up(l->length, PART);
        if (l->group_weight)
            status = ln_parallel(l->threads, parts, 3 * sizeof(real) * (size_t)l->channels, finish_group_norm, &p);
    }
    free(memory);
    return status;
}
