"""The columns of a metrics file."""

from __future__ import annotations

FIELDS = (
    *("epoch", "lr", "train_loss", "train_top1", "train_top5"),
    *("val_loss", "val_top1", "val_top5", "seconds", "images_per_second"),
)
