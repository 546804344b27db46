// Levels of each width as floats, less their middle: what a width needs of each instruction set.
#pragma once

#include "bands.h"
#include "vector.h"

namespace {

// LANES components of a band as floats; may read LANES bytes past the last one.
template <int BITS>
Vec levels_at(const uint8_t *p);

template <>
inline Vec levels_at<16>(const uint8_t *p) { return from_half(p); }

#if defined(APACK_AVX512)

// The i-th component of each word.
template <int BITS>
Vec level_of(__m512i word, int i);

template <>
inline Vec level_of<16>(__m512i word, int i) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16 * i))); }

template <>
inline Vec levels_at<8>(const uint8_t *p) {
    Vec level = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
    return _mm512_sub_ps(level, broadcast(127.5f));
}

template <>
inline Vec level_of<8>(__m512i word, int i) {
    __m512i level = _mm512_and_si512(_mm512_srli_epi32(word, 8 * i), _mm512_set1_epi32(255));
    return _mm512_sub_ps(_mm512_cvtepi32_ps(level), broadcast(127.5f));
}

inline int read32(const uint8_t *p) {
    int x;
    memcpy(&x, p, 4);
    return x;
}

// A permutation of a table reads only the low four bits of each index, so what lies above a code needs no mask.
inline Vec level_of_nibble(__m512i index) {
    const Vec levels = _mm512_setr_ps(-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -0.5f, 0.5f, 1.5f, 2.5f, 3.5f,
                                      4.5f, 5.5f, 6.5f, 7.5f);
    return _mm512_permutexvar_ps(index, levels);
}

template <>
inline Vec level_of<4>(__m512i word, int i) { return level_of_nibble(_mm512_srli_epi32(word, 4 * i)); }

template <>
inline Vec levels_at<4>(const uint8_t *p) {
    const __m512i shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    __m512i x = _mm512_mask_set1_epi32(_mm512_set1_epi32(read32(p)), (__mmask16)0xff00, read32(p + 4));
    return level_of_nibble(_mm512_srlv_epi32(x, shift));
}

inline Vec level_of_crumb(__m512i index) {
    const Vec levels = _mm512_setr_ps(-1.5f, -0.5f, 0.5f, 1.5f, -1.5f, -0.5f, 0.5f, 1.5f, -1.5f, -0.5f, 0.5f, 1.5f,
                                      -1.5f, -0.5f, 0.5f, 1.5f);
    return _mm512_permutexvar_ps(index, levels);
}

template <>
inline Vec level_of<2>(__m512i word, int i) { return level_of_crumb(_mm512_srli_epi32(word, 2 * i)); }

template <>
inline Vec levels_at<2>(const uint8_t *p) {
    const __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return level_of_crumb(_mm512_srlv_epi32(_mm512_set1_epi32(read32(p)), shift));
}

#elif defined(APACK_AVX2)

template <>
inline Vec levels_at<8>(const uint8_t *p) {
    Vec level = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
    return _mm256_sub_ps(level, broadcast(127.5f));
}

template <>
inline Vec levels_at<4>(const uint8_t *p) {
    int x;
    memcpy(&x, p, 4);
    __m256i level = _mm256_srlv_epi32(_mm256_set1_epi32(x), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(level, _mm256_set1_epi32(15))), broadcast(7.5f));
}

template <>
inline Vec levels_at<2>(const uint8_t *p) {
    const Vec levels = _mm256_setr_ps(-1.5f, -0.5f, 0.5f, 1.5f, -1.5f, -0.5f, 0.5f, 1.5f);
    uint16_t x;
    memcpy(&x, p, 2);
    return _mm256_permutevar8x32_ps(
        levels, _mm256_srlv_epi32(_mm256_set1_epi32(x), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14)));
}

#else

template <>
inline Vec levels_at<8>(const uint8_t *p) {
    Vec v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = p[i] - 127.5f;
    return v;
}

template <>
inline Vec levels_at<4>(const uint8_t *p) {
    Vec v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = (p[i / 2] >> (4 * (i % 2)) & 15) - 7.5f;
    return v;
}

template <>
inline Vec levels_at<2>(const uint8_t *p) {
    Vec v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = (p[0] >> (2 * i) & 3) - 1.5f;
    return v;
}

#endif

}  // namespace
