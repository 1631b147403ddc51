// _simt: the CUDA kernels, compiled for the CPU and run by the emulator. Importing it registers torch.ops.pyseq_simt;
// the functions below steer the emulator and tell what it saw.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "registry.h"
#include "simt/hooks.h"
#include "simt/intrinsics.h"
#include "simt/launch.h"

namespace {

std::map<std::string, int64_t> by_name(const simt::Traffic& t) {
  return {{"requests", t.requests}, {"sectors", t.sectors}, {"ideal_sectors", t.ideal_sectors},
          {"shared_requests", t.shared_requests}, {"wavefronts", t.wavefronts},
          {"ideal_wavefronts", t.ideal_wavefronts}};
}

// {kernel: {line: counts}}
std::map<std::string, std::map<std::string, std::map<std::string, int64_t>>> traffic() {
  std::map<std::string, std::map<std::string, std::map<std::string, int64_t>>> all;
  for (const auto& [kernel, places] : simt::record.traffic) {
    std::vector<const char*> codes;
    for (const auto& [code, counts] : places) codes.push_back(code);
    const std::vector<std::string> lines = simt::source_lines(codes);
    auto line = lines.begin();
    for (const auto& [code, counts] : places) {
      auto& sums = all[kernel][*line++];
      for (const auto& [name, count] : by_name(counts)) sums[name] += count;
    }
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.attr("cuda_ops") = pyseq::cuda_ops();
  m.def("set_schedule", [](int n) { simt::block.schedule.kind = n; },
        "order in which the threads of a block run: 0 ascending, 1 descending, n > 1 shuffled with seed n");
  m.def("set_block_order", [](int n) { simt::record.block_order.kind = n; }, "the same for the blocks of a grid");
  m.def("launches", [] { return simt::record.launches; }, "launches since the last reset(), by kernel name");
  m.def("last_error", [] { return simt::record.last_error; }, "why a launch returned an error; empty if none did");
  m.def("watches_races", [] { return simt::observe != nullptr; },
        "whether kernels were compiled so that races are found and traffic is counted");
  m.def("set_noise", [](uint64_t seed) { simt::noise_seed = seed; },
        "seed of the errors, of the size a GPU makes, in ex2, lg2, tanh_approx and reciprocal; 0: no errors");
  m.def("count_traffic", [](bool on) { simt::record.counts = on; }, "whether launches count sectors and wavefronts");
  m.def("traffic", traffic, "requests, sectors, wavefronts, and the fewest that would do, by kernel and line");
  m.def("reset", [] {
    simt::block.schedule = {}, simt::record.block_order = {}, simt::noise_seed = 0;
    simt::record.launches.clear(), simt::record.last_error.clear();
    simt::record.counts = false, simt::record.traffic.clear();
  }, "ascending orders, no noise, no launches, no error, no traffic");
}
