// Every function of cpu/simd.h against libm in double, and every value of the 16-bit dtypes there and back. A program of
// its own: it is compiled for each instruction set of the machine, and for aarch64, where it runs under an emulator.
// Prints one line per function; exits 1 if a bound is broken.
#define PYSEQ_ISA tested
#include <cstdio>

#include "cpu/simd.h"

using namespace pyseq::tested;
using pyseq::DType;
using pyseq::View;

namespace {

int failures = 0;

void expect(bool good, const char* what, double got) {
  if (!good) std::printf("FAILED %s: %.9g\n", what, got), ++failures;
}

float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
bool same(float a, float b) { return a != a ? b != b : float_to_bits(a) == float_to_bits(b); }

uint32_t random_bits() {   // a linear congruential generator: the same numbers on every machine
  static uint32_t s = 1;
  s = s * 1664525u + 1013904223u;
  return s ^ (s >> 16);
}

// The largest relative error of f on [low, high], where the exact result is a normal number.
template <class F, class G> void accuracy(const char* name, F f, G exact, double low, double high, double bound) {
  constexpr int kPoints = 200000 / W * W;
  double worst = 0, where = 0;
  for (int i = 0; i < kPoints; i += W) {
    float x[W], y[W];
    for (int j = 0; j < W; ++j) x[j] = float(low + (high - low) * (i + j) / kPoints);
    store(y, f(load(x)));
    for (int j = 0; j < W; ++j) {
      const double e = exact(double(x[j]));
      if (std::fabs(e) < 0x1p-126) continue;
      const double error = std::fabs(y[j] - e) / std::fabs(e);
      if (!(error <= worst)) worst = error, where = x[j];
    }
  }
  std::printf("%-14s [%g, %g]: relative error %.2e at %.9g\n", name, low, high, worst, where);
  expect(worst <= bound, name, worst);
}

float lane(vf v) {   // all lanes agree
  float l[W];
  store(l, v);
  for (int i = 1; i < W; ++i) expect(same(l[i], l[0]), "lanes", l[i]);
  return l[0];
}

vf softplus_derivative(vf v) {
  vf derivative;
  softplus(v, derivative);
  return derivative;
}

void functions() {
  const double eps = 0x1p-23;
  accuracy("exp2", [](vf x) { return exp2(x); }, [](double x) { return std::exp2(x); }, -126, 127.99, 2 * eps);
  accuracy("exp", [](vf x) { return exp(x); }, [](double x) { return std::exp(x); }, -87.3, 88.7, 2 * eps);
  accuracy("expm1_unit", expm1_unit, [](double x) { return std::expm1(x); }, -0.69314718, 0, 2 * eps);
  accuracy("expm1_unit", expm1_unit, [](double x) { return std::expm1(x); }, -1e-6, 0, 2 * eps);
  accuracy("log1p_unit", log1p_unit, [](double x) { return std::log1p(x); }, 0, 1, 2 * eps);
  accuracy("log1p_unit", log1p_unit, [](double x) { return std::log1p(x); }, 0, 1e-6, 2 * eps);
  accuracy("softplus", [](vf x) { return softplus(x); }, [](double x) { return x > 20 ? x : std::log1p(std::exp(x)); },
           -87, 40, 4 * eps);
  accuracy("sigmoid", sigmoid, [](double x) { return 1 / (1 + std::exp(-x)); }, -87, 87, 4 * eps);
  accuracy("softplus'", softplus_derivative, [](double x) { return x > 20 ? 1 : 1 / (1 + std::exp(-x)); }, -87, 87, 4 * eps);
  accuracy("silu", silu, [](double x) { return x / (1 + std::exp(-x)); }, -80, 80, 4 * eps);
}

void edges() {
  const float inf = INFINITY, nan = NAN;
  struct { const char* name; float got, want; } rows[] = {
      {"exp2(-inf)", lane(exp2(splat(-inf))), 0.f},      {"exp2(inf)", lane(exp2(splat(inf))), inf},
      {"exp2(nan)", lane(exp2(splat(nan))), nan},        {"exp2(0)", lane(exp2(splat(0.f))), 1.f},
      {"exp2(-151)", lane(exp2(splat(-151.f))), 0.f},    {"exp2(128)", lane(exp2(splat(128.f))), inf},
      {"exp2(-149)", lane(exp2(splat(-149.f))), 0x1p-149f},
      {"exp(-inf)", lane(exp(splat(-inf))), 0.f},        {"exp(inf)", lane(exp(splat(inf))), inf},
      {"exp(nan)", lane(exp(splat(nan))), nan},          {"exp(0)", lane(exp(splat(0.f))), 1.f},
      {"exp(-0)", lane(exp(splat(-0.f))), 1.f},          {"exp(3e38)", lane(exp(splat(3e38f))), inf},
      {"expm1_unit(0)", lane(expm1_unit(splat(0.f))), 0.f}, {"expm1_unit(-0)", lane(expm1_unit(splat(-0.f))), -0.f},
      {"expm1_unit(-2^-149)", lane(expm1_unit(splat(-0x1p-149f))), -0x1p-149f},
      {"expm1_unit(nan)", lane(expm1_unit(splat(nan))), nan},
      {"log1p_unit(0)", lane(log1p_unit(splat(0.f))), 0.f}, {"log1p_unit(nan)", lane(log1p_unit(splat(nan))), nan},
      {"log1p_unit(2^-149)", lane(log1p_unit(splat(0x1p-149f))), 0x1p-149f},
      {"softplus'(21)", lane(softplus_derivative(splat(21.f))), 1.f},
      {"softplus'(-inf)", lane(softplus_derivative(splat(-inf))), 0.f},
      {"softplus(-inf)", lane(softplus(splat(-inf))), 0.f}, {"softplus(inf)", lane(softplus(splat(inf))), inf},
      {"softplus(nan)", lane(softplus(splat(nan))), nan},
      {"sigmoid(-inf)", lane(sigmoid(splat(-inf))), 0.f}, {"sigmoid(inf)", lane(sigmoid(splat(inf))), 1.f},
      {"sigmoid(nan)", lane(sigmoid(splat(nan))), nan},
      {"at_least(nan, 1)", lane(at_least(splat(nan), 1.f)), nan}, {"at_most(nan, 1)", lane(at_most(splat(nan), 1.f)), nan},
      {"at_least(-2, 1)", lane(at_least(splat(-2.f), 1.f)), 1.f}, {"at_most(2, 1)", lane(at_most(splat(2.f), 1.f)), 1.f},
      {"splat(-0)", lane(splat(-0.f)), -0.f},
      {"nearest(0.5)", lane(nearest(splat(0.5f))), 0.f}, {"nearest(1.5)", lane(nearest(splat(1.5f))), 2.f},
      {"fma(2, 3, 1)", lane(fma(splat(2.f), splat(3.f), splat(1.f))), 7.f},
      {"fnma(2, 3, 1)", lane(fnma(splat(2.f), splat(3.f), splat(1.f))), -5.f},
  };
  for (const auto& row : rows) expect(same(row.got, row.want), row.name, row.got);
  float counted[W];
  for (int i = 0; i < W; ++i) counted[i] = float(i + 1);
  expect(sum(load(counted)) == W * (W + 1) / 2, "sum", sum(load(counted)));
  std::printf("%zu edge cases\n", sizeof rows / sizeof *rows + 1);
}

float widen_f16_exact(uint16_t h) {   // by the definition of the format
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double sign = h & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? NAN : float(sign * INFINITY);
  return float(sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24)));
}

// Of the two neighbours on the grid of the 16-bit dtype the nearer one, or the even one: found by trying both.
uint16_t nearest_bits(float f, float (*widen)(uint16_t), uint16_t infinity) {
  const uint16_t sign = f < 0 || (f == 0 && std::signbit(f)) ? 0x8000 : 0;
  const double x = std::fabs(double(f));
  int low = 0, high = infinity;                      // widen(low) <= x < widen(high)
  if (x == INFINITY) return sign | infinity;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (widen(uint16_t(middle)) <= x ? low : high) = middle;
  }
  // Past the largest finite value the grid goes on by one more step, to where rounding becomes infinity.
  const double below = widen(uint16_t(low));
  const double above = high == infinity ? 2 * below - widen(uint16_t(low - 1)) : double(widen(uint16_t(high)));
  const double down = x - below, up = above - x;
  return sign | uint16_t(down < up || (down == up && low % 2 == 0) ? low : high);
}

template <class T> void sixteen_bits(const char* name, float (*widen)(uint16_t), uint16_t infinity) {
  int wrong = 0;
  for (uint32_t i = 0; i < 65536; i += W) {          // every value to float32 and back
    T there[W], back[W];
    float wide[W];
    for (int j = 0; j < W; ++j) there[j].bits = uint16_t(i + j);
    const vf v = load(there);
    store(wide, v);
    store(back, v);
    for (int j = 0; j < W; ++j) {
      const float exact = widen(there[j].bits);
      wrong += !same(wide[j], exact);
      wrong += exact != exact ? (back[j].bits & 0x7fff) <= infinity : back[j].bits != there[j].bits;
    }
  }
  expect(wrong == 0, name, wrong);
  for (int i = 0; i < 400000; i += W) {              // random float32, half of them in float16's range
    float wide[W];
    T narrow[W];
    for (int j = 0; j < W; ++j) {
      const uint32_t bits = random_bits();
      wide[j] = bits_to_float((i / W) % 2 ? (bits & 0x8fffffff) | 0x30000000 : bits);
      if ((i / W) % 8 == 7) wide[j] = bits_to_float(float_to_bits(wide[j]) & ~0xfffu);   // ties
    }
    store(narrow, load(wide));
    for (int j = 0; j < W; ++j) {
      if (wide[j] != wide[j]) wrong += (narrow[j].bits & 0x7fff) <= infinity;
      else wrong += narrow[j].bits != nearest_bits(wide[j], widen, infinity);
    }
  }
  expect(wrong == 0, name, wrong);
  std::printf("%s: 65536 values there and back, 400000 roundings\n", name);
}

template <class T> void tails(const char* name, DType type) {   // partial vectors touch n elements and no more
  for (int n = 0; n <= W; ++n) {
    T memory[W + 1];
    for (auto& m : memory) std::memset(&m, 0x42, sizeof m);
    store(memory, splat(1.f), n);
    float back[W];
    store(back, load(View{memory, type, {}}, 0, n));
    for (int i = 0; i < W; ++i) expect(back[i] == (i < n ? 1.f : 0.f), name, n);
    T untouched;
    std::memset(&untouched, 0x42, sizeof untouched);
    expect(std::memcmp(&memory[n], &untouched, sizeof untouched) == 0, name, n);
  }
}

}  // namespace

int main() {
  std::printf("%d lanes\n", W);
  functions();
  edges();
  sixteen_bits<f16>("float16", widen_f16_exact, 0x7c00);
  sixteen_bits<bf16>("bfloat16", [](uint16_t h) { return bits_to_float(uint32_t(h) << 16); }, 0x7f80);
  tails<float>("float32 tail", DType::f32);
  tails<f16>("float16 tail", DType::f16);
  tails<bf16>("bfloat16 tail", DType::bf16);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
