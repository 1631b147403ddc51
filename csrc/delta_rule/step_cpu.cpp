#include "delta_rule/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int kColumns = 2;        // vectors of columns in registers
constexpr int64_t kWidest = 256;   // K

struct Rows {
  alignas(64) float q[kWidest], k[kWidest], a[kWidest], b[kWidest], decay[kWidest];
  alignas(64) int32_t kept[kWidest];
};

void load_rows(const DeltaRuleStep& s, Rows& rows, int64_t b, int64_t h) {
  const auto at = [&](const View& x) { return b * x.stride[0] + h * x.stride[1]; };
  for (int64_t k = 0; k < s.keys; k += W) {
    const int64_t left = s.keys - k;
    store(rows.q + k, load(s.q, at(s.q) + k, left));
    store(rows.k + k, load(s.k, at(s.k) + k, left));
    if (s.a) store(rows.a + k, load(s.a, at(s.a) + k, left));
    if (s.a) store(rows.b + k, load(s.b, at(s.b) + k, left));
    if (!s.g) continue;
    const vf g = s.one_decay ? splat(load(s.g, b * s.g.stride[0] + h, 1)[0]) : load(s.g, at(s.g) + k, left);
    vf decay;
    vi kept;
    decay_of(g, decay, kept);
    store(rows.decay + k, decay);
    std::memcpy(rows.kept + k, &kept, sizeof kept);
  }
}

// Columns [p, p + C W), or the `left` of them that there are where C is 1.
template <bool corrected, bool decayed, int C, class T>
void advance(const DeltaRuleStep& s, const Rows& rows, T* S, int64_t v_at, int64_t y_at, int64_t left) {
  const auto lanes = [&] { return C == 1 ? left : W; };
  const int64_t stride = s.state.stride[2];
  vf p[C] = {}, v[C], y[C] = {};
  for (int c = 0; c < C; ++c) v[c] = load(s.v, v_at + c * W, lanes());
  for (int64_t k = 0; corrected && k < s.keys; ++k) {
    vf row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) row[c] = load(S + k * stride + c * W, lanes());
    correct_row(p, row, rows.a[k]);
  }
  const TokenRows x = {rows.q, rows.k, rows.a, rows.b, rows.decay, rows.kept};
  for (int64_t k = 0; k < s.keys; ++k) {
    vf row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) row[c] = load(S + k * stride + c * W, lanes());
    take_row<corrected, decayed ? Decay::any : Decay::none>(row, y, p, v, x, k);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(S + k * stride + c * W, row[c], lanes());
  }
  for (int c = 0; c < C; ++c) store(s.y, y_at + c * W, s.scale * y[c], lanes());
}

template <class T> void step_head(const DeltaRuleStep& s, int64_t b, int64_t h) {
  Rows rows;
  load_rows(s, rows, b, h);
  T* const S = static_cast<T*>(s.state.data) + b * s.state.stride[0] + h * s.state.stride[1];
  const int64_t v = b * s.v.stride[0] + h * s.v.stride[1], y = b * s.y.stride[0] + h * s.y.stride[1];
  for_case(s, [&]<bool corrected, bool decayed>() {
    int64_t p = 0;
    for (; p + kColumns * W <= s.values; p += kColumns * W) {
      advance<corrected, decayed, kColumns>(s, rows, S + p, v + p, y + p, kColumns * W);
    }
    for (; p < s.values; p += W) advance<corrected, decayed, 1>(s, rows, S + p, v + p, y + p, s.values - p);
  });
}

}  // namespace

void delta_rule_step(const DeltaRuleStep& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / s.heads, h = unit % s.heads;
    s.state.type == DType::f32 ? step_head<float>(s, b, h) : step_head<bf16>(s, b, h);
  }
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
