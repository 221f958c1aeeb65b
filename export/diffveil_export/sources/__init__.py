"""What weights come in: pickles, single files, adapters and hubs, all read without running."""
