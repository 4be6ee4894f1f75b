"""The WS-DINO pipeline: a field to its feature vector, in one call and in batches over a whole screen.

`pipeline("feature-extraction", model=<repository>, trust_remote_code=True)` finds this class in the repository itself.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import Pipeline
from transformers.pipelines.pt_utils import KeyDataset, PipelineDataset, PipelineIterator

from .image_processing_wsdino import check_settings

# On a CPU a few tiles at a time stay in its caches: in batches of eight a 224x224 tile took 1.2 to 1.3 times as long
# as in batches of two (medians, ViT-S/8, two threads of a machine with other work).
TOKENS_PER_PASS_ON_CPU = 1600
OUTPUTS = ("features", "tiles", "patches", "attention")


class WSDinoFeatureExtractionPipeline(Pipeline):
    """
    Extract features of fluorescence fields: tiles, CLS token of each, median over the tiles.

    A repository of one channel gives `hidden_size` numbers per field (384 for ViT-S); the combined repository gives
    those of its channels side by side, divided by their Euclidean norm (1152), as the paper compares profiles.
    Fields are taken as they are, neither corrected for illumination nor resized: give them as the training data are.

    One input is an array `(height, width)` or `(channels, height, width)`, a Pillow image, the path of a PNG or TIFF
    file, or a dict of these by channel name. Lists return lists. Generators, `KeyDataset` and other torch datasets
    return an iterator that reads as it goes; so do one column of a dataset of the `datasets` library, and the dataset
    itself, which is read by the columns named like the model's channels. `batch_size` counts fields, whose tiles go
    through the model together.

    Parameters (of the pipeline, or of one call)
    ----------
    outputs : {"features", "tiles", "patches", "attention"}
        `features` (default): one vector per field, `(hidden,)`. `tiles`: the CLS token of every tile, `(tiles,
        hidden)`. `patches`: the patch tokens, `(tiles, h, w, hidden)`. `attention`: how much the CLS token attends to
        each patch in the last block, `(tiles, heads, h, w)`. The channels of a combined model stand side by side in
        the hidden or heads dimension.
    tiles : {"paper", "full", "original_code"}
        Which tiles, instead of the image processor's own choice. With `original_code` the median is its lower one.
    max_intensity : int or float
        The intensity that becomes 1, instead of the image processor's (255 for 8-bit images).
    symmetries : {1, 4, 8}
        Average the features of a tile over so many symmetries of the square, instead of the image processor's number
        (see `WSDinoImageProcessor`), before the median over tiles. It multiplies the time that the model takes.
        `patches` and `attention` are those of the tile as it is.
    return_tensors : bool
        Return a float32 `torch.Tensor` instead of (nested) lists of numbers, the default of the stock pipelines.
    """

    _load_processor = False
    _load_image_processor = True
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.device.type == "cpu" and self.model.dtype in (torch.bfloat16, torch.float16):
            kind = str(self.model.dtype).removeprefix("torch.")
            warnings.warn(
                f"{kind} on a CPU is less exact than float32 and mostly slower: float32 is the better choice here.",
                stacklevel=2,
            )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save as every pipeline does, and this file, which the saved config names and the base class leaves out."""
        super().save_pretrained(save_directory, **kwargs)
        shutil.copyfile(__file__, Path(save_directory) / "pipeline_wsdino.py")

    def _sanitize_parameters(
        self,
        outputs: str | None = None,
        tiles: str | None = None,
        max_intensity: int | float | None = None,
        symmetries: int | None = None,
        return_tensors: bool | None = None,
    ) -> tuple[dict, dict, dict]:
        if outputs is not None and outputs not in OUTPUTS:
            raise ValueError(f"outputs must be one of {', '.join(OUTPUTS)}, but is {outputs!r}.")
        if symmetries is not None:
            check_settings(symmetries=symmetries)
        chosen = [
            {"tiles": tiles, "max_intensity": max_intensity},
            {"outputs": outputs, "symmetries": symmetries},
            {"outputs": outputs, "tiles": tiles, "return_tensors": return_tensors},
        ]
        return tuple({key: value for key, value in part.items() if value is not None} for part in chosen)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Features of one field, a list of fields, or a stream of fields."""
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        if isinstance(inputs, KeyDataset):
            self._check_column(inputs.dataset, inputs.key)
        elif hasattr(inputs, "select_columns"):  # of the `datasets` library: a table, or a stream of rows
            inputs = _streamed(self._channel_rows(inputs))
        elif hasattr(inputs, "column_name"):  # of the same library: one column of these
            self._check_column(inputs.source, inputs.column_name)
            inputs = _streamed(inputs)
        return super().__call__(inputs, **kwargs)

    def _check_column(self, dataset: Any, column: str) -> None:
        """Refuse one channel's column for another channel's model, where the dataset has both."""
        channel_names = self.model.config.channel_names
        columns = getattr(dataset, "column_names", None) or []
        if len(channel_names) == 1 and column != channel_names[0] and channel_names[0] in columns:
            raise ValueError(
                f"the column {column} was given, but this model was trained on {channel_names[0]}: "
                f"give KeyDataset(dataset, {channel_names[0]!r}), or use the repository of the other channel."
            )

    def _channel_rows(self, inputs: Any) -> Any:
        """The model's channels of every row, the other columns not even decoded."""
        if isinstance(inputs, Mapping):
            raise ValueError(f"the dataset has the splits {', '.join(inputs)}: give one of them.")
        channel_names, columns = self.model.config.channel_names, inputs.column_names or []
        absent = [name for name in channel_names if columns and name not in columns]
        if absent or not channel_names:
            raise ValueError(
                f"the dataset has the columns {', '.join(columns)}, but this model needs "
                f"{', '.join(absent) or 'a name'}: rename the channel's column, or give KeyDataset(dataset, <column>)."
            )
        return inputs.select_columns(channel_names)

    def preprocess(self, image: Any, **image_processor_kwargs: Any) -> dict[str, list[torch.Tensor]]:
        """One field's tiles, each `(channels, height, width)`."""
        return _Preprocess(self)(image, **image_processor_kwargs)

    def _forward(
        self, inputs: dict, outputs: str = "features", symmetries: int | None = None
    ) -> dict[str, list[tuple[torch.Tensor, ...]]]:
        """The model's answers for every tile of every field, in float32: one tuple of tensors per field."""
        batch = _collate([inputs]) if "tiles" in inputs else inputs
        symmetries = symmetries or self.image_processor.symmetries
        results = [
            torch.cat([self._run_model(part, outputs, symmetries).cpu() for part in self._split(stack)])
            for stack in batch["stacks"]
        ]
        return {"fields": [tuple(results[stack][row] for stack, row in field) for field in batch["places"]]}

    def _split(self, stack: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A stack of tiles in the portions that go through the model together."""
        if stack.device.type != "cpu":
            return (stack,)
        tokens = stack.shape[-2] * stack.shape[-1] // self.model.config.patch_size**2
        return stack.split(max(1, TOKENS_PER_PASS_ON_CPU // tokens))

    def _run_model(self, pixel_values: torch.Tensor, outputs: str, symmetries: int) -> torch.Tensor:
        """The model's answer for a stack of tiles of one size, in float32."""
        if outputs == "attention":
            return self.model.attention_maps(pixel_values).float()
        if outputs == "patches":
            tokens = self.model(pixel_values).last_hidden_state[:, 1:].float()
            return tokens.unflatten(1, (pixel_values.shape[-2] // self.model.config.patch_size, -1))
        # `cls_only` spares the last block the patch tokens, which only `patches` needs.
        views = _symmetric_views(pixel_values, symmetries)
        return sum(self.model(view, cls_only=True).pooler_output.float() for view in views) / len(views)

    def postprocess(
        self,
        model_outputs: dict,
        outputs: str = "features",
        tiles: str | None = None,
        return_tensors: bool = False,
    ) -> Any:
        """The median over tiles, and for a combined model the unit norm; or what `outputs` names."""
        field = model_outputs["fields"]
        field = field[0] if isinstance(field, list) else field  # the stock iterator unpacks batches of two and more
        if outputs == "features":
            ordered = torch.stack(field).sort(dim=0).values
            lower, upper = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
            # The released code takes torch.median, the lower of the two middle tiles; the median is their mean.
            original = (self.image_processor.tiles if tiles is None else tiles) == "original_code"
            result = lower if original else (lower + upper) / 2
            if len(self.model.config.channel_names) > 1:
                result = torch.nn.functional.normalize(result, dim=0)
        elif len({tile.shape for tile in field}) > 1:  # patches of tiles that differ in size
            return list(field) if return_tensors else [tile.tolist() for tile in field]
        else:
            result = torch.stack(field)
        return result if return_tensors else result.tolist()

    def get_iterator(self, inputs: Any, num_workers: int, batch_size: int, *params: dict) -> Iterator:
        """The stock pipelines' iterator, but for fields that keep their own number of tiles."""
        preprocess_params, forward_params, postprocess_params = params
        if isinstance(inputs, Sized):
            dataset = PipelineDataset(inputs, _Preprocess(self), preprocess_params)
        else:
            num_workers = min(num_workers, 1)  # several workers would each read the whole stream
            dataset = PipelineIterator(inputs, _Preprocess(self), preprocess_params)
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)
        results = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(results, self.postprocess, postprocess_params)


class _Preprocess:
    """What a loader's worker needs to cut fields into tiles: no model, which it would copy to itself."""

    def __init__(self, pipeline: WSDinoFeatureExtractionPipeline) -> None:
        self.image_processor = pipeline.image_processor
        self.channel_names = list(pipeline.model.config.channel_names)

    def __call__(self, image: Any, **image_processor_kwargs: Any) -> dict[str, list[torch.Tensor]]:
        names = self.channel_names
        tiles = self.image_processor.field_tiles(image, channel_names=names, **image_processor_kwargs)
        channels = tiles[0].shape[0]
        if channels not in ({1, 3} if len(names) < 2 else {len(names)}):
            known = f" ({', '.join(names)})" if names else ""
            raise ValueError(
                f"the image has {channels} channels, but this model takes {max(len(names), 1)}{known}: "
                "give its channels in this order, or a dict of planes by channel name."
            )
        if len(names) == 1 and channels == 3 and any((tile[:1] != tile[1:]).any() for tile in tiles):
            warnings.warn(
                f"the image has three different channels, but this model knows {names[0]} alone: give "
                "that plane, a dict of planes by channel name, or use the combined repository.",
                stacklevel=2,
            )
        return {"tiles": [torch.from_numpy(tile) for tile in tiles]}


def _streamed(rows: Any) -> Subset | Iterator:
    """Rows or fields of the `datasets` library as the stock pipelines stream them: as a torch dataset, or a stream."""
    return Subset(rows, range(len(rows))) if isinstance(rows, Sized) else (row for row in rows)


def _symmetric_views(tiles: torch.Tensor, symmetries: int) -> list[torch.Tensor]:
    """A stack of tiles under 1, 4 or 8 symmetries of the square, see `WSDinoImageProcessor`."""
    if symmetries == 8:
        return [torch.rot90(side, turns, (-2, -1)) for side in (tiles, tiles.flip(-1)) for turns in range(4)]
    if symmetries == 4:
        return [tiles, tiles.flip(-1), torch.rot90(tiles, 1, (-2, -1)), torch.rot90(tiles, 2, (-2, -1))]
    return [tiles]


def _collate(fields: list[dict[str, list[torch.Tensor]]]) -> dict[str, list]:
    """Stack the tiles of several fields, one stack per tile size, and note where each field's tiles went."""
    stacks, places = {}, []
    for field in fields:
        places.append([])
        for tile in field["tiles"]:
            stack = stacks.setdefault(tile.shape, [])
            places[-1].append((list(stacks).index(tile.shape), len(stack)))
            stack.append(tile)
    return {"stacks": [torch.stack(stack) for stack in stacks.values()], "places": places}


def attention_mass_mask(attention_maps: torch.Tensor, mass: float = 0.6) -> torch.Tensor:
    """Keep the fewest patches that together hold a share of a map's attention.

    The original code's threshold kept every patch; this one keeps what it names.

    Parameters
    ----------
    attention_maps : torch.Tensor
        `(..., height, width)`, not negative.
    mass : float
        The share to keep, above 0 and at most 1.

    Returns
    -------
    torch.Tensor
        Booleans of the same shape: the largest patches, the last of which reaches the share.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be above 0 and at most 1, but is {mass}.")
    flat = attention_maps.flatten(-2).double()
    values, order = flat.sort(dim=-1, descending=True, stable=True)
    # A patch is kept while the larger ones before it do not yet hold the share.
    before = values.cumsum(dim=-1) - values
    kept = before < mass * values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept).reshape(attention_maps.shape)


__all__ = ["WSDinoFeatureExtractionPipeline", "attention_mass_mask"]
