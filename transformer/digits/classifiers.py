"""Three classifiers of scikit-learn's digits on the same split: the Vision Transformer, and two of scikit-learn's own.

The set has 1,797 images of 8 x 8 pixels with values 0 to 16 (Alpaydin & Kaynak 1998); a third, with the same share of each
digit, is held out and takes no part in training nor in the choice of a step to stop at.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..optional import optional_module
from ..vision import VisionTransformer

EXTRA = "vision"
SEED = 0  # of the split, the weights and the order of images
PATCH_SIZE = 2
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 50, 64, 3e-3, 0.05, 0.1
WARMUP = 0.1  # the part of the steps in which the learning rate rises


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) float32 in [0, 1] and labels (N,) int64, to train on and held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


@dataclass(frozen=True)
class Result:
    """What a classifier takes the held-out images for (N,), and what it took to get there."""

    predicted: Tensor
    parameters: int
    seconds: float  # of training

    def accuracy(self, digits: Digits) -> float:
        return (self.predicted == digits.held_out_labels).double().mean().item()


def load_digits() -> Digits:
    """The set that comes with scikit-learn. MissingModuleError."""
    bundled = optional_module("sklearn.datasets", EXTRA).load_digits()
    split = optional_module("sklearn.model_selection", EXTRA).train_test_split
    images = torch.as_tensor(bundled.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(bundled.target, dtype=torch.int64)
    train, held_out = map(torch.as_tensor, split(range(len(labels)), test_size=1 / 3, stratify=labels, random_state=SEED))
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def train_transformer(digits: Digits, device: torch.device, epochs: int = EPOCHS) -> tuple[VisionTransformer, Result]:
    """Cross entropy with AdamW, its learning rate warmed up and then brought down to 0 (one cycle); a progress bar on stderr."""
    torch.manual_seed(SEED)
    height, width = digits.images.shape[2:]
    model = VisionTransformer((height, width), PATCH_SIZE, 10, channels=1, d_model=64, num_heads=4, num_layers=3, dim_feedforward=128)
    model.to(device)
    images, labels = digits.images.to(device), digits.labels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=device.type in ("cpu", "cuda"))
    steps = epochs * -(-len(labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARMUP)
    start = time.monotonic()
    with _progress_bar(epochs) as bar:
        for _ in bar:
            for batch in torch.randperm(len(labels)).to(device).split(BATCH_SIZE):
                loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    seconds = time.monotonic() - start
    model.eval()
    with torch.no_grad():
        predicted = model(digits.held_out_images.to(device)).argmax(-1).cpu()
    return model, Result(predicted, sum(parameter.numel() for parameter in model.parameters()), seconds)


def train_logistic_regression(digits: Digits) -> Result:
    return _train_scikit_learns(optional_module("sklearn.linear_model", EXTRA).LogisticRegression(max_iter=1000), digits)


def train_mlp(digits: Digits) -> Result:
    """One hidden layer of 100, trained until its loss no longer falls: scikit-learn's defaults."""
    return _train_scikit_learns(optional_module("sklearn.neural_network", EXTRA).MLPClassifier(max_iter=1000, random_state=SEED), digits)


def _train_scikit_learns(classifier: Any, digits: Digits) -> Result:
    start = time.monotonic()
    # Its matrices are so small that a second thread costs more than it helps: many times as much where a core is busy.
    with optional_module("threadpoolctl", EXTRA).threadpool_limits(1):
        classifier.fit(digits.images.flatten(1).numpy(), digits.labels.numpy())
    seconds = time.monotonic() - start
    predicted = torch.as_tensor(classifier.predict(digits.held_out_images.flatten(1).numpy()))
    arrays = [classifier.coef_, classifier.intercept_] if hasattr(classifier, "coef_") else [*classifier.coefs_, *classifier.intercepts_]
    return Result(predicted, sum(array.size for array in arrays), seconds)


def _progress_bar(epochs: int) -> Any:
    # In a log file every refresh is a line of its own.
    interval = 0.5 if sys.stderr.isatty() else 5.0
    return optional_module("tqdm", EXTRA).tqdm(
        range(epochs), desc="training", unit="epoch", dynamic_ncols=True, mininterval=interval, miniters=0
    )
