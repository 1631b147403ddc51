#include "causal_conv1d/kernel.h"
#include "cpu/dispatch.h"
#include "registry.h"
#include "torch_api/packing.h"
#include "torch_api/stable.h"

namespace pyseq::causal_conv1d {
namespace {

int64_t blocks_of(const CausalConv1d& c) { return (c.D + kConvChannels - 1) / kConvChannels; }
constexpr int64_t kGrain = 2;   // units of 64 rows x 512 channels, 7 to 20 us each

// What forward and backward have in common, and the tensors it points into.
template <Twin twin> struct Arguments {
  Tensor x, weight;
  OptionalTensor bias, state;
  std::optional<Packing> packed;
  CausalConv1d c;

  Arguments(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, const OptionalTensor& state_,
            const OptionalTensor& cu_seqlens, bool silu)
      : x(rows_contiguous(x_)),
        weight(as_float32(twin == Twin::cpu ? torch::stable::transpose(weight_, 0, 1) : weight_)),
        bias(as_float32(bias_)), state(as_float32(state_)), packed(packing<twin>(cu_seqlens, x_.size(1))) {
    c = CausalConv1d{};
    c.B = x.size(0), c.T = x.size(1), c.D = x.size(2), c.W = weight_.size(1);
    c.S = packed ? packed->sequences() : c.B;
    c.cu_seqlens = packed ? packed->boundaries() : nullptr;
    c.sequence_of = packed ? packed->owners() : nullptr;
    c.silu = silu;
    c.x = view(x);
    c.weight = floats(weight);
    c.bias = floats(bias);
    c.state = floats(state);
  }

  // CPU: runs of `rows` of all rows. CUDA: runs of a batch row, shorter than `rows` where there would be too few.
  void set_rows(int64_t rows) {
    if constexpr (twin == Twin::cpu) {
      c.runs = c.B * c.T > rows ? (c.B * c.T + rows - 1) / rows : 1;
    } else {
      while (rows > kLeastRows && c.B * c.T * c.D < rows * kEnough) rows /= 2;
      c.runs = c.B * ((c.T + rows - 1) / rows);
    }
    c.rows = rows;
  }
  bool valid() const { return !packed || packed->valid; }
  Tensor new_state() const { return new_tensor(x, {c.S, c.D, c.W - 1}, ScalarType::Float); }

  static constexpr int64_t kLeastRows = 8;       // the W-1 rows before a run are read twice
  static constexpr int64_t kEnough = 8 << 16;    // channels over all runs: 2^16 threads with 8 each
};

template <Twin twin>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& state, const OptionalTensor& cu_seqlens, bool silu,
                                   bool return_state) {
  Arguments<twin> a(x, weight, bias, state, cu_seqlens, silu);
  a.set_rows(kConvRows);
  const Tensor y = new_tensor_like(x, x.scalar_type());
  const Tensor new_state = return_state ? a.new_state() : absent(x);
  if (!a.valid()) return {torch::stable::fill_(y, NAN), torch::stable::fill_(new_state, NAN)};
  a.c.y = view(y);
  a.c.new_state = return_state ? floats(new_state) : nullptr;
  if constexpr (twin == Twin::cpu) {
    parallel(a.c.runs * blocks_of(a.c), kGrain, [&](int64_t begin, int64_t end) {
      PYSEQ_DISPATCH(causal_conv1d_forward)(a.c, begin, end);
    });
  } else {
    check_launch("causal_conv1d", causal_conv1d_forward_cuda(a.c, Launch(x).stream));
  }
  return {y, new_state};
}

void run_backward(const CausalConv1dBackward& g) {
  const CausalConv1d& c = g.forward;
  const int64_t units = c.runs * blocks_of(c);
  if (g.e) {
    parallel(units, 1, [&](int64_t i, int64_t end) { PYSEQ_DISPATCH(causal_conv1d_backward_e)(g, i, end); });
    parallel(units, 1, [&](int64_t i, int64_t end) { PYSEQ_DISPATCH(causal_conv1d_backward_wide)(g, i, end); });
  } else {
    parallel(units, 1, [&](int64_t i, int64_t end) { PYSEQ_DISPATCH(causal_conv1d_backward)(g, i, end); });
  }
  parallel(blocks_of(c), 1, [&](int64_t i, int64_t end) { PYSEQ_DISPATCH(causal_conv1d_backward_sum)(g, i, end); });
}

// Rows of one partial sum of dweight. CPU: at most 64 partial sums, of whole units.
template <Twin twin> int64_t rows_per_sum(int64_t rows) {
  return twin == Twin::cpu ? (rows / 64 + kConvRows) / kConvRows * kConvRows : 128;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <Twin twin>
Gradients backward(const Tensor& dy_, const OptionalTensor& dnew_state_, const Tensor& x, const Tensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& state, const OptionalTensor& cu_seqlens,
                   bool silu) {
  Arguments<twin> a(x, weight, bias, state, cu_seqlens, silu);
  const CausalConv1d& c = a.c;
  a.set_rows(rows_per_sum<twin>(c.B * c.T));
  const Tensor dy = rows_contiguous(dy_), dx = new_tensor_like(x, x.scalar_type());
  const OptionalTensor dnew_state = as_float32(dnew_state_);
  const Tensor dweight = new_tensor(x, {c.D, c.W}, ScalarType::Float);
  const Tensor dbias = bias ? new_tensor(x, {c.D}, ScalarType::Float) : absent(x);
  const Tensor dstate = state ? a.new_state() : absent(x);
  if (a.valid()) {
    const Tensor partial = new_tensor(x, {c.runs, c.W + 1, c.D}, ScalarType::Float);
    CausalConv1dBackward g{c, view(dy), view(dx), floats(dnew_state), state ? floats(dstate) : nullptr, nullptr,
                           floats(partial), floats(dweight), bias ? floats(dbias) : nullptr};
    bool wide = c.W > 4;
    if constexpr (twin == Twin::cuda) wide = causal_conv1d_backward_is_wide(g);
    // Never empty: g.e, null or not, is what tells the two forms apart.
    const Tensor e = wide ? new_tensor(x, {c.B * c.T + 1, c.D}, ScalarType::Float) : absent(x);
    g.e = wide ? floats(e) : nullptr;
    if constexpr (twin == Twin::cpu) run_backward(g);
    else check_launch("causal_conv1d_backward", causal_conv1d_backward_cuda(g, Launch(x).stream));
  } else {
    for (const Tensor& t : {dx, dweight, dbias, dstate}) torch::stable::fill_(t, NAN);
  }
  return {dx, cast(dweight, weight.scalar_type()), bias ? cast(dbias, bias->scalar_type()) : dbias,
          state ? cast(dstate, state->scalar_type()) : dstate};
}

template <Twin twin>
Tensor step(const Tensor& state_, const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, bool silu) {
  STD_TORCH_CHECK(x_.dim() == 2 && weight_.dim() == 2, "x is not [B, D] or weight is not [D, W]");
  expect_sizes("weight", weight_, {x_.size(1), weight_.size(1)});
  expect_sizes("bias", bias_, {x_.size(1)});
  expect_sizes("state", state_, {x_.size(0), x_.size(1), weight_.size(1) - 1});
  const Tensor x = rows_contiguous(x_), weight = as_float32(weight_), state = rows_contiguous(state_);
  const OptionalTensor bias = as_float32(bias_);
  const Tensor y = new_tensor_like(x, x.scalar_type());
  const CausalConv1dStep c{x.size(0), x.size(1), weight.size(1), silu, view(x), view(y), view(state), floats(weight),
                           floats(bias)};
  if constexpr (twin == Twin::cpu) {
    const int64_t grain = 1 + 16384 / (c.D + 1);   // about 20 us of work
    parallel(c.B, grain, [&](int64_t begin, int64_t end) { PYSEQ_DISPATCH(causal_conv1d_step)(c, begin, end); });
  } else {
    check_launch("causal_conv1d_step", causal_conv1d_step_cuda(c, Launch(x).stream));
  }
  if (Tensor given = state_; state.data_ptr() != given.data_ptr()) torch::stable::copy_(given, state);
  return y;
}

template <Twin twin> void implement(Library& m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&forward<twin>));
  m.impl("causal_conv1d_backward", TORCH_BOX(&backward<twin>));
  m.impl("causal_conv1d_step", TORCH_BOX(&step<twin>));
}

}  // namespace

void cpu(Library& m) { implement<Twin::cpu>(m); }
#ifdef PYSEQ_WITH_CUDA
void cuda(Library& m) { implement<Twin::cuda>(m); }
#endif

}  // namespace pyseq::causal_conv1d
