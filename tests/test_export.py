"""launch/export.py on real ranks: a checkpoint's model without training, its card, and a hub that refuses it."""

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ds.cli.model_card import shown_source
from dpo_ds.cli.preflight import preflight
from dpo_ds.cli.publish import push_to_hub
from dpo_ds.config import parse_run
from dpo_ds.errors import UserError
from tests.ranks import REPOSITORY, run_ranks
from tests.test_resume import write_run
from tests.test_run import TRAIN

EXPORT = REPOSITORY / "launch/export.py"
TOKEN = "hf_5ecre7tokenofthehub"


@pytest.fixture(scope="module")
def refusing_hub() -> Iterator[str]:
    """The address of a hub that knows nobody."""

    class Refusing(BaseHTTPRequestHandler):
        def _refuse(self) -> None:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_HEAD = _refuse  # noqa: N815 (the library's names)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def trained(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory, refusing_hub: str) -> Path:
    """A run on two ranks whose export a hub has refused."""
    folder = write_run(
        tmp_path_factory.mktemp("export") / "run",
        tiny_chat,
        train={"max_steps": 5, "eval_every": 2},
        checkpoint={"every": 2, "keep": 3},
    )
    command = [TRAIN, "--config", folder / "run.yaml", "--export.push_to_hub", "someone/model"]
    finished = run_ranks(2, command, folder=folder, env={"HF_ENDPOINT": refusing_hub, "HF_TOKEN": TOKEN})
    finished.expect_success()
    (folder / "said").write_text("".join(finished.errors))
    return folder


@pytest.mark.ranks
def test_a_hub_that_refuses_is_a_warning_and_the_export_stays(trained):
    [warning] = [line for line in (trained / "said").read_text().splitlines() if "someone/model" in line]
    assert warning.startswith("warning: someone/model was not pushed (")
    assert warning.endswith(f"to push it: hf upload someone/model {trained / 'out/export'} .")
    assert TOKEN not in (trained / "said").read_text()
    assert (trained / "out/export/SHA256SUMS").exists()


@pytest.mark.ranks
def test_a_hub_that_is_not_there_is_a_warning_too(trained, monkeypatch, capsys):
    nobody = ["--export.push_to_hub", "someone/model"]
    inputs = preflight(parse_run(["--config", str(trained / "run.yaml"), *nobody]), ranks=2, trains=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_to_hub(inputs)
    said = capsys.readouterr().err
    assert said.startswith("warning: someone/model was not pushed (")
    assert TOKEN not in said


@pytest.mark.ranks
def test_the_card_tells_where_the_model_comes_from_and_nothing_of_the_machine(trained, tiny_chat):
    text = (trained / "out/export/README.md").read_text()
    card = ModelCard(text)
    assert card.data.pipeline_tag == "text-generation"
    evaluation = [json.loads(line) for line in (trained / "out/metrics.jsonl").read_text().splitlines()]
    last = [line for line in evaluation if line["split"] == "eval"][-1]
    assert f"| loss | {last['loss']:.4g} |" in text
    assert f"after {last['step']} optimizer steps" in text
    assert "* pairs: 13 of `pairs.jsonl`, key `" in text
    assert f"`{tiny_chat.name}`" in text
    assert "loss.beta: 0.1" in text
    assert str(trained.parent) not in text
    assert str(tiny_chat.parent) not in text
    assert TOKEN not in text


@pytest.mark.ranks
def test_checkpoints_are_exported_without_training_and_the_run_is_left_as_it_was(trained, tmp_path):
    out = trained / "out"
    (out / "RESUME.json").write_text("{}")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    command = [EXPORT, "--config", trained / "run.yaml", "--export.folder", tmp_path / "newest"]
    finished = run_ranks(2, command, folder=tmp_path).expect_success()
    assert f"exported step 5 to {tmp_path / 'newest'}" in finished.outputs[0]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    for name in ("model.safetensors", "README.md", "config.json", "SHA256SUMS"):
        assert (tmp_path / "newest" / name).read_bytes() == (out / "export" / name).read_bytes()
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "newest", check=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "newest")
    assert AutoTokenizer.from_pretrained(tmp_path / "newest").eos_token_id == 1


@pytest.mark.ranks
def test_what_cannot_be_exported_is_refused_in_one_process(trained, tmp_path):
    def look(*arguments: str) -> str:
        return preflight(parse_run(["--config", str(trained / "run.yaml"), *arguments]), ranks=2, trains=False).plan

    fourth = trained / "out/checkpoints/step-00000004"
    assert look("--checkpoint.resume", str(fourth)) == f"exporting {fourth} to {trained / 'out/export'}"
    with pytest.raises(UserError, match="holds no complete checkpoint to export"):
        look("--output_dir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds something that is no verified export"):
        look("--export.folder", str(trained))
    with pytest.raises(UserError, match=r"export\.folder must be a folder, .*run\.yaml is a file"):
        look("--export.folder", str(trained / "run.yaml/there"))
    with pytest.raises(UserError, match=r"export\.push_to_hub must be null or a hub id"):
        look("--export.push_to_hub", "https://hub/model")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("gpt2", "gpt2"),
        ("/home/someone/models/mine", "mine"),
        ("data/pairs*.jsonl", "pairs*.jsonl"),
        ("../mine", "mine"),
        ("https://host/pairs.jsonl?token=secret", "pairs.jsonl"),
    ],
)
def test_a_card_names_what_is_local_without_its_folders(name, shown):
    assert shown_source(name) == shown
