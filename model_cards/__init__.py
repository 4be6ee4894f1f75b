"""The cards of what goes to the Hub: templates, and the code that fills them from measured results alone."""

from .build_card import architecture_name, dataset_names, metric_card, model_card

__all__ = ["architecture_name", "dataset_names", "metric_card", "model_card"]
