// The C interface that `model/native/__init__.py` calls. Every function works with `threads` OpenMP threads.

#include "layers.h"
#include "upsample.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
template <class Work> void in_precision(int bfloat16, Work work) {
    if (bfloat16)
        work(BFloat16{});
    else
        work(Float32{});
}
}  // namespace

EXPORT long panel_bytes(int bfloat16, long n, long k) {
    return bfloat16 ? panel_elements<BFloat16>(n, k) * 2 : panel_elements<Float32>(n, k) * 4;
}

EXPORT void pack_panels(int bfloat16, const float* weight, long n, long k, void* to) {
    in_precision(bfloat16, [&]<class P>(P) { pack<P>(weight, n, k, k, 1, static_cast<typename P::T*>(to)); });
}

EXPORT void embed_pixels(int bfloat16, int threads, const PatchEmbeddings* layer, const uint8_t* images, long n, long h,
                         long w, float* out) {
    omp_set_num_threads(threads);
    in_precision(bfloat16, [&]<class P>(P) { patch_embeddings<P>(*layer, images, n, h, w, out); });
}

EXPORT void embed_map(int bfloat16, int threads, const PatchEmbeddings* layer, const float* map, long n, long h, long w,
                      float* out) {
    omp_set_num_threads(threads);
    in_precision(bfloat16, [&]<class P>(P) { patch_embeddings<P>(*layer, map, n, h, w, out); });
}

EXPORT void attend_to_all(int bfloat16, int threads, const Attention* layer, float* tokens, long n, long h, long w) {
    omp_set_num_threads(threads);
    in_precision(bfloat16, [&]<class P>(P) { attention<P>(*layer, tokens, n, h, w); });
}

EXPORT void mix(int bfloat16, int threads, const MixFFN* layer, const float* tokens, long n, long h, long w, float* out) {
    omp_set_num_threads(threads);
    in_precision(bfloat16, [&]<class P>(P) { mix_ffn<P>(*layer, tokens, n, h, w, threads, out); });
}

EXPORT void layer_norm(int threads, const Norm* layer, float* tokens, long rows, long channels) {
    omp_set_num_threads(threads);
#pragma omp parallel for
    for (long block = 0; block < (rows + 63) / 64; block++) {
        float* from = tokens + block * 64 * channels;
        normalise<Float32>(from, std::min(64L, rows - block * 64), channels, *layer, from, channels);
    }
}

EXPORT void project(int bfloat16, int threads, const Linear* layer, const float* tokens, long rows, int relu, float* out) {
    omp_set_num_threads(threads);
    in_precision(bfloat16, [&]<class P>(P) { linear<P>(*layer, tokens, rows, relu, out); });
}

EXPORT void decode_maps(int bfloat16, int threads, const Decoder* layer, const float* finest, long n, long h, long w,
                        const Map* coarse, long maps, float* logits) {
    omp_set_num_threads(threads);
    in_precision(bfloat16, [&]<class P>(P) { decode<P>(*layer, finest, n, h, w, coarse, maps, logits); });
}

EXPORT void argmax_8bit(int threads, const float* logits, long h, long w, long k, long height, long width, uint8_t* mask,
                        int64_t* pixels) {
    omp_set_num_threads(threads);
    upsampled_argmax(logits, h, w, k, height, width, mask, pixels);
}

EXPORT void argmax_16bit(int threads, const float* logits, long h, long w, long k, long height, long width, uint16_t* mask,
                         int64_t* pixels) {
    omp_set_num_threads(threads);
    upsampled_argmax(logits, h, w, k, height, width, mask, pixels);
}

EXPORT void softmax_statistics(int threads, const float* logits, long count, long k, int64_t* won, int64_t* confidence,
                               int64_t* entropy) {
    omp_set_num_threads(threads);
    softmax_sums(logits, count, k, won, confidence, entropy);
}
