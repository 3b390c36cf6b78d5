"""Packaging. The top-level folders become ``medtrain.kernels`` etc. by ``package_dir``, not by the links in ``medtrain/``:
a zip download, or a clone on a system without symbolic links, has text files in their place."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("benchmarks", "configs", "kernels", "trainer")

setup(
    name="medtrain",
    version="0.1.0",
    description="Continued pretraining and Reasoning Preference Optimization for medical language models",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["medtrain"]
    + [f"medtrain.{name}" for top in FOLDERS for name in find_namespace_packages(include=[top, f"{top}.*"])],
    package_dir={f"medtrain.{top}": top for top in FOLDERS},
    package_data={"": ["*.yaml", "*.sh", "*.json", "*.md", "*.html"]},
    # Ranges that were tested at both ends: lines `"name>=lowest,<next",`, which `make test-lowest` reads. In between stands
    # constraints.txt.
    install_requires=[
        "torch>=2.11,<2.14",
        'triton>=3.6,<3.8; platform_system == "Linux"',
        "transformers>=5.17,<5.25",
        "peft>=0.18,<0.22",
        "torchao>=0.17,<0.19",
        "safetensors>=0.8,<0.9",
        "numpy>=2.0,<2.6",
        "pyarrow>=16,<27",
        "fsspec>=2024.2,<2027",
        "click>=8.4.2,<8.6",
        "pyyaml>=6.0.1,<6.1",
        "rich>=13,<15.1",
        "jinja2>=3.1,<3.2",
        "tensorboard>=2.20,<2.22",
        "matplotlib>=3.9,<3.12",
    ],
    extras_require={
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "ruff>=0.6", "pyright[nodejs]>=1.1.414", "setuptools>=70.1"],
        # Faster norms, rotary embedding and SwiGLU on CUDA (model.kernels).
        "liger": ["liger-kernel>=0.8.5,<0.9"],
        # Peers of `medtrain bench kernels`, at the versions its goals name; nothing else imports them.
        "bench": ["trl==1.16.0", "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"],
    },
    entry_points={"console_scripts": ["medtrain=medtrain.trainer.cli:main"]},
)
