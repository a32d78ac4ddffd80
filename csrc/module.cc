// The Python module nt_core._native: which FFI it was built for, and its handlers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "handler.h"
#include "job.h"
#include "xla/ffi/api/c_api.h"

namespace py = pybind11;

namespace {

py::dict registrations() {
  py::dict handlers;
  handlers["nt_propagate"] = py::capsule(reinterpret_cast<void*>(&nt_propagate));
  handlers["nt_backward"] = py::capsule(reinterpret_cast<void*>(&nt_backward));
  handlers["nt_tangents"] = py::capsule(reinterpret_cast<void*>(&nt_tangents));
  handlers["nt_products"] = py::capsule(reinterpret_cast<void*>(&nt_products));
  return handlers;
}

// The numbers that programs are written in.
py::dict schema() {
  py::dict ops, activations;
  for (int i = 0; i < nt::kNOps; ++i) ops[nt::kOps[i].name] = i;
  for (int i = 0; i < nt::kNActivations; ++i) activations[nt::kActivations[i].name] = i;
  py::dict schema;
  schema["encoding"] = nt::kEncoding;
  schema["max_axes"] = nt::kAxes;
  schema["max_degree"] = nt::kMaxDegree;
  schema["ops"] = ops;
  schema["activations"] = activations;
  return schema;
}

// Why an encoded program has no derivative, or None.
py::object refusal_of_derivative(py::array_t<int64_t, py::array::c_style> code) {
  try {
    nt::prepared(code.data(), code.size(), nt::Direction::kBackward);
    return py::none();
  } catch (const std::invalid_argument& error) {
    return py::str(error.what());
  }
}

template <class T>
using Numbers = py::array_t<T, py::array::c_style>;

// (variance1 after it, deficit, factor of the tangent kernel) of a nonlinearity. `activation` is what programs say of
// it: its number, and the shape of its table if it has one.
template <class T>
py::tuple dual(const std::vector<int>& activation, Numbers<T> coefficients, Numbers<T> variance1, Numbers<T> variance2,
               Numbers<T> deficit) {
  if (activation.empty() || activation[0] < 0 || activation[0] >= nt::kNActivations) {
    throw std::invalid_argument("activation");
  }
  const auto which = static_cast<nt::Activation>(activation[0]);
  nt::Table table;
  if (activation.size() == 11) {
    table = {activation[1], activation[2], activation[3], activation[4], activation[5],
             activation[6], activation[7], activation[8], activation[9], activation[10]};
  }
  const auto n = deficit.size();
  if (table.terms > nt::Table::kMostTerms || table.groups > nt::Table::kMostGroups)
    throw std::invalid_argument("table");
  if (coefficients.size() != nt::info(which).coefficients + table.size() || variance1.size() != n ||
      variance2.size() != n) {
    throw std::invalid_argument("sizes of arrays");
  }
  Numbers<T> variance_out(n), deficit_out(n), factor(n);
  const nt::DualJob<T> job{which,
                           table,
                           coefficients.data(),
                           n,
                           variance1.data(),
                           variance2.data(),
                           deficit.data(),
                           variance_out.mutable_data(),
                           deficit_out.mutable_data(),
                           factor.mutable_data()};
  if constexpr (sizeof(T) == 4) {
    nt::level().dual_float(job);
  } else {
    nt::level().dual_double(job);
  }
  return py::make_tuple(variance_out, deficit_out, factor);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def(
      "ffi_api_version", [] { return std::make_pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "The (major, minor) version of the XLA FFI that the handlers were compiled for.");
  m.def("registrations", &registrations, "The handlers: FFI target name -> capsule.");
  m.def("schema", &schema, "The encoding of programs: its version, and the numbers of operations and activations.");
  m.def("refusal_of_derivative", &refusal_of_derivative,
        "Why an encoded program has no native derivative, or None if it has one.");
  m.def("choose_level", &nt::choose_level,
        "Lowers the instruction set to the named one (baseline, avx2 or avx512; '' for the best that there is).");
  const char* about_dual =
      "A nonlinearity by itself, for tests: (activation, coefficients, variance1, variance2, deficit) -> (variance1 "
      "after it, deficit after it, factor of the tangent kernel).";
  m.def("dual", &dual<float>, py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(),
        py::arg().noconvert(), py::arg().noconvert(), about_dual);
  m.def("dual", &dual<double>, about_dual);
}
