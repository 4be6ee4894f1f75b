"""Repository folders are complete, self-contained and whole, and hold nothing else."""

import ast
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import modeling_wsdino
from modeling_wsdino import (
    WSDinoConfig,
    WSDinoImageProcessor,
    WSDinoModel,
    WSDinoMultiChannelModel,
    build_combined_repository,
    build_repository,
)

CODE = {f"{name}_wsdino.py" for name in ("configuration", "layers", "modeling", "image_processing", "pipeline")}
FILES = CODE | {"config.json", "model.safetensors", "preprocessor_config.json"}
SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}


def tower(seed, **values):
    torch.manual_seed(seed)
    return WSDinoModel(WSDinoConfig(**(SIZE | values))).eval()


@pytest.fixture
def processor():
    return WSDinoImageProcessor(tile_size=32)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_the_folder_holds_everything_and_nothing_else(tmp_path, processor):
    model = tower(0, channel_names=["dna"])
    folder = build_repository(tmp_path / "runs" / "dna", model, processor, card="# A card\n")
    assert folder == tmp_path / "runs" / "dna" and names_in(folder) == FILES | {"README.md"}
    assert (folder / "README.md").read_text() == "# A card\n"
    assert names_in(folder.parent) == {"dna"}
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_wsdino.WSDinoConfig",
        "AutoModel": "modeling_wsdino.WSDinoModel",
    }
    own = {"impl": "pipeline_wsdino.WSDinoFeatureExtractionPipeline", "pt": ["AutoModel"], "type": "image"}
    assert config["custom_pipelines"] == {"feature-extraction": own, "image-feature-extraction": own}
    assert config["channel_names"] == ["dna"] and config["model_type"] == "wsdino"
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["auto_map"] == {"AutoImageProcessor": "image_processing_wsdino.WSDinoImageProcessor"}
    assert settings["channel_names"] == ["dna"] and settings["tile_size"] == 32
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    # the objects that were given are as they were
    assert not hasattr(model.config, "auto_map") and processor.channel_names == []


def test_building_twice_gives_the_same_bytes(tmp_path, processor):
    folders = [build_repository(tmp_path / name, tower(0), processor) for name in ("first", "second")]
    for name in FILES:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_an_older_repository_is_replaced_and_anything_else_is_not(tmp_path, processor):
    folder = build_repository(tmp_path / "dna", tower(0), processor, card="old")
    (folder / "left_behind.txt").write_text("old")
    (tmp_path / "dna.partial").mkdir()  # of a run that was killed
    (tmp_path / "dna.partial" / "half.txt").write_text("half")
    build_repository(folder, tower(1), processor)
    assert names_in(folder) == FILES and names_in(tmp_path) == {"dna"}
    assert torch.equal(WSDinoModel.from_pretrained(folder).norm.weight, tower(1).norm.weight)
    other = tmp_path / "other"
    other.mkdir()
    assert build_repository(other, tower(0), processor) == other
    for path, content in (("thesis/chapter.txt", "precious"), ("foreign/config.json", '{"model_type": "vit"}')):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(content)
        with pytest.raises(ValueError, match="holds no WS-DINO repository"):
            build_repository((tmp_path / path).parent, tower(0), processor)
        assert (tmp_path / path).read_text() == content
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="holds no WS-DINO repository"):
        build_repository(tmp_path / "file", tower(0), processor)


def test_a_failure_leaves_the_older_repository_whole(tmp_path, processor, monkeypatch):
    folder = build_repository(tmp_path / "dna", tower(0), processor)
    before = {name: (folder / name).read_bytes() for name in FILES}

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(OSError, match="the disk is full"):
        build_repository(folder, tower(1), processor)
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_tiles_must_divide_into_patches(tmp_path):
    with pytest.raises(ValueError, match="tile_size 36 is not a multiple of the model's patch_size 8"):
        build_repository(tmp_path / "dna", tower(0), WSDinoImageProcessor(tile_size=36))
    assert not (tmp_path / "dna").exists()


def test_the_combined_repository_is_made_of_folders_or_models(tmp_path, processor):
    towers = {"dna": tower(0, channel_names=["dna"]), "tubulin": tower(1), "actin": tower(2, drop_path_rate=0.1)}
    folders = {name: build_repository(tmp_path / name, model, processor) for name, model in towers.items()}
    mixed = {"dna": folders["dna"], "tubulin": str(folders["tubulin"]), "actin": towers["actin"]}
    folder = build_combined_repository(tmp_path / "combined", mixed, card="# Combined\n")
    assert names_in(folder) == FILES | {"README.md"}
    model = WSDinoMultiChannelModel.from_pretrained(folder)
    assert model.config.channel_names == list(model.towers) == list(towers)
    assert WSDinoImageProcessor.from_pretrained(folder).channel_names == list(towers)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        apart = [model(images[:, [index]]).pooler_output for index, model in enumerate(towers.values())]
        np.testing.assert_allclose(model(images).pooler_output, torch.cat(apart, dim=1), atol=1e-6)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_wsdino.WSDinoMultiChannelModel"


def test_towers_that_do_not_fit_are_refused_in_a_sentence(tmp_path, processor):
    towers = {"dna": tower(0), "actin": tower(0, num_attention_heads=4)}
    with pytest.raises(ValueError, match="num_attention_heads is 4 for actin and 2 for dna"):
        build_combined_repository(tmp_path / "combined", towers, processor)
    with pytest.raises(ValueError, match="give an image_processor"):
        build_combined_repository(tmp_path / "combined", {"dna": tower(0)})


def test_towers_that_scale_fields_differently_need_an_image_processor(tmp_path, processor):
    other = WSDinoImageProcessor(tile_size=processor.tile_size, max_intensity=255)
    folders = {
        "dna": build_repository(tmp_path / "dna", tower(0), processor),
        "actin": build_repository(tmp_path / "actin", tower(1), other),
    }
    with pytest.raises(ValueError, match=f"max_intensity is 255 for actin and {processor.max_intensity} for dna"):
        build_combined_repository(tmp_path / "combined", folders)
    assert not (tmp_path / "combined").exists()
    folder = build_combined_repository(tmp_path / "combined", folders, other)
    assert WSDinoImageProcessor.from_pretrained(folder).max_intensity == 255


def test_the_shipped_files_import_only_each_other_and_what_comes_with_transformers():
    room = Path(modeling_wsdino.__file__).parent
    others = {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors"}
    allowed = others | set(sys.stdlib_module_names)
    for name in CODE:
        text = (room / name).read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and f"{node.module}.py" in CODE, name
        # transformers finds relative imports with a regular expression, in docstrings too
        found = re.findall(r"^\s*from\s+\.(\S*)\s+import", text, re.MULTILINE)
        assert {f"{module}.py" for module in found} <= CODE, name
        assert not re.search(r"^\s*import\s+\.", text, re.MULTILINE), name
