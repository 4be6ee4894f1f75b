"""Fields per second that the pipeline and the plain way extract, and whether their features are the same.

    python benchmarks/extraction.py --threads 2
    python benchmarks/extraction.py --device cuda --dtype bfloat16 --fields 256 --batch_size 32
    python benchmarks/extraction.py --memory --fields 20000       # does wsdino-extract's memory grow with the screen?

The plain way is what a first script does: one field at a time, its four tiles one after the other, replicated to RGB,
through transformers' `ViTModel` with eager attention, CLS token, median. The pipeline batches tiles of several fields,
takes one channel, uses fused attention and computes of the last block the CLS token alone. Both run in one process,
turn about, on the same random fields with the same weights; printed are the medians of the rounds, the spread of their
ratios, the largest difference of a feature, and the share of the machine's own matrix-product rate that each reaches.

With `--memory` wsdino-extract runs as a process of its own over as many small random fields, and what it holds is read
from Linux's /proc after every tenth of them: its own memory, mapped pages of files, and the most it ever held.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_wsdino import (  # noqa: E402
    WSDinoConfig,
    WSDinoFeatureExtractionPipeline,
    WSDinoImageProcessor,
    WSDinoModel,
    build_repository,
)

PATCH = 8


def make_networks(device: str) -> tuple[WSDinoModel, ViTModel]:
    """ViT-S/8 with random weights, ours and transformers' with the same weights."""
    torch.manual_seed(0)
    model = WSDinoModel(WSDinoConfig(channel_names=["dna"])).eval()
    config = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    config.patch_size, config.layer_norm_eps, config._attn_implementation = PATCH, 1e-6, "eager"
    plain = ViTModel(config, add_pooling_layer=False).eval()
    dino, state = model.to_dino_state_dict(), {}
    state["embeddings.cls_token"] = dino["cls_token"]
    state["embeddings.position_embeddings"] = dino["pos_embed"]
    for kind in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{kind}"] = dino[f"patch_embed.proj.{kind}"]
        state[f"layernorm.{kind}"] = dino[f"norm.{kind}"]
        for block in range(12):
            here, there = f"blocks.{block}.", f"layers.{block}."
            for name, part in zip("qkv", dino[here + f"attn.qkv.{kind}"].chunk(3), strict=True):
                state[there + f"attention.{name}_proj.{kind}"] = part
            for old, new in (
                ("attn.proj", "attention.o_proj"),
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                state[there + f"{new}.{kind}"] = dino[here + f"{old}.{kind}"]
    plain.load_state_dict(state)
    return model.to(device), plain.to(device)


def extract_plainly(plain: ViTModel, fields: np.ndarray, device: str) -> np.ndarray:
    """One field at a time, four tiles one after the other."""
    features = []
    for field in fields:
        scaled = np.clip(field, 0, 10_000).astype(np.float32) / 10_000
        top, left = (field.shape[0] - 448) // 2, (field.shape[1] - 448) // 2
        tiles = []
        for row in (top, top + 224):
            for column in (left, left + 224):
                tile = torch.from_numpy(scaled[row : row + 224, column : column + 224]).expand(1, 3, -1, -1)
                with torch.no_grad():
                    tiles.append(plain(tile.to(device)).last_hidden_state[0, 0].cpu().numpy())
        features.append(np.median(np.stack(tiles), axis=0))
    return np.stack(features)


def floating_operations(tokens: int = 785, width: int = 384, depth: int = 12) -> float:
    """Of one field's four tiles, counting a multiplication and an addition as two; the plain way's, for both."""
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    return 4 * (depth * block + 2 * (tokens - 1) * 3 * PATCH**2 * width)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of this machine's own matrix product, in the MLP's shape: the best of several."""
    size = 4096 if torch.device(device).type == "cuda" else 785
    left = torch.randn(size * 4, 384, device=device, dtype=dtype)
    right = torch.randn(384, 1536, device=device, dtype=dtype)
    best = 0.0
    for _ in range(20):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(5):
            left @ right
        synchronise(device)
        best = max(best, 5 * 2 * left.shape[0] * 384 * 1536 / (time.perf_counter() - start))
    return best


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


MEASURED = """
import json, sys
from pathlib import Path
import extract_profiles
from evaluation_wsdino.profile_file import ProfileFile

write = ProfileFile.write

def measured(self, channel, rows, features):
    write(self, channel, rows, features)
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped, most = (round(int(lines[kind].split()[0]) / 1024) for kind in ("RssAnon", "RssFile", "VmHWM"))
    print(json.dumps({"fields": rows.stop, "own_mib": own, "mapped_mib": mapped, "most_mib": most}))

ProfileFile.write = measured
extract_profiles.main(sys.argv[1:])
"""


def measure_memory(fields: int, batch_size: int) -> list[dict]:
    """What wsdino-extract holds after every tenth of `fields` random fields of 64 x 80 pixels, by a tiny ViT."""
    rng = np.random.default_rng(0)

    def rows():
        for number in tqdm(range(fields), desc="Writing a screen", unit="field"):
            yield {"dna": rng.integers(0, 12_000, (64, 80)).astype(np.uint16), "plate": f"plate {number // 240}"}

    with tempfile.TemporaryDirectory() as folder:
        screen, model = Path(folder, "screen"), Path(folder, "model")
        screen.mkdir()
        features = Features({"dna": ImageFeature(), "plate": Value("string")})
        dataset = Dataset.from_generator(rows, features=features, cache_dir=f"{folder}/cache")
        dataset.to_parquet(screen / "train.parquet")
        config = WSDinoConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32)
        config.channel_names = ["dna"]
        build_repository(model, WSDinoModel(config), WSDinoImageProcessor(tile_size=32))
        words = [
            "--model",
            model,
            "--dataset",
            screen,
            "--subsets",
            "default",
            "--output",
            f"{folder}/profiles.parquet",
        ]
        words += ["--batch_size", batch_size, "--shard_fields", max(1, fields // 10)]
        command = [sys.executable, "-c", MEASURED, *map(str, words)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--fields", type=int, default=4, help="fields a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=4, help="fields that go through the pipeline together")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="pipeline's")
    parser.add_argument("--compile", action="store_true", help="compile the pipeline's model")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 matrix products, for both ways")
    parser.add_argument("--memory", action="store_true", help="measure what wsdino-extract holds, and nothing else")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args(argv)
    if arguments.memory:
        measured = measure_memory(arguments.fields, arguments.batch_size)
        for line in measured:
            print(json.dumps(line))
        if arguments.output:
            arguments.output.write_text(json.dumps(measured, indent=1) + "\n")
        return
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high" if arguments.tf32 else "highest")
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    on_gpu = torch.device(device).type == "cuda"
    model, plain = make_networks(device)
    model.to(dtype)
    if arguments.compile:
        model.compile()
    pipeline = WSDinoFeatureExtractionPipeline(model=model, image_processor=WSDinoImageProcessor(), device=device)
    fields = np.random.default_rng(0).integers(0, 12_000, (arguments.fields, 512, 640)).astype(np.uint16)

    def extract() -> np.ndarray:
        stream = pipeline((field for field in fields), batch_size=arguments.batch_size, return_tensors=True)
        return torch.stack(list(stream)).numpy()

    ways = {"plain": lambda: extract_plainly(plain, fields, device), "pipeline": extract}
    seconds, features = {name: [] for name in ways}, {}
    for way in ways.values():
        way()  # warm up
    for _ in tqdm(range(arguments.rounds), desc="Rounds", unit="round"):
        for name, way in ways.items():
            synchronise(device)
            start = time.perf_counter()
            features[name] = way()
            synchronise(device)
            seconds[name].append((time.perf_counter() - start) / arguments.fields)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    rates = {"plain": matmul_rate(device, torch.float32), "pipeline": matmul_rate(device, dtype)}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "compile": arguments.compile,
        "batch_size": arguments.batch_size,
        "torch": torch.__version__,
        "fields_a_second": {name: 1 / value for name, value in medians.items()},
        "share_of_matmul_rate": {name: floating_operations() / medians[name] / rates[name] for name in ways},
        "matmul_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "largest_difference": float(np.abs(features["plain"] - features["pipeline"]).max()),
    }
    for name in ways:
        print(
            f"{name:<10}{result['fields_a_second'][name]:8.3f} fields/s, "
            f"{100 * result['share_of_matmul_rate'][name]:.0f} % of {result['matmul_gflops'][name]:.0f} GFLOP/s"
        )
    low, high = result["speedup_range"]
    difference = result["largest_difference"]
    print(f"speed-up {result['speedup']:.2f} ({low:.2f}-{high:.2f}); largest difference {difference:.1e}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
