#include "cpu/dispatch.h"
#include "cpu/reduce.h"
#include "registry.h"
#include "rms_norm_gated/kernel.h"
#include "torch_api/stable.h"

namespace pyseq::rms_norm_gated {
namespace {

// [..., D] as [O, I, D]: strides for up to three axes, whatever they are; for more, a view where torch can make one.
struct Rows {
  Tensor tensor;
  View view;
  int64_t outer = 1, inner = 1, dim = 0;

  explicit Rows(const Tensor& t) : tensor(rows_contiguous(t)), dim(t.size(-1)) {
    if (t.dim() > 3) {
      const int64_t last = t.size(-2) * dim;
      tensor = rows_contiguous(torch::stable::reshape(tensor, {last ? t.numel() / last : 0, t.size(-2), dim}));
    }
    const int64_t axes = tensor.dim();
    view = pyseq::view(tensor);
    view.stride[1] = axes >= 2 ? tensor.stride(axes - 2) : 0;
    view.stride[0] = axes == 3 ? tensor.stride(0) : 0;
    outer = axes == 3 ? tensor.size(0) : 1;
    inner = axes >= 2 ? tensor.size(axes - 2) : 1;
  }
};

std::optional<Rows> rows_of(const OptionalTensor& t) { return t ? std::optional<Rows>(Rows(*t)) : std::nullopt; }
View view_of(const std::optional<Rows>& rows) { return rows ? rows->view : View{}; }

// Rows of one partial sum of dweight. CPU: at most 64 partial sums, of at least 16 rows. CUDA: at least 4 rows.
template <Twin twin> int64_t rows_per_block(int64_t rows, int64_t dim, int64_t group) {
  if constexpr (twin == Twin::cpu) return rows <= 1024 ? 16 : (rows + 63) / 64;
  else return rms_norm_gated_rows_per_block(rows, dim, group);
}

template <Twin twin> void check_groups(int64_t groups) {
  STD_TORCH_CHECK(twin == Twin::cpu || groups <= kRmsNormMostGroups, "rms_norm_gated on CUDA takes up to ",
                  kRmsNormMostGroups, " groups, not ", groups);
}

template <Twin twin>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptionalTensor& z,
                                           const OptionalTensor& residual, double eps, int64_t group_size,
                                           bool norm_before_gate) {
  const Rows in(x);
  const std::optional<Rows> gate = rows_of(z), added = rows_of(residual);
  const Tensor w = as_float32(weight);
  const int64_t rows = in.outer * in.inner, dim = in.dim;
  check_groups<twin>(rows * (dim / group_size));
  const Tensor y = new_tensor_like(x, x.scalar_type());
  const Tensor sum = residual ? new_tensor_like(x, ScalarType::Float) : absent(x);
  const Tensor rstd = new_tensor(x, {rows, dim / group_size}, ScalarType::Float);
  const RmsNormGated args{rows, in.inner, dim, group_size, float(eps), norm_before_gate, in.view, view_of(gate),
                          view_of(added), floats(w), Rows(y).view, residual ? floats(sum) : nullptr, floats(rstd)};
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
  const Rows in(s), arriving(dy);
  const std::optional<Rows> gate = rows_of(z), arriving_sum = rows_of(dsum);
  const Tensor w = as_float32(weight);
  const int64_t rows = in.outer * in.inner, dim = in.dim;
  check_groups<twin>(rows * (dim / group_size));
  const int64_t block = rows_per_block<twin>(rows, dim, group_size), blocks = (rows + block - 1) / block;
  const Tensor dx = new_tensor_like(s, (x ? *x : s).scalar_type());
  const Tensor dz = z ? new_tensor_like(s, z->scalar_type()) : absent(s);
  const Tensor dresidual = residual ? new_tensor_like(s, residual->scalar_type()) : absent(s);
  const Tensor dweight = new_tensor(s, {dim}, ScalarType::Float);
  const Tensor partial = new_tensor(s, {blocks, dim}, ScalarType::Float);
  const RmsNormGatedBackward args{rows, in.inner, dim, group_size, norm_before_gate, arriving.view, in.view,
                                  view_of(gate), view_of(arriving_sum), floats(w), floats(rstd), Rows(dx).view,
                                  z ? Rows(dz).view : View{}, residual ? Rows(dresidual).view : View{},
                                  floats(dweight), floats(partial), block};
  if constexpr (twin == Twin::cpu) {
    parallel(blocks, 1, [&](int64_t begin, int64_t end) { PYSEQ_DISPATCH(rms_norm_gated_backward)(args, begin, end); });
    sum_blocks(args.partial, blocks, dim, args.dweight);
  } else {
    check_launch("rms_norm_gated_backward", rms_norm_gated_backward_cuda(args, Launch(s).stream));
  }
  return {dx, cast(dweight, weight.scalar_type()), dz, dresidual};
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
