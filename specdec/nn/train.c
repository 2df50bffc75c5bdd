/* What training does beside the large products, on CPU, forward and backward: norms, SwiGLU, losses; attention.h does
 * attention.
 *
 * Every sum is taken in an order that does not depend on the number of threads. Compiled twice: for bfloat16 and, with
 * -DFLOAT32, for float32. Sizes are multiples of LANES, but for the vocabulary.
 *
 * Shapes: N tokens, V vocabulary.
 */
#include "attention.h"

#define TOGETHER 64 /* tokens whose parts of a norm's gradient are summed first */

/* --- norms and SwiGLU */

/* y = x / rms(x) * weight; scales [N] are 1 / rms */
void norm_forward(int64_t tokens, int64_t size, float eps, const elem *x, const elem *weight, elem *y, float *scales,
                  int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t n = 0; n < tokens; n++) {
        const elem *from = x + n * size;
        vec squares = {0};
        for (int64_t i = 0; i < size; i += LANES) squares += load(from + i) * load(from + i);
        float scale = scales[n] = 1.0f / sqrtf(total(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES) store(y + n * size + i, load(from + i) * scale * load(weight + i));
    }
}

/* weight_parts [ceil(N / TOGETHER), size] add up to the gradient of the weight. */
void norm_backward(int64_t tokens, int64_t size, const elem *x, const elem *weight, const float *scales, const elem *dy,
                   elem *dx, float *weight_parts, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t begin = 0; begin < tokens; begin += TOGETHER) {
        float *part = weight_parts + begin / TOGETHER * size;
        memset(part, 0, size * sizeof(float));
        for (int64_t n = begin; n < least(begin + TOGETHER, tokens); n++) {
            const elem *from = x + n * size, *by = dy + n * size;
            vec sum = {0};
            for (int64_t i = 0; i < size; i += LANES) sum += load(from + i) * load(by + i) * load(weight + i);
            float scale = scales[n], along = total(sum) * scale * scale / size;
            for (int64_t i = 0; i < size; i += LANES) {
                vec here = load(from + i), gradient = load(by + i);
                store(dx + n * size + i, (gradient * load(weight + i) - here * along) * scale);
                *(vec *)(part + i) += gradient * here * scale;
            }
        }
    }
}

/* out [N, size] = silu(gate) * up of gate_up [N, 2 size] */
void swiglu_forward(int64_t tokens, int64_t size, const elem *gate_up, elem *out, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t n = 0; n < tokens; n++)
        for (int64_t i = 0; i < size; i += LANES) {
            vec gate = load(gate_up + 2 * n * size + i), up = load(gate_up + (2 * n + 1) * size + i);
            store(out + n * size + i, gate / (1.0f + exponential(-gate)) * up);
        }
}

void swiglu_backward(int64_t tokens, int64_t size, const elem *gate_up, const elem *gradient, elem *out,
                     int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t n = 0; n < tokens; n++)
        for (int64_t i = 0; i < size; i += LANES) {
            int64_t at = 2 * n * size + i;
            vec gate = load(gate_up + at), up = load(gate_up + at + size), by = load(gradient + n * size + i);
            vec open = 1.0f / (1.0f + exponential(-gate));
            store(out + at, by * up * open * (1.0f + gate * (1.0f - open)));
            store(out + at + size, by * gate * open);
        }
}

/* --- losses */

/* LANES logits from i on, those beyond the last as -inf */
INLINE vec some(const elem *logits, int64_t i, int64_t vocabulary) {
    if (i + LANES <= vocabulary) return load(logits + i);
    vec found = spread(-INFINITY);
    for (int64_t lane = 0; i + lane < vocabulary; lane++) found[lane] = widen(logits[i + lane]);
    return found;
}

INLINE void put(elem *to, vec x, int64_t i, int64_t vocabulary) {
    if (i + LANES <= vocabulary)
        store(to + i, x);
    else
        for (int64_t lane = 0; i + lane < vocabulary; lane++) to[i + lane] = narrow(x[lane]);
}

/* log sum exp */
INLINE float log_total(const elem *logits, int64_t vocabulary) {
    vec peaks = spread(-INFINITY), sum = {0};
    for (int64_t i = 0; i < vocabulary; i += LANES) {
        vec here = some(logits, i, vocabulary);
        peaks = choose(here > peaks, here, peaks);
    }
    float peak = largest_of(peaks);
    for (int64_t i = 0; i < vocabulary; i += LANES) sum += exponential(some(logits, i, vocabulary) - peak);
    return peak + logf(total(sum));
}

/* Losses [models, N] of the target's logits [N, V] and the draft's (or NULL), which become the gradients of the sum of
   all losses times `scale`; w is the weight of KL(target || draft) in the draft's loss. */
void losses(int64_t tokens, int64_t vocabulary, const int64_t *labels, float w, float scale, elem *target, elem *draft,
            float *found, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t n = 0; n < tokens; n++) {
        elem *logits = target + n * vocabulary, *drafted = draft ? draft + n * vocabulary : 0;
        int64_t label = labels[n];
        float all = log_total(logits, vocabulary), others = draft ? log_total(drafted, vocabulary) : 0;
        float own = widen(logits[label]) - all, its = draft ? widen(drafted[label]) - others : 0;
        vec divergence = {0};
        for (int64_t i = 0; i < vocabulary; i += LANES) {
            vec logs = some(logits, i, vocabulary) - all, law = exponential(logs);
            put(logits, law * scale, i, vocabulary);
            if (!draft) continue;
            vec guess = some(drafted, i, vocabulary) - others;
            if (i + LANES <= vocabulary)
                divergence += law * (logs - guess);
            else
                for (int64_t lane = 0; i + lane < vocabulary; lane++)
                    divergence[lane] += law[lane] * (logs[lane] - guess[lane]);
            put(drafted, (exponential(guess) - w * law) * scale, i, vocabulary);
        }
        logits[label] = narrow(expm1f(own) * scale);
        found[n] = -own;
        if (!draft) continue;
        drafted[label] = narrow((expf(its) - w * expf(own) - (1 - w)) * scale);
        found[tokens + n] = w * total(divergence) - (1 - w) * its;
    }
}
