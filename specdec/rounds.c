/* Rounds of decoding on CPU, several of them while nobody has to look: a compiled draft model proposes, or nobody does, a
   compiled target reads that, the rule decides, tokens are entered. rounds.py says when that is all there is to do. */
#include "draws.c"
#include "nn/pass.h"

#include <time.h>

typedef struct { /* a model, and what its passes need */
    Pass pass;   /* with room for the tokens of a round */
    const void *model, *head;
    void (*forward)(const Pass *pass, const void *model);
    void (*product)(const void *by, int64_t tokens, const void *x, int64_t ldx, float *out, int64_t ldo, int64_t threads);
    int64_t state;    /* bytes of a row of pass.h */
    float *logits;    /* [tokens of a round, width] */
    int64_t width;
    int64_t *lengths; /* [rows]: tokens in the cache */
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
    int64_t *starts;           /* [rows]: lengths of the texts */
    float *target_laws, *draft_laws; /* [rows, K + 1, vocabulary] and [rows, K, vocabulary] */
} Rounds;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

/* Read `counts[b]` (NULL: 1) tokens of every row, from `begins[b]` on in its text, behind `more` that are not counted yet. */
static void take(Reader *reader, const Rounds *r, const int64_t *begins, const int64_t *counts, const int64_t *more) {
    Pass *pass = &reader->pass;
    int64_t *ids = (int64_t *)pass->ids, *places = (int64_t *)pass->places, *positions = (int64_t *)pass->positions;
    int64_t *row_of = (int64_t *)pass->row_of, *row_begins = (int64_t *)pass->row_begins, m = 0;
    for (int64_t b = 0; b < r->rows; b++) {
        int64_t count = counts ? counts[b] : 1, place = reader->lengths[b] + (more ? more[b] : 0);
        row_begins[b] = m;
        for (int64_t j = 0; j < count; j++, m++) {
            ids[m] = r->texts[b * r->stride + begins[b] + j];
            places[m] = positions[m] = place + j;
            row_of[m] = b;
        }
    }
    row_begins[r->rows] = pass->tokens = m;
    reader->forward(pass, reader->model);
}

static void project(Reader *reader, int64_t count) {
    const Pass *pass = &reader->pass;
    reader->product(reader->head, count, pass->h, pass->ld_h, reader->logits, reader->width, pass->threads);
}

/* Token number `place` of every row's draft, behind its text; 0 where torch must draw it */
static int64_t guess(const Reader *draft, const Rounds *r, int64_t place) {
    int64_t tokens[r->rows];
    if (r->temperatures) {
        Drafting drafting = {r->drafted, r->rule == COUPLED, r->temperatures, r->seeds, r->starts, r->draft_laws};
        if (!choose_drawn(&drafting, place, r->rows, r->vocabulary, draft->logits, draft->width, tokens)) return 0;
    } else {
        largest(r->rows, r->vocabulary, draft->logits, draft->width, tokens);
    }
    for (int64_t b = 0; b < r->rows; b++) {
        if (tokens[b] < 0) return 0;
        r->texts[b * r->stride + r->ends[b] + place] = tokens[b];
    }
    return 1;
}

static int64_t propose(Reader *draft, const Rounds *r, int64_t drafted) {
    int64_t begins[r->rows], read[r->rows], rows = r->rows;
    for (int64_t b = 0; b < rows; b++) begins[b] = r->ends[b] - r->unread[b];
    take(draft, r, begins, r->unread, NULL);
    for (int64_t b = 0; b < rows; b++) { /* the states of the rows' last tokens come first */
        int64_t last = draft->pass.row_begins[b + 1] - 1;
        memmove((char *)draft->pass.h + b * draft->state, (char *)draft->pass.h + last * draft->state, draft->state);
        begins[b] = r->ends[b], read[b] = r->unread[b];
    }
    for (int64_t i = 0;; i++) {
        project(draft, rows);
        if (!guess(draft, r, i)) return 0;
        if (i + 1 == drafted) return 1;
        take(draft, r, begins, NULL, read);
        for (int64_t b = 0; b < rows; b++) begins[b]++, read[b]++;
    }
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
    Row row = {r->vocabulary, proposed, r->seeds[b], r->starts[b], laws, draft_laws, tokens};
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
    for (int64_t b = 0; b < r->rows; b++) {
        int64_t count = accepted[b] + 1, *text = r->texts + b * r->stride + r->ends[b];
        text[accepted[b]] = next[b];
        for (int64_t i = 0; i < count; i++) ended |= is_stop(r, text[i]);
        r->ends[b] += count, r->starts[b] += count, r->limits[b] -= count, target->lengths[b] += count;
        ended |= r->limits[b] < 0;
        r->unread[b] += count;
        if (!drafted) continue;
        int64_t read = r->unread[b] - count + (accepted[b] < drafted ? accepted[b] : drafted - 1); /* never the last drafted */
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
        if (drafted && !propose(draft, r, drafted)) return round;
        double proposed = now();
        take(target, r, begins, counts, NULL);
        project(target, target->pass.tokens);
        int64_t *accepted = r->accepted + round * r->rows;
        double read = now();
        for (int64_t b = 0; b < r->rows; b++) {
            const float *logits = target->logits + target->pass.row_begins[b] * target->width;
            if (!decide(r, b, counts[b] - 1, logits, target->width, accepted + b, next + b)) return round;
        }
        draft->seconds += proposed - begun, target->seconds += read - proposed;
        if (enter(target, draft, r, drafted, accepted, next)) return round + 1;
    }
    return r->most;
}
