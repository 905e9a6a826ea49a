/* Tiles: [token][channel] blocks of at most LN_CHUNK x WIDTH numbers in the compute precision.
 *
 * A scan's arithmetic sees tiles alone. What a tensor's strides, number type and token order are is settled here, while
 * numbers are brought into the first-level cache, so no layout needs a copy of the whole tensor.
 */
#ifndef LN_TILE_H
#define LN_TILE_H

#include "lightnets.h"
#include "vector.h"

#define REGISTERS (VECTOR_BYTES < 64 ? 2 : 1) /* vectors side by side in a row of a tile */
#define WIDTH (REGISTERS * LANES)

typedef uint16_t half_bits;
typedef float loose_float __attribute__((aligned(1), may_alias));
typedef double loose_double __attribute__((aligned(1), may_alias));
typedef half_bits loose_half __attribute__((aligned(1), may_alias));

INLINE float float_of_bits(uint32_t b) {
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}
INLINE uint32_t bits_of_float(float x) {
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

INLINE float from_bfloat16(half_bits h) { return float_of_bits((uint32_t)h << 16); }
INLINE half_bits to_bfloat16(float x) { /* to nearest, ties to even */
    const uint32_t b = bits_of_float(x);
    return (half_bits)(x != x ? 0x7fc0 : (b + 0x7fff + (b >> 16 & 1)) >> 16);
}

INLINE float from_float16(half_bits h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    const uint32_t normal = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    const float subnormal = (float)fraction * 0x1p-24f;
    return exponent ? float_of_bits(normal) : float_of_bits(sign | bits_of_float(subnormal));
}
INLINE half_bits to_float16(float x) { /* to nearest, ties to even */
    const uint32_t b = bits_of_float(x), sign = b >> 16 & 0x8000, size = b & 0x7fffffff;
    const uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    /* adding 1/2 leaves the multiples of 2^-24 in the lowest bits */
    const uint32_t subnormal = bits_of_float(float_of_bits(size < 0x38800000 ? size : 0) + 0.5f) - 0x3f000000;
    const uint32_t h = size > 0x7f800000 ? 0x7e00 : size >= 0x477ff000 ? 0x7c00 : size < 0x38800000 ? subnormal : normal;
    return (half_bits)(sign | h);
}

/* `order` as in ln_scan, of one direction. */
typedef struct {
    int64_t first;
    int count;
    const int32_t *order;
} ln_tokens;

INLINE int64_t token_at(const ln_tokens *tokens, int t) {
    return tokens->order ? tokens->order[tokens->first + t] : tokens->first + t;
}

INLINE size_t item_bytes(const ln_tensor *x) { return x->dtype == LN_FLOAT64 ? 8 : x->dtype == LN_FLOAT32 ? 4 : 2; }
INLINE char *item(const ln_tensor *x, int64_t offset) { return (char *)x->data + offset * (int64_t)item_bytes(x); }

/* The order of the tokens in view, NULL where they follow each other. */
INLINE const int32_t *order_of(const ln_tokens *tokens) { return tokens->order ? tokens->order + tokens->first : NULL; }
/* Where counting begins: `order` counts from the first token of all. */
INLINE int64_t start_of(const ln_tensor *x, const ln_tokens *tokens) { return tokens->order ? 0 : tokens->first * x->token; }

/* Calls `each(p, i)` for n numbers that lie `stride` apart, or in units of it where `order` says. */
#define EACH_NUMBER(type, each)                                                                 \
    do {                                                                                        \
        type *p = (type *)x->data + offset;                                                     \
        if (order) for (int i = 0; i < n; i++) each(p[order[i] * stride], row[i]);              \
        else if (stride == 1) for (int i = 0; i < n; i++) each(p[i], row[i]);                   \
        else for (int i = 0; i < n; i++) each(p[i * stride], row[i]);                           \
    } while (0)
#define EACH_DTYPE(float32, float64, bfloat16, float16)                 \
    switch (x->dtype) {                                                 \
        case LN_FLOAT32: EACH_NUMBER(loose_float, float32); break;      \
        case LN_FLOAT64: EACH_NUMBER(loose_double, float64); break;     \
        case LN_BFLOAT16: EACH_NUMBER(loose_half, bfloat16); break;     \
        default: EACH_NUMBER(loose_half, float16); break;               \
    }

static void read_row(real *restrict row, const ln_tensor *x, int64_t offset, int64_t stride, int n,
                     const int32_t *restrict order) {
#define AS_IS(number, value) value = (real)(number)
#define FROM_BFLOAT16(number, value) value = (real)from_bfloat16(number)
#define FROM_FLOAT16(number, value) value = (real)from_float16(number)
    EACH_DTYPE(AS_IS, AS_IS, FROM_BFLOAT16, FROM_FLOAT16)
}

static void write_row(const real *restrict row, const ln_tensor *x, int64_t offset, int64_t stride, int n,
                      const int32_t *restrict order) {
#define TO_FLOAT32(number, value) number = (float)(value)
#define TO_FLOAT64(number, value) number = (double)(value)
#define TO_BFLOAT16(number, value) number = to_bfloat16((float)(value))
#define TO_FLOAT16(number, value) number = to_float16((float)(value))
    EACH_DTYPE(TO_FLOAT32, TO_FLOAT64, TO_BFLOAT16, TO_FLOAT16)
}

INLINE bool whole_rows(const ln_tensor *x, int channels) {
    return x->channel == 1 && x->dtype == REAL_DTYPE && channels == WIDTH;
}

/* Whether vectors can be read along the tokens. */
INLINE bool whole_columns(const ln_tensor *x, int channels, const ln_tokens *tokens) {
    return x->token == 1 && x->dtype == REAL_DTYPE && channels == WIDTH && !tokens->order && tokens->count % LANES == 0;
}

/* tile[t][c] = x[offset + c * x->channel + token * x->token]; channels up to WIDTH are filled with zeros. */
static void read_tile(real *restrict tile, const ln_tensor *x, int64_t offset, int channels, const ln_tokens *tokens) {
    if (whole_rows(x, channels)) {
        for (int t = 0; t < tokens->count; t++) {
            const real *row = (const real *)x->data + offset + token_at(tokens, t) * x->token;
            UNROLL for (int r = 0; r < REGISTERS; r++) store(tile + t * WIDTH + r * LANES, load_loose(row + r * LANES));
        }
        return;
    }
    if (x->channel == 1) { /* rows of few channels, or of other numbers */
        memset(tile, 0, sizeof(real) * WIDTH * (size_t)tokens->count);
        for (int t = 0; t < tokens->count; t++)
            read_row(tile + t * WIDTH, x, offset + token_at(tokens, t) * x->token, 1, channels, NULL);
        return;
    }
    real buffer[WIDTH * LN_CHUNK] __attribute__((aligned(64)));
    const real *columns = buffer;
    int64_t column = LN_CHUNK; /* from one channel to the next */
    if (whole_columns(x, channels, tokens)) {
        columns = (const real *)x->data + offset + tokens->first, column = x->channel;
    } else {
        memset(buffer, 0, sizeof buffer);
        for (int c = 0; c < channels; c++)
            read_row(buffer + c * LN_CHUNK, x, offset + c * x->channel + start_of(x, tokens), x->token, tokens->count,
                     order_of(tokens));
    }
    for (int t = 0; t < tokens->count; t += LANES)
        for (int c = 0; c < WIDTH; c += LANES) {
            vec v[LANES];
            UNROLL for (int i = 0; i < LANES; i++) v[i] = load_loose(columns + (c + i) * column + t);
            transpose(v);
            UNROLL for (int i = 0; i < LANES; i++) store(tile + (t + transposed(i)) * WIDTH + c, v[i]);
        }
}

/* The way back; adds to what is there if `add`. */
static void write_tile(real *restrict tile, const ln_tensor *x, int64_t offset, int channels, const ln_tokens *tokens, bool add) {
    if (add) {
        real there[WIDTH * LN_CHUNK] __attribute__((aligned(64)));
        read_tile(there, x, offset, channels, tokens);
        for (int i = 0; i < tokens->count * WIDTH; i += LANES) store(tile + i, load(tile + i) + load(there + i));
    }
    if (x->channel == 1) {
        for (int t = 0; t < tokens->count; t++)
            write_row(tile + t * WIDTH, x, offset + token_at(tokens, t) * x->token, 1, channels, NULL);
        return;
    }
    real buffer[WIDTH * LN_CHUNK] __attribute__((aligned(64)));
    real *columns = buffer;
    int64_t column = LN_CHUNK;
    const bool whole = whole_columns(x, channels, tokens);
    if (whole) columns = (real *)x->data + offset + tokens->first, column = x->channel;
    for (int t = 0; t < tokens->count; t += LANES)
        for (int c = 0; c < WIDTH; c += LANES) {
            vec v[LANES];
            UNROLL for (int i = 0; i < LANES; i++) v[i] = load(tile + (t + i) * WIDTH + c);
            transpose(v);
            UNROLL for (int i = 0; i < LANES; i++) store_loose(columns + (c + transposed(i)) * column + t, v[i]);
        }
    if (!whole)
        for (int c = 0; c < channels; c++)
            write_row(buffer + c * LN_CHUNK, x, offset + c * x->channel + start_of(x, tokens), x->token, tokens->count,
                      order_of(tokens));
}

#endif
