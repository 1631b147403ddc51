// Tensors to the structs of kernel.h.
#pragma once
#include "delta_rule/kernel.h"
#include "torch_api/packing.h"
#include "torch_api/stable.h"

namespace pyseq::delta_rule {
namespace {

// What forward and backward share. The tensors that back the struct live as long as this.
template <Twin twin> struct Arguments {
  Tensor q, k, v;
  OptionalTensor a, b, g, state;
  std::optional<Packing> packed;
  DeltaRule s{};

  Arguments(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& a_, const OptionalTensor& b_,
            const OptionalTensor& g_, const OptionalTensor& state_, const OptionalTensor& cu_seqlens, double scale)
      : q(rows_contiguous(q_)), k(rows_contiguous(k_)), v(rows_contiguous(v_)), a(rows_contiguous(a_)),
        b(rows_contiguous(b_)), g(rows_contiguous(g_)), state(as_float32(state_)),
        packed(packing<twin>(cu_seqlens, q_.size(1))) {
    STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "q is not [B, T, H, K] or v is not [B, T, H, V]");
    s.batch = q.size(0);
    s.time = q.size(1);
    s.heads = q.size(2);
    s.keys = q.size(3);
    s.values = v.size(3);
    s.q = view(q);
    s.k = view(k);
    s.a = view(a);
    s.b = view(b);
    s.g = view(g);
    s.one_decay = g && g->dim() == 3;
    s.v = view(v);
    s.scale = float(scale);
    s.sequences = packed ? packed->sequences() : s.batch;
    s.cu_seqlens = packed ? packed->boundaries() : nullptr;
    s.sequence_of = packed ? packed->owners() : nullptr;
    s.state = floats(state);
    check();
  }

  void check() const {
    const std::initializer_list<int64_t> rows = {s.batch, s.time, s.heads, s.keys}, one = {s.batch, s.time, s.heads};
    expect_sizes("k", k, rows);
    expect_sizes("v", v, {s.batch, s.time, s.heads, s.values});
    STD_TORCH_CHECK(a.has_value() == b.has_value(), "one of a and b is missing");
    expect_sizes("a", a, rows);
    expect_sizes("b", b, rows);
    expect_sizes("g", g, s.one_decay ? one : rows);
    expect_sizes("state", state, {s.sequences, s.heads, s.keys, s.values});
    STD_TORCH_CHECK(s.keys >= 1 && s.keys <= 256 && s.values >= 1 && s.values <= 256, "K or V is not from 1 to 256");
  }

  int64_t slots() const { return delta_slots(s.batch, s.time, s.sequences, packed.has_value()); }
  bool invalid() const { return packed && !packed->valid; }   // known on a CPU only
};

}  // namespace
}  // namespace pyseq::delta_rule
