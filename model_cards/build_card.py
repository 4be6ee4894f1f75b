"""Fill this folder's card templates with what a run's `results.json` and its models' configs say."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, SpaceCard, SpaceCardData

from wsdino.run_folder import PROFILE_SETS, ordered_sets

TEMPLATES = Path(__file__).parent
TAGS = ("wsdino", "dino", "vit", "fluorescence-microscopy", "high-content-screening", "image-profiling")
# Settings that a reader compares with the paper's recipe.
RECIPE = {
    "weak_label": "weak label",
    "pair_constraint": "partner differs in",
    "anchor_group": "anchors of a step share",
    "exclude_compounds": "compounds kept out",
    "init": "starting weights",
    "initializer_range": "SD of random weights",
    "whiten_patches": "whitened patch embedding",
    "num_train_epochs": "epochs of the schedules",
    "stop_after_epoch": "stopped after epoch",
    "max_steps": "stopped after step",
    "per_device_train_batch_size": "pairs per process and step",
    "gradient_accumulation_steps": "accumulated steps",
    "learning_rate": "learning rate, peak",
    "final_learning_rate": "learning rate, end",
    "weight_decay": "weight decay",
    "final_weight_decay": "weight decay, end",
    "group_size": "images per averaged target",
    "patch_embedding": "patch embedding",
    "intensity_scale": "scale of intensities",
    "brightness_sd": "SD of the logarithm of brightness",
    "transpose": "probability that rows and columns are exchanged",
    "student_sees_globals": "student sees the teacher's views",
    "global_crops": "global crops",
    "global_crop_size": "side of global crops, pixels",
    "global_crop_area": "share of the field in a global crop",
    "local_crops": "local crops",
    "local_crop_size": "side of local crops, pixels",
    "local_crop_area": "share of the field in a local crop",
    "student_temperature": "student temperature",
    "teacher_temperature": "teacher temperature",
    "centering": "method against collapse",
    "center_momentum": "centre momentum",
    "koleo_weight": "weight of KoLeo",
    "teacher_momentum": "teacher momentum, start",
    "num_prototypes": "prototypes",
    "drop_path_rate": "drop path of the student",
    "mixed_precision": "mixed precision",
    "seed": "seed",
}


def model_card(
    results: dict, config: dict, processor: dict, *, repo_id: str, dataset_id: str | None = None, dataset_name: str,
    license: str = "apache-2.0", weights_dtype: str = "float32",
) -> str:  # fmt: skip
    """The card of one repository, of one channel or combined.

    Parameters
    ----------
    results : dict
        What `RunFolder.results` gives: the only place that numbers of the results, recipe and data come from.
    config, processor : dict
        The repository's `config.json` and `preprocessor_config.json`.
    repo_id, dataset_id : str
        Names on the Hub; without a dataset there, None.
    dataset_name : str
        What the data are called in words and in the metadata.
    license : str
        Licence of the weights, as the Hub spells it.
    weights_dtype : str
        How the weights are stored.

    Returns
    -------
    str
        Markdown with its metadata, as `README.md`.
    """
    channels, simulated = config["channel_names"], bool(results["simulated"])
    combined = len(channels) > 1
    arguments, dataset = results["settings"]["arguments"], results["settings"]["dataset"]
    scores = {
        name: results["sets"][name] if combined else results["sets"][name]["channels"][channels[0]]
        for name in ordered_sets(results["sets"])
        if combined or channels[0] in results["sets"][name]["channels"]
    }
    captions = {name: PROFILE_SETS[name].caption if name in PROFILE_SETS else name for name in results["sets"]}
    monitors = [(channel, results.get("training", {}).get(channel, {}).get("collapse")) for channel in channels]
    init = arguments.get("init")
    if isinstance(init, str) and Path(init).exists():  # a place on one machine, whose last names say enough
        arguments = arguments | {"init": "/".join(Path(init).parts[-2:]).lstrip("/")}
    headline = scores.get(results["headline"]["set"], {})
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=[*TAGS, *(["simulated"] if simulated else [])],
        datasets=[dataset_id] if dataset_id else None,
        base_model=init if isinstance(init, str) and init.count("/") == 1 and not Path(init).exists() else None,
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(headline, arguments, simulated, dataset, dataset_id, dataset_name),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md"),
        words=" and ".join([", ".join(channels[:-1]), channels[-1]]) if combined else channels[0],
        intensities=_intensity_words(processor),
        tiles=_tile_words(processor),
        example="{" + ", ".join(f'"{name}": "{name}.tif"' for name in channels) + "}" if combined else '"field.tif"',
        recipe=_recipe(arguments),
        last_epoch=arguments.get("stop_after_epoch") or arguments.get("num_train_epochs"),
        monitors=[(channel, collapse) for channel, collapse in monitors if collapse],
        scores=[("**this model**" if name == "trained" else captions[name], scores[name]) for name in scores],
        comparisons=[(one["nsc"], captions[one["first"]]) for one in results["comparisons"] if combined],
        votes=results["protocol"].get("k", 1),
        share=_share,
        **{"license": license, "weights_dtype": weights_dtype},
        **{"results": results, "counts": results["counts"], "arguments": arguments, "dataset": dataset},
        **{"config": config, "processor": processor, "channels": channels, "combined": combined},
        **{"simulated": simulated, "repo_id": repo_id, "dataset_id": dataset_id, "dataset_name": dataset_name},
    )
    return str(card)


def metric_card(repo_id: str) -> str:
    """The card of the metric's Space, which is a static page that `evaluate.load` reads the module from."""
    data = SpaceCardData(
        title="Not same compound (NSC, NSCB)",
        sdk="static",
        app_file="index.html",
        license="apache-2.0",
        tags=["evaluate", "metric"],
    )
    return str(SpaceCard.from_template(data, template_path=str(TEMPLATES / "metric_card.md"), repo_id=repo_id))


def architecture_name(config: dict) -> str:
    """`vits8` for the ViT-S/8 of the paper; other shapes are spelt out."""
    known = {(192, 12, 3): "vitt", (384, 12, 6): "vits", (768, 12, 12): "vitb"}
    shape = tuple(config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    return known.get(shape, f"vit{shape[0]}x{shape[1]}p") + str(config["patch_size"])


def dataset_names(results: dict) -> tuple[str, str]:
    """What the data are called in repository names and in words."""
    if results["simulated"]:
        return "simulated", "simulated screen"
    source = results["sources"][0] if results["sources"] else "screen"
    if source.lower().startswith("bbbc021"):
        return "bbbc021", "BBBC021v1"
    return re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-"), source


def _eval_results(
    headline: dict, arguments: dict, simulated: bool, dataset: dict, dataset_id: str | None, dataset_name: str
) -> list[EvalResult]:
    """NSC and NSCB of this model as metadata, where there was anything to score."""
    seen = arguments.get("weak_label") == "moa"
    about = ", ".join((["mechanisms seen in training"] if seen else []) + (["simulated data"] if simulated else []))
    return [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="Mechanism-of-action matching",
            dataset_type=dataset_id or dataset_name.lower().replace(" ", "-"),
            dataset_name=dataset_name,
            dataset_config=dataset.get("subset"),
            dataset_split="train",
            metric_type="not_same_compound",
            metric_name=f"{name.upper()} ({about})" if about else name.upper(),
            metric_value=headline[name],
        )
        for name in ("nsc", "nscb")
        if headline.get(name) is not None
    ]


def _share(score: dict, name: str) -> str:
    """`0.981 (101/103), 0.93-1.00`, or a dash where nothing could be scored."""
    if score.get(name) is None:
        return "-"
    low, high = score.get(f"{name}_bootstrap") or score.get(f"{name}_wilson") or (None, None)
    interval = "" if low is None else f", {low:.2f}-{high:.2f}"
    return f"{score[name]:.3f} ({score[f'{name}_correct']}/{score[f'{name}_total']}){interval}"


def _recipe(arguments: dict) -> list[tuple[str, str]]:
    """Settings that had an effect, as a reader writes them: yes or no, and the ends of a range."""
    unused = {"center_momentum"} if arguments.get("centering") == "sinkhorn" else set()
    if arguments.get("init", "random") != "random":
        unused |= {"initializer_range", "whiten_patches"}
    rows = []
    for name, words in RECIPE.items():
        value = arguments.get(name)
        if name in unused or value in (None, "", []):
            continue
        if isinstance(value, bool):
            value = "yes" if value else "no"
        rows.append((words, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return rows


def _intensity_words(processor: dict) -> str:
    if processor.get("intensity_scale") == "log":
        return f"as logarithms from {0.02 * processor['max_intensity']:,.0f} on"
    return f"clipped at {processor['max_intensity']:,.0f}"


def _tile_words(processor: dict) -> str:
    size, grid = processor["tile_size"], processor["tile_grid"]
    where = {
        "paper": f"cut into {grid * grid} tiles of {size}x{size} pixels around the centre (fields of at least "
        f"{grid * size}x{grid * size})",
        "full": f"covered by tiles of {size}x{size} pixels",
    }
    return where.get(processor["tiles"], "cut as the released code did")
