"""What a run will hold in GPU memory, computed before any GPU is used."""
