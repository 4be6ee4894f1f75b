"""Turn networks and a dataset into profiles, one Parquet file a set and one row a field, and pictures to look at.

    wsdino-extract runs/demo                            # profiles/{trained,untrained,...}.parquet, pictures
    wsdino-extract --model org/wsdino --dataset data/bbbc021 --output profiles.parquet
    accelerate launch extract_profiles.py runs/paper    # several processes share the fields

Beside a run's trained networks it extracts what they must beat, from the same fields through the same code: an
untrained network of the same shape, the network that training started from where that was not random, plain intensity
statistics, and the nuclei counted and measured. `--model` takes any network instead: a repository of one channel or of
several, an original DINO checkpoint, a transformers ViT. Columns follow the cytomining convention: `Metadata_*`, then
`<channel>_<index>`, each channel's features by themselves: the median over tiles, before any normalisation.

Fields are decoded as they are needed and features are written every few hundred fields: memory does not grow with the
screen, and a killed extraction goes on where it stopped when it is started again, on any number of processes.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from dataset_scripts import Fields, Planes, ScreenError, check_fields_once, metadata_table, open_fields
from evaluation_wsdino import ProfileError
from evaluation_wsdino.baselines import intensity_features, nuclear_features
from evaluation_wsdino.pictures import draw_attention, draw_fields, save_sheet
from evaluation_wsdino.shards import ProfileFile
from modeling_wsdino import (
    WSDinoConfig,
    WSDinoFeatureExtractionPipeline,
    WSDinoImageProcessor,
    WSDinoModel,
    WSDinoMultiChannelModel,
    attention_mass_mask,
)
from modeling_wsdino.convert_checkpoint import load_backbone, load_image_processor
from pretraining_wsdino import TrainingArguments, TrainingError

SETS = ("trained", "untrained", "initial", "intensity", "count")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMAT = 1  # of the features themselves: files of another one are extracted again


# ---------------------------------------------------------------------------------------------- what is given


def read_run(run: Path) -> tuple[dict, TrainingArguments, list[str]]:
    """A run's settings.json, its arguments, and the channels that are trained."""
    path = run / "settings.json"
    try:
        settings = json.loads(path.read_text())
        arguments = TrainingArguments(**settings["arguments"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): give the folder of a training run.") from error
    channels = [name for name in arguments.channels if (run / name / "model" / "model.safetensors").exists()]
    if not channels:
        raise TrainingError(
            f"{run} holds no trained model yet: finish train_accelerate.py --output_dir {run} --resume."
        )
    return settings, arguments, channels


# ---------------------------------------------------------------------------------------------- features


@dataclass
class Options:
    """How the work is done, which does not change what comes out."""

    batch_size: int = 16
    shard_fields: int = 512
    num_workers: int = 0
    compile: bool = False
    device: str | torch.device | None = None  # None: where the network lies
    precision: str = "no"


@dataclass
class Extractor:
    """Planes of one channel to rows of features: a network's, or without one a function's of each plane."""

    image_processor: WSDinoImageProcessor
    model: WSDinoModel | None = None
    statistics: Callable = intensity_features  # (plane, max_intensity) -> row

    def describe(self) -> dict:
        """All that the features depend on, beside the planes."""
        weights = hashlib.sha256()
        for name, tensor in self.model.state_dict().items() if self.model is not None else ():
            weights.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        names = ("tiles", "tile_size", "tile_grid", "max_intensity", "intensity_scale", "symmetries")
        shape = ("patch_size", "num_attention_heads", "layer_norm_eps")
        return {
            "weights": weights.hexdigest() if self.model is not None else None,
            **({"statistics": self.statistics.__name__} if self.model is None else {}),
            **{name: getattr(self.image_processor, name) for name in names},
            **{name: getattr(self.model.config, name) for name in shape if self.model is not None},
        }

    def check(self, planes: Planes) -> None:
        """Refuse planes that this extractor cannot or must not take, before anything is written.

        Raises:
            ScreenError: 8-bit planes for a 16-bit model or the reverse; fields smaller than a network's tiles.
        """
        limit = self.image_processor.max_intensity
        if (planes.like.dtype == np.uint8) != (limit <= 255):
            depth = "8-bit" if planes.like.dtype == np.uint8 else "16-bit"
            raise ScreenError(
                f"The dataset's {planes.channel} images are {depth}, but the model was trained on intensities clipped "
                f"at {limit:g}: give a dataset of the depth it was trained on."
            )
        if self.model is None:
            return  # statistics are of whole fields
        try:
            tile = self.image_processor.field_tiles(planes.like)[0]
        except ValueError as error:
            raise ScreenError(f"The dataset's {planes.channel} fields do not fit the tiles: {error}") from error
        if any(side % self.model.config.patch_size for side in tile.shape[1:]):
            raise ScreenError(
                f"Tiles of {tile.shape[1]}x{tile.shape[2]} pixels do not divide into patches of "
                f"{self.model.config.patch_size}: choose a model whose image processor names another tile_size."
            )

    def stream(self, planes: Iterable[np.ndarray], options: Options) -> Iterator[np.ndarray]:
        """One float32 vector a plane, in order."""
        if self.model is not None:
            yield from network_stream(self.model, self.image_processor, planes, options)
        else:
            rows = _Mapped(planes, partial(self.statistics, max_intensity=self.image_processor.max_intensity))
            yield from DataLoader(rows, batch_size=None, num_workers=options.num_workers)


class _Mapped(Dataset):
    """A function of every plane."""

    def __init__(self, planes: Sequence[np.ndarray], function):
        self.planes, self.function = planes, function

    def __len__(self) -> int:
        return len(self.planes)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.function(self.planes[index])


def network_stream(
    model: WSDinoModel, image_processor: WSDinoImageProcessor, planes: Iterable[np.ndarray], options: Options
) -> Iterator[np.ndarray]:
    """`(hidden,)` float32 of every plane, through the very pipeline that users of the model run."""
    device = options.device or model.device
    extract = WSDinoFeatureExtractionPipeline(model=model.eval(), image_processor=image_processor, device=device)
    inputs = _Mapped(planes, np.asarray) if isinstance(planes, Planes) else (plane for plane in planes)
    stream = extract(inputs, batch_size=options.batch_size, num_workers=options.num_workers, return_tensors=True)
    for features in stream:
        yield features.numpy()


# ---------------------------------------------------------------------------------------------- networks


def load_network(source: str | Path, **config_kwargs) -> WSDinoModel | WSDinoMultiChannelModel:
    """A network of any layout.

    Raises:
        TrainingError: there is none, or it cannot be read.
    """
    try:
        return load_backbone(source, **config_kwargs)
    except (ValueError, OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"The model {source} cannot be loaded: {reason}") from error


def own_image_processor(source: str | Path, model: WSDinoModel | WSDinoMultiChannelModel) -> WSDinoImageProcessor:
    """How a network's fields become tiles, see `load_image_processor`.

    Raises:
        TrainingError: its image processor is damaged.
    """
    try:
        return load_image_processor(source, model)
    except ValueError as error:
        raise TrainingError(str(error)) from error


def run_extractors(
    run: Path, name: str, arguments: TrainingArguments | None, channels: list[str]
) -> dict[str, Extractor]:
    """One set of a run: an extractor a channel; the arguments are needed for networks that are not the trained."""
    extractors = {}
    for channel in channels:
        folder = run / channel / "model"
        trained = load_network(folder)
        model = None
        if name == "trained":
            model = trained
        elif name == "initial":
            start = run / channel / "initial" if arguments.whiten_patches else arguments.init
            model = load_network(start, channel_names=[channel])
        elif name == "untrained":
            torch.manual_seed(arguments.seed)
            model = WSDinoModel(WSDinoConfig.from_pretrained(folder))
        extractors[channel] = Extractor(own_image_processor(folder, trained), model)
    return extractors


def checkpoint_steps(run: Path, channels: list[str]) -> list[int]:
    """The steps of which every channel keeps a checkpoint, in order."""
    kept = [
        {int(path.name.removeprefix("step_")) for path in (run / channel / "checkpoints").glob("step_" + "[0-9]" * 8)}
        for channel in channels
    ]
    return sorted(set.intersection(*kept))


def checkpoint_extractors(run: Path, step: int, channels: list[str]) -> dict[str, Extractor]:
    """The teachers of one training checkpoint, an extractor a channel.

    Raises:
        TrainingError: a checkpoint that is damaged, or of networks of another shape.
    """
    extractors = run_extractors(run, "trained", None, channels)
    for channel, extractor in extractors.items():
        path = run / channel / "checkpoints" / f"step_{step:08d}" / "model_1.safetensors"  # prepared second: teacher
        try:
            state = load_file(path)
            names = [name for name in state if name.startswith("backbone.")]
            extractor.model.load_state_dict({name.removeprefix("backbone."): state[name] for name in names})
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"{path} cannot be loaded ({reason}): remove that checkpoint.") from error
    return extractors


def choose_nuclear_channel(asked: str | None, dataset) -> str | None:
    """The column of the nuclear stain: the asked one, else "dna" where there is one, else none.

    Raises:
        TrainingError: the dataset lacks the asked column.
    """
    if asked is not None and asked not in dataset.column_names:
        raise TrainingError(f"--nuclear_channel {asked}: the dataset has {', '.join(dataset.column_names)}.")
    return asked or ("dna" if "dna" in dataset.column_names else None)


def model_extractors(source: str, channels: list[str] | None) -> dict[str, Extractor]:
    """One extractor a channel for any network; one that knows no channel, as of ImageNet, takes each of `channels`.

    Raises:
        TrainingError: no such network, or not the network of these channels.
    """
    model = load_network(source)
    known = list(model.config.channel_names)
    if known and channels and not set(channels) <= set(known):
        strange = sorted(set(channels) - set(known))[0]
        raise TrainingError(f"--channels {strange}: the model {source} was trained on {', '.join(known)}.")
    if not known and not channels:
        raise TrainingError(f"The model {source} names no channel: say with --channels which it is to see.")
    extractors = {}
    for channel in channels or known:
        if isinstance(model, WSDinoMultiChannelModel):
            tower = WSDinoModel(WSDinoConfig.from_dict(model.config.to_dict() | {"channel_names": [channel]}))
            tower.load_state_dict(model.towers[channel].state_dict())
        else:
            tower = model
        extractors[channel] = Extractor(own_image_processor(source, model), tower)
    return extractors


# ---------------------------------------------------------------------------------------------- sharing the work


def refuse_missing_processes(script: str) -> None:
    """Refuse a launch that would silently run one process where several were asked for.

    `accelerate launch --cpu --num_processes 2` starts one process, but leaves the address of a group in its
    environment without the group's size; that is how it is told.

    Raises:
        TrainingError: with the command that works for `script`.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise TrainingError(
            "accelerate launched one process where several were asked for (its --cpu flag does so): use "
            "'ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N --num_machines 1 "
            f"--mixed_precision no --dynamo_backend no {script} ...'."
        )


def check_launch() -> PartialState:
    """This process among those launched together.

    Raises:
        TrainingError: fewer processes work together than were asked for.
    """
    refuse_missing_processes("extract_profiles.py")
    several = int(os.environ.get("WORLD_SIZE", 1))
    # A process that is done waits for the slowest one, which may have much to decode.
    waiting = {"timeout": timedelta(days=1)} if several > 1 else {}
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **waiting)
    if state.num_processes != several:
        raise TrainingError(f"{several} processes were launched but {state.num_processes} work together.")
    return state


def my_batches(missing: list[tuple[int, int]], batch_size: int, process: int, processes: int) -> list[tuple[int, int]]:
    """This process's share of the missing ranges of rows, cut at multiples of the batch size.

    So every batch holds the same fields however many processes there are and wherever a run was killed, and the
    features are the same to the bit.
    """
    batches = []
    for first, last in missing:
        cuts = [first, *range((first // batch_size + 1) * batch_size, last, batch_size), last]
        batches += zip(cuts, cuts[1:], strict=False)
    return batches[len(batches) * process // processes : len(batches) * (process + 1) // processes]


def shards_of(batches: list[tuple[int, int]], shard_fields: int) -> list[tuple[int, int]]:
    """Neighbouring batches joined up to the size of a shard, which is at least one batch."""
    shards: list[tuple[int, int]] = []
    for first, last in batches:
        if shards and shards[-1][1] == first and last - shards[-1][0] <= shard_fields:
            shards[-1] = (shards[-1][0], last)
        else:
            shards.append((first, last))
    return shards


def extract_channel(
    file: ProfileFile, channel: str, extractor: Extractor, dataset, options: Options, state: PartialState
) -> None:
    """Write this process's share of the shards that a channel lacks."""
    missing = on_main_process(state, lambda: file.missing(channel))  # of one moment: the others write meanwhile
    shards = shards_of(
        my_batches(missing, options.batch_size, state.process_index, state.num_processes), options.shard_fields
    )
    rows = [row for first, last in shards for row in range(first, last)]
    if not rows:
        return
    title = f"{file.path.stem} {channel}" + (f", 1 of {state.num_processes}" if state.num_processes > 1 else "")
    planes = Planes(dataset, channel, rows)
    with tqdm(total=len(rows), desc=title, unit="field", disable=not state.is_main_process) as bar:
        stream = extractor.stream(planes, options)
        for first, last in shards:
            features = []
            for row in islice(stream, last - first):
                features.append(np.asarray(row))
                bar.update()
            file.write_shard(channel, first, np.stack(features))


def extract_file(
    path: Path,
    extractors: dict[str, Extractor],
    dataset,
    metadata: pd.DataFrame,
    options: Options,
    state: PartialState,
) -> None:
    """Write one profile file, together with the other processes; one that is there and still true is kept.

    Raises:
        ScreenError, ProfileError: planes that do not suit the networks; a place that cannot be written.
    """
    described = {channel: extractor.describe() for channel, extractor in extractors.items()}
    settings = {
        "format": FORMAT,
        "fingerprint": dataset.fingerprint,
        "fields": len(dataset),
        "precision": options.precision if any(e.model is not None for e in extractors.values()) else "no",
        "channels": described,
    }
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    file = ProfileFile(path, metadata, list(extractors), digest, settings)
    if file.is_whole():
        if state.is_main_process:
            print(f"{path} is up to date.")
        return
    for channel, extractor in extractors.items():
        extractor.check(Planes(dataset, channel))
        if extractor.model is not None:
            extractor.model.to(PRECISIONS[options.precision])
            if options.compile:
                extractor.model.compile()
    lock = begin_file(file, state)
    try:
        for channel, extractor in extractors.items():
            extract_channel(file, channel, extractor, dataset, options, state)
        state.wait_for_everyone()
        if state.is_main_process:
            file.join()
        state.wait_for_everyone()
    finally:
        lock.release()


def begin_file(file: ProfileFile, state: PartialState) -> FileLock:
    """Make a profile file's place ready. Nobody else writes there before the lock, the main process's, is released, or
    its process has died.

    Raises:
        ProfileError: on every process, where another extraction is writing, or nothing can be written.
    """
    lock = FileLock(file.folder / "lock")

    def begin() -> None:
        try:
            file.start()
            lock.acquire(timeout=0)
            file.clear()
        except Timeout as error:
            sentence = f"Another extraction is writing {file.path}: wait for it, or name another output."
            raise ProfileError(sentence) from error
        except ProfileError:
            lock.release()
            raise

    on_main_process(state, begin)
    return lock


def on_main_process(state: PartialState | Accelerator, work: Callable[[], Any]) -> Any:
    """What `work()` returns on the main process, on all of them; what it raises, all raise, so that nobody waits."""
    answer, problem = None, None
    if state.is_main_process:
        try:
            answer = work()
        except Exception as error:
            problem = error
    answer, problem = broadcast_object_list([answer, problem])
    if problem is not None:
        raise problem
    return answer


# ---------------------------------------------------------------------------------------------- pictures


def example_rows(dataset, count: int) -> list[int]:
    """DMSO first, then the strongest dose of one treatment of each mechanism, up to `count` fields."""
    table = dataset.table(["moa", "concentration"])
    controls = table.index[table["moa"] == "DMSO"][:1].tolist()
    treated = table[(table["moa"] != "DMSO") & (table["moa"] != "")]
    strongest = treated.sort_values("concentration", kind="stable").groupby("moa").tail(1)
    return controls + strongest.sort_values("moa").index[: count - len(controls)].tolist()


@contextmanager
def picture_folder(folder: Path) -> Iterator[None]:
    """Make the pictures' folder, for what is written into it.

    Raises:
        ProfileError: where that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ProfileError(
            f"no pictures can be written into {folder} ({reason}): make room there, or remove what is in its place."
        ) from error


def write_pictures(folder: Path, extractors: dict[str, Extractor], dataset) -> None:
    """`fields_<channel>.png`, example fields; `attention_<channel>.png`, where the network looks (figure 1)."""
    if {"moa", "treatment", "concentration"} <= set(dataset.column_names):
        rows = example_rows(dataset, 8)
        chosen = dataset.select(rows)
        titles = [f"{moa}: {treatment}" for moa, treatment in zip(chosen["moa"], chosen["treatment"], strict=True)]
    else:
        rows = sorted({round(row) for row in np.linspace(0, len(dataset) - 1, 8)})
        titles = [f"field {row}" for row in rows]
    for channel, extractor in extractors.items():
        planes, image_processor, model = Planes(dataset, channel, rows), extractor.image_processor, extractor.model
        limit = image_processor.max_intensity
        fields = [np.minimum(plane / limit, 1) for plane in planes]
        save_sheet(draw_fields(fields, titles), folder / f"fields_{channel}.png")
        # One picture of the whole centre that the tiles cover: the network takes any size, and cells stay uncut.
        patch = model.config.patch_size
        side = min(image_processor.tile_size * image_processor.tile_grid, min(planes.like.shape) // patch * patch)
        centres, seen = (
            np.stack([whole.field_tiles(planes[index])[0] for index in range(min(4, len(planes)))])
            for whole in (
                WSDinoImageProcessor(tile_size=side, tile_grid=1, max_intensity=limit, intensity_scale=scale)
                for scale in ("linear", image_processor.intensity_scale)
            )
        )
        with torch.no_grad():
            maps = model.float().cpu().eval().attention_maps(torch.from_numpy(seen))
        masks = attention_mass_mask(maps.mean(1), 0.6)
        sheet = draw_attention(centres[:, 0], maps.numpy(), masks.numpy(), titles[: len(centres)])
        save_sheet(sheet, folder / f"attention_{channel}.png")


# ---------------------------------------------------------------------------------------------- the command


def choose_channels(asked: list[str] | None, known: list[str], owner: str) -> list[str]:
    """The asked channels, all of which must be known; without any asked, all known."""
    for name in asked or []:
        if name not in known:
            raise TrainingError(f"--channels {name}: {owner} has {', '.join(known)}.")
    return asked or known


def extract_run(
    run: Path,
    dataset_path: str | None,
    parts: list[str],
    sets: list[str],
    channels: list[str] | None,
    nuclear_channel: str | None,
    checkpoints: bool,
    tiles: str | None,
    options: Options,
    state: PartialState,
) -> None:
    """Write every asked set's profiles and the pictures of a run; with `checkpoints` those of the kept ones too.

    Raises:
        TrainingError, ScreenError, ProfileError: no such run, dataset, part, channel; a place that cannot be written.
    """
    settings, arguments, trained = read_run(run)
    channels = choose_channels(channels, trained, str(run))
    dataset, metadata = open_dataset(dataset_path or settings["dataset"]["path"], parts, channels, state)
    nuclear_channel = choose_nuclear_channel(nuclear_channel, dataset)
    pictures = run / "pictures"
    with picture_folder(pictures):
        pass  # told now rather than after all is extracted
    for name in sets:
        path = run / "profiles" / f"{name}.parquet"
        if name == "count":
            if nuclear_channel is None:
                if state.is_main_process:
                    print("Without the set count: no column is called dna; name that of nuclei, --nuclear_channel.")
                continue
            # The stain of nuclei need not be one that was trained on; any channel's processor knows the clipping.
            first = next(iter(run_extractors(run, name, arguments, channels[:1]).values()))
            counted = dataset.with_images([nuclear_channel])
            counter = {nuclear_channel: Extractor(first.image_processor, statistics=nuclear_features)}
            extract_file(path, counter, counted, metadata_table(counted), options, state)
            continue
        if name == "initial" and arguments.init == "random" and not arguments.whiten_patches:
            continue  # random weights are the set "untrained"
        extractors = with_tiles(run_extractors(run, name, arguments, channels), tiles)
        extract_file(path, extractors, dataset, metadata, options, state)
    for step in checkpoint_steps(run, channels) if checkpoints else ():
        path = run / "profiles" / "checkpoints" / f"step_{step:08d}.parquet"
        extractors = with_tiles(checkpoint_extractors(run, step, channels), tiles)
        extract_file(path, extractors, dataset, metadata, options, state)
    if state.is_main_process:
        with picture_folder(pictures):
            write_pictures(pictures, run_extractors(run, "trained", arguments, channels), dataset)
        print(f"Wrote {len(dataset)} profiles a set into {run / 'profiles'} and pictures into {pictures}.")


def extract_model(
    source: str,
    dataset_path: str,
    parts: list[str],
    output: Path,
    channels: list[str] | None,
    tiles: str | None,
    pictures: Path | None,
    options: Options,
    state: PartialState,
) -> None:
    """Write one network's profiles of a dataset, and pictures where they are asked for.

    Raises:
        As `extract_run`.
    """
    extractors = with_tiles(model_extractors(source, channels), tiles)
    dataset, metadata = open_dataset(dataset_path, parts, list(extractors), state)
    if pictures is not None:
        with picture_folder(pictures):
            pass
    extract_file(output, extractors, dataset, metadata, options, state)
    if state.is_main_process:
        if pictures is not None:
            with picture_folder(pictures):
                write_pictures(pictures, extractors, dataset)
        print(f"Wrote {len(dataset)} profiles into {output}.")


def open_dataset(path: str, parts: list[str], channels: list[str], state: PartialState) -> tuple[Fields, pd.DataFrame]:
    """The fields and their metadata; one process a machine prepares the cache that the others read."""
    with state.local_main_process_first():
        dataset = open_fields(path, parts, channels=channels)
    metadata = metadata_table(dataset)
    check_fields_once(metadata, parts)
    return dataset, metadata


def with_tiles(extractors: dict[str, Extractor], tiles: str | None) -> dict[str, Extractor]:
    """The same extractors, cutting fields as asked."""
    for extractor in extractors.values():
        extractor.image_processor.tiles = tiles or extractor.image_processor.tiles
    return extractors


def make_parser() -> argparse.ArgumentParser:
    help_format = type("Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})
    parser = argparse.ArgumentParser(prog="wsdino-extract", description=__doc__, formatter_class=help_format)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a training run")
    parser.add_argument("--model", help="instead of a run: repository folder, Hub id or checkpoint file of a network")
    parser.add_argument("--dataset", help="dataset folder or Hub id; of a run the one trained on if not given")
    parser.add_argument("--output", type=Path, help="with --model: the Parquet file to write")
    parser.add_argument("--parts", nargs="+", default=["annotated", "dmso"], help="configurations of the dataset")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="of a run: what to extract")
    parser.add_argument("--channels", nargs="+", help="which channels; all of the run's or model's if not given")
    nuclear = "of a run: column of the nuclear stain, for the set count; dna if not given"
    parser.add_argument("--nuclear_channel", help=nuclear)
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="of a run: also the teachers of the checkpoints that every channel keeps, to score all channels together "
        "while they were trained (train with --keep N to keep more than the last)",
    )
    parser.add_argument("--pictures", type=Path, help="with --model: folder to write example pictures into")
    tiles = ("paper", "full", "original_code")
    parser.add_argument("--tiles", choices=tiles, help="which tiles of a field; the model's own choice if not given")
    parser.add_argument("--batch_size", type=int, default=16, help="fields that go through the network together")
    parser.add_argument(
        "--shard_fields", type=int, default=512, help="fields between two writes: what a kill can cost"
    )
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images, for each GPU")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="no", help="of the network; bf16, fp16: GPUs")
    parser.add_argument("--compile", action="store_true", help="compile the network: pays on GPUs and many fields")
    parser.add_argument("--device", help="such as cpu or cuda:1; what accelerate chooses if not given")
    return parser


def check_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict one another."""
    for name in ("batch_size", "shard_fields"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}: give 1 or more.")
    if arguments.num_workers < 0:
        parser.error(f"--num_workers is {arguments.num_workers}: give 0 or more.")
    if (arguments.run is None) == (arguments.model is None):
        parser.error("give either the folder of a run or --model, with --dataset and --output.")
    if arguments.model is not None and (arguments.dataset is None or arguments.output is None):
        parser.error("--model needs --dataset, what to extract, and --output, the Parquet file to write.")
    if arguments.run is not None and (arguments.output is not None or arguments.pictures is not None):
        parser.error("--output and --pictures belong to --model: a run's profiles and pictures lie in its folder.")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    check_flags(parser, arguments)
    disable_progress_bar()  # of loading a file's weights, which is no work to wait for
    try:
        state = check_launch()
        options = Options(
            batch_size=arguments.batch_size,
            shard_fields=arguments.shard_fields,
            num_workers=arguments.num_workers,
            compile=arguments.compile,
            device=choose_device(arguments.device, state),
            precision=arguments.precision,
        )
        common = {"channels": arguments.channels, "tiles": arguments.tiles, "options": options, "state": state}
        if arguments.run is not None:
            common |= {"nuclear_channel": arguments.nuclear_channel, "checkpoints": arguments.checkpoints}
            extract_run(arguments.run, arguments.dataset, arguments.parts, arguments.sets, **common)
        else:
            places = {"output": arguments.output, "pictures": arguments.pictures}
            extract_model(arguments.model, arguments.dataset, arguments.parts, **places, **common)
    except (TrainingError, ScreenError, ProfileError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_sentence(error)}\n")


def one_sentence(error: ValueError) -> str:
    """The message itself, also of an error that arrives from a decoding process under that process's traceback."""
    text = str(error).strip()
    return text.splitlines()[-1].partition("Error: ")[2] if "DataLoader worker process" in text else text


def choose_device(asked: str | None, state: PartialState) -> torch.device:
    """The asked device, or the one that accelerate gave this process."""
    try:
        return torch.empty(0, device=asked or state.device).device
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"--device {asked} is not to be had: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    main()
