"""One writer a run. The kernel frees the lock when its process dies, so it never goes stale."""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from pathlib import Path

from treadle.errors import ConfigError, RunLocked

LOCK_FILE = "LOCK"
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child shares the open file, and would keep the lock after its parent was killed."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)


def refuse_links(run: Path) -> None:
    """ConfigError for a link to a file outside of the run: training would write there. Folders may be links, to other disks."""
    root = run.resolve()
    for folder, _, files in os.walk(root):
        for name in files:
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise ConfigError(f"{path} is a link to {os.readlink(path)}, so that training would write outside of the run; "
                                  "remove the link")  # fmt: skip


class RunLock:
    """Holds a run folder for this process; RunLocked names the process that has it."""

    def __init__(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        refuse_links(run)
        self.descriptor = os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip()
            os.close(self.descriptor)
            raise RunLocked(f"{run} is being trained by {holder or 'another process'}; wait for it, stop it, or use "
                            "another folder with --output_dir") from None  # fmt: skip
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        _held.add(self)

    def release(self) -> None:
        """Gives the folder free."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
