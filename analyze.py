"""Look inside a trained CNN: its first-layer filters, "who is expert?" (the report's section 2), and how it cheats.

    python analyze.py --ckpt results/final/best.pt                 everything, with the experts of the first and last layer
    python analyze.py --ckpt best.pt --layer last                  one layer: first, last, all or 1 to 5
    python analyze.py --ckpt best.pt --predict DIR                 classify a folder of unlabelled PNGs instead
    python analyze.py --summary results                            the page of all runs beside the report, from their CSVs

Figures go beside the checkpoint (or to --out): filters.png, filters_rgb.png, filters/ (each kernel as an image);
for each layer N experts_layerN.png, .csv and a folder of one chart a filter; experts.png, the report's figure 8;
mistakes.png; and where the digits are known shortcut.png, digit_experts.png, groups.csv and counterfactual.csv.
Filters and channels count from 1, as in the report. What is printed, a figure a line, goes to analysis.txt as well.
"""
import argparse
import math
import os
import re
import subprocess
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.optim.swa_utils import update_bn
from torchvision.utils import save_image

from data import COMPOSITES, DIGIT, apply, augmentation, load_splits, mirror, read_images
from model import CNN
from train import EVAL_BATCH, TRAIN_EVAL, differing, evaluate, parse_args as parse_train_args, percent, predict, score
from utils import (UserError, atomic, load_checkpoint, load_weights, number, pick_device, read_csv, read_run, run, write_csv,
                   write_text)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NO_AUGMENT = augmentation(flip=0)
DEPTH = sum(name.startswith("conv") for name, _ in CNN().named_children())  # 5, until you edit model.py
LAYERS = {"first": [1], "last": [DEPTH], "all": range(1, DEPTH + 1), **{str(n): [n] for n in range(1, DEPTH + 1)}}


# ---------------------------------------------------------------- what is measured
@torch.inference_mode()
def map_norms(model, images):
    """Of uint8 images [N,3,H,W]: the logits, float [N,10], and for each convolution a float tensor [N, filters], the L2
    norm over height and width of each filter's feature map (report, section 2.2)."""
    model.eval()
    parts = []
    for part in images.split(EVAL_BATCH):
        logits, maps = model(apply(NO_AUGMENT, part), return_maps=True)
        parts.append([logits, *(m.float().flatten(2).norm(dim=2) for m in maps)])
    logits, *norms = (torch.cat(column) for column in zip(*parts))
    return logits, norms


def class_means(norms, groups):
    """Each layer's norms, [N, filters], averaged over the images of each class: a list of float64 arrays [filters, 10].
    `groups`, int64 [N], are the images' classes, or their digits. Raises UserError for one without images."""
    groups = groups.cpu()  # mps has no float64
    counts = torch.bincount(groups, minlength=10).double()
    if (counts == 0).any():
        raise UserError(f"no validation image is of class or digit {int(counts.argmin())}, so its norms cannot be averaged")
    one_hot = torch.nn.functional.one_hot(groups, 10).double()
    return [(layer.cpu().double().T @ one_hot / counts).numpy() for layer in norms]


def selectivity(norms):
    """Class selectivity index of each filter from its class means [filters, 10] (Morcos et al. 2018):
    (largest - mean of the others) / (largest + mean of the others), 0 for no preference to 1 for one class only.
    A filter that never responds gets 0."""
    largest = norms.max(1)
    others = (norms.sum(1) - largest) / (norms.shape[1] - 1)
    return np.divide(largest - others, largest + others, out=np.zeros_like(largest), where=largest > 0)


def expert_table(norms, untrained, classes, by_digit=None):
    """One dict a filter: its number, ten class means (the norms, not divided by anything), index, best class, the index
    that the same filter has before training; and where digits are known the index and the best one by digit."""
    rows = [{"filter": i + 1, **dict(zip(classes, map(float, means))), "class_selectivity_index": float(index),
             "best_class": classes[int(means.argmax())], "untrained_selectivity_index": float(before)}
            for i, (means, index, before) in enumerate(zip(norms, selectivity(norms), selectivity(untrained)))]
    if by_digit is not None:
        for row, means, index in zip(rows, by_digit, selectivity(by_digit)):
            row |= {"digit_selectivity_index": float(index), "best_digit": int(means.argmax())}
    return rows


def selectivity_lines(layer, norms, untrained, classes):
    index = selectivity(norms)
    low, median, high = np.quantile(index, [0.25, 0.5, 0.75])
    return [f"layer{layer}_selectivity_median {median:.4f} ({len(index)} filters)",
            f"layer{layer}_selectivity_quartiles {low:.4f} {high:.4f}",
            f"layer{layer}_selectivity_median_untrained {np.median(selectivity(untrained)):.4f}",
            *(f"layer{layer}_expert filter {i + 1} {classes[int(norms[i].argmax())]} {index[i]:.4f}"
              for i in np.argsort(-index, kind="stable")[:5])]


def mirror_acc(model, split, logits, transforms):
    """Accuracy (percent) where each image's probabilities, those of `logits`, are averaged with those of its mirror image,
    which `transforms` make."""
    mirrored = predict(model, split.images, transforms)
    return percent((logits.softmax(1) + mirrored.softmax(1)).argmax(1) == split.labels)


def with_statistics(model, images, dropout_last=0, dropout_p=0.1):
    """A copy of `model` whose batch norms have running statistics measured anew: the mean over batches of `images`, uint8
    [N,3,H,W], in training mode with this dropout. Those of training include the noise of its dropout, which evaluation
    lacks (X. Li et al., *Understanding the disharmony between dropout and batch normalization by variance shift*, 2019)."""
    copy = CNN(dropout_last, dropout_p).to(images.device, memory_format=torch.channels_last)
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    update_bn((apply(NO_AUGMENT, part) for part in images.split(EVAL_BATCH)), copy)
    return copy


def statistics_lines(model, images, val, dropout_last, dropout_p):
    """What the dropout in batch norm's statistics costs: val_acc with and without it, as measured on `images`."""
    networks = {"with": with_statistics(model, images, dropout_last, dropout_p), "without": with_statistics(model, images)}
    return [f"val_acc_statistics_{word}_dropout {evaluate(again, val, NO_AUGMENT)['acc']:.2f} "
            f"(batch norm's, measured again on {len(images)} training images)" for word, again in networks.items()]


# ---------------------------------------------------------------- the shortcut
def crosstab(rows, columns):
    """How often each pair of values 0 to 9 of two int64 tensors [N] occurs: int64 [10,10], on the CPU."""
    return torch.bincount(rows.cpu() * 10 + columns.cpu(), minlength=100).view(10, 10)


def group_table(correct, split):
    """Accuracy (percent) and number of images of each group label x digit: float and int arrays [10,10], NaN where a
    group is empty. The smallest accuracy is the worst-group accuracy (Sagawa et al. 2020)."""
    counts = crosstab(split.labels, split.digits)
    hits = crosstab(split.labels[correct], split.digits[correct])
    return (100 * hits.double() / counts).numpy(), counts.numpy()


def counterfactual(model, split, seed=0):
    """The causal question: what is predicted for the same images with another digit under them?

    Returns int64 [11,N]: row d holds the predictions with the corner of a random image that has the digit d, row 10
    those with a black corner, no digit at all. Raises UserError for a digit that no image has."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for digit in range(11):
        images = split.images.clone()
        if digit == 10:
            images[DIGIT] = 0
        else:
            owners = (split.digits == digit).nonzero()[:, 0]
            if len(owners) == 0:
                raise UserError(f"no validation image has the digit {digit}")
            picks = torch.randint(len(owners), (len(images),), generator=generator)
            images[DIGIT] = split.images[owners[picks.to(owners.device)]][DIGIT]
        rows.append(predict(model, images, NO_AUGMENT).argmax(1))
    return torch.stack(rows)


def counterfactual_table(rows, before, split):
    """One dict for each digit, and one for none, in percent of the images that have another digit: their accuracy with
    this one in its place, how many predictions it changes, how many it changes to its own class."""
    table = []
    for digit, after in enumerate(rows):
        other, changed = split.digits != digit, after != before
        table.append({"digit": digit if digit < 10 else "none", "images": int(other.sum()),
                      "acc": percent((after == split.labels)[other]), "changed": percent(changed[other]),
                      "changed_to_digit": percent((changed & (after == digit))[other]) if digit < 10 else float("nan")})
    return table


def shortcut_lines(split, scores, groups, counts, rows, table, classes):
    """What the digit does to the predictions, a figure a line."""
    worst = np.nanargmin(groups)
    agree = rows[split.labels, torch.arange(len(split.labels))] == split.labels
    right = rows[:10] == split.labels
    conflict = torch.cat([right[digit][split.labels != digit] for digit in range(10)])
    changed, to_digit = (sum(row[key] * row["images"] for row in table[:10]) / sum(row["images"] for row in table[:10])
                         for key in ("changed", "changed_to_digit"))
    return [f"val_acc_agree {scores['acc_agree']:.2f}",
            f"val_acc_conflict {scores['acc_conflict']:.2f}",
            f"val_follows_digit {scores['follows_digit']:.2f}",
            f"worst_group_acc {groups.flat[worst]:.2f} (label {classes[worst // 10]}, digit {worst % 10}, "
            f"{counts.flat[worst]} images)",
            f"acc_digit_of_label {percent(agree):.2f} (the label's digit put under every image)",
            f"acc_other_digit {percent(conflict):.2f} (each of the nine others)",
            f"acc_no_digit {percent(rows[10] == split.labels):.2f} (a black corner)",
            f"another_digit_changes_prediction {changed:.2f}",
            f"another_digit_changes_prediction_to_it {to_digit:.2f}",
            f"prediction_depends_on_digit {percent((rows[:10] != rows[0]).any(0)):.2f} (not the same under all ten)"]


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

    half = math.ceil(len(weight) / 2)
    figure, axes = plt.subplots(half, 7, figsize=(6.6, 1 + 0.9 * half), layout="constrained", squeeze=False,
                                width_ratios=[1, 1, 1, 0.5, 1, 1, 1])
    figure.suptitle("First-layer kernels, each stretched to black and white:\n"
                    f"filters 1 to {half} left, {half + 1} to {len(weight)} right", fontsize=12)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis in [*axes[:, 3], *axes[len(weight) - half:, 4:].flat]:  # the gap, and where the number of filters is odd
        axis.axis("off")
    for i, kernels in enumerate(weight):
        row = axes[i % half, 4 * (i // half):][:3]
        row[0].set_ylabel(f"filter {i + 1}")
        for channel, (axis, kernel) in enumerate(zip(row, kernels)):
            axis.imshow(rescale(kernel).numpy(), cmap="gray")
            if i % half == 0:
                axis.set_title(f"channel {channel + 1}\n{('red', 'green', 'blue')[channel]}", fontsize=10)
    save_figure(figure, out / "filters.png")

    rows = math.ceil(len(weight) / 8)
    figure, axes = plt.subplots(rows, 8, figsize=(10, 1.2 + rows), layout="constrained")
    figure.suptitle("First-layer filters in colour, each stretched to [0, 1]")
    for i, (axis, kernels) in enumerate(zip(axes.flat, weight)):
        axis.imshow(rescale(kernels).permute(1, 2, 0).numpy())
        axis.set(xticks=[], yticks=[], title=f"filter {i + 1}")
    for axis in axes.flat[len(weight):]:
        axis.axis("off")
    save_figure(figure, out / "filters_rgb.png")


def draw_bars(axis, means, names=(), left=0):
    """One filter's ten class means, divided by the largest, from `left` on; a colour a class; names on the axis where given."""
    bars = axis.bar(range(left, left + 10), means / max(means.max(), 1e-12), color=[f"C{c}" for c in range(10)])
    axis.set_ylim(0, 1.05)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    return bars


def caption(norms, i, classes):
    return f"filter {i + 1}: {classes[int(norms[i].argmax())]}, index {selectivity(norms)[i]:.2f}"


def draw_layer(layer, norms, classes, source, out):
    """One chart a filter, and one sheet of them all, the most selective first."""
    figure, axis = plt.subplots(figsize=(4.6, 3.2), dpi=80, layout="constrained")
    bars = draw_bars(axis, norms[0], classes)
    axis.set_ylabel("mean norm / largest")
    axis.set_title(f"layer {layer}, " + caption(norms, 0, classes), fontsize=11)
    changing = [*bars, *axis.spines.values(), axis.title]  # the rest is the same in every chart, and drawn once
    for artist in changing:
        artist.set_animated(True)
    figure.canvas.draw()
    rest = figure.canvas.copy_from_bbox(figure.bbox)
    for i, means in enumerate(norms):
        for bar, height in zip(bars, means / max(means.max(), 1e-12)):
            bar.set_height(height)
        axis.title.set_text(f"layer {layer}, " + caption(norms, i, classes))
        figure.canvas.restore_region(rest)
        for artist in changing:
            axis.draw_artist(artist)
        with atomic(out / f"experts_layer{layer}" / f"filter{i + 1:02}.png") as temporary:
            plt.imsave(temporary, figure.canvas.buffer_rgba())
    plt.close(figure)

    index = selectivity(norms)
    rows = math.ceil(len(norms) / 8)
    figure, axes = plt.subplots(rows, figsize=(12, 1.3 + 1.15 * rows), layout="constrained", squeeze=False)
    figure.suptitle(f"Layer {layer}: norm of each filter's map by class, divided by its largest ({source})\n"
                    "above each chart: filter, best class, class selectivity index; the most selective first", fontsize=12)
    for axis in axes.flat:  # a row of charts is one axes: 80 of them take seconds
        axis.set_xlim(-1.5, 94.5)
        axis.spines[["top", "right"]].set_visible(False)
    for place, i in enumerate(np.argsort(-index, kind="stable")):
        axis, left = axes.flat[place // 8], 12 * (place % 8)
        shown = draw_bars(axis, norms[i], left=left)
        axis.text(left + 4.5, 1.1, f"{i + 1} {classes[int(norms[i].argmax())]} {index[i]:.2f}", ha="center", fontsize=9)
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


def draw_table(axis, values, rows, columns, title, ylabel, xlabel):
    """A heat map of percentages, 0 to 100, each written in its cell."""
    axis.imshow(values, cmap="Blues", vmin=0, vmax=100)
    axis.set(title=title, ylabel=ylabel, xlabel=xlabel, yticks=range(len(rows)), yticklabels=rows, xticks=range(len(columns)))
    axis.set_xticklabels(columns, rotation=60 if isinstance(columns[0], str) else 0, rotation_mode="anchor",
                         ha="right" if isinstance(columns[0], str) else "center")
    for (y, x), value in np.ndenumerate(values):
        axis.text(x, y, "" if np.isnan(value) else f"{value:.0f}", ha="center", va="center", fontsize=9,
                  color="white" if value > 60 else "black")


def draw_shortcut(split, predictions, groups, rows, classes, source, out):
    figure, axes = plt.subplots(2, 2, figsize=(11, 11), layout="constrained")
    figure.suptitle(f"What the digit does to the predictions, in percent of {len(split.labels)} validation images ({source})",
                    fontsize=13)
    names = [f"{name} {i}" for i, name in enumerate(classes)]
    confusion = crosstab(split.labels, predictions).double()
    draw_table(axes[0, 0], (100 * confusion / confusion.sum(1, keepdim=True)).numpy(), names, names, "confusion matrix",
               "label", "prediction")
    draw_table(axes[0, 1], groups, names, list(range(10)), "accuracy by label and digit", "label", "digit in the image")
    placed = 100 * np.stack([torch.bincount(row.cpu(), minlength=10) for row in rows]) / len(split.labels)
    draw_table(axes[1, 0], placed, [*range(10), "none"], names, "the digit exchanged: what is predicted",
               "digit put under every image", "prediction")
    right = (rows == split.labels).double().cpu()
    by_class = np.array([[right[label, chosen].mean(), right[[d for d in range(10) if d != label]][:, chosen].mean(),
                          right[10, chosen].mean()]
                         for label in range(10) for chosen in [split.labels.cpu() == label]]) * 100
    for i, (name, color) in enumerate((("the label's", "C2"), ("another", "C3"), ("none", "C7"))):
        axes[1, 1].barh(np.arange(10) + 0.27 * (i - 1), by_class[:, i], 0.27, label=name, color=color)
    axes[1, 1].set(title="the digit exchanged: accuracy", xlabel="accuracy (%)", xlim=(0, 100), yticks=range(10),
                   yticklabels=names)
    axes[1, 1].invert_yaxis()
    axes[1, 1].legend(title="digit put under every image", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    save_figure(figure, out / "shortcut.png")


def draw_digit_experts(by_class, by_digit, classes, source, out):
    """A dot a filter: its selectivity for classes and for digits, first and last layer; below, the last layer's strongest
    expert of each kind."""
    figure, axes = plt.subplot_mosaic([["first", "first", "last", "last"], [0, 1, 2, 3]], figsize=(11, 8.4),
                                      layout="constrained", height_ratios=[1.5, 1])
    figure.suptitle(f"Experts on the class and on the digit ({source})", fontsize=13)
    for name, classed, digited in (("first", by_class[0], by_digit[0]), ("last", by_class[-1], by_digit[-1])):
        x, y = selectivity(classed), selectivity(digited)
        top = 1.08 * max(x.max(), y.max())
        axes[name].plot([0, top], [0, top], color="gray", lw=0.8)
        axes[name].scatter(x, y, s=18)
        for i, color, best in ((x.argmax(), "C1", classes[int(classed[x.argmax()].argmax())]),
                               (y.argmax(), "C3", f"digit {digited[y.argmax()].argmax()}")):
            axes[name].scatter(x[i], y[i], s=40, color=color, label=f"filter {i + 1}: {best}")
        axes[name].legend(title="the strongest of each kind", loc="upper left")
        axes[name].set(xlabel="selectivity for the class", ylabel="selectivity for the digit", xlim=(0, top), ylim=(0, top),
                       title=f"{name} layer: {(y > x).sum()} of {len(x)} filters answer more to the digit")
    strongest = selectivity(by_class[-1]).argmax(), selectivity(by_digit[-1]).argmax()
    for column, i in ((0, strongest[0]), (2, strongest[1])):
        draw_bars(axes[column], by_class[-1][i], classes)
        axes[column].set_title(f"last layer, filter {i + 1}, by class", fontsize=10)
        draw_bars(axes[column + 1], by_digit[-1][i], list(range(10)))
        axes[column + 1].set_title(f"filter {i + 1}, by digit", fontsize=10)
    axes[0].set_ylabel("mean norm / largest")
    save_figure(figure, out / "digit_experts.png")


def draw_mistakes(split, logits, classes, source, out):
    """The 24 images that are got wrong with the highest confidence."""
    confidence, predictions = logits.softmax(1).max(1)
    wrong = (predictions != split.labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:24]
    figure, axes = plt.subplots(4, 6, figsize=(10, 8.6), layout="constrained")
    figure.suptitle(f"Wrong with the highest confidence: label, digit, prediction ({source})\n"
                    "red: the prediction is the digit's class", fontsize=13)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, worst.tolist()):
        axis.imshow(split.images[i].permute(1, 2, 0).cpu().numpy())
        digit = f", digit {split.digits[i]}" if split.digits[i] >= 0 else ""
        axis.set_title(f"{classes[split.labels[i]]}{digit}\n→ {classes[predictions[i]]} {confidence[i]:.3f}", fontsize=9,
                       color="C3" if predictions[i] == split.digits[i] else "black")
    save_figure(figure, out / "mistakes.png")


# ---------------------------------------------------------------- unlabelled images
def predict_folder(model, folder, out, device):
    """Write out/predictions.txt: a line `name.png,class index` for each PNG of `folder`, 2.png before 10.png."""
    def natural(path):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
    paths = sorted(Path(folder).glob("*.png"), key=natural)
    if not paths:
        raise UserError(f"{folder} holds no PNG files")
    images = read_images(paths).to(device)
    classes = predict(model, images, NO_AUGMENT).argmax(1)
    write_text(out / "predictions.txt", "".join(f"{path.name},{c}\n" for path, c in zip(paths, classes.tolist())))
    print(f"predictions {out / 'predictions.txt'} ({len(paths)} images)")


# ---------------------------------------------------------------- the results page
class Results:
    """Everything the page is made from: the list of experiments.sh, our finished full-size runs, the report's numbers."""

    def __init__(self, folder):
        script = Path(__file__).with_name("experiments.sh")
        listing = subprocess.run(["bash", script, "--list"], capture_output=True, text=True, check=True).stdout
        self.sections, self.flags, self.target = {}, {}, {}  # {title: [name]}, {name: flags}, {name: its run's name}
        for line in listing.splitlines():
            if line.startswith("#"):
                title = line[2:]
                continue
            name, _, flags = line.partition(" ")
            self.sections.setdefault(title, []).append(name)
            self.flags[name] = flags.strip()
            self.target[name] = flags.split()[1] if flags.strip().startswith("=") else name
        self.reported = [name for title, names in self.sections.items() if title[0] == "1" for name in names]
        # experiments.sh's own short names for groups of flags; the longest, $ours, is best's flags but for its epochs
        self.short = dict(re.findall(r'^(\w+)="(--[^"$]*)"', script.read_text(), re.MULTILINE))
        self.short["ours"] = self.flags["best"].split(" --epochs")[0]
        if not (folder / "report.csv").exists():
            raise UserError(f"{folder / 'report.csv'} not found: --summary takes the folder results/ of this repository")
        self.report = {row["run"]: row for row in read_csv(folder / "report.csv")}
        self.curves = read_csv(folder / "report_curves.csv")
        self.args, self.log = {}, {}
        for name in dict.fromkeys(self.target.values()):
            if not (folder / name / "log.csv").exists():
                continue
            args, log = read_run(folder / name)
            as_listed = set(differing(args, parse_train_args(self.flags[name].split()))) <= {"amp"}
            if as_listed and len(log) == args["epochs"] and args["data"] == COMPOSITES:
                self.args[name], self.log[name] = args, log

    def best(self, name):
        """The row of `name`'s log with the best val_acc, or None where it has not run."""
        log = self.log.get(self.target.get(name, name))
        return log and max(log, key=lambda row: row["val_acc"])

    def acc(self, name):
        return self.best(name)["val_acc"] if self.best(name) else None

    def recipe(self, run):
        """The run of the same recipe with seed 0; `run` itself where there is none."""
        name = re.sub(r"_seed\d+$", "", run)
        return name if name in self.log else run

    def recipes(self):
        """The finished runs without those that repeat another with another training seed."""
        return [name for name in self.log if self.recipe(name) == name]

    def seeds(self, name):
        """The finished runs of `name`'s recipe, which differ in the training seed; none where `name` has not run."""
        return [run for run in self.log if self.recipe(run) == self.target.get(name, name)]

    def accs(self, name):
        return [self.acc(run) for run in self.seeds(name)]

    def mean(self, name):
        """The mean of `accs`, None where `name` has not run."""
        return float(np.mean(self.accs(name))) if self.accs(name) else None

    def precision(self, name):
        """What to write behind a number of a finished run where it trained in bfloat16."""
        return " (amp)" if self.args[self.target[name]]["amp"] else ""

    def traced(self, name):
        """The report's curve of `name`, a row an epoch."""
        return [row for row in self.curves if row["run"] == name]

    def section(self, number):
        return next(names for title, names in self.sections.items() if title.split()[0] == number)


def table(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)) + "\n"


UNSTEADY = "dropout_all"  # dropout after every block: its accuracies spread too far for the yardstick of the others
DRAWS = (("baseline", "baseline_data1", "baseline_data2", "baseline_data3"),  # two recipes, other splits and digits
         ("final", *(f"final_data{seed}" for seed in range(1, 6))))
T975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 8: 2.31, 10: 2.23, 15: 2.13, 20: 2.09, 30: 2.04,
        1000: 1.96}  # the 97.5 % points of Student's t, by degrees of freedom


def yardstick(groups):
    """How much is chance, from `groups` of accuracies in percent, a list for each recipe that ran with several seeds.

    Returns (noise, sd, freedom). `sd` is the standard deviation of one run, in points, pooled over the groups, with so many
    degrees of freedom; until something has run twice (0), the sampling error of 5,000 images at 73 %. `noise(n, m)`: the means
    of n and of m runs of one recipe differ by more in one case of twenty, by Student's t (m = inf: from a fixed number)."""
    groups = [accs for accs in groups if len(accs) > 1]
    freedom = sum(len(accs) - 1 for accs in groups)
    sd = 100 * (0.73 * 0.27 / 5000) ** 0.5
    if freedom:
        sd = (sum(len(accs) * np.var(accs) for accs in groups) / freedom) ** 0.5
    t = np.interp(freedom, list(T975), list(T975.values())) if freedom else 2
    return lambda n=1, m=1: t * sd * (1 / n + 1 / m) ** 0.5, sd, freedom


def chance(results):
    """The yardstick of the report's recipes, but for dropout after every block, whose spread is larger."""
    return yardstick([results.accs(name) for name in results.reported
                      if results.target[name] == name and UNSTEADY not in name])


def by_seeds(title, results, names, beside=None, label=""):
    """A section of the page: a table of those recipes of `names` that ran with several training seeds, nothing where none did;
    with `beside`, {name: number}, under `label` that number, and how far the mean is from it."""
    rows = []
    for name in names:
        accs, number = results.accs(name), (beside or {}).get(name)
        if len(accs) < 2:
            continue
        each = ", ".join(f"{acc:.2f}{results.precision(run)}" for run, acc in zip(results.seeds(name), accs))
        rows.append([name, each, f"{np.mean(accs):.2f}", f"{np.std(accs, ddof=1):.2f}"])
        if beside:
            rows[-1] += [f"{number:.2f}", f"{np.mean(accs) - number:+.2f}"] if number else ["", ""]
    header = ["recipe", "best val_acc of each", "mean", "standard deviation", *([label, "difference"] if beside else [])]
    return [f"## {title}\n", table(header, rows)] if rows else []


def claims(results, folder, noise):
    """The report's claims as rows (section, claim, what was measured, verdict); each verdict follows from the means over the
    training seeds that have run, and from yardstick's `noise`."""
    rows, mean = [], results.mean

    def runs(name):
        return len(results.accs(name))

    def shown(*names):
        return ", ".join(f"{name} {mean(name):.2f}" + (f" (mean of {runs(name)})" if runs(name) > 1 else "") for name in names)

    def add(section, claim, measured, margin, limit, needs):
        """Holds where `margin` is above `limit`, does not where it is below minus that."""
        missing = [results.target[name] for name in needs if mean(name) is None]
        if missing:
            rows.append((section, claim, "not run yet: " + ", ".join(dict.fromkeys(missing)), "not run"))
            return
        verdict = "within noise" if abs(margin()) <= limit() else "holds" if margin() > 0 else "does not hold"
        rows.append((section, claim, measured(), verdict))

    def beats(section, claim, name, others):
        def best_other():
            return max(others, key=mean)
        add(section, claim, lambda: shown(name, best_other()), lambda: mean(name) - mean(best_other()),
            lambda: noise(runs(name), runs(best_other())), [name, *others])

    def others(number, name):
        return [other for other in results.section(number) if results.target[other] != results.target[name]]

    beats("1.1", "batch size 16 beats 32", "bs16", ["bs32"])
    beats("1.1", "batch size 32 beats 64", "bs32", ["bs64"])
    beats("1.2", "noise 0.05 with erasing 0.3, scale (0.02, 0.05), is the best augmentation", "noise_0.05_erase_0.3",
          others("1.2", "noise_0.05_erase_0.3"))
    add("1.3", "lr 1e-4 ends slightly above 50 % (read as 50 to 55)", lambda: shown("lr_1e-4"),
        lambda: 1 if 50 < mean("lr_1e-4") < 55 else -1, lambda: 0, ["lr_1e-4"])
    decays = ["wd_1e-2", "wd_5e-3", "wd_1e-4"]
    add("1.3", "no weight decay tried beats 70 %", lambda: shown(*decays), lambda: 70 - max(map(mean, decays)),
        lambda: noise(runs(max(decays, key=mean)), np.inf), decays)
    add("1.3", "a smaller lr_min makes no significant difference", lambda: shown("lr_min_1e-6", "lr_1e-3"),
        lambda: noise(runs("lr_min_1e-6"), runs("lr_1e-3")) - abs(mean("lr_min_1e-6") - mean("lr_1e-3")), lambda: 0,
        ["lr_min_1e-6", "lr_1e-3"])
    beats("1.4", "cosine beats StepLR", "cosine_50", ["step"])
    beats("1.4", "cosine beats a constant learning rate", "cosine_50", ["constant"])
    beats("1.4", "warm-up and cosine beats cosine", "warmup_cosine", ["cosine_50"])
    beats("1.5", "dropout after every block hurts, p 0.1", "warmup_cosine", ["dropout_all_p0.1"])
    beats("1.5", "dropout after every block hurts, p 0.2", "warmup_cosine", ["dropout_all_p0.2"])
    beats("1.5", "the last three blocks with p 0.1 are the best dropout", "final", others("1.5", "final"))
    add("1.6", "the final model reaches 73.08 %", lambda: shown("final"),
        lambda: mean("final") - results.report["final"]["val_acc"], lambda: noise(runs("final")), ["final"])

    claim = ("first-layer filters respond uniformly, last-layer filters are class-specific (read as: the last layer's "
             "median index is over twice the first's, and over twice its own before training)")
    paths = [folder / "final" / f"experts_layer{layer}.csv" for layer in (1, 5)]
    if not all(path.exists() for path in paths):
        rows.append(("2.2", claim, "not run yet: analyze.py on final", "not run"))
    else:
        (first, first_before), (last, last_before) = (
            [np.median([row[key] for row in read_csv(path)])
             for key in ("class_selectivity_index", "untrained_selectivity_index")] for path in paths)
        rows.append(("2.2", claim, f"first layer {first:.3f} (before training {first_before:.3f}), last layer {last:.3f} "
                     f"(before training {last_before:.3f})",
                     "holds" if last > 2 * max(first, last_before) else "does not hold"))
    return rows


def differences(results):
    """Where our numbers leave the report's, as lines of the page: how many are close, and what chance and the data's draw
    explain."""
    names = [name for name in results.report if results.best(name)]
    if not names:
        return ["No run that the report has a number for is done yet."]
    noise = chance(results)[0]
    val = np.array([results.mean(name) - results.report[name]["val_acc"] for name in names])
    far = [f"{name} {off:+.2f}" for name, off in zip(names, val)
           if abs(off) > noise(len(results.accs(name))) and UNSTEADY not in name]
    lines = [f"- val_acc, means over the training seeds: {(abs(val) <= 1.5).sum()} of {len(val)} numbers lie within 1.5 points of "
             f"the report's; the median difference is {np.median(val):+.2f} (from {val.min():+.2f} to {val.max():+.2f}). Further off "
             f"than the chance of training takes a mean and one run in one case of twenty: {', '.join(far) or 'none'} (dropout after "
             "every block, whose spread is larger, aside)."]
    train = np.array([np.mean([results.log[run][-1]["train_acc"] for run in results.seeds(name)])
                      - results.report[name]["train_acc"] for name in names])
    train = train[~np.isnan(train)]  # not all are given
    if len(train):
        lines.append(f"- train_acc, last epoch, likewise: the median difference is {np.median(train):+.2f} (from "
                     f"{train.min():+.2f} to {train.max():+.2f}, {len(train)} numbers).")
    for runs in DRAWS:
        accs = {name: results.acc(name) for name in runs if results.best(name)}
        if runs[0] in accs and len(accs) > 1:
            listed = ", ".join(f"{name} {acc:.2f}{results.precision(name)}" for name, acc in accs.items())
            mean, sd = np.mean(list(accs.values())), np.std(list(accs.values()), ddof=1)
            lines.append(f"- Other held-out images and other digits, the same recipe: {listed} (mean {mean:.2f}, standard deviation "
                         f"{sd:.2f}); the report {results.report[runs[0]]['val_acc']:.2f}.")
    if results.best("baseline") and results.best("baseline_match0.5"):
        def both(name):
            return f"val_acc {results.acc(name):.2f}, train_acc {results.log[name][-1]['train_acc']:.2f}"
        lines.append("- A weaker shortcut, 55 % matching digits in training (match_prob 0.5) for 64 % (0.6): baseline "
                     f"{both('baseline_match0.5')}, for {both('baseline')}; the report val_acc "
                     f"{results.report['baseline']['val_acc']:.2f}, train_acc {results.report['baseline']['train_acc']:.2f}.")

    def means(rows):
        return np.array([np.mean([row[key] for row in rows]) for key in ("train_acc", "val_acc")])

    def pair(values, form):
        return " / ".join(format(value, form) for value in values)

    def late(rows):
        return pair(means(rows[-10:]), ".2f")

    def course(rows):
        return pair(means(rows[:1]), ".1f") + ", " + pair(means(rows[-10:]) - means(rows[-20:-10]), "+.1f")

    for figure, name, plain in (("2a", "lr_1e-3", "bs16"), ("3c", "wd_1e-4", "wd_1e-4_plain"), ("4a", "cosine", "bs16")):
        if results.best(name) and results.best(plain):
            lines.append(f"- Figure {figure}, with or without noise and erasing? train_acc / val_acc, mean of the last ten "
                         f"epochs: with {late(results.log[results.target[name]])}, without {late(results.log[plain])}; the "
                         f"report {late(results.traced(name))}.")
    if results.best("dropout_all_p0.2"):
        ours = {"ours": "dropout_all_p0.2", "without warm-up": "dropout_all_p0.2_cosine",
                "without dropout": "warmup_cosine"}
        lines.append("- Figure 5b, dropout after every block: train_acc / val_acc in the first epoch, and how much more it is in "
                     f"the last ten epochs than in the ten before: the report {course(results.traced('dropout_all_p0.2'))}" +
                     "".join(f"; {what} {course(results.log[name])}" for what, name in ours.items() if results.best(name)) + ".")
    bests = {name: results.best(name) for name in names}
    shares = [(results.report[name]["val_acc"] - best["val_acc_conflict"]) / (best["val_acc_agree"] - best["val_acc_conflict"])
              for name, best in bests.items() if "val_acc_agree" in best]
    if shares:
        lines.append("- An independent digit agrees with the label in 10 % of the validation images. Were it "
                     f"{100 * np.median(shares):.0f} % (from {100 * min(shares):.0f} to {100 * max(shares):.0f} over the runs), our "
                     "accuracies where digit and label agree and conflict would add up to the report's numbers.")
    return lines


def draw_figure(results, figure, runs, path):
    """One of the report's figures: our accuracies solid (thin: other training seeds), the report's, traced, dashed; a panel a
    run."""
    canvas, axes = plt.subplots(1, len(runs), figsize=(max(5.2, 3.9 * len(runs)), 3.6), layout="constrained", sharey=True,
                                squeeze=False)
    for axis, (panel, name) in zip(axes[0], runs):
        seeds = results.seeds(name)
        for color, key in (("C0", "train_acc"), ("C1", "val_acc")):
            label = {"train_acc": "training", "val_acc": "validation"}[key]
            for run in reversed(seeds):
                first = run == seeds[0]
                axis.plot([row["epoch"] for row in results.log[run]], [row[key] for row in results.log[run]], color=color,
                          lw=1.5 if first else 0.6, alpha=1 if first else 0.7, label=f"{label}, ours" if first else None)
            theirs = results.traced(name)
            axis.plot([row["epoch"] for row in theirs], [row[key] for row in theirs], color=color, ls="--", lw=1,
                      label=f"{label}, report")
        axis.set(title=f"({panel}) {name}" + ("" if seeds else ", not run yet"), xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[0, -1].legend(fontsize=8)
    thin = "; thin: other training seeds" if any(len(results.seeds(name)) > 1 for _, name in runs) else ""
    canvas.suptitle(f"The report's figure {figure}{thin}")
    save_figure(canvas, path)


def draw_overview(results, path):
    names = sorted(results.recipes(), key=results.mean)
    canvas, axis = plt.subplots(figsize=(7, 1.6 + 0.27 * len(names)), layout="constrained")
    dots = [(acc, row) for row, name in enumerate(names) for acc in results.accs(name)]
    axis.plot(*zip(*dots), "o", ms=5, alpha=0.6, label="ours, a dot a training seed")
    reported = [(row["val_acc"], names.index(results.target[name])) for name, row in results.report.items()
                if results.target[name] in names]
    axis.plot(*zip(*reported), "D", mfc="none", color="C3", label="report")
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4), xlabel="best validation accuracy (%)",
             title="Every recipe, by best validation accuracy (mean of its seeds)")
    axis.grid(alpha=0.3)
    canvas.legend(loc="outside lower center", ncols=2, frameon=False)
    save_figure(canvas, path)


def draw_stopped(results, names, path):
    """The final recipe beside its twins that weaken or strengthen the shortcut: a group of bars a recipe, their means over the
    training seeds, with a dot a seed."""
    canvas, axis = plt.subplots(figsize=(max(6, 1.6 * len(names)), 4), layout="constrained")
    for i, (key, label, color) in enumerate((("val_acc", "all", "C0"), ("val_acc_agree", "digit agrees", "C2"),
                                             ("val_acc_conflict", "digit conflicts", "C3"),
                                             ("val_follows_digit", "conflicting and seen as the digit's class", "C7"))):
        seeds = [[results.best(run)[key] for run in results.seeds(name)] for name in names]
        place = np.arange(len(names)) + 0.2 * (i - 1.5)
        bars = axis.bar(place, [np.mean(values) for values in seeds], 0.2, label=label, color=color)
        axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=3)
        axis.plot(np.repeat(place, [len(values) for values in seeds]), np.concatenate(seeds), ".", ms=3, color="black")
    axis.set(xticks=range(len(names)), ylim=(0, 110), ylabel="validation images (%)",
             title="Validation accuracy, and where the digit leads (means; a dot a training seed)")
    flags = [{"final": "the report's", "best": "our recipe"}.get(name) or results.flags[name].replace(" --", "\n--")
             for name in names]
    axis.set_xticklabels([f"{name}\n{flag}" for name, flag in zip(names, flags)], fontsize=9)
    canvas.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save_figure(canvas, path)


def summary(folder):
    """Write folder/README.md and folder/figures/*.png: every run beside the report, from the CSVs alone."""
    results = Results(folder)
    if not results.log:
        raise UserError(f"{folder} holds no finished run of experiments.sh")
    noise, sd, freedom = chance(results)
    listed = [name for name, target in results.target.items() if name == target]
    waiting = [name for name in listed if name not in results.log]
    origin = (f"the training seeds, pooled over the report's recipes ({freedom} degrees of freedom; without dropout after every "
              "block, whose spread is larger)" if freedom else
              "the sampling error of 5,000 images (no other training seeds are run yet)")
    machines = sorted({f"{args['hardware']}, torch {args['torch']}" for args in results.args.values()})
    page = ["# Every experiment of the report, beside the report\n",
            "Made by `python analyze.py --summary results` from the runs' CSVs; nothing is typed in by hand.\n",
            f"- {len(listed) - len(waiting)} of {len(listed)} runs are done, each in full: all epochs, 45,000 training and "
            f"5,000 validation composites, seed 0 unless its name says otherwise.",
            f"- Run on: {'; '.join(machines)}. The seconds are those of a machine that most runs shared with others. A CPU and "
            "a GPU draw different numbers from one seed.",
            *([f"- Not run yet: {', '.join(waiting)}."] if waiting else []),
            f"- \"Within noise\": chance alone gives as much in one case of twenty. One run has a standard deviation of {sd:.2f} "
            f"points, from {origin}. So in one case of twenty two runs of one recipe differ by more than {noise():.2f} points, a mean "
            f"of three and one run by more than {noise(3):.2f}, two means of three by more than {noise(3, 3):.2f} (Student's t).",
            "- `report` is what the report states, or shows in a figure (traced, +-0.1); `difference` is ours minus it. "
            "Its data, split and seed are not public.",
            "- Flags are those in which a run differs from the final recipe, with these short for",
            *(f"  - `${name}`: `{flags}`" for name, flags in results.short.items()), ""]
    for title, names in results.sections.items():
        rows = []
        for name in names:
            best, report = results.best(name), results.report.get(name)
            reported = f"{report['val_acc']:.2f}" if report else ""
            flags = results.flags[name]
            for short, long in results.short.items():
                flags = flags.replace(long, f"${short}")
            flags = f"`{flags}`" if flags else "the defaults"
            if results.target[name] != name:
                flags = f"the same run as {results.target[name]}"
            if best is None:
                rows.append([name, flags, "", "not run yet", "", "", "", "", "", reported, ""])
                continue
            log, args = results.log[results.target[name]], results.args[results.target[name]]
            rows.append([name, flags, args["epochs"], f"{best['val_acc']:.2f} ({best['epoch']:.0f})",
                         f"{log[-1]['val_acc']:.2f}", f"{log[-1]['train_acc']:.2f}", f"{best['val_acc_conflict']:.2f}",
                         f"{np.median([row['seconds'] for row in log]):.1f}{results.precision(name)}", args["hardware"],
                         reported, f"{best['val_acc'] - report['val_acc']:+.2f}" if report else ""])
        page += [f"## {title}\n", table(["run", "flags", "epochs", "best val_acc (epoch)", "final val_acc", "train_acc",
                                         "val_acc, digit conflicts", "s an epoch", "on", "report", "difference"], rows)]
    stated = {name: row["val_acc"] for name, row in results.report.items()}
    page += by_seeds("The report's numbers with several training seeds", results, results.reported, stated, "report")
    page += ["## The report's claims\n", table(["section", "claim", "measured", "verdict"], claims(results, folder, noise))]
    page += ["## Where we differ from the report\n", *differences(results), ""]
    parts = [name for name in results.recipes() if name.startswith("best12")]
    own = [name for name in results.recipes() if name not in (*results.reported, *parts)]
    page += by_seeds("Beyond the report, with several training seeds", results, own)
    if len(results.accs("best12")) > 1:
        noise, sd, freedom = yardstick([results.accs(name) for name in parts])
        whole = {name: results.mean("best12") for name in parts if name != "best12"}
        page += by_seeds("What each part of our recipe gives, means over the training seeds", results, parts, whole, "best12")
        page.append(f"One run has a standard deviation of {sd:.2f} points, pooled ({freedom} degrees of freedom); two means of three "
                    f"differ by more than {noise(3, 3):.2f} points in one case of twenty (Student's t).\n")
    page += ["## Figures\n"]
    figures = {}
    for row in results.report.values():
        if str(row["figure"]) != "nan":
            panel = f"{row['figure']:.0f}" if isinstance(row["figure"], float) else row["figure"]
            figures.setdefault(panel[0], []).append((panel, row["run"]))
    for figure, runs in figures.items():
        if not any(results.best(name) for _, name in runs):
            continue
        draw_figure(results, figure, runs, folder / "figures" / f"figure{figure}.png")
        page.append(f"![figure {figure}: ours solid, the report's dashed](figures/figure{figure}.png)\n")
    stopped = [results.target[name] for name in (*results.section("beyond"), "best")
               if results.target[name] in results.recipes()]
    if len(stopped) > 1:
        draw_stopped(results, stopped, folder / "figures" / "shortcut.png")
        page.append("![accuracies with a weaker, a stronger and a shuffled shortcut](figures/shortcut.png)\n")
    draw_overview(results, folder / "figures" / "overview.png")
    page.append("![all runs by best validation accuracy](figures/overview.png)\n")
    write_text(folder / "README.md", "\n".join(page))
    print(f"wrote {folder / 'README.md'}")


# ---------------------------------------------------------------- command line
def analyze(args):
    device, out = pick_device(args.device), Path(args.out or Path(args.ckpt).parent)
    checkpoint = load_checkpoint(args.ckpt, device)
    model = CNN().to(device, memory_format=torch.channels_last)
    load_weights(model, checkpoint, args.ckpt)
    if args.predict:
        return predict_folder(model, args.predict, out, device)

    trained = checkpoint.get("args", {})
    data_seed = args.data_seed if args.data_seed is not None else trained.get("data_seed", 0)
    splits = load_splits(args.data_dir, seed=data_seed)
    classes, source, val = splits.classes, splits.source, splits.val.to(device)
    digits_known = bool((val.digits >= 0).all())
    logits, image_norms = map_norms(model, val.images)
    norms = class_means(image_norms, val.labels)
    torch.manual_seed(trained.get("seed", 0))
    fresh = CNN().to(device, memory_format=torch.channels_last)  # the control: how training began
    untrained = class_means(map_norms(fresh, val.images)[1], val.labels)
    layers = sorted({layer for name in args.layer for layer in LAYERS[name]})
    predictions = logits.argmax(1)
    scores = score(logits, val)
    mirrored = [mirror(trained.get("flip_picture")), *NO_AUGMENT]
    lines = []

    def say(*more):
        """Print as it is measured, and keep for analysis.txt."""
        print(*more, sep="\n", flush=True)
        lines.extend(more)

    say(f"source {source}")
    if "epoch" in checkpoint:
        say(f"epoch {checkpoint['epoch']}")
    say(f"val_acc {scores['acc']:.2f} ({len(val.labels)} images)",
        f"val_acc_mirror {mirror_acc(model, val, logits, mirrored):.2f} (probabilities averaged with the mirror image's)")
    if trained.get("dropout_last"):
        images = splits.train.first(TRAIN_EVAL).images.to(device)
        say(*statistics_lines(model, images, val, trained["dropout_last"], trained["dropout_p"]))
    if splits.test:
        test = splits.test.to(device)
        test_logits = predict(model, test.images, NO_AUGMENT)
        say(f"test_acc {score(test_logits, test)['acc']:.2f} ({len(test.labels)} images)",
            f"test_acc_mirror {mirror_acc(model, test, test_logits, mirrored):.2f}")
    for layer in sorted({1, DEPTH, *layers}):
        say(*selectivity_lines(layer, norms[layer - 1], untrained[layer - 1], classes))
    if digits_known:
        groups, counts = group_table(predictions == val.labels, val)
        rows = counterfactual(model, val)
        table = counterfactual_table(rows, predictions, val)
        by_digit = class_means(image_norms, val.digits)
        say(*shortcut_lines(val, scores, groups, counts, rows, table, classes))
        for layer in (1, DEPTH):
            more = selectivity(by_digit[layer - 1]) > selectivity(norms[layer - 1])
            say(f"layer{layer}_filters_more_selective_for_digit {more.sum()} of {len(more)}")
    write_text(out / "analysis.txt", "\n".join(lines) + "\n")

    draw_filters(model.conv1.weight.detach().cpu(), out)
    for layer in layers:
        write_csv(out / f"experts_layer{layer}.csv",
                  expert_table(norms[layer - 1], untrained[layer - 1], classes, by_digit[layer - 1] if digits_known else None))
        draw_layer(layer, norms[layer - 1], classes, source, out)
    draw_summary(norms[0], norms[-1], classes, source, out)
    draw_mistakes(val, logits, classes, source, out)
    if digits_known:
        write_csv(out / "groups.csv", [{"label": classes[label], "digit": digit, "images": int(counts[label, digit]),
                                        "acc": float(groups[label, digit])} for label in range(10) for digit in range(10)])
        write_csv(out / "counterfactual.csv", table)
        draw_shortcut(val, predictions, groups, rows, classes, source, out)
        draw_digit_experts(norms, by_digit, classes, source, out)
    print(f"figures {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", metavar="PT", help="best.pt or last.pt of train.py, or a bare state dict")
    what.add_argument("--summary", metavar="DIR", help="write DIR/README.md and DIR/figures from the runs in DIR instead")
    parser.add_argument("--layer", nargs="+", choices=LAYERS, default=["first", "last"], metavar="LAYER",
                        help=f"layers to chart: first, last, all, 1 to {DEPTH} (default: first last)")
    parser.add_argument("--predict", metavar="DIR",
                        help="classify the PNGs of DIR into predictions.txt instead; needs no --data-dir")
    parser.add_argument("--out", metavar="DIR", help="folder of the figures (default: the checkpoint's folder)")
    parser.add_argument("--data-dir", metavar="DIR", default=os.environ.get("DATA_DIR", "data"),
                        help="folder of the data, see data.py; $DATA_DIR sets the default (default: %(default)s)")
    parser.add_argument("--data-seed", type=number(int, 0, 10**9), help="seed of the splits (default: the checkpoint's)")
    parser.add_argument("--device", default="auto", help="auto (cuda, mps or cpu), or a torch device (default: auto)")
    args = parser.parse_args()
    if args.summary:
        summary(Path(args.summary))
    else:
        analyze(args)


if __name__ == "__main__":
    run(main)
