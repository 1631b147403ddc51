// Tensors to the structs of kernel.h.
#pragma once
#include "selective_scan/kernel.h"
#include "torch_api/packing.h"
#include "torch_api/stable.h"

namespace pyseq::selective_scan {
namespace {

// [B, T, N] stands for [B, T, 1, N]; the gradient comes in the shape of the argument.
View shared_view(const Tensor& t, bool step) {
  View v = view(t);
  if (t.dim() == (step ? 2 : 3)) v.stride[step ? 1 : 2] = 0;
  return v;
}

// What forward and backward share. The tensors that back the struct live as long as this.
template <Twin twin> struct Arguments {
  Tensor u, dt, A, B, C;
  OptionalTensor D, z, dt_bias, state;
  std::optional<Packing> packed;
  SelectiveScan s{};

  Arguments(const Tensor& u_, const Tensor& dt_, const Tensor& A_, const Tensor& B_, const Tensor& C_, const OptionalTensor& D_,
            const OptionalTensor& z_, const OptionalTensor& dt_bias_, const OptionalTensor& state_,
            const OptionalTensor& cu_seqlens, bool dt_softplus)
      : u(rows_contiguous(u_)), dt(rows_contiguous(dt_)), A(as_float32(A_)), B(rows_contiguous(B_)), C(rows_contiguous(C_)),
        D(as_float32(D_)), z(rows_contiguous(z_)), dt_bias(as_float32(dt_bias_)), state(as_float32(state_)),
        packed(packing<twin>(cu_seqlens, u_.size(1))) {
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
    s.sequences = packed ? packed->sequences() : s.batch;
    s.cu_seqlens = packed ? packed->boundaries() : nullptr;
    s.sequence_of = packed ? packed->owners() : nullptr;
    s.state = floats(state);
  }

  bool invalid() const { return packed && !packed->valid; }   // known on a CPU only
};

}  // namespace
}  // namespace pyseq::selective_scan
