"""Look inside a trained CNN: its filters, "who is expert?" (the report's section 2), and how it cheats.

    python analyze.py --ckpt best.pt                     experts of first and last layer, and all else
    python analyze.py --ckpt best.pt --layer last        experts of these layers: first, last, all, or numbers
    python analyze.py --ckpt best.pt --predict DIR       classify a folder of images, into predictions.txt

A best.pt without a folder is looked for in results/run too, where train.py leaves it. Figures go beside the
checkpoint (or to --out): filters.png and filters/ (each kernel); for each layer N experts_layerN.png, .csv
and a folder with a chart for each filter; experts.png, the report's figure 8; mistakes.png; and, where the
digits are known, shortcut.png and groups.csv. Filters and layers count from 1. What is printed is in
analysis.txt as well.
"""
import argparse
import math
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data import DIGIT, augment, course_folder, image_files, load_splits, read_images
from model import CNN
from train import EVAL_BATCH, evaluate, percent, predict, score
from utils import (UserError, add_data_dir, atomic, load_checkpoint, load_weights, pick_device, pyplot,
                   run, save_figure, usage_error, write_csv, write_text)


# ---------------------------------------------------------------- norms and selectivity
@torch.inference_mode()
def map_norms(model, images):
    """Of uint8 images [N,3,H,W]: the logits, float [N,10], and for each layer a float tensor [N, filters],
    the L2 norm over height and width of each filter's feature map (report, section 2.2)."""
    model.eval()
    parts = []
    for part in images.split(EVAL_BATCH):
        logits, maps = model(augment(part), return_maps=True)
        parts.append([logits, *(m.float().flatten(2).norm(dim=2) for m in maps)])
    logits, *norms = (torch.cat(column) for column in zip(*parts))
    return logits, norms


def class_means(norms, groups):
    """Each layer's norms, [N, filters], averaged over the images of each class: a list of float64 arrays
    [filters, 10]. `groups`, int64 [N], are classes or digits. UserError for one without images."""
    groups = groups.cpu()  # mps has no float64
    counts = torch.bincount(groups, minlength=10).double()
    if (counts == 0).any():
        raise UserError(f"no validation image is of class or digit {int(counts.argmin())}, so it has "
                        "no mean")
    one_hot = torch.nn.functional.one_hot(groups, 10).double()
    return [(layer.cpu().double().T @ one_hot / counts).numpy() for layer in norms]


def selectivity(norms):
    """Class selectivity index of each filter from its class means [filters, 10] (Morcos et al. 2018):
    (largest - mean of the others) / (largest + mean of the others), 0 for no preference to 1 for one class
    only. A filter that never responds gets 0."""
    largest = norms.max(1)
    others = (norms.sum(1) - largest) / (norms.shape[1] - 1)
    return np.divide(largest - others, largest + others, out=np.zeros_like(largest), where=largest > 0)


def expert_table(norms, untrained, classes, by_digit=None):
    """One dict per filter: number, ten class means, class selectivity index, best class, the index that it
    has before training; and where digits are known the index and the best one by digit."""
    rows = []
    for i, (index, before) in enumerate(zip(selectivity(norms), selectivity(untrained))):
        row = {"filter": i + 1, **{name: float(mean) for name, mean in zip(classes, norms[i])},
               "class_selectivity_index": float(index), "best_class": classes[int(norms[i].argmax())],
               "untrained_selectivity_index": float(before)}
        if by_digit is not None:
            row["digit_selectivity_index"] = float(selectivity(by_digit)[i])
            row["best_digit"] = int(by_digit[i].argmax())
        rows.append(row)
    return rows


def selectivity_lines(layer, norms, untrained, classes):
    """What is printed of a layer: the median index, its quartiles, the one before training, how many filters
    respond most to each class, five experts."""
    index, best = selectivity(norms), Counter(classes[c] for c in norms.argmax(1))
    low, median, high = np.quantile(index, [0.25, 0.5, 0.75])
    lines = [f"layer{layer}_selectivity_median {median:.4f} ({len(index)} filters)",
             f"layer{layer}_selectivity_quartiles {low:.4f} {high:.4f}",
             f"layer{layer}_selectivity_median_untrained {np.median(selectivity(untrained)):.4f}",
             f"layer{layer}_best_classes " + ", ".join(f"{name} {n}" for name, n in best.most_common())]
    for i in np.argsort(-index, kind="stable")[:5]:
        lines.append(f"layer{layer}_expert filter {i + 1} {classes[int(norms[i].argmax())]} {index[i]:.4f}")
    return lines


# ---------------------------------------------------------------- filters
def rescale(kernel):
    """A float tensor stretched to [0, 1]; a constant one becomes 0."""
    kernel = kernel - kernel.min()
    return kernel / kernel.max() if kernel.max() > 0 else kernel


def draw_filters(weight, source, out):
    """The first layer's weights, float [filters,3,k,k]: an image of each kernel; all of them side by side, as
    in the report's figure 7."""
    plt = pyplot()
    figure, axes = plt.subplots(3, len(weight), figsize=(0.8 * len(weight), 3.1), layout="constrained",
                                squeeze=False)
    figure.suptitle("First-layer kernels: a column for each filter, each kernel stretched to black and white "
                    f"({source})")
    for (channel, i), axis in np.ndenumerate(axes):
        kernel = rescale(weight[i, channel]).numpy()
        with atomic(out / "filters" / f"filter{i + 1:02}_channel{channel + 1}.png") as temporary:
            plt.imsave(temporary, kernel, cmap="gray", vmin=0, vmax=1, format="png")
        axis.imshow(kernel, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(i + 1 if channel == 0 else "")
        axis.set_ylabel(("red", "green", "blue")[channel] if i == 0 else "")
    save_figure(figure, out / "filters.png")


# ---------------------------------------------------------------- experts
def draw_bars(axis, means, classes):
    """One filter's ten class means, divided by the largest, each class in its colour."""
    axis.bar(range(10), means / max(means.max(), 1e-12), color=[f"C{c}" for c in range(10)])
    axis.set_ylim(0, 1.05)
    axis.set_xticks(range(10), classes, rotation=60, ha="right", rotation_mode="anchor")


def caption(norms, i, classes):
    return f"filter {i + 1}: {classes[int(norms[i].argmax())]}, index {selectivity(norms)[i]:.2f}"


def draw_layer(layer, norms, classes, source, out):
    """A chart for each filter, and a sheet of them all, the most selective first."""
    plt = pyplot()
    for i in range(len(norms)):
        figure, axis = plt.subplots(figsize=(4.6, 3.2))
        figure.subplots_adjust(left=0.14, right=0.97, top=0.87, bottom=0.3)
        draw_bars(axis, norms[i], classes)
        axis.set_ylabel("mean norm / largest")
        axis.set_title(f"layer {layer}, {caption(norms, i, classes)}\n{source}", fontsize=9)
        save_figure(figure, out / f"experts_layer{layer}" / f"filter{i + 1:02}.png")

    index = selectivity(norms)
    rows = math.ceil(len(norms) / 8)
    height = 1.3 + 1.15 * rows
    figure, axes = plt.subplots(rows, 8, figsize=(12, height), squeeze=False, sharey=True)
    figure.subplots_adjust(left=0.04, right=0.99, top=1 - 1 / height, bottom=0.4 / height, hspace=0.4,
                           wspace=0.1)
    figure.suptitle(f"Layer {layer}: norm of each filter's map by class, divided by its largest ({source})\n"
                    "above each chart: filter, best class, class selectivity index; the most selective first",
                    fontsize=12)
    for axis in axes.flat[len(norms):]:
        axis.axis("off")
    for axis, i in zip(axes.flat, np.argsort(-index, kind="stable")):
        draw_bars(axis, norms[i], classes)
        axis.set(xticks=[])
        axis.set_title(f"{i + 1} {classes[int(norms[i].argmax())]} {index[i]:.2f}", fontsize=9, pad=3)
    figure.legend(axes[0, 0].patches, classes, loc="lower center", ncols=10, fontsize=9, frameon=False)
    save_figure(figure, out / f"experts_layer{layer}.png")


def draw_summary(first, last, classes, source, out):
    """The report's figure 8, but chosen by measurement: the three most uniform filters of the first layer
    above the three most selective of the last."""
    figure, axes = pyplot().subplots(2, 3, figsize=(11, 6.4), layout="constrained", sharey=True)
    figure.suptitle(f"Who is expert? Norm of a filter's map by class, divided by its largest ({source})",
                    fontsize=13)
    uniform = np.argsort(selectivity(first), kind="stable")[:3]
    selective = np.argsort(-selectivity(last), kind="stable")[:3]
    for row, name, norms, chosen in (axes[0], "first", first, uniform), (axes[1], "last", last, selective):
        for axis, i in zip(row, chosen):
            draw_bars(axis, norms[i], classes)
            axis.set_title(f"{name} layer, " + caption(norms, i, classes), fontsize=11)
        row[0].set_ylabel("most uniform" if name == "first" else "most selective")
    save_figure(figure, out / "experts.png")


# ---------------------------------------------------------------- the shortcut
def crosstab(rows, columns):
    """How often each pair of values 0 to 9 of two int64 tensors [N] occurs: int64 [10,10], on the CPU."""
    return torch.bincount(rows.cpu() * 10 + columns.cpu(), minlength=100).view(10, 10)


def group_table(correct, split):
    """Accuracy (percent) and number of images of each group label x digit: float and int arrays [10,10], NaN
    where a group is empty. The smallest accuracy is the worst-group accuracy (Sagawa et al. 2020)."""
    counts = crosstab(split.labels, split.digits)
    hits = crosstab(split.labels[correct], split.digits[correct])
    return (100 * hits.double() / counts).numpy(), counts.numpy()


def counterfactual(model, split):
    """The causal question: what is predicted for the same images with another digit in the corner?

    Returns int64 [11,N]: row d holds the predictions with the corner of a random image that has the digit d,
    row 10 those with a black corner, no digit at all."""
    generator, rows = torch.Generator().manual_seed(0), []
    for digit in range(11):
        images = split.images.clone()
        if digit == 10:
            images[DIGIT] = 0
        else:
            owners = (split.digits == digit).nonzero()[:, 0]
            picks = torch.randint(len(owners), (len(images),), generator=generator)
            images[DIGIT] = split.images[owners[picks.to(owners.device)]][DIGIT]
        rows.append(predict(model, images).argmax(1))
    return torch.stack(rows)


def shortcut_lines(split, before, scores, groups, counts, rows, classes):
    """What the digit does to the predictions `before`, one figure per line."""
    worst = np.nanargmin(groups)
    digits = torch.arange(10, device=split.labels.device)[:, None]
    right, changed = rows[:10] == split.labels, rows[:10] != before
    own_digit, same_digit = digits == split.labels, digits == split.digits  # all of these are bool [10,N]
    return [f"val_acc_agree {scores['acc_agree']:.2f}",
            f"val_acc_conflict {scores['acc_conflict']:.2f}",
            f"val_follows_digit {scores['follows_digit']:.2f}",
            f"worst_group_acc {groups.flat[worst]:.2f} (label {classes[worst // 10]}, digit {worst % 10}, "
            f"{counts.flat[worst]} images)",
            f"acc_digit_of_label {percent(right[own_digit]):.2f} (the label's digit put into every image)",
            f"acc_other_digit {percent(right[~own_digit]):.2f} (each of the nine others)",
            f"acc_no_digit {percent(rows[10] == split.labels):.2f} (a black corner)",
            f"another_digit_changes_prediction {percent(changed[~same_digit]):.2f}"]


def draw_table(axis, values, rows, columns, title, ylabel, xlabel):
    """A heat map of percentages, 0 to 100, each written in its cell."""
    axis.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axis.set(title=title, ylabel=ylabel, xlabel=xlabel, yticks=range(len(rows)), yticklabels=rows)
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if isinstance(columns[0], str) else {}
    axis.set_xticks(range(len(columns)), columns, **turned)
    for (y, x), value in np.ndenumerate(values):
        axis.text(x, y, "" if np.isnan(value) else f"{value:.0f}", ha="center", va="center", fontsize=9,
                  color="white" if value > 60 else "black")


def draw_shortcut(split, predictions, groups, rows, classes, source, out):
    """Confusion matrix, accuracy by label and digit; predictions and accuracy with another digit there."""
    figure, axes = pyplot().subplots(2, 2, figsize=(11, 11), layout="constrained")
    figure.suptitle("What the digit does to the predictions\n"
                    f"({source}, {len(split.labels)} validation images)", fontsize=13)
    names = [f"{name} {i}" for i, name in enumerate(classes)]
    confusion = crosstab(split.labels, predictions).double()
    confusion = (100 * confusion / confusion.sum(1, keepdim=True)).numpy()
    draw_table(axes[0, 0], confusion, names, names, "predictions, % of each label's images", "label",
               "prediction")
    draw_table(axes[0, 1], groups, names, range(10), "accuracy (%)", "label", "digit in the image")
    placed = 100 * np.stack([torch.bincount(row.cpu(), minlength=10) for row in rows]) / len(split.labels)
    draw_table(axes[1, 0], placed, [*range(10), "none"], names,
               "digit exchanged: predictions, % of all images", "digit put into every image", "prediction")

    right = 100 * (rows == split.labels).cpu().double()  # [11,N]; mps has no float64
    accs = np.stack([right[:, split.labels.cpu() == label].mean(1).numpy() for label in range(10)])
    own = accs[range(10), range(10)]
    others = (accs[:, :10].sum(1) - own) / 9
    draw_table(axes[1, 1], np.stack([own, others, accs[:, 10]], 1), names, ["the label's", "another", "none"],
               "digit exchanged: accuracy (%)", "label", "digit put into every image")
    save_figure(figure, out / "shortcut.png")


# ---------------------------------------------------------------- single images
def draw_mistakes(split, logits, classes, source, out):
    """The 24 images that are got wrong with the highest confidence."""
    confidence, predictions = logits.softmax(1).max(1)
    wrong = (predictions != split.labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:24]
    known = bool((split.digits >= 0).all())
    figure, axes = pyplot().subplots(4, 6, figsize=(10, 8.6), layout="constrained")
    what = "label → prediction"
    if known:
        what = "label, digit → prediction; red: the prediction is the digit's class"
    figure.suptitle(f"Wrong with the highest confidence ({source})\n{what}", fontsize=13)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, worst.tolist()):
        axis.imshow(split.images[i].permute(1, 2, 0).cpu().numpy())
        digit = f", digit {split.digits[i]}" if known else ""
        axis.set_title(f"{classes[split.labels[i]]}{digit}\n→ {classes[predictions[i]]} {confidence[i]:.3f}",
                       fontsize=9, color="C3" if predictions[i] == split.digits[i] else "black")
    save_figure(figure, out / "mistakes.png")


def predict_folder(model, folder, out, device):
    """Write out/predictions.txt: `name.png,class index` for each image of `folder`, 2.png before 10.png."""
    def natural(path):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
    paths = sorted(image_files(folder), key=natural)
    if not paths:
        raise UserError(f"{folder} holds no image files")
    images = read_images(paths)
    height, width = images.shape[2:]
    print(f"{len(paths)} images of {width}x{height} pixels, normalized with the handout's mean and standard "
          "deviation; a network trained with another size or normalization predicts worse here")
    classes = predict(model, images.to(device)).argmax(1)
    lines = [f"{path.name},{c}\n" for path, c in zip(paths, classes.tolist())]
    write_text(out / "predictions.txt", "".join(lines))
    print(f"predictions {out / 'predictions.txt'}")


# ---------------------------------------------------------------- command line
def analyze(args):
    device, path = pick_device(args.device), Path(args.ckpt)
    if not path.exists() and path.name == args.ckpt:
        path = Path("results/run") / path  # where train.py leaves it
    out = Path(args.out or path.parent)
    checkpoint = load_checkpoint(path, device)
    model = CNN().to(device, memory_format=torch.channels_last)
    load_weights(model, checkpoint, path)
    if args.predict:
        return predict_folder(model, args.predict, out, device)

    trained = checkpoint.get("args")
    if not isinstance(trained, dict) or "fingerprint" not in trained:
        trained = {}  # of other code than train.py
    print(f"loading the images of {args.data_dir}", flush=True)
    drawn = course_folder(Path(args.data_dir)) is None  # a course folder's images are fixed
    splits = load_splits(args.data_dir, trained.get("match_prob") if drawn else None)
    other_images = bool(trained) and trained["fingerprint"] != splits.fingerprint
    if other_images and not args.out:
        usage_error(f"{path} was trained on other images than those of {args.data_dir}: name the "
                    "--data-dir of its training, or a folder for this analysis with --out")
    classes, source, val = splits.classes, splits.source, splits.val.to(device)
    logits, image_norms = map_norms(model, val.images)
    layers = chosen_layers(args.layer, len(image_norms))
    norms = class_means(image_norms, val.labels)
    torch.manual_seed(trained.get("seed", 0))
    # the same network before training, to compare with (--init only scales its maps, which changes no index)
    fresh = CNN().to(device, memory_format=torch.channels_last)
    untrained = class_means(map_norms(fresh, val.images)[1], val.labels)
    scores = score(logits, val)

    lines = [f"source {source}", f"epoch {checkpoint.get('epoch', 'unknown')}",
             f"val_acc {scores['acc']:.2f} ({len(val.labels)} images)"]
    lines += doubts(checkpoint, trained, other_images, scores["acc"])
    if splits.test:
        test_acc = evaluate(model, splits.test.to(device))["acc"]
        lines += [f"test_acc {test_acc:.2f} ({len(splits.test.labels)} images)"]
    for layer in sorted({1, len(norms), *layers}):
        lines += selectivity_lines(layer, norms[layer - 1], untrained[layer - 1], classes)

    by_digit = [None] * len(norms)
    if len(val.digits.unique()) == 10:  # in a course folder they are unknown
        by_digit = class_means(image_norms, val.digits)
        lines += analyze_shortcut(model, val, logits, scores, classes, source, out)
        for layer in (1, len(norms)):
            for_digit = selectivity(by_digit[layer - 1]) > selectivity(norms[layer - 1])
            lines += [f"layer{layer}_filters_more_selective_for_digit {for_digit.sum()} of {len(for_digit)}"]
    else:
        for name in ("shortcut.png", "groups.csv"):  # an earlier analysis may have had digits
            (out / name).unlink(missing_ok=True)
    print(*lines, sep="\n", flush=True)
    write_text(out / "analysis.txt", "\n".join(lines) + "\n")
    draw_mistakes(val, logits, classes, source, out)
    draw_filters(model.conv1.weight.detach().cpu(), source, out)
    draw_summary(norms[0], norms[-1], classes, source, out)
    for layer in layers:
        print(f"drawing a chart for each of the {len(norms[layer - 1])} filters of layer {layer}", flush=True)
        write_csv(out / f"experts_layer{layer}.csv",
                  expert_table(norms[layer - 1], untrained[layer - 1], classes, by_digit[layer - 1]))
        draw_layer(layer, norms[layer - 1], classes, source, out)
    print(f"figures {out}")


def chosen_layers(names, depth):
    """The layers that --layer names, of a network that returns `depth` maps; exits with 2 for others."""
    every = range(1, depth + 1)
    numbers = {"first": [1], "last": [depth], "all": every, **{str(n): [n] for n in every}}
    if unknown := set(names) - set(numbers):
        usage_error(f"--layer takes first, last, all, or 1 to {depth}, not {', '.join(unknown)}: the forward "
                    f"of model.py returns {depth} maps")
    return sorted({n for name in names for n in numbers[name]})


def doubts(checkpoint, trained, other_images, val_acc):
    """Lines that warn where the images or the network differ from those of the training."""
    lines = []
    if other_images:
        lines += ["note: the network was trained on other images than the training images here, or in "
                  "another order: some of these validation images may be its training images"]
    elif trained and abs(checkpoint["val_acc"] - val_acc) > (1 if trained["amp"] else 0.2):
        lines += [f"note: the checkpoint says val_acc {checkpoint['val_acc']:.2f}: model.py or data.py has "
                  "changed since it was trained"]
    return lines


def analyze_shortcut(model, val, logits, scores, classes, source, out):
    """Measure, write and draw what the digits do; returns the lines to print."""
    predictions = logits.argmax(1)
    groups, counts = group_table(predictions == val.labels, val)
    rows = counterfactual(model, val)
    write_csv(out / "groups.csv", [
        {"label": classes[label], "digit": digit, "images": int(count), "acc": float(groups[label, digit])}
        for (label, digit), count in np.ndenumerate(counts)])
    draw_shortcut(val, predictions, groups, rows, classes, source, out)
    return shortcut_lines(val, predictions, scores, groups, counts, rows, classes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", metavar="PT", required=True,
                        help="best.pt or last.pt of train.py, or a state dict; a name without a folder is "
                             "looked for in results/run too")
    parser.add_argument("--layer", nargs="+", default=["first", "last"], metavar="LAYER",
                        help="layers to chart: first, last, all, or a number (default: first last)")
    parser.add_argument("--predict", metavar="DIR",
                        help="classify the images of DIR into predictions.txt instead; needs no --data-dir")
    parser.add_argument("--out", metavar="DIR", type=os.path.expanduser,
                        help="folder of the figures (default: the checkpoint's folder; needed where "
                             "--data-dir has other images than the training had)")
    add_data_dir(parser)
    parser.add_argument("--device", default="auto",
                        help="auto (cuda, mps or cpu), or a torch device (default: auto)")
    analyze(parser.parse_args())


if __name__ == "__main__":
    run(main)
