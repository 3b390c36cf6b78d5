"""The package is found however it is started, and does not stand in another's way."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "configs", "kernels", "trainer")


def run(*words, cwd, path=None):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(path)} if path is not None else {}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def source_tree(at, kind):
    """What a download of this repository holds. A zip and a clone without symbolic links have text files for links."""
    at.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, at)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, at / name, ignore=shutil.ignore_patterns("__pycache__"))
    (at / "medtrain").mkdir()
    for file in (ROOT / "medtrain").glob("*.py"):
        shutil.copy(file, at / "medtrain")
    for name in FOLDERS:
        link = at / "medtrain" / name
        link.symlink_to(f"../{name}") if kind == "links" else link.write_text(f"../{name}")
    return at


def build(tree, what, out):
    """``what`` (wheel or sdist) built of ``tree`` by what pip calls, without pip and network."""
    out.mkdir(parents=True)
    run("-c", f"from setuptools import build_meta; build_meta.build_{what}({str(out)!r})", cwd=tree)
    return next(out.iterdir())


def content(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {info.filename: info.CRC for info in file.infolist()}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Wheels of each kind of source."""
    root = tmp_path_factory.mktemp("sources")
    trees = {kind: source_tree(root / kind, kind) for kind in ("links", "text files")}
    with tarfile.open(build(trees["text files"], "sdist", root / "sdist")) as file:
        file.extractall(root / "unpacked", filter="data")
    trees["sdist"] = next((root / "unpacked").iterdir())
    return {kind: build(tree, "wheel", root / "wheels" / kind) for kind, tree in trees.items()}


# Finding costs no import of torch.
USE = """
import importlib.util, sys
import medtrain.trainer.cli
from medtrain.trainer.exam.prompts import load_style
for name in ("kernels.preference", "trainer.train.loop", "trainer.demo.run", "benchmarks.kernels"):
    assert importlib.util.find_spec("medtrain." + name), name
assert load_style("official") and "torch" not in sys.modules
print(medtrain.__file__)
"""


def test_the_folder_kernels_is_no_package_that_could_shadow_the_published_one():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("kind", ["links", "text files", "sdist"])
def test_a_wheel_of_any_source_holds_every_module_and_works(wheels, kind, tmp_path):
    found = content(wheels[kind])
    record = {name for name in found if name.endswith("/RECORD")}
    for folder in FOLDERS:
        for file in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")]:
            assert f"medtrain/{file.relative_to(ROOT).as_posix()}" in found
    links = content(wheels["links"])
    assert {name: found[name] for name in found.keys() - record} == {name: links[name] for name in links.keys() - record}
    with zipfile.ZipFile(wheels[kind]) as file:
        file.extractall(tmp_path)
    assert run("-c", USE, cwd=tmp_path / "medtrain", path=tmp_path).strip() == str(tmp_path / "medtrain/__init__.py")


@pytest.mark.parametrize("kind", ["links", "text files"])
def test_a_checkout_works_uninstalled_and_editable(kind, tmp_path):
    tree = source_tree(tmp_path / "tree", kind)
    assert run("-c", USE, cwd=tmp_path, path=tree).strip() == str(tree / "medtrain/__init__.py")
    site = tmp_path / "site"
    site.mkdir()
    run("-c", f"from setuptools import build_meta; build_meta.build_editable({str(site)!r})", cwd=tree)
    with zipfile.ZipFile(next(site.iterdir())) as file:
        file.extractall(site)
    # -S: the environment's own .pth files, where this project may be installed too, are not read.
    libraries = [path for path in sys.path if path.endswith("-packages")]
    code = f"import site, sys; site.addsitedir({str(site)!r}); sys.path += {libraries!r}\n{USE}"
    assert run("-S", "-c", code, cwd=tmp_path).strip() == str(tree / "medtrain/__init__.py")


def test_the_command_starts_from_another_folder_and_as_a_module(tmp_path):
    for words in (["-m", "medtrain", "--version"], ["-c", "from medtrain.trainer.cli import main; main(['--version'])"]):
        assert "0.1.0" in run(*words, cwd=tmp_path, path=ROOT)


def test_the_public_face_is_lazy():
    run("-c", "import medtrain, sys; assert 'torch' not in sys.modules; from medtrain import chunked_logps, rpo_loss", cwd=ROOT)
