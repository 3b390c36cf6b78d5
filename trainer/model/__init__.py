"""The network: a Hugging Face decoder with packed attention, adapters, precision, recomputation and FSDP."""
