"""nt-stax is written with public names of nt-core, as any layers are, and has the names of the archived stax."""

import ast
import importlib
import pathlib

import nt_stax

SOURCES = sorted(pathlib.Path(nt_stax.__file__).parent.glob("*.py"))


def imports_of_core():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nt_core"):
                yield from ((path.name, node.module, alias.name) for alias in node.names)


def test_only_public_names_of_nt_core_are_imported():
    imported = list(imports_of_core())
    assert imported
    for name, module, imported_name in imported:
        assert module in ("nt_core", "nt_core.authoring"), f"{name} imports from {module}"
        assert imported_name in importlib.import_module(module).__all__, f"{name} imports {imported_name}"


# Of neural-tangents 0.6.5.
REFERENCE = {
    "ABRelu",
    "Abs",
    "Aggregate",
    "AggregateImplementation",
    "AttentionMechanism",
    "AvgPool",
    "Bool",
    "Conv",
    "ConvLocal",
    "ConvTranspose",
    "Cos",
    "Dense",
    "Diagonal",
    "DotGeneral",
    "Dropout",
    "Elementwise",
    "ElementwiseNumerical",
    "Erf",
    "Exp",
    "ExpNormalized",
    "FanInConcat",
    "FanInProd",
    "FanInSum",
    "FanOut",
    "Flatten",
    "Gabor",
    "Gaussian",
    "Gelu",
    "GlobalAvgPool",
    "GlobalSelfAttention",
    "GlobalSumPool",
    "Hermite",
    "Identity",
    "ImageResize",
    "Index",
    "LayerNorm",
    "LeakyRelu",
    "MaskedArray",
    "Monomial",
    "Padding",
    "Polynomial",
    "PositionalEmbedding",
    "Rbf",
    "RectifiedMonomial",
    "Relu",
    "Sigmoid_like",
    "Sign",
    "Sin",
    "Slice",
    "SumPool",
    "layer",
    "parallel",
    "repeat",
    "requires",
    "serial",
    "supports_masking",
    "unmask_fn",
}


NEW = {
    "Embedding",
    "Celu",
    "Elu",
    "GEGLU",
    "GLU",
    "HardSigmoid",
    "HardSilu",
    "HardSwish",
    "HardTanh",
    "LogSigmoid",
    "Mish",
    "QuickGelu",
    "RMSNorm",
    "Relu6",
    "Scale",
    "Selu",
    "Sigmoid",
    "Silu",
    "Softplus",
    "SquaredRelu",
    "Squareplus",
    "SwiGLU",
    "Swish",
    "Tanh",
}


def test_all_names_of_the_reference_are_there():
    assert set(nt_stax.__all__) == REFERENCE | NEW
    assert all(hasattr(nt_stax, name) for name in nt_stax.__all__)
