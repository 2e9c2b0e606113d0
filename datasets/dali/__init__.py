"""Decode clips with NVIDIA DALI: small files with the packets of a clip, a queue of runs, decoders on CPU or GPU."""
