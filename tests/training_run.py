"""A trainer of one channel on twelve fields of noise, for tests of its steps."""

import datasets
import numpy as np

import train_accelerate
from dataset_scripts import Fields
from pretraining_wsdino import PairBatchSampler, TrainingSettings
from pretraining_wsdino.self_distillation import views_of

BATCH = 3


def screen(dtype=np.uint16, rows=12):
    random = np.random.default_rng(0)
    high = 14_000 if dtype == np.uint16 else 255
    planes = [random.integers(0, high, (64, 80), dtype=dtype) for _ in range(rows)]
    columns = {"er": planes, "gene": [f"gene {row % 3}" for row in range(rows)]}
    features = datasets.Features({"er": datasets.Image(), "gene": datasets.Value("string")})
    return Fields.from_dataset(datasets.Dataset.from_dict(columns, features=features))


def settings_of(**changes) -> TrainingSettings:
    settings = {
        "channels": ["er"],
        "weak_label": "gene",
        "init": "random",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "drop_path_rate": 0.3,
        "global_crop_size": 32,
        "local_crop_size": 16,
        "local_crops": 3,
        "tile_size": 32,
        "num_prototypes": 40,
        "head_hidden_dim": 24,
        "head_bottleneck_dim": 8,
        "learning_rate": 1e-3,
        "warmup_epochs": 0,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 3,
        "stop_after_epoch": None,
        "weight_decay": 0.04,
        "final_weight_decay": 0.4,
        **changes,
    }
    return TrainingSettings(**settings)


def channel_run(folder, fields=None, **changes) -> train_accelerate.Trainer:
    settings = settings_of(output_dir=str(folder), **changes)
    return train_accelerate.channel_trainer(settings, "er", fields or screen())


def micro_batches(run, step):
    """The step's batches exactly as the loader makes them."""
    sampler = PairBatchSampler(
        run.data.pairs,
        batch_size=run.settings.per_device_train_batch_size,
        total_steps=step + 1,
        first_step=step,
        accumulation=run.settings.gradient_accumulation_steps,
    )
    return [run.data.collate([run.data.images[pair] for pair in pairs]) for pairs in sampler]


def views(run, batch):
    """A batch as the network's input."""
    return views_of(batch, run.settings, run.objective.max_intensity, run.objective.device)
