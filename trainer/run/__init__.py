"""The folder of a run and what a person sees of it: manifest, metrics, console, report."""
