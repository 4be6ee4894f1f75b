"""The house's walls: what each room may import, read from the source and not from a run."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("wsdino", "modeling_wsdino", "pretraining_wsdino", "dataset_scripts", "evaluation_wsdino", "model_cards")
ROOF = ("train_accelerate", "extract_profiles", "push_to_hub", "pretrain_simulated")

# Beside the standard library, its own files and, where it says "wsdino", the ground floor. What ships to the Hub, the
# model files and the metric, must not import the ground floor.
ALLOWED = {
    "wsdino": {"torch", "accelerate", "filelock", "transformers"},
    "modeling_wsdino": {
        *("torch", "numpy", "PIL", "transformers", "safetensors", "huggingface_hub", "wsdino"),
        *("onnxruntime", "timm"),
    },
    "pretraining_wsdino": {"wsdino", "torch", "numpy", "accelerate", "tqdm"},
    "dataset_scripts": {
        *(
            "wsdino",
            "datasets",
            "huggingface_hub",
            "filelock",
            "numpy",
            "pandas",
            "PIL",
            "pyarrow",
            "scipy",
            "skimage",
            "tqdm",
            "zarr",
            "threadpoolctl",
            "tifffile",
        )
    },
    "evaluation_wsdino": {
        *("numpy", "pandas", "pyarrow", "scipy", "skimage", "sklearn", "threadpoolctl", "PIL", "tqdm"),
        *("wsdino", "datasets", "evaluate", "jinja2"),
    },
    "model_cards": {"wsdino", "huggingface_hub", "yaml", "jinja2"},
    "evaluation_wsdino/not_same_compound": {"numpy", "datasets", "evaluate"},
}


def imports_of(path):
    """(level, first word of the module) of every import anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, (node.module or "").split(".")[0]


def room_of(path):
    folder = path.parent.relative_to(ROOT).as_posix()
    return folder if folder in ALLOWED else folder.split("/")[0]


SHIPPED = [
    *(
        (ROOT / "modeling_wsdino" / f"{name}_wsdino.py")
        for name in ("configuration", "image_processing", "layers", "modeling", "pipeline")
    ),
    ROOT / "evaluation_wsdino" / "not_same_compound" / "not_same_compound.py",
]
ROOM_FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", ROOM_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_only_what_the_table_allows(path):
    absolute = {name for level, name in imports_of(path) if level == 0}
    own = {path.name.removesuffix(".py")} | {other.stem for other in path.parent.glob("*.py")}
    strangers = absolute - set(sys.stdlib_module_names) - ALLOWED[room_of(path)] - own
    assert not strangers, f"{path.name} imports {', '.join(sorted(strangers))}"
    # A sub-package reaches its room's other files, unless it has a row of its own in the table.
    inside = path.parent.relative_to(ROOT)
    depth = 1 if inside.as_posix() in ALLOWED else len(inside.parts)
    assert not any(level > depth for level, _ in imports_of(path)), "a room does not reach above itself"


def test_rooms_never_import_the_roof_or_one_another():
    for path in ROOM_FILES:
        absolute = {name for level, name in imports_of(path) if level == 0}
        assert not absolute & (set(ROOF) | set(ROOMS) - {"wsdino"}), path
    for path in SHIPPED:
        assert "wsdino" not in {name for level, name in imports_of(path) if level == 0}, path


def test_the_package_names_every_room_and_every_roof_script():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = set(setup["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOM_FILES if path.name == "__init__.py"}
    assert packages == found
    modules = set(setup["options"]["py_modules"].split())
    assert modules == {path.stem for path in ROOT.glob("*.py")}
    commands = [
        line.split("=")[1].strip() for line in setup["options.entry_points"]["console_scripts"].split("\n") if line
    ]
    for target in commands:
        module, function = target.split(":")
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert function in {
            node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
        }
