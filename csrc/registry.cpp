// The index of the package: each op's kernels by name, one list for the CPU and one for CUDA. Schemas, fake kernels and
// gradients are in pyseq/ops/<op>.py; what is registered here is only how to compute.
#include "registry.h"

#include "torch_api/stable.h"

namespace pyseq {

namespace causal_conv1d { void cpu(Library&); void cuda(Library&); }
namespace delta_rule { void cpu(Library&); void cuda(Library&); }
namespace ema { void cpu(Library&); void cuda(Library&); }
namespace gated_delta_rule { void cpu(Library&); void cuda(Library&); }
namespace linear { void cpu(Library&); }
namespace mamba2_step { void cpu(Library&); void cuda(Library&); }
namespace mamba_step { void cpu(Library&); void cuda(Library&); }
namespace rms_norm_gated { void cpu(Library&); void cuda(Library&); }
namespace selective_scan { void cpu(Library&); void cuda(Library&); }
namespace ssd { void cpu(Library&); void cuda(Library&); }

namespace {

struct Entry {
  const char* op;
  void (*implement)(Library&);
};

constexpr Entry kCpu[] = {
    {"causal_conv1d", causal_conv1d::cpu},
    {"delta_rule", delta_rule::cpu},
    {"ema", ema::cpu},
    {"gated_delta_rule", gated_delta_rule::cpu},
    {"linear", linear::cpu},
    {"mamba2_step", mamba2_step::cpu},
    {"mamba_step", mamba_step::cpu},
    {"rms_norm_gated", rms_norm_gated::cpu},
    {"selective_scan", selective_scan::cpu},
    {"ssd", ssd::cpu},
};

#ifdef PYSEQ_WITH_CUDA
constexpr Entry kCuda[] = {
    {"causal_conv1d", causal_conv1d::cuda},
    {"delta_rule", delta_rule::cuda},
    {"ema", ema::cuda},
    {"gated_delta_rule", gated_delta_rule::cuda},
    {"mamba2_step", mamba2_step::cuda},
    {"mamba_step", mamba_step::cuda},
    {"rms_norm_gated", rms_norm_gated::cuda},
    {"selective_scan", selective_scan::cuda},
    {"ssd", ssd::cuda},
};
#endif

}  // namespace

std::vector<std::string> cpu_ops() {
  std::vector<std::string> names;
  for (const Entry& entry : kCpu) names.push_back(entry.op);
  return names;
}

std::vector<std::string> cuda_ops() {
  std::vector<std::string> names;
#ifdef PYSEQ_WITH_CUDA
  for (const Entry& entry : kCuda) names.push_back(entry.op);
#endif
  return names;
}

#ifdef PYSEQ_SIMT
STABLE_TORCH_LIBRARY_IMPL(pyseq_simt, CPU, m) {
  for (const Entry& entry : kCuda) entry.implement(m);
}
#else
STABLE_TORCH_LIBRARY_IMPL(pyseq, CPU, m) {
  for (const Entry& entry : kCpu) entry.implement(m);
}
#ifdef PYSEQ_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pyseq, CUDA, m) {
  for (const Entry& entry : kCuda) entry.implement(m);
}
#endif
#endif

}  // namespace pyseq
