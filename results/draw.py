"""The figures of the results page, 800 pixels wide; page.py calls draw()."""
from utils import pyplot, save_figure

SHORTCUT = {"val_acc": "all images", "val_acc_agree": "digit agrees with the label",
            "val_acc_conflict": "digit conflicts", "val_follows_digit": "conflicts, and taken for the digit"}


def draw(results, curves, folder):
    """Draw what can be drawn from `results` (page.Results) and `curves` (the rows of report_curves.csv) into
    `folder`. Returns the Markdown of the report's figures, of overview.png and of shortcut.png."""
    shown = {"report": [], "overview": [], "shortcut": []}

    def save(figure, name, place):
        save_figure(figure, folder / f"{name}.png")
        shown[place].append(f"![{name}](figures/{name}.png)")

    for number in "123456":
        rows = [row for row in results.report
                if str(row["figure"])[0] == number and row["recipe"] in results.runs]
        if rows:
            save(report_figure(results, rows, curves), f"figure{number}", "report")
    if results.runs:
        save(overview(results, sorted(results.runs, key=results.mean)), "overview", "overview")
    names = [name for name in ("final", "match0", "match0.9", "shuffle1", "best") if name in results.runs]
    if names:
        save(shortcut(results, names), "shortcut", "shortcut")
    return {place: "\n".join(lines) for place, lines in shown.items()}


def report_figure(results, rows, curves):
    """A figure of the report: a panel for each of its runs, `rows` of report.csv."""
    figure, axes = pyplot().subplots(1, len(rows), figsize=(8, 3.8), layout="constrained", sharey=True,
                                     squeeze=False)
    for axis, row in zip(axes[0], rows):
        theirs = [point for point in curves if point["run"] == row["run"]]
        for key, label, color in (("train_acc", "training", "C0"), ("val_acc", "validation", "C1")):
            for i, points in enumerate([theirs, *results.values(row["recipe"], "log")]):
                axis.plot([point["epoch"] for point in points], [point[key] for point in points],
                          "-" if i else "--", lw=(1.2, 1.5, 0.6)[min(i, 2)], color=color,
                          label="" if i else label)
        axis.set_title(row["run"], fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[0, 0].legend(loc="lower right", fontsize=9)
    figure.suptitle("dashed: the report; solid: ours, other seeds thin", fontsize=10)
    return figure


def overview(results, names):
    """A line for each recipe: its seeds, and the report's number."""
    figure, axis = pyplot().subplots(figsize=(8, 1.4 + 0.19 * len(names)), layout="constrained")
    ours = [(acc, name) for name in names for acc in results.values(name)]
    theirs = [(row["val_acc"], row["recipe"]) for row in results.report if row["recipe"] in names]
    for dots, label, style in ((ours, "ours, a dot is a seed", "C0o"), (theirs, "the report", "C3d")):
        axis.plot([acc for acc, _ in dots], [names.index(name) for _, name in dots], style, label=label,
                  mfc="none")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(ylim=(-0.7, len(names) - 0.3), xlabel="best validation accuracy (%)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def shortcut(results, names):
    """Bars that show how far each recipe reads the digit."""
    figure, axis = pyplot().subplots(figsize=(8, 4.2), layout="constrained")
    for i, (key, label) in enumerate(SHORTCUT.items()):
        places = [place + 0.2 * (i - 1.5) for place in range(len(names))]
        drawn = axis.bar(places, [results.mean(name, key) for name in names], 0.19, label=label)
        axis.bar_label(drawn, fmt="%.0f", fontsize=8)
    axis.set(xticks=range(len(names)), xticklabels=names, ylim=(0, 110), ylabel="validation images (%)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
