// The bands of a packed stream, in order (`BANDS` of kernels/format.py): bits of a component. levels.h unpacks each width.
#pragma once

#include <stdint.h>

namespace {

#define APACK_EACH_WIDTH(ROW) ROW(16) ROW(8) ROW(4) ROW(2)

#define APACK_BITS(BITS) BITS,
constexpr int WIDTHS[] = {APACK_EACH_WIDTH(APACK_BITS)};
#undef APACK_BITS
constexpr int BANDS = sizeof WIDTHS / sizeof *WIDTHS;

// Components that are float16 numbers, not levels.
constexpr bool is_float(int bits) { return bits == 16; }

// Components and bytes of a unit, the shortest run of components that fills whole bytes.
constexpr int per_unit(int bits) { return bits % 8 == 0 ? 1 : bits % 4 == 0 ? 2 : bits % 2 == 0 ? 4 : 8; }
constexpr int unit_bytes(int bits) { return per_unit(bits) * bits / 8; }

// Bytes of a band of so many components.
inline int64_t band_bytes(int64_t count, int bits) { return (count + per_unit(bits) - 1) / per_unit(bits) * unit_bytes(bits); }

template <int BITS>
struct Width {
    static constexpr int bits = BITS;
};

// Calls `run` with a band's bits as the constant of a type.
template <typename Run>
__attribute__((always_inline)) inline void with_width(int bits, const Run &run) {
    switch (bits) {
#define APACK_CASE(BITS) \
    case BITS: run(Width<BITS>{}); break;
        APACK_EACH_WIDTH(APACK_CASE)
#undef APACK_CASE
    }
}

}  // namespace
