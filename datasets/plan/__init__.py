"""Turn integers into plans: which video, which frames, which pixels, which augmentation. Torch-free."""
