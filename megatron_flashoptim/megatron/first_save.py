"""Looks, before training, whether the training loop's first save will be possible.

``fully_reshardable`` cannot hold the state of a model of whose layers some are frozen, or some in
fp32. Without this, that would be found out when the first checkpoint is saved, after hours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.utils import unwrap_model

from megatron_flashoptim.checkpoint.together import on_all_ranks
from megatron_flashoptim.megatron.training_args import training_args

if TYPE_CHECKING:
    from megatron_flashoptim.megatron.chained import FlashChainedOptimizer

# Characters of an error of Megatron's.
_SHOWN = 200


def check_first_save(optimizer: FlashChainedOptimizer) -> None:
    """Refuse what the run could not save, if it saves and is Megatron's training loop's.

    A collective of all ranks. Costs what mapping the model's tensors and one gather of their keys
    cost, which the first save is then spared.

    Args:
        optimizer: just built, with its model chunks.

    Raises:
        ValueError: as ``FlashChainedOptimizer.check_can_be_saved``, or Megatron cannot make the
            model's state dict; on all ranks.
    """
    args = training_args()
    if args is None or not _saves_in_model_space(args) or not optimizer.model_chunks:
        return
    from megatron.training import checkpointing

    model = unwrap_model(optimizer.model_chunks)
    # As the training loop's save_checkpoint does, since Megatron's models depend on it.
    groups = getattr(model[0], "pg_collection", None)
    content = checkpointing._build_sharded_state_dict_metadata(
        args, dp_cp_group=getattr(groups, "dp_cp_gtp_remat", None)
    )

    def sharded_model() -> Any:
        try:
            return checkpointing.generate_state_dict(
                args, model, None, None, None, model_sd_kwargs={"metadata": content}
            )
        except Exception as problem:  # of Megatron's models, which may list all their tensors
            raise ValueError(
                f"Megatron could not save this model to --save, which is tried before training: "
                f"{type(problem).__name__}: {str(problem)[:_SHOWN]}; change the model, or train "
                "without --save"
            ) from problem

    optimizer.check_can_be_saved(on_all_ranks(sharded_model), content)


def _saves_in_model_space(args: Any) -> bool:
    return bool(
        getattr(args, "save", None)
        and getattr(args, "ckpt_format", None) == "torch_dist"
        and getattr(args, "dist_ckpt_optim_fully_reshardable", False)
        and not getattr(args, "no_save_optim", False)
        and not getattr(args, "skip_train", False)
    )
