// Small matrix products on weights that were packed once: C (M, N) = A (M, K) B (K, N).
//
// B lies in panels of PANEL columns, so the inner loop reads it in order; a tile of ROWS x PANEL sums stays in registers
// for the whole of K. Callers bring blocks of A that fit the cache, so there is no further blocking here.

#pragma once

#include "vector.h"

#ifdef __AVX512F__
constexpr long ROWS = 12;  // 24 of 32 registers are sums
#else
constexpr long ROWS = 6;  // 12 of 16
#endif
constexpr long PANEL = 2 * LANES;

template <class P> struct Panels {
    const typename P::T* data;
    long stride;  // elements from one panel to the next: PANEL * K, K rounded up to whole units
};

template <class P> long panel_elements(long n, long k) { return round_up(n, PANEL) * round_up(k, P::UNIT); }

// Pack B, whose element (k, n) is from[n * stride_n + k * stride_k]; what is past its edge is zero.
template <class P> Panels<P> pack(const float* from, long n, long k, long stride_n, long stride_k, typename P::T* to) {
    const long units = round_up(k, P::UNIT) / P::UNIT, stride = units * P::UNIT * PANEL;
    for (long first = 0; first < n; first += PANEL)
        for (long u = 0; u < units; u++)
            for (long column = 0; column < PANEL; column++)
                for (long part = 0; part < P::UNIT; part++) {
                    const long row = u * P::UNIT + part, col = first + column;
                    const float value = row < k && col < n ? from[col * stride_n + row * stride_k] : 0.0f;
                    to[first / PANEL * stride + (u * PANEL + column) * P::UNIT + part] = P::narrow(value);
                }
    return {to, stride};
}

// A, row by row. A row may lie in several segments, all of one length and one distance apart: so do the windows of a
// convolution in a channels-last map, which thus needs no copy of them. In bfloat16 an odd length reads one element more.
template <class P> struct Rows {
    const typename P::T* data;
    long stride, length, segments = 1, segment_stride = 0;
};

// What becomes of the sums on their way out: C = relu(sums + bias + add).
struct Finish {
    const float* bias = nullptr;  // (N)
    const float* add = nullptr;   // (M, N), may be C itself
    long add_stride = 0;
    bool relu = false;
};

template <class P, long M>
inline void tile(Rows<P> a, const typename P::T* b, long columns, Finish finish, float* c, long c_stride) {
    vec sums[M][2] = {};
    for (long segment = 0; segment < a.segments; segment++, a.data += a.segment_stride)
        for (long k = 0; k < a.length; k += P::UNIT, b += PANEL * P::UNIT) {
            const auto left = load<typename P::Operand>(b);
            const auto right = load<typename P::Operand>(b + LANES * P::UNIT);
#pragma GCC unroll 16
            for (long m = 0; m < M; m++) {
                const auto value = P::broadcast(a.data + m * a.stride + k);
                sums[m][0] = P::multiply_add(value, left, sums[m][0]);
                sums[m][1] = P::multiply_add(value, right, sums[m][1]);
            }
        }
    if (columns == PANEL) {
#pragma GCC unroll 16
        for (long m = 0; m < M; m++)
            for (long half = 0; half < 2; half++) {
                vec value = sums[m][half];
                if (finish.bias) value += load<vec>(finish.bias + half * LANES);
                if (finish.add) value += load<vec>(finish.add + m * finish.add_stride + half * LANES);
                if (finish.relu) value = max(value, vec{});
                store(c + m * c_stride + half * LANES, value);
            }
        return;
    }
    float spilled[M * PANEL];  // the last panel of a width that is no multiple: number by number
#pragma GCC unroll 16
    for (long m = 0; m < M; m++)
        for (long half = 0; half < 2; half++) store(spilled + m * PANEL + half * LANES, sums[m][half]);
    for (long m = 0; m < M; m++)
        for (long n = 0; n < columns; n++) {
            float value = spilled[m * PANEL + n];
            if (finish.bias) value += finish.bias[n];
            if (finish.add) value += finish.add[m * finish.add_stride + n];
            c[m * c_stride + n] = finish.relu && value < 0 ? 0 : value;
        }
}

// The last rows of A, fewer than a tile: the same tile, as low as they are many.
template <class P, long M = ROWS - 1>
inline void low_tile(long m, Rows<P> a, const typename P::T* b, long columns, Finish finish, float* c, long c_stride) {
    if (m == M) return tile<P, M>(a, b, columns, finish, c, c_stride);
    if constexpr (M > 1) low_tile<P, M - 1>(m, a, b, columns, finish, c, c_stride);
}

template <class P>
[[gnu::noinline]] void gemm(Rows<P> a, Panels<P> b, long m, long n, Finish finish, float* c, long c_stride) {
    for (long column = 0; column < n; column += PANEL) {
        const auto* panel = b.data + column / PANEL * b.stride;
        const long columns = n - column < PANEL ? n - column : PANEL;
        Finish here = finish;
        if (here.bias) here.bias += column;
        if (here.add) here.add += column;
        Rows<P> rows = a;
        float* to = c + column;
        for (long left = m; left > 0; left -= ROWS) {
            if (left >= ROWS)
                tile<P, ROWS>(rows, panel, columns, here, to, c_stride);
            else
                low_tile<P>(left, rows, panel, columns, here, to, c_stride);
            rows.data += ROWS * a.stride;
            to += ROWS * c_stride;
            if (here.add) here.add += ROWS * here.add_stride;
        }
    }
}

// A linear layer whose weights are packed.
struct Linear {
    const void* panels;
    const float* bias;  // (out), or null
    int64_t in, out;
};

template <class P> void apply(const Linear& layer, Rows<P> a, long m, Finish finish, float* c, long c_stride) {
    const Panels<P> panels{static_cast<const typename P::T*>(layer.panels), round_up(layer.in, P::UNIT) * PANEL};
    finish.bias = layer.bias;
    gemm<P>(a, panels, m, layer.out, finish, c, c_stride);
}
