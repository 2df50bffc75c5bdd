/* Draws of tokens and the verdicts of the acceptance rules, for few rows on CPU, where torch's small operations cost more
   than what they compute. sampling.py and verify.py say what is computed; here are the same numbers.

   Sums are added up in another order than torch's and logarithms are other ones, so a last bit may differ. Wherever that
   could decide, functions answer 0, and torch decides: what they do answer is what torch would. */

#include "nn/vectors.h"

#define STRIP 64 /* tokens looked at together */
#define MOST 64  /* draft tokens of a row */
#define CLOSE 1e-5f /* chances nearer to each other than this may be turned round by rounding in float32 */
#define CLOSE_SUM 1e-9 /* the same of sums in float64 */

enum { BRANCH, TARGET, ACCEPT, DRAFT };        /* purposes, as in sampling.py */
enum { REJECTION, BLOCK, COUPLED };

/* SplitMix64 */
static const uint64_t GOLDEN = 0x9E3779B97F4A7C15;

static inline uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

static uint64_t key_of(int64_t seed, int64_t purpose, int64_t position) {
    return mix(mix((uint64_t)seed * 4 + purpose) + (uint64_t)position * GOLDEN);
}

/* Numbers first + 1 .. first + count of a key, each less 1, as floating point numbers in [1, 2) */
static inline void numbers(uint64_t key, int64_t first, int64_t count, double *out) {
    uint64_t words[STRIP];
    for (int64_t j = 0; j < count; j++) words[j] = mix(key + (uint64_t)(first + j + 1) * GOLDEN) >> 12 | 0x3FF0000000000000;
    memcpy(out, words, count * sizeof *out);
}

static inline double uniform(double number) { return (number - 1) + 0x1p-53; }

static double uniform_of(uint64_t key, int64_t place) {
    double number;
    numbers(key, place, 1, &number);
    return uniform(number);
}

/* out [2, rows, count]: of each row's keys for accepting and for drafting */
void uniforms(int64_t rows, int64_t count, const int64_t *seeds, const int64_t *text_lengths, double *out) {
    for (int64_t purpose = ACCEPT; purpose <= DRAFT; purpose++)
        for (int64_t b = 0; b < rows; b++, out += count) {
            uint64_t key = key_of(seeds[b], purpose, text_lengths[b]);
            for (int64_t j = 0; j < count; j++) out[j] = uniform_of(key, j);
        }
}

static double sum(const float *p, int64_t count) {
    double lanes[8] = {0}, total = 0;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++) lanes[j] += p[i + j];
    for (; i < count; i++) total += p[i];
    for (int j = 0; j < 8; j++) total += lanes[j];
    return total;
}

/* The token at whose place the distribution function of `law` passes a uniform number; -1 if that is too close to call */
static int64_t inverted(const float *law, int64_t vocabulary, double number) {
    double total = sum(law, vocabulary), wanted = number * total, before = 0, after = 0, close = CLOSE_SUM * total;
    int64_t i = 0;
    for (; i < vocabulary; i += STRIP) {
        after = before + sum(law + i, vocabulary - i < STRIP ? vocabulary - i : STRIP);
        if (!(after <= wanted)) break;
        before = after;
    }
    for (; i < vocabulary; i++) {
        after = before + law[i];
        if (after > wanted) return after - wanted > close && wanted - before > close ? i : -1;
        before = after;
    }
    return -1;
}

/* An exponential race under way: who leads, by what chance / noise, and whether somebody is too close to call. */
typedef struct {
    uint64_t key;
    float best;
    int64_t token, is_close;
} Race;

/* Tokens from `begin` on run. 1 - u is never more than the noise -log(u), so most are seen to lose without a logarithm. */
static void run(Race *race, int64_t begin, int64_t count, const float *chances) {
    double number[STRIP];
    float least[STRIP], beaten = race->best * (1 - 4 * CLOSE);
    numbers(race->key, begin, count, number);
    int may_win = 0;
    for (int64_t j = 0; j < count; j++) {
        least[j] = (float)((2 - number[j]) - 0x1p-53);
        may_win |= chances[j] > beaten * least[j];
    }
    if (!may_win) return;
    for (int64_t j = 0; j < count; j++) {
        if (!(chances[j] > race->best * (1 - 4 * CLOSE) * least[j])) continue;
        float found = chances[j] / (float)-log(uniform(number[j]));
        if (found > race->best) {
            race->is_close = race->best >= found * (1 - CLOSE);
            race->best = found, race->token = begin + j;
        } else {
            race->is_close |= found >= race->best * (1 - CLOSE);
        }
    }
}

/* What the draft's law (NULL: `certain` alone) leaves of scale times the target's, tokens `begin` and on */
static inline void excess(const float *target, const float *draft, int64_t certain, float scale, int64_t begin,
                          int64_t count, float *out) {
    for (int64_t j = 0; j < count; j++) {
        float left = scale * target[begin + j] - (draft ? draft[begin + j] : 0);
        out[j] = left > 0 ? left : 0;
    }
    if (!draft && certain >= begin && certain < begin + count) {
        float left = scale * target[certain] - 1;
        out[certain - begin] = left > 0 ? left : 0;
    }
}

static int64_t part(int64_t begin, int64_t vocabulary) {
    return vocabulary - begin < STRIP ? vocabulary - begin : STRIP;
}

/* -1 where nobody wins (of laws that are none) or two are too close to call */
static int64_t winner(const Race *race) { return race->is_close ? -1 : race->token; }

static int64_t race_of_law(const float *law, int64_t vocabulary, uint64_t key) {
    Race race = {key, 0, -1, 0};
    for (int64_t begin = 0; begin < vocabulary; begin += STRIP) run(&race, begin, part(begin, vocabulary), law + begin);
    return winner(&race);
}

/* A token of each row's law, number `place` of those drafted in this step. laws: rows `stride` apart. With `races` it is
   the one that the target's noise at its position prefers. */
int64_t draw(int64_t rows, int64_t vocabulary, const float *laws, int64_t stride, const int64_t *seeds,
             const int64_t *text_lengths, int64_t place, int64_t races, int64_t *tokens) {
    for (int64_t b = 0; b < rows; b++, laws += stride) {
        tokens[b] = races ? race_of_law(laws, vocabulary, key_of(seeds[b], TARGET, text_lengths[b] + place))
                          : inverted(laws, vocabulary, uniform_of(key_of(seeds[b], DRAFT, text_lengths[b]), place));
        if (tokens[b] < 0) return 0;
    }
    return 1;
}

/* The race among what a draft leaves; the target's own law where that is nothing */
static int64_t race_of_excess(const float *target, const float *draft, int64_t certain, float scale, int64_t vocabulary,
                              uint64_t key) {
    Race race = {key, 0, -1, 0};
    for (int64_t begin = 0; begin < vocabulary; begin += STRIP) {
        float left[STRIP];
        int64_t count = part(begin, vocabulary);
        excess(target, draft, certain, scale, begin, count, left);
        run(&race, begin, count, left);
    }
    return race.token < 0 ? race_of_law(target, vocabulary, key) : winner(&race);
}

static double mass_of_excess(const float *target, const float *draft, int64_t certain, float scale, int64_t vocabulary) {
    double total = 0;
    for (int64_t begin = 0; begin < vocabulary; begin += STRIP) {
        float left[STRIP];
        int64_t count = part(begin, vocabulary);
        excess(target, draft, certain, scale, begin, count, left);
        total += sum(left, count);
    }
    return total;
}

/* One row: laws [K + 1, V] of the target and [K, V] of the draft (NULL: certain) for `length` of K tokens. */
typedef struct {
    int64_t vocabulary, length, seed, start;
    const float *target, *draft;
    const int64_t *tokens;
} Row;

static const float *draft_law(const Row *row, int64_t i) { return row->draft ? row->draft + i * row->vocabulary : 0; }

static float ratio(const Row *row, int64_t i) {
    float wanted = row->target[i * row->vocabulary + row->tokens[i]];
    return row->draft ? wanted / draft_law(row, i)[row->tokens[i]] : wanted;
}

/* min(1, x); NaN stays NaN and never accepts */
static float at_most_1(float x) { return x > 1 ? 1 : x; }

static int64_t rejection(const Row *row, uint64_t coins) {
    for (int64_t i = 0; i < row->length; i++)
        if (!(uniform_of(coins, i) < at_most_1(ratio(row, i)))) return i;
    return row->length;
}

/* survival [length + 1]; from the end on, the first coin that succeeds counts. -1 if one is too close to call */
static int64_t block(const Row *row, uint64_t coins, float *survival) {
    survival[0] = 1;
    for (int64_t i = 0; i < row->length; i++) survival[i + 1] = at_most_1(survival[i] * ratio(row, i));
    for (int64_t i = row->length - 1; i >= 0; i--) {
        float reached = survival[i + 1];
        double chance = reached, coin = uniform_of(coins, i);
        if (i + 1 < row->length) {
            const float *target = row->target + (i + 1) * row->vocabulary;
            double left = mass_of_excess(target, draft_law(row, i + 1), row->tokens[i + 1], reached, row->vocabulary);
            double refused = left + (1 - reached);
            chance = refused == 0 ? 1 : left / refused;
            if (fabs(coin - chance) <= CLOSE * chance) return -1;
        }
        if (coin < chance) return i + 1;
    }
    return 0;
}

static int64_t coupled(const Row *row, int64_t *next) {
    for (int64_t i = 0;; i++) {
        *next = race_of_law(row->target + i * row->vocabulary, row->vocabulary, key_of(row->seed, TARGET, row->start + i));
        if (*next < 0 || i == row->length || *next != row->tokens[i]) return i;
    }
}

/* The token of the largest of `logits`; -1 where that is NaN or infinite */
static int64_t largest_token(const float *logits, int64_t vocabulary) {
    vec most = {0};
    ints is_wrong = {0};
    float best = -INFINITY;
    int64_t whole = vocabulary / LANES * LANES, token = 0, wrong = 0;
    most += best;
    for (int64_t i = 0; i < whole; i += LANES) {
        vec here = *(const vec *)(logits + i);
        most = choose(here > most, here, most);
        is_wrong |= here != here;
    }
    for (int j = 0; j < LANES; j++) best = most[j] > best ? most[j] : best, wrong |= is_wrong[j];
    for (int64_t i = whole; i < vocabulary; i++) best = logits[i] > best ? logits[i] : best, wrong |= logits[i] != logits[i];
    if (wrong || !isfinite(best)) return -1;
    for (; token < whole; token += LANES) {
        ints is_here = *(const vec *)(logits + token) == (vec){0} + best;
        int64_t any = 0;
        for (int j = 0; j < LANES; j++) any |= is_here[j];
        if (any) break;
    }
    while (logits[token] != best) token++;
    return token;
}

/* tokens [count] of logits [count, vocabulary], `stride` apart */
void largest(int64_t count, int64_t vocabulary, const float *logits, int64_t stride, int64_t *tokens) {
    for (int64_t i = 0; i < count; i++) tokens[i] = largest_token(logits + i * stride, vocabulary);
}

/* law = softmax(logits / temperature); 0 if there is none */
static int64_t soften(const float *logits, float temperature, int64_t vocabulary, float *law) {
    int64_t best = largest_token(logits, vocabulary), i = 0;
    if (best < 0) return 0;
    float most = logits[best] / temperature;
    vec sums = {0};
    for (; i + LANES <= vocabulary; i += LANES) {
        vec x = *(const vec *)(logits + i) / temperature - most;
        sums += *(vec *)(law + i) = choose(x > -87.0f, exponential(x), (vec){0});
    }
    double sum = total(sums);
    for (; i < vocabulary; i++) sum += law[i] = expf(logits[i] / temperature - most);
    float share = (float)(1 / sum);
    for (i = 0; i < vocabulary; i++) law[i] *= share;
    return 1;
}

/* Drafts to be drawn while a draft model goes on: as many as `count`, of laws [rows, count, vocabulary] written here. */
typedef struct {
    int64_t count, races;
    const float *temperatures;
    const int64_t *seeds, *text_lengths;
    float *laws;
} Drafting;

/* Tokens [rows] that follow in number `place`, of logits [rows, vocabulary], `stride` apart; a `Choose` of nn/cpu.c */
int64_t choose_drawn(const Drafting *drafting, int64_t place, int64_t rows, int64_t vocabulary, const float *logits,
                     int64_t stride, int64_t *tokens) {
    float *laws = drafting->laws + place * vocabulary;
    int64_t apart = drafting->count * vocabulary;
    for (int64_t b = 0; b < rows; b++)
        if (!soften(logits + b * stride, drafting->temperatures[b], vocabulary, laws + b * apart)) return 0;
    return draw(rows, vocabulary, laws, apart, drafting->seeds, drafting->text_lengths, place, drafting->races, tokens);
}

/* found [2, rows]: how many drafted tokens [rows, drafted] are the `largest` [rows, drafted + 1], and the one after them */
void greedy(int64_t rows, int64_t drafted, const int64_t *largest, const int64_t *tokens, const int64_t *lengths, int64_t *found) {
    for (int64_t b = 0; b < rows; b++, largest += drafted + 1, tokens += drafted) {
        int64_t i = 0;
        while (i < drafted && i < lengths[b] && tokens[i] == largest[i]) i++;
        found[b] = i, found[rows + b] = largest[i];
    }
}

/* How many tokens of the row's draft are accepted, and the one that follows; 0 if something is too close to call */
static int64_t judge(int64_t rule, const Row *row, int64_t *accepted, int64_t *next) {
    if (rule == COUPLED) {
        *accepted = coupled(row, next);
        return *next >= 0;
    }
    float survival[MOST + 1];
    uint64_t coins = key_of(row->seed, ACCEPT, row->start);
    int64_t kept = rule == BLOCK ? block(row, coins, survival) : rejection(row, coins);
    if (kept < 0) return 0;
    const float *target = row->target + kept * row->vocabulary;
    uint64_t key = key_of(row->seed, TARGET, row->start + kept);
    float scale = rule == BLOCK ? survival[kept] : 1;
    *accepted = kept;
    *next = kept == row->length
                ? race_of_law(target, row->vocabulary, key)
                : race_of_excess(target, draft_law(row, kept), row->tokens[kept], scale, row->vocabulary, key);
    return *next >= 0;
}

/* found [2, rows]: accepted, next. target [rows, drafted + 1, vocabulary], draft [rows, drafted, vocabulary] or NULL */
int64_t verdict(int64_t rule, int64_t rows, int64_t drafted, int64_t vocabulary, const float *target, const float *draft,
                const int64_t *tokens, const int64_t *lengths, const int64_t *seeds, const int64_t *text_lengths, int64_t *found) {
    for (int64_t b = 0; b < rows; b++) {
        Row row = {vocabulary, lengths[b], seeds[b], text_lengths[b], target + b * (drafted + 1) * vocabulary,
                   draft ? draft + b * drafted * vocabulary : 0, tokens + b * drafted};
        if (row.length < 0 || row.length > drafted || row.length > MOST) return 0;
        for (int64_t i = 0; i < row.length; i++)
            if (row.tokens[i] < 0 || row.tokens[i] >= vocabulary) return 0;
        if (!judge(rule, &row, found + b, found + rows + b)) return 0;
    }
    return 1;
}
