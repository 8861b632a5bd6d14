"""Orthonormality and error modulation for very deep networks without shortcuts, on Keras 3."""

import importlib.util
import os
import sys

if "keras" in sys.modules:
    os.environ.setdefault("KERAS_BACKEND", sys.modules["keras"].config.backend())
elif importlib.util.find_spec("tensorflow"):
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # whatever Keras's configuration file says

import ortho_keras.method.console  # noqa: F401 - before Keras imports TensorFlow

# isort: split
from ortho_keras.method.backend import NAME, require_tensorflow
from ortho_keras.method.chain import ModulationSwitch, modulate, switch_modulation
from ortho_keras.method.decay import OrthonormalDecay
from ortho_keras.method.design import DesignReport, check_design
from ortho_keras.method.initializers import DeltaOrthonormalInitializer, DiracInitializer, OrthonormalInitializer
from ortho_keras.method.kernels import orthonormality_error
from ortho_keras.method.loading import load_model
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.orthonormalize import OrthonormalizeReport, orthonormalize
from ortho_keras.method.regularizers import KernelRegularizer, OrthonormalRegularizer
from ortho_keras.method.related_regularizers import (
    ConvOrthogonalRegularizer,
    DoubleSoftOrthogonalRegularizer,
    MutualCoherenceRegularizer,
    SRIPRegularizer,
)
from ortho_keras.nets.batchnorm import BatchNormalizationEstimator, FusedBatchNormalization
from ortho_keras.nets.fold import fold_batchnorm
from ortho_keras.nets.growth import grow
from ortho_keras.nets.networks import plain_cnn, plain_imagenet, residual_cnn, residual_imagenet
from ortho_keras.nets.shifted_relu import ShiftedReLU, error_growth, shift_for_depth
from ortho_keras.version import __version__

if NAME == "tensorflow":
    from ortho_keras.diagnosis.features import plot_features, plot_filters
    from ortho_keras.diagnosis.monitor import SignalMonitor
    from ortho_keras.diagnosis.signal_report import signal_report
    from ortho_keras.diagnosis.signals import LayerSignal, SignalReport
    from ortho_keras.trainer.optimizers import AllReplicaLossScaleOptimizer, LearningRate, Muon
    from ortho_keras.trainer.recipe import Recipe
    from ortho_keras.trainer.recipes import find_preset
    from ortho_keras.trainer.run import run

__all__ = [
    "AllReplicaLossScaleOptimizer",
    "BatchNormalizationEstimator",
    "ConvOrthogonalRegularizer",
    "DeltaOrthonormalInitializer",
    "DesignReport",
    "DiracInitializer",
    "DoubleSoftOrthogonalRegularizer",
    "ErrorModulation",
    "FusedBatchNormalization",
    "KernelRegularizer",
    "LayerSignal",
    "LearningRate",
    "ModulationSwitch",
    "Muon",
    "MutualCoherenceRegularizer",
    "OrthonormalDecay",
    "OrthonormalInitializer",
    "OrthonormalRegularizer",
    "OrthonormalizeReport",
    "Recipe",
    "SRIPRegularizer",
    "ShiftedReLU",
    "SignalMonitor",
    "SignalReport",
    "__version__",
    "check_design",
    "error_growth",
    "find_preset",
    "fold_batchnorm",
    "grow",
    "load_model",
    "modulate",
    "orthonormality_error",
    "orthonormalize",
    "plain_cnn",
    "plain_imagenet",
    "plot_features",
    "plot_filters",
    "residual_cnn",
    "residual_imagenet",
    "run",
    "shift_for_depth",
    "signal_report",
    "switch_modulation",
]


def __getattr__(name):
    if name in __all__:
        require_tensorflow(f"ortho_keras.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
