/* Vectors of LANES float32 numbers, and the numbers models are made of: bfloat16, or float32 with -DFLOAT32. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__FMA__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* What one register holds: compilers keep vectors of more in memory. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

#ifdef FLOAT32
#define PAIR 1 /* neighbouring k of a weight that lie side by side */
typedef float elem;
INLINE elem narrow(float x) { return x; }
INLINE float widen(elem x) { return x; }
INLINE vec load(const elem *x) { return *(const vec *)x; }
#else
#define PAIR 2
typedef uint16_t elem; /* bfloat16 */
INLINE elem narrow(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if (x != x) return 0x7fc0;
    return (elem)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE float widen(elem x) {
    uint32_t u = (uint32_t)x << 16;
    float y;
    memcpy(&y, &u, 4);
    return y;
}
INLINE vec load(const elem *x) { return (vec)(__builtin_convertvector(*(const halves *)x, bits) << 16); }
#endif

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vec spread(float x) { return x - (vec){0}; }
/* sum + a b, rounded once; left to themselves, compilers fuse it in some loops and not in others */
INLINE vec fused(vec a, vec b, vec sum) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}
INLINE vec choose(ints which, vec yes, vec no) { return (vec)((which & (ints)yes) | (~which & (ints)no)); }

INLINE ints lanes_from(int64_t first) {
    static const int32_t lane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return *(const ints *)lane + (int32_t)first;
}

/* bfloat16, rounded as `narrow` rounds, in the upper halves */
INLINE bits rounded(vec x) {
    bits all = (bits)x;
    return (bits)choose(x == x, (vec)(all + 0x7fff + (all >> 16 & 1)), (vec)((bits){0} + 0x7fc00000)) & 0xffff0000u;
}

INLINE void store(elem *to, vec x) {
#if defined(FLOAT32)
    *(vec *)to = x;
#elif defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    *(halves *)to = __builtin_convertvector(rounded(x) >> 16, halves);
#endif
}

/* Of a block of a weight [LANES, k], number j of its first PAIR of k */
INLINE vec every(const elem *weight, int j) {
#ifdef FLOAT32
    return *(const vec *)(weight + j);
#else
    bits both = *(const bits *)weight;
    return (vec)(j ? both & 0xffff0000u : both << 16);
#endif
}

/* LANES bytes, as numbers from 0 to 255 */
INLINE vec every_byte(const uint8_t *weight) {
#if defined(__AVX512F__)
    ints whole = (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)weight));
#elif defined(__AVX2__)
    ints whole = (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)weight));
#else
    ints whole;
    for (int i = 0; i < LANES; i++) whole[i] = weight[i];
#endif
    return __builtin_convertvector(whole, vec);
}

INLINE float total(vec v) {
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
}

INLINE float largest_of(vec v) {
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] = v[i] > v[i + n] ? v[i] : v[i + n];
    return v[0];
}

INLINE vec exponential(vec x) { /* relative error about 1e-7; NaN stays NaN */
    x = choose(x > 88.0f, spread(88.0f), x);
    x = choose(x < -87.0f, spread(-87.0f), x);
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((__builtin_convertvector(n, ints) + 127) << 23);
}
