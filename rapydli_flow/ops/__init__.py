"""What every operator means: shapes, reference, index formula, gradient. One file holds an op and its gradients.

May import floors 0 and 1 only. How ops run fast lives in `cpu_kernels` and `gpu_kernels`, which meet
them by family name. `registry` maps names to ops; adding a file here adds its ops to the one suite.
"""

from .base import Op, Reject, Sample, Symbol, operand_names, registry, spec_of
from .conv import Conv, ConvFilterGrad, ConvInputGrad
from .dense import Matmul
from .dropout import Dropout
from .loss import Correct, CrossEntropy, CrossEntropyGrad, Softmax, SoftmaxGrad
from .norm import (
    Moments,
    MomentsGrad,
    Normalize,
    NormalizeGrad,
    NormalizeSums,
    Statistics,
    StatisticsGrad,
    StatisticsSumsGrad,
)
from .pointwise import (
    Add,
    Cast,
    Copy,
    Divide,
    Multiply,
    Pointwise,
    Relu,
    ReluGrad,
    Scale,
    Subtract,
    Tanh,
    TanhGrad,
)
from .pool import MaxPool, MaxPoolGrad, SumPool, SumPoolGrad
from .reduce import Broadcast, Sum
from .shape import Reshape
from .source import Fill, Leaf, Normal, Phase
from .update import Adam, BiasCorrection, ConstantRate, CosineDecay, Descent, Momentum, StepDecay

__all__ = [
    "Adam",
    "Add",
    "BiasCorrection",
    "Broadcast",
    "Cast",
    "ConstantRate",
    "Conv",
    "ConvFilterGrad",
    "ConvInputGrad",
    "Copy",
    "Correct",
    "CosineDecay",
    "CrossEntropy",
    "CrossEntropyGrad",
    "Descent",
    "Divide",
    "Dropout",
    "Fill",
    "Leaf",
    "Matmul",
    "MaxPool",
    "MaxPoolGrad",
    "Moments",
    "MomentsGrad",
    "Momentum",
    "Multiply",
    "Normal",
    "Normalize",
    "NormalizeGrad",
    "NormalizeSums",
    "Op",
    "Phase",
    "Pointwise",
    "Reject",
    "Relu",
    "ReluGrad",
    "Reshape",
    "Sample",
    "Scale",
    "Softmax",
    "SoftmaxGrad",
    "Statistics",
    "StatisticsGrad",
    "StatisticsSumsGrad",
    "StepDecay",
    "Subtract",
    "Sum",
    "SumPool",
    "SumPoolGrad",
    "Symbol",
    "Tanh",
    "TanhGrad",
    "operand_names",
    "registry",
    "spec_of",
]
