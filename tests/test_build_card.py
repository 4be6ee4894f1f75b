"""Cards show the measured numbers and no others, say what training saw, and name the rule the scores were made by."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from model_cards import architecture_name, dataset_names, metric_card, model_card

CHANNELS = ("dna", "tubulin", "actin")


def make_results(dataset="nowhere", simulated=True):
    """A results.json whose every number is recognisable."""

    def scores(seed, interval=(0.31, 0.53)):
        right = 41 + seed
        found = {"nsc": right / 97, "nsc_correct": right, "nsc_total": 97}
        found |= {"nscb": (right - 7) / 89, "nscb_correct": right - 7, "nscb_total": 89}
        return found | {"nsc_bootstrap": list(interval), "nscb_bootstrap": [0.29, 0.57]}

    source = "simulated, seed 7" if simulated else "BBBC021v1"
    sets = {
        name: scores(seed)
        | {"channels": {channel: scores(seed + 1 + i, (0.2 + i / 50, 0.6)) for i, channel in enumerate(CHANNELS)}}
        for seed, name in ((11, "untrained"), (17, "intensity"), (23, "trained"))
    }
    pair = {"compared": 97, "gained": ["a"] * 13, "lost": ["b"], "p_compound": 0.0173}
    return {
        "format": 1,
        "simulated": simulated,
        "sources": [source],
        "headline": {"set": "trained", "nsc": sets["trained"]["nsc"], "nscb": sets["trained"]["nscb"]},
        "comparisons": [{"first": "untrained", "second": "trained", "nsc": pair, "nscb": pair}],
        "counts": {
            **{"fields": 2311, "dmso_fields": 619, "scored_treatments": 97, "compounds": 38},
            **{"moas": 12, "plates": 53, "batches": 9},
        },
        "protocol": {"normalization": "TVN", "metric": "cosine", "k": 1, "batch_rule": "median"},
        "versions": {},
        "sets": sets,
        "training": {
            "dna": {"collapse": {"verdict": "suspect", "reasons": ["the targets hardly differ"], "last": {}}}
        },
        "settings": {
            "arguments": {
                **{"channels": list(CHANNELS), "weak_label": "compound", "num_train_epochs": 43, "seed": 5},
                **{"stop_after_epoch": 37, "init": "random"},
            },
            "dataset": {"path": str(dataset), "subset": "annotated", "fields": 1693, "source": [source]},
        },
    }


def card_of(results, channels, **more):
    config = {"channel_names": channels, "hidden_size": 384, "num_hidden_layers": 12, "patch_size": 8}
    processor = {"tile_size": 224, "tile_grid": 2, "tiles": "paper", "max_intensity": more.pop("limit", 10_000)}
    return model_card(results, config, processor, **({"repo_id": "lab/name", "dataset_name": "BBBC021v1"} | more))


@pytest.mark.parametrize("channels", [["tubulin"], list(CHANNELS)], ids=["one channel", "combined"])
def test_a_card_shows_the_measured_numbers_and_no_others(channels):
    results = make_results(simulated=False)
    card = ModelCard(card_of(results, channels, dataset_id="lab/bbbc021"))
    scores = results["sets"]["trained"]
    scores = scores if len(channels) > 1 else scores["channels"]["tubulin"]
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {"NSC": scores["nsc"], "NSCB": scores["nscb"]}
    assert (
        card.data.model_name == "name" and card.data.datasets == ["lab/bbbc021"] and "simulated" not in card.data.tags
    )
    text = card.text
    for number in ("2,311", "619", "1,693", "38", "53", "epoch 37", f"({scores['nsc_correct']}/97)"):
        assert number in text, number
    assert ("0.31-0.53" in text) == (len(channels) > 1) == ("gains 13 and loses 1 of 97" in text)
    assert ("0.22-0.60" in text) == (channels == ["tubulin"])
    # every number of the table and of the data is in results.json (shares rounded)
    known = set(re.findall(r"\d+", json.dumps(results)))
    exact = [found for found in re.findall(r"\d+(?:\.\d+)?", json.dumps(results))]
    rounded = {f"{float(value):.{digits}f}" for value in exact for digits in (2, 3)}
    results_part = text[text.index("## Results") : text.index("## Limits")]
    data_part = text[text.index("## Data") : text.index("## Results")].replace(",", "")
    for number in re.findall(
        r"\d+\.\d+|\d+", results_part + data_part.replace("BBBC021v1", "").replace("bbbc021", "")
    ):
        assert number in known | rounded | {"95", "13"}, number  # 95 % intervals, 13 gained treatments


def test_a_card_says_what_the_pipeline_leaves_to_the_user():
    """The training data were corrected and resized; fields straight from a microscope are not."""
    text = " ".join(card_of(make_results(simulated=False), ["dna"]).split())
    assert "neither corrected for illumination nor resized: prepare yours as the training data were" in text
    assert "raw" not in text and "the median over its tiles of the CLS token" in text


def test_a_card_of_simulated_data_says_so_first():
    card = ModelCard(card_of(make_results(), ["dna"], dataset_name="simulated screen"))
    assert card.text.strip().startswith("# Simulated demonstration: ")
    assert "simulated" in card.data.tags and "Simulated data." in card.text
    assert {result.metric_name for result in card.data.eval_results} == {
        "NSC (simulated data)",
        "NSCB (simulated data)",
    }
    assert "- dna: suspect: the targets hardly differ." in card.text
    assert ModelCard(metric_card("lab/not_same_compound")).data.to_dict()["sdk"] == "static"


def test_a_card_tells_the_recipe_that_ran_and_no_setting_that_had_no_effect():
    results = make_results()
    arguments = results["settings"]["arguments"]
    arguments |= {"centering": "sinkhorn", "center_momentum": 0.8, "koleo_weight": 0.02, "whiten_patches": True}
    arguments |= {"exclude_compounds": ["taxol", "AZ-C"], "local_crop_area": [0.04, 0.08], "anchor_group": "plate"}
    results["protocol"]["aligned_by"] = None
    text = card_of(results, ["dna"])
    for row in (
        "| method against collapse | sinkhorn |",
        "| weight of KoLeo | 0.02 |",
        "| whitened patch embedding | yes |",
        "| compounds kept out | taxol, AZ-C |",
        "| share of the field in a local crop | 0.04, 0.08 |",
        "| anchors of a step share | plate |",
    ):
        assert row in text, row
    assert "centre momentum" not in text and "aligned by" not in text and "None" not in text
    assert "Trained on cells drawn by a program" in text
    arguments |= {"init": "facebook/dino-vits8", "centering": "mean", "exclude_compounds": []}
    results["simulated"] = False
    text = card_of(results, ["dna"])
    assert "| centre momentum | 0.8 |" in text and "whitened" not in text and "kept out" not in text
    assert "Trained on one screen" in text and "16-bit intensities of the dna channel" in text
    assert "8-bit intensities of" in card_of(results, ["dna"], limit=255)


def test_nothing_scored_is_a_dash_and_no_metadata():
    results = make_results()
    for part in results["sets"].values():
        part |= {"nscb": None, "nscb_correct": 0, "nscb_total": 0}
    card = ModelCard(card_of(results, list(CHANNELS)))
    assert [result.metric_name for result in card.data.eval_results] == ["NSC (simulated data)"]
    assert "| - |" in card.text


def test_names_of_architectures_and_data():
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    names = {(384, 12, 6, 8): "vits8", (768, 12, 12, 16): "vitb16", (96, 4, 3, 8): "vit96x4p8"}
    for shape, name in names.items():
        assert architecture_name(dict(zip(sizes, shape, strict=True))) == name
    assert dataset_names(make_results(simulated=False)) == ("bbbc021", "BBBC021v1")
    assert dataset_names(make_results()) == ("simulated", "simulated screen")


def test_a_card_says_that_training_saw_the_mechanisms():
    plain = card_of(make_results(simulated=False), ["tubulin"])
    assert "mechanisms seen in training" not in plain
    seen = make_results(simulated=False)
    seen["settings"]["arguments"]["weak_label"] = "moa"
    seen["notes"] = ["Training saw the MOA of every treatment: these scores are those of a training set."]
    card = card_of(seen, ["tubulin"])
    head, _, table = card.partition("| features | NSC | NSCB |")
    assert table and f"> **{seen['notes'][0]}**" in head
    assert "NSC (mechanisms seen in training)" in card and "NSCB (mechanisms seen in training)" in card


def test_a_card_says_which_compounds_training_did_not_see():
    kept_out = make_results(simulated=False)
    kept_out["settings"]["arguments"]["exclude_compounds"] = ["taxol", "AZ-C"]
    fields = kept_out["settings"]["dataset"]["fields"]
    assert f"its subset `annotated` of {fields:,} fields." in card_of(make_results(simulated=False), ["tubulin"])
    assert f"its subset `annotated` of {fields:,} fields, without those of taxol and AZ-C." in card_of(
        kept_out, ["tubulin"]
    )


def test_a_card_describes_the_rule_the_scores_were_made_by():
    card = " ".join(card_of(make_results(simulated=False), ["tubulin"]).split())
    assert "whose nearest neighbour among *other" in card and "from *another batch*" in card
    other = make_results(simulated=False)
    other["protocol"] |= {"k": 5, "batch_rule": "plate"}
    card = " ".join(card_of(other, ["tubulin"]).split())
    assert "whose 5 nearest neighbours' vote among *other" in card and "from *another plate*" in card
