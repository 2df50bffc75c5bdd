/* Rounds of decoding on CPU, several of them while nobody has to look: a compiled draft model proposes, or nobody does, a
   compiled target reads that, the rule decides, tokens are entered. rounds.py says when that is all there is to do. */
#include "draws.c"
#include "nn/pass.h"

#include <time.h>

typedef int64_t Choose(const Drafting *, int64_t, int64_t, int64_t, const float *, int64_t, int64_t *); /* of nn/cpu.c */

typedef struct { /* a model, and what its passes need */
    Pass pass, next; /* with room for the tokens of a round, and for one of every row */
    const void *model, *head;
    const void *fuse; /* of a draft model that reads tokens beside what the target made of those before them; or NULL */
    void (*forward)(const Pass *pass, const void *model);
    void (*product)(const void *by, int64_t tokens, const void *x, int64_t ldx, float *out, int64_t ldo, int64_t threads);
    int64_t (*chain)(const Pass *first, const Pass *next, const void *model, int64_t count, int64_t choices, float *logits,
                     int64_t *chosen, Choose *choose, const Drafting *asked);
    float *logits;    /* [tokens of a round, width] */
    int64_t width;
    int64_t *lengths; /* [rows]: tokens in the cache */
    /* Of a target whose layers are asked for: what they put out for tokens that no draft model has taken yet */
    char *held;       /* [rows, most_held, feature_bytes] */
    int64_t *holding; /* [rows]: of how many tokens */
    int64_t most_held, feature_bytes, feature_size; /* and in numbers */
    int64_t ld_x;     /* of a pass's residual stream */
    double seconds;
} Reader;

typedef struct {
    int64_t rows, most;      /* rounds */
    int64_t drafted;         /* K, tokens that the draft model proposes for a row */
    const int64_t *proposed; /* [rows]: how many of them are checked */
    int64_t *limits;         /* [rows]: the most that are, so near the end of a row; a round is the last if it passes one */
    int64_t vocabulary;
    int64_t *texts;          /* [rows, stride]: ends of the rows' texts, with room for what comes */
    int64_t stride;
    int64_t *ends;           /* [rows]: where they end */
    int64_t *unread;         /* [rows]: tokens at their ends that the draft model has not read */
    int64_t *accepted;       /* [most, rows] */
    const int64_t *stops;    /* a round with one of them is the last */
    int64_t stop_count, rule;
    const float *temperatures; /* [rows]; NULL: the likeliest tokens */
    const int64_t *seeds;      /* [rows] */
    int64_t *text_lengths;           /* [rows]: lengths of the texts */
    float *target_laws, *draft_laws; /* [rows, K + 1, vocabulary] and [rows, K, vocabulary] */
    double *seconds;           /* [most]: what each round took */
} Rounds;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

/* The pass is to read `counts[b]` tokens of every row, from `begins[b]` on in its text. */
static void lay_out(Reader *reader, const Rounds *r, const int64_t *begins, const int64_t *counts) {
    Pass *pass = &reader->pass;
    int64_t *ids = (int64_t *)pass->ids, *places = (int64_t *)pass->places, *positions = (int64_t *)pass->positions;
    int64_t *row_of = (int64_t *)pass->row_of, *row_begins = (int64_t *)pass->row_begins, m = 0;
    for (int64_t b = 0; b < r->rows; b++) {
        row_begins[b] = m;
        for (int64_t j = 0; j < counts[b]; j++, m++) {
            ids[m] = r->texts[b * r->stride + begins[b] + j];
            places[m] = positions[m] = reader->lengths[b] + j;
            row_of[m] = b;
        }
    }
    row_begins[r->rows] = pass->tokens = m;
}

/* The draft model reads its tokens beside what the target has put out for those before them, fused. */
static void give(Reader *draft, const Reader *target, const Rounds *r) {
    Pass *pass = &draft->pass;
    char *taken = (char *)pass->features;
    for (int64_t b = 0; b < r->rows; b++) {
        int64_t bytes = target->holding[b] * target->feature_bytes;
        memcpy(taken, target->held + b * target->most_held * target->feature_bytes, bytes);
        taken += bytes;
    }
    draft->product(draft->fuse, pass->tokens, pass->features, target->feature_size, pass->x, draft->ld_x,
                   pass->threads);
}

/* What the target has put out for the tokens that are entered, count[b] = accepted[b] + 1 of a row; a draft model that
   reads beside it has taken what was held until then. */
static void hold(Reader *target, const Rounds *r, const int64_t *accepted, int64_t is_taken) {
    for (int64_t b = 0; b < r->rows; b++) {
        int64_t bytes = target->feature_bytes, held = is_taken ? 0 : target->holding[b];
        memcpy(target->held + (b * target->most_held + held) * bytes,
               (const char *)target->pass.features + target->pass.row_begins[b] * bytes, (accepted[b] + 1) * bytes);
        target->holding[b] = held + accepted[b] + 1;
    }
}

/* Draft behind every row's text; 0 where torch must draw something. */
static int64_t propose(Reader *draft, const Reader *target, const Rounds *r, int64_t drafted) {
    int64_t begins[r->rows], chosen[r->rows * drafted];
    Drafting asked = {r->drafted, r->rule == COUPLED, r->temperatures, r->seeds, r->text_lengths, r->draft_laws};
    for (int64_t b = 0; b < r->rows; b++) begins[b] = r->ends[b] - r->unread[b];
    lay_out(draft, r, begins, r->unread);
    if (draft->fuse) give(draft, target, r);
    int64_t found = draft->chain(&draft->pass, &draft->next, draft->model, drafted, r->vocabulary, draft->logits, chosen,
                                 r->temperatures ? choose_drawn : NULL, &asked);
    for (int64_t b = 0; b < r->rows; b++)
        memcpy(r->texts + b * r->stride + r->ends[b], chosen + b * drafted, found * sizeof(int64_t));
    return found == drafted;
}

/* How many of a row's `proposed` tokens survive, and the one that follows; 0 where torch must decide. logits [proposed + 1] */
static int64_t decide(const Rounds *r, int64_t b, int64_t proposed, const float *logits, int64_t width, int64_t *accepted,
                      int64_t *next) {
    const int64_t *tokens = r->texts + b * r->stride + r->ends[b];
    if (!r->temperatures) {
        for (*accepted = 0;; ++*accepted) {
            *next = largest_token(logits + *accepted * width, r->vocabulary);
            if (*next < 0) return 0;
            if (*accepted == proposed || *next != tokens[*accepted]) return 1;
        }
    }
    float *laws = r->target_laws + b * (r->drafted + 1) * r->vocabulary;
    for (int64_t i = 0; i <= proposed; i++)
        if (!soften(logits + i * width, r->temperatures[b], r->vocabulary, laws + i * r->vocabulary)) return 0;
    const float *draft_laws = r->draft_laws + b * r->drafted * r->vocabulary;
    Row row = {r->vocabulary, proposed, r->seeds[b], r->text_lengths[b], laws, draft_laws, tokens};
    return judge(proposed ? r->rule : COUPLED, &row, accepted, next);
}

static int64_t is_stop(const Rounds *r, int64_t token) {
    for (int64_t i = 0; i < r->stop_count; i++)
        if (r->stops[i] == token) return 1;
    return 0;
}

/* Enter what the round brought, that drafted so many tokens; whether a row may have come to its end. */
static int64_t enter(Reader *target, Reader *draft, Rounds *r, int64_t drafted, const int64_t *accepted, const int64_t *next) {
    int64_t ended = 0;
    if (target->held) hold(target, r, accepted, drafted && draft->fuse);
    for (int64_t b = 0; b < r->rows; b++) {
        int64_t count = accepted[b] + 1, *text = r->texts + b * r->stride + r->ends[b];
        text[accepted[b]] = next[b];
        for (int64_t i = 0; i < count; i++) ended |= is_stop(r, text[i]);
        r->ends[b] += count, r->text_lengths[b] += count, r->limits[b] -= count, target->lengths[b] += count;
        ended |= r->limits[b] < 0;
        r->unread[b] += count;
        if (!drafted) continue;
        int64_t read = r->unread[b] - count; /* and what it has drafted, but never the last; beside its own guesses for now */
        if (!draft->fuse) read += accepted[b] < drafted ? accepted[b] : drafted - 1;
        draft->lengths[b] += read;
        r->unread[b] -= read;
    }
    return ended;
}

/* How many rounds were whole ones. */
int64_t rounds(Reader *target, Reader *draft, Rounds *r) {
    int64_t begins[r->rows], counts[r->rows], next[r->rows];
    for (int64_t round = 0; round < r->most; round++) {
        int64_t drafted = 0;
        for (int64_t b = 0; b < r->rows; b++) {
            int64_t count = r->proposed[b] < r->limits[b] ? r->proposed[b] : r->limits[b];
            drafted = count > drafted ? count : drafted;
            begins[b] = r->ends[b] - 1, counts[b] = count + 1;
        }
        double begun = now();
        if (drafted && !propose(draft, target, r, drafted)) return round;
        double proposed = now();
        const Pass *pass = &target->pass;
        lay_out(target, r, begins, counts);
        target->forward(pass, target->model);
        target->product(target->head, pass->tokens, pass->h, pass->ld_h, target->logits, target->width, pass->threads);
        int64_t *accepted = r->accepted + round * r->rows;
        double read = now();
        for (int64_t b = 0; b < r->rows; b++) {
            const float *logits = target->logits + target->pass.row_begins[b] * target->width;
            if (!decide(r, b, counts[b] - 1, logits, target->width, accepted + b, next + b)) return round;
        }
        draft->seconds += proposed - begun, target->seconds += read - proposed;
        int64_t ended = enter(target, draft, r, drafted, accepted, next);
        r->seconds[round] = now() - begun;
        if (ended) return round + 1;
    }
    return r->most;
}
