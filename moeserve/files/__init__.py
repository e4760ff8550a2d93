"""Files that users name: settings, tokens, certificates, files of a checkpoint folder."""

from moeserve.files.reading import read_file, read_secret, require_file, require_folder
from moeserve.files.rotating import Rotating

__all__ = ["Rotating", "read_file", "read_secret", "require_file", "require_folder"]
