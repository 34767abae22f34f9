"""The peers under `accelerator.py`: plain loops of PyTorch at their best settings, and the Trainer of transformers.

A variant is `loop` or `trainer`, and words after `+`: `compile` for torch.compile, `isolated` so that packed documents
do not see each other (left out, rows are plain causal ones, which is faster and another loss), `liger` for its kernels
where they are installed. bfloat16 is autocast over float32 weights, as ours is; frozen weights are bfloat16 themselves.
Speaks lines of JSON as `speed_ours.py` does. Knows nothing of sft_jax.
"""

import contextlib
import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from speed_jobs import Job, packed
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES = {
    "classify": transformers.AutoModelForSequenceClassification,
    "lm": transformers.AutoModelForCausalLM,
    "image": transformers.AutoModelForImageClassification,
}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE, RANK, ALPHA = 1e-5, 16, 32
Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], torch.Tensor]


class Adapted(nn.Module):
    """A frozen linear layer and a product of low rank beside it. Source: arXiv 2106.09685."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.randn(RANK, layer.in_features, device=layer.weight.device) * 0.02)
        self.b = nn.Parameter(torch.zeros(layer.out_features, RANK, device=layer.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return self.layer(x) + ALPHA / RANK * low


def main() -> None:
    """Make model and batches, take the first step, and then as many as are asked for."""
    directory, dtype, variant = sys.argv[1:4]
    job, (kind, *words) = Job.read(f"{directory}/job.json"), variant.split("+")
    if "liger" in words and importlib.util.find_spec("liger_kernel") is None:
        say(unavailable="liger_kernel is not installed")
        return
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as XLA does: TF32 where a GPU has it
    torch.backends.cudnn.benchmark = True
    model = make_model(job, Path(directory), dtype)
    if "liger" in words:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # type: ignore[import-not-found]

        _apply_liger_kernel_to_instance(model)
    if kind == "trainer":
        by_trainer(job, Path(directory), dtype, model, "compile" in words)
        return
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)
    if "compile" in words:
        model.compile(dynamic=job.task == "classify")
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(batch: Batch) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.detach()

    by_loop(batches_of(job, Path(directory), "isolated" in words), step, dtype, fixed=job.task == "image")


def make_model(job: Job, directory: Path, dtype: str) -> Any:
    """The model, on the device, with what is trained of it."""
    settings = {name: value for name, value in job.config.items() if name not in ("model_type", "architectures")}
    labels = {} if job.task == "lm" else {"num_labels": 2 if job.task == "classify" else 10}
    config = transformers.AutoConfig.for_model(job.config["model_type"], **settings, **labels)
    frozen = job.trained == "adapter"
    kept = torch.bfloat16 if frozen and dtype == "bfloat16" else torch.float32
    how = {} if job.config["model_type"] == "resnet" else {"attn_implementation": "sdpa"}
    with DEVICE:
        model = CLASSES[job.task].from_config(config, dtype=kept, **how)
    model.config.use_cache = False
    if frozen:
        model.requires_grad_(False)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name in ADAPTED:
                    setattr(parent, name, Adapted(child))
    model.to(DEVICE, memory_format=torch.channels_last if job.macs else torch.preserve_format)
    model.train()
    if job.trained == "head":
        model.requires_grad_(False)
        model.eval()
        model.classifier.requires_grad_(True)
    if job.remat:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if frozen:
            model.enable_input_require_grads()
    return model


def batches_of(job: Job, directory: Path, isolated: bool) -> Iterator[Batch]:
    """Batches for ever, on the device."""
    if job.task == "image":
        yield from images(job, directory)
    documents, labels = tokens(directory)
    epoch = 0
    while True:
        draw = np.random.default_rng(epoch)
        made = language(job, documents, draw, isolated) if job.task == "lm" else texts(job, documents, labels, draw)
        for batch in made:
            yield {name: torch.from_numpy(array).to(DEVICE, non_blocking=True) for name, array in batch.items()}
        epoch += 1


def images(job: Job, directory: Path) -> Iterator[Batch]:
    """One batch, again and again."""
    held = np.load(directory / "images.npz")
    pixels = torch.from_numpy(held["image"][: job.batch]).to(DEVICE).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    layout = torch.channels_last if job.macs else torch.contiguous_format
    batch = {
        "pixel_values": pixels.contiguous(memory_format=layout),
        "labels": torch.from_numpy(held["label"][: job.batch]).to(DEVICE),
    }
    while True:
        yield batch


def tokens(directory: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens of each document, and the labels."""
    held = np.load(directory / "tokens.npz")
    return np.split(held["ids"].astype(np.int64), held["lengths"].cumsum()[:-1]), held["label"].astype(np.int64)


def texts(job: Job, documents: list[np.ndarray], labels: np.ndarray, draw: np.random.Generator) -> Iterator[dict]:
    """Documents of like lengths together, padded to a multiple of 8, as the Trainer groups them."""
    order, mega = draw.permutation(len(documents)), 50 * job.batch
    parts = [sorted(order[at : at + mega], key=lambda n: -len(documents[n])) for at in range(0, len(order), mega)]
    whole = [number for part in parts for number in part]
    batches = [whole[at : at + job.batch] for at in range(0, len(whole) - job.batch + 1, job.batch)]
    for place in draw.permutation(len(batches)):
        chosen = batches[place]
        width = -(-max(len(documents[n]) for n in chosen) // 8) * 8
        ids, mask = (np.zeros((len(chosen), width), np.int64) for _ in range(2))
        for row, number in enumerate(chosen):
            ids[row, : len(documents[number])] = documents[number]
            mask[row, : len(documents[number])] = 1
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels[np.asarray(chosen)]}


def language(job: Job, documents: list[np.ndarray], draw: np.random.Generator, isolated: bool) -> Iterator[dict]:
    """Packed rows; where documents are isolated, their positions say where each begins."""
    order = draw.permutation(len(documents))
    rows = packed(np.asarray([len(documents[n]) for n in order]), job.longest)
    for at in range(0, len(rows) - job.batch + 1, job.batch):
        ids, positions = (np.zeros((job.batch, job.longest), np.int64) for _ in range(2))
        labels = np.full((job.batch, job.longest), -100, np.int64)
        for row, numbers in enumerate(rows[at : at + job.batch]):
            begin = 0
            for number in numbers:
                document = documents[order[number]]
                end = begin + len(document)
                ids[row, begin:end], positions[row, begin:end] = document, np.arange(len(document))
                labels[row, begin + 1 : end] = document[1:]
                begin = end
            positions[row, begin:] = np.arange(job.longest - begin)
        yield {"input_ids": ids, "labels": labels, **({"position_ids": positions} if isolated else {})}


def real(batch: Batch) -> tuple[torch.Tensor | int, int]:
    """(tokens that are no filler, documents); the former stays on the device."""
    if "pixel_values" in batch:
        return 0, len(batch["labels"])
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(), len(batch["labels"])
    return (batch["input_ids"] > 0).sum(), int(batch["labels"].shape[0])


def by_loop(batches: Iterator[Batch], step: Step, dtype: str, fixed: bool) -> None:
    """Answer for a loop."""
    step(next(batches))
    ready(dtype)
    for line in sys.stdin:
        count, held = int(line), []
        wait()
        begun = time.perf_counter()
        for _ in range(count):
            batch = next(batches)
            loss = step(batch)
            held.append(real(batch))
        value = float(loss)
        wait()
        answer(time.perf_counter() - begun, held, value)


def by_trainer(job: Job, directory: Path, dtype: str, model: Any, compiled: bool) -> None:
    """Answer for the Trainer: it waits between steps for what is asked."""
    documents, labels = tokens(directory)
    rows = [{"input_ids": d.tolist(), "labels": int(y)} for d, y in zip(documents, labels, strict=True)]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "model" / "tokenizer.json"))
    tokenizer.pad_token = "[PAD]"
    workers = 2 if DEVICE.type == "cuda" else 0
    arguments = transformers.TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=job.batch,
        max_steps=job.steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=dtype == "bfloat16",
        train_sampling_strategy="group_by_length",
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        torch_compile=compiled,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=DEVICE.type == "cpu",
    )
    held: list[tuple[Any, int]] = []

    class Asked(transformers.TrainerCallback):
        """Takes as many steps as were asked for, then answers."""

        left, begun = 0, 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.left -= 1
            if self.left > 0:
                return
            wait()
            ready(dtype) if state.global_step == 1 else answer(time.perf_counter() - self.begun, held, 0.0)
            line = sys.stdin.readline()
            if not line:
                control.should_training_stop = True
                return
            held.clear()
            self.left, self.begun = int(line), time.perf_counter()

    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        callbacks=[Asked()],
    )
    inner = trainer.training_step

    def counting(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        held.append(real(inputs))
        return inner(model, inputs, *rest, **named)

    trainer.training_step = counting
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()


def ready(dtype: str) -> None:
    """The line after the first step."""
    wait()
    say(
        first_step=process_age(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        product=product(torch.bfloat16 if dtype == "bfloat16" else torch.float32),
    )


def answer(seconds: float, held: list[tuple[Any, int]], loss: float) -> None:
    """The line after so many steps."""
    counted = float(sum(int(count) for count, _ in held))
    documents = sum(documents for _, documents in held)
    on_device = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    memory = on_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(
        seconds=seconds,
        steps=len(held),
        tokens=counted,
        documents=documents,
        peak_bytes=memory,
        loss=loss if math.isfinite(loss) else None,
    )


def product(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    size, count = (8192 if DEVICE.type == "cuda" else 1024), 10
    a, b = (torch.randn(size, size, dtype=dtype, device=DEVICE) for _ in range(2))
    a @ b
    wait()
    begun = time.perf_counter()
    for _ in range(count):
        a @ b
    wait()
    return count * 2 * size**3 / (time.perf_counter() - begun)


def wait() -> None:
    """Until the device has done all that it was asked."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def process_age() -> float:
    """Seconds since this process was started (Linux)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def say(**values: Any) -> None:
    """A line for the other end; what else is printed goes to the log."""
    print("@" + json.dumps(values), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
