// hedgespec._native: raw pointers, shapes and strides in, nothing out. Validation lives in Python, beside each operation.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "hedgespec.h"

#if !defined(HEDGESPEC_MODULE)
#define HEDGESPEC_MODULE _native  // the tests build another one, with the CUDA kernels on the CPU
#endif

namespace py = pybind11;

void bind_forward(py::module_& module);
void bind_suffix_automaton(py::module_& module);

namespace {

using Address = std::uintptr_t;  // of a tensor's first element; 0 stands for "not given"
using Shape = std::array<std::int64_t, 4>;

template <typename Element>
Element* at(Address address) {
  return reinterpret_cast<Element*>(address);
}

using Triple = std::array<std::int64_t, 3>;

hedgespec::EvaluateParams evaluate_params(Shape drafter_shape, std::int64_t vocabulary, Address target_logits,
                                          int target_dtype, Triple target_strides, Address drafter_logits,
                                          int drafter_dtype, Shape drafter_strides, Address tokens, Address lengths,
                                          Address draft_to_target, Address target_threshold, Address drafter_threshold,
                                          float target_temperature, Address target_temperatures, float drafter_temperature,
                                          Address drafter_temperatures, std::int64_t top_k, std::int64_t draft_length,
                                          bool product_estimator, int length_plane, Address planes,
                                          Address expected_accepted_length, Address length_losses) {
  const auto [drafters, batch, positions, draft_vocabulary] = drafter_shape;
  const auto plane = [&](int index) { return at<float>(planes) + index * drafters * batch * positions; };
  return {
      .drafters = drafters,
      .batch = batch,
      .positions = positions,
      .vocabulary = vocabulary,
      .draft_vocabulary = draft_vocabulary,
      .target_logits = at<const void>(target_logits),
      .target_dtype = static_cast<hedgespec::Dtype>(target_dtype),
      .target_stride_batch = target_strides[0],
      .target_stride_position = target_strides[1],
      .drafter_logits = at<const void>(drafter_logits),
      .drafter_dtype = static_cast<hedgespec::Dtype>(drafter_dtype),
      .drafter_stride_drafter = drafter_strides[0],
      .drafter_stride_batch = drafter_strides[1],
      .drafter_stride_position = drafter_strides[2],
      .tokens = at<const std::int64_t>(tokens),
      .lengths = at<const std::int64_t>(lengths),
      .draft_to_target = at<const std::int32_t>(draft_to_target),
      .target_threshold = at<const float>(target_threshold),
      .drafter_threshold = at<const float>(drafter_threshold),
      .target_temperature = {target_temperature, at<const float>(target_temperatures)},
      .drafter_temperature = {drafter_temperature, at<const float>(drafter_temperatures)},
      .top_k = top_k,
      .draft_length = draft_length,
      .product_estimator = product_estimator,
      .length_prob = plane(length_plane),
      .length_ratio = plane(length_plane + 1),
      .acceptance_prob = plane(0),
      .acceptance_ratio = plane(1),
      .argmax_acceptance_prob = plane(2),
      .argmax_acceptance_ratio = plane(3),
      .top_k_acceptance = top_k ? plane(4) : nullptr,
      .expected_accepted_length = at<float>(expected_accepted_length),
      .length_losses = at<float>(length_losses),
  };
}

hedgespec::VerifyParams verify_params(Shape shape, Address target_logits, int target_dtype, Triple target_strides,
                                      Address draft_logits, int draft_dtype, Triple draft_strides, Address draft_tokens,
                                      Address uniforms, bool uniforms_are_float64, Address lengths, Address draft_to_target,
                                      std::int64_t map_stride_batch, Address target_threshold, Address draft_threshold,
                                      float target_temperature, Address target_temperatures, float draft_temperature,
                                      Address draft_temperatures, Address accepted_length, Address tokens) {
  const auto [batch, draft_length, vocabulary, draft_vocabulary] = shape;
  return {
      .batch = batch,
      .draft_length = draft_length,
      .vocabulary = vocabulary,
      .draft_vocabulary = draft_vocabulary,
      .target_logits = at<const void>(target_logits),
      .target_dtype = static_cast<hedgespec::Dtype>(target_dtype),
      .target_stride_batch = target_strides[0],
      .target_stride_position = target_strides[1],
      .draft_logits = at<const void>(draft_logits),
      .draft_dtype = static_cast<hedgespec::Dtype>(draft_dtype),
      .draft_stride_batch = draft_strides[0],
      .draft_stride_position = draft_strides[1],
      .draft_tokens = at<const std::int64_t>(draft_tokens),
      .uniforms = at<const void>(uniforms),
      .uniforms_are_float64 = uniforms_are_float64,
      .lengths = at<const std::int64_t>(lengths),
      .draft_to_target = at<const std::int32_t>(draft_to_target),
      .map_stride_batch = map_stride_batch,
      .target_threshold = at<const float>(target_threshold),
      .draft_threshold = at<const float>(draft_threshold),
      .target_temperature = {target_temperature, at<const float>(target_temperatures)},
      .draft_temperature = {draft_temperature, at<const float>(draft_temperatures)},
      .accepted_length = at<std::int64_t>(accepted_length),
      .tokens = at<std::int64_t>(tokens),
  };
}

using Pair = std::array<std::int64_t, 2>;

void linear(Shape shape, Address x, Pair x_strides, Address which, Address weight, Address index, std::int64_t table_rows,
            Address out, int threads) {
  const auto [heads, rows, columns, inner] = shape;
  hedgespec::linear_cpu({
      .heads = heads,
      .rows = rows,
      .columns = columns,
      .inner = inner,
      .x = at<const float>(x),
      .x_stride_head = x_strides[0],
      .x_stride_row = x_strides[1],
      .which = at<const std::int64_t>(which),
      .weight = at<const float>(weight),
      .index = at<const std::int64_t>(index),
      .table_rows = table_rows,
      .out = at<float>(out),
      .threads = threads,
  });
}

void stack_rms_norm(Triple shape, Address x, Pair x_strides, Address which, Address weight, float eps, Address out,
                    int threads) {
  const auto [heads, rows, width] = shape;
  hedgespec::stack_rms_norm_cpu({
      .heads = heads,
      .rows = rows,
      .width = width,
      .x = at<const float>(x),
      .x_stride_head = x_strides[0],
      .x_stride_row = x_strides[1],
      .which = at<const std::int64_t>(which),
      .weight = at<const float>(weight),
      .eps = eps,
      .out = at<float>(out),
      .threads = threads,
  });
}

void swiglu(Address gate_up, Address out, std::int64_t rows, std::int64_t width, int threads) {
  hedgespec::swiglu_cpu(at<const float>(gate_up), at<float>(out), rows, width, threads);
}

void rotary_append(std::array<std::int64_t, 6> shape, Address qkv, Address frequency, Address positions, Address slots,
                   Address batch_rows, Address which, Address keys, Address values, std::array<std::int64_t, 5> strides,
                   Address queries, int threads) {
  const auto [heads, rows, steps, attention_heads, kv_heads, head_dim] = shape;
  hedgespec::rotary_append_cpu({
      .heads = heads,
      .rows = rows,
      .steps = steps,
      .attention_heads = attention_heads,
      .kv_heads = kv_heads,
      .head_dim = head_dim,
      .qkv = at<const float>(qkv),
      .frequency = at<const float>(frequency),
      .positions = at<const std::int64_t>(positions),
      .slots = at<const std::int64_t>(slots),
      .batch_rows = at<const std::int64_t>(batch_rows),
      .which = at<const std::int64_t>(which),
      .keys = at<float>(keys),
      .values = at<float>(values),
      .stride_head = strides[0],
      .stride_batch = strides[1],
      .stride_kv_head = strides[2],
      .stride_slot = strides[3],
      .queries = at<float>(queries),
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

PYBIND11_MODULE(HEDGESPEC_MODULE, module) {
  module.doc() = "HedgeSpec's compiled kernels; call them through the package's operations, which validate.";
  const py::call_guard<py::gil_scoped_release> without_the_gil;
  py::class_<hedgespec::EvaluateParams>(module, "EvaluateParams", py::module_local()).def(py::init(&evaluate_params));
  py::class_<hedgespec::VerifyParams>(module, "VerifyParams", py::module_local()).def(py::init(&verify_params));
  module.def("evaluate_cpu", &hedgespec::evaluate_cpu, without_the_gil);
  module.def("verify_cpu", &hedgespec::verify_cpu, without_the_gil);
#if defined(HEDGESPEC_CUDA)
  module.attr("cuda") = HEDGESPEC_CUDA;  // the architectures it was built for
  module.def("evaluate_cuda_workspace_bytes", &hedgespec::evaluate_cuda_workspace_bytes);
  module.def("verify_cuda_workspace_bytes", &hedgespec::verify_cuda_workspace_bytes);
  module.def("evaluate_cuda", [](const hedgespec::EvaluateParams& params, Address workspace, Address stream) {
    hedgespec::evaluate_cuda(params, at<void>(workspace), at<void>(stream));
  });
  module.def("verify_cuda", [](const hedgespec::VerifyParams& params, Address workspace, Address stream) {
    hedgespec::verify_cuda(params, at<void>(workspace), at<void>(stream));
  });
#else
  module.attr("cuda") = "";
#endif
  module.def("linear", &linear, without_the_gil);
  module.def("stack_rms_norm", &stack_rms_norm, without_the_gil);
  module.def("swiglu", &swiglu, without_the_gil);
  module.def("rotary_append", &rotary_append, without_the_gil);
  bind_forward(module);
  bind_suffix_automaton(module);
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
