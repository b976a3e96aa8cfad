"""Collect the results of runs, print them as tables, draw the pictures of README.md and docs/methods.md.

    python docs/figures.py collect runs/quickstart  # writes docs/results/quickstart.json
    python docs/figures.py tables --write           # updates the tables in README.md and docs/*.md
    python docs/figures.py                          # draws docs/*.png

An experiment is a folder with a folder for each seed, NAME/SEED/. It holds a run folder for each network, and what
linear_eval.py wrote about them in NAME/SEED/eval. A second evaluation, NAME/SEED/eval_1percent, gives the columns
"20-NN 1percent" and so on. Runs of sskd.py need no eval: they log their accuracy.
"""

import argparse
import hashlib
import json
import math
import re
from pathlib import Path
from statistics import fmean

DOCS = Path(__file__).parent

# {table: (experiment, columns, {row: its label})}. A row is a run folder, or `random`, or a .pt2 program.
# "gap COLUMN" is the share of the gap between MoCo v2 alone and the teacher that a distilled student closes,
# "COLUMN minus ROW" the difference to another network of the same seed.
KNN, GAP = ["10-NN", "20-NN"], ["gap 20-NN", "gap linear"]
FEW = [column + " 1percent" for column in (*KNN, "linear", *GAP)]
METHODS = {"teacher": "teacher", "disco": "DisCo", "seed": "SEED", "moco_v2": "MoCo v2 alone",
           "random": "random weights", "pixels": "raw pixels"}  # fmt: skip
AGAIN = {row: METHODS[row] for row in ("teacher", "disco", "seed", "moco_v2", "random")}
FROM_DISCO, FROM_SEED = (["20-NN", f"20-NN minus {row}", "linear", f"linear minus {row}"] for row in ("disco", "seed"))
FASHION = {**METHODS, "teacher": "teacher, Wide-ResNet-16-2", "moco_v2_resnet8": "ResNet-8, MoCo v2 alone"}
FASHION_RESNET8 = {row: FASHION[row] for row in ("teacher", "disco", "seed", "moco_v2", "random")}
TABLES = {
    "quickstart": ("quickstart", ["parameters", *KNN, "linear", *GAP], METHODS),
    "quickstart_again": ("quickstart_again", [*KNN, "linear", *GAP], AGAIN),
    "quickstart_avx2": ("quickstart_avx2", [*KNN, "linear", *GAP], AGAIN),
    "baseline": ("baseline", ["epochs", "training lr", *KNN, "linear"], {
        "moco_v2_lr0.03": "MoCo v2", "moco_v2_lr0.1": "MoCo v2", "moco_v2_lr1": "MoCo v2",
        "moco_v2_two": "MoCo v2, two processes", "moco_v2_long": "MoCo v2",
    }),
    "fashion": ("fashion", ["parameters", *KNN, "linear", *GAP], FASHION),
    "fashion_few": ("fashion", FEW, FASHION),
    "fashion_rates": ("fashion", ["training lr", "20-NN 1percent", "linear 1percent"], {
        "moco_v2": "MoCo v2 alone", "moco_v2_lr0.03": "MoCo v2 alone", "moco_v2_lr0.1": "MoCo v2 alone",
        "moco_v2_lr0.3": "MoCo v2 alone",
    }),
    "fashion_long": ("fashion_long", ["20-NN", "linear", *GAP, *FEW[1:]], {
        "teacher": FASHION["teacher"], "seed": "SEED", "moco_v2": "MoCo v2 alone, learning rate 0.01",
        "moco_v2_lr0.03": "0.03", "pixels": "raw pixels",
    }),
    "fashion_resnet8": ("fashion_resnet8", ["parameters", *KNN, "linear", *GAP], FASHION_RESNET8),
    "fashion_resnet8_few": ("fashion_resnet8", FEW, FASHION_RESNET8),
    "fashion_resnet8_rates": ("fashion_resnet8", ["training lr", "20-NN 1percent", "linear 1percent"], {
        "moco_v2_lr0.03": "MoCo v2 alone", "moco_v2": "MoCo v2 alone", "moco_v2_lr0.3": "MoCo v2 alone",
    }),
    "disco_hidden": ("ablations_disco", FROM_DISCO, {
        "disco_hidden64": "hidden layer of 64", "disco_hidden128": "128", "disco_hidden512": "512",
        "disco": "2048 (default)",
    }),
    "disco_terms": ("ablations_disco", FROM_DISCO, {
        "disco": "distillation and InfoNCE", "disco_alone": "distillation alone",
        "disco_bn_batch": "both, the teacher with `--teacher-bn batch`",
    }),
    "seed_objective": ("ablations_seed", FROM_SEED, {
        "seed": "SEED", "seed_l2": "squared distance (`l2`)", "seed_contrastive": "`contrastive`",
    }),
    "seed_temperature": ("ablations_seed", FROM_SEED, {
        "seed": "T = 0.01 (default)", "seed_t0.04": "0.04", "seed_t0.07": "0.07", "seed_t0.2": "0.2",
    }),
    "seed_queue": ("ablations_seed", FROM_SEED, {
        "seed_queue128": "queue of 128", "seed": "1024", "seed_queue4096": "4096",
    }),
    "seed_24": ("ablations_seed_24", FROM_SEED, {
        "seed": "SEED, T = 0.01, queue of 1024", "seed_l2": "`l2`", "seed_contrastive": "`contrastive`",
        "seed_t0.04": "T = 0.04", "seed_t0.07": "T = 0.07", "seed_t0.2": "T = 0.2",
        "seed_queue128": "queue of 128", "seed_queue4096": "queue of 4096",
    }),
    "teachers": ("ablations_disco", ["epochs", "20-NN", "linear"], {
        "teacher": "teacher", "teacher_weak": "weaker teacher", "disco": "DisCo from the teacher",
        "disco_weak": "DisCo from the weaker one", "seed": "SEED from the teacher",
        "seed_weak": "SEED from the weaker one",
    }),
    "sskd": ("sskd_all", ["top1", "top1 minus kd"], {
        "teacher": "teacher, ResNet-20", "ce": "CE", "kd": "KD", "sskd": "SSKD",
    }),
    "sskd_noise": ("sskd_all", ["top1", "top1 minus kd_noise"], {
        "ce_noise": "CE", "kd_noise": "KD", "sskd_noise": "SSKD",
    }),
    "sskd_few": ("sskd", ["top1", "top1 minus kd_few"], {
        "teacher": "teacher, ResNet-20", "ce_few": "CE", "kd_few": "KD", "sskd_few": "SSKD",
    }),
    "transfer": ("sskd_all", ["20-NN", "linear", "linear minus kd"], {
        "teacher": "teacher, ResNet-20", "ce": "CE", "kd": "KD", "sskd": "SSKD",
    }),
    "transfer_few": ("sskd", ["20-NN", "linear", "linear minus kd_few"], {
        "teacher": "teacher, ResNet-20", "ce_few": "CE", "kd_few": "KD", "sskd_few": "SSKD",
    }),
    "exercise_weight": ("exercises", ["contrastive", "distill", "20-NN", "linear"], {
        "teacher": "teacher, ResNet-8", "disco": "DisCo, w = 4", "disco_w0": "w = 0", "moco_v2": "MoCo v2 alone",
    }),
    "exercise_shuffle": ("exercises", ["final loss", "20-NN", "20-NN minus moco_v2_shuffled", "linear",
                                       "linear minus moco_v2_shuffled"], {
        "moco_v2_shuffled": "shuffled", "moco_v2_unshuffled": "not shuffled",
    }),
    "exercise_head": ("exercises", ["distill", "20-NN", "20-NN minus disco", "linear", "linear minus disco"], {
        "disco": "hidden layer of 2048", "disco_hidden64": "64", "disco_hidden8": "8",
    }),
    "exercise_temperature": ("exercises", ["final loss", "20-NN", "20-NN minus seed", "linear", "linear minus seed"], {
        "seed": "T = 0.01", "seed_t0.0001": "T = 0.0001", "seed_contrastive": "`--objective contrastive`",
    }),
    "exercise_labels": ("exercises", ["top1", "top1 minus kd"], {
        "sskd_teacher": "teacher, ResNet-20, right labels", "ce": "CE", "kd": "KD", "sskd": "SSKD",
    }),
}  # fmt: skip
LOSSES = {"final loss": "loss", "contrastive": "InfoNCE", "distill": "distilling loss"}  # means over the last log line
HEADERS = {"training lr": "learning rate", "at lr": "best rate", "top1": "top-1", **LOSSES}
SETTINGS = ("parameters", "epochs", "training lr", "at lr")
# Figures in sentences, as whole numbers: min (rounded down), max (rounded up) or mean of rows and columns of a table
VALUES = {
    "alone": (fmean, "quickstart", ["moco_v2"], ["20-NN"]),
    "distilled": (fmean, "quickstart", ["disco"], ["20-NN"]),
    "teacher": (fmean, "quickstart", ["teacher"], ["20-NN"]),
    "quickstart": (min, "quickstart", ["disco", "seed"], GAP),
    "quickstart_again": (min, "quickstart_again", ["disco", "seed"], GAP),
    "quickstart_avx2": (min, "quickstart_avx2", ["disco", "seed"], GAP),
    "fashion": (min, "fashion_few", ["disco", "seed"], FEW[-2:]),
    "fashion_all": (min, "fashion", ["disco", "seed"], GAP),
    "fashion_resnet8": (min, "fashion_resnet8_few", ["disco", "seed"], FEW[-2:]),
    "fashion_resnet8_all": (min, "fashion_resnet8", ["disco", "seed"], GAP),
}
# The pictures show the quick start: colour and style of its curves, and the networks whose neighbours are shown
CURVES = {"teacher": ("black", "-"), "disco": ("#0072b2", "-"), "seed": ("#d55e00", "-"), "moco_v2": ("#777777", "--")}
NEIGHBORS = ("moco_v2", "disco")
PICTURES = {"accuracy.png": ["quickstart.json"], "neighbors.png": [f"neighbors_{name}.png" for name in NEIGHBORS],
            "methods.png": [], "curves.png": ["quickstart.json", "exercises.json"]}  # fmt: skip
SSKD_CURVES = {"ce": ("CE", "#777777", "--"), "kd": ("KD", "#e69f00", "-"), "sskd": ("SSKD", "#009e73", "-")}

# ---------------------------------------------------------------------------------------------------------- Collecting


class Unfinished(Exception):
    """The runs of a seed or their evaluation are not complete."""


def collect(folder):
    """Write results/NAME.json: for each row and column a list of values, one a seed, null where a seed has none.

    Unfinished seeds are left out, with a message.
    """
    seeds = {}
    for path in sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)):
        try:
            seeds[int(path.name)] = read_seed(path)
        except Unfinished as error:
            print(f"{path} is left out: {error}")
    if not seeds:
        raise SystemExit(f"{folder} has no finished seed")
    data = {"seeds": list(seeds), "torch": sorted({version for *_, found in seeds.values() for version in found})}
    for number, part in enumerate(("rows", "curves")):
        found, data[part] = [seed[number] for seed in seeds.values()], {}
        for name in dict.fromkeys(name for rows in found for name in rows):
            keys = dict.fromkeys(key for rows in found for key in rows.get(name, {}))
            data[part][name] = {key: [rows.get(name, {}).get(key) for rows in found] for key in keys}
    (DOCS / "results").mkdir(exist_ok=True)
    lists = r"\[[^][{}]*\]"  # in one line each
    text = re.sub(lists, lambda found: json.dumps(json.loads(found[0])), json.dumps(data, indent=2))
    (DOCS / "results" / f"{folder.name}.json").write_text(text + "\n")
    if folder.name == "quickstart":
        for name in NEIGHBORS:
            keep_neighbors(folder / str(min(seeds)) / "eval", name)


def read_seed(folder):
    """Results of one seed: {row: {column: value}}, curves {row: {epoch: accuracy}}, PyTorch's versions {version}.

    Raises Unfinished.
    """
    rows, curves, versions = {}, {}, set()
    for path in sorted(folder.glob("*/config.json")):
        run, config = path.parent, json.loads(path.read_text())
        versions.add(config["versions"]["torch"])
        if config["script"] == "linear_eval":
            continue
        if not (run / "backbone.pth").exists():
            raise Unfinished(f"{run.name} has no backbone.pth yet")
        row = rows[run.name] = {"epochs": config["arguments"]["epochs"], "training lr": config["arguments"]["lr"]}
        for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
            accuracy = line.get("knn", line.get("top1"))
            if accuracy is not None:
                curves.setdefault(run.name, {})[line["epoch"]] = round(accuracy, 2)
            if "loss" in line and line["epoch"] >= row["epochs"] - 1:
                losses = {"final loss": line["loss"], **{key: line[key] for key in LOSSES if key in line}}
                row |= {key: round(value, 4) for key, value in losses.items()}
            row |= {key: round(line[key], 2) for key in ("top1", "teacher_top1") if key in line}
    evals = sorted(path.parent for path in folder.glob("eval*/config.json"))
    for path in evals:
        for name, values in read_eval(path).items():
            kind = path.name.removeprefix("eval").replace("_", " ")
            rows[name] = {**rows.get(name, {}), **{key + kind: value for key, value in values.items()}}
    if not evals and not any("top1" in row for row in rows.values()):
        raise Unfinished("it has no eval")
    return rows, curves, versions


def weights_of(folder):
    """{row: --weights} of a folder of linear_eval.py, in its order: run folder, program's name, or `random`."""
    weights = map(Path, json.loads((folder / "config.json").read_text())["arguments"]["weights"])
    pairs = [(path.parent.name if path.suffix == ".pth" else path.stem, str(path)) for path in weights]
    if len(dict(pairs)) < len(pairs):
        raise SystemExit(f"{folder}: two networks have the same name")
    return dict(pairs)


def read_eval(folder):
    """Results {row: {column: value}} in a folder of linear_eval.py. Raises Unfinished."""
    rows, path = {}, folder / "eval.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results = {str(Path(name)): result for name, result in results.items()}
    for name, weights in weights_of(folder).items():
        if weights not in results:
            raise Unfinished(f"eval.json lacks {weights}")
        knn, linear = results[weights]["knn"], results[weights]["linear"]
        accuracies = {"10-NN": knn["10"], "20-NN": knn["20"], "linear": linear["top1"]}
        rows[name] = {key: round(value, 2) for key, value in accuracies.items()}
        rows[name] |= {"at lr": linear["lr"], "parameters": results[weights]["parameters"]}
        rates = [float(lr) for lr in linear["top1_by_lr"]]
        if linear["lr"] in (min(rates), max(rates)):
            print(f"{folder}: the best learning rate of {name}, {linear['lr']:g}, is at the edge of those probed")
    return rows


def keep_neighbors(folder, name, queries=5, neighbours=8):
    """Save the first rows and columns of a network's neighbours picture in results/."""
    from PIL import Image

    number = list(weights_of(folder)).index(name) + 1
    with Image.open(folder / f"neighbors{number if number > 1 else ''}.png") as picture:
        tile = (picture.width - 2) // 11  # the query, 10 neighbours, 2 pixels before each and after the last
        part = picture.crop((0, 0, tile * (1 + neighbours) + 2, min(tile * queries + 2, picture.height)))
        part.save(DOCS / "results" / f"neighbors_{name}.png", optimize=True)


# -------------------------------------------------------------------------------------------------------------- Tables


def load(experiment):
    """Content of results/EXPERIMENT.json; None without the file."""
    path = DOCS / "results" / f"{experiment}.json"
    return json.loads(path.read_text()) if path.exists() else None


def cell_values(data, row, column):
    """Values of a cell, of each seed that has one. For "gap COLUMN" in percent: 0 is MoCo v2 alone, 100 the teacher."""
    key, _, other = column.removeprefix("gap ").partition(" minus ")
    names = [row, other] if other else [row]
    if column.startswith("gap "):
        names = [row, "moco_v2", "teacher"] if row.startswith(("disco", "seed")) else []
    if row == other or not names or (key in LOSSES and key not in data["rows"].get(row, {})):
        return []
    for name in names:
        if key not in data["rows"].get(name, {}):
            raise SystemExit(f"docs/results has no {key} of {name}: correct TABLES in docs/figures.py, or collect it")
    seeds = [values for values in zip(*(data["rows"][name][key] for name in names), strict=True) if None not in values]
    if len(names) == 3:
        return [100 * (own - alone) / (teacher - alone) for own, alone, teacher in seeds]
    return [own - reference for own, reference in seeds] if other else [own for (own,) in seeds]


def cell(column, values):
    """Text of a cell: the mean with the range over the seeds; of a setting each of its values."""
    if column in SETTINGS or not values:
        return ", ".join(f"{value:,}".removesuffix(".0") for value in sorted(set(values)))
    sign = "+" if " minus " in column else ""
    digits = 3 if column in LOSSES else 1
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def header(column):
    """Header of a column."""
    key, _, other = column.removeprefix("gap ").partition(" minus ")
    text = HEADERS.get(key, key).replace(" 1percent", ", 1 %")
    return f"gap closed, {text}" if column.startswith("gap ") else f"{text}, difference" if other else text


def table_text(name):
    """A table in Markdown."""
    experiment, columns, rows = TABLES[name]
    data = load(experiment)
    if not data:
        return "No results yet.\n"
    lines = [["network", *map(header, columns)], ["---"] * (1 + len(columns))]
    for row, label in rows.items():
        values = [cell_values(data, row, column) for column in columns]
        count, seeds = min(len(found) for found in values if found), len(data["seeds"])
        label += f" ({count} of {seeds} seeds)" if count < seeds else ""
        lines.append([label, *map(cell, columns, values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def value_text(name):
    """A figure of VALUES."""
    pick, table, rows, columns = VALUES[name]
    data = load(TABLES[table][0])
    if not data:
        return "?"
    value = pick(value for row in rows for column in columns for value in cell_values(data, row, column))
    return str({min: math.floor, max: math.ceil, fmean: round}[pick](value))


def fill(text):
    """The text of a page with its tables and figures from the files in results/.

    A table follows the line `<!-- table: NAME -->`. That line gets the digest of the table's file, so that a test sees
    any change of the file. A figure in a sentence follows `<!-- value: NAME -->`.
    """

    def table(found):
        path = DOCS / "results" / f"{TABLES[found[1]][0]}.json"
        source = f" from {path.name} {digest([path])}" if path.exists() else ""
        return f"<!-- table: {found[1]}{source} -->\n{table_text(found[1])}"

    text = re.sub(r"^<!-- table: (\w+).* -->\n(?:\S.*\n)*", table, text, flags=re.MULTILINE)
    return re.sub(r"(<!-- value: (\w+) -->)([-\d?]+(\.\d+)?)?", lambda found: found[1] + value_text(found[2]), text)


def digest(paths):
    """The first eight hexadecimal digits of the SHA-256 of the files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


# ------------------------------------------------------------------------------------------------------------ Pictures


def draw():
    """Write the pictures, each with the digest of its sources in its metadata."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    def save(figure, name, dpi):
        source = digest([DOCS / "results" / file for file in PICTURES[name]])
        figure.savefig(DOCS / name, dpi=dpi, metadata={"Source": source})

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    curves = {name: load("quickstart")["curves"][name] for name in CURVES}
    for name in sorted(CURVES, key=lambda name: max(map(max, curves[name].values())), reverse=True):
        draw_curve(axes, curves[name], METHODS[name], *CURVES[name])
    axes.set(xlabel="epochs of training", ylabel="20-NN accuracy in %", ylim=(0, 100), xlim=(0, None))
    figure.legend(loc="outside right center", frameon=False)
    save(figure, "accuracy.png", dpi=150)

    figure = Figure(figsize=(10, 3.3), layout="constrained")
    figure.supxlabel("an image, then its nearest training images; blue: same class, red: another", size=10)
    for axes, name in zip(figure.subplots(1, 2), NEIGHBORS, strict=True):
        axes.imshow(imread(DOCS / "results" / f"neighbors_{name}.png"), interpolation="nearest")
        axes.set_title(METHODS[name], size=12)
        axes.set_axis_off()
    save(figure, "neighbors.png", dpi=100)
    save(draw_methods(), "methods.png", dpi=200)

    figure = Figure(figsize=(9.4, 2.8), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    labels = {**METHODS, "teacher": "ResNet-8"}
    for axes, title, name in zip(panels, ("MoCo v2", "DisCo", "SEED"), ("teacher", "disco", "seed"), strict=False):
        draw_curve(axes, curves[name], labels[name], *CURVES[name])
        draw_curve(axes, curves["moco_v2"], "MobileNetV3" if axes is panels[0] else "MoCo v2 alone", *CURVES["moco_v2"])
        axes.set(title=title, xlabel="epochs", xlim=(0, None))
    for name, look in SSKD_CURVES.items():
        draw_curve(panels[3], load("exercises")["curves"][name], *look)
    panels[3].set(title="SSKD", xlabel="epochs", ylim=(0, 102), xlim=(0, None))
    panels[0].set_ylabel("20-NN; SSKD: top-1, in %")
    for axes in panels:
        axes.legend(loc="lower right", frameon=False, fontsize=8)
    save(figure, "curves.png", dpi=150)


def draw_curve(axes, curve, label, color, style):
    """Mean over the seeds and the range of a curve {epoch: accuracies}, from its first epoch."""
    seeds = list(curve.values())
    epochs = [int(epoch) - int(next(iter(curve))) for epoch in curve]
    axes.plot(epochs, [sum(row) / len(row) for row in seeds], style, color=color, label=label, linewidth=2)
    axes.fill_between(epochs, list(map(min, seeds)), list(map(max, seeds)), color=color, alpha=0.2, linewidth=0)
    axes.grid(color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)


def draw_methods():
    """A picture of the four methods side by side: networks, what is compared, where gradients flow."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    looks = {  # of a box: fill, edge, text
        "trained": ("#0072b2", "#0072b2", "white"), "average": ("#bfe0f5", "#0072b2", "black"),
        "frozen": ("#d9d9d9", "#777777", "black"), "loss": ("#fff4cc", "#e69f00", "black"),
        "queue": ("white", "#777777", "black"), "input": ("none", "none", "black"),
    }  # fmt: skip
    figure = Figure(figsize=(9.4, 4.3))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 940), ylim=(0, 430))
    axes.set_axis_off()

    def box(x, y, text, look, width=80, height=36):
        fill, edge, color = looks[look]
        corner = (x - width / 2 + 4, y - height / 2 + 4)
        style = FancyBboxPatch(corner, width - 8, height - 8, "round,pad=4", facecolor=fill, edgecolor=edge, zorder=2)
        axes.add_patch(style)
        axes.text(x, y, text, color=color, size=9, ha="center", va="center", zorder=3)

    def arrow(start, end, gradient=False):
        style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "color": "black",
                 "linestyle": "-" if gradient else (0, (3, 2)), "linewidth": 1.6 if gradient else 1.1}  # fmt: skip
        axes.annotate("", end, start, arrowprops=style, zorder=1)

    def title(x, name, subject):
        axes.text(x, 416, name, size=12, weight="bold", ha="center", va="center")
        axes.text(x, 396, subject, size=9, ha="center", va="center")

    def network(x, text, look, views):
        box(x, 362, views, "input", height=20)
        arrow((x, 352), (x, 318))
        box(x, 300, text, look)

    def queue(x, entries):
        """A queue below a network: its output enters, and the loss reads it."""
        for shift in (6, 3, 0):
            box(x + shift, 215 - shift, f"queue of\n{entries}" if shift == 0 else "", "queue", width=80)
        arrow((x, 282), (x, 233))
        arrow((x, 194), (x, 148))

    title(108, "MoCo v2", "images against each other")
    network(62, "momentum\nencoder", "average", "view 2")
    network(166, "encoder", "trained", "view 1")
    arrow((126, 300), (102, 300))
    queue(72, "keys")
    arrow((24, 282), (24, 148))
    arrow((166, 282), (166, 148), gradient=True)
    box(109, 130, "InfoNCE: which key\nis of the same image?", "loss", width=194)

    title(352, "DisCo", "MoCo v2 and the teacher's embeddings")
    network(266, "mean\nstudent", "average", "view 2")
    network(370, "student", "trained", "views 1, 2")
    network(460, "teacher", "frozen", "views 1, 2")
    arrow((330, 300), (306, 300))
    queue(276, "keys")
    arrow((228, 282), (228, 148))
    arrow((350, 282), (350, 148), gradient=True)
    arrow((388, 282), (388, 83), gradient=True)
    arrow((460, 282), (460, 83))
    box(296, 130, "InfoNCE:\nview 1, keys of view 2", "loss", width=164)
    box(424, 65, "squared distance,\nview by view", "loss", width=152)

    title(610, "SEED", "similarities to a queue")
    network(558, "student", "trained", "one view")
    network(656, "teacher", "frozen", "one view")
    queue(664, "embeddings")
    arrow((620, 282), (620, 148))
    arrow((558, 282), (558, 148), gradient=True)
    box(610, 130, "cross-entropy of similarities\nto teacher's and queue's", "loss", width=194)

    title(832, "SSKD", "labels, rotated images")
    network(772, "student", "trained", "4 rotations")
    network(892, "teacher", "frozen", "4 rotations")
    for x, look, gradient in ((792, "trained", True), (872, "frozen", False)):
        box(x, 215, "head", look, width=62)
        arrow((x, 282), (x, 233), gradient)
        arrow((x, 197), (x, 148), gradient)
    arrow((742, 282), (742, 83), gradient=True)
    arrow((922, 282), (922, 83))
    box(832, 130, "KL of similarities:\nrotated to upright", "loss", width=142)
    box(832, 65, "cross-entropy with labels,\nKL of logits", "loss", width=204)

    for x in (209, 502, 717):
        axes.axvline(x, 0.1, 0.99, color="#dddddd", linewidth=1)
    for x, look, text in ((20, "trained", "trained"), (110, "average", "moving average of the trained one"),
                          (362, "frozen", "frozen"), (445, "loss", "what is compared")):  # fmt: skip
        box(x, 18, "", look, width=22, height=16)
        axes.text(x + 16, 18, text, size=9, va="center")
    for x, gradient, text in ((600, True, "with gradient"), (750, False, "without gradient")):
        arrow((x, 18), (x + 40, 18), gradient)
        axes.text(x + 46, 18, text, size=9, va="center")
    return figure


def main():
    args = parse_args()
    if args.command == "collect":
        for folder in args.folders:
            collect(folder)
    elif args.command == "tables" and args.write:
        for page in (DOCS.parent / "README.md", *DOCS.glob("*.md")):
            page.write_text(fill(page.read_text()))
    elif args.command == "tables":
        for name in TABLES:
            print(f"{name}\n\n{table_text(name)}")
    else:
        draw()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("collect").add_argument("folders", nargs="+", type=Path, metavar="RUNS/NAME")
    commands.add_parser("tables").add_argument("--write", action="store_true", help="update README.md and docs/*.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
