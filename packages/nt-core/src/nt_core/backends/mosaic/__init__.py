"""Backends that carry offset planes through all layers up to the next pool in one Pallas kernel (see docs/gpu.md)."""
