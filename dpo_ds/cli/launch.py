"""``python -m dpo_ds launch``: hands a run to ssh, to a scheduler, or to this machine's node agent."""

import argparse
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_ds.config import Run, parse_run, resolve_path
from dpo_ds.errors import UserError
from dpo_ds.launcher.agent import Agent, node_from
from dpo_ds.launcher.ssh import Host, SshJob, jobs_of_hosts, passed_on, read_hostfile, ssh_command


def launch(argv: Sequence[str]) -> int:
    """Starts or submits a run, or with ``--dry_run`` prints what would be.

    Args:
        argv: options of ``launch`` and arguments of the run, in any order.

    Returns:
        The exit code: the run's, where this waits for it; else that of the scheduler's own command.

    Raises:
        UserError: the run file or an option is wrong.
    """
    options, arguments = _parser().parse_known_args(argv)
    # Checked here, where a mistake costs no place in a queue.
    run = parse_run(arguments)
    for name, seconds in (("--grace", options.grace), ("--silence", options.silence)):
        if not seconds > 0:
            raise UserError(f"{name} must be a number of seconds > 0, got {seconds:g}")
    script = resolve_path(options.script, key="--script", run_file=None)
    secrets = _secrets(options.env_file) if options.env_file else {}
    started: dict[str, Any] = {"local": _local, "ssh": _ssh, "slurm": _slurm, "kubernetes": _kubernetes}
    code: int = started[options.on](options, [script, *arguments], secrets, run)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpo_ds launch",
        description=__doc__,
        epilog="Everything else belongs to the run, as behind launch/train.py: --config RUN.yaml --section.key value",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--on", choices=("local", "ssh", "slurm", "kubernetes"), default="local")
    add("--nodes", type=int, help="machines; default: all of the hostfile, else 1")
    add("--gpus", type=int, help="ranks on each machine; default: the hostfile's slots, else one a device")
    add("--hostfile", type=Path, default=Path("hostfile"), help="of ssh: lines of NAME slots=RANKS")
    add("--master_addr", help="where ranks meet; default: the first machine's name")
    add("--master_port", type=int)
    add("--env_file", type=Path, help="YAML mapping of secret variables for the ranks, readable by you alone")
    add("--grace", type=float, default=600.0, help="seconds that ranks have to save when they are asked to stop")
    add("--silence", type=float, default=15.0, help="of ssh: seconds after which a silent machine counts as lost")
    add(
        "--option",
        action="append",
        default=[],
        help="one more option of sbatch or kubectl, as in --option=--time=9:0:0",
    )
    add("--manifest", default="launch/kubernetes.yaml", help="of kubernetes: a copy of it with your image and volumes")
    add("--script", default="launch/train.py")
    add("--dry_run", action="store_true", help="print what would be run or submitted, and do nothing")
    return parser


def _secrets(path: Path) -> dict[str, str]:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise UserError(f"--env_file {path} may be read by others (mode {mode:o}); chmod 600 {path}")
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        # The parser's own words would quote the file.
        raise UserError(f"--env_file {path} cannot be read as YAML ({type(error).__name__})") from None
    if not isinstance(values, dict) or not all(isinstance(part, str) for item in values.items() for part in item):
        raise UserError(f"--env_file {path} must be a mapping of names to strings; quote numbers")
    return values


def _local(options: argparse.Namespace, command: list[str], secrets: dict[str, str], run: Run) -> int:
    if (options.nodes or 1) != 1:
        raise UserError(
            f"--nodes must be 1 on this machine alone, got {options.nodes}; say --on ssh, slurm or kubernetes"
        )
    if options.dry_run:
        ranks = ["--ranks", str(options.gpus)] if options.gpus else []
        print(shlex.join([sys.executable, "-m", "dpo_ds.launcher.agent", *ranks, "--", *command]))
        return 0
    os.environ.update(secrets)
    return Agent(command, node_from({}, ranks=options.gpus, port=options.master_port), grace_s=options.grace).run()


def _ssh(options: argparse.Namespace, command: list[str], secrets: dict[str, str], run: Run) -> int:
    hosts = read_hostfile(options.hostfile)
    if options.nodes is not None:
        if not 1 <= options.nodes <= len(hosts):
            raise UserError(f"--nodes must be from 1 to {len(hosts)}, the machines of {options.hostfile}")
        hosts = hosts[: options.nodes]
    if options.gpus is not None:
        hosts = [Host(host.name, options.gpus) for host in hosts]
    environment = passed_on(os.environ)
    jobs = jobs_of_hosts(
        hosts,
        command,
        folder=str(Path.cwd()),
        environment=environment | secrets,
        address=options.master_addr,
        port=options.master_port,
        grace_s=options.grace,
        silence_s=options.silence,
    )
    if options.dry_run:
        print(f"variables    {' '.join(sorted(environment | secrets))}")
        for host, job in zip(hosts, jobs, strict=True):
            print(f"{host.name:<12} {shlex.join(ssh_command(host, silence_s=options.silence))}")
            print(f"{'':<12} there: {shlex.join(job.arguments)}")
        return 0
    return SshJob(hosts, jobs, grace_s=options.grace, silence_s=options.silence).run()


def _slurm(options: argparse.Namespace, command: list[str], secrets: dict[str, str], run: Run) -> int:
    batch = resolve_path("launch/slurm.sbatch", key="launch/slurm.sbatch", run_file=None)
    gpus = [f"--gpus-per-node={options.gpus}"] if options.gpus else []
    submit = ["sbatch", f"--nodes={options.nodes or 1}", *gpus, *options.option, batch, *command]
    if options.dry_run:
        print(f"{shlex.join(submit)}\n\n{Path(batch).read_text()}", end="")
        return 0
    return _handed_over(submit, environment=secrets)


def _kubernetes(options: argparse.Namespace, command: list[str], secrets: dict[str, str], run: Run) -> int:
    if secrets:
        raise UserError(
            "--env_file is not for kubernetes: put secrets into a Secret, which the manifest's envFrom names"
        )
    manifest = Path(resolve_path(options.manifest, key="--manifest", run_file=None)).read_text()
    filled = kubernetes_manifest(
        manifest, nodes=options.nodes or 1, gpus=options.gpus or 1, arguments=[options.script, *command[1:]]
    )
    if options.dry_run:
        print(filled, end="")
        return 0
    return _handed_over(["kubectl", "apply", *options.option, "-f", "-"], given=filled)


def kubernetes_manifest(manifest: str, *, nodes: int, gpus: int, arguments: Sequence[str]) -> str:
    """Fills a job's size and arguments into a manifest.

    Args:
        manifest: YAML with an indexed ``Job`` whose first container runs the node agent, as ``launch/kubernetes.yaml``.
        nodes: pods.
        gpus: ranks of each.
        arguments: the script's name in the image and its arguments.

    Raises:
        UserError: there is no such job in it.
    """
    documents = list(yaml.safe_load_all(manifest))
    jobs = [document for document in documents if document and document.get("kind") == "Job"]
    if len(jobs) != 1:
        raise UserError(f"--manifest must hold one Job, got {len(jobs)}; begin with a copy of launch/kubernetes.yaml")
    spec = jobs[0]["spec"]
    spec["completions"] = spec["parallelism"] = nodes
    container = spec["template"]["spec"]["containers"][0]
    container["args"] = ["--nodes", str(nodes), "--ranks", str(gpus), "--", *arguments]
    container["resources"]["limits"]["nvidia.com/gpu"] = gpus
    text: str = yaml.safe_dump_all(documents, sort_keys=False)
    return text


def _handed_over(command: list[str], *, environment: dict[str, str] | None = None, given: str | None = None) -> int:
    try:
        done = subprocess.run(command, env={**os.environ, **(environment or {})}, input=given, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {command[0]} on this machine; submit where there is one, or add --dry_run"
        ) from error
    return done.returncode
