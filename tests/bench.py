"""Speed of training beside the ordinary loop (ImageFolder, v2 transforms, DataLoader), on the same images.

    python tests/bench.py        about 8 minutes on 2 cores; needs a quiet machine and the data (--data-dir)

Prints, and writes to results/bench.csv: images/s of training at batch 16 and 64, fp32 and bfloat16 (median of the
rounds; the two loops take turns, each in its own process); the seconds of a whole epoch, from these images/s and those of
evaluation; the step's GFLOP/s as a share of this machine's matrix product in that precision; peak memory and the seconds
from start to the first step of train.py; where there is a GPU, its own memory, and the share of the time that its kernels
run in training.
"""
import argparse
import contextlib
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from model import CNN  # noqa: E402
from utils import device_name, keep_freed_memory, number, pick_device, run, write_csv  # noqa: E402

WORKERS = (0, 2, 4)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Usual(CNN):
    """The same network as it is usually written: all parameters trained, torch's dropout, and each block in the handout's
    order (model.py has the pool before the ReLU, which is the same)."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(True)
        self.drop3, self.drop4, self.drop5 = (torch.nn.Dropout(0.1) for _ in range(3))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.max_pool2d(self.drop3(F.relu(self.bn3(self.conv3(x)))), 2)
        x = F.max_pool2d(self.drop4(F.relu(self.bn4(self.conv4(x)))), 2)
        return self.fc(self.drop5(self.conv5(x)).mean((2, 3)))


class Ordinary:
    """The loop as it is usually written."""

    def __init__(self, folder, bs, amp, workers, device):
        plain = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.MEAN, data.STD)]
        augment = [v2.RandomHorizontalFlip(), *plain, v2.GaussianNoise(0, 0.05, clip=False),
                   v2.RandomErasing(0.3, (0.02, 0.05))]
        self.train_loader, self.eval_loader = (
            DataLoader(ImageFolder(folder, v2.Compose(transforms)), bs, shuffle=True, num_workers=workers,
                       persistent_workers=workers > 0, pin_memory=device.type == "cuda",
                       multiprocessing_context="fork" if workers else None)  # not spawn, as this process was: it is slow
            for transforms in (augment, plain))
        self.model, self.amp, self.device = Usual().to(device), amp, device
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, weight_decay=1e-3)

    def step(self, x, y):
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        loss.item()

    @torch.no_grad()
    def count(self, x, y):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return (self.model(x).argmax(1) == y).sum().item()

    def images_per_s(self, seconds, training=True):
        self.model.train(training)
        loader, work = (self.train_loader, self.step) if training else (self.eval_loader, self.count)
        images, start = 0, None
        while True:
            for step, (x, y) in enumerate(loader):
                work(x.to(self.device), y.to(self.device))
                if start is None:
                    if step == 4:  # the first steps warm up
                        start = time.perf_counter()
                    continue
                images += len(y)
                if time.perf_counter() - start > seconds:
                    return images / (time.perf_counter() - start)


class Ours:
    """train.py's epoch."""

    def __init__(self, split, bs, amp, device):
        self.split, self.bs, self.amp, self.device = split.to(device), bs, amp, device
        self.model = CNN().to(device, memory_format=torch.channels_last)
        self.step = train.make_step(self.model, train.make_optimizer("adam", self.model, lr=1e-3, weight_decay=1e-3), amp)
        self.transforms = data.augmentation(flip=0.5, noise=0.05, erase=0.3)
        keep_freed_memory()

    def images_per_s(self, seconds, training=True):
        def go(n):
            split = self.split.first(n * self.bs)
            if training:
                train.train_epoch(self.step, split, self.transforms, self.bs)
            else:
                train.evaluate(self.model, split, self.transforms, self.amp)
            synchronize(self.device)
        self.model.train(training)
        go(5)
        steps = 20 if self.device.type == "cpu" else len(self.split.labels) // self.bs
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            go(steps)
            images += steps * self.bs
        return images / (time.perf_counter() - start)

    def kernel_seconds(self):
        """Seconds an image that a GPU's kernels run in training."""
        split = self.split.first(train.AHEAD)
        self.model.train()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            train.train_epoch(self.step, split, self.transforms, self.bs)
            synchronize(self.device)
        on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(event.time_range.elapsed_us() for event in on_gpu) / 1e6 / len(split.labels)


@contextlib.contextmanager
def process(loop, *args):
    """A process for `loop(*args)` alone, as each loop has in use: what one does to its memory is not the other's gain."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_loop, (loop, args)) as executor:
        yield executor
        executor.submit(stop_loop).result()


def start_loop(loop, args):
    global LOOP
    if args[-1].type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # as train.py does
    LOOP = loop(*args)


def stop_loop():
    """Let go of the loop before its process ends, which would end a DataLoader's workers while its threads wait for them."""
    global LOOP
    LOOP = None


def measure(seconds, training=True):
    time.sleep(1)  # the other loop's workers may still fill their queues
    return LOOP.images_per_s(seconds, training)


def gpu_memory():
    return torch.cuda.max_memory_allocated() / 1e9


def kernel_seconds():
    return LOOP.kernel_seconds()


def matmul_gflops(dtype, device):
    """The best of some sizes; larger ones only while they are quick (emulated bfloat16 is not). On a GPU fp32 means TF32,
    which is what its convolutions use."""
    best, seconds = 0.0, 0.0
    for n in (512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192):
        a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
        for _ in range(6):
            if seconds > 1:
                return best
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            seconds = time.perf_counter() - start
            best = max(best, 2 * n ** 3 / seconds / 1e9)
    return best


def step_gflop_per_image():
    counter = FlopCounterMode(display=False)
    with counter:
        F.cross_entropy(CNN()(torch.randn(2, 3, 40, 40)), torch.tensor([0, 1])).backward()
    return counter.get_total_flops() / 2 / 1e9


def start_and_memory(args):
    """Seconds from start to train.py's last line before its first step, and its peak memory over an epoch, in GB."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, train.__file__, "--epochs", "1", "--warmup-epochs", "0", "--limit", "5000", "--out",
             f"{folder}/run", "--data-dir", args.data_dir, "--device", args.device], stdout=subprocess.PIPE)
        process.stdout.readline()
        seconds = time.perf_counter() - start
        process.communicate()
        if process.returncode:  # it has said why
            sys.exit(process.returncode)
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # kB on Linux


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", metavar="DIR", default=os.environ.get("DATA_DIR", "data"),
                        help="folder of the data; $DATA_DIR sets the default (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto (cuda, mps or cpu), or a torch device (default: auto)")
    parser.add_argument("--seconds", type=number(float, 0, open_low=True), default=6, help="length of one measurement, s (default: %(default)s)")
    parser.add_argument("--rounds", type=number(int, 1), default=3, help="measurements, of which the median counts (default: 3)")
    parser.add_argument("--out", default="results/bench.csv", help="default: %(default)s")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True  # see matmul_gflops
    device = pick_device(args.device)

    start_seconds, memory = start_and_memory(args)
    splits = data.load_splits(args.data_dir)
    whole = splits.train
    split = whole.first(4000)
    hardware = f"{device_name(device)}, torch {torch.__version__}"
    print(f"hardware {hardware}\nseconds_to_first_step {start_seconds:.1f}\npeak_memory_gb {memory:.2f}", flush=True)
    gflop, rows = step_gflop_per_image(), []
    with tempfile.TemporaryDirectory() as folder:
        for i, (image, label) in enumerate(zip(split.images, split.labels.tolist())):
            Path(folder, str(label)).mkdir(exist_ok=True)
            save_image(image / 255, Path(folder, str(label), f"{i}.png"))
        split = split if device.type == "cpu" else whole
        for bs in (16, 64):
            speeds = {}
            for workers in WORKERS:
                with process(Ordinary, folder, bs, False, workers, device) as ordinary:
                    speeds[workers] = ordinary.submit(measure, args.seconds).result()
            workers = max(speeds, key=speeds.get)
            print(f"ordinary_workers bs {bs}: " + ", ".join(f"{w} workers {s:.0f}" for w, s in speeds.items()), flush=True)
            for amp, dtype in ((False, torch.float32), (True, torch.bfloat16)):
                with (process(Ordinary, folder, bs, amp, workers, device) as ordinary,
                      process(Ours, split, bs, amp, device) as ours):
                    trained, evaluated = ([[loop.submit(measure, seconds, training).result() for loop in (ordinary, ours)]
                                           for _ in range(args.rounds)]
                                          for seconds, training in ((args.seconds, True), (args.seconds / 2, False)))
                    if device.type == "cuda":
                        memory, kernels = ours.submit(gpu_memory).result(), ours.submit(kernel_seconds).result()
                ordinary, ours = (statistics.median(values) for values in zip(*trained))
                # an epoch trains on the training images and evaluates them (train.py: 5,000) and the validation images
                n, n_val = len(whole.labels), len(splits.val.labels)
                evaluations = (n + n_val, min(n, train.TRAIN_EVAL) + n_val)
                epochs = [n / rate + images / statistics.median(values)
                          for rate, images, values in zip((ordinary, ours), evaluations, zip(*evaluated))]
                fp32 = ordinary if not amp else fp32
                peak = matmul_gflops(dtype, device)
                rows.append({"bs": bs, "precision": "bf16" if amp else "fp32", "ordinary_workers": workers,
                             "ordinary_images_per_s": round(ordinary), "images_per_s": round(ours),
                             "times_ordinary": round(ours / ordinary, 2), "times_ordinary_fp32": round(ours / fp32, 2),
                             "ordinary_epoch_s": round(epochs[0], 1), "epoch_s": round(epochs[1], 1),
                             "epoch_times_ordinary": round(epochs[0] / epochs[1], 2), "gflop_per_s": round(ours * gflop, 1),
                             "matmul_gflop_per_s": round(peak, 1), "share_of_matmul": round(ours * gflop / peak, 3),
                             "images_per_s_rounds": " ".join(f"{r[1]:.0f}" for r in trained),
                             "ordinary_rounds": " ".join(f"{r[0]:.0f}" for r in trained),
                             "evaluated_per_s_rounds": " ".join(f"{r[1]:.0f}" for r in evaluated),
                             "ordinary_evaluated_rounds": " ".join(f"{r[0]:.0f}" for r in evaluated),
                             "seconds_to_first_step": round(start_seconds, 1), "peak_memory_gb": round(memory, 2),
                             "hardware": hardware})
                if device.type == "cuda":
                    rows[-1]["gpu_busy"] = round(kernels * ours, 3)
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items() if key != "hardware"), flush=True)
                write_csv(args.out, rows)  # a bench that is cut short keeps its rows


if __name__ == "__main__":
    run(main)
