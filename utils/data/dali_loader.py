"""Image files in a folder per class, decoded by NVIDIA's DALI; imported only when `--dataset dali` is asked for.

The order, the crops and the flips are those of `utils.data.folder_loader`: numbers are drawn here, and DALI decodes
and crops by them. On the GPU it also resizes and flips. On the CPU its resizing takes longer than decoding, so that
torchvision resizes there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray
from nvidia.dali.tensors import TensorCPU
from PIL import Image
from torch import Tensor

from utils.config.image_size import InputSize, sides
from utils.data.crop import centre_crop, crop_and_flip, put, resize, resize_to_centre
from utils.data.image_file import (
    DECODE_ERRORS,
    PLAIN,
    Decoding,
    dali_decodes_alike,
    decode,
    not_for_dali,
    parse,
    reason_of,
    stored_size,
)
from utils.data.image_folder import Unreadable, note
from utils.data.images import Images
from utils.data.loader import Delivery, Loader, Raw
from utils.data.orientation import TURNS, Turn

_AHEAD = 2  # batches queued in DALI, and batches whose files are being read


class _File(NamedTuple):
    """An image file, its crop and its flip.

    Attributes:
        index: its number in the epoch.
        image: its number in the set.
        data: the file, uint8 [bytes].
        crop: top, left, height and width of the part to decode, in pixels of the stored image, float32 [4].
        turn: turns it upright.
        flip: whether it is then flipped left to right.
    """

    index: int
    image: int
    data: np.ndarray
    crop: np.ndarray
    turn: Turn
    flip: bool


class _Undecodable(RuntimeError):
    """DALI could not decode one of a batch's images."""


_Bad = tuple[int, str]  # the number of an image and why it cannot be read


class DaliLoader(Loader):
    """Batches of image files in a folder per class, decoded and cropped by DALI.

    Args:
        images: where they lie.
        delivery: how batches are cut and finished.
        size: of the images of a batch.
        workers: number of threads that decode on the CPU, and of threads that read files and resize; at most one per
            image of a batch; 0 counts as 1.
        unreadable: records images that cannot be decoded. Their batch is smaller; a validation batch without any other
            images is left out.
        decoding: what decoding does with the pixels.

    Raises:
        UserError: while iterating, when more images than allowed cannot be decoded; names the path.
    """

    def __init__(
        self,
        images: Images,
        delivery: Delivery,
        *,
        size: InputSize,
        workers: int,
        unreadable: Unreadable,
        decoding: Decoding = PLAIN,
    ) -> None:
        super().__init__(torch.from_numpy(images.target), delivery)
        self._images = images
        self._size = sides(size)
        self._threads = max(1, min(workers, delivery.batch_size))
        self._unreadable = unreadable
        self._decoding = decoding
        self._idle: Pipeline | None = None  # a pipeline without batches in it

    def identity(self) -> dict[str, str]:
        """As in `Loader`; with the classes and the names of the files."""
        return super().identity() | self._images.identity()

    def name(self, number: int) -> str:
        """Where an image lies."""
        return self._images.name(number)

    def _read(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Raw]:
        # `_idle` is None while the pipeline has batches in it: an iteration may be abandoned at any time.
        pipeline, self._idle = self._idle or self._pipeline(self._delivery.batch_size), None
        running: deque[list[_File]] = deque()
        threads = ThreadPoolExecutor(self._threads)
        try:
            batches_of_files = self._files(batches, epoch, threads)
            while True:
                while len(running) < _AHEAD and (files := next(batches_of_files, None)):
                    self._feed(pipeline, files)
                    running.append(files)
                if not running:
                    break
                try:
                    images = self._take(pipeline, running[0], threads)
                except DECODE_ERRORS:
                    # DALI does not say which image it was, and its pipeline cannot be used again.
                    left = self._without_bad(running.popleft(), threads)
                    if left:
                        running.appendleft(left)
                    pipeline = self._pipeline(self._delivery.batch_size)
                    for files in running:
                        self._feed(pipeline, files)
                    if not left:  # in validation only
                        continue
                    images = self._take(pipeline, running[0], threads)
                files = running.popleft()
                target = self.target[torch.tensor([file.image for file in files])]
                yield Raw(images, target, torch.tensor([file.index for file in files]))
            self._idle = pipeline
        finally:
            threads.shutdown(cancel_futures=True)

    def _files(
        self, batches: Sequence[Tensor], epoch: int, threads: ThreadPoolExecutor
    ) -> Iterator[list[_File]]:
        """Read the files of these batches, some batches ahead."""
        waiting: deque[list[Future[_File | _Bad]]] = deque()
        remaining = iter(batches)
        while True:
            while len(waiting) < _AHEAD and (batch := next(remaining, None)) is not None:
                pairs = zip(batch.tolist(), self.drawn(batch, epoch).tolist(), strict=True)
                waiting.append([threads.submit(self._file, index, image, epoch) for index, image in pairs])
            if not waiting:
                return
            results = [future.result() for future in waiting.popleft()]
            files = [result for result in results if isinstance(result, _File)]
            bad = [result for result in results if not isinstance(result, _File)]
            note(self._unreadable, self._images, bad, left=len(files), train=self._delivery.train)
            if files:  # empty in validation only
                yield files

    def _file(self, index: int, number: int, epoch: int) -> _File | _Bad:
        """Read a file by its number in the set, look at its header and draw the crop by its number in the epoch."""
        try:
            data = self._images.read(number)
            with parse(data) as image:
                turn = TURNS[self._decoding.orientation(image, data)]
                width, height = stored_size(image)[:: -1 if turn.transpose else 1]
                if what := not_for_dali(image):
                    image.load()
                    return number, f"DALI cannot decode {what}, --dataset imagenet can"
                if not dali_decodes_alike(image, data):
                    decoded = decode(data, self._decoding)
                    data, turn, (width, height) = _ppm(decoded), TURNS[1], decoded.size
                # DALI fills the missing end of a JPEG with grey; Pillow reports that it is truncated.
                if image.format in ("JPEG", "MPO") and b"\xff\xd9" not in data[-1024:]:
                    image.load()
        except DECODE_ERRORS as error:
            return number, reason_of(error)
        (top, left, high, wide), flip = (0, 0, height, width), False
        if self._delivery.train:
            (top, left, high, wide), flip = crop_and_flip(
                height, width, self._size, self._delivery.seed, epoch, index
            )
        edges = np.reshape(turn.stored((top, left, top + high, left + wide), height, width), (2, 2))
        first, last = edges.min(0), edges.max(0)
        crop = np.concatenate([first, last - first]).astype(np.float32)
        return _File(index, number, np.frombuffer(data, np.uint8), crop, turn, flip)

    def _without_bad(self, files: list[_File], threads: ThreadPoolExecutor) -> list[_File]:
        """Try the files one by one; record and leave out images that cannot be decoded or resized."""
        good, bad = [], []
        for file in files:
            pipeline = self._pipeline(1)
            self._feed(pipeline, [file])
            try:
                self._take(pipeline, [file], threads)
                good.append(file)
            except _Undecodable:
                bad.append((file.image, _why(file.data.tobytes())))
            except DECODE_ERRORS as error:
                bad.append((file.image, reason_of(error)))
        note(self._unreadable, self._images, bad, left=len(good), train=self._delivery.train)
        return good

    def _pipeline(self, batch_size: int) -> Pipeline:
        """Make a pipeline that decodes files to crops, and on the GPU resizes these to images, uint8 [H, W, 3]."""
        gpu = self._on_cuda
        pipeline = Pipeline(
            batch_size, self._threads, self._delivery.device.index or 0 if gpu else None,
            prefetch_queue_depth=1,  # with more the first run would wait for as many batches
        )  # fmt: skip
        with pipeline:
            data, crop = (fn.external_source(name=name) for name in ("data", "crop"))
            image = fn.decoders.image_slice(
                data, crop[:2], crop[2:], axes=(0, 1), normalized_anchor=False, normalized_shape=False,
                device="mixed" if gpu else "cpu",  # mixed: from the CPU's memory to the GPU's, in hardware
                output_type=types.DALIImageType.RGB,
                adjust_orientation=False,  # images are turned here, as Pillow reads EXIF
                jpeg_fancy_upsampling=True,  # on the GPU as on the CPU
            )  # fmt: skip
            if gpu:
                part, size = (fn.external_source(name=name) for name in ("part", "size"))
                image = fn.resize(
                    image, size=size, roi_start=part[:2], roi_end=part[2:], antialias=True,
                    interp_type=types.DALIInterpType.INTERP_LINEAR,
                )  # fmt: skip
                # Flat, since those that are to be transposed may have another shape.
                image = fn.reshape(image, shape=[-1])  # pyright: ignore[reportCallIssue, reportArgumentType]
            pipeline.set_outputs(image)
        pipeline.build()
        return pipeline

    def _feed(self, pipeline: Pipeline, files: Sequence[_File]) -> None:
        """Feed a batch to the pipeline and start it."""
        pipeline.feed_input("data", [file.data for file in files])
        pipeline.feed_input("crop", [file.crop for file in files])
        if self._on_cuda:
            pipeline.feed_input("part", [self._part(file) for file in files])
            pipeline.feed_input("size", [self._stored_size(file) for file in files])
        pipeline.schedule_run()

    def _part(self, file: _File) -> np.ndarray:
        """Return top, left, bottom and right of the part of a stored crop that fills the result, float32 [4].

        Its edges may lie within a pixel. Opposite edges are exchanged for a flip.
        """
        height, width = file.crop[2:].tolist()[:: -1 if file.turn.transpose else 1]
        if self._delivery.train:
            part = (0, width, height, 0) if file.flip else (0, 0, height, width)
        else:
            resized_height, resized_width, top, left = centre_crop(height, width, self._size)
            down, across = height / resized_height, width / resized_width
            bottom, right = top + self._size[0], left + self._size[1]
            part = (top * down, left * across, bottom * down, right * across)
        return np.array(file.turn.stored(part, height, width), np.float32)

    def _stored_size(self, file: _File) -> np.ndarray:
        """Return height and width of the result before it is transposed, float32 [2]."""
        return np.array(self._size[:: -1 if file.turn.transpose else 1], np.float32)

    def _take(self, pipeline: Pipeline, files: Sequence[_File], threads: ThreadPoolExecutor) -> Tensor:
        """Return the images of the oldest batch in the pipeline, uint8 [N, 3, H, W]."""
        try:
            (output,) = pipeline.share_outputs()
        except RuntimeError as error:
            raise _Undecodable from error
        device = self._delivery.device
        images = torch.empty((len(files), *self._size, 3), dtype=torch.uint8, device=device)
        if self._on_cuda:
            stream = torch.cuda.current_stream(device)
            feed_ndarray(output.as_tensor(), images.view(len(files), -1), cuda_stream=stream)
            for image, file in zip(images, files, strict=True):
                if file.turn.transpose:
                    stored = self._stored_size(file).astype(int).tolist()
                    image.copy_(image.reshape(*stored, 3).transpose(0, 1).clone())
            stream.synchronize()  # the copy is done before DALI gets its memory back
        else:
            list(threads.map(self._resize, output, files, images))
        pipeline.release_outputs()
        return images.permute(0, 3, 1, 2)

    def _resize(self, crop: TensorCPU, file: _File, to: Tensor) -> None:
        """Resize and flip a crop that DALI has decoded into `to`, uint8 [H, W, 3]."""
        size, pixels = self._size, file.turn.upright(torch.from_dlpack(crop))
        image = resize(pixels, *size) if self._delivery.train else resize_to_centre(pixels, size)
        put(image, to, flip=file.flip)


def _ppm(image: Image.Image) -> bytes:
    """Return the pixels of an RGB image as a file that any decoder reads without a loss."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


def _why(data: bytes) -> str:
    """Return the reason why DALI refused a file, as Pillow reports it."""
    try:
        decode(data)
    except DECODE_ERRORS as error:
        return reason_of(error)
    return "DALI cannot decode it, --dataset imagenet can"
