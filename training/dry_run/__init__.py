"""`--dry-run` of the training commands: everything that can be known of a job before it is submitted."""
