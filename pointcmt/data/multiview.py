"""Rendered views of shapes in a folder, named as MVCNN's authors name them: ``airplane_0627_001.png``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pointcmt.data.dataset import Split, check_split

# <shape>_<view>; also airplane_0627_shaded_v001 and airplane_0627.off_shaded_v001
_NAME = re.compile(r"(?P<shape>.+_\d+)(?:\.off)?(?:_shaded)?_v?(?P<view>\d+)")
_SUFFIXES = (".png", ".jpg", ".jpeg")


class MultiViewImages(Dataset[tuple[Tensor, int, int]]):
    """n shapes with V images each; an item is ``(views [V, C, H, W], label int, index int)``.

    Views are float32 from 0 to 1.

    Images are found wherever they lie below ``root``, by their names: shape id, then the number of the
    view, from 001. The split is the folder ``train`` or ``test`` on the way to them, the class the shape
    id without its number. So ``<class>/<split>/airplane_0627_001.png``, ``<split>/<class>/…`` and
    ``<split>/…`` are all read; images without such a folder are read where ``shape_ids`` says what to take.

    Args:
        root: folder of the images.
        split: ``"train"`` or ``"test"``.
        num_views: take the first V views of each shape; None takes all, and shapes must have as many.
        size: images are resized to size × size pixels; None leaves them as they are.
        in_chans: 1 for greyscale, 3 for RGB.
        shape_ids: which shapes, in which order: ``dataset.shape_ids`` of a set of clouds, whose items and
            images then have the same index. None takes all, sorted by name.
        class_names: names in label order, of the set of clouds; None sorts those found.

    Attributes:
        labels, class_names, num_classes, shape_ids: as in :class:`PointDataset`.

    Raises:
        FileNotFoundError: no such folder, no images in it, or shapes or views that are missing (they are
            named).
        ValueError: a value out of range, or a shape of a class that ``class_names`` lacks.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        *,
        num_views: int | None = None,
        size: int | None = None,
        in_chans: int = 3,
        shape_ids: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        check_split(split)
        if in_chans not in (1, 3):
            raise ValueError(f"in_chans is {in_chans}; expected 1 (greyscale) or 3 (RGB)")
        if (num_views is not None and num_views < 1) or (size is not None and size < 1):
            raise ValueError(f"num_views {num_views} and size {size}: expected at least 1, or None")
        self.root, self.split, self.size, self.in_chans = Path(root), split, size, in_chans
        found = _find(self.root, split, need_split=shape_ids is None)
        self.shape_ids = sorted(found) if shape_ids is None else list(shape_ids)
        if missing := [shape for shape in self.shape_ids if shape not in found]:
            raise FileNotFoundError(
                f"{self.root} has no images of {len(missing)} of {len(self.shape_ids)} shapes: "
                f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}. "
                f"Expected names such as {missing[0]}_001.png"
            )
        wanted = num_views or max(len(found[shape]) for shape in self.shape_ids)
        self._paths = [_views(self.root, shape, found[shape], wanted) for shape in self.shape_ids]
        classes = [shape.rpartition("_")[0] for shape in self.shape_ids]
        self.class_names = sorted(set(classes)) if class_names is None else list(class_names)
        if unknown := sorted(set(classes) - set(self.class_names)):
            raise ValueError(f"images of {unknown} in {self.root}; class_names has only {self.class_names}")
        number = {name: label for label, name in enumerate(self.class_names)}
        self.labels = np.array([number[name] for name in classes], dtype=np.int64)
        self.num_views = wanted

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        index = range(len(self))[index]
        images = [self._read(path) for path in self._paths[index]]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"the images of {self.shape_ids[index]} differ in size: "
                f"{[list(image.shape) for image in images]}; give size= to resize them"
            )
        return torch.stack(images), int(self.labels[index]), index

    def _read(self, path: Path) -> Tensor:
        """One image: float32 [C, H, W] in 0 … 1."""
        try:
            with Image.open(path) as file:
                image = file.convert("L" if self.in_chans == 1 else "RGB")
        except (OSError, SyntaxError) as error:  # what Pillow raises of damaged files
            raise OSError(
                f"{path} cannot be read as an image ({error}); render or download it again"
            ) from error
        if self.size is not None:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, self.in_chans)
        return pixels.permute(2, 0, 1).float() / 255


def _find(root: Path, split: str, need_split: bool) -> dict[str, dict[int, Path]]:
    """Shape id → number of the view → file."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is not a folder; expected <class>/{split}/airplane_0627_001.png below it"
        )
    found: dict[str, dict[int, Path]] = {}
    for path in root.rglob("*"):
        matched = _NAME.fullmatch(path.stem) if path.suffix.lower() in _SUFFIXES else None
        folders = path.relative_to(root).parts[:-1]
        other = "test" if split == "train" else "train"
        if matched and (split in folders or not (need_split or other in folders)):
            found.setdefault(matched["shape"], {})[int(matched["view"])] = path
    if not found:
        raise FileNotFoundError(
            f"{root} has no images of the {split} split; tried <class>/{split}/airplane_0627_001.png, "
            f"{split}/<class>/airplane_0627_001.png and {split}/airplane_0627_001.png (png, jpg, jpeg). "
            "Images without a train or test folder need shape_ids="
        )
    return found


def _views(root: Path, shape: str, found: dict[int, Path], wanted: int) -> list[Path]:
    """The first ``wanted`` views of a shape in order, from view 001 (or 000 where there is one)."""
    first = 0 if 0 in found else 1
    missing = [number for number in range(first, first + wanted) if number not in found]
    if missing:
        raise FileNotFoundError(
            f"{shape} in {root} lacks view{'s' if len(missing) > 1 else ''} "
            f"{', '.join(f'{number:03d}' for number in missing)} of {wanted}; "
            f"it has {', '.join(f'{number:03d}' for number in sorted(found))}"
        )
    return [found[number] for number in range(first, first + wanted)]
