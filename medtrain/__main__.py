"""``python -m medtrain`` is the same as the ``medtrain`` command."""

from medtrain.trainer.cli import main

if __name__ == "__main__":
    main()
