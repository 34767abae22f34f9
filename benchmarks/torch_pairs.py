"""The plain loop of PyTorch for translation: weights drawn at random learn pairs, and answer a test file.

One process is one run and writes one JSON file. The recipe is that of `configs/tiny_marian_en_fr.yaml`: AdamW, warmup
and then the inverse root of the step, clipping, label smoothing. Knows nothing of sft_jax.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import sacrebleu
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, get_inverse_sqrt_schedule

LONGEST = 64  # tokens of a source, of a target and of an answer
IGNORED = -100


def main() -> None:
    """Train, answer, and write the scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "train", "test", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(options.model)).train()
    train, test = read(options.train), read(options.test)

    def padded(pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        sources, targets = zip(*pairs, strict=True)
        limits = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
        found = tokenizer(list(sources), text_target=list(targets), **limits)
        found["labels"][found["labels"] == tokenizer.pad_token_id] = IGNORED
        return dict(found)

    loader = DataLoader(train, options.batch_size, shuffle=True, collate_fn=padded)
    parts: tuple[list, list] = ([], [])
    for parameter in model.parameters():
        parts[parameter.ndim == 1].append(parameter)
    groups = [{"params": parts[0], "weight_decay": 0.01}, {"params": parts[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=True)
    schedule = get_inverse_sqrt_schedule(optimizer, options.warmup)
    loss_of = torch.nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=0.1)
    begun, step = time.perf_counter(), 0
    while step < options.steps:
        for batch in loader:
            logits = model(**batch).logits
            loss = loss_of(logits.flatten(0, 1), batch["labels"].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0:
                print(f"{step}: loss {loss.item():.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
            if step == options.steps:
                break
    trained = time.perf_counter()
    answers = answered(model.eval(), tokenizer, [source for source, _ in test])
    wanted = [[target for _, target in test]]
    figures = {
        "steps": step,
        "train_seconds": trained - begun,
        "test_seconds": time.perf_counter() - trained,
        "chrf": sacrebleu.corpus_chrf(answers, wanted).score,
        "bleu": sacrebleu.corpus_bleu(answers, wanted).score,
        "torch": torch.__version__,
    }
    options.out.write_text(json.dumps(figures, indent=2) + "\n")


def read(file: Path) -> list[tuple[str, str]]:
    """The pairs of JSON lines."""
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return [(row["en"], row["fr"]) for row in rows]


@torch.no_grad()
def answered(model: torch.nn.Module, tokenizer, sources: list[str]) -> list[str]:
    """Greedy translations."""
    found = []
    for begin in range(0, len(sources), 64):
        batch = tokenizer(
            sources[begin : begin + 64], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        found += tokenizer.batch_decode(model.generate(**batch, max_new_tokens=LONGEST), skip_special_tokens=True)
    return found


if __name__ == "__main__":
    main()
