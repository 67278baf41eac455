"""``megatron-flashoptim inspect`` of 100 layers: what it says of them, and that it can be read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from console import run
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig
from megatron_flashoptim.codec.spec import FORMAT_VERSION

LAYERS, HIDDEN, VOCAB = 100, 32, 256
FC1 = "decoder.layers.*.mlp.linear_fc1.weight"
# Elements of each tensor. Without biases they are half as many, and so are the seconds.
OF_LAYERS = {
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": HIDDEN,
    FC1: HIDDEN * HIDDEN,
    "decoder.layers.*.mlp.linear_fc2.weight": HIDDEN * HIDDEN,
    "decoder.layers.*.self_attention.linear_proj.weight": HIDDEN * HIDDEN,
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": HIDDEN,
    "decoder.layers.*.self_attention.linear_qkv.weight": 3 * HIDDEN * HIDDEN,
}
OTHERS = {
    "decoder.final_layernorm.weight": HIDDEN,
    "embedding.word_embeddings.weight": VOCAB * HIDDEN,
}
PARAMETERS = LAYERS * sum(OF_LAYERS.values()) + sum(OTHERS.values())


class Deep(NamedTuple):
    """What ``inspect`` printed, and the report it wrote."""

    printed: str
    page: str


def _save(folder: Path) -> None:
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(
        tiny_gpt.Setup(
            flash=FlashOptimConfig("flash_lion"),
            layers=LAYERS,
            hidden=HIDDEN,
            vocab=VOCAB,
            transformer={
                "ffn_hidden_size": HIDDEN,
                "normalization": "RMSNorm",
                "add_bias_linear": False,
            },
        )
    )
    trainer.train(1)
    checkpoints.save(trainer, folder, "fully_reshardable")


@pytest.fixture(scope="module")
def deep(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Deep:
    folder = tmp_path_factory.mktemp("deep")
    checkpoint = folder / "iter_0000001"
    checkpoint.mkdir()
    run_ranks(1, _save, checkpoint)
    report = folder / "report.html"
    done = run("inspect", str(checkpoint), "--report", str(report))
    assert (done.returncode, done.stderr) == (0, "")
    return Deep(done.stdout, report.read_text())


def test_format_layout_and_bytes_of_each_kind_are_printed(deep: Deep) -> None:
    described, of_bytes, *_ = deep.printed.split("\n\n")
    fields = dict(line.split(maxsplit=1) for line in described.splitlines()[1:])
    assert fields["iteration"] == "1"
    assert fields["optimizer"].startswith("flash_lion, 24-bit masters, groups of 32, ")
    assert fields["layout"] == "fully_reshardable, torch_dist"
    assert fields["versions"].startswith(f"flash format {FORMAT_VERSION} ")
    header, *rows = of_bytes.splitlines()
    assert header.split() == "bytes dtype tensors elements bytes per parameter".split()
    tensors, scales = str(len(OF_LAYERS) + len(OTHERS)), PARAMETERS // 32
    assert [row.split() for row in rows] == [
        ["weights", "bfloat16", tensors, str(PARAMETERS), str(2 * PARAMETERS), "2.000"],
        ["correction", "int8", tensors, str(PARAMETERS), str(PARAMETERS), "1.000"],
        ["exp_avg", "int8", tensors, str(PARAMETERS), str(PARAMETERS), "1.000"],
        ["exp_avg_scale", "bfloat16", tensors, str(scales), str(2 * scales), "0.062"],
        ["all", str(4 * int(tensors)), str(4 * PARAMETERS + 2 * scales), "4.062"],
    ]


def test_tables_have_a_line_per_tensor_whatever_the_depth(deep: Deep) -> None:
    assert max(map(len, deep.printed.splitlines()[1:])) <= 200
    tables = deep.printed.split("\n\n")[2:4]
    assert [table.split()[0] for table in tables] == ["masters", "first"]
    for table in tables:
        rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
        assert list(rows) == [*sorted({**OF_LAYERS, **OTHERS}), "all"]
        assert {name for name, row in rows.items() if row[0] == str(LAYERS)} == set(OF_LAYERS)
        for name in OF_LAYERS:
            assert 0 <= int(rows[name][4]) < LAYERS, "the layer of the largest norm"
    assert len(deep.printed.splitlines()) < 50


def test_report_is_as_high_as_of_few_layers_and_lists_them_on_demand(deep: Deep) -> None:
    shown, _, on_demand = deep.page.partition("<details>")
    sizes = re.findall(r'<svg [^>]*width="([\d.]+)pt" height="([\d.]+)pt"', shown)
    assert len(sizes) == 4, "masters and moments, over depth and as distributions"
    for width, height in sizes:
        assert float(width) == 17 * 72 and float(height) < 5 * 72
    assert all(f">{layer}</text>" in shown for layer in range(0, LAYERS, 10)), "along an axis"
    assert f"\n{FC1} " in shown
    last = f"\n  {LAYERS - 1} "
    assert (shown.count(last), on_demand.count(last)) == (0, 2 * len(OF_LAYERS))
