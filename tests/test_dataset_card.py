"""The card of a built dataset: what the Hub reads of it, and numbers counted anew."""

import json

import numpy as np
import pytest
from huggingface_hub import DatasetCard
from small_screens import load, plain_screen, table_of

from dataset_scripts.prepare import build_dataset


def test_card_is_what_the_hub_reads(built):

    card = DatasetCard.load(built / "README.md")
    configs = {config["config_name"]: config for config in card.data.to_dict()["configs"]}
    assert set(configs) == {"annotated", "dmso", "unannotated", "all"}
    assert configs["all"]["data_files"][0]["path"] == [
        f"data/{part}/train-*.parquet" for part in ("annotated", "dmso", "unannotated")
    ]
    assert configs["annotated"]["default"] is True
    infos = {info["config_name"]: info for info in card.data.to_dict()["dataset_info"]}
    names = [feature["name"] for feature in infos["all"]["features"]]
    for name in names:
        assert f"`{name}`" in card.text, name
    assert "{" not in card.text.replace("{caie", "").split("```")[0]
    assert "simulated" in card.text


def counted(rows):
    """What a card may say of these rows of a screen, by plain counting."""
    annotated = [row for row in rows if row["moa"] not in ("", "DMSO")]
    return [len({row[name] for row in some}) for name, some in (
        ("plate", rows), ("batch", rows), ("treatment", annotated), ("compound", annotated), ("moa", annotated),
    )]  # fmt: skip


@pytest.mark.parametrize("chosen", [None, 1, 3])
def test_the_card_counts_what_was_built(raw, tmp_path, chosen):
    plates = sorted({row["Image_Metadata_Plate_DAPI"] for row in table_of(raw)})
    build_dataset(
        raw, tmp_path / "out", plates=plates[:chosen], source="BBBC021v1", illumination=False, progress=False
    )
    rows = load(tmp_path / "out", "all", tmp_path).remove_columns(["dna", "tubulin", "actin", "preview"])
    held, batches, treatments, compounds, mechanisms = counted(list(rows))
    text = " ".join((tmp_path / "out" / "README.md").read_text().split("---\n")[-1].split())
    said = f"{held} plates" if chosen is None else f"{held} of the 6 plates"
    said += f", {batches} batch{'es' * (batches > 1)}; {treatments} annotated treatments of {compounds} compounds"
    assert f"{said} with {mechanisms} mechanisms of action. Source: BBBC021v1." in text
    assert f"Of the {len(rows)} fields that the source's table names on the plates asked for, 0 are absent" in text
    # What is true of all of BBBC021 is not said of a part.
    assert ("Of the whole of BBBC021, of which this is a part:" in text) == (chosen is not None)
    counts = json.loads((tmp_path / "out" / "build.json").read_text())["counts"]
    assert counts["fields"]["all"] == len(rows) and counts["plates"] == held and counts["plates_named"] == 6


def test_the_card_of_another_screen_says_nothing_of_bbbc021(tmp_path):
    planes = [np.full((20, 24), 500 + i, np.uint16) for i in range(4)]
    screen = plain_screen(tmp_path, planes, drugs=("vehicle", "x"), control="vehicle")
    build_dataset(tmp_path, tmp_path / "out", **screen)
    card = (tmp_path / "out" / "README.md").read_text()
    text = " ".join(card.split("---\n")[-1].split())
    assert "1 plate, 1 batch; no treatment has a known mechanism of action." in text
    assert "The negative control is named DMSO here, and vehicle in the source." in text
    assert "| `annotated` |" not in text and "| `unannotated` | 2 |" in text
    for stranger in ("Caie", "taxol", "MCF7", "103", "broadinstitute", "cell-painting"):
        assert stranger not in card, stranger
    assert card.count("BBBC021") == 3  # examples in the description of columns
