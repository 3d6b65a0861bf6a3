// From logits at a quarter of the resolution to a mask of any size, without ever upsampling all classes.
//
// Between four neighbouring logits a bilinear sample lies between the least and the greatest of them. So within that
// cell a class can win only if its greatest corner reaches the greatest of all classes' least corners. Mostly one class
// is left, and the cell is filled; else the few that are left are compared at each of its pixels. The bound is exact.

#pragma once

#include <omp.h>

#include <cmath>

#include "layers.h"

// Output positions [first, last) that fall between the same two inputs.
struct Cell {
    long first, last;
    Sample corners;
};

inline std::vector<Cell> cells(const std::vector<Sample>& samples) {
    std::vector<Cell> found;
    for (long i = 0; i < long(samples.size()); i++) {
        if (found.empty() || found.back().corners.low != samples[i].low) found.push_back({i, i, samples[i]});
        found.back().last = i + 1;
    }
    return found;
}

// The least and greatest of two neighbours in a column, for every class; what is past the last class never wins.
inline void bounds(const float* above, const float* below, long k, long padded, float* least, float* most) {
    long c = 0;
    for (; c + LANES <= k; c += LANES) {
        const vec a = load<vec>(above + c), b = load<vec>(below + c);
        store(least + c, min(a, b));
        store(most + c, max(a, b));
    }
    for (; c < k; c++) least[c] = std::min(above[c], below[c]), most[c] = std::max(above[c], below[c]);
    std::fill(least + k, least + padded, -INFINITY);
    std::fill(most + k, most + padded, -INFINITY);
}

// Mask (height, width) and pixels (K) of logits (h, w, K). Equal logits go to the smaller class.
template <class Id>
void upsampled_argmax(const float* logits, long h, long w, long k, long height, long width, Id* mask, int64_t* pixels) {
    std::vector<Sample> across, down;
    for (long x = 0; x < width; x++) across.push_back(sample(x, width, w));
    for (long y = 0; y < height; y++) down.push_back(sample(y, height, h));
    std::vector<float> weights(width + LANES);
    for (long x = 0; x < width; x++) weights[x] = across[x].weight;
    const std::vector<Cell> columns = cells(across), rows = cells(down);
    const long padded = round_up(k, LANES);
    std::fill_n(pixels, k, 0);
#pragma omp parallel
    {
        std::vector<float> edges(4 * padded);  // least and most of the cell's two columns
        std::vector<int64_t> counts(k);
        std::vector<int32_t> candidates(padded);
        float *least[2] = {edges.data(), edges.data() + padded}, *most[2] = {least[1] + padded, least[1] + 2 * padded};
#pragma omp for schedule(dynamic)
        for (long r = 0; r < long(rows.size()); r++) {
            const Cell& row = rows[r];
            const float *above = logits + row.corners.low * w * k, *below = logits + row.corners.high * w * k;
            long known = -1;  // the column whose bounds are in [1]
            for (const Cell& column : columns) {
                const long left = column.corners.low, right = column.corners.high;
                if (known == left)
                    std::swap(least[0], least[1]), std::swap(most[0], most[1]);
                else
                    bounds(above + left * k, below + left * k, k, padded, least[0], most[0]);
                bounds(above + right * k, below + right * k, k, padded, least[1], most[1]);
                known = right;
                vec floor = splat(-INFINITY);
                for (long c = 0; c < padded; c += LANES)
                    floor = max(floor, min(load<vec>(least[0] + c), load<vec>(least[1] + c)));
                const float bar = greatest(floor);
                long count = 0;
                for (long c = 0; c < k; c++) {
                    candidates[count] = int32_t(c);
                    count += (most[0][c] >= bar) | (most[1][c] >= bar);
                }
                if (count == 0) candidates[count++] = 0;  // only where logits are not numbers
                if (count == 1) {
                    for (long y = row.first; y < row.last; y++)
                        std::fill(mask + y * width + column.first, mask + y * width + column.last, Id(candidates[0]));
                    counts[candidates[0]] += (row.last - row.first) * (column.last - column.first);
                    continue;
                }
                for (long y = row.first; y < row.last; y++)
                    for (long x = column.first; x < column.last; x += LANES) {
                        const vec weight = load<vec>(&weights[x]);
                        vec best = splat(-INFINITY);
                        ivec winner = splat(candidates[0]);
                        for (long i = 0; i < count; i++) {
                            const long c = candidates[i];
                            const float* a = above + c;
                            const float* b = below + c;
                            const float start = a[left * k] + (b[left * k] - a[left * k]) * down[y].weight;
                            const float end = a[right * k] + (b[right * k] - a[right * k]) * down[y].weight;
                            const vec value = start + (end - start) * weight;
                            winner = value > best ? splat(int32_t(c)) : winner;
                            best = max(value, best);
                        }
                        const long n = std::min(LANES, column.last - x);
                        for (long i = 0; i < n; i++) {
                            mask[y * width + x + i] = Id(winner[i]);
                            counts[winner[i]]++;
                        }
                    }
            }
        }
#pragma omp critical
        for (long c = 0; c < k; c++) pixels[c] += counts[c];
    }
}

// Sums over all logits (count, K) of the softmax: per class how often it wins and its confidence there, and the entropy.
// Confidence and entropy are summed in fixed point, 2^32 to one, so that the order of threads changes nothing.
inline void softmax_sums(const float* logits, long count, long k, int64_t* won, int64_t* confidence, int64_t* entropy) {
    const long padded = round_up(k, LANES), blocks = (count + 63) / 64;
    int64_t total = 0;
    std::fill_n(won, k, 0);
    std::fill_n(confidence, k, 0);
#pragma omp parallel reduction(+ : total)
    {
        std::vector<int64_t> wins(k), sums(k);
        std::vector<float> row(padded, -INFINITY);
#pragma omp for schedule(dynamic)
        for (long block = 0; block < blocks; block++)
            for (long i = block * 64; i < std::min(count, block * 64 + 64); i++) {
                std::copy_n(logits + i * k, k, row.data());
                vec top = splat(-INFINITY);
                for (long c = 0; c < padded; c += LANES) top = max(top, load<vec>(&row[c]));
                const float best = greatest(top);
                vec weights{}, moments{};
                for (long c = 0; c < padded; c += LANES) {
                    const vec below = max(load<vec>(&row[c]) - best, splat(-1e4f)), weight = exp2(below * LOG2E);
                    weights += weight;
                    moments += weight * below;
                }
                const float normaliser = sum(weights);
                const long winner = std::find(row.begin(), row.begin() + k - 1, best) - row.begin();
                wins[winner]++;
                if (!(normaliser >= 1)) continue;  // logits that are not numbers have no sums
                sums[winner] += int64_t(4294967296.0 / normaliser);
                total += int64_t(4294967296.0 * (std::log(normaliser) - sum(moments) / normaliser));
            }
#pragma omp critical
        for (long c = 0; c < k; c++) won[c] += wins[c], confidence[c] += sums[c];
    }
    *entropy = total;
}
