"""The tasks that come with the library, one file per family."""
