/* Selective scan: the walk over a whole call. scan_core.h holds the recurrence on one tile.
 *
 * A task owns a range of channels of one image and group, and walks its tokens chunk by chunk: B and C of the chunk are
 * read once, then every block of WIDTH channels is brought into tiles, scanned and written. With directions, the same task
 * walks one direction after the other and adds to its own channels of the result: no atomics, no copies per direction.
 *
 * Where a call has fewer blocks of channels than threads, the tokens are cut into segments as well. A first pass finds
 * what each segment does to a state (h_out = local + exp(A sum dt) h_in), the second starts each segment from the state
 * that follows. It costs about twice the work.
 */
#include <stdlib.h>

#include "scan_rows.h"

typedef struct {
    const ln_scan *s;
    int64_t ranges;   /* of channels, per group */
    int64_t segments; /* of tokens */
    int64_t chunks;
    int padded;             /* states, a multiple of STATE_PADDING */
    real *segment_states;   /* (batch, directions, segments, states, channels): h or dh at the segment's end */
    real *segment_dt;       /* (batch, directions, segments, channels): sum of dt */
    real *partial_dBC;      /* (ranges - 1, 2, batch, outer, length, states) */
    real *partial_rows;     /* (batch, segments, R, states + 2): dA, dD, ddelta_bias */
} plan;

/* What a task owns. */
typedef struct {
    int64_t b, group, range, segment;
    int64_t channel, channels; /* the first of the range, and how many */
    int64_t chunk, end_chunk;
    int64_t blocks;
} share;

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t outer_count(const ln_scan *s) { return s->directions * s->groups; /* one of them is 1 */ }
static inline int64_t group_channels(const ln_scan *s) { return s->channels / s->groups; }

static int64_t task_count(const plan *p) { return p->s->batch * p->s->groups * p->ranges * p->segments; }

static share share_of(const plan *p, int64_t task) {
    const ln_scan *s = p->s;
    share my;
    my.segment = task % p->segments, task /= p->segments;
    my.range = task % p->ranges, task /= p->ranges;
    my.group = task % s->groups, my.b = task / s->groups;
    const int64_t channels = group_channels(s), vectors = divide_up(channels, LANES);
    const int64_t first = my.range * vectors / p->ranges * LANES, end = (my.range + 1) * vectors / p->ranges * LANES;
    my.channel = my.group * channels + first;
    my.channels = (end < channels ? end : channels) - first;
    my.blocks = divide_up(my.channels, WIDTH);
    my.chunk = my.segment * p->chunks / p->segments;
    my.end_chunk = (my.segment + 1) * p->chunks / p->segments;
    return my;
}

static ln_tokens tokens_of(const ln_scan *s, int64_t direction, int64_t chunk) {
    const int64_t first = chunk * LN_CHUNK, left = s->length - first;
    return (ln_tokens){first, left < LN_CHUNK ? (int)left : LN_CHUNK, s->order ? s->order + direction * s->length : NULL};
}

/* ---- Scratch of a task ---- */

enum { TILES = 10 };
enum { DECAY = LN_CHUNK * GROUP_BACKWARD * LANES, HISTORY = DECAY + GROUP_BACKWARD * LANES };

typedef struct {
    real *tile[TILES];
    real *history, *decay; /* see ln_tile */
    real *B, *C, *h;       /* (LN_CHUNK, states), the same, (states, WIDTH) */
    real *dBC, *dB, *dC;   /* as ln_tile has it, and sorted: (LN_CHUNK, states) each */
    block *blocks;
    int64_t packed[LN_CHUNK]; /* where the rows of a tile begin */
} memory;

static size_t rows_of_states(const plan *p) { return (size_t)LN_CHUNK * (size_t)p->padded; }
static size_t block_reals(const plan *p) { return (size_t)(3 * p->padded + 5) * WIDTH; }
static size_t most_blocks(const plan *p) {
    return (size_t)divide_up(divide_up(divide_up(group_channels(p->s), LANES), p->ranges), REGISTERS);
}

static size_t scratch_bytes(const plan *p) {
    const size_t reals = TILES * TILE + HISTORY + DECAY + (size_t)p->padded * WIDTH + 6 * rows_of_states(p);
    return (reals + most_blocks(p) * block_reals(p)) * sizeof(real) + most_blocks(p) * sizeof(block);
}

static memory lay_out(const plan *p, void *scratch) {
    const size_t matrix = (size_t)p->padded * WIDTH;
    memory m;
    real *at = scratch;
    for (int t = 0; t < LN_CHUNK; t++) m.packed[t] = t * WIDTH;
#define TAKE(count) (at += (count), at - (count))
    for (int i = 0; i < TILES; i++) m.tile[i] = TAKE(TILE);
    m.history = TAKE(HISTORY), m.decay = TAKE(DECAY);
    m.h = TAKE(matrix);
    m.B = TAKE(rows_of_states(p)), m.C = TAKE(rows_of_states(p));
    m.dBC = TAKE(2 * rows_of_states(p)), m.dB = TAKE(rows_of_states(p)), m.dC = TAKE(rows_of_states(p));
    real *reals = at;
    at += most_blocks(p) * block_reals(p);
    m.blocks = (block *)(void *)at;
    at = reals;
    for (size_t i = 0; i < most_blocks(p); i++) {
        block *k = &m.blocks[i];
        k->A = TAKE(matrix), k->state = TAKE(matrix), k->dA = TAKE(matrix);
        k->D = TAKE(WIDTH), k->bias = TAKE(WIDTH), k->dD = TAKE(WIDTH), k->dbias = TAKE(WIDTH), k->dt_sum = TAKE(WIDTH);
    }
#undef TAKE
    return m;
}

/* Reads the parameters of a task's blocks and zeroes the rest. */
static void start_blocks(const plan *p, const memory *m, const share *my, int64_t direction) {
    const ln_scan *s = p->s;
    for (int64_t i = 0; i < my->blocks; i++) {
        block *k = &m->blocks[i];
        const int64_t left = my->channels - i * WIDTH;
        k->channel = my->channel + i * WIDTH;
        k->row = direction * s->channels + k->channel;
        k->channels = left < WIDTH ? (int)left : WIDTH;
        k->registers = (int)divide_up(k->channels, LANES);
        k->steepest = 0;
        memset(k->A, 0, sizeof(real) * block_reals(p));
        for (int c = 0; c < k->channels; c++) {
            const real *A = (const real *)s->A + (k->row + c) * s->states;
            for (int64_t n = 0; n < s->states; n++) {
                const real a = A[n] == A[n] ? A[n] * (real)LOG2_E : (real)__builtin_nan("");
                const real size = a < 0 ? -a : a;
                k->A[n * WIDTH + c] = a;
                if (!(size <= k->steepest)) k->steepest = size;
            }
            if (s->D) k->D[c] = ((const real *)s->D)[k->row + c];
            if (s->delta_bias) k->bias[c] = ((const real *)s->delta_bias)[k->row + c];
        }
    }
}

/* ---- B, C and their gradients ---- */

/* tile[t][n] = x[offset + n * x->channel + token * x->token]: B or C, with states `padded` up with zeros. */
static void read_states(real *restrict tile, const ln_tensor *x, int64_t offset, int states, int padded, const ln_tokens *tokens) {
    if (padded > states) memset(tile, 0, sizeof(real) * (size_t)(padded * tokens->count));
    if (x->channel == 1 && x->dtype == REAL_DTYPE && states % LANES == 0) {
        for (int t = 0; t < tokens->count; t++) {
            const real *row = (const real *)x->data + offset + token_at(tokens, t) * x->token;
            for (int n = 0; n < states; n += LANES) store_loose(tile + t * padded + n, load_loose(row + n));
        }
        return;
    }
    if (x->channel == 1) {
        for (int t = 0; t < tokens->count; t++)
            read_row(tile + t * padded, x, offset + token_at(tokens, t) * x->token, 1, states, NULL);
        return;
    }
    for (int n = 0; n < states; n++) {
        real column[LN_CHUNK];
        read_row(column, x, offset + n * x->channel + start_of(x, tokens), x->token, tokens->count, order_of(tokens));
        for (int t = 0; t < tokens->count; t++) tile[t * padded + n] = column[t];
    }
}

/* The way back, for dB and dC. */
static void write_states(const real *restrict tile, const ln_tensor *x, int64_t offset, int states, int padded,
                         const ln_tokens *tokens) {
    if (x->channel == 1 && x->dtype == REAL_DTYPE && states % LANES == 0) {
        for (int t = 0; t < tokens->count; t++) {
            real *row = (real *)x->data + offset + token_at(tokens, t) * x->token;
            for (int n = 0; n < states; n += LANES) store_loose(row + n, load_loose(tile + t * padded + n));
        }
        return;
    }
    if (x->channel == 1) {
        for (int t = 0; t < tokens->count; t++)
            write_row(tile + t * padded, x, offset + token_at(tokens, t) * x->token, 1, states, NULL);
        return;
    }
    for (int n = 0; n < states; n++) {
        real column[LN_CHUNK];
        for (int t = 0; t < tokens->count; t++) column[t] = tile[t * padded + n];
        write_row(column, x, offset + n * x->channel + start_of(x, tokens), x->token, tokens->count, order_of(tokens));
    }
}

/* ---- States in memory, (states, channels of the image) ---- */

static real *states_at(const plan *p, void *base, int64_t b, int64_t direction, int64_t count, int64_t index) {
    return (real *)base + ((b * p->s->directions + direction) * count + index) * p->s->states * p->s->channels;
}

static void save_states(const plan *p, const block *k, const real *state, real *matrix) {
    for (int64_t n = 0; n < p->s->states; n++)
        memcpy(matrix + n * p->s->channels + k->channel, state + n * WIDTH, sizeof(real) * (size_t)k->channels);
}

static void load_states(const plan *p, const block *k, real *state, const real *matrix) {
    memset(state, 0, sizeof(real) * (size_t)(p->padded * WIDTH));
    for (int64_t n = 0; n < p->s->states; n++)
        memcpy(state + n * WIDTH, matrix + n * p->s->channels + k->channel, sizeof(real) * (size_t)k->channels);
}

/* States (or their gradients) at an end of a sequence, (batch, directions, channels, states), and those of a block. */
static real *end_states(const ln_scan *s, const block *k, int64_t b, void *base) {
    return (real *)base + (b * s->directions * s->channels + k->row) * s->states;
}

static void enter_sequence(const ln_scan *s, const block *k, int64_t b, void *base) {
    const real *given = end_states(s, k, b, base);
    for (int c = 0; c < k->channels; c++)
        for (int64_t n = 0; n < s->states; n++) k->state[n * WIDTH + c] = given[c * s->states + n];
}

static void leave_sequence(const ln_scan *s, const block *k, int64_t b, void *base) {
    real *result = end_states(s, k, b, base);
    for (int c = 0; c < k->channels; c++)
        for (int64_t n = 0; n < s->states; n++) result[c * s->states + n] = k->state[n * WIDTH + c];
}

/* Brings what segment `q` does into k->state: local + exp(A sum dt) state. */
static void pass_segment(const plan *p, const memory *m, const block *k, int64_t b, int64_t direction, int64_t q) {
    const ln_scan *s = p->s;
    const real *sums = p->segment_dt + ((b * s->directions + direction) * p->segments + q) * s->channels + k->channel;
    real dt[WIDTH] __attribute__((aligned(64))) = {0};
    memcpy(dt, sums, sizeof(real) * (size_t)k->channels);
    load_states(p, k, m->h, states_at(p, p->segment_states, b, direction, p->segments, q));
    for (int64_t i = 0; i < p->padded * WIDTH; i += LANES) {
        const vec decay = exp2_of(load(k->A + i) * load(dt + i % WIDTH), true);
        store(k->state + i, load(m->h + i) + decay * load(k->state + i));
    }
}

static void leave_segment(const plan *p, const block *k, int64_t b, int64_t direction, int64_t q) {
    const ln_scan *s = p->s;
    real *sums = p->segment_dt + ((b * s->directions + direction) * p->segments + q) * s->channels + k->channel;
    memcpy(sums, k->dt_sum, sizeof(real) * (size_t)k->channels);
    save_states(p, k, k->state, states_at(p, p->segment_states, b, direction, p->segments, q));
}

/* ---- Rows of a block, in tensors or in tiles ---- */

/* A tensor's rows in this chunk and the next one, counted from its first channel. */
typedef struct {
    const ln_tensor *x;
    int64_t outer, at[LN_CHUNK], next[LN_CHUNK];
} row_offsets;

static void find_rows(const ln_tensor *x, const ln_tokens *tokens, int64_t *at) {
    for (int t = 0; t < tokens->count; t++) at[t] = token_at(tokens, t) * x->token;
}

static row_offsets first_rows(const ln_tensor *x, int64_t b, int64_t outer, const ln_tokens *tokens) {
    row_offsets o = {.x = x, .outer = b * x->batch + outer * x->outer};
    if (x->data) find_rows(x, tokens, o.next);
    return o;
}

/* Moves on by a chunk; `coming` is the one after it, or NULL. */
static void next_rows(row_offsets *o, const ln_tokens *coming) {
    memcpy(o->at, o->next, sizeof o->at);
    if (coming && o->x->data) find_rows(o->x, coming, o->next);
}

/* Rows to read: where they lie, or brought into `tile`. */
static rows read_rows(const row_offsets *o, const block *k, const ln_tokens *tokens, real *tile, const memory *m) {
    const int64_t offset = o->outer + k->channel * o->x->channel;
    if (whole_rows(o->x, k->channels)) return (rows){(real *)o->x->data + offset, o->at, o->next};
    read_tile(tile, o->x, offset, k->channels, tokens);
    return (rows){tile, m->packed, m->packed};
}

/* Rows to write: where they lie, or in `tile`, from which finish_rows takes them. */
static rows write_rows(const row_offsets *o, const block *k, real *tile, const memory *m) {
    if (!whole_rows(o->x, k->channels)) return (rows){tile, m->packed, m->packed};
    return (rows){(real *)o->x->data + o->outer + k->channel * o->x->channel, o->at, o->next};
}

static void finish_rows(const row_offsets *o, const block *k, const ln_tokens *tokens, real *tile, bool add) {
    if (!whole_rows(o->x, k->channels))
        write_tile(tile, o->x, o->outer + k->channel * o->x->channel, k->channels, tokens, add);
}

/* ---- Forward ---- */

static void add_up_dt(const block *k, const real *dt, int tokens) {
    for (int r = 0; r < k->registers; r++) {
        vec sum = load(k->dt_sum + r * LANES);
        for (int t = 0; t < tokens; t++) sum += load(dt + t * WIDTH + r * LANES);
        store(k->dt_sum + r * LANES, sum);
    }
}

/* out = (y + D u), times z sigmoid(z) where a gate is given, plus what is there if `add`. */
static void finish_forward(rows out, const real *y, rows u, rows z, const real *gate, const block *k, int tokens, bool add) {
    for (int r = 0; r < k->registers; r++) {
        const vec D = load(k->D + r * LANES);
        for (int t = 0; t < tokens; t++) {
            vec v = load(y + t * WIDTH + r * LANES) + D * row_load(u, t, r);
            if (gate) v *= row_load(z, t, r) * load(gate + t * WIDTH + r * LANES);
            if (r == 0) prefetch_to_write(out, t);
            row_store(out, t, r, add ? v + row_load(out, t, r) : v);
        }
    }
}

static int64_t offset_of(const ln_tensor *x, int64_t b, int64_t outer) { return b * x->batch + outer * x->outer; }

static void forward_task(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_scan *s = p->s;
    const share my = share_of(p, task);
    const memory m = lay_out(p, scratch);
    real *const dt = m.tile[0], *const x = m.tile[1], *const y = m.tile[2], *const gate = s->z.data ? m.tile[3] : NULL;
    for (int64_t direction = 0; direction < s->directions; direction++) {
        const int64_t outer = direction + my.group;
        ln_tokens tokens = tokens_of(s, direction, my.chunk);
        row_offsets delta = first_rows(&s->delta, my.b, direction, &tokens), u = first_rows(&s->u, my.b, 0, &tokens),
                    z = first_rows(&s->z, my.b, 0, &tokens), out = first_rows(&s->out, my.b, 0, &tokens);
        start_blocks(p, &m, &my, direction);
        for (int64_t i = 0; i < my.blocks; i++) {
            if (s->initial_state) enter_sequence(s, &m.blocks[i], my.b, s->initial_state);
            for (int64_t q = 0; q < my.segment; q++) pass_segment(p, &m, &m.blocks[i], my.b, direction, q);
        }
        for (int64_t chunk = my.chunk; chunk < my.end_chunk; chunk++) {
            const ln_tokens coming = tokens_of(s, direction, chunk + 1), *more = chunk + 1 < my.end_chunk ? &coming : NULL;
            next_rows(&delta, more), next_rows(&u, more), next_rows(&z, more), next_rows(&out, more);
            read_states(m.B, &s->B, offset_of(&s->B, my.b, outer), (int)s->states, p->padded, &tokens);
            read_states(m.C, &s->C, offset_of(&s->C, my.b, outer), (int)s->states, p->padded, &tokens);
            for (int64_t i = 0; i < my.blocks; i++) {
                const block *k = &m.blocks[i];
                const rows u_rows = read_rows(&u, k, &tokens, m.tile[4], &m);
                const real most = prepare(dt, x, NULL, read_rows(&delta, k, &tokens, m.tile[5], &m), u_rows, k,
                                          tokens.count, s->softplus);
                if (s->checkpoints)
                    save_states(p, k, k->state, states_at(p, s->checkpoints, my.b, direction, p->chunks, chunk));
                scan_tile(&(ln_tile){.tokens = tokens.count, .states = p->padded, .row = p->padded, .registers = k->registers,
                                     .clamp = may_leave_range(most, k), .A = k->A, .dt = dt, .x = x, .B = m.B, .C = m.C,
                                     .h = k->state, .y = y});
                rows z_rows = {0};
                if (gate) z_rows = read_rows(&z, k, &tokens, m.tile[5], &m), open_gate(gate, z_rows, k, tokens.count);
                const rows result = write_rows(&out, k, y, &m);
                finish_forward(result, y, u_rows, z_rows, gate, k, tokens.count, direction > 0 && result.base != y);
                finish_rows(&out, k, &tokens, y, direction > 0);
            }
            tokens = coming;
        }
        if (s->last_state && my.segment == p->segments - 1)
            for (int64_t i = 0; i < my.blocks; i++) leave_sequence(s, &m.blocks[i], my.b, s->last_state);
    }
}

/* First pass of segments: what each but the last leaves behind, from a state of zero. */
static void forward_segment(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_scan *s = p->s;
    const share my = share_of(p, task);
    const memory m = lay_out(p, scratch);
    real *const dt = m.tile[0], *const x = m.tile[1], *const unused = m.tile[2];
    if (my.segment == p->segments - 1) return;
    for (int64_t direction = 0; direction < s->directions; direction++) {
        ln_tokens tokens = tokens_of(s, direction, my.chunk);
        row_offsets delta = first_rows(&s->delta, my.b, direction, &tokens), u = first_rows(&s->u, my.b, 0, &tokens);
        start_blocks(p, &m, &my, direction);
        for (int64_t chunk = my.chunk; chunk < my.end_chunk; chunk++) {
            const ln_tokens coming = tokens_of(s, direction, chunk + 1), *more = chunk + 1 < my.end_chunk ? &coming : NULL;
            next_rows(&delta, more), next_rows(&u, more);
            read_states(m.B, &s->B, offset_of(&s->B, my.b, direction + my.group), (int)s->states, p->padded, &tokens);
            for (int64_t i = 0; i < my.blocks; i++) {
                const block *k = &m.blocks[i];
                const real most = prepare(dt, x, NULL, read_rows(&delta, k, &tokens, m.tile[3], &m),
                                          read_rows(&u, k, &tokens, m.tile[4], &m), k, tokens.count, s->softplus);
                add_up_dt(k, dt, tokens.count);
                scan_tile(&(ln_tile){.tokens = tokens.count, .states = p->padded, .row = p->padded, .registers = k->registers,
                                     .clamp = may_leave_range(most, k), .A = k->A, .dt = dt, .x = x, .B = m.B, .C = m.B,
                                     .h = k->state, .y = unused});
            }
            tokens = coming;
        }
        for (int64_t i = 0; i < my.blocks; i++) leave_segment(p, &m.blocks[i], my.b, direction, my.segment);
    }
}

/* ---- Backward ---- */

/* dB and dC of range 0 go straight to their tensors, those of the others to scratch, to be added afterwards. */
static ln_tensor partial_of(const plan *p, const ln_tensor *d, int which, int64_t range) {
    if (range == 0) return *d;
    const ln_scan *s = p->s;
    const int64_t matrix = s->length * s->states, outer = outer_count(s);
    return (ln_tensor){p->partial_dBC + ((range - 1) * 2 + which) * s->batch * outer * matrix,
                       outer * matrix, matrix, 1, s->states, REAL_DTYPE};
}

/* The walk that carries dh alone, from zero; the first segment has no one to tell. */
static void backward_segment(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_scan *s = p->s;
    const share my = share_of(p, task);
    const memory m = lay_out(p, scratch);
    real *const dt = m.tile[0], *const unused = m.tile[1], *const gy = m.tile[2],
         *const gate = s->z.data ? m.tile[3] : NULL;
    if (my.segment == 0) return;
    for (int64_t direction = 0; direction < s->directions; direction++) {
        ln_tokens tokens = tokens_of(s, direction, my.end_chunk - 1);
        row_offsets delta = first_rows(&s->delta, my.b, direction, &tokens), z = first_rows(&s->z, my.b, 0, &tokens),
                    grad_out = first_rows(&s->grad_out, my.b, 0, &tokens);
        start_blocks(p, &m, &my, direction);
        for (int64_t chunk = my.end_chunk - 1; chunk >= my.chunk; chunk--) {
            const ln_tokens coming = tokens_of(s, direction, chunk - 1), *more = chunk > my.chunk ? &coming : NULL;
            next_rows(&delta, more), next_rows(&z, more), next_rows(&grad_out, more);
            read_states(m.C, &s->C, offset_of(&s->C, my.b, direction + my.group), (int)s->states, p->padded, &tokens);
            for (int64_t i = 0; i < my.blocks; i++) {
                const block *k = &m.blocks[i];
                const rows steps = read_rows(&delta, k, &tokens, m.tile[4], &m);
                rows z_rows = {0};
                if (gate) z_rows = read_rows(&z, k, &tokens, m.tile[5], &m), open_gate(gate, z_rows, k, tokens.count);
                gradient_of_y(gy, gate, read_rows(&grad_out, k, &tokens, m.tile[6], &m), z_rows, k, tokens.count);
                const real most = prepare(dt, unused, NULL, steps, steps, k, tokens.count, s->softplus);
                add_up_dt(k, dt, tokens.count);
                scan_tile_adjoint(&(ln_tile){.tokens = tokens.count, .states = p->padded, .row = p->padded, .registers = k->registers,
                                             .clamp = may_leave_range(most, k), .A = k->A, .dt = dt, .C = m.C, .gy = gy,
                                             .dh = k->state});
            }
            tokens = coming;
        }
        for (int64_t i = 0; i < my.blocks; i++) leave_segment(p, &m.blocks[i], my.b, direction, my.segment);
    }
}

static void backward_task(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_scan *s = p->s;
    const share my = share_of(p, task);
    const memory m = lay_out(p, scratch);
    real *const dt = m.tile[0], *const x = m.tile[1], *const gy = m.tile[2], *const dx = m.tile[3], *const ddt = m.tile[4],
         *const slope = s->softplus ? m.tile[5] : NULL, *const y = s->z.data ? m.tile[6] : NULL,
         *const gate = s->z.data ? m.tile[7] : NULL;
    const ln_tensor dB = partial_of(p, &s->dB, 0, my.range), dC = partial_of(p, &s->dC, 1, my.range);
    for (int64_t direction = 0; direction < s->directions; direction++) {
        const int64_t outer = direction + my.group;
        ln_tokens tokens = tokens_of(s, direction, my.end_chunk - 1);
        row_offsets delta = first_rows(&s->delta, my.b, direction, &tokens), u = first_rows(&s->u, my.b, 0, &tokens),
                    z = first_rows(&s->z, my.b, 0, &tokens), grad_out = first_rows(&s->grad_out, my.b, 0, &tokens),
                    du = first_rows(&s->du, my.b, 0, &tokens), dz = first_rows(&s->dz, my.b, 0, &tokens),
                    ddelta = first_rows(&s->ddelta, my.b, direction, &tokens);
        start_blocks(p, &m, &my, direction);
        for (int64_t i = 0; i < my.blocks; i++) {
            const block *k = &m.blocks[i];
            if (s->last_state) enter_sequence(s, k, my.b, s->last_state);
            for (int64_t q = p->segments - 1; q > my.segment; q--) pass_segment(p, &m, k, my.b, direction, q);
        }
        for (int64_t chunk = my.end_chunk - 1; chunk >= my.chunk; chunk--) {
            const ln_tokens coming = tokens_of(s, direction, chunk - 1), *more = chunk > my.chunk ? &coming : NULL;
            next_rows(&delta, more), next_rows(&u, more), next_rows(&z, more), next_rows(&grad_out, more);
            next_rows(&du, more), next_rows(&dz, more), next_rows(&ddelta, more);
            const int count = (int)divide_up(tokens.count, TOKENS_BACKWARD) * TOKENS_BACKWARD;
            const size_t missing = sizeof(real) * (size_t)((count - tokens.count) * p->padded);
            read_states(m.B, &s->B, offset_of(&s->B, my.b, outer), (int)s->states, p->padded, &tokens);
            read_states(m.C, &s->C, offset_of(&s->C, my.b, outer), (int)s->states, p->padded, &tokens);
            memset(m.B + tokens.count * p->padded, 0, missing);
            memset(m.C + tokens.count * p->padded, 0, missing);
            memset(m.dBC, 0, sizeof(real) * 2 * (size_t)(count * p->padded));
            for (int64_t i = 0; i < my.blocks; i++) {
                const block *k = &m.blocks[i];
                rows z_rows = {0};
                if (gate) z_rows = read_rows(&z, k, &tokens, m.tile[8], &m), open_gate(gate, z_rows, k, tokens.count);
                gradient_of_y(gy, gate, read_rows(&grad_out, k, &tokens, m.tile[9], &m), z_rows, k, tokens.count);
                const rows u_rows = read_rows(&u, k, &tokens, m.tile[8], &m);
                const real most = prepare(dt, x, slope, read_rows(&delta, k, &tokens, m.tile[9], &m), u_rows, k,
                                          tokens.count, s->softplus);
                zero_rows(dt, tokens.count, count), zero_rows(x, tokens.count, count), zero_rows(gy, tokens.count, count);
                load_states(p, k, m.h, states_at(p, s->checkpoints, my.b, direction, p->chunks, chunk));
                scan_tile_backward(&(ln_tile){.tokens = count, .states = p->padded, .row = p->padded, .registers = k->registers,
                                              .clamp = may_leave_range(most, k), .A = k->A, .dt = dt, .x = x, .B = m.B,
                                              .C = m.C, .h = m.h, .y = y, .gy = gy, .dh = k->state, .dx = dx, .ddt = ddt,
                                              .dA = k->dA, .dBC = m.dBC, .history = m.history, .decay = m.decay});
                walked w = {.dx = dx, .ddt = ddt, .dt = dt, .gy = gy, .slope = slope, .y = y, .gate = gate, .u = u_rows,
                            .du = write_rows(&du, k, dx, &m), .ddelta = write_rows(&ddelta, k, ddt, &m)};
                w.add = direction > 0 && w.du.base != dx;
                if (gate) w.dz = write_rows(&dz, k, y, &m);
                finish_backward(&w, k, tokens.count);
                finish_rows(&du, k, &tokens, dx, direction > 0);
                finish_rows(&ddelta, k, &tokens, ddt, false);
                if (gate) finish_rows(&dz, k, &tokens, y, false);
            }
            sort_dBC(m.dBC, m.dB, m.dC, p->padded, p->padded, tokens.count);
            write_states(m.dB, &dB, offset_of(&dB, my.b, outer), (int)s->states, p->padded, &tokens);
            write_states(m.dC, &dC, offset_of(&dC, my.b, outer), (int)s->states, p->padded, &tokens);
            tokens = coming;
        }
        const int64_t columns = s->states + 2, all_rows = s->directions * s->channels;
        for (int64_t i = 0; i < my.blocks; i++) {
            const block *k = &m.blocks[i];
            if (s->initial_state && my.segment == 0) leave_sequence(s, k, my.b, s->initial_state);
            for (int c = 0; c < k->channels; c++) {
                real *row = p->partial_rows + ((my.b * p->segments + my.segment) * all_rows + k->row + c) * columns;
                for (int64_t n = 0; n < s->states; n++) row[n] = k->dA[n * WIDTH + c];
                row[s->states] = k->dD[c], row[s->states + 1] = k->dbias[c];
            }
        }
    }
}

/* Adds the other ranges' dB and dC to those of range 0; a task is one chunk of tokens. */
static void add_ranges(const void *context, int64_t task, void *scratch) {
    const plan *p = context;
    const ln_scan *s = p->s;
    const int64_t chunk = task % p->chunks, outer = task / p->chunks % outer_count(s), b = task / p->chunks / outer_count(s);
    const int64_t first = chunk * LN_CHUNK, left = s->length - first;
    const ln_tokens tokens = {first, left < LN_CHUNK ? (int)left : LN_CHUNK, NULL};
    const int states = (int)s->states;
    real *total = scratch;
    for (int which = 0; which < 2; which++) {
        const ln_tensor *d = which ? &s->dC : &s->dB;
        read_states(total, d, offset_of(d, b, outer), states, states, &tokens);
        for (int64_t range = 1; range < p->ranges; range++) {
            const ln_tensor part = partial_of(p, d, which, range);
            const real *values = (const real *)part.data + offset_of(&part, b, outer) + first * states;
            for (int i = 0; i < tokens.count * states; i++) total[i] += values[i];
        }
        write_states(total, d, offset_of(d, b, outer), states, states, &tokens);
    }
}

/* Adds up what images and segments found for the parameters. */
static void add_rows(const plan *p) {
    const ln_scan *s = p->s;
    const int64_t columns = s->states + 2, all_rows = s->directions * s->channels, parts = s->batch * p->segments;
    for (int64_t row = 0; row < all_rows; row++)
        for (int64_t n = 0; n < columns; n++) {
            real total = 0;
            for (int64_t i = 0; i < parts; i++) total += p->partial_rows[(i * all_rows + row) * columns + n];
            if (n < s->states) ((real *)s->dA)[row * s->states + n] = total;
            else if (n == s->states && s->dD) ((real *)s->dD)[row] = total;
            else if (n > s->states && s->ddelta_bias) ((real *)s->ddelta_bias)[row] = total;
        }
}

/* ---- Calls ---- */

/* Shares the work out so that the slowest thread has the least to do. */
static plan plan_of(const ln_scan *s, int64_t threads) {
    plan p = {.s = s, .ranges = 1, .segments = 1, .chunks = divide_up(s->length, LN_CHUNK)};
    p.padded = (int)(divide_up(s->states, STATE_PADDING) * STATE_PADDING);
    const int64_t images = s->batch * s->groups, vectors = divide_up(group_channels(s), LANES);
    int64_t least = INT64_MAX;
    for (int64_t ranges = 1; ranges <= vectors && ranges <= threads; ranges++) {
        const int64_t longest = divide_up(images * ranges, threads) * divide_up(vectors, ranges);
        if (longest < least) least = longest, p.ranges = ranges;
    }
    if (images > 0 && vectors > 0) {
        int64_t segments = threads / (images * vectors);
        if (segments > p.chunks / 4) segments = p.chunks / 4;
        if (segments >= 3) p.segments = segments; /* the first pass doubles the work */
    }
    return p;
}

/* Threads that are worth waking: a state update takes about a third of a nanosecond. */
static int64_t threads_for(const ln_scan *s) {
    const double updates = (double)s->batch * (double)s->directions * (double)s->channels * (double)s->length * (double)s->states;
    const double worthwhile = 1 + updates / 1e5;
    return worthwhile < (double)s->threads ? (int64_t)worthwhile : s->threads;
}

static int allocate_segments(plan *p) {
    const ln_scan *s = p->s;
    const size_t sums = (size_t)(s->batch * s->directions * p->segments * s->channels);
    p->segment_dt = ln_allocate(sizeof(real) * sums);
    p->segment_states = ln_allocate(sizeof(real) * sums * (size_t)s->states);
    return p->segment_dt && p->segment_states ? LN_OK : LN_NO_MEMORY;
}

int NAME(scan_forward)(const ln_scan *s) {
    const int64_t threads = threads_for(s);
    plan p = plan_of(s, threads);
    int status = LN_OK;
    if (!status && p.segments > 1) {
        status = allocate_segments(&p);
        if (!status) status = ln_parallel(threads, task_count(&p), scratch_bytes(&p), forward_segment, &p);
    }
    if (!status) status = ln_parallel(threads, task_count(&p), scratch_bytes(&p), forward_task, &p);
    free(p.segment_dt), free(p.segment_states);
    return status;
}

int NAME(scan_backward)(const ln_scan *s) {
    const int64_t threads = threads_for(s);
    plan p = plan_of(s, threads);
    const size_t matrices = (size_t)(s->batch * outer_count(s) * s->length * s->states);
    const size_t rows = (size_t)(s->batch * p.segments * s->directions * s->channels * (s->states + 2));
    int status = LN_OK;
    p.partial_rows = ln_allocate(sizeof(real) * rows);
    p.partial_dBC = ln_allocate(sizeof(real) * 2 * (size_t)(p.ranges - 1) * matrices);
    if (!p.partial_rows || !p.partial_dBC) status = LN_NO_MEMORY;
    if (!status && p.segments > 1) {
        status = allocate_segments(&p);
        if (!status) status = ln_parallel(threads, task_count(&p), scratch_bytes(&p), backward_segment, &p);
    }
    if (!status) status = ln_parallel(threads, task_count(&p), scratch_bytes(&p), backward_task, &p);
    if (!status && p.ranges > 1) {
        const size_t bytes = sizeof(real) * (size_t)(LN_CHUNK * s->states);
        status = ln_parallel(threads, s->batch * outer_count(s) * p.chunks, bytes, add_ranges, &p);
    }
    if (!status) add_rows(&p);
    free(p.partial_rows), free(p.partial_dBC), free(p.segment_dt), free(p.segment_states);
    return status;
}
