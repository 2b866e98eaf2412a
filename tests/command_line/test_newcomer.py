"""What a newcomer trips over: misspelt verbs, flags and keys, too much help, other libraries' errors, long waits."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch

import treadle
from treadle import cli
from treadle.distributed import launch
from treadle.errors import ConfigError
from treadle.help import USUAL
from treadle.ops import precision
from treadle.recipe import Layer, compose, typed_layers, vocabulary
from treadle.registry import nearest
from treadle.reporting.compare import lines_of
from treadle.settings import Refused
from treadle.training.config import SECTIONS
from treadle.training.settings import OptimSettings, TrainSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture()
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A command line run in this process: (exit code, standard output, standard error)."""

    def run(*line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["treadle", *line])
        code = cli._run()
        return code, *capsys.readouterr()

    return run


# ---- verbs and flags ----


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["genrate"], "'treadle generate'"),
        (["evalute", "last"], "'treadle eval'"),
        (["trian", "--max_steps", "3"], "'treadle train'"),
        (["data", "prepar"], "'treadle data prepare'"),
        (["prepare"], "treadle prepare --help"),  # the same as data prepare
        (["story.txt"], "treadle train story.txt"),
        (["zzzz"], "treadle --help"),
        (["--max_steps", "3"], "treadle train --max"),
        (["generate", "--promt", "x"], "did you mean '--prompt'?"),
        (["generate", "--prompt_fil=x"], "did you mean '--prompt-file'?"),
        (["generate", "--temprature", "1"], "did you mean '--temperature'?"),
        (["eval", "last", "--rowz", "3"], "did you mean '--rows'?"),
        (["compare", "a", "b", "--batch_siz", "3"], "did you mean '--batch-size'?"),
        (["data", "stats", "x", "--seqlen", "3"], "did you mean '--seq-len'?"),
        (["export", "--zzzz"], "treadle export --help"),
        (["eval"], "treadle eval RUN"),
        (["generate", "--top_k", "abc"], "--top-k"),
        (["generate", "--seed", str(1 << 64)], "fits 64 bits"),
        (["generate", "--prompt", "x", "--output-file", "y"], "write > FILE"),
        (["train", "--max_stesp", "3"], "did you mean 'max_steps'"),
        (["train", "--frehs"], "did you mean 'fresh'?"),
        (["train", "--hlp"], "did you mean 'help'"),
        (["train", "--hiden-size", "3"], "did you mean 'hidden_size'?"),
        (["plan", "--memry", "8GiB"], "did you mean 'memory'?"),
        (["train", "--model_name_or_path", "gpt2"], "unknown key: to start from that model, --from gpt2"),
        (["train", "--do_train", "False"], "treadle eval RUN"),
        (["train", "--do_eval", "maybe"], "(allowed: true, false)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_slip_is_one_line_that_names_the_nearest(typed: Any, in_folder: Path, line: list[str], says: str) -> None:
    code, out, err = typed(*line)
    assert code == 2 and says in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
    assert not list(in_folder.glob("*/*"))  # no run was begun


@pytest.mark.parametrize(
    "line",
    [
        ["generate", "nowhere", "--top_p", "0.5", "--max_new_tokens", "3", "--prompt_file", "x", "--num_samples=2"],
        ["eval", "nowhere", "--batch_size", "3"],
        ["compare", "nowhere", "--batch_size=3"],
        ["export", "nowhere", "--packed"],
        ["data", "stats", "nowhere", "--seq_len", "32"],
        ["data", "prepare", "nowhere", "--vocab_size", "300", "--on_bad=skip"],
        ["tokenizer", "train", "nowhere", "--vocab_size", "300", "--text_column", "t"],
    ],
    ids=lambda line: line[0],
)  # fmt: skip
def test_underscores_and_dashes_are_the_same_in_every_verb(typed: Any, in_folder: Path, line: list[str]) -> None:
    """The options are understood: what is wrong is the file that is not there."""
    dashed = ["--" + word[2:].replace("_", "-") if word.startswith("--") else word for word in line]
    for code, _, err in (typed(*line), typed(*dashed)):
        assert code == 2 and "nowhere" in err and "option" not in err, err


def test_every_option_of_every_verb_has_both_spellings(typed: Any) -> None:
    """--help says --max-new-tokens; no verb's flag is known by one spelling alone."""
    for verb in ("generate", "eval", "compare", "export"):
        code, out, _ = typed(verb, "--help")
        assert code == 0
        for flag in set(re.findall(r"--[a-z]+(?:-[a-z]+)+", out)):
            _, _, err = typed(verb, "nowhere", f"--{flag[2:].replace('-', '_')}", "?")
            assert "unknown option" not in err, err


def test_a_group_without_a_verb_shows_its_help(typed: Any) -> None:
    code, _, err = typed("data")
    assert code == 2 and err.startswith("Usage: treadle data") and "prepare" in err
    code, out, _ = typed("-h")
    assert code == 0 and "generate" in out


def test_codes_of_verbs_survive(typed: Any, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle import examine

    monkeypatch.setattr(examine, "machine", lambda: (["broken"], False))
    assert typed("doctor")[0] == 65
    monkeypatch.setattr(examine, "machine", lambda: (["sound"], True))
    assert typed("doctor")[0] == 0

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(examine, "machine", stop)
    assert typed("doctor")[0] == 130


# ---- help ----


@pytest.mark.parametrize("verb", ["train", "check", "plan", "distill"])
def test_help_opens_with_the_keys_people_use(typed: Any, verb: str) -> None:
    code, out, _ = typed(verb, "--help")
    assert code == 0 and out.startswith(f"treadle {verb}")
    keys = re.findall(r"^  --([\w.]+)  ?(?:\(|NAME)", out, flags=re.M)
    assert 9 <= len(keys) <= 24 and len(set(keys)) == len(keys)
    assert out.count("\n") < 100 and f"treadle {verb} --help all" in out and f"treadle {verb} --help SECTION" in out
    words = vocabulary()
    for key in keys:  # what help says works: each is understood by exactly that name
        if key not in ("model.arch", "model.preset", "parallel"):
            section, _, leaf = key.rpartition(".")
            homes = [section] if section else words._sections_with(key)
            assert len(homes) == 1 and leaf in SECTIONS[homes[0]].model_fields, key
    if verb == "train":
        assert len(keys) == len(USUAL) and {"max_steps", "learning_rate", "model.arch", "parallel"} <= {*keys}
        assert "adam_epsilon" not in out


def test_help_of_a_section_a_key_and_everything(typed: Any) -> None:
    code, out, _ = typed("train", "--help", "optimizer")
    assert code == 0 and out.startswith("[optim]") and "--optim.adam_epsilon" in out and "max_steps" not in out
    assert typed("train", "--help=lr")[1].startswith("  --optim.learning_rate  (float, default 0.001)")
    assert "--data.seq_len" in typed("check", "-h", "data.max-length")[1]
    assert typed("train", "--help", "bf16")[1].startswith("bf16 is read as train.precision\n  --train.precision  (")
    assert typed("train", "story.txt", "--help", "num_heads")[1].startswith("  --model.num_heads")
    code, out, _ = typed("train", "--model.arch", "hnet", "--help", "model")
    assert code == 0 and out.startswith("[model] of hnet") and "--model.num_blocks" in out
    code, out, _ = typed("train", "--help", "all")
    for name, cls in SECTIONS.items():
        for key in cls.model_fields:
            assert f"  --{name}.{key}  (" in out
    assert "--model.rope_theta" in out
    code, _, err = typed("train", "--help", "optm")
    assert code == 2 and "did you mean 'optim'?" in err


# ---- keys ----


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: treadle.build("transformer", hiden_size=64), "did you mean 'hidden_size'?"),
        (lambda: treadle.build("hnet", num_block=64), "did you mean 'num_blocks'"),
        (lambda: treadle.build("hnet", zzzz=64), "treadle train --model.arch NAME --help model"),
        (lambda: treadle.build("transformer", num_heads=0), "greater than or equal to 1"),
        (lambda: treadle.build("transformer", num_heads="many"), "model.num_heads = 'many': should be a valid integer"),
        (lambda: treadle.build("transformer", hidden_size=64, num_heads=5), "does not divide by num_heads"),
        (lambda: treadle.TrainConfig(max_stps=3), "did you mean 'max_steps'?"),
        (lambda: treadle.TrainConfig(hiden_size=3), "did you mean 'hidden_size'?"),
        (lambda: treadle.TrainConfig(learning_rate="fast"), "optim.learning_rate = 'fast'"),
        (lambda: treadle.TrainConfig(zzzz=3), "treadle train --help all"),
        (lambda: treadle.train({"train": {"max_stps": 3}}), "did you mean 'max_steps'?"),
        (lambda: treadle.train(quite=True), "did you mean 'quiet'?"),
        (lambda: treadle.train(7), "recipe = 7: give a recipe's or text's path"),
        (lambda: treadle.plan("austen", hiden_size=3), "did you mean 'hidden_size'?"),
        (lambda: treadle.plan(wrld=3), "did you mean 'world'?"),
        (lambda: treadle.Model.load("nano", pretraned=False), "did you mean 'pretrained'?"),
        (lambda: treadle.Dataset.load("austen", tokenizer="byte", seq_len="long"), "seq_len = 'long'"),
        (lambda: TrainSettings(max_steps=0), "train.max_steps = 0: should be greater than or equal to 1"),
        (lambda: TrainSettings(max_stps=1), "did you mean 'max_steps'?"),
        (lambda: TrainSettings(loss_weights={"a": -1.0}), "loss_weights.a must be a finite number"),
        (lambda: TrainSettings.model_validate({"max_stps": 1}), "did you mean 'max_steps'?"),
        (lambda: OptimSettings(lr=0.1), "it is called 'learning_rate' here"),
        (lambda: OptimSettings(name="adamww"), "did you mean 'adamw'? (allowed: adamw, muon, normuon, soap)"),
        (lambda: OptimSettings(learnrate=0.1, name=5), "optim"),
        (lambda: setattr(treadle.TrainConfig().train, "max_steps", -1), "train.max_steps = -1"),
        (lambda: setattr(treadle.TrainConfig().train, "max_stepz", 1), "did you mean 'max_steps'?"),
    ],
)  # fmt: skip
def test_a_library_user_sees_configuration_errors_alone(in_folder: Path, call: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert not isinstance(caught.value, pydantic.ValidationError) and says in str(caught.value), str(caught.value)
    assert "pydantic" not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)
    assert not list(in_folder.glob("*/*"))  # no run was begun


@pytest.mark.parametrize("key", ["zzzz", "numlayer", "batchsize", "train.zzzz", "model.zzzz", "learn", "steps_", "opt"])
@pytest.mark.parametrize("arch", ["transformer", "hnet"])
def test_an_unknown_key_names_three_others_at_most(key: str, arch: str) -> None:
    with pytest.raises(ConfigError) as caught:
        treadle.TrainConfig(arch, **{key: 1})
    said = str(caught.value)
    assert "unknown key" in said and len(re.findall(r"'\w[\w.]*'", said)) <= 3 and len(said) < 250, said


def test_the_models_own_keys_are_nearer() -> None:
    """num_layers is no key of hnet: num_blocks is meant rather than a loader's num_workers."""
    with pytest.raises(ConfigError) as caught:
        treadle.TrainConfig("hnet", num_layer=3)
    assert 0 < str(caught.value).find("num_blocks") < str(caught.value).find("num_workers"), str(caught.value)
    assert nearest("num_layer", ["num_workers"], preferred=["num_blocks"]).startswith("did you mean 'num_blocks'")
    assert nearest("hiden_size", ["hidden_size", "min_length"]) == "did you mean 'hidden_size'?"
    assert nearest("lrr", ["lr"], meant={"lr": "learning_rate"}) == "did you mean 'learning_rate'?"


def test_a_refusal_travels_between_processes() -> None:
    """A pool's worker hands its error to the parent; one that cannot be rebuilt there hangs the pool."""
    with pytest.raises(Refused) as caught:
        TrainSettings(max_steps=0)
    rebuild, parts = caught.value.__reduce__()
    again = rebuild(*parts)
    assert str(again) == str(caught.value) and again.key == "max_steps"


# ---- plan ----


def test_a_plan_of_a_table_and_of_a_configuration_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "seq_len": 64, "model.vocab_size": 300, "batch_size": 2}
    table = treadle.plan({**keys, "optim": {"name": "muon"}}, flops=1e12)
    config = treadle.TrainConfig(**keys, **{"optim.name": "muon"})
    assert treadle.plan(config, flops=1e12) == table
    assert table["world"] == 1 and table["parameters"] > 0 and isinstance(table["memory"]["total_gb"], float)
    assert treadle.plan(config, world=2, flops=1e12)["world"] == 2
    assert treadle.plan({**keys, "run": {"devices": 2}}, flops=1e12)["world"] == 2
    # Keys beside a TrainConfig change what was set in it and leave the rest.
    deeper = treadle.plan(config, num_layers=4, flops=1e12)
    assert deeper["parameters"] > table["parameters"] and deeper["seq_len"] == 64
    assert deeper == treadle.plan({**keys, "num_layers": 4, "optim": {"name": "muon"}}, flops=1e12)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("memory", "unit", "amount"), [("8GiB", "GiB", 8.0), ("600 mb", "MB", 600.0), (2.5e9, "GB", 2.5), ("64mib", "MiB", 64.0)]
)
def test_the_budget_is_answered_in_the_unit_it_was_asked_in(memory: Any, unit: str, amount: float) -> None:
    from treadle.planning.plan import UNITS
    from treadle.planning.tables import lines

    found = treadle.plan({"hidden_size": 64, "num_layers": 2, "num_heads": 2, "model.vocab_size": 300}, memory=memory, flops=1e12)
    asked = found["asked"]
    assert asked["unit"] == unit and asked["memory"] == pytest.approx(amount)
    assert asked["needs"] * UNITS[unit.lower()] == pytest.approx(found["memory"]["total_gb"] * 1e9)
    assert asked["fits"] == (asked["needs"] <= amount)
    verdict = lines(found)[-1]
    assert f" {unit} of the {amount:g} {unit} asked for" in verdict
    assert verdict.endswith("it fits") if asked["fits"] else "it does not fit; " in verdict


@pytest.mark.parametrize("keys", [{"world": 0}, {"world": 2.5}, {"flops": "fast"}, {"bandwidth": -1}, {"memory": "lots"}])
def test_a_plans_own_numbers_are_checked(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(keys.values())))):
        treadle.plan({"hidden_size": 64}, **keys)


# ---- devices ----


def test_more_devices_than_there_are_start_nothing(typed: Any, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "run_processes", lambda *a: pytest.fail("a process was started"))
    monkeypatch.setattr(launch, "cores", lambda: 2)
    monkeypatch.setattr(launch, "gpus", lambda device: 0)
    for line in (["train", "--devices", "99"], ["distill", "--teacher", "x", "--devices=99"], ["train", "--devices", "3"]):
        code, _, err = typed(*line)
        assert code == 2 and "this machine has 2 core(s)" in err and "type --devices 2." in err, err
    monkeypatch.setattr(launch, "run_processes", lambda count, line: 75)
    assert typed("train", "--devices", "2")[0] == 75
    monkeypatch.setattr(launch, "cores", lambda: 1)  # two on one core: for trying it out
    assert typed("train", "--devices", "2")[0] == 75
    assert not list(in_folder.glob("*/*"))  # no run was begun


def test_gpus_count_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cores", lambda: 64)
    monkeypatch.setattr(launch, "gpus", lambda device: 0 if device == "cpu" else 4)
    launch.refuse_too_many(4, "auto")
    launch.refuse_too_many(64, "cpu")
    with pytest.raises(ConfigError, match=r"4 GPU\(s\): type --devices 4 or --device cpu"):
        launch.refuse_too_many(5, "auto")
    monkeypatch.setattr(launch, "gpus", lambda device: 1)
    with pytest.raises(ConfigError, match="leave --devices out"):
        launch.refuse_too_many(2, "cuda")


# ---- make demo ----


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_demo_says_first_what_will_happen(tmp_path: Path) -> None:
    """Stopped at its first step (there is no such Python), it has said what comes and how long it takes."""
    out = subprocess.run(["make", "demo", f"VENV={tmp_path / 'none'}", "PYTHON=false"], cwd=ROOT, capture_output=True, text=True)
    before = out.stdout.split("false -m venv")[0]
    assert out.returncode != 0 and "false -m venv" in out.stdout
    assert re.search(r"1\. installs.*minutes.*\n.*2\. trains.*minutes", before) and "3. " in before and "Ctrl-C" in before


@pytest.mark.parametrize("flag", [("--chat_template", "chatml"), ("--train_on", "all")], ids=str)
def test_what_is_said_of_conversations_is_not_passed_over_for_text(flag: tuple[str, str], typed: Any, in_folder: Path) -> None:
    (in_folder / "story.txt").write_text("A story.\n" * 100)
    code, _, said = typed("train", "story.txt", *flag)
    assert code == 2 and "add --objective sft" in said and not Path("runs/story").exists()


def test_what_is_there_instead_of_a_run_are_runs(typed: Any, in_folder: Path) -> None:
    (in_folder / "runs" / "sound" / "checkpoints").mkdir(parents=True)
    (in_folder / "runs" / "sweep").mkdir()  # a folder of runs, and none itself
    code, _, said = typed("generate", "runs/none")
    assert code == 2 and said.strip().endswith("runs/none does not exist; there is: runs/sound")


# ---- files of other trainers ----

FOREIGN = {
    "gpt.py": "open('ran', 'w')\nn_layer = 6\nmax_iters = 100\n",
    "args.json": '{"optim": "adamw_torch", "learning_rate": 1e-4, "output_dir": "o"}',
    "lit.yaml": "precision: bf16-mixed\nmodel_name: pythia-160m\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_trainer_is_told_from_a_recipe_and_not_executed(name: str, typed: Any, in_folder: Path) -> None:
    Path(name).write_text(FOREIGN[name])
    code, _, said = typed("train", name)
    assert code == 2 and said.strip().endswith(f"another trainer's file? treadle convert {name}") and not Path("ran").exists()


def test_a_slip_in_a_recipe_of_ones_own_is_not_taken_for_another_trainers(typed: Any, in_folder: Path) -> None:
    Path("mine.yaml").write_text("train:\n  max_stesp: 3\noptim:\n  learning_rate: 1e-3\n")
    code, _, said = typed("train", "mine.yaml")
    assert code == 2 and "did you mean 'max_steps'" in said and "convert" not in said


def test_passes_that_are_asked_for_take_the_place_of_a_recipes_steps() -> None:
    """The built-in recipe says 1500 steps; --num_train_epochs on top of it means passes, and steps on top of those mean steps."""

    def asked(*tables: dict[str, Any]) -> TrainSettings:
        return compose([*typed_layers(None, Layer(tables[0], "flag")), *(Layer(table, "flag") for table in tables[1:])]).train

    assert asked({}).max_steps == 1500
    assert asked({"num_train_epochs": 2}).max_steps is None and asked({"epochs": 2}).num_train_epochs == 2
    assert asked({"num_train_epochs": 2, "max_steps": 7}).max_steps == 7
    assert asked({"num_train_epochs": 2}, {"max_steps": 9}).max_steps == 9


def test_a_folder_of_runs_names_them(typed: Any, in_folder: Path) -> None:
    (in_folder / "runs" / "one" / "checkpoints").mkdir(parents=True)
    code, _, said = typed("compare", "runs")
    assert code == 2 and "there are runs in it: runs/one" in said


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "amd", "pays"),
    [(True, True, False, True), (False, True, True, True), (False, True, False, False), (False, False, True, False)],
)
def test_16_bits_by_the_maker_of_the_processor(amx: bool, avx512_bf16: bool, amd: bool, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512 BF16 pays on AMD's; on Intel's it stands beside AMX, and alone it is slower than fp32."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(precision, "made_by_amd", lambda: amd)
    assert precision.resolve("auto", torch.device("cpu"), 192) == ("bf16" if pays else "fp32")


def test_a_comparison_of_unequal_sizes_says_so() -> None:
    def row(run: str, architecture: str, parameters: int, bpb: float) -> dict[str, Any]:
        return {"run": run, "architecture": architecture, "bpb": bpb, "parameters": parameters, "shown": {"bpb": {"format": ".4f"}},
                "ranking": "bpb", "lower_is_better": True}  # fmt: skip

    unequal = lines_of([row("a", "one", 100, 1.5), row("b", "other", 130, 1.4)])
    assert "1.4000 *" in unequal[2] and unequal[-2] == "* the best"
    assert unequal[-1].startswith("sizes differ by 30%") and "compare --suite" in unequal[-1]
    assert lines_of([row("a", "one", 100, 1.5), row("b", "other", 103, 1.4)])[-1] == "* the best"
    assert lines_of([row("a", "one", 100, 1.5), row("b", "one", 130, 1.4)])[-1] == "* the best"
    assert len(lines_of([row("a", "one", 100, 1.5)])) == 2
    narrow = lines_of([row("runs/a", "one", 100, 1.5), row("runs/b", "other", 130, 1.4)], 40)
    assert narrow[0].split() == ["run", "runs/a", "runs/b"] and ["1.5000", "1.4000", "*"] == narrow[2].split()[1:] and max(map(len, narrow)) <= 40
    assert lines_of([row("a", "one", 100, 1.5), row("b", "other", 130, 1.4)], 200) == unequal
