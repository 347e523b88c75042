"""A VTAB-1k task: a folder with images and the lists of 800 + 200 training images and the test images."""

from __future__ import annotations

from pathlib import Path

from fewtune.data.listing import Expected, Format, Label, Listed, Listing, listed_items, read_list

CLASSES = {
    "caltech101": 102,
    "cifar": 100,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
"""The classes of each VTAB-1k task, by its folder's name; a draw of 1,000 images need not hold all of them."""

LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
JOINT = "train800val200.txt"
NAMES = "classes.txt"
"""The names of the classes, a line each in the order of the numbers; VTAB-1k's own folders have no such file."""


def recognise(path: Path) -> bool:
    """Whether the folder has one of VTAB-1k's training lists."""
    return any((path / name).is_file() for name in (LISTS["train"], JOINT))


def list_vtab(folder: Path, expected: Expected) -> Listing:
    """800 images to train, 200 to validate, the rest to test; a line of a list is "path label", the class's number.

    Without train800.txt and val200.txt the 1,000 images of train800val200.txt are the training images. The number of
    classes is the expected one, else that of the task after which the folder is named, else told by classes.txt, else
    by the lists. Without classes.txt the classes are called by their numbers.
    """
    listing = Listing(folder.name)
    files = dict(LISTS)
    if not (folder / LISTS["train"]).is_file() and (folder / JOINT).is_file():
        listing.gaps += [f"the list {LISTS[split]} is missing" for split in ("train", "val")]
        files = {"train": JOINT, "test": LISTS["test"]}
    listed = {split: _read(folder, name, listing.faults) for split, name in files.items()}
    numbers = sorted({label for entries in listed.values() for _, label in entries})
    names = _names(folder, listing)
    known = expected.classes or CLASSES.get(folder.name) or len(names)
    classes = known or len(numbers)
    if names and len(names) != classes:
        listing.faults.append(f"{folder / NAMES} has {len(names)} lines, expected one for each of {classes} classes")
    listing.class_names = names or tuple(map(str, range(classes)))
    why = "this task has" if known else "the lists have"
    for split, entries in listed.items():
        listing.faults += [
            f"{folder}/{files[split]}: {name} has the label {label}, off range: {why} {classes} classes, so labels "
            f"must lie in 0..{classes - 1}"
            for name, label in entries
            if not 0 <= label < classes
        ]
        roots = [folder, folder / "images"]
        listing.splits[split] = listed_items(entries, roots, _as_it_is, listing.faults)
    _compare_joint(folder, listed, listing)
    return listing


def _names(folder: Path, listing: Listing) -> tuple[str, ...]:
    """The names of the classes; empty where there is no list of them."""
    path = folder / NAMES
    text = read_list(path, "", listing.faults) if path.is_file() else None
    names = tuple(line.strip() for line in (text or "").splitlines() if line.strip())
    if len(set(names)) < len(names):
        listing.faults.append(f"{path} names a class twice")
    return names


def _as_it_is(label: Label) -> Label:
    return label


def _compare_joint(folder: Path, listed: dict[str, Listed], listing: Listing) -> None:
    """train800val200.txt must list the images of the two others."""
    if "val" not in listed:
        return
    faults: list[str] = []
    both = _read(folder, JOINT, faults)
    if faults:
        listing.gaps += faults
    elif sorted(both) != sorted(listed["train"] + listed["val"]):
        listing.gaps.append(f"{JOINT} does not list the images and labels of {LISTS['train']} and {LISTS['val']}")


def _read(folder: Path, name: str, faults: list[str]) -> Listed:
    path, entries = folder / name, []
    text = read_list(path, f"{folder} is a VTAB-1k task without its list {name}", faults)
    if text is None:
        return []
    before = len(faults)
    for number, line in enumerate(text.splitlines(), 1):
        image, _, label = line.strip().rpartition(" ")
        if image and label.lstrip("-").isdigit():
            entries.append((image.strip(), int(label)))
        elif line.strip():
            faults.append(f'{path}, line {number}: expected "relative/path label" (a whole number), got "{line}"')
    if not entries and len(faults) == before:
        faults.append(f"{path} lists no images")
    return entries


VTAB = Format(
    "vtab",
    f"images/ and the lists {LISTS['train']}, {LISTS['val']}, {JOINT}, {LISTS['test']} with lines `path label`",
    recognise,
    list_vtab,
)
