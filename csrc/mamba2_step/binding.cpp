#include "cpu/dispatch.h"
#include "mamba2_step/kernel.h"
#include "registry.h"
#include "torch_api/stable.h"

namespace pyseq::mamba2_step {
namespace {

// In the dtype it has, so that no step copies a weight; only float64, which the kernels do not read, is cast.
Tensor readable(const Tensor& t) {
  return rows_contiguous(t.scalar_type() == ScalarType::Double ? cast(t, ScalarType::Float) : t);
}
OptionalTensor readable(const OptionalTensor& t) { return t ? OptionalTensor(readable(*t)) : std::nullopt; }

void write_back(const Tensor& to, const Tensor& from) {   // where the last axis was not contiguous, a copy was updated
  if (from.data_ptr() == to.data_ptr()) return;
  Tensor target = to;
  torch::stable::copy_(target, from);
}

void on_cpu(Mamba2Step& s, const Tensor& like) {
  const Tensor convolved = new_tensor(like, {s.batch, s.channels()}, ScalarType::Float);
  const Tensor v = new_tensor(like, {s.batch, s.dim()}, ScalarType::Float);
  s.convolved = floats(convolved);
  s.v = floats(v);
  const int64_t units = s.batch * PYSEQ_DISPATCH(mamba2_step_tiles)(s.channels());
  // About 20 us of work each.
  parallel(units, 200, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(mamba2_step_convolve)(s, b, e); });
  const int64_t heads = 1 + 100000 / (s.width * s.states + 1);
  parallel(s.batch * s.heads, heads, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(mamba2_step)(s, b, e); });
  const int64_t rows = 1 + 40000 / (s.dim() + 1);
  if (s.norm_group) parallel(s.batch, rows, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(mamba2_step_finish)(s, b, e); });
}

// A template: without CUDA there is nothing to link it with.
template <Twin> void on_cuda(Mamba2Step& s, const Tensor& like) {
  STD_TORCH_CHECK(s.states <= kMamba2Most, "pyseq.mamba2_step: state has N = ", s.states, ", expected at most ", kMamba2Most,
                  " on CUDA");
  const Tensor v = s.norm_group ? new_tensor(like, {s.batch, s.dim()}, ScalarType::Float) : absent(like);
  s.v = floats(v);
  const Launch launch(like);
  check_launch("mamba2_step", mamba2_step_cuda(s, launch.stream));
  check_launch("mamba2_step", mamba2_step_finish_cuda(s, launch.stream));
}

template <Twin twin>
Tensor step(const Tensor& conv_state, const Tensor& state, const OptionalTensor& z, const Tensor& xBC, const Tensor& dt,
            const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& A, const Tensor& D, const Tensor& dt_bias,
            const OptionalTensor& norm_weight, double dt_low, double dt_high, double eps, int64_t group_size,
            bool norm_before_gate) {
  STD_TORCH_CHECK(state.dim() == 4 && xBC.dim() == 2 && conv_weight.dim() == 2,
                  "pyseq.mamba2_step: state has four axes, xBC and conv_weight two each");
  Mamba2Step s{};
  s.batch = state.size(0), s.heads = state.size(1), s.width = state.size(2), s.states = state.size(3);
  s.taps = conv_weight.size(1);
  STD_TORCH_CHECK(s.states > 0 && s.heads > 0 && s.width > 0 && s.taps > 0, "pyseq.mamba2_step: H, P, N and W are at least 1");
  s.groups = (xBC.size(1) - s.dim()) / (2 * s.states);
  STD_TORCH_CHECK(s.groups > 0 && s.heads % s.groups == 0, "pyseq.mamba2_step: G is no divisor of H");
  const std::initializer_list<int64_t> per_head = {s.heads}, per_channel = {s.heads, s.width};
  s.skip_wide = D.dim() == 2;
  expect_sizes("conv_state", conv_state, {s.batch, s.channels(), s.taps - 1});
  expect_sizes("z", z, {s.batch, s.dim()});
  expect_sizes("xBC", xBC, {s.batch, s.channels()});
  expect_sizes("dt", dt, {s.batch, s.heads});
  expect_sizes("conv_weight", conv_weight, {s.channels(), s.taps});
  expect_sizes("conv_bias", conv_bias, {s.channels()});
  expect_sizes("A", A, per_head);
  expect_sizes("D", D, s.skip_wide ? per_channel : per_head);
  expect_sizes("dt_bias", dt_bias, per_head);
  expect_sizes("norm_weight", norm_weight, {s.dim()});
  STD_TORCH_CHECK(group_size > 0 && s.dim() % group_size == 0, "pyseq.mamba2_step: group_size is no divisor of H P");
  const Tensor y = new_tensor(xBC, {s.batch, s.dim()}, xBC.scalar_type());
  if (s.batch == 0) return y;
  const Tensor samples = rows_contiguous(conv_state), h = rows_contiguous(state), data = rows_contiguous(xBC);
  const Tensor steps = rows_contiguous(dt), taps = readable(conv_weight), decays = readable(A), skip = readable(D);
  const Tensor bias = readable(dt_bias);
  const OptionalTensor gate = rows_contiguous(z), conv_bias_ = readable(conv_bias), weight = readable(norm_weight);
  s.dt_low = float(dt_low), s.dt_high = float(dt_high), s.eps = float(eps);
  s.norm_group = norm_weight ? group_size : 0;
  s.norm_before_gate = norm_before_gate;
  s.conv_state = view(samples), s.state = view(h), s.xBC = view(data), s.z = view(gate), s.dt = view(steps), s.y = view(y);
  s.conv_weight = view(taps), s.conv_bias = view(conv_bias_), s.A = view(decays), s.skip = view(skip);
  s.dt_bias = view(bias), s.norm_weight = view(weight);
  if constexpr (twin == Twin::cpu) on_cpu(s, xBC);
  else on_cuda<twin>(s, xBC);
  write_back(conv_state, samples);
  write_back(state, h);
  return y;
}

}  // namespace

void cpu(Library& m) { m.impl("mamba2_step", TORCH_BOX(&step<Twin::cpu>)); }
#ifdef PYSEQ_WITH_CUDA
void cuda(Library& m) { m.impl("mamba2_step", TORCH_BOX(&step<Twin::cuda>)); }
#endif

}  // namespace pyseq::mamba2_step
