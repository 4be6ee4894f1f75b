"""What several rooms' tests share: a tiny simulated screen, a finished run on it, and a command that is refused."""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest

# No test may wait for a network, nor read or leave anything in the user's caches. Set before any library is imported.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
_HOME = tempfile.TemporaryDirectory(prefix="wsdino-tests-")
os.environ["HF_HOME"] = _HOME.name

# The flags of a network and a training of one step on the tiny screen.
SMALL = (
    "--channels dna --hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 "
    "--per_device_train_batch_size 4 --tile_size 32 --global_crop_size 32 --local_crop_size 16 "
    "--local_crops 3 --num_prototypes 64 --head_hidden_dim 32 --head_bottleneck_dim 16 --max_steps 1"
).split()


@pytest.fixture(scope="session")
def tiny_raw(tmp_path_factory):
    """Folder of a tiny simulated screen in the official layout: two CSVs and TIFFs."""
    from dataset_scripts import simulate_screen

    folder = tmp_path_factory.mktemp("screen") / "raw"
    simulate_screen(folder, size="tiny", seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_screen(tiny_raw):
    """The same screen built into a dataset folder."""
    from dataset_scripts import build_dataset

    folder = tiny_raw.with_name("built")
    build_dataset(tiny_raw, folder)
    return folder


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Raw folder of a screen whose images are as small as they can be; only to be read."""
    from dataset_scripts import simulate_screen

    folder = tmp_path_factory.mktemp("prepare") / "raw"
    return simulate_screen(folder, "tiny", 11, image_size=(64, 80), scale=0.25, progress=False)


@pytest.fixture(scope="session")
def built(raw, tmp_path_factory):
    """The dataset folder of that screen; only to be read."""
    from dataset_scripts import build_dataset

    output = tmp_path_factory.mktemp("prepare") / "dataset"
    build_dataset(raw, output, progress=False)
    return output


@pytest.fixture(scope="session")
def archive_raw(tmp_path_factory):
    """Raw folder of a screen of two plates."""
    from dataset_scripts import simulate_screen

    size = {"image_size": (48, 56), "scale": 0.25, "batches": 2, "replicates": 1, "fields_per_well": 1}
    return simulate_screen(tmp_path_factory.mktemp("download") / "raw", "tiny", 2, progress=False, **size)


@pytest.fixture
def archive_server(archive_raw, tmp_path, monkeypatch):
    """A server of that screen in the public layout: tables, and one zip per plate with `<plate>/<file>` inside."""
    from archive_server import Server

    from dataset_scripts.archives import archive_name

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "www"
    folder.mkdir()
    for name in ("BBBC021_v1_image.csv", "BBBC021_v1_moa.csv"):
        shutil.copy(archive_raw / name, folder)
    (folder / "BBBC021_v1_compound.csv").write_text("compound,smiles\n")
    for plate in sorted(archive_raw.glob("Week*/Week*")):
        with zipfile.ZipFile(folder / archive_name(plate.name), "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(plate.iterdir()):
                archive.write(path, f"{plate.name}/{path.name}")
    server = Server(folder)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def random_run(tiny_screen, tmp_path_factory):
    """A run folder of that screen with random networks, for tests of extraction, which work on copies."""
    from extraction_run import make_run

    return make_run(tmp_path_factory.mktemp("extraction") / "run", tiny_screen)


@pytest.fixture(scope="session")
def finished_run(tiny_screen, tmp_path_factory):
    """A run of one step on the tiny screen, extracted and evaluated; only to be read."""
    import extract_profiles
    import train_accelerate
    from evaluation_wsdino import evaluate_profiles

    run = tmp_path_factory.mktemp("finished") / "run"
    train_accelerate.main(["--dataset", str(tiny_screen), "--output_dir", str(run), *SMALL])
    extract_profiles.main([str(run), "--sets", "trained"])
    evaluate_profiles.main([str(run)])
    return run


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of that run to damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def outputs(folder):
    """Every file and its content, by which nothing half-written goes unseen."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command that must end with one sentence and status 2, and that must leave the test's folder as it is."""

    def run(main, *words, named):
        before = outputs(tmp_path)
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in said
        last = said.strip().splitlines()[-1]
        assert "error:" in last and str(named) in last, last
        assert outputs(tmp_path) == before
        return last

    return run
