"""The data room: from a screen's raw images and tables to a Hugging Face dataset, and a simulator of such a screen.

Names are imported on first use, so that the worker processes of the simulator and of the builder start in a few
tenths of a second instead of waiting for `datasets`.
"""

import importlib

_HOME = {
    "Fields": "open_dataset",
    "Optics": "simulator.optics",
    "Phenotype": "simulator.phenotypes",
    "Planes": "open_dataset",
    "SCREEN_SIZES": "simulator.screen_design",
    "ScreenColumns": "screen",
    "ScreenDesign": "simulator.screen_design",
    "build_dataset": "prepare",
    "check_fields_once": "open_dataset",
    "draw_crops": "simulator.drawing",
    "load_thumbnails": "open_dataset",
    "mechanism_blend": "simulator.phenotypes",
    "metadata_table": "open_dataset",
    "open_fields": "open_dataset",
    "open_planes": "planes",
    "random_optics": "simulator.optics",
    "random_phenotype": "simulator.phenotypes",
    "read_screen": "screen",
    "simulate_screen": "simulator.simulate",
    "simulated_demo": "simulator.demo",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
