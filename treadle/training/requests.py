"""Changes nothing: what callbacks ask the loop to do, merged, and agreed by all processes in one all-reduce a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from treadle.distributed.world import World

# In the order in which the loop carries them out.
Kind = Literal["rollback", "evaluate", "save", "stop"]
KINDS: tuple[Kind, ...] = ("rollback", "evaluate", "save", "stop")
ELSEWHERE = "another process asked for it"
END = 0  # the exit code of a stop that is an end of training (early stopping)


@dataclass
class Requests:
    """What shall happen after this step, the same in all processes once `agree` was called. A signal or an error reaches
    one process at a moment of its own, so nothing that all have to do together may depend on one that is not agreed."""

    reasons: dict[Kind, str] = field(default_factory=dict)
    exit_code: int = END  # of a stop
    stopped_by: str = ""  # the callback that asked for it
    failed: bool = False  # it is the end of a callback that failed in one of the processes
    save_ended: bool = False  # a save in the background is done in all processes
    settings: dict[str, Any] = field(default_factory=dict)  # keys to change, asked here since the last agreement
    _own: dict[Kind, tuple[str, str]] = field(default_factory=dict)  # (reason, who), asked here since the last agreement
    _own_code: int = END
    _own_failed: bool = False

    def ask(self, kind: Kind, reason: str, exit_code: int = END, by: str = "", failed: bool = False) -> None:
        """Asked in this process; counts for all from the next agreement on. Of two stops the larger exit code counts."""
        self._own_failed |= failed
        if kind == "stop" and (kind not in self._own or exit_code > self._own_code):
            self._own[kind], self._own_code = (reason, by), exit_code
        self._own.setdefault(kind, (reason, by))

    def agree(self, world: World, save_busy: bool = False, save_ended: bool = False) -> dict[str, Any]:
        """Merges what all processes asked; returns the keys to change now, in all of them."""
        own, code = self._own, self._own_code if "stop" in self._own else END
        self._own, self._own_code = {}, END
        asked = [int(kind in own) for kind in KINDS]
        *merged, worst, busy, ended, settings, failed = world.all_reduce_max(
            [*asked, code, int(save_busy), int(save_ended), int(bool(self.settings)), int(self._own_failed)]
        )
        self.failed |= bool(failed)
        self.save_ended = bool(ended and not busy)
        for kind, wanted in zip(KINDS, merged):
            if wanted and kind != "stop":
                self.reasons.setdefault(kind, own.get(kind, (ELSEWHERE, ""))[0])
        if merged[-1] and ("stop" not in self.reasons or worst > self.exit_code):
            # The reason ends up in files and messages of the first process, whoever had it.
            said = world.all_gather_object([*own["stop"], code] if "stop" in own else None)
            reason, by, _ = max((one for one in said if one), key=lambda one: one[2])
            self.reasons["stop"], self.stopped_by, self.exit_code = reason, by, worst
        agreed: dict[str, Any] = {}
        if settings:
            for asked_there in world.all_gather_object(self.settings):
                agreed.update(asked_there)
            self.settings = {}
        return agreed

    def take(self, kind: Kind) -> str | None:
        """The reason of an agreed request, which is then done; None when nobody asked."""
        return self.reasons.pop(kind, None)

    def drop(self, *kinds: Kind) -> None:
        """Takes back what was asked."""
        for kind in kinds:
            self.reasons.pop(kind, None)

    def __contains__(self, kind: Any) -> bool:
        return kind in self.reasons

    @property
    def stop_asked_here(self) -> bool:
        """For a process that trains alone and waits for data."""
        return "stop" in self._own or "stop" in self.reasons
