"""The cards of what goes to the Hub: templates, and the code that fills them from measured results alone."""

from .build_card import metric_card, model_card

__all__ = ["metric_card", "model_card"]
