"""Training runs of every kind: pretraining, the Video-VAE, and their demo."""
