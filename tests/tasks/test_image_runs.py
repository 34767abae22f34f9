"""Image classification: the loss of mixed images, the five most probable, whole runs, their report and predictions."""

import io
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from pictures import LABELS, SQUARE, VIT, encode, noise, settings, write_pictures, write_vision
from PIL import Image
from rich.console import Console

from sft_jax import jobs
from sft_jax.config.data import Images
from sft_jax.config.read import read_config
from sft_jax.config.tasks import ImageClassification
from sft_jax.console import show_result, show_run
from sft_jax.data.images import FEATURE
from sft_jax.data.rows import Rows
from sft_jax.errors import ConfigError, DataError, ModelError
from sft_jax.infer.predict import load_predictor, read_inputs
from sft_jax.report.page import write_report
from sft_jax.run import prepare
from sft_jax.tasks.classes import top_accuracy
from sft_jax.tasks.losses import cross_entropy
from sft_jax.tasks.task import Task, build_task, restore_task


def task_of(count: int = 3, **section) -> Task:
    """A task with so many labels."""
    names = [f"l{number}" for number in range(count)]
    return build_task(ImageClassification(kind="image_classification", labels=names, **section), {})


@pytest.mark.parametrize("section", [{}, {"label_smoothing": 0.1}, {"loss": "focal"}, {"class_weights": {"l1": 3.0}}])
def test_the_loss_of_mixed_images_is_the_sum_by_share(section):
    """C2: an image that is part of another counts for both labels, in their shares; filler for none."""
    draw, task = np.random.default_rng(0), task_of(**section)
    logits = jnp.asarray(draw.normal(size=(4, 1, 3)), jnp.float32)
    label, other, weight = (
        np.array([[0], [1], [2], [1]]),
        np.array([[1], [1], [0], [2]]),
        np.float32([[1], [1], [1], [0]]),
    )
    share = np.float32([[0.25], [0.5], [1], [0.5]])
    found = task.loss(logits, {"label": label, "weight": weight, "label_other": other, "label_share": share})
    total = below = 0.0
    for row in range(3):
        for one, part in ((label, share[row, 0]), (other, 1 - share[row, 0])):
            alone = task.loss(
                logits[row : row + 1], {"label": one[row : row + 1], "weight": np.ones((1, 1), np.float32)}
            )
            total, below = total + part * float(alone.total), below + part * float(alone.weight)
    assert float(found.total) == pytest.approx(total, rel=1e-6) and float(found.weight) == pytest.approx(
        below, rel=1e-6
    )
    whole = task.loss(logits, {"label": label, "weight": weight, "label_other": other, "label_share": np.ones((4, 1))})
    assert float(whole.value) == pytest.approx(float(task.loss(logits, {"label": label, "weight": weight}).value))


def test_plain_batches_have_the_plain_loss():
    """C2: without another label the loss is cross-entropy."""
    logits, label, weight = jnp.ones((2, 1, 3)).at[0, 0, 1].set(2), np.array([[1], [0]]), np.ones((2, 1), np.float32)
    batch = {"label": label, "weight": weight}
    assert float(task_of().loss(logits, batch).value) == float(cross_entropy(logits, label, weight).value)


def test_the_five_most_probable():
    """C16: among the five most probable as scikit-learn counts it; only where there are more than five labels."""
    from sklearn.metrics import top_k_accuracy_score

    draw = np.random.default_rng(0)
    logits, label = draw.normal(size=(50, 9)).astype(np.float32), draw.integers(0, 9, 50)
    assert top_accuracy(logits, label) == top_k_accuracy_score(label, logits, k=5, labels=range(9))
    assert top_accuracy(np.full((2, 6), np.nan), np.zeros(2, int)) == top_accuracy(logits[:0], label[:0]) == 0.0
    assert task_of(6).metric_names[-1] == "top5_accuracy" and "top5_accuracy" not in task_of(5).metric_names


def test_labels_come_from_the_source():
    """D7: names of a ClassLabel, else the sorted values; an unknown label is a bad row that says what was expected."""
    kind = Features({"image": FEATURE, "label": ClassLabel(names=["cat", "dog"])})
    cells = [{"bytes": encode(noise(0, 3, 3)), "path": None}] * 2
    rows = Rows(Dataset.from_dict({"image": cells, "label": [1, 0]}, features=kind), "here")
    task = build_task(ImageClassification(kind="image_classification"), {"train": rows})
    assert task.labels == ("cat", "dog") and task.targets(rows).values == [1, 0] and task.images
    named = Rows(Dataset.from_dict({"image": cells, "label": ["dgo", "cat"]}), "here")
    bad = build_task(ImageClassification(kind="image_classification", labels=["cat", "dog"]), {}).targets(named).bad
    assert bad[0].text == "label is 'dgo'; did you mean 'dog'?; expected one of the 2 labels (cat, dog)"


def test_restored_from_models_of_others():
    """D7: a model of any `...ForImageClassification` is predicted with; one with several labels at once is refused."""
    config = {"architectures": ["ViTForImageClassification"], "id2label": {"0": "cat", "1": "dog", "2": "eel"}}
    task = restore_task(config, "here")
    assert task.kind == "image_classification" and task.labels == ("cat", "dog", "eel") and task.texts == ("image",)
    with pytest.raises(ModelError, match="problem_type is 'multi_label_classification', expected single_label"):
        restore_task({**config, "problem_type": "multi_label_classification"}, "here")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a tiny ViT and three splits of pictures, one of them with a name that is none for a page."""
    home = tmp_path_factory.mktemp("image-runs")
    for seed, (split, count) in enumerate((("train", 31), ("validation", 9), ("test", 12))):
        write_pictures(home / "images" / split, count, seed)
    hidden = home / "images" / "test" / "red"
    next(hidden.glob("*.png")).rename(hidden / "<script>alert(1)<.png")
    write_vision(home / "model", VIT)
    return home


@pytest.fixture(scope="module")
def run(home):
    """A run that was trained on them."""
    options = ["data.images.flip=0.5", "eval.baselines=true"]
    result = jobs.train(prepare(read_config([], settings(home, home / "model", home / "images", *options))))
    return result.directory


def test_a_run_learns_and_is_compared(run):
    """D7: a run gives every metric of the task and its baselines, and learns a colour from a folder of pictures."""
    summary = json.loads((run / "summary.json").read_text())
    assert set(task_of().metric_names) <= summary["test"].keys()
    assert summary["baselines"].keys() == {"majority class", "pixels + logistic regression"}
    assert summary["baselines"]["majority class"] == pytest.approx(1 / 3)
    assert summary["test"]["accuracy"] > 0.6
    assert json.loads((run / "manifest.json").read_text())["data"]["train"]["rows"] == 31


def test_the_report_shows_the_worst_mistakes(home, tmp_path):
    """D7: mistakes stand in the page as small pictures, and nothing of it is unescaped."""
    config = read_config([], settings(tmp_path, home / "model", home / "images", "train.steps=1", "optim.lr=1e-9"))
    directory = jobs.train(prepare(config)).directory
    found = json.loads((directory / "review.json").read_text())["mistakes"]
    assert len(found) > 3 and all(len(row["texts"][0]["image"]) < 6_000 for row in found)
    page = write_report(directory).read_text()
    assert len(re.findall(r'<img src="data:image/jpeg;base64,[\w+/=]+" alt="image \w{12}">', page)) == len(found)
    assert 'class="mistakes pictures"' in page and "<script>" not in page and len(page) < 300_000
    assert any("&lt;script&gt;" in line for line in page.splitlines()) == any("script" in row["place"] for row in found)


def test_images_are_counted_as_images(run, home, tmp_path):
    """D7: nothing of a run on images speaks of tokens: the console before and while it trains, report and summary."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["unit"] == "images"
    prepared = prepare(read_config([], settings(tmp_path, home / "model", home / "images")))
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    show_run(console, prepared)
    show_result(console, prepared, jobs.Result(run, summary["steps"], 1, {}, None, {}, summary))
    assert "images/s" in shown.getvalue() and "token" not in shown.getvalue() and "padding" not in shown.getvalue()
    page = write_report(run).read_text()
    assert "images a second" in page and "tokens a second" not in page


def test_what_is_exported(run, home):
    """D7: an export holds the processor, in the size that was trained with, and names its labels."""
    config = json.loads((run / "model" / "config.json").read_text())
    assert json.loads((run / "model" / "preprocessor_config.json").read_text()) == SQUARE
    (content,) = task_of(size=24).reader.files(home / "model").values()
    assert json.loads(content) == {**SQUARE, "size": {"height": 24, "width": 24}}
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"} and config["label2id"]["red"] == 2
    assert config["architectures"] == ["ViTForImageClassification"]


def test_predictions(run, home):
    """D7: an image, a folder, folders of labels, lines of paths and rows give label and probabilities, all the same."""
    predictor = load_predictor(str(run / "model"))
    folder = home / "images" / "test" / "red"
    files = sorted(folder.iterdir())

    def predicted(file: Path | None = None, lines: list[str] | None = None) -> list[dict]:
        return list(predictor(read_inputs(str(file or ""), predictor.task, lines)))

    whole = predicted(folder)
    assert [record["id"] for record in whole] == [file.name for file in files]
    for record in whole:
        assert set(record["scores"]) == set(LABELS) and sum(record["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert record["label"] == max(record["scores"], key=record["scores"].__getitem__)
    bare = [{"label": record["label"], "scores": pytest.approx(record["scores"], abs=1e-5)} for record in whole]
    assert predicted(files[2]) == [{"id": files[2].name, **bare[2]}]
    named = [{"id": str(file), **record} for file, record in zip(files, bare, strict=True)]
    assert predicted(lines=[str(file) for file in files]) == named == list(predictor(files))
    labelled = predicted(folder.parent)
    assert [record["id"] for record in labelled][-len(files) :] == [f"red/{file.name}" for file in files]
    assert [{k: v for k, v in record.items() if k != "id"} for record in labelled][-len(files) :] == bare
    (home / "rows.jsonl").write_text("".join(json.dumps({"image": str(file)}) + "\n" for file in files))
    assert predicted(home / "rows.jsonl") == bare
    with pytest.raises(DataError, match=r"line 1: image '/nowhere\.png' cannot be read"):
        predicted(lines=["/nowhere.png"])


def test_settings_of_texts_and_images_do_not_mix(home, configure):
    """C26: settings of texts are refused for images and the other way round, by name."""
    given = settings(home / "more", home / "model", home / "images")
    with pytest.raises(ConfigError) as caught:
        prepare(read_config([], [*given, "data.clean.html=true", "data.max_length=9", "data.layout.kind=padded"]))
    assert str(caught.value) == (
        "data: image_classification reads images; leave out what is of texts: 3 problems\n  - clean\n  - max_length\n"
        "  - layout"
    )
    with pytest.raises(ConfigError, match=r"data\.images: sequence_classification reads no images; leave it out"):
        prepare(configure("data.images.flip=0.5"))
    assert Images() == Images.model_validate({})


def test_as_the_pipeline_predicts(run, tmp_path):
    """D7: `transformers` gives the same probabilities for the same file, turned and transparent ones too."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {"turned.jpg": noise(0, 30, 50), "clear.png": noise(1, 41, 20)}
    Image.fromarray(made["turned.jpg"]).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.dstack([made["clear.png"], noise(2, 41, 20)[..., :1]])).save(tmp_path / "clear.png")
    processor = transformers.AutoImageProcessor.from_pretrained(str(run / "model"), backend="pil")
    pipeline = transformers.pipeline("image-classification", model=str(run / "model"), image_processor=processor)
    predictor = load_predictor(str(run / "model"))
    for record in predictor(read_inputs(str(tmp_path), predictor.task)):
        theirs = {found["label"]: found["score"] for found in pipeline(str(tmp_path / record["id"]))}
        assert record["scores"] == pytest.approx(theirs, abs=1e-5)
