"""What launch/ offers fits by the planner: the commands of its files, on the hardware that they name."""

import json
import pathlib
import re
import shlex

import pytest

from v4jax.cli import main
from v4jax.tools.topology import CHIPS, listed

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
yaml = pytest.importorskip("yaml", reason="reading manifests needs PyYAML, which comes with ml_collections")


def commands(text: str, program: str) -> list[list[str]]:
    """Arguments of every `program ...` in the comments of a file; a backslash continues a line."""
    lines = "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    found = re.findall(rf"^{re.escape(program)}.*$", lines.replace("\\\n", " "), re.M)
    return [shlex.split(line.removeprefix(program)) for line in found]


def jobset(text: str) -> tuple[list[str], list[str]]:
    """Arguments and topology of a JobSet."""
    spec = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    place, [container] = pod["nodeSelector"], pod["containers"]
    if "cloud.google.com/gke-tpu-topology" in place:
        chip = re.fullmatch(r"tpu-(\w+)-slice", place["cloud.google.com/gke-tpu-accelerator"])[1]
        return container["args"], [f"{chip}:{place['cloud.google.com/gke-tpu-topology']}"]
    chip = re.match(r"nvidia-(\w+)-80gb", place["cloud.google.com/gke-accelerator"])[1]
    gpus = spec["parallelism"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    return container["args"], [f"{chip}:{gpus}"]


def sbatch(text: str) -> tuple[list[str], list[str]]:
    """Arguments and topology of a Slurm script: of the example in its header, on the nodes that it asks for."""
    option = lambda name: int(re.search(rf"^#SBATCH --{name}=(\d+)$", text, re.M)[1])
    [arguments] = commands(text, "sbatch launch/slurm/train.sbatch")
    return arguments, [f"h100:{option('nodes') * option('gpus-per-node')}"]


def tpu_vm(text: str) -> tuple[list[str], list[str]]:
    """Arguments and topology of the TPU VM script, whose header names an accelerator type and a shape."""
    shape, kind = re.search(r"topology ([\dx]+) \(accelerator type (v5p-\d+)", text).groups()
    [arguments] = commands(text, "launch/tpu_vm/train.sh NAME ZONE gs://BUCKET/DIR train")
    return arguments, [f"v5p:{shape}", kind]


def image(text: str) -> tuple[list[str], list[str]]:
    """Arguments and topologies of an image: the smallest of each chip that its header names."""
    [arguments] = [line[line.index("train") + 1 :] for line in commands(text, "docker run") if "train" in line]
    hardware = re.search(r"Hardware: .*", text)[0].lower()
    return arguments, [listed(chip)[0].name for name, chip in CHIPS.items() if re.search(rf"\b{name}\b", hardware)]


READERS = {"gke": jobset, "slurm": sbatch, "tpu_vm": tpu_vm, "docker": image}
NO_HARDWARE = {"cpu.Dockerfile", "setup.sh", "start.sh"}  # files that name no accelerator and start no model
FILES = sorted(path for path in LAUNCH.glob("*/*") if path.name not in NO_HARDWARE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_launch_examples_fit_their_hardware(path, tmp_path, capsys):
    text = path.read_text()
    arguments, topologies = READERS[path.parent.name](text)
    flags = [argument for argument in arguments if argument.startswith("--config")]
    assert flags and topologies
    for topology in topologies:
        out = tmp_path / "plan.json"
        status = main(["plan", f"--topology={topology}", "--analytic", f"--json={out}", *flags])
        assert status == 0, capsys.readouterr().out
        value = {r["metric"]: r["value"] for r in json.loads(out.read_text()) if r.get("part", "total") == "total"}
        for share in re.findall(r"reports (\d+) %", " ".join(text.replace("\n#", "").split())):
            assert round(100 * value["device_bytes"] / value["device_bytes_limit"]) == int(share)


def test_what_the_examples_were_does_not_fit():
    """So the test above can fail."""
    flags = ["--config=v4_flash", "--config.mesh.rules=pod", "--config.mesh.expert=8", "--analytic"]
    assert main(["plan", "--topology=h100:64", *flags]) == 3
