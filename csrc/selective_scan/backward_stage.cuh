// How a span of 8 tokens comes into shared memory. A thread brings in 8 channels of one token, and keeps u until it
// turns sums into gradients. What dt and z are needed for behind the walk is computed beside delta and silu.
#pragma once
#include "selective_scan/backward_rows.cuh"

namespace pyseq {
namespace {

static_assert(kSpan * 16 == kThreads && kSlice == 16 && kBlock == kThreads);

struct Shared {
  float delta[kSpan][kBlock], du[kSpan][kBlock], dv[kSpan][kBlock];   // du: delta u
  float slope[kSpan][kBlock];       // d delta / d dt; with softplus
  float dz[kSpan][kBlock];          // dy silu'(z); with z
  float B[kSpan][kSlice], C[kSpan][kSlice];
  float D[kBlock], bias[kBlock];
  struct {
    float of[4][kThreads][4];       // [channel, thread, state]; step_back puts S1, S2, dB, dC in the place of p
    float gap[4];                   // between tokens: sum_channels reads eight of them at once, each from its own banks
  } p[kSpan];
  float v[kSpan][kBlock];           // <C, h>; with z
  float sums[2][kSpan][kBlock];     // S1 and S2 of the slices so far; more than one slice
};
static_assert(sizeof(Shared) <= 99 * 1024);

struct Inputs {
  Bits dt, u, z, dy;
  unsigned B, C;   // of one token and state
};

// What is needed depends on where to: u forward, z and dy back.
enum class Pass { forward, carry, back };

template <Pass kPass>
__device__ __forceinline__ void load_channels(Inputs& in, const Cursors& from, const Place& at, int tokens) {
  const SelectiveScan& s = at.s;
  const bool here = at.token < tokens, near = here && exists(0, at), far = here && exists(4, at);
  const auto load_all = [&](const auto& load) {
    in.dt = load(from.dt, s.dt);
    if (kPass != Pass::carry) in.u = load(from.u, s.u);
    if (kPass == Pass::forward) return;
    if (s.z) in.z = load(from.z, s.z);
    if (s.dy) in.dy = load(from.dy, s.dy);
  };
  if (at.w.vectorised) load_all([&](const char* p, const View& x) { return load_wide(p, x.type, near, far); });
  else load_all([&](const char* p, const View& x) { return load_narrow(p, x, here, at); });
}
__device__ __forceinline__ void load_shared(Inputs& in, const Cursors& from, const Place& at, int tokens, int slice) {
  const int n = slice * kSlice;
  const bool here = at.token < tokens && n + at.column < at.s.states;
  in.B = here ? load_element(from.B + n * size_of(at.s.B.type), at.s.B.type) : 0u;
  in.C = here ? load_element(from.C + n * size_of(at.s.C.type), at.s.C.type) : 0u;
}

__device__ __forceinline__ void stage_weights(Shared& m, const Place& at) {
  const int i = threadIdx.x;
  m.D[i] = at.s.D && i < at.channels ? at.s.D[at.first + i] : 0.f;
  m.bias[i] = at.s.dt_bias && i < at.channels ? at.s.dt_bias[at.first + i] : 0.f;
}

// Forward delta and delta u, back delta and dv = dy silu(z), and for the sums behind that walk also the slope of
// softplus and dy silu'(z) = dy s + dv (1 - s), s = sigmoid(z). Returns u.
template <Pass kPass>
__device__ __forceinline__ Row stage_channels(Shared& m, const Inputs& in, const Place& at) {
  const SelectiveScan& s = at.s;
  const Row bias = load_row(m.bias, at);
  Row delta = floats(in.dt, s.dt.type), slope, u = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) delta[i] += bias[i];
  if (s.dt_softplus) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      slope[i] = sigmoid(delta[i]);
      delta[i] = softplus(delta[i]);
    }
    if (kPass == Pass::back) store_row(m.slope[at.token], slope, at);
  }
  store_row(m.delta[at.token], delta, at);
  if (kPass != Pass::carry) {
    u = floats(in.u, s.u.type);
    Row du;
#pragma unroll
    for (int i = 0; i < 8; ++i) du[i] = delta[i] * u[i];
    store_row(m.du[at.token], du, at);
  }
  if (kPass == Pass::forward) return u;
  Row dv = s.dy ? floats(in.dy, s.dy.type) : Row{};
  if (s.z) {
    const Row z = floats(in.z, s.z.type);
    Row dz;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float gate = sigmoid(z[i]), passed = dv[i] * gate;
      dv[i] = passed * z[i];
      dz[i] = fmaf(dv[i], 1.f - gate, passed);
    }
    if (kPass == Pass::back) store_row(m.dz[at.token], dz, at);
  }
  store_row(m.dv[at.token], dv, at);
  return u;
}
__device__ __forceinline__ float as_float(unsigned bits, DType type) {
  if (type == DType::f32) return __uint_as_float(bits);
  if (type == DType::bf16) return __uint_as_float(bits << 16);
  const unsigned short half = static_cast<unsigned short>(bits);
  return load(reinterpret_cast<const __half*>(&half));
}
__device__ __forceinline__ void stage_shared(Shared& m, const Inputs& in, const Place& at) {
  m.B[at.token][at.column] = as_float(in.B, at.s.B.type);
  m.C[at.token][at.column] = as_float(in.C, at.s.C.type);
}

}  // namespace
}  // namespace pyseq
