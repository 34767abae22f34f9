"""A frozen ResNet-50 with a new last layer: `configs/resnet50_cifar10.yaml` against the plain loop of PyTorch.

The same images, weights and recipe on both sides, which take turns. The weights are random, for want of others here,
and the same on both sides; the images are those of Fashion-MNIST, made as large as the model's processor makes them,
a fifth as many to test as to train, as CIFAR-10 has. Ours computes the features anew in each run (`data.cache: false`).
"""

import argparse
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from text_classification import local, machine, new_result, our_command, revision, run_child, save, spread, versions

HERE = Path(__file__).resolve().parent
IMAGES = {
    "train": "asset:fashion_mnist/train-images-idx3-ubyte.gz",
    "test": "asset:fashion_mnist/t10k-images-idx3-ubyte.gz",
}
PROCESSOR = {
    "image_processor_type": "ConvNextImageProcessor",
    "crop_pct": 0.875,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}
SIDES = ("ours", "torch_loop")

Tree = dict[str, Any]


def main() -> None:
    """Run both sides in turn, keep what came out, show it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="interpreter with the `parity` extra")
    parser.add_argument("--rows", type=int, default=960, help="first images to train on; a fifth as many to test")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes of the loop that read images")
    parser.add_argument("--out", type=Path, help="report; left out: a new file in results/")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for our config")
    options = parser.parse_args()
    options.out = options.out or new_result(Path(__file__).stem)
    report: Tree = {"revision": revision(), "machine": machine(), "versions": versions(), "options": vars(options)}
    report["runs"] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        counts = {"train": options.rows, "test": options.rows // 5}
        images = {
            split: str(first(Path(local(name)), counts[split], Path(directory))) for split, name in IMAGES.items()
        }
        model = Path(directory) / "resnet-50"
        run_child([options.peer_python, "-c", WEIGHTS, str(model), json.dumps(PROCESSOR)], Path(directory) / "weights")
        for seed in range(options.repeats):
            for side in SIDES:
                place = Path(directory) / f"{seed}-{side}"
                measured = (ours if side == "ours" else peer)(options, model, images, seed, place)
                report["runs"].append({"side": side, "seed": seed, **measured})
                save(options.out, report)
    report["ratio"] = summed_up(report["runs"])
    save(options.out, report)
    Console().print(table(report))


# A random ResNet-50 in the form of the hub, by transformers, so that neither side is at home in it.
WEIGHTS = """
import json, sys, torch, transformers
torch.manual_seed(0)
config = transformers.ResNetConfig(num_labels=1000)
transformers.ResNetForImageClassification(config).save_pretrained(sys.argv[1])
open(sys.argv[1] + "/preprocessor_config.json", "w").write(sys.argv[2])
"""


def first(file: Path, count: int, directory: Path) -> Path:
    """A copy of the first images of a packed IDX file, their labels beside it."""
    for name in (file.name, file.name.replace("images-idx3", "labels-idx1")):
        data = gzip.decompress(file.with_name(name).read_bytes())
        header = 4 + 4 * data[3]  # the last byte of the magic number counts the dimensions, 4 bytes each
        size = (len(data) - header) // int.from_bytes(data[4:8])
        cut = data[:4] + count.to_bytes(4) + data[8:header] + data[header : header + count * size]
        (directory / name).write_bytes(gzip.compress(cut))
    return directory / file.name


def ours(options: argparse.Namespace, model: Path, images: Tree, seed: int, directory: Path) -> Tree:
    """By the command line, as a user would."""
    source = {"kind": "files", **images}
    settings = [
        f"run.dir={directory}",
        f"model.source={model}",
        f"data.source={json.dumps(source)}",
        "task.image=image",
        "data.split.validation=0",
        "data.cache=false",
        "eval.every=never",
        "eval.baselines=false",
        f"train.epochs={options.epochs}",
        f"seed={seed}",
        *options.set,
    ]
    config = HERE.parent / "configs" / "resnet50_cifar10.yaml"
    outside = run_child([*our_command(), "train", str(config), *settings], directory)
    summary = json.loads((directory / "summary.json").read_text())
    return {**outside, "accuracy": summary["test"]["accuracy"], "reported": summary}


def peer(options: argparse.Namespace, model: Path, images: Tree, seed: int, directory: Path) -> Tree:
    """The plain loop."""
    file = Path(f"{directory}.json")
    arguments = {**images, "model": model, "epochs": options.epochs, "seed": seed, "out": file}
    arguments["workers"] = options.workers
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    outside = run_child([options.peer_python, str(HERE / "torch_loop.py"), *words], directory)
    reported = json.loads(file.read_text())
    return {**outside, "accuracy": reported["accuracy"], "reported": reported}


def summed_up(runs: list[Tree]) -> Tree:
    """How much sooner ours ends, start to exit of the process, within each repeat."""
    sides = [[run["wall_seconds"] for run in runs if run["side"] == side] for side in SIDES]
    return spread([theirs / own for own, theirs in zip(*sides, strict=True)])


def table(report: Tree) -> Table:
    """A row for each run."""
    found = Table("side", "seed", "wall, s", "accuracy", title=f"loop / ours: {report['ratio']['median']:.1f}")
    for run in report["runs"]:
        found.add_row(run["side"], str(run["seed"]), f"{run['wall_seconds']:.0f}", f"{run['accuracy']:.3f}")
    return found


if __name__ == "__main__":
    main()
