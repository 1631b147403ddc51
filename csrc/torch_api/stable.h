// Everything of torch that a binding may use: the stable ABI, in the part that torch 2.10 and later share.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "cuda/runtime.h"
#include "view.h"

// libtorch_cuda is not linked: on a CPU build of torch this is null, on a CUDA build it is the real function.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace pyseq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Library = torch::stable::detail::StableLibrary;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// A tensor whose last axis is contiguous as it stands; any other is copied once.
inline Tensor rows_contiguous(const Tensor& t) {
  return t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}
inline OptionalTensor rows_contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(rows_contiguous(*t)) : std::nullopt;
}

inline Tensor cast(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }
inline Tensor as_float32(const Tensor& t) {   // contiguous float32: weights, A, D, biases
  const Tensor wide = cast(t, ScalarType::Float);
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}
inline OptionalTensor as_float32(const OptionalTensor& t) { return t ? OptionalTensor(as_float32(*t)) : std::nullopt; }

inline View view(const Tensor& t) {
  View v{t.mutable_data_ptr(), dtype_of(t), {}};
  for (int64_t i = 0; i + 1 < t.dim() && i < 4; ++i) v.stride[i] = t.stride(i);
  return v;
}
inline View view(const OptionalTensor& t) { return t ? view(*t) : View{}; }

// The public functions name what is wrong. Loops that call a kernel without them still cannot read out of bounds.
inline void expect_sizes(const char* argument, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool equal = t.dim() == int64_t(sizes.size());
  for (int64_t i = 0; equal && i < t.dim(); ++i) equal = t.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(equal, argument, " does not have the shape that the other arguments ask for");
}
inline void expect_sizes(const char* argument, const OptionalTensor& t, std::initializer_list<int64_t> sizes) {
  if (t) expect_sizes(argument, *t, sizes);
}

// Uninitialised and contiguous, on the device of `like`. One C call: the dispatcher would look the operator up by name.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  constexpr size_t kMostAxes = 16;
  STD_TORCH_CHECK(sizes.size() <= kMostAxes, "a tensor of more than 16 axes");
  int64_t strides[kMostAxes], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device, like.get_device_index(), &made));
  return Tensor(made);
}
inline Tensor new_tensor_like(const Tensor& like, ScalarType type) { return new_tensor(like, like.sizes(), type); }
inline Tensor absent(const Tensor& like) { return new_tensor(like, {0}, ScalarType::Float); }   // no optional returns

inline float* floats(const Tensor& t) { return t.mutable_data_ptr<float>(); }
inline float* floats(const OptionalTensor& t) { return t ? floats(*t) : nullptr; }

// Which twin a binding calls. The emulator's module registers the CUDA twin for CPU tensors.
enum class Twin { cpu, cuda };

// Work units [0, units) over torch's own threads; `grain` units are worth waking a thread for (20 us).
template <class F> void parallel(int64_t units, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, units, grain, f);
}

// Where a CUDA kernel runs: the tensor's device, on torch's current stream. On the emulator: here, now.
struct Launch {
#ifdef PYSEQ_SIMT
  void* stream = nullptr;
  explicit Launch(const Tensor&) {}
#else
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  explicit Launch(const Tensor& t) : guard(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
#endif
};

inline void check_launch(const char* kernel, int error) {
  STD_TORCH_CHECK(error == 0, "pyseq.", kernel, ": ", launch_error(error));
}

}  // namespace pyseq
