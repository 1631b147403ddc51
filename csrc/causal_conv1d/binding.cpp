#include "causal_conv1d/kernel.h"
#include "cpu/dispatch.h"
#include "torch_api/stable.h"

namespace pyseq::causal_conv1d {
namespace {

int64_t blocks_of(const CausalConv1d& c) { return (c.D + kConvChannels - 1) / kConvChannels; }
constexpr int64_t kGrain = 2;   // units of 64 rows x 512 channels, 7 to 20 us each

// Nobody may have read them yet (torch.compile): what does not rise from 0 to T must not lead a kernel out of bounds.
bool in_order(const int64_t* cu_seqlens, int64_t sequences, int64_t time) {
  bool good = cu_seqlens[0] == 0 && cu_seqlens[sequences] == time;
  for (int64_t s = 0; s < sequences; ++s) good = good && cu_seqlens[s] <= cu_seqlens[s + 1];
  return good;
}

// What forward and backward have in common, and the tensors it points into.
struct Arguments {
  Tensor x, weight;
  OptionalTensor bias, state, cu_seqlens;
  CausalConv1d c;

  Arguments(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, const OptionalTensor& state_,
            const OptionalTensor& cu_seqlens_, bool silu)
      : x(rows_contiguous(x_)), weight(as_float32(torch::stable::transpose(weight_, 0, 1))), bias(as_float32(bias_)),
        state(as_float32(state_)) {
    if (cu_seqlens_) cu_seqlens = torch::stable::contiguous(cast(*cu_seqlens_, ScalarType::Long));
    c = CausalConv1d{};
    c.B = x.size(0), c.T = x.size(1), c.D = x.size(2), c.W = weight.size(0);
    c.S = cu_seqlens ? cu_seqlens->size(0) - 1 : c.B;
    c.cu_seqlens = cu_seqlens ? cu_seqlens->const_data_ptr<int64_t>() : nullptr;
    c.silu = silu;
    c.x = view(x);
    c.weight = floats(weight);
    c.bias = floats(bias);
    c.state = floats(state);
    set_rows(kConvRows);
  }

  void set_rows(int64_t rows) {
    c.rows = rows;
    c.runs = c.B * c.T > rows ? (c.B * c.T + rows - 1) / rows : 1;
  }
  bool in_order() const { return !c.cu_seqlens || causal_conv1d::in_order(c.cu_seqlens, c.S, c.T); }
  Tensor new_state() const { return new_tensor(x, {c.S, c.D, c.W - 1}, ScalarType::Float); }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& state, const OptionalTensor& cu_seqlens, bool silu,
                                   bool return_state) {
  Arguments a(x, weight, bias, state, cu_seqlens, silu);
  const Tensor y = new_tensor_like(x, x.scalar_type());
  const Tensor new_state = return_state ? a.new_state() : absent(x);
  if (!a.in_order()) return {torch::stable::fill_(y, NAN), torch::stable::fill_(new_state, NAN)};
  a.c.y = view(y);
  a.c.new_state = return_state ? floats(new_state) : nullptr;
  parallel(a.c.runs * blocks_of(a.c), kGrain, [&](int64_t begin, int64_t end) {
    PYSEQ_DISPATCH(causal_conv1d_forward)(a.c, begin, end);
  });
  return {y, new_state};
}

// Rows of one partial sum of dweight: at most 64 partial sums, of whole units.
int64_t rows_per_sum(int64_t rows) { return (rows / 64 + kConvRows) / kConvRows * kConvRows; }

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dy_, const OptionalTensor& dnew_state_, const Tensor& x, const Tensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& state, const OptionalTensor& cu_seqlens,
                   bool silu) {
  Arguments a(x, weight, bias, state, cu_seqlens, silu);
  CausalConv1d& c = a.c;
  a.set_rows(rows_per_sum(c.B * c.T));
  const Tensor dy = rows_contiguous(dy_), dx = new_tensor_like(x, x.scalar_type());
  const OptionalTensor dnew_state = as_float32(dnew_state_);
  const Tensor dweight = new_tensor(x, {c.D, c.W}, ScalarType::Float);
  const Tensor dbias = bias ? new_tensor(x, {c.D}, ScalarType::Float) : absent(x);
  const Tensor dstate = state ? a.new_state() : absent(x);
  if (a.in_order()) {
    const bool wide = c.W > 4;
    const Tensor partial = new_tensor(x, {c.runs, c.W + 1, c.D}, ScalarType::Float);
    const Tensor e = wide ? new_tensor(x, {c.B * c.T, c.D}, ScalarType::Float) : absent(x);
    const CausalConv1dBackward g{c, view(dy), view(dx), floats(dnew_state), state ? floats(dstate) : nullptr, floats(e),
                                 floats(partial), floats(dweight), bias ? floats(dbias) : nullptr};
    const int64_t units = c.runs * blocks_of(c);
    if (wide) {
      parallel(units, 1, [&](int64_t i, int64_t end) { PYSEQ_DISPATCH(causal_conv1d_backward_e)(g, i, end); });
      parallel(units, 1, [&](int64_t i, int64_t end) { PYSEQ_DISPATCH(causal_conv1d_backward_wide)(g, i, end); });
    } else {
      parallel(units, 1, [&](int64_t i, int64_t end) { PYSEQ_DISPATCH(causal_conv1d_backward)(g, i, end); });
    }
    parallel(blocks_of(c), 1, [&](int64_t i, int64_t end) { PYSEQ_DISPATCH(causal_conv1d_backward_sum)(g, i, end); });
  } else {
    for (const Tensor& t : {dx, dweight, dbias, dstate}) torch::stable::fill_(t, NAN);
  }
  return {dx, cast(dweight, weight.scalar_type()), bias ? cast(dbias, bias->scalar_type()) : dbias,
          state ? cast(dstate, state->scalar_type()) : dstate};
}

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
  const int64_t grain = 1 + 16384 / (c.D + 1);   // about 20 us of work
  parallel(c.B, grain, [&](int64_t begin, int64_t end) { PYSEQ_DISPATCH(causal_conv1d_step)(c, begin, end); });
  if (Tensor given = state_; state.data_ptr() != given.data_ptr()) torch::stable::copy_(given, state);
  return y;
}

}  // namespace

void cpu(Library& m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&backward));
  m.impl("causal_conv1d_step", TORCH_BOX(&step));
}

}  // namespace pyseq::causal_conv1d
