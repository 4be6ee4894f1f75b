"""Turn a training run's models into profiles, one Parquet file a set and one row a field, and pictures to look at.

    wsdino-extract runs/demo            # profiles/{trained,untrained,intensity}.parquet and pictures/*.png

Beside the trained networks it extracts what they must beat, from the same fields through the same code: an untrained
network of the same shape, the network that training started from where that was not random, and plain intensity
statistics. Columns follow the cytomining convention: `Metadata_*` first, then `<channel>_<index>` features.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import concatenate_datasets, load_dataset
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from dataset_scripts import ScreenError, fields_with, open_planes
from evaluation_wsdino.pictures import draw_attention, draw_fields
from modeling_wsdino import (
    WSDinoConfig,
    WSDinoFeatureExtractionPipeline,
    WSDinoImageProcessor,
    WSDinoModel,
    attention_mass_mask,
)
from modeling_wsdino.convert_checkpoint import load_backbone
from pretraining_wsdino import TrainingArguments, TrainingError

SETS = ("trained", "untrained", "initial", "intensity")
METADATA = {
    "plate": "Plate",
    "well": "Well",
    "site": "Site",
    "compound": "Compound",
    "concentration": "Concentration",
    "treatment": "Treatment",
    "moa": "MOA",
    "batch": "Batch",
    "replicate": "Replicate",
    "source": "Source",
}


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


def load_parts(path: str, parts: list[str], channels: list[str]):
    """The asked parts of a dataset as one, in order; parts that the dataset lacks are an error."""
    try:
        dataset = concatenate_datasets([load_dataset(path, part, split="train") for part in parts])
    except (ValueError, OSError) as error:
        raise ScreenError(f"The dataset {path} has not all of the parts {', '.join(parts)}: {error}") from error
    missing = [name for name in channels if name not in dataset.column_names]
    if missing:
        raise ScreenError(
            f"The dataset {path} has no column {missing[0]!r}; it has {', '.join(dataset.column_names)}."
        )
    return fields_with(dataset, channels)


def metadata_table(dataset) -> pd.DataFrame:
    """`Metadata_*` columns of every field."""
    present = {column: name for column, name in METADATA.items() if column in dataset.column_names}
    table = dataset.select_columns(list(present)).to_pandas()
    return table.rename(columns={column: f"Metadata_{name}" for column, name in present.items()})


def network_features(
    model: WSDinoModel, image_processor: WSDinoImageProcessor, planes: np.ndarray, batch_size: int, title: str
) -> np.ndarray:
    """`(fields, hidden)` float32 through the very pipeline that users of the model run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extract = WSDinoFeatureExtractionPipeline(model=model.eval(), image_processor=image_processor, device=device)
    stream = extract((plane for plane in planes), batch_size=batch_size, return_tensors=True)
    return torch.stack(list(tqdm(stream, total=len(planes), desc=title, unit="field"))).numpy()


def intensity_features(planes: np.ndarray, max_intensity: float, title: str) -> np.ndarray:
    """`(fields, 11)` float32: mean, SD, skewness, seven percentiles and the share of clipped pixels, of whole fields.

    What a plate reader could see: no shape and no texture, so a profile that only beats this has learned staining.
    """
    rows = np.empty((len(planes), 11), dtype=np.float32)
    for row, plane in zip(rows, tqdm(planes, desc=title, unit="field"), strict=True):
        scaled = np.asarray(plane, dtype=np.float64).ravel() / max_intensity
        mean, deviation = scaled.mean(), scaled.std()
        skewness = ((scaled - mean) ** 3).mean() / max(deviation, 1e-12) ** 3
        percentiles = np.percentile(scaled, [1, 5, 25, 50, 75, 95, 99])
        row[:] = [mean, deviation, skewness, *percentiles, (scaled > 1).mean()]
    return rows


def extract_set(
    name: str, run: Path, arguments: TrainingArguments, channel: str, planes: np.ndarray, batch_size: int
) -> np.ndarray:
    """Features of one set and channel over all fields."""
    folder = run / channel / "model"
    image_processor = WSDinoImageProcessor.from_pretrained(folder)
    title = f"{name} {channel}"
    if name == "intensity":
        return intensity_features(planes, image_processor.max_intensity, title)
    if name == "trained":
        model = WSDinoModel.from_pretrained(folder)
    elif name == "initial":
        model = load_backbone(arguments.init, channel_names=[channel])
    else:
        torch.manual_seed(arguments.seed)
        model = WSDinoModel(WSDinoConfig.from_pretrained(folder))
    return network_features(model, image_processor, planes, batch_size, title)


def inputs_digest(run: Path, name: str, channels: list[str], dataset) -> str:
    """Changes when anything that a profile file depends on changes: the images, the models, their processors."""
    digest = hashlib.sha256(json.dumps([name, channels, dataset._fingerprint]).encode())
    for channel in channels:
        for file in ("config.json", "preprocessor_config.json", "model.safetensors"):
            digest.update((run / channel / "model" / file).read_bytes())
    return digest.hexdigest()


def write_profiles(path: Path, metadata: pd.DataFrame, features: dict[str, np.ndarray], digest: str) -> None:
    """One Parquet file, written beside and renamed."""
    columns = {name: pa.array(metadata[name]) for name in metadata}
    for channel, values in features.items():
        columns |= {f"{channel}_{index:04d}": pa.array(values[:, index]) for index in range(values.shape[1])}
    table = pa.table(columns).replace_schema_metadata({"wsdino_inputs": digest})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    partial.replace(path)


def example_rows(dataset, count: int) -> list[int]:
    """DMSO first, then the strongest dose of one treatment of each mechanism, up to `count` fields."""
    table = dataset.select_columns(["moa", "concentration"]).to_pandas()
    controls = table.index[table["moa"] == "DMSO"][:1].tolist()
    treated = table[(table["moa"] != "DMSO") & (table["moa"] != "")]
    strongest = treated.sort_values("concentration", kind="stable").groupby("moa").tail(1)
    return controls + strongest.sort_values("moa").index[: count - len(controls)].tolist()


def write_pictures(run: Path, dataset, channel: str, planes: np.ndarray) -> None:
    """`fields_<channel>.png`, example fields; `attention_<channel>.png`, where the network looks (figure 1)."""
    folder = run / channel / "model"
    image_processor = WSDinoImageProcessor.from_pretrained(folder)
    model = WSDinoModel.from_pretrained(folder).eval()
    rows = example_rows(dataset, 8)
    chosen = dataset.select_columns(["moa", "treatment"])[rows]
    titles = [f"{moa}: {treatment}" for moa, treatment in zip(chosen["moa"], chosen["treatment"], strict=True)]
    limit = image_processor.max_intensity
    pictures = run / "pictures"
    pictures.mkdir(exist_ok=True)
    draw_fields([np.minimum(planes[row] / limit, 1) for row in rows], titles).save(pictures / f"fields_{channel}.png")
    # One picture of the whole centre that the tiles cover: the network takes any size, and cells stay uncut.
    whole = WSDinoImageProcessor(
        tile_size=image_processor.tile_size * image_processor.tile_grid, tile_grid=1, max_intensity=limit
    )
    centres = np.stack([whole.field_tiles(planes[row])[0] for row in rows[:4]])
    with torch.no_grad():
        maps = model.attention_maps(torch.from_numpy(centres))
    masks = attention_mass_mask(maps.mean(1), 0.6)
    sheet = draw_attention(centres[:, 0], maps.numpy(), masks.numpy(), titles[:4])
    sheet.save(pictures / f"attention_{channel}.png")


def extract(run: Path, dataset_path: str | None, parts: list[str], sets: list[str], batch_size: int) -> None:
    """Write every asked set's profiles and the pictures of a run; what is there and still true is kept.

    Raises:
        TrainingError, ScreenError: no such run, dataset, part or set.
    """
    settings, arguments, channels = read_run(run)
    dataset = load_parts(dataset_path or settings["dataset"]["path"], parts, channels)
    planes = {channel: open_planes(dataset, channel) for channel in channels}
    metadata = metadata_table(dataset)
    for name in sets:
        if name == "initial" and arguments.init == "random":
            continue  # random weights are the set "untrained"
        path = run / "profiles" / f"{name}.parquet"
        digest = inputs_digest(run, name, channels, dataset)
        if path.exists() and (pq.read_schema(path).metadata or {}).get(b"wsdino_inputs") == digest.encode():
            print(f"{path} is up to date.")
            continue
        features = {c: extract_set(name, run, arguments, c, planes[c], batch_size) for c in channels}
        write_profiles(path, metadata, features, digest)
    for channel in channels:
        write_pictures(run, dataset, channel, planes[channel])
    print(f"Wrote {len(dataset)} profiles a set into {run / 'profiles'} and pictures into {run / 'pictures'}.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="wsdino-extract",
        description=__doc__,
        formatter_class=type(
            "Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}
        ),
    )
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--dataset", help="dataset folder or Hub id; the one trained on if not given")
    parser.add_argument("--parts", nargs="+", default=["annotated", "dmso"], help="configurations of the dataset")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="what to extract")
    parser.add_argument("--batch_size", type=int, default=16, help="fields that go through the network together")
    arguments = parser.parse_args(argv)
    disable_progress_bar()  # of loading a file's weights, which is no work to wait for
    if arguments.batch_size < 1:
        parser.error(f"--batch_size is {arguments.batch_size}: give 1 or more.")
    try:
        extract(arguments.run, arguments.dataset, arguments.parts, arguments.sets, arguments.batch_size)
    except (TrainingError, ScreenError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
