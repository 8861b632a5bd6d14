"""Orthonormality and error modulation for very deep networks without shortcuts, on Keras 3 and TensorFlow."""

import keras

if keras.config.backend() != "tensorflow":
    raise ImportError(
        "ortho_keras needs Keras's TensorFlow backend: set the environment variable KERAS_BACKEND=tensorflow. "
        f"Received: backend={keras.config.backend()!r}"
    )

from ortho_keras.activations import ShiftedReLU, error_growth, shift_for_depth
from ortho_keras.batchnorm import BatchNormalizationEstimator, FusedBatchNormalization
from ortho_keras.callbacks import ModulationSwitch, SignalMonitor
from ortho_keras.decay import OrthonormalDecay
from ortho_keras.design import DesignReport, check_design
from ortho_keras.features import compare_features, compare_filters, plot_features, plot_filters
from ortho_keras.fold import fold_batchnorm
from ortho_keras.growth import grow
from ortho_keras.imagenet import plain_imagenet, residual_imagenet
from ortho_keras.initializers import DeltaOrthonormalInitializer, DiracInitializer, OrthonormalInitializer
from ortho_keras.kernels import orthonormality_error
from ortho_keras.loading import load_model
from ortho_keras.loss_scale import AllReplicaLossScaleOptimizer
from ortho_keras.mirror import MirrorConstraint, symmetrize
from ortho_keras.models import plain_cnn, residual_cnn
from ortho_keras.modulation import ErrorModulation, modulate, switch_modulation
from ortho_keras.muon import Muon
from ortho_keras.orthonormalize import OrthonormalizeReport, orthonormalize
from ortho_keras.patch_pca import PatchPCAInitializer
from ortho_keras.principal_start import start_from_patches
from ortho_keras.regularizer_variants import (
    ConvOrthogonalRegularizer,
    DoubleSoftOrthogonalRegularizer,
    MutualCoherenceRegularizer,
    SRIPRegularizer,
)
from ortho_keras.regularizers import OrthonormalRegularizer
from ortho_keras.schedules import LearningRate
from ortho_keras.signal_report import signal_report
from ortho_keras.signals import LayerSignal, SignalReport
from ortho_keras.version import __version__

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
    "LayerSignal",
    "LearningRate",
    "MirrorConstraint",
    "ModulationSwitch",
    "Muon",
    "MutualCoherenceRegularizer",
    "OrthonormalDecay",
    "OrthonormalInitializer",
    "OrthonormalRegularizer",
    "OrthonormalizeReport",
    "PatchPCAInitializer",
    "SRIPRegularizer",
    "ShiftedReLU",
    "SignalMonitor",
    "SignalReport",
    "__version__",
    "check_design",
    "compare_features",
    "compare_filters",
    "error_growth",
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
    "shift_for_depth",
    "signal_report",
    "start_from_patches",
    "switch_modulation",
    "symmetrize",
]
