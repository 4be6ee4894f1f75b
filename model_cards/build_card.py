"""Fill this folder's card templates with what a run's `results.json` and its models' configs say."""

from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCardData

TAGS = ("wsdino", "dino", "vit", "fluorescence-microscopy", "high-content-screening", "image-profiling")
# How a row of the results is called, in the order of the table.
SET_NAMES = {
    "trained": "**this model**",
    "init": "where training started",
    "initial": "where training started",
    "untrained": "untrained network",
    "intensity": "intensity statistics",
    "count": "nuclei counted and measured",
}
# Settings that a reader compares with the paper's recipe.
RECIPE = {
    "weak_label": "weak label",
    "pair_constraint": "partner differs in",
    "anchor_group": "anchors of a step share",
    "exclude_compounds": "compounds kept out",
    "init": "starting weights",
    "initializer_range": "SD of random weights",
    "whiten_patches": "whitened patch embedding",
    "epochs": "epochs of the schedules",
    "stop_after_epoch": "stopped after epoch",
    "max_steps": "stopped after step",
    "batch_size": "pairs a process and step",
    "gradient_accumulation_steps": "accumulated steps",
    "learning_rate": "learning rate, peak",
    "final_learning_rate": "learning rate, end",
    "weight_decay": "weight decay",
    "final_weight_decay": "weight decay, end",
    "global_crops": "global crops",
    "global_crop_size": "their side, pixels",
    "global_crop_area": "their share of the field",
    "local_crops": "local crops",
    "local_crop_size": "their side, pixels",
    "local_crop_area": "their share of the field",
    "student_temperature": "student temperature",
    "teacher_temperature": "teacher temperature",
    "centering": "targets kept apart by",
    "center_momentum": "centre momentum",
    "koleo_weight": "weight of KoLeo",
    "teacher_momentum": "teacher momentum, start",
    "num_prototypes": "prototypes",
    "drop_path_rate": "drop path of the student",
    "mixed_precision": "mixed precision",
    "seed": "seed",
}


def model_card(
    results: dict,
    config: dict,
    processor: dict,
    *,
    repo_id: str,
    dataset_id: str | None = None,
    dataset_name: str,
) -> str:
    """The card of one repository, of one channel or combined.

    Parameters
    ----------
    results : dict
        The run's `results.json`: the only place that numbers of the results, recipe and data come from.
    config, processor : dict
        The repository's `config.json` and `preprocessor_config.json`.
    repo_id, dataset_id : str
        Names on the Hub; without a dataset there, None.
    dataset_name : str
        What the data are called in words and in the metadata.

    Returns
    -------
    str
        Markdown with its metadata, as `README.md`.
    """
    channels = config["channel_names"]
    combined, simulated = len(channels) > 1, bool(results["simulated"])
    words = " and ".join([", ".join(channels[:-1]), channels[-1]]) if combined else channels[0]
    title = f"WS-DINO, {words} ({dataset_name})"
    scores = {
        name: part if combined else part["channels"][channels[0]]
        for name, part in results["sets"].items()
        if combined or channels[0] in part["channels"]
    }
    settings = results.get("settings") or {}
    width = config["hidden_size"] * len(channels)
    text = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")).substitute(
        title=f"Simulated demonstration: {title}" if simulated else title,
        notice=_SIMULATED_NOTICE if simulated else "",
        summary=(
            f"A vision transformer ({config['num_hidden_layers']} blocks, width {config['hidden_size']}, patches of "
            f"{config['patch_size']}x{config['patch_size']} pixels) for "
            + (f"each of the channels {words}, side by side." if combined else f"one fluorescence channel, {words}.")
        ),
        input_channels=f"the channels {words}, in this order" if combined else f"the {words} channel",
        tile_words=_tile_words(processor),
        output=f"{width} numbers a field, the median over its tiles of the CLS token"
        + (", the channels side by side and together of unit length" if combined else ""),
        repo_id=repo_id,
        example="{" + ", ".join(f'"{name}": "{name}.tif"' for name in channels) + "}" if combined else '"field.tif"',
        data=_data_words(results, settings, dataset_id, dataset_name),
        recipe=_recipe_table(settings.get("arguments") or {}),
        selection=_selection_words(settings.get("arguments") or {}),
        monitors=_monitor_words(results.get("training") or {}, channels),
        notes="".join(f"> **{note}**\n\n" for note in results.get("notes", [])),
        results=_results_table(scores),
        nearest=f"{votes} nearest neighbours' vote"
        if (votes := results["protocol"].get("k", 1)) > 1
        else "nearest neighbour",
        elsewhere="plate" if results["protocol"].get("batch_rule") == "plate" else "batch",
        protocol="; ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in results["protocol"].items() if value is not None
        ),
        comparison=_comparison_words(results) if combined else "",
        depth="8-bit" if processor["max_intensity"] <= 255 else "16-bit",
        scope=_SIMULATED_SCOPE if simulated else _MEASURED_SCOPE,
        intensity=_intensity_words(processor),
    )
    init = (settings.get("arguments") or {}).get("init")
    data = ModelCardData(
        language=None,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=[*TAGS, *(["simulated"] if simulated else [])],
        datasets=[dataset_id] if dataset_id else None,
        base_model=init if isinstance(init, str) and init.count("/") == 1 and not Path(init).exists() else None,
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(results, scores, settings, dataset_id, dataset_name),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def metric_card(repo_id: str) -> str:
    """The card of the metric's Space, which is a static page that `evaluate.load` reads the module from."""
    text = Template(Path(__file__).with_name("metric_card.md").read_text(encoding="utf-8")).substitute(repo_id=repo_id)
    title = "Not same compound (NSC, NSCB)"
    return (
        f"---\ntitle: {title}\nsdk: static\napp_file: index.html\npinned: false\nlicense: apache-2.0\n"
        f"tags:\n- evaluate\n- metric\n---\n\n{text}"
    )


_SIMULATED_NOTICE = (
    "> **Simulated data.** This model was trained and scored on drawn cells, to demonstrate the software. Its figures "
    "say nothing about real cells, and its features are of no use for them.\n\n"
)


# What a model was trained on, as the first of its limits.
_SIMULATED_SCOPE = "Trained on cells drawn by a program"
_MEASURED_SCOPE = "Trained on one screen: its assay, its cells and its microscope's intensities"


def _eval_results(
    results: dict, scores: dict, settings: dict, dataset_id: str | None, dataset_name: str
) -> list[EvalResult]:
    """NSC and NSCB of this model as metadata, where there was anything to score."""
    headline = scores.get(results["headline"]["set"], {})
    seen = (settings.get("arguments") or {}).get("weak_label") == "moa"
    about = (["mechanisms seen in training"] if seen else []) + (["simulated data"] if results["simulated"] else [])
    return [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="Mechanism-of-action matching",
            dataset_type=dataset_id or dataset_name.lower().replace(" ", "-"),
            dataset_name=dataset_name,
            dataset_config=(settings.get("dataset") or {}).get("part"),
            dataset_split="train",
            metric_type="not_same_compound",
            metric_name=f"{name.upper()} ({', '.join(about)})" if about else name.upper(),
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


def _results_table(scores: dict) -> str:
    order = sorted(
        scores, key=lambda name: (list(SET_NAMES).index(name) if name in SET_NAMES else len(SET_NAMES), name)
    )
    rows = [
        f"| {SET_NAMES.get(name, name)} | {_share(scores[name], 'nsc')} | {_share(scores[name], 'nscb')} |"
        for name in order
    ]
    return "\n".join(["| features | NSC | NSCB |", "|---|---|---|", *rows])


def _comparison_words(results: dict) -> str:
    """How many treatments the model matches that others do not, and the other way round."""
    sentences = []
    for comparison in results.get("comparisons", []):
        pair = comparison["nsc"]
        if pair.get("gained") is not None and pair.get("lost") is not None:
            gained, lost = len(pair["gained"]), len(pair["lost"])
            chance = "" if pair.get("p_compound") is None else f" (p = {pair['p_compound']:.2g} by compound)"
            sentences.append(
                f"Against {SET_NAMES.get(comparison['first'], comparison['first'])}, NSC gains {gained} and loses "
                f"{lost} of {pair['compared']} treatments{chance}."
            )
    return " ".join(sentences)


def _recipe_table(arguments: dict) -> str:
    if not arguments:
        return "The run kept no record of its settings."
    unused = ({"center_momentum"} if arguments.get("centering") == "sinkhorn" else set()) | (
        {"initializer_range", "whiten_patches"} if arguments.get("init", "random") != "random" else set()
    )
    rows = [
        f"| {words} | {_setting_words(arguments[name])} |"
        for name, words in RECIPE.items()
        if name not in unused and arguments.get(name) not in (None, "", [])
    ]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _setting_words(value) -> str:
    """A setting as a reader writes it: yes or no, and the ends of a range."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _selection_words(arguments: dict) -> str:
    """Which epoch these weights are of, and that its score had no part in that."""
    last = arguments.get("stop_after_epoch") or arguments.get("epochs")
    if last is None:
        return "The weights are those at the end of training."
    steps = arguments.get("max_steps")
    when = f"step {steps} (a trial run, cut short)" if steps else f"epoch {last}"
    return (
        f"The weights are those of the teacher at the end of training, {when}, which was set beforehand: no epoch was "
        "chosen by its score."
    )


def _monitor_words(training: dict, channels: list[str]) -> str:
    """The verdict on collapse, channel by channel, as the evaluation gave it."""
    lines = []
    for channel in channels:
        collapse = (training.get(channel) or {}).get("collapse")
        if collapse:
            reasons = f": {'; '.join(collapse['reasons'])}" if collapse["reasons"] else ""
            lines.append(f"- {channel}: {collapse['verdict']}{reasons}.")
    return "\n".join(["Collapse monitors at the end of training:", "", *lines]) if lines else ""


def _data_words(results: dict, settings: dict, dataset_id: str | None, dataset_name: str) -> str:
    counts, dataset = results["counts"], settings.get("dataset") or {}
    where = f"[{dataset_id}](https://huggingface.co/datasets/{dataset_id})" if dataset_id else dataset_name
    kept_out = (settings.get("arguments") or {}).get("exclude_compounds") or []
    trained = (
        f" It was trained on its part `{dataset['part']}` of {dataset['fields']:,} fields"
        + (f", without those of {' and '.join(kept_out)}." if kept_out else ".")
        if dataset
        else ""
    )
    return (
        f"{where} (source: {', '.join(results['sources']) or 'not recorded'}).{trained} It was scored on "
        f"{counts['fields']:,} fields, {counts['dmso_fields']:,} of them untreated: {counts['scored_treatments']} "
        f"treatments of {counts['compounds']} compounds with {counts['moas']} mechanisms of action, on "
        f"{counts['plates']} plates in {counts['batches']} batches."
    )


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
    }.get(processor["tiles"], "cut as the released code did")
    divided = "" if processor.get("intensity_scale") == "log" else " and divided by it"
    return f"{_intensity_words(processor)}{divided}, {where}"
