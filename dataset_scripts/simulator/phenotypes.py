"""What a population of cells looks like, as plain numbers: untreated, and under each mechanism of action.

The drawing follows what one sees in BBBC021 (MCF7 cells, 1280 x 1024 raw pixels): nuclei about 38 raw pixels across,
cell bodies about 100. A phenotype is a set of numbers, so that a dose is an interpolation between `Phenotype()`
(untreated) and the phenotype of a mechanism, and a compound is a small deviation from its mechanism.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np

# Numbers of a phenotype that stay below 1 when they are varied.
SHARES = ("clustering", "rounded", "monopolar", "binucleate", "fragmented", "tubulin_bundling", "nucleus_offset")


def _detail(highest: float, unit: str) -> float:
    """A number that stands at 0 in a simulated screen and is up to `highest` for cells that a network learns from."""
    return field(default=0.0, metadata={"range": (0, highest, unit)})


@dataclass(frozen=True)
class Phenotype:
    """Appearance of one population of cells. Lengths are raw pixels at scale 1, shares lie in [0, 1]."""

    density: float = 0.85  # cells, relative to a closed monolayer of cells of the untreated size
    clustering: float = 0.5  # 0 = even, 1 = islands with wide gaps between them
    cell_radius: float = 50.0
    cell_elongation: float = 1.25
    spikes: float = 0.10  # amplitude of the outline's irregularity, relative to the radius
    rounded: float = 0.03  # share of cells rounded up (mitotic, or dying)
    monopolar: float = 0.0  # share of the rounded ones with a monopolar aster inside a chromatin ring
    nucleus_radius: float = 18.5
    nucleus_elongation: float = 1.2
    nucleus_lobes: float = 0.03  # amplitude of the nuclear outline's irregularity
    nucleus_brightness: float = 1.0
    nucleus_texture: float = 0.10  # contrast of the chromatin's fine grain
    nucleus_offset: float = 0.12  # of the nucleus from the middle, relative to the cell radius
    nucleoli: float = 3.0  # dark spots per nucleus
    nucleolus_radius: float = 3.0
    binucleate: float = 0.03
    fragmented: float = 0.01  # share of cells whose nucleus is in pieces
    fragments: float = 5.0  # pieces of such a nucleus
    actin_body: float = 1.0
    actin_edge: float = 1.0
    actin_fibres: float = 8.0  # stress fibres per cell
    actin_puncta: float = 1.0  # bright spots per cell
    actin_puncta_radius: float = 2.0
    tubulin_diffuse: float = 1.0
    tubulin_filaments: float = 150.0  # per cell
    tubulin_length: float = 0.9  # of a filament, relative to the way from nucleus to edge
    tubulin_swirl: float = 1.3  # sd of the angle (radians) a filament winds around the nucleus
    tubulin_bundling: float = 0.05  # share of filaments that are thick bundles
    tubulin_perinuclear: float = 0.25  # brightness of the cloud on one side of the nucleus
    variability: float = 0.12  # log sd of sizes between cells of a population
    # Details: what real cells show beside the mechanisms' numbers.
    chromatin: float = _detail(0.22, "contrast of chromatin grain at many scales")
    chromatin_coarse: float = _detail(1, "0 = fine grain, 1 = coarse")
    nucleus_rim: float = _detail(0.4, "brightness of the nuclear rim relative to the middle")
    nucleus_dome: float = _detail(0.8, "share of a nucleus's light that follows its thickness")
    packing: float = _detail(1, "0 = scattered pieces of a nucleus, 1 = a dense bunch of many")
    figures: float = _detail(1, "share of rounded cells in other stages: prometaphase, anaphase, pyknotic, apoptotic")
    defocus: float = _detail(5, "raw pixels: blur of rounded cells, which stand above the focus")
    smoothness: float = _detail(1, "share of the outline's fine irregularity that is missing")
    glow: float = _detail(1.2, "brightness of rounded cells above their flat neighbours")
    floating: float = _detail(0.8, "blurred cells above the layer, per 10,000 raw pixels")
    debris: float = _detail(3, "bright specks, per 10,000 raw pixels")
    vacuoles: float = _detail(4, "dark holes per cell")
    thickness: float = _detail(1, "share of a cell's light that follows its thickness")
    nuclear_shadow: float = _detail(0.7, "share of tubulin missing at the nucleus")
    tubulin_network: float = _detail(2.5, "brightness of a dense network of short filaments")
    tubulin_sparsity: float = _detail(1, "0 = a haze of filaments, 1 = few single ones")
    tubulin_order: float = _detail(1, "0 = around the nucleus, 1 = along the cell")
    tubulin_edge: float = _detail(1.2, "brightness of tubulin at the cell's edge")
    actin_mesh: float = _detail(0.7, "contrast of the fine actin mesh")
    actin_order: float = _detail(1, "0 = mesh in all directions, 1 = along the cell")
    actin_cortex: float = _detail(1.5, "brightness of a broad belt below the cell's edge")
    actin_ruffles: float = _detail(2.5, "brightness of ruffles at free edges")
    actin_specks: float = _detail(1.5, "brightness of fine specks")
    filopodia: float = _detail(12, "thin spikes per cell")

    def blend(self, other: Phenotype, strength: float) -> Phenotype:
        """Interpolate every number: strength 0 gives this phenotype, 1 the other."""
        return Phenotype(
            **{
                f.name: getattr(self, f.name) + strength * (getattr(other, f.name) - getattr(self, f.name))
                for f in fields(self)
            }
        )

    def vary(self, rng: np.random.Generator, sd: float) -> Phenotype:
        """A phenotype whose every number is multiplied by exp(N(0, sd)); a detail that is absent takes no draw."""
        present = [f.name for f in fields(self) if f.name not in DETAILS or getattr(self, f.name)]
        return replace(self, **{name: getattr(self, name) * float(np.exp(rng.normal(0, sd))) for name in present})


# Lowest value, highest value and unit of every detail.
DETAILS: dict[str, tuple[float, float, str]] = {f.name: f.metadata["range"] for f in fields(Phenotype) if f.metadata}


def mechanism_phenotypes() -> dict[str, Phenotype]:
    """Full-dose phenotypes of the twelve mechanisms annotated in BBBC021, as described by Caie et al. (2010)."""
    normal = Phenotype()
    return {
        "Actin disruptors": replace(
            normal, density=0.55, cell_radius=40, spikes=0.32, actin_edge=0.25, actin_body=0.7, actin_fibres=0,
            actin_puncta=16, actin_puncta_radius=3.2, binucleate=0.35, tubulin_swirl=0.3, nucleus_offset=0.2,
        ),
        "Aurora kinase inhibitors": replace(
            normal, density=0.50, cell_radius=72, nucleus_radius=29, nucleus_lobes=0.28, nucleus_brightness=0.85,
            variability=0.22, actin_fibres=14, tubulin_filaments=240, nucleoli=7,
        ),
        "Cholesterol-lowering": replace(
            normal, density=0.60, cell_radius=34, cell_elongation=2.6, spikes=0.22, actin_body=1.5, actin_edge=0.7,
            nucleus_radius=16, nucleus_elongation=1.5, tubulin_swirl=0.25, tubulin_filaments=90, actin_fibres=3,
        ),
        "DNA damage": replace(
            normal, density=0.50, cell_radius=70, nucleus_radius=25, nucleus_texture=0.30, nucleus_brightness=0.8,
            nucleoli=2, nucleolus_radius=5.0, actin_fibres=18, actin_edge=0.7,
        ),
        "DNA replication": replace(
            normal, density=0.55, cell_radius=60, nucleus_radius=24.5, nucleus_texture=0.05, nucleus_brightness=1.1,
            nucleoli=1.2, nucleolus_radius=7.0, clustering=0.3, actin_puncta=4, tubulin_filaments=180,
        ),
        "Eg5 inhibitors": replace(
            normal, density=0.55, rounded=0.55, monopolar=0.95, clustering=0.3, binucleate=0.1, fragmented=0.12,
        ),
        "Epithelial": replace(
            normal, density=0.95, clustering=0.95, cell_radius=38, spikes=0.03, cell_elongation=1.05, actin_edge=2.6,
            actin_fibres=0, actin_body=0.7, nucleus_radius=16.5, tubulin_swirl=1.6, rounded=0.01,
        ),
        "Kinase inhibitors": replace(
            normal, density=0.65, spikes=0.40, cell_elongation=1.8, cell_radius=52, actin_edge=0.5, actin_fibres=2,
            actin_body=0.8, tubulin_filaments=70, tubulin_bundling=0.15, tubulin_swirl=0.3, nucleus_elongation=1.45,
        ),
        "Microtubule destabilizers": replace(
            normal, density=0.55, fragmented=0.65, fragments=7, rounded=0.22, cell_radius=46, tubulin_filaments=12,
            tubulin_length=0.35, tubulin_diffuse=2.2, spikes=0.16, nucleus_lobes=0.10,
        ),
        "Microtubule stabilizers": replace(
            normal, density=0.55, fragmented=0.70, fragments=6, rounded=0.15, cell_radius=54, tubulin_filaments=45,
            tubulin_bundling=0.85, tubulin_swirl=2.4, tubulin_diffuse=0.6, nucleus_lobes=0.10,
        ),
        "Protein degradation": replace(
            normal, density=0.60, cell_radius=38, nucleus_radius=14.5, nucleus_offset=0.45, nucleus_brightness=1.3,
            nucleus_lobes=0.12, nucleoli=0, tubulin_perinuclear=2.6, tubulin_filaments=60, rounded=0.12, spikes=0.15,
        ),
        "Protein synthesis": replace(
            normal, density=0.60, cell_radius=42, nucleus_radius=15.5, nucleus_texture=0.03, nucleoli=0.2,
            nucleus_elongation=1.05, spikes=0.05, tubulin_filaments=45, tubulin_diffuse=1.3, actin_edge=0.6,
            actin_fibres=1, tubulin_length=0.7,
        ),
    }  # fmt: skip


# Lowest value, highest value and unit of every number of a random phenotype: wider than the mechanisms of BBBC021.
RANGES: dict[str, tuple[float, float, str]] = {
    "density": (0.25, 1.0, "closed monolayers"),
    "clustering": (0, 0.97, "share"),
    "cell_radius": (30, 80, "raw pixels"),
    "cell_elongation": (1, 3, "long axis per short axis"),
    "spikes": (0, 0.45, "cell radii"),
    "rounded": (0, 0.7, "share of cells"),
    "monopolar": (0, 0.97, "share of rounded cells"),
    "nucleus_radius": (12, 32, "raw pixels"),
    "nucleus_elongation": (1, 2, "long axis per short axis"),
    "nucleus_lobes": (0, 0.35, "nuclear radii"),
    "nucleus_brightness": (0.5, 2, "of untreated"),
    "nucleus_texture": (0, 0.4, "of the brightness"),
    "nucleus_offset": (0, 0.6, "cell radii"),
    "nucleoli": (0, 10, "per nucleus"),
    "nucleolus_radius": (1.5, 8, "raw pixels"),
    "binucleate": (0, 0.5, "share of cells"),
    "fragmented": (0, 0.8, "share of cells"),
    "fragments": (2, 10, "per fragmented nucleus"),
    "actin_body": (0.4, 2, "of untreated"),
    "actin_edge": (0.15, 3, "of untreated"),
    "actin_fibres": (0, 24, "per cell"),
    "actin_puncta": (0, 20, "per cell"),
    "actin_puncta_radius": (1, 4, "raw pixels"),
    "tubulin_diffuse": (0.3, 3, "of untreated"),
    "tubulin_filaments": (8, 300, "per cell"),
    "tubulin_length": (0.2, 1, "of the way from nucleus to edge"),
    "tubulin_swirl": (0.1, 3, "radians"),
    "tubulin_bundling": (0, 0.97, "share of filaments"),
    "tubulin_perinuclear": (0, 3, "brightness relative to other tubulin"),
    "variability": (0.03, 0.3, "log sd"),
    **DETAILS,
}


def random_details(rng: np.random.Generator) -> dict[str, float]:
    """Draw every number of `DETAILS`: absent (0) three times in ten, otherwise uniform on its range."""
    return {name: float(rng.uniform(0, 1) * high * (rng.uniform() > 0.3)) for name, (_, high, _) in DETAILS.items()}


def random_phenotype(rng: np.random.Generator) -> Phenotype:
    """Draw every number independently from its range in `RANGES`, so that no mechanism is behind the phenotype.

    Numbers whose lowest value is above 0 are uniform on a log scale, since their ratios count; the others are uniform.
    Details are as in `random_details`.
    """
    numbers = {
        name: float(np.exp(rng.uniform(np.log(low), np.log(high))) if low > 0 else rng.uniform(low, high))
        for name, (low, high, _) in RANGES.items()
    }
    return Phenotype(**{**numbers, **random_details(rng)})


def mechanism_blend(rng: np.random.Generator) -> Phenotype:
    """Draw two mechanisms of BBBC021 and blend untreated cells with both, at random strengths, with some variation.

    Shares are at most 0.97 and the density is 0.25 to 1, so that the cells of the phenotype can be drawn. Details are
    as in `random_details`, whatever the mechanisms.
    """
    known = list(mechanism_phenotypes().values())
    first, second = rng.choice(len(known), 2, replace=False)
    blend = Phenotype().blend(known[first], rng.uniform(0, 1) ** 0.7).blend(known[second], rng.uniform(0, 0.6))
    blend = blend.vary(rng, 0.25)
    shares = {name: min(getattr(blend, name), 0.97) for name in SHARES}
    density = float(np.clip(blend.density, 0.25, 1.0))
    return replace(blend, **shares, density=density, **random_details(rng))
