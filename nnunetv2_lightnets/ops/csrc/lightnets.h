/* What the library exports, and what its files share.
 *
 * No Python and no torch headers: the library is plain C behind ctypes, so one build serves every version of both.
 * Each source named *_kernel.c is compiled once per instruction set and precision; dispatch.c picks at run time.
 */
#ifndef LIGHTNETS_H
#define LIGHTNETS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define LN_PUBLIC __attribute__((visibility("default")))
#else
#error "needs the vector extensions of GCC or clang"
#endif

/* The number of this interface. Raise it, and ABI in ops/native_library.py, with every change to what is exported: a
 * library that was built before is then refused, not called with what it would misread. */
enum { LN_ABI = 3 };

enum { LN_CHUNK = 64 }; /* tokens between two saved states; record.py knows the same number */

enum { LN_FLOAT32 = 0, LN_FLOAT64 = 1, LN_BFLOAT16 = 2, LN_FLOAT16 = 3 };

enum { LN_OK = 0, LN_NO_MEMORY = 1 };

/* A tensor by its strides, counted in elements. `outer` walks directions or groups, whichever the call has. */
typedef struct {
    void *data; /* NULL where the argument is not given */
    int64_t batch, outer, channel, token;
    int64_t dtype;
} ln_tensor;

/* Arguments of a scan. Parameters and states are dense, in the compute precision; R = directions * channels. */
typedef struct {
    int64_t batch, directions, groups, channels, length, states;
    int64_t softplus, threads;
    const int32_t *order; /* (directions, length): image index of each token, checked by the caller; NULL: as they lie */

    ln_tensor u, delta, z;  /* (batch, channels, length), delta: one per direction */
    ln_tensor B, C;         /* (batch, groups or directions, states, length) */
    const void *A;          /* (R, states) */
    const void *D;          /* (R), may be NULL */
    const void *delta_bias; /* (R), may be NULL */

    ln_tensor out;
    /* (batch, R, states), may be NULL: zero, or not asked for. In the backward call their gradients: initial_state is
     * written, last_state read. */
    void *initial_state, *last_state;
    void *checkpoints; /* (batch, directions, chunks, states, channels), may be NULL in the forward call */

    /* The backward call alone. */
    ln_tensor grad_out, du, ddelta, dz, dB, dC; /* dB and dC in the compute precision */
    void *dA, *dD, *ddelta_bias;                /* as A, D, delta_bias */
} ln_scan;

/* Arguments of a causal depthwise convolution, y[l] = act(bias + sum_k weight[k] * x[l - width + 1 + k]). */
typedef struct {
    int64_t batch, channels, length, width;
    int64_t silu, threads;
    ln_tensor x, y;
    const void *weight; /* (channels, width) */
    const void *bias;   /* (channels), may be NULL */

    /* The backward call alone. */
    ln_tensor grad_y, dx;
    void *dweight, *dbias;
} ln_conv;

/* Arguments of a whole Mamba layer, all dense and in the compute precision:
 *
 *   x = relu(group_norm(tokens))  or tokens;   m = mamba(layer_norm(x))  or mamba(x);
 *   out = proj(layer_norm(m + skip_scale x))  with the same layer norm;  or m
 *
 * mamba: in_weight gives u and the gate z; causal convolution and SiLU of u; x_weight gives dt, B and C; dt_weight the
 * steps; scan; out_weight. Weights are (outputs, inputs). Group norm, layer norm and proj are left out where NULL. */
typedef struct {
    int64_t batch, length, channels, inner, states, rank, width, outputs, groups;
    int64_t run; /* tokens that are computed at a time, a multiple of LN_CHUNK */
    int64_t threads;
    double group_eps, norm_eps;
    const void *tokens; /* (batch, length, channels) */
    const void *group_weight, *group_bias, *norm_weight, *norm_bias; /* (channels) */
    const void *in_weight, *conv_weight, *conv_bias; /* (2 inner, channels), (inner, width), (inner) */
    const void *x_weight, *dt_weight, *dt_bias;      /* (rank + 2 states, inner), (inner, rank), (inner) */
    const void *A, *D, *out_weight;                  /* (inner, states), (inner), (channels, inner) */
    const void *skip_scale, *proj_weight, *proj_bias; /* (1), (outputs, channels), (outputs) */
    void *out;        /* (batch, length, outputs) */
    void *run_states; /* (batch, runs, states, inner): before each run; may be NULL in the forward call */
    void *moments;    /* (batch, groups, 2): mean and reciprocal deviation */

    /* The backward call alone; gradients of parameters in the order and shapes of those above. */
    const void *grad_out;
    void *dtokens, *dgroup_weight, *dgroup_bias, *dnorm_weight, *dnorm_bias, *din_weight, *dconv_weight, *dconv_bias;
    void *dx_weight, *ddt_weight, *ddt_bias, *dA, *dD, *dout_weight, *dskip_scale, *dproj_weight, *dproj_bias;
} ln_mamba;

typedef _Atomic int64_t ln_count;

/* Runs task(context, 0 .. tasks - 1, scratch) on at most `threads` threads; each has its own 64-byte aligned scratch.
 * Tasks are handed out in order; which thread gets which is not defined. Returns LN_OK or LN_NO_MEMORY. */
typedef void (*ln_task)(const void *context, int64_t task, void *scratch);
int ln_parallel(int64_t threads, int64_t tasks, size_t scratch_bytes, ln_task task, const void *context);

/* Waits until `*count` has reached `target`, which a task that was handed out before brings about. */
void ln_wait(ln_count *count, int64_t target);

/* malloc for scratch of any size, aligned to 64 bytes at least. */
void *ln_allocate(size_t bytes);

/* Kernels of one instruction set. */
typedef struct {
    const char *name;
    int (*scan_forward[2])(const ln_scan *); /* float32, float64 */
    int (*scan_backward[2])(const ln_scan *);
    int (*conv_forward[2])(const ln_conv *);
    int (*conv_backward[2])(const ln_conv *);
    int (*mamba_forward[2])(const ln_mamba *);
    int (*mamba_backward[2])(const ln_mamba *);
    int64_t (*mamba_bytes[2])(const ln_mamba *, bool backward);
} ln_kernels;

#endif
