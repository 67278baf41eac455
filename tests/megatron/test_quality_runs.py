"""``scripts/quality_corpus.py`` and ``scripts/quality.py``: corpus, a stopped run, the table."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import threading
from pathlib import Path

import pytest
import quality
import quality_corpus
import quality_report
import sentencepiece
from quickstart_runs import RunFailed

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
VOCABULARY, HELD_OUT = 512, 4 * 64 * 2 + 1
ONCE = "# held twice\n" * 50
TINY = f"""--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 64
--micro-batch-size 4 --global-batch-size 4 --train-iters 30 --lr-warmup-iters 5
--vocab-size {VOCABULARY}""".split()


def _package(folder: Path) -> str:
    """Write a source distribution of part of the standard library; returns its line."""
    library = Path(sysconfig.get_path("stdlib"))
    path = folder / "sources" / "stdlib-1.0.tar.gz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for name in ("asyncio", "email", "http", "json", "logging", "xml", "test/support"):
            archive.add(library / name, f"stdlib-1.0/{name}", filter=_only_python)
        for name in ("first.txt", "second.txt"):
            (folder / name).write_text(ONCE)
            archive.add(folder / name, f"stdlib-1.0/{name}")
        (folder / "latin.txt").write_bytes("naïve ".encode("latin-1") * 100)
        archive.add(folder / "latin.txt", "stdlib-1.0/latin.txt")
    return f"stdlib 1.0 {hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def _only_python(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


def _corpus(folder: Path, sources: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "quality_corpus.py"), str(folder)]
    command += ["--sources", str(sources), "--vocabulary", str(VOCABULARY)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "corpus"
    sources = folder.parent / "sources.txt"
    sources.write_text(f"# one\n\n{_package(folder)}")
    done = _corpus(folder, sources, "--held-out-tokens", str(HELD_OUT))
    assert done.returncode == 0, done.stderr
    return folder


def test_documents_are_read_back_as_they_were(text_corpus: Path, megatron: None) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = list(quality_corpus.texts([text_corpus / "sources" / "stdlib-1.0.tar.gz"]))
    assert len(documents) > 90 and documents.count(ONCE) == 1
    assert not any("na" in text and "ve na" in text for text in documents), "not UTF-8"
    names = ("record_original_stdout", "class JSONEncoder")
    assert [any(name in text for text in documents) for name in names] == [False, True]
    model = str(text_corpus / "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    assert tokenizer.vocab_size() == VOCABULARY
    train = [text for text in documents if not quality_corpus.is_held_out(text)]
    stored = IndexedDataset(str(text_corpus / "train_document"))
    assert len(stored) == len(train)
    for number in (0, 1, len(train) - 1):
        *ids, end = stored[number].tolist()
        assert end == tokenizer.eos_id() and tokenizer.decode(ids) == train[number]


def test_what_is_held_out_fills_batches_and_is_not_trained_on(
    text_corpus: Path, megatron: None
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    described = json.loads((text_corpus / "corpus.json").read_text())
    held_out = IndexedDataset(str(text_corpus / "valid_document"))
    assert sum(held_out.sequence_lengths) == described["tokens"]["valid"] == HELD_OUT
    assert described["tokens"]["train"] > 100 * HELD_OUT
    texts = list(quality_corpus.texts([text_corpus / "sources" / "stdlib-1.0.tar.gz"]))
    model = str(text_corpus / "tokenizer.model")
    first = sentencepiece.SentencePieceProcessor(model_file=model).decode(held_out[0].tolist()[:99])
    assert [quality_corpus.is_held_out(text) for text in texts if text.startswith(first)] == [True]


def test_a_corpus_is_reused_and_a_wrong_one_refused(text_corpus: Path, tmp_path: Path) -> None:
    sources = text_corpus.parent / "sources.txt"
    done = _corpus(text_corpus, sources, "--held-out-tokens", str(HELD_OUT))
    assert done.stdout.startswith("corpus: reusing")
    broken = tmp_path / "sources.txt"
    broken.write_text("stdlib 1.0\n")
    done = _corpus(tmp_path / "corpus", broken)
    assert done.returncode == 1
    assert done.stderr.endswith(f"error: {broken}:1: not NAME VERSION SHA256: stdlib 1.0\n")


def test_every_source_is_pinned_once() -> None:
    sources = quality_corpus.read_sources(quality_corpus.SOURCES)
    assert len({source.name for source in sources}) == len(sources) > 50
    assert all(re.fullmatch(r"[0-9a-f]{64}", source.sha256) for source in sources)


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    quality.main()


def test_a_stopped_run_goes_on_where_it_was(
    text_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Stopped as by ``--minutes``, but after 20 iterations; then up to the end, and reused."""
    arguments = ["--output", str(tmp_path), "--corpus", str(text_corpus), "--device", "cpu"]
    arguments += ["--only", "d", "--optimizers", "flash_lion", "--seeds", "7"]
    arguments += ["--", *TINY, "--eval-interval", "15"]
    command_of = quality.command_of
    stop = ["--exit-interval", "20"]
    monkeypatch.setattr(quality, "command_of", lambda *args: [*command_of(*args), *stop])
    _main(monkeypatch, "--report", *arguments)
    assert capfd.readouterr().out.endswith("\n0 of 1 runs are finished\n")
    _main(monkeypatch, "--parallel", "2", *arguments)
    assert "stopped, to go on from its checkpoint\n0 of 1 runs" in capfd.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / "shared-gpu").rename(tmp_path / "shared-gpu")
    stop.clear()
    _main(monkeypatch, *arguments)
    printed = capfd.readouterr().out
    assert "1 of 1 runs are finished" in printed and "seed 7: finished" in printed
    first, second = ((folder / f"log-{number}.txt").read_text() for number in (1, 2))
    assert "iteration       20/      30" in first and "iteration       21/" not in first
    assert "iteration       20/" not in second and "iteration       30/      30" in second
    record = json.loads((tmp_path / "quality.json").read_text())
    (run,) = record["runs"]
    assert set(run["validation"]) == {"15", "30"}
    assert run["iterations"] == 30 and len(run["losses"]) == len(run["grad_norms"]) == 3
    assert run["losses"][0] > run["losses"][-1] > run["validation"]["30"] - 1
    assert run["iteration_ms"] > 0 and (tmp_path / "quality.png").stat().st_size > 10_000
    assert f"| d | flash_lion | 7 | {run['validation']['30']:.4f} (" in printed
    (tmp_path / "shared-gpu").rename(folder / "shared-gpu")
    _main(monkeypatch, *arguments)
    printed = capfd.readouterr().out
    assert "starts" not in printed and printed.rstrip().splitlines()[-4].endswith(" | - | - |")


def test_a_failed_run_keeps_no_other_from_the_report(
    text_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = []

    def run_logged(command: list[str], log: Path, *_: object, **__: object) -> None:
        if "adam" in command:
            raise RunFailed(f"exit code 1; {log.name}")
        Path(command[command.index("--finished") + 1]).touch()

    monkeypatch.setattr(quality, "run_logged", run_logged)
    monkeypatch.setattr(quality, "report", lambda _, __, runs: reported.extend(runs))
    arguments = ["--output", str(tmp_path), "--corpus", str(text_corpus), "--device", "cpu"]
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(RunFailed) as failed:
        _main(monkeypatch, *arguments, "--only", "a", "--seeds", "1", "2", "--stagger", "9")
    assert waited[0] == 0 and all(8 < seconds <= 9 for seconds in waited[1:])
    assert str(failed.value).splitlines() == [
        f"a: adam, seed {seed}: exit code 1; log-1.txt" for seed in (1, 2)
    ]
    finished = {run.name: run.commits for run in reported if run.finished.exists()}
    assert list(finished) == ["a: flash_adamw, seed 1", "a: flash_adamw, seed 2"]
    assert all(len(commits) == 1 for commits in finished.values())


def test_another_device_or_package_begins_anew(
    text_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = quality.parse(["--corpus", str(text_corpus), "--only", "a", "--seeds", "1"])
    setup = quality.choose_setup(argparse.Namespace(device="cpu", ranks=1))
    folders = {run.folder for run in quality.all_runs(options, setup)}
    assert folders == {run.folder for run in quality.all_runs(options, setup)}
    versions = {**setup.versions, "torch": "2.12"}
    for other in ({"hardware": "another"}, {"versions": versions}):
        changed = dataclasses.replace(setup, **other)
        assert not folders & {run.folder for run in quality.all_runs(options, changed)}


def test_accumulation_is_of_half_the_micro_batches_of_the_others(text_corpus: Path) -> None:
    """Also where another size is given behind ``--``, and of the last that is given."""
    setup = quality.choose_setup(argparse.Namespace(device="cpu", ranks=1))
    for given, halved in ((), "32"), (("--", "--micro-batch-size", "6"), "3"):
        options = quality.parse(["--corpus", str(text_corpus), "--only", "b", *given])
        runs = {run.optimizer: run for run in quality.all_runs(options, setup) if run.seed == 2}
        adam, accumulated = (runs[name].arguments for name in ("adam", quality.ACCUMULATED))
        assert accumulated == (*adam, "--micro-batch-size", halved)
        assert runs["adam"].folder != runs[quality.ACCUMULATED].folder


def _row(optimizer: str, seed: int, final: float) -> dict[str, object]:
    row = quality_report.Row("a", optimizer, seed, 20, {20: final}, [3.0], [1.0], 5.0, 0)
    return vars(row)


def test_layers_are_those_of_the_packages_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed or None)
    without = (*quality.CUDA_FLAGS, "--micro-batch-size", "8")
    assert quality._of_device("cuda", has_experts=True) == without
    installed.add("transformer_engine")
    flags = quality._of_device("cuda", has_experts=False)
    dense = (*quality.FUSED_LOSS, *quality.WITHOUT_MASK)
    assert flags == (*dense, "--no-gradient-accumulation-fusion")
    installed.add("fused_weight_gradient_mlp_cuda")  # of Apex
    assert quality._of_device("cuda", has_experts=True) == (*dense, *quality.GROUPED)


def test_the_table_compares_the_seeds_that_both_have() -> None:
    finals = {"adam": {1: 2.0, 2: 2.25, 3: 2.5}, "flash_adamw": {2: 2.375, 3: 2.375}}
    runs = [_row(name, seed, loss) for name, of in finals.items() for seed, loss in of.items()]
    described = {"title": "", "optimizers": dict.fromkeys(finals)}
    _, _, adam, flash = quality_report.table(
        json.loads(json.dumps({"runs": runs, "experiments": {"a": described}}))
    ).splitlines()
    assert adam == "| a | adam | 1, 2, 3 | 2.2500 (2.0000, 2.2500, 2.5000) | 0.5000 | - | 5 |"
    first = "| a | flash_adamw | 2, 3 | 2.3750 (2.3750, 2.3750) | 0.0000 | "
    assert flash == f"{first}+0.0000 ± 0.1768 | 5 |"


def test_pairs_are_those_of_the_same_seed() -> None:
    """Means of 50 iterations of what lies between two runs on the same batches."""
    from matplotlib.figure import Figure

    losses = {"adam": {1: [4.0] * 8, 2: [3.0] * 8}, "flash_adamw": {2: [3.5] * 8, 3: [1.0] * 8}}
    optimizers = {
        name: [
            dataclasses.replace(quality_report.Row(**_row(name, seed, 2.0)), losses=means)
            for seed, means in of.items()
        ]
        for name, of in losses.items()
    }
    axes = Figure().add_subplot()
    quality_report._draw_pairs(axes, optimizers)
    drawn = [line.get_xydata().tolist() for line in axes.lines[1:]]
    assert drawn == [[[50, 0.5], [60, 0.5], [70, 0.5], [80, 0.5]], []]


def _record(experiment: str, seeds: tuple[int, ...], **other: object) -> dict[str, object]:
    runs = [{**_row("adam", seed, 2.0), "experiment": experiment} for seed in seeds]
    described = {experiment: {"title": experiment, "optimizers": {"adam": []}}}
    common = {"device": "cpu", "versions": {"torch": "2"}, "corpus": {"tokens": 1}, "commit": "1"}
    return {**common, "commands": ["x"], "experiments": described, "runs": runs, **other}


def test_records_of_several_calls_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [_record("b", (1, 2)), _record("b", (3,), commit="2"), _record("a", (1,))]
    files = [tmp_path / f"{number}.json" for number in range(len(records))]
    for file, record in zip(files, records, strict=True):
        file.write_text(json.dumps(record))
    whole = tmp_path / "all.json"
    arguments = ["quality_report.py", *map(str, files), "--json", str(whole)]
    monkeypatch.setattr(sys, "argv", arguments)
    quality_report.main()
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert first.startswith("| a | adam | 1 | ") and second.startswith("| b | adam | 1, 2, 3 | ")
    written = json.loads(whole.read_text())
    assert written["commit"] == "1, 2" and written["commands"] == ["x"]
    later = {"title": "b", "optimizers": {"adam": [], "flash_adamw": ["--x"]}}
    changed = {"title": "b", "optimizers": {"adam": ["--y"]}}
    files[1].write_text(json.dumps(_record("b", (3,), experiments={"b": later})))
    quality_report.main()
    assert json.loads(whole.read_text())["experiments"]["b"] == later
    for other, told in (
        (_record("b", (3,), experiments={"b": changed}), "differ in what experiment b is"),
        (_record("b", (3,), experiments={"b": {**later, "title": ""}}), "what experiment b is"),
        (_record("b", (2,)), "have a run twice: b, adam, 2"),
        (_record("b", (3,), device="gpu"), "differ in device: cpu and gpu"),
    ):
        files[1].write_text(json.dumps(other))
        with pytest.raises(SystemExit, match=told):
            quality_report.main()


def test_a_table_names_no_time_of_runs_that_shared_a_gpu() -> None:
    (row,) = _record("a", (1,))["runs"]
    record = {**_record("a", ()), "runs": [{**row, "iteration_ms": None}]}
    assert quality_report.table(record).endswith(" | - | - |")


def test_a_source_is_fetched_from_an_index_and_its_bytes_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a simple index (PEP 691), with a relative address."""
    wanted = quality_corpus.Source("one", "1.0", hashlib.sha256(b"right").hexdigest())

    class Index(http.server.BaseHTTPRequestHandler):
        sent = b"right"

        def do_GET(self) -> None:
            files = [
                {"url": "../../wheel", "hashes": {}},
                {"url": "../../files/one.tar.gz", "hashes": {"sha256": wanted.sha256}},
            ]
            pages = {
                "/simple/one/": json.dumps({"files": files}).encode(),
                "/files/one.tar.gz": self.sent,
            }
            found = self.path in pages
            as_json = self.headers["Accept"] == "application/vnd.pypi.simple.v1+json"
            assert as_json == self.path.startswith("/simple/")
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/simple"
        monkeypatch.setattr(quality_corpus, "INDEX", address)
        Index.sent = b"wrong"
        with pytest.raises(quality_corpus.CorpusError, match="is not the file with SHA-256"):
            quality_corpus.fetch(wanted, tmp_path)
        Index.sent = b"right"
        path = quality_corpus.fetch(wanted, tmp_path)
        assert path.read_bytes() == b"right" and list(tmp_path.iterdir()) == [path]
        unknown = quality_corpus.Source("one", "1.0", "0" * 64)
        with pytest.raises(quality_corpus.CorpusError, match="names no file with SHA-256 0000"):
            quality_corpus.fetch(unknown, tmp_path)
        missing = quality_corpus.Source("two", "1.0", wanted.sha256)
        with pytest.raises(quality_corpus.CorpusError, match=r"cannot download two 1\.0"):
            quality_corpus.fetch(missing, tmp_path)
        server.shutdown()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--minutes", "2"), "--minutes 2: at least 3"),
        (("--corpus", "nowhere"), "nowhere: no finished corpus; python scripts/quality_corpus.py"),
        (("--only", "z"), "invalid choice: 'z'"),
        (
            ("--only", "d", "--optimizers", "adam"),
            "--optimizers adam: not one of flash_lion; lion; stock lion",
        ),
    ],
)
def test_wrong_options_are_refused(
    text_corpus: Path,
    arguments: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        quality.parse(["--corpus", str(text_corpus), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
