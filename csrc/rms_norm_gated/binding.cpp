#include "cpu/dispatch.h"
#include "cpu/reduce.h"
#include "registry.h"
#include "rms_norm_gated/kernel.h"
#include "torch_api/stable.h"

namespace pyseq::rms_norm_gated {
namespace {

// [..., D] as [O, I, D]: a view whatever the outer strides for up to three axes, and for more where torch can make one.
Tensor as_rows(const Tensor& t, const Tensor& like) {
  const int64_t inner = like.dim() >= 2 ? like.size(-2) : 1, dim = like.size(-1);
  const int64_t outer = like.numel() == 0 ? 0 : like.numel() / (inner * dim);
  return rows_contiguous(torch::stable::reshape(t, {outer, inner, dim}));
}
OptionalTensor as_rows(const OptionalTensor& t, const Tensor& like) {
  return t ? OptionalTensor(as_rows(*t, like)) : std::nullopt;
}

// Rows of one partial sum of dweight: at most 64 partial sums, of at least 16 rows.
int64_t rows_per_block(int64_t rows) { return rows <= 1024 ? 16 : (rows + 63) / 64; }

template <Twin twin>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptionalTensor& z,
                                           const OptionalTensor& residual, double eps, int64_t group_size,
                                           bool norm_before_gate) {
  const Tensor x3 = as_rows(x, x), w = as_float32(weight);
  const OptionalTensor z3 = as_rows(z, x), residual3 = as_rows(residual, x);
  const int64_t inner = x3.size(1), rows = x3.size(0) * inner, dim = x3.size(2);
  const Tensor y = new_tensor_like(x, x.scalar_type()), y3 = as_rows(y, x);
  const Tensor sum = residual ? new_tensor_like(x, ScalarType::Float) : absent(x);
  const Tensor rstd = new_tensor(x, {rows, dim / group_size}, ScalarType::Float);
  const RmsNormGated args{rows, inner, dim, group_size, float(eps), norm_before_gate, view(x3), view(z3), view(residual3),
                          floats(w), view(y3), residual ? floats(sum) : nullptr, floats(rstd)};
  if constexpr (twin == Twin::cpu) {
    const int64_t grain = 1 + 16384 / dim;   // about 10 us of work
    parallel(rows, grain, [&](int64_t begin, int64_t end) { PYSEQ_DISPATCH(rms_norm_gated)(args, begin, end); });
  } else {
    check_launch("rms_norm_gated", rms_norm_gated_cuda(args, Launch(x).stream));
  }
  return {y, sum, rstd};
}

template <Twin twin>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const OptionalTensor& dsum, const Tensor& s,
                                                    const Tensor& weight, const OptionalTensor& z, const Tensor& rstd,
                                                    const OptionalTensor& x, const OptionalTensor& residual,
                                                    int64_t group_size, bool norm_before_gate) {
  const Tensor dy3 = as_rows(dy, s), s3 = as_rows(s, s), w = as_float32(weight);
  const OptionalTensor dsum3 = as_rows(dsum, s), z3 = as_rows(z, s);
  const int64_t inner = s3.size(1), rows = s3.size(0) * inner, dim = s3.size(2);
  const int64_t block = rows_per_block(rows), blocks = (rows + block - 1) / block;
  const Tensor dx = new_tensor_like(s, (x ? *x : s).scalar_type()), dx3 = as_rows(dx, s);
  const Tensor dz = z ? new_tensor_like(s, z->scalar_type()) : absent(s);
  const Tensor dresidual = residual ? new_tensor_like(s, residual->scalar_type()) : absent(s);
  const Tensor dweight = new_tensor(s, {dim}, ScalarType::Float);
  const Tensor partial = new_tensor(s, {blocks, dim}, ScalarType::Float);
  const RmsNormGatedBackward args{rows, inner, dim, group_size, norm_before_gate, view(dy3), view(s3), view(z3),
                                  view(dsum3), floats(w), floats(rstd), view(dx3),
                                  z ? view(as_rows(dz, s)) : View{}, residual ? view(as_rows(dresidual, s)) : View{},
                                  floats(dweight), floats(partial), block};
  if constexpr (twin == Twin::cpu) {
    parallel(blocks, 1, [&](int64_t begin, int64_t end) { PYSEQ_DISPATCH(rms_norm_gated_backward)(args, begin, end); });
    sum_blocks(args.partial, blocks, dim, args.dweight);
  } else {
    check_launch("rms_norm_gated_backward", rms_norm_gated_backward_cuda(args, Launch(s).stream));
  }
  return {dx, torch::stable::to(dweight, weight.scalar_type()), dz, dresidual};
}

template <Twin twin> void implement(Library& m) {
  m.impl("rms_norm_gated_forward", TORCH_BOX(&forward<twin>));
  m.impl("rms_norm_gated_backward", TORCH_BOX(&backward<twin>));
}

}  // namespace

void cpu(Library& m) { implement<Twin::cpu>(m); }
#ifdef PYSEQ_WITH_CUDA
void cuda(Library& m) { implement<Twin::cuda>(m); }
#endif

}  // namespace pyseq::rms_norm_gated
