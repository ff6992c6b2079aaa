"""From a model and text to trained predictors: collect, train."""

from ..metrics import compute_top_k_accuracy
from .collect_training_data import collect_expert_usage
from .fit import FitOptions
from .layer_trainer import TrainingOptions
from .traces import TraceInfo, open_traces
from .train_shadow import train_shadow_model

__all__ = [
    "FitOptions",
    "TraceInfo",
    "TrainingOptions",
    "collect_expert_usage",
    "compute_top_k_accuracy",
    "open_traces",
    "train_shadow_model",
]
