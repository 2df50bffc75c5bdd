/* Products of a large weight with the inputs of few tokens, which is what decoding and verifying wait for: every weight
 * is read once, in the order it lies in memory, for all of them. A sum does not depend on what is computed beside it.
 *
 * Layout of a weight [N, K]: blocks of LANES of its rows; in a block, for every PAIR of k (of a weight in bytes:
 * BYTE_PAIR), LANES times those PAIR numbers: what one instruction multiplies. Sizes are padded with zeros: N to WHOLE, K
 * to PAIR.
 */
#pragma once
#include "vectors.h"

#define WHOLE 16 /* to multiples of which sizes are padded, whatever LANES is */
#define TILE (REGISTERS == 32 ? 13 : 6) /* the most tokens that share one reading of a weight */
#define HALF 6   /* as many of them as have registers for sums with four blocks, or two of sixteen registers: faster where there are several tiles */
#define FAR 2048 /* bytes of a block of a weight, to be asked for ahead of need where there is much to compute with each */
#define BUSY (REGISTERS == 32 ? HALF : 2) /* tokens of one tile beyond which there is */
#define CHUNK 512 /* k of a weight that stays in the nearest cache while several tiles read it */
#define MOST_BLOCKS 8 /* of a weight that are read side by side */
#define MOST_WIDENED 16384 /* k, so that threads have room on their stacks */
#define HEIGHT 64 /* tokens whose sums with a weight in bytes are kept at a time */

typedef struct { /* a weight in the layout above */
    const void *weight; /* elem; with a scale bytes, of which each stands for scale[n] * (byte - 64) */
    const float *bias;  /* or NULL */
    int64_t n, k;       /* padded */
    const float *scale; /* [n] or NULL */
} Linear;

#if defined(__AVX512BF16__) && !defined(FLOAT32)
#define BYTE_PAIR 2 /* as PAIR, of a weight in bytes */
#define OFFSET 192  /* of what a byte is read as: with the bits of 128 before it, it is a bfloat16 from 128 to 255 */
#else
#define BYTE_PAIR 1
#define OFFSET 64
#endif

typedef struct { /* Two streams of a weight that memory is asked for while a tile is computed */
    const char *first, *second;
} Ahead;

typedef struct { /* What memory is asked for while a strip is computed; zeros: nothing */
    int64_t far;                 /* bytes behind what is at hand, in its own blocks; or */
    const char *next;            /* `blocks` others from here on, */
    int64_t blocks, tiles, tile; /* by each of so many tiles in turn, from `tile` on, its share */
} Wanted;

/* What products multiply weights with: numbers as they are where an instruction takes them, else float32. */
#if defined(__AVX512BF16__) || defined(FLOAT32)
#define WIDENS 0
typedef elem input;
#else
#define WIDENS 1
typedef float input;
#endif

typedef struct {
    const input *x;
    int64_t ld;
} Inputs;

#define APART(k) ((k) + LANES) /* a power of two apart, rows would drive each other out of the cache */

/* x [mt, k]; `room` is for [mt, APART(k)]. */
INLINE Inputs inputs_of(const elem *x, int64_t ldx, int64_t mt, int64_t k, input *room) {
#if WIDENS
    for (int64_t m = 0; m < mt; m++) {
        int64_t i = 0;
        for (; i + LANES <= k; i += LANES) *(vec *)(room + m * APART(k) + i) = load(x + m * ldx + i);
        for (; i < k; i++) room[m * APART(k) + i] = widen(x[m * ldx + i]);
    }
    return (Inputs){room, APART(k)};
#else
    (void)mt, (void)k, (void)room;
    return (Inputs){x, ldx};
#endif
}

/* out[m, LANES n ..] (add: +)= sum over k of x[m, k] w[n, k], for mt tokens and nb blocks of the weight; of one in bytes,
   w is byte + OFFSET - 64 */
INLINE void tile(const int mt, const int nb, const int bytes, const input *x, int64_t ldx, const void *w, int64_t ldw,
                 int64_t k, float *out, int64_t ldo, int add, Ahead ahead) {
    vec sum[TILE][8]; /* of a constant size, so that it stays in registers */
#pragma GCC unroll 13
    for (int m = 0; m < mt; m++)
#pragma GCC unroll 8
        for (int n = 0; n < nb; n++) sum[m][n] = add ? *(const vec *)(out + m * ldo + n * LANES) : (vec){0};
    for (int64_t i = 0; i < k; i += PAIR) {
        const elem *here = (const elem *)w + i * LANES;
        const uint8_t *byte = (const uint8_t *)w + i * LANES;
        __builtin_prefetch(ahead.first + i * LANES * sizeof(elem), 0, 2);
        __builtin_prefetch(ahead.second + i * LANES * sizeof(elem), 0, 2);
#if defined(__AVX512BF16__) && !defined(FLOAT32)
        __m512bh weight[8];
#pragma GCC unroll 8
        for (int n = 0; n < nb; n++)
            weight[n] = bytes ? (__m512bh)_mm512_or_si512(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(byte + n * ldw))),
                                                          _mm512_set1_epi16(0x4300))
                              : (__m512bh)_mm512_loadu_si512(here + n * ldw);
#pragma GCC unroll 13
        for (int m = 0; m < mt; m++) {
            int32_t both;
            memcpy(&both, x + m * ldx + i, 4);
            __m512bh one = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 8
            for (int n = 0; n < nb; n++) sum[m][n] = (vec)_mm512_dpbf16_ps((__m512)sum[m][n], one, weight[n]);
        }
#else
#pragma GCC unroll 2
        for (int j = 0; j < PAIR; j++) {
            vec weight[8];
#pragma GCC unroll 8
            for (int n = 0; n < nb; n++)
                weight[n] = bytes ? every_byte(byte + n * ldw + j * LANES) : every(here + n * ldw, j);
#pragma GCC unroll 13
            for (int m = 0; m < mt; m++) {
                vec one = spread(x[m * ldx + i + j]);
#pragma GCC unroll 8
                for (int n = 0; n < nb; n++) sum[m][n] = fused(one, weight[n], sum[m][n]);
            }
        }
#endif
    }
#pragma GCC unroll 13
    for (int m = 0; m < mt; m++)
#pragma GCC unroll 8
        for (int n = 0; n < nb; n++) *(vec *)(out + m * ldo + n * LANES) = sum[m][n];
}

typedef void Tile(const input *, int64_t, const void *, int64_t, int64_t, float *, int64_t, int, Ahead);
#define TILE_OF(M, N, BYTES)                                                                                    \
    static void tile_##M##_##N##_##BYTES(const input *x, int64_t ldx, const void *w, int64_t ldw, int64_t k,    \
                                         float *out, int64_t ldo, int add, Ahead ahead) {                       \
        tile(M, N, BYTES, x, ldx, w, ldw, k, out, ldo, add, ahead);                                             \
    }
#define TILES_2(M, BYTES) TILE_OF(M, 1, BYTES) TILE_OF(M, 2, BYTES)
#define TILES_4(M, BYTES) TILES_2(M, BYTES) TILE_OF(M, 4, BYTES)
#define TILES_8(M, BYTES) TILES_4(M, BYTES) TILE_OF(M, 8, BYTES)
#define ROW_2(M, BYTES) {tile_##M##_1_##BYTES, tile_##M##_2_##BYTES, 0, 0}
#define ROW_4(M, BYTES) {tile_##M##_1_##BYTES, tile_##M##_2_##BYTES, tile_##M##_4_##BYTES, 0}
#define ROW_8(M, BYTES) {tile_##M##_1_##BYTES, tile_##M##_2_##BYTES, tile_##M##_4_##BYTES, tile_##M##_8_##BYTES}
/* As many blocks at once as there are registers for the sums of so many tokens. */
#if REGISTERS == 32
#define ALL_TILES(BYTES)                                                                                        \
    TILES_8(1, BYTES) TILES_8(2, BYTES) TILES_4(3, BYTES) TILES_4(4, BYTES) TILES_4(5, BYTES) TILES_4(6, BYTES) \
    TILES_2(7, BYTES) TILES_2(8, BYTES) TILES_2(9, BYTES) TILES_2(10, BYTES) TILES_2(11, BYTES)                 \
    TILES_2(12, BYTES) TILES_2(13, BYTES)
#define ROWS(BYTES)                                                                                             \
    {ROW_8(1, BYTES), ROW_8(2, BYTES), ROW_4(3, BYTES), ROW_4(4, BYTES), ROW_4(5, BYTES),                       \
     ROW_4(6, BYTES), ROW_2(7, BYTES), ROW_2(8, BYTES), ROW_2(9, BYTES), ROW_2(10, BYTES),                      \
     ROW_2(11, BYTES), ROW_2(12, BYTES), ROW_2(13, BYTES)}
INLINE int blocks_at_once(int mt) { return mt <= 2 ? 8 : mt <= 6 ? 4 : 2; }
#else
#define ALL_TILES(BYTES)                                                                                        \
    TILES_8(1, BYTES) TILES_4(2, BYTES) TILES_2(3, BYTES) TILES_2(4, BYTES) TILES_2(5, BYTES) TILES_2(6, BYTES)
#define ROWS(BYTES)                                                                                             \
    {ROW_8(1, BYTES), ROW_4(2, BYTES), ROW_2(3, BYTES), ROW_2(4, BYTES), ROW_2(5, BYTES), ROW_2(6, BYTES)}
INLINE int blocks_at_once(int mt) { return mt <= 1 ? 8 : mt <= 2 ? 4 : 2; }
#endif
ALL_TILES(0) ALL_TILES(1)
static Tile *const TILES[2][TILE][4] = {ROWS(0), ROWS(1)};

/* What to ask for while the next tile reads from `here` on; its blocks lie `row` bytes apart. */
static Ahead ahead_of(Wanted *wanted, const char *here, int64_t row) {
    if (!wanted->next) return (Ahead){here + wanted->far, here + wanted->far + (wanted->far ? row : 0)};
    int64_t each = (wanted->blocks + wanted->tiles - 1) / wanted->tiles, asked = wanted->tile++ * each;
    const char *next = wanted->next + asked * row;
    return (Ahead){asked < wanted->blocks ? next : here, each > 1 && asked + 1 < wanted->blocks ? next + row : here};
}

/* mt <= TILE tokens and any number of blocks; a token's sums do not depend on how the blocks are taken together. */
static void strip(int bytes, int mt, int64_t blocks, Inputs of, const void *w, int64_t ldw, int64_t k, float *out,
                  int64_t ldo, int add, Wanted wanted) {
    int64_t row = ldw * (bytes ? 1 : sizeof(elem));
    for (int64_t n = 0; n < blocks;) {
        int size = blocks_at_once(mt), place = size == 8 ? 3 : size == 4 ? 2 : 1;
        while (size > blocks - n) size /= 2, place--;
        const char *here = (const char *)w + n * row;
        TILES[bytes][mt - 1][place](of.x, of.ld, here, ldw, k, out + n * LANES, ldo, add, ahead_of(&wanted, here, row));
        n += size;
    }
}

/* The sum of k numbers, always in the same order. */
static float sum_of(const elem *x, int64_t k) {
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES)
        for (int l = 0; l < LANES; l++) sums[l] += widen(x[i + l]);
    float found = total(sums);
    for (; i < k; i++) found += widen(x[i]);
    return found;
}

/* Sums with a weight in bytes become products with what the bytes stand for; `sizes` are the sums of the tokens' inputs. */
static void scaled(const Linear *by, int64_t n, int64_t count, int64_t tokens, float (*sums)[MOST_BLOCKS * LANES],
                   const float *sizes, float *out, int64_t ldo, int add) {
    for (int64_t m = 0; m < tokens; m++)
        for (int64_t j = 0; j < count; j++) {
            vec *to = (vec *)(out + m * ldo + j * LANES);
            vec found = (((const vec *)sums[m])[j] - OFFSET * sizes[m]) * ((const vec *)by->scale)[n + j];
            if (by->bias) found += ((const vec *)by->bias)[n + j];
            *to = add ? *to + found : found;
        }
}

static void biased(const Linear *by, int64_t n, int64_t count, int64_t tokens, float *out, int64_t ldo) {
    for (int64_t m = 0; m < tokens; m++)
        for (int64_t j = 0; j < count; j++) *(vec *)(out + m * ldo + j * LANES) += ((const vec *)by->bias)[n + j];
}

/* How a product is cut: `height` tokens, `at_once` blocks of the weight and `chunk` of its k at a time; of a weight in
   bytes the sums of a `group` of tokens are kept. */
typedef struct {
    int64_t tiles, height, at_once, chunk, group;
} Cut;

static Cut cut_of(const Linear *by, int64_t tokens) {
    int64_t tiles = tokens <= TILE ? 1 : tokens <= 2 * TILE ? 2 : (tokens + HALF - 1) / HALF;
    int64_t height = (tokens + tiles - 1) / tiles;
    return (Cut){
        .tiles = tiles,
        .height = height,
        .at_once = WIDENS && tiles > 1 ? MOST_BLOCKS : blocks_at_once(height), /* for all of them inputs are widened once */
        .chunk = tiles > 1 ? CHUNK : WIDENS ? least(by->k, MOST_WIDENED) : by->k,
        .group = by->scale ? HEIGHT / height * height : tokens,
    };
}

INLINE const char *weight_at(const Linear *by, int64_t n, int64_t i) {
    return (const char *)by->weight + (n * by->k + i) * LANES * (by->scale ? 1 : sizeof(elem));
}

/* What to ask for while tokens of tile `t` are computed with a strip, `count` blocks of a weight from n on, k from i on. */
INLINE Wanted wanted_by(const Linear *by, const Cut *cut, int64_t n, int64_t count, int64_t i, int64_t t) {
    int64_t is_within = i + cut->chunk < by->k, size = blocks_at_once(cut->height), parts = (count + size - 1) / size;
    const char *next = is_within ? weight_at(by, n, i + cut->chunk) : weight_at(by, n + count, 0);
    if (by->scale) return (Wanted){0};
    if (cut->tiles == 1) return (Wanted){.far = cut->height > BUSY ? FAR : 0};
    if (next >= weight_at(by, by->n / LANES, 0)) return (Wanted){0};
    return (Wanted){.next = next, .blocks = count, .tiles = cut->tiles * parts, .tile = t * parts};
}

/* out[M, n] = (add: out +) x[M, k] w^T (+ bias), by all threads of a parallel region, which do not wait for each other */
static void linear(const Linear *by, int64_t tokens, const elem *x, int64_t ldx, float *out, int64_t ldo, int add) {
    const Cut cut = cut_of(by, tokens);
    int64_t blocks = by->n / LANES, strips = (blocks + cut.at_once - 1) / cut.at_once;
    float sizes[by->scale ? tokens : 1], sums[by->scale ? HEIGHT : 1][MOST_BLOCKS * LANES];
    input room[WIDENS ? cut.height * APART(cut.chunk) : 1];
    Inputs inputs = {0, 0};
    for (int64_t m = 0; by->scale && m < tokens; m++) sizes[m] = sum_of(x + m * ldx, by->k);
#pragma omp for schedule(static) nowait
    for (int64_t s = 0; s < strips; s++)
        for (int64_t g = 0; g < tokens; g += cut.group) {
            int64_t n = s * cut.at_once, count = least(cut.at_once, blocks - n), end = least(g + cut.group, tokens);
            for (int64_t i = 0; i < by->k; i += cut.chunk)
                for (int64_t m = g; m < end; m += cut.height) {
                    int64_t mt = least(cut.height, end - m), length = least(cut.chunk, by->k - i);
                    if (!inputs.x || cut.tiles > 1 || cut.chunk < by->k)
                        inputs = inputs_of(x + m * ldx + i, ldx, mt, length, room);
                    strip(!!by->scale, mt, count, inputs, weight_at(by, n, i), by->k * LANES, length,
                          by->scale ? sums[m - g] : out + m * ldo + n * LANES, by->scale ? MOST_BLOCKS * LANES : ldo,
                          i || (add && !by->scale), wanted_by(by, &cut, n, count, i, m / cut.height));
                }
            float *to = out + g * ldo + n * LANES;
            if (by->scale)
                scaled(by, n, count, end - g, sums, sizes + g, to, ldo, add);
            else if (by->bias)
                biased(by, n, count, end - g, to, ldo);
        }
}
