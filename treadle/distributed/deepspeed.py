"""The step by DeepSpeed (Rajbhandari et al. 2020, arXiv 1910.02054): ZeRO stages 0 to 3, as its JSON file says.

treadle hands over its AdamW and its learning rates, and takes whole weights and moments back for a checkpoint, so that a
run may go on under any other mode. DeepSpeed's own checkpoints are pickles and are not written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treadle.distributed.base import Strategy
from treadle.distributed.launch import free_port
from treadle.distributed.world import World
from treadle.errors import ConfigError, Diverged, MissingExtra

MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(device: torch.device) -> Any:
    """The package, told not to compile anything for a CPU: a first use would otherwise build for minutes. MissingExtra
    without it."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        import deepspeed
    except ImportError:
        raise MissingExtra("parallel.mode = deepspeed", "deepspeed") from None
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeed(Strategy):
    """A DeepSpeed engine around the module; it exists once the optimiser was handed over."""

    mode = "deepspeed"
    engine_owns_step = True

    def __init__(self, module: torch.nn.Module, world: World, table: dict[str, Any], device: torch.device) -> None:
        super().__init__(module, world)
        if device.type == "cpu" and table.get("fp16", {}).get("enabled"):
            raise ConfigError("DeepSpeed has no fp16 on a CPU; use --precision bf16 or fp32")
        self.package, self.table, self.device = import_deepspeed(device), table, device
        self.stage = int(table.get("zero_optimization", {}).get("stage", 0))
        self.shards_weights = False  # whole weights are gathered for a checkpoint
        self.loss_factor = float(world.size)
        if not dist.is_initialized():  # one process: DeepSpeed wants a group all the same
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1,
                                    init_method=f"tcp://127.0.0.1:{free_port()}")  # fmt: skip

    @property
    def full_weights_need_all_ranks(self) -> bool:
        return self.stage == 3

    def attach_optimizers(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Makes the engine around the one optimiser; ConfigError for any but adamw."""
        if len(optimizers) != 1 or not isinstance(optimizers[0], torch.optim.AdamW):
            raise ConfigError("parallel.mode = deepspeed works with optim.name = adamw; --parallel ddp takes every optimiser")
        self.named = [(n, p) for n, p in self.plain.model.named_parameters() if p.requires_grad]  # type: ignore[union-attr]
        self.base = optimizers[0]
        # AdamW's step is called through a class of ours derived from it (training/optim.py); DeepSpeed looks at the class alone.
        table = {**self.table, "zero_allow_untested_optimizer": True}
        alone = "LOCAL_RANK" not in os.environ
        if alone:  # DeepSpeed asks for what a launcher sets, also of one process; ours is not to be seen as started by one
            os.environ["LOCAL_RANK"] = "0"
        try:
            self.engine, *_ = self.package.initialize(model=self.plain, optimizer=self.base, config=table)
        finally:
            if alone:
                del os.environ["LOCAL_RANK"]
        self.module = self.engine
        if self.stage > 0:
            self._create_moments()

    def _create_moments(self) -> None:
        """A resumed run needs a place for its moments before any step. And at stages 1 and 2 DeepSpeed links moments to
        parameters after the first group's first step, when the other groups have none yet (seen in 0.19)."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            parts = optimizer.fp32_partitioned_groups_flat
        else:
            parts = [flat for group in self.base.param_groups for flat in group["params"]]
        for flat in parts:
            if flat is not None:  # None: swapped out to a disk
                self.base.state[flat] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if self.stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()

    def with_full_weights(self, work: Callable[..., Any], *arguments: Any) -> Any:
        # Stage 3's hooks want an output that they can walk through.
        return self.plain(*arguments, work=lambda *given: {"found": work(*given)})["found"]

    def files(self) -> dict[str, Any]:
        return {"deepspeed.json": self.table}

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch

    def step(self, apply: bool) -> float:
        """The update, or (apply=False) none; the norm of the gradients before clipping. Diverged when they were not
        finite and are applied already."""
        if not apply:
            self._discard()
            return math.nan
        before = self._plain_norm()
        if self.stage == 0 and not math.isfinite(before):
            self._discard()
            return math.nan
        self.engine.step()
        if getattr(self.engine.optimizer, "overflow", False):  # ZeRO has looked and left the weights alone
            return math.nan
        norm = self.engine.get_global_grad_norm()
        found = before if norm is None else float(norm)
        if not math.isfinite(found):
            raise Diverged("the gradients were not finite and DeepSpeed has applied them; the last checkpoint is intact, and "
                           "the same command continues from it")  # fmt: skip
        return found

    def _plain_norm(self) -> float:
        """Of gradients that lie on the parameters (stage 0)."""
        gradients = [p.grad for _, p in self.named if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else math.nan

    def _discard(self) -> None:
        """Drops the gradients of this step wherever DeepSpeed keeps them."""
        self.engine.micro_steps += 1
        optimizer = self.engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        for _, parameter in self.named:
            parameter.grad = None
        averaged = getattr(optimizer, "averaged_gradients", None)
        if isinstance(averaged, dict):
            averaged.clear()
        if self.stage in (1, 2):  # counted before each backward pass there; stage 3 counts after it, from zero_grad's 0
            optimizer.micro_step_id = -1
        buffers = getattr(optimizer, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", None)
        for buffer in (buffers or {}).values():
            buffer.zero_()

    # ---- whole tensors, for checkpoints ----

    def _zero(self) -> bool:
        return any(hasattr(self.named[0][1], mark) for mark in ("ds_id", "_hp_mapping"))

    def gather_full_state(
        self, weights: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not self._zero():  # stage 0 in fp32: torch's own parameters and state
            return weights, state
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights, state = dict(weights) if self.world.is_main_process else {}, {}
        steps = torch.tensor(self._steps())

        def keep(into: dict[str, Tensor], name: str, whole: Tensor, parameter: Tensor) -> None:
            """On the process that writes; 12 bytes a parameter on each would fill a machine of eight."""
            if self.world.is_main_process:
                into[name] = whole.detach().cpu().reshape(self._shape(parameter)).clone()

        for name, parameter in self.named:  # every process takes part in gathering
            keep(weights, name, safe_get_full_fp32_param(parameter), parameter)
            for key in MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, key)
                if moment is not None:
                    keep(state, f"{name}|{key}", moment, parameter)
                    state[f"{name}|step"] = steps.clone()
        return weights, state

    def load_full_state(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
        """Takes whole weights and moments over; False when the plain way works."""
        if not self._zero():
            return False
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.named:
            value = weights[name].to(self.device, torch.float32)
            safe_set_full_fp32_param(parameter, value)
            with self.package.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.data.copy_(value)
            for key in MOMENTS:
                if f"{name}|{key}" in state:
                    safe_set_full_optimizer_state(parameter, state[f"{name}|{key}"].to(self.device), key)
        steps = [float(value) for name, value in state.items() if name.endswith("|step")]
        for kept in self.base.state.values():
            if "step" in kept and steps:
                kept["step"] = torch.tensor(steps[0], device=kept["step"].device)
        return True

    def _steps(self) -> float:
        found = [float(kept["step"]) for kept in self.base.state.values() if "step" in kept]
        return max(found, default=0.0)

    @staticmethod
    def _shape(parameter: Tensor) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)
