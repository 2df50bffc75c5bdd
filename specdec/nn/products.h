/* Products of small matrices, and the layouts that they read.
 *
 * A weight [n, k] of a product lies in blocks of LANES n; in a block, for every PAIR of k, LANES times those PAIR
 * numbers: what one instruction multiplies.
 */
#include "vectors.h"

#define BLOCK 64 /* k of a weight that is filled LANES by LANES */
#define TILE 6   /* rows of a product for whose sums with ACROSS LANES columns there are registers */
#define ACROSS (REGISTERS == 32 ? 4 : 2)

/* LANES times number j of PAIR numbers */
INLINE vec one_of(const elem *x, int j) {
#ifdef FLOAT32
    return spread(x[j]);
#else
#if defined(__AVX2__) /* GCC would shift before it spreads, or keep what it spread: too many instructions, or registers */
    bits all;
    __asm__ volatile("vpbroadcastd %1, %0" : "=v"(all) : "m"(*(const uint32_t *)x));
#else
    uint32_t both;
    memcpy(&both, x, 4);
    bits all = (bits){0} + both;
#endif
    return (vec)(j ? all & 0xffff0000u : all << 16);
#endif
}

/* Two rows of a weight's k, an even one and the next, LANES of its n. */
INLINE void store_two(elem *to, vec even, vec odd) {
#if defined(FLOAT32)
    store(to, even), store(to + LANES, odd);
#elif defined(__AVX512BF16__)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, (__m512i)both));
#else
    *(bits *)to = rounded(even) >> 16 | rounded(odd);
#endif
}

/* x [LANES, LANES] transposed: halves, quarters, ... that are on the wrong side of the diagonal change places. */
INLINE void transpose(vec *x) {
#ifdef __clang__ /* has no shuffle by a vector */
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            float other = x[i][j];
            x[i][j] = x[j][i], x[j][i] = other;
        }
#else
    const ints lane = lanes_from(0);
#pragma GCC unroll 4
    for (int step = LANES / 2; step; step /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & step)) {
                ints right = (lane & step) != 0; /* a lane of x[i + step] is LANES further */
                vec upper = __builtin_shuffle(x[i], x[i + step], lane + (right & (LANES - step)));
                x[i + step] = __builtin_shuffle(x[i], x[i + step], lane + ((right & LANES) | (~right & step)));
                x[i] = upper;
            }
#endif
}

/* LANES rows, of which those from `live` on are zeros, as a block of a weight [n, D] */
INLINE void pack_rows(elem *to, const elem *rows, int64_t ld, int64_t live, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES * PAIR) {
        vec x[LANES];
#pragma GCC unroll 16
        for (int n = 0; n < LANES; n++) x[n] = n < live ? *(const vec *)(rows + n * ld + i) : (vec){0};
        transpose(x);
#pragma GCC unroll 16
        for (int n = 0; n < LANES; n++) *(vec *)(to + (i + n * PAIR) * LANES) = x[n];
    }
}

/* The same rows as LANES of the k of a weight [D, BLOCK] */
INLINE void pack_down(elem *to, const elem *rows, int64_t ld, int64_t live, int64_t size) {
    for (int64_t n = 0; n < LANES; n += 2)
        for (int64_t i = 0; i < size; i += LANES) {
            vec even = n < live ? load(rows + n * ld + i) : (vec){0};
            vec odd = n + 1 < live ? load(rows + (n + 1) * ld + i) : (vec){0};
            store_two(to + i * BLOCK + n * LANES, even, odd);
        }
}

/* The same rows as LANES columns of x [D, BLOCK] */
INLINE void put_across(elem *to, const elem *rows, int64_t ld, int64_t live, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        vec x[LANES];
#pragma GCC unroll 16
        for (int n = 0; n < LANES; n++) x[n] = n < live ? load(rows + n * ld + i) : (vec){0};
        transpose(x);
#pragma GCC unroll 16
        for (int n = 0; n < LANES; n++) store(to + (i + n) * BLOCK, x[n]);
    }
}

/* rows [LANES, D] of LANES columns of x [D, BLOCK] */
INLINE void take_across(float *rows, const float *x, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        vec found[LANES];
#pragma GCC unroll 16
        for (int n = 0; n < LANES; n++) found[n] = *(const vec *)(x + (i + n) * BLOCK);
        transpose(found);
#pragma GCC unroll 16
        for (int n = 0; n < LANES; n++) *(vec *)(rows + n * size + i) = found[n];
    }
}

/* out [rows, LANES * blocks] (add: +)= x [rows, k] w^T, for numbers of rows and blocks that the compiler knows */
INLINE void tile(const int rows, const int blocks, const elem *x, int64_t ldx, const elem *w, int64_t ldw, int64_t k,
                 float *out, int64_t ldo, int add) {
    vec sum[TILE][ACROSS]; /* of a constant size, so that it stays in registers */
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < blocks; n++) sum[m][n] = add ? *(const vec *)(out + m * ldo + n * LANES) : (vec){0};
    for (int64_t i = 0; i < k; i += PAIR) {
#if defined(__AVX512BF16__) && !defined(FLOAT32)
        __m512bh weight[4];
#pragma GCC unroll 4
        for (int n = 0; n < blocks; n++) weight[n] = (__m512bh)_mm512_loadu_si512(w + n * ldw + i * LANES);
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            int32_t pair;
            memcpy(&pair, x + m * ldx + i, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int n = 0; n < blocks; n++) sum[m][n] = (vec)_mm512_dpbf16_ps((__m512)sum[m][n], both, weight[n]);
        }
#else
#pragma GCC unroll 2
        for (int j = 0; j < PAIR; j++) {
            vec weight[ACROSS];
#pragma GCC unroll 4
            for (int n = 0; n < blocks; n++) weight[n] = every(w + n * ldw + i * LANES, j);
#pragma GCC unroll 6
            for (int m = 0; m < rows; m++) {
                vec one = one_of(x + m * ldx + i, j);
#pragma GCC unroll 4
                for (int n = 0; n < blocks; n++) sum[m][n] += one * weight[n];
            }
        }
#endif
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < blocks; n++) *(vec *)(out + m * ldo + n * LANES) = sum[m][n];
}

/* The same for any number of rows and up to ACROSS blocks; a sum does not depend on what is computed beside it. */
static void strip(int64_t rows, int blocks, const elem *x, int64_t ldx, const elem *w, int64_t ldw, int64_t k,
                  float *out, int64_t ldo, int add) {
#define WITH(ROWS, BLOCKS) \
    case BLOCKS: tile(ROWS, BLOCKS, x + m * ldx, ldx, w, ldw, k, out + m * ldo, ldo, add); break;
#if REGISTERS == 32
#define UP_TO(ROWS) WITH(ROWS, 1) WITH(ROWS, 2) WITH(ROWS, 3) WITH(ROWS, 4)
#else
#define UP_TO(ROWS) WITH(ROWS, 1) WITH(ROWS, 2)
#endif
#define TILES(ROWS) \
    for (; m + ROWS <= rows; m += ROWS) switch (blocks) { UP_TO(ROWS) }
    int64_t m = 0;
    TILES(TILE)
    TILES(4)
    TILES(1)
}

/* The same for any number of blocks */
static void multiply(int64_t rows, int64_t blocks, const elem *x, int64_t ldx, const elem *w, int64_t ldw, int64_t k,
                     float *out, int64_t ldo, int add) {
    for (int64_t n = 0; n < blocks; n += ACROSS)
        strip(rows, least(ACROSS, blocks - n), x, ldx, w + n * ldw, ldw, k, out + n * LANES, ldo, add);
}
