"""`python -m megatron_video` is the `megatron-video` command."""

from megatron_video.cli import main

if __name__ == "__main__":
    main()
