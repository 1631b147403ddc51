#include <algorithm>

#include "cpu/dispatch.h"
#include "linear/kernel.h"
#include "registry.h"
#include "torch_api/stable.h"

namespace pyseq::linear {
namespace {

constexpr int64_t kLongest = 4096;        // k in one pass: packed rows stay in cache
constexpr int64_t kRowBytes = 16 << 20;   // packed rows of one pass

// [..., columns] as rows: in place where one stride leads from row to row and either axis is contiguous, else a copy.
struct Rows {
  Tensor t;
  Matrix m;
  int64_t rows = 1;
  explicit Rows(const Tensor& tensor) : t(tensor) {
    const int64_t last = t.dim() - 1, columns = t.size(last);
    bool one_stride = true;
    m.depth = columns > 1 ? t.stride(last) : 1;
    for (int64_t i = last - 1; i >= 0; --i) {
      if (t.size(i) == 1) continue;
      if (rows == 1) m.row = t.stride(i);
      else one_stride = one_stride && t.stride(i) == m.row * rows;
      rows *= t.size(i);
    }
    if (!one_stride || (m.depth != 1 && m.row != 1)) {
      t = torch::stable::contiguous(t);
      m.row = columns;
      m.depth = 1;
    }
    m.data = t.mutable_data_ptr();
    m.type = dtype_of(t);
  }
};
Matrix transposed(const Matrix& a) { return {a.data, a.type, a.depth, a.row}; }

Linear product(int64_t M, int64_t N, int64_t K, const Matrix& x, const Matrix& w = {}) {
  Linear l;
  l.M = M;
  l.N = N;
  l.K = K;
  l.x = x;
  l.w = w;
  return l;
}

// y = x w^T + bias, given M, N, K, x, w or panels, and the bias; y is [..., N] and contiguous
void multiply(Linear l, const Tensor& y) {
  if (l.M == 0 || l.N == 0) return;
  if (!l.panels) l.pairs = l.w.type == DType::bf16;
  l.dot = l.pairs && l.x.type == DType::bf16 && cpu_has_avx512_bf16();
  l.y = {y.mutable_data_ptr(), dtype_of(y), {l.N}};
  const int64_t K = l.K, M = l.M, longest = std::min(K, kLongest), row_bytes = (longest + 1) * sizeof(float);
  const int64_t most_rows = std::min(M, std::max<int64_t>(kRowBytes / row_bytes, 256));
  const Matrix x = l.x;
  const View y_all = l.y;
  float few[4096];
  const bool many = most_rows * (longest + 1) > 4096;
  const Tensor rows = many ? new_tensor(y, {most_rows, longest + 1}, ScalarType::Float) : y;
  l.rows = many ? floats(rows) : few;
  const Tensor total = K > kLongest && l.y.type != DType::f32 ? new_tensor(y, {most_rows, l.N}, ScalarType::Float) : y;
  const int64_t panels = (l.N + kPanel - 1) / kPanel;
  for (int64_t row = 0; row < M; row += most_rows) {
    l.M = std::min(most_rows, M - row);
    l.y.data = y_all.at(row * l.N);
    l.total = static_cast<float*>(l.y.type == DType::f32 ? l.y.data : total.mutable_data_ptr());
    l.x.data = View{x.data, x.type, {}}.at(row * x.row);
    const int64_t tiles = PYSEQ_DISPATCH(linear_tiles)(l.M), blocks = PYSEQ_DISPATCH(linear_blocks)(l.M);
    for (l.begin = 0; l.begin < std::max<int64_t>(K, 1); l.begin = std::max<int64_t>(l.end, 1)) {
      l.end = std::min(l.begin + kLongest, K);
      // A word of the panels costs about as much to fetch as 8 multiplications: 2^20 of them take 20 us.
      const int64_t depth = l.end - l.begin, unit = depth * kPanel * (l.M / blocks + 8);
      parallel(tiles, 1 + (1 << 16) * tiles / (l.M * depth + 1), [&](int64_t begin, int64_t end) {
        PYSEQ_DISPATCH(linear_pack_rows)(l, begin, end);
      });
      parallel(panels * blocks, 1 + (1 << 20) / (unit + 1), [&](int64_t begin, int64_t end) {
        PYSEQ_DISPATCH(linear_forward)(l, begin, end);
      });
    }
  }
}

Tensor pack(const Tensor& weight) {
  const Rows w(weight);
  PackLinear p{weight.size(0), weight.size(1), w.m, nullptr};
  const int64_t count = (p.N + kPanel - 1) / kPanel;
  const Tensor panels = w.m.type == DType::bf16
                            ? new_tensor(weight, {count, (p.K + 1) / 2, kPanel, 2}, ScalarType::BFloat16)
                            : new_tensor(weight, {count, p.K, kPanel}, ScalarType::Float);
  p.panels = static_cast<float*>(panels.mutable_data_ptr());
  parallel(count, 1 + (1 << 16) / (p.K * kPanel + 1), [&](int64_t begin, int64_t end) {
    PYSEQ_DISPATCH(linear_pack)(p, begin, end);
  });
  return panels;
}

// weight: [N, K], or the panels that pack() made of it
Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t out_features) {
  const Rows in(x);
  const bool packed = weight.dim() != 2;
  const int64_t K = x.size(-1), panels = (out_features + kPanel - 1) / kPanel;
  if (!packed) {
    expect_sizes("weight", weight, {out_features, K});
  } else if (weight.scalar_type() == ScalarType::BFloat16) {
    expect_sizes("weight", weight, {panels, (K + 1) / 2, kPanel, 2});
  } else {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "a packed weight is float32 or bfloat16");
    expect_sizes("weight", weight, {panels, K, kPanel});
  }
  expect_sizes("bias", bias, {out_features});
  const OptionalTensor b = as_float32(bias);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  const Tensor y = new_tensor(x, sizes, x.scalar_type());
  const Rows w(packed ? torch::stable::contiguous(weight) : weight);
  Linear l = product(in.rows, out_features, x.size(-1), in.m, packed ? Matrix{} : w.m);
  l.panels = packed ? static_cast<const float*>(w.m.data) : nullptr;
  l.pairs = w.m.type == DType::bf16;
  l.bias = floats(b);
  multiply(l, y);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                            const OptionalTensor& bias, bool need_x, bool need_weight, bool need_bias) {
  const Rows out(dy), in(x), w(weight);
  const int64_t M = out.rows, N = weight.size(0), K = weight.size(1);
  const Tensor dx = need_x ? new_tensor_like(x, x.scalar_type()) : absent(x);
  const Tensor dweight = need_weight ? new_tensor_like(weight, weight.scalar_type()) : absent(x);
  if (need_x) multiply(product(M, K, N, out.m, transposed(w.m)), dx);
  if (need_weight) multiply(product(N, K, M, transposed(out.m), transposed(in.m)), dweight);
  if (!need_bias) return {dx, dweight, absent(x)};
  const Tensor db = new_tensor(x, {N}, ScalarType::Float);
  const LinearBackwardBias args{M, N, out.m, floats(db)};
  parallel((N + kPanel - 1) / kPanel, 1 + (1 << 16) / (M * kPanel + 1), [&](int64_t begin, int64_t end) {
    PYSEQ_DISPATCH(linear_backward_bias)(args, begin, end);
  });
  return {dx, dweight, cast(db, bias->scalar_type())};
}

}  // namespace

void cpu(Library& m) {
  m.impl("linear_pack", TORCH_BOX(&pack));
  m.impl("linear_forward", TORCH_BOX(&forward));
  m.impl("linear_backward", TORCH_BOX(&backward));
}

}  // namespace pyseq::linear
