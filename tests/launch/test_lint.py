"""The linters of the trade find nothing in launch/: shellcheck, hadolint, yamllint and the schema of Kubernetes."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
YAMLLINT = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
KUBERNETES = "1.31"
SHELLS = [*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")]
MANIFESTS = list(LAUNCH.glob("gke/*.yaml"))
JOBSET = {  # fields of a JobSet, jobset.x-k8s.io/v1alpha2; its schema comes with no package
    "spec": {
        "replicatedJobs",
        "network",
        "successPolicy",
        "failurePolicy",
        "startupPolicy",
        "suspend",
        "coordinator",
        "managedBy",
        "ttlSecondsAfterFinished",
    },
    "network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "replicatedJobs": {"name", "groupName", "replicas", "template", "dependsOn"},
}


def lint(program: str, *arguments) -> None:
    """Run a linter, which must find nothing; skips where it is not installed."""
    path = shutil.which(program, path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"no {program} here; the extra `test` has it on x86-64")
    found = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, cwd=LAUNCH.parent)
    assert found.returncode == 0 and found.stdout == "", found.stdout + found.stderr


def test_shells():
    assert len(SHELLS) >= 7
    lint("shellcheck", "--external-sources", *SHELLS)


def test_the_bash_completion_is_clean(tmp_path):
    from v4jax import cli, cli_completion

    (tmp_path / "v4jax.bash").write_text(cli_completion.script(cli.COMMANDS, ["bash"]))
    lint("shellcheck", "--shell=bash", tmp_path / "v4jax.bash")


def test_images():
    lint("hadolint", *LAUNCH.glob("docker/*.Dockerfile"))


def test_yaml():
    lint("yamllint", "--strict", "-d", YAMLLINT, *MANIFESTS)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_have_the_schema_of_kubernetes(path):
    validate = pytest.importorskip("kubernetes_validate", reason="the extra `test` has kubernetes-validate").validate
    import yaml

    spec = yaml.safe_load(path.read_text())["spec"]
    for part, value in [
        ("spec", spec),
        *((name, spec.get(name, {})) for name in ("network", "failurePolicy")),
        *(("replicatedJobs", job) for job in spec["replicatedJobs"]),
    ]:
        assert set(value) <= JOBSET[part], part
    for job in spec["replicatedJobs"]:  # a JobSet creates Jobs of its templates
        document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", list(LAUNCH.glob("docker/*.Dockerfile")), ids=lambda path: path.name)
def test_images_have_a_user_who_can_write_where_the_volume_belongs(path):
    text = path.read_text()
    assert re.search(r"^WORKDIR /runs$", text, re.M)
    if path.stem == "tpu":  # root
        return
    assert "chown 1000:1000 /runs" in text and re.search(r"^USER 1000:1000$", text, re.M)
    assert "chmod 1777 /home" in text and '--user "$(id -u):$(id -g)"' in text
