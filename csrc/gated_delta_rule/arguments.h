// Tensors to the structs of kernel.h.
#pragma once
#include <utility>

#include "gated_delta_rule/kernel.h"
#include "torch_api/packing.h"
#include "torch_api/stable.h"

namespace pyseq::gated_delta_rule {
namespace {

// What forward and backward share. The tensors that back the struct live as long as this.
template <Twin twin> struct Arguments {
  Tensor q, k, v, beta;
  OptionalTensor g, state;
  std::optional<Packing> packed;
  GatedDeltaRule s{};

  Arguments(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& g_, const Tensor& beta_,
            const OptionalTensor& state_, const OptionalTensor& cu_seqlens, double scale)
      : q(rows_contiguous(q_)), k(rows_contiguous(k_)), v(rows_contiguous(v_)), beta(rows_contiguous(beta_)),
        g(rows_contiguous(g_)), state(as_float32(state_)),
        packed(packing<twin>(cu_seqlens, q_.size(1))) {
    STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "q is not [B, T, H, K] or v is not [B, T, HV, V]");
    s.batch = q.size(0);
    s.time = q.size(1);
    s.heads = q.size(2);
    s.value_heads = v.size(2);
    s.keys = q.size(3);
    s.values = v.size(3);
    s.q = view(q);
    s.k = view(k);
    s.g = view(g);
    s.beta = view(beta);
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
    const std::initializer_list<int64_t> one = {s.batch, s.time, s.value_heads};
    const std::initializer_list<int64_t> rows = {s.batch, s.time, s.value_heads, s.keys};
    STD_TORCH_CHECK(s.heads > 0 && s.value_heads % s.heads == 0, "the heads of q do not divide those of v");
    expect_sizes("k", k, {s.batch, s.time, s.heads, s.keys});
    expect_sizes("v", v, {s.batch, s.time, s.value_heads, s.values});
    expect_sizes("g", g, s.one_decay ? one : rows);
    expect_sizes("beta", beta, one);
    expect_sizes("state", state, {s.sequences, s.value_heads, s.keys, s.values});
    STD_TORCH_CHECK(s.keys >= 1 && s.keys <= 256 && s.values >= 1 && s.values <= 256, "K or V is not from 1 to 256");
  }

  // CUDA's form in chunks reads 16 bytes at a time. Rows that begin elsewhere are moved, so that the form, and with it
  // the bits, is a function of shape and dtype alone.
  void align() {
    for (const auto& [held, seen] : {std::pair(&q, &s.q), std::pair(&k, &s.k), std::pair(&v, &s.v)}) {
      if (seen->type != DType::bf16 || held->size(-1) % 8 != 0 || held->numel() == 0) continue;
      bool aligned = reinterpret_cast<uintptr_t>(seen->data) % 16 == 0;
      for (int i = 0; i < 3; ++i) aligned = aligned && seen->stride[i] % 8 == 0;
      if (aligned) continue;
      Tensor moved = new_tensor_like(*held, held->scalar_type());
      torch::stable::copy_(moved, *held);
      *held = moved;
      *seen = view(moved);
    }
  }

  int64_t slots() const { return gated_delta_slots(s.batch, s.time, s.sequences, packed.has_value()); }
  bool invalid() const { return packed && !packed->valid; }   // known on a CPU only
};

}  // namespace
}  // namespace pyseq::gated_delta_rule
