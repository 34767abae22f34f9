"""The plain loop of PyTorch that articles show: a frozen backbone, a new last layer, every epoch through all of it.

One process is one run and writes one JSON file. The backbone stays in evaluation mode, so that its statistics are
frozen too. With `--all` everything is trained, by the recipe of `configs/fashion_dinov2.yaml`: AdamW, warmup and linear
decay, clipping. Knows nothing of sft_jax: `frozen_images.py` starts it and compares.
"""

import argparse
import gzip
import json
import os
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, get_linear_schedule_with_warmup


class Clothes(Dataset):
    """Images of an IDX file, made into what the model reads each time that one is asked for."""

    def __init__(self, file: Path, count: int | None, processor):
        self.images = read_idx(file, 16).reshape(-1, 28, 28)[:count]
        self.labels = read_idx(file.with_name(file.name.replace("images-idx3", "labels-idx1")), 8)[:count]
        self.processor = processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self.images[number]).convert("RGB")
        return self.processor(image, return_tensors="pt")["pixel_values"][0], int(self.labels[number])


def main() -> None:
    """Train, test, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "train", "test", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--rows", type=int, help="first images of each split; left out: all")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="height and width, in place of the processor's")
    parser.add_argument("--all", action="store_true", help="train everything")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    square = {"height": options.size, "width": options.size}
    changed = {"size": square, "do_center_crop": False} if options.size else {}
    processor = AutoImageProcessor.from_pretrained(options.model, use_fast=False, **changed)
    train, test = (
        DataLoader(
            Clothes(file, options.rows, processor),
            options.batch_size,
            shuffle=file is options.train,
            num_workers=options.workers,
        )
        for file in (options.train, options.test)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForImageClassification.from_pretrained(options.model, num_labels=10, ignore_mismatched_sizes=True)
    model.to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad = options.all
    for parameter in model.classifier.parameters():
        parameter.requires_grad = True
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.classifier.parameters(), lr=options.lr)
    schedule = None
    if options.all:
        steps = options.epochs * len(train)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01, fused=True)
        schedule = get_linear_schedule_with_warmup(optimizer, -(-steps // 10), steps)
    begun = time.perf_counter()
    for _ in range(options.epochs):
        for images, labels in train:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images.to(device)).logits, labels.to(device))
            loss.backward()
            if schedule is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if schedule is not None:
                schedule.step()
    trained = time.perf_counter()
    with torch.no_grad():
        right = sum(int((model(x.to(device)).logits.argmax(-1).cpu() == y).sum()) for x, y in test)
    figures = {
        "train_seconds": trained - begun,
        "test_seconds": time.perf_counter() - trained,
        "accuracy": right / len(test.dataset),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    options.out.write_text(json.dumps(figures, indent=2) + "\n")


def read_idx(file: Path, header: int) -> np.ndarray:
    """The bytes of a packed IDX file behind its header."""
    return np.frombuffer(gzip.open(file).read(), np.uint8, offset=header)


if __name__ == "__main__":
    main()
