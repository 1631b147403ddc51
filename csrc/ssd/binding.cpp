#include <cmath>

#include "cpu/dispatch.h"
#include "registry.h"
#include "ssd/arguments.h"
#include "ssd/kernel.h"
#include "torch_api/huge_pages.h"
#include "torch_api/stable.h"

namespace pyseq::ssd {
namespace {

void fill(std::initializer_list<Tensor> tensors, double value) {
  for (Tensor t : tensors) torch::stable::fill_(t, value);
}

int64_t checked(int64_t chunk) {
  STD_TORCH_CHECK(chunk == 0 || (chunk >= 16 && chunk <= 256), "chunk is neither 0 nor from 16 to 256");
  return chunk;
}

float* aligned(const Tensor& memory) {   // to a cache line; `memory` holds 16 floats more than are needed
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(floats(memory)) + 63) / 64 * 64);
}

// Deals units out over the threads, each with a scratch of its own. A thread is woken for 20 us of work: about `cost`
// multiply-adds in that time.
template <class Kernel>
void run(Ssd s, const Tensor& like, int64_t units, int64_t scratch, int64_t cost, Kernel kernel) {
  if (units == 0) return;
  const int64_t work = s.batch * s.time * s.heads * s.width * s.states / cost + 1;
  int64_t lanes = torch::stable::get_num_threads();
  if (lanes > units) lanes = units;
  if (lanes > work) lanes = work;
  scratch = (scratch + 15) / 16 * 16;
  const Tensor memory = new_tensor(like, {lanes * scratch + 16}, ScalarType::Float);
  parallel(lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      Ssd mine = s;
      mine.scratch = aligned(memory) + lane * scratch;
      kernel(mine, units * lane / lanes, units * (lane + 1) / lanes);
    }
  });
}

// The CUDA twin gets one piece of memory, which its launcher divides; it neither allocates nor synchronises.
template <auto launcher> void launch(const char* kernel, Ssd s, const Tensor& like, int64_t workspace) {
  const Launch on(like);
  const Tensor memory = new_tensor(like, {workspace + 16}, ScalarType::Float);
  s.workspace = aligned(memory);
  check_launch(kernel, launcher(s, on.stream));
}

template <Twin twin> void compute(const Ssd& s, const Tensor& like) {
  if constexpr (twin == Twin::cpu) {
    run(s, like, PYSEQ_DISPATCH(ssd_forward_units)(s), PYSEQ_DISPATCH(ssd_forward_scratch)(s), 400000,
        PYSEQ_DISPATCH(ssd_forward));
  } else {
    launch<ssd_forward_cuda>("ssd", s, like, ssd_forward_workspace(s));
  }
}

template <Twin twin>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                   const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                                   const OptionalTensor& state, const OptionalTensor& cu_seqlens, bool dt_softplus,
                                   double dt_low, double dt_high, bool return_state, bool exact, int64_t chunk) {
  Arguments<twin> args(x, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, dt_softplus, dt_low, dt_high);
  Ssd& s = args.s;
  const Tensor y = large_like<twin>(x);
  const std::initializer_list<int64_t> states = {s.sequences, s.heads, s.width, s.states};
  const Tensor last = return_state ? new_tensor(x, states, ScalarType::Float) : absent(x);
  if (args.invalid()) {
    fill({y, last}, std::nan(""));
    return {y, last};
  }
  s.y = view(y);
  s.state_out = return_state ? floats(last) : nullptr;
  s.exact = exact;
  s.chunk = checked(chunk);
  compute<twin>(s, x);
  return {y, last};
}

void backward_on_cpu(Ssd& s, const Tensor& like) {
  const Tensor sums = new_tensor(like, {PYSEQ_DISPATCH(ssd_backward_workspace)(s) + 16}, ScalarType::Float);
  s.workspace = aligned(sums);
  run(s, like, PYSEQ_DISPATCH(ssd_backward_units)(s), PYSEQ_DISPATCH(ssd_backward_scratch)(s), 150000,
      PYSEQ_DISPATCH(ssd_backward));
  const int64_t grain = 1 + 40000 / (s.groups * s.states + 1);
  parallel(s.batch * s.time, grain, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(ssd_reduce_tokens)(s, b, e); });
  parallel(s.heads, 64, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(ssd_reduce_heads)(s, b, e); });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <Twin twin>
Gradients backward(const OptionalTensor& dy, const OptionalTensor& dlast, const Tensor& x, const Tensor& dt,
                   const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                   const OptionalTensor& dt_bias, const OptionalTensor& state, const OptionalTensor& cu_seqlens,
                   bool dt_softplus, double dt_low, double dt_high, int64_t chunk) {
  Arguments<twin> args(x, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, dt_softplus, dt_low, dt_high);
  Ssd& s = args.s;
  const auto like = [](const Tensor& t) { return new_tensor_like(t, t.scalar_type()); };
  const auto sum_for = [&](const OptionalTensor& t) { return t ? new_tensor_like(*t, ScalarType::Float) : absent(x); };
  const Tensor dx = large_like<twin>(x), ddt = like(dt), dB = like(B), dC = like(C);
  const Tensor dz = z ? large_like<twin>(*z) : absent(x);
  const Tensor dA = sum_for(A), dD = sum_for(D), dbias = sum_for(dt_bias), dstate = sum_for(state);
  const auto result = [&]() -> Gradients {
    const auto as = [](const Tensor& t, const OptionalTensor& like) { return like ? cast(t, like->scalar_type()) : t; };
    return {dx, ddt, as(dA, A), dB, dC, as(dD, D), dz, as(dbias, dt_bias), as(dstate, state)};
  };
  if (args.invalid()) {
    fill({dx, ddt, dA, dB, dC, dD, dz, dbias, dstate}, std::nan(""));
    return result();
  }
  if (s.heads == 0) {   // sums over no head
    fill({dB, dC}, 0);
    return result();
  }
  s.chunk = checked(chunk);
  Tensor ungated = absent(x);   // the gate's gradient needs what it multiplied: computed again, in float32
  if (z) {
    ungated = in_huge_pages<twin>(new_tensor_like(x, ScalarType::Float));
    Ssd before = s;
    before.dot = false;
    before.z = View{};
    before.y = view(ungated);
    compute<twin>(before, x);
    s.ungated = view(ungated);
  }
  expect_sizes("dy", dy, {s.batch, s.time, s.heads, s.width});
  expect_sizes("dlast", dlast, {s.sequences, s.heads, s.width, s.states});
  const OptionalTensor dy_rows = rows_contiguous(dy), dlast_f = as_float32(dlast);
  s.dy = view(dy_rows);
  s.dstate_out = floats(dlast_f);
  s.dx = view(dx);
  s.ddt = view(ddt);
  s.dz = z ? view(dz) : View{};
  s.dB = view(dB);
  s.dC = view(dC);
  s.dstate = state ? floats(dstate) : nullptr;
  s.dA = floats(dA);
  s.dD = D ? floats(dD) : nullptr;
  s.dbias = dt_bias ? floats(dbias) : nullptr;
  if constexpr (twin == Twin::cpu) {
    backward_on_cpu(s, x);
  } else {
    launch<ssd_backward_cuda>("ssd_backward", s, x, ssd_backward_workspace(s));
  }
  return result();
}

template <Twin twin>
Tensor step(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
            const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias, bool dt_softplus,
            double dt_low, double dt_high) {
  STD_TORCH_CHECK(x.dim() == 3 && B.dim() == 3, "x is not [B, H, P] or B is not [B, G, N]");
  const int64_t batch = x.size(0), heads = x.size(1), width = x.size(2), groups = B.size(1), states = B.size(2);
  const bool per_channel = D && D->dim() == 2;
  const std::initializer_list<int64_t> rows = {batch, heads, width}, one = {heads}, all = {heads, width};
  expect_sizes("state", state, {batch, heads, width, states});
  expect_sizes("dt", dt, {batch, heads});
  expect_sizes("A", A, one);
  expect_sizes("B", B, {batch, groups, states});
  expect_sizes("C", C, {batch, groups, states});
  expect_sizes("D", D, per_channel ? all : one);
  expect_sizes("z", z, rows);
  expect_sizes("dt_bias", dt_bias, one);
  STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "the groups of B do not divide the heads");
  Tensor S = rows_contiguous(state);
  const Tensor x_rows = rows_contiguous(x), dt_rows = rows_contiguous(dt);
  const Tensor B_rows = rows_contiguous(B), C_rows = rows_contiguous(C);
  const Tensor A_f = as_float32(A), y = new_tensor_like(x, x.scalar_type());
  const OptionalTensor D_f = as_float32(D), z_rows = rows_contiguous(z), bias_f = as_float32(dt_bias);
  const SsdStep s{batch,         heads,        width,        states,       groups,        view(S),
                  view(x_rows),  view(z_rows), view(y),      view(dt_rows), view(B_rows), view(C_rows),
                  floats(A_f),   floats(D_f),  floats(bias_f), per_channel ? width : 1, dt_softplus,
                  float(dt_low), float(dt_high)};
  if constexpr (twin == Twin::cpu) {
    const int64_t grain = 1 + 100000 / (width * states + 1);   // about 20 us
    parallel(batch * heads, grain, [&](int64_t begin, int64_t end) { PYSEQ_DISPATCH(ssd_step)(s, begin, end); });
  } else {
    check_launch("ssd_step", ssd_step_cuda(s, Launch(x).stream));
  }
  if (S.data_ptr() != state.data_ptr()) {   // the last axis was not contiguous, and a copy was updated
    Tensor to = state;
    torch::stable::copy_(to, S);
  }
  return y;
}

template <Twin twin> void implement(Library& m) {
  m.impl("ssd_forward", TORCH_BOX(&forward<twin>));
  m.impl("ssd_backward", TORCH_BOX(&backward<twin>));
  m.impl("ssd_step", TORCH_BOX(&step<twin>));
}

}  // namespace

void cpu(Library& m) { implement<Twin::cpu>(m); }
#ifdef PYSEQ_WITH_CUDA
void cuda(Library& m) { implement<Twin::cuda>(m); }
#endif

}  // namespace pyseq::ssd
