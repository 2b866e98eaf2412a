"""Runs a suite: what has not finished, so many processes at a time; the same command goes on after any end, kill -9 too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from treadle.checkpoint.lock import RunLock
from treadle.distributed.launch import cores
from treadle.distributed.pool import LocalPool, Pool, RayPool, last_words, run_all
from treadle.errors import TreadleError
from treadle.monitor.records import write_json
from treadle.suite.design import variants
from treadle.suite.jobs import DONE, FAILED, Job, Jobs
from treadle.suite.picture import picture_of
from treadle.suite.results import counts, probe_size, table
from treadle.suite.settings import Suite
from treadle.suite.table import markdown_of

RESULT, PICTURE, MARKDOWN = "suite.json", "suite.svg", "suite.md"


class SuiteFailed(TreadleError):
    """Some jobs of a suite did not finish."""


def run(suite: Suite, output: Path, say: Callable[[str], None], workers: int | None = None, ray: bool = False) -> dict[str, Any]:
    """Trains, weighs and probes what `output` does not hold yet, and returns the table (results.py), which suite.json holds too.
    ConfigError for what a suite cannot ask; a job that fails otherwise is in the table, and `unfinished` says so."""
    pool: Pool = (RayPool if ray else LocalPool)(workers or suite.settings.workers or cores())
    output.mkdir(parents=True, exist_ok=True)
    lock = RunLock(output)
    try:
        return _run(suite, output, say, pool)
    finally:
        lock.release()


def _run(suite: Suite, output: Path, say: Callable[[str], None], pool: Pool) -> dict[str, Any]:
    jobs = Jobs(suite, variants(suite), output)
    for line in _plan(jobs, output, pool.workers):
        say(line)

    def write() -> None:
        write_json(output / RESULT, table(jobs))

    def ended(job: Job, code: int) -> None:
        _ended(jobs, job, code)
        number = counts(jobs)
        said = job.problem if job.state == FAILED else _said(jobs, job)
        say(f"[{number[DONE] + number[FAILED]}/{len(jobs.all)}] {job.label}: {said}")
        write()

    run_all(pool, jobs.take, ended, lambda job: write())
    reused = sum(job.reused for job in jobs.all)
    if reused:
        say(f"{reused} of {len(jobs.all)} jobs had finished before and were read")
    found = table(jobs)
    write_json(output / RESULT, found)
    (output / MARKDOWN).write_text(markdown_of(found), encoding="utf-8")
    if (picture := picture_of(found)) is not None:
        (output / PICTURE).write_text(picture, encoding="utf-8")
    return found


def _ended(jobs: Jobs, job: Job, code: int) -> None:
    assert job.folder is not None
    if code == 0 and jobs.read(job, 0):
        return
    job.state, job.problem = FAILED, f"{last_words(job.folder / 'suite.out', code)} ({job.folder / 'suite.out'})"


def _said(jobs: Jobs, job: Job) -> str:
    values = job.values or {}
    if job.kind == "measure":
        return f"{values['step_time_ratio']:.2f} x the first's step, {values['tokens_per_second']:,.0f} tokens/s"
    if job.kind == "probe":
        return f"accuracy {values.get('accuracy', float('nan')):.3f}"
    value = jobs.value(job)
    return "no evaluation" if value is None else f"{value:.4f}, {job.cpu_seconds:.0f} CPU s"


def _plan(jobs: Jobs, output: Path, workers: int) -> list[str]:
    """What will be done, before it is done."""
    suite = jobs.suite
    lines = [f"{suite.name}: {'up to ' if jobs.shrinks else ''}{len(jobs.all)} jobs in {output}, {workers} at a time; Ctrl-C is safe, the same command goes on"]
    for variant in jobs.variants:
        steps = f"{variant.steps} steps of {variant.bytes_per_step:,.0f} bytes" if variant.steps else "steps by its measured step time"
        lines.append(f"  {variant.label}: {variant.arch}, {variant.parameters:,} parameters, {steps}")
    if (size := probe_size(jobs)) is not None and suite.probes is not None:
        lines.append(f"  probes: models of {size:,.0f} parameters, {suite.probes.steps} steps of {suite.probes.rows} rows")
    return lines


def unfinished(result: dict[str, Any]) -> SuiteFailed | None:
    """What to raise, after the table, where jobs failed."""
    failed = sum(job["state"] == FAILED for job in result["jobs"])
    if not failed:
        return None
    return SuiteFailed(f"{failed} of {len(result['jobs'])} job(s) failed; the same command tries them again and repeats no other")
