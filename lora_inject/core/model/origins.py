"""The files that an adapter on a model was read from, or written to, last."""

from pathlib import Path

from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import records_of


def note_files(survey: Survey, name: str, path: Path | None) -> None:
    """Note the files of an adapter, for whoever asks what it should compute; None: it has none."""
    for _, record in records_of(survey, name):
        if path is None:
            record.files.pop(name, None)
        else:
            record.files[name] = str(path.absolute())
