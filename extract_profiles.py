"""Turn networks and a dataset into profiles: one Parquet file per set, one row per field; and pictures to look at.

    wsdino-extract runs/demo                            # profiles/{trained,untrained,...}.parquet, pictures
    wsdino-extract --model org/wsdino --dataset data/bbbc021 --output profiles.parquet
    accelerate launch extract_profiles.py runs/paper    # several processes share the fields

Beside a run's trained networks it extracts what they must beat, from the same fields through the same code: the
network that training started from where that was not random, an untrained network of the same shape, plain intensity
statistics, and the nuclei counted and measured. `--model` takes any network instead: a repository of one channel or of
several, an original DINO checkpoint, a transformers ViT; or any other encoder of images, such as a ResNet (see
`modeling_wsdino/encoders.py`). Columns follow the cytomining convention: `Metadata_*`, then
`<channel>_<index>`, each channel's features by themselves: the median over tiles, before any normalisation.

Fields are decoded as they are needed and features are written every few hundred fields: memory does not grow with the
screen, and a killed extraction continues where it stopped when it is started again, on any number of processes.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from dataset_scripts import Fields, Planes, check_fields_once, metadata_table, open_fields
from evaluation_wsdino.baselines import intensity_features, nuclear_features
from evaluation_wsdino.pictures import choose_examples, draw_attention, draw_fields, save_sheet
from evaluation_wsdino.profile_file import ProfileFile, part_size
from modeling_wsdino import (
    WSDinoFeatureExtractionPipeline,
    WSDinoImageProcessor,
    WSDinoModel,
    attention_mass_mask,
)
from modeling_wsdino.encoders import Encoder, EncoderSettings, Mapped, StackedPlanes, digest_of, is_ours, load_network
from modeling_wsdino.run_networks import RunNetworks, choose_channels, load_towers
from wsdino.errors import UserError, command, first_line
from wsdino.launch import on_main_process, start_processes, usable_cores
from wsdino.run_folder import PROFILE_SETS, RENAMED_SETS, RunFolder
from wsdino.settings import parse_settings, setting

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ExtractionSettings:
    """Flags of wsdino-extract."""

    run: Path | None = setting(None, "Folder of a training run.")
    model: str | None = setting(None, "Instead of a run: repository folder, Hub id or checkpoint file of a network.")
    dataset: str | None = setting(None, "Dataset folder or Hub id. Default: the one that the run was trained on.")
    output: Path | None = setting(None, "With --model: the Parquet file to write.")
    subsets: list[str] = setting(["annotated", "dmso"], "Subsets of the dataset, which are joined.")
    sets: list[str] = setting(list(PROFILE_SETS), "With a run: which sets to extract.")
    channels: list[str] | None = setting(None, "Which channels. Default: all of the run or model.")
    nuclear_channel: str | None = setting(None, "For the set nuclei: column of the nuclear stain. Default: dna.")
    checkpoints: bool = setting(
        False,
        "With a run: also extract the teachers of the checkpoints that every channel keeps, to score all channels "
        "together as training went on. (Training keeps several when told so.)",
    )
    pictures: Path | None = setting(None, "With --model: folder to write example pictures into.")
    tiles: Literal["paper", "full", "original_code"] | None = setting(
        None, "Which tiles of a field. Default: as the model's image processor says."
    )
    scaling: Literal["clip", "percentile"] | None = setting(
        None, "For an encoder that is not WS-DINO's: clip at 10,000 (the default), or each field's own percentiles."
    )
    normalization: Literal["own", "none"] | None = setting(
        None, "For such an encoder: by its own mean and standard deviation (the default), or none."
    )
    stack_channels: bool = setting(False, "For such an encoder: the channels as those of one image, as RGB.")
    tile_size: int | None = setting(
        None, "For such an encoder: side of a tile in pixels. Default: its input's.", low=1
    )
    tile_grid: int | None = setting(None, "For such an encoder: tiles along a side. Default: 2.", low=1)
    revision: str | None = setting(None, "For such an encoder: revision of its Hub repository.")
    trust_remote_code: bool = setting(False, "Run the code that the encoder's Hub repository holds.")
    batch_size: int = setting(16, "Fields that go through the network together.", low=1)
    shard_fields: int = setting(512, "Fields between two writes, at most: what a kill can cost.", low=1)
    num_workers: int | None = setting(
        None, "Processes that decode images, for each GPU. Default: up to 8 on a GPU, 0 on a CPU.", low=0
    )
    precision: Literal["no", "bf16", "fp16"] = setting("no", "Precision of the network; bf16 and fp16 are for GPUs.")
    compile: bool = setting(False, "Compile the network, which pays on GPUs and many fields.")
    device: str | None = setting(None, "Such as cpu or cuda:1. Default: what accelerate chooses.")


@dataclass
class Extractor:
    """Planes of one channel to rows of features: a network's, or without one a function's of each plane."""

    image_processor: WSDinoImageProcessor
    model: WSDinoModel | None = None
    statistics: Callable = intensity_features  # (plane, max_intensity) -> row

    def describe(self) -> dict:
        """All that the features depend on, beside the planes."""
        if self.model is None:
            return {"statistics": self.statistics.__name__, "max_intensity": self.image_processor.max_intensity}
        ignored = {"transformers_version", "_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype"}
        config = {key: value for key, value in self.model.config.to_dict().items() if key not in ignored}
        processor = {key: value for key, value in self.image_processor.to_dict().items() if key not in ignored}
        return {"weights": digest_of(self.model), **processor, "config": config}

    def planes(self, fields: Fields, channel: str, rows: Sequence[int] | None = None) -> Planes:
        """What `stream` takes of these rows, all by default."""
        return Planes(fields, channel, rows)

    def check(self, planes: Planes, device: str) -> None:
        """Refuse planes that this extractor cannot or must not take, by a trial before anything is written."""
        limit = self.image_processor.max_intensity
        if (planes.like.dtype == np.uint8) != (limit <= 255):
            depth = "8-bit" if planes.like.dtype == np.uint8 else "16-bit"
            raise UserError(
                f"The dataset's {planes.channel} images are {depth}, but the model was trained on intensities clipped "
                f"at {limit:g}: give a dataset of the depth it was trained on."
            )
        try:
            next(self.stream([planes.like], device))
        except ValueError as error:
            raise UserError(f"The dataset's {planes.channel} fields do not suit the model: {error}") from error

    def stream(
        self, planes: Sequence[np.ndarray], device: str, batch_size: int = 1, num_workers: int = 0
    ) -> Iterator[np.ndarray]:
        """One float32 vector per plane, in order; a network's through the very pipeline that its users run."""
        if self.model is None:
            rows = Mapped(planes, partial(self.statistics, max_intensity=self.image_processor.max_intensity))
            yield from DataLoader(rows, batch_size=None, num_workers=num_workers)
        else:
            extract = WSDinoFeatureExtractionPipeline(
                model=self.model.eval(), image_processor=self.image_processor, device=device
            )
            inputs = Mapped(planes, np.asarray)
            for features in extract(inputs, batch_size=batch_size, num_workers=num_workers, return_tensors=True):
                yield features.numpy()


class EncoderExtractor(Extractor):
    """Planes of one channel, or of several as the channels of one image, to rows of features of any encoder."""

    def __init__(self, encoder: Encoder, stacked: Sequence[str] = ()) -> None:
        super().__init__(encoder.cut.image_processor, encoder.network.module)
        self.encoder, self.stacked = encoder, list(stacked)

    def describe(self) -> dict:
        """The row's card: weights, revision, and how planes become input."""
        return self.encoder.describe() | {"stacked": self.stacked}

    def planes(self, fields: Fields, channel: str, rows: Sequence[int] | None = None) -> Sequence[np.ndarray]:
        """Planes as `(channels, height, width)`."""
        return StackedPlanes([Planes(fields, name, rows) for name in self.stacked or [channel]])

    def check(self, planes: Sequence[np.ndarray], device: str) -> None:
        """Refuse planes that the encoder cannot take."""
        try:
            next(self.stream([planes.like], device))
        except ValueError as error:
            raise UserError(f"The dataset's fields do not suit the model: {error}.") from error

    def stream(self, *args: Any) -> Iterator[np.ndarray]:
        """One float32 vector per field, in order."""
        return self.encoder.stream(*args)


def network_extractors(
    models: dict[str, WSDinoModel], processors: dict[str, WSDinoImageProcessor]
) -> dict[str, Extractor]:
    """One extractor per channel."""
    return {channel: Extractor(processors[channel], model) for channel, model in models.items()}


def extract_file(
    path: Path, extractors: dict[str, Extractor], fields: Fields, settings: ExtractionSettings, state: PartialState
) -> None:
    """Write one profile file, together with the other processes; an existing file that is still valid is kept."""
    described = {channel: extractor.describe() for channel, extractor in extractors.items()}
    precision = settings.precision if any(extractor.model is not None for extractor in extractors.values()) else "no"
    file = ProfileFile(path, metadata_table(fields), described, fingerprint=fields.fingerprint, precision=precision)
    if file.is_up_to_date():
        if state.is_main_process:
            print(f"{path} is up to date.")
        return
    for channel, extractor in extractors.items():
        extractor.check(extractor.planes(fields, channel), settings.device)
        if extractor.model is not None:
            extractor.model.to(PRECISIONS[precision])
            if settings.compile:
                extractor.model.compile()
    size = part_size(len(fields), settings.shard_fields, settings.batch_size, state.num_processes)
    with ExitStack() as place:

        def begin() -> dict[str, list[range]]:
            place.enter_context(file.opened(size))
            return {channel: file.missing(channel) for channel in extractors}

        for channel, parts in on_main_process(state, begin).items():
            first, last = (len(parts) * (state.process_index + end) // state.num_processes for end in (0, 1))
            if first < last:
                title = f"{path.stem} {channel}" + (f", 1 of {state.num_processes}" if state.num_processes > 1 else "")
                rows = [row for rows in parts[first:last] for row in rows]
                planes = extractors[channel].planes(fields, channel, rows)
                stream = extractors[channel].stream(planes, settings.device, settings.batch_size, settings.num_workers)
                with tqdm(total=len(planes), desc=title, unit="field", disable=not state.is_main_process) as bar:
                    for rows in parts[first:last]:
                        features = []
                        for row in islice(stream, len(rows)):
                            features.append(row)
                            bar.update()
                        file.write(channel, rows, np.stack(features))
        state.wait_for_everyone()
        on_main_process(state, file.join)


def open_dataset(path: str, settings: ExtractionSettings, channels: list[str], state: PartialState) -> Fields:
    """The fields, each once; one process per machine prepares the cache that the others read."""
    with state.local_main_process_first():
        fields = open_fields(path, settings.subsets, channels=channels)
    check_fields_once(metadata_table(fields), settings.subsets)
    return fields


def extract_run(settings: ExtractionSettings, state: PartialState) -> None:
    """Write every asked set's profiles and the pictures of a run; with `checkpoints` also those of the kept ones."""
    run = RunFolder(settings.run)
    channels = choose_channels(settings.channels, run.trained_channels(), str(run))
    path = settings.dataset or run.settings()["dataset"]["path"]
    fields = open_dataset(path, settings, channels, state)
    nuclear = settings.nuclear_channel
    if nuclear is not None and nuclear not in fields.column_names:
        raise UserError(f"--nuclear_channel {nuclear}: the dataset has {', '.join(fields.column_names)}.")
    if nuclear is None and "dna" in fields.column_names:
        nuclear = "dna"
    networks = RunNetworks(run, channels)
    processors = networks.processors
    for processor in processors.values():
        processor.tiles = settings.tiles or processor.tiles
    run.pictures.mkdir(exist_ok=True)  # a place that takes none is told now rather than after all is extracted
    loaders = {"trained": lambda: networks.trained, "initial": networks.initial, "untrained": networks.untrained}
    for name in settings.sets:
        path, extractors, chosen = run.profile_file(name), {}, fields
        if name in loaders:
            extractors = network_extractors(loaders[name](), processors)
        elif name == "intensity":
            extractors = {channel: Extractor(processor) for channel, processor in processors.items()}
        elif nuclear is not None:
            # The stain of nuclei need not be one that was trained on; any channel's processor knows the clipping.
            extractors = {nuclear: Extractor(processors[channels[0]], statistics=nuclear_features)}
            chosen = fields.with_images([nuclear])
        elif state.is_main_process:
            print("Skipping the set nuclei: the dataset has no column dna. Name the nuclear stain: --nuclear_channel.")
        if extractors:
            extract_file(path, extractors, chosen, settings, state)
        if extractors and name == "nuclei" and state.is_main_process:
            run.profile_file("count").unlink(missing_ok=True)  # the name of this set in earlier versions
    for step in networks.steps() if settings.checkpoints else ():
        extractors = network_extractors(networks.at_step(step), processors)
        extract_file(run.checkpoint_profiles(step), extractors, fields, settings, state)
    if state.is_main_process:
        write_pictures(run.pictures, network_extractors(networks.trained, processors), fields)
        print(f"Wrote {len(fields)} profiles per set into {run.profiles} and pictures into {run.pictures}.")


def extract_model(settings: ExtractionSettings, state: PartialState) -> None:
    """Write one network's profiles of a dataset, and pictures where they are asked for."""
    if settings.scaling or settings.normalization or not is_ours(settings.model):
        extract_encoder(settings, state)
        return
    towers, processor = load_towers(settings.model, settings.channels)
    processor.tiles = settings.tiles or processor.tiles
    extractors = network_extractors(towers, dict.fromkeys(towers, processor))
    fields = open_dataset(settings.dataset, settings, list(extractors), state)
    if settings.pictures is not None:
        settings.pictures.mkdir(parents=True, exist_ok=True)
    extract_file(settings.output, extractors, fields, settings, state)
    if state.is_main_process:
        if settings.pictures is not None:
            write_pictures(settings.pictures, extractors, fields)
        print(f"Wrote {len(fields)} profiles into {settings.output}.")


def extract_encoder(settings: ExtractionSettings, state: PartialState) -> None:
    """Write any encoder's profiles of a dataset."""
    if not settings.channels or settings.pictures or settings.tiles == "original_code":
        raise UserError(
            f"--model {settings.model} is a network of images: name the --channels it is to see, and leave out "
            "--pictures and --tiles original_code."
        )
    network = load_network(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    given = {name: getattr(settings, name) for name in ("scaling", "normalization", "tiles", "tile_size", "tile_grid")}
    encoder = Encoder(network, EncoderSettings(**{name: value for name, value in given.items() if value is not None}))
    fields = open_dataset(settings.dataset, settings, settings.channels, state)
    if settings.stack_channels:
        extractors = {"stacked": EncoderExtractor(encoder, settings.channels)}
    else:
        extractors = {channel: EncoderExtractor(encoder) for channel in settings.channels}
    began = time.perf_counter()
    extract_file(settings.output, extractors, fields, settings, state)
    if state.is_main_process:
        spent = (time.perf_counter() - began) * 1000 / max(len(fields), 1)
        print(f"Wrote {len(fields)} profiles into {settings.output}, {spent:.1f} ms per field.")


def write_pictures(folder: Path, extractors: dict[str, Extractor], fields: Fields) -> None:
    """`fields_<channel>.png`, example fields; `attention_<channel>.png`, where the network looks (figure 1)."""
    examples = choose_examples(metadata_table(fields))
    titles = list(examples.values())
    for channel, extractor in extractors.items():
        processor, model = extractor.image_processor, extractor.model.float().cpu().eval()
        planes = list(Planes(fields, channel, list(examples)))
        shown = [np.minimum(plane / processor.max_intensity, 1) for plane in planes]
        save_sheet(draw_fields(shown, titles), folder / f"fields_{channel}.png")
        # One picture of the whole centre that the tiles cover: the network takes any size, and cells stay uncut.
        height, width = planes[0].shape
        patch = model.config.patch_size
        side = min(processor.tile_size * processor.tile_grid, min(height, width) // patch * patch)
        top, left = (height - side) // 2, (width - side) // 2
        whole = WSDinoImageProcessor.from_dict(
            processor.to_dict() | {"tiles": "paper", "tile_size": side, "tile_grid": 1}
        )
        seen = np.stack([whole.field_tiles(plane)[0] for plane in planes[:4]])
        with torch.no_grad():
            maps = model.attention_maps(torch.from_numpy(seen))
        centres = np.stack([one[top : top + side, left : left + side] for one in shown[:4]])
        masks = attention_mass_mask(maps.mean(1), 0.6)
        sheet = draw_attention(centres, maps.numpy(), masks.numpy(), titles[:4])
        save_sheet(sheet, folder / f"attention_{channel}.png")


def check_flags(settings: ExtractionSettings) -> None:
    """Refuse flags that contradict one another."""
    if (settings.run is None) == (settings.model is None):
        raise UserError("Give either the folder of a run or --model, with --dataset and --output.")
    if settings.model is not None and (settings.dataset is None or settings.output is None):
        raise UserError("--model needs --dataset, what to extract, and --output, the Parquet file to write.")
    if settings.run is not None and (settings.output is not None or settings.pictures is not None):
        raise UserError("--output and --pictures belong to --model: a run's profiles and pictures are in its folder.")
    for name in settings.sets:
        if name not in PROFILE_SETS:
            raise UserError(f"--sets {name}: use some of {', '.join(PROFILE_SETS)}.")


def choose_device(asked: str | None, state: PartialState) -> torch.device:
    """The asked device, or the one that accelerate gave this process."""
    try:
        return torch.empty(0, device=asked or state.device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {asked} is not available: {first_line(error)}") from error


def choose_workers(device: torch.device) -> int:
    """Decoding processes per GPU, which would otherwise wait for images most of the time; none on a CPU."""
    cores = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(1, cores)) if device.type == "cuda" else 0


@command("wsdino-extract")
def main(argv: list[str] | None = None) -> None:
    """The command `wsdino-extract`."""
    settings = parse_settings(
        ExtractionSettings,
        argv,
        prog="wsdino-extract",
        description=__doc__.partition("\n")[0],
        positional=("run",),
        renamed={"parts": "subsets"},
    )
    if "count" in settings.sets:
        sys.stderr.write(
            "wsdino-extract: the set count is now called nuclei; the old name goes with the next release.\n"
        )
        settings.sets = [RENAMED_SETS.get(name, name) for name in settings.sets]
    check_flags(settings)
    disable_progress_bar()  # of loading a file's weights, which takes no time worth showing
    state = start_processes("extract_profiles.py")
    device = choose_device(settings.device, state)
    workers = choose_workers(device) if settings.num_workers is None else settings.num_workers
    settings = replace(settings, device=str(device), num_workers=workers)
    if settings.run is not None:
        extract_run(settings, state)
    else:
        extract_model(settings, state)


if __name__ == "__main__":
    main()
