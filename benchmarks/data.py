"""How fast is the data room? Planes per second for building and reading, and peak memory, beside the plain ways.

    python benchmarks/data.py build --plates 2 --fields 120 --workers 2
    python benchmarks/data.py read

`build`: raw 1280 x 1024 TIFFs of simulated cells to the finished dataset (illumination function, division, halving,
PNG), by `build_dataset`, and by a plain loop over one file after another with scikit-image's own calls and Pillow's
PNG. Both do the same operations, and the largest difference of their planes is printed.

`read`: what a training item costs: 2 global crops of one field and 8 local ones of another. Plain: open two 640 x 512
TIFFs and pass over the whole image for each of the ten crops, as the original loader does. Ours: cut the ten windows
out of the memory-mapped plane cache by training's own collator; resizing and flipping happen on the training device,
and are also timed on this processor. PNG decoding from Parquet is timed beside them. Each way in its turn reads
the same 16 items, a batch of the paper's; the largest difference of the crops from the plain ones is printed.

Both ways run in one process tree, on the same files; an item's time is one thread's processor time.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from skimage.filters import rank
from skimage.morphology import disk
from skimage.transform import resize
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CHANNELS = ("dna", "tubulin", "actin")


def cpu_seconds():
    """Processor time of this process and its finished children: what other work on the machine does not change."""
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in use)


class PeakMemory:
    """Largest sum of the private memory of this process and its children, beyond what it was, sampled in a thread."""

    def __enter__(self):
        self.peak, self.running = 0, True
        self.before = self.now()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.running = False
        self.thread.join()

    def now(self):
        total = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                memory = process.memory_info()
                total += memory.rss - memory.shared
            except psutil.NoSuchProcess:
                pass
        return total

    def watch(self):
        while self.running:
            self.peak = max(self.peak, self.now() - self.before)
            time.sleep(0.05)


def write_screen(folder, plates, fields):
    """Full-size raw fields in the official layout; a few drawn fields are written under many names."""
    from dataset_scripts.simulator import Optics, Phenotype, draw_field, mechanism_phenotypes
    from dataset_scripts.simulator.plate_layout import HEADER

    phenotypes = [Phenotype(), *mechanism_phenotypes().values()][:4]
    drawn = [
        draw_field(np.random.default_rng(i), (1024, 1280), phenotype, Optics())
        for i, phenotype in enumerate(tqdm(phenotypes, desc="drawing fields"))
    ]
    lines, number = [HEADER], 0
    for p in range(plates):
        plate, place = f"Week1_{p + 1}", f"Week1/Week1_{p + 1}"
        (folder / place).mkdir(parents=True)
        for i in range(fields):
            cells = []
            for w, plane in zip((1, 2, 4), drawn[i % len(drawn)], strict=True):
                name = f"Week1_B{i:03d}_s{i % 4 + 1}_w{w}.tif"
                Image.fromarray(np.roll(plane, 37 * i, axis=1)).save(folder / place / name)
                cells += [name, place]
            number += 1
            lines.append(f"1,{number},{','.join(cells)},{plate},B{i:03d},1,DMSO,0")
    (folder / "BBBC021_v1_image.csv").write_text("\n".join(lines) + "\n")
    (folder / "BBBC021_v1_moa.csv").write_text('"compound",concentration,"moa"\n"DMSO",0,"DMSO"\n')


def plain_build(raw, output):
    """One file after another, with scikit-image's own calls; no second core."""
    made = {}
    for plate in sorted((raw / "Week1").iterdir()):
        for w in (1, 2, 4):
            paths = sorted(plate.glob(f"*_w{w}.tif"))
            total = 0.0
            for path in paths:
                total = total + np.asarray(Image.open(path)) / 65535
            average = (total / len(paths) * 65535).astype(np.uint16)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                smooth = rank.median(np.pad(average, 136, mode="edge"), disk(136))[136:-136, 136:-136].astype(float)
            minimum = np.sort(smooth.ravel())[int(smooth.size * 0.02)]
            function = np.maximum(smooth, minimum) / minimum
            for path in tqdm(paths, desc=f"plain, {plate.name} w{w}"):
                corrected = np.clip(np.asarray(Image.open(path)) / 65535 / function, 0, 1)
                small = resize(corrected, (512, 640), order=3, mode="symmetric")
                plane = np.rint(small * 65535).astype(np.uint16)
                target = output / f"{plate.name}_{path.stem}.png"
                Image.fromarray(plane).save(target, compress_level=1)
                made[f"Week1/{plate.name}/{path.name}"] = target
    return made


def build(args):
    from datasets import load_dataset

    from dataset_scripts import build_dataset

    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        temporary = Path(temporary)
        raw = temporary / "raw"
        write_screen(raw, args.plates, args.fields)
        planes = 3 * args.plates * args.fields
        start, busy = time.perf_counter(), cpu_seconds()
        with PeakMemory() as memory:
            build_dataset(raw, temporary / "dataset", workers=args.workers)
        ours, ours_busy = time.perf_counter() - start, cpu_seconds() - busy
        (temporary / "plain").mkdir()
        start, busy = time.perf_counter(), cpu_seconds()
        with PeakMemory() as plain_memory:
            made = plain_build(raw, temporary / "plain")
        plain, plain_busy = time.perf_counter() - start, cpu_seconds() - busy
        data = load_dataset(str(temporary / "dataset"), "all", split="train", cache_dir=str(temporary / "cache"))
        largest, total, count = 0, 0.0, 0
        for row in data.select(range(0, len(data), max(1, len(data) // 12))):
            for channel in CHANNELS:
                difference = np.abs(
                    np.asarray(row[channel]).astype(int) - np.asarray(Image.open(made[row[f"{channel}_file"]]))
                )
                largest, total, count = max(largest, int(difference.max())), total + difference.mean(), count + 1
    print(f"{planes} planes of {args.plates} plates, {args.workers} processes")
    for name, wall, busy, peak in (
        ("build_dataset", ours, ours_busy, memory.peak),
        ("plain loop", plain, plain_busy, plain_memory.peak),
    ):
        print(
            f"{name:14s} {wall:6.1f} s ({busy:.1f} s of processor), {planes / wall:.1f} planes/s, {peak / 1e9:.2f} GB"
        )
    print(f"{plain / ours:.1f} times as fast ({plain_busy / ours_busy:.1f} times less processor time)")
    print(f"difference in grey levels: largest {largest}, mean {total / count:.4f}")


def plain_item(paths, specs, random, once=False):
    """Two files opened, and the whole image passed over for every crop; with `once`, for every file only."""
    import torch
    import torch.nn.functional as F

    from pretraining_wsdino.multicrop import draw_boxes

    crops = []
    for path, spec in zip(paths, specs, strict=True):
        image = None
        for box in draw_boxes(random, spec, (512, 640)):
            if image is None or not once:
                image = np.asarray(Image.open(path)).astype(np.float32)
                image = np.clip(image, 0, 10000) / 10000
            top, left, height, width = box[:4]
            crop = torch.from_numpy(image[top : top + height, left : left + width].copy())[None, None]
            crop = F.interpolate(crop, (spec.size, spec.size), mode="bicubic", align_corners=False)
            for axis, flip in ((3, box[4]), (2, box[5])):
                crop = crop.flip(axis) if flip else crop
            crops.append(crop)
    return crops


def read(args):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from dataset_scripts import open_fields, open_planes
    from dataset_scripts.illumination import correct_plane
    from dataset_scripts.png import encode_png
    from dataset_scripts.simulator import Optics, Phenotype, draw_field
    from pretraining_wsdino.multicrop import CropSpec, resize_windows
    from pretraining_wsdino.pairs import CROP_STREAM, Pair, WeakLabelPairCollator, keyed_generator

    torch.set_num_threads(1)
    specs = (CropSpec(2, 224, (0.1, 0.2)), CropSpec(8, 96, (0.04, 0.08)))
    collator = WeakLabelPairCollator(*specs, seed=0)
    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        temporary = Path(temporary)
        drawn = [
            correct_plane(plane, None)
            for seed in tqdm(range(4), desc="drawing fields")
            for plane in draw_field(np.random.default_rng(seed), (1024, 1280), Phenotype(), Optics())
        ]
        count = args.fields
        planes = [np.roll(drawn[i % len(drawn)], 13 * i, axis=1) for i in range(count)]
        paths = [temporary / f"{i}.tif" for i in range(count)]
        for plane, path in zip(planes, paths, strict=True):
            Image.fromarray(plane).save(path)
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        rows = pa.array([{"bytes": encode_png(plane), "path": None} for plane in planes], image)
        pq.write_table(pa.table({"tubulin": rows}), temporary / "train.parquet", row_group_size=32, compression="none")
        data = open_fields(temporary, ["default"])
        start = time.perf_counter()
        mapped = open_planes(data, "tubulin", temporary / "cache", progress=False)
        once = time.perf_counter() - start
        pick = np.random.default_rng(1)

        def plain(pairs, once=False):
            return [
                plain_item((paths[a], paths[b]), specs, keyed_generator(0, CROP_STREAM, step, slot), once)
                for step, slot, a, b in pairs
            ]

        def cut(pairs):
            return collator([(pair, mapped[pair.anchor], mapped[pair.partner]) for pair in pairs])

        def cut_and_resize(pairs):
            parts = cut(pairs)
            return [
                resize_windows(parts[part]["windows"], parts[part]["sizes"], parts[part]["flips"], spec.size, 10000.0)
                for part, spec in zip(("global", "local"), specs, strict=True)
            ]

        ways = {
            "plain: whole image for each crop": plain,
            "plain: whole image once per file": lambda pairs: plain(pairs, once=True),
            "PNG from Parquet, decoding only": lambda pairs: [
                data.image(i, "tubulin") for pair in pairs for i in pair[2:]
            ],
            "memory map: cut ten windows": cut,
            "memory map: cut, resize, flip": cut_and_resize,
        }
        times = {name: [] for name in ways}
        for step in tqdm(range(args.repeats), desc="batches"):
            pairs = [Pair(step, slot, *map(int, pick.integers(0, count, 2))) for slot in range(args.items)]
            for name, way in ways.items():
                start = time.process_time()
                made = way(pairs)
                times[name].append((time.process_time() - start) / len(pairs))
                if way is plain:
                    expected = made
        ours = [crop for views in made for crop in views.view(-1, len(pairs), *views.shape[1:])]  # the last way's
        differences = [
            float((crops[i][0] - ours[i][item]).abs().max()) for item, crops in enumerate(expected) for i in range(10)
        ]
        print(f"cache of {count} planes written in {once:.2f} s ({count / once:.0f} planes/s), once")
        reference = statistics.median(times["plain: whole image for each crop"])
        for name, values in times.items():
            middle = statistics.median(values)
            print(f"{name:40s} {1e3 * middle:7.2f} ms per item, {reference / middle:6.1f} x")
        print(f"crops differ from the plain ones by {max(differences):.1e} at most")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build")
    command.add_argument("--plates", type=int, default=2)
    command.add_argument("--fields", type=int, default=120, help="a plate (BBBC021: 240)")
    command.add_argument("--workers", type=int, default=2)
    command.set_defaults(run=build)
    other = commands.add_parser("read")
    other.add_argument("--fields", type=int, default=200)
    other.add_argument("--items", type=int, default=16, help="a batch (the paper's: 16)")
    other.add_argument("--repeats", type=int, default=30, help="batches")
    other.set_defaults(run=read)
    for each in (command, other):
        each.add_argument("--scratch", help="folder for temporary files")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
