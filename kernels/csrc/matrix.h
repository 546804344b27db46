// Products in the processor's matrix registers (AMX): up to 16 rows of 16 words times 16 words of 16 columns each.
#pragma once

#include "fours.h"

namespace {

constexpr int ROWS_PAST = 16;  // that products may read after the last row

#if defined(APACK_MATRIX)
constexpr int SQUARE = 16;  // rows of a register, and words of each

// Registers that were idle for a third of a microsecond take a quarter of one to begin. So many vectors of words are worth that.
constexpr int64_t WORTH_MATRICES = 1200;

// As the processor reads them: registers 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 columns of b.
struct alignas(64) MatrixShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// A thread's registers: how many rows they are set up for, 0 for not at all; where sums go.
struct Matrices {
    alignas(64) Word sums[4][SQUARE * SQUARE];
    int rows;
};

inline void set_rows(Matrices &matrices, int rows) {
    if (matrices.rows == rows) return;
    MatrixShapes shapes;
    for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 4 * SQUARE, shapes.rows[i] = (uint8_t)(i < 6 ? rows : SQUARE);
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
    matrices.rows = rows;
}

inline void release(Matrices &matrices) {
    if (matrices.rows) __asm__ volatile("tilerelease");
    matrices.rows = 0;
}

// The compiler's own functions do not say that they read and write memory.
template <int REGISTER>
inline void load_matrix(const Word *rows, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,4), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(REGISTER) : "memory");
}

template <int REGISTER>
inline void store_matrix(Matrices &matrices) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(matrices.sums[REGISTER]), "r"((int64_t)4 * SQUARE), "i"(REGISTER) : "memory");
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(REGISTER));
}

// Sums plus rows times columns: bytes with a sign times bytes without, or pairs of bfloat16.
template <int SUMS, int ROWS_OF, int COLUMNS_OF>
inline void multiply_matrices(const Fours &) {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(ROWS_OF), "i"(COLUMNS_OF));
}

template <int SUMS, int ROWS_OF, int COLUMNS_OF>
inline void multiply_matrices(const Pairs &) {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(ROWS_OF), "i"(COLUMNS_OF));
}

// As `weigh` for fours; pairs overwrite what was there. k: a multiple of 16, or b has zeros up to one. Up to ROWS_PAST more rows of a are
// read. Two operands are multiplied with columns of b that were loaded once: both terms of some rows, or more rows.
template <typename Kind, typename Place>
__attribute__((noinline)) void weigh_matrices(Matrices &matrices, const Kind &kind, const Word *a, int64_t lda, int rows, const Word *b, int64_t ldb,
                                              int n, int k, const Place &place) {
    constexpr bool TERMS = Kind::TERMS == 2;
    const int strips = (rows + SQUARE - 1) / SQUARE, each = (rows + strips - 1) / strips, step = TERMS ? each : 2 * each;
    set_rows(matrices, each);
    for (int j = 0; j < n; j += 2 * SQUARE) {
        const bool wide = n - j > SQUARE;
        for (int i = 0; !TERMS && i < k && j + 2 * SQUARE < n; ++i) prefetch(b + i * ldb + j + 2 * SQUARE, 8 * SQUARE);
        for (int m = 0; m < rows; m += step) {
            const bool both = TERMS || m + each < rows;
            const Word *first = a + m * lda, *second = first + (TERMS ? kind.term_step : each * lda);
            for (int i = 0; i < k; i += SQUARE) {
                load_matrix<4>(first + i, lda);
                load_matrix<6>(b + i * ldb + j, ldb);
                multiply_matrices<0, 4, 6>(kind);
                if (both) load_matrix<5>(second + i, lda), multiply_matrices<1, 5, 6>(kind);
                if (!wide) continue;
                load_matrix<7>(b + i * ldb + j + SQUARE, ldb);
                multiply_matrices<2, 4, 7>(kind);
                if (both) multiply_matrices<3, 5, 7>(kind);
            }
            store_matrix<0>(matrices);
            if (both) store_matrix<1>(matrices);
            if (wide) store_matrix<2>(matrices);
            if (wide && both) store_matrix<3>(matrices);
            for (int row = m; row < rows && row < m + step; ++row) {
                const int second = !TERMS && row >= m + each, at = (row - m - second * each) * SQUARE;
                float *out = place(row);
                for (int column = j; column < n && column < j + 2 * SQUARE; column += SQUARE) {
                    const int lanes = n - column < SQUARE ? n - column : SQUARE;
                    const Word(*sums)[SQUARE * SQUARE] = matrices.sums + (column > j ? 2 : 0);
                    kind.end(Kind::joined(sums[second] + at, sums[1] + at), out + column, lanes, row, column);
                }
            }
        }
    }
}
#else
struct Matrices {};
inline void release(Matrices &) {}
#endif

}  // namespace
