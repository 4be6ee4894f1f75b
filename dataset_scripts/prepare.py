"""Builds the Hugging Face dataset of a screen: Parquet shards of its parts, illumination functions and a card.

    wsdino-prepare --raw data/simulated --output data/screen
    wsdino-prepare --raw BBBC021 --output data/bbbc021

A plate is the unit of work: one process reads it twice, writes one shard for each part it has rows of, and last a
small record; a plate is done only if its record is there and fits the present settings, so an interrupted build
continues with the next plate. The shards of a part are numbered by plate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import resources
from multiprocessing import get_context
from pathlib import Path

from tqdm.auto import tqdm

from .illumination import illumination_function
from .plates import Preprocessing, encode_png, levels_digest, plate_levels, plate_rows
from .screen import PARTS, ScreenColumns, ScreenError

ROWS_A_GROUP = 32
_TICKS = None  # in a worker process: the queue that counts images for the progress bar


def build_dataset(
    raw,
    output,
    *,
    image_csv=None,
    moa_csv=None,
    columns: ScreenColumns | None = None,
    allow_missing: bool = False,
    illumination: bool = True,
    filter_size: float | None = None,
    border: str = "edge",
    resize: float = 0.5,
    bits: int = 16,
    plates: list[str] | None = None,
    source: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Build a dataset folder that `datasets.load_dataset` and the Hub understand.

    Parameters
    ----------
    raw : path
        Folder of the raw images (and of the two tables, unless given).
    output : path
        Made if missing; a finished plate of the same build is kept, anything else in the folder is an error.
    image_csv, moa_csv : path, optional
        Plain or gzipped tables; default: the official names in `raw`.
    columns : ScreenColumns, optional
        Column mapping and channels of another screen.
    allow_missing : bool
        Build what is there: a missing channel becomes a null image, a field without images is left out and counted.
    illumination, filter_size, border, resize, bits
        See :class:`dataset_scripts.plates.Preprocessing`.
    plates : list of str, optional
        Build only these plates.
    source : str, optional
        Text of the column `source`; default "BBBC021v1", or what the simulator wrote.
    workers : int, optional
        Processes; default: the cores this process may use.
    progress : bool

    Raises
    ------
    ScreenError
        The tables, images or folders are not what they must be.
    """
    from .bbbc021 import RawScreen

    preprocessing = Preprocessing(illumination, filter_size, border, resize, bits=bits)
    screen = RawScreen(
        raw,
        image_csv and Path(image_csv),
        moa_csv and Path(moa_csv),
        columns or ScreenColumns(),
        preprocessing,
        allow_missing,
        plates,
        source,
    )
    output = Path(output)
    recipe = {
        "preprocessing": asdict(preprocessing),
        "channels": screen.channels,
        "source": screen.source,
        "image_size": list(screen.image_size),
    }
    work = output / ".build"
    _open_output(output, work, recipe)

    names = screen.plate_names()
    shards = {part: [] for part in PARTS}
    for plate in names:
        for part in screen.plate_fields(plate)["part"].unique():
            shards[part].append(plate)
    tasks = []
    for plate in names:
        fields = screen.plate_fields(plate)
        targets = {
            part: f"data/{part}/train-{plates.index(plate):05d}-of-{len(plates):05d}.parquet"
            for part, plates in shards.items()
            if plate in plates
        }
        digest = hashlib.sha256(json.dumps([recipe, targets]).encode() + fields.to_csv().encode()).hexdigest()
        tasks.append((plate, fields, targets, digest, screen, str(output)))
    todo = [task for task in tasks if not _plate_done(work, *task[:4], output)]
    if progress and len(todo) < len(tasks):
        print(f"{len(tasks) - len(todo)} of {len(tasks)} plates are built already")
    passes = 2 if preprocessing.illumination else 1
    total = passes * len(screen.channels) * sum(len(task[1]) for task in todo)
    _run(todo, workers, progress, total)

    records = [json.loads((work / f"{task[0]}.json").read_text()) for task in tasks]
    _remove_strangers(output, records)
    _write_summary(output, screen, recipe, records, shards)
    shutil.rmtree(work)
    if progress:
        _report(output, screen, records)


def _open_output(output: Path, work: Path, recipe: dict) -> None:
    """Accept a new folder, one of an interrupted build, or a finished dataset that this program wrote."""
    if output.exists() and not output.is_dir():
        raise ScreenError(f"{output} is a file: give a folder for the dataset")
    finished = output / "build.json"
    if output.exists() and any(output.iterdir()) and not work.is_dir() and not finished.is_file():
        raise ScreenError(f"{output} holds something else than a dataset of this program: choose another folder")
    if finished.is_file() and not work.is_dir():
        before = json.loads(finished.read_text())
        if before["recipe"] != recipe:
            raise ScreenError(
                f"{output} holds a dataset of other settings or another source ({before['recipe']['source']}): "
                "choose another folder, or remove this one"
            )
        work.mkdir()
        for record in before["plates"]:
            _write_json(work / f"{record['plate']}.json", record)
    work.mkdir(parents=True, exist_ok=True)


def _plate_done(work: Path, plate: str, fields, targets: dict, digest: str, output: Path) -> bool:
    record = work / f"{plate}.json"
    if not record.is_file():
        return False
    known = json.loads(record.read_text())
    files = known["shards"] + [function["file"] for function in known["functions"].values()]
    return known["digest"] == digest and all(
        (output / file["path"]).is_file() and (output / file["path"]).stat().st_size == file["bytes"] for file in files
    )


def _write_json(path: Path, content) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def _file_record(output: Path, name: str) -> dict:
    content = output / name
    digest = hashlib.sha256()
    with open(content, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"path": name, "bytes": content.stat().st_size, "sha256": digest.hexdigest()}


def _build_plate(task) -> None:
    """Both passes of one plate; its record is written last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .bbbc021 import screen_features

    plate, fields, targets, digest, screen, output = task
    output = Path(output)
    levels = {}
    if screen.preprocessing.illumination:
        levels = plate_levels(fields, screen.raw, screen.channels, screen.preprocessing, screen.image_size, _tick)
    saved = {}
    for channel, level in levels.items():
        name = f"illumination/{plate}_{channel}.png"
        _write_bytes(output / name, encode_png(level))
        saved[channel] = {"file": _file_record(output, name), "sha256": levels_digest(level)}
    functions = {channel: illumination_function(level) for channel, level in levels.items()}

    schema = screen_features(screen.channels).arrow_schema
    shards = []
    rows_written = {}
    for part, name in targets.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        rows, count = [], 0
        with pq.ParquetWriter(partial, schema, compression="snappy") as writer:
            chosen = fields[fields["part"] == part]
            for row in plate_rows(
                chosen,
                screen.raw,
                screen.channels,
                screen.preprocessing,
                functions,
                screen.image_size,
                screen.source,
            ):
                rows.append(row)
                count += 1
                for _ in screen.channels:
                    _tick()
                if len(rows) == ROWS_A_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        os.replace(partial, path)
        shards.append(_file_record(output, name))
        rows_written[part] = count
    record = {"plate": plate, "digest": digest, "rows": rows_written, "shards": shards, "functions": saved}
    _write_json(output / ".build" / f"{plate}.json", record)


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _tick() -> None:
    if _TICKS is not None:
        _TICKS.put(1)


def _share_ticks(ticks) -> None:
    global _TICKS
    _TICKS = ticks


def _run(tasks, workers, progress, total) -> None:
    """Build plates in processes, with a progress bar of images."""
    global _TICKS
    if workers is None:
        # Starting processes costs more than building a small screen.
        pixels = sum(len(task[1]) * task[4].image_size[0] * task[4].image_size[1] for task in tasks)
        workers = len(os.sched_getaffinity(0)) if pixels > 2e7 else 1
    workers = min(workers, len(tasks))
    bar = tqdm(total=total, desc="preparing planes", unit="plane", disable=not progress, mininterval=0.5)
    if workers <= 1:

        class Direct:
            put = staticmethod(bar.update)

        _TICKS = Direct
        try:
            for task in tasks:
                _build_plate(task)
        finally:
            _TICKS = None
    else:
        # One process a plate is enough; a BLAS that starts threads in every one of them costs fourfold.
        threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        os.environ.update(dict.fromkeys(threads, "1"))
        context = get_context("spawn")
        ticks = context.Queue()
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_share_ticks, initargs=(ticks,)) as pool:
            pending = {pool.submit(_build_plate, task) for task in tasks}
            try:
                while pending:
                    try:
                        bar.update(ticks.get(timeout=0.2))
                    except queue.Empty:
                        pass
                    done = {future for future in pending if future.done()}
                    for future in done:
                        future.result()
                    pending -= done
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                for name, value in threads.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})
    bar.close()


def _remove_strangers(output: Path, records: list[dict]) -> None:
    """Drop shards and functions of an earlier, different plate list of the same build."""
    kept = {file["path"] for record in records for file in record["shards"]}
    kept |= {function["file"]["path"] for record in records for function in record["functions"].values()}
    for folder in ("data", "illumination"):
        for path in sorted((output / folder).rglob("*")) if (output / folder).is_dir() else ():
            if path.is_file() and path.relative_to(output).as_posix() not in kept:
                path.unlink()


def _write_summary(output: Path, screen, recipe: dict, records: list[dict], shards: dict) -> None:
    """`build.json` (what was made from what, with hashes) and the dataset card."""
    import datasets
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    from .bbbc021 import screen_features

    features = screen_features(screen.channels)
    rows = {part: sum(record["rows"].get(part, 0) for record in records) for part in PARTS}
    sizes = {
        part: sum(f["bytes"] for r in records for f in r["shards"] if f["path"].startswith(f"data/{part}/"))
        for part in PARTS
    }
    configs, infos = {}, {}
    parts = [part for part in PARTS if rows[part]]
    for name, members in [(part, [part]) for part in parts] + [("all", parts)]:
        paths = [f"data/{part}/train-*.parquet" for part in members]
        configs[name] = {"data_files": [{"split": "train", "path": paths if len(paths) > 1 else paths[0]}]}
        if name == parts[0]:
            configs[name]["default"] = True
        count, size = sum(rows[p] for p in members), sum(sizes[p] for p in members)
        split = datasets.SplitDict()
        split.add(datasets.SplitInfo("train", num_bytes=size, num_examples=count))
        infos[name] = datasets.DatasetInfo(
            config_name=name,
            features=features,
            splits=split,
            download_size=size,
            dataset_size=size,
        )
    data = DatasetCardData()
    datasets.info.DatasetInfosDict(infos).to_dataset_card_data(data)
    MetadataConfigs(configs).to_dataset_card_data(data)

    labels = screen.fields
    counts = {
        "fields": {**rows, "all": sum(rows.values())},
        "treatments": int(labels.loc[labels["part"] == "annotated", "treatment"].nunique()),
        "compounds": int(labels.loc[labels["part"] == "annotated", "compound"].nunique()),
        "moas": int(labels.loc[labels["part"] == "annotated", "moa"].nunique()),
        "plates": int(labels["plate"].nunique()),
        "batches": int(labels["batch"].nunique()),
        "fields_named": screen.fields_named,
        "fields_absent": screen.fields_absent,
        "fields_incomplete": screen.fields_incomplete,
    }
    template = resources.files("dataset_scripts").joinpath("dataset_card.md").read_text()
    table = "\n".join(f"| {part} | {rows[part]:,} |" for part in PARTS)
    card = template.format(
        title="A simulated screen" if screen.source.startswith("simulated") else screen.source,
        source=screen.source,
        rows=table,
        channels=", ".join(f"`{channel}`" for channel in screen.channels),
        **{k: v for k, v in counts.items() if k != "fields"},
    )
    _write_bytes(output / "README.md", f"---\n{data.to_yaml()}\n---\n\n{card}".encode())
    _write_json(output / "build.json", {"recipe": recipe, "counts": counts, "plates": records})


def _report(output: Path, screen, records) -> None:
    rows = {part: sum(record["rows"].get(part, 0) for record in records) for part in PARTS}
    print(f"{output}: " + ", ".join(f"{count:,} {part}" for part, count in rows.items()) + " fields")
    if screen.images_absent:
        print(
            f"of the {screen.fields_named:,} fields in {screen.image_csv}, {screen.fields_absent:,} are absent and "
            f"{screen.fields_incomplete:,} lack a channel (null image)"
        )
    uncorrected = [
        f"{record['plate']} {channel}"
        for record in records
        for channel in screen.channels
        if channel not in record["functions"]
    ]
    if uncorrected and screen.preprocessing.illumination:
        print(
            f"not corrected for illumination, for fewer than {screen.preprocessing.minimum_images} images: "
            + ", ".join(uncorrected[:6])
            + (f" and {len(uncorrected) - 6} more" if len(uncorrected) > 6 else "")
        )


def main(argv=None) -> None:
    """`wsdino-prepare`: build the dataset folder of a screen."""
    parser = argparse.ArgumentParser(prog="wsdino-prepare", description="Build a screen's Hugging Face dataset.")
    parser.add_argument("--raw", required=True, help="folder of the raw images, and of the two official tables")
    parser.add_argument("--output", required=True, help="folder of the dataset to write")
    parser.add_argument("--image_csv", help="image table, plain or .gz (default: BBBC021_v1_image.csv in --raw)")
    parser.add_argument("--moa_csv", help="MOA table, plain or .gz (default: BBBC021_v1_moa.csv in --raw)")
    parser.add_argument("--allow_missing", action="store_true", help="build what is there, say what is absent")
    parser.add_argument("--no_illumination", action="store_true", help="skip the illumination correction")
    parser.add_argument("--filter_size", type=float, help="size of the median filter (default: 320 at 1024 x 1280)")
    parser.add_argument(
        "--border",
        default="edge",
        choices=("edge", "inside"),
        help="median at the border: as CellProfiler 4.0 (edge) or 4.2 (inside) (default: %(default)s)",
    )
    parser.add_argument("--resize", type=float, default=0.5, help="factor of both sides (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=16, choices=(8, 16), help="of the raw images (default: 16)")
    parser.add_argument("--plates", help="build only these, separated by commas")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    args = parser.parse_args(argv)
    try:
        build_dataset(
            args.raw,
            args.output,
            image_csv=args.image_csv,
            moa_csv=args.moa_csv,
            allow_missing=args.allow_missing,
            illumination=not args.no_illumination,
            filter_size=args.filter_size,
            border=args.border,
            resize=args.resize,
            bits=args.bits,
            plates=[name for name in args.plates.split(",") if name] if args.plates else None,
            workers=args.workers,
        )
    except (ScreenError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
