// Tensors to the structs of kernel.h.
#pragma once
#include "cpu/dispatch.h"
#include "ssd/kernel.h"
#include "torch_api/packing.h"
#include "torch_api/stable.h"

namespace pyseq::ssd {
namespace {

// What forward and backward share. The tensors that back the struct live as long as this.
template <Twin twin> struct Arguments {
  Tensor x, dt, A, B, C;
  OptionalTensor D, z, dt_bias, state;
  std::optional<Packing> packed;
  Ssd s{};

  Arguments(const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
            const OptionalTensor& D_, const OptionalTensor& z_, const OptionalTensor& dt_bias_,
            const OptionalTensor& state_, const OptionalTensor& cu_seqlens, bool dt_softplus, double dt_low,
            double dt_high)
      : x(rows_contiguous(x_)), dt(rows_contiguous(dt_)), A(as_float32(A_)), B(rows_contiguous(B_)),
        C(rows_contiguous(C_)), D(as_float32(D_)), z(rows_contiguous(z_)), dt_bias(as_float32(dt_bias_)),
        state(as_float32(state_)),
        packed(packing<twin>(cu_seqlens, x_.size(1))) {
    STD_TORCH_CHECK(x.dim() == 4 && B.dim() == 4, "x is not [B, T, H, P] or B is not [B, T, G, N]");
    s.batch = x.size(0);
    s.time = x.size(1);
    s.heads = x.size(2);
    s.width = x.size(3);
    s.states = B.size(3);
    s.groups = B.size(2);
    s.x = view(x);
    s.z = view(z);
    s.dt = view(dt);
    s.B = view(B);
    s.C = view(C);
    s.A = floats(A);
    s.D = floats(D);
    s.D_width = D && D->dim() == 2 ? s.width : 1;
    s.dt_bias = floats(dt_bias);
    s.dt_softplus = dt_softplus;
    s.dt_low = float(dt_low);
    s.dt_high = float(dt_high);
    s.sequences = packed ? packed->sequences() : s.batch;
    s.cu_seqlens = packed ? packed->boundaries() : nullptr;
    s.sequence_of = packed ? packed->owners() : nullptr;
    s.state = floats(state);
    const bool halves = s.x.type == DType::bf16 && s.B.type == DType::bf16 && s.C.type == DType::bf16;
    s.threads = twin == Twin::cpu ? torch::stable::get_num_threads() : 1;
    s.dot = twin == Twin::cpu && halves && cpu_has_avx512_bf16();
    check();
  }

  void check() const {
    const bool per_channel = D && D->dim() == 2;
    const std::initializer_list<int64_t> one = {s.heads}, all = {s.heads, s.width};
    expect_sizes("dt", dt, {s.batch, s.time, s.heads});
    expect_sizes("A", A, one);
    expect_sizes("B", B, {s.batch, s.time, s.groups, s.states});
    expect_sizes("C", C, {s.batch, s.time, s.groups, s.states});
    expect_sizes("D", D, per_channel ? all : one);
    expect_sizes("z", z, {s.batch, s.time, s.heads, s.width});
    expect_sizes("dt_bias", dt_bias, one);
    expect_sizes("state", state, {s.sequences, s.heads, s.width, s.states});
    STD_TORCH_CHECK(s.groups > 0 && s.heads % s.groups == 0, "the groups of B do not divide the heads");
  }

  bool invalid() const { return packed && !packed->valid; }   // known on a CPU only
};

}  // namespace
}  // namespace pyseq::ssd
