// The kernels of one instruction set: included with FASTSCNN_LANES, FASTSCNN_ISA (a namespace) and
// FASTSCNN_TABLE defined, after every standard header and after the target pragma. Nothing in here
// may call an inline function of the standard library: the linker would keep one copy of it for all
// processors.
namespace fastscnn {
namespace FASTSCNN_ISA {
#include "simd.inl"
#include "rows.inl"
#include "gemm.inl"
#include "depthwise.inl"
#include "bilinear.inl"
#include "stem_conv.inl"
#include "dsconv.inl"
#include "inverted_residual.inl"
#include "pyramid_pooling.inl"
#include "feature_fusion.inl"
#include "upsample_classify.inl"
#include "network.inl"
#include "training.inl"
}  // namespace FASTSCNN_ISA

#define FASTSCNN_STRING_(x) #x
#define FASTSCNN_STRING(x) FASTSCNN_STRING_(x)
const Kernels FASTSCNN_TABLE = {
    FASTSCNN_STRING(FASTSCNN_ISA), &FASTSCNN_ISA::kTraining,        FASTSCNN_ISA::stem_conv,
    FASTSCNN_ISA::dsconv,          FASTSCNN_ISA::inverted_residual, FASTSCNN_ISA::pyramid_pooling,
    FASTSCNN_ISA::feature_fusion,  FASTSCNN_ISA::upsample_classify, FASTSCNN_ISA::network};
}  // namespace fastscnn
