"""From files to micro-batches: sources, tokens, windows and pairs, the order of samples, packing, the ledger."""
