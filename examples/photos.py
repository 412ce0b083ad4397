"""Real photos to calibrate and evaluate on, read from installed packages; none are downloaded or committed.

* ``imagenet_photos``: the 20 ImageNet photos inside foolbox's wheel, with labels: the calibration set.
* ``cutouts``: photos cut out of their background, from Debian's ``tuxpaint-stamps-default``, with the
  ImageNet classes that count as right: the evaluation set, of other origin than the calibration set.
* ``crops``: what is left to evaluate on where the stamps are not installed. No labels.
* ``evaluation_set``: the cutouts where they are installed, else the crops, and says which.

Images are uint8 RGB tensors of shape (size, size, 3), as the ``preprocess`` of ``examples.zoo`` takes them.
Everything here is deterministic. Needs Pillow.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from examples.zoo import MissingPackageError, package_file

STAMPS_DIRECTORY = Path("/usr/share/tuxpaint/stamps")
STAMPS_INSTALL = "apt-get install tuxpaint-stamps-default (Debian, Ubuntu)"
STAMPS_CLASSES = Path(__file__).with_name("stamps_dev.json")

_FOOLBOX_INSTALL = "pip install --no-deps foolbox==3.3.4"
_SKIMAGE_INSTALL = "pip install scikit-image"
# The photographs among scikit-image's pictures; the rest are drawings, masks, scans and micrographs.
_SKIMAGE_PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "motorcycle_left.png",
    "rocket.jpg",
)


@dataclass(frozen=True)
class EvaluationSet:
    """Images to compare a quantized network with the float network on.

    Attributes:
        name: ``cutouts``, ``crops-skimage`` or ``crops-calibration-photos``.
        description: One sentence on what the images are, to print next to a result.
        independent: Whether none of the images shows a photo of the calibration set.
        images: uint8 RGB tensors, (size, size, 3).
        labels: For each image the ImageNet classes that count as right; None where nobody has labelled them.
    """

    name: str
    description: str
    independent: bool
    images: list[Tensor]
    labels: list[tuple[int, ...]] | None

    def top1(self, logits: Tensor) -> float | None:
        """Share of the images whose top class counts as right.

        None for a set without labels, and for outputs that are not ImageNet's 1000 classes.
        """
        if self.labels is None or logits.shape[1] != 1000:
            return None
        predictions = logits.argmax(dim=1).tolist()
        hits = [prediction in classes for prediction, classes in zip(predictions, self.labels, strict=True)]
        return sum(hits) / len(hits)


def _to_tensor(image: Image.Image) -> Tensor:
    rgb = image.convert("RGB")
    # bytearray: torch.frombuffer wants memory it may write to.
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.reshape(rgb.height, rgb.width, 3)


def _resize(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _on_white_square(image: Image.Image) -> Image.Image:
    """Puts a picture with transparency on white, in the middle of the smallest square that holds it."""
    cutout = image.convert("RGBA")
    side = max(cutout.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(cutout, ((side - cutout.width) // 2, (side - cutout.height) // 2))
    return canvas.convert("RGB")


def _centre_square(image: Image.Image) -> Image.Image:
    """The central square of 7/8 of the shorter side: the usual 224 out of 256 of ImageNet evaluations."""
    side = round(min(image.size) * 0.875)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _five_crops(image: Image.Image, side: int) -> list[Image.Image]:
    """The square crops of ``side`` pixels at the four corners and in the middle."""
    right, bottom = image.width - side, image.height - side
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
    return [image.crop((left, top, left + side, top + side)) for left, top in corners]


def _imagenet_files() -> list[Path]:
    directory = package_file("foolbox", "data", _FOOLBOX_INSTALL)
    files = sorted(directory.glob("imagenet_*.jpg"))
    if not files:
        raise MissingPackageError(f"foolbox has no imagenet_*.jpg in its data; run: {_FOOLBOX_INSTALL}")
    return files


def imagenet_photos(size: int = 224) -> tuple[list[Tensor], list[int]]:
    """The 20 ImageNet photos of foolbox's wheel, centre-cropped (7/8) and resized to ``size``.

    Returns:
        The images, uint8 RGB tensors of shape (size, size, 3), and their ImageNet classes.

    Raises:
        MissingPackageError: foolbox is not installed.
    """
    images: list[Tensor] = []
    labels: list[int] = []
    for path in _imagenet_files():
        with Image.open(path) as photo:
            images.append(_to_tensor(_resize(_centre_square(photo.convert("RGB")), size)))
        # Names are imagenet_<number>_<class>.jpg.
        labels.append(int(path.stem.rsplit("_", 1)[1]))
    return images, labels


def cutouts(
    limit: int | None = None,
    *,
    mirrored: bool = False,
    size: int = 224,
    directory: Path = STAMPS_DIRECTORY,
) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Tux Paint's photo stamps on a white square, with the ImageNet classes that count as right for each.

    Args:
        limit: How many stamps to take, in the order of ``stamps_dev.json``; all of them by default.
        mirrored: Follow each image by its mirror image, which doubles the number of images.
        size: Height and width of the images.
        directory: Where the stamps are; by default where Debian's package puts them.

    Returns:
        The images, uint8 RGB tensors of shape (size, size, 3), and for each a tuple of ImageNet classes.

    Raises:
        MissingPackageError: The stamps are not installed.
    """
    accepted: dict[str, list[int]] = json.loads(STAMPS_CLASSES.read_text(encoding="utf-8"))
    images: list[Tensor] = []
    labels: list[tuple[int, ...]] = []
    for name, classes in list(accepted.items())[:limit]:
        path = directory / name
        if not path.is_file():
            raise MissingPackageError(f"no stamp {path}; run: {STAMPS_INSTALL}")
        with Image.open(path) as stamp:
            square = _resize(_on_white_square(stamp), size)
        for image in (square, ImageOps.mirror(square)) if mirrored else (square,):
            images.append(_to_tensor(image))
            labels.append(tuple(classes))
    return images, labels


def crops(size: int = 224) -> EvaluationSet:
    """Unlabelled crops of photos, for machines without the stamps; ``independent`` says how good they are.

    With scikit-image installed: five crops, of 3/4 of the shorter side, from each of its 11 photographs.
    None of those photos is calibrated on, but they are few and five crops of one photo are much alike.

    Without it: the four quarters and the middle of foolbox's 20 photos, half the shorter side, mirrored.
    These show, at another scale and the other way round, the very photos that are calibrated on, so a
    figure measured on them is a check that the network still works and flatters any quantizer. It is not
    comparable with a figure on the cutouts.

    Raises:
        MissingPackageError: Neither scikit-image nor foolbox is installed.
    """
    images: list[Tensor] = []
    try:
        directory = package_file("skimage", "data", _SKIMAGE_INSTALL)
    except MissingPackageError:
        directory = None
    # Releases of scikit-image differ in which pictures they ship.
    files = [] if directory is None else [p for p in map(directory.joinpath, _SKIMAGE_PHOTOS) if p.is_file()]
    if files:
        for path in files:
            with Image.open(path) as picture:
                photo = picture.convert("RGB")
            images += [_to_tensor(_resize(crop, size)) for crop in _five_crops(photo, min(photo.size) * 3 // 4)]
        return EvaluationSet(
            name="crops-skimage",
            description=f"{len(images)} unlabelled crops of {len(files)} photos of scikit-image",
            independent=True,
            images=images,
            labels=None,
        )
    for path in _imagenet_files():
        with Image.open(path) as picture:
            photo = ImageOps.mirror(picture.convert("RGB"))
        images += [_to_tensor(_resize(crop, size)) for crop in _five_crops(photo, min(photo.size) // 2)]
    return EvaluationSet(
        name="crops-calibration-photos",
        description=f"{len(images)} mirrored crops of the calibration photos themselves: flattering",
        independent=False,
        images=images,
        labels=None,
    )


def evaluation_set(size: int = 224, *, mirrored: bool = False) -> EvaluationSet:
    """The cutouts where Debian's stamps are installed, and otherwise ``crops``.

    Args:
        size: Height and width of the images.
        mirrored: Take the mirror images of the cutouts too; crops are what they are.

    Raises:
        MissingPackageError: There is nothing at all to evaluate on.
    """
    try:
        images, labels = cutouts(mirrored=mirrored, size=size)
    except MissingPackageError:
        return crops(size)
    suffix = ", each also mirrored" if mirrored else ""
    return EvaluationSet(
        name="cutouts",
        description=f"{len(images)} photo cut-outs of tuxpaint-stamps-default on white{suffix}",
        independent=True,
        images=images,
        labels=labels,
    )
