/* Causal attention inside documents, for training on CPU, forward and backward; a part of train.c.
 *
 * By blocks of 64 queries and keys, none of which lies above the diagonal or outside its document; attention weights
 * are computed again for the backward pass (FlashAttention, Dao et al. 2022). Scores lie transposed, [keys, queries],
 * so that all that is done with them is done for LANES queries at once. Every document and head is one thread's work.
 *
 * Shapes: N tokens of all documents, H query heads, G key/value heads, D head size, a multiple of 2 LANES.
 */
#include <omp.h>

#include "products.h"

/* Whether products are worth doing here: they are written for 32 registers of 512 bits. */
int64_t wide(void) {
#if defined(FLOAT32) && defined(__AVX512F__) || defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

typedef struct {
    int64_t tokens, heads, groups, size, documents, longest;
    const int64_t *begins;          /* [documents + 1]: where documents begin among the N tokens */
    const elem *cosines, *sines;    /* [angles, D]: those of token n are row n % angles */
    int64_t angles;
    const elem *qkv;                /* [N, H + 2 G, D]; neither queries nor keys are turned yet */
    elem *mixed;                    /* [N, H, D] */
    float *logs;                    /* [H, N]: log sum exp of every query's scores */
    const elem *mixed_gradient;     /* [N, H, D] */
    float *key_parts, *value_parts; /* [H, N, D]: gradients by the heads of a group, not added yet */
    elem *gradient;                 /* of qkv */
    char *scratch;                  /* [threads, scratch_size] */
    int64_t scratch_size, threads;
} Attention;

typedef struct { /* one document, one head */
    int64_t begin, length, head, group;
    elem *keys;                          /* [length, D], turned */
    elem *kept_across;                   /* [blocks, D, BLOCK]: values, or turned keys in the backward pass */
    elem *queries, *gradients;           /* BLOCK queries, and what comes back to them, as a weight [queries, D] */
    elem *queries_down, *gradients_down; /* as a weight [D, queries] */
    elem *weights, *slopes;              /* [keys, queries] of a pair of blocks */
    elem *packed;                        /* weights or slopes as a weight [queries, keys] */
    float *scores, *weight_gradients;    /* [keys, queries] */
    float *across;                       /* [D, queries] */
    float *rows;                         /* [LANES, D] */
    elem *narrow_rows;                   /* the same */
} Head;

INLINE void *take(char **scratch, int64_t numbers, int64_t bytes) {
    *scratch += numbers * bytes;
    return *scratch - numbers * bytes;
}

/* Gives a thread's scratch to the parts of its head; where it ends. */
static char *carve(const Attention *a, char *from, Head *h) {
    int64_t size = a->size, length = (a->longest + BLOCK - 1) / BLOCK * BLOCK;
    elem **whole[] = {&h->keys, &h->kept_across}, **pairs[] = {&h->weights, &h->slopes, &h->packed};
    elem **blocks[] = {&h->queries, &h->gradients, &h->queries_down, &h->gradients_down};
    for (int i = 0; i < 2; i++) *whole[i] = take(&from, length * size, sizeof(elem));
    for (int i = 0; i < 3; i++) *pairs[i] = take(&from, BLOCK * BLOCK, sizeof(elem));
    for (int i = 0; i < 4; i++) *blocks[i] = take(&from, BLOCK * size, sizeof(elem));
    h->scores = take(&from, BLOCK * BLOCK, sizeof(float));
    h->weight_gradients = take(&from, BLOCK * BLOCK, sizeof(float));
    h->across = take(&from, BLOCK * size, sizeof(float));
    h->rows = take(&from, LANES * size, sizeof(float));
    h->narrow_rows = take(&from, LANES * size, sizeof(elem));
    return from;
}

/* Bytes of scratch that a thread needs. */
int64_t attention_scratch(const Attention *a) {
    Head head;
    return (intptr_t)carve(a, 0, &head);
}

INLINE const elem *head_of(const Attention *a, int64_t token, int64_t head) {
    return a->qkv + (token * (a->heads + 2 * a->groups) + head) * a->size;
}

/* to [D] = from [D] turned by the token's angle, back where `back` is -1, times scale */
INLINE void turned(const Attention *a, int64_t token, const float *from, float *to, float back, float scale) {
    int64_t half = a->size / 2;
    const elem *cosines = a->cosines + token % a->angles * a->size, *sines = a->sines + token % a->angles * a->size;
    for (int64_t i = 0; i < half; i += LANES) {
        vec first = *(const vec *)(from + i) * scale, second = *(const vec *)(from + i + half) * scale;
        vec cosine = load(cosines + i), sine = load(sines + i) * back;
        *(vec *)(to + i) = first * cosine - second * sine;
        *(vec *)(to + i + half) = second * cosine + first * sine;
    }
}

INLINE void widened(const elem *from, float *to, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) *(vec *)(to + i) = load(from + i);
}

INLINE void narrowed(const float *from, elem *to, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) store(to + i, *(const vec *)(from + i));
}

/* out [keys, queries] = x [keys, D] w^T of queries w; on the diagonal LANES keys with no queries before them. */
static void score(int64_t keys, int64_t columns, int diagonal, const elem *x, int64_t ldx, const elem *w, int64_t size,
                  float *out) {
    int64_t step = diagonal ? LANES : keys;
    for (int64_t key = 0; key < keys; key += step) {
        multiply(least(step, keys - key), columns - key / LANES, x + key * ldx, ldx, w + key * size, size * LANES, size,
                 out + key * BLOCK + key, BLOCK, 0);
    }
}

/* out [keys, D] += x [keys, queries] w^T of channels w, in the same way */
static void collect(int64_t keys, int64_t columns, int diagonal, const elem *x, const elem *w, int64_t size,
                    float *out) {
    int64_t step = diagonal ? LANES : keys;
    for (int64_t key = 0; key < keys; key += step)
        multiply(least(step, keys - key), size / LANES, x + key * BLOCK + key, BLOCK, w + key * LANES, BLOCK * LANES,
                 columns * LANES - key, out + key * size, size, 1);
}

/* across [D, queries] += kept_across [D, keys] of the keys from k on, packed as many queries */
static void mix(const Head *h, int64_t keys, int64_t columns, int64_t k, int64_t size) {
    multiply(size, columns, h->kept_across + k * size, BLOCK, h->packed, BLOCK * LANES, (keys + 1) / 2 * 2, h->across,
             BLOCK, 1);
}

/* Keys turned, and keys or values across. */
static void take_keys(const Attention *a, const Head *h, int backward) {
    int64_t size = a->size, width = (a->heads + 2 * a->groups) * size;
    const elem *values = head_of(a, h->begin, a->heads + a->groups + h->group);
    for (int64_t t = 0; t < h->length; t++) {
        widened(head_of(a, h->begin + t, a->heads + h->group), h->rows, size);
        turned(a, h->begin + t, h->rows, h->rows, 1, 1);
        narrowed(h->rows, h->keys + t * size, size);
    }
    for (int64_t t = 0; t < h->length; t += LANES) {
        elem *to = h->kept_across + t / BLOCK * BLOCK * size + t % BLOCK;
        if (backward)
            put_across(to, h->keys + t * size, size, h->length - t, size);
        else
            put_across(to, values + t * width, width, h->length - t, size);
    }
}

/* `live` queries from place t of the document on, turned and scaled; also down if asked for. */
static void take_queries(const Attention *a, const Head *h, int64_t t, int64_t live, int backward) {
    int64_t size = a->size;
    for (int64_t q = 0; q < live; q += LANES) {
        for (int64_t n = 0; n < least(LANES, live - q); n++) {
            int64_t token = h->begin + t + q + n;
            widened(head_of(a, token, h->head), h->rows, size);
            turned(a, token, h->rows, h->rows, 1, 1.0f / sqrtf(size));
            narrowed(h->rows, h->narrow_rows + n * size, size);
        }
        pack_rows(h->queries + q * size, h->narrow_rows, size, live - q, size);
        if (backward) pack_down(h->queries_down + q * LANES, h->narrow_rows, size, live - q, size);
    }
}

/* What comes back to those queries; its products with what they mixed into deltas. */
static void take_gradients(const Attention *a, const Head *h, int64_t t, int64_t live, float *deltas) {
    int64_t size = a->size, width = a->heads * size, place = ((h->begin + t) * a->heads + h->head) * size;
    const elem *gradients = a->mixed_gradient + place, *mixed = a->mixed + place;
    for (int64_t q = 0; q < live; q += LANES) {
        pack_rows(h->gradients + q * size, gradients + q * width, width, live - q, size);
        pack_down(h->gradients_down + q * LANES, gradients + q * width, width, live - q, size);
    }
    for (int64_t q = 0; q < live; q++) {
        vec delta = {0};
        for (int64_t i = q * width; i < q * width + size; i += LANES) delta += load(gradients + i) * load(mixed + i);
        deltas[q] = total(delta);
    }
}

/* Scores of LANES queries with `live` keys become weights, packed; what was mixed before shrinks as the largest score
   grows. With `diagonal` >= 0 the queries are those from there on, and see no key after themselves. */
INLINE void weigh(const Head *h, int64_t size, int64_t column, int64_t live, int64_t diagonal, vec *largest, vec *sum) {
    float *scores = h->scores + column * LANES;
    vec peak = *largest, hidden = spread(-INFINITY);
    for (int64_t key = 0; key < live; key++) {
        vec *here = (vec *)(scores + key * BLOCK);
        if (diagonal >= 0) *here = choose(lanes_from(diagonal) >= (int32_t)key, *here, hidden);
        peak = choose(*here > peak, *here, peak);
    }
    vec shrink = exponential(*largest - peak), weights = {0};
    ints grown = peak > *largest;
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= grown[i];
    if (any)
        for (int64_t i = 0; i < size; i++) *(vec *)(h->across + i * BLOCK + column * LANES) *= shrink;
    for (int64_t key = 0; key < live; key += 2) {
        vec even = exponential(*(vec *)(scores + key * BLOCK) - peak), odd = {0};
        if (key + 1 < live) odd = exponential(*(vec *)(scores + (key + 1) * BLOCK) - peak);
        weights += even + odd;
        store_two(h->packed + column * BLOCK * LANES + key * LANES, even, odd);
    }
    *sum = *sum * shrink + weights;
    *largest = peak;
}

static void forward_head(const Attention *a, const Head *h) {
    int64_t size = a->size;
    take_keys(a, h, 0);
    for (int64_t t = 0; t < h->length; t += BLOCK) {
        int64_t queries = least(BLOCK, h->length - t), columns = (queries + LANES - 1) / LANES;
        vec largest[BLOCK / LANES], sum[BLOCK / LANES];
        for (int64_t c = 0; c < columns; c++) largest[c] = spread(-INFINITY), sum[c] = (vec){0};
        memset(h->across, 0, size * BLOCK * sizeof(float));
        take_queries(a, h, t, queries, 0);
        for (int64_t k = 0; k <= t; k += BLOCK) {
            int64_t keys = least(BLOCK, h->length - k);
            score(keys, columns, k == t, h->keys + k * size, size, h->queries, size, h->scores);
            for (int64_t c = 0; c < columns; c++)
                weigh(h, size, c, keys, k == t ? c * LANES : -1, &largest[c], &sum[c]);
            mix(h, keys, columns, k, size);
        }
        for (int64_t q = 0; q < queries; q++) {
            int64_t token = h->begin + t + q, n = q % LANES;
            float share = 1.0f / sum[q / LANES][n], *row = h->rows + n * size;
            if (!n) take_across(h->rows, h->across + q, size);
            a->logs[h->head * a->tokens + token] = largest[q / LANES][n] - logf(share);
            for (int64_t i = 0; i < size; i += LANES) *(vec *)(row + i) *= share;
            narrowed(row, a->mixed + (token * a->heads + h->head) * size, size);
        }
    }
}

/* Scores and weights' gradients of LANES queries with `live` keys become weights and slopes, the scores' gradients. */
INLINE void slopes(const Head *h, int64_t column, int64_t live, int64_t diagonal, vec logs, vec delta) {
    for (int64_t key = 0; key < live; key += 2) {
        vec both[2] = {{0}};
        for (int64_t i = 0; i < 2 && key + i < live; i++) {
            int64_t at = (key + i) * BLOCK + column * LANES;
            vec weight = exponential(*(vec *)(h->scores + at) - logs);
            both[i] = weight * (*(vec *)(h->weight_gradients + at) - delta);
            if (diagonal >= 0) { /* what lies above was not computed */
                ints seen = lanes_from(diagonal) >= (int32_t)(key + i);
                weight = choose(seen, weight, (vec){0}), both[i] = choose(seen, both[i], (vec){0});
            }
            store(h->weights + at, weight);
            store(h->slopes + at, both[i]);
        }
        store_two(h->packed + column * BLOCK * LANES + key * LANES, both[0], both[1]);
    }
}

static void backward_head(const Attention *a, const Head *h) {
    int64_t size = a->size, width = (a->heads + 2 * a->groups) * size, place = h->head * a->tokens + h->begin;
    float *key_parts = a->key_parts + place * size, *value_parts = a->value_parts + place * size;
    const elem *values = head_of(a, h->begin, a->heads + a->groups + h->group);
    memset(key_parts, 0, h->length * size * sizeof(float));
    memset(value_parts, 0, h->length * size * sizeof(float));
    take_keys(a, h, 1);
    for (int64_t t = 0; t < h->length; t += BLOCK) {
        int64_t queries = least(BLOCK, h->length - t), columns = (queries + LANES - 1) / LANES;
        float logs[BLOCK] = {0}, deltas[BLOCK] = {0};
        memcpy(logs, a->logs + place + t, queries * sizeof(float));
        memset(h->across, 0, size * BLOCK * sizeof(float));
        take_queries(a, h, t, queries, 1);
        take_gradients(a, h, t, queries, deltas);
        for (int64_t k = 0; k <= t; k += BLOCK) {
            int64_t keys = least(BLOCK, h->length - k);
            score(keys, columns, k == t, h->keys + k * size, size, h->queries, size, h->scores);
            score(keys, columns, k == t, values + k * width, width, h->gradients, size, h->weight_gradients);
            for (int64_t c = 0; c < columns; c++)
                slopes(h, c, keys, k == t ? c * LANES : -1, ((vec *)logs)[c], ((vec *)deltas)[c]);
            collect(keys, columns, k == t, h->weights, h->gradients_down, size, value_parts + k * size);
            collect(keys, columns, k == t, h->slopes, h->queries_down, size, key_parts + k * size);
            mix(h, keys, columns, k, size);
        }
        for (int64_t q = 0; q < queries; q++) {
            int64_t token = h->begin + t + q;
            float *row = h->rows + q % LANES * size;
            if (q % LANES == 0) take_across(h->rows, h->across + q, size);
            turned(a, token, row, row, -1, 1.0f / sqrtf(size));
            narrowed(row, a->gradient + token * width + h->head * size, size);
        }
    }
}

static void every_head(const Attention *a, void (*run)(const Attention *, const Head *)) {
#pragma omp parallel num_threads((int)a->threads)
    {
        Head head;
        carve(a, a->scratch + omp_get_thread_num() * a->scratch_size, &head);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t document = 0; document < a->documents; document++)
            for (int64_t i = 0; i < a->heads; i++) {
                head.begin = a->begins[document], head.length = a->begins[document + 1] - head.begin;
                head.head = i, head.group = i / (a->heads / a->groups);
                run(a, &head);
            }
    }
}

void attention_forward(const Attention *a) { every_head(a, forward_head); }

void attention_backward(const Attention *a) {
    int64_t size = a->size, share = a->heads / a->groups;
    every_head(a, backward_head);
#pragma omp parallel for schedule(static) num_threads((int)a->threads)
    for (int64_t token = 0; token < a->tokens; token++)
        for (int64_t group = 0; group < a->groups; group++) {
            float keys[size], values[size];
            memset(keys, 0, sizeof keys);
            memset(values, 0, sizeof values);
            for (int64_t head = group * share; head < (group + 1) * share; head++)
                for (int64_t i = 0; i < size; i += LANES) {
                    int64_t at = (head * a->tokens + token) * size + i;
                    *(vec *)(keys + i) += *(const vec *)(a->key_parts + at);
                    *(vec *)(values + i) += *(const vec *)(a->value_parts + at);
                }
            turned(a, token, keys, keys, -1, 1);
            elem *to = a->gradient + (token * (a->heads + 2 * a->groups) + a->heads + group) * size;
            narrowed(keys, to, size);
            narrowed(values, to + a->groups * size, size);
        }
}
