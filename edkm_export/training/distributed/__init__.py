"""One model trained by several processes: FSDP2, with indices gathered instead of weights."""
