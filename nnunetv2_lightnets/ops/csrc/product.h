/* Matrix products of a few hundred rows, which stay in the caches: c (+)= a b, with b in panels of PANEL columns.
 *
 * A tile of ROWS x PANEL sums stays in registers; each step multiplies ROWS numbers of a with two vectors of b.
 */
#ifndef LN_PRODUCT_H
#define LN_PRODUCT_H

#include "lightnets.h"
#include "tile.h"

enum { PANEL = 2 * LANES, ROWS = VECTOR_BYTES < 64 ? 4 : 8 };

/* Entry (i, k) of `a` at base + i * row + k * step. */
typedef struct {
    const real *base;
    int64_t row, step;
} factor;

/* Column j of row k of `b` at base + j / PANEL * panel + k * row + j % PANEL. */
typedef struct {
    const real *base;
    int64_t row, panel;
} panels;

/* Rows of activations as `b`: panels that lie side by side. */
INLINE panels as_panels(const real *base, int64_t row) { return (panels){base, row, PANEL}; }

/* `by_rows`: the rows of a are neighbours in memory, or else its steps. */
INLINE void product_tile(real *c, int64_t c_row, factor a, const real *b, int64_t b_row, int depth, bool add, const int rows,
                         const int vectors, const bool by_rows) {
    vec sum[ROWS][2];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = splat(0);
    const real *from = a.base;
    for (int k = 0; k < depth; k++, b += b_row, from += by_rows ? a.step : 1) {
        vec column[2];
        UNROLL for (int v = 0; v < vectors; v++) column[v] = load(b + v * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            const vec x = splat(by_rows ? from[i] : from[i * a.row]);
            UNROLL for (int v = 0; v < vectors; v++) sum[i][v] += x * column[v];
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++) {
            real *to = c + i * c_row + v * LANES;
            store(to, add ? load(to) + sum[i][v] : sum[i][v]);
        }
}

INLINE void product_columns(real *c, int64_t c_row, factor a, const real *b, int64_t b_row, int rows, int depth, bool add,
                            const int vectors, const bool by_rows) {
#define TILE_OF(count)                                                                  \
    do {                                                                                \
        product_tile(c, c_row, a, b, b_row, depth, add, count, vectors, by_rows);       \
        c += (count) * c_row, a.base += (count) * (by_rows ? 1 : a.row);                \
    } while (0)
    for (; rows >= ROWS; rows -= ROWS) TILE_OF(ROWS);
    if (rows & 4) TILE_OF(4);
    if (rows & 2) TILE_OF(2);
    if (rows & 1) TILE_OF(1);
#undef TILE_OF
}

/* c (rows, columns) = a (rows, depth) b (depth, columns), plus what is there if `add`: long sums are so made of short
 * ones, which keeps them exact. Columns are filled up to a
 * multiple of WIDTH. Either a.row or a.step is 1. */
static void product(real *c, int64_t c_row, factor a, panels b, int rows, int64_t columns, int depth, bool add) {
    const bool by_rows = a.row == 1 && a.step != 1;
    for (; columns > 0; columns -= PANEL, c += PANEL, b.base += b.panel) {
        if (columns > LANES || WIDTH == PANEL) {
            if (by_rows) product_columns(c, c_row, a, b.base, b.row, rows, depth, add, 2, true);
            else product_columns(c, c_row, a, b.base, b.row, rows, depth, add, 2, false);
        } else {
            if (by_rows) product_columns(c, c_row, a, b.base, b.row, rows, depth, add, 1, true);
            else product_columns(c, c_row, a, b.base, b.row, rows, depth, add, 1, false);
        }
    }
}

/* Numbers of panels for a matrix of this size. */
INLINE int64_t panel_numbers(int64_t depth, int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL * depth; }

/* Copies rows `from` .. `from + depth` of panels from a weight, whose entry (k, j) is weight[k * step + j * column]. */
static void pack(real *to, int64_t panel_depth, int64_t first_column, const real *weight, int64_t depth, int64_t columns,
                 int64_t step, int64_t column) {
    for (int64_t j = 0; j < columns; j++) {
        const int64_t at = first_column + j;
        real *entry = to + at / PANEL * PANEL * panel_depth + at % PANEL;
        for (int64_t k = 0; k < depth; k++) entry[k * PANEL] = weight[k * step + j * column];
    }
}

#endif
