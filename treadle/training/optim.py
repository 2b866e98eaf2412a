"""Changes weights when it steps: optimisers as one object, with parameter groups by rule and a state by parameter name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError, ShapeError
from treadle.models.base import Model, ParameterRule
from treadle.ops.quick_start import optimizers_without_compiler, stepping_without_compiler
from treadle.ops.sharding import is_sharded
from treadle.registry import Registry
from treadle.training.muon import Muon, NorMuon
from treadle.training.settings import OptimSettings
from treadle.training.soap import SOAP
from treadle.training.weight_average import UPDATES, WEIGHT, WeightAverage, resume_weights

OPTIMIZERS = Registry(
    "optimizer", {"adamw": "treadle.training.optim:make_adamw", "muon": "treadle.training.optim:make_muon",
                  "normuon": "treadle.training.optim:make_normuon",
                  "soap": "treadle.training.optim:make_soap"}
)  # fmt: skip

Named = list[tuple[str, nn.Parameter]]

# What each optimiser keeps of a parameter. One that finds another's state in a checkpoint (--allow-change optim.name) begins anew.
STATE_KEYS: tuple[tuple[type[torch.optim.Optimizer], frozenset[str]], ...] = (
    (torch.optim.AdamW, frozenset({"step", "exp_avg", "exp_avg_sq"})),
    (NorMuon, frozenset({"momentum_buffer", "second_momentum_buffer"})),
    (Muon, frozenset({"momentum_buffer"})),
    (SOAP, frozenset({"step", "exp_avg", "exp_avg_sq", "left", "right", "left_basis", "right_basis"})),
)


def _own_state(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a parameter's saved state the optimiser goes on from: all that is its own, nothing of another's. Muon and NorMuon have one
    momentum in common."""
    own = next((keys for kind, keys in STATE_KEYS if isinstance(optimizer, kind)), frozenset(saved))
    if isinstance(optimizer, Muon):
        return {key: tensor for key, tensor in saved.items() if key in own and "momentum_buffer" in saved}
    return saved if own == saved.keys() else {}


def grouped(model: Model, settings: OptimSettings, width_power: float = 1.0) -> dict[tuple[float, float], Named]:
    """(learning-rate multiplier, weight decay) -> parameters. Matrices decay, vectors do not, unless a rule says so.

    width_power: an update of a matrix whose rule has a width_ratio r is r ** width_power as large: 1 where each number moves
    by the rate (Adam; Yang et al. 2022, arXiv 2203.03466, table 8), 1/2 where the whole update is orthogonal and scaled by
    the root of its width (the spectral condition of Yang et al. 2023, arXiv 2310.17813)."""
    rules = model.parameter_rules()
    groups: dict[tuple[float, float], Named] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = rules.get(name, ParameterRule())
        decays = parameter.dim() >= 2 if rule.weight_decay is None else rule.weight_decay
        key = (rule.learning_rate_multiplier * rule.width_ratio**width_power, settings.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append((name, parameter))
    return groups


def _torch_groups(groups: dict[tuple[float, float], Named], rate: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for _, p in named], "names": [n for n, _ in named], "lr": rate * multiplier,
         "multiplier": multiplier, "weight_decay": decay}
        for (multiplier, decay), named in groups.items()
    ]  # fmt: skip


def make_adamw(model: Model, settings: OptimSettings, sharded: bool = False) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); fused is 2.8x faster than the for-loop form on CPU.

    sharded: each process steps a part of the weights and sends them to the others (Rajbhandari et al. 2020, arXiv
    1910.02054, stage 1), by torch's ZeroRedundancyOptimizer.
    """
    return [_adamw(grouped(model, settings), settings, sharded)]


def _adamw(
    groups: dict[tuple[float, float], Named], settings: OptimSettings, sharded: bool = False
) -> torch.optim.Optimizer:
    made = _torch_groups(groups, settings.learning_rate)
    keys: dict[str, Any] = {"lr": settings.learning_rate, "betas": (settings.adam_beta1, settings.adam_beta2),
                            "eps": settings.adam_epsilon, "fused": True}  # fmt: skip
    if sharded:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(made, torch.optim.AdamW, **keys)
    return stepping_without_compiler(torch.optim.AdamW)(made, **keys)


def make_muon(model: Model, settings: OptimSettings, sharded: bool = False) -> list[torch.optim.Optimizer]:
    """Muon (training/muon.py; Jordan et al. 2024) for the blocks' matrices, AdamW for the rest.

    Updates are scaled to AdamW's size (Liu et al. 2025, arXiv 2502.16982, eq. 4), so one learning rate serves both.
    ConfigError with parallel.shard_optimizer.
    """
    return _muon_and_adamw(model, settings, sharded, stepping_without_compiler(Muon))


def make_normuon(model: Model, settings: OptimSettings, sharded: bool = False) -> list[torch.optim.Optimizer]:
    """NorMuon (training/muon.py; Li et al. 2025, arXiv 2510.05491) where `make_muon` has Muon. ConfigError with
    parallel.shard_optimizer."""
    made = functools.partial(stepping_without_compiler(NorMuon), second_momentum=settings.adam_beta2)
    return _muon_and_adamw(model, settings, sharded, made)


def _muon_and_adamw(model: Model, settings: OptimSettings, sharded: bool, made: Callable[..., torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    if sharded:
        raise ConfigError(f"parallel.shard_optimizer works with optim.name = adamw; use --parallel fsdp to shard {settings.name}'s state")
    matrices, rest = matrices_and_rest(model, settings, width_power=0.5)
    if not matrices:
        return [_adamw(rest, settings)]
    muon = made(_torch_groups(matrices, settings.learning_rate), lr=settings.learning_rate, momentum=settings.muon_momentum)
    return [muon, _adamw(rest, settings)] if rest else [muon]


def make_soap(model: Model, settings: OptimSettings, sharded: bool = False) -> list[torch.optim.Optimizer]:
    """SOAP (training/soap.py) for the blocks' matrices, AdamW for the rest. ConfigError where matrices are in shards.
    Vyas et al. 2024, arXiv 2409.11321."""
    if sharded or any(is_sharded(p) for p in model.parameters()):
        raise ConfigError("soap needs whole matrices: use --parallel ddp without shard_optimizer, or optim.name = adamw")
    matrices, rest = matrices_and_rest(model, settings)
    if not matrices:
        return [_adamw(rest, settings)]
    soap = SOAP(
        _torch_groups(matrices, settings.learning_rate), lr=settings.learning_rate, eps=settings.adam_epsilon,
        betas=(settings.adam_beta1, settings.adam_beta2), precondition_frequency=settings.soap_precondition_frequency,
    )  # fmt: skip
    return [soap, _adamw(rest, settings)] if rest else [soap]


def matrices_and_rest(
    model: Model, settings: OptimSettings, width_power: float = 1.0
) -> tuple[dict[tuple[float, float], Named], dict[tuple[float, float], Named]]:  # fmt: skip
    """The groups of the blocks' matrices (by width_power, as `grouped`), and those of everything else, which is AdamW's: a matrix of one
    row or column is a vector."""
    rules = model.parameter_rules()
    no_product = {id(p) for n, p in model.named_parameters() if n in rules and not rules[n].matrix}
    inside = {id(p) for block in model.blocks() for p in block.parameters() if p.dim() == 2 and min(p.shape) > 1} - no_product

    def part(groups: dict[tuple[float, float], Named], wanted: bool) -> dict[tuple[float, float], Named]:
        chosen = {k: [(n, p) for n, p in named if (id(p) in inside) is wanted] for k, named in groups.items()}
        return {k: named for k, named in chosen.items() if named}

    return part(grouped(model, settings, width_power), True), part(grouped(model, settings), False)


class Optimizers:
    """One or more torch optimisers behind one interface, and the average of the weights where there is one."""

    def __init__(self, model: Model, settings: OptimSettings, sharded: bool = False) -> None:
        optimizers_without_compiler()
        self.inner: list[torch.optim.Optimizer] = OPTIMIZERS.get(settings.name)(model, settings, sharded)
        self.parameters: Named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._names = {id(p): n for n, p in self.parameters}
        if settings.ema is not None and sharded:
            raise ConfigError("optim.ema needs every process to hold the optimiser's whole state; leave out shard_optimizer, or ema")
        self.average = WeightAverage(self.parameters, settings.ema) if settings.ema is not None else None

    def set_learning_rate(self, rate: float) -> None:
        """The rate of every group: `rate` times the group's multiplier."""
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["multiplier"]

    def step(self) -> None:
        """One update of all weights, and of their average."""
        for optimizer in self.inner:
            optimizer.step()
        if self.average is not None:
            self.average.update()

    @property
    def decide_on_device(self) -> bool:
        """Whether numbers that stay on the device can divide the gradients and leave a step out: torch's fused AdamW alone, of
        whole weights."""
        fused = all(isinstance(one, torch.optim.AdamW) and getattr(one, "_step_supports_amp_scaling", False) for one in self.inner)
        return fused and self.average is None and not any(is_sharded(p) for _, p in self.parameters)

    def step_on_device(self, divisor: Tensor, left_out: Tensor) -> None:
        """A step with the gradients divided by `divisor`, nothing at all where `left_out` is 1; fp32 scalars on the device, in
        torch's way for scaled losses."""
        for optimizer in self.inner:
            optimizer.grad_scale, optimizer.found_inf = divisor, left_out  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

    def averaged(self) -> AbstractContextManager[None]:
        """The model has the average of its weights inside, where one is kept."""
        return nullcontext() if self.average is None else self.average.used()

    def use_average(self, wanted: bool) -> None:
        """From here on the model has the average inside (after the last step), or the weights that are trained; nothing where no
        average is kept."""
        if self.average is not None and self.average.in_place_of_weights is not wanted:
            self.average.exchange()

    def named_weights(self, model: Model) -> dict[str, Tensor]:
        """What a checkpoint's model holds: the weights, or their average where one is kept. Of any shapes."""
        return model.trained_weights() | (self.average.named_averages() if self.average is not None else {})

    def zero_grad(self) -> None:
        """Lets go of all gradients."""
        for _, parameter in self.parameters:
            parameter.grad = None

    def _places(self) -> dict[str, tuple[torch.optim.Optimizer, nn.Parameter]]:
        """name -> (the optimiser whose state it is in, the parameter); a sharded optimiser has a part of them."""
        found: dict[str, tuple[torch.optim.Optimizer, nn.Parameter]] = {}
        for optimizer in self.inner:
            inner = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's own, over this process's part
            for group in inner.param_groups:
                # DeepSpeed puts flat parameters of its own in the groups, and gathers their state itself.
                found.update({self._names[id(p)]: (inner, p) for p in group["params"] if id(p) in self._names})
        return found

    def state_tensors(self) -> dict[str, Tensor]:
        """ "parameter|key" -> tensor, for a checkpoint; keyed by name so that group order can never mix moments up. Of
        any shapes."""
        tensors: dict[str, Tensor] = {}
        for name, (optimizer, parameter) in self._places().items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{key}"] = torch.as_tensor(value)
        return tensors | (self.average.state_tensors() if self.average is not None else {})

    def empty_state(self, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
        """Tensors to read a state of these names and shapes into: like the parameter (a part where it is one), or plain ones
        of another shape (counts, SOAP's bases). Names of parameters that another process steps are left out; ShapeError for names of another model.
        Shapes as lists, [N, K] of a matrix."""
        places, made = self._places(), {}
        self._refuse_unknown(shapes)
        for full, shape in shapes.items():
            name = full.rpartition("|")[0]
            if name in places:
                parameter = places[name][1]
                if list(parameter.shape) == shape:
                    made[full] = torch.zeros_like(parameter)
                elif parameter.dim() == 2 and shape == [parameter.shape[0], 1]:  # a number an output: in parts where the matrix is
                    made[full] = torch.zeros_like(parameter[:, :1], dtype=torch.float32)
                else:
                    made[full] = torch.zeros(shape, dtype=torch.float32)
        return made

    def _refuse_unknown(self, full_names: Iterable[str]) -> None:
        known = set(self._names.values())
        for full in full_names:
            if full.rpartition("|")[0] not in known:
                raise ShapeError(f"the checkpoint's optimiser state has {full.rpartition('|')[0]!r}, this model has not")

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> list[str]:
        """The inverse of `state_tensors`; ShapeError when names or shapes are another model's. Of any shapes. Returns the names of
        the parameters that begin anew, since what is kept of them is another optimiser's."""
        self._refuse_unknown(tensors)
        places = self._places()
        found: dict[str, dict[str, Tensor]] = {}
        for full, tensor in tensors.items():
            name, _, key = full.rpartition("|")
            found.setdefault(name, {})[key] = tensor
        parameters = dict(self.parameters)
        self.average.restore(found) if self.average is not None else resume_weights(parameters, found)
        anew = []
        for name, (optimizer, parameter) in places.items():
            saved = {key: tensor for key, tensor in found.get(name, {}).items() if key not in (WEIGHT, UPDATES)}
            state = _own_state(optimizer, saved)
            if saved and not state:
                anew.append(name)
            for key, tensor in state.items():
                expected = (parameter.shape, parameter[:, :1].shape) if isinstance(optimizer, NorMuon) else (parameter.shape,)
                if tensor.dim() and tensor.shape not in expected and not isinstance(optimizer, SOAP):
                    raise ShapeError(
                        f"optimiser state {name}|{key} is {list(tensor.shape)}, not {list(parameter.shape)}"
                    )
            if state:
                # Fused AdamW keeps its step count on the parameter's device, as fp32.
                optimizer.state[parameter] = {k: t.to(parameter.device) for k, t in state.items()}
        return anew
