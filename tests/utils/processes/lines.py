"""Command lines of small trainings of several processes."""

from __future__ import annotations

LINE = (
    "--model tiny --keyword_file network.py --dataset fake --keyword cifar10,dorefa,lsq --input_size 8 -v 7 "
    "--fake_size 100 --epochs 3 --lr 0.05 --lr_policy sgdr --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 "
    "--sync_bn --stable 5 -s 1"
)
FILES = LINE.replace(
    "--dataset fake --keyword cifar10,", "--root images --num_classes 3 --keyword imagenet,"
).replace("--fake_size 100 --epochs 3", "--epochs 1")  # 72 images for training and 15 for validation
