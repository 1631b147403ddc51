#include <sys/mman.h>

#include <cmath>

#include "cpu/dispatch.h"
#include "registry.h"
#include "selective_scan/kernel.h"
#include "torch_api/stable.h"

namespace pyseq::selective_scan {
namespace {

// [B, T, N] stands for [B, T, 1, N]; the gradient comes in the shape of the argument.
View shared_view(const Tensor& t, bool step) {
  View v = view(t);
  if (t.dim() == (step ? 2 : 3)) v.stride[step ? 1 : 2] = 0;
  return v;
}

// Fresh memory costs a page fault per 4 KiB, 5 ms for the 12 MB of a typical output, as long as a third of the forward. In
// pages of 2 MiB it is 1.3 ms. Only large tensors are worth the call.
Tensor in_huge_pages(Tensor t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + t.numel() * t.element_size()) / kPage * kPage;
  if (first + kPage < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}
Tensor large_like(const Tensor& like) { return in_huge_pages(new_tensor_like(like, like.scalar_type())); }

struct Packing {
  Tensor values;   // int64, contiguous
  bool valid;      // from 0 to T, non-decreasing: where Python could not look (compiled calls), bad values become NaN
};

std::optional<Packing> packing(const OptionalTensor& cu_seqlens, int64_t time) {
  if (!cu_seqlens) return std::nullopt;
  const Tensor values = torch::stable::contiguous(torch::stable::to(*cu_seqlens, ScalarType::Long));
  const int64_t* p = values.const_data_ptr<int64_t>();
  const int64_t last = values.numel() - 1;
  bool valid = p[0] == 0 && p[last] == time;
  for (int64_t i = 0; i < last; ++i) valid = valid && p[i] <= p[i + 1];
  return Packing{values, valid};
}

void fill_nan(std::initializer_list<Tensor> tensors) {
  for (Tensor t : tensors) torch::stable::fill_(t, std::nan(""));
}

// The arguments that forward and backward share. The tensors that back them live as long as this.
struct Arguments {
  Tensor u, dt, A, B, C;
  OptionalTensor D, z, dt_bias, state;
  std::optional<Packing> packed;
  SelectiveScan s{};

  Arguments(const Tensor& u_, const Tensor& dt_, const Tensor& A_, const Tensor& B_, const Tensor& C_, const OptionalTensor& D_,
            const OptionalTensor& z_, const OptionalTensor& dt_bias_, const OptionalTensor& state_,
            const OptionalTensor& cu_seqlens, bool dt_softplus)
      : u(rows_contiguous(u_)), dt(rows_contiguous(dt_)), A(as_float32(A_)), B(rows_contiguous(B_)), C(rows_contiguous(C_)),
        D(as_float32(D_)), z(rows_contiguous(z_)), dt_bias(as_float32(dt_bias_)), state(as_float32(state_)),
        packed(packing(cu_seqlens, u_.size(1))) {
    s.batch = u.size(0);
    s.time = u.size(1);
    s.dim = u.size(2);
    s.states = A.size(1);
    s.groups = B.dim() == 4 ? B.size(2) : 1;
    s.u = view(u);
    s.dt = view(dt);
    s.z = view(z);
    s.B = shared_view(B, false);
    s.C = shared_view(C, false);
    s.A = floats(A);
    s.D = floats(D);
    s.dt_bias = floats(dt_bias);
    s.dt_softplus = dt_softplus;
    s.sequences = packed ? packed->values.numel() - 1 : s.batch;
    s.cu_seqlens = packed ? packed->values.const_data_ptr<int64_t>() : nullptr;
    s.state = floats(state);
  }
};

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

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                           const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                                           const OptionalTensor& state, const OptionalTensor& cu_seqlens, bool dt_softplus,
                                           bool return_state, bool keep) {
  Arguments args(u, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, dt_softplus);
  SelectiveScan& s = args.s;
  const Tensor y = large_like(u);
  const Tensor last = return_state ? new_tensor(u, {s.sequences, s.dim, s.states}, ScalarType::Float) : absent(u);
  const Tensor kept =
      keep ? in_huge_pages(new_tensor(u, {s.batch, checkpoints(s.time), s.dim, s.states}, ScalarType::Float)) : absent(u);
  if (args.packed && !args.packed->valid) {
    fill_nan({y, last, kept});
    return {y, last, kept};
  }
  s.y = view(y);
  s.state_out = return_state ? floats(last) : nullptr;
  s.checkpoints = keep ? floats(kept) : nullptr;
  const int64_t units = s.batch * PYSEQ_DISPATCH(selective_scan_tiles)(s.dim, s.groups);
  run(s, u, units, forward_scratch(s), 80000, PYSEQ_DISPATCH(selective_scan_forward));
  return {y, last, kept};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const OptionalTensor& dy, const OptionalTensor& dlast, const Tensor& u, const Tensor& dt, const Tensor& A,
                   const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                   const OptionalTensor& dt_bias, const OptionalTensor& state, const OptionalTensor& cu_seqlens,
                   const Tensor& kept, bool dt_softplus) {
  Arguments args(u, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, dt_softplus);
  SelectiveScan& s = args.s;
  const auto sum_for = [&](const OptionalTensor& t) { return t ? new_tensor_like(*t, ScalarType::Float) : absent(u); };
  const Tensor du = large_like(u), ddt = large_like(dt), dB = large_like(B), dC = large_like(C);
  const Tensor dz = z ? large_like(*z) : absent(u);
  const Tensor dA = sum_for(A), dD = sum_for(D), dbias = sum_for(dt_bias), dstate = sum_for(state);
  const auto result = [&]() -> Gradients {
    const auto as = [](const Tensor& t, const OptionalTensor& like) { return like ? cast(t, like->scalar_type()) : t; };
    return {du, ddt, as(dA, A), dB, dC, as(dD, D), dz, as(dbias, dt_bias), dstate};
  };
  if (args.packed && !args.packed->valid) {
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
  s.dB = view(dB);
  s.dC = view(dC);
  s.dstate = state ? floats(dstate) : nullptr;
  s.dA = floats(dA);
  s.dD = D ? floats(dD) : nullptr;
  s.dbias = dt_bias ? floats(dbias) : nullptr;
  // One row needs no sum over rows: it is written where the sum would go.
  const bool rows = s.batch != 1;
  const auto row_sums = [&](const Tensor& t) { return rows ? new_tensor(u, {s.batch, t.numel()}, ScalarType::Float) : t; };
  const Tensor dA_rows = row_sums(dA), dD_rows = row_sums(dD), dbias_rows = row_sums(dbias);
  const Tensor shared =
      in_huge_pages(new_tensor(u, {s.batch * s.groups * blocks(s) * s.time * 2 * padded(s.states)}, ScalarType::Float));
  s.dA_rows = floats(dA_rows);
  s.dD_rows = D ? floats(dD_rows) : nullptr;
  s.dbias_rows = dt_bias ? floats(dbias_rows) : nullptr;
  s.dBC_blocks = floats(shared);
  run(s, u, s.batch * s.groups * blocks(s), backward_scratch(s), 30000, PYSEQ_DISPATCH(selective_scan_backward));
  const int64_t grain = 1 + 40000 / (blocks(s) * s.groups * s.states + 1);
  parallel(s.batch * s.time, grain, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(selective_scan_reduce_tokens)(s, b, e); });
  if (rows) {
    const int64_t channels = 1 + 40000 / (s.batch * s.states + 1);
    parallel(s.dim, channels, [&](int64_t b, int64_t e) { PYSEQ_DISPATCH(selective_scan_reduce_channels)(s, b, e); });
  }
  return result();
}

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
  const int64_t units = s.batch * PYSEQ_DISPATCH(selective_scan_tiles)(s.dim, s.groups);
  const int64_t grain = 1 + 2400 / (s.states + 4);   // about 20 us
  parallel(units, grain, [&](int64_t begin, int64_t end) { PYSEQ_DISPATCH(selective_scan_step)(s, begin, end); });
  if (h.data_ptr() != state.data_ptr()) {   // the last axis was not contiguous, and a copy was updated
    Tensor to = state;
    torch::stable::copy_(to, h);
  }
  return y;
}

}  // namespace

void cpu(Library& m) {
  m.impl("selective_scan_forward", TORCH_BOX(&forward));
  m.impl("selective_scan_backward", TORCH_BOX(&backward));
  m.impl("selective_scan_step", TORCH_BOX(&step));
}

}  // namespace pyseq::selective_scan
