"""Triton kernels behind `megatron_video.dit.fused`; importing one of these modules needs triton."""
