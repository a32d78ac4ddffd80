// The Python module nt_core._native: which FFI it was built for, and its handlers.
#include <pybind11/pybind11.h>

#include <utility>

#include "handler.h"
#include "xla/ffi/api/c_api.h"

namespace py = pybind11;

namespace {

py::dict registrations() {
  py::dict handlers;
  handlers["nt_propagate"] = py::capsule(reinterpret_cast<void*>(&nt_propagate));
  return handlers;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("ffi_api_version", [] { return std::make_pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
        "The (major, minor) version of the XLA FFI that the handlers were compiled for.");
  m.def("registrations", &registrations, "The handlers: FFI target name -> capsule.");
}
