"""`fused-attention demo --task digits`: a Vision Transformer on handwritten digits, from nothing to a report, in a minute.

1. Say what the machine is. 2. Train it and two classifiers of scikit-learn on the same images. 3. Compare them on the images
held out. 4. Draw where the class token looks. 5. Write digits.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..optional import optional_module
from ..translation import report
from ..translation.machine import choose_device, machine_facts, machine_report
from ..translation.output_files import atomic_write, claim_output_folder
from ..translation.terminal import heartbeat
from ..vision import VisionTransformer
from . import classifiers
from .classifiers import EXTRA, Digits, Result
from .pictures import attention_over

REPORT_NAME = "digits.html"
EXAMPLES_OF_EACH = 2
OURS = "Vision Transformer"


def run_demo(folder: Path, *, overwrite: bool = False, device: str = "auto", epochs: int = classifiers.EPOCHS) -> Path:
    """Run the demonstration and return the path of the report.

    Raises MissingModuleError without the extra `vision`, FileExistsError if the report is there and `overwrite` is False.
    """
    for name in ("sklearn", "tqdm"):
        optional_module(name, EXTRA)
    chosen = choose_device(device)
    claim_output_folder(folder, (REPORT_NAME,), overwrite=overwrite)
    print(machine_report(), flush=True)

    with heartbeat("loading scikit-learn's digits"):
        digits = classifiers.load_digits()
    print(f"\n{len(digits.labels):,} images of 8 x 8 pixels to train on, {len(digits.held_out_labels)} held out", flush=True)
    results = {}
    for name, train in {"logistic regression": classifiers.train_logistic_regression, "MLP": classifiers.train_mlp}.items():
        with heartbeat(f"training the {name}"):
            results[name] = train(digits)
    model, results[OURS] = classifiers.train_transformer(digits, chosen, epochs)
    for name, line in comparison(results, digits).items():
        print(f"  {name:<20} {line}")

    path = folder / REPORT_NAME
    with heartbeat("writing the report"):
        atomic_write(path, digits_report(model, digits, results, chosen, epochs).encode())
    print(f"\nreport: {path}")
    return path


def comparison(results: dict[str, Result], digits: Digits) -> dict[str, str]:
    """Classifier -> how it did, in one line."""
    count = len(digits.held_out_labels)
    return {
        name: f"{result.accuracy(digits):.1%} of {count} images held out, {int((result.predicted != digits.held_out_labels).sum())} wrong; "
        f"{result.parameters:,} parameters, trained in {result.seconds:.1f} s"
        for name, result in results.items()
    }


def class_token_maps(model: VisionTransformer, images: Tensor) -> Tensor:
    """How much the class token looks at each patch of images (B, channels, height, width): (B, layers, H, rows, columns)."""
    maps = torch.stack(model.attention_maps(images), dim=1)  # (B, layers, H, 1 + patches, 1 + patches)
    return maps[:, :, :, 0, 1:].unflatten(-1, model.grid).cpu()


def digits_report(model: VisionTransformer, digits: Digits, results: dict[str, Result], device: torch.device, epochs: int) -> str:
    """The text of digits.html."""
    ours, labels = results[OURS], digits.held_out_labels
    wrong = (ours.predicted != labels).nonzero().flatten().tolist()
    examples = first_of_each(labels, EXAMPLES_OF_EACH)
    maps = class_token_maps(model, digits.held_out_images.to(device))
    num_layers, num_heads = maps.shape[1:3]
    config = model.config
    facts = {
        **machine_facts(),
        "model": f"{num_layers} layers, {config['d_model']} wide, {num_heads} heads, feed-forward {config['dim_feedforward']}, patches of "
        f"{model.patch_size[0]} x {model.patch_size[1]} pixels",
        "training": f"{epochs} epochs over {len(digits.labels):,} images, AdamW, learning rate {classifiers.LEARNING_RATE:g}, "
        f"batches of {classifiers.BATCH_SIZE}",
    }
    sections = [
        report.section(
            "Beside two others",
            "All three learn from the same images and are asked about the same images, a third of the set, that none has seen.",
            report.table(comparison(results, digits)),
        ),
        report.section(
            "Where it looks",
            "Two held-out images of each digit, chosen by position. The stronger the tint of a patch, the more the class token "
            "attends to it in the last layer (mean of its heads), relative to the patch with the most.",
            last_layer_gallery(examples, digits, ours, maps),
        ),
        report.section(
            "Every layer and head",
            "The class token's attention for the first of these images, a row for each layer.",
            heads_gallery(digits.held_out_images[examples[0], 0], maps[examples[0]]),
        ),
        report.section(
            "What it gets wrong", "Every held-out image that it reads as another digit.", last_layer_gallery(wrong, digits, ours, maps)
        ),
        report.section("The machine and the run", "What produced this page.", report.table(facts)),
    ]
    tiles = {
        "held-out images right": f"{ours.accuracy(digits):.1%}",
        "seconds of training": f"{ours.seconds:.0f}",
        "parameters": f"{ours.parameters:,}",
    }
    lead = "A Vision Transformer on fused attention, trained from nothing on the handwritten digits that come with scikit-learn."
    return report.page("A Transformer that reads digits", lead, tiles, sections)


def first_of_each(labels: Tensor, count: int) -> list[int]:
    """Indices of the first `count` of each digit, digit by digit."""
    return [index for digit in range(10) for index in (labels == digit).nonzero().flatten().tolist()[:count]]


def last_layer_gallery(indices: Sequence[int], digits: Digits, result: Result, maps: Tensor) -> str:
    """These held-out images, under the attention of the last layer, with what they are and what they are read as.

    maps: class_token_maps of all held-out images.
    """
    pictures = []
    for index in indices:
        label, predicted = int(digits.held_out_labels[index]), int(result.predicted[index])
        caption = f"{label}" if label == predicted else f"{label} read as {predicted}"
        pictures.append(report.Picture(caption, attention_over(digits.held_out_images[index, 0], maps[index, -1].mean(0))))
    return report.gallery(pictures)


def heads_gallery(image: Tensor, maps: Tensor) -> str:
    """image (height, width) under the attention of every head, maps (layers, H, rows, columns): a row for each layer."""
    pictures = []
    for layer, heads in enumerate(maps, 1):
        for head, attention in enumerate(heads, 1):
            pictures.append(report.Picture(f"layer {layer}, head {head}", attention_over(image, attention)))
    return report.gallery(pictures, columns=maps.shape[1])
