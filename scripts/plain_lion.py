"""Lion for every parameter in stock Megatron, for flash_lion to be compared with.

Megatron's ``--optimizer lion`` (0.18 and 0.19) is something else: the package emerging-optimizers'
Lion for matrices, with Adam's decay rates (``--adam-beta1``, ``--adam-beta2``), and Adam for word
embeddings, the output layer, norms and biases. ``use_as_megatrons_lion`` puts the same class, with
``--lion-beta1`` and ``--lion-beta2``, in charge of all of them.
"""

from __future__ import annotations

from typing import Any


def _options(config: Any, *_: Any) -> dict[str, Any]:
    """Return Lion's arguments by Megatron's ``OptimizerConfig``."""
    return {
        "lr": config.lr,
        "betas": (config.lion_beta1, config.lion_beta2),
        "weight_decay": config.weight_decay,
    }


def use_as_megatrons_lion() -> None:
    """Let stock Megatron in this process give all parameters to Lion for ``optimizer="lion"``.

    With several data-parallel ranks, do without ``--use-distributed-optimizer``: its layer-wise
    shards hold matrices only.

    Raises:
        ImportError: the package emerging-optimizers is not installed.
    """
    from emerging_optimizers.scalar_optimizers import Lion
    from megatron.core.optimizer import emerging_optimizers as megatrons

    megatrons._EMERGING_OPTIMIZERS["lion"] = megatrons.EmergingOptimizerEntry(
        optimizer_cls=Lion, config_to_kwargs=_options, default_param_overrides={}
    )
