// hedgespec._native.ForwardModel: the addresses of a decoder stack's weights, and its forward over few tokens. Arguments are
// checked in hedgespec/runtime/native_forward.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "forward.h"

namespace py = pybind11;
namespace forward = hedgespec::forward;

namespace {

template <typename Element = const void>
Element* at(std::uintptr_t address) {
  return reinterpret_cast<Element*>(address);
}

template <typename Value>
Value get(const py::dict& fields, const char* name) {
  return fields[name].cast<Value>();
}

forward::Layer layer_of(const py::dict& fields) {
  const auto weight = [&](const char* name) { return at(get<std::uintptr_t>(fields, name)); };
  const auto table = [&](const char* name) { return at<const float>(get<std::uintptr_t>(fields, name)); };
  return {
      .query = weight("query"), .key = weight("key"), .value = weight("value"), .output = weight("output"),
      .query_bias = weight("query_bias"), .key_bias = weight("key_bias"), .value_bias = weight("value_bias"),
      .output_bias = weight("output_bias"), .query_norm = weight("query_norm"), .key_norm = weight("key_norm"),
      .gate = weight("gate"), .up = weight("up"), .down = weight("down"), .input_norm = weight("input_norm"),
      .attention_norm = weight("attention_norm"), .mlp_norm = weight("mlp_norm"),
      .mlp_output_norm = weight("mlp_output_norm"), .window = get<std::int64_t>(fields, "window"),
      .cosine = table("cosine"), .sine = table("sine"),
  };
}

forward::Model model_of(const py::dict& fields, const std::vector<py::dict>& layers) {
  const auto size = [&](const char* name) { return get<std::int64_t>(fields, name); };
  const auto scale = [&](const char* name) { return get<float>(fields, name); };
  const auto weight = [&](const char* name) { return at(get<std::uintptr_t>(fields, name)); };
  forward::Model model{
      .bfloat16 = get<bool>(fields, "bfloat16"), .hidden = size("hidden"), .heads = size("heads"),
      .kv_heads = size("kv_heads"), .head_dim = size("head_dim"), .intermediate = size("intermediate"),
      .vocabulary = size("vocabulary"), .rotary = size("rotary"), .epsilon = scale("epsilon"),
      .norm_offset = scale("norm_offset"), .attention_scale = scale("attention_scale"),
      .attention_softcap = scale("attention_softcap"), .embedding_scale = scale("embedding_scale"),
      .activation = static_cast<forward::Activation>(get<int>(fields, "activation")), .embedding = weight("embedding"),
      .norm = weight("norm"), .head = weight("head"), .layers = {},
  };
  for (const py::dict& layer : layers) model.layers.push_back(layer_of(layer));
  return model;
}

using Numbers = std::vector<std::int64_t>;

void run(const forward::Model& model, std::int64_t width, std::uintptr_t tokens, const Numbers& lengths, const Numbers& counts,
         std::uintptr_t depths, std::uintptr_t ancestors, const Numbers& keys, const Numbers& values, std::int64_t capacity,
         std::int64_t keep, std::uintptr_t logits, const Numbers& aux_layers, std::uintptr_t aux_states, std::int64_t threads) {
  const forward::Call call{
      .rows = static_cast<std::int64_t>(lengths.size()), .width = width, .threads = threads,
      .tokens = at<const std::int64_t>(tokens), .lengths = lengths.data(), .counts = counts.data(),
      .depths = at<const std::int64_t>(depths), .ancestors = at<const bool>(ancestors), .keys = keys.data(),
      .values = values.data(), .capacity = capacity, .keep = keep, .logits = at<float>(logits),
      .aux_layers = aux_layers.data(), .aux = static_cast<std::int64_t>(aux_layers.size()), .aux_states = at<void>(aux_states),
  };
  py::gil_scoped_release released;
  forward::run(model, call);
}

}  // namespace

void bind_forward(py::module_& module) {
  py::class_<forward::Model>(module, "ForwardModel", py::module_local()).def(py::init(&model_of)).def("run", &run);
  module.def("forward_instruction_set", &forward::instruction_set);
}
