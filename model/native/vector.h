// A register of floats, the functions that the network needs of it, and the two precisions of a matrix product.
//
// Written with the compilers' vector extension, so one source serves every width: 8 floats with AVX2, 16 with AVX-512.

#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#ifdef __AVX512F__
constexpr long LANES = 16;
#else
constexpr long LANES = 8;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

template <class V> inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class V> inline void store(void* to, V value) { std::memcpy(to, &value, sizeof value); }

inline vec splat(float value) { return value - vec{}; }  // "vec{} + value" would be an addition: -0 + 0 is 0
inline ivec splat(int32_t value) { return value - ivec{}; }
inline vec max(vec a, vec b) { return a > b ? a : b; }
inline vec min(vec a, vec b) { return a < b ? a : b; }

template <class Combine> inline float reduce(vec v, Combine combine) {
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int step = LANES / 2; step; step /= 2) v = combine(v, __builtin_shuffle(v, lane ^ step));
    return v[0];
}
inline float sum(vec v) { return reduce(v, [](vec a, vec b) { return a + b; }); }
inline float greatest(vec v) { return reduce(v, [](vec a, vec b) { return max(a, b); }); }

// 2^x for x <= 0, relative error under 2e-7; what is below 2^-126 becomes it. A polynomial on the fraction, fitted to the
// least greatest error, then the whole part is added to the exponent's bits.
inline vec exp2(vec x) {
    const vec clamped = max(x, splat(-126.0f));
    const vec shifted = clamped + 12582912.0f;           // 1.5 * 2^23: rounds to a whole number in the lowest bits
    const vec f = clamped - (shifted - 12582912.0f);     // -0.5 to 0.5
    vec p = splat(1.327646973e-3f);
    p = p * f + 9.675541316e-3f;
    p = p * f + 5.550713280e-2f;
    p = p * f + 2.402211972e-1f;
    p = p * f + 6.931469671e-1f;
    p = p * f + 1.000000072f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}
constexpr float LOG2E = 1.44269504f;

// x * Phi(x), the exact GELU: Phi(x) - 1/2 as an odd rational function, fitted to the least greatest error on the range
// beyond which Phi is 0 or 1 in float32; absolute error of Phi under 3e-7.
inline vec gelu(vec x) {
    const vec z = min(max(x, splat(-5.4f)), splat(5.4f)), u = z * z;
    vec p = splat(1.161043805e-10f);
    p = p * u - 2.225706983e-08f;
    p = p * u + 3.133412164e-06f;
    p = p * u + 1.589569070e-04f;
    p = p * u + 4.435026370e-03f;
    p = p * u + 3.478497279e-02f;
    p = p * u + 3.989421787e-01f;
    vec q = splat(5.867588010e-05f);
    q = q * u + 1.763585711e-03f;
    q = q * u + 2.842992593e-02f;
    q = q * u + 2.538579501e-01f;
    q = q * u + 1.0f;
    return x * (z * p / q + 0.5f);
}

// The operands of a matrix product, float32 or bfloat16; sums are float32 in both. A unit is what one multiply-add
// of a lane takes from each side: one float, or two neighbours along the inner dimension in bfloat16.

struct Float32 {
    using T = float;
    using Operand = vec;
    static constexpr long UNIT = 1;
    static Operand broadcast(const T* a) { return splat(*a); }
    static vec multiply_add(Operand a, Operand b, vec c) { return a * b + c; }
    static void put(T* to, vec v) { store(to, v); }
    static T narrow(float v) { return v; }
};

struct BFloat16 {
    using T = uint16_t;
    using Operand = ivec;
    static constexpr long UNIT = 2;
    static Operand broadcast(const T* a) { return splat(load<int32_t>(a)); }
    static vec multiply_add(Operand a, Operand b, vec c) {
#ifdef __AVX512BF16__
        return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
        const int32_t high = int32_t(0xffff0000);
        c = (vec)(a << 16) * (vec)(b << 16) + c;
        return (vec)(a & high) * (vec)(b & high) + c;
#endif
    }
    static uvec rounded(vec v) {  // to nearest, ties to even
        const uvec bits = (uvec)v;
        return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }
    static void put(T* to, vec v) { store(to, __builtin_convertvector(rounded(v), halves)); }
    static T narrow(float v) { return T(rounded(splat(v))[0]); }
};

inline long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// Working memory of a thread, kept from call to call; each use has a number of its own. Contents are undefined.
template <int use, class T> T* scratch(long count) {
    struct Free {
        void operator()(T* p) { ::operator delete(p, std::align_val_t(64)); }
    };
    static thread_local std::unique_ptr<T, Free> buffer;
    static thread_local long capacity = 0;
    if (count > capacity) {
        buffer.reset();
        buffer.reset(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
        capacity = count;
    }
    return buffer.get();
}
