// hedgespec._native.SuffixAutomaton. Arguments are checked in Python (hedgespec/drafters/suffix.py). No method releases the GIL,
// so threads take turns.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "suffix_automaton.h"

namespace py = pybind11;

namespace {

using Tokens = std::vector<std::int64_t>;

py::tuple as_tuple(const hedgespec::Continuation& one) { return py::make_tuple(one.token, one.length, one.count, one.total); }

py::list as_list(const std::vector<hedgespec::Continuation>& all) {
  py::list result(all.size());
  for (std::size_t index = 0; index < all.size(); ++index) result[index] = as_tuple(all[index]);
  return result;
}

}  // namespace

void bind_suffix_automaton(py::module_& module) {
  using Automaton = hedgespec::SuffixAutomaton;
  py::class_<Automaton>(module, "SuffixAutomaton", py::module_local())
      .def(py::init<std::int64_t>())
      .def("open", &Automaton::open)
      .def("close", &Automaton::close)
      .def("append",
           [](Automaton& self, std::int64_t text, const Tokens& tokens, std::int64_t keep) {
             std::vector<hedgespec::Continuation> kept(keep);
             self.append(text, tokens.data(), static_cast<std::int64_t>(tokens.size()), keep, kept.data());
             return as_list(kept);
           })
      .def("after",
           [](const Automaton& self, std::int64_t text, const Tokens& drafted) {
             return as_tuple(self.after(text, drafted.data(), static_cast<std::int64_t>(drafted.size())));
           })
      .def("all_after",
           [](const Automaton& self, std::int64_t text, const Tokens& drafted, std::int64_t most) {
             return as_list(self.all_after(text, drafted.data(), static_cast<std::int64_t>(drafted.size()), most));
           })
      .def("draft",
           [](const Automaton& self, std::int64_t text, std::int64_t count) {
             std::vector<hedgespec::Continuation> drafted(count);
             drafted.resize(self.draft(text, count, drafted.data()));
             return as_list(drafted);
           })
      .def("texts", &Automaton::texts)
      .def_property_readonly("tokens", &Automaton::tokens)
      .def_property_readonly("bytes", &Automaton::bytes);
}
