"""What else the trainer trains than WS-DINO's pairs: labels themselves, shuffled labels, other starts."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from training_run import channel_run, micro_batches, screen, settings_of, views

import train_accelerate
from pretraining_wsdino.settings import FREE_ON_RESUME, changed_settings
from pretraining_wsdino.step_data import shuffled_labels
from wsdino.errors import UserError
from wsdino.run_folder import RENAMED_SETTINGS


@pytest.mark.parametrize("group_size", [1, 3])
def test_supervised_steps_are_plain_cross_entropy_under_adamw(tmp_path, group_size):
    """Three steps against a loop of its own: loss, accuracy and weights."""
    run = channel_run(tmp_path, objective="supervised", drop_path_rate=0.0, weight_decay=0.0, group_size=group_size)
    plain = copy.deepcopy(run.network)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    genes = [f"gene {row % 3}" for row in range(12)]
    for step in range(3):
        (batch,) = micro_batches(run, step)
        assert "local" not in batch and len(batch["global"]["windows"]) == 3, "one view of each anchor"
        features = plain.backbone(views(run, batch)[0]).pooler_output
        logits = plain.head(features)
        labels = torch.tensor([sorted(set(genes)).index(genes[row]) for row in batch["anchors"].tolist()])
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = run.schedules(step)["lr"]
            group["weight_decay"] = 0.0
        for group in run.optimizer.param_groups:
            group["decayed"] = False
        optimizer.step()
        monitors = run.step(step, [batch])
        assert float(monitors["loss"]) == pytest.approx(loss.item(), abs=1e-5)
        assert float(monitors["accuracy"]) == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    for (name, ours), theirs in zip(run.network.named_parameters(), plain.parameters(), strict=True):
        if not name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding noise, which AdamW blows up
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


def test_a_supervised_run_is_saved_extracted_and_resumed(tiny_screen, tmp_path):
    from conftest import SMALL
    from transformers import AutoModel

    import extract_profiles

    words = ["--dataset", str(tiny_screen), "--output_dir", str(tmp_path), *SMALL, "--objective", "supervised"]
    words += ["--preset", "paper", "--init", "random", "--save_every_epochs", "1"]
    train_accelerate.main(words)
    train_accelerate.main([*words, "--resume", "--max_steps", "2"])
    lines = [json.loads(line) for line in (tmp_path / "dna" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(0 <= line["accuracy"] <= 1 for line in lines)
    AutoModel.from_pretrained(tmp_path / "dna" / "model", trust_remote_code=True)
    extract_profiles.main([str(tmp_path), "--sets", "trained", "--checkpoints"])
    assert list((tmp_path / "profiles" / "checkpoints").glob("*.parquet"))


def test_shuffled_labels_are_the_same_labels_on_other_images():
    labels = [f"compound {row % 5}" for row in range(40)] + [None, ""]
    eligible = [label != "compound 2" for label in labels]
    dealt = shuffled_labels(labels, eligible, seed=3)
    assert Counter(dealt) == Counter(labels)
    kept = [row for row, may in enumerate(eligible) if not may]
    assert all(dealt[row] == labels[row] for row in kept), "held-out images give their labels to none"
    moved = [row for row, may in enumerate(eligible) if may and dealt[row] != labels[row]]
    assert len(moved) > 15
    assert dealt == shuffled_labels(labels, eligible, seed=3) != shuffled_labels(labels, eligible, seed=4)


def test_shuffled_labels_reach_the_pairs(tmp_path):
    plain, shuffled = (channel_run(tmp_path, shuffle_labels=flag).data.pairs for flag in (False, True))
    assert (plain.label_counts == shuffled.label_counts).all()
    genes = np.array([f"gene {row % 3}" for row in range(12)])
    same = [genes[anchors] == genes[partners] for anchors, partners, _ in (plain.draw(0, 200), shuffled.draw(0, 200))]
    assert same[0].all() and not same[1].all()


def test_a_label_with_a_single_image_is_told(tmp_path, capsys):
    channel_run(tmp_path, fields=screen(rows=4))
    assert "2 weak labels have a single image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 48}, "hidden_size 32"),
        ({"patch_embedding": "convolutional"}, "patch_embedding linear"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 3"),
    ],
)
def test_a_start_of_each_channel_must_be_the_network_asked_for(tmp_path, change, named):
    start = channel_run(tmp_path / "first")
    start.save_model(tmp_path / "er" / "model", start.objective.model())
    again = channel_run(tmp_path / "second", init=str(tmp_path / "{channel}" / "model"))
    kept = start.objective.model().parameters()
    for ours, theirs in zip(again.objective.student.backbone.parameters(), kept, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match=named):
        train_accelerate.initial_backbone(settings_of(init=str(tmp_path / "er" / "model"), **change), "er")


def test_bf16_on_a_cpu_computes_attention_without_sdpa(tmp_path):
    AcceleratorState._reset_state(True)
    run = channel_run(tmp_path, mixed_precision="bf16")
    assert {each.config._attn_implementation for each in (run.objective.student.backbone, run.objective.model())} == {
        "eager"
    }
    AcceleratorState._reset_state(True)
    run = channel_run(tmp_path, mixed_precision="no")
    assert run.objective.model().config._attn_implementation == "sdpa"
    AcceleratorState._reset_state(True)


def test_a_run_of_the_previous_version_resumes(tiny_screen, tmp_path):
    """Its settings.json, log and flags have the old names."""
    from conftest import SMALL

    words = ["--dataset", str(tiny_screen), "--output_dir", str(tmp_path), *SMALL]
    train_accelerate.main(words)
    path, old = tmp_path / "settings.json", {new: name for name, new in RENAMED_SETTINGS.items()}
    settings = json.loads(path.read_text())
    del settings["earlier_launches"]
    for part in ("arguments", "dataset"):
        settings[part] = {old.get(name, name): value for name, value in settings[part].items()}
    settings["arguments"] |= {"mixed_precision": "no"}
    for name in ("objective", "shuffle_labels"):
        del settings["arguments"][name]
    path.write_text(json.dumps(settings))
    flags = ["--batch_size" if word == "--per_device_train_batch_size" else word for word in words]
    train_accelerate.main([*flags, "--resume", "--max_steps", "2"])
    now = json.loads(path.read_text())
    assert now["arguments"]["per_device_train_batch_size"] == 4 and "batch_size" not in now["arguments"]
    assert [launch["versions"] for launch in now["earlier_launches"]] == [settings["versions"]]


def test_only_settings_that_change_what_is_learned_bind_a_resumed_run():
    before = vars(settings_of())
    assert not changed_settings(before, settings_of(max_steps=7, save_total_limit=9, output_dir="elsewhere"))
    assert changed_settings(before, settings_of(seed=7, learning_rate=1.0)) == ["seed", "learning_rate"]
    assert set(before) > FREE_ON_RESUME
