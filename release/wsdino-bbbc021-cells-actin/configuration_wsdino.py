"""The WS-DINO configuration: the shape of the vision transformer and the channels it was trained on."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class WSDinoConfig(PreTrainedConfig):
    r"""
    Configuration of `WSDinoModel` (one tower) and `WSDinoMultiChannelModel` (one such tower per channel).
    The defaults are the ViT-S/8 of the paper (arXiv 2209.07819, section 3) with DINO's details (arXiv 2104.14294).

    Parameters
    ----------
    hidden_size : int
        Width of a token.
    num_hidden_layers : int
        Number of transformer blocks.
    num_attention_heads : int
        Number of heads; divides `hidden_size`.
    mlp_ratio : int or float
        Hidden width of the MLP over `hidden_size`.
    patch_size : int
        Side of a square patch in pixels; divides `image_size`.
    image_size : int
        Side in pixels of the square image whose patches the position embeddings stand for. Images of any other
        multiple of the patch size work too, with interpolated position embeddings.
    patch_embedding : {"linear", "convolutional"}
        How patches become tokens: one linear layer per patch, as in DINO, or a stem of 3x3 convolutions, which halve
        the image log2(`patch_size`) times (see `WSDinoConvolutionalStem`). The stem suits training from random
        weights on small screens; it needs a `patch_size` that is a power of two.
    drop_path_rate : float
        Stochastic depth of the last block, rising linearly from 0 at the first (0.1 on the student while training).
    layer_norm_eps : float
        Epsilon of every LayerNorm (1e-6 in DINO).
    qkv_bias : bool
        Whether queries, keys and values have a bias.
    initializer_range : float
        Standard deviation of the truncated normal initialisation.
    channel_names : list of str
        The fluorescence channel of each tower, in order: `["dna"]` for one tower, `["dna", "tubulin", "actin"]` for
        the combined model, empty when unknown (ImageNet weights).

    Raises
    ------
    ValueError
        The values cannot make a network; the message is one sentence.
    """

    model_type = "wsdino"

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    mlp_ratio: int | float = 4
    patch_size: int = 8
    image_size: int = 224
    patch_embedding: str = "linear"
    drop_path_rate: int | float = 0.0
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    initializer_range: float = 0.02
    channel_names: list[str] | tuple[str, ...] = field(default_factory=list)

    def __post_init__(self, **kwargs):
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_size", "image_size")
        for name in (*sizes, "layer_norm_eps", "initializer_range"):  # whose types `strict` has checked
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, but is {getattr(self, name)}.")
        if self.num_hidden_layers > 1000:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}: give at most 1000.")
        for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}: change one."
                )
        if self.patch_embedding not in ("linear", "convolutional"):
            raise ValueError(f"patch_embedding must be linear or convolutional, but is {self.patch_embedding!r}.")
        if self.patch_embedding == "convolutional":
            if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
                raise ValueError(f"patch_size {self.patch_size} is not a power of two, as a convolutional stem needs.")
            if self.hidden_size % (self.patch_size // 2):  # the width doubles at each convolution but the first
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of {self.patch_size // 2}, as a convolutional "
                    f"stem for patch_size {self.patch_size} needs."
                )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, but is {self.drop_path_rate}.")
        self.channel_names = list(self.channel_names)
        for name in self.channel_names:
            if not name.isidentifier():  # a channel names a sub-module and a feature column: no dots, no blanks
                raise ValueError(f"channel name {name!r} is not made of letters, digits and underscores: rename it.")
            if self.channel_names.count(name) > 1:
                raise ValueError(f"channel_names {self.channel_names} names a channel twice: name each channel once.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Refuses the config of another architecture, whose weights would not be found."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"this is the config of a {kind!r} model, not of WS-DINO: bring its weights over with wsdino-convert."
            )
        return super().from_dict(config_dict, **kwargs)


__all__ = ["WSDinoConfig"]
