"""Names that programs took from the inside of neural-tangents 0.6."""

import neural_tangents as nt
import pytest


def test_kernel():
    with pytest.warns(DeprecationWarning, match="use neural_tangents.Kernel"):
        from neural_tangents._src.utils.kernel import Kernel
    with pytest.warns(DeprecationWarning, match="use neural_tangents.Kernel"):
        assert nt._src.utils.kernel.Kernel is Kernel is nt.Kernel


def test_layer():
    with pytest.warns(DeprecationWarning, match="use neural_tangents.stax.layer"):
        from neural_tangents._src.stax.requirements import layer
    assert layer is nt.stax.layer


def test_other_names():
    with pytest.raises(AttributeError, match="has no attribute 'Requirements'"):
        _ = nt._src.stax.requirements.Requirements
