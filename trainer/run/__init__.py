"""The folder of a run and what is shown of it: manifest, metrics, console, report."""
