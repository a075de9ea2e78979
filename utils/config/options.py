"""Every command-line option, declared once as a frozen record; `utils.config.command_line` has the parser.

Nothing heavy is imported here: `python main.py --help` answers at once, and a mistake is found before
torch is loaded. Options with several words may be written with `_` or `-`.
"""

from __future__ import annotations

from utils.config.image_size import input_size
from utils.config.option import Option, dataset, floats, integer, integers, keywords, loss_type, option, words
from utils.config.quantizer_options import LAYERS, quantizer_options
from utils.config.schema import COMPILES, KERNELS, LAYOUTS, RANGE_SEARCHES, TAGS, TRACKERS

COMMON: dict[str, tuple[Option, ...]] = {
    "data": (
        option(
            "dataset",
            dataset,
            None,
            "data set; folder: images of your own, as imagenet; default: the keyword's, else digits",
            choices=(
                "digits",
                "glyphs",
                "cifar10",
                "cifar100",
                "imagenet",
                "folder",
                "shards",
                "dali",
                "fake",
            ),
        ),
        option(
            "root",
            str,
            None,
            "folder of the data set (imagenet, folder: holds train/ and val/; shards: or a URL)",
        ),
        option("batch_size", int, 128, "images per iteration", aliases=("-b",)),
        option(
            "val_batch_size",
            int,
            None,
            "images per validation step; 0: no validation; default: batch_size",
            aliases=("-v",),
        ),
        option(
            "balanced_sampler",
            bool,
            False,
            "draw training images so that all classes are seen equally often",
        ),
        option(
            "val_split",
            float,
            0.0,
            "of a folder or shards without val: share of each class's images that is for validation; 0: none",
        ),
        option("workers", int, 2, "processes that decode images", aliases=("-j",)),
        option("addition_augment", bool, False, "colour jitter and PCA lighting", aliases=("--aa",)),
        option("rand_augment", int, None, "RandAugment's magnitude, 0 to 30; default: none"),
        option("skip_corrupt", int, 0, "image files that may be left out because they cannot be read"),
        option(
            "max_value",
            int,
            None,
            "value of 16-bit PNG and TIFF files that becomes white; default: the largest one of the training images",
        ),
        option(
            "ignore_orientation",
            bool,
            False,
            "JPEG, PNG and WebP files as they are stored, not turned upright as EXIF says: for older runs",
        ),
        option("mean", floats, None, "mean per channel, of images in [0, 1]; default: the data set's"),
        option("std", floats, None, "standard deviation per channel; default: the data set's"),
        option(
            "fonts", str, None, "folder of .ttf and .otf files for the data set glyphs; default: matplotlib's"
        ),
        option("fake_size", int, 256, "training images of the data set fake"),
    ),
    "optimizer": (
        option("optimizer", str, "SGD", "SGD or ADAM"),
        option("lr", float, 0.1, "base learning rate", aliases=("--learning_rate",)),
        option("momentum", float, 0.9, "SGD's momentum"),
        option("nesterov", bool, False, "Nesterov's momentum"),
        option("weight_decay", float, 1e-4, "weight decay", aliases=("--wd",)),
        option("decay_small", bool, False, "weight decay for one-dimensional and depth-wise weights too"),
        option("no_decay_small", bool, False, "takes a --decay_small before it back", undoes="decay_small"),
        option("custom_decay_list", words, (), "parameters whose name contains one of these words ..."),
        option("custom_decay", float, 0.02, "... have this weight decay"),
        option("custom_lr_list", words, (), "parameters whose name contains one of these words ..."),
        option("custom_lr", float, 1e-5, "... have this base learning rate"),
        option("grad_clip", float, None, "largest norm of the gradient; default: no clipping"),
        option("iter_size", int, 1, "forward and backward passes per optimizer step"),
    ),
    "schedule": (
        option("epochs", int, 10, "epochs of the schedule"),
        option("extra_epoch", int, 0, "epochs after the schedule, at its last rate"),
        option(
            "lr_policy", str, "custom_step", "custom_step, fix_step, decay, fix, poly, sgdr, sgdr_step or cos"
        ),
        option("lr_decay", float, 0.1, "factor of the step policies and of decay; the power of poly"),
        option("eta_min", float, 0.0, "lowest learning rate of poly, sgdr and cos"),
        option("lr_fix_step", int, 30, "fix_step: epochs between two decays"),
        option("lr_custom_step", integers, (), "epochs of custom_step's decays and of sgdr's restarts"),
        option("wakeup", int, 0, "learning-rate warm-up: iterations of a linear rise from zero"),
        option("wakeup_epoch", int, 0, "the same in epochs; the longer of the two counts"),
        option(
            "warmup",
            int,
            0,
            "first iterations without an optimizer step; the learning-rate warm-up is wakeup",
        ),
        option("warmup_epoch", int, 0, "the same in epochs; the longer of the two counts"),
    ),
    "precision": (
        option("fp16", bool, False, "train in half precision, as opt_level says"),
        option(
            "opt_level",
            str,
            None,
            "O0: float32; O1: autocast; O2: half weights, float32 norms and master weights; O3: all half [O1]",
            choices=("O0", "O1", "O2", "O3"),
        ),
        option(
            "amp_dtype",
            str,
            None,
            "the half precision; gradients of float16 are scaled [bfloat16]",
            choices=("bfloat16", "float16"),
        ),
        option(
            "amp_backend",
            str,
            None,
            "torch; apex is refused, since its amp is gone [torch]",
            choices=("torch", "apex"),
        ),
        option("tf32", bool, False, "let NVIDIA GPUs multiply float32 in TF32, faster and less exact"),
        option(
            "memory_format", str, "channels_last", "order of an image's numbers in memory", choices=LAYOUTS
        ),
        option("compile", str, "none", "mode of torch.compile; first steps take minutes", choices=COMPILES),
        option("kernels", str, "eager", "of quantizers; compiled: by torch.compile", choices=KERNELS),
        option(
            "recompute", bool, False, "keep no quantized inputs for the backward pass: less memory, slower"
        ),
    ),
    "devices": (
        option(
            "device_ids",
            integers,
            None,
            "GPUs, a process each; default: 0, the first one, or the CPU where there is none",
            aliases=("-g",),
            many=True,
        ),
        option(
            "distributed", bool, False, "join the processes of world_size and rank; torchrun needs no option"
        ),
        option("world_size", int, None, "number of processes; default: the variable WORLD_SIZE"),
        option("rank", int, None, "number of this process, from 0; default: the variable RANK"),
        option("sync_bn", bool, False, "batch statistics over the images of all processes"),
    ),
    "run": (
        option("case", str, "default", "name of the run: of its checkpoints and its folder in log_dir"),
        option("seed", int, 0, "seed of everything random"),
        option(
            "evaluate",
            bool,
            False,
            "validate only; writes the log, and predictions, mistakes and more to log_dir/CASE; train/ may be missing",
            aliases=("-e",),
        ),
        option(
            "reference",
            str,
            None,
            "with -e: another checkpoint, such as that in full precision; images that change their class are listed",
            unset=("none", ""),
        ),
        option(
            "audit", bool, False, "check on real data that every quantizer quantizes (always after training)"
        ),
        option(
            "dry_run",
            bool,
            False,
            "print what would be trained and estimate the time of a step; --verbose: everything",
        ),
        option(
            "bn_batches",
            int,
            0,
            "training batches that batch norms' statistics are computed from anew before validation; 0: none",
        ),
        option("delay", float, 0.0, "seconds to wait in each iteration"),
    ),
    "checkpoints and logs": (
        option("pretrained", str, None, "file of weights to start from; torchvision, timm: theirs; or none"),
        option("resume", bool, False, "continue the case from its newest whole checkpoint", aliases=("-r",)),
        option("resume_file", str, None, "continue from this checkpoint"),
        option(
            "unresume_scope",
            words,
            (),
            "layers or parameters that --pretrained leaves alone: whole names or patterns, or none",
            unset=(("none",),),
        ),
        option("weights_dir", str, "weights", "folder of the checkpoints"),
        option("log_dir", str, "exp", "folder of logs, metrics and TensorBoard files"),
        option(
            "save_freq",
            int,
            0,
            "epochs between checkpoints that are kept; 0: the latest and the best only",
            aliases=("-s",),
            unset=(-1,),
        ),
        option(
            "save_every", int, 0, "iterations between saves of the latest checkpoint; 0: after epochs only"
        ),
        option("keep", int, 2, "how many of the latest checkpoints stay: the latest and those before it"),
        option("report_freq", integer, 50, "iterations between two lines of the log"),
        option("tensorboard", bool, False, "write TensorBoard files"),
        option(
            "track",
            str,
            None,
            "send configuration, metrics and files to MLflow or Weights & Biases; see docs/tracking.md",
            choices=TRACKERS,
            unset=("none",),
        ),
        option(
            "verbose",
            bool,
            False,
            "log parameter groups and the details of loading; all that a dry run has checked",
        ),
    ),
    "loss": (
        option("label_smooth", float, None, "label smoothing; default: 0, with the keyword label-smooth 0.1"),
        option(
            "class_weights",
            str,
            None,
            "weights of the classes in the loss: balanced, or a CSV file with the lines class,weight; see docs/data.md",
            unset=("none", ""),
        ),
        option("focal_gamma", float, 0.0, "focal loss: exponent of 1 - p of the class; 0: cross-entropy"),
        option("focal_alpha", float, 1.0, "focal loss: factor on all of it", unset=(-1.0,)),
        option("distill_teacher", str, None, "distillation: the teacher, as --model, or none", unset=("",)),
        option(
            "distill_keyword",
            keywords,
            None,
            "the teacher's keywords; default: the network's without quantizers",
        ),
        option("distill_width_alpha", float, None, "the teacher's width; default: the network's width_alpha"),
        option(
            "distill_pretrained",
            str,
            None,
            "the teacher's checkpoint: a path, or a name in weights_dir/TEACHER",
        ),
        option("distill_loss_alpha", float, 0.5, "share of the distillation loss, the labels' is the rest"),
        option("distill_loss_temperature", float, 4.0, "temperature of the soft labels"),
        option(
            "distill_loss_type",
            loss_type,
            "kl",
            "kl: divergence of soft labels; mse: squared error of logits",
            choices=("kl", "mse"),
        ),
        option("quant_loss", float, 0.0, "factor on the relative quantization error of the weights"),
        option("dampen", float, 0.0, "factor on the dampening of oscillating weights at the end of training"),
    ),
    "weights": (
        option("ema_decay", float, 0.0, "decay of averaged weights, evaluated beside the network; 0: none"),
        option("ema_weights", bool, False, "take the averaged weights of the --pretrained checkpoint"),
        option(
            "freeze_threshold",
            floats,
            (),
            "freeze weights that oscillate more often in a step; two: from, to, along a cosine",
        ),
        option("freeze_momentum", float, 0.01, "momentum of the frequencies of oscillation"),
    ),
}


MODEL: dict[str, tuple[Option, ...]] = {
    "model": (
        option("model", str, "resnet20", "network", aliases=("-m", "--arch")),
        option("keyword", keywords, (), "comma-separated keywords, see --list_keywords"),
        option(
            "bits",
            str,
            None,
            "quantize weights and activations to these bits: 2, ternary, or weights/activations like 2/4; 32: full "
            "precision, also behind a config with other bits; for xx_enable, xx_bit and xx_level together",
        ),
        option("keyword_file", str, None, "Python file that registers more keywords"),
        option("list_keywords", bool, False, "print every keyword and exit"),
        option(
            "num_classes",
            int,
            None,
            "classes; default: the number of class folders, or the data set keyword's",
        ),
        option(
            "input_size",
            input_size,
            None,
            "pixels of the images, height and width: 224 or 96x160; default: the keyword's",
        ),
        option("channels", integer, 3, "of the images that the network gets: 3, or 1: colours become grey"),
        option("width_alpha", float, 1.0, "factor on the network's width (64 channels in the first stage)"),
        option("base", int, 1, "parallel branches of a block (Group-Net)"),
        option("stem_kernel", int, None, "kernel of the TResNet stems, 1 or 3; default: 1"),
        option(
            "order",
            str,
            None,
            "keyword ReShapeResolution: its layers, of c, b and a; default: cba",
            unset=("none",),
        ),
        option("padding_after_quant", bool, False, "quantize first and pad with exact zeros"),
        option(
            "re_init",
            bool,
            False,
            "initialise the quantizers from the loaded weights and one batch, before training",
        ),
        option(
            "re_init_missing",
            bool,
            False,
            "--re_init, but quantizers that --pretrained holds keep what they have learned, as in a second step",
        ),
        option(
            "re_init_range",
            str,
            "paper",
            "how re_init finds clip values: LSQ's formula, least squared error, or a percentile of |x|",
            choices=RANGE_SEARCHES,
        ),
        option("re_init_percentile", float, 99.9, "the percentile, percent"),
        option(
            "stable",
            int,
            0,
            "range calibration: first training iterations, in full precision, that set the clip values",
        ),
        option("stable_epoch", int, 0, "the same in epochs; the longer of the two counts"),
    ),
    "bits of single layers": LAYERS,
    **{f"{what} quantizer": quantizer_options(tag, what) for tag, what in TAGS.items()},
    "steering": (
        option(
            "policy",
            str,
            None,
            "YAML file that changes quantizers and training options as the run goes; see docs/policies.md",
        ),
        option(
            "full_precision",
            words,
            (),
            "layers whose quantizers are switched off: patterns of whole names with commas, like layer3.2.*; "
            "or none",
            unset=(("none",),),
        ),
        option(
            "proxquant_step",
            int,
            1000,
            "keyword proxquant: training iterations until all is quantized",
            aliases=("--ps",),
        ),
        option("mixup_enable", bool, False, "Mixup: train on mixtures of two images"),
        option("mixup_alpha", float, 0.2, "parameter of Mixup's beta distribution"),
        option("cutmix_enable", bool, False, "CutMix: paste a part of another image"),
        option("cutmix_alpha", float, 1.0, "parameter of CutMix's beta distribution"),
        option(
            "probe_list",
            words,
            (),
            "layers whose tensors are written to log_dir/CASE/probe, by name or pattern [every quantized layer]",
            unset=((),),
        ),
        option("probe_index", integers, (0,), "images of the batch that are kept of them", many=True),
        option(
            "probe_iteration", integers, (), "iterations of the run, from 0, at which [first, middle, last]"
        ),
    ),
}

OLDER: dict[str, tuple[Option, ...]] = {
    "older configs (taken, with a warning, and without effect)": (
        *(
            option(f"{tag}_separator", float, None, f"of {what} quantizers that are not here")
            for tag, what in TAGS.items()
        ),
        option("ot_independent_parameter", bool, False, "of output quantizers that are not here"),
        option("block_alpha", float, None, "of networks that are not here"),
        option("se_reduction", int, None, "of networks that are not here"),
        option("repvgg_block", str, None, "of networks that are not here", unset=("",)),
        option("wakeup_lr", float, None, "of a warm-up that does not begin at zero, which is not here"),
    ),
}

GROUPS = {**MODEL, **COMMON, **OLDER}
OPTIONS: dict[str, Option] = {option.name: option for group in GROUPS.values() for option in group}
