"""The package is found however it is started, and does not stand in another's way."""

import subprocess
import sys
from pathlib import Path

from setuptools import find_namespace_packages

ROOT = Path(__file__).resolve().parent.parent


def test_the_folder_kernels_is_no_package_that_could_shadow_the_published_one():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_module_of_the_top_level_folders_goes_into_a_wheel():
    packages = set(find_namespace_packages(str(ROOT), include=["medtrain", "medtrain.*"]))
    for folder in ("kernels", "trainer", "benchmarks", "configs"):
        for module in (ROOT / folder).rglob("*.py"):
            package = ".".join(["medtrain", *module.relative_to(ROOT).parent.parts])
            assert package in packages, module


def test_the_command_starts_from_another_folder_and_as_a_module(tmp_path):
    for words in (
        ["-m", "medtrain", "--version"],
        ["-c", "from medtrain.trainer.cli import main; main(['--version'])"],
    ):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0 and "0.1.0" in done.stdout, done.stderr


def test_the_public_face_is_lazy():
    code = "import medtrain, sys; assert 'torch' not in sys.modules; from medtrain import chunked_logps, rpo_loss"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
