// One faulty kernel, named by the argument, on buffers of the exact size. Built with the sanitizers.
#include <cstdio>
#include <cstring>
#include <memory>

#include "pipeline.cu"
#include "planted.cu"

int main(int, char** argument) {
  constexpr int n = 40;
  const auto x = std::make_unique<float[]>(n), y = std::make_unique<float[]>(n);
  const char* fault = argument[1];
  if (!std::strcmp(fault, "past_global")) past_global(x.get(), y.get(), n);
  if (!std::strcmp(fault, "past_copy")) reverse_tiles(x.get(), std::make_unique<float[]>(64).get(), n + 1, 4, 0);
  if (!std::strcmp(fault, "past_dynamic")) past_dynamic(y.get(), 32);
  if (!std::strcmp(fault, "past_static")) past_static(y.get(), 1);
  if (!std::strcmp(fault, "none")) {
    unwritten_output(x.get(), y.get(), n);
    stale_static(x.get(), y.get(), 1);
    reverse_tiles(x.get(), std::make_unique<float[]>(64).get(), n, 16, 0);
    divergent_shuffle(std::make_unique<float[]>(64).get(), std::make_unique<float[]>(64).get(), 5);
    early_read(std::make_unique<float[]>(128).get(), std::make_unique<float[]>(128).get());   // over a forgotten block
  }
  std::puts("done");
}
