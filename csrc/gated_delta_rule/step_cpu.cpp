#include <algorithm>

#include "gated_delta_rule/token.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int kVectors = 4;   // of columns at a time: a block of S stays in the cache between the two passes over it

template <int N, Gate gate, class T>
void step_columns(const GatedDeltaRuleStep& s, const Token& token, T* S, int64_t v_at, int64_t y_at, float beta,
                  int64_t left) {
  const int64_t stride = s.state.stride[2];
  vf u[N], y[N], d[N];
  read(d, S, stride, token.decayed_k, s.keys, left);
  for (int n = 0; n < N; ++n) u[n] = correction(beta, load(s.v, v_at + n * W, left - n * W), d[n]);
  advance<N, gate, false>(S, stride, token, nullptr, u, y, d, s.keys, left);
  for (int n = 0; n < N; ++n) store(s.y, y_at + n * W, y[n] * s.scale, left - n * W);
}

template <Gate gate, class T> void step_head(const GatedDeltaRuleStep& s, int64_t b, int64_t h) {
  alignas(64) float rows[4][256];
  alignas(64) int32_t whole[256];
  const Token token = {rows[0], rows[1], rows[2], rows[3], whole};
  const auto at = [&](const View& x, int64_t head) { return b * x.stride[0] + head * x.stride[1]; };
  const int64_t shared = h / (s.value_heads / s.heads);
  const int64_t g = gate == Gate::one ? b * s.g.stride[0] + h : at(s.g, h);
  prepare<gate>(token, s.k, at(s.k, shared), s.q, at(s.q, shared), s.g, g, s.keys);
  const float beta = load(s.beta, b * s.beta.stride[0] + h, 1)[0];
  T* const S = static_cast<T*>(s.state.data) + at(s.state, h);
  const int64_t v = at(s.v, h), y = at(s.y, h);
  for (int64_t p = 0; p < s.values;) {
    const bool wide = p + kVectors * W <= s.values;
    const auto step = wide ? step_columns<kVectors, gate, T> : step_columns<1, gate, T>;
    step(s, token, S + p, v + p, y + p, beta, s.values - p);
    p += wide ? kVectors * W : W;
  }
}

}  // namespace

void gated_delta_rule_step(const GatedDeltaRuleStep& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  with_gate(gate_of(s), [&]<Gate gate> {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.value_heads, h = unit % s.value_heads;
      s.state.type == DType::f32 ? step_head<gate, float>(s, b, h) : step_head<gate, bf16>(s, b, h);
    }
  });
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
