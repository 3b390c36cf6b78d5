"""medtrain: continued pretraining and Reasoning Preference Optimization for medical language models.

The public face is small and lazy, so that ``import medtrain`` costs nothing:

    from medtrain import chunked_logps, rpo_loss
"""

import os

__version__ = "0.1.0"
__all__ = ["chunked_logps", "rpo_loss", "__version__"]

if not os.path.isdir(os.path.join(__path__[0], "kernels")):  # a checkout without symbolic links: the folders lie beside
    __path__.append(os.path.dirname(__path__[0]))


def __getattr__(name: str):
    if name == "chunked_logps":
        from medtrain.kernels.logps import chunked_logps

        return chunked_logps
    if name == "rpo_loss":
        from medtrain.kernels.preference import rpo_loss

        return rpo_loss
    raise AttributeError(f"module 'medtrain' has no attribute {name!r}")
