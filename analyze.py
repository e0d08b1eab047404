"""Look inside a trained CNN: its first-layer filters and "who is expert?" (the report's section 2).

    python analyze.py --ckpt results/final/best.pt                 filters, and experts of the first and last layer
    python analyze.py --ckpt best.pt --layer last                  one layer: first, last, all or 1 to 5
    python analyze.py --ckpt best.pt --predict DIR                 classify a folder of unlabelled PNGs instead

Figures go beside the checkpoint (or to --out): filters.png, filters_rgb.png, filters/ (each kernel as an image);
for each layer N experts_layerN.png, .csv and a folder of one chart a filter; experts.png, the report's figure 8.
Filters and channels count from 1, as in the report. What is printed, a figure a line, goes to analysis.txt as well.
"""
import argparse
import os
import re
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torchvision.utils import save_image

from data import apply, augmentation, load_splits, read_images
from model import CNN
from train import EVAL_BATCH, evaluate
from utils import UserError, atomic, load_checkpoint, load_weights, number, pick_device, run, write_csv, write_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NO_AUGMENT = augmentation(flip=0)
LAYERS = {"first": [1], "last": [5], "all": [1, 2, 3, 4, 5], **{str(n): [n] for n in range(1, 6)}}


# ---------------------------------------------------------------- what is measured
@torch.inference_mode()
def class_norms(model, split):
    """For each of the five layers a float64 array [filters, 10]: the L2 norm over height and width of each filter's
    feature map, averaged over the images of each class (report, section 2.2). Raises UserError for a class without
    images."""
    model.eval()
    counts = torch.bincount(split.labels.cpu(), minlength=10).double()
    if (counts == 0).any():
        raise UserError(f"class {int(counts.argmin())} has no validation image, so its norms cannot be averaged")
    sums = [0] * 5
    for images, labels in zip(split.images.split(EVAL_BATCH), split.labels.split(EVAL_BATCH)):
        one_hot = torch.nn.functional.one_hot(labels.cpu(), 10).double()
        maps = model(apply(NO_AUGMENT, images), return_maps=True)[1]
        sums = [total + m.float().flatten(2).norm(dim=2).cpu().double().T @ one_hot for total, m in zip(sums, maps)]
    return [(total / counts).numpy() for total in sums]


def selectivity(norms):
    """Class selectivity index of each filter from its class means [filters, 10] (Morcos et al. 2018):
    (largest - mean of the others) / (largest + mean of the others), 0 for no preference to 1 for one class only.
    A filter that never responds gets 0."""
    largest = norms.max(1)
    others = (norms.sum(1) - largest) / (norms.shape[1] - 1)
    return np.divide(largest - others, largest + others, out=np.zeros_like(largest), where=largest > 0)


def expert_table(norms, classes):
    """One dict a filter: its number, ten class means (the norms, not divided by anything), index, best class."""
    return [{"filter": i + 1, **dict(zip(classes, map(float, means))), "class_selectivity_index": float(index),
             "best_class": classes[int(means.argmax())]}
            for i, (means, index) in enumerate(zip(norms, selectivity(norms)))]


def selectivity_lines(layer, norms, classes):
    index = selectivity(norms)
    low, median, high = np.quantile(index, [0.25, 0.5, 0.75])
    return [f"layer{layer}_selectivity_median {median:.4f} ({len(index)} filters)",
            f"layer{layer}_selectivity_quartiles {low:.4f} {high:.4f}",
            *(f"layer{layer}_expert filter {i + 1} {classes[int(norms[i].argmax())]} {index[i]:.4f}"
              for i in np.argsort(-index, kind="stable")[:5])]


# ---------------------------------------------------------------- what is drawn
def save_figure(figure, path):
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


def rescale(kernel):
    """A float tensor stretched to [0, 1]; a constant one becomes 0."""
    kernel = kernel - kernel.min()
    return kernel / kernel.max() if kernel.max() > 0 else kernel


def draw_filters(weight, out):
    """conv1's weights, float [16,3,7,7]: each kernel as an image in [0, 255], the grid of figure 7, the filters in RGB."""
    for i, kernels in enumerate(weight):
        for channel, kernel in enumerate(kernels):
            with atomic(out / "filters" / f"filter{i + 1:02}_channel{channel + 1}.png") as temporary:
                save_image(rescale(kernel)[None], temporary)

    figure, axes = plt.subplots(8, 7, figsize=(6.6, 8.2), layout="constrained", width_ratios=[1, 1, 1, 0.5, 1, 1, 1])
    figure.suptitle("First-layer kernels, each stretched to black and white:\nfilters 1 to 8 left, 9 to 16 right", fontsize=12)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis in axes[:, 3]:
        axis.axis("off")
    for i, kernels in enumerate(weight):
        row = axes[i % 8, 4 * (i // 8):][:3]
        row[0].set_ylabel(f"filter {i + 1}")
        for channel, (axis, kernel) in enumerate(zip(row, kernels)):
            axis.imshow(rescale(kernel).numpy(), cmap="gray")
            if i % 8 == 0:
                axis.set_title(f"channel {channel + 1}\n{('red', 'green', 'blue')[channel]}", fontsize=10)
    save_figure(figure, out / "filters.png")

    figure, axes = plt.subplots(2, 8, figsize=(10, 3.2), layout="constrained")
    figure.suptitle("First-layer filters in colour, each stretched to [0, 1]")
    for i, (axis, kernels) in enumerate(zip(axes.flat, weight)):
        axis.imshow(rescale(kernels).permute(1, 2, 0).numpy())
        axis.set(xticks=[], yticks=[], title=f"filter {i + 1}")
    save_figure(figure, out / "filters_rgb.png")


def draw_bars(axis, means, classes=None):
    """One filter's ten class means, divided by the largest; a colour a class; names on the axis where given."""
    bars = axis.bar(range(10), means / max(means.max(), 1e-12), color=[f"C{c}" for c in range(10)])
    axis.set(ylim=(0, 1.05), xticks=range(10))
    axis.set_xticklabels(classes or [], rotation=60, ha="right", rotation_mode="anchor")
    return bars


def caption(norms, i, classes):
    return f"filter {i + 1}: {classes[int(norms[i].argmax())]}, index {selectivity(norms)[i]:.2f}"


def draw_layer(layer, norms, classes, source, out):
    """One chart a filter, and one sheet of them all, the most selective first."""
    figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    bars = draw_bars(axis, norms[0], classes)
    axis.set_ylabel("mean norm / largest")
    for i, means in enumerate(norms):
        for bar, height in zip(bars, means / max(means.max(), 1e-12)):
            bar.set_height(height)
        axis.set_title(f"layer {layer}, " + caption(norms, i, classes), fontsize=11)
        with atomic(out / f"experts_layer{layer}" / f"filter{i + 1:02}.png") as temporary:
            figure.savefig(temporary, dpi=80)
    plt.close(figure)

    columns, index = 8, selectivity(norms)
    rows = len(norms) // columns
    figure, axes = plt.subplots(rows, columns, figsize=(12, 1.3 + 1.15 * rows), layout="constrained", sharey=True)
    figure.suptitle(f"Layer {layer}: norm of each filter's map by class, divided by its largest ({source})\n"
                    "title: filter, best class, class selectivity index; the most selective first", fontsize=12)
    for axis, i in zip(axes.flat, np.argsort(-index, kind="stable")):
        shown = draw_bars(axis, norms[i])
        axis.tick_params(bottom=False)
        axis.set_title(f"{i + 1} {classes[int(norms[i].argmax())]} {index[i]:.2f}", fontsize=9)
    figure.legend(shown.patches, classes, loc="outside lower center", ncols=10, fontsize=9, frameon=False)
    save_figure(figure, out / f"experts_layer{layer}.png")


def draw_summary(first, last, classes, source, out):
    """The report's figure 8, but chosen by measurement: the three most uniform filters of the first layer above the
    three most selective of the last."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained", sharey=True)
    figure.suptitle(f"Who is expert? Norm of a filter's map by class, divided by its largest ({source})", fontsize=13)
    for row, name, norms, chosen in ((axes[0], "first", first, np.argsort(selectivity(first), kind="stable")[:3]),
                                     (axes[1], "last", last, np.argsort(-selectivity(last), kind="stable")[:3])):
        for axis, i in zip(row, chosen):
            draw_bars(axis, norms[i], classes)
            axis.set_title(f"{name} layer, " + caption(norms, i, classes), fontsize=11)
        row[0].set_ylabel("most uniform" if name == "first" else "most selective")
    save_figure(figure, out / "experts.png")


# ---------------------------------------------------------------- unlabelled images
def predict(model, folder, out, device):
    """Write out/predictions.txt: a line `name.png,class index` for each PNG of `folder`, 2.png before 10.png."""
    def natural(path):
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
    paths = sorted(Path(folder).glob("*.png"), key=natural)
    if not paths:
        raise UserError(f"{folder} holds no PNG files")
    images = read_images(paths).to(device)
    model.eval()
    with torch.inference_mode():
        classes = torch.cat([model(apply(NO_AUGMENT, part)).argmax(1) for part in images.split(EVAL_BATCH)])
    write_text(out / "predictions.txt", "".join(f"{path.name},{c}\n" for path, c in zip(paths, classes.tolist())))
    print(f"predictions {out / 'predictions.txt'} ({len(paths)} images)")


def analyze(args):
    device, out = pick_device(args.device), Path(args.out or Path(args.ckpt).parent)
    checkpoint = load_checkpoint(args.ckpt, device)
    model = CNN().to(device, memory_format=torch.channels_last)
    load_weights(model, checkpoint, args.ckpt)
    if args.predict:
        return predict(model, args.predict, out, device)

    data_seed = args.data_seed if args.data_seed is not None else checkpoint.get("args", {}).get("data_seed", 0)
    splits = load_splits(args.data_dir, seed=data_seed)
    classes, val = splits.classes, splits.val.to(device)
    norms = class_norms(model, val)
    layers = sorted({layer for name in args.layer for layer in LAYERS[name]})
    lines = [f"source {splits.source}"]
    if "epoch" in checkpoint:
        lines += [f"epoch {checkpoint['epoch']}"]
    lines += [f"val_acc {evaluate(model, val, NO_AUGMENT)['acc']:.2f} ({len(val.labels)} images)"]
    if splits.test:
        test = splits.test.to(device)
        lines += [f"test_acc {evaluate(model, test, NO_AUGMENT)['acc']:.2f} ({len(test.labels)} images)"]
    for layer in sorted({1, 5, *layers}):
        lines += selectivity_lines(layer, norms[layer - 1], classes)
    print("\n".join(lines), flush=True)
    write_text(out / "analysis.txt", "\n".join(lines) + "\n")

    draw_filters(model.conv1.weight.detach().cpu(), out)
    for layer in layers:
        write_csv(out / f"experts_layer{layer}.csv", expert_table(norms[layer - 1], classes))
        draw_layer(layer, norms[layer - 1], classes, splits.source, out)
    draw_summary(norms[0], norms[4], classes, splits.source, out)
    print(f"figures {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", required=True, metavar="PT", help="best.pt or last.pt of train.py, or a bare state dict")
    parser.add_argument("--layer", nargs="+", choices=LAYERS, default=["first", "last"], metavar="LAYER",
                        help="layers to chart: first, last, all, 1 to 5 (default: first last)")
    parser.add_argument("--predict", metavar="DIR",
                        help="classify the PNGs of DIR into predictions.txt instead; needs no --data-dir")
    parser.add_argument("--out", metavar="DIR", help="folder of the figures (default: the checkpoint's folder)")
    parser.add_argument("--data-dir", metavar="DIR", default=os.environ.get("DATA_DIR", "data"),
                        help="folder of the data, see data.py; $DATA_DIR sets the default (default: %(default)s)")
    parser.add_argument("--data-seed", type=number(int, 0, 10**9), help="seed of the splits (default: the checkpoint's)")
    parser.add_argument("--device", default="auto", help="auto (cuda, mps or cpu), or a torch device (default: auto)")
    analyze(parser.parse_args())


if __name__ == "__main__":
    run(main)
