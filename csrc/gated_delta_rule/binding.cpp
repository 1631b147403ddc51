#include <cmath>

#include "cpu/dispatch.h"
#include "gated_delta_rule/arguments.h"
#include "gated_delta_rule/kernel.h"
#include "registry.h"
#include "torch_api/huge_pages.h"
#include "torch_api/stable.h"

namespace pyseq::gated_delta_rule {
namespace {

void fill_nan(std::initializer_list<Tensor> tensors) {
  for (Tensor t : tensors) torch::stable::fill_(t, std::nan(""));
}

float* aligned(const Tensor& memory) {   // to a cache line; `memory` holds 16 floats more than are needed
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(floats(memory)) + 63) / 64 * 64);
}

// Deals units out over the threads, each with a scratch of its own. A thread is woken for 20 us of work: about `cost`
// elements of the state in that time.
template <class Kernel>
void run(GatedDeltaRule s, const Tensor& like, int64_t units, int64_t scratch, int64_t cost, Kernel kernel) {
  if (units == 0) return;
  const int64_t work = s.batch * s.time * s.value_heads * s.keys * s.values / cost + 1;
  int64_t lanes = torch::stable::get_num_threads();
  if (lanes > units) lanes = units;
  if (lanes > work) lanes = work;
  scratch = (scratch + 15) / 16 * 16;
  const Tensor memory = new_tensor(like, {lanes * scratch + 16}, ScalarType::Float);
  parallel(lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      GatedDeltaRule mine = s;
      mine.scratch = aligned(memory) + lane * scratch;
      kernel(mine, units * lane / lanes, units * (lane + 1) / lanes);
    }
  });
}

// The CUDA twin gets one piece of memory, which its launcher divides; it neither allocates nor synchronises.
// How much it wants may hang on the device, so it is asked once that is the current one.
template <auto launcher, auto workspace> void launch(const char* kernel, GatedDeltaRule s, const Tensor& like) {
  const Launch on(like);
  const Tensor memory = new_tensor(like, {workspace(s) + 16}, ScalarType::Float);
  s.workspace = aligned(memory);
  check_launch(kernel, launcher(s, on.stream));
}

GatedDeltaForm checked(int64_t form) {
  STD_TORCH_CHECK(form >= 0 && form <= int64_t(GatedDeltaForm::chunks), "form is not 0, 1 or 2");
  return GatedDeltaForm(form);
}

template <Twin twin>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                                           const Tensor& beta, const OptionalTensor& state,
                                           const OptionalTensor& cu_seqlens, double scale, bool return_state,
                                           bool keep, int64_t form) {
  Arguments<twin> args(q, k, v, g, beta, state, cu_seqlens, scale);
  GatedDeltaRule& s = args.s;
  s.form = checked(form);
  const std::initializer_list<int64_t> outputs = {s.batch, s.time, s.value_heads, s.values};
  const std::initializer_list<int64_t> states = {s.sequences, s.value_heads, s.keys, s.values};
  const std::initializer_list<int64_t> slots = {args.slots(), s.value_heads, s.keys, s.values};
  const Tensor y = in_huge_pages<twin>(new_tensor(q, outputs, q.scalar_type()));
  const Tensor last = return_state ? new_tensor(q, states, ScalarType::Float) : absent(q);
  const Tensor kept = keep ? in_huge_pages<twin>(new_tensor(q, slots, ScalarType::Float)) : absent(q);
  if (twin == Twin::cuda && keep && args.packed) torch::stable::fill_(Tensor(kept), 0);   // slots that no token needs
  if (args.invalid()) {
    fill_nan({y, last, kept});
    return {y, last, kept};
  }
  s.y = view(y);
  s.state_out = return_state ? floats(last) : nullptr;
  s.kept = keep ? floats(kept) : nullptr;
  if constexpr (twin == Twin::cpu) {
    run(s, q, PYSEQ_DISPATCH(gated_delta_rule_forward_units)(s), PYSEQ_DISPATCH(gated_delta_rule_forward_scratch)(s), 200000,
        PYSEQ_DISPATCH(gated_delta_rule_forward));
  } else {
    args.align();
    launch<gated_delta_rule_forward_cuda, gated_delta_rule_forward_workspace>("gated_delta_rule", s, q);
  }
  return {y, last, kept};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <Twin twin>
Gradients backward(const OptionalTensor& dy, const OptionalTensor& dlast, const Tensor& q, const Tensor& k,
                   const Tensor& v, const OptionalTensor& g, const Tensor& beta, const OptionalTensor& state,
                   const OptionalTensor& cu_seqlens, const Tensor& kept, double scale) {
  Arguments<twin> args(q, k, v, g, beta, state, cu_seqlens, scale);
  GatedDeltaRule& s = args.s;
  const auto like = [&](const OptionalTensor& t) { return t ? large_like<twin>(*t) : absent(q); };
  const Tensor dq = like(q), dk = like(k), dv = like(v), dg = like(g), dbeta = like(beta);
  const Tensor dstate = state ? new_tensor_like(*state, ScalarType::Float) : absent(q);
  const Gradients result = {dq, dk, dv, dg, dbeta, dstate};
  if (args.invalid()) {
    fill_nan({dq, dk, dv, dg, dbeta, dstate});
    return result;
  }
  STD_TORCH_CHECK(kept.numel() == args.slots() * s.value_heads * s.keys * s.values,
                  "gated_delta_rule_backward: the forward ran with keep = false");
  expect_sizes("dy", dy, {s.batch, s.time, s.value_heads, s.values});
  expect_sizes("dlast", dlast, {s.sequences, s.value_heads, s.keys, s.values});
  const OptionalTensor dy_rows = rows_contiguous(dy), dlast_f = as_float32(dlast);
  s.kept = floats(kept);
  s.dy = view(dy_rows);
  s.dstate_out = floats(dlast_f);
  s.dq = view(dq);
  s.dk = view(dk);
  s.dv = view(dv);
  s.dg = g ? view(dg) : View{};
  s.dbeta = view(dbeta);
  s.dstate = state ? floats(dstate) : nullptr;
  if constexpr (twin == Twin::cpu) {
    run(s, q, PYSEQ_DISPATCH(gated_delta_rule_backward_units)(s), PYSEQ_DISPATCH(gated_delta_rule_backward_scratch)(s), 70000,
        PYSEQ_DISPATCH(gated_delta_rule_backward));
  } else {
    launch<gated_delta_rule_backward_cuda, gated_delta_rule_backward_workspace>("gated_delta_rule_backward", s, q);
  }
  return result;
}

template <Twin twin>
Tensor step(const Tensor& state, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
            const Tensor& beta, double scale) {
  STD_TORCH_CHECK(q.dim() == 3 && v.dim() == 3, "q is not [B, H, K] or v is not [B, HV, V]");
  const int64_t batch = q.size(0), heads = q.size(1), value_heads = v.size(1), keys = q.size(2), values = v.size(2);
  const bool one_decay = g && g->dim() == 2;
  const std::initializer_list<int64_t> rows = {batch, value_heads, keys}, one = {batch, value_heads};
  STD_TORCH_CHECK(heads > 0 && value_heads % heads == 0, "the heads of q do not divide those of v");
  expect_sizes("state", state, {batch, value_heads, keys, values});
  expect_sizes("k", k, {batch, heads, keys});
  expect_sizes("v", v, {batch, value_heads, values});
  expect_sizes("g", g, one_decay ? one : rows);
  expect_sizes("beta", beta, one);
  STD_TORCH_CHECK(keys >= 1 && keys <= 256 && values >= 1 && values <= 256, "K or V is not from 1 to 256");
  const Tensor held = rows_contiguous(state), q_rows = rows_contiguous(q), k_rows = rows_contiguous(k);
  const Tensor v_rows = rows_contiguous(v), beta_rows = rows_contiguous(beta);
  const Tensor y = new_tensor(q, {batch, value_heads, values}, q.scalar_type());
  const OptionalTensor g_rows = rows_contiguous(g);
  const GatedDeltaRuleStep s{batch,        heads,        value_heads, keys,      values,          view(held),   view(q_rows),
                             view(k_rows), view(g_rows), one_decay,   view(beta_rows), view(v_rows), view(y), float(scale)};
  if constexpr (twin == Twin::cpu) {
    const int64_t grain = 1 + 200000 / (keys * values);   // about 20 us
    parallel(batch * value_heads, grain,
             [&](int64_t begin, int64_t end) { PYSEQ_DISPATCH(gated_delta_rule_step)(s, begin, end); });
  } else {
    check_launch("gated_delta_rule_step", gated_delta_rule_step_cuda(s, Launch(q).stream));
  }
  if (held.data_ptr() != state.data_ptr()) {   // the last axis was not contiguous, and a copy was updated
    Tensor to = state;
    torch::stable::copy_(to, held);
  }
  return y;
}

template <Twin twin> void implement(Library& m) {
  m.impl("gated_delta_rule_forward", TORCH_BOX(&forward<twin>));
  m.impl("gated_delta_rule_backward", TORCH_BOX(&backward<twin>));
  m.impl("gated_delta_rule_step", TORCH_BOX(&step<twin>));
}

}  // namespace

void cpu(Library& m) { implement<Twin::cpu>(m); }
#ifdef PYSEQ_WITH_CUDA
void cuda(Library& m) { implement<Twin::cuda>(m); }
#endif

}  // namespace pyseq::gated_delta_rule
