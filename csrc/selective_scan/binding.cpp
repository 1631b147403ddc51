#include <cmath>

#include "cpu/dispatch.h"
#include "registry.h"
#include "selective_scan/arguments.h"
#include "selective_scan/kernel.h"
#include "torch_api/huge_pages.h"
#include "torch_api/stable.h"

namespace pyseq::selective_scan {
namespace {

void fill_nan(std::initializer_list<Tensor> tensors) {
  for (Tensor t : tensors) torch::stable::fill_(t, std::nan(""));
}

// Deals units out over the threads, each with a scratch of its own. A thread is woken for 20 us of work: about `cost` states
// advance in that time.
template <class Kernel>
void run(SelectiveScan s, const Tensor& like, int64_t units, int64_t scratch, int64_t cost, Kernel kernel) {
  if (units == 0) return;
  const int64_t work = s.batch * s.time * s.dim * (padded(s.states) + 4) / cost + 1;
  int64_t lanes = torch::stable::get_num_threads();
  if (lanes > units) lanes = units;
  if (lanes > work) lanes = work;
  scratch = (scratch + 15) / 16 * 16;
  const Tensor memory = new_tensor(like, {lanes * scratch + 16}, ScalarType::Float);
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(floats(memory)) + 63) / 64 * 64;
  parallel(lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      SelectiveScan mine = s;
      mine.scratch = reinterpret_cast<float*>(aligned) + lane * scratch;
      kernel(mine, units * lane / lanes, units * (lane + 1) / lanes);
    }
  });
}

// The CUDA twin gets one piece of memory, which its launcher divides; it neither allocates nor synchronises.
template <auto launcher> void launch(const char* kernel, SelectiveScan s, const Tensor& like, int64_t workspace) {
  const Launch on(like);
  const Tensor memory = new_tensor(like, {workspace}, ScalarType::Float);
  s.workspace = floats(memory);
  check_launch(kernel, launcher(s, on.stream));
}

template <Twin twin>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                           const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                                           const OptionalTensor& state, const OptionalTensor& cu_seqlens, bool dt_softplus,
                                           bool return_state, bool keep) {
  Arguments<twin> args(u, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, dt_softplus);
  SelectiveScan& s = args.s;
  const auto states = [&](int64_t rows) { return new_tensor(u, {rows, s.dim, s.states}, ScalarType::Float); };
  const Tensor y = large_like<twin>(u);
  const Tensor last = return_state ? states(s.sequences) : absent(u);
  const std::initializer_list<int64_t> all = {s.batch, checkpoints(s.time), s.dim, s.states};
  const Tensor kept = keep ? in_huge_pages<twin>(new_tensor(u, all, ScalarType::Float)) : absent(u);
  if (args.invalid()) {
    fill_nan({y, last, kept});
    return {y, last, kept};
  }
  s.y = view(y);
  s.state_out = return_state ? floats(last) : nullptr;
  s.checkpoints = keep ? floats(kept) : nullptr;
  if constexpr (twin == Twin::cpu) {
    const int64_t units = s.batch * PYSEQ_DISPATCH(selective_scan_tiles)(s.dim, s.groups);
    run(s, u, units, forward_scratch(s), 80000, PYSEQ_DISPATCH(selective_scan_forward));
  } else {
    launch<selective_scan_forward_cuda>("selective_scan", s, u, selective_scan_forward_workspace(s));
  }
  return {y, last, kept};
}

void backward_on_cpu(SelectiveScan& s, const Tensor& u, const Tensor& dA, const Tensor& dD, const Tensor& dbias) {
  // One row needs no sum over rows: it is written where the sum would go.
  const bool rows = s.batch != 1;
  const auto row_sums = [&](const Tensor& t) { return rows ? new_tensor(u, {s.batch, t.numel()}, ScalarType::Float) : t; };
  const Tensor dA_rows = row_sums(dA), dD_rows = row_sums(dD), dbias_rows = row_sums(dbias);
  const int64_t sums = s.batch * s.groups * blocks(s) * s.time * 2 * padded(s.states);
  const Tensor shared = in_huge_pages<Twin::cpu>(new_tensor(u, {sums}, ScalarType::Float));
  s.dA_rows = floats(dA_rows);
  s.dD_rows = s.D ? floats(dD_rows) : nullptr;
  s.dbias_rows = s.dt_bias ? floats(dbias_rows) : nullptr;
  s.dBC_blocks = floats(shared);
  run(s, u, s.batch * s.groups * blocks(s), backward_scratch(s), 30000, PYSEQ_DISPATCH(selective_scan_backward));
  const int64_t grain = 1 + 40000 / (blocks(s) * s.groups * s.states + 1);
  parallel(s.batch * s.time, grain, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(selective_scan_reduce_tokens)(s, b, e); });
  if (rows) {
    const int64_t channels = 1 + 40000 / (s.batch * s.states + 1);
    parallel(s.dim, channels, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(selective_scan_reduce_channels)(s, b, e); });
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <Twin twin>
Gradients backward(const OptionalTensor& dy, const OptionalTensor& dlast, const Tensor& u, const Tensor& dt, const Tensor& A,
                   const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                   const OptionalTensor& dt_bias, const OptionalTensor& state, const OptionalTensor& cu_seqlens,
                   const Tensor& kept, bool dt_softplus) {
  Arguments<twin> args(u, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, dt_softplus);
  SelectiveScan& s = args.s;
  const auto sum_for = [&](const OptionalTensor& t) { return t ? new_tensor_like(*t, ScalarType::Float) : absent(u); };
  const Tensor du = large_like<twin>(u), ddt = large_like<twin>(dt), dB = large_like<twin>(B), dC = large_like<twin>(C);
  const Tensor dz = z ? large_like<twin>(*z) : absent(u);
  const Tensor dA = sum_for(A), dD = sum_for(D), dbias = sum_for(dt_bias), dstate = sum_for(state);
  const auto result = [&]() -> Gradients {
    const auto as = [](const Tensor& t, const OptionalTensor& like) { return like ? cast(t, like->scalar_type()) : t; };
    return {du, ddt, as(dA, A), dB, dC, as(dD, D), dz, as(dbias, dt_bias), dstate};
  };
  if (args.invalid()) {
    fill_nan({du, ddt, dA, dB, dC, dD, dz, dbias, dstate});
    return result();
  }
  STD_TORCH_CHECK(kept.numel() == s.batch * checkpoints(s.time) * s.dim * s.states,
                  "selective_scan_backward: the forward ran with keep = false");
  const OptionalTensor dy_rows = rows_contiguous(dy), dlast_f = as_float32(dlast);
  s.checkpoints = floats(kept);
  s.dy = view(dy_rows);
  s.dstate_out = floats(dlast_f);
  s.du = view(du);
  s.ddt = view(ddt);
  s.dz = z ? view(dz) : View{};
  s.dB = shared_view(dB, false);
  s.dC = shared_view(dC, false);
  s.dstate = state ? floats(dstate) : nullptr;
  s.dA = floats(dA);
  s.dD = D ? floats(dD) : nullptr;
  s.dbias = dt_bias ? floats(dbias) : nullptr;
  if constexpr (twin == Twin::cpu) {
    backward_on_cpu(s, u, dA, dD, dbias);
  } else {
    launch<selective_scan_backward_cuda>("selective_scan_backward", s, u, selective_scan_backward_workspace(s));
  }
  return result();
}

template <Twin twin>
Tensor step(const Tensor& state, const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
            const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias, bool dt_softplus) {
  STD_TORCH_CHECK(u.dim() == 2 && A.dim() == 2, "u is not [B, D] or A is not [D, N]");
  const int64_t batch = u.size(0), dim = u.size(1), states = A.size(1), groups = B.dim() == 3 ? B.size(1) : 1;
  const std::initializer_list<int64_t> rows = {batch, dim}, shared = {batch, states}, grouped = {batch, groups, states};
  expect_sizes("state", state, {batch, dim, states});
  expect_sizes("dt", dt, rows);
  expect_sizes("A", A, {dim, states});
  expect_sizes("B", B, B.dim() == 3 ? grouped : shared);
  expect_sizes("C", C, C.dim() == 3 ? grouped : shared);
  expect_sizes("D", D, {dim});
  expect_sizes("z", z, rows);
  expect_sizes("dt_bias", dt_bias, {dim});
  STD_TORCH_CHECK(groups > 0 && dim % groups == 0, "the groups of B do not divide the channels");
  Tensor h = rows_contiguous(state);
  const Tensor u_rows = rows_contiguous(u), dt_rows = rows_contiguous(dt);
  const Tensor B_rows = rows_contiguous(B), C_rows = rows_contiguous(C);
  const Tensor A_f = as_float32(A), y = new_tensor_like(u, u.scalar_type());
  const OptionalTensor D_f = as_float32(D), z_rows = rows_contiguous(z), bias_f = as_float32(dt_bias);
  const SelectiveScanStep s{batch, dim, states, groups, view(h), view(u_rows), view(dt_rows), view(z_rows),
                            view(y), shared_view(B_rows, true), shared_view(C_rows, true), floats(A_f), floats(D_f),
                            floats(bias_f), dt_softplus};
  if constexpr (twin == Twin::cpu) {
    const int64_t units = s.batch * PYSEQ_DISPATCH(selective_scan_tiles)(s.dim, s.groups);
    const int64_t grain = 1 + 2400 / (s.states + 4);   // about 20 us
    parallel(units, grain, [&](int64_t begin, int64_t end) { PYSEQ_DISPATCH(selective_scan_step)(s, begin, end); });
  } else {
    check_launch("selective_scan_step", selective_scan_step_cuda(s, Launch(u).stream));
  }
  if (h.data_ptr() != state.data_ptr()) {   // the last axis was not contiguous, and a copy was updated
    Tensor to = state;
    torch::stable::copy_(to, h);
  }
  return y;
}

template <Twin twin> void implement(Library& m) {
  m.impl("selective_scan_forward", TORCH_BOX(&forward<twin>));
  m.impl("selective_scan_backward", TORCH_BOX(&backward<twin>));
  m.impl("selective_scan_step", TORCH_BOX(&step<twin>));
}

}  // namespace

void cpu(Library& m) { implement<Twin::cpu>(m); }
#ifdef PYSEQ_WITH_CUDA
void cuda(Library& m) { implement<Twin::cuda>(m); }
#endif

}  // namespace pyseq::selective_scan
