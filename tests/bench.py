"""Speed of training beside the ordinary loop (tests/ordinary.py): the report's final recipe, the same images.

    python tests/bench.py        about 10 minutes on 2 cores; needs a quiet machine and the data

Prints, and writes to results/bench.csv, at batch 16 and 64, in fp32 and bfloat16: images/s of training (the
median of the rounds; the two loops take turns, each measurement in its own process); the seconds of an epoch
(training, then evaluation of 5,000 training images and the validation images), from the images/s of both;
seconds from the start of train.py to its first step, and its peak memory; on a GPU also the memory there.
"""
import argparse
import itertools
import math
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ordinary  # noqa: E402
import train  # noqa: E402
from data import Split, load_splits  # noqa: E402
from model import CNN  # noqa: E402
from schedules import make_optimizer  # noqa: E402
from utils import GraphedStep, add_data_dir, device_name, number, pick_device  # noqa: E402
from utils import run, write_csv  # noqa: E402

WORKERS = (0, 2, 4)  # of the ordinary loop's DataLoader: the fastest counts
WARM_UP = 5          # batches before the clock starts


def measure_ordinary(folder, bs, amp, seconds, device, workers):
    """Of tests/ordinary.py's loop: images/s of training, GB of GPU memory in it, images/s of evaluation."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    torch.set_flush_denormal(False)  # as ordinary.py does
    device = torch.device(device)
    augment = [*ordinary.AUGMENT, v2.GaussianNoise(0, 0.05, clip=False), v2.RandomErasing(0.3, (0.02, 0.05))]
    loader = ordinary.make_loader(f"{folder}/train", augment, bs, workers, shuffle=True)
    model = ordinary.network(dropout=0.1).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-3)
    if amp:
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    training, evaluation = Timed(loader, seconds), Timed(loader, seconds / 2)
    ordinary.train_epoch(model, training, optimizer, device)
    memory = gpu_memory(device)
    ordinary.evaluate(model, evaluation, device)
    return training.images_per_s, memory, evaluation.images_per_s


class Timed:
    """The batches of `loader`, over and over, until `seconds` have passed since the warm-up."""

    def __init__(self, loader, seconds):
        self.loader, self.seconds = loader, seconds

    def __iter__(self):
        images, start = 0, math.inf
        for i, batch in enumerate(itertools.chain.from_iterable(itertools.repeat(self.loader))):
            now = time.perf_counter()  # the batches before this one are done
            if i == WARM_UP:
                start = now
            if now - start > self.seconds:
                self.images_per_s = images / (now - start)
                return
            images += len(batch[1]) if i >= WARM_UP else 0
            yield batch


def measure_ours(folder, bs, amp, seconds, device):
    """The same of train.py's loop."""
    device = pick_device(device)
    args = train.parse_args(["--bs", str(bs), *(["--amp"] if amp else [])])
    split = Split(*torch.load(f"{folder}/split.pt")).to(device)
    n = 100_000 if device.type == "cuda" else train.AUGMENT_CHUNK  # images in about a second
    n = min(len(split.labels), n)
    split = split.first(n // bs * bs)
    torch.backends.cudnn.deterministic = True
    augment, run_step = train.augmentation_of(args, split), GraphedStep()
    model = CNN(args.dropout_last, args.dropout_p).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args.optimizer, model, args.lr, args.weight_decay)

    def images_per_s(work, seconds):
        work(split.first(WARM_UP * bs))
        passes, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            work(split)
            passes += 1
        return passes * len(split.labels) / (time.perf_counter() - start)

    trained = images_per_s(  # .cpu() waits for the device
        lambda part: train.train_epoch(model, optimizer, part, augment, args, 1, run_step).cpu(), seconds)
    memory = gpu_memory(device)
    return trained, memory, images_per_s(lambda part: train.evaluate(model, part, augment, amp), seconds / 2)


def gpu_memory(device):
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else math.nan


def in_own_process(function, *args):
    """`function(*args)` in a new process: what one loop does to its memory is not the other's gain."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def start_and_memory(args):
    """Seconds from the start of train.py to its first step, and its peak memory over an epoch, in GB."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, train.__file__, "--data-dir", args.data_dir, "--device", args.device,
                   "--epochs", "1", "--limit", "5000", "--out", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        for line in process.stdout:
            if b" training and " in line:  # its last line before the first step
                seconds = time.perf_counter() - start
        if process.wait():  # it has said why
            sys.exit(process.returncode)
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # kB on Linux


def compare(folder, bs, amp, workers, args, device, splits):
    """A row of bench.csv."""
    common = folder, bs, amp, args.seconds, str(device)
    rounds = [(in_own_process(measure_ordinary, *common, workers), in_own_process(measure_ours, *common))
              for _ in range(args.rounds)]
    (usual, usual_gpu, usual_evaluation), (ours, gpu, evaluation) = (
        [statistics.median(values) for values in zip(*results)] for results in zip(*rounds))
    images = len(splits.train.labels)
    evaluated = min(images, train.TRAIN_EVAL) + len(splits.val.labels)
    usual_epoch, epoch = images / usual + evaluated / usual_evaluation, images / ours + evaluated / evaluation
    return {"bs": bs, "precision": "bf16" if amp else "fp32", "ordinary_workers": workers,
            "ordinary_images_per_s": usual, "images_per_s": ours, "times_ordinary": ours / usual,
            "ordinary_epoch_s": usual_epoch, "epoch_s": epoch,
            "ordinary_gpu_gb": usual_gpu, "gpu_gb": gpu,
            "ordinary_rounds": " ".join(f"{usual[0]:.0f}" for usual, _ in rounds),
            "rounds": " ".join(f"{ours[0]:.0f}" for _, ours in rounds)}


def show(row):
    print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in row.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag, default = parser.add_argument, " (default: %(default)s)"
    add_data_dir(parser)
    flag("--device", default="auto", help="auto (cuda, mps or cpu), or a torch device" + default)
    flag("--seconds", metavar="S", type=number(float, 0.1), default=6.0,
         help="least length of a measurement of training, s; of evaluation it is half" + default)
    flag("--rounds", metavar="N", type=number(int, 1), default=3, help="rounds; the median counts" + default)
    flag("--out", metavar="CSV", default="results/bench.csv", help="file of the results" + default)
    args = parser.parse_args()
    device, rows = pick_device(args.device), []
    (seconds, memory), splits = start_and_memory(args), load_splits(args.data_dir)
    about = {"seconds_to_first_step": seconds, "peak_memory_gb": memory, "images": splits.source,
             "hardware": device_name(device), "torch": torch.__version__}
    show(about)
    with tempfile.TemporaryDirectory() as folder:
        ordinary.write_images(splits.train, f"{folder}/train")
        torch.save(tuple(splits.train), f"{folder}/split.pt")
        for bs in (16, 64):
            common = folder, bs, False, args.seconds, str(device)
            speeds = {n: in_own_process(measure_ordinary, *common, n)[0] for n in WORKERS}
            show({"bs": bs} | {f"ordinary_{n}_workers": speed for n, speed in speeds.items()})
            for amp in (False, True):
                rows.append(compare(folder, bs, amp, max(speeds, key=speeds.get), args, device, splits))
                show(rows[-1])
                write_csv(args.out, [row | about for row in rows])


if __name__ == "__main__":
    run(main)
