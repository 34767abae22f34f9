"""The page: one file that needs nothing else, shows what is there, and lets nothing from data become markup."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import EVIL, make_run

from sft_jax.errors import RunError
from sft_jax.report import page
from sft_jax.report.page import write_report


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its texts."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Keep it."""
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        """Keep it."""
        self.texts.append(data)

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        """The attributes of the elements of these names."""
        return [attributes for tag, attributes in self.found if tag in tags]


@pytest.fixture(scope="module", params=["labels", "several", "numbers"])
def written(request, tmp_path_factory) -> Path:
    """The report of a made-up run."""
    return write_report(make_run(tmp_path_factory.mktemp("page") / request.param, request.param))


@pytest.fixture(scope="module")
def text(written: Path) -> str:
    """What is in it."""
    return written.read_text(encoding="utf-8")


def test_nothing_of_data_becomes_markup(text):
    """Texts, labels, columns, groups, files, versions and settings with markup in them are shown as they are."""
    elements = Elements(text)
    assert not elements.of("script", "img", "iframe", "object", "embed", "form")
    assert all(attributes for attributes in elements.of("b"))
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    shown = "".join(elements.texts)
    for where in (f"group {EVIL}", f"{EVIL}.csv, line ", f"{EVIL}, line 3", "<b>bert</b> · made_up", f"dropped.{EVIL}"):
        assert where in shown
    assert "<script" not in text and shown.count("<script>") >= 10


def test_needs_nothing_else(text):
    """No element asks for anything outside of the file, and a policy forbids it besides."""
    elements = Elements(text)
    asked = [
        a[name] for _, a in elements.found for name in ("src", "href", "xlink:href", "srcset", "data") if name in a
    ]
    assert asked and all(value == "data:," or value.startswith("#") for value in asked)
    assert not re.search(r"@import|url\((?!#)|https?:|file:", text)
    (policy,) = [a["content"] for a in elements.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    targets = {f"#{a['id']}" for _, a in elements.found if "id" in a}
    assert targets >= {value for value in asked if value.startswith("#")}, "points nowhere"


def test_can_be_read_without_looking(text):
    """Every chart says in words what it shows, tables have headings with a scope, and no id stands twice."""
    elements = Elements(text)
    pictures = [a["aria-label"] for a in elements.of("div") if a.get("role") == "img"]
    assert len(pictures) == len(elements.of("svg")) >= 5 and all(len(words) > 20 for words in pictures)
    assert all(a.get("scope") in ("row", "col") for a in elements.of("th"))
    assert len(elements.of("table")) == len([a for a in elements.of("div") if a.get("role") == "region"])
    ids = [a["id"] for _, a in elements.found if "id" in a]
    assert len(ids) == len(set(ids))
    assert elements.of("html") == [{"lang": "en"}] and elements.of("main")


def test_shows_what_there_is(written, text):
    """What the task gives decides which sections there are: tables, confidence, numbers."""
    usual = ["Overview", "Learning curves", "Scores", "Answers", "Worst mistakes", "Data", "Run"]
    tables = {"labels": ["Confusion matrix", "Per class"], "several": ["Per label"], "numbers": []}[written.parent.name]
    found = re.findall(r"<h2>(.*?)</h2>", text)
    assert found == usual[:3] + tables + usual[3:]
    charts = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    own = {"labels": ["Calibration"], "several": [], "numbers": ["Prediction against truth", "Errors"]}[
        written.parent.name
    ]
    assert charts == ["Loss", "Validation f1_macro", "Learning rate", "Gradient norm", *own, "Score by length"]
    assert text.count('<div class="verdict">') == 20
    assert ('class="heat diagonal"' in text) == (written.parent.name == "labels")


def test_same_run_same_bytes(tmp_path):
    """The page is a function of the directory: made again, of a copy, it is the same to the byte."""
    run = make_run(tmp_path / "one" / "run", "numbers")
    before = write_report(run).read_bytes()
    copy = shutil.copytree(run, tmp_path / "other" / "run")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "attempts": [{"started": "another day"}]}))
    assert write_report(copy).read_bytes() == before
    metrics = copy / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 10,', '"step": 11,', 1))
    assert write_report(copy).read_bytes() != before


def test_size(tmp_path):
    """The report of a test split of 8,000 rows and of many steps stays below a megabyte."""
    run = make_run(tmp_path / "large", rows=8000)
    events = [
        {"kind": "train", "step": i, "loss": 1 / i + i % 7, "lr": 1.0, "grad_norm": float(i % 5)}
        for i in range(1, 20001)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert write_report(run).stat().st_size < 1e6


def test_run_that_is_not_finished(tmp_path):
    """R56: the report of a run that trains shows the curves so far, once for each step, and says that it goes on."""
    run = make_run(tmp_path / "going", finished=False)
    with open(run / "metrics.jsonl", "a") as sink:
        sink.write('{"kind": "train", "st')
    text = write_report(run).read_text()
    assert "not finished: 400 steps so far" in text and re.findall(r"<h2>(.*?)</h2>", text) == [
        "Overview",
        "Learning curves",
        "Run",
    ]
    (run / "metrics.jsonl").unlink()
    assert "not finished: 0 steps so far" in write_report(run).read_text()


def test_numbers_that_are_not_finite(tmp_path):
    """Losses that became NaN or infinite leave gaps in the curves, and the page is written."""
    run = make_run(tmp_path / "nan", finished=False)
    with open(run / "metrics.jsonl", "a") as sink:
        sink.write('{"kind": "train", "step": 410, "loss": NaN, "lr": 0.0, "grad_norm": Infinity}\n')
    text = write_report(run).read_text()
    assert "train loss from 0.6" in text and "to nan" in text and "to inf" in text


def test_no_run(tmp_path):
    """A directory without a run, and files that are not what was written, are each said with the remedy."""
    with pytest.raises(RunError, match=r"holds no run \(no config.yaml\); give the run.dir"):
        write_report(tmp_path)
    run = make_run(tmp_path / "broken")
    for name, said in (("summary.json", "is not JSON"), ("metrics.jsonl", "line 1: '{' is no line of metrics")):
        before = (run / name).read_text()
        (run / name).write_text("{\n")
        with pytest.raises(RunError, match=said):
            write_report(run)
        (run / name).write_text(before)
    (run / "config.yaml").write_text("eval: [")
    with pytest.raises(RunError, match=r"config.yaml: is not what `sft-jax train` wrote"):
        write_report(run)


def test_whole_or_not_at_all(written, monkeypatch):
    """R3: a report that cannot be made leaves the one before as it is, and nothing besides."""
    before, names = written.read_bytes(), sorted(file.name for file in written.parent.iterdir())

    def stop(*given):
        raise OSError("no space left")

    monkeypatch.setattr(page, "render", stop)
    with pytest.raises(OSError, match="no space"):
        write_report(written.parent)
    assert written.read_bytes() == before and sorted(file.name for file in written.parent.iterdir()) == names


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(text, theme):
    """Text and lines of charts stand out from what is behind them: 4.5 to 1, as WCAG 2.2 asks of text."""
    found = re.findall(r":root \{(.*?)\}", text, re.DOTALL)[theme == "dark"]
    colours = {name: tuple(bytes.fromhex(code)) for name, code in re.findall(r"--(\w+): #([0-9a-f]{6})", found)}
    front, back = ["ink", "muted", *(f"c{i}" for i in range(1, 9))], ["paper", "card"]
    low = [(a, b) for a in front for b in back if contrast(colours[a], colours[b]) < 4.5]
    assert low == [] and contrast(colours["card"], colours["paper"]) < 4.5


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """The contrast of two colours, from 1 to 21, by the formula of WCAG 2.2."""
    shares = [[c / 255 for c in colour] for colour in (one, other)]
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour] for colour in shares]
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (high + 0.05) / (low + 0.05)
