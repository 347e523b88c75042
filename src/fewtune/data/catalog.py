"""The paper's data sets as declared: splits, counts, classes and where each is had; one immutable value a data set.

Classes and counts are those of Tab. 13 of the GPS paper, but for ImageNet-1k: its table gives 150,000 test images and
its text 100,000, both unlabelled; the published figures are on the 50,000 validation images, which are "test" here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fewtune.data.formats import FORMATS
from fewtune.data.formats.vtab import CLASSES as VTAB_CLASSES
from fewtune.data.listing import Counts, Expected, Listing
from fewtune.data.vtab_draw import DRAWS, TRAIN, VAL, Draw
from fewtune.errors import DataError, nearest


@dataclass(frozen=True)
class Declaration:
    """A published data set."""

    key: str
    title: str
    group: str
    format: str
    """A key of `fewtune.data.formats.FORMATS`."""
    folders: tuple[str, ...]
    """Names of its folder below the root; the first is the usual one."""
    classes: int
    counts: Counts
    licence: str
    source: str
    """The page of its authors."""
    fetch: str
    """What to fetch, and where to put it, in words."""
    metric: str = "top-1 accuracy"
    normalisation: str = "the checkpoint's own (ViT-B/16: mean = std = 0.5; Swin-B, ConvNeXt-B: ImageNet's)"
    download: Literal["torchvision", "unpack"] | None = None
    """What `fewtune data prepare` can do: download, or unpack archives that were fetched by hand."""
    draw: Draw | str | None = None
    """How its lists are drawn from a public archive, or in words why they are not; None where they are published."""

    @property
    def layout(self) -> str:
        """What lies in its folder."""
        return FORMATS[self.format].layout

    def part(self, classes: int | None = None, counts: Counts | None = None) -> Declaration:
        """The same data set where only a part of it is at hand: other numbers are expected."""
        return replace(self, classes=classes or self.classes, counts=counts or self.counts)

    def listing(self, folder: Path) -> Listing:
        """What its folder holds."""
        return FORMATS[self.format].list(folder, Expected(self.classes, self.counts))


SPLITS = "VPT's splits (fgvc_split.zip of github.com/KMnP/vpt): put its train.json, val.json and test.json into"


def _fgvc(
    key: str, title: str, folders: tuple[str, ...], classes: int, counts: tuple[int, int, int], licence: str,
    source: str, images: str, download: Literal["torchvision"] | None = None,
) -> Declaration:  # fmt: skip
    fetch = f"{images} {SPLITS} {folders[0]}/"
    return Declaration(
        key, title, "fgvc", "fgvc", folders, classes, Counts(*counts), licence, source, fetch, download=download
    )


FGVC = (
    _fgvc(
        "cub-200-2011", "CUB-200-2011", ("CUB_200_2011",), 200, (5394, 600, 5794),
        "non-commercial research; images belong to their photographers",
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
        "CUB_200_2011.tgz, unpacked to CUB_200_2011/ (images in CUB_200_2011/images/).",
    ),
    _fgvc(
        "nabirds", "NABirds", ("nabirds",), 555, (21536, 2393, 24633),
        "non-commercial research, by the terms of the Cornell Lab of Ornithology",
        "https://dl.allaboutbirds.org/nabirds",
        "nabirds.tar.gz, unpacked to nabirds/ (images in nabirds/images/).",
    ),
    _fgvc(
        "oxford-flowers", "Oxford Flowers", ("oxfordflower", "OxfordFlower"), 102, (1020, 1020, 6149),
        "none stated by its authors",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        "102flowers.tgz, unpacked to oxfordflower/ (images in oxfordflower/jpg/).", "torchvision",
    ),
    _fgvc(
        "stanford-dogs", "Stanford Dogs", ("stanforddogs", "Stanford-dogs"), 120, (10800, 1200, 8580),
        "non-commercial research; the images are ImageNet's",
        "http://vision.stanford.edu/aditya86/ImageNetDogs/",
        "images.tar, unpacked to stanforddogs/ (images in stanforddogs/Images/).",
    ),
    _fgvc(
        "stanford-cars", "Stanford Cars", ("stanfordcars", "Stanford-cars"), 196, (7329, 815, 8041),
        "non-commercial research",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        "cars_train.tgz and cars_test.tgz, unpacked to stanfordcars/ (its page is gone at times; mirrors exist).",
    ),
)  # fmt: skip

_RESEARCH = "research use; no licence stated by its authors"
_VTAB: dict[str, tuple[str, str, int, str, str]] = {
    # folder: title, group, test images, licence, source page
    "cifar": ("CIFAR-100", "natural", 10000, "none stated by its authors", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "caltech101": ("Caltech101", "natural", 6084, "CC BY 4.0", "https://data.caltech.edu/records/mzrjq-6wc02"),
    "dtd": ("DTD", "natural", 1880, "research use", "https://www.robots.ox.ac.uk/~vgg/data/dtd/"),
    "oxford_flowers102": ("Flowers102", "natural", 6149, "none stated by its authors", "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
    "oxford_iiit_pet": ("Pets", "natural", 3669, "CC BY-SA 4.0", "https://www.robots.ox.ac.uk/~vgg/data/pets/"),
    "svhn": ("SVHN", "natural", 26032, "non-commercial use", "http://ufldl.stanford.edu/housenumbers/"),
    "sun397": ("Sun397", "natural", 21750, _RESEARCH, "https://vision.princeton.edu/projects/2010/SUN/"),
    "patch_camelyon": ("Patch Camelyon", "specialized", 32768, "CC0", "https://github.com/basveeling/pcam"),
    "eurosat": ("EuroSAT", "specialized", 5400, "MIT", "https://github.com/phelber/EuroSAT"),
    "resisc45": ("Resisc45", "specialized", 6300, _RESEARCH, "https://gcheng-nwpu.github.io/"),
    "diabetic_retinopathy": ("Retinopathy", "specialized", 42670, "the rules of the Kaggle competition", "https://www.kaggle.com/c/diabetic-retinopathy-detection"),
    "clevr_count": ("Clevr/count", "structured", 15000, "CC BY 4.0", "https://cs.stanford.edu/people/jcjohns/clevr/"),
    "clevr_dist": ("Clevr/distance", "structured", 15000, "CC BY 4.0", "https://cs.stanford.edu/people/jcjohns/clevr/"),
    "dmlab": ("DMLab", "structured", 22735, "see the source page", "https://github.com/google-research/task_adaptation"),
    "kitti": ("KITTI/distance", "structured", 711, "CC BY-NC-SA 3.0", "https://www.cvlibs.net/datasets/kitti/"),
    "dsprites_loc": ("dSprites/location", "structured", 73728, "Apache-2.0", "https://github.com/google-deepmind/dsprites-dataset"),
    "dsprites_ori": ("dSprites/orientation", "structured", 73728, "Apache-2.0", "https://github.com/google-deepmind/dsprites-dataset"),
    "smallnorb_azi": ("SmallNORB/azimuth", "structured", 12150, "research use", "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"),
    "smallnorb_ele": ("SmallNORB/elevation", "structured", 12150, "research use", "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"),
}  # fmt: skip
_VTAB_FETCH = (
    "images and lists as get_vtab1k.py of github.com/ZhangYuanhan-AI/NOAH (data/vtab-source) writes them from "
    "TensorFlow Datasets; put the folder {0} into ROOT/vtab-1k/ or ROOT/. Lists in another order "
    "make another task, not VTAB-1k"
)


def _vtab(folder: str, title: str, group: str, test: int, licence: str, source: str) -> Declaration:
    draw, fetch = DRAWS[folder], _VTAB_FETCH.format(folder)
    by_rule = isinstance(draw, Draw)
    if by_rule:
        fetch = f"`fewtune data prepare vtab/{folder} --data ROOT` downloads and draws it; else {fetch}"
    return Declaration(
        f"vtab-{folder.replace('_', '-')}", title, f"vtab-{group}", "vtab", (folder,), VTAB_CLASSES[folder],
        Counts(TRAIN, VAL, test), licence, source, fetch, download="torchvision" if by_rule else None, draw=draw,
    )  # fmt: skip


VTAB = tuple(_vtab(folder, *known) for folder, known in _VTAB.items())

_IMAGENET = "non-commercial research and education, by ImageNet's terms"

GENERAL = (
    Declaration(
        "cifar-100", "CIFAR-100", "general", "cifar", ("cifar-100-python",), 100, Counts(50000, None, 10000),
        "none stated by its authors", "https://www.cs.toronto.edu/~kriz/cifar.html",
        "cifar-100-python.tar.gz, unpacked to cifar-100-python/", download="torchvision",
    ),
    Declaration(
        "imagenet-1k", "ImageNet-1k", "general", "imagenet", ("imagenet-1k", "imagenet", "ILSVRC2012"), 1000,
        Counts(1281167, None, 50000), _IMAGENET, "https://www.image-net.org/challenges/LSVRC/2012/",
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, after registering; put "
        "them into imagenet-1k/ and `fewtune data prepare imagenet-1k --data ROOT` unpacks them", download="unpack",
    ),
)  # fmt: skip

OOD = (
    Declaration(
        "imagenet-a", "ImageNet-A", "ood", "classes", ("imagenet-a", "ImageNet-A"), 200, Counts(test=7500), "MIT",
        "https://github.com/hendrycks/natural-adv-examples", "imagenet-a.tar, unpacked to imagenet-a/",
        metric="top-1 accuracy among the 200 classes",
    ),
    Declaration(
        "imagenet-r", "ImageNet-R", "ood", "classes", ("imagenet-r", "ImageNet-R"), 200, Counts(test=30000), "MIT",
        "https://github.com/hendrycks/imagenet-r", "imagenet-r.tar, unpacked to imagenet-r/",
        metric="top-1 accuracy among the 200 classes",
    ),
    Declaration(
        "imagenet-c", "ImageNet-C", "ood", "corruptions", ("imagenet-c", "ImageNet-C"), 1000,
        Counts(test=75 * 50000), "CC BY 4.0", "https://github.com/hendrycks/robustness",
        "blur.tar, digital.tar, noise.tar and weather.tar, unpacked to imagenet-c/",
        metric="mean accuracy over 15 corruptions x 5 severities, and mean corruption error (mCE)",
    ),
)  # fmt: skip

SEGMENTATION = (
    Declaration(
        "kvasir-seg", "Kvasir-SEG", "segmentation", "masks", ("kvasir-seg", "Kvasir-SEG"), 2, Counts(880, None, 120),
        "research and education", "https://datasets.simula.no/kvasir-seg/",
        "kvasir-seg.zip, unpacked to kvasir-seg/. The paper's split is not published; here the images are ordered by "
        "the SHA-256 of the file's stem, and the last 120 are the test set",
        metric="mean Dice and mean IoU", normalisation="ImageNet's mean and standard deviation, as SAM's",
    ),
)  # fmt: skip

DECLARATIONS: dict[str, Declaration] = {d.key: d for d in (*FGVC, *VTAB, *GENERAL, *OOD, *SEGMENTATION)}
"""All data sets by key: FGVC's 5, VTAB-1k's 19, CIFAR-100, ImageNet-1k, -A, -R, -C, Kvasir-SEG."""

ALIASES = {f"vtab/{known.folders[0]}": known for known in VTAB}
"""VTAB-1k's tasks as their recipes are called."""


def declaration(key: str) -> Declaration:
    """The data set with that key, or of that VTAB-1k recipe; DataError names the nearest where there is none."""
    if key in ALIASES:
        return ALIASES[key]
    if key not in DECLARATIONS:
        hint = nearest(key, DECLARATIONS, count=3, otherwise="; `fewtune data list` shows all")
        raise DataError(f'no data set is called "{key}"{hint}')
    return DECLARATIONS[key]


def find_folder(data_set: Declaration, root: str | Path) -> Path:
    """The folder of a data set: below `root`, or `root` itself.

    Raises:
        DataError: it is not there; the message says what was looked for.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the one that holds {data_set.folders[0]}/ ({data_set.title})")
    parents = [root, *(root / name for name in ("vtab-1k", "VTAB-1k", "FGVC"))]
    there = [folder for parent in parents for name in data_set.folders if (folder := parent / name).is_dir()]
    if there:  # torchvision's folder of an archive may have the name of a VTAB-1k task
        return next((folder for folder in there if FORMATS[data_set.format].recognise(folder)), there[0])
    if root.resolve().name in data_set.folders:
        return root
    others = {name for other in DECLARATIONS.values() for name in other.folders}
    if FORMATS[data_set.format].recognise(root) and root.resolve().name not in others:
        return root
    raise DataError(
        f"{data_set.title} is not in {root}: there is no {data_set.folders[0]}/; "
        f"`fewtune data info {data_set.key}` says what to fetch"
    )
