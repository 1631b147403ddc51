#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/reduce.h"
#include "ema/kernel.h"
#include "registry.h"
#include "torch_api/huge_pages.h"
#include "torch_api/packing.h"
#include "torch_api/stable.h"

namespace pyseq::ema {
namespace {

void fill(std::initializer_list<Tensor> tensors, double value) {
  for (Tensor t : tensors) torch::stable::fill_(t, value);
}

// A thread is woken for 20 us of work: so many blocks of a row.
int64_t grain(const Ema& s) { return 1 + 2000 / (s.time + 1); }

// What forward and backward share. The tensors that back the struct live as long as this.
template <Twin twin> struct Arguments {
  Tensor x, p;
  OptionalTensor state;
  std::optional<Packing> packed;
  Ema s{};

  Arguments(const Tensor& x_, const Tensor& p_, const OptionalTensor& state_, const OptionalTensor& cu_seqlens)
      : x(rows_contiguous(x_)), p(rows_contiguous(p_)), state(as_float32(state_)),
        packed(packing<twin>(cu_seqlens, x_.size(1))) {
    s.batch = x.size(0);
    s.time = x.size(1);
    s.dim = x.size(2);
    s.x = view(x);
    s.p = view(p);
    s.sequences = packed ? packed->sequences() : s.batch;
    s.cu_seqlens = packed ? packed->boundaries() : nullptr;
    s.sequence_of = packed ? packed->owners() : nullptr;
    s.state = floats(state);
  }

  bool invalid() const { return packed && !packed->valid; }   // known on a CPU only
};

template <Twin twin>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& p, const OptionalTensor& state,
                                           const OptionalTensor& cu_seqlens, bool return_state, bool keep) {
  Arguments<twin> args(x, p, state, cu_seqlens);
  Ema& s = args.s;
  const Tensor y = large_like<twin>(x);
  const Tensor last = return_state ? new_tensor(x, {s.sequences, s.dim}, ScalarType::Float) : absent(x);
  const std::initializer_list<int64_t> chunks = {s.batch, ema_chunks(s.time), s.dim};
  const Tensor kept = keep ? in_huge_pages<twin>(new_tensor(x, chunks, ScalarType::Float)) : absent(x);
  if (args.invalid()) {
    fill({y, last, kept}, std::nan(""));
    return {y, last, kept};
  }
  s.y = view(y);
  s.state_out = return_state ? floats(last) : nullptr;
  s.kept = keep ? floats(kept) : nullptr;
  if constexpr (twin == Twin::cpu) {
    parallel(s.batch * ema_blocks(s.dim), grain(s), [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(ema_forward)(s, b, e); });
  } else {
    check_launch("ema", ema_forward_cuda(s, Launch(x).stream));
  }
  return {y, last, kept};
}

// dp of each row is the sum of what its blocks found, in their order.
Tensor backward_on_cpu(const EmaBackward& b, const Tensor& p) {
  const Ema& s = b.forward;
  const int64_t blocks = ema_blocks(s.dim);
  parallel(s.batch * blocks, grain(s), [&](int64_t i, int64_t e) { PYSEQ_DISPATCH(ema_backward)(b, i, e); });
  const Tensor dp = new_tensor_like(p, ScalarType::Float);
  for (int64_t row = 0; row < s.batch; ++row) {
    sum_blocks(b.partial + row * blocks * s.time, blocks, s.time, floats(dp) + row * s.time);
  }
  return cast(dp, p.scalar_type());
}

template <Twin twin>
std::tuple<Tensor, Tensor, Tensor> backward(const OptionalTensor& dy, const OptionalTensor& dlast, const Tensor& x,
                                            const Tensor& p, const OptionalTensor& state, const OptionalTensor& cu_seqlens,
                                            const Tensor& kept) {
  Arguments<twin> args(x, p, state, cu_seqlens);
  Ema& s = args.s;
  const Tensor dx = large_like<twin>(x), dstate = state ? new_tensor_like(*state, ScalarType::Float) : absent(x);
  Tensor dp = new_tensor_like(p, p.scalar_type());
  if (args.invalid()) {
    fill({dx, dp, dstate}, std::nan(""));
    return {dx, dp, dstate};
  }
  if (twin == Twin::cuda && s.time == 0) {   // without a token there is no address to begin at
    if (Tensor to = dstate; state && dlast) torch::stable::copy_(to, *dlast);
    if (state && !dlast) fill({dstate}, 0);
    return {dx, dp, dstate};
  }
  STD_TORCH_CHECK(kept.numel() == s.batch * ema_chunks(s.time) * s.dim, "ema_backward: the forward ran with keep = false");
  OptionalTensor dy_rows = rows_contiguous(dy);
  const OptionalTensor dlast_f = as_float32(dlast);
  if (twin == Twin::cuda && !dy_rows) {   // its kernel reads dy without asking; that only the state has a gradient is rare
    dy_rows = new_tensor_like(x, x.scalar_type());
    fill({*dy_rows}, 0);
  }
  const int64_t blocks = twin == Twin::cpu ? ema_blocks(s.dim) : ema_tiles(s.dim);
  const Tensor partial = new_tensor(x, {s.batch, blocks, s.time}, ScalarType::Float);
  s.kept = floats(kept);
  const EmaBackward b{s, view(dy_rows), view(dx), view(dp), floats(dlast_f), state ? floats(dstate) : nullptr,
                      floats(partial)};
  if constexpr (twin == Twin::cpu) {
    dp = backward_on_cpu(b, p);
  } else {
    check_launch("ema_backward", ema_backward_cuda(b, Launch(x).stream));
  }
  return {dx, dp, dstate};
}

template <Twin twin> Tensor step(const Tensor& state, const Tensor& x, const Tensor& p) {
  STD_TORCH_CHECK(x.dim() == 2, "x is not [B, D]");
  expect_sizes("state", state, {x.size(0), x.size(1)});
  expect_sizes("p", p, {x.size(0)});
  const Tensor held = rows_contiguous(state), x_rows = rows_contiguous(x), y = new_tensor_like(x, x.scalar_type());
  const View weights{p.mutable_data_ptr(), dtype_of(p), {p.stride(0)}};
  const EmaStep s{x.size(0), x.size(1), view(held), view(x_rows), view(y), weights};
  if constexpr (twin == Twin::cpu) {
    parallel(s.batch, 1 + 65536 / (s.dim + 1), [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(ema_step)(s, b, e); });
  } else {
    check_launch("ema_step", ema_step_cuda(s, Launch(x).stream));
  }
  if (Tensor to = state; held.data_ptr() != to.data_ptr()) torch::stable::copy_(to, held);   // a copy was updated
  return y;
}

template <Twin twin> void implement(Library& m) {
  m.impl("ema_forward", TORCH_BOX(&forward<twin>));
  m.impl("ema_backward", TORCH_BOX(&backward<twin>));
  m.impl("ema_step", TORCH_BOX(&step<twin>));
}

}  // namespace

void cpu(Library& m) { implement<Twin::cpu>(m); }
#ifdef PYSEQ_WITH_CUDA
void cuda(Library& m) { implement<Twin::cuda>(m); }
#endif

}  // namespace pyseq::ema
