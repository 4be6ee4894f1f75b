"""The WS-DINO pipeline: a field to its feature vector, in one call and in batches over a whole screen.

`pipeline("feature-extraction", model=<repository>, trust_remote_code=True)` finds this class in the repository itself.
"""

import warnings
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.pipelines.pt_utils import KeyDataset, PipelineDataset, PipelineIterator

OUTPUTS = ("features", "tiles", "patches", "attention")


class WSDinoFeatureExtractionPipeline(Pipeline):
    """
    Extract features of fluorescence fields: tiles, CLS token of each, median over the tiles.

    A repository of one channel gives `hidden_size` numbers a field (384 for ViT-S); the combined repository
    gives those
    of its channels side by side, divided by their Euclidean norm (1152), as profiles are compared in the paper.

    Parameters (of the pipeline, or of one call)
    ----------
    outputs : {"features", "tiles", "patches", "attention"}
        `features` (default): one vector a field, `(hidden,)`. `tiles`: the CLS token of every tile, `(tiles, hidden)`.
        `patches`: the patch tokens, `(tiles, h, w, hidden)`. `attention`: how much the CLS token attends to
        each patch in the
        last block, `(tiles, heads, h, w)`. Of a combined model, channels stand side by side in the hidden or
        heads dimension.
    tiles : str
        Which tiles, instead of the image processor's own choice.
    max_intensity : int or float
        The intensity that becomes 1, instead of the image processor's (255 for 8-bit images).
    return_tensors : bool
        Return a float32 `torch.Tensor` instead of (nested) lists of numbers, which is the default of the stock
        pipelines.

    One input is an array `(height, width)` or `(channels, height, width)`, a Pillow image, the path of a PNG
    or TIFF file, or a
    dict of these by channel name. Lists return lists; generators, `KeyDataset` and other torch datasets return
    an iterator that reads as it goes. `batch_size` counts fields, whose tiles go through the model together.
    """

    _load_processor = False
    _load_image_processor = True
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(
        self,
        outputs: str | None = None,
        tiles: str | None = None,
        max_intensity: int | float | None = None,
        return_tensors: bool | None = None,
    ) -> tuple[dict, dict, dict]:
        if outputs is not None and outputs not in OUTPUTS:
            raise ValueError(f"outputs must be one of {', '.join(OUTPUTS)}, but is {outputs!r}.")
        chosen = [
            {"tiles": tiles, "max_intensity": max_intensity},
            {"outputs": outputs},
            {"outputs": outputs, "return_tensors": return_tensors},
        ]
        return tuple({key: value for key, value in part.items() if value is not None} for part in chosen)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Features of one field, a list of fields, or a stream of fields."""
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        if isinstance(inputs, KeyDataset):
            self._check_column(inputs)
        return super().__call__(inputs, **kwargs)

    def _check_column(self, inputs: KeyDataset) -> None:
        """Refuse one channel's column for another channel's model, where the dataset has both."""
        channel_names = self.model.config.channel_names
        columns = getattr(inputs.dataset, "column_names", None) or []
        if len(channel_names) == 1 and inputs.key != channel_names[0] and channel_names[0] in columns:
            raise ValueError(
                f"the column {inputs.key} was given, but this model was trained on {channel_names[0]}: "
                f"give KeyDataset(dataset, {channel_names[0]!r}), or use the repository of the other channel."
            )

    def preprocess(self, image: Any, **image_processor_kwargs: Any) -> dict[str, list[torch.Tensor]]:
        """One field's tiles, each `(channels, height, width)`."""
        channel_names = self.model.config.channel_names
        tiles = self.image_processor.field_tiles(image, channel_names=channel_names, **image_processor_kwargs)
        channels = tiles[0].shape[0]
        if channels not in ({1, 3} if len(channel_names) < 2 else {len(channel_names)}):
            names = f" ({', '.join(channel_names)})" if channel_names else ""
            raise ValueError(
                f"the image has {channels} channels, but this model takes {max(len(channel_names), 1)}{names}: "
                "give its channels in this order, or a dict of planes by channel name."
            )
        one_channel = len(channel_names) == 1
        if one_channel and channels == 3 and any((tile[:1] != tile[1:]).any() for tile in tiles):
            warnings.warn(
                f"the image has three different channels, but this model knows {channel_names[0]} alone: give "
                "that plane, a dict of planes by channel name, or use the combined repository.",
                stacklevel=2,
            )
        return {"tiles": [torch.from_numpy(tile) for tile in tiles]}

    def _forward(self, inputs: dict, outputs: str = "features") -> dict[str, list[torch.Tensor]]:
        """What the model says of every tile of every field, in float32: one tensor a field."""
        fields = inputs["tiles"] if isinstance(inputs["tiles"][0], list) else [inputs["tiles"]]
        results = self._run_model(torch.stack([tile for field in fields for tile in field]), outputs)
        return {"tiles": list(results.float().split([len(field) for field in fields]))}

    def _run_model(self, pixel_values: torch.Tensor, outputs: str) -> torch.Tensor:
        """The model's answer for a stack of tiles."""
        if outputs == "attention":
            return self.model.attention_maps(pixel_values)
        if outputs == "patches":
            tokens = self.model(pixel_values).last_hidden_state[:, 1:]
            return tokens.unflatten(1, (pixel_values.shape[-2] // self.model.config.patch_size, -1))
        # `cls_only` spares the last block the patches, which only `patches` would need
        return self.model(pixel_values, cls_only=True).pooler_output

    def postprocess(self, model_outputs: dict, outputs: str = "features", return_tensors: bool = False) -> Any:
        """The median over tiles, and for a combined model the unit norm; or what `outputs` names."""
        result = model_outputs["tiles"][0]
        if outputs == "features":
            ordered = result.sort(dim=0).values
            # torch.median returns the lower of the two middle tiles; this is the mean of both
            result = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
            if len(self.model.config.channel_names) > 1:
                result = torch.nn.functional.normalize(result, dim=0)
        return result if return_tensors else result.tolist()

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator:
        """The stock pipelines' iterator, but for fields that keep their own number of tiles."""
        if isinstance(inputs, Sized):
            dataset = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            num_workers = min(num_workers, 1)  # several workers would each read the whole stream
            dataset = PipelineIterator(inputs, self.preprocess, preprocess_params)
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)
        results = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(results, self.postprocess, postprocess_params)


def _collate(fields: list[dict]) -> dict[str, list[list[torch.Tensor]]]:
    """Several fields' tiles, still apart."""
    return {"tiles": [field["tiles"] for field in fields]}


__all__ = ["WSDinoFeatureExtractionPipeline"]
