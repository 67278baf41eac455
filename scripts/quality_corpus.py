#!/usr/bin/env python3
"""Build a corpus of real text with a tokenizer trained on it, for scripts/quality.py.

    python scripts/quality_corpus.py quality-out/corpus

The text is the code and documentation in the source packages of scripts/quality_sources.txt, each
pinned to a release of the Python Package Index and its SHA-256. Tests, repeated files and files
over 500 kB are left out. Every 100th document, by a hash of its text, is held out, up to so many
tokens that they fill batches of 64 sequences of 1,024. Writes to OUTPUT:

    tokenizer.model, tokenizer.vocab      SentencePiece, byte-pair encoding, 50,304 pieces
    {train,valid}_document.{bin,idx}      Megatron indexed datasets of uint16
    corpus.json                           what is in them, and how it came about
    sources/                              the packages, kept for another build

A finished corpus can be copied to a machine without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import tarfile
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import sentencepiece
import torch

SOURCES = Path(__file__).resolve().with_name("quality_sources.txt")
INDEX = "https://pypi.org/simple"
# PEP 691: what every index and mirror offers.
INDEX_TYPE = "application/vnd.pypi.simple.v1+json"
SUFFIXES = (".py", ".pyi", ".pyx", ".rst", ".md", ".txt")
# Tests are repetitive; what is larger is data or generated.
EXCLUDED_WORD = "test"
LARGEST_FILE = 500_000
SMALLEST_FILE = 200
HELD_OUT = 100
# Of validation; the last token is a label only.
HELD_OUT_TOKENS = 16 * 64 * 1024 + 1
# The tokenizer learns from every 8th document: more changes few of its pieces.
LEARNED_FROM = 8
ENCODED_AT_ONCE = 512


@dataclass(frozen=True)
class Source:
    """A line of quality_sources.txt."""

    name: str
    version: str
    sha256: str


class CorpusError(Exception):
    """A source that cannot be had, or is another than the one that was pinned."""


def read_sources(path: Path) -> list[Source]:
    """Return the packages of a file: name, version and SHA-256 of the source distribution."""
    sources = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if words and len(words) != 3:
            raise CorpusError(f"{path}:{number}: not NAME VERSION SHA256: {line}")
        if words:
            sources.append(Source(*words))
    return sources


def fetch(source: Source, folder: Path) -> Path:
    """Return the source distribution's file, downloaded unless it is there.

    Raises:
        CorpusError: the index cannot be reached, has no such file, or sent other bytes.
    """
    path = folder / f"{source.name}-{source.version}.tar.gz"
    if path.is_file() and _sha256(path) == source.sha256:
        return path
    address = f"{INDEX}/{source.name}/"
    asked = urllib.request.Request(address, headers={"Accept": INDEX_TYPE})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            files = json.load(answer)["files"]
        found = [file["url"] for file in files if file["hashes"].get("sha256") == source.sha256]
        if not found:
            raise CorpusError(f"{address} names no file with SHA-256 {source.sha256}")
        whole = urllib.parse.urljoin(address, found[0])
        with urllib.request.urlopen(whole, timeout=300) as answer:
            data = answer.read()
    except OSError as problem:
        raise CorpusError(f"cannot download {source.name} {source.version}: {problem}") from problem
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise CorpusError(f"{whole} is not the file with SHA-256 {source.sha256}")
    partial = path.with_suffix(".part")
    partial.write_bytes(data)
    partial.rename(path)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def texts(packages: list[Path]) -> Iterator[str]:
    """Yield the documents of source distributions, each text once, in an order that is fixed."""
    seen = set()
    for package in packages:
        with tarfile.open(package) as archive:
            members = [member for member in archive if _is_wanted(member)]
            for member in sorted(members, key=lambda member: member.name):
                file = archive.extractfile(member)
                assert file is not None  # only of what is no file
                data = file.read()
                digest = hashlib.sha256(data).digest()
                if digest in seen:
                    continue
                seen.add(digest)
                with contextlib.suppress(UnicodeDecodeError):  # of another encoding, or no text
                    yield data.decode()


def _is_wanted(member: tarfile.TarInfo) -> bool:
    return (
        member.isfile()
        and member.name.endswith(SUFFIXES)
        and EXCLUDED_WORD not in member.name
        and SMALLEST_FILE <= member.size <= LARGEST_FILE
    )


def is_held_out(text: str) -> bool:
    """Return whether a document belongs to the validation split."""
    return zlib.crc32(text.encode()) % HELD_OUT == 0


def train_tokenizer(documents: Iterator[str], prefix: Path, vocabulary: int) -> None:
    """Train SentencePiece on every 8th document; writes PREFIX.model and PREFIX.vocab."""
    learned_from = itertools.islice(documents, 0, None, LEARNED_FROM)
    lines = (line for text in learned_from for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(prefix),
        vocab_size=vocabulary,
        model_type="bpe",
        # Every text can be written, and is read back as it was.
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        # Indentation.
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        split_digits=True,
        character_coverage=0.9999,
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )


def build(output: Path, sources: Path, vocabulary: int, held_out: int) -> dict[str, object]:
    """Write tokenizer and both splits; return the description that is stored beside them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # takes seconds

    (output / "sources").mkdir(parents=True, exist_ok=True)
    pinned = read_sources(sources)
    packages = []
    for number, source in enumerate(pinned, 1):
        print(f"  {number}/{len(pinned)} {source.name} {source.version}", flush=True)
        packages.append(fetch(source, output / "sources"))
    print("  tokenizer", flush=True)
    train_tokenizer(texts(packages), output / "tokenizer", vocabulary)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(output / "tokenizer.model"))
    builders = {
        split: IndexedDatasetBuilder(str(output / f"{split}_document.bin"), dtype=numpy.uint16)
        for split in ("train", "valid")
    }
    tokens, documents = dict.fromkeys(builders, 0), dict.fromkeys(builders, 0)
    digest, size = hashlib.sha256(), 0
    for batch in itertools.batched(texts(packages), ENCODED_AT_ONCE):
        encoded = tokenizer.encode(list(batch), num_threads=os.cpu_count() or 1)
        for text, ids in zip(batch, encoded, strict=True):
            split = "valid" if is_held_out(text) else "train"
            ids.append(tokenizer.eos_id())
            if split == "valid":
                ids = ids[: held_out - tokens[split]]
            if not ids:
                continue
            builders[split].add_document(torch.tensor(ids, dtype=torch.int32), [len(ids)])
            tokens[split] += len(ids)
            documents[split] += 1
            data = text.encode()
            digest.update(data + b"\0")
            size += len(data)
        print(f"\r  {sum(tokens.values()):,} tokens", end="", flush=True)
    print()
    if tokens["valid"] < held_out:
        raise CorpusError(
            f"1 in {HELD_OUT} documents are {tokens['valid']:,} tokens, fewer than the "
            f"{held_out:,} of --held-out-tokens"
        )
    for split, builder in builders.items():
        builder.finalize(str(output / f"{split}_document.idx"))
    return {
        "source": f"code and documentation of {len(pinned)} packages of the Python Package Index",
        "bytes": size,
        "tokens": tokens,
        "documents": documents,
        "vocabulary": vocabulary,
        "sources_sha256": _sha256(sources),
        "text_sha256": digest.hexdigest(),
        "sentencepiece": sentencepiece.__version__,
    }


def main() -> None:
    """Build the corpus, or reuse one of the same sources."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path, help="folder for tokenizer and datasets")
    parser.add_argument(
        "--sources", type=Path, default=SOURCES, metavar="FILE", help="pinned packages"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=50304, metavar="N", help="pieces (default: 50304)"
    )
    parser.add_argument(
        "--held-out-tokens",
        type=int,
        default=HELD_OUT_TOKENS,
        metavar="N",
        help=f"of validation (default: {HELD_OUT_TOKENS})",
    )
    options = parser.parse_args()
    described = options.output / "corpus.json"
    if described.is_file():
        description = json.loads(described.read_text())
        made_from = (_sha256(options.sources), options.vocabulary, options.held_out_tokens)
        tokens = description["tokens"]["valid"]
        if made_from == (description["sources_sha256"], description["vocabulary"], tokens):
            print(f"corpus: reusing {options.output}")
            return
        described.unlink()
    try:
        description = build(
            options.output, options.sources, options.vocabulary, options.held_out_tokens
        )
    except CorpusError as problem:
        raise SystemExit(f"quality_corpus: error: {problem}") from None
    described.write_text(json.dumps(description, indent=2) + "\n")
    print(f"corpus: {description['tokens']} tokens of {description['documents']} documents")


if __name__ == "__main__":
    main()
