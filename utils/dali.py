"""Image files in a folder per class, decoded by NVIDIA's DALI; imported only when `--dataset dali` is asked for.

The order, the crops and the flips are those of `utils.folder`: numbers are drawn here, DALI decodes, crops and
resizes by them, on the GPU where there is one and on the CPU where there is none.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray
from PIL import Image
from torch import Tensor

from utils.augment import centre_crop
from utils.folder import DECODE_ERRORS, ImageNames, Unreadable, crop_and_flip, decode, note, reason_of
from utils.loader import Delivery, Loader, Raw

FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "BMP",
    "TIFF",
    "WEBP",
    "PPM",
    "JPEG2000",
)  # Pillow's names of what DALI decodes
_AHEAD = 2  # batches that DALI has, and batches whose files are being read


class _File(NamedTuple):
    """An image file and what is to be done with it.

    Attributes:
        index: its number in the set.
        data: the file, uint8 [bytes].
        crop: top, left, height and width of what is decoded, in pixels, float32 [4].
        part: top, left, bottom and right of the part of it that fills the result, which may end within a
            pixel, float32 [4]; with left and right exchanged it is flipped.
    """

    index: int
    data: np.ndarray
    crop: np.ndarray
    part: np.ndarray


_Bad = tuple[int, str]  # the number of an image and why it cannot be read


class DaliLoader(Loader):
    """Batches of image files in a folder per class, decoded and cropped by DALI.

    Args:
        names: the images.
        delivery: how batches are cut and finished.
        size: height and width of the images of a batch, in pixels.
        workers: threads that decode on the CPU, and as many that read files; 0 is as 1.
        unreadable: takes note of images that cannot be decoded; a batch that lacks them is smaller.

    Raises:
        UserError: while iterating, when one image too many cannot be decoded; names its path.
    """

    def __init__(
        self, names: ImageNames, delivery: Delivery, *, size: int, workers: int, unreadable: Unreadable
    ) -> None:
        super().__init__(len(names), delivery)
        self._names = names
        self._target = torch.from_numpy(names.target)
        self._size = size
        self._threads = max(1, workers)
        self._unreadable = unreadable
        self._idle: Pipeline | None = None  # a pipeline without batches in it

    def _read(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Raw]:
        # Taken away for as long as it has batches: an iteration may be given up at any time.
        pipeline, self._idle = self._idle or self._pipeline(self._delivery.batch_size), None
        running: deque[list[_File]] = deque()
        readers = ThreadPoolExecutor(self._threads)
        try:
            batches_of_files = self._files(batches, epoch, readers)
            while True:
                while len(running) < _AHEAD and (files := next(batches_of_files, None)):
                    _feed(pipeline, files)
                    running.append(files)
                if not running:
                    break
                try:
                    images = self._take(pipeline, len(running[0]))
                except RuntimeError:
                    # DALI does not say which image it was, and its pipeline is of no use any more.
                    running[0] = self._without_bad(running[0])
                    pipeline = self._pipeline(self._delivery.batch_size)
                    for files in running:
                        _feed(pipeline, files)
                    images = self._take(pipeline, len(running[0]))
                index = torch.tensor([file.index for file in running.popleft()])
                yield Raw(images, self._target[index], index)
            self._idle = pipeline
        finally:
            readers.shutdown(cancel_futures=True)

    def _files(
        self, batches: Sequence[Tensor], epoch: int, readers: ThreadPoolExecutor
    ) -> Iterator[list[_File]]:
        """Read the files of these batches, some batches ahead."""
        waiting: deque[list[Future[_File | _Bad]]] = deque()
        remaining = iter(batches)
        while True:
            while len(waiting) < _AHEAD and (batch := next(remaining, None)) is not None:
                waiting.append([readers.submit(self._file, index, epoch) for index in batch.tolist()])
            if not waiting:
                return
            results = [future.result() for future in waiting.popleft()]
            files = [result for result in results if isinstance(result, _File)]
            bad = [result for result in results if not isinstance(result, _File)]
            note(self._unreadable, self._names, bad, left=len(files))
            yield files

    def _file(self, index: int, epoch: int) -> _File | _Bad:
        """Read a file, look at its header and draw the crop."""
        try:
            with open(self._names.path(index), "rb") as file:
                data = file.read()
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                # DALI fills what is missing at the end of a JPEG with grey; Pillow says that it is truncated.
                if image.format == "JPEG" and b"\xff\xd9" not in data[-1024:]:
                    image.load()
                if image.format not in FORMATS:
                    return index, f"DALI cannot decode {image.format}, --dataset imagenet can"
        except DECODE_ERRORS as error:
            return index, reason_of(error)
        if self._delivery.train:
            crop, flip = crop_and_flip(height, width, self._delivery.seed, epoch, index)
            part = (0, crop[3], crop[2], 0) if flip else (0, 0, crop[2], crop[3])
        else:
            crop = (0, 0, height, width)
            resized_height, resized_width, top, left = centre_crop(height, width, self._size)
            down, across = height / resized_height, width / resized_width
            bottom, right = top + self._size, left + self._size
            part = (top * down, left * across, bottom * down, right * across)
        crop, part = np.array(crop, np.float32), np.array(part, np.float32)
        return _File(index, np.frombuffer(data, np.uint8), crop, part)

    def _without_bad(self, files: list[_File]) -> list[_File]:
        """Leave out, and take note of, the images that DALI cannot decode, found one by one."""
        good, bad = [], []
        for file in files:
            pipeline = self._pipeline(1)
            _feed(pipeline, [file])
            try:
                self._take(pipeline, 1)
                good.append(file)
            except RuntimeError:
                bad.append((file.index, _why(file.data.tobytes())))
        note(self._unreadable, self._names, bad, left=len(good))
        return good

    def _pipeline(self, batch_size: int) -> Pipeline:
        """Make a pipeline from files to images, uint8 [S, S, 3]."""
        gpu = self._on_cuda
        pipeline = Pipeline(
            batch_size, self._threads, self._delivery.device.index or 0 if gpu else None,
            prefetch_queue_depth=1,  # with more the first run would wait for as many batches
        )  # fmt: skip
        with pipeline:
            data, crop, part = (fn.external_source(name=name) for name in ("data", "crop", "part"))
            image = fn.decoders.image_slice(
                data, crop[:2], crop[2:], axes=(0, 1), normalized_anchor=False, normalized_shape=False,
                device="mixed" if gpu else "cpu",  # mixed: from the CPU's memory to the GPU's, in hardware
                output_type=types.DALIImageType.RGB,
                adjust_orientation=False,  # nor does torchvision's loader
                jpeg_fancy_upsampling=True,  # on the GPU as on the CPU
            )  # fmt: skip
            pipeline.set_outputs(
                fn.resize(
                    image, size=(self._size, self._size), roi_start=part[:2], roi_end=part[2:], antialias=True,
                    interp_type=types.DALIInterpType.INTERP_LINEAR,
                )
            )  # fmt: skip
        pipeline.build()
        return pipeline

    def _take(self, pipeline: Pipeline, count: int) -> Tensor:
        """Return the images of the oldest batch in the pipeline, uint8 [count, 3, S, S]."""
        (output,) = pipeline.share_outputs()
        device = self._delivery.device
        images = torch.empty((count, self._size, self._size, 3), dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device) if self._on_cuda else None
        feed_ndarray(output.as_tensor(), images, cuda_stream=stream)
        if stream is not None:
            stream.synchronize()  # the copy is done before DALI gets its memory back
        pipeline.release_outputs()
        return images.permute(0, 3, 1, 2)


def _feed(pipeline: Pipeline, files: Sequence[_File]) -> None:
    """Let the pipeline start on a batch."""
    pipeline.feed_input("data", [file.data for file in files])
    pipeline.feed_input("crop", [file.crop for file in files])
    pipeline.feed_input("part", [file.part for file in files])
    pipeline.schedule_run()


def _why(data: bytes) -> str:
    """Return why a file that DALI refuses cannot be decoded, as the other decoders see it."""
    try:
        decode(data)
    except DECODE_ERRORS as error:
        return reason_of(error)
    return "DALI cannot decode it, --dataset imagenet can"
