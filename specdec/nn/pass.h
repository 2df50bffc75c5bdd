/* What cpu.c is told of a pass. */
#pragma once
#include "vectors.h"

typedef struct { /* one pass over M tokens of several rows */
    int64_t tokens;
    const int64_t *ids;       /* [M] */
    const int64_t *positions; /* [M]: by which queries and keys are turned */
    const int64_t *places;    /* [M]: where keys and values go in the row's blocks */
    const int64_t *row_of;    /* [M] */
    int64_t rows;
    const int64_t *row_begins; /* [rows + 1]: where a row's tokens begin among the M */
    const uint64_t *blocks;    /* addresses of the rows' cache blocks, [rows, block_stride] */
    int64_t block_stride;
    /* Of a tree; NULL: tokens see all places up to their own. Otherwise those before the row's `base`, and
       place base + i where bit i of `seen` is set. */
    const uint64_t *seen; /* [M] */
    const int64_t *bases; /* [rows] */
    const float *cosines, *sines; /* [positions, head_dim / 2] */
    float *x;      /* [M, pad(hidden)] */
    elem *h;       /* [M, widest input] */
    float *wide;   /* [M, widest output] */
    int64_t ld_h, ld_wide;
    int64_t last_states; /* 0: nobody asks for what comes out of the last layer */
    int64_t taps;        /* of how many layers the outputs are asked for */
    const int64_t *tapped; /* [taps] */
    elem *features;        /* [M, taps, hidden] */
    int64_t threads;
} Pass;
