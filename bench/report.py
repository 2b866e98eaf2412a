"""docs/performance.md's tables and pictures from the results of `python -m bench`.

    python -m bench.report [RESULT.json ...]     # default: of each kind of machine the newest bench/results/cpu-*.json that has parts

Goals, training and memory are shown of each machine, every other part of the newest result that has it. Only what stands between
the marks `<!-- NAME -->` and `<!-- end -->` is written; the words around them are the document's own.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import goals as judged
from bench import pictures
from bench.run import as_text

ROOT = Path(__file__).parents[1]
RESULTS, DOCUMENT, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "performance.md", ROOT / "docs" / "images"
Values = dict[str, Any]
TOKENS = ": tokens per CPU-second"


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *rows]])


def number(values: Values, name: str) -> float | None:
    found = values.get(name)
    return float(found) if isinstance(found, (int, float)) else None


def picture(name: str, title: str, rows: list[tuple[str, float | None]], mark: float | None = None) -> str:
    """Writes it and returns the line that shows it; nothing where no row has a figure."""
    known = [(row, value) for row, value in rows if value is not None]
    if not known:
        return ""
    pictures.bars(IMAGES / f"performance_{name}.svg", title, known, mark)
    return f"\n\n![{title}](images/performance_{name}.svg)"


def machine(result: Values) -> str:
    about = result["machine"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", "accelerate", "litgpt", "xllamacpp") if name in about)
    return (f"{about['processor']} with {', '.join(about['features']) or 'no vector extensions of note'}; {about['cores']} cores, {about['threads']} thread(s) "
            f"in every process, load {about['load'][0]} when it began; Python {about['python']}, {versions}."
            + (f"\n\n{result['note']}" if "note" in result else ""))  # fmt: skip


KINDS = {"amx": "AMX", "avx512_bf16": "fast bf16", "plain": "no fast bf16"}


def label(result: Values) -> str:
    """A machine in few words."""
    about = result["machine"]
    name = re.sub(r"\((R|TM)\)| Processor", "", about["processor"])
    return f"{name} ({KINDS.get(about.get('kind'), 'unknown kind')})"


def machines(results: list[Values]) -> str:
    return "\n\n".join(f"**{label(result)}.** {machine(result)}" for result in results)


def goals(results: list[Values]) -> str:
    """Of every machine, by the goals as they are now; those of a GPU by its newest run."""
    found = {label(result): judged.judge(judged.flat(result["parts"]), result["machine"].get("kind", "")) for result in results}
    columns = {name: {verdict.name: verdict for verdict in verdicts if verdict.section != "gpu"} for name, verdicts in found.items()}
    columns["GPU"] = {verdict.name: verdict for verdict in judged.judge(judged.of_a_gpu(RESULTS), "") if verdict.section == "gpu"}
    wanted = {verdict.name: verdict for verdicts in columns.values() for verdict in verdicts.values()}
    order = {name: place for place, name in enumerate(judged.names())}
    rows = [[name, wanted[name].wanted, *(_cell(verdicts.get(name)) for verdicts in columns.values())] for name in sorted(wanted, key=order.__getitem__)]
    counts = []
    for name, verdicts in columns.items():
        outcomes = [verdict.outcome for verdict in verdicts.values()]
        met, missed = outcomes.count("met"), sum(outcome.startswith("MISSED") for outcome in outcomes)
        counts.append(f"{name}: {met} met, {missed} missed, {len(outcomes) - met - missed} not measured.")
    return " ".join(counts) + "\n\n" + table(["goal", "wanted", *columns], rows)


def _cell(verdict: judged.Verdict | None) -> str:
    """One goal on one machine; empty where it has no such goal."""
    if verdict is None:
        return ""
    figure = "" if verdict.value is None else f"{verdict.value:.3g} "
    return figure + (f"**{verdict.outcome}**" if verdict.outcome.startswith("MISSED") else verdict.outcome)


def of_each(part: str, section: Callable[[Values, str], str]) -> Callable[[list[Values]], str]:
    """A part as every machine that measured it has it. section(result, a word for its picture's name)."""

    def render(results: list[Values]) -> str:
        having = [result for result in results if part in result["parts"]]
        if not having:
            return section({"parts": {}}, "")
        several = len(having) > 1
        shown = [section(result, f"_{result['machine'].get('kind', number)}" if number else "") for number, result in enumerate(having)]
        return "\n\n".join(f"{label(result)}:\n\n{text}" if several else text for result, text in zip(having, shown))

    return render


def of_newest(part: str, section: Callable[[Values], str]) -> Callable[[list[Values]], str]:
    """A part of the newest result that has it; of which machine stands there where it is not the first."""

    def render(results: list[Values]) -> str:
        for result in results:
            if part in result["parts"]:
                return ("" if result is results[0] else f"{label(result)}:\n\n") + section(result)
        return section({"parts": {}})

    return render


def training(result: Values, which: str) -> str:
    values, rows = result["parts"].get("contest", {}), []
    names = [name.removesuffix(TOKENS) for name in values if name.endswith(TOKENS)]
    for name in names:
        speed = values[name + TOKENS]
        if isinstance(speed, str):
            rows.append([name, speed, "", "", ""])
            continue
        rows.append([name, f"{speed:,.0f}", f"{values[f'{name}: share of peak']:.0%}", f"{values[f'{name}: peak GB']:.2f}",
                     f"{values[f'{name}: CPU seconds to the first step']:.1f}"])  # fmt: skip
    shown = table(["", "tokens per CPU-second", "share of the matrix peak", "peak GB", "CPU seconds from start to first step"], rows)
    order = sorted((name for name in names if number(values, name + TOKENS)), key=lambda name: -values[name + TOKENS])
    return shown + picture(f"training{which}", "training, tokens per CPU-second", [(name, number(values, name + TOKENS)) for name in order])


def memory(result: Values, which: str) -> str:
    values, text = result["parts"].get("memory", {}), ""
    names = [name for name in values if name.endswith(": GB")]
    text = table(["peak memory of the process", "GB"], [[name.removesuffix(": GB"), as_text(values[name])] for name in names])
    rows = [(name.split(", ", 1)[1].removesuffix(": GB") + (" (32k)" if "32k" in name else ""), number(values, name)) for name in names if ", " in name]
    return text + picture(f"memory{which}", "peak memory, GB (10.8M parameters; 32k: with a vocabulary of 32k)", rows)


def plain(part: str, what: str = "") -> Callable[[Values], str]:
    """A part as it is: name and figure."""

    def render(result: Values) -> str:
        values = result["parts"].get(part, {})
        return table([what or part, ""], [[name, as_text(value)] for name, value in values.items()])

    return render


def decoding(result: Values) -> str:
    parts = result["parts"]
    rows = [[name, as_text(value)] for part in ("generate", "llama_cpp") for name, value in parts.get(part, {}).items()]
    unit = ": CPU ms a token"
    drawn = [(("ours " + name.split(",")[0]) if "ours" in name else name.split(", ")[1].removesuffix(unit), number(parts["llama_cpp"], name))
             for name in parts.get("llama_cpp", {}) if name.endswith(unit)]  # fmt: skip
    return table(["generation", ""], rows) + picture("decoding", "decoding beside llama.cpp, CPU ms a token (14M parameters)", drawn)


def scale(result: Values) -> str:
    values, rows, drawn = result["parts"].get("scale", {}), [], []
    for size in dict.fromkeys(name.rsplit(", ", 1)[0] for name in values):
        if number(values, f"{size}, plain fp32{TOKENS}") is None:
            continue
        speeds = [as_text(values[f"{size}, {name}{TOKENS}"]) for name in ("ours auto", "ours fp32", "plain fp32")]
        ratios = [f"{values[f'{size}, {name} over plain fp32']:.2f}" for name in ("ours auto", "ours fp32")]
        peaks = [f"{values[f'{size}, {name}: peak GB']:.2f}" for name in ("ours auto", "plain fp32")]
        rows.append([size, *speeds, *ratios, *peaks])
        drawn.append((f"ours, {size}", number(values, f"{size}, ours auto over plain fp32")))
    heads = ["", "ours auto", "ours fp32", "plain fp32", "auto over plain", "fp32 over plain", "peak GB, ours auto", "peak GB, plain"]
    return table(heads, rows) + picture("scale", "tokens per CPU-second, ours auto over the plain fp32 loop (line: equal)", drawn, 1.0)


def architectures(result: Values) -> str:
    values = result["parts"].get("architectures", {})
    ratio = " over dense: step time"
    names = [name.removesuffix(ratio) for name in values if name.endswith(ratio)]
    columns = ["parameters", "step ms", "kept MB", "kept, by dense", "decoding ms at 1k", "state bytes at 1k", "decoding ms at 8k", "state bytes at 8k"]
    rows = []
    for name in names:
        cells = [as_text(values.get(f"{name}: {column}", "")) for column in columns]
        rows.append([name, f"{values[name + ratio]:.2f}", *cells])
    drawn = [(f"ours, {name}", number(values, name + ratio)) for name in names]
    shown = table(["", "step over dense", *columns], rows) if rows else table(["architectures", ""], [[n, as_text(v)] for n, v in values.items()])
    return shown + picture("architectures", "CPU time of a step over a dense model of equal parameters (line: equal)", drawn, 1.0)


def gpu(results: list[Values]) -> str:
    for path in sorted(RESULTS.glob("gpu-*.json"), reverse=True):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not found.get("tiny"):
            about = found["machine"]
            rows = [[name, as_text(value)] for name, value in found["parts"]["gpu"].items()]
            note = f" {about['note']}." if "note" in about else ""
            return f"{about.get('gpu', 'a GPU')}, torch {about['torch']}, CUDA {about.get('cuda')}.{note}\n\n" + table(["", ""], rows)
    return "Not measured: no GPU was at hand. `python -m bench.gpu` writes this table, in under ten minutes."


SECTIONS: dict[str, Callable[[list[Values]], str]] = {
    "machine": machines, "goals": goals, "training": of_each("contest", training), "memory": of_each("memory", memory),
    "decoding": of_newest("generate", decoding), "architectures": of_newest("architectures", architectures), "scale": of_newest("scale", scale),
    **{name: of_newest(name, plain(name, what)) for name, what in
       {"startup": "start", "packing": "data", "kernels": "", "demo": "learning", "serving": "", "collatz": ""}.items()},
    "gpu": gpu,
}  # fmt: skip


def render(text: str, results: list[Values]) -> str:
    """The document with its marked places written anew."""
    for name, section in SECTIONS.items():
        mark = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->", flags=re.S)
        if mark.search(text):
            body = section(results)
            if body.endswith("--- |"):  # the heads of a table without rows
                body = f"Not measured in this run: `python -m bench --only {'contest' if name == 'training' else name}`, then `python -m bench.report`."
            text = mark.sub(lambda _, body=body, name=name: f"<!-- {name} -->\n{body}\n<!-- end -->", text)  # type: ignore[misc]
    return text


def newest() -> list[Path]:
    """The newest result of each kind of machine, the newest of all first."""
    found: dict[str, Path] = {}
    for path in sorted(RESULTS.glob("cpu-*.json"), reverse=True):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "parts" in result:
            found.setdefault(result["machine"]["kind"], path)
    if not found:
        raise SystemExit("no result yet; python -m bench writes one")
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    paths = parser.parse_args().results or newest()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"{DOCUMENT.relative_to(ROOT)} from {', '.join(path.name for path in paths)}")


if __name__ == "__main__":
    main()
