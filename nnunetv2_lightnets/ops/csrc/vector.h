/* Vectors of LANES numbers of type `real`, on the vector extensions of GCC and clang.
 *
 * Chosen on the compiler's command line: VECTOR_BYTES (16, 32, 64), DOUBLE (defined: double precision) and SUFFIX,
 * which keeps the symbols of the builds apart.
 */
#ifndef LN_VECTOR_H
#define LN_VECTOR_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
typedef uint64_t bits;
#define REAL_BYTES 8
#define REAL_DTYPE LN_FLOAT64
#define PRECISION f64
#define X86_TYPE pd
#else
typedef float real;
typedef uint32_t bits;
#define REAL_BYTES 4
#define REAL_DTYPE LN_FLOAT32
#define PRECISION f32
#define X86_TYPE ps
#endif

#define LANES (VECTOR_BYTES / REAL_BYTES)

#define LN_JOIN(a, b, c) a##_##b##_##c
#define LN_EXPAND(a, b, c) LN_JOIN(a, b, c)
#define NAME(function) LN_EXPAND(function, PRECISION, SUFFIX)

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef bits vbits __attribute__((vector_size(VECTOR_BYTES)));
typedef real tight __attribute__((vector_size(VECTOR_BYTES), may_alias)); /* of aligned numbers in memory */
typedef real loose __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));

INLINE vec splat(real x) { return x - (vec){0}; } /* x - 0 is x, for -0 too */
INLINE vec load(const real *p) { return *(const tight *)p; }
INLINE void store(real *p, vec x) { *(tight *)p = x; }
INLINE vec load_loose(const void *p) { return *(const loose *)p; }
INLINE void store_loose(void *p, vec x) { *(loose *)p = x; }

/* C has no ?: on vectors. Lanes of a mask are all ones or all zeros, as comparisons give them. */
#define pick(mask, yes, no) ((vec)(((vbits)(mask) & (vbits)(yes)) | (~(vbits)(mask) & (vbits)(no))))
/* Both keep a NaN in x: x86's own instructions return the second operand where one is a NaN. */
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
#define X86(operation) LN_EXPAND(_mm512, operation, X86_TYPE)
#elif VECTOR_BYTES == 32 && defined(__AVX__)
#define X86(operation) LN_EXPAND(_mm256, operation, X86_TYPE)
#elif VECTOR_BYTES == 16 && defined(__SSE2__)
#define X86(operation) LN_EXPAND(_mm, operation, X86_TYPE)
#endif
#ifdef X86
#include <immintrin.h>
INLINE vec at_least(vec x, vec low) { return X86(max)(low, x); }
INLINE vec at_most(vec x, vec high) { return X86(min)(high, x); }
#else
INLINE vec at_least(vec x, vec low) { return pick(x < low, low, x); }
INLINE vec at_most(vec x, vec high) { return pick(x > high, high, x); }
#endif
INLINE vec magnitude(vec x) { return (vec)((vbits)x & ~(vbits)splat((real)-0.0)); }

/* Shuffles of two vectors, one pair per doubling of the run: single elements and pairs stay within 128 bits, which
 * every instruction set does in one step; whole 128-bit blocks move last. */
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vbits){__VA_ARGS__})
#endif

#if LANES == 2
#define STAGES 1
#define LOW1(a, b) SHUFFLE(a, b, 0, 2)
#define HIGH1(a, b) SHUFFLE(a, b, 1, 3)
#elif LANES == 4
#define STAGES 2
#define LOW1(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define HIGH1(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#elif LANES == 8
#define STAGES 3
#define LOW1(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH1(a, b) SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define LOW3(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define HIGH3(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#elif LANES == 16
#define STAGES 4
#define LOW1(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH1(a, b) SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define LOW3(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define HIGH3(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#define LOW4(a, b) LOW3(a, b)
#define HIGH4(a, b) HIGH3(a, b)
#endif

/* Sums each of LANES vectors over its lanes; sum i is lane i of the result. Destroys v. */
INLINE vec sum_lanes(vec v[LANES]) {
#define ADD_PAIRS(stage)                                     \
    UNROLL for (int i = 0; i < (LANES >> (stage)); i++)      \
        v[i] = LOW##stage(v[2 * i], v[2 * i + 1]) + HIGH##stage(v[2 * i], v[2 * i + 1]);
    ADD_PAIRS(1)
#if STAGES > 1
    ADD_PAIRS(2)
#endif
#if STAGES > 2
    ADD_PAIRS(3)
#endif
#if STAGES > 3
    ADD_PAIRS(4)
#endif
#undef ADD_PAIRS
    return v[0];
}

/* Transposes LANES x LANES numbers in registers; column i lands in v[transposed(i)]. */
INLINE void transpose(vec v[LANES]) {
#define SWAP_PAIRS(stage)                                                 \
    UNROLL for (int i = 0; i < LANES; i++)                                \
        if (!(i & (1 << ((stage)-1)))) {                                  \
            const int j = i | (1 << ((stage)-1));                         \
            const vec low = LOW##stage(v[i], v[j]), high = HIGH##stage(v[i], v[j]); \
            v[i] = low;                                                   \
            v[j] = high;                                                  \
        }
    SWAP_PAIRS(1)
#if STAGES > 1
    SWAP_PAIRS(2)
#endif
#if STAGES > 2
    SWAP_PAIRS(3)
#endif
#if STAGES > 3
    SWAP_PAIRS(4)
#endif
#undef SWAP_PAIRS
}
/* LOW1 gives columns 0 and 1, HIGH1 2 and 3: the lowest two bits of the index come out exchanged. */
#if LANES == 2
#define transposed(i) (i)
#else
#define transposed(i) (((i) & ~3) | (((i) & 1) << 1) | (((i) >> 1) & 1))
#endif

#endif
