/* What Python calls: one entry per operation, and the choice of an instruction set.
 *
 * setup.py defines LN_<SET> for each set it could compile. Names follow the x86-64 levels of the System V ABI.
 */
#include <string.h>

#include "lightnets.h"

#define DECLARE_ONE(operation, set) \
    int operation##_forward_f32_##set(const ln_##operation *), operation##_forward_f64_##set(const ln_##operation *), \
        operation##_backward_f32_##set(const ln_##operation *), operation##_backward_f64_##set(const ln_##operation *);
#define DECLARE(set)                                                            \
    DECLARE_ONE(scan, set) DECLARE_ONE(conv, set) DECLARE_ONE(mamba, set)       \
    int64_t mamba_bytes_f32_##set(const ln_mamba *, bool), mamba_bytes_f64_##set(const ln_mamba *, bool);
#define KERNELS_OF(operation, set)                                  \
    {operation##_forward_f32_##set, operation##_forward_f64_##set}, \
    {operation##_backward_f32_##set, operation##_backward_f64_##set}
#define KERNELS(label, set)                                                           \
    {label, KERNELS_OF(scan, set), KERNELS_OF(conv, set), KERNELS_OF(mamba, set), \
     {mamba_bytes_f32_##set, mamba_bytes_f64_##set}}

DECLARE(baseline)
#ifdef LN_AVX2
DECLARE(avx2)
#endif
#ifdef LN_AVX512
DECLARE(avx512)
#endif

/* The best first; the baseline runs everywhere. */
static const ln_kernels sets[] = {
#ifdef LN_AVX512
    KERNELS("avx512", avx512),
#endif
#ifdef LN_AVX2
    KERNELS("avx2", avx2),
#endif
    KERNELS("baseline", baseline),
};
enum { SETS = sizeof(sets) / sizeof(sets[0]) };

static int runs_here(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(name, "baseline");
}

/* Name of the i-th instruction set that this processor runs, the best first; NULL past the last. */
LN_PUBLIC const char *ln_instruction_set(int64_t i) {
    for (int set = 0; set < SETS; set++)
        if (runs_here(sets[set].name) && i-- == 0) return sets[set].name;
    return NULL;
}

static const ln_kernels *kernels = NULL;

/* Chooses by name; 0 if this build or processor has it not. Not to be called while an operation runs. */
LN_PUBLIC int ln_choose(const char *name) {
    for (int set = 0; set < SETS; set++)
        if (!strcmp(sets[set].name, name) && runs_here(name)) {
            kernels = &sets[set];
            return 1;
        }
    return 0;
}

/* Tells the caller whether it speaks of the same types: the first `count` of LN_ABI, their sizes, and LN_CHUNK. */
LN_PUBLIC void ln_abi(int64_t *numbers, int64_t count) {
    const int64_t mine[] = {LN_ABI, sizeof(ln_tensor), sizeof(ln_scan), sizeof(ln_conv), sizeof(ln_mamba), LN_CHUNK};
    for (int64_t i = 0; i < count; i++) numbers[i] = i < (int64_t)(sizeof mine / sizeof mine[0]) ? mine[i] : 0;
}

/* `precision` is LN_FLOAT32 or LN_FLOAT64: of parameters, states and all arithmetic. */
LN_PUBLIC int ln_scan_forward(const ln_scan *s, int64_t precision) { return kernels->scan_forward[precision](s); }
LN_PUBLIC int ln_scan_backward(const ln_scan *s, int64_t precision) { return kernels->scan_backward[precision](s); }
LN_PUBLIC int ln_conv_forward(const ln_conv *c, int64_t precision) { return kernels->conv_forward[precision](c); }
LN_PUBLIC int ln_conv_backward(const ln_conv *c, int64_t precision) { return kernels->conv_backward[precision](c); }
LN_PUBLIC int ln_mamba_forward(const ln_mamba *l, int64_t precision) { return kernels->mamba_forward[precision](l); }
LN_PUBLIC int ln_mamba_backward(const ln_mamba *l, int64_t precision) { return kernels->mamba_backward[precision](l); }
/* Bytes that such a call allocates; of its pointers only whether they are NULL matters. */
LN_PUBLIC int64_t ln_mamba_bytes(const ln_mamba *l, int64_t precision, int64_t backward) {
    return kernels->mamba_bytes[precision](l, backward);
}
