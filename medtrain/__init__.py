"""medtrain: continued pretraining and Reasoning Preference Optimization for medical language models.

The public face is small and lazy, so that ``import medtrain`` costs nothing:

    from medtrain import chunked_logps, rpo_loss
"""

import os

__version__ = "0.1.0"
__all__ = ["chunked_logps", "rpo_loss", "__version__"]

# torchao's C++ extensions are built per torch release; without this it warns on every CPU build.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")


def __getattr__(name: str):
    if name == "chunked_logps":
        from medtrain.kernels.logps import chunked_logps

        return chunked_logps
    if name == "rpo_loss":
        from medtrain.kernels.preference import rpo_loss

        return rpo_loss
    raise AttributeError(f"module 'medtrain' has no attribute {name!r}")
