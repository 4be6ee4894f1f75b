"""Profiles of a small screen whose mechanisms differ by a known signal, for tests of the evaluation."""

import numpy as np
import pandas as pd

MOAS = ("Actin disruptors", "DNA damage", "Eg5 inhibitors", "Kinase inhibitors")


def screen(signal, seed=0, width=6, source="simulated, seed 7", batch_shift=0.3):
    """4 MOAs x 3 compounds x 2 concentrations; weeks 1-3, the last MOA in week 1 alone; a compound has one week."""
    rng = np.random.default_rng(seed)
    rows = []
    for week in (1, 2, 3):
        for plate in (1, 2):
            name = f"Week{week}_{plate}"
            for site in range(1, 7):
                rows.append((name, "B02", site, "DMSO", 0.0, "DMSO", "DMSO", f"Week{week}"))
            for m, moa in enumerate(MOAS):
                for c in range(3):
                    if (1 if m == 3 else c + 1) == week:
                        for d, dose in enumerate((0.1, 1.0)):
                            for site in (1, 2):
                                compound = f"{moa[:3]}-{c}"
                                well = f"{'CDEF'[m]}{c:02d}{d}"
                                rows.append(
                                    (name, well, site, compound, dose, f"{compound}_{dose:g}", moa, f"Week{week}")
                                )
    names = ("Plate", "Well", "Site", "Compound", "Concentration", "Treatment", "MOA", "Batch")
    frame = pd.DataFrame(rows, columns=[f"Metadata_{name}" for name in names])
    frame["Metadata_Source"] = source
    for channel in ("dna", "tubulin"):
        means = {moa: rng.normal(size=width) * signal for moa in MOAS} | {"DMSO": np.zeros(width)}
        weeks = {f"Week{week}": rng.normal(size=width) * batch_shift for week in (1, 2, 3)}
        values = np.stack(
            [means[m] + weeks[b] for m, b in zip(frame["Metadata_MOA"], frame["Metadata_Batch"], strict=True)]
        )
        values += rng.normal(size=values.shape)
        for index in range(width):
            frame[f"{channel}_{index:04d}"] = values[:, index].astype(np.float32)
    return frame
