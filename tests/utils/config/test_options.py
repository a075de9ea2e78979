"""The command line's options: all of them are there, once."""

from __future__ import annotations

import pytest

from utils.config.options import GROUPS, OPTIONS

# The names of the options as the specification lists them.
COMMON = """
dataset root model epochs addition_augment workers iter-size batch_size val_batch_size lr lr_policy lr_decay
eta_min lr_fix_step lr_custom_step momentum weight_decay nesterov no_decay_small decay_small grad_clip
save_freq report_freq seed optimizer device-ids distributed world_size rank fp16 opt_level sync_bn wakeup
wakeup_epoch warmup warmup_epoch stable stable_epoch extra_epoch delay evaluate pretrained resume resume_file
weights_dir unresume_scope log_dir tensorboard verbose
distill_teacher distill_loss_alpha distill_loss_temperature distill_loss_type focal_gamma
focal_alpha case keyword mean std
"""
QUANTIZER = """
bit level half_range scale ratio correlate enable boundary quant_group adaptive grad_type grad_scale
"""
MODEL = """
num_classes input_size base width_alpha stem_kernel order policy padding_after_quant re_init proxquant_step
mixup_enable mixup_alpha label_smooth probe_list probe_index probe_iteration custom_decay_list custom_decay
custom_lr_list custom_lr fm_custom
"""
ELSEWHERE = ["amp_dtype", "amp_backend", "keyword_file", "list_keywords"]
SPECIFIED = [
    *COMMON.split(),
    *(f"{tag}_{name}" for tag in ("fm", "wt", "ot") for name in QUANTIZER.split()),
    *MODEL.split(),
    *ELSEWHERE,
]


@pytest.mark.parametrize("name", SPECIFIED)
def test_a_specified_option_is_declared(name: str) -> None:
    """Under its name, with underscores."""
    assert name.replace("-", "_") in OPTIONS


def test_no_option_is_declared_twice() -> None:
    """Neither its name nor another spelling of it."""
    options = [option for group in GROUPS.values() for option in group]
    spellings = [f"--{option.name}" for option in options] + [alias for o in options for alias in o.aliases]
    assert len(spellings) == len(set(spellings))
