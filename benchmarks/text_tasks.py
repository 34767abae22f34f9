"""Scores of every text task: ours, scikit-learn's on words alone, and the peer's at the same recipe.

One row a recipe of `configs/`. Ours goes through the command line as a user's would and computes the baseline on the
same rows; the peer gets its recipe from what our run resolved. Accuracy is what is compared here; for speed see
`text_classification.py`, whose runs take turns.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from text_classification import (
    EQUAL_WORK,
    machine,
    new_result,
    our_command,
    read_recipe,
    revision,
    run_child,
    run_peer,
    save,
    versions,
)

RECIPES = ("quickstart", "bert_sentiment", "rated_score", "traits", "preference")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"

Tree = dict[str, Any]


def main() -> None:
    """Run every recipe on both sides, keep what came out, show it."""
    options = parse_options()
    report = {
        "revision": revision(),
        "machine": machine(),
        "versions": versions(),
        "options": vars(options),
        "runs": [],
    }
    console = Console()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        for recipe in options.recipes:
            console.print(recipe)
            report["runs"].append(measure(recipe, options, Path(directory) / recipe))
            save(options.out, report)
    console.print(scores_table(report["runs"]))
    console.print(f"every run: {options.out}")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--peer-python", help="interpreter with torch; left out: no peer")
    parser.add_argument("--peer", default="tuned", help="mode of peer.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="report; left out: a new file in results/")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for our config")
    options = parser.parse_args()
    options.out = options.out or new_result(Path(__file__).stem)
    return options


def measure(recipe: str, options: argparse.Namespace, directory: Path) -> Tree:
    """The headline metric of the three sides on the test rows of one recipe."""
    settings = [f"run.dir={directory}", "run.resume=never", f"seed={options.seed}", "eval.baselines=true"]
    equal = [setting for setting in EQUAL_WORK if not setting.startswith("eval.baselines")]
    run_child([*our_command(), "train", str(CONFIGS / f"{recipe}.yaml"), *settings, *equal, *options.set], directory)
    ours = json.loads((directory / "summary.json").read_text())
    metric = ours["headline"]
    found = {"recipe": recipe, "metric": metric, "ours": ours["test"][metric], "baselines": ours["baselines"]}
    found |= {"test": ours["test"], "steps": ours["steps"]}
    if options.peer_python:
        peer = run_peer(options.peer_python, read_recipe(directory), options.peer, options.seed, directory)
        found |= {"peer": peer[metric], "peer_reported": peer["reported"]}
    return found


def scores_table(runs: list[Tree]) -> Table:
    """A row for each recipe."""
    table = Table("recipe", "metric", "trivial", "words", "ours", "peer")
    for run in runs:
        by_words = sorted(run["baselines"].items(), key=lambda found: found[0].startswith("TF-IDF"))
        sides = [*dict(by_words).values(), run["ours"], *([run["peer"]] if "peer" in run else [])]
        table.add_row(run["recipe"], run["metric"], *(f"{value:.4f}" for value in sides))
    return table


if __name__ == "__main__":
    main()
