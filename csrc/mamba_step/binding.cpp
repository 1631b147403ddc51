#include "cpu/dispatch.h"
#include "mamba_step/kernel.h"
#include "registry.h"
#include "torch_api/stable.h"

namespace pyseq::mamba_step {
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

void on_cpu(MambaStep& s, const Tensor& like) {
  const Tensor u = new_tensor(like, {s.batch, s.dim}, ScalarType::Float);
  const Tensor projected = new_tensor(like, {s.batch, s.outputs()}, ScalarType::Float);
  s.u = floats(u);
  s.projected = floats(projected);
  const int64_t tiles = PYSEQ_DISPATCH(mamba_step_tiles)(s.dim);
  const int64_t fours = (s.outputs() + 3) / 4, rows = (s.batch + 3) / 4;
  // About 20 us of work each.
  const int64_t taps = 1 + 1000 / (s.width * s.batch), outputs = 1 + 100000 / (s.dim * s.batch);
  const int64_t channels = 1 + 600 / (s.states + s.rank / 2 + 4);
  parallel(tiles, taps, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(mamba_step_convolve)(s, b, e); });
  parallel(fours, outputs, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(mamba_step_project)(s, b, e); });
  if (s.normed) parallel(s.batch, 100, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(mamba_step_normalise)(s, b, e); });
  parallel(rows * tiles, channels, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(mamba_step)(s, b, e); });
}

// A template: without CUDA there is nothing to link it with.
template <Twin> void on_cuda(MambaStep& s, const Tensor& like) {
  STD_TORCH_CHECK(s.outputs() <= kMambaWidest, "pyseq.mamba_step: x_proj_weight has ", s.outputs(),
                  " rows, expected at most ", kMambaWidest, " on CUDA");
  const Tensor projected = new_tensor(like, {mamba_chunks(s.dim), s.batch, s.outputs()}, ScalarType::Float);
  s.projected = floats(projected);
  const Launch launch(like);
  check_launch("mamba_step", mamba_step_project_cuda(s, launch.stream));
  check_launch("mamba_step", mamba_step_cuda(s, launch.stream));
}

template <Twin twin>
Tensor step(const Tensor& conv_state, const Tensor& state, const Tensor& x, const Tensor& z, const Tensor& conv_weight,
            const OptionalTensor& conv_bias, const Tensor& x_proj, const Tensor& dt_proj, const Tensor& dt_bias,
            const Tensor& A, const Tensor& D, std::optional<double> rms_eps) {
  STD_TORCH_CHECK(x.dim() == 2 && A.dim() == 2 && conv_weight.dim() == 2 && dt_proj.dim() == 2,
                  "pyseq.mamba_step: x, A, conv_weight and dt_proj_weight have two axes each");
  const int64_t batch = x.size(0), dim = x.size(1), states = A.size(1);
  const int64_t rank = dt_proj.size(1), width = conv_weight.size(1);
  STD_TORCH_CHECK(states > 0 && rank > 0 && width > 0, "pyseq.mamba_step: N, R and W are at least 1");
  expect_sizes("conv_state", conv_state, {batch, dim, width - 1});
  expect_sizes("state", state, {batch, dim, states});
  expect_sizes("z", z, {batch, dim});
  expect_sizes("conv_weight", conv_weight, {dim, width});
  expect_sizes("conv_bias", conv_bias, {dim});
  expect_sizes("x_proj_weight", x_proj, {rank + 2 * states, dim});
  expect_sizes("dt_proj_weight", dt_proj, {dim, rank});
  expect_sizes("dt_bias", dt_bias, {dim});
  expect_sizes("A", A, {dim, states});
  expect_sizes("D", D, {dim});
  const Tensor y = new_tensor_like(x, x.scalar_type());
  if (batch == 0 || dim == 0) return y;
  const Tensor samples = rows_contiguous(conv_state), h = rows_contiguous(state);
  const Tensor x_ = rows_contiguous(x), z_ = rows_contiguous(z);
  const Tensor taps = readable(conv_weight), wide = readable(x_proj), narrow = readable(dt_proj);
  const Tensor bias = readable(dt_bias), A_ = readable(A), skip = readable(D);
  const OptionalTensor conv_bias_ = readable(conv_bias);
  MambaStep s{batch, dim, states, rank, width, rms_eps.has_value(), float(rms_eps.value_or(0.0)),
              view(samples), view(h), view(x_), view(z_), view(y), view(taps), view(conv_bias_), view(wide),
              view(narrow), view(bias), view(A_), view(skip), nullptr, nullptr};
  if constexpr (twin == Twin::cpu) on_cpu(s, x);
  else on_cuda<twin>(s, x);
  write_back(conv_state, samples);
  write_back(state, h);
  return y;
}

}  // namespace

void cpu(Library& m) { m.impl("mamba_step", TORCH_BOX(&step<Twin::cpu>)); }
#ifdef PYSEQ_WITH_CUDA
void cuda(Library& m) { m.impl("mamba_step", TORCH_BOX(&step<Twin::cuda>)); }
#endif

}  // namespace pyseq::mamba_step
