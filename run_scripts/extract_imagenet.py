"""Extracts ImageNet-1K's archives into train/<wnid>/ and val/<wnid>/, with torchvision's functions.

    python run_scripts/extract_imagenet.py FOLDER_WITH_TARS [--out DIR]

The folder holds ILSVRC2012_img_train.tar (138 GB), ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which are
kept; their md5 is checked. A part has another name until it is complete. After an interruption, run this again:
complete parts are kept, and an incomplete one is extracted again.
"""

import argparse
import shutil
import sys
from pathlib import Path

from torchvision.datasets import imagenet

SOURCE = "https://image-net.org/download-images"


def parse(function, archive: Path, out: Path, **options) -> None:
    try:
        function(out, str(archive), **options)
    except RuntimeError as error:
        if "corrupted" in str(error):  # torchvision's check of the md5
            raise RuntimeError(
                f"{archive} is incomplete or corrupt, its md5 is not the published one: get it again from {SOURCE}"
            ) from error
        raise


def extract(archives: Path, out: Path) -> None:
    """Raises: RuntimeError (an archive is missing or corrupt) or OSError."""
    parts = [part for part in ("train", "val") if not any(out.glob(f"{part}/*"))]
    files = {
        name: archives.resolve() / imagenet.ARCHIVE_META[name][0] for name in parts + ["devkit"] * ("val" in parts)
    }
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise RuntimeError(f"{archives} lacks {', '.join(missing)}; get them from {SOURCE}")
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        print(f"{part}: checking and extracting {files[part].name}", flush=True)
        unfinished = out / f"{part}.unfinished"
        if unfinished.exists():
            shutil.rmtree(unfinished)
        if part == "train":
            parse(imagenet.parse_train_archive, files["train"], out, folder=unfinished.name)
        else:  # the class of each image is in the devkit
            parse(imagenet.parse_devkit_archive, files["devkit"], out)
            parse(imagenet.parse_val_archive, files["val"], out, folder=unfinished.name)
        unfinished.rename(out / part)
    for part in ("train", "val"):
        classes = len(list((out / part).iterdir()))
        print(f"{out / part}: {classes} classes{'' if part in parts else ', was there already'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Extract ImageNet-1K's archives into train/ and val/.")
    parser.add_argument("archives", type=Path, metavar="FOLDER_WITH_TARS", help="folder of the three archives")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for train/ and val/ (default: that of the archives)"
    )
    args = parser.parse_args(argv)
    try:
        extract(args.archives, args.out or args.archives)
    except (RuntimeError, OSError) as error:
        print(f"extract_imagenet.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run this again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
