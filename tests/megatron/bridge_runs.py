"""Megatron-Bridge's own ``pretrain`` on forked CPU ranks, from the recipe of docs/bridge.md.

Bridge imports Transformer Engine wherever it is imported, for the annotations of one class of LoRA
layers. Where it is not installed, an empty module stands in for Transformer Engine while Bridge is
imported, and for nothing else: the model's layers are Megatron's local ones.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from checkpoints import fork_queue_of_results

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "bridge.md"


@contextmanager
def _importable_transformer_engine() -> Iterator[None]:
    if importlib.util.find_spec("transformer_engine") is not None:
        yield
        return
    names = ("transformer_engine", "transformer_engine.pytorch")
    modules = {name: ModuleType(name) for name in names}
    package, pytorch = modules.values()
    package.__path__, pytorch.__path__ = [], []
    package.pytorch = pytorch
    pytorch.ops = SimpleNamespace(Sequential=object)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def import_bridge() -> None:
    """Import Bridge in this process, so that forked ranks have it already."""
    from megatron_flashoptim.megatron.launching import skip_compilation_of_built_helpers

    skip_compilation_of_built_helpers()
    with _importable_transformer_engine():
        for name in ("training.gpt_step", "training.pretrain", "recipes.gpt.h100.vanilla_gpt"):
            importlib.import_module(f"megatron.bridge.{name}")
    importlib.import_module("megatron_flashoptim.megatron.bridge")


def documented_recipe() -> Any:
    """Return the configuration that the example in the documentation makes."""
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    return names["cfg"]


def stock_recipe() -> Any:
    """Return the same recipe as Bridge has it."""
    from megatron.bridge.recipes.gpt.h100 import vanilla_gpt

    return vanilla_gpt.vanilla_gpt_pretrain_1gpu_h100_bf16_config()


def shrink(cfg: Any, corpus: Path, folder: Path, steps: int) -> Any:
    """Make a recipe that of a tiny GPT on real text, for machines without a GPU too."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    model = cfg.model
    model.num_layers, model.hidden_size, model.num_attention_heads = 2, 64, 4
    model.seq_length = cfg.dataset.seq_length = 64
    model.hidden_dropout = model.attention_dropout = 0.0
    model.transformer_layer_spec, model.transformer_impl = local_layer_spec, "local"
    for fusion in (
        *("masked_softmax_fusion", "gradient_accumulation_fusion", "bias_activation_fusion"),
        *("bias_dropout_fusion", "cross_entropy_loss_fusion", "persist_layer_norm"),
    ):
        setattr(model, fusion, False)
    model.use_cpu_initialization = True
    cfg.dist.distributed_backend = "gloo"
    cfg.tokenizer.vocab_size = 257
    cfg.dataset.num_workers = 0
    cfg.dataset.blend = ([str(corpus / "train_document")], None)
    cfg.dataset.split = "90,5,5"  # a split without documents is never done being built
    cfg.dataset.path_to_cache = str(corpus / "cache")
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size = steps, 4, 2
    cfg.scheduler.lr_warmup_iters, cfg.scheduler.lr_decay_iters = 0, 8
    cfg.validation.eval_iters = 0
    cfg.optimizer.lr, cfg.optimizer.min_lr = 1e-3, 1e-4
    cfg.logger.log_interval, cfg.logger.tensorboard_dir = 1, None
    cfg.checkpoint.save = cfg.checkpoint.load = str(folder)
    return cfg


def pretrain(cfg: Any) -> dict[str, Any]:
    """Train on this rank; returns losses by iteration, and what was there at the end."""
    from megatron.bridge.training import gpt_step, initialize, setup, train
    from megatron.bridge.training import pretrain as bridge
    from megatron.bridge.training.callbacks import CallbackManager
    from megatron.core.utils import get_model_config

    fork_queue_of_results()
    if not torch.cuda.is_available():
        setup.initialize_megatron = functools.partial(
            initialize.initialize_megatron, allow_no_cuda=True
        )
    found: dict[str, Any] = {"losses": {}}

    def after_step(context: Any) -> None:
        loss = context.loss_dict["lm loss"]
        found["losses"][context.state.train_state.step + 1] = float(loss)  # not yet counted

    def at_end(context: Any) -> None:
        optimizer = context.optimizer
        found["optimizer"] = type(optimizer).__name__
        if found["optimizer"] == "FlashChainedOptimizer":
            found["bytes"] = optimizer.state_bytes() / optimizer.owned_parameters()
            config = get_model_config(context.model[0])
            found["norm"] = float(train.calc_params_l2_norm(context.model, config))
            found["exact norm"] = _norm_of_masters(optimizer)

    manager = CallbackManager()
    manager.register("on_train_step_end", after_step)
    manager.register("on_train_end", at_end)
    bridge.pretrain(cfg, gpt_step.forward_step, callbacks=manager)
    return found


def _norm_of_masters(optimizer: Any) -> float:
    from megatron_flashoptim.codec import join_master

    total = torch.zeros((), dtype=torch.float64)
    for member in optimizer.chained_optimizers:
        for item in member.shard_params:
            shard, own = member.optimizer.shards[item.shard], slice(item.start, item.end)
            total += join_master(shard.param[own], shard.correction[own]).double().square().sum()
    torch.distributed.all_reduce(total)
    return float(total.sqrt())
