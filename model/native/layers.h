// SegFormer's layers on maps (N, H, W, C) in float32, which are also its tokens (N, H*W, C).
//
// What bounds a layer on a CPU is memory as much as arithmetic, so each is one pass: a block of tokens is normalised,
// multiplied, attended and added back while it is in the cache. Nothing of the size of a whole attention map, of a
// Mix-FFN's hidden map or of a decoder's D-channel map exists. Channels are multiples of 16.

#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"

struct Norm {
    const float *weight, *bias;  // (C)
    float eps;
};

// Rows of tokens to normalised rows, in the precision of the product that reads them.
template <class P>
void normalise(const float* from, long rows, long channels, const Norm& norm, typename P::T* to, long to_stride) {
    for (long row = 0; row < rows; row++, from += channels, to += to_stride) {
        vec total{}, squares{};
        for (long c = 0; c < channels; c += LANES) total += load<vec>(from + c);
        const float mean = sum(total) / float(channels);
        for (long c = 0; c < channels; c += LANES) {
            const vec centred = load<vec>(from + c) - mean;
            squares += centred * centred;
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(channels) + norm.eps);
        for (long c = 0; c < channels; c += LANES) {
            const vec centred = (load<vec>(from + c) - mean) * scale;
            P::put(to + c, centred * load<vec>(norm.weight + c) + load<vec>(norm.bias + c));
        }
    }
}

// Overlapping patches: a strided convolution as a product, then LayerNorm on the tokens.
struct PatchEmbeddings {
    Linear conv;  // in: (kernel y, kernel x and channel, the two rounded up to whole units)
    Norm norm;
    int64_t kernel, stride, channels;
    const float* pixels;  // (channels, 256): what each uint8 is once normalised; null for a map of floats
};

template <class P, class Pixel>
void patch_embeddings(const PatchEmbeddings& layer, const Pixel* images, long n, long h, long w, float* out) {
    using T = typename P::T;
    const long k = layer.kernel, s = layer.stride, in = layer.channels, pad = k / 2, c = layer.conv.out;
    const long out_h = (h + 2 * pad - k) / s + 1, out_w = (w + 2 * pad - k) / s + 1;
    const long line = (w + 2 * pad) * in, rows = std::clamp(out_h / 8, 1L, 8L), steps = (out_h + rows - 1) / rows;
    std::vector<T> levels;
    if (layer.pixels)
        for (long i = 0; i < in * 256; i++) levels.push_back(P::narrow(layer.pixels[i]));
#pragma omp parallel for schedule(dynamic)
    for (long item = 0; item < n * steps; item++) {
        const long image = item / steps, first = item % steps * rows, count = std::min(rows, out_h - first);
        const long lines = (count - 1) * s + k;
        T* padded = scratch<0, T>(lines * line + P::UNIT);  // the input rows that these patches see, zeros around them
        std::fill_n(padded, lines * line + P::UNIT, T(0));
        for (long y = 0; y < lines; y++) {
            const long source = first * s - pad + y;
            if (source < 0 || source >= h) continue;
            const Pixel* from = images + (image * h + source) * w * in;
            T* to = padded + y * line + pad * in;
            if constexpr (sizeof(Pixel) == 1)
                for (long x = 0; x < w; x++, from += 3, to += 3)
                    for (long channel = 0; channel < 3; channel++) to[channel] = levels[channel * 256 + from[channel]];
            else
                for (long i = 0; i < w * in; i += LANES) P::put(to + i, load<vec>(from + i));
        }
        for (long y = 0; y < count; y++) {
            float* tokens = out + (image * out_h + first + y) * out_w * c;
            apply<P>(layer.conv, {padded + y * s * line, s * in, k * in, k, line}, out_w, {}, tokens, c);
            normalise<Float32>(tokens, out_w, c, layer.norm, tokens, c);
        }
    }
}

// Attention whose keys and values come from a map reduced `reduction` times in each direction.
struct Attention {
    Norm norm;
    Linear query;         // its result is in units of log2(e) / sqrt(channels of a head)
    Linear reduce;        // in: (window y, window x, channel); unused when reduction is 1
    Norm reduced_norm;
    Linear key_value;     // out: keys, then values
    Linear output;
    int64_t heads, reduction;
};

constexpr long QUERIES = 48, KEYS = 256;  // of a block: its scores stay in the cache

// Normalised keys and values (N, reduced H*W, 2 C) of the whole batch.
template <class P>
void keys_and_values(const Attention& layer, const float* tokens, long n, long h, long w, float* out) {
    using T = typename P::T;
    const long r = layer.reduction, c = layer.query.in;
    const long small_h = std::max(1L, h / r), small_w = std::max(1L, w / r);
    const long rows = std::max(1L, 32 / small_w), steps = (small_h + rows - 1) / rows;
#pragma omp parallel for schedule(dynamic)
    for (long item = 0; item < n * steps; item++) {
        const long image = item / steps, first = item % steps * rows, count = std::min(rows, small_h - first);
        const long keys = count * small_w;
        float* values = out + (image * small_h + first) * small_w * 2 * c;
        T* narrow = scratch<1, T>(keys * c);
        const float* from = tokens + (image * h + first * r) * w * c;
        if (r == 1) {
            normalise<P>(from, keys, c, layer.norm, narrow, c);
        } else {
            const long lines = count * r, known = std::min(lines, h - first * r), width = std::max(w, r);
            T* normal = scratch<0, T>(lines * width * c);
            float* reduced = scratch<2, float>(keys * c);
            if (h < r || w < r) std::fill_n(normal, lines * width * c, T(0));  // less than one window: zeros around it
            for (long y = 0; y < known; y++) normalise<P>(from + y * w * c, w, c, layer.norm, normal + y * width * c, c);
            for (long y = 0; y < count; y++)
                apply<P>(layer.reduce, {normal + y * r * width * c, r * c, r * c, r, width * c}, small_w, {},
                         reduced + y * small_w * c, c);
            normalise<P>(reduced, keys, c, layer.reduced_norm, narrow, c);
        }
        apply<P>(layer.key_value, {narrow, c, c}, keys, {}, values, 2 * c);
    }
}

// Softmax-weighted values of one head for a block of queries, over blocks of keys (Milakov and Gimelshein 2018).
template <class P>
void attend(const typename P::T* query, long stride, long queries, long size, Panels<P> keys, Panels<P> values, long count,
            float* out) {
    using T = typename P::T;
    float* scores = scratch<4, float>(QUERIES * KEYS);
    T* weights = sizeof(T) == sizeof(float) ? reinterpret_cast<T*>(scores) : scratch<5, T>(QUERIES * KEYS);
    float top[QUERIES], total[QUERIES];
    std::fill_n(top, QUERIES, -1e30f);
    std::fill_n(total, QUERIES, 0.0f);
    for (long first = 0; first < count; first += KEYS) {
        const long here = std::min(KEYS, count - first), padded = round_up(here, LANES);
        gemm<P>({query, stride, size}, {keys.data + first / PANEL * keys.stride, keys.stride}, queries, here, {}, scores, KEYS);
        for (long q = 0; q < queries; q++) {
            float* row = scores + q * KEYS;
            std::fill(row + here, row + padded, -1e30f);
            vec best = splat(top[q]);
            for (long i = 0; i < padded; i += LANES) best = max(best, load<vec>(row + i));
            const float peak = greatest(best), fade = exp2(splat(top[q] - peak))[0];
            vec added{};
            for (long i = 0; i < padded; i += LANES) {
                const vec weight = exp2(load<vec>(row + i) - peak);
                added += weight;
                P::put(weights + q * KEYS + i, weight);
            }
            total[q] = total[q] * fade + sum(added);
            top[q] = peak;
            if (first)
                for (long d = 0; d < size; d++) out[q * stride + d] *= fade;
        }
        Finish finish;
        if (first) finish.add = out, finish.add_stride = stride;
        gemm<P>({weights, KEYS, here}, {values.data + first * PANEL, values.stride}, queries, size, finish, out, stride);
    }
    for (long q = 0; q < queries; q++)
        for (long d = 0; d < size; d++) out[q * stride + d] /= total[q];
}

// tokens + attention(norm(tokens)), in place.
template <class P> void attention(const Attention& layer, float* tokens, long n, long h, long w) {
    using T = typename P::T;
    const long c = layer.query.in, size = c / layer.heads, length = h * w;
    const long keys = std::max(1L, h / layer.reduction) * std::max(1L, w / layer.reduction);
    const long key_elements = panel_elements<P>(keys, size), value_elements = panel_elements<P>(size, keys);
    std::vector<float> pairs(n * keys * 2 * c);
    std::vector<T> packed(n * layer.heads * (key_elements + value_elements));
    keys_and_values<P>(layer, tokens, n, h, w, pairs.data());
    const long blocks = (length + QUERIES - 1) / QUERIES;
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (long item = 0; item < n * layer.heads; item++) {
            const float* from = pairs.data() + item / layer.heads * keys * 2 * c + item % layer.heads * size;
            T* to = packed.data() + item * (key_elements + value_elements);
            pack<P>(from, keys, size, 2 * c, 1, to);
            pack<P>(from + c, size, keys, 1, 2 * c, to + key_elements);
        }
#pragma omp for schedule(dynamic, 4)
        for (long item = 0; item < n * blocks; item++) {
            const long image = item / blocks, first = item % blocks * QUERIES;
            const long queries = std::min(QUERIES, length - first);
            float* block = tokens + (image * length + first) * c;
            T* narrow = scratch<0, T>(QUERIES * c);
            float* wide = scratch<1, float>(QUERIES * c);
            normalise<P>(block, queries, c, layer.norm, narrow, c);
            apply<P>(layer.query, {narrow, c, c}, queries, {}, wide, c);
            for (long i = 0; i < queries * c; i += LANES) P::put(narrow + i, load<vec>(wide + i));
            for (long head = 0; head < layer.heads; head++) {
                const T* to = packed.data() + (image * layer.heads + head) * (key_elements + value_elements);
                const long units = round_up(size, P::UNIT), key_units = round_up(keys, P::UNIT);
                attend<P>(narrow + head * size, c, queries, size, {to, units * PANEL},
                          {to + key_elements, key_units * PANEL}, keys, wide + head * size);
            }
            for (long i = 0; i < queries * c; i += LANES) P::put(narrow + i, load<vec>(wide + i));
            Finish residual;
            residual.add = block;
            residual.add_stride = c;
            apply<P>(layer.output, {narrow, c, c}, queries, residual, block, c);
        }
    }
}

// Mix-FFN: wider, a depthwise 3x3 convolution, GELU, narrower.
struct MixFFN {
    Norm norm;
    Linear expand;
    const float *taps, *taps_bias;  // (3, 3, hidden), (hidden)
    Linear contract;
};

constexpr long NEIGHBOURS = 4;  // tokens that share a load of the taps

// `count` neighbours of a row of the hidden map, from the three rows around it, which begin one token to the left.
template <class P, long count>
void depthwise_gelu(const MixFFN& layer, const float* const (&rows)[3], typename P::T* out) {
    const long hidden = layer.expand.out;
    for (long c = 0; c < hidden; c += LANES) {
        vec values[count];
        for (vec& value : values) value = load<vec>(layer.taps_bias + c);
        for (long dy = 0; dy < 3; dy++) {
            vec inputs[count + 2];
#pragma GCC unroll 8
            for (long x = 0; x < count + 2; x++) inputs[x] = load<vec>(rows[dy] + x * hidden + c);
#pragma GCC unroll 3
            for (long dx = 0; dx < 3; dx++) {
                const vec tap = load<vec>(layer.taps + (dy * 3 + dx) * hidden + c);
#pragma GCC unroll 4
                for (long x = 0; x < count; x++) values[x] += inputs[x + dx] * tap;
            }
        }
#pragma GCC unroll 4
        for (long x = 0; x < count; x++) P::put(out + x * hidden + c, gelu(values[x]));
    }
}

// out = tokens + mix_ffn(norm(tokens)). Bands of rows go down the map with three rows of the hidden map in hand.
template <class P> void mix_ffn(const MixFFN& layer, const float* tokens, long n, long h, long w, long threads, float* out) {
    using T = typename P::T;
    const long c = layer.expand.in, hidden = layer.expand.out, line = (w + 2) * hidden;
    const long bands = std::clamp((3 * threads + n - 1) / n, 1L, std::max(1L, h / 8));
#pragma omp parallel for schedule(dynamic)
    for (long item = 0; item < n * bands; item++) {
        const long image = item / bands, band = item % bands;
        const long first = h * band / bands, last = h * (band + 1) / bands;
        T* narrow = scratch<0, T>(w * c);
        float* ring = scratch<1, float>(4 * line);  // three rows, and one of zeros
        T* mixed = scratch<2, T>(w * hidden);
        std::fill_n(ring, 4 * line, 0.0f);
        const auto row = [&](long y) { return y < 0 || y >= h ? ring + 3 * line : ring + y % 3 * line; };
        const auto expand = [&](long y) {
            if (y < 0 || y >= h) return;
            normalise<P>(tokens + (image * h + y) * w * c, w, c, layer.norm, narrow, c);
            apply<P>(layer.expand, {narrow, c, c}, w, {}, row(y) + hidden, hidden);
        };
        expand(first - 1);
        expand(first);
        for (long y = first; y < last; y++) {
            expand(y + 1);
            const float* rows[3] = {row(y - 1), row(y), row(y + 1)};
            for (long x = 0; x < w;) {
                const long step = w - x >= NEIGHBOURS ? NEIGHBOURS : 1;
                if (step == NEIGHBOURS)
                    depthwise_gelu<P, NEIGHBOURS>(layer, rows, mixed + x * hidden);
                else
                    depthwise_gelu<P, 1>(layer, rows, mixed + x * hidden);
                for (const float*& start : rows) start += step * hidden;
                x += step;
            }
            const long offset = (image * h + y) * w * c;
            Finish residual;
            residual.add = tokens + offset;
            residual.add_stride = c;
            apply<P>(layer.contract, {mixed, hidden, hidden}, w, residual, out + offset, c);
        }
    }
}

// The folded decoder: each stage one linear map to D channels at its own resolution, upsampled, summed; then classes.
struct Decoder {
    Linear finest;      // of the first stage, with the bias of all
    Linear classifier;
};

struct Map {
    const float* data;  // (N, height, width, D): a coarser stage, already projected
    int64_t height, width;
};

// Where a bilinear sample falls: between `low` and `high`, at `weight` from the first (align_corners=False).
struct Sample {
    long low, high;
    float weight;
};

inline Sample sample(long position, long to, long from) {
    const float centre = std::max(0.0f, (float(position) + 0.5f) * (float(from) / float(to)) - 0.5f);
    const long low = std::min(long(centre), from - 1);
    return {low, std::min(low + 1, from - 1), centre - float(low)};
}

// a + (b - a) * weight, of rows of floats.
inline void blend(const float* a, const float* b, float weight, long count, float* out) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store(out + i, load<vec>(a + i) + (load<vec>(b + i) - load<vec>(a + i)) * weight);
    for (; i < count; i++) out[i] = a[i] + (b[i] - a[i]) * weight;
}

template <class P>
void decode(const Decoder& layer, const float* tokens, long n, long h, long w, const Map* coarse, long maps, float* logits) {
    using T = typename P::T;
    const long c = layer.finest.in, d = layer.finest.out, k = layer.classifier.out;
#pragma omp parallel for schedule(dynamic)
    for (long item = 0; item < n * h; item++) {
        const long image = item / h, y = item % h;
        T* narrow = scratch<0, T>(QUERIES * std::max(c, d));
        float* sums = scratch<1, float>(QUERIES * d);
        long widest = 0;
        for (long m = 0; m < maps; m++) widest += coarse[m].width;
        float* lines = scratch<2, float>(widest * d);  // each coarse map at this row
        float* line = lines;
        for (long m = 0; m < maps; m++) {
            const Map& map = coarse[m];
            const Sample at = sample(y, h, map.height);
            const float* from = map.data + image * map.height * map.width * d;
            blend(from + at.low * map.width * d, from + at.high * map.width * d, at.weight, map.width * d, line);
            line += map.width * d;
        }
        for (long first = 0; first < w; first += QUERIES) {
            const long count = std::min(QUERIES, w - first);
            const float* from = tokens + (item * w + first) * c;
            for (long i = 0; i < count * c; i += LANES) P::put(narrow + i, load<vec>(from + i));
            apply<P>(layer.finest, {narrow, c, c}, count, {}, sums, d);
            for (long x = 0; x < count; x++) {
                const float *low[4], *high[4];
                float weight[4];
                const float* start = lines;
                for (long m = 0; m < maps; m++) {
                    const Sample at = sample(first + x, w, coarse[m].width);
                    low[m] = start + at.low * d;
                    high[m] = start + at.high * d;
                    weight[m] = at.weight;
                    start += coarse[m].width * d;
                }
                for (long i = 0; i < d; i += LANES) {
                    vec value = load<vec>(sums + x * d + i);
                    for (long m = 0; m < maps; m++) {
                        const vec a = load<vec>(low[m] + i);
                        value += a + (load<vec>(high[m] + i) - a) * weight[m];
                    }
                    P::put(narrow + x * d + i, max(value, vec{}));
                }
            }
            apply<P>(layer.classifier, {narrow, d, d}, count, {}, logits + (item * w + first) * k, k);
        }
    }
}

// A linear layer on whole maps, for what is computed at a coarse resolution.
template <class P> void linear(const Linear& layer, const float* tokens, long rows, bool relu, float* out) {
    using T = typename P::T;
    const long c = layer.in, blocks = (rows + QUERIES - 1) / QUERIES;
#pragma omp parallel for schedule(dynamic)
    for (long block = 0; block < blocks; block++) {
        const long first = block * QUERIES, count = std::min(QUERIES, rows - first);
        T* narrow = scratch<0, T>(QUERIES * c);
        for (long i = 0; i < count * c; i += LANES) P::put(narrow + i, load<vec>(tokens + first * c + i));
        Finish finish;
        finish.relu = relu;
        apply<P>(layer, {narrow, c, c}, count, finish, out + first * layer.out, layer.out);
    }
}
