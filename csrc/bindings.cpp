// hedgespec._native: raw pointers, shapes and strides in, nothing out. Validation lives in Python, beside each operation.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "hedgespec.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;  // of a tensor's first element; 0 stands for "not given"
using Shape = std::array<std::int64_t, 4>;

template <typename Element>
Element* at(Address address) {
  return reinterpret_cast<Element*>(address);
}

hedgespec::Dtype dtype(bool is_bfloat16) {
  return is_bfloat16 ? hedgespec::Dtype::bfloat16 : hedgespec::Dtype::float32;
}

void evaluate(Address target_logits, bool target_is_bfloat16, std::array<std::int64_t, 3> target_strides,
              Address drafter_logits, bool drafter_is_bfloat16, Shape drafter_strides, Shape drafter_shape,
              std::int64_t vocabulary, Address tokens, Address lengths, Address draft_to_target, Address target_threshold,
              Address drafter_threshold, float target_temperature, Address target_temperatures, float drafter_temperature,
              Address drafter_temperatures, Address out, int threads) {
  const auto [drafters, batch, positions, draft_vocabulary] = drafter_shape;
  const std::int64_t plane = drafters * batch * positions;
  hedgespec::evaluate_cpu({
      .drafters = drafters,
      .batch = batch,
      .positions = positions,
      .vocabulary = vocabulary,
      .draft_vocabulary = draft_vocabulary,
      .target_logits = at<const void>(target_logits),
      .target_dtype = dtype(target_is_bfloat16),
      .target_stride_batch = target_strides[0],
      .target_stride_position = target_strides[1],
      .drafter_logits = at<const void>(drafter_logits),
      .drafter_dtype = dtype(drafter_is_bfloat16),
      .drafter_stride_drafter = drafter_strides[0],
      .drafter_stride_batch = drafter_strides[1],
      .drafter_stride_position = drafter_strides[2],
      .tokens = at<const std::int64_t>(tokens),
      .lengths = at<const std::int64_t>(lengths),
      .draft_to_target = at<const std::int64_t>(draft_to_target),
      .target_threshold = at<const float>(target_threshold),
      .drafter_threshold = at<const float>(drafter_threshold),
      .target_temperature = {target_temperature, at<const float>(target_temperatures)},
      .drafter_temperature = {drafter_temperature, at<const float>(drafter_temperatures)},
      .acceptance_prob = at<float>(out),
      .acceptance_ratio = at<float>(out) + plane,
      .argmax_acceptance_prob = at<float>(out) + 2 * plane,
      .argmax_acceptance_ratio = at<float>(out) + 3 * plane,
      .threads = threads,
  });
}

void linear(Address x, std::int64_t x_stride, Address weight, Address out, std::int64_t rows, std::int64_t columns,
            std::int64_t inner, int threads) {
  hedgespec::linear_cpu({
      .rows = rows,
      .columns = columns,
      .inner = inner,
      .x = at<const float>(x),
      .x_stride = x_stride,
      .weight = at<const float>(weight),
      .out = at<float>(out),
      .threads = threads,
  });
}

// The clone of the row loops that runs on this machine.
const char* instruction_set() {
#if HEDGESPEC_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2, FMA)";
#endif
  return "the compiler's baseline";
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "HedgeSpec's CPU kernels; call them through hedgespec.evaluate and hedgespec.linear, which validate.";
  module.def("evaluate", &evaluate, py::call_guard<py::gil_scoped_release>());
  module.def("linear", &linear, py::call_guard<py::gil_scoped_release>());
  module.def("instruction_set", &instruction_set);
  module.attr("compiler") =
#if defined(__clang__)
      __VERSION__;
#elif defined(__GNUC__)
      "GCC " __VERSION__;
#else
      "an unnamed compiler";
#endif
  module.attr("openmp") =
#if defined(_OPENMP)
      true;
#else
      false;
#endif
}
