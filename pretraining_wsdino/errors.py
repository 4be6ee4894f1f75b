"""The one error of this room: a setting or input that cannot be trained on, told in a sentence."""


class TrainingError(ValueError):
    """A setting or an input that training cannot use; the message names it and says the mend."""
