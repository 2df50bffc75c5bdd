/* A Llama block for few tokens at a time, on CPU: what decoding and verifying do.
 *
 * Decoding is bound by reading weights, so every product reads each weight once, in the order it lies in memory, for all
 * tokens of the pass. Every number is summed in an order that does not depend on the other tokens of the pass: a token's
 * logits are the same bits whether it is read alone, in a batch, or as the fifth of a draft.
 *
 * Compiled twice: for bfloat16 weights and cache (float32 sums), and with -DFLOAT32.
 *
 * Keys (64 tokens, K channels) and values (N channels, 64 tokens) lie as weights do; see linear.h.
 *
 * Shapes: M tokens, H hidden size, D head size, R query heads of a key/value head.
 */
#include "linear.h"
#include "pass.h"
#include "team.h"

#define BLOCK 64 /* tokens of a block of the cache */
#define QUERIES (REGISTERS == 32 ? 8 : 6) /* query heads that share one reading of keys and values; at most TILE */

typedef struct {
    const float *input_norm, *post_norm, *q_norm, *k_norm; /* the last two may be NULL */
    Linear qkv, o, gate_up, down;
    int64_t number; /* of its keys and values among those of a block of the cache */
} Layer;

typedef struct {
    int64_t layers, hidden, heads, groups, head_dim, inner;
    float eps;
    const elem *embedding; /* [vocabulary, hidden] */
    int64_t vocabulary;
    const float *norm;
    Linear head;
    const Layer *layer;
    /* Of a model that reads each token beside a hidden state, which pass->x holds: its norm. NULL for others */
    const float *hidden_norm;
    int64_t keeps_norm; /* the residual stream begins with the normed hidden state */
} Model;

INLINE int64_t pad(int64_t n) { return (n + WHOLE - 1) / WHOLE * WHOLE; }
INLINE int64_t pad_pair(int64_t n) { return (n + PAIR - 1) / PAIR * PAIR; }
/* The first `count` of LANES numbers, and zeros where the padding of a row of `size` numbers begins. */
INLINE void store_some(elem *to, vec x, int64_t count) {
    if (count >= LANES)
        store(to, x);
    else
        for (int64_t i = 0; i < pad_pair(count); i++) to[i] = i < count ? narrow(x[i]) : 0;
}

/* h = x / rms(x) * weight, which x becomes as well where it `keeps` it */
INLINE void norm_one(const Model *model, float *x, const float *weight, elem *h, int keeps) {
    int64_t hidden = model->hidden, ldx = pad(hidden);
    vec squares = {0};
    for (int64_t i = 0; i < ldx; i += LANES) squares += *(const vec *)(x + i) * *(const vec *)(x + i);
    float scale = 1.0f / sqrtf(total(squares) / hidden + model->eps);
    for (int64_t i = 0; i < hidden; i += LANES) {
        vec normed = *(const vec *)(x + i) * scale * *(const vec *)(weight + i);
        store_some(h + i, normed, hidden - i);
        if (keeps) *(vec *)(x + i) = normed;
    }
}

/* h[m] = x[m], normed */
static void norm(const Pass *pass, const Model *model, const float *weight) {
#pragma omp for schedule(static) nowait
    for (int64_t m = 0; m < pass->tokens; m++)
        norm_one(model, pass->x + m * pad(model->hidden), weight, pass->h + m * pass->ld_h, 0);
}

INLINE void embed_one(const Model *model, int64_t id, float *x) {
    for (int64_t i = 0; i < pad(model->hidden); i++)
        x[i] = i < model->hidden ? widen(model->embedding[id * model->hidden + i]) : 0;
}

/* h[m] = the token's embedding and the hidden state that it is read beside, each of them normed */
static void fuse(const Pass *pass, const Model *model) {
    int64_t hidden = model->hidden, ldx = pad(hidden);
#pragma omp for schedule(static) nowait
    for (int64_t m = 0; m < pass->tokens; m++) {
        float embedded[ldx];
        elem *h = pass->h + m * pass->ld_h;
        embed_one(model, pass->ids[m], embedded);
        norm_one(model, embedded, model->layer->input_norm, h, 0);
        norm_one(model, pass->x + m * ldx, model->hidden_norm, h + hidden, model->keeps_norm);
    }
}

INLINE elem *block_of(const Pass *pass, const Model *model, int64_t row, int64_t block, int64_t layer, int64_t group) {
    elem *begin = (elem *)(uintptr_t)pass->blocks[row * pass->block_stride + block];
    return begin + (model->layer[layer].number * model->groups + group) * 2 * BLOCK * pad(model->head_dim);
}

/* One head of a query or key: normed where the model does that, turned by its position, scaled. */
INLINE void turn(const Model *model, const Pass *pass, float *head, const float *norm_weight, int64_t position, float scale) {
    int64_t size = model->head_dim, half = size / 2;
    const float *cosines = pass->cosines + position * half, *sines = pass->sines + position * half;
    if (norm_weight) {
        float squares = 0;
        for (int64_t i = 0; i < size; i++) squares += head[i] * head[i];
        float by = 1.0f / sqrtf(squares / size + model->eps);
        for (int64_t i = 0; i < size; i++) head[i] *= by * norm_weight[i];
    }
    for (int64_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = (first * cosines[i] - second * sines[i]) * scale;
        head[i + half] = (second * cosines[i] + first * sines[i]) * scale;
    }
}

/* Turn queries in place; put keys and values of the new tokens into the cache. */
static void turn_and_store(const Pass *pass, const Model *model, int64_t number) {
    const Layer *layer = model->layer + number;
    int64_t size = model->head_dim, padded = pad(size), heads = model->heads, groups = model->groups;
#pragma omp for schedule(static) collapse(2) nowait
    for (int64_t m = 0; m < pass->tokens; m++)
        for (int64_t n = 0; n < heads + groups; n++) {
            float *head = pass->wide + m * pass->ld_wide + n * size;
            int64_t position = pass->positions[m], place = pass->places[m], t = place % BLOCK;
            if (n < heads) {
                turn(model, pass, head, layer->q_norm, position, 1.0f / sqrtf((float)size));
                continue;
            }
            turn(model, pass, head, layer->k_norm, position, 1.0f);
            elem *keys = block_of(pass, model, pass->row_of[m], place / BLOCK, number, n - heads);
            elem *values = keys + BLOCK * padded;
            const float *value = head + groups * size;
            keys += t / LANES * padded * LANES + t % LANES * PAIR;
            for (int64_t i = 0; i < size; i++) keys[i / PAIR * LANES * PAIR + i % PAIR] = narrow(head[i]);
            values += t / PAIR * LANES * PAIR + t % PAIR;
            for (int64_t i = 0; i < size; i++)
                values[i / LANES * BLOCK * LANES + i % LANES * PAIR] = narrow(value[i]);
        }
}

INLINE uint64_t first_bits(int64_t count) { return count <= 0 ? 0 : count >= BLOCK ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1; }

/* Which of the tokens in block b of its row's cache token m of the pass may look at. */
INLINE uint64_t visible(const Pass *pass, int64_t row, int64_t m, int64_t b) {
    if (!pass->seen) return first_bits(pass->places[m] + 1 - b * BLOCK);
    int64_t base = pass->bases[row] - b * BLOCK;
    uint64_t seen = pass->seen[m];
    return first_bits(base) | (base >= BLOCK || base <= -BLOCK ? 0 : base >= 0 ? seen << base : seen >> -base);
}

/* The softmax of scores over one more block of 64 tokens, of which those in `live` count: weights into p, the largest
   score so far and the sum of weights kept; what was mixed before shrinks as the largest score grows (online softmax,
   Milakov and Gimelshein 2018). */
INLINE void soften(const float *scores, uint64_t live, elem *p, float *largest, float *sum, float *mixed, int64_t size) {
    const ints lane = lanes_from(0);
    ints counts[BLOCK / LANES];
    vec peaks = spread(*largest), weights = {0};
    for (int i = 0; i < BLOCK / LANES; i++) {
        counts[i] = ((((ints){0} + (int32_t)(live >> i * LANES & ((1 << LANES) - 1))) >> lane) & 1) != 0;
        vec here = choose(counts[i], ((const vec *)scores)[i], spread(-INFINITY));
        peaks = choose(here > peaks, here, peaks);
    }
    float peak = largest_of(peaks), shrink = 1.0f;
    if (peak != *largest) {
        shrink = exponential(spread(*largest - peak))[0];
        for (int64_t i = 0; i < size; i += LANES) *(vec *)(mixed + i) *= shrink;
    }
    for (int i = 0; i < BLOCK / LANES; i++) {
        vec weight = choose(counts[i], exponential(((const vec *)scores)[i] - peak), (vec){0});
        weights += weight;
        store(p + i * LANES, weight);
    }
    *largest = peak;
    *sum = *sum * shrink + total(weights);
}

/* Attention of up to QUERIES query heads of one group: number `begin` and on of the row's tokens x R. */
static void attend_tile(const Pass *pass, const Model *model, int64_t number, int64_t row, int64_t group, int64_t begin,
                        int mt) {
    int64_t size = model->head_dim, padded = pad(size), share = model->heads / model->groups;
    elem queries[QUERIES][padded], p[QUERIES][BLOCK];
    input room[WIDENS ? QUERIES * APART(padded) : 1], weights[WIDENS ? QUERIES * APART(BLOCK) : 1];
    float scores[QUERIES][BLOCK], mixed[QUERIES][padded], largest[QUERIES], sum[QUERIES];
    int64_t place[QUERIES], last[QUERIES], length = 0;
    for (int m = 0; m < mt; m++) {
        place[m] = pass->row_begins[row] + (begin + m) / share;
        last[m] = pass->seen ? pass->bases[row] + 63 - __builtin_clzll(pass->seen[place[m]]) : pass->places[place[m]];
        const float *query = pass->wide + place[m] * pass->ld_wide + (group * share + (begin + m) % share) * size;
        memset(queries[m], 0, sizeof queries[m]);
        memset(mixed[m], 0, sizeof mixed[m]);
        for (int64_t i = 0; i < size; i += LANES) store_some(queries[m] + i, *(const vec *)(query + i), size - i);
        largest[m] = -INFINITY, sum[m] = 0;
        length = last[m] + 1 > length ? last[m] + 1 : length;
    }
    Inputs asking = inputs_of(queries[0], padded, mt, padded, room);
    for (int64_t b = 0; b * BLOCK < length; b++) {
        const elem *keys = block_of(pass, model, row, b, number, group), *values = keys + BLOCK * padded;
        int64_t live = least(BLOCK, length - b * BLOCK); /* scores behind them, and their weights, count for nothing */
        strip(0, mt, (live + LANES - 1) / LANES, asking, keys, padded * LANES, padded, scores[0], BLOCK, 0, (Wanted){0});
        for (int m = 0; m < mt; m++) {
            if (last[m] < b * BLOCK)
                memset(p[m], 0, sizeof p[m]);
            else
                soften(scores[m], visible(pass, row, place[m], b), p[m], &largest[m], &sum[m], mixed[m], padded);
        }
        strip(0, mt, padded / LANES, inputs_of(p[0], BLOCK, mt, BLOCK, weights), values, BLOCK * LANES, pad_pair(live), mixed[0], padded, 1,
              (Wanted){0});
    }
    for (int m = 0; m < mt; m++) {
        elem *out = pass->h + place[m] * pass->ld_h + (group * share + (begin + m) % share) * size;
        for (int64_t i = 0; i < size; i += LANES) store_some(out + i, *(vec *)(mixed[m] + i) / sum[m], size - i);
    }
}

/* h[m] = what the heads of token m gather from the cache */
static void attend(const Pass *pass, const Model *model, int64_t number, Team *team) {
    int64_t share = model->heads / model->groups, most = 0;
    for (int64_t row = 0; row < pass->rows; row++) {
        int64_t queries = (pass->row_begins[row + 1] - pass->row_begins[row]) * share;
        most = queries > most ? queries : most;
    }
    int64_t tiles = (most + QUERIES - 1) / QUERIES, width = model->heads * model->head_dim;
    int64_t pieces = pass->rows * model->groups * tiles;
    for (int64_t piece = take_next(team); piece < pieces; piece = take_next(team)) { /* rows are of different lengths */
        int64_t row = piece / (model->groups * tiles), group = piece / tiles % model->groups, begin = piece % tiles * QUERIES;
        int64_t queries = (pass->row_begins[row + 1] - pass->row_begins[row]) * share;
        if (begin < queries) attend_tile(pass, model, number, row, group, begin, least(QUERIES, queries - begin));
    }
    if (pad_pair(width) > width)
#pragma omp for schedule(static) nowait
        for (int64_t m = 0; m < pass->tokens; m++) pass->h[m * pass->ld_h + width] = 0;
}

/* h[m] = silu(gate) * up */
static void gated(const Pass *pass, const Model *model) {
    int64_t inner = model->inner, strips = (inner + LANES - 1) / LANES;
#pragma omp for schedule(static) collapse(2) nowait
    for (int64_t m = 0; m < pass->tokens; m++)
        for (int64_t s = 0; s < strips; s++) {
            const float *gate = pass->wide + m * pass->ld_wide + s * LANES, *up = gate + inner;
            elem *h = pass->h + m * pass->ld_h + s * LANES;
            vec g = *(const vec *)gate, u = *(const vec *)up;
            store_some(h, g / (1.0f + exponential(-g)) * u, inner - s * LANES);
        }
}

/* Note the output of layer `number` if it is asked for. */
static void note(const Pass *pass, const Model *model, int64_t number) {
    int64_t hidden = model->hidden;
    for (int64_t tap = 0; tap < pass->taps; tap++)
        if (pass->tapped[tap] == number)
#pragma omp for schedule(static) nowait
            for (int64_t m = 0; m < pass->tokens; m++) {
                const float *x = pass->x + m * pad(hidden);
                elem *out = pass->features + (m * pass->taps + tap) * hidden;
                int64_t i = 0;
                for (; i + LANES <= hidden; i += LANES) store(out + i, *(const vec *)(x + i));
                for (; i < hidden; i++) out[i] = narrow(x[i]);
            }
}

static void embed(const Pass *pass, const Model *model) {
#pragma omp for schedule(static) nowait
    for (int64_t m = 0; m < pass->tokens; m++) embed_one(model, pass->ids[m], pass->x + m * pad(model->hidden));
}

/* What comes before each of a block's four products, and after the last; where the product is another library's, stages are called singly. */
enum { EMBED, QKV, ATTEND, GATE_UP, DOWN, FINAL, NOTE };

/* What the threads of a team do of it; they have not met afterwards. */
static void before(const Pass *pass, const Model *model, int64_t layer, int which, Team *team) {
    switch (which) {
    case EMBED:
        if (!model->hidden_norm) embed(pass, model);
        break;
    case QKV:
        if (model->hidden_norm && !layer)
            fuse(pass, model);
        else
            norm(pass, model, model->layer[layer].input_norm);
        break;
    case ATTEND:
        turn_and_store(pass, model, layer);
        meet(team);
        if (layer + 1 < model->layers || pass->last_states) attend(pass, model, layer, team);
        break;
    case GATE_UP: norm(pass, model, model->layer[layer].post_norm); break;
    case DOWN: gated(pass, model); break;
    case FINAL: norm(pass, model, model->norm); break;
    case NOTE: note(pass, model, layer); break;
    }
}

void stage(const Pass *pass, const Model *model, int64_t layer, int64_t which) {
    Team team = {0};
#pragma omp parallel num_threads((int)pass->threads)
    before(pass, model, layer, which, &team);
}

/* How weights lie */
int64_t lanes(void) { return LANES; }
int64_t byte_pair(void) { return BYTE_PAIR; }

/* Whether all tokens are in the vocabulary; the other functions trust them. */
int64_t readable(const Pass *pass, const Model *model) {
    for (int64_t m = 0; m < pass->tokens; m++)
        if (pass->ids[m] < 0 || pass->ids[m] >= model->vocabulary) return 0;
    return 1;
}

/* Keys and values of `count` places of a row go to the places from `begin` on, in this order; sources never lie before
   the place they go to. */
void gather(const Model *model, const uint64_t *blocks, const int64_t *sources, int64_t begin, int64_t count) {
    int64_t padded = pad(model->head_dim);
    for (int64_t n = 0; n < model->layers * model->groups; n++)
        for (int64_t j = 0; j < count; j++) {
            int64_t from = sources[j], to = begin + j, f = from % BLOCK, t = to % BLOCK;
            if (from == to) continue;
            elem *old = (elem *)(uintptr_t)blocks[from / BLOCK] + n * 2 * BLOCK * padded;
            elem *new = (elem *)(uintptr_t)blocks[to / BLOCK] + n * 2 * BLOCK * padded;
            for (int64_t i = 0; i < padded; i++) {
                int64_t key = i / PAIR * LANES * PAIR + i % PAIR, value = BLOCK * padded + i / LANES * BLOCK * LANES + i % LANES * PAIR;
                new[key + t / LANES * padded * LANES + t % LANES * PAIR] = old[key + f / LANES * padded * LANES + f % LANES * PAIR];
                new[value + t / PAIR * LANES * PAIR + t % PAIR] = old[value + f / PAIR * LANES * PAIR + f % PAIR];
            }
        }
}

/* What comes before a product, and the product. */
static void do_both(const Pass *pass, const Model *model, int64_t layer, int which, Team *team, const Linear *by, float *out,
                    int64_t ldo, int add) {
    before(pass, model, layer, which, team);
    meet(team);
    linear(by, pass->tokens, pass->h, pass->ld_h, out, ldo, add);
    meet(team);
}

/* All layers; what the head reads is left in h. */
void forward(const Pass *pass, const Model *model) {
    int64_t ldx = pad(model->hidden);
    Team team = {0};
#pragma omp parallel num_threads((int)pass->threads)
    {
        before(pass, model, 0, EMBED, &team); /* each token's embedding is normed by the thread that wrote it */
        for (int64_t i = 0; i < model->layers; i++) {
            const Layer *layer = model->layer + i;
            do_both(pass, model, i, QKV, &team, &layer->qkv, pass->wide, pass->ld_wide, 0);
            if (i + 1 == model->layers && !pass->last_states) {
                before(pass, model, i, ATTEND, &team);
                break;
            }
            do_both(pass, model, i, ATTEND, &team, &layer->o, pass->x, ldx, 1);
            do_both(pass, model, i, GATE_UP, &team, &layer->gate_up, pass->wide, pass->ld_wide, 0);
            do_both(pass, model, i, DOWN, &team, &layer->down, pass->x, ldx, 1);
            before(pass, model, i, NOTE, &team); /* nobody changes x before all have met again */
        }
        if (pass->last_states) before(pass, model, 0, FINAL, &team);
    }
}

/* out [M, n] of x [M, ldx] */
void product(const Linear *by, int64_t tokens, const elem *x, int64_t ldx, float *out, int64_t ldo, int64_t threads) {
    if (!tokens) return;
#pragma omp parallel num_threads((int)threads)
    linear(by, tokens, x, ldx, out, ldo, 0);
}

/* Chooses tokens [rows] in number `place` after `first`, among the first `choices` ids of logits [rows, choices], `stride`
   apart; 0 if it cannot. */
typedef int64_t Choose(const void *asked, int64_t place, int64_t rows, int64_t choices, const float *logits, int64_t stride,
                       int64_t *tokens);

/* The first of the largest numbers; the first of all where none is larger than -infinity. */
static int64_t place_of_largest(const float *x, int64_t count) {
    int64_t whole = count / LANES * LANES, place = 0;
    vec peaks = spread(-INFINITY);
    for (int64_t i = 0; i < whole; i += LANES) {
        vec here;
        memcpy(&here, x + i, sizeof here);
        peaks = choose(here > peaks, here, peaks);
    }
    float peak = largest_of(peaks);
    for (int64_t i = whole; i < count; i++) peak = x[i] > peak ? x[i] : peak;
    while (place < count && x[place] != peak) place++;
    return place < count ? place : 0;
}

static int64_t choose_largest(const void *asked, int64_t place, int64_t rows, int64_t choices, const float *logits,
                              int64_t stride, int64_t *tokens) {
    (void)asked, (void)place;
    for (int64_t row = 0; row < rows; row++) tokens[row] = place_of_largest(logits + row * stride, choices);
    return 1;
}

/* Drafting: read `first`, then token by token what `choose` (0: the likeliest) finds after it; chosen [rows, count]. `next`
   has room for one token of every row. How many were chosen; where fewer, the logits are those of the next. The rows'
   latest states are left in x: beside them the next token is read where the model reads any. */
int64_t chain(const Pass *first, const Pass *next, const Model *model, int64_t count, int64_t choices, float *logits,
              int64_t *chosen, Choose *choose, const void *asked) {
    int64_t *ids = (int64_t *)next->ids, *positions = (int64_t *)next->positions, *places = (int64_t *)next->places;
    int64_t rows = first->rows, ldx = pad(model->hidden);
    if (!choose) choose = choose_largest;
    for (int64_t i = 0; i < count; i++) {
        const Pass *pass = i ? next : first;
        forward(pass, model);
        for (int64_t row = 0; row < rows && !i; row++) {
            int64_t last = first->row_begins[row + 1] - 1;
            memmove(first->h + row * first->ld_h, first->h + last * first->ld_h, first->ld_h * sizeof(elem));
            if (model->hidden_norm) memmove(first->x + row * ldx, first->x + last * ldx, ldx * sizeof(float));
            positions[row] = first->positions[last], places[row] = first->places[last];
        }
        product(&model->head, rows, pass->h, pass->ld_h, logits, model->head.n, pass->threads);
        if (!choose(asked, i, rows, choices, logits, model->head.n, ids)) return i;
        for (int64_t row = 0; row < rows; row++) chosen[row * count + i] = ids[row], positions[row]++, places[row]++;
    }
    return count;
}
