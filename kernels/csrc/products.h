// Small matrix products whose sums stay in registers.
#pragma once

#include "vector.h"

namespace {

// Rows and vectors of columns that a small product keeps in registers: half of AVX-512's 32 serve the two as sums.
#if defined(APACK_AVX512)
constexpr int ROWS = 4, VECTORS = 4;
#else
constexpr int ROWS = 2, VECTORS = 4;
#endif

// Sums of four vectors, side by side.
#if defined(APACK_AVX512)
inline void store_sums(float *out, const Vec *x) {
    Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    _mm_storeu_ps(out, fold(_mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))));
}
#elif defined(APACK_AVX2)
inline void store_sums(float *out, const Vec *x) {
    _mm_storeu_ps(out, fold(_mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]))));
}
#else
inline void store_sums(float *out, const Vec *x) {
    for (int i = 0; i < 4; ++i) out[i] = sum(x[i]);
}
#endif

// out[d][c] = x[c][d] for a square of LANES. Only where a set has the shuffles for it.
#if defined(APACK_AVX512)
constexpr bool TRANSPOSES = true;
inline void transpose_square(Vec x[LANES], float *out, int64_t ldo) {
    __m512d pairs[16];
    __m512 y[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1]));
        pairs[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
    }
    // y[4 i + j]: column j of each quarter, of rows 4 i to 4 i + 3
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            y[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i + j], pairs[i + j + 2]));
            y[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i + j], pairs[i + j + 2]));
        }
    for (int j = 0; j < 4; ++j) {
        Vec even = _mm512_shuffle_f32x4(y[j], y[4 + j], 0x88), odd = _mm512_shuffle_f32x4(y[j], y[4 + j], 0xdd);
        Vec later_even = _mm512_shuffle_f32x4(y[8 + j], y[12 + j], 0x88), later_odd = _mm512_shuffle_f32x4(y[8 + j], y[12 + j], 0xdd);
        store(out + j * ldo, _mm512_shuffle_f32x4(even, later_even, 0x88));
        store(out + (4 + j) * ldo, _mm512_shuffle_f32x4(odd, later_odd, 0x88));
        store(out + (8 + j) * ldo, _mm512_shuffle_f32x4(even, later_even, 0xdd));
        store(out + (12 + j) * ldo, _mm512_shuffle_f32x4(odd, later_odd, 0xdd));
    }
}
#else
constexpr bool TRANSPOSES = false;
inline void transpose_square(Vec *, float *, int64_t) {}
#endif

constexpr int AHEAD = 8;  // rows of a decoder that are fetched before they are needed

// Asks for bytes to be in the nearest cache. Heads lie far apart in a wide basis, so the processor does not foresee the next row.
inline void prefetch(const void *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)row + i);
}

// Ranges of the numbers that a product sums over.
struct Ranges {
    int count;
    struct {
        int begin, end;
    } part[3];
};

// One more range: none where it is empty, the last one made longer where it follows that.
inline void add_range(Ranges &ranges, int begin, int end) {
    if (begin >= end) return;
    if (ranges.count && ranges.part[ranges.count - 1].end == begin) ranges.part[ranges.count - 1].end = end;
    else ranges.part[ranges.count++] = {begin, end};
}

// sums[m][n] += products of a[m] and b[n] over ranges of both, for MB rows of a and four of b.
template <int MB>
inline void add_products(const float *a, int64_t lda, const float *const b[4], const Ranges &over, Vec sums[MB][4]) {
    for (int part = 0; part < over.count; ++part) {
        int i = over.part[part].begin, k = over.part[part].end;
        for (; i + LANES <= k; i += LANES) {
            Vec x[4] = {load_once(b[0] + i), load_once(b[1] + i), load_once(b[2] + i), load_once(b[3] + i)};
#pragma GCC unroll 4
            for (int m = 0; m < MB; ++m) {
                Vec y = load(a + m * lda + i);
#pragma GCC unroll 4
                for (int n = 0; n < 4; ++n) sums[m][n] = fma(y, x[n], sums[m][n]);
            }
        }
        if (i < k) {
            Vec x[4] = {load_some(b[0] + i, k - i), load_some(b[1] + i, k - i), load_some(b[2] + i, k - i),
                        load_some(b[3] + i, k - i)};
#pragma GCC unroll 4
            for (int m = 0; m < MB; ++m) {
                Vec y = load_some(a + m * lda + i, k - i);
#pragma GCC unroll 4
                for (int n = 0; n < 4; ++n) sums[m][n] = fma(y, x[n], sums[m][n]);
            }
        }
    }
}

// out[m][n] (+)= a[m] . b[n] over ranges of both, for MB rows of a and four of b.
template <int MB>
inline void dot_tile(const float *a, int64_t lda, const float *const b[4], const Ranges &over, float *const out[ROWS], bool adds) {
    Vec acc[MB][4];
#pragma GCC unroll 4
    for (int m = 0; m < MB; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) acc[m][n] = zero();
    add_products<MB>(a, lda, b, over, acc);
#pragma GCC unroll 4
    for (int m = 0; m < MB; ++m) {
        float sums[4];
        store_sums(sums, acc[m]);
        for (int n = 0; n < 4; ++n) out[m][n] = adds ? out[m][n] + sums[n] : sums[n];
    }
}

// The same for all rows of a; place(m) is where row m goes.
template <typename Place>
inline void dot_rows(const float *a, int64_t lda, int rows, const float *const b[4], const Ranges &over, bool adds, const Place &place) {
    for (int m = 0, left = (rows + ROWS - 1) / ROWS; m < rows; --left) {
        int now = (rows - m + left - 1) / left;  // rows are shared out evenly: 3 + 3 + 3 rather than 4 + 4 + 1
        float *out[ROWS];
        for (int i = 0; i < now; ++i) out[i] = place(m + i);
        switch (now) {
            case 4: dot_tile<4>(a + m * lda, lda, b, over, out, adds); break;
            case 3: dot_tile<3>(a + m * lda, lda, b, over, out, adds); break;
            case 2: dot_tile<2>(a + m * lda, lda, b, over, out, adds); break;
            case 1: dot_tile<1>(a + m * lda, lda, b, over, out, adds); break;
        }
        m += now;
    }
}

// Rows j to j + 3 of b; the last of its n rows in the place of those that are not there.
inline void four_rows(const float *b, int64_t ldb, int n, int j, const float *at[4]) {
    for (int i = 0; i < 4; ++i) at[i] = b + (j + i < n ? j + i : n - 1) * ldb;
}

// out[m][n] (+)= a[m] . b[n]; writes whole fours of n, reads no row past the last.
__attribute__((noinline)) void dots(const float *a, int64_t lda, int rows, const float *b, int64_t ldb, int n, int k, float *out, int64_t ldo,
                 bool adds) {
    const Ranges over = {1, {{0, k}}};
    for (int j = 0; j < n; j += 4) {
        const float *at[4];
        four_rows(b, ldb, n, j, at);
        dot_rows(a, lda, rows, at, over, adds, [&](int m) { return out + m * ldo + j; });
    }
}

// How a product multiplies: numbers of a with vectors of b, which Sums hold between `begin` and `end`; n: lanes that there are.
struct Floats {
    typedef float Number;
    static constexpr int EACH = 1;  // floats that a number is made of
    static Vec numbers(const float *row, Vec factor) { return scaled(load(row), factor); }
    typedef Vec Sums;
    static constexpr int TERMS = 1;
    static constexpr int64_t term_step = 0;
    static Vec begin(const float *out, int n) { return n == LANES ? load(out) : load_some(out, n); }
    static Vec row(const float *b, int n) { return n == LANES ? load_once(b) : load_some(b, n); }
    static Vec each(const float *a) { return broadcast(*a); }
    static Vec multiply(Vec a, Vec b, Vec sums) { return fma(a, b, sums); }
    static Vec next_term(Vec sums) { return sums; }
    static void end(Vec sums, float *out, int n, int, int) { n == LANES ? store(out, sums) : store_some(out, sums, n); }
};

typedef uint32_t __attribute__((may_alias)) Word;  // several numbers

#if defined(APACK_BFLOAT16)
// Pairs of bfloat16.
struct Pairs : Floats {
    typedef Word Number;
    static constexpr int EACH = 2;
    static Vec numbers(const float *row, Vec factor) {
        return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(scaled(load(row + LANES), factor), scaled(load(row), factor)));
    }
    static Vec row(const Word *b, int n) { return Floats::row((const float *)b, n); }
    static Vec each(const Word *a) { return Floats::each((const float *)a); }
    static Vec joined(const Word *sums, const Word *) { return load((const float *)sums); }
    static Vec multiply(Vec a, Vec b, Vec sums) {
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(b), "v"(a));
        return sums;
    }
};
#endif

// out[m][:] += sum over k of a[m][k] b[k][:], for MB rows of a from `first` on and NB vectors of columns, the last one `last` wide.
template <int MB, int NB, typename Kind>
inline void weigh_tile(const Kind &kind, int first, const typename Kind::Number *a, int64_t lda, const typename Kind::Number *b, int64_t ldb, int k,
                       float *const out[MB], int column, int last) {
    typename Kind::Sums acc[MB][NB];
    a += first * lda;
    auto lanes = [&](int n) { return n < NB - 1 ? LANES : last; };
#pragma GCC unroll 4
    for (int m = 0; m < MB; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < NB; ++n) acc[m][n] = kind.begin(out[m] + column + n * LANES, lanes(n));
    for (int term = 0; term < Kind::TERMS; ++term, a += kind.term_step) {
#pragma GCC unroll 4
        for (int m = 0; m < MB; ++m)
#pragma GCC unroll 4
            for (int n = 0; term && n < NB; ++n) acc[m][n] = kind.next_term(acc[m][n]);
        for (int i = 0; i < k; ++i) {
            decltype(kind.row(b, 0)) x[NB];
#pragma GCC unroll 4
            for (int n = 0; n < NB; ++n) x[n] = kind.row(b + i * ldb + n * LANES, lanes(n));
#pragma GCC unroll 4
            for (int m = 0; m < MB; ++m) {
                auto y = kind.each(a + m * lda + i);
#pragma GCC unroll 4
                for (int n = 0; n < NB; ++n) acc[m][n] = kind.multiply(y, x[n], acc[m][n]);
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MB; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < NB; ++n) kind.end(acc[m][n], out[m] + column + n * LANES, lanes(n), first + m, column + n * LANES);
}

template <int MB, typename Kind, typename Place>
inline void weigh_rows(const Kind &kind, int first, const typename Kind::Number *a, int64_t lda, const typename Kind::Number *b, int64_t ldb, int n,
                       int k, const Place &place, int column) {
    float *out[MB];
    for (int m = 0; m < MB; ++m) out[m] = place(first + m);
    int vectors = (n + LANES - 1) / LANES, last = n - (vectors - 1) * LANES;
    switch (vectors) {
        case 4: return weigh_tile<MB, 4>(kind, first, a, lda, b, ldb, k, out, column, last);
        case 3: return weigh_tile<MB, 3>(kind, first, a, lda, b, ldb, k, out, column, last);
        case 2: return weigh_tile<MB, 2>(kind, first, a, lda, b, ldb, k, out, column, last);
        case 1: return weigh_tile<MB, 1>(kind, first, a, lda, b, ldb, k, out, column, last);
    }
}

// place(m)[:n] += sum over k of a[m][k] b[k][:n]. Rows and vectors of columns are shared out evenly; a strip of b is used by all rows
// while it is in the nearest cache.
template <typename Kind, typename Place>
__attribute__((noinline)) void weigh(const Kind &kind, const typename Kind::Number *a, int64_t lda, int rows, const typename Kind::Number *b, int64_t ldb,
                                     int n, int k, const Place &place) {
    int vectors = (n + LANES - 1) / LANES;
    for (int j = 0, strips = (vectors + VECTORS - 1) / VECTORS; j < n; --strips) {
        int wide = (vectors + strips - 1) / strips, width = n - j < wide * LANES ? n - j : wide * LANES;
        for (int m = 0, left = (rows + ROWS - 1) / ROWS; m < rows; --left) {
            int now = (rows - m + left - 1) / left;
            switch (now) {
                case 4: weigh_rows<4>(kind, m, a, lda, b + j, ldb, width, k, place, j); break;
                case 3: weigh_rows<3>(kind, m, a, lda, b + j, ldb, width, k, place, j); break;
                case 2: weigh_rows<2>(kind, m, a, lda, b + j, ldb, width, k, place, j); break;
                case 1: weigh_rows<1>(kind, m, a, lda, b + j, ldb, width, k, place, j); break;
            }
            m += now;
        }
        j += width;
        vectors -= wide;
    }
}

// Rows that follow one another.
struct Rows {
    float *out;
    int64_t step;
    float *operator()(int m) const { return out + m * step; }
};

inline void weigh(const float *a, int64_t lda, int rows, const float *b, int64_t ldb, int n, int k, float *out, int64_t ldo) {
    weigh(Floats{}, a, lda, rows, b, ldb, n, k, Rows{out, ldo});
}

}  // namespace
