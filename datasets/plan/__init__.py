"""From integers to plans: which video, which frames, which pixels, which augmentation. Torch-free."""
