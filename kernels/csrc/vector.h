// Vectors of floats for one instruction set: LANES floats, and where they come from.
// The including file chooses the set with APACK_AVX512, APACK_AVX2 or neither (plain C++ that the compiler may vectorize).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "arguments.h"

namespace {

inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    return from_bits(sign | to_bits((rest >= 0x400) ? from_bits((rest << 13) + (112u << 23)) : rest * 0x1p-24f));
}

// Round to nearest, ties to even.
inline uint16_t float_to_half(float x) {
    uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7e00;
    if (rest >= 0x477ff000) return sign | 0x7c00;
    if (rest < 0x38800000) return sign | (uint16_t)nearbyintf(from_bits(rest) * 0x1p24f);
    return sign | (uint16_t)((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

inline float bfloat_to_float(uint16_t b) { return from_bits((uint32_t)b << 16); }

inline uint16_t float_to_bfloat(float x) {
    uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float load_element(const void *data, int64_t dtype, int64_t i) {
    if (dtype == FLOAT32) return ((const float *)data)[i];
    uint16_t x = ((const uint16_t *)data)[i];
    return dtype == BFLOAT16 ? bfloat_to_float(x) : half_to_float(x);
}

inline void store_element(void *data, int64_t dtype, int64_t i, float x) {
    if (dtype == FLOAT32) ((float *)data)[i] = x;
    else ((uint16_t *)data)[i] = dtype == BFLOAT16 ? float_to_bfloat(x) : float_to_half(x);
}

#if defined(APACK_AVX512)

constexpr int LANES = 16;
typedef __m512 Vec;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float *p) { return _mm512_loadu_ps(p); }
inline Vec load_some(const float *p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline void store(float *p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store_some(float *p, Vec x, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x); }
// A compiler would fold the load into every multiply-add that uses it, and load as often.
inline Vec load_once(const float *p) {
    Vec x = load(p);
    __asm__("" : "+v"(x));
    return x;
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec magnitude(Vec x) { return _mm512_abs_ps(x); }
inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float largest(Vec x) { return _mm512_reduce_max_ps(x); }
inline Vec select_positive(Vec flag, Vec a, Vec b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(flag, zero(), _CMP_GT_OQ), b, a);
}
inline Vec times_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
inline Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec from_half(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline Vec from_bfloat(const uint8_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
inline void to_half(uint8_t *p, Vec x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline void to_bfloat(uint8_t *p, Vec x) {
    __m512i bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline __m128 fold(Vec x) {
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#elif defined(APACK_AVX2)

constexpr int LANES = 8;
typedef __m256 Vec;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float *p) { return _mm256_loadu_ps(p); }
inline __m256i leading(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load_some(const float *p, int n) { return _mm256_maskload_ps(p, leading(n)); }
inline void store(float *p, Vec x) { _mm256_storeu_ps(p, x); }
inline void store_some(float *p, Vec x, int n) { _mm256_maskstore_ps(p, leading(n), x); }
inline Vec load_once(const float *p) {
    Vec x = load(p);
    __asm__("" : "+x"(x));
    return x;
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec magnitude(Vec x) { return _mm256_andnot_ps(broadcast(-0.0f), x); }
inline void to_half(uint8_t *p, Vec x) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline void to_bfloat(uint8_t *p, Vec x) {
    __m256i bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    rounded = _mm256_srli_epi32(rounded, 16);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}
inline __m128 fold(Vec x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); }
inline float sum(Vec x) {
    __m128 s = fold(x);
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(Vec x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline Vec select_positive(Vec flag, Vec a, Vec b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(flag, zero(), _CMP_GT_OQ));
}
inline Vec times_power_of_two(Vec x, Vec n) {
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}
inline Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec from_half(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
inline Vec from_bfloat(const uint8_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

#else

constexpr int LANES = 4;
struct Vec {
    float lane[LANES];
};
#define EACH_LANE for (int i = 0; i < LANES; ++i)
inline Vec broadcast(float x) {
    Vec v;
    EACH_LANE v.lane[i] = x;
    return v;
}
inline Vec zero() { return broadcast(0.0f); }
inline Vec load(const float *p) {
    Vec v;
    memcpy(v.lane, p, sizeof v);
    return v;
}
inline Vec load_some(const float *p, int n) {
    Vec v = zero();
    memcpy(v.lane, p, n * sizeof *p);
    return v;
}
inline Vec load_once(const float *p) { return load(p); }
inline void store(float *p, Vec x) { memcpy(p, x.lane, sizeof x); }
inline void store_some(float *p, Vec x, int n) { memcpy(p, x.lane, n * sizeof *p); }
inline Vec fma(Vec a, Vec b, Vec c) {
    EACH_LANE c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}
inline Vec maximum(Vec a, Vec b) {
    EACH_LANE a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
inline float sum(Vec x) { return (x.lane[0] + x.lane[2]) + (x.lane[1] + x.lane[3]); }
inline float largest(Vec x) { return fmaxf(fmaxf(x.lane[0], x.lane[1]), fmaxf(x.lane[2], x.lane[3])); }
inline Vec select_positive(Vec flag, Vec a, Vec b) {
    EACH_LANE a.lane[i] = flag.lane[i] > 0 ? a.lane[i] : b.lane[i];
    return a;
}
inline Vec times_power_of_two(Vec x, Vec n) {
    EACH_LANE x.lane[i] *= from_bits((uint32_t)((int)n.lane[i] + 127) << 23);
    return x;
}
inline Vec nearest(Vec x) {
    EACH_LANE x.lane[i] = nearbyintf(x.lane[i]);
    return x;
}
inline Vec from_half(const uint8_t *p) {
    Vec v;
    EACH_LANE {
        uint16_t h;
        memcpy(&h, p + 2 * i, 2);
        v.lane[i] = half_to_float(h);
    }
    return v;
}
inline Vec from_bfloat(const uint8_t *p) {
    Vec v;
    EACH_LANE {
        uint16_t b;
        memcpy(&b, p + 2 * i, 2);
        v.lane[i] = bfloat_to_float(b);
    }
    return v;
}
inline void to_half(uint8_t *p, Vec x) {
    EACH_LANE {
        uint16_t h = float_to_half(x.lane[i]);
        memcpy(p + 2 * i, &h, 2);
    }
}
inline void to_bfloat(uint8_t *p, Vec x) {
    EACH_LANE {
        uint16_t b = float_to_bfloat(x.lane[i]);
        memcpy(p + 2 * i, &b, 2);
    }
}
#undef EACH_LANE

#endif

inline Vec add(Vec a, Vec b) { return fma(a, broadcast(1.0f), b); }
inline Vec scaled(Vec a, Vec b) { return fma(a, b, zero()); }

// Below it e**x counts as 0. Sums of float32 lose it, and what comes of it could be too small for a normal number, which costs an Intel
// processor more than a hundred cycles each time.
constexpr float LEAST_EXPONENT = -60;

inline float exp_of(float x) { return x < LEAST_EXPONENT ? 0 : expf(x); }

// e**x for x <= 0, within 2 units in the last place.
inline Vec exp_of(Vec x) {
    const Vec low = broadcast(LEAST_EXPONENT);
    Vec y = maximum(low, x);  // maximum returns its second argument when that is NaN
    Vec n = nearest(scaled(y, broadcast(1.44269504f)));
    Vec r = fma(n, broadcast(-0.693359375f), y);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Vec p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(scaled(p, r), r, add(r, broadcast(1.0f)));
    return select_positive(fma(x, broadcast(-1.0f), low), zero(), times_power_of_two(p, n));
}

inline int round_up(int64_t n, int to) { return (int)((n + to - 1) / to * to); }

// A row of n elements as floats.
inline void convert_row(float *out, const void *row, int64_t dtype, int n) {
    const uint8_t *p = (const uint8_t *)row;
    int i = 0;
    if (dtype == FLOAT32) {
        memcpy(out, row, n * sizeof *out);
        return;
    }
    for (; i + LANES <= n; i += LANES) store(out + i, dtype == BFLOAT16 ? from_bfloat(p + 2 * i) : from_half(p + 2 * i));
    for (; i < n; ++i) out[i] = load_element(row, dtype, i);
}

// A row of n floats in a dtype.
inline void store_row(void *out, int64_t dtype, const float *row, int n) {
    uint8_t *p = (uint8_t *)out;
    int i = 0;
    if (dtype == FLOAT32) {
        memcpy(out, row, n * sizeof *row);
        return;
    }
    for (; i + LANES <= n; i += LANES) dtype == BFLOAT16 ? to_bfloat(p + 2 * i, load(row + i)) : to_half(p + 2 * i, load(row + i));
    for (; i < n; ++i) store_element(out, dtype, i, row[i]);
}

}  // namespace
