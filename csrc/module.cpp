// The Python module _C: what was built and which instruction set runs. Operators reach torch through registry.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cuda/runtime.h"
#include "registry.h"

PYBIND11_MODULE(_C, m) {
  m.attr("cpu_level") = pyseq::cpu_level();   // a wrong PYSEQ_CPU raises here, at import
  m.attr("cpu_level_of_machine") = pyseq::cpu_level_of_machine();
  m.attr("cpu_has_avx512_bf16") = pyseq::cpu_has_avx512_bf16();
  m.attr("compiler") = std::string(__VERSION__);
#ifdef PYSEQ_WITH_CUDA
  m.attr("cuda_architectures") = std::string(PYSEQ_CUDA_ARCHITECTURES);
  m.attr("cuda_runtime_version") = pyseq::cuda_runtime_version();
  m.def("cuda_driver_version", pyseq::cuda_driver_version);
#else
  m.attr("cuda_architectures") = pybind11::none();
  m.attr("cuda_runtime_version") = 0;
  m.def("cuda_driver_version", [] { return 0; });
#endif
  m.attr("cpu_ops") = pyseq::cpu_ops();
  m.attr("cuda_ops") = pyseq::cuda_ops();
}
