"""Training runs of every kind: pretraining, the Video-VAE, and their demo."""

import warnings

# Without Transformer Engine megatron-core warns four times in every rank; a run's first lines name its layer spec.
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
# megatron-core 0.16 calls collectives by names that torch 2.13 renames.
warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
