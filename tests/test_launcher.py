"""wsdino.launcher: every configuration that people have, used or refused by name, before anything is written."""

import json
import os
from dataclasses import dataclass

import pytest
import torch
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import launch as environments

import train_accelerate
from wsdino.errors import UserError
from wsdino.launcher import check_launcher, check_precision, follow_launcher

# What `accelerate config` writes, and what other projects change in it.
PLAIN = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "NO", "downcast_bf16": "no",
    "enable_cpu_affinity": False, "gpu_ids": "all", "machine_rank": 0, "main_training_function": "main",
    "mixed_precision": "no", "num_machines": 1, "num_processes": 1, "rdzv_backend": "static", "same_network": True,
    "tpu_env": [], "tpu_use_cluster": False, "tpu_use_sudo": False, "use_cpu": False,
}  # fmt: skip
FSDP = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True}
DYNAMO = {"dynamo_mode": "default", "dynamo_use_dynamic": False, "dynamo_use_fullgraph": False}
CONFIGURATIONS = [
    ("plain", {}, {"mixed_precision": "no", "compile": False, "gradient_accumulation_steps": 1}),
    ("bf16", {"mixed_precision": "bf16"}, {"mixed_precision": "bf16"}),
    ("fp16", {"mixed_precision": "fp16"}, {"mixed_precision": "fp16"}),
    ("cpu", {"use_cpu": True}, {"mixed_precision": "no"}),
    ("fsdp", {"distributed_type": "FSDP", "fsdp_config": FSDP, "num_processes": 2}, "FSDP"),
    ("deepspeed", {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}, "mixed_precision": "bf16"},
     "DeepSpeed"),
    ("megatron", {"distributed_type": "MEGATRON_LM", "megatron_lm_config": {}, "num_processes": 2}, "Megatron"),
    ("two GPUs of none", {"distributed_type": "MULTI_GPU", "num_processes": 2}, "2 processes"),
    ("inductor", {"dynamo_config": {**DYNAMO, "dynamo_backend": "INDUCTOR"}}, {"compile": True}),
    ("tensorrt", {"dynamo_config": {**DYNAMO, "dynamo_backend": "TENSORRT"}}, "tensorrt"),
]  # fmt: skip
ENVIRONMENTS = [
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"gradient_accumulation_steps": 4}),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, {"gradient_accumulation_steps": 1}),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "2 processes"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}, {}),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "2 processes"),
    ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, "srun started 4"),
    ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, {}),
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, {}),
    ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "--multi_gpu --num_processes N"),
    ({"PJRT_DEVICE": "TPU"}, "TPU"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism"),
]


@dataclass
class Settings:
    """The settings that a launcher knows."""

    mixed_precision: str | None = None
    gradient_accumulation_steps: int = 1
    compile: bool = False


@pytest.fixture
def clean(monkeypatch):
    """An environment without a launcher, on a machine without a GPU."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "SLURM_", "OMPI_", "PMI_", "FSDP_", "MEGATRON_", "PARALLELISM_")):
            monkeypatch.delenv(name)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "PJRT_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def outcome(settings=None, given=()):
    """What is used, or the sentence that refuses it."""
    try:
        check_launcher("train_accelerate.py")
        return vars(follow_launcher(settings or Settings(), given))
    except UserError as error:
        return str(error)


def agrees(found, expected):
    """Whether the outcome has the expected values, or the sentence names what was expected."""
    if isinstance(expected, str):
        return isinstance(found, str) and expected in found
    return isinstance(found, dict) and expected.items() <= found.items()


def environment_of_launch(path, *words):
    """The variables that `accelerate launch` sets for a script, by accelerate's own functions."""
    parser = accelerate_launch.launch_command_parser()
    args = parser.parse_args(["--config_file", str(path), *words, "train_accelerate.py"])
    args, _, _ = accelerate_launch._validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""  # as launch_command sets it
    if args.use_deepspeed:
        environment = environments.prepare_deepspeed_cmd_env(args)[1]
    elif args.multi_gpu or args.use_fsdp or args.use_megatron_lm:
        environment = environments.prepare_multi_gpu_env(args)
        environment |= {"WORLD_SIZE": str(args.num_processes), "RANK": "0", "LOCAL_RANK": "0"}  # torchrun's
    else:
        environment = environments.prepare_simple_launcher_cmd_env(args)[1]
    return {key: value for key, value in environment.items() if os.environ.get(key) != value}


@pytest.mark.parametrize(
    ("changes", "expected"), [each[1:] for each in CONFIGURATIONS], ids=[c[0] for c in CONFIGURATIONS]
)
def test_configuration_files_of_other_projects(clean, tmp_path, changes, expected):
    (tmp_path / "default_config.yaml").write_text(yaml.safe_dump({**PLAIN, **changes}))
    for name, value in environment_of_launch(tmp_path / "default_config.yaml").items():
        clean.setenv(name, value)
    found = outcome()
    assert agrees(found, expected), found


@pytest.mark.parametrize(("variables", "expected"), ENVIRONMENTS, ids=lambda value: str(value)[:60])
def test_environments_of_launchers(clean, variables, expected):
    for name, value in variables.items():
        clean.setenv(name, value)
    found = outcome()
    assert agrees(found, expected), found


@pytest.mark.parametrize(
    ("ours", "given", "expected"),
    [
        ({"mixed_precision": "no"}, ["mixed_precision"], "--mixed_precision no"),
        ({"mixed_precision": "bf16"}, ["mixed_precision"], "--mixed_precision bf16"),
        ({"mixed_precision": "fp16"}, ["mixed_precision"], {"mixed_precision": "fp16"}),
        ({"mixed_precision": "bf16"}, [], {"mixed_precision": "fp16"}),  # the preset's
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps"], "--gradient_accumulation_steps 2"),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps"], {"gradient_accumulation_steps": 4}),
        ({"compile": False}, ["compile"], "--compile False"),
    ],
)
def test_a_flag_that_contradicts_the_launcher_is_refused(clean, ours, given, expected):
    launched = {"mixed_precision": "fp16", "gradient_accumulation_steps": "4", "dynamo_backend": "INDUCTOR"}
    for name in ours:
        clean.setenv("ACCELERATE_DYNAMO_BACKEND" if name == "compile" else f"ACCELERATE_{name.upper()}",
                     launched["dynamo_backend" if name == "compile" else name])  # fmt: skip
    found = outcome(Settings(**ours), given)
    assert agrees(found, expected), found


def test_a_default_launch_leaves_a_preset_its_precision(clean):
    """`accelerate launch` says "no" whether or not anybody asked for it."""
    clean.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert outcome(Settings("bf16"))["mixed_precision"] == "bf16"


def test_more_processes_than_gpus(clean):
    clean.setattr(torch.cuda, "is_available", lambda: True)
    clean.setattr(torch.cuda, "device_count", lambda: 2)
    clean.setenv("WORLD_SIZE", "4")
    clean.setenv("LOCAL_WORLD_SIZE", "4")
    assert "has 2 GPUs" in outcome()
    clean.setenv("LOCAL_WORLD_SIZE", "2")  # two machines
    assert agrees(outcome(), {})


@pytest.mark.parametrize(
    ("precision", "device", "fits"), [("fp16", "cpu", False), ("fp16", "cuda", True), ("no", "cpu", True)]
)
def test_precisions_that_a_device_lacks(precision, device, fits):
    if fits:
        check_precision(precision, torch.device(device))
    else:
        with pytest.raises(UserError, match="fp16"):
            check_precision(precision, torch.device(device))


def test_what_the_launcher_said_is_recorded(clean, tiny_screen, tmp_path, capsys):
    """Accumulation of the environment: used by the step, said, and recorded; then refused."""
    from conftest import SMALL

    clean.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    words = ["--dataset", str(tiny_screen), *SMALL]
    train_accelerate.main([*words, "--output_dir", str(tmp_path / "launched")])
    assert "2 micro-batches of 4" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "launched" / "settings.json").read_text())["arguments"]
    assert recorded["gradient_accumulation_steps"] == 2 and recorded["mixed_precision"] == "no"
    clean.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    train_accelerate.main([*words, "--output_dir", str(tmp_path / "flag"), "--gradient_accumulation_steps", "2"])
    losses = [
        json.loads((tmp_path / run / "dna" / "metrics.jsonl").read_text())["loss"] for run in ("launched", "flag")
    ]
    assert losses[0] == losses[1]
    clean.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(SystemExit) as ended:
        train_accelerate.main([*words, "--output_dir", str(tmp_path / "no"), "--gradient_accumulation_steps", "3"])
    assert ended.value.code == 2 and not (tmp_path / "no").exists()
