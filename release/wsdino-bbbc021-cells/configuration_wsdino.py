"""The WS-DINO configuration: the shape of the vision transformer and the channels it was trained on."""

from dataclasses import field
from typing import Literal

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
    mlp_type : {"gelu", "swiglu"}
        The MLP's nonlinearity: an exact GELU, or the gated SiLU of DINOv2's largest network.
    layer_scale : bool
        Whether each residual branch is multiplied by a learned vector, as in DINOv2.
    patch_size : int
        Side of a square patch in pixels; divides `image_size`.
    image_size : int
        Side in pixels of the square image whose patches the position embeddings stand for. Images of any other
        multiple of the patch size work too, with interpolated position embeddings.
    patch_embedding : {"linear", "convolutional"}
        How patches become tokens: one linear layer per patch, as in DINO, or a stem of 3x3 convolutions, which halve
        the image log2(`patch_size`) times (see `WSDinoConvolutionalStem`). The stem suits training from random
        weights on small screens; it needs a `patch_size` that is a power of two.
    position_interpolation : {"dino", "resize", "antialias"}
        How position embeddings are interpolated (see `WSDinoEmbeddings`): as the original DINO does, as transformers
        resizes those of ViT-MAE and DINOv2, or with antialiasing, as DINOv2 with registers and timm do.
    num_register_tokens : int
        Further learned tokens beside the CLS token ("Vision Transformers Need Registers", arXiv 2309.16588).
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
        The values cannot make a network.
    """

    model_type = "wsdino"

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    mlp_ratio: int | float = 4
    mlp_type: Literal["gelu", "swiglu"] = "gelu"
    layer_scale: bool = False
    patch_size: int = 8
    image_size: int = 224
    patch_embedding: Literal["linear", "convolutional"] = "linear"
    position_interpolation: Literal["dino", "resize", "antialias"] = "dino"
    num_register_tokens: int = 0
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
        for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}: change one."
                )
        halvings = self.patch_size.bit_length() - 1  # the stem's width doubles at each convolution but the first
        if self.patch_embedding == "convolutional" and (
            self.patch_size != 2**halvings or halvings < 1 or self.hidden_size % 2 ** (halvings - 1)
        ):
            raise ValueError(
                f"a convolutional stem needs a patch_size that is a power of two and a hidden_size that is a multiple "
                f"of its half, but they are {self.patch_size} and {self.hidden_size}."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, but is {self.drop_path_rate}.")
        self.channel_names = list(self.channel_names)
        if not all(name.isidentifier() for name in self.channel_names):  # names of sub-modules and feature columns
            raise ValueError(
                f"channel_names {self.channel_names} are not all made of letters, digits and underscores."
            )
        if len(set(self.channel_names)) < len(self.channel_names):
            raise ValueError(f"channel_names {self.channel_names} name a channel twice.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As everywhere in transformers, but another architecture's config is refused: all weights would be random."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"this is the config of a {kind!r} model, not of WS-DINO: convert it with wsdino-convert."
            )
        return super().from_dict(config_dict, **kwargs)


__all__ = ["WSDinoConfig"]
