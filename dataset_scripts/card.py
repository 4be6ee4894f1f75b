"""The dataset card: YAML that `datasets` and the Hub read, and the text of `dataset_card.md` filled from a build."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from .screen import PARTS

BBBC021_QUIRKS = """\
- Only taxol at 0.3 spans batches (all ten); every other compound lives in one. A neighbour of the same mechanism is
  therefore often a neighbour of the same week.
- Cholesterol-lowering agents and kinase inhibitors occur in one batch each: NSCB leaves them out (103 -> 92
  treatments).
- Rows of the annotated part are ordered by plate. Other releases number treatments in the order of their mechanisms,
  which leaks the answer; here labels are names.
- The MOA table names 103 active treatments. Other doses of the same compounds, and compounds without an annotation,
  are in the part `unannotated` with an empty `moa`."""


def count_fields(output: Path, screen, records: list[dict]) -> dict:
    """Fields a part, and what they span, of a finished build: counted in its shards.

    Parameters
    ----------
    output : path
        Folder of the dataset.
    screen : RawScreen
    records : list of dict
        One a plate, as the build writes them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["treatment", "compound", "moa", "plate", "batch"]
    tables = {part: [] for part in PARTS}
    for record in records:
        for part, shard in record["shards"].items():
            tables[part].append(pq.read_table(output / shard["path"], columns=names))
    empty = pa.table({name: pa.array([], pa.string()) for name in names})
    tables = {part: pa.concat_tables(some) if some else empty for part, some in tables.items()}
    rows = {part: table.num_rows for part, table in tables.items()}
    annotated, everything = tables["annotated"], pa.concat_tables(tables.values())
    return {
        "fields": {**rows, "all": sum(rows.values())},
        "treatments": len(annotated["treatment"].unique()),
        "compounds": len(annotated["compound"].unique()),
        "moas": len(annotated["moa"].unique()),
        "plates": len(everything["plate"].unique()),
        "batches": len(everything["batch"].unique()),
        "plates_named": screen.plates_named,
        "fields_named": screen.fields_named,
        "fields_absent": screen.fields_named - sum(rows.values()),
        "fields_incomplete": sum(record["fields_incomplete"] for record in records),
    }


def dataset_card(screen, records: list[dict], counts: dict, recipe: dict) -> str:
    """The README.md of a built dataset: `configs` and `dataset_info`, schema, counts, origin and quirks."""
    import datasets
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    from .bbbc021 import CITATION, screen_features

    features = screen_features(screen.channels)
    rows = counts["fields"]
    sizes = {
        part: sum(record["shards"][part]["bytes"] for record in records if part in record["shards"]) for part in PARTS
    }
    configs, infos = {}, {}
    parts = [part for part in PARTS if rows[part]]
    for name, members in [(part, [part]) for part in parts] + [("all", parts)]:
        # "all" lists the parts' shards: no plane is stored twice.
        paths = [f"data/{part}/train-*.parquet" for part in members]
        configs[name] = {"data_files": [{"split": "train", "path": paths if len(paths) > 1 else paths[0]}]}
        if name == parts[0]:
            configs[name]["default"] = True
        count, size = sum(rows[part] for part in members), sum(sizes[part] for part in members)
        split = datasets.SplitDict()
        split.add(datasets.SplitInfo("train", num_bytes=size, num_examples=count))
        infos[name] = datasets.DatasetInfo(
            config_name=name, features=features, splits=split, download_size=size, dataset_size=size
        )
    simulated = screen.source.startswith("simulated")
    official = screen.source == "BBBC021v1"
    data = DatasetCardData(
        pretty_name=screen.source,
        task_categories=["image-feature-extraction"],
        tags=["biology", "microscopy"] + (["simulated"] if simulated else []),
    )
    datasets.info.DatasetInfosDict(infos).to_dataset_card_data(data)
    MetadataConfigs(configs).to_dataset_card_data(data)

    steps = recipe["preprocessing"]
    if steps["illumination"]:
        corrected = sum(len(record["functions"]) for record in records)
        illumination = (
            f"Each image was divided by the illumination function of its plate and channel ({corrected} functions; "
            f"a plate and channel with fewer than {steps['minimum_images']} images is not corrected) and clipped to "
            "full scale. The function is the mean of all the plate's images, median filtered "
            f"(size {steps['filter_size'] or '320 for 1024 x 1280 pixels, in proportion for smaller images'}, "
            f"border: {steps['border']}), raised to its 2nd percentile and divided by it. "
            "`illumination/<plate>_<channel>.png` holds it: the function is `levels / levels.min()`; `build.json` "
            "holds the sha256 of every function (little-endian uint16 levels) and of every shard."
        )
    else:
        illumination = "No illumination correction was made."
    text = resources.files("dataset_scripts").joinpath("dataset_card.md").read_text()
    slots = {
        "title": "A simulated screen" if simulated else screen.source,
        "notice": "**These images are simulated. No result on them is a result on cells.**\n\n" if simulated else "",
        "source": screen.source,
        "contents": _contents(counts),
        "origin": _origin(simulated, official),
        "parts": "\n".join(f"| `{part}` | {rows[part]:,} |" for part in (*parts, "all")),
        "schema": _schema(screen.channels, 8 * (1 if steps["bits"] == 8 else 2)),
        "illumination": illumination,
        "resize": f"Planes were resized by {steps['resize']:g} (`skimage.transform.resize`, order 3, anti-aliased, as "
        f"scikit-image does {'since 0.19' if steps['interpolation'] == 'spline' else 'before 0.19'})."
        if steps["resize"] != 1
        else "Planes keep their raw size.",
        "quirks": _quirks(official, screen.columns.control, counts),
        "citation": f"```bibtex\n{CITATION}```" if official else "None is known to the program that wrote this card.",
        "license": "The source page states the terms of use (https://bbbc.broadinstitute.org/BBBC021); no licence is "
        "asserted here."
        if official
        else "No licence is asserted here.",
        "default": parts[0],
        **{name: f"{value:,}" for name, value in counts.items() if name != "fields"},
    }
    for name, value in slots.items():
        text = text.replace("{{" + name + "}}", value)
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _contents(counts: dict) -> str:
    """What the build holds, and of how much: a screen may be built in part."""
    held, named = counts["plates"], counts["plates_named"]
    plates = f"{held:,} of the {named:,} plates" if held < named else f"{held:,} plate{'s' * (held > 1)}"
    text = f"{plates}, {counts['batches']:,} batch{'es' * (counts['batches'] > 1)}"
    if not counts["treatments"]:
        return f"{text}; no treatment has a known mechanism of action."
    treatments, compounds, mechanisms = (
        f"{counts[key]:,} {word}{'s' * (counts[key] > 1)}"
        for key, word in (("treatments", "annotated treatment"), ("compounds", "compound"), ("moas", "mechanism"))
    )
    return f"{text}; {treatments} of {compounds} with {mechanisms} of action."


def _quirks(official: bool, control: str, counts: dict) -> str:
    quirks = BBBC021_QUIRKS if official else "- Rows are ordered by plate."
    if official and counts["plates"] < counts["plates_named"]:
        quirks = f"Of the whole of BBBC021, of which this is a part:\n\n{quirks}"
    if control != "DMSO":
        quirks += f"\n- The negative control is named DMSO here, and {control} in the source."
    return quirks


def _origin(simulated: bool, official: bool) -> str:
    if simulated:
        return "Drawn by `wsdino-simulate` in the layout of BBBC021, and built by `wsdino-prepare`."
    if official:
        return (
            "Image set BBBC021v1 (Caie et al., 2010), available from the Broad Bioimage Benchmark Collection (Ljosa "
            "et al., 2012); annotation of mechanisms from Ljosa et al., 2013. MCF7 cells, three replicates, stained "
            "for DNA (DAPI), beta-tubulin and F-actin. Built from the plate archives by `wsdino-prepare`."
        )
    return "Built from the screen's own images and tables by `wsdino-prepare`."


def _schema(channels: list[str], bits: int) -> str:
    described = [
        (f"`{channel}`", "image", f"one grey plane, {bits} bits, lossless; null if absent") for channel in channels
    ]
    described += [
        ("`preview`", "image", "small 8-bit RGB, each channel stretched on its own: to look at, not to measure"),
        ("`compound`", "string", "DMSO for the control"),
        ("`concentration`", "float64", "in the source's unit (micromolar in BBBC021); 0 for DMSO"),
        ("`treatment`", "string", "`<compound>_<concentration>`, or DMSO"),
        ("`moa`", "string", "mechanism of action; DMSO for the control, empty where unknown"),
        ("`batch`", "string", "plates that were made together; the week in BBBC021"),
        ("`plate`", "string", ""),
        ("`well`", "string", ""),
        ("`site`", "int32", "field of view in the well"),
        ("`replicate`", "int32", ""),
        ("`source`", "string", "BBBC021v1, or who made it: simulated data say so in every row"),
    ]
    described += [
        (f"`{channel}_file`", "string", "the raw image, as the image table names it") for channel in channels
    ]
    described += [
        ("`table_number`", "int32", "the source's own numbering"),
        ("`image_number`", "int32", "the source's own numbering"),
    ]
    return "\n".join(f"| {name} | {kind} | {text} |" for name, kind, text in described)
