// The engine as XLA custom calls.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* nt_propagate(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* nt_backward(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* nt_tangents(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* nt_products(XLA_FFI_CallFrame* call_frame);
