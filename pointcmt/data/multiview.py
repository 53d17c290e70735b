"""Rendered views of shapes in a folder, named as MVCNN's authors name them: ``airplane_0627_001.png``."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pointcmt.data.dataset import Split, check_class_names, check_split
from pointcmt.data.files import is_junk
from pointcmt.types import Views
from pointcmt.views.mesh_files import CAMERA_KEYS, CAMERAS

# <shape>_<view>, whatever the shape's name; also airplane_0627_shaded_v001, airplane_0627.off_shaded_v001 and
# airplane_0627.obj_whiteshaded_v0001
_NAME = re.compile(r"(?P<shape>.+?)(?:(?:\.(?:off|obj|ply))?_(?:white)?shaded_v|_v?)(?P<view>\d+)", re.DOTALL)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_SPLITS = ("train", "test")

# split and class ("" where no folder says it), and name of a shape
_Key = tuple[str, str, str]


class MultiViewImages(Dataset[tuple[Tensor, int, int]]):
    """n shapes with V images each; an item is ``(views [V, C, H, W], label int, index int)``.

    Views are float32 from 0 to 1.

    Images are found wherever they lie below ``root``: the name is the shape's, then the number of the view,
    from 000 or 001. The split is the folder ``train`` or ``test`` on the way to them, the class the other
    folder next to them; without one, the shape's name without its number. So
    ``<class>/<split>/airplane_0627_001.png``, ``<split>/<class>/model_0001_001.png`` and
    ``<split>/airplane_0627_001.png`` are all read; images without a folder of a split are read where
    ``shape_ids`` says what to take. Hidden files and what operating systems leave behind are skipped.

    Values: 8 bits over 255, 16 bits over 65535 or ``white``; transparent pixels are seen on white. Images of
    32 bits or of floats are refused. Some images are looked at on making: a warning says so where none of
    them uses an eighth of its range (depths in millimetres do not, of 16 bits), or all are of one colour.

    Args:
        root: folder of the images.
        split: ``"train"`` or ``"test"``.
        num_views: take the first V views of each shape; None takes all, and shapes must have as many.
        size: images are resized to size × size pixels; None leaves them as they are.
        in_chans: 1 for greyscale, 3 for RGB.
        white: the value of 16 bits that counts as 1, larger ones too: 4000 for depths in millimetres up to
            4 m; None: 65535. Images of 8 bits stay as they are.
        shape_ids: which shapes, in which order: ``dataset.shape_ids`` of a set of clouds, whose items and
            images then have the same index. None takes all, sorted by name.
        class_names: names in label order, of the set of clouds; None sorts those found in *both* splits, so
            that a class absent from one keeps its number.

    Attributes:
        labels, class_names, num_classes, shape_ids: as in :class:`PointDataset`; ids are
            ``split/class/name``.

    Raises:
        FileNotFoundError: no such folder, no images in it, or shapes or views that are missing (they are
            named).
        ValueError: a value out of range, a shape of a class that ``class_names`` lacks, a name that says
            another class than its folder, or a name in ``shape_ids`` that several shapes have.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split,
        *,
        num_views: int | None = None,
        size: int | None = None,
        in_chans: int = 3,
        white: int | None = None,
        shape_ids: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        check_split(split)
        if in_chans not in (1, 3):
            raise ValueError(f"in_chans is {in_chans}; expected 1 (greyscale) or 3 (RGB)")
        if (num_views is not None and num_views < 1) or (size is not None and size < 1):
            raise ValueError(f"num_views {num_views} and size {size}: expected at least 1, or None")
        if white is not None and not 1 <= white <= 65535:
            raise ValueError(f"white is {white}; expected 1 to 65535, the values of 16 bits, or None")
        self.root, self.split, self.size, self.in_chans = Path(root), split, size, in_chans
        self.white = white or 65535
        everything = _find(self.root)
        keys = _wanted(self.root, everything, split, shape_ids)
        self.shape_ids = [f"{split}/{_class(key)}/{key[2]}" for key in keys]
        wanted = num_views or max(len(everything[key]) for key in keys)
        self._paths = [_views(self.root, key, everything[key], wanted) for key in keys]
        names = sorted({_class(key) for key in everything}) if class_names is None else list(class_names)
        self.class_names = names
        check_class_names(names)
        if unknown := sorted({_class(key) for key in keys} - set(names)):
            raise ValueError(f"images of {unknown} in {self.root}; class_names has only {names}")
        number = {name: label for label, name in enumerate(names)}
        self.labels = np.array([number[_class(key)] for key in keys], dtype=np.int64)
        self.num_views = wanted
        if (problem := self.problem()) is not None:
            warnings.warn(f"{self.root}, {split}: {problem}", stacklevel=2)

    def problem(self, most: int = 16) -> str | None:
        """What is wrong with the values of the images, by ``most`` of them from all over the set; None where
        nothing is."""
        paths = [path for views in self._paths for path in views]
        chosen = sorted({round(place) for place in np.linspace(0, len(paths) - 1, most)})
        largest, above, blank, deep, seen = 0.0, 0.0, True, False, 0
        for path in [paths[row] for row in chosen]:
            try:
                pixels, bits = self._pixels(path)
            except (ValueError, OSError):  # said where it is read
                continue
            seen += 1
            blank &= float(pixels.min()) == float(pixels.max())
            deep |= bits == 16
            # depth maps have a largest value for what was not measured
            measured = pixels[pixels < 65535 / self.white] if bits == 16 else pixels
            if measured.numel():
                largest = max(largest, float(measured.max()))
                above = max(above, float((measured > 1).float().mean()))
            elif bits == 16:
                largest = 1.0
        few = f"of {seen} images that were looked at"
        if not seen:
            return None
        if blank:
            return f"all {few} are of one colour; render them again, or look at what wrote them"
        full = self.white if deep else 255
        if largest < 1 / 8:
            return (
                f"the largest value {few} is {round(largest * full)} of {full}, so that they are nearly black"
                + (
                    f"; depths in millimetres are such: give --white {round(largest * full)} (white= here), "
                    "the value that is to count as 1"
                    if deep
                    else "; save them with values up to 255"
                )
            )
        if above > 0.01:
            return (
                f"{above:.0%} of the pixels {few} are above {self.white}, the value that counts as 1: give a "
                "larger --white (white= here)"
            )
        return None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        index = range(len(self))[index]
        return self._stacked(index, self._paths[index]), int(self.labels[index]), index

    def _stacked(self, index: int, paths: Sequence[Path]) -> Tensor:
        """Images [V, C, H, W] of one shape."""
        images = [self._read(path) for path in paths]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"the images of {self.shape_ids[index]} differ in size: "
                f"{[list(image.shape) for image in images]}; give size= to resize them"
            )
        return torch.stack(images)

    def views(self, index: int, chosen: Sequence[int] | None = None, *, cameras: bool = True) -> Views:
        """The images of one shape (B = 1) with their cameras, as ``pointcmt render-views`` wrote them.

        Args:
            index: row of the shape.
            chosen: which of its views, in which order; None: all.
            cameras: False gives the images alone.

        Raises:
            FileNotFoundError: nothing says where the cameras stood.
            ValueError: the file of the cameras is damaged, or has fewer than there are images.
        """
        paths = self._paths[range(len(self))[index]]
        rows = list(range(len(paths)) if chosen is None else chosen)
        images = self._stacked(index, [paths[row] for row in rows])
        if not cameras:
            return Views(images[None])
        first = paths[0]
        matched = _NAME.fullmatch(first.stem)
        assert matched is not None
        path = first.with_name(f"{matched['shape']}{CAMERAS}")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: where the cameras of these images stood is not known. "
                "`pointcmt render-views` writes it with the images"
            )
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            matrices = [torch.tensor(kept[name], dtype=torch.float32) for name in CAMERA_KEYS]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); render the views again") from error
        if any(m.shape[1:] != (4, 4) or len(m) < len(paths) for m in matrices):
            raise ValueError(f"{path} has no camera [4, 4] for each of {len(paths)} images")
        if not all(bool(m.isfinite().all()) for m in matrices):
            raise ValueError(f"{path} has cameras with numbers that are not finite; render the views again")
        view, projection = (m[None, rows] for m in matrices)
        return Views(images[None], view_matrix=view, projection_matrix=projection)

    def _read(self, path: Path) -> Tensor:
        """One image: float32 [C, H, W] in 0 … 1."""
        pixels, bits = self._pixels(path)
        if bits == 8:
            return pixels
        pixels = pixels.clamp(max=1)
        if self.size is None:
            return pixels
        return torch.nn.functional.interpolate(
            pixels[None], (self.size, self.size), mode="bilinear", antialias=True
        )[0]

    def _pixels(self, path: Path) -> tuple[Tensor, int]:
        """One image, float32 [C, H, W], and its bits: one of 8 resized; of 16 as it is, above 1 too."""
        try:
            with Image.open(path) as file:
                if file.width * file.height > (Image.MAX_IMAGE_PIXELS or 1 << 27):
                    raise ValueError(f"{file.width} × {file.height} pixels are too many")
                # PNG has no more than 16 bits, whatever Pillow keeps them in
                depth = file.mode if file.format != "PNG" or file.mode != "I" else "I;16"
                file.load()
                image = file.copy()
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, … of damaged files
            raise OSError(
                f"{path} cannot be read as an image ({type(error).__name__}: {error}); render or download it "
                "again"
            ) from error
        if depth.startswith("I;16"):
            pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / self.white)[None]
            return pixels.expand(self.in_chans, -1, -1).clone(), 16
        if depth in ("I", "F"):
            raise ValueError(
                f"{path} has pixels of {'32-bit integers' if depth == 'I' else 'floats'}, whose range is not "
                "known; save it with 8 or 16 bits"
            )
        if image.has_transparency_data:
            seen = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
        image = image.convert("L" if self.in_chans == 1 else "RGB")
        if self.size is not None:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        array = torch.from_numpy(np.array(image)).view(image.height, image.width, self.in_chans)
        return array.permute(2, 0, 1).float() / 255, 8


def _find(root: Path) -> dict[_Key, dict[int, Path]]:
    """Shape → number of the view → file, of all splits."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is not a folder; expected <class>/<split>/airplane_0627_001.png below it"
        )
    found: dict[_Key, dict[int, Path]] = {}
    for path in sorted(root.rglob("*")):
        below = path.relative_to(root)
        matched = _NAME.fullmatch(path.stem) if path.suffix.lower() in _SUFFIXES else None
        if matched is None or is_junk(below):
            continue
        folders = below.parts[:-1]
        split = next((name for name in folders if name in _SPLITS), "")
        classes = [name for name in folders if name not in _SPLITS]
        key = (split, classes[-1] if classes else "", matched["shape"])
        views = found.setdefault(key, {})
        other = views.setdefault(int(matched["view"]), path)
        if other != path:
            raise ValueError(f"{other} and {path} are both view {matched['view']} of {'/'.join(key)}")
    names = {name for _, name, _ in found if name}
    numbered = [re.fullmatch(r"(.+)_\d+", shape) for _, _, shape in found]
    said_by_names = {matched[1] for matched in numbered if matched is not None}
    if len(names) == 1 and len(said_by_names) > 1 and all(numbered):
        raise ValueError(
            f"all images of {root} lie in one folder, {names.pop()!r}, which would be the only class, and "
            f"their names say {', '.join(sorted(said_by_names)[:4])}: put them into a folder for each class, "
            "or give the folder inside as the root"
        )
    for (_, name, shape), views in found.items():
        said = _class(("", "", shape))
        if name and said != name and said in names:
            path = next(iter(views.values()))
            raise ValueError(
                f"{path} lies in the folder of class {name!r}, and its name says {said!r}, which is a class "
                "too; rename or move it"
            )
    return found


def _class(key: _Key) -> str:
    """The class of a shape: of its folder, or what its name says before the number."""
    return key[1] or key[2].rpartition("_")[0] or key[2]


def _wanted(
    root: Path, found: dict[_Key, dict[int, Path]], split: str, shape_ids: Sequence[str] | None
) -> list[_Key]:
    """The shapes of a split, or those that ``shape_ids`` names, in its order."""
    here = sorted(key for key in found if key[0] == split)
    if shape_ids is None:
        if not here:
            raise FileNotFoundError(
                f"{root} has no images of the {split} split; tried <class>/{split}/airplane_0627_001.png, "
                f"{split}/<class>/airplane_0627_001.png and {split}/airplane_0627_001.png "
                f"({', '.join(suffix[1:] for suffix in _SUFFIXES)}). Images without a train or test folder "
                "need shape_ids="
            )
        return here
    by_name: dict[str, list[_Key]] = {}
    for key in here + [key for key in found if key[0] == ""]:
        by_name.setdefault(key[2], []).append(key)
    keys, missing = [], []
    for wanted in shape_ids:
        label, name = ["", *wanted.split("/")][-2:]
        same = [key for key in by_name.get(name, []) if not label or key[1] in ("", label)]
        exact = [key for key in same if key[1] == label] or same
        if len(exact) > 1:
            raise ValueError(
                f"{root} has several shapes named {name!r}: {', '.join('/'.join(key) for key in exact)}; "
                "give ids such as split/class/name"
            )
        keys += exact
        if not exact:
            missing.append(name)
    if missing:
        raise FileNotFoundError(
            f"{root} has no images of {len(missing)} of {len(shape_ids)} shapes: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}. "
            f"Expected names such as {missing[0]}_001.png"
        )
    return keys


def _views(root: Path, key: _Key, found: dict[int, Path], wanted: int) -> list[Path]:
    """The first ``wanted`` views of a shape in order, from view 001 (or 000 where there is one)."""
    first = 0 if 0 in found else 1
    missing = [number for number in range(first, first + wanted) if number not in found]
    if missing:
        raise FileNotFoundError(
            f"{key[2]} in {root} lacks view{'s' if len(missing) > 1 else ''} "
            f"{', '.join(f'{number:03d}' for number in missing)} of {wanted}; "
            f"it has {', '.join(f'{number:03d}' for number in sorted(found))}. Render the shape again, or "
            "use fewer views of all (num_views=)"
        )
    return [found[number] for number in range(first, first + wanted)]
