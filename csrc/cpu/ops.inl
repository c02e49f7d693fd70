// The fused ops in one arithmetic, FASTSCNN_ARITHMETIC, in that arithmetic's namespace.
#if FASTSCNN_ARITHMETIC == FASTSCNN_BFLOAT16
using element = bf16;
constexpr Type kType = Type::bf16;
FASTSCNN_INLINE element to_element(float x) { return to_bf16(x); }
#elif FASTSCNN_ARITHMETIC == FASTSCNN_INT8
using element = uint8_t;
constexpr Type kType = Type::u8;
#else
using element = float;
constexpr Type kType = Type::f32;
FASTSCNN_INLINE element to_element(float x) { return x; }
#endif
#if FASTSCNN_ARITHMETIC == FASTSCNN_INT8
using logit = float;
#else
using logit = element;
#endif
constexpr int logit_pitch(int classes) { return rounded_up(classes, int(kLine / sizeof(logit))); }
// Whether the stem's taps are gathered, pixel by pixel, for products of whole tiles.
constexpr bool kGathered = FASTSCNN_ARITHMETIC == FASTSCNN_BFLOAT16;
// Whether fp32 sums of thousands of terms are exact enough.
constexpr bool kLongSums = FASTSCNN_ARITHMETIC != FASTSCNN_FLOAT32;

#include "rows.inl"
#if FASTSCNN_ARITHMETIC == FASTSCNN_INT8
#include "bytes.inl"
#include "inner_product.inl"
#include "requantise.inl"
#else
#include "inner_product.inl"
#include "epilogue.inl"
#endif
#include "product.inl"
#include "gemm.inl"
#if FASTSCNN_AMX && FASTSCNN_ARITHMETIC == FASTSCNN_INT8
#include "gemm_amx_int8.inl"
#elif FASTSCNN_AMX
#include "gemm_amx.inl"
#else
constexpr int kTileRows = kRegisterRows;
struct Tiles {  // nothing to set up
  Tiles() {}
};
template <class E>
FASTSCNN_INLINE void multiply(const Product<E>& p, int m) {
  multiply_in_registers(p, m);
}
#endif
#if FASTSCNN_ARITHMETIC == FASTSCNN_INT8
#include "bilinear_int8.inl"
#include "depthwise_int8.inl"
#include "parts.inl"
#include "stem_conv_int8.inl"
#include "dsconv.inl"
#include "inverted_residual.inl"
#include "pyramid_pooling_int8.inl"
#else
#include "bilinear.inl"
#include "depthwise.inl"
#include "parts.inl"
#include "stem_conv.inl"
#include "dsconv.inl"
#include "inverted_residual.inl"
#include "pyramid_pooling.inl"
#endif
#include "feature_fusion.inl"
#include "upsample_classify.inl"
#include "network.inl"
#include "roof.inl"

static const Ops kOps = {
    kStemConv, dsconv, inverted_residual, pyramid_pooling, feature_fusion, kUpsampleClassify,
    network,   roof};
