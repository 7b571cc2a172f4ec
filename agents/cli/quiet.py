"""What the commands do not show."""


def quieten_hugging_face() -> None:
    """Show no bar for every file of a model that is read or written."""
    from transformers.utils import logging

    logging.disable_progress_bar()
