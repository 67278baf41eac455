#!/usr/bin/env python3
"""Build a corpus of real text that every machine has, as Megatron indexed datasets.

The text is the source code of the interpreter's standard library, tokenized by bytes (ids 0 to
255; 256 ends a document). Every 20th file, by a hash of its path, is held out. Writes
OUTPUT/{train,valid}_document.{bin,idx} and OUTPUT/corpus.json, which names what is in it.

In Megatron: --tokenizer-type NullTokenizer --vocab-size 257 --train-data-path
OUTPUT/train_document --valid-data-path OUTPUT/valid_document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sysconfig
import zlib
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

END_OF_DOCUMENT = 256
# Tests are repetitive, and installed packages differ between machines.
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source_files(library: Path) -> list[Path]:
    """Return the standard library's Python files in a fixed order."""
    files = [
        path
        for path in library.rglob("*.py")
        if not EXCLUDED_FOLDERS.intersection(path.relative_to(library).parts)
    ]
    return sorted(files, key=lambda path: path.relative_to(library).as_posix())


def is_held_out(name: str) -> bool:
    """Return whether a file belongs to the validation split."""
    return zlib.crc32(name.encode()) % 20 == 0


def build(output: Path) -> dict[str, object]:
    """Write both splits and return the description that is stored beside them."""
    library = Path(sysconfig.get_path("stdlib"))
    files = source_files(library)
    if not files:
        raise SystemExit(f"no Python sources under {library}; install the interpreter's library")
    output.mkdir(parents=True, exist_ok=True)
    builders = {
        split: IndexedDatasetBuilder(str(output / f"{split}_document.bin"), dtype=numpy.uint16)
        for split in ("train", "valid")
    }
    tokens = dict.fromkeys(builders, 0)
    documents = dict.fromkeys(builders, 0)
    digest = hashlib.sha256()
    for path in files:
        name = path.relative_to(library).as_posix()
        text = path.read_bytes()
        digest.update(name.encode() + b"\0" + text)
        split = "valid" if is_held_out(name) else "train"
        ids = torch.tensor([*text, END_OF_DOCUMENT], dtype=torch.int32)
        builders[split].add_document(ids, [ids.numel()])
        tokens[split] += ids.numel()
        documents[split] += 1
    for split, builder in builders.items():
        builder.finalize(str(output / f"{split}_document.idx"))
    return {
        "source": f"Python {platform.python_version()} standard library",
        "tokens": tokens,
        "documents": documents,
        "sha256": digest.hexdigest(),
    }


def main() -> None:
    """Build the corpus, or reuse one of the same interpreter version."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="folder for the dataset")
    output = parser.parse_args().output
    description_file = output / "corpus.json"
    if description_file.is_file():
        description = json.loads(description_file.read_text())
        if description["source"].startswith(f"Python {platform.python_version()} "):
            print(f"corpus: reusing {output} ({description['source']})")
            return
    description = build(output)
    description_file.write_text(json.dumps(description, indent=2) + "\n")
    print(
        f"corpus: {description['source']}, {description['documents']} documents, "
        f"{description['tokens']} tokens, in {output}"
    )


if __name__ == "__main__":
    main()
