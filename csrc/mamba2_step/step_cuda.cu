// A block has some rows of one head's state, 64 of them for 128 states, and asks for all of it before anything else. While it
// is on its way the block convolves its own channels of x, and B and C of its group, as every block of the group does: a tenth
// of the bytes of the state, from caches. Then the state is advanced where it lies, in registers, and goes back.
#include "mamba2_step/update.cuh"

namespace pyseq {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

// A warp holds 128 / L rows and 4 L F states, 4 x 4 F of them in the registers of a thread: L neighbouring lanes hold the
// states of the same rows, four by four. More states are walked in slices.
template <int L> constexpr int kRows = 128 / L;
template <int L> constexpr int kBlockRows = kWarps * kRows<L>;
template <int L, int F> constexpr int kSlice = 4 * L * F;

template <class Function> int for_states(int64_t N, const Function& f) {
  if (N <= 16) return f.template operator()<4, 1>();
  if (N <= 64) return f.template operator()<8, 2>();
  if (N <= 128) return f.template operator()<8, 4>();
  return f.template operator()<16, 4>();
}

// B and C, with zeros behind, and x of the block.
template <int L, int F> struct Shared {
  int states;
  __host__ __device__ explicit Shared(const Mamba2Step& s)
      : states(int((s.states + kSlice<L, F> - 1) / kSlice<L, F> * kSlice<L, F>)) {}
  __host__ __device__ int C() const { return states; }
  __host__ __device__ int x() const { return 2 * states; }
  __host__ __device__ int floats() const { return 2 * states + kBlockRows<L>; }
};

// What a thread has of the state: rows from `at` on, `stride` apart, each in F runs of 4 states, 4 L apart.
template <int L, int F, class T> struct Corner {
  T* at;
  int64_t stride;
  int rows, left;   // how many there are from here on, of rows and of states
  bool whole;       // every run is one access

  template <class Function> __device__ __forceinline__ void each_run(const Function& f) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < F; ++i) f(r, 4 * i, at + r * stride + 4 * L * i, r < rows ? left - 4 * L * i : 0);
    }
  }
  __device__ __forceinline__ void load_all(float (&S)[4][4 * F]) const {
    each_run([&](int r, int n, const T* from, int count) {
      Vec<4> run;
      if (whole) {
        run = load_vec<4>(from);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) run[e] = e < count ? load(from + e) : 0.f;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) S[r][n + e] = run[e];
    });
  }
  __device__ __forceinline__ void store_all(const float (&S)[4][4 * F]) const {
    each_run([&](int r, int n, T* to, int count) {
      if (whole) return store_vec<4>(to, Vec<4>{S[r][n], S[r][n + 1], S[r][n + 2], S[r][n + 3]});
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (e < count) store(to + e, S[r][n + e]);
    });
  }
};

// Sums y over the L lanes of its rows, halving the rows first: a lane is left with row sum_row(lane) of its four.
__device__ __forceinline__ int sum_row(int lane) { return lane % 2 * 2 + lane / 2 % 2; }
template <int L> __device__ __forceinline__ float sum_lanes(const float (&y)[4], int lane) {
  const bool upper = lane % 2, next = lane / 2 % 2;
  const float first = (upper ? y[2] : y[0]) + __shfl_xor_sync(~0u, upper ? y[0] : y[2], 1);
  const float second = (upper ? y[3] : y[1]) + __shfl_xor_sync(~0u, upper ? y[1] : y[3], 1);
  float sum = (next ? second : first) + __shfl_xor_sync(~0u, next ? first : second, 2);
#pragma unroll
  for (int d = 4; d < L; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return sum;
}

// delta: NaN stays NaN. log a: NaN where A is not <= 0.
__device__ __forceinline__ float step_size(const Mamba2Step& s, int64_t row, int head) {
  float delta = softplus(load(s.dt, row * s.dt.stride[0] + head) + load(s.dt_bias, head));
  delta = delta < s.dt_low ? s.dt_low : delta;
  return delta > s.dt_high ? s.dt_high : delta;
}
__device__ __forceinline__ float log_decay(float delta, float A) {
  const float l = delta * A;
  return A <= 0.f ? (l < kMamba2Least ? kMamba2Least : l) : __int_as_float(0x7fffffff);
}

// B, C and the channels of a block behind the convolution, in shared memory.
template <int L, int F>
__device__ __forceinline__ void convolve_all(const Mamba2Step& s, float* shared, int64_t row, int head, int first) {
  const Shared<L, F> at(s);
  const int states = int(s.states), channels = min(kBlockRows<L>, int(s.width) - first);
  const int64_t B = s.dim() + head / (s.heads / s.groups) * s.states, C = B + s.groups * s.states;
  with_types(s, [&]<class X, class M>() {
    for (int i = threadIdx.x; i < 2 * at.states; i += kThreads) {
      const bool is_C = i >= at.states;
      const int n = is_C ? i - at.states : i;
      shared[i] = n < states ? Window<X, M>(s, row, (is_C ? C : B) + n).convolve(s, (is_C ? C : B) + n) : 0.f;
    }
    for (int i = threadIdx.x; i < kBlockRows<L>; i += kThreads) {
      const int64_t channel = int64_t(head) * s.width + first + i;
      shared[at.x() + i] = 0.f;
      if (i >= channels) continue;
      const Window<X, M> window(s, row, channel);
      shared[at.x() + i] = window.convolve(s, channel);
      window.move();
    }
  });
}

template <int L, int F, class T>
__global__ void __launch_bounds__(kThreads, 3) mamba2_step_kernel(Mamba2Step s, bool wide, int tiles) {
  const int head = int(blockIdx.x) / tiles % int(s.heads), first = int(blockIdx.x) % tiles * kBlockRows<L>;
  const int64_t row = int(blockIdx.x) / tiles / int(s.heads);
  const int lane = int(threadIdx.x) % 32, local = int(threadIdx.x) / 32 * kRows<L> + lane / L * 4;
  const int rows = min(max(int(s.width) - first - local, 0), 4);
  const Shared<L, F> at(s);
  float* const shared = dynamic_smem<float>();
  const int64_t stride = s.state.stride[2];
  T* const mine = static_cast<T*>(s.state.data) + row * s.state.stride[0] + head * s.state.stride[1] +
                  (rows ? (first + local) * stride : 0);
  const auto corner = [&](int slice) {
    const int state = slice + lane % L * 4, left = int(s.states) - state;
    return Corner<L, F, T>{mine + state, stride, rows, left, wide && rows == 4 && left >= 4 * (F - 1) * L + 4};
  };
  float S[4][4 * F], y[4] = {};
  corner(0).load_all(S);
  const float delta = step_size(s, row, head), a = ex2(log_decay(delta, load(s.A, head)) * kLog2e);
  convolve_all<L, F>(s, shared, row, head, first);
  __syncthreads();
  const Vec<4> x = load_vec<4>(shared + at.x() + local);
#pragma unroll 1
  for (int slice = 0; slice < s.states; slice += kSlice<L, F>) {
    if (slice) corner(slice).load_all(S);
    const float* const B = shared + slice + lane % L * 4;
    const float* const C = B + at.C();
#pragma unroll
    for (int i = 0; i < F; ++i) {
      const Vec<4> b = load_vec<4>(B + 4 * L * i), c = load_vec<4>(C + 4 * L * i);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float& h = S[r][4 * i + e];
          h = fmaf(a, h, delta * x[r] * b[e]);
          y[r] = fmaf(h, c[e], y[r]);
        }
      }
    }
    corner(slice).store_all(S);
  }
  const float sum = sum_lanes<L>(y, lane);
  const int p = local + sum_row(lane), channel = head * int(s.width) + first + p;
  if (first + p >= s.width || lane % L >= 4) return;
  float v = fmaf(load(s.skip, s.skip_wide ? head * s.skip.stride[0] + first + p : head), shared[at.x() + p], sum);
  if (s.gates_first()) v *= silu(load(s.z, row * s.z.stride[0] + channel));
  if (s.norm_group) s.v[row * s.dim() + channel] = v;
  else store(s.y, row * s.y.stride[0] + channel, v);
}

template <int L, int F, class T> int step(const Mamba2Step& s, void* stream) {
  const int64_t tiles = (s.width + kBlockRows<L> - 1) / kBlockRows<L>, blocks = s.batch * s.heads * tiles;
  if (blocks > kLongest) return cudaErrorInvalidValue;
  const size_t bytes = size_t(Shared<L, F>(s).floats()) * sizeof(float);
  const bool wide = vectorisable(s.state, 4, 3);
  return launch<mamba2_step_kernel<L, F, T>>(dim3(unsigned(blocks)), dim3(kThreads), bytes, stream, s, wide, int(tiles));
}

}  // namespace

int mamba2_step_cuda(const Mamba2Step& s, void* stream) {
  for (const int64_t size : {s.batch, s.dim(), s.states, s.channels()})
    if (size > kLongest) return cudaErrorInvalidValue;
  return for_states(s.states, [&]<int L, int F>() {
    return s.state.type == DType::f32 ? step<L, F, float>(s, stream) : step<L, F, __nv_bfloat16>(s, stream);
  });
}

}  // namespace pyseq
