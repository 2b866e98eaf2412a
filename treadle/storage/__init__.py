"""Where files are: on this machine, or behind a URL (s3://, gs://, hf://, https://, memory:// ...)."""
