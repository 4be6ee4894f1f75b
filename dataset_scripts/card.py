"""The dataset card: YAML that `datasets` and the Hub read, and the text of `dataset_card.md` filled from a build."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pandas as pd

from .plates import screen_features
from .screen import PARTS

CITATION = """\
@article{caie2010high,
  title={High-Content Phenotypic Profiling of Drug Response Signatures across Distinct Cancer Cells},
  author={Caie, Peter D. and Walls, Rebecca E. and Ingleston-Orme, Alexandra and Daya, Sandeep and Houslay, Tom and
          Eagle, Rob and Roberts, Mark E. and Carragher, Neil O.},
  journal={Molecular Cancer Therapeutics}, volume={9}, number={6}, pages={1913--1926}, year={2010}
}
@article{ljosa2012annotated,
  title={Annotated high-throughput microscopy image sets for validation},
  author={Ljosa, Vebjorn and Sokolnicki, Katherine L. and Carpenter, Anne E.},
  journal={Nature Methods}, volume={9}, number={7}, pages={637}, year={2012}
}
@article{ljosa2013comparison,
  title={Comparison of Methods for Image-Based Profiling of Cellular Morphological Responses to Small-Molecule
         Treatment},
  author={Ljosa, Vebjorn and Caie, Peter D. and ter Horst, Rob and Sokolnicki, Katherine L. and Jenkins, Emma L. and
          Daya, Sandeep and Roberts, Mark E. and Jones, Thouis R. and Singh, Shantanu and Genovesio, Auguste and
          Clemons, Paul A. and Carragher, Neil O. and Carpenter, Anne E.},
  journal={Journal of Biomolecular Screening}, volume={18}, number={10}, pages={1321--1329}, year={2013}
}
"""

COUNTED = ["treatment", "compound", "moa", "plate", "batch", "quality"]


def count_fields(output: Path, records: list[dict], fields_named: int, plates_named: int) -> dict:
    """Fields of each part, and what they span, counted in the files of a finished build.

    Parameters
    ----------
    output : path
        Folder of the dataset.
    records : list of dict
        One per plate, of `dataset_scripts.plates.build_plate`.
    fields_named, plates_named : int
        What the image table names: fields on the plates asked for, and plates in all.

    Returns
    -------
    dict
        `fields` (part -> number, and "all"); numbers of annotated `treatments`, `compounds` and `moas`; `plates`,
        `batches`; `plates_named`, `fields_named`, `fields_absent`, `fields_incomplete` (which lack a channel),
        `fields_flawed` and `fields_dropped`; `flaws` (such as "dna: noise" -> number of fields).
    """
    files = [(part, shard["path"]) for record in records for part, shard in record["shards"].items()]
    fields = pd.concat([pd.read_parquet(output / name, columns=COUNTED).assign(part=part) for part, name in files])
    rows = {part: int((fields["part"] == part).sum()) for part in PARTS}
    annotated = fields[fields["part"] == "annotated"]
    dropped = [field["quality"] for record in records for field in record["dropped"]]
    flaws = pd.Series([*fields["quality"], *dropped], dtype=str).str.split("; ").explode()
    return {
        "fields": {**rows, "all": len(fields)},
        "treatments": annotated["treatment"].nunique(),
        "compounds": annotated["compound"].nunique(),
        "moas": annotated["moa"].nunique(),
        "plates": fields["plate"].nunique(),
        "batches": fields["batch"].nunique(),
        "plates_named": plates_named,
        "fields_named": fields_named,
        "fields_absent": fields_named - len(fields) - len(dropped),
        "fields_incomplete": sum(record["fields_incomplete"] for record in records),
        "fields_flawed": sum(record["fields_flawed"] for record in records),
        "fields_dropped": len(dropped),
        "flaws": {flaw: int(count) for flaw, count in flaws[flaws != ""].value_counts().sort_index().items()},
    }


def dataset_card(recipe: dict, control: str, records: list[dict], counts: dict) -> str:
    """The README.md of a built dataset: `configs` and `dataset_info`, schema, counts, origin and quirks.

    Parameters
    ----------
    recipe : dict
        `preprocessing` (a dict of its settings), `channels` and `source`.
    control : str
        Name of the negative control in the source's table.
    records : list of dict
        One per plate, of `dataset_scripts.plates.build_plate`.
    counts : dict
        Of `count_fields`.
    """
    import datasets
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, DatasetCardData

    source, channels, rows = recipe["source"], recipe["channels"], counts["fields"]
    parts = [part for part in PARTS if rows[part]]
    configs, infos = MetadataConfigs(), datasets.info.DatasetInfosDict()
    for name, members in [(part, [part]) for part in parts] + [("all", parts)]:
        # "all" lists the files of the parts: no plane is stored twice.
        paths = [f"data/{part}/train-*.parquet" for part in members]
        configs[name] = {"data_files": [{"split": "train", "path": paths if len(paths) > 1 else paths[0]}]}
        if name == parts[0]:
            configs[name]["default"] = True
        shards = [record["shards"][part] for record in records for part in members if part in record["shards"]]
        size = sum(shard["bytes"] for shard in shards)
        split = datasets.SplitDict()
        split.add(datasets.SplitInfo("train", num_bytes=size, num_examples=sum(rows[part] for part in members)))
        infos[name] = datasets.DatasetInfo(
            config_name=name,
            features=screen_features(channels),
            splits=split,
            download_size=size,
            dataset_size=size,
        )
    simulated = source.startswith("simulated")
    data = DatasetCardData(
        pretty_name=source,
        task_categories=["image-feature-extraction"],
        tags=["biology", "microscopy"] + (["simulated"] if simulated else []),
    )
    infos.to_dataset_card_data(data)
    configs.to_dataset_card_data(data)
    return DatasetCard.from_template(
        data,
        template_str=resources.files("dataset_scripts").joinpath("dataset_card.md").read_text(encoding="utf-8"),
        source=source,
        simulated=simulated,
        official=source == "BBBC021v1",
        channels=channels,
        steps=recipe["preprocessing"],
        functions=sum(len(record["functions"]) for record in records),
        control=control,
        counts=counts,
        parts=parts,
        citation=CITATION,
    ).content


def build_summary(
    output: Path, table: str | Path, control: str, recipe: dict, records: list[dict], counts: dict
) -> Iterator[str]:
    """What was built, sentence by sentence; `table` is the image table, the others are those of the card."""
    yield f"{output}: " + ", ".join(f"{counts['fields'][part]:,} {part}" for part in PARTS) + " fields"
    if not counts["fields"]["dmso"]:
        yield (
            f"no field is of the control {control!r}, on which profiles are whitened: if the screen has one, name it "
            "in the column mapping"
        )
    if counts["fields_absent"] or counts["fields_incomplete"]:
        yield (
            f"of the {counts['fields_named']:,} fields in {table}, {counts['fields_absent']:,} are absent and "
            f"{counts['fields_incomplete']:,} lack a channel (null image)"
        )
    if counts["fields_flawed"]:
        kinds = ", ".join(f"{flaw} ({count:,})" for flaw, count in counts["flaws"].items())
        dropped = counts["fields_dropped"]
        fate = f"{dropped:,} were dropped, see build.json" if dropped else "leave them out with --drop_bad"
        yield f"{counts['fields_flawed']:,} fields have flaws (column quality): {kinds}; {fate}"
    named = [(record, channel) for record in records for channel in recipe["channels"]]
    uncorrected = [f"{record['plate']} {channel}" for record, channel in named if channel not in record["functions"]]
    if uncorrected and recipe["preprocessing"]["illumination"]:
        more = f" and {len(uncorrected) - 6} more" if len(uncorrected) > 6 else ""
        least = recipe["preprocessing"]["minimum_images"]
        yield f"not corrected for illumination, for fewer than {least} images: {', '.join(uncorrected[:6])}{more}"
