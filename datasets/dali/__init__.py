"""Clips by NVIDIA DALI: a small file of the packets that a clip needs, a queue of them, decoders on CPU or GPU."""
