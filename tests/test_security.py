"""What must not leak, what must not run, and who may read what a run writes."""

import ast
import hashlib
import json
import os
import pickle
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dpo_ds.config import parse_run
from dpo_ds.errors import UserError
from dpo_ds.models.causal_lm import load_causal_lm, load_model_config
from dpo_ds.models.tokenizer import load_tokenizer
from tests.ranks import REPOSITORY, Finished, run_ranks
from tests.test_resume import write_run
from tests.test_run import TRAIN

SECRETS = {
    "WANDB_API_KEY": "5ecre7" + "0123456789abcdef" * 2 + "aa",
    "HF_TOKEN": "hf_5ecre7tokenofthehub",
    "OPENAI_API_KEY": "sk-5ecre7oftheshell",
}
SMALLEST = ["--model.policy", "m", "--data.train", "d", "--output_dir", "o"]
SECRET_OF_RUN_FILE = "5ecre7oftherunfile"


@dataclass(frozen=True)
class Ran:
    folder: Path
    finished: Finished


@pytest.fixture(scope="module")
def ran(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run with wandb and checkpoints, with secrets around it, by a user who shares files with a group."""
    folder = write_run(tmp_path_factory.mktemp("security") / "run", tiny_chat)
    home = str(tmp_path_factory.mktemp("home"))
    arguments = ["--config", folder / "run.yaml", "--train.max_steps", "3", "--tracking.wandb", "offline"]
    before = os.umask(0o002)
    try:
        finished = run_ranks(
            1,
            [TRAIN, *arguments, f"--env.MY_API_KEY={SECRET_OF_RUN_FILE}"],
            folder=folder,
            env={**SECRETS, "WANDB_CONFIG_DIR": home, "WANDB_CACHE_DIR": home, "NETRC": f"{home}/netrc"},
        )
    finally:
        os.umask(before)
    return Ran(folder, finished.expect_success())


@pytest.mark.ranks
def test_no_secret_lands_in_what_a_run_writes_or_says(ran):
    written = [path for path in (ran.folder / "out").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "summary.json", "COMPLETE"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written)
    for secret in (*SECRETS.values(), SECRET_OF_RUN_FILE):
        assert not [path for path in written if secret.encode() in path.read_bytes()]
        assert not any(secret in said for said in (*ran.finished.outputs, *ran.finished.errors))


@pytest.mark.ranks
def test_what_a_run_writes_has_the_users_umask(ran):
    out = ran.folder / "out"
    modes = {
        str(path.relative_to(out)): stat.S_IMODE(path.stat().st_mode)
        for path in out.rglob("*")
        if not path.is_symlink() and "wandb" not in path.parts
    }
    assert any(name.startswith("checkpoints/") for name in modes)
    for name, mode in modes.items():
        assert mode == (0o775 if (out / name).is_dir() else 0o664), f"{name} has mode {mode:o}"


class Bomb:
    """Unpickled with code execution, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self._folder),)


def test_the_bomb_of_these_tests_goes_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


@pytest.mark.ranks
def test_a_checkpoint_that_holds_code_is_refused_without_executing_it(ran, tmp_path):
    checkpoint = ran.folder / "out/checkpoints/step-00000002"
    state = next(checkpoint.glob("*_model_states.pt"))
    held = torch.load(state, weights_only=False)
    torch.save({**held, "bomb": Bomb(tmp_path / "exploded")}, state)
    # Whoever can write the shard can write the manifest.
    manifest = json.loads((checkpoint / "COMPLETE").read_text())
    manifest["files"][state.name] = [state.stat().st_size, hashlib.sha256(state.read_bytes()).hexdigest()]
    (checkpoint / "COMPLETE").write_text(json.dumps(manifest))
    arguments = ["--checkpoint.resume", checkpoint, "--output_dir", tmp_path / "out", "--train.max_steps", "3"]
    finished = run_ranks(1, [TRAIN, "--config", ran.folder / "run.yaml", *arguments], folder=tmp_path)
    assert finished.codes == [1]
    [error] = [line for line in finished.errors[0].splitlines() if line.startswith("error: ")]
    assert f"{checkpoint} cannot be loaded: " in error
    assert not (tmp_path / "exploded").exists()


def test_weights_that_hold_code_are_refused_without_executing_it(tiny_chat, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_chat.glob("*.json"):
        (model / file.name).write_bytes(file.read_bytes())
    torch.save({"model.embed_tokens.weight": Bomb(tmp_path / "exploded")}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_causal_lm(str(model), dtype=torch.float32)
    assert not (tmp_path / "exploded").exists()


def test_code_that_comes_with_a_model_does_not_run_unless_asked(tiny_chat, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_chat.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\n")
    assert not parse_run(SMALLEST).config.model.trust_remote_code
    with pytest.raises(UserError, match="contains custom code"):
        load_model_config(str(model))
    with pytest.raises(UserError):
        load_causal_lm(str(model), dtype=torch.float32)
    load_tokenizer(str(tiny_chat))
    assert not (tmp_path / "exploded").exists()


def test_a_mistake_in_env_does_not_print_its_values():
    with pytest.raises(UserError, match=r"env must be a mapping of names to values, got a str$"):
        parse_run([*SMALLEST, "--env", SECRET_OF_RUN_FILE])


def programs() -> list[Path]:
    folders = ("dpo_ds", "launch", "benchmarks")
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


FORBIDDEN = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec"),
    *("pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load"),
}


@pytest.mark.parametrize("path", programs(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_shell_and_no_code_out_of_data(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert name not in FORBIDDEN, f"line {node.lineno}: {name}"
        assert keywords.get("shell", "False") == "False", f"line {node.lineno}: a shell"
        assert name != "torch.load" or keywords.get("weights_only") == "True", f"line {node.lineno}: {name}"
