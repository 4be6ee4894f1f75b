"""wsdino.run_folder: where a run keeps what, and the order of its profile sets."""

import itertools
import json

import pytest

from wsdino.errors import UserError
from wsdino.files import write_json
from wsdino.run_folder import PROFILE_SETS, RunFolder, ordered_sets


@pytest.fixture
def run(tmp_path):
    """A run of two channels, of which one is trained."""
    run = RunFolder(tmp_path / "run")
    write_json(run.settings_file, {"arguments": {"channels": ["actin", "dna", "tubulin"]}, "dataset": {}})
    for channel in ("dna", "actin"):
        run.model(channel).mkdir(parents=True)
        (run.model(channel) / "model.safetensors").touch()
    return run


def test_sets_have_one_order_whatever_order_they_come_in():
    names = [*PROFILE_SETS, "resnet50", "a_baseline"]
    expected = ["trained", "initial", "untrained", "intensity", "nuclei", "a_baseline", "resnet50"]
    for order in itertools.islice(itertools.permutations(names), 0, None, 97):
        assert ordered_sets(order) == expected
    assert [one.name for one in PROFILE_SETS.values() if not one.uses_network] == ["intensity", "nuclei"]
    assert all(one.name == name and one.caption for name, one in PROFILE_SETS.items())


def test_every_path_lies_in_the_run_and_none_is_shared(run):
    paths = [
        *(run.settings_file, run.lock_file, run.results_file, run.report_file, run.pictures, run.combined_model),
        *(run.profile_file("trained"), run.profile_file("nuclei"), run.checkpoint_profiles(3)),
        *(run.model("dna"), run.initial_model("dna"), run.metrics_file("dna"), run.checkpoint("dna", 3)),
        *(run.model("actin"), run.initial_model("actin"), run.metrics_file("actin"), run.checkpoint("actin", 3)),
    ]
    assert len(set(paths)) == len(paths) and all(run.path in path.parents for path in paths)
    assert str(run) == str(run.path)


def test_checkpoints_are_the_whole_ones_newest_first(run):
    assert run.checkpoints("dna") == []
    for step in (9, 100, 20):
        run.checkpoint("dna", step).mkdir(parents=True)
    for leftover in ("step_00000200.partial", "step_00000300.damaged", "notes"):
        (run.checkpoint("dna", 0).parent / leftover).mkdir()
    assert run.checkpoints("dna") == [run.checkpoint("dna", step) for step in (100, 20, 9)]
    assert run.checkpoints("tubulin") == []


def test_trained_channels_are_in_the_order_of_the_run(run):
    assert run.trained_channels() == ["actin", "dna"]


def test_a_run_without_a_trained_channel_is_refused(tmp_path):
    run = RunFolder(tmp_path)
    write_json(run.settings_file, {"arguments": {"channels": ["dna"]}, "dataset": {}})
    with pytest.raises(UserError) as raised:
        run.trained_channels()
    assert str(tmp_path) in str(raised.value) and "--resume" in str(raised.value)


@pytest.mark.parametrize("settings", [None, [], {}, {"arguments": {}}, {"arguments": 3, "dataset": {}}])
def test_a_folder_that_holds_no_run_is_named(tmp_path, settings):
    if settings is not None:
        write_json(tmp_path / "settings.json", settings)
    with pytest.raises(UserError, match="settings.json"):
        RunFolder(tmp_path).settings()


def test_metrics_leave_out_a_half_written_line(run):
    assert run.metrics("dna") == []
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    run.metrics_file("dna").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert run.metrics("dna") == lines
