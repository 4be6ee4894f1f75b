"""How hard is a simulated screen? NSC and NSCB of classical features and of plain intensity statistics.

    python benchmarks/simulator_difficulty.py --dataset data/screen
    python benchmarks/simulator_difficulty.py --plate_map IMAGE_CSV MOA_CSV --image_size 512 640

On the real BBBC021, classical segmentation-based features reach an NSC of about 90 % and an NSCB of about 85 % (Ljosa
2013 and later work); whole-image intensity statistics far less. A simulator that is much easier or much harder says
little about a method. The features here are a small classical set computed with scipy.ndimage and scikit-image:
nuclei segmented by a smoothed Otsu threshold; their number, size, shape, brightness, texture and spacing; coverage,
granularity spectra, local contrast and correlations of all channels.

Profiles: every field is z-scored against the DMSO fields of its plate, averaged over a plate's wells, the median
taken over plates; nearest neighbour by cosine.

Measured on simulated screens: the official plate map at 400 x 512 raw pixels, seed 0: classical NSC 98/103 (95 %),
NSCB 86/92 (93 %), intensity 31/103 and 25/92. The `demo` screen, seeds 0, 1, 2: classical NSC 32, 34, 31 of 36, NSCB
23, 24, 24 of 24; intensity NSC 13, 13, 17 of 36, NSCB 8, 9, 15 of 24.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops_table
from tqdm.auto import tqdm

CHANNELS = ("dna", "tubulin", "actin")


def intensity_statistics(planes):
    """Mean, sd and percentiles of each channel: no shape at all."""
    values = []
    for plane in planes:
        values += [plane.mean(), plane.std(), *np.percentile(plane, (1, 10, 25, 50, 75, 90, 99, 99.9))]
    return np.array(values)


def classical_features(planes):
    """A small set of segmentation-based and texture features."""
    dna, tubulin, actin = (plane.astype(np.float32) for plane in planes)
    smooth = ndimage.gaussian_filter(dna, 1.0)
    mask = ndimage.binary_opening(smooth > threshold_otsu(smooth), iterations=1)
    nuclei = label(mask)
    values = {}
    background = [np.percentile(plane, 2) for plane in (dna, tubulin, actin)]
    coverage_of = {}
    for name, plane, level in zip(CHANNELS, (dna, tubulin, actin), background, strict=True):
        spread = max(float(np.percentile(plane, 99.5) - level), 1.0)
        signal = (plane - level) / spread
        coverage_of[name] = float((ndimage.gaussian_filter(signal, 1) > 0.12).mean())
        values[f"{name}_coverage"] = coverage_of[name]
        # Granularity: share of the energy in bands of size, so that gain cancels.
        blurred = [signal] + [ndimage.gaussian_filter(signal, s) for s in (0.7, 1.4, 2.8, 5.6, 11.2)]
        bands = np.array([(a - b).std() for a, b in zip(blurred, blurred[1:], strict=False)])
        for i, band in enumerate(bands / max(bands.sum(), 1e-9)):
            values[f"{name}_band{i}"] = band
        values[f"{name}_skew"] = float(((signal - signal.mean()) ** 3).mean() / max(signal.std(), 1e-6) ** 3)
    values["corr_dt"] = np.corrcoef(dna.ravel(), tubulin.ravel())[0, 1]
    values["corr_da"] = np.corrcoef(dna.ravel(), actin.ravel())[0, 1]
    values["corr_ta"] = np.corrcoef(tubulin.ravel(), actin.ravel())[0, 1]
    table = regionprops_table(
        nuclei,
        np.dstack([dna, tubulin, actin]),
        properties=("area", "eccentricity", "solidity", "extent", "perimeter", "mean_intensity", "centroid"),
    )
    keep = table["area"] >= 8
    values["objects"] = np.log1p(keep.sum())
    values["objects_over_cover"] = np.log((1 + keep.sum()) / (0.01 + coverage_of["actin"]))
    if keep.sum() < 2:
        return {**values, **{name: np.nan for name in _NUCLEAR}}
    area = table["area"][keep]
    for name in ("area", "eccentricity", "solidity", "extent"):
        column = np.log(table[name][keep]) if name == "area" else table[name][keep]
        values[f"{name}_mean"], values[f"{name}_sd"] = column.mean(), column.std()
        values[f"{name}_low"], values[f"{name}_high"] = np.percentile(column, (10, 90))
    form = table["perimeter"][keep] ** 2 / (4 * np.pi * area)
    values["form_mean"], values["form_high"] = form.mean(), np.percentile(form, 90)
    brightness = table["mean_intensity-0"][keep] - background[0]
    values["brightness_cv"] = brightness.std() / brightness.mean()
    values["brightness_high"] = np.log(np.percentile(brightness, 95) / np.median(brightness))
    inside = nuclei > 0
    grain = dna - ndimage.gaussian_filter(dna, 2.0)
    core = ndimage.binary_erosion(inside, iterations=2)
    values["grain"] = grain[core].std() / max(brightness.mean(), 1) if core.any() else np.nan
    for i, name in ((1, "tubulin"), (2, "actin")):
        ring = ndimage.binary_dilation(inside, iterations=6) & ~ndimage.binary_dilation(inside, iterations=1)
        plane = (tubulin, actin)[i - 1]
        outside = plane[~inside]
        values[f"{name}_ring"] = np.log(
            (plane[ring].mean() - background[i] + 1) / max(np.mean(outside) - background[i], 1.0)
        )
        values[f"{name}_nuclear"] = np.log(
            (plane[inside].mean() - background[i] + 1) / max(np.mean(outside) - background[i], 1.0)
        )
    places = np.stack([table["centroid-0"][keep], table["centroid-1"][keep]], 1)
    gaps = np.sqrt(((places[:, None] - places[None]) ** 2).sum(-1)) + np.eye(len(places)) * 1e9
    nearest = gaps.min(1)
    values["spacing_mean"], values["spacing_sd"] = np.log(nearest).mean(), np.log(nearest).std()
    return values


_NUCLEAR = (
    [f"{n}_{k}" for n in ("area", "eccentricity", "solidity", "extent") for k in ("mean", "sd", "low", "high")]
    + ["form_mean", "form_high", "brightness_cv", "brightness_high", "grain"]
    + ["tubulin_ring", "tubulin_nuclear", "actin_ring", "actin_nuclear", "spacing_mean", "spacing_sd"]
)  # fmt: skip


def _features(planes):
    return intensity_statistics(planes), classical_features(planes)


def scores(features, labels, detail=False):
    """NSC and NSCB (correct, total) by plain loops over treatments."""
    frame = pd.DataFrame(features)
    frame = frame.fillna(frame.median())
    values = frame.to_numpy(dtype=float)
    for plate in labels["plate"].unique():
        here = (labels["plate"] == plate).to_numpy()
        control = values[here & (labels["moa"] == "DMSO").to_numpy()]
        values[here] = (values[here] - control.mean(0)) / (control.std(0) + 1e-3 * np.abs(control.mean(0)) + 1e-9)
    values = np.clip(values, -30, 30)
    table = labels.assign(**{f"f{i}": values[:, i] for i in range(values.shape[1])})
    table = table[(table["moa"] != "DMSO") & (table["moa"] != "")]
    names = [c for c in table if c.startswith("f") and c[1:].isdigit()]
    plate_means = table.groupby(["treatment", "plate"])[names].mean()
    profiles = plate_means.groupby("treatment").median()
    facts = table.groupby("treatment").agg(compound=("compound", "first"), moa=("moa", "first"), b=("batch", set))
    facts = facts.loc[profiles.index]
    unit = profiles.to_numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    similarity = unit @ unit.T
    batches_of_moa = defaultdict(set)
    for moa, batches in zip(facts["moa"], facts["b"], strict=True):
        batches_of_moa[moa] |= batches
    result, wrong = {"nsc": [0, 0], "nscb": [0, 0]}, []
    for i in range(len(facts)):
        for name in result:
            best, winner = -np.inf, None
            if name == "nscb" and len(batches_of_moa[facts["moa"].iloc[i]]) == 1:
                continue
            for j in range(len(facts)):
                if facts["compound"].iloc[j] == facts["compound"].iloc[i]:
                    continue
                # A treatment of several batches counts as a batch of its own.
                if name == "nscb" and facts["b"].iloc[i] == facts["b"].iloc[j]:
                    continue
                if similarity[i, j] > best:
                    best, winner = similarity[i, j], j
            result[name][1] += 1
            result[name][0] += facts["moa"].iloc[winner] == facts["moa"].iloc[i]
            if name == "nsc" and facts["moa"].iloc[winner] != facts["moa"].iloc[i]:
                wrong.append(f"{facts['moa'].iloc[i]} -> {facts['moa'].iloc[winner]}")
    if detail:
        print(pd.Series(wrong).value_counts().to_string())
    return {name: f"{100 * a / b:.1f} % ({a}/{b})" for name, (a, b) in result.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="built dataset folder; default: simulate one")
    parser.add_argument("--size", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plate_map", nargs=2)
    parser.add_argument("--image_size", type=int, nargs=2)
    args = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dataset_scripts import build_dataset, open_fields, open_planes, simulate_screen

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dataset
        if folder is None:
            changes = {"image_size": tuple(args.image_size)} if args.image_size else {}
            plate_map = args.plate_map
            if plate_map:
                # The annotated and DMSO wells only: nothing else enters the scores.
                table = pd.read_csv(plate_map[0])
                known = pd.read_csv(plate_map[1])
                keys = set(zip(known["compound"], known["concentration"], strict=True))
                pairs = zip(table["Image_Metadata_Compound"], table["Image_Metadata_Concentration"], strict=True)
                table[[pair in keys for pair in pairs]].to_csv(f"{temporary}/image.csv", index=False)
                plate_map = (f"{temporary}/image.csv", plate_map[1])
            simulate_screen(f"{temporary}/raw", args.size, args.seed, plate_map=plate_map, **changes)
            folder = f"{temporary}/dataset"
            build_dataset(f"{temporary}/raw", folder)
        data = open_fields(folder, ["annotated", "dmso"], channels=CHANNELS)
        labels = data.table(["treatment", "compound", "moa", "batch", "plate"])
        planes = [open_planes(data, channel, cache_dir=f"{temporary}/planes") for channel in CHANNELS]
        tasks = ([np.array(plane[i]) for plane in planes] for i in range(len(data)))
        with ProcessPoolExecutor() as pool:
            features = list(tqdm(pool.map(_features, tasks, chunksize=16), total=len(data), desc="features"))
        print(f"{len(data)} fields, {labels['treatment'].nunique() - 1} treatments, planes {planes[0].shape[1:]}")
        print("intensity statistics:", scores([f[0] for f in features], labels))
        print("classical features:  ", scores([f[1] for f in features], labels, detail=True))
        return features, labels


if __name__ == "__main__":
    main()
