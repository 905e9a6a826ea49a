/* Exponential, softplus and sigmoid of a vector.
 *
 * All take any input: results underflow to 0 (or next to it) and overflow to infinity, and a NaN stays one.
 */
#ifndef LN_VECTOR_MATH_H
#define LN_VECTOR_MATH_H

#include "vector.h"

#ifdef DOUBLE
#define MANTISSA_BITS 52
#define ROUNDER 0x1.8p52
#define EXPONENT_RANGE 1023
#else
#define MANTISSA_BITS 23
#define ROUNDER 0x1.8p23
#define EXPONENT_RANGE 127
#endif

#define LOG2_E 1.4426950408889634074
#define LN_2 0.69314718055994530942

/* 2^r * 2^f for |f| <= 1/2, with `rounded` = ROUNDER + r: its lowest bits are the integer r.
 *
 * The polynomial is 1 + f * q(f) with the constant exactly 1: the error then vanishes as f -> 0, which is where a
 * state decays slowly and errors add up over the longest time.
 */
INLINE vec exp2_parts(vec rounded, vec f) {
#ifdef DOUBLE
    /* Taylor: ln(2)^k / k!, remainder below 5e-18 */
    static const real q[] = {0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,  0x1.c6b08d704a0c0p-5,   0x1.3b2ab6fba4e77p-7,
                             0x1.5d87fe78a6731p-10, 0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20,
                             0x1.b5253d395e7c4p-24, 0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32, 0x1.c3bd650fc2986p-36,
                             0x1.816193166d0f9p-40};
#else
    /* Remez fit of (2^f - 1) / f, weighted for the relative error of 2^f: 9.2e-8 */
    static const real q[] = {0.69314698f, 0.24022242f, 0.05550734f, 0.00967151f, 0.00132647f};
#endif
    enum { TERMS = sizeof(q) / sizeof(q[0]) };
    vec p = splat(q[TERMS - 1]);
    UNROLL for (int i = TERMS - 2; i >= 0; i--) p = p * f + q[i];
    p = p * f + 1;
    return (vec)((vbits)p + ((vbits)rounded << MANTISSA_BITS));
}

/* 2^x; |x| must stay below EXPONENT_RANGE - 1 unless `clamp` is set. */
INLINE vec exp2_of(vec x, bool clamp) {
    if (clamp) x = at_most(at_least(x, splat(-EXPONENT_RANGE)), splat(EXPONENT_RANGE + 1));
    const vec rounded = x + (real)ROUNDER;
    return exp2_parts(rounded, x - (rounded - (real)ROUNDER));
}

/* e^x for x <= 0; nothing below the smallest normal number (1e-38, 2e-308) comes out. ln(2) is taken off in two parts,
 * the first short enough for its product with any exponent to be exact. */
INLINE vec exp_of_negative(vec x) {
#ifdef DOUBLE
    const real high = 0x1.62e42fefa3800p-1, low = 0x1.ef35793c76730p-45;
#else
    const real high = 0x1.62e4p-1f, low = 0x1.7f7d1cp-20f;
#endif
    x = at_least(x, splat((real)((1 - EXPONENT_RANGE) * LN_2)));
    const vec rounded = x * (real)LOG2_E + (real)ROUNDER;
    const vec r = rounded - (real)ROUNDER;
    return exp2_parts(rounded, ((x - r * high) - r * low) * (real)LOG2_E);
}

/* log(1 + e) for 0 <= e <= 1, to full relative precision: 2 artanh(e / (2 + e)) as a series of odd powers. */
INLINE vec log1p_of(vec e) {
    const vec s = e / (2 + e), s2 = s * s; /* s <= 1/3 */
#ifdef DOUBLE
    vec p = splat(1.0 / 37);
    UNROLL for (int k = 35; k >= 3; k -= 2) p = p * s2 + 1.0 / k;
#else
    /* Remez fit of (artanh(s) / s - 1) / s^2, 4.5e-9 */
    vec p = splat(0.14012229f);
    p = p * s2 + 0.13999571f;
    p = p * s2 + 0.2001085f;
    p = p * s2 + 0.33333207f;
#endif
    return 2 * s + 2 * s * s2 * p;
}

/* softplus(x) = log(1 + e^x), its derivative e^x / (1 + e^x) = sigmoid(x), from x and e = e^-|x|. They are apart from the
 * exponential because a long chain of dependent steps per number leaves the processor waiting: loops take one after the
 * other. */
INLINE vec folded_exp(vec x) { return exp_of_negative(-magnitude(x)); }
INLINE vec softplus_from(vec x, vec e) { return at_least(x, splat(0)) + log1p_of(e); }
INLINE vec sigmoid_from(vec x, vec e) { return pick(x < 0, e, splat(1)) / (1 + e); }

#endif
