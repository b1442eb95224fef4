"""What lies beside a multimodal model for its processor: copied beside the compressed one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from .sources import ModelSource

logger = logging.getLogger(__name__)

# As transformers names them. Copied and not loaded: that takes libraries of images and sound.
_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
)


def copy_processor_files(source: ModelSource, folder: Path) -> list[str]:
    """Copy the files of a model's processor, and code that they name, where `folder` has none; returns their names."""
    place = _folder_of(source)
    if place is None:
        return []
    names = [name for name in _FILES if (place / name).is_file()]
    for name in [name for name in names if name.endswith(".json")]:
        auto_map = json.loads((place / name).read_text(encoding="utf-8")).get("auto_map") or {}
        modules = {str(value).rpartition("--")[2].partition(".")[0] for value in auto_map.values()}
        names += sorted(f"{module}.py" for module in modules if (place / f"{module}.py").is_file())
    copied = [name for name in dict.fromkeys(names) if not (folder / name).exists()]
    for name in copied:
        shutil.copyfile(place / name, folder / name)
    return copied


def _folder_of(source: ModelSource) -> Path | None:
    """Where the files are on this machine; those of the hub are fetched. None where that fails, which is logged."""
    from huggingface_hub import snapshot_download

    place = Path(source.location).expanduser()
    if place.is_dir() or source.gguf_file is not None:
        return place
    try:
        return Path(snapshot_download(source.location, allow_patterns=[*_FILES, "*.py"]))
    except (OSError, ValueError) as error:
        logger.warning(
            "the files of the processor of %s, if it has one, were not copied (%s): save them yourself "
            "(processor.save_pretrained)",
            source.typed,
            " ".join(str(error).split())[:200],
        )
        return None
